//! From rewards to advantages of calls. Pure.

use fulgurite_credit::steps::{self, Visit, Visited};
use fulgurite_policy_gradient::{Credit, Divergence, Rollout, rollout};

use crate::config::{Anchor, Config, Method};

/// What a step's rollouts teach.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Found {
    /// The credit of every call that is trained on, rollout by rollout; none of a rollout that was not graded.
    pub credits: Vec<Option<Vec<Credit>>>,
    /// Share of the calls that were made in a state that another one was made in too; only `gigpo` has states.
    pub anchored_share: Option<f64>,
}

/// The credit of every call.
#[must_use]
pub fn credits(rollouts: &[Rollout], divergence: &Divergence, config: &Config) -> Found {
    let of_rollouts = rollout::advantages(rollouts, config.estimator(), |one| divergence.reward(one));
    let discount = if config.method == Method::TurnDiscount { config.turn_discount } else { 1.0 };
    let whole = |(rollout, advantage): (&Rollout, &Option<f64>)| {
        Some(steps::turn_discounted((*advantage)?, rollout.trained().count(), discount))
    };
    let mut advantages: Vec<Option<Vec<f64>>> = rollouts.iter().zip(&of_rollouts).map(whole).collect();
    let (mut shared, mut visits) = (0, 0);
    if config.method == Method::Gigpo {
        for places in rollout::groups(rollouts).values() {
            let seen = |place: &usize| Some((*place, visited(rollouts.get(*place)?, divergence, config)?));
            let (places, states): (Vec<usize>, Vec<Visited<u64>>) = places.iter().filter_map(seen).unzip();
            shared += count_shared(&states);
            visits += states.iter().map(|rollout| rollout.visits.len()).sum::<usize>();
            for (place, more) in places.iter().zip(steps::gigpo(&states, config.divides_by())) {
                let calls = advantages.get_mut(*place).into_iter().flatten().flatten();
                calls.zip(more).for_each(|(advantage, more)| *advantage += config.step_weight * more);
            }
        }
    }
    let credited = |calls: Vec<f64>| calls.into_iter().map(Credit::Call).collect();
    Found {
        credits: advantages.into_iter().map(|calls| calls.map(credited)).collect(),
        anchored_share: (visits > 0).then(|| shared as f64 / visits as f64),
    }
}

/// The states in which a rollout's calls were made, and what each of them led to, less what the KL costs. None of a rollout
/// that was not graded. A call that saw nothing new (its agent asks again without a word between) has no state, which the
/// host tells by the hash 0: all such calls would be one.
fn visited(rollout: &Rollout, divergence: &Divergence, config: &Config) -> Option<Visited<u64>> {
    let state = |call: &rollout::Call| match config.anchor {
        Anchor::Observation => call.observation_hash,
        Anchor::Prompt => call.prompt_hash,
    };
    let (mut rewards, whole) = rollout.step_rewards()?;
    rewards.iter_mut().zip(rollout.trained()).for_each(|(reward, call)| *reward -= divergence.of_call(&call.id));
    let returns = steps::returns(&rewards, whole, config.turn_discount).into_iter();
    let visits = returns
        .zip(rollout.trained())
        .map(|(value, call)| Visit { anchor: Some(state(call)).filter(|hash| *hash != 0), value })
        .collect();
    Some(Visited { total: divergence.reward(rollout)?, visits })
}

/// Visits of states that were visited more than once.
fn count_shared(states: &[Visited<u64>]) -> usize {
    let mut counts = std::collections::BTreeMap::<u64, usize>::new();
    let anchors = states.iter().flat_map(|rollout| &rollout.visits).filter_map(|visit| visit.anchor);
    anchors.for_each(|anchor| *counts.entry(anchor).or_default() += 1);
    counts.values().filter(|count| **count > 1).sum()
}

#[cfg(test)]
mod tests {
    use fulgurite_policy_gradient::rollout::Call;

    use super::*;

    /// A rollout of calls that saw these things.
    fn rollout(group: usize, reward: Option<f64>, seen: &[u64]) -> Rollout {
        let call = |(index, observation): (usize, &u64)| Call {
            prompt_hash: seen[..=index].iter().fold(17, |hash, seen| hash * 31 + seen),
            observation_hash: *observation,
            ..Call::new(format!("{group}/{reward:?}/{index}"), 1)
        };
        Rollout::new("", group, reward, seen.iter().enumerate().map(call).collect())
    }

    fn of(rollouts: &[Rollout], config: &Config) -> Vec<Option<Vec<f64>>> {
        let number = |credit: Credit| match credit {
            Credit::Call(advantage) => advantage,
            Credit::Tokens(_) => panic!("a credit per token"),
        };
        let found = credits(rollouts, &Divergence::default(), config).credits.into_iter();
        found.map(|calls| calls.map(|calls| calls.into_iter().map(number).collect())).collect()
    }

    fn config(method: Method) -> Config {
        Config { method, normalise_by_std: false, turn_discount: 0.5, ..Config::default() }
    }

