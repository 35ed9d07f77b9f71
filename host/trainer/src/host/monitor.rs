//! What the host itself measures of a step, whatever the plugin looks at. Names and meaning of the metrics:
//! [`crate::metrics`].

use std::collections::BTreeMap;

use fulgurite_core::algorithm::ModelReference;
use fulgurite_core::id::{PolicyVersion, TransitionId};
use fulgurite_core::reward::Reward;
use fulgurite_core::training::{ForwardBackwardReport, OptimiserReport, Stream, TrainingRow};

use super::mismatch::{Compared, Mismatch};

/// Dimensions of which a metric is written. 32: names are a guest's word.
const DIMENSIONS_MAX: usize = 32;

/// What a step has shown so far.
#[derive(Debug, Default)]
pub(super) struct Monitor {
    rollouts: Vec<Given>,
    /// Of all models together.
    learning: Learning,
    /// Of each model beside the policy.
    named: BTreeMap<String, Learning>,
    compared: Compared,
}

/// What updates have shown.
#[derive(Debug, Default)]
struct Learning {
    updates: Option<Updates>,
    mismatch: Mismatch,
    gradient_norm_max: Option<f64>,
    skipped_updates: u64,
    staleness: Option<Staleness>,
}

/// A training rollout that the step has been given.
#[derive(Debug)]
pub(super) struct Given {
    /// Its batch and its group in it.
    pub(super) group: (u64, u64),
    /// The step that enqueued it, and its item: what it is compared with is of both, in whichever batch.
    pub(super) item: (u64, String),
    pub(super) graded: bool,
    /// It has a row that is too long and is left out.
    pub(super) too_long: bool,
    /// Drawn tokens that are left out because their rows are too long.
    pub(super) cut_tokens: usize,
    /// Drawn tokens, what is left out included.
    pub(super) response_tokens: usize,
    pub(super) totals: BTreeMap<String, f64>,
}

/// Sums over the updates by policy gradient, weighted by their tokens.
#[derive(Debug, Clone, Copy, Default)]
struct Updates {
    tokens: f64,
    entropy: f64,
    /// Tokens of losses with ratios of sequences, which clip a whole sequence at once.
    sequence_tokens: f64,
    sequence_clip_fraction: f64,
    clip_fraction: f64,
    kl: f64,
    reference_kl: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Staleness {
    tokens: u64,
    sum: u64,
    max: u64,
}

/// Sums of a rollout's rewards by the metric's name.
pub(super) fn totals(rewards: &[Reward]) -> BTreeMap<String, f64> {
    let mut totals = BTreeMap::new();
    for reward in rewards {
        *totals.entry(reward.dimension.clone()).or_insert(0.0) += reward.value;
    }
    totals
}

impl Monitor {
    pub(super) fn given(&mut self, rollout: Given) {
        self.rollouts.push(rollout);
    }

    /// Forgets groups of a batch: the step that they are carried over to counts them.
    pub(super) fn carried(&mut self, batch: u64, groups: &[u64]) {
        self.rollouts.retain(|given| given.group.0 != batch || !groups.contains(&given.group.1));
    }

    /// Counts what an update by policy gradient of these transitions found; `of_sequences`: its ratios were of sequences.
    pub(super) fn updated<'a>(
        &mut self,
        model: &ModelReference,
        report: &ForwardBackwardReport,
        of_sequences: bool,
        transitions: impl IntoIterator<Item = &'a TransitionId>,
    ) {
        let found = Mismatch::of(report, self.compared.takes(model, transitions));
        self.of(model).for_each(|learning| {
            learning.updated(report, of_sequences);
            learning.mismatch.add(found);
        });
    }

    /// Compares trainer and sampler on a transition's drawn tokens, unless that has been done or the model has moved.
    pub(super) fn compare(
        &mut self,
        model: &ModelReference,
        transition: &TransitionId,
        trainer: &[f32],
        sampler: &[f32],
    ) {
        if !sampler.is_empty() && self.compared.takes(model, [transition]) {
            let found = Mismatch::of_tokens(trainer, sampler);
            self.of(model).for_each(|learning| learning.mismatch.add(found));
        }
    }

    /// Counts how old the weights are that drew what is trained on. `now` is the version of the model that the step began with.
    pub(super) fn trained(&mut self, model: &ModelReference, rows: &[TrainingRow], now: PolicyVersion) {
        self.of(model).for_each(|learning| learning.trained(rows, now));
    }

