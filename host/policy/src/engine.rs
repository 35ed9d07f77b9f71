//! The handle to the policy. Its training state lives in a [`Trainer`] on a thread of its own.
//!
//! Verbs are commands on a bounded channel and run one after the other, so a verb sees everything that the one before it
//! did. A full channel makes the caller wait.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fulgurite_core::id::{ContentHash, PolicyVersion};
use fulgurite_core::llm::{LlmBackend, Message, Role};
use fulgurite_core::seed::Seed;
use fulgurite_core::training::{
    ForwardBackwardReport, LossSpec, OptimiserReport, OptimiserStep, RowDerivatives, RowLogProbs, TrainingRow,
};
use tokio::sync::{mpsc, oneshot};

use crate::checkpoint::{self, Checkpoint, Part};
use crate::config::PolicyConfig;
use crate::error::PolicyError;
use crate::lora::{AdapterLayout, LoraConfig};
use crate::parameters::Parameters;
use crate::peft;
use crate::predictor::Publisher;
use crate::rotary::RotaryTable;
use crate::scheduler::SchedulerLimits;
use crate::session::{PolicyBackend, Speaker};
use crate::shape::ModelShape;
use crate::tokenizer::PolicyTokenizer;
use crate::train::BatchRunner;
use crate::trainer::{Answer, Command, ModelName, Published, Trained, Trainer, trained};
use crate::weights::{Base, ModelWeights};

/// Commands that may wait; verbs come one at a time, so this only absorbs bursts.
const COMMANDS_MAX: usize = 64;

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
    /// Memory of keys and values now, in bytes: of calls and of what is kept for later ones.
    pub kv_cache_bytes: u64,
    /// Blocks of keys and values that were dropped to make room for others.
    pub evicted_blocks: u64,
    /// Times that a call was put back into the queue because its keys and values did not fit.
    pub calls_put_back: u64,
    /// Tokens whose keys and values were computed again, because their call was put back or moved to newer weights.
    pub recomputed_tokens: u64,
}

/// A handle to one policy. Cheap to clone; the policy's threads end when the last handle, backend and session is gone.
///
/// A handle is to one model: the policy, or one beside it (an adapter, or a whole model) by [`named`](Self::named). Its verbs and its
/// version are that model's; so is its backend, but that the policy's hands the calls of agent roles to the models that the config
/// gives them to. [`save`](Self::save) and [`restore`](Self::restore) are of the whole engine.
#[derive(Clone)]
pub struct PolicyEngine {
    inner: Arc<Inner>,
    model: ModelName,
    published: Arc<Published>,
}

struct Inner {
    commands: mpsc::Sender<Command>,
    tokenizer: PolicyTokenizer,
    shape: ModelShape,
    models: Arc<BTreeMap<ModelName, Arc<Published>>>,
    /// Which model answers an agent role.
    roles: BTreeMap<String, ModelName>,
}

impl std::fmt::Debug for PolicyEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PolicyEngine")
            .field("shape", &self.inner.shape)
            .field("model", &self.model)
            .field("version", &self.version())
            .finish_non_exhaustive()
    }
}

impl PolicyEngine {
    /// A policy with initial weights, which are a function of the seed and the model's shape.
    ///
    /// # Errors
    /// When the config does not fit itself or this build, or a thread cannot be started.
    pub fn create(config: &PolicyConfig, tokenizer: PolicyTokenizer, seed: Seed) -> Result<Self, PolicyError> {
        let shape = config.shape(tokenizer.vocabulary())?;
        Self::from_parameters(config, tokenizer, Parameters::initial(&shape, config.initial_std, seed), seed)
    }

    /// A policy that starts from a model's tensors. Of `config` only the device and the limits count. The tokenizer may have
    /// fewer ids than the model: many models' embeddings are padded.
    ///
    /// `found` has the name and sizes of every tensor in the model's files, by Hugging Face's names and in its layout
    /// (`[out, in]` for projections). They are all checked before `read` is asked for the first tensor's values; it is asked
    /// for each once.
    ///
    /// `seed` is of initial adapters; a config without them takes nothing from it.
    ///
    /// # Errors
    /// When the shape, the tensors ([`PolicyError::UnfitTensors`] names all that do not fit), the tokenizer or a limit do not
    /// fit, or a thread cannot be started. Errors of `read` pass through.
    pub fn from_tensors(
        config: &PolicyConfig,
        tokenizer: PolicyTokenizer,
        shape: &ModelShape,
        found: &BTreeMap<String, Vec<usize>>,
        seed: Seed,
        read: impl FnMut(&str) -> Result<Vec<f32>, PolicyError>,
    ) -> Result<Self, PolicyError> {
        // Checks device and limits; the shape itself is the model's.
        config.shape(shape.vocabulary)?;
        Self::from_parameters(config, tokenizer, Parameters::from_tensors(shape, found, read)?, seed)
    }

