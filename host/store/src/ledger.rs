//! The rules of the store, over any [`KeyValue`].
//!
//! Live attempts are kept in memory and written with their first spans or their end. A begun attempt that a crash
//! forgets had recorded nothing, so running it again under the same number is indistinguishable from the first time, and
//! a rollout costs half as many writes. The rejected alternative, writing each step, would have to be flushed to mean
//! more than this.
//!
//! One mutex orders all writes to the database. Waiting for the disk comes after it is released; threads that wait at the
//! same time share one sync. A second mutex guards what is in memory and is only ever held for a moment, so that beginning
//! an attempt, which writes nothing, never waits for a group of ended ones. A rollout that is being changed by a write is
//! marked as staged: what would change it in memory then waits for that write.

#[cfg(test)]
mod acknowledgements;
mod blobs;
mod counters;
mod operations;
mod prune;
mod queries;
mod resources;
mod syncs;

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
use fulgurite_core::record::{AttemptRecord, RolloutRecord};
use fulgurite_core::state::{AttemptState, IllegalTransition, RolloutState};

pub(crate) use self::blobs::check_worker_id;
pub(crate) use self::counters::Counters;
pub(crate) use self::resources::ResourcesRecord;
use self::syncs::Syncs;
use crate::check;
use crate::codec::{self, SpanBlock};
use crate::error::{Result, StoreError};
use crate::key_value::{Batch, KeyValue};
use crate::keys;
use crate::records::CheckReport;
use crate::sled_store::{Progress, SCHEMA_VERSION};

/// Rollouts held in memory beyond which waiting ones are read from the disk again. 65,536: about 50 MB.
const WAITING_MAX: usize = 65_536;

/// What a new database begins with.
pub(crate) fn first_records(counters: &Counters) -> Result<Batch> {
    let mut batch = vec![(keys::schema_key(), Some(SCHEMA_VERSION.to_be_bytes().to_vec()))];
    codec::put(&mut batch, keys::counters_key(), &codec::encode(counters)?)?;
    Ok(batch)
}

/// What is stored of a rollout under its ordinal.
pub(crate) type StoredRollout = (RolloutRecord, Vec<AttemptRecord>);

/// Sequence of the first span that a rollout's attempts record themselves: a fork goes on where it left its ancestor, whose
/// spans are referred to and not copied.
pub(crate) fn first_own_sequence(rollout: &RolloutRecord) -> u64 {
    rollout.spec.fork_of.as_ref().map_or(0, |fork| fork.event)
}

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
    /// How many of the attempts are on disk with their outcome.
    stored_outcomes: usize,
}

impl Entry {
    /// A rollout that is not on disk yet.
    const fn new(rollout: RolloutRecord) -> Self {
        Self { rollout, attempts: vec![], stored_state: None, stored_attempts: 0, stored_outcomes: 0 }
    }

    /// Everything is on disk as it is now.
    fn mark_stored(&mut self) {
        self.stored_state = Some(self.rollout.state);
        self.stored_attempts = self.attempts.len();
        self.stored_outcomes = self.attempts.iter().filter(|attempt| attempt.outcome.is_some()).count();
    }

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

