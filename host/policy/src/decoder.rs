//! The sampler's forward pass: published weights packed for the kernels, keys and values per session, and a batch of rows
//! of which each is one token of some sequence. Prompts and single decode steps are the same thing here.

use std::sync::Arc;

use fulgurite_core::id::PolicyVersion;

use crate::attention_kernel::{Attention, LayerCache};
use crate::config::ModelShape;
use crate::kernel::{self, Packed};
use crate::parameters::{LAYER_TENSORS, Parameters};

/// One published version of the weights, ready for sampling. Immutable.
#[derive(Debug)]
pub(crate) struct Decoder {
    pub(crate) version: PolicyVersion,
    pub(crate) shape: ModelShape,
    pub(crate) embedding: Vec<f32>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Vec<f32>,
    pub(crate) head: Packed,
    pub(crate) rotary: Arc<RotaryTable>,
}

#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) query_key_value: Packed,
    pub(crate) attention_out: Packed,
    pub(crate) mlp_norm: Vec<f32>,
    pub(crate) gate_up: Packed,
    pub(crate) down: Packed,
}

/// Cosines and sines of every position, `[context, head_dim / 2]` each.
#[derive(Debug)]
pub(crate) struct RotaryTable {
    half: usize,
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl RotaryTable {
    /// The table of a shape. Angles are taken in f64, as the training side does.
    pub(crate) fn new(shape: &ModelShape) -> Self {
        let half = shape.head_dim / 2;
        let angle =
            |position: usize, i: usize| position as f64 / shape.rope_theta.powf(2.0 * i as f64 / shape.head_dim as f64);
        let table = |f: fn(f64) -> f64| -> Vec<f32> {
            (0..shape.context_tokens_max)
                .flat_map(|position| (0..half).map(move |i| (position, i)))
                .map(|(position, i)| {
                    #[expect(clippy::cast_possible_truncation, reason = "the model computes in f32")]
                    let value = f(angle(position, i)) as f32;
                    value
                })
                .collect()
        };
        Self { half, cosines: table(f64::cos), sines: table(f64::sin) }
    }

    /// Cosines and sines of the first `length` positions, `[length, head_dim / 2]` each.
    pub(crate) fn first(&self, length: usize) -> (&[f32], &[f32]) {
        let end = length * self.half;
        (self.cosines.get(..end).unwrap_or_default(), self.sines.get(..end).unwrap_or_default())
    }

    /// Cosines and sines of one position, `[head_dim / 2]` each.
    pub(crate) fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (self.cosines.get(range.clone()).unwrap_or_default(), self.sines.get(range).unwrap_or_default())
    }
}

/// Keys and values of one sequence.
#[derive(Debug, Clone, Default)]
pub(crate) struct KvCache {
    /// Tokens whose keys and values are there.
    pub(crate) ids: Vec<u32>,
    layers: Vec<LayerCache>,
}

impl KvCache {
    /// Memory in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.layers.iter().map(|layer| 4 * (layer.keys.capacity() + layer.values.capacity())).sum()
    }

    /// Keeps the first `length` tokens. Their keys and values depend on nothing after them.
    pub(crate) fn truncate(&mut self, length: usize) {
        self.ids.truncate(length);
    }
}

/// One token to feed: the next of the sequence behind `cache`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    /// Index into the caches of the batch.
    pub(crate) cache: usize,
    pub(crate) token: u32,
}

/// Memory reused between forward passes of one thread.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    x: Vec<f32>,
    normed: Vec<f32>,
    wide: Vec<f32>,
    mixed: Vec<f32>,
    scores: Vec<f32>,
    positions: Vec<usize>,
    pub(crate) logits: Vec<f32>,
}

fn resized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

