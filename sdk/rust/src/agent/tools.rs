//! Tools that the run's config gives to the agent. Each call is a span.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::agent::AgentError;
use crate::types::{LimitReached, ToolCall, ToolSpec};
use crate::wit::agent::fulgurite::agent::tools as wit;

/// Why a tool call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ToolError {
    /// There is no tool of that name.
    #[error("there is no tool `{0}`")]
    UnknownTool(String),
    /// The arguments do not fit; the text says which and why.
    #[error("invalid arguments: {0}")]
    InvalidArguments(String),
    /// The tool asked for something that is not granted.
    #[error("denied: {0}")]
    Denied(String),
    /// The tool failed in its own way.
    #[error("{0}")]
    Failed(String),
    /// The attempt has used up its tool calls.
    #[error(transparent)]
    LimitReached(LimitReached),
    /// This host does not offer it.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// The tool's answer does not fit the type that was asked for.
    #[error("the tool's answer does not fit the type asked for: {0}")]
    UnexpectedAnswer(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl ToolError {
    /// Whether the call itself was wrong (name or arguments). When a model wrote it, that is the model's fault, and the
    /// text may be shown to it for another try.
    #[must_use]
    pub const fn is_callers_fault(&self) -> bool {
        matches!(self, Self::UnknownTool(_) | Self::InvalidArguments(_))
    }
}

impl From<wit::ToolError> for ToolError {
    fn from(error: wit::ToolError) -> Self {
        match error {
            wit::ToolError::UnknownTool(text) => Self::UnknownTool(text),
            wit::ToolError::InvalidArguments(text) => Self::InvalidArguments(text),
            wit::ToolError::Denied(text) => Self::Denied(text),
            wit::ToolError::Failed(text) => Self::Failed(text),
            wit::ToolError::LimitReached(limit) => Self::LimitReached(limit.into()),
            wit::ToolError::Unsupported(text) => Self::Unsupported(text),
            wit::ToolError::Other(text) => Self::Other(text),
        }
    }
}

/// All tools, in a fixed order: what [`Llm::tools`](crate::agent::Llm::tools) takes.
///
/// # Errors
/// When the host cannot list them.
pub fn list() -> Result<Vec<ToolSpec>, ToolError> {
    Ok(wit::list_tools()?.into_iter().map(Into::into).collect())
}

/// Calls a tool with arguments of a type and reads its answer as a type.
///
/// # Errors
/// When the call fails or the answer does not fit.
pub fn call<T: DeserializeOwned>(name: &str, arguments: &impl Serialize) -> Result<T, ToolError> {
    let arguments = serde_json::to_string(arguments).map_err(|error| ToolError::InvalidArguments(error.to_string()))?;
    read(&wit::call(name, &arguments)?)
}

/// Makes the call that a model asked for and returns the tool's answer, JSON text.
///
/// # Errors
/// When the call fails; see [`ToolError::is_callers_fault`], and [`answer`], which goes by it.
pub fn execute(call: &ToolCall) -> Result<String, ToolError> {
    Ok(wit::call(&call.name, &call.arguments)?)
}

/// Makes the call that the policy asked for and returns what the conversation goes on with: the tool's answer as text. A JSON
/// string loses its quotes, everything else stays as it is.
///
/// # Errors
/// When the call fails. The policy wrote its name and arguments, so one that cannot be made is a malformed answer.
pub fn answer(call: &ToolCall) -> Result<String, AgentError> {
    execute(call).map(plain).map_err(blame)
}

fn plain(json: String) -> String {
    serde_json::from_str(&json).unwrap_or(json)
}

fn blame(error: ToolError) -> AgentError {
    if error.is_callers_fault() { AgentError::MalformedAnswer(error.to_string()) } else { AgentError::Tool(error) }
}

/// A call under way. Dropping it cancels the call.
#[derive(Debug)]
#[must_use = "dropping the call cancels it"]
pub struct PendingCall(wit::Pending);

impl PendingCall {
    /// Whether the answer is there.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.0.ready()
    }

    /// Waits for the answer and reads it as a type.
    ///
    /// # Errors
    /// When the call fails or the answer does not fit.
    pub fn finish<T: DeserializeOwned>(self) -> Result<T, ToolError> {
        read(&wit::finish(self.0)?)
    }
}

/// Starts a call and returns at once, for calls in parallel.
///
/// # Errors
/// When the call cannot be started.
pub fn start(name: &str, arguments: &impl Serialize) -> Result<PendingCall, ToolError> {
    let arguments = serde_json::to_string(arguments).map_err(|error| ToolError::InvalidArguments(error.to_string()))?;
    Ok(PendingCall(wit::start(name, &arguments)?))
}

/// Waits until one of the calls is ready and returns its place in the list.
///
/// # Errors
/// When the list is empty or the host cannot wait.
pub fn wait_any(calls: &[&PendingCall]) -> Result<usize, ToolError> {
    let calls: Vec<&wit::Pending> = calls.iter().map(|call| &call.0).collect();
    let index = wit::wait_any(&calls)?;
    usize::try_from(index).map_err(|error| ToolError::Other(error.to_string()))
}

fn read<T: DeserializeOwned>(answer: &str) -> Result<T, ToolError> {
    serde_json::from_str(answer).map_err(|error| ToolError::UnexpectedAnswer(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(plain(r#""19""#.to_owned()), "19");
        assert_eq!(plain("19".to_owned()), "19");
    }
}
