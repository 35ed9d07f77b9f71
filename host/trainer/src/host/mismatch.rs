//! How far sampler and trainer disagree in a step, and how far its updates go: written as metrics by the host, whether or not
//! the plugin looks.
//!
//! A mismatch is between the trainer's weights as the step found them (π_old) and the policy that drew (μ). An optimiser step
//! moves the trainer's weights on purpose, so a token is compared once, by the first verb that computes its log-probs before
//! its model's weights have moved, and later updates say nothing of it.

use std::collections::{BTreeMap, BTreeSet};

use fulgurite_core::algorithm::ModelReference;
use fulgurite_core::id::TransitionId;
use fulgurite_core::training::{ForwardBackwardReport, Stream, TrainingRow};

use super::views::sampled;

/// Which tokens of a step have been compared with their sampler.
#[derive(Debug, Default)]
pub(crate) struct Compared {
    /// Models whose weights have moved since the step began.
    moved: BTreeSet<String>,
    transitions: BTreeMap<String, BTreeSet<TransitionId>>,
}

impl Compared {
    /// Whether any of these is still to be compared, which is done then.
    pub(crate) fn takes<'a>(
        &mut self,
        model: &ModelReference,
        transitions: impl IntoIterator<Item = &'a TransitionId>,
    ) -> bool {
        let model = name(model);
        if self.moved.contains(&model) {
            return false;
        }
        let known = self.transitions.entry(model).or_default();
        let before = known.len();
        known.extend(transitions.into_iter().cloned());
        known.len() > before
    }

    /// An optimiser step has moved a model's weights.
    pub(crate) fn moved(&mut self, model: &ModelReference) {
        self.moved.insert(name(model));
    }
}

fn name(model: &ModelReference) -> String {
    match model {
        ModelReference::Policy => String::new(),
        ModelReference::Snapshot(name) => format!("snapshot/{name}"),
        ModelReference::Named(name) => format!("named/{name}"),
    }
}

/// What the verbs of a step have found. Names and meaning of the metrics: [`crate::metrics`].
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Mismatch {
    /// Tokens that were compared, and sums over them.
    compared: f64,
    difference_sum: f64,
    k3_sum: f64,
    difference_max: f64,
    updates: Option<Updates>,
}

/// Of the updates by policy gradient; sums are weighted by their tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Updates {
    tokens: f64,
    ratio_sum: f64,
    ratio_max: f64,
    effective_sample_size_min: f64,
}

impl Mismatch {
    /// What one update has found; `compares` says whether its weights were those that the step began with.
    pub(crate) fn of(report: &ForwardBackwardReport, compares: bool) -> Self {
        let tokens = report.trained_tokens as f64;
        let updates = Some(Updates {
            tokens,
            ratio_sum: report.ratio_mean * tokens,
            ratio_max: report.ratio_max,
            effective_sample_size_min: report.effective_sample_size,
        });
        if !compares {
            return Self { updates, ..Self::default() };
        }
        Self {
            compared: tokens,
            difference_sum: report.mismatch_mean * tokens,
            k3_sum: report.mismatch_k3 * tokens,
            difference_max: report.mismatch_max,
            updates,
        }
    }

    /// Of tokens by their log-probs (nats) under the trainer's weights and when they were drawn.
    pub(crate) fn of_tokens(trainer: &[f32], sampler: &[f32]) -> Self {
        let mut all = Self::default();
        for (trainer, sampler) in trainer.iter().zip(sampler) {
            let difference = f64::from(*trainer) - f64::from(*sampler);
            // Two that think a token impossible agree.
            let difference = if difference.is_nan() { 0.0 } else { difference };
            all.compared += 1.0;
            all.difference_sum += difference.abs();
            all.k3_sum += difference.exp() - 1.0 - difference;
            all.difference_max = all.difference_max.max(difference.abs());
        }
        all
    }

    /// Adds what a further verb has found.
    pub(crate) fn add(&mut self, other: Self) {
        self.compared += other.compared;
        self.difference_sum += other.difference_sum;
        self.k3_sum += other.k3_sum;
        self.difference_max = self.difference_max.max(other.difference_max);
        self.updates = match (self.updates, other.updates) {
            (Some(a), Some(b)) => Some(Updates {
                tokens: a.tokens + b.tokens,
                ratio_sum: a.ratio_sum + b.ratio_sum,
                ratio_max: a.ratio_max.max(b.ratio_max),
                effective_sample_size_min: a.effective_sample_size_min.min(b.effective_sample_size_min),
            }),
            (a, b) => a.or(b),
        };
    }

