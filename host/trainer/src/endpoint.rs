//! Model endpoints of a run's config: `[policy.endpoint]`, the policy itself, and `[endpoint.NAME]`, models beside it that
//! agents and graders may ask. One type and one client for both.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::grant::{AddressRange, HttpGrant, Origin, SecretSource};
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::LlmBackend;
use fulgurite_grants::{EndpointFacts, EndpointSettings, OpenAiEndpoint, ServerKind};
use fulgurite_policy::PolicyEngine;
use fulgurite_runner::scripted::Script;
use serde::{Deserialize, Serialize};

use crate::adapter_push::{AdapterPushConfig, ServedPolicy};
use crate::config::{ConfigError, RunConfig};
use crate::error::TrainError;
use crate::setup::scripted;

/// Place of the policy's endpoint in a config.
const POLICY_SECTION: &str = "policy.endpoint";
/// Longest `timeout_ms`, `backoff_ms`: an hour.
const DURATION_MS_MAX: u64 = 3_600_000;
/// Most `retries_max`. 20: with any backoff that is longer than an attempt may take.
const RETRIES_MAX: u32 = 20;
/// Largest `answer_bytes_max`. 1 GiB: an answer is held in memory, once for each that is under way.
const ANSWER_BYTES_MAX: u64 = 1 << 30;

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
    /// Which program answers: `openai`, `vllm`, `sglang` or `llama-cpp`. Only the last three are told what OpenAI does not
    /// know, and only vLLM and SGLang return the token ids of a whole call. `openai`: the fields that all servers take.
    #[serde(default)]
    pub server: ServerKind,
    /// Environment variable that holds the key, sent as `authorization: Bearer KEY`. The key itself is in no config and no
    /// record.
    #[serde(default)]
    pub api_key_env: Option<String>,
    /// Further headers that the host adds: `headers.x-key = { env = "VARIABLE", prefix = "" }`.
    #[serde(default)]
    pub headers: BTreeMap<String, SecretSource>,
    /// Addresses that are not public and may be connected to all the same.
    #[serde(default)]
    pub allow_private: Vec<AddressRange>,
    /// A PEM file with the certificate authority of the server, relative to the config file.
    #[serde(default)]
    pub certificate_authority: Option<PathBuf>,
    /// Longest time of one try in milliseconds, from looking up the name to the last byte. 30,000: with its retries a call
    /// ends before `limits.heartbeat_ms_max`; raise both for long completions.
    #[serde(default = "default_timeout_ms")]
    pub timeout_ms: u64,
    /// Tries of one call after the first, where that can help: no connection, no answer in time, statuses 408, 429 and 5xx.
    /// 2: what does not recover by then is left to the rollout's own retries.
    #[serde(default = "default_retries_max")]
    pub retries_max: u32,
    /// Pause in milliseconds before the second try; it doubles with every further one up to 30 s, and is between half and
    /// all of that by the rollout's seed. A longer `Retry-After` of the server counts instead. 250.
    #[serde(default = "default_backoff_ms")]
    pub backoff_ms: u64,
    /// Requests begun per minute, evenly spaced. None: hosted models have such a limit, one's own server has none. With it,
    /// keep `rollout.live_max` so small that nobody waits longer than `limits.heartbeat_ms_max`.
    #[serde(default)]
    pub requests_per_minute_max: Option<u32>,
    /// Requests under way at once; others wait. 64: a server batches them, and `rollout.live_max` may be thousands.
    #[serde(default = "default_concurrency_max")]
    pub concurrency_max: usize,
    /// Tokens that the model's context holds. None: what the server says when it is exceeded.
    #[serde(default)]
    pub context_tokens_max: Option<u32>,
    /// Bytes of one answer. 8 MiB: a token with its log-probability is about 150 bytes of JSON, so 50,000 tokens.
    #[serde(default = "default_answer_bytes_max")]
    pub answer_bytes_max: u64,
    /// Answers by script instead.
    #[serde(default)]
    pub scripted: Option<Script>,
    /// Of `[policy.endpoint]`: it draws with the adapter that `[policy.local.lora]` trains. None: with its own model, and nothing
    /// is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter_push: Option<AdapterPushConfig>,
}

fn default_timeout_ms() -> u64 {
    30_000
}

fn default_retries_max() -> u32 {
    2
}

fn default_backoff_ms() -> u64 {
    250
}

fn default_concurrency_max() -> usize {
    64
}

fn default_answer_bytes_max() -> u64 {
    8 << 20
}

