//! Typed identifiers. Every id that can be derived is derived, so that a repeated run mints the same ids.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::seed::Seed;

/// Longest rollout or dataset id in bytes. Ids appear in file names, keys and terminals, so they stay short.
pub const ID_BYTES_MAX: usize = 64;

/// Why a caller-given id was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{id}` is not a valid id: use 1 to {ID_BYTES_MAX} characters from a-z, A-Z, 0-9, `-`, `_` and `.`")]
pub struct InvalidId {
    /// The refused text, shortened to a printable length.
    pub id: String,
}

/// Names one rollout inside a run: given by the caller, or derived from (stage, step, index). Cheap to clone, because every
/// span carries one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RolloutId(Arc<str>);

impl RolloutId {
    /// Checks a caller-given id.
    ///
    /// # Errors
    /// When the id is empty, too long or has characters outside the allowed set.
    pub fn new(id: impl Into<String>) -> Result<Self, InvalidId> {
        let id = id.into();
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if id.is_empty() || id.len() > ID_BYTES_MAX || !id.bytes().all(allowed) {
            return Err(InvalidId { id: id.chars().take(ID_BYTES_MAX).filter(|c| !c.is_control()).collect() });
        }
        Ok(Self(id.into()))
    }

    /// The id of the `index`-th rollout that step `step` of `stage` enqueues. The same call gives the same id, so a
    /// repeated step finds the rollouts that a crash left finished.
    ///
    /// # Errors
    /// When the stage's name makes the id invalid.
    pub fn derived(stage: &str, step: u64, index: u64) -> Result<Self, InvalidId> {
        Self::new(format!("{stage}-{step:05}-{index:04}"))
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for RolloutId {
    type Error = InvalidId;
    fn try_from(id: String) -> Result<Self, InvalidId> {
        Self::new(id)
    }
}

impl From<RolloutId> for String {
    fn from(id: RolloutId) -> Self {
        id.0.as_ref().to_owned()
    }
}

impl fmt::Display for RolloutId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Counts the attempts of one rollout, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttemptNumber(pub u32);

impl AttemptNumber {
    /// The first attempt of every rollout.
    pub const FIRST: Self = Self(1);

    /// The attempt that follows this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for AttemptNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One attempt of one rollout: what spans, records and sessions are bound to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttemptKey {
    /// The rollout.
    pub rollout: RolloutId,
    /// Which try of it.
    pub attempt: AttemptNumber,
}

impl fmt::Display for AttemptKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.rollout, self.attempt)
    }
}

/// OpenTelemetry trace id (16 bytes), one per attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TraceId(pub u128);

/// OpenTelemetry span id (8 bytes), never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpanId(pub u64);

impl TraceId {
    /// The trace id of an attempt, a function of its seed.
    #[must_use]
    pub fn of_attempt(seed: Seed) -> Self {
        let high = u128::from(seed.child("trace-high").value());
        Self((high << 64) | u128::from(seed.child("trace-low").value()))
    }
}

impl SpanId {
    /// The span id of the `sequence`-th span of an attempt, a function of its seed.
    #[must_use]
    pub fn of_sequence(seed: Seed, sequence: u64) -> Self {
        Self(seed.child("span").child_index(sequence).value().max(1))
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Numbers in records, hexadecimal text in JSON: that is how OpenTelemetry writes them, and JSON readers cannot be trusted
/// with integers of 64 bits and more.
macro_rules! hexadecimal_in_text {
    ($id:ident, $number:ty) => {
        impl Serialize for $id {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
            }
        }

        impl<'de> Deserialize<'de> for $id {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if !deserializer.is_human_readable() {
                    return <$number>::deserialize(deserializer).map(Self);
                }
                let text = String::deserialize(deserializer)?;
                <$number>::from_str_radix(&text, 16).map(Self).map_err(serde::de::Error::custom)
            }
        }
    };
}

hexadecimal_in_text!(TraceId, u128);
hexadecimal_in_text!(SpanId, u64);

/// Names one completion that our engine, or an endpoint called by the host, has produced. Only calls with such an id are
/// ever trained on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ResponseId(pub String);

impl ResponseId {
    /// The response id of call `call_index` (from 0) of an attempt.
    #[must_use]
    pub fn of_call(attempt: &AttemptKey, call_index: u64) -> Self {
        Self(format!("{attempt}/{call_index}"))
    }
}

impl fmt::Display for ResponseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Counts the published weights of one policy, from 0 (the weights a run starts with).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PolicyVersion(pub u64);

impl fmt::Display for PolicyVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

/// Names one transition: an LLM call of an attempt (index from 0), or an imported demonstration.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TransitionId(pub String);

impl fmt::Display for TransitionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Content hash (BLAKE3) of a component, dataset or template, printed in hexadecimal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ContentHash([u8; 32]);

impl ContentHash {
    /// Hashes bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The raw hash.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
    }
}

impl From<ContentHash> for String {
    fn from(hash: ContentHash) -> Self {
        hash.to_string()
    }
}

impl TryFrom<String> for ContentHash {
    type Error = blake3::HexError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Ok(Self(*blake3::Hash::from_hex(text)?.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_rollout_ids_repeat_and_sort_by_step_then_index() {
        let id = |step, index| RolloutId::derived("grpo", step, index).unwrap();
        assert_eq!(id(3, 7), id(3, 7));
        assert!(id(3, 7) < id(3, 8) && id(3, 9999) < id(4, 0));
        assert_eq!(id(3, 7).as_str(), "grpo-00003-0007");
    }

    #[test]
    fn trace_and_span_ids_are_hexadecimal_in_json() {
        let ids = (TraceId(u128::MAX - 1), SpanId(10));
        let text = serde_json::to_string(&ids).unwrap();
        assert_eq!(text, r#"["fffffffffffffffffffffffffffffffe","000000000000000a"]"#);
        assert_eq!(serde_json::from_str::<(TraceId, SpanId)>(&text).unwrap(), ids);
        assert!(serde_json::to_value(ids).is_ok());
    }

    #[test]
    fn ids_that_could_leave_a_folder_or_forge_a_terminal_line_are_refused() {
        for bad in ["", "a/b", "a b", "\u{1b}[2J", &"x".repeat(65)] {
            assert!(RolloutId::new(bad).is_err(), "{bad:?}");
        }
        assert!(serde_json::from_str::<RolloutId>("\"a/b\"").is_err());
    }
}
