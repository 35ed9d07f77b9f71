//! The policy as a language model for rollouts: sessions, their history of completions, and what a request may ask for. A session
//! has one history, whichever models have answered: they all read it in the same tokens.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use fulgurite_core::id::ResponseId;
use fulgurite_core::llm::{
    ChatRequest, Completion, FinishReason, KeptTokens, LlmBackend, LlmError, LlmSession, LlmStream, Message,
    NotTrainable, Role, Sampling, SessionInfo, TokenData, ToolCall, Usage,
};
use fulgurite_core::seed::Seed;
use futures::future::BoxFuture;

use crate::call::{Generated, Request};
use crate::error::PolicyError;
use crate::scheduler::{Generator, Scheduler};
use crate::stream::{Listener, PolicyStream};
use crate::tokenizer::PolicyTokenizer;

/// A model that answers.
#[derive(Debug, Clone)]
pub(crate) struct Speaker {
    /// Its name in the config; `None` is the policy.
    pub(crate) model: Option<Arc<str>>,
    pub(crate) generator: Arc<Generator>,
}

/// Opens sessions on the policy.
pub(crate) struct PolicyBackend {
    /// Answers where no role says otherwise.
    own: Speaker,
    /// The others that sessions may ask.
    others: Vec<Speaker>,
    /// Places among the others, by agent role.
    roles: Arc<BTreeMap<String, usize>>,
    tokenizer: PolicyTokenizer,
}

impl PolicyBackend {
    /// Calls of the roles go to theirs, all others to `own`. All models have one tokenizer.
    pub(crate) fn new(own: Speaker, by_role: BTreeMap<String, Speaker>, tokenizer: PolicyTokenizer) -> Self {
        let (mut others, mut roles) = (Vec::<Speaker>::new(), BTreeMap::new());
        for (role, speaker) in by_role {
            let known = others.iter().position(|known| known.model == speaker.model);
            roles.insert(role, known.unwrap_or(others.len()));
            if known.is_none() {
                others.push(speaker);
            }
        }
        Self { own, others, roles: Arc::new(roles), tokenizer }
    }
}

impl LlmBackend for PolicyBackend {
    fn open(&self, info: SessionInfo) -> Box<dyn LlmSession> {
        let open = |speaker: &Speaker| (speaker.clone(), speaker.generator.scheduler.open_session());
        let history = info.history.iter().filter_map(|completion| Recorded::of(completion)).collect();
        let session = Session {
            own: open(&self.own),
            others: self.others.iter().map(open).collect(),
            roles: self.roles.clone(),
            tokenizer: self.tokenizer.clone(),
            info,
            history: Mutex::new(history),
        };
        Box::new(OpenSession(Arc::new(session)))
    }

    fn name(&self) -> &'static str {
        "policy"
    }
}

/// Closes the session when it is dropped, even while a call's future lives on.
struct OpenSession(Arc<Session>);

impl Drop for OpenSession {
    fn drop(&mut self) {
        for (speaker, id) in self.0.speakers() {
            speaker.generator.scheduler.close_session(*id);
        }
    }
}

impl LlmSession for OpenSession {
    fn chat(
        &self,
        call_index: u64,
        request: Arc<ChatRequest>,
    ) -> BoxFuture<'static, Result<Arc<Completion>, LlmError>> {
        let session = self.0.clone();
        Box::pin(async move {
            let completion = session.answer(call_index, request, None).await?;
            session.remember(&completion);
            Ok(Arc::new(completion))
        })
    }

    fn stream(&self, call_index: u64, request: Arc<ChatRequest>) -> Box<dyn LlmStream> {
        let speaker = self.0.asked(&request.agent_role).0.clone();
        Box::new(PolicyStream::new(self.0.clone(), speaker, call_index, request))
    }
}

pub(crate) struct Session {
    /// The models that it may ask, as those of [`PolicyBackend`], each with the session's number there.
    own: (Speaker, u64),
    others: Vec<(Speaker, u64)>,
    roles: Arc<BTreeMap<String, usize>>,
    pub(crate) tokenizer: PolicyTokenizer,
    pub(crate) info: SessionInfo,
    /// Completions so far, to be spliced when a message repeats one.
    history: Mutex<Vec<Recorded>>,
}