    /// Adds the metrics, under names with this prefix. A number that is not finite (a token that the sampler thought impossible)
    /// is left out: it would be no JSON.
    pub(crate) fn write(self, prefix: &str, scalars: &mut BTreeMap<String, f64>) {
        let mut numbers = vec![];
        if self.compared > 0.0 {
            numbers.extend([
                ("mismatch_mean", self.difference_sum / self.compared),
                ("mismatch_k3", self.k3_sum / self.compared),
                ("mismatch_max", self.difference_max),
            ]);
        }
        if let Some(updates) = self.updates {
            numbers.extend([
                ("ratio_mean", updates.ratio_sum / updates.tokens.max(1.0)),
                ("ratio_max", updates.ratio_max),
                ("effective_sample_size", updates.effective_sample_size_min),
            ]);
        }
        let finite = numbers.into_iter().filter(|(_, value)| value.is_finite());
        scalars.extend(finite.map(|(name, value)| (format!("{prefix}{name}"), value)));
    }
}

/// Log-probs of each row's sampled tokens under the policy that drew them; none of demonstrations, which none drew.
pub(super) fn drawn(rows: &[TrainingRow]) -> Vec<Vec<f32>> {
    let of_row = |row: &TrainingRow| match row.stream {
        Stream::Ce => vec![],
        Stream::Rl | Stream::RefKl => sampled(&row.behaviour_log_probs, &row.mask),
    };
    rows.iter().map(of_row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(found: &[Mismatch]) -> BTreeMap<String, f64> {
        let (mut all, mut scalars) = (Mismatch::default(), BTreeMap::new());
        for found in found {
            all.add(*found);
        }
        all.write("host/", &mut scalars);
        scalars
    }

    fn report(tokens: u64, mismatch_mean: f64, mismatch_max: f64) -> ForwardBackwardReport {
        ForwardBackwardReport {
            trained_tokens: tokens,
            mismatch_mean,
            mismatch_max,
            mismatch_k3: mismatch_mean / 10.0,
            ratio_mean: 1.0,
            ratio_max: 1.5,
            effective_sample_size: 1.0 - mismatch_mean,
            ..ForwardBackwardReport::default()
        }
    }

    #[test]
    fn a_step_tells_the_mean_and_the_worst_of_its_updates() {
        let (first, second) = (report(300, 0.1, 0.5), report(100, 0.3, f64::INFINITY));
        let scalars = written(&[Mismatch::of(&first, true), Mismatch::of(&second, true)]);
        let told = |name: &str| scalars.get(&format!("host/{name}")).copied();
        assert!(told("mismatch_mean").is_some_and(|mean| (mean - 0.15).abs() < 1e-12), "{scalars:?}");
        assert!(told("mismatch_k3").is_some_and(|mean| (mean - 0.015).abs() < 1e-12), "{scalars:?}");
        assert_eq!((told("ratio_mean"), told("ratio_max")), (Some(1.0), Some(1.5)));
        assert_eq!(told("effective_sample_size"), Some(0.7));
        assert_eq!(told("mismatch_max"), None, "infinity is no JSON");
        assert!(written(&[]).is_empty());
    }

    #[test]
    fn updates_of_weights_that_have_moved_are_no_mismatch() {
        let scalars =
            written(&[Mismatch::of(&report(100, 0.1, 0.1), true), Mismatch::of(&report(100, 0.9, 9.0), false)]);
        let told = |name: &str| scalars.get(&format!("host/{name}")).copied();
        assert_eq!((told("mismatch_mean"), told("mismatch_max")), (Some(0.1), Some(0.1)));
        assert!(told("effective_sample_size").is_some_and(|size| (size - 0.1).abs() < 1e-12), "{scalars:?}");
        let moved = written(&[Mismatch::of(&report(100, 0.9, 9.0), false)]);
        assert!(!moved.keys().any(|name| name.contains("mismatch")), "{moved:?}");
    }

    #[test]
    fn tokens_are_compared_by_their_log_probs() {
        let infinity = f32::NEG_INFINITY;
        let scalars = written(&[Mismatch::of_tokens(&[-0.5, -1.0, infinity], &[-1.0, -0.5, infinity])]);
        let told = |name: &str| scalars.get(&format!("host/{name}")).copied().unwrap_or(f64::NAN);
        assert!((told("mismatch_mean") - 1.0 / 3.0).abs() < 1e-12, "{scalars:?}");
        let k3 = (0.5_f64.exp() + (-0.5_f64).exp() - 2.0) / 3.0;
        assert!((told("mismatch_k3") - k3).abs() < 1e-12, "{scalars:?}");
        assert_eq!(scalars.len(), 3, "without an update there is no ratio: {scalars:?}");
    }

    #[test]
    fn a_token_is_compared_once_and_before_its_model_moves() {
        let (a, b) = (TransitionId("a".to_owned()), TransitionId("b".to_owned()));
        let (policy, other) = (ModelReference::Policy, ModelReference::Named("other".to_owned()));
        let mut compared = Compared::default();
        assert!(compared.takes(&policy, [&a]));
        assert!(!compared.takes(&policy, [&a]));
        assert!(compared.takes(&policy, [&a, &b]));
        compared.moved(&policy);
        assert!(!compared.takes(&policy, [&TransitionId("c".to_owned())]));
        assert!(compared.takes(&other, [&a]), "another model has not moved");
    }
}
