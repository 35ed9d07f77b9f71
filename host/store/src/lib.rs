//! Where a run keeps its rollouts, attempts, spans and prompt templates.
//!
//! [`RolloutStore`] is the contract; [`MemoryStore`] and [`SledStore`] keep it. Both are one set of rules
//! (`ledger`, private) over a small ordered key-value interface, so that they cannot drift apart; one conformance suite
//! runs over both. The calls are synchronous and may wait for the disk: from async code, use `spawn_blocking`.
//!
//! What it is not: it runs nothing and decides nothing. Who claims a rollout, when it is retried and what a reward is
//! worth is the runner's and the algorithm's business; the store only refuses what the state machines do not allow.
//!
//! # What is durable when
//! [`enqueue`](RolloutStore::enqueue), [`append_spans`](RolloutStore::append_spans),
//! [`finish_attempts`](RolloutStore::finish_attempts), [`cancel`](RolloutStore::cancel),
//! [`publish_template`](RolloutStore::publish_template) and [`prune`](RolloutStore::prune) return after flush *and*
//! fdatasync. Threads that commit at the same time share one. Blobs and workers are visible at once and durable with the
//! next of these. The start of an attempt is kept in memory until its first spans or its end are written: a crash before
//! that leaves a rollout that was never begun, which is what it is.
//!
//! # Forks
//! A rollout with `fork_of` refers to the first `event` spans of an attempt that has ended, and its own spans go on from
//! there: [`spans`](RolloutStore::spans) and [`AttemptRecord::spans`](fulgurite_core::record::AttemptRecord) mean these
//! alone, [`trajectory`](RolloutStore::trajectory) reads the whole.
//!
//! # Upkeep
//! sled's file only grows. [`prune`](RolloutStore::prune) drops rollouts by a rule, [`SledStore::compact`] gives back what
//! is not needed any more, [`check`](RolloutStore::check) reads everything and says what is wrong,
//! [`export`](RolloutStore::export) and [`SledStore::import`] carry a store as text without loss, and
//! [`SledStore::open`] brings what an older Fulgurite wrote to this schema. Whatever replaces a database writes it beside the
//! old one, reads it back, and switches by one rename.
//!
//! ```
//! use fulgurite_store::{MemoryStore, RolloutQuery, RolloutStore};
//!
//! let store = MemoryStore::new();
//! assert!(store.rollouts(&RolloutQuery::default())?.is_empty());
//! let version = store.publish_template(0, "greeting", "Hello {{ name }}")?;
//! let template = store.template("greeting", Some(version))?.ok_or("not published")?;
//! assert_eq!(template.text, "Hello {{ name }}");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bare_sled;
mod benchmark;
mod check;
mod codec;
mod delegate;
mod error;
pub mod format;
mod hex;
mod jsonl;
mod key_value;
mod keys;
mod ledger;
mod memory;
mod migrate;
mod query;
mod records;
#[cfg(test)]
#[path = "../tests/support/samples.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "shared with tests that use more of it, and fails by panicking")]
mod samples;
mod sled_store;
mod span_text;

use std::sync::Arc;

use fulgurite_core::id::{AttemptKey, ContentHash, RolloutId};
use fulgurite_core::record::{AttemptRecord, RolloutRecord, RolloutSpec, WorkerRecord};
use fulgurite_core::span::Span;

pub use benchmark::{BenchmarkReport, BenchmarkSettings, benchmark};
pub use check::FINDINGS_MAX;
pub use codec::VALUE_BYTES_MAX;
pub use error::{Result, StoreError};
pub use jsonl::JSONL_VERSION;
pub use memory::MemoryStore;
pub use query::{
    AttemptQuery, BodyKind, Cursor, InvalidCursor, PAGE_ITEMS_DEFAULT, PAGE_ITEMS_MAX, Page, ResourceQuery,
    RolloutQuery, RolloutRow, RolloutSort, SpanQuery, WorkerQuery, reward_of,
};
pub use records::{
    AttemptFinish, CheckReport, CompactReport, Enqueued, Finding, PruneReport, PruneRule, RecordedAttempt,
    StoreStatistics, SyncStatistics, Template, TransferReport, WORKER_ID_BYTES_MAX, unknown_content,
};
pub use sled_store::{Progress, SCHEMA_VERSION, SledStore};

/// Keeps rollouts, attempts, spans and prompt templates of one run. See DESIGN.md 5.3 for states and order.
///
/// Every method is atomic, and safe to call from many threads.
pub trait RolloutStore: Send + Sync {
    /// Enqueues rollouts in order, in one durable commit: all of them or, on an error, none. A rollout that is there
    /// already with an equal spec is returned as it stands, which makes a repeated call safe. A fork may only refer to an
    /// attempt that has ended, so that its prefix never changes.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when an id is taken by another spec; [`StoreError::InvalidFork`]; errors of writing.
    fn enqueue(&self, specs: Vec<Arc<RolloutSpec>>) -> Result<Vec<Enqueued>>;

