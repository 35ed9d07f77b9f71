//! Agents: code that works on one item with the help of a model and tools.
//!
//! The host makes a fresh instance for every attempt, calls [`Agent::run`] once and throws the instance away. Cancellation
//! is never seen from inside: the instance is gone.

use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::wit::agent as wit;

pub mod emit;
mod llm;
pub mod task;
pub mod templates;
pub mod tools;

pub use llm::{
    Completion, Conversation, FinishReason, Llm, LlmError, Message, NotTrainable, PendingCompletion, TokenData,
    wait_any,
};

/// Characters of what the policy said in [`AgentError::malformed`]. 120: a person sees what it was about.
const SHOWN_CHARS_MAX: usize = 120;

/// An agent. Export it with [`agent!`](crate::agent!).
pub trait Agent: 'static {
    /// What an item's `input` holds.
    type Input: DeserializeOwned;
    /// What the grader sees of a completed run.
    type Outcome: Serialize;

    /// Works on one item. Called once.
    ///
    /// # Errors
    /// When there is no outcome. Choose the case with care: [`AgentError::MalformedAnswer`] is blamed on the policy,
    /// graded and trained on; the others never are.
    fn run(input: Self::Input) -> Result<Self::Outcome, AgentError>;
}

/// How an agent gives up.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AgentError {
    /// The policy wrote something that the agent cannot use; the text says what. Graded, in baseline and loss.
    #[error("malformed answer: {0}")]
    MalformedAnswer(String),
    /// A call of the model failed and the agent has nothing to return. The host saw the call fail and blames whom it must.
    #[error("the model failed: {0}")]
    Llm(#[from] LlmError),
    /// A call of a tool failed and the agent has nothing to return. Blamed on the agent's code, unless the host knows
    /// better: when the *policy* chose the arguments, it may have been a [`Self::MalformedAnswer`]; [`tools::answer`] decides
    /// that.
    #[error("a tool failed: {0}")]
    Tool(#[from] tools::ToolError),
    /// The input is not what the agent expects. Blamed on the agent's code or the dataset.
    #[error("invalid input: {0}")]
    InvalidInput(String),
    /// Anything else. Blamed on the agent's code.
    #[error("{0}")]
    Other(String),
}

impl AgentError {
    /// What the policy said is of no use: `what` it did, and the beginning of its words.
    #[must_use]
    pub fn malformed(what: &str, said: &str) -> Self {
        let shown: String = said.chars().take(SHOWN_CHARS_MAX).collect();
        Self::MalformedAnswer(format!("{what}: {shown:?}"))
    }
}

impl From<AgentError> for wit::AgentError {
    fn from(error: AgentError) -> Self {
        match error {
            AgentError::MalformedAnswer(text) => Self::MalformedAnswer(text),
            AgentError::Llm(error) => Self::Llm(error.to_string()),
            AgentError::Tool(error) => Self::Other(format!("a tool failed: {error}")),
            AgentError::InvalidInput(text) => Self::InvalidInput(text),
            AgentError::Other(text) => Self::Other(text),
        }
    }
}

/// Exports a type that implements [`Agent`] as the component's agent.
///
/// ```
/// use fulgurite_sdk::agent::{Agent, AgentError};
///
/// struct Echo;
///
/// impl Agent for Echo {
///     type Input = String;
///     type Outcome = String;
///
///     fn run(input: String) -> Result<String, AgentError> {
///         Ok(input)
///     }
/// }
///
/// fulgurite_sdk::agent!(Echo);
/// ```
#[macro_export]
macro_rules! agent {
    ($agent:ty) => {
        // Natively there is nothing to export: the symbols of two plugins in one test binary would clash.
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            type Exported = $crate::agent::Export<$agent>;
    $crate::wit::agent::export_agent!(Exported with_types_in $crate::wit::agent);
        };
        #[cfg(not(target_arch = "wasm32"))]
        const _: ::core::marker::PhantomData<$crate::agent::Export<$agent>> = ::core::marker::PhantomData;
    };
}

/// Turns an [`Agent`] into the generated trait. Named by the macro only.
#[doc(hidden)]
#[derive(Debug)]
pub struct Export<A: Agent>(PhantomData<A>);

impl<A: Agent> wit::Guest for Export<A> {
    fn run(input: String) -> Result<String, wit::AgentError> {
        let input = serde_json::from_str(&input).map_err(|error| {
            wit::AgentError::InvalidInput(format!("the input does not fit the agent's type: {error}"))
        })?;
        let outcome = A::run(input)?;
        serde_json::to_string(&outcome)
            .map_err(|error| wit::AgentError::Other(format!("the outcome cannot be written as JSON: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_answer_is_shown_by_its_beginning() {
        let error = AgentError::malformed("answered no number", "two\n");
        assert_eq!(error, AgentError::MalformedAnswer("answered no number: \"two\\n\"".to_owned()));
        let AgentError::MalformedAnswer(long) = AgentError::malformed("x", &"é".repeat(999)) else { panic!() };
        assert_eq!(long.chars().filter(|character| *character == 'é').count(), SHOWN_CHARS_MAX);
    }
}