    /// Begins the next attempt of a rollout that waits for one.
    fn begin(&mut self, start_unix_ns: u64, worker: &str) -> Result<AttemptRecord> {
        self.step_rollout(RolloutState::Preparing)?;
        let number = self.rollout.attempt.map_or(AttemptNumber::FIRST, AttemptNumber::next);
        self.rollout.attempt = Some(number);
        let attempt = AttemptRecord {
            key: AttemptKey { rollout: self.rollout.spec.id.clone(), attempt: number },
            state: AttemptState::Preparing,
            start_unix_ns,
            end_unix_ns: 0,
            outcome: None,
            rewards: vec![],
            spans: 0,
            guest_cpu_us: 0,
            worker: worker.to_owned(),
            not_forkable: None,
        };
        self.attempts.push(attempt.clone());
        Ok(attempt)
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

/// A rollout in memory.
#[derive(Debug)]
struct Held {
    entry: Entry,
    /// A write that has not been committed yet may change it.
    is_staged: bool,
}

impl From<Entry> for Held {
    fn from(entry: Entry) -> Self {
        Self { entry, is_staged: false }
    }
}

#[derive(Debug, Default)]
pub(crate) struct State {
    /// Rollouts with a live attempt, as far as this process has seen them, and some that wait for one: what is begun next
    /// need not be read back from the disk.
    live: HashMap<RolloutId, Held>,
    counters: Counters,
}

impl State {
    /// A rollout that may be changed in memory.
    fn changeable(&mut self, id: &RolloutId) -> Option<&mut Entry> {
        self.live.get_mut(id).filter(|held| !held.is_staged).map(|held| &mut held.entry)
    }
}

/// The rules over a database.
pub(crate) struct Ledger<D> {
    database: D,
    /// Held by whoever writes. Taken before `state`.
    writing: Mutex<()>,
    state: Mutex<State>,
    /// How many of the commits are safe.
    synced: Mutex<u64>,
    syncs: Syncs,
    /// Why nothing is written any more.
    broken: OnceLock<String>,
}

impl<D: KeyValue> Ledger<D> {
    /// A ledger over a database that is empty, and that cannot fail.
    pub(crate) fn empty(database: D) -> Self {
        let counters = Counters::first();
        if let Ok(batch) = first_records(&counters) {
            let _cannot_fail = database.apply(batch);
        }
        let synced = Mutex::new(counters.commits);
        let state = Mutex::new(State { live: HashMap::new(), counters });
        let writing = Mutex::default();
        Self { database, writing, state, synced, syncs: Syncs::default(), broken: OnceLock::new() }
    }

    /// A ledger over a database that may hold records.
    pub(crate) fn open(database: D) -> Result<Self> {
        let counters: Counters = codec::get(&database, &keys::counters_key())?.unwrap_or_default();
        database.check_complete(counters.commits)?;
        let syncs = Syncs::default();
        let synced = Mutex::new(counters.commits);
        let state = Mutex::new(State { live: HashMap::new(), counters });
        Ok(Self { database, writing: Mutex::default(), state, synced, syncs, broken: OnceLock::new() })
    }

    pub(crate) const fn database(&self) -> &D {
        &self.database
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads everything that is on disk, while nobody writes.
    pub(crate) fn check(&self, progress: Progress<'_>) -> Result<CheckReport> {
        let _nobody_writes = self.writing();
        check::run(&self.database, progress)
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
        let start = Instant::now();
        if let Err(error) = self.database.sync(covered) {
            return self.break_down(error);
        }
        self.syncs.add(start.elapsed(), covered - *synced);
        *synced = covered;
        Ok(())
    }

    /// Ordinal of a rollout.
    fn ordinal(&self, id: &RolloutId) -> Result<Option<u64>> {
        codec::get(&self.database, &keys::index_key(id))
    }

    /// A rollout as it stands on disk.
    fn stored(&self, id: &RolloutId) -> Result<Option<Entry>> {
        let Some(ordinal) = self.ordinal(id)? else { return Ok(None) };
        let key = keys::rollout_key(ordinal);
        let Some((rollout, attempts)) = codec::get::<StoredRollout>(&self.database, &key)? else {
            return Err(codec::corrupt(&keys::index_key(id), format!("there is no rollout #{ordinal}")));
        };
        check_stored(&key, &rollout, &attempts)?;
        if rollout.spec.id != *id {
            return Err(codec::corrupt(&keys::index_key(id), format!("it leads to rollout `{}`", rollout.spec.id)));
        }
        let mut entry = Entry { rollout, attempts, stored_state: None, stored_attempts: 0, stored_outcomes: 0 };
        entry.mark_stored();
        Ok(Some(entry))
    }

    /// A rollout as it is now.
    fn find(&self, id: &RolloutId) -> Result<Option<Entry>> {
        let held = self.lock().live.get(id).map(|held| held.entry.clone());
        held.map_or_else(|| self.stored(id), |entry| Ok(Some(entry)))
    }
}

/// Checks what follows from how records are written, so that damage that decodes is found too.
pub(crate) fn check_stored(key: &[u8], rollout: &RolloutRecord, attempts: &[AttemptRecord]) -> Result<()> {
    if keys::rollout_key(rollout.ordinal) != key {
        return Err(codec::corrupt(key, format!("it is that of rollout #{}", rollout.ordinal)));
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
    _writing: MutexGuard<'a, ()>,
    batch: Batch,
    counters: Counters,
    changed: HashMap<RolloutId, Entry>,
    /// Rollouts in memory that were marked as staged.
    marked: Vec<RolloutId>,
}

impl<'a, D: KeyValue> Stage<'a, D> {
    /// Takes the right to write; it is held until the stage is committed or dropped.
    fn new(ledger: &'a Ledger<D>) -> Result<Self> {
        ledger.check_writable()?;
        let writing = ledger.writing();
        let counters = ledger.lock().counters.clone();
        let (batch, changed, marked) = (Batch::new(), HashMap::new(), vec![]);
        Ok(Self { ledger, _writing: writing, batch, counters, changed, marked })
    }

    /// A rollout as it will be when what is staged has been committed. Nobody else changes it before that.
    fn find(&mut self, id: &RolloutId) -> Result<Option<Entry>> {
        if let Some(entry) = self.changed.get(id) {
            return Ok(Some(entry.clone()));
        }
        let mut state = self.ledger.lock();
        let Some(held) = state.live.get_mut(id) else {
            drop(state);
            return self.ledger.stored(id);
        };
        if !held.is_staged {
            held.is_staged = true;
            self.marked.push(id.clone());
        }
        Ok(Some(held.entry.clone()))
    }

    fn known(&mut self, id: &RolloutId) -> Result<Entry> {
        self.find(id)?.ok_or_else(|| StoreError::UnknownRollout(id.clone()))
    }

    /// Keeps a rollout in memory as it is now.
    fn hold(&self, entry: Entry) {
        self.ledger.lock().live.insert(entry.rollout.spec.id.clone(), entry.into());
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
                let key = keys::spans_key(ordinal, newest.key.attempt, block.first_sequence);
                codec::put_packed(&mut batch, key, &block.packed)?;
                counters.span_bytes += block.span_bytes;
            }
        }
        let packed = codec::pack(codec::encode(&(&entry.rollout, &entry.attempts))?.into());
        codec::put_packed(&mut batch, keys::rollout_key(entry.rollout.ordinal), &packed)?;
        if entry.stored_state.is_none() {
            let key = keys::index_key(&entry.rollout.spec.id);
            codec::put(&mut batch, key, &codec::encode(&entry.rollout.ordinal)?)?;
        }
        counters.count(&entry);
        entry.mark_stored();
        self.batch.append(&mut batch);
        self.counters = counters;
        self.changed.insert(entry.rollout.spec.id.clone(), entry);
        Ok(())
    }

    /// Applies what is staged. Returns the number to wait for with [`Ledger::sync`].
    fn commit(mut self) -> Result<u64> {
        let mut batch = std::mem::take(&mut self.batch);
        if batch.is_empty() {
            return Ok(self.counters.commits);
        }
        self.counters.commits += 1;
        codec::put(&mut batch, keys::counters_key(), &codec::encode(&self.counters)?)?;
        if let Err(error) = self.ledger.database.apply(batch) {
            return self.ledger.break_down(error);
        }
        let commits = self.counters.commits;
        let mut state = self.ledger.lock();
        state.counters = self.counters.clone();
        #[expect(clippy::iter_over_hash_type, reason = "from one map into another")]
        for (id, entry) in self.changed.drain() {
            let waits = !entry.rollout.state.is_terminal() && state.live.len() < WAITING_MAX;
            if entry.is_live() || waits {
                state.live.insert(id, entry.into());
            } else {
                state.live.remove(&id);
            }
        }
        drop(state);
        Ok(commits)
    }
}

impl<D> Drop for Stage<'_, D> {
    fn drop(&mut self) {
        let mut state = self.ledger.state.lock().unwrap_or_else(PoisonError::into_inner);
        for id in &self.marked {
            if let Some(held) = state.live.get_mut(id) {
                held.is_staged = false;
            }
        }
    }
}
