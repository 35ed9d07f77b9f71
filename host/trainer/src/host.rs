//! The host's side of the algorithm world, for one stage.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fulgurite_adapter::{Sequence, Trajectory, Transition};
use fulgurite_core::algorithm::{
    AlgorithmHost, AlgorithmHostError, BatchEntry, ForkRequest, GroupSpec, Item, ModelReference, Scope, TrajectoryView,
    TransitionForward, TransitionGradient, TransitionView, Verb, WaitFor, Weights,
};
use fulgurite_core::dataset::Split;
use fulgurite_core::id::{RolloutId, TransitionId};
use fulgurite_core::llm::{Message, Role, Sampling};
use fulgurite_core::record::{ForkPoint, RolloutMode, RolloutSpec};
use fulgurite_core::reward::Reward;
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_core::training::{ForwardBackwardReport, LossSpec, OptimiserReport, OptimiserStep, Stream, TrainingRow};
use fulgurite_policy::{PolicyEngine, PolicyError};
use fulgurite_runner::fork::fork_point;
use fulgurite_runner::{Batch, Job, RolloutResult, Runner};
use tokio::sync::watch;

use crate::checkpoint::{Progress, Totals};
use crate::config::{AlgorithmGrant, ExperimentConfig, RolloutConfig, StageConfig};
use crate::dataset::{Cursor, Dataset};
use crate::metrics;

/// Rollouts that one step may enqueue. 65,536: a bound against a plugin in a loop, far above any real batch.
const ROLLOUTS_PER_STEP_MAX: u64 = 65_536;
/// Items of one `next-items`. The same bound.
const ITEMS_MAX: u32 = 65_536;
/// Notes of one step. 64: a note is for people.
const NOTES_MAX: usize = 64;
/// Bytes of one note. 1 KiB.
const NOTE_BYTES_MAX: usize = 1_024;
/// Scalars of one step. 256.
const SCALARS_MAX: usize = 256;

/// Name of the snapshot that the KL term is taken against.
const REFERENCE: &str = "reference";

/// What a stage is made of.
pub(crate) struct StageHost {
    pub(crate) runner: Runner,
    pub(crate) engine: PolicyEngine,
    pub(crate) dataset: Arc<Dataset>,
    pub(crate) stage: StageConfig,
    pub(crate) rollout: RolloutConfig,
    pub(crate) experiment: ExperimentConfig,
    pub(crate) resources_version: u64,
    pub(crate) seed: Seed,
    pub(crate) stop: watch::Receiver<bool>,
    state: Mutex<StageState>,
    batches: tokio::sync::Mutex<BTreeMap<u64, OpenBatch>>,
}

/// What changes while a stage runs.
#[derive(Debug, Default)]
pub(crate) struct StageState {
    pub(crate) step: u64,
    pub(crate) cursors: BTreeMap<String, Cursor>,
    pub(crate) totals: Totals,
    pub(crate) snapshots: u64,
    pub(crate) scalars: BTreeMap<String, f64>,
    pub(crate) notes: Vec<String>,
    /// Rollouts enqueued by the step so far: the index in the next id.
    enqueued: u64,
    /// Demonstrations imported by the step so far.
    imported: u64,
    /// Batches opened by the stage so far.
    batches: u64,
    /// Transitions that the step may train on. A step is a transaction: the next one starts empty.
    transitions: BTreeMap<TransitionId, Held>,
    /// Transitions of the step that were made to choose or to estimate.
    estimates: BTreeSet<TransitionId>,
}

impl StageState {
    /// Where a checkpoint stands, at the start of its next step.
    pub(crate) fn resumed(progress: &Progress) -> Self {
        Self {
            step: progress.step,
            cursors: progress.cursors.clone(),
            totals: progress.totals,
            snapshots: progress.snapshots,
            ..Self::default()
        }
    }
}

/// A transition and the sequence that it belongs to.
#[derive(Debug, Clone)]
struct Held {
    transition: Arc<Transition>,
    /// Rollout id, or the transition's own id for a demonstration.
    sequence: String,
}

