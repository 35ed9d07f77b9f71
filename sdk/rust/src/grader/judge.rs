//! Asks a model for its judgement. The manifest must ask for the endpoint ([`manifest!`](crate::manifest!)), the run's config
//! must grant it.

use crate::types::LimitReached;
use crate::wit::grader::fulgurite::grader::judge as wit;

/// Why a call failed. One case per thing the caller can do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JudgeError {
    /// The request is wrong; the text names the field.
    #[error("invalid request: {0}")]
    InvalidRequest(String),
    /// No endpoint of that name is granted; the text ends in the lines of config that would allow it.
    #[error("{0}")]
    UnknownEndpoint(String),
    /// The prompt leaves no room in the context.
    #[error("the prompt has {prompt_tokens} tokens and the context holds {context_tokens_max}")]
    ContextLengthExceeded {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens that the context holds.
        context_tokens_max: u32,
    },
    /// The grader has used up its calls or tokens.
    #[error("{0}")]
    LimitReached(LimitReached),
    /// The endpoint failed.
    #[error("{0}")]
    Unavailable(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl From<wit::JudgeError> for JudgeError {
    fn from(error: wit::JudgeError) -> Self {
        match error {
            wit::JudgeError::InvalidRequest(text) => Self::InvalidRequest(text),
            wit::JudgeError::UnknownEndpoint(text) => Self::UnknownEndpoint(text),
            wit::JudgeError::ContextLengthExceeded((prompt_tokens, context_tokens_max)) => {
                Self::ContextLengthExceeded { prompt_tokens, context_tokens_max }
            }
            wit::JudgeError::LimitReached(limit) => Self::LimitReached(limit.into()),
            wit::JudgeError::Unavailable(text) => Self::Unavailable(text),
            wit::JudgeError::Other(text) => Self::Other(text),
        }
    }
}

/// A call in the making.
#[derive(Debug)]
pub struct Judge(wit::Request);

impl Judge {
    /// Asks the granted endpoint of this name, greedily.
    #[must_use]
    pub fn new(endpoint: &str) -> Self {
        Self(wit::Request::new(endpoint))
    }

    /// Says how to judge.
    #[must_use]
    pub fn system(self, content: &str) -> Self {
        self.0.add_system(content);
        self
    }

    /// What is to be judged.
    #[must_use]
    pub fn user(self, content: &str) -> Self {
        self.0.add_user(content);
        self
    }

    /// An answer of the judge: an example, or one of its own.
    #[must_use]
    pub fn assistant(self, content: &str) -> Self {
        self.0.add_assistant(content);
        self
    }

    /// Divides the logits; 0, the default, is greedy.
    #[must_use]
    pub fn temperature(self, value: f32) -> Self {
        self.0.set_temperature(value);
        self
    }

    /// Most tokens of the answer.
    #[must_use]
    pub fn max_tokens(self, value: u32) -> Self {
        self.0.set_max_tokens(value);
        self
    }

    /// The answer must be JSON that fits this schema.
    #[must_use]
    pub fn json(self, schema: &serde_json::Value) -> Self {
        self.0.constrain_json(&schema.to_string());
        self
    }

    /// Asks and waits for the answer's text.
    ///
    /// # Errors
    /// See [`JudgeError`].
    pub fn ask(&self) -> Result<String, JudgeError> {
        Ok(wit::chat(&self.0)?.text())
    }
}
