//! The config.

use fulgurite_policy_gradient::config::{self, KlPlacement, Preset, Sections, Settings};
use serde::{Deserialize, Serialize};

/// What a rollout that was cut off by a limit of tokens, turns or context is worth from there on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Truncation {
    /// What the critic expects there.
    #[default]
    Bootstrap,
    /// Nothing: the limit is a part of the item.
    Terminal,
}

/// Config of PPO.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// What all plugins share.
    #[serde(flatten)]
    pub sections: Sections,
    /// γ, per token that the policy draws, 0 to 1; tool results do not count. 1.
    pub discount: f64,
    /// λ, 0 to 1. 1: a critic that knows nothing yet then keeps no reward from early calls.
    pub lambda: f64,
    /// Whether advantages are whitened over all tokens of the step. True.
    pub whiten: bool,
    /// `bootstrap` or `terminal`. `bootstrap`.
    pub truncation: Truncation,
    /// Step size of the critic. 3e-4: right for tiny models from scratch; 1e-5 for large models.
    pub critic_learning_rate: f64,
    /// The critic's values are kept so near to those that the returns were estimated with, in units of the reward. 0.2; none
    /// does not clip.
    pub value_clip: Option<f64>,
    /// Steps at the start of the stage in which the critic learns alone. 0.
    pub critic_warm_up_steps: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            sections: Sections::default(),
            discount: 1.0,
            lambda: 1.0,
            whiten: true,
            truncation: Truncation::Bootstrap,
            critic_learning_rate: 3e-4,
            value_clip: Some(0.2),
            critic_warm_up_steps: 0,
        }
    }
}

impl Config {
    /// The config with nothing left open.
    ///
    /// # Errors
    /// Names the first field that makes no sense; the text says what would.
    pub fn settle(&self) -> Result<Settings, String> {
        let preset = Preset { kl_placement: KlPlacement::Reward, ..Preset::default() };
        let settings = self.sections.settle(&preset)?;
        config::share("discount", self.discount)?;
        config::share("lambda", self.lambda)?;
        config::not_negative("critic_learning_rate", self.critic_learning_rate)?;
        config::above_zero("value_clip", self.value_clip)?;
        Ok(settings)
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
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (json, field) in [
            (r#"{"discount":1.5}"#, "discount"),
            (r#"{"lambda":-0.1}"#, "lambda"),
            (r#"{"critic_learning_rate":-1}"#, "critic_learning_rate"),
            (r#"{"value_clip":0}"#, "value_clip"),
        ] {
            let refused = read(json).settle().unwrap_err();
            assert!(refused.starts_with(field), "{json}: {refused}");
        }
        read(r#"{"group_size":1,"value_clip":null}"#).settle().unwrap();
    }
}
