//! Alarms through the binary: told on the terminal, in `metrics.jsonl` and in the result, and able to stop a run.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use serde_json::Value;
use support::Bench;

const DIFFERS: &str = "[[reward.term]]\nkind = \"format\"\npattern = '[0-9R]'\nsum_into = \"reward\"\n";

fn bench(alarms: &str) -> Bench {
    let bench = Bench::programmed(&[(r#""chat","chat""#, "{}"); 4], "", &format!("{DIFFERS}{alarms}"));
    bench.replace("\nsteps = 2", "\nsteps = 4");
    bench
}

fn notes(bench: &Bench, run: &str) -> Vec<(u64, String)> {
    let text = bench.read(&format!("{run}/metrics.jsonl"));
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let told = rows.flat_map(|row| {
        let step = row["step"].as_u64().unwrap();
        let notes = row["notes"].as_array().cloned().unwrap_or_default();
        notes.into_iter().map(move |note| (step, note.as_str().unwrap().to_owned()))
    });
    told.collect()
}

#[test]
fn a_warning_is_told_everywhere_and_stops_nothing() {
    let bench = bench("[[alarm]]\nmetric = \"host/response_tokens_mean\"\nabove = 0.5\nfor_steps = 3\n");
    let finished = bench.succeed(&["train", "run.toml", "--run", "run", "--output", "json"]);
    let told = notes(&bench, "run");
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].0 == 2 && told[0].1.starts_with("alarm: host/response_tokens_mean is "), "{told:?}");
    assert!(told[0].1.ends_with(", above 0.5 for 3 steps"), "{told:?}");
    assert!(finished.stderr.contains("alarm: grpo step 2: host/response_tokens_mean is "), "{}", finished.stderr);
    let alarms = &finished.json()["stages"][0]["alarms"];
    assert_eq!((&alarms[0]["step"], &alarms[0]["metric"]), (&2.into(), &"host/response_tokens_mean".into()));
    // The same run, killed and resumed, raises the same.
    bench.train_until("killed", 4);
    let resumed = bench.succeed(&["train", "run.toml", "--run", "killed", "--resume", "--output", "json"]);
    assert_eq!(notes(&bench, "killed"), told);
    assert_eq!(&resumed.json()["stages"][0]["alarms"], alarms);
}

#[test]
fn an_alarm_can_stop_a_run_behind_a_checkpoint() {
    let bench =
        bench("[[alarm]]\nmetric = \"host/response_tokens_mean\"\nabove = 0.5\nfor_steps = 2\naction = \"stop\"\n");
    let stopped = bench.run(&["train", "run.toml", "--run", "run"]);
    assert_eq!(stopped.code, 1);
    assert!(stopped.stderr.contains("stage `grpo`, step 1: the alarm on a metric stops the run"), "{}", stopped.stderr);
    assert!(stopped.stderr.contains("--resume"), "{}", stopped.stderr);
    assert_eq!(bench.read("run/metrics.jsonl").lines().count(), 2);
    // It goes on: the alarm has been raised, and the metric was never quiet since.
    let finished = bench.succeed(&["train", "run.toml", "--run", "run", "--resume"]);
    assert!(finished.stderr.contains("step 2 of the next"), "{}", finished.stderr);
    assert!(finished.stdout.contains("alarm: grpo step 1: host/response_tokens_mean"), "{}", finished.stdout);
    assert_eq!(bench.read("run/metrics.jsonl").lines().count(), 4);
}

#[test]
fn a_metric_that_nobody_can_write_is_refused_and_one_that_nobody_wrote_is_told() {
    let refused = bench("[[alarm]]\nmetric = \"host/entropies\"\nbelow = 1.0\n");
    let refused = refused.run(&["train", "run.toml", "--run", "run"]);
    assert_eq!(refused.code, 2);
    assert!(refused.stderr.contains("`alarm[0].metric`"), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("reward/DIMENSION, MODEL/NAME of a model beside the policy, clip_fraction"),
        "{}",
        refused.stderr
    );

    let quiet =
        bench("[[alarm]]\nmetric = \"no_such_metric\"\nbelow = 1.0\n[[alarm]]\nmetric = \"loss\"\nabove = 1e9\n");
    let finished = quiet.succeed(&["train", "run.toml", "--run", "run"]);
    let lines: Vec<&str> = finished.stderr.lines().filter(|line| line.contains("watched nothing")).collect();
    assert_eq!(lines, ["the alarm on `no_such_metric` watched nothing: no step of the run has that metric"]);
}
