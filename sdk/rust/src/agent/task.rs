//! Facts about the attempt.

use crate::types::Mode;
use crate::wit::agent::fulgurite::agent::task as wit;

/// What the rollout is for. An agent that behaves differently in evaluation measures something else than it trains.
#[must_use]
pub fn mode() -> Mode {
    wit::mode().into()
}

/// The attempt's seed. The standard library's and WASI's random numbers already follow from it.
#[must_use]
pub fn seed() -> u64 {
    wit::seed()
}
