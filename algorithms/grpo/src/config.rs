//! The config and its checks.

use fulgurite_sdk::algorithm::policy::{Aggregation, Correction, CorrectionRule, KlEstimator, Loss};
use fulgurite_sdk::algorithm::schedule::{Decay, Schedule};
use serde::{Deserialize, Serialize};

use crate::advantage::Estimator;

/// Config of GRPO.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Steps. 200.
    pub steps: u64,
    /// Items per step. 16.
    pub groups_per_step: u32,
    /// Rollouts of each item. 8.
    pub group_size: u32,
    /// Share of a step's rollouts that must have ended before training starts, above 0 and at most 1. 1 waits for all, and
    /// every run of one seed is the same; with less, which groups are trained on first depends on the machine. Groups that
    /// are not whole by then are carried over to the next step.
    pub start_share: f64,
    /// Optimiser steps on the rollouts of one step. 1: then every ratio is 1 and nothing is clipped.
    pub updates_per_step: u32,
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
    /// The ratio is kept above 1 minus this. 0.2.
    pub clip_low: f32,
    /// The ratio is kept below 1 plus this. 0.28 (clip-higher).
    pub clip_high: f32,
    /// Bound above 1 of the loss on negative advantages, 3 for example. None.
    pub dual_clip: Option<f32>,
    /// Weight of the KL to the policy that the stage started from. 0 keeps no reference.
    pub kl_coefficient: f32,
    /// Estimator of that KL: `k1`, `k2`, `k3` or `unbiased-k3`. `unbiased-k3`, whose gradient is right.
    pub kl_estimator: KlEstimatorName,
    /// Weight of the mean entropy, which is subtracted from the loss. 0.
    pub entropy_coefficient: f32,
    /// Correction between sampler and trainer, where rollouts were drawn by other weights than those of the step, as with a
    /// `start_share` below 1: `{ level = "token", rule = { truncate = 2.0 } }`, or `rule = { mask = [0.5, 5.0] }`. None: their
    /// weights are equal.
    pub correction: Option<Correction>,
    /// How token losses are added up: `token-mean`, `sequence-mean-token-mean`, `sequence-mean-token-sum` or, for Dr.GRPO,
    /// `{ constant = LENGTH }`. `token-mean`.
    pub aggregation: AggregationName,
    /// Added to the standard deviation. 1e-4.
    pub epsilon: f64,
    /// Whether advantages are divided by the group's standard deviation; Dr.GRPO does not. True.
    pub normalise_by_std: bool,
    /// Temperature of the rollouts. 1; anything else is trained at that temperature too.
    pub temperature: f32,
    /// The reward dimension that is optimised. `reward`.
    pub dimension: String,
    /// Agent roles whose calls are trained on. Empty: all.
    pub agent_roles: Vec<String>,
}

/// Estimators of the KL by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KlEstimatorName {
    /// `log π − log π_ref`.
    K1,
    /// Half its square.
    K2,
    /// `e^x − x − 1`.
    K3,
    /// k3 times the ratio.
    UnbiasedK3,
}

/// Aggregations by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AggregationName {
    /// Mean over all tokens.
    TokenMean,
    /// Mean over rollouts of the mean over their tokens.
    SequenceMeanTokenMean,
    /// Mean over rollouts of the sum over their tokens.
    SequenceMeanTokenSum,
    /// Sum over all tokens, divided by rollouts times this length.
    Constant(u32),
}

impl Default for Config {
    fn default() -> Self {
        Self {
            steps: 200,
            groups_per_step: 16,
            group_size: 8,
            start_share: 1.0,
            updates_per_step: 1,
            learning_rate: 3e-4,
            warm_up_steps: 0,
            schedule: Decay::Constant,
            learning_rate_min_ratio: 0.0,
            weight_decay: 0.0,
            gradient_norm_max: Some(1.0),
            clip_low: 0.2,
            clip_high: 0.28,
            dual_clip: None,
            kl_coefficient: 0.0,
            kl_estimator: KlEstimatorName::UnbiasedK3,
            entropy_coefficient: 0.0,
            correction: None,
            aggregation: AggregationName::TokenMean,
            epsilon: 1e-4,
            normalise_by_std: true,
            temperature: 1.0,
            dimension: "reward".to_owned(),
            agent_roles: vec![],
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
            steps: Some(self.steps),
            ratio_min: self.learning_rate_min_ratio,
        }
    }

