//! Sizes and switches of one model: what tells Llama, Mistral, Qwen2 and Qwen3 apart.

use serde::{Deserialize, Serialize};

use crate::config::invalid;
use crate::error::PolicyError;

/// How the rotary embedding's frequencies are stretched for contexts longer than those of pre-training.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    #[serde(rename = "default")]
    None,
    /// Every frequency is divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// Llama 3.1: long waves are divided by `factor`, short ones stay, and those between are blended.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Waves longer than `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Waves shorter than `original_context / high_freq_factor` stay; larger than `low_freq_factor`.
        high_freq_factor: f64,
        /// Tokens of the context in pre-training.
        #[serde(rename = "original_max_position_embeddings")]
        original_context: usize,
    },
}

impl RopeScaling {
    /// Turns a frequency (radians per token) into the one that is used.
    pub(crate) fn scale(&self, frequency: f64) -> f64 {
        match *self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let wavelength = std::f64::consts::TAU / frequency;
                let original = original_context as f64;
                if wavelength > original / low_freq_factor {
                    frequency / factor
                } else if wavelength < original / high_freq_factor {
                    frequency
                } else {
                    let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }

    /// The same in f32 and in transformers' order of operations, so that the bits are those of torch.
    #[expect(clippy::cast_possible_truncation, reason = "torch rounds its scalars to the tensor's type")]
    pub(crate) fn scale_f32(&self, frequency: f32) -> f32 {
        match *self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor as f32,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let original = original_context as f64;
                let wavelength = std::f64::consts::TAU as f32 / frequency;
                if wavelength > (original / low_freq_factor) as f32 {
                    frequency / factor as f32
                } else if wavelength < (original / high_freq_factor) as f32 {
                    frequency
                } else {
                    let range = (high_freq_factor - low_freq_factor) as f32;
                    let smooth = (original as f32 / wavelength - low_freq_factor as f32) / range;
                    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
                }
            }
        }
    }

    fn check(&self) -> Result<(), PolicyError> {
        let at_least = |field, value: f64, least: f64| {
            let fits = value.is_finite() && value >= least;
            if fits { Ok(()) } else { Err(invalid(field, value, &format!("use a number of at least {least}"))) }
        };
        match *self {
            Self::None => Ok(()),
            Self::Linear { factor } => at_least("rope_scaling.factor", factor, 1.0),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                at_least("rope_scaling.factor", factor, 1.0)?;
                at_least("rope_scaling.low_freq_factor", low_freq_factor, f64::MIN_POSITIVE)?;
                at_least("rope_scaling.high_freq_factor", high_freq_factor, f64::MIN_POSITIVE)?;
                if high_freq_factor <= low_freq_factor {
                    let reason = "it must be larger than `low_freq_factor`";
                    return Err(invalid("rope_scaling.high_freq_factor", high_freq_factor, reason));
                }
                if original_context == 0 {
                    return Err(invalid("rope_scaling.original_context", 0, "use at least 1"));
                }
                Ok(())
            }
        }
    }
}

/// The families of models that there are kernels for, by the name that Hugging Face's `model_type` has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// Llama 2 and 3.x.
    Llama,
    /// Llama with a sliding window.
    Mistral,
    /// Llama with biases on the query, key and value projections: Qwen2 and Qwen2.5.
    Qwen2,
    /// Llama with a norm on every head's query and key.
    Qwen3,
}

impl Architecture {
    /// The entry of `architectures` in a Hugging Face `config.json`.
    #[must_use]
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// The value of `model_type` in a Hugging Face `config.json`.
    #[must_use]
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// Sizes and switches of one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own in a model's config.json")]
pub struct ModelShape {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head, even. All heads together need not be as wide as the residual stream.
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
    /// Whether query, key and value projections have biases.
    #[serde(default)]
    pub attention_bias: bool,
    /// Whether attention's output projection has a bias.
    #[serde(default)]
    pub attention_out_bias: bool,
    /// Whether each head's query and key are normalised before they are rotated.
    #[serde(default)]
    pub qk_norm: bool,
    /// How the rotary embedding's frequencies are stretched.
    #[serde(default)]
    pub rope_scaling: RopeScaling,
    /// Whether frequencies and angles of the rotary embedding are rounded to f32, as transformers computes them. A model of
    /// a Hugging Face folder was trained with those and is compared with them; this crate's own presets keep f64.
    #[serde(default)]
    pub rope_f32: bool,
    /// Tokens that a token attends to, itself included; `None` for all before it. In every layer.
    #[serde(default)]
    pub sliding_window: Option<usize>,
}

impl ModelShape {
    /// Checks that the sizes fit one another. Also run on a checkpoint's `config.json`.
    ///
    /// # Errors
    /// Names the first field that does not fit, or the switches that no supported architecture has together.
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
        if !self.head_dim.is_multiple_of(2) {
            return Err(invalid("head_dim", self.head_dim, "it must be even: its halves rotate against each other"));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 1.0) {
            return Err(invalid("rope_theta", self.rope_theta, "use a number above 1"));
        }
        self.rope_scaling.check()?;
        if !(self.rms_norm_epsilon.is_finite() && self.rms_norm_epsilon > 0.0) {
            return Err(invalid("rms_norm_epsilon", self.rms_norm_epsilon, "use a positive number"));
        }
        if self.sliding_window == Some(0) {
            return Err(invalid("sliding_window", 0, "use at least 1"));
        }
        self.architecture().map(|_| ())
    }

