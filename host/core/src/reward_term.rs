//! Automatic rewards: what the host itself can tell about an attempt from its record, declared in a run's config.
//!
//! This is the declaration. What each kind computes is in `fulgurite-adapter`, as pure functions of spans, so a replay finds
//! the same rewards.

use serde::{Deserialize, Serialize};

use crate::reward::DIMENSION_BYTES_MAX;

/// Most terms of a run. 32: every one of them may add a reward to every call.
pub const REWARD_TERMS_MAX: usize = 32;

/// What a term looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RewardTermKind {
    /// Whether tool calls succeeded.
    ToolStatus,
    /// Whether the arguments that the policy wrote for a tool fit that tool's JSON schema.
    ToolSchema,
    /// Whether the policy asked for the same tool with the same arguments before.
    RepeatedCall,
    /// Whether an answer matches a regular expression.
    Format,
    /// How many tokens the policy drew.
    Length,
    /// How far it came beyond the length that is wanted (DAPO, arXiv 2503.14476, section 3.4).
    Overlong,
    /// How much of an answer repeats itself.
    Repetition,
}

impl RewardTermKind {
    /// Its name in config.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ToolStatus => "tool-status",
            Self::ToolSchema => "tool-schema",
            Self::RepeatedCall => "repeated-call",
            Self::Format => "format",
            Self::Length => "length",
            Self::Overlong => "overlong",
            Self::Repetition => "repetition",
        }
    }

    /// Value of what is as it should be, and of what is not, where the kind tells the two apart. By default nothing but a
    /// mistake counts, because whoever is paid for each good call makes many; an answer's format is paid for as a whole.
    #[must_use]
    pub const fn default_values(self) -> Option<(f64, f64)> {
        match self {
            Self::ToolStatus | Self::ToolSchema | Self::RepeatedCall => Some((0.0, -1.0)),
            Self::Format => Some((1.0, 0.0)),
            Self::Length | Self::Overlong | Self::Repetition => None,
        }
    }

    /// What it belongs to unless the config says otherwise.
    #[must_use]
    pub const fn default_scope(self) -> TermScope {
        match self {
            Self::ToolStatus | Self::ToolSchema | Self::RepeatedCall | Self::Repetition => TermScope::Call,
            Self::Format | Self::Length | Self::Overlong => TermScope::Rollout,
        }
    }
}

/// What a term's rewards belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TermScope {
    /// Each LLM call has its own.
    Call,
    /// The whole rollout has one.
    Rollout,
}

/// One `[[reward.term]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardTerm {
    /// What is looked at.
    pub kind: RewardTermKind,
    /// What the value is multiplied by; negative turns a penalty into a reward. 1.
    #[serde(default = "one")]
    pub weight: f64,
    /// The reward's dimension. None: the kind's name with `_` for `-`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dimension: Option<String>,
    /// Dimension to which it is added in training as well, for example `reward`, which algorithms read by default. None: it
    /// stays by itself. Held-out evaluations never add it, so that what they measure is the grader's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sum_into: Option<String>,
    /// Whether each call has a reward of its own or the rollout has one. None: [`RewardTermKind::default_scope`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per: Option<TermScope>,
    /// Value of what is as it should be. None: [`RewardTermKind::default_values`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub good: Option<f64>,
    /// Value of what is not. None: [`RewardTermKind::default_values`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bad: Option<f64>,
    /// `format`: the regular expression that an answer's text must match somewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// `length` and `overlong`: tokens at which the value is -1, and beyond which it falls no further.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_max: Option<u32>,
    /// `overlong`: tokens before `tokens_max` in which the value falls from 0 to -1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_tokens: Option<u32>,
    /// `repetition`: tokens of an n-gram. None: 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ngram_tokens: Option<u32>,
}

fn one() -> f64 {
    1.0
}

impl RewardTerm {
    /// A term of a kind with its defaults.
    #[must_use]
    pub const fn new(kind: RewardTermKind) -> Self {
        Self {
            kind,
            weight: 1.0,
            dimension: None,
            sum_into: None,
            per: None,
            good: None,
            bad: None,
            pattern: None,
            tokens_max: None,
            cache_tokens: None,
            ngram_tokens: None,
        }
    }

    /// The dimension of its rewards.
    #[must_use]
    pub fn dimension(&self) -> String {
        self.dimension.clone().unwrap_or_else(|| self.kind.as_str().replace('-', "_"))
    }

