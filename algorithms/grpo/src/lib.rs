//! Group relative policy optimisation (GRPO) and its relatives on whole agent rollouts. See the README.

mod config;

use fulgurite_policy_gradient::{Flat, Learner, State, rollout, sample};
use fulgurite_sdk::algorithm::{Algorithm, AlgorithmError, Progress};

pub use config::{Config, Variant};

/// The algorithm.
#[derive(Debug)]
pub struct Grpo {
    config: Config,
    learner: Learner,
}

impl Algorithm for Grpo {
    const NAME: &'static str = "grpo";
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
        let advantages = rollout::advantages(&rollouts, self.config.estimator(), |one| divergence.reward(one));
        self.learner.learn(sample::identical(&rollouts, &advantages))?;
        Ok(self.learner.end())
    }

    fn save(&self) -> State {
        self.learner.save()
    }
}

fulgurite_sdk::algorithm!(Grpo);
