//! Retention, compaction and the check, over stores that are whole and stores that are not.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "support/ends.rs"]
mod ends;
#[path = "support/samples.rs"]
#[allow(dead_code, reason = "shared with tests that use more of it")]
mod samples;

use std::path::Path;

use ends::finish;
use fulgurite_core::id::{AttemptKey, RolloutId};
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_core::state::RolloutState;
use fulgurite_store::{CheckReport, MemoryStore, PruneRule, RolloutQuery, RolloutStore, SledStore, StoreError};
use samples::{fork, key, rollout_id, spans, spec};

fn run(store: &dyn RolloutStore, index: u64, from: u64, state: RolloutState) -> AttemptKey {
    let key = store.begin_attempt(&rollout_id(index), 1, "").unwrap().key;
    store.mark_running(&key).unwrap();
    store.finish_attempts(vec![finish(&key, from, 12, state)]).remove(0).unwrap();
    key
}

/// Steps 0 to 4 of two stages with 8 rollouts each; 5 are live or wait, every fourth has failed.
fn fill(store: &dyn RolloutStore) {
    let item = store.put_blobs(vec![b"item".to_vec(), vec![3; 9_000]]).unwrap()[0];
    let specs = (0..40).map(|index| fulgurite_core::record::RolloutSpec { item, ..(*spec(index)).clone() }.into());
    store.enqueue(specs.collect()).unwrap();
    for index in 0..38 {
        match index {
            5 | 13 => drop(store.begin_attempt(&rollout_id(index), 1, "").unwrap()),
            21 => {
                let key = store.begin_attempt(&rollout_id(index), 1, "").unwrap().key;
                store.append_spans(&key, &spans(&key, 0, 30)).unwrap();
            }
            index if index % 4 == 0 => drop(run(store, index, 0, RolloutState::Failed)),
            index => drop(run(store, index, 0, RolloutState::Succeeded)),
        }
    }
    store.publish_template(0, "prompt", &"text".repeat(5_000)).unwrap();
    store
        .put_worker(fulgurite_core::record::WorkerRecord {
            id: "worker".to_owned(),
            process_id: 1,
            start_unix_ns: 1,
            heartbeat_unix_ns: 1,
            attempts: 1,
        })
        .unwrap();
}

fn ids(store: &dyn RolloutStore) -> Vec<RolloutId> {
    store.rollouts(&RolloutQuery::default()).unwrap().into_iter().map(|rollout| rollout.spec.id.clone()).collect()
}

fn sound(store: &dyn RolloutStore) -> CheckReport {
    let report = store.check(&mut |_| {}).unwrap();
    assert!(report.is_sound(), "{:?}", report.findings);
    report
}

#[test]
fn retention_drops_what_the_rule_says_and_nothing_that_has_not_ended() {
    type Drops = fn(u64) -> bool;
    let rules: [(PruneRule, Drops); 6] = [
        (PruneRule::default(), |_| true),
        (PruneRule { before_step: Some(3), ..PruneRule::default() }, |index| index < 24),
        (PruneRule { keep_steps: Some(2), ..PruneRule::default() }, |index| index < 24),
        (PruneRule { keep_steps: Some(9), ..PruneRule::default() }, |_| false),
        (PruneRule { states: vec![RolloutState::Failed], ..PruneRule::default() }, |index| index % 4 == 0),
        (PruneRule { stage: Some("sft".to_owned()), before_step: Some(2), ..PruneRule::default() }, |index| {
            index % 3 == 0 && index < 16
        }),
    ];
    for (rule, drops) in rules {
        let memory = MemoryStore::new();
        let dir = tempfile::tempdir().unwrap();
        let disk = SledStore::open(dir.path()).unwrap();
        for store in [&memory as &dyn RolloutStore, &disk] {
            fill(store);
            let live = |index: u64| matches!(index, 5 | 13 | 21 | 38 | 39);
            let staying: Vec<u64> = (0..40).filter(|index| live(*index) || !drops(*index)).collect();
            let before = store.statistics().unwrap();
            let tried = store.prune(&PruneRule { dry_run: true, ..rule.clone() }).unwrap();
            assert_eq!((ids(store).len(), store.statistics().unwrap().spans), (40, before.spans));
            let report = store.prune(&rule).unwrap();
            assert_eq!(
                (tried.rollouts, tried.spans, tried.span_bytes),
                (report.rollouts, report.spans, report.span_bytes)
            );
            assert_eq!(ids(store), staying.iter().map(|index| rollout_id(*index)).collect::<Vec<_>>(), "{rule:?}");
            let after = store.statistics().unwrap();
            assert_eq!(report.rollouts, 40 - staying.len() as u64);
            assert_eq!(before.spans - after.spans, report.spans);
            assert_eq!(before.span_bytes - after.span_bytes, report.span_bytes);
            assert_eq!(before.attempts - after.attempts, report.attempts);
            sound(store);
            assert_eq!(store.prune(&rule).unwrap().rollouts, 0);
            // What was dropped can be run again under its id, and gets a new ordinal.
            for index in (0..40).filter(|index| !staying.contains(index)).take(1) {
                let key = key(&rollout_id(index), 1);
                assert!(matches!(store.spans(&key), Err(StoreError::UnknownRollout(_))));
                assert_eq!(store.enqueue(vec![spec(index)]).unwrap()[0].record().ordinal, 40);
                assert_eq!(run(store, index, 0, RolloutState::Succeeded), key);
            }
        }
        drop(disk);
        sound(&SledStore::open(dir.path()).unwrap());
    }
}

