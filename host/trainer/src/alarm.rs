//! Alarms: a metric that is beyond its threshold for some steps in a row is told on the terminal, in `metrics.jsonl`, and in
//! the run's result.
//!
//! Every run has these, as warnings. A config's `[[alarm]]` on one of these metrics takes their place. The thresholds are far
//! from what sound runs of the examples show, so that one that is raised is worth a look:
//!
//! | metric | raised | steps in a row | sound runs of `examples/rooms` | what it may mean |
//! |---|---|---|---|---|
//! | `host/entropy` | below 0.001 nats | 10 | 0.003 to 0.43 | the policy is certain of everything: nothing is explored any more |
//! | `host/clip_fraction` | above 0.3 | 3 | up to 0.03 | steps are too large, or too many on one batch; not raised where ratios are of sequences, see below |
//! | `host/kl` | above 0.1 nats a token | 3 | up to 0.14 in a single step | the same |
//! | `host/mismatch_mean` | above 0.1 nats | 3 | 0 | sampler and trainer do not agree: numerics, or rollouts of weights that are too old |
//! | `host/ratio_max` | above 1,000 | 3 | up to 18 | single tokens outweigh all others |
//! | `host/effective_sample_size` | below 0.5 | 3 | 0.98 and more | likewise, for the batch as a whole |
//! | `host/zero_variance_share` | above 0.98 | 20 | up to 1 in single steps | groups whose rollouts all earn the same: nothing to learn from |
//! | `host/excluded_share` | above 0.1 | 1 | 0 | faults of code or machine; at `rollout.fault_share_max` the run stops |
//! | `host/gradient_norm_max` | above 100 | 3 | up to 0.7 | the loss is about to blow up |
//! | `host/skipped_updates` | above 0 | 3 | 0 | gradients that are not finite |
//! | `host/response_tokens_mean` | above 4 times its first value | 5 | 1 | answers that only grow, as where length is rewarded |
//! | `host/staleness_max` | above 64 optimiser steps | 3 | 0 | training on rollouts of weights that are long gone |
//!
//! A loss with ratios of sequences (GSPO, arXiv 2507.18071) has bounds two or three orders tighter and clips whole sequences: sound
//! runs clip 0.36 to 0.5 of the tokens, and the paper finds a share two orders above GRPO's beside better learning. So it says
//! nothing of whether a run is sound: it is written as `host/sequence_clip_fraction`, on which there is no alarm by default.
//!
//! How often a metric was beyond its threshold is a part of the checkpoint, so a resumed run raises what an uninterrupted one
//! raises.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::{AlarmAction, AlarmConfig};

/// Raised alarms that a stage's report keeps. 64: a report is for people, and `metrics.jsonl` has all.
const REPORTED_MAX: usize = 64;

/// An alarm that was raised.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RaisedAlarm {
    /// The step that raised it, from 0.
    pub step: u64,
    /// The metric.
    pub metric: String,
    /// Its value.
    pub value: f64,
    /// What is said.
    pub text: String,
    /// Whether the run stops.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stops: bool,
}

/// What a checkpoint keeps of the alarms of a stage.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct AlarmState {
    /// In the order of the alarms.
    watched: Vec<Watched>,
    /// What was raised in the stage so far.
    pub(crate) raised: Vec<RaisedAlarm>,
}

impl AlarmState {
    /// Whether there is anything to keep.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Watched {
    /// Steps in a row beyond the threshold.
    steps: u64,
    /// First value in the stage.
    start: Option<f64>,
}

/// The alarms of one stage.
#[derive(Debug)]
pub(crate) struct Alarms {
    alarms: Vec<AlarmConfig>,
}

impl Alarms {
    /// The config's, and the default ones on metrics that it does not name.
    pub(crate) fn of_stage(config: &[AlarmConfig], stage: &str) -> Self {
        let is_named = |default: &AlarmConfig| config.iter().any(|alarm| alarm.metric == default.metric);
        let mut alarms: Vec<AlarmConfig> = defaults().into_iter().filter(|default| !is_named(default)).collect();
        let own = config.iter().filter(|alarm| alarm.stage.as_ref().is_none_or(|only| only == stage));
        alarms.extend(own.filter(|alarm| alarm.action != AlarmAction::Off).cloned());
        Self { alarms }
    }

