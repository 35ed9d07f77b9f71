//! Reads a whole database and says what is wrong with it.
//!
//! One pass in the order of the keys, with look-ups by key where records refer to each other, so that memory holds the
//! hashes of the blobs and nothing else that grows. Whatever the bytes are, the pass goes on to its end: a record that
//! cannot be read is a finding and not an error.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::ControlFlow;

use fulgurite_core::id::{AttemptKey, AttemptNumber, ContentHash};
use fulgurite_core::record::{AttemptRecord, RolloutRecord, WorkerRecord};
use fulgurite_core::span::Span;
use fulgurite_core::state::{AttemptState, RolloutState};
use serde::de::DeserializeOwned;

use crate::codec::{self, Pending};
use crate::error::{Result, StoreError};
use crate::key_value::{KeyRange, KeyValue};
use crate::keys::{self, Kind};
use crate::ledger::{Counters, ResourcesRecord, StoredRollout, check_stored, first_own_sequence};
use crate::records::{CheckReport, Finding, unknown_content};
use crate::sled_store::{KEYS_PER_PROGRESS, Progress, SCHEMA_VERSION};

/// Findings that are named; the others are counted.
pub const FINDINGS_MAX: usize = 100;

/// Reads everything and says what is wrong.
pub(crate) fn run(database: &impl KeyValue, progress: Progress<'_>) -> Result<CheckReport> {
    let mut check = Check {
        database,
        report: CheckReport::default(),
        counted: Counters::default(),
        stored: None,
        schema: false,
        indexed: 0,
        blobs: BTreeSet::new(),
        referenced: BTreeSet::new(),
        spans: None,
    };
    let mut pending: Option<Pending> = None;
    let mut seen = 0_u64;
    database.scan(&KeyRange::all(), &mut |key, value| {
        seen += 1;
        if seen.is_multiple_of(KEYS_PER_PROGRESS) {
            progress(seen);
        }
        if keys::is_fragment(key) {
            match pending.take() {
                Some(mut record) if key == keys::fragment_key(&record.key, record.next) => {
                    record.stored.extend(value);
                    record.next += 1;
                    if record.next == record.fragments {
                        let first = record.key.clone();
                        check.record(&first, record.payload().map(Cow::Owned));
                    } else {
                        pending = Some(record);
                    }
                }
                Some(other) => {
                    check.missing_fragment(&other);
                    check.report.leftover_fragments += 1;
                }
                None => check.report.leftover_fragments += 1,
            }
            return Ok(ControlFlow::Continue(()));
        }
        if let Some(record) = pending.take() {
            check.missing_fragment(&record);
        }
        if key == keys::schema_key() {
            check.schema = true;
            if value != SCHEMA_VERSION.to_be_bytes() {
                check.find(key, "it is not the schema that this version writes");
            }
            return Ok(ControlFlow::Continue(()));
        }
        match codec::parse(key, value) {
            Ok(head) if head.fragments == 1 => {
                check.record(key, codec::unpack(key, Cow::Borrowed(head.bytes), head.raw_bytes));
            }
            Ok(head) => pending = Some(Pending::new(key, head)),
            Err(error) => check.find_error(key, &error),
        }
        Ok(ControlFlow::Continue(()))
    })?;
    if let Some(record) = pending.take() {
        check.missing_fragment(&record);
    }
    check.report.keys = seen;
    Ok(check.finish())
}

/// The attempt whose span blocks are being read.
struct Group {
    key: Vec<u8>,
    ordinal: u64,
    attempt: AttemptNumber,
    /// Spans and their sequence so far.
    read: u64,
    rollout: Option<(RolloutRecord, u64)>,
}

struct Check<'a, D> {
    database: &'a D,
    report: CheckReport,
    counted: Counters,
    stored: Option<Counters>,
    schema: bool,
    /// Entries of the index.
    indexed: u64,
    blobs: BTreeSet<ContentHash>,
    referenced: BTreeSet<ContentHash>,
    spans: Option<Group>,
}

