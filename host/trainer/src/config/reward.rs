//! `[reward]`: what the host itself rewards, and which calls rewards belong to.

use fulgurite_adapter::{RewardAttachment, RewardTerms};
use fulgurite_core::reward_term::RewardTerm;
use serde::{Deserialize, Serialize};

/// Automatic rewards and the attachment of all rewards.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RewardConfig {
    /// What the host rewards by itself. What each kind computes: [`fulgurite_adapter::terms`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub term: Vec<RewardTerm>,
    /// Which calls rewards belong to. The rules: [`RewardAttachment`].
    #[serde(skip_serializing_if = "is_default")]
    pub attach: RewardAttachment,
}

impl RewardConfig {
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        let problem = |error: fulgurite_adapter::InvalidTerm| {
            (format!("reward.term[{}].{}", error.index, error.field), error.problem)
        };
        RewardTerms::new(&self.term).map(|_| ()).map_err(problem)
    }

    /// The terms, ready to judge. Checked before: what cannot be compiled is not there.
    pub(crate) fn terms(&self) -> RewardTerms {
        RewardTerms::new(&self.term).unwrap_or_default()
    }
}

/// Whether a section says nothing: then it is not written, so that what a run keeps of its config is as it was.
pub(super) fn is_default<T: Default + PartialEq>(section: &T) -> bool {
    *section == T::default()
}