    /// One rollout.
    ///
    /// # Errors
    /// Errors of reading.
    fn rollout(&self, id: &RolloutId) -> Result<Option<RolloutRecord>>;

    /// Rollouts that fit a query, all pages of them from `offset` up to `limit`.
    ///
    /// # Errors
    /// Errors of reading.
    fn rollouts(&self, query: &RolloutQuery) -> Result<Vec<RolloutRecord>>;

    /// Begins the next attempt of a rollout, in state `preparing`. A rollout that is still live (a crash left it) first
    /// has its attempt marked `unresponsive`. `start_unix_ns` is the real time of the start, `worker` the id of who runs
    /// it, or empty.
    ///
    /// # Errors
    /// [`StoreError::UnknownRollout`]; [`StoreError::RolloutEnded`] when the rollout is terminal;
    /// [`StoreError::InvalidWorkerId`]; errors of writing.
    fn begin_attempt(&self, id: &RolloutId, start_unix_ns: u64, worker: &str) -> Result<AttemptRecord>;

    /// The attempt's agent starts to run.
    ///
    /// # Errors
    /// [`StoreError::StaleAttempt`], [`StoreError::AttemptEnded`], [`StoreError::UnknownAttempt`],
    /// [`StoreError::UnknownRollout`]; [`StoreError::IllegalTransition`] when it runs already.
    fn mark_running(&self, key: &AttemptKey) -> Result<()>;

    /// Appends spans of a live attempt. Durable on return. Their sequences go on where the last call ended: from 0, or,
    /// when the rollout is a fork, from the event at which it left its ancestor.
    ///
    /// # Errors
    /// As [`mark_running`](Self::mark_running); [`StoreError::SpanOrder`] and [`StoreError::ForeignSpan`] when the
    /// spans are not the next ones of this attempt; errors of writing.
    fn append_spans(&self, key: &AttemptKey, spans: &[Span]) -> Result<()>;

    /// Appends spans to several live attempts, as [`append_spans`](Self::append_spans) does to one. All of them share one
    /// durable commit, and each has its own result in the order given.
    ///
    /// # Errors
    /// Per item: as [`append_spans`](Self::append_spans).
    fn append_many(&self, appends: &[(AttemptKey, Vec<Span>)]) -> Vec<Result<()>>;

    /// Ends attempts: for each, its last spans, its record and its rollout's state become visible together. All of them
    /// share one durable commit, and each has its own result in the order given.
    ///
    /// # Errors
    /// Per item: as [`append_spans`](Self::append_spans); [`StoreError::IllegalTransition`] when the states asked for
    /// do not follow from those there are, or when only one of attempt and rollout succeeded;
    /// [`StoreError::InvalidReward`].
    fn finish_attempts(&self, finishes: Vec<AttemptFinish>) -> Vec<Result<()>>;

    /// Cancels a rollout. A live attempt of it is recorded as failed with the outcome `cancelled`, and what it still
    /// sends is refused. Durable on return.
    ///
    /// # Errors
    /// [`StoreError::UnknownRollout`]; [`StoreError::RolloutEnded`] when the rollout is terminal; errors of writing.
    fn cancel(&self, id: &RolloutId, end_unix_ns: u64) -> Result<RolloutRecord>;

    /// All attempts of a rollout, oldest first.
    ///
    /// # Errors
    /// [`StoreError::UnknownRollout`]; errors of reading.
    fn attempts(&self, id: &RolloutId) -> Result<Vec<AttemptRecord>>;

    /// All spans that an attempt has recorded itself, by sequence. Those of a fork begin with the event at which it left
    /// its ancestor.
    ///
    /// # Errors
    /// [`StoreError::UnknownRollout`], [`StoreError::UnknownAttempt`]; errors of reading.
    fn spans(&self, key: &AttemptKey) -> Result<Vec<Span>>;

    /// Everything recorded of an attempt, in one look: its rollout, itself, and the spans that it has recorded itself.
    ///
    /// # Errors
    /// As [`spans`](Self::spans).
    fn recording(&self, key: &AttemptKey) -> Result<RecordedAttempt>;

    /// The whole history of an attempt, by sequence from 0: of a fork, first what it took over from its ancestors, under
    /// their keys, and then its own spans.
    ///
    /// # Errors
    /// As [`spans`](Self::spans).
    fn trajectory(&self, key: &AttemptKey) -> Result<Vec<Span>>;

