//! What a policy takes in memory, from its sizes and its config alone.

use serde::Serialize;

use crate::config::PolicyConfig;
use crate::lora::AdapterLayout;
use crate::shape::ModelShape;

/// Everything is computed in f32.
const VALUE_BYTES: u64 = 4;

/// What is to run at once.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanOptions {
    /// Live rollouts, each with a full context of keys and values.
    pub rollouts: u64,
    /// Tokens of one rollout; `None` is the model's context.
    pub context_tokens: Option<u64>,
    /// `[policy.local]`: what is trained, and its limits. Sizes of a preset are not looked at.
    pub policy: PolicyConfig,
}

/// Memory in bytes on device `cpu`. The rest of the process (sandboxes, store) is not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The model's weights.
    pub weights_bytes: u64,
    /// The weights once more, in the order in which the sampling kernels read them; of each whole model.
    pub packed_bytes: u64,
    /// Keys and values of one token in all layers.
    pub kv_cache_token_bytes: u64,
    /// Keys and values of one rollout at `context_tokens`.
    pub kv_cache_rollout_bytes: u64,
    /// Keys and values of all live rollouts, at most `kv_cache_bytes_max`: what does not fit is computed again.
    pub kv_cache_bytes: u64,
    /// `kv_cache_bytes_max` of the config.
    pub kv_cache_bytes_max: u64,
    /// Weights that are trained: all of them, of each model, or those of adapters; with a critic those of its own.
    pub trained_parameters: u64,
    /// The weights that are trained, where they are beside those of the model: adapters, further whole models, a critic.
    pub trained_bytes: u64,
    /// The weights in the orders in which training's kernels read them, for as long as a batch takes.
    pub training_packed_bytes: u64,
    /// Gradients of the trained weights: one per shard, which are added in order at the end of a batch.
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
    /// Gradients that are there at once.
    pub gradient_shards: u64,
}

// Sizes are checked when they are read, so that only what the caller makes up could overflow.
fn product(factors: &[u64]) -> u64 {
    factors.iter().fold(1, |product, factor| product.saturating_mul(*factor))
}

fn sum(parts: &[u64]) -> u64 {
    parts.iter().fold(0, |sum, part| sum.saturating_add(*part))
}

/// Widths of a model, for products of them.
struct Widths {
    d: u64,
    ff: u64,
    query: u64,
    kv: u64,
    layers: u64,
    vocabulary: u64,
}

impl Widths {
    fn new(shape: &ModelShape) -> Self {
        let size = |value: usize| value as u64;
        Self {
            d: size(shape.d_model),
            ff: size(shape.d_ff),
            query: size(shape.query_width()),
            kv: size(shape.kv_width()),
            layers: size(shape.layers),
            vocabulary: size(shape.vocabulary),
        }
    }

    /// Values that one micro-batch of so many tokens needs until its backward pass is done.
    fn activations(&self, shape: &ModelShape, policy: &PolicyConfig, tokens: u64) -> u64 {
        let Self { d, ff, query, kv, layers, vocabulary } = *self;
        // Per token and layer: two residuals and two normed inputs, queries, keys and values, the attention's output, gate, up
        // and their product; what norms of heads change; the low ranks of adapters.
        let norms = if shape.qk_norm { sum(&[query, kv]) } else { 0 };
        let low = policy.lora.as_ref().map_or(0, |lora| product(&[lora.rank as u64, lora.targets.len() as u64]));
        let layer = sum(&[product(&[4, d]), product(&[2, query]), product(&[2, kv]), product(&[3, ff]), norms, low]);
        let kept = if policy.gradient_checkpointing {
            sum(&[layer, product(&[layers, d])])
        } else {
            product(&[layers, layer])
        };
        // Per token once: residuals, norms and gradients at the top, gradients inside of a layer, and the operand that is packed
        // for the widest product.
        let once = sum(&[product(&[6, d]), product(&[5, ff])]);
        // Logits, a reference's, and those packed for the gradient of an output projection: some tokens at a time.
        let logits_max = policy.logits_bytes_max as u64 / VALUE_BYTES;
        let logits = product(&[tokens, vocabulary]).min(logits_max.max(vocabulary));
        let packed = if shape.tie_embeddings || policy.lora.is_some() { 0 } else { logits };
        sum(&[product(&[tokens, sum(&[kept, once])]), logits, packed])
    }
}

