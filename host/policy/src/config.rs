//! The policy's config, from which a new model's [shape](ModelShape) follows.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::device::{DevicePrecision, PolicyDevice};
use crate::error::PolicyError;
use crate::lora::{LoraConfig, names_problem};
use crate::shape::{ModelShape, RopeScaling};

/// Sizes that a policy starts from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// About 0.9 million parameters with a vocabulary of 512: width 128, 4 layers of 4 heads, feed-forward width 352,
    /// context of 128 tokens. Trains on one CPU core at some 20,000 tokens a second.
    #[default]
    Tiny,
    /// About 12 million parameters with a vocabulary of 2,048: width 384, 6 layers of 6 heads, feed-forward width 1,024,
    /// context of 512 tokens.
    Small,
    /// About 100 million parameters with a vocabulary of 8,192: width 768, 12 layers of 12 heads, feed-forward width 2,304,
    /// context of 1,024 tokens.
    Base,
}

/// What a preset stands for.
struct Sizes {
    d_model: usize,
    layers: usize,
    heads: usize,
    d_ff: usize,
    context_tokens_max: usize,
}

impl Preset {
    const fn sizes(self) -> Sizes {
        match self {
            Self::Tiny => Sizes { d_model: 128, layers: 4, heads: 4, d_ff: 352, context_tokens_max: 128 },
            Self::Small => Sizes { d_model: 384, layers: 6, heads: 6, d_ff: 1_024, context_tokens_max: 512 },
            Self::Base => Sizes { d_model: 768, layers: 12, heads: 12, d_ff: 2_304, context_tokens_max: 1_024 },
        }
    }
}

/// `[policy.local.critic]`: a value model beside the policy, with a trunk and moments of its own. It is made when an algorithm
/// first asks for it, from the policy's weights of that moment and a value head of zeros. Its presence is the whole setting.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CriticConfig {}

