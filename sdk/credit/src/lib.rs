//! From rewards to the weights of calls and tokens: the maths that reinforcement learning algorithms share. Pure functions of
//! plain numbers, without dependencies, for plugins and for native tests alike.
//!
//! What it is not: it asks no host, reads no trajectory and knows no loss of the policy; the host computes that.
//!
//! | module | what | used by |
//! |---|---|---|
//! | [`group`] | advantages of the rollouts of one item | GRPO, Dr.GRPO, RLOO, OPO, MaxRL, Pass@k |
//! | [`returns`] | discounted returns of tokens | REINFORCE++ |
//! | [`gae`] | generalised advantage estimation over a rollout's calls | PPO |
//! | [`value`] | the critic's loss and its derivative | PPO |
//! | [`steps`] | advantages of single calls | LightningRL, GiGPO, VinePPO, Tree-GRPO |
//! | [`kl`] | estimators of the KL divergence, adaptive coefficient | all |
//! | [`shaping`] | rewards of length and repetition | DAPO |
//! | [`curriculum`] | which items are worth another look | all |
//! | [`preference`] | the loss of a pair | DPO |
//! | [`rows`] | the same over rows that hold context and padding: to compare with systems that work that way | tests |
//! | [`statistics`] | means, deviations, whitening | all |
//!
//! # Missing rewards and numbers that are not finite
//! A reward is `Option<f64>`: none is a rollout that failed for a reason that is not the policy's. It, and one that is NaN or
//! infinite, is in no mean and no deviation, and its advantage is none. No function makes NaN of finite numbers; where finite
//! numbers overflow on the way, the result is 0.
//!
//! ```
//! use fulgurite_credit::group;
//!
//! // Four rollouts of one item, one of which the machine broke.
//! let advantages = group::leave_one_out(&[Some(6.0), Some(3.0), None, Some(3.0)]);
//! assert_eq!(advantages, [Some(3.0), Some(-1.5), None, Some(-1.5)]);
//! ```

pub mod curriculum;
pub mod gae;
pub mod group;
pub mod kl;
pub mod preference;
pub mod returns;
pub mod rows;
pub mod shaping;
pub mod statistics;
pub mod steps;
pub mod value;

/// The number, or 0 where an overflow has left none: rewards near the end of the range of f64 must not poison the weights.
fn finite(value: f64) -> f64 {
    if value.is_finite() { value } else { 0.0 }
}

#[cfg(test)]
#[track_caller]
fn near(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{found:?} is not {expected:?}");
    let all = found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() <= tolerance);
    assert!(all, "{found:?} is not {expected:?}");
}
