//! Forward and backward over a whole optimiser batch.
//!
//! Rows are sorted by length, cut into micro-batches by token budget and dealt to a fixed number of shards. Worker threads
//! take shards as they get free; each adds its micro-batches in order, and shards are added in order, so the number of
//! threads changes no bit. Inside a worker there is one thread: small models do not scale over threads inside an operation.
//!
//! Two implementations of the model stand behind it, chosen by the device at run time: the sampler's own kernels (`cpu`) and
//! burn with its autodiff (`flex`, burn's CPU backend, and the way that GPU backends take). Loss and derivatives with respect
//! to logits are computed here for both.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use fulgurite_core::training::{ForwardBackwardReport, RowDerivatives, RowLogProbs, Stream, TrainingRow};

use crate::compute::{Asked, Bounds, Compute, Models, PackedModels, Sources, Workspace, narrow};
use crate::config::PolicyConfig;
use crate::device::Backend;
use crate::error::PolicyError;
use crate::loss::{self, BatchLoss, Seen, Slopes};
use crate::model::DeviceModels;
use crate::parallel;
use crate::parameters::{Parameters, Values};
use crate::rotary::RotaryTable;
use crate::shape::ModelShape;
use crate::split::{MicroBatch, plan};
use crate::sums::Sums;
use crate::support::Support;
use crate::weights::ModelWeights;

/// What to compute for a batch.
#[derive(Debug, Clone)]
pub(crate) enum Objective {
    /// Gradient and report of a loss.
    Loss {
        /// The loss, made of the whole batch.
        loss: Box<BatchLoss>,
        /// ModelWeights of the KL term's reference.
        reference: Option<ModelWeights>,
    },
    /// Gradient for given derivatives of a loss, per row.
    Derivatives(Vec<RowDerivatives>),
    /// Log-probs and entropies only.
    Forward,
    /// A critic's values only.
    Values,
    /// Gradient of a critic for given derivatives with respect to its values, one list per row with an entry per id.
    ValueDerivatives(Vec<Vec<f32>>),
}

/// What came out.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// `None` for [`Objective::Forward`] and [`Objective::Values`].
    pub(crate) gradient: Option<Values>,
    pub(crate) report: ForwardBackwardReport,
    /// One per row, in the order given; empty but for [`Objective::Forward`].
    pub(crate) log_probs: Vec<RowLogProbs>,
    /// One list per row with an entry per id; empty but for [`Objective::Values`].
    pub(crate) values: Vec<Vec<f32>>,
}

/// Runs batches on its worker threads.
#[derive(Debug)]
pub(crate) struct BatchRunner {
    /// Pools of one thread each: inside it, burn's and gemm's parallel loops see one thread and stay on it.
    workers: Vec<rayon::ThreadPool>,
    shards: usize,
    micro_batch_tokens_max: usize,
    logits_bytes_max: usize,
    recompute: bool,
    rotary: Arc<RotaryTable>,
    /// `None` on the kernels.
    device: Option<Arc<DeviceModels>>,
    memory: Arc<Memory>,
}

/// Activations and gradients of workers, kept between batches: fresh pages cost as much as the arithmetic in them.
#[derive(Debug, Default)]
struct Memory {
    workspaces: Mutex<Vec<Workspace>>,
    gradients: Mutex<Vec<Values>>,
}

fn take<T>(pool: &Mutex<Vec<T>>) -> Option<T> {
    pool.lock().unwrap_or_else(PoisonError::into_inner).pop()
}

fn give_back<T>(pool: &Mutex<Vec<T>>, one: T) {
    pool.lock().unwrap_or_else(PoisonError::into_inner).push(one);
}

