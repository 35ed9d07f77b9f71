//! Reads lines into a new database. Every line is checked against those before it, so that an error names its line.

use std::collections::BTreeMap;
use std::io::BufRead;

use fulgurite_core::id::{AttemptKey, ContentHash};
use fulgurite_core::record::{AttemptRecord, RolloutRecord, WorkerRecord};
use fulgurite_core::span::Span;
use serde::de::IgnoredAny;

use super::{FORMAT, JSONL_VERSION, Line, Read, exact, rollout_line, span_line};
use crate::check;
use crate::codec;
use crate::error::{Result, StoreError};
use crate::hex;
use crate::keys;
use crate::ledger::{Counters, ResourcesRecord, check_stored, check_worker_id, first_own_sequence};
use crate::records::TransferReport;
use crate::sled_store::{SCHEMA_READABLE, SCHEMA_VERSION, Writer};

/// Spans that are written together.
const SPANS_PER_WRITE: usize = 64;

/// What went wrong on a line.
enum Trouble {
    /// The line is wrong.
    Line(String),
    /// The store failed.
    Store(StoreError),
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

fn wrong<T>(detail: impl Into<String>) -> std::result::Result<T, Trouble> {
    Err(Trouble::Line(detail.into()))
}

type Checked<T = ()> = std::result::Result<T, Trouble>;

/// The rollout whose spans are being read.
struct Open {
    rollout: RolloutRecord,
    attempts: Vec<AttemptRecord>,
    /// Place of the attempt that the next span belongs to, and how many of its spans have come.
    attempt: usize,
    read: u64,
    waiting: Vec<Span>,
}

impl Open {
    /// The attempt and the sequence that must come next; `None` when all spans have come.
    fn next(&mut self) -> Option<(AttemptKey, u64)> {
        loop {
            let attempt = self.attempts.get(self.attempt)?;
            if self.read < attempt.spans {
                return Some((attempt.key.clone(), first_own_sequence(&self.rollout) + self.read));
            }
            self.attempt += 1;
            self.read = 0;
        }
    }
}

/// Takes lines.
pub(crate) struct Importer {
    counters: Counters,
    resources: BTreeMap<u64, BTreeMap<String, u64>>,
    open: Option<Open>,
    report: TransferReport,
    ended: bool,
}

impl Importer {
    /// An importer into a store that had so many commits.
    pub(crate) fn new(commits: u64) -> Self {
        let counters = Counters { commits: commits + 1, ..Counters::default() };
        Self { counters, resources: BTreeMap::new(), open: None, report: TransferReport::default(), ended: false }
    }

    /// Reads everything. `name` is what errors call the file.
    pub(crate) fn run(mut self, from: &mut dyn BufRead, name: &str, writer: &mut Writer<'_>) -> Result<TransferReport> {
        writer.put(keys::schema_key(), SCHEMA_VERSION.to_be_bytes().to_vec())?;
        let mut text = String::new();
        loop {
            text.clear();
            let fail = |line: u64, detail: String| StoreError::Import { file: name.to_owned(), line, detail };
            let line = self.report.lines + 1;
            let bytes = from.read_line(&mut text).map_err(|error| fail(line, format!("it cannot be read: {error}")))?;
            if bytes == 0 {
                if self.ended {
                    break;
                }
                return Err(fail(line, "the file ends before its `end` line: it was cut off".to_owned()));
            }
            self.report.bytes += bytes as u64;
            match self.line(text.trim_end_matches(['\n', '\r']), writer) {
                Ok(()) => self.report.lines += 1,
                Err(Trouble::Line(detail)) => return Err(fail(line, detail)),
                Err(Trouble::Store(error)) => return Err(error),
            }
        }
        let mut batch = vec![];
        codec::put(&mut batch, keys::counters_key(), &codec::encode(&self.counters)?)?;
        writer.put_all(batch)?;
        Ok(self.report)
    }

