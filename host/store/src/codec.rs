//! Keys and values on disk.
//!
//! A key is one byte for the kind of record and then an id or fixed-width big-endian numbers. A rollout and its attempts
//! are one record under the rollout's id: whatever happens to a rollout is one write, and there is no index to keep in
//! step. Spans stand in blocks under (rollout ordinal, attempt, first sequence), so that they lie on disk in the order
//! of time; the ordinal is shorter than the id, and neighbours in time are neighbours on disk.
//!
//! A value is a format byte and postcard. Postcard is positional, so *any* change to a recorded type of
//! `fulgurite-core` is a new format; the test `record_formats_are_pinned` fails on one, and the remedy is a new
//! [`SCHEMA_VERSION`](crate::SCHEMA_VERSION). JSON was rejected for its size and speed (token ids and log-probs are most
//! of a recording).
//!
//! sled moves whole nodes of up to 17 entries, and a node of more than 128 KiB becomes a separate file that its flush
//! does not cover. Values are therefore never longer than [`VALUE_BYTES_MAX`]: spans are packed into blocks up to that
//! size, and what is longer by itself is cut into fragments, the first under the record's own key and the others under
//! that key with a fragment number behind it.

use std::ops::ControlFlow;

use fulgurite_core::id::{AttemptNumber, RolloutId};
use fulgurite_core::span::Span;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Result, StoreError};
use crate::key_value::{Batch, KeyValue};

/// Longest value in the database in bytes: 17 of them stay below sled's limit for one node with room for the keys.
pub const VALUE_BYTES_MAX: usize = 4096;

/// Format byte of a value that stands in one piece.
const FORMAT_WHOLE: u8 = 1;
/// Format byte of the first of several fragments; their number follows as u32.
const FORMAT_FRAGMENTED: u8 = 2;
/// Fragments of one record; 64 GiB, and what lets the keys of fragments be told from others.
const FRAGMENTS_MAX: u32 = 1 << 24;
/// Bytes before the payload of the first fragment.
const FRAGMENT_HEADER_BYTES: usize = 5;

/// The kinds of record; the first byte of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// The schema's version: never in postcard, so that every version can read it.
    Schema = b'm',
    /// Counts of everything.
    Counters = b'c',
    /// Id -> rollout and its attempts.
    Rollout = b'r',
    /// Ordinal, attempt, first sequence -> block of spans.
    Spans = b's',
    /// Version -> resources.
    Resources = b't',
}

/// Bytes of a span block's key.
const SPANS_KEY_BYTES: usize = 1 + 8 + 4 + 8;

pub(crate) fn schema_key() -> Vec<u8> {
    vec![Kind::Schema as u8]
}

pub(crate) fn counters_key() -> Vec<u8> {
    vec![Kind::Counters as u8]
}

pub(crate) fn rollout_key(id: &RolloutId) -> Vec<u8> {
    [&[Kind::Rollout as u8], id.as_str().as_bytes()].concat()
}

/// Prefix of all span blocks of an attempt.
pub(crate) fn spans_prefix(ordinal: u64, attempt: AttemptNumber) -> Vec<u8> {
    [&[Kind::Spans as u8], ordinal.to_be_bytes().as_slice(), &attempt.0.to_be_bytes()].concat()
}

pub(crate) fn spans_key(ordinal: u64, attempt: AttemptNumber, first_sequence: u64) -> Vec<u8> {
    let mut key = spans_prefix(ordinal, attempt);
    key.extend(first_sequence.to_be_bytes());
    key
}

pub(crate) fn resources_key(version: u64) -> Vec<u8> {
    [&[Kind::Resources as u8], version.to_be_bytes().as_slice()].concat()
}

/// Whether a key is that of a second or later fragment.
fn is_fragment(key: &[u8]) -> bool {
    match key {
        // Ids have no zero byte, and no record has 2^24 fragments.
        [kind, .., 0, _, _, _] if *kind == Kind::Rollout as u8 => true,
        [kind, ..] if *kind == Kind::Spans as u8 => key.len() > SPANS_KEY_BYTES,
        _ => false,
    }
}