    /// Names the first field that makes no sense.
    ///
    /// # Errors
    /// The text says what would.
    pub fn check(&self) -> Result<(), String> {
        let not_negative = [
            ("learning_rate", self.learning_rate),
            ("weight_decay", self.weight_decay),
            ("clip_high", f64::from(self.clip_high)),
            ("kl_coefficient", f64::from(self.kl_coefficient)),
            ("entropy_coefficient", f64::from(self.entropy_coefficient)),
            ("epsilon", self.epsilon),
        ];
        for (field, value) in not_negative {
            if !(value.is_finite() && value >= 0.0) {
                return Err(format!("{field}: {value} is not a finite number of at least 0"));
            }
        }
        let at_least_one = [
            ("steps", self.steps),
            ("groups_per_step", self.groups_per_step.into()),
            ("updates_per_step", self.updates_per_step.into()),
        ];
        for (field, value) in at_least_one {
            if value == 0 {
                return Err(format!("{field}: use at least 1"));
            }
        }
        self.schedule().check()?;
        if self.group_size < 2 {
            return Err("group_size: use at least 2, a rollout alone has nothing to be compared with".to_owned());
        }
        if !(self.start_share > 0.0 && self.start_share <= 1.0) {
            return Err(format!("start_share: {} is not above 0 and at most 1", self.start_share));
        }
        if !(0.0..=1.0).contains(&self.clip_low) {
            return Err(format!("clip_low: {} is not in 0 to 1", self.clip_low));
        }
        if self.dual_clip.is_some_and(|bound| !(bound.is_finite() && bound > 1.0)) {
            return Err("dual_clip: use a finite number above 1".to_owned());
        }
        let is_sound = |rule: CorrectionRule| match rule {
            CorrectionRule::Truncate(bound) => bound.is_finite() && bound > 0.0,
            CorrectionRule::Mask(low, high) => low >= 0.0 && high.is_finite() && low < high,
        };
        if self.correction.is_some_and(|correction| !is_sound(correction.rule)) {
            return Err("correction.rule: use truncate above 0, or mask = [LOW, HIGH] with 0 <= LOW < HIGH".to_owned());
        }
        if self.gradient_norm_max.is_some_and(|norm| !(norm.is_finite() && norm > 0.0)) {
            return Err("gradient_norm_max: use a finite number above 0".to_owned());
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err("temperature: use a finite number above 0; greedy rollouts explore nothing".to_owned());
        }
        if self.aggregation == AggregationName::Constant(0) {
            return Err("aggregation.constant: use at least 1".to_owned());
        }
        if self.dimension.is_empty() {
            return Err("dimension: name a reward dimension".to_owned());
        }
        Ok(())
    }

    /// How rewards become advantages.
    #[must_use]
    pub const fn estimator(&self) -> Estimator {
        Estimator { epsilon: self.epsilon, normalise_by_std: self.normalise_by_std }
    }

    /// The loss that the host computes.
    #[must_use]
    pub fn loss(&self) -> Loss {
        let mut loss = Loss::new()
            .ppo(self.clip_low, self.clip_high, self.dual_clip)
            .entropy_coefficient(self.entropy_coefficient)
            .aggregation(match self.aggregation {
                AggregationName::TokenMean => Aggregation::TokenMean,
                AggregationName::SequenceMeanTokenMean => Aggregation::SequenceMeanTokenMean,
                AggregationName::SequenceMeanTokenSum => Aggregation::SequenceMeanTokenSum,
                AggregationName::Constant(length) => Aggregation::Constant(length),
            });
        if self.has_reference() {
            let estimator = match self.kl_estimator {
                KlEstimatorName::K1 => KlEstimator::K1,
                KlEstimatorName::K2 => KlEstimator::K2,
                KlEstimatorName::K3 => KlEstimator::K3,
                KlEstimatorName::UnbiasedK3 => KlEstimator::UnbiasedK3,
            };
            loss = loss.kl(estimator, self.kl_coefficient);
        }
        if let Some(correction) = self.correction {
            loss = loss.correction(correction);
        }
        loss
    }

    /// Whether the loss looks at the policy that the stage started from.
    #[must_use]
    pub fn has_reference(&self) -> bool {
        self.kl_coefficient > 0.0
    }

    /// Whether rollouts without any advantage still have a gradient.
    #[must_use]
    pub fn has_gradient_without_advantage(&self) -> bool {
        self.has_reference() || self.entropy_coefficient > 0.0 || self.weight_decay > 0.0
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
        let dr_grpo = r#"{"normalise_by_std":false,"aggregation":{"constant":64}}"#;
        assert_eq!(serde_json::from_str::<Config>(dr_grpo).unwrap().aggregation, AggregationName::Constant(64));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let refused = |json: &str| serde_json::from_str::<Config>(json).unwrap().check().unwrap_err();
        for (json, field) in [
            (r#"{"steps":0}"#, "steps"),
            (r#"{"groups_per_step":0}"#, "groups_per_step"),
            (r#"{"group_size":1}"#, "group_size"),
            (r#"{"start_share":0}"#, "start_share"),
            (r#"{"start_share":1.1}"#, "start_share"),
            (r#"{"updates_per_step":0}"#, "updates_per_step"),
            (r#"{"learning_rate":-1}"#, "learning_rate"),
            (r#"{"learning_rate_min_ratio":-1}"#, "learning_rate_min_ratio"),
            (r#"{"clip_low":1.5}"#, "clip_low"),
            (r#"{"clip_high":-1}"#, "clip_high"),
            (r#"{"dual_clip":1}"#, "dual_clip"),
            (r#"{"correction":{"rule":{"truncate":0}}}"#, "correction.rule"),
            (r#"{"correction":{"rule":{"mask":[2,0.5]}}}"#, "correction.rule"),
            (r#"{"epsilon":-1}"#, "epsilon"),
            (r#"{"temperature":0}"#, "temperature"),
            (r#"{"aggregation":{"constant":0}}"#, "aggregation"),
            (r#"{"dimension":""}"#, "dimension"),
        ] {
            assert!(refused(json).starts_with(field), "{json}");
        }
        let unknown = serde_json::from_str::<Config>(r#"{"groupsize":4}"#).unwrap_err();
        assert!(unknown.to_string().contains("groupsize"));
    }

    #[test]
    fn a_reference_is_kept_only_where_the_loss_needs_it() {
        assert!(!Config::default().has_reference());
        assert!(Config { kl_coefficient: 0.01, ..Config::default() }.has_reference());
    }
}