    fn line(&mut self, text: &str, writer: &mut Writer<'_>) -> Checked {
        if self.ended {
            return wrong("nothing may follow the `end` line");
        }
        let line = parse(text)?;
        let first = self.report.lines == 0;
        if first != matches!(line, Line::Header { .. }) {
            return wrong(if first { "the first line must be the header" } else { "there is a header already" });
        }
        let mut batch = vec![];
        match line {
            Line::Header { format, version, schema } => {
                let readable = (SCHEMA_READABLE..=SCHEMA_VERSION).contains(&schema);
                if (format.as_str(), version, readable) != (FORMAT, JSONL_VERSION, true) {
                    let can =
                        format!("`{FORMAT}` version {JSONL_VERSION} of schema {SCHEMA_READABLE} to {SCHEMA_VERSION}");
                    return wrong(format!("it is `{format}` version {version} of schema {schema}; this reads {can}"));
                }
            }
            Line::Resource { version, after, name, text } => {
                let record = self.resource(version, after, name, text)?;
                codec::put(&mut batch, keys::resources_key(version), &codec::encode(&record)?)?;
            }
            Line::Worker(worker) => self.worker(&worker, writer, &mut batch)?,
            Line::Blob { hash, text, hex } => {
                let content = match (text, hex.as_deref().map(hex::decode)) {
                    (Some(text), None) => text.into_bytes(),
                    (None, Some(Some(bytes))) => bytes,
                    _ => return wrong("a blob has either `text` or `hex`"),
                };
                if ContentHash::of(&content) != hash {
                    return wrong(format!("the content has another hash than {hash}"));
                }
                let key = keys::blob_key(&hash);
                if writer.contains(&key)? {
                    return wrong(format!("there is a blob {hash} already"));
                }
                self.counters.blobs += 1;
                self.counters.blob_bytes += content.len() as u64;
                codec::put_packed(&mut batch, key, &codec::pack(content.into()))?;
            }
            Line::Rollout { record, attempts, .. } => self.rollout(record, attempts, writer, &mut batch)?,
            Line::Span { record, .. } => self.span(record, writer)?,
            Line::End { lines } => {
                self.close(writer)?;
                if lines != self.report.lines {
                    return wrong(format!("{} lines have come before it, not {lines}", self.report.lines));
                }
                self.ended = true;
            }
        }
        Ok(writer.put_all(batch)?)
    }

    fn resource(&mut self, version: u64, after: u64, name: String, text: String) -> Checked<ResourcesRecord> {
        let expected = self.counters.resources_version + 1;
        if version != expected {
            return wrong(format!("version {expected} must come next, not {version}"));
        }
        let mut names = if after == 0 {
            BTreeMap::new()
        } else {
            match self.resources.get(&after) {
                Some(names) => names.clone(),
                None => return wrong(format!("there is no version {after} before it")),
            }
        };
        names.insert(name.clone(), version);
        self.resources.insert(version, names.clone());
        self.counters.resources_version = version;
        Ok(ResourcesRecord { after, name, text, names })
    }

    fn worker(
        &mut self,
        worker: &WorkerRecord,
        writer: &mut Writer<'_>,
        batch: &mut crate::key_value::Batch,
    ) -> Checked {
        if let Err(error) = check_worker_id(&worker.id) {
            return wrong(error.to_string());
        }
        let key = keys::worker_key(&worker.id);
        if writer.contains(&key)? {
            return wrong(format!("there is a worker `{}` already", worker.id));
        }
        self.counters.workers += 1;
        Ok(codec::put(batch, key, &codec::encode(worker)?)?)
    }

