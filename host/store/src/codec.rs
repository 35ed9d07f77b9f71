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
//! sled writes a record once as a change and about twice more with the node that holds it, and a node of more than 128 KiB
//! becomes a separate file that its flush does not cover. So records are compressed (LZ4) where that makes them smaller,
//! values are never longer than [`VALUE_BYTES_MAX`], of which 16 make a node, and what is longer is cut into fragments, the
//! first under the record's own key and the others under that key with a fragment number behind it. Measured with rollouts
//! of nine spans and 7 KB: 5 KB on disk each instead of 12.

use std::borrow::Cow;
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
/// Format byte of a compressed value in one piece; its length before compression follows as u32.
const FORMAT_COMPRESSED: u8 = 3;
/// Format byte of the first of several fragments of a compressed record; their number and the length before compression
/// follow, each as u32.
const FORMAT_COMPRESSED_FRAGMENTED: u8 = 4;
/// Records shorter than this are stored as they are: there is little to gain.
const COMPRESSED_BYTES_MIN: usize = 256;
/// LZ4 cannot make a block more than about 255 times smaller: what says otherwise is damaged, and is not given memory.
const COMPRESSION_RATIO_MAX: usize = 256;
/// Encoded spans in one block before compression in bytes. Bounds what reading one span has to decompress.
const BLOCK_BYTES_MAX: usize = 32 << 10;
/// Fragments of one record; 64 GiB, and what lets the keys of fragments be told from others.
const FRAGMENTS_MAX: u32 = 1 << 24;

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

/// A record as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packed<'a> {
    bytes: Cow<'a, [u8]>,
    /// Length before compression; `None` when it is not compressed.
    raw_bytes: Option<u32>,
}

impl<'a> Packed<'a> {
    /// A record that is not compressed.
    const fn plain(payload: &'a [u8]) -> Self {
        Self { bytes: Cow::Borrowed(payload), raw_bytes: None }
    }
}

/// Compresses an encoded record where that makes it smaller.
pub(crate) fn pack(payload: Cow<'_, [u8]>) -> Packed<'_> {
    if payload.len() >= COMPRESSED_BYTES_MIN
        && let Ok(raw_bytes) = u32::try_from(payload.len())
    {
        let compressed = lz4_flex::block::compress(&payload);
        if compressed.len() < payload.len() - payload.len() / 16 {
            return Packed { bytes: Cow::Owned(compressed), raw_bytes: Some(raw_bytes) };
        }
    }
    Packed { bytes: payload, raw_bytes: None }
}

/// The other way round.
pub(crate) fn unpack<'a>(key: &[u8], stored: Cow<'a, [u8]>, raw_bytes: Option<u32>) -> Result<Cow<'a, [u8]>> {
    let Some(raw_bytes) = raw_bytes else { return Ok(stored) };
    let raw_bytes = usize::try_from(raw_bytes).unwrap_or(usize::MAX);
    if raw_bytes > stored.len().saturating_mul(COMPRESSION_RATIO_MAX) {
        return Err(corrupt(key, format!("{} bytes cannot have been {raw_bytes}", stored.len())));
    }
    match lz4_flex::block::decompress(&stored, raw_bytes) {
        Ok(payload) if payload.len() == raw_bytes => Ok(Cow::Owned(payload)),
        Ok(payload) => Err(corrupt(key, format!("it has {} bytes and should have {raw_bytes}", payload.len()))),
        Err(error) => Err(corrupt(key, format!("it cannot be decompressed: {error}"))),
    }
}

/// Consecutive spans, encoded together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SpanBlock {
    pub(crate) first_sequence: u64,
    /// Postcard of `Vec<Span>`.
    pub(crate) packed: Packed<'static>,
    /// Its length before compression.
    pub(crate) span_bytes: u64,
}

