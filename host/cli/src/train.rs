//! `fulgurite train` and `fulgurite run`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use fulgurite_trainer::config::RunConfig;
use fulgurite_trainer::{RunOptions, TrainError, TrainOptions};
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
    let progress = Arc::new(TerminalProgress::new());
    let mut training = Box::pin(fulgurite_trainer::train(config, options, progress, stopped));
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
