//! Sampling of the policy.

use crate::wit::algorithm::fulgurite::algorithm::common as wit;

/// How the policy draws tokens. What is not set is what the run's config says: temperature 1 without truncation by default.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sampling {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    max_tokens: Option<u32>,
    seed: Option<u64>,
}

impl Sampling {
    /// As the run's config says.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Divides the logits; 0 is greedy.
    #[must_use]
    pub const fn temperature(mut self, value: f32) -> Self {
        self.temperature = Some(value);
        self
    }

    /// Keeps the smallest set of tokens with at least this probability, in (0, 1].
    #[must_use]
    pub const fn top_p(mut self, value: f32) -> Self {
        self.top_p = Some(value);
        self
    }

    /// Keeps the k most probable tokens; 0 keeps all.
    #[must_use]
    pub const fn top_k(mut self, value: u32) -> Self {
        self.top_k = Some(value);
        self
    }

    /// Most tokens of a completion, the end token included.
    #[must_use]
    pub const fn max_tokens(mut self, value: u32) -> Self {
        self.max_tokens = Some(value);
        self
    }

    /// Seed of the draws.
    #[must_use]
    pub const fn seed(mut self, value: u64) -> Self {
        self.seed = Some(value);
        self
    }

    pub(super) fn lower(&self) -> wit::Sampling {
        let sampling = wit::Sampling::new();
        self.temperature.into_iter().for_each(|value| sampling.set_temperature(value));
        self.top_p.into_iter().for_each(|value| sampling.set_top_p(value));
        self.top_k.into_iter().for_each(|value| sampling.set_top_k(value));
        self.max_tokens.into_iter().for_each(|value| sampling.set_max_tokens(value));
        self.seed.into_iter().for_each(|value| sampling.set_seed(value));
        sampling
    }
}