/// Encodes spans into blocks of at most [`BLOCK_BYTES_MAX`]; a longer span gets a block of its own.
pub(crate) fn encode_blocks(spans: &[Span]) -> Result<Vec<SpanBlock>> {
    let close = |first_sequence: u64, count: usize, elements: &mut Vec<u8>| -> Result<SpanBlock> {
        // A list in postcard is its length and then its elements.
        let mut payload = encode(&count)?;
        payload.append(elements);
        let span_bytes = payload.len() as u64;
        Ok(SpanBlock { first_sequence, packed: pack(payload.into()), span_bytes })
    };
    let mut blocks = Vec::new();
    let mut elements = Vec::new();
    let mut count = 0_usize;
    let mut first_sequence = 0;
    for span in spans {
        let before = elements.len();
        elements = postcard::to_extend(span, elements).map_err(|error| StoreError::Encode(error.to_string()))?;
        if count > 0 && elements.len() > BLOCK_BYTES_MAX {
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

/// Adds a record to a batch as it is: for what is short, or written so often that compressing it does not pay.
pub(crate) fn put(batch: &mut Batch, key: Vec<u8>, payload: &[u8]) -> Result<()> {
    put_packed(batch, key, &Packed::plain(payload))
}

/// A record in one value, however long that is.
pub(crate) fn whole_value(packed: &Packed<'_>) -> Vec<u8> {
    match packed.raw_bytes {
        Some(raw_bytes) => [&[FORMAT_COMPRESSED], raw_bytes.to_le_bytes().as_slice(), &packed.bytes].concat(),
        None => [&[FORMAT_WHOLE], &*packed.bytes].concat(),
    }
}

/// Adds a record to a batch, in fragments where it is too long for one value.
pub(crate) fn put_packed(batch: &mut Batch, key: Vec<u8>, packed: &Packed<'_>) -> Result<()> {
    let bytes: &[u8] = &packed.bytes;
    let raw_bytes = packed.raw_bytes.map(u32::to_le_bytes);
    let raw_bytes = raw_bytes.as_ref().map_or(&[][..], <[u8; 4]>::as_slice);
    if 1 + raw_bytes.len() + bytes.len() <= VALUE_BYTES_MAX {
        batch.push((key, Some(whole_value(packed))));
        return Ok(());
    }
    let format = [if raw_bytes.is_empty() { FORMAT_FRAGMENTED } else { FORMAT_COMPRESSED_FRAGMENTED }];
    let (head, tail) = bytes.split_at((VALUE_BYTES_MAX - 1 - 4 - raw_bytes.len()).min(bytes.len()));
    let fragments = 1 + tail.len().div_ceil(VALUE_BYTES_MAX);
    let count = u32::try_from(fragments).ok().filter(|count| *count < FRAGMENTS_MAX);
    let count = count.ok_or_else(|| StoreError::Encode("a record is too long".to_owned()))?;
    for (number, fragment) in (1_u32..).zip(tail.chunks(VALUE_BYTES_MAX)) {
        batch.push((fragment_key(&key, number), Some(fragment.to_vec())));
    }
    batch.push((key, Some([&format, count.to_be_bytes().as_slice(), raw_bytes, head].concat())));
    Ok(())
}

/// The first or only value of a record.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head<'a> {
    /// What it holds of the stored record.
    pub(crate) bytes: &'a [u8],
    /// Values that the record consists of.
    pub(crate) fragments: u32,
    /// Length of the record before compression; `None` when it is not compressed.
    pub(crate) raw_bytes: Option<u32>,
}

/// Takes a record's first value apart.
pub(crate) fn parse<'a>(key: &[u8], value: &'a [u8]) -> Result<Head<'a>> {
    let Some((format, rest)) = value.split_first() else { return Err(corrupt(key, "it is empty")) };
    let (is_fragmented, is_compressed) = match *format {
        FORMAT_WHOLE => (false, false),
        FORMAT_FRAGMENTED => (true, false),
        FORMAT_COMPRESSED => (false, true),
        FORMAT_COMPRESSED_FRAGMENTED => (true, true),
        format => return Err(corrupt(key, format!("unknown format {format}"))),
    };
    let mut bytes = rest;
    let mut number = |is_there: bool| {
        let Some((number, rest)) = bytes.split_first_chunk::<4>().filter(|_| is_there) else {
            return if is_there { Err(corrupt(key, "it ends in its header")) } else { Ok(None) };
        };
        bytes = rest;
        Ok(Some(*number))
    };
    let fragments = number(is_fragmented)?.map_or(1, u32::from_be_bytes);
    let raw_bytes = number(is_compressed)?.map(u32::from_le_bytes);
    if is_fragmented && !(2..FRAGMENTS_MAX).contains(&fragments) {
        return Err(corrupt(key, format!("it cannot have {fragments} fragments")));
    }
    Ok(Head { bytes, fragments, raw_bytes })
}

/// Reads the payload of one record: all fragments of it, decompressed, without format bytes.
pub(crate) fn get_payload(database: &impl KeyValue, key: &[u8]) -> Result<Option<Vec<u8>>> {
    let Some(mut value) = database.get(key)? else { return Ok(None) };
    let head = parse(key, &value)?;
    let (header, fragments, raw_bytes) = (value.len() - head.bytes.len(), head.fragments, head.raw_bytes);
    value.drain(..header);
    for number in 1..fragments {
        match database.get(&fragment_key(key, number))? {
            Some(fragment) => value.extend(fragment),
            None => return Err(corrupt(key, format!("fragment {number} of {fragments} is missing"))),
        }
    }
    Ok(Some(unpack(key, Cow::Owned(value), raw_bytes)?.into_owned()))
}

/// Reads one record.
pub(crate) fn get<T: DeserializeOwned>(database: &impl KeyValue, key: &[u8]) -> Result<Option<T>> {
    get_payload(database, key)?.map(|payload| decode(key, &payload)).transpose()
}

