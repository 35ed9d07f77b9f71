//! Between the vocabulary of `wit/` and the vocabulary of the core.

use fulgurite_core::attribute::guest_name;
use fulgurite_core::grant::Capability;
use fulgurite_core::llm::{FinishReason, LlmError, NotTrainable, Role, ToolCall, ToolSpec};
use fulgurite_core::record::RolloutMode;
use fulgurite_core::span::{Attribute, AttributeValue};
use fulgurite_core::tool::ToolError;

use crate::bindings::agent::fulgurite::agent::{llm, tools};
use crate::bindings::agent::fulgurite::types::types;
use crate::guest::GuestState;

/// Only vocabulary: there is nothing to call.
impl<H: Send + 'static> types::Host for GuestState<H> {}

pub(crate) fn role_from_wit(role: types::Role) -> Role {
    match role {
        types::Role::System => Role::System,
        types::Role::User => Role::User,
        types::Role::Assistant => Role::Assistant,
        types::Role::Tool => Role::Tool,
    }
}

pub(crate) fn role_to_wit(role: Role) -> types::Role {
    match role {
        Role::System => types::Role::System,
        Role::User => types::Role::User,
        Role::Assistant => types::Role::Assistant,
        Role::Tool => types::Role::Tool,
    }
}

pub(crate) fn mode_to_wit(mode: RolloutMode) -> types::Mode {
    match mode {
        RolloutMode::Train => types::Mode::Train,
        RolloutMode::Val => types::Mode::Val,
        RolloutMode::Test => types::Mode::Test,
    }
}

pub(crate) fn mode_from_wit(mode: types::Mode) -> RolloutMode {
    match mode {
        types::Mode::Train => RolloutMode::Train,
        types::Mode::Val => RolloutMode::Val,
        types::Mode::Test => RolloutMode::Test,
    }
}

pub(crate) fn finish_reason_to_wit(reason: FinishReason) -> types::FinishReason {
    match reason {
        FinishReason::Stop => types::FinishReason::Stop,
        FinishReason::ToolCalls => types::FinishReason::ToolCalls,
        // No guest gets a completion that it has dropped.
        FinishReason::Length | FinishReason::Cancelled => types::FinishReason::Length,
        FinishReason::ContextLength => types::FinishReason::ContextLength,
    }
}

pub(crate) fn tool_call_to_wit(call: &ToolCall) -> types::ToolCall {
    types::ToolCall { id: call.id.clone(), name: call.name.clone(), arguments: call.arguments.clone() }
}

pub(crate) fn tool_call_from_wit(call: types::ToolCall) -> ToolCall {
    ToolCall { id: call.id, name: call.name, arguments: call.arguments }
}

pub(crate) fn tool_spec_to_wit(spec: ToolSpec) -> types::ToolSpec {
    types::ToolSpec { name: spec.name, description: spec.description, parameters: spec.parameters }
}

pub(crate) fn tool_spec_from_wit(spec: types::ToolSpec) -> ToolSpec {
    ToolSpec { name: spec.name, description: spec.description, parameters: spec.parameters }
}

pub(crate) fn not_trainable_to_wit(reason: &NotTrainable) -> llm::NotTrainable {
    match reason {
        NotTrainable::NoTokenIds => llm::NotTrainable::NoTokenIds,
        NotTrainable::TruncatedSampling => llm::NotTrainable::TruncatedSampling,
        NotTrainable::OtherEndpoint => llm::NotTrainable::OtherEndpoint,
    }
}

pub(crate) fn llm_error_to_wit(error: &LlmError) -> llm::LlmError {
    match error {
        LlmError::InvalidRequest(text) => llm::LlmError::InvalidRequest(text.clone()),
        LlmError::ContextLengthExceeded { prompt_tokens, context_tokens_max } => {
            llm::LlmError::ContextLengthExceeded((*prompt_tokens, *context_tokens_max))
        }
        LlmError::UnknownEndpoint(name) => {
            let lines = Capability::Endpoint.lines("agent", name);
            llm::LlmError::UnknownEndpoint(format!("no endpoint `{name}` is granted; this would allow it:\n{lines}"))
        }
        LlmError::LimitReached { name, value } => {
            llm::LlmError::LimitReached(types::LimitReached { name: name.clone(), value: *value })
        }
        LlmError::Unavailable(text) => llm::LlmError::Unavailable(text.clone()),
        LlmError::Unsupported(text) => llm::LlmError::Unsupported(text.clone()),
    }
}

/// A fault has no case: it ends the attempt before the agent sees anything.
pub(crate) fn tool_error_to_wit(error: ToolError) -> tools::ToolError {
    match error {
        ToolError::UnknownTool(text) => tools::ToolError::UnknownTool(text),
        ToolError::InvalidArguments(text) => tools::ToolError::InvalidArguments(text),
        ToolError::Denied(text) => tools::ToolError::Denied(text),
        ToolError::Failed(text) => tools::ToolError::Failed(text),
        ToolError::Fault { detail, .. } => tools::ToolError::Other(detail),
        ToolError::Unsupported(text) => tools::ToolError::Unsupported(text),
    }
}

/// Attributes that a guest gave, with reserved names filed away, and how many bytes they take.
pub(crate) fn attributes_from_wit(attributes: Vec<types::Attribute>) -> (Vec<Attribute>, usize) {
    let mut bytes = 0;
    let mut list = Vec::with_capacity(attributes.len());
    for attribute in attributes {
        let value = match attribute.value {
            types::AttributeValue::Text(text) => {
                bytes += text.len();
                AttributeValue::Text(text)
            }
            types::AttributeValue::Integer(number) => AttributeValue::Integer(number),
            types::AttributeValue::Number(number) => AttributeValue::Number(number),
            types::AttributeValue::Boolean(boolean) => AttributeValue::Boolean(boolean),
        };
        // What it costs the host: an attribute without name and text is not free.
        bytes += attribute.name.len() + size_of::<Attribute>();
        list.push((guest_name(&attribute.name), value));
    }
    (list, bytes)
}
