//! Every architecture against a plain f64 model written here from the formulas, by the names and layout of model files; and
//! against itself on every way that computes it.

use std::collections::BTreeMap;
use std::sync::Arc;

use fulgurite_core::id::PolicyVersion;
use fulgurite_core::llm::KeptTokens;
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_core::training::{LossSpec, Stream, TrainingRow};

use crate::compute::PackedModels;
use crate::config::PolicyConfig;
use crate::decoder::{Decoder, Row, Scratch};
use crate::device::PolicyDevice;
use crate::inference::Inference;
use crate::kv_cache::{BLOCK_TOKENS, BlockLayout, KvCache};
use crate::loss::BatchLoss;
use crate::parameters::{Kind, Parameters, Values};
use crate::rotary::RotaryTable;
use crate::shape::{Architecture, ModelShape, RopeScaling};
use crate::train::{BatchRunner, Objective};

const VOCABULARY: usize = 53;
const SHAPES: usize = 45;

struct Draw(Generator);

impl Draw {
    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.0.below(choices.len())]
    }

    fn from(&mut self, range: std::ops::Range<usize>) -> usize {
        range.start + self.0.below(range.len())
    }

    fn unit(&mut self) -> f32 {
        self.0.below(2_001) as f32 / 1_000.0 - 1.0
    }
}

/// A random shape of each of the nine sets of switches that there are, then of each again with other sizes.
fn shape(index: usize) -> ModelShape {
    let mut draw = Draw(Generator::new(Seed::new(31).child_index(index as u64)));
    let (qk_norm, attention_bias, attention_out_bias, windowed) = [
        (false, false, false, false),
        (false, true, true, false),
        (false, false, false, true),
        (false, true, false, false),
        (false, true, false, true),
        (true, false, false, false),
        (true, false, false, true),
        (true, true, true, false),
        (true, true, true, true),
    ][index % 9];
    let rope_scaling = match (index + index / 9) % 3 {
        0 => RopeScaling::None,
        1 => RopeScaling::Linear { factor: 1.5 },
        // Waves are 6 to some thousand tokens long: some of each kind.
        _ => RopeScaling::Llama3 {
            factor: 4.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: draw.from(40..120),
        },
    };
    let round = index / 9;
    let (kv_heads, group) = [(1, 1), (2, 2), (1, 3), (3, 1), (2, 3)][(index + 2 * round) % 5];
    let shape = ModelShape {
        d_model: draw.one_of(&[24, 40, 64, 72]),
        layers: draw.from(1..4),
        heads: kv_heads * group,
        kv_heads,
        head_dim: [8, 16, 20, 32, 48][(index + 3 * round) % 5],
        d_ff: draw.from(20..100),
        vocabulary: VOCABULARY,
        context_tokens_max: 80,
        rope_theta: draw.one_of(&[100.0, 10_000.0, 1e6]),
        rms_norm_epsilon: draw.one_of(&[1e-5, 1e-6]),
        tie_embeddings: index % 2 == 1,
        attention_bias,
        attention_out_bias,
        qk_norm,
        rope_scaling,
        rope_f32: false,
        sliding_window: windowed.then(|| draw.from(1..40)),
    };
    shape.check().unwrap();
    shape
}

/// Initial weights with biases and norms that are not all alike.
fn parameters(shape: &ModelShape) -> Arc<Parameters> {
    let mut parameters = Parameters::initial(shape, 0.25, Seed::new(1));
    let mut draw = Draw(Generator::new(Seed::new(2)));
    for (spec, values) in parameters.specs.iter().zip(&mut parameters.values) {
        if matches!(spec.kind, Kind::Norm | Kind::Bias) {
            for value in values.iter_mut() {
                *value += 0.5 * draw.unit();
            }
        }
    }
    Arc::new(parameters)
}

fn ids(len: usize, seed: u64) -> Vec<u32> {
    let mut generator = Generator::new(Seed::new(seed));
    (0..len).map(|_| u32::try_from(generator.below(VOCABULARY)).unwrap()).collect()
}