#[test]
fn retention_keeps_what_a_fork_refers_to() {
    let store = MemoryStore::new();
    store.enqueue((0..4).map(spec).collect()).unwrap();
    let first = run(&store, 0, 0, RolloutState::Succeeded);
    for index in 1..4 {
        run(&store, index, 0, RolloutState::Succeeded);
    }
    // A finished fork of 0, which a fork that waits refers to; a finished fork of 1, which nothing refers to.
    store.enqueue(vec![fork(10, &first, 4), fork(11, &key(&rollout_id(1), 1), 2)]).unwrap();
    let second = run(&store, 10, 4, RolloutState::Succeeded);
    run(&store, 11, 2, RolloutState::Succeeded);
    store.enqueue(vec![fork(12, &second, 6)]).unwrap();
    let report = store.prune(&PruneRule::default()).unwrap();
    assert_eq!((report.rollouts, report.kept_for_forks), (4, 2));
    assert_eq!(ids(&store), [rollout_id(0), rollout_id(10), rollout_id(12)]);
    sound(&store);
    // When the fork has ended it goes with its ancestors.
    run(&store, 12, 6, RolloutState::Failed);
    assert_eq!(store.prune(&PruneRule::default()).unwrap().rollouts, 3);
    let report = sound(&store);
    assert_eq!((report.rollouts, report.spans), (0, 0));
}

#[test]
fn compaction_gives_space_back_and_changes_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = SledStore::open(dir.path()).unwrap();
    store.enqueue((0..400).map(spec).collect()).unwrap();
    for index in 0..400 {
        let key = store.begin_attempt(&rollout_id(index), 1, "").unwrap().key;
        store.mark_running(&key).unwrap();
        store.append_spans(&key, &spans(&key, 0, 40)).unwrap();
        store.finish_attempts(vec![finish(&key, 40, 40, RolloutState::Succeeded)]).remove(0).unwrap();
    }
    store.prune(&PruneRule { before_step: Some(45), ..PruneRule::default() }).unwrap();
    let everything = |store: &SledStore| {
        let rollouts = store.rollouts(&RolloutQuery::default()).unwrap();
        let parts: Vec<_> = rollouts
            .iter()
            .map(|rollout| (store.attempts(&rollout.spec.id).unwrap(), store.spans(&key(&rollout.spec.id, 1)).unwrap()))
            .collect();
        (rollouts, parts)
    };
    let before = everything(&store);
    drop(store);
    let mut told = 0;
    let report = SledStore::compact(dir.path(), &mut |records| told = records).unwrap();
    assert!(report.bytes_after * 4 < report.bytes_before, "{report:?}");
    assert!(report.records > 0 && told <= report.records);
    let store = SledStore::open(dir.path()).unwrap();
    assert!(everything(&store) == before);
    sound(&store);
    // It is not given away while somebody uses it.
    let error = SledStore::compact(dir.path(), &mut |_| {}).unwrap_err();
    assert!(matches!(error, StoreError::InUse { .. }), "{error}");
    drop(store);
    let again = SledStore::compact(dir.path(), &mut |_| {}).unwrap();
    assert!(again.bytes_after <= report.bytes_after * 2, "{again:?}");
}

