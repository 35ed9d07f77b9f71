//! Scores and their softmax: the parts of attention that sampler ([`crate::kv_cache`]) and training
//! ([`crate::row_attention`]) share, with sums in the order that [`crate::kernel`] promises.

#![expect(
    clippy::inline_always,
    reason = "code is compiled for wide vectors only where it is inlined into the dispatch"
)]
#![expect(
    clippy::indexing_slicing,
    reason = "sizes are checked at each kernel's entry; the inner loops must not branch"
)]

use std::ops::Range;

use pulp::Simd;

use crate::kernel::{PANEL, exp, max_lanes, sum_lanes};

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
