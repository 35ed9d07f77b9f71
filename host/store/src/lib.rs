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
//! [`finish_attempts`](RolloutStore::finish_attempts), [`cancel`](RolloutStore::cancel) and
//! [`publish_template`](RolloutStore::publish_template) return after flush *and* fdatasync. The start of an attempt is
//! kept in memory until its first spans or its end are written: a crash before that leaves a rollout that was never
//! begun, which is what it is. Threads that commit at the same time share one fdatasync.
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

mod codec;
mod delegate;
mod error;
mod key_value;
mod ledger;
mod memory;
mod records;
mod sled_store;

use fulgurite_core::id::{AttemptKey, RolloutId};
use fulgurite_core::record::{AttemptRecord, RolloutRecord, RolloutSpec};
use fulgurite_core::span::Span;

pub use codec::VALUE_BYTES_MAX;
pub use error::{Result, StoreError};
pub use memory::MemoryStore;
pub use records::{AttemptFinish, Enqueued, RolloutQuery, StoreStatistics, Template};
pub use sled_store::{SCHEMA_VERSION, SledStore};

/// Keeps rollouts, attempts, spans and prompt templates of one run. See DESIGN.md 5.3 for states and order.
///
/// Every method is atomic, and safe to call from many threads.
pub trait RolloutStore: Send + Sync {
    /// Enqueues rollouts in order, in one durable commit: all of them or, on an error, none. A rollout that is there
    /// already with an equal spec is returned as it stands, which makes a repeated call safe.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when an id is taken by another spec; errors of writing.
    fn enqueue(&self, specs: Vec<RolloutSpec>) -> Result<Vec<Enqueued>>;

    /// One rollout.
    ///
    /// # Errors
    /// Errors of reading.
    fn rollout(&self, id: &RolloutId) -> Result<Option<RolloutRecord>>;

    /// Rollouts that fit a query, in the order in which they were enqueued.
    ///
    /// # Errors
    /// Errors of reading.
    fn rollouts(&self, query: &RolloutQuery) -> Result<Vec<RolloutRecord>>;

    /// Begins the next attempt of a rollout, in state `preparing`. A rollout that is still live (a crash left it) first
    /// has its attempt marked `unresponsive`. `start_unix_ns` is the real time of the start.
    ///
    /// # Errors
    /// [`StoreError::UnknownRollout`]; [`StoreError::RolloutEnded`] when the rollout is terminal; errors of writing.
    fn begin_attempt(&self, id: &RolloutId, start_unix_ns: u64) -> Result<AttemptRecord>;

    /// The attempt's agent starts to run.
    ///
    /// # Errors
    /// [`StoreError::StaleAttempt`], [`StoreError::AttemptEnded`], [`StoreError::UnknownAttempt`],
    /// [`StoreError::UnknownRollout`]; [`StoreError::IllegalTransition`] when it runs already.
    fn mark_running(&self, key: &AttemptKey) -> Result<()>;

    /// Appends spans of a live attempt. Durable on return. Their sequences go on where the last call ended, from 0.
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
    /// do not follow from those there are; [`StoreError::InvalidReward`].
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

    /// All recorded spans of an attempt, by sequence.
    ///
    /// # Errors
    /// [`StoreError::UnknownRollout`], [`StoreError::UnknownAttempt`]; errors of reading.
    fn spans(&self, key: &AttemptKey) -> Result<Vec<Span>>;

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

    /// Counts.
    ///
    /// # Errors
    /// Errors of reading.
    fn statistics(&self) -> Result<StoreStatistics>;
}
