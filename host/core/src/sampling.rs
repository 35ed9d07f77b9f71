//! How tokens are drawn.
//!
//! [`Sampling`] is recorded with every call and every rollout. Postcard, which the store uses, knows no field names, so
//! what was added since its first form stands in the last field, behind a number of its own: older records are read as
//! they are, and a call that uses nothing new is recorded in the same bytes as before.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Most entries of [`Sampling::logit_bias`].
pub const LOGIT_BIASES_MAX: usize = 1_024;
/// Most entries of [`Sampling::stop`].
pub const STOP_TEXTS_MAX: usize = 16;
/// Longest text of [`Sampling::stop`] in bytes.
pub const STOP_BYTES_MAX: usize = 256;
/// Most entries of [`Sampling::stop_token_ids`].
pub const STOP_TOKENS_MAX: usize = 64;
/// Longest schema or regular expression of [`Sampling::constraint`] in bytes.
pub const CONSTRAINT_BYTES_MAX: usize = 64 << 10;

/// How tokens are drawn.
///
/// The logits of a position go through these in this order, which is that of transformers (`GenerationMixin`'s
/// `_get_logits_processor`): `logit_bias`, `repetition_penalty`, `constraint`, `temperature`, `top_k`, `top_p`, `min_p`.
/// vLLM differs in one place: its `min_p` comes before `top_k` and `top_p`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", default, deny_unknown_fields)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy decoding.
    pub temperature: f32,
    /// Keeps the smallest set of tokens with at least this probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps the k most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Drops tokens less probable than this share of the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive logits of the tokens that prompt and completion have already, and multiplies negative ones; 1
    /// changes nothing, more makes repetition less likely (Keskar et al. 2019, CTRL).
    #[serde(skip_serializing_if = "is_one")]
    pub repetition_penalty: f32,
    /// What is added to the logits of single tokens. At most [`LOGIT_BIASES_MAX`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logit_bias: Vec<TokenBias>,
    /// Most tokens of the completion, the end token included. 0 means the engine's own limit.
    pub max_tokens: u32,
    /// Texts that end the completion; they are not part of it. At most [`STOP_TEXTS_MAX`].
    pub stop: Vec<String>,
    /// Tokens that end the completion as the model's own end token does: drawn, trained on, and not part of the text. At
    /// most [`STOP_TOKENS_MAX`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stop_token_ids: Vec<u32>,
    /// Seed of the draw. `None` lets the host derive it from the attempt's seed and the call's index.
    pub seed: Option<u64>,
    /// Shape that the completion must have.
    pub constraint: Option<Constraint>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_one(value: &f32) -> bool {
    value.to_bits() == 1.0_f32.to_bits()
}

/// What is added to one token's logit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBias {
    /// The token's id.
    pub token: u32,
    /// What is added, -100 to 100; -100 bans the token in practice.
    pub bias: f32,
}

/// A shape that a completion must have.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Constraint {
    /// JSON that fits this schema (JSON text).
    JsonSchema(String),
    /// Text that matches this regular expression as a whole.
    Regex(String),
}

impl Constraint {
    /// The schema's or the expression's text.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Self::JsonSchema(text) | Self::Regex(text) => text,
        }
    }
}

impl Default for Sampling {
    /// Temperature 1 without truncation: what training rollouts need (ALGORITHMS.md section 7).
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            logit_bias: vec![],
            max_tokens: 0,
            stop: vec![],
            stop_token_ids: vec![],
            seed: None,
            constraint: None,
        }
    }
}

/// A value of [`Sampling`] that is out of its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` is {value}: {expected}")]
pub struct SamplingError {
    /// The field.
    pub field: &'static str,
    /// What it has.
    pub value: String,
    /// What it may have.
    pub expected: String,
}

