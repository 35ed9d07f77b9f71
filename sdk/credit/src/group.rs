//! Advantages of the rollouts of one group: several rollouts of the same item, compared with each other.
//!
//! Statistics are over **rollouts**, never over calls or tokens: a rollout that asks the model more often does not count
//! more (ALGORITHMS.md, rule 3 of section 1). Everything here takes one reward per rollout and returns one advantage per
//! rollout, in the same order. A group with fewer than two rewards, or with equal ones, teaches nothing: its advantages are 0.

use crate::finite;
use crate::statistics::{has_variance, mean, standard_deviation};

/// How a group's rewards become advantages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Estimator {
    /// [`grpo`].
    Grpo {
        /// Added to the standard deviation, in units of the reward.
        epsilon: f64,
    },
    /// [`centred`].
    Centred,
    /// [`leave_one_out`].
    LeaveOneOut,
    /// [`optimal_baseline`].
    OptimalBaseline,
    /// [`max_rl`].
    MaxRl,
    /// [`best_of_group`].
    BestOfGroup {
        /// Added to the standard deviation, in units of the reward.
        epsilon: f64,
    },
}

impl Estimator {
    /// One advantage per reward. `lengths` (tokens drawn by each rollout) are used by [`Estimator::OptimalBaseline`] only.
    #[must_use]
    pub fn advantages(&self, rewards: &[Option<f64>], lengths: &[f64]) -> Vec<Option<f64>> {
        match self {
            Self::Grpo { epsilon } => grpo(rewards, *epsilon),
            Self::Centred => centred(rewards),
            Self::LeaveOneOut => leave_one_out(rewards),
            Self::OptimalBaseline => optimal_baseline(rewards, lengths),
            Self::MaxRl => max_rl(rewards),
            Self::BestOfGroup { epsilon } => best_of_group(rewards, *epsilon),
        }
    }
}

/// The rewards that count.
#[must_use]
pub fn scored(rewards: &[Option<f64>]) -> Vec<f64> {
    rewards.iter().flatten().copied().filter(|reward| reward.is_finite()).collect()
}

/// Applies `advantage` to every reward that counts; without variance all of them are 0.
fn compared(rewards: &[Option<f64>], teaches: bool, advantage: impl Fn(f64) -> f64) -> Vec<Option<f64>> {
    let of = |reward: f64| if teaches { finite(advantage(reward)) } else { 0.0 };
    rewards.iter().map(|reward| reward.filter(|reward| reward.is_finite()).map(of)).collect()
}

/// `(R − mean) / (std + ε)` with the unbiased standard deviation (n − 1): GRPO (DeepSeekMath, arXiv 2402.03300; ε as TRL).
#[must_use]
pub fn grpo(rewards: &[Option<f64>], epsilon: f64) -> Vec<Option<f64>> {
    let scored = scored(rewards);
    let (mean, deviation) = (mean(&scored), standard_deviation(&scored) + epsilon);
    compared(rewards, has_variance(&scored), |reward| (reward - mean) / deviation)
}

/// `R − mean`: Dr.GRPO (arXiv 2503.20783), and REINFORCE++-baseline before its whitening.
#[must_use]
pub fn centred(rewards: &[Option<f64>]) -> Vec<Option<f64>> {
    let scored = scored(rewards);
    let mean = mean(&scored);
    compared(rewards, has_variance(&scored), |reward| reward - mean)
}

/// `R` minus the mean of the others: RLOO (arXiv 2402.14740). Of a singleton 0, as verl's vectorised form and SkyRL.
#[must_use]
pub fn leave_one_out(rewards: &[Option<f64>]) -> Vec<Option<f64>> {
    let scored = scored(rewards);
    let (sum, others) = (scored.iter().sum::<f64>(), scored.len() as f64 - 1.0);
    compared(rewards, has_variance(&scored), |reward| reward - (sum - reward) / others)
}

/// What [`leave_one_out`] compares each reward with: mean and unbiased standard deviation of the other ones (NeMo-RL). A
/// singleton is compared with itself, with deviation 0.
#[must_use]
pub fn rest(rewards: &[f64]) -> Vec<(f64, f64)> {
    if let [alone] = rewards {
        return vec![(*alone, 0.0)];
    }
    let without = |place: usize| -> Vec<f64> {
        rewards.iter().enumerate().filter(|(other, _)| *other != place).map(|(_, reward)| *reward).collect()
    };
    (0..rewards.len()).map(without).map(|others| (mean(&others), standard_deviation(&others))).collect()
}

