//! Why a batch cannot become training rows.

use fulgurite_core::algorithm::Scope;
use fulgurite_core::id::TransitionId;
use fulgurite_core::llm::NotTrainable;
use fulgurite_core::training::Stream;

/// Why a batch of entries was refused. Every case is a mistake of whoever made the batch; nothing was trained.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// The call cannot be trained on.
    #[error("transition `{transition}` cannot be trained on: {}", reason_text(reason))]
    NotTrainable {
        /// Which transition.
        transition: TransitionId,
        /// Why.
        reason: NotTrainable,
    },
    /// An entry names another transition than the one beside it.
    #[error("the entry for transition `{entry}` came with transition `{transition}`")]
    WrongTransition {
        /// The transition handed in.
        transition: TransitionId,
        /// The one that the entry names.
        entry: TransitionId,
    },
    /// A demonstration in a stream that needs to know how probable the tokens were when they were drawn.
    #[error("transition `{transition}` is a demonstration, which has no log-probs for the stream {stream:?}; use Ce")]
    NoLogProbs {
        /// Which transition.
        transition: TransitionId,
        /// The stream asked for.
        stream: Stream,
    },
    /// Observed tokens in a stream that needs tokens that the policy drew.
    #[error(
        "the observed tokens of transition `{transition}` were not drawn by the policy, so they can only be trained in the stream Ce, not {stream:?}"
    )]
    ObservedStream {
        /// Which transition.
        transition: TransitionId,
        /// The stream asked for.
        stream: Stream,
    },
    /// Not one weight per token.
    #[error("transition `{transition}` has {expected} tokens in scope {scope:?} and was given {found} weights")]
    WeightCount {
        /// Which transition.
        transition: TransitionId,
        /// Which of its tokens.
        scope: Scope,
        /// Tokens in scope.
        expected: usize,
        /// Weights given.
        found: usize,
    },
    /// NaN or infinite.
    #[error("a weight of transition `{transition}` is {value}, which is not a finite number")]
    WeightNotFinite {
        /// Which transition.
        transition: TransitionId,
        /// The weight.
        value: f32,
    },
    /// The same tokens twice in one stream.
    #[error("transition `{transition}` is in the batch twice with stream {stream:?} and scope {scope:?}")]
    Duplicate {
        /// Which transition.
        transition: TransitionId,
        /// The stream.
        stream: Stream,
        /// The scope.
        scope: Scope,
    },
    /// A row is longer than the engine takes.
    #[error("the row that ends with transition `{transition}` has {tokens} tokens and the limit is {tokens_max}")]
    RowTooLong {
        /// The last transition of the row.
        transition: TransitionId,
        /// Tokens of the row.
        tokens: usize,
        /// The limit.
        tokens_max: usize,
    },
    /// More sequences than can be counted.
    #[error("a batch has {0} sequences, which is more than can be numbered")]
    TooManySequences(usize),
}

const fn reason_text(reason: &NotTrainable) -> &'static str {
    match reason {
        NotTrainable::NoTokenIds => "its token ids are not known",
        NotTrainable::TruncatedSampling => "its sampling was truncated or constrained",
        NotTrainable::OtherEndpoint => "it did not ask the policy",
    }
}
