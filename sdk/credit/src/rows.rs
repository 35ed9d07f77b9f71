//! The same over rows that hold context and padding beside what the policy drew, to compare with systems that work that way,
//! and the rule by which a rollout that was cut into several rows keeps its mass. Plugins need none of this: they are told of
//! sampled tokens alone, and rows are the host's.

use std::collections::BTreeMap;

use crate::finite;
use crate::gae::Estimate;

/// What a position of a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// The policy drew it.
    Sampled,
    /// It stands between two calls: a tool's result. It is passed over.
    Observed,
    /// Behind the end.
    Padding,
}

/// `G_t = r_t + γ·G_{t+1}`. An observed position passes the running return through, undiscounted; padding sets it back. What
/// stands at positions that were not sampled is of no use to anyone.
#[must_use]
pub fn discounted(rewards: &[f64], positions: &[Position], discount: f64) -> Vec<f64> {
    let mut running = 0.0;
    let mut returns = vec![];
    for (reward, position) in rewards.iter().zip(positions).rev() {
        match position {
            Position::Sampled => {
                running = finite(finite(*reward) + discount * running);
                returns.push(running);
            }
            Position::Observed => returns.push(running),
            Position::Padding => {
                running = 0.0;
                returns.push(finite(*reward));
            }
        }
    }
    returns.reverse();
    returns
}

/// [`crate::gae::estimate`] with what was not sampled passed over (`sampled`): the multi-turn form of verl.
#[must_use]
pub fn multi_turn_gae(rewards: &[f64], values: &[f64], sampled: &[bool], discount: f64, lambda: f64) -> Estimate {
    let (mut next_value, mut next_advantage) = (0.0, 0.0);
    backwards(rewards, values, |place, reward, value| {
        if sampled.get(place).copied().unwrap_or(false) {
            let delta = reward + discount * next_value - value;
            next_advantage = finite(delta + discount * lambda * next_advantage);
            next_value = value;
        }
        next_advantage
    })
}

/// The plain form of SkyRL and TRL, which takes no notice of what was sampled: for comparison. Tool results discount and receive
/// credit, so it is not for agents.
#[must_use]
pub fn plain_gae(rewards: &[f64], values: &[f64], discount: f64, lambda: f64) -> Estimate {
    multi_turn_gae(rewards, values, &vec![true; rewards.len()], discount, lambda)
}

fn backwards(rewards: &[f64], values: &[f64], mut advantage: impl FnMut(usize, f64, f64) -> f64) -> Estimate {
    let mut estimate = Estimate::default();
    for (place, (reward, value)) in rewards.iter().zip(values).enumerate().rev() {
        let (reward, value) = (finite(*reward), finite(*value));
        let advantage = advantage(place, reward, value);
        estimate.advantages.push(advantage);
        estimate.returns.push(finite(advantage + value));
    }
    estimate.advantages.reverse();
    estimate.returns.reverse();
    estimate
}

/// An advantage at every sampled position and 0 at every other one.
#[must_use]
pub fn broadcast(advantage: f64, sampled: &[bool]) -> Vec<f64> {
    sampled.iter().map(|sampled| if *sampled { advantage } else { 0.0 }).collect()
}

