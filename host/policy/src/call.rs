//! One call of the policy, from its request to its answer.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fulgurite_core::id::PolicyVersion;
use fulgurite_core::llm::{FinishReason, KeptTokens, LlmError, Sampling};
use fulgurite_core::seed::Seed;
use tokio::sync::{mpsc, oneshot};

use crate::constraint::Progress;
use crate::sampler::{self, Draw, Drawn};
use crate::scheduler::{RequestKey, Scheduler, Ticket, Weights};
use crate::tokenizer::PolicyTokenizer;

/// What is asked, checked and tokenised.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) prompt: Arc<[u32]>,
    pub(crate) sampling: Sampling,
    pub(crate) seed: Seed,
    /// Where the completion stands in the shape that it must have.
    pub(crate) progress: Option<Progress>,
    /// Where each token goes as soon as it is drawn, but for the one that ends the completion. It must have room for as many
    /// as the context holds: a slow reader holds nobody up.
    pub(crate) listener: Option<mpsc::Sender<Piece>>,
}

/// A token of a completion that goes on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Piece {
    pub(crate) drawn: Drawn,
    /// The weights that drew it.
    pub(crate) version: PolicyVersion,
}

/// What a call drew.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Generated {
    pub(crate) prompt: Arc<[u32]>,
    pub(crate) completion: Vec<u32>,
    pub(crate) log_probs: Vec<f32>,
    pub(crate) processed_log_probs: Vec<f32>,
    /// What each token was drawn from, where some were drawn from less than all.
    pub(crate) kept: KeptTokens,
    pub(crate) finish: FinishReason,
    /// Bytes of the completion's text before a stop text.
    pub(crate) stop_at_byte: Option<usize>,
    /// Tokens at the completion's end that are no text: 1 after one of the request's stop tokens.
    pub(crate) stop_tokens: usize,
    /// Whether a token was drawn from another distribution than the softmax at the temperature.
    pub(crate) altered: bool,
    /// Whether that was so for reasons that `kept` does not tell.
    pub(crate) is_unexplained: bool,
    /// The weights that drew the first token.
    pub(crate) version: PolicyVersion,
    /// The weights that drew each token; empty when they were the same for all.
    pub(crate) token_versions: Vec<PolicyVersion>,
}

pub(crate) type Reply = oneshot::Sender<Result<Generated, LlmError>>;

/// Why a completion ended with a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The model's end token, or the end of what a constraint allows.
    Model,
    /// A stop token of the request.
    StopToken,
    /// A stop text, which begins at this byte.
    StopText(usize),
    /// `max_tokens`.
    Length,
    /// The context is full.
    Context,
}

/// One call. While it waits it may have drawn tokens already: it was put back then.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) key: RequestKey,
    pub(crate) request: Request,
    reply: Reply,
    /// Dropped with the call: then its session no longer waits.
    ticket: Ticket,
    /// The weights that it is answered with, once it has started.
    pub(crate) weights: Option<Weights>,
    /// Whether other threads wait for its prompt.
    pub(crate) announced: bool,
    /// Tokens whose keys and values it had when it was put back.
    pub(crate) computed: usize,
    /// Prompt and completion.
    pub(crate) ids: Vec<u32>,
    log_probs: Vec<f32>,
    processed_log_probs: Vec<f32>,
    kept: KeptTokens,
    altered: bool,
    is_unexplained: bool,
    text: Vec<u8>,
    /// Where in the completion which weights took over.
    versions: Vec<(usize, PolicyVersion)>,
    /// Distinct tokens of `ids`, ascending; kept when there is a repetition penalty.
    seen: Vec<u32>,
}

impl Call {
    pub(crate) fn new(key: RequestKey, request: Request, reply: Reply, ticket: Ticket) -> Self {
        let ids = request.prompt.to_vec();
        let mut seen = vec![];
        if request.sampling.repetition_penalty.to_bits() != 1.0_f32.to_bits() {
            seen.clone_from(&ids);
            seen.sort_unstable();
            seen.dedup();
        }
        Self {
            key,
            request,
            reply,
            ticket,
            weights: None,
            announced: false,
            computed: 0,
            ids,
            log_probs: vec![],
            processed_log_probs: vec![],
            altered: false,
            is_unexplained: false,
            kept: KeptTokens::default(),
            text: vec![],
            versions: vec![],
            seen,
        }
    }

    /// Who asks.
    pub(crate) fn session(&self) -> u64 {
        self.ticket.session
    }

