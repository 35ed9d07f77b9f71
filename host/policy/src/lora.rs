//! Low-rank adapters (LoRA, arXiv 2106.09685): a frozen base, and for each targeted projection two small matrices that are
//! trained, `y = x W + (alpha / rank) (x A) B`.
//!
//! Sampling and training run the same two extra products, so log-probs of both stay equal bit by bit. The backward pass goes
//! through the low rank too and never forms the gradient of `W`. (Rejected: merging `A B` into `W` before every step. It
//! would save moments but no arithmetic, and sampling would have to pack all weights again after each step.)
//!
//! Projections that share an input are done in one product: their `A` stand side by side, their `B` are the blocks of a
//! block-diagonal matrix. The zeros between the blocks are multiplied along; at these ranks that is less than a second pass.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use fulgurite_core::seed::{Generator, Seed};

use crate::config::invalid;
use crate::error::PolicyError;
use crate::gradient_kernel::add_outer;
use crate::kernel::{self, Packed};
use crate::parameters::{Kind, ParameterSpec, Parameters, Values};
use crate::shape::ModelShape;

/// Largest rank. Above it full training is cheaper.
const RANK_MAX: usize = 1_024;
/// Most models beside the policy: each has weights and moments of its own.
const MODELS_MAX: usize = 64;
/// Longest name of a model in bytes. 32: metrics are named after models.
const MODEL_NAME_BYTES_MAX: usize = 32;

/// A projection that an adapter can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoraTarget {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention's output.
    O,
    /// The gate of the feed-forward part.
    Gate,
    /// The other factor of the feed-forward part.
    Up,
    /// The feed-forward part's output.
    Down,
}

impl LoraTarget {
    /// All of them, in the order in which tensors stand.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The module's name in Hugging Face's models, which is what PEFT's `target_modules` lists.
    #[must_use]
    pub fn module(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// Its name in a config.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.module().strip_suffix("_proj").unwrap_or_default()
    }

    /// The module's path inside its layer.
    fn path(self) -> String {
        let parent = if self < Self::Gate { "self_attn" } else { "mlp" };
        format!("{parent}.{}", self.module())
    }
}

/// `[policy.local.lora]`: train adapters instead of all weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Columns of `A` and rows of `B`. 16.
    pub rank: usize,
    /// The product is scaled by `alpha / rank`. 32, twice the rank: the usual choice.
    pub alpha: f64,
    /// Which projections have adapters: `q`, `k`, `v`, `o`, `gate`, `up`, `down`. All: at equal cost it learns most.
    pub targets: Vec<LoraTarget>,
    /// Names of further adapters beside the policy's own. None. Each is sampled from and trained by its name.
    pub adapters: Vec<String>,
    /// A PEFT folder that the policy's own adapter starts from, relative to the config file; its rank, alpha and targets must be
    /// those said here. None: it starts as one that changes nothing. The reference of a KL term is the base in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter_directory: Option<PathBuf>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        let targets = LoraTarget::ALL.to_vec();
        Self { rank: 16, alpha: 32.0, targets, adapters: vec![], adapter_directory: None }
    }
}

impl LoraConfig {
    /// Checks the fields.
    ///
    /// # Errors
    /// Names the first field that cannot be used.
    pub fn check(&self) -> Result<(), PolicyError> {
        if !(1..=RANK_MAX).contains(&self.rank) {
            return Err(invalid("lora.rank", self.rank, &format!("use 1 to {RANK_MAX}")));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return Err(invalid("lora.alpha", self.alpha, "use a positive number"));
        }
        if self.targets.is_empty() {
            return Err(invalid("lora.targets", "empty", "name at least one of q, k, v, o, gate, up, down"));
        }
        match names_problem(&self.adapters) {
            Some(problem) => Err(invalid("lora.adapters", self.adapters.join(", "), &problem)),
            None => Ok(()),
        }
    }
}

/// What is wrong with the names of the models beside the policy, if anything is.
pub(crate) fn names_problem(names: &[String]) -> Option<String> {
    if names.len() > MODELS_MAX {
        return Some(format!("there are {} and may be {MODELS_MAX} beside the policy's own", names.len()));
    }
    names.iter().enumerate().find_map(|(at, name)| {
        let twice = || names.iter().skip(at + 1).any(|other| other == name).then_some("name each of them once");
        name_problem(name).or_else(twice).map(|problem| format!("`{name}`: {problem}"))
    })
}