impl Decoder {
    /// Packs weights.
    pub(crate) fn new(parameters: &Parameters, version: PolicyVersion, rotary: Arc<RotaryTable>) -> Self {
        let shape = parameters.shape.clone();
        let tensor = |at: usize| parameters.values.get(at).map_or(&[][..], Vec::as_slice);
        let (d, ff, query, kv) = (shape.d_model, shape.d_ff, shape.query_width(), shape.kv_width());
        let layers = (0..shape.layers)
            .map(|layer| {
                let tensor = |part: usize| tensor(1 + layer * LAYER_TENSORS + part);
                Layer {
                    attention_norm: tensor(0).to_vec(),
                    query_key_value: Packed::new(d, &[(tensor(1), query), (tensor(2), kv), (tensor(3), kv)]),
                    attention_out: Packed::new(query, &[(tensor(4), d)]),
                    mlp_norm: tensor(5).to_vec(),
                    gate_up: Packed::new(d, &[(tensor(6), ff), (tensor(7), ff)]),
                    down: Packed::new(ff, &[(tensor(8), d)]),
                }
            })
            .collect();
        let last = 1 + shape.layers * LAYER_TENSORS;
        let head = if shape.tie_embeddings {
            let transposed = crate::parameters::transpose(tensor(0), shape.vocabulary, d);
            Packed::new(d, &[(&transposed, shape.vocabulary)])
        } else {
            Packed::new(d, &[(tensor(last + 1), shape.vocabulary)])
        };
        Self { version, embedding: tensor(0).to_vec(), layers, norm: tensor(last).to_vec(), head, rotary, shape }
    }

    /// Feeds rows: several of one sequence stand in its order. Afterwards their keys and values are in the caches and
    /// their hidden states in `scratch`, for [`logits`](Self::logits). Ids must be below the vocabulary's size and caches
    /// shorter than the context; the scheduler sees to both.
    pub(crate) fn forward(&self, rows: &[Row], caches: &mut [&mut KvCache], scratch: &mut Scratch) {
        let shape = &self.shape;
        let (d, query, kv, dim) = (shape.d_model, shape.query_width(), shape.kv_width(), shape.head_dim);
        #[expect(clippy::cast_possible_truncation, reason = "the model computes in f32")]
        let epsilon = shape.rms_norm_epsilon as f32;
        let count = rows.len();

        let x = resized(&mut scratch.x, count * d);
        scratch.positions.clear();
        for (row, x) in rows.iter().zip(x.chunks_exact_mut(d)) {
            let token = row.token as usize;
            x.copy_from_slice(self.embedding.get(token * d..(token + 1) * d).unwrap_or_default());
            if let Some(cache) = caches.get_mut(row.cache) {
                scratch.positions.push(cache.ids.len());
                cache.ids.push(row.token);
                cache.layers.resize_with(shape.layers, LayerCache::default);
            }
        }

        for (index, layer) in self.layers.iter().enumerate() {
            let normed = resized(&mut scratch.normed, count * d);
            kernel::rms_norm(&scratch.x, &layer.attention_norm, epsilon, normed);
            let width = layer.query_key_value.width();
            let wide = resized(&mut scratch.wide, count * width);
            kernel::multiply::<false>(normed, &layer.query_key_value, wide);
            for ((row, position), projected) in rows.iter().zip(&scratch.positions).zip(wide.chunks_exact_mut(width)) {
                let (rotated, values) = projected.split_at_mut(query + kv);
                let (cosines, sines) = self.rotary.at(*position);
                for head in rotated.chunks_exact_mut(dim) {
                    kernel::rotate(head, cosines, sines);
                }
                let (_, keys) = rotated.split_at(query);
                if let Some(cache) = caches.get_mut(row.cache).and_then(|cache| cache.layers.get_mut(index)) {
                    cache.write(*position, dim, keys, values);
                }
            }
            let mixed = resized(&mut scratch.mixed, count * query);
            for (((row, position), projected), out) in
                rows.iter().zip(&scratch.positions).zip(wide.chunks_exact(width)).zip(mixed.chunks_exact_mut(query))
            {
                let (queries, _) = projected.split_at(query);
                if let Some(cache) = caches.get(row.cache).and_then(|cache| cache.layers.get(index)) {
                    let length = position + 1;
                    let scores = &mut scratch.scores;
                    Attention { query: queries, cache, length, dim, kv_width: kv, scores, out }.run();
                }
            }
            kernel::multiply::<true>(mixed, &layer.attention_out, &mut scratch.x);

            let normed = resized(&mut scratch.normed, count * d);
            kernel::rms_norm(&scratch.x, &layer.mlp_norm, epsilon, normed);
            let wide = resized(&mut scratch.wide, count * layer.gate_up.width());
            kernel::multiply::<false>(normed, &layer.gate_up, wide);
            let mixed = resized(&mut scratch.mixed, count * shape.d_ff);
            kernel::silu_gate(wide, shape.d_ff, mixed);
            kernel::multiply::<true>(mixed, &layer.down, &mut scratch.x);
        }
    }