    /// One page of rollouts with their newest attempts.
    ///
    /// # Errors
    /// Errors of reading.
    fn rollout_page(&self, query: &RolloutQuery) -> Result<Page<RolloutRow>>;

    /// One page of attempts.
    ///
    /// # Errors
    /// [`StoreError::UnknownRollout`] when the query names one; errors of reading.
    fn attempt_page(&self, query: &AttemptQuery) -> Result<Page<AttemptRecord>>;

    /// One page of the spans that an attempt has recorded itself.
    ///
    /// # Errors
    /// [`StoreError::UnknownRollout`], [`StoreError::UnknownAttempt`]; errors of reading.
    fn span_page(&self, query: &SpanQuery) -> Result<Page<Span>>;

    /// One page of published prompt templates.
    ///
    /// # Errors
    /// Errors of reading.
    fn resource_page(&self, query: &ResourceQuery) -> Result<Page<Template>>;

    /// One page of workers.
    ///
    /// # Errors
    /// Errors of reading.
    fn worker_page(&self, query: &WorkerQuery) -> Result<Page<WorkerRecord>>;

    /// Keeps values under their content hashes, which are returned in order. What is there already is not written again.
    /// Visible on return; durable with the next durable commit, so that an [`enqueue`](Self::enqueue) after it covers
    /// what its specs refer to.
    ///
    /// # Errors
    /// Errors of writing.
    fn put_blobs(&self, blobs: Vec<Vec<u8>>) -> Result<Vec<ContentHash>>;

    /// A value by its content hash.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when what is there has another hash; errors of reading.
    fn blob(&self, hash: &ContentHash) -> Result<Option<Vec<u8>>>;

    /// Keeps what is known of a worker, in place of what was known before. Visible on return; durable with the next
    /// durable commit.
    ///
    /// # Errors
    /// [`StoreError::InvalidWorkerId`]; errors of writing.
    fn put_worker(&self, worker: WorkerRecord) -> Result<()>;

    /// All workers, by id.
    ///
    /// # Errors
    /// Errors of reading.
    fn workers(&self) -> Result<Vec<WorkerRecord>>;

    /// Publishes a prompt template on top of version `after` of the resources (0: nothing published yet) and returns
    /// the new version, in which all other templates are those of `after`. Versions are immutable. A repeated call
    /// with equal arguments returns the version that the first one made, so that a step can be repeated after a crash.
    /// Durable on return.
    ///
    /// # Errors
    /// [`StoreError::UnknownResources`] when there is no version `after`; errors of writing.
    fn publish_template(&self, after: u64, name: &str, text: &str) -> Result<u64>;

    /// A prompt template as it stands in a version of the resources, `None` being the newest. Returns `None` when that
    /// version has no template of this name.
    ///
    /// # Errors
    /// [`StoreError::UnknownResources`] when there is no such version; errors of reading.
    fn template(&self, name: &str, version: Option<u64>) -> Result<Option<Template>>;

    /// All prompt templates of a version of the resources, by name.
    ///
    /// # Errors
    /// [`StoreError::UnknownResources`] when there is no such version; errors of reading.
    fn templates(&self, version: u64) -> Result<Vec<Template>>;

    /// The newest version of the resources; 0 when nothing was published.
    ///
    /// # Errors
    /// Errors of reading.
    fn resources_version(&self) -> Result<u64>;

    /// Drops rollouts that have ended, with their attempts and spans. One that a fork which stays refers to stays too.
    /// Durable on return; a crash meanwhile leaves some dropped and the others whole. Space on disk is given back by
    /// [`SledStore::compact`].
    ///
    /// # Errors
    /// Errors of reading and writing.
    fn prune(&self, rule: &PruneRule) -> Result<PruneReport>;

    /// Reads everything that is on disk and says what is wrong. Nobody writes meanwhile. `progress` hears how many keys
    /// are done.
    ///
    /// # Errors
    /// Errors of reading the database itself; a record that is damaged is a finding.
    fn check(&self, progress: Progress<'_>) -> Result<CheckReport>;

    /// Writes everything that is on disk as lines of JSON, from which [`SledStore::import`] makes an equal store. Rollouts
    /// are exported as they are when their turn comes. `progress` hears how many lines are done.
    ///
    /// # Errors
    /// [`StoreError::Export`] when `to` fails; errors of reading.
    fn export(&self, to: &mut dyn std::io::Write, progress: Progress<'_>) -> Result<TransferReport>;

    /// Counts.
    ///
    /// # Errors
    /// Errors of reading.
    fn statistics(&self) -> Result<StoreStatistics>;
}
