//! Tools as the host joins them to an agent.

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::llm::ToolSpec;
use crate::outcome::LimitReached;

/// Why a tool call failed. One case per thing the caller can do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolError {
    /// No tool of that name.
    #[error("there is no tool `{0}`")]
    UnknownTool(String),
    /// The arguments do not fit; the text says which and why. The policy may try again.
    #[error("invalid arguments: {0}")]
    InvalidArguments(String),
    /// The tool asked for something that is not granted.
    #[error("denied: {0}")]
    Denied(String),
    /// The tool failed in its own way.
    #[error("{0}")]
    Failed(String),
    /// The tool's component trapped or used up a limit. The attempt ends with a tool fault.
    #[error("the tool's component failed: {detail}")]
    Fault {
        /// What happened.
        detail: String,
        /// The limit, when one was reached.
        limit: Option<LimitReached>,
    },
    /// The host does not offer this yet.
    #[error("unsupported: {0}")]
    Unsupported(String),
}

/// The tools of one live attempt, each in a store of its own.
pub trait ToolHost: Send + Sync {
    /// All tools, in a fixed order.
    fn list(&self) -> BoxFuture<'_, Result<Vec<ToolSpec>, ToolError>>;

    /// Calls a tool with JSON text and returns JSON text.
    fn call(&self, name: String, arguments: String) -> BoxFuture<'_, Result<String, ToolError>>;

    /// Guest CPU time that the tools have used so far, in microseconds.
    fn guest_cpu_us(&self) -> u64;
    /// Why the attempt cannot be forked any more: a tool did something outside that doing twice would do twice. `None` as
    /// long as all that happened can be done again.
    fn not_forkable(&self) -> Option<String> {
        None
    }
}
