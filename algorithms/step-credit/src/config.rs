//! The config.

use fulgurite_credit::group::Estimator;
use fulgurite_policy_gradient::config::{self, Preset, Sections, Settings};
use serde::{Deserialize, Serialize};

/// How the reward of a rollout becomes advantages of its calls.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Every call has the advantage of its rollout (`LightningRL`, arXiv 2508.03680).
    Identical,
    /// The same, discounted per call from the last one backwards (the turn discount of AReaL's agent proxy).
    TurnDiscount,
    /// The advantage of the rollout plus that among calls that were made in the same state (GiGPO, arXiv 2505.10978).
    #[default]
    Gigpo,
}

/// What makes two states the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Anchor {
    /// What the call saw that no earlier call had seen: the last observation.
    #[default]
    Observation,
    /// All that the call saw, the whole history included.
    Prompt,
}

/// Config of step-level credit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// `identical`, `turn-discount` or `gigpo`. `gigpo`.
    pub method: Method,
    /// What all plugins share.
    #[serde(flatten)]
    pub sections: Sections,
    /// γ, per call, 0 to 1: what an advantage (`turn-discount`) or a reward (`gigpo`) is worth one call earlier. 0.95; `identical`
    /// has none.
    pub turn_discount: f64,
    /// ω of `gigpo`: weight of the advantage among calls in the same state. 1.
    pub step_weight: f64,
    /// What makes two states of `gigpo` the same: `observation` or `prompt`. `observation`.
    pub anchor: Anchor,
    /// Added to the standard deviation. 1e-4.
    pub epsilon: f64,
    /// Whether advantages are divided by the standard deviation. True.
    pub normalise_by_std: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            method: Method::Gigpo,
            sections: Sections::default(),
            turn_discount: 0.95,
            step_weight: 1.0,
            anchor: Anchor::Observation,
            epsilon: 1e-4,
            normalise_by_std: true,
        }
    }
}

impl Config {
    /// The config with nothing left open.
    ///
    /// # Errors
    /// Names the first field that makes no sense; the text says what would.
    pub fn settle(&self) -> Result<Settings, String> {
        let settings = self.sections.settle(&Preset::default())?;
        settings.rollouts.check_comparable()?;
        config::share("turn_discount", self.turn_discount)?;
        config::not_negative("step_weight", self.step_weight)?;
        config::not_negative("epsilon", self.epsilon)?;
        Ok(settings)
    }

    /// How rewards of whole rollouts become advantages.
    #[must_use]
    pub const fn estimator(&self) -> Estimator {
        if self.normalise_by_std { Estimator::Grpo { epsilon: self.epsilon } } else { Estimator::Centred }
    }

    /// What is added to deviations; none where nothing is divided by them.
    #[must_use]
    pub const fn divides_by(&self) -> Option<f64> {
        if self.normalise_by_std { Some(self.epsilon) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use fulgurite_policy_gradient::Flat;

    use super::*;

    fn read(json: &str) -> Config {
        serde_json::from_str::<Flat<Config>>(json).unwrap().0
    }

    #[test]
    fn defaults_are_sound_and_survive_json() {
        let config = Config::default();
        config.settle().unwrap();
        assert_eq!(read(&serde_json::to_string(&Flat(config.clone())).unwrap()), config);
        assert_eq!(read(r#"{"method":"identical","anchor":"prompt"}"#).anchor, Anchor::Prompt);
        assert_eq!(read(r#"{"method":"turn-discount"}"#).method, Method::TurnDiscount);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (json, field) in [
            (r#"{"turn_discount":1.5}"#, "turn_discount"),
            (r#"{"step_weight":-1}"#, "step_weight"),
            (r#"{"epsilon":-1}"#, "epsilon"),
            (r#"{"group_size":1}"#, "group_size"),
        ] {
            let refused = read(json).settle().unwrap_err();
            assert!(refused.starts_with(field), "{json}: {refused}");
        }
    }
}