    /// Logits (`[rows, vocabulary]`, in `scratch.logits`) of some rows of the last [`forward`](Self::forward).
    pub(crate) fn logits(&self, rows: impl Iterator<Item = usize>, scratch: &mut Scratch) {
        let d = self.shape.d_model;
        #[expect(clippy::cast_possible_truncation, reason = "the model computes in f32")]
        let epsilon = self.shape.rms_norm_epsilon as f32;
        scratch.mixed.clear();
        for row in rows {
            scratch.mixed.extend_from_slice(scratch.x.get(row * d..(row + 1) * d).unwrap_or_default());
        }
        let normed = resized(&mut scratch.normed, scratch.mixed.len());
        kernel::rms_norm(&scratch.mixed, &self.norm, epsilon, normed);
        let count = normed.len() / d;
        let logits = resized(&mut scratch.logits, count * self.shape.vocabulary);
        kernel::multiply::<false>(normed, &self.head, logits);
    }
}

#[cfg(test)]
mod tests {
    use fulgurite_core::seed::Seed;

    use super::*;
    use crate::config::PolicyConfig;

    fn decoder(kv_heads: usize) -> Decoder {
        let config = PolicyConfig { kv_heads: Some(kv_heads), initial_std: 0.2, ..PolicyConfig::default() };
        let parameters = Parameters::initial(&config.shape(300).unwrap(), config.initial_std, Seed::new(3));
        let rotary = Arc::new(RotaryTable::new(&parameters.shape));
        Decoder::new(&parameters, PolicyVersion(0), rotary)
    }

    #[test]
    fn a_prompt_fed_at_once_in_parts_or_among_others_has_the_same_bits() {
        for kv_heads in [1, 4] {
            let decoder = decoder(kv_heads);
            let ids: Vec<u32> = (0..70).map(|i| (i * 37 + 11) % 300).collect();
            let mut scratch = Scratch::default();
            let mut whole = KvCache::default();
            let rows: Vec<Row> = ids.iter().map(|token| Row { cache: 0, token: *token }).collect();
            decoder.forward(&rows, &mut [&mut whole], &mut scratch);
            decoder.logits(std::iter::once(69), &mut scratch);
            let want = scratch.logits.clone();
            assert!(want.iter().all(|l| l.is_finite()));

            let mut parts = KvCache::default();
            for part in rows.chunks(13) {
                decoder.forward(part, &mut [&mut parts], &mut scratch);
            }
            decoder.logits(std::iter::once((70 - 1) % 13), &mut scratch);
            assert_eq!(scratch.logits, want);

            let (mut other, mut cache) = (KvCache::default(), KvCache::default());
            for step in rows.chunks(1) {
                let pair = [Row { cache: 1, token: 5 }, step[0]];
                decoder.forward(&pair, &mut [&mut cache, &mut other], &mut scratch);
            }
            decoder.logits(std::iter::once(1), &mut scratch);
            assert_eq!(scratch.logits, want);
        }
    }

    #[test]
    fn a_cache_cut_back_continues_as_if_it_had_never_been_longer() {
        let decoder = decoder(2);
        let mut scratch = Scratch::default();
        let feed = |cache: &mut KvCache, ids: &[u32], scratch: &mut Scratch| {
            let rows: Vec<Row> = ids.iter().map(|token| Row { cache: 0, token: *token }).collect();
            decoder.forward(&rows, &mut [cache], scratch);
            decoder.logits(std::iter::once(ids.len() - 1), scratch);
            scratch.logits.clone()
        };
        let (mut cut, mut fresh) = (KvCache::default(), KvCache::default());
        feed(&mut cut, &[1, 2, 3, 4, 5, 6, 7], &mut scratch);
        cut.truncate(3);
        assert_eq!(feed(&mut cut, &[9, 8], &mut scratch), feed(&mut fresh, &[1, 2, 3, 9, 8], &mut scratch));
    }
}
