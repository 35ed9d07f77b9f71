//! What has happened: finished rollouts and their calls, and demonstrations from outside.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::HostError;
use super::policy::Model;
use super::rollouts::RolloutId;
use crate::types::Role;
use crate::wit::algorithm::fulgurite::algorithm::trajectories as wit;

/// Names a transition: one LLM call, or an imported demonstration.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TransitionId(pub String);

/// Who gave a reward. Stamped by the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RewardSource {
    /// The run's grader.
    Grader,
    /// A tool.
    Tool,
    /// The host: rewards of outcomes and declared terms.
    Host,
    /// The agent itself.
    Agent,
    /// A client outside the sandbox.
    External,
}

/// A reward. Larger is better; the value is finite.
#[derive(Debug, Clone, PartialEq)]
pub struct Reward {
    /// What is measured.
    pub dimension: String,
    /// How much.
    pub value: f64,
    /// Who gave it.
    pub source: RewardSource,
    /// The LLM call that it belongs to (from 0); none is the whole rollout.
    pub llm_call: Option<u64>,
}

impl From<wit::Reward> for Reward {
    fn from(reward: wit::Reward) -> Self {
        let source = match reward.source {
            wit::RewardSource::Grader => RewardSource::Grader,
            wit::RewardSource::Tool => RewardSource::Tool,
            wit::RewardSource::Host => RewardSource::Host,
            wit::RewardSource::Agent => RewardSource::Agent,
            wit::RewardSource::External => RewardSource::External,
        };
        Self { dimension: reward.dimension, value: reward.value, source, llm_call: reward.llm_call }
    }
}

/// One LLM call of a finished rollout, or an imported demonstration. Every method asks the host.
#[derive(Debug)]
pub struct Transition(wit::Transition);

impl Transition {
    pub(super) const fn new(inner: wit::Transition) -> Self {
        Self(inner)
    }

    /// Its name: what training verbs take.
    #[must_use]
    pub fn id(&self) -> TransitionId {
        TransitionId(self.0.id())
    }

    /// Counts the calls of the rollout from 0.
    #[must_use]
    pub fn call_index(&self) -> u64 {
        self.0.call_index()
    }

    /// Number of the event that the call is in its rollout: what `Group::fork_of` takes to make
    /// this call anew.
    #[must_use]
    pub fn event(&self) -> u64 {
        self.0.event()
    }

    /// Which agent asked.
    #[must_use]
    pub fn agent_role(&self) -> String {
        self.0.agent_role()
    }

    /// The model that drew it, which is the only one that it can train: the policy, or the one that the config gives the agent
    /// role to. The policy for demonstrations, which any model can be trained on.
    #[must_use]
    pub fn model(&self) -> Model {
        Model::raise(self.0.model())
    }

    /// Tokens of the prompt.
    #[must_use]
    pub fn prompt_tokens(&self) -> u32 {
        self.0.prompt_tokens()
    }

    /// Tokens that may be trained on.
    #[must_use]
    pub fn completion_tokens(&self) -> u32 {
        self.0.completion_tokens()
    }

    /// Whether it may be trained on.
    #[must_use]
    pub fn is_trainable(&self) -> bool {
        self.0.trainable()
    }

    /// Sum of the log-probs (nats) under the weights that drew it.
    #[must_use]
    pub fn log_prob_sum(&self) -> f64 {
        self.0.log_prob_sum()
    }

    /// The weights that drew it.
    #[must_use]
    pub fn policy_version(&self) -> u64 {
        self.0.policy_version()
    }

    /// Hash of the prompt's tokens: equal for calls of the run that saw the same; 0 where they are not known.
    #[must_use]
    pub fn prompt_hash(&self) -> u64 {
        self.0.prompt_hash()
    }

    /// Hash of the prompt's tokens that no earlier call of the rollout covers: what a tool answered, or all of a first call's
    /// prompt. Calls with equal ones were made after the same observation. 0 where there are none, or they are not known.
    #[must_use]
    pub fn observation_hash(&self) -> u64 {
        self.0.observation_hash()
    }

    /// Rewards of this call.
    #[must_use]
    pub fn rewards(&self) -> Vec<Reward> {
        self.0.rewards().into_iter().map(Into::into).collect()
    }

