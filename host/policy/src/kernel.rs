//! Single-threaded f32 kernels of the sampler.
//!
//! Every output element is one chain of fused multiply-adds in a fixed order that depends neither on how many rows are
//! computed together nor on the vector width. So a token's log-probs have the same bits whatever shares its batch, whether
//! its prompt was computed at once or in parts, and on every machine with fused multiply-add: batch invariance comes from
//! the arithmetic instead of from padding batches to fixed shapes, and no work is spent on padding. (Rejected: burn's
//! matrix multiplication. Its kernels change with the shape, so rows and lengths would have to be padded to fixed tiles.)

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

/// Columns of one packed panel; a whole number of vectors on every machine.
pub(crate) const PANEL: usize = 32;

/// Runs `op` with the widest vectors of this machine.
#[inline]
pub(crate) fn dispatch<Op: WithSimd>(op: Op) -> Op::Output {
    // pulp's own `Arch` knows AVX2 only with a feature that the rest of the tree does not enable.
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = pulp::x86::V4::try_new() {
            return Simd::vectorize(simd, op);
        }
        if let Some(simd) = pulp::x86::V3::try_new() {
            return Simd::vectorize(simd, op);
        }
    }
    pulp::Arch::new().dispatch(op)
}

/// A matrix `[k, n]` cut into panels of [`PANEL`] columns, the last one padded with zeros.
#[derive(Debug, Clone, Default)]
pub(crate) struct Packed {
    pub(crate) k: usize,
    pub(crate) n: usize,
    panels: Vec<f32>,
}

impl Packed {
    /// Packs columns `first..first + n` of a row-major `[k, stride]` matrix into this one's memory.
    pub(crate) fn repack(&mut self, values: &[f32], stride: usize, first: usize, n: usize) {
        let k = values.len() / stride.max(1);
        assert!(values.len() == k * stride && first + n <= stride);
        (self.k, self.n) = (k, n);
        self.panels.clear();
        self.panels.resize(n.div_ceil(PANEL) * k * PANEL, 0.0);
        for (index, panel) in self.panels.chunks_exact_mut((k * PANEL).max(1)).enumerate() {
            let from = first + index * PANEL;
            let width = PANEL.min(first + n - from);
            for (row, slots) in values.chunks_exact(stride).zip(panel.as_chunks_mut::<PANEL>().0) {
                slots[..width].copy_from_slice(&row[from..from + width]);
            }
        }
    }

    /// Packs the transpose of columns `first..first + k` of a row-major `[n, stride]` matrix into this one's memory, with
    /// columns of zeros up to a whole panel.
    pub(crate) fn repack_across(&mut self, values: &[f32], stride: usize, first: usize, k: usize) {
        let n = values.len() / stride.max(1);
        assert!(values.len() == n * stride && first + k <= stride);
        (self.k, self.n) = (k, n.next_multiple_of(PANEL));
        self.panels.resize(self.n * k, 0.0);
        let panels = self.panels.chunks_exact_mut((k * PANEL).max(1));
        for (panel, rows) in panels.zip(values.chunks(stride * PANEL)) {
            let (slots, _) = panel.as_chunks_mut::<PANEL>();
            across(rows, stride, first..first + k, slots);
            for slot in slots {
                slot[rows.len() / stride..].fill(0.0);
            }
        }
    }

    /// The panels, each with a row of [`PANEL`] columns for each of `k`.
    pub(crate) fn panels(&self) -> impl Iterator<Item = &[[f32; PANEL]]> {
        self.panels.chunks_exact((self.k * PANEL).max(1)).map(|panel| panel.as_chunks::<PANEL>().0)
    }

    /// Packs matrices `[k, n_i]` (row-major) side by side.
    pub(crate) fn new(k: usize, parts: &[(&[f32], usize)]) -> Self {
        let n: usize = parts.iter().map(|(_, width)| width).sum();
        let mut panels = vec![0.0; n.div_ceil(PANEL) * k * PANEL];
        let mut first = 0;
        for (values, width) in parts {
            assert_eq!(values.len(), k * width);
            for (row, values) in values.chunks_exact((*width).max(1)).enumerate() {
                // In pieces that end where a panel does.
                let (mut column, mut rest) = (first, values);
                while !rest.is_empty() {
                    let (piece, after) = rest.split_at(rest.len().min(PANEL - column % PANEL));
                    let at = (column / PANEL * k + row) * PANEL + column % PANEL;
                    panels[at..at + piece.len()].copy_from_slice(piece);
                    (column, rest) = (column + piece.len(), after);
                }
            }
            first += width;
        }
        Self { k, n, panels }
    }

