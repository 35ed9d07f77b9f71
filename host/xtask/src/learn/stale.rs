//! `cargo xtask learn stale`: what old rollouts do to GRPO, and what the corrections between the weights that drew them and
//! those that are trained do about it.
//!
//! A run is one seed: SFT, and from its weights a control for each lag and correction. A run that was stopped goes on where it
//! was.

use std::fmt::Write as _;
use std::path::Path;

use super::controls::{self, Control, Trained};
use super::{Promises, number};
use crate::example::Example;

/// Settings of all: as in the table of the plugins.
const COMMON: &str = "steps = 50\ngroups_per_step = 16\nlearning_rate = 2e-4\nmini_batches = 4";
/// Least gain of the held-out reward two steps behind, with a correction.
const GAIN_MIN: f64 = 0.20;

/// A lag with a correction.
struct Stale {
    control: Control,
    /// Steps behind.
    lag_steps: u64,
    /// What is done about it, in words.
    correction: &'static str,
}

const fn stale(name: &'static str, lag_steps: u64, correction: &'static str, config: &'static str) -> Stale {
    Stale { control: Control { name, plugin: "grpo", config }, lag_steps, correction }
}

const NONE: &str = "none: ratios and clip against the weights that drew";
const TRUNCATE: &str = "weights π_old/μ of tokens, truncated at 2 (TIS)";
const MASK: &str = "tokens with π_old/μ outside 0.5 to 2 left out (masking)";

const RUNS: [Stale; 7] = [
    stale("fresh", 0, "nothing to correct", ""),
    stale("lag2-none", 2, NONE, "lag_steps = 2\ncorrection = 'none'"),
    stale("lag2-truncate", 2, TRUNCATE, "lag_steps = 2\ncorrection = { rule = { truncate = 2.0 } }"),
    stale("lag2-mask", 2, MASK, "lag_steps = 2\ncorrection = { rule = { mask = [0.5, 2.0] } }"),
    stale("lag8-none", 8, NONE, "lag_steps = 8\ncorrection = 'none'"),
    stale("lag8-truncate", 8, TRUNCATE, "lag_steps = 8\ncorrection = { rule = { truncate = 2.0 } }"),
    stale("lag8-mask", 8, MASK, "lag_steps = 8\ncorrection = { rule = { mask = [0.5, 2.0] } }"),
];

/// Trains with all seeds and writes the table.
pub(super) fn run(example: &Example, seeds: &[u64], folder: &Path, promises: &mut Promises) -> anyhow::Result<()> {
    promises.table.push_str(
        "| lag | correction | seed | start | after | oldest calls (optimiser steps) | mean \\|log π − log μ\\| | largest ratio | masked tokens |\n",
    );
    promises.table.push_str("|---|---|---|---|---|---|---|---|---|\n");
    let mut all = vec![];
    for seed in seeds {
        let trained = Trained::run(example, *seed, folder, &format!("stale-seed{seed}"), change)?;
        controls::check_plugin_time(&format!("seed {seed}"), trained.plugin_share.clone(), promises);
        all.push((*seed, trained));
    }
    for stale in &RUNS {
        for (seed, trained) in &all {
            row(stale, *seed, trained, promises)?;
        }
    }
    Ok(())
}

/// The example's config with SFT alone and a control for each lag and correction.
fn change(config: &mut toml::Table) {
    let settings = |stale: &Stale| -> toml::Table {
        let mut settings: toml::Table = COMMON.parse().unwrap_or_default();
        settings.extend(stale.control.settings());
        settings
    };
    controls::put(config, |stage| RUNS.iter().map(|stale| stale.control.section(stage, settings(stale))).collect());
}

fn row(stale: &Stale, seed: u64, trained: &Trained, promises: &mut Promises) -> anyhow::Result<()> {
    let name = stale.control.name;
    let held_out = |row: &str| number(&trained.result, row, "held_out_sampled");
    let steps = |scalar: &str| trained.scalars(name, [scalar]).into_iter().map(|[value]| value).collect::<Vec<_>>();
    let most = |scalar: &str| steps(scalar).into_iter().reduce(f64::max);
    let mean = |scalar: &str| {
        let all = steps(scalar);
        (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
    };
    let what = |text: &str| format!("seed {seed}: {name}: {text}");
    if stale.lag_steps > 0 {
        let lag = stale.lag_steps as f64;
        promises
            .check(&what("age of the oldest calls (at least a version a step)"), most("staleness_max"), |v| v >= lag);
    }
    if stale.lag_steps == 2 && stale.correction != NONE {
        let gain = held_out(name).zip(held_out("sft")).map(|(after, start)| after - start);
        promises.check(&what("gain (at least 0.20)"), gain, |gain| gain >= GAIN_MIN);
    }
    let shown = |value: Option<f64>, digits: usize| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.digits$}"));
    writeln!(
        promises.table,
        "| {} | {} | {seed} | {} | {} | {} | {} | {} | {} |",
        stale.lag_steps,
        stale.correction,
        shown(held_out("sft"), 3),
        shown(held_out(name), 3),
        shown(most("staleness_max").or(Some(0.0)), 0),
        shown(mean("host/mismatch_mean"), 3),
        shown(most("ratio_max"), 1),
        shown(mean("masked_share").map(|share| share * 100.0), 1)
            + if most("masked_share").is_some() { " %" } else { "" },
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_run_that_is_not_stale_or_learns_nothing_breaks_a_promise() {
        let broken = |age: f64, after: f64| {
            let trained = Trained {
                result: json!({"stages": [{"name": "sft", "held_out_sampled": 0.3}],
                    "controls": [{"name": "lag2-truncate", "held_out_sampled": after}]}),
                plugin_share: None,
                metrics: vec![
                    json!({"stage": "lag2-truncate", "scalars": {"staleness_max": age, "masked_share": 0.02}}),
                ],
            };
            let mut promises = Promises::default();
            row(&RUNS[2], 0, &trained, &mut promises).unwrap();
            assert!(promises.table.contains("2.0 %"), "{}", promises.table);
            promises.broken
        };
        assert!(broken(8.0, 0.6).is_empty());
        assert!(broken(1.0, 0.6)[0].contains("oldest calls"));
        assert!(broken(8.0, 0.4)[0].contains("gain"));
    }

    #[test]
    fn every_run_has_a_config_that_says_its_lag() {
        for stale in &RUNS {
            let settings = stale.control.settings();
            let lag = settings.get("lag_steps").and_then(toml::Value::as_integer).unwrap_or(0);
            assert_eq!(lag, i64::try_from(stale.lag_steps).unwrap(), "{}", stale.control.name);
        }
        COMMON.parse::<toml::Table>().unwrap();
    }
}
