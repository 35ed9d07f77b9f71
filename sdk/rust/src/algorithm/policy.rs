//! Training verbs.

mod loss;

use super::trajectories::{Message, Transition, TransitionId};
use super::{HostError, Sampling};
use crate::wit::algorithm::fulgurite::algorithm::common as wit_common;
use crate::wit::algorithm::fulgurite::algorithm::policy as wit;

pub use loss::{Aggregation, Correction, CorrectionRule, KlEstimator, Loss, RatioLevel, SequenceScope};

/// A model that verbs name.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Model {
    /// The policy that is being trained.
    #[default]
    Policy,
    /// A frozen copy, by the name that [`snapshot`] returned.
    Snapshot(String),
    /// A model that the run's config names: critic, teacher, adapter of an agent role.
    Named(String),
}

impl Model {
    pub(super) fn raise(model: wit_common::Model) -> Self {
        match model {
            wit_common::Model::Policy => Self::Policy,
            wit_common::Model::Snapshot(name) => Self::Snapshot(name),
            wit_common::Model::Named(name) => Self::Named(name),
        }
    }

    /// The snapshot that [`freeze_reference`] has made of it; of a snapshot none.
    #[must_use]
    pub fn reference(&self) -> Option<Self> {
        match self {
            Self::Policy => Some(Self::Snapshot("reference".to_owned())),
            Self::Named(name) => Some(Self::Snapshot(format!("{name}/reference"))),
            Self::Snapshot(_) => None,
        }
    }

    fn lower(&self) -> wit_common::Model {
        match self {
            Self::Policy => wit_common::Model::Policy,
            Self::Snapshot(name) => wit_common::Model::Snapshot(name.clone()),
            Self::Named(name) => wit_common::Model::Named(name.clone()),
        }
    }
}

/// What the weights of an entry multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Policy gradient: weights are advantages.
    Rl,
    /// Cross-entropy: weights are token weights.
    Ce,
    /// KL to the reference.
    RefKl,
}

/// Which tokens of a transition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Those that the policy drew.
    Sampled,
    /// Those that it saw for the first time in this call.
    Observed,
}

/// Weights of an entry.
#[derive(Debug, Clone, PartialEq)]
pub enum Weights {
    /// The same for every token.
    Scalar(f32),
    /// One per token of the scope.
    PerToken(Vec<f32>),
}

/// One entry of an optimiser batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    transition: TransitionId,
    stream: Stream,
    scope: Scope,
    weights: Weights,
    group: Option<u64>,
}

impl Entry {
    /// Trains a transition's sampled tokens with one weight.
    #[must_use]
    pub const fn new(transition: TransitionId, stream: Stream, weight: f32) -> Self {
        Self { transition, stream, scope: Scope::Sampled, weights: Weights::Scalar(weight), group: None }
    }

    /// Trains other tokens.
    #[must_use]
    pub const fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// One weight per token of the scope.
    #[must_use]
    pub fn weights(mut self, weights: Vec<f32>) -> Self {
        self.weights = Weights::PerToken(weights);
        self
    }

    /// Joins entries for losses over several of them, and for [`Aggregation::PromptMean`].
    #[must_use]
    pub const fn group(mut self, group: u64) -> Self {
        self.group = Some(group);
        self
    }

    /// Which transition.
    #[must_use]
    pub const fn transition(&self) -> &TransitionId {
        &self.transition
    }

    fn lower(&self) -> wit::Entry {
        wit::Entry {
            transition_id: self.transition.0.clone(),
            stream: match self.stream {
                Stream::Rl => wit::Stream::Rl,
                Stream::Ce => wit::Stream::Ce,
                Stream::RefKl => wit::Stream::RefKl,
            },
            scope: match self.scope {
                Scope::Sampled => wit::Scope::Sampled,
                Scope::Observed => wit::Scope::Observed,
            },
            weights: match &self.weights {
                Weights::Scalar(weight) => wit::Weights::Scalar(*weight),
                Weights::PerToken(weights) => wit::Weights::PerToken(weights.clone()),
            },
            group: self.group,
        }
    }
}

/// What a verb found, by name: a later host may tell more.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Numbers(Vec<(String, f64)>);

impl Numbers {
    /// The number of a name; none when this host does not tell it.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }

    /// All of them, in the host's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }
}

/// Keeps the log-probs of these transitions under the weights as they are as their π_old, for the rest of the step. Without
/// it π_old is μ, which is exact while they were drawn by the weights that the step started with.
///
/// # Errors
/// When a transition is unknown, or another model's.
pub fn anchor(model: &Model, transitions: &[TransitionId]) -> Result<(), HostError> {
    let ids: Vec<String> = transitions.iter().map(|id| id.0.clone()).collect();
    Ok(wit::anchor(&model.lower(), &ids)?)
}