    /// Packs the transpose of matrices `[n, k_i]` (row-major) that stand side by side: a matrix `[sum of k_i, n]`.
    pub(crate) fn transposed(n: usize, parts: &[(&[f32], usize)]) -> Self {
        let k: usize = parts.iter().map(|(_, width)| width).sum();
        let mut panels = vec![0.0; n.div_ceil(PANEL) * k * PANEL];
        let mut first = 0;
        for (values, width) in parts {
            assert_eq!(values.len(), n * width);
            let rows = values.chunks((*width).max(1) * PANEL);
            for (panel, rows) in panels.chunks_exact_mut((k * PANEL).max(1)).zip(rows) {
                let (slots, _) = panel.as_chunks_mut::<PANEL>();
                across(rows, *width, 0..*width, &mut slots[first..first + width]);
            }
            first += width;
        }
        Self { k, n, panels }
    }

    /// Columns.
    pub(crate) fn width(&self) -> usize {
        self.n
    }
}

/// Turns some columns of at most [`PANEL`] rows into the rows of a panel.
fn across(rows: &[f32], stride: usize, columns: Range<usize>, slots: &mut [[f32; PANEL]]) {
    /// Columns at a time: what is read and written meanwhile stays in the nearest cache.
    const BLOCK: usize = 16;
    for (slots, first) in slots.chunks_mut(BLOCK).zip(columns.clone().step_by(BLOCK)) {
        for (column, row) in rows.chunks_exact(stride.max(1)).enumerate() {
            for (slot, value) in slots.iter_mut().zip(&row[first..columns.end]) {
                slot[column] = *value;
            }
        }
    }
}

/// `y = x · w`, or `y += x · w` when `ADD`. `x` is `[rows, k]`, `y` is `[rows, n]`.
pub(crate) fn multiply<const ADD: bool>(x: &[f32], w: &Packed, y: &mut [f32]) {
    let rows = x.len() / w.k.max(1);
    assert!(x.len() == rows * w.k && y.len() == rows * w.n);
    dispatch(Multiply::<ADD> { x, w, y });
}

struct Multiply<'a, const ADD: bool> {
    x: &'a [f32],
    w: &'a Packed,
    y: &'a mut [f32],
}

impl<const ADD: bool> WithSimd for Multiply<'_, ADD> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Rows per tile fill the registers of each width: 32 of 16 floats, 16 of 8, and what is left.
        match S::F32_LANES {
            16 => blocks::<S, ADD, 2, 8>(simd, self.x, self.w, self.y),
            8 => blocks::<S, ADD, 4, 2>(simd, self.x, self.w, self.y),
            4 => blocks::<S, ADD, 8, 2>(simd, self.x, self.w, self.y),
            _ => blocks::<S, ADD, 32, 1>(simd, self.x, self.w, self.y),
        }
    }
}

#[inline(always)]
fn blocks<S: Simd, const ADD: bool, const V: usize, const R: usize>(simd: S, x: &[f32], w: &Packed, y: &mut [f32]) {
    let (k, width) = (w.k, w.n);
    // One tile's rows, interleaved, so that the inner loop reads them in order. On the heap: layers may be wide.
    let mut tile = vec![[0.0_f32; R]; k];
    let mut x_rest = x;
    let mut y_rest = y;
    while x_rest.len() >= R * k && k > 0 && !x_rest.is_empty() {
        let (rows, rest) = x_rest.split_at(R * k);
        x_rest = rest;
        let (out, rest) = y_rest.split_at_mut(R * width);
        y_rest = rest;
        for (r, row) in rows.chunks_exact(k).enumerate() {
            for (slot, value) in tile.iter_mut().zip(row) {
                slot[r] = *value;
            }
        }
        panels::<S, ADD, V, R>(simd, &tile, w, out);
    }
    // What is left goes row by row; the arithmetic of a row is the same.
    let mut tile = vec![[0.0_f32; 1]; k];
    for (row, out) in x_rest.chunks_exact(k.max(1)).zip(y_rest.chunks_exact_mut(width.max(1))) {
        for (slot, value) in tile.iter_mut().zip(row) {
            slot[0] = *value;
        }
        panels::<S, ADD, V, 1>(simd, &tile, w, out);
    }
}

