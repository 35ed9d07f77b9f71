//! `fulgurite:agent/llm`: calls of language models.
//!
//! A started call is a stream that the host keeps in the guest's resource table. It is polled once when it starts, so that
//! the model gets its request in the order of the calls, and from then on whenever the guest waits. A call that is dropped,
//! by the guest or with its store, is recorded with what the guest has read of it, and as cancelled when that is nothing:
//! nothing that was asked goes unrecorded.
#![expect(unreachable_pub, reason = "the generated bindings re-export the resources' types, which pub(crate) forbids")]

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use fulgurite_core::llm::{ChatRequest, Completion, Constraint, LlmError, Message, Role, Sampling, whole_answer};
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::span::SpanBody;
use futures::future::BoxFuture;
use wasmtime::component::Resource;

use crate::agent::{AgentState, LastFailure};
use crate::agent_call::{Answer, PendingLlm, Ticket, foreign};
use crate::bindings::agent::fulgurite::agent::llm;
use crate::bindings::agent::fulgurite::types::types;
use crate::convert;
use crate::fault::Stop;
use crate::recorder::{Begun, refused};
use crate::tape::was_cancelled;

const INTERFACE: &str = "fulgurite:agent/llm@0.1.0";

/// A request in the making.
pub struct RequestDraft {
    /// Shared with the calls that it was used for; a draft that is changed after a call is copied then.
    request: Arc<ChatRequest>,
    /// Bytes of its texts.
    text_bytes: u64,
    /// Bytes that it costs the host.
    held_bytes: u64,
}

/// A completion that the guest holds.
pub struct FinishedCall(Arc<Completion>);

impl AgentState {
    /// Holds so many bytes more on behalf of the guest: no more than it could hold itself.
    fn hold(&mut self, bytes: u64) -> wasmtime::Result<()> {
        let limit = self.host.limits.memory_bytes_max;
        self.host.request_bytes = self.host.request_bytes.saturating_add(bytes);
        if self.host.request_bytes > limit {
            return Err(Stop::limit(OutcomeKind::MemoryLimit, "memory_bytes_max", limit).error());
        }
        Ok(())
    }

    /// Adds text to a request. Empty text costs the host a message all the same.
    fn grow(&mut self, request: &Resource<RequestDraft>, bytes: usize) -> wasmtime::Result<&mut ChatRequest> {
        let held_bytes = (bytes as u64).saturating_add(size_of::<Message>() as u64);
        self.hold(held_bytes)?;
        let limits = &self.host.limits;
        let draft = self.table.get_mut(request)?;
        draft.text_bytes = draft.text_bytes.saturating_add(bytes as u64);
        draft.held_bytes = draft.held_bytes.saturating_add(held_bytes);
        if draft.text_bytes > limits.payload_bytes_max {
            let limit = Stop::limit(OutcomeKind::OutputLimit, "payload_bytes_max", limits.payload_bytes_max);
            return Err(limit.error());
        }
        Ok(Arc::make_mut(&mut draft.request))
    }

    fn sampling(&mut self, request: &Resource<RequestDraft>) -> wasmtime::Result<&mut Sampling> {
        Ok(&mut Arc::make_mut(&mut self.table.get_mut(request)?.request).sampling)
    }

    /// Gives the call its number and checks it. The error is for the guest: such a call is recorded, but not made.
    fn open_call(
        &mut self,
        request: &Resource<RequestDraft>,
    ) -> wasmtime::Result<(Ticket, Arc<ChatRequest>, Result<(), LlmError>)> {
        self.host.log.take_span().map_err(Stop::error)?;
        let request = Arc::clone(&self.table.get(request)?.request);
        let call_index = self.host.llm_calls;
        self.host.llm_calls += 1;
        let limits = &self.host.limits;
        let checked = if call_index >= limits.llm_calls_max {
            Err(LlmError::LimitReached { name: "llm_calls_max".to_owned(), value: limits.llm_calls_max })
        } else if self.host.completion_tokens >= limits.completion_tokens_max {
            Err(LlmError::LimitReached {
                name: "completion_tokens_max".to_owned(),
                value: limits.completion_tokens_max,
            })
        } else {
            check(&request).map_err(LlmError::InvalidRequest)
        };
        let begun = self.host.log.recorder.begin();
        // What is refused here is refused again in a replay; only what a model answered comes from the recording.
        if checked.is_ok()
            && let Some(tape) = self.host.tape()
        {
            tape.check_request(call_index, &request).map_err(Stop::error)?;
        }
        let ticket = Ticket::new(Arc::clone(&self.host.log), begun, call_index, Arc::clone(&request));
        let mut sent = request;
        // The last call before the limit may not run far past it.
        let left = limits.completion_tokens_max.saturating_sub(self.host.completion_tokens);
        let left = u32::try_from(left).unwrap_or(u32::MAX);
        if sent.sampling.max_tokens > left {
            Arc::make_mut(&mut sent).sampling.max_tokens = left;
        }
        Ok((ticket, sent, checked))
    }

