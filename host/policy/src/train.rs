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

use fulgurite_core::training::{ForwardBackwardReport, LossSpec, PolicyLoss, RowLogProbs, Stream, TrainingRow};

use crate::backprop::Tape;
use crate::compute::{Compute, Models, PackedModels};
use crate::config::PolicyConfig;
use crate::device::Backend;
use crate::error::PolicyError;
use crate::kernel;
use crate::loss::{self, Normalisers, TokenInput};
use crate::parallel;
use crate::parameters::{Parameters, Values};
use crate::rotary::RotaryTable;
use crate::shape::ModelShape;

/// What to compute for a batch.
#[derive(Debug, Clone)]
pub(crate) enum Objective {
    /// Gradient and report of a loss.
    Loss {
        /// The loss.
        spec: LossSpec,
        /// Of the whole batch.
        normalisers: Normalisers,
        /// Weights of the KL term's reference.
        reference: Option<Arc<Parameters>>,
    },
    /// Gradient for given derivatives with respect to log-probs, one list per row with an entry per id.
    Derivatives(Vec<Vec<f32>>),
    /// Log-probs and entropies only.
    Forward,
}

/// What came out.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// `None` for [`Objective::Forward`].
    pub(crate) gradient: Option<Values>,
    pub(crate) report: ForwardBackwardReport,
    /// One per row, in the order given; empty but for [`Objective::Forward`].
    pub(crate) log_probs: Vec<RowLogProbs>,
}

/// Runs batches on its worker threads.
#[derive(Debug)]
pub(crate) struct BatchRunner {
    /// Pools of one thread each: inside it, burn's and gemm's parallel loops see one thread and stay on it.
    workers: Vec<rayon::ThreadPool>,
    shards: usize,
    micro_batch_tokens_max: usize,
    rotary: Arc<RotaryTable>,
    backend: Backend,
    memory: Arc<Memory>,
}

/// Activations and gradients of workers, kept between batches: fresh pages cost as much as the arithmetic in them.
#[derive(Debug, Default)]
struct Memory {
    tapes: Mutex<Vec<Tape>>,
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
        let Some(mut gradient) = take(&self.gradients) else { return parameters.zeros() };
        for values in &mut gradient {
            values.fill(0.0);
        }
        gradient
    }
}

/// Rows of one forward pass, padded to the longest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct MicroBatch {
    rows: Vec<usize>,
    length: usize,
}

struct Job {
    parameters: Arc<Parameters>,
    rows: Vec<TrainingRow>,
    objective: Objective,
    shards: Vec<Vec<MicroBatch>>,
    next_shard: AtomicUsize,
    results: Mutex<Vec<Option<ShardResult>>>,
    rotary: Arc<RotaryTable>,
    models: Models,
    memory: Arc<Memory>,
}

#[derive(Default)]
struct ShardResult {
    gradient: Option<Values>,
    sums: Sums,
    log_probs: Vec<(usize, RowLogProbs)>,
}

/// Sums over trained tokens.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    loss: f64,
    tokens: u64,
    entropy: f64,
    cross_entropy: f64,
    /// Of the policy-gradient stream only, from here on.
    policy_tokens: u64,
    clipped: u64,
    approximate_kl: f64,
    reference_kl: f64,
    ratio: f64,
    ratio_max: f64,
    mismatch: f64,
    mismatch_max: f64,
    importance: f64,
    importance_squared: f64,
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.loss += other.loss;
        self.tokens += other.tokens;
        self.entropy += other.entropy;
        self.cross_entropy += other.cross_entropy;
        self.policy_tokens += other.policy_tokens;
        self.clipped += other.clipped;
        self.approximate_kl += other.approximate_kl;
        self.reference_kl += other.reference_kl;
        self.ratio += other.ratio;
        self.ratio_max = self.ratio_max.max(other.ratio_max);
        self.mismatch += other.mismatch;
        self.mismatch_max = self.mismatch_max.max(other.mismatch_max);
        self.importance += other.importance;
        self.importance_squared += other.importance_squared;
    }

    fn report(&self, total_tokens: u64) -> ForwardBackwardReport {
        let mean = |sum: f64, tokens: u64| if tokens == 0 { 0.0 } else { sum / tokens as f64 };
        ForwardBackwardReport {
            loss: self.loss,
            trained_tokens: self.tokens,
            total_tokens,
            entropy: mean(self.entropy, self.tokens),
            clip_fraction: mean(self.clipped as f64, self.policy_tokens),
            approximate_kl: mean(self.approximate_kl, self.policy_tokens),
            reference_kl: mean(self.reference_kl, self.policy_tokens),
            ratio_mean: mean(self.ratio, self.policy_tokens),
            ratio_max: self.ratio_max,
            mismatch_mean: mean(self.mismatch, self.policy_tokens),
            mismatch_max: self.mismatch_max,
            effective_sample_size: if self.importance_squared > 0.0 {
                self.importance.powi(2) / (self.policy_tokens as f64 * self.importance_squared)
            } else {
                0.0
            },
            cross_entropy: mean(self.cross_entropy, self.tokens),
        }
    }
}

