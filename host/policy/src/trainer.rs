//! The training state and the thread that owns it. Verbs arrive as commands and run one after the other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use fulgurite_core::id::PolicyVersion;
use fulgurite_core::training::{
    ForwardBackwardReport, LossSpec, OptimiserReport, OptimiserStep, RowDerivatives, RowLogProbs, TrainingRow,
};
use tokio::sync::{mpsc, oneshot};

use crate::checkpoint::{self, Checkpoint, CheckpointView, Part, PartView};
use crate::error::PolicyError;
use crate::loss::BatchLoss;
use crate::optimiser::{AdamW, gradient_norm};
use crate::parallel;
use crate::parameters::{Parameters, Values};
use crate::peft;
use crate::predictor::Publisher;
use crate::scheduler::{Generator, SchedulerLimits};
use crate::tokenizer::PolicyTokenizer;
use crate::train::{BatchRunner, Objective, Outcome, check_derivatives, check_rows};
use crate::weights::ModelWeights;

/// Longest name of a snapshot in bytes.
const SNAPSHOT_NAME_BYTES_MAX: usize = 64;
/// Most snapshots of one model at once: each is a full copy of what is trained.
const SNAPSHOTS_MAX: usize = 16;
/// The snapshot that the KL term refers to.
const REFERENCE: &str = "reference";

pub(crate) type Answer<T> = oneshot::Sender<Result<T, PolicyError>>;

/// Which of an engine's models a verb is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ModelName {
    /// The policy; with LoRA its default adapter.
    Policy,
    /// A further adapter, or a further whole model.
    Named(Arc<str>),
}

/// What a handle asks for.
pub(crate) enum Command {
    ForwardBackward(ModelName, Vec<TrainingRow>, LossSpec, Answer<ForwardBackwardReport>),
    Backward(ModelName, Vec<TrainingRow>, Vec<RowDerivatives>, Answer<()>),
    Forward(ModelName, Vec<TrainingRow>, Option<String>, Answer<Vec<RowLogProbs>>),
    OptimiserStep(ModelName, OptimiserStep, Answer<OptimiserReport>),
    Snapshot(ModelName, String, Answer<()>),
    Values(Vec<TrainingRow>, Answer<Vec<Vec<f32>>>),
    ValuesBackward(Vec<TrainingRow>, Vec<Vec<f32>>, Answer<()>),
    CriticStep(OptimiserStep, Answer<OptimiserReport>),
    ExportAdapter(ModelName, PathBuf, Answer<()>),
    ImportAdapter(ModelName, PathBuf, Answer<()>),
    ExportMerged(ModelName, PathBuf, Answer<()>),
    Save(PathBuf, Answer<()>),
    Restore(PathBuf, Answer<()>),
    ResetOptimiser(Answer<()>),
}

/// The newest weights of one model, and what samples from them.
///
/// Every model has generating threads of its own: calls of different models are never in one batch.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) generator: Arc<Generator>,
    publisher: Publisher,
    newest: RwLock<(ModelWeights, PolicyVersion)>,
}

impl Published {
    pub(crate) fn weights(&self) -> ModelWeights {
        self.newest.read().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    pub(crate) fn version(&self) -> PolicyVersion {
        self.newest.read().unwrap_or_else(PoisonError::into_inner).1
    }

    fn set(&self, weights: ModelWeights, version: PolicyVersion) {
        self.generator.scheduler.publish(self.publisher.ready(&weights, version));
        *self.newest.write().unwrap_or_else(PoisonError::into_inner) = (weights, version);
    }
}

/// One model that is trained.
#[derive(Debug)]
pub(crate) struct Trained {
    weights: ModelWeights,
    optimiser: AdamW,
    gradient: Option<Values>,
    version: PolicyVersion,
}

impl Trained {
    /// From a checkpoint's part, whose tensors are those that `weights` trains.
    pub(crate) fn new(weights: &ModelWeights, part: Part) -> Self {
        let Part { parameters, optimiser, gradient, version } = part;
        Self { weights: weights.with_trained(parameters), optimiser, gradient, version }
    }

