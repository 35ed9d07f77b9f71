//! Forking recorded rollouts from outside a training run.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
use fulgurite_core::record::RolloutSpec;
use fulgurite_policy::PolicyEngine;
use fulgurite_runner::fork::{event_of_call, fork_point, lineage};
use fulgurite_runner::{Job, RolloutResult};
use fulgurite_store::{RolloutStore, SledStore};

use crate::config::{ConfigError, PluginConfig, RunConfig, ToolConfig};
use crate::error::TrainError;
use crate::kept::kept_or_named;
use crate::progress::{ProgressEvent, ProgressSink};
use crate::replay::{Pinned, capabilities, execution};
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
    /// Weights that make the calls, a folder under `policies/`. `None`: those of the rollout's stage at its end, or of the last
    /// stage that has ended; those that the config begins with where nothing was trained.
    pub policy: Option<PathBuf>,
    /// Folder of compiled components.
    pub cache: Option<PathBuf>,
}

/// Runs a rollout again up to a model call and lets it go on from there, several times, with new seeds. It runs the
/// components that the rollout ran.
///
/// # Errors
/// When the rollout cannot be forked there, or the run fails: see [`TrainError`].
pub async fn fork(options: ForkOptions, progress: Arc<dyn ProgressSink>) -> Result<Vec<RolloutResult>, TrainError> {
    let run = RunDirectory::new(&options.run);
    let store: Arc<dyn RolloutStore> = Arc::new(SledStore::open(&run.store())?);
    let failed = |problem: String| TrainError::Fork { rollout: options.rollout.clone(), problem };
    let ancestor = store.rollout(&options.rollout)?.ok_or_else(|| failed("there is no such rollout".to_owned()))?;
    let attempt = options.attempt.or(ancestor.attempt).ok_or_else(|| failed("it has not begun".to_owned()))?;
    let key = AttemptKey { rollout: options.rollout.clone(), attempt };
    let events = lineage(&*store, &key).map_err(failed)?;
    let event = event_of_call(&events.spans, options.call).map_err(failed)?;
    let point = fork_point(&*store, &options.rollout, Some(attempt), event).map_err(failed)?;
    let config = {
        let (store, run, spec) = (Arc::clone(&store), run.clone(), ancestor.spec.clone());
        // Components and whole folders are read.
        let config = tokio::task::spawn_blocking(move || config_of(&*store, &run, &spec));
        config.await.map_err(|_| fulgurite_runner::RunnerError::WorkerLost)??
    };
    let weights = options.policy.clone().or_else(|| trained_weights(&run, &config, &ancestor.spec.stage));
    let config = without_stages(config);
    let setup = Setup::new(config, run, options.cache.clone(), Some(Arc::clone(&store))).await?;
    if let (Some(path), Some(engine)) = (&weights, setup.model.engine()) {
        engine.restore(path).await?;
    }
    let version = setup.model.engine().map(PolicyEngine::version).unwrap_or_default();
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
    let batch = setup.runner.submit(jobs, setup.model.backend().await?).await?;
    Ok(batch.all().await?)
}

/// Weights that the run has kept and that are nearest to those that a stage's rollouts were drawn with.
fn trained_weights(run: &RunDirectory, config: &RunConfig, stage: &str) -> Option<PathBuf> {
    let evaluated = stage.strip_prefix("eval-").and_then(|label| label.rsplit_once('-')).map(|(label, _)| label);
    let own = [Some(stage), evaluated].into_iter().flatten();
    own.chain(config.stage.iter().rev().map(|stage| stage.name.as_str()))
        .map(|name| run.policy(name))
        .find(|path| path.is_dir())
}

/// Nothing is trained, so that algorithms need not be there.
fn without_stages(mut config: RunConfig) -> RunConfig {
    config.stage.clear();
    config.control.clear();
    config
}

/// The run's config with the components that the ancestor ran, whatever has become of the files that it names. What tools are
/// granted must be what it was.
fn config_of(store: &dyn RolloutStore, run: &RunDirectory, ancestor: &RolloutSpec) -> Result<RunConfig, TrainError> {
    let settings = execution(store, ancestor)?;
    let pinned = Pinned::of(ancestor, &settings)?;
    let mut config = RunConfig::of_run(run)?;
    let gone = |section: &str| ConfigError::Invalid {
        path: run.config(),
        field: section.to_owned(),
        problem: "the rollout ran with it and it is not there any more; put it back".to_owned(),
    };
    config.agent.component = kept_or_named(run, &pinned.agent, &config.agent.component)?;
    config.grader = match (config.grader.take(), pinned.grader) {
        (Some(grader), Some(hash)) => {
            Some(PluginConfig { component: kept_or_named(run, &hash, &grader.component)?, ..grader })
        }
        (None, Some(_)) => return Err(gone("grader").into()),
        (_, None) => None,
    };
    let mut tools = BTreeMap::new();
    for (name, hash) in &settings.tools {
        let tool = config.tools.remove(name).ok_or_else(|| gone(&format!("tools.{name}")))?;
        capabilities(&settings, name, &tool.grants)?;
        tools.insert(name.clone(), ToolConfig { component: kept_or_named(run, hash, &tool.component)?, ..tool });
    }
    config.tools = tools;
    Ok(config)
}
