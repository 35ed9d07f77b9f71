//! The config.

use fulgurite_policy_gradient::config::{self, Filter, Preset, RolloutSection, Sections, Settings};
use serde::{Deserialize, Serialize};

/// What forks are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Rollouts of one tree are compared with each other and with those of the item's other trees, and all are trained on
    /// (Tree-GRPO, arXiv 2509.21240).
    #[default]
    Tree,
    /// Forks estimate what each state is worth, and are never trained on (VinePPO, arXiv 2410.01679).
    MonteCarlo,
}

/// Config of the tree methods.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// `tree` or `monte-carlo`. `tree`.
    pub method: Method,
    /// What all plugins share. Here `group_size` counts rollouts from the start, the roots of trees, and is 4 by default.
    #[serde(flatten)]
    pub sections: Sections,
    /// `tree`: rounds of forking, each of which may fork the forks of the one before. 1.
    pub rounds: u32,
    /// `tree`: forks of each tree in a round, each from a call chosen at random. 1: with 4 roots, 8 rollouts of an item.
    pub forks_per_tree: u32,
    /// `monte-carlo`: continuations from each call but the first, whose value is the mean of the group. 4; the paper has 9.
    pub forks_per_state: u32,
    /// `tree`: added to the standard deviation. 1e-4.
    pub epsilon: f64,
}

impl Default for Config {
    fn default() -> Self {
        let rollouts = RolloutSection { group_size: 4, ..RolloutSection::default() };
        Self {
            method: Method::Tree,
            sections: Sections { rollouts, ..Sections::default() },
            rounds: 1,
            forks_per_tree: 1,
            forks_per_state: 4,
            epsilon: 1e-4,
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
        config::not_negative("epsilon", self.epsilon)?;
        config::at_least_one("forks_per_state", self.forks_per_state.into())?;
        if settings.rollouts.start_share < 1.0 {
            return Err("start_share: use 1, forks need all rollouts that they fork".to_owned());
        }
        if settings.rollouts.lag_steps > 0 {
            return Err("lag_steps: use 0, forks are made by the weights that are trained".to_owned());
        }
        if settings.filter == Filter::Resample {
            return Err("zero_variance: use `keep` or `drop`, trees are not resampled".to_owned());
        }
        if settings.rollouts.overlong_tokens_max.is_some() {
            return Err("overlong_tokens_max: leave it out, a fork does not know how long its prefix is".to_owned());
        }
        if self.method == Method::MonteCarlo && settings.loss.reward_kl().is_some() {
            let text = "kl_placement: use `loss` with `monte-carlo`, the values of states know of rewards alone";
            return Err(text.to_owned());
        }
        let forks = u64::from(self.rounds) * u64::from(self.forks_per_tree);
        if self.method == Method::MonteCarlo || forks == 0 {
            settings.rollouts.check_comparable()?;
        }
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
        assert_eq!(read(r#"{"steps":3}"#).sections.rollouts.group_size, 4);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (json, field) in [
            (r#"{"epsilon":-1}"#, "epsilon"),
            (r#"{"forks_per_state":0}"#, "forks_per_state"),
            (r#"{"start_share":0.5}"#, "start_share"),
            (r#"{"lag_steps":1}"#, "lag_steps"),
            (r#"{"zero_variance":"resample"}"#, "zero_variance"),
            (r#"{"overlong_tokens_max":64}"#, "overlong_tokens_max"),
            (r#"{"method":"monte-carlo","group_size":1}"#, "group_size"),
            (r#"{"rounds":0,"group_size":1}"#, "group_size"),
            (r#"{"method":"monte-carlo","kl_coefficient":0.1,"kl_placement":"reward"}"#, "kl_placement"),
        ] {
            let refused = read(json).settle().unwrap_err();
            assert!(refused.starts_with(field), "{json}: {refused}");
        }
        read(r#"{"group_size":1}"#).settle().unwrap();
        read(r#"{"kl_coefficient":0.1,"kl_placement":"reward"}"#).settle().unwrap();
        read(r#"{"method":"monte-carlo","kl_coefficient":0.1}"#).settle().unwrap();
    }
}
