//! The policy's config and the shape of the model that follows from it.

use serde::{Deserialize, Serialize};

use crate::error::PolicyError;

/// Sizes that a policy starts from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// About 0.9 million parameters with a vocabulary of 512: width 128, 4 layers of 4 heads, feed-forward width 352,
    /// context of 128 tokens. Trains on one CPU core at some 20,000 tokens a second.
    #[default]
    Tiny,
}

/// What runs the model's training. Generation uses the sampler's kernels on either.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum PolicyDevice {
    /// Kernels of this crate: the same that sample, so that log-probs of sampling and training are equal bit by bit.
    #[default]
    Cpu,
    /// burn's CPU backend with its autodiff: slower, and the way that burn's GPU backends take.
    Flex,
}

impl std::str::FromStr for PolicyDevice {
    type Err = PolicyError;
    fn from_str(name: &str) -> Result<Self, PolicyError> {
        match name {
            "cpu" => Ok(Self::Cpu),
            "flex" => Ok(Self::Flex),
            other => Err(PolicyError::UnsupportedDevice(other.to_owned())),
        }
    }
}

impl TryFrom<String> for PolicyDevice {
    type Error = PolicyError;
    fn try_from(name: String) -> Result<Self, PolicyError> {
        name.parse()
    }
}

impl From<PolicyDevice> for String {
    fn from(device: PolicyDevice) -> Self {
        match device {
            PolicyDevice::Cpu => "cpu",
            PolicyDevice::Flex => "flex",
        }
        .to_owned()
    }
}

/// `[policy]` of a run's config. Fields left out take the preset's value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyConfig {
    /// Where sizes come from. `tiny`.
    pub preset: Preset,
    /// What runs training: `cpu` (this crate's kernels) or `flex` (burn). `cpu`.
    pub device: PolicyDevice,
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
    /// Threads for generation and for training. 0 takes one per core. Results do not depend on it.
    pub threads: usize,
    /// Parts into which a batch's gradient is split; they are added in a fixed order, so that results do not depend on
    /// `threads`. 8; changing it changes the last bits of a gradient.
    pub gradient_shards: usize,
    /// Most tokens of one micro-batch, padding included. 512: large enough to keep a core busy, small enough for its caches.
    pub micro_batch_tokens_max: usize,
    /// Memory for keys and values that sessions keep between calls, in bytes. 1 GiB; what does not fit is computed again.
    pub kv_cache_bytes_max: usize,
    /// How long an idle engine waits for the other open sessions to ask before it starts without them, in milliseconds.
    /// 50: long enough for sandboxes, short enough that one slow tool does not stop everybody. Tokens do not depend on it.
    pub batch_wait_ms_max: u64,
    /// Calls that may wait at once; a further one is refused as unavailable. 65,536.
    pub requests_waiting_max: usize,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            preset: Preset::Tiny,
            device: PolicyDevice::Cpu,
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
            kv_cache_bytes_max: 1 << 30,
            batch_wait_ms_max: 50,
            requests_waiting_max: 65_536,
        }
    }
}

/// Sizes of one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelShape {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Width of the feed-forward part.
    pub d_ff: usize,
    /// Token ids.
    pub vocabulary: usize,
    /// Tokens of prompt and completion together.
    pub context_tokens_max: usize,
    /// Base of the rotary embedding's frequencies.
    pub rope_theta: f64,
    /// Added to the mean square in every norm.
    pub rms_norm_epsilon: f64,
    /// Whether the output projection is the embedding's transpose.
    pub tie_embeddings: bool,
}

/// Head widths are multiples of this, so that every kernel works on whole vectors.
pub(crate) const HEAD_DIM_MULTIPLE: usize = 16;

fn invalid(field: &'static str, value: impl std::fmt::Display, reason: &str) -> PolicyError {
    PolicyError::InvalidConfig { field, value: value.to_string(), reason: reason.to_owned() }
}