/// One thread and one shard: a test more need not start more.
fn config(device: PolicyDevice) -> PolicyConfig {
    PolicyConfig { device, threads: 1, gradient_shards: 1, ..PolicyConfig::default() }
}

/// The model in f64, by the names and layout of model files.
struct Reference<'a> {
    shape: &'a ModelShape,
    tensors: BTreeMap<String, Vec<f64>>,
}

impl<'a> Reference<'a> {
    fn new(parameters: &'a Parameters) -> Self {
        let pairs = parameters.specs.iter().zip(&parameters.values);
        let tensor = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
        let tensors = pairs.map(|(spec, values)| (spec.name.clone(), tensor(spec.values_for_file(values)))).collect();
        Self { shape: &parameters.shape, tensors }
    }

    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let bias = self.tensors.get(&format!("{name}.bias"));
        let rows = self.tensors[&format!("{name}.weight")].chunks_exact(x.len()).enumerate();
        let dot = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        rows.map(|(at, row)| dot(row) + bias.map_or(0.0, |bias| bias[at])).collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let rms = (mean + self.shape.rms_norm_epsilon).sqrt();
        x.iter().zip(&self.tensors[&format!("{name}.weight")]).map(|(x, w)| x / rms * w).collect()
    }

    fn frequency(&self, i: usize) -> f64 {
        let frequency = 1.0 / self.shape.rope_theta.powf((2 * i) as f64 / self.shape.head_dim as f64);
        match self.shape.rope_scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                // How many turns fit the original context: below `low` all is divided, above `high` nothing.
                let turns = original_context as f64 * frequency / std::f64::consts::TAU;
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                kept * frequency + (1.0 - kept) * frequency / factor
            }
        }
    }

    /// Heads of one token, normalised if the model does, and turned.
    fn heads(&self, name: Option<&str>, position: usize, x: &[f64]) -> Vec<Vec<f64>> {
        let half = self.shape.head_dim / 2;
        let heads = x.chunks_exact(self.shape.head_dim).map(|head| {
            let head = name.map_or(head.to_vec(), |name| self.norm(name, head));
            let turned = |i: usize| {
                let angle = position as f64 * self.frequency(i % half);
                let other = if i < half { -head[i + half] } else { head[i - half] };
                head[i] * angle.cos() + other * angle.sin()
            };
            (0..2 * half).map(turned).collect()
        });
        heads.collect()
    }

    fn logits(&self, ids: &[u32]) -> Vec<Vec<f64>> {
        let shape = self.shape;
        let embedding = &self.tensors["model.embed_tokens.weight"];
        let mut xs: Vec<Vec<f64>> =
            ids.iter().map(|id| embedding[*id as usize * shape.d_model..][..shape.d_model].to_vec()).collect();
        for layer in 0..shape.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let normed: Vec<Vec<f64>> = xs.iter().map(|x| self.norm(&name("input_layernorm"), x)).collect();
            let heads = |part: &str| -> Vec<Vec<Vec<f64>>> {
                let norm = shape.qk_norm.then(|| name(&format!("self_attn.{part}_norm")));
                let projected = normed.iter().map(|x| self.linear(&name(&format!("self_attn.{part}_proj")), x));
                projected.enumerate().map(|(at, x)| self.heads(norm.as_deref(), at, &x)).collect()
            };
            let (queries, keys) = (heads("q"), heads("k"));
            let values: Vec<Vec<f64>> = normed.iter().map(|x| self.linear(&name("self_attn.v_proj"), x)).collect();
            for (q, x) in xs.iter_mut().enumerate() {
                let mut mixed = vec![];
                for (head, query) in queries[q].iter().enumerate() {
                    let kv = head / (shape.heads / shape.kv_heads);
                    let weights: Vec<f64> = (0..ids.len())
                        .map(|k| {
                            if k > q || shape.sliding_window.is_some_and(|window| q - k >= window) {
                                return 0.0;
                            }
                            let dot: f64 = query.iter().zip(&keys[k][kv]).map(|(a, b)| a * b).sum();
                            (dot / (shape.head_dim as f64).sqrt()).exp()
                        })
                        .collect();
                    let total: f64 = weights.iter().sum();
                    mixed.extend((0..shape.head_dim).map(|d| {
                        let value = |k: usize| values[k][kv * shape.head_dim + d];
                        weights.iter().enumerate().map(|(k, weight)| weight / total * value(k)).sum::<f64>()
                    }));
                }
                let out = self.linear(&name("self_attn.o_proj"), &mixed);
                x.iter_mut().zip(out).for_each(|(x, out)| *x += out);
                let normed = self.norm(&name("post_attention_layernorm"), x);
                let gate = self.linear(&name("mlp.gate_proj"), &normed);
                let up = self.linear(&name("mlp.up_proj"), &normed);
                let active: Vec<f64> = gate.iter().zip(up).map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect();
                let out = self.linear(&name("mlp.down_proj"), &active);
                x.iter_mut().zip(out).for_each(|(x, out)| *x += out);
            }
        }
        let head = if shape.tie_embeddings { "model.embed_tokens" } else { "lm_head" };
        xs.iter().map(|x| self.linear(head, &self.norm("model.norm", x))).collect()
    }

    /// Mean cross-entropy of the tokens from `from` on, over all rows.
    fn loss(&self, rows: &[Vec<u32>], from: usize) -> f64 {
        let row = |ids: &Vec<u32>| -> Vec<f64> {
            let logits = self.logits(ids);
            let one = |at: usize| {
                let logits = &logits[at - 1];
                logits.iter().map(|logit| logit.exp()).sum::<f64>().ln() - logits[ids[at] as usize]
            };
            (from..ids.len()).map(one).collect()
        };
        let all: Vec<f64> = rows.iter().flat_map(row).collect();
        all.iter().sum::<f64>() / all.len() as f64
    }
}

