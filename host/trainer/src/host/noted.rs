//! What is written down of an update before it is made: for metrics and for `fulgurite explain`.

use std::collections::{BTreeMap, BTreeSet};

use fulgurite_core::algorithm::{BatchEntry, ModelReference};
use fulgurite_core::reward::DEFAULT_DIMENSION;
use fulgurite_core::training::{LossSpec, Stream, TrainingRow};
use fulgurite_policy::{CallShare, PolicyEngine, call_shares};

use super::StageHost;
use crate::config::StageConfig;
use crate::trail::{DEMONSTRATION, ShareTrail, UpdateTrail};

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
        let shares = Shares::of(batch, loss, rows);
        state.trail.of_batch(model, engine.version(), batch, loss, |entry| shares.get(entry))
    }
}

/// What a loss makes of the calls of a batch, by transition and whether it is of the cross-entropy stream.
struct Shares<'a>(BTreeMap<(&'a str, bool), ShareTrail>);

impl<'a> Shares<'a> {
    fn of(batch: &'a [BatchEntry], loss: &LossSpec, rows: &[TrainingRow]) -> Self {
        // As rows number them: rollouts by id, and the calls of each stream in their order.
        let mut rollouts: BTreeMap<&str, [BTreeSet<(u64, &str)>; 2]> = BTreeMap::new();
        for entry in batch {
            let (rollout, call) = place(&entry.transition.0);
            let [drawn, given] = rollouts.entry(rollout).or_default();
            (if entry.stream == Stream::Ce { given } else { drawn }).insert((call, &entry.transition.0));
        }
        let mut shares = BTreeMap::new();
        // A loss that makes no sense is refused by the verb. A rollout without any trained token has no number.
        let numbered = rows.last().map_or(0, |row| row.sequence as usize + 1);
        let Some(calls) = call_shares(loss, rows).ok().filter(|_| numbered == rollouts.len()) else {
            return Self(shares);
        };
        for (sequence, (_, [drawn, given])) in (0..).zip(rollouts) {
            for (is_given, order) in [(false, drawn), (true, given)] {
                for (call, (_, id)) in (0..).zip(order) {
                    let share = calls.get(&(sequence, is_given, call));
                    shares.extend(share.map(|share| ((id, is_given), told(share))));
                }
            }
        }
        Self(shares)
    }

    fn get(&self, entry: &BatchEntry) -> Option<ShareTrail> {
        self.0.get(&(entry.transition.0.as_str(), entry.stream == Stream::Ce)).copied()
    }
}

fn told(share: &CallShare) -> ShareTrail {
    let CallShare { coefficient, correction, dropped, .. } = *share;
    ShareTrail { coefficient, correction, dropped }
}

/// The sequence of a transition, as the pool files it, and its number there.
fn place(transition: &str) -> (&str, u64) {
    if transition.starts_with(DEMONSTRATION) {
        return (transition, 0);
    }
    let call = transition.rsplit('/').next().and_then(|call| call.parse().ok());
    (transition.split('/').next().unwrap_or(transition), call.unwrap_or(0))
}

/// The reward dimension that a stage's algorithm reads: its config's `dimension`, as all algorithms of this project call it.
pub(crate) fn dimension_of(stage: &StageConfig) -> &str {
    stage.config.get("dimension").and_then(toml::Value::as_str).unwrap_or(DEFAULT_DIMENSION)
}
