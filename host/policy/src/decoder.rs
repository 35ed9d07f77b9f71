//! The sampler's forward pass: published weights packed for the kernels, keys and values per session, and a batch of rows
//! of which each is one token of some sequence. Prompts and single decode steps are the same thing here.

use std::sync::Arc;

use fulgurite_core::id::PolicyVersion;

use crate::kernel::{self, Packed};
use crate::kv_cache::{BlockAttention, BlockLayout, KvCache};
use crate::lora::{PackedAdapter, Site};
use crate::parallel;
use crate::parameters::{Layout, Parameters};
use crate::rotary::RotaryTable;
use crate::shape::ModelShape;

/// One published version of the weights, ready for sampling. Immutable; copies share the weights.
#[derive(Debug, Clone)]
pub(crate) struct Decoder {
    pub(crate) version: PolicyVersion,
    pub(crate) shape: ModelShape,
    pub(crate) embedding: Arc<Vec<f32>>,
    pub(crate) layers: Arc<Vec<Layer>>,
    pub(crate) norm: Arc<Vec<f32>>,
    /// Empty in a critic.
    pub(crate) head: Arc<Packed>,
    pub(crate) rotary: Arc<RotaryTable>,
    /// What is added to some projections.
    pub(crate) adapter: Option<Arc<PackedAdapter>>,
    /// Stands in a critic for the output projection.
    pub(crate) value_head: Option<Arc<ValueHead>>,
}

/// One value per hidden state.
#[derive(Debug)]
pub(crate) struct ValueHead {
    /// `[d_model]`.
    pub(crate) weight: Vec<f32>,
    pub(crate) bias: f32,
}

#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Vec<f32>,
    query_key_value: Packed,
    /// Biases of query, key and value.
    biases: Option<Vec<f32>>,
    /// Norms of each head's query and key.
    pub(crate) head_norms: Option<[Vec<f32>; 2]>,
    attention_out: Packed,
    out_bias: Option<Vec<f32>>,
    pub(crate) mlp_norm: Vec<f32>,
    pub(crate) gate_up: Packed,
    pub(crate) down: Packed,
}

impl Layer {
    /// Queries, keys and values of normed rows, before norms of heads and rotation.
    pub(crate) fn project(&self, normed: &[f32], out: &mut [f32]) {
        kernel::multiply::<false>(normed, &self.query_key_value, out);
        if let Some(biases) = &self.biases {
            kernel::add_bias(out, biases);
        }
    }

    /// Normalises the heads of what [`project`](Self::project) gave, in a model that does.
    pub(crate) fn normalise_heads(&self, projected: &mut [f32], shape: &ModelShape) {
        if let Some([query_norm, key_norm]) = &self.head_norms {
            let (query, kv) = (shape.query_width(), shape.kv_width());
            let (width, epsilon) = (query + 2 * kv, shape.epsilon());
            kernel::head_norm(projected, width, 0..query, query_norm, epsilon);
            kernel::head_norm(projected, width, query..query + kv, key_norm, epsilon);
        }
    }

    /// Adds the output of attention to the residual stream.
    pub(crate) fn add_attention(&self, mixed: &[f32], x: &mut [f32]) {
        kernel::multiply::<true>(mixed, &self.attention_out, x);
        if let Some(bias) = &self.out_bias {
            kernel::add_bias(x, bias);
        }
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
    low: Vec<f32>,
    positions: Vec<usize>,
    pub(crate) logits: Vec<f32>,
}

fn resized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

impl Decoder {
    /// Packs the weights of a language model on some threads.
    pub(crate) fn new(
        parameters: &Parameters,
        version: PolicyVersion,
        rotary: Arc<RotaryTable>,
        threads: usize,
    ) -> Self {
        let shape = &parameters.shape;
        let tensor = |at: usize| parameters.values.get(at).map_or(&[][..], Vec::as_slice);
        let (d, vocabulary) = (shape.d_model, shape.vocabulary);
        let head = if shape.tie_embeddings {
            Packed::transposed(vocabulary, &[(tensor(0), d)])
        } else {
            Packed::new(d, &[(tensor(Layout::new(shape).norm() + 1), vocabulary)])
        };
        Self { head: Arc::new(head), ..Self::trunk(parameters, version, rotary, threads) }
    }

    /// Packs the weights of a critic on some threads.
    pub(crate) fn critic(
        parameters: &Parameters,
        version: PolicyVersion,
        rotary: Arc<RotaryTable>,
        threads: usize,
    ) -> Self {
        let head = Layout::new(&parameters.shape).norm() + 1;
        let tensor = |at: usize| parameters.values.get(at).cloned().unwrap_or_default();
        let bias = tensor(head + 1).first().copied().unwrap_or(0.0);
        let head = ValueHead { weight: tensor(head), bias };
        Self { value_head: Some(Arc::new(head)), ..Self::trunk(parameters, version, rotary, threads) }
    }