    /// The completion's text.
    #[must_use]
    pub fn text(&self) -> String {
        self.0.text()
    }
}

/// A finished rollout. Every method asks the host.
#[derive(Debug)]
pub struct Trajectory(wit::Trajectory);

impl Trajectory {
    pub(super) const fn new(inner: wit::Trajectory) -> Self {
        Self(inner)
    }

    /// Its name.
    #[must_use]
    pub fn rollout_id(&self) -> RolloutId {
        RolloutId(self.0.rollout_id())
    }

    /// Place of its group in the list that was enqueued.
    #[must_use]
    pub fn group(&self) -> usize {
        usize::try_from(self.0.group()).unwrap_or(usize::MAX)
    }

    /// Its item.
    #[must_use]
    pub fn item_id(&self) -> super::rollouts::ItemId {
        super::rollouts::ItemId(self.0.item_id())
    }

    /// How it ended: `completed`, `malformed-answer` and so on.
    #[must_use]
    pub fn outcome_kind(&self) -> String {
        self.0.outcome_kind()
    }

    /// False: a fault that is not the policy's. Keep it out of baseline and loss; it has no reward, not one of 0.
    #[must_use]
    pub fn is_graded(&self) -> bool {
        self.0.graded()
    }

    /// Accepted rewards of all sources.
    #[must_use]
    pub fn rewards(&self) -> Vec<Reward> {
        self.0.rewards().into_iter().map(Into::into).collect()
    }

    /// Sum of the rewards of a dimension; none when there is none.
    #[must_use]
    pub fn total(&self, dimension: &str) -> Option<f64> {
        self.0.total(dimension)
    }

    /// Its calls, in order.
    #[must_use]
    pub fn transitions(&self) -> Vec<Transition> {
        self.0.transitions().into_iter().map(Transition::new).collect()
    }
}

/// A tool call in a demonstration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DemonstratedCall {
    /// The tool's name.
    pub name: String,
    /// Its arguments.
    pub arguments: Value,
}

/// A message of a demonstration. As JSON: `{"role": "assistant", "content": "", "tool_calls": [{"name": "free_rooms",
/// "arguments": {"time": "10:00"}}]}`; content and tool calls may be left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    #[serde(default)]
    pub content: String,
    /// Tool calls of an assistant message.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<DemonstratedCall>,
}

impl Message {
    /// A message of plain text.
    #[must_use]
    pub fn text(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), tool_calls: vec![] }
    }
}

impl From<Message> for wit::Message {
    fn from(message: Message) -> Self {
        let tool_calls = if message.tool_calls.is_empty() {
            String::new()
        } else {
            let calls = message.tool_calls.into_iter();
            Value::Array(
                calls.map(|call| serde_json::json!({"name": call.name, "arguments": call.arguments})).collect(),
            )
            .to_string()
        };
        Self { role: message.role.into(), content: message.content, tool_calls }
    }
}

/// Takes a demonstration. Its tokens are made with the policy's chat template; messages of the trainable roles are trained
/// on. `metadata` is recorded as its origin.
///
/// # Errors
/// When the messages make no conversation, or it does not fit the policy's context.
pub fn import(messages: &[Message], trainable_roles: &[Role], metadata: &Value) -> Result<Transition, HostError> {
    let messages: Vec<_> = messages.iter().cloned().map(Into::into).collect();
    let roles: Vec<_> = trainable_roles.iter().copied().map(Into::into).collect();
    Ok(Transition::new(wit::import(&messages, &roles, &metadata.to_string())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demonstrations_read_as_documented() {
        let json = r#"[{"role":"user","content":"hi"},
            {"role":"assistant","tool_calls":[{"name":"free_rooms","arguments":{"time":"10:00"}}]}]"#;
        let messages: Vec<Message> = serde_json::from_str(json).unwrap();
        let lowered: Vec<wit::Message> = messages.into_iter().map(Into::into).collect();
        assert_eq!(lowered[0].tool_calls, "");
        assert_eq!(lowered[1].tool_calls, r#"[{"name":"free_rooms","arguments":{"time":"10:00"}}]"#);
        assert!(serde_json::from_str::<Message>(r#"{"role":"user","contents":"hi"}"#).is_err());
    }
}
