//! What a recorded rollout was trained on, call by call, and why anything was not: `fulgurite explain`.
//!
//! Three sources are put together: the store (what happened), the run's config (what was meant to count), and the trail (what
//! the algorithm was given and asked for). Rewards, masks and rows are made again by the functions that made them for training.

mod calls;
mod reasons;

use std::collections::BTreeMap;

use fulgurite_adapter::{Fit, Trajectory, Transition, accepted, fit, total_reward};
use fulgurite_core::id::{AttemptKey, PolicyVersion, RolloutId};
use fulgurite_core::outcome::AttemptOutcome;
use fulgurite_core::record::{AttemptRecord, RolloutMode, RolloutRecord, RolloutSpec};
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::span::Span;
use fulgurite_core::training::Stream;
use fulgurite_policy::PolicyTokenizer;
use fulgurite_store::{RolloutQuery, RolloutStore, StoreError};
use serde::Serialize;
use serde_json::Value;

use crate::config::{ConfigError, RunConfig, StageConfig};
use crate::host::dimension_of;
use crate::run_directory::RunDirectory;
use crate::trail::{self, GivenAs, ShareTrail, StepTrail, TrailError, UpdateVerb};
use crate::train::INITIAL;

/// Why a rollout cannot be explained.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// The run's config cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The store failed.
    #[error("the store failed")]
    Store(#[from] StoreError),
    /// The trail cannot be read.
    #[error(transparent)]
    Trail(#[from] TrailError),
    /// There is no such rollout.
    #[error("there is no rollout `{0}` in this run")]
    UnknownRollout(RolloutId),
}

/// All that is known of how a rollout was trained on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// Its id.
    pub rollout: RolloutId,
    /// The stage that enqueued it.
    pub stage: String,
    /// The step that enqueued it.
    pub step: u64,
    /// Its group: the algorithm's number of it where an update of it said one, else its place in the list that was enqueued.
    pub group: u64,
    /// Its item.
    pub item: String,
    /// What it was for.
    pub mode: RolloutMode,
    /// The attempt that counts; `None` before it has begun.
    pub attempt: Option<u32>,
    /// How that ended.
    pub outcome: Option<AttemptOutcome>,
    /// The reward dimension that the stage's algorithm reads, as far as the stage's config says so.
    pub dimension: String,
    /// Its total there; `None` without a reward that counts.
    pub total: Option<f64>,
    /// The same of all finished rollouts of its group, itself included, by id. They are what the algorithm called its group;
    /// where it said nothing of one, what the step enqueued for the same item counts, forks included.
    pub group_totals: BTreeMap<RolloutId, Option<f64>>,
    /// Every recorded reward.
    pub rewards: Vec<ExplainedReward>,
    /// Steps whose algorithm was given it.
    pub given: Vec<ExplainedStep>,
    /// Steps that carried it over to a later one.
    pub carried_by: Vec<u64>,
    /// Its answered calls.
    pub calls: Vec<ExplainedCall>,
    /// Updates that used any of them.
    pub updates: Vec<ExplainedUpdate>,
    /// Why none of it, or not all that might have been, was trained on.
    pub reasons: Vec<Reason>,
}

/// A reward, and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExplainedReward {
    /// The reward as it was given.
    #[serde(flatten)]
    pub reward: Reward,
    /// Whether its source counts (`rollout.reward_accept`).
    pub accepted: bool,
    /// The call that it belongs to; `None` is the whole rollout.
    pub attached_to: Option<u64>,
    /// The rule that says so (`reward.attach`).
    pub rule: &'static str,
}

/// A step that was given the rollout.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExplainedStep {
    /// The step.
    pub step: u64,
    /// Name of the algorithm.
    pub algorithm: String,
    /// Its version.
    pub version: String,
    /// As what it was given.
    pub given_as: GivenAs,
    /// Updates that the step made in all.
    pub updates: usize,
    /// Entries of the step that are not kept (`explain.entries_per_step_max`): what is said of the step may lack some.
    pub entries_left_out: u64,
}

