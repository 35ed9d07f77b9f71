//! Credit for single calls without a critic: LightningRL, turn discount and GiGPO. See the README.

pub mod advantage;
mod config;

use fulgurite_policy_gradient::{Flat, Learner, State, sample};
use fulgurite_sdk::algorithm::{Algorithm, AlgorithmError, Progress, metrics};

pub use config::{Anchor, Config, Method};

/// The algorithm.
#[derive(Debug)]
pub struct StepCredit {
    config: Config,
    learner: Learner,
}

impl Algorithm for StepCredit {
    const NAME: &'static str = "step-credit";
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
        let found = advantage::credits(&rollouts, &divergence, &self.config);
        if let Some(share) = found.anchored_share {
            metrics::scalar("anchored_share", share)?;
        }
        self.learner.learn(sample::samples(&rollouts, found.credits))?;
        Ok(self.learner.end())
    }

    fn save(&self) -> State {
        self.learner.save()
    }
}

fulgurite_sdk::algorithm!(StepCredit);
