//! Group relative policy optimisation (GRPO) on whole agent rollouts. See the README.

pub mod advantage;
pub mod batch;
mod config;
mod gather;

use fulgurite_sdk::algorithm::policy::{self, Entry, Model, Numbers, OptimiserStep, Stream};
use fulgurite_sdk::algorithm::rollouts::{self, Group, Split};
use fulgurite_sdk::algorithm::trajectories::{Trajectory, TransitionId};
use fulgurite_sdk::algorithm::{Algorithm, AlgorithmError, Progress, Sampling, metrics};
use serde::{Deserialize, Serialize};

use batch::{Call, Rollout};
use gather::Start;

pub use config::{AggregationName, Config, KlEstimatorName};

/// Optimiser steps in a row that may be skipped because a gradient was not finite. More means that the weights are lost.
const SKIPPED_STEPS_MAX: u32 = 5;

/// What the next step needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Steps made.
    steps: u64,
    /// The last so many optimiser steps were skipped.
    skipped_in_a_row: u32,
    /// The weights that the last update made; 0 before the first.
    #[serde(default)]
    policy_version: u64,
}

/// The algorithm.
#[derive(Debug)]
pub struct Grpo {
    config: Config,
    state: State,
}

impl Algorithm for Grpo {
    const NAME: &'static str = "grpo";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    type Config = Config;
    type State = State;

    fn init(config: Config, saved: Option<State>) -> Result<Self, AlgorithmError> {
        config.check().map_err(AlgorithmError::InvalidConfig)?;
        Ok(Self { config, state: saved.unwrap_or_default() })
    }

    fn step(&mut self) -> Result<Progress, AlgorithmError> {
        if self.state.steps >= self.config.steps {
            return Ok(Progress::Done);
        }
        if self.state.steps == 0 && self.config.has_reference() {
            policy::freeze_reference()?;
        }
        let rollouts = self.roll_out()?;
        let batch = batch::batch(rollouts, self.config.estimator());
        if batch.entries.is_empty() {
            let text =
                format!("no rollout of the step has both a call to train on and a reward `{}`", self.config.dimension);
            return Err(AlgorithmError::Other(text));
        }
        for (name, value) in &batch.numbers {
            metrics::scalar(name, *value)?;
        }
        // Without any gradient an optimiser step would still move the weights, by its momentum.
        if batch.has_advantage() || self.config.has_gradient_without_advantage() {
            self.update(&batch.entries)?;
        }
        self.state.steps += 1;
        Ok(if self.state.steps < self.config.steps { Progress::Continue } else { Progress::Done })
    }

    fn save(&self) -> State {
        self.state
    }
}

impl Grpo {
    /// Rolls out the next items and reads what matters of what happened.
    fn roll_out(&mut self) -> Result<Vec<Rollout<TransitionId>>, AlgorithmError> {
        let sampling = Sampling::new().temperature(self.config.temperature);
        let items = rollouts::next_items(Split::Train, self.config.groups_per_step)?;
        let groups: Vec<Group> =
            items.iter().map(|item| Group::new(item.id(), self.config.group_size).sampling(sampling)).collect();
        let size = self.config.group_size as usize;
        let is_last = self.state.steps + 1 >= self.config.steps;
        let start = Start::of(self.config.start_share, groups.len() * size, is_last);
        let gathered = gather::gather(&groups, size, start)?;
        let ended = gathered.rollouts.iter().map(|(group, trajectory)| self.read(*group, trajectory));
        let ended: Vec<Rollout<TransitionId>> = ended.collect();
        // Before the first update of a stage only the rollouts tell which weights these are.
        let drawn = ended.iter().flat_map(|rollout| &rollout.calls).map(|call| call.policy_version).max();
        self.state.policy_version = self.state.policy_version.max(drawn.unwrap_or(0));
        if self.config.start_share < 1.0 {
            metrics::scalar("carried_in", gathered.carried_in as f64)?;
            metrics::scalar("carried_out", gathered.carried_out as f64)?;
            if let Some((mean, most)) = batch::staleness(&ended, self.state.policy_version) {
                metrics::scalar("staleness_mean", mean)?;
                metrics::scalar("staleness_max", most)?;
            }
        }
        Ok(ended)
    }

