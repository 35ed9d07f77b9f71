//! Noisy demonstrations: the right format, mostly not the right room.

use fulgurite_core::seed::{Generator, Seed};
use serde::Serialize;

use crate::item::{Input, Request, Split};

/// In so many of a hundred demonstrations the booked room is the best one; in the others it is another listed one.
pub const BEST_SHARE_PERCENT: usize = 40;

/// A demonstration, in the shape of a dataset item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Demonstration {
    /// Its id.
    pub id: String,
    /// The request.
    pub input: Input,
    /// The conversation, which an algorithm sees with the grant `read-reference`.
    pub reference: DemonstrationReference,
}

/// The conversation of a demonstration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DemonstrationReference {
    /// Its messages: the very shape that the agent's conversation has.
    pub messages: Vec<Message>,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `user`, `assistant` or `tool`.
    pub role: &'static str,
    /// What is said.
    pub content: String,
    /// Tool calls of an assistant message.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// A tool call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ToolCall {
    /// The tool's name.
    pub name: &'static str,
    /// Its arguments.
    pub arguments: serde_json::Value,
}

pub(crate) fn demonstrations(count: usize, seed: Seed) -> Vec<Demonstration> {
    let mut generator = Generator::new(seed);
    (0..count).map(|number| draw(format!("demonstration-{number:05}"), &mut generator)).collect()
}

fn draw(id: String, generator: &mut Generator) -> Demonstration {
    let Request { combination, time, text } = Request::draw(Split::Train, generator);
    let mut listed = combination.free_ids();
    generator.shuffle(&mut listed);
    let best = combination.fitting().first().map_or("", |room| room.id);
    let booked = if generator.below(100) < BEST_SHARE_PERCENT {
        best
    } else {
        let others: Vec<_> = listed.iter().copied().filter(|room| *room != best).collect();
        others.get(generator.below(others.len())).copied().unwrap_or(best)
    };
    let say = |role, content: String| Message { role, content, tool_calls: vec![] };
    let call = ToolCall { name: "free_rooms", arguments: serde_json::json!({"time": time}) };
    let messages = vec![
        say("user", text.clone()),
        Message { tool_calls: vec![call], ..say("assistant", String::new()) },
        say("tool", listed.join(" ")),
        say("assistant", booked.to_owned()),
    ];
    Demonstration { id, input: Input { request: text }, reference: DemonstrationReference { messages } }
}
