//! `fulgurite:grader/judge`: a model that a grader may ask.
#![expect(unreachable_pub, reason = "the generated bindings re-export the resources' types, which pub(crate) forbids")]

use std::collections::BTreeMap;
use std::sync::Arc;

use fulgurite_core::grant::Capability;
use fulgurite_core::host_call::{HostCall, HostCallLog};
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{ChatRequest, Completion, Constraint, LlmError, LlmSession, Message, Role, Sampling};
use wasmtime::component::Resource;

use super::{Draft, arguments, record, remembered};
use crate::bindings::agent::fulgurite::types::types;
use crate::bindings::grader::fulgurite::grader::judge as wit;
use crate::convert;
use crate::fault::Stop;
use crate::guest::GuestState;

const INTERFACE: &str = "fulgurite:grader/judge@0.1.0";

/// The granted endpoints of one grading.
#[derive(Clone)]
pub struct Judge {
    /// Their sessions by the endpoint's name.
    pub sessions: BTreeMap<String, Arc<dyn LlmSession>>,
    /// Where calls are recorded and remembered.
    pub log: Arc<dyn HostCallLog>,
}

impl std::fmt::Debug for Judge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let endpoints: Vec<_> = self.sessions.keys().collect();
        f.debug_struct("Judge").field("endpoints", &endpoints).finish_non_exhaustive()
    }
}

/// The data of a grader's store.
type GraderState = GuestState<GraderGuest>;

/// What the host functions of a grader work on.
pub(crate) struct GraderGuest {
    judge: Option<Judge>,
    limits: Limits,
    calls: u64,
    completion_tokens: u64,
    /// Bytes of all requests in the making.
    request_bytes: u64,
}

impl GraderGuest {
    pub(crate) fn new(judge: Option<Judge>, limits: &Limits) -> Self {
        Self { judge, limits: limits.clone(), calls: 0, completion_tokens: 0, request_bytes: 0 }
    }
}

/// A call in the making.
pub type JudgeRequest = Draft<ChatRequest>;

/// What a judge said.
pub struct JudgeAnswer(Completion);

fn error_to_wit(error: LlmError) -> wit::JudgeError {
    match error {
        LlmError::InvalidRequest(text) => wit::JudgeError::InvalidRequest(text),
        LlmError::ContextLengthExceeded { prompt_tokens, context_tokens_max } => {
            wit::JudgeError::ContextLengthExceeded((prompt_tokens, context_tokens_max))
        }
        LlmError::UnknownEndpoint(name) => {
            let lines = Capability::Endpoint.lines("grader", &name);
            wit::JudgeError::UnknownEndpoint(format!("no endpoint `{name}` is granted; this would allow it:\n{lines}"))
        }
        LlmError::LimitReached { name, value } => wit::JudgeError::LimitReached(types::LimitReached { name, value }),
        LlmError::Unavailable(text) => wit::JudgeError::Unavailable(text),
        LlmError::Unsupported(text) => wit::JudgeError::Other(text),
    }
}

impl GraderState {
    /// Makes room for `bytes` more of a request; `None` when it has too many already.
    fn grow(&mut self, request: &Resource<JudgeRequest>, bytes: usize) -> wasmtime::Result<Option<&mut ChatRequest>> {
        let most = self.host.limits.payload_bytes_max;
        Ok(self.table.get_mut(request)?.grow(bytes as u64, most, &mut self.host.request_bytes))
    }

    fn add(&mut self, request: &Resource<JudgeRequest>, role: Role, content: String) -> wasmtime::Result<()> {
        if let Some(draft) = self.grow(request, content.len() + size_of::<Message>())? {
            draft.messages.push(Message::text(role, content));
        }
        Ok(())
    }

    async fn ask(&mut self, mut request: ChatRequest, too_long: bool) -> Result<Result<Completion, LlmError>, Stop> {
        let limits = &self.host.limits;
        let limit = |name: &str, value| Ok(Err(LlmError::LimitReached { name: name.to_owned(), value }));
        let name = request.endpoint.clone().unwrap_or_default();
        let granted = self.host.judge.as_ref();
        let Some((session, log)) =
            granted.and_then(|judge| Some((Arc::clone(judge.sessions.get(&name)?), Arc::clone(&judge.log))))
        else {
            return Ok(Err(LlmError::UnknownEndpoint(name)));
        };
        if too_long {
            return limit("payload_bytes_max", limits.payload_bytes_max);
        }
        if self.host.calls >= limits.llm_calls_max {
            return limit("llm_calls_max", limits.llm_calls_max);
        }
        if self.host.completion_tokens >= limits.completion_tokens_max {
            return limit("completion_tokens_max", limits.completion_tokens_max);
        }
        if request.messages.is_empty() {
            return Ok(Err(LlmError::InvalidRequest("messages: the request has none".to_owned())));
        }
        if !request.sampling.temperature.is_finite() || request.sampling.temperature < 0.0 {
            return Ok(Err(LlmError::InvalidRequest("temperature: not a number >= 0".to_owned())));
        }
        let left = limits.completion_tokens_max.saturating_sub(self.host.completion_tokens);
        let left = u32::try_from(left).unwrap_or(u32::MAX);
        let asked = request.sampling.max_tokens;
        request.sampling.max_tokens = if asked == 0 { left } else { asked.min(left) };
        let index = self.host.calls;
        self.host.calls += 1;
        let call = HostCall { interface: INTERFACE, function: "chat", arguments: arguments(&request) };
        let result = if let Some(result) = remembered(&*log, &call)? {
            result
        } else {
            let result = self.meter.host(session.chat(index, Arc::new(request))).await.map(Arc::unwrap_or_clone);
            record(&*log, call, &result)?;
            result
        };
        if let Ok(completion) = &result {
            let drawn = u64::from(completion.usage.completion_tokens);
            self.host.completion_tokens = self.host.completion_tokens.saturating_add(drawn);
        }
        Ok(result)
    }
}

