//! Single-threaded f32 kernels of the backward pass. Like those of the forward pass they add in an order that is a function
//! of sizes alone.

#![expect(
    clippy::indexing_slicing,
    reason = "sizes are checked at each kernel's entry; the inner loops must not branch"
)]
#![expect(
    clippy::inline_always,
    reason = "code is compiled for wide vectors only where it is inlined into the dispatch"
)]

use pulp::{Simd, WithSimd};

use crate::kernel::{Packed, dispatch, exp, panels, sum_lanes};

/// `out += xᵀ · dy`: the gradient of a weight. `x` is `[tokens, k]`, `dy` is packed `[tokens, n]`, `out` is `[k, n]`.
pub(crate) fn add_outer(x: &[f32], k: usize, dy: &Packed, out: &mut [f32]) {
    assert!(k > 0 && x.len() == dy.k * k && out.len() == k * dy.n);
    if dy.k > 0 && dy.n > 0 {
        dispatch(AddOuter { x, k, dy, out });
    }
}

struct AddOuter<'a> {
    x: &'a [f32],
    k: usize,
    dy: &'a Packed,
    out: &'a mut [f32],
}

impl WithSimd for AddOuter<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match S::F32_LANES {
            16 => self.blocks::<S, 2, 8>(simd),
            8 => self.blocks::<S, 4, 2>(simd),
            4 => self.blocks::<S, 8, 2>(simd),
            _ => self.blocks::<S, 32, 1>(simd),
        }
    }
}

impl AddOuter<'_> {
    /// Columns of `x` in blocks of `R`, each a tile of the transposed product.
    #[inline(always)]
    fn blocks<S: Simd, const V: usize, const R: usize>(self, simd: S) {
        let Self { x, k, dy, out } = self;
        let n = dy.n;
        let mut tile = vec![[0.0_f32; R]; dy.k];
        let whole = k / R * R;
        for first in (0..whole).step_by(R) {
            for (slot, row) in tile.iter_mut().zip(x.chunks_exact(k)) {
                slot.copy_from_slice(&row[first..first + R]);
            }
            panels::<S, true, V, R>(simd, &tile, dy, &mut out[first * n..(first + R) * n]);
        }
        let mut tile = vec![[0.0_f32; 1]; dy.k];
        for column in whole..k {
            for (slot, row) in tile.iter_mut().zip(x.chunks_exact(k)) {
                slot[0] = row[column];
            }
            panels::<S, true, V, 1>(simd, &tile, dy, &mut out[column * n..(column + 1) * n]);
        }
    }
}

/// Backward of `x / rms(x) * weight`: adds to `dx` and `d_weight`.
pub(crate) struct RmsNormBackward<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) epsilon: f32,
    pub(crate) dy: &'a [f32],
    pub(crate) dx: &'a mut [f32],
    pub(crate) d_weight: &'a mut [f32],
}

impl RmsNormBackward<'_> {
    /// Computes it.
    pub(crate) fn run(self) {
        let width = self.weight.len();
        assert!(width > 0 && self.d_weight.len() == width);
        assert!(self.x.len() == self.dy.len() && self.x.len() == self.dx.len());
        dispatch(self);
    }
}

impl WithSimd for RmsNormBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.weight.len();
        let rows = self.x.chunks_exact(width).zip(self.dy.chunks_exact(width)).zip(self.dx.chunks_exact_mut(width));
        for ((x, dy), dx) in rows {
            let (mut squares, mut products) = ([0.0_f32; 16], [0.0_f32; 16]);
            let ((xs, x_rest), (dys, dy_rest)) = (x.as_chunks::<16>(), dy.as_chunks::<16>());
            let (weights, weight_rest) = self.weight.as_chunks::<16>();
            for ((x, dy), weight) in xs.iter().zip(dys).zip(weights) {
                for i in 0..16 {
                    squares[i] = x[i].mul_add(x[i], squares[i]);
                    products[i] = (dy[i] * weight[i]).mul_add(x[i], products[i]);
                }
            }
            for (i, x) in x_rest.iter().enumerate() {
                squares[i] = x.mul_add(*x, squares[i]);
                products[i] = (dy_rest[i] * weight_rest[i]).mul_add(*x, products[i]);
            }
            let scale = 1.0 / (sum_lanes(squares) / width as f32 + self.epsilon).sqrt();
            let back = sum_lanes(products) * scale * scale * scale / width as f32;
            for i in 0..width {
                dx[i] += dy[i] * self.weight[i] * scale - x[i] * back;
                self.d_weight[i] += dy[i] * x[i] * scale;
            }
        }
    }
}

/// Backward of `gate * sigmoid(gate) * up`; rows of `gate_up` and `out` are `[gate | up]` of `2 * width`.
pub(crate) fn silu_gate_backward(gate_up: &[f32], width: usize, dy: &[f32], out: &mut [f32]) {
    assert!(width > 0 && gate_up.len() == out.len() && out.len() == 2 * dy.len() && dy.len().is_multiple_of(width));
    dispatch(SiluGateBackward { gate_up, width, dy, out });
}

