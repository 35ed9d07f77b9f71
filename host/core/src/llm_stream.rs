//! Answers that are read while they are drawn.

use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;

use crate::llm::{Completion, LlmError};

/// A call of a model under way. Dropping it cancels the call.
///
/// Where the pieces of text are cut is a function of what is drawn alone, never of time, so that a run repeats: whoever reads
/// takes pieces until [`poll_text`](Self::poll_text) says that there are no more, and only then the rest from
/// [`poll_end`](Self::poll_end). Whoever wants the whole answer polls for the end alone.
pub trait LlmStream: Send {
    /// Waits for the next piece of text. False when no more comes before the end: the rest is in the answer. All pieces
    /// together are a beginning of the answer's text.
    fn poll_text(&mut self, context: &mut Context<'_>) -> Poll<bool>;

    /// The piece that was waited for, never an empty one. It is given once.
    fn take_text(&mut self) -> Option<String>;

    /// The whole answer. It is given once.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<Result<Arc<Completion>, LlmError>>;

    /// What was taken so far as an answer of its own, [cancelled](crate::llm::FinishReason::Cancelled) there; `None` when
    /// nothing was. The same whether the call has ended or not.
    fn heard(&self) -> Option<Completion>;
}

/// An answer that comes as a whole.
#[must_use]
pub fn whole_answer(answer: BoxFuture<'static, Result<Arc<Completion>, LlmError>>) -> Box<dyn LlmStream> {
    Box::new(Whole(answer))
}

struct Whole(BoxFuture<'static, Result<Arc<Completion>, LlmError>>);

impl LlmStream for Whole {
    fn poll_text(&mut self, _: &mut Context<'_>) -> Poll<bool> {
        Poll::Ready(false)
    }

    fn take_text(&mut self) -> Option<String> {
        None
    }

    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<Result<Arc<Completion>, LlmError>> {
        self.0.as_mut().poll(context)
    }

    fn heard(&self) -> Option<Completion> {
        None
    }
}