/// A record whose fragments are being gathered.
pub(crate) struct Pending {
    pub(crate) key: Vec<u8>,
    pub(crate) stored: Vec<u8>,
    /// Number of the fragment that comes next.
    pub(crate) next: u32,
    pub(crate) fragments: u32,
    pub(crate) raw_bytes: Option<u32>,
}

impl Pending {
    /// A record of several fragments, of which this is the first.
    pub(crate) fn new(key: &[u8], head: Head<'_>) -> Self {
        let Head { bytes, fragments, raw_bytes } = head;
        Self { key: key.to_vec(), stored: bytes.to_vec(), next: 1, fragments, raw_bytes }
    }

    /// The record, when all fragments are there.
    pub(crate) fn payload(self) -> Result<Vec<u8>> {
        Ok(unpack(&self.key, Cow::Owned(self.stored), self.raw_bytes)?.into_owned())
    }
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
            let head = parse(key, value)?;
            if head.fragments == 1 {
                return visit(key, &unpack(key, Cow::Borrowed(head.bytes), head.raw_bytes)?);
            }
            if range.descending {
                // Its fragments were passed a moment ago; long records are few, so they are read again.
                return match get_payload(database, key)? {
                    Some(payload) => visit(key, &payload),
                    None => Ok(ControlFlow::Continue(())),
                };
            }
            pending = Some(Pending::new(key, head));
            return Ok(ControlFlow::Continue(()));
        }
        // A fragment: of the record before it, or else what a longer earlier value of that record left behind.
        let Some(mut record) = pending.take() else { return Ok(ControlFlow::Continue(())) };
        if key != fragment_key(&record.key, record.next) {
            return Err(incomplete(&record));
        }
        record.stored.extend(value);
        record.next += 1;
        if record.next < record.fragments {
            pending = Some(record);
            return Ok(ControlFlow::Continue(()));
        }
        visit(&record.key, &unpack(&record.key, Cow::Owned(record.stored), record.raw_bytes)?)
    })?;
    pending.map_or(Ok(()), |pending| Err(incomplete(&pending)))
}

#[cfg(test)]
mod tests {
    use fulgurite_core::id::ContentHash;
    use proptest::prelude::*;

    use super::*;
    use crate::key_value::MemoryKeyValue;

    /// Bytes from nothing but noise to nothing but repetition, up to many fragments.
    fn payload() -> impl Strategy<Value = Vec<u8>> {
        (prop::collection::vec(any::<u8>(), 0..600), 0..60_usize).prop_map(|(part, times)| part.repeat(times))
    }

    fn stored(key: &[u8], payload: &[u8]) -> MemoryKeyValue {
        let (database, mut batch) = (MemoryKeyValue::default(), Batch::new());
        put_packed(&mut batch, key.to_vec(), &pack(payload.into())).unwrap();
        assert!(batch.iter().all(|(_, value)| value.as_ref().unwrap().len() <= VALUE_BYTES_MAX));
        database.apply(batch).unwrap();
        database
    }

    proptest! {
        #[test]
        fn what_is_put_comes_back(payload in payload()) {
            let key = keys::rollout_key(7);
            let database = stored(&key, &payload);
            prop_assert_eq!(get_payload(&database, &key).unwrap().unwrap(), payload.clone());
            let mut seen = vec![];
            scan_payloads(&database, &KeyRange::all(), |key, payload| {
                seen.push((key.to_vec(), payload.to_vec()));
                Ok(ControlFlow::Continue(()))
            }).unwrap();
            prop_assert_eq!(seen, [(key, payload)]);
        }
    }

    #[test]
    fn repetition_takes_less_and_noise_no_more() {
        let repeated = pack(b"the same again, ".repeat(100).into());
        assert!(repeated.raw_bytes == Some(1_600) && repeated.bytes.len() < 100);
        let noise: Vec<u8> =
            ContentHash::of(b"").as_bytes().iter().flat_map(|byte| *ContentHash::of(&[*byte]).as_bytes()).collect();
        assert_eq!(pack(noise.as_slice().into()), Packed { bytes: noise.as_slice().into(), raw_bytes: None });
    }

    #[test]
    fn a_length_that_cannot_be_is_damage_and_takes_no_memory() {
        let packed = pack(b"the same again, ".repeat(100).into());
        for raw_bytes in [0, 1_599, 1_601, 20_000, u32::MAX] {
            let lie = Packed { raw_bytes: Some(raw_bytes), ..packed.clone() };
            let value = whole_value(&lie);
            let head = parse(b"r", &value).unwrap();
            let error = unpack(b"r", head.bytes.into(), head.raw_bytes).unwrap_err();
            assert!(matches!(error, StoreError::Corrupt { .. }), "{raw_bytes}: {error}");
        }
    }
}
