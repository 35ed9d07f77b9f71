//! GRPO by formulas of its own: the host gives log-probs and takes derivatives, and knows nothing of the loss. Beside it the
//! host's loss, whose gradient must be the same; and PPO's value loss, which the host has no formula for.
//!
//! Per update it makes three optimiser steps. The first two change no weight: their gradient norms are told as
//! `N/built_in` (of the host's loss alone) and `N/difference` (of the host's loss minus its own). The third is by its own.

use std::collections::BTreeMap;

use fulgurite_sdk::algorithm::policy::{
    self, Correction, CorrectionRule, Entry, Forward, Gradient, Loss, Model, OptimiserStep, RatioLevel, Stream,
};
use fulgurite_sdk::algorithm::rollouts::{self, Group, Split};
use fulgurite_sdk::algorithm::trajectories::{Trajectory, TransitionId};
use fulgurite_sdk::algorithm::{Algorithm, AlgorithmError, Progress, metrics};
use serde::{Deserialize, Serialize};

/// What to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Steps.
    pub steps: u64,
    /// Items of a step.
    pub groups: u32,
    /// Rollouts of an item.
    pub group_size: u32,
    /// Updates on the rollouts of a step.
    pub updates: u32,
    /// Step size.
    pub learning_rate: f64,
    /// The ratio is kept within 1 minus and plus these.
    pub clip: (f32, f32),
    /// Whether rewards are 1 and 0 in turns, whatever the rollouts did: a policy with random weights earns none.
    pub alternates: bool,
    /// PPO's value loss instead: returns of all tokens, and bound of the change of values.
    pub value_loss: Option<(f32, f32)>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            steps: 1,
            groups: 1,
            group_size: 2,
            updates: 2,
            learning_rate: 1e-3,
            clip: (0.2, 0.28),
            alternates: false,
            value_loss: None,
        }
    }
}

/// Steps made.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct State {
    steps: u64,
}

struct OwnFormula {
    config: Config,
    state: State,
}

fulgurite_sdk::algorithm!(OwnFormula);

impl Algorithm for OwnFormula {
    const NAME: &'static str = "own-formula";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    type Config = Config;
    type State = State;

    fn init(config: Config, saved: Option<State>) -> Result<Self, AlgorithmError> {
        Ok(Self { config, state: saved.unwrap_or_default() })
    }

    fn step(&mut self) -> Result<Progress, AlgorithmError> {
        let items = rollouts::next_items(Split::Train, self.config.groups)?;
        let groups: Vec<Group> = items.iter().map(|item| Group::new(item.id(), self.config.group_size)).collect();
        let ended = rollouts::enqueue(&groups)?.await_all(None)?;
        if let Some((target, bound)) = self.config.value_loss {
            self.train_values(&ended, target, bound)?;
        } else {
            self.train_policy(&ended)?;
        }
        self.state.steps += 1;
        Ok(if self.state.steps < self.config.steps { Progress::Continue } else { Progress::Done })
    }

    fn save(&self) -> State {
        self.state
    }
}

/// (R − mean) / (deviation + 1e-4) with the deviation over n − 1; 0 where all are equal. Rewards come with their group.
fn advantages(rewards: &[(usize, f64)]) -> Vec<f64> {
    let mut groups: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    for (group, reward) in rewards {
        groups.entry(*group).or_default().push(*reward);
    }
    let advantage = |(group, reward): &(usize, f64)| {
        let rewards = groups.get(group).map(Vec::as_slice).unwrap_or_default();
        let count = rewards.len() as f64;
        let mean = rewards.iter().sum::<f64>() / count;
        let variance = rewards.iter().map(|reward| (reward - mean).powi(2)).sum::<f64>() / (count - 1.0);
        if variance > 0.0 { (reward - mean) / (variance.sqrt() + 1e-4) } else { 0.0 }
    };
    rewards.iter().map(advantage).collect()
}

fn empty(transition: &TransitionId) -> Gradient {
    Gradient { transition: transition.clone(), d_log_probs: vec![], d_entropies: vec![], d_values: vec![] }
}

#[expect(clippy::cast_possible_truncation, reason = "the host's numbers are f32")]
fn narrow(value: f64) -> f32 {
    value as f32
}

