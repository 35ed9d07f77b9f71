//! Training algorithms: plugins that decide what to roll out and what to train. They handle numbers, never a tensor or a
//! token id.
//!
//! One instance lives for a whole stage. **A step is a transaction**: what it did is committed together when it returns,
//! so whatever the next step needs must be in [`Algorithm::save`]. A step that is repeated after a crash must ask for the
//! same things in the same order: decide nothing by a clock.
//!
//! The verbs stand in the modules below: [`rollouts`], [`trajectories`], [`policy`], [`templates`], [`models`],
//! [`metrics`].

use std::any::Any;
use std::cell::RefCell;
use std::marker::PhantomData;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::wit::algorithm as wit;
use crate::wit::algorithm::fulgurite::algorithm::common as wit_common;

pub mod metrics;
pub mod models;
pub mod policy;
pub mod rollouts;
mod sampling;
pub mod schedule;
pub mod templates;
pub mod trajectories;

pub use sampling::Sampling;

/// A training algorithm. Export it with [`algorithm!`](crate::algorithm!).
pub trait Algorithm: Sized + 'static {
    /// Its name.
    const NAME: &'static str;
    /// Its version, for people.
    const VERSION: &'static str;
    /// Version of [`Self::State`]: raise it when an older state cannot be read any more.
    const STATE_VERSION: u32 = 1;
    /// Its config. The run's config is merged over the default, so give it `#[serde(default, deny_unknown_fields)]`: then
    /// a misspelt key is an error.
    type Config: DeserializeOwned + Serialize + Default;
    /// Everything that the next step needs, at most 16 MiB as JSON.
    type State: DeserializeOwned + Serialize;

    /// JSON schema of the config. By default it is read off the default config: the types of its fields, and no others.
    #[must_use]
    fn config_schema() -> Value {
        serde_json::to_value(Self::Config::default()).map_or(Value::Bool(true), |defaults| schema_of(&defaults))
    }

    /// Starts a stage, or goes on with one from its last committed step.
    ///
    /// # Errors
    /// When config or state are wrong, or the host refuses a verb.
    fn init(config: Self::Config, saved: Option<Self::State>) -> Result<Self, AlgorithmError>;

    /// Makes one optimiser step, or whatever the algorithm calls one.
    ///
    /// # Errors
    /// When it cannot go on. The stage ends with the last committed step.
    fn step(&mut self) -> Result<Progress, AlgorithmError>;

    /// Everything that the next step needs.
    fn save(&self) -> Self::State;
}

/// Whether an algorithm wants another step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// It does.
    Continue,
    /// The stage has ended.
    Done,
}

/// Why an algorithm cannot go on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AlgorithmError {
    /// The config is wrong; the text names the field.
    #[error("invalid config: {0}")]
    InvalidConfig(String),
    /// The saved state is not of this algorithm, or of a version it does not know.
    #[error("invalid state: {0}")]
    InvalidState(String),
    /// The host refused a verb.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// Why the host refused a verb.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// An argument is wrong; the text names it.
    #[error("invalid argument: {0}")]
    InvalidArgument(String),
    /// There is no such rollout, transition, model or item; the text says which.
    #[error("unknown: {0}")]
    Unknown(String),
    /// Not granted; the text is the line of config that would allow it.
    #[error("denied: {0}")]
    Denied(String),
    /// Too many rollouts failed for reasons that are not the policy's; the run stops.
    #[error("too many faults: {0}")]
    TooManyFaults(String),
    /// This host does not offer it.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// The run is being stopped: return at once.
    #[error("the run is being stopped")]
    Stopping,
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl From<wit_common::HostError> for HostError {
    fn from(error: wit_common::HostError) -> Self {
        match error {
            wit_common::HostError::InvalidArgument(text) => Self::InvalidArgument(text),
            wit_common::HostError::Unknown(text) => Self::Unknown(text),
            wit_common::HostError::Denied(text) => Self::Denied(text),
            wit_common::HostError::TooManyFaults(text) => Self::TooManyFaults(text),
            wit_common::HostError::Unsupported(text) => Self::Unsupported(text),
            wit_common::HostError::Stopping => Self::Stopping,
            wit_common::HostError::Other(text) => Self::Other(text),
        }
    }
}

