//! The host's side of the algorithm world, for one stage: training verbs, demonstrations and metrics. Items and rollouts are in
//! [`rollouts`].

mod batch;
mod mismatch;
mod monitor;
mod noted;
mod rollouts;
mod views;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fulgurite_adapter::{Pool, RewardAttachment, Transition};
use fulgurite_core::algorithm::{
    AlgorithmHost, AlgorithmHostError, BatchEntry, GroupSpec, Item, ModelReference, TrajectoryView, TransitionForward,
    TransitionGradient, TransitionView, Verb, WaitFor,
};
use fulgurite_core::dataset::Split;
use fulgurite_core::id::{PolicyVersion, TransitionId};
use fulgurite_core::llm::{LlmBackend, Message, Role, Sampling};
use fulgurite_core::seed::Seed;
use fulgurite_core::training::{
    ForwardBackwardReport, LossSpec, OptimiserReport, OptimiserStep, PolicyLoss, RatioLevel, RowDerivatives, Stream,
    TrainingRow,
};
use fulgurite_policy::PolicyEngine;
use fulgurite_runner::Runner;
use tokio::sync::watch;

use crate::checkpoint::{Progress, Totals};
use crate::config::{ExperimentConfig, RolloutConfig, RunConfig, StageConfig};
use crate::dataset::{Cursor, Dataset};
use crate::error::TrainError;
use crate::metrics;
use crate::setup::Model;
use crate::trail::{DEMONSTRATION, StepTrail, TrailKeeper};

pub(crate) use batch::CarriedBatch;
use batch::{Carried, OpenBatch};
use mismatch::drawn;
use monitor::Monitor;
pub(crate) use noted::dimension_of;
use views::{engine_error, role_of, runner_error, sampled, spread, transition_view, versions};

/// Notes of one step. 64: a note is for people.
const NOTES_MAX: usize = 64;
/// Bytes of one note. 1 KiB.
const NOTE_BYTES_MAX: usize = 1_024;
/// Scalars of one step. 256.
const SCALARS_MAX: usize = 256;

/// Name of the snapshot that the KL term is taken against.
const REFERENCE: &str = "reference";
/// Name of the value model.
const CRITIC: &str = "critic";

/// What a stage is made of.
pub(crate) struct StageHost {
    pub(crate) runner: Runner,
    pub(crate) engine: PolicyEngine,
    /// What answers rollouts.
    pub(crate) model: Model,
    pub(crate) dataset: Arc<Dataset>,
    pub(crate) stage: StageConfig,
    pub(crate) rollout: RolloutConfig,
    pub(crate) experiment: ExperimentConfig,
    pub(crate) attach: RewardAttachment,
    pub(crate) resources_version: u64,
    pub(crate) seed: Seed,
    pub(crate) stop: watch::Receiver<bool>,
    state: Mutex<StageState>,
    /// Batches of the step, by number.
    batches: tokio::sync::Mutex<BTreeMap<u64, OpenBatch>>,
    /// Batches of earlier steps that no step has asked for since.
    carried: tokio::sync::Mutex<Vec<Carried>>,
    /// Of something that no plugin can mend.
    failure: Mutex<Option<TrainError>>,
}

/// What a step leaves behind.
#[derive(Debug)]
pub(crate) struct EndedStep {
    pub(crate) scalars: BTreeMap<String, f64>,
    pub(crate) notes: Vec<String>,
    /// What it and those before it have carried over.
    pub(crate) carried: Vec<CarriedBatch>,
    /// Whether it would do the same again. One that went by which rollouts came first would not, and then later steps
    /// would find rollouts under their ids that other weights drew: it is committed at once.
    pub(crate) repeats: bool,
    /// What it was given and trained on; `None` when that is not kept.
    pub(crate) trail: Option<StepTrail>,
}

