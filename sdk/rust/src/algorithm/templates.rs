//! Prompt templates, as an algorithm that improves them reads and publishes them.

use super::HostError;
use crate::wit::algorithm::fulgurite::algorithm::resources as wit;

/// A template's version and text; without version the newest.
///
/// # Errors
/// When there is no such template.
pub fn text(name: &str, version: Option<u64>) -> Result<(u64, String), HostError> {
    Ok(wit::template(name, version)?)
}

/// Publishes a new text and returns its version. Placeholders of the old text must be kept.
///
/// # Errors
/// When there is no such template or a placeholder is missing.
pub fn publish(name: &str, text: &str) -> Result<u64, HostError> {
    Ok(wit::publish(name, text)?)
}
