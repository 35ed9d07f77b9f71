//! Every policy gradient plugin through the binary, one after the other in one run: each of them finds something to train on,
//! and a run that is killed in any of them ends where an uninterrupted one ends.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use serde_json::Value;
use support::{Bench, component};

/// Steps of each stage.
const STEPS: usize = 2;

/// Name of a stage, its component, its config beside what all have, and a metric that it must have recorded above 0.
const STAGES: [(&str, &str, &str, &str); 11] = [
    ("reinforce", "reinforce", "", "gradient_norm"),
    (
        "reinforce-pp",
        "reinforce",
        "variant = \"reinforce-plus-plus\"\nkl_coefficient = 0.1\nkl_target = 0.01\nmini_batches = 2",
        "kl_coefficient",
    ),
    ("rloo", "rloo", "mini_batches = 2\nupdates_per_step = 2", "clip_fraction"),
    ("dapo", "grpo", "variant = \"dapo\"\noverlong_tokens_max = 32\noverlong_cache_tokens = 16", "resample_rounds"),
    ("gspo", "grpo", "variant = \"gspo\"\nmini_batches = 2\nupdates_per_step = 2", "clip_fraction"),
    ("curriculum", "grpo", "variant = \"cispo\"\n[control.config.curriculum]\neasy_weight = 0.0", "gradient_norm"),
    ("ppo", "ppo", "mini_batches = 2", "critic_gradient_norm"),
    ("gigpo", "step_credit", "", "anchored_share"),
    ("tree", "tree_grpo", "group_size = 2\nrounds = 2", "forks"),
    ("monte-carlo", "tree_grpo", "group_size = 4\nmethod = \"monte-carlo\"\nforks_per_state = 2", "estimates"),
    ("lagging", "grpo", "lag_steps = 1\nmini_batches = 2", "staleness_max"),
];

/// A run whose policy has learned enough that rewards differ, and from there on a stage of each.
fn bench() -> Bench {
    let bench = Bench::with_items(400, 4_000, 8);
    bench.replace("steps = 6\nbatch_size = 16", "steps = 220\nbatch_size = 64");
    bench.replace("sampled_rollouts = 24\ngreedy_rollouts = 24", "sampled_rollouts = 8\ngreedy_rollouts = 1");
    bench.replace("every_steps = 2", "every_steps = 1");
    bench.replace("[policy.local.tokenizer]", "[policy.local.critic]\n[policy.local.tokenizer]");
    let config = bench.read("run.toml");
    let (mut text, _) = config.split_once("[[stage]]\nname = \"grpo\"").map(|(a, b)| (a.to_owned(), b)).unwrap();
    for (name, plugin, config, _) in STAGES {
        let size = if config.contains("group_size") { "" } else { "group_size = 4\n" };
        writeln!(
            text,
            "[[control]]\nname = \"{name}\"\nalgorithm = \"{}\"\ndataset = \"rooms\"\nstart_from = \"sft\"\n\
             [control.config]\nsteps = {STEPS}\ngroups_per_step = 6\nlearning_rate = 1e-4\n{size}{config}\n",
            component(plugin)
        )
        .unwrap();
    }
    bench.write("run.toml", &text);
    bench
}

fn rows(bench: &Bench, run: &str) -> Vec<Value> {
    bench.read(&format!("{run}/metrics.jsonl")).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_plugin_trains_and_a_killed_run_ends_where_a_whole_one_ends() {
    let bench = bench();
    let whole = bench.succeed(&["train", "run.toml", "--run", "whole", "--output", "json"]).json();
    let rows = rows(&bench, "whole");
    for (place, (name, _, _, metric)) in STAGES.iter().enumerate() {
        let stage = &whole["controls"][place];
        assert_eq!((&stage["name"], &stage["failed"]), (&(*name).into(), &0.into()), "{stage}");
        let steps: Vec<&Value> = rows.iter().filter(|row| row["stage"] == *name).collect();
        assert_eq!(steps.len(), STEPS, "{name}");
        let most = steps.iter().filter_map(|row| row["scalars"][metric].as_f64()).fold(f64::NEG_INFINITY, f64::max);
        assert!(most > 0.0, "{name}: {metric} is {most} in {steps:?}");
        // What shows a collapse.
        for metric in ["reward_mean", "zero_variance_share", "excluded_share", "response_tokens"] {
            assert!(steps[0]["scalars"][metric].is_number(), "{name}: no {metric} in {}", steps[0]);
        }
        let trained = steps.iter().find(|row| row["scalars"]["loss"].is_number());
        let trained = trained.unwrap_or_else(|| panic!("{name} never trained: {steps:?}"));
        for metric in
            ["entropy", "kl", "clip_fraction", "ratio_max", "mismatch_mean", "gradient_norm", "trained_tokens"]
        {
            assert!(trained["scalars"][metric].is_number(), "{name}: no {metric} in {trained}");
        }
    }
    // What the first step of the last stage rolled out for the second was drawn before its two optimiser steps.
    let lagging: Vec<&Value> = rows.iter().filter(|row| row["stage"] == "lagging").map(|row| &row["scalars"]).collect();
    assert_eq!(
        (&lagging[0]["staleness_max"], &lagging[1]["staleness_max"]),
        (&Value::Null, &2.0.into()),
        "{lagging:?}"
    );
    assert_eq!((&lagging[0]["rollouts_total"], &lagging[1]["rollouts_total"]), (&48.0.into(), &48.0.into()));
    assert!(lagging[0]["correction_mean"].is_null() && lagging[1]["correction_mean"].is_number(), "{lagging:?}");
    // Killed in the midst of the critic's stage, in that of the forks, and with a batch that waits.
    kill_in(&bench, &["train", "run.toml", "--run", "killed"], "ppo");
    kill_in(&bench, &["train", "run.toml", "--run", "killed", "--resume"], "tree");
    kill_in(&bench, &["train", "run.toml", "--run", "killed", "--resume"], "lagging");
    let resumed = bench.succeed(&["train", "run.toml", "--run", "killed", "--resume", "--output", "json"]).json();
    assert_eq!(bench.read("whole/metrics.jsonl"), bench.read("killed/metrics.jsonl"));
    for place in 0..STAGES.len() {
        assert_eq!(whole["controls"][place]["weights"], resumed["controls"][place]["weights"]);
    }
}

/// Kills a run when the stage has made its first step.
fn kill_in(bench: &Bench, arguments: &[&str], stage: &str) {
    let mut child = bench.command(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.starts_with(&format!("{stage} step 0"))), "{stage} never came");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_plugin_says_which_key_is_wrong() {
    for (config, says) in [
        ("variant = \"dr-grpo\"", "{ constant = LENGTH }"),
        ("clip_hihg = 0.3", "clip_hihg"),
        ("correction = \"tis\"", "correction"),
    ] {
        let bench = Bench::with_items(40, 40, 8);
        bench.replace("group_size = 4", &format!("group_size = 4\n{config}"));
        let refused = bench.run(&["train", "run.toml", "--run", "a"]);
        assert_eq!(refused.code, 2);
        assert!(refused.stderr.contains(says) && refused.stderr.contains("grpo"), "{}", refused.stderr);
        // Before anything has run: the stage before it and the first evaluation took time for nothing otherwise.
        assert!(
            !refused.stderr.contains("held out") && !bench.path().join("a/config.toml").exists(),
            "{}",
            refused.stderr
        );
    }
}
