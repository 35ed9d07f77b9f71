//! A vLLM server that draws the rollouts of a policy which is trained here: `[policy.endpoint.adapter_push]` beside
//! `[policy.local.lora]`. The server is given the newest adapter before it is asked for anything that comes after it.
//!
//! An adapter is pushed when rollouts are about to begin and the weights have changed since, and not after every optimiser
//! step: what is replaced before anybody has sampled from it need not travel. Its name has the hash of its weights, because a
//! server may still hold what an earlier run has pushed, and takes a name that it knows for the adapter that it has.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use fulgurite_core::id::PolicyVersion;
use fulgurite_core::llm::LlmBackend;
use fulgurite_grants::{AdapterPush, OpenAiEndpoint};
use fulgurite_policy::PolicyEngine;
use serde::{Deserialize, Serialize};

use crate::config::{PolicySection, RunConfig};
use crate::error::TrainError;
use crate::run_directory::{publish_folder, temporary_folder};

/// Characters of a hash in an adapter's name: enough that no two are alike.
const HASH_CHARACTERS: usize = 16;

/// `[policy.endpoint.adapter_push]`: the server draws rollouts with the adapter that this run trains.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterPushConfig {
    /// Where adapters are written for the server, each into a folder of its own, relative to the config file. The newest and
    /// the one before it are kept.
    pub directory: PathBuf,
    /// The same folder as the server sees it. None: under the same path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_directory: Option<PathBuf>,
}

/// What in a config does not go together with a server that follows the training, as field and problem.
pub(crate) fn check(policy: &PolicySection) -> Result<(), (String, String)> {
    let fail = |field: &str, problem: &str| Err((format!("policy.{field}"), problem.to_owned()));
    let (local, endpoint) = (policy.local.as_ref(), policy.endpoint.as_ref());
    let push = endpoint.and_then(|endpoint| endpoint.adapter_push.as_ref());
    match (local, endpoint, push) {
        (Some(_), Some(_), None) => fail(
            "endpoint.adapter_push",
            "missing; with it the server draws the rollouts of the adapter that [policy.local.lora] trains; without it, say \
             one of [policy.local] and [policy.endpoint]",
        ),
        (None, _, Some(_)) => {
            fail("local", "missing; `policy.endpoint.adapter_push` is of an adapter that is trained here")
        }
        (Some(local), Some(endpoint), Some(_)) => {
            if !local.roles.is_empty() {
                fail(
                    "local.roles",
                    "the server draws with the policy's own adapter alone; remove the roles, or [policy.endpoint]",
                )
            } else if local.lora.is_none() {
                fail("local.lora", "missing; a server takes new adapters, and not all weights of a model")
            } else if local.model.directory.is_none() {
                fail("local.model.directory", "missing; name the folder of the model that the server has")
            } else if !endpoint.takes_adapters() {
                fail("endpoint.server", "only `vllm` takes adapters while it serves")
            } else {
                Ok(())
            }
        }
        _ => Ok(()),
    }
}

/// A policy that is trained here and sampled from there.
#[derive(Clone)]
pub(crate) struct ServedPolicy {
    pub(crate) engine: PolicyEngine,
    server: Arc<Server>,
}

struct Server {
    client: Arc<OpenAiEndpoint>,
    config: AdapterPushConfig,
    /// What the names of this run's adapters begin with.
    prefix: String,
    pushed: tokio::sync::Mutex<Pushed>,
}

/// The adapters that the server was given by this process.
#[derive(Default)]
struct Pushed {
    newest: Option<String>,
    /// Not on the server any more; its folder is there for calls that had begun.
    before: Option<String>,
}

impl ServedPolicy {
    pub(crate) fn new(
        engine: PolicyEngine,
        client: OpenAiEndpoint,
        config: &AdapterPushConfig,
        run: &RunConfig,
    ) -> Self {
        let prefix = format!("{}-seed{}-", run.name, run.seed);
        let (client, config, pushed) = (Arc::new(client), config.clone(), tokio::sync::Mutex::default());
        Self { engine, server: Arc::new(Server { client, config, prefix, pushed }) }
    }

    /// The server, once it has the newest adapter.
    ///
    /// # Errors
    /// When the adapter cannot be written, or the server does not take it.
    pub(crate) async fn backend(&self) -> Result<Arc<dyn LlmBackend>, TrainError> {
        let (version, hash) = (self.engine.version(), self.engine.weights_hash().to_string());
        let name = format!("{}{}", self.server.prefix, hash.get(..HASH_CHARACTERS).unwrap_or(&hash));
        self.server.give(&self.engine, name, version).await?;
        Ok(self.server.client.clone())
    }
}

impl Server {
    async fn give(&self, engine: &PolicyEngine, name: String, version: PolicyVersion) -> Result<(), TrainError> {
        let mut pushed = self.pushed.lock().await;
        if pushed.newest.as_ref() != Some(&name) {
            self.write(engine, &name).await?;
            let seen = self.config.server_directory.as_ref().unwrap_or(&self.config.directory);
            let (path, replaces) = (seen.join(&name), pushed.newest.clone());
            let push = AdapterPush { name: name.clone(), path: path.clone(), replaces };
            let failed = |source| TrainError::AdapterPush { name: name.clone(), path, source };
            self.client.push_adapter(&push).await.map_err(failed)?;
            tracing::debug!(adapter = name, version = version.0, "the server has a new adapter");
            let replaced = pushed.newest.replace(name.clone());
            let kept = [Some(&name), replaced.as_ref()];
            match (pushed.before.take(), &replaced) {
                (Some(old), _) if !kept.contains(&Some(&old)) => self.remove_folder(&old),
                (None, None) => self.clear_up(&name).await,
                _ => {}
            }
            pushed.before = replaced;
        }
        self.client.serve_adapter(name, version);
        Ok(())
    }

    /// Writes the adapter. A folder that is there under its name was written whole, with the same weights.
    async fn write(&self, engine: &PolicyEngine, name: &str) -> Result<(), TrainError> {
        let path = self.config.directory.join(name);
        if path.is_dir() {
            return Ok(());
        }
        std::fs::create_dir_all(&self.config.directory).map_err(TrainError::io(&self.config.directory))?;
        let temporary = temporary_folder(&path).map_err(TrainError::io(&path))?;
        engine.export_adapter(&temporary).await?;
        publish_folder(&temporary, &path).map_err(TrainError::io(&path))
    }

    fn remove_folder(&self, name: &str) {
        let path = self.config.directory.join(name);
        if let Err(error) = std::fs::remove_dir_all(&path) {
            tracing::warn!(path = %path.display(), %error, "an old adapter could not be removed");
        }
    }

    /// Takes away what a process before this one has left of this run.
    async fn clear_up(&self, name: &str) {
        for old in self.left(&self.config.directory).into_iter().filter(|old| old != name) {
            if let Err(error) = self.client.remove_adapter(&old).await {
                tracing::warn!(adapter = old, %error, "an old adapter could not be taken from the server");
            }
            self.remove_folder(&old);
        }
    }

    /// Names of this run's adapters in a folder, in order.
    fn left(&self, folder: &Path) -> Vec<String> {
        let is_hash = |text: &str| text.len() == HASH_CHARACTERS && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<String> =
            names.filter(|name| name.strip_prefix(&self.prefix).is_some_and(is_hash)).collect();
        names.sort_unstable();
        names
    }
}
