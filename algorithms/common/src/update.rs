//! The update loop: mini-batches, optimiser steps, and what they found.

use std::collections::{BTreeMap, BTreeSet};

use fulgurite_sdk::algorithm::policy::{self, Entry, Model, Numbers, OptimiserStep};
use fulgurite_sdk::algorithm::trajectories::TransitionId;
use fulgurite_sdk::algorithm::{AlgorithmError, metrics};

use crate::learner::Learner;
use crate::sample::{self, Sample};

/// Optimiser steps in a row that may be skipped because a gradient was not finite. More means that the weights are lost.
const SKIPPED_STEPS_MAX: u32 = 5;

/// What else an algorithm does with a mini-batch, of all models, such as training a critic. The numbers that it returns are recorded, as
/// means over the mini-batches of the last round.
pub type Extra<'a> = dyn FnMut(&[&Sample]) -> Result<Vec<(&'static str, f64)>, AlgorithmError> + 'a;

/// What the mini-batches of one round through a step's rollouts found.
#[derive(Debug, Default)]
struct Round {
    /// Of updates and optimiser steps, by model.
    batches: BTreeMap<Model, Vec<(Numbers, Numbers)>>,
    extras: Vec<Vec<(&'static str, f64)>>,
}

impl Learner {
    /// Trains on samples and records what was found.
    ///
    /// # Errors
    /// When there is nothing to train on, the host refuses a verb, or the gradient is not finite again and again.
    pub fn learn(&mut self, samples: Vec<Sample>) -> Result<(), AlgorithmError> {
        self.learn_with(samples, &mut |_| Ok(vec![]))
    }

    /// The same, and `extra` after the policy's step of each mini-batch.
    ///
    /// # Errors
    /// As [`Self::learn`], and what `extra` returns.
    #[expect(clippy::needless_pass_by_value, reason = "samples belong to one update")]
    pub fn learn_with(&mut self, samples: Vec<Sample>, extra: &mut Extra<'_>) -> Result<(), AlgorithmError> {
        if samples.is_empty() {
            return self.nothing_to_train_on();
        }
        metrics::scalar("trained_calls", samples.len() as f64)?;
        let correction = self.anchor(&samples)?;
        let loss = self.settings.loss.loss(self.kl_coefficient(), correction);
        let step = self.settings.optimiser.at(self.state.steps, self.settings.rollouts.steps, None);
        let last = self.rounds(&samples, extra, |learner, batch| {
            // Each model learns from what it drew, with normalisers and an optimiser of its own.
            let mut updates = vec![];
            for (model, part) in sample::by_model(batch.iter().copied()) {
                // Without any gradient an optimiser step would still move the weights, by its momentum.
                if sample::teaches(&part) || learner.settings.loss.has_gradient_without_advantage() {
                    let entries: Vec<Entry> = part.iter().map(|sample| sample.entry()).collect();
                    let found = policy::forward_backward(model, &entries, &loss)?;
                    updates.push((model.clone(), (found, learner.optimise(model, &step)?)));
                }
            }
            Ok(updates)
        })?;
        self.record(&last, &step, correction.is_some())
    }

    /// Goes through the mini-batches of a step without training the policy, and does `extra` with each of them.
    ///
    /// # Errors
    /// When there is nothing to train on, and what `extra` returns.
    pub fn learn_extra(&mut self, samples: &[Sample], extra: &mut Extra<'_>) -> Result<(), AlgorithmError> {
        if samples.is_empty() {
            return self.nothing_to_train_on();
        }
        let last = self.rounds(samples, extra, |_, _| Ok(vec![]))?;
        last.extra_means().into_iter().try_for_each(|(name, value)| scalar(name, Some(value)))
    }

    /// Goes through the mini-batches of a step as often as the config says, and returns what the last time found. `train` does
    /// what the loss asks for, and tells what it and the optimiser's step found of each model that had one.
    fn rounds(
        &mut self,
        samples: &[Sample],
        extra: &mut Extra<'_>,
        mut train: impl FnMut(&mut Self, &[&Sample]) -> Result<Vec<(Model, (Numbers, Numbers))>, AlgorithmError>,
    ) -> Result<Round, AlgorithmError> {
        let mut draw = self.draw("mini-batches");
        let mut last = Round::default();
        for _ in 0..self.settings.optimiser.updates_per_step {
            last = Round::default();
            for batch in sample::mini_batches(samples, self.settings.optimiser.mini_batches, &mut draw) {
                for (model, numbers) in train(self, &batch)? {
                    last.batches.entry(model).or_default().push(numbers);
                }
                last.extras.push(extra(&batch)?);
            }
        }
        Ok(last)
    }

