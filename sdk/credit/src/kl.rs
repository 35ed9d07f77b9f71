//! The KL divergence to a reference, estimated from the log-probs (nats) of the tokens that were drawn (ALGORITHMS.md, 5), and
//! the controller of its coefficient.

use crate::finite;

/// Bound of an estimate by k3: verl and NeMo-RL.
pub const K3_MAX: f64 = 10.0;

/// Which estimate of `KL(π ‖ π_ref)`. With `x = log π_ref − log π`:
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Estimator {
    /// `−x`. The right one in a reward: its mean is the divergence.
    K1,
    /// `½x²`.
    K2,
    /// `e^x − x − 1`.
    K3,
}

impl Estimator {
    /// The estimate of one token; k3 is kept below [`K3_MAX`]. Of log-probs that are not finite it is 0.
    #[must_use]
    pub fn of(self, log_prob: f64, reference: f64) -> f64 {
        let x = finite(reference - log_prob);
        match self {
            Self::K1 => -x,
            Self::K2 => 0.5 * x * x,
            Self::K3 => (x.exp() - x - 1.0).min(K3_MAX),
        }
    }
}

/// What is subtracted from the rewards of a rollout's tokens, in units of the reward: `coefficient` times the estimate.
#[must_use]
pub fn penalties(estimator: Estimator, coefficient: f64, log_probs: &[f32], reference: &[f32]) -> Vec<f64> {
    let of =
        |(log_prob, reference): (&f32, &f32)| coefficient * estimator.of(f64::from(*log_prob), f64::from(*reference));
    log_probs.iter().zip(reference).map(of).collect()
}

/// Keeps the divergence near a target by its coefficient (arXiv 1909.08593):
/// `β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adaptive {
    /// The divergence aimed at: nats, in whatever unit (per token or per rollout) `kl` is told in.
    pub target: f64,
    /// Rollouts over which the coefficient may change by a fifth. 10,000 in the paper.
    pub horizon: f64,
}

impl Adaptive {
    /// The coefficient after `rollouts` more, whose divergence was `kl`. One that is not finite changes nothing.
    #[must_use]
    pub fn next(&self, coefficient: f64, kl: f64, rollouts: usize) -> f64 {
        let off = (kl / self.target - 1.0).clamp(-0.2, 0.2);
        let next = coefficient * (1.0 + off * rollouts as f64 / self.horizon);
        if next.is_finite() { next.max(0.0) } else { coefficient }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::near;

    #[test]
    fn golden_vector_29_estimates() {
        let at = |estimator: Estimator| [-0.0, -15.0, -30.0].map(|reference| estimator.of(-1.0, reference));
        near(&at(Estimator::K1), &[-1.0, 14.0, 29.0], 1e-12);
        near(&at(Estimator::K2), &[0.5, 98.0, 420.5], 1e-12);
        near(&at(Estimator::K3), &[0.718_282, 10.0, 10.0], 1e-6);
    }

    #[test]
    fn nothing_makes_no_nan() {
        for estimator in [Estimator::K1, Estimator::K2, Estimator::K3] {
            for pair in [(f64::NEG_INFINITY, -1.0), (f64::NEG_INFINITY, f64::NEG_INFINITY), (f64::NAN, 0.0)] {
                assert!(estimator.of(pair.0, pair.1).is_finite(), "{estimator:?} {pair:?}");
            }
        }
        let adaptive = Adaptive { target: 0.0, horizon: 10.0 };
        near(&[adaptive.next(0.1, 0.0, 1)], &[0.1], 0.0);
    }

    #[test]
    fn penalties_are_per_token() {
        near(&penalties(Estimator::K1, 0.5, &[-1.0, -2.0], &[-2.0, -2.0]), &[0.5, 0.0], 1e-12);
        assert!(penalties(Estimator::K1, 0.5, &[-1.0], &[]).is_empty());
    }

    #[test]
    fn the_coefficient_follows_the_divergence_and_never_jumps() {
        let adaptive = Adaptive { target: 0.1, horizon: 1_000.0 };
        near(
            &[adaptive.next(0.2, 0.11, 100), adaptive.next(0.2, 9.0, 100), adaptive.next(0.2, 0.0, 100)],
            &[0.202, 0.204, 0.196],
            1e-12,
        );
        near(&[adaptive.next(0.2, f64::NAN, 100), adaptive.next(0.2, 0.0, 1_000_000)], &[0.2, 0.0], 1e-12);
    }
}
