//! `cargo xtask learn`: does it learn, with every seed, and does it learn nothing where there is nothing to learn?

mod algorithms;
mod comparison;
mod controls;
mod curves;
mod stale;

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::example::{self, Example, ExampleName};
use controls::{PluginShare, check_plugin_time};

/// What is trained for which table. All of them are started from SFT once for each seed, and what was stopped goes on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Table {
    /// `examples/rooms` as it is, and its controls.
    #[default]
    Example,
    /// Every algorithm plugin: 50 updates, on real and on shuffled rewards (with 2 cores about 25 min for each seed).
    Algorithms,
    /// GRPO, RLOO, PPO and Tree-GRPO on the word problems of `examples/calc`, at equal sampled tokens (15 min for each seed).
    Comparison,
    /// GRPO on rollouts that are 2 and 8 steps old, with and without corrections (7 min for each seed).
    Stale,
}

/// Options of `learn`.
#[derive(Debug, Args)]
pub(crate) struct LearnArguments {
    /// Which table is made.
    #[arg(value_enum, default_value_t)]
    table: Table,
    /// Seeds to train with.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1, 2])]
    seeds: Vec<u64>,
    /// Leave out the controls of `example`, with shuffled rewards and with learning rate 0.
    #[arg(long)]
    no_controls: bool,
    /// Tokens that the rollouts of each plugin of `comparison` draw.
    #[arg(long, default_value_t = comparison::SAMPLED_TOKENS_MAX, value_parser = clap::value_parser!(u64).range(1..))]
    sampled_tokens_max: u64,
}

/// Steps of GRPO on shuffled rewards.
const SHUFFLED_STEPS: i64 = 50;
/// Steps of GRPO with learning rate 0.
const FROZEN_STEPS: i64 = 5;

/// What is promised, with the numbers it is promised for.
#[derive(Debug, Default)]
struct Promises {
    table: String,
    /// Lines behind the table.
    lines: Vec<String>,
    broken: Vec<String>,
}

impl Promises {
    fn check(&mut self, what: &str, value: Option<f64>, holds: impl Fn(f64) -> bool) {
        match value {
            Some(value) if holds(value) => {}
            Some(value) => self.broken.push(format!("{what} is {value:.3}")),
            None => self.broken.push(format!("{what} is missing")),
        }
    }
}

/// Trains with all seeds and all controls, prints the table and returns whether all promises hold.
pub(crate) fn run(arguments: &LearnArguments) -> anyhow::Result<bool> {
    let is_calc = arguments.table == Table::Comparison;
    let example = Example::build(if is_calc { ExampleName::Calc } else { ExampleName::Rooms })?;
    let folder = example.scratch("learn");
    let mut promises = Promises::default();
    let (seeds, promised) = (&arguments.seeds, &mut promises);
    match arguments.table {
        Table::Example => whole_example(&example, arguments, &folder, promised)?,
        Table::Algorithms => algorithms::run(&example, seeds, &folder, promised)?,
        Table::Comparison => comparison::run(&example, seeds, arguments.sampled_tokens_max, &folder, promised)?,
        Table::Stale => stale::run(&example, seeds, &folder, promised)?,
    }
    for line in std::mem::take(&mut promises.lines) {
        writeln!(promises.table, "\n{line}")?;
    }
    let name = arguments.table.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
    let file = folder.join(format!("{name}.md"));
    std::fs::write(&file, &promises.table).with_context(|| format!("cannot write `{}`", file.display()))?;
    println!("\n{}\nthe table is in {}", promises.table, file.display());
    for broken in &promises.broken {
        println!("BROKEN: {broken}");
    }
    println!("{}", if promises.broken.is_empty() { "PASS: every promise holds" } else { "FAIL" });
    Ok(promises.broken.is_empty())
}

/// The example with all seeds, and its controls.
fn whole_example(
    example: &Example,
    arguments: &LearnArguments,
    folder: &Path,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    promises.table.push_str("| run | row | sampled | greedy | malformed | steps | seconds | rollouts | tokens |\n");
    promises.table.push_str("|---|---|---|---|---|---|---|---|---|\n");
    for seed in &arguments.seeds {
        println!("==> seed {seed}");
        let run = folder.join(format!("seed{seed}"));
        let result = example.result(&example.config(), *seed, &run)?;
        check_plugin_time(&format!("seed {seed}"), PluginShare::of_run(&run)?, promises);
        learned(&format!("seed {seed}"), &result, promises)?;
    }
    if !arguments.no_controls {
        shuffled(example, promises)?;
        frozen(example, promises)?;
    }
    Ok(())
}

/// A whole run of the example.
fn learned(name: &str, result: &Value, promises: &mut Promises) -> anyhow::Result<()> {
    rows(name, result, &mut promises.table)?;
    let sampled = |row: &str| number(result, row, "held_out_sampled");
    promises.check(&format!("{name}: reward after sft (at most 0.45)"), sampled("sft"), |v| v <= 0.45);
    promises.check(&format!("{name}: malformed after sft (at most 0.02)"), number(result, "sft", "malformed"), |v| {
        v <= 0.02
    });
    promises.check(&format!("{name}: reward after grpo (at least 0.85)"), sampled("grpo"), |v| v >= 0.85);
    let greedy = number(result, "grpo", "held_out_greedy");
    promises.check(&format!("{name}: greedy reward after grpo (at least 0.87)"), greedy, |v| v >= 0.87);
    promises.check(&format!("{name}: updates of grpo (at most 250)"), number(result, "grpo", "steps"), |v| v <= 250.0);
    promises.check(&format!("{name}: uniform choice (at most 0.35)"), sampled("uniform"), |v| v <= 0.35);
    promises.check(&format!("{name}: always the first (at most 0.35)"), sampled("always-first"), |v| v <= 0.35);
    promises.check(&format!("{name}: supervised control (at most 0.60)"), sampled("sft-only"), |v| v <= 0.60);
    let seconds = result.get("training_seconds").and_then(Value::as_f64);
    promises.check(&format!("{name}: seconds of training (at most 480)"), seconds, |v| v <= 480.0);
    Ok(())
}