    /// Starts to sample from it.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(crate) fn publish(
        &self,
        tokenizer: &PolicyTokenizer,
        limits: SchedulerLimits,
        publisher: Publisher,
    ) -> std::io::Result<Published> {
        let first = publisher.ready(&self.weights, self.version);
        let generator = Arc::new(Generator::start(first, tokenizer.clone(), limits)?);
        Ok(Published { generator, publisher, newest: RwLock::new((self.weights.clone(), self.version)) })
    }

    fn view(&self) -> PartView<'_> {
        PartView {
            parameters: self.weights.trained(),
            optimiser: &self.optimiser,
            gradient: self.gradient.as_ref(),
            version: self.version,
        }
    }

    fn reset(&mut self) {
        self.optimiser = AdamW::new(self.weights.trained());
        self.gradient = None;
    }

    /// Runs a batch and adds its gradient to what has been gathered.
    fn gather(
        &mut self,
        runner: &BatchRunner,
        rows: Vec<TrainingRow>,
        objective: Objective,
    ) -> Result<Outcome, PolicyError> {
        let mut outcome = runner.run(self.weights.clone(), rows, objective)?;
        match (&mut self.gradient, outcome.gradient.take()) {
            (Some(total), Some(part)) => {
                let parts = [part];
                parallel::add(runner.threads(), total, &parts);
                for part in parts {
                    runner.recycle(part);
                }
            }
            (total, Some(part)) => *total = Some(part),
            (_, None) => {}
        }
        Ok(outcome)
    }

    /// Applies the gathered gradient. Returns its norm, and whether it was thrown away for not being finite.
    fn step(&mut self, runner: &BatchRunner, step: &OptimiserStep) -> Result<(f64, bool), PolicyError> {
        check_step(step)?;
        let gradient = self.gradient.take().ok_or(PolicyError::NoGradient)?;
        let threads = runner.threads();
        let norm = gradient_norm(&gradient, threads);
        let skipped = !norm.is_finite();
        if skipped {
            tracing::warn!(version = self.version.0, "the gradient is not finite: the step is skipped");
        } else {
            self.optimiser.step(Arc::make_mut(self.weights.trained_mut()), &gradient, norm, step, threads);
        }
        runner.recycle(gradient);
        Ok((norm, skipped))
    }
}

fn check_step(step: &OptimiserStep) -> Result<(), PolicyError> {
    let check = |name: &str, value: f64| {
        let fits = value.is_finite() && value >= 0.0;
        let error = || PolicyError::InvalidBatch(format!("`{name}` is {value}, it must be finite and not negative"));
        if fits { Ok(()) } else { Err(error()) }
    };
    check("learning_rate", step.learning_rate)?;
    check("weight_decay", step.weight_decay)?;
    check("gradient_norm_max", step.gradient_norm_max.unwrap_or(0.0))
}

/// The training state and the thread that owns it.
pub(crate) struct Trainer {
    /// The policy and those beside it.
    pub(crate) models: BTreeMap<ModelName, Trained>,
    /// Made when it is first asked for.
    pub(crate) critic: Option<Trained>,
    pub(crate) offers_critic: bool,
    pub(crate) snapshots: BTreeMap<String, ModelWeights>,
    pub(crate) runner: BatchRunner,
    pub(crate) tokenizer: PolicyTokenizer,
    pub(crate) published: Arc<BTreeMap<ModelName, Arc<Published>>>,
}

