//! What the store keeps of rollouts, attempts and resources.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::dataset::Split;
use crate::id::{AttemptKey, AttemptNumber, ContentHash, PolicyVersion, RolloutId};
use crate::limits::Limits;
use crate::llm::Sampling;
use crate::outcome::{AttemptOutcome, OutcomeKind};
use crate::reward::Reward;
use crate::reward_term::RewardTerm;
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
    /// The ancestor: a finished attempt, so that what the fork refers to never changes.
    pub rollout: RolloutId,
    /// Which attempt of it.
    pub attempt: AttemptNumber,
    /// Sequence of the first event that is not taken from the ancestor. The fork's own spans begin with this number.
    pub event: u64,
    /// The weights that drew the prefix; those of the suffix are the fork's own.
    pub policy_version: PolicyVersion,
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
    /// Content hash of the item, which the store keeps beside the rollout.
    pub item: ContentHash,
    /// Content hash of the [`ExecutionSettings`], which the store keeps beside the rollout.
    pub execution: ContentHash,
    /// Set on forked rollouts.
    pub fork_of: Option<ForkPoint>,
}

/// A rollout as the store keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutRecord {
    /// What was asked for. Shared: it never changes.
    pub spec: Arc<RolloutSpec>,
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
    /// The worker that ran it; empty when nobody said.
    pub worker: String,
    /// Why the rollout cannot be forked, when it did something that cannot be done twice.
    pub not_forkable: Option<String>,
}

/// A process that runs rollouts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRecord {
    /// Its id, unique in the run.
    pub id: String,
    /// Its process id on its machine.
    pub process_id: u32,
    /// Real start in nanoseconds since the Unix epoch.
    pub start_unix_ns: u64,
    /// Last sign of life, on the same clock.
    pub heartbeat_unix_ns: u64,
    /// Attempts that it has begun.
    pub attempts: u64,
}

/// What beside item, components and model decides how an attempt runs. Kept once per run by content hash, so that a rollout
/// can be run again under the conditions that it was recorded under.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExecutionSettings {
    /// The engine that ran it, with every setting that a guest could notice.
    pub engine: String,
    /// Limits of agent, tools and grader.
    pub limits: Limits,
    /// Limits of single plugins, by `agent`, `grader` or the tool's name, where they are narrower.
    #[serde(default)]
    pub plugin_limits: BTreeMap<String, Limits>,
    /// Tools in the order in which agents see them, with their content hashes.
    pub tools: Vec<(String, ContentHash)>,
    /// Whether there is a grader; it is the second component then.
    pub graded: bool,
    /// Prompt templates.
    pub templates: BTreeMap<String, String>,
    /// Reward that the host adds for an outcome blamed on the policy.
    pub outcome_reward: BTreeMap<OutcomeKind, f64>,
    /// Dimensions beside `reward` that have it as well. Left out where there are none, as it was before there were any.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub outcome_dimensions: BTreeSet<String>,
    /// Rewards that the host gives for what it finds in the record. Left out where there are none, so that conditions without
    /// them are the bytes, and have the hash, that they had before there were any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reward_terms: Vec<RewardTerm>,
    /// Grants by `agent`, `grader` or the tool's name: JSON text of what the config grants.
    #[serde(default)]
    pub grants: BTreeMap<String, String>,
}

impl ExecutionSettings {
    /// The record as it is kept: JSON, with keys in a fixed order.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }
}
