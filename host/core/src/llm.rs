//! What crosses between an agent and a language model, and the trait behind which every model stands.

use std::sync::Arc;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::id::{AttemptKey, PolicyVersion, ResponseId};
pub use crate::kept_tokens::KeptTokens;
pub use crate::llm_stream::{LlmStream, whole_answer};
pub use crate::sampling::{Constraint, Sampling, TokenBias};
use crate::seed::Seed;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Instructions of the agent's author.
    System,
    /// The user, or the agent in the user's name.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// The role's name in chat templates and on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// A tool call that a model asked for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ToolCall {
    /// Minted by the host, unique in its attempt.
    pub id: String,
    /// The tool's name as the model wrote it.
    pub name: String,
    /// The arguments as JSON text. The host has checked that it parses, not that it fits the tool's schema.
    pub arguments: String,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// Tool calls of an assistant message.
    #[serde(default)]
    pub tool_calls: Vec<ToolCall>,
    /// Which tool call a tool message answers.
    #[serde(default)]
    pub tool_call_id: Option<String>,
    /// Which completion an assistant message repeats. The host splices the recorded token ids of that completion instead
    /// of tokenising its text again.
    #[serde(default)]
    pub response_id: Option<ResponseId>,
    /// An optional name of the speaker.
    #[serde(default)]
    pub name: Option<String>,
}

impl Message {
    /// A message of `role` with plain text.
    #[must_use]
    pub fn text(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), tool_calls: vec![], tool_call_id: None, response_id: None, name: None }
    }
}

/// A tool as a model sees it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ToolSpec {
    /// Name by which it is called.
    pub name: String,
    /// What it does, for the model.
    pub description: String,
    /// JSON schema of its arguments, as JSON text.
    pub parameters: String,
}

/// One call of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatRequest {
    /// The conversation so far, oldest first.
    pub messages: Vec<Message>,
    /// Tools that the model may call.
    pub tools: Vec<ToolSpec>,
    /// How to draw.
    pub sampling: Sampling,
    /// Which agent of a multi-agent system is asking; selective optimisation filters on it.
    pub agent_role: String,
    /// Which model endpoint to ask; `None` is the policy.
    pub endpoint: Option<String>,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model drew its end token or a stop text.
    Stop,
    /// The model asked for tools.
    ToolCalls,
    /// `max_tokens` was reached.
    Length,
    /// The model's context was full.
    ContextLength,
    /// Whoever asked dropped the call when it had read a part of the answer, and that part is what is recorded. Cases may
    /// only be added behind this one: it is recorded by its number.
    Cancelled,
}

/// Tokens of one call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the completion, the end token included.
    pub completion_tokens: u32,
}

/// What training needs of one call. All completion lists have one entry per completion token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenData {
    /// Token ids that the model saw, in order.
    pub prompt_ids: Vec<u32>,
    /// Token ids that the model drew, the end token included.
    pub completion_ids: Vec<u32>,
    /// Log-probability (nats) of each drawn token under the softmax at the request's temperature (at 1 when greedy),
    /// before any truncation. This is the behaviour policy's log-prob when nothing was truncated.
    pub log_probs: Vec<f32>,
    /// Log-probability (nats) of each drawn token under the processed distribution, after top-k, top-p, min-p and
    /// constraint. Empty when it equals `log_probs`.
    pub processed_log_probs: Vec<f32>,
    /// The weights that drew the tokens; the first of them, when they were swapped in flight.
    pub policy_version: PolicyVersion,
    /// The weights that drew each token; empty when they were the same for all. `log_probs` are each token's under its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub token_versions: Vec<PolicyVersion>,
    /// The tokens that each one was drawn from; empty when that was all of them for each, or when it was not recorded
    /// ([`NotTrainable::TruncatedSampling`]).
    #[serde(default, skip_serializing_if = "KeptTokens::is_empty")]
    pub kept: KeptTokens,
    /// Which of the config's models drew them, by its name; `None` is the policy. Each model counts versions of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<Arc<str>>,
}

