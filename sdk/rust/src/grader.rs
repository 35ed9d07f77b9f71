//! Graders: code that judges a finished rollout.
//!
//! A grader sees everything by value, in an instance of its own, after the agent's is gone. It imports nothing of
//! Fulgurite: nobody can talk to it and it can talk to nobody but a model endpoint that it was granted ([`judge`]). Its
//! content hash is recorded with every reward.

use std::marker::PhantomData;

use serde::de::DeserializeOwned;

use crate::types::{Attribute, Role, ToolCall};
use crate::wit::grader as wit;
use crate::wit::grader::fulgurite::grader::types as wit_types;

pub mod judge;

/// A grader. Export it with [`grader!`](crate::grader!).
///
/// `serde_json::Value` or `serde::de::IgnoredAny` do for parts that do not matter.
pub trait Grader: 'static {
    /// What an item's `input` holds.
    type Input: DeserializeOwned;
    /// What an item's `world` holds.
    type World: DeserializeOwned;
    /// What an item's `reference` holds.
    type Reference: DeserializeOwned;
    /// What the agent returns.
    type Outcome: DeserializeOwned;

    /// Judges one rollout. Called once per instance.
    ///
    /// # Errors
    /// When there is no grade. It is never a reward of 0: the rollout is kept out of baseline and loss.
    fn grade(case: Case<Self::Input, Self::World, Self::Reference, Self::Outcome>) -> Result<Vec<Reward>, GraderError>;
}

/// Everything there is to know about a finished rollout.
#[derive(Debug, Clone, PartialEq)]
pub struct Case<I, W, R, O> {
    /// The item's input: what the agent saw.
    pub input: I,
    /// The item's world: what the tools saw.
    pub world: W,
    /// The item's reference: what the agent never sees.
    pub reference: R,
    /// How the agent's part ended.
    pub ending: Ending<O>,
    /// What happened, in order.
    pub trajectory: Vec<Event>,
    /// Further facts by name; a later host may add some.
    pub attributes: Vec<Attribute>,
}

/// How the agent's part ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending<O> {
    /// The agent returned an outcome.
    Completed(O),
    /// The policy did something that left no outcome. Faults that are not the policy's are never graded.
    Failed {
        /// What it did: `malformed-answer`, `token-limit`, `turn-limit` or `context-limit`; a later host may know more.
        kind: String,
        /// What went wrong, for people.
        detail: String,
    },
}

/// An LLM call and what came back.
#[derive(Debug, Clone, PartialEq)]
pub struct LlmEvent {
    /// Counts the calls from 0: what [`Reward::on_call`] takes.
    pub index: u64,
    /// Which agent asked.
    pub agent_role: String,
    /// Text of the messages that were new in this call.
    pub prompt: Vec<(Role, String)>,
    /// The answer's text.
    pub text: String,
    /// The tool calls that the answer asked for.
    pub tool_calls: Vec<ToolCall>,
    /// Tokens of the answer.
    pub completion_tokens: u32,
}

/// Something that happened in a rollout.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The agent asked a model.
    Llm(LlmEvent),
    /// The agent called a tool.
    Tool {
        /// The tool's name.
        name: String,
        /// JSON text.
        arguments: String,
        /// JSON text, or the error's text.
        answer: Result<String, String>,
    },
    /// The agent emitted a named value.
    Object {
        /// Its name.
        name: String,
        /// JSON text.
        json: String,
    },
}

/// A reward. Larger is better.
#[derive(Debug, Clone, PartialEq)]
pub struct Reward {
    /// What is measured, 1 to 64 bytes; `reward` is what algorithms read by default.
    pub dimension: String,
    /// Must be finite.
    pub value: f64,
    /// Says why, for prompt optimisers.
    pub feedback: Option<String>,
    /// The LLM call that it belongs to (from 0); none is the whole rollout.
    pub llm_call: Option<u64>,
}

impl Reward {
    /// A reward of the whole rollout, in the dimension that algorithms read by default.
    #[must_use]
    pub fn new(value: f64) -> Self {
        Self { dimension: "reward".to_owned(), value, feedback: None, llm_call: None }
    }

    /// Measures something else.
    #[must_use]
    pub fn dimension(mut self, dimension: impl Into<String>) -> Self {
        self.dimension = dimension.into();
        self
    }

    /// Says why.
    #[must_use]
    pub fn feedback(mut self, feedback: impl Into<String>) -> Self {
        self.feedback = Some(feedback.into());
        self
    }

    /// Belongs to one LLM call (from 0).
    #[must_use]
    pub const fn on_call(mut self, llm_call: u64) -> Self {
        self.llm_call = Some(llm_call);
        self
    }
}

/// Why there is no grade.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GraderError {
    /// The item is not what the grader expects; the text names the field.
    #[error("invalid item: {0}")]
    InvalidItem(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// Exports a type that implements [`Grader`](crate::grader::Grader) as the component's grader.
///
/// ```
/// use fulgurite_sdk::grader::{Case, Ending, Grader, GraderError, Reward};
/// use serde::de::IgnoredAny;
///
/// struct Exact;
///
/// impl Grader for Exact {
///     type Input = IgnoredAny;
///     type World = IgnoredAny;
///     type Reference = String;
///     type Outcome = String;
///
///     fn grade(case: Case<IgnoredAny, IgnoredAny, String, String>) -> Result<Vec<Reward>, GraderError> {
///         let right = case.ending == Ending::Completed(case.reference);
///         Ok(vec![Reward::new(if right { 1.0 } else { 0.0 })])
///     }
/// }
///
/// fulgurite_sdk::grader!(Exact);
/// ```
#[macro_export]
macro_rules! grader {
    ($grader:ty) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            type Exported = $crate::grader::Export<$grader>;
    $crate::wit::grader::export_grader!(Exported with_types_in $crate::wit::grader);
        };
        #[cfg(not(target_arch = "wasm32"))]
        const _: ::core::marker::PhantomData<$crate::grader::Export<$grader>> = ::core::marker::PhantomData;
    };
}