/// The current database of a store that nobody has open.
fn open_raw(dir: &Path) -> sled::Db {
    let data = dir.join(std::fs::read_to_string(dir.join("current")).unwrap().trim_end());
    loop {
        match sled::open(&data) {
            Ok(database) => return database,
            Err(sled::Error::Io(_)) => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn every_record_that_is_missing_is_found() {
    let dir = tempfile::tempdir().unwrap();
    fill(&SledStore::open(dir.path()).unwrap());
    let records: Vec<(sled::IVec, sled::IVec)> = open_raw(dir.path()).iter().map(Result::unwrap).collect();
    assert!(records.len() > 120);
    for (key, value) in records {
        let database = open_raw(dir.path());
        database.remove(&key).unwrap();
        database.flush().unwrap();
        drop(database);
        let found = SledStore::open(dir.path()).and_then(|store| store.check(&mut |_| {}));
        match found {
            Ok(report) => assert!(!report.is_sound() && !report.findings.is_empty(), "{key:?}"),
            Err(error) => {
                assert!(matches!(error, StoreError::Damaged { .. } | StoreError::NotAStore { .. }), "{error}");
            }
        }
        open_raw(dir.path()).insert(key, value).unwrap();
    }
    sound(&SledStore::open(dir.path()).unwrap());
}

#[test]
fn a_check_of_garbage_ends_with_findings_that_name_records() {
    let dir = tempfile::tempdir().unwrap();
    fill(&SledStore::open(dir.path()).unwrap());
    let mut generator = Generator::new(Seed::new(9));
    let mut problems = 0;
    for round in 0..60 {
        let database = open_raw(dir.path());
        let records: Vec<(sled::IVec, sled::IVec)> = database.iter().map(Result::unwrap).collect();
        for _ in 0..=generator.below(3) {
            // The schema and the counters decide whether it can be opened at all.
            let (key, value) = &records[generator.below(records.len())];
            if matches!(key[0], b'c' | b'm') || value.is_empty() {
                continue;
            }
            let mut value = value.to_vec();
            let place = generator.below(value.len());
            match generator.below(3) {
                0 => value[place] ^= 1 << generator.below(8),
                1 => value.truncate(place),
                _ => value.extend([0xff; 9]),
            }
            database.insert(key, value).unwrap();
        }
        let stray = [b"bcimrstwz".to_vec()[generator.below(9)], u8::try_from(round).unwrap(), 0, 0, 7];
        database.insert(stray, vec![1, 2, 3]).unwrap();
        database.flush().unwrap();
        drop(database);
        let report = SledStore::open(dir.path()).unwrap().check(&mut |_| {}).unwrap();
        assert!(report.findings_total >= report.findings.len() as u64 && !report.is_sound(), "round {round}");
        problems = problems.max(report.findings_total);
    }
    assert!(problems > 20, "{problems}");
}

#[test]
fn a_check_names_what_it_finds() {
    let dir = tempfile::tempdir().unwrap();
    let store = SledStore::open(dir.path()).unwrap();
    fill(&store);
    let report = sound(&store);
    assert_eq!((report.rollouts, report.attempts, report.blobs, report.resources, report.workers), (40, 36, 2, 1, 1));
    assert_eq!((report.unreferenced_blobs, report.missing_contents), (1, 40));
    drop(store);
    let database = open_raw(dir.path());
    let blob = database.scan_prefix(b"b").keys().map(Result::unwrap).next().unwrap();
    database.insert(blob, vec![1, b'x']).unwrap();
    let block = database.scan_prefix(b"s").keys().map(Result::unwrap).next().unwrap();
    database.remove(block).unwrap();
    database.remove(b"igrpo-00000-0002").unwrap();
    database.flush().unwrap();
    drop(database);
    let report = SledStore::open(dir.path()).unwrap().check(&mut |_| {}).unwrap();
    let found: Vec<String> =
        report.findings.iter().map(|finding| format!("{}: {}", finding.record, finding.problem)).collect();
    for expected in [
        "its content has another hash",
        "rollout #0: the first span of attempt 1 is missing",
        "rollout #2: the index does not lead from `grpo-00000-0002` to it",
    ] {
        assert!(found.iter().any(|line| line.contains(expected)), "{expected}\n{found:#?}");
    }
}
