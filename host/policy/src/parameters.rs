//! The master weights: named f32 tensors in plain memory, the one copy that the optimiser changes.
//!
//! Projections are held as `[in, out]`, which is what both the sampler's kernels and burn multiply with; Hugging Face
//! files hold `[out, in]`, so they are transposed on the way in and out. Plain memory rather than a burn module: the bytes
//! are ours to hash, checkpoint and compare, and every worker thread builds autodiff leaves of its own from them.

use std::collections::{BTreeMap, BTreeSet};

use fulgurite_core::id::ContentHash;
use fulgurite_core::seed::{Generator, Seed};

use crate::error::PolicyError;
use crate::shape::ModelShape;

/// What a tensor is, which decides its layout in files, its initial values and its weight decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `[vocabulary, d_model]`, the same in files.
    Embedding,
    /// `[d_model]` or `[head_dim]`, starts at 1, never decayed.
    Norm,
    /// As long as its projection is wide, starts at 0, never decayed.
    Bias,
    /// `[in, out]`, transposed in files.
    Projection,
    /// A projection whose output is added to the residual stream; starts smaller.
    ResidualProjection,
    /// `A` of an adapter, `[rank, in]`, the same in files.
    AdapterDown,
    /// `B` of an adapter, `[rank, out]`, transposed in files.
    AdapterUp,
}

/// Name, kind and size of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ParameterSpec {
    /// Hugging Face name.
    pub(crate) name: String,
    pub(crate) kind: Kind,
    /// In memory; one or two entries.
    pub(crate) dims: Vec<usize>,
}

impl ParameterSpec {
    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Sizes in a Hugging Face file.
    pub(crate) fn file_dims(&self) -> Vec<usize> {
        let mut dims = self.dims.clone();
        if self.is_transposed_in_files() {
            dims.reverse();
        }
        dims
    }

    /// Values of the file's layout in that of memory.
    pub(crate) fn values_from_file(&self, values: Vec<f32>) -> Vec<f32> {
        match self.dims.as_slice() {
            [rows, columns] if self.is_transposed_in_files() => transpose(&values, *columns, *rows),
            _ => values,
        }
    }

    /// Values of memory in the file's layout.
    pub(crate) fn values_for_file(&self, values: &[f32]) -> Vec<f32> {
        match self.dims.as_slice() {
            [rows, columns] if self.is_transposed_in_files() => transpose(values, *rows, *columns),
            _ => values.to_vec(),
        }
    }

    /// Whether memory and file differ in layout.
    fn is_transposed_in_files(&self) -> bool {
        matches!(self.kind, Kind::Projection | Kind::ResidualProjection | Kind::AdapterUp)
    }
}

/// Where the tensors stand in the order of [`specs`].
///
/// Those that every architecture has stand at fixed places of their layer: 0 attention norm, 1 query, 2 key, 3 value, 4
/// attention's output, 5 feed-forward norm, 6 gate, 7 up, 8 down. Those that only some have follow, so that a model without
/// them has the order that it had before they existed.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Layout {
    layers: usize,
    /// Tensors of one layer.
    stride: usize,
    /// Places in the layer of the biases of query, key and value.
    pub(crate) biases: Option<[usize; 3]>,
    /// Place in the layer of the bias of attention's output.
    pub(crate) out_bias: Option<usize>,
    /// Places in the layer of the norms of query and key.
    pub(crate) head_norms: Option<[usize; 2]>,
}

impl Layout {
    /// The layout of a shape.
    pub(crate) fn new(shape: &ModelShape) -> Self {
        let mut next = 9;
        let mut place = || {
            next += 1;
            next - 1
        };
        let biases = shape.attention_bias.then(|| [place(), place(), place()]);
        let out_bias = shape.attention_out_bias.then(&mut place);
        let head_norms = shape.qk_norm.then(|| [place(), place()]);
        Self { layers: shape.layers, stride: next, biases, out_bias, head_norms }
    }

    /// First tensor of a layer.
    pub(crate) fn layer(&self, index: usize) -> usize {
        1 + index * self.stride
    }

    /// The final norm; the output projection, if it has weights of its own, is the next one.
    pub(crate) fn norm(&self) -> usize {
        self.layer(self.layers)
    }
}

