//! `cargo xtask learn --algorithms`: every plugin from the same start, on real rewards and on shuffled ones.
//!
//! A run is one seed with one kind of rewards: SFT, and from its weights one control for each variant. A run that was stopped
//! goes on where it was.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;
use serde_json::Value;

use super::{Promises, number};
use crate::example::Example;
use crate::process;

/// Updates of every variant: batches of 128 rollouts.
const STEPS: i64 = 50;
/// Rollouts of a step.
const GROUPS_PER_STEP: i64 = 16;
/// Optimiser steps of a batch: from the second one on ratios differ from 1.
const MINI_BATCHES: i64 = 4;
/// As in the example's own stage of GRPO.
const LEARNING_RATE: f64 = 2e-4;
/// Least gain of the held-out reward.
const GAIN_MIN: f64 = 0.20;
/// Most gain on shuffled rewards, from which nothing can be learned.
const SHUFFLED_GAIN_MAX: f64 = 0.05;

/// A variant that the table has a row of.
struct Variant {
    name: &'static str,
    plugin: &'static str,
    /// Its config beside what all have, as TOML.
    config: &'static str,
    /// Whether its loss has a clip, whose share of tokens must not be 0.
    clips: bool,
}

const fn variant(name: &'static str, plugin: &'static str, config: &'static str, clips: bool) -> Variant {
    Variant { name, plugin, config, clips }
}

const VARIANTS: [Variant; 14] = [
    variant("reinforce", "reinforce", "variant = 'reinforce'", false),
    variant("reinforce-pp", "reinforce", "variant = 'reinforce-plus-plus'", true),
    variant("reinforce-pp-baseline", "reinforce", "variant = 'reinforce-plus-plus-baseline'", true),
    variant("rloo", "rloo", "", true),
    variant("grpo", "grpo", "", true),
    variant("dr-grpo", "grpo", "variant = 'dr-grpo'\naggregation = { constant = 16 }", true),
    variant("dapo", "grpo", "variant = 'dapo'", true),
    variant("gspo", "grpo", "variant = 'gspo'", true),
    variant("cispo", "grpo", "variant = 'cispo'", true),
    variant("sapo", "grpo", "variant = 'sapo'", false),
    variant("ppo", "ppo", "", true),
    variant("hierarchical", "step_credit", "method = 'hierarchical'", true),
    variant("gigpo", "step_credit", "method = 'gigpo'", true),
    variant("tree-grpo", "tree_grpo", "", true),
];

/// Trains all variants with all seeds and writes the table.
pub(super) fn run(example: &Example, seeds: &[u64], folder: &Path, promises: &mut Promises) -> anyhow::Result<()> {
    promises
        .table
        .push_str("| variant | seed | start | after | gain | on shuffled rewards | largest clip fraction |\n");
    promises.table.push_str("|---|---|---|---|---|---|---|\n");
    for seed in seeds {
        let real = trained(example, *seed, false, folder)?;
        let shuffled = trained(example, *seed, true, folder)?;
        for variant in &VARIANTS {
            row(variant, *seed, &real, &shuffled, promises)?;
        }
    }
    Ok(())
}

/// A run and what it has recorded.
struct Trained {
    result: Value,
    /// Lines of `metrics.jsonl`.
    metrics: Vec<Value>,
}

impl Trained {
    fn gain(&self, variant: &Variant) -> Option<f64> {
        Some(number(&self.result, variant.name, "held_out_sampled")? - number(&self.result, "sft", "held_out_sampled")?)
    }

    fn largest(&self, variant: &Variant, scalar: &str) -> Option<f64> {
        let steps = self.metrics.iter().filter(|line| line.get("stage").and_then(Value::as_str) == Some(variant.name));
        steps.filter_map(|line| line.get("scalars")?.get(scalar)?.as_f64()).reduce(f64::max)
    }
}

fn trained(example: &Example, seed: u64, is_shuffled: bool, folder: &Path) -> anyhow::Result<Trained> {
    let name = format!("algorithms-seed{seed}{}", if is_shuffled { "-shuffled" } else { "" });
    println!("==> {name}");
    let (config, run) = (folder.join(format!("{name}.toml")), folder.join(&name));
    example.variant(&config, |config| change(config, is_shuffled))?;
    let mut train = example.train(&config, seed, &run);
    if run.exists() {
        train.arg("--resume");
    }
    let text = process::data(train.args(["--no-estimate", "--output", "json"]))?;
    let file = run.join("metrics.jsonl");
    let metrics = std::fs::read_to_string(&file).with_context(|| format!("cannot read `{}`", file.display()))?;
    Ok(Trained {
        result: serde_json::from_str(&text).context("the result is not JSON")?,
        metrics: metrics.lines().map(serde_json::from_str).collect::<Result<_, _>>().context("metrics.jsonl")?,
    })
}