impl Trainer {
    /// Carries out commands until the last handle is gone.
    pub(crate) fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        while let Some(command) = commands.blocking_recv() {
            self.carry_out(command);
        }
    }

    /// A caller that no longer waits does not undo what it asked for.
    fn carry_out(&mut self, command: Command) {
        match command {
            Command::ForwardBackward(model, rows, loss, answer) => {
                drop(answer.send(self.forward_backward(&model, rows, loss)));
            }
            Command::Backward(model, rows, derivatives, answer) => {
                drop(answer.send(self.backward(&model, rows, derivatives)));
            }
            Command::Forward(model, rows, snapshot, answer) => {
                drop(answer.send(self.forward(&model, rows, snapshot.as_deref())));
            }
            Command::OptimiserStep(model, step, answer) => drop(answer.send(self.optimiser_step(&model, &step))),
            Command::Snapshot(model, name, answer) => drop(answer.send(self.snapshot(&model, &name))),
            Command::Values(rows, answer) => drop(answer.send(self.values(rows))),
            Command::ValuesBackward(rows, derivatives, answer) => {
                drop(answer.send(self.values_backward(rows, derivatives)));
            }
            Command::CriticStep(step, answer) => drop(answer.send(self.critic_step(&step))),
            Command::ExportAdapter(model, dir, answer) => drop(answer.send(self.export_adapter(&model, &dir))),
            Command::ImportAdapter(model, dir, answer) => drop(answer.send(self.import_adapter(&model, &dir))),
            Command::ExportMerged(model, dir, answer) => drop(answer.send(self.export_merged(&model, &dir))),
            Command::Save(dir, answer) => drop(answer.send(self.save(&dir))),
            Command::Restore(dir, answer) => drop(answer.send(self.restore(&dir))),
            Command::ResetOptimiser(answer) => {
                self.models.values_mut().chain(&mut self.critic).for_each(Trained::reset);
                drop(answer.send(Ok(())));
            }
        }
    }

    fn model(&self, model: &ModelName) -> Result<&Trained, PolicyError> {
        self.models.get(model).ok_or_else(|| unknown(model))
    }

    fn model_mut(&mut self, model: &ModelName) -> Result<&mut Trained, PolicyError> {
        self.models.get_mut(model).ok_or_else(|| unknown(model))
    }

    fn forward_backward(
        &mut self,
        model: &ModelName,
        rows: Vec<TrainingRow>,
        spec: LossSpec,
    ) -> Result<ForwardBackwardReport, PolicyError> {
        let weights = &self.model(model)?.weights;
        check_rows(weights.shape(), &rows)?;
        let reference = match spec.kl {
            // Adapters have one without asking: their base.
            Some(_) => match self.snapshots.get(&snapshot_key(model, REFERENCE)) {
                Some(snapshot) => Some(snapshot.clone()),
                None => Some(weights.base().ok_or_else(|| PolicyError::UnknownSnapshot(REFERENCE.to_owned()))?),
            },
            None => None,
        };
        let forward = || Ok(self.runner.run(weights.clone(), rows.clone(), Objective::Forward)?.log_probs);
        let loss = Box::new(BatchLoss::new(spec, &rows, forward)?);
        let trained = self.models.get_mut(model).ok_or_else(|| unknown(model))?;
        Ok(trained.gather(&self.runner, rows, Objective::Loss { loss, reference })?.report)
    }

    fn backward(
        &mut self,
        model: &ModelName,
        rows: Vec<TrainingRow>,
        derivatives: Vec<RowDerivatives>,
    ) -> Result<(), PolicyError> {
        check_rows(self.model(model)?.weights.shape(), &rows)?;
        let lists = derivatives.iter().map(|row| [row.log_probs.as_slice(), row.entropies.as_slice()]);
        check_derivatives(&rows, lists)?;
        let trained = self.models.get_mut(model).ok_or_else(|| unknown(model))?;
        trained.gather(&self.runner, rows, Objective::Derivatives(derivatives)).map(|_| ())
    }

    fn forward(
        &self,
        model: &ModelName,
        rows: Vec<TrainingRow>,
        snapshot: Option<&str>,
    ) -> Result<Vec<RowLogProbs>, PolicyError> {
        let trained = &self.model(model)?.weights;
        check_rows(trained.shape(), &rows)?;
        let weights = match snapshot {
            Some(name) => {
                let found = self.snapshots.get(&snapshot_key(model, name));
                found.ok_or_else(|| PolicyError::UnknownSnapshot(name.to_owned()))?
            }
            None => trained,
        };
        Ok(self.runner.run(weights.clone(), rows, Objective::Forward)?.log_probs)
    }

    fn optimiser_step(&mut self, model: &ModelName, step: &OptimiserStep) -> Result<OptimiserReport, PolicyError> {
        let (gradient_norm, skipped) = {
            let trained = self.models.get_mut(model).ok_or_else(|| unknown(model))?;
            trained.step(&self.runner, step)?
        };
        if !skipped {
            self.publish_next(model)?;
        }
        Ok(OptimiserReport { gradient_norm, skipped, policy_version: self.model(model)?.version })
    }

    /// Publishes a model's weights under its next version. Each model counts its own: how many versions old something is says
    /// how often its model has changed since.
    fn publish_next(&mut self, model: &ModelName) -> Result<(), PolicyError> {
        self.model_mut(model)?.version.0 += 1;
        self.publish(model)
    }

    fn publish(&self, model: &ModelName) -> Result<(), PolicyError> {
        let trained = self.model(model)?;
        if let Some(published) = self.published.get(model) {
            published.set(trained.weights.clone(), trained.version);
        }
        Ok(())
    }

    /// The critic and the runner. It is made now if it has not been.
    fn critic(&mut self) -> Result<(&mut Trained, &BatchRunner), PolicyError> {
        if !self.offers_critic {
            return Err(PolicyError::NoCritic);
        }
        if self.critic.is_none() {
            let weights = self.model(&ModelName::Policy)?.weights.critic();
            let part = Part::new(weights.trained().clone());
            self.critic = Some(Trained::new(&weights, part));
        }
        let critic = self.critic.as_mut().ok_or(PolicyError::NoCritic)?;
        Ok((critic, &self.runner))
    }

    fn values(&mut self, rows: Vec<TrainingRow>) -> Result<Vec<Vec<f32>>, PolicyError> {
        let (critic, runner) = self.critic()?;
        check_rows(critic.weights.shape(), &rows)?;
        Ok(runner.run(critic.weights.clone(), rows, Objective::Values)?.values)
    }

    fn values_backward(&mut self, rows: Vec<TrainingRow>, derivatives: Vec<Vec<f32>>) -> Result<(), PolicyError> {
        let (critic, runner) = self.critic()?;
        check_rows(critic.weights.shape(), &rows)?;
        check_derivatives(&rows, derivatives.iter().map(|row| [row.as_slice()]))?;
        critic.gather(runner, rows, Objective::ValueDerivatives(derivatives)).map(|_| ())
    }

    /// The report's version is the policy's: a critic publishes nothing.
    fn critic_step(&mut self, step: &OptimiserStep) -> Result<OptimiserReport, PolicyError> {
        let (critic, runner) = self.critic()?;
        let (gradient_norm, skipped) = critic.step(runner, step)?;
        Ok(OptimiserReport { gradient_norm, skipped, policy_version: self.model(&ModelName::Policy)?.version })
    }

    fn snapshot(&mut self, model: &ModelName, name: &str) -> Result<(), PolicyError> {
        if name.is_empty() || name.len() > SNAPSHOT_NAME_BYTES_MAX || name.contains('/') {
            return Err(PolicyError::InvalidBatch(format!(
                "a snapshot's name has 1 to {SNAPSHOT_NAME_BYTES_MAX} bytes and no `/`"
            )));
        }
        let key = snapshot_key(model, name);
        let of_model = |key: &&String| key.rsplit_once('/').map(|(of, _)| of) == model.name();
        if self.snapshots.keys().filter(of_model).count() >= SNAPSHOTS_MAX && !self.snapshots.contains_key(&key) {
            return Err(PolicyError::InvalidBatch(format!("there are {SNAPSHOTS_MAX} snapshots of it already")));
        }
        let weights = self.model(model)?.weights.clone();
        self.snapshots.insert(key, weights);
        Ok(())
    }

    fn export_adapter(&self, model: &ModelName, dir: &Path) -> Result<(), PolicyError> {
        let weights = &self.model(model)?.weights;
        let ground = weights.ground().ok_or_else(no_adapters)?;
        peft::save(dir, ground.layout, weights.trained())
    }

    fn import_adapter(&mut self, model: &ModelName, dir: &Path) -> Result<(), PolicyError> {
        let weights = &self.model(model)?.weights;
        let ground = weights.ground().ok_or_else(no_adapters)?;
        let adapter = Arc::new(peft::load(dir, ground.layout, ground.shape)?);
        let weights = weights.clone();
        *self.model_mut(model)? = Trained::new(&weights, Part::new(adapter));
        self.publish_next(model)
    }

    fn export_merged(&self, model: &ModelName, dir: &Path) -> Result<(), PolicyError> {
        let merged = self.model(model)?.weights.merged();
        std::fs::create_dir_all(dir).map_err(PolicyError::io(dir))?;
        self.tokenizer.save(dir)?;
        checkpoint::save_model(dir, &merged, self.tokenizer.ends())
    }

    fn save(&self, dir: &Path) -> Result<(), PolicyError> {
        let policy = self.model(&ModelName::Policy)?;
        let named = self.models.iter().filter_map(|(name, trained)| match name {
            ModelName::Named(name) => Some((&**name, trained.view())),
            ModelName::Policy => None,
        });
        let snapshots = self.snapshots.iter().map(|(name, weights)| (name.as_str(), &**weights.trained()));
        let view = CheckpointView {
            policy: policy.view(),
            named: named.collect(),
            critic: self.critic.as_ref().map(Trained::view),
            snapshots: snapshots.collect(),
        };
        std::fs::create_dir_all(dir).map_err(PolicyError::io(dir))?;
        self.tokenizer.save(dir)?;
        checkpoint::save(dir, &view, policy.weights.ground(), &self.tokenizer)
    }

    fn restore(&mut self, dir: &Path) -> Result<(), PolicyError> {
        let weights = self.model(&ModelName::Policy)?.weights.clone();
        let loaded = checkpoint::load(dir, weights.ground())?;
        let known: Vec<&str> = self.models.keys().filter_map(ModelName::name).collect();
        let reason = if loaded.policy.parameters.shape != *weights.shape() {
            Some("its model has other sizes than this policy")
        } else if PolicyTokenizer::load(dir)?.hash() != self.tokenizer.hash() {
            Some("its tokenizer or chat template is not this policy's")
        } else if !loaded.named.keys().map(String::as_str).eq(known) {
            Some("it has other adapters or further models than the config names")
        } else if loaded.critic.is_some() && !self.offers_critic {
            Some("it has a critic, and the config has no [policy.local.critic]")
        } else {
            None
        };
        if let Some(reason) = reason {
            return Err(PolicyError::Checkpoint { path: dir.to_owned(), reason: reason.to_owned() });
        }
        let snapshots = loaded.snapshots.clone();
        (self.models, self.critic) = trained(loaded, &weights);
        let snapshot = |(name, parameters): (String, Arc<Parameters>)| (name, weights.with_trained(parameters));
        self.snapshots = snapshots.into_iter().map(snapshot).collect();
        for model in self.models.keys() {
            self.publish(model)?;
        }
        Ok(())
    }
}

