//! Importance weights between the trainer's policy at the start of the update and the one that drew: π_old/μ, without
//! derivative (ALGORITHMS.md section 7).
//!
//! They need nothing of the trained weights. Where π_old is μ every weight is exactly 1, so the ratio π_θ/μ of such tokens
//! is never corrected a second time.

use std::collections::BTreeMap;

use fulgurite_core::training::{Correction, CorrectionRule, RatioLevel, SequenceScope, Stream, TrainingRow};

use super::ratio::{SequenceKey, bounded, bounded_exp, sequence};
use super::{Given, trained};

/// The correction of one batch.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Corrections {
    correction: Correction,
    scope: SequenceScope,
    /// Tokens of each sequence and Σ log π_old − log μ over them.
    sequences: BTreeMap<SequenceKey, (usize, f64)>,
    /// What weights are divided by.
    mean: f64,
}

impl Corrections {
    pub(super) fn new(correction: Correction, scope: SequenceScope, rows: &[TrainingRow]) -> Self {
        let mut all = Self { correction, scope, sequences: BTreeMap::new(), mean: 1.0 };
        let drawn = || rows.iter().filter(|row| row.stream != Stream::Ce);
        let tokens = || drawn().flat_map(|row| trained(row).map(move |at| (row, at)));
        for (row, at) in tokens() {
            let given = Given::of(row, at);
            let (tokens, sum) = all.sequences.entry(sequence(scope, row, at)).or_default();
            *tokens += 1;
            *sum += bounded(given.old - given.behaviour);
        }
        if correction.batch_normalise {
            let of_sequence = |(tokens, sum): &(usize, f64)| all.ruled(all.of_sequence(*tokens, *sum)).unwrap_or(0.0);
            let (count, sum) = if correction.level == RatioLevel::Token {
                let weights = tokens().map(|(row, at)| all.weight(row, at, &Given::of(row, at)).unwrap_or(0.0));
                weights.fold((0_usize, 0.0), |(count, sum), weight| (count + 1, sum + weight))
            } else {
                (all.sequences.len(), all.sequences.values().map(of_sequence).sum())
            };
            // When all is dropped there is nothing to divide.
            if sum > 0.0 {
                all.mean = sum / count as f64;
            }
        }
        all
    }

    /// A token's weight; `None` drops it.
    pub(super) fn weight(&self, row: &TrainingRow, at: usize, given: &Given) -> Option<f64> {
        let weight = match (self.correction.level, self.sequences.get(&sequence(self.scope, row, at))) {
            (RatioLevel::SequenceMean | RatioLevel::SequenceSum, Some((tokens, sum))) => {
                self.of_sequence(*tokens, *sum)
            }
            _ => bounded_exp(given.old - given.behaviour).0,
        };
        self.ruled(weight).map(|weight| weight / self.mean)
    }

    fn of_sequence(&self, tokens: usize, sum: f64) -> f64 {
        let divisor = if self.correction.level == RatioLevel::SequenceMean { tokens as f64 } else { 1.0 };
        bounded_exp(sum / divisor).0
    }

    fn ruled(&self, weight: f64) -> Option<f64> {
        match self.correction.rule {
            CorrectionRule::Truncate { max } => Some(weight.min(f64::from(max))),
            CorrectionRule::Mask { min, max } => {
                let is_kept = weight >= f64::from(min) && weight <= f64::from(max);
                is_kept.then_some(weight)
            }
        }
    }
}
