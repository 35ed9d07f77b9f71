//! The optimiser and how often it steps.

use fulgurite_sdk::algorithm::policy::OptimiserStep;
use fulgurite_sdk::algorithm::schedule::{Decay, Schedule};
use serde::{Deserialize, Serialize};

use super::{above_zero, at_least_one, not_negative};

/// Keys about the optimiser.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OptimiserSection {
    /// How often the rollouts of one step are gone through. 1.
    pub updates_per_step: u32,
    /// Optimiser steps on the way: the step's groups, shuffled, are split into so many parts. 1: then, with one update, every
    /// ratio is 1 and nothing is clipped.
    pub mini_batches: u32,
    /// Step size. 3e-4: right for tiny models from scratch; 1e-5 for adapters and 1e-6 for large models.
    pub learning_rate: f64,
    /// Steps whose size grows linearly up to `learning_rate`. 0.
    pub warm_up_steps: u64,
    /// What the step size does after that: `constant`, `linear` or `cosine`, down to `learning_rate_min_ratio` of it at the
    /// last of `steps`. `constant`.
    pub schedule: Decay,
    /// Smallest step size as a share of `learning_rate`, 0 to 1. 0; `constant` never gets there.
    pub learning_rate_min_ratio: f64,
    /// Decoupled weight decay. 0.
    pub weight_decay: f64,
    /// Global gradient norm above which gradients are scaled down. 1; none does not clip.
    pub gradient_norm_max: Option<f64>,
}

impl Default for OptimiserSection {
    fn default() -> Self {
        Self {
            updates_per_step: 1,
            mini_batches: 1,
            learning_rate: 3e-4,
            warm_up_steps: 0,
            schedule: Decay::Constant,
            learning_rate_min_ratio: 0.0,
            weight_decay: 0.0,
            gradient_norm_max: Some(1.0),
        }
    }
}

impl OptimiserSection {
    pub(super) fn check(&self, steps: u64) -> Result<(), String> {
        not_negative("learning_rate", self.learning_rate)?;
        not_negative("weight_decay", self.weight_decay)?;
        at_least_one("updates_per_step", self.updates_per_step.into())?;
        at_least_one("mini_batches", self.mini_batches.into())?;
        above_zero("gradient_norm_max", self.gradient_norm_max)?;
        self.course(steps).check()
    }

    const fn course(&self, steps: u64) -> Schedule {
        Schedule {
            warm_up_steps: self.warm_up_steps,
            decay: self.schedule,
            steps: Some(steps),
            ratio_min: self.learning_rate_min_ratio,
        }
    }

    /// The optimiser's step in step `number` of `steps`, with this learning rate in place of the section's where one is given.
    #[must_use]
    pub fn at(&self, number: u64, steps: u64, learning_rate: Option<f64>) -> OptimiserStep {
        let step = OptimiserStep {
            weight_decay: self.weight_decay,
            gradient_norm_max: self.gradient_norm_max,
            ..OptimiserStep::new(learning_rate.unwrap_or(self.learning_rate))
        };
        self.course(steps).apply(step, number)
    }
}
