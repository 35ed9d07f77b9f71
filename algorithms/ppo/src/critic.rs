//! The critic: what it says, and what it learns.

use std::collections::BTreeMap;

use fulgurite_credit::value;
use fulgurite_policy_gradient::Sample;
use fulgurite_sdk::algorithm::policy::{self, Forward, Gradient, Model, OptimiserStep};
use fulgurite_sdk::algorithm::trajectories::TransitionId;
use fulgurite_sdk::algorithm::{AlgorithmError, HostError};

use crate::estimate::{Lesson, Values};

/// The critic's lessons of a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Critic<'a> {
    /// By call.
    pub(crate) lessons: &'a BTreeMap<TransitionId, Lesson>,
    /// Bound of a value's change, in units of the reward.
    pub(crate) clip: Option<f64>,
    /// The optimiser's step.
    pub(crate) step: OptimiserStep,
}

fn model() -> Model {
    Model::Named("critic".to_owned())
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// What the critic says of each token of these calls.
pub(crate) fn values(calls: &[TransitionId]) -> Result<Values, HostError> {
    let said = policy::forward(&model(), calls)?.into_iter();
    Ok(said.map(|call| (call.transition, wide(&call.values))).collect())
}

impl Critic<'_> {
    /// Learns from a mini-batch, with one step of its optimiser.
    pub(crate) fn learn(&self, batch: &[&Sample]) -> Result<Vec<(&'static str, f64)>, AlgorithmError> {
        let calls: Vec<TransitionId> = batch.iter().map(|sample| sample.id.clone()).collect();
        let said = policy::forward(&model(), &calls)?;
        let (gradients, mut numbers) = self.gradients(&said);
        policy::backward(&model(), &gradients)?;
        let stepped = policy::optimiser_step(&model(), &self.step)?;
        let norm = stepped.get("gradient-norm").filter(|norm| norm.is_finite());
        numbers.extend(norm.map(|norm| ("critic_gradient_norm", norm)));
        Ok(numbers)
    }

    /// The derivatives of the value loss over all tokens of what was said. Pure.
    fn gradients(&self, said: &[Forward]) -> (Vec<Gradient>, Vec<(&'static str, f64)>) {
        let empty = Lesson::default();
        let (mut values, mut old, mut returns) = (vec![], vec![], vec![]);
        for call in said {
            let lesson = self.lessons.get(&call.transition).unwrap_or(&empty);
            // The three lists must stay beside each other: what was not taught is no number, and counts in nothing.
            let padded = |list: &[f64]| -> Vec<f64> {
                list.iter().copied().chain(std::iter::repeat(f64::NAN)).take(call.values.len()).collect()
            };
            old.extend(padded(&lesson.old));
            returns.extend(padded(&lesson.returns));
            values.extend(wide(&call.values));
        }
        let loss = value::loss(&values, &old, &returns, self.clip);
        let mut derivatives = loss.derivatives.iter();
        let gradients = said.iter().map(|call| {
            let of_call = derivatives.by_ref().take(call.values.len());
            #[expect(clippy::cast_possible_truncation, reason = "the host's derivatives are f32")]
            let d_values = of_call.map(|derivative| *derivative as f32).collect();
            Gradient { transition: call.transition.clone(), d_log_probs: vec![], d_entropies: vec![], d_values }
        });
        let numbers = vec![("value_loss", loss.loss), ("value_clip_fraction", loss.clip_fraction)];
        (gradients.collect(), numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derivatives_are_of_the_mean_over_all_tokens() {
        let id = |name: &str| TransitionId(name.to_owned());
        let said = |name: &str, values: &[f32]| Forward {
            transition: id(name),
            log_probs: vec![],
            entropies: vec![],
            values: values.to_vec(),
        };
        let lessons = BTreeMap::from([
            (id("a"), Lesson { old: vec![0.0, 0.0], returns: vec![1.0, 1.0] }),
            (id("b"), Lesson { old: vec![0.0], returns: vec![0.0] }),
        ]);
        let critic = Critic { lessons: &lessons, clip: Some(0.2), step: OptimiserStep::new(0.0) };
        let (gradients, numbers) = critic.gradients(&[said("a", &[0.5, 0.0]), said("b", &[0.1]), said("c", &[9.0])]);
        let found: Vec<Vec<f32>> = gradients.into_iter().map(|gradient| gradient.d_values).collect();
        // Golden vector 34: the first value has gone too far already, and has no slope. Of the call that nobody taught there
        // is none.
        let third = 1.0 / 3.0;
        for (found, expected) in found.concat().into_iter().zip([0.0, -third, 0.1 * third, 0.0]) {
            assert!((found - expected).abs() < 1e-6, "{found} is not {expected}");
        }
        let loss = (0.32 + 0.5 + 0.005) / 3.0;
        assert!((numbers[0].1 - loss).abs() < 1e-6 && (numbers[1].1 - 1.0 / 3.0).abs() < 1e-12, "{numbers:?}");
    }
}
