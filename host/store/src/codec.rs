//! Values on disk.
//!
//! A rollout and its attempts are one record: whatever happens to a rollout is one write. Spans stand in blocks under
//! (rollout ordinal, attempt, first sequence). [`keys`](crate::keys) says how records are named.
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

use fulgurite_core::span::Span;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Result, StoreError};
use crate::key_value::{Batch, KeyRange, KeyValue};
use crate::keys::{self, fragment_key, is_fragment};

/// Longest value in the database in bytes: 17 of them stay below sled's limit for one node with room for the keys.
pub const VALUE_BYTES_MAX: usize = 4096;

/// Format byte of a value that stands in one piece.
const FORMAT_WHOLE: u8 = 1;
/// Format byte of the first of several fragments; their number follows as u32.
const FORMAT_FRAGMENTED: u8 = 2;
/// Fragments of one record; 64 GiB, and what lets the keys of fragments be told from others.
const FRAGMENTS_MAX: u32 = 1 << 24;
/// Bytes before the payload of the first fragment.
pub(crate) const FRAGMENT_HEADER_BYTES: usize = 5;

/// Encodes a record.
pub(crate) fn encode<T: Serialize>(record: &T) -> Result<Vec<u8>> {
    postcard::to_stdvec(record).map_err(|error| StoreError::Encode(error.to_string()))
}

/// Decodes a record and checks that nothing is left over.
pub(crate) fn decode<T: DeserializeOwned>(key: &[u8], bytes: &[u8]) -> Result<T> {
    match postcard::take_from_bytes(bytes) {
        Ok((record, [])) => Ok(record),
        Ok((_, rest)) => Err(corrupt(key, format!("{} bytes too many", rest.len()))),
        Err(error) => Err(corrupt(key, error.to_string())),
    }
}

pub(crate) fn corrupt(key: &[u8], detail: impl Into<String>) -> StoreError {
    StoreError::Corrupt { key: keys::describe(key), detail: detail.into() }
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
        batch.push((key, Some(value)));
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
        batch.push((fragment_key(&key, number), Some(fragment.to_vec())));
    }
    batch.push((key, Some(first)));
    Ok(())
}

/// Splits a stored value into its payload and the number of fragments.
pub(crate) fn parse<'a>(key: &[u8], value: &'a [u8]) -> Result<(&'a [u8], u32)> {
    match value {
        [FORMAT_WHOLE, payload @ ..] => Ok((payload, 1)),
        [FORMAT_FRAGMENTED, a, b, c, d, payload @ ..] => match u32::from_be_bytes([*a, *b, *c, *d]) {
            count @ 2..FRAGMENTS_MAX => Ok((payload, count)),
            count => Err(corrupt(key, format!("it cannot have {count} fragments"))),
        },
        [format, ..] => Err(corrupt(key, format!("unknown format {format}"))),
        [] => Err(corrupt(key, "it is empty")),
    }
}

/// Reads the payload of one record: all fragments of it, without format bytes.
pub(crate) fn get_payload(database: &impl KeyValue, key: &[u8]) -> Result<Option<Vec<u8>>> {
    let Some(mut value) = database.get(key)? else { return Ok(None) };
    let (head, fragments) = parse(key, &value)?;
    let header = value.len() - head.len();
    value.drain(..header);
    for number in 1..fragments {
        match database.get(&fragment_key(key, number))? {
            Some(fragment) => value.extend(fragment),
            None => return Err(corrupt(key, format!("fragment {number} of {fragments} is missing"))),
        }
    }
    Ok(Some(value))
}

/// Reads one record.
pub(crate) fn get<T: DeserializeOwned>(database: &impl KeyValue, key: &[u8]) -> Result<Option<T>> {
    get_payload(database, key)?.map(|payload| decode(key, &payload)).transpose()
}

/// A record whose fragments are being gathered by [`scan_payloads`].
struct Pending {
    key: Vec<u8>,
    payload: Vec<u8>,
    next: u32,
    fragments: u32,
}

/// Visits all records of a range in its order.
pub(crate) fn scan<T: DeserializeOwned>(
    database: &impl KeyValue,
    range: &KeyRange,
    mut visit: impl FnMut(&[u8], T) -> Result<ControlFlow<()>>,
) -> Result<()> {
    scan_payloads(database, range, |key, payload| visit(key, decode(key, payload)?))
}

/// Visits the payloads of all records of a range in its order. What a longer earlier value of a record left behind is
/// passed over.
pub(crate) fn scan_payloads(
    database: &impl KeyValue,
    range: &KeyRange,
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let mut pending: Option<Pending> = None;
    let incomplete = |pending: &Pending| {
        corrupt(&pending.key, format!("fragment {} of {} is missing", pending.next, pending.fragments))
    };
    database.scan(range, &mut |key, value| {
        if !is_fragment(key) {
            if let Some(pending) = &pending {
                return Err(incomplete(pending));
            }
            let (payload, fragments) = parse(key, value)?;
            if fragments == 1 {
                return visit(key, payload);
            }
            if range.descending {
                // Its fragments were passed a moment ago; long records are few, so they are read again.
                return match get_payload(database, key)? {
                    Some(payload) => visit(key, &payload),
                    None => Ok(ControlFlow::Continue(())),
                };
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
        visit(&record.key, &record.payload)
    })?;
    pending.map_or(Ok(()), |pending| Err(incomplete(&pending)))
}
