//! REINFORCE, REINFORCE++ and REINFORCE++-baseline on whole agent rollouts. See the README.

pub mod advantage;
mod config;

use fulgurite_policy_gradient::{Flat, Learner, State, sample};
use fulgurite_sdk::algorithm::{Algorithm, AlgorithmError, Progress};

pub use config::{Baseline, Config, Variant};

/// The algorithm.
#[derive(Debug)]
pub struct Reinforce {
    config: Config,
    learner: Learner,
}

impl Algorithm for Reinforce {
    const NAME: &'static str = "reinforce";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    type Config = Flat<Config>;
    type State = State;

    fn init(Flat(config): Flat<Config>, saved: Option<State>) -> Result<Self, AlgorithmError> {
        let settings = config.settle().map_err(AlgorithmError::InvalidConfig)?;
        Ok(Self { config, learner: Learner::new(settings, saved) })
    }

    fn step(&mut self) -> Result<Progress, AlgorithmError> {
        let Some(rollouts) = self.learner.begin()? else { return Ok(Progress::Done) };
        let divergence = self.learner.divergence(&rollouts)?;
        let credits = advantage::credits(&rollouts, &divergence, &self.config);
        self.learner.learn(sample::samples(&rollouts, credits))?;
        Ok(self.learner.end())
    }

    fn save(&self) -> State {
        self.learner.save()
    }
}

fulgurite_sdk::algorithm!(Reinforce);
