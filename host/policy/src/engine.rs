//! The handle to the policy and the thread that owns its training state.
//!
//! Verbs are commands on a bounded channel and run one after the other, so a verb sees everything that the one before it
//! did. A full channel makes the caller wait.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use fulgurite_core::id::{ContentHash, PolicyVersion};
use fulgurite_core::llm::{LlmBackend, Message, Role};
use fulgurite_core::seed::Seed;
use fulgurite_core::training::{
    ForwardBackwardReport, LossSpec, OptimiserReport, OptimiserStep, RowLogProbs, TrainingRow,
};
use tokio::sync::{mpsc, oneshot};

use crate::checkpoint::{self, Checkpoint, CheckpointView};
use crate::config::PolicyConfig;
use crate::decoder::Decoder;
use crate::error::PolicyError;
use crate::generate::{Generator, SchedulerLimits};
use crate::loss::Normalisers;
use crate::optimiser::{AdamW, gradient_norm};
use crate::parameters::{Parameters, Values};
use crate::rotary::RotaryTable;
use crate::session::PolicyBackend;
use crate::shape::ModelShape;
use crate::tokenizer::PolicyTokenizer;
use crate::train::{BatchRunner, Objective, Outcome, add, check_loss, check_rows};

/// Commands that may wait; verbs come one at a time, so this only absorbs bursts.
const COMMANDS_MAX: usize = 64;
/// Longest name of a snapshot in bytes.
const SNAPSHOT_NAME_BYTES_MAX: usize = 64;
/// Most snapshots at once: each is a full copy of the weights.
const SNAPSHOTS_MAX: usize = 16;
/// The snapshot that the KL term refers to.
const REFERENCE: &str = "reference";

/// A demonstration as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedDemonstration {
    /// Token ids of the whole conversation.
    pub ids: Vec<u32>,
    /// Whether a token is trained on: contents of the trainable roles and the end token after each. One per id.
    pub mask: Vec<bool>,
}

/// Running totals of generation since the engine was made.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EngineStatistics {
    /// Calls that were started.
    pub calls: u64,
    /// Tokens of their prompts.
    pub prompt_tokens: u64,
    /// Prompt tokens whose keys and values were reused instead of computed.
    pub reused_tokens: u64,
    /// Tokens that were drawn.
    pub completion_tokens: u64,
    /// Forward passes, each over a batch.
    pub decode_steps: u64,
    /// Seconds that generating threads were busy, added over threads.
    pub busy_seconds: f64,
}

/// A handle to one policy. Cheap to clone; the policy's threads end when the last handle, backend and session is gone.
#[derive(Clone)]
pub struct PolicyEngine {
    inner: Arc<Inner>,
}

struct Inner {
    commands: mpsc::Sender<Command>,
    generator: Arc<Generator>,
    tokenizer: PolicyTokenizer,
    shape: ModelShape,
    published: Arc<Published>,
}

/// The newest weights and their version.
struct Published(RwLock<(Arc<Parameters>, PolicyVersion)>);

impl Published {
    fn get(&self) -> (Arc<Parameters>, PolicyVersion) {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, parameters: Arc<Parameters>, version: PolicyVersion) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = (parameters, version);
    }
}

impl std::fmt::Debug for PolicyEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PolicyEngine").field("shape", &self.inner.shape).field("version", &self.version()).finish()
    }
}

type Answer<T> = oneshot::Sender<Result<T, PolicyError>>;

enum Command {
    ForwardBackward(Vec<TrainingRow>, LossSpec, Answer<ForwardBackwardReport>),
    Backward(Vec<TrainingRow>, Vec<Vec<f32>>, Answer<()>),
    Forward(Vec<TrainingRow>, Option<String>, Answer<Vec<RowLogProbs>>),
    OptimiserStep(OptimiserStep, Answer<OptimiserReport>),
    Snapshot(String, Answer<()>),
    Save(PathBuf, Answer<()>),
    Restore(PathBuf, Answer<()>),
    ResetOptimiser(Answer<()>),
}

impl PolicyEngine {
    /// A policy with initial weights, which are a function of the seed and the model's shape.
    ///
    /// # Errors
    /// When the config does not fit itself or this build, or a thread cannot be started.
    pub fn create(config: &PolicyConfig, tokenizer: PolicyTokenizer, seed: Seed) -> Result<Self, PolicyError> {
        let shape = config.shape(tokenizer.vocabulary())?;
        Self::from_parameters(config, tokenizer, Parameters::initial(&shape, config.initial_std, seed))
    }