    fn from_parameters(
        config: &PolicyConfig,
        tokenizer: PolicyTokenizer,
        parameters: Parameters,
        seed: Seed,
    ) -> Result<Self, PolicyError> {
        let start = Checkpoint {
            policy: Part::new(Arc::new(parameters)),
            named: BTreeMap::new(),
            critic: None,
            snapshots: BTreeMap::new(),
        };
        Self::start(config, tokenizer, start, seed)
    }

    /// The policy that [`save`](Self::save) wrote into a folder. Sizes come from the folder; of `config` only the device
    /// and the limits count, and whether new adapters are trained over it.
    ///
    /// # Errors
    /// When a file is missing or does not fit, or a thread cannot be started.
    pub fn open(dir: &Path, config: &PolicyConfig) -> Result<Self, PolicyError> {
        let tokenizer = PolicyTokenizer::load(dir)?;
        // Checks device and limits; the shape itself is the folder's.
        config.shape(tokenizer.vocabulary())?;
        let start = checkpoint::load(dir, None)?;
        Self::start(config, tokenizer, start, Seed::new(0))
    }

    /// `seed` is of initial adapters.
    fn start(
        config: &PolicyConfig,
        tokenizer: PolicyTokenizer,
        start: Checkpoint,
        seed: Seed,
    ) -> Result<Self, PolicyError> {
        let shape = start.policy.parameters.shape.clone();
        if shape.vocabulary < tokenizer.vocabulary() {
            return Err(PolicyError::Tokenizer(format!(
                "it has {} ids and the model {}",
                tokenizer.vocabulary(),
                shape.vocabulary
            )));
        }
        let failed = |error: std::io::Error| PolicyError::Internal(format!("a thread could not be started: {error}"));
        let rotary = Arc::new(RotaryTable::new(&shape));
        let runner = BatchRunner::new(config, rotary.clone())?;
        let limits = SchedulerLimits {
            // One batch for a device: threads would take turns on it.
            threads: if runner.device().is_some() { 1 } else { config.thread_count() },
            batch_wait_ms_max: config.batch_wait_ms_max,
            kv_cache_bytes_max: config.kv_cache_bytes_max,
            kv_cache_idle_bytes_max: config.kv_cache_idle_bytes_max,
            swap_in_flight: config.swap_in_flight,
            requests_waiting_max: config.requests_waiting_max,
            stream_chunk_tokens: config.stream_chunk_tokens,
            kept_tokens_max: config.kept_tokens_max,
        };
        let (start, weights) = if let Some(lora) = &config.lora {
            adapt(start, lora, seed, &rotary)?
        } else {
            let weights = ModelWeights::Full(start.policy.parameters.clone());
            (with_copies(start, &config.models), weights)
        };
        let snapshots = start.snapshots.clone();
        let (models, critic) = trained(start, &weights);
        // The limits are for all models together.
        let limits = SchedulerLimits {
            kv_cache_bytes_max: limits.kv_cache_bytes_max / models.len(),
            kv_cache_idle_bytes_max: limits.kv_cache_idle_bytes_max / models.len(),
            ..limits
        };
        let first = |(name, model): (&ModelName, &Trained)| {
            let publisher = Publisher::new(&shape, rotary.clone(), config.thread_count(), runner.device());
            Ok((name.clone(), Arc::new(model.publish(&tokenizer, limits, publisher)?)))
        };
        let published: BTreeMap<_, _> = models.iter().map(first).collect::<Result<_, _>>().map_err(failed)?;
        let published = Arc::new(published);
        let Some(policy) = published.get(&ModelName::Policy).cloned() else {
            return Err(PolicyError::Internal("there is no policy".to_owned()));
        };
        let snapshot = |(name, parameters)| (name, weights.with_trained(parameters));
        let trainer = Trainer {
            models,
            critic,
            offers_critic: config.critic.is_some(),
            snapshots: snapshots.into_iter().map(snapshot).collect(),
            runner,
            tokenizer: tokenizer.clone(),
            published: published.clone(),
        };
        let (commands, received) = mpsc::channel(COMMANDS_MAX);
        std::thread::Builder::new()
            .name("policy-train".to_owned())
            .spawn(move || trainer.run(received))
            .map_err(failed)?;
        let roles = config.roles.iter().map(|(role, model)| (role.clone(), ModelName::Named(model.as_str().into())));
        let inner = Arc::new(Inner { commands, tokenizer, shape, models: published, roles: roles.collect() });
        Ok(Self { inner, model: ModelName::Policy, published: policy })
    }

