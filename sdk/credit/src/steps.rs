//! Advantages of single calls, without a critic (ALGORITHMS.md, 9.1 and 9.4).
//!
//! A rollout is a list of calls. Rollouts of a group are compared with each other; a rollout that is `None` failed for a reason
//! that is not the policy's, and is in no statistic.

use std::collections::BTreeMap;

use crate::finite;
use crate::group::grpo;
use crate::statistics::{has_variance, mean, standard_deviation};

/// `R_t = Σ_{k≥t} γ^{k−t} r_k` over a rollout's calls, where `whole` is a reward that belongs to none of them and comes with the
/// last. With `discount` 1 and no reward but `whole` every call has the rollout's return, `LightningRL`'s identical assignment
/// (arXiv 2508.03680); below 1 it is the turn discount of AReaL.
#[must_use]
pub fn returns(calls: &[f64], whole: f64, discount: f64) -> Vec<f64> {
    let mut rewards = calls.to_vec();
    if let Some(last) = rewards.last_mut() {
        *last += whole;
    }
    crate::returns::discounted(&rewards, discount)
}

/// Hierarchical assignment: every call is compared by its own return with the returns of all calls of the group.
/// `(R_t − mean) / (std + ε)`, where each rollout has the same weight in mean and deviation however often it asked; without
/// `epsilon` nothing is divided. The deviation is scaled to n − 1 by the number of rollouts, so that rollouts of one call are
/// GRPO exactly. Fewer than two rollouts, or returns that are all equal, have advantage 0.
#[must_use]
pub fn hierarchical(rollouts: &[Option<Vec<f64>>], epsilon: Option<f64>) -> Vec<Option<Vec<f64>>> {
    let scored: Vec<&Vec<f64>> = rollouts.iter().flatten().filter(|calls| !calls.is_empty()).collect();
    let all: Vec<f64> = scored.iter().flat_map(|calls| calls.iter().copied()).collect();
    let teaches = scored.len() > 1 && has_variance(&all);
    let centre = mean(&scored.iter().map(|calls| mean(calls)).collect::<Vec<_>>());
    let spread = |calls: &Vec<f64>| mean(&calls.iter().map(|value| (value - centre).powi(2)).collect::<Vec<_>>());
    let squares: f64 = scored.iter().map(|calls| spread(calls)).sum();
    let scale = epsilon.map_or(1.0, |epsilon| (squares / (scored.len() as f64 - 1.0)).sqrt() + epsilon);
    let advantage = |value: &f64| if teaches { finite((value - centre) / scale) } else { 0.0 };
    rollouts.iter().map(|calls| calls.as_ref().map(|calls| calls.iter().map(advantage).collect())).collect()
}

/// A call as [`gigpo`] sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Visit<Anchor> {
    /// The state in which the policy was asked: equal for equal states.
    pub anchor: Anchor,
    /// The call's return.
    pub value: f64,
}

