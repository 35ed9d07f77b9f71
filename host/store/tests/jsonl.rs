//! Export and import: nothing is lost, and every line that is wrong is named.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "support/samples.rs"]
#[allow(dead_code, reason = "shared with tests that use more of it")]
mod samples;

use std::sync::Arc;

use fulgurite_core::id::AttemptKey;
use fulgurite_core::record::WorkerRecord;
use fulgurite_core::span::SpanBody;
use fulgurite_core::state::{AttemptState, RolloutState};
use fulgurite_store::{AttemptFinish, MemoryStore, PruneRule, RolloutStore, SledStore, StoreError};
use samples::{body, fork, key, outcome, reward, rollout_id, spans, spec};

fn finish(key: &AttemptKey, from: u64, count: u64, state: RolloutState) -> AttemptFinish {
    AttemptFinish {
        key: key.clone(),
        state: if state == RolloutState::Succeeded { AttemptState::Succeeded } else { AttemptState::Failed },
        outcome: outcome(),
        // Numbers whose last digit readers get wrong.
        rewards: vec![reward(0.1 + 0.2), reward(5e-324), reward(1.797_693_134_862_315_5e308), reward(-0.0)],
        end_unix_ns: u64::MAX,
        guest_cpu_us: 1,
        not_forkable: Some("it called out".to_owned()),
        spans: spans(key, from, count).into(),
        rollout_state: state,
    }
}

/// A store with something of everything.
fn fill(store: &dyn RolloutStore) {
    let blobs =
        vec!["item ä \u{1f980} \" \\ \u{0}".as_bytes().to_vec(), vec![0xff, 0, 0xfe], vec![b'x'; 20_000], vec![]];
    let item = store.put_blobs(blobs).unwrap()[0];
    let mut specs: Vec<_> = (0..12).map(spec).collect();
    for spec in &mut specs {
        let spec = Arc::make_mut(spec);
        spec.item = item;
        spec.sampling.temperature = 0.7;
    }
    Arc::make_mut(&mut specs[3]).sampling.min_p = f32::NAN;
    store.enqueue(specs).unwrap();
    for index in 0..9 {
        let key = store.begin_attempt(&rollout_id(index), u64::MAX, "worker").unwrap().key;
        store.mark_running(&key).unwrap();
        if index == 4 {
            store.finish_attempts(vec![finish(&key, 0, 3, RolloutState::Requeuing)]).remove(0).unwrap();
            store.begin_attempt(&rollout_id(index), 1, "other").unwrap();
        } else if index == 5 {
            store.append_spans(&key, &spans(&key, 0, 7)).unwrap();
        } else {
            // All kinds of bodies, with log-probs that are not finite.
            let mut list = spans(&key, 0, 40);
            for (number, span) in (0..).zip(&mut list) {
                span.body = body(number, 10);
            }
            list[8].body = SpanBody::Reward(reward(f64::NAN));
            list[9].body = SpanBody::Reward(reward(f64::from_bits(0x7ff8_0000_0000_0001)));
            store.append_spans(&key, &list).unwrap();
            store.finish_attempts(vec![finish(&key, 40, 70, RolloutState::Succeeded)]).remove(0).unwrap();
        }
    }
    let ancestor = key(&rollout_id(0), 1);
    store.enqueue(vec![fork(20, &ancestor, 33)]).unwrap();
    let forked = store.begin_attempt(&rollout_id(20), 1, "").unwrap().key;
    store.append_spans(&forked, &spans(&forked, 33, 5)).unwrap();
    for (after, name, text) in [(0, "a", "first"), (1, "b", "second"), (1, "a", "on another branch")] {
        store.publish_template(after, name, text).unwrap();
    }
    for id in ["worker", "other"] {
        let (start_unix_ns, heartbeat_unix_ns) = (1, u64::MAX);
        let worker = WorkerRecord { id: id.to_owned(), process_id: 7, start_unix_ns, heartbeat_unix_ns, attempts: 3 };
        store.put_worker(worker).unwrap();
    }
    // A gap in the ordinals.
    store.cancel(&rollout_id(9), 4).unwrap();
    store.prune(&PruneRule { states: vec![RolloutState::Cancelled], ..PruneRule::default() }).unwrap();
}