    /// Looks at a step and returns what it raises. An alarm is raised once, and again when it has been quiet in between.
    pub(crate) fn check(&self, state: &mut AlarmState, step: u64, scalars: &BTreeMap<String, f64>) -> Vec<RaisedAlarm> {
        state.watched.resize(self.alarms.len(), Watched::default());
        let mut raised = vec![];
        for (alarm, watched) in self.alarms.iter().zip(&mut state.watched) {
            let Some(value) = scalars.get(&alarm.metric).copied() else { continue };
            let start = *watched.start.get_or_insert(value);
            let threshold = |threshold: f64| if alarm.of_start { threshold * start } else { threshold };
            let above = alarm.above.map(threshold).filter(|above| value > *above);
            let below = alarm.below.map(threshold).filter(|below| value < *below);
            let (side, bound) = match (above, below) {
                (Some(above), _) => ("above", above),
                (None, Some(below)) => ("below", below),
                (None, None) => {
                    watched.steps = 0;
                    continue;
                }
            };
            watched.steps += 1;
            if watched.steps == alarm.for_steps {
                let steps =
                    if alarm.for_steps == 1 { String::new() } else { format!(" for {} steps", alarm.for_steps) };
                let text = format!("{} is {}, {side} {}{steps}", alarm.metric, shown(value), shown(bound));
                let stops = alarm.action == AlarmAction::Stop;
                raised.push(RaisedAlarm { step, metric: alarm.metric.clone(), value, text, stops });
            }
        }
        let room = REPORTED_MAX.saturating_sub(state.raised.len());
        state.raised.extend(raised.iter().take(room).cloned());
        raised
    }
}

