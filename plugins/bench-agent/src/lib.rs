//! The agent that `fulgurite bench` measures with: three calls of the model, each with the whole conversation, and four spans.
//!
//! It is written as a user would write it and uses nothing that other agents could not. The item is `{"question": TEXT}`, with
//! `"calls"` for another number of calls; the outcome is the last answer.

use fulgurite_sdk::Attribute;
use fulgurite_sdk::agent::{Agent, AgentError, Conversation, Llm, emit};
use serde::{Deserialize, Serialize};

/// Calls of the model when the item does not say.
const CALLS: u32 = 3;

/// What the agent gets.
#[derive(Debug, Deserialize)]
pub struct Input {
    /// The text that the first message consists of.
    pub question: String,
    /// Calls of the model.
    #[serde(default = "calls")]
    pub calls: u32,
}

fn calls() -> u32 {
    CALLS
}

/// What the agent returns.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// The last answer.
    pub answer: String,
}

struct BenchAgent;

fulgurite_sdk::agent!(BenchAgent);

impl Agent for BenchAgent {
    type Input = Input;
    type Outcome = Outcome;

    fn run(input: Input) -> Result<Outcome, AgentError> {
        let llm = Llm::new();
        let mut conversation = Conversation::new();
        conversation.user(input.question);
        let mut answer = String::new();
        for _ in 0..input.calls {
            let completion = llm.chat(&conversation)?;
            conversation.answer(&completion);
            completion.text().clone_into(&mut answer);
            emit::annotation([Attribute::new("answer", completion.text())]);
        }
        emit::reward("answered", 1.0);
        Ok(Outcome { answer })
    }
}