    /// A step in which no rollout can be trained on is a mistake of the config, unless it is the filter's doing.
    fn nothing_to_train_on(&self) -> Result<(), AlgorithmError> {
        if let Some(text) = unknown_roles(&self.settings.rollouts.agent_roles, &self.roles) {
            return Err(AlgorithmError::Other(text));
        }
        if self.settings.filter == crate::config::Filter::Keep && self.settings.rollouts.staleness_max.is_none() {
            let dimension = &self.settings.rollouts.dimension;
            let text = format!("no rollout of the step has both a call to train on and a reward `{dimension}`");
            return Err(AlgorithmError::Other(text));
        }
        Ok(metrics::scalar("trained_calls", 0.0)?)
    }

    /// Keeps π_old apart from μ where a correction between the two is to be made.
    fn anchor(&self, samples: &[Sample]) -> Result<Option<policy::Correction>, AlgorithmError> {
        let is_stale = samples.iter().any(|sample| sample.policy_version != self.state.version(&sample.model));
        let correction = self.settings.loss.correction(is_stale);
        if correction.is_some() {
            for (model, part) in sample::by_model(samples) {
                let ids: Vec<TransitionId> = part.iter().map(|sample| sample.id.clone()).collect();
                policy::anchor(model, &ids)?;
            }
        }
        Ok(correction)
    }

    fn optimise(&mut self, model: &Model, step: &OptimiserStep) -> Result<Numbers, AlgorithmError> {
        let stepped = policy::optimiser_step(model, step)?;
        let skipped = stepped.get("skipped").unwrap_or(0.0);
        if let Some(version) = stepped.get("policy-version") {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the host counts versions")]
            let version = version as u64;
            *self.state.version_mut(model) = version;
        }
        let in_a_row = self.state.skipped_mut(model);
        *in_a_row = if skipped > 0.0 { *in_a_row + 1 } else { 0 };
        if *in_a_row > SKIPPED_STEPS_MAX {
            let text = format!("the gradient was not finite in {in_a_row} updates in a row");
            return Err(AlgorithmError::Other(text));
        }
        Ok(stepped)
    }

    /// Records what the last round found.
    fn record(&mut self, round: &Round, step: &OptimiserStep, is_corrected: bool) -> Result<(), AlgorithmError> {
        for (name, value) in round.extra_means() {
            scalar(name, Some(value))?;
        }
        for (model, batches) in &round.batches {
            self.record_model(&prefix(model), batches, step, is_corrected)?;
        }
        if self.settings.loss.reward_kl().is_none() && self.settings.loss.has_reference() {
            let all = round.batches.values().flatten();
            let kl: Vec<f64> = all.filter_map(|(found, _)| found.get("reference-kl")).collect();
            if let Some(kl) = mean(&kl) {
                let section = &self.settings.rollouts;
                self.steer(kl, section.groups_per_step as usize * section.group_size as usize)?;
            }
        }
        Ok(())
    }

