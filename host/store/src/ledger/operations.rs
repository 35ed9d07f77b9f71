//! The operations of the ledger, as [`RolloutStore`](crate::RolloutStore) documents them.

use std::ops::ControlFlow;
use std::sync::Arc;

use fulgurite_core::id::{AttemptKey, RolloutId};
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::record::{AttemptRecord, RolloutRecord, RolloutSpec};
use fulgurite_core::reward::Reward;
use fulgurite_core::span::Span;
use fulgurite_core::state::{AttemptState, IllegalTransition, RolloutState};

use super::{Entry, Ledger, Stage, blobs, first_own_sequence};
use crate::codec::{self, SpanBlock};
use crate::error::{Result, StoreError};
use crate::key_value::{KeyRange, KeyValue};
use crate::keys;
use crate::records::{AttemptFinish, Enqueued, RecordedAttempt, StoreStatistics};

/// Items of a group commit that are applied before the lock is let go for a moment, so that those who only begin an
/// attempt wait a millisecond and not for the whole group.
const ITEMS_PER_LOCK: usize = 64;

/// The spans of one item of a group commit, checked and encoded before the lock is taken.
struct Prepared {
    key: AttemptKey,
    first_sequence: Option<u64>,
    spans: usize,
    blocks: Vec<SpanBlock>,
}

impl Prepared {
    /// Checks that spans are the attempt's own and consecutive among themselves, and encodes them.
    fn new(key: &AttemptKey, spans: &[Span]) -> Result<Self> {
        if let Some(foreign) = spans.iter().find(|span| span.attempt != *key) {
            return Err(StoreError::ForeignSpan { key: key.clone(), found: foreign.attempt.clone() });
        }
        let first_sequence = spans.first().map(|span| span.sequence);
        for (expected, span) in (first_sequence.unwrap_or(0)..).zip(spans) {
            if span.sequence != expected {
                return Err(StoreError::SpanOrder { key: key.clone(), expected, found: span.sequence });
            }
        }
        Ok(Self { key: key.clone(), first_sequence, spans: spans.len(), blocks: codec::encode_blocks(spans)? })
    }

    /// The rollout, when the attempt is live and the spans follow those it has.
    fn entry<D: KeyValue>(&self, stage: &mut Stage<'_, D>) -> Result<Entry> {
        let mut entry = stage.known(&self.key.rollout)?;
        entry.check_live(&self.key)?;
        let expected = first_own_sequence(&entry.rollout) + entry.newest()?.spans;
        match self.first_sequence {
            Some(found) if found != expected => Err(StoreError::SpanOrder { key: self.key.clone(), expected, found }),
            _ => Ok(entry),
        }
    }
}

fn check_rewards(key: &AttemptKey, rewards: &[Reward]) -> Result<()> {
    let invalid = rewards.iter().find_map(|reward| reward.check().err());
    invalid.map_or(Ok(()), |source| Err(StoreError::InvalidReward { key: key.clone(), source }))
}

/// The transition tables also have the steps of beginning an attempt; a finish may only take those that end one. A rollout
/// has succeeded if and only if its last attempt has: what was graded is never run again, and what was not is no result.
fn check_end(finish: &AttemptFinish) -> Result<()> {
    let succeeded = |yes: bool| if yes { "a success" } else { "a failure" };
    let graded = finish.state == AttemptState::Succeeded;
    let (what, from, to) = if !finish.state.is_terminal() {
        ("attempt", "finishing", finish.state.as_str())
    } else if !finish.rollout_state.is_terminal() && finish.rollout_state != RolloutState::Requeuing {
        ("rollout", "finishing", finish.rollout_state.as_str())
    } else if graded != (finish.rollout_state == RolloutState::Succeeded) {
        ("rollout", succeeded(graded), finish.rollout_state.as_str())
    } else {
        return Ok(());
    };
    let transition = IllegalTransition { what, from, to };
    Err(StoreError::IllegalTransition { id: finish.key.rollout.clone(), transition })
}

