//! `fulgurite bench sandbox`: rollouts a second, beside the same component on bare wasmtime.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use fulgurite_runner::Recording;
use fulgurite_store::{MemoryStore, RolloutStore, SledStore};
use futures::StreamExt;
use serde::{Deserialize, Serialize};

use crate::arguments::{BenchMode, BenchSandboxArguments, Output};
use crate::bench::load::{ANSWER, Components, Load, LoadSettings, Scratch, question, sandbox};
use crate::bench::{measured, setup};
use crate::failure::Failure;
use crate::{terminal, train};

/// Rollouts that are run before the clock starts.
const WARM_UP: u64 = 512;
/// Rollouts that are handed to the runner at once.
const SLICE_MAX: usize = 4_096;
/// At least so many: each slice is made durable before it starts.
const SLICE_MIN: usize = 512;
/// How many times the shortest measurement goes over all live slots.
const ROUNDS: u64 = 6;

/// One measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Measured {
    rollouts: u64,
    failed: u64,
    seconds: f64,
    p50_us: u64,
    p99_us: u64,
    rss_bytes: u64,
}

impl Measured {
    fn rate(&self) -> f64 {
        self.rollouts as f64 / self.seconds.max(1e-9)
    }
}

/// A line of the result.
#[derive(Debug, Clone, Serialize)]
struct Row {
    mode: &'static str,
    live: usize,
    latency_ms: u64,
    rollouts: u64,
    rollouts_per_second: f64,
    bare_rollouts_per_second: f64,
    ratio: f64,
    rss_bytes: u64,
    bare_rss_bytes: u64,
    p50_us: u64,
    p99_us: u64,
    failed: u64,
}

pub(crate) fn bench(arguments: &BenchSandboxArguments) -> Result<(), Failure> {
    if let Some(mode) = arguments.measure {
        return measure(arguments, mode);
    }
    let mut rows = vec![];
    let scaling = (single(arguments, BenchMode::Bare, 64, 0, 1)?, single(arguments, BenchMode::Bare, 64, 0, 2)?);
    let scaling = scaling.1.rate() / scaling.0.rate().max(1e-9);
    if arguments.load.output == Output::Text {
        terminal::print(&format!("{}", setup(arguments.load.threads)));
        terminal::print(&format!("bare wasmtime, two threads over one: {scaling:.2}"));
        terminal::print(
            "mode         live  wait ms   rollouts/s       bare/s  ratio   RSS MiB  bare MiB    p50 us    p99 us  failed",
        );
    }
    for latency_ms in &arguments.latency_ms {
        for live in &arguments.live {
            for mode in [BenchMode::Unrecorded, BenchMode::Recorded] {
                // The baseline runs again beside every figure: other work on the machine comes and goes.
                let bare = single(arguments, BenchMode::Bare, *live, *latency_ms, arguments.load.threads)?;
                let ours = single(arguments, mode, *live, *latency_ms, arguments.load.threads)?;
                let row = Row {
                    mode: mode.as_str(),
                    live: *live,
                    latency_ms: *latency_ms,
                    rollouts: ours.rollouts,
                    rollouts_per_second: ours.rate(),
                    bare_rollouts_per_second: bare.rate(),
                    ratio: ours.rate() / bare.rate().max(1e-9),
                    rss_bytes: ours.rss_bytes,
                    bare_rss_bytes: bare.rss_bytes,
                    p50_us: ours.p50_us,
                    p99_us: ours.p99_us,
                    failed: ours.failed + bare.failed,
                };
                if arguments.load.output == Output::Text {
                    print(&row);
                }
                rows.push(row);
            }
        }
    }
    if arguments.load.output == Output::Json {
        train::print_json(&serde_json::json!({
            "setup": setup(arguments.load.threads),
            "bare_two_threads_over_one": scaling,
            "results": rows,
        }))?;
    }
    Ok(())
}

