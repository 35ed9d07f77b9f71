//! From rewards of tokens to advantages of tokens. Pure.

use fulgurite_credit::group::Estimator;
use fulgurite_credit::returns::discounted;
use fulgurite_credit::statistics::{mean, whiten};
use fulgurite_policy_gradient::{Credit, Divergence, Rollout, rollout, sample};

use crate::config::{Baseline, Config};

/// The credit of every call that is trained on, rollout by rollout; none of a rollout that was not graded.
#[must_use]
pub fn credits(rollouts: &[Rollout], divergence: &Divergence, config: &Config) -> Vec<Option<Vec<Credit>>> {
    let returns = rollouts
        .iter()
        .map(|rollout| divergence.token_rewards(rollout).map(|rewards| discounted(&rewards, config.discount)));
    let centred = returns.zip(baselines(rollouts, divergence, config.baseline())).map(|(returns, baseline)| {
        let advantages = |returns: Vec<f64>| returns.into_iter().map(|value| value - baseline).collect::<Vec<f64>>();
        returns.map(advantages)
    });
    let advantages: Vec<Option<Vec<f64>>> = centred.collect();
    let advantages = if config.whitens() { whiten_all(advantages) } else { advantages };
    rollouts
        .iter()
        .zip(advantages)
        .map(|(rollout, tokens)| tokens.map(|tokens| sample::per_token(rollout, &tokens)))
        .collect()
}

/// What the returns of each rollout are compared with.
fn baselines(rollouts: &[Rollout], divergence: &Divergence, baseline: Baseline) -> Vec<f64> {
    let rewards: Vec<Option<f64>> = rollouts.iter().map(|rollout| divergence.reward(rollout)).collect();
    match baseline {
        Baseline::None => vec![0.0; rollouts.len()],
        Baseline::Batch => {
            let graded: Vec<f64> = rewards.into_iter().flatten().collect();
            vec![mean(&graded); rollouts.len()]
        }
        Baseline::Group => {
            // A group that teaches nothing has advantages of exactly 0, whatever rounding says of its mean.
            let advantages = rollout::advantages(rollouts, Estimator::Centred, |one| divergence.reward(one));
            let baseline = |(reward, advantage): (Option<f64>, Option<f64>)| Some(reward? - advantage?);
            rewards.into_iter().zip(advantages).map(|both| baseline(both).unwrap_or(0.0)).collect()
        }
    }
}

/// Whitens over all tokens of the step.
fn whiten_all(advantages: Vec<Option<Vec<f64>>>) -> Vec<Option<Vec<f64>>> {
    let all: Vec<f64> = advantages.iter().flatten().flatten().copied().collect();
    let mut white = whiten(&all).into_iter();
    let mut next = |tokens: Vec<f64>| tokens.iter().map(|_| white.next().unwrap_or(0.0)).collect::<Vec<f64>>();
    advantages.into_iter().map(|tokens| tokens.map(&mut next)).collect()
}

#[cfg(test)]
mod tests {
    use fulgurite_policy_gradient::rollout::Call;

    use super::*;
    use crate::config::Variant;

    fn rollout(group: usize, reward: Option<f64>, tokens: &[u32]) -> Rollout {
        let call = |(index, count): (usize, &u32)| Call::new(format!("{group}/{index}"), *count);
        Rollout::new("", group, reward, tokens.iter().enumerate().map(call).collect())
    }

    fn of(rollouts: &[Rollout], config: &Config) -> Vec<Option<Vec<f64>>> {
        let tokens = |credit: Credit| match credit {
            Credit::Tokens(tokens) => tokens,
            Credit::Call(_) => panic!("a credit per call"),
        };
        let flat = |credits: Vec<Credit>| credits.into_iter().flat_map(tokens).collect::<Vec<f64>>();
        credits(rollouts, &Divergence::default(), config).into_iter().map(|credits| credits.map(flat)).collect()
    }

    #[test]
    fn the_mean_of_the_batch_is_the_baseline_and_faults_are_not_in_it() {
        let rollouts = [rollout(0, Some(1.0), &[1, 2]), rollout(1, None, &[1]), rollout(2, Some(0.0), &[1])];
        assert_eq!(of(&rollouts, &Config::default()), [Some(vec![0.5; 3]), None, Some(vec![-0.5])]);
    }

    #[test]
    fn rewards_are_discounted_by_the_tokens_that_were_drawn() {
        let config = Config { discount: 0.5, baseline: Some(Baseline::None), ..Config::default() };
        let mut one = rollout(0, Some(1.0), &[1, 2]);
        assert_eq!(of(&[one.clone()], &config), [Some(vec![0.25, 0.5, 1.0])]);
        // Of that, 0.5 is the first call's.
        one.calls[0].reward = 0.5;
        assert_eq!(of(&[one], &config), [Some(vec![0.625, 0.25, 0.5])]);
    }

    /// ALGORITHMS.md, 2.4: returns of all tokens of the batch, whitened together.
    #[test]
    fn reinforce_plus_plus_whitens_over_tokens() {
        let config = Config { variant: Variant::ReinforcePlusPlus, ..Config::default() };
        let found = of(&[rollout(0, Some(1.0), &[1, 1]), rollout(1, Some(0.0), &[1, 1])], &config);
        // ±½ about the mean, deviation 1/√3.
        let expected = 0.5 * 3.0_f64.sqrt();
        let all: Vec<f64> = found.into_iter().flatten().flatten().collect();
        for (found, sign) in all.iter().zip([1.0, 1.0, -1.0, -1.0]) {
            assert!((found - sign * expected).abs() < 1e-6, "{all:?}");
        }
    }

    #[test]
    fn the_baseline_variant_compares_groups_and_flat_ones_teach_nothing() {
        let config = Config { variant: Variant::ReinforcePlusPlusBaseline, whiten: Some(false), ..Config::default() };
        let third = 1.0 / 3.0;
        let rollouts = [
            rollout(0, Some(1.0), &[1]),
            rollout(0, Some(0.0), &[2]),
            rollout(1, Some(third), &[1]),
            rollout(1, Some(third), &[1]),
            rollout(1, Some(third), &[1]),
        ];
        let found: Vec<Vec<f64>> = of(&rollouts, &config).into_iter().flatten().collect();
        assert_eq!(found, [vec![0.5], vec![-0.5, -0.5], vec![0.0], vec![0.0], vec![0.0]]);
    }

    #[test]
    fn nothing_makes_no_nan() {
        for variant in [Variant::Reinforce, Variant::ReinforcePlusPlus, Variant::ReinforcePlusPlusBaseline] {
            let config = Config { variant, ..Config::default() };
            assert!(of(&[], &config).is_empty());
            assert_eq!(of(&[rollout(0, None, &[1])], &config), [None]);
            assert_eq!(of(&[rollout(0, Some(1.0), &[])], &config), [Some(vec![])]);
        }
    }
}