    pub(super) fn stepped(&mut self, model: &ModelReference, report: &OptimiserReport) {
        if !report.skipped {
            self.compared.moved(model);
        }
        self.of(model).for_each(|learning| learning.stepped(report));
    }

    /// Where a model's numbers go.
    fn of(&mut self, model: &ModelReference) -> impl Iterator<Item = &mut Learning> {
        let named = match model {
            ModelReference::Named(name) => Some(self.named.entry(name.clone()).or_default()),
            ModelReference::Policy | ModelReference::Snapshot(_) => None,
        };
        std::iter::once(&mut self.learning).chain(named)
    }

    /// Adds the metrics of a step. Numbers that are not finite are left out: they would be no JSON.
    pub(super) fn write(self, dimension: &str, scalars: &mut BTreeMap<String, f64>) {
        self.learning.write("host/", scalars);
        for (name, learning) in &self.named {
            learning.write(&format!("host/{name}/"), scalars);
        }
        if self.rollouts.is_empty() {
            return;
        }
        let mut numbers: Vec<(String, f64)> = vec![];
        let mut add = |name: &str, value: f64| numbers.push((format!("host/{name}"), value));
        let share = |count: usize| count as f64 / self.rollouts.len() as f64;
        let counted: Vec<&Given> = self.rollouts.iter().filter(|given| given.graded && !given.too_long).collect();
        add("excluded_share", share(self.rollouts.iter().filter(|given| !given.graded).count()));
        add("too_long_share", share(self.rollouts.iter().filter(|given| given.graded && given.too_long).count()));
        add("cut_tokens", self.rollouts.iter().map(|given| given.cut_tokens).sum::<usize>() as f64);
        let responses = self.rollouts.iter().filter(|given| given.graded);
        let (count, tokens) = responses.fold((0, 0), |(n, sum), given| (n + 1, sum + given.response_tokens));
        if count > 0 {
            add("response_tokens_mean", tokens as f64 / f64::from(count));
        }
        if let Some(share) = zero_variance_share(&counted, dimension) {
            add("zero_variance_share", share);
        }
        for (name, mean) in means(&counted) {
            add(&format!("reward/{name}"), mean);
        }
        scalars.extend(numbers.into_iter().filter(|(_, value)| value.is_finite()));
    }
}

impl Learning {
    fn updated(&mut self, report: &ForwardBackwardReport, of_sequences: bool) {
        let tokens = report.trained_tokens as f64;
        let updates = self.updates.get_or_insert_default();
        updates.tokens += tokens;
        updates.entropy += report.entropy * tokens;
        if of_sequences {
            updates.sequence_tokens += tokens;
            updates.sequence_clip_fraction += report.clip_fraction * tokens;
        } else {
            updates.clip_fraction += report.clip_fraction * tokens;
        }
        updates.kl += report.approximate_kl * tokens;
        updates.reference_kl += report.reference_kl * tokens;
    }

    fn trained(&mut self, rows: &[TrainingRow], now: PolicyVersion) {
        for row in rows.iter().filter(|row| row.stream == Stream::Rl) {
            let tokens = row.mask.iter().filter(|trained| **trained).count() as u64;
            let age = now.0.saturating_sub(row.policy_version.0);
            let staleness = self.staleness.get_or_insert_default();
            staleness.tokens += tokens;
            staleness.sum += age * tokens;
            staleness.max = staleness.max.max(age);
        }
    }

    fn stepped(&mut self, report: &OptimiserReport) {
        self.skipped_updates += u64::from(report.skipped);
        let norm = self.gradient_norm_max.unwrap_or(0.0).max(report.gradient_norm);
        self.gradient_norm_max = Some(norm);
    }

    fn write(&self, prefix: &str, scalars: &mut BTreeMap<String, f64>) {
        self.mismatch.write(prefix, scalars);
        let mut numbers: Vec<(&str, f64)> = vec![];
        if let Some(updates) = self.updates {
            let tokens = updates.tokens.max(1.0);
            let own_tokens = updates.tokens - updates.sequence_tokens;
            if own_tokens > 0.0 || updates.sequence_tokens == 0.0 {
                numbers.push(("clip_fraction", updates.clip_fraction / own_tokens.max(1.0)));
            }
            if updates.sequence_tokens > 0.0 {
                numbers.push(("sequence_clip_fraction", updates.sequence_clip_fraction / updates.sequence_tokens));
            }
            numbers.extend([
                ("entropy", updates.entropy / tokens),
                ("kl", updates.kl / tokens),
                ("reference_kl", updates.reference_kl / tokens),
            ]);
        }
        if let Some(norm) = self.gradient_norm_max {
            numbers.extend([("gradient_norm_max", norm), ("skipped_updates", self.skipped_updates as f64)]);
        }
        if let Some(staleness) = self.staleness {
            let mean = staleness.sum as f64 / staleness.tokens.max(1) as f64;
            numbers.extend([("staleness_mean", mean), ("staleness_max", staleness.max as f64)]);
        }
        let finite = numbers.into_iter().filter(|(_, value)| value.is_finite());
        scalars.extend(finite.map(|(name, value)| (format!("{prefix}{name}"), value)));
    }
}

