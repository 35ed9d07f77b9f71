//! One suite over every store: random sequences of operations, right and wrong ones, against a model that is simple
//! enough to be believed. Stores on disk are also closed and opened again in between.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "support/samples.rs"]
#[allow(dead_code, reason = "shared with tests that use more of it")]
mod samples;

use std::sync::Arc;

use std::collections::BTreeMap;

use fulgurite_core::id::RolloutId;
use fulgurite_core::reward::InvalidReward;
use fulgurite_core::state::{AttemptState, RolloutState};
use fulgurite_store::{
    AttemptFinish, Enqueued, MemoryStore, PruneRule, RolloutQuery, RolloutStore, SledStore, StoreError, StoreStatistics,
};
use proptest::prelude::*;
use samples::{key, outcome, reward, rollout_id, span, spans, spec};

const ROLLOUTS: u64 = 6;

#[derive(Debug, Clone)]
enum Op {
    /// Rollouts with their sampling temperature: another one makes another spec.
    Enqueue(Vec<(u64, bool)>),
    Begin(u64),
    Running(u64, Which),
    /// How many spans, and by how much their first sequence is wrong.
    Append(Vec<(u64, Which, u64, u64)>),
    Finish(Vec<(u64, Which, AttemptState, RolloutState, u64, f64)>),
    Cancel(u64),
    Publish(u64, u8, u8),
    /// Retention of rollouts that ended in this state.
    Prune(RolloutState),
    Reopen,
    Compact,
}

/// Which attempt of a rollout is written to.
#[derive(Debug, Clone, Copy)]
enum Which {
    Newest,
    Older,
    NotYet,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let which = || prop_oneof![8 => Just(Which::Newest), 1 => Just(Which::Older), 1 => Just(Which::NotYet)];
    let attempt_state = prop_oneof![
        4 => Just(AttemptState::Succeeded),
        2 => Just(AttemptState::Failed),
        1 => Just(AttemptState::Timeout),
        1 => Just(AttemptState::Unresponsive),
        1 => Just(AttemptState::Running),
    ];
    let rollout_state = prop_oneof![
        3 => Just(RolloutState::Succeeded),
        3 => Just(RolloutState::Requeuing),
        1 => Just(RolloutState::Failed),
        1 => Just(RolloutState::Cancelled),
        1 => Just(RolloutState::Running),
    ];
    let wrong = prop_oneof![9 => Just(0_u64), 1 => Just(1)];
    let value = prop_oneof![9 => Just(0.5), 1 => Just(f64::NAN)];
    let op = prop_oneof![
        3 => prop::collection::vec((0..ROLLOUTS, prop::bool::weighted(0.05)), 0..4).prop_map(Op::Enqueue),
        6 => (0..ROLLOUTS).prop_map(Op::Begin),
        6 => (0..ROLLOUTS, which()).prop_map(|(rollout, which)| Op::Running(rollout, which)),
        6 => prop::collection::vec((0..ROLLOUTS, which(), 0..20_u64, wrong), 0..4).prop_map(Op::Append),
        6 => prop::collection::vec((0..ROLLOUTS, which(), attempt_state, rollout_state, 0..4_u64, value), 0..4)
            .prop_map(Op::Finish),
        1 => (0..ROLLOUTS).prop_map(Op::Cancel),
        1 => (0..4_u64, 0..2_u8, 0..2_u8).prop_map(|(after, name, text)| Op::Publish(after, name, text)),
        1 => prop::sample::select(RolloutState::ALL.to_vec()).prop_map(Op::Prune),
        2 => Just(Op::Reopen),
        1 => Just(Op::Compact),
    ];
    prop::collection::vec(op, 1..60)
}

#[derive(Debug, Clone, PartialEq)]
struct ModelAttempt {
    state: AttemptState,
    spans: u64,
    rewards: usize,
}

#[derive(Debug, Clone, PartialEq)]
struct ModelRollout {
    index: u64,
    ordinal: u64,
    warm: bool,
    state: RolloutState,
    attempts: Vec<ModelAttempt>,
}

