//! `[[alarm]]` and `[explain]`: what a run watches of itself, and what it keeps to explain itself.

use serde::{Deserialize, Serialize};

use crate::metrics;

/// One `[[alarm]]`: it is raised when a metric is beyond its threshold for some steps in a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlarmConfig {
    /// The metric, as `metrics.jsonl` names it. Naming one here takes the place of all default alarms on it.
    pub metric: String,
    /// The stage or control that is watched. None: each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
    /// Raised above this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub above: Option<f64>,
    /// Raised below this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below: Option<f64>,
    /// Whether thresholds are multiples of the metric's first value in the stage. False.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub of_start: bool,
    /// Steps in a row that it must be beyond. 1. Steps without the metric do not count and do not interrupt.
    #[serde(default = "one")]
    pub for_steps: u64,
    /// What happens. `warn`.
    #[serde(default)]
    pub action: AlarmAction,
}

fn one() -> u64 {
    1
}

/// What an alarm does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlarmAction {
    /// It is told on the terminal, in `metrics.jsonl` and in the result.
    #[default]
    Warn,
    /// The same, and unless it was the stage's last step the run stops behind a checkpoint. `--resume` goes on; the alarm is raised again when the metric has been
    /// within its bounds in between.
    Stop,
    /// Nothing: it takes the place of the default alarms on its metric.
    Off,
}

impl AlarmConfig {
    /// What is wrong with it, as field and problem.
    pub(super) fn check(&self, stages: &[&str]) -> Result<(), (&'static str, String)> {
        metrics::check_watched(&self.metric).map_err(|problem| ("metric", problem))?;
        if let Some(stage) = self.stage.as_ref().filter(|stage| !stages.contains(&stage.as_str())) {
            return Err(("stage", format!("there is no stage `{stage}`; known: {}", stages.join(", "))));
        }
        for (field, value) in [("above", self.above), ("below", self.below)] {
            if let Some(value) = value.filter(|value| !value.is_finite()) {
                return Err((field, format!("{value} is not a finite number")));
            }
        }
        let has_threshold = self.above.is_some() || self.below.is_some();
        match self.action {
            AlarmAction::Off if has_threshold => Err(("action", "`off` takes neither `above` nor `below`".to_owned())),
            AlarmAction::Warn | AlarmAction::Stop if !has_threshold => {
                Err(("above", "missing; say `above`, `below` or both, or `action = \"off\"`".to_owned()))
            }
            _ if self.for_steps == 0 => Err(("for_steps", "must be at least 1".to_owned())),
            _ => Ok(()),
        }
    }
}

/// What is kept for `fulgurite explain`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExplainConfig {
    /// Whether each step's updates are kept. True: it costs well below a hundredth of a step.
    pub record: bool,
    /// Entries of a step that are kept; of the rest it is known how many there were. 65,536: 4 MiB before compression.
    pub entries_per_step_max: usize,
    /// Weights of single tokens of a step that are kept; of the rest their number, sum and bounds are. 1,048,576: 10 MiB before
    /// compression.
    pub token_weights_per_step_max: usize,
}

impl Default for ExplainConfig {
    fn default() -> Self {
        Self { record: true, entries_per_step_max: 65_536, token_weights_per_step_max: 1 << 20 }
    }
}
