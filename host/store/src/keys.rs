//! The keys of the database.
//!
//! A key is one byte for the kind of record and then fixed-width big-endian numbers, a hash, or an id. Rollouts stand under
//! their ordinal, so that they lie on disk in the order of time, listing them in that order is one scan, and neighbours in
//! time are neighbours on disk; an index leads from the id to the ordinal, and because neither ever changes there is
//! nothing to keep in step.

use fulgurite_core::id::{AttemptNumber, ContentHash, RolloutId};

/// The kinds of record; the first byte of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Content hash -> bytes.
    Blob = b'b',
    /// Counts of everything.
    Counters = b'c',
    /// Id -> ordinal.
    Index = b'i',
    /// The schema's version: never in postcard, so that every version can read it.
    Schema = b'm',
    /// Ordinal -> rollout and its attempts.
    Rollout = b'r',
    /// Ordinal, attempt, first sequence -> block of spans.
    Spans = b's',
    /// Version -> resources.
    Resources = b't',
    /// Id -> worker.
    Worker = b'w',
}

impl Kind {
    /// Every kind, in the order of the keys.
    pub(crate) const ALL: [Self; 8] = [
        Self::Blob,
        Self::Counters,
        Self::Index,
        Self::Schema,
        Self::Rollout,
        Self::Spans,
        Self::Resources,
        Self::Worker,
    ];

    /// The kind of a key.
    pub(crate) fn of(key: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| key.first() == Some(&(*kind as u8)))
    }

    /// Bytes of a key of this kind; `None` where they differ. Kinds with ids as keys never need fragments.
    const fn key_bytes(self) -> Option<usize> {
        match self {
            Self::Counters | Self::Schema => Some(1),
            Self::Rollout | Self::Resources => Some(1 + 8),
            Self::Spans => Some(1 + 8 + 4 + 8),
            Self::Blob => Some(1 + 32),
            Self::Index | Self::Worker => None,
        }
    }
}

pub(crate) fn schema_key() -> Vec<u8> {
    vec![Kind::Schema as u8]
}

pub(crate) fn counters_key() -> Vec<u8> {
    vec![Kind::Counters as u8]
}

fn with_number(kind: Kind, number: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(21);
    key.push(kind as u8);
    key.extend(number.to_be_bytes());
    key
}

pub(crate) fn rollout_key(ordinal: u64) -> Vec<u8> {
    with_number(Kind::Rollout, ordinal)
}

pub(crate) fn index_key(id: &RolloutId) -> Vec<u8> {
    [&[Kind::Index as u8], id.as_str().as_bytes()].concat()
}

/// Prefix of all span blocks of a rollout.
pub(crate) fn rollout_spans_prefix(ordinal: u64) -> Vec<u8> {
    with_number(Kind::Spans, ordinal)
}

/// Prefix of all span blocks of an attempt.
pub(crate) fn spans_prefix(ordinal: u64, attempt: AttemptNumber) -> Vec<u8> {
    let mut key = rollout_spans_prefix(ordinal);
    key.extend(attempt.0.to_be_bytes());
    key
}

pub(crate) fn spans_key(ordinal: u64, attempt: AttemptNumber, first_sequence: u64) -> Vec<u8> {
    let mut key = spans_prefix(ordinal, attempt);
    key.extend(first_sequence.to_be_bytes());
    key
}

/// Ordinal, attempt and first sequence of a span block.
pub(crate) fn spans_key_parts(key: &[u8]) -> Option<(u64, AttemptNumber, u64)> {
    let attempt = key.get(9..13)?.try_into().ok().map(u32::from_be_bytes)?;
    Some((number_at(key, 1)?, AttemptNumber(attempt), number_at(key, 13)?))
}

pub(crate) fn resources_key(version: u64) -> Vec<u8> {
    with_number(Kind::Resources, version)
}

pub(crate) fn blob_key(hash: &ContentHash) -> Vec<u8> {
    [&[Kind::Blob as u8], hash.as_bytes().as_slice()].concat()
}

pub(crate) fn worker_key(id: &str) -> Vec<u8> {
    [&[Kind::Worker as u8], id.as_bytes()].concat()
}

/// The number after the kind, or after what precedes it.
pub(crate) fn number_at(key: &[u8], at: usize) -> Option<u64> {
    key.get(at..at + 8)?.try_into().ok().map(u64::from_be_bytes)
}

/// Key of the second or a later fragment of a record.
pub(crate) fn fragment_key(key: &[u8], number: u32) -> Vec<u8> {
    [key, number.to_be_bytes().as_slice()].concat()
}

/// Whether a key is that of a second or later fragment.
pub(crate) fn is_fragment(key: &[u8]) -> bool {
    Kind::of(key).and_then(Kind::key_bytes).is_some_and(|bytes| key.len() > bytes)
}

/// The text after the kind.
pub(crate) fn text(key: &[u8]) -> String {
    String::from_utf8_lossy(key.get(1..).unwrap_or_default()).into_owned()
}

/// A key as people can read it: what errors name.
pub(crate) fn describe(key: &[u8]) -> String {
    let number = || number_at(key, 1).map_or_else(|| "?".to_owned(), |number| number.to_string());
    match Kind::of(key) {
        Some(Kind::Schema) => "schema".to_owned(),
        Some(Kind::Counters) => "counters".to_owned(),
        Some(Kind::Index) => format!("rollout {}", text(key)),
        Some(Kind::Rollout) => format!("rollout #{}", number()),
        Some(Kind::Spans) => match spans_key_parts(key) {
            Some((ordinal, attempt, first)) => format!("rollout #{ordinal} attempt {attempt} spans from {first}"),
            None => format!("spans {key:02x?}"),
        },
        Some(Kind::Resources) => format!("resources version {}", number()),
        Some(Kind::Worker) => format!("worker {}", text(key)),
        Some(Kind::Blob) => {
            let hash = key.iter().skip(1).take(32).fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
            format!("blob {hash}")
        }
        None => format!("unknown key {key:02x?}"),
    }
}