impl Sampling {
    /// Checks every value against its range. What depends on the model (whether a token id is of its vocabulary, whether a
    /// constraint compiles) is checked by the model.
    ///
    /// # Errors
    /// Names the first field that is out of its range, and the range.
    pub fn check(&self) -> Result<(), SamplingError> {
        let error = |field: &'static str, value: String, expected: &str| {
            Err(SamplingError { field, value, expected: expected.to_owned() })
        };
        // A subnormal divisor would turn logits into infinities.
        if self.temperature != 0.0 && !(1e-3..=100.0).contains(&self.temperature) {
            return error("temperature", self.temperature.to_string(), "it must be 0 (greedy) or 0.001 to 100");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return error("top_p", self.top_p.to_string(), "it must be above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return error("min_p", self.min_p.to_string(), "it must be 0 to 1");
        }
        if !(0.1..=10.0).contains(&self.repetition_penalty) {
            return error("repetition_penalty", self.repetition_penalty.to_string(), "it must be 0.1 to 10");
        }
        let entries = |count: usize| format!("a list of {count}");
        if self.logit_bias.len() > LOGIT_BIASES_MAX {
            let expected = format!("it holds at most {LOGIT_BIASES_MAX} entries");
            return error("logit_bias", entries(self.logit_bias.len()), &expected);
        }
        if let Some(entry) = self.logit_bias.iter().find(|entry| !(-100.0..=100.0).contains(&entry.bias)) {
            let value = format!("{} for token {}", entry.bias, entry.token);
            return error("logit_bias", value, "a bias must be -100 to 100");
        }
        let mut tokens: Vec<u32> = self.logit_bias.iter().map(|entry| entry.token).collect();
        tokens.sort_unstable();
        if let Some(twice) = tokens.windows(2).find(|pair| pair.first() == pair.last()).and_then(<[u32]>::first) {
            return error("logit_bias", format!("given twice for token {twice}"), "a token has one bias");
        }
        if self.stop.len() > STOP_TEXTS_MAX {
            let expected = format!("it holds at most {STOP_TEXTS_MAX} texts");
            return error("stop", entries(self.stop.len()), &expected);
        }
        if let Some(stop) = self.stop.iter().find(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX) {
            let expected = format!("each must have 1 to {STOP_BYTES_MAX} bytes");
            return error("stop", format!("a list with a text of {} bytes", stop.len()), &expected);
        }
        if self.stop_token_ids.len() > STOP_TOKENS_MAX {
            let expected = format!("it holds at most {STOP_TOKENS_MAX} ids");
            return error("stop_token_ids", entries(self.stop_token_ids.len()), &expected);
        }
        if let Some(constraint) = &self.constraint
            && !(1..=CONSTRAINT_BYTES_MAX).contains(&constraint.text().len())
        {
            let expected = format!("a schema or regular expression has 1 to {CONSTRAINT_BYTES_MAX} bytes");
            return error("constraint", format!("{} bytes long", constraint.text().len()), &expected);
        }
        Ok(())
    }

    /// Fills what a request leaves at its default from what the run's config sets for the rollout. A rollout whose temperature
    /// is not the default (an evaluation) overrides the request's.
    #[must_use]
    pub fn filled_from(self, rollout: &Self) -> Self {
        let rollout_decides = rollout.temperature.to_bits() != Self::default().temperature.to_bits();
        let filled = self.or(rollout);
        Self { temperature: if rollout_decides { rollout.temperature } else { filled.temperature }, ..filled }
    }

    /// These settings, with those of `given` wherever these have the default.
    #[must_use]
    pub fn or(self, given: &Self) -> Self {
        let default = Self::default();
        let number = |own: f32, given: f32, default: f32| if own.to_bits() == default.to_bits() { given } else { own };
        let count = |own: u32, given: u32| if own == 0 { given } else { own };
        Self {
            temperature: number(self.temperature, given.temperature, default.temperature),
            top_p: number(self.top_p, given.top_p, default.top_p),
            top_k: count(self.top_k, given.top_k),
            min_p: number(self.min_p, given.min_p, default.min_p),
            repetition_penalty: number(self.repetition_penalty, given.repetition_penalty, default.repetition_penalty),
            logit_bias: list(self.logit_bias, &given.logit_bias),
            max_tokens: count(self.max_tokens, given.max_tokens),
            stop: list(self.stop, &given.stop),
            stop_token_ids: list(self.stop_token_ids, &given.stop_token_ids),
            seed: self.seed.or(given.seed),
            constraint: self.constraint.or_else(|| given.constraint.clone()),
        }
    }
}

