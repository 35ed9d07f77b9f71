//! The operations of the ledger, as [`RolloutStore`](crate::RolloutStore) documents them.

use std::ops::ControlFlow;

use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::record::{AttemptRecord, RolloutRecord, RolloutSpec};
use fulgurite_core::reward::Reward;
use fulgurite_core::span::Span;
use fulgurite_core::state::{AttemptState, IllegalTransition, RolloutState};

use super::{Entry, Ledger, Stage, StoredRollout, check_stored};
use crate::codec::{self, Kind, SpanBlock};
use crate::error::{Result, StoreError};
use crate::key_value::KeyValue;
use crate::records::{AttemptFinish, Enqueued, RolloutQuery, StoreStatistics};

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
    fn entry<D: KeyValue>(&self, stage: &Stage<'_, D>) -> Result<Entry> {
        let mut entry = stage.known(&self.key.rollout)?;
        entry.check_live(&self.key)?;
        let expected = entry.newest()?.spans;
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

/// The transition tables also have the steps of beginning an attempt; a finish may only take those that end one.
fn check_end(finish: &AttemptFinish) -> Result<()> {
    let (what, to) = if !finish.state.is_terminal() {
        ("attempt", finish.state.as_str())
    } else if !finish.rollout_state.is_terminal() && finish.rollout_state != RolloutState::Requeuing {
        ("rollout", finish.rollout_state.as_str())
    } else {
        return Ok(());
    };
    let transition = IllegalTransition { what, from: "finishing", to };
    Err(StoreError::IllegalTransition { id: finish.key.rollout.clone(), transition })
}

impl<D: KeyValue> Ledger<D> {
    pub(crate) fn enqueue(&self, specs: Vec<RolloutSpec>) -> Result<Vec<Enqueued>> {
        let mut stage = Stage::new(self)?;
        let mut results: Vec<Enqueued> = Vec::with_capacity(specs.len());
        for spec in specs {
            if let Some(known) = stage.find(&spec.id)? {
                // Bytes are compared, so that a NaN equals itself.
                if codec::encode(&known.rollout.spec)? != codec::encode(&spec)? {
                    return Err(StoreError::Conflict(spec.id));
                }
                results.push(Enqueued::Existing(known.rollout));
                continue;
            }
            let ordinal = stage.counters.rollouts_total;
            stage.counters.rollouts_total += 1;
            let rollout = RolloutRecord { spec, state: RolloutState::Queuing, attempt: None, ordinal };
            results.push(Enqueued::New(rollout.clone()));
            stage.write(Entry { rollout, attempts: vec![], stored_state: None, stored_attempts: 0 }, 0, &[])?;
        }
        // Also when nothing is new: another thread may have enqueued it a moment ago without having synced yet.
        self.sync(stage.commit()?)?;
        Ok(results)
    }

    pub(crate) fn rollout(&self, id: &RolloutId) -> Result<Option<RolloutRecord>> {
        Ok(self.find(&self.lock(), id)?.map(|entry| entry.rollout))
    }

    pub(crate) fn rollouts(&self, query: &RolloutQuery) -> Result<Vec<RolloutRecord>> {
        let mut found = Vec::new();
        // Holding the lock makes the list a snapshot: no rollout is seen in a state between disk and memory.
        let state = self.lock();
        codec::scan(&self.database, &[Kind::Rollout as u8], |key, (stored, attempts): StoredRollout| {
            check_stored(key, &stored, &attempts)?;
            let record = state.live.get(&stored.spec.id).map_or(stored, |entry| entry.rollout.clone());
            if query.fits(&record) {
                found.push(record);
            }
            Ok(ControlFlow::Continue(()))
        })?;
        drop(state);
        found.sort_unstable_by_key(|record| record.ordinal);
        Ok(found.into_iter().skip(query.offset).take(query.limit.unwrap_or(usize::MAX)).collect())
    }

    pub(crate) fn begin_attempt(&self, id: &RolloutId, start_unix_ns: u64) -> Result<AttemptRecord> {
        let mut stage = Stage::new(self)?;
        let mut entry = stage.known(id)?;
        if entry.rollout.state.is_terminal() {
            return Err(StoreError::RolloutEnded { id: id.clone(), state: entry.rollout.state });
        }
        if entry.is_live() {
            entry.step(AttemptState::Unresponsive, RolloutState::Requeuing)?;
            let left = entry.newest()?;
            left.outcome = Some(AttemptOutcome::failed(OutcomeKind::HostFault, "its worker stopped answering"));
            left.end_unix_ns = start_unix_ns;
            stage.write(entry, 0, &[])?;
            stage.commit()?;
            // Now it waits like any other, whatever another thread has done with it in between.
            return self.begin_attempt(id, start_unix_ns);
        }
        entry.step_rollout(RolloutState::Preparing)?;
        let number = entry.rollout.attempt.map_or(AttemptNumber::FIRST, AttemptNumber::next);
        entry.rollout.attempt = Some(number);
        let attempt = AttemptRecord {
            key: AttemptKey { rollout: id.clone(), attempt: number },
            state: AttemptState::Preparing,
            start_unix_ns,
            end_unix_ns: 0,
            outcome: None,
            rewards: vec![],
            spans: 0,
            guest_cpu_us: 0,
        };
        entry.attempts.push(attempt.clone());
        stage.state.live.insert(id.clone(), entry);
        Ok(attempt)
    }

    pub(crate) fn mark_running(&self, key: &AttemptKey) -> Result<()> {
        let mut state = self.lock();
        let found = self.find(&state, &key.rollout)?;
        let mut entry = found.ok_or_else(|| StoreError::UnknownRollout(key.rollout.clone()))?;
        entry.check_live(key)?;
        entry.step(AttemptState::Running, RolloutState::Running)?;
        state.live.insert(key.rollout.clone(), entry);
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
        let found = self.find(&self.lock(), id)?;
        Ok(found.ok_or_else(|| StoreError::UnknownRollout(id.clone()))?.attempts)
    }

    pub(crate) fn spans(&self, key: &AttemptKey) -> Result<Vec<Span>> {
        let found = self.find(&self.lock(), &key.rollout)?;
        let entry = found.ok_or_else(|| StoreError::UnknownRollout(key.rollout.clone()))?;
        let attempt = entry.attempts.iter().find(|attempt| attempt.key == *key);
        let recorded = attempt.ok_or_else(|| StoreError::UnknownAttempt(key.clone()))?.spans;
        // What is recorded up to here never changes, so it can be read while others write.
        let mut spans: Vec<Span> = Vec::new();
        let prefix = codec::spans_prefix(entry.rollout.ordinal, key.attempt);
        codec::scan(&self.database, &prefix, |block_key, mut block: Vec<Span>| {
            if spans.len() as u64 >= recorded {
                return Ok(ControlFlow::Break(()));
            }
            let mut sequences = (spans.len() as u64..).zip(&block);
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
            Err(codec::corrupt(&codec::rollout_key(&key.rollout), found))
        }
    }

    pub(crate) fn statistics(&self) -> Result<StoreStatistics> {
        let state = self.lock();
        let mut counters = state.counters.clone();
        #[expect(clippy::iter_over_hash_type, reason = "only sums are taken")]
        for entry in state.live.values() {
            counters.count(entry);
        }
        drop(state);
        counters.rollouts.retain(|_, count| *count > 0);
        Ok(StoreStatistics {
            rollouts: counters.rollouts,
            attempts: counters.attempts,
            spans: counters.spans,
            span_bytes: counters.span_bytes,
            resources_version: counters.resources_version,
            disk_bytes: self.database.disk_bytes()?,
        })
    }
}

/// What was not committed has failed, unless it had been refused for its own reason.
fn fail<'a>(results: impl Iterator<Item = &'a mut Result<()>>, error: &StoreError) {
    for result in results.filter(|result| result.is_ok()) {
        *result = Err(error.clone());
    }
}
