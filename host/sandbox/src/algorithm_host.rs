//! `fulgurite:algorithm`: the verbs of the host but for training, translated for whoever implements [`AlgorithmHost`].
#![expect(unreachable_pub, reason = "the generated bindings re-export the resources' types, which pub(crate) forbids")]

use std::future::Future;
use std::sync::Arc;

use fulgurite_core::algorithm::{
    AlgorithmHost, AlgorithmHostError, ForkRequest, GroupSpec, Item, ModelReference, TrajectoryView, TransitionView,
    WaitFor,
};
use fulgurite_core::dataset::Split;
use fulgurite_core::id::RolloutId;
use fulgurite_core::llm::{Message, Sampling, ToolCall};
use fulgurite_core::record::RolloutMode;
use fulgurite_core::reward::{Reward, RewardSource};
use wasmtime::component::Resource;

use crate::bindings::agent::fulgurite::types::types;
use crate::bindings::algorithm::fulgurite::algorithm::{common, llm, metrics, resources, rollouts, trajectories};
use crate::convert;
use crate::guest::GuestState;

/// What an algorithm's host functions work on. Without a host every verb answers `unsupported`: that is how a plugin is
/// asked for its description.
pub(crate) struct AlgorithmImports {
    pub(crate) host: Option<Arc<dyn AlgorithmHost>>,
}

pub(crate) type AlgorithmState = GuestState<AlgorithmImports>;
/// A verb's answer: the inner error is for the plugin.
pub(crate) type Answer<T> = wasmtime::Result<Result<T, common::HostError>>;

/// Sampling in the making.
pub struct SamplingDraft(Sampling);
/// A dataset item.
pub struct ItemHandle(Item);
/// A group in the making.
pub struct GroupDraft {
    item_id: String,
    count: u32,
    mode: RolloutMode,
    sampling: Sampling,
    fork_of: Option<(String, u64)>,
}
/// Enqueued groups.
pub struct BatchHandle(u64);
/// A transition.
pub struct TransitionHandle(Arc<TransitionView>);
/// A finished rollout.
pub struct TrajectoryHandle {
    view: TrajectoryView,
    transitions: Vec<Arc<TransitionView>>,
}

fn model_to_wit(model: &ModelReference) -> common::Model {
    match model {
        ModelReference::Policy => common::Model::Policy,
        ModelReference::Snapshot(name) => common::Model::Snapshot(name.clone()),
        ModelReference::Named(name) => common::Model::Named(name.clone()),
    }
}

fn refusal(error: AlgorithmHostError) -> common::HostError {
    let text = error.to_string();
    match error {
        AlgorithmHostError::InvalidArgument(text) => common::HostError::InvalidArgument(text),
        AlgorithmHostError::Unknown { .. } => common::HostError::Unknown(text),
        AlgorithmHostError::Denied(text) => common::HostError::Denied(text),
        AlgorithmHostError::TooManyFaults { .. } => common::HostError::TooManyFaults(text),
        AlgorithmHostError::Unsupported(text) => common::HostError::Unsupported(text),
        AlgorithmHostError::Stopping => common::HostError::Stopping,
        AlgorithmHostError::Failed(text) => common::HostError::Other(text),
    }
}

pub(crate) fn unsupported(what: &str) -> common::HostError {
    common::HostError::Unsupported(what.to_owned())
}

impl AlgorithmState {
    /// Calls the host with the plugin's watch stopped.
    ///
    /// Takes the state mutably because a shared reference to it cannot be held across an await: it is not `Sync`.
    pub(crate) async fn verb<T, F>(
        &mut self,
        call: impl FnOnce(Arc<dyn AlgorithmHost>) -> F,
    ) -> Result<T, common::HostError>
    where
        F: Future<Output = Result<T, AlgorithmHostError>>,
    {
        let Some(host) = &self.host.host else {
            return Err(unsupported("a plugin that describes itself has no host"));
        };
        self.meter.host(call(Arc::clone(host))).await.map_err(refusal)
    }

    pub(crate) fn push_transition(
        &mut self,
        view: Arc<TransitionView>,
    ) -> wasmtime::Result<Resource<TransitionHandle>> {
        Ok(self.table.push(TransitionHandle(view))?)
    }