impl TokenData {
    /// Log-probability (nats) of each token under the policy that drew it, as a trainer can compute it again: over what was
    /// kept, where that is recorded.
    #[must_use]
    pub fn behaviour_log_probs(&self) -> &[f32] {
        if self.kept.is_empty() { &self.log_probs } else { &self.processed_log_probs }
    }
}

/// [`Completion::tokens`] where fields have no names. Cases may only be added behind the others, as in
/// [`sampling`](crate::sampling): the first two are the bytes of an `Option<TokenData>` as it was first.
mod token_format {
    use std::borrow::Cow;
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{KeptTokens, TokenData};
    use crate::id::PolicyVersion;

    #[derive(Serialize, Deserialize)]
    enum Tokens<'a> {
        Nothing,
        One(Positional<'a>),
        /// Since schema 3 of the store.
        Swapped(Positional<'a>, Cow<'a, [PolicyVersion]>),
        /// Since schema 4 of the store.
        Kept(Positional<'a>, Cow<'a, [PolicyVersion]>, Cow<'a, KeptTokens>),
        /// Since schema 5 of the store.
        Named(Positional<'a>, Cow<'a, [PolicyVersion]>, Cow<'a, KeptTokens>, Arc<str>),
    }

    #[derive(Serialize, Deserialize)]
    struct Positional<'a> {
        prompt_ids: Cow<'a, [u32]>,
        completion_ids: Cow<'a, [u32]>,
        log_probs: Cow<'a, [f32]>,
        processed_log_probs: Cow<'a, [f32]>,
        policy_version: PolicyVersion,
    }

    impl Positional<'_> {
        fn into_data(self, token_versions: Vec<PolicyVersion>, kept: KeptTokens, model: Option<Arc<str>>) -> TokenData {
            TokenData {
                prompt_ids: self.prompt_ids.into_owned(),
                completion_ids: self.completion_ids.into_owned(),
                log_probs: self.log_probs.into_owned(),
                processed_log_probs: self.processed_log_probs.into_owned(),
                policy_version: self.policy_version,
                token_versions,
                kept,
                model,
            }
        }
    }

    #[expect(clippy::ref_option, reason = "serde passes the field")]
    pub(super) fn serialize<S: Serializer>(tokens: &Option<TokenData>, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return tokens.serialize(serializer);
        }
        let Some(tokens) = tokens else { return Tokens::Nothing.serialize(serializer) };
        let positional = Positional {
            prompt_ids: Cow::Borrowed(&tokens.prompt_ids),
            completion_ids: Cow::Borrowed(&tokens.completion_ids),
            log_probs: Cow::Borrowed(&tokens.log_probs),
            processed_log_probs: Cow::Borrowed(&tokens.processed_log_probs),
            policy_version: tokens.policy_version,
        };
        let versions = Cow::Borrowed(tokens.token_versions.as_slice());
        let wire = if let Some(model) = &tokens.model {
            Tokens::Named(positional, versions, Cow::Borrowed(&tokens.kept), model.clone())
        } else if !tokens.kept.is_empty() {
            Tokens::Kept(positional, versions, Cow::Borrowed(&tokens.kept))
        } else if !versions.is_empty() {
            Tokens::Swapped(positional, versions)
        } else {
            Tokens::One(positional)
        };
        wire.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<TokenData>, D::Error> {
        if deserializer.is_human_readable() {
            return Option::deserialize(deserializer);
        }
        Ok(match Tokens::deserialize(deserializer)? {
            Tokens::Nothing => None,
            Tokens::One(tokens) => Some(tokens.into_data(vec![], KeptTokens::default(), None)),
            Tokens::Swapped(tokens, versions) => {
                Some(tokens.into_data(versions.into_owned(), KeptTokens::default(), None))
            }
            Tokens::Kept(tokens, versions, kept) => {
                Some(tokens.into_data(versions.into_owned(), kept.into_owned(), None))
            }
            Tokens::Named(tokens, versions, kept, model) => {
                Some(tokens.into_data(versions.into_owned(), kept.into_owned(), Some(model)))
            }
        })
    }
}

