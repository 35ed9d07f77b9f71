//! The critic's loss (PPO, arXiv 1707.06347, with the clipped form that verl and TRL use).

use crate::finite;

/// What the values of one batch cost.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ValueLoss {
    /// `½ · mean max((V − Ret)², (clip(V, V_old ± ε) − Ret)²)`; 0 of nothing.
    pub loss: f64,
    /// d loss / d V, one per value.
    pub derivatives: Vec<f64>,
    /// Share of the values at which the clipped term was the larger one: they have no derivative.
    pub clip_fraction: f64,
}

/// The loss of `values` against `returns`, where `old` are the values at which the returns were estimated. `clip` is ε in
/// units of the reward; without it the loss is half the mean square. The lists are as long as each other; where one of the
/// three is not finite or missing, the place counts in no mean and has derivative 0.
#[must_use]
pub fn loss(values: &[f64], old: &[f64], returns: &[f64], clip: Option<f64>) -> ValueLoss {
    let at = |list: &[f64], place: usize| list.get(place).copied().filter(|number| number.is_finite());
    let terms: Vec<Option<(f64, f64, bool)>> = (0..values.len())
        .map(|place| Some(term(at(values, place)?, at(old, place)?, at(returns, place)?, clip)))
        .collect();
    let count = terms.iter().flatten().count() as f64;
    let share = |value: f64| if count > 0.0 { finite(value / count) } else { 0.0 };
    ValueLoss {
        loss: share(terms.iter().flatten().map(|(square, ..)| 0.5 * square).sum()),
        derivatives: terms.iter().map(|term| term.map_or(0.0, |(_, slope, _)| share(slope))).collect(),
        clip_fraction: share(terms.iter().flatten().filter(|(.., clipped)| *clipped).count() as f64),
    }
}

/// The larger square, half its derivative, and whether it is the clipped one.
fn term(value: f64, old: f64, target: f64, clip: Option<f64>) -> (f64, f64, bool) {
    let plain = (value - target).powi(2);
    if let Some(clip) = clip {
        let kept = value.clamp(old - clip.abs(), old + clip.abs());
        let clipped = (kept - target).powi(2);
        // Inside the bounds both are the same.
        if clipped > plain {
            return (clipped, 0.0, true);
        }
    }
    (plain, value - target, false)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::near;

    #[test]
    fn golden_vector_34_clipped() {
        let found = loss(&[0.5], &[0.0], &[1.0], Some(0.2));
        near(&[found.loss, found.clip_fraction], &[0.32, 1.0], 1e-12);
        near(&found.derivatives, &[0.0], 0.0);
        near(&[loss(&[0.5], &[0.0], &[1.0], None).loss], &[0.125], 1e-12);
        // Beyond the return the plain term is the larger one, and pulls back.
        let beyond = loss(&[1.5], &[1.0], &[1.0], Some(0.2));
        near(&[beyond.loss, beyond.derivatives[0]], &[0.125, 0.5], 1e-12);
    }

    #[test]
    fn what_is_not_finite_counts_in_no_mean() {
        assert_eq!(loss(&[], &[], &[], Some(0.2)), ValueLoss::default());
        let found = loss(&[1.0, f64::NAN, 3.0, 9.0], &[1.0, 0.0, 3.0], &[0.0, 0.0, 0.0], None);
        near(&found.derivatives, &[0.5, 0.0, 1.5, 0.0], 1e-12);
        near(&[found.loss], &[2.5], 1e-12);
    }

    proptest! {
        /// The derivative is the slope of the loss, away from the corners.
        #[test]
        fn derivatives_are_slopes(
            places in prop::collection::vec((-2.0..2.0_f64, -2.0..2.0_f64, -2.0..2.0_f64), 1..6),
        ) {
            let step = 1e-6;
            let smooth = |(value, old, target): &(f64, f64, f64)| {
                let kept = value.clamp(old - 0.3, old + 0.3);
                ((value - old).abs() - 0.3).abs() > 1e-3 && ((value - target).abs() - (kept - target).abs()).abs() > 1e-3
                    || (value - old).abs() < 0.29
            };
            prop_assume!(places.iter().all(smooth));
            let values: Vec<f64> = places.iter().map(|place| place.0).collect();
            let old: Vec<f64> = places.iter().map(|place| place.1).collect();
            let returns: Vec<f64> = places.iter().map(|place| place.2).collect();
            let found = loss(&values, &old, &returns, Some(0.3));
            for place in 0..values.len() {
                let at = |shift: f64| {
                    let mut moved = values.clone();
                    moved[place] += shift;
                    loss(&moved, &old, &returns, Some(0.3)).loss
                };
                let slope = (at(step) - at(-step)) / (2.0 * step);
                prop_assert!((slope - found.derivatives[place]).abs() < 1e-5, "{slope} {:?}", found.derivatives);
            }
        }
    }
}