fn list<T: Clone>(own: Vec<T>, given: &[T]) -> Vec<T> {
    if own.is_empty() { given.to_vec() } else { own }
}

/// [`Sampling`] where fields have no names.
#[derive(Serialize, Deserialize)]
struct Positional<'a> {
    temperature: f32,
    top_p: f32,
    top_k: u32,
    min_p: f32,
    max_tokens: u32,
    stop: Cow<'a, [String]>,
    seed: Option<u64>,
    last: Last<'a>,
}

/// Cases may only be added behind the others. The first two are the bytes of an `Option<Constraint>`, which stood here first.
#[derive(Serialize, Deserialize)]
enum Last<'a> {
    Nothing,
    Constraint(Cow<'a, Constraint>),
    /// Since schema 3 of the store.
    Extended {
        constraint: Option<Cow<'a, Constraint>>,
        repetition_penalty: f32,
        logit_bias: Cow<'a, [TokenBias]>,
        stop_token_ids: Cow<'a, [u32]>,
    },
}

impl Serialize for Sampling {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return Self::serialize(self, serializer);
        }
        let extended =
            !is_one(&self.repetition_penalty) || !self.logit_bias.is_empty() || !self.stop_token_ids.is_empty();
        let constraint = self.constraint.as_ref().map(Cow::Borrowed);
        let last = match constraint {
            constraint if extended => Last::Extended {
                constraint,
                repetition_penalty: self.repetition_penalty,
                logit_bias: Cow::Borrowed(&self.logit_bias),
                stop_token_ids: Cow::Borrowed(&self.stop_token_ids),
            },
            Some(constraint) => Last::Constraint(constraint),
            None => Last::Nothing,
        };
        let positional = Positional {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            max_tokens: self.max_tokens,
            stop: Cow::Borrowed(&self.stop),
            seed: self.seed,
            last,
        };
        positional.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Sampling {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            return Self::deserialize(deserializer);
        }
        let read = Positional::deserialize(deserializer)?;
        let mut sampling = Self {
            temperature: read.temperature,
            top_p: read.top_p,
            top_k: read.top_k,
            min_p: read.min_p,
            max_tokens: read.max_tokens,
            stop: read.stop.into_owned(),
            seed: read.seed,
            ..Self::default()
        };
        match read.last {
            Last::Nothing => {}
            Last::Constraint(constraint) => sampling.constraint = Some(constraint.into_owned()),
            Last::Extended { constraint, repetition_penalty, logit_bias, stop_token_ids } => {
                sampling.constraint = constraint.map(Cow::into_owned);
                sampling.repetition_penalty = repetition_penalty;
                sampling.logit_bias = logit_bias.into_owned();
                sampling.stop_token_ids = stop_token_ids.into_owned();
            }
        }
        Ok(sampling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn everything() -> Sampling {
        Sampling {
            temperature: 0.7,
            repetition_penalty: 1.25,
            logit_bias: vec![TokenBias { token: 70_000, bias: -100.0 }, TokenBias { token: 3, bias: 0.5 }],
            stop: vec!["\n".to_owned()],
            stop_token_ids: vec![7, u32::MAX],
            seed: Some(u64::MAX),
            constraint: Some(Constraint::Regex("a+".to_owned())),
            ..Sampling::default()
        }
    }

    #[test]
    fn records_of_before_are_read_and_what_uses_nothing_new_has_their_bytes() {
        // The fields as they stood in schema 2 of the store.
        type Old = (f32, f32, u32, f32, u32, Vec<String>, Option<u64>, Option<Constraint>);
        for constraint in [None, Some(Constraint::JsonSchema("{}".to_owned())), Some(Constraint::Regex("a".to_owned()))]
        {
            let old: Old = (0.5, 0.9, 300, 0.1, 7, vec!["x".to_owned()], Some(9), constraint.clone());
            let bytes = postcard::to_stdvec(&old).unwrap();
            let read: Sampling = postcard::from_bytes(&bytes).unwrap();
            assert_eq!(postcard::to_stdvec(&read).unwrap(), bytes);
            assert_eq!((read.top_k, read.seed, read.constraint), (300, Some(9), constraint));
            assert_eq!((read.repetition_penalty, read.logit_bias, read.stop_token_ids), (1.0, vec![], vec![]));
        }
        for new in [everything(), Sampling { constraint: None, ..everything() }, Sampling::default()] {
            let bytes = postcard::to_stdvec(&new).unwrap();
            assert_eq!(postcard::from_bytes::<Sampling>(&bytes).unwrap(), new);
            let json = serde_json::to_string(&new).unwrap();
            assert_eq!(serde_json::from_str::<Sampling>(&json).unwrap(), new);
        }
        let json = serde_json::to_string(&Sampling::default()).unwrap();
        assert!(!json.contains("logit_bias") && !json.contains("penalty") && !json.contains("token_ids"), "{json}");
        let toml = "logit_bias = [{ token = 5, bias = -2.0 }]\nstop_token_ids = [1]\nrepetition_penalty = 1.1";
        let read: Sampling = toml::from_str(toml).unwrap();
        assert_eq!(read.logit_bias, [TokenBias { token: 5, bias: -2.0 }]);
        assert!(toml::from_str::<Sampling>("repetition_penaltyy = 1.1").is_err());
    }

    #[test]
    fn every_value_out_of_its_range_is_named_with_the_range() {
        let base = everything;
        assert_eq!(base().check(), Ok(()));
        let bias = |token, bias| TokenBias { token, bias };
        let wrong = [
            (
                Sampling { temperature: f32::NAN, ..base() },
                "`temperature` is NaN: it must be 0 (greedy) or 0.001 to 100",
            ),
            (Sampling { temperature: 1e-4, ..base() }, "`temperature` is 0.0001: "),
            (Sampling { temperature: -1.0, ..base() }, "`temperature` is -1: "),
            (Sampling { top_p: 1.5, ..base() }, "`top_p` is 1.5: it must be above 0 and at most 1"),
            (Sampling { min_p: -0.1, ..base() }, "`min_p` is -0.1: it must be 0 to 1"),
            (Sampling { repetition_penalty: 0.0, ..base() }, "`repetition_penalty` is 0: it must be 0.1 to 10"),
            (
                Sampling { logit_bias: vec![bias(4, f32::INFINITY)], ..base() },
                "`logit_bias` is inf for token 4: a bias",
            ),
            (
                Sampling { logit_bias: vec![bias(4, 1.0), bias(2, 1.0), bias(4, 2.0)], ..base() },
                "`logit_bias` is given twice for token 4: a token has one bias",
            ),
            (
                Sampling { logit_bias: vec![bias(4, 1.0); 1_025], ..base() },
                "`logit_bias` is a list of 1025: it holds at",
            ),
            (Sampling { stop: vec![String::new()], ..base() }, "`stop` is a list with a text of 0 bytes: each must"),
            (
                Sampling { stop: vec!["x".to_owned(); 17], ..base() },
                "`stop` is a list of 17: it holds at most 16 texts",
            ),
            (
                Sampling { stop_token_ids: vec![0; 65], ..base() },
                "`stop_token_ids` is a list of 65: it holds at most 64",
            ),
            (
                Sampling { constraint: Some(Constraint::Regex(String::new())), ..base() },
                "`constraint` is 0 bytes long: a schema or regular expression has 1 to 65536 bytes",
            ),
        ];
        for (sampling, expected) in wrong {
            let error = sampling.check().unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn defaults_are_filled_and_the_rest_is_kept() {
        let own = Sampling { top_k: 5, ..Sampling::default() };
        let filled = own.or(&everything());
        assert_eq!(filled, Sampling { top_k: 5, ..everything() });
        let kept = everything().or(&Sampling { temperature: 9.0, top_p: 0.5, ..Sampling::default() });
        assert_eq!(kept.temperature.to_bits(), 0.7_f32.to_bits());
    }
}
