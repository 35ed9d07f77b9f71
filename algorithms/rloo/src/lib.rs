//! REINFORCE leave-one-out (RLOO) on whole agent rollouts. See the README.

mod config;

use fulgurite_credit::group::Estimator;
use fulgurite_credit::statistics::{mean, standard_deviation};
use fulgurite_policy_gradient::{Flat, Learner, State, rollout, sample};
use fulgurite_sdk::algorithm::{Algorithm, AlgorithmError, Progress};

pub use config::{Config, Level};

/// Added to the deviation of the batch. 1e-4: TRL.
const BATCH_EPSILON: f64 = 1e-4;

/// The algorithm.
#[derive(Debug)]
pub struct Rloo {
    config: Config,
    learner: Learner,
}

impl Algorithm for Rloo {
    const NAME: &'static str = "rloo";
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
        let advantages = rollout::advantages(&rollouts, Estimator::LeaveOneOut, |one| divergence.reward(one));
        let advantages = if self.config.normalise_by_batch { normalised(&advantages) } else { advantages };
        self.learner.learn(sample::identical(&rollouts, &advantages))?;
        Ok(self.learner.end())
    }

    fn save(&self) -> State {
        self.learner.save()
    }
}

/// `(A − mean) / (std + 1e-4)` over the rollouts of the step. What is 0 stays so: the mean is 0 but for rounding, which must not
/// make groups of equal rewards teach something. Pure.
#[must_use]
pub fn normalised(advantages: &[Option<f64>]) -> Vec<Option<f64>> {
    let all: Vec<f64> = advantages.iter().flatten().copied().collect();
    let (mean, deviation) = (mean(&all), standard_deviation(&all) + BATCH_EPSILON);
    let of = |advantage: f64| if advantage == 0.0 { 0.0 } else { (advantage - mean) / deviation };
    advantages.iter().map(|advantage| advantage.map(of)).collect()
}

fulgurite_sdk::algorithm!(Rloo);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalised_over_the_batch_and_without_faults() {
        let found = normalised(&[Some(3.0), None, Some(1.0)]);
        let expected = 1.0 / (2.0_f64.sqrt() + 1e-4);
        assert!((found[0].unwrap() - expected).abs() < 1e-12 && (found[2].unwrap() + expected).abs() < 1e-12);
        assert_eq!(found[1], None);
        assert_eq!(normalised(&[Some(0.0), Some(0.0)]), [Some(0.0), Some(0.0)]);
        // The sum of the others is not 0 in binary.
        assert_eq!(normalised(&[Some(0.1), Some(0.2), Some(-0.3), Some(0.0)])[3], Some(0.0));
    }
}