    /// The answer to a call that no model is asked for.
    fn known_answer(&self, call_index: u64, checked: Result<(), LlmError>) -> Option<BoxFuture<'static, Answer>> {
        if let Err(refused) = checked {
            return Some(Box::pin(std::future::ready(Err(refused))));
        }
        let tape = self.host.tape()?;
        match tape.llm_call(call_index).map(|call| call.result.clone()) {
            // What never ended is not answered: the guest dropped it, or was dropped itself while it waited.
            Some(recorded) if was_cancelled(&recorded) => Some(Box::pin(std::future::pending())),
            Some(recorded) => Some(Box::pin(std::future::ready(recorded))),
            None => tape.is_whole().then(|| -> BoxFuture<'static, Answer> { Box::pin(std::future::pending()) }),
        }
    }

    /// Records the end of a call and hands its result to the guest.
    fn close_call(
        &mut self,
        ticket: Ticket,
        result: Answer,
    ) -> wasmtime::Result<Result<Resource<FinishedCall>, llm::LlmError>> {
        self.count(&result);
        let answer = match &result {
            Ok(completion) => Ok(Arc::clone(completion)),
            Err(error) => Err(convert::llm_error_to_wit(error)),
        };
        ticket.close(result).map_err(Stop::error)?;
        Ok(match answer {
            Ok(completion) => Ok(self.table.push(FinishedCall(completion))?),
            Err(error) => Err(error),
        })
    }

    /// Takes note of an answer that the guest has.
    fn count(&mut self, result: &Answer) {
        match result {
            Ok(completion) => {
                let tokens = u64::from(completion.usage.completion_tokens);
                self.host.completion_tokens = self.host.completion_tokens.saturating_add(tokens);
            }
            Err(error) => self.host.last_failure = Some(LastFailure::Llm(error.clone())),
        }
    }

    /// What ends a wait for this call: in a replay, an answer that was never recorded is not waited for.
    fn in_vain(&self) -> impl Fn(u64) -> Option<wasmtime::Error> + use<> {
        let tape = self.host.log.recorder.tape().cloned();
        move |call_index| tape.as_ref()?.waits_in_vain(call_index).map(Stop::error)
    }

    /// Waits for a call, as far as `poll` says.
    async fn wait_for_call(
        &mut self,
        call: &Resource<PendingLlm>,
        poll: fn(&mut PendingLlm, &mut Context<'_>) -> Poll<()>,
    ) -> wasmtime::Result<()> {
        let in_vain = self.in_vain();
        self.wait(|table, context| match table.get_mut(call) {
            Ok(pending) => match poll(pending, context) {
                Poll::Ready(()) => Poll::Ready(Ok(())),
                Poll::Pending => in_vain(pending.call_index()).map_or(Poll::Pending, |vain| Poll::Ready(Err(vain))),
            },
            Err(error) => Poll::Ready(Err(error.into())),
        })
        .await
    }

    fn record_host_call(
        &self,
        begun: Begun,
        function: &str,
        arguments: &serde_json::Value,
        result: &serde_json::Value,
    ) -> wasmtime::Result<()> {
        let body = SpanBody::HostCall {
            interface: INTERFACE.to_owned(),
            function: function.to_owned(),
            arguments: arguments.to_string(),
            result: result.to_string(),
        };
        let ended = self.host.log.recorder.end(begun, function, vec![], body);
        ended.map_err(|refusal| refused(&refusal).error())
    }
}

/// What is recorded of a piece of streamed text.
#[derive(serde::Deserialize)]
struct Chunk {
    chunk_bytes: usize,
}

fn still_under_way() -> wasmtime::Error {
    wasmtime::Error::msg("a call that was waited for is still under way")
}

/// What a model could only refuse in its own words is refused here, naming the field.
fn check(request: &ChatRequest) -> Result<(), String> {
    let sampling = &request.sampling;
    if request.messages.is_empty() {
        return Err("messages: the request has none".to_owned());
    }
    if !sampling.temperature.is_finite() || sampling.temperature < 0.0 {
        return Err(format!("temperature: {} is not a number >= 0", sampling.temperature));
    }
    if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
        return Err(format!("top-p: {} is not in (0, 1]", sampling.top_p));
    }
    if !(sampling.min_p >= 0.0 && sampling.min_p < 1.0) {
        return Err(format!("min-p: {} is not in [0, 1)", sampling.min_p));
    }
    for tool in &request.tools {
        if !is_json(&tool.parameters) {
            return Err(format!("tools: the parameters of `{}` are not JSON", tool.name));
        }
    }
    if let Some(Constraint::JsonSchema(schema)) = &sampling.constraint
        && !is_json(schema)
    {
        return Err("constrain-json: the schema is not JSON".to_owned());
    }
    Ok(())
}