/// Exports a type that implements [`Algorithm`](crate::algorithm::Algorithm) as the component's algorithm.
///
/// ```
/// use fulgurite_sdk::algorithm::{Algorithm, AlgorithmError, Progress, metrics};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// #[serde(default, deny_unknown_fields)]
/// struct Config {
///     steps: u64,
/// }
///
/// impl Default for Config {
///     fn default() -> Self {
///         Self { steps: 10 }
///     }
/// }
///
/// /// Counts steps and trains nothing.
/// struct Counter {
///     config: Config,
///     done: u64,
/// }
///
/// impl Algorithm for Counter {
///     const NAME: &'static str = "counter";
///     const VERSION: &'static str = "0.1.0";
///     type Config = Config;
///     type State = u64;
///
///     fn init(config: Config, saved: Option<u64>) -> Result<Self, AlgorithmError> {
///         Ok(Self { config, done: saved.unwrap_or(0) })
///     }
///
///     fn step(&mut self) -> Result<Progress, AlgorithmError> {
///         self.done += 1;
///         metrics::scalar("done", self.done as f64)?;
///         Ok(if self.done < self.config.steps { Progress::Continue } else { Progress::Done })
///     }
///
///     fn save(&self) -> u64 {
///         self.done
///     }
/// }
///
/// fulgurite_sdk::algorithm!(Counter);
/// ```
#[macro_export]
macro_rules! algorithm {
    ($algorithm:ty) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            type Exported = $crate::algorithm::Export<$algorithm>;
    $crate::wit::algorithm::export_algorithm!(Exported with_types_in $crate::wit::algorithm);
        };
        #[cfg(not(target_arch = "wasm32"))]
        const _: ::core::marker::PhantomData<$crate::algorithm::Export<$algorithm>> = ::core::marker::PhantomData;
    };
}

/// Turns an [`Algorithm`] into the generated trait. Named by the macro only.
#[doc(hidden)]
#[derive(Debug)]
pub struct Export<A: Algorithm>(PhantomData<A>);

thread_local! {
    /// The component's one instance. `Any`, because a static cannot be generic; a component exports one algorithm.
    static INSTANCE: RefCell<Option<Box<dyn Any>>> = const { RefCell::new(None) };
}

/// A saved state with its origin, so that a foreign one is refused instead of misread.
#[derive(Serialize, Deserialize)]
struct Saved<S> {
    algorithm: String,
    state_version: u32,
    state: S,
}

impl<A: Algorithm> Export<A> {
    /// Runs `f` on the instance; none before `init`.
    fn with<T>(f: impl FnOnce(&mut A) -> T) -> Option<T> {
        INSTANCE.with_borrow_mut(|instance| instance.as_mut()?.downcast_mut().map(f))
    }

    fn restore(bytes: &[u8]) -> Result<A::State, AlgorithmError> {
        let saved: Saved<Value> =
            serde_json::from_slice(bytes).map_err(|error| AlgorithmError::InvalidState(error.to_string()))?;
        if saved.algorithm != A::NAME {
            return Err(AlgorithmError::InvalidState(format!("it was saved by `{}`", saved.algorithm)));
        }
        if saved.state_version != A::STATE_VERSION {
            let text = format!("it has version {} and this plugin reads {}", saved.state_version, A::STATE_VERSION);
            return Err(AlgorithmError::InvalidState(text));
        }
        serde_json::from_value(saved.state).map_err(|error| AlgorithmError::InvalidState(error.to_string()))
    }
}

impl<A: Algorithm> wit::Guest for Export<A> {
    fn describe() -> wit::Description {
        wit::Description {
            name: A::NAME.to_owned(),
            version: A::VERSION.to_owned(),
            config_schema: A::config_schema().to_string(),
            defaults: serde_json::to_string(&A::Config::default()).unwrap_or_else(|_| "{}".to_owned()),
        }
    }

    fn init(config: String, saved_state: Option<Vec<u8>>) -> Result<(), wit::AlgorithmError> {
        let config =
            serde_json::from_str(&config).map_err(|error| wit::AlgorithmError::InvalidConfig(error.to_string()))?;
        let saved = saved_state.map(|bytes| Self::restore(&bytes)).transpose()?;
        let algorithm = A::init(config, saved)?;
        INSTANCE.set(Some(Box::new(algorithm)));
        Ok(())
    }

    fn step() -> Result<wit::Progress, wit::AlgorithmError> {
        match Self::with(A::step) {
            Some(Ok(Progress::Continue)) => Ok(wit::Progress::Continue),
            Some(Ok(Progress::Done)) => Ok(wit::Progress::Done),
            Some(Err(error)) => Err(error.into()),
            None => Err(wit::AlgorithmError::Other("`step` was called before `init`".to_owned())),
        }
    }