fn largest(values: impl IntoIterator<Item = f32>) -> f32 {
    values.into_iter().map(f32::abs).fold(0.0, f32::max)
}

#[test]
fn shapes_cover_every_switch() {
    let shapes: Vec<ModelShape> = (0..SHAPES).map(shape).collect();
    for architecture in [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3] {
        let of = || shapes.iter().filter(|shape| shape.architecture().unwrap() == architecture);
        for has in [
            |shape: &ModelShape| shape.tie_embeddings,
            |shape: &ModelShape| !shape.tie_embeddings,
            |shape: &ModelShape| shape.heads > shape.kv_heads && shape.kv_heads > 1,
            |shape: &ModelShape| shape.query_width() != shape.d_model,
            |shape: &ModelShape| !shape.head_dim.is_multiple_of(16),
            |shape: &ModelShape| matches!(shape.rope_scaling, RopeScaling::Linear { .. }),
            |shape: &ModelShape| matches!(shape.rope_scaling, RopeScaling::Llama3 { .. }),
        ] {
            assert!(of().any(has), "{architecture:?}: {:?}", of().collect::<Vec<_>>());
        }
    }
}

#[test]
fn logits_are_those_of_the_formulas() {
    for index in 0..SHAPES {
        let shape = shape(index);
        let parameters = parameters(&shape);
        let ids = ids(71, index as u64);
        let want = Reference::new(&parameters).logits(&ids).concat();
        let scale = want.iter().map(|logit| logit.abs()).fold(0.0, f64::max);
        assert!(scale > 0.5, "{scale}: too small to tell anything");
        for device in PolicyDevice::tested() {
            let inference = Inference::new(&config(device), parameters.clone()).unwrap();
            let got = inference.logits(&ids, 0).unwrap();
            assert_eq!(got.len(), want.len());
            let difference =
                got.iter().zip(&want).map(|(got, want)| (f64::from(*got) - want).abs()).fold(0.0, f64::max);
            assert!(difference < 2e-5 * scale, "{device:?} {shape:?}: {difference} of {scale}");
        }
    }
}