#[inline(always)]
pub(crate) fn panels<S: Simd, const ADD: bool, const V: usize, const R: usize>(
    simd: S,
    x: &[[f32; R]],
    w: &Packed,
    y: &mut [f32],
) {
    let n = w.n;
    for (index, panel) in w.panels.chunks_exact(w.k * PANEL).enumerate() {
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        let (panel, _) = panel.as_chunks::<PANEL>();
        for (x, weights) in x.iter().zip(panel) {
            let (weights, _) = S::as_simd_f32s(weights);
            for r in 0..R {
                let x = simd.splat_f32s(x[r]);
                for v in 0..V {
                    sums[r][v] = simd.mul_add_f32s(x, weights[v], sums[r][v]);
                }
            }
        }
        let first = index * PANEL;
        let width = PANEL.min(n - first);
        for (sums, y) in sums.iter().zip(y.chunks_exact_mut(n)) {
            let mut out = [0.0_f32; PANEL];
            let (vectors, _) = S::as_mut_simd_f32s(&mut out);
            vectors.copy_from_slice(sums);
            let y = &mut y[first..first + width];
            if ADD {
                for (y, out) in y.iter_mut().zip(&out) {
                    *y += *out;
                }
            } else {
                y.copy_from_slice(&out[..width]);
            }
        }
    }
}

/// Sum in 16 lanes, then by halves: the order is a function of the length alone.
#[inline(always)]
pub(crate) fn sum_lanes(lanes: [f32; 16]) -> f32 {
    let mut lanes = lanes;
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Largest of 16 lanes.
#[inline(always)]
pub(crate) fn max_lanes(lanes: [f32; 16]) -> f32 {
    let mut lanes = lanes;
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            lanes[i] = if lanes[i + width] > lanes[i] { lanes[i + width] } else { lanes[i] };
        }
        width /= 2;
    }
    lanes[0]
}

/// Writes `x / rms(x) * weight` per row of `weight`'s length.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    assert!(x.len() == out.len() && x.len().is_multiple_of(weight.len()));
    dispatch(RmsNorm { x, weight, epsilon, out });
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    epsilon: f32,
    out: &'a mut [f32],
}

impl WithSimd for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.weight.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let scale = inverse_rms(x, self.epsilon);
            for ((out, x), weight) in out.iter_mut().zip(x).zip(self.weight) {
                *out = x * scale * weight;
            }
        }
    }
}

/// `1 / rms(x)`.
#[inline(always)]
fn inverse_rms(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (sum_products(x, x) / x.len() as f32 + epsilon).sqrt()
}

/// `Σ a b` in 16 lanes.
#[inline(always)]
pub(crate) fn sum_products(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 16];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..16 {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    for ((a, b), lane) in a_rest.iter().zip(b_rest).zip(&mut lanes) {
        *lane = a.mul_add(*b, *lane);
    }
    sum_lanes(lanes)
}

/// [`rms_norm`] in place of each head: `columns` of every row of `width` are heads of `weight`'s length.
pub(crate) fn head_norm(rows: &mut [f32], width: usize, columns: Range<usize>, weight: &[f32], epsilon: f32) {
    assert!(rows.len().is_multiple_of(width) && columns.end <= width && columns.len().is_multiple_of(weight.len()));
    dispatch(HeadNorm { rows, width, columns, weight, epsilon });
}

struct HeadNorm<'a> {
    rows: &'a mut [f32],
    width: usize,
    columns: Range<usize>,
    weight: &'a [f32],
    epsilon: f32,
}

impl WithSimd for HeadNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for row in self.rows.chunks_exact_mut(self.width) {
            for head in row[self.columns.clone()].chunks_exact_mut(self.weight.len()) {
                let scale = inverse_rms(head, self.epsilon);
                for (x, weight) in head.iter_mut().zip(self.weight) {
                    *x = *x * scale * weight;
                }
            }
        }
    }
}

/// Adds a bias to every row of its length.
pub(crate) fn add_bias(rows: &mut [f32], bias: &[f32]) {
    assert!(!bias.is_empty() && rows.len().is_multiple_of(bias.len()));
    for row in rows.chunks_exact_mut(bias.len()) {
        for (slot, bias) in row.iter_mut().zip(bias) {
            *slot += bias;
        }
    }
}

