//! Angles of the rotary embedding.

use crate::shape::ModelShape;

/// Cosines and sines of every position, `[context, head_dim / 2]` each.
#[derive(Debug)]
pub(crate) struct RotaryTable {
    half: usize,
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl RotaryTable {
    /// The table of a shape. Angles are taken in f64: an f32 frequency is off by a milliradian after some ten thousand
    /// positions.
    pub(crate) fn new(shape: &ModelShape) -> Self {
        let half = shape.head_dim / 2;
        let inverses: Vec<f64> = (0..half)
            .map(|i| {
                // Kept as the inverse: a position divided by it is not the position times the rounded frequency.
                let inverse = shape.rope_theta.powf(2.0 * i as f64 / shape.head_dim as f64);
                match shape.rope_scaling {
                    crate::shape::RopeScaling::None => inverse,
                    scaling => 1.0 / scaling.scale(1.0 / inverse),
                }
            })
            .collect();
        let table = |f: fn(f64) -> f64| -> Vec<f32> {
            (0..shape.context_tokens_max)
                .flat_map(|position| inverses.iter().map(move |inverse| position as f64 / inverse))
                .map(|angle| {
                    #[expect(clippy::cast_possible_truncation, reason = "the model computes in f32")]
                    let value = f(angle) as f32;
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
