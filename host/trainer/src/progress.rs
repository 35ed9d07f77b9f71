//! What happens in a run, told to whoever shows it.

use std::collections::BTreeMap;

/// Something happened.
#[derive(Debug, Clone, PartialEq)]
pub enum ProgressEvent {
    /// A stage or control starts, or goes on at `step` after a resume.
    StageStarted {
        /// `stage` or `control`.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Steps already done.
        step: u64,
        /// Steps in all, when the stage's config says so.
        steps: Option<u64>,
    },
    /// A step was committed.
    StepEnded {
        /// Name of the stage.
        stage: String,
        /// The step, from 0.
        step: u64,
        /// Its scalars.
        scalars: BTreeMap<String, f64>,
        /// Wall-clock seconds.
        seconds: f64,
    },
    /// A stage or control has ended.
    StageEnded {
        /// Its name.
        name: String,
        /// Its steps.
        steps: u64,
        /// Its seconds of training.
        seconds: f64,
        /// Share of the time of its steps in this process that the plugin computed itself.
        plugin_share: f64,
    },
    /// A held-out evaluation starts.
    EvaluationStarted {
        /// What is evaluated.
        label: String,
        /// `sampled` or `greedy`.
        kind: &'static str,
        /// Rollouts.
        rollouts: u64,
    },
    /// A rollout of an evaluation has ended.
    RolloutEnded,
    /// A held-out evaluation has ended.
    EvaluationEnded {
        /// What was evaluated.
        label: String,
        /// `sampled` or `greedy`.
        kind: &'static str,
        /// Mean reward.
        mean: f64,
    },
    /// The run goes on from a checkpoint.
    Resumed {
        /// Units of the plan that are done.
        units_done: usize,
        /// Steps done of the unit under way.
        step: u64,
    },
    /// Something that people should know.
    Note(String),
}

/// Takes events. Must not block for long: it is called from the training loop.
pub trait ProgressSink: Send + Sync {
    /// Takes one event.
    fn event(&self, event: ProgressEvent);
}

/// Shows nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl ProgressSink for Silent {
    fn event(&self, _event: ProgressEvent) {}
}
