//! Records as bytes, as they stand in the database behind their format byte: for tools and tests that look at what is on
//! disk. Stores go through [`RolloutStore`](crate::RolloutStore).

use fulgurite_core::record::{AttemptRecord, RolloutRecord};
use fulgurite_core::span::Span;

use crate::codec;
use crate::error::Result;

/// Key that errors name: these bytes are not from a database.
const NO_KEY: &[u8] = b"";

/// A record's bytes as a value of the database: with its format byte, compressed where that makes it smaller. Values of more
/// than [`VALUE_BYTES_MAX`](crate::VALUE_BYTES_MAX) are not cut here.
#[must_use]
pub fn pack(record: &[u8]) -> Vec<u8> {
    codec::whole_value(&codec::pack(record.into()))
}

/// A record's bytes from a value that holds all of it.
///
/// # Errors
/// When the value is damaged, or only the first fragment of a record.
pub fn unpack(value: &[u8]) -> Result<Vec<u8>> {
    let head = codec::parse(NO_KEY, value)?;
    if head.fragments != 1 {
        return Err(codec::corrupt(NO_KEY, format!("it is the first of {} fragments", head.fragments)));
    }
    Ok(codec::unpack(NO_KEY, head.bytes.into(), head.raw_bytes)?.into_owned())
}

/// A block of spans as bytes.
///
/// # Errors
/// When a span cannot be encoded.
pub fn encode_spans(spans: &[Span]) -> Result<Vec<u8>> {
    codec::encode(&spans)
}

/// Spans from the bytes of a block.
///
/// # Errors
/// When the bytes are not exactly a block of spans.
pub fn decode_spans(bytes: &[u8]) -> Result<Vec<Span>> {
    codec::decode(NO_KEY, bytes)
}

/// A rollout with its attempts as bytes.
///
/// # Errors
/// When a record cannot be encoded.
pub fn encode_rollout(rollout: &RolloutRecord, attempts: &[AttemptRecord]) -> Result<Vec<u8>> {
    codec::encode(&(rollout, attempts))
}

/// A rollout with its attempts from bytes.
///
/// # Errors
/// When the bytes are not exactly those records.
pub fn decode_rollout(bytes: &[u8]) -> Result<(RolloutRecord, Vec<AttemptRecord>)> {
    codec::decode(NO_KEY, bytes)
}
