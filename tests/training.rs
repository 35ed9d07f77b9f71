//! Whole training runs through the binary: determinism, resume after `kill -9`, controls, and what is left on disk.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use support::Bench;

#[test]
fn the_same_config_and_seed_give_the_same_bytes_and_another_seed_does_not() {
    let bench = Bench::new();
    let first = bench.succeed(&["train", "run.toml", "--run", "a", "--output", "json"]).json();
    let second = bench.succeed(&["train", "run.toml", "--run", "b", "--output", "json"]).json();
    assert_eq!(bench.read("a/metrics.jsonl"), bench.read("b/metrics.jsonl"));
    assert_eq!(weights(&first), weights(&second));
    bench.succeed(&["train", "run.toml", "--run", "c", "--seed", "8"]);
    assert_ne!(bench.read("a/metrics.jsonl"), bench.read("c/metrics.jsonl"));

    // What a user finds afterwards.
    for key in ["run", "seed", "held_out_before", "held_out_after", "stages"] {
        assert!(first.get(key).is_some(), "no {key} in {first}");
    }
    let stage = &first["stages"][1];
    for key in [
        "algorithm",
        "steps",
        "held_out_greedy",
        "held_out_sampled",
        "malformed",
        "seconds",
        "rollouts",
        "tokens",
        "failed",
    ] {
        assert!(stage.get(key).is_some(), "no {key} in {stage}");
    }
    assert_eq!((&stage["algorithm"], &stage["steps"], &stage["rollouts"]), (&"grpo".into(), &5.into(), &80.into()));
    assert_eq!(bench.read("a/metrics.jsonl").lines().count(), 11);
    assert_eq!(bench.read("a/timings.jsonl").lines().count(), 11);
    assert!(bench.read("a/reward.svg").contains("</svg>"));
    assert!(std::fs::read_dir(bench.path().join("a/tensorboard")).unwrap().count() == 1);
    assert!(bench.path().join("a/policies/grpo/model.safetensors").is_file());

    let list =
        bench.succeed(&["rollouts", "list", "--run", "a", "--stage", "grpo", "--limit", "3", "--output", "json"]);
    assert_eq!(list.stdout.lines().count(), 3);
    let show = bench.succeed(&["rollouts", "show", "grpo-00000-0000", "--run", "a"]).stdout;
    assert!(show.contains("llm call 0") && show.contains("outcome"), "{show}");
    let again = bench.run(&["train", "run.toml", "--run", "a"]);
    assert_eq!(again.code, 2);
    assert!(again.stderr.contains("--resume"), "{}", again.stderr);
}

#[test]
fn killed_at_any_moment_a_resumed_run_ends_where_an_uninterrupted_one_ends() {
    let bench = Bench::new();
    let whole = bench.succeed(&["train", "run.toml", "--run", "whole", "--output", "json"]).json();
    // Kills after this many lines of progress: in the initial evaluation, inside each stage, and behind them.
    for (number, lines) in [1, 3, 5, 7].into_iter().enumerate() {
        let run = format!("killed-{number}");
        bench.train_until(&run, lines);
        let resumed = bench.succeed(&["train", "run.toml", "--run", &run, "--resume", "--output", "json"]).json();
        assert_eq!(bench.read("whole/metrics.jsonl"), bench.read(&format!("{run}/metrics.jsonl")), "{run}");
        assert_eq!(weights(&whole), weights(&resumed), "{run}");
        assert_eq!(whole["held_out_after"], resumed["held_out_after"]);
        assert_eq!(whole["stages"][1]["held_out_sampled"], resumed["stages"][1]["held_out_sampled"]);
    }
}

#[test]
fn learning_rate_zero_leaves_the_weights_as_they_are() {
    let bench = Bench::new();
    bench.replace("learning_rate = 1e-3", "learning_rate = 0.0");
    bench.replace("learning_rate = 3e-4", "learning_rate = 0.0");
    let result = bench.succeed(&["train", "run.toml", "--run", "a", "--output", "json"]).json();
    assert_eq!(result["initial"]["weights"], result["stages"][0]["weights"]);
    assert_eq!(result["initial"]["weights"], result["stages"][1]["weights"]);
    let file = |name: &str| std::fs::read(bench.path().join(format!("a/policies/{name}/model.safetensors"))).unwrap();
    assert!(file("initial") == file("grpo"), "the files differ");
}

#[test]
fn ctrl_c_stops_cleanly_and_the_run_can_go_on() {
    let bench = Bench::new();
    bench.replace("steps = 5", "steps = 400");
    let mut child = bench
        .command(&["train", "run.toml", "--run", "a"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(stderr.any(|line| line.starts_with("grpo step 10")), "the second stage never came");
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let rest: Vec<String> = stderr.collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(rest.iter().any(|line| line.contains("--resume")), "{rest:?}");
    // Nothing was recorded as cancelled, so the resumed run sees what it would have seen.
    let list =
        bench.succeed(&["rollouts", "list", "--run", "a", "--stage", "grpo", "--limit", "100000", "--output", "json"]);
    assert!(!list.stdout.contains("\"cancelled\""));
    let kept = bench.read("a/metrics.jsonl");
    let mut child = bench
        .command(&["train", "run.toml", "--run", "a", "--resume"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(stderr.any(|line| line.starts_with("grpo step 20")), "the resumed run does not go on");
    child.kill().unwrap();
    child.wait().unwrap();
    let after = bench.read("a/metrics.jsonl");
    assert!(after.starts_with(&kept) || kept.starts_with(&after), "the resumed run went another way");
}

/// The bound is looked at between steps, and what was drawn is a part of the checkpoint.
#[test]
fn a_stage_ends_with_the_step_that_draws_the_last_of_its_tokens_also_when_it_is_resumed() {
    let bench = Bench::new();
    let steps = |run: &str| -> Vec<f64> {
        let rows = bench.read(&format!("{run}/metrics.jsonl"));
        let rows = rows.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let rows = rows.filter(|row| row["stage"] == "grpo");
        rows.map(|row| row["scalars"]["sampled_tokens_total"].as_f64().unwrap()).collect()
    };
    bench.succeed(&["train", "run.toml", "--run", "unbounded"]);
    let drawn = steps("unbounded");
    assert_eq!(drawn.len(), 5);
    assert!(drawn[0] > 0.0 && drawn.is_sorted(), "{drawn:?}");

    // One more than three steps draw.
    let most = format!("dataset = \"rooms\"\nsampled_tokens_max = {}\n[stage.config]\nsteps = 5", drawn[2] + 1.0);
    bench.replace("dataset = \"rooms\"\n[stage.config]\nsteps = 5", &most);
    let whole = bench.succeed(&["train", "run.toml", "--run", "bounded", "--output", "json"]).json();
    assert_eq!(steps("bounded"), drawn[..4]);
    let report = &whole["stages"][1];
    assert_eq!((report["steps"].as_f64(), report["sampled_tokens"].as_f64()), (Some(4.0), Some(drawn[3])));

    bench.train_until("killed", 7);
    let resumed = bench.succeed(&["train", "run.toml", "--run", "killed", "--resume", "--output", "json"]).json();
    assert_eq!(steps("killed"), drawn[..4]);
    assert_eq!(weights(&whole), weights(&resumed));
}

fn weights(result: &serde_json::Value) -> String {
    let weights = result["stages"][1]["weights"].as_str().unwrap_or_default().to_owned();
    assert_eq!(weights.len(), 64);
    weights
}
