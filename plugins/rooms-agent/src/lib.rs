//! An agent that books a meeting room: it lets the policy ask for the free rooms and forwards its choice.
//!
//! It checks the shape of what the policy says and nothing else: whether the room is right is the grader's to judge.

use fulgurite_sdk::agent::tools::{self, ToolError};
use fulgurite_sdk::agent::{Agent, AgentError, Conversation, Llm};
use serde::{Deserialize, Serialize};

/// Most rounds of tool calls before the policy must answer.
const TOOL_ROUNDS_MAX: usize = 2;

/// What the item says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    /// For example `Find a room for 4 people at 10:00 with a whiteboard`.
    request: String,
}

/// What the grader sees.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Booking {
    /// The room's id.
    room: String,
}

struct RoomsAgent;

impl Agent for RoomsAgent {
    type Input = Request;
    type Outcome = Booking;

    fn run(input: Request) -> Result<Booking, AgentError> {
        let policy = Llm::new().tools(tools::list()?);
        let mut conversation = Conversation::new();
        conversation.user(input.request);
        for round in 0..=TOOL_ROUNDS_MAX {
            let answer = policy.chat(&conversation)?;
            if answer.tool_calls().is_empty() {
                if round == 0 {
                    return Err(malformed("answered without asking which rooms are free", answer.text()));
                }
                return booking(answer.text());
            }
            if round == TOOL_ROUNDS_MAX {
                break;
            }
            conversation.answer(&answer);
            for call in answer.tool_calls() {
                let result = tools::execute(call).map_err(blame)?;
                conversation.tool_result(call, plain(result));
            }
        }
        Err(AgentError::MalformedAnswer(format!("no answer after {TOOL_ROUNDS_MAX} rounds of tool calls")))
    }
}

/// The policy wrote name and arguments of the call, so a call that cannot be made is its doing.
fn blame(error: ToolError) -> AgentError {
    if error.is_callers_fault() { AgentError::MalformedAnswer(error.to_string()) } else { AgentError::Tool(error) }
}

/// A tool's answer as text: a JSON string loses its quotes, everything else stays as it is.
fn plain(json: String) -> String {
    serde_json::from_str(&json).unwrap_or(json)
}

/// Takes an answer that has the shape of a room id: `R` and two digits.
fn booking(answer: &str) -> Result<Booking, AgentError> {
    let room = answer.trim();
    let is_room = room.len() == 3 && room.strip_prefix('R').is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()));
    if is_room { Ok(Booking { room: room.to_owned() }) } else { Err(malformed("answered no room id", answer)) }
}

fn malformed(what: &str, answer: &str) -> AgentError {
    const SHOWN_CHARS_MAX: usize = 120;
    let shown: String = answer.chars().take(SHOWN_CHARS_MAX).collect();
    AgentError::MalformedAnswer(format!("{what}: {shown:?}"))
}

fulgurite_sdk::agent!(RoomsAgent);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_room_id_alone_is_an_answer() {
        for good in ["R07", " R12\n"] {
            assert_eq!(booking(good).unwrap().room, good.trim());
        }
        for bad in ["", "R7", "R007", "r07", "R07 R08", "room R07", "Rxx", "R١"] {
            assert!(matches!(booking(bad), Err(AgentError::MalformedAnswer(_))), "{bad:?}");
        }
    }

    #[test]
    fn bad_calls_are_the_policys_fault_and_broken_tools_are_not() {
        assert!(matches!(blame(ToolError::InvalidArguments(String::new())), AgentError::MalformedAnswer(_)));
        assert!(matches!(blame(ToolError::UnknownTool(String::new())), AgentError::MalformedAnswer(_)));
        assert!(matches!(blame(ToolError::Failed(String::new())), AgentError::Tool(_)));
    }

    #[test]
    fn tool_answers_are_forwarded_as_text() {
        assert_eq!(plain(r#""R07 R02""#.to_owned()), "R07 R02");
        assert_eq!(plain(r#"["R07"]"#.to_owned()), r#"["R07"]"#);
    }
}