impl EndpointConfig {
    /// The files and folders that it names.
    pub(crate) fn paths(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let pushed = self.adapter_push.as_mut().map(|push| &mut push.directory);
        self.certificate_authority.as_mut().into_iter().chain(pushed)
    }

    /// What makes no sense: the field below the endpoint, and the problem.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        match (&self.url, &self.scripted) {
            (None, None) | (Some(_), Some(_)) => {
                return Err(("url", "say one of `url` (with `model`) and `scripted`".to_owned()));
            }
            (None, Some(_)) => return Ok(()),
            (Some(url), None) => {
                let (_, path) = Origin::split(url).map_err(|error| ("url", error.to_string()))?;
                if path.contains(['?', '#']) || path.trim_end_matches('/').ends_with("/chat/completions") {
                    return Err(("url", "say what comes before `/chat/completions`, for example `.../v1`".to_owned()));
                }
            }
        }
        if self.model.as_ref().is_none_or(String::is_empty) {
            return Err(("model", "missing; which model to ask for".to_owned()));
        }
        if self.api_key_env.is_some() && self.headers.keys().any(|name| name.eq_ignore_ascii_case("authorization")) {
            return Err(("api_key_env", "the key is an `authorization` header, and `headers` has one too".to_owned()));
        }
        if !(1..=DURATION_MS_MAX).contains(&self.timeout_ms) {
            return Err(("timeout_ms", format!("must be 1 to {DURATION_MS_MAX}")));
        }
        if self.backoff_ms > DURATION_MS_MAX {
            return Err(("backoff_ms", format!("must be at most {DURATION_MS_MAX}")));
        }
        if self.retries_max > RETRIES_MAX {
            return Err(("retries_max", format!("must be at most {RETRIES_MAX}")));
        }
        if self.requests_per_minute_max == Some(0) {
            return Err(("requests_per_minute_max", "must be at least 1; leave it out for no limit".to_owned()));
        }
        if self.concurrency_max == 0 {
            return Err(("concurrency_max", "must be at least 1".to_owned()));
        }
        if self.context_tokens_max == Some(0) {
            return Err(("context_tokens_max", "must be at least 1; leave it out when it is not known".to_owned()));
        }
        if !(1..=ANSWER_BYTES_MAX).contains(&self.answer_bytes_max) {
            return Err(("answer_bytes_max", format!("must be 1 to {ANSWER_BYTES_MAX}")));
        }
        Ok(())
    }

    /// The same for an endpoint that is the policy of so many live rollouts. A rollout is silent while it waits for its turn
    /// and for its answer.
    pub(crate) fn check_policy(&self, limits: &Limits, live_max: usize) -> Result<(), (&'static str, String)> {
        if self.scripted.is_some() {
            return Err(("scripted", "write a scripted policy as [policy.scripted]".to_owned()));
        }
        self.check()?;
        let tries_ms = self.timeout_ms.saturating_mul(u64::from(self.retries_max) + 1);
        if tries_ms > limits.heartbeat_ms_max {
            let problem = format!(
                "a call may take {tries_ms} ms with its {} retries, and a rollout is ended when it is silent for longer than \
                 `limits.heartbeat_ms_max` of {}; raise that, or lower this or `retries_max`",
                self.retries_max, limits.heartbeat_ms_max
            );
            return Err(("timeout_ms", problem));
        }
        if let Some(requests) = self.requests_per_minute_max.map(u64::from)
            && (live_max as u64).saturating_mul(60_000) / requests > limits.heartbeat_ms_max
        {
            let fit = (requests.saturating_mul(limits.heartbeat_ms_max) / 60_000).max(1);
            let problem = format!(
                "with `rollout.live_max` of {live_max} a rollout would wait for its turn for longer than \
                 `limits.heartbeat_ms_max` of {} ms allows; lower `rollout.live_max` to {fit}, or raise one of the others",
                limits.heartbeat_ms_max
            );
            return Err(("requests_per_minute_max", problem));
        }
        Ok(())
    }

    /// Opens `[endpoint.NAME]`.
    pub(crate) fn open(&self, name: &str, items: &[Arc<DatasetItem>]) -> Result<Arc<dyn LlmBackend>, TrainError> {
        let section = format!("endpoint.{name}");
        if let Some(script) = &self.scripted {
            return scripted(&section, script, items);
        }
        Ok(Arc::new(self.client(&section, name)?))
    }

    /// Opens `[policy.endpoint]`, after a look at whether it is there and has the model.
    pub(crate) async fn open_policy(&self) -> Result<Arc<dyn LlmBackend>, TrainError> {
        Ok(Arc::new(self.checked_policy().await?))
    }

    /// The same, as what samples from a policy that is trained here.
    pub(crate) async fn open_served(&self, engine: PolicyEngine, run: &RunConfig) -> Result<ServedPolicy, TrainError> {
        let client = self.checked_policy().await?;
        let push = self.adapter_push.as_ref().ok_or(TrainError::NoPolicy)?;
        Ok(ServedPolicy::new(engine, client, push, run))
    }

    async fn checked_policy(&self) -> Result<OpenAiEndpoint, TrainError> {
        let client = self.client(POLICY_SECTION, "policy")?;
        let facts = client.check().await?;
        if let Some(seems) = facts.seems {
            tracing::warn!("`{POLICY_SECTION}`: {}", hint(seems));
        }
        Ok(client)
    }

    /// Whether the server takes new adapters while it serves.
    pub(crate) fn takes_adapters(&self) -> bool {
        self.server == ServerKind::Vllm
    }

    fn client(&self, section: &str, name: &str) -> Result<OpenAiEndpoint, TrainError> {
        let (origin, path) = Origin::split(self.url.as_deref().unwrap_or_default()).map_err(|error| {
            ConfigError::Invalid { path: PathBuf::new(), field: format!("{section}.url"), problem: error.to_string() }
        })?;
        let mut headers = self.headers.clone();
        if let Some(env) = &self.api_key_env {
            let source = SecretSource { env: env.clone(), prefix: "Bearer ".to_owned() };
            headers.insert("authorization".to_owned(), source);
        }
        let settings = EndpointSettings {
            section: section.to_owned(),
            name: name.to_owned(),
            grant: HttpGrant {
                origin,
                headers,
                allow_private: self.allow_private.clone(),
                certificate_authority: self.certificate_authority.clone(),
            },
            path: path.to_owned(),
            model: self.model.clone().unwrap_or_default(),
            server: self.server,
            timeout_ms: self.timeout_ms,
            retries_max: self.retries_max,
            backoff_ms: self.backoff_ms,
            requests_per_minute_max: self.requests_per_minute_max,
            concurrency_max: self.concurrency_max,
            context_tokens_max: self.context_tokens_max,
            answer_bytes_max: self.answer_bytes_max,
        };
        let failed = |source| TrainError::Endpoint { section: section.to_owned(), source };
        OpenAiEndpoint::new(settings, &environment).map_err(failed)
    }
}