/// `[policy]` of a run's config. Fields left out take the preset's value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyConfig {
    /// A Hugging Face folder that weights, sizes and tokenizer come from. Of the other fields only the device and the limits
    /// count then, and `context_tokens_max`, which may be less than the model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// Where the sizes of a model with random weights come from. `tiny`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<Preset>,
    /// What trains and generates: `auto`, `cpu` (this crate's kernels), `cuda`, `cuda:N`, `wgpu`, `wgpu:N` or `flex` (burn on
    /// the CPU). `cpu`.
    pub device: PolicyDevice,
    /// Numbers of the device's weights, products, keys and values: `f32` or `bf16`. Masters and optimiser are f32 in any case, and
    /// so are norms and softmaxes. Not for device `cpu`. `f32`.
    pub device_precision: DevicePrecision,
    /// Width of the residual stream; a multiple of `heads`.
    pub d_model: Option<usize>,
    /// Decoder layers.
    pub layers: Option<usize>,
    /// Query heads.
    pub heads: Option<usize>,
    /// Key and value heads; divides `heads`.
    pub kv_heads: Option<usize>,
    /// Width of the feed-forward part.
    pub d_ff: Option<usize>,
    /// Tokens of prompt and completion together.
    pub context_tokens_max: Option<usize>,
    /// Base of the rotary embedding's frequencies.
    pub rope_theta: Option<f64>,
    /// Added to the mean square in every norm.
    pub rms_norm_epsilon: Option<f64>,
    /// Whether the output projection is the embedding's transpose.
    pub tie_embeddings: Option<bool>,
    /// Standard deviation of the initial weights. 0.02; projections into the residual stream are scaled down further by
    /// `1 / sqrt(2 layers)`.
    pub initial_std: f32,
    /// Threads for generation and for training. 0 takes one per core. Results do not depend on it. Other devices than `cpu`
    /// generate on one thread, and GPUs train on one.
    pub threads: usize,
    /// Parts into which a batch's gradient is split; they are added in a fixed order, so that results do not depend on
    /// `threads`. 8; changing it changes the last bits of a gradient.
    pub gradient_shards: usize,
    /// Most tokens of one micro-batch, padding included. 512: large enough to keep a core busy, small enough for its caches.
    pub micro_batch_tokens_max: usize,
    /// Whether training keeps only the inputs of layers and computes the rest again for the backward pass: about a third
    /// more arithmetic, same bits, and activations of one layer instead of all. On device `cpu`. Off.
    pub gradient_checkpointing: bool,
    /// Memory for the logits of one micro-batch, in bytes; the loss goes over more in pieces. Other devices than `cpu` need
    /// some five times as much for what is computed of them. 64 MiB: all of a micro-batch at small vocabularies, some hundred
    /// tokens at the largest. Changing it changes the last bits of a gradient where a micro-batch does not fit.
    pub logits_bytes_max: usize,
    /// Train adapters over frozen weights: `[policy.local.lora]` of a run's config. None: all weights are trained.
    #[serde(skip)]
    pub lora: Option<LoraConfig>,
    /// Names of further whole models: `policy.local.models` of a run's config. None.
    #[serde(skip)]
    pub models: Vec<String>,
    /// Which further model answers an agent role: `[policy.local.roles]` of a run's config. None.
    #[serde(skip)]
    pub roles: BTreeMap<String, String>,
    /// Offer a critic: `[policy.local.critic]` of a run's config. None.
    #[serde(skip)]
    pub critic: Option<CriticConfig>,
    /// Memory for keys and values, of calls in flight and of what is kept for later ones, in bytes: the device's memory. 1 GiB;
    /// what does not fit is computed again. Each thread carries one call in any case.
    pub kv_cache_bytes_max: usize,
    /// The part of it that may hold what no live rollout has used, for later ones that begin alike, in bytes. 128 MiB: what
    /// many rollouts share is held while any of them lives, and what only one had is seldom asked for again.
    pub kv_cache_idle_bytes_max: usize,
    /// Whether calls in flight go on with new weights as soon as there are any. Otherwise they end on those that they
    /// started with. `false`: then all tokens of a call have one version.
    pub swap_in_flight: bool,
    /// How long an idle engine waits for the other open sessions to ask before it starts without them, in milliseconds.
    /// 50: long enough for sandboxes, short enough that one slow tool does not stop everybody. Tokens do not depend on it.
    pub batch_wait_ms_max: u64,
    /// Calls that may wait at once; a further one is refused as unavailable. 65,536.
    pub requests_waiting_max: usize,
    /// Tokens of a piece of streamed text; an agent that reads a stream gets the next piece when so many more are drawn. 8:
    /// each piece is an event of the attempt, which are bounded (`spans_max`) and recorded.
    pub stream_chunk_tokens: usize,
    /// Most tokens of a set that is recorded where sampling drops tokens before a draw (top-k, top-p, min-p, constraints). Such
    /// calls are trained on over the recorded sets; with a larger set at one of its tokens a call is not trained on. 0: no set
    /// is recorded, because nothing is dropped by default, and a set costs about three bytes a token of it.
    pub kept_tokens_max: usize,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            directory: None,
            preset: None,
            device: PolicyDevice::Cpu,
            device_precision: DevicePrecision::F32,
            d_model: None,
            layers: None,
            heads: None,
            kv_heads: None,
            d_ff: None,
            context_tokens_max: None,
            rope_theta: None,
            rms_norm_epsilon: None,
            tie_embeddings: None,
            initial_std: 0.02,
            threads: 0,
            gradient_shards: 8,
            micro_batch_tokens_max: 512,
            gradient_checkpointing: false,
            logits_bytes_max: 64 << 20,
            lora: None,
            models: vec![],
            roles: BTreeMap::new(),
            critic: None,
            kv_cache_bytes_max: 1 << 30,
            kv_cache_idle_bytes_max: 128 << 20,
            swap_in_flight: false,
            batch_wait_ms_max: 50,
            requests_waiting_max: 65_536,
            stream_chunk_tokens: 8,
            kept_tokens_max: 0,
        }
    }
}

pub(crate) fn invalid(field: &'static str, value: impl std::fmt::Display, reason: &str) -> PolicyError {
    PolicyError::InvalidConfig { field, value: value.to_string(), reason: reason.to_owned() }
}