/// A rollout as it is, and as the disk knows it.
#[derive(Debug, Clone)]
struct Both {
    now: ModelRollout,
    disk: ModelRollout,
}

#[derive(Debug, Default)]
struct Model {
    rollouts: Vec<Both>,
    next_ordinal: u64,
    /// (after, name, text) of each version from 1, and its templates.
    resources: Vec<(Publication, BTreeMap<u8, u8>)>,
}

/// What was published: on top of which version, name, text.
type Publication = (u64, u8, u8);
type Verdict = Result<(), &'static str>;

fn name_of(error: &StoreError) -> &'static str {
    match error {
        StoreError::UnknownRollout(_) => "unknown rollout",
        StoreError::UnknownAttempt(_) => "unknown attempt",
        StoreError::Conflict(_) => "conflict",
        StoreError::StaleAttempt { .. } => "stale",
        StoreError::AttemptEnded { .. } => "attempt ended",
        StoreError::RolloutEnded { .. } => "rollout ended",
        StoreError::IllegalTransition { .. } => "illegal",
        StoreError::SpanOrder { .. } => "order",
        StoreError::InvalidReward { source: InvalidReward::NotFinite { .. }, .. } => "reward",
        StoreError::UnknownResources(_) => "unknown resources",
        other => panic!("unexpected: {other}"),
    }
}

impl Model {
    fn find(&mut self, index: u64) -> Option<&mut Both> {
        self.rollouts.iter_mut().find(|both| both.now.index == index)
    }

    fn attempt_number(&mut self, index: u64, which: Which) -> u32 {
        let newest = self.find(index).map_or(0, |both| u32::try_from(both.now.attempts.len()).unwrap());
        match which {
            Which::Newest => newest,
            Which::Older => newest.saturating_sub(1),
            Which::NotYet => newest + 1,
        }
    }

