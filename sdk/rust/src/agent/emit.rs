//! What an agent tells about its work. All of it becomes spans of the attempt; none of it can fail but by a limit, which
//! ends the attempt.

use serde::Serialize;

use crate::types::{Attribute, Role};
use crate::wit::agent::fulgurite::agent::emit as wit;

/// Severity of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Every little step.
    Trace,
    /// For the agent's author.
    Debug,
    /// For whoever reads the run.
    Info,
    /// Something is odd.
    Warn,
    /// Something failed.
    Error,
}

/// Writes a line of log.
pub fn log(level: Level, text: &str) {
    let level = match level {
        Level::Trace => wit::Level::Trace,
        Level::Debug => wit::Level::Debug,
        Level::Info => wit::Level::Info,
        Level::Warn => wit::Level::Warn,
        Level::Error => wit::Level::Error,
    };
    wit::log(level, text);
}

/// Gives the whole rollout a reward in a dimension. Recorded with source `agent`; trained on only where the run's config
/// accepts that source. A value that is not finite ends the attempt.
pub fn reward(dimension: &str, value: f64) {
    wit::reward(dimension, value, None);
}

/// Like [`reward`], for the `llm_call`-th call of the model (from 0).
pub fn reward_call(dimension: &str, value: f64, llm_call: u64) {
    wit::reward(dimension, value, Some(llm_call));
}

/// Puts attributes on the innermost open span.
pub fn annotation(attributes: impl IntoIterator<Item = Attribute>) {
    wit::annotation(&lower(attributes));
}

/// Records a message for people.
pub fn message(role: Role, content: &str) {
    wit::message(role.into(), content);
}

/// Records a named value for people and the grader.
///
/// # Errors
/// When the value cannot be written as JSON (a map whose keys are not text, for example).
pub fn object(name: &str, value: &impl Serialize) -> Result<(), serde_json::Error> {
    wit::object(name, &serde_json::to_string(value)?);
    Ok(())
}

/// An open span: calls made until it is dropped are its children.
#[derive(Debug)]
#[must_use = "the span ends when it is dropped"]
pub struct Span(wit::Span);

impl Span {
    /// Puts further attributes on the span.
    pub fn annotate(&self, attributes: impl IntoIterator<Item = Attribute>) {
        self.0.annotate(&lower(attributes));
    }
}

/// Opens a span.
pub fn span(name: &str, attributes: impl IntoIterator<Item = Attribute>) -> Span {
    Span(wit::Span::new(name, &lower(attributes)))
}

fn lower(
    attributes: impl IntoIterator<Item = Attribute>,
) -> Vec<crate::wit::agent::fulgurite::types::types::Attribute> {
    attributes.into_iter().map(Into::into).collect()
}
