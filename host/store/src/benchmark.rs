//! Measures durable spans per second on a disk, beside what bare sled does with the same bytes there.
//!
//! One thread appends to many live rollouts in turn, so that their spans lie interleaved in time as those of a runner do;
//! each commit holds some spans of each of them and is acknowledged after flush and fdatasync. Making the spans is not
//! counted, encoding them is.
//!
//! The baseline gets the same spans, encoded before its clock starts, one key to a span, in one batch for each commit, with
//! sled's own flush after it, which is no fdatasync. It says what the disk and sled give without any of our rules; it is not
//! a way to store spans.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fulgurite_core::dataset::Split;
use fulgurite_core::id::{AttemptKey, PolicyVersion, RolloutId, SpanId, TraceId};
use fulgurite_core::llm::Sampling;
use fulgurite_core::record::{RolloutMode, RolloutSpec};
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_core::span::{Span, SpanBody, SpanKind, SpanStatus};

use crate::error::{Result, StoreError};
use crate::records::unknown_content;
use crate::{RolloutStore, SledStore, bare_sled, codec};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BenchmarkSettings {
    /// Encoded size of a span in bytes.
    pub span_bytes: usize,
    /// Rollouts that are written to in turn.
    pub rollouts: u64,
    /// Spans of each rollout in one commit.
    pub spans_per_commit: u64,
    /// Commits.
    pub commits: u64,
}

impl BenchmarkSettings {
    /// Spans of a size, interleaved over 64 rollouts, about 64 MB of them.
    #[must_use]
    pub fn of_span_bytes(span_bytes: usize) -> Self {
        let (rollouts, spans_per_commit) = (64, 16);
        let bytes = span_bytes.max(1) as u64 * rollouts * spans_per_commit;
        Self { span_bytes, rollouts, spans_per_commit, commits: (64_000_000 / bytes).max(8) }
    }

    /// All spans.
    #[must_use]
    pub const fn spans(&self) -> u64 {
        self.rollouts * self.spans_per_commit * self.commits
    }
}

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BenchmarkReport {
    /// Durable spans, each acknowledged after its fdatasync.
    pub spans: u64,
    /// Their encoded size in bytes, on average.
    pub span_bytes: f64,
    /// Durable spans per second.
    pub spans_per_second: f64,
    /// Half of the syncs took at most this long, in microseconds.
    pub sync_p50_us: u64,
    /// 99 of 100 syncs took at most this long, in microseconds.
    pub sync_p99_us: u64,
    /// The longest sync in microseconds.
    pub sync_max_us: u64,
    /// Size of the store's files at the end, in bytes.
    pub disk_bytes: u64,
    /// The same spans in bare sled, per second.
    pub sled_spans_per_second: f64,
    /// Size of bare sled's files at the end, in bytes.
    pub sled_disk_bytes: u64,
}

fn spec(index: u64) -> Result<RolloutSpec> {
    let id = RolloutId::derived("benchmark", 0, index).map_err(|error| StoreError::Encode(error.to_string()))?;
    Ok(RolloutSpec {
        id,
        stage: "benchmark".to_owned(),
        step: 0,
        group: index,
        dataset: "benchmark".to_owned(),
        split: Split::Train,
        item_id: format!("item-{index}"),
        mode: RolloutMode::Train,
        seed: Seed::new(index),
        sampling: Sampling::default(),
        policy_version: PolicyVersion(0),
        resources_version: 0,
        components: vec![],
        item: unknown_content(),
        execution: unknown_content(),
        fork_of: None,
    })
}

/// Text that no compression makes smaller: what a store gains from compressing depends on what it is given, so it is left
/// out of the figure.
fn noise(number: u64, bytes: usize) -> String {
    let letters: Vec<char> = ('A'..='Z').chain('a'..='z').chain('0'..='9').collect();
    let mut generator = Generator::new(Seed::new(number));
    (0..bytes).filter_map(|_| letters.get(generator.below(letters.len()))).collect()
}