/// A key as people can read it: what errors name.
pub(crate) fn describe_key(key: &[u8]) -> String {
    let (kind, rest) = key.split_at_checked(1).unwrap_or((&[], &[]));
    let u64_at = |at: usize| rest.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes);
    let attempt = rest.get(8..12).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes);
    match kind {
        [byte] if *byte == Kind::Schema as u8 => "schema".to_owned(),
        [byte] if *byte == Kind::Counters as u8 => "counters".to_owned(),
        [byte] if *byte == Kind::Rollout as u8 => format!("rollout {}", String::from_utf8_lossy(rest)),
        [byte] if *byte == Kind::Spans as u8 => {
            format!("rollout #{} attempt {attempt} spans from {}", u64_at(0), u64_at(12))
        }
        [byte] if *byte == Kind::Resources as u8 => format!("resources version {}", u64_at(0)),
        _ => format!("unknown key {key:02x?}"),
    }
}

/// Encodes a record.
pub(crate) fn encode<T: Serialize>(record: &T) -> Result<Vec<u8>> {
    postcard::to_stdvec(record).map_err(|error| StoreError::Encode(error.to_string()))
}

/// Decodes a record and checks that nothing is left over.
fn decode<T: DeserializeOwned>(key: &[u8], bytes: &[u8]) -> Result<T> {
    match postcard::take_from_bytes(bytes) {
        Ok((record, [])) => Ok(record),
        Ok((_, rest)) => Err(corrupt(key, format!("{} bytes too many", rest.len()))),
        Err(error) => Err(corrupt(key, error.to_string())),
    }
}

pub(crate) fn corrupt(key: &[u8], detail: impl Into<String>) -> StoreError {
    StoreError::Corrupt { key: describe_key(key), detail: detail.into() }
}

/// Consecutive spans, encoded together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SpanBlock {
    pub(crate) first_sequence: u64,
    /// Postcard of `Vec<Span>`.
    pub(crate) payload: Vec<u8>,
}

/// Encodes spans into blocks of at most [`VALUE_BYTES_MAX`]; a longer span gets a block of its own.
pub(crate) fn encode_blocks(spans: &[Span]) -> Result<Vec<SpanBlock>> {
    // A list in postcard is its length as a varint (at most 2 bytes for what fits into a block) and then its elements.
    const ELEMENT_BYTES_MAX: usize = VALUE_BYTES_MAX - 1 - 2;
    let close = |first_sequence: u64, count: usize, elements: &mut Vec<u8>| -> Result<SpanBlock> {
        let mut payload = encode(&count)?;
        payload.append(elements);
        Ok(SpanBlock { first_sequence, payload })
    };
    let mut blocks = Vec::new();
    let mut elements = Vec::new();
    let mut count = 0_usize;
    let mut first_sequence = 0;
    for span in spans {
        let before = elements.len();
        elements = postcard::to_extend(span, elements).map_err(|error| StoreError::Encode(error.to_string()))?;
        if count > 0 && elements.len() > ELEMENT_BYTES_MAX {
            let mut last = elements.split_off(before);
            blocks.push(close(first_sequence, count, &mut elements)?);
            elements.append(&mut last);
            count = 0;
        }
        if count == 0 {
            first_sequence = span.sequence;
        }
        count += 1;
    }
    if count > 0 {
        blocks.push(close(first_sequence, count, &mut elements)?);
    }
    Ok(blocks)
}

