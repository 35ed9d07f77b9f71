//! Writes the corpus of records when it is asked to: `FULGURITE_FUZZ_WRITE_CORPUS=1 cargo test -p fulgurite-fuzz`.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "shared with the store's tests, and a test fails by panicking"
)]

#[path = "../../../host/store/tests/support/samples.rs"]
mod samples;

use std::path::Path;

use fulgurite_core::id::AttemptNumber;
use fulgurite_core::record::{AttemptRecord, RolloutRecord};
use fulgurite_core::span::Span;
use fulgurite_core::state::RolloutState;
use fulgurite_store::format::{decode_rollout, decode_spans, encode_rollout, encode_spans, pack, unpack};
use fulgurite_store::{MemoryStore, RolloutStore, StoreError};
use samples::{body, key, outcome, reward, rollout_id, span, spans, spec};

/// One file for each kind of span, one for several, one for none.
fn span_files() -> Vec<(String, Vec<u8>)> {
    let key = key(&rollout_id(0), 1);
    let one = |number: u64| vec![Span { body: body(number, 3), ..span(&key, number) }];
    let mut files: Vec<_> = (0..16).map(|number| (format!("body-{number:02}"), one(number))).collect();
    files.push(("none".to_owned(), vec![]));
    files.push(("several".to_owned(), spans(&key, 0, 4)));
    files.into_iter().map(|(name, spans)| (name, encode_spans(&spans).unwrap())).collect()
}

fn record_files() -> Vec<(String, Vec<u8>)> {
    // The store makes the attempt, so that no field is forgotten here when one is added.
    let store = MemoryStore::new();
    store.enqueue(vec![spec(1)]).unwrap();
    let begun = store.begin_attempt(&rollout_id(1), 1, "").unwrap();
    let ended = AttemptRecord { outcome: Some(outcome()), rewards: vec![reward(-0.0), reward(1.5)], ..begun.clone() };
    let rollout = RolloutRecord { spec: spec(1), state: RolloutState::Running, attempt: None, ordinal: 7 };
    let newest = RolloutRecord { attempt: Some(AttemptNumber(2)), ..rollout.clone() };
    let files = [
        ("fresh", &rollout, vec![]),
        ("running", &rollout, vec![begun.clone()]),
        ("ended", &newest, vec![ended, begun]),
    ];
    files
        .into_iter()
        .map(|(name, rollout, attempts)| (name.to_owned(), encode_rollout(rollout, &attempts).unwrap()))
        .collect()
}

/// Values as they stand in the database: compressed, too short for it, and with nothing in them.
fn value_files() -> Vec<(String, Vec<u8>)> {
    let compressed = encode_spans(&spans(&key(&rollout_id(0), 1), 0, 4)).unwrap();
    let files = [("compressed", compressed), ("plain", b"plain".to_vec()), ("empty", vec![])];
    files.into_iter().map(|(name, record)| (name.to_owned(), pack(&record))).collect()
}

/// Whether bytes are read as what they are a sample of.
type Read = fn(&[u8]) -> Result<(), StoreError>;

#[test]
fn samples_are_what_the_corpus_holds() {
    let write = std::env::var_os("FULGURITE_FUZZ_WRITE_CORPUS").is_some();
    let targets: [(&str, _, Read); 3] = [
        ("span_decoding", span_files(), |bytes| decode_spans(bytes).map(drop)),
        ("record_decoding", record_files(), |bytes| decode_rollout(bytes).map(drop)),
        ("value_unpacking", value_files(), |bytes| unpack(bytes).map(drop)),
    ];
    for (target, files, read) in targets {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
        for (name, bytes) in files {
            let path = folder.join(&name);
            if write {
                std::fs::write(&path, &bytes).unwrap();
            }
            assert!(path.is_file(), "{} is missing", path.display());
            // The bytes of the tree may be older than those of today, as long as they are read.
            let kept = std::fs::read(&path).unwrap();
            let read = read(&kept);
            assert!(read.is_ok(), "{}: {read:?}; FULGURITE_FUZZ_WRITE_CORPUS=1 writes it again", path.display());
        }
    }
}
