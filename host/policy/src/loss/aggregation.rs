//! How token losses become one number (ALGORITHMS.md section 6).

use std::collections::BTreeMap;

use fulgurite_core::training::{Aggregation, SequenceScope, Stream, TrainingRow};

use super::ratio::{SequenceKey, sequence};
use super::trained;
use crate::error::PolicyError;

/// Global normalisers of one batch, taken before any split. Each stream has its own, so that mixing demonstrations with
/// rollouts dilutes neither.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Normalisers {
    aggregation: Aggregation,
    scope: SequenceScope,
    policy_gradient: StreamTotals,
    cross_entropy: StreamTotals,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct StreamTotals {
    tokens: usize,
    /// Trained tokens of each sequence over all its rows; sequences without any do not count.
    sequences: BTreeMap<SequenceKey, usize>,
    /// The same of groups.
    groups: BTreeMap<u64, usize>,
}

impl Normalisers {
    /// Counts a batch.
    ///
    /// # Errors
    /// When the aggregation's constant length is 0, or means over groups are asked for and a row is of none.
    pub(crate) fn new(
        aggregation: &Aggregation,
        scope: SequenceScope,
        rows: &[TrainingRow],
    ) -> Result<Self, PolicyError> {
        if matches!(aggregation, Aggregation::Constant { length: 0 } | Aggregation::SumConstant { length: 0 }) {
            let text =
                "the aggregation's constant length is 0: give a length in tokens, the longest answer's for example";
            return Err(PolicyError::InvalidBatch(text.to_owned()));
        }
        let mut all = Self {
            aggregation: aggregation.clone(),
            scope,
            policy_gradient: StreamTotals::default(),
            cross_entropy: StreamTotals::default(),
        };
        for row in rows {
            let totals = if row.stream == Stream::Ce { &mut all.cross_entropy } else { &mut all.policy_gradient };
            let mut tokens = 0;
            for at in trained(row) {
                tokens += 1;
                *totals.sequences.entry(sequence(scope, row, at)).or_default() += 1;
            }
            totals.tokens += tokens;
            match row.group {
                Some(group) if tokens > 0 => *totals.groups.entry(group).or_default() += tokens,
                None if tokens > 0 && *aggregation == Aggregation::PromptMean => {
                    let text = "an entry has no group: the aggregation `prompt-mean` takes means over groups";
                    return Err(PolicyError::InvalidBatch(text.to_owned()));
                }
                _ => {}
            }
        }
        Ok(all)
    }

    /// What a token's loss is multiplied with.
    pub(crate) fn coefficient(&self, row: &TrainingRow, at: usize) -> f64 {
        let totals = if row.stream == Stream::Ce { &self.cross_entropy } else { &self.policy_gradient };
        let sequences = totals.sequences.len() as f64;
        let divisor = match self.aggregation {
            Aggregation::TokenMean => totals.tokens as f64,
            Aggregation::SequenceMeanTokenMean => {
                let tokens = totals.sequences.get(&sequence(self.scope, row, at)).copied().unwrap_or(0);
                sequences * tokens as f64
            }
            Aggregation::SequenceMeanTokenSum => sequences,
            Aggregation::Constant { length } => sequences * f64::from(length),
            Aggregation::SumConstant { length } => f64::from(length),
            Aggregation::PromptMean => {
                let tokens = row.group.and_then(|group| totals.groups.get(&group)).copied().unwrap_or(0);
                totals.groups.len() as f64 * tokens as f64
            }
        };
        if divisor > 0.0 { 1.0 / divisor } else { 0.0 }
    }

    /// What a policy-gradient token's entropy is multiplied with in their mean.
    pub(crate) fn entropy_coefficient(&self) -> f64 {
        let tokens = self.policy_gradient.tokens;
        if tokens == 0 { 0.0 } else { 1.0 / tokens as f64 }
    }
}