    /// The live attempt of this number, or what is wrong.
    fn live(&mut self, index: u64, number: u32) -> Result<&mut Both, &'static str> {
        let Some(both) = self.find(index) else { return Err("unknown rollout") };
        let newest = u32::try_from(both.now.attempts.len()).unwrap();
        if newest == 0 || number > newest {
            Err("unknown attempt")
        } else if number < newest {
            Err("stale")
        } else if both.now.attempts.last().unwrap().state.is_terminal() {
            Err("attempt ended")
        } else {
            Ok(both)
        }
    }

    fn enqueue(&mut self, items: &[(u64, bool)]) -> Result<Vec<bool>, &'static str> {
        let before = (self.rollouts.len(), self.next_ordinal);
        let mut existing = vec![];
        for (index, warm) in items {
            match self.find(*index) {
                Some(both) if both.now.warm != *warm => {
                    self.rollouts.truncate(before.0);
                    self.next_ordinal = before.1;
                    return Err("conflict");
                }
                Some(_) => existing.push(true),
                None => {
                    let now = ModelRollout {
                        index: *index,
                        ordinal: self.next_ordinal,
                        warm: *warm,
                        state: RolloutState::Queuing,
                        attempts: vec![],
                    };
                    self.next_ordinal += 1;
                    self.rollouts.push(Both { disk: now.clone(), now });
                    existing.push(false);
                }
            }
        }
        Ok(existing)
    }

    fn begin(&mut self, index: u64) -> Verdict {
        let both = self.find(index).ok_or("unknown rollout")?;
        if both.now.state.is_terminal() {
            return Err("rollout ended");
        }
        if matches!(both.now.state, RolloutState::Preparing | RolloutState::Running) {
            both.now.attempts.last_mut().unwrap().state = AttemptState::Unresponsive;
            both.now.state = RolloutState::Requeuing;
            both.disk = both.now.clone();
        }
        both.now.state = RolloutState::Preparing;
        both.now.attempts.push(ModelAttempt { state: AttemptState::Preparing, spans: 0, rewards: 0 });
        Ok(())
    }

    fn running(&mut self, index: u64, number: u32) -> Verdict {
        let both = self.live(index, number)?;
        if both.now.state == RolloutState::Running {
            return Err("illegal");
        }
        both.now.state = RolloutState::Running;
        both.now.attempts.last_mut().unwrap().state = AttemptState::Running;
        Ok(())
    }

    fn append(&mut self, index: u64, number: u32, count: u64, wrong: u64) -> Verdict {
        let both = self.live(index, number)?;
        if count == 0 {
            return Ok(());
        }
        if wrong > 0 {
            return Err("order");
        }
        both.now.attempts.last_mut().unwrap().spans += count;
        both.disk = both.now.clone();
        Ok(())
    }

    fn finish(
        &mut self,
        index: u64,
        number: u32,
        attempt: AttemptState,
        rollout: RolloutState,
        spans: u64,
        value: f64,
    ) -> Verdict {
        if value.is_nan() {
            return Err("reward");
        }
        if attempt == AttemptState::Running || rollout == RolloutState::Running {
            return Err("illegal");
        }
        if (attempt == AttemptState::Succeeded) != (rollout == RolloutState::Succeeded) {
            return Err("illegal");
        }
        let both = self.live(index, number)?;
        let prepared = both.now.state == RolloutState::Preparing;
        if prepared && (attempt == AttemptState::Succeeded || rollout == RolloutState::Succeeded) {
            return Err("illegal");
        }
        both.now.state = rollout;
        let last = both.now.attempts.last_mut().unwrap();
        last.state = attempt;
        last.spans += spans;
        last.rewards = 1;
        both.disk = both.now.clone();
        Ok(())
    }

    fn cancel(&mut self, index: u64) -> Verdict {
        let both = self.find(index).ok_or("unknown rollout")?;
        if both.now.state.is_terminal() {
            return Err("rollout ended");
        }
        if matches!(both.now.state, RolloutState::Preparing | RolloutState::Running) {
            both.now.attempts.last_mut().unwrap().state = AttemptState::Failed;
        }
        both.now.state = RolloutState::Cancelled;
        both.disk = both.now.clone();
        Ok(())
    }

    fn publish(&mut self, after: u64, name: u8, text: u8) -> Result<u64, &'static str> {
        let base = usize::try_from(after).unwrap();
        if base > self.resources.len() {
            return Err("unknown resources");
        }
        if let Some(at) = self.resources.iter().position(|(made, _)| *made == (after, name, text)) {
            return Ok(at as u64 + 1);
        }
        let mut templates = base.checked_sub(1).map_or_else(BTreeMap::new, |at| self.resources[at].1.clone());
        templates.insert(name, text);
        self.resources.push(((after, name, text), templates));
        Ok(self.resources.len() as u64)
    }

    fn prune(&mut self, state: RolloutState) -> u64 {
        let before = self.rollouts.len();
        self.rollouts.retain(|both| !(state.is_terminal() && both.now.state == state));
        (before - self.rollouts.len()) as u64
    }

    fn reopen(&mut self) {
        for both in &mut self.rollouts {
            both.now = both.disk.clone();
        }
    }
}

/// A store under test.
trait Harness {
    fn store(&self) -> &dyn RolloutStore;
    /// Closes and opens it again, perhaps compacted; `false` when it does not outlive its process.
    fn reopen(&mut self, compact: bool) -> bool;
}

struct InMemory(MemoryStore);

impl Harness for InMemory {
    fn store(&self) -> &dyn RolloutStore {
        &self.0
    }
    fn reopen(&mut self, _compact: bool) -> bool {
        false
    }
}

struct OnDisk {
    store: Option<SledStore>,
    dir: tempfile::TempDir,
}

impl OnDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { store: Some(SledStore::open(dir.path()).unwrap()), dir }
    }
}

impl Harness for OnDisk {
    fn store(&self) -> &dyn RolloutStore {
        self.store.as_ref().unwrap()
    }
    fn reopen(&mut self, compact: bool) -> bool {
        self.store = None;
        if compact {
            SledStore::compact(self.dir.path(), &mut |_| {}).unwrap();
        }
        self.store = Some(SledStore::open(self.dir.path()).unwrap());
        true
    }
}

