//! A stage of policy gradient steps: what is the same in all plugins.

use std::collections::{BTreeMap, BTreeSet};

use fulgurite_sdk::algorithm::policy::{self, Model};
use fulgurite_sdk::algorithm::rollouts::{self, Group, Item, Split};
use fulgurite_sdk::algorithm::trajectories::TransitionId;
use fulgurite_sdk::algorithm::{AlgorithmError, Progress, Sampling, metrics};
use serde::{Deserialize, Serialize};

use crate::config::{Filter, Settings};
use crate::curriculum::{self, Latest};
use crate::draw::Draw;
use crate::gather::{self, Start, batches_ahead};
use crate::reference::Divergence;
use crate::rollout::{self, Rollout};

/// What the next step needs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Steps made.
    pub(crate) steps: u64,
    /// The last so many optimiser steps of the policy were skipped.
    skipped_in_a_row: u32,
    /// The policy's weights that the last update made; 0 before the first.
    #[serde(default)]
    policy_version: u64,
    /// The same of models beside the policy, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    models: BTreeMap<String, ModelState>,
    /// The coefficient that the KL has by now; none before it was steered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kl_coefficient: Option<f64>,
    /// How well the items of a curriculum went last.
    #[serde(default, skip_serializing_if = "Latest::is_empty")]
    latest: Latest,
}

/// What the next step needs to know of a model beside the policy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelState {
    skipped_in_a_row: u32,
    policy_version: u64,
}

impl State {
    /// The weights of a model that the last update made, or the newest that were seen to draw.
    pub(crate) fn version(&self, model: &Model) -> u64 {
        match model {
            Model::Named(name) => self.models.get(name).map_or(0, |state| state.policy_version),
            Model::Policy | Model::Snapshot(_) => self.policy_version,
        }
    }

    pub(crate) fn version_mut(&mut self, model: &Model) -> &mut u64 {
        match model {
            Model::Named(name) => &mut self.models.entry(name.clone()).or_default().policy_version,
            Model::Policy | Model::Snapshot(_) => &mut self.policy_version,
        }
    }

    /// How many of the last optimiser steps of a model were skipped.
    pub(crate) fn skipped_mut(&mut self, model: &Model) -> &mut u32 {
        match model {
            Model::Named(name) => &mut self.models.entry(name.clone()).or_default().skipped_in_a_row,
            Model::Policy | Model::Snapshot(_) => &mut self.skipped_in_a_row,
        }
    }
}

/// A stage of policy gradient steps.
#[derive(Debug)]
pub struct Learner {
    pub(crate) settings: Settings,
    pub(crate) state: State,
    /// Items of the step, whose random order is the run's: what is drawn follows from them.
    names: Vec<String>,
    /// Roles of the calls of the step.
    pub(crate) roles: BTreeSet<String>,
}

impl Learner {
    /// Starts a stage, or goes on with one.
    #[must_use]
    pub fn new(settings: Settings, saved: Option<State>) -> Self {
        Self { settings, state: saved.unwrap_or_default(), names: vec![], roles: BTreeSet::new() }
    }

    /// The config with nothing left open.
    #[must_use]
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Everything that the next step needs.
    #[must_use]
    pub fn save(&self) -> State {
        self.state.clone()
    }

    /// Number of the step that is being made, from 0.
    #[must_use]
    pub const fn step(&self) -> u64 {
        self.state.steps
    }

    /// Random numbers of the step for a purpose. They follow from the run's seed by way of the order of its items.
    #[must_use]
    pub fn draw(&self, purpose: &str) -> Draw {
        Draw::new(purpose, self.state.steps, self.names.iter().map(String::as_str))
    }

    /// Starts a step: rolls out, filters, and records what was seen. None: the stage has ended.
    ///
    /// # Errors
    /// When the host refuses a verb, or nothing of what was rolled out can be trained on.
    pub fn begin(&mut self) -> Result<Option<Vec<Rollout>>, AlgorithmError> {
        if !self.start()? {
            return Ok(None);
        }
        let rollouts = if self.settings.filter == Filter::Resample { self.resample()? } else { self.roll_out()? };
        let kept = self.see(rollouts)?;
        Ok(Some(kept))
    }

    /// Starts a step whose rollouts the plugin makes itself: see [`Self::items`] and [`Self::see`]. False: the stage has ended.
    ///
    /// # Errors
    /// When the host refuses a verb.
    pub fn start(&mut self) -> Result<bool, AlgorithmError> {
        if self.state.steps >= self.settings.rollouts.steps {
            return Ok(false);
        }
        if self.state.steps == 0 && self.settings.loss.has_reference() {
            policy::freeze_reference()?;
        }
        self.names.clear();
        Ok(true)
    }

    /// Ends a step.
    pub fn end(&mut self) -> Progress {
        self.state.steps += 1;
        if self.state.steps < self.settings.rollouts.steps { Progress::Continue } else { Progress::Done }
    }