/// One answered LLM call.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExplainedCall {
    /// Which one, from 0.
    pub call_index: u64,
    /// Which agent asked.
    pub agent_role: String,
    /// The model that drew it; `policy`, or its name in the config.
    pub model: String,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// Tokens that the policy drew and that may be trained on.
    pub drawn_tokens: usize,
    /// Drawn tokens that are left out because their row would be too long.
    pub cut_tokens: usize,
    /// Sum of their log-probs (nats) when they were drawn.
    pub log_prob_sum: f64,
    /// The weights that drew them.
    pub policy_version: PolicyVersion,
    /// The answer.
    pub text: String,
    /// The rewards that belong to it.
    pub rewards: Vec<(String, f64)>,
    /// How it was used, update by update.
    pub uses: Vec<Use>,
    /// Why it was not used.
    pub reasons: Vec<Reason>,
}

/// One use of a call by one update.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Use {
    /// The step.
    pub step: u64,
    /// The update of the step, from 0.
    pub update: usize,
    /// What the weights multiply; `None`: the plugin's own derivatives.
    pub stream: Option<Stream>,
    /// `sampled` or `observed`.
    pub scope: &'static str,
    /// Advantage, token weight, KL weight or derivative.
    pub weight: WeightSummary,
    /// What the loss made of its tokens beside that; `None` for the plugin's own derivatives, and in older runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<ShareTrail>,
    /// The row, from 0 among those of the rollout in this update.
    pub row: usize,
    /// Why it is in that row.
    pub row_start: String,
    /// The tokens that were trained, as ranges of places in the row; each ends before its second number.
    pub trained: Vec<(usize, usize)>,
    /// Drawn or observed tokens that were not: nothing predicts the first token of a row.
    pub masked_tokens: usize,
    /// What else there is to say.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// The weights of an entry.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WeightSummary {
    /// Tokens.
    pub tokens: usize,
    /// Mean.
    pub mean: f64,
    /// Smallest.
    pub min: f32,
    /// Largest.
    pub max: f32,
    /// One for each token, where they differ and are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub each: Option<Vec<f32>>,
}

/// An update that used the rollout.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExplainedUpdate {
    /// The step.
    pub step: u64,
    /// The update of the step, from 0.
    pub update: usize,
    /// The verb.
    pub verb: UpdateVerb,
    /// The model.
    pub model: String,
    /// The weights that the gradient was of.
    pub policy_version: PolicyVersion,
    /// Loss settings.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub loss: Value,
    /// What it found.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub found: Value,
    /// Settings of the optimiser step that applied it; `None` when none did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimiser: Option<Value>,
    /// What that step found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimiser_found: Option<Value>,
}

/// Why something was not trained on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// For programs.
    pub code: &'static str,
    /// For people.
    pub text: String,
}

impl Reason {
    /// Whether it is no reason against training, but worth knowing.
    #[must_use]
    pub fn is_remark(&self) -> bool {
        ["truncated", "prefix", "shuffled-rewards", "entries-left-out"].contains(&self.code)
    }

