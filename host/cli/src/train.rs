//! `fulgurite train` and `fulgurite run`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, anyhow};
use fulgurite_trainer::config::RunConfig;
use fulgurite_trainer::{Estimate, RunDirectory, RunOptions, TrainError, TrainOptions};
use indicatif::HumanBytes;
use tokio::sync::watch;

use crate::arguments::{Output, RunArguments, TrainArguments};
use crate::failure::Failure;
use crate::progress::TerminalProgress;
use crate::{paths, table, terminal};

pub(crate) async fn train(arguments: TrainArguments) -> Result<(), Failure> {
    let mut config = RunConfig::load(&arguments.config)?;
    config.seed = arguments.seed.unwrap_or(config.seed);
    if let Some(device) = arguments.device {
        let local = config.policy.local.as_mut().ok_or_else(|| {
            Failure::usage(anyhow!(
                "`--device` is {device}, and `{}` has no [policy.local]",
                arguments.config.display()
            ))
        })?;
        local.model.device = device;
    }
    let run = arguments.run.unwrap_or_else(|| default_run(&config));
    let (stop, stopped) = watch::channel(false);
    let options = TrainOptions { run: run.clone(), resume: arguments.resume, cache: paths::cache() };
    let is_new = !arguments.resume && !RunDirectory::new(&run).config().exists();
    let training = async {
        let estimate =
            if is_new && !arguments.no_estimate { announce(&config, &run, stopped.clone()).await? } else { None };
        let started = Instant::now();
        fulgurite_trainer::forget_peak_memory();
        let progress = Arc::new(TerminalProgress::new());
        let result = Box::pin(fulgurite_trainer::train(config, options, progress, stopped)).await?;
        let (seconds, memory_bytes) = (started.elapsed().as_secs_f64(), fulgurite_trainer::peak_memory_bytes());
        let took = shown(seconds, memory_bytes);
        match estimate {
            Some(estimate) => eprintln!(
                "took {took} (estimated {}: {} and {})",
                shown(estimate.seconds, estimate.memory_bytes),
                off(estimate.seconds, seconds),
                off(estimate.memory_bytes as f64, memory_bytes as f64),
            ),
            None => eprintln!("took {took}"),
        }
        Ok(result)
    };
    let mut training = Box::pin(training);
    let result = tokio::select! {
        result = &mut training => result,
        _ = tokio::signal::ctrl_c() => {
            eprintln!("stopping; the last checkpoint stays (Ctrl-C again to stop at once)");
            stop.send_replace(true);
            tokio::select! {
                result = &mut training => result,
                _ = tokio::signal::ctrl_c() => Err(TrainError::Stopped),
            }
        }
    };
    let result = result.map_err(Failure::from)?;
    match arguments.output {
        Output::Text => terminal::print(&table::of_run(&result, terminal::colours())),
        Output::Json => print_json(&result)?,
    }
    Ok(())
}

/// Says what the run will take, before it begins.
async fn announce(
    config: &RunConfig,
    run: &Path,
    stopped: watch::Receiver<bool>,
) -> Result<Option<Estimate>, TrainError> {
    match fulgurite_trainer::estimate(config, run, paths::cache(), stopped).await? {
        Ok(estimate) => {
            let shown = shown(estimate.seconds, estimate.memory_bytes);
            eprintln!("this will take about {shown}, as a rehearsal of {:.0} s says", estimate.rehearsal_seconds);
            Ok(Some(estimate))
        }
        Err(reason) => {
            tracing::debug!(%reason, "no estimate");
            Ok(None)
        }
    }
}

fn shown(seconds: f64, memory_bytes: u64) -> String {
    format!("{} and {} of memory", fulgurite_trainer::shown_duration(seconds), HumanBytes(memory_bytes))
}

/// How far an estimate was from what came: `12 % less`.
fn off(estimated: f64, came: f64) -> String {
    let percent = 100.0 * (estimated / came.max(f64::MIN_POSITIVE) - 1.0);
    format!("{:.0} % {}", percent.abs(), if percent < 0.0 { "less" } else { "more" })
}

pub(crate) async fn run(arguments: RunArguments) -> Result<(), Failure> {
    let mut config = RunConfig::load(&arguments.config)?;
    config.seed = arguments.seed.unwrap_or(config.seed);
    if let Some(rollouts) = arguments.rollouts {
        config.evaluation.sampled_rollouts = rollouts;
        config.evaluation.greedy_rollouts = rollouts;
    }
    let run = arguments.run.unwrap_or_else(|| {
        let base = default_run(&config);
        paths::fresh(&base.with_file_name(format!("{}-run", base.file_name().unwrap_or_default().to_string_lossy())))
    });
    let options = RunOptions { run: run.clone(), policy: arguments.policy, cache: paths::cache() };
    let progress = Arc::new(TerminalProgress::new());
    let (stop, stopped) = watch::channel(false);
    let mut running = Box::pin(fulgurite_trainer::run(config, options, progress, stopped));
    let evaluation = tokio::select! {
        evaluation = &mut running => evaluation?,
        _ = tokio::signal::ctrl_c() => {
            eprintln!("stopping; what has begun goes on to its end and is recorded (Ctrl-C again to stop at once)");
            stop.send_replace(true);
            tokio::select! {
                evaluation = &mut running => evaluation?,
                _ = tokio::signal::ctrl_c() => return Err(TrainError::Stopped.into()),
            }
        }
    };
    match arguments.output {
        Output::Text => {
            terminal::print(&table::of_evaluation(&evaluation, &run.display().to_string(), terminal::colours()));
        }
        Output::Json => print_json(&serde_json::json!({"run": run, "evaluation": evaluation}))?,
    }
    Ok(())
}

fn default_run(config: &RunConfig) -> PathBuf {
    Path::new("runs").join(format!("{}-seed{}", config.name, config.seed))
}

pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value).context("cannot print the result as JSON").map_err(Failure::failed)?;
    terminal::print(&text);
    Ok(())
}