fn verdict<T>(result: Result<T, StoreError>) -> Result<T, &'static str> {
    result.map_err(|error| name_of(&error))
}

fn spec_of(index: u64, warm: bool) -> Arc<fulgurite_core::record::RolloutSpec> {
    let mut spec = spec(index);
    if warm {
        Arc::make_mut(&mut spec).sampling.temperature = 2.0;
    }
    spec
}

fn apply(harness: &mut dyn Harness, model: &mut Model, op: &Op) {
    let store = harness.store();
    match op {
        Op::Enqueue(items) => {
            let specs = items.iter().map(|(index, warm)| spec_of(*index, *warm)).collect();
            let got = verdict(store.enqueue(specs)).map(|list| list.iter().map(Enqueued::is_existing).collect());
            assert_eq!(got, model.enqueue(items));
        }
        Op::Begin(index) => {
            let got = verdict(store.begin_attempt(&rollout_id(*index), 5, ""));
            assert_eq!(got.as_ref().map(|_| ()).map_err(|name| *name), model.begin(*index));
            if let Ok(attempt) = got {
                assert_eq!(attempt.key, key(&rollout_id(*index), model.attempt_number(*index, Which::Newest)));
            }
        }
        Op::Running(index, which) => {
            let number = model.attempt_number(*index, *which);
            let got = verdict(store.mark_running(&key(&rollout_id(*index), number)));
            assert_eq!(got, model.running(*index, number));
        }
        Op::Append(items) => {
            let mut appends = vec![];
            let mut expected = vec![];
            for (index, which, count, wrong) in items {
                let number = model.attempt_number(*index, *which);
                let key = key(&rollout_id(*index), number);
                let from = model.live(*index, number).map_or(0, |both| both.now.attempts.last().unwrap().spans);
                appends.push((key.clone(), spans(&key, from + wrong, *count)));
                expected.push(model.append(*index, number, *count, *wrong));
            }
            let got: Vec<Verdict> = match appends.as_slice() {
                [(key, spans)] => vec![verdict(store.append_spans(key, spans))],
                appends => store.append_many(appends).into_iter().map(verdict).collect(),
            };
            assert_eq!(got, expected);
        }
        Op::Finish(items) => {
            // What is handed in must be known before, so the model goes first.
            let mut finishes = vec![];
            let mut expected = vec![];
            for (index, which, state, rollout_state, count, value) in items {
                let number = model.attempt_number(*index, *which);
                let key = key(&rollout_id(*index), number);
                let from = model.live(*index, number).map_or(0, |both| both.now.attempts.last().unwrap().spans);
                finishes.push(AttemptFinish {
                    state: *state,
                    outcome: outcome(),
                    rewards: vec![reward(*value)],
                    end_unix_ns: 9,
                    guest_cpu_us: 3,
                    not_forkable: None,
                    spans: spans(&key, from, *count).into(),
                    rollout_state: *rollout_state,
                    key,
                });
                expected.push(model.finish(*index, number, *state, *rollout_state, *count, *value));
            }
            let got: Vec<Verdict> = store.finish_attempts(finishes).into_iter().map(verdict).collect();
            assert_eq!(got, expected);
        }
        Op::Cancel(index) => {
            let got = verdict(store.cancel(&rollout_id(*index), 9)).map(|record| record.state);
            assert_eq!(got, model.cancel(*index).map(|()| RolloutState::Cancelled));
        }
        Op::Publish(after, name, text) => {
            let got = verdict(store.publish_template(*after, &format!("name-{name}"), &format!("text-{text}")));
            assert_eq!(got, model.publish(*after, *name, *text));
        }
        Op::Prune(state) => {
            let rule = PruneRule { states: vec![*state], ..PruneRule::default() };
            assert_eq!(store.prune(&rule).unwrap().rollouts, model.prune(*state));
        }
        Op::Reopen | Op::Compact => {
            if harness.reopen(matches!(op, Op::Compact)) {
                model.reopen();
            }
        }
    }
}

