//! Values of states by continuations from them. Pure.

use std::collections::BTreeMap;

use fulgurite_credit::statistics::mean;
use fulgurite_credit::steps;
use fulgurite_policy_gradient::{Credit, Rollout, rollout};
use fulgurite_sdk::algorithm::trajectories::TransitionId;

/// What the continuations from a call's state earned; those that were not graded are left out.
pub type Outcomes = BTreeMap<TransitionId, Vec<f64>>;

/// The credit of every call that is trained on, rollout by rollout: by how much the call changed what was to be expected. The
/// state of the first call is that of all rollouts of the item, so the mean of the group is its value. A KL in the reward is no
/// part of it: nobody asks what one costs the continuations.
#[must_use]
pub fn credits(rollouts: &[Rollout], outcomes: &Outcomes) -> Vec<Option<Vec<Credit>>> {
    let mut start = BTreeMap::new();
    for (group, places) in rollout::groups(rollouts) {
        let members = rollout::members(rollouts, &places).into_iter();
        let rewards: Vec<f64> = members.filter_map(Rollout::shaped_reward).collect();
        start.insert(group, if rewards.is_empty() { None } else { Some(mean(&rewards)) });
    }
    let of = |rollout: &Rollout| {
        let total = rollout.shaped_reward()?;
        let from_start = start.get(&rollout.group).copied().flatten();
        let value = |(index, call): (usize, &rollout::Call)| {
            if index == 0 {
                from_start
            } else {
                outcomes.get(&call.id).filter(|all| !all.is_empty()).map(|all| mean(all))
            }
        };
        let values: Vec<Option<f64>> = rollout.calls.iter().enumerate().map(value).collect();
        let advantages = steps::monte_carlo(&values, total);
        let trained = rollout.calls.iter().zip(advantages).filter(|(call, _)| call.is_trained);
        Some(trained.map(|(_, advantage)| Credit::Call(advantage)).collect())
    };
    rollouts.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use fulgurite_policy_gradient::rollout::Call;

    use super::*;

    fn rollout(name: &str, reward: Option<f64>, calls: u64) -> Rollout {
        let call = |index: u64| Call { event: index, ..Call::new(format!("{name}/{index}"), 1) };
        Rollout::new(name, 0, reward, (0..calls).map(call).collect())
    }

    #[test]
    fn a_call_is_worth_what_it_changed() {
        let rollouts =
            [rollout("a", Some(1.0), 2), rollout("b", Some(0.5), 2), rollout("c", None, 2), rollout("d", Some(0.0), 1)];
        let outcomes = Outcomes::from([
            (TransitionId("a/1".to_owned()), vec![1.0, 0.5]),
            (TransitionId("b/1".to_owned()), vec![]),
        ]);
        let found = credits(&rollouts, &outcomes);
        // From the start ½ is to be expected. The first call of `a` makes ¾ of it; of `b` nobody knows.
        let call = Credit::Call;
        let expected =
            [Some(vec![call(0.25), call(0.25)]), Some(vec![call(0.0), call(0.0)]), None, Some(vec![call(-0.5)])];
        assert_eq!(found, expected);
    }

    #[test]
    fn equal_rewards_are_exactly_0() {
        // Summed and divided, a mean of these is not 0.7.
        let rollouts: Vec<Rollout> = (0..128).map(|place| rollout(&format!("r{place}"), Some(0.7), 2)).collect();
        let behind = |place: usize| (TransitionId(format!("r{place}/1")), vec![0.7; 3]);
        let outcomes: Outcomes = (0..128).map(behind).collect();
        let found = credits(&rollouts, &outcomes);
        assert!(found.iter().flatten().flatten().all(|credit| *credit == Credit::Call(0.0)), "{found:?}");
    }

    #[test]
    fn calls_of_others_are_steps_too_and_not_trained() {
        let mut one = rollout("a", Some(1.0), 2);
        one.calls[0].is_trained = false;
        let outcomes = Outcomes::from([(TransitionId("a/1".to_owned()), vec![0.25])]);
        let found = credits(&[one, rollout("b", Some(0.0), 1)], &outcomes);
        assert_eq!(found[0], Some(vec![Credit::Call(0.75)]));
    }
}