/// Why a name cannot be a model's, if it cannot. Names become folders.
pub(crate) fn name_problem(name: &str) -> Option<&'static str> {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_');
    if name.is_empty() || name.len() > MODEL_NAME_BYTES_MAX || !name.bytes().all(fits) {
        Some("use 1 to 32 of a-z, 0-9, `-`, `_`")
    } else if matches!(name, "default" | "policy" | "critic" | "host" | "reward") {
        Some("that name has a meaning of its own")
    } else {
        None
    }
}

/// Which tensors an adapter has and how its product is scaled.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AdapterLayout {
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    /// Sorted, each once.
    pub(crate) targets: Vec<LoraTarget>,
}

impl AdapterLayout {
    /// Of a checked config.
    pub(crate) fn new(config: &LoraConfig) -> Self {
        let mut targets = config.targets.clone();
        targets.sort_unstable();
        targets.dedup();
        Self { rank: config.rank, alpha: config.alpha, targets }
    }

    #[expect(clippy::cast_possible_truncation, reason = "the model computes in f32")]
    pub(crate) fn scale(&self) -> f32 {
        (self.alpha / self.rank as f64) as f32
    }

    /// All tensors: per layer and target `A` as `[rank, in]` and `B` as `[rank, out]`, under PEFT's names.
    pub(crate) fn specs(&self, shape: &ModelShape) -> Vec<ParameterSpec> {
        let mut all = Vec::new();
        for layer in 0..shape.layers {
            for target in &self.targets {
                let (input, output) = dims(*target, shape);
                let name = |matrix: &str| {
                    format!("base_model.model.model.layers.{layer}.{}.lora_{matrix}.weight", target.path())
                };
                all.extend([
                    ParameterSpec { name: name("A"), kind: Kind::AdapterDown, dims: vec![self.rank, input] },
                    ParameterSpec { name: name("B"), kind: Kind::AdapterUp, dims: vec![self.rank, output] },
                ]);
            }
        }
        all
    }

    /// Place of a target's `A`; its `B` is the next tensor.
    pub(crate) fn place(&self, layer: usize, target: LoraTarget) -> Option<usize> {
        let at = self.targets.iter().position(|known| *known == target)?;
        Some(2 * (layer * self.targets.len() + at))
    }

    /// Initial values as PEFT's: `A` uniform within `1 / sqrt(in)` (Kaiming with a = sqrt 5), `B` zero, so that the adapter
    /// changes nothing yet. A function of the seed and each tensor's name.
    pub(crate) fn initial(&self, shape: &ModelShape, seed: Seed) -> Parameters {
        let specs = self.specs(shape);
        let values = specs
            .iter()
            .map(|spec| match (spec.kind, spec.dims.as_slice()) {
                (Kind::AdapterDown, [_, input]) => {
                    uniform(spec.len(), 1.0 / (*input as f64).sqrt(), seed.child("lora").child(&spec.name))
                }
                _ => vec![0.0; spec.len()],
            })
            .collect();
        Parameters { shape: shape.clone(), specs, values }
    }

    /// The plain model that base and adapter make together.
    pub(crate) fn merge(&self, base: &Parameters, adapter: &Parameters) -> Parameters {
        let mut merged = base.clone();
        for (spec, weight) in merged.specs.iter().zip(&mut merged.values) {
            self.add_to(&spec.name, weight, adapter);
        }
        merged
    }

    /// Adds an adapter's share to the base's tensor of this name, `[in, out]`, if it has one there.
    pub(crate) fn add_to(&self, name: &str, weight: &mut [f32], adapter: &Parameters) {
        let Some(module) = name.strip_suffix(".weight") else { return };
        let down_name = format!("base_model.model.{module}.lora_A.weight");
        let mut tensors = adapter.specs.iter().zip(&adapter.values).skip_while(|(spec, _)| spec.name != down_name);
        let (Some((down_spec, down)), Some((up_spec, up))) = (tensors.next(), tensors.next()) else { return };
        let ([_, input], [_, output]) = (down_spec.dims.as_slice(), up_spec.dims.as_slice()) else { return };
        let up: Vec<f32> = up.iter().map(|value| value * self.scale()).collect();
        let mut packed = Packed::default();
        packed.repack(&up, *output, 0, *output);
        // `A` lies as `[rank, in]`, which is the transposed left factor that an outer product wants.
        add_outer(down, *input, &packed, weight);
    }
}

/// Inputs and outputs of a projection.
fn dims(target: LoraTarget, shape: &ModelShape) -> (usize, usize) {
    let (d, ff) = (shape.d_model, shape.d_ff);
    match target {
        LoraTarget::Q => (d, shape.query_width()),
        LoraTarget::K | LoraTarget::V => (d, shape.kv_width()),
        LoraTarget::O => (shape.query_width(), d),
        LoraTarget::Gate | LoraTarget::Up => (d, ff),
        LoraTarget::Down => (ff, d),
    }
}

