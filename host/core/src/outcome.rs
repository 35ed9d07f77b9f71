//! How an attempt ended and whom to blame.
//!
//! What the policy did wrong is graded and trained on. What agent code or infrastructure did wrong is never a number: it is
//! kept out of baselines and losses, counted, and shown (DESIGN.md 5.3).

use serde::{Deserialize, Serialize};

/// Whom a bad outcome is blamed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Blame {
    /// The model: malformed, too long, too many turns. Graded, in baseline and loss.
    Policy,
    /// The code of an agent, tool or grader. Excluded from baseline and loss.
    AgentCode,
    /// Everything else: an endpoint, the store, the machine. Excluded, and worth a retry.
    Infrastructure,
}

/// The kinds of outcome. The set is closed: config, records and metrics name these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutcomeKind {
    /// The agent returned an outcome.
    Completed,
    /// The agent could not use what the policy wrote.
    MalformedAnswer,
    /// The policy used up the attempt's tokens.
    TokenLimit,
    /// The policy used up the attempt's LLM calls.
    TurnLimit,
    /// A prompt outgrew the model's context.
    ContextLimit,
    /// The agent returned an error of its own.
    AgentError,
    /// Guest code trapped.
    Trap,
    /// Guest code asked for more memory, tables or instances than it may have.
    MemoryLimit,
    /// Guest code used up its CPU time.
    CpuLimit,
    /// Guest code recursed too deeply.
    StackLimit,
    /// Guest code emitted too much: spans, logs, or one too large host call.
    OutputLimit,
    /// A tool component trapped, or used up a limit.
    ToolFault,
    /// The grader trapped, used up a limit, returned an error, or returned a value that is not a finite number.
    GraderFault,
    /// The wall-clock limit of the attempt was reached.
    WallTimeout,
    /// A model endpoint failed for good.
    LlmUnavailable,
    /// The rollout was cancelled.
    Cancelled,
    /// The host itself failed.
    HostFault,
    /// Nothing was heard of the attempt for so long that it was ended: a call that hangs, or a worker that is gone.
    Unresponsive,
}

impl OutcomeKind {
    /// Every kind, in the order of declaration.
    pub const ALL: [Self; 18] = [
        Self::Completed,
        Self::MalformedAnswer,
        Self::TokenLimit,
        Self::TurnLimit,
        Self::ContextLimit,
        Self::AgentError,
        Self::Trap,
        Self::MemoryLimit,
        Self::CpuLimit,
        Self::StackLimit,
        Self::OutputLimit,
        Self::ToolFault,
        Self::GraderFault,
        Self::WallTimeout,
        Self::LlmUnavailable,
        Self::Cancelled,
        Self::HostFault,
        Self::Unresponsive,
    ];

    /// Whom the kind is blamed on; `None` when nothing went wrong.
    #[must_use]
    pub const fn blame(self) -> Option<Blame> {
        match self {
            Self::Completed => None,
            Self::MalformedAnswer | Self::TokenLimit | Self::TurnLimit | Self::ContextLimit => Some(Blame::Policy),
            Self::AgentError
            | Self::Trap
            | Self::MemoryLimit
            | Self::CpuLimit
            | Self::StackLimit
            | Self::OutputLimit
            | Self::ToolFault
            | Self::GraderFault => Some(Blame::AgentCode),
            Self::WallTimeout | Self::LlmUnavailable | Self::Cancelled | Self::HostFault | Self::Unresponsive => {
                Some(Blame::Infrastructure)
            }
        }
    }

    /// Whether rewards of such an attempt count in baselines and losses.
    #[must_use]
    pub const fn is_graded(self) -> bool {
        matches!(self.blame(), None | Some(Blame::Policy))
    }

    /// Whether trying again can help. Guest code is deterministic, so its faults repeat; endpoints and machines recover.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::WallTimeout | Self::LlmUnavailable | Self::HostFault | Self::Unresponsive)
    }

    /// The kind's name in config, records and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::MalformedAnswer => "malformed-answer",
            Self::TokenLimit => "token-limit",
            Self::TurnLimit => "turn-limit",
            Self::ContextLimit => "context-limit",
            Self::AgentError => "agent-error",
            Self::Trap => "trap",
            Self::MemoryLimit => "memory-limit",
            Self::CpuLimit => "cpu-limit",
            Self::StackLimit => "stack-limit",
            Self::OutputLimit => "output-limit",
            Self::ToolFault => "tool-fault",
            Self::GraderFault => "grader-fault",
            Self::WallTimeout => "wall-timeout",
            Self::LlmUnavailable => "llm-unavailable",
            Self::Cancelled => "cancelled",
            Self::HostFault => "host-fault",
            Self::Unresponsive => "unresponsive",
        }
    }
}

/// A limit that was reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitReached {
    /// Field name in [`crate::limits::Limits`], unit included.
    pub name: String,
    /// The limit's value.
    pub value: u64,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttemptOutcome {
    /// What happened.
    pub kind: OutcomeKind,
    /// What the agent returned (JSON text); `null` unless it completed.
    pub output: String,
    /// For people: what exactly went wrong. Guest text in here is untrusted.
    pub detail: String,
    /// The limit, when one was reached.
    pub limit: Option<LimitReached>,
}

impl AttemptOutcome {
    /// An attempt whose agent returned `output` (JSON text).
    #[must_use]
    pub fn completed(output: String) -> Self {
        Self { kind: OutcomeKind::Completed, output, detail: String::new(), limit: None }
    }

    /// An attempt that failed.
    #[must_use]
    pub fn failed(kind: OutcomeKind, detail: impl Into<String>) -> Self {
        Self { kind, output: "null".to_owned(), detail: detail.into(), limit: None }
    }

    /// An attempt that reached a limit.
    #[must_use]
    pub fn limited(kind: OutcomeKind, name: &str, value: u64) -> Self {
        Self {
            kind,
            output: "null".to_owned(),
            detail: format!("limit {name} of {value} is reached"),
            limit: Some(LimitReached { name: name.to_owned(), value }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_serialised_ones_and_unique() {
        for kind in OutcomeKind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
        let mut names: Vec<_> = OutcomeKind::ALL.iter().map(|kind| kind.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), OutcomeKind::ALL.len());
    }

    #[test]
    fn only_faults_of_others_are_kept_out_of_the_loss() {
        for kind in OutcomeKind::ALL {
            assert_eq!(kind.is_graded(), !matches!(kind.blame(), Some(Blame::AgentCode | Blame::Infrastructure)));
            assert!(!kind.is_retryable() || kind.blame() == Some(Blame::Infrastructure));
        }
    }
}