#[derive(Clone)]
struct Recorded {
    response_id: ResponseId,
    text: String,
    tool_calls: Vec<ToolCall>,
    ids: Vec<u32>,
}

impl Recorded {
    /// What can be spliced of a completion that this session has not made.
    fn of(completion: &Completion) -> Option<Self> {
        Some(Self {
            response_id: completion.response_id.clone(),
            text: completion.text.clone(),
            tool_calls: completion.tool_calls.clone(),
            ids: completion.tokens.as_ref()?.completion_ids.clone(),
        })
    }

    /// Whether a message without response id says the same.
    fn equals(&self, message: &Message) -> bool {
        self.text == message.content
            && self.tool_calls.len() == message.tool_calls.len()
            && self
                .tool_calls
                .iter()
                .zip(&message.tool_calls)
                .all(|(a, b)| a.name == b.name && a.arguments == b.arguments)
    }
}

/// The recorded ids that a message repeats.
fn recorded<'a>(history: &'a [Recorded], message: &Message) -> Option<&'a [u32]> {
    if message.role != Role::Assistant {
        return None;
    }
    let by_id = message.response_id.as_ref().and_then(|id| history.iter().find(|known| known.response_id == *id));
    let found = by_id.or_else(|| history.iter().rev().find(|known| known.equals(message)));
    found.map(|known| known.ids.as_slice())
}

/// Checks what a request asks for against its ranges and against the model's vocabulary.
fn check(sampling: &Sampling, vocabulary: usize) -> Result<(), LlmError> {
    sampling.check().map_err(|error| LlmError::InvalidRequest(error.to_string()))?;
    let biased = sampling.logit_bias.iter().map(|entry| ("logit_bias", entry.token));
    let stops = sampling.stop_token_ids.iter().map(|token| ("stop_token_ids", *token));
    if let Some((field, token)) = biased.chain(stops).find(|(_, token)| *token as usize >= vocabulary) {
        let text = format!("`{field}` has token {token}: the model has ids 0 to {}", vocabulary - 1);
        return Err(LlmError::InvalidRequest(text));
    }
    Ok(())
}

impl Session {
    fn speakers(&self) -> impl Iterator<Item = &(Speaker, u64)> {
        std::iter::once(&self.own).chain(&self.others)
    }

    /// The model that answers an agent role, with the session's number there.
    fn asked(&self, agent_role: &str) -> &(Speaker, u64) {
        self.roles.get(agent_role).and_then(|place| self.others.get(*place)).unwrap_or(&self.own)
    }

    /// Answers a request. Where there is a `listener`, it gets the prompt, and each token as it is drawn.
    pub(crate) async fn answer(
        &self,
        call_index: u64,
        request: Arc<ChatRequest>,
        listener: Option<Listener>,
    ) -> Result<Completion, LlmError> {
        if let Some(endpoint) = request.endpoint.as_ref().filter(|endpoint| *endpoint != "policy") {
            return Err(LlmError::UnknownEndpoint(endpoint.clone()));
        }
        if request.messages.is_empty() {
            return Err(LlmError::InvalidRequest("`messages` is empty".to_owned()));
        }
        let (speaker, id) = self.asked(&request.agent_role);
        let scheduler = &speaker.generator.scheduler;
        let sampling = request.sampling.clone().filled_from(&self.info.sampling);
        check(&sampling, scheduler.published().shape().vocabulary)?;
        let prompt: Arc<[u32]> = self.encode(scheduler, &request.messages, &request.tools)?.into();
        let listener = listener.map(|listener| listener.told(&prompt));
        let seed = match sampling.seed {
            Some(seed) => Seed::new(seed),
            None => self.info.seed.child("policy").child_index(call_index),
        };
        let progress = sampling.constraint.as_ref().map(|shape| scheduler.constrain(shape)).transpose()?;
        let ask = Request { prompt, sampling, seed, progress, listener };
        let attempt = self.info.attempt.clone();
        let others = self.speakers().filter(|(other, _)| other.model != speaker.model);
        let _elsewhere: Vec<_> = others.map(|(other, id)| other.generator.scheduler.elsewhere(*id)).collect();
        let generated = scheduler.ask(*id, attempt, call_index, ask).await?;
        Ok(self.complete(speaker, call_index, generated))
    }

