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
    /// positions. A model that was trained with rounded angles (`rope_f32`) gets the rounded ones: they are what its weights
    /// know, and exact ones move its logits by 1e-4 after some two thousand positions.
    pub(crate) fn new(shape: &ModelShape) -> Self {
        if shape.rope_f32 { Self::rounded(shape) } else { Self::exact(shape) }
    }

    /// Frequencies and angles in f32, each operation rounded as torch does it.
    #[expect(clippy::cast_possible_truncation, reason = "that is the rounding meant")]
    fn rounded(shape: &ModelShape) -> Self {
        let half = shape.head_dim / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| {
                let exponent = (2 * i) as f32 / shape.head_dim as f32;
                // The power in f64, rounded once: torch's own is within an ulp of it, the system's `powf` is anyone's guess.
                let power = f64::from(shape.rope_theta as f32).powf(f64::from(exponent)) as f32;
                shape.rope_scaling.scale_f32(1.0 / power)
            })
            .collect();
        let table = |f: fn(f64) -> f64| -> Vec<f32> {
            (0..shape.context_tokens_max)
                .flat_map(|position| frequencies.iter().map(move |frequency| position as f32 * frequency))
                .map(|angle| f(f64::from(angle)) as f32)
                .collect()
        };
        Self { half, cosines: table(f64::cos), sines: table(f64::sin) }
    }

    fn exact(shape: &ModelShape) -> Self {
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde::Deserialize;

    use super::*;
    use crate::config::PolicyConfig;
    use crate::shape::RopeScaling;

    /// What torch computed; see `tests/parity/make_rotary.py`.
    #[derive(Deserialize)]
    struct Case {
        head_dim: usize,
        rope_theta: f64,
        rope_scaling: RopeScaling,
        positions: Vec<usize>,
        /// `[positions, head_dim / 2]`.
        cosines: Vec<Vec<f32>>,
        sines: Vec<Vec<f32>>,
    }

    fn furthest(table: &RotaryTable, case: &Case) -> f32 {
        let rows = case.positions.iter().zip(case.cosines.iter().zip(&case.sines));
        let gaps = rows.flat_map(|(position, (cosines, sines))| {
            let (mine_cosines, mine_sines) = table.at(*position);
            assert_eq!((mine_cosines.len(), mine_sines.len()), (cosines.len(), sines.len()));
            let pairs = mine_cosines.iter().zip(cosines).chain(mine_sines.iter().zip(sines));
            pairs.map(|(mine, torch)| (mine - torch).abs()).collect::<Vec<_>>()
        });
        gaps.fold(0.0, f32::max)
    }

    #[test]
    fn rounded_angles_are_those_of_transformers() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/rotary.json");
        let cases: Vec<Case> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert!(cases.len() >= 4);
        for case in cases {
            let shape = ModelShape {
                head_dim: case.head_dim,
                rope_theta: case.rope_theta,
                rope_scaling: case.rope_scaling,
                rope_f32: true,
                context_tokens_max: case.positions.iter().max().unwrap() + 1,
                ..PolicyConfig::default().shape(300).unwrap()
            };
            let rounded = furthest(&RotaryTable::new(&shape), &case);
            let exact = furthest(&RotaryTable::new(&ModelShape { rope_f32: false, ..shape }), &case);
            assert!(rounded < 2e-7, "{:?}: {rounded}", case.rope_scaling);
            assert!(exact > 1e-4, "the positions are too near to tell: {exact}");
        }
    }
}
