//! Sections of the configs, and what they come to once a plugin's variant has filled in what they leave open.

mod curriculum;
mod loss;
mod optimiser;
mod rollouts;

use serde::{Deserialize, Serialize};

pub use curriculum::Curriculum;
pub use loss::{CorrectionChoice, KlPlacement, LossSection, LossSettings, Objective, Preset};
pub use optimiser::OptimiserSection;
pub use rollouts::{Filter, RolloutSection};

/// The sections that all plugins share.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sections {
    /// What is rolled out.
    #[serde(flatten)]
    pub rollouts: RolloutSection,
    /// The optimiser and how often it steps.
    #[serde(flatten)]
    pub optimiser: OptimiserSection,
    /// The policy's loss.
    #[serde(flatten)]
    pub loss: LossSection,
}

/// Sections with nothing left open.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// What is rolled out.
    pub rollouts: RolloutSection,
    /// What happens to groups that teach nothing.
    pub filter: Filter,
    /// The optimiser and how often it steps.
    pub optimiser: OptimiserSection,
    /// The policy's loss.
    pub loss: LossSettings,
}

impl Sections {
    /// Fills in what the variant decides where the config does not, and checks the result.
    ///
    /// # Errors
    /// Names the first field that makes no sense; the text says what would.
    pub fn settle(&self, preset: &Preset) -> Result<Settings, String> {
        self.rollouts.check()?;
        self.optimiser.check(self.rollouts.steps)?;
        if self.optimiser.mini_batches > self.rollouts.groups_per_step {
            let (parts, groups) = (self.optimiser.mini_batches, self.rollouts.groups_per_step);
            return Err(format!("mini_batches: {parts} is above groups_per_step ({groups}), and groups are not split"));
        }
        let settings = Settings {
            rollouts: self.rollouts.clone(),
            filter: self.rollouts.zero_variance.unwrap_or(preset.filter),
            optimiser: self.optimiser,
            loss: self.loss.settle(preset)?,
        };
        if settings.filter == Filter::Resample && (self.rollouts.start_share < 1.0 || self.rollouts.lag_steps > 0) {
            let text = "zero_variance: `resample` needs start_share = 1 and lag_steps = 0, it must see a whole round";
            return Err(text.to_owned());
        }
        Ok(settings)
    }
}

/// `value` must be finite and at least 0.
///
/// # Errors
/// Names the field.
pub fn not_negative(field: &str, value: f64) -> Result<(), String> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(format!("{field}: {value} is not a finite number of at least 0"))
}

/// `value`, where there is one, must be finite and above 0.
///
/// # Errors
/// Names the field.
pub fn above_zero(field: &str, value: Option<f64>) -> Result<(), String> {
    match value {
        Some(value) if !(value.is_finite() && value > 0.0) => Err(format!("{field}: use a finite number above 0")),
        _ => Ok(()),
    }
}

/// `value` must be in 0 to 1.
///
/// # Errors
/// Names the field.
pub fn share(field: &str, value: f64) -> Result<(), String> {
    if (0.0..=1.0).contains(&value) { Ok(()) } else { Err(format!("{field}: {value} is not in 0 to 1")) }
}