/// Rotates one head's vector by its position's angles (halves rotate against each other, as in Hugging Face files).
#[inline]
pub(crate) fn rotate(head: &mut [f32], cosine: &[f32], sine: &[f32]) {
    let (low, high) = head.split_at_mut(cosine.len());
    for (((low, high), cosine), sine) in low.iter_mut().zip(high).zip(cosine).zip(sine) {
        (*low, *high) = (*low * cosine - *high * sine, *high * cosine + *low * sine);
    }
}

/// The inverse of [`rotate`], which is also its gradient.
#[inline]
pub(crate) fn rotate_back(head: &mut [f32], cosine: &[f32], sine: &[f32]) {
    let (low, high) = head.split_at_mut(cosine.len());
    for (((low, high), cosine), sine) in low.iter_mut().zip(high).zip(cosine).zip(sine) {
        (*low, *high) = (*low * cosine + *high * sine, *high * cosine - *low * sine);
    }
}

/// `e^x` to about one unit in the last place for `x <= 88`; 0 below -87 (Cephes' polynomial).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding and subtracting this rounds to a whole number, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let r = whole.mul_add(-0.693_359_4, clamped);
    let r = whole.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4_f32;
    p = p.mul_add(r, 1.398_2e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 5e-1);
    let y = (p * r).mul_add(r, r) + 1.0;
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let y = y * f32::from_bits(power);
    if x < -87.0 { 0.0 } else { y }
}

/// Per row `[gate | up]` of `2 * width` writes `gate * sigmoid(gate) * up`.
pub(crate) fn silu_gate(gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert!(width > 0 && gate_up.len() == 2 * out.len() && out.len().is_multiple_of(width));
    dispatch(SiluGate { gate_up, width, out });
}

struct SiluGate<'a> {
    gate_up: &'a [f32],
    width: usize,
    out: &'a mut [f32],
}

impl WithSimd for SiluGate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (row, out) in self.gate_up.chunks_exact(2 * self.width).zip(self.out.chunks_exact_mut(self.width)) {
            let (gate, up) = row.split_at(self.width);
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate / (1.0 + exp(-gate)) * up;
            }
        }
    }
}

/// Divides logits by the temperature in place and returns (largest, log of the sum of exponentials).
pub(crate) fn log_normaliser(logits: &mut [f32], temperature: f32) -> (f32, f32) {
    dispatch(LogNormaliser { logits, temperature })
}

struct LogNormaliser<'a> {
    logits: &'a mut [f32],
    temperature: f32,
}

impl WithSimd for LogNormaliser<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> (f32, f32) {
        let mut max = f32::NEG_INFINITY;
        let mut maxima = [f32::NEG_INFINITY; 16];
        let (chunks, rest) = self.logits.as_chunks_mut::<16>();
        for chunk in chunks.iter_mut() {
            for i in 0..16 {
                chunk[i] /= self.temperature;
                maxima[i] = if chunk[i] > maxima[i] { chunk[i] } else { maxima[i] };
            }
        }
        for value in rest.iter_mut() {
            *value /= self.temperature;
            max = max.max(*value);
        }
        max = max.max(max_lanes(maxima));
        let mut lanes = [0.0_f32; 16];
        for chunk in chunks.iter() {
            for i in 0..16 {
                lanes[i] += exp(chunk[i] - max);
            }
        }
        let mut sum = sum_lanes(lanes);
        for value in rest.iter() {
            sum += exp(*value - max);
        }
        (max, max + sum.ln())
    }
}

/// Turns logits (already divided by the temperature) into probabilities in place, given the log normaliser, and returns
/// the entropy in nats.
pub(crate) fn probabilities(scaled: &mut [f32], log_normaliser: f32) -> f32 {
    dispatch(Probabilities { scaled, log_normaliser })
}

struct Probabilities<'a> {
    scaled: &'a mut [f32],
    log_normaliser: f32,
}

