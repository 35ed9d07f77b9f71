//! The rules of the store, over any [`KeyValue`].
//!
//! Live attempts are kept in memory and written with their first spans or their end. A begun attempt that a crash
//! forgets had recorded nothing, so running it again under the same number is indistinguishable from the first time, and
//! a rollout costs half as many writes. The rejected alternative, writing each step, would have to be flushed to mean
//! more than this.
//!
//! One mutex orders all writes. Encoding happens before it is taken and waiting for the disk after it is released;
//! threads that wait at the same time share one sync.

mod operations;
mod resources;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
use fulgurite_core::record::{AttemptRecord, RolloutRecord};
use fulgurite_core::state::{AttemptState, IllegalTransition, RolloutState};
use serde::{Deserialize, Serialize};

use crate::codec::{self, SpanBlock};
use crate::error::{Result, StoreError};
use crate::key_value::{Batch, KeyValue};

/// Counts of what is in the database, written with every batch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Counters {
    rollouts: BTreeMap<RolloutState, u64>,
    attempts: u64,
    spans: u64,
    span_bytes: u64,
    /// Also the next ordinal.
    rollouts_total: u64,
    resources_version: u64,
    /// Batches applied since the store was made.
    commits: u64,
}

impl Counters {
    /// A rollout changes from what is on disk to what it is now.
    fn count(&mut self, entry: &Entry) {
        if let Some(count) = entry.stored_state.and_then(|state| self.rollouts.get_mut(&state)) {
            *count = count.saturating_sub(1);
        }
        *self.rollouts.entry(entry.rollout.state).or_default() += 1;
        self.attempts += (entry.attempts.len() - entry.stored_attempts.min(entry.attempts.len())) as u64;
    }
}

/// What is stored of a rollout under its id.
type StoredRollout = (RolloutRecord, Vec<AttemptRecord>);

/// A rollout with its attempts as it is now, and what the disk knows of it.
#[derive(Debug, Clone)]
struct Entry {
    rollout: RolloutRecord,
    /// All attempts, oldest first.
    attempts: Vec<AttemptRecord>,
    /// State of the rollout on disk; `None` when it is not there yet.
    stored_state: Option<RolloutState>,
    /// How many of the attempts are on disk.
    stored_attempts: usize,
}

impl Entry {
    fn is_live(&self) -> bool {
        matches!(self.rollout.state, RolloutState::Preparing | RolloutState::Running)
    }

    /// Checks that `key` names the live attempt.
    fn check_live(&self, key: &AttemptKey) -> Result<()> {
        match self.attempts.last() {
            Some(newest) if key.attempt < newest.key.attempt => {
                Err(StoreError::StaleAttempt { key: key.clone(), newest: newest.key.attempt })
            }
            Some(newest) if key.attempt == newest.key.attempt => {
                if self.is_live() {
                    Ok(())
                } else {
                    Err(StoreError::AttemptEnded { key: key.clone(), state: newest.state })
                }
            }
            _ => Err(StoreError::UnknownAttempt(key.clone())),
        }
    }

    /// The newest attempt, which a caller of this knows to exist.
    fn newest(&mut self) -> Result<&mut AttemptRecord> {
        let id = &self.rollout.spec.id;
        let unknown = || StoreError::UnknownAttempt(AttemptKey { rollout: id.clone(), attempt: AttemptNumber::FIRST });
        self.attempts.last_mut().ok_or_else(unknown)
    }

    /// Moves attempt and rollout on by the transition tables.
    fn step(&mut self, attempt: AttemptState, rollout: RolloutState) -> Result<()> {
        let id = self.rollout.spec.id.clone();
        let illegal = |transition: IllegalTransition| StoreError::IllegalTransition { id: id.clone(), transition };
        let newest = self.newest()?;
        newest.state = newest.state.to(attempt).map_err(illegal)?;
        self.step_rollout(rollout)
    }

    fn step_rollout(&mut self, state: RolloutState) -> Result<()> {
        let illegal = |transition| StoreError::IllegalTransition { id: self.rollout.spec.id.clone(), transition };
        self.rollout.state = self.rollout.state.to(state).map_err(illegal)?;
        Ok(())
    }
}

#[derive(Debug, Default)]
struct State {
    /// Rollouts with a live attempt, as far as this process has seen them.
    live: HashMap<RolloutId, Entry>,
    counters: Counters,
}

/// The rules over a database.
pub(crate) struct Ledger<D> {
    database: D,
    state: Mutex<State>,
    /// How many of the commits are safe.
    synced: Mutex<u64>,
    /// Why nothing is written any more.
    broken: OnceLock<String>,
}

impl<D: KeyValue> Ledger<D> {
    /// A ledger over a database that is empty.
    pub(crate) fn empty(database: D) -> Self {
        Self { database, state: Mutex::default(), synced: Mutex::new(0), broken: OnceLock::new() }
    }

