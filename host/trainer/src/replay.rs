//! Opens what a recorded rollout ran on, so that it can be run again: the conditions from the store, the components that the
//! run keeps, and what its plugins were granted, as long as that is what it was.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::grant::{EndpointGrants, ToolGrants};
use fulgurite_core::id::{AttemptKey, AttemptNumber, ContentHash};
use fulgurite_core::record::{ExecutionSettings, RolloutSpec};
use fulgurite_grants::{ToolCapabilities, needs_places};
use fulgurite_runner::replay::{ReplayError, Replayer, recorded_endpoints};
use fulgurite_runner::{Endpoints, Plugins};
use fulgurite_sandbox::{GraderPlugin, Sandbox, SandboxSettings};
use fulgurite_store::RolloutStore;

use crate::config::RunConfig;
use crate::error::TrainError;
use crate::grants::open_endpoint;
use crate::kept::kept_component;
use crate::run_directory::RunDirectory;

/// What is exchanged in a replay.
#[derive(Debug, Clone, Copy, Default)]
pub struct Exchanged<'a> {
    /// Another agent than the recorded one.
    pub agent: Option<&'a Path>,
    /// Another grader than the recorded one.
    pub grader: Option<NewGrader<'a>>,
}

/// A grader that judges recordings.
#[derive(Debug, Clone, Copy)]
pub struct NewGrader<'a> {
    /// Its component.
    pub file: &'a Path,
    /// Content hashes of the items that it judges: a judge that answers by script is told of them.
    pub items: &'a BTreeSet<ContentHash>,
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
    let pinned = Pinned::of(spec, &settings)?;
    let sandbox = Sandbox::new(SandboxSettings::of_run(cache, &settings.limits, &settings.plugin_limits))?;
    // What is exchanged need not be kept any more.
    let agent = match exchanged.agent {
        Some(file) => sandbox.load_agent(file)?,
        None => sandbox.load_agent(&kept_component(run, &pinned.agent)?)?,
    };
    let granted = recorded_endpoints(&settings, "grader");
    let (grader, judges) = match (exchanged.grader, pinned.grader) {
        (Some(new), _) => {
            let (grader, judges) = open_grader(store, run, &sandbox, new, &granted)?;
            (Some(grader), judges)
        }
        (None, Some(hash)) => {
            let file = kept_component(run, &hash)?;
            (Some(sandbox.load_granted_grader(&file, &granted)?), Endpoints::new())
        }
        (None, None) => (None, Endpoints::new()),
    };
    // Only the config says where folders and databases are; a run without them is replayed without it.
    let needs_config = settings.grants.values().any(|record| needs_places(record));
    let config = needs_config.then(|| RunConfig::of_run(run)).transpose()?;
    let mut tools = BTreeMap::new();
    for (name, hash) in &settings.tools {
        let places = config.as_ref().and_then(|config| config.tools.get(name)).map(|tool| &tool.grants);
        let capabilities = capabilities(&settings, name, places.unwrap_or(&ToolGrants::default()))?;
        tools.insert(name.clone(), sandbox.load_granted_tool(&kept_component(run, hash)?, capabilities)?);
    }
    let replayer = Replayer::new(Plugins { agent, grader, tools }, &settings, spec.resources_version)?;
    Ok(replayer.with_judges(judges))
}

/// What a tool was granted, opened again.
///
/// # Errors
/// When it is not what it was.
pub(crate) fn capabilities(
    settings: &ExecutionSettings,
    tool: &str,
    places: &ToolGrants,
) -> Result<ToolCapabilities, TrainError> {
    let plugin = format!("tools.{tool}");
    let Some(record) = settings.grants.get(tool) else { return Ok(ToolCapabilities::none(&plugin)) };
    let limits = settings.plugin_limits.get(tool).unwrap_or(&settings.limits);
    Ok(ToolCapabilities::recorded(&plugin, record, places, limits)?)
}

/// Loads a grader that judges recordings, with the endpoints that it asks for. It may ask those that the recorded run granted
/// to its own grader, and no others.
fn open_grader(
    store: &dyn RolloutStore,
    run: &RunDirectory,
    sandbox: &Sandbox,
    grader: NewGrader<'_>,
    granted: &EndpointGrants,
) -> Result<(Arc<GraderPlugin>, Endpoints), TrainError> {
    let asks = sandbox.manifest(grader.file)?.endpoints;
    let may_ask = |name: &str| granted.endpoints.iter().any(|granted| granted == name);
    if let Some(ask) = asks.iter().find(|ask| !ask.optional && !may_ask(&ask.name)) {
        return Err(TrainError::JudgeNotGranted {
            grader: grader.file.to_owned(),
            endpoint: ask.name.clone(),
            why: ask.why.clone(),
        });
    }
    let endpoints: Vec<String> = asks.into_iter().map(|ask| ask.name).filter(|name| may_ask(name)).collect();
    let mut judges = Endpoints::new();
    if !endpoints.is_empty() {
        let config = RunConfig::of_run(run)?;
        let items = items(store, grader.items)?;
        for name in &endpoints {
            judges.insert(name.clone(), open_endpoint(&config, run, name, &items)?);
        }
    }
    Ok((sandbox.load_granted_grader(grader.file, &EndpointGrants { endpoints })?, judges))
}

/// The items of rollouts. One that was not kept is left out: its rollouts cannot be graded either.
fn items(store: &dyn RolloutStore, hashes: &BTreeSet<ContentHash>) -> Result<Vec<Arc<DatasetItem>>, TrainError> {
    let mut items = vec![];
    for hash in hashes {
        let item = store.blob(hash)?.and_then(|bytes| serde_json::from_slice::<DatasetItem>(&bytes).ok());
        items.extend(item.map(Arc::new));
    }
    Ok(items)
}

/// The components that a rollout pins.
pub(crate) struct Pinned {
    pub(crate) agent: ContentHash,
    pub(crate) grader: Option<ContentHash>,
}

impl Pinned {
    pub(crate) fn of(spec: &RolloutSpec, settings: &ExecutionSettings) -> Result<Self, ReplayError> {
        let mut pinned = spec.components.iter().copied();
        let mut next = |what: &str| pinned.next().ok_or_else(|| missing(spec, format!("its record names no {what}")));
        let agent = next("agent")?;
        let grader = if settings.graded { Some(next("grader")?) } else { None };
        Ok(Self { agent, grader })
    }
}

/// The conditions under which a rollout ran.
///
/// # Errors
/// When they were not kept.
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