impl<D: KeyValue> Ledger<D> {
    pub(crate) fn enqueue(&self, specs: Vec<Arc<RolloutSpec>>) -> Result<Vec<Enqueued>> {
        let mut stage = Stage::new(self)?;
        let mut results: Vec<Enqueued> = Vec::with_capacity(specs.len());
        for spec in specs {
            if let Some(known) = stage.find(&spec.id)? {
                // Bytes are compared, so that a NaN equals itself.
                if codec::encode(&known.rollout.spec)? != codec::encode(&spec)? {
                    return Err(StoreError::Conflict(spec.id.clone()));
                }
                results.push(Enqueued::Existing(known.rollout));
                continue;
            }
            check_fork(&mut stage, &spec)?;
            let ordinal = stage.counters.next_ordinal;
            stage.counters.next_ordinal += 1;
            let rollout = RolloutRecord { spec, state: RolloutState::Queuing, attempt: None, ordinal };
            results.push(Enqueued::New(rollout.clone()));
            stage.write(Entry::new(rollout), 0, &[])?;
        }
        // Also when nothing is new: another thread may have enqueued it a moment ago without having synced yet.
        self.sync(stage.commit()?)?;
        Ok(results)
    }

    pub(crate) fn rollout(&self, id: &RolloutId) -> Result<Option<RolloutRecord>> {
        Ok(self.find(id)?.map(|entry| entry.rollout))
    }

    pub(crate) fn begin_attempt(&self, id: &RolloutId, start_unix_ns: u64, worker: &str) -> Result<AttemptRecord> {
        if !worker.is_empty() {
            blobs::check_worker_id(worker)?;
        }
        let waiting = |entry: &&mut Entry| !entry.is_live() && !entry.rollout.state.is_terminal();
        if let Some(entry) = self.lock().changeable(id).filter(waiting) {
            return entry.begin(start_unix_ns, worker);
        }
        let mut stage = Stage::new(self)?;
        let mut entry = stage.known(id)?;
        if entry.rollout.state.is_terminal() {
            return Err(StoreError::RolloutEnded { id: id.clone(), state: entry.rollout.state });
        }
        if entry.is_live() {
            entry.step(AttemptState::Unresponsive, RolloutState::Requeuing)?;
            let left = entry.newest()?;
            left.outcome = Some(AttemptOutcome::failed(OutcomeKind::Unresponsive, "its worker stopped answering"));
            left.end_unix_ns = start_unix_ns;
            stage.write(entry, 0, &[])?;
            stage.commit()?;
            // Now it waits like any other, whatever another thread has done with it in between.
            return self.begin_attempt(id, start_unix_ns, worker);
        }
        let attempt = entry.begin(start_unix_ns, worker)?;
        stage.hold(entry);
        Ok(attempt)
    }

    pub(crate) fn mark_running(&self, key: &AttemptKey) -> Result<()> {
        if let Some(entry) = self.lock().changeable(&key.rollout) {
            entry.check_live(key)?;
            return entry.step(AttemptState::Running, RolloutState::Running);
        }
        let mut stage = Stage::new(self)?;
        let mut entry = stage.known(&key.rollout)?;
        entry.check_live(key)?;
        entry.step(AttemptState::Running, RolloutState::Running)?;
        stage.hold(entry);
        Ok(())
    }

    pub(crate) fn append_spans(&self, key: &AttemptKey, spans: &[Span]) -> Result<()> {
        self.append(std::iter::once((key, spans))).pop().unwrap_or(Ok(()))
    }

    pub(crate) fn append_many(&self, appends: &[(AttemptKey, Vec<Span>)]) -> Vec<Result<()>> {
        self.append(appends.iter().map(|(key, spans)| (key, spans.as_slice())))
    }