    /// Records what the last round found of one model.
    fn record_model(
        &self,
        prefix: &str,
        batches: &[(Numbers, Numbers)],
        step: &OptimiserStep,
        is_corrected: bool,
    ) -> Result<(), AlgorithmError> {
        let found = |name: &str| over(batches, |(found, _)| found.get(name));
        let stepped = |name: &str| over(batches, |(_, stepped)| stepped.get(name));
        let mut numbers = vec![
            ("loss", mean(&found("loss"))),
            ("entropy", mean(&found("entropy"))),
            ("kl", mean(&found("approximate-kl"))),
            ("clip_fraction", mean(&found("clip-fraction"))),
            ("ratio_max", largest(&found("ratio-max"))),
            ("mismatch_mean", mean(&found("mismatch-mean"))),
            ("mismatch_max", largest(&found("mismatch-max"))),
            ("trained_tokens", sum(&found("trained-tokens"))),
            ("total_tokens", sum(&found("total-tokens"))),
            ("gradient_norm", mean(&stepped("gradient-norm"))),
            ("skipped", sum(&stepped("skipped"))),
            ("learning_rate", Some(step.learning_rate)),
        ];
        if self.settings.loss.reward_kl().is_none() {
            numbers.push(("reference_kl", mean(&found("reference-kl"))));
        }
        if is_corrected {
            numbers.push(("correction_mean", mean(&found("correction-mean"))));
            numbers.push(("correction_max", largest(&found("correction-max"))));
        }
        if self.settings.loss.masks() {
            numbers.push(("masked_share", mean(&found("masked-share"))));
        }
        numbers.into_iter().try_for_each(|(name, value)| scalar(&format!("{prefix}{name}"), value))
    }
}

/// What the metrics of a model are called by: those of the policy have their names alone.
fn prefix(model: &Model) -> String {
    match model {
        Model::Named(name) => format!("{name}/"),
        Model::Policy | Model::Snapshot(_) => String::new(),
    }
}

fn over(batches: &[(Numbers, Numbers)], number: impl Fn(&(Numbers, Numbers)) -> Option<f64>) -> Vec<f64> {
    batches.iter().filter_map(number).collect()
}

impl Round {
    /// The mean of each extra number, by name, over the mini-batches that told it.
    fn extra_means(&self) -> Vec<(&'static str, f64)> {
        let mut names: Vec<&'static str> = vec![];
        for (name, _) in self.extras.iter().flatten() {
            if !names.contains(name) {
                names.push(name);
            }
        }
        let of = |name: &str| -> Vec<f64> {
            self.extras.iter().flatten().filter(|(known, _)| *known == name).map(|(_, value)| *value).collect()
        };
        names.into_iter().filter_map(|name| Some((name, mean(&of(name))?))).collect()
    }
}

/// What is wrong when calls were made, and none of them by an agent that is to be trained.
fn unknown_roles(wanted: &[String], seen: &BTreeSet<String>) -> Option<String> {
    if wanted.is_empty() || seen.is_empty() || wanted.iter().any(|role| seen.contains(role)) {
        return None;
    }
    let list =
        |roles: &mut dyn Iterator<Item = &String>| roles.map(|role| format!("`{role}`")).collect::<Vec<_>>().join(", ");
    let (wanted, seen) = (list(&mut wanted.iter()), list(&mut seen.iter()));
    Some(format!("agent_roles: no call of the step is by {wanted}; the roles of its calls are {seen}"))
}

fn mean(values: &[f64]) -> Option<f64> {
    if values.is_empty() { None } else { Some(fulgurite_credit::statistics::mean(values)) }
}

fn largest(values: &[f64]) -> Option<f64> {
    values.iter().copied().reduce(f64::max)
}

fn sum(values: &[f64]) -> Option<f64> {
    if values.is_empty() { None } else { Some(values.iter().sum()) }
}

fn scalar(name: &str, value: Option<f64>) -> Result<(), AlgorithmError> {
    // A gradient that is not finite has no finite norm, and metrics take finite numbers only.
    if let Some(value) = value.filter(|value| value.is_finite()) {
        metrics::scalar(name, value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_that_no_call_has_is_told_with_those_that_were_seen() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<String>>();
        let seen: BTreeSet<String> = names(&["writer", "critic"]).into_iter().collect();
        let told = unknown_roles(&names(&["writter"]), &seen).unwrap();
        assert_eq!(
            told,
            "agent_roles: no call of the step is by `writter`; the roles of its calls are `critic`, `writer`"
        );
        for known in [&[][..], &["writer"], &["writter", "critic"]] {
            assert_eq!(unknown_roles(&names(known), &seen), None);
        }
        assert_eq!(unknown_roles(&names(&["writer"]), &BTreeSet::new()), None, "there were no calls at all");
    }

    #[test]
    fn numbers_of_several_batches_become_one() {
        let round = Round {
            batches: BTreeMap::new(),
            extras: vec![vec![("value_loss", 1.0)], vec![("value_loss", 3.0), ("x", 5.0)]],
        };
        assert_eq!(round.extra_means(), [("value_loss", 2.0), ("x", 5.0)]);
        assert_eq!((mean(&[]), largest(&[]), sum(&[])), (None, None, None));
        assert_eq!((mean(&[1.0, 3.0]), largest(&[1.0, 3.0]), sum(&[1.0, 3.0])), (Some(2.0), Some(3.0), Some(4.0)));
        // One batch is told as it is, to the last bit.
        assert_eq!(mean(&[0.1]).map(f64::to_bits), Some(0.1_f64.to_bits()));
    }
}
