//! Measures the store on this machine's disk: durable spans and durable rollouts per second.
//!
//! `cargo run --release -p fulgurite-store --example throughput [DIR]`

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use fulgurite_core::dataset::Split;
use fulgurite_core::id::{AttemptKey, ContentHash, PolicyVersion, RolloutId, SpanId, TraceId};
use fulgurite_core::llm::Sampling;
use fulgurite_core::outcome::AttemptOutcome;
use fulgurite_core::record::{RolloutMode, RolloutSpec};
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::seed::Seed;
use fulgurite_core::span::{Span, SpanBody, SpanKind, SpanStatus};
use fulgurite_core::state::{AttemptState, RolloutState};
use fulgurite_store::{AttemptFinish, RolloutStore, SledStore};

/// What the binary uses.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Attempts in one commit.
const BATCH: u64 = 64;

fn spec(run: &str, index: u64) -> Outcome<RolloutSpec> {
    Ok(RolloutSpec {
        id: RolloutId::derived(run, index / 128, index % 128)?,
        stage: run.to_owned(),
        step: index / 128,
        group: index / 8,
        dataset: "rooms".to_owned(),
        split: Split::Train,
        item_id: format!("item-{index}"),
        mode: RolloutMode::Train,
        seed: Seed::new(index),
        sampling: Sampling::default(),
        policy_version: PolicyVersion(1),
        resources_version: 0,
        components: vec![ContentHash::of(b"agent"), ContentHash::of(b"grader"), ContentHash::of(b"tool")],
        fork_of: None,
    })
}

/// A span that takes about `bytes` on disk.
fn span(key: &AttemptKey, sequence: u64, bytes: usize) -> Span {
    // What everything but the text takes.
    const OTHER_BYTES: usize = 85;
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
        body: SpanBody::Log { level: "info".to_owned(), text: "x".repeat(bytes.saturating_sub(OTHER_BYTES)) },
    }
}

fn finish(key: AttemptKey, spans: Vec<Span>) -> AttemptFinish {
    let reward = Reward {
        dimension: "reward".to_owned(),
        value: 1.0,
        feedback: None,
        source: RewardSource::Grader,
        component: Some(ContentHash::of(b"grader")),
        call_index: None,
    };
    AttemptFinish {
        key,
        state: AttemptState::Succeeded,
        outcome: AttemptOutcome::completed("{}".to_owned()),
        rewards: vec![reward],
        end_unix_ns: u64::MAX,
        guest_cpu_us: 100,
        spans,
        rollout_state: RolloutState::Succeeded,
    }
}

/// CPU time of this process so far, all threads, in microseconds; 0 where that is not known.
fn cpu_us() -> f64 {
    let Ok(text) = std::fs::read_to_string("/proc/self/stat") else { return 0.0 };
    let after_name = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let ticks: u64 = after_name.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    // A tick is 10 ms.
    ticks as f64 * 1e4
}

/// Runs rollouts from their enqueueing to their end, in batches; the time of making the records is not counted.
fn run(store: &SledStore, name: &str, rollouts: u64, spans_each: u64, span_bytes: usize) -> Outcome<()> {
    let before = store.statistics()?;
    let mut taken = Duration::ZERO;
    let mut finishing = Duration::ZERO;
    let cpu_before = cpu_us();
    for batch in 0..rollouts / BATCH {
        let specs = (batch * BATCH..(batch + 1) * BATCH).map(|index| spec(name, index)).collect::<Outcome<Vec<_>>>()?;
        let ids: Vec<RolloutId> = specs.iter().map(|spec| spec.id.clone()).collect();
        let start = Instant::now();
        store.enqueue(specs)?;
        let mut keys = vec![];
        for id in &ids {
            let key = store.begin_attempt(id, 1)?.key;
            store.mark_running(&key)?;
            keys.push(key);
        }
        taken += start.elapsed();
        let finishes = keys
            .into_iter()
            .map(|key| {
                let spans = (0..spans_each).map(|sequence| span(&key, sequence, span_bytes)).collect();
                finish(key, spans)
            })
            .collect();
        let start = Instant::now();
        for result in store.finish_attempts(finishes) {
            result?;
        }
        taken += start.elapsed();
        finishing += start.elapsed();
    }
    let after = store.statistics()?;
    let spans = after.spans - before.spans;
    let bytes = after.span_bytes - before.span_bytes;
    println!(
        "{name:>9}: {rollouts} rollouts of {spans_each} spans of {} B: {:.0} rollouts/s, {:.0} spans/s while finishing, {:.0} us CPU per rollout, {:.0} MB recorded, {:.0} MB on disk",
        bytes / spans.max(1),
        rollouts as f64 / taken.as_secs_f64(),
        spans as f64 / finishing.as_secs_f64(),
        (cpu_us() - cpu_before) / rollouts as f64,
        bytes as f64 / 1e6,
        (after.disk_bytes.unwrap_or(0) - before.disk_bytes.unwrap_or(0)) as f64 / 1e6,
    );
    Ok(())
}