impl WithSimd for Probabilities<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f32 {
        let mut lanes = [0.0_f32; 16];
        let (chunks, rest) = self.scaled.as_chunks_mut::<16>();
        for chunk in chunks.iter_mut() {
            for i in 0..16 {
                let log_probability = chunk[i] - self.log_normaliser;
                let probability = exp(log_probability);
                lanes[i] -= probability * log_probability;
                chunk[i] = probability;
            }
        }
        let mut entropy = sum_lanes(lanes);
        for value in rest.iter_mut() {
            let log_probability = *value - self.log_normaliser;
            *value = exp(log_probability);
            // A probability of 0 has a log-probability of minus infinity; their product counts 0.
            if *value > 0.0 {
                entropy -= *value * log_probability;
            }
        }
        entropy
    }
}

/// Numbers from -1 to 1 for the tests of kernels.
#[cfg(test)]
pub(crate) fn draws(len: usize, seed: u64) -> Vec<f32> {
    let mut generator = fulgurite_core::seed::Generator::new(fulgurite_core::seed::Seed::new(seed));
    (0..len).map(|_| generator.below(2_001) as f32 / 1_000.0 - 1.0).collect()
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "bits are what is tested")]
mod tests {
    use super::*;

    #[test]
    fn multiplication_is_right_and_its_bits_do_not_depend_on_the_batch() {
        for (rows, k, n) in [(1, 5, 3), (19, 128, 352), (8, 352, 128), (13, 64, 33)] {
            let (x, w) = (draws(rows * k, 1), draws(k * n, 2));
            let half = n / 2;
            let left: Vec<f32> = w.chunks_exact(n).flat_map(|row| row[..half].to_vec()).collect();
            let right: Vec<f32> = w.chunks_exact(n).flat_map(|row| row[half..].to_vec()).collect();
            let packed = Packed::new(k, &[(&left, half), (&right, n - half)]);
            let mut y = vec![0.0; rows * n];
            multiply::<false>(&x, &packed, &mut y);
            for row in 0..rows {
                let mut alone = vec![0.0; n];
                multiply::<false>(&x[row * k..(row + 1) * k], &packed, &mut alone);
                assert_eq!(alone, y[row * n..(row + 1) * n], "{rows} rows of {k} x {n}");
                for column in 0..n {
                    // The promised order: one chain of fused multiply-adds.
                    let chain = (0..k).fold(0.0_f32, |sum, i| x[row * k + i].mul_add(w[i * n + column], sum));
                    assert_eq!(chain.to_bits(), y[row * n + column].to_bits());
                }
            }
            let before = y.clone();
            multiply::<true>(&x, &packed, &mut y);
            assert!(y.iter().zip(&before).all(|(twice, once)| *twice == once + once));
        }
    }

    #[test]
    fn exp_is_accurate() {
        for step in -8_700..=8_800 {
            let x = step as f32 / 100.0;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) - want).abs() <= want * 2.5e-7, "{x}");
        }
        assert_eq!((exp(f32::NEG_INFINITY), exp(-100.0), exp(0.0)), (0.0, 0.0, 1.0));
    }

    #[test]
    fn normaliser_entropy_and_norm() {
        let logits = draws(77, 6);
        let mut scaled = logits.clone();
        let (max, normaliser) = log_normaliser(&mut scaled, 0.5);
        let want = logits.iter().map(|l| (f64::from(*l) / 0.5).exp()).sum::<f64>().ln();
        assert!((f64::from(normaliser) - want).abs() < 1e-6);
        assert_eq!(max, scaled.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let entropy = probabilities(&mut scaled, normaliser);
        let want: f64 = scaled.iter().map(|p| -f64::from(*p) * f64::from(*p).ln()).sum();
        assert!((f64::from(entropy) - want).abs() < 1e-5);

        for width in [32, 8, 41] {
            let (x, weight) = (draws(2 * width, 7), draws(width, 8));
            let mut out = vec![0.0; 2 * width];
            rms_norm(&x, &weight, 1e-5, &mut out);
            for row in 0..2 {
                let mean = x[row * width..][..width].iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
                for i in 0..width {
                    let want = f64::from(x[row * width + i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                    assert!((f64::from(out[row * width + i]) - want).abs() < 1e-6);
                }
            }
            // The same norm in place, of the heads in the middle of a wider row.
            let mut wide = [&[9.0], &x[..], &[9.0]].concat();
            head_norm(&mut wide, 2 * width + 2, 1..2 * width + 1, &weight, 1e-5);
            assert_eq!(wide, [&[9.0], &out[..], &[9.0]].concat());
        }
    }
}
