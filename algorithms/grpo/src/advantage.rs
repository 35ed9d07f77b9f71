//! Group-relative advantages. Pure: the same rewards, the same numbers.
//!
//! Statistics are over **rollouts**, never over calls or tokens: a rollout that asks the model more often does not count
//! more (ALGORITHMS.md, rule 3 of section 1).

use std::cmp::Ordering;

/// How a group's rewards become advantages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimator {
    /// Added to the standard deviation.
    pub epsilon: f64,
    /// Whether to divide by the standard deviation (GRPO) or not (Dr.GRPO).
    pub normalise_by_std: bool,
}

impl Estimator {
    /// Advantages of one group: `(R − mean) / (std + ε)` with the unbiased standard deviation (n − 1). A reward that is
    /// missing or not finite is left out of mean and deviation, and its advantage is missing too. A group with fewer than
    /// two rewards, or with equal ones, teaches nothing: its advantages are 0.
    #[must_use]
    pub fn advantages(&self, rewards: &[Option<f64>]) -> Vec<Option<f64>> {
        let scored: Vec<f64> = rewards.iter().flatten().copied().filter(|reward| reward.is_finite()).collect();
        let teaches = has_variance(&scored);
        let mean = mean(&scored);
        let deviation = if self.normalise_by_std { standard_deviation(&scored, mean) + self.epsilon } else { 1.0 };
        let advantage = |reward: f64| {
            if !teaches {
                return 0.0;
            }
            let advantage = (reward - mean) / deviation;
            // Rewards near the end of the range of f64 can overflow on the way; they must not poison the weights.
            if advantage.is_finite() { advantage } else { 0.0 }
        };
        rewards.iter().map(|reward| reward.filter(|reward| reward.is_finite()).map(advantage)).collect()
    }
}

/// Whether there are two different rewards. Compared exactly: a deviation computed from equal rewards can differ from 0 by
/// rounding, and dividing by it would make up advantages out of nothing.
#[must_use]
pub fn has_variance(rewards: &[f64]) -> bool {
    rewards.iter().zip(rewards.iter().skip(1)).any(|(one, next)| one.partial_cmp(next) != Some(Ordering::Equal))
}

/// The mean; 0 of nothing.
#[must_use]
pub fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

fn standard_deviation(values: &[f64], mean: f64) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (values.len() as f64 - 1.0)).sqrt()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GRPO: Estimator = Estimator { epsilon: 1e-4, normalise_by_std: true };
    const DR_GRPO: Estimator = Estimator { epsilon: 1e-4, normalise_by_std: false };

    fn of(estimator: Estimator, rewards: &[f64]) -> Vec<f64> {
        let rewards: Vec<_> = rewards.iter().copied().map(Some).collect();
        estimator.advantages(&rewards).into_iter().map(Option::unwrap).collect()
    }

    #[track_caller]
    fn check(found: &[f64], expected: &[f64], tolerance: f64) {
        assert_eq!(found.len(), expected.len());
        let near = found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() <= tolerance);
        assert!(near, "{found:?} is not {expected:?}");
    }

    #[test]
    fn golden_vector_1_grpo() {
        let signs = [1.0, -1.0, -1.0, 1.0];
        let epsilon_6 = Estimator { epsilon: 1e-6, ..GRPO };
        check(&of(epsilon_6, &[1.0, 0.0, 0.0, 1.0]), &signs.map(|sign| sign * 0.866_024), 1e-6);
        check(&of(GRPO, &[1.0, 0.0, 0.0, 1.0]), &signs.map(|sign| sign * 0.865_875), 1e-6);
    }

    #[test]
    fn golden_vector_2_without_standard_deviation() {
        check(&of(DR_GRPO, &[6.0, 3.0]), &[1.5, -1.5], 0.0);
        check(&of(DR_GRPO, &[9.0, 12.0]), &[-1.5, 1.5], 0.0);
    }

    #[test]
    fn groups_that_teach_nothing() {
        check(&of(GRPO, &[]), &[], 0.0);
        check(&of(GRPO, &[0.7]), &[0.0], 0.0);
        // Thirds sum up with rounding: their computed deviation is not 0.
        check(&of(GRPO, &[1.0 / 3.0; 7]), &[0.0; 7], 0.0);
        check(&of(DR_GRPO, &[0.1; 6]), &[0.0; 6], 0.0);
        check(&of(GRPO, &[0.0, -0.0]), &[0.0; 2], 0.0);
    }

    #[test]
    fn faults_are_in_no_statistic_and_have_no_advantage() {
        let with_faults = [Some(1.0), None, Some(0.0), Some(f64::NAN), Some(0.0), None, Some(1.0), Some(f64::INFINITY)];
        let found = GRPO.advantages(&with_faults);
        let scored: Vec<f64> = found.iter().flatten().copied().collect();
        check(&scored, &of(GRPO, &[1.0, 0.0, 0.0, 1.0]), 0.0);
        assert_eq!(
            found.iter().map(Option::is_some).collect::<Vec<_>>(),
            [true, false, true, false, true, false, true, false]
        );
        // One reward is left: nothing to compare it with.
        assert_eq!(GRPO.advantages(&[None, Some(1.0), None]), [None, Some(0.0), None]);
    }

    #[test]
    fn enormous_rewards_do_not_make_nan() {
        assert!(of(GRPO, &[f64::MAX, f64::MIN, 0.0]).iter().all(|advantage| advantage.is_finite()));
    }

    fn naive(rewards: &[f64], epsilon: f64) -> Vec<f64> {
        let n = rewards.len() as f64;
        let mean = rewards.iter().sum::<f64>() / n;
        let variance = rewards.iter().map(|r| (r - mean) * (r - mean)).sum::<f64>() / (n - 1.0);
        rewards.iter().map(|r| (r - mean) / (variance.sqrt() + epsilon)).collect()
    }

    proptest! {
        #[test]
        fn shifting_all_rewards_changes_nothing(rewards in prop::collection::vec(-10.0..10.0_f64, 2..16), shift in -5.0..5.0_f64) {
            let shifted: Vec<_> = rewards.iter().map(|reward| reward + shift).collect();
            for estimator in [GRPO, DR_GRPO] {
                check(&of(estimator, &shifted), &of(estimator, &rewards), 1e-6);
            }
        }

        #[test]
        fn advantages_of_a_group_add_up_to_nothing(rewards in prop::collection::vec(-10.0..10.0_f64, 0..16)) {
            for estimator in [GRPO, DR_GRPO] {
                prop_assert!(of(estimator, &rewards).iter().sum::<f64>().abs() < 1e-6);
            }
        }

        #[test]
        fn agrees_with_a_naive_reference(rewards in prop::collection::vec(-10.0..10.0_f64, 2..16)) {
            prop_assume!(has_variance(&rewards));
            check(&of(GRPO, &rewards), &naive(&rewards, 1e-4), 1e-9);
        }

        #[test]
        fn a_better_reward_never_has_a_smaller_advantage(rewards in prop::collection::vec(-10.0..10.0_f64, 2..16)) {
            let found = of(GRPO, &rewards);
            for (one, a) in rewards.iter().zip(&found) {
                for (other, b) in rewards.iter().zip(&found) {
                    prop_assert!(one > other || a <= b);
                }
            }
        }

        #[test]
        fn order_of_rollouts_does_not_matter(rewards in prop::collection::vec(-10.0..10.0_f64, 2..16)) {
            let mut reversed = rewards.clone();
            reversed.reverse();
            let mut found = of(GRPO, &reversed);
            found.reverse();
            check(&found, &of(GRPO, &rewards), 1e-9);
        }
    }
}
