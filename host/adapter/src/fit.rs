//! Rollouts with rows that are longer than what is trained on.
//!
//! A row ends with its last call and holds that call's prompt and completion, so a rollout has no row longer than its longest
//! call. That makes it possible to decide before anybody computes an advantage: dropping rows afterwards would leave baselines
//! that count what is not trained on.

use std::num::NonZeroUsize;

use fulgurite_core::id::TransitionId;
use serde::{Deserialize, Serialize};

use crate::transition::Transition;

/// What becomes of a rollout that has a row which is too long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RowTooLong {
    /// The whole rollout is left out: of the baseline, of the loss and of every normaliser, as one with a fault is. Nothing
    /// pushes the policy away from being too long then.
    #[default]
    Drop,
    /// What is beyond the limit is not trained on; the rollout counts with its reward, and its other tokens are trained.
    Truncate,
    /// The run stops.
    Stop,
}

/// How a rollout fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    /// All of it does.
    Whole,
    /// It does not, and is left out.
    Dropped(LongRow),
    /// It does not, and so many drawn tokens are not trained on.
    Truncated {
        /// The longest row.
        longest: LongRow,
        /// Drawn tokens beyond the limit.
        tokens: usize,
    },
}

/// A row that is too long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LongRow {
    /// The call that it ends with.
    pub transition: TransitionId,
    /// Its tokens.
    pub tokens: usize,
}

impl Transition {
    /// Tokens of the row that ends with it: its prompt and its completion.
    #[must_use]
    pub fn row_tokens(&self) -> usize {
        self.tokens.as_ref().map_or(0, |tokens| tokens.prompt_ids.len() + tokens.completion_ids.len())
    }

    /// Leaves out drawn tokens beyond so many of its row, and says how many these are.
    fn truncate(&mut self, row_tokens_max: usize) -> usize {
        let Some(tokens) = &mut self.tokens else { return 0 };
        let drawn = tokens.completion_ids.len();
        let kept = row_tokens_max.saturating_sub(tokens.prompt_ids.len()).min(drawn);
        tokens.completion_ids.truncate(kept);
        tokens.log_probs.truncate(kept);
        tokens.processed_log_probs.truncate(kept);
        tokens.token_versions.truncate(kept);
        self.mask.truncate(kept);
        self.cut_tokens += drawn - kept;
        drawn - kept
    }
}

/// Makes the calls of a rollout fit, or says that it does not. Calls that cannot be trained on do not count.
pub fn fit(transitions: &mut [Transition], row_tokens_max: NonZeroUsize, rule: RowTooLong) -> Fit {
    let most = row_tokens_max.get();
    let trained = transitions.iter().filter(|transition| transition.is_trainable());
    let Some(longest) = trained.max_by_key(|transition| transition.row_tokens()) else { return Fit::Whole };
    if longest.row_tokens() <= most {
        return Fit::Whole;
    }
    let longest = LongRow { transition: longest.id.clone(), tokens: longest.row_tokens() };
    match rule {
        RowTooLong::Drop | RowTooLong::Stop => Fit::Dropped(longest),
        RowTooLong::Truncate => {
            let cut = transitions.iter_mut().map(|transition| transition.truncate(most)).sum();
            Fit::Truncated { longest, tokens: cut }
        }
    }
}
