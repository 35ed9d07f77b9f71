//! Attention over whole rows, forward and backward: what training runs.
//!
//! Scores and mixtures of several positions are matrix products, in tiles that fill the registers; a position alone, as the
//! sampler computes it, waits for each sum instead. The sums of the forward pass are those of [`crate::kv_cache`],
//! in its order, so that log-probs of training stay the sampler's, bit by bit. Positions behind a token stand in the same
//! tile and add nothing: their weight is 0.
//!
//! (Rejected: keeping the scores between the passes. They take memory of the length's square and a product to make again.)

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

use crate::attention_kernel::exponentiate;
use crate::kernel::{PANEL, Packed, dispatch, sum_products};

/// One row's queries, keys and values, and how they are divided into heads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowProjections<'a> {
    /// `[length, query | key | value]`, rotated.
    pub(crate) projected: &'a [f32],
    /// Width of a head.
    pub(crate) dim: usize,
    /// Positions that each attends to, itself included.
    pub(crate) window: usize,
    /// Width of all query heads.
    pub(crate) query_width: usize,
    /// Width of all key heads.
    pub(crate) kv_width: usize,
}

impl RowProjections<'_> {
    fn width(&self) -> usize {
        self.query_width + 2 * self.kv_width
    }

    fn length(&self) -> usize {
        self.projected.len() / self.width()
    }

    fn check(&self) {
        assert!(self.dim > 0 && self.window > 0 && self.kv_width > 0);
        assert!(self.query_width.is_multiple_of(self.kv_width) && self.kv_width.is_multiple_of(self.dim));
        assert!(self.projected.len().is_multiple_of(self.width()));
    }

    /// Columns `first..first + dim` of a position.
    #[inline(always)]
    fn head(&self, at: usize, first: usize) -> &[f32] {
        &self.projected[at * self.width() + first..][..self.dim]
    }

    /// Positions whose scores a tile of positions needs, from a whole panel to the last one's own.
    #[inline(always)]
    fn reach(&self, tile: &Range<usize>) -> Range<usize> {
        self.first_seen(tile.start) / PANEL * PANEL..tile.end
    }

    #[inline(always)]
    fn first_seen(&self, at: usize) -> usize {
        (at + 1).saturating_sub(self.window)
    }
}

/// Memory reused between rows.
#[derive(Debug, Default)]
pub(crate) struct RowScratch {
    /// Keys, values and their transposes, of one head.
    keys: Packed,
    values: Packed,
    keys_across: Packed,
    values_across: Packed,
    /// A tile of queries, or of gradients of their outputs.
    tile: Vec<f32>,
    /// `[positions of a block, length]`.
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    /// Queries of a block, and gradients of their outputs.
    queries: Packed,
    d_outputs: Packed,
    d_keys: Vec<f32>,
    d_values: Vec<f32>,
}

/// Something that is computed head by head in tiles of `V` vectors by `R` rows.
trait ByHeads {
    fn heads<S: Simd, const V: usize, const R: usize>(self, simd: S);
}

/// Chooses the tile that fits the machine's vectors.
struct Tiled<T>(T);

impl<T: ByHeads> WithSimd for Tiled<T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match S::F32_LANES {
            16 => self.0.heads::<S, 2, 8>(simd),
            8 => self.0.heads::<S, 4, 2>(simd),
            4 => self.0.heads::<S, 8, 2>(simd),
            _ => self.0.heads::<S, 32, 1>(simd),
        }
    }
}

/// Causal attention of one row.
pub(crate) struct RowAttention<'a> {
    pub(crate) row: RowProjections<'a>,
    pub(crate) scratch: &'a mut RowScratch,
    /// `[length, query]`, overwritten.
    pub(crate) mixed: &'a mut [f32],
}

impl RowAttention<'_> {
    /// Computes it.
    pub(crate) fn run(self) {
        self.row.check();
        assert!(self.mixed.len() == self.row.length() * self.row.query_width);
        dispatch(Tiled(self));
    }
}