impl Memory {
    /// Zeros in the shape of the weights.
    fn zeros(&self, parameters: &Parameters) -> Values {
        let has_layout = |kept: &Values| {
            kept.len() == parameters.values.len()
                && kept.iter().zip(&parameters.values).all(|(kept, values)| kept.len() == values.len())
        };
        // Several models are trained in turn: policy, adapters, critic.
        let kept = {
            let mut all = self.gradients.lock().unwrap_or_else(PoisonError::into_inner);
            all.iter().position(has_layout).map(|at| all.swap_remove(at))
        };
        let Some(mut gradient) = kept else { return parameters.zeros() };
        for values in &mut gradient {
            values.fill(0.0);
        }
        gradient
    }
}

struct Job {
    weights: ModelWeights,
    rows: Vec<TrainingRow>,
    objective: Objective,
    shards: Vec<Vec<MicroBatch>>,
    next_shard: AtomicUsize,
    results: Mutex<Vec<Option<ShardResult>>>,
    rotary: Arc<RotaryTable>,
    models: Models,
    bounds: Bounds,
    memory: Arc<Memory>,
}

#[derive(Default)]
struct ShardResult {
    gradient: Option<Values>,
    sums: Sums,
    log_probs: Vec<(usize, RowLogProbs)>,
    values: Vec<(Target, f32)>,
}

fn invalid(text: impl Into<String>) -> PolicyError {
    PolicyError::InvalidBatch(text.into())
}

/// Checks rows against the model and themselves: they carry numbers from plugins.
pub(crate) fn check_rows(shape: &ModelShape, rows: &[TrainingRow]) -> Result<(), PolicyError> {
    check_rows_within(shape.context_tokens_max, shape.vocabulary, rows)
}

/// The same for whatever has so many ids and takes rows of so many.
pub(crate) fn check_rows_within(
    context_tokens_max: usize,
    vocabulary: usize,
    rows: &[TrainingRow],
) -> Result<(), PolicyError> {
    for (index, row) in rows.iter().enumerate() {
        let refuse = |what: &str| Err(invalid(format!("row {index}: {what}")));
        let len = row.ids.len();
        if len == 0 || len > context_tokens_max {
            return refuse(&format!("{len} tokens, where 1 to {context_tokens_max} fit the context"));
        }
        let lists = [row.mask.len(), row.weights.len(), row.behaviour_log_probs.len()];
        if lists != [len; 3] || !(row.old_log_probs.is_empty() || row.old_log_probs.len() == len) {
            return refuse("mask, weights and log-probs must have one entry per id");
        }
        if !(row.calls.is_empty() || row.calls.len() == len) {
            return refuse("calls must be empty or have one entry per id");
        }
        if row.ids.iter().any(|id| *id as usize >= vocabulary) {
            return refuse("an id is outside the vocabulary");
        }
        if !(row.temperature.is_finite() && row.temperature >= 0.0) {
            return refuse("the temperature must be finite and not negative");
        }
        if !row.kept.is_empty() && (row.kept.len() != len || !row.kept.is_sound()) {
            return refuse("the kept tokens must be ascending ids for each id of the row");
        }
        for (at, id) in row.ids.iter().enumerate() {
            let Some(kept) = row.kept.at(at) else { continue };
            if kept.last().is_some_and(|last| *last as usize >= vocabulary) || kept.binary_search(id).is_err() {
                return refuse("a token is not among those that were kept, or one of these is outside the vocabulary");
            }
        }
        if row.stream == Stream::RefKl {
            return Err(PolicyError::Unsupported("the stream `ref_kl`".to_owned()));
        }
        for at in loss::trained(row) {
            if !row.weights.get(at).is_some_and(|weight| weight.is_finite()) {
                return refuse("a weight is not finite");
            }
            // Minus infinity is what an engine reports for a token that it thought impossible; the loss can bear it.
            let lists = [&row.behaviour_log_probs, &row.old_log_probs];
            if lists.iter().filter_map(|list| list.get(at)).any(|value| value.is_nan() || *value == f32::INFINITY) {
                return refuse("a log-prob is not a number below infinity");
            }
        }
    }
    Ok(())
}