fn print(row: &Row) {
    let mib = |bytes: u64| bytes >> 20;
    terminal::print(&format!(
        "{:<11} {:>5} {:>8} {:>12.0} {:>12.0} {:>6.2} {:>9} {:>9} {:>9} {:>9} {:>7}",
        row.mode,
        row.live,
        row.latency_ms,
        row.rollouts_per_second,
        row.bare_rollouts_per_second,
        row.ratio,
        mib(row.rss_bytes),
        mib(row.bare_rss_bytes),
        row.p50_us,
        row.p99_us,
        row.failed
    ));
}

/// One measurement in a process of its own.
fn single(
    arguments: &BenchSandboxArguments,
    mode: BenchMode,
    live: usize,
    latency_ms: u64,
    threads: usize,
) -> Result<Measured, Failure> {
    let text = |value: &dyn ToString| value.to_string();
    let rollouts = arguments.rollouts.unwrap_or_else(|| rollouts(live, latency_ms));
    eprintln!("measuring {} with {live} live and {latency_ms} ms per call: {rollouts} rollouts", mode.as_str());
    let mut list = vec!["sandbox".to_owned(), "--measure".to_owned(), mode.as_str().to_owned()];
    let agent = arguments.load.agent.display().to_string();
    let grader = arguments.load.grader.display().to_string();
    let numbers = [text(&live), text(&latency_ms), text(&rollouts), text(&threads)];
    let [live, latency_ms, rollouts, threads] = numbers;
    for (name, value) in [
        ("--live", live),
        ("--latency-ms", latency_ms),
        ("--rollouts", rollouts),
        ("--threads", threads),
        ("--agent", agent),
        ("--grader", grader),
    ] {
        list.extend([name.to_owned(), value]);
    }
    if let Some(scratch) = &arguments.load.scratch {
        list.extend(["--scratch".to_owned(), scratch.display().to_string()]);
    }
    measured(&list)
}

/// Enough rollouts for some seconds.
fn rollouts(live: usize, latency_ms: u64) -> u64 {
    let live = live as u64;
    if latency_ms == 0 { (live * ROUNDS).clamp(if live == 1 { 20_000 } else { 60_000 }, 80_000) } else { live * ROUNDS }
}

fn measure(arguments: &BenchSandboxArguments, mode: BenchMode) -> Result<(), Failure> {
    let one = |list: &[usize]| list.first().copied().unwrap_or(1);
    let (live, latency_ms) = (one(&arguments.live), arguments.latency_ms.first().copied().unwrap_or(0));
    let rollouts = arguments.rollouts.unwrap_or_else(|| rollouts(live, latency_ms));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(arguments.load.threads).enable_all().build();
    let runtime = runtime.map_err(Failure::failed)?;
    let components = Components::of(&arguments.load);
    let measured = runtime.block_on(async {
        if mode == BenchMode::Bare {
            bare(&components, live, Duration::from_millis(latency_ms), rollouts).await
        } else {
            ours(arguments, &components, mode, live, latency_ms, rollouts).await
        }
    })?;
    train::print_json(&measured)
}

