//! The config and its checks.

use fulgurite_sdk::Role;
use fulgurite_sdk::algorithm::policy::Model;
use fulgurite_sdk::algorithm::schedule::{Decay, Schedule};
use serde::{Deserialize, Serialize};

/// What the policy is called in `models`.
const POLICY: &str = "policy";

/// Config of supervised fine-tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Demonstrations per step. 32.
    pub batch_size: u32,
    /// Step size. 3e-4: right for tiny models from scratch; 1e-5 for adapters and 1e-6 for large models.
    pub learning_rate: f64,
    /// Steps whose size grows linearly up to `learning_rate`. 10.
    pub warm_up_steps: u64,
    /// Ends after so many steps. None: `epochs` decides.
    pub steps: Option<u64>,
    /// Ends when every demonstration was trained on so often, even before `steps`. None: `steps` decides; without either, 1.
    pub epochs: Option<u64>,
    /// What the step size does after that: `constant`, `linear` or `cosine`, down to `learning_rate_min_ratio` of it at the
    /// last of `steps`. `constant`.
    pub schedule: Decay,
    /// Smallest step size as a share of `learning_rate`, 0 to 1. 0; `constant` never gets there.
    pub learning_rate_min_ratio: f64,
    /// Decoupled weight decay. 0.
    pub weight_decay: f64,
    /// Global gradient norm above which gradients are scaled down. 1; none does not clip.
    pub gradient_norm_max: Option<f64>,
    /// Messages of these roles are trained on. Assistant alone.
    pub trainable_roles: Vec<Role>,
    /// Which models are trained, each on every batch: `policy`, or names of models beside it in the run's config. The policy.
    pub models: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            batch_size: 32,
            learning_rate: 3e-4,
            warm_up_steps: 10,
            steps: None,
            epochs: None,
            schedule: Decay::Constant,
            learning_rate_min_ratio: 0.0,
            weight_decay: 0.0,
            gradient_norm_max: Some(1.0),
            trainable_roles: vec![Role::Assistant],
            models: vec![POLICY.to_owned()],
        }
    }
}

impl Config {
    /// The step size's course.
    #[must_use]
    pub const fn schedule(&self) -> Schedule {
        Schedule {
            warm_up_steps: self.warm_up_steps,
            decay: self.schedule,
            steps: self.steps,
            ratio_min: self.learning_rate_min_ratio,
        }
    }

    /// The models that are trained, each with what its metrics begin with.
    pub fn trained(&self) -> impl Iterator<Item = (Model, String)> {
        self.models.iter().map(|name| match name.as_str() {
            POLICY => (Model::Policy, String::new()),
            name => (Model::Named(name.to_owned()), format!("{name}/")),
        })
    }

    /// After how many epochs the stage ends; none: it ends by steps alone.
    #[must_use]
    pub fn epochs_max(&self) -> Option<u64> {
        self.epochs.or(if self.steps.is_none() { Some(1) } else { None })
    }

    /// Names the first field that makes no sense.
    ///
    /// # Errors
    /// The text says what would.
    pub fn check(&self) -> Result<(), String> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if self.batch_size == 0 {
            return Err("batch_size: use at least 1".to_owned());
        }
        if !(self.learning_rate.is_finite() && self.learning_rate >= 0.0) {
            return Err(format!("learning_rate: {} is not a finite number of at least 0", self.learning_rate));
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return Err(format!("weight_decay: {} is not a finite number of at least 0", self.weight_decay));
        }
        self.schedule().check()?;
        if self.gradient_norm_max.is_some_and(|norm| !positive(norm)) {
            return Err("gradient_norm_max: use a finite number above 0".to_owned());
        }
        if self.trainable_roles.is_empty() {
            return Err("trainable_roles: name at least one role".to_owned());
        }
        if self.models.is_empty() {
            return Err(format!("models: name at least one, such as `{POLICY}`"));
        }
        let is_twice = |(place, name): (usize, &String)| self.models.iter().skip(place + 1).any(|other| other == name);
        if self.models.iter().enumerate().any(is_twice) {
            return Err("models: name each of them once".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_sound_and_survive_json() {
        let config = Config::default();
        config.check().unwrap();
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), config);
        assert_eq!(serde_json::from_str::<Config>("{}").unwrap(), config);
    }

    #[test]
    fn every_stage_ends() {
        let ends = |json: &str| {
            let config = serde_json::from_str::<Config>(json).unwrap();
            (config.steps, config.epochs_max())
        };
        assert_eq!(ends("{}"), (None, Some(1)));
        assert_eq!(ends(r#"{"steps":9}"#), (Some(9), None));
        assert_eq!(ends(r#"{"epochs":3}"#), (None, Some(3)));
        assert_eq!(ends(r#"{"steps":9,"epochs":3}"#), (Some(9), Some(3)));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let refused = |json: &str| serde_json::from_str::<Config>(json).unwrap().check().unwrap_err();
        for (json, field) in [
            (r#"{"batch_size":0}"#, "batch_size"),
            (r#"{"learning_rate":-1}"#, "learning_rate"),
            (r#"{"gradient_norm_max":0}"#, "gradient_norm_max"),
            (r#"{"trainable_roles":[]}"#, "trainable_roles"),
            (r#"{"weight_decay":-0.1}"#, "weight_decay"),
            (r#"{"models":[]}"#, "models"),
            (r#"{"models":["a","policy","a"]}"#, "models"),
            (r#"{"learning_rate_min_ratio":2}"#, "learning_rate_min_ratio"),
            (r#"{"schedule":"cosine","epochs":2}"#, "schedule"),
        ] {
            assert!(refused(json).starts_with(field), "{json}");
        }
        let unknown = serde_json::from_str::<Config>(r#"{"lerning_rate":1}"#).unwrap_err();
        assert!(unknown.to_string().contains("lerning_rate"));
    }
}
