//! What goes into and comes out of the store beside the records of `fulgurite-core`.

use std::collections::BTreeMap;

use fulgurite_core::id::{AttemptKey, ContentHash};
use fulgurite_core::outcome::AttemptOutcome;
use fulgurite_core::record::{RolloutMode, RolloutRecord};
use fulgurite_core::reward::Reward;
use fulgurite_core::span::Span;
use fulgurite_core::state::{AttemptState, RolloutState};

/// What became of one spec handed to [`enqueue`](crate::RolloutStore::enqueue).
#[derive(Debug, Clone, PartialEq)]
pub enum Enqueued {
    /// It is new.
    New(RolloutRecord),
    /// It was there before with an equal spec, perhaps finished.
    Existing(RolloutRecord),
}

impl Enqueued {
    /// The record, new or not.
    #[must_use]
    pub const fn record(&self) -> &RolloutRecord {
        match self {
            Self::New(record) | Self::Existing(record) => record,
        }
    }

    /// The record, new or not.
    #[must_use]
    pub fn into_record(self) -> RolloutRecord {
        match self {
            Self::New(record) | Self::Existing(record) => record,
        }
    }

    /// Whether the rollout was there before.
    #[must_use]
    pub const fn is_existing(&self) -> bool {
        matches!(self, Self::Existing(_))
    }
}

/// Which rollouts to list. Fields that are `None` do not filter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RolloutQuery {
    /// Only those of this pipeline stage.
    pub stage: Option<String>,
    /// Only those of this step.
    pub step: Option<u64>,
    /// Only those in this state.
    pub state: Option<RolloutState>,
    /// Only those of this mode.
    pub mode: Option<RolloutMode>,
    /// How many that fit are skipped first.
    pub offset: usize,
    /// How many are returned at most.
    pub limit: Option<usize>,
}

impl RolloutQuery {
    /// Whether a rollout fits; offset and limit aside.
    #[must_use]
    pub fn fits(&self, record: &RolloutRecord) -> bool {
        self.stage.as_ref().is_none_or(|stage| *stage == record.spec.stage)
            && self.step.is_none_or(|step| step == record.spec.step)
            && self.state.is_none_or(|state| state == record.state)
            && self.mode.is_none_or(|mode| mode == record.spec.mode)
    }
}

/// The end of one attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct AttemptFinish {
    /// Which attempt.
    pub key: AttemptKey,
    /// Its last state; terminal.
    pub state: AttemptState,
    /// How it ended.
    pub outcome: AttemptOutcome,
    /// The accepted rewards; finite.
    pub rewards: Vec<Reward>,
    /// Real end in nanoseconds since the Unix epoch.
    pub end_unix_ns: u64,
    /// Guest CPU time in microseconds, agent and tools together.
    pub guest_cpu_us: u64,
    /// Spans that were not appended before.
    pub spans: Vec<Span>,
    /// Where the rollout goes: `succeeded`, `failed`, `requeuing` or `cancelled`.
    pub rollout_state: RolloutState,
}

/// A published prompt template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Its name.
    pub name: String,
    /// Version of the resources in which this text was published.
    pub version: u64,
    /// Its text.
    pub text: String,
    /// Content hash of its text.
    pub hash: ContentHash,
}

/// Counts of a store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreStatistics {
    /// Rollouts by state; states without any are absent.
    pub rollouts: BTreeMap<RolloutState, u64>,
    /// Attempts, live ones included.
    pub attempts: u64,
    /// Recorded spans.
    pub spans: u64,
    /// Encoded size of the recorded spans in bytes.
    pub span_bytes: u64,
    /// Newest version of the resources.
    pub resources_version: u64,
    /// Size of the store's files in bytes; `None` in memory.
    pub disk_bytes: Option<u64>,
}

impl StoreStatistics {
    /// All rollouts.
    #[must_use]
    pub fn rollouts_total(&self) -> u64 {
        self.rollouts.values().sum()
    }

    /// Rollouts in one state.
    #[must_use]
    pub fn rollouts_in(&self, state: RolloutState) -> u64 {
        self.rollouts.get(&state).copied().unwrap_or(0)
    }
}