/// Rewards that belong to other rollouts: nothing can be learned from them.
fn shuffled(example: &Example, promises: &mut Promises) -> anyhow::Result<()> {
    println!("==> shuffled rewards");
    let result = variant(example, "shuffled", |config| {
        config.insert(
            "experiment".to_owned(),
            toml::Table::from_iter([("shuffle_rewards".to_owned(), true.into())]).into(),
        );
        if let Some(grpo) = example::stage(config, "grpo") {
            grpo.insert("steps".to_owned(), SHUFFLED_STEPS.into());
        }
    })?;
    rows("shuffled", &result, &mut promises.table)?;
    let sampled = |row: &str| number(&result, row, "held_out_sampled");
    let rise = sampled("grpo").zip(sampled("sft")).map(|(after, before)| after - before);
    promises.check("rise of the reward on shuffled rewards (at most 0.05)", rise, |rise| rise <= 0.05);
    Ok(())
}

/// Learning rate 0: the weights stay byte for byte.
fn frozen(example: &Example, promises: &mut Promises) -> anyhow::Result<()> {
    println!("==> learning rate 0");
    let result = variant(example, "frozen", |config| {
        if let Some(grpo) = example::stage(config, "grpo") {
            grpo.insert("steps".to_owned(), FROZEN_STEPS.into());
            grpo.insert("learning_rate".to_owned(), 0.0.into());
        }
    })?;
    rows("frozen", &result, &mut promises.table)?;
    let weights = |row: &str| find(&result, row)?.get("weights")?.as_str().map(str::to_owned);
    if weights("sft").is_none() || weights("sft") != weights("grpo") {
        promises.broken.push("learning rate 0 has changed the weights".to_owned());
    }
    Ok(())
}

/// Trains a variant without controls.
fn variant(example: &Example, name: &str, change: impl FnOnce(&mut toml::Table)) -> anyhow::Result<Value> {
    let folder = example.scratch("learn");
    let config = folder.join(format!("{name}.toml"));
    example.variant(&config, |config| {
        config.remove("control");
        config.remove("baseline");
        change(config);
    })?;
    example.result(&config, 0, &folder.join(name))
}

/// All rows of a result: the random weights, stages, controls, baselines.
fn all(result: &Value) -> impl Iterator<Item = &Value> {
    let lists =
        ["stages", "controls", "baselines"].into_iter().filter_map(|list| result.get(list)?.as_array()).flatten();
    result.get("initial").filter(|initial| initial.is_object()).into_iter().chain(lists)
}

fn find<'a>(result: &'a Value, row: &str) -> Option<&'a Value> {
    all(result).find(|report| report.get("name").and_then(Value::as_str) == Some(row))
}

fn number(result: &Value, row: &str, field: &str) -> Option<f64> {
    find(result, row)?.get(field)?.as_f64()
}

fn rows(run: &str, result: &Value, table: &mut String) -> anyhow::Result<()> {
    for report in all(result) {
        let number = |field: &str| report.get(field).and_then(Value::as_f64).unwrap_or(f64::NAN);
        writeln!(
            table,
            "| {run} | {} | {:.3} | {:.3} | {:.3} | {} | {:.0} | {} | {} |",
            report.get("name").and_then(Value::as_str).unwrap_or("?"),
            number("held_out_sampled"),
            number("held_out_greedy"),
            number("malformed"),
            number("steps"),
            number("seconds"),
            number("rollouts"),
            number("tokens"),
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(after: f64) -> Value {
        let row = |name: &str, sampled: f64| {
            serde_json::json!({"name": name, "held_out_sampled": sampled, "held_out_greedy": sampled + 0.03,
                "malformed": 0.01, "steps": 240, "seconds": 100.0, "rollouts": 1, "tokens": 1})
        };
        serde_json::json!({
            "training_seconds": 200.0, "initial": row("initial", 0.0),
            "stages": [row("sft", 0.4), row("grpo", after)], "controls": [row("sft-only", 0.5)],
            "baselines": [row("uniform", 0.3), row("always-first", 0.3), row("oracle", 1.0)],
        })
    }

    fn broken(result: &Value) -> Vec<String> {
        let mut promises = Promises::default();
        learned("x", result, &mut promises).unwrap();
        assert_eq!(promises.table.lines().count(), all(result).count());
        promises.broken
    }

    #[test]
    fn broken_promises_are_named_and_missing_numbers_break_one() {
        assert!(broken(&result(0.9)).is_empty());
        let found = broken(&result(0.8));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("after grpo"));
        let mut incomplete = result(0.9);
        incomplete["controls"] = serde_json::json!([]);
        assert!(broken(&incomplete)[0].contains("missing"));
    }
}