    fn read(&self, group: usize, trajectory: &Trajectory) -> Rollout<TransitionId> {
        let is_graded = trajectory.is_graded();
        let trains =
            |role: &str| self.config.agent_roles.is_empty() || self.config.agent_roles.iter().any(|r| r == role);
        let calls = trajectory.transitions().into_iter().map(|transition| Call {
            id: transition.id(),
            is_trained: transition.is_trainable() && trains(&transition.agent_role()),
            completion_tokens: transition.completion_tokens(),
            policy_version: transition.policy_version(),
        });
        Rollout {
            group,
            reward: if is_graded { trajectory.total(&self.config.dimension) } else { None },
            is_malformed: is_graded && trajectory.outcome_kind() != "completed",
            calls: calls.collect(),
        }
    }

    /// Trains on a batch and records what it found.
    fn update(&mut self, entries: &[(TransitionId, f64)]) -> Result<(), AlgorithmError> {
        #[expect(clippy::cast_possible_truncation, reason = "the host's weights are f32")]
        let entries: Vec<Entry> =
            entries.iter().map(|(id, advantage)| Entry::new(id.clone(), Stream::Rl, *advantage as f32)).collect();
        let loss = self.config.loss();
        if self.config.correction.is_some() {
            // Without anchors the host takes the weights that drew for those of the start, and nothing is corrected.
            let ids: Vec<TransitionId> = entries.iter().map(|entry| entry.transition().clone()).collect();
            policy::anchor(&Model::Policy, &ids)?;
        }
        let step = OptimiserStep {
            weight_decay: self.config.weight_decay,
            gradient_norm_max: self.config.gradient_norm_max,
            ..OptimiserStep::new(self.config.learning_rate)
        };
        let step = self.config.schedule().apply(step, self.state.steps);
        for update in 0..self.config.updates_per_step {
            let found = policy::forward_backward(&Model::Policy, &entries, &loss)?;
            let stepped = policy::optimiser_step(&Model::Policy, &step)?;
            let skipped = stepped.get("skipped").unwrap_or(0.0);
            if let Some(version) = stepped.get("policy-version") {
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the host counts versions")]
                let version = version as u64;
                self.state.policy_version = version;
            }
            self.state.skipped_in_a_row = if skipped > 0.0 { self.state.skipped_in_a_row + 1 } else { 0 };
            if update + 1 == self.config.updates_per_step {
                record(&found, &stepped, &step)?;
            }
            if self.state.skipped_in_a_row > SKIPPED_STEPS_MAX {
                let text = format!("the gradient was not finite in {} updates in a row", self.state.skipped_in_a_row);
                return Err(AlgorithmError::Other(text));
            }
        }
        Ok(())
    }
}

/// Records what the last update of a step found.
fn record(found: &Numbers, stepped: &Numbers, step: &OptimiserStep) -> Result<(), AlgorithmError> {
    let numbers = [
        ("loss", found.get("loss")),
        ("entropy", found.get("entropy")),
        ("kl", found.get("approximate-kl")),
        ("reference_kl", found.get("reference-kl")),
        ("clip_fraction", found.get("clip-fraction")),
        ("ratio_max", found.get("ratio-max")),
        ("mismatch_mean", found.get("mismatch-mean")),
        ("mismatch_max", found.get("mismatch-max")),
        ("trained_tokens", found.get("trained-tokens")),
        ("total_tokens", found.get("total-tokens")),
        ("gradient_norm", stepped.get("gradient-norm")),
        ("skipped", stepped.get("skipped")),
        ("learning_rate", Some(step.learning_rate)),
    ];
    for (name, value) in numbers {
        // A gradient that is not finite has no finite norm, and metrics take finite numbers only.
        if let Some(value) = value.filter(|value| value.is_finite()) {
            metrics::scalar(name, value)?;
        }
    }
    Ok(())
}

fulgurite_sdk::algorithm!(Grpo);
