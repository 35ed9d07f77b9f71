//! Spans: what an attempt did, in OpenTelemetry's shape, complete enough to run it again without a model.
//!
//! A span's body is typed, so that nothing is looked up by attribute name inside the host; [`Span::attributes`] renders the
//! body under the names of [`crate::attribute`] for people and collectors. Bodies hold the request *and* the result of every
//! host call, and start and end are readings of the guest's virtual clock: that is the recording that replay needs.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::attribute;
use crate::id::{AttemptKey, SpanId, TraceId};
use crate::llm::{Completion, LlmError, Message, Sampling, ToolSpec};
use crate::outcome::AttemptOutcome;
use crate::reward::Reward;
use crate::tool::ToolError;

/// A value of an attribute.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttributeValue {
    /// Text.
    Text(String),
    /// A whole number.
    Integer(i64),
    /// A number.
    Number(f64),
    /// Yes or no.
    Boolean(bool),
}

impl From<&str> for AttributeValue {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for AttributeValue {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<u64> for AttributeValue {
    fn from(number: u64) -> Self {
        Self::Integer(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<f64> for AttributeValue {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

/// A named attribute.
pub type Attribute = (String, AttributeValue);

/// OpenTelemetry's span kind, as far as we use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpanKind {
    /// Work inside.
    Internal,
    /// A call to something outside.
    Client,
}

/// OpenTelemetry's span status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpanStatus {
    /// Nothing said.
    Unset,
    /// Fine.
    Ok,
    /// Failed, and how.
    Error(String),
}

/// One LLM call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LlmCall {
    /// Counts the calls of the attempt from 0.
    pub call_index: u64,
    /// The conversation, as indices into the attempt's list of messages.
    pub messages: Vec<u32>,
    /// Messages that appear in this attempt for the first time; they are appended to that list before `messages` is read.
    pub new_messages: Vec<Message>,
    /// The tools offered, when they differ from the attempt's previous call.
    pub tools: Option<Vec<ToolSpec>>,
    /// Sampling as the guest asked for it.
    pub sampling: Sampling,
    /// Which agent asked.
    pub agent_role: String,
    /// Which endpoint was asked; `None` is the policy.
    pub endpoint: Option<String>,
    /// What came back.
    pub result: Result<Arc<Completion>, LlmError>,
}

/// What a span is about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpanBody {
    /// The whole attempt: the root span, recorded last.
    Attempt(AttemptOutcome),
    /// An LLM call.
    Llm(Box<LlmCall>),
    /// The list of tools was asked for.
    ToolList(Result<Vec<ToolSpec>, ToolError>),
    /// A tool call.
    Tool {
        /// Name of the tool.
        name: String,
        /// Arguments, JSON text.
        arguments: String,
        /// What came back, JSON text.
        result: Result<String, ToolError>,
    },
    /// A prompt template was read or rendered.
    Template {
        /// Name of the template.
        name: String,
        /// Version of the resources.
        version: u64,
        /// Variables, JSON text; `None` when the template's text was read.
        variables: Option<String>,
        /// What came back.
        result: Result<String, String>,
    },
    /// A reward.
    Reward(Reward),
    /// The grader ran.
    Grade {
        /// The grader's content hash.
        grader: String,
        /// Why there is no grade.
        fault: Option<String>,
    },
    /// A message that the guest emitted for people.
    Message(Message),
    /// A JSON value that the guest emitted, with a name.
    Object {
        /// Its name.
        name: String,
        /// JSON text.
        value: String,
    },
    /// Attributes only.
    Annotation,
    /// A line of log, standard output or standard error.
    Log {
        /// `trace`, `debug`, `info`, `warn`, `error`, `stdout` or `stderr`.
        level: String,
        /// The line.
        text: String,
    },
    /// A span that the guest opened and closed.
    Guest,
    /// Any other host call, kept for replay.
    HostCall {
        /// WIT interface.
        interface: String,
        /// Function.
        function: String,
        /// Arguments, JSON text.
        arguments: String,
        /// Result, JSON text.
        result: String,
    },
}

/// One span.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// Whose it is. Stamped by the host.
    pub attempt: AttemptKey,
    /// Order inside the attempt, from 0. The only order there is: clocks are not compared.
    pub sequence: u64,
    /// OpenTelemetry trace id: one per attempt.
    pub trace_id: TraceId,
    /// OpenTelemetry span id.
    pub span_id: SpanId,
    /// The span that encloses it; `None` on the root.
    pub parent: Option<SpanId>,
    /// Name for people.
    pub name: String,
    /// OpenTelemetry kind.
    pub kind: SpanKind,
    /// Start on the guest's virtual clock, nanoseconds since the Unix epoch.
    pub start_ns: u64,
    /// End on the same clock.
    pub end_ns: u64,
    /// OpenTelemetry status.
    pub status: SpanStatus,
    /// Attributes that a guest gave, already filed under `guest.` where their name is reserved.
    pub guest_attributes: Vec<Attribute>,
    /// Other spans that this one refers to.
    pub links: Vec<SpanId>,
    /// What it is about.
    pub body: SpanBody,
}

impl Span {
    /// Everything that the span says, under OpenTelemetry names.
    #[must_use]
    pub fn attributes(&self) -> Vec<Attribute> {
        let mut list: Vec<Attribute> = vec![
            (attribute::ROLLOUT_ID.to_owned(), self.attempt.rollout.as_str().into()),
            (attribute::ATTEMPT_NUMBER.to_owned(), u64::from(self.attempt.attempt.0).into()),
            (attribute::SPAN_SEQUENCE.to_owned(), self.sequence.into()),
        ];
        let mut add = |name: &str, value: AttributeValue| list.push((name.to_owned(), value));
        match &self.body {
            SpanBody::Attempt(outcome) => {
                add(attribute::OUTCOME_KIND, outcome.kind.as_str().into());
                add(attribute::OUTCOME_DETAIL, outcome.detail.as_str().into());
            }
            SpanBody::Llm(call) => {
                add(attribute::GEN_AI_OPERATION_NAME, "chat".into());
                add(attribute::AGENT_ROLE, call.agent_role.as_str().into());
                add(attribute::LLM_CALL_INDEX, call.call_index.into());
                add(attribute::GEN_AI_REQUEST_TEMPERATURE, f64::from(call.sampling.temperature).into());
                if let Ok(completion) = &call.result {
                    add(attribute::GEN_AI_RESPONSE_ID, completion.response_id.0.as_str().into());
                    add(attribute::GEN_AI_USAGE_INPUT_TOKENS, u64::from(completion.usage.prompt_tokens).into());
                    add(attribute::GEN_AI_USAGE_OUTPUT_TOKENS, u64::from(completion.usage.completion_tokens).into());
                    add(attribute::COMPLETION_TEXT, completion.text.as_str().into());
                }
            }
            SpanBody::Tool { name, arguments, result } => {
                add(attribute::GEN_AI_OPERATION_NAME, "execute_tool".into());
                add(attribute::GEN_AI_TOOL_NAME, name.as_str().into());
                add(attribute::TOOL_ARGUMENTS, arguments.as_str().into());
                if let Ok(result) = result {
                    add(attribute::TOOL_RESULT, result.as_str().into());
                }
            }
            SpanBody::Reward(reward) => {
                add(attribute::REWARD_DIMENSION, reward.dimension.as_str().into());
                add(attribute::REWARD_VALUE, reward.value.into());
            }
            SpanBody::Template { name, version, .. } => {
                add(attribute::TEMPLATE_NAME, name.as_str().into());
                add(attribute::RESOURCES_VERSION, (*version).into());
            }
            SpanBody::Log { level, text } => {
                add(attribute::LOG_LEVEL, level.as_str().into());
                add(attribute::LOG_TEXT, text.as_str().into());
            }
            SpanBody::ToolList(_)
            | SpanBody::Grade { .. }
            | SpanBody::Message(_)
            | SpanBody::Object { .. }
            | SpanBody::Annotation
            | SpanBody::Guest
            | SpanBody::HostCall { .. } => {}
        }
        list.extend(self.guest_attributes.iter().cloned());
        list
    }
}

/// Why a span was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpanRefused {
    /// A newer attempt of the rollout exists.
    #[error("attempt {0} is no longer the newest of its rollout")]
    StaleAttempt(AttemptKey),
    /// The sink is closed.
    #[error("the attempt has ended")]
    Closed,
    /// A replay is not what was recorded.
    #[error("the replay has left its recording")]
    Diverged,
}

/// Takes the spans of one attempt in the order of their sequence. What it has taken survives the guest's store.
pub trait SpanSink: Send + Sync {
    /// Takes one span.
    ///
    /// # Errors
    /// When the attempt may not write any more; the sandbox then ends it.
    fn record(&self, span: Span) -> Result<(), SpanRefused>;
}
