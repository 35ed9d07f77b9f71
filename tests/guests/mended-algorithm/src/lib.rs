//! The nasty algorithm with its faults mended: same config, same state, and every step trains on a demonstration.

use fulgurite_sdk::algorithm::policy::{self, Entry, Loss, Model, OptimiserStep, Stream};
use fulgurite_sdk::algorithm::trajectories::{self, Message};
use fulgurite_sdk::algorithm::{Algorithm, AlgorithmError, Progress};
use fulgurite_sdk::{Role, json};
use serde::{Deserialize, Serialize};

/// As the nasty one has it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Of no meaning any more.
    pub behaviour: String,
    /// Of no meaning any more.
    pub from_step: u64,
    /// After how many steps it is done.
    pub steps: u64,
}

/// As the nasty one has it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct State {
    /// Steps made.
    pub steps: u64,
    /// Of no meaning any more.
    pub ballast: String,
}

struct Mended {
    config: Config,
    state: State,
}

fulgurite_sdk::algorithm!(Mended);

impl Algorithm for Mended {
    const NAME: &'static str = "nasty";
    const VERSION: &'static str = "0.0.2";
    type Config = Config;
    type State = State;

    fn init(config: Config, saved: Option<State>) -> Result<Self, AlgorithmError> {
        Ok(Self { config, state: saved.unwrap_or_default() })
    }

    fn step(&mut self) -> Result<Progress, AlgorithmError> {
        let messages = [Message::text(Role::User, "find a room"), Message::text(Role::Assistant, "R07 is free")];
        let demonstration = trajectories::import(&messages, &[Role::Assistant], &json!({}))?;
        let entry = Entry::new(demonstration.id(), Stream::Ce, 1.0);
        policy::forward_backward(&Model::Policy, &[entry], &Loss::new())?;
        policy::optimiser_step(&Model::Policy, &OptimiserStep::new(1e-3))?;
        self.state.steps += 1;
        Ok(if self.state.steps >= self.config.steps { Progress::Done } else { Progress::Continue })
    }

    fn save(&self) -> State {
        self.state.clone()
    }
}