fn invalid(text: impl Into<String>) -> PolicyError {
    PolicyError::InvalidBatch(text.into())
}

/// Checks rows against the model and themselves: they carry numbers from plugins.
pub(crate) fn check_rows(shape: &ModelShape, rows: &[TrainingRow]) -> Result<(), PolicyError> {
    for (index, row) in rows.iter().enumerate() {
        let refuse = |what: &str| Err(invalid(format!("row {index}: {what}")));
        let len = row.ids.len();
        if len == 0 || len > shape.context_tokens_max {
            return refuse(&format!("{len} tokens, where 1 to {} fit the context", shape.context_tokens_max));
        }
        let lists = [row.mask.len(), row.weights.len(), row.behaviour_log_probs.len()];
        if lists != [len; 3] || !(row.old_log_probs.is_empty() || row.old_log_probs.len() == len) {
            return refuse("mask, weights and log-probs must have one entry per id");
        }
        if row.ids.iter().any(|id| *id as usize >= shape.vocabulary) {
            return refuse("an id is outside the vocabulary");
        }
        if !(row.temperature.is_finite() && row.temperature >= 0.0) {
            return refuse("the temperature must be finite and not negative");
        }
        if row.stream == Stream::RefKl {
            return Err(PolicyError::Unsupported("the stream `ref_kl`".to_owned()));
        }
        for at in (0..len).filter(|at| loss::is_trained(row, *at)) {
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

/// Checks what a plugin asks for.
pub(crate) fn check_loss(spec: &LossSpec) -> Result<(), PolicyError> {
    let check = |name: &str, value: f32, least: f32| {
        let fits = value.is_finite() && value >= least;
        if fits { Ok(()) } else { Err(invalid(format!("`{name}` is {value}, it must be finite and at least {least}"))) }
    };
    if let PolicyLoss::Ppo { clip_low, clip_high, dual_clip } = spec.policy_loss {
        check("clip_low", clip_low, 0.0)?;
        check("clip_high", clip_high, 0.0)?;
        if let Some(bound) = dual_clip {
            check("dual_clip", bound, 1.0)?;
        }
    }
    if let Some(term) = &spec.kl {
        check("kl.coefficient", term.coefficient, 0.0)?;
    }
    if let Some(cap) = spec.importance_cap {
        check("importance_cap", cap, 0.0)?;
    }
    // A negative coefficient punishes entropy, which is unusual and legitimate.
    check("entropy_coefficient", spec.entropy_coefficient, f32::MIN)
}

impl BatchRunner {
    /// Starts the workers.
    pub(crate) fn new(config: &PolicyConfig, rotary: Arc<RotaryTable>) -> Result<Self, PolicyError> {
        let backend = config.device.open()?;
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
            rotary,
            backend,
            memory: Arc::default(),
        })
    }

    /// Runs a checked batch.
    pub(crate) fn run(
        &self,
        parameters: Arc<Parameters>,
        rows: Vec<TrainingRow>,
        objective: Objective,
    ) -> Result<Outcome, PolicyError> {
        let total_tokens = rows.iter().map(|row| row.ids.len() as u64).sum();
        let forward = matches!(objective, Objective::Forward);
        let mut outcome = Outcome::default();
        if forward {
            outcome.log_probs = rows
                .iter()
                .map(|row| RowLogProbs { log_probs: vec![0.0; row.ids.len()], entropies: vec![0.0; row.ids.len()] })
                .collect();
        }
        let shards = plan(&rows, self.shards, self.micro_batch_tokens_max);
        let results = Mutex::new(shards.iter().map(|_| None).collect());
        let rotary = self.rotary.clone();
        let models = match &self.backend {
            Backend::Kernels => {
                let tracked = !matches!(objective, Objective::Forward);
                let reference = objective.reference().map(|reference| &**reference);
                Models::Packed(Box::new(PackedModels::new(&parameters, reference, tracked, &rotary, self.threads())))
            }
            Backend::Burn(device) => Models::Burn(device.clone()),
        };
        let (next_shard, memory) = (AtomicUsize::new(0), self.memory.clone());
        let job = Arc::new(Job { parameters, rows, objective, shards, next_shard, results, rotary, models, memory });

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
        }
        if !forward {
            let mut gradients = gradients.into_iter();
            // No row may have a trained token.
            let mut total = gradients.next().unwrap_or_else(|| job.parameters.zeros());
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

/// Deals micro-batches to shards: a function of the rows' lengths and order alone.
fn plan(rows: &[TrainingRow], shards: usize, tokens_max: usize) -> Vec<Vec<MicroBatch>> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    let length = |row: usize| rows.get(row).map_or(0, |row| row.ids.len());
    order.sort_by_key(|row| std::cmp::Reverse(length(*row)));
    let total: usize = rows.iter().map(|row| row.ids.len()).sum();
    // Every shard gets work even when the whole batch would fit fewer micro-batches.
    let budget = tokens_max.min(total.div_ceil(shards.max(1))).max(1);
    let mut all = vec![Vec::new(); shards];
    let mut open: Option<MicroBatch> = None;
    let mut batches = Vec::new();
    for row in order {
        match &mut open {
            // Sorted downwards: the first row is the longest.
            Some(batch) if (batch.rows.len() + 1) * batch.length <= budget => batch.rows.push(row),
            _ => batches.extend(open.replace(MicroBatch { rows: vec![row], length: length(row) })),
        }
    }
    batches.extend(open);
    for (index, batch) in batches.into_iter().enumerate() {
        if let Some(shard) = all.get_mut(index % shards.max(1)) {
            shard.push(batch);
        }
    }
    all
}

impl Objective {
    fn reference(&self) -> Option<&Arc<Parameters>> {
        match self {
            Self::Loss { reference, .. } => reference.as_ref(),
            Self::Derivatives(_) | Self::Forward => None,
        }
    }
}

/// A trained token of a micro-batch.
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
            if let Some(slot) = self.results.lock().unwrap_or_else(PoisonError::into_inner).get_mut(index) {
                *slot = Some(result);
            }
        }
        if let Some(tape) = compute.into_tape() {
            give_back(&self.memory.tapes, *tape);
        }
        Ok(())
    }

    fn compute(&self) -> Compute<'_> {
        match &self.models {
            Models::Burn(device) => {
                let tracked = !matches!(self.objective, Objective::Forward);
                let reference = self.objective.reference().map(|reference| &**reference);
                Compute::burn(device, &self.parameters, reference, tracked)
            }
            Models::Packed(packed) => {
                let tape = take(&self.memory.tapes).unwrap_or_default();
                Compute::kernels(packed, Box::new(tape))
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
            for at in (0..row.ids.len()).filter(|at| loss::is_trained(row, *at)) {
                targets.push(Target { row: index, at });
                sources.push((place, at - 1));
            }
        }
        if targets.is_empty() {
            return Ok(());
        }
        let ids: Vec<&[u32]> = rows().map(|(_, row)| row.ids.as_slice()).collect();
        let mut pass = compute.forward(&ids, &sources, batch.length, &self.rotary)?;
        self.tokens(&targets, &mut pass.logits, pass.reference.take(), result);
        if matches!(self.objective, Objective::Forward) {
            return Ok(());
        }
        let gradient = result.gradient.get_or_insert_with(|| self.memory.zeros(&self.parameters));
        compute.backward(pass, gradient)
    }

    /// Turns logits into `d loss / d logits` in place, token by token.
    fn tokens(
        &self,
        targets: &[Target],
        logits: &mut [f32],
        mut reference: Option<Vec<f32>>,
        result: &mut ShardResult,
    ) {
        let vocabulary = self.parameters.shape.vocabulary;
        let mut reference = reference.as_mut().map(|logits| logits.chunks_exact_mut(vocabulary));
        let mut scaled = Vec::with_capacity(vocabulary);
        for (target, logits) in targets.iter().zip(logits.chunks_exact_mut(vocabulary)) {
            let Some(row) = self.rows.get(target.row) else { continue };
            let temperature = if row.temperature > 0.0 { row.temperature } else { 1.0 };
            let id = row.ids.get(target.at).map_or(0, |id| *id as usize);
            let (_, normaliser) = kernel::log_normaliser(logits, temperature);
            let log_prob = logits.get(id).map_or(f32::NAN, |logit| logit - normaliser);
            scaled.clear();
            scaled.extend_from_slice(logits);
            let entropy = kernel::probabilities(logits, normaliser);
            let reference = reference.as_mut().and_then(Iterator::next).map(|logits| {
                let (_, normaliser) = kernel::log_normaliser(logits, temperature);
                logits.get(id).map_or(f64::NAN, |logit| f64::from(logit - normaliser))
            });
            let derivatives = self.token(target, row, f64::from(log_prob), f64::from(entropy), reference, result);
            let (d_log_prob, d_entropy) = derivatives;
            // With z the scaled logits: d log p(y) / dz_j = [j = y] - p_j and dH / dz_j = -p_j (log p_j + H).
            for (j, (slot, scaled)) in logits.iter_mut().zip(&scaled).enumerate() {
                let probability = *slot;
                let mut derivative = if j == id { d_log_prob } else { 0.0 } - d_log_prob * probability;
                if d_entropy != 0.0 && probability > 0.0 {
                    derivative -= d_entropy * probability * (scaled - normaliser + entropy);
                }
                *slot = derivative / temperature;
            }
        }
    }

    /// Books one token and returns the loss's derivatives with respect to its log-prob and entropy.
    fn token(
        &self,
        target: &Target,
        row: &TrainingRow,
        log_prob: f64,
        entropy: f64,
        reference: Option<f64>,
        result: &mut ShardResult,
    ) -> (f32, f32) {
        let at = target.at;
        let value = |list: &[f32]| list.get(at).copied().map(f64::from);
        let behaviour = value(&row.behaviour_log_probs).unwrap_or(0.0);
        let old = value(&row.old_log_probs).unwrap_or(behaviour);
        let sums = &mut result.sums;
        sums.tokens += 1;
        sums.entropy += entropy;
        sums.cross_entropy -= log_prob;
        let (d_log_prob, d_entropy) = match &self.objective {
            Objective::Loss { spec, normalisers, .. } => {
                let weight = value(&row.weights).unwrap_or(0.0);
                let input = TokenInput { log_prob, old, behaviour, reference, weight };
                let coefficient = normalisers.coefficient(row.stream, row.sequence);
                if row.stream == Stream::Ce {
                    let token = loss::cross_entropy(&input);
                    sums.loss += coefficient * token.loss;
                    (coefficient * token.d_log_prob, 0.0)
                } else {
                    let token = loss::policy_gradient(spec, &input);
                    let entropy_coefficient =
                        normalisers.entropy_coefficient(row.stream) * f64::from(spec.entropy_coefficient);
                    sums.loss += coefficient * token.loss - entropy_coefficient * entropy;
                    sums.policy_tokens += 1;
                    sums.clipped += u64::from(token.clipped);
                    sums.approximate_kl += loss::approximate_kl(log_prob, old);
                    sums.reference_kl += token.reference_kl;
                    sums.ratio += token.ratio;
                    sums.ratio_max = sums.ratio_max.max(token.ratio);
                    let mismatch = (log_prob - behaviour).abs();
                    sums.mismatch += mismatch;
                    sums.mismatch_max = sums.mismatch_max.max(mismatch);
                    let importance = loss::importance(log_prob, behaviour);
                    sums.importance += importance;
                    sums.importance_squared += importance * importance;
                    (coefficient * token.d_log_prob, -entropy_coefficient)
                }
            }
            Objective::Derivatives(derivatives) => {
                let derivative = derivatives.get(target.row).and_then(|row| value(row)).unwrap_or(0.0);
                (derivative, 0.0)
            }
            Objective::Forward => {
                if result.log_probs.last().is_none_or(|(last, _)| *last != target.row) {
                    let zeros = || vec![0.0; row.ids.len()];
                    result.log_probs.push((target.row, RowLogProbs { log_probs: zeros(), entropies: zeros() }));
                }
                if let Some((_, slots)) = result.log_probs.last_mut() {
                    let slots = slots.log_probs.get_mut(at).zip(slots.entropies.get_mut(at));
                    if let Some((slot, entropy_slot)) = slots {
                        (*slot, *entropy_slot) = narrow(log_prob, entropy);
                    }
                }
                (0.0, 0.0)
            }
        };
        narrow(d_log_prob, d_entropy)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the model computes in f32")]
fn narrow(a: f64, b: f64) -> (f32, f32) {
    (a as f32, b as f32)
}
