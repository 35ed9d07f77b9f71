//! From finished rollouts to the entries of a batch and the numbers that people look at. Pure: what the host tells is read
//! into [`Rollout`] first.

use std::collections::BTreeMap;

use crate::advantage::{Estimator, has_variance, mean};

/// One LLM call, as far as it matters.
#[derive(Debug, Clone, PartialEq)]
pub struct Call<Id> {
    /// What the host calls it.
    pub id: Id,
    /// Whether it is to be trained on.
    pub is_trained: bool,
    /// Tokens that the policy drew.
    pub completion_tokens: u32,
    /// The weights that drew them.
    pub policy_version: u64,
}

/// A finished rollout, as far as it matters.
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout<Id> {
    /// Its group.
    pub group: usize,
    /// Its reward; none when it was not graded or has no reward of the dimension: then it is in no baseline and no loss.
    pub reward: Option<f64>,
    /// Whether the policy left no outcome.
    pub is_malformed: bool,
    /// Its calls.
    pub calls: Vec<Call<Id>>,
}

/// What a step trains on, and what it saw.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch<Id> {
    /// Calls with the advantage of their rollout: every call of a rollout has the same (`LightningRL`'s identical assignment).
    pub entries: Vec<(Id, f64)>,
    /// Numbers by name.
    pub numbers: Vec<(&'static str, f64)>,
}

impl<Id> Batch<Id> {
    /// Whether any advantage differs from 0.
    #[must_use]
    pub fn has_advantage(&self) -> bool {
        self.entries.iter().any(|(_, advantage)| *advantage != 0.0)
    }
}

/// How many policy versions lie between drawing and training, over the calls that are trained on: mean and largest. `current`
/// is the version that is trained. Nothing without such calls.
#[must_use]
pub fn staleness<Id>(rollouts: &[Rollout<Id>], current: u64) -> Option<(f64, f64)> {
    let trained = rollouts.iter().filter(|rollout| rollout.reward.is_some()).flat_map(|rollout| &rollout.calls);
    let behind = trained.filter(|call| call.is_trained).map(|call| current.saturating_sub(call.policy_version) as f64);
    let behind: Vec<f64> = behind.collect();
    let most = behind.iter().copied().reduce(f64::max)?;
    Some((mean(&behind), most))
}

