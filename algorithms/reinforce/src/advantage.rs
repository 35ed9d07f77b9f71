//! From rewards of tokens to advantages of tokens. Pure.

use fulgurite_credit::returns::discounted;
use fulgurite_credit::statistics::{has_variance, mean, whiten};
use fulgurite_policy_gradient::{Credit, Divergence, Rollout, rollout, sample};

use crate::config::{Baseline, Config};

/// The credit of every call that is trained on, rollout by rollout; none of a rollout that was not graded.
#[must_use]
pub fn credits(rollouts: &[Rollout], divergence: &Divergence, config: &Config) -> Vec<Option<Vec<Credit>>> {
    let baselines = baselines(rollouts, divergence, config);
    let advantages: Vec<Option<Vec<f64>>> = rollouts
        .iter()
        .zip(&baselines)
        .map(|(rollout, compared)| {
            let mut rewards = divergence.token_rewards(rollout)?;
            let Compared::With(baseline) = compared else { return Some(vec![0.0; rewards.len()]) };
            // The baseline comes off the reward before it is discounted: what is so many tokens before the end is compared
            // with as much of the baseline as is left there of the reward.
            rewards.last_mut().into_iter().for_each(|last| *last -= baseline);
            Some(discounted(&rewards, config.discount))
        })
        .collect();
    let advantages = if config.whitens() { whiten_all(advantages, &baselines) } else { advantages };
    rollouts
        .iter()
        .zip(advantages)
        .map(|(rollout, tokens)| tokens.map(|tokens| sample::per_token(rollout, &tokens)))
        .collect()
}

/// What a rollout's reward is compared with.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Compared {
    /// This reward.
    With(f64),
    /// Nothing that differs from it: equal rewards teach nothing, so its advantages are 0 to the last bit, whatever rounding,
    /// discount and whitening would make of them.
    Flat,
}

fn baselines(rollouts: &[Rollout], divergence: &Divergence, config: &Config) -> Vec<Compared> {
    let rewards: Vec<Option<f64>> = rollouts.iter().map(|rollout| divergence.reward(rollout)).collect();
    let of = |rewards: &[f64]| if has_variance(rewards) { Compared::With(mean(rewards)) } else { Compared::Flat };
    let graded: Vec<f64> = rewards.iter().flatten().copied().collect();
    match config.baseline() {
        // Whitening compares with the batch.
        Baseline::None if config.whitens() && !has_variance(&graded) => vec![Compared::Flat; rollouts.len()],
        Baseline::None => vec![Compared::With(0.0); rollouts.len()],
        Baseline::Batch => vec![of(&graded); rollouts.len()],
        Baseline::Group => {
            let mut found = vec![Compared::Flat; rollouts.len()];
            for places in rollout::groups(rollouts).values() {
                let of_group: Vec<f64> = places.iter().filter_map(|place| rewards.get(*place).copied()?).collect();
                let compared = of(&of_group);
                for place in places {
                    found.get_mut(*place).into_iter().for_each(|slot| *slot = compared);
                }
            }
            found
        }
    }
}

/// Whitens over all tokens of the step that are compared with something.
fn whiten_all(advantages: Vec<Option<Vec<f64>>>, baselines: &[Compared]) -> Vec<Option<Vec<f64>>> {
    let is_compared = |compared: &Compared| *compared != Compared::Flat;
    let compared = advantages.iter().zip(baselines).filter(|(_, compared)| is_compared(compared));
    let all: Vec<f64> = compared.filter_map(|(tokens, _)| tokens.as_ref()).flatten().copied().collect();
    let mut white = whiten(&all).into_iter();
    let mut next = |tokens: Vec<f64>| tokens.iter().map(|_| white.next().unwrap_or(0.0)).collect::<Vec<f64>>();
    let of = |(tokens, compared): (Option<Vec<f64>>, &Compared)| {
        if is_compared(compared) { tokens.map(&mut next) } else { tokens }
    };
    advantages.into_iter().zip(baselines).map(of).collect()
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

    /// 128 times 0.7 has a sum that is not 89.6: the batch would be trained on for its rounding.
    #[test]
    fn equal_rewards_are_exactly_0_in_every_variant() {
        let rollouts: Vec<Rollout> =
            (0..128).map(|place| rollout(place / 8, Some(0.7), &[[2, 1], [1, 3]][place % 2])).collect();
        for variant in [Variant::Reinforce, Variant::ReinforcePlusPlus, Variant::ReinforcePlusPlusBaseline] {
            for discount in [1.0, 0.9] {
                let found = of(&rollouts, &Config { variant, discount, ..Config::default() });
                assert!(found.iter().flatten().flatten().all(|advantage| *advantage == 0.0), "{variant:?} {discount}");
            }
        }
        // Without a baseline and without whitening nothing is compared.
        let plain = Config { baseline: Some(Baseline::None), ..Config::default() };
        assert!(of(&rollouts, &plain).iter().flatten().flatten().all(|advantage| *advantage > 0.0));
    }

    #[test]
    fn whitening_leaves_flat_groups_at_0_and_is_over_the_rest() {
        let config = Config { variant: Variant::ReinforcePlusPlusBaseline, ..Config::default() };
        let teaching = [rollout(0, Some(1.0), &[1]), rollout(0, Some(0.0), &[2])];
        let flat = [rollout(1, Some(1.0), &[4]), rollout(1, Some(1.0), &[1])];
        let alone = of(&teaching, &config);
        let beside = of(&[teaching, flat].concat(), &config);
        assert_eq!(beside[..2], alone[..]);
        assert_eq!(beside[2..], [Some(vec![0.0; 4]), Some(vec![0.0])]);
        // Tokens ½, −½, −½ about their mean −1/6, deviation 1/√3.
        let expected = 2.0 / 3.0 * 3.0_f64.sqrt();
        assert!((alone[0].as_ref().unwrap()[0] - expected).abs() < 1e-6, "{alone:?}");
    }

    #[test]
    fn a_discounted_reward_is_compared_with_as_much_of_the_baseline() {
        let config = |whiten| Config {
            variant: Variant::ReinforcePlusPlusBaseline,
            whiten: Some(whiten),
            discount: 0.9,
            ..Config::default()
        };
        let flat = [rollout(0, Some(1.0), &[10]), rollout(0, Some(1.0), &[10])];
        assert_eq!(of(&flat, &config(false)), [Some(vec![0.0; 10]), Some(vec![0.0; 10])]);
        assert_eq!(of(&flat, &config(true)), [Some(vec![0.0; 10]), Some(vec![0.0; 10])]);
        let halved = Config { discount: 0.5, ..config(false) };
        let found = of(&[rollout(0, Some(1.0), &[1, 2]), rollout(0, Some(0.0), &[1])], &halved);
        assert_eq!(found, [Some(vec![0.125, 0.25, 0.5]), Some(vec![-0.5])]);
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
