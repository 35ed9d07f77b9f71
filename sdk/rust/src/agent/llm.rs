//! Calls of language models.

use crate::types::{LimitReached, ToolCall, ToolSpec};
use crate::wit::agent::fulgurite::agent::llm as wit;

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LlmError {
    /// The request is wrong; the text names the field.
    #[error("invalid request: {0}")]
    InvalidRequest(String),
    /// The prompt leaves no room in the context. Shorten the history.
    #[error("the prompt has {prompt_tokens} tokens and the context holds {context_tokens_max}")]
    ContextLengthExceeded {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens that the context holds.
        context_tokens_max: u32,
    },
    /// No endpoint of that name is granted; the text is the line of config that would allow it.
    #[error("unknown endpoint: {0}")]
    UnknownEndpoint(String),
    /// The attempt has used up its calls or tokens. Return what there is.
    #[error(transparent)]
    LimitReached(LimitReached),
    /// The endpoint failed after the host's own retries.
    #[error("the endpoint failed: {0}")]
    Unavailable(String),
    /// This host does not offer it.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl From<wit::LlmError> for LlmError {
    fn from(error: wit::LlmError) -> Self {
        match error {
            wit::LlmError::InvalidRequest(text) => Self::InvalidRequest(text),
            wit::LlmError::ContextLengthExceeded((prompt_tokens, context_tokens_max)) => {
                Self::ContextLengthExceeded { prompt_tokens, context_tokens_max }
            }
            wit::LlmError::UnknownEndpoint(text) => Self::UnknownEndpoint(text),
            wit::LlmError::LimitReached(limit) => Self::LimitReached(limit.into()),
            wit::LlmError::Unavailable(text) => Self::Unavailable(text),
            wit::LlmError::Unsupported(text) => Self::Unsupported(text),
            wit::LlmError::Other(text) => Self::Other(text),
        }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Instructions of the agent's author.
    System(String),
    /// What the user, or the agent in the user's name, says.
    User(String),
    /// An answer of the model.
    Assistant {
        /// Its text.
        text: String,
        /// The tool calls it asked for.
        tool_calls: Vec<ToolCall>,
        /// Which completion it was, so that the host reuses its recorded tokens instead of tokenising its text again.
        response_id: Option<String>,
    },
    /// The result of a tool call.
    ToolResult {
        /// Which call it answers.
        tool_call_id: String,
        /// What the model gets to see.
        content: String,
    },
}

/// A conversation so far, oldest message first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conversation {
    messages: Vec<Message>,
}

impl Conversation {
    /// An empty conversation.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds instructions of the agent's author.
    pub fn system(&mut self, text: impl Into<String>) -> &mut Self {
        self.push(Message::System(text.into()))
    }

    /// Adds what the user says.
    pub fn user(&mut self, text: impl Into<String>) -> &mut Self {
        self.push(Message::User(text.into()))
    }

    /// Adds what the model has answered. Its recorded tokens are used again, so a conversation that only grows stays one
    /// training row.
    pub fn answer(&mut self, completion: &Completion) -> &mut Self {
        self.push(Message::Assistant {
            text: completion.text().to_owned(),
            tool_calls: completion.tool_calls().to_vec(),
            response_id: Some(completion.response_id()),
        })
    }

    /// Adds the result of a tool call.
    pub fn tool_result(&mut self, call: &ToolCall, content: impl Into<String>) -> &mut Self {
        self.push(Message::ToolResult { tool_call_id: call.id.clone(), content: content.into() })
    }

    /// Adds any message.
    pub fn push(&mut self, message: Message) -> &mut Self {
        self.messages.push(message);
        self
    }

    /// The messages, oldest first.
    #[must_use]
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// The messages, to be shortened or rewritten. A prompt that does not extend the one before starts a new training row.
    pub fn messages_mut(&mut self) -> &mut Vec<Message> {
        &mut self.messages
    }
}

/// How to ask a model: a builder that can ask many times. Wrong values are reported by [`Llm::chat`].
///
/// What is not set is what the run's config says; training rollouts are best left alone, because only untruncated
/// sampling can be trained on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Llm {
    tools: Vec<ToolSpec>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    min_p: Option<f32>,
    max_tokens: Option<u32>,
    stop: Vec<String>,
    seed: Option<u64>,
    json_schema: Option<String>,
    regex: Option<String>,
    agent_role: Option<String>,
    endpoint: Option<String>,
}

impl Llm {
    /// Asks the policy as the run's config says.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Offers tools to the model.
    #[must_use]
    pub fn tools(mut self, tools: impl IntoIterator<Item = ToolSpec>) -> Self {
        self.tools = tools.into_iter().collect();
        self
    }