impl PolicyConfig {
    /// The shape for a tokenizer with `vocabulary` ids.
    ///
    /// # Errors
    /// When a size does not fit the others.
    pub fn shape(&self, vocabulary: usize) -> Result<ModelShape, PolicyError> {
        let sizes = self.preset.unwrap_or_default().sizes();
        let heads = self.heads.unwrap_or(sizes.heads);
        let d_model = self.d_model.unwrap_or(sizes.d_model);
        let shape = ModelShape {
            d_model,
            layers: self.layers.unwrap_or(sizes.layers),
            heads,
            kv_heads: self.kv_heads.unwrap_or(heads),
            head_dim: Self::head_dim(d_model, heads)?,
            d_ff: self.d_ff.unwrap_or(sizes.d_ff),
            vocabulary,
            context_tokens_max: self.context_tokens_max.unwrap_or(sizes.context_tokens_max),
            rope_theta: self.rope_theta.unwrap_or(10_000.0),
            rms_norm_epsilon: self.rms_norm_epsilon.unwrap_or(1e-5),
            tie_embeddings: self.tie_embeddings.unwrap_or(false),
            attention_bias: false,
            attention_out_bias: false,
            qk_norm: false,
            rope_scaling: RopeScaling::None,
            rope_f32: false,
            sliding_window: None,
        };
        if !(self.initial_std.is_finite() && self.initial_std > 0.0) {
            return Err(invalid("initial_std", self.initial_std, "use a positive number"));
        }
        if !(1..=1_024).contains(&self.gradient_shards) {
            return Err(invalid("gradient_shards", self.gradient_shards, "use 1 to 1,024"));
        }
        if self.threads > 1_024 {
            return Err(invalid("threads", self.threads, "use 0 (one per core) to 1,024"));
        }
        if self.micro_batch_tokens_max == 0 {
            return Err(invalid("micro_batch_tokens_max", 0, "use at least 1"));
        }
        if self.logits_bytes_max == 0 {
            return Err(invalid("logits_bytes_max", 0, "use at least 1"));
        }
        if let Some(lora) = &self.lora {
            lora.check()?;
        }
        if let Err((field, problem)) = self.check_models() {
            return Err(PolicyError::Models { field, problem });
        }
        if self.requests_waiting_max == 0 {
            return Err(invalid("requests_waiting_max", 0, "use at least 1"));
        }
        if self.stream_chunk_tokens == 0 {
            return Err(invalid("stream_chunk_tokens", 0, "use at least 1"));
        }
        shape.check()?;
        Ok(shape)
    }

    /// Names of the models beside the policy, adapters or whole ones.
    #[must_use]
    pub fn named_models(&self) -> &[String] {
        self.lora.as_ref().map_or(&self.models, |lora| &lora.adapters)
    }

    /// Checks the models beside the policy, and which roles they answer.
    ///
    /// # Errors
    /// The field, and what is wrong with it and what would help.
    pub fn check_models(&self) -> Result<(), (String, String)> {
        let fail = |field: String, problem: String| Err((field, problem));
        if let (Some(_), Some(first)) = (&self.lora, self.models.first()) {
            let problem = format!(
                "with [policy.local.lora] a further model is an adapter; name `{first}` in `lora.adapters` instead"
            );
            return fail("models".to_owned(), problem);
        }
        if let Some(problem) = names_problem(&self.models) {
            return fail("models".to_owned(), problem);
        }
        let (known, section) = (self.named_models(), if self.lora.is_some() { "lora.adapters" } else { "models" });
        for (role, model) in &self.roles {
            if role.is_empty() {
                return fail("roles".to_owned(), "\"\" is no role; agents that say none ask as `agent`".to_owned());
            }
            if model == "policy" {
                let problem = "roles that are not named ask the policy; remove the line".to_owned();
                return fail(format!("roles.{role}"), problem);
            }
            if !known.contains(model) {
                let has = if known.is_empty() { "is empty".to_owned() } else { format!("has {}", known.join(", ")) };
                let problem = format!("there is no model `{model}`; add it to `policy.local.{section}`, which {has}");
                return fail(format!("roles.{role}"), problem);
            }
        }
        Ok(())
    }

