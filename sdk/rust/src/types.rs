//! Plain types that several worlds share.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::wit::agent::fulgurite::types::types as wit;

/// Who speaks in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Instructions of the agent's author.
    System,
    /// The user, or the agent in the user's name.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl From<Role> for wit::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::System => Self::System,
            Role::User => Self::User,
            Role::Assistant => Self::Assistant,
            Role::Tool => Self::Tool,
        }
    }
}

impl From<wit::Role> for Role {
    fn from(role: wit::Role) -> Self {
        match role {
            wit::Role::System => Self::System,
            wit::Role::User => Self::User,
            wit::Role::Assistant => Self::Assistant,
            wit::Role::Tool => Self::Tool,
        }
    }
}

/// Arguments of a tool call that do not fit. Displayed, it says which argument and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidArguments(pub String);

/// A tool call that a model asked for. All of it is text that a model wrote: trust none of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ToolCall {
    /// Minted by the host, unique in its attempt.
    pub id: String,
    /// The name as the model wrote it; it may name no tool.
    pub name: String,
    /// JSON text. The host has checked that it parses, not that it fits the tool's schema.
    pub arguments: String,
}

impl ToolCall {
    /// The arguments as a type.
    ///
    /// # Errors
    /// When the arguments do not fit the type.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, InvalidArguments> {
        serde_json::from_str(&self.arguments).map_err(|error| InvalidArguments(error.to_string()))
    }
}

impl From<wit::ToolCall> for ToolCall {
    fn from(call: wit::ToolCall) -> Self {
        Self { id: call.id, name: call.name, arguments: call.arguments }
    }
}

impl From<ToolCall> for wit::ToolCall {
    fn from(call: ToolCall) -> Self {
        Self { id: call.id, name: call.name, arguments: call.arguments }
    }
}

/// A tool as a model sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolSpec {
    /// Name by which it is called.
    pub name: String,
    /// What it does, for the model.
    pub description: String,
    /// JSON schema of its arguments, as JSON text.
    pub parameters: String,
}

impl ToolSpec {
    /// A tool with the JSON schema of its arguments.
    ///
    /// ```
    /// use fulgurite_sdk::{ToolSpec, json};
    ///
    /// let spec = ToolSpec::new(
    ///     "add",
    ///     "Adds two numbers.",
    ///     &json!({"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]}),
    /// );
    /// assert_eq!(spec.name, "add");
    /// ```
    #[must_use]
    pub fn new(name: impl Into<String>, description: impl Into<String>, parameters: &serde_json::Value) -> Self {
        Self { name: name.into(), description: description.into(), parameters: parameters.to_string() }
    }
}

impl From<wit::ToolSpec> for ToolSpec {
    fn from(spec: wit::ToolSpec) -> Self {
        Self { name: spec.name, description: spec.description, parameters: spec.parameters }
    }
}

impl From<ToolSpec> for wit::ToolSpec {
    fn from(spec: ToolSpec) -> Self {
        Self { name: spec.name, description: spec.description, parameters: spec.parameters }
    }
}

/// Value of an [`Attribute`].
#[derive(Debug, Clone, PartialEq)]
pub enum AttributeValue {
    /// Text.
    Text(String),
    /// A whole number.
    Integer(i64),
    /// A number.
    Number(f64),
    /// True or false.
    Boolean(bool),
}

impl From<&str> for AttributeValue {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for AttributeValue {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl From<i64> for AttributeValue {
    fn from(value: i64) -> Self {
        Self::Integer(value)
    }
}

impl From<f64> for AttributeValue {
    fn from(value: f64) -> Self {
        Self::Number(value)
    }
}

impl From<bool> for AttributeValue {
    fn from(value: bool) -> Self {
        Self::Boolean(value)
    }
}

/// A named value. Names that begin with `fulgurite.` or `gen_ai.` are the host's: from a guest they are filed under
/// `guest.`.
#[derive(Debug, Clone, PartialEq)]
pub struct Attribute {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: AttributeValue,
}

impl Attribute {
    /// A named value.
    #[must_use]
    pub fn new(name: impl Into<String>, value: impl Into<AttributeValue>) -> Self {
        Self { name: name.into(), value: value.into() }
    }
}

impl From<Attribute> for wit::Attribute {
    fn from(attribute: Attribute) -> Self {
        let value = match attribute.value {
            AttributeValue::Text(value) => wit::AttributeValue::Text(value),
            AttributeValue::Integer(value) => wit::AttributeValue::Integer(value),
            AttributeValue::Number(value) => wit::AttributeValue::Number(value),
            AttributeValue::Boolean(value) => wit::AttributeValue::Boolean(value),
        };
        Self { name: attribute.name, value }
    }
}

impl From<wit::Attribute> for Attribute {
    fn from(attribute: wit::Attribute) -> Self {
        let value = match attribute.value {
            wit::AttributeValue::Text(value) => AttributeValue::Text(value),
            wit::AttributeValue::Integer(value) => AttributeValue::Integer(value),
            wit::AttributeValue::Number(value) => AttributeValue::Number(value),
            wit::AttributeValue::Boolean(value) => AttributeValue::Boolean(value),
        };
        Self { name: attribute.name, value }
    }
}

/// A limit that was reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("limit {name} of {value} is reached")]
pub struct LimitReached {
    /// Its field name in the run's config, unit included.
    pub name: String,
    /// Its value.
    pub value: u64,
}

impl From<wit::LimitReached> for LimitReached {
    fn from(limit: wit::LimitReached) -> Self {
        Self { name: limit.name, value: limit.value }
    }
}

/// What a rollout is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Its calls may be trained on.
    Train,
    /// An algorithm's own evaluation.
    Val,
    /// The host's held-out evaluation.
    Test,
}

impl From<wit::Mode> for Mode {
    fn from(mode: wit::Mode) -> Self {
        match mode {
            wit::Mode::Train => Self::Train,
            wit::Mode::Val => Self::Val,
            wit::Mode::Test => Self::Test,
        }
    }
}

impl From<Mode> for wit::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Train => Self::Train,
            Mode::Val => Self::Val,
            Mode::Test => Self::Test,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_of_a_model_are_parsed_or_refused_with_the_reason() {
        #[derive(Debug, Deserialize)]
        struct Arguments {
            time: String,
        }
        let call = |arguments: &str| ToolCall { id: "0".into(), name: "t".into(), arguments: arguments.into() };
        assert_eq!(call(r#"{"time":"10:00"}"#).parse::<Arguments>().unwrap().time, "10:00");
        let error = call(r#"{"tme":"10:00"}"#).parse::<Arguments>().unwrap_err();
        assert!(error.to_string().contains("time"), "{error}");
    }
}
