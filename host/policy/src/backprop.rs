//! Forward and backward of the decoder on the sampler's own kernels.
//!
//! The forward pass runs the very kernels that drew the tokens, so on the CPU a token's log-prob in training *is* the
//! sampler's, bit by bit, and so are two forwards of any split. Rows stand one after the other without padding. What the
//! backward pass needs is kept per micro-batch, but for attention scores, which are computed again.
//!
//! (Rejected as the default on the CPU: burn's autodiff, which stays as [`crate::model`]. On the tiny model it spends a
//! quarter of its time in matrix products; the rest goes into scalar exponentials, copies and fresh pages.)

use crate::decoder::Decoder;
use crate::gradient_kernel::{RmsNormBackward, add_outer, add_rows, silu_gate_backward};
use crate::kernel::{self, Packed};
use crate::parallel;
use crate::parameters::{Layout, Parameters, Values};
use crate::row_attention::{RowAttention, RowAttentionBackward, RowProjections, RowScratch};
use crate::shape::ModelShape;

/// Transposed weights, packed for multiplying gradients with.
#[derive(Debug)]
pub(crate) struct Transposed {
    layers: Vec<TransposedLayer>,
    head: Packed,
}

#[derive(Debug)]
struct TransposedLayer {
    query_key_value: Packed,
    attention_out: Packed,
    gate_up: Packed,
    down: Packed,
}

impl Transposed {
    /// Transposes and packs on some threads.
    pub(crate) fn new(parameters: &Parameters, threads: usize) -> Self {
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
        let head = if shape.tie_embeddings {
            Packed::new(shape.vocabulary, &[(tensor(0), d)])
        } else {
            Packed::transposed(d, &[(tensor(layout.norm() + 1), shape.vocabulary)])
        };
        Self { layers, head }
    }
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
}

/// Activations of one micro-batch; its memory is used again for the next one.
#[derive(Debug, Default)]
pub(crate) struct Tape {
    ids: Vec<u32>,
    /// Length of each row.
    lengths: Vec<usize>,
    layers: Vec<Saved>,
    /// Output of the last layer.
    x: Vec<f32>,
    selected: Vec<usize>,
    selected_x: Vec<f32>,
    selected_normed: Vec<f32>,
    /// `[selected, vocabulary]`: logits after [`forward`](Self::forward), to be replaced by their gradient before
    /// [`backward`](Self::backward).
    pub(crate) logits: Vec<f32>,
    packed: Packed,
    attention: RowScratch,
    d_x: Vec<f32>,
    d_wide: Vec<f32>,
    d_normed: Vec<f32>,
    d_mixed: Vec<f32>,
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

impl Tape {
    /// Logits after the selected tokens of some rows; `selected` counts tokens over all rows. Ids must be below the
    /// vocabulary's size and rows fit the context.
    pub(crate) fn forward<'a>(
        &mut self,
        decoder: &Decoder,
        rows: impl Iterator<Item = &'a [u32]>,
        selected: impl Iterator<Item = usize>,
    ) {
        let shape = &decoder.shape;
        let (d, query, kv, dim) = (shape.d_model, shape.query_width(), shape.kv_width(), shape.head_dim);
        let epsilon = shape.epsilon();
        self.ids.clear();
        self.lengths.clear();
        for row in rows {
            self.ids.extend_from_slice(row);
            self.lengths.push(row.len());
        }
        let tokens = self.ids.len();
        self.x.clear();
        for id in &self.ids {
            let at = *id as usize * d;
            self.x.extend_from_slice(decoder.embedding.get(at..at + d).unwrap_or_default());
        }
        self.layers.resize_with(shape.layers, Saved::default);
        for (layer, saved) in decoder.layers.iter().zip(&mut self.layers) {
            saved.x.clone_from(&self.x);
            let normed = sized(&mut saved.normed, tokens * d);
            kernel::rms_norm(&saved.x, &layer.attention_norm, epsilon, normed);
            let width = query + 2 * kv;
            let projected = sized(&mut saved.projected, tokens * width);
            layer.project(normed, projected);
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
            saved.x_middle.clone_from(&self.x);
            let normed = sized(&mut saved.normed_middle, tokens * d);
            kernel::rms_norm(&saved.x_middle, &layer.mlp_norm, epsilon, normed);
            let gate_up = sized(&mut saved.gate_up, tokens * layer.gate_up.width());
            kernel::multiply::<false>(normed, &layer.gate_up, gate_up);
            let activated = sized(&mut saved.activated, tokens * shape.d_ff);
            kernel::silu_gate(gate_up, shape.d_ff, activated);
            kernel::multiply::<true>(activated, &layer.down, &mut self.x);
        }
        self.selected.clear();
        self.selected.extend(selected);
        self.selected_x.clear();
        for token in &self.selected {
            self.selected_x.extend_from_slice(self.x.get(token * d..(token + 1) * d).unwrap_or_default());
        }
        let normed = sized(&mut self.selected_normed, self.selected_x.len());
        kernel::rms_norm(&self.selected_x, &decoder.norm, epsilon, normed);
        let logits = sized(&mut self.logits, self.selected.len() * shape.vocabulary);
        kernel::multiply::<false>(normed, &decoder.head, logits);
    }