    /// The first field beside `directory` that says something about a model with random weights.
    #[must_use]
    pub fn field_against_directory(&self) -> Option<&'static str> {
        let fields = [
            ("preset", self.preset.is_some()),
            ("d_model", self.d_model.is_some()),
            ("layers", self.layers.is_some()),
            ("heads", self.heads.is_some()),
            ("kv_heads", self.kv_heads.is_some()),
            ("d_ff", self.d_ff.is_some()),
            ("rope_theta", self.rope_theta.is_some()),
            ("rms_norm_epsilon", self.rms_norm_epsilon.is_some()),
            ("tie_embeddings", self.tie_embeddings.is_some()),
        ];
        self.directory.as_ref()?;
        fields.into_iter().find(|(_, given)| *given).map(|(field, _)| field)
    }

    /// Width of a head when all heads together are as wide as the residual stream.
    fn head_dim(d_model: usize, heads: usize) -> Result<usize, PolicyError> {
        if heads == 0 || !d_model.is_multiple_of(heads) {
            return Err(invalid("heads", heads, "it must divide `d_model`"));
        }
        Ok(d_model / heads)
    }

    /// Threads to use: the config's number, or one per core.
    pub(crate) fn thread_count(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            threads => threads,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_make_the_tiny_model() {
        let shape = PolicyConfig::default().shape(512).unwrap();
        assert_eq!(
            (shape.d_model, shape.layers, shape.heads, shape.d_ff, shape.context_tokens_max),
            (128, 4, 4, 352, 128)
        );
    }

    #[test]
    fn presets_have_the_sizes_they_say() {
        let count = |preset, vocabulary| {
            let config = PolicyConfig { preset: Some(preset), ..PolicyConfig::default() };
            config.shape(vocabulary).unwrap().parameter_count() / 100_000
        };
        assert_eq!([count(Preset::Tiny, 512), count(Preset::Small, 2_048), count(Preset::Base, 8_192)], [9, 121, 1046]);
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let refused = |config: PolicyConfig| config.shape(512).unwrap_err().to_string();
        let base = PolicyConfig::default;
        assert!(refused(PolicyConfig { kv_heads: Some(3), ..base() }).contains("`kv_heads`"));
        assert!(refused(PolicyConfig { heads: Some(0), ..base() }).contains("`heads`"));
        assert!(refused(PolicyConfig { d_model: Some(100), ..base() }).contains("`head_dim`"));
        assert!(refused(PolicyConfig { d_model: Some(102), ..base() }).contains("`heads`"));
        assert!(refused(PolicyConfig { context_tokens_max: Some(0), ..base() }).contains("`context_tokens_max`"));
        assert!(refused(PolicyConfig { initial_std: f32::NAN, ..base() }).contains("`initial_std`"));
        let named = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let roles = |model: &str| BTreeMap::from([("writer".to_owned(), model.to_owned())]);
        let both = PolicyConfig { lora: Some(LoraConfig::default()), models: named(&["a"]), ..base() };
        assert!(refused(both).contains("`models`: with [policy.local.lora]"));
        let nobody = refused(PolicyConfig { models: named(&["a"]), roles: roles("b"), ..base() });
        assert!(nobody.contains("`roles.writer`") && nobody.contains("`policy.local.models`, which has a"), "{nobody}");
        assert!(refused(PolicyConfig { roles: roles("policy"), ..base() }).contains("remove the line"));
        assert!(refused(PolicyConfig { models: named(&["a", "a"]), ..base() }).contains("once"));
        assert!(refused(PolicyConfig { models: named(&["../a"]), ..base() }).contains("a-z"));
        PolicyConfig { models: named(&["a"]), roles: roles("a"), ..base() }.shape(512).unwrap();
        let unknown = serde_json::from_str::<PolicyConfig>(r#"{"d_modell": 3}"#).unwrap_err();
        assert!(unknown.to_string().contains("d_modell"));
        let device = serde_json::from_str::<PolicyConfig>(r#"{"device": "gpu"}"#).unwrap_err().to_string();
        assert!(device.contains("`gpu` is no device"), "{device}");
        let flex: PolicyConfig = serde_json::from_str(r#"{"device": "flex"}"#).unwrap();
        assert_eq!(flex.device, PolicyDevice::Flex);
    }
}
