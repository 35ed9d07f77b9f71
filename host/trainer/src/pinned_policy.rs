//! What a run's policy began as, kept beside its config: a folder of weights can change while the run's config stays the same.

use fulgurite_core::id::ContentHash;
use fulgurite_policy::PolicyEngine;
use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::run_directory::{RunDirectory, write_atomically};

/// The record, `policy.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PinnedPolicy {
    /// Hash of every bit of the weights, computed in float32.
    pub(crate) weights: ContentHash,
    /// Hash of tokenizer and chat template.
    pub(crate) tokenizer: ContentHash,
}

impl PinnedPolicy {
    /// What a policy is now. Before its weights are restored from a checkpoint or from `policies/`: it is what the config says.
    pub(crate) fn of(engine: &PolicyEngine) -> Self {
        Self { weights: engine.weights_hash(), tokenizer: engine.tokenizer().hash() }
    }

    /// Keeps it; where the run has one, it must be the same.
    ///
    /// # Errors
    /// When the policy is another one than the run began with, or the disk refuses.
    pub(crate) fn keep(&self, run: &RunDirectory) -> Result<(), TrainError> {
        let path = run.policy_record();
        match std::fs::read(&path) {
            Ok(text) => {
                let kept: Self = serde_json::from_slice(&text).map_err(|error| {
                    TrainError::io(&path)(std::io::Error::new(std::io::ErrorKind::InvalidData, error))
                })?;
                if kept == *self {
                    return Ok(());
                }
                let what = if kept.weights == self.weights { "tokenizer or chat template" } else { "weights" };
                Err(TrainError::PolicyChanged { path, what })
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let text = serde_json::to_vec_pretty(self).unwrap_or_default();
                write_atomically(&path, &text).map_err(TrainError::io(&path))
            }
            Err(error) => Err(TrainError::io(&path)(error)),
        }
    }
}
