//! What a case is.

use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_runner::RolloutResult;
use fulgurite_sandbox::PluginError;
use serde_json::{Value, json};

use crate::bench::limits;

/// One way to misbehave, and how it must end.
pub(crate) struct Case {
    /// Unique.
    pub(crate) name: String,
    pub(crate) components: Components,
    pub(crate) input: Value,
    pub(crate) world: Value,
    pub(crate) model: Model,
    /// What its guests may have; the healthy ones have what the suite says.
    pub(crate) limits: Limits,
    pub(crate) expected: Expected,
}

/// Which components run.
pub(crate) enum Components {
    /// `nasty_agent`, `nasty_grader` and `nasty_tool`.
    Prebuilt,
    /// An agent as text, in the place of `nasty_agent`.
    Agent(String),
    /// A grader as text, in the place of `nasty_grader`.
    Grader(String),
}

/// What the model does to the rollouts of the case.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Model {
    /// A short answer.
    Answers,
    /// An answer of so many letters.
    Letters(usize),
    /// A short answer and so many token ids.
    Tokens(usize),
    /// No answer, ever.
    Silent,
}

/// What must come of a case.
pub(crate) enum Expected {
    /// An attempt that ends like this.
    Ends {
        kind: OutcomeKind,
        /// Name and value.
        limit: Option<(&'static str, u64)>,
        /// Part of the outcome's detail.
        says: &'static str,
        /// What else must hold.
        holds: fn(&RolloutResult) -> Result<(), String>,
    },
    /// A component that is not even loaded.
    Refused {
        /// Part of the error and its causes.
        says: &'static str,
        /// Whether it is the right error.
        fits: fn(&PluginError) -> bool,
    },
}

impl Case {
    fn new(name: impl Into<String>, components: Components, expected: Expected) -> Self {
        let (input, world) = (json!(nasty_agent::Input::new(nasty_agent::Behaviour::Healthy)), json!({}));
        Self { name: name.into(), components, input, world, model: Model::Answers, limits: limits(), expected }
    }

    /// A behaviour of the prebuilt agent.
    pub(crate) fn agent(name: &str, input: &nasty_agent::Input, expected: Expected) -> Self {
        Self { input: json!(input), ..Self::new(format!("agent-{name}"), Components::Prebuilt, expected) }
    }

    /// A behaviour of the prebuilt grader.
    pub(crate) fn grader(name: &str, behaviour: nasty_grader::Behaviour, expected: Expected) -> Self {
        Self { world: json!(behaviour), ..Self::new(format!("grader-{name}"), Components::Prebuilt, expected) }
    }

    /// A behaviour of the prebuilt tool, in its second call of three.
    pub(crate) fn tool(name: &str, behaviour: nasty_tool::Behaviour, expected: Expected) -> Self {
        let call = |behaviour| (json!(behaviour).as_str().unwrap_or_default().to_owned(), json!({}));
        let count = nasty_tool::Behaviour::Count;
        let calls = vec![call(count), call(behaviour), call(count)];
        let input = nasty_agent::Input { calls, ..nasty_agent::Input::new(nasty_agent::Behaviour::Call) };
        Self { input: json!(input), ..Self::new(format!("tool-{name}"), Components::Prebuilt, expected) }
    }

    /// A way in which the prebuilt tool is opened.
    pub(crate) fn opening(name: &str, opening: nasty_tool::Opening, expected: Expected) -> Self {
        Self { world: json!({ "open": opening }), ..Self::new(format!("open-{name}"), Components::Prebuilt, expected) }
    }

    /// An agent written by hand.
    pub(crate) fn component(name: &str, text: String, expected: Expected) -> Self {
        Self::new(format!("component-{name}"), Components::Agent(text), expected)
    }

    /// A grader written by hand.
    pub(crate) fn grader_component(name: &str, text: String, expected: Expected) -> Self {
        Self::new(format!("component-grader-{name}"), Components::Grader(text), expected)
    }

    pub(crate) fn with_model(self, model: Model) -> Self {
        Self { model, ..self }
    }

    pub(crate) fn with_limits(self, change: fn(&mut Limits)) -> Self {
        let mut limits = self.limits;
        change(&mut limits);
        Self { limits, ..self }
    }

    /// A world that is no behaviour.
    pub(crate) fn with_world(self, world: Value) -> Self {
        Self { world, ..self }
    }

    /// Whether its guests' instructions are counted: an engine has to be made for that.
    pub(crate) fn counts_fuel(&self) -> bool {
        self.limits.fuel_max > 0
    }

    pub(crate) fn refusal(&self, error: &PluginError) -> Result<(), String> {
        match &self.expected {
            Expected::Refused { fits, .. } if !fits(error) => Err(format!("another error: {error:?}")),
            _ => Ok(()),
        }
    }
}

fn nothing_else(_: &RolloutResult) -> Result<(), String> {
    Ok(())
}

impl Expected {
    /// It works.
    pub(crate) fn completes() -> Self {
        Self::ends(OutcomeKind::Completed, "")
    }

    /// A limit is reached.
    pub(crate) fn limit(kind: OutcomeKind, name: &'static str, value: u64) -> Self {
        Self::Ends { kind, limit: Some((name, value)), says: "", holds: nothing_else }
    }

    /// It fails, and says so.
    pub(crate) fn ends(kind: OutcomeKind, says: &'static str) -> Self {
        Self::Ends { kind, limit: None, says, holds: nothing_else }
    }

    /// And this holds too.
    pub(crate) fn and(self, also: fn(&RolloutResult) -> Result<(), String>) -> Self {
        match self {
            Self::Ends { kind, limit, says, .. } => Self::Ends { kind, limit, says, holds: also },
            refused @ Self::Refused { .. } => refused,
        }
    }
}