    #[expect(clippy::panic, reason = "`save` has no error: a trap is what keeps a broken state from being committed")]
    fn save() -> Vec<u8> {
        let Some(state) = Self::with(|algorithm| algorithm.save()) else { panic!("`save` was called before `init`") };
        let saved = Saved { algorithm: A::NAME.to_owned(), state_version: A::STATE_VERSION, state };
        match serde_json::to_vec(&saved) {
            Ok(bytes) => bytes,
            Err(error) => panic!("the state cannot be written as JSON: {error}"),
        }
    }
}

impl From<AlgorithmError> for wit::AlgorithmError {
    fn from(error: AlgorithmError) -> Self {
        match error {
            AlgorithmError::InvalidConfig(text) => Self::InvalidConfig(text),
            AlgorithmError::InvalidState(text) => Self::InvalidState(text),
            AlgorithmError::Host(error) => Self::Host(error.to_string()),
            AlgorithmError::Other(text) => Self::Other(text),
        }
    }
}

/// JSON schema of everything that looks like `value`. A field that is null by default may be anything.
fn schema_of(value: &Value) -> Value {
    match value {
        Value::Null => Value::Bool(true),
        Value::Bool(_) => serde_json::json!({"type": "boolean"}),
        Value::Number(number) if number.is_f64() => serde_json::json!({"type": "number"}),
        Value::Number(_) => serde_json::json!({"type": "integer"}),
        Value::String(_) => serde_json::json!({"type": "string"}),
        Value::Array(_) => serde_json::json!({"type": "array"}),
        Value::Object(fields) => {
            let properties: serde_json::Map<_, _> =
                fields.iter().map(|(name, value)| (name.clone(), schema_of(value))).collect();
            serde_json::json!({"type": "object", "properties": properties, "additionalProperties": false})
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wit::algorithm::Guest as _;

    #[derive(Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Config {
        steps: u64,
        learning_rate: f64,
        dual_clip: Option<f32>,
    }

    impl Default for Config {
        fn default() -> Self {
            Self { steps: 2, learning_rate: 1e-3, dual_clip: None }
        }
    }

    struct Counter {
        steps: u64,
        done: u64,
    }

    impl Algorithm for Counter {
        const NAME: &'static str = "counter";
        const VERSION: &'static str = "1.2.3";
        type Config = Config;
        type State = u64;

        fn init(config: Config, saved: Option<u64>) -> Result<Self, AlgorithmError> {
            Ok(Self { steps: config.steps, done: saved.unwrap_or(0) })
        }

        fn step(&mut self) -> Result<Progress, AlgorithmError> {
            self.done += 1;
            Ok(if self.done < self.steps { Progress::Continue } else { Progress::Done })
        }

        fn save(&self) -> u64 {
            self.done
        }
    }

    type Exported = Export<Counter>;

    #[test]
    fn a_stage_goes_on_from_its_saved_state() {
        assert!(Exported::step().is_err(), "a step before init");
        Exported::init("{}".into(), None).unwrap();
        assert_eq!(Exported::step().unwrap(), wit::Progress::Continue);
        let saved = Exported::save();
        Exported::init("{}".into(), Some(saved)).unwrap();
        assert_eq!(Exported::step().unwrap(), wit::Progress::Done);
    }

    #[test]
    fn foreign_states_and_misspelt_keys_are_refused() {
        for state in [&b"?"[..], br#"{"algorithm":"other","state_version":1,"state":3}"#] {
            let error = Exported::init("{}".into(), Some(state.to_vec())).unwrap_err();
            assert!(matches!(error, wit::AlgorithmError::InvalidState(_)), "{error:?}");
        }
        let newer = br#"{"algorithm":"counter","state_version":9,"state":3}"#;
        assert!(matches!(Exported::init("{}".into(), Some(newer.to_vec())), Err(wit::AlgorithmError::InvalidState(_))));
        let error = Exported::init(r#"{"stpes":3}"#.into(), None).unwrap_err();
        assert!(matches!(&error, wit::AlgorithmError::InvalidConfig(text) if text.contains("stpes")), "{error:?}");
    }

    #[test]
    fn the_description_holds_schema_and_defaults() {
        let description = Exported::describe();
        assert_eq!((description.name.as_str(), description.version.as_str()), ("counter", "1.2.3"));
        assert_eq!(description.defaults, r#"{"steps":2,"learning_rate":0.001,"dual_clip":null}"#);
        let schema: Value = serde_json::from_str(&description.config_schema).unwrap();
        assert_eq!(schema["properties"]["learning_rate"]["type"], "number");
        assert_eq!(schema["properties"]["steps"]["type"], "integer");
        assert_eq!(schema["properties"]["dual_clip"], true);
        assert_eq!(schema["additionalProperties"], false);
    }
}