/// Checks a caller's derivatives: for every row lists that are empty or have a finite number per id.
pub(crate) fn check_derivatives<'a, const N: usize>(
    rows: &[TrainingRow],
    derivatives: impl ExactSizeIterator<Item = [&'a [f32]; N]>,
) -> Result<(), PolicyError> {
    let fits = derivatives.len() == rows.len();
    for (row, list) in rows.iter().zip(derivatives).flat_map(|(row, lists)| lists.map(|list| (row, list))) {
        if !(list.is_empty() || list.len() == row.ids.len()) {
            return Err(invalid("there must be one derivative per id of every row"));
        }
        if list.iter().any(|derivative| !derivative.is_finite()) {
            return Err(invalid("a derivative is not finite"));
        }
    }
    if fits { Ok(()) } else { Err(invalid("there must be derivatives for every row")) }
}

impl BatchRunner {
    /// Starts the workers.
    pub(crate) fn new(config: &PolicyConfig, rotary: Arc<RotaryTable>) -> Result<Self, PolicyError> {
        let backend = config.device.open()?;
        backend.check_precision(config.device, config.device_precision)?;
        let asked = [
            ("models", !config.models.is_empty()),
            ("critic", config.critic.is_some()),
            ("gradient_checkpointing", config.gradient_checkpointing),
        ];
        if let (Backend::Burn(_), Some((field, _))) = (&backend, asked.into_iter().find(|(_, asked)| *asked)) {
            let value = format!("asked for on device `{}`", config.device);
            let reason = "only device `cpu` offers it: use that, or leave the field out".to_owned();
            return Err(PolicyError::InvalidConfig { field, value, reason });
        }
        let threads = if backend.is_shared() { 1 } else { config.thread_count() };
        let workers = (0..threads.min(config.gradient_shards))
            .map(|index| {
                rayon::ThreadPoolBuilder::new()
                    .num_threads(1)
                    .thread_name(move |_| format!("policy-train-{index}"))
                    .build()
                    .map_err(|error| PolicyError::Internal(error.to_string()))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            workers,
            shards: config.gradient_shards,
            micro_batch_tokens_max: config.micro_batch_tokens_max,
            logits_bytes_max: config.logits_bytes_max,
            recompute: config.gradient_checkpointing,
            rotary,
            device: backend.models(config.device_precision).map(Arc::new),
            memory: Arc::default(),
        })
    }

    /// The device's copies of weights; `None` on the kernels.
    pub(crate) fn device(&self) -> Option<&Arc<DeviceModels>> {
        self.device.as_ref()
    }