/// Everything that can be read equals the model.
fn compare(store: &dyn RolloutStore, model: &Model) {
    let records = store.rollouts(&RolloutQuery::default()).unwrap();
    assert_eq!(records.len(), model.rollouts.len());
    let mut expected = StoreStatistics { resources_version: model.resources.len() as u64, ..Default::default() };
    for (record, both) in records.iter().zip(&model.rollouts) {
        let rollout = &both.now;
        assert_eq!(record.spec, spec_of(rollout.index, rollout.warm));
        assert_eq!((record.ordinal, record.state), (rollout.ordinal, rollout.state));
        assert_eq!(record.attempt.map_or(0, |number| number.0 as usize), rollout.attempts.len());
        assert_eq!(store.rollout(&record.spec.id).unwrap().as_ref(), Some(record));
        let attempts = store.attempts(&record.spec.id).unwrap();
        assert_eq!(attempts.len(), rollout.attempts.len());
        for (number, (got, want)) in (1..).zip(attempts.iter().zip(&rollout.attempts)) {
            let key = key(&record.spec.id, number);
            assert_eq!((&got.key, got.state, got.spans), (&key, want.state, want.spans));
            assert_eq!(got.rewards.len(), want.rewards);
            assert_eq!(got.outcome.is_some(), want.state.is_terminal());
            if let Some(end) = &got.outcome {
                *expected.outcomes.entry(end.kind).or_default() += 1;
            }
            let recorded = store.spans(&key).unwrap();
            assert_eq!(recorded, spans(&key, 0, want.spans));
            expected.spans += want.spans;
        }
        let next = key(&record.spec.id, u32::try_from(attempts.len()).unwrap() + 1);
        assert!(matches!(store.spans(&next), Err(StoreError::UnknownAttempt(_))));
        *expected.rollouts.entry(rollout.state).or_default() += 1;
        expected.attempts += attempts.len() as u64;
    }
    let report = store.check(&mut |_| {}).unwrap();
    assert!(report.is_sound(), "{:?}", report.findings);
    let got = store.statistics().unwrap();
    expected.span_bytes = got.span_bytes;
    expected.disk_bytes = got.disk_bytes;
    expected.syncs = got.syncs;
    assert_eq!(got, expected);
    for (version, (_, templates)) in (1..).zip(&model.resources) {
        for name in 0..2 {
            let got = store.template(&format!("name-{name}"), Some(version)).unwrap().map(|template| template.text);
            assert_eq!(got, templates.get(&name).map(|text| format!("text-{text}")));
        }
        assert_eq!(store.templates(version).unwrap().len(), templates.len());
    }
}

