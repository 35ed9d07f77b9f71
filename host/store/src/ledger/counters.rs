//! Counts of what is in the database, written with every batch.

use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::record::AttemptRecord;
use fulgurite_core::state::RolloutState;
use serde::{Deserialize, Serialize};

use super::Entry;

const STATES: usize = RolloutState::ALL.len();
const OUTCOMES: usize = OutcomeKind::ALL.len();

/// Counts of everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Stored", into = "Stored")]
pub(crate) struct Counters {
    /// By state, in the order of declaration.
    pub(crate) rollouts: [u64; STATES],
    /// Ended attempts by kind of outcome, in the order of declaration.
    pub(crate) outcomes: [u64; OUTCOMES],
    pub(crate) attempts: u64,
    pub(crate) spans: u64,
    /// Encoded spans.
    pub(crate) span_bytes: u64,
    pub(crate) blobs: u64,
    /// Contents of the blobs.
    pub(crate) blob_bytes: u64,
    pub(crate) workers: u64,
    /// Ordinal of the next rollout; ordinals of rollouts that were dropped do not come back.
    pub(crate) next_ordinal: u64,
    pub(crate) resources_version: u64,
    /// Batches applied since the store was made. It goes on through compaction and migration.
    pub(crate) commits: u64,
}

/// Counters on disk: lists, so that a state or a kind more is no new format.
#[derive(Clone, Serialize, Deserialize)]
struct Stored {
    rollouts: Vec<u64>,
    outcomes: Vec<u64>,
    numbers: [u64; 9],
}

impl From<Counters> for Stored {
    fn from(counters: Counters) -> Self {
        Self {
            rollouts: counters.rollouts.to_vec(),
            outcomes: counters.outcomes.to_vec(),
            numbers: [
                counters.attempts,
                counters.spans,
                counters.span_bytes,
                counters.blobs,
                counters.blob_bytes,
                counters.workers,
                counters.next_ordinal,
                counters.resources_version,
                counters.commits,
            ],
        }
    }
}

impl From<Stored> for Counters {
    fn from(stored: Stored) -> Self {
        let mut counters = Self::default();
        counters.rollouts.iter_mut().zip(stored.rollouts).for_each(|(count, stored)| *count = stored);
        counters.outcomes.iter_mut().zip(stored.outcomes).for_each(|(count, stored)| *count = stored);
        [
            counters.attempts,
            counters.spans,
            counters.span_bytes,
            counters.blobs,
            counters.blob_bytes,
            counters.workers,
            counters.next_ordinal,
            counters.resources_version,
            counters.commits,
        ] = stored.numbers;
        counters
    }
}

impl Counters {
    /// Those of a new database. Making it was a commit, so that the number of acknowledged commits is never 0.
    pub(crate) fn first() -> Self {
        Self { commits: 1, ..Self::default() }
    }

    fn state(&mut self, state: RolloutState) -> Option<&mut u64> {
        self.rollouts.get_mut(state as usize)
    }

    pub(crate) fn add_state(&mut self, state: RolloutState) {
        if let Some(count) = self.state(state) {
            *count += 1;
        }
    }

    fn remove_state(&mut self, state: RolloutState) {
        if let Some(count) = self.state(state) {
            *count = count.saturating_sub(1);
        }
    }

    pub(crate) fn add_outcomes(&mut self, attempts: &[AttemptRecord]) {
        for outcome in attempts.iter().filter_map(|attempt| attempt.outcome.as_ref()) {
            if let Some(count) = self.outcomes.get_mut(outcome.kind as usize) {
                *count += 1;
            }
        }
    }

    /// A rollout changes from what is on disk to what it is now.
    pub(super) fn count(&mut self, entry: &Entry) {
        if let Some(state) = entry.stored_state {
            self.remove_state(state);
        }
        self.add_state(entry.rollout.state);
        self.attempts += (entry.attempts.len() - entry.stored_attempts.min(entry.attempts.len())) as u64;
        self.add_outcomes(entry.attempts.get(entry.stored_outcomes..).unwrap_or_default());
    }

    /// A rollout is dropped with all its spans.
    pub(super) fn discount(&mut self, state: RolloutState, attempts: &[AttemptRecord], span_bytes: u64) {
        self.remove_state(state);
        self.attempts = self.attempts.saturating_sub(attempts.len() as u64);
        for attempt in attempts {
            self.spans = self.spans.saturating_sub(attempt.spans);
            if let Some(count) = attempt.outcome.as_ref().and_then(|end| self.outcomes.get_mut(end.kind as usize)) {
                *count = count.saturating_sub(1);
            }
        }
        self.span_bytes = self.span_bytes.saturating_sub(span_bytes);
    }

    /// Rollouts by state; states without any are absent.
    pub(crate) fn by_state(&self) -> impl Iterator<Item = (RolloutState, u64)> {
        RolloutState::ALL.into_iter().zip(self.rollouts).filter(|(_, count)| *count > 0)
    }

    /// Ended attempts by outcome; kinds without any are absent.
    pub(crate) fn by_outcome(&self) -> impl Iterator<Item = (OutcomeKind, u64)> {
        OutcomeKind::ALL.into_iter().zip(self.outcomes).filter(|(_, count)| *count > 0)
    }
}
