//! What an algorithm plugin may ask of the host. The sandbox translates `fulgurite:algorithm` into these types and the
//! trainer implements them, so that neither knows the other.

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::dataset::Split;
use crate::id::{PolicyVersion, RolloutId, TransitionId};
use crate::llm::{Message, Sampling};
use crate::outcome::OutcomeKind;
use crate::record::RolloutMode;
use crate::reward::Reward;
use crate::training::{ForwardBackwardReport, LossSpec, OptimiserReport, OptimiserStep, Stream};

/// Why the host refused a verb. One case per thing the plugin can do.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AlgorithmHostError {
    /// An argument is wrong: the text names it. A mistake of the plugin.
    #[error("invalid argument: {0}")]
    InvalidArgument(String),
    /// A rollout, transition, model or item that does not exist.
    #[error("unknown {kind} `{id}`")]
    Unknown {
        /// What kind of thing.
        kind: &'static str,
        /// The id given.
        id: String,
    },
    /// Not granted; the text is the line of config that would allow it.
    #[error("denied: {0}")]
    Denied(String),
    /// Too many rollouts of a step failed for reasons that are not the policy's.
    #[error("{excluded} of {total} rollouts failed for reasons that are not the policy's; most often: {most_frequent}")]
    TooManyFaults {
        /// Rollouts that failed.
        excluded: u64,
        /// Rollouts of the step's batches.
        total: u64,
        /// The most frequent fault with its detail.
        most_frequent: String,
    },
    /// The host does not offer this yet.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// The run is being stopped.
    #[error("the run is being stopped")]
    Stopping,
    /// The host itself failed.
    #[error("the host failed: {0}")]
    Failed(String),
}

/// A dataset item as an algorithm sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// The item's id.
    pub id: String,
    /// Its input, JSON text.
    pub input: String,
    /// Its reference, JSON text; `None` without the grant `read-reference`.
    pub reference: Option<String>,
    /// How often the split had been gone through when the item was drawn.
    pub epoch: u64,
}

/// A group of rollouts of one item.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupSpec {
    /// The item's id.
    pub item_id: String,
    /// How many rollouts.
    pub count: u32,
    /// What they are for.
    pub mode: RolloutMode,
    /// Sampling of the policy.
    pub sampling: Sampling,
    /// Fork each of them here.
    pub fork_of: Option<ForkRequest>,
}

/// Where to fork: the newest attempt of a finished rollout, before this event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForkRequest {
    /// The ancestor.
    pub rollout: RolloutId,
    /// Sequence of the first event that is not taken from it.
    pub event: u64,
}

/// How many rollouts of a batch to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitFor {
    /// All.
    All,
    /// k, and whatever else has ended by then.
    Count(u32),
}

/// One LLM call of a finished rollout, or an imported demonstration.
#[derive(Debug, Clone, PartialEq)]
pub struct TransitionView {
    /// Its id: what `forward_backward` takes.
    pub id: TransitionId,
    /// Index of the call.
    pub call_index: u64,
    /// Number of the event that the call is in its rollout.
    pub event: u64,
    /// Which agent asked.
    pub agent_role: String,
    /// The model that drew it, as verbs name it; the policy for demonstrations.
    pub model: ModelReference,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens that the policy drew (or that are trained on, for demonstrations).
    pub completion_tokens: u32,
    /// Whether it may be trained on.
    pub trainable: bool,
    /// Sum of the behaviour log-probs (nats).
    pub log_prob_sum: f64,
    /// The weights that drew it.
    pub policy_version: PolicyVersion,
    /// Hash of the prompt's tokens; 0 where they are not known.
    pub prompt_hash: u64,
    /// Hash of those of them that no earlier call of the rollout covers; 0 where there are none, or they are not known.
    pub observation_hash: u64,
    /// Rewards attached to this call.
    pub rewards: Vec<Reward>,
    /// The completion's text.
    pub text: String,
}

/// A finished rollout.
#[derive(Debug, Clone, PartialEq)]
pub struct TrajectoryView {
    /// Its id.
    pub rollout: RolloutId,
    /// Index of its group in the batch.
    pub group: u64,
    /// Its item.
    pub item_id: String,
    /// How it ended.
    pub outcome: OutcomeKind,
    /// Whether it counts in baseline and loss. `false` means a fault that is not the policy's, or a row that is too long.
    pub graded: bool,
    /// Accepted rewards, outcome rewards included.
    pub rewards: Vec<Reward>,
    /// Its calls in order.
    pub transitions: Vec<TransitionView>,
}

/// Weights of a transition's tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum Weights {
    /// The same for every token.
    Scalar(f32),
    /// One per completion token.
    PerToken(Vec<f32>),
}

/// Which tokens of a transition are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Those that the policy drew.
    Sampled,
    /// Those that it saw and that no earlier call of the rollout covers (tool results, new user turns).
    Observed,
}

/// One entry of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchEntry {
    /// Which transition.
    pub transition: TransitionId,
    /// What the weights multiply.
    pub stream: Stream,
    /// Which tokens.
    pub scope: Scope,
    /// The weights.
    pub weights: Weights,
    /// Pairs or groups entries for losses over several of them (DPO), and for
    /// [`Aggregation::PromptMean`](crate::training::Aggregation::PromptMean).
    pub group: Option<u64>,
}