/// `value` must be at least 1.
///
/// # Errors
/// Names the field.
pub fn at_least_one(field: &str, value: u64) -> Result<(), String> {
    if value == 0 { Err(format!("{field}: use at least 1")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use fulgurite_credit::kl;
    use fulgurite_sdk::algorithm::policy::{Aggregation, Correction, CorrectionRule, RatioLevel};

    use super::*;
    use crate::Flat;

    fn read(json: &str) -> Sections {
        serde_json::from_str::<Flat<Sections>>(json).unwrap().0
    }

    #[test]
    fn defaults_are_sound_and_survive_json() {
        let sections = Sections::default();
        sections.settle(&Preset::default()).unwrap();
        let json = serde_json::to_string(&Flat(sections.clone())).unwrap();
        assert_eq!(read(&json), sections);
        assert_eq!(read("{}"), sections);
    }

    #[test]
    fn what_a_config_says_wins_over_the_variant() {
        let preset = Preset { clip_high: 0.5, aggregation: Aggregation::SequenceMeanTokenMean, ..Preset::default() };
        let settings = read("{}").settle(&preset).unwrap();
        assert!((settings.loss.clip_high - 0.5).abs() < 1e-6);
        assert_eq!(settings.loss.aggregation, Aggregation::SequenceMeanTokenMean);
        let settings = read(r#"{"clip_high":0.25,"aggregation":{"constant":512}}"#).settle(&preset).unwrap();
        assert!((settings.loss.clip_high - 0.25).abs() < 1e-6);
        assert_eq!(settings.loss.aggregation, Aggregation::Constant(512));
    }

    #[test]
    fn corrections_are_chosen_by_a_word_or_told() {
        let correction = |json: &str| read(json).loss.correction;
        assert_eq!(correction("{}"), CorrectionChoice::Auto);
        assert_eq!(correction(r#"{"correction":"none"}"#), CorrectionChoice::None);
        let told =
            Correction { level: RatioLevel::Token, rule: CorrectionRule::Mask(0.5, 5.0), batch_normalise: false };
        assert_eq!(correction(r#"{"correction":{"rule":{"mask":[0.5,5.0]}}}"#), CorrectionChoice::Told(told));
    }

    #[test]
    fn a_wrong_correction_is_told_with_the_forms_that_are_right() {
        for (json, reason) in [
            (r#""tis""#, "\"tis\" is none of its forms"),
            ("2.0", "2.0 is none of its forms"),
            (r#"{"level":"token"}"#, "missing field `rule`"),
            (r#"{"level":"tokens","rule":{"truncate":2}}"#, "unknown variant `tokens`"),
            (r#"{"rule":{"truncate":2,"mask":[0.5,5]}}"#, "single key"),
            (r#"{"rule":{"cut":2}}"#, "unknown variant `cut`"),
            (r#"{"rule":{"truncate":2},"levle":"token"}"#, "unknown field `levle`"),
        ] {
            let refused = serde_json::from_str::<Flat<Sections>>(&format!(r#"{{"correction":{json}}}"#)).unwrap_err();
            let refused = refused.to_string();
            assert!(refused.starts_with("correction: ") && refused.contains(reason), "{json}: {refused}");
            for form in ["auto", "none", "level = \"token\"", "truncate = 2.0", "mask = [0.5, 5.0]"] {
                assert!(refused.contains(form), "{json}: {refused}");
            }
        }
    }

    #[test]
    fn what_a_variant_presets_is_no_mistake_of_the_user() {
        let preset = Preset { objective: Objective::Reinforce, ..Preset::default() };
        read("{}").settle(&preset).unwrap();
        for json in [r#"{"loss":"cispo","clip_low":1}"#, r#"{"loss":"sapo","ratio_level":"sequence-mean"}"#] {
            read(json).settle(&preset).unwrap();
        }
        read(r#"{"groups_per_step":4,"mini_batches":4}"#).settle(&preset).unwrap();
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let refused = |json: &str| read(json).settle(&Preset::default()).unwrap_err();
        for (json, field) in [
            (r#"{"steps":0}"#, "steps"),
            (r#"{"groups_per_step":0}"#, "groups_per_step"),
            (r#"{"group_size":0}"#, "group_size"),
            (r#"{"start_share":0}"#, "start_share"),
            (r#"{"start_share":1.1}"#, "start_share"),
            (r#"{"start_share":0.5,"zero_variance":"resample"}"#, "zero_variance"),
            (r#"{"lag_steps":65}"#, "lag_steps"),
            (r#"{"lag_steps":1,"start_share":0.5}"#, "lag_steps"),
            (r#"{"lag_steps":1,"zero_variance":"resample"}"#, "zero_variance"),
            (r#"{"resample_rounds_max":0}"#, "resample_rounds_max"),
            (r#"{"overlong_cache_tokens":5}"#, "overlong_cache_tokens"),
            (r#"{"overlong_tokens_max":5,"overlong_cache_tokens":6}"#, "overlong_cache_tokens"),
            (r#"{"overlong_penalty":-1}"#, "overlong_penalty"),
            (r#"{"curriculum":{"hard_reward_max":0.9}}"#, "curriculum"),
            (r#"{"curriculum":{"easy_weight":-1}}"#, "curriculum"),
            (r#"{"updates_per_step":0}"#, "updates_per_step"),
            (r#"{"mini_batches":0}"#, "mini_batches"),
            (r#"{"learning_rate":-1}"#, "learning_rate"),
            (r#"{"learning_rate_min_ratio":-1}"#, "learning_rate_min_ratio"),
            (r#"{"gradient_norm_max":0}"#, "gradient_norm_max"),
            (r#"{"clip_low":1.5}"#, "clip_low"),
            (r#"{"clip_high":-1}"#, "clip_high"),
            (r#"{"dual_clip":1}"#, "dual_clip"),
            (r#"{"ratio_max":0.5}"#, "ratio_max"),
            (r#"{"sapo_temperature_positive":0}"#, "sapo_temperature_positive"),
            (r#"{"loss":"sapo","ratio_max":2}"#, "ratio_max"),
            (r#"{"loss":"cispo","dual_clip":2}"#, "dual_clip"),
            (r#"{"correction":{"rule":{"truncate":0}}}"#, "correction"),
            (r#"{"correction":{"rule":{"mask":[2,0.5]}}}"#, "correction"),
            (r#"{"kl_coefficient":-1}"#, "kl_coefficient"),
            (r#"{"kl_target":0}"#, "kl_target"),
            (r#"{"kl_target":0.1}"#, "kl_target"),
            (r#"{"loss":"reinforce","clip_low":0.2}"#, "clip_low"),
            (r#"{"loss":"importance-sampling","clip_high":0.2}"#, "clip_high"),
            (r#"{"loss":"sapo","clip_high":0.28}"#, "clip_high"),
            (r#"{"loss":"reinforce","ratio_level":"sequence-mean"}"#, "ratio_level"),
            (r#"{"groups_per_step":3,"mini_batches":4}"#, "mini_batches"),
            (r#"{"temperature":0}"#, "temperature"),
            (r#"{"aggregation":{"constant":0}}"#, "aggregation"),
            (r#"{"dimension":""}"#, "dimension"),
        ] {
            assert!(refused(json).starts_with(field), "{json}: {}", refused(json));
        }
        let unknown = serde_json::from_str::<Flat<Sections>>(r#"{"groupsize":4}"#).unwrap_err();
        assert!(unknown.to_string().contains("groupsize"));
    }

    #[test]
    fn a_reference_is_kept_only_where_a_kl_needs_it() {
        let settled = |json: &str| read(json).settle(&Preset::default()).unwrap().loss;
        assert!(!settled("{}").has_reference());
        assert!(settled(r#"{"kl_coefficient":0.01}"#).has_reference());
        assert!(settled(r#"{"kl_coefficient":0.01,"kl_placement":"reward","kl_estimator":"k1"}"#).has_reference());
        assert_eq!(settled(r#"{"kl_coefficient":0.01}"#).reward_kl(), None);
    }

    #[test]
    fn in_the_reward_unbiased_k3_is_k3() {
        let found = |estimator: &str| {
            let json = format!(r#"{{"kl_placement":"reward","kl_coefficient":0.1,"kl_estimator":"{estimator}"}}"#);
            read(&json).settle(&Preset::default()).unwrap().loss.reward_kl()
        };
        assert_eq!(found("unbiased-k3"), Some(kl::Estimator::K3));
        assert_eq!((found("k3"), found("k1")), (Some(kl::Estimator::K3), Some(kl::Estimator::K1)));
    }
}
