//! Trees of rollouts: where they are forked, and what their calls are worth. Pure.

use std::collections::BTreeMap;

use fulgurite_credit::steps;
use fulgurite_policy_gradient::{Credit, Divergence, Draw, Rollout, rollout};
use fulgurite_sdk::algorithm::rollouts::RolloutId;
use fulgurite_sdk::algorithm::trajectories::TransitionId;

/// Where a rollout belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Branch {
    /// Its tree, a number of its own over the whole step.
    pub tree: usize,
    /// The calls of other rollouts that it went through before it was forked, in order; nothing of a root.
    pub prefix: Vec<TransitionId>,
}

/// The branches of a step, by rollout.
pub type Branches = BTreeMap<RolloutId, Branch>;

/// A place to fork at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fork {
    /// The rollout that is forked, as its place in the step's list.
    pub ancestor: usize,
    /// The event of the call that is made anew.
    pub event: u64,
    /// What the fork's branch will be.
    pub branch: Branch,
}

/// Chooses a call of a tree to be made anew: any that is not the first of its rollout's path, or, in a tree of single calls,
/// that first one. `places` are the tree's rollouts. None: nothing of the tree was graded.
#[must_use]
pub fn choose(rollouts: &[Rollout], branches: &Branches, places: &[usize], draw: &mut Draw) -> Option<Fork> {
    let mut inner: Vec<Fork> = vec![];
    let mut first: Vec<Fork> = vec![];
    for place in places {
        let Some(rollout) = rollouts.get(*place).filter(|rollout| rollout.reward.is_some()) else { continue };
        let Some(branch) = branches.get(&rollout.id) else { continue };
        let mut prefix = branch.prefix.clone();
        for call in &rollout.calls {
            let list = if prefix.is_empty() { &mut first } else { &mut inner };
            let branch = Branch { tree: branch.tree, prefix: prefix.clone() };
            list.push(Fork { ancestor: *place, event: call.event, branch });
            prefix.push(call.id.clone());
        }
    }
    let candidates = if inner.is_empty() { first } else { inner };
    candidates.get(draw.below(candidates.len())).cloned()
}

/// The credit of every call that is trained on, rollout by rollout: of a call that several rollouts went through, the mean of
/// their advantages.
#[must_use]
pub fn credits(
    rollouts: &[Rollout],
    branches: &Branches,
    divergence: &Divergence,
    epsilon: f64,
) -> Vec<Option<Vec<Credit>>> {
    let mut advantages: Vec<Option<f64>> = vec![None; rollouts.len()];
    for places in rollout::groups(rollouts).values() {
        let members = rollout::members(rollouts, places);
        let prefix = |rollout: &Rollout| branches.get(&rollout.id).map_or(&[][..], |branch| &branch.prefix);
        let rewards: Vec<Option<f64>> =
            members.iter().map(|rollout| divergence.reward_behind(prefix(rollout), rollout)).collect();
        let tree = |rollout: &&Rollout| branches.get(&rollout.id).map_or(usize::MAX, |branch| branch.tree);
        let trees: Vec<usize> = members.iter().map(tree).collect();
        for (place, advantage) in places.iter().zip(steps::tree(&rewards, &trees, epsilon)) {
            advantages.get_mut(*place).into_iter().for_each(|slot| *slot = advantage);
        }
    }
    let mut through: BTreeMap<&TransitionId, Vec<Option<f64>>> = BTreeMap::new();
    for (rollout, advantage) in rollouts.iter().zip(&advantages) {
        let before = branches.get(&rollout.id).into_iter().flat_map(|branch| &branch.prefix);
        for call in before.chain(rollout.calls.iter().map(|call| &call.id)) {
            through.entry(call).or_default().push(*advantage);
        }
    }
    let shared = |call: &TransitionId| through.get(call).and_then(|all| steps::shared(all)).unwrap_or(0.0);
    let of = |(rollout, advantage): (&Rollout, &Option<f64>)| {
        advantage.map(|_| rollout.trained().map(|call| Credit::Call(shared(&call.id))).collect())
    };
    rollouts.iter().zip(&advantages).map(of).collect()
}

#[cfg(test)]
mod tests {
    use fulgurite_policy_gradient::rollout::Call;

    use super::*;

    fn rollout(name: &str, reward: Option<f64>, calls: u64) -> Rollout {
        let call = |index: u64| Call { event: 10 + index, ..Call::new(format!("{name}/{index}"), 1) };
        Rollout::new(name, 0, reward, (0..calls).map(call).collect())
    }

    fn branches(of: &[(&str, usize, &[&str])]) -> Branches {
        let branch = |tree: usize, prefix: &[&str]| Branch {
            tree,
            prefix: prefix.iter().map(|call| TransitionId((*call).to_owned())).collect(),
        };
        of.iter().map(|(name, tree, prefix)| (RolloutId((*name).to_owned()), branch(*tree, prefix))).collect()
    }