    /// Runs a checked batch.
    pub(crate) fn run(
        &self,
        weights: impl Into<ModelWeights>,
        rows: Vec<TrainingRow>,
        objective: Objective,
    ) -> Result<Outcome, PolicyError> {
        let weights = weights.into();
        let total_tokens = rows.iter().map(|row| row.ids.len() as u64).sum();
        let tracked = objective.is_tracked();
        let mut outcome = Outcome::default();
        let zeros = |row: &TrainingRow| vec![0.0; row.ids.len()];
        match objective {
            Objective::Forward => {
                let empty = |row: &TrainingRow| RowLogProbs { log_probs: zeros(row), entropies: zeros(row) };
                outcome.log_probs = rows.iter().map(empty).collect();
            }
            Objective::Values => outcome.values = rows.iter().map(zeros).collect(),
            _ => {}
        }
        let shards = plan(&rows, self.shards, self.micro_batch_tokens_max, self.device.is_some());
        let results = Mutex::new(shards.iter().map(|_| None).collect());
        let rotary = self.rotary.clone();
        let models = match &self.device {
            None => {
                let reference = objective.reference();
                Models::Packed(Box::new(PackedModels::new(&weights, reference, tracked, &rotary, self.threads())))
            }
            Some(models) => {
                let reference = objective.reference().map(|reference| models.get(reference));
                Models::Device(models.get(&weights), reference)
            }
        };
        let logits_tokens_max = self.logits_bytes_max / (size_of::<f32>() * weights.shape().vocabulary);
        let bounds = Bounds { recompute: self.recompute, logits_tokens_max: logits_tokens_max.max(1) };
        let (next_shard, memory) = (AtomicUsize::new(0), self.memory.clone());
        let job =
            Arc::new(Job { weights, rows, objective, shards, next_shard, results, rotary, models, bounds, memory });

        let (done, finished) = mpsc::sync_channel(self.workers.len());
        for worker in &self.workers {
            let (job, done) = (job.clone(), done.clone());
            worker.spawn(move || {
                // burn reports its failures by panicking; a panic that left this closure would abort the process.
                let result = catch_unwind(AssertUnwindSafe(|| job.work()));
                // The receiver waits for every worker.
                drop(done.send(result.unwrap_or_else(|panic| Err(PolicyError::Internal(panic_text(&*panic))))));
            });
        }
        drop(done);
        for result in finished {
            result?;
        }

        let mut sums = Sums::default();
        let mut gradients = Vec::new();
        let results = std::mem::take(&mut *job.results.lock().unwrap_or_else(PoisonError::into_inner));
        for result in results {
            let result = result.ok_or_else(|| PolicyError::Internal("a shard has no result".to_owned()))?;
            sums.add(&result.sums);
            gradients.extend(result.gradient);
            for (row, log_probs) in result.log_probs {
                if let Some(slot) = outcome.log_probs.get_mut(row) {
                    *slot = log_probs;
                }
            }
            for (target, value) in result.values {
                if let Some(slot) = outcome.values.get_mut(target.row).and_then(|row| row.get_mut(target.at)) {
                    *slot = value;
                }
            }
        }
        if tracked {
            let mut gradients = gradients.into_iter();
            // No row may have a trained token.
            let mut total = gradients.next().unwrap_or_else(|| job.weights.trained().zeros());
            let parts: Vec<Values> = gradients.collect();
            parallel::add(self.threads(), &mut total, &parts);
            for part in parts {
                self.recycle(part);
            }
            outcome.gradient = Some(total);
        }
        outcome.report = sums.report(total_tokens);
        Ok(outcome)
    }

    /// Threads of what is done between batches: as many as workers.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len()
    }

    /// Takes back a gradient that is no longer needed, for its memory.
    pub(crate) fn recycle(&self, gradient: Values) {
        give_back(&self.memory.gradients, gradient);
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("a training worker panicked: {}", text.unwrap_or("no message"))
}

impl Objective {
    fn reference(&self) -> Option<&ModelWeights> {
        match self {
            Self::Loss { reference, .. } => reference.as_ref(),
            _ => None,
        }
    }

    /// Whether a gradient is asked for.
    fn is_tracked(&self) -> bool {
        !matches!(self, Self::Forward | Self::Values)
    }
}

/// A trained token of a micro-batch.
#[derive(Debug, Clone, Copy)]
struct Target {
    row: usize,
    at: usize,
}

impl Job {
    /// Takes shards until none is left.
    fn work(&self) -> Result<(), PolicyError> {
        let mut compute = self.compute();
        loop {
            let index = self.next_shard.fetch_add(1, Ordering::Relaxed);
            let Some(shard) = self.shards.get(index) else { break };
            let mut result = ShardResult::default();
            for batch in shard {
                self.micro_batch(batch, &mut compute, &mut result)?;
            }
            compute.collect(result.gradient.as_mut())?;
            if let Some(slot) = self.results.lock().unwrap_or_else(PoisonError::into_inner).get_mut(index) {
                *slot = Some(result);
            }
        }
        if let Some(workspace) = compute.into_workspace() {
            give_back(&self.memory.workspaces, *workspace);
        }
        Ok(())
    }