impl ByHeads for RowAttention<'_> {
    #[inline(always)]
    fn heads<S: Simd, const V: usize, const R: usize>(self, simd: S) {
        let Self { row, scratch, mixed } = self;
        let (dim, length) = (row.dim, row.length());
        let stride = length.next_multiple_of(PANEL);
        let group = row.query_width / row.kv_width;
        let scale = 1.0 / (dim as f32).sqrt();
        scratch.tile.resize(R * dim, 0.0);
        scratch.scores.resize(R * stride, 0.0);
        for kv_head in 0..row.kv_width / dim {
            let key_first = row.query_width + kv_head * dim;
            scratch.keys_across.repack_across(row.projected, row.width(), key_first, dim);
            scratch.values.repack(row.projected, row.width(), key_first + row.kv_width, dim);
            for head in kv_head * group..(kv_head + 1) * group {
                let first = head * dim;
                for tile in tiles(0..length, R) {
                    let queries = tile.clone().map(|at| row.head(at, first));
                    fill_tile(&mut scratch.tile, queries, scale);
                    let reach = row.reach(&tile);
                    let (x, scores) = (&scratch.tile, &mut scratch.scores);
                    score_tile::<S, V, R>(simd, x, &scratch.keys_across, &reach, scores, stride);
                    let mut inverses = [0.0_f32; R];
                    for ((at, scores), inverse) in tile.clone().zip(scores.chunks_exact_mut(stride)).zip(&mut inverses)
                    {
                        *inverse = exponentiate_row(scores, &reach, row.first_seen(at)..at + 1);
                    }
                    let outs = |r| {
                        let first = (tile.start + r) * row.query_width + first;
                        first..first + dim
                    };
                    let factors = &inverses[..tile.len()];
                    mix_tile::<S, V, R>(simd, scores, stride, &scratch.values, &reach, outs, mixed, factors);
                }
            }
        }
    }
}

/// Positions `all` in tiles of at most `rows`.
#[inline(always)]
fn tiles(all: Range<usize>, rows: usize) -> impl Iterator<Item = Range<usize>> {
    let end = all.end;
    all.step_by(rows).map(move |start| start..end.min(start + rows))
}

/// Writes scaled vectors one after the other, and zeros where a tile is not full.
#[inline(always)]
fn fill_tile<'a>(tile: &mut [f32], vectors: impl Iterator<Item = &'a [f32]>, scale: f32) {
    let mut filled = 0;
    for vector in vectors {
        for (slot, value) in tile[filled..].iter_mut().zip(vector) {
            *slot = value * scale;
        }
        filled += vector.len();
    }
    tile[filled..].fill(0.0);
}

/// Scores of a tile of vectors with all positions of `reach`, in whole panels.
#[inline(always)]
fn score_tile<S: Simd, const V: usize, const R: usize>(
    simd: S,
    tile: &[f32],
    across: &Packed,
    reach: &Range<usize>,
    scores: &mut [f32],
    stride: usize,
) {
    let dim = across.k;
    let mut rows = [&tile[..0]; R];
    for r in 0..R {
        rows[r] = &tile[r * dim..(r + 1) * dim];
    }
    for (panel, first) in across.panels().zip((0..).step_by(PANEL)).skip(reach.start / PANEL) {
        if first >= reach.end {
            break;
        }
        let sums = product::<S, V, R>(simd, rows, panel);
        for (sums, scores) in sums.iter().zip(scores.chunks_exact_mut(stride)) {
            S::as_mut_simd_f32s(&mut scores[first..first + PANEL]).0.copy_from_slice(sums);
        }
    }
}