    /// The next so many items of the training split, by the curriculum where there is one.
    ///
    /// # Errors
    /// When the dataset has no such split.
    pub fn items(&mut self, count: u32) -> Result<Vec<Item>, AlgorithmError> {
        let items = match &self.settings.rollouts.curriculum {
            Some(curriculum) => curriculum::items(curriculum, &self.state.latest, count, self.state.steps)?,
            None => rollouts::next_items(Split::Train, count)?,
        };
        self.names.extend(items.iter().map(|item| item.id().0));
        Ok(items)
    }

    /// How the policy draws.
    #[must_use]
    pub fn sampling(&self) -> Sampling {
        Sampling::new().temperature(self.settings.rollouts.temperature)
    }

    fn groups(&mut self, count: u32) -> Result<Vec<Group>, AlgorithmError> {
        let (size, sampling) = (self.settings.rollouts.group_size, self.sampling());
        let items = self.items(count)?;
        Ok(items.iter().map(|item| Group::new(item.id(), size).sampling(sampling)).collect())
    }

    fn roll_out(&mut self) -> Result<Vec<Rollout>, AlgorithmError> {
        if self.settings.rollouts.lag_steps > 0 {
            return self.roll_out_ahead();
        }
        let groups = self.groups(self.settings.rollouts.groups_per_step)?;
        let section = &self.settings.rollouts;
        let size = section.group_size as usize;
        let is_last = self.state.steps + 1 >= section.steps;
        let start = Start::of(section.start_share, groups.len() * size, is_last);
        let gathered = gather::gather(&groups, size, start)?;
        if section.start_share < 1.0 {
            metrics::scalar("carried_in", gathered.carried_in as f64)?;
            metrics::scalar("carried_out", gathered.carried_out as f64)?;
        }
        let read = |(group, trajectory): &(usize, _)| Rollout::read(*group, trajectory, section);
        Ok(gathered.rollouts.iter().map(read).collect())
    }

    /// Rolls out what later steps train on, and returns what an earlier one has rolled out for this one.
    fn roll_out_ahead(&mut self) -> Result<Vec<Rollout>, AlgorithmError> {
        let section = &self.settings.rollouts;
        let (size, ahead) =
            (section.groups_per_step, batches_ahead(self.state.steps, section.steps, section.lag_steps));
        let batches = (0..ahead).map(|_| self.groups(size)).collect::<Result<Vec<_>, _>>()?;
        let due = gather::lagging(&batches, size as usize)?;
        self.names = due.iter().map(|(_, trajectory)| trajectory.item_id().0).collect();
        let section = &self.settings.rollouts;
        Ok(due.iter().map(|(group, trajectory)| Rollout::read(*group, trajectory, section)).collect())
    }

    /// DAPO's dynamic sampling: rolls other items out in place of those whose rollouts earned all the same.
    fn resample(&mut self) -> Result<Vec<Rollout>, AlgorithmError> {
        let wanted = self.settings.rollouts.groups_per_step;
        let (mut all, mut first, mut missing, mut rounds) = (vec![], 0, wanted, 0);
        while missing > 0 && rounds < self.settings.rollouts.resample_rounds_max {
            let groups = self.groups(missing)?;
            let ended = rollouts::enqueue(&groups)?.await_all(None)?;
            let section = &self.settings.rollouts;
            all.extend(ended.iter().map(|trajectory| Rollout::read(first + trajectory.group(), trajectory, section)));
            first += groups.len();
            rounds += 1;
            let teaching = u32::try_from(teaching_groups(&all).len()).unwrap_or(u32::MAX);
            missing = wanted.saturating_sub(teaching);
        }
        metrics::scalar("resample_rounds", f64::from(rounds))?;
        Ok(all)
    }

    /// Records what was seen and returns what stays in the batch.
    ///
    /// # Errors
    /// When the host refuses a metric.
    pub fn see(&mut self, mut rollouts: Vec<Rollout>) -> Result<Vec<Rollout>, AlgorithmError> {
        // Before the first update of a stage only the rollouts tell which weights these are.
        for call in rollouts.iter().flat_map(|rollout| &rollout.calls) {
            let newest = self.state.version_mut(&call.model);
            *newest = call.policy_version.max(*newest);
        }
        self.roles = rollouts.iter().flat_map(|rollout| &rollout.calls).map(|call| call.agent_role.clone()).collect();
        for (name, value) in rollout::numbers(&rollouts) {
            metrics::scalar(&name, value)?;
        }
        if let Some((mean, most)) = rollout::staleness(&rollouts, |model| self.state.version(model))
            && (most > 0.0 || self.settings.rollouts.start_share < 1.0)
        {
            metrics::scalar("staleness_mean", mean)?;
            metrics::scalar("staleness_max", most)?;
        }
        if self.settings.rollouts.curriculum.is_some() {
            curriculum::note(&mut self.state.latest, &rollouts);
        }
        if let Some(most) = self.settings.rollouts.staleness_max {
            let left_out = leave_stale_out(&mut rollouts, |model| self.state.version(model), most);
            metrics::scalar("stale_calls", left_out as f64)?;
        }
        if self.settings.filter == Filter::Keep {
            return Ok(rollouts);
        }
        let before = rollout::groups(&rollouts).len();
        let kept = drop_flat(rollouts);
        metrics::scalar("dropped_groups", (before - rollout::groups(&kept).len()) as f64)?;
        Ok(kept)
    }