    /// Adds the gradient of every weight, given the gradient of the logits in [`logits`](Self::logits).
    pub(crate) fn backward(&mut self, decoder: &Decoder, transposed: &Transposed, gradient: &mut Values) {
        let shape = &decoder.shape;
        let d = shape.d_model;
        let (tokens, count) = (self.ids.len(), self.selected.len());
        let epsilon = shape.epsilon();
        let last = Layout::new(shape).norm();

        // Output projection and final norm, of the selected tokens.
        if shape.tie_embeddings {
            self.packed.repack(&self.selected_normed, d, 0, d);
            add_weight(gradient, 0, &self.logits, shape.vocabulary, &self.packed);
        } else {
            self.packed.repack(&self.logits, shape.vocabulary, 0, shape.vocabulary);
            add_weight(gradient, last + 1, &self.selected_normed, d, &self.packed);
        }
        let d_normed = sized(&mut self.d_normed, count * d);
        kernel::multiply::<false>(&self.logits, &transposed.head, d_normed);
        let dx = zeroed(&mut self.d_wide, count * d);
        if let Some(d_weight) = gradient.get_mut(last) {
            let (x, weight) = (&self.selected_x, &decoder.norm);
            RmsNormBackward { x, weight, epsilon, dy: d_normed, dx, d_weight }.run();
        }
        let d_x = zeroed(&mut self.d_x, tokens * d);
        for (token, row) in self.selected.iter().zip(self.d_wide.chunks_exact(d)) {
            for (slot, value) in d_x.iter_mut().skip(token * d).zip(row) {
                *slot += value;
            }
        }

        for index in (0..shape.layers).rev() {
            self.layer_backward(index, decoder, transposed, gradient, epsilon);
        }
        if let Some(embedding) = gradient.first_mut() {
            for (id, row) in self.ids.iter().zip(self.d_x.chunks_exact(d)) {
                for (slot, value) in embedding.iter_mut().skip(*id as usize * d).zip(row) {
                    *slot += value;
                }
            }
        }
    }

