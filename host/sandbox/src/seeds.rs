//! Where the random numbers of a guest come from, in an attempt and in a replay of it.

use std::sync::Arc;

use fulgurite_core::seed::Seed;

use crate::tape::Tape;

/// Where a guest's random numbers come from: the seed of the attempt, or of that part of a recording which is played back,
/// and the guest's own name below it.
#[derive(Debug, Clone)]
pub struct SeedSource {
    seed: Seed,
    tape: Option<Arc<Tape>>,
    path: Vec<String>,
}

impl SeedSource {
    /// The seeds of an attempt.
    #[must_use]
    pub fn new(seed: Seed, tape: Option<Arc<Tape>>) -> Self {
        Self { seed, tape, path: vec![] }
    }

    /// Those of a guest of it.
    #[must_use]
    pub fn child(mut self, name: &str) -> Self {
        self.path.push(name.to_owned());
        self
    }

    /// The seed that is in force.
    #[must_use]
    pub fn seed(&self) -> Seed {
        let base = self.tape.as_ref().map_or(self.seed, |tape| tape.seed());
        self.path.iter().fold(base, |seed, name| seed.child(name))
    }

    /// Whether it never changes.
    pub(crate) fn is_fixed(&self) -> bool {
        self.tape.is_none()
    }
}

impl From<Seed> for SeedSource {
    fn from(seed: Seed) -> Self {
        Self::new(seed, None)
    }
}
