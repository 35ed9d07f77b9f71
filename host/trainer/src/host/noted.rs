//! What is written down of an update before it is made: for metrics and for `fulgurite explain`.

use fulgurite_core::algorithm::{BatchEntry, ModelReference};
use fulgurite_core::reward::DEFAULT_DIMENSION;
use fulgurite_core::training::{LossSpec, TrainingRow};
use fulgurite_policy::PolicyEngine;

use super::StageHost;
use crate::config::StageConfig;
use crate::trail::UpdateTrail;

impl StageHost {
    /// The reward dimension that the stage's algorithm reads, as far as its config says so.
    pub(super) fn dimension(&self) -> &str {
        dimension_of(&self.stage)
    }

    /// Writes down what an update is about to use.
    pub(super) fn note_use(
        &self,
        model: &ModelReference,
        engine: &PolicyEngine,
        batch: &[BatchEntry],
        loss: &LossSpec,
        rows: &[TrainingRow],
    ) -> Option<UpdateTrail> {
        let mut state = self.state();
        let begun_with = state.begun_with.get(&engine.name().map(str::to_owned)).copied().unwrap_or_default();
        state.monitor.trained(model, rows, begun_with);
        state.trail.of_batch(model, engine.version(), batch, loss)
    }
}

/// The reward dimension that a stage's algorithm reads: its config's `dimension`, as all algorithms of this project call it.
pub(crate) fn dimension_of(stage: &StageConfig) -> &str {
    stage.config.get("dimension").and_then(toml::Value::as_str).unwrap_or(DEFAULT_DIMENSION)
}
