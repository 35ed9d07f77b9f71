//! What a runner is given.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use fulgurite_adapter::RewardTerms;
use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::id::ContentHash;
use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::record::{AttemptRecord, ExecutionSettings, RolloutSpec};
use fulgurite_core::span::Span;
use fulgurite_sandbox::{AgentPlugin, GraderPlugin, Templates, ToolPlugin};
use fulgurite_store::StoreError;

use crate::grants::RunnerGrants;

/// The components of a run.
#[derive(Debug, Clone)]
pub struct Plugins {
    /// The agent.
    pub agent: Arc<AgentPlugin>,
    /// The grader, when there is one.
    pub grader: Option<Arc<GraderPlugin>>,
    /// Tools by name, in the order in which agents see them.
    pub tools: BTreeMap<String, Arc<ToolPlugin>>,
}

impl Plugins {
    /// Content hashes in the order agent, grader, tools: what a rollout pins.
    #[must_use]
    pub fn hashes(&self) -> Vec<ContentHash> {
        let mut hashes = vec![self.agent.hash()];
        hashes.extend(self.grader.iter().map(|grader| grader.hash()));
        hashes.extend(self.tools.values().map(|tool| tool.hash()));
        hashes
    }
}

/// How often a rollout is tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts of one rollout, the first included, after outcomes that can recover.
    pub attempts_max: u32,
    /// The same for single kinds of outcome.
    pub by_kind: BTreeMap<OutcomeKind, u32>,
}

impl RetryPolicy {
    /// Whether an attempt that ended so is followed by another. Guest code is deterministic: its faults would repeat.
    #[must_use]
    pub fn tries_again(&self, kind: OutcomeKind, attempts: u32) -> bool {
        kind.is_retryable() && attempts < self.by_kind.get(&kind).copied().unwrap_or(self.attempts_max)
    }
}

/// What becomes of what an attempt did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recording {
    /// It is in the store before its rollout counts as finished.
    Durable,
    /// Only its outcome and rewards are returned. Nothing can be looked at, replayed or trained on afterwards.
    Nothing,
}

/// Settings of a runner.
#[derive(Debug, Clone)]
pub struct RunnerSettings {
    /// Attempts alive at once. The machine may bear fewer: see [`Runner::live_max`](crate::Runner::live_max).
    pub live_max: usize,
    /// When a rollout is tried again.
    pub retry: RetryPolicy,
    /// Limits of every sandbox.
    pub limits: Limits,
    /// Reward that the host adds for an outcome blamed on the policy; 0 where not named.
    pub outcome_reward: BTreeMap<OutcomeKind, f64>,
    /// Dimensions beside `reward` that have it as well: those that something is trained on.
    pub outcome_dimensions: BTreeSet<String>,
    /// Rewards that the host gives for what it finds in the record of a graded attempt.
    pub reward_terms: RewardTerms,
    /// Prompt templates.
    pub templates: Arc<Templates>,
    /// What single plugins are given.
    pub grants: RunnerGrants,
    /// What is kept.
    pub recording: Recording,
    /// Who runs: the worker's id in the records.
    pub worker: String,
    /// Folder in which other processes leave requests, see [`control`](crate::control); `None` takes none.
    pub control: Option<PathBuf>,
}

/// What decides how an attempt goes, beside its item and its model.
#[derive(Debug, Clone)]
pub(crate) struct Conditions {
    pub(crate) plugins: Plugins,
    pub(crate) limits: Arc<Limits>,
    pub(crate) outcome_reward: BTreeMap<OutcomeKind, f64>,
    pub(crate) outcome_dimensions: BTreeSet<String>,
    pub(crate) reward_terms: RewardTerms,
    pub(crate) templates: Arc<Templates>,
    pub(crate) grants: RunnerGrants,
}

impl Conditions {
    pub(crate) fn new(plugins: Plugins, settings: &RunnerSettings) -> Self {
        Self {
            plugins,
            limits: Arc::new(settings.limits.clone()),
            outcome_reward: settings.outcome_reward.clone(),
            outcome_dimensions: settings.outcome_dimensions.clone(),
            reward_terms: settings.reward_terms.clone(),
            templates: Arc::clone(&settings.templates),
            grants: settings.grants.clone(),
        }
    }

    /// As they are kept beside the rollouts.
    pub(crate) fn record(&self) -> ExecutionSettings {
        ExecutionSettings {
            engine: self.plugins.agent.engine(),
            limits: self.limits.as_ref().clone(),
            plugin_limits: self.grants.plugin_limits.clone(),
            tools: self.plugins.tools.iter().map(|(name, tool)| (name.clone(), tool.hash())).collect(),
            graded: self.plugins.grader.is_some(),
            templates: self.templates.texts().clone(),
            outcome_reward: self.outcome_reward.clone(),
            outcome_dimensions: self.outcome_dimensions.clone(),
            reward_terms: self.reward_terms.declared(),
            grants: self.grants.records.clone(),
        }
    }
}

/// One rollout to run.
#[derive(Debug, Clone)]
pub struct Job {
    /// What is asked for; durable before it starts.
    pub spec: Arc<RolloutSpec>,
    /// The item.
    pub item: Arc<DatasetItem>,
}

/// A finished rollout.
#[derive(Debug, Clone)]
pub struct RolloutResult {
    /// What was asked for.
    pub spec: Arc<RolloutSpec>,
    /// The attempt that counts: the last one.
    pub attempt: AttemptRecord,
    /// How it ended.
    pub outcome: AttemptOutcome,
    /// Spans of that attempt in the order of their sequence; of a fork, those after its ancestor's; none when nothing is
    /// recorded.
    pub spans: Arc<Vec<Span>>,
}

impl RolloutResult {
    /// Whether it counts in baselines and losses.
    #[must_use]
    pub fn is_graded(&self) -> bool {
        self.outcome.kind.is_graded()
    }
}

/// Why the runner gave up on a batch. A failing guest is never an error: it is an outcome.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// The store failed.
    #[error("the store failed")]
    Store(#[from] StoreError),
    /// The runner's own code failed.
    #[error("a rollout's worker ended without a result")]
    WorkerLost,
    /// The runner is being drained: what had not begun stays queued in the store.
    #[error("stopped before this rollout began; it stays queued")]
    Draining,
    /// The machine cannot hold one attempt of this make.
    #[error("no attempt fits on this machine: {0}")]
    TooLarge(String),
    /// A rollout cannot be forked.
    #[error("cannot fork {rollout}: {problem}")]
    Fork {
        /// The ancestor.
        rollout: fulgurite_core::id::RolloutId,
        /// Why not.
        problem: String,
    },
}