async fn bare(components: &Components, live: usize, latency: Duration, rollouts: u64) -> Result<Measured, Failure> {
    let agent = Arc::new(sandbox(live)?.load_bare_agent(&components.agent, ANSWER).map_err(Failure::failed)?);
    let inputs: Vec<Arc<str>> =
        (0..64).map(|index| serde_json::json!({ "question": question(index) }).to_string().into()).collect();
    let run = |count: u64| {
        let (agent, inputs) = (&agent, &inputs);
        futures::stream::iter(0..count)
            .map(move |index| {
                let agent = Arc::clone(agent);
                let input = inputs.get(usize::try_from(index % 64).unwrap_or(0)).map_or_else(|| "".into(), Arc::clone);
                tokio::spawn(async move {
                    let started = Instant::now();
                    agent.run(&input, latency).await.then(|| started.elapsed())
                })
            })
            .buffer_unordered(live)
            .map(|ended| ended.ok().flatten())
            .collect::<Vec<Option<Duration>>>()
    };
    run(WARM_UP.min(rollouts)).await;
    let started = Instant::now();
    let ended = run(rollouts).await;
    Ok(summary(started.elapsed(), ended.into_iter().map(|ended| ended.map(micros)).collect()))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

async fn ours(
    arguments: &BenchSandboxArguments,
    components: &Components,
    mode: BenchMode,
    live: usize,
    latency_ms: u64,
    rollouts: u64,
) -> Result<Measured, Failure> {
    let recorded = mode == BenchMode::Recorded;
    let scratch = Scratch::new(arguments.load.scratch.as_deref().unwrap_or(&std::env::temp_dir()))?;
    let store: Arc<dyn RolloutStore> = if recorded {
        Arc::new(SledStore::open(&scratch.path().join("store")).map_err(Failure::failed)?)
    } else {
        Arc::new(MemoryStore::new())
    };
    let settings = LoadSettings {
        live_max: live,
        latency_ms,
        graded: recorded,
        recording: if recorded { Recording::Durable } else { Recording::Nothing },
    };
    let load = Load::new(components, store, &settings)?;
    if load.runner.live_max() < live {
        return Err(Failure::failed(anyhow!("this machine bears {} live attempts", load.runner.live_max()))
            .hint("raise vm.max_map_count"));
    }
    let warm_up = WARM_UP.min(rollouts);
    drive(&load, 0..warm_up, live).await?;
    let started = Instant::now();
    let ended = drive(&load, warm_up..warm_up + rollouts, live).await?;
    Ok(summary(started.elapsed(), ended))
}

/// Runs rollouts of these numbers so that there are always enough to fill all live slots. Returns how long each took in
/// microseconds; `None` for those that failed.
async fn drive(load: &Load, numbers: std::ops::Range<u64>, live: usize) -> Result<Vec<Option<u64>>, Failure> {
    let slice = live.clamp(SLICE_MIN, SLICE_MAX) as u64;
    let ahead = live.div_ceil(SLICE_MAX) + 2;
    let mut starts = (numbers.start..numbers.end).step_by(usize::try_from(slice).unwrap_or(usize::MAX));
    let mut under_way = futures::stream::SelectAll::new();
    let mut ended = vec![];
    loop {
        while under_way.len() < ahead
            && let Some(start) = starts.next()
        {
            let jobs = load.jobs(start..(start + slice).min(numbers.end))?;
            let batch = load.runner.submit(jobs, Arc::clone(&load.backend)).await.map_err(Failure::failed)?;
            // Results are taken as they come: nothing but their times is kept.
            under_way
                .push(Box::pin(futures::stream::unfold(batch, async |mut batch| Some((batch.next().await?, batch)))));
        }
        let Some(next) = under_way.next().await else { return Ok(ended) };
        let (_, result) = next.map_err(Failure::failed)?;
        let took_ns = result.attempt.end_unix_ns.saturating_sub(result.attempt.start_unix_ns);
        ended.push(result.is_graded().then_some(took_ns / 1_000));
    }
}

fn summary(took: Duration, ended: Vec<Option<u64>>) -> Measured {
    let rollouts = ended.len() as u64;
    let mut times: Vec<u64> = ended.into_iter().flatten().collect();
    times.sort_unstable();
    let at = |share: f64| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place in a list")]
        let place = (times.len() as f64 * share) as usize;
        times.get(place.min(times.len().saturating_sub(1))).copied().unwrap_or(0)
    };
    Measured {
        rollouts,
        failed: rollouts - times.len() as u64,
        seconds: took.as_secs_f64(),
        p50_us: at(0.5),
        p99_us: at(0.99),
        rss_bytes: peak_rss_bytes(),
    }
}

/// The most memory that this process has had in use.
pub(crate) fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1_024
}
