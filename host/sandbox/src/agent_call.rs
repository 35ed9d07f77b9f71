//! Calls of language models under way.
//!
//! What is recorded of a call that the guest drops is what it has read of the answer, and not what the model had drawn by
//! then: the guest goes on from the one, and the other depends on time. Pieces of text are recorded by their lengths, and a
//! replay cuts the recorded text there again.
#![expect(unreachable_pub, reason = "the generated bindings re-export the resources' types, which pub(crate) forbids")]

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use fulgurite_core::llm::{ChatRequest, Completion, FinishReason, LlmError, LlmStream};

use crate::fault::Stop;
use crate::recorder::{Begun, GuestLog, refused};
use crate::tape::CANCELLED_CALL;

pub(crate) type Answer = Result<Arc<Completion>, LlmError>;

/// What must be written down about a call whatever becomes of it.
pub(crate) struct Ticket {
    log: Arc<GuestLog>,
    begun: Begun,
    pub(crate) call_index: u64,
    /// Taken when the call is recorded.
    request: Option<Arc<ChatRequest>>,
    /// The answer as far as the guest has seen it: what the guest does next follows from it.
    seen: Option<Answer>,
}

impl Ticket {
    pub(crate) fn new(log: Arc<GuestLog>, begun: Begun, call_index: u64, request: Arc<ChatRequest>) -> Self {
        Self { log, begun, call_index, request: Some(request), seen: None }
    }

    pub(crate) fn close(mut self, result: Answer) -> Result<(), Stop> {
        let Some(request) = self.request.take() else { return Ok(()) };
        let ended = self.log.recorder.end_llm(self.begun, self.call_index, &request, result);
        ended.map_err(|refusal| refused(&refusal))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(request) = self.request.take() {
            let cancelled = || Err(LlmError::Unavailable(CANCELLED_CALL.to_owned()));
            let result = self.seen.take().unwrap_or_else(cancelled);
            // The attempt may be over; then there is nobody to tell.
            let _ = self.log.recorder.end_llm(self.begun, self.call_index, &request, result);
        }
    }
}

/// What an endpoint may say, with the host's own words for a call that never ended told apart.
pub(crate) fn foreign(answer: Answer) -> Answer {
    match answer {
        Err(LlmError::Unavailable(text)) if text == CANCELLED_CALL => {
            Err(LlmError::Unavailable(format!("{text} by the endpoint")))
        }
        answer => answer,
    }
}

/// What a guest has of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Nothing,
    /// Pieces that came before the end.
    Pieces,
    /// Something of the whole answer: it comes when all pieces have.
    Answer,
}

/// A call under way.
pub struct PendingLlm {
    /// Taken when the call ends.
    ticket: Option<Ticket>,
    call_index: u64,
    stream: Box<dyn LlmStream>,
    ended: Option<Answer>,
    seen: Seen,
    /// Bytes of the text that the guest has.
    delivered: usize,
    /// Bytes of its request, which lives as long as the call does.
    held_bytes: u64,
}

impl PendingLlm {
    pub(crate) fn new(ticket: Ticket, stream: Box<dyn LlmStream>, held_bytes: u64) -> Self {
        let call_index = ticket.call_index;
        Self { ticket: Some(ticket), call_index, stream, ended: None, seen: Seen::Nothing, delivered: 0, held_bytes }
    }

    pub(crate) const fn call_index(&self) -> u64 {
        self.call_index
    }

    pub(crate) const fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// Waits for something to read: text, or the end.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        // The end comes last, whenever it is known: pieces must not depend on that.
        if self.ended.is_none() && ready!(self.stream.poll_text(context)) {
            return Poll::Ready(());
        }
        let answer = ready!(self.poll_answer(context));
        if was_left(answer).is_some_and(|text_bytes| self.delivered >= text_bytes) {
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    /// Waits for the whole answer.
    pub(crate) fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let answer = ready!(self.poll_answer(context));
        if was_left(answer).is_some() { Poll::Pending } else { Poll::Ready(()) }
    }

    fn poll_answer(&mut self, context: &mut Context<'_>) -> Poll<&Answer> {
        if self.ended.is_none() {
            self.ended = Some(foreign(ready!(self.stream.poll_end(context))));
        }
        self.ended.as_ref().map_or(Poll::Pending, Poll::Ready)
    }

    /// What the guest reads next, when there is something: text, none at the end, or why the call failed. A recording says of
    /// the last piece how many bytes of it were read at once.
    pub(crate) fn read(&mut self, recorded_bytes: Option<usize>) -> Option<Result<Option<String>, LlmError>> {
        let text = if let Some(ended) = &self.ended {
            self.seen = Seen::Answer;
            match ended {
                Ok(completion) => {
                    let rest = completion.text.get(self.delivered..).unwrap_or_default();
                    let text = rest.get(..recorded_bytes.unwrap_or(rest.len())).unwrap_or(rest);
                    Some(text).filter(|text| !text.is_empty()).map(str::to_owned)
                }
                Err(error) => return Some(Err(error.clone())),
            }
        } else {
            let text = self.stream.take_text()?;
            self.seen = Seen::Pieces;
            Some(text)
        };
        self.delivered += text.as_ref().map_or(0, String::len);
        Some(Ok(text))
    }

    /// Takes the answer to a call that has ended, with what is to be written down.
    pub(crate) fn take_answer(&mut self) -> Option<(Ticket, Answer)> {
        let answer = self.ended.take()?;
        Some((self.ticket.take()?, answer))
    }

    /// Records that the guest goes on without the rest. What it has read is the answer then.
    pub(crate) fn leave(&mut self) -> Option<Answer> {
        let mut ticket = self.ticket.take()?;
        let seen = match self.seen {
            Seen::Nothing => None,
            Seen::Pieces => self.stream.heard().map(|heard| Ok(Arc::new(heard))),
            Seen::Answer => self.ended.clone(),
        };
        ticket.seen.clone_from(&seen);
        seen
    }
}

impl Drop for PendingLlm {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Bytes of text of an answer that the guest left while it was drawn. Only recordings have such: it never ended.
fn was_left(answer: &Answer) -> Option<usize> {
    let completion = answer.as_ref().ok()?;
    (completion.finish_reason == FinishReason::Cancelled).then_some(completion.text.len())
}
