//! `cargo xtask learn comparison`: four plugins on word problems, from the same start, at equal sampled tokens.
//!
//! A run is one seed: SFT, and from its weights a control for each plugin with the settings of the example's own stage, until
//! its rollouts have drawn so many tokens. A run that was stopped goes on where it was. Wall-clock time was the alternative:
//! it would compare machines, and a run would not repeat.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;

use super::controls::{self, Control, Trained};
use super::curves::{self, Curve, Run};
use super::{Promises, number};
use crate::example::Example;

/// Tokens that the rollouts of a control draw. 800,000: 184 batches of 128 rollouts, and about 3 minutes with two idle cores.
pub(super) const SAMPLED_TOKENS_MAX: u64 = 800_000;
/// Steps that no control gets to: its tokens end it.
const STEPS: i64 = 100_000;

const CONTROLS: [Control; 4] = [
    Control { name: "grpo", plugin: "grpo", config: "" },
    Control { name: "rloo", plugin: "rloo", config: "" },
    // A group means nothing to it: it is shown as many items as the others make rollouts.
    Control { name: "ppo", plugin: "ppo", config: "group_size = 1\ngroups_per_step = 128" },
    // Four roots and a fork of each are eight rollouts of an item, as many as the others make.
    Control { name: "tree-grpo", plugin: "tree_grpo", config: "group_size = 4\nrounds = 1\nforks_per_tree = 1" },
];

/// Trains with all seeds, and writes table and curves.
pub(super) fn run(
    example: &Example,
    seeds: &[u64],
    sampled_tokens_max: u64,
    folder: &Path,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    let mut all = vec![];
    for seed in seeds {
        let name = format!("comparison-{sampled_tokens_max}-seed{seed}");
        let trained = Trained::run(example, *seed, folder, &name, |config| change(config, sampled_tokens_max))?;
        controls::check_plugin_time(&format!("seed {seed}"), trained.plugin_share.clone(), promises);
        all.push((*seed, trained));
    }
    table(&all, sampled_tokens_max, promises)?;
    let trained: Vec<&Trained> = all.iter().map(|(_, trained)| trained).collect();
    let file = folder.join("comparison.svg");
    std::fs::write(&file, curves::svg(&curves_of(&trained), sampled_tokens_max as f64))
        .with_context(|| format!("cannot write `{}`", file.display()))?;
    println!("the curves are in {}", file.display());
    Ok(())
}

/// The example's config with SFT alone and a control for each plugin.
fn change(config: &mut toml::Table, sampled_tokens_max: u64) {
    controls::put(config, |stage| CONTROLS.iter().map(|control| section(control, stage, sampled_tokens_max)).collect());
}

/// A control with the settings of the example's own stage, but for what its method needs.
fn section(control: &Control, stage: &toml::Table, sampled_tokens_max: u64) -> toml::Table {
    let mut settings = stage.get("config").and_then(toml::Value::as_table).cloned().unwrap_or_default();
    settings.extend(control.settings());
    settings.insert("steps".to_owned(), STEPS.into());
    let mut section = control.section(stage, settings);
    let most = i64::try_from(sampled_tokens_max).unwrap_or(i64::MAX);
    section.insert("sampled_tokens_max".to_owned(), most.into());
    section
}

fn table(all: &[(u64, Trained)], sampled_tokens_max: u64, promises: &mut Promises) -> anyhow::Result<()> {
    promises.table.push_str(
        "| plugin | seed | start | after, sampled | after, greedy | updates | rollouts | tokens sampled | tokens trained on | seconds |\n",
    );
    promises.table.push_str("|---|---|---|---|---|---|---|---|---|---|\n");
    for control in &CONTROLS {
        for (seed, trained) in all {
            row(control, *seed, trained, sampled_tokens_max, promises)?;
        }
        if let Some(mean) = mean_after(control, all).filter(|_| all.len() > 1) {
            writeln!(promises.table, "| {} | mean | | **{mean:.3}** | | | | | | |", control.name)?;
        }
    }
    Ok(())
}

fn mean_after(control: &Control, all: &[(u64, Trained)]) -> Option<f64> {
    let after = |(_, trained): &(u64, Trained)| number(&trained.result, control.name, "held_out_sampled");
    let after: Vec<f64> = all.iter().map(after).collect::<Option<_>>()?;
    Some(after.iter().sum::<f64>() / after.len() as f64)
}