    /// Divides the logits; 0 is greedy. In evaluation the config's value wins.
    #[must_use]
    pub fn temperature(mut self, value: f32) -> Self {
        self.temperature = Some(value);
        self
    }

    /// Keeps the smallest set of tokens with at least this probability, in (0, 1].
    #[must_use]
    pub fn top_p(mut self, value: f32) -> Self {
        self.top_p = Some(value);
        self
    }

    /// Keeps the k most probable tokens; 0 keeps all.
    #[must_use]
    pub fn top_k(mut self, value: u32) -> Self {
        self.top_k = Some(value);
        self
    }

    /// Drops tokens less probable than this share of the most probable one, in [0, 1).
    #[must_use]
    pub fn min_p(mut self, value: f32) -> Self {
        self.min_p = Some(value);
        self
    }

    /// Most tokens of the completion, the end token included.
    #[must_use]
    pub fn max_tokens(mut self, value: u32) -> Self {
        self.max_tokens = Some(value);
        self
    }

    /// Texts that end the completion; they are not part of it.
    #[must_use]
    pub fn stop<T: Into<String>>(mut self, texts: impl IntoIterator<Item = T>) -> Self {
        self.stop = texts.into_iter().map(Into::into).collect();
        self
    }

    /// Seed of the draw. Default: derived from the attempt's seed and the number of the call.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// The completion must be JSON that fits this schema.
    #[must_use]
    pub fn constrain_json(mut self, schema: &serde_json::Value) -> Self {
        self.json_schema = Some(schema.to_string());
        self
    }

    /// The completion must match this regular expression as a whole.
    #[must_use]
    pub fn constrain_regex(mut self, pattern: impl Into<String>) -> Self {
        self.regex = Some(pattern.into());
        self
    }

    /// Which agent of a system of several is asking; default `agent`. Training can select by it.
    #[must_use]
    pub fn agent_role(mut self, role: impl Into<String>) -> Self {
        self.agent_role = Some(role.into());
        self
    }

    /// Which granted endpoint to ask; default: the policy.
    #[must_use]
    pub fn endpoint(mut self, name: impl Into<String>) -> Self {
        self.endpoint = Some(name.into());
        self
    }

    /// Asks and waits for the whole answer.
    ///
    /// # Errors
    /// When the call fails.
    pub fn chat(&self, conversation: &Conversation) -> Result<Completion, LlmError> {
        Ok(Completion::new(wit::chat(&self.request(conversation))?))
    }

    /// Asks and returns at once, for streams and calls in parallel.
    ///
    /// # Errors
    /// When the call cannot be started.
    pub fn start(&self, conversation: &Conversation) -> Result<PendingCompletion, LlmError> {
        Ok(PendingCompletion(wit::start(&self.request(conversation))?))
    }

    fn request(&self, conversation: &Conversation) -> wit::Request {
        let request = wit::Request::new();
        for message in conversation.messages() {
            match message {
                Message::System(text) => request.add_system(text),
                Message::User(text) => request.add_user(text),
                Message::Assistant { text, tool_calls, response_id } => {
                    let tool_calls: Vec<_> = tool_calls.iter().cloned().map(Into::into).collect();
                    request.add_assistant(text, &tool_calls, response_id.as_deref());
                }
                Message::ToolResult { tool_call_id, content } => request.add_tool_result(tool_call_id, content),
            }
        }
        if !self.tools.is_empty() {
            let tools: Vec<_> = self.tools.iter().cloned().map(Into::into).collect();
            request.set_tools(&tools);
        }
        self.temperature.into_iter().for_each(|value| request.set_temperature(value));
        self.top_p.into_iter().for_each(|value| request.set_top_p(value));
        self.top_k.into_iter().for_each(|value| request.set_top_k(value));
        self.min_p.into_iter().for_each(|value| request.set_min_p(value));
        self.max_tokens.into_iter().for_each(|value| request.set_max_tokens(value));
        if !self.stop.is_empty() {
            request.set_stop(&self.stop);
        }
        self.seed.into_iter().for_each(|value| request.set_seed(value));
        self.json_schema.iter().for_each(|schema| request.constrain_json(schema));
        self.regex.iter().for_each(|pattern| request.constrain_regex(pattern));
        self.agent_role.iter().for_each(|role| request.set_agent_role(role));
        self.endpoint.iter().for_each(|name| request.set_endpoint(name));
        request
    }
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// The model drew its end token or a stop text.
    Stop,
    /// The model asked for tools.
    ToolCalls,
    /// [`Llm::max_tokens`] was reached.
    Length,
    /// The model's context was full.
    ContextLength,
}