    fn append<'a>(&self, appends: impl Iterator<Item = (&'a AttemptKey, &'a [Span])>) -> Vec<Result<()>> {
        self.group(appends.map(|(key, spans)| Prepared::new(key, spans)), |stage, prepared| {
            let entry = prepared.entry(stage)?;
            if prepared.spans > 0 { stage.write(entry, prepared.spans, &prepared.blocks) } else { Ok(()) }
        })
    }

    pub(crate) fn finish_attempts(&self, finishes: Vec<AttemptFinish>) -> Vec<Result<()>> {
        let prepared = finishes.into_iter().map(|finish| {
            check_rewards(&finish.key, &finish.rewards)?;
            check_end(&finish)?;
            Ok((Prepared::new(&finish.key, &finish.spans)?, finish))
        });
        self.group(prepared, |stage, (prepared, finish)| {
            let mut entry = prepared.entry(stage)?;
            entry.step(finish.state, finish.rollout_state)?;
            let attempt = entry.newest()?;
            attempt.outcome = Some(finish.outcome);
            attempt.rewards = finish.rewards;
            attempt.end_unix_ns = finish.end_unix_ns;
            attempt.guest_cpu_us = finish.guest_cpu_us;
            attempt.not_forkable = finish.not_forkable;
            stage.write(entry, prepared.spans, &prepared.blocks)
        })
    }

    /// Stages items in order, each with its own result, and makes all of them durable with one sync. An item that is
    /// refused leaves nothing behind.
    fn group<T>(
        &self,
        items: impl Iterator<Item = Result<T>>,
        mut put: impl FnMut(&mut Stage<'_, D>, T) -> Result<()>,
    ) -> Vec<Result<()>> {
        let items: Vec<Result<T>> = items.collect();
        let mut results: Vec<Result<()>> = Vec::with_capacity(items.len());
        let mut items = items.into_iter().peekable();
        let mut commits = Ok(0);
        while items.peek().is_some() && commits.is_ok() {
            let from = results.len();
            let committed = Stage::new(self).and_then(|mut stage| {
                for item in items.by_ref().take(ITEMS_PER_LOCK) {
                    results.push(item.and_then(|item| put(&mut stage, item)));
                }
                stage.commit()
            });
            if let Err(error) = &committed {
                fail(results.iter_mut().skip(from), error);
            }
            commits = committed;
        }
        // Nothing is written any more: what is left fails with the same error.
        if let Err(error) = &commits {
            results.extend(items.map(|item| item.and(Err(error.clone()))));
        }
        if let Err(error) = commits.and_then(|commits| self.sync(commits)) {
            fail(results.iter_mut(), &error);
        }
        results
    }

    pub(crate) fn cancel(&self, id: &RolloutId, end_unix_ns: u64) -> Result<RolloutRecord> {
        let mut stage = Stage::new(self)?;
        let mut entry = stage.known(id)?;
        if entry.rollout.state.is_terminal() {
            return Err(StoreError::RolloutEnded { id: id.clone(), state: entry.rollout.state });
        }
        if entry.is_live() {
            entry.step(AttemptState::Failed, RolloutState::Cancelled)?;
            let attempt = entry.newest()?;
            attempt.outcome = Some(AttemptOutcome::failed(OutcomeKind::Cancelled, "the rollout was cancelled"));
            attempt.end_unix_ns = end_unix_ns;
        } else {
            entry.step_rollout(RolloutState::Cancelled)?;
        }
        let rollout = entry.rollout.clone();
        stage.write(entry, 0, &[])?;
        self.sync(stage.commit()?)?;
        Ok(rollout)
    }

    pub(crate) fn attempts(&self, id: &RolloutId) -> Result<Vec<AttemptRecord>> {
        let found = self.find(id)?;
        Ok(found.ok_or_else(|| StoreError::UnknownRollout(id.clone()))?.attempts)
    }

    pub(crate) fn spans(&self, key: &AttemptKey) -> Result<Vec<Span>> {
        Ok(self.recording(key)?.spans)
    }

    pub(crate) fn recording(&self, key: &AttemptKey) -> Result<RecordedAttempt> {
        let found = self.find(&key.rollout)?;
        let Entry { rollout, attempts, .. } = found.ok_or_else(|| StoreError::UnknownRollout(key.rollout.clone()))?;
        let attempt = attempts.into_iter().find(|attempt| attempt.key == *key);
        let attempt = attempt.ok_or_else(|| StoreError::UnknownAttempt(key.clone()))?;
        match read_spans(&self.database, &rollout, key, attempt.spans) {
            // Nothing recorded ever changes, but it may have been dropped a moment ago.
            Err(_) if self.ordinal(&key.rollout)?.is_none() => Err(StoreError::UnknownRollout(key.rollout.clone())),
            Err(error) => Err(error),
            Ok(spans) => Ok(RecordedAttempt { rollout, attempt, spans }),
        }
    }

    /// The spans of an attempt as it stands on disk.
    pub(crate) fn stored_spans(&self, rollout: &RolloutRecord, attempt: &AttemptRecord) -> Result<Vec<Span>> {
        read_spans(&self.database, rollout, &attempt.key, attempt.spans)
    }

    pub(crate) fn trajectory(&self, key: &AttemptKey) -> Result<Vec<Span>> {
        let mut parts = vec![];
        // Sequence before which the spans of the next older ancestor count.
        let (mut next, mut until) = (key.clone(), u64::MAX);
        loop {
            let mut own = self.spans(&next)?;
            own.retain(|span| span.sequence < until);
            parts.push(own);
            let found = self.rollout(&next.rollout)?.ok_or_else(|| StoreError::UnknownRollout(next.rollout.clone()))?;
            match &found.spec.fork_of {
                // An ancestor was there before its fork, so this ends.
                Some(fork) => {
                    until = until.min(fork.event);
                    next = AttemptKey { rollout: fork.rollout.clone(), attempt: fork.attempt };
                }
                None => return Ok(parts.into_iter().rev().flatten().collect()),
            }
        }
    }

    pub(crate) fn statistics(&self) -> Result<StoreStatistics> {
        let state = self.lock();
        let mut counters = state.counters.clone();
        #[expect(clippy::iter_over_hash_type, reason = "only sums are taken")]
        for held in state.live.values() {
            counters.count(&held.entry);
        }
        drop(state);
        Ok(StoreStatistics {
            rollouts: counters.by_state().collect(),
            outcomes: counters.by_outcome().collect(),
            attempts: counters.attempts,
            spans: counters.spans,
            span_bytes: counters.span_bytes,
            blobs: counters.blobs,
            blob_bytes: counters.blob_bytes,
            workers: counters.workers,
            resources_version: counters.resources_version,
            disk_bytes: self.database.disk_bytes()?,
            syncs: self.syncs.statistics(),
        })
    }
}

