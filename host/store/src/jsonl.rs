//! A store as text: one record on each line, every line a JSON object with one key that says what it is.
//!
//! ```text
//! {"header":{"format":"fulgurite-store","version":1,"schema":5}}
//! {"resource":{"version":1,"after":0,"name":"prompt","text":"..."}}
//! {"worker":{"id":"...", ...}}
//! {"blob":{"hash":"...","text":"..."}}            or "hex", where it is no text
//! {"rollout":{"record":{...},"attempts":[...]}}
//! {"span":{"record":{...}}}                         the spans of the rollout before it
//! {"end":{"lines":6}}                               so that a file that was cut off is found out
//! ```
//!
//! Nothing is lost: a store that is made from a file writes the same bytes again. JSON has no word for numbers that are not
//! finite, and readers round the last digit differently; a record that does not come back equal from its own text carries
//! its binary form beside it, under `exact`. The rejected alternative, numbers as strings everywhere, would be worse to read
//! for the sake of a few.

mod import;

use std::io::Write;
use std::ops::ControlFlow;

use fulgurite_core::id::ContentHash;
use fulgurite_core::record::{AttemptRecord, RolloutRecord, WorkerRecord};
use fulgurite_core::span::Span;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub(crate) use self::import::Importer;
use crate::codec;
use crate::error::{Result, StoreError};
use crate::hex;
use crate::key_value::{KeyRange, KeyValue};
use crate::keys::{self, Kind};
use crate::ledger::{Ledger, ResourcesRecord, StoredRollout};
use crate::records::TransferReport;
use crate::sled_store::{KEYS_PER_PROGRESS, Progress, SCHEMA_VERSION};

const FORMAT: &str = "fulgurite-store";
/// Version of the lines.
pub const JSONL_VERSION: u32 = 1;

/// One line; the records of a line that is only read for its `exact` are passed over.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Line<R, A, S> {
    Header {
        format: String,
        version: u32,
        schema: u32,
    },
    Resource {
        version: u64,
        after: u64,
        name: String,
        text: String,
    },
    Worker(WorkerRecord),
    Blob {
        hash: ContentHash,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        text: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hex: Option<String>,
    },
    Rollout {
        record: R,
        attempts: A,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exact: Option<String>,
    },
    Span {
        record: S,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exact: Option<String>,
    },
    End {
        lines: u64,
    },
}

/// A line that is read.
type Read = Line<RolloutRecord, Vec<AttemptRecord>, Span>;
/// A line that is written.
type Written<'a> = Line<&'a RolloutRecord, &'a [AttemptRecord], &'a Span>;

fn text_of(line: &Written<'_>) -> Result<String> {
    serde_json::to_string(line).map_err(|error| StoreError::Encode(error.to_string()))
}

/// A rollout as a line.
fn rollout_line(record: &RolloutRecord, attempts: &[AttemptRecord]) -> Result<String> {
    let binary = codec::encode(&(record, attempts))?;
    exact_line(
        &binary,
        |exact| Line::Rollout { record, attempts, exact },
        |line| match line {
            Line::Rollout { record, attempts, .. } => codec::encode(&(record, attempts)).ok(),
            _ => None,
        },
    )
}

/// A span as a line.
fn span_line(record: &Span) -> Result<String> {
    let binary = codec::encode(record)?;
    exact_line(
        &binary,
        |exact| Line::Span { record, exact },
        |line| match line {
            Line::Span { record, .. } => codec::encode(record).ok(),
            _ => None,
        },
    )
}

/// The line without `exact`, where its record comes back from it with the same bytes, and otherwise with it.
fn exact_line<'a>(
    binary: &[u8],
    line: impl Fn(Option<String>) -> Written<'a>,
    again: impl FnOnce(&Read) -> Option<Vec<u8>>,
) -> Result<String> {
    let text = text_of(&line(None))?;
    let back = serde_json::from_str::<Read>(&text).ok().as_ref().and_then(again);
    if back.as_deref() == Some(binary) { Ok(text) } else { text_of(&line(Some(hex::encode(binary)))) }
}

/// The binary form that a line carries.
fn exact<T: DeserializeOwned>(exact: &str) -> Option<T> {
    codec::decode(&[], &hex::decode(exact)?).ok()
}

/// Writes lines and counts them.
struct Sink<'a, 'p> {
    to: &'a mut dyn Write,
    report: TransferReport,
    progress: Progress<'p>,
}

impl Sink<'_, '_> {
    fn put(&mut self, line: &str) -> Result<()> {
        self.report.lines += 1;
        self.report.bytes += line.len() as u64 + 1;
        if self.report.lines.is_multiple_of(KEYS_PER_PROGRESS) {
            (self.progress)(self.report.lines);
        }
        let written = self.to.write_all(line.as_bytes()).and_then(|()| self.to.write_all(b"\n"));
        written.map_err(|error| StoreError::Export(error.into()))
    }
}

impl<D: KeyValue> Ledger<D> {
    pub(crate) fn export(&self, to: &mut dyn Write, progress: Progress<'_>) -> Result<TransferReport> {
        let mut sink = Sink { to, report: TransferReport::default(), progress };
        let header = Line::Header { format: FORMAT.to_owned(), version: JSONL_VERSION, schema: SCHEMA_VERSION };
        sink.put(&text_of(&header)?)?;
        self.walk(KeyRange::prefix(&[Kind::Resources as u8]), usize::MAX, |_, key, record: ResourcesRecord| {
            let version = keys::number_at(key, 1).unwrap_or(0);
            let (after, name, text) = (record.after, record.name, record.text);
            sink.put(&text_of(&Line::Resource { version, after, name, text })?)?;
            Ok(ControlFlow::Continue(()))
        })?;
        for worker in self.workers()? {
            sink.put(&text_of(&Line::Worker(worker))?)?;
        }
        codec::scan_payloads(self.database(), &KeyRange::prefix(&[Kind::Blob as u8]), |key, content| {
            let hash = ContentHash::of(content);
            if keys::blob_key(&hash) != key {
                return Err(codec::corrupt(key, "its content has another hash"));
            }
            let (text, hex) = match std::str::from_utf8(content) {
                Ok(text) => (Some(text.to_owned()), None),
                Err(_) => (None, Some(hex::encode(content))),
            };
            sink.put(&text_of(&Line::Blob { hash, text, hex })?)?;
            Ok(ControlFlow::Continue(()))
        })?;
        self.walk(KeyRange::prefix(&[Kind::Rollout as u8]), usize::MAX, |_, _, (rollout, attempts): StoredRollout| {
            sink.put(&rollout_line(&rollout, &attempts)?)?;
            for attempt in &attempts {
                for span in self.stored_spans(&rollout, attempt)? {
                    sink.put(&span_line(&span)?)?;
                }
            }
            sink.report.rollouts += 1;
            sink.report.spans += attempts.iter().map(|attempt| attempt.spans).sum::<u64>();
            Ok(ControlFlow::Continue(()))
        })?;
        let lines = sink.report.lines;
        sink.put(&text_of(&Line::End { lines })?)?;
        sink.to.flush().map_err(|error| StoreError::Export(error.into()))?;
        Ok(sink.report)
    }
}