/// `len` draws from the open interval around 0.
fn uniform(len: usize, bound: f64, seed: Seed) -> Vec<f32> {
    let mut generator = Generator::new(seed);
    let mut draw = || ((generator.next_u64() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
    (0..len).map(|_| ((2.0 * draw() - 1.0) * bound) as f32).collect()
}

/// Projections of one layer that share an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Site {
    QueryKeyValue,
    AttentionOut,
    GateUp,
    Down,
}

/// Number of sites in a layer.
pub(crate) const SITES: usize = 4;

impl Site {
    const ALL: [Self; SITES] = [Self::QueryKeyValue, Self::AttentionOut, Self::GateUp, Self::Down];

    fn targets(self) -> &'static [LoraTarget] {
        match self {
            Self::QueryKeyValue => &[LoraTarget::Q, LoraTarget::K, LoraTarget::V],
            Self::AttentionOut => &[LoraTarget::O],
            Self::GateUp => &[LoraTarget::Gate, LoraTarget::Up],
            Self::Down => &[LoraTarget::Down],
        }
    }
}

/// The part of one target in its site.
#[derive(Debug, Clone, Copy)]
struct Part {
    /// Place of its `A` among the adapter's tensors.
    tensor: usize,
    /// Its columns in the site's output.
    first: usize,
    width: usize,
}

/// Sizes of a site, and the targets that the adapter has there.
struct SiteLayout {
    input: usize,
    output: usize,
    parts: Vec<Part>,
}

impl SiteLayout {
    /// `None` when the adapter has nothing there.
    fn new(layout: &AdapterLayout, shape: &ModelShape, layer: usize, site: Site) -> Option<Self> {
        let (mut input, mut output, mut parts) = (0, 0, Vec::new());
        for target in site.targets() {
            let (target_input, width) = dims(*target, shape);
            if let Some(tensor) = layout.place(layer, *target) {
                parts.push(Part { tensor, first: output, width });
            }
            input = target_input;
            output += width;
        }
        (!parts.is_empty()).then_some(Self { input, output, parts })
    }

    /// The `A` of all parts under each other, `[parts * rank, in]`, and their `B` as scaled blocks of
    /// `[parts * rank, out]`.
    fn matrices(&self, layout: &AdapterLayout, adapter: &Parameters) -> (Vec<f32>, Vec<f32>) {
        let tensor = |at: usize| adapter.values.get(at).map_or(&[][..], Vec::as_slice);
        let down = self.parts.iter().flat_map(|part| tensor(part.tensor)).copied().collect();
        let mut up = vec![0.0; self.parts.len() * layout.rank * self.output];
        let blocks = up.chunks_exact_mut((layout.rank * self.output).max(1));
        for (part, block) in self.parts.iter().zip(blocks) {
            let rows = block.chunks_exact_mut(self.output).zip(tensor(part.tensor + 1).chunks_exact(part.width));
            for (row, values) in rows {
                for (slot, value) in row.iter_mut().skip(part.first).zip(values) {
                    *slot = value * layout.scale();
                }
            }
        }
        (down, up)
    }

    fn rank(&self, layout: &AdapterLayout) -> usize {
        self.parts.len() * layout.rank
    }
}

type Sites<T> = [Option<T>; SITES];

fn all_sites<T>(layout: &AdapterLayout, shape: &ModelShape, make: impl Fn(SiteLayout) -> T) -> Vec<Sites<T>> {
    let of_layer = |layer| Site::ALL.map(|site| SiteLayout::new(layout, shape, layer, site).map(&make));
    (0..shape.layers).map(of_layer).collect()
}

fn resized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

/// An adapter as the forward pass multiplies it.
#[derive(Debug)]
pub(crate) struct PackedAdapter(Vec<Sites<PackedSite>>);

#[derive(Debug)]
struct PackedSite {
    /// `[in, rank]`.
    down: Packed,
    /// `[rank, out]`, scaled.
    up: Packed,
}

impl PackedAdapter {
    /// Packs an adapter.
    pub(crate) fn new(layout: &AdapterLayout, adapter: &Parameters) -> Self {
        Self(all_sites(layout, &adapter.shape, |site| {
            let (down, up) = site.matrices(layout, adapter);
            let rank = site.rank(layout);
            PackedSite {
                down: Packed::transposed(rank, &[(&down, site.input)]),
                up: Packed::new(rank, &[(&up, site.output)]),
            }
        }))
    }

    fn site(&self, layer: usize, site: Site) -> Option<&PackedSite> {
        self.0.get(layer)?.get(site as usize)?.as_ref()
    }

