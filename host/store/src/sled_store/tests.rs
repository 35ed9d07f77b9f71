//! Migration, crashes in the middle of it, and power cuts under load.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use fulgurite_core::id::{AttemptKey, ContentHash};
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_core::state::{AttemptState, RolloutState};

use super::simulated_disk::SimulatedDisk;
use super::*;
use crate::samples::{key, outcome, reward, rollout_id, spans, spec};
use crate::{AttemptFinish, RolloutQuery, RolloutStore, unknown_content};

/// Keys and values of a store of schema 1, written by the code that had that schema: length and bytes of each, the length
/// as u32, big-endian.
const SCHEMA_1: &[u8] = include_bytes!("../../tests/fixtures/schema-1.bin");

fn store_of_schema_1(dir: &Path) {
    let mut rest = SCHEMA_1;
    let mut take = || {
        let (length, tail) = rest.split_first_chunk::<4>()?;
        let (bytes, tail) = tail.split_at(u32::from_be_bytes(*length) as usize);
        rest = tail;
        Some(bytes.to_vec())
    };
    let database = sled::open(dir).unwrap();
    while let Some(key) = take() {
        database.insert(key, take().unwrap()).unwrap();
    }
    database.flush().unwrap();
    drop(database);
    let commits = 11_u64;
    std::fs::write(dir.join("acknowledged"), [commits.to_be_bytes(), (!commits).to_be_bytes()].concat()).unwrap();
}

/// Everything that the fixture holds, in the words of schema 2.
fn check_migrated(store: &SledStore) {
    use RolloutState::{Cancelled, Failed, Queuing, Requeuing, Running, Succeeded};
    let rollouts = store.rollouts(&RolloutQuery::default()).unwrap();
    let states: Vec<RolloutState> = rollouts.iter().map(|rollout| rollout.state).collect();
    assert_eq!(states, [Succeeded, Failed, Cancelled, Running, Queuing, Requeuing, Queuing]);
    for (index, rollout) in (0..).zip(&rollouts) {
        let mut expected = spec(index);
        Arc::make_mut(&mut expected).item = unknown_content();
        Arc::make_mut(&mut expected).execution = unknown_content();
        assert_eq!(rollout.spec, expected);
        assert_eq!(store.rollout(&rollout.spec.id).unwrap().as_ref(), Some(rollout));
    }
    assert_eq!(unknown_content(), ContentHash::of(b"unknown"));
    assert_eq!(store.blob(&unknown_content()).unwrap(), None);
    let recorded = [(0, 1, 23), (0, 2, 25), (1, 1, 0), (2, 1, 2), (3, 1, 4), (5, 1, 1)];
    for (index, number, count) in recorded {
        let key = key(&rollout_id(index), number);
        assert_eq!(store.spans(&key).unwrap(), spans(&key, 0, count));
        assert_eq!(store.attempts(&key.rollout).unwrap()[number as usize - 1].spans, count);
    }
    let attempt = store.attempts(&rollout_id(0)).unwrap().remove(1);
    assert_eq!(
        (attempt.state, attempt.outcome, attempt.rewards),
        (AttemptState::Succeeded, Some(outcome()), vec![reward(0.25)])
    );
    assert_eq!((attempt.worker.as_str(), attempt.not_forkable), ("", None));
    assert_eq!(store.template("prompt", Some(1)).unwrap().unwrap().text, "short");
    assert_eq!(store.template("prompt", None).unwrap().unwrap().text, "long ".repeat(2_000));
    let report = store.check(&mut |_| {}).unwrap();
    assert!(report.is_sound(), "{:?}", report.findings);
    assert_eq!((report.unknown_contents, report.missing_contents), (14, 0));
    let statistics = store.statistics().unwrap();
    assert_eq!((statistics.attempts, statistics.spans, statistics.rollouts_total()), (6, 55, 7));
    let outcomes = BTreeMap::from([(OutcomeKind::CpuLimit, 4), (OutcomeKind::Cancelled, 1)]);
    assert_eq!(statistics.outcomes, outcomes);
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_store_of_schema_1_is_migrated_when_it_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    store_of_schema_1(dir.path());
    for _ in 0..2 {
        let store = SledStore::open(dir.path()).unwrap();
        check_migrated(&store);
    }
    assert_eq!(names(dir.path()), ["acknowledged", "current", "data-1", "lock"]);
    // And it goes on: what was running is run again, what is new comes behind.
    let store = SledStore::open(dir.path()).unwrap();
    let attempt = store.begin_attempt(&rollout_id(3), 1, "worker").unwrap();
    assert_eq!(attempt.key.attempt.0, 2);
    assert_eq!(store.enqueue(vec![spec(9)]).unwrap()[0].record().ordinal, 7);
}

