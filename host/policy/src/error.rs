//! Why the policy engine refused or failed.

use std::path::PathBuf;

use crate::device::PolicyDevice;

/// One case per thing that the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// A field of the policy's or tokenizer's config has a value that cannot be used.
    #[error("`{field}` is {value}: {reason}")]
    InvalidConfig {
        /// The field's name.
        field: &'static str,
        /// The value given.
        value: String,
        /// What would be right.
        reason: String,
    },
    /// No device has this name.
    #[error("`{0}` is no device: use auto, cpu, cuda, cuda:N, wgpu, wgpu:N or flex")]
    UnknownDevice(String),
    /// This build or this machine does not have the device.
    #[error("device `{device}` cannot be used: {reason}")]
    UnusableDevice {
        /// Which device.
        device: PolicyDevice,
        /// Why, and what to do.
        reason: String,
    },
    /// The tokenizer could not be trained, read or written.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template does not parse or failed to render.
    #[error("chat template: {0}")]
    Template(String),
    /// A training row or a loss that does not fit the model or itself.
    #[error("invalid training batch: {0}")]
    InvalidBatch(String),
    /// A demonstration that does not fit the context.
    #[error("the demonstration has {tokens} tokens and the context holds {context_tokens_max}")]
    DemonstrationTooLong {
        /// Its tokens.
        tokens: usize,
        /// Tokens that the context holds.
        context_tokens_max: usize,
    },
    /// A snapshot of that name has not been taken.
    #[error("there is no snapshot `{0}`")]
    UnknownSnapshot(String),
    /// Models beside the policy, or the roles that they answer, do not make sense.
    #[error("`{field}`: {problem}")]
    Models {
        /// The field of `[policy.local]`.
        field: String,
        /// What is wrong, and what would help.
        problem: String,
    },
    /// No model of that name is configured.
    #[error(
        "there is no adapter `{0}`: name it in `adapters` of [policy.local.lora], or a whole model in `models` of [policy.local]"
    )]
    UnknownModel(String),
    /// A critic was asked for and the config offers none.
    #[error("there is no critic: add [policy.local.critic] to the config")]
    NoCritic,
    /// `optimiser_step` was asked for and no gradient has been gathered since the last one.
    #[error("there is no gradient to apply: call forward_backward first")]
    NoGradient,
    /// A file could not be read or written.
    #[error("{path}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A checkpoint's file has other content than it must have.
    #[error("{path}: {reason}")]
    Checkpoint {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of a Hugging Face folder cannot be used.
    #[error("{path}: {reason}")]
    ModelFile {
        /// Which file, or the folder.
        path: PathBuf,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// A model's files have other tensors than its config asks for.
    #[error("the tensors do not fit the model's config: {0}")]
    UnfitTensors(String),
    /// The engine does not offer this yet.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// A thread of the engine failed: a defect, not something a caller can mend.
    #[error("the policy engine failed: {0}")]
    Internal(String),
    /// The engine has been shut down.
    #[error("the policy engine has stopped")]
    Stopped,
}

impl PolicyError {
    /// Attaches a path to a system error.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// Says what is wrong with a file of a Hugging Face folder.
    pub(crate) fn model_file(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::ModelFile { path: path.into(), reason: reason.into() }
    }
}