/// What changes while a stage runs.
#[derive(Debug)]
pub(crate) struct StageState {
    pub(crate) step: u64,
    pub(crate) cursors: BTreeMap<String, Cursor>,
    pub(crate) totals: Totals,
    pub(crate) snapshots: u64,
    pub(crate) scalars: BTreeMap<String, f64>,
    pub(crate) notes: Vec<String>,
    monitor: Monitor,
    trail: TrailKeeper,
    /// The weights that the step began with, by the name of the model; those of the policy have none.
    begun_with: BTreeMap<Option<String>, PolicyVersion>,
    /// Rollouts enqueued by the step so far: the index in the next id.
    enqueued: u64,
    /// Demonstrations imported by the step so far.
    imported: u64,
    /// Batches opened by the stage so far.
    batches: u64,
    /// Transitions that the step may train on, with its anchors. A step is a transaction: the next one starts empty.
    transitions: Pool,
    /// Transitions of the step that were made to choose or to estimate.
    estimates: BTreeSet<TransitionId>,
    /// Whether what the step does depends on which rollouts end first.
    depends_on_arrival: bool,
}

impl StageState {
    /// Where a checkpoint stands, at the start of its next step.
    pub(crate) fn resumed(progress: &Progress, config: &RunConfig) -> Self {
        Self {
            step: progress.step,
            cursors: progress.cursors.clone(),
            totals: progress.totals,
            snapshots: progress.snapshots,
            scalars: BTreeMap::new(),
            notes: vec![],
            monitor: Monitor::default(),
            trail: TrailKeeper::new(&config.explain),
            begun_with: BTreeMap::new(),
            enqueued: 0,
            imported: 0,
            batches: 0,
            transitions: Pool::default(),
            estimates: BTreeSet::new(),
            depends_on_arrival: false,
        }
    }

    /// What is run to choose or to estimate is never trained on.
    fn check_trained_on(&self, id: &TransitionId) -> Result<(), AlgorithmHostError> {
        if self.estimates.contains(id) {
            let problem = format!("transition `{id}` is of a rollout that is never trained on");
            return Err(AlgorithmHostError::InvalidArgument(problem));
        }
        Ok(())
    }
}

/// A model that can be trained.
enum Trained {
    /// The policy, or one beside it.
    Policy(PolicyEngine),
    /// The engine's critic.
    Critic,
}

impl StageHost {
    #[expect(clippy::too_many_arguments, reason = "the pieces of a stage, each used as it is")]
    pub(crate) fn new(
        runner: Runner,
        engine: PolicyEngine,
        model: Model,
        dataset: Arc<Dataset>,
        stage: StageConfig,
        config: &RunConfig,
        resources_version: u64,
        seed: Seed,
        stop: watch::Receiver<bool>,
        mut state: StageState,
        carried: Vec<CarriedBatch>,
    ) -> Self {
        state.begun_with = versions(&engine);
        let (state, batches) = (Mutex::new(state), tokio::sync::Mutex::default());
        let carried = tokio::sync::Mutex::new(carried.into_iter().map(Carried::Recorded).collect());
        Self {
            runner,
            engine,
            model,
            dataset,
            stage,
            rollout: config.rollout.clone(),
            experiment: config.experiment.clone(),
            attach: config.reward.attach.clone(),
            resources_version,
            seed,
            stop,
            state,
            batches,
            carried,
            failure: Mutex::default(),
        }
    }

    /// What answers rollouts, with the newest weights.
    async fn backend(&self) -> Result<Arc<dyn LlmBackend>, AlgorithmHostError> {
        self.model.backend().await.map_err(|error| {
            let told = AlgorithmHostError::Failed(error.to_string());
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            told
        })
    }