/// The example's config with SFT alone and a control for each variant.
fn change(config: &mut toml::Table, is_shuffled: bool) {
    config.remove("baseline");
    let learned = |stage: &toml::Value| stage.get("name").and_then(toml::Value::as_str) == Some("grpo");
    let stages = config.get_mut("stage").and_then(toml::Value::as_array_mut);
    let Some(grpo) = stages.and_then(|stages| Some(stages.remove(stages.iter().position(learned)?))) else { return };
    let component = grpo.get("algorithm").and_then(toml::Value::as_str).map(Path::new);
    let components = component.and_then(Path::parent).unwrap_or(Path::new("")).to_owned();
    let controls = VARIANTS.iter().map(|variant| {
        let mut settings: toml::Table = variant.config.parse().unwrap_or_default();
        settings.insert("steps".to_owned(), STEPS.into());
        settings.insert("groups_per_step".to_owned(), GROUPS_PER_STEP.into());
        settings.insert("learning_rate".to_owned(), LEARNING_RATE.into());
        // Without a ratio there is nothing that a second step on the same rollouts could correct.
        if variant.name != "reinforce" {
            settings.insert("mini_batches".to_owned(), MINI_BATCHES.into());
        }
        let mut control = toml::Table::new();
        control.insert("name".to_owned(), variant.name.into());
        let file = components.join(format!("{}.wasm", variant.plugin));
        control.insert("algorithm".to_owned(), file.display().to_string().into());
        control.insert("dataset".to_owned(), "rooms".into());
        control.insert("start_from".to_owned(), "sft".into());
        control.insert("config".to_owned(), settings.into());
        toml::Value::from(control)
    });
    config.insert("control".to_owned(), controls.collect::<Vec<_>>().into());
    if let Some(local) = config.get_mut("policy").and_then(|policy| policy.get_mut("local")?.as_table_mut()) {
        local.insert("critic".to_owned(), toml::Table::new().into());
    }
    let experiment = toml::Table::from_iter([("shuffle_rewards".to_owned(), is_shuffled.into())]);
    config.insert("experiment".to_owned(), experiment.into());
}

fn row(
    variant: &Variant,
    seed: u64,
    real: &Trained,
    shuffled: &Trained,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    let (gain, of_noise) = (real.gain(variant), shuffled.gain(variant));
    let clipped = real.largest(variant, "clip_fraction");
    let what = |text: &str| format!("seed {seed}: {}: {text}", variant.name);
    promises.check(&what("gain (at least 0.20)"), gain, |gain| gain >= GAIN_MIN);
    promises.check(&what("gain on shuffled rewards (at most 0.05)"), of_noise, |gain| gain <= SHUFFLED_GAIN_MAX);
    if variant.clips {
        promises.check(&what("largest clip fraction (above 0)"), clipped, |clipped| clipped > 0.0);
    }
    let shown = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
    let held_out = |name: &str| shown(number(&real.result, name, "held_out_sampled"));
    writeln!(
        promises.table,
        "| {} | {seed} | {} | {} | {} | {} | {} |",
        variant.name,
        held_out("sft"),
        held_out(variant.name),
        shown(gain),
        shown(of_noise),
        shown(clipped),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variant_that_gains_nothing_or_gains_from_noise_breaks_a_promise() {
        let trained = |after: f64| Trained {
            result: serde_json::json!({"stages": [{"name": "sft", "held_out_sampled": 0.3}],
                "controls": [{"name": "rloo", "held_out_sampled": after}]}),
            metrics: vec![serde_json::json!({"stage": "rloo", "scalars": {"clip_fraction": 0.02}})],
        };
        let broken = |real: f64, shuffled: f64| {
            let mut promises = Promises { table: String::new(), broken: vec![] };
            row(&variant("rloo", "rloo", "", true), 0, &trained(real), &trained(shuffled), &mut promises).unwrap();
            promises.broken
        };
        assert!(broken(0.6, 0.2).is_empty());
        assert!(broken(0.4, 0.2)[0].contains("gain (at least"));
        assert!(broken(0.6, 0.4)[0].contains("shuffled"));
    }

    #[test]
    fn every_variant_has_a_config_and_a_name_of_its_own() {
        let names: std::collections::BTreeSet<_> = VARIANTS.iter().map(|variant| variant.name).collect();
        assert_eq!(names.len(), VARIANTS.len());
        for variant in &VARIANTS {
            variant.config.parse::<toml::Table>().unwrap();
        }
    }
}
