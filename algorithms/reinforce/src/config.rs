//! The config and its variants.

use fulgurite_policy_gradient::config::{self, Objective, Preset, Sections, Settings};
use serde::{Deserialize, Serialize};

/// What a variant decides is the default of keys that are none; each of them can be given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// Williams (1992), with the mean of the batch as baseline.
    #[default]
    Reinforce,
    /// REINFORCE++ (arXiv 2501.03262): returns per token, whitened over all tokens of the batch, with a clip.
    ReinforcePlusPlus,
    /// The same with the mean of the group as baseline, before whitening.
    ReinforcePlusPlusBaseline,
}

/// What returns are compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Baseline {
    /// Nothing.
    None,
    /// The mean reward of the step's rollouts.
    Batch,
    /// The mean reward of the rollouts of the same item.
    Group,
}

/// Config of REINFORCE and its relatives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// `reinforce`, `reinforce-plus-plus` or `reinforce-plus-plus-baseline`. `reinforce`.
    pub variant: Variant,
    /// What all plugins share.
    #[serde(flatten)]
    pub sections: Sections,
    /// Discount per token that the policy draws, 0 to 1; tool results do not count. 1.
    pub discount: f64,
    /// `none`, `batch` or `group`. None: as the variant says.
    pub baseline: Option<Baseline>,
    /// Whether advantages are whitened over all tokens of the step. None: as the variant says.
    pub whiten: Option<bool>,
}

impl Default for Config {
    fn default() -> Self {
        Self { variant: Variant::Reinforce, sections: Sections::default(), discount: 1.0, baseline: None, whiten: None }
    }
}

impl Config {
    /// What returns are compared with.
    #[must_use]
    pub fn baseline(&self) -> Baseline {
        self.baseline.unwrap_or(match self.variant {
            Variant::Reinforce => Baseline::Batch,
            Variant::ReinforcePlusPlus => Baseline::None,
            Variant::ReinforcePlusPlusBaseline => Baseline::Group,
        })
    }

    /// Whether advantages are whitened.
    #[must_use]
    pub fn whitens(&self) -> bool {
        self.whiten.unwrap_or(self.variant != Variant::Reinforce)
    }

    /// The config with nothing left open.
    ///
    /// # Errors
    /// Names the first field that makes no sense; the text says what would.
    pub fn settle(&self) -> Result<Settings, String> {
        let preset = match self.variant {
            Variant::Reinforce => Preset { objective: Objective::Reinforce, ..Preset::default() },
            Variant::ReinforcePlusPlus | Variant::ReinforcePlusPlusBaseline => Preset::default(),
        };
        let preset = Preset { kl_placement: config::KlPlacement::Reward, ..preset };
        let settings = self.sections.settle(&preset)?;
        config::share("discount", self.discount)?;
        if self.baseline() == Baseline::Group {
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
    }

    #[test]
    fn variants_set_defaults_and_each_of_them_can_be_given() {
        let of = |json: &str| {
            let config = read(json);
            (config.baseline(), config.whitens(), config.settle().unwrap().loss.objective)
        };
        assert_eq!(of("{}"), (Baseline::Batch, false, Objective::Reinforce));
        assert_eq!(of(r#"{"variant":"reinforce-plus-plus"}"#), (Baseline::None, true, Objective::Ppo));
        assert_eq!(of(r#"{"variant":"reinforce-plus-plus-baseline"}"#), (Baseline::Group, true, Objective::Ppo));
        assert_eq!(of(r#"{"loss":"ppo","baseline":"none","whiten":true}"#), (Baseline::None, true, Objective::Ppo));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (json, field) in [
            (r#"{"discount":1.5}"#, "discount"),
            (r#"{"variant":"reinforce-plus-plus-baseline","group_size":1}"#, "group_size"),
        ] {
            let refused = read(json).settle().unwrap_err();
            assert!(refused.starts_with(field), "{json}: {refused}");
        }
        read(r#"{"group_size":1}"#).settle().unwrap();
    }
}