    fn compute(&self) -> Compute<'_> {
        match &self.models {
            Models::Device(model, reference) => {
                Compute::device(model, reference.as_deref(), self.objective.is_tracked(), self.bounds)
            }
            Models::Packed(packed) => {
                let workspace = take(&self.memory.workspaces).unwrap_or_default();
                Compute::kernels(packed, Box::new(workspace), self.bounds)
            }
        }
    }

    fn micro_batch(
        &self,
        batch: &MicroBatch,
        compute: &mut Compute<'_>,
        result: &mut ShardResult,
    ) -> Result<(), PolicyError> {
        let rows = || batch.rows.iter().filter_map(|index| Some((*index, self.rows.get(*index)?)));
        let mut targets = Vec::new();
        // Which token each target is predicted from: its row, and its place there.
        let mut sources = Vec::new();
        for (place, (index, row)) in rows().enumerate() {
            for at in loss::trained(row) {
                targets.push(Target { row: index, at });
                sources.push((place, at - 1));
            }
        }
        if targets.is_empty() {
            return Ok(());
        }
        let ids: Vec<&[u32]> = rows().map(|(_, row)| row.ids.as_slice()).collect();
        let sources = Sources { rows: &ids, at: &sources, length: batch.length };
        let mut gradient = None;
        if self.objective.is_tracked() {
            let zeros = || self.memory.zeros(self.weights.trained());
            gradient = Some(result.gradient.take().unwrap_or_else(zeros));
        }
        if matches!(self.objective, Objective::Values | Objective::ValueDerivatives(_)) {
            compute.values(sources, gradient.as_mut(), |values| self.values(&targets, values, result))?;
        } else {
            let asked: Vec<Asked<'_>> = targets.iter().filter_map(|target| self.asked(*target)).collect();
            compute.tokens(sources, &asked, &self.rotary, gradient.as_mut(), &mut |token, seen| {
                let target = targets.get(token).and_then(|target| Some((target, self.rows.get(target.row)?)));
                target.map_or(Slopes::default(), |(target, row)| self.token(target, row, seen, result))
            })?;
        }
        result.gradient = gradient;
        Ok(())
    }

    fn asked(&self, target: Target) -> Option<Asked<'_>> {
        let row = self.rows.get(target.row)?;
        let temperature = if row.temperature > 0.0 { row.temperature } else { 1.0 };
        Some(Asked { id: *row.ids.get(target.at)?, temperature, support: Support::of(row, target.at) })
    }

    /// Takes down values, or replaces them by the given derivatives.
    fn values(&self, targets: &[Target], values: &mut [f32], result: &mut ShardResult) {
        for (target, value) in targets.iter().zip(values) {
            if let Objective::ValueDerivatives(derivatives) = &self.objective {
                *value = derivatives.get(target.row).and_then(|row| row.get(target.at)).copied().unwrap_or(0.0);
            } else {
                result.values.push((*target, *value));
            }
        }
    }

    /// Books one token and returns the loss's derivatives.
    fn token(&self, target: &Target, row: &TrainingRow, seen: Seen, result: &mut ShardResult) -> Slopes {
        let at = target.at;
        result.sums.token(&seen);
        match &self.objective {
            Objective::Loss { loss, .. } => loss.token(row, at, seen, &mut result.sums),
            Objective::Derivatives(derivatives) => {
                let of = |list: &[f32]| list.get(at).copied().map_or(0.0, f64::from);
                derivatives.get(target.row).map_or(Slopes::default(), |row| Slopes {
                    log_prob: of(&row.log_probs),
                    entropy: of(&row.entropies),
                })
            }
            Objective::Forward | Objective::Values | Objective::ValueDerivatives(_) => {
                if result.log_probs.last().is_none_or(|(last, _)| *last != target.row) {
                    let zeros = || vec![0.0; row.ids.len()];
                    result.log_probs.push((target.row, RowLogProbs { log_probs: zeros(), entropies: zeros() }));
                }
                if let Some((_, slots)) = result.log_probs.last_mut() {
                    let slots = slots.log_probs.get_mut(at).zip(slots.entropies.get_mut(at));
                    if let Some((slot, entropy_slot)) = slots {
                        (*slot, *entropy_slot) = narrow(seen.log_prob, seen.entropy);
                    }
                }
                Slopes::default()
            }
        }
    }
}
