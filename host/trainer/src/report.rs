//! What a run reports at its end.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::alarm::RaisedAlarm;
use crate::evaluate::Evaluation;

/// One line of the final table: a stage, a control or a baseline.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StageReport {
    /// `initial`, `stage`, `control` or `baseline`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Name of the algorithm plugin; empty where none ran.
    pub algorithm: String,
    /// Steps.
    pub steps: u64,
    /// Mean held-out reward, greedy, over all scheduled rollouts.
    pub held_out_greedy: f64,
    /// Mean held-out reward, sampled at temperature 1, over all scheduled rollouts.
    pub held_out_sampled: f64,
    /// Share of sampled held-out rollouts whose outcome is blamed on the policy: malformed, too long, too many turns.
    pub malformed: f64,
    /// Wall-clock seconds of training, evaluation not counted.
    pub seconds: f64,
    /// Training rollouts.
    pub rollouts: u64,
    /// Tokens that went through a training step.
    pub tokens: u64,
    /// Tokens that its training rollouts have drawn.
    #[serde(default)]
    pub sampled_tokens: u64,
    /// Training rollouts that failed for reasons that are not the policy's.
    pub failed: u64,
    /// Content hash of the weights at its end; `None` where nothing is trained.
    pub weights: Option<String>,
    /// The same of the models beside the policy, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub model_weights: BTreeMap<String, String>,
    /// Alarms that were raised in it, the first 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alarms: Vec<RaisedAlarm>,
    /// The evaluation in full.
    pub evaluation: Evaluation,
}

/// The final result of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// Where it is stored.
    pub run: String,
    /// Its seed.
    pub seed: u64,
    /// Greedy held-out mean of the weights that it began with.
    pub held_out_before: f64,
    /// Greedy held-out mean after the last stage.
    pub held_out_after: f64,
    /// Seconds of training, all stages.
    pub training_seconds: f64,
    /// The weights that it began with.
    pub initial: Option<StageReport>,
    /// The stages in order.
    pub stages: Vec<StageReport>,
    /// Controls.
    pub controls: Vec<StageReport>,
    /// Baselines.
    pub baselines: Vec<StageReport>,
}

impl RunResult {
    /// Sorts reports into their places.
    #[must_use]
    pub fn new(run: String, seed: u64, reports: &[StageReport]) -> Self {
        let of_kind = |kind: &str| reports.iter().filter(|report| report.kind == kind).cloned().collect::<Vec<_>>();
        let initial = of_kind("initial").pop();
        let stages = of_kind("stage");
        let before = initial.as_ref().map_or(0.0, |report| report.held_out_greedy);
        Self {
            run,
            seed,
            held_out_before: before,
            held_out_after: stages.last().map_or(before, |report| report.held_out_greedy),
            training_seconds: stages.iter().map(|report| report.seconds).sum(),
            initial,
            stages,
            controls: of_kind("control"),
            baselines: of_kind("baseline"),
        }
    }
}