/// Share of the groups with several graded rollouts whose rewards are all the same; `None` without such groups. A group is the
/// step's rollouts of one item, forks that came in later batches included.
fn zero_variance_share(rollouts: &[&Given], dimension: &str) -> Option<f64> {
    let mut groups: BTreeMap<&(u64, String), Vec<f64>> = BTreeMap::new();
    for given in rollouts {
        groups.entry(&given.item).or_default().extend(given.totals.get(dimension));
    }
    let groups: Vec<Vec<f64>> = groups.into_values().filter(|rewards| rewards.len() > 1).collect();
    let is_flat = |rewards: &&Vec<f64>| rewards.iter().all(|reward| Some(reward) == rewards.first());
    (!groups.is_empty()).then(|| groups.iter().filter(is_flat).count() as f64 / groups.len() as f64)
}

/// Mean of each dimension over the rollouts that have it, under a name that metrics can have.
fn means(rollouts: &[&Given]) -> BTreeMap<String, f64> {
    let mut sums: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    for (dimension, total) in rollouts.iter().flat_map(|given| &given.totals) {
        let name = metric_name(dimension);
        if sums.len() < DIMENSIONS_MAX || sums.contains_key(&name) {
            let sum = sums.entry(name).or_default();
            *sum = (sum.0 + total, sum.1 + 1.0);
        }
    }
    sums.into_iter().map(|(name, (sum, count))| (name, sum / count)).collect()
}

