//! Why the store refused or failed.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
use fulgurite_core::reward::InvalidReward;
use fulgurite_core::state::{AttemptState, IllegalTransition, RolloutState};

/// Why an operation of the store failed. Cloneable, because one failed group commit is the answer to many callers.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No rollout of that id was enqueued.
    #[error("there is no rollout `{0}`")]
    UnknownRollout(RolloutId),
    /// The rollout exists, the attempt does not.
    #[error("there is no attempt {0}")]
    UnknownAttempt(AttemptKey),
    /// The id is taken by a rollout with another spec.
    #[error("rollout `{0}` is already enqueued with a different spec")]
    Conflict(RolloutId),
    /// A newer attempt of the rollout exists; what the older one still sends is refused.
    #[error("attempt {key} is stale: attempt {newest} is the newest of its rollout")]
    StaleAttempt {
        /// Who wrote.
        key: AttemptKey,
        /// The newest attempt.
        newest: AttemptNumber,
    },
    /// The attempt has ended: it is frozen.
    #[error("attempt {key} has ended ({})", state.as_str())]
    AttemptEnded {
        /// Which attempt.
        key: AttemptKey,
        /// How it ended.
        state: AttemptState,
    },
    /// The rollout has ended: it is frozen.
    #[error("rollout `{id}` has ended ({})", state.as_str())]
    RolloutEnded {
        /// Which rollout.
        id: RolloutId,
        /// How it ended.
        state: RolloutState,
    },
    /// The state machine does not have this transition.
    #[error("rollout `{id}`: {transition}")]
    IllegalTransition {
        /// Which rollout.
        id: RolloutId,
        /// What was asked for.
        transition: IllegalTransition,
    },
    /// Spans of an attempt must be consecutive.
    #[error("the next span of attempt {key} is number {expected}, not {found}")]
    SpanOrder {
        /// Which attempt.
        key: AttemptKey,
        /// The sequence that must come next.
        expected: u64,
        /// The sequence that came.
        found: u64,
    },
    /// A span of one attempt was handed in for another.
    #[error("a span of attempt {found} was handed in for attempt {key}")]
    ForeignSpan {
        /// The attempt written to.
        key: AttemptKey,
        /// Whose span it is.
        found: AttemptKey,
    },
    /// A reward is not a finite number or has an impossible dimension.
    #[error("attempt {key} has a reward that cannot be kept")]
    InvalidReward {
        /// Which attempt.
        key: AttemptKey,
        /// What is wrong.
        #[source]
        source: InvalidReward,
    },
    /// A prompt template was published on top of a version that does not exist.
    #[error("there is no version {0} of the resources")]
    UnknownResources(u64),
    /// A fork refers to something that is not there, or that may still change.
    #[error("rollout `{id}` cannot fork {ancestor} at event {event}: {detail}")]
    InvalidFork {
        /// The fork.
        id: RolloutId,
        /// What it wants to fork.
        ancestor: AttemptKey,
        /// The first event that it would not take over.
        event: u64,
        /// Why not.
        detail: String,
    },
    /// A worker's id is empty, too long or has control characters.
    #[error(
        "`{id}` is not a valid id of a worker: use 1 to {} bytes without control characters",
        crate::WORKER_ID_BYTES_MAX
    )]
    InvalidWorkerId {
        /// The refused id, shortened to what can be printed.
        id: String,
    },
    /// A value could not be encoded.
    #[error("a record could not be encoded: {0}")]
    Encode(String),
    /// A stored value is damaged, or its format is not known to this version.
    #[error("the record `{key}` is damaged: {detail}")]
    Corrupt {
        /// Which record, for people.
        key: String,
        /// What is wrong.
        detail: String,
    },
    /// A line of a file cannot be imported.
    #[error("{file} line {line}: {detail}")]
    Import {
        /// The file, as the caller called it.
        file: String,
        /// The line, from 1.
        line: u64,
        /// What is wrong.
        detail: String,
    },
    /// Import needs a store without anything in it.
    #[error("the store in {} holds something already", dir.display())]
    NotEmpty {
        /// The store's directory.
        dir: PathBuf,
    },
    /// Whoever takes an export does not take it.
    #[error("the export cannot be written")]
    Export(#[source] Arc<io::Error>),
    /// Another process has the directory open.
    #[error("the store in {} is in use by another process", dir.display())]
    InUse {
        /// The store's directory.
        dir: PathBuf,
    },
    /// A newer Fulgurite wrote the directory.
    #[error("the store in {} has schema {found}, and this version reads schema {supported}", dir.display())]
    Schema {
        /// The store's directory.
        dir: PathBuf,
        /// Schema on disk.
        found: u32,
        /// Schema that this version writes and reads.
        supported: u32,
    },
    /// The directory holds a database that is not ours.
    #[error("{} holds a database that is not a Fulgurite store", dir.display())]
    NotAStore {
        /// The directory.
        dir: PathBuf,
    },
    /// The database cannot be opened because it is damaged.
    #[error("the store in {} is damaged: {detail}", dir.display())]
    Damaged {
        /// The store's directory.
        dir: PathBuf,
        /// What the database says.
        detail: String,
    },
    /// A file operation failed.
    #[error("cannot {action} the store in {}", dir.display())]
    Io {
        /// What was tried, a verb.
        action: &'static str,
        /// The store's directory.
        dir: PathBuf,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// Whoever wrote for this caller has ended.
    #[error("the store is closed")]
    Closed,
    /// An earlier write failed, so nobody knows what is on disk. Reading goes on, writing needs a new start.
    #[error("the store takes no more writes because an earlier one failed: {0}")]
    Broken(String),
}

impl StoreError {
    /// Whether the same call can succeed later without anything else being changed.
    ///
    /// A failed write is not retryable: after a failed fsync the kernel may have dropped the pages, and a second fsync
    /// would report success for data that is gone.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::InUse { .. })
    }
}

/// Result of an operation of the store.
pub type Result<T> = std::result::Result<T, StoreError>;