    #[test]
    fn identical_is_the_rollouts_advantage_on_every_call() {
        let rollouts = [rollout(0, Some(1.0), &[1, 2]), rollout(0, None, &[1]), rollout(0, Some(0.0), &[1])];
        assert_eq!(of(&rollouts, &config(Method::Identical)), [Some(vec![0.5, 0.5]), None, Some(vec![-0.5])]);
    }

    #[test]
    fn turn_discount_credits_late_calls_more_and_flat_groups_not_at_all() {
        let rollouts = [rollout(0, Some(1.0), &[1, 2]), rollout(0, None, &[1]), rollout(0, Some(0.0), &[1, 3, 4])];
        let found = of(&rollouts, &config(Method::TurnDiscount));
        assert_eq!(found, [Some(vec![0.25, 0.5]), None, Some(vec![-0.125, -0.25, -0.5])]);
        let without = Config { turn_discount: 1.0, ..config(Method::TurnDiscount) };
        assert_eq!(of(&rollouts, &without), of(&rollouts, &config(Method::Identical)));
        // All earned 1 in two calls: positions in a rollout are not compared with each other.
        let flat = [rollout(0, Some(1.0), &[1, 2]), rollout(0, Some(1.0), &[1, 3])];
        let divided = Config { normalise_by_std: true, ..config(Method::TurnDiscount) };
        assert_eq!(of(&flat, &divided), [Some(vec![0.0, 0.0]), Some(vec![0.0, 0.0])]);
    }

    #[test]
    fn gigpo_of_a_group_that_earned_the_same_is_0() {
        let flat = [rollout(0, Some(1.0), &[1, 2]), rollout(0, Some(1.0), &[1]), rollout(0, None, &[1])];
        assert_eq!(of(&flat, &config(Method::Gigpo)), [Some(vec![0.0, 0.0]), Some(vec![0.0]), None]);
    }

    #[test]
    fn calls_that_saw_nothing_new_are_not_in_one_state() {
        let mut rollouts = [rollout(0, Some(1.0), &[1, 5]), rollout(0, Some(0.0), &[2, 6])];
        for one in &mut rollouts {
            one.calls[1].observation_hash = 0;
        }
        assert_eq!(of(&rollouts, &config(Method::Gigpo)), [Some(vec![0.5, 0.5]), Some(vec![-0.5, -0.5])]);
        let found = credits(&rollouts, &Divergence::default(), &config(Method::Gigpo));
        assert_eq!(found.anchored_share, Some(0.0));
    }

    #[test]
    fn gigpo_adds_what_was_better_in_the_same_state() {
        // All see 1 first; the first and the third then see 2.
        let rollouts = [
            rollout(0, Some(1.0), &[1, 2]),
            rollout(0, Some(0.0), &[1, 3]),
            rollout(0, Some(0.5), &[1, 2]),
            // Another group in the same states.
            rollout(1, Some(1.0), &[1, 2]),
        ];
        let found = of(&rollouts, &config(Method::Gigpo));
        // Whole: ½, −½, 0. In state 1 returns ½, 0, ¼; in state 2 they are 1 and ½.
        assert_eq!(found[0], Some(vec![0.5 + 0.25, 0.5 + 0.25]));
        assert_eq!(found[1], Some(vec![-0.5 - 0.25, -0.5]));
        assert_eq!(found[2], Some(vec![0.0, -0.25]));
        assert_eq!(found[3], Some(vec![0.0, 0.0]));
        let shared = credits(&rollouts[..3], &Divergence::default(), &config(Method::Gigpo)).anchored_share;
        assert!((shared.unwrap() - 5.0 / 6.0).abs() < 1e-12);
        let without = Config { step_weight: 0.0, ..config(Method::Gigpo) };
        assert_eq!(of(&rollouts, &without), of(&rollouts, &config(Method::Identical)));
    }

    #[test]
    fn with_the_prompt_as_anchor_another_history_is_another_state() {
        let rollouts = [rollout(0, Some(1.0), &[1, 2]), rollout(0, Some(0.0), &[9, 2])];
        let by_prompt = Config { anchor: Anchor::Prompt, ..config(Method::Gigpo) };
        assert_eq!(of(&rollouts, &by_prompt), of(&rollouts, &config(Method::Identical)));
        assert_eq!(of(&rollouts, &config(Method::Gigpo))[0], Some(vec![0.5, 1.0]));
    }

    #[test]
    fn nothing_makes_no_nan() {
        for method in [Method::Identical, Method::TurnDiscount, Method::Gigpo] {
            let config = Config { normalise_by_std: true, ..config(method) };
            assert!(of(&[], &config).is_empty());
            let found = of(&[rollout(0, Some(1.0), &[]), rollout(0, None, &[1]), rollout(0, Some(1.0), &[1])], &config);
            assert_eq!(found, [Some(vec![]), None, Some(vec![0.0])]);
        }
    }
}
