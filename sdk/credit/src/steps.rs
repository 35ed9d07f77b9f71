//! Advantages of single calls, without a critic (ALGORITHMS.md, 9.1 and 9.4).
//!
//! A rollout is a list of calls. Rollouts of a group are compared with each other; a rollout that is `None` failed for a reason
//! that is not the policy's, and is in no statistic.

use std::collections::BTreeMap;

use crate::finite;
use crate::group::grpo;
use crate::statistics::{has_variance, mean, standard_deviation};

/// `R_t = Σ_{k≥t} γ^{k−t} r_k` over a rollout's calls, where `whole` is a reward that belongs to none of them and comes with the
/// last.
#[must_use]
pub fn returns(calls: &[f64], whole: f64, discount: f64) -> Vec<f64> {
    let mut rewards = calls.to_vec();
    if let Some(last) = rewards.last_mut() {
        *last += whole;
    }
    crate::returns::discounted(&rewards, discount)
}

/// The turn discount of AReaL's agent proxy: `A_t = γ^(T−1−t) · A` for the T calls of a rollout whose advantage is A, so that
/// what is further from the end counts less. The advantage is discounted and not the return: comparing discounted returns
/// would compare positions in the rollout, and credit calls of a group that earned all the same. With `discount` 1 every call
/// has the rollout's advantage, `LightningRL`'s hierarchical assignment as published (arXiv 2508.03680).
#[must_use]
pub fn turn_discounted(advantage: f64, calls: usize, discount: f64) -> Vec<f64> {
    let mut last = vec![0.0; calls];
    if let Some(last) = last.last_mut() {
        *last = advantage;
    }
    crate::returns::discounted(&last, discount)
}

/// A call as [`gigpo`] sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Visit<Anchor> {
    /// The state in which the policy was asked: equal for equal states. None: it has no state of its own.
    pub anchor: Option<Anchor>,
    /// The call's return.
    pub value: f64,
}

/// One rollout's calls as [`gigpo`] sees them.
#[derive(Debug, Clone, PartialEq)]
pub struct Visited<Anchor> {
    /// What the rollout earned in all.
    pub total: f64,
    /// Its calls, in order.
    pub visits: Vec<Visit<Anchor>>,
}

/// GiGPO's step advantage (arXiv 2505.10978): calls of a group that were made in the same state are compared with each other,
/// `A^S = (R_t − mean_S) / F`, where F is the unbiased standard deviation plus `epsilon`, or 1 without. A call without a state,
/// a state that was visited once, and one whose visits have equal returns have 0. Add it, times ω, to the advantage of the
/// rollout.
///
/// This departs from the paper in one case: where all rollouts of the group earned the same, everything is 0. The paper's
/// formula would still credit those that earned it in fewer calls, by their discount alone, and equal rewards teach nothing
/// here. Rollouts that were not graded have no visits to give, and are no rollouts of the list.
#[must_use]
pub fn gigpo<Anchor: Ord + Clone>(rollouts: &[Visited<Anchor>], epsilon: Option<f64>) -> Vec<Vec<f64>> {
    let totals: Vec<f64> = rollouts.iter().map(|rollout| rollout.total).collect();
    let mut states: BTreeMap<&Anchor, Vec<f64>> = BTreeMap::new();
    if has_variance(&totals) {
        for visit in rollouts.iter().flat_map(|rollout| &rollout.visits).filter(|visit| visit.value.is_finite()) {
            visit.anchor.iter().for_each(|anchor| states.entry(anchor).or_default().push(visit.value));
        }
    }
    let statistics: BTreeMap<&Anchor, (f64, f64)> = states
        .into_iter()
        .filter(|(_, values)| has_variance(values))
        .map(|(anchor, values)| {
            (anchor, (mean(&values), epsilon.map_or(1.0, |epsilon| standard_deviation(&values) + epsilon)))
        })
        .collect();
    let advantage = |visit: &Visit<Anchor>| {
        let found = visit.anchor.as_ref().and_then(|anchor| statistics.get(anchor));
        found.map_or(0.0, |(mean, scale)| finite((visit.value - mean) / scale))
    };
    rollouts.iter().map(|rollout| rollout.visits.iter().map(advantage).collect()).collect()
}