    /// A policy that starts from a model's tensors. Of `config` only the device and the limits count. The tokenizer may have
    /// fewer ids than the model: many models' embeddings are padded.
    ///
    /// `found` has the name and sizes of every tensor in the model's files, by Hugging Face's names and in its layout
    /// (`[out, in]` for projections). They are all checked before `read` is asked for the first tensor's values; it is asked
    /// for each once.
    ///
    /// # Errors
    /// When the shape, the tensors ([`PolicyError::UnfitTensors`] names all that do not fit), the tokenizer or a limit do not
    /// fit, or a thread cannot be started. Errors of `read` pass through.
    pub fn from_tensors(
        config: &PolicyConfig,
        tokenizer: PolicyTokenizer,
        shape: &ModelShape,
        found: &BTreeMap<String, Vec<usize>>,
        read: impl FnMut(&str) -> Result<Vec<f32>, PolicyError>,
    ) -> Result<Self, PolicyError> {
        // Checks device and limits; the shape itself is the model's.
        config.shape(shape.vocabulary)?;
        Self::from_parameters(config, tokenizer, Parameters::from_tensors(shape, found, read)?)
    }

    fn from_parameters(
        config: &PolicyConfig,
        tokenizer: PolicyTokenizer,
        parameters: Parameters,
    ) -> Result<Self, PolicyError> {
        let optimiser = AdamW::new(&parameters);
        let start =
            Checkpoint { parameters, optimiser, gradient: None, snapshots: BTreeMap::new(), version: PolicyVersion(0) };
        Self::start(config, tokenizer, start)
    }

    /// The policy that [`save`](Self::save) wrote into a folder. Sizes come from the folder; of `config` only the device
    /// and the limits count.
    ///
    /// # Errors
    /// When a file is missing or does not fit, or a thread cannot be started.
    pub fn open(dir: &Path, config: &PolicyConfig) -> Result<Self, PolicyError> {
        let tokenizer = PolicyTokenizer::load(dir)?;
        // Checks device and limits; the shape itself is the folder's.
        config.shape(tokenizer.vocabulary())?;
        let start = checkpoint::load(dir)?;
        Self::start(config, tokenizer, start)
    }

    fn start(config: &PolicyConfig, tokenizer: PolicyTokenizer, start: Checkpoint) -> Result<Self, PolicyError> {
        let shape = start.parameters.shape.clone();
        if shape.vocabulary < tokenizer.vocabulary() {
            return Err(PolicyError::Tokenizer(format!(
                "it has {} ids and the model {}",
                tokenizer.vocabulary(),
                shape.vocabulary
            )));
        }
        let failed = |error: std::io::Error| PolicyError::Internal(format!("a thread could not be started: {error}"));
        let rotary = Arc::new(RotaryTable::new(&shape));
        let limits = SchedulerLimits {
            threads: config.thread_count(),
            batch_wait_ms_max: config.batch_wait_ms_max,
            kv_cache_bytes_max: config.kv_cache_bytes_max,
            requests_waiting_max: config.requests_waiting_max,
        };
        let decoder = Decoder::new(&start.parameters, start.version, rotary.clone());
        let generator = Arc::new(Generator::start(decoder, tokenizer.clone(), limits).map_err(failed)?);
        let parameters = Arc::new(start.parameters);
        let published = Arc::new(Published(RwLock::new((parameters.clone(), start.version))));
        let trainer = Trainer {
            parameters,
            optimiser: start.optimiser,
            gradient: start.gradient,
            snapshots: start.snapshots.into_iter().map(|(name, snapshot)| (name, Arc::new(snapshot))).collect(),
            version: start.version,
            runner: BatchRunner::new(config, rotary.clone())?,
            rotary,
            generator: generator.clone(),
            tokenizer: tokenizer.clone(),
            published: published.clone(),
        };
        let (commands, received) = mpsc::channel(COMMANDS_MAX);
        std::thread::Builder::new()
            .name("policy-train".to_owned())
            .spawn(move || trainer.run(received))
            .map_err(failed)?;
        Ok(Self { inner: Arc::new(Inner { commands, generator, tokenizer, shape, published }) })
    }

    /// The policy as a language model for rollouts. Live sessions are the live rollouts: open one before its attempt
    /// starts and drop it as soon as the attempt has ended.
    #[must_use]
    pub fn backend(&self) -> Arc<dyn LlmBackend> {
        let (generator, tokenizer) = (self.inner.generator.clone(), self.inner.tokenizer.clone());
        Arc::new(PolicyBackend { generator, tokenizer })
    }