    fn rollout(
        &mut self,
        rollout: RolloutRecord,
        attempts: Vec<AttemptRecord>,
        writer: &mut Writer<'_>,
        batch: &mut crate::key_value::Batch,
    ) -> Checked {
        self.close(writer)?;
        if rollout.ordinal < self.counters.next_ordinal {
            return wrong(format!("ordinal {} comes after {}", rollout.ordinal, self.counters.next_ordinal));
        }
        let key = keys::rollout_key(rollout.ordinal);
        if let Err(StoreError::Corrupt { detail, .. }) = check_stored(&key, &rollout, &attempts) {
            return wrong(detail);
        }
        if let Some(problem) = check::state_problem(&rollout, &attempts) {
            return wrong(problem);
        }
        let index = keys::index_key(&rollout.spec.id);
        if writer.contains(&index)? {
            return wrong(format!("there is a rollout `{}` already", rollout.spec.id));
        }
        if let Some(problem) = check::fork_problem(writer.database(), &rollout) {
            return wrong(problem);
        }
        self.counters.add_state(rollout.state);
        self.counters.add_outcomes(&attempts);
        self.counters.attempts += attempts.len() as u64;
        self.counters.next_ordinal = rollout.ordinal + 1;
        self.report.rollouts += 1;
        codec::put(batch, index, &codec::encode(&rollout.ordinal)?)?;
        codec::put_packed(batch, key, &codec::pack(codec::encode(&(&rollout, &attempts))?.into()))?;
        self.open = Some(Open { rollout, attempts, attempt: 0, read: 0, waiting: vec![] });
        Ok(())
    }

    fn span(&mut self, span: Span, writer: &mut Writer<'_>) -> Checked {
        let Some(open) = &mut self.open else { return wrong("a span must follow its rollout") };
        let expected = open.next();
        if expected.as_ref() != Some(&(span.attempt.clone(), span.sequence)) {
            let expected = match expected {
                Some((key, sequence)) => format!("span {sequence} of {key} must come next"),
                None => format!("all spans of `{}` have come", open.rollout.spec.id),
            };
            return wrong(format!("{expected}, not span {} of {}", span.sequence, span.attempt));
        }
        // A block holds the spans of one attempt.
        if open.waiting.first().is_some_and(|first| first.attempt != span.attempt)
            || open.waiting.len() == SPANS_PER_WRITE
        {
            write_spans(open, &mut self.counters, writer)?;
        }
        open.waiting.push(span);
        open.read += 1;
        self.report.spans += 1;
        Ok(())
    }

    /// All spans of the rollout must have come.
    fn close(&mut self, writer: &mut Writer<'_>) -> Checked {
        let Some(mut open) = self.open.take() else { return Ok(()) };
        if let Some((key, sequence)) = open.next() {
            return wrong(format!("span {sequence} of {key} must come first"));
        }
        Ok(write_spans(&mut open, &mut self.counters, writer)?)
    }
}

fn write_spans(open: &mut Open, counters: &mut Counters, writer: &mut Writer<'_>) -> Result<()> {
    let spans = std::mem::take(&mut open.waiting);
    let Some(first) = spans.first() else { return Ok(()) };
    let mut batch = vec![];
    for block in codec::encode_blocks(&spans)? {
        let key = keys::spans_key(open.rollout.ordinal, first.attempt.attempt, block.first_sequence);
        counters.span_bytes += block.span_bytes;
        codec::put_packed(&mut batch, key, &block.packed)?;
    }
    counters.spans += spans.len() as u64;
    writer.put_all(batch)
}

/// Reads a line; one with `exact` for that.
fn parse(text: &str) -> Checked<Read> {
    let typed = serde_json::from_str::<Read>(text);
    if let Ok(Line::Rollout { exact: None, .. } | Line::Span { exact: None, .. }) = &typed {
        return typed.or_else(|error| wrong(error.to_string()));
    }
    let differs = || wrong("`exact` and the record differ: take `exact` out to use the record");
    match serde_json::from_str::<Line<IgnoredAny, IgnoredAny, IgnoredAny>>(text) {
        Ok(Line::Rollout { exact: Some(bytes), .. }) => {
            let Some((record, attempts)) = exact::<(RolloutRecord, Vec<AttemptRecord>)>(&bytes) else {
                return differs();
            };
            if rollout_line(&record, &attempts)? != text {
                return differs();
            }
            Ok(Line::Rollout { record, attempts, exact: None })
        }
        Ok(Line::Span { exact: Some(bytes), .. }) => {
            let Some(record) = exact::<Span>(&bytes) else { return differs() };
            if span_line(&record)? != text {
                return differs();
            }
            Ok(Line::Span { record, exact: None })
        }
        _ => typed.or_else(|error| wrong(error.to_string())),
    }
}
