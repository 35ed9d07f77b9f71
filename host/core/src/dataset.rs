//! Dataset items and the splits they belong to.

use serde::{Deserialize, Serialize};

/// One item of a dataset. Who may see which part is the contract of DESIGN.md 5.1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetItem {
    /// Unique in its dataset.
    pub id: String,
    /// Goes to the agent.
    pub input: serde_json::Value,
    /// Goes to tools and to the grader.
    #[serde(default)]
    pub world: serde_json::Value,
    /// Goes to the grader, and to an algorithm only with the grant `read-reference`.
    #[serde(default)]
    pub reference: serde_json::Value,
}

/// Which part of a dataset an item belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Trained on.
    Train,
    /// Looked at by algorithms to choose, never trained on.
    Val,
    /// Drawn by the host only.
    Test,
}

impl Split {
    /// The split's name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Val => "val",
            Self::Test => "test",
        }
    }
}
