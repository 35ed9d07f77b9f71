//! Running sums over the trained tokens of a batch, and the report that they make.

use fulgurite_core::training::ForwardBackwardReport;

/// Sums over trained tokens.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sums {
    pub(crate) loss: f64,
    pub(crate) tokens: u64,
    pub(crate) entropy: f64,
    pub(crate) cross_entropy: f64,
    /// Of the policy-gradient stream only, from here on.
    pub(crate) policy_tokens: u64,
    pub(crate) clipped: u64,
    pub(crate) approximate_kl: f64,
    pub(crate) reference_kl: f64,
    pub(crate) ratio: f64,
    pub(crate) ratio_max: f64,
    pub(crate) mismatch: f64,
    pub(crate) mismatch_max: f64,
    pub(crate) importance: f64,
    pub(crate) importance_squared: f64,
}

impl Sums {
    /// Adds another shard's.
    pub(crate) fn add(&mut self, other: &Self) {
        self.loss += other.loss;
        self.tokens += other.tokens;
        self.entropy += other.entropy;
        self.cross_entropy += other.cross_entropy;
        self.policy_tokens += other.policy_tokens;
        self.clipped += other.clipped;
        self.approximate_kl += other.approximate_kl;
        self.reference_kl += other.reference_kl;
        self.ratio += other.ratio;
        self.ratio_max = self.ratio_max.max(other.ratio_max);
        self.mismatch += other.mismatch;
        self.mismatch_max = self.mismatch_max.max(other.mismatch_max);
        self.importance += other.importance;
        self.importance_squared += other.importance_squared;
    }

    /// What is told of a batch of so many tokens.
    pub(crate) fn report(&self, total_tokens: u64) -> ForwardBackwardReport {
        let mean = |sum: f64, tokens: u64| if tokens == 0 { 0.0 } else { sum / tokens as f64 };
        ForwardBackwardReport {
            loss: self.loss,
            trained_tokens: self.tokens,
            total_tokens,
            entropy: mean(self.entropy, self.tokens),
            clip_fraction: mean(self.clipped as f64, self.policy_tokens),
            approximate_kl: mean(self.approximate_kl, self.policy_tokens),
            reference_kl: mean(self.reference_kl, self.policy_tokens),
            ratio_mean: mean(self.ratio, self.policy_tokens),
            ratio_max: self.ratio_max,
            mismatch_mean: mean(self.mismatch, self.policy_tokens),
            mismatch_max: self.mismatch_max,
            effective_sample_size: if self.importance_squared > 0.0 {
                self.importance.powi(2) / (self.policy_tokens as f64 * self.importance_squared)
            } else {
                0.0
            },
            cross_entropy: mean(self.cross_entropy, self.tokens),
        }
    }
}
