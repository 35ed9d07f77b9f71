//! Rewards and where they come from.

use serde::{Deserialize, Serialize};

use crate::id::ContentHash;

/// Longest dimension name in bytes.
pub const DIMENSION_BYTES_MAX: usize = 64;

/// Who gave a reward. Stamped by the host, never by a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardSource {
    /// The run's grader component.
    Grader,
    /// A tool component.
    Tool,
    /// The host: outcome rewards and declared reward terms.
    Host,
    /// The agent itself. Recorded, not trained on by default: an agent could pay itself.
    Agent,
    /// A client outside the sandbox.
    External,
}

/// One reward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reward {
    /// What is measured; `reward` is the dimension that algorithms read by default.
    pub dimension: String,
    /// A finite number; larger is better.
    pub value: f64,
    /// Text that says why, for prompt optimisers.
    pub feedback: Option<String>,
    /// Who gave it.
    pub source: RewardSource,
    /// The grader's or tool's content hash.
    pub component: Option<ContentHash>,
    /// The LLM call that it belongs to (index from 0); `None` is the whole rollout.
    pub call_index: Option<u64>,
}

/// The dimension that algorithms read by default.
pub const DEFAULT_DIMENSION: &str = "reward";

/// Why a reward was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum InvalidReward {
    /// NaN or infinite.
    #[error("reward `{dimension}` is {value}, which is not a finite number")]
    NotFinite {
        /// The dimension.
        dimension: String,
        /// The value.
        value: f64,
    },
    /// The dimension's name is empty or too long.
    #[error("a reward's dimension has {bytes} bytes; it must have 1 to {DIMENSION_BYTES_MAX}")]
    DimensionLength {
        /// Its length in bytes.
        bytes: usize,
    },
}

impl Reward {
    /// Checks what a guest handed over.
    ///
    /// # Errors
    /// When the value is not finite or the dimension's name has a wrong length.
    pub fn check(&self) -> Result<(), InvalidReward> {
        if self.dimension.is_empty() || self.dimension.len() > DIMENSION_BYTES_MAX {
            return Err(InvalidReward::DimensionLength { bytes: self.dimension.len() });
        }
        if !self.value.is_finite() {
            return Err(InvalidReward::NotFinite { dimension: self.dimension.clone(), value: self.value });
        }
        Ok(())
    }
}