/// All tensors of a model in their fixed order: embedding, layers, final norm, output projection when untied.
pub(crate) fn specs(shape: &ModelShape) -> Vec<ParameterSpec> {
    let spec = |name: String, kind, dims: &[usize]| ParameterSpec { name, kind, dims: dims.to_vec() };
    let (d, ff, query, kv) = (shape.d_model, shape.d_ff, shape.query_width(), shape.kv_width());
    let mut all = vec![spec("model.embed_tokens.weight".into(), Kind::Embedding, &[shape.vocabulary, d])];
    for layer in 0..shape.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        all.extend([
            spec(name("input_layernorm.weight"), Kind::Norm, &[d]),
            spec(name("self_attn.q_proj.weight"), Kind::Projection, &[d, query]),
            spec(name("self_attn.k_proj.weight"), Kind::Projection, &[d, kv]),
            spec(name("self_attn.v_proj.weight"), Kind::Projection, &[d, kv]),
            spec(name("self_attn.o_proj.weight"), Kind::ResidualProjection, &[query, d]),
            spec(name("post_attention_layernorm.weight"), Kind::Norm, &[d]),
            spec(name("mlp.gate_proj.weight"), Kind::Projection, &[d, ff]),
            spec(name("mlp.up_proj.weight"), Kind::Projection, &[d, ff]),
            spec(name("mlp.down_proj.weight"), Kind::ResidualProjection, &[ff, d]),
        ]);
        // In the order of `Layout`.
        if shape.attention_bias {
            all.extend(
                [("q", query), ("k", kv), ("v", kv)]
                    .map(|(part, width)| spec(name(&format!("self_attn.{part}_proj.bias")), Kind::Bias, &[width])),
            );
        }
        if shape.attention_out_bias {
            all.push(spec(name("self_attn.o_proj.bias"), Kind::Bias, &[d]));
        }
        if shape.qk_norm {
            all.extend(
                ["q", "k"]
                    .map(|part| spec(name(&format!("self_attn.{part}_norm.weight")), Kind::Norm, &[shape.head_dim])),
            );
        }
    }
    all.push(spec("model.norm.weight".into(), Kind::Norm, &[d]));
    if !shape.tie_embeddings {
        all.push(spec("lm_head.weight".into(), Kind::Projection, &[d, shape.vocabulary]));
    }
    all
}

/// One value per weight, in the order of [`specs`]: weights, gradients and moments alike.
pub(crate) type Values = Vec<Vec<f32>>;

/// The weights of one model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Parameters {
    pub(crate) shape: ModelShape,
    pub(crate) specs: Vec<ParameterSpec>,
    pub(crate) values: Values,
}

impl Parameters {
    /// Draws initial weights: a function of the seed and each tensor's name alone, so that adding a tensor changes no
    /// other and no global generator is involved.
    pub(crate) fn initial(shape: &ModelShape, std: f32, seed: Seed) -> Self {
        let specs = specs(shape);
        let residual_std = std / (2.0 * shape.layers as f32).sqrt();
        let values = specs
            .iter()
            .map(|spec| {
                let seed = seed.child("weights").child(&spec.name);
                match spec.kind {
                    Kind::Norm => vec![1.0; spec.len()],
                    // Adapters and their initial values are made in `lora`.
                    Kind::Bias | Kind::AdapterDown | Kind::AdapterUp => vec![0.0; spec.len()],
                    Kind::Embedding | Kind::Projection => normal(spec.len(), std, seed),
                    Kind::ResidualProjection => normal(spec.len(), residual_std, seed),
                }
            })
            .collect();
        Self { shape: shape.clone(), specs, values }
    }