/// [`exponentiate`] on the panels of `reach`.
#[inline(always)]
fn exponentiate_row(scores: &mut [f32], reach: &Range<usize>, seen: Range<usize>) -> f32 {
    let end = reach.end.next_multiple_of(PANEL);
    exponentiate(&mut scores[reach.start..end], seen.start - reach.start..seen.end - reach.start)
}

/// Row `r` of the tile, `outs(r)` of `out`, becomes `factors[r] Σ_s scores[r][s] vectors[s]` over the positions of `reach`.
/// There are as many factors as rows that count.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "an inner loop of two callers")]
fn mix_tile<S: Simd, const V: usize, const R: usize>(
    simd: S,
    scores: &[f32],
    stride: usize,
    vectors: &Packed,
    reach: &Range<usize>,
    outs: impl Fn(usize) -> Range<usize>,
    out: &mut [f32],
    factors: &[f32],
) {
    let mut rows = [&scores[..0]; R];
    for r in 0..R {
        rows[r] = &scores[r * stride..(r + 1) * stride][reach.start..reach.end];
    }
    for (panel, first) in vectors.panels().zip((0..).step_by(PANEL)) {
        let sums = product::<S, V, R>(simd, rows, &panel[reach.clone()]);
        for ((r, sums), factor) in sums.iter().enumerate().zip(factors) {
            let mut all = [0.0_f32; PANEL];
            S::as_mut_simd_f32s(&mut all).0.copy_from_slice(sums);
            let out = &mut out[outs(r)][first..vectors.n.min(first + PANEL)];
            for (out, value) in out.iter_mut().zip(&all) {
                *out = value * factor;
            }
        }
    }
}

/// `rows · panel`, for rows as long as the panel.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "an iterator keeps the rows in memory, and their lengths unknown to the loop"
)]
fn product<S: Simd, const V: usize, const R: usize>(
    simd: S,
    rows: [&[f32]; R],
    panel: &[[f32; PANEL]],
) -> [[S::f32s; V]; R] {
    let k = panel.len();
    // Of one length, so that the loop below needs no checks. (`map` would not be inlined.)
    let mut rows = rows;
    for r in 0..R {
        rows[r] = &rows[r][..k];
    }
    let mut sums = [[simd.splat_f32s(0.0); V]; R];
    for (at, weights) in panel.iter().enumerate() {
        let (weights, _) = S::as_simd_f32s(weights);
        for r in 0..R {
            let x = simd.splat_f32s(rows[r][at]);
            for v in 0..V {
                sums[r][v] = simd.mul_add_f32s(x, weights[v], sums[r][v]);
            }
        }
    }
    sums
}

/// Backward of [`RowAttention`]. Scores are computed again, for a block of positions at a time.
pub(crate) struct RowAttentionBackward<'a> {
    pub(crate) row: RowProjections<'a>,
    /// What attention gave, `[length, query]`.
    pub(crate) mixed: &'a [f32],
    /// Its gradient.
    pub(crate) d_mixed: &'a [f32],
    pub(crate) scratch: &'a mut RowScratch,
    /// Gradient of `projected`, overwritten.
    pub(crate) d_projected: &'a mut [f32],
}

impl RowAttentionBackward<'_> {
    /// Computes it.
    pub(crate) fn run(self) {
        self.row.check();
        assert!(self.mixed.len() == self.row.length() * self.row.query_width && self.d_mixed.len() == self.mixed.len());
        assert!(self.d_projected.len() == self.row.projected.len());
        dispatch(Tiled(self));
    }
}