    /// The family that has these switches together.
    ///
    /// # Errors
    /// When none has: such a model could not be written in a form that other programs read.
    pub fn architecture(&self) -> Result<Architecture, PolicyError> {
        let biases = (self.attention_bias, self.attention_out_bias);
        match (self.qk_norm, biases, self.sliding_window) {
            (true, (false, false) | (true, true), _) => Ok(Architecture::Qwen3),
            (false, (true, false), _) => Ok(Architecture::Qwen2),
            (false, (false, false), Some(_)) => Ok(Architecture::Mistral),
            (false, (false, false) | (true, true), None) => Ok(Architecture::Llama),
            (_, (false, true) | (true, false), _) => {
                Err(invalid("attention_out_bias", self.attention_out_bias, "it must be that of `attention_bias`"))
            }
            (false, (true, true), Some(window)) => {
                Err(invalid("sliding_window", window, "no supported architecture has it together with biases"))
            }
        }
    }

    /// Number of weights.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        crate::parameters::specs(self).iter().map(crate::parameters::ParameterSpec::len).sum()
    }

    /// Bytes of keys and values that one token of one sequence takes.
    #[must_use]
    pub fn kv_bytes_per_token(&self) -> usize {
        2 * self.layers * self.kv_width() * size_of::<f32>()
    }

    /// What norms add to the mean square, as the kernels take it.
    #[expect(clippy::cast_possible_truncation, reason = "the model computes in f32")]
    pub(crate) fn epsilon(&self) -> f32 {
        self.rms_norm_epsilon as f32
    }

    /// Width of all query heads together.
    pub(crate) fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads together.
    pub(crate) fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// First position that a token attends to when `length` positions are there, itself included.
    pub(crate) fn window_start(&self, length: usize) -> usize {
        self.sliding_window.map_or(0, |window| length.saturating_sub(window))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PolicyConfig;

    fn shape() -> ModelShape {
        PolicyConfig::default().shape(512).unwrap()
    }

    #[test]
    fn switches_tell_the_architecture() {
        let of = |change: &dyn Fn(&mut ModelShape)| {
            let mut shape = shape();
            change(&mut shape);
            shape.check().map(|()| shape.architecture().unwrap().model_type()).map_err(|error| error.to_string())
        };
        assert_eq!(of(&|_| {}).unwrap(), "llama");
        assert_eq!(of(&|s| (s.attention_bias, s.attention_out_bias) = (true, true)).unwrap(), "llama");
        assert_eq!(of(&|s| s.sliding_window = Some(4)).unwrap(), "mistral");
        assert_eq!(of(&|s| s.attention_bias = true).unwrap(), "qwen2");
        assert_eq!(of(&|s| (s.qk_norm, s.head_dim) = (true, 48)).unwrap(), "qwen3");
        assert!(of(&|s| s.attention_out_bias = true).unwrap_err().contains("`attention_out_bias`"));
        assert!(of(&|s| (s.qk_norm, s.attention_bias) = (true, true)).unwrap_err().contains("`attention_out_bias`"));
        assert!(of(&|s| s.sliding_window = Some(0)).unwrap_err().contains("`sliding_window`"));
        assert!(of(&|s| s.head_dim = 33).unwrap_err().contains("`head_dim`"));
        let factor = |factor| of(&move |s| s.rope_scaling = RopeScaling::Linear { factor });
        assert!(factor(0.5).unwrap_err().contains("`rope_scaling.factor`"));
        assert!(factor(f64::NAN).is_err() && factor(2.0).is_ok());
    }

    #[test]
    fn counts_are_those_of_the_weights() {
        assert_eq!(shape().parameter_count(), 935_040);
        // Two lists of 4 layers of 128 floats.
        assert_eq!(shape().kv_bytes_per_token(), 2 * 4 * 128 * 4);
    }
}
