//! An agent that books a meeting room: it lets the policy ask for the free rooms and forwards its choice.
//!
//! It checks the shape of what the policy says and nothing else: whether the room is right is the grader's to judge.

use fulgurite_sdk::agent::{Agent, AgentError, Conversation, Llm, tools};
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
                    return Err(AgentError::malformed("answered without asking which rooms are free", answer.text()));
                }
                return booking(answer.text());
            }
            if round == TOOL_ROUNDS_MAX {
                break;
            }
            conversation.answer(&answer);
            for call in answer.tool_calls() {
                conversation.tool_result(call, tools::answer(call)?);
            }
        }
        Err(AgentError::MalformedAnswer(format!("no answer after {TOOL_ROUNDS_MAX} rounds of tool calls")))
    }
}

/// Takes an answer that has the shape of a room id: `R` and two digits.
fn booking(answer: &str) -> Result<Booking, AgentError> {
    let room = answer.trim();
    let is_room = room.len() == 3 && room.strip_prefix('R').is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()));
    if is_room {
        Ok(Booking { room: room.to_owned() })
    } else {
        Err(AgentError::malformed("answered no room id", answer))
    }
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
}
