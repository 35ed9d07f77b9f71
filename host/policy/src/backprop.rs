//! Forward and backward of the decoder on the sampler's own kernels.
//!
//! The forward pass runs the very kernels that drew the tokens, so on the CPU a token's log-prob in training *is* the
//! sampler's, bit by bit, and so are two forwards of any split. Rows stand one after the other without padding. What the
//! backward pass needs is kept per micro-batch, but for attention scores, which are computed again.
//!
//! (Rejected as the default on the CPU: burn's autodiff, which stays as [`crate::model`]. On the tiny model it spends a
//! quarter of its time in matrix products; the rest goes into scalar exponentials, copies and fresh pages.)

use std::ops::Range;
use std::sync::Arc;

use crate::decoder::{Decoder, ValueHead};
use crate::gradient_kernel::{RmsNormBackward, add_outer, add_rows, silu_gate_backward};
use crate::kernel::{self, Packed};
use crate::lora::{AdapterScratch, SITES, Site, SiteGradient, TransposedAdapter};
use crate::parallel;
use crate::parameters::{Layout, Parameters, Values};
use crate::row_attention::{RowAttention, RowAttentionBackward, RowProjections, RowScratch};
use crate::shape::ModelShape;

/// Transposed weights, packed for multiplying gradients with. Copies share them.
#[derive(Debug, Clone)]
pub(crate) struct Transposed {
    pub(crate) layers: Arc<Vec<TransposedLayer>>,
    /// Empty in a critic.
    pub(crate) head: Arc<Packed>,
    /// Of a model whose base is frozen: then gradients are the adapter's, and no others are computed.
    pub(crate) adapter: Option<Arc<TransposedAdapter>>,
}

#[derive(Debug)]
pub(crate) struct TransposedLayer {
    query_key_value: Packed,
    attention_out: Packed,
    gate_up: Packed,
    down: Packed,
}

impl Transposed {
    /// Transposes and packs a language model on some threads.
    pub(crate) fn new(parameters: &Parameters, threads: usize) -> Self {
        let shape = &parameters.shape;
        let tensor = |at: usize| parameters.values.get(at).map_or(&[][..], Vec::as_slice);
        let d = shape.d_model;
        let head = if shape.tie_embeddings {
            Packed::new(shape.vocabulary, &[(tensor(0), d)])
        } else {
            Packed::transposed(d, &[(tensor(Layout::new(shape).norm() + 1), shape.vocabulary)])
        };
        Self { head: Arc::new(head), ..Self::trunk(parameters, threads) }
    }

    /// Transposes and packs everything but the output projection.
    pub(crate) fn trunk(parameters: &Parameters, threads: usize) -> Self {
        let shape = &parameters.shape;
        let tensor = |at: usize| parameters.values.get(at).map_or(&[][..], Vec::as_slice);
        let (d, ff, query, kv) = (shape.d_model, shape.d_ff, shape.query_width(), shape.kv_width());
        let layout = Layout::new(shape);
        let layers = parallel::map(threads, (0..shape.layers).collect(), |layer| {
            let tensor = |part: usize| tensor(layout.layer(layer) + part);
            TransposedLayer {
                query_key_value: Packed::transposed(d, &[(tensor(1), query), (tensor(2), kv), (tensor(3), kv)]),
                attention_out: Packed::transposed(query, &[(tensor(4), d)]),
                gate_up: Packed::transposed(d, &[(tensor(6), ff), (tensor(7), ff)]),
                down: Packed::transposed(ff, &[(tensor(8), d)]),
            }
        });
        Self { layers: Arc::new(layers), head: Arc::default(), adapter: None }
    }
}

/// What a forward pass keeps for a backward pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Nothing: there will be none.
    #[default]
    Nothing,
    /// The input of every layer; the rest is computed again, by the same operations and so with the same bits.
    Inputs,
    /// All that is needed.
    Everything,
}

/// What one layer's backward pass needs of its forward pass, one row per token each.
#[derive(Debug, Default)]
struct Saved {
    x: Vec<f32>,
    normed: Vec<f32>,
    /// Queries and keys as projected, `[tokens, query]` and `[tokens, key]`; only where heads have norms.
    unnormed: [Vec<f32>; 2],
    /// Queries, keys and values, rotated.
    projected: Vec<f32>,
    mixed: Vec<f32>,
    x_middle: Vec<f32>,
    normed_middle: Vec<f32>,
    gate_up: Vec<f32>,
    activated: Vec<f32>,
    /// Inputs of the sites times the adapter's `A`, where there is an adapter.
    low: [Vec<f32>; SITES],
}

