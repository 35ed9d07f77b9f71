//! What the policy engine is asked to train on, and how. Plain numbers: no tensors, no tokens cross to a plugin.

use serde::{Deserialize, Serialize};

use crate::id::PolicyVersion;
use crate::kept_tokens::KeptTokens;

/// What a row's weights multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// Policy gradient: weights are advantages.
    Rl,
    /// Cross-entropy: weights are token weights (1 for plain SFT).
    Ce,
    /// KL to the reference: weights multiply the KL term.
    RefKl,
}

/// One training row: consecutive tokens of one rollout. The lists other than `ids` have one entry per id; entry 0 is never
/// trained (nothing predicts the first token).
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingRow {
    /// Which sequence (rollout) of the batch the row belongs to, from 0. Sequence-level normalisers and ratios are taken
    /// over all rows of a sequence.
    pub sequence: u32,
    /// Token ids, prompt first.
    pub ids: Vec<u32>,
    /// Whether a token was sampled by the policy (or is trained on, for demonstrations). Everything else is context.
    pub mask: Vec<bool>,
    /// Advantage, token weight or KL weight of each token, by `stream`; 0 where `mask` is false.
    pub weights: Vec<f32>,
    /// Log-probability (nats) of each token under the policy that drew it (μ); 0 where `mask` is false.
    pub behaviour_log_probs: Vec<f32>,
    /// Log-probability (nats) under the trainer's weights at the start of the update (π_old); empty means: use
    /// `behaviour_log_probs` (exact when versions are equal).
    pub old_log_probs: Vec<f32>,
    /// Which call of its sequence each token is of, by a number of the caller's; empty: all of one. Only losses whose sequences
    /// are calls look at it.
    pub calls: Vec<u32>,
    /// Which group of the batch the row belongs to: only [`Aggregation::PromptMean`] looks at it.
    pub group: Option<u64>,
    /// What the weights multiply.
    pub stream: Stream,
    /// Temperature at which the row was sampled; log-probs are of the softmax at this temperature. 1 for demonstrations.
    pub temperature: f32,
    /// The weights that drew it.
    pub policy_version: PolicyVersion,
    /// The tokens that each one was drawn from, where not from all: log-probs and entropy are of the softmax over these then.
    /// Empty, or one place per id.
    pub kept: KeptTokens,
}

/// How the policy-gradient stream turns ratio and advantage into a loss (ALGORITHMS.md section 3).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyLoss {
    /// `-A log π`.
    Reinforce,
    /// `-A r`.
    ImportanceSampling,
    /// PPO's clipped surrogate with separate lower and upper clip and optional dual clip.
    Ppo {
        /// ε_low, 0.2 by default.
        clip_low: f32,
        /// ε_high, 0.28 by default (clip-higher).
        clip_high: f32,
        /// Bound c > 1 on negative advantages; `None` switches it off.
        dual_clip: Option<f32>,
    },
    /// `-sg[clip(r)] A log π`: no token loses its gradient (MiniMax-M1, arXiv 2506.13585).
    Cispo {
        /// The ratio is kept above 1 minus this; `None` has no lower bound.
        clip_low: Option<f32>,
        /// The ratio is kept below 1 plus this.
        clip_high: f32,
    },
    /// `-A 4/τ σ(τ (r − 1))`: a clip without edges (SAPO, arXiv 2511.20347).
    Sapo {
        /// τ where the advantage is above 0; 1.0 in the paper.
        temperature_positive: f32,
        /// τ elsewhere; 1.05 in the paper.
        temperature_negative: f32,
    },
}

/// What a ratio or a correction's weight is taken over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RatioLevel {
    /// Each token its own.
    #[default]
    Token,
    /// exp of the mean of the sequence's log ratios (GSPO, arXiv 2507.18071).
    SequenceMean,
    /// exp of their sum.
    SequenceSum,
}

/// What a sequence is, wherever a loss speaks of one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SequenceScope {
    /// A rollout: all rows with its number.
    #[default]
    Rollout,
    /// One call of it.
    Call,
}

/// What a correction does with its weights (ALGORITHMS.md section 7).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CorrectionRule {
    /// Truncated importance sampling.
    Truncate {
        /// Largest weight, above 0.
        max: f32,
    },
    /// What has a weight outside of the bounds is dropped; the rest keeps its weight.
    Mask {
        /// Smallest weight that is kept.
        min: f32,
        /// Largest weight that is kept.
        max: f32,
    },
}

/// Weights π_old/μ on token losses and their KL terms, without derivative. 1 where π_old is μ, so the ratio π_θ/μ is never
/// corrected twice.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Correction {
    /// What a weight is taken over.
    pub level: RatioLevel,
    /// What is done with it.
    pub rule: CorrectionRule,
    /// Whether weights are divided by their mean in the batch: over tokens at [`RatioLevel::Token`], else over sequences.
    /// What was dropped counts as 0 there.
    pub batch_normalise: bool,
}

/// How token losses become one number (ALGORITHMS.md section 6). All normalisers are taken over the whole batch of one
/// `forward_backward`, before any split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// Σ ℓ m / N.
    TokenMean,
    /// Mean over sequences of the mean over their tokens.
    SequenceMeanTokenMean,
    /// Mean over sequences of the sum over their tokens.
    SequenceMeanTokenSum,
    /// Σ ℓ m / (B · length): Dr.GRPO.
    Constant {
        /// The constant length, in tokens.
        length: u32,
    },
    /// Σ ℓ m / length, whatever the number of sequences.
    SumConstant {
        /// The constant length, in tokens.
        length: u32,
    },
    /// Mean over groups of the mean over their tokens.
    PromptMean,
}