    /// Takes the weights from a model's files.
    ///
    /// `found` has every tensor's name and sizes as the files say them; all of them are checked before the first is read,
    /// so that one message names everything that does not fit. `read` gives a tensor's values in the file's layout and
    /// type-converted; each is asked for once, in the order of the weights, and nothing but the weights is kept.
    ///
    /// Two tensors may be there in addition: an output projection although the embedding stands in for it, and frequencies
    /// of the rotary embedding, which some files of Llama 2 have.
    ///
    /// # Errors
    /// [`PolicyError::UnfitTensors`] names what is missing, misshapen or unknown; errors of `read` pass through.
    pub(crate) fn from_tensors(
        shape: &ModelShape,
        found: &BTreeMap<String, Vec<usize>>,
        mut read: impl FnMut(&str) -> Result<Vec<f32>, PolicyError>,
    ) -> Result<Self, PolicyError> {
        shape.check()?;
        let specs = specs(shape);
        check_tensors(shape, &specs, found)?;
        let values = specs
            .iter()
            .map(|spec| {
                let values = read(&spec.name)?;
                if values.len() != spec.len() {
                    let text = format!("`{}` has {} values instead of {}", spec.name, values.len(), spec.len());
                    return Err(PolicyError::UnfitTensors(text));
                }
                Ok(spec.values_from_file(values))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { shape: shape.clone(), specs, values })
    }

    /// Zeros in the shape of the weights.
    pub(crate) fn zeros(&self) -> Values {
        self.values.iter().map(|values| vec![0.0; values.len()]).collect()
    }

    /// Number of weights.
    pub(crate) fn count(&self) -> usize {
        self.values.iter().map(Vec::len).sum()
    }

    /// Hash of names, sizes and every bit of the weights.
    pub(crate) fn hash(&self) -> ContentHash {
        let mut bytes = Vec::with_capacity(4 * self.count() + 64 * self.specs.len());
        for (spec, values) in self.specs.iter().zip(&self.values) {
            bytes.extend_from_slice(spec.name.as_bytes());
            bytes.push(0);
            for dim in &spec.dims {
                bytes.extend_from_slice(&(*dim as u64).to_le_bytes());
            }
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        ContentHash::of(&bytes)
    }
}

/// Names every tensor that does not fit, with the sizes that it should have.
pub(crate) fn check_tensors(
    shape: &ModelShape,
    specs: &[ParameterSpec],
    found: &BTreeMap<String, Vec<usize>>,
) -> Result<(), PolicyError> {
    /// Faults of one kind that are named; a folder of another architecture has hundreds.
    const NAMED_MAX: usize = 6;
    let (mut missing, mut misshapen) = (Vec::new(), Vec::new());
    for spec in specs {
        let wanted = spec.file_dims();
        match found.get(&spec.name) {
            None => missing.push(format!("`{}` {wanted:?}", spec.name)),
            Some(dims) if *dims != wanted => misshapen.push(format!("`{}` {dims:?} instead of {wanted:?}", spec.name)),
            Some(_) => {}
        }
    }
    let known: BTreeSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    let is_harmless =
        |name: &str| name.ends_with(".rotary_emb.inv_freq") || (name == "lm_head.weight" && shape.tie_embeddings);
    let unknown = found.iter().filter(|(name, _)| !known.contains(name.as_str()) && !is_harmless(name));
    let unknown = unknown.map(|(name, dims)| format!("`{name}` {dims:?}")).collect();
    let faults = [("missing", missing), ("of another size", misshapen), ("not part of this architecture", unknown)];
    let texts: Vec<String> = faults
        .into_iter()
        .filter(|(_, all)| !all.is_empty())
        .map(|(what, mut all)| {
            let more = all.len().saturating_sub(NAMED_MAX);
            all.truncate(NAMED_MAX);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            format!("{what}: {}{more}", all.join(", "))
        })
        .collect();
    if texts.is_empty() { Ok(()) } else { Err(PolicyError::UnfitTensors(texts.join("; "))) }
}

/// The transpose of a row-major `[rows, columns]` matrix.
pub(crate) fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    /// Columns at a time: each row's part is one cache line, and the lines written to stay in the cache.
    const BLOCK: usize = 16;
    assert_eq!(values.len(), rows * columns);
    let mut out = vec![0.0; values.len()];
    for (first, out) in (0..columns).step_by(BLOCK).zip(out.chunks_mut((BLOCK * rows).max(1))) {
        for (at, row) in values.chunks_exact(columns).enumerate() {
            let slots = out.iter_mut().skip(at).step_by(rows);
            for (slot, value) in slots.zip(row.iter().skip(first)) {
                *slot = *value;
            }
        }
    }
    out
}

/// `len` draws from a normal distribution (Box and Muller, both branches).
fn normal(len: usize, std: f32, seed: Seed) -> Vec<f32> {
    let mut generator = Generator::new(seed);
    // 53 random bits, in (0, 1]: the logarithm below is finite.
    let mut uniform = || ((generator.next_u64() >> 11) + 1) as f64 * (1.0 / (1_u64 << 53) as f64);
    let mut values = Vec::with_capacity(len + 1);
    while values.len() < len {
        let radius = (-2.0 * uniform().ln()).sqrt() * f64::from(std);
        let (sine, cosine) = (std::f64::consts::TAU * uniform()).sin_cos();
        #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
        values.extend([(radius * cosine) as f32, (radius * sine) as f32]);
    }
    values.truncate(len);
    values
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "bits are what is tested")]
mod tests {
    use super::*;
    use crate::config::PolicyConfig;