fn row(
    control: &Control,
    seed: u64,
    trained: &Trained,
    sampled_tokens_max: u64,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    let name = control.name;
    let of = |row: &str, field: &str| number(&trained.result, row, field);
    let shown = |value: Option<f64>, digits: usize| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.digits$}"));
    writeln!(
        promises.table,
        "| {name} | {seed} | {} | {} | {} | {} | {} | {} | {} | {} |",
        shown(of("sft", "held_out_sampled"), 3),
        shown(of(name, "held_out_sampled"), 3),
        shown(of(name, "held_out_greedy"), 3),
        shown(of(name, "steps"), 0),
        shown(of(name, "rollouts"), 0),
        shown(of(name, "sampled_tokens"), 0),
        shown(of(name, "tokens"), 0),
        shown(of(name, "seconds"), 0),
    )?;
    let what = |text: &str| format!("seed {seed}: {name}: {text}");
    let most = sampled_tokens_max as f64;
    promises.check(&what("tokens sampled (at least the bound)"), of(name, "sampled_tokens"), |tokens| tokens >= most);
    let drawn = trained.scalars(name, ["sampled_tokens_total"]);
    let before = drawn.split_last().map(|(_, before)| before.last().map_or(0.0, |[tokens]| *tokens));
    promises.check(&what("tokens sampled before the last step (below the bound)"), before, |tokens| tokens < most);
    Ok(())
}

/// Reward by tokens, of each plugin and seed.
fn curves_of(all: &[&Trained]) -> Vec<Curve> {
    let run = |control: &Control, trained: &Trained| -> Run {
        let steps = trained.scalars(control.name, ["sampled_tokens_total", "reward_mean"]);
        steps.into_iter().map(|[tokens, reward]| (tokens, reward)).collect()
    };
    let curve = |control: &Control| Curve {
        name: control.name,
        runs: all.iter().map(|trained| run(control, trained)).collect(),
    };
    CONTROLS.iter().map(curve).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn trained(drawn: &[f64]) -> Trained {
        let control = |control: &Control| {
            json!({"name": control.name, "held_out_sampled": 0.5, "held_out_greedy": 0.6, "steps": drawn.len(), "rollouts": 9,
                "tokens": 8, "sampled_tokens": drawn.last(), "seconds": 1.5})
        };
        let steps = CONTROLS.iter().flat_map(|control| {
            let step = |tokens: &f64| {
                let scalars = json!({"sampled_tokens_total": tokens, "reward_mean": tokens / 1e3});
                json!({"stage": control.name, "scalars": scalars})
            };
            drawn.iter().map(step).collect::<Vec<_>>()
        });
        Trained {
            result: json!({"stages": [{"name": "sft", "held_out_sampled": 0.3}],
                "controls": CONTROLS.iter().map(control).collect::<Vec<_>>()}),
            metrics: steps.collect(),
            plugin_share: None,
        }
    }

    fn broken(drawn: &[f64]) -> (String, Vec<String>) {
        let mut promises = Promises::default();
        table(&[(0, trained(drawn)), (1, trained(drawn))], 250, &mut promises).unwrap();
        (promises.table, promises.broken)
    }

    #[test]
    fn a_control_that_drew_too_little_or_went_on_too_long_breaks_a_promise() {
        let (table, found) = broken(&[100.0, 200.0, 300.0]);
        assert!(found.is_empty(), "{found:?}");
        assert!(table.contains("| ppo | 1 | 0.300 | 0.500 | 0.600 | 3 | 9 | 300 | 8 | 2 |"), "{table}");
        assert_eq!(table.lines().filter(|line| line.contains("**0.500**")).count(), CONTROLS.len());
        let too_few = broken(&[100.0, 200.0]).1;
        assert!(too_few.len() == 8 && too_few[0].contains("at least"), "{too_few:?}");
        let too_many = broken(&[100.0, 300.0, 400.0]).1;
        assert!(too_many.len() == 8 && too_many[0].contains("before the last step"), "{too_many:?}");
        assert!(broken(&[]).1.iter().all(|text| text.ends_with("missing")));
    }

    #[test]
    fn controls_have_the_settings_of_the_stage_and_end_by_tokens() {
        let text = "[[stage]]\nname = 'sft'\n[[stage]]\nname = 'grpo'\nalgorithm = '/grpo.wasm'\ndataset = 'd'\n\
                    config = { steps = 160, group_size = 8, learning_rate = 2e-4 }";
        let mut config: toml::Table = text.parse().unwrap();
        change(&mut config, 250);
        let found = config["control"].as_array().unwrap();
        let of = |key: &str| found.iter().map(|one| one["config"][key].as_integer()).collect::<Vec<_>>();
        assert_eq!(of("group_size"), [Some(8), Some(8), Some(1), Some(4)]);
        assert!(of("steps").iter().all(|steps| *steps == Some(STEPS)));
        assert!(found.iter().all(|one| one["sampled_tokens_max"].as_integer() == Some(250)));
        assert!(found.iter().all(|one| one["config"]["learning_rate"].as_float() == Some(2e-4)));
    }

    #[test]
    fn a_curve_is_reward_by_tokens() {
        let curves = curves_of(&[&trained(&[100.0, 200.0])]);
        assert_eq!(curves.len(), CONTROLS.len());
        assert_eq!(curves[3].runs, [vec![(100.0, 0.1), (200.0, 0.2)]]);
    }
}