    /// Adds the adapter's share to the output `y` of a site whose input is `x`. `low` holds `x A` afterwards.
    pub(crate) fn add(&self, layer: usize, site: Site, x: &[f32], low: &mut Vec<f32>, y: &mut [f32]) {
        if let Some(packed) = self.project(layer, site, x, low) {
            kernel::multiply::<true>(low, &packed.up, y);
        }
    }

    /// The first half of [`add`](Self::add): what the backward pass needs of a site whose output is not asked for.
    pub(crate) fn keep(&self, layer: usize, site: Site, x: &[f32], low: &mut Vec<f32>) {
        let _ = self.project(layer, site, x, low);
    }

    fn project(&self, layer: usize, site: Site, x: &[f32], low: &mut Vec<f32>) -> Option<&PackedSite> {
        let packed = self.site(layer, site)?;
        let rows = x.len() / packed.down.k.max(1);
        kernel::multiply::<false>(x, &packed.down, resized(low, rows * packed.down.n));
        Some(packed)
    }
}

/// An adapter as the backward pass multiplies it.
#[derive(Debug)]
pub(crate) struct TransposedAdapter {
    layers: Vec<Sites<TransposedSite>>,
    rank: usize,
    scale: f32,
}

#[derive(Debug)]
struct TransposedSite {
    /// `[rank, in]`.
    down: Packed,
    /// `[out, rank]`, scaled.
    up: Packed,
    parts: Vec<Part>,
}

/// What one site's backward pass is given.
pub(crate) struct SiteGradient<'a> {
    /// `[tokens, in]`.
    pub(crate) x: &'a [f32],
    /// `x A` of the forward pass.
    pub(crate) low: &'a [f32],
    /// Gradient of the output.
    pub(crate) dy: &'a [f32],
    /// Gradient of the input, to be added to.
    pub(crate) dx: &'a mut [f32],
}

/// Memory reused between calls.
#[derive(Debug, Default)]
pub(crate) struct AdapterScratch {
    d_low: Vec<f32>,
    columns: Vec<f32>,
    packed: Packed,
}

impl TransposedAdapter {
    /// Packs an adapter.
    pub(crate) fn new(layout: &AdapterLayout, adapter: &Parameters) -> Self {
        let layers = all_sites(layout, &adapter.shape, |site| {
            let (down, up) = site.matrices(layout, adapter);
            let rank = site.rank(layout);
            TransposedSite {
                down: Packed::new(rank, &[(&down, site.input)]),
                up: Packed::transposed(rank, &[(&up, site.output)]),
                parts: site.parts,
            }
        });
        Self { layers, rank: layout.rank, scale: layout.scale() }
    }

    /// Adds to the gradients of a site's `A` and `B` and of its input, all through the low rank.
    pub(crate) fn backward(
        &self,
        layer: usize,
        site: Site,
        pass: SiteGradient<'_>,
        scratch: &mut AdapterScratch,
        gradient: &mut Values,
    ) {
        let Some(packed) = self.layers.get(layer).and_then(|sites| sites.get(site as usize)?.as_ref()) else { return };
        let SiteGradient { x, low, dy, dx } = pass;
        let (input, output, width) = (packed.down.n, packed.up.k, packed.down.k);
        let tokens = x.len() / input.max(1);
        let d_low = resized(&mut scratch.d_low, tokens * width);
        kernel::multiply::<false>(dy, &packed.up, d_low);
        kernel::multiply::<true>(d_low, &packed.down, dx);
        // A += (dy Bᵀ)ᵀ x, and x is packed once for all targets.
        scratch.packed.repack(x, input, 0, input);
        for (at, part) in packed.parts.iter().enumerate() {
            columns(d_low, width, at * self.rank, self.rank, 1.0, &mut scratch.columns);
            if let Some(sums) = gradient.get_mut(part.tensor) {
                add_outer(&scratch.columns, self.rank, &scratch.packed, sums);
            }
        }
        for (at, part) in packed.parts.iter().enumerate() {
            scratch.packed.repack(dy, output, part.first, part.width);
            columns(low, width, at * self.rank, self.rank, self.scale, &mut scratch.columns);
            if let Some(sums) = gradient.get_mut(part.tensor + 1) {
                add_outer(&scratch.columns, self.rank, &scratch.packed, sums);
            }
        }
    }
}

/// Columns `first..first + n` of rows of `width`, scaled.
fn columns(rows: &[f32], width: usize, first: usize, n: usize, scale: f32, out: &mut Vec<f32>) {
    out.clear();
    for row in rows.chunks_exact(width.max(1)) {
        out.extend(row.iter().skip(first).take(n).map(|value| value * scale));
    }
}
