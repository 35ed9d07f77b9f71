//! Models to talk to: critique and edit models, or the policy itself.

use super::trajectories::Message;
use super::{HostError, Sampling};
use crate::wit::algorithm::fulgurite::algorithm::llm as wit;

/// Asks a granted endpoint (none: the policy) and returns the answer's text.
///
/// # Errors
/// When the endpoint is not granted or fails.
pub fn chat(endpoint: Option<&str>, messages: &[Message], sampling: &Sampling) -> Result<String, HostError> {
    let messages: Vec<_> = messages.iter().cloned().map(Into::into).collect();
    Ok(wit::chat(endpoint, &messages, &sampling.lower())?)
}