/// `R − Σ len·R / Σ len`: OPO (arXiv 2505.23585), the baseline of least variance when a rollout's gradient grows with its
/// length. `lengths` are tokens, one per reward; a missing or negative one counts as 0, and without any length the plain mean
/// is the baseline.
#[must_use]
pub fn optimal_baseline(rewards: &[Option<f64>], lengths: &[f64]) -> Vec<Option<f64>> {
    let length = |place: usize| lengths.get(place).copied().filter(|tokens| tokens.is_finite()).unwrap_or(0.0).max(0.0);
    let finite_rewards = rewards.iter().enumerate().filter_map(|(place, reward)| Some((length(place), (*reward)?)));
    let weighted: Vec<(f64, f64)> = finite_rewards.filter(|(_, reward)| reward.is_finite()).collect();
    let tokens: f64 = weighted.iter().map(|(length, _)| length).sum();
    let scored: Vec<f64> = weighted.iter().map(|(_, reward)| *reward).collect();
    let baseline = if tokens > 0.0 {
        weighted.iter().map(|(length, reward)| length * reward).sum::<f64>() / tokens
    } else {
        mean(&scored)
    };
    compared(rewards, has_variance(&scored), |reward| reward - baseline)
}

/// `(R − mean) / mean`, and 0 when the mean is not above 0: MaxRL (arXiv 2602.02710; prime-rl, SkyRL). For rewards of at least
/// 0: rare successes weigh more than frequent ones.
#[must_use]
pub fn max_rl(rewards: &[Option<f64>]) -> Vec<Option<f64>> {
    let scored = scored(rewards);
    let mean = mean(&scored);
    compared(rewards, has_variance(&scored) && mean > 0.0, |reward| (reward - mean) / mean)
}