/// Activations of one micro-batch; its memory is used again for the next one.
#[derive(Debug, Default)]
pub(crate) struct Tape {
    ids: Vec<u32>,
    /// Length of each row.
    lengths: Vec<usize>,
    keep: Keep,
    /// One per layer when everything is kept, else one that all layers use in turn.
    layers: Vec<Saved>,
    /// Inputs of the layers, when only they are kept.
    inputs: Vec<Vec<f32>>,
    /// Output of the last layer.
    x: Vec<f32>,
    selected: Vec<usize>,
    selected_x: Vec<f32>,
    /// `[selected, d_model]`: what the head reads.
    pub(crate) selected_normed: Vec<f32>,
    /// Gradient of `selected_normed`, gathered by the head.
    d_selected: Vec<f32>,
    packed: Packed,
    attention: RowScratch,
    adapter: AdapterScratch,
    d_x: Vec<f32>,
    d_wide: Vec<f32>,
    d_normed: Vec<f32>,
    d_mixed: Vec<f32>,
    /// Takes the gradients of norms that are frozen.
    unread: Vec<f32>,
}

/// A buffer of `len` values in memory that is used again, to be overwritten as a whole: clearing it first would cost as much
/// as writing it.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

/// A buffer of `len` zeros in memory that is used again.
fn zeroed(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.clear();
    buffer.resize(len, 0.0);
    buffer
}

/// Writes columns `first..first + n` of rows of `width` one after the other.
fn gather(rows: &[f32], width: usize, first: usize, n: usize, out: &mut Vec<f32>) {
    out.clear();
    for row in rows.chunks_exact(width) {
        out.extend_from_slice(row.get(first..first + n).unwrap_or_default());
    }
}

/// Where gradients go: to all weights, or to those of an adapter over a frozen base.
struct Sums<'a> {
    gradient: &'a mut Values,
    adapter: Option<&'a TransposedAdapter>,
}

impl Sums<'_> {
    /// The gradient of a base's tensor, when it is trained.
    fn of(&mut self, tensor: usize) -> Option<&mut Vec<f32>> {
        if self.adapter.is_some() { None } else { self.gradient.get_mut(tensor) }
    }

    /// The gradient of a norm's weights, or as much memory that nobody reads.
    fn norm<'a>(&'a mut self, tensor: usize, len: usize, unread: &'a mut Vec<f32>) -> &'a mut [f32] {
        match self.of(tensor) {
            Some(sums) => sums,
            None => zeroed(unread, len),
        }
    }

    /// Adds the gradients of an adapter's matrices at a site, and of the site's input.
    fn adapt(&mut self, layer: usize, site: Site, pass: SiteGradient<'_>, scratch: &mut AdapterScratch) {
        if let Some(adapter) = self.adapter {
            adapter.backward(layer, site, pass, scratch, self.gradient);
        }
    }

    /// Adds `xᵀ · dy` to a base's tensor, when it is trained: columns `first..first + n` of `dy`, whose rows are `width`
    /// wide.
    fn add_product(&mut self, tensor: usize, (x, k): (&[f32], usize), dy: Columns<'_>, packed: &mut Packed) {
        if let Some(sums) = self.of(tensor) {
            packed.repack(dy.rows, dy.width, dy.first, dy.n);
            add_outer(x, k, packed, sums);
        }
    }
}

/// Columns `first..first + n` of rows of `width`.
#[derive(Clone, Copy)]
struct Columns<'a> {
    rows: &'a [f32],
    width: usize,
    first: usize,
    n: usize,
}

impl<'a> Columns<'a> {
    fn all(rows: &'a [f32], width: usize) -> Self {
        Self { rows, width, first: 0, n: width }
    }
}