    /// Version of the newest weights.
    #[must_use]
    pub fn version(&self) -> PolicyVersion {
        self.inner.published.get().1
    }

    /// Tokens of prompt and completion together, at most.
    #[must_use]
    pub fn context_tokens_max(&self) -> usize {
        self.inner.shape.context_tokens_max
    }

    /// Sizes of the model.
    #[must_use]
    pub fn shape(&self) -> &ModelShape {
        &self.inner.shape
    }

    /// Number of weights.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.inner.published.get().0.count()
    }

    /// The policy's tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &PolicyTokenizer {
        &self.inner.tokenizer
    }

    /// Hash of the newest weights, every bit of them.
    #[must_use]
    pub fn weights_hash(&self) -> ContentHash {
        self.inner.published.get().0.hash()
    }

    /// Running totals of generation.
    #[must_use]
    pub fn statistics(&self) -> EngineStatistics {
        let counters = &self.inner.generator.scheduler.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        EngineStatistics {
            calls: get(&counters.calls),
            prompt_tokens: get(&counters.prompt_tokens),
            reused_tokens: get(&counters.reused_tokens),
            completion_tokens: get(&counters.completion_tokens),
            decode_steps: get(&counters.forward_passes),
            busy_seconds: get(&counters.busy_ns) as f64 / 1e9,
        }
    }

    /// Tokenises a conversation with the policy's template. Messages of the `trainable` roles are trained on, each with
    /// its end token.
    ///
    /// # Errors
    /// When it is empty or does not fit the context, a tool call's arguments are not JSON, or a folder's template does not let
    /// one tell what the model writes of it.
    pub fn encode_demonstration(
        &self,
        messages: &[Message],
        trainable: &[Role],
    ) -> Result<EncodedDemonstration, PolicyError> {
        let (ids, mask) = self.inner.tokenizer.encode_demonstration(messages, trainable)?;
        if ids.is_empty() {
            return Err(PolicyError::InvalidBatch("the demonstration has no tokens".to_owned()));
        }
        if ids.len() > self.context_tokens_max() {
            let (tokens, context_tokens_max) = (ids.len(), self.context_tokens_max());
            return Err(PolicyError::DemonstrationTooLong { tokens, context_tokens_max });
        }
        Ok(EncodedDemonstration { ids, mask })
    }

    /// Adds the gradient of a loss over a whole optimiser batch to what has been gathered since the last step.
    ///
    /// # Errors
    /// When a row or the loss does not fit, or the KL term has no snapshot named `reference`.
    pub async fn forward_backward(
        &self,
        rows: Vec<TrainingRow>,
        loss: LossSpec,
    ) -> Result<ForwardBackwardReport, PolicyError> {
        self.ask(|answer| Command::ForwardBackward(rows, loss, answer)).await
    }

    /// Adds the gradient that follows from given derivatives of a loss with respect to each row's log-probs (one per id;
    /// those of tokens outside the mask are not read).
    ///
    /// # Errors
    /// When a row does not fit, or a derivative is not finite.
    pub async fn backward(&self, rows: Vec<TrainingRow>, d_log_probs: Vec<Vec<f32>>) -> Result<(), PolicyError> {
        self.ask(|answer| Command::Backward(rows, d_log_probs, answer)).await
    }

    /// Log-probs and entropies of the rows' masked tokens at each row's temperature, under the newest weights or a
    /// snapshot.
    ///
    /// # Errors
    /// When a row does not fit or the snapshot does not exist.
    pub async fn forward(
        &self,
        rows: Vec<TrainingRow>,
        model: Option<String>,
    ) -> Result<Vec<RowLogProbs>, PolicyError> {
        self.ask(|answer| Command::Forward(rows, model, answer)).await
    }

    /// Applies the gathered gradient and publishes the new weights under the next version. A gradient that is not finite
    /// is thrown away and the step skipped.
    ///
    /// # Errors
    /// When no gradient was gathered, or a number of the step is not finite or negative.
    pub async fn optimiser_step(&self, step: OptimiserStep) -> Result<OptimiserReport, PolicyError> {
        self.ask(|answer| Command::OptimiserStep(step, answer)).await
    }

    /// Freezes a copy of the weights under a name; an earlier one of that name is replaced. `reference` is the one that
    /// the KL term uses.
    ///
    /// # Errors
    /// When the name is empty or too long, or there are too many snapshots.
    pub async fn snapshot(&self, name: impl Into<String>) -> Result<(), PolicyError> {
        let name = name.into();
        self.ask(|answer| Command::Snapshot(name, answer)).await
    }

    /// Writes weights, optimiser, version, snapshots, tokenizer and template into a folder, synchronised with the disk.
    /// The folder should be empty and be moved into place by the caller afterwards.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub async fn save(&self, dir: &Path) -> Result<(), PolicyError> {
        let dir = dir.to_owned();
        self.ask(|answer| Command::Save(dir, answer)).await
    }

    /// Takes over everything that [`save`](Self::save) wrote and publishes its weights under its version. Training goes on
    /// from there bit by bit.
    ///
    /// # Errors
    /// When a file is missing or does not fit this policy; the policy is then unchanged.
    pub async fn restore(&self, dir: &Path) -> Result<(), PolicyError> {
        let dir = dir.to_owned();
        self.ask(|answer| Command::Restore(dir, answer)).await
    }

    /// Forgets moments, step count and any gathered gradient: for a new stage.
    ///
    /// # Errors
    /// When the engine has stopped.
    pub async fn reset_optimiser(&self) -> Result<(), PolicyError> {
        self.ask(Command::ResetOptimiser).await
    }

    async fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Result<T, PolicyError> {
        let (answer, received) = oneshot::channel();
        self.inner.commands.send(command(answer)).await.map_err(|_| PolicyError::Stopped)?;
        received.await.map_err(|_| PolicyError::Stopped)?
    }
}

