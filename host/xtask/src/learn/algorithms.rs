//! `cargo xtask learn algorithms`: every plugin from the same start, on real rewards and on shuffled ones.
//!
//! A run is one seed with one kind of rewards: SFT, and from its weights one control for each variant. A run that was stopped
//! goes on where it was.

use std::fmt::Write as _;
use std::path::Path;

use super::controls::{self, Control, Trained};
use super::{Promises, number};
use crate::example::Example;

/// Updates of every variant: batches of 128 rollouts.
const STEPS: i64 = 50;
/// Items of a step, of 8 rollouts each.
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
    control: Control,
    /// Whether its loss has a clip, whose share of tokens must not be 0.
    clips: bool,
}

const fn variant(name: &'static str, plugin: &'static str, config: &'static str, clips: bool) -> Variant {
    Variant { control: Control { name, plugin, config }, clips }
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
    // A group means nothing to it: it is shown as many items as rollouts.
    variant("ppo", "ppo", "group_size = 1\ngroups_per_step = 128", true),
    variant("turn-discount", "step_credit", "method = 'turn-discount'", true),
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
        controls::check_plugin_time(&format!("seed {seed}"), real.plugin_share.clone(), promises);
        for variant in &VARIANTS {
            row(variant, *seed, &real, &shuffled, promises)?;
        }
    }
    Ok(())
}

fn gain(trained: &Trained, variant: &Variant) -> Option<f64> {
    let held_out = |row: &str| number(&trained.result, row, "held_out_sampled");
    Some(held_out(variant.control.name)? - held_out("sft")?)
}

fn trained(example: &Example, seed: u64, is_shuffled: bool, folder: &Path) -> anyhow::Result<Trained> {
    let name = format!("algorithms-seed{seed}{}", if is_shuffled { "-shuffled" } else { "" });
    Trained::run(example, seed, folder, &name, |config| change(config, is_shuffled))
}

/// The example's config with SFT alone and a control for each variant.
fn change(config: &mut toml::Table, is_shuffled: bool) {
    controls::put(config, |stage| VARIANTS.iter().map(|variant| section(variant, stage)).collect());
    let experiment = toml::Table::from_iter([("shuffle_rewards".to_owned(), is_shuffled.into())]);
    config.insert("experiment".to_owned(), experiment.into());
}

fn section(variant: &Variant, stage: &toml::Table) -> toml::Table {
    let mut settings = toml::Table::new();
    settings.insert("steps".to_owned(), STEPS.into());
    settings.insert("groups_per_step".to_owned(), GROUPS_PER_STEP.into());
    settings.extend(variant.control.settings());
    settings.insert("learning_rate".to_owned(), LEARNING_RATE.into());
    // Without a ratio there is nothing that a second step on the same rollouts could correct.
    if variant.control.name != "reinforce" {
        settings.insert("mini_batches".to_owned(), MINI_BATCHES.into());
    }
    variant.control.section(stage, settings)
}

fn row(
    variant: &Variant,
    seed: u64,
    real: &Trained,
    shuffled: &Trained,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    let name = variant.control.name;
    let (gain, of_noise) = (gain(real, variant), gain(shuffled, variant));
    let clipped = real.scalars(name, ["clip_fraction"]).into_iter().map(|[share]| share).reduce(f64::max);
    let what = |text: &str| format!("seed {seed}: {name}: {text}");
    promises.check(&what("gain (at least 0.20)"), gain, |gain| gain >= GAIN_MIN);
    promises.check(&what("gain on shuffled rewards (at most 0.05)"), of_noise, |gain| gain <= SHUFFLED_GAIN_MAX);
    if variant.clips {
        promises.check(&what("largest clip fraction (above 0)"), clipped, |clipped| clipped > 0.0);
    }
    let shown = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
    let held_out = |name: &str| shown(number(&real.result, name, "held_out_sampled"));
    writeln!(
        promises.table,
        "| {name} | {seed} | {} | {} | {} | {} | {} |",
        held_out("sft"),
        held_out(name),
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
            plugin_share: None,
        };
        let broken = |real: f64, shuffled: f64| {
            let mut promises = Promises::default();
            row(&variant("rloo", "rloo", "", true), 0, &trained(real), &trained(shuffled), &mut promises).unwrap();
            promises.broken
        };
        assert!(broken(0.6, 0.2).is_empty());
        assert!(broken(0.4, 0.2)[0].contains("gain (at least"));
        assert!(broken(0.6, 0.4)[0].contains("shuffled"));
    }

    #[test]
    fn every_variant_has_a_config_and_a_name_of_its_own() {
        let names: std::collections::BTreeSet<_> = VARIANTS.iter().map(|variant| variant.control.name).collect();
        assert_eq!(names.len(), VARIANTS.len());
        for variant in &VARIANTS {
            variant.control.config.parse::<toml::Table>().unwrap();
        }
    }
}
