//! What a run grants to its plugins, opened and checked before anything runs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::grant::{Capability, EndpointGrants};
use fulgurite_core::llm::LlmBackend;
use fulgurite_grants::{Guarded, ToolCapabilities};
use fulgurite_runner::{Endpoints, RunnerGrants};
use fulgurite_sandbox::{AgentPlugin, PluginError, Sandbox, ToolPlugin};

use crate::config::{ConfigError, RunConfig};
use crate::endpoint::environment;
use crate::error::TrainError;
use crate::run_directory::RunDirectory;

/// Places that no grant may touch.
fn guarded(run: &RunDirectory, cache: Option<&Path>) -> Vec<Guarded> {
    let mut guarded = vec![
        Guarded { what: "the store of this run,", path: run.store() },
        Guarded { what: "the folder of this run,", path: run.root().to_owned() },
    ];
    guarded.extend(cache.map(|path| Guarded { what: "the cache of compiled code,", path: path.to_owned() }));
    guarded
}

/// Loads the agent and checks what it is granted.
pub(crate) fn load_agent(sandbox: &Sandbox, config: &RunConfig) -> Result<Arc<AgentPlugin>, TrainError> {
    let agent = sandbox.load_agent(&config.agent.component)?;
    compare(sandbox, "agent", &config.agent.component, &config.agent.grants.granted())?;
    Ok(agent)
}

/// Compares what a plugin asks for with what it is granted.
fn compare(
    sandbox: &Sandbox,
    plugin: &str,
    path: &Path,
    granted: &BTreeSet<(Capability, String)>,
) -> Result<(), PluginError> {
    let compared = sandbox.manifest(path)?.compare(plugin, granted);
    compared.map_err(|source| PluginError::Grant { path: path.to_owned(), source })
}

/// Loads the tools with what they are granted. Folders are read, hence the thread for blocking work.
pub(crate) async fn load_tools(
    sandbox: &Sandbox,
    config: &RunConfig,
    run: &RunDirectory,
    cache: Option<&Path>,
) -> Result<BTreeMap<String, Arc<ToolPlugin>>, TrainError> {
    let guarded = guarded(run, cache);
    let mut tools = BTreeMap::new();
    for (name, tool) in &config.tools {
        let limits = config.limits_of_tool(tool);
        let (plugin, grants, guarded) = (format!("tools.{name}"), tool.grants.clone(), guarded.clone());
        // Before anything that is granted is looked at: a name that nobody asks for is the mistake to speak of.
        compare(sandbox, &plugin, &tool.component, &grants.granted())?;
        let open = move || ToolCapabilities::open(&plugin, &grants, &limits, &guarded, &environment);
        let opened = tokio::task::spawn_blocking(open).await;
        let capabilities = opened.map_err(|_| fulgurite_runner::RunnerError::WorkerLost)??;
        tools.insert(name.clone(), sandbox.load_granted_tool(&tool.component, capabilities)?);
    }
    Ok(tools)
}

/// Opens an endpoint that a recorded run granted, as the run's config describes it.
pub(crate) fn open_endpoint(
    config: &RunConfig,
    run: &RunDirectory,
    name: &str,
    items: &[Arc<DatasetItem>],
) -> Result<Arc<dyn LlmBackend>, TrainError> {
    let Some(endpoint) = config.endpoint.get(name) else {
        return Err(TrainError::Config(ConfigError::Invalid {
            path: run.config(),
            field: format!("endpoint.{name}"),
            problem: "the recorded run granted it and it is not there any more; put it back".to_owned(),
        }));
    };
    endpoint.open(name, items)
}

/// Everything that the runner is told about grants.
pub(crate) fn of_runner(
    config: &RunConfig,
    tools: &BTreeMap<String, Arc<ToolPlugin>>,
    items: &[Arc<DatasetItem>],
) -> Result<RunnerGrants, TrainError> {
    let endpoints = |granted: &EndpointGrants| -> Result<Endpoints, TrainError> {
        let mut endpoints = BTreeMap::new();
        for name in &granted.endpoints {
            if let Some(endpoint) = config.endpoint.get(name) {
                endpoints.insert(name.clone(), endpoint.open(name, items)?);
            }
        }
        Ok(endpoints)
    };
    let granted = tools.iter().filter(|(_, tool)| !tool.capabilities().granted().is_empty());
    let mut records: BTreeMap<String, String> =
        granted.map(|(name, tool)| (name.clone(), tool.capabilities().record().to_owned())).collect();
    // No tool has one of these names.
    let agent = Some(("agent", &config.agent.grants));
    let grader = config.grader.as_ref().map(|grader| ("grader", &grader.grants));
    for (name, grants) in agent.into_iter().chain(grader).filter(|(_, grants)| !grants.is_empty()) {
        records.insert(name.to_owned(), serde_json::to_string(grants).unwrap_or_default());
    }
    Ok(RunnerGrants {
        plugin_limits: config.plugin_limits(),
        records,
        agent_endpoints: endpoints(&config.agent.grants)?,
        judge_endpoints: match &config.grader {
            Some(grader) => endpoints(&grader.grants)?,
            None => Endpoints::new(),
        },
    })
}