pub(crate) fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// What to write when a server is of another kind than the config says.
fn hint(seems: ServerKind) -> String {
    let name = serde_json::to_value(seems).unwrap_or_default();
    let name = name.as_str().unwrap_or_default();
    format!(
        "the server seems to be {name}; with `server = \"{name}\"` it is told its sampling in full and asked for token ids"
    )
}

/// What became of the check of one endpoint.
#[derive(Debug)]
pub struct CheckedEndpoint {
    /// Its place in the config.
    pub section: String,
    /// What the server says, and what to do about it, if anything; or why it cannot be used.
    pub found: Result<String, String>,
}

/// Asks every server of a config's endpoints for its models. Scripts are left out.
pub async fn check_endpoints(config: &RunConfig) -> Vec<CheckedEndpoint> {
    let policy = config.policy.endpoint.iter().map(|endpoint| (POLICY_SECTION.to_owned(), "policy", endpoint));
    let others = config.endpoint.iter().map(|(name, endpoint)| (format!("endpoint.{name}"), name.as_str(), endpoint));
    let mut checked = vec![];
    for (section, name, endpoint) in policy.chain(others).filter(|(_, _, endpoint)| endpoint.scripted.is_none()) {
        let found = match endpoint.client(&section, name) {
            Ok(client) => client.check().await.map(|facts| told(endpoint, &facts)).map_err(|error| error.to_string()),
            Err(error) => Err(with_cause(&error)),
        };
        checked.push(CheckedEndpoint { section, found });
    }
    checked
}

fn with_cause(error: &TrainError) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    format!("{error}{cause}")
}

fn told(endpoint: &EndpointConfig, facts: &EndpointFacts) -> String {
    let mut told = vec![endpoint.url.clone().unwrap_or_default()];
    if facts.models.is_empty() {
        told.push("which does not tell its models".to_owned());
    }
    told.extend(facts.context_tokens_max.map(|tokens| format!("{tokens} tokens of context")));
    told.extend(facts.seems.map(hint));
    told.join(", ")
}