    fn push_trajectories(&mut self, views: Vec<TrajectoryView>) -> wasmtime::Result<Vec<Resource<TrajectoryHandle>>> {
        let mut handles = Vec::with_capacity(views.len());
        for mut view in views {
            let transitions = std::mem::take(&mut view.transitions).into_iter().map(Arc::new).collect();
            handles.push(self.table.push(TrajectoryHandle { view, transitions })?);
        }
        Ok(handles)
    }

    async fn await_batch(
        &mut self,
        batch: &Resource<BatchHandle>,
        wait: WaitFor,
        deadline_ms: Option<u64>,
    ) -> Answer<Vec<Resource<TrajectoryHandle>>> {
        let batch = self.table.get(batch)?.0;
        match self.verb(|host| async move { host.await_batch(batch, wait, deadline_ms).await }).await {
            Ok(views) => Ok(Ok(self.push_trajectories(views)?)),
            Err(error) => Ok(Err(error)),
        }
    }
}

impl SamplingDraft {
    /// Sampling is checked by the verb that takes it, because setters cannot fail.
    pub(crate) fn checked(&self) -> Result<Sampling, common::HostError> {
        let sampling = &self.0;
        let wrong = |text: String| Err(common::HostError::InvalidArgument(text));
        if !sampling.temperature.is_finite() || sampling.temperature < 0.0 {
            return wrong(format!("temperature: {} is not a number >= 0", sampling.temperature));
        }
        if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
            return wrong(format!("top-p: {} is not in (0, 1]", sampling.top_p));
        }
        Ok(sampling.clone())
    }
}

impl common::Host for AlgorithmState {}

impl common::HostSampling for AlgorithmState {
    fn new(&mut self) -> wasmtime::Result<Resource<SamplingDraft>> {
        Ok(self.table.push(SamplingDraft(Sampling::default()))?)
    }

    fn set_temperature(&mut self, sampling: Resource<SamplingDraft>, value: f32) -> wasmtime::Result<()> {
        self.table.get_mut(&sampling)?.0.temperature = value;
        Ok(())
    }

    fn set_top_p(&mut self, sampling: Resource<SamplingDraft>, value: f32) -> wasmtime::Result<()> {
        self.table.get_mut(&sampling)?.0.top_p = value;
        Ok(())
    }

    fn set_top_k(&mut self, sampling: Resource<SamplingDraft>, value: u32) -> wasmtime::Result<()> {
        self.table.get_mut(&sampling)?.0.top_k = value;
        Ok(())
    }

    fn set_max_tokens(&mut self, sampling: Resource<SamplingDraft>, value: u32) -> wasmtime::Result<()> {
        self.table.get_mut(&sampling)?.0.max_tokens = value;
        Ok(())
    }

    fn set_seed(&mut self, sampling: Resource<SamplingDraft>, value: u64) -> wasmtime::Result<()> {
        self.table.get_mut(&sampling)?.0.seed = Some(value);
        Ok(())
    }

    fn drop(&mut self, sampling: Resource<SamplingDraft>) -> wasmtime::Result<()> {
        self.table.delete(sampling)?;
        Ok(())
    }
}

impl rollouts::HostItem for AlgorithmState {
    fn id(&mut self, item: Resource<ItemHandle>) -> wasmtime::Result<String> {
        Ok(self.table.get(&item)?.0.id.clone())
    }

    fn input(&mut self, item: Resource<ItemHandle>) -> wasmtime::Result<String> {
        Ok(self.table.get(&item)?.0.input.clone())
    }

    fn reference(&mut self, item: Resource<ItemHandle>) -> Answer<String> {
        let refused = || common::HostError::Denied("grants = [\"read-reference\"]".to_owned());
        Ok(self.table.get(&item)?.0.reference.clone().ok_or_else(refused))
    }

    fn epoch(&mut self, item: Resource<ItemHandle>) -> wasmtime::Result<u64> {
        Ok(self.table.get(&item)?.0.epoch)
    }

    fn drop(&mut self, item: Resource<ItemHandle>) -> wasmtime::Result<()> {
        self.table.delete(item)?;
        Ok(())
    }
}