struct OpenBatch {
    batch: Batch,
    size: u64,
    groups: Vec<u64>,
    excluded: BTreeMap<&'static str, (u64, String)>,
}

impl StageHost {
    #[expect(clippy::too_many_arguments, reason = "the pieces of a stage, each used as it is")]
    pub(crate) fn new(
        runner: Runner,
        engine: PolicyEngine,
        dataset: Arc<Dataset>,
        stage: StageConfig,
        rollout: RolloutConfig,
        experiment: ExperimentConfig,
        resources_version: u64,
        seed: Seed,
        stop: watch::Receiver<bool>,
        state: StageState,
    ) -> Self {
        let (state, batches) = (Mutex::new(state), tokio::sync::Mutex::default());
        Self { runner, engine, dataset, stage, rollout, experiment, resources_version, seed, stop, state, batches }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, StageState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a step: hands out its scalars and notes and forgets its transitions.
    pub(crate) fn end_step(&self) -> (BTreeMap<String, f64>, Vec<String>) {
        let mut state = self.state();
        state.step += 1;
        state.enqueued = 0;
        state.imported = 0;
        state.transitions.clear();
        state.estimates.clear();
        (std::mem::take(&mut state.scalars), std::mem::take(&mut state.notes))
    }

    fn check_stop(&self) -> Result<(), AlgorithmHostError> {
        if *self.stop.borrow() { Err(AlgorithmHostError::Stopping) } else { Ok(()) }
    }

    fn only_policy(model: &ModelReference) -> Result<(), AlgorithmHostError> {
        match model {
            ModelReference::Policy => Ok(()),
            ModelReference::Snapshot(name) => {
                Err(AlgorithmHostError::InvalidArgument(format!("snapshot `{name}` is frozen; train `policy`")))
            }
            ModelReference::Named(name) => Err(AlgorithmHostError::Unsupported(format!("named model `{name}`"))),
        }
    }

    fn items(&self, split: Split, count: u32) -> Result<Vec<Item>, AlgorithmHostError> {
        self.check_stop()?;
        if split == Split::Test {
            return Err(AlgorithmHostError::Denied("the test split is drawn by the host only".to_owned()));
        }
        if count > ITEMS_MAX {
            return Err(AlgorithmHostError::InvalidArgument(format!("count {count} is above {ITEMS_MAX}")));
        }
        let items = self.dataset.split(split);
        if items.is_empty() {
            let id = format!("{}.{}", self.stage.dataset, split.as_str());
            return Err(AlgorithmHostError::Unknown { kind: "split", id });
        }
        let reads_reference = self.stage.grants.contains(&AlgorithmGrant::ReadReference);
        let seed = self.seed.child("order").child(&self.stage.dataset).child(split.as_str());
        let mut state = self.state();
        let cursor = state.cursors.entry(split.as_str().to_owned()).or_default();
        let drawn = cursor.draw(items.len(), count as usize, seed);
        let view = |(place, epoch): (usize, u64)| {
            items.get(place).map(|item| Item {
                id: item.id.clone(),
                input: item.texts().input.as_ref().to_owned(),
                reference: reads_reference.then(|| item.texts().reference.as_ref().to_owned()),
                epoch,
            })
        };
        Ok(drawn.into_iter().filter_map(view).collect())
    }

    fn jobs(&self, groups: &[GroupSpec]) -> Result<(Vec<Job>, Vec<u64>), AlgorithmHostError> {
        self.check_stop()?;
        let mut state = self.state();
        let (mut jobs, mut places) = (vec![], vec![]);
        for (group, spec) in groups.iter().enumerate() {
            let split = match spec.mode {
                RolloutMode::Train => Split::Train,
                RolloutMode::Val => Split::Val,
                RolloutMode::Test => return Err(AlgorithmHostError::Denied("mode `test` is the host's".to_owned())),
            };
            // An item of the test split must stay unknown to algorithms, so it is refused as if it were not there.
            let unknown = || AlgorithmHostError::Unknown { kind: "item", id: spec.item_id.clone() };
            let fork = spec.fork_of.as_ref().map(|fork| self.fork(fork, spec)).transpose()?;
            let split = fork.as_ref().map_or(split, |(_, split)| *split);
            let item = self.dataset.item(split, &spec.item_id).ok_or_else(unknown)?;
            for _ in 0..spec.count {
                if state.enqueued >= ROLLOUTS_PER_STEP_MAX {
                    let problem = format!("a step may enqueue {ROLLOUTS_PER_STEP_MAX} rollouts");
                    return Err(AlgorithmHostError::InvalidArgument(problem));
                }
                let index = state.enqueued;
                state.enqueued += 1;
                let id = RolloutId::derived(&self.stage.name, state.step, index)
                    .map_err(|error| AlgorithmHostError::InvalidArgument(error.to_string()))?;
                jobs.push(Job {
                    spec: Arc::new(RolloutSpec {
                        id,
                        stage: self.stage.name.clone(),
                        step: state.step,
                        group: group as u64,
                        dataset: self.stage.dataset.clone(),
                        split,
                        item_id: item.id.clone(),
                        mode: spec.mode,
                        seed: self.seed.child("rollout").child_index(state.step).child_index(index),
                        sampling: merge(&self.rollout.sampling, &spec.sampling),
                        policy_version: self.engine.version(),
                        resources_version: self.resources_version,
                        components: self.runner.plugins().hashes(),
                        item: item.texts().hash,
                        execution: self.runner.execution_hash(),
                        fork_of: fork.as_ref().map(|(point, _)| point.clone()),
                    }),
                    item: Arc::clone(item),
                });
                places.push(group as u64);
            }
        }
        Ok((jobs, places))
    }

    /// Where a group's rollouts leave their ancestor, and the split that its item is from.
    fn fork(&self, fork: &ForkRequest, group: &GroupSpec) -> Result<(ForkPoint, Split), AlgorithmHostError> {
        let unknown = || AlgorithmHostError::Unknown { kind: "rollout", id: fork.rollout.to_string() };
        let ancestor = self.runner.store().rollout(&fork.rollout).map_err(runner_error)?.ok_or_else(unknown)?;
        // Evaluations are the host's: an algorithm does not learn that they exist.
        if ancestor.spec.mode == RolloutMode::Test {
            return Err(unknown());
        }
        if ancestor.spec.item_id != group.item_id || ancestor.spec.dataset != self.stage.dataset {
            let problem = format!("fork-of: rollout `{}` is of another item", fork.rollout);
            return Err(AlgorithmHostError::InvalidArgument(problem));
        }
        // Its items are for looking at, whoever the ancestor was made for.
        if group.mode == RolloutMode::Train && ancestor.spec.split != Split::Train {
            let (rollout, split) = (&fork.rollout, ancestor.spec.split.as_str());
            let problem = format!("rollout `{rollout}` is of the split `{split}`, which is not trained on");
            return Err(AlgorithmHostError::Denied(problem));
        }
        let point = fork_point(&**self.runner.store(), &fork.rollout, None, fork.event)
            .map_err(|problem| AlgorithmHostError::InvalidArgument(format!("fork-of: {problem}")))?;
        Ok((point, ancestor.spec.split))
    }

    /// Turns finished rollouts into what a plugin sees and keeps their transitions for training.
    fn view(&self, open: &mut OpenBatch, ended: Vec<(usize, RolloutResult)>) -> Vec<TrajectoryView> {
        let mut rewards: Vec<Vec<Reward>> = ended
            .iter()
            .map(|(_, result)| fulgurite_adapter::accepted(&result.attempt.rewards, &self.rollout.reward_accept))
            .collect();
        if self.experiment.shuffle_rewards {
            self.shuffle(&ended, &mut rewards);
        }
        let mut state = self.state();
        let mut views = vec![];
        for ((place, result), rewards) in ended.into_iter().zip(rewards) {
            state.totals.rollouts += 1;
            let graded = result.is_graded();
            if !graded {
                state.totals.failed += 1;
                let counted = open.excluded.entry(result.outcome.kind.as_str()).or_default();
                *counted = (counted.0 + 1, result.outcome.detail.clone());
            }
            let transitions = Trajectory::new(&result.spans, &rewards, &result.spec.sampling).transitions;
            let sequence = result.spec.id.to_string();
            let mut seen = vec![];
            for transition in transitions {
                let transition = Arc::new(transition);
                seen.push(transition_view(&transition));
                // What is run to choose or to estimate is never trained on.
                if result.spec.mode != RolloutMode::Train {
                    state.estimates.insert(transition.id.clone());
                } else if graded {
                    let held = Held { transition: Arc::clone(&transition), sequence: sequence.clone() };
                    state.transitions.insert(transition.id.clone(), held);
                }
            }
            views.push(TrajectoryView {
                rollout: result.spec.id.clone(),
                group: open.groups.get(place).copied().unwrap_or_default(),
                item_id: result.spec.item_id.clone(),
                outcome: result.outcome.kind,
                graded,
                rewards,
                transitions: seen,
            });
        }
        views
    }

    fn shuffle(&self, ended: &[(usize, RolloutResult)], rewards: &mut [Vec<Reward>]) {
        let graded: Vec<usize> =
            ended.iter().enumerate().filter(|(_, (_, result))| result.is_graded()).map(|(place, _)| place).collect();
        let mut order = graded.clone();
        Generator::new(self.seed.child("shuffle-rewards").child_index(self.state().step)).shuffle(&mut order);
        let original = rewards.to_vec();
        for (to, from) in graded.into_iter().zip(order) {
            if let (Some(target), Some(source)) = (rewards.get_mut(to), original.get(from)) {
                target.clone_from(source);
            }
        }
    }

    fn check_faults(&self, open: &OpenBatch) -> Result<(), AlgorithmHostError> {
        let excluded: u64 = open.excluded.values().map(|(count, _)| count).sum();
        if excluded as f64 <= self.rollout.fault_share_max * open.size as f64 {
            return Ok(());
        }
        let most = open.excluded.iter().max_by_key(|(_, (count, _))| *count);
        let most_frequent = most.map_or_else(String::new, |(kind, (_, detail))| format!("{kind}: {detail}"));
        Err(AlgorithmHostError::TooManyFaults { excluded, total: open.size, most_frequent })
    }

    /// Joins the entries of a batch by sequence and makes training rows of them.
    fn rows(&self, batch: &[BatchEntry]) -> Result<Vec<TrainingRow>, AlgorithmHostError> {
        let state = self.state();
        let mut sequences: BTreeMap<&str, Vec<(Arc<Transition>, BatchEntry)>> = BTreeMap::new();
        for entry in batch {
            if state.estimates.contains(&entry.transition) {
                let problem = format!("transition `{}` is of a rollout that is never trained on", entry.transition);
                return Err(AlgorithmHostError::InvalidArgument(problem));
            }
            let held = state.transitions.get(&entry.transition).ok_or_else(|| AlgorithmHostError::Unknown {
                kind: "transition of this step",
                id: entry.transition.to_string(),
            })?;
            if let Some(reason) = &held.transition.not_trainable {
                let problem = format!("transition `{}` cannot be trained on: {reason:?}", entry.transition);
                return Err(AlgorithmHostError::InvalidArgument(problem));
            }
            sequences.entry(&held.sequence).or_default().push((Arc::clone(&held.transition), entry.clone()));
        }
        let sequences: Vec<Sequence> = sequences.into_values().map(|entries| Sequence { entries }).collect();
        fulgurite_adapter::rows(&sequences, self.engine.context_tokens_max())
            .map_err(|error| AlgorithmHostError::InvalidArgument(error.to_string()))
    }

    /// One row per transition, whole, with unit weights: for verbs that speak of transitions, not of losses.
    fn row_of(&self, id: &TransitionId) -> Result<(TrainingRow, usize), AlgorithmHostError> {
        let entry = BatchEntry {
            transition: id.clone(),
            stream: Stream::Rl,
            scope: Scope::Sampled,
            weights: Weights::Scalar(1.0),
            group: None,
        };
        let mut rows = self.rows(std::slice::from_ref(&entry))?;
        let row = rows.pop().ok_or_else(|| AlgorithmHostError::Failed("a transition gave no row".to_owned()))?;
        let sampled = row.mask.iter().filter(|sampled| **sampled).count();
        Ok((row, sampled))
    }
}

/// What a plugin asks for, with what the run's config says where the plugin leaves the default.
fn merge(config: &Sampling, asked: &Sampling) -> Sampling {
    let max_tokens = if asked.max_tokens == 0 { config.max_tokens } else { asked.max_tokens };
    Sampling { max_tokens, ..asked.clone() }
}

fn transition_view(transition: &Transition) -> TransitionView {
    let count = |tokens: usize| u32::try_from(tokens).unwrap_or(u32::MAX);
    TransitionView {
        id: transition.id.clone(),
        call_index: transition.call_index,
        event: transition.event,
        agent_role: transition.agent_role.clone(),
        prompt_tokens: count(transition.prompt_tokens()),
        completion_tokens: count(transition.sampled_tokens()),
        trainable: transition.not_trainable.is_none(),
        log_prob_sum: transition.log_prob_sum(),
        policy_version: transition.policy_version(),
        rewards: transition.rewards.clone(),
        text: transition.text.clone(),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function of map_err")]
fn engine_error(error: PolicyError) -> AlgorithmHostError {
    let text = error.to_string();
    match error {
        PolicyError::Unsupported(_) => AlgorithmHostError::Unsupported(text),
        PolicyError::InvalidBatch(_)
        | PolicyError::DemonstrationTooLong { .. }
        | PolicyError::UnknownSnapshot(_)
        | PolicyError::NoGradient => AlgorithmHostError::InvalidArgument(text),
        _ => AlgorithmHostError::Failed(text),
    }
}

fn runner_error(error: impl std::fmt::Display) -> AlgorithmHostError {
    AlgorithmHostError::Failed(error.to_string())
}

impl AlgorithmHost for StageHost {
    fn next_items(&self, split: Split, count: u32) -> Verb<'_, Vec<Item>> {
        Box::pin(std::future::ready(self.items(split, count)))
    }

    fn enqueue(&self, groups: Vec<GroupSpec>) -> Verb<'_, u64> {
        Box::pin(async move {
            let (jobs, places) = self.jobs(&groups)?;
            let size = jobs.len() as u64;
            let batch = self.runner.submit(jobs, self.engine.backend()).await.map_err(runner_error)?;
            let number = {
                let mut state = self.state();
                state.batches += 1;
                state.batches
            };
            let open = OpenBatch { batch, size, groups: places, excluded: BTreeMap::new() };
            self.batches.lock().await.insert(number, open);
            Ok(number)
        })
    }

    fn await_batch(&self, batch: u64, wait: WaitFor, deadline_ms: Option<u64>) -> Verb<'_, Vec<TrajectoryView>> {
        Box::pin(async move {
            let unknown = || AlgorithmHostError::Unknown { kind: "batch", id: batch.to_string() };
            let mut batches = self.batches.lock().await;
            let open = batches.get_mut(&batch).ok_or_else(unknown)?;
            let wanted = match wait {
                WaitFor::All => open.batch.outstanding(),
                WaitFor::Count(count) => (count as usize).min(open.batch.outstanding()),
            };
            let mut stop = self.stop.clone();
            let until = deadline_ms.map(|ms| tokio::time::Instant::now() + std::time::Duration::from_millis(ms));
            let mut ended = vec![];
            while ended.len() < wanted {
                let passed = async {
                    match until {
                        Some(until) => tokio::time::sleep_until(until).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    next = open.batch.next() => match next {
                        Some(next) => ended.push(next.map_err(runner_error)?),
                        None => break,
                    },
                    _ = stop.wait_for(|stop| *stop) => return Err(AlgorithmHostError::Stopping),
                    () = passed => break,
                }
            }
            ended.sort_by_key(|(place, _)| *place);
            let views = self.view(open, ended);
            self.check_faults(open)?;
            if open.batch.outstanding() == 0 {
                batches.remove(&batch);
            }
            Ok(views)
        })
    }

    fn cancel_batch(&self, batch: u64) -> Verb<'_, ()> {
        Box::pin(async move {
            if let Some(open) = self.batches.lock().await.get(&batch) {
                open.batch.cancel();
            }
            Ok(())
        })
    }

