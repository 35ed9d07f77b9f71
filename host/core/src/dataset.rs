//! Dataset items and the splits they belong to.

use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use crate::id::ContentHash;

/// One item of a dataset. Who may see which part is the contract of DESIGN.md 5.1.
#[derive(Debug, Clone, Serialize, Deserialize)]
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
    /// Rendered when first asked for: one item serves many rollouts.
    #[serde(skip)]
    texts: OnceLock<ItemTexts>,
}

/// The parts of an item as JSON text: what plugins get.
#[derive(Debug, Clone)]
pub struct ItemTexts {
    /// For the agent.
    pub input: Arc<str>,
    /// For tools and grader.
    pub world: Arc<str>,
    /// For the grader.
    pub reference: Arc<str>,
    /// The whole item: what is kept beside its rollouts.
    pub whole: Arc<str>,
    /// Content hash of the whole item.
    pub hash: ContentHash,
}

impl DatasetItem {
    /// An item.
    #[must_use]
    pub fn new(
        id: impl Into<String>,
        input: serde_json::Value,
        world: serde_json::Value,
        reference: serde_json::Value,
    ) -> Self {
        Self { id: id.into(), input, world, reference, texts: OnceLock::new() }
    }

    /// Its parts as JSON text.
    pub fn texts(&self) -> &ItemTexts {
        self.texts.get_or_init(|| {
            let whole: Arc<str> = serde_json::to_string(self).unwrap_or_default().into();
            ItemTexts {
                input: self.input.to_string().into(),
                world: self.world.to_string().into(),
                reference: self.reference.to_string().into(),
                hash: ContentHash::of(whole.as_bytes()),
                whole,
            }
        })
    }
}

impl PartialEq for DatasetItem {
    fn eq(&self, other: &Self) -> bool {
        let parts = |item: &Self| (item.id.clone(), item.input.clone(), item.world.clone(), item.reference.clone());
        parts(self) == parts(other)
    }
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
