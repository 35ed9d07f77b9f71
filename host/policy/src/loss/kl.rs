//! Estimators of the KL to the reference, of one token (ALGORITHMS.md section 5).

use fulgurite_core::training::KlEstimator;

use super::ratio::{Ratio, bounded, bounded_exp, difference};

/// Bound of the k3 estimators' value (verl and NeMo-RL have the same).
const K3_MAX: f64 = 10.0;

/// An estimate and its derivative with respect to `log_prob`; `ratio` is the token's own. Both are finite, also where either
/// policy thinks the token impossible.
pub(super) fn kl(estimator: KlEstimator, log_prob: f64, reference: f64, ratio: &Ratio) -> (f64, f64) {
    let (x, is_held) = difference(reference, log_prob);
    let (exp, exp_bounded) = bounded_exp(reference - log_prob);
    let k3 = exp - bounded(x) - 1.0;
    let d_k3 = if exp_bounded { 0.0 } else { 1.0 - exp };
    match estimator {
        KlEstimator::K1 => (-x, if is_held { 0.0 } else { 1.0 }),
        KlEstimator::K2 => (0.5 * x * x, if is_held { 0.0 } else { -x }),
        KlEstimator::K3 if k3 > K3_MAX => (K3_MAX, 0.0),
        KlEstimator::K3 => (k3, d_k3),
        KlEstimator::UnbiasedK3 => {
            let value = ratio.value * k3;
            // The ratio's own derivative goes when the input was bounded, the whole derivative when the output is.
            if value > K3_MAX {
                (K3_MAX, 0.0)
            } else if exp_bounded {
                (value, 0.0)
            } else {
                (value, ratio.slope * k3 + ratio.value * d_k3)
            }
        }
    }
}