    fn import(&self, messages: Vec<Message>, roles: Vec<String>, metadata: String) -> Verb<'_, TransitionView> {
        let import = || {
            self.check_stop()?;
            let roles = roles.iter().map(|role| role_of(role)).collect::<Result<Vec<_>, _>>()?;
            serde_json::from_str::<serde_json::Value>(&metadata)
                .map_err(|error| AlgorithmHostError::InvalidArgument(format!("metadata is not JSON: {error}")))?;
            let encoded = self.engine.encode_demonstration(&messages, &roles).map_err(engine_error)?;
            let mut state = self.state();
            let id = TransitionId(format!("demonstration/{}/{}", state.step, state.imported));
            state.imported += 1;
            let text = messages.iter().rfind(|m| m.role == Role::Assistant).map(|m| m.content.clone());
            let transition = Transition::demonstration(
                id.clone(),
                encoded.ids,
                encoded.mask,
                text.unwrap_or_default(),
                metadata.clone(),
            );
            let transition = Arc::new(transition);
            let view = transition_view(&transition);
            state.transitions.insert(id.clone(), Held { transition, sequence: id.0 });
            Ok(view)
        };
        let imported = import();
        Box::pin(std::future::ready(imported))
    }

    fn forward_backward(
        &self,
        model: ModelReference,
        batch: Vec<BatchEntry>,
        loss: LossSpec,
    ) -> Verb<'_, ForwardBackwardReport> {
        Box::pin(async move {
            self.check_stop()?;
            Self::only_policy(&model)?;
            let rows = self.rows(&batch)?;
            let report = self.engine.forward_backward(rows, loss).await.map_err(engine_error)?;
            self.state().totals.tokens += report.total_tokens;
            Ok(report)
        })
    }

    fn forward(&self, model: ModelReference, transitions: Vec<TransitionId>) -> Verb<'_, Vec<TransitionForward>> {
        Box::pin(async move {
            self.check_stop()?;
            let snapshot = match model {
                ModelReference::Policy => None,
                ModelReference::Snapshot(name) => Some(name),
                ModelReference::Named(name) => {
                    return Err(AlgorithmHostError::Unsupported(format!("named model `{name}`")));
                }
            };
            let rows: Vec<_> = transitions.iter().map(|id| self.row_of(id)).collect::<Result<_, _>>()?;
            let (rows, _): (Vec<_>, Vec<usize>) = rows.into_iter().unzip();
            let masks: Vec<Vec<bool>> = rows.iter().map(|row| row.mask.clone()).collect();
            let results = self.engine.forward(rows, snapshot).await.map_err(engine_error)?;
            let sampled = |values: &[f32], mask: &[bool]| -> Vec<f32> {
                values.iter().zip(mask).filter(|(_, sampled)| **sampled).map(|(value, _)| *value).collect()
            };
            let views =
                transitions.into_iter().zip(results).zip(masks).map(|((transition, result), mask)| TransitionForward {
                    transition,
                    log_probs: sampled(&result.log_probs, &mask),
                    entropies: sampled(&result.entropies, &mask),
                    values: vec![],
                });
            Ok(views.collect())
        })
    }

    fn backward(&self, model: ModelReference, gradients: Vec<TransitionGradient>) -> Verb<'_, ()> {
        Box::pin(async move {
            self.check_stop()?;
            Self::only_policy(&model)?;
            let (mut rows, mut derivatives) = (vec![], vec![]);
            for gradient in gradients {
                if !gradient.d_values.is_empty() {
                    return Err(AlgorithmHostError::Unsupported("a value head".to_owned()));
                }
                let (row, sampled) = self.row_of(&gradient.transition)?;
                if gradient.d_log_probs.len() != sampled {
                    let (given, id) = (gradient.d_log_probs.len(), &gradient.transition);
                    let problem = format!("`{id}` has {sampled} sampled tokens and {given} derivatives");
                    return Err(AlgorithmHostError::InvalidArgument(problem));
                }
                let mut given = gradient.d_log_probs.into_iter();
                let spread = row.mask.iter().map(|m| if *m { given.next().unwrap_or_default() } else { 0.0 }).collect();
                rows.push(row);
                derivatives.push(spread);
            }
            self.engine.backward(rows, derivatives).await.map_err(engine_error)
        })
    }

    fn optimiser_step(&self, model: ModelReference, step: OptimiserStep) -> Verb<'_, OptimiserReport> {
        Box::pin(async move {
            self.check_stop()?;
            Self::only_policy(&model)?;
            self.engine.optimiser_step(step).await.map_err(engine_error)
        })
    }

    fn snapshot(&self, model: ModelReference) -> Verb<'_, String> {
        Box::pin(async move {
            Self::only_policy(&model)?;
            let name = {
                let mut state = self.state();
                state.snapshots += 1;
                format!("snapshot-{}", state.snapshots)
            };
            self.engine.snapshot(&name).await.map_err(engine_error)?;
            Ok(name)
        })
    }

    fn freeze_reference(&self) -> Verb<'_, ()> {
        Box::pin(async move { self.engine.snapshot(REFERENCE).await.map_err(engine_error) })
    }

    fn sample(&self, _model: ModelReference, _messages: Vec<Message>, _sampling: Sampling) -> Verb<'_, TransitionView> {
        Box::pin(std::future::ready(Err(AlgorithmHostError::Unsupported("sample".to_owned()))))
    }

    fn template(&self, name: String, version: Option<u64>) -> Verb<'_, (u64, String)> {
        Box::pin(async move {
            let found = self.runner.store().template(&name, version).map_err(runner_error)?;
            let template = found.ok_or(AlgorithmHostError::Unknown { kind: "template", id: name })?;
            Ok((template.version, template.text))
        })
    }

    fn publish_template(&self, _name: String, _text: String) -> Verb<'_, u64> {
        Box::pin(std::future::ready(Err(AlgorithmHostError::Unsupported("publishing templates".to_owned()))))
    }

    fn scalar(&self, name: String, value: f64) -> Verb<'_, ()> {
        let record = || {
            metrics::check(&name, value).map_err(AlgorithmHostError::InvalidArgument)?;
            let mut state = self.state();
            if state.scalars.len() >= SCALARS_MAX && !state.scalars.contains_key(&name) {
                return Err(AlgorithmHostError::InvalidArgument(format!("a step may record {SCALARS_MAX} scalars")));
            }
            state.scalars.insert(name, value);
            Ok(())
        };
        let recorded = record();
        Box::pin(std::future::ready(recorded))
    }

    fn note(&self, text: String) -> Verb<'_, ()> {
        let mut state = self.state();
        let result = if text.len() > NOTE_BYTES_MAX || state.notes.len() >= NOTES_MAX {
            let problem = format!("a step may note {NOTES_MAX} texts of {NOTE_BYTES_MAX} bytes");
            Err(AlgorithmHostError::InvalidArgument(problem))
        } else {
            state.notes.push(text);
            Ok(())
        };
        Box::pin(std::future::ready(result))
    }
}

fn role_of(name: &str) -> Result<Role, AlgorithmHostError> {
    [Role::System, Role::User, Role::Assistant, Role::Tool]
        .into_iter()
        .find(|role| role.as_str() == name)
        .ok_or_else(|| AlgorithmHostError::InvalidArgument(format!("there is no role `{name}`")))
}

impl std::fmt::Debug for StageHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StageHost").field("stage", &self.stage.name).finish_non_exhaustive()
    }
}