    /// A handle to a model beside the policy, by its name in the config.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn named(&self, name: &str) -> Result<Self, PolicyError> {
        let model = ModelName::Named(name.into());
        let unknown = || PolicyError::UnknownModel(name.to_owned());
        let published = self.inner.models.get(&model).cloned().ok_or_else(unknown)?;
        Ok(Self { inner: self.inner.clone(), model, published })
    }

    /// Handles to all models: the policy, then those beside it in the order of their names.
    pub fn all(&self) -> impl Iterator<Item = Self> {
        let handle = |(model, published): (&ModelName, &Arc<Published>)| Self {
            inner: self.inner.clone(),
            model: model.clone(),
            published: published.clone(),
        };
        self.inner.models.iter().map(handle)
    }

    /// The model's name in the config; `None` is the policy.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.model.name()
    }

    /// This model as a language model for rollouts; of the policy's handle, with the models that the config gives agent roles to
    /// answering those. Live sessions are the live rollouts: open one before its attempt starts and drop it as soon as the
    /// attempt has ended.
    #[must_use]
    pub fn backend(&self) -> Arc<dyn LlmBackend> {
        let speaker = |model: &ModelName| {
            let generator = self.inner.models.get(model)?.generator.clone();
            Some(Speaker { model: model.name().map(Arc::from), generator })
        };
        let roles = if self.model == ModelName::Policy { Some(&self.inner.roles) } else { None };
        let by_role = roles.into_iter().flatten().filter_map(|(role, model)| Some((role.clone(), speaker(model)?)));
        let own = Speaker { model: self.model.name().map(Arc::from), generator: self.published.generator.clone() };
        Arc::new(PolicyBackend::new(own, by_role.collect(), self.inner.tokenizer.clone()))
    }

    /// Version of the newest weights.
    #[must_use]
    pub fn version(&self) -> PolicyVersion {
        self.published.version()
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

    /// Number of weights that are trained.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.published.weights().count()
    }

    /// The policy's tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &PolicyTokenizer {
        &self.inner.tokenizer
    }

    /// Hash of this model's newest weights, every bit of them; those under an adapter count too.
    #[must_use]
    pub fn weights_hash(&self) -> ContentHash {
        self.published.weights().hash()
    }

    /// Running totals of generation.
    #[must_use]
    pub fn statistics(&self) -> EngineStatistics {
        let scheduler = &self.published.generator.scheduler;
        let (counters, memory) = (&scheduler.counters, &scheduler.memory);
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        EngineStatistics {
            calls: get(&counters.calls),
            prompt_tokens: get(&counters.prompt_tokens),
            reused_tokens: get(&counters.reused_tokens),
            completion_tokens: get(&counters.completion_tokens),
            decode_steps: get(&counters.forward_passes),
            busy_seconds: get(&counters.busy_ns) as f64 / 1e9,
            kv_cache_bytes: memory.bytes() as u64,
            evicted_blocks: get(&memory.blocks_evicted),
            calls_put_back: get(&counters.calls_put_back),
            recomputed_tokens: get(&counters.recomputed_tokens),
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
    /// When a row or the loss does not fit, or the KL term has no snapshot named `reference`. Adapters need none: without it
    /// their reference is the base.
    pub async fn forward_backward(
        &self,
        rows: Vec<TrainingRow>,
        loss: LossSpec,
    ) -> Result<ForwardBackwardReport, PolicyError> {
        let model = self.model.clone();
        self.ask(|answer| Command::ForwardBackward(model, rows, loss, answer)).await
    }

    /// Adds the gradient that follows from given derivatives of a loss with respect to each row's log-probs and entropies.
    ///
    /// # Errors
    /// When a row does not fit, or a derivative is not finite.
    pub async fn backward(&self, rows: Vec<TrainingRow>, derivatives: Vec<RowDerivatives>) -> Result<(), PolicyError> {
        let model = self.model.clone();
        self.ask(|answer| Command::Backward(model, rows, derivatives, answer)).await
    }

    /// The critic's value of each masked token of the rows: what it expects when it has seen all before that token. One list
    /// per row with an entry per id, 0 outside the mask.
    ///
    /// The first call of a verb of the critic makes it: the policy's weights of that moment with a value head of zeros.
    ///
    /// # Errors
    /// When the config offers no critic or a row does not fit.
    pub async fn values(&self, rows: Vec<TrainingRow>) -> Result<Vec<Vec<f32>>, PolicyError> {
        self.ask(|answer| Command::Values(rows, answer)).await
    }

    /// Adds to the critic's gradient what follows from given derivatives of a loss with respect to each row's values: an
    /// empty list for zeros, or one entry per id, of which those outside the mask are not read.
    ///
    /// # Errors
    /// When the config offers no critic, a row does not fit, or a derivative is not finite.
    pub async fn values_backward(&self, rows: Vec<TrainingRow>, d_values: Vec<Vec<f32>>) -> Result<(), PolicyError> {
        self.ask(|answer| Command::ValuesBackward(rows, d_values, answer)).await
    }

    /// Applies the critic's gathered gradient. The report's version is the policy's, which stays.
    ///
    /// # Errors
    /// When the config offers no critic, no gradient was gathered, or a number of the step is not finite or negative.
    pub async fn critic_step(&self, step: OptimiserStep) -> Result<OptimiserReport, PolicyError> {
        self.ask(|answer| Command::CriticStep(step, answer)).await
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
        let (adapter, snapshot) = (self.model.clone(), model);
        self.ask(|answer| Command::Forward(adapter, rows, snapshot, answer)).await
    }

    /// Applies the gathered gradient and publishes the new weights under the next version. A gradient that is not finite
    /// is thrown away and the step skipped.
    ///
    /// # Errors
    /// When no gradient was gathered, or a number of the step is not finite or negative.
    pub async fn optimiser_step(&self, step: OptimiserStep) -> Result<OptimiserReport, PolicyError> {
        let model = self.model.clone();
        self.ask(|answer| Command::OptimiserStep(model, step, answer)).await
    }

    /// Freezes a copy of the weights under a name; an earlier one of that name is replaced. `reference` is the one that
    /// the KL term uses.
    ///
    /// # Errors
    /// When the name is empty or too long, or there are too many snapshots.
    pub async fn snapshot(&self, name: impl Into<String>) -> Result<(), PolicyError> {
        let (model, name) = (self.model.clone(), name.into());
        self.ask(|answer| Command::Snapshot(model, name, answer)).await
    }

    /// Writes the adapter into a folder as PEFT reads it.
    ///
    /// # Errors
    /// When all weights are trained, or a file cannot be written.
    pub async fn export_adapter(&self, dir: &Path) -> Result<(), PolicyError> {
        let (model, dir) = (self.model.clone(), dir.to_owned());
        self.ask(|answer| Command::ExportAdapter(model, dir, answer)).await
    }

    /// Takes over an adapter of PEFT's, forgets moments and gradient of the one before, and publishes it under the next
    /// version.
    ///
    /// # Errors
    /// When all weights are trained, or the adapter has another rank, scale, targets or sizes than the config says.
    pub async fn import_adapter(&self, dir: &Path) -> Result<(), PolicyError> {
        let (model, dir) = (self.model.clone(), dir.to_owned());
        self.ask(|answer| Command::ImportAdapter(model, dir, answer)).await
    }

    /// Writes model and tokenizer into a folder that Hugging Face's libraries read; an adapter is merged into its base.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub async fn export_merged(&self, dir: &Path) -> Result<(), PolicyError> {
        let (model, dir) = (self.model.clone(), dir.to_owned());
        self.ask(|answer| Command::ExportMerged(model, dir, answer)).await
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

/// Puts further whole models beside the policy: copies of it, unless a checkpoint has them already.
fn with_copies(mut start: Checkpoint, names: &[String]) -> Checkpoint {
    let (mut kept, parameters) = (std::mem::take(&mut start.named), start.policy.parameters.clone());
    let mut part = |name: &String| kept.remove(name).unwrap_or_else(|| Part::new(parameters.clone()));
    start.named = names.iter().map(|name| (name.clone(), part(name))).collect();
    start
}

/// Puts adapters over a model, which stays as it is from now on: fresh ones, or the policy's own from a folder.
fn adapt(
    model: Checkpoint,
    lora: &LoraConfig,
    seed: Seed,
    rotary: &Arc<RotaryTable>,
) -> Result<(Checkpoint, ModelWeights), PolicyError> {
    let layout = Arc::new(AdapterLayout::new(lora));
    let shape = &model.policy.parameters.shape;
    let fresh = |name: &str| Part::new(Arc::new(layout.initial(shape, seed.child(name))));
    let policy = match &lora.adapter_directory {
        Some(dir) => Part::new(Arc::new(peft::load(dir, &layout, shape)?)),
        None => fresh("default"),
    };
    let start = Checkpoint {
        policy,
        named: lora.adapters.iter().map(|name| (name.clone(), fresh(name))).collect(),
        critic: None,
        snapshots: BTreeMap::new(),
    };
    let base = Arc::new(Base::new(model.policy.parameters, rotary.clone()));
    Ok((start, ModelWeights::Adapted { base, layout, adapter: None }))
}