/// Why a call cannot be trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NotTrainable {
    /// The model does not tell its token ids.
    NoTokenIds,
    /// Sampling truncated the distribution.
    TruncatedSampling,
    /// The call went to an endpoint that is not the policy.
    OtherEndpoint,
}

/// What the model saw and drew. All lists but `prompt_ids` have one entry per drawn token; all are empty when the model
/// does not tell.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenData {
    /// Token ids that the model saw.
    pub prompt_ids: Vec<u32>,
    /// Token ids that it drew, the end token included.
    pub completion_ids: Vec<u32>,
    /// Natural log of the probability of each drawn token, before truncation.
    pub log_probs: Vec<f32>,
    /// Which weights drew it, when it was the policy.
    pub policy_version: Option<u64>,
}

/// What the model answered. Text and tool calls are at hand; everything else is asked of the host when it is wanted.
#[derive(Debug)]
pub struct Completion {
    inner: wit::Completion,
    text: String,
    tool_calls: Vec<ToolCall>,
}

impl Completion {
    fn new(inner: wit::Completion) -> Self {
        let text = inner.text();
        let tool_calls = inner.tool_calls().into_iter().map(Into::into).collect();
        Self { inner, text, tool_calls }
    }

    /// The answer's text, without tool-call markup and without the end token.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The tool calls that the answer asks for.
    #[must_use]
    pub fn tool_calls(&self) -> &[ToolCall] {
        &self.tool_calls
    }

    /// Why it ended.
    #[must_use]
    pub fn finish_reason(&self) -> FinishReason {
        match self.inner.finish_reason() {
            wit::FinishReason::Stop => FinishReason::Stop,
            wit::FinishReason::ToolCalls => FinishReason::ToolCalls,
            wit::FinishReason::Length => FinishReason::Length,
            wit::FinishReason::ContextLength => FinishReason::ContextLength,
        }
    }

    /// The completion's name, minted by the host.
    #[must_use]
    pub fn response_id(&self) -> String {
        self.inner.response_id()
    }

    /// Tokens of the prompt.
    #[must_use]
    pub fn prompt_tokens(&self) -> u32 {
        self.inner.prompt_tokens()
    }

    /// Tokens of the completion, the end token included.
    #[must_use]
    pub fn completion_tokens(&self) -> u32 {
        self.inner.completion_tokens()
    }

    /// Token ids and log-probs.
    #[must_use]
    pub fn tokens(&self) -> TokenData {
        TokenData {
            prompt_ids: self.inner.prompt_ids(),
            completion_ids: self.inner.completion_ids(),
            log_probs: self.inner.log_probs(),
            policy_version: self.inner.policy_version(),
        }
    }

    /// Why the call cannot be trained on; none when it can.
    #[must_use]
    pub fn not_trainable(&self) -> Option<NotTrainable> {
        self.inner.not_trainable().map(|reason| match reason {
            wit::NotTrainable::NoTokenIds => NotTrainable::NoTokenIds,
            wit::NotTrainable::TruncatedSampling => NotTrainable::TruncatedSampling,
            wit::NotTrainable::OtherEndpoint => NotTrainable::OtherEndpoint,
        })
    }
}

/// A call under way. Dropping it cancels the call.
#[derive(Debug)]
#[must_use = "dropping the call cancels it"]
pub struct PendingCompletion(wit::Pending);

impl PendingCompletion {
    /// Waits for more text: the next piece while the model draws, or all there is when the model does not tell earlier.
    /// None when the answer is complete.
    ///
    /// # Errors
    /// When the call fails.
    pub fn next_text(&self) -> Result<Option<String>, LlmError> {
        Ok(self.0.next()?)
    }

    /// Waits for the whole answer.
    ///
    /// # Errors
    /// When the call fails.
    pub fn finish(self) -> Result<Completion, LlmError> {
        Ok(Completion::new(wit::finish(self.0)?))
    }
}

/// Waits until one of the calls has more text or is complete and returns its place in the list. The order in which calls
/// get ready is recorded and replayed.
///
/// # Errors
/// When the list is empty or the host cannot wait.
pub fn wait_any(calls: &[&PendingCompletion]) -> Result<usize, LlmError> {
    let calls: Vec<&wit::Pending> = calls.iter().map(|call| &call.0).collect();
    let index = wit::wait_any(&calls)?;
    usize::try_from(index).map_err(|error| LlmError::Other(error.to_string()))
}
