//! The loss of a batch: token losses, their derivatives with respect to log-prob and entropy, and how they are added up
//! (ALGORITHMS.md sections 3, 5, 6 and 7).
//!
//! Plain functions in f64. The trainer turns derivatives with respect to log-probs into derivatives with respect to logits
//! analytically, so that no automatic differentiation goes through a softmax and a plugin's own derivatives take the very
//! same way. What a token's loss needs of the rest of the batch (normalisers, sequence-level ratios, a correction's mean) is
//! found before the batch is split, so no split can change it; the backward pass then sees one token at a time.

mod aggregation;
mod check;
mod correction;
mod kl;
#[cfg(test)]
mod mutants;
mod ratio;
mod shares;
mod surrogate;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod vectors;

use fulgurite_core::training::{LossSpec, RowLogProbs, Stream, TrainingRow};

use crate::error::PolicyError;
use crate::sums::Sums;

pub(crate) use aggregation::Normalisers;
use correction::Corrections;
use ratio::{Drifts, Ratio};
pub use shares::{CallKey, CallShare, call_shares};

/// Whether a token is trained: something must come before it to predict it.
pub(crate) fn is_trained(row: &TrainingRow, at: usize) -> bool {
    at > 0 && row.mask.get(at).copied().unwrap_or(false)
}

/// Places of a row's trained tokens.
pub(crate) fn trained(row: &TrainingRow) -> impl Iterator<Item = usize> {
    (0..row.ids.len()).filter(|at| is_trained(row, *at))
}

/// Trained tokens of a row.
pub(crate) fn trained_tokens(row: &TrainingRow) -> usize {
    trained(row).count()
}

/// What the model says of a token (nats).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Seen {
    /// Under the weights that are trained.
    pub(crate) log_prob: f64,
    /// Of the distribution that it was drawn from, under the same weights.
    pub(crate) entropy: f64,
    /// Log-prob under the frozen reference, when there is one.
    pub(crate) reference: Option<f64>,
}

/// Derivatives of the batch's loss with respect to a token's log-prob and entropy.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Slopes {
    pub(crate) log_prob: f64,
    pub(crate) entropy: f64,
}

/// What a row says of one of its tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Given {
    /// Log-prob under the weights at the start of the update (π_old).
    old: f64,
    /// Under the weights that drew it (μ).
    behaviour: f64,
    /// Advantage or token weight.
    weight: f64,
}

impl Given {
    fn of(row: &TrainingRow, at: usize) -> Self {
        let value = |list: &[f32]| list.get(at).copied().map(f64::from);
        let behaviour = value(&row.behaviour_log_probs).unwrap_or(0.0);
        let old = value(&row.old_log_probs).unwrap_or(behaviour);
        Self { old, behaviour, weight: value(&row.weights).unwrap_or(0.0) }
    }
}

/// The loss of one whole batch, ready to be asked for its tokens in any order.
#[derive(Debug, Clone)]
pub(crate) struct BatchLoss {
    spec: LossSpec,
    normalisers: Normalisers,
    corrections: Option<Corrections>,
    /// Only where the loss looks at sequences under the trained weights.
    drifts: Option<Drifts>,
}

impl BatchLoss {
    /// Looks at a checked batch. `forward` gives its log-probs under the trained weights, for every row in the order given;
    /// it is called only for losses that look at whole sequences.
    ///
    /// # Errors
    /// When a setting makes no sense, an entry lacks what the aggregation needs, or `forward` fails.
    pub(crate) fn new(
        spec: LossSpec,
        rows: &[TrainingRow],
        forward: impl FnOnce() -> Result<Vec<RowLogProbs>, PolicyError>,
    ) -> Result<Self, PolicyError> {
        check::loss(&spec)?;
        let normalisers = Normalisers::new(&spec.aggregation, spec.sequence_scope, rows)?;
        let corrections = spec.correction.map(|rule| Corrections::new(rule, spec.sequence_scope, rows));
        let has_policy_tokens = rows.iter().any(|row| row.stream != Stream::Ce && trained_tokens(row) > 0);
        let drifts = if ratio::looks_at_sequences(&spec) && has_policy_tokens {
            Some(Drifts::new(spec.sequence_scope, rows, &forward()?))
        } else {
            None
        };
        Ok(Self { spec, normalisers, corrections, drifts })
    }