    /// What the KL to the reference costs each token, where it is taken off the reward.
    ///
    /// # Errors
    /// When the host refuses a verb.
    pub fn divergence(&mut self, rollouts: &[Rollout]) -> Result<Divergence, AlgorithmError> {
        let Some(estimator) = self.settings.loss.reward_kl() else { return Ok(Divergence::default()) };
        let scored = rollouts.iter().filter(|rollout| rollout.reward.is_some());
        let mut calls: BTreeMap<Model, Vec<TransitionId>> = BTreeMap::new();
        for call in scored.flat_map(Rollout::trained) {
            calls.entry(call.model.clone()).or_default().push(call.id.clone());
        }
        let found = Divergence::ask(estimator, self.kl_coefficient(), &calls)?;
        if let Some(mean) = found.mean {
            metrics::scalar("reference_kl", mean)?;
            self.steer(mean, rollouts.len())?;
        }
        Ok(found)
    }

    pub(crate) fn kl_coefficient(&self) -> f64 {
        self.state.kl_coefficient.unwrap_or_else(|| self.settings.loss.kl_coefficient())
    }

    /// Changes the coefficient of the KL by what the KL was.
    pub(crate) fn steer(&mut self, kl: f64, rollouts: usize) -> Result<(), AlgorithmError> {
        if let Some(adaptive) = self.settings.loss.adaptive() {
            let next = adaptive.next(self.kl_coefficient(), kl, rollouts);
            self.state.kl_coefficient = Some(next);
            metrics::scalar("kl_coefficient", next)?;
        }
        Ok(())
    }
}

/// The groups whose rollouts earned something different.
fn teaching_groups(rollouts: &[Rollout]) -> BTreeSet<usize> {
    let groups = rollout::groups(rollouts).into_iter();
    let teaching = groups.filter(|(_, places)| rollout::teaches(&rollout::members(rollouts, places)));
    teaching.map(|(group, _)| group).collect()
}

/// The rollouts of groups that earned something different.
fn drop_flat(mut rollouts: Vec<Rollout>) -> Vec<Rollout> {
    let teaching = teaching_groups(&rollouts);
    rollouts.retain(|rollout| teaching.contains(&rollout.group));
    rollouts
}

/// Leaves calls out of the loss that are too old, and tells how many. Their rollouts stay in the baselines.
fn leave_stale_out(rollouts: &mut [Rollout], current: impl Fn(&Model) -> u64, most: u64) -> usize {
    let mut left_out = 0;
    for call in rollouts.iter_mut().flat_map(|rollout| &mut rollout.calls).filter(|call| call.is_trained) {
        if current(&call.model).saturating_sub(call.policy_version) > most {
            call.is_trained = false;
            left_out += 1;
        }
    }
    left_out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::example;

    #[test]
    fn groups_that_earned_the_same_leave_the_batch() {
        let rollouts = vec![
            example(0, Some(1.0), &[1]),
            example(1, Some(1.0), &[2]),
            example(0, Some(0.0), &[3]),
            example(1, Some(1.0), &[4]),
            example(2, Some(1.0), &[5]),
            example(2, None, &[6]),
        ];
        assert_eq!(teaching_groups(&rollouts), BTreeSet::from([0]));
        let kept: Vec<usize> = drop_flat(rollouts).iter().map(|rollout| rollout.group).collect();
        assert_eq!(kept, [0, 0]);
    }

    #[test]
    fn old_calls_leave_the_loss_and_not_the_baseline() {
        let mut rollouts = [example(0, Some(1.0), &[1, 2])];
        rollouts[0].calls[0].policy_version = 1;
        assert_eq!(leave_stale_out(&mut rollouts, |_| 4, 2), 1);
        assert_eq!(rollouts[0].trained().count(), 1);
        assert_eq!(rollouts[0].reward, Some(1.0));
        assert_eq!(leave_stale_out(&mut rollouts, |_| 9, 2), 1);
        assert_eq!(leave_stale_out(&mut rollouts, |_| 9, 2), 0, "a call is left out once");
    }

    #[test]
    fn a_state_of_an_earlier_grpo_can_be_read() {
        let state: State = serde_json::from_str(r#"{"steps":3,"skipped_in_a_row":0}"#).unwrap();
        assert_eq!((state.steps, state.policy_version), (3, 0));
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(json, r#"{"steps":3,"skipped_in_a_row":0,"policy_version":0}"#);
        let mut state = state;
        let other = Model::Named("other".to_owned());
        *state.version_mut(&other) = 4;
        *state.skipped_mut(&other) = 1;
        assert_eq!((state.version(&other), state.version(&Model::Policy)), (4, 0));
        let json = serde_json::to_string(&state).unwrap();
        assert!(json.ends_with(r#""models":{"other":{"skipped_in_a_row":1,"policy_version":4}}}"#), "{json}");
        assert_eq!(serde_json::from_str::<State>(&json).unwrap(), state);
    }
}