impl MemoryPlan {
    /// What generation and training of a model would take. Nothing is allocated.
    #[must_use]
    pub fn new(shape: &ModelShape, options: &PlanOptions) -> Self {
        let (policy, widths) = (&options.policy, Widths::new(shape));
        let bytes = |values: u64| product(&[values, VALUE_BYTES]);
        let parameters = shape.parameter_count() as u64;
        let embedding = product(&[widths.vocabulary, widths.d]);
        let trunk = parameters - if shape.tie_embeddings { embedding } else { 2 * embedding };

        let context_tokens = options.context_tokens.unwrap_or(shape.context_tokens_max as u64);
        let kv_cache_token_bytes = shape.kv_bytes_per_token() as u64;
        let kv_cache_rollout_bytes = product(&[kv_cache_token_bytes, context_tokens]);
        let kv_cache_bytes_max = policy.kv_cache_bytes_max as u64;
        let kv_cache_bytes = product(&[kv_cache_rollout_bytes, options.rollouts]).min(kv_cache_bytes_max);

        let weights_bytes = bytes(parameters);
        // The embedding and the output projection, tied or not.
        let packed = sum(&[trunk, product(&[2, embedding])]);
        let transposed = sum(&[trunk, embedding]);
        let adapter = policy.lora.as_ref().map(|lora| {
            let one = AdapterLayout::new(lora).specs(shape).iter().map(|spec| spec.len() as u64).sum::<u64>();
            product(&[one, 1 + lora.adapters.len() as u64])
        });
        // Whole models beside the policy are trained, packed and kept as it is.
        let models = 1 + policy.models.len() as u64;
        let critic = if policy.critic.is_some() { sum(&[trunk, embedding, widths.d, 1]) } else { 0 };
        let beside = sum(&[adapter.unwrap_or(0), product(&[models - 1, parameters]), critic]);
        let trained_parameters = sum(&[adapter.unwrap_or(product(&[models, parameters])), critic]);
        // A frozen base is packed once for sampling and training; what is trained is packed again for every batch. Adapters
        // are small, so that their packed forms are counted as one more.
        let training_packed = match adapter {
            Some(adapter) => sum(&[transposed, product(&[2, adapter])]),
            None => sum(&[packed, transposed]),
        };
        let (threads, shards) = (policy.thread_count() as u64, policy.gradient_shards as u64);
        let workers = threads.min(shards);
        let micro_batch_tokens = policy.micro_batch_tokens_max as u64;

        let packed_bytes = bytes(product(&[models, packed]));
        let trained_bytes = bytes(beside);
        let training_packed_bytes = bytes(training_packed);
        // The policy's and a critic's gradients are made in turn and kept for the next batch.
        let gradient_bytes = product(&[shards, bytes(trained_parameters)]);
        let moments_bytes = product(&[2, bytes(trained_parameters)]);
        let activations_bytes = product(&[workers, bytes(widths.activations(shape, policy, micro_batch_tokens))]);
        let generation_bytes = sum(&[weights_bytes, packed_bytes, kv_cache_bytes]);
        Self {
            weights_bytes,
            packed_bytes,
            kv_cache_token_bytes,
            kv_cache_rollout_bytes,
            kv_cache_bytes,
            kv_cache_bytes_max,
            trained_parameters,
            trained_bytes,
            training_packed_bytes,
            gradient_bytes,
            moments_bytes,
            activations_bytes,
            generation_bytes,
            training_bytes: sum(&[
                generation_bytes,
                trained_bytes,
                training_packed_bytes,
                gradient_bytes,
                moments_bytes,
                activations_bytes,
            ]),
            rollouts: options.rollouts,
            context_tokens,
            micro_batch_tokens,
            threads: workers,
            gradient_shards: shards,
        }
    }
}