/// Turns a [`Grader`] into the generated trait. Named by the macro only.
#[doc(hidden)]
#[derive(Debug)]
pub struct Export<G: Grader>(PhantomData<G>);

impl<G: Grader> wit::Guest for Export<G> {
    fn grade(rollout: wit_types::GradeCase) -> Result<Vec<wit_types::Reward>, wit_types::GraderError> {
        let result = read(rollout).and_then(G::grade);
        match result {
            Ok(rewards) => Ok(rewards.into_iter().map(Into::into).collect()),
            Err(GraderError::InvalidItem(text)) => Err(wit_types::GraderError::InvalidItem(text)),
            Err(GraderError::Other(text)) => Err(wit_types::GraderError::Other(text)),
        }
    }
}

impl From<Reward> for wit_types::Reward {
    fn from(reward: Reward) -> Self {
        Self { dimension: reward.dimension, value: reward.value, feedback: reward.feedback, llm_call: reward.llm_call }
    }
}

fn read<I: DeserializeOwned, W: DeserializeOwned, R: DeserializeOwned, O: DeserializeOwned>(
    case: wit_types::GradeCase,
) -> Result<Case<I, W, R, O>, GraderError> {
    let ending = if case.outcome.kind == "completed" {
        // Not a fault of the item: agent and grader disagree about the outcome's type.
        Ending::Completed(serde_json::from_str(&case.outcome.output).map_err(|error| {
            GraderError::Other(format!("the agent's outcome does not fit the grader's type: {error}"))
        })?)
    } else {
        Ending::Failed { kind: case.outcome.kind, detail: case.outcome.detail }
    };
    Ok(Case {
        input: field("input", &case.input)?,
        world: field("world", &case.world)?,
        reference: field("reference", &case.reference)?,
        ending,
        trajectory: case.trajectory.into_iter().map(Into::into).collect(),
        attributes: case.attributes.into_iter().map(Into::into).collect(),
    })
}

fn field<T: DeserializeOwned>(name: &str, json: &str) -> Result<T, GraderError> {
    serde_json::from_str(json).map_err(|error| GraderError::InvalidItem(format!("{name}: {error}")))
}

impl From<wit_types::Event> for Event {
    fn from(event: wit_types::Event) -> Self {
        match event {
            wit_types::Event::Llm(event) => Self::Llm(LlmEvent {
                index: event.index,
                agent_role: event.agent_role,
                prompt: event.prompt.into_iter().map(|(role, text)| (role.into(), text)).collect(),
                text: event.text,
                tool_calls: event.tool_calls.into_iter().map(Into::into).collect(),
                completion_tokens: event.completion_tokens,
            }),
            wit_types::Event::Tool(event) => {
                Self::Tool { name: event.name, arguments: event.arguments, answer: event.answer }
            }
            wit_types::Event::Object((name, json)) => Self::Object { name, json },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wit::grader::Guest as _;

    struct Exact;

    impl Grader for Exact {
        type Input = serde_json::Value;
        type World = serde_json::Value;
        type Reference = String;
        type Outcome = String;

        fn grade(case: Case<serde_json::Value, serde_json::Value, String, String>) -> Result<Vec<Reward>, GraderError> {
            let reward = match case.ending {
                Ending::Completed(outcome) => Reward::new(f64::from(u8::from(outcome == case.reference))),
                Ending::Failed { kind, .. } => Reward::new(0.0).feedback(kind),
            };
            Ok(vec![reward])
        }
    }

    fn case(kind: &str, output: &str, reference: &str) -> wit_types::GradeCase {
        wit_types::GradeCase {
            input: "null".into(),
            world: "{}".into(),
            reference: reference.into(),
            outcome: wit_types::Outcome { kind: kind.into(), output: output.into(), detail: String::new() },
            trajectory: vec![],
            attributes: vec![],
        }
    }

    #[test]
    fn outcomes_become_endings_and_rewards() {
        let reward = |kind, output| Export::<Exact>::grade(case(kind, output, r#""a""#)).unwrap()[0].value;
        assert!((reward("completed", r#""a""#) - 1.0).abs() < f64::EPSILON);
        assert!(reward("completed", r#""b""#).abs() < f64::EPSILON);
        let malformed = Export::<Exact>::grade(case("malformed-answer", "null", r#""a""#)).unwrap();
        assert_eq!(malformed[0].feedback.as_deref(), Some("malformed-answer"));
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_never_a_reward() {
        let item = Export::<Exact>::grade(case("completed", r#""a""#, "7")).unwrap_err();
        assert!(
            matches!(&item, wit_types::GraderError::InvalidItem(text) if text.starts_with("reference")),
            "{item:?}"
        );
        let outcome = Export::<Exact>::grade(case("completed", "7", r#""a""#)).unwrap_err();
        assert!(matches!(&outcome, wit_types::GraderError::Other(_)), "{outcome:?}");
    }
}