fn check(harness: &mut dyn Harness, ops: &[Op]) {
    let mut model = Model::default();
    for op in ops {
        apply(harness, &mut model, op);
        if matches!(op, Op::Reopen | Op::Compact) {
            compare(harness.store(), &model);
        }
    }
    compare(harness.store(), &model);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn memory_store_conforms(ops in ops()) {
        check(&mut InMemory(MemoryStore::new()), &ops);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn sled_store_conforms(ops in ops()) {
        check(&mut OnDisk::new(), &ops);
    }
}

/// Runs a test over every store.
macro_rules! over_all_stores {
    ($($name:ident)*) => {
        mod memory {
            use super::*;
            $(#[test] fn $name() { super::$name(&mut InMemory(MemoryStore::new())); })*
        }
        mod on_disk {
            use super::*;
            $(#[test] fn $name() { super::$name(&mut OnDisk::new()); })*
        }
    };
}

over_all_stores! {
    queries_filter_and_page
    a_conflicting_spec_enqueues_nothing
    spans_of_another_attempt_are_refused
    a_span_longer_than_a_block_comes_back
    two_finishes_of_one_rollout_in_one_commit_see_each_other
    what_a_worker_left_live_can_go_on_or_be_begun_again
    threads_write_at_the_same_time
}

fn queries_filter_and_page(harness: &mut dyn Harness) {
    let store = harness.store();
    store.enqueue((0..32).map(spec).collect()).unwrap();
    store.begin_attempt(&rollout_id(4), 1, "").unwrap();
    let ordinals = |query: RolloutQuery| -> Vec<u64> {
        store.rollouts(&query).unwrap().iter().map(|record| record.ordinal).collect()
    };
    let step = RolloutQuery { step: Some(1), ..Default::default() };
    assert_eq!(ordinals(step.clone()), (8..16).collect::<Vec<_>>());
    assert_eq!(ordinals(RolloutQuery { offset: 6, limit: Some(5), ..step.clone() }), [14, 15]);
    assert_eq!(ordinals(RolloutQuery { stage: Some("sft".to_owned()), ..step.clone() }), [9, 12, 15]);
    assert_eq!(ordinals(RolloutQuery { limit: Some(0), ..step }), [0; 0]);
    assert_eq!(ordinals(RolloutQuery { state: Some(RolloutState::Preparing), ..Default::default() }), [4]);
    let mode = Some(fulgurite_core::record::RolloutMode::Test);
    assert_eq!(ordinals(RolloutQuery { mode, limit: Some(2), ..Default::default() }), [2, 5]);
}

fn a_conflicting_spec_enqueues_nothing(harness: &mut dyn Harness) {
    let store = harness.store();
    store.enqueue(vec![spec(1)]).unwrap();
    let mut other = spec(1);
    Arc::make_mut(&mut other).seed = fulgurite_core::seed::Seed::new(99);
    let error = store.enqueue(vec![spec(2), other]).unwrap_err();
    assert_eq!(error.to_string(), "rollout `grpo-00000-0001` is already enqueued with a different spec");
    assert_eq!(store.rollout(&rollout_id(2)).unwrap(), None);
    // A spec that is not equal to itself by `==` still is the same spec.
    let mut not_a_number = spec(3);
    Arc::make_mut(&mut not_a_number).sampling.min_p = f32::NAN;
    store.enqueue(vec![not_a_number.clone()]).unwrap();
    assert!(store.enqueue(vec![not_a_number]).unwrap()[0].is_existing());
}

fn spans_of_another_attempt_are_refused(harness: &mut dyn Harness) {
    let store = harness.store();
    store.enqueue(vec![spec(0)]).unwrap();
    let key_1 = store.begin_attempt(&rollout_id(0), 1, "").unwrap().key;
    let other = key(&rollout_id(1), 1);
    let error = store.append_spans(&key_1, &[span(&other, 0)]).unwrap_err();
    assert!(matches!(error, StoreError::ForeignSpan { .. }), "{error}");
    // A gap inside one call.
    let error = store.append_spans(&key_1, &[span(&key_1, 0), span(&key_1, 2)]).unwrap_err();
    assert!(matches!(error, StoreError::SpanOrder { expected: 1, found: 2, .. }), "{error}");
    assert!(store.spans(&key_1).unwrap().is_empty());
}

fn a_span_longer_than_a_block_comes_back(harness: &mut dyn Harness) {
    let store = harness.store();
    store.enqueue(vec![spec(0)]).unwrap();
    let key = store.begin_attempt(&rollout_id(0), 1, "").unwrap().key;
    let mut list = spans(&key, 0, 5);
    for (span, bytes) in list.iter_mut().zip([1, 4_080, 1 << 20, 4_096, 100_000]) {
        span.body = samples::body(12, bytes);
    }
    store.append_spans(&key, &list[..3]).unwrap();
    store.mark_running(&key).unwrap();
    let long = fulgurite_core::outcome::AttemptOutcome::completed("y".repeat(1 << 20));
    let finish = AttemptFinish {
        key: key.clone(),
        state: AttemptState::Succeeded,
        outcome: long.clone(),
        rewards: vec![],
        end_unix_ns: 1,
        guest_cpu_us: 1,
        not_forkable: None,
        spans: std::sync::Arc::new(list[3..].to_vec()),
        rollout_state: RolloutState::Succeeded,
    };
    store.finish_attempts(vec![finish]).remove(0).unwrap();
    harness.reopen(false);
    assert!(harness.store().spans(&key).unwrap() == list);
    assert!(harness.store().attempts(&key.rollout).unwrap()[0].outcome.as_ref() == Some(&long));
}

fn finish(key: &fulgurite_core::id::AttemptKey, rollout_state: RolloutState) -> AttemptFinish {
    AttemptFinish {
        key: key.clone(),
        state: AttemptState::Failed,
        outcome: outcome(),
        rewards: vec![],
        end_unix_ns: 1,
        guest_cpu_us: 1,
        not_forkable: None,
        spans: std::sync::Arc::default(),
        rollout_state,
    }
}

fn two_finishes_of_one_rollout_in_one_commit_see_each_other(harness: &mut dyn Harness) {
    let store = harness.store();
    store.enqueue(vec![spec(0), spec(1)]).unwrap();
    let keys: Vec<_> = (0..2).map(|index| store.begin_attempt(&rollout_id(index), 1, "").unwrap().key).collect();
    let finishes = vec![
        finish(&keys[0], RolloutState::Requeuing),
        finish(&keys[1], RolloutState::Failed),
        finish(&keys[0], RolloutState::Failed),
        finish(&key(&RolloutId::new("nobody").unwrap(), 1), RolloutState::Failed),
    ];
    let results = store.finish_attempts(finishes);
    assert!(results[0].is_ok() && results[1].is_ok());
    assert!(matches!(results[2], Err(StoreError::AttemptEnded { state: AttemptState::Failed, .. })));
    assert!(matches!(results[3], Err(StoreError::UnknownRollout(_))));
    assert_eq!(store.statistics().unwrap().rollouts_in(RolloutState::Requeuing), 1);
}

fn what_a_worker_left_live_can_go_on_or_be_begun_again(harness: &mut dyn Harness) {
    let store = harness.store();
    store.enqueue(vec![spec(0)]).unwrap();
    let key_1 = store.begin_attempt(&rollout_id(0), 1, "").unwrap().key;
    store.mark_running(&key_1).unwrap();
    store.append_spans(&key_1, &spans(&key_1, 0, 3)).unwrap();
    harness.reopen(false);
    let store = harness.store();
    // Its worker may still be there.
    store.append_spans(&key_1, &spans(&key_1, 3, 3)).unwrap();
    harness.reopen(false);
    let store = harness.store();
    let second = store.begin_attempt(&rollout_id(0), 2, "").unwrap();
    assert_eq!(second.key.attempt.0, 2);
    let error = store.append_spans(&key_1, &spans(&key_1, 6, 1)).unwrap_err();
    assert_eq!(error.to_string(), "attempt grpo-00000-0000/1 is stale: attempt 2 is the newest of its rollout");
    let attempts = store.attempts(&rollout_id(0)).unwrap();
    assert_eq!(attempts[0].state, AttemptState::Unresponsive);
    assert_eq!(attempts[1], second);
    assert_eq!(store.spans(&key_1).unwrap(), spans(&key_1, 0, 6));
}

fn threads_write_at_the_same_time(harness: &mut dyn Harness) {
    let store = harness.store();
    store.enqueue((0..32).map(spec).collect()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                for index in (0..32).filter(|index| index % 4 == thread) {
                    let key = store.begin_attempt(&rollout_id(index), 1, "").unwrap().key;
                    store.mark_running(&key).unwrap();
                    for part in 0..4 {
                        store.append_spans(&key, &spans(&key, part * 5, 5)).unwrap();
                    }
                    store.finish_attempts(vec![finish(&key, RolloutState::Failed)]).remove(0).unwrap();
                }
            });
        }
    });
    harness.reopen(false);
    for index in 0..32 {
        let key = key(&rollout_id(index), 1);
        assert_eq!(harness.store().spans(&key).unwrap(), spans(&key, 0, 20));
    }
    let statistics = harness.store().statistics().unwrap();
    assert_eq!((statistics.rollouts_in(RolloutState::Failed), statistics.spans), (32, 640));
}