/// A span that takes about so many bytes encoded.
fn span(key: &AttemptKey, sequence: u64, bytes: usize) -> Span {
    /// What everything but the text takes.
    const OTHER_BYTES: usize = 88;
    Span {
        attempt: key.clone(),
        sequence,
        trace_id: TraceId(u128::MAX),
        span_id: SpanId(u64::MAX),
        parent: Some(SpanId(u64::MAX)),
        name: "log".to_owned(),
        kind: SpanKind::Internal,
        start_ns: u64::MAX,
        end_ns: u64::MAX,
        status: SpanStatus::Ok,
        guest_attributes: vec![],
        links: vec![],
        body: SpanBody::Log { level: "info".to_owned(), text: noise(sequence, bytes.saturating_sub(OTHER_BYTES)) },
    }
}

/// The spans of one commit.
fn commit_of(keys: &[AttemptKey], settings: &BenchmarkSettings, commit: u64) -> Vec<(AttemptKey, Vec<Span>)> {
    let first = commit * settings.spans_per_commit;
    let sequences = first..first + settings.spans_per_commit;
    let spans = |key: &AttemptKey| sequences.clone().map(|sequence| span(key, sequence, settings.span_bytes)).collect();
    keys.iter().map(|key| (key.clone(), spans(key))).collect()
}

fn per_second(spans: u64, taken: Duration) -> f64 {
    spans as f64 / taken.as_secs_f64().max(1e-9)
}

/// Measures in a directory that is empty or not there; what was written stays in it.
///
/// # Errors
/// [`StoreError::NotEmpty`]; errors of writing.
pub fn benchmark(dir: &Path, settings: &BenchmarkSettings) -> Result<BenchmarkReport> {
    let store = SledStore::open(&dir.join("store"))?;
    if store.statistics()?.rollouts_total() > 0 {
        return Err(StoreError::NotEmpty { dir: dir.to_owned() });
    }
    let mut keys = vec![];
    for rollout in
        store.enqueue((0..settings.rollouts).map(|index| Ok(Arc::new(spec(index)?))).collect::<Result<_>>()?)?
    {
        let key = store.begin_attempt(&rollout.record().spec.id, 1, "")?.key;
        store.mark_running(&key)?;
        keys.push(key);
    }
    let mut taken = Duration::ZERO;
    for commit in 0..settings.commits {
        let appends = commit_of(&keys, settings, commit);
        let start = Instant::now();
        for result in store.append_many(&appends) {
            result?;
        }
        taken += start.elapsed();
    }
    let statistics = store.statistics()?;
    drop(store);

    let mut bare = bare_sled::BareSled::open(&dir.join("bare-sled"))?;
    let mut sled_taken = Duration::ZERO;
    for commit in 0..settings.commits {
        let mut entries = Vec::with_capacity(keys.len());
        for (rollout, (_, spans)) in (0_u64..).zip(commit_of(&keys, settings, commit)) {
            for span in spans {
                let key = [rollout.to_be_bytes(), span.sequence.to_be_bytes()].concat();
                entries.push((key, codec::encode(&span)?));
            }
        }
        let start = Instant::now();
        bare.commit(entries)?;
        sled_taken += start.elapsed();
    }
    Ok(BenchmarkReport {
        spans: statistics.spans,
        span_bytes: statistics.span_bytes as f64 / statistics.spans.max(1) as f64,
        spans_per_second: per_second(statistics.spans, taken),
        sync_p50_us: statistics.syncs.p50_us,
        sync_p99_us: statistics.syncs.p99_us,
        sync_max_us: statistics.syncs.max_us,
        disk_bytes: statistics.disk_bytes.unwrap_or(0),
        sled_spans_per_second: per_second(settings.spans(), sled_taken),
        sled_disk_bytes: bare.disk_bytes()?,
    })
}