/// Why a call cannot be trained on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NotTrainable {
    /// The model does not return token ids (a scripted or a text-only endpoint).
    NoTokenIds,
    /// Sampling truncated or constrained the distribution and the kept set is not recorded.
    TruncatedSampling,
    /// The call went to an endpoint that is not the policy.
    OtherEndpoint,
}

/// What a model answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// The answer's text, without tool-call markup and without the end token.
    pub text: String,
    /// Tool calls that the answer asks for.
    pub tool_calls: Vec<ToolCall>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Token counts.
    pub usage: Usage,
    /// Minted by the host.
    pub response_id: ResponseId,
    /// Token data, when the model is ours or the endpoint returned it.
    #[serde(default, with = "token_format")]
    pub tokens: Option<TokenData>,
    /// Why the call cannot be trained on; `None` when it can.
    pub not_trainable: Option<NotTrainable>,
}

/// Why a call of a model failed. One case per thing the caller can do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LlmError {
    /// The request itself is wrong; the text says which field and why.
    #[error("invalid request: {0}")]
    InvalidRequest(String),
    /// The prompt leaves no room for a completion. Blamed on the policy: a longer history is its doing.
    #[error("the prompt has {prompt_tokens} tokens and the context holds {context_tokens_max}")]
    ContextLengthExceeded {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens that the model's context holds.
        context_tokens_max: u32,
    },
    /// No endpoint of that name is granted.
    #[error("no endpoint `{0}` is granted to this plugin")]
    UnknownEndpoint(String),
    /// The attempt has used up its calls or tokens.
    #[error("limit {name} of {value} is reached")]
    LimitReached {
        /// The limit's field name.
        name: String,
        /// Its value.
        value: u64,
    },
    /// The endpoint failed; a later try may succeed.
    #[error("the endpoint failed: {0}")]
    Unavailable(String),
    /// The host does not offer this yet.
    #[error("unsupported: {0}")]
    Unsupported(String),
}

/// Facts about the attempt that opens a session.
#[derive(Debug, Clone, PartialEq)]
pub struct SessionInfo {
    /// Who asks.
    pub attempt: AttemptKey,
    /// The dataset item that the attempt works on.
    pub item_id: String,
    /// Seed of the attempt; requests without a seed of their own derive one from it and the call's index.
    pub seed: Seed,
    /// Sampling that the run's config sets for this rollout. It fills what the request leaves at its default and, in
    /// evaluation, overrides the temperature.
    pub sampling: Sampling,
    /// Completions that the attempt has had before this session: those of the prefix of a fork. Messages that repeat them
    /// are spliced like those of the session's own.
    pub history: Vec<Arc<Completion>>,
}

/// A language model for rollouts.
///
/// A session is one live attempt. In deterministic mode the engine starts a decode step when every open session waits
/// for an answer, so a session must be opened before its attempt starts and dropped as soon as the attempt has ended.
pub trait LlmBackend: Send + Sync {
    /// Opens the session of one attempt.
    fn open(&self, info: SessionInfo) -> Box<dyn LlmSession>;

    /// A short name for records: `policy`, `scripted`, or an endpoint's name.
    fn name(&self) -> &str;
}

/// The calls of one live attempt. Dropping a future cancels its call.
pub trait LlmSession: Send + Sync {
    /// Asks the model. `call_index` counts the calls of the attempt from 0 and names the response.
    fn chat(&self, call_index: u64, request: Arc<ChatRequest>)
    -> BoxFuture<'static, Result<Arc<Completion>, LlmError>>;

    /// Asks the model for an answer that can be read while it is drawn. A model that does not tell until it has ended, which
    /// is the default, hands out no text before.
    fn stream(&self, call_index: u64, request: Arc<ChatRequest>) -> Box<dyn LlmStream> {
        whole_answer(self.chat(call_index, request))
    }
}
