//! What a loss makes of tokens before the model has seen any: for people who ask why.

use std::collections::BTreeMap;

use fulgurite_core::training::{LossSpec, Stream, TrainingRow};

use super::aggregation::Normalisers;
use super::correction::Corrections;
use super::{Given, check, trained};
use crate::error::PolicyError;

/// A call of a batch: its sequence, whether it is of the cross-entropy stream, and its number in the sequence.
pub type CallKey = (u32, bool, u32);

/// What a loss makes of the trained tokens of one call.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CallShare {
    /// Trained tokens.
    pub tokens: u64,
    /// Mean of what their losses are multiplied with when they are added up.
    pub coefficient: f64,
    /// Mean of the correction's weights on them; 0 for what its mask drops. `None` without a correction.
    pub correction: Option<f64>,
    /// Tokens that the correction's mask drops. What the off-policy mask drops is not known before the model has seen them.
    pub dropped: u64,
}

/// The shares of all calls of a batch, by the code that the loss itself takes them from.
///
/// # Errors
/// When a setting makes no sense, or an entry lacks what the aggregation needs.
pub fn call_shares(spec: &LossSpec, rows: &[TrainingRow]) -> Result<BTreeMap<CallKey, CallShare>, PolicyError> {
    check::loss(spec)?;
    let normalisers = Normalisers::new(&spec.aggregation, spec.sequence_scope, rows)?;
    let corrections = spec.correction.map(|rule| Corrections::new(rule, spec.sequence_scope, rows));
    let mut shares: BTreeMap<CallKey, CallShare> = BTreeMap::new();
    for row in rows {
        let is_given = row.stream == Stream::Ce;
        for at in trained(row) {
            let call = row.calls.get(at).copied().unwrap_or(0);
            let share = shares.entry((row.sequence, is_given, call)).or_default();
            share.tokens += 1;
            share.coefficient += normalisers.coefficient(row, at);
            if let Some(corrections) = corrections.as_ref().filter(|_| !is_given) {
                let weight = corrections.weight(row, at, &Given::of(row, at));
                share.dropped += u64::from(weight.is_none());
                *share.correction.get_or_insert(0.0) += weight.unwrap_or(0.0);
            }
        }
    }
    for share in shares.values_mut() {
        let tokens = share.tokens as f64;
        share.coefficient /= tokens;
        share.correction = share.correction.map(|sum| sum / tokens);
    }
    Ok(shares)
}