impl PolicyConfig {
    /// The shape for a tokenizer with `vocabulary` ids.
    ///
    /// # Errors
    /// When a size does not fit the others.
    pub fn shape(&self, vocabulary: usize) -> Result<ModelShape, PolicyError> {
        let Preset::Tiny = self.preset;
        let heads = self.heads.unwrap_or(4);
        let d_model = self.d_model.unwrap_or(128);
        let shape = ModelShape {
            d_model,
            layers: self.layers.unwrap_or(4),
            heads,
            kv_heads: self.kv_heads.unwrap_or(heads),
            head_dim: d_model.checked_div(heads).unwrap_or(0),
            d_ff: self.d_ff.unwrap_or(352),
            vocabulary,
            context_tokens_max: self.context_tokens_max.unwrap_or(128),
            rope_theta: self.rope_theta.unwrap_or(10_000.0),
            rms_norm_epsilon: self.rms_norm_epsilon.unwrap_or(1e-5),
            tie_embeddings: self.tie_embeddings.unwrap_or(false),
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
        if self.requests_waiting_max == 0 {
            return Err(invalid("requests_waiting_max", 0, "use at least 1"));
        }
        shape.check()?;
        Ok(shape)
    }

    /// Threads to use: the config's number, or one per core.
    pub(crate) fn thread_count(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            threads => threads,
        }
    }
}

impl ModelShape {
    /// Checks that the sizes fit one another. Also run on a checkpoint's `config.json`.
    ///
    /// # Errors
    /// Names the first field that does not fit.
    pub fn check(&self) -> Result<(), PolicyError> {
        let sizes = [
            ("d_model", self.d_model, 16_384),
            ("layers", self.layers, 256),
            ("heads", self.heads, 256),
            ("kv_heads", self.kv_heads, 256),
            ("head_dim", self.head_dim, 512),
            ("d_ff", self.d_ff, 65_536),
            ("vocabulary", self.vocabulary, 1 << 20),
            ("context_tokens_max", self.context_tokens_max, 1 << 20),
        ];
        for (field, value, max) in sizes {
            if value == 0 || value > max {
                return Err(invalid(field, value, &format!("use 1 to {max}")));
            }
        }
        if self.context_tokens_max < 2 {
            return Err(invalid("context_tokens_max", self.context_tokens_max, "use at least 2"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(invalid("kv_heads", self.kv_heads, "it must divide `heads`"));
        }
        if !self.head_dim.is_multiple_of(HEAD_DIM_MULTIPLE) {
            return Err(invalid("head_dim", self.head_dim, "d_model / heads must be a multiple of 16"));
        }
        if self.head_dim * self.heads != self.d_model {
            return Err(invalid("d_model", self.d_model, "it must be a multiple of `heads`"));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 1.0) {
            return Err(invalid("rope_theta", self.rope_theta, "use a number above 1"));
        }
        if !(self.rms_norm_epsilon.is_finite() && self.rms_norm_epsilon > 0.0) {
            return Err(invalid("rms_norm_epsilon", self.rms_norm_epsilon, "use a positive number"));
        }
        Ok(())
    }

    /// Width of all query heads together; equals `d_model`.
    pub(crate) fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads together.
    pub(crate) fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
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
    fn what_does_not_fit_is_refused_by_name() {
        let refused = |config: PolicyConfig| config.shape(512).unwrap_err().to_string();
        let base = PolicyConfig::default;
        assert!(refused(PolicyConfig { kv_heads: Some(3), ..base() }).contains("`kv_heads`"));
        assert!(refused(PolicyConfig { heads: Some(0), ..base() }).contains("`heads`"));
        assert!(refused(PolicyConfig { d_model: Some(100), ..base() }).contains("`head_dim`"));
        assert!(refused(PolicyConfig { context_tokens_max: Some(0), ..base() }).contains("`context_tokens_max`"));
        assert!(refused(PolicyConfig { initial_std: f32::NAN, ..base() }).contains("`initial_std`"));
        let unknown = serde_json::from_str::<PolicyConfig>(r#"{"d_modell": 3}"#).unwrap_err();
        assert!(unknown.to_string().contains("d_modell"));
        let device = serde_json::from_str::<PolicyConfig>(r#"{"device": "cuda"}"#).unwrap_err().to_string();
        assert!(device.contains("device `cuda` is not available: this build offers `cpu` and `flex`"), "{device}");
        let flex: PolicyConfig = serde_json::from_str(r#"{"device": "flex"}"#).unwrap();
        assert_eq!(flex.device, PolicyDevice::Flex);
    }
}