/// Estimator of the KL to the reference (ALGORITHMS.md section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlEstimator {
    /// `log π − log π_ref`; right as a reward penalty only.
    K1,
    /// `½ (log π − log π_ref)²`.
    K2,
    /// `e^x − x − 1` with `x = log π_ref − log π`.
    K3,
    /// k3 times the ratio, with gradient (DeepSeek-V3.2).
    UnbiasedK3,
}

/// KL term of the loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KlTerm {
    /// Which estimator.
    pub estimator: KlEstimator,
    /// β.
    pub coefficient: f32,
}

/// Everything that one `forward_backward` needs to know beside its rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LossSpec {
    /// Loss of the `Rl` stream.
    pub policy_loss: PolicyLoss,
    /// How token losses are added up.
    pub aggregation: Aggregation,
    /// KL to the frozen reference, added to the `Rl` stream's tokens; needs a reference. A correction weights it as well.
    pub kl: Option<KlTerm>,
    /// c in `L −= c · mean H`.
    pub entropy_coefficient: f32,
    /// What the ratio π_θ/π_old is taken over.
    pub ratio_level: RatioLevel,
    /// What a sequence is.
    pub sequence_scope: SequenceScope,
    /// δ: bound of the unclipped ratio, of PPO and importance sampling (INTELLECT-2, arXiv 2505.07291); `None` sets none.
    pub ratio_max: Option<f32>,
    /// Correction between π_old and μ; `None` applies none.
    pub correction: Option<Correction>,
    /// δ (nats): tokens with a negative advantage are dropped where the mean of `log μ − log π_θ` over the sequence is above
    /// it (DeepSeek-V3.2, arXiv 2512.02556); `None` drops none.
    pub off_policy_mask: Option<f32>,
}

impl Default for LossSpec {
    /// ALGORITHMS.md section 0.
    fn default() -> Self {
        Self {
            policy_loss: PolicyLoss::Ppo { clip_low: 0.2, clip_high: 0.28, dual_clip: None },
            aggregation: Aggregation::TokenMean,
            kl: None,
            entropy_coefficient: 0.0,
            ratio_level: RatioLevel::Token,
            sequence_scope: SequenceScope::Rollout,
            ratio_max: None,
            correction: None,
            off_policy_mask: None,
        }
    }
}

/// What one `forward_backward` found. Means are over trained tokens of the whole batch.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ForwardBackwardReport {
    /// The loss, as aggregated.
    pub loss: f64,
    /// Trained tokens.
    pub trained_tokens: u64,
    /// All tokens that went through the model, padding not counted.
    pub total_tokens: u64,
    /// Mean entropy (nats).
    pub entropy: f64,
    /// Share of tokens whose ratio was clipped.
    pub clip_fraction: f64,
    /// Mean k3 between π_old and π_θ.
    pub approximate_kl: f64,
    /// Mean KL to the reference; 0 without one.
    pub reference_kl: f64,
    /// Mean ratio.
    pub ratio_mean: f64,
    /// Largest ratio.
    pub ratio_max: f64,
    /// Mean of |log π_θ − log μ| (nats). Under the weights as they were when the step began it is how far trainer and sampler
    /// disagree; after an optimiser step what that has moved is in it as well.
    pub mismatch_mean: f64,
    /// Largest |log π_θ − log μ| (nats).
    pub mismatch_max: f64,
    /// Mean k3 between π_θ and μ (nats), of the tokens of μ: `r − 1 − log r` with r = π_θ/μ.
    #[serde(default)]
    pub mismatch_k3: f64,
    /// Effective sample size of the policy-gradient tokens under the weights w = π_θ/μ, as a share of their number N:
    /// `(Σ w)² / (N Σ w²)` (Kish, Survey Sampling, 1965). 1 when trainer and sampler agree or differ by one factor
    /// everywhere, 1/N when one token outweighs all others; 0 without such tokens.
    pub effective_sample_size: f64,
    /// Mean negative log-probability of trained tokens (nats).
    pub cross_entropy: f64,
    /// Mean of the correction's weights over the policy-gradient tokens; 1 without a correction, 0 without such tokens.
    pub correction_mean: f64,
    /// Largest of them.
    pub correction_max: f64,
    /// Share of the policy-gradient tokens that the correction's mask or the off-policy mask dropped.
    pub masked_share: f64,
    /// Mean of the policy-gradient tokens' weights.
    pub advantage_mean: f64,
    /// Their standard deviation (of the whole batch, divided by N).
    pub advantage_deviation: f64,
}

/// AdamW's step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimiserStep {
    /// Step size.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Global gradient norm above which gradients are scaled down; `None` does not clip.
    pub gradient_norm_max: Option<f64>,
}

/// What one optimiser step did.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct OptimiserReport {
    /// Global gradient norm before clipping.
    pub gradient_norm: f64,
    /// Whether the step was skipped because a gradient was not finite.
    pub skipped: bool,
    /// Version of the weights after the step.
    pub policy_version: PolicyVersion,
}

/// Log-probabilities of a row's tokens under some weights; entry 0 and masked entries are 0.
#[derive(Debug, Clone, PartialEq)]
pub struct RowLogProbs {
    /// Log-probability (nats) per id.
    pub log_probs: Vec<f32>,
    /// Entropy (nats) per id.
    pub entropies: Vec<f32>,
}

/// Derivatives of a caller's own loss with respect to a row's tokens. Each list has one entry per id, of which those outside
/// the mask are not read; an empty list stands for zeros.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RowDerivatives {
    /// With respect to log-probs.
    pub log_probs: Vec<f32>,
    /// With respect to entropies.
    pub entropies: Vec<f32>,
}