    /// Whether nobody waits for the answer any more.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.reply.is_closed()
    }

    fn completion(&self) -> &[u32] {
        self.ids.get(self.request.prompt.len()..).unwrap_or_default()
    }

    /// Draws the next token from its logits and takes it in. Tells how the completion ends, if it does.
    pub(crate) fn draw(&mut self, logits: &mut [f32], scheduler: &Scheduler) -> Result<Option<End>, LlmError> {
        let mask = self.request.progress.as_mut().map(Progress::mask).transpose()?;
        let allowed = |token: u32| mask.as_ref().is_none_or(|mask| mask.allows(token));
        let draw = Draw {
            sampling: &self.request.sampling,
            seed: self.request.seed,
            position: self.completion().len() as u64,
            seen: &self.seen,
            kept_tokens_max: scheduler.kept_tokens_max,
            allowed: mask.is_some().then_some(&allowed as sampler::Allowed<'_>),
        };
        let drawn = sampler::draw(logits, &draw)
            .ok_or_else(|| LlmError::Unavailable("the policy's logits are not finite".to_owned()))?;
        let mut end = self.take_in(&drawn, &scheduler.tokenizer);
        if let Some(progress) = self.request.progress.as_mut().filter(|_| end.is_none()) {
            end = progress.advance(drawn.token)?.then_some(End::Model);
        }
        if end.is_none() {
            self.tell(drawn);
        }
        Ok(end)
    }

    fn tell(&mut self, drawn: Drawn) {
        let version = self.versions.last().map(|(_, version)| *version).unwrap_or_default();
        let told = self.request.listener.as_ref().is_none_or(|to| to.try_send(Piece { drawn, version }).is_ok());
        if !told {
            // Nobody listens any more: the text is in the answer, for whoever waits for that.
            self.request.listener = None;
        }
    }

    fn take_in(&mut self, drawn: &Drawn, tokenizer: &PolicyTokenizer) -> Option<End> {
        let weights = self.weights.as_ref()?;
        let (version, context_tokens_max) = (weights.predictor.version(), weights.predictor.shape().context_tokens_max);
        if self.versions.last().is_none_or(|(_, last)| *last != version) {
            self.versions.push((self.completion().len(), version));
        }
        self.ids.push(drawn.token);
        self.log_probs.push(drawn.log_prob);
        self.processed_log_probs.push(drawn.processed_log_prob);
        self.altered |= drawn.altered;
        self.is_unexplained |= drawn.is_unexplained();
        self.kept.push(&drawn.kept);
        let sampling = &self.request.sampling;
        if sampling.repetition_penalty.to_bits() != 1.0_f32.to_bits()
            && let Err(at) = self.seen.binary_search(&drawn.token)
        {
            self.seen.insert(at, drawn.token);
        }
        if tokenizer.is_end(drawn.token) {
            return Some(End::Model);
        }
        if sampling.stop_token_ids.contains(&drawn.token) {
            return Some(End::StopToken);
        }
        if !sampling.stop.is_empty() {
            let bytes = tokenizer.bytes(drawn.token);
            self.text.extend_from_slice(bytes);
            let found = sampling.stop.iter().filter_map(|stop| {
                // A new occurrence ends inside the new token.
                let from = self.text.len().saturating_sub(bytes.len() + stop.len());
                let tail = self.text.get(from..)?;
                Some(from + tail.windows(stop.len()).position(|window| window == stop.as_bytes())?)
            });
            if let Some(at) = found.min() {
                return Some(End::StopText(at));
            }
        }
        if self.ids.len() >= context_tokens_max {
            return Some(End::Context);
        }
        let full = sampling.max_tokens > 0 && self.completion().len() >= sampling.max_tokens as usize;
        full.then_some(End::Length)
    }

    /// Answers with an error.
    pub(crate) fn fail(self, error: LlmError) {
        drop(self.ticket);
        drop(self.reply.send(Err(error)));
    }

    /// Answers with what was drawn.
    pub(crate) fn finish(mut self, end: End, scheduler: &Scheduler) {
        let completion = self.ids.split_off(self.request.prompt.len().min(self.ids.len()));
        scheduler.counters.completion_tokens.fetch_add(completion.len() as u64, Ordering::Relaxed);
        let (version, token_versions) = versions(&self.versions, completion.len());
        let generated = Generated {
            prompt: self.request.prompt,
            completion,
            log_probs: self.log_probs,
            processed_log_probs: self.processed_log_probs,
            finish: match end {
                End::Model | End::StopToken | End::StopText(_) => FinishReason::Stop,
                End::Length => FinishReason::Length,
                End::Context => FinishReason::ContextLength,
            },
            stop_at_byte: if let End::StopText(at) = end { Some(at) } else { None },
            stop_tokens: usize::from(end == End::StopToken),
            altered: self.altered,
            is_unexplained: self.is_unexplained,
            kept: self.kept,
            version,
            token_versions,
        };
        // The ticket goes first: when the caller wakes up, its session no longer waits.
        drop(self.ticket);
        // A caller that has gone away needs no answer.
        drop(self.reply.send(Ok(generated)));
    }
}

/// The first of some versions, and that of each of `tokens` tokens where they are several. Each stands with the first token that
/// it drew.
fn versions(of: &[(usize, PolicyVersion)], tokens: usize) -> (PolicyVersion, Vec<PolicyVersion>) {
    let mut each = vec![];
    if of.len() > 1 {
        let ends = of.iter().skip(1).map(|(from, _)| *from).chain([tokens]);
        for ((_, version), end) in of.iter().zip(ends) {
            each.resize(end, *version);
        }
    }
    (of.first().map(|(_, version)| *version).unwrap_or_default(), each)
}

impl Generated {
    /// What the pieces of a completion are by themselves.
    pub(crate) fn of_pieces(prompt: Arc<[u32]>, pieces: &[Piece]) -> Self {
        let mut changes: Vec<(usize, PolicyVersion)> = vec![];
        for (at, piece) in pieces.iter().enumerate() {
            if changes.last().is_none_or(|(_, last)| *last != piece.version) {
                changes.push((at, piece.version));
            }
        }
        let (version, token_versions) = versions(&changes, pieces.len());
        let mut kept = KeptTokens::default();
        for piece in pieces {
            kept.push(&piece.drawn.kept);
        }
        Self {
            prompt,
            completion: pieces.iter().map(|piece| piece.drawn.token).collect(),
            log_probs: pieces.iter().map(|piece| piece.drawn.log_prob).collect(),
            processed_log_probs: pieces.iter().map(|piece| piece.drawn.processed_log_prob).collect(),
            finish: FinishReason::Cancelled,
            stop_at_byte: None,
            stop_tokens: 0,
            altered: pieces.iter().any(|piece| piece.drawn.altered),
            is_unexplained: pieces.iter().any(|piece| piece.drawn.is_unexplained()),
            kept,
            version,
            token_versions,
        }
    }
}