impl Tape {
    /// Final hidden states (in `selected_normed`) of the selected tokens of some rows; `selected` counts tokens over all
    /// rows. Ids must be below the vocabulary's size and rows fit the context.
    pub(crate) fn forward<'a>(
        &mut self,
        decoder: &Decoder,
        rows: impl Iterator<Item = &'a [u32]>,
        selected: impl Iterator<Item = usize>,
        keep: Keep,
    ) {
        let shape = &decoder.shape;
        let d = shape.d_model;
        self.keep = keep;
        self.ids.clear();
        self.lengths.clear();
        for row in rows {
            self.ids.extend_from_slice(row);
            self.lengths.push(row.len());
        }
        self.x.clear();
        for id in &self.ids {
            let at = *id as usize * d;
            self.x.extend_from_slice(decoder.embedding.get(at..at + d).unwrap_or_default());
        }
        let kept = if keep == Keep::Everything { shape.layers } else { 1 };
        self.layers.resize_with(kept, Saved::default);
        self.inputs.resize_with(if keep == Keep::Inputs { shape.layers } else { 0 }, Vec::new);
        for index in 0..shape.layers {
            if let Some(input) = self.inputs.get_mut(index) {
                input.clone_from(&self.x);
            }
            self.layer_forward(index, decoder, true);
        }
        self.selected.clear();
        self.selected.extend(selected);
        self.selected_x.clear();
        for token in &self.selected {
            self.selected_x.extend_from_slice(self.x.get(token * d..(token + 1) * d).unwrap_or_default());
        }
        let normed = sized(&mut self.selected_normed, self.selected_x.len());
        kernel::rms_norm(&self.selected_x, &decoder.norm, shape.epsilon(), normed);
    }

    /// Where a layer's activations stand.
    fn slot(&self, index: usize) -> usize {
        if self.keep == Keep::Everything { index } else { 0 }
    }

    /// Takes `x` through a layer. Without `complete` the output is left out: only what is kept is wanted.
    fn layer_forward(&mut self, index: usize, decoder: &Decoder, complete: bool) {
        let shape = &decoder.shape;
        let (d, query, kv, dim) = (shape.d_model, shape.query_width(), shape.kv_width(), shape.head_dim);
        let (epsilon, tokens, slot) = (shape.epsilon(), self.ids.len(), self.slot(index));
        let (Some(layer), Some(saved)) = (decoder.layers.get(index), self.layers.get_mut(slot)) else { return };
        let [low_projected, low_out, low_gate_up, low_down] = &mut saved.low;
        saved.x.clone_from(&self.x);
        let normed = sized(&mut saved.normed, tokens * d);
        kernel::rms_norm(&saved.x, &layer.attention_norm, epsilon, normed);
        let width = query + 2 * kv;
        let projected = sized(&mut saved.projected, tokens * width);
        layer.project(normed, projected);
        decoder.adapt(index, Site::QueryKeyValue, normed, low_projected, projected);
        if layer.head_norms.is_some() {
            let [queries, keys] = &mut saved.unnormed;
            gather(projected, width, 0, query, queries);
            gather(projected, width, query, kv, keys);
            layer.normalise_heads(projected, shape);
        }
        let mixed = sized(&mut saved.mixed, tokens * query);
        let (mut projected, mut mixed) = (projected, mixed);
        for length in &self.lengths {
            let (row, rest) = projected.split_at_mut(length * width);
            projected = rest;
            for (position, token) in row.chunks_exact_mut(width).enumerate() {
                let (cosines, sines) = decoder.rotary.at(position);
                for head in token.split_at_mut(query + kv).0.chunks_exact_mut(dim) {
                    kernel::rotate(head, cosines, sines);
                }
            }
            let (out, rest) = mixed.split_at_mut(length * query);
            mixed = rest;
            RowAttention { row: projections(shape, row), scratch: &mut self.attention, mixed: out }.run();
        }
        layer.add_attention(&saved.mixed, &mut self.x);
        decoder.adapt(index, Site::AttentionOut, &saved.mixed, low_out, &mut self.x);
        saved.x_middle.clone_from(&self.x);
        let normed = sized(&mut saved.normed_middle, tokens * d);
        kernel::rms_norm(&saved.x_middle, &layer.mlp_norm, epsilon, normed);
        let gate_up = sized(&mut saved.gate_up, tokens * layer.gate_up.width());
        kernel::multiply::<false>(normed, &layer.gate_up, gate_up);
        decoder.adapt(index, Site::GateUp, normed, low_gate_up, gate_up);
        let activated = sized(&mut saved.activated, tokens * shape.d_ff);
        kernel::silu_gate(gate_up, shape.d_ff, activated);
        if complete {
            kernel::multiply::<true>(activated, &layer.down, &mut self.x);
            decoder.adapt(index, Site::Down, activated, low_down, &mut self.x);
        } else if let Some(adapter) = &decoder.adapter {
            adapter.keep(index, Site::Down, activated, low_down);
        }
    }

    /// Takes in the gradient of what [`logits`] gave for the same tokens. Every selected token's must come, in order, before
    /// [`backward`](Self::backward).
    pub(crate) fn logits_backward(
        &mut self,
        decoder: &Decoder,
        transposed: &Transposed,
        tokens: Range<usize>,
        d_logits: &[f32],
        gradient: &mut Values,
    ) {
        let shape = &decoder.shape;
        let (d, vocabulary) = (shape.d_model, shape.vocabulary);
        let place = tokens.start * d..tokens.end * d;
        let normed = self.selected_normed.get(place.clone()).unwrap_or_default();
        let mut sums = Sums { gradient, adapter: transposed.adapter.as_deref() };
        if shape.tie_embeddings {
            sums.add_product(0, (d_logits, vocabulary), Columns::all(normed, d), &mut self.packed);
        } else {
            let head = Layout::new(shape).norm() + 1;
            sums.add_product(head, (normed, d), Columns::all(d_logits, vocabulary), &mut self.packed);
        }
        self.d_selected.resize(self.selected_normed.len(), 0.0);
        if let Some(d_normed) = self.d_selected.get_mut(place) {
            kernel::multiply::<false>(d_logits, &transposed.head, d_normed);
        }
    }

    /// A critic's value of each selected token.
    pub(crate) fn values(&self, head: &ValueHead) -> Vec<f32> {
        let rows = self.selected_normed.chunks_exact(head.weight.len());
        rows.map(|row| kernel::sum_products(row, &head.weight) + head.bias).collect()
    }

    /// Takes in the gradient of what [`values`](Self::values) gave.
    pub(crate) fn values_backward(&mut self, head: &ValueHead, d_values: &[f32], gradient: &mut Values) {
        let d_normed = zeroed(&mut self.d_selected, self.selected_normed.len());
        let width = head.weight.len();
        let [.., d_weight, d_bias] = gradient.as_mut_slice() else { return };
        let rows = self.selected_normed.chunks_exact(width).zip(d_normed.chunks_exact_mut(width));
        for ((row, d_row), d_value) in rows.zip(d_values) {
            for (((slot, sum), x), weight) in d_row.iter_mut().zip(d_weight.iter_mut()).zip(row).zip(&head.weight) {
                *slot = d_value * weight;
                *sum += d_value * x;
            }
            if let Some(sum) = d_bias.first_mut() {
                *sum += d_value;
            }
        }
    }

    /// Adds the gradient of every trained weight of the trunk, given that of the selected tokens' hidden states.
    pub(crate) fn backward(&mut self, decoder: &Decoder, transposed: &Transposed, gradient: &mut Values) {
        let shape = &decoder.shape;
        let d = shape.d_model;
        let (tokens, count) = (self.ids.len(), self.selected.len());
        let epsilon = shape.epsilon();
        let mut sums = Sums { gradient, adapter: transposed.adapter.as_deref() };

        // Final norm, of the selected tokens.
        let dx = zeroed(&mut self.d_wide, count * d);
        let d_weight = sums.norm(Layout::new(shape).norm(), d, &mut self.unread);
        let (x, weight, dy) = (&self.selected_x, &decoder.norm, &self.d_selected);
        RmsNormBackward { x, weight, epsilon, dy, dx, d_weight }.run();
        let d_x = zeroed(&mut self.d_x, tokens * d);
        for (token, row) in self.selected.iter().zip(self.d_wide.chunks_exact(d)) {
            for (slot, value) in d_x.iter_mut().skip(token * d).zip(row) {
                *slot += value;
            }
        }

        for index in (0..shape.layers).rev() {
            if let Some(input) = self.inputs.get(index) {
                self.x.clone_from(input);
                self.layer_forward(index, decoder, false);
            }
            self.layer_backward(index, decoder, transposed, &mut sums);
        }
        if let Some(embedding) = sums.of(0) {
            for (id, row) in self.ids.iter().zip(self.d_x.chunks_exact(d)) {
                for (slot, value) in embedding.iter_mut().skip(*id as usize * d).zip(row) {
                    *slot += value;
                }
            }
        }
    }

    /// Takes the gradient of a layer's output in `d_x` to that of its input.
    fn layer_backward(&mut self, index: usize, decoder: &Decoder, transposed: &Transposed, sums: &mut Sums<'_>) {
        let shape = &decoder.shape;
        let (d, ff, query, kv) = (shape.d_model, shape.d_ff, shape.query_width(), shape.kv_width());
        let (tokens, epsilon, slot) = (self.ids.len(), shape.epsilon(), self.slot(index));
        let layout = Layout::new(shape);
        let first = layout.layer(index);
        let (Some(layer), Some(back)) = (decoder.layers.get(index), transposed.layers.get(index)) else { return };
        let Some(saved) = self.layers.get(slot) else { return };
        let [_, low_out, low_gate_up, low_down] = &saved.low;

        // x + down(silu(gate) * up)
        sums.add_product(first + 8, (&saved.activated, ff), Columns::all(&self.d_x, d), &mut self.packed);
        let d_activated = sized(&mut self.d_mixed, tokens * ff);
        kernel::multiply::<false>(&self.d_x, &back.down, d_activated);
        let pass = SiteGradient { x: &saved.activated, low: low_down, dy: &self.d_x, dx: d_activated };
        sums.adapt(index, Site::Down, pass, &mut self.adapter);
        let d_gate_up = sized(&mut self.d_wide, tokens * 2 * ff);
        silu_gate_backward(&saved.gate_up, ff, &self.d_mixed, d_gate_up);
        for (part, tensor) in [(0, first + 6), (ff, first + 7)] {
            let dy = Columns { rows: d_gate_up, width: 2 * ff, first: part, n: ff };
            sums.add_product(tensor, (&saved.normed_middle, d), dy, &mut self.packed);
        }
        let dy = sized(&mut self.d_normed, tokens * d);
        kernel::multiply::<false>(d_gate_up, &back.gate_up, dy);
        let pass = SiteGradient { x: &saved.normed_middle, low: low_gate_up, dy: d_gate_up, dx: dy };
        sums.adapt(index, Site::GateUp, pass, &mut self.adapter);
        let d_weight = sums.norm(first + 5, d, &mut self.unread);
        let (x, weight, dy, dx) = (&saved.x_middle, &layer.mlp_norm, &self.d_normed, &mut self.d_x);
        RmsNormBackward { x, weight, epsilon, dy, dx, d_weight }.run();

        // x + out(attention)
        sums.add_product(first + 4, (&saved.mixed, query), Columns::all(&self.d_x, d), &mut self.packed);
        if let Some(sums) = layout.out_bias.and_then(|part| sums.of(first + part)) {
            add_rows(&self.d_x, d, 0, sums);
        }
        let d_mixed = sized(&mut self.d_mixed, tokens * query);
        kernel::multiply::<false>(&self.d_x, &back.attention_out, d_mixed);
        let pass = SiteGradient { x: &saved.mixed, low: low_out, dy: &self.d_x, dx: d_mixed };
        sums.adapt(index, Site::AttentionOut, pass, &mut self.adapter);
        let width = query + 2 * kv;
        sized(&mut self.d_wide, tokens * width);
        self.attention_backward(slot, decoder);
        if let Some([query_norm, key_norm]) = layout.head_norms {
            self.head_norm_backward(index, decoder, [first + query_norm, first + key_norm], sums);
        }
        let Some(saved) = self.layers.get(slot) else { return };
        let [low_projected, ..] = &saved.low;
        for (at, (part, columns)) in [(0, query), (query, kv), (query + kv, kv)].into_iter().enumerate() {
            let dy = Columns { rows: &self.d_wide, width, first: part, n: columns };
            sums.add_product(first + 1 + at, (&saved.normed, d), dy, &mut self.packed);
            let bias = layout.biases.and_then(|biases| biases.get(at).copied());
            if let Some(sums) = bias.and_then(|bias| sums.of(first + bias)) {
                add_rows(&self.d_wide, width, part, sums);
            }
        }
        let dy = sized(&mut self.d_normed, tokens * d);
        kernel::multiply::<false>(&self.d_wide, &back.query_key_value, dy);
        let pass = SiteGradient { x: &saved.normed, low: low_projected, dy: &self.d_wide, dx: dy };
        sums.adapt(index, Site::QueryKeyValue, pass, &mut self.adapter);
        let d_weight = sums.norm(first, d, &mut self.unread);
        let (x, weight, dy, dx) = (&saved.x, &layer.attention_norm, &self.d_normed, &mut self.d_x);
        RmsNormBackward { x, weight, epsilon, dy, dx, d_weight }.run();
    }

    /// Takes the gradient of queries and keys in `d_wide` from behind the norms of their heads to before them. `tensors` are
    /// those of the two norms.
    fn head_norm_backward(&mut self, index: usize, decoder: &Decoder, tensors: [usize; 2], sums: &mut Sums<'_>) {
        let shape = &decoder.shape;
        let (query, kv) = (shape.query_width(), shape.kv_width());
        let width = query + 2 * kv;
        let Some(norms) = decoder.layers.get(index).and_then(|layer| layer.head_norms.as_ref()) else { return };
        let Some(saved) = self.layers.get(self.slot(index)) else { return };
        let parts = [(0, query), (query, kv)].into_iter().zip(norms).zip(&saved.unnormed).zip(tensors);
        for ((((first, n), weight), x), tensor) in parts {
            gather(&self.d_wide, width, first, n, &mut self.d_normed);
            let dx = zeroed(&mut self.d_mixed, x.len());
            let d_weight = sums.norm(tensor, weight.len(), &mut self.unread);
            RmsNormBackward { x, weight, epsilon: shape.epsilon(), dy: &self.d_normed, dx, d_weight }.run();
            for (row, dx) in self.d_wide.chunks_exact_mut(width).zip(self.d_mixed.chunks_exact(n)) {
                for (slot, dx) in row.iter_mut().skip(first).zip(dx) {
                    *slot = *dx;
                }
            }
        }
    }

    /// From `d_mixed` to the gradient of the projections before rotation in `d_wide`, row by row.
    fn attention_backward(&mut self, slot: usize, decoder: &Decoder) {
        let shape = &decoder.shape;
        let (query_width, kv_width, dim) = (shape.query_width(), shape.kv_width(), shape.head_dim);
        let width = query_width + 2 * kv_width;
        let Some(saved) = self.layers.get(slot) else { return };
        let (mut projected, mut mixed) = (saved.projected.as_slice(), saved.mixed.as_slice());
        let (mut d_mixed, mut d_projected) = (self.d_mixed.as_slice(), self.d_wide.as_mut_slice());
        for length in &self.lengths {
            let (row, rest) = projected.split_at(length * width);
            projected = rest;
            let (row_mixed, rest) = mixed.split_at(length * query_width);
            mixed = rest;
            let (row_d_mixed, rest) = d_mixed.split_at(length * query_width);
            d_mixed = rest;
            let (row_out, rest) = d_projected.split_at_mut(length * width);
            d_projected = rest;
            let task = RowAttentionBackward {
                row: projections(shape, row),
                mixed: row_mixed,
                d_mixed: row_d_mixed,
                scratch: &mut self.attention,
                d_projected: row_out,
            };
            task.run();
            for (position, token) in row_out.chunks_exact_mut(width).enumerate() {
                let (cosines, sines) = decoder.rotary.at(position);
                for head in token.split_at_mut(query_width + kv_width).0.chunks_exact_mut(dim) {
                    kernel::rotate_back(head, cosines, sines);
                }
            }
        }
    }
}

/// A row's projections, for attention.
fn projections<'a>(shape: &ModelShape, projected: &'a [f32]) -> RowProjections<'a> {
    RowProjections {
        projected,
        dim: shape.head_dim,
        window: shape.sliding_window.unwrap_or(usize::MAX),
        query_width: shape.query_width(),
        kv_width: shape.kv_width(),
    }
}

/// Logits (`[tokens, vocabulary]`) of some of the final hidden states `normed`, by their places there.
pub(crate) fn logits(decoder: &Decoder, normed: &[f32], tokens: Range<usize>, logits: &mut Vec<f32>) {
    let d = decoder.shape.d_model;
    let normed = normed.get(tokens.start * d..tokens.end * d).unwrap_or_default();
    kernel::multiply::<false>(normed, &decoder.head, sized(logits, tokens.len() * decoder.shape.vocabulary));
}
