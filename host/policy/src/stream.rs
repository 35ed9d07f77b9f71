//! Answers of the policy that are read while they are drawn.
//!
//! Generating threads hand over tokens, and whoever reads turns them into text: decoding costs the batch nothing. A piece ends
//! with every n-th token or, when no text of it is [settled](crate::settled_text), with the next one that settles some; so pieces
//! are a function of what was drawn, whenever they are read.

use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use fulgurite_core::llm::{ChatRequest, Completion, LlmError, LlmStream};
use futures::future::BoxFuture;
use tokio::sync::mpsc;

use crate::call::{Generated, Piece};
use crate::session::{Session, Speaker};
use crate::settled_text::SettledText;

/// What an answer tells its stream before it ends.
pub(crate) struct Listener {
    prompt: Arc<OnceLock<Arc<[u32]>>>,
    pieces: mpsc::Sender<Piece>,
}

impl Listener {
    /// Takes the prompt; what is left is for the pieces.
    pub(crate) fn told(self, prompt: &Arc<[u32]>) -> mpsc::Sender<Piece> {
        // It is told once.
        let _ = self.prompt.set(prompt.clone());
        self.pieces
    }
}

/// A call under way.
pub(crate) struct PolicyStream {
    session: Arc<Session>,
    speaker: Speaker,
    call_index: u64,
    /// Dropping it cancels the call.
    answer: BoxFuture<'static, Result<Completion, LlmError>>,
    /// What it has become.
    ended: Option<Result<Completion, LlmError>>,
    given: bool,
    prompt: Arc<OnceLock<Arc<[u32]>>>,
    /// Tokens that were drawn and not read yet.
    unread: mpsc::Receiver<Piece>,
    /// Those of the text so far.
    read: Vec<Piece>,
    text: SettledText,
    /// Tokens read since the last piece of text.
    tokens: usize,
    /// A piece that was not taken yet.
    waiting: Option<String>,
    /// What stands behind the pieces that were: tokens of `read`, and bytes of the text.
    heard: (usize, usize),
    chunk_tokens: usize,
}

impl PolicyStream {
    pub(crate) fn new(session: Arc<Session>, speaker: Speaker, call_index: u64, request: Arc<ChatRequest>) -> Self {
        let scheduler = &speaker.generator.scheduler;
        // Never full: a completion has fewer tokens.
        let (pieces, unread) = mpsc::channel(scheduler.published().shape().context_tokens_max);
        let prompt: Arc<OnceLock<_>> = Arc::default();
        let listener = Listener { prompt: prompt.clone(), pieces };
        let stops = request.sampling.clone().filled_from(&session.info.sampling).stop;
        let asked = session.clone();
        Self {
            text: SettledText::new(session.tokenizer.clone(), stops),
            chunk_tokens: scheduler.stream_chunk_tokens,
            speaker,
            session,
            call_index,
            answer: Box::pin(async move { asked.answer(call_index, request, Some(listener)).await }),
            ended: None,
            given: false,
            prompt,
            unread,
            read: vec![],
            tokens: 0,
            waiting: None,
            heard: (0, 0),
        }
    }

    fn drive(&mut self, context: &mut Context<'_>) {
        if self.ended.is_none()
            && !self.given
            && let Poll::Ready(ended) = self.answer.as_mut().poll(context)
        {
            self.ended = Some(ended);
        }
    }
}

impl LlmStream for PolicyStream {
    fn poll_text(&mut self, context: &mut Context<'_>) -> Poll<bool> {
        self.drive(context);
        while self.waiting.is_none() {
            match self.unread.poll_recv(context) {
                Poll::Ready(Some(piece)) => {
                    self.text.push(piece.drawn.token);
                    self.read.push(piece);
                    self.tokens += 1;
                }
                Poll::Ready(None) => return Poll::Ready(false),
                Poll::Pending => return Poll::Pending,
            }
            if self.tokens >= self.chunk_tokens {
                self.waiting = self.text.take();
            }
        }
        Poll::Ready(true)
    }

    fn take_text(&mut self) -> Option<String> {
        let text = self.waiting.take()?;
        self.tokens = 0;
        // Nothing is read while a piece waits.
        self.heard = (self.read.len(), self.heard.1 + text.len());
        Some(text)
    }

    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<Result<Arc<Completion>, LlmError>> {
        self.drive(context);
        let Some(ended) = self.ended.take() else { return Poll::Pending };
        self.given = true;
        if let Ok(completion) = &ended {
            self.session.remember(completion);
        }
        Poll::Ready(ended.map(Arc::new))
    }

    fn heard(&self) -> Option<Completion> {
        let (tokens, bytes) = self.heard;
        let pieces = self.read.get(..tokens).filter(|pieces| !pieces.is_empty())?;
        let text = self.text.so_far().get(..bytes)?.to_owned();
        let generated = Generated::of_pieces(self.prompt.get()?.clone(), pieces);
        Some(self.session.completion(&self.speaker, self.call_index, text, vec![], generated))
    }
}

impl Drop for PolicyStream {
    fn drop(&mut self) {
        // The agent may go on with what it has read: then that comes back as the tokens that were drawn. Whether the answer has
        // ended meanwhile must make no difference.
        if let Some(heard) = self.heard() {
            self.session.remember(&heard);
        }
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
