//! The policy's loss.

use fulgurite_credit::kl;
use fulgurite_sdk::Value;
use fulgurite_sdk::algorithm::policy::{
    Aggregation, Correction, CorrectionRule, KlEstimator, Loss, RatioLevel, SequenceScope,
};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};

use super::{Filter, above_zero, not_negative, share};

/// Bound of the weights of `correction = "auto"`. 2: verl's recipe and Agent Lightning 1.0.
const AUTO_TRUNCATION: f32 = 2.0;

/// How ratio and advantage become a token's loss.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// `−A log π`.
    Reinforce,
    /// `−A r`.
    ImportanceSampling,
    /// `max(−A r, −A clip(r))`.
    #[default]
    Ppo,
    /// `−sg[clip(r)] A log π`.
    Cispo,
    /// `−A 4/τ σ(τ(r − 1))`.
    Sapo,
}

/// Where the KL to the reference is taken off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KlPlacement {
    /// Added to the loss.
    #[default]
    Loss,
    /// Subtracted from the reward, before baselines.
    Reward,
}

/// The weights π_old/μ on the loss.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CorrectionChoice {
    /// Per token, truncated at 2, in steps with calls that older weights drew; none where all were drawn by the weights that
    /// the step starts with, for which every weight would be 1.
    #[default]
    Auto,
    /// Never: old calls have the ratio π_θ/μ.
    None,
    /// This one, always.
    #[serde(untagged)]
    Told(Correction),
}

impl<'de> Deserialize<'de> for CorrectionChoice {
    /// By hand, because an untagged enum can only say that nothing has matched.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let told = match &value {
            Value::String(word) if word == "auto" => return Ok(Self::Auto),
            Value::String(word) if word == "none" => return Ok(Self::None),
            Value::Object(_) => serde_json::from_value(value).map(Self::Told).map_err(|error| error.to_string()),
            other => Err(format!("{other} is none of its forms")),
        };
        let forms =
            r#""auto", "none", { level = "token", rule = { truncate = 2.0 } } or { rule = { mask = [0.5, 5.0] } }"#;
        told.map_err(|reason| D::Error::custom(format!("correction: {reason}; use {forms}")))
    }
}

/// Keys about the loss. What is none is for the variant to say.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LossSection {
    /// `reinforce`, `importance-sampling`, `ppo`, `cispo` or `sapo`.
    pub loss: Option<Objective>,
    /// The ratio is kept above 1 minus this. Of `cispo` 1 means: no lower bound.
    pub clip_low: Option<f32>,
    /// The ratio is kept below 1 plus this.
    pub clip_high: Option<f32>,
    /// Bound above 1 of the loss on negative advantages, 3 for example; of `ppo` only. None: no bound.
    pub dual_clip: Option<f32>,
    /// Bound of the ratio where it is not clipped otherwise, above 1 (INTELLECT-2 has 4); of `ppo` and `importance-sampling`
    /// only. None: no bound.
    pub ratio_max: Option<f32>,
    /// Temperature of `sapo` where the advantage is above 0. 1.
    pub sapo_temperature_positive: f32,
    /// Temperature of `sapo` elsewhere. 1.05.
    pub sapo_temperature_negative: f32,
    /// What a ratio is taken over: `token`, `sequence-mean` or `sequence-sum`.
    pub ratio_level: Option<RatioLevel>,
    /// What a sequence is: `rollout` (all its calls) or `call`. `rollout`.
    pub sequence_scope: SequenceScope,
    /// How token losses are added up: `token-mean`, `sequence-mean-token-mean`, `sequence-mean-token-sum`,
    /// `{ constant = LENGTH }`, `{ sum-constant = LENGTH }` or `prompt-mean`.
    pub aggregation: Option<Aggregation>,
    /// Weight of the KL to the policy that the stage started from. 0 keeps no reference.
    pub kl_coefficient: f32,
    /// Estimator of that KL: `k1`, `k2`, `k3` or `unbiased-k3`. None: `unbiased-k3` in the loss, whose gradient is right there,
    /// and `k1` in the reward, whose mean is right. In the reward `unbiased-k3` is `k3`: rewards are made where π_θ is π_old,
    /// so that the ratio between them, which is all that tells the two apart, is 1.
    pub kl_estimator: Option<KlEstimator>,
    /// Where it is taken off: `loss` or `reward`.
    pub kl_placement: Option<KlPlacement>,
    /// KL (nats per token) that the coefficient is steered to, from `kl_coefficient` on. None: it stays.
    pub kl_target: Option<f64>,
    /// Rollouts over which the coefficient may change by a fifth. 10,000.
    pub kl_horizon: f64,
    /// Weight of the mean entropy, which is subtracted from the loss. 0.
    pub entropy_coefficient: f32,
    /// Weights π_old/μ for calls that other weights drew: `auto`, `none`, or
    /// `{ level = "token", rule = { truncate = 2.0 } }`, `{ rule = { mask = [0.5, 5.0] } }`. `auto`.
    pub correction: CorrectionChoice,
    /// Sequences with a negative advantage whose mean `log μ − log π` (nats) is above this are dropped (DeepSeek-V3.2). None:
    /// they stay.
    pub off_policy_mask: Option<f32>,
}

