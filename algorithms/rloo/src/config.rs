//! The config.

use fulgurite_policy_gradient::config::{KlPlacement, Preset, Sections, Settings};
use fulgurite_sdk::algorithm::policy::{Aggregation, RatioLevel};
use serde::{Deserialize, Serialize};

/// What is clipped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// The probability of a whole rollout, as TRL's trainer: one ratio, and the mean over rollouts.
    #[default]
    Sequence,
    /// That of each token, and the mean over tokens.
    Token,
}

/// Config of RLOO.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// What is clipped: `sequence` or `token`; sets the defaults of `ratio_level` and `aggregation`. `sequence`.
    pub level: Level,
    /// What all plugins share.
    #[serde(flatten)]
    pub sections: Sections,
    /// Whether advantages are divided by their deviation over the whole step. False.
    pub normalise_by_batch: bool,
}

impl Config {
    /// The config with nothing left open.
    ///
    /// # Errors
    /// Names the first field that makes no sense; the text says what would.
    pub fn settle(&self) -> Result<Settings, String> {
        let preset = Preset { kl_placement: KlPlacement::Reward, ..Preset::default() };
        let settings = self.sections.settle(&match self.level {
            Level::Sequence => Preset {
                ratio_level: RatioLevel::SequenceSum,
                aggregation: Aggregation::SequenceMeanTokenSum,
                ..preset
            },
            Level::Token => preset,
        })?;
        settings.rollouts.check_comparable()?;
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
        let settings = config.settle().unwrap();
        assert_eq!(settings.loss.ratio_level, RatioLevel::SequenceSum);
        assert_eq!(settings.loss.kl_placement, KlPlacement::Reward);
        assert_eq!(read(&serde_json::to_string(&Flat(config.clone())).unwrap()), config);
    }

    #[test]
    fn the_level_sets_ratio_and_aggregation_together() {
        let loss = read(r#"{"level":"token"}"#).settle().unwrap().loss;
        assert_eq!((loss.ratio_level, loss.aggregation), (RatioLevel::Token, Aggregation::TokenMean));
        assert!(read(r#"{"group_size":1}"#).settle().unwrap_err().starts_with("group_size"));
    }
}