/// What each sampled token of each row weighs so that every rollout has the same mass, 1 / rollouts, however many rows it was
/// cut into: `1 / (tokens of the rollout · rollouts)`. Dividing by rows instead (AGL 1.0) lets the learning rate fall as
/// rollouts fragment. `rows` are the rollout of each row and its sampled tokens; rollouts without tokens are not counted.
#[must_use]
pub fn token_weights(rows: &[(usize, usize)]) -> Vec<f64> {
    let mut tokens: BTreeMap<usize, usize> = BTreeMap::new();
    for (rollout, sampled) in rows.iter().filter(|(_, sampled)| *sampled > 0) {
        *tokens.entry(*rollout).or_default() += sampled;
    }
    let weight = |rollout: &usize| tokens.get(rollout).map_or(0.0, |count| 1.0 / (*count as f64 * tokens.len() as f64));
    rows.iter().map(|(rollout, sampled)| if *sampled > 0 { weight(rollout) } else { 0.0 }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Position::{Observed, Padding, Sampled};
    use super::*;
    use crate::near;
    use crate::statistics::whiten_where;

    #[test]
    fn golden_vectors_8_and_9_returns() {
        near(&discounted(&[1.0, 2.0, 3.0], &[Sampled, Sampled, Padding], 1.0), &[3.0, 2.0, 3.0], 0.0);
        near(&discounted(&[1.0, 2.0, 3.0], &[Sampled; 3], 0.5), &[2.75, 3.5, 3.0], 0.0);
    }

    /// ALGORITHMS.md, 2.4: the widely copied form gives the first token nothing.
    #[test]
    fn a_tool_result_cuts_no_reward_off() {
        let found = discounted(&[0.0, 0.0, 1.0], &[Sampled, Observed, Sampled], 0.5);
        near(&[found[0], found[2]], &[0.5, 1.0], 0.0);
    }

    #[test]
    fn golden_vector_13_plain() {
        let found = plain_gae(&[1.0, 2.0, 3.0], &[0.5, 1.0, 1.5], 1.0, 1.0);
        near(&found.returns, &[6.0, 5.0, 3.0], 0.0);
        let half = std::f64::consts::FRAC_1_SQRT_2;
        near(&whiten_where(&found.advantages, &[true, false, true]), &[half, 0.1768, -half], 1e-4);
    }

    #[test]
    fn golden_vector_14_multi_turn() {
        let found = multi_turn_gae(&[1.0, 2.0, 3.0], &[0.5, 1.0, 1.5], &[true, false, true], 1.0, 1.0);
        near(&found.advantages, &[3.5, 1.5, 1.5], 0.0);
        near(&found.returns, &[4.0, 2.5, 3.0], 0.0);
    }

    #[test]
    fn golden_vector_39_mass_of_rollouts() {
        let mass = |rows: &[(usize, usize)]| -> Vec<f64> {
            let weights = token_weights(rows);
            let of = |rollout: usize| {
                rows.iter()
                    .zip(&weights)
                    .filter(|(row, _)| row.0 == rollout)
                    .map(|(row, weight)| row.1 as f64 * weight)
                    .sum()
            };
            vec![of(0), of(1)]
        };
        near(&mass(&[(0, 2), (0, 1), (1, 3)]), &[0.5, 0.5], 1e-12);
        near(&mass(&[(0, 2), (0, 0), (1, 1)]), &[0.5, 0.5], 1e-12);
        near(&token_weights(&[(0, 0)]), &[0.0], 0.0);
    }

    #[test]
    fn golden_vectors_40_and_44_broadcast() {
        near(&broadcast(2.0, &[true, true, false]), &[2.0, 2.0, 0.0], 0.0);
        near(&broadcast(2.0, &[true, false, false]), &[2.0, 0.0, 0.0], 0.0);
        near(&broadcast(-1.0, &[true; 3]), &[-1.0; 3], 0.0);
        near(&broadcast(0.7, &[false, true, false]), &[0.0, 0.7, 0.0], 0.0);
    }

    proptest! {
        /// Passing context over is the same as never having seen it: why plugins are told of sampled tokens alone.
        #[test]
        fn sampled_tokens_are_all_that_matters(
            places in prop::collection::vec((any::<bool>(), -3.0..3.0_f64, -3.0..3.0_f64), 1..20),
            discount in 0.5..1.0_f64,
            lambda in 0.0..1.0_f64,
        ) {
            let sampled: Vec<bool> = places.iter().map(|place| place.0).collect();
            let keep = |list: &[f64]| -> Vec<f64> {
                list.iter().zip(&sampled).filter(|(_, sampled)| **sampled).map(|(value, _)| *value).collect()
            };
            // A reward never sits on what was not sampled.
            let rewards: Vec<f64> = places.iter().map(|place| if place.0 { place.1 } else { 0.0 }).collect();
            let values: Vec<f64> = places.iter().map(|place| place.2).collect();
            let positions: Vec<Position> = sampled.iter().map(|sampled| if *sampled { Sampled } else { Observed }).collect();
            let with_context = multi_turn_gae(&rewards, &values, &sampled, discount, lambda);
            let alone = crate::gae::estimate(&keep(&rewards), &keep(&values), discount, lambda, 0.0);
            near(&keep(&with_context.advantages), &alone.advantages, 1e-12);
            near(&keep(&with_context.returns), &alone.returns, 1e-12);
            let returns = discounted(&rewards, &positions, discount);
            near(&keep(&returns), &crate::returns::discounted(&keep(&rewards), discount), 1e-12);
        }

        /// Property 5 of ALGORITHMS.md, section 17.
        #[test]
        fn cutting_a_rollout_changes_no_mass(cuts in prop::collection::vec(1..6_usize, 1..6), other in 1..9_usize) {
            let whole = token_weights(&[(0, cuts.iter().sum()), (1, other)]);
            let mut rows: Vec<(usize, usize)> = cuts.iter().map(|tokens| (0, *tokens)).collect();
            rows.push((1, other));
            let cut = token_weights(&rows);
            prop_assert!(cut[..cuts.len()].iter().all(|weight| (weight - whole[0]).abs() < 1e-12));
            prop_assert!((cut[cuts.len()] - whole[1]).abs() < 1e-12);
        }
    }
}