impl<D: KeyValue> Check<'_, D> {
    fn find(&mut self, key: &[u8], problem: impl Into<String>) {
        self.report.findings_total += 1;
        if self.report.findings.len() < FINDINGS_MAX {
            self.report.findings.push(Finding { record: keys::describe(key), problem: problem.into() });
        }
    }

    fn find_error(&mut self, key: &[u8], error: &StoreError) {
        match error {
            StoreError::Corrupt { detail, .. } => self.find(key, detail.clone()),
            other => self.find(key, other.to_string()),
        }
    }

    fn missing_fragment(&mut self, record: &Pending) {
        self.find(&record.key, format!("fragment {} of {} is missing", record.next, record.fragments));
    }

    fn decoded<T: DeserializeOwned>(&mut self, key: &[u8], payload: &[u8]) -> Option<T> {
        match codec::decode(key, payload) {
            Ok(record) => Some(record),
            Err(error) => {
                self.find_error(key, &error);
                None
            }
        }
    }

    /// A record that is read beside the pass: what is wrong with it is found when the pass comes to it.
    fn look_up<T: DeserializeOwned>(&self, key: &[u8]) -> Option<T> {
        look_up(self.database, key)
    }

    /// One whole record, or why it cannot be put together.
    fn record(&mut self, key: &[u8], payload: Result<Cow<'_, [u8]>>) {
        let payload = &*match payload {
            Ok(payload) => payload,
            Err(error) => return self.find_error(key, &error),
        };
        match Kind::of(key) {
            Some(Kind::Blob) => self.blob(key, payload),
            Some(Kind::Counters) => self.stored = self.decoded(key, payload),
            Some(Kind::Index) => {
                self.indexed += 1;
                if let Some(ordinal) = self.decoded::<u64>(key, payload) {
                    let there = self.database.get(&keys::rollout_key(ordinal)).is_ok_and(|value| value.is_some());
                    if !there {
                        self.find(key, format!("there is no rollout #{ordinal}"));
                    }
                }
            }
            Some(Kind::Rollout) => {
                if let Some((rollout, attempts)) = self.decoded::<StoredRollout>(key, payload) {
                    self.rollout(key, &rollout, &attempts);
                }
            }
            Some(Kind::Spans) => self.block(key, payload),
            Some(Kind::Resources) => self.resources(key, payload),
            Some(Kind::Worker) => {
                if let Some(worker) = self.decoded::<WorkerRecord>(key, payload) {
                    self.counted.workers += 1;
                    if keys::worker_key(&worker.id) != key {
                        self.find(key, "it is that of another worker");
                    }
                }
            }
            Some(Kind::Schema) | None => self.find(key, "nothing has such a key"),
        }
    }

    fn blob(&mut self, key: &[u8], payload: &[u8]) {
        let hash = ContentHash::of(payload);
        if keys::blob_key(&hash) == key {
            self.blobs.insert(hash);
        } else {
            self.find(key, "its content has another hash");
        }
        self.counted.blobs += 1;
        self.counted.blob_bytes += payload.len() as u64;
    }

    fn rollout(&mut self, key: &[u8], rollout: &RolloutRecord, attempts: &[AttemptRecord]) {
        self.report.rollouts += 1;
        self.counted.add_state(rollout.state);
        self.counted.add_outcomes(attempts);
        self.counted.attempts += attempts.len() as u64;
        if let Err(error) = check_stored(key, rollout, attempts) {
            self.find_error(key, &error);
            return;
        }
        if self.look_up::<u64>(&keys::index_key(&rollout.spec.id)) != Some(rollout.ordinal) {
            self.find(key, format!("the index does not lead from `{}` to it", rollout.spec.id));
        }
        if let Some(problem) = state_problem(rollout, attempts) {
            self.find(key, problem);
        }
        self.counted.next_ordinal = rollout.ordinal + 1;
        for attempt in attempts {
            let first = keys::spans_key(rollout.ordinal, attempt.key.attempt, first_own_sequence(rollout));
            if attempt.spans > 0 && !self.database.get(&first).is_ok_and(|value| value.is_some()) {
                self.find(key, format!("the first span of attempt {} is missing", attempt.key.attempt));
            }
        }
        for hash in [rollout.spec.item, rollout.spec.execution] {
            if self.blobs.contains(&hash) {
                self.referenced.insert(hash);
            } else if hash == unknown_content() {
                self.report.unknown_contents += 1;
            } else {
                self.report.missing_contents += 1;
            }
        }
        if let Some(problem) = fork_problem(self.database, rollout) {
            self.find(key, problem);
        }
    }

    fn block(&mut self, key: &[u8], payload: &[u8]) {
        let Some((ordinal, attempt, first)) = keys::spans_key_parts(key) else {
            self.find(key, "nothing has such a key");
            return;
        };
        self.counted.span_bytes += payload.len() as u64;
        if self.spans.as_ref().is_none_or(|group| (group.ordinal, group.attempt) != (ordinal, attempt)) {
            self.end_group();
            let rollout = self.look_up::<StoredRollout>(&keys::rollout_key(ordinal)).and_then(|(rollout, attempts)| {
                let attempt = attempts.into_iter().find(|record| record.key.attempt == attempt)?;
                Some((rollout, attempt.spans))
            });
            if rollout.is_none() {
                self.find(key, "they are spans of an attempt that is not there");
            }
            self.spans = Some(Group { key: key.to_vec(), ordinal, attempt, read: 0, rollout });
        }
        let Some(spans) = self.decoded::<Vec<Span>>(key, payload) else { return };
        self.counted.spans += spans.len() as u64;
        let Some(group) = &mut self.spans else { return };
        let Some((rollout, _)) = &group.rollout else { return };
        let expected = first_own_sequence(rollout) + group.read;
        let owner = AttemptKey { rollout: rollout.spec.id.clone(), attempt };
        let follow =
            (expected..).zip(&spans).all(|(sequence, span)| span.sequence == sequence && span.attempt == owner);
        group.read += spans.len() as u64;
        if first != expected || spans.is_empty() || !follow {
            self.find(key, format!("its spans should be those of {owner} from {expected}"));
        }
    }

    /// All spans of an attempt have been read.
    fn end_group(&mut self) {
        let Some(group) = self.spans.take() else { return };
        if let Some((_, recorded)) = group.rollout
            && recorded != group.read
        {
            self.find(&group.key, format!("{} of {recorded} spans of attempt {} are there", group.read, group.attempt));
        }
    }

    fn resources(&mut self, key: &[u8], payload: &[u8]) {
        let Some(record) = self.decoded::<ResourcesRecord>(key, payload) else { return };
        let version = keys::number_at(key, 1).unwrap_or(0);
        if version != self.counted.resources_version + 1 {
            self.find(key, format!("it follows version {}", self.counted.resources_version));
        }
        self.counted.resources_version = version;
        let own = record.names.get(&record.name) == Some(&version);
        if !own || record.after >= version || record.names.values().any(|published| *published > version) {
            self.find(key, "it refers to versions that it cannot have");
        }
    }

    fn finish(mut self) -> CheckReport {
        self.end_group();
        if !self.schema {
            self.find(&keys::schema_key(), "it is missing");
        }
        let counters_key = keys::counters_key();
        match self.stored.take() {
            None => self.find(&counters_key, "they are missing, or cannot be read"),
            Some(mut stored) => {
                if stored.next_ordinal < self.counted.next_ordinal {
                    self.find(&counters_key, "an ordinal would be given out twice");
                }
                // Ordinals of rollouts that were dropped do not come back, and commits are counted nowhere else.
                stored.next_ordinal = self.counted.next_ordinal;
                stored.commits = self.counted.commits;
                if stored != self.counted {
                    self.find(&counters_key, format!("they say {stored:?}, and there is {:?}", self.counted));
                }
            }
        }
        if self.indexed != self.report.rollouts {
            let problem = format!("it has {} entries for {} rollouts", self.indexed, self.report.rollouts);
            self.find(&[Kind::Index as u8], problem);
        }
        self.report.attempts = self.counted.attempts;
        self.report.spans = self.counted.spans;
        self.report.blobs = self.counted.blobs;
        self.report.resources = self.counted.resources_version;
        self.report.workers = self.counted.workers;
        self.report.unreferenced_blobs = (self.blobs.len() - self.referenced.len()) as u64;
        self.report
    }
}

