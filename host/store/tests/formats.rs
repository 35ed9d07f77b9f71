//! What is on disk: every record comes back, none changes its format unnoticed, and damage is an error.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "support/samples.rs"]
mod samples;

use fulgurite_core::id::{AttemptNumber, ContentHash, PolicyVersion};
use fulgurite_core::llm::{FinishReason, KeptTokens, TokenBias};
use fulgurite_core::record::{AttemptRecord, RolloutRecord, WorkerRecord};
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_core::span::{Span, SpanBody};
use fulgurite_core::state::{AttemptState, RolloutState};
use fulgurite_store::{RolloutQuery, RolloutStore, SCHEMA_VERSION, SledStore, StoreError};
use proptest::prelude::*;
use samples::{body, fork, key, outcome, reward, rollout_id, span, spans, spec};

/// A span of every kind of body.
fn all_spans() -> Vec<Span> {
    let key = key(&rollout_id(0), 1);
    (0..16).map(|number| Span { body: body(number, 10), ..span(&key, number) }).collect()
}

fn rollout_record() -> RolloutRecord {
    RolloutRecord {
        spec: fork(1, &key(&rollout_id(0), 1), 3),
        state: RolloutState::Requeuing,
        attempt: Some(AttemptNumber(2)),
        ordinal: 7,
    }
}

fn attempt_record() -> AttemptRecord {
    AttemptRecord {
        key: key(&rollout_id(1), 2),
        state: AttemptState::Timeout,
        start_unix_ns: 1,
        end_unix_ns: 2,
        outcome: Some(outcome()),
        rewards: vec![reward(-0.0)],
        spans: 3,
        guest_cpu_us: 4,
        worker: "worker".to_owned(),
        not_forkable: Some("it called out".to_owned()),
    }
}

fn worker() -> WorkerRecord {
    WorkerRecord {
        id: "worker".to_owned(),
        process_id: 7,
        start_unix_ns: 1,
        heartbeat_unix_ns: u64::MAX,
        attempts: 300,
    }
}

#[test]
fn every_record_comes_back() {
    let bytes = postcard::to_stdvec(&all_spans()).unwrap();
    assert_eq!(postcard::from_bytes::<Vec<Span>>(&bytes).unwrap(), all_spans());
    let bytes = postcard::to_stdvec(&rollout_record()).unwrap();
    assert_eq!(postcard::from_bytes::<RolloutRecord>(&bytes).unwrap(), rollout_record());
    let bytes = postcard::to_stdvec(&attempt_record()).unwrap();
    assert_eq!(postcard::from_bytes::<AttemptRecord>(&bytes).unwrap(), attempt_record());
}

/// Postcard knows no field names: a record type that changes cannot read what was written before. If this test fails
/// because a record of `fulgurite-core` was changed on purpose, raise `SCHEMA_VERSION` and then put the new hash here.
#[test]
fn record_formats_are_pinned() {
    let bytes = postcard::to_stdvec(&(all_spans(), rollout_record(), attempt_record(), worker())).unwrap();
    let pinned = (SCHEMA_VERSION, ContentHash::of(&bytes).to_string());
    // The bytes of schema 2: what is new in 3 to 5 are cases that these records do not use.
    assert_eq!(pinned, (5, "1d35052a6255cc1f9669e59848fd11a61093e567f0c26b98b907cab446d9ff21".to_owned()));
}

/// A store with one finished rollout of three attempts, and its directory.
fn filled() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let store = SledStore::open(dir.path()).unwrap();
    store.enqueue(vec![spec(0), spec(1)]).unwrap();
    let key = store.begin_attempt(&rollout_id(0), 1, "").unwrap().key;
    store.append_spans(&key, &spans(&key, 0, 60)).unwrap();
    store.publish_template(0, "prompt", &"text".repeat(5_000)).unwrap();
    dir
}

/// Folder of the current database.
fn data(dir: &std::path::Path) -> std::path::PathBuf {
    dir.join(std::fs::read_to_string(dir.join("current")).unwrap().trim_end())
}