struct SiluGateBackward<'a> {
    gate_up: &'a [f32],
    width: usize,
    dy: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for SiluGateBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.width;
        let rows = self.gate_up.chunks_exact(2 * width).zip(self.dy.chunks_exact(width));
        for ((gate_up, dy), out) in rows.zip(self.out.chunks_exact_mut(2 * width)) {
            let (gate, up) = gate_up.split_at(width);
            let (d_gate, d_up) = out.split_at_mut(width);
            // By chunks: the compiler does not vectorise a chain of five iterators.
            let (chunks, gate_rest) = gate.as_chunks::<16>();
            let ((ups, up_rest), (dys, dy_rest)) = (up.as_chunks::<16>(), dy.as_chunks::<16>());
            let (d_gates, d_gate_rest) = d_gate.as_chunks_mut::<16>();
            let (d_ups, d_up_rest) = d_up.as_chunks_mut::<16>();
            let chunks = chunks.iter().zip(ups).zip(dys).zip(d_gates.iter_mut().zip(d_ups));
            for (((gate, up), dy), (d_gate, d_up)) in chunks {
                for i in 0..16 {
                    (d_gate[i], d_up[i]) = silu_gate_derivatives(gate[i], up[i], dy[i]);
                }
            }
            for (i, gate) in gate_rest.iter().enumerate() {
                (d_gate_rest[i], d_up_rest[i]) = silu_gate_derivatives(*gate, up_rest[i], dy_rest[i]);
            }
        }
    }
}

/// Gradients of gate and up.
#[inline(always)]
fn silu_gate_derivatives(gate: f32, up: f32, dy: f32) -> (f32, f32) {
    let sigmoid = 1.0 / (1.0 + exp(-gate));
    (dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), dy * gate * sigmoid)
}

/// Adds the sum of rows to `out`: the gradient of a bias. Rows are `width` wide, and `out` stands for their columns from
/// `first` on.
pub(crate) fn add_rows(dy: &[f32], width: usize, first: usize, out: &mut [f32]) {
    assert!(dy.len().is_multiple_of(width) && first + out.len() <= width);
    for row in dy.chunks_exact(width) {
        for (slot, value) in out.iter_mut().zip(&row[first..]) {
            *slot += value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::draws;

    #[test]
    fn the_outer_product_is_right_for_every_remainder() {
        for (tokens, k, n) in [(1, 3, 5), (17, 19, 33), (40, 16, 64)] {
            let (x, dy) = (draws(tokens * k, 1), draws(tokens * (n + 3), 2));
            let mut packed = Packed::default();
            packed.repack(&draws(7 * 9, 3), 9, 0, 9);
            packed.repack(&dy, n + 3, 2, n);
            let mut out = vec![1.0; k * n];
            add_outer(&x, k, &packed, &mut out);
            for row in 0..k {
                for column in 0..n {
                    let sum: f64 =
                        (0..tokens).map(|t| f64::from(x[t * k + row]) * f64::from(dy[t * (n + 3) + 2 + column])).sum();
                    assert!((f64::from(out[row * n + column]) - 1.0 - sum).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn silu_and_norm_have_the_slopes_of_their_forwards() {
        let width = 37;
        let (gate_up, dy) = (draws(2 * width, 4), draws(width, 5));
        let mut out = vec![0.0; 2 * width];
        silu_gate_backward(&gate_up, width, &dy, &mut out);
        let value = |gate: f64, up: f64| gate / (1.0 + (-gate).exp()) * up;
        for i in 0..width {
            let (gate, up, dy) = (f64::from(gate_up[i]), f64::from(gate_up[width + i]), f64::from(dy[i]));
            let slope = (value(gate + 1e-6, up) - value(gate - 1e-6, up)) / 2e-6 * dy;
            assert!((f64::from(out[i]) - slope).abs() < 1e-5);
            assert!((f64::from(out[width + i]) - value(gate, 1.0) * dy).abs() < 1e-5);
        }

        let (x, weight, dy) = (draws(32, 6), draws(32, 7), draws(32, 8));
        let (mut dx, mut d_weight) = (vec![0.5; 32], vec![0.25; 32]);
        let epsilon = 1e-5;
        RmsNormBackward { x: &x, weight: &weight, epsilon, dy: &dy, dx: &mut dx, d_weight: &mut d_weight }.run();
        let loss = |x: &[f64], weight: &[f64]| -> f64 {
            let rms = (x.iter().map(|v| v * v).sum::<f64>() / 32.0 + 1e-5).sqrt();
            (0..32).map(|i| x[i] / rms * weight[i] * f64::from(dy[i])).sum()
        };
        let (x, weight): (Vec<f64>, Vec<f64>) =
            (x.iter().map(|v| f64::from(*v)).collect(), weight.iter().map(|v| f64::from(*v)).collect());
        for i in 0..32 {
            let moved = |values: &[f64], by: f64| {
                let mut moved = values.to_vec();
                moved[i] += by;
                moved
            };
            let slope = (loss(&moved(&x, 1e-6), &weight) - loss(&moved(&x, -1e-6), &weight)) / 2e-6;
            assert!((f64::from(dx[i]) - 0.5 - slope).abs() < 1e-4);
            let slope = (loss(&x, &moved(&weight, 1e-6)) - loss(&x, &moved(&weight, -1e-6))) / 2e-6;
            assert!((f64::from(d_weight[i]) - 0.25 - slope).abs() < 1e-4);
        }
    }
}