fn exported(store: &dyn RolloutStore) -> String {
    let mut text = vec![];
    let report = store.export(&mut text, &mut |_| {}).unwrap();
    let text = String::from_utf8(text).unwrap();
    assert_eq!((report.lines, report.bytes), (text.lines().count() as u64, text.len() as u64));
    text
}

fn import(dir: &std::path::Path, text: &str) -> Result<SledStore, StoreError> {
    SledStore::import(dir, &mut text.as_bytes(), "a.jsonl", &mut |_| {})?;
    SledStore::open(dir)
}

#[test]
fn what_is_imported_is_exported_with_the_same_bytes() {
    let store = MemoryStore::new();
    fill(&store);
    let text = exported(&store);
    let dir = tempfile::tempdir().unwrap();
    let again = import(dir.path(), &text).unwrap();
    assert!(exported(&again) == text);
    let report = again.check(&mut |_| {}).unwrap();
    assert!(report.is_sound(), "{:?}", report.findings);
    // What was live and had recorded nothing is not on disk, so it is not exported.
    let (mut got, mut expected) = (again.statistics().unwrap(), store.statistics().unwrap());
    *expected.rollouts.get_mut(&RolloutState::Preparing).unwrap() -= 1;
    *expected.rollouts.entry(RolloutState::Requeuing).or_default() += 1;
    expected.attempts -= 1;
    (expected.span_bytes, expected.disk_bytes, expected.syncs) = (got.span_bytes, got.disk_bytes, got.syncs);
    assert_eq!(std::mem::take(&mut got), expected);
    let forked = key(&rollout_id(20), 1);
    assert_eq!(again.spans(&forked).unwrap(), store.spans(&forked).unwrap());
    assert_eq!(again.trajectory(&forked).unwrap().len(), 38);
    assert_eq!(again.templates(3).unwrap(), store.templates(3).unwrap());
    assert_eq!(again.workers().unwrap(), store.workers().unwrap());
    // It goes on where the other one would.
    assert_eq!(again.enqueue(vec![spec(50)]).unwrap()[0].record().ordinal, 13);
    let error = SledStore::import(dir.path(), &mut text.as_bytes(), "a.jsonl", &mut |_| {}).unwrap_err();
    assert!(matches!(error, StoreError::InUse { .. }), "{error}");
    drop(again);
    let error = import(dir.path(), &text).err().unwrap();
    assert!(matches!(error, StoreError::NotEmpty { .. }), "{error}");
}

#[test]
fn an_empty_store_round_trips_and_may_be_imported_into() {
    let text = exported(&MemoryStore::new());
    assert_eq!(text.lines().count(), 2);
    let dir = tempfile::tempdir().unwrap();
    drop(SledStore::open(dir.path()).unwrap());
    for _ in 0..2 {
        assert_eq!(exported(&import(dir.path(), &text).unwrap()), text);
    }
}

