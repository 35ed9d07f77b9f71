//! Running sums over the trained tokens of a batch, and the report that they make.

use fulgurite_core::training::ForwardBackwardReport;

use crate::loss::{self, Compared, Seen, TokenLoss};

/// Sums over trained tokens.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sums {
    pub(crate) loss: f64,
    tokens: u64,
    entropy: f64,
    cross_entropy: f64,
    /// Of the policy-gradient stream only, from here on.
    policy_tokens: u64,
    clipped: u64,
    approximate_kl: f64,
    reference_kl: f64,
    ratio: f64,
    ratio_max: f64,
    mismatch: f64,
    mismatch_max: f64,
    mismatch_k3: f64,
    importance: f64,
    importance_squared: f64,
    correction: f64,
    correction_max: f64,
    dropped: u64,
    advantage: f64,
    advantage_squared: f64,
}

impl Sums {
    /// Books a trained token of any stream.
    pub(crate) fn token(&mut self, seen: &Seen) {
        self.tokens += 1;
        self.entropy += seen.entropy;
        self.cross_entropy -= seen.log_prob;
    }

    /// Books a policy-gradient token, but for its loss.
    #[expect(clippy::float_cmp, reason = "two infinite log-probs are equal")]
    pub(crate) fn policy_token(&mut self, compared: &Compared, token: &TokenLoss, log_prob: f64) {
        self.policy_tokens += 1;
        self.clipped += u64::from(token.clipped);
        self.approximate_kl += loss::approximate_kl(log_prob, compared.old);
        self.reference_kl += token.reference_kl;
        self.ratio += token.ratio;
        self.ratio_max = self.ratio_max.max(token.ratio);
        // Two that think a token impossible agree.
        let mismatch = if log_prob == compared.behaviour { 0.0 } else { (log_prob - compared.behaviour).abs() };
        self.mismatch += mismatch;
        self.mismatch_max = self.mismatch_max.max(mismatch);
        self.mismatch_k3 += loss::approximate_kl(log_prob, compared.behaviour);
        let importance = loss::importance(log_prob, compared.behaviour);
        self.importance += importance;
        self.importance_squared += importance * importance;
        self.correction += token.correction;
        self.correction_max = self.correction_max.max(token.correction);
        self.dropped += u64::from(token.dropped);
        self.advantage += compared.advantage;
        self.advantage_squared += compared.advantage * compared.advantage;
    }

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
        self.mismatch_k3 += other.mismatch_k3;
        self.importance += other.importance;
        self.importance_squared += other.importance_squared;
        self.correction += other.correction;
        self.correction_max = self.correction_max.max(other.correction_max);
        self.dropped += other.dropped;
        self.advantage += other.advantage;
        self.advantage_squared += other.advantage_squared;
    }

    /// What is told of a batch of so many tokens.
    pub(crate) fn report(&self, total_tokens: u64) -> ForwardBackwardReport {
        let mean = |sum: f64, tokens: u64| if tokens == 0 { 0.0 } else { sum / tokens as f64 };
        let advantage_mean = mean(self.advantage, self.policy_tokens);
        let advantage_variance = mean(self.advantage_squared, self.policy_tokens) - advantage_mean * advantage_mean;
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
            mismatch_k3: mean(self.mismatch_k3, self.policy_tokens),
            effective_sample_size: if self.importance_squared > 0.0 {
                self.importance.powi(2) / (self.policy_tokens as f64 * self.importance_squared)
            } else {
                0.0
            },
            cross_entropy: mean(self.cross_entropy, self.tokens),
            correction_mean: mean(self.correction, self.policy_tokens),
            correction_max: self.correction_max,
            masked_share: mean(self.dropped as f64, self.policy_tokens),
            advantage_mean,
            // Rounding can take the variance of equal advantages below 0.
            advantage_deviation: advantage_variance.max(0.0).sqrt(),
        }
    }
}
