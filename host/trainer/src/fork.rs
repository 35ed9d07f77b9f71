//! Forking recorded rollouts from outside a training run.

use std::path::PathBuf;
use std::sync::Arc;

use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
use fulgurite_core::record::RolloutSpec;
use fulgurite_policy::PolicyEngine;
use fulgurite_runner::fork::{event_of_call, fork_point, lineage};
use fulgurite_runner::{Job, RolloutResult};

use crate::config::RunConfig;
use crate::error::TrainError;
use crate::progress::{ProgressEvent, ProgressSink};
use crate::run_directory::RunDirectory;
use crate::setup::Setup;

/// What to fork.
#[derive(Debug, Clone)]
pub struct ForkOptions {
    /// The run's folder.
    pub run: PathBuf,
    /// The rollout.
    pub rollout: RolloutId,
    /// Which attempt of it; the newest when none is named.
    pub attempt: Option<AttemptNumber>,
    /// The first model call (from 0) that is made anew.
    pub call: u64,
    /// How many forks.
    pub count: u64,
    /// Weights that make the calls, a folder under `policies/`; `None`: what the config says.
    pub policy: Option<PathBuf>,
    /// Folder of compiled components.
    pub cache: Option<PathBuf>,
}

/// Runs a rollout again up to a model call and lets it go on from there, several times, with new seeds.
///
/// # Errors
/// When the rollout cannot be forked there, or the run fails: see [`TrainError`].
pub async fn fork(
    mut config: RunConfig,
    options: ForkOptions,
    progress: Arc<dyn ProgressSink>,
) -> Result<Vec<RolloutResult>, TrainError> {
    config.stage.clear();
    config.control.clear();
    let setup = Setup::new(config, RunDirectory::new(&options.run), options.cache.clone()).await?;
    if let (Some(path), Some(engine)) = (&options.policy, setup.model.engine()) {
        engine.restore(path).await?;
    }
    let version = setup.model.engine().map(PolicyEngine::version).unwrap_or_default();
    let store = Arc::clone(setup.runner.store());
    let failed = |problem: String| TrainError::Fork { rollout: options.rollout.clone(), problem };
    let ancestor = store.rollout(&options.rollout)?.ok_or_else(|| failed("there is no such rollout".to_owned()))?;
    let attempt = options.attempt.or(ancestor.attempt).ok_or_else(|| failed("it has not begun".to_owned()))?;
    let key = AttemptKey { rollout: options.rollout.clone(), attempt };
    let events = lineage(&*store, &key).map_err(failed)?;
    let event = event_of_call(&events.spans, options.call).map_err(failed)?;
    let point = fork_point(&*store, &options.rollout, Some(attempt), event).map_err(failed)?;
    let bytes = store.blob(&ancestor.spec.item)?.ok_or_else(|| failed("its item was not kept".to_owned()))?;
    let item: DatasetItem = serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))?;
    let item = Arc::new(item);
    let mut jobs = vec![];
    let mut number = 0;
    while (jobs.len() as u64) < options.count {
        let id = RolloutId::new(format!("{}.{}.{number}", options.rollout, options.call))
            .map_err(|error| failed(format!("its forks have no id: {error}")))?;
        // Forks of the same call add up.
        if store.rollout(&id)?.is_none() {
            let spec = RolloutSpec {
                id,
                stage: "fork".to_owned(),
                seed: ancestor.spec.seed.child("fork").child_index(options.call).child_index(number),
                policy_version: version,
                components: setup.runner.plugins().hashes(),
                item: item.texts().hash,
                execution: setup.runner.execution_hash(),
                fork_of: Some(point.clone()),
                ..(*ancestor.spec).clone()
            };
            jobs.push(Job { spec: spec.into(), item: Arc::clone(&item) });
        }
        number += 1;
    }
    progress.event(ProgressEvent::EvaluationStarted {
        label: "fork".to_owned(),
        kind: "fork",
        rollouts: options.count,
    });
    let batch = setup.runner.submit(jobs, setup.model.backend()).await?;
    Ok(batch.all().await?)
}