/// Puts a batch together.
#[must_use]
pub fn batch<Id>(rollouts: Vec<Rollout<Id>>, estimator: Estimator) -> Batch<Id> {
    let mut places: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (place, rollout) in rollouts.iter().enumerate() {
        places.entry(rollout.group).or_default().push(place);
    }
    let mut advantages: Vec<Option<f64>> = vec![None; rollouts.len()];
    let (mut scored_groups, mut flat_groups) = (0_u32, 0_u32);
    for group in places.values() {
        let rewards: Vec<Option<f64>> =
            group.iter().map(|place| rollouts.get(*place).and_then(|rollout| rollout.reward)).collect();
        let scored: Vec<f64> = rewards.iter().flatten().copied().collect();
        scored_groups += u32::from(!scored.is_empty());
        flat_groups += u32::from(!scored.is_empty() && !has_variance(&scored));
        for (place, advantage) in group.iter().zip(estimator.advantages(&rewards)) {
            if let Some(slot) = advantages.get_mut(*place) {
                *slot = advantage;
            }
        }
    }

    let total = rollouts.len();
    let rewards: Vec<f64> = rollouts.iter().filter_map(|rollout| rollout.reward).collect();
    let malformed = rollouts.iter().filter(|rollout| rollout.reward.is_some() && rollout.is_malformed).count();
    let tokens =
        |rollout: &Rollout<Id>| rollout.calls.iter().map(|call| f64::from(call.completion_tokens)).sum::<f64>();
    let responses: Vec<f64> = rollouts.iter().filter(|rollout| rollout.reward.is_some()).map(tokens).collect();
    let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
    let mut numbers = vec![
        ("reward_mean", mean(&rewards)),
        ("malformed_share", share(malformed as f64, rewards.len() as f64)),
        ("zero_variance_share", share(flat_groups.into(), scored_groups.into())),
        ("excluded_share", share((total - rewards.len()) as f64, total as f64)),
        ("response_tokens", mean(&responses)),
    ];

    let mut entries = vec![];
    for (rollout, advantage) in rollouts.into_iter().zip(&advantages) {
        if let Some(advantage) = advantage {
            entries.extend(rollout.calls.into_iter().filter(|call| call.is_trained).map(|call| (call.id, *advantage)));
        }
    }
    numbers.push(("trained_calls", entries.len() as f64));
    Batch { entries, numbers }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRPO: Estimator = Estimator { epsilon: 1e-4, normalise_by_std: true };

    fn rollout(group: usize, reward: Option<f64>, ids: &[u32]) -> Rollout<u32> {
        let calls =
            ids.iter().map(|id| Call { id: *id, is_trained: true, completion_tokens: 5, policy_version: 3 }).collect();
        Rollout { group, reward, is_malformed: false, calls }
    }

    fn number(batch: &Batch<u32>, name: &str) -> f64 {
        batch.numbers.iter().find(|(known, _)| *known == name).unwrap().1
    }

    /// Golden vector 40 as the plugin sees it: rollout A has two calls and B one; A's advantage goes to both of its calls,
    /// and the second call does not count a second time in the group.
    #[test]
    fn every_call_gets_the_advantage_of_its_rollout() {
        let estimator = Estimator { epsilon: 0.0, normalise_by_std: false };
        let batch = batch(vec![rollout(0, Some(3.0), &[1, 2]), rollout(0, Some(-1.0), &[3])], estimator);
        assert_eq!(batch.entries, [(1, 2.0), (2, 2.0), (3, -2.0)]);
    }

    /// Property 5: cutting a rollout into more calls leaves every advantage as it was.
    #[test]
    fn more_calls_change_no_advantage() {
        let of = |ids: &[u32]| {
            let rollouts =
                vec![rollout(0, Some(1.0), ids), rollout(0, Some(0.0), &[100]), rollout(0, Some(0.3), &[101])];
            batch(rollouts, GRPO).entries
        };
        let (one, many) = (of(&[1]), of(&[1, 2, 3, 4]));
        assert!(many[..4].iter().all(|(_, advantage)| advantage.to_bits() == one[0].1.to_bits()));
        assert_eq!(many[4..], one[1..]);
    }

    #[test]
    fn faults_are_counted_and_in_nothing_else() {
        let mut malformed = rollout(0, Some(0.0), &[2]);
        malformed.is_malformed = true;
        let batch =
            batch(vec![rollout(0, Some(1.0), &[1]), malformed, rollout(0, None, &[3]), rollout(0, None, &[])], GRPO);
        assert_eq!(batch.entries.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2]);
        assert!(number(&batch, "reward_mean") - 0.5 == 0.0);
        assert!(number(&batch, "malformed_share") - 0.5 == 0.0);
        assert!(number(&batch, "excluded_share") - 0.5 == 0.0);
    }

    #[test]
    fn groups_do_not_mix_and_flat_ones_are_counted() {
        let rollouts = vec![
            rollout(1, Some(1.0), &[1]),
            rollout(0, Some(0.3), &[2]),
            rollout(1, Some(1.0), &[3]),
            rollout(0, Some(0.0), &[4]),
        ];
        let batch = batch(rollouts, GRPO);
        assert_eq!(batch.entries[0], (1, 0.0));
        assert!(batch.entries[1].1 > 0.7 && batch.entries[3].1 < -0.7);
        assert!(number(&batch, "zero_variance_share") - 0.5 == 0.0);
        assert!(batch.has_advantage());
    }

    #[test]
    fn calls_of_other_agents_count_in_no_entry() {
        let mut one = rollout(0, Some(1.0), &[1, 2]);
        one.calls[0].is_trained = false;
        let batch = batch(vec![one, rollout(0, Some(0.0), &[3])], GRPO);
        assert_eq!(batch.entries.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn staleness_is_of_what_is_trained_on() {
        let mut old = rollout(0, Some(1.0), &[1, 2, 3]);
        old.calls[0].policy_version = 1;
        // Nobody trains on these two: the second call of the one, and all of the other.
        old.calls[1] = Call { is_trained: false, policy_version: 0, ..old.calls[1].clone() };
        let mut fault = rollout(0, None, &[4]);
        fault.calls[0].policy_version = 0;
        assert_eq!(staleness(&[old.clone(), fault.clone()], 3), Some((1.0, 2.0)));
        assert_eq!(staleness(&[rollout(1, Some(0.0), &[5]), old], 4), Some((5.0 / 3.0, 3.0)));
        assert_eq!(staleness(&[fault], 4), None);
    }

    #[test]
    fn nothing_makes_no_nan() {
        let empty = batch::<u32>(vec![], GRPO);
        assert!(empty.entries.is_empty() && !empty.has_advantage());
        assert!(empty.numbers.iter().all(|(_, value)| value.is_finite()));
        let faults = batch(vec![rollout(0, None, &[1])], GRPO);
        assert!(faults.numbers.iter().all(|(_, value)| value.is_finite()));
    }
}
