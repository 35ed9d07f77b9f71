//! What a run grants to its plugins, opened and checked before anything runs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::grant::{AddressRange, Capability, EndpointGrants, HttpGrant, Origin, SecretSource};
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::LlmBackend;
use fulgurite_grants::{Guarded, OpenAiEndpoint, ToolCapabilities};
use fulgurite_runner::scripted::Script;
use fulgurite_runner::{Endpoints, RunnerGrants};
use fulgurite_sandbox::{AgentPlugin, PluginError, Sandbox, ToolPlugin};
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, RunConfig};
use crate::error::TrainError;
use crate::run_directory::RunDirectory;
use crate::setup::scripted;

/// A model endpoint: a server that speaks OpenAI's chat completions (`url` and `model`), or a script (`scripted`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointConfig {
    /// Where, up to what comes before `/chat/completions`: `https://api.example.com/v1`.
    #[serde(default)]
    pub url: Option<String>,
    /// The model's name there.
    #[serde(default)]
    pub model: Option<String>,
    /// Headers that the host adds: `headers.authorization = { env = "API_KEY", prefix = "Bearer " }`.
    #[serde(default)]
    pub headers: BTreeMap<String, SecretSource>,
    /// Addresses that are not public and may be connected to all the same.
    #[serde(default)]
    pub allow_private: Vec<AddressRange>,
    /// A PEM file with the certificate authority of the server, relative to the config file.
    #[serde(default)]
    pub certificate_authority: Option<PathBuf>,
    /// Answers by script instead.
    #[serde(default)]
    pub scripted: Option<Script>,
}

impl EndpointConfig {
    /// What makes no sense: the field below the endpoint, and the problem.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        match (&self.url, &self.scripted) {
            (None, None) | (Some(_), Some(_)) => {
                Err(("url", "say one of `url` (with `model`) and `scripted`".to_owned()))
            }
            (None, Some(_)) => Ok(()),
            (Some(url), None) => {
                let (_, path) = Origin::split(url).map_err(|error| ("url", error.to_string()))?;
                if path.contains(['?', '#']) || path.ends_with("/chat/completions") {
                    return Err(("url", "say what comes before `/chat/completions`, for example `.../v1`".to_owned()));
                }
                if self.model.as_ref().is_none_or(String::is_empty) {
                    return Err(("model", "missing; which model to ask for".to_owned()));
                }
                Ok(())
            }
        }
    }

    fn open(&self, name: &str, items: &[Arc<DatasetItem>], limits: &Limits) -> Result<Arc<dyn LlmBackend>, TrainError> {
        if let Some(script) = &self.scripted {
            return scripted(&format!("endpoint.{name}"), script, items);
        }
        let url = self.url.as_deref().unwrap_or_default();
        let failed = |source| TrainError::Endpoint { name: name.to_owned(), source };
        let (origin, path) = Origin::split(url).map_err(|error| ConfigError::Invalid {
            path: PathBuf::new(),
            field: format!("endpoint.{name}.url"),
            problem: error.to_string(),
        })?;
        let grant = HttpGrant {
            origin,
            headers: self.headers.clone(),
            allow_private: self.allow_private.clone(),
            certificate_authority: self.certificate_authority.clone(),
        };
        let model = self.model.as_deref().unwrap_or_default();
        let endpoint = OpenAiEndpoint::new(name, model, &grant, path, limits, &environment).map_err(failed)?;
        Ok(Arc::new(endpoint))
    }
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

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
    endpoint.open(name, items, &config.limits)
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
                endpoints.insert(name.clone(), endpoint.open(name, items, &config.limits)?);
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
