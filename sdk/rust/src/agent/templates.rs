//! Prompt templates. Their version is pinned when the rollout is enqueued, so that an algorithm may publish new ones
//! meanwhile.

use serde::Serialize;

use crate::wit::agent::fulgurite::agent::resources as wit;

/// Why a template could not be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// There is no template of that name; the text lists those there are.
    #[error("unknown template: {0}")]
    UnknownTemplate(String),
    /// The variables are not an object, or one that the template needs is missing.
    #[error("invalid variables: {0}")]
    InvalidVariables(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl From<wit::ResourceError> for TemplateError {
    fn from(error: wit::ResourceError) -> Self {
        match error {
            wit::ResourceError::UnknownTemplate(text) => Self::UnknownTemplate(text),
            wit::ResourceError::InvalidVariables(text) => Self::InvalidVariables(text),
            wit::ResourceError::Other(text) => Self::Other(text),
        }
    }
}

impl From<TemplateError> for crate::agent::AgentError {
    fn from(error: TemplateError) -> Self {
        Self::Other(error.to_string())
    }
}

/// A template's text.
///
/// # Errors
/// When there is no template of that name.
pub fn text(name: &str) -> Result<String, TemplateError> {
    Ok(wit::template(name)?)
}

/// A template rendered with variables: anything that serde writes as an object.
///
/// # Errors
/// When there is no template of that name, or the variables do not fit it.
pub fn render(name: &str, variables: &impl Serialize) -> Result<String, TemplateError> {
    let variables =
        serde_json::to_string(variables).map_err(|error| TemplateError::InvalidVariables(error.to_string()))?;
    Ok(wit::render(name, &variables)?)
}

/// The pinned version.
#[must_use]
pub fn version() -> u64 {
    wit::version()
}
