//! Attention of the sampler: one position over the keys and values of its sequence, with sums in the order that
//! [`crate::kernel`] promises.

#![expect(
    clippy::inline_always,
    reason = "code is compiled for wide vectors only where it is inlined into the dispatch"
)]
#![expect(
    clippy::indexing_slicing,
    reason = "sizes are checked at each kernel's entry; the inner loops must not branch"
)]

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::kernel::{PANEL, dispatch, exp, max_lanes, sum_lanes};

/// Keys and values of one sequence in one layer.
///
/// Keys stand in blocks of [`PANEL`] positions, `[block][head][dimension][position in block]`: a block's scores are sums
/// over dimensions in vectors of positions, and a longer context only appends blocks. Values are `[position][head]
/// [dimension]`.
#[derive(Debug, Clone, Default)]
pub(crate) struct LayerCache {
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
}

impl LayerCache {
    /// Writes the keys and values of one position (each `heads * dim` long), making room when needed.
    pub(crate) fn write(&mut self, position: usize, dim: usize, keys: &[f32], values: &[f32]) {
        let width = keys.len();
        let block = position / PANEL;
        if self.keys.len() < (block + 1) * PANEL * width {
            self.keys.resize((block + 1) * PANEL * width, 0.0);
            self.values.resize((block + 1) * PANEL * width, 0.0);
        }
        let base = block * PANEL * width + position % PANEL;
        debug_assert!(width.is_multiple_of(dim));
        for (row, key) in keys.iter().enumerate() {
            self.keys[base + row * PANEL] = *key;
        }
        self.values[position * width..(position + 1) * width].copy_from_slice(values);
    }
}

/// Attention of one position over itself and everything before it.
pub(crate) struct Attention<'a> {
    /// `[heads * dim]`, rotated.
    pub(crate) query: &'a [f32],
    pub(crate) cache: &'a LayerCache,
    /// First position to attend to: above 0 where a window has left it behind.
    pub(crate) first: usize,
    /// Position after the last one to attend to; above `first`.
    pub(crate) length: usize,
    pub(crate) dim: usize,
    /// Width of all key heads.
    pub(crate) kv_width: usize,
    /// Room for one head's scores; grown when needed.
    pub(crate) scores: &'a mut Vec<f32>,
    /// `[heads * dim]`.
    pub(crate) out: &'a mut [f32],
}

impl Attention<'_> {
    /// Computes it.
    pub(crate) fn run(self) {
        let blocks = self.length.div_ceil(PANEL);
        assert!(self.length > self.first && self.cache.keys.len() >= blocks * PANEL * self.kv_width);
        assert!(self.query.len() == self.out.len() && self.dim > 0);
        if self.scores.len() < blocks * PANEL {
            self.scores.resize(blocks * PANEL, 0.0);
        }
        dispatch(self);
    }
}

impl WithSimd for Attention<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match S::F32_LANES {
            16 => attend::<S, 2, 1>(simd, self),
            8 => attend::<S, 4, 2>(simd, self),
            4 => attend::<S, 8, 4>(simd, self),
            _ => attend::<S, 32, 16>(simd, self),
        }
    }
}

/// Sums over dimensions in vectors of positions: `out[s] = Σ_d x[d] scale blocks[d][s]` for every position of every block.
/// `V` vectors make a block.
#[inline(always)]
pub(crate) fn block_products<S: Simd, const V: usize>(
    simd: S,
    x: &[f32],
    scale: f32,
    blocks: &[f32],
    head_first: usize,
    kv_width: usize,
    out: &mut [f32],
) {
    for (block, out) in out.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
        let base = (block * kv_width + head_first) * PANEL;
        let columns = &blocks[base..base + x.len() * PANEL];
        let mut sums = [simd.splat_f32s(0.0); V];
        for (x, column) in x.iter().zip(columns.as_chunks::<PANEL>().0) {
            let x = simd.splat_f32s(x * scale);
            let (column, _) = S::as_simd_f32s(column);
            for v in 0..V {
                sums[v] = simd.mul_add_f32s(x, column[v], sums[v]);
            }
        }
        S::as_mut_simd_f32s(out).0.copy_from_slice(&sums);
    }
}

/// Turns the scores of `seen` into `e^(score - max)`, the others into 0, and returns the inverse of their sum.
#[inline(always)]
pub(crate) fn exponentiate(scores: &mut [f32], seen: Range<usize>) -> f32 {
    scores[..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..].fill(f32::NEG_INFINITY);
    let mut maxima = [f32::NEG_INFINITY; 16];
    for chunk in scores.as_chunks::<16>().0 {
        for i in 0..16 {
            maxima[i] = if chunk[i] > maxima[i] { chunk[i] } else { maxima[i] };
        }
    }
    let max = max_lanes(maxima);
    let mut lanes = [0.0_f32; 16];
    for chunk in scores.as_chunks_mut::<16>().0 {
        for i in 0..16 {
            chunk[i] = exp(chunk[i] - max);
            lanes[i] += chunk[i];
        }
    }
    1.0 / sum_lanes(lanes)
}