    /// Packs everything but the head.
    fn trunk(parameters: &Parameters, version: PolicyVersion, rotary: Arc<RotaryTable>, threads: usize) -> Self {
        let shape = parameters.shape.clone();
        let tensor = |at: usize| parameters.values.get(at).map_or(&[][..], Vec::as_slice);
        let (d, ff, query, kv) = (shape.d_model, shape.d_ff, shape.query_width(), shape.kv_width());
        let layout = Layout::new(&shape);
        let layers = parallel::map(threads, (0..shape.layers).collect(), |layer| {
            let tensor = |part: usize| tensor(layout.layer(layer) + part);
            Layer {
                attention_norm: tensor(0).to_vec(),
                query_key_value: Packed::new(d, &[(tensor(1), query), (tensor(2), kv), (tensor(3), kv)]),
                biases: layout.biases.map(|parts| parts.map(tensor).concat()),
                head_norms: layout.head_norms.map(|parts| parts.map(|part| tensor(part).to_vec())),
                attention_out: Packed::new(query, &[(tensor(4), d)]),
                out_bias: layout.out_bias.map(|part| tensor(part).to_vec()),
                mlp_norm: tensor(5).to_vec(),
                gate_up: Packed::new(d, &[(tensor(6), ff), (tensor(7), ff)]),
                down: Packed::new(ff, &[(tensor(8), d)]),
            }
        });
        let last = layout.norm();
        Self {
            version,
            embedding: Arc::new(tensor(0).to_vec()),
            layers: Arc::new(layers),
            norm: Arc::new(tensor(last).to_vec()),
            head: Arc::default(),
            rotary,
            shape,
            adapter: None,
            value_head: None,
        }
    }

    /// Adds the adapter's share, where there is one, to the output `y` of a projection of `x`.
    pub(crate) fn adapt(&self, layer: usize, site: Site, x: &[f32], low: &mut Vec<f32>, y: &mut [f32]) {
        if let Some(adapter) = &self.adapter {
            adapter.add(layer, site, x, low, y);
        }
    }

    /// Feeds rows: several of one sequence stand in its order. Afterwards their keys and values are in the caches and
    /// their hidden states in `scratch`, for [`logits`](Self::logits). Ids must be below the vocabulary's size and caches
    /// shorter than the context; the scheduler sees to both.
    pub(crate) fn forward(&self, rows: &[Row], caches: &mut [&mut KvCache], scratch: &mut Scratch) {
        let shape = &self.shape;
        let (d, query, kv, dim) = (shape.d_model, shape.query_width(), shape.kv_width(), shape.head_dim);
        let epsilon = shape.epsilon();
        let count = rows.len();
        let layout = BlockLayout::new(shape);

        let x = resized(&mut scratch.x, count * d);
        scratch.positions.clear();
        for (row, x) in rows.iter().zip(x.chunks_exact_mut(d)) {
            let token = row.token as usize;
            x.copy_from_slice(self.embedding.get(token * d..(token + 1) * d).unwrap_or_default());
            if let Some(cache) = caches.get_mut(row.cache) {
                scratch.positions.push(cache.append(row.token, layout));
            }
        }

        for (index, layer) in self.layers.iter().enumerate() {
            let normed = resized(&mut scratch.normed, count * d);
            kernel::rms_norm(&scratch.x, &layer.attention_norm, epsilon, normed);
            let width = query + 2 * kv;
            let wide = resized(&mut scratch.wide, count * width);
            layer.project(normed, wide);
            self.adapt(index, Site::QueryKeyValue, normed, &mut scratch.low, wide);
            layer.normalise_heads(wide, shape);
            for ((row, position), projected) in rows.iter().zip(&scratch.positions).zip(wide.chunks_exact_mut(width)) {
                let (rotated, values) = projected.split_at_mut(query + kv);
                let (cosines, sines) = self.rotary.at(*position);
                for head in rotated.chunks_exact_mut(dim) {
                    kernel::rotate(head, cosines, sines);
                }
                let (_, keys) = rotated.split_at(query);
                if let Some(cache) = caches.get_mut(row.cache) {
                    cache.write(*position, index, layout, keys, values);
                }
            }
            let mixed = resized(&mut scratch.mixed, count * query);
            for (((row, position), projected), out) in
                rows.iter().zip(&scratch.positions).zip(wide.chunks_exact(width)).zip(mixed.chunks_exact_mut(query))
            {
                let (queries, _) = projected.split_at(query);
                if let Some(cache) = caches.get(row.cache) {
                    let length = position + 1;
                    let (first, scores) = (shape.window_start(length), &mut scratch.scores);
                    let attention =
                        BlockAttention { query: queries, cache, layer: index, layout, first, length, dim, scores, out };
                    attention.run();
                }
            }
            layer.add_attention(mixed, &mut scratch.x);
            self.adapt(index, Site::AttentionOut, mixed, &mut scratch.low, &mut scratch.x);

            let normed = resized(&mut scratch.normed, count * d);
            kernel::rms_norm(&scratch.x, &layer.mlp_norm, epsilon, normed);
            let wide = resized(&mut scratch.wide, count * layer.gate_up.width());
            kernel::multiply::<false>(normed, &layer.gate_up, wide);
            self.adapt(index, Site::GateUp, normed, &mut scratch.low, wide);
            let mixed = resized(&mut scratch.mixed, count * shape.d_ff);
            kernel::silu_gate(wide, shape.d_ff, mixed);
            kernel::multiply::<true>(mixed, &layer.down, &mut scratch.x);
            self.adapt(index, Site::Down, mixed, &mut scratch.low, &mut scratch.x);
        }
    }

    /// Logits (`[rows, vocabulary]`, in `scratch.logits`) of some rows of the last [`forward`](Self::forward).
    pub(crate) fn logits(&self, rows: impl Iterator<Item = usize>, scratch: &mut Scratch) {
        let d = self.shape.d_model;
        let epsilon = self.shape.epsilon();
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
        Decoder::new(&parameters, PolicyVersion(0), rotary, 1)
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
        let mut cut = cut.prefix(3);
        assert_eq!(feed(&mut cut, &[9, 8], &mut scratch), feed(&mut fresh, &[1, 2, 3, 9, 8], &mut scratch));
    }
}
