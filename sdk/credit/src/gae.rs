//! Generalised advantage estimation (arXiv 1506.02438) over a rollout's sampled tokens in order, over all of its calls: the
//! multi-turn form, in which what stands between two calls neither receives nor discounts credit. [`crate::rows`] has the
//! same over rows with context, and the plain form that others use.

use crate::finite;

/// What was found of one rollout: a number per sampled token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Estimate {
    /// `Â_t`, before any whitening.
    pub advantages: Vec<f64>,
    /// `Â_t + V_t`: what the critic learns.
    pub returns: Vec<f64>,
}

/// `δ_t = r_t + γ·V_{t+1} − V_t`, `Â_t = δ_t + γλ·Â_{t+1}`. `values` are the critic's before each token, as many as `rewards`
/// (a missing one counts as 0). `bootstrap` is the value after the last token: 0 where the rollout has ended by itself, the
/// critic's where it was cut off.
#[must_use]
pub fn estimate(rewards: &[f64], values: &[f64], discount: f64, lambda: f64, bootstrap: f64) -> Estimate {
    let (mut next_value, mut next_advantage) = (finite(bootstrap), 0.0);
    let mut advantages = vec![];
    let value_at = |place: usize| finite(values.get(place).copied().unwrap_or(0.0));
    for (place, reward) in rewards.iter().enumerate().rev() {
        let value = value_at(place);
        let delta = finite(*reward) + discount * next_value - value;
        next_advantage = finite(delta + discount * lambda * next_advantage);
        next_value = value;
        advantages.push(next_advantage);
    }
    advantages.reverse();
    let returns = advantages.iter().enumerate().map(|(place, advantage)| finite(advantage + value_at(place))).collect();
    Estimate { advantages, returns }
}

/// VAPO's λ for a rollout of so many tokens, `1 − 1/(α·length)`, kept in 0 to 1 (arXiv 2504.05118).
#[must_use]
pub fn adaptive_lambda(tokens: usize, alpha: f64) -> f64 {
    let lambda = 1.0 - 1.0 / (alpha * tokens as f64);
    if lambda.is_finite() { lambda.clamp(0.0, 1.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::near;
    use crate::returns::discounted;
    use crate::statistics::whiten;

    #[test]
    fn golden_vector_10_without_discount() {
        let found = estimate(&[1.0, 2.0, 3.0], &[0.5, 1.0, 1.5], 1.0, 1.0, 0.0);
        near(&found.advantages, &[5.5, 4.0, 1.5], 0.0);
        near(&found.returns, &[6.0, 5.0, 3.0], 0.0);
        near(&whiten(&found.advantages), &[0.9073, 0.1650, -1.0722], 1e-4);
    }

    #[test]
    fn by_hand() {
        // γ .5, λ .5: δ = (1 + .5 − .5, 2 − 1) = (1, 1); Â = (1 + .25·1, 1).
        let found = estimate(&[1.0, 2.0], &[0.5, 1.0], 0.5, 0.5, 0.0);
        near(&found.advantages, &[1.25, 1.0], 1e-12);
        near(&found.returns, &[1.75, 2.0], 1e-12);
        // Cut off where the critic expects 4 more: δ of the last is 2 + .5·4 − 1.
        near(&estimate(&[1.0, 2.0], &[0.5, 1.0], 0.5, 0.5, 4.0).advantages, &[1.75, 3.0], 1e-12);
        near(&[adaptive_lambda(100, 0.05), adaptive_lambda(0, 1.0), adaptive_lambda(1, 0.5)], &[0.8, 0.0, 0.0], 1e-12);
    }

    #[test]
    fn nothing_makes_no_nan() {
        assert_eq!(estimate(&[], &[], 1.0, 1.0, 0.0), Estimate::default());
        let broken = estimate(&[f64::NAN, 1.0], &[f64::INFINITY], 1.0, 1.0, f64::NAN);
        assert!(broken.advantages.iter().chain(&broken.returns).all(|value| value.is_finite()));
    }

    proptest! {
        /// With λ = 1 the returns do not depend on the critic at all.
        #[test]
        fn lambda_1_is_the_discounted_return(
            steps in prop::collection::vec((-5.0..5.0_f64, -5.0..5.0_f64), 1..20),
            discount in 0.5..1.0_f64,
        ) {
            let (rewards, values): (Vec<f64>, Vec<f64>) = steps.into_iter().unzip();
            near(&estimate(&rewards, &values, discount, 1.0, 0.0).returns, &discounted(&rewards, discount), 1e-9);
        }

        /// A critic that is right leaves nothing to learn.
        #[test]
        fn a_perfect_critic_has_no_advantage(
            rewards in prop::collection::vec(-5.0..5.0_f64, 1..20),
            lambda in 0.0..1.0_f64,
        ) {
            let values = discounted(&rewards, 0.9);
            let found = estimate(&rewards, &values, 0.9, lambda, 0.0);
            prop_assert!(found.advantages.iter().all(|advantage| advantage.abs() < 1e-9));
        }
    }
}