/// Only the best of the group has an advantage, `(best − second) / (std + ε)`: GRPO for Pass@k (verl). Of several that are
/// equally good none is better than the second, so all are 0.
#[must_use]
pub fn best_of_group(rewards: &[Option<f64>], epsilon: f64) -> Vec<Option<f64>> {
    let mut sorted = scored(rewards);
    let deviation = standard_deviation(&sorted) + epsilon;
    let teaches = has_variance(&sorted);
    sorted.sort_by(|a, b| b.total_cmp(a));
    let (best, second) = (sorted.first().copied().unwrap_or(0.0), sorted.get(1).copied().unwrap_or(0.0));
    compared(rewards, teaches, |reward| if reward >= best { (best - second) / deviation } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::near;

    const ALL: [Estimator; 6] = [
        Estimator::Grpo { epsilon: 1e-4 },
        Estimator::Centred,
        Estimator::LeaveOneOut,
        Estimator::OptimalBaseline,
        Estimator::MaxRl,
        Estimator::BestOfGroup { epsilon: 1e-4 },
    ];

    fn of(estimator: Estimator, rewards: &[f64]) -> Vec<f64> {
        let rewards: Vec<_> = rewards.iter().copied().map(Some).collect();
        let lengths: Vec<f64> = (0..rewards.len()).map(|place| 3.0 + place as f64).collect();
        estimator.advantages(&rewards, &lengths).into_iter().map(Option::unwrap).collect()
    }

    #[test]
    fn golden_vector_1_grpo() {
        let signs = [1.0, -1.0, -1.0, 1.0];
        near(&of(Estimator::Grpo { epsilon: 1e-6 }, &[1.0, 0.0, 0.0, 1.0]), &signs.map(|sign| sign * 0.866_024), 1e-6);
        near(&of(Estimator::Grpo { epsilon: 1e-4 }, &[1.0, 0.0, 0.0, 1.0]), &signs.map(|sign| sign * 0.865_875), 1e-6);
    }

    #[test]
    fn golden_vector_2_without_standard_deviation() {
        near(&of(Estimator::Centred, &[6.0, 3.0]), &[1.5, -1.5], 0.0);
        near(&of(Estimator::Centred, &[9.0, 12.0]), &[-1.5, 1.5], 0.0);
    }

    #[test]
    fn golden_vector_3_rloo() {
        near(&of(Estimator::LeaveOneOut, &[6.0, 3.0]), &[3.0, -3.0], 0.0);
        near(&of(Estimator::LeaveOneOut, &[9.0, 12.0]), &[-3.0, 3.0], 0.0);
        near(&of(Estimator::LeaveOneOut, &[1.0]), &[0.0], 0.0);
    }

    #[test]
    fn golden_vector_4_max_rl() {
        near(&of(Estimator::MaxRl, &[1.0, 0.0, 0.0, 0.0]), &[3.0, -1.0, -1.0, -1.0], 0.0);
        near(&of(Estimator::MaxRl, &[0.0, 0.0]), &[0.0, 0.0], 0.0);
        near(&of(Estimator::MaxRl, &[1.0, 1.0]), &[0.0, 0.0], 0.0);
        near(&of(Estimator::MaxRl, &[-1.0, 0.0]), &[0.0, 0.0], 0.0);
    }

    #[test]
    fn golden_vector_5_the_rest() {
        let (means, deviations): (Vec<f64>, Vec<f64>) = rest(&[1.0, 2.0, 3.0]).into_iter().unzip();
        near(&means, &[2.5, 2.0, 1.5], 0.0);
        let root = std::f64::consts::SQRT_2;
        near(&deviations, &[root / 2.0, root, root / 2.0], 1e-12);
        assert_eq!(rest(&[4.0]), [(4.0, 0.0)]);
        assert_eq!(rest(&[]), []);
    }

    #[test]
    fn by_hand() {
        // Lengths 1 and 3: the baseline is (1·1 + 3·0) / 4.
        let rewards = [Some(1.0), Some(0.0)];
        let opo = |lengths: &[f64]| optimal_baseline(&rewards, lengths);
        assert_eq!(opo(&[1.0, 3.0]), [Some(0.75), Some(-0.25)]);
        for no_lengths in [&[][..], &[0.0, 0.0], &[f64::NAN, -1.0]] {
            assert_eq!(opo(no_lengths), [Some(0.5), Some(-0.5)]);
        }
        let best = of(Estimator::BestOfGroup { epsilon: 0.0 }, &[0.0, 2.0, 1.0]);
        near(&best, &[0.0, 1.0, 0.0], 1e-12);
        near(&of(Estimator::BestOfGroup { epsilon: 0.0 }, &[1.0, 1.0, 0.0]), &[0.0; 3], 0.0);
    }

    #[test]
    fn groups_that_teach_nothing() {
        for estimator in ALL {
            near(&of(estimator, &[]), &[], 0.0);
            near(&of(estimator, &[0.7]), &[0.0], 0.0);
            // Thirds sum up with rounding: their computed deviation is not 0.
            near(&of(estimator, &[1.0 / 3.0; 7]), &[0.0; 7], 0.0);
            near(&of(estimator, &[0.1; 6]), &[0.0; 6], 0.0);
            near(&of(estimator, &[0.0, -0.0]), &[0.0; 2], 0.0);
        }
    }

    #[test]
    fn faults_are_in_no_statistic_and_have_no_advantage() {
        let with_faults = [Some(1.0), None, Some(0.0), Some(f64::NAN), Some(0.0), None, Some(1.0), Some(f64::INFINITY)];
        let alone = [Some(1.0), Some(0.0), Some(0.0), Some(1.0)];
        for estimator in ALL {
            let found = estimator.advantages(&with_faults, &[2.0; 8]);
            let scored: Vec<f64> = found.iter().flatten().copied().collect();
            let expected: Vec<f64> = estimator.advantages(&alone, &[2.0; 4]).into_iter().flatten().collect();
            assert_eq!(scored, expected, "{estimator:?}");
            let has: Vec<bool> = found.iter().map(Option::is_some).collect();
            assert_eq!(has, [true, false, true, false, true, false, true, false]);
            // One reward is left: nothing to compare it with.
            assert_eq!(estimator.advantages(&[None, Some(1.0), None], &[]), [None, Some(0.0), None]);
        }
    }

    #[test]
    fn enormous_rewards_do_not_make_nan() {
        for estimator in ALL {
            assert!(of(estimator, &[f64::MAX, f64::MIN, 0.0]).iter().all(|advantage| advantage.is_finite()));
        }
    }

    fn naive_grpo(rewards: &[f64], epsilon: f64) -> Vec<f64> {
        let n = rewards.len() as f64;
        let mean = rewards.iter().sum::<f64>() / n;
        let variance = rewards.iter().map(|r| (r - mean) * (r - mean)).sum::<f64>() / (n - 1.0);
        rewards.iter().map(|r| (r - mean) / (variance.sqrt() + epsilon)).collect()
    }

    proptest! {
        /// Property 1 of ALGORITHMS.md, section 17.
        #[test]
        fn shifting_all_rewards_changes_nothing_and_advantages_add_up_to_nothing(
            rewards in prop::collection::vec(-10.0..10.0_f64, 2..16),
            shift in -5.0..5.0_f64,
        ) {
            let shifted: Vec<_> = rewards.iter().map(|reward| reward + shift).collect();
            for estimator in [Estimator::Grpo { epsilon: 1e-4 }, Estimator::Centred, Estimator::LeaveOneOut] {
                let found = of(estimator, &rewards);
                near(&of(estimator, &shifted), &found, 1e-6);
                prop_assert!(found.iter().sum::<f64>().abs() < 1e-6);
            }
        }

        #[test]
        fn agrees_with_naive_references(rewards in prop::collection::vec(-10.0..10.0_f64, 2..16)) {
            prop_assume!(has_variance(&rewards));
            near(&of(Estimator::Grpo { epsilon: 1e-4 }, &rewards), &naive_grpo(&rewards, 1e-4), 1e-9);
            let naive: Vec<f64> = rewards.iter().zip(rest(&rewards)).map(|(reward, (mean, _))| reward - mean).collect();
            near(&of(Estimator::LeaveOneOut, &rewards), &naive, 1e-9);
        }
    }
}