impl rollouts::HostGroup for AlgorithmState {
    fn new(&mut self, item_id: String, count: u32) -> wasmtime::Result<Resource<GroupDraft>> {
        let draft =
            GroupDraft { item_id, count, mode: RolloutMode::Train, sampling: Sampling::default(), fork_of: None };
        Ok(self.table.push(draft)?)
    }

    fn set_mode(&mut self, group: Resource<GroupDraft>, mode: types::Mode) -> wasmtime::Result<()> {
        self.table.get_mut(&group)?.mode = convert::mode_from_wit(mode);
        Ok(())
    }

    fn set_sampling(&mut self, group: Resource<GroupDraft>, sampling: Resource<SamplingDraft>) -> wasmtime::Result<()> {
        let sampling = self.table.get(&sampling)?.0.clone();
        self.table.get_mut(&group)?.sampling = sampling;
        Ok(())
    }

    fn set_fork_of(&mut self, group: Resource<GroupDraft>, rollout_id: String, event: u64) -> wasmtime::Result<()> {
        self.table.get_mut(&group)?.fork_of = Some((rollout_id, event));
        Ok(())
    }

    fn drop(&mut self, group: Resource<GroupDraft>) -> wasmtime::Result<()> {
        self.table.delete(group)?;
        Ok(())
    }
}

impl rollouts::HostBatch for AlgorithmState {
    async fn await_all(
        &mut self,
        batch: Resource<BatchHandle>,
        deadline_ms: Option<u64>,
    ) -> Answer<Vec<Resource<TrajectoryHandle>>> {
        self.await_batch(&batch, WaitFor::All, deadline_ms).await
    }

    async fn await_count(
        &mut self,
        batch: Resource<BatchHandle>,
        count: u32,
        deadline_ms: Option<u64>,
    ) -> Answer<Vec<Resource<TrajectoryHandle>>> {
        self.await_batch(&batch, WaitFor::Count(count), deadline_ms).await
    }

    async fn carry(&mut self, batch: Resource<BatchHandle>, groups: Vec<u64>) -> Answer<()> {
        let batch = self.table.get(&batch)?.0;
        Ok(self.verb(|host| async move { host.carry(batch, groups).await }).await)
    }

    async fn cancel(&mut self, batch: Resource<BatchHandle>) -> Answer<()> {
        let batch = self.table.get(&batch)?.0;
        Ok(self.verb(|host| async move { host.cancel_batch(batch).await }).await)
    }

    fn drop(&mut self, batch: Resource<BatchHandle>) -> wasmtime::Result<()> {
        self.table.delete(batch)?;
        Ok(())
    }
}

fn group_spec(draft: &GroupDraft) -> Result<GroupSpec, common::HostError> {
    if draft.mode == RolloutMode::Test {
        let text = "mode `test`: the host alone draws the test split".to_owned();
        return Err(common::HostError::Denied(text));
    }
    let fork_of = match &draft.fork_of {
        None => None,
        Some((rollout, event)) => {
            let rollout = RolloutId::new(rollout.clone());
            let rollout = rollout.map_err(|error| common::HostError::InvalidArgument(format!("fork-of: {error}")))?;
            Some(ForkRequest { rollout, event: *event })
        }
    };
    Ok(GroupSpec {
        item_id: draft.item_id.clone(),
        count: draft.count,
        mode: draft.mode,
        sampling: SamplingDraft(draft.sampling.clone()).checked()?,
        fork_of,
    })
}

impl rollouts::Host for AlgorithmState {
    async fn next_items(&mut self, split: rollouts::Split, count: u32) -> Answer<Vec<Resource<ItemHandle>>> {
        let split = match split {
            rollouts::Split::Train => Split::Train,
            rollouts::Split::Val => Split::Val,
        };
        match self.verb(|host| async move { host.next_items(split, count).await }).await {
            Ok(items) => {
                let mut handles = Vec::with_capacity(items.len());
                for item in items {
                    handles.push(self.table.push(ItemHandle(item))?);
                }
                Ok(Ok(handles))
            }
            Err(error) => Ok(Err(error)),
        }
    }

