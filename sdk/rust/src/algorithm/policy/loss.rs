//! The loss that the host computes. Its settings are read from configs under the names that they have in `wit/`.

use serde::{Deserialize, Serialize};

use crate::wit::algorithm::fulgurite::algorithm::policy as wit;

/// How token losses become one number. Normalisers are taken over the whole batch. What a sequence is:
/// [`Loss::sequence_scope`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregation {
    /// Sum over all tokens, divided by their number.
    #[default]
    TokenMean,
    /// Mean over sequences of the mean over their tokens.
    SequenceMeanTokenMean,
    /// Mean over sequences of the sum over their tokens.
    SequenceMeanTokenSum,
    /// Sum over all tokens, divided by the number of sequences times this length (tokens).
    Constant(u32),
    /// Sum over all tokens, divided by this length (tokens), whatever the number of sequences.
    SumConstant(u32),
    /// Mean over the entries' groups of the mean over the group's tokens. Every entry needs a
    /// [group](super::Entry::group).
    PromptMean,
}

impl Aggregation {
    const fn lower(self) -> wit::Aggregation {
        match self {
            Self::TokenMean => wit::Aggregation::TokenMean,
            Self::SequenceMeanTokenMean => wit::Aggregation::SequenceMeanTokenMean,
            Self::SequenceMeanTokenSum => wit::Aggregation::SequenceMeanTokenSum,
            Self::Constant(length) => wit::Aggregation::Constant(length),
            Self::SumConstant(length) => wit::Aggregation::SumConstant(length),
            Self::PromptMean => wit::Aggregation::PromptMean,
        }
    }
}

/// Estimator of the KL divergence to the reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KlEstimator {
    /// `log π − log π_ref`: right in a reward, not in a loss.
    K1,
    /// Half the square of k1.
    K2,
    /// `e^x − x − 1` with `x = log π_ref − log π`.
    K3,
    /// k3 times the ratio, with gradient.
    UnbiasedK3,
}

impl KlEstimator {
    const fn lower(self) -> wit::KlEstimator {
        match self {
            Self::K1 => wit::KlEstimator::K1,
            Self::K2 => wit::KlEstimator::K2,
            Self::K3 => wit::KlEstimator::K3,
            Self::UnbiasedK3 => wit::KlEstimator::UnbiasedK3,
        }
    }
}

/// What a ratio, or a correction's weight, is taken over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RatioLevel {
    /// Each token its own.
    #[default]
    Token,
    /// exp of the mean of the log ratios of the sequence's tokens (GSPO).
    SequenceMean,
    /// exp of their sum (RLOO). A token's loss is the sequence's divided by its tokens, so that
    /// [`Aggregation::SequenceMeanTokenSum`] gives the mean over sequences.
    SequenceSum,
}

impl RatioLevel {
    const fn lower(self) -> wit::RatioLevel {
        match self {
            Self::Token => wit::RatioLevel::Token,
            Self::SequenceMean => wit::RatioLevel::SequenceMean,
            Self::SequenceSum => wit::RatioLevel::SequenceSum,
        }
    }
}

/// What a sequence is, in ratios, corrections, aggregations and [`Loss::off_policy_mask`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SequenceScope {
    /// The sampled tokens of a rollout, over all its calls in the batch.
    #[default]
    Rollout,
    /// Those of one call.
    Call,
}

/// What a correction does with its weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CorrectionRule {
    /// Keeps them below this bound, above 0.
    Truncate(f32),
    /// Drops what has a weight below the first or above the second bound. What is dropped has loss 0 and still counts in
    /// normalisers; what stays keeps its weight.
    Mask(f32, f32),
}

/// Weights π_old/μ on the loss of every token, without derivative. They are 1 where π_old is μ: see [`anchor`](super::anchor).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Correction {
    /// What a weight is taken over; [`RatioLevel::SequenceMean`] is the geometric one. In a config: per token.
    #[serde(default)]
    pub level: RatioLevel,
    /// What is done with it.
    pub rule: CorrectionRule,
    /// Whether weights are divided by their mean in the batch: over tokens at [`RatioLevel::Token`], else over sequences. In
    /// a config: no.
    #[serde(default)]
    pub batch_normalise: bool,
}

