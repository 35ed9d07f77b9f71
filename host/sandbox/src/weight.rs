//! How much text a span keeps.

use fulgurite_core::llm::{Message, ToolCall, ToolSpec};
use fulgurite_core::span::{AttributeValue, Span, SpanBody};

/// Bytes of all texts of a span. Token ids are left out: how many there are is the model's doing, and bounded by its context.
pub(crate) fn text_bytes(span: &Span) -> usize {
    let attributes: usize = span.guest_attributes.iter().map(attribute).sum();
    span.name.len() + attributes + body(&span.body)
}

fn attribute((name, value): &(String, AttributeValue)) -> usize {
    let text = match value {
        AttributeValue::Text(text) => text.len(),
        AttributeValue::Integer(_) | AttributeValue::Number(_) | AttributeValue::Boolean(_) => size_of::<u64>(),
    };
    name.len() + text
}

fn body(body: &SpanBody) -> usize {
    match body {
        SpanBody::Llm(call) => {
            let asked: usize = call.new_messages.iter().map(message).sum();
            let tools: usize = call.tools.iter().flatten().map(spec).sum();
            let answer = call.result.as_ref().map_or(0, |completion| {
                completion.text.len() + completion.tool_calls.iter().map(tool_call).sum::<usize>()
            });
            asked + tools + answer + call.agent_role.len() + size_of_val(call.messages.as_slice())
        }
        SpanBody::ToolList(list) => list.iter().flatten().map(spec).sum(),
        SpanBody::Tool { name, arguments, result } => {
            name.len() + arguments.len() + result.as_ref().map_or(0, String::len)
        }
        SpanBody::Template { name, variables, result, .. } => {
            let result = match result {
                Ok(text) | Err(text) => text.len(),
            };
            name.len() + variables.as_ref().map_or(0, String::len) + result
        }
        SpanBody::Message(said) => message(said),
        SpanBody::Object { name, value } => name.len() + value.len(),
        SpanBody::Log { level, text } => level.len() + text.len(),
        SpanBody::HostCall { arguments, result, .. } => arguments.len() + result.len(),
        SpanBody::Reward(reward) => reward.dimension.len() + reward.feedback.as_ref().map_or(0, String::len),
        SpanBody::Attempt(_) | SpanBody::Grade { .. } | SpanBody::Annotation | SpanBody::Guest => 0,
    }
}

fn message(message: &Message) -> usize {
    size_of::<Message>() + message.content.len() + message.tool_calls.iter().map(tool_call).sum::<usize>()
}

fn tool_call(call: &ToolCall) -> usize {
    call.id.len() + call.name.len() + call.arguments.len()
}

fn spec(spec: &ToolSpec) -> usize {
    spec.name.len() + spec.description.len() + spec.parameters.len()
}