/// Adds a record to a batch, in fragments where it is too long for one value.
pub(crate) fn put(batch: &mut Batch, key: Vec<u8>, payload: &[u8]) -> Result<()> {
    if payload.len() < VALUE_BYTES_MAX {
        let mut value = Vec::with_capacity(1 + payload.len());
        value.push(FORMAT_WHOLE);
        value.extend(payload);
        batch.push((key, value));
        return Ok(());
    }
    let (head, tail) = payload.split_at(VALUE_BYTES_MAX - FRAGMENT_HEADER_BYTES);
    let fragments = 1 + tail.len().div_ceil(VALUE_BYTES_MAX);
    let count = u32::try_from(fragments).ok().filter(|count| *count < FRAGMENTS_MAX);
    let count = count.ok_or_else(|| StoreError::Encode("a record is too long".to_owned()))?;
    let mut first = vec![FORMAT_FRAGMENTED];
    first.extend(count.to_be_bytes());
    first.extend(head);
    for (number, fragment) in (1_u32..).zip(tail.chunks(VALUE_BYTES_MAX)) {
        batch.push((fragment_key(&key, number), fragment.to_vec()));
    }
    batch.push((key, first));
    Ok(())
}

fn fragment_key(key: &[u8], number: u32) -> Vec<u8> {
    [key, number.to_be_bytes().as_slice()].concat()
}

/// Splits a stored value into its payload and the number of fragments.
fn parse<'a>(key: &[u8], value: &'a [u8]) -> Result<(&'a [u8], u32)> {
    match value {
        [FORMAT_WHOLE, payload @ ..] => Ok((payload, 1)),
        [FORMAT_FRAGMENTED, a, b, c, d, payload @ ..] => Ok((payload, u32::from_be_bytes([*a, *b, *c, *d]))),
        [format, ..] => Err(corrupt(key, format!("unknown format {format}"))),
        [] => Err(corrupt(key, "it is empty")),
    }
}

/// Reads one record.
pub(crate) fn get<T: DeserializeOwned>(database: &impl KeyValue, key: &[u8]) -> Result<Option<T>> {
    let Some(value) = database.get(key)? else { return Ok(None) };
    let (payload, fragments) = parse(key, &value)?;
    if fragments == 1 {
        return decode(key, payload).map(Some);
    }
    let mut payload = payload.to_vec();
    for number in 1..fragments {
        match database.get(&fragment_key(key, number))? {
            Some(fragment) => payload.extend(fragment),
            None => return Err(corrupt(key, format!("fragment {number} of {fragments} is missing"))),
        }
    }
    decode(key, &payload).map(Some)
}

/// A record whose fragments are being gathered by [`scan`].
struct Pending {
    key: Vec<u8>,
    payload: Vec<u8>,
    next: u32,
    fragments: u32,
}

/// Visits all records with a prefix in order of their keys.
pub(crate) fn scan<T: DeserializeOwned>(
    database: &impl KeyValue,
    prefix: &[u8],
    mut visit: impl FnMut(&[u8], T) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let mut pending: Option<Pending> = None;
    let incomplete = |pending: &Pending| {
        corrupt(&pending.key, format!("fragment {} of {} is missing", pending.next, pending.fragments))
    };
    database.scan(prefix, &mut |key, value| {
        if !is_fragment(key) {
            if let Some(pending) = &pending {
                return Err(incomplete(pending));
            }
            let (payload, fragments) = parse(key, value)?;
            if fragments == 1 {
                return visit(key, decode(key, payload)?);
            }
            pending = Some(Pending { key: key.to_vec(), payload: payload.to_vec(), next: 1, fragments });
            return Ok(ControlFlow::Continue(()));
        }
        // A fragment: of the record before it, or else what a longer earlier value of that record left behind.
        let Some(mut record) = pending.take() else { return Ok(ControlFlow::Continue(())) };
        if key != fragment_key(&record.key, record.next) {
            return Err(incomplete(&record));
        }
        record.payload.extend(value);
        record.next += 1;
        if record.next < record.fragments {
            pending = Some(record);
            return Ok(ControlFlow::Continue(()));
        }
        visit(&record.key, decode(&record.key, &record.payload)?)
    })?;
    pending.map_or(Ok(()), |pending| Err(incomplete(&pending)))
}