    fn new(code: &'static str, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

/// What is known of a rollout, before it is put together.
struct Known {
    config: RunConfig,
    record: RolloutRecord,
    attempt: Option<AttemptRecord>,
    spans: Vec<Span>,
    transitions: Vec<Transition>,
    fit: Fit,
    /// Steps of the stage that were given it, carried it over, or used it.
    steps: Vec<StepTrail>,
    has_trail: bool,
    groups: SaidGroups,
    tokenizer: Option<PolicyTokenizer>,
}

/// Who is compared with a rollout, by the word of its algorithm.
#[derive(Debug, Default)]
struct SaidGroups {
    /// Its own group.
    own: Option<u64>,
    /// Whether others that were trained on beside it are of its group.
    others: BTreeMap<RolloutId, bool>,
}

impl SaidGroups {
    /// Reads the groups of the updates that used the rollout.
    fn read(&mut self, step: &StepTrail, is_own: impl Fn(&str) -> bool) {
        for update in &step.updates {
            let entries = step.entries(update);
            let Some(own) = entries.iter().find(|entry| is_own(&entry.id)).and_then(|entry| entry.group) else {
                continue;
            };
            self.own.get_or_insert(own);
            for entry in entries.iter().filter(|entry| entry.group.is_some()) {
                let rollout = entry.id.split('/').next().unwrap_or_default();
                if let Ok(rollout) = RolloutId::new(rollout) {
                    *self.others.entry(rollout).or_default() |= entry.group == Some(own);
                }
            }
        }
    }

    /// Whether a rollout is of the group of the one that `spec` is of.
    fn has(&self, other: &RolloutSpec, spec: &RolloutSpec) -> bool {
        let is_of_item = || other.item_id == spec.item_id && other.mode == spec.mode;
        self.others.get(&other.id).copied().unwrap_or_else(is_of_item)
    }
}

impl Known {
    fn stage(&self) -> Option<&StageConfig> {
        let name = &self.record.spec.stage;
        self.config.stage.iter().chain(&self.config.control).find(|stage| stage.name == *name)
    }

    fn dimension(&self) -> &str {
        self.stage().map_or(fulgurite_core::reward::DEFAULT_DIMENSION, dimension_of)
    }

    fn accept(&self) -> &[RewardSource] {
        &self.config.rollout.reward_accept
    }

    fn outcome(&self) -> Option<&AttemptOutcome> {
        self.attempt.as_ref().and_then(|attempt| attempt.outcome.as_ref())
    }

    fn rewards(&self) -> &[Reward] {
        self.attempt.as_ref().map_or(&[], |attempt| &attempt.rewards)
    }
}

/// Explains a rollout of a run. Blocks.
///
/// # Errors
/// When the run, its store or its trail cannot be read, or there is no such rollout.
pub fn explain(run: &RunDirectory, store: &dyn RolloutStore, rollout: &RolloutId) -> Result<Explanation, ExplainError> {
    let known = gather(run, store, rollout)?;
    let group_totals = group_totals(store, &known)?;
    let (calls, updates) = calls::explain(&known, &group_totals);
    let spec = &known.record.spec;
    let given = known.steps.iter().filter_map(|step| {
        Some(ExplainedStep {
            step: step.step,
            algorithm: step.algorithm.clone(),
            version: step.version.clone(),
            given_as: *step.given.get(rollout)?,
            updates: step.updates.len(),
            entries_left_out: step.entries_left_out,
        })
    });
    let carried = known.steps.iter().filter(|step| step.carried.contains(rollout)).map(|step| step.step);
    let mut explanation = Explanation {
        rollout: rollout.clone(),
        stage: spec.stage.clone(),
        step: spec.step,
        group: known.groups.own.unwrap_or(spec.group),
        item: spec.item_id.clone(),
        mode: spec.mode,
        attempt: known.attempt.as_ref().map(|attempt| attempt.key.attempt.0),
        outcome: known.outcome().cloned(),
        dimension: known.dimension().to_owned(),
        total: total_reward(known.rewards(), known.dimension(), known.accept()),
        group_totals,
        rewards: rewards(&known),
        given: given.collect(),
        carried_by: carried.collect(),
        calls,
        updates,
        reasons: vec![],
    };
    explanation.reasons = reasons::of_rollout(&known, &explanation);
    Ok(explanation)
}

fn gather(run: &RunDirectory, store: &dyn RolloutStore, rollout: &RolloutId) -> Result<Known, ExplainError> {
    let config = RunConfig::of_run(run)?;
    let record = store.rollout(rollout)?.ok_or_else(|| ExplainError::UnknownRollout(rollout.clone()))?;
    let attempt = store.attempts(rollout)?.pop();
    let spans = match &attempt {
        Some(attempt) => store.spans(&attempt.key)?,
        None => vec![],
    };
    let rewards = attempt.as_ref().map_or(&[][..], |attempt| &attempt.rewards);
    let attached = config.reward.attach.attach(&spans, rewards, &config.rollout.reward_accept);
    let mut transitions = Trajectory::new(&spans, &attached, &record.spec.sampling).transitions;
    let is_trained = record.spec.mode == RolloutMode::Train;
    let fit = match config.rollout.row_tokens_max.filter(|_| is_trained) {
        Some(most) => fit(&mut transitions, most, config.rollout.row_too_long),
        None => Fit::Whole,
    };
    let (mut steps, mut has_trail, mut groups) = (vec![], false, SaidGroups::default());
    trail::read(&run.trail(), |mut step| {
        if step.stage != record.spec.stage {
            return;
        }
        has_trail = true;
        let is_own = |id: &str| is_of(id, attempt.as_ref().map(|attempt| &attempt.key));
        let uses = step.updates.iter().any(|update| update.entries.iter().any(|entry| is_own(&entry.id)));
        if uses || step.given.contains_key(rollout) || step.carried.contains(rollout) {
            groups.read(&step, is_own);
            // A long run's trail is not to be held whole.
            step.updates.iter_mut().for_each(|update| update.entries.retain(|entry| is_own(&entry.id)));
            steps.push(step);
        }
    })?;
    let folder = config.policy.local.as_ref().and_then(|local| local.model.directory.clone());
    let tokenizer = PolicyTokenizer::load(&folder.unwrap_or_else(|| run.policy(INITIAL))).ok();
    Ok(Known { config, record, attempt, spans, transitions, fit, steps, has_trail, groups, tokenizer })
}

/// Whether a transition is of an attempt.
fn is_of(id: &str, attempt: Option<&AttemptKey>) -> bool {
    attempt
        .is_some_and(|attempt| id.strip_prefix(&attempt.to_string()).and_then(|rest| rest.strip_prefix('/')).is_some())
}

/// Every reward with what became of it.
fn rewards(known: &Known) -> Vec<ExplainedReward> {
    let attach = &known.config.reward.attach;
    let recorded = known.rewards();
    let mut attached = attach.attach(&known.spans, recorded, known.accept()).into_iter();
    let explained = recorded.iter().map(|reward| {
        let accepted = !accepted(std::slice::from_ref(reward), known.accept()).is_empty();
        let attached_to = if accepted { attached.next().and_then(|reward| reward.call_index) } else { None };
        let rule = attach.rule(&reward.dimension).as_str();
        ExplainedReward { reward: reward.clone(), accepted, attached_to, rule }
    });
    explained.collect()
}

/// Totals of the rollouts that this one is compared with.
fn group_totals(store: &dyn RolloutStore, known: &Known) -> Result<BTreeMap<RolloutId, Option<f64>>, ExplainError> {
    let spec = &known.record.spec;
    let mut query = RolloutQuery { stage: Some(spec.stage.clone()), step: Some(spec.step), ..RolloutQuery::default() };
    let mut totals = BTreeMap::new();
    loop {
        let page = store.rollout_page(&query)?;
        for row in page.items {
            let other = &row.rollout.spec;
            let Some(attempt) = row.attempt.filter(|attempt| attempt.state.is_terminal()) else { continue };
            if known.groups.has(other, spec) {
                let graded = attempt.outcome.as_ref().is_some_and(|outcome| outcome.kind.is_graded());
                let total = total_reward(&attempt.rewards, known.dimension(), known.accept()).filter(|_| graded);
                totals.insert(other.id.clone(), total);
            }
        }
        query.after = page.next;
        if query.after.is_none() {
            return Ok(totals);
        }
    }
}