impl ByHeads for RowAttentionBackward<'_> {
    #[inline(always)]
    fn heads<S: Simd, const V: usize, const R: usize>(self, simd: S) {
        let Self { row, mixed, d_mixed, scratch, d_projected } = self;
        let (dim, length, width) = (row.dim, row.length(), row.width());
        let stride = length.next_multiple_of(PANEL);
        let group = row.query_width / row.kv_width;
        scratch.tile.resize(R * dim, 0.0);
        for buffer in [&mut scratch.scores, &mut scratch.d_scores] {
            buffer.resize(PANEL * stride, 0.0);
        }
        for kv_head in 0..row.kv_width / dim {
            let key_first = row.query_width + kv_head * dim;
            let value_first = key_first + row.kv_width;
            scratch.keys.repack(row.projected, width, key_first, dim);
            scratch.keys_across.repack_across(row.projected, width, key_first, dim);
            scratch.values_across.repack_across(row.projected, width, value_first, dim);
            for sums in [&mut scratch.d_keys, &mut scratch.d_values] {
                sums.clear();
                sums.resize(stride * dim, 0.0);
            }
            for head in kv_head * group..(kv_head + 1) * group {
                let head = Head { row, mixed, d_mixed, first: head * dim, stride };
                for block in tiles(0..length, PANEL) {
                    head.block::<S, V, R>(simd, block, scratch, d_projected);
                }
            }
            for (at, token) in d_projected.chunks_exact_mut(width).enumerate() {
                token[key_first..key_first + dim].copy_from_slice(&scratch.d_keys[at * dim..(at + 1) * dim]);
                token[value_first..value_first + dim].copy_from_slice(&scratch.d_values[at * dim..(at + 1) * dim]);
            }
        }
    }
}

/// One query head of a row.
struct Head<'a> {
    row: RowProjections<'a>,
    mixed: &'a [f32],
    d_mixed: &'a [f32],
    /// Its first column among the queries.
    first: usize,
    /// Scores of one position.
    stride: usize,
}

impl Head<'_> {
    /// The backward pass of a block of positions, at most a panel's: writes the gradient of their queries and adds to those
    /// of keys and values.
    #[inline(always)]
    fn block<S: Simd, const V: usize, const R: usize>(
        &self,
        simd: S,
        block: Range<usize>,
        scratch: &mut RowScratch,
        d_projected: &mut [f32],
    ) {
        let Self { row, stride, first, .. } = *self;
        let (dim, width, query_width) = (row.dim, row.width(), row.query_width);
        let scale = 1.0 / (dim as f32).sqrt();
        // A block is a panel of positions, so that all its tiles reach as far, in whole panels.
        let reach = row.reach(&block);
        let panels = reach.start..reach.end.next_multiple_of(PANEL);
        let output = |values: &'_ [f32], at: usize| -> Range<usize> {
            debug_assert!(values.len() >= (at + 1) * query_width);
            at * query_width + first..at * query_width + first + dim
        };
        for tile in tiles(block.clone(), R) {
            let from = (tile.start - block.start) * stride;
            let to = from + R * stride;
            // The last tile of a row may stand out of its block.
            let (scores, d_scores) = (&mut scratch.scores, &mut scratch.d_scores);
            scores.resize(scores.len().max(to), 0.0);
            d_scores.resize(d_scores.len().max(to), 0.0);
            let (scores, d_scores) = (&mut scores[from..to], &mut d_scores[from..to]);
            fill_tile(&mut scratch.tile, tile.clone().map(|at| row.head(at, first)), scale);
            score_tile::<S, V, R>(simd, &scratch.tile, &scratch.keys_across, &reach, scores, stride);
            fill_tile(&mut scratch.tile, tile.clone().map(|at| &self.d_mixed[output(self.d_mixed, at)]), 1.0);
            score_tile::<S, V, R>(simd, &scratch.tile, &scratch.values_across, &reach, d_scores, stride);
            let rows = scores.chunks_exact_mut(stride).zip(d_scores.chunks_exact_mut(stride));
            for (at, (scores, d_scores)) in tile.clone().zip(rows) {
                let inverse = exponentiate_row(scores, &reach, row.first_seen(at)..at + 1);
                let mean = sum_products(&self.mixed[output(self.mixed, at)], &self.d_mixed[output(self.d_mixed, at)]);
                // Softmax's backward: p (d_p - Σ p d_p), and Σ p d_p = mixed · d_mixed.
                for (score, d_score) in scores[panels.clone()].iter_mut().zip(&mut d_scores[panels.clone()]) {
                    *score *= inverse;
                    *d_score = *score * (*d_score - mean) * scale;
                }
            }
            let d_queries = |r| {
                let first = (tile.start + r) * width + first;
                first..first + dim
            };
            let factors = &[1.0; R][..tile.len()];
            mix_tile::<S, V, R>(simd, d_scores, stride, &scratch.keys, &reach, d_queries, d_projected, factors);
        }
        let rows = |values: &[f32], width: usize, packed: &mut Packed| {
            packed.repack(&values[block.start * width..block.end * width], width, first, dim);
        };
        rows(row.projected, width, &mut scratch.queries);
        rows(self.d_mixed, query_width, &mut scratch.d_outputs);
        add_transposed::<S, V, R>(simd, &scratch.d_scores, stride, &scratch.queries, &panels, &mut scratch.d_keys);
        add_transposed::<S, V, R>(simd, &scratch.scores, stride, &scratch.d_outputs, &panels, &mut scratch.d_values);
    }
}

