//! `cargo xtask soak`: what takes too long for every change. Kills a process that writes to a store, and looks for everything
//! that it had acknowledged; fuzzes every target; then kills training at random moments and compares what comes out in the
//! end.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use fulgurite_core::seed::{Generator, Seed};

use crate::example::{self, Example, ExampleName};
use crate::process::{self, Workspace};

/// Options of `soak`.
#[derive(Debug, Args)]
pub(crate) struct SoakArguments {
    /// How many minutes to fuzz each target; 0 fuzzes none.
    #[arg(long, default_value_t = 10)]
    fuzz_minutes: u64,
    /// How often to kill training; 0 does not train.
    #[arg(long, default_value_t = 30)]
    kills: u32,
    /// How often to kill a process that writes to a store; 0 starts none.
    #[arg(long, default_value_t = 1_000)]
    store_kills: u32,
    /// Seed of the inputs and of the moments.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// How often to look whether a child has ended.
const POLL: Duration = Duration::from_millis(5);
/// Most kills of one run: then it may end.
const KILLS_PER_RUN_MAX: usize = 4;

/// Runs all parts and returns whether all passed: a failure of one does not keep from the next.
pub(crate) fn run(arguments: &SoakArguments) -> anyhow::Result<bool> {
    let stored = arguments.store_kills == 0 || {
        println!("==> {} kills of a process that writes to a store", arguments.store_kills);
        store(arguments.store_kills).inspect_err(|error| eprintln!("error: {error:#}")).is_ok()
    };
    let fuzzed = arguments.fuzz_minutes == 0 || fuzz(arguments)?;
    let trained = arguments.kills == 0 || kill(arguments)?;
    Ok(stored && fuzzed && trained)
}

/// Fuzzes every target for as long as asked, as many at a time as there are processors. What fails says how to repeat it.
fn fuzz(arguments: &SoakArguments) -> anyhow::Result<bool> {
    println!("==> fuzz targets, {} min each, seed {}", arguments.fuzz_minutes, arguments.seed);
    let mut command = Workspace::load()?.cargo();
    command.args(["test", "--release", "--package", "fulgurite-fuzz", "--test", "targets", "--", "--nocapture"]);
    command.env("FULGURITE_FUZZ_SECONDS", arguments.fuzz_minutes.saturating_mul(60).to_string());
    command.env("FULGURITE_FUZZ_SEED", arguments.seed.to_string());
    command.env_remove("FULGURITE_FUZZ_INPUT");
    let passed = command.status().with_context(|| format!("cannot run `{}`", process::shown(&command)))?.success();
    println!("{}: fuzz targets", if passed { "PASS" } else { "FAIL" });
    Ok(passed)
}

/// Kills as often as asked and returns whether every run came to the same end as one that was left alone.
fn kill(arguments: &SoakArguments) -> anyhow::Result<bool> {
    let example = Example::build(ExampleName::Rooms)?;
    let folder = example.scratch("soak");
    let config = folder.join("soak.toml");
    example.variant(&config, shorten)?;

    println!("==> one run that is left alone");
    let start = Instant::now();
    let alone = folder.join("alone");
    example.result(&config, 0, &alone)?;
    let whole = start.elapsed();
    let expected = end_of(&alone)?;
    println!("it took {:.1} s", whole.as_secs_f64());

    let mut generator = Generator::new(Seed::new(arguments.seed).child("soak"));
    let (mut kills, mut runs, mut failures) = (0, 0, vec![]);
    while kills < arguments.kills {
        runs += 1;
        let run = folder.join("killed");
        if run.exists() {
            std::fs::remove_dir_all(&run).with_context(|| format!("cannot empty `{}`", run.display()))?;
        }
        let planned = 1 + generator.below(KILLS_PER_RUN_MAX);
        let mut moments = vec![];
        for _ in 0..planned {
            let span = usize::try_from(whole.as_millis()).unwrap_or(usize::MAX);
            let moment = Duration::from_millis(generator.below(span) as u64);
            if killed(&mut start_or_resume(&example, &config, &run)?, moment)? {
                kills += 1;
                moments.push(format!("{:.2} s", moment.as_secs_f64()));
            }
        }
        finish(&example, &config, &run)?;
        let same = end_of(&run)? == expected;
        println!(
            "run {runs}: killed after {}: {}",
            moments.join(", "),
            if same { "same end" } else { "DIFFERENT END" }
        );
        if !same {
            let kept = folder.join(format!("different-{runs}"));
            std::fs::rename(&run, &kept).with_context(|| format!("cannot keep `{}`", kept.display()))?;
            failures.push(kept);
        }
    }
    for kept in &failures {
        println!("DIFFERENT: {}", kept.display());
    }
    println!("{}: {kills} kills in {runs} runs", if failures.is_empty() { "PASS" } else { "FAIL" });
    Ok(failures.is_empty())
}

/// The store's own test, with more kills than it takes by itself. It prints how many, and fails when anything is lost.
fn store(kills: u32) -> anyhow::Result<()> {
    let mut command = Workspace::load()?.cargo();
    command.args(["test", "--release", "--package", "fulgurite-store", "--test", "crash", "--"]);
    command.args(["--exact", "what_was_acknowledged_survives_kill_9", "--nocapture"]);
    process::run(command.env("FULGURITE_STORE_KILLS", kills.to_string()))
}

/// Some steps of each stage are enough to be killed in each of them.
fn shorten(config: &mut toml::Table) {
    config.remove("control");
    config.remove("baseline");
    if let Some(evaluation) = config.get_mut("evaluation").and_then(toml::Value::as_table_mut) {
        evaluation.insert("sampled_rollouts".to_owned(), 64.into());
        evaluation.insert("greedy_rollouts".to_owned(), 64.into());
    }
    for (name, steps) in [("sft", 20), ("grpo", 12)] {
        if let Some(stage) = example::stage(config, name) {
            stage.insert("steps".to_owned(), steps.into());
        }
    }
    let checkpoint = toml::Table::from_iter([("every_steps".to_owned(), 2.into())]);
    config.insert("checkpoint".to_owned(), checkpoint.into());
}

fn start_or_resume(example: &Example, config: &Path, run: &Path) -> anyhow::Result<Child> {
    let mut command = example.train(config, 0, run);
    // A run that was killed before it had written its config has not begun.
    if run.join("config.toml").is_file() {
        command.arg("--resume");
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().context("cannot start `fulgurite train`")
}

/// Waits until the moment and kills; false when the child had ended before.
fn killed(child: &mut Child, moment: Duration) -> anyhow::Result<bool> {
    let start = Instant::now();
    while start.elapsed() < moment {
        if child.try_wait().context("cannot wait for training")?.is_some() {
            return Ok(false);
        }
        std::thread::sleep(POLL);
    }
    child.kill().context("cannot kill training")?;
    child.wait().context("cannot wait for training")?;
    Ok(true)
}

fn finish(example: &Example, config: &Path, run: &Path) -> anyhow::Result<()> {
    if run.join("result.json").is_file() {
        return Ok(());
    }
    let status = start_or_resume(example, config, run)?.wait().context("cannot wait for training")?;
    if !status.success() {
        bail!("resuming `{}` failed: {status}", run.display());
    }
    Ok(())
}

/// What must not depend on kills: every number of every step, and the weights at the end of every stage.
fn end_of(run: &Path) -> anyhow::Result<(Vec<u8>, Vec<String>)> {
    let read = |name: &str| {
        let path = run.join(name);
        std::fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))
    };
    let result: serde_json::Value = serde_json::from_slice(&read("result.json")?).context("result.json is not JSON")?;
    let stages = result.get("stages").and_then(serde_json::Value::as_array).context("result.json has no stages")?;
    let weights = stages.iter().map(|stage| stage.get("weights").map(ToString::to_string).unwrap_or_default());
    Ok((read("metrics.jsonl")?, weights.collect()))
}