impl Default for LossSection {
    fn default() -> Self {
        Self {
            loss: None,
            clip_low: None,
            clip_high: None,
            dual_clip: None,
            ratio_max: None,
            sapo_temperature_positive: 1.0,
            sapo_temperature_negative: 1.05,
            ratio_level: None,
            sequence_scope: SequenceScope::Rollout,
            aggregation: None,
            kl_coefficient: 0.0,
            kl_estimator: None,
            kl_placement: None,
            kl_target: None,
            kl_horizon: 10_000.0,
            entropy_coefficient: 0.0,
            correction: CorrectionChoice::Auto,
            off_policy_mask: None,
        }
    }
}

/// What a plugin's variant decides where the config does not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preset {
    /// The loss.
    pub objective: Objective,
    /// The ratio is kept above 1 minus this.
    pub clip_low: f32,
    /// The ratio is kept below 1 plus this.
    pub clip_high: f32,
    /// What a ratio is taken over.
    pub ratio_level: RatioLevel,
    /// How token losses are added up.
    pub aggregation: Aggregation,
    /// Where the KL is taken off.
    pub kl_placement: KlPlacement,
    /// What happens to groups that teach nothing.
    pub filter: Filter,
}

impl Default for Preset {
    /// ALGORITHMS.md, section 0.
    fn default() -> Self {
        Self {
            objective: Objective::Ppo,
            clip_low: 0.2,
            clip_high: 0.28,
            ratio_level: RatioLevel::Token,
            aggregation: Aggregation::TokenMean,
            kl_placement: KlPlacement::Loss,
            filter: Filter::Keep,
        }
    }
}

/// The loss with nothing left open.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossSettings {
    /// The loss.
    pub objective: Objective,
    /// The ratio is kept above 1 minus this.
    pub clip_low: f32,
    /// The ratio is kept below 1 plus this.
    pub clip_high: f32,
    /// What a ratio is taken over.
    pub ratio_level: RatioLevel,
    /// How token losses are added up.
    pub aggregation: Aggregation,
    /// Where the KL is taken off.
    pub kl_placement: KlPlacement,
    /// Its estimator.
    pub kl_estimator: KlEstimator,
    section: LossSection,
}