/// Monte-Carlo step values (VinePPO, arXiv 2410.01679): `A_t = V(s_{t+1}) − V(s_t)` and, of the last call, `R − V(s_t)`.
/// `values` are the mean **total** rewards of continuations from each call's state, what the calls before it earned included;
/// so a reward on the way is a part of both sides, and is counted where it was earned. A value that is missing (no continuation
/// was graded) is taken from the next one that is there: then the call is not told apart from it and has advantage 0.
#[must_use]
pub fn monte_carlo(values: &[Option<f64>], total: f64) -> Vec<f64> {
    let mut next = total;
    let mut advantages: Vec<f64> = values
        .iter()
        .rev()
        .map(|value| {
            let value = value.filter(|value| value.is_finite()).unwrap_or(next);
            let advantage = finite(next - value);
            next = value;
            advantage
        })
        .collect();
    advantages.reverse();
    advantages
}

/// Tree-GRPO's two levels (arXiv 2509.21240): GRPO among all rollouts of an item, plus GRPO among those of one tree. `trees` names
/// the tree of each rollout; they are as many as `rewards`.
#[must_use]
pub fn tree(rewards: &[Option<f64>], trees: &[usize], epsilon: f64) -> Vec<Option<f64>> {
    let among_all = grpo(rewards, epsilon);
    let mut within: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (place, tree) in trees.iter().enumerate().take(rewards.len()) {
        within.entry(*tree).or_default().push(place);
    }
    let mut advantages = among_all;
    for places in within.values() {
        let of_tree: Vec<Option<f64>> = places.iter().map(|place| rewards.get(*place).copied().flatten()).collect();
        for (place, more) in places.iter().zip(grpo(&of_tree, epsilon)) {
            if let (Some(Some(advantage)), Some(more)) = (advantages.get_mut(*place), more) {
                *advantage += more;
            }
        }
    }
    advantages
}