    async fn enqueue(&mut self, groups: Vec<Resource<GroupDraft>>) -> Answer<Resource<BatchHandle>> {
        let mut specs = Vec::with_capacity(groups.len());
        for group in &groups {
            match group_spec(self.table.get(group)?) {
                Ok(spec) => specs.push(spec),
                Err(error) => return Ok(Err(error)),
            }
        }
        match self.verb(|host| async move { host.enqueue(specs).await }).await {
            Ok(batch) => Ok(Ok(self.table.push(BatchHandle(batch))?)),
            Err(error) => Ok(Err(error)),
        }
    }

    async fn carried(&mut self) -> Answer<Vec<Resource<BatchHandle>>> {
        match self.verb(|host| async move { host.carried().await }).await {
            Ok(batches) => {
                let handles = batches.into_iter().map(|batch| self.table.push(BatchHandle(batch)));
                Ok(Ok(handles.collect::<Result<_, _>>()?))
            }
            Err(error) => Ok(Err(error)),
        }
    }
}

fn reward_to_wit(reward: &Reward) -> trajectories::Reward {
    trajectories::Reward {
        dimension: reward.dimension.clone(),
        value: reward.value,
        source: match reward.source {
            RewardSource::Grader => trajectories::RewardSource::Grader,
            RewardSource::Tool => trajectories::RewardSource::Tool,
            RewardSource::Host => trajectories::RewardSource::Host,
            RewardSource::Agent => trajectories::RewardSource::Agent,
            RewardSource::External => trajectories::RewardSource::External,
        },
        llm_call: reward.call_index,
    }
}