    /// A ledger over a database that may hold records.
    pub(crate) fn open(database: D) -> Result<Self> {
        let counters: Counters = codec::get(&database, &codec::counters_key())?.unwrap_or_default();
        database.check_complete(counters.commits)?;
        let synced = Mutex::new(counters.commits);
        let state = Mutex::new(State { live: HashMap::new(), counters });
        Ok(Self { database, state, synced, broken: OnceLock::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_writable(&self) -> Result<()> {
        self.broken.get().map_or(Ok(()), |why| Err(StoreError::Broken(why.clone())))
    }

    fn break_down<T>(&self, error: StoreError) -> Result<T> {
        let _first_cause_wins = self.broken.set(error.to_string());
        Err(error)
    }

    /// Waits until the first `commits` commits are safe. Whoever comes while another thread syncs waits for it and
    /// then finds its own batch covered, or syncs once for all that came meanwhile.
    fn sync(&self, commits: u64) -> Result<()> {
        let mut synced = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        if *synced >= commits {
            return Ok(());
        }
        self.check_writable()?;
        let covered = self.lock().counters.commits;
        if let Err(error) = self.database.sync(covered) {
            return self.break_down(error);
        }
        *synced = covered;
        Ok(())
    }

    /// A rollout as it stands on disk.
    fn stored(&self, id: &RolloutId) -> Result<Option<Entry>> {
        let key = codec::rollout_key(id);
        let Some((rollout, attempts)) = codec::get::<StoredRollout>(&self.database, &key)? else { return Ok(None) };
        check_stored(&key, &rollout, &attempts)?;
        let (stored_state, stored_attempts) = (Some(rollout.state), attempts.len());
        Ok(Some(Entry { rollout, attempts, stored_state, stored_attempts }))
    }

    /// A rollout as it is now.
    fn find(&self, state: &State, id: &RolloutId) -> Result<Option<Entry>> {
        match state.live.get(id) {
            Some(entry) => Ok(Some(entry.clone())),
            None => self.stored(id),
        }
    }
}

/// Checks what follows from how records are written, so that damage that decodes is found too.
fn check_stored(key: &[u8], rollout: &RolloutRecord, attempts: &[AttemptRecord]) -> Result<()> {
    if codec::rollout_key(&rollout.spec.id) != key {
        return Err(codec::corrupt(key, format!("it is that of rollout `{}`", rollout.spec.id)));
    }
    let numbered = (1..).zip(attempts).all(|(number, attempt)| {
        attempt.key.attempt == AttemptNumber(number) && attempt.key.rollout == rollout.spec.id
    });
    if !numbered || rollout.attempt != attempts.last().map(|newest| newest.key.attempt) {
        return Err(codec::corrupt(key, "its attempts are not numbered one after the other"));
    }
    Ok(())
}

/// Changes on their way into one batch. What is staged is seen by what is staged after it.
struct Stage<'a, D> {
    ledger: &'a Ledger<D>,
    state: MutexGuard<'a, State>,
    batch: Batch,
    counters: Counters,
    changed: HashMap<RolloutId, Entry>,
}

impl<'a, D: KeyValue> Stage<'a, D> {
    /// Takes the lock; it is held until the stage is committed or dropped.
    fn new(ledger: &'a Ledger<D>) -> Result<Self> {
        ledger.check_writable()?;
        let state = ledger.lock();
        let counters = state.counters.clone();
        Ok(Self { ledger, state, batch: Batch::new(), counters, changed: HashMap::new() })
    }

    /// A rollout as it will be when what is staged has been committed.
    fn find(&self, id: &RolloutId) -> Result<Option<Entry>> {
        match self.changed.get(id) {
            Some(entry) => Ok(Some(entry.clone())),
            None => self.ledger.find(&self.state, id),
        }
    }

    fn known(&self, id: &RolloutId) -> Result<Entry> {
        self.find(id)?.ok_or_else(|| StoreError::UnknownRollout(id.clone()))
    }

    /// Stages a rollout and, of its newest attempt, spans that were not recorded before.
    fn write(&mut self, mut entry: Entry, spans: usize, blocks: &[SpanBlock]) -> Result<()> {
        let mut batch = Batch::new();
        let mut counters = self.counters.clone();
        if spans > 0 {
            let ordinal = entry.rollout.ordinal;
            let newest = entry.newest()?;
            newest.spans += spans as u64;
            counters.spans += spans as u64;
            for block in blocks {
                let key = codec::spans_key(ordinal, newest.key.attempt, block.first_sequence);
                codec::put(&mut batch, key, &block.payload)?;
                counters.span_bytes += block.payload.len() as u64;
            }
        }
        let payload = codec::encode(&(&entry.rollout, &entry.attempts))?;
        codec::put(&mut batch, codec::rollout_key(&entry.rollout.spec.id), &payload)?;
        counters.count(&entry);
        entry.stored_state = Some(entry.rollout.state);
        entry.stored_attempts = entry.attempts.len();
        self.batch.append(&mut batch);
        self.counters = counters;
        self.changed.insert(entry.rollout.spec.id.clone(), entry);
        Ok(())
    }

    /// Applies what is staged. Returns the number to wait for with [`Ledger::sync`].
    fn commit(self) -> Result<u64> {
        let Self { ledger, mut state, mut batch, mut counters, changed } = self;
        if batch.is_empty() {
            return Ok(state.counters.commits);
        }
        counters.commits += 1;
        codec::put(&mut batch, codec::counters_key(), &codec::encode(&counters)?)?;
        if let Err(error) = ledger.database.apply(batch) {
            return ledger.break_down(error);
        }
        let commits = counters.commits;
        state.counters = counters;
        #[expect(clippy::iter_over_hash_type, reason = "from one map into another")]
        for (id, entry) in changed {
            if entry.is_live() {
                state.live.insert(id, entry);
            } else {
                state.live.remove(&id);
            }
        }
        Ok(commits)
    }
}