/// Reads the spans that an attempt has recorded itself. What is recorded never changes, so it can be read while others
/// write.
fn read_spans(database: &impl KeyValue, rollout: &RolloutRecord, key: &AttemptKey, recorded: u64) -> Result<Vec<Span>> {
    let mut spans: Vec<Span> = Vec::new();
    let first = first_own_sequence(rollout);
    let range = KeyRange::prefix(&keys::spans_prefix(rollout.ordinal, key.attempt));
    codec::scan(database, &range, |block_key, mut block: Vec<Span>| {
        if spans.len() as u64 >= recorded {
            return Ok(ControlFlow::Break(()));
        }
        let mut sequences = (first + spans.len() as u64..).zip(&block);
        if !sequences.all(|(sequence, span)| span.sequence == sequence && span.attempt == *key) {
            return Err(codec::corrupt(block_key, "its spans do not follow those before it"));
        }
        spans.append(&mut block);
        Ok(ControlFlow::Continue(()))
    })?;
    if spans.len() as u64 == recorded {
        Ok(spans)
    } else {
        let found = format!("{} of {recorded} spans of attempt {} are there", spans.len(), key.attempt);
        Err(codec::corrupt(&keys::rollout_key(rollout.ordinal), found))
    }
}

/// A fork refers to a prefix that is there and never changes: that of an attempt that has ended.
fn check_fork<D: KeyValue>(stage: &mut Stage<'_, D>, spec: &RolloutSpec) -> Result<()> {
    let Some(fork) = &spec.fork_of else { return Ok(()) };
    let invalid = |detail: String| StoreError::InvalidFork {
        id: spec.id.clone(),
        ancestor: AttemptKey { rollout: fork.rollout.clone(), attempt: fork.attempt },
        event: fork.event,
        detail,
    };
    let Some(ancestor) = stage.find(&fork.rollout)? else {
        return Err(invalid("there is no such rollout".to_owned()));
    };
    let attempt = ancestor.attempts.iter().find(|attempt| attempt.key.attempt == fork.attempt);
    let attempt = attempt.ok_or_else(|| invalid("the rollout has no such attempt".to_owned()))?;
    if !attempt.state.is_terminal() {
        return Err(invalid("the attempt has not ended".to_owned()));
    }
    let events = first_own_sequence(&ancestor.rollout) + attempt.spans;
    if fork.event > events {
        return Err(invalid(format!("it has {events} events")));
    }
    Ok(())
}

/// What was not committed has failed, unless it had been refused for its own reason.
fn fail<'a>(results: impl Iterator<Item = &'a mut Result<()>>, error: &StoreError) {
    for result in results.filter(|result| result.is_ok()) {
        *result = Err(error.clone());
    }
}
