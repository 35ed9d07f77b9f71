//! The two state machines of DESIGN.md 5.3, as one transition table each.

use serde::{Deserialize, Serialize};

/// State of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RolloutState {
    /// Waits for a worker.
    Queuing,
    /// An attempt is being set up.
    Preparing,
    /// An attempt runs.
    Running,
    /// An attempt failed and another will follow.
    Requeuing,
    /// Ended: the last attempt was recorded and, where it could be, graded.
    Succeeded,
    /// Ended: no attempt could be graded.
    Failed,
    /// Ended on request.
    Cancelled,
}

/// State of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttemptState {
    /// Sandboxes are being set up.
    Preparing,
    /// The agent runs.
    Running,
    /// Ended and graded.
    Succeeded,
    /// Ended without a grade.
    Failed,
    /// Ended by the wall-clock limit.
    Timeout,
    /// Ended because its worker stopped answering.
    Unresponsive,
}

/// A transition that the table does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} cannot go from {from} to {to}")]
pub struct IllegalTransition {
    /// `rollout` or `attempt`.
    pub what: &'static str,
    /// The state it is in.
    pub from: &'static str,
    /// The state asked for.
    pub to: &'static str,
}

impl RolloutState {
    /// Every state.
    pub const ALL: [Self; 7] = [
        Self::Queuing,
        Self::Preparing,
        Self::Running,
        Self::Requeuing,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// Whether the state is frozen.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// The state's name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queuing => "queuing",
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::Requeuing => "requeuing",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Checks a transition. A crash may end any attempt, so every live state can requeue, fail or be cancelled.
    ///
    /// # Errors
    /// When the table does not have it.
    pub const fn to(self, next: Self) -> Result<Self, IllegalTransition> {
        let legal = match self {
            Self::Queuing | Self::Requeuing => matches!(next, Self::Preparing | Self::Failed | Self::Cancelled),
            Self::Preparing => matches!(next, Self::Running | Self::Requeuing | Self::Failed | Self::Cancelled),
            Self::Running => matches!(next, Self::Requeuing | Self::Succeeded | Self::Failed | Self::Cancelled),
            Self::Succeeded | Self::Failed | Self::Cancelled => false,
        };
        if legal {
            Ok(next)
        } else {
            Err(IllegalTransition { what: "rollout", from: self.as_str(), to: next.as_str() })
        }
    }
}

impl AttemptState {
    /// Every state.
    pub const ALL: [Self; 6] =
        [Self::Preparing, Self::Running, Self::Succeeded, Self::Failed, Self::Timeout, Self::Unresponsive];

    /// Whether the state is frozen.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        !matches!(self, Self::Preparing | Self::Running)
    }

    /// The state's name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Timeout => "timeout",
            Self::Unresponsive => "unresponsive",
        }
    }

    /// Checks a transition.
    ///
    /// # Errors
    /// When the table does not have it.
    pub const fn to(self, next: Self) -> Result<Self, IllegalTransition> {
        let legal = match self {
            Self::Preparing => matches!(next, Self::Running | Self::Failed | Self::Timeout | Self::Unresponsive),
            Self::Running => next.is_terminal(),
            Self::Succeeded | Self::Failed | Self::Timeout | Self::Unresponsive => false,
        };
        if legal {
            Ok(next)
        } else {
            Err(IllegalTransition { what: "attempt", from: self.as_str(), to: next.as_str() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rollout_table_by_all_pairs() {
        use RolloutState::{Cancelled, Failed, Preparing, Queuing, Requeuing, Running, Succeeded};
        let legal = [
            (Queuing, Preparing),
            (Queuing, Failed),
            (Queuing, Cancelled),
            (Preparing, Running),
            (Preparing, Requeuing),
            (Preparing, Failed),
            (Preparing, Cancelled),
            (Running, Requeuing),
            (Running, Succeeded),
            (Running, Failed),
            (Running, Cancelled),
            (Requeuing, Preparing),
            (Requeuing, Failed),
            (Requeuing, Cancelled),
        ];
        for from in RolloutState::ALL {
            for to in RolloutState::ALL {
                assert_eq!(from.to(to).is_ok(), legal.contains(&(from, to)), "{from:?} -> {to:?}");
            }
        }
    }

    #[test]
    fn attempt_table_by_all_pairs() {
        use AttemptState::{Failed, Preparing, Running, Succeeded, Timeout, Unresponsive};
        let legal = [
            (Preparing, Running),
            (Preparing, Failed),
            (Preparing, Timeout),
            (Preparing, Unresponsive),
            (Running, Succeeded),
            (Running, Failed),
            (Running, Timeout),
            (Running, Unresponsive),
        ];
        for from in AttemptState::ALL {
            for to in AttemptState::ALL {
                assert_eq!(from.to(to).is_ok(), legal.contains(&(from, to)), "{from:?} -> {to:?}");
            }
        }
    }
}
