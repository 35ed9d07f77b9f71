//! What goes into and comes out of the store beside the records of `fulgurite-core`.

use std::collections::BTreeMap;
use std::sync::Arc;

use fulgurite_core::id::{AttemptKey, ContentHash};
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::record::{AttemptRecord, RolloutRecord};
use fulgurite_core::reward::Reward;
use fulgurite_core::span::Span;
use fulgurite_core::state::{AttemptState, RolloutState};

/// Longest id of a worker in bytes.
pub const WORKER_ID_BYTES_MAX: usize = 128;

/// Stands for content that was not recorded: the item and the execution settings of rollouts from before schema 2. No blob
/// has this hash, so what wants to run such a rollout again finds out that it cannot.
#[must_use]
pub fn unknown_content() -> ContentHash {
    ContentHash::of(b"unknown")
}

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

/// What the store has of one attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct RecordedAttempt {
    /// Its rollout.
    pub rollout: RolloutRecord,
    /// The attempt.
    pub attempt: AttemptRecord,
    /// The spans that it has recorded itself, by sequence.
    pub spans: Vec<Span>,
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
    pub spans: Arc<Vec<Span>>,
    /// Why the rollout cannot be forked; `None` when it can, or when that was known when the attempt began.
    pub not_forkable: Option<String>,
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
    /// Ended attempts by kind of outcome; kinds without any are absent.
    pub outcomes: BTreeMap<OutcomeKind, u64>,
    /// Attempts, live ones included.
    pub attempts: u64,
    /// Recorded spans.
    pub spans: u64,
    /// Encoded size of the recorded spans in bytes.
    pub span_bytes: u64,
    /// Values kept by content hash.
    pub blobs: u64,
    /// Their size in bytes.
    pub blob_bytes: u64,
    /// Workers that have been heard of.
    pub workers: u64,
    /// Newest version of the resources.
    pub resources_version: u64,
    /// Size of the store's files in bytes; `None` in memory.
    pub disk_bytes: Option<u64>,
    /// Syncs since the store was opened.
    pub syncs: SyncStatistics,
}

/// What waiting for the disk has cost since a store was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SyncStatistics {
    /// Flushes with their fdatasync.
    pub syncs: u64,
    /// Commits that they made durable: more than one per sync where threads have shared it.
    pub commits: u64,
    /// Half of the syncs took at most this long, in microseconds; exact to a fifth.
    pub p50_us: u64,
    /// 99 of 100 syncs took at most this long, in microseconds; exact to a fifth.
    pub p99_us: u64,
    /// The longest one in microseconds.
    pub max_us: u64,
}

/// Which rollouts to drop: those that have ended and fit all that is set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PruneRule {
    /// Only those of this pipeline stage.
    pub stage: Option<String>,
    /// Only those of steps before this one.
    pub before_step: Option<u64>,
    /// Only those outside the newest so many steps of their stage.
    pub keep_steps: Option<u64>,
    /// Only those in one of these states; empty: in any. Those that have not ended are never dropped.
    pub states: Vec<RolloutState>,
    /// Whether only to say what would be dropped.
    pub dry_run: bool,
}

/// What retention has dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PruneReport {
    /// Rollouts.
    pub rollouts: u64,
    /// Their attempts.
    pub attempts: u64,
    /// Their spans.
    pub spans: u64,
    /// Encoded size of these spans in bytes.
    pub span_bytes: u64,
    /// Rollouts that fit the rule and stay, because a fork that stays refers to them.
    pub kept_for_forks: u64,
    /// Size on disk before, in bytes; `None` in memory.
    pub disk_bytes_before: Option<u64>,
    /// Size on disk after, in bytes: about the same until the store is compacted.
    pub disk_bytes_after: Option<u64>,
}

/// What compaction has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CompactReport {
    /// Size of the database before, in bytes.
    pub bytes_before: u64,
    /// Size after.
    pub bytes_after: u64,
    /// Records that were kept.
    pub records: u64,
    /// Blobs that no rollout refers to, left out.
    pub blobs: u64,
    /// Fragments that no record has any more, left out.
    pub leftovers: u64,
}

/// What an export has written, or an import has read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TransferReport {
    /// Lines, the first and the last one included.
    pub lines: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// Rollouts.
    pub rollouts: u64,
    /// Spans.
    pub spans: u64,
}

/// One thing that is wrong in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Which record, for people.
    pub record: String,
    /// What is wrong with it.
    pub problem: String,
}

/// What a check has read and found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Keys in the database.
    pub keys: u64,
    /// Rollouts.
    pub rollouts: u64,
    /// Attempts.
    pub attempts: u64,
    /// Spans.
    pub spans: u64,
    /// Values kept by content hash.
    pub blobs: u64,
    /// Versions of the resources.
    pub resources: u64,
    /// Workers.
    pub workers: u64,
    /// What is wrong, the first [`FINDINGS_MAX`](crate::FINDINGS_MAX).
    pub findings: Vec<Finding>,
    /// How many things are wrong.
    pub findings_total: u64,
    /// Blobs that no rollout refers to: a crash, or retention, left them. Compaction drops them.
    pub unreferenced_blobs: u64,
    /// Fragments that no record has any more. Compaction drops them.
    pub leftover_fragments: u64,
    /// Items and execution settings that rollouts refer to and nobody put here: these rollouts cannot be run again.
    pub missing_contents: u64,
    /// Items and execution settings of rollouts from before schema 2, which did not record them.
    pub unknown_contents: u64,
}

impl CheckReport {
    /// Whether nothing is wrong.
    #[must_use]
    pub const fn is_sound(&self) -> bool {
        self.findings_total == 0
    }
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