/// A record, where there is one that can be read.
fn look_up<T: DeserializeOwned>(database: &impl KeyValue, key: &[u8]) -> Option<T> {
    codec::get(database, key).ok().flatten()
}

/// What is wrong with what a fork refers to.
pub(crate) fn fork_problem(database: &impl KeyValue, rollout: &RolloutRecord) -> Option<String> {
    let fork = rollout.spec.fork_of.as_ref()?;
    let ordinal: Option<u64> = look_up(database, &keys::index_key(&fork.rollout));
    let ancestor = ordinal.and_then(|ordinal| look_up::<StoredRollout>(database, &keys::rollout_key(ordinal)));
    let Some((ancestor, attempts)) = ancestor else {
        return Some(format!("it is a fork of `{}`, which is not there", fork.rollout));
    };
    let Some(attempt) = attempts.iter().find(|attempt| attempt.key.attempt == fork.attempt) else {
        return Some(format!("it is a fork of {}/{}, which is not there", fork.rollout, fork.attempt));
    };
    let events = first_own_sequence(&ancestor) + attempt.spans;
    if !attempt.state.is_terminal() || fork.event > events || ancestor.ordinal >= rollout.ordinal {
        return Some(format!("it is a fork of {} at event {}, which is not final", attempt.key, fork.event));
    }
    None
}