/// Gradient of the mean cross-entropy of all tokens from 2 on.
fn gradient(device: PolicyDevice, parameters: &Arc<Parameters>, rows: &[Vec<u32>]) -> (f64, Values) {
    let rows: Vec<TrainingRow> = (0..)
        .zip(rows)
        .map(|(sequence, ids)| TrainingRow {
            sequence,
            ids: ids.clone(),
            mask: (0..ids.len()).map(|at| at >= 2).collect(),
            weights: vec![1.0; ids.len()],
            behaviour_log_probs: vec![0.0; ids.len()],
            old_log_probs: vec![],
            calls: vec![],
            group: None,
            stream: Stream::Ce,
            temperature: 1.0,
            policy_version: PolicyVersion(0),
            kept: KeptTokens::default(),
        })
        .collect();
    let runner = BatchRunner::new(&config(device), Arc::new(RotaryTable::new(&parameters.shape))).unwrap();
    let spec = LossSpec::default();
    let loss = BatchLoss::new(spec, &rows, || panic!("no forward pass is needed")).unwrap();
    let objective = Objective::Loss { loss: Box::new(loss), reference: None };
    let outcome = runner.run(parameters.clone(), rows, objective).unwrap();
    (outcome.report.loss, outcome.gradient.unwrap())
}

/// Of every tensor: the slope of the f64 model's loss along the gradient is the gradient's length. The two devices agree in
/// every entry.
#[test]
fn gradients_are_the_slopes_of_the_formulas() {
    for index in 0..SHAPES {
        let shape = shape(index);
        let parameters = parameters(&shape);
        let rows = [ids(39, index as u64), ids(7, 100), ids(3, 101)];
        let mut reference = Reference::new(&parameters);
        let (loss, gradient) = {
            let cpu = self::gradient(PolicyDevice::Cpu, &parameters, &rows);
            let scale = largest(cpu.1.iter().flatten().copied());
            for device in PolicyDevice::tested().into_iter().skip(1) {
                let other = self::gradient(device, &parameters, &rows);
                for ((spec, a), b) in parameters.specs.iter().zip(&cpu.1).zip(&other.1) {
                    let difference = largest(a.iter().zip(b).map(|(a, b)| a - b));
                    assert!(difference < 5e-5 * scale, "{device}: {} of {shape:?}: {difference} of {scale}", spec.name);
                }
            }
            cpu
        };
        assert!((loss - reference.loss(&rows, 2)).abs() < 1e-5 * loss, "{loss}");
        for (spec, gradient) in parameters.specs.iter().zip(&gradient) {
            let direction = spec.values_for_file(gradient);
            let norm = direction.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let before = reference.tensors[&spec.name].clone();
            let mut moved = |by: f64| {
                let moved = before.iter().zip(&direction).map(|(w, g)| w + by * f64::from(*g) / norm.max(1e-9));
                reference.tensors.insert(spec.name.clone(), moved.collect());
                reference.loss(&rows, 2)
            };
            let slope = (moved(1e-4) - moved(-1e-4)) / 2e-4;
            reference.tensors.insert(spec.name.clone(), before);
            // Keys of a window of 1 change nothing; all others have a gradient.
            let idle = shape.sliding_window == Some(1) && ["q_", "k_"].iter().any(|part| spec.name.contains(part));
            assert!(norm > 1e-6 || idle, "{} of {shape:?} has no gradient", spec.name);
            assert!((slope - norm).abs() < 1e-3 * norm + 1e-6, "{} of {shape:?}: {slope} {norm}", spec.name);
        }
    }
}

/// Logits after every token, fed in parts of the given size.
fn decoded(decoder: &Decoder, cache: &mut KvCache, ids: &[u32], part: usize) -> Vec<f32> {
    let mut scratch = Scratch::default();
    let mut all = vec![];
    for part in ids.chunks(part) {
        let rows: Vec<Row> = part.iter().map(|token| Row { cache: 0, token: *token }).collect();
        decoder.forward(&rows, &mut [&mut *cache], &mut scratch);
        decoder.logits(0..rows.len(), &mut scratch);
        all.extend_from_slice(&scratch.logits);
    }
    all
}

