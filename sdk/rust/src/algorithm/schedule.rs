//! How a learning rate changes over a stage. Pure: a function of the step's number, so that a repeated step has the same rate.

use serde::{Deserialize, Serialize};

use super::policy::OptimiserStep;

/// The course of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// It stays.
    #[default]
    Constant,
    /// It falls in equal steps.
    Linear,
    /// It falls along half a cosine: slowly at both ends (SGDR, arXiv 1608.03983, without restarts).
    Cosine,
}

/// A learning rate's course over one stage: up linearly from nearly 0 while it warms up, then by its decay.
///
/// ```
/// use fulgurite_sdk::algorithm::policy::OptimiserStep;
/// use fulgurite_sdk::algorithm::schedule::{Decay, Schedule};
///
/// let schedule = Schedule { warm_up_steps: 2, decay: Decay::Linear, steps: Some(7), ratio_min: 0.2 };
/// let rates = [0, 1, 2, 4, 6, 9].map(|step| schedule.apply(OptimiserStep::new(1.0), step).learning_rate);
/// assert!(rates.iter().zip([0.5, 1.0, 1.0, 0.6, 0.2, 0.2]).all(|(rate, expected)| (rate - expected).abs() < 1e-12));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Schedule {
    /// Steps of warm-up; the step after them is the first with the whole rate. 0 is none.
    pub warm_up_steps: u64,
    /// What follows.
    pub decay: Decay,
    /// Steps of the stage, warm-up included; the last one has the smallest rate. Only `Constant` does without.
    pub steps: Option<u64>,
    /// The smallest rate as a share of the whole one, 0 to 1.
    pub ratio_min: f64,
}

impl Schedule {
    /// Names the first field that makes no sense, as `learning_rate_min_ratio` and `schedule` of a plugin's config.
    ///
    /// # Errors
    /// The text says what would.
    pub fn check(&self) -> Result<(), String> {
        if !(0.0..=1.0).contains(&self.ratio_min) {
            return Err(format!("learning_rate_min_ratio: {} is not in 0 to 1", self.ratio_min));
        }
        if self.decay != Decay::Constant && self.steps.is_none() {
            return Err("schedule: only `constant` does without `steps`, the others must know the end".to_owned());
        }
        Ok(())
    }

    /// What the learning rate of a step is multiplied with; `step` counts from 0.
    #[must_use]
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warm_up_steps {
            return (step + 1) as f64 / self.warm_up_steps as f64;
        }
        let last = self.steps.unwrap_or(0).saturating_sub(1).saturating_sub(self.warm_up_steps);
        let gone = if last == 0 { 0.0 } else { ((step - self.warm_up_steps) as f64 / last as f64).min(1.0) };
        let left = match self.decay {
            Decay::Constant => return 1.0,
            Decay::Linear => 1.0 - gone,
            Decay::Cosine => f64::midpoint(1.0, (std::f64::consts::PI * gone).cos()),
        };
        self.ratio_min + (1.0 - self.ratio_min) * left
    }

    /// Scales a step's learning rate.
    #[must_use]
    pub fn apply(&self, step: OptimiserStep, number: u64) -> OptimiserStep {
        OptimiserStep { learning_rate: step.learning_rate * self.factor(number), ..step }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(decay: Decay, warm_up_steps: u64, steps: u64, ratio_min: f64) -> Schedule {
        Schedule { warm_up_steps, decay, steps: Some(steps), ratio_min }
    }

    #[test]
    fn constant_is_warm_up_alone_and_needs_no_end() {
        let schedule = Schedule { warm_up_steps: 4, ..Schedule::default() };
        schedule.check().unwrap();
        let factors = [0, 1, 2, 3, 4, 1_000].map(|step| schedule.factor(step));
        assert_eq!(factors.map(f64::to_bits), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0].map(f64::to_bits));
        assert_eq!(Schedule::default().factor(0).to_bits(), 1.0_f64.to_bits());
    }

    #[test]
    fn decays_start_whole_end_at_the_smallest_and_never_rise() {
        for decay in [Decay::Linear, Decay::Cosine] {
            let schedule = schedule(decay, 3, 24, 0.1);
            let factors: Vec<f64> = (3..30).map(|step| schedule.factor(step)).collect();
            assert!((factors[0] - 1.0).abs() < 1e-12 && (factors[20] - 0.1).abs() < 1e-12, "{factors:?}");
            assert!(factors.windows(2).all(|pair| pair[0] >= pair[1]), "{factors:?}");
            assert!((schedule.factor(13) - 0.55).abs() < 1e-12, "the middle is the mean: {factors:?}");
        }
        let quarter = schedule(Decay::Cosine, 0, 5, 0.0).factor(1);
        assert!((quarter - f64::midpoint(1.0, std::f64::consts::FRAC_1_SQRT_2)).abs() < 1e-12, "{quarter}");
    }

    #[test]
    fn a_stage_shorter_than_its_warm_up_or_of_one_step_has_a_rate() {
        for decay in [Decay::Constant, Decay::Linear, Decay::Cosine] {
            assert_eq!(schedule(decay, 0, 1, 0.0).factor(0).to_bits(), 1.0_f64.to_bits());
            assert_eq!(schedule(decay, 10, 5, 0.0).factor(4).to_bits(), 0.5_f64.to_bits());
        }
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        assert!(schedule(Decay::Linear, 0, 5, 1.5).check().unwrap_err().starts_with("learning_rate_min_ratio"));
        assert!(schedule(Decay::Linear, 0, 5, f64::NAN).check().is_err());
        let endless = Schedule { decay: Decay::Cosine, ..Schedule::default() };
        assert!(endless.check().unwrap_err().starts_with("schedule"));
    }
}
