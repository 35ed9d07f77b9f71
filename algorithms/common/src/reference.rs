//! The KL to the models that the stage started from, token by token, for algorithms that take it off the reward.

use std::collections::BTreeMap;

use fulgurite_credit::kl::{Estimator, penalties};
use fulgurite_credit::returns::on_tokens;
use fulgurite_credit::statistics::mean;
use fulgurite_sdk::algorithm::HostError;
use fulgurite_sdk::algorithm::policy::{self, Model};
use fulgurite_sdk::algorithm::trajectories::TransitionId;

use crate::rollout::Rollout;

/// What the KL costs each token that the policy drew, in units of the reward; nothing where no KL is taken off the reward.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Divergence {
    costs: BTreeMap<TransitionId, Vec<f64>>,
    /// Mean estimate of the KL (nats per token); none without a reference or tokens.
    pub mean: Option<f64>,
}

impl Divergence {
    /// What the tokens of these calls cost, in units of the reward.
    #[must_use]
    pub const fn new(costs: BTreeMap<TransitionId, Vec<f64>>) -> Self {
        Self { costs, mean: None }
    }

    /// Asks each model and its reference for the log-probs of the calls that it drew.
    pub(crate) fn ask(
        estimator: Estimator,
        coefficient: f64,
        calls: &BTreeMap<Model, Vec<TransitionId>>,
    ) -> Result<Self, HostError> {
        let mut found = Self::default();
        let mut estimates = vec![];
        for (model, calls) in calls {
            let Some(reference) = model.reference() else { continue };
            let reference = policy::forward(&reference, calls)?;
            for (ours, theirs) in policy::forward(model, calls)?.into_iter().zip(reference) {
                let of = |coefficient: f64| penalties(estimator, coefficient, &ours.log_probs, &theirs.log_probs);
                estimates.extend(of(1.0));
                found.costs.insert(ours.transition.clone(), of(coefficient));
            }
        }
        found.mean = if estimates.is_empty() { None } else { Some(mean(&estimates)) };
        Ok(found)
    }

    /// What a rollout earned, less what the KL costs all of its tokens: what it is compared by.
    #[must_use]
    pub fn reward(&self, rollout: &Rollout) -> Option<f64> {
        self.reward_behind(&[], rollout)
    }

    /// The same of a fork, whose reward is that of its prefix too: calls of other rollouts, whose tokens cost it as much as
    /// they cost those.
    #[must_use]
    pub fn reward_behind(&self, prefix: &[TransitionId], rollout: &Rollout) -> Option<f64> {
        let calls = prefix.iter().chain(rollout.trained().map(|call| &call.id));
        let costs: f64 = calls.map(|call| self.of_call(call)).sum();
        rollout.shaped_reward().map(|reward| reward - costs)
    }

    /// The reward of every token that a rollout drew and that is trained on, in order over its calls: what calls earned on
    /// their last tokens, what belongs to the whole on the last of all, and what the KL costs off every one. None of a rollout
    /// that was not graded.
    #[must_use]
    pub fn token_rewards(&self, rollout: &Rollout) -> Option<Vec<f64>> {
        let (steps, whole) = rollout.step_rewards()?;
        let counts: Vec<usize> = rollout.trained().map(|call| call.completion_tokens as usize).collect();
        let mut rewards = on_tokens(&counts, &steps, whole);
        let mut tokens = rewards.iter_mut();
        for (call, count) in rollout.trained().zip(counts) {
            let costs = self.costs.get(&call.id).into_iter().flatten().chain(std::iter::repeat(&0.0));
            tokens.by_ref().take(count).zip(costs).for_each(|(token, cost)| *token -= cost);
        }
        Some(rewards)
    }

    /// What a whole call costs.
    #[must_use]
    pub fn of_call(&self, call: &TransitionId) -> f64 {
        self.costs.get(call).map_or(0.0, |costs| costs.iter().sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::example;

    #[test]
    fn costs_come_off_tokens_calls_and_rollouts_alike() {
        let mut rollout = example(0, Some(1.0), &[1, 2]);
        rollout.calls[0].completion_tokens = 2;
        rollout.calls[0].reward = 0.25;
        rollout.calls[1].completion_tokens = 3;
        let id = |name: &str| TransitionId(name.to_owned());
        let costs = BTreeMap::from([(id("1"), vec![0.5, 0.0]), (id("2"), vec![0.0, 0.125, 0.0])]);
        let found = Divergence::new(costs);
        assert_eq!(found.token_rewards(&rollout), Some(vec![-0.5, 0.25, 0.0, -0.125, 0.75]));
        assert_eq!(found.reward(&rollout), Some(0.375));
        assert_eq!(found.reward_behind(&[id("1"), id("9")], &rollout), Some(-0.125));
        assert_eq!((found.of_call(&id("1")), found.of_call(&id("9"))), (0.5, 0.0));

        let nothing = Divergence::default();
        assert_eq!(nothing.token_rewards(&rollout), Some(vec![0.0, 0.25, 0.0, 0.0, 0.75]));
        assert_eq!(nothing.reward(&rollout), Some(1.0));
        let fault = example(0, None, &[1]);
        assert_eq!((nothing.reward(&fault), nothing.token_rewards(&fault)), (None, None));
    }
}
