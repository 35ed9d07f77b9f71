//! Ratios π_θ/π_old of tokens and sequences, and how far sequences have drifted from the policy that drew them.

use std::collections::BTreeMap;

use fulgurite_core::training::{LossSpec, PolicyLoss, RatioLevel, RowLogProbs, SequenceScope, Stream, TrainingRow};

use super::{Given, trained};

/// Bound of log differences before they are exponentiated (verl and Agent Lightning have the same).
pub(super) const LOG_DIFFERENCE_MAX: f64 = 20.0;

/// Number of a sequence in the batch: of the rollout, and of the call in it where sequences are calls.
pub(super) type SequenceKey = (u32, u32);

/// The sequence of a token.
pub(super) fn sequence(scope: SequenceScope, row: &TrainingRow, at: usize) -> SequenceKey {
    let call = match scope {
        SequenceScope::Rollout => 0,
        SequenceScope::Call => row.calls.get(at).copied().unwrap_or(0),
    };
    (row.sequence, call)
}

/// A log difference within bounds. Two infinite log-probs cancel to NaN; they agree, so the difference is 0.
pub(super) fn bounded(difference: f64) -> f64 {
    if difference.is_nan() { 0.0 } else { difference.clamp(-LOG_DIFFERENCE_MAX, LOG_DIFFERENCE_MAX) }
}

/// Log-prob (nats) that stands for that of an impossible token: e^-104 is 0 in `f32`.
const IMPOSSIBLE_LOG_PROB: f64 = -104.0;

/// A log-prob that a loss can be multiplied with, and whether it was held: what is held is constant.
pub(super) fn possible(log_prob: f64) -> (f64, bool) {
    if log_prob == f64::NEG_INFINITY { (IMPOSSIBLE_LOG_PROB, true) } else { (log_prob, false) }
}

/// The difference of two log-probs, of which either may be that of an impossible token, and whether it was held. Two of
/// them agree; finite differences stay as they are, whatever their size.
pub(super) fn difference(a: f64, b: f64) -> (f64, bool) {
    match a - b {
        x if x.is_nan() => (0.0, true),
        x if x.is_infinite() => (IMPOSSIBLE_LOG_PROB.abs().copysign(x), true),
        x => (x, false),
    }
}

/// `exp` of a bounded log difference, and whether the bound held it: then its derivative is 0.
pub(super) fn bounded_exp(difference: f64) -> (f64, bool) {
    (bounded(difference).exp(), difference.is_nan() || difference.abs() > LOG_DIFFERENCE_MAX)
}

/// A ratio as the loss of one token sees it. The token's loss is `share · ℓ(value)` and its derivative with respect to the
/// token's log-prob `share · ℓ'(value) · slope`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Ratio {
    pub(super) value: f64,
    pub(super) slope: f64,
    pub(super) share: f64,
}

impl Ratio {
    /// The token's own.
    pub(super) fn of_token(log_prob: f64, old: f64) -> Self {
        let (value, is_bounded) = bounded_exp(log_prob - old);
        Self { value, slope: if is_bounded { 0.0 } else { value }, share: 1.0 }
    }
}

/// Whether a loss needs log-probs of whole sequences under the trained weights.
pub(super) fn looks_at_sequences(spec: &LossSpec) -> bool {
    let has_ratio = spec.policy_loss != PolicyLoss::Reinforce;
    (has_ratio && spec.ratio_level != RatioLevel::Token) || spec.off_policy_mask.is_some()
}

/// Sums over the trained tokens of one sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Drift {
    tokens: usize,
    /// Σ log π_θ − log π_old.
    from_old: f64,
    /// Σ log μ − log π_θ.
    to_behaviour: f64,
}

/// How far the sequences of a batch have drifted under the trained weights.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Drifts {
    scope: SequenceScope,
    sequences: BTreeMap<SequenceKey, Drift>,
}

impl Drifts {
    /// From the batch's log-probs under the trained weights.
    pub(super) fn new(scope: SequenceScope, rows: &[TrainingRow], log_probs: &[RowLogProbs]) -> Self {
        let mut sequences: BTreeMap<SequenceKey, Drift> = BTreeMap::new();
        for (row, known) in rows.iter().zip(log_probs).filter(|(row, _)| row.stream != Stream::Ce) {
            for at in trained(row) {
                let log_prob = known.log_probs.get(at).copied().map_or(f64::NAN, f64::from);
                let given = Given::of(row, at);
                let drift = sequences.entry(sequence(scope, row, at)).or_default();
                drift.tokens += 1;
                drift.from_old += bounded(log_prob - given.old);
                drift.to_behaviour += bounded(given.behaviour - log_prob);
            }
        }
        Self { scope, sequences }
    }

    fn of(&self, row: &TrainingRow, at: usize) -> Option<&Drift> {
        self.sequences.get(&sequence(self.scope, row, at))
    }

    /// The ratio that a token's loss sees, in token form: with the sequence's value, and as derivative the token's part of
    /// the sequence's. `own` is the token's own ratio.
    pub(super) fn ratio(&self, level: RatioLevel, row: &TrainingRow, at: usize, own: Ratio) -> Ratio {
        let Some(drift) = self.of(row, at) else { return own };
        let tokens = drift.tokens as f64;
        let (value, is_bounded) = match level {
            RatioLevel::Token => return own,
            RatioLevel::SequenceMean => bounded_exp(drift.from_old / tokens),
            RatioLevel::SequenceSum => bounded_exp(drift.from_old),
        };
        // A token whose own difference is bounded adds a constant to the sequence's.
        let slope = if is_bounded || own.slope == 0.0 { 0.0 } else { value };
        if level == RatioLevel::SequenceSum {
            Ratio { value, slope: slope * tokens, share: 1.0 / tokens }
        } else {
            Ratio { value, slope, share: 1.0 }
        }
    }

    /// Whether the off-policy mask drops a token with this advantage.
    pub(super) fn is_off_policy(&self, spec: &LossSpec, row: &TrainingRow, at: usize, advantage: f64) -> bool {
        let (Some(delta), Some(drift)) = (spec.off_policy_mask, self.of(row, at)) else { return false };
        advantage < 0.0 && drift.to_behaviour / drift.tokens as f64 > f64::from(delta)
    }
}