    /// Checks everything but the pattern, which takes a regular expression's parser.
    ///
    /// # Errors
    /// Field and problem.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let kind = self.kind.as_str();
        for (field, value) in [("weight", Some(self.weight)), ("good", self.good), ("bad", self.bad)] {
            if let Some(value) = value.filter(|value| !value.is_finite()) {
                return Err((field, format!("{value} is not a finite number")));
            }
        }
        for (field, name) in [("dimension", &self.dimension), ("sum_into", &self.sum_into)] {
            if let Some(name) = name.as_ref().filter(|name| name.is_empty() || name.len() > DIMENSION_BYTES_MAX) {
                return Err((field, format!("it has {} bytes; use 1 to {DIMENSION_BYTES_MAX}", name.len())));
            }
        }
        if self.sum_into.as_ref() == Some(&self.dimension()) {
            return Err(("sum_into", "it is the term's own dimension; name another, or leave it away".to_owned()));
        }
        let judges = self.kind.default_values().is_some();
        let (is_format, is_overlong) = (self.kind == RewardTermKind::Format, self.kind == RewardTermKind::Overlong);
        let is_length = is_overlong || self.kind == RewardTermKind::Length;
        let fields = [
            ("good", self.good.is_some(), judges, false),
            ("bad", self.bad.is_some(), judges, false),
            ("pattern", self.pattern.is_some(), is_format, is_format),
            ("tokens_max", self.tokens_max.is_some(), is_length, is_length),
            ("cache_tokens", self.cache_tokens.is_some(), is_overlong, is_overlong),
            ("ngram_tokens", self.ngram_tokens.is_some(), self.kind == RewardTermKind::Repetition, false),
        ];
        for (field, given, allowed, needed) in fields {
            if given && !allowed {
                return Err((field, format!("a term of kind `{kind}` has no such field; remove it")));
            }
            if needed && !given {
                return Err((field, format!("missing; a term of kind `{kind}` needs it")));
            }
        }
        let at_least_one =
            [("tokens_max", self.tokens_max), ("cache_tokens", self.cache_tokens), ("ngram_tokens", self.ngram_tokens)];
        if let Some((field, _)) = at_least_one.iter().find(|(_, value)| *value == Some(0)) {
            return Err((field, "must be at least 1".to_owned()));
        }
        match (self.tokens_max, self.cache_tokens) {
            (Some(most), Some(cache)) if cache > most => {
                Err(("cache_tokens", format!("{cache} is above `tokens_max`, which is {most}")))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_names_the_field_that_is_wrong() {
        let refused = |json: &str| {
            let term: RewardTerm = serde_json::from_str(json).unwrap();
            term.check().unwrap_err().0
        };
        for (json, field) in [
            (r#"{"kind":"format"}"#, "pattern"),
            (r#"{"kind":"length"}"#, "tokens_max"),
            (r#"{"kind":"overlong","tokens_max":10}"#, "cache_tokens"),
            (r#"{"kind":"overlong","tokens_max":10,"cache_tokens":11}"#, "cache_tokens"),
            (r#"{"kind":"overlong","tokens_max":10,"cache_tokens":0}"#, "cache_tokens"),
            (r#"{"kind":"length","tokens_max":0}"#, "tokens_max"),
            (r#"{"kind":"length","tokens_max":9,"good":1}"#, "good"),
            (r#"{"kind":"tool-status","pattern":"x"}"#, "pattern"),
            (r#"{"kind":"tool-status","ngram_tokens":2}"#, "ngram_tokens"),
            (r#"{"kind":"repetition","ngram_tokens":0}"#, "ngram_tokens"),
            (r#"{"kind":"tool-status","dimension":""}"#, "dimension"),
            (r#"{"kind":"tool-status","sum_into":"tool_status"}"#, "sum_into"),
        ] {
            assert_eq!(refused(json), field, "{json}");
        }
        let term = RewardTerm { weight: f64::NAN, ..RewardTerm::new(RewardTermKind::ToolStatus) };
        assert_eq!(term.check().unwrap_err().0, "weight");
        assert!(serde_json::from_str::<RewardTerm>(r#"{"kind":"length","tokens":3}"#).is_err());
        let term: RewardTerm = serde_json::from_str(r#"{"kind":"tool-status","sum_into":"reward"}"#).unwrap();
        assert_eq!((term.check(), term.dimension().as_str()), (Ok(()), "tool_status"));
    }
}