/// The models of a checkpoint; `weights` is any of those that share what is frozen.
pub(crate) fn trained(
    checkpoint: Checkpoint,
    weights: &ModelWeights,
) -> (BTreeMap<ModelName, Trained>, Option<Trained>) {
    let further = checkpoint.named.into_iter().map(|(name, part)| (ModelName::Named(name.into()), part));
    let parts = std::iter::once((ModelName::Policy, checkpoint.policy)).chain(further);
    let models = parts.map(|(name, part)| (name, Trained::new(weights, part))).collect();
    let critic = checkpoint.critic.map(|part| Trained::new(&ModelWeights::Critic(part.parameters.clone()), part));
    (models, critic)
}

impl ModelName {
    pub(crate) fn name(&self) -> Option<&str> {
        match self {
            Self::Policy => None,
            Self::Named(name) => Some(name),
        }
    }
}

/// Models have snapshots of their own: no name of one has a slash.
fn snapshot_key(model: &ModelName, name: &str) -> String {
    model.name().map_or_else(|| name.to_owned(), |model| format!("{model}/{name}"))
}

fn unknown(model: &ModelName) -> PolicyError {
    PolicyError::UnknownModel(model.name().unwrap_or("policy").to_owned())
}

fn no_adapters() -> PolicyError {
    PolicyError::InvalidBatch("all weights are trained: there is no adapter; see [policy.local.lora]".to_owned())
}