#[test]
fn a_migration_that_is_stopped_anywhere_leaves_the_old_store_or_the_new_one() {
    let (mut stops, mut operation) = (0, 0);
    loop {
        let dir = tempfile::tempdir().unwrap();
        store_of_schema_1(dir.path());
        let disk = Arc::new(SimulatedDisk::holding(dir.path()));
        disk.stop_before(operation);
        let opened = SledStore::open_on(dir.path(), Arc::clone(&disk) as Arc<dyn Disk>);
        let done = opened.is_ok();
        drop(opened);
        // The power is cut: only what was synced is left.
        let left = tempfile::tempdir().unwrap();
        disk.after_power_cut(dir.path(), left.path());
        check_migrated(&SledStore::open(left.path()).unwrap());
        // Only the process has ended.
        check_migrated(&SledStore::open(dir.path()).unwrap());
        assert_eq!(names(dir.path()), ["acknowledged", "current", "data-1", "lock"]);
        if done {
            break;
        }
        stops += 1;
        operation += 1;
    }
    assert!(stops >= 8, "{stops}");
}

#[test]
fn a_compaction_that_is_stopped_anywhere_leaves_the_old_store_or_the_new_one() {
    let check = |dir: &Path| {
        let store = SledStore::open(dir).unwrap();
        let report = store.check(&mut |_| {}).unwrap();
        assert!(report.is_sound(), "{:?}", report.findings);
        for index in 0..8 {
            let key = key(&rollout_id(index), 1);
            assert_eq!(store.rollout(&key.rollout).unwrap().is_some(), index >= 4);
            if index >= 4 {
                assert_eq!(store.spans(&key).unwrap(), spans(&key, 0, 40));
            }
        }
        drop(store);
        assert_eq!(names(dir).len(), 4, "{:?}", names(dir));
    };
    let (mut stops, mut operation) = (0, 0);
    loop {
        let dir = tempfile::tempdir().unwrap();
        let store = SledStore::open(dir.path()).unwrap();
        store.enqueue((0..8).map(spec).collect()).unwrap();
        for index in 0..8 {
            let key = store.begin_attempt(&rollout_id(index), 1, "").unwrap().key;
            store.mark_running(&key).unwrap();
            store.finish_attempts(vec![finish(&key, 0, 40)]).remove(0).unwrap();
        }
        let blob = store.put_blobs(vec![vec![1; 10_000]]).unwrap().remove(0);
        store.cancel(&store.enqueue(vec![spec(9)]).unwrap()[0].record().spec.id, 1).unwrap();
        // The first four ended before the others began, in the sense of retention.
        let pruned = store.prune(&crate::PruneRule { stage: None, ..Default::default() }).unwrap();
        assert_eq!((pruned.rollouts, pruned.spans), (9, 320));
        store.enqueue((4..8).map(spec).collect()).unwrap();
        for index in 4..8 {
            let key = store.begin_attempt(&rollout_id(index), 1, "").unwrap().key;
            store.mark_running(&key).unwrap();
            store.finish_attempts(vec![finish(&key, 0, 40)]).remove(0).unwrap();
        }
        assert!(store.blob(&blob).unwrap().is_some());
        drop(store);
        let disk = Arc::new(SimulatedDisk::holding(dir.path()));
        disk.stop_before(operation);
        let files = Arc::new(StoreFiles::lock(dir.path(), Arc::clone(&disk) as Arc<dyn Disk>).unwrap());
        let compacted = compact::run(&files, &mut |_| {});
        drop(files);
        let left = tempfile::tempdir().unwrap();
        disk.after_power_cut(dir.path(), left.path());
        check(left.path());
        check(dir.path());
        if let Ok(report) = compacted {
            assert_eq!((report.blobs, report.leftovers), (1, 0));
            assert_eq!(SledStore::open(dir.path()).unwrap().blob(&blob).unwrap(), None);
            break;
        }
        stops += 1;
        operation += 1;
    }
    assert!(stops >= 8, "{stops}");
}

#[test]
fn a_store_of_schema_1_that_has_lost_commits_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    store_of_schema_1(dir.path());
    let commits = 12_u64;
    std::fs::write(dir.path().join("acknowledged"), [commits.to_be_bytes(), (!commits).to_be_bytes()].concat())
        .unwrap();
    let error = SledStore::open(dir.path()).err().unwrap();
    assert!(error.to_string().ends_with("only 11 of 12 acknowledged commits are left"), "{error}");
    assert!(dir.path().join("db").is_file() && !dir.path().join("current").exists());
}

fn finish(key: &AttemptKey, from: u64, count: u64) -> AttemptFinish {
    AttemptFinish {
        key: key.clone(),
        state: AttemptState::Succeeded,
        outcome: outcome(),
        rewards: vec![reward(0.5)],
        end_unix_ns: 2,
        guest_cpu_us: 3,
        not_forkable: None,
        spans: spans(key, from, count).into(),
        rollout_state: RolloutState::Succeeded,
    }
}