impl wit::Host for GraderState {
    async fn chat(
        &mut self,
        request: Resource<JudgeRequest>,
    ) -> wasmtime::Result<Result<Resource<JudgeAnswer>, wit::JudgeError>> {
        let draft = self.table.get(&request)?;
        let (request, too_long) = (draft.request.clone(), draft.too_long);
        match self.ask(request, too_long).await.map_err(Stop::error)? {
            Ok(completion) => Ok(Ok(self.table.push(JudgeAnswer(completion))?)),
            Err(error) => Ok(Err(error_to_wit(error))),
        }
    }
}

impl wit::HostRequest for GraderState {
    fn new(&mut self, endpoint: String) -> wasmtime::Result<Resource<JudgeRequest>> {
        let request = ChatRequest {
            messages: vec![],
            tools: vec![],
            sampling: Sampling { temperature: 0.0, ..Sampling::default() },
            agent_role: "judge".to_owned(),
            endpoint: None,
        };
        let request = self.table.push(Draft::new(request))?;
        if let Some(draft) = self.grow(&request, endpoint.len())? {
            draft.endpoint = Some(endpoint);
        }
        Ok(request)
    }

    fn add_system(&mut self, request: Resource<JudgeRequest>, content: String) -> wasmtime::Result<()> {
        self.add(&request, Role::System, content)
    }

    fn add_user(&mut self, request: Resource<JudgeRequest>, content: String) -> wasmtime::Result<()> {
        self.add(&request, Role::User, content)
    }

    fn add_assistant(&mut self, request: Resource<JudgeRequest>, content: String) -> wasmtime::Result<()> {
        self.add(&request, Role::Assistant, content)
    }

    fn set_temperature(&mut self, request: Resource<JudgeRequest>, value: f32) -> wasmtime::Result<()> {
        self.table.get_mut(&request)?.request.sampling.temperature = value;
        Ok(())
    }

    fn set_max_tokens(&mut self, request: Resource<JudgeRequest>, value: u32) -> wasmtime::Result<()> {
        self.table.get_mut(&request)?.request.sampling.max_tokens = value;
        Ok(())
    }

    fn constrain_json(&mut self, request: Resource<JudgeRequest>, schema: String) -> wasmtime::Result<()> {
        if let Some(draft) = self.grow(&request, schema.len())? {
            draft.sampling.constraint = Some(Constraint::JsonSchema(schema));
        }
        Ok(())
    }

    fn drop(&mut self, request: Resource<JudgeRequest>) -> wasmtime::Result<()> {
        let draft = self.table.delete(request)?;
        self.host.request_bytes = self.host.request_bytes.saturating_sub(draft.bytes);
        Ok(())
    }
}

impl wit::HostAnswer for GraderState {
    fn text(&mut self, answer: Resource<JudgeAnswer>) -> wasmtime::Result<String> {
        Ok(self.table.get(&answer)?.0.text.clone())
    }

    fn finish_reason(&mut self, answer: Resource<JudgeAnswer>) -> wasmtime::Result<types::FinishReason> {
        Ok(convert::finish_reason_to_wit(self.table.get(&answer)?.0.finish_reason))
    }

    fn prompt_tokens(&mut self, answer: Resource<JudgeAnswer>) -> wasmtime::Result<u32> {
        Ok(self.table.get(&answer)?.0.usage.prompt_tokens)
    }

    fn completion_tokens(&mut self, answer: Resource<JudgeAnswer>) -> wasmtime::Result<u32> {
        Ok(self.table.get(&answer)?.0.usage.completion_tokens)
    }

    fn drop(&mut self, answer: Resource<JudgeAnswer>) -> wasmtime::Result<()> {
        self.table.delete(answer)?;
        Ok(())
    }
}