/// The advantage of a call that several rollouts share, because they were forked behind it: the mean over the rollouts that
/// passed through it, so that a fork adds no weight to what came before. None when none of them has an advantage.
#[must_use]
pub fn shared(advantages: &[Option<f64>]) -> Option<f64> {
    let scored: Vec<f64> = advantages.iter().flatten().copied().collect();
    if scored.is_empty() { None } else { Some(mean(&scored)) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::near;

    fn visited(total: f64, calls: &[(u8, f64)]) -> Visited<u8> {
        let visits = calls.iter().map(|(anchor, value)| Visit { anchor: Some(*anchor), value: *value }).collect();
        Visited { total, visits }
    }

    #[test]
    fn returns_of_calls_by_hand() {
        near(&returns(&[0.0, 0.0, 0.0], 1.0, 1.0), &[1.0; 3], 0.0);
        near(&returns(&[0.0, 0.0, 0.0], 1.0, 0.5), &[0.25, 0.5, 1.0], 0.0);
        near(&returns(&[0.5, 0.0], 1.0, 0.5), &[1.0, 1.0], 0.0);
        assert!(returns(&[], 1.0, 1.0).is_empty());
    }

    #[test]
    fn turns_are_discounted_towards_the_start() {
        near(&turn_discounted(-2.0, 3, 0.5), &[-0.5, -1.0, -2.0], 0.0);
        near(&turn_discounted(0.7, 4, 1.0), &[0.7; 4], 0.0);
        near(&turn_discounted(0.7, 2, 0.0), &[0.0, 0.7], 0.0);
        assert!(turn_discounted(0.7, 0, 0.5).is_empty());
    }

    #[test]
    fn gigpo_compares_what_was_done_in_the_same_state() {
        let rollouts = [
            visited(1.0, &[(1, 1.0), (2, 1.0)]),
            visited(0.0, &[(1, 0.0), (3, 0.0)]),
            visited(1.0, &[(1, 0.5), (2, 1.0)]),
        ];
        let found = gigpo(&rollouts, None);
        // State 1: mean 0.5. State 2: equal returns. State 3: one visit.
        assert_eq!(found, [vec![0.5, 0.0], vec![-0.5, 0.0], vec![0.0, 0.0]]);
        near(&gigpo(&rollouts, Some(0.0)).concat(), &[1.0, 0.0, -1.0, 0.0, 0.0, 0.0], 1e-12);
        let broken = [visited(1.0, &[(1, f64::NAN), (1, 1.0), (1, 0.0)]), visited(0.0, &[])];
        assert!(gigpo(&broken, None)[0].iter().all(|value| value.is_finite()));
    }

    #[test]
    fn gigpo_learns_nothing_from_a_group_that_earned_all_the_same() {
        // One needed two calls and the other one: the discount alone tells them apart.
        let rollouts = |total: f64| [visited(1.0, &[(1, 0.95), (2, 1.0)]), visited(total, &[(1, 1.0)])];
        for epsilon in [None, Some(1e-4)] {
            assert_eq!(gigpo(&rollouts(1.0), epsilon), [vec![0.0, 0.0], vec![0.0]]);
        }
        assert!(gigpo(&rollouts(0.5), None)[0][0] < 0.0, "what differs is compared");
    }

    #[test]
    fn a_call_without_a_state_is_compared_with_none() {
        let stateless = |total: f64| Visited { total, visits: vec![Visit { anchor: None::<u8>, value: total }] };
        assert_eq!(gigpo(&[stateless(1.0), stateless(0.0)], None), [vec![0.0], vec![0.0]]);
    }

    #[test]
    fn monte_carlo_credits_the_call_that_changed_the_outlook() {
        near(&monte_carlo(&[Some(0.5), Some(0.5), Some(0.9)], 1.0), &[0.0, 0.4, 0.1], 1e-12);
        near(&monte_carlo(&[Some(0.5), None, Some(0.9)], 1.0), &[0.4, 0.0, 0.1], 1e-12);
        near(&monte_carlo(&[None, None], 1.0), &[0.0, 0.0], 0.0);
        near(&monte_carlo(&[Some(f64::NAN)], 1.0), &[0.0], 0.0);
    }

    #[test]
    fn trees_are_compared_on_two_levels() {
        let rewards = [Some(1.0), Some(0.0), Some(0.0), Some(0.0)];
        let found: Vec<f64> = tree(&rewards, &[0, 0, 1, 1], 0.0).into_iter().flatten().collect();
        let root = 0.5_f64.sqrt();
        // Among all: mean ¼, std ½. Within the first tree: ±1/√2; the second is flat.
        near(&found, &[1.5 + root, -0.5 - root, -0.5, -0.5], 1e-12);
        assert_eq!(tree(&[Some(1.0), None], &[0, 0], 0.0), [Some(0.0), None]);
        assert_eq!(shared(&[Some(1.0), None, Some(0.0)]), Some(0.5));
        assert_eq!(shared(&[None]), None);
    }

    proptest! {
        /// Property 5 of ALGORITHMS.md, section 17: without discount a rollout that is cut into more calls has its advantage on
        /// each of them.
        #[test]
        fn more_calls_of_the_same_return_change_nothing(
            rewards in prop::collection::vec((0.0..1.0_f64, 1..5_usize), 2..8),
        ) {
            let single: Vec<Option<f64>> = rewards.iter().map(|(reward, _)| Some(*reward)).collect();
            for (advantage, (_, calls)) in grpo(&single, 1e-4).into_iter().flatten().zip(&rewards) {
                prop_assert_eq!(turn_discounted(advantage, *calls, 1.0), vec![advantage; *calls]);
            }
        }

        /// However many calls a rollout of a flat group has, and whatever the discount.
        #[test]
        fn flat_groups_are_exactly_0(reward in -2.0..2.0_f64, size in 2..9_usize, calls in 0..5_usize, discount in 0.0..1.0_f64) {
            for advantage in grpo(&vec![Some(reward); size], 1e-4).into_iter().flatten() {
                prop_assert!(turn_discounted(advantage, calls, discount).iter().all(|value| *value == 0.0));
            }
        }

        /// Advantages of a rollout's calls add up to how much better it did than its first state promised.
        #[test]
        fn monte_carlo_advantages_telescope(values in prop::collection::vec(0.0..1.0_f64, 1..8), total in 0.0..1.0_f64) {
            let known: Vec<Option<f64>> = values.iter().copied().map(Some).collect();
            prop_assert!((monte_carlo(&known, total).iter().sum::<f64>() - (total - values[0])).abs() < 1e-9);
        }

        #[test]
        fn shifting_all_rewards_changes_no_step_advantage(
            values in prop::collection::vec(prop::collection::vec((0..3_u8, -2.0..2.0_f64), 1..4), 2..5),
            shift in -2.0..2.0_f64,
        ) {
            // Totals that differ, so that the group teaches.
            let with = |shift: f64| -> Vec<Visited<u8>> {
                let moved = |calls: &Vec<(u8, f64)>| -> Vec<(u8, f64)> {
                    calls.iter().map(|(anchor, value)| (*anchor, value + shift)).collect()
                };
                values.iter().enumerate().map(|(place, calls)| visited(place as f64, &moved(calls))).collect()
            };
            let (rollouts, moved) = (with(0.0), with(shift));
            near(&gigpo(&moved, None).concat(), &gigpo(&rollouts, None).concat(), 1e-9);
        }
    }
}