    fn numbers(credits: &[Option<Vec<Credit>>]) -> Vec<Option<Vec<f64>>> {
        let number = |credit: &Credit| match credit {
            Credit::Call(advantage) => *advantage,
            Credit::Tokens(_) => panic!("a credit per token"),
        };
        credits.iter().map(|calls| calls.as_ref().map(|calls| calls.iter().map(number).collect())).collect()
    }

    #[test]
    fn trees_are_forked_behind_their_first_call() {
        let rollouts = [rollout("a", Some(1.0), 3), rollout("b", None, 3), rollout("c", Some(0.0), 1)];
        let known = branches(&[("a", 0, &[]), ("b", 1, &[]), ("c", 2, &["a/0", "a/1"])]);
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..50 {
            let fork = choose(&rollouts, &known, &[0, 2], &mut Draw::new("test", seed, [])).unwrap();
            seen.insert((fork.ancestor, fork.event, fork.branch.prefix.len()));
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [(0, 11, 1), (0, 12, 2), (2, 10, 2)]);
        let mut draw = Draw::new("test", 0, []);
        assert_eq!(choose(&rollouts, &known, &[1], &mut draw), None, "a fault is not forked");
        // A single call is made anew from the start.
        let single = [rollout("a", Some(1.0), 1)];
        let fork = choose(&single, &known, &[0], &mut draw).unwrap();
        assert_eq!((fork.event, fork.branch), (10, Branch { tree: 0, prefix: vec![] }));
    }

    #[test]
    fn a_shared_call_has_the_mean_of_what_went_through_it() {
        // Two trees; the first was forked behind its first call, and the fork did better.
        let rollouts = [rollout("a", Some(0.0), 2), rollout("b", Some(0.0), 2), rollout("c", Some(1.0), 1)];
        let known = branches(&[("a", 0, &[]), ("b", 1, &[]), ("c", 0, &["a/0"])]);
        let found = numbers(&credits(&rollouts, &known, &Divergence::default(), 0.0));
        let (all, pair) = (1.0 / 3.0_f64.sqrt(), 0.5_f64.sqrt());
        let expected = [-all - pair, -all, 2.0 * all + pair];
        let near = |found: &Option<Vec<f64>>, expected: &[f64]| {
            let found = found.as_ref().unwrap();
            assert_eq!(found.len(), expected.len());
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9), "{found:?} is not {expected:?}");
        };
        near(&found[0], &[f64::midpoint(expected[0], expected[2]), expected[0]]);
        near(&found[1], &[expected[1], expected[1]]);
        near(&found[2], &[expected[2]]);
    }

    /// A root and its fork have the first call in common, and what it costs.
    #[test]
    fn a_fork_pays_for_its_prefix_as_its_root_does() {
        let rollouts = [rollout("a", Some(1.0), 2), rollout("c", Some(1.0), 1)];
        let known = branches(&[("a", 0, &[]), ("c", 0, &["a/0"])]);
        let cost = |call: &str, cost: f64| (TransitionId(call.to_owned()), vec![cost]);
        let costs = |of: &[(TransitionId, Vec<f64>)]| Divergence::new(of.iter().cloned().collect());
        let found =
            numbers(&credits(&rollouts, &known, &costs(&[cost("a/0", 0.3), cost("a/1", 0.1), cost("c/0", 0.1)]), 0.0));
        assert_eq!(found, [Some(vec![0.0, 0.0]), Some(vec![0.0])]);
        // Only what came behind the fork tells them apart: rewards 0.5 and 0.25.
        let found = numbers(&credits(
            &rollouts,
            &known,
            &costs(&[cost("a/0", 0.25), cost("a/1", 0.25), cost("c/0", 0.5)]),
            0.0,
        ));
        let both = 2.0 * 0.5_f64.sqrt();
        let (root, fork) = (found[0].as_ref().unwrap(), found[1].as_ref().unwrap());
        assert!(root[0].abs() < 1e-12 && (root[1] - both).abs() < 1e-12 && (fork[0] + both).abs() < 1e-12, "{found:?}");
    }

    /// A fork that was not graded changes no advantage.
    #[test]
    fn a_fork_that_was_not_graded_adds_no_weight() {
        let (a, b) = (rollout("a", Some(1.0), 2), rollout("b", Some(0.0), 1));
        let known = branches(&[("a", 0, &[]), ("b", 1, &[])]);
        let plain = numbers(&credits(&[a.clone(), b.clone()], &known, &Divergence::default(), 0.0));
        let with = [a, b, rollout("c", None, 1)];
        let known = branches(&[("a", 0, &[]), ("b", 1, &[]), ("c", 0, &["a/0"])]);
        let found = numbers(&credits(&with, &known, &Divergence::default(), 0.0));
        assert_eq!(found[..2], plain);
        assert_eq!(found[2], None);
    }
}