/// A dimension as a part of a metric's name: small letters, and `_` for whatever names cannot have.
fn metric_name(dimension: &str) -> String {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-' | '/');
    let letters = dimension.chars().map(|c| c.to_ascii_lowercase());
    letters.map(|c| if allowed(c) { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use fulgurite_core::llm::KeptTokens;

    use super::*;

    fn given(group: u64, graded: bool, reward: f64) -> Given {
        Given {
            group: (1, group),
            item: (0, format!("item-{group}")),
            graded,
            too_long: false,
            cut_tokens: 0,
            response_tokens: 10,
            totals: BTreeMap::from([("reward".to_owned(), reward), ("My Style".to_owned(), 2.0)]),
        }
    }

    fn written(monitor: Monitor) -> BTreeMap<String, f64> {
        let mut scalars = BTreeMap::new();
        monitor.write("reward", &mut scalars);
        scalars
    }

    #[track_caller]
    fn is(scalars: &BTreeMap<String, f64>, name: &str, expected: f64) {
        let found = scalars.get(&format!("host/{name}")).copied().unwrap_or(f64::NAN);
        assert!((found - expected).abs() < 1e-12, "{name} is {found} and not {expected}: {scalars:?}");
    }

    #[test]
    fn shares_are_of_what_was_given_and_means_of_what_counts() {
        let mut monitor = Monitor::default();
        for rollout in [given(0, true, 1.0), given(0, true, 0.0), given(1, true, 0.5), given(1, true, 0.5)] {
            monitor.given(rollout);
        }
        monitor.given(given(1, false, 9.0));
        monitor.given(Given { too_long: true, response_tokens: 60, ..given(0, true, 9.0) });
        // A group of one has nothing to compare, and what is carried over is another step's.
        monitor.given(given(2, true, 0.0));
        monitor.given(given(3, true, 7.0));
        monitor.carried(1, &[3]);
        monitor.carried(2, &[0, 1]);
        let scalars = written(monitor);
        is(&scalars, "zero_variance_share", 0.5);
        is(&scalars, "excluded_share", 1.0 / 7.0);
        is(&scalars, "too_long_share", 1.0 / 7.0);
        is(&scalars, "response_tokens_mean", 110.0 / 6.0);
        is(&scalars, "reward/reward", 0.4);
        is(&scalars, "reward/my_style", 2.0);
    }

    #[test]
    fn updates_are_weighted_by_their_tokens() {
        let report = |trained_tokens, entropy| ForwardBackwardReport { trained_tokens, entropy, ..Default::default() };
        let mut monitor = Monitor::default();
        let policy = ModelReference::Policy;
        monitor.updated(&policy, &report(300, 1.0), false, []);
        monitor.updated(&policy, &report(100, 2.0), false, []);
        monitor.stepped(&policy, &OptimiserReport { gradient_norm: 3.0, ..Default::default() });
        monitor.stepped(&policy, &OptimiserReport { gradient_norm: f64::NAN, skipped: true, ..Default::default() });
        let scalars = written(monitor);
        is(&scalars, "entropy", 1.25);
        is(&scalars, "gradient_norm_max", 3.0);
        is(&scalars, "skipped_updates", 1.0);
        assert!(written(Monitor::default()).is_empty());
    }

    #[test]
    fn a_named_model_is_told_by_itself_and_with_the_others() {
        let report = |entropy| ForwardBackwardReport { trained_tokens: 100, entropy, ..Default::default() };
        let mut monitor = Monitor::default();
        let writing = ModelReference::Named("writing".to_owned());
        monitor.updated(&ModelReference::Policy, &report(1.0), false, []);
        monitor.updated(&writing, &report(2.0), false, []);
        monitor.stepped(&writing, &OptimiserReport { gradient_norm: 3.0, ..Default::default() });
        let scalars = written(monitor);
        is(&scalars, "entropy", 1.5);
        is(&scalars, "writing/entropy", 2.0);
        is(&scalars, "writing/gradient_norm_max", 3.0);
        is(&scalars, "writing/ratio_mean", 0.0);
        assert_eq!(scalars.keys().filter(|name| name.starts_with("host/policy")).count(), 0);
    }

    #[test]
    fn forks_of_later_batches_are_of_the_group_of_their_item() {
        // A root of its own batch, and the forks of it in another one.
        let fork = |reward| Given { group: (2, 0), ..given(0, true, reward) };
        let mut monitor = Monitor::default();
        for rollout in [given(0, true, 1.0), fork(1.0), fork(0.0), given(1, true, 0.0)] {
            monitor.given(rollout);
        }
        monitor.given(Given { group: (2, 1), ..given(1, true, 0.0) });
        // The same item in an earlier step, carried over, is another group.
        monitor.given(Given { group: (3, 0), item: (7, "item-1".to_owned()), ..given(1, true, 1.0) });
        is(&written(monitor), "zero_variance_share", 0.5);
    }

    #[test]
    fn clips_of_sequences_have_a_metric_of_their_own() {
        let written_of = |updates: &[(u64, f64, bool)]| {
            let mut monitor = Monitor::default();
            for (trained_tokens, clip_fraction, of_sequences) in updates.iter().copied() {
                let report = ForwardBackwardReport { trained_tokens, clip_fraction, ..Default::default() };
                monitor.updated(&ModelReference::Policy, &report, of_sequences, []);
            }
            written(monitor)
        };
        let scalars = written_of(&[(100, 0.5, true), (300, 0.4, true)]);
        is(&scalars, "sequence_clip_fraction", 0.425);
        assert!(!scalars.contains_key("host/clip_fraction"), "{scalars:?}");
        let scalars = written_of(&[(100, 0.5, true), (100, 0.1, false)]);
        is(&scalars, "clip_fraction", 0.1);
        is(&scalars, "sequence_clip_fraction", 0.5);
    }

    #[test]
    fn staleness_is_of_trained_tokens() {
        let row = |version, mask: &[bool], stream| TrainingRow {
            sequence: 0,
            ids: vec![],
            mask: mask.to_vec(),
            weights: vec![],
            behaviour_log_probs: vec![],
            old_log_probs: vec![],
            calls: vec![],
            group: None,
            kept: KeptTokens::default(),
            stream,
            temperature: 1.0,
            policy_version: PolicyVersion(version),
        };
        let mut monitor = Monitor::default();
        let rows = [
            row(4, &[false, true, true, true], Stream::Rl),
            row(2, &[false, true], Stream::Rl),
            row(0, &[true], Stream::Ce),
        ];
        monitor.trained(&ModelReference::Policy, &rows, PolicyVersion(5));
        let scalars = written(monitor);
        is(&scalars, "staleness_mean", 1.5);
        is(&scalars, "staleness_max", 3.0);
    }
}
