//! The master weights: named f32 tensors in plain memory, the one copy that the optimiser changes.
//!
//! Projections are held as `[in, out]`, which is what both the sampler's kernels and burn multiply with; Hugging Face
//! files hold `[out, in]`, so they are transposed on the way in and out. Plain memory rather than a burn module: the bytes
//! are ours to hash, checkpoint and compare, and every worker thread builds autodiff leaves of its own from them.

use fulgurite_core::id::ContentHash;
use fulgurite_core::seed::{Generator, Seed};

use crate::config::ModelShape;

/// What a tensor is, which decides its layout in files, its initial values and its weight decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `[vocabulary, d_model]`, the same in files.
    Embedding,
    /// `[d_model]`, starts at 1, never decayed.
    Norm,
    /// `[in, out]`, transposed in files.
    Projection,
    /// A projection whose output is added to the residual stream; starts smaller.
    ResidualProjection,
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

    /// Whether memory and file differ in layout.
    pub(crate) fn is_transposed_in_files(&self) -> bool {
        matches!(self.kind, Kind::Projection | Kind::ResidualProjection)
    }
}

/// Position of each tensor of layer 0 relative to the layer's first; `LAYER_TENSORS` apart.
pub(crate) const LAYER_TENSORS: usize = 9;

/// All tensors of a model in their fixed order: embedding, layers, final norm, output projection when untied.
pub(crate) fn specs(shape: &ModelShape) -> Vec<ParameterSpec> {
    let spec = |name: String, kind, dims: &[usize]| ParameterSpec { name, kind, dims: dims.to_vec() };
    let (d, ff, query, kv) = (shape.d_model, shape.d_ff, shape.query_width(), shape.kv_width());
    let mut all = vec![spec("model.embed_tokens.weight".into(), Kind::Embedding, &[shape.vocabulary, d])];
    for layer in 0..shape.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        all.extend([
            spec(name("input_layernorm"), Kind::Norm, &[d]),
            spec(name("self_attn.q_proj"), Kind::Projection, &[d, query]),
            spec(name("self_attn.k_proj"), Kind::Projection, &[d, kv]),
            spec(name("self_attn.v_proj"), Kind::Projection, &[d, kv]),
            spec(name("self_attn.o_proj"), Kind::ResidualProjection, &[query, d]),
            spec(name("post_attention_layernorm"), Kind::Norm, &[d]),
            spec(name("mlp.gate_proj"), Kind::Projection, &[d, ff]),
            spec(name("mlp.up_proj"), Kind::Projection, &[d, ff]),
            spec(name("mlp.down_proj"), Kind::ResidualProjection, &[ff, d]),
        ]);
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
                    Kind::Embedding | Kind::Projection => normal(spec.len(), std, seed),
                    Kind::ResidualProjection => normal(spec.len(), residual_std, seed),
                }
            })
            .collect();
        Self { shape: shape.clone(), specs, values }
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

/// The transpose of a row-major `[rows, columns]` matrix.
pub(crate) fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    debug_assert_eq!(values.len(), rows * columns);
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns.max(1)).copied()).collect()
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
                Kind::Embedding | Kind::Projection => assert!((std - 0.02).abs() < 0.001, "{} {std}", spec.name),
                Kind::ResidualProjection => {
                    assert!((std - 0.02 / 8.0_f64.sqrt()).abs() < 0.000_5, "{} {std}", spec.name);
                }
            }
        }
    }

    #[test]
    fn transposing_twice_changes_nothing() {
        let values: Vec<f32> = (0..6_u8).map(f32::from).collect();
        assert_eq!(transpose(&values, 2, 3), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        assert_eq!(transpose(&transpose(&values, 2, 3), 3, 2), values);
    }
}
