//! A curriculum by pools of difficulty.

use fulgurite_credit::curriculum::Pools;
use serde::{Deserialize, Serialize};

use super::not_negative;

/// `[stage.config.curriculum]`: an item that was drawn is rolled out with a probability that follows from the mean reward of its
/// latest group. Defaults as prime-rl.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Curriculum {
    /// Largest mean reward of a hard item. 0.25.
    pub hard_reward_max: f64,
    /// Largest mean reward of a normal item. 0.75.
    pub normal_reward_max: f64,
    /// Weight of hard items. 0.2.
    pub hard_weight: f64,
    /// Weight of normal items. 1.
    pub normal_weight: f64,
    /// Weight of easy items. 0.2.
    pub easy_weight: f64,
    /// Weight of items that were never rolled out. 1.
    pub unseen_weight: f64,
}

impl Default for Curriculum {
    fn default() -> Self {
        let Pools { hard_reward_max, normal_reward_max, hard_weight, normal_weight, easy_weight, unseen_weight } =
            Pools::default();
        Self { hard_reward_max, normal_reward_max, hard_weight, normal_weight, easy_weight, unseen_weight }
    }
}

impl Curriculum {
    pub(super) fn check(&self) -> Result<(), String> {
        for (field, value) in [
            ("hard_weight", self.hard_weight),
            ("normal_weight", self.normal_weight),
            ("easy_weight", self.easy_weight),
            ("unseen_weight", self.unseen_weight),
        ] {
            not_negative(&format!("curriculum.{field}"), value)?;
        }
        if self.hard_reward_max <= self.normal_reward_max {
            return Ok(());
        }
        Err("curriculum.hard_reward_max: use at most normal_reward_max".to_owned())
    }

    /// The pools.
    #[must_use]
    pub const fn pools(&self) -> Pools {
        let Self { hard_reward_max, normal_reward_max, hard_weight, normal_weight, easy_weight, unseen_weight } = *self;
        Pools { hard_reward_max, normal_reward_max, hard_weight, normal_weight, easy_weight, unseen_weight }
    }
}
