//! Ways to take more than is given: memory, texts, handles.

use std::hint::black_box;

use fulgurite_sdk::agent::{AgentError, Conversation, Llm, Message, emit, templates, tools};
use fulgurite_sdk::{Attribute, Value, json};

pub(crate) fn memory() -> ! {
    let mut held: Vec<Vec<u8>> = vec![];
    loop {
        held.push(black_box(vec![1; 1 << 20]));
    }
}

pub(crate) fn request() -> Result<Value, AgentError> {
    let mut conversation = Conversation::new();
    for _ in 0..64 {
        conversation.user("x".repeat(100_000));
    }
    Ok(json!(Llm::new().chat(&conversation)?.text()))
}

/// What costs a guest nothing must not cost the host anything either.
pub(crate) fn empty_messages() -> Result<Value, AgentError> {
    let mut conversation = Conversation::new();
    *conversation.messages_mut() = vec![Message::User(String::new()); 30_000];
    let mut held = vec![];
    loop {
        held.push(Llm::new().start(&conversation)?);
    }
}

pub(crate) fn requests() -> Result<Value, AgentError> {
    let mut conversation = Conversation::new();
    conversation.user("x".repeat(200_000));
    let mut held = vec![];
    loop {
        held.push(Llm::new().start(&conversation)?);
    }
}

/// The host keeps what it was asked.
pub(crate) fn renders(size: usize) -> Result<Value, AgentError> {
    for number in 0_u64.. {
        let variables = json!({ "name": number, "ballast": "x".repeat(size) });
        black_box(templates::render("greeting", &variables)?);
    }
    Ok(Value::Null)
}

pub(crate) fn tool_calls(size: usize) -> Result<Value, AgentError> {
    let arguments = json!({ "ballast": "x".repeat(size) });
    loop {
        black_box(tools::call::<Value>("count", &arguments)?);
    }
}

pub(crate) fn prompts(size: usize) -> Result<Value, AgentError> {
    let ballast = "x".repeat(size);
    for number in 0_u64.. {
        black_box(Llm::new().chat(Conversation::new().user(format!("{number} {ballast}")))?);
    }
    Ok(Value::Null)
}

/// Spans that are never closed, with many attributes of which none has a name or a text.
pub(crate) fn open_spans() -> ! {
    let mut held = vec![];
    loop {
        held.push(emit::span("", (0..2_000).map(|_| Attribute::new("", true))));
    }
}