    fn shape() -> ModelShape {
        PolicyConfig::default().shape(512).unwrap()
    }

    #[test]
    fn tiny_has_about_0_9_million_weights() {
        let parameters = Parameters::initial(&shape(), 0.02, Seed::new(0));
        assert!((850_000..950_000).contains(&parameters.count()), "{}", parameters.count());
    }

    #[test]
    fn one_seed_gives_one_set_of_weights_with_the_right_spread() {
        let [a, b, c] = [1, 1, 2].map(|seed| Parameters::initial(&shape(), 0.02, Seed::new(seed)));
        assert_eq!(a.hash(), b.hash());
        assert_ne!(a.hash(), c.hash());
        for (spec, values) in a.specs.iter().zip(&a.values) {
            let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
            let std = (values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
            match spec.kind {
                Kind::Norm => assert!(values.iter().all(|v| *v == 1.0)),
                Kind::Bias | Kind::AdapterDown | Kind::AdapterUp => assert!(values.iter().all(|v| *v == 0.0)),
                Kind::Embedding | Kind::Projection => assert!((std - 0.02).abs() < 0.001, "{} {std}", spec.name),
                Kind::ResidualProjection => {
                    assert!((std - 0.02 / 8.0_f64.sqrt()).abs() < 0.000_5, "{} {std}", spec.name);
                }
            }
        }
    }

    #[test]
    fn weights_come_back_from_files_and_what_does_not_fit_is_named() {
        let shape = ModelShape { attention_bias: true, kv_heads: 2, ..shape() };
        let parameters = Parameters::initial(&shape, 0.02, Seed::new(0));
        let files: BTreeMap<String, Vec<f32>> = parameters
            .specs
            .iter()
            .zip(&parameters.values)
            .map(|(spec, values)| (spec.name.clone(), spec.values_for_file(values)))
            .collect();
        let dims = || parameters.specs.iter().map(|spec| (spec.name.clone(), spec.file_dims())).collect();
        let read = |name: &str| Ok(files[name].clone());
        let mut found: BTreeMap<String, Vec<usize>> = dims();
        assert_eq!(found["model.layers.1.self_attn.k_proj.weight"], [64, 128]);
        assert_eq!(found["model.layers.1.self_attn.k_proj.bias"], [64]);
        assert_eq!(Parameters::from_tensors(&shape, &found, read).unwrap(), parameters);

        found.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), vec![16]);
        assert!(Parameters::from_tensors(&shape, &found, read).is_ok());
        found.insert("model.layers.0.mlp.gate_proj.bias".into(), vec![352]);
        found.insert("model.norm.weight".into(), vec![64]);
        found.remove("model.layers.3.self_attn.q_proj.weight");
        let error = Parameters::from_tensors(&shape, &found, |_| panic!("nothing is read")).unwrap_err().to_string();
        for part in [
            "missing: `model.layers.3.self_attn.q_proj.weight` [128, 128]",
            "of another size: `model.norm.weight` [64] instead of [128]",
            "not part of this architecture: `model.layers.0.mlp.gate_proj.bias` [352]",
        ] {
            assert!(error.contains(part), "{error}");
        }
        let short = Parameters::from_tensors(&shape, &dims(), |_| Ok(vec![0.0])).unwrap_err().to_string();
        assert!(short.contains("model.embed_tokens.weight"), "{short}");
        let tied = ModelShape { tie_embeddings: true, ..shape };
        assert!(Parameters::from_tensors(&tied, &dims(), read).is_ok(), "an output projection that is not needed");
    }

    #[test]
    fn transposing_twice_changes_nothing() {
        let values: Vec<f32> = (0..6_u8).map(f32::from).collect();
        assert_eq!(transpose(&values, 2, 3), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        assert_eq!(transpose(&transpose(&values, 2, 3), 3, 2), values);
        let wide: Vec<f32> = (0..7 * 37_u16).map(f32::from).collect();
        let turned = transpose(&wide, 7, 37);
        assert!((0..7).all(|row| (0..37).all(|column| turned[column * 7 + row] == wide[row * 37 + column])));
    }
}
