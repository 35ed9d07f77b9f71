//! Supervised fine-tuning on demonstrations: cross-entropy on what the demonstrated assistant says. See the README.

mod config;

use fulgurite_sdk::Role;
use fulgurite_sdk::algorithm::policy::{self, Entry, Loss, Model, OptimiserStep, Stream};
use fulgurite_sdk::algorithm::rollouts::{self, Item, Split};
use fulgurite_sdk::algorithm::trajectories::{self, Message};
use fulgurite_sdk::algorithm::{Algorithm, AlgorithmError, HostError, Progress, metrics};
use fulgurite_sdk::json;
use serde::{Deserialize, Serialize};

pub use config::Config;

/// Steps in a row that may be skipped because a gradient was not finite. More means that the weights are lost.
const SKIPPED_STEPS_MAX: u32 = 5;

/// What the next step needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Steps made.
    steps: u64,
    /// The last so many of them were skipped.
    skipped_in_a_row: u32,
}

/// What an item's reference holds.
#[derive(Debug, Deserialize)]
struct Demonstration {
    messages: Vec<Message>,
}

/// The algorithm.
#[derive(Debug)]
pub struct Sft {
    config: Config,
    state: State,
}

impl Algorithm for Sft {
    const NAME: &'static str = "sft";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    type Config = Config;
    type State = State;

    fn init(config: Config, saved: Option<State>) -> Result<Self, AlgorithmError> {
        config.check().map_err(AlgorithmError::InvalidConfig)?;
        Ok(Self { config, state: saved.unwrap_or_default() })
    }

    fn step(&mut self) -> Result<Progress, AlgorithmError> {
        if self.is_done() {
            return Ok(Progress::Done);
        }
        let items = rollouts::next_items(Split::Train, self.config.batch_size)?;
        let epoch = items.first().map_or(0, Item::epoch);
        // A batch may reach into the next epoch; what lies beyond the last one is not trained on.
        let within = |item: &&Item| self.config.epochs_max().is_none_or(|epochs| item.epoch() < epochs);
        let batch = items.iter().filter(within).map(|item| self.entry(item)).collect::<Result<Vec<_>, _>>()?;
        if batch.is_empty() {
            return Ok(Progress::Done);
        }
        let step = OptimiserStep {
            weight_decay: self.config.weight_decay,
            gradient_norm_max: self.config.gradient_norm_max,
            ..OptimiserStep::new(self.config.learning_rate)
        };
        let step = self.config.schedule().apply(step, self.state.steps);
        let mut skipped = false;
        for (model, prefix) in self.config.trained() {
            skipped |= train(&model, &prefix, &batch, &step)?;
        }
        self.state.steps += 1;
        self.state.skipped_in_a_row = if skipped { self.state.skipped_in_a_row + 1 } else { 0 };
        scalars(
            "",
            [
                ("learning_rate", Some(step.learning_rate)),
                ("demonstrations", Some(batch.len() as f64)),
                ("epoch", Some(epoch as f64)),
            ],
        )?;
        if self.state.skipped_in_a_row > SKIPPED_STEPS_MAX {
            let text = format!("the gradient was not finite in {} steps in a row", self.state.skipped_in_a_row);
            return Err(AlgorithmError::Other(text));
        }
        Ok(if self.is_done() { Progress::Done } else { Progress::Continue })
    }

    fn save(&self) -> State {
        self.state
    }
}

/// Trains a model on a batch, and says whether its step was skipped.
fn train(model: &Model, prefix: &str, batch: &[Entry], step: &OptimiserStep) -> Result<bool, AlgorithmError> {
    let found = policy::forward_backward(model, batch, &Loss::new())?;
    let stepped = policy::optimiser_step(model, step)?;
    let skipped = stepped.get("skipped").unwrap_or(0.0);
    scalars(
        prefix,
        [
            ("cross_entropy", found.get("cross-entropy")),
            ("entropy", found.get("entropy")),
            ("trained_tokens", found.get("trained-tokens")),
            ("total_tokens", found.get("total-tokens")),
            ("gradient_norm", stepped.get("gradient-norm")),
            ("skipped", Some(skipped)),
        ],
    )?;
    Ok(skipped > 0.0)
}

fn scalars<const N: usize>(prefix: &str, numbers: [(&str, Option<f64>); N]) -> Result<(), AlgorithmError> {
    for (name, value) in numbers {
        // A gradient that is not finite has no finite norm, and metrics take finite numbers only.
        if let Some(value) = value.filter(|value| value.is_finite()) {
            metrics::scalar(&format!("{prefix}{name}"), value)?;
        }
    }
    Ok(())
}

impl Sft {
    fn is_done(&self) -> bool {
        self.config.steps.is_some_and(|steps| self.state.steps >= steps)
    }

    /// Takes an item's demonstration as an entry of the batch.
    fn entry(&self, item: &Item) -> Result<Entry, AlgorithmError> {
        let id = item.id();
        let demonstration: Demonstration = item.reference()?;
        let roles: &[Role] = &self.config.trainable_roles;
        if !demonstration.messages.iter().any(|message| roles.contains(&message.role)) {
            let text = format!("reference of item `{}`: no message is of a role in `trainable_roles`", id.0);
            return Err(HostError::InvalidArgument(text).into());
        }
        let transition = trajectories::import(&demonstration.messages, roles, &json!({"item": id.0}))?;
        Ok(Entry::new(transition.id(), Stream::Ce, 1.0))
    }
}

fulgurite_sdk::algorithm!(Sft);
