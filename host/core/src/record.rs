//! What the store keeps of rollouts, attempts and resources.

use serde::{Deserialize, Serialize};

use crate::dataset::Split;
use crate::id::{AttemptKey, AttemptNumber, ContentHash, PolicyVersion, RolloutId};
use crate::llm::Sampling;
use crate::outcome::AttemptOutcome;
use crate::reward::Reward;
use crate::seed::Seed;
use crate::state::{AttemptState, RolloutState};

/// What a rollout is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RolloutMode {
    /// Its transitions may be trained on.
    Train,
    /// An algorithm's own evaluation.
    Val,
    /// The host's held-out evaluation.
    Test,
}

impl RolloutMode {
    /// The mode's name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Val => "val",
            Self::Test => "test",
        }
    }
}

/// Where a forked rollout leaves its ancestor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkPoint {
    /// The ancestor.
    pub rollout: RolloutId,
    /// Sequence of the first event that is not taken from the ancestor.
    pub event: u64,
}

/// Everything that must be known to run a rollout, fixed when it is enqueued.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutSpec {
    /// Its id.
    pub id: RolloutId,
    /// Which pipeline stage asked for it.
    pub stage: String,
    /// Step of that stage.
    pub step: u64,
    /// Group inside the step: rollouts of one group share item and resources.
    pub group: u64,
    /// Name of the dataset.
    pub dataset: String,
    /// Split that the item was drawn from.
    pub split: Split,
    /// The item.
    pub item_id: String,
    /// What it is for.
    pub mode: RolloutMode,
    /// Seed of its attempts: clock start, random and sampling follow from it.
    pub seed: Seed,
    /// Sampling for the policy's calls.
    pub sampling: Sampling,
    /// The weights in force when it was enqueued.
    pub policy_version: PolicyVersion,
    /// Version of the published prompt templates, pinned.
    pub resources_version: u64,
    /// Content hashes of agent, grader and tools, pinned, in this order.
    pub components: Vec<ContentHash>,
    /// Set on forked rollouts.
    pub fork_of: Option<ForkPoint>,
}

/// A rollout as the store keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutRecord {
    /// What was asked for.
    pub spec: RolloutSpec,
    /// Where it stands.
    pub state: RolloutState,
    /// The newest attempt; `None` before the first.
    pub attempt: Option<AttemptNumber>,
    /// Order of enqueueing inside the run, from 0.
    pub ordinal: u64,
}

/// An attempt as the store keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttemptRecord {
    /// Which one.
    pub key: AttemptKey,
    /// Where it stands.
    pub state: AttemptState,
    /// Real start in nanoseconds since the Unix epoch; also the start of the guest's virtual clock.
    pub start_unix_ns: u64,
    /// Real end; 0 while it is live.
    pub end_unix_ns: u64,
    /// How it ended.
    pub outcome: Option<AttemptOutcome>,
    /// The accepted rewards.
    pub rewards: Vec<Reward>,
    /// Spans recorded.
    pub spans: u64,
    /// Guest CPU time in microseconds, agent and tools together.
    pub guest_cpu_us: u64,
}
