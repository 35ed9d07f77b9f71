//! Means, deviations and whitening. Sums run in the order given, so the same numbers give the same bits.

use std::cmp::Ordering;

/// Added to the variance in [`whiten`]: verl, TRL and SkyRL.
pub const WHITENING_EPSILON: f64 = 1e-8;

/// The mean; 0 of nothing. Of equal numbers it is that number to the last bit, which a sum and a division would miss: a reward
/// that all have in common must differ from its mean by nothing.
#[must_use]
pub fn mean(values: &[f64]) -> f64 {
    match values.first() {
        None => 0.0,
        Some(first) if !has_variance(values) => *first,
        Some(_) => values.iter().sum::<f64>() / values.len() as f64,
    }
}

/// The unbiased variance (n − 1); 0 of fewer than two.
#[must_use]
pub fn variance(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    squares / (values.len() as f64 - 1.0)
}

/// The square root of [`variance`].
#[must_use]
pub fn standard_deviation(values: &[f64]) -> f64 {
    variance(values).sqrt()
}

/// Whether there are two different numbers. Compared exactly: a deviation computed from equal numbers can differ from 0 by
/// rounding, and dividing by it would make up a direction out of nothing.
#[must_use]
pub fn has_variance(values: &[f64]) -> bool {
    values.iter().zip(values.iter().skip(1)).any(|(one, next)| one.partial_cmp(next) != Some(Ordering::Equal))
}

/// `(x − mean) / sqrt(variance + 1e-8)` over the numbers that count (`counts`, as long as `values`); the others are scaled
/// the same way and are for their owner to drop. Numbers that are all equal become 0. (REINFORCE++, arXiv 2501.03262; PPO as
/// in verl, TRL and SkyRL.)
#[must_use]
pub fn whiten_where(values: &[f64], counts: &[bool]) -> Vec<f64> {
    let counted: Vec<f64> =
        values.iter().zip(counts).filter(|(value, counts)| **counts && value.is_finite()).map(|(v, _)| *v).collect();
    if !has_variance(&counted) {
        return vec![0.0; values.len()];
    }
    let (mean, scale) = (mean(&counted), (variance(&counted) + WHITENING_EPSILON).sqrt());
    values.iter().map(|value| crate::finite((value - mean) / scale)).collect()
}

/// [`whiten_where`] over all.
#[must_use]
pub fn whiten(values: &[f64]) -> Vec<f64> {
    whiten_where(values, &vec![true; values.len()])
}

/// [`whiten`] with the biased variance (n), as NeMo-RL has it in its variant of REINFORCE++-baseline.
#[must_use]
pub fn whiten_biased(values: &[f64]) -> Vec<f64> {
    let counted: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    if !has_variance(&counted) {
        return vec![0.0; values.len()];
    }
    let count = counted.len() as f64;
    let (mean, biased) = (mean(&counted), variance(&counted) * (count - 1.0) / count);
    let scale = (biased + WHITENING_EPSILON).sqrt();
    values.iter().map(|value| crate::finite((value - mean) / scale)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::near;

    #[test]
    fn by_hand() {
        near(
            &[mean(&[1.0, 2.0, 6.0]), variance(&[1.0, 2.0, 6.0]), standard_deviation(&[1.0, 3.0])],
            &[3.0, 7.0, 2.0_f64.sqrt()],
            1e-12,
        );
        assert_eq!([mean(&[]), variance(&[]), variance(&[4.0])].map(f64::to_bits), [0; 3]);
        // Unbiased: ±1/sqrt(2); biased: ±1.
        near(&whiten(&[3.0, 5.0]), &[-std::f64::consts::FRAC_1_SQRT_2, std::f64::consts::FRAC_1_SQRT_2], 1e-8);
        near(&whiten_biased(&[3.0, 5.0]), &[-1.0, 1.0], 1e-8);
    }

    #[test]
    fn what_is_all_the_same_has_no_direction() {
        // Summed and divided, 0.7 a hundred and twenty-eight times has a mean that is not 0.7.
        for flat in [0.7, 1.0 / 3.0, 0.1, f64::MAX] {
            assert_eq!(mean(&[flat; 128]).to_bits(), flat.to_bits());
        }
        for flat in [&[][..], &[7.0], &[1.0 / 3.0; 7], &[0.0, -0.0]] {
            assert!(whiten(flat).iter().chain(&whiten_biased(flat)).all(|value| *value == 0.0), "{flat:?}");
        }
        assert!(whiten(&[f64::MAX, f64::MIN, 1.0]).iter().all(|value| value.is_finite()));
        let with_nan = whiten(&[1.0, f64::NAN, 3.0]);
        near(&with_nan, &[-std::f64::consts::FRAC_1_SQRT_2, 0.0, std::f64::consts::FRAC_1_SQRT_2], 1e-8);
    }

    proptest! {
        #[test]
        fn whitened_numbers_have_mean_0_and_variance_1(values in prop::collection::vec(-10.0..10.0_f64, 2..40)) {
            prop_assume!(variance(&values) > 1e-3);
            let white = whiten(&values);
            prop_assert!(mean(&white).abs() < 1e-9 && (variance(&white) - 1.0).abs() < 1e-4);
        }
    }
}