    /// Why the run cannot go on, whatever its plugin makes of it.
    pub(crate) fn take_failure(&self) -> Option<TrainError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, StageState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a step: hands out what it leaves behind and forgets its transitions. What it has neither been given nor carried
    /// over is given up.
    pub(crate) async fn end_step(&self) -> EndedStep {
        let batches = std::mem::take(&mut *self.batches.lock().await);
        let left = batches.into_values().filter_map(OpenBatch::into_carried);
        let carried: Vec<CarriedBatch> = {
            let mut carried = self.carried.lock().await;
            carried.extend(left.map(|open| Carried::Running(Box::new(open))));
            carried.iter().map(Carried::record).collect()
        };
        let waiting = carried.iter().flat_map(|batch| &batch.rollouts).map(|rollout| rollout.id.clone()).collect();
        let mut state = self.state();
        state.step += 1;
        state.enqueued = 0;
        state.imported = 0;
        state.transitions.clear();
        state.estimates.clear();
        let mut scalars = std::mem::take(&mut state.scalars);
        std::mem::take(&mut state.monitor).write(self.dimension(), &mut scalars);
        let begun_with = std::mem::replace(&mut state.begun_with, versions(&self.engine));
        let begun_with = begun_with.get(&None).copied().unwrap_or_default();
        EndedStep {
            scalars,
            notes: std::mem::take(&mut state.notes),
            carried,
            repeats: !std::mem::take(&mut state.depends_on_arrival),
            trail: state.trail.end(waiting, begun_with),
        }
    }

    fn check_stop(&self) -> Result<(), AlgorithmHostError> {
        if *self.stop.borrow() { Err(AlgorithmHostError::Stopping) } else { Ok(()) }
    }

    /// The model that a verb would change.
    fn trained(&self, model: &ModelReference) -> Result<Trained, AlgorithmHostError> {
        match model {
            ModelReference::Policy => Ok(Trained::Policy(self.engine.clone())),
            ModelReference::Snapshot(name) => {
                Err(AlgorithmHostError::InvalidArgument(format!("snapshot `{name}` is frozen; train `policy`")))
            }
            ModelReference::Named(name) if name == CRITIC => Ok(Trained::Critic),
            ModelReference::Named(name) => self.engine.named(name).map(Trained::Policy).map_err(engine_error),
        }
    }

    /// The same for verbs that only a language model has.
    fn language_model(&self, model: &ModelReference, verb: &str) -> Result<PolicyEngine, AlgorithmHostError> {
        match self.trained(model)? {
            Trained::Policy(engine) => Ok(engine),
            Trained::Critic => Err(AlgorithmHostError::InvalidArgument(format!("a critic has no `{verb}`"))),
        }
    }

    /// Makes training rows of a batch for a loss of this model.
    fn rows(&self, model: &ModelReference, batch: &[BatchEntry]) -> Result<Vec<TrainingRow>, AlgorithmHostError> {
        let state = self.state();
        for entry in batch {
            state.check_trained_on(&entry.transition)?;
            state.transitions.check_model(model, &entry.transition)?;
        }
        state.transitions.rows(model, batch, self.engine.context_tokens_max())
    }

    /// One row per transition, whole, with unit weights: for verbs that speak of transitions, not of losses.
    fn row_of(&self, id: &TransitionId) -> Result<(TrainingRow, usize), AlgorithmHostError> {
        let state = self.state();
        state.check_trained_on(id)?;
        state.transitions.row_of(id, self.engine.context_tokens_max())
    }

    /// Checks that transitions are those of a model that is to be trained on them. A critic says what all of them are worth.
    fn check_model(
        &self,
        model: &ModelReference,
        trained: &Trained,
        id: &TransitionId,
    ) -> Result<(), AlgorithmHostError> {
        match trained {
            Trained::Policy(_) => self.state().transitions.check_model(model, id),
            Trained::Critic => Ok(()),
        }
    }

    /// The same for several, with the masks of their rows, which go with what is found.
    fn rows_of(&self, ids: &[TransitionId]) -> Result<(Vec<TrainingRow>, Vec<Vec<bool>>), AlgorithmHostError> {
        let rows = ids.iter().map(|id| Ok(self.row_of(id)?.0)).collect::<Result<Vec<_>, AlgorithmHostError>>()?;
        let masks = rows.iter().map(|row| row.mask.clone()).collect();
        Ok((rows, masks))
    }
}