/// Adds the gradient of one whole optimiser batch. The host splits it as it must; normalisers are global.
///
/// Numbers: `loss`, `trained-tokens`, `total-tokens`, `entropy`, `clip-fraction`, `approximate-kl`, `reference-kl`,
/// `ratio-mean`, `ratio-max`, `mismatch-mean`, `mismatch-max`, `mismatch-k3`, `effective-sample-size`, `cross-entropy`,
/// `correction-mean`, `correction-max`, `masked-share`, `advantage-mean`, `advantage-deviation`.
///
/// The mismatches are between the weights as they are now and those that drew the tokens (μ). In the first call of a step that
/// is how far trainer and sampler disagree; after an optimiser step what that has moved is in them as well. The host's own
/// `host/mismatch_mean` and `host/mismatch_k3` are of the former only.
///
/// # Errors
/// When a transition is unknown, cannot be trained on or was drawn by another model, or the loss is wrong.
pub fn forward_backward(model: &Model, batch: &[Entry], loss: &Loss) -> Result<Numbers, HostError> {
    let batch: Vec<_> = batch.iter().map(Entry::lower).collect();
    Ok(Numbers(wit::forward_backward(&model.lower(), &batch, &loss.lower())?))
}

/// Log-probs of one transition's sampled tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Forward {
    /// Which transition.
    pub transition: TransitionId,
    /// One per sampled token (nats).
    pub log_probs: Vec<f32>,
    /// One per sampled token (nats).
    pub entropies: Vec<f32>,
    /// One per sampled token; empty without a critic.
    pub values: Vec<f32>,
}

/// Log-probs, entropies and values, without gradient.
///
/// # Errors
/// When a transition is unknown.
pub fn forward(model: &Model, transitions: &[TransitionId]) -> Result<Vec<Forward>, HostError> {
    let ids: Vec<String> = transitions.iter().map(|id| id.0.clone()).collect();
    let results = wit::forward(&model.lower(), &ids)?.into_iter();
    Ok(results
        .map(|result| Forward {
            transition: TransitionId(result.transition_id),
            log_probs: result.log_probs,
            entropies: result.entropies,
            values: result.values,
        })
        .collect())
}

/// Derivatives of the plugin's own loss, as long as the lists of [`Forward`]; an empty list stands for zeros.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradient {
    /// Which transition.
    pub transition: TransitionId,
    /// d loss / d log-prob.
    pub d_log_probs: Vec<f32>,
    /// d loss / d entropy.
    pub d_entropies: Vec<f32>,
    /// d loss / d value; empty but for a critic.
    pub d_values: Vec<f32>,
}

/// Adds a gradient that the plugin computed.
///
/// # Errors
/// When a transition is unknown or another model's, or a list has the wrong length.
pub fn backward(model: &Model, gradients: &[Gradient]) -> Result<(), HostError> {
    let gradients: Vec<_> = gradients
        .iter()
        .map(|gradient| wit::Gradient {
            transition_id: gradient.transition.0.clone(),
            d_log_probs: gradient.d_log_probs.clone(),
            d_entropies: gradient.d_entropies.clone(),
            d_values: gradient.d_values.clone(),
        })
        .collect();
    Ok(wit::backward(&model.lower(), &gradients)?)
}

/// An `AdamW` step: betas 0.9 / 0.95, epsilon 1e-8.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimiserStep {
    /// Step size.
    pub learning_rate: f64,
    /// Decoupled weight decay; 0 is none.
    pub weight_decay: f64,
    /// Global gradient norm above which gradients are scaled down; none does not clip.
    pub gradient_norm_max: Option<f64>,
}

impl OptimiserStep {
    /// No decay; the gradient's norm is clipped at 1.
    #[must_use]
    pub const fn new(learning_rate: f64) -> Self {
        Self { learning_rate, weight_decay: 0.0, gradient_norm_max: Some(1.0) }
    }
}

/// Applies the gathered gradient and publishes new weights. Numbers: `gradient-norm`, `skipped` (1 when a gradient was not
/// finite), `policy-version`.
///
/// # Errors
/// When nothing was gathered or a value is wrong.
pub fn optimiser_step(model: &Model, step: &OptimiserStep) -> Result<Numbers, HostError> {
    let lowered = wit::OptimiserStep::new(step.learning_rate);
    lowered.set_weight_decay(step.weight_decay);
    lowered.set_gradient_norm_max(step.gradient_norm_max);
    Ok(Numbers(wit::optim_step(&model.lower(), &lowered)?))
}

/// Freezes a copy. It belongs to the stage and is a part of its checkpoints.
///
/// # Errors
/// When the model is unknown.
pub fn snapshot(model: &Model) -> Result<Model, HostError> {
    Ok(Model::Snapshot(wit::snapshot(&model.lower())?))
}

/// Makes every model as it is the reference of its own [`Loss::kl`]: the policy's is the snapshot `reference`, that of a named
/// model `NAME/reference`.
///
/// # Errors
/// When the host cannot.
pub fn freeze_reference() -> Result<(), HostError> {
    Ok(wit::freeze_reference()?)
}

/// Draws one completion without an agent around it.
///
/// # Errors
/// When the model is unknown or the messages do not fit its context.
pub fn sample(model: &Model, messages: &[Message], sampling: &Sampling) -> Result<Transition, HostError> {
    let messages: Vec<_> = messages.iter().cloned().map(Into::into).collect();
    Ok(Transition::new(wit::sample(&model.lower(), &messages, &sampling.lower())?))
}

/// Writes a model into the run's folder under a name.
///
/// # Errors
/// When the name is wrong or the host cannot write.
pub fn save(model: &Model, name: &str) -> Result<(), HostError> {
    Ok(wit::save(&model.lower(), name)?)
}

/// Loads what [`save`] wrote.
///
/// # Errors
/// When there is nothing of that name.
pub fn load(model: &Model, name: &str) -> Result<(), HostError> {
    Ok(wit::load(&model.lower(), name)?)
}