/// `out[s] += Σ_r scores[r][s] vectors[r]` for the positions `s` of some panels.
#[inline(always)]
fn add_transposed<S: Simd, const V: usize, const R: usize>(
    simd: S,
    scores: &[f32],
    stride: usize,
    vectors: &Packed,
    positions: &Range<usize>,
    out: &mut [f32],
) {
    let dim = vectors.n;
    for first in positions.clone().step_by(R) {
        for (panel, column) in vectors.panels().zip((0..).step_by(PANEL)) {
            let mut sums = [[simd.splat_f32s(0.0); V]; R];
            for (scores, vector) in scores.chunks_exact(stride).zip(panel) {
                let (vector, _) = S::as_simd_f32s(vector);
                let (scores, _) = scores[first..first + R].as_chunks::<R>();
                let [scores] = scores else { continue };
                for r in 0..R {
                    let score = simd.splat_f32s(scores[r]);
                    for v in 0..V {
                        sums[r][v] = simd.mul_add_f32s(score, vector[v], sums[r][v]);
                    }
                }
            }
            for (sums, out) in sums.iter().zip(out[first * dim..].chunks_exact_mut(dim)) {
                let mut all = [0.0_f32; PANEL];
                S::as_mut_simd_f32s(&mut all).0.copy_from_slice(sums);
                for (out, value) in out[column..dim.min(column + PANEL)].iter_mut().zip(&all) {
                    *out += value;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::draws;
    use crate::kv_cache::{BlockAttention, BlockLayout, KvCache};

    /// Heads, key heads, width of a head, length, window.
    const CASES: [(usize, usize, usize, usize, usize); 8] = [
        (4, 4, 32, 64, usize::MAX),
        (4, 2, 20, 77, usize::MAX),
        (4, 1, 48, 133, 40),
        (2, 1, 8, 1, usize::MAX),
        (2, 2, 32, 33, 1),
        (6, 3, 64, 40, usize::MAX),
        (1, 1, 2, 32, 31),
        (2, 1, 6, 97, 33),
    ];

    fn row(
        projected: &[f32],
        (heads, kv_heads, dim, _, window): (usize, usize, usize, usize, usize),
    ) -> RowProjections<'_> {
        RowProjections { projected, dim, window, query_width: heads * dim, kv_width: kv_heads * dim }
    }

    #[test]
    fn a_row_has_the_bits_that_the_sampler_has_position_by_position() {
        // One memory for all, as in training: what a longer row left behind must not matter.
        let mut scratch = RowScratch::default();
        for case in CASES.into_iter().chain(CASES.into_iter().rev()) {
            let (heads, kv_heads, dim, length, window) = case;
            let (query_width, kv) = (heads * dim, kv_heads * dim);
            let projected = draws(length * (query_width + 2 * kv), 1);
            let mut mixed = vec![f32::NAN; length * query_width];
            RowAttention { row: row(&projected, case), scratch: &mut scratch, mixed: &mut mixed }.run();

            let (mut cache, mut scores) = (KvCache::default(), vec![]);
            let (layout, layer) = (BlockLayout { layers: 3, kv_width: kv, value_bytes: 4 }, 1);
            for (at, token) in projected.chunks_exact(query_width + 2 * kv).enumerate() {
                let (query, rest) = token.split_at(query_width);
                assert_eq!(cache.append(7, layout), at);
                cache.write(at, layer, layout, &rest[..kv], &rest[kv..]);
                let (first, length) = ((at + 1).saturating_sub(window), at + 1);
                let mut out = vec![0.0; query_width];
                let (cache, scores, slots) = (&cache, &mut scores, &mut out[..]);
                BlockAttention { query, cache, layer, layout, first, length, dim, scores, out: slots }.run();
                assert_eq!(mixed[at * query_width..(at + 1) * query_width], out, "{case:?} at {at}");
            }
        }
    }

    /// Attention in f64, straight from its definition; `projected` as in [`RowProjections`].
    fn loss(projected: &[f64], d_mixed: &[f32], case: (usize, usize, usize, usize, usize)) -> f64 {
        let (heads, kv_heads, dim, length, window) = case;
        let (query_width, kv) = (heads * dim, kv_heads * dim);
        let width = query_width + 2 * kv;
        let mut sum = 0.0;
        for at in 0..length {
            for head in 0..heads {
                let key = |s: usize, d: usize| projected[s * width + query_width + head / (heads / kv_heads) * dim + d];
                let value = |s: usize, d: usize| key(s, d + kv);
                let query = |d: usize| projected[at * width + head * dim + d];
                let seen = (at + 1).saturating_sub(window)..at + 1;
                let score = |s: usize| (0..dim).map(|d| query(d) * key(s, d)).sum::<f64>() / (dim as f64).sqrt();
                let weights: Vec<f64> = seen.clone().map(|s| score(s).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..dim {
                    let mixed: f64 = seen.clone().zip(&weights).map(|(s, weight)| weight / total * value(s, d)).sum();
                    sum += mixed * f64::from(d_mixed[at * query_width + head * dim + d]);
                }
            }
        }
        sum
    }

    #[test]
    fn the_gradient_is_the_slope_of_attention() {
        let mut scratch = RowScratch::default();
        for case in CASES {
            let (heads, kv_heads, dim, length, _) = case;
            let width = (heads + 2 * kv_heads) * dim;
            let (projected, d_mixed) = (draws(length * width, 2), draws(length * heads * dim, 3));
            let mut mixed = vec![0.0; length * heads * dim];
            let row = row(&projected, case);
            RowAttention { row, scratch: &mut scratch, mixed: &mut mixed }.run();
            let mut got = vec![f32::NAN; length * width];
            let (mixed, d_projected) = (&mixed, &mut got[..]);
            RowAttentionBackward { row, mixed, d_mixed: &d_mixed, scratch: &mut scratch, d_projected }.run();
            let wide: Vec<f64> = projected.iter().map(|value| f64::from(*value)).collect();
            // The definition is slow: some of the places, among them the first, the last and both sides of a panel's end.
            let places = (0..length * width).step_by(1 + length * width / 40).chain([length * width - 1]);
            for place in places.chain((0..3).map(|i| (width * PANEL + i * dim) % (length * width))) {
                let moved = |by: f64| {
                    let mut moved = wide.clone();
                    moved[place] += by;
                    loss(&moved, &d_mixed, case)
                };
                let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((f64::from(got[place]) - slope).abs() < 2e-4, "{case:?} {place}: {} {slope}", got[place]);
            }
        }
    }
}