impl Correction {
    const fn lower(self) -> wit::Correction {
        wit::Correction {
            level: self.level.lower(),
            rule: match self.rule {
                CorrectionRule::Truncate(bound) => wit::CorrectionRule::Truncate(bound),
                CorrectionRule::Mask(low, high) => wit::CorrectionRule::Mask((low, high)),
            },
            batch_normalise: self.batch_normalise,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Objective {
    Reinforce,
    ImportanceSampling,
    Ppo { clip_low: f32, clip_high: f32, dual_clip: Option<f32> },
    Cispo { clip_low: Option<f32>, clip_high: f32 },
    Sapo { temperature_positive: f32, temperature_negative: f32 },
}

/// A loss. What is not set is the host's default: PPO clip 0.2 / 0.28, ratios per token, token mean, sequences are rollouts, no
/// KL, no entropy term, no correction. Below r is π_θ/π_old and A the entry's weight.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Loss {
    objective: Option<Objective>,
    ratio_max: Option<f32>,
    ratio_level: Option<RatioLevel>,
    sequence_scope: Option<SequenceScope>,
    aggregation: Option<Aggregation>,
    kl: Option<(KlEstimator, f32)>,
    entropy_coefficient: Option<f32>,
    correction: Option<Correction>,
    off_policy_mask: Option<f32>,
}

impl Loss {
    /// The host's default.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// `-A log π_θ`, without ratio.
    #[must_use]
    pub const fn reinforce(mut self) -> Self {
        self.objective = Some(Objective::Reinforce);
        self
    }

    /// `-A r`, never clipped.
    #[must_use]
    pub const fn importance_sampling(mut self) -> Self {
        self.objective = Some(Objective::ImportanceSampling);
        self
    }

    /// PPO's clipped surrogate: the ratio is kept in `[1 − clip_low, 1 + clip_high]`; `dual_clip` > 1 bounds the loss on
    /// negative advantages.
    #[must_use]
    pub const fn ppo(mut self, clip_low: f32, clip_high: f32, dual_clip: Option<f32>) -> Self {
        self.objective = Some(Objective::Ppo { clip_low, clip_high, dual_clip });
        self
    }

    /// `-clip(r, 1 − clip_low, 1 + clip_high) A log π_θ` with the clipped ratio held constant, so that no token loses its
    /// gradient. Without a lower bound: `min(r, 1 + clip_high)`.
    #[must_use]
    pub const fn cispo(mut self, clip_low: Option<f32>, clip_high: f32) -> Self {
        self.objective = Some(Objective::Cispo { clip_low, clip_high });
        self
    }

    /// `-A 4/τ σ(τ (r − 1))`, with one temperature τ > 0 for A > 0 and another for the rest.
    #[must_use]
    pub const fn sapo(mut self, temperature_positive: f32, temperature_negative: f32) -> Self {
        self.objective = Some(Objective::Sapo { temperature_positive, temperature_negative });
        self
    }

    /// Replaces r by min(r, `delta`) where it is not clipped otherwise, which bounds the loss on negative advantages. For
    /// [`ppo`](Self::ppo) and [`importance_sampling`](Self::importance_sampling) only.
    #[must_use]
    pub const fn ratio_max(mut self, delta: f32) -> Self {
        self.ratio_max = Some(delta);
        self
    }

    /// What r is taken over.
    #[must_use]
    pub const fn ratio_level(mut self, level: RatioLevel) -> Self {
        self.ratio_level = Some(level);
        self
    }

    /// What a sequence is.
    #[must_use]
    pub const fn sequence_scope(mut self, scope: SequenceScope) -> Self {
        self.sequence_scope = Some(scope);
        self
    }

    /// How token losses are added up.
    #[must_use]
    pub const fn aggregation(mut self, aggregation: Aggregation) -> Self {
        self.aggregation = Some(aggregation);
        self
    }

    /// Adds `coefficient` times the KL to the reference: see [`freeze_reference`](super::freeze_reference).
    #[must_use]
    pub const fn kl(mut self, estimator: KlEstimator, coefficient: f32) -> Self {
        self.kl = Some((estimator, coefficient));
        self
    }

    /// Subtracts `coefficient` times the mean entropy (nats).
    #[must_use]
    pub const fn entropy_coefficient(mut self, coefficient: f32) -> Self {
        self.entropy_coefficient = Some(coefficient);
        self
    }

    /// Corrects for the difference between trainer and sampler.
    #[must_use]
    pub const fn correction(mut self, correction: Correction) -> Self {
        self.correction = Some(correction);
        self
    }

    /// Drops the tokens with A < 0 of sequences of which the mean of `log μ − log π_θ` is above `delta` (nats).
    #[must_use]
    pub const fn off_policy_mask(mut self, delta: f32) -> Self {
        self.off_policy_mask = Some(delta);
        self
    }

    pub(super) fn lower(&self) -> wit::Loss {
        let loss = wit::Loss::new();
        match self.objective {
            Some(Objective::Reinforce) => loss.set_reinforce(),
            Some(Objective::ImportanceSampling) => loss.set_importance_sampling(),
            Some(Objective::Ppo { clip_low, clip_high, dual_clip }) => loss.set_ppo(clip_low, clip_high, dual_clip),
            Some(Objective::Cispo { clip_low, clip_high }) => loss.set_cispo(clip_low, clip_high),
            Some(Objective::Sapo { temperature_positive, temperature_negative }) => {
                loss.set_sapo(temperature_positive, temperature_negative);
            }
            None => {}
        }
        self.ratio_max.into_iter().for_each(|delta| loss.set_ratio_max(delta));
        self.ratio_level.into_iter().for_each(|level| loss.set_ratio_level(level.lower()));
        if let Some(scope) = self.sequence_scope {
            loss.set_sequence_scope(match scope {
                SequenceScope::Rollout => wit::SequenceScope::Rollout,
                SequenceScope::Call => wit::SequenceScope::Call,
            });
        }
        self.aggregation.into_iter().for_each(|aggregation| loss.set_aggregation(aggregation.lower()));
        self.kl.into_iter().for_each(|(estimator, coefficient)| loss.set_kl(estimator.lower(), coefficient));
        self.entropy_coefficient.into_iter().for_each(|value| loss.set_entropy_coefficient(value));
        self.correction.into_iter().for_each(|correction| loss.set_correction(correction.lower()));
        self.off_policy_mask.into_iter().for_each(|delta| loss.set_off_policy_mask(delta));
        loss
    }
}