/// Log-probs of one transition's completion tokens under a model.
#[derive(Debug, Clone, PartialEq)]
pub struct TransitionForward {
    /// Which transition.
    pub transition: TransitionId,
    /// One per completion token (nats).
    pub log_probs: Vec<f32>,
    /// One per completion token (nats).
    pub entropies: Vec<f32>,
    /// One per completion token; empty without a critic.
    pub values: Vec<f32>,
}

/// Derivatives of a plugin's own loss for one transition.
#[derive(Debug, Clone, PartialEq)]
pub struct TransitionGradient {
    /// Which transition.
    pub transition: TransitionId,
    /// d loss / d log-prob, one per completion token; empty for zeros.
    pub d_log_probs: Vec<f32>,
    /// d loss / d entropy, one per completion token; empty for zeros.
    pub d_entropies: Vec<f32>,
    /// d loss / d value, one per completion token; empty but for a critic.
    pub d_values: Vec<f32>,
}

/// A model as verbs name it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelReference {
    /// The policy that is being trained.
    Policy,
    /// A frozen copy, by the name that `snapshot` returned.
    Snapshot(String),
    /// A named model of the config: critic, teacher, adapter.
    Named(String),
}

/// Result of a verb.
pub type Verb<'a, T> = BoxFuture<'a, Result<T, AlgorithmHostError>>;

/// The host's side of `fulgurite:algorithm`.
pub trait AlgorithmHost: Send + Sync {
    /// The next `count` items of a split, in the epoch-shuffled order of the stage's cursor. `Test` is denied.
    fn next_items(&self, split: Split, count: u32) -> Verb<'_, Vec<Item>>;

    /// Enqueues groups of rollouts and returns the batch's number. Ids are derived from (stage, step, index).
    fn enqueue(&self, groups: Vec<GroupSpec>) -> Verb<'_, u64>;

    /// Waits for rollouts of a batch, until `deadline_ms` when given, and returns those that have ended and were not
    /// returned before, ordered by rollout index.
    fn await_batch(&self, batch: u64, wait: WaitFor, deadline_ms: Option<u64>) -> Verb<'_, Vec<TrajectoryView>>;

    /// Carries groups of a batch over to a later step, whole: those of their rollouts included that have been returned.
    fn carry(&self, batch: u64, groups: Vec<u64>) -> Verb<'_, ()>;

    /// Numbers of the batches that earlier steps carried over and that nobody has asked for since, oldest first.
    fn carried(&self) -> Verb<'_, Vec<u64>>;

    /// Cancels what has not ended of a batch.
    fn cancel_batch(&self, batch: u64) -> Verb<'_, ()>;

    /// Takes a demonstration: tokenised with the policy's template, trained on messages of the roles given.
    fn import(
        &self,
        messages: Vec<Message>,
        trainable_roles: Vec<String>,
        metadata: String,
    ) -> Verb<'_, TransitionView>;

    /// Keeps the log-probs of these transitions under the weights as they are, for the rest of the step, as π_old.
    fn anchor(&self, model: ModelReference, transitions: Vec<TransitionId>) -> Verb<'_, ()>;

    /// Adds the gradient of a loss over a whole optimiser batch.
    fn forward_backward(
        &self,
        model: ModelReference,
        batch: Vec<BatchEntry>,
        loss: LossSpec,
    ) -> Verb<'_, ForwardBackwardReport>;

    /// Log-probs, entropies and values without gradient.
    fn forward(&self, model: ModelReference, transitions: Vec<TransitionId>) -> Verb<'_, Vec<TransitionForward>>;

    /// Adds a gradient that the plugin computed.
    fn backward(&self, model: ModelReference, gradients: Vec<TransitionGradient>) -> Verb<'_, ()>;

    /// Applies the gathered gradient and publishes the new weights.
    fn optimiser_step(&self, model: ModelReference, step: OptimiserStep) -> Verb<'_, OptimiserReport>;

    /// Freezes a copy of a model and returns its name.
    fn snapshot(&self, model: ModelReference) -> Verb<'_, String>;

    /// Freezes a copy of every model as the reference of its KL term, in place of an earlier one.
    fn freeze_reference(&self) -> Verb<'_, ()>;

    /// Draws completions without an agent around them.
    fn sample(&self, model: ModelReference, messages: Vec<Message>, sampling: Sampling) -> Verb<'_, TransitionView>;

    /// Reads a prompt template; `None` as version is the newest. Returns its version and text.
    fn template(&self, name: String, version: Option<u64>) -> Verb<'_, (u64, String)>;

    /// Publishes a prompt template and returns the new version of the resources.
    fn publish_template(&self, name: String, text: String) -> Verb<'_, u64>;

    /// Records a scalar of the current step. Names are checked; values must be finite.
    fn scalar(&self, name: String, value: f64) -> Verb<'_, ()>;

    /// Records a line of text of the current step.
    fn note(&self, text: String) -> Verb<'_, ()>;
}

/// What a plugin says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AlgorithmDescription {
    /// Name.
    pub name: String,
    /// Version.
    pub version: String,
    /// JSON schema of its config, JSON text.
    pub config_schema: String,
    /// Default config, JSON text.
    pub defaults: String,
}

/// Whether a plugin wants another step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepResult {
    /// Call `step` again.
    Continue,
    /// The stage has ended.
    Done,
}