#[test]
fn sampling_and_training_see_the_same_bits() {
    for index in 0..SHAPES {
        let shape = shape(index);
        let parameters = parameters(&shape);
        let ids = ids(75, index as u64);
        let inference = Inference::new(&config(PolicyDevice::Cpu), parameters.clone()).unwrap();
        let want = inference.logits(&ids, 0).unwrap();
        assert_eq!(inference.logits(&ids, 74).unwrap(), want[74 * VOCABULARY..]);
        let weights = parameters.clone().into();
        let packed = PackedModels::new(&weights, None, false, &Arc::new(RotaryTable::new(&shape)), 1);
        for part in [1, 13, 75] {
            let mut cache = KvCache::default();
            assert!(decoded(packed.decoder(), &mut cache, &ids, part) == want, "parts of {part}: {shape:?}");
            let bytes = cache.blocks().len() * BlockLayout::new(&shape).block_bytes();
            assert_eq!(bytes, 75_usize.next_multiple_of(BLOCK_TOKENS) * shape.kv_bytes_per_token());
            // A prefix that is used again continues as if nothing had ever stood behind it.
            let other = self::ids(20, 200);
            cache = cache.prefix(41);
            let got = decoded(packed.decoder(), &mut cache, &other, part);
            let fresh = inference.logits(&[&ids[..41], &other].concat(), 41).unwrap();
            assert!(got == fresh, "a prefix and parts of {part}: {shape:?}");
        }
    }
}

#[test]
fn what_is_asked_about_ids_fits_together() {
    for index in [1, 2, 3, 8] {
        let parameters = parameters(&shape(index));
        let prompt = ids(20, 1);
        for device in PolicyDevice::tested() {
            let inference = Inference::new(&config(device), parameters.clone()).unwrap();
            let greedy = inference.greedy(&prompt, 30, &[]).unwrap();
            assert_eq!(greedy.tokens.len(), 30);
            let all = [&prompt[..], &greedy.tokens].concat();
            let logits = inference.logits(&all, 19).unwrap();
            for (logits, token) in logits.chunks_exact(VOCABULARY).zip(&greedy.tokens) {
                assert!(logits.iter().all(|logit| *logit <= logits[*token as usize] + 1e-4));
            }
            let known = inference.cross_entropy(&all, 20).unwrap();
            if device == PolicyDevice::Cpu {
                assert_eq!(known.log_probs, greedy.log_probs);
            }
            let mean = -known.log_probs.iter().map(|p| f64::from(*p)).sum::<f64>() / 30.0;
            assert!((known.mean - mean).abs() < 1e-9);
            assert!((known.mean - Reference::new(&parameters).loss(&[all], 20)).abs() < 1e-5);
            let (_, gradient) = gradient(device, &parameters, std::slice::from_ref(&prompt));
            let norm = gradient.iter().flatten().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let asked = inference.cross_entropy(&prompt, 2).unwrap().gradient_norm;
            assert!((asked - norm).abs() < 1e-9 && norm > 0.0);

            let end = greedy.tokens[4];
            let until = greedy.tokens.iter().position(|token| *token == end).unwrap();
            assert_eq!(inference.greedy(&prompt, 30, &[end]).unwrap().tokens, greedy.tokens[..=until]);
            assert_eq!(inference.greedy(&prompt, 500, &[]).unwrap().tokens.len(), 60, "the context is full");
            let refused = |ids: &[u32], from| inference.cross_entropy(ids, from).unwrap_err().to_string();
            assert!(refused(&prompt, 0).contains("`from` is 0"));
            assert!(refused(&prompt, 20).contains("`from` is 20"));
            assert!(refused(&[1, 53], 1).contains("id 53"));
            assert!(refused(&[1; 81], 1).contains("81 tokens"));
            assert!(inference.logits(&[], 0).is_err());
        }
    }
}