    /// Books one trained token and returns the loss's derivatives.
    pub(crate) fn token(&self, row: &TrainingRow, at: usize, seen: Seen, sums: &mut Sums) -> Slopes {
        let given = Given::of(row, at);
        let coefficient = self.normalisers.coefficient(row, at);
        if row.stream == Stream::Ce {
            let (log_prob, is_held) = ratio::possible(seen.log_prob);
            let weight = coefficient * given.weight;
            sums.loss -= weight * log_prob;
            return Slopes { log_prob: if is_held { 0.0 } else { -weight }, entropy: 0.0 };
        }
        let entropy_coefficient = self.normalisers.entropy_coefficient() * f64::from(self.spec.entropy_coefficient);
        let token = self.policy_token(row, at, &given, seen);
        sums.loss += coefficient * token.loss - entropy_coefficient * seen.entropy;
        sums.policy_token(&given.into(), &token, seen.log_prob);
        Slopes { log_prob: coefficient * token.d_log_prob, entropy: -entropy_coefficient }
    }

    /// Surrogate plus the KL term, both weighted: either is a mean over tokens of π_old, and they were drawn from μ.
    fn policy_token(&self, row: &TrainingRow, at: usize, given: &Given, seen: Seen) -> TokenLoss {
        let own = Ratio::of_token(seen.log_prob, given.old);
        let ratio = self.drifts.as_ref().map_or(own, |drifts| drifts.ratio(self.spec.ratio_level, row, at, own));
        let surrogate = surrogate::surrogate(&self.spec, given.weight, seen.log_prob, &ratio);
        let off_policy =
            self.drifts.as_ref().is_some_and(|drifts| drifts.is_off_policy(&self.spec, row, at, given.weight));
        let correction = self.corrections.as_ref().map_or(Some(1.0), |all| all.weight(row, at, given));
        let mut token = TokenLoss {
            loss: 0.0,
            d_log_prob: 0.0,
            ratio: ratio.value,
            clipped: surrogate.clipped,
            reference_kl: 0.0,
            correction: correction.unwrap_or(0.0),
            dropped: off_policy || correction.is_none(),
        };
        // Nothing is multiplied with 0: the loss of what is dropped may be infinite.
        if let (Some(weight), false) = (correction, off_policy) {
            token.loss = weight * surrogate.loss;
            token.d_log_prob = weight * surrogate.d_log_prob;
        }
        if let (Some(term), Some(reference)) = (&self.spec.kl, seen.reference) {
            let (value, slope) = kl::kl(term.estimator, seen.log_prob, reference, &own);
            // What the off-policy mask drops keeps its KL: the mask is about advantages.
            let coefficient = f64::from(term.coefficient) * correction.unwrap_or(0.0);
            token.loss += coefficient * value;
            token.d_log_prob += coefficient * slope;
            token.reference_kl = value;
        }
        token
    }
}

/// A policy-gradient token's loss before aggregation.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct TokenLoss {
    loss: f64,
    d_log_prob: f64,
    pub(crate) ratio: f64,
    pub(crate) clipped: bool,
    pub(crate) reference_kl: f64,
    /// The correction's weight; 0 where it dropped the token.
    pub(crate) correction: f64,
    /// Whether a mask dropped it.
    pub(crate) dropped: bool,
}

/// What the report counts of a policy-gradient token beside its loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Compared {
    pub(crate) old: f64,
    pub(crate) behaviour: f64,
    pub(crate) advantage: f64,
}

impl From<Given> for Compared {
    fn from(given: Given) -> Self {
        Self { old: given.old, behaviour: given.behaviour, advantage: given.weight }
    }
}

/// π_θ/μ of one token.
pub(crate) fn importance(log_prob: f64, behaviour: f64) -> f64 {
    ratio::bounded_exp(log_prob - behaviour).0
}

/// k3 between the policy that drew a token and another one, from its log-probs under the other one and the first.
pub(crate) fn approximate_kl(log_prob: f64, drawn: f64) -> f64 {
    let (ratio, _) = ratio::bounded_exp(log_prob - drawn);
    ratio - 1.0 - ratio.ln()
}