#[test]
fn only_what_json_cannot_say_carries_its_bytes() {
    let store = MemoryStore::new();
    fill(&store);
    let text = exported(&store);
    let exact: Vec<&str> = text.lines().filter(|line| line.contains(r#""exact":""#)).collect();
    assert!(exact.iter().any(|line| line.starts_with(r#"{"rollout""#) && line.contains(r#""min_p":null"#)));
    assert!(exact.iter().any(|line| line.contains(r#""value":null"#)));
    assert!(exact.len() * 5 < text.lines().count(), "{} of {}", exact.len(), text.lines().count());
}

#[test]
fn every_line_that_is_wrong_is_named_and_leaves_the_directory_as_it_was() {
    let store = MemoryStore::new();
    fill(&store);
    let lines: Vec<String> = exported(&store).lines().map(str::to_owned).collect();
    let at = |start: &str, nth: usize| {
        lines.iter().enumerate().filter(|(_, line)| line.starts_with(start)).map(|(at, _)| at).nth(nth).unwrap()
    };
    // The sixth rollout runs, so that it has no reward that would need `exact`.
    let (first, second, rollout) = (at(r#"{"rollout""#, 0), at(r#"{"rollout""#, 1), at(r#"{"rollout""#, 5));
    let (blob, span) = (at(r#"{"blob""#, 0), at(r#"{"span""#, 5));
    let exact = lines.iter().position(|line| line.starts_with(r#"{"span""#) && line.contains(r#""exact":"#)).unwrap();
    let replaced = |at: usize, from: &str, to: &str| {
        let mut changed = lines.clone();
        assert!(changed[at].contains(from), "{}", changed[at]);
        changed[at] = changed[at].replacen(from, to, 1);
        changed
    };
    let without = |at: usize| {
        let mut changed = lines.clone();
        changed.remove(at);
        changed
    };
    let twice = |at: usize| {
        let mut changed = lines.clone();
        changed.insert(at, lines[at].clone());
        changed
    };
    let end = lines.len() - 1;
    let cases: Vec<(Vec<String>, usize, &str)> = vec![
        (vec![], 1, "cut off"),
        (vec!["not json".to_owned()], 1, "expected"),
        (without(0), 1, "the first line must be the header"),
        (twice(0), 2, "there is a header already"),
        (
            replaced(0, "\"version\":1", "\"version\":9"),
            1,
            "version 9 of schema 5; this reads `fulgurite-store` version 1",
        ),
        (lines[..span].to_vec(), span + 1, "the file ends before its `end` line"),
        (replaced(end, "lines\":", "lines\":1"), end + 1, "lines have come before it"),
        (twice(end), end + 2, "nothing may follow"),
        (without(1), 2, "version 1 must come next, not 2"),
        (replaced(2, "\"after\":1", "\"after\":7"), 3, "there is no version 7 before it"),
        (twice(blob), blob + 2, "already"),
        (replaced(blob, "\"text\":\"", "\"text\":\"y"), blob + 1, "another hash"),
        (replaced(rollout, "\"id\":\"", "\"id\":\"../"), rollout + 1, "is not a valid id"),
        (replaced(rollout, "\"state\":\"", "\"state\":\"un"), rollout + 1, "unrunning"),
        (replaced(rollout, "\"stage\":", "\"stages\":"), rollout + 1, "stage"),
        (replaced(rollout, "\"state\":\"running\"", "\"state\":\"failed\""), rollout + 1, "its newest attempt is"),
        (without(span), span + 1, "must come next, not span"),
        (twice(span), span + 2, "must come next, not span"),
        (replaced(span, "\"sequence\":", "\"sequence\":1"), span + 1, "must come next, not span"),
        (without(second - 1), second, "must come first"),
        (without(first), first + 1, "a span must follow its rollout"),
        (replaced(rollout, "\"ordinal\":5", "\"ordinal\":0"), rollout + 1, "comes after"),
        (replaced(exact, "\"name\":\"", "\"name\":\"x"), exact + 1, "take `exact` out"),
    ];
    for (changed, line, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        let text = changed.join("\n") + if changed.is_empty() { "" } else { "\n" };
        let error = import(dir.path(), &text).err().unwrap().to_string();
        assert!(error.starts_with(&format!("a.jsonl line {line}: ")), "line {line}, {expected}: {error}");
        assert!(error.contains(expected), "{expected}: {error}");
        // What failed is not taken for a store.
        let statistics = SledStore::open(dir.path()).unwrap().statistics().unwrap();
        assert_eq!((statistics.rollouts_total(), statistics.blobs), (0, 0));
    }
}

#[test]
fn a_reader_that_fails_is_an_error() {
    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let error = MemoryStore::new().export(&mut Full, &mut |_| {}).unwrap_err();
    assert_eq!(error.to_string(), "the export cannot be written");
    // Text that is not UTF-8.
    let dir = tempfile::tempdir().unwrap();
    let error = SledStore::import(dir.path(), &mut &[0xff, 0xfe, b'\n'][..], "b", &mut |_| {}).unwrap_err();
    assert!(error.to_string().starts_with("b line 1: it cannot be read"), "{error}");
}