/// Several threads append to attempts of their own.
fn append(store: &SledStore, threads: u64, appends: u64, spans_each: u64, span_bytes: usize) -> Outcome<()> {
    let mut work = vec![];
    for thread in 0..threads {
        let name = format!("append-{threads}-{span_bytes}-{thread}");
        let specs = (0..64 / threads).map(|index| spec(&name, index)).collect::<Outcome<Vec<_>>>()?;
        let mut mine = vec![];
        for rollout in store.enqueue(specs)? {
            let key = store.begin_attempt(&rollout.record().spec.id, 1)?.key;
            store.mark_running(&key)?;
            let lists: Vec<Vec<Span>> = (0..appends)
                .map(|part| (0..spans_each).map(|n| span(&key, part * spans_each + n, span_bytes)).collect())
                .collect();
            mine.push((key, lists));
        }
        work.push(mine);
    }
    let (start, cpu_before) = (Instant::now(), cpu_us());
    std::thread::scope(|scope| -> Outcome<()> {
        let handles: Vec<_> = work
            .iter()
            .map(|mine| {
                scope.spawn(move || {
                    for part in 0..appends {
                        for (key, lists) in mine {
                            let list = lists.get(usize::try_from(part).unwrap_or(0)).map_or(&[][..], Vec::as_slice);
                            store.append_spans(key, list)?;
                        }
                    }
                    Ok::<(), fulgurite_store::StoreError>(())
                })
            })
            .collect();
        for handle in handles {
            handle.join().map_err(|_| "a thread panicked")??;
        }
        Ok(())
    })?;
    let spans = 64 * appends * spans_each;
    println!(
        "   append: {threads} threads, 64 rollouts interleaved, {spans_each} spans of {span_bytes} B each time: {:.0} spans/s, {:.1} us CPU per span",
        spans as f64 / start.elapsed().as_secs_f64(),
        (cpu_us() - cpu_before) / spans as f64,
    );
    Ok(())
}

/// One thread appends to many attempts in each commit.
fn append_many(store: &SledStore, rounds: u64, spans_each: u64, span_bytes: usize) -> Outcome<()> {
    let name = format!("many-{spans_each}-{span_bytes}");
    let specs = (0..BATCH).map(|index| spec(&name, index)).collect::<Outcome<Vec<_>>>()?;
    let mut keys = vec![];
    for rollout in store.enqueue(specs)? {
        keys.push(store.begin_attempt(&rollout.record().spec.id, 1)?.key);
    }
    let (mut taken, cpu_before) = (Duration::ZERO, cpu_us());
    for round in 0..rounds {
        let list = |key: &AttemptKey| (0..spans_each).map(|n| span(key, round * spans_each + n, span_bytes)).collect();
        let appends: Vec<(AttemptKey, Vec<Span>)> = keys.iter().map(|key| (key.clone(), list(key))).collect();
        let start = Instant::now();
        for result in store.append_many(&appends) {
            result?;
        }
        taken += start.elapsed();
    }
    let spans = rounds * BATCH * spans_each;
    println!(
        "     many: {BATCH} rollouts in one commit, {spans_each} spans of {span_bytes} B each: {:.0} spans/s, {:.1} us CPU per span",
        spans as f64 / taken.as_secs_f64(),
        (cpu_us() - cpu_before) / spans as f64,
    );
    Ok(())
}

fn main() -> Outcome<()> {
    let temporary = tempfile::tempdir()?;
    let dir = std::env::args().nth(1).map_or_else(|| temporary.path().to_owned(), PathBuf::from);
    let store = SledStore::open(&dir)?;
    run(&store, "warm-up", 1_024, 4, 320)?;
    run(&store, "small", 16_384, 4, 320)?;
    run(&store, "medium", 4_096, 64, 320)?;
    run(&store, "large", 2_048, 64, 1_536)?;
    append(&store, 1, 16, 100, 320)?;
    append(&store, 4, 16, 100, 320)?;
    append(&store, 16, 16, 12, 320)?;
    append(&store, 4, 8, 64, 1_536)?;
    append_many(&store, 200, 12, 320)?;
    append_many(&store, 50, 12, 1_536)?;
    drop(store);
    let start = Instant::now();
    let store = SledStore::open(&dir)?;
    let opened = start.elapsed();
    let start = Instant::now();
    let rollouts = store.rollouts(&fulgurite_store::RolloutQuery::default())?;
    println!("   reopen: {opened:.1?}; all {} rollouts listed in {:.1?}", rollouts.len(), start.elapsed());
    let start = Instant::now();
    let mut spans = 0;
    for rollout in &rollouts {
        if let Some(attempt) = rollout.attempt {
            spans += store.spans(&AttemptKey { rollout: rollout.spec.id.clone(), attempt })?.len();
        }
    }
    println!("     read: {spans} spans, {:.0} spans/s", spans as f64 / start.elapsed().as_secs_f64());
    Ok(())
}