/// The blocks that hold positions `first..length`: the first of them, how many scores they have, and where among those
/// the positions stand.
#[inline(always)]
pub(crate) fn seen_blocks(first: usize, length: usize) -> (usize, usize, Range<usize>) {
    let block = first / PANEL;
    let before = block * PANEL;
    (block, length.div_ceil(PANEL) * PANEL - before, first - before..length - before)
}

/// `out[i] = Σ_s scales[s] rows[s][column + i]` for rows of `stride`; `D` vectors make 16 columns.
#[inline(always)]
pub(crate) fn mix_rows<S: Simd, const D: usize>(
    simd: S,
    scales: &[f32],
    rows: &[f32],
    stride: usize,
    column: usize,
    out: &mut [f32],
) {
    let (chunks, rest) = out.as_chunks_mut::<16>();
    let whole = column + chunks.len() * 16;
    for (part, out) in chunks.iter_mut().enumerate() {
        let first = column + part * 16;
        let mut sums = [simd.splat_f32s(0.0); D];
        for (scale, row) in scales.iter().zip(rows.chunks_exact(stride)) {
            let scale = simd.splat_f32s(*scale);
            let (row, _) = S::as_simd_f32s(&row[first..first + 16]);
            for d in 0..D {
                sums[d] = simd.mul_add_f32s(scale, row[d], sums[d]);
            }
        }
        S::as_mut_simd_f32s(out).0.copy_from_slice(&sums);
    }
    for (offset, out) in rest.iter_mut().enumerate() {
        let values = rows.chunks_exact(stride).map(|row| row[whole + offset]);
        *out = scales.iter().zip(values).fold(0.0, |sum, (scale, value)| scale.mul_add(value, sum));
    }
}

/// `V` vectors make a block of positions, `D` vectors make 16 dimensions.
#[inline(always)]
fn attend<S: Simd, const V: usize, const D: usize>(simd: S, task: Attention<'_>) {
    let Attention { query, cache, first, length, dim, kv_width, scores, out } = task;
    let group = query.len() / kv_width;
    let scale = 1.0 / (dim as f32).sqrt();
    let (block, count, seen) = seen_blocks(first, length);
    let keys = &cache.keys[block * PANEL * kv_width..];
    let scores = &mut scores[..count];
    for (head, (query, out)) in query.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).enumerate() {
        let head_first = head / group * dim;
        block_products::<S, V>(simd, query, scale, keys, head_first, kv_width, scores);
        let inverse = exponentiate(scores, seen.clone());
        let values = &cache.values[first * kv_width..];
        mix_rows::<S, D>(simd, &scores[seen.clone()], values, kv_width, head_first, out);
        for out in out {
            *out *= inverse;
        }
    }
}

#[cfg(test)]
mod tests {
    use fulgurite_core::seed::{Generator, Seed};

    use super::*;

    fn draws(len: usize, seed: u64) -> Vec<f32> {
        let mut generator = Generator::new(Seed::new(seed));
        (0..len).map(|_| generator.below(2_001) as f32 / 1_000.0 - 1.0).collect()
    }

    #[test]
    fn attention_is_softmax_over_keys() {
        for (heads, kv_heads, dim, length, first) in
            [(4, 2, 32, 71, 0), (4, 2, 32, 71, 40), (2, 1, 8, 33, 32), (6, 3, 20, 64, 63), (2, 2, 48, 1, 0)]
        {
            attention_is_right(heads, kv_heads, dim, length, first);
        }
    }

    fn attention_is_right(heads: usize, kv_heads: usize, dim: usize, length: usize, first: usize) {
        let mut cache = LayerCache::default();
        let (keys, values) = (draws(length * kv_heads * dim, 3), draws(length * kv_heads * dim, 4));
        let width = kv_heads * dim;
        for position in 0..length {
            let at = position * width..(position + 1) * width;
            cache.write(position, dim, &keys[at.clone()], &values[at]);
        }
        let query = draws(heads * dim, 5);
        let mut out = vec![0.0; heads * dim];
        let mut scores = vec![];
        let task = Attention {
            query: &query,
            cache: &cache,
            first,
            length,
            dim,
            kv_width: width,
            scores: &mut scores,
            out: &mut out,
        };
        task.run();
        for head in 0..heads {
            let kv = head / (heads / kv_heads);
            let key = |p: usize, d: usize| f64::from(keys[p * width + kv * dim + d]);
            let score = |p: usize| {
                (0..dim).map(|d| f64::from(query[head * dim + d]) * key(p, d)).sum::<f64>() / (dim as f64).sqrt()
            };
            let weights: Vec<f64> = (0..length).map(|p| if p < first { 0.0 } else { score(p).exp() }).collect();
            let total: f64 = weights.iter().sum();
            for d in 0..dim {
                let want: f64 =
                    (0..length).map(|p| weights[p] / total * f64::from(values[p * width + kv * dim + d])).sum();
                assert!((f64::from(out[head * dim + d]) - want).abs() < 1e-6);
            }
        }
    }
}