impl LossSection {
    pub(super) fn settle(&self, preset: &Preset) -> Result<LossSettings, String> {
        let kl_placement = self.kl_placement.unwrap_or(preset.kl_placement);
        let by_placement = match kl_placement {
            KlPlacement::Loss => KlEstimator::UnbiasedK3,
            KlPlacement::Reward => KlEstimator::K1,
        };
        let settings = LossSettings {
            objective: self.loss.unwrap_or(preset.objective),
            clip_low: self.clip_low.unwrap_or(preset.clip_low),
            clip_high: self.clip_high.unwrap_or(preset.clip_high),
            ratio_level: self.ratio_level.unwrap_or(preset.ratio_level),
            aggregation: self.aggregation.unwrap_or(preset.aggregation),
            kl_placement,
            kl_estimator: self.kl_estimator.unwrap_or(by_placement),
            section: *self,
        };
        settings.check()?;
        Ok(settings)
    }
}

impl LossSettings {
    fn check(&self) -> Result<(), String> {
        let section = &self.section;
        not_negative("clip_high", self.clip_high.into())?;
        not_negative("kl_coefficient", section.kl_coefficient.into())?;
        not_negative("entropy_coefficient", section.entropy_coefficient.into())?;
        share("clip_low", self.clip_low.into())?;
        above_zero("sapo_temperature_positive", Some(section.sapo_temperature_positive.into()))?;
        above_zero("sapo_temperature_negative", Some(section.sapo_temperature_negative.into()))?;
        above_zero("kl_target", section.kl_target)?;
        above_zero("kl_horizon", Some(section.kl_horizon))?;
        for (field, bound) in [("dual_clip", section.dual_clip), ("ratio_max", section.ratio_max)] {
            if bound.is_some_and(|bound| !(bound.is_finite() && bound > 1.0)) {
                return Err(format!("{field}: use a finite number above 1"));
            }
        }
        self.check_used()?;
        if section.off_policy_mask.is_some_and(|delta| !delta.is_finite()) {
            return Err("off_policy_mask: use a finite number".to_owned());
        }
        if let CorrectionChoice::Told(correction) = section.correction {
            let is_sound = match correction.rule {
                CorrectionRule::Truncate(bound) => bound.is_finite() && bound > 0.0,
                CorrectionRule::Mask(low, high) => low >= 0.0 && high.is_finite() && low < high,
            };
            if !is_sound {
                let text = "correction.rule: use truncate above 0, or mask = [LOW, HIGH] with 0 <= LOW < HIGH";
                return Err(text.to_owned());
            }
        }
        if section.kl_target.is_some() && section.kl_coefficient <= 0.0 {
            return Err("kl_target: give kl_coefficient too, from which the coefficient starts".to_owned());
        }
        if matches!(self.aggregation, Aggregation::Constant(0) | Aggregation::SumConstant(0)) {
            return Err("aggregation.constant: use at least 1".to_owned());
        }
        Ok(())
    }

    /// A key that the loss takes no notice of is a mistake of whoever has set it.
    fn check_used(&self) -> Result<(), String> {
        use Objective::{Cispo, ImportanceSampling, Ppo, Reinforce, Sapo};
        let section = &self.section;
        for (field, is_set, takes, losses) in [
            ("clip_low", section.clip_low.is_some(), &[Ppo, Cispo][..], "`ppo` and `cispo`"),
            ("clip_high", section.clip_high.is_some(), &[Ppo, Cispo], "`ppo` and `cispo`"),
            ("dual_clip", section.dual_clip.is_some(), &[Ppo], "`ppo`"),
            ("ratio_max", section.ratio_max.is_some(), &[Ppo, ImportanceSampling], "`ppo` and `importance-sampling`"),
            (
                "ratio_level",
                section.ratio_level.is_some(),
                &[ImportanceSampling, Ppo, Cispo, Sapo],
                "those other than `reinforce`, which has no ratio,",
            ),
        ] {
            if is_set && !takes.contains(&self.objective) {
                let name = match self.objective {
                    Reinforce => "reinforce",
                    ImportanceSampling => "importance-sampling",
                    Ppo => "ppo",
                    Cispo => "cispo",
                    Sapo => "sapo",
                };
                return Err(format!("{field}: the loss is `{name}`, and only {losses} take it; leave it out"));
            }
        }
        Ok(())
    }

