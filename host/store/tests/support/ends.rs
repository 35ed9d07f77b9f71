//! Ends of attempts, for tests of the store from outside.

use fulgurite_core::id::AttemptKey;
use fulgurite_core::state::{AttemptState, RolloutState};
use fulgurite_store::AttemptFinish;

use crate::samples::{outcome, reward, spans};

/// The end of an attempt with `count` spans from `from`.
pub(crate) fn finish(key: &AttemptKey, from: u64, count: u64, rollout_state: RolloutState) -> AttemptFinish {
    AttemptFinish {
        key: key.clone(),
        state: if rollout_state == RolloutState::Succeeded { AttemptState::Succeeded } else { AttemptState::Failed },
        outcome: outcome(),
        rewards: vec![reward(0.5)],
        end_unix_ns: 9,
        guest_cpu_us: 1,
        not_forkable: None,
        spans: spans(key, from, count).into(),
        rollout_state,
    }
}