/// A number with four digits that matter.
fn shown(value: f64) -> String {
    if value == 0.0 || (1e-3..1e5).contains(&value.abs()) {
        let text = format!("{value:.4}");
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    format!("{value:.3e}")
}

/// The alarms of every run: the table of this module.
fn defaults() -> Vec<AlarmConfig> {
    let alarm = |metric: &str, above: Option<f64>, below: Option<f64>, for_steps: u64| AlarmConfig {
        metric: metric.to_owned(),
        stage: None,
        above,
        below,
        of_start: false,
        for_steps,
        action: AlarmAction::Warn,
    };
    let above = |metric: &str, threshold: f64, steps: u64| alarm(metric, Some(threshold), None, steps);
    let below = |metric: &str, threshold: f64, steps: u64| alarm(metric, None, Some(threshold), steps);
    vec![
        below("host/entropy", 0.001, 10),
        above("host/clip_fraction", 0.3, 3),
        above("host/kl", 0.1, 3),
        above("host/mismatch_mean", 0.1, 3),
        above("host/ratio_max", 1_000.0, 3),
        below("host/effective_sample_size", 0.5, 3),
        above("host/zero_variance_share", 0.98, 20),
        above("host/excluded_share", 0.1, 1),
        above("host/gradient_norm_max", 100.0, 3),
        above("host/skipped_updates", 0.0, 3),
        AlarmConfig { of_start: true, ..above("host/response_tokens_mean", 4.0, 5) },
        above("host/staleness_max", 64.0, 3),
    ]
}

/// The config's alarms whose metric no step of a run had, as texts for people: a name that nobody writes watches nothing.
pub(crate) fn never_seen(config: &[AlarmConfig], seen: impl Fn(&AlarmConfig) -> bool) -> Vec<String> {
    let unseen = config.iter().filter(|alarm| alarm.action != AlarmAction::Off && !seen(alarm));
    let text = |alarm: &AlarmConfig| {
        let place = alarm.stage.as_ref().map_or_else(|| "the run".to_owned(), |stage| format!("stage `{stage}`"));
        format!("the alarm on `{}` watched nothing: no step of {place} has that metric", alarm.metric)
    };
    unseen.map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alarm(text: &str) -> AlarmConfig {
        toml::from_str(text).unwrap()
    }

    fn raise(alarms: &Alarms, state: &mut AlarmState, values: &[Option<f64>]) -> Vec<u64> {
        let mut raised = vec![];
        for (step, value) in (0..).zip(values) {
            let scalars = value.iter().map(|value| ("loss".to_owned(), *value)).collect();
            raised.extend(alarms.check(state, step, &scalars).into_iter().map(|alarm| alarm.step));
        }
        raised
    }

    #[test]
    fn an_alarm_is_raised_after_its_steps_and_once() {
        let alarms = Alarms::of_stage(&[alarm("metric = 'loss'\nabove = 1.0\nfor_steps = 2")], "s");
        let values = [2.0, 0.5, 2.0, 2.0, 2.0, 1.0, 3.0, 3.0].map(Some);
        assert_eq!(raise(&alarms, &mut AlarmState::default(), &values), [3, 7]);
        // Steps without the metric neither count nor interrupt.
        assert_eq!(raise(&alarms, &mut AlarmState::default(), &[Some(2.0), None, Some(2.0)]), [2]);
    }

    #[test]
    fn its_state_survives_a_checkpoint() {
        let alarms = Alarms::of_stage(&[alarm("metric = 'loss'\nbelow = 0.5\nof_start = true\nfor_steps = 3")], "s");
        let values = [4.0, 1.9, 2.0, 1.0, 1.0, 1.0, 1.0].map(Some);
        let mut state = AlarmState::default();
        assert_eq!(raise(&alarms, &mut state, &values), [5]);
        let mut cut = AlarmState::default();
        raise(&alarms, &mut cut, &values[..5]);
        let mut resumed: AlarmState = serde_json::from_str(&serde_json::to_string(&cut).unwrap()).unwrap();
        assert_eq!(raise(&alarms, &mut resumed, &values[5..]), [0], "the first step after the checkpoint");
        assert_eq!(resumed.watched, state.watched);
        assert_eq!(state.raised[0].text, "loss is 1, below 2 for 3 steps");
    }

    #[test]
    fn a_config_takes_the_place_of_defaults_and_names_stages() {
        let entropies = |alarms: &Alarms| alarms.alarms.iter().filter(|alarm| alarm.metric == "host/entropy").count();
        assert_eq!(entropies(&Alarms::of_stage(&[], "s")), 1);
        assert_eq!(entropies(&Alarms::of_stage(&[alarm("metric = 'host/entropy'\naction = 'off'")], "s")), 0);
        let own = [alarm("metric = 'host/entropy'\nbelow = 0.1\nstage = 's'")];
        assert_eq!((entropies(&Alarms::of_stage(&own, "s")), entropies(&Alarms::of_stage(&own, "t"))), (1, 0));
        assert_eq!(never_seen(&own, |_| false).len(), 1);
        assert!(never_seen(&own, |_| true).is_empty());
    }

    #[test]
    fn every_default_is_on_a_metric_that_the_host_writes() {
        for alarm in defaults() {
            crate::metrics::check_watched(&alarm.metric).unwrap();
        }
    }

    #[test]
    fn clips_of_sequences_raise_nothing_by_default() {
        let alarms = Alarms::of_stage(&[], "s");
        let raised = |metric: &str| {
            let mut state = AlarmState::default();
            let scalars = BTreeMap::from([(metric.to_owned(), 0.45)]);
            (0..8).map(|step| alarms.check(&mut state, step, &scalars).len()).sum::<usize>()
        };
        assert_eq!((raised("host/clip_fraction"), raised("host/sequence_clip_fraction")), (1, 0));
        crate::metrics::check_watched("host/sequence_clip_fraction").unwrap();
    }

    #[test]
    fn numbers_are_short() {
        let texts = [0.0, 1.0, 0.25, 1234.5, 0.000_012_34, -2_000_000.0].map(shown);
        assert_eq!(texts, ["0", "1", "0.25", "1234.5", "1.234e-5", "-2.000e6"]);
    }
}