impl AlgorithmHost for StageHost {
    fn next_items(&self, split: Split, count: u32) -> Verb<'_, Vec<Item>> {
        Box::pin(std::future::ready(self.items(split, count)))
    }

    fn enqueue(&self, groups: Vec<GroupSpec>) -> Verb<'_, u64> {
        Box::pin(self.enqueue_groups(groups))
    }

    fn await_batch(&self, batch: u64, wait: WaitFor, deadline_ms: Option<u64>) -> Verb<'_, Vec<TrajectoryView>> {
        Box::pin(self.await_rollouts(batch, wait, deadline_ms))
    }

    fn carry(&self, batch: u64, groups: Vec<u64>) -> Verb<'_, ()> {
        Box::pin(self.carry_groups(batch, groups))
    }

    fn carried(&self) -> Verb<'_, Vec<u64>> {
        Box::pin(self.carried_batches())
    }

    fn cancel_batch(&self, batch: u64) -> Verb<'_, ()> {
        Box::pin(async move {
            if let Some(open) = self.batches.lock().await.get(&batch) {
                self.state().depends_on_arrival |= open.outstanding() > 0;
                open.cancel();
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
            let id = TransitionId(format!("{DEMONSTRATION}{}/{}", state.step, state.imported));
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
            state.transitions.insert(transition, id.0);
            Ok(view)
        };
        let imported = import();
        Box::pin(std::future::ready(imported))
    }

    fn anchor(&self, model: ModelReference, transitions: Vec<TransitionId>) -> Verb<'_, ()> {
        Box::pin(async move {
            self.check_stop()?;
            let engine = self.language_model(&model, "anchor")?;
            let trained = Trained::Policy(engine.clone());
            transitions.iter().try_for_each(|id| self.check_model(&model, &trained, id))?;
            let (rows, masks) = self.rows_of(&transitions)?;
            let drawn = drawn(&rows);
            let results = engine.forward(rows, None).await.map_err(engine_error)?;
            for (((id, result), mask), drawn) in transitions.iter().zip(results).zip(masks).zip(drawn) {
                let log_probs = sampled(&result.log_probs, &mask);
                self.state().monitor.compare(&model, id, &log_probs, &drawn);
                self.state().transitions.anchor(&model, id, log_probs)?;
            }
            Ok(())
        })
    }

    fn forward_backward(
        &self,
        model: ModelReference,
        batch: Vec<BatchEntry>,
        loss: LossSpec,
    ) -> Verb<'_, ForwardBackwardReport> {
        Box::pin(async move {
            self.check_stop()?;
            let engine = self.language_model(&model, "forward-backward")?;
            let rows = self.rows(&model, &batch)?;
            let drawn = rows.iter().any(|row| row.stream == Stream::Rl);
            let used = self.note_use(&model, &engine, &batch, &loss, &rows);
            let of_sequences = loss.ratio_level != RatioLevel::Token && loss.policy_loss != PolicyLoss::Reinforce;
            let report = engine.forward_backward(rows, loss).await.map_err(engine_error)?;
            let mut state = self.state();
            state.trail.keep(used, &report);
            state.totals.tokens += report.total_tokens;
            if drawn {
                let of_gradient = batch.iter().filter(|entry| entry.stream == Stream::Rl);
                let of_gradient = of_gradient.map(|entry| &entry.transition);
                state.monitor.updated(&model, &report, of_sequences, of_gradient);
            }
            Ok(report)
        })
    }

    fn forward(&self, model: ModelReference, transitions: Vec<TransitionId>) -> Verb<'_, Vec<TransitionForward>> {
        Box::pin(async move {
            self.check_stop()?;
            let (engine, snapshot) = match &model {
                ModelReference::Snapshot(name) => (Trained::Policy(self.engine.clone()), Some(name.clone())),
                model => (self.trained(model)?, None),
            };
            let (rows, masks) = self.rows_of(&transitions)?;
            let Trained::Policy(engine) = engine else {
                let results = self.engine.values(rows).await.map_err(engine_error)?;
                let all = transitions.into_iter().zip(results).zip(masks);
                let views = all.map(|((transition, values), mask)| TransitionForward {
                    transition,
                    log_probs: vec![],
                    entropies: vec![],
                    values: sampled(&values, &mask),
                });
                return Ok(views.collect());
            };
            let (drawn, is_newest) = (drawn(&rows), snapshot.is_none());
            let trained = Trained::Policy(engine.clone());
            let results = engine.forward(rows, snapshot).await.map_err(engine_error)?;
            for (((id, result), mask), drawn) in transitions.iter().zip(&results).zip(&masks).zip(&drawn) {
                // What another model drew says nothing of this one's sampler.
                if is_newest && self.check_model(&model, &trained, id).is_ok() {
                    self.state().monitor.compare(&model, id, &sampled(&result.log_probs, mask), drawn);
                }
            }
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
            let trained = self.trained(&model)?;
            let is_critic = matches!(trained, Trained::Critic);
            let version = match &trained {
                Trained::Policy(engine) => engine.version(),
                Trained::Critic => self.engine.version(),
            };
            let used = self.state().trail.of_gradients(&model, version, &gradients);
            let (mut rows, mut derivatives, mut d_values) = (vec![], vec![], vec![]);
            for gradient in gradients {
                let (row, sampled) = self.row_of(&gradient.transition)?;
                let id = &gradient.transition;
                self.check_model(&model, &trained, id)?;
                let of_tokens = !gradient.d_log_probs.is_empty() || !gradient.d_entropies.is_empty();
                if (is_critic && of_tokens) || !(is_critic || gradient.d_values.is_empty()) {
                    let has = if is_critic { "values only" } else { "log-probs and entropies only" };
                    return Err(AlgorithmHostError::InvalidArgument(format!("`{id}`: that model has {has}")));
                }
                let spread = |given: Vec<f32>| spread(id, given, &row.mask, sampled);
                derivatives.push(RowDerivatives {
                    log_probs: spread(gradient.d_log_probs)?,
                    entropies: spread(gradient.d_entropies)?,
                });
                d_values.push(spread(gradient.d_values)?);
                rows.push(row);
            }
            match trained {
                Trained::Policy(engine) => engine.backward(rows, derivatives).await,
                Trained::Critic => self.engine.values_backward(rows, d_values).await,
            }
            .map_err(engine_error)?;
            self.state().trail.keep(used, &());
            Ok(())
        })
    }

    fn optimiser_step(&self, model: ModelReference, step: OptimiserStep) -> Verb<'_, OptimiserReport> {
        Box::pin(async move {
            self.check_stop()?;
            let report = match self.trained(&model)? {
                Trained::Policy(engine) => engine.optimiser_step(step.clone()).await,
                Trained::Critic => self.engine.critic_step(step.clone()).await,
            }
            .map_err(engine_error)?;
            let mut state = self.state();
            state.trail.stepped(&model, &step, &report);
            state.monitor.stepped(&model, &report);
            Ok(report)
        })
    }

    fn snapshot(&self, model: ModelReference) -> Verb<'_, String> {
        Box::pin(async move {
            let engine = self.language_model(&model, "snapshot")?;
            let name = {
                let mut state = self.state();
                state.snapshots += 1;
                format!("snapshot-{}", state.snapshots)
            };
            engine.snapshot(&name).await.map_err(engine_error)?;
            // Snapshots of models beside the policy are told apart by their names.
            Ok(if let ModelReference::Named(model) = model { format!("{model}/{name}") } else { name })
        })
    }

    fn freeze_reference(&self) -> Verb<'_, ()> {
        Box::pin(async move {
            for model in self.engine.all() {
                model.snapshot(REFERENCE).await.map_err(engine_error)?;
            }
            Ok(())
        })
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

impl std::fmt::Debug for StageHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StageHost").field("stage", &self.stage.name).finish_non_exhaustive()
    }
}