#[test]
fn nothing_is_acknowledged_before_a_sync_of_the_data_file() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(SimulatedDisk::default());
    let store = SledStore::open_on(dir.path(), Arc::clone(&disk) as Arc<dyn Disk>).unwrap();
    let syncs = |act: &dyn Fn()| {
        let before = disk.data_syncs();
        act();
        disk.data_syncs() - before
    };
    let key = key(&rollout_id(0), 1);
    assert_eq!(syncs(&|| drop(store.put_blobs(vec![b"item".to_vec()]).unwrap())), 0);
    assert_eq!(syncs(&|| drop(store.enqueue(vec![spec(0), spec(1)]).unwrap())), 1);
    // A repeated call acknowledges what is durable already.
    assert_eq!(syncs(&|| drop(store.enqueue(vec![spec(0)]).unwrap())), 0);
    assert_eq!(syncs(&|| drop(store.begin_attempt(&key.rollout, 1, "").unwrap())), 0);
    assert_eq!(syncs(&|| store.mark_running(&key).unwrap()), 0);
    assert_eq!(syncs(&|| store.append_spans(&key, &spans(&key, 0, 5)).unwrap()), 1);
    assert_eq!(syncs(&|| store.finish_attempts(vec![finish(&key, 5, 3)]).remove(0).unwrap()), 1);
    assert_eq!(syncs(&|| drop(store.cancel(&rollout_id(1), 3).unwrap())), 1);
    assert_eq!(syncs(&|| assert_eq!(store.publish_template(0, "prompt", "text").unwrap(), 1)), 1);
    let statistics = store.statistics().unwrap().syncs;
    assert_eq!((statistics.syncs, statistics.commits), (5, 6));
    // A disk that fails acknowledges nothing, and nothing is written after it.
    disk.stop_before(0);
    let error = store.enqueue(vec![spec(2)]).unwrap_err();
    assert!(matches!(error, StoreError::Io { action: "sync", .. }), "{error}");
    let error = store.enqueue(vec![spec(3)]).unwrap_err();
    assert!(matches!(error, StoreError::Broken(_)), "{error}");
}

/// Writes from several threads until the machine stops. Returns the spans and the end of each attempt that were
/// acknowledged.
fn load(store: &SledStore, seed: Seed) -> BTreeMap<AttemptKey, (u64, bool)> {
    let acknowledged = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for thread in 0..3_u64 {
            let acknowledged = &acknowledged;
            let mut generator = Generator::new(seed.child_index(thread));
            scope.spawn(move || {
                let mut work = || -> Result<()> {
                    for index in (0..400).filter(|index| index % 3 == thread) {
                        let blob = store.put_blobs(vec![vec![7; generator.below(9_000)]])?.remove(0);
                        let mut spec = spec(index);
                        Arc::make_mut(&mut spec).item = blob;
                        store.enqueue(vec![spec])?;
                        let key = store.begin_attempt(&rollout_id(index), 1, "")?.key;
                        acknowledged.lock().unwrap().insert(key.clone(), (0, false));
                        store.mark_running(&key)?;
                        let mut recorded = 0;
                        for _ in 0..generator.below(3) {
                            let count = 1 + generator.below(20) as u64;
                            store.append_spans(&key, &spans(&key, recorded, count))?;
                            recorded += count;
                            acknowledged.lock().unwrap().insert(key.clone(), (recorded, false));
                        }
                        let last = generator.below(10) as u64;
                        store.finish_attempts(vec![finish(&key, recorded, last)]).remove(0)?;
                        acknowledged.lock().unwrap().insert(key.clone(), (recorded + last, true));
                    }
                    Ok(())
                };
                // The machine has stopped.
                let _error = work();
            });
        }
    });
    acknowledged.into_inner().unwrap()
}

#[test]
fn a_power_cut_under_load_takes_nothing_that_was_acknowledged() {
    let mut generator = Generator::new(Seed::new(3));
    let mut finished = 0;
    for round in 0..40 {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(SimulatedDisk::default());
        let store = SledStore::open_on(dir.path(), Arc::clone(&disk) as Arc<dyn Disk>).unwrap();
        disk.stop_before(disk.operations() + generator.below(60) as u64);
        let acknowledged = load(&store, Seed::new(round));
        let left = tempfile::tempdir().unwrap();
        disk.after_power_cut(dir.path(), left.path());
        drop(store);
        let store = SledStore::open(left.path()).unwrap();
        for (key, (count, ended)) in &acknowledged {
            let rollout = store.rollout(&key.rollout).unwrap().unwrap();
            assert!(store.blob(&rollout.spec.item).unwrap().is_some(), "{key}: its item is gone");
            let attempts = store.attempts(&key.rollout).unwrap();
            let recorded = attempts.first().map_or(0, |attempt| attempt.spans);
            assert!(recorded >= *count, "{key}: {recorded} of {count}");
            assert!(!ended || (rollout.state == RolloutState::Succeeded && recorded == *count), "{key}");
            if let Some(attempt) = attempts.first() {
                assert_eq!(store.spans(key).unwrap(), spans(key, 0, attempt.spans));
            }
            finished += u64::from(*ended);
        }
        let report = store.check(&mut |_| {}).unwrap();
        assert!(report.is_sound(), "{:?}", report.findings);
    }
    assert!(finished > 100, "{finished}");
}
