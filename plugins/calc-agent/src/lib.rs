//! An agent that solves a word problem: it lets the policy use a calculator as often as it likes, within bounds, and takes
//! its last word as the answer.
//!
//! It checks that the answer is a number and nothing else: whether it is the right one is the grader's to judge.

use fulgurite_sdk::agent::{Agent, AgentError, Conversation, Llm, tools};
use serde::{Deserialize, Serialize};

/// Most rounds of tool calls before the policy must answer: the problems take two.
const TOOL_ROUNDS_MAX: usize = 3;

/// What the item says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Problem {
    /// For example `Ann has 12 apples, finds 7 more, then shares them among 2 friends. How many?`.
    problem: String,
}

/// What the grader sees.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Answer {
    /// The number.
    answer: i64,
}

struct CalcAgent;

impl Agent for CalcAgent {
    type Input = Problem;
    type Outcome = Answer;

    fn run(input: Problem) -> Result<Answer, AgentError> {
        let policy = Llm::new().tools(tools::list()?);
        let mut conversation = Conversation::new();
        conversation.user(input.problem);
        for _ in 0..TOOL_ROUNDS_MAX {
            let said = policy.chat(&conversation)?;
            if said.tool_calls().is_empty() {
                return number(said.text());
            }
            conversation.answer(&said);
            for call in said.tool_calls() {
                conversation.tool_result(call, tools::answer(call)?);
            }
        }
        let said = policy.chat(&conversation)?;
        if said.tool_calls().is_empty() {
            number(said.text())
        } else {
            Err(AgentError::MalformedAnswer(format!("no answer after {TOOL_ROUNDS_MAX} rounds of tool calls")))
        }
    }
}

/// Takes an answer that is a whole number and nothing else.
fn number(said: &str) -> Result<Answer, AgentError> {
    let answer = said.trim().parse();
    answer.map(|answer| Answer { answer }).map_err(|_| AgentError::malformed("answered no whole number", said))
}

fulgurite_sdk::agent!(CalcAgent);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_number_alone_is_an_answer() {
        for (said, answer) in [("14", 14), (" 7\n", 7), ("-3", -3)] {
            assert_eq!(number(said).unwrap(), Answer { answer });
        }
        for bad in ["", "14 apples", "1.5", "12 13", "٣", "99999999999999999999"] {
            assert!(matches!(number(bad), Err(AgentError::MalformedAnswer(_))), "{bad:?}");
        }
    }
}
