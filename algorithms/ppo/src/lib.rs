//! Proximal policy optimisation (PPO) with a critic and multi-turn advantage estimation. See the README.

mod config;
mod critic;
pub mod estimate;

use fulgurite_policy_gradient::{Flat, Learner, Rollout, Sample, State, sample};
use fulgurite_sdk::algorithm::trajectories::TransitionId;
use fulgurite_sdk::algorithm::{Algorithm, AlgorithmError, Progress, metrics};

pub use config::{Config, Truncation};
use critic::Critic;

/// The algorithm.
#[derive(Debug)]
pub struct Ppo {
    config: Config,
    learner: Learner,
}

impl Algorithm for Ppo {
    const NAME: &'static str = "ppo";
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
        let graded = rollouts.iter().filter(|rollout| rollout.reward.is_some());
        let calls: Vec<TransitionId> = graded.flat_map(Rollout::trained).map(|call| call.id.clone()).collect();
        let values = critic::values(&calls)?;
        let found = estimate::estimate(&rollouts, &values, &divergence, &self.config);
        for (name, value) in &found.numbers {
            metrics::scalar(name, *value)?;
        }
        let step = self.learner.step();
        let settings = self.learner.settings();
        let rate = settings.optimiser.at(step, settings.rollouts.steps, Some(self.config.critic_learning_rate));
        let critic = Critic { lessons: &found.lessons, clip: self.config.value_clip, step: rate };
        let samples = sample::samples(&rollouts, found.credits.clone());
        let mut learn = |batch: &[&Sample]| critic.learn(batch);
        if step < self.config.critic_warm_up_steps {
            self.learner.learn_extra(&samples, &mut learn)?;
        } else {
            self.learner.learn_with(samples, &mut learn)?;
        }
        Ok(self.learner.end())
    }

    fn save(&self) -> State {
        self.learner.save()
    }
}

fulgurite_sdk::algorithm!(Ppo);