    /// Whether the stage keeps the policy that it started from.
    #[must_use]
    pub fn has_reference(&self) -> bool {
        self.section.kl_coefficient > 0.0
    }

    /// The coefficient of the KL when the stage starts.
    #[must_use]
    pub fn kl_coefficient(&self) -> f64 {
        self.section.kl_coefficient.into()
    }

    /// What steers the coefficient.
    #[must_use]
    pub fn adaptive(&self) -> Option<kl::Adaptive> {
        self.section.kl_target.map(|target| kl::Adaptive { target, horizon: self.section.kl_horizon })
    }

    /// The estimator of a KL that is taken off the reward; none when it is not.
    #[must_use]
    pub fn reward_kl(&self) -> Option<kl::Estimator> {
        if !self.has_reference() || self.kl_placement == KlPlacement::Loss {
            return None;
        }
        Some(match self.kl_estimator {
            KlEstimator::K2 => kl::Estimator::K2,
            // The ratio of `unbiased-k3` is 1 where rewards are made.
            KlEstimator::K3 | KlEstimator::UnbiasedK3 => kl::Estimator::K3,
            KlEstimator::K1 => kl::Estimator::K1,
        })
    }

    /// Whether there is something to learn where no advantage differs from 0.
    #[must_use]
    pub fn has_gradient_without_advantage(&self) -> bool {
        let in_loss = self.has_reference() && self.kl_placement == KlPlacement::Loss;
        in_loss || self.section.entropy_coefficient > 0.0
    }

    /// The correction of a step in which calls of older weights are trained on, or none are.
    #[must_use]
    pub fn correction(&self, is_stale: bool) -> Option<Correction> {
        match self.section.correction {
            CorrectionChoice::Auto if is_stale => Some(Correction {
                level: RatioLevel::Token,
                rule: CorrectionRule::Truncate(AUTO_TRUNCATION),
                batch_normalise: false,
            }),
            CorrectionChoice::Auto | CorrectionChoice::None => None,
            CorrectionChoice::Told(correction) => Some(correction),
        }
    }

    /// Whether tokens may be dropped by a mask.
    #[must_use]
    pub fn masks(&self) -> bool {
        let by_correction = matches!(
            self.section.correction,
            CorrectionChoice::Told(Correction { rule: CorrectionRule::Mask(..), .. })
        );
        by_correction || self.section.off_policy_mask.is_some()
    }

    /// The loss that the host computes, with the coefficient that the KL has by now.
    #[must_use]
    pub fn loss(&self, kl_coefficient: f64, correction: Option<Correction>) -> Loss {
        let section = &self.section;
        let loss = match self.objective {
            Objective::Reinforce => Loss::new().reinforce(),
            Objective::ImportanceSampling => Loss::new().importance_sampling(),
            Objective::Ppo => Loss::new().ppo(self.clip_low, self.clip_high, section.dual_clip),
            Objective::Cispo => Loss::new().cispo(Some(self.clip_low).filter(|low| *low < 1.0), self.clip_high),
            Objective::Sapo => Loss::new().sapo(section.sapo_temperature_positive, section.sapo_temperature_negative),
        };
        let mut loss = loss
            .entropy_coefficient(section.entropy_coefficient)
            .aggregation(self.aggregation)
            .sequence_scope(section.sequence_scope);
        if self.objective != Objective::Reinforce {
            loss = loss.ratio_level(self.ratio_level);
        }
        if self.has_reference() && self.kl_placement == KlPlacement::Loss {
            #[expect(clippy::cast_possible_truncation, reason = "the host's coefficients are f32")]
            let coefficient = kl_coefficient as f32;
            loss = loss.kl(self.kl_estimator, coefficient);
        }
        if let Some(delta) = section.ratio_max {
            loss = loss.ratio_max(delta);
        }
        if let Some(correction) = correction {
            loss = loss.correction(correction);
        }
        if let Some(delta) = section.off_policy_mask {
            loss = loss.off_policy_mask(delta);
        }
        loss
    }
}