/// GiGPO's step advantage (arXiv 2505.10978): calls of a group that were made in the same state are compared with each other,
/// `A^S = (R_t − mean) / F`, where F is the unbiased standard deviation plus `epsilon`, or 1 without. A state that was visited
/// once, or whose visits have equal returns, has 0. Add it, times ω, to the advantage of the rollout.
#[must_use]
pub fn gigpo<Anchor: Ord + Clone>(rollouts: &[Vec<Visit<Anchor>>], epsilon: Option<f64>) -> Vec<Vec<f64>> {
    let mut states: BTreeMap<&Anchor, Vec<f64>> = BTreeMap::new();
    for visit in rollouts.iter().flatten().filter(|visit| visit.value.is_finite()) {
        states.entry(&visit.anchor).or_default().push(visit.value);
    }
    let statistics: BTreeMap<&Anchor, (f64, f64)> = states
        .into_iter()
        .filter(|(_, values)| has_variance(values))
        .map(|(anchor, values)| {
            (anchor, (mean(&values), epsilon.map_or(1.0, |epsilon| standard_deviation(&values) + epsilon)))
        })
        .collect();
    let advantage = |visit: &Visit<Anchor>| {
        statistics.get(&visit.anchor).map_or(0.0, |(mean, scale)| finite((visit.value - mean) / scale))
    };
    rollouts.iter().map(|visits| visits.iter().map(advantage).collect()).collect()
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

    fn visits(calls: &[(u8, f64)]) -> Vec<Visit<u8>> {
        calls.iter().map(|(anchor, value)| Visit { anchor: *anchor, value: *value }).collect()
    }

    #[test]
    fn returns_of_calls_by_hand() {
        near(&returns(&[0.0, 0.0, 0.0], 1.0, 1.0), &[1.0; 3], 0.0);
        near(&returns(&[0.0, 0.0, 0.0], 1.0, 0.5), &[0.25, 0.5, 1.0], 0.0);
        near(&returns(&[0.5, 0.0], 1.0, 0.5), &[1.0, 1.0], 0.0);
        assert!(returns(&[], 1.0, 1.0).is_empty());
    }

    #[test]
    fn hierarchical_weighs_every_rollout_equally() {
        // One call worth 1, and three calls worth 0: the mean over rollouts is 0.5, over calls it would be 0.25.
        let found = hierarchical(&[Some(vec![1.0]), None, Some(vec![0.0; 3])], None);
        assert_eq!(found, [Some(vec![0.5]), None, Some(vec![-0.5; 3])]);
        assert_eq!(hierarchical(&[Some(vec![1.0, 0.0]), None], Some(1e-4)), [Some(vec![0.0; 2]), None]);
        assert_eq!(hierarchical(&[], None), []);
        assert_eq!(hierarchical(&[Some(vec![]), Some(vec![1.0])], None), [Some(vec![]), Some(vec![0.0])]);
    }

    #[test]
    fn gigpo_compares_what_was_done_in_the_same_state() {
        let rollouts = [visits(&[(1, 1.0), (2, 1.0)]), visits(&[(1, 0.0), (3, 0.0)]), visits(&[(1, 0.5), (2, 1.0)])];
        let found = gigpo(&rollouts, None);
        // State 1: mean 0.5. State 2: equal returns. State 3: one visit.
        assert_eq!(found, [vec![0.5, 0.0], vec![-0.5, 0.0], vec![0.0, 0.0]]);
        near(&gigpo(&rollouts, Some(0.0)).concat(), &[1.0, 0.0, -1.0, 0.0, 0.0, 0.0], 1e-12);
        assert!(gigpo(&[visits(&[(1, f64::NAN), (1, 1.0), (1, 0.0)])], None)[0].iter().all(|value| value.is_finite()));
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
        /// Property 5 of ALGORITHMS.md, section 17: cutting a rollout into more calls leaves every advantage as it was.
        #[test]
        fn more_calls_of_the_same_return_change_nothing(
            rewards in prop::collection::vec((0.0..1.0_f64, 1..5_usize), 2..8),
        ) {
            let single: Vec<Option<f64>> = rewards.iter().map(|(reward, _)| Some(*reward)).collect();
            let split: Vec<Option<Vec<f64>>> =
                rewards.iter().map(|(reward, calls)| Some(returns(&vec![0.0; *calls], *reward, 1.0))).collect();
            prop_assume!(has_variance(&rewards.iter().map(|(reward, _)| *reward).collect::<Vec<_>>()));
            let found = hierarchical(&split, Some(1e-4));
            for (expected, found) in grpo(&single, 1e-4).into_iter().zip(found) {
                let expected = expected.unwrap();
                prop_assert!(found.unwrap().iter().all(|advantage| (advantage - expected).abs() < 1e-9));
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
            let rollouts: Vec<_> = values.iter().map(|calls| visits(calls)).collect();
            let moved: Vec<_> = values
                .iter()
                .map(|calls| visits(&calls.iter().map(|(anchor, value)| (*anchor, value + shift)).collect::<Vec<_>>()))
                .collect();
            near(&gigpo(&moved, None).concat(), &gigpo(&rollouts, None).concat(), 1e-9);
        }
    }
}
