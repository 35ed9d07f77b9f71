//! Tools: what agents call. One instance serves one attempt: it is opened before the agent starts.

use std::cell::RefCell;
use std::marker::PhantomData;

use serde::de::DeserializeOwned;

use crate::types::{InvalidArguments, ToolSpec};
use crate::wit::tool::exports::fulgurite::tool::tool as wit;

pub mod http;
pub mod sqlite;

/// A tool. Export it with [`tool!`](crate::tool!).
pub trait Tool: Sized + 'static {
    /// What an item's `world` holds.
    type World: DeserializeOwned;

    /// Opens the tool for one attempt. `seed` follows from the attempt's: take it for anything that is drawn at random.
    ///
    /// # Errors
    /// When the world is not what the tool expects. Ends the attempt as a fault of the tool.
    fn open(world: Self::World, seed: u64) -> Result<Self, InvalidWorld>;

    /// What a model may call: the same list at every call.
    fn list(&self) -> Vec<ToolSpec>;

    /// Answers one call.
    ///
    /// # Errors
    /// When there is no such tool, the arguments do not fit, or it failed in its own way.
    fn call(&mut self, name: &str, arguments: &Arguments) -> Result<serde_json::Value, ToolError>;
}

/// The world is not what the tool expects; the text names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid world: {0}")]
pub struct InvalidWorld(pub String);

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ToolError {
    /// There is no tool of that name.
    #[error("there is no tool `{0}`")]
    UnknownTool(String),
    /// The arguments do not fit: the policy sees the text and may try again.
    #[error("invalid arguments: {0}")]
    InvalidArguments(String),
    /// The tool failed in its own way; the agent sees the text.
    #[error("{0}")]
    Failed(String),
}

impl From<InvalidArguments> for ToolError {
    fn from(error: InvalidArguments) -> Self {
        Self::InvalidArguments(error.0)
    }
}

/// Arguments of a call: untrusted JSON text of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arguments(String);

impl Arguments {
    /// Takes JSON text.
    #[must_use]
    pub fn new(json: impl Into<String>) -> Self {
        Self(json.into())
    }

    /// The text as it came.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The arguments as a type. Its error turns into [`ToolError::InvalidArguments`] by `?`.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, InvalidArguments> {
        serde_json::from_str(&self.0).map_err(|error| InvalidArguments(error.to_string()))
    }
}

/// Exports a type that implements [`Tool`](crate::tool::Tool) as the component's tool.
///
/// ```
/// use fulgurite_sdk::tool::{Arguments, InvalidWorld, Tool, ToolError};
/// use fulgurite_sdk::{ToolSpec, Value, json};
///
/// struct Counter(u64);
///
/// impl Tool for Counter {
///     type World = Value;
///
///     fn open(_world: Value, _seed: u64) -> Result<Self, InvalidWorld> {
///         Ok(Self(0))
///     }
///
///     fn list(&self) -> Vec<ToolSpec> {
///         vec![ToolSpec::new("count", "Counts calls.", &json!({"type": "object"}))]
///     }
///
///     fn call(&mut self, name: &str, _arguments: &Arguments) -> Result<Value, ToolError> {
///         if name != "count" {
///             return Err(ToolError::UnknownTool(name.to_owned()));
///         }
///         self.0 += 1;
///         Ok(json!(self.0))
///     }
/// }
///
/// fulgurite_sdk::tool!(Counter);
/// ```
#[macro_export]
macro_rules! tool {
    ($tool:ty) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            type Exported = $crate::tool::Export<$tool>;
    $crate::wit::tool::export_tool!(Exported with_types_in $crate::wit::tool);
        };
        #[cfg(not(target_arch = "wasm32"))]
        const _: ::core::marker::PhantomData<$crate::tool::Export<$tool>> = ::core::marker::PhantomData;
    };
}

/// Turns a [`Tool`] into the generated trait. Named by the macro only.
#[doc(hidden)]
#[derive(Debug)]
pub struct Export<T: Tool>(PhantomData<T>);

/// An open tool behind the generated resource.
#[doc(hidden)]
#[derive(Debug)]
pub struct Session<T: Tool>(RefCell<T>);

impl<T: Tool> wit::Guest for Export<T> {
    type Session = Session<T>;

    fn open(world: String, seed: u64) -> Result<wit::Session, wit::ToolError> {
        let world = serde_json::from_str(&world).map_err(|error| wit::ToolError::InvalidWorld(error.to_string()))?;
        let tool = T::open(world, seed).map_err(|error| wit::ToolError::InvalidWorld(error.0))?;
        Ok(wit::Session::new(Session(RefCell::new(tool))))
    }
}

impl<T: Tool> wit::GuestSession for Session<T> {
    fn list_tools(&self) -> Vec<wit::ToolSpec> {
        self.0.borrow().list().into_iter().map(Into::into).collect()
    }

    fn call(&self, name: String, arguments: String) -> Result<String, wit::ToolError> {
        // The host calls one function of an instance at a time, so the tool is never borrowed twice.
        let mut tool = self.0.try_borrow_mut().map_err(|error| wit::ToolError::Failed(error.to_string()))?;
        match tool.call(&name, &Arguments(arguments)) {
            Ok(answer) => Ok(answer.to_string()),
            Err(ToolError::UnknownTool(text)) => Err(wit::ToolError::UnknownTool(text)),
            Err(ToolError::InvalidArguments(text)) => Err(wit::ToolError::InvalidArguments(text)),
            Err(ToolError::Failed(text)) => Err(wit::ToolError::Failed(text)),
        }
    }
}