/// What does not fit together in the states of a rollout and its attempts.
pub(crate) fn state_problem(rollout: &RolloutRecord, attempts: &[AttemptRecord]) -> Option<String> {
    for attempt in attempts {
        if attempt.state.is_terminal() != attempt.outcome.is_some() {
            return Some(format!(
                "attempt {} is {} and its outcome says otherwise",
                attempt.key.attempt,
                attempt.state.as_str()
            ));
        }
        if let Some(error) = attempt.rewards.iter().find_map(|reward| reward.check().err()) {
            return Some(format!("attempt {}: {error}", attempt.key.attempt));
        }
    }
    let newest = attempts.last().map(|attempt| attempt.state);
    let older = attempts.split_last().map_or(&[][..], |(_, older)| older);
    if older.iter().any(|attempt| !attempt.state.is_terminal() || attempt.state == AttemptState::Succeeded) {
        return Some("an attempt that was graded, or had not ended, was followed by another".to_owned());
    }
    let fits = match rollout.state {
        RolloutState::Queuing => newest.is_none(),
        RolloutState::Preparing => newest == Some(AttemptState::Preparing),
        RolloutState::Running => newest == Some(AttemptState::Running),
        RolloutState::Succeeded => newest == Some(AttemptState::Succeeded),
        RolloutState::Requeuing => newest.is_some_and(|state| state.is_terminal() && state != AttemptState::Succeeded),
        RolloutState::Failed | RolloutState::Cancelled => {
            newest.is_none_or(|state| state.is_terminal() && state != AttemptState::Succeeded)
        }
    };
    let attempt = newest.map_or("not there", AttemptState::as_str);
    (!fits).then(|| format!("it is {} and its newest attempt is {attempt}", rollout.state.as_str()))
}
