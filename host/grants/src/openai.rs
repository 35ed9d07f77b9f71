//! Model endpoints that speak OpenAI's chat completions: vLLM, SGLang, llama.cpp, hosted models. One backend for all of
//! them, whether it is the policy of a run or a model that agents and graders may ask.
//!
//! The host calls; a plugin knows names only, and no text of a plugin reaches a header. What a server says is checked before
//! anything is made of it ([`parse_completion`]). An answer with token ids and log-probs is recorded with them; one without is
//! recorded as not trainable.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use fulgurite_core::grant::HttpGrant;
use fulgurite_core::id::{PolicyVersion, ResponseId};
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{ChatRequest, Completion, LlmBackend, LlmError, LlmSession, Sampling, SessionInfo};
use fulgurite_core::seed::{Generator, Seed};
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

mod adapter;
mod answer;
mod models;
mod pace;
mod refusal;
mod request;

pub use adapter::AdapterPush;
use adapter::Served;
pub use answer::{Asked, MalformedAnswer, parse_completion};
pub use models::{EndpointCheckError, EndpointFacts};

use crate::http_client::{HttpClient, HttpError, HttpRequest, HttpResponse, HttpSetupError, Resolve};
use pace::Pace;
use refusal::Refusal;

/// Bytes of one request. 16 MiB: a request of a guest has at most 1 MiB of text, which JSON escapes make six times as long.
const REQUEST_BYTES_MAX: u64 = 16 << 20;
/// The role that the policy has in a run's records.
const POLICY: &str = "policy";

/// Which program answers: what it is told beyond OpenAI's fields, and how it returns token ids.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServerKind {
    /// OpenAI's fields and nothing else: hosted models, and whatever is not named below. No token ids.
    #[default]
    Openai,
    /// vLLM. Token ids by its field `return_token_ids`.
    Vllm,
    /// SGLang. Token ids by `return_token_ids`, or by `return_meta_info` of releases before it.
    Sglang,
    /// llama.cpp's server. It returns ids of what it drew, but not those of the prompt.
    LlamaCpp,
}

/// What an endpoint is. The config's names, defaults and reasons are in the trainer's `EndpointConfig`.
#[derive(Debug, Clone)]
pub struct EndpointSettings {
    /// Its place in the config, for messages: `policy.endpoint`, `endpoint.judge`.
    pub section: String,
    /// Its name in records: `policy`, or the endpoint's own.
    pub name: String,
    /// The server, the headers that the host adds, and the addresses that it may be at.
    pub grant: HttpGrant,
    /// What follows the origin, for example `/v1`.
    pub path: String,
    /// The model's name there.
    pub model: String,
    /// Which program answers.
    pub server: ServerKind,
    /// Longest time of one try, in milliseconds.
    pub timeout_ms: u64,
    /// Tries of one call after the first.
    pub retries_max: u32,
    /// Pause before the second try, in milliseconds; it doubles with every further one.
    pub backoff_ms: u64,
    /// Requests begun per minute, evenly spaced; `None` does not slow down.
    pub requests_per_minute_max: Option<u32>,
    /// Requests under way at once.
    pub concurrency_max: usize,
    /// Tokens that the model's context holds, where that is known.
    pub context_tokens_max: Option<u32>,
    /// Bytes of one answer.
    pub answer_bytes_max: u64,
}

impl EndpointSettings {
    fn is_policy(&self) -> bool {
        self.name == POLICY
    }

    /// Environment variables that its headers are from.
    fn secrets(&self) -> String {
        let names: Vec<_> = self.grant.headers.values().map(|source| format!("`{}`", source.env)).collect();
        names.join(", ")
    }

    /// The text of every error begins with the place in the config.
    fn unavailable(&self, problem: impl std::fmt::Display) -> LlmError {
        LlmError::Unavailable(format!("`{}`: {problem}", self.section))
    }
}

/// An endpoint.
#[derive(Debug)]
pub struct OpenAiEndpoint {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    settings: EndpointSettings,
    client: HttpClient,
    limits: Limits,
    pace: Pace,
    /// The adapter that calls ask for; `None` before the first.
    served: RwLock<Option<Arc<Served>>>,
}