impl OwnFormula {
    fn train_policy(&self, ended: &[Trajectory]) -> Result<(), AlgorithmError> {
        let reward = |(place, trajectory): (usize, &Trajectory)| {
            let earned = trajectory.total("reward").unwrap_or(0.0);
            let in_turns = if place % 2 == 0 { 1.0 } else { 0.0 };
            (trajectory.group(), if self.config.alternates { in_turns } else { earned })
        };
        let rewards: Vec<(usize, f64)> = ended.iter().enumerate().map(reward).collect();
        let of_rollout = ended.iter().zip(advantages(&rewards));
        let calls = of_rollout.flat_map(|(trajectory, advantage)| {
            trajectory.transitions().into_iter().map(move |transition| (transition.id(), advantage))
        });
        let calls: Vec<(TransitionId, f64)> = calls.collect();
        let ids: Vec<TransitionId> = calls.iter().map(|(id, _)| id.clone()).collect();
        let entries: Vec<Entry> =
            calls.iter().map(|(id, advantage)| Entry::new(id.clone(), Stream::Rl, narrow(*advantage))).collect();
        // Anchors are what drew, so every weight is 1; were they anything else, the mask would drop whole rollouts.
        policy::anchor(&Model::Policy, &ids)?;
        let correction = Correction {
            level: RatioLevel::SequenceSum,
            rule: CorrectionRule::Mask(0.999, 1.001),
            batch_normalise: true,
        };
        let loss = Loss::new().ppo(self.config.clip.0, self.config.clip.1, None).correction(correction);
        let still = OptimiserStep::new(0.0);
        let moving = OptimiserStep::new(self.config.learning_rate);
        let old = policy::forward(&Model::Policy, &ids)?;
        for update in 0..self.config.updates {
            policy::forward_backward(&Model::Policy, &entries, &loss)?;
            let stepped = policy::optimiser_step(&Model::Policy, &still)?;
            metrics::scalar(&format!("{update}/built_in"), stepped.get("gradient-norm").unwrap_or(-1.0))?;

            let now = policy::forward(&Model::Policy, &ids)?;
            let (own, clipped) = self.gradients(&calls, &old, &now, 1.0);
            metrics::scalar(&format!("{update}/clipped"), clipped as f64)?;
            policy::forward_backward(&Model::Policy, &entries, &loss)?;
            policy::backward(&Model::Policy, &self.gradients(&calls, &old, &now, -1.0).0)?;
            let stepped = policy::optimiser_step(&Model::Policy, &still)?;
            metrics::scalar(&format!("{update}/difference"), stepped.get("gradient-norm").unwrap_or(-1.0))?;

            policy::backward(&Model::Policy, &own)?;
            policy::optimiser_step(&Model::Policy, &moving)?;
        }
        Ok(())
    }

    /// d/d log π of `max(-A r, -A clip(r))`, averaged over all tokens, times a factor; and how many tokens are clipped.
    fn gradients(
        &self,
        calls: &[(TransitionId, f64)],
        old: &[Forward],
        now: &[Forward],
        factor: f64,
    ) -> (Vec<Gradient>, usize) {
        let tokens = old.iter().map(|call| call.log_probs.len()).sum::<usize>() as f64;
        let (low, high) = (1.0 - f64::from(self.config.clip.0), 1.0 + f64::from(self.config.clip.1));
        let mut clipped = 0;
        let mut slope = |advantage: f64, old: f32, now: f32| {
            let ratio = (f64::from(now) - f64::from(old)).exp();
            let is_clipped = (advantage > 0.0 && ratio > high) || (advantage < 0.0 && ratio < low);
            clipped += usize::from(is_clipped);
            narrow(if is_clipped { 0.0 } else { -factor * advantage * ratio / tokens })
        };
        let gradients = calls.iter().zip(old).zip(now).map(|(((id, advantage), old), now)| {
            // The entries' weights are f32.
            let advantage = f64::from(narrow(*advantage));
            let log_probs = old.log_probs.iter().zip(&now.log_probs);
            let slopes = log_probs.map(|(old, now)| slope(advantage, *old, *now)).collect();
            Gradient { d_log_probs: slopes, ..empty(id) }
        });
        let gradients = gradients.collect();
        (gradients, clipped)
    }

    /// `½ mean max((V − R)², (clip(V, V_old ± bound) − R)²)`.
    fn train_values(&self, ended: &[Trajectory], target: f32, bound: f32) -> Result<(), AlgorithmError> {
        let critic = Model::Named("critic".to_owned());
        let ids: Vec<TransitionId> =
            ended.iter().flat_map(Trajectory::transitions).map(|transition| transition.id()).collect();
        let old = policy::forward(&critic, &ids)?;
        let tokens: usize = old.iter().map(|call| call.values.len()).sum();
        for update in 0..self.config.updates {
            let now = policy::forward(&critic, &ids)?;
            let mut loss = 0.0;
            let mut slope = |old: f32, now: f32| {
                let held = now.clamp(old - bound, old + bound);
                let (plain, clipped) = ((now - target).powi(2), (held - target).powi(2));
                loss += f64::from(0.5 * plain.max(clipped)) / tokens as f64;
                if clipped > plain { 0.0 } else { (now - target) / tokens as f32 }
            };
            let gradients: Vec<Gradient> = old
                .iter()
                .zip(&now)
                .map(|(old, now)| {
                    let slopes = old.values.iter().zip(&now.values).map(|(old, now)| slope(*old, *now)).collect();
                    Gradient { d_values: slopes, ..empty(&now.transition) }
                })
                .collect();
            policy::backward(&critic, &gradients)?;
            policy::optimiser_step(&critic, &OptimiserStep::new(self.config.learning_rate))?;
            metrics::scalar(&format!("{update}/value_loss"), loss)?;
        }
        Ok(())
    }
}