    /// Takes the gradient of a layer's output in `d_x` to that of its input.
    fn layer_backward(
        &mut self,
        index: usize,
        decoder: &Decoder,
        transposed: &Transposed,
        gradient: &mut Values,
        epsilon: f32,
    ) {
        let shape = &decoder.shape;
        let (d, ff, query, kv) = (shape.d_model, shape.d_ff, shape.query_width(), shape.kv_width());
        let tokens = self.ids.len();
        let layout = Layout::new(shape);
        let first = layout.layer(index);
        let (Some(layer), Some(back)) = (decoder.layers.get(index), transposed.layers.get(index)) else { return };
        let Some(saved) = self.layers.get(index) else { return };

        // x + down(silu(gate) * up)
        self.packed.repack(&self.d_x, d, 0, d);
        add_weight(gradient, first + 8, &saved.activated, ff, &self.packed);
        let d_activated = sized(&mut self.d_mixed, tokens * ff);
        kernel::multiply::<false>(&self.d_x, &back.down, d_activated);
        let d_gate_up = sized(&mut self.d_wide, tokens * 2 * ff);
        silu_gate_backward(&saved.gate_up, ff, d_activated, d_gate_up);
        for (part, tensor) in [(0, first + 6), (ff, first + 7)] {
            self.packed.repack(d_gate_up, 2 * ff, part, ff);
            add_weight(gradient, tensor, &saved.normed_middle, d, &self.packed);
        }
        let dy = sized(&mut self.d_normed, tokens * d);
        kernel::multiply::<false>(d_gate_up, &back.gate_up, dy);
        if let Some(d_weight) = gradient.get_mut(first + 5) {
            let (x, weight, dx) = (&saved.x_middle, &layer.mlp_norm, &mut self.d_x);
            RmsNormBackward { x, weight, epsilon, dy, dx, d_weight }.run();
        }

        // x + out(attention)
        self.packed.repack(&self.d_x, d, 0, d);
        add_weight(gradient, first + 4, &saved.mixed, query, &self.packed);
        if let Some(sums) = layout.out_bias.and_then(|part| gradient.get_mut(first + part)) {
            add_rows(&self.d_x, d, 0, sums);
        }
        let d_mixed = sized(&mut self.d_mixed, tokens * query);
        kernel::multiply::<false>(&self.d_x, &back.attention_out, d_mixed);
        let width = query + 2 * kv;
        sized(&mut self.d_wide, tokens * width);
        self.attention_backward(index, decoder);
        if let Some([query_norm, key_norm]) = layout.head_norms {
            self.head_norm_backward(index, decoder, [first + query_norm, first + key_norm], gradient);
        }
        let Some(saved) = self.layers.get(index) else { return };
        for (at, (part, columns)) in [(0, query), (query, kv), (query + kv, kv)].into_iter().enumerate() {
            self.packed.repack(&self.d_wide, width, part, columns);
            add_weight(gradient, first + 1 + at, &saved.normed, d, &self.packed);
            let bias = layout.biases.and_then(|biases| biases.get(at).copied());
            if let Some(sums) = bias.and_then(|bias| gradient.get_mut(first + bias)) {
                add_rows(&self.d_wide, width, part, sums);
            }
        }
        let dy = sized(&mut self.d_normed, tokens * d);
        kernel::multiply::<false>(&self.d_wide, &back.query_key_value, dy);
        if let Some(d_weight) = gradient.get_mut(first) {
            let (x, weight, dx) = (&saved.x, &layer.attention_norm, &mut self.d_x);
            RmsNormBackward { x, weight, epsilon, dy, dx, d_weight }.run();
        }
    }

    /// Takes the gradient of queries and keys in `d_wide` from behind the norms of their heads to before them. `tensors` are
    /// those of the two norms.
    fn head_norm_backward(&mut self, index: usize, decoder: &Decoder, tensors: [usize; 2], gradient: &mut Values) {
        let shape = &decoder.shape;
        let (query, kv) = (shape.query_width(), shape.kv_width());
        let width = query + 2 * kv;
        let Some(norms) = decoder.layers.get(index).and_then(|layer| layer.head_norms.as_ref()) else { return };
        let Some(saved) = self.layers.get(index) else { return };
        let parts = [(0, query), (query, kv)].into_iter().zip(norms).zip(&saved.unnormed).zip(tensors);
        for ((((first, n), weight), x), tensor) in parts {
            gather(&self.d_wide, width, first, n, &mut self.d_normed);
            let dx = zeroed(&mut self.d_mixed, x.len());
            if let Some(d_weight) = gradient.get_mut(tensor) {
                RmsNormBackward { x, weight, epsilon: shape.epsilon(), dy: &self.d_normed, dx, d_weight }.run();
            }
            for (row, dx) in self.d_wide.chunks_exact_mut(width).zip(self.d_mixed.chunks_exact(n)) {
                for (slot, dx) in row.iter_mut().skip(first).zip(dx) {
                    *slot = *dx;
                }
            }
        }
    }

    /// From `d_mixed` to the gradient of the projections before rotation in `d_wide`, row by row.
    fn attention_backward(&mut self, index: usize, decoder: &Decoder) {
        let shape = &decoder.shape;
        let (query_width, kv_width, dim) = (shape.query_width(), shape.kv_width(), shape.head_dim);
        let width = query_width + 2 * kv_width;
        let Some(saved) = self.layers.get(index) else { return };
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

/// Adds `xᵀ · dy` to the gradient of tensor `at`.
fn add_weight(gradient: &mut Values, at: usize, x: &[f32], k: usize, dy: &Packed) {
    if let Some(sums) = gradient.get_mut(at) {
        add_outer(x, k, dy, sums);
    }
}