    fn encode(
        &self,
        scheduler: &Scheduler,
        messages: &[Message],
        tools: &[fulgurite_core::llm::ToolSpec],
    ) -> Result<Vec<u32>, LlmError> {
        let context = scheduler.published().shape().context_tokens_max;
        let exceeded = |tokens: usize| LlmError::ContextLengthExceeded {
            prompt_tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
            context_tokens_max: u32::try_from(context).unwrap_or(u32::MAX),
        };
        // A text of this length cannot fit whatever its tokens are: refused before any work goes into it.
        let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
        let tokens_at_least = bytes / self.tokenizer.token_bytes_max();
        if tokens_at_least > context {
            return Err(exceeded(tokens_at_least));
        }
        let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let ids =
            self.tokenizer.encode_prompt(messages, tools, |message| recorded(&history, message)).map_err(|error| {
                match error {
                    PolicyError::Template(text) => LlmError::InvalidRequest(text),
                    other => LlmError::Unavailable(other.to_string()),
                }
            })?;
        if ids.is_empty() {
            return Err(LlmError::InvalidRequest("the prompt has no tokens".to_owned()));
        }
        if ids.len() >= context {
            return Err(exceeded(ids.len()));
        }
        Ok(ids)
    }

    /// The completion that a call has drawn.
    fn complete(&self, speaker: &Speaker, call_index: u64, generated: Generated) -> Completion {
        let (text, tool_calls) = if let Some(at) = generated.stop_at_byte {
            // What stands before a stop text is text: markup that it cut in two is not a call.
            let decoded = self.tokenizer.decode_bytes(&generated.completion);
            (String::from_utf8_lossy(decoded.get(..at).unwrap_or(&decoded)).into_owned(), vec![])
        } else {
            // A stop token is not part of the text, as the end token is not.
            let text = generated.completion.split_at(generated.completion.len() - generated.stop_tokens).0;
            self.tokenizer.parse_completion(text, call_index)
        };
        self.completion(speaker, call_index, text, tool_calls, generated)
    }

    /// A completion whose text is known.
    pub(crate) fn completion(
        &self,
        speaker: &Speaker,
        call_index: u64,
        text: String,
        tool_calls: Vec<ToolCall>,
        generated: Generated,
    ) -> Completion {
        let finish_reason = match generated.finish {
            FinishReason::Stop if !tool_calls.is_empty() => FinishReason::ToolCalls,
            other => other,
        };
        let response_id = ResponseId::of_call(&self.info.attempt, call_index);
        let count = |ids: &[u32]| u32::try_from(ids.len()).unwrap_or(u32::MAX);
        let usage = Usage { prompt_tokens: count(&generated.prompt), completion_tokens: count(&generated.completion) };
        let not_trainable = generated.is_unexplained.then_some(NotTrainable::TruncatedSampling);
        let processed_log_probs = if generated.altered { generated.processed_log_probs } else { vec![] };
        // A part of the sets is of no use.
        let is_told = generated.altered && !generated.is_unexplained;
        let tokens = TokenData {
            prompt_ids: generated.prompt.to_vec(),
            completion_ids: generated.completion,
            log_probs: generated.log_probs,
            processed_log_probs,
            policy_version: generated.version,
            token_versions: generated.token_versions,
            kept: if is_told { generated.kept } else { KeptTokens::default() },
            model: speaker.model.clone(),
        };
        Completion { text, tool_calls, finish_reason, usage, response_id, tokens: Some(tokens), not_trainable }
    }

    /// Remembers what the agent has of an answer, for when a message repeats it.
    pub(crate) fn remember(&self, completion: &Completion) {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).extend(Recorded::of(completion));
    }
}
