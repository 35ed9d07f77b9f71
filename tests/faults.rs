//! Algorithms that fail in the middle of a run: the run stops and names plugin, version and step, nothing of the failed step
//! is kept, and with a mended component it goes on from the last checkpoint to where it would have come without the fault.
//! And an algorithm with a formula of its own, on the real model.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use serde_json::Value;
use support::{Bench, component};

/// The step with the fault: checkpoints are made after every other one.
const FROM_STEP: u64 = 3;

/// A run of one stage with a component of its own folder.
fn bench(settings: &str) -> Bench {
    let bench = Bench::with_items(40, 40, 8);
    let config = bench.read("run.toml");
    let (head, _) = config.split_once("[[stage]]").unwrap();
    let head = head.replace("sampled_rollouts = 24", "sampled_rollouts = 8");
    let head = head.replace("greedy_rollouts = 24", "greedy_rollouts = 8");
    let stage = format!(
        "[limits]\nalgorithm_step_cpu_ms_max = 300\n[[stage]]\nname = \"all\"\nalgorithm = \"algorithm.wasm\"\n\
         dataset = \"rooms\"\n[stage.config]\n{settings}"
    );
    bench.write("run.toml", &format!("{head}{stage}"));
    bench
}

fn install(bench: &Bench, name: &str) {
    std::fs::copy(component(name), bench.path().join("algorithm.wasm")).unwrap();
}

/// The metrics of every step.
fn scalars(bench: &Bench, run: &str) -> Vec<Value> {
    let rows = bench.read(&format!("{run}/metrics.jsonl"));
    rows.lines().map(|row| serde_json::from_str::<Value>(row).unwrap()["scalars"].clone()).collect()
}

#[test]
fn a_plugin_that_fails_stops_the_run_and_a_mended_one_goes_on() {
    let settings = |behaviour: &str| format!("behaviour = \"{behaviour}\"\nfrom_step = {FROM_STEP}\nsteps = 5\n");
    for (behaviour, says) in [
        ("trap", "trapped"),
        ("loop", "algorithm_step_cpu_ms_max"),
        ("nan-weight", "finite"),
        ("nan-setting", "entropy_coefficient"),
        ("nan-derivative", "not finite"),
        ("nan-metric", "finite"),
        ("few-weights", "weights"),
        ("few-derivatives", "derivatives"),
        ("unknown-transition", "of-nobody"),
        ("unknown-anchor", "of-nobody"),
    ] {
        let bench = bench(&settings(behaviour));
        install(&bench, "nasty_algorithm");
        let failed = bench.run(&["train", "run.toml", "--run", "a"]);
        assert_eq!(failed.code, 1, "{behaviour}: {}", failed.stderr);
        for part in ["nasty 0.0.1", "stage `all`", &format!("step {FROM_STEP}"), says] {
            assert!(failed.stderr.contains(part), "{behaviour}: no {part} in {}", failed.stderr);
        }
        assert!(!bench.path().join("a/result.json").exists());

        // The component alone is another one: the config is the run's.
        install(&bench, "mended_algorithm");
        let resumed = bench.succeed(&["train", "run.toml", "--run", "a", "--resume", "--output", "json"]).json();
        let whole = bench.succeed(&["train", "run.toml", "--run", "whole", "--output", "json"]).json();
        assert_eq!(resumed["stages"][0]["weights"], whole["stages"][0]["weights"], "{behaviour}");
        assert_eq!(bench.read("a/metrics.jsonl"), bench.read("whole/metrics.jsonl"), "{behaviour}");
    }
}

/// The gradient of the host's loss minus that of the plugin's own formula, beside the former: nothing but rounding.
#[test]
fn a_loss_by_a_plugins_own_formula_has_the_gradient_of_the_hosts() {
    let bench = bench("steps = 2\ngroups = 6\ngroup_size = 4\nupdates = 3\nlearning_rate = 0.01\nalternates = true\n");
    bench.replace("algorithm_step_cpu_ms_max = 300\n", "");
    install(&bench, "own_formula");
    bench.succeed(&["train", "run.toml", "--run", "a"]);
    let steps = scalars(&bench, "a");
    assert_eq!(steps.len(), 2);
    let mut clipped = 0.0;
    for (step, update) in (0..2).flat_map(|step| (0..3).map(move |update| (step, update))) {
        let number = |name: &str| steps[step][&format!("{update}/{name}")].as_f64().unwrap();
        let (built_in, difference) = (number("built_in"), number("difference"));
        assert!(built_in > 1e-3, "step {step}, update {update}: no gradient to compare: {}", steps[step]);
        assert!(difference < 1e-5 * built_in, "step {step}, update {update}: {}", steps[step]);
        clipped += number("clipped");
    }
    assert!(clipped > 0.0, "no ratio was clipped: {steps:?}");
}