impl trajectories::HostTransition for AlgorithmState {
    fn id(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<String> {
        Ok(self.table.get(&transition)?.0.id.0.clone())
    }

    fn event(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<u64> {
        Ok(self.table.get(&transition)?.0.event)
    }

    fn call_index(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<u64> {
        Ok(self.table.get(&transition)?.0.call_index)
    }

    fn agent_role(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<String> {
        Ok(self.table.get(&transition)?.0.agent_role.clone())
    }

    fn model(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<common::Model> {
        Ok(model_to_wit(&self.table.get(&transition)?.0.model))
    }

    fn prompt_tokens(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<u32> {
        Ok(self.table.get(&transition)?.0.prompt_tokens)
    }

    fn completion_tokens(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<u32> {
        Ok(self.table.get(&transition)?.0.completion_tokens)
    }

    fn trainable(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<bool> {
        Ok(self.table.get(&transition)?.0.trainable)
    }

    fn log_prob_sum(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<f64> {
        Ok(self.table.get(&transition)?.0.log_prob_sum)
    }

    fn policy_version(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<u64> {
        Ok(self.table.get(&transition)?.0.policy_version.0)
    }

    fn prompt_hash(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<u64> {
        Ok(self.table.get(&transition)?.0.prompt_hash)
    }

    fn observation_hash(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<u64> {
        Ok(self.table.get(&transition)?.0.observation_hash)
    }

    fn rewards(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<Vec<trajectories::Reward>> {
        Ok(self.table.get(&transition)?.0.rewards.iter().map(reward_to_wit).collect())
    }

    fn text(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<String> {
        Ok(self.table.get(&transition)?.0.text.clone())
    }

    fn drop(&mut self, transition: Resource<TransitionHandle>) -> wasmtime::Result<()> {
        self.table.delete(transition)?;
        Ok(())
    }
}

impl trajectories::HostTrajectory for AlgorithmState {
    fn rollout_id(&mut self, trajectory: Resource<TrajectoryHandle>) -> wasmtime::Result<String> {
        Ok(self.table.get(&trajectory)?.view.rollout.as_str().to_owned())
    }

    fn group(&mut self, trajectory: Resource<TrajectoryHandle>) -> wasmtime::Result<u64> {
        Ok(self.table.get(&trajectory)?.view.group)
    }

    fn item_id(&mut self, trajectory: Resource<TrajectoryHandle>) -> wasmtime::Result<String> {
        Ok(self.table.get(&trajectory)?.view.item_id.clone())
    }

    fn outcome_kind(&mut self, trajectory: Resource<TrajectoryHandle>) -> wasmtime::Result<String> {
        Ok(self.table.get(&trajectory)?.view.outcome.as_str().to_owned())
    }

    fn graded(&mut self, trajectory: Resource<TrajectoryHandle>) -> wasmtime::Result<bool> {
        Ok(self.table.get(&trajectory)?.view.graded)
    }

    fn rewards(&mut self, trajectory: Resource<TrajectoryHandle>) -> wasmtime::Result<Vec<trajectories::Reward>> {
        Ok(self.table.get(&trajectory)?.view.rewards.iter().map(reward_to_wit).collect())
    }

    fn total(&mut self, trajectory: Resource<TrajectoryHandle>, dimension: String) -> wasmtime::Result<Option<f64>> {
        let rewards = &self.table.get(&trajectory)?.view.rewards;
        let of_dimension = rewards.iter().filter(|reward| reward.dimension == dimension).map(|reward| reward.value);
        Ok(of_dimension.reduce(|sum, value| sum + value))
    }

    fn transitions(
        &mut self,
        trajectory: Resource<TrajectoryHandle>,
    ) -> wasmtime::Result<Vec<Resource<TransitionHandle>>> {
        let views = self.table.get(&trajectory)?.transitions.clone();
        views.into_iter().map(|view| self.push_transition(view)).collect()
    }

    fn drop(&mut self, trajectory: Resource<TrajectoryHandle>) -> wasmtime::Result<()> {
        self.table.delete(trajectory)?;
        Ok(())
    }
}

/// A tool call as a plugin writes it down.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenToolCall {
    name: String,
    arguments: serde_json::Value,
}

fn message_from_wit(index: usize, message: trajectories::Message) -> Result<Message, common::HostError> {
    let mut tool_calls = vec![];
    if !message.tool_calls.is_empty() {
        let written: Vec<WrittenToolCall> = serde_json::from_str(&message.tool_calls).map_err(|error| {
            let text =
                format!("messages: tool-calls of message {index} is not an array of name and arguments: {error}");
            common::HostError::InvalidArgument(text)
        })?;
        for (place, call) in written.into_iter().enumerate() {
            let id = format!("call-{index}-{place}");
            tool_calls.push(ToolCall { id, name: call.name, arguments: call.arguments.to_string() });
        }
    }
    Ok(Message { tool_calls, ..Message::text(convert::role_from_wit(message.role), message.content) })
}

pub(crate) fn messages_from_wit(messages: Vec<trajectories::Message>) -> Result<Vec<Message>, common::HostError> {
    messages.into_iter().enumerate().map(|(index, message)| message_from_wit(index, message)).collect()
}

impl trajectories::Host for AlgorithmState {
    async fn import(
        &mut self,
        messages: Vec<trajectories::Message>,
        trainable_roles: Vec<types::Role>,
        metadata: String,
    ) -> Answer<Resource<TransitionHandle>> {
        let messages = match messages_from_wit(messages) {
            Ok(messages) => messages,
            Err(error) => return Ok(Err(error)),
        };
        let roles = trainable_roles.into_iter().map(|role| convert::role_from_wit(role).as_str().to_owned()).collect();
        match self.verb(|host| async move { host.import(messages, roles, metadata).await }).await {
            Ok(view) => Ok(Ok(self.push_transition(Arc::new(view))?)),
            Err(error) => Ok(Err(error)),
        }
    }
}

impl resources::Host for AlgorithmState {
    async fn template(&mut self, name: String, version: Option<u64>) -> Answer<(u64, String)> {
        Ok(self.verb(|host| async move { host.template(name, version).await }).await)
    }

    async fn publish(&mut self, name: String, text: String) -> Answer<u64> {
        Ok(self.verb(|host| async move { host.publish_template(name, text).await }).await)
    }
}

impl llm::Host for AlgorithmState {
    async fn chat(
        &mut self,
        _endpoint: Option<String>,
        _messages: Vec<trajectories::Message>,
        _sampling: Resource<SamplingDraft>,
    ) -> Answer<String> {
        Ok(Err(unsupported("llm.chat: this host has no endpoints for algorithms")))
    }
}

impl metrics::Host for AlgorithmState {
    async fn scalar(&mut self, name: String, value: f64) -> Answer<()> {
        Ok(self.verb(|host| async move { host.scalar(name, value).await }).await)
    }

    async fn note(&mut self, text: String) -> Answer<()> {
        Ok(self.verb(|host| async move { host.note(text).await }).await)
    }
}
