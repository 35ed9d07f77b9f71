//! Rollouts and evaluation without training.

use std::path::PathBuf;
use std::sync::Arc;

use fulgurite_policy::PolicyEngine;
use fulgurite_runner::RunnerError;
use tokio::sync::watch;

use crate::config::RunConfig;
use crate::error::TrainError;
use crate::evaluate::Evaluation;
use crate::pinned_policy::PinnedPolicy;
use crate::progress::ProgressSink;
use crate::run_directory::{RunDirectory, write_atomically};
use crate::setup::Setup;

/// How to run.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// The run's folder. Rollouts that it already holds are not run again.
    pub run: PathBuf,
    /// Weights to evaluate, a folder under `policies/` of a training run; `None`: what the config says (random weights,
    /// those of a folder, a server's model, or a script).
    pub policy: Option<PathBuf>,
    /// Folder of compiled components.
    pub cache: Option<PathBuf>,
}

/// Evaluates the config's policy on the held-out items, sampled and greedy, and records every rollout.
///
/// # Errors
/// See [`TrainError`].
pub async fn run(
    mut config: RunConfig,
    options: RunOptions,
    progress: Arc<dyn ProgressSink>,
    stop: watch::Receiver<bool>,
) -> Result<Evaluation, TrainError> {
    // Nothing is trained here, so algorithms need not be built.
    config.stage.clear();
    config.control.clear();
    let run = RunDirectory::new(&options.run);
    std::fs::create_dir_all(run.root()).map_err(TrainError::io(run.root()))?;
    let text = toml::to_string(&config).unwrap_or_default();
    write_atomically(&run.config(), text.as_bytes()).map_err(TrainError::io(run.config()))?;
    let setup = Setup::new(config, run, options.cache, None).await?;
    if let Some(engine) = setup.model.engine() {
        PinnedPolicy::of(engine).keep(&setup.run)?;
    }
    if let (Some(path), Some(engine)) = (&options.policy, setup.model.engine()) {
        engine.restore(path).await?;
    }
    let version = setup.model.engine().map(PolicyEngine::version).unwrap_or_default();
    let backend = setup.model.backend().await?;
    let evaluator = setup.evaluator(&*progress);
    let sampling = &setup.config.rollout.sampling;
    // When asked to stop, begin nothing more: what lives ends and is recorded, and the same command goes on from there.
    let runner = setup.runner.clone();
    let drain = tokio::spawn(async move {
        let mut stop = stop;
        if stop.wait_for(|stop| *stop).await.is_ok() {
            runner.drain();
        }
    });
    let found = evaluator.evaluate(setup.model.label(), sampling, &backend, version).await;
    drain.abort();
    let found = match found {
        Err(TrainError::Runner(RunnerError::Draining)) => return Err(TrainError::Drained { run: options.run }),
        found => found?,
    };
    let path = setup.run.result();
    let text = serde_json::to_vec_pretty(&found).unwrap_or_default();
    write_atomically(&path, &text).map_err(TrainError::io(&path))?;
    Ok(found)
}