impl OpenAiEndpoint {
    /// Makes the client of an endpoint. Nothing is sent.
    ///
    /// # Errors
    /// When a header, a secret or a certificate authority cannot be used.
    pub fn new(
        settings: EndpointSettings,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, HttpSetupError> {
        let client = HttpClient::of_endpoint(&settings.section, &settings.grant, environment)?;
        let limits = Limits {
            http_timeout_ms_max: settings.timeout_ms,
            http_request_bytes_max: REQUEST_BYTES_MAX,
            http_response_bytes_max: settings.answer_bytes_max,
            ..Limits::default()
        };
        let pace = Pace::new(settings.requests_per_minute_max, settings.concurrency_max);
        Ok(Self { shared: Arc::new(Shared { settings, client, limits, pace, served: RwLock::default() }) })
    }

    /// Looks up names in another way.
    #[must_use]
    pub fn with_resolver(self, resolver: Arc<dyn Resolve>) -> Self {
        match Arc::try_unwrap(self.shared) {
            Ok(shared) => {
                let client = shared.client.with_resolver(resolver);
                Self { shared: Arc::new(Shared { client, ..shared }) }
            }
            Err(shared) => Self { shared },
        }
    }

    /// Gives a vLLM server a new LoRA adapter, and takes the one away that it replaces.
    ///
    /// # Errors
    /// When the server refuses it or is not there. The old adapter is kept when the new one could not be loaded.
    pub async fn push_adapter(&self, push: &AdapterPush) -> Result<(), LlmError> {
        self.shared.push_adapter(push).await
    }

    /// From now on calls ask for this adapter in place of the model, and what it draws is recorded under this version.
    pub fn serve_adapter(&self, name: impl Into<String>, version: PolicyVersion) {
        self.shared.serve(Served { name: name.into(), version });
    }

    /// Takes an adapter away, that of an earlier run for example. One that is not there is no error.
    ///
    /// # Errors
    /// When the server refuses or is not there.
    pub async fn remove_adapter(&self, name: &str) -> Result<(), LlmError> {
        self.shared.unload(name).await
    }

    /// Asks the server which models it has, once and without another try.
    ///
    /// # Errors
    /// When nobody answers, the key is refused, or the model is not among them.
    pub async fn check(&self) -> Result<EndpointFacts, EndpointCheckError> {
        self.shared.check().await
    }
}

impl LlmBackend for OpenAiEndpoint {
    fn open(&self, info: SessionInfo) -> Box<dyn LlmSession> {
        Box::new(Session { shared: Arc::clone(&self.shared), info })
    }

    fn name(&self) -> &str {
        &self.shared.settings.name
    }
}

struct Session {
    shared: Arc<Shared>,
    info: SessionInfo,
}

impl LlmSession for Session {
    fn chat(
        &self,
        call_index: u64,
        request: Arc<ChatRequest>,
    ) -> BoxFuture<'static, Result<Arc<Completion>, LlmError>> {
        let shared = Arc::clone(&self.shared);
        let response_id = ResponseId::of_call(&self.info.attempt, call_index);
        // A rollout's sampling is the policy's; a judge is asked as its request says.
        let is_policy = shared.settings.is_policy();
        let sampling = request.sampling.clone();
        let sampling = if is_policy { sampling.filled_from(&self.info.sampling) } else { sampling };
        let seed = if is_policy { self.info.seed.child(POLICY) } else { self.info.seed }.child_index(call_index);
        Box::pin(async move {
            let served = shared.served();
            let body = shared.body(served.as_deref(), &request, &sampling, seed)?;
            let answer = shared.ask("/chat/completions", &body, sampling.max_tokens, seed.child("backoff")).await?;
            let settings = &shared.settings;
            let asked =
                Asked { response_id, call_index, sampling, is_policy, context_tokens_max: settings.context_tokens_max };
            let mut completion = parse_completion(&answer, &asked).map_err(|error| settings.unavailable(error))?;
            if let (Some(tokens), Some(served)) = (&mut completion.tokens, served) {
                tokens.policy_version = served.version;
            }
            Ok(Arc::new(completion))
        })
    }
}

impl Shared {
    fn body(
        &self,
        served: Option<&Served>,
        request: &ChatRequest,
        sampling: &Sampling,
        seed: Seed,
    ) -> Result<Vec<u8>, LlmError> {
        if let Some(endpoint) = request.endpoint.as_ref().filter(|name| **name != self.settings.name) {
            return Err(LlmError::UnknownEndpoint(endpoint.clone()));
        }
        let model = served.map_or(&self.settings.model, |served| &served.name);
        let body = request::body(&self.settings, model, request, sampling, seed)?;
        Ok(body.to_string().into_bytes())
    }

    fn url(&self, path: &str) -> String {
        format!("{}{}{path}", self.settings.grant.origin, self.settings.path.trim_end_matches('/'))
    }

    async fn send(&self, method: &str, path: &str, body: &[u8]) -> Result<HttpResponse, HttpError> {
        let request = HttpRequest {
            method: method.to_owned(),
            url: self.url(path),
            headers: vec![("content-type".to_owned(), "application/json".to_owned())],
            body: body.to_vec(),
            timeout_ms: None,
        };
        self.client.send(request, &self.limits).await
    }

    /// Sends the request, again where that can help, and returns the body of the answer.
    async fn ask(&self, path: &str, body: &[u8], max_tokens: u32, seed: Seed) -> Result<Vec<u8>, LlmError> {
        let mut jitter = Generator::new(seed);
        let mut failures = 0;
        loop {
            let sent = {
                let _place = self.pace.place().await;
                self.send("POST", path, body).await
            };
            let refusal = match sent {
                Ok(response) if response.status == 200 => return Ok(response.body),
                Ok(response) => refusal::of_response(&self.settings, &response, max_tokens),
                Err(error) => refusal::of_error(&self.settings, error),
            };
            let (problem, after) = match refusal {
                Refusal::Final(error) => return Err(error),
                Refusal::Again { problem, after } => (problem, after),
            };
            if failures >= self.settings.retries_max {
                return Err(self.settings.unavailable(format!("{problem} (tried {} times)", failures + 1)));
            }
            let own = pace::backoff(self.settings.backoff_ms, failures, jitter.next_u64());
            let pause = own.max(after.unwrap_or(Duration::ZERO));
            tracing::warn!(endpoint = self.settings.section, problem, ?pause, "the endpoint failed, trying again");
            tokio::time::sleep(pause).await;
            failures += 1;
        }
    }
}