/// Whether a text is JSON that everybody can read: parsers go 128 levels deep, and the check alone would not notice.
pub(crate) fn is_json(text: &str) -> bool {
    serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok() && levels(text) < JSON_LEVELS_MAX
}

/// Deepest nesting that `serde_json` reads as a value.
const JSON_LEVELS_MAX: usize = 128;

/// How deep the brackets of a JSON text are nested.
fn levels(json: &str) -> usize {
    let (mut level, mut deepest, mut quoted, mut escaped) = (0_usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            b'[' | b'{' if !quoted => {
                level += 1;
                deepest = deepest.max(level);
            }
            b']' | b'}' if !quoted => level = level.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

impl llm::HostRequest for AgentState {
    fn new(&mut self) -> wasmtime::Result<Resource<RequestDraft>> {
        let request = ChatRequest {
            messages: vec![],
            tools: vec![],
            sampling: Sampling::default(),
            agent_role: "agent".to_owned(),
            endpoint: None,
        };
        Ok(self.table.push(RequestDraft { request: Arc::new(request), text_bytes: 0, held_bytes: 0 })?)
    }

    fn add_system(&mut self, request: Resource<RequestDraft>, content: String) -> wasmtime::Result<()> {
        self.grow(&request, content.len())?.messages.push(Message::text(Role::System, content));
        Ok(())
    }

    fn add_user(&mut self, request: Resource<RequestDraft>, content: String) -> wasmtime::Result<()> {
        self.grow(&request, content.len())?.messages.push(Message::text(Role::User, content));
        Ok(())
    }

    fn add_assistant(
        &mut self,
        request: Resource<RequestDraft>,
        content: String,
        tool_calls: Vec<types::ToolCall>,
        response_id: Option<String>,
    ) -> wasmtime::Result<()> {
        let calls: usize = tool_calls.iter().map(|call| call.id.len() + call.name.len() + call.arguments.len()).sum();
        let bytes = content.len() + calls + response_id.as_ref().map_or(0, String::len);
        let message = Message {
            tool_calls: tool_calls.into_iter().map(convert::tool_call_from_wit).collect(),
            response_id: response_id.map(fulgurite_core::id::ResponseId),
            ..Message::text(Role::Assistant, content)
        };
        self.grow(&request, bytes)?.messages.push(message);
        Ok(())
    }

    fn add_tool_result(
        &mut self,
        request: Resource<RequestDraft>,
        tool_call_id: String,
        content: String,
    ) -> wasmtime::Result<()> {
        let bytes = content.len() + tool_call_id.len();
        let message = Message { tool_call_id: Some(tool_call_id), ..Message::text(Role::Tool, content) };
        self.grow(&request, bytes)?.messages.push(message);
        Ok(())
    }

    fn set_tools(&mut self, request: Resource<RequestDraft>, tools: Vec<types::ToolSpec>) -> wasmtime::Result<()> {
        let bytes = tools.iter().map(|tool| tool.name.len() + tool.description.len() + tool.parameters.len()).sum();
        self.grow(&request, bytes)?.tools = tools.into_iter().map(convert::tool_spec_from_wit).collect();
        Ok(())
    }

    fn set_temperature(&mut self, request: Resource<RequestDraft>, value: f32) -> wasmtime::Result<()> {
        self.sampling(&request)?.temperature = value;
        Ok(())
    }

    fn set_top_p(&mut self, request: Resource<RequestDraft>, value: f32) -> wasmtime::Result<()> {
        self.sampling(&request)?.top_p = value;
        Ok(())
    }

    fn set_top_k(&mut self, request: Resource<RequestDraft>, value: u32) -> wasmtime::Result<()> {
        self.sampling(&request)?.top_k = value;
        Ok(())
    }

    fn set_min_p(&mut self, request: Resource<RequestDraft>, value: f32) -> wasmtime::Result<()> {
        self.sampling(&request)?.min_p = value;
        Ok(())
    }

    fn set_max_tokens(&mut self, request: Resource<RequestDraft>, value: u32) -> wasmtime::Result<()> {
        self.sampling(&request)?.max_tokens = value;
        Ok(())
    }

    fn set_stop(&mut self, request: Resource<RequestDraft>, texts: Vec<String>) -> wasmtime::Result<()> {
        let bytes = texts.iter().map(|text| text.len() + size_of::<String>()).sum();
        self.grow(&request, bytes)?.sampling.stop = texts;
        Ok(())
    }

    fn set_seed(&mut self, request: Resource<RequestDraft>, seed: u64) -> wasmtime::Result<()> {
        self.sampling(&request)?.seed = Some(seed);
        Ok(())
    }

    fn constrain_json(&mut self, request: Resource<RequestDraft>, schema: String) -> wasmtime::Result<()> {
        let bytes = schema.len();
        self.grow(&request, bytes)?.sampling.constraint = Some(Constraint::JsonSchema(schema));
        Ok(())
    }

    fn constrain_regex(&mut self, request: Resource<RequestDraft>, pattern: String) -> wasmtime::Result<()> {
        let bytes = pattern.len();
        self.grow(&request, bytes)?.sampling.constraint = Some(Constraint::Regex(pattern));
        Ok(())
    }

    fn set_agent_role(&mut self, request: Resource<RequestDraft>, role: String) -> wasmtime::Result<()> {
        let bytes = role.len();
        self.grow(&request, bytes)?.agent_role = role;
        Ok(())
    }

    fn set_endpoint(&mut self, request: Resource<RequestDraft>, name: String) -> wasmtime::Result<()> {
        let bytes = name.len();
        self.grow(&request, bytes)?.endpoint = Some(name);
        Ok(())
    }

    fn drop(&mut self, request: Resource<RequestDraft>) -> wasmtime::Result<()> {
        let draft = self.table.delete(request)?;
        self.host.request_bytes = self.host.request_bytes.saturating_sub(draft.held_bytes);
        Ok(())
    }
}

impl AgentState {
    fn completion(&self, call: &Resource<FinishedCall>) -> wasmtime::Result<&Completion> {
        Ok(&self.table.get(call)?.0)
    }

    /// Checks the size of what a call hands to the guest; wasmtime bounds only the other way.
    fn give<T>(&self, bytes: usize, value: T) -> wasmtime::Result<T> {
        let limit = self.host.limits.payload_bytes_max;
        if bytes as u64 > limit {
            return Err(Stop::limit(OutcomeKind::OutputLimit, "payload_bytes_max", limit).error());
        }
        Ok(value)
    }
}

impl llm::HostCompletion for AgentState {
    fn text(&mut self, call: Resource<FinishedCall>) -> wasmtime::Result<String> {
        let text = &self.completion(&call)?.text;
        self.give(text.len(), text.clone())
    }

    fn tool_calls(&mut self, call: Resource<FinishedCall>) -> wasmtime::Result<Vec<types::ToolCall>> {
        let calls = &self.completion(&call)?.tool_calls;
        let bytes = calls.iter().map(|call| call.id.len() + call.name.len() + call.arguments.len()).sum();
        self.give(bytes, calls.iter().map(convert::tool_call_to_wit).collect())
    }

    fn finish_reason(&mut self, call: Resource<FinishedCall>) -> wasmtime::Result<types::FinishReason> {
        Ok(convert::finish_reason_to_wit(self.completion(&call)?.finish_reason))
    }

    fn response_id(&mut self, call: Resource<FinishedCall>) -> wasmtime::Result<String> {
        Ok(self.completion(&call)?.response_id.0.clone())
    }

    fn prompt_tokens(&mut self, call: Resource<FinishedCall>) -> wasmtime::Result<u32> {
        Ok(self.completion(&call)?.usage.prompt_tokens)
    }

    fn completion_tokens(&mut self, call: Resource<FinishedCall>) -> wasmtime::Result<u32> {
        Ok(self.completion(&call)?.usage.completion_tokens)
    }

    fn prompt_ids(&mut self, call: Resource<FinishedCall>) -> wasmtime::Result<Vec<u32>> {
        let tokens = self.completion(&call)?.tokens.as_ref();
        let list = tokens.map(|tokens| tokens.prompt_ids.as_slice()).unwrap_or_default();
        self.give(size_of_val(list), list.to_vec())
    }

    fn completion_ids(&mut self, call: Resource<FinishedCall>) -> wasmtime::Result<Vec<u32>> {
        let tokens = self.completion(&call)?.tokens.as_ref();
        let list = tokens.map(|tokens| tokens.completion_ids.as_slice()).unwrap_or_default();
        self.give(size_of_val(list), list.to_vec())
    }

    fn log_probs(&mut self, call: Resource<FinishedCall>) -> wasmtime::Result<Vec<f32>> {
        let tokens = self.completion(&call)?.tokens.as_ref();
        let list = tokens.map(|tokens| tokens.log_probs.as_slice()).unwrap_or_default();
        self.give(size_of_val(list), list.to_vec())
    }

    fn policy_version(&mut self, call: Resource<FinishedCall>) -> wasmtime::Result<Option<u64>> {
        Ok(self.completion(&call)?.tokens.as_ref().map(|tokens| tokens.policy_version.0))
    }

    fn not_trainable(&mut self, call: Resource<FinishedCall>) -> wasmtime::Result<Option<llm::NotTrainable>> {
        Ok(self.completion(&call)?.not_trainable.as_ref().map(convert::not_trainable_to_wit))
    }

    fn drop(&mut self, call: Resource<FinishedCall>) -> wasmtime::Result<()> {
        self.table.delete(call)?;
        Ok(())
    }
}

impl llm::HostPending for AgentState {
    async fn next(&mut self, call: Resource<PendingLlm>) -> wasmtime::Result<Result<Option<String>, llm::LlmError>> {
        self.host.log.take_span().map_err(Stop::error)?;
        let begun = self.host.log.recorder.begin();
        self.wait_for_call(&call, PendingLlm::poll).await?;
        let chunk: Option<Chunk> = self.host.recorded_result("[method]pending.next");
        let pending = self.table.get_mut(&call)?;
        let arguments = serde_json::json!({ "call_index": pending.call_index() });
        let answer = pending.read(chunk.map(|chunk| chunk.chunk_bytes)).ok_or_else(still_under_way)?;
        // The record says how much each piece held, and a replay cuts there again.
        let recorded = match &answer {
            Ok(Some(text)) => serde_json::json!({ "chunk_bytes": text.len() }),
            Ok(None) => serde_json::json!({ "end": true }),
            Err(error) => serde_json::json!({ "error": error.to_string() }),
        };
        if let Err(error) = &answer {
            self.host.last_failure = Some(LastFailure::Llm(error.clone()));
        }
        self.record_host_call(begun, "[method]pending.next", &arguments, &recorded)?;
        let bytes = answer.as_ref().map_or(0, |text| text.as_ref().map_or(0, String::len));
        self.give(bytes, answer.map_err(|error| convert::llm_error_to_wit(&error)))
    }

    fn drop(&mut self, call: Resource<PendingLlm>) -> wasmtime::Result<()> {
        self.host.log.recorder.act().map_err(Stop::error)?;
        self.host.pending_llm.remove(&call.rep());
        let mut pending = self.table.delete(call)?;
        if let Some(seen) = pending.leave() {
            self.count(&seen);
        }
        self.host.request_bytes = self.host.request_bytes.saturating_sub(pending.held_bytes());
        Ok(())
    }
}

impl llm::Host for AgentState {
    async fn chat(
        &mut self,
        request: Resource<RequestDraft>,
    ) -> wasmtime::Result<Result<Resource<FinishedCall>, llm::LlmError>> {
        let (ticket, request, checked) = self.open_call(&request)?;
        let known = self.known_answer(ticket.call_index, checked);
        let mut call = known.unwrap_or_else(|| self.host.llm.chat(ticket.call_index, request));
        let in_vain = self.in_vain();
        let result = self.wait(|_, context| match call.as_mut().poll(context) {
            Poll::Ready(result) => Poll::Ready(Ok(foreign(result))),
            Poll::Pending => in_vain(ticket.call_index).map_or(Poll::Pending, |vain| Poll::Ready(Err(vain))),
        });
        let result = result.await?;
        self.close_call(ticket, result)
    }

    async fn start(
        &mut self,
        request: Resource<RequestDraft>,
    ) -> wasmtime::Result<Result<Resource<PendingLlm>, llm::LlmError>> {
        let held_bytes = self.table.get(&request)?.held_bytes;
        self.hold(held_bytes)?;
        let (ticket, request, checked) = self.open_call(&request)?;
        let known = self.known_answer(ticket.call_index, checked).map(whole_answer);
        let stream = known.unwrap_or_else(|| self.host.llm.stream(ticket.call_index, request));
        let mut pending = PendingLlm::new(ticket, stream, held_bytes);
        let first = poll_fn(|context| {
            let _ = pending.poll(context);
            Poll::Ready(())
        });
        self.meter.host(first).await;
        let pending = self.table.push(pending)?;
        self.host.pending_llm.insert(pending.rep());
        Ok(Ok(pending))
    }

    async fn finish(
        &mut self,
        call: Resource<PendingLlm>,
    ) -> wasmtime::Result<Result<Resource<FinishedCall>, llm::LlmError>> {
        self.host.log.recorder.act().map_err(Stop::error)?;
        self.wait_for_call(&call, PendingLlm::poll_end).await?;
        self.host.pending_llm.remove(&call.rep());
        let mut pending = self.table.delete(call)?;
        self.host.request_bytes = self.host.request_bytes.saturating_sub(pending.held_bytes());
        let (ticket, answer) = pending.take_answer().ok_or_else(still_under_way)?;
        self.close_call(ticket, answer)
    }

    async fn wait_any(&mut self, calls: Vec<Resource<PendingLlm>>) -> wasmtime::Result<Result<u32, llm::LlmError>> {
        if calls.is_empty() {
            return Ok(Err(llm::LlmError::InvalidRequest("calls: the list is empty".to_owned())));
        }
        self.host.log.take_span().map_err(Stop::error)?;
        let begun = self.host.log.recorder.begin();
        let mut indices = Vec::with_capacity(calls.len());
        for call in &calls {
            indices.push(self.table.get(call)?.call_index());
        }
        let ready = if let Some(recorded) = self.recorded_wait("wait-any").await {
            recorded
        } else {
            {
                let (in_vain, first) = (self.in_vain(), indices.first().copied().unwrap_or_default());
                self.wait_for_any(&calls, PendingLlm::poll, || in_vain(first)).await?
            }
        };
        let arguments = serde_json::json!({ "call_indices": indices });
        self.record_host_call(begun, "wait-any", &arguments, &serde_json::json!(ready))?;
        Ok(Ok(u32::try_from(ready).unwrap_or(u32::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(change: impl FnOnce(&mut ChatRequest)) -> ChatRequest {
        let mut request = ChatRequest {
            messages: vec![Message::text(Role::User, "hello")],
            tools: vec![],
            sampling: Sampling::default(),
            agent_role: "agent".to_owned(),
            endpoint: None,
        };
        change(&mut request);
        request
    }

    #[test]
    fn json_is_what_every_parser_reads() {
        let nested = |levels: usize| format!("{}1{}", "[".repeat(levels), "]".repeat(levels));
        for levels in [0, 1, 126, 127, 128, 129, 100_000] {
            let text = nested(levels);
            assert_eq!(is_json(&text), serde_json::from_str::<serde_json::Value>(&text).is_ok(), "{levels}");
        }
        let brackets = "[".repeat(200);
        assert!(is_json(&format!(r#"{{"a": "\"{brackets}", "b\\": [1, "\\"], "{brackets}": 0}}"#)));
        assert!(!is_json(&format!(r#"["\\", {}]"#, nested(127))));
    }

    type Change = fn(&mut ChatRequest);

    #[test]
    fn a_wrong_value_is_named() {
        assert_eq!(check(&request(|_| {})), Ok(()));
        let wrong: [(&str, Change); 5] = [
            ("messages", |request| request.messages.clear()),
            ("temperature", |request| request.sampling.temperature = f32::NAN),
            ("top-p", |request| request.sampling.top_p = 0.0),
            ("min-p", |request| request.sampling.min_p = 1.0),
            ("constrain-json", |request| request.sampling.constraint = Some(Constraint::JsonSchema("{".to_owned()))),
        ];
        for (field, change) in wrong {
            assert!(check(&request(change)).unwrap_err().starts_with(field), "{field}");
        }
    }
}
