//! What a model takes in memory, from its sizes alone.

use serde::Serialize;

use crate::shape::ModelShape;

/// Everything is computed in f32.
const VALUE_BYTES: u64 = 4;

/// What is to run at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanOptions {
    /// Live rollouts, each with a full context of keys and values.
    pub rollouts: u64,
    /// Tokens of one rollout; `None` is the model's context.
    pub context_tokens: Option<u64>,
    /// Tokens of one micro-batch.
    pub micro_batch_tokens: u64,
    /// Micro-batches computed at once.
    pub threads: u64,
}

/// Memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The weights that sample and train.
    pub weights_bytes: u64,
    /// Keys and values of one token in all layers.
    pub kv_cache_token_bytes: u64,
    /// Keys and values of one rollout at `context_tokens`.
    pub kv_cache_rollout_bytes: u64,
    /// Keys and values of all live rollouts.
    pub kv_cache_bytes: u64,
    /// One gradient of every weight.
    pub gradient_bytes: u64,
    /// Both moments of AdamW.
    pub moments_bytes: u64,
    /// What the backward pass needs of the forward pass, an estimate: of `threads` micro-batches.
    pub activations_bytes: u64,
    /// Weights and caches.
    pub generation_bytes: u64,
    /// All of it.
    pub training_bytes: u64,
    /// Live rollouts that were planned for.
    pub rollouts: u64,
    /// Tokens of one rollout that were planned for.
    pub context_tokens: u64,
    /// Tokens of one micro-batch that were planned for.
    pub micro_batch_tokens: u64,
    /// Micro-batches at once that were planned for.
    pub threads: u64,
}

impl MemoryPlan {
    /// What generation and full training of a model would take. Nothing is allocated.
    #[must_use]
    pub fn new(shape: &ModelShape, options: &PlanOptions) -> Self {
        let size = |value: usize| value as u64;
        // Sizes are checked when they are read, so that only a context that the caller makes up could overflow.
        let product = |factors: &[u64]| factors.iter().fold(1_u64, |product, factor| product.saturating_mul(*factor));
        let sum = |parts: &[u64]| parts.iter().fold(0_u64, |sum, part| sum.saturating_add(*part));
        let (d, ff, vocabulary, layers) =
            (size(shape.d_model), size(shape.d_ff), size(shape.vocabulary), size(shape.layers));
        let (query, kv) = (size(shape.query_width()), size(shape.kv_width()));

        let context_tokens = options.context_tokens.unwrap_or(size(shape.context_tokens_max));
        let weights_bytes = product(&[size(shape.parameter_count()), VALUE_BYTES]);
        let kv_cache_token_bytes = size(shape.kv_bytes_per_token());
        let kv_cache_rollout_bytes = product(&[kv_cache_token_bytes, context_tokens]);
        let kv_cache_bytes = product(&[kv_cache_rollout_bytes, options.rollouts]);
        let gradient_bytes = weights_bytes;
        let moments_bytes = product(&[2, weights_bytes]);
        // Per token and layer: two residuals and two normed inputs, queries, keys and values, the attention's output, gate, up
        // and their product. Per token at the top: the last residual, its norm, logits and their softmax.
        let layer = sum(&[product(&[4, d]), product(&[2, query]), product(&[2, kv]), product(&[3, ff])]);
        let token = sum(&[product(&[layers, layer]), product(&[2, d]), product(&[2, vocabulary])]);
        let activations_bytes = product(&[token, options.micro_batch_tokens, options.threads, VALUE_BYTES]);
        let generation_bytes = sum(&[weights_bytes, kv_cache_bytes]);
        Self {
            weights_bytes,
            kv_cache_token_bytes,
            kv_cache_rollout_bytes,
            kv_cache_bytes,
            gradient_bytes,
            moments_bytes,
            activations_bytes,
            generation_bytes,
            training_bytes: sum(&[generation_bytes, gradient_bytes, moments_bytes, activations_bytes]),
            rollouts: options.rollouts,
            context_tokens,
            micro_batch_tokens: options.micro_batch_tokens,
            threads: options.threads,
        }
    }
}
