//! Looks for text in what a span says.

use fulgurite_core::llm::Message;
use fulgurite_core::span::{AttributeValue, LlmCall, Span, SpanBody, SpanStatus};

/// Whether a text occurs in the span's name, status, attributes or body.
pub(crate) fn contains(span: &Span, wanted: &str) -> bool {
    let has = |text: &str| text.contains(wanted);
    let status = matches!(&span.status, SpanStatus::Error(text) if has(text));
    let attribute = |(name, value): &(String, AttributeValue)| {
        has(name) || matches!(value, AttributeValue::Text(text) if has(text))
    };
    let message = |message: &Message| {
        has(&message.content) || message.tool_calls.iter().any(|call| has(&call.name) || has(&call.arguments))
    };
    let llm = |call: &LlmCall| {
        let answer = match &call.result {
            Ok(answer) => {
                has(&answer.text) || answer.tool_calls.iter().any(|call| has(&call.name) || has(&call.arguments))
            }
            Err(error) => has(&error.to_string()),
        };
        answer || has(&call.agent_role) || call.new_messages.iter().any(message)
    };
    let body = match &span.body {
        SpanBody::Attempt(outcome) => has(&outcome.output) || has(&outcome.detail) || has(outcome.kind.as_str()),
        SpanBody::Llm(call) => llm(call),
        SpanBody::ToolList(Ok(tools)) => tools.iter().any(|tool| has(&tool.name) || has(&tool.description)),
        SpanBody::ToolList(Err(error)) => has(&error.to_string()),
        SpanBody::Tool { name, arguments, result } => {
            has(name)
                || has(arguments)
                || match result {
                    Ok(text) => has(text),
                    Err(error) => has(&error.to_string()),
                }
        }
        SpanBody::Template { name, variables, result, .. } => {
            has(name) || variables.as_deref().is_some_and(has) || has(result.as_ref().unwrap_or_else(|error| error))
        }
        SpanBody::Reward(reward) => has(&reward.dimension) || reward.feedback.as_deref().is_some_and(has),
        SpanBody::Grade { grader, fault } => has(grader) || fault.as_deref().is_some_and(has),
        SpanBody::Message(told) => message(told),
        SpanBody::Object { name, value } => has(name) || has(value),
        SpanBody::Log { level, text } => has(level) || has(text),
        SpanBody::HostCall { interface, function, arguments, result } => {
            has(interface) || has(function) || has(arguments) || has(result)
        }
        SpanBody::Annotation | SpanBody::Guest => false,
    };
    has(&span.name) || status || body || span.guest_attributes.iter().any(attribute)
}