/// The training state and the thread that owns it.
struct Trainer {
    parameters: Arc<Parameters>,
    optimiser: AdamW,
    gradient: Option<Values>,
    snapshots: BTreeMap<String, Arc<Parameters>>,
    version: PolicyVersion,
    runner: BatchRunner,
    rotary: Arc<RotaryTable>,
    generator: Arc<Generator>,
    tokenizer: PolicyTokenizer,
    published: Arc<Published>,
}

impl Trainer {
    fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        while let Some(command) = commands.blocking_recv() {
            // A caller that no longer waits does not undo what it asked for.
            match command {
                Command::ForwardBackward(rows, loss, answer) => drop(answer.send(self.forward_backward(rows, loss))),
                Command::Backward(rows, derivatives, answer) => drop(answer.send(self.backward(rows, derivatives))),
                Command::Forward(rows, model, answer) => drop(answer.send(self.forward(rows, model))),
                Command::OptimiserStep(step, answer) => drop(answer.send(self.optimiser_step(&step))),
                Command::Snapshot(name, answer) => drop(answer.send(self.snapshot(name))),
                Command::Save(dir, answer) => drop(answer.send(self.save(&dir))),
                Command::Restore(dir, answer) => drop(answer.send(self.restore(&dir))),
                Command::ResetOptimiser(answer) => {
                    self.optimiser = AdamW::new(&self.parameters);
                    self.gradient = None;
                    drop(answer.send(Ok(())));
                }
            }
        }
    }

    fn gather(&mut self, rows: Vec<TrainingRow>, objective: Objective) -> Result<Outcome, PolicyError> {
        let mut outcome = self.runner.run(self.parameters.clone(), rows, objective)?;
        match (&mut self.gradient, outcome.gradient.take()) {
            (Some(total), Some(part)) => add(total, &part),
            (total, Some(part)) => *total = Some(part),
            (_, None) => {}
        }
        Ok(outcome)
    }

    fn forward_backward(
        &mut self,
        rows: Vec<TrainingRow>,
        spec: LossSpec,
    ) -> Result<ForwardBackwardReport, PolicyError> {
        check_rows(&self.parameters.shape, &rows)?;
        check_loss(&spec)?;
        let normalisers = Normalisers::new(&spec.aggregation, &rows)?;
        let reference = match spec.kl {
            Some(_) => Some(self.model(REFERENCE)?),
            None => None,
        };
        Ok(self.gather(rows, Objective::Loss { spec, normalisers, reference })?.report)
    }

    fn backward(&mut self, rows: Vec<TrainingRow>, derivatives: Vec<Vec<f32>>) -> Result<(), PolicyError> {
        check_rows(&self.parameters.shape, &rows)?;
        let lengths_fit = derivatives.len() == rows.len()
            && rows.iter().zip(&derivatives).all(|(row, derivatives)| row.ids.len() == derivatives.len());
        if !lengths_fit {
            return Err(PolicyError::InvalidBatch("there must be one derivative per id of every row".to_owned()));
        }
        if derivatives.iter().flatten().any(|derivative| !derivative.is_finite()) {
            return Err(PolicyError::InvalidBatch("a derivative is not finite".to_owned()));
        }
        self.gather(rows, Objective::Derivatives(derivatives)).map(|_| ())
    }

    fn forward(&self, rows: Vec<TrainingRow>, model: Option<String>) -> Result<Vec<RowLogProbs>, PolicyError> {
        check_rows(&self.parameters.shape, &rows)?;
        let parameters = match model {
            Some(name) => self.model(&name)?,
            None => self.parameters.clone(),
        };
        Ok(self.runner.run(parameters, rows, Objective::Forward)?.log_probs)
    }

    fn model(&self, name: &str) -> Result<Arc<Parameters>, PolicyError> {
        self.snapshots.get(name).cloned().ok_or_else(|| PolicyError::UnknownSnapshot(name.to_owned()))
    }

    fn optimiser_step(&mut self, step: &OptimiserStep) -> Result<OptimiserReport, PolicyError> {
        let check = |name: &str, value: f64| {
            let fits = value.is_finite() && value >= 0.0;
            let error =
                || PolicyError::InvalidBatch(format!("`{name}` is {value}, it must be finite and not negative"));
            if fits { Ok(()) } else { Err(error()) }
        };
        check("learning_rate", step.learning_rate)?;
        check("weight_decay", step.weight_decay)?;
        check("gradient_norm_max", step.gradient_norm_max.unwrap_or(0.0))?;
        let gradient = self.gradient.take().ok_or(PolicyError::NoGradient)?;
        let norm = gradient_norm(&gradient);
        let skipped = !norm.is_finite();
        if skipped {
            tracing::warn!(version = self.version.0, "the gradient is not finite: the step is skipped");
        } else {
            self.optimiser.step(Arc::make_mut(&mut self.parameters), &gradient, norm, step);
            self.version = PolicyVersion(self.version.0 + 1);
            self.publish();
        }
        Ok(OptimiserReport { gradient_norm: norm, skipped, policy_version: self.version })
    }

    fn publish(&self) {
        self.generator.scheduler.publish(Decoder::new(&self.parameters, self.version, self.rotary.clone()));
        self.published.set(self.parameters.clone(), self.version);
    }

    fn snapshot(&mut self, name: String) -> Result<(), PolicyError> {
        if name.is_empty() || name.len() > SNAPSHOT_NAME_BYTES_MAX {
            return Err(PolicyError::InvalidBatch(format!(
                "a snapshot's name has 1 to {SNAPSHOT_NAME_BYTES_MAX} bytes"
            )));
        }
        if self.snapshots.len() >= SNAPSHOTS_MAX && !self.snapshots.contains_key(&name) {
            return Err(PolicyError::InvalidBatch(format!("there are {SNAPSHOTS_MAX} snapshots already")));
        }
        self.snapshots.insert(name, self.parameters.clone());
        Ok(())
    }

    fn save(&self, dir: &Path) -> Result<(), PolicyError> {
        let view = CheckpointView {
            parameters: &self.parameters,
            optimiser: &self.optimiser,
            gradient: self.gradient.as_ref(),
            snapshots: self.snapshots.iter().map(|(name, snapshot)| (name.as_str(), &**snapshot)).collect(),
            version: self.version,
        };
        std::fs::create_dir_all(dir).map_err(PolicyError::io(dir))?;
        self.tokenizer.save(dir)?;
        checkpoint::save(dir, &view, self.tokenizer.ends())
    }

    fn restore(&mut self, dir: &Path) -> Result<(), PolicyError> {
        let loaded = checkpoint::load(dir)?;
        let reason = if loaded.parameters.shape != self.parameters.shape {
            Some("its model has other sizes than this policy")
        } else if PolicyTokenizer::load(dir)?.hash() != self.tokenizer.hash() {
            Some("its tokenizer or chat template is not this policy's")
        } else {
            None
        };
        if let Some(reason) = reason {
            return Err(PolicyError::Checkpoint { path: dir.to_owned(), reason: reason.to_owned() });
        }
        self.parameters = Arc::new(loaded.parameters);
        self.optimiser = loaded.optimiser;
        self.gradient = loaded.gradient;
        self.snapshots = loaded.snapshots.into_iter().map(|(name, snapshot)| (name, Arc::new(snapshot))).collect();
        self.version = loaded.version;
        self.publish();
        Ok(())
    }
}
