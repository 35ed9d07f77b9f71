//! The config and its variants.

use fulgurite_credit::group::Estimator;
use fulgurite_policy_gradient::config::{self, Filter, Objective, Preset, Sections, Settings};
use fulgurite_sdk::algorithm::policy::{Aggregation, RatioLevel};
use serde::{Deserialize, Serialize};

/// What a variant decides is the default of keys that are none; each of them can be given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// `DeepSeekMath` (arXiv 2402.03300), with the defaults of ALGORITHMS.md, section 0.
    #[default]
    Grpo,
    /// Dr.GRPO (2503.20783): no deviation, a constant normaliser, which `aggregation` must give.
    DrGrpo,
    /// DAPO (2503.14476): clip-higher, token mean, dynamic sampling; overlong shaping by `overlong_tokens_max`.
    Dapo,
    /// GSPO (2507.18071): one ratio per rollout, clipped very tightly.
    Gspo,
    /// CISPO (2506.13585): the ratio is clipped and held constant, no token loses its gradient.
    Cispo,
    /// SAPO (2511.20347): a soft gate in place of the clip.
    Sapo,
}

/// Config of GRPO and its relatives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// `grpo`, `dr-grpo`, `dapo`, `gspo`, `cispo` or `sapo`. `grpo`.
    pub variant: Variant,
    /// What all plugins share.
    #[serde(flatten)]
    pub sections: Sections,
    /// Added to the standard deviation. 1e-4.
    pub epsilon: f64,
    /// Whether advantages are divided by the group's standard deviation. None: as the variant says, only `dr-grpo` does not.
    pub normalise_by_std: Option<bool>,
}

impl Default for Config {
    fn default() -> Self {
        Self { variant: Variant::Grpo, sections: Sections::default(), epsilon: 1e-4, normalise_by_std: None }
    }
}

impl Config {
    fn preset(&self) -> Preset {
        let preset = Preset::default();
        match self.variant {
            Variant::Grpo | Variant::DrGrpo => preset,
            Variant::Dapo => Preset { filter: Filter::Resample, ..preset },
            Variant::Gspo => Preset {
                clip_low: 3e-4,
                clip_high: 4e-4,
                ratio_level: RatioLevel::SequenceMean,
                aggregation: Aggregation::SequenceMeanTokenMean,
                ..preset
            },
            Variant::Cispo => Preset { objective: Objective::Cispo, ..preset },
            Variant::Sapo => {
                Preset { objective: Objective::Sapo, aggregation: Aggregation::SequenceMeanTokenMean, ..preset }
            }
        }
    }

    /// The config with nothing left open.
    ///
    /// # Errors
    /// Names the first field that makes no sense; the text says what would.
    pub fn settle(&self) -> Result<Settings, String> {
        let settings = self.sections.settle(&self.preset())?;
        settings.rollouts.check_comparable()?;
        config::not_negative("epsilon", self.epsilon)?;
        if self.variant == Variant::DrGrpo && self.sections.loss.aggregation.is_none() {
            let text =
                "aggregation: variant `dr-grpo` needs { constant = LENGTH }, the most tokens that a rollout can draw";
            return Err(text.to_owned());
        }
        Ok(settings)
    }

    /// How rewards become advantages.
    #[must_use]
    pub fn estimator(&self) -> Estimator {
        if self.normalise_by_std.unwrap_or(self.variant != Variant::DrGrpo) {
            Estimator::Grpo { epsilon: self.epsilon }
        } else {
            Estimator::Centred
        }
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
        let json = serde_json::to_string(&Flat(config.clone())).unwrap();
        assert_eq!(read(&json), config);
        assert_eq!(read("{}"), config);
    }

    #[test]
    fn variants_set_defaults_and_each_of_them_can_be_given() {
        let settled = |json: &str| read(json).settle().unwrap();
        let gspo = settled(r#"{"variant":"gspo"}"#).loss;
        assert_eq!(
            (gspo.ratio_level, gspo.aggregation),
            (RatioLevel::SequenceMean, Aggregation::SequenceMeanTokenMean)
        );
        assert!((gspo.clip_low - 3e-4).abs() < 1e-9 && (gspo.clip_high - 4e-4).abs() < 1e-9);
        assert!((settled(r#"{"variant":"gspo","clip_low":0.1}"#).loss.clip_low - 0.1).abs() < 1e-6);
        assert_eq!(settled(r#"{"variant":"dapo"}"#).filter, Filter::Resample);
        assert_eq!(settled(r#"{"variant":"dapo","zero_variance":"drop"}"#).filter, Filter::Drop);
        assert_eq!(settled(r#"{"variant":"cispo"}"#).loss.objective, Objective::Cispo);
        assert_eq!(settled(r#"{"variant":"sapo"}"#).loss.objective, Objective::Sapo);
        assert_eq!(read("{}").estimator(), Estimator::Grpo { epsilon: 1e-4 });
        assert_eq!(read(r#"{"variant":"dr-grpo"}"#).estimator(), Estimator::Centred);
        assert_eq!(read(r#"{"normalise_by_std":false}"#).estimator(), Estimator::Centred);
        settled(r#"{"variant":"dr-grpo","aggregation":{"constant":64}}"#);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (json, field) in [
            (r#"{"group_size":1}"#, "group_size"),
            (r#"{"epsilon":-1}"#, "epsilon"),
            (r#"{"variant":"dr-grpo"}"#, "aggregation"),
            (r#"{"variant":"dapo","start_share":0.5}"#, "zero_variance"),
        ] {
            let refused = read(json).settle().unwrap_err();
            assert!(refused.starts_with(field), "{json}: {refused}");
        }
        assert!(serde_json::from_str::<Flat<Config>>(r#"{"variant":"gpro"}"#).is_err());
        assert!(
            serde_json::from_str::<Flat<Config>>(r#"{"group_sise":4}"#).unwrap_err().to_string().contains("group_sise")
        );
    }
}