/// Changes values behind the store's back.
fn tamper(dir: &std::path::Path, change: impl Fn(&[u8], &[u8]) -> Option<Vec<u8>>) -> usize {
    let database = open_raw(&data(dir));
    let mut changed = 0;
    for entry in database.iter() {
        let (key, value) = entry.unwrap();
        if let Some(value) = change(&key, &value) {
            database.insert(key, value).unwrap();
            changed += 1;
        }
    }
    database.flush().unwrap();
    changed
}

/// The store's threads may hold the file for a moment after it was closed; opening the store waits for that.
fn open_raw(dir: &std::path::Path) -> sled::Db {
    loop {
        match sled::open(dir) {
            Ok(database) => return database,
            Err(sled::Error::Io(_)) => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_damaged_record_is_an_error_that_names_it() {
    let dir = filled();
    assert!(tamper(dir.path(), |key, value| (key[0] == b's').then(|| value[..value.len() - 1].to_vec())) > 0);
    let store = SledStore::open(dir.path()).unwrap();
    let error = store.spans(&key(&rollout_id(0), 1)).unwrap_err();
    assert!(error.to_string().starts_with("the record `rollout #0 attempt 1 spans from 0` is damaged"), "{error}");
    assert!(!error.is_retryable());
    // The rest is still there.
    assert_eq!(store.rollouts(&RolloutQuery::default()).unwrap().len(), 2);
    assert_eq!(store.attempts(&rollout_id(0)).unwrap()[0].spans, 60);
}

#[test]
fn every_kind_of_damage_is_an_error() {
    type Change = fn(&[u8]) -> Vec<u8>;
    let changes: [Change; 5] = [
        |_| vec![],
        |_| vec![9],
        |_| vec![2, 0, 0, 0, 3],
        |value| [value, &[0]].concat(),
        |value| vec![value[0]; value.len()],
    ];
    for kind in *b"cirst" {
        for change in changes {
            let dir = filled();
            tamper(dir.path(), |key, value| (key[0] == kind).then(|| change(value)));
            let read = || -> Result<(), StoreError> {
                let store = SledStore::open(dir.path())?;
                store.rollout(&rollout_id(0))?;
                store.rollouts(&RolloutQuery::default())?;
                store.attempts(&rollout_id(0))?;
                store.spans(&key(&rollout_id(0), 1))?;
                store.template("prompt", Some(1))?;
                Ok(())
            };
            let error = read().unwrap_err();
            assert!(matches!(error, StoreError::Corrupt { .. }), "{}: {error}", char::from(kind));
        }
    }
}

#[test]
fn a_missing_fragment_is_an_error() {
    let dir = filled();
    let database = open_raw(&data(dir.path()));
    let fragment = database.scan_prefix(b"t").keys().map(Result::unwrap).find(|key| key.len() > 9).unwrap();
    database.remove(fragment).unwrap();
    database.flush().unwrap();
    drop(database);
    let store = SledStore::open(dir.path()).unwrap();
    let error = store.template("prompt", Some(1)).unwrap_err();
    assert_eq!(error.to_string(), "the record `resources version 1` is damaged: fragment 1 of 5 is missing");
}

#[test]
fn a_store_of_schema_2_is_read_as_it_is_and_marked_before_it_is_written_to() {
    let dir = filled();
    assert_eq!(tamper(dir.path(), |key, _| (key == b"m").then(|| 2_u32.to_be_bytes().to_vec())), 1);
    let store = SledStore::open(dir.path()).unwrap();
    assert_eq!(store.spans(&key(&rollout_id(0), 1)).unwrap(), spans(&key(&rollout_id(0), 1), 0, 60));
    assert!(store.check(&mut |_| {}).unwrap().is_sound());
    drop(store);
    let marked = open_raw(&data(dir.path())).get(b"m").unwrap().unwrap();
    assert_eq!(*marked, SCHEMA_VERSION.to_be_bytes());
}

/// What schema 3 added, in records and on disk.
#[test]
fn calls_with_all_of_sampling_and_several_versions_come_back() {
    let key = key(&rollout_id(0), 1);
    let mut span = Span { body: body(1, 10), ..span(&key, 0) };
    let SpanBody::Llm(call) = &mut span.body else { panic!() };
    call.sampling.repetition_penalty = 1.5;
    call.sampling.logit_bias = vec![TokenBias { token: 3, bias: -100.0 }];
    call.sampling.stop_token_ids = vec![u32::MAX];
    let completion = std::sync::Arc::make_mut(call.result.as_mut().unwrap());
    let tokens = completion.tokens.as_mut().unwrap();
    tokens.token_versions = vec![PolicyVersion(9), PolicyVersion(10)];
    // JSON has no infinity.
    tokens.log_probs = vec![-0.5, -0.25];
    let bytes = postcard::to_stdvec(&span).unwrap();
    assert_eq!(postcard::from_bytes::<Span>(&bytes).unwrap(), span);
    let json = serde_json::to_string(&span).unwrap();
    assert_eq!(serde_json::from_str::<Span>(&json).unwrap(), span);
}

/// What schema 4 added: with several versions and without.
#[test]
fn calls_that_were_left_and_kept_tokens_come_back() {
    let key = key(&rollout_id(0), 1);
    for token_versions in [vec![], vec![PolicyVersion(9), PolicyVersion(10)]] {
        let mut span = Span { body: body(1, 10), ..span(&key, 0) };
        let SpanBody::Llm(call) = &mut span.body else { panic!() };
        let completion = std::sync::Arc::make_mut(call.result.as_mut().unwrap());
        completion.finish_reason = FinishReason::Cancelled;
        let tokens = completion.tokens.as_mut().unwrap();
        tokens.token_versions = token_versions;
        tokens.log_probs = vec![-0.5, -0.25];
        tokens.kept.push(&[3, 70_000]);
        tokens.kept.push(&[]);
        let bytes = postcard::to_stdvec(&span).unwrap();
        assert_eq!(postcard::from_bytes::<Span>(&bytes).unwrap(), span);
        let json = serde_json::to_string(&span).unwrap();
        assert_eq!(serde_json::from_str::<Span>(&json).unwrap(), span);
        // The record of one that kept all says nothing of it.
        let SpanBody::Llm(call) = &mut span.body else { panic!() };
        std::sync::Arc::make_mut(call.result.as_mut().unwrap()).tokens.as_mut().unwrap().kept = KeptTokens::default();
        assert!(!serde_json::to_string(&span).unwrap().contains("kept"));
    }
}

/// What schema 5 added: the model beside the policy that drew a call, with and without what schemas 3 and 4 added.
#[test]
fn calls_of_a_named_model_come_back() {
    let key = key(&rollout_id(0), 1);
    for is_plain in [true, false] {
        let mut span = Span { body: body(1, 10), ..span(&key, 0) };
        let SpanBody::Llm(call) = &mut span.body else { panic!() };
        let tokens = std::sync::Arc::make_mut(call.result.as_mut().unwrap()).tokens.as_mut().unwrap();
        tokens.model = Some("writing".into());
        tokens.log_probs = vec![-0.5, -0.25];
        if !is_plain {
            tokens.token_versions = vec![PolicyVersion(9), PolicyVersion(10)];
            tokens.kept.push(&[3, 70_000]);
            tokens.kept.push(&[]);
        }
        let bytes = postcard::to_stdvec(&span).unwrap();
        assert_eq!(postcard::from_bytes::<Span>(&bytes).unwrap(), span);
        let json = serde_json::to_string(&span).unwrap();
        assert_eq!(serde_json::from_str::<Span>(&json).unwrap(), span);
        // The policy's calls say nothing of it.
        let SpanBody::Llm(call) = &mut span.body else { panic!() };
        std::sync::Arc::make_mut(call.result.as_mut().unwrap()).tokens.as_mut().unwrap().model = None;
        assert!(!serde_json::to_string(&span).unwrap().contains("\"model\""));
    }
}

#[test]
fn another_schema_is_refused() {
    let dir = filled();
    tamper(dir.path(), |key, _| (key == b"m").then(|| 9_u32.to_be_bytes().to_vec()));
    let error = SledStore::open(dir.path()).err().unwrap();
    let expected = format!("the store in {} has schema 9, and this version reads schema 5", dir.path().display());
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_foreign_database_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let database = sled::open(dir.path()).unwrap();
    database.insert("key", "value").unwrap();
    drop(database);
    let error = SledStore::open(dir.path()).err().unwrap();
    assert!(matches!(error, StoreError::NotAStore { .. }), "{error}");
    assert_eq!(open_raw(dir.path()).len(), 1);
}

#[test]
fn a_store_is_open_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = SledStore::open(dir.path()).unwrap();
    let error = SledStore::open(dir.path()).err().unwrap();
    assert_eq!(error.to_string(), format!("the store in {} is in use by another process", dir.path().display()));
    assert!(error.is_retryable());
    drop(store);
    SledStore::open(dir.path()).unwrap();
}

#[test]
fn a_path_that_is_no_directory_is_an_error() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = SledStore::open(file.path()).err().unwrap();
    assert!(matches!(error, StoreError::Io { action: "create", .. }), "{error}");
}

#[test]
fn values_stay_small_enough_for_one_file() {
    let dir = filled();
    let store = SledStore::open(dir.path()).unwrap();
    let second = store.begin_attempt(&rollout_id(1), 1, "").unwrap().key;
    // Blocks of every size, next to each other.
    for from in 0..400 {
        store.append_spans(&second, &spans(&second, from * 3, 3)).unwrap();
    }
    drop(store);
    let blobs = std::fs::read_dir(data(dir.path()).join("blobs")).unwrap().count();
    assert_eq!(blobs, 0, "sled's flush does not cover files of their own");
}

#[test]
fn damage_to_the_file_never_loses_anything_silently() {
    let mut generator = Generator::new(Seed::new(5));
    let mut refused = 0;
    for _ in 0..60 {
        let dir = filled();
        let file = data(dir.path()).join("db");
        let mut bytes = std::fs::read(&file).unwrap();
        let used = bytes.iter().rposition(|byte| *byte != 0).unwrap();
        for _ in 0..=generator.below(8) {
            let place = generator.below(used);
            bytes[place] = generator.below(256).try_into().unwrap();
        }
        std::fs::write(&file, bytes).unwrap();
        let read = || -> Result<(usize, usize, bool), StoreError> {
            let store = SledStore::open(dir.path())?;
            let rollouts = store.rollouts(&RolloutQuery::default())?.len();
            let key = key(&rollout_id(0), 1);
            Ok((rollouts, store.spans(&key)?.len(), store.template("prompt", Some(1))?.is_some()))
        };
        match read() {
            Ok(found) => assert_eq!(found, (2, 60, true)),
            Err(StoreError::Damaged { .. } | StoreError::Corrupt { .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(refused > 40, "{refused}");
}

#[test]
fn a_store_that_lost_its_database_is_not_taken_for_a_new_one() {
    let dir = filled();
    std::fs::remove_file(data(dir.path()).join("db")).unwrap();
    for entry in std::fs::read_dir(data(dir.path())).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("snap") {
            std::fs::remove_file(path).unwrap();
        }
    }
    for _ in 0..2 {
        let error = SledStore::open(dir.path()).err().unwrap();
        let expected =
            format!("the store in {} is damaged: only 0 of 4 acknowledged commits are left", dir.path().display());
        assert_eq!(error.to_string(), expected);
    }
    std::fs::write(dir.path().join("acknowledged"), [7; 16]).unwrap();
    let error = SledStore::open(dir.path()).err().unwrap();
    assert!(error.to_string().ends_with("its file `acknowledged` is unreadable"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the bytes are, reading them ends, and with an error or with spans.
    #[test]
    fn random_damage_to_spans_never_panics(cut in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = postcard::to_stdvec(&all_spans()).unwrap();
        let place = at.index(bytes.len());
        bytes[place] = byte;
        let _ = postcard::from_bytes::<Vec<Span>>(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        prop_assert!(postcard::from_bytes::<Vec<Span>>(&bytes).is_err());
    }
}
