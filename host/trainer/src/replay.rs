//! Opens what a recorded rollout ran on, so that it can be run again: the conditions from the store, the components that the
//! run keeps, and what its tools were granted, as long as that is what it was.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fulgurite_core::grant::ToolGrants;
use fulgurite_core::id::{AttemptKey, AttemptNumber};
use fulgurite_core::record::{ExecutionSettings, RolloutSpec};
use fulgurite_grants::{ToolCapabilities, needs_places};
use fulgurite_runner::Plugins;
use fulgurite_runner::replay::{ReplayError, Replayer, component_file};
use fulgurite_sandbox::{Sandbox, SandboxSettings};
use fulgurite_store::RolloutStore;

use crate::config::RunConfig;
use crate::error::TrainError;
use crate::run_directory::RunDirectory;

/// What is exchanged in a replay.
#[derive(Debug, Clone, Copy, Default)]
pub struct Exchanged<'a> {
    /// Another agent than the recorded one.
    pub agent: Option<&'a Path>,
    /// Another grader than the recorded one.
    pub grader: Option<&'a Path>,
}

/// Opens what a rollout pins. Blocks.
///
/// # Errors
/// When something is missing, cannot be loaded or is not what it was, or this engine is not the one that recorded.
pub fn open_replayer(
    store: &dyn RolloutStore,
    run: &RunDirectory,
    spec: &RolloutSpec,
    cache: Option<PathBuf>,
    exchanged: Exchanged<'_>,
) -> Result<Replayer, TrainError> {
    let settings = execution(store, spec)?;
    let sandbox = Sandbox::new(SandboxSettings::of_run(cache, &settings.limits, &settings.plugin_limits))?;
    let mut pinned = spec.components.iter();
    let mut next = |what: &str| {
        let hash = pinned.next().ok_or_else(|| missing(spec, format!("its record names no {what}")))?;
        Ok::<_, ReplayError>(component_file(&run.components(), hash))
    };
    let agent = next("agent")?;
    let agent = sandbox.load_agent(exchanged.agent.unwrap_or(&agent))?;
    let grader = if settings.graded { Some(next("grader")?) } else { None };
    let grader = exchanged.grader.map(Path::to_owned).or(grader);
    let grader = grader.map(|file| sandbox.load_grader(&file)).transpose()?;
    // Only the config says where folders and databases are; a run without them is replayed without it.
    let config =
        settings.grants.values().any(|record| needs_places(record)).then(|| RunConfig::of_run(run)).transpose()?;
    let places = |tool: &str| {
        let tool = config.as_ref().and_then(|config| config.tools.get(tool));
        tool.map_or_else(ToolGrants::default, |tool| tool.grants.clone())
    };
    let mut tools = BTreeMap::new();
    for (name, hash) in &settings.tools {
        let plugin = format!("tools.{name}");
        let capabilities = match settings.grants.get(name) {
            Some(record) => {
                let limits = settings.plugin_limits.get(name).unwrap_or(&settings.limits);
                ToolCapabilities::recorded(&plugin, record, &places(name), limits)?
            }
            None => ToolCapabilities::none(&plugin),
        };
        let file = component_file(&run.components(), hash);
        tools.insert(name.clone(), sandbox.load_granted_tool(&file, capabilities)?);
    }
    Ok(Replayer::new(Plugins { agent, grader, tools }, &settings, spec.resources_version)?)
}

/// The conditions under which a rollout ran.
pub(crate) fn execution(store: &dyn RolloutStore, spec: &RolloutSpec) -> Result<ExecutionSettings, TrainError> {
    let bytes = store.blob(&spec.execution)?;
    let bytes = bytes.ok_or_else(|| missing(spec, "the conditions under which it ran were not kept".to_owned()))?;
    let settings = serde_json::from_slice(&bytes)
        .map_err(|error| missing(spec, format!("the conditions under which it ran cannot be read: {error}")))?;
    Ok(settings)
}

fn missing(spec: &RolloutSpec, problem: String) -> ReplayError {
    ReplayError::Missing { attempt: AttemptKey { rollout: spec.id.clone(), attempt: AttemptNumber::FIRST }, problem }
}
