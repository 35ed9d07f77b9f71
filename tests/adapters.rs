//! Adapters and the critic through the binary: a whole run with low-rank adapters, and an algorithm that trains all models.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use serde_json::Value;
use support::{Bench, component};

const LORA: &str = "[policy.local.lora]\nrank = 4\nalpha = 8.0\n";

fn with(section: &str) -> Bench {
    let bench = Bench::with_items(60, 60, 8);
    bench.replace("[policy.local.tokenizer]", &format!("{section}\n[policy.local.tokenizer]"));
    bench
}

fn rows(bench: &Bench, run: &str) -> Vec<Value> {
    let text = bench.read(&format!("{run}/metrics.jsonl"));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_run_with_adapters_repeats_and_keeps_no_copy_of_the_base() {
    let bench = with(LORA);
    bench.replace(
        "learning_rate = 3e-4",
        "learning_rate = 3e-4\nkl_coefficient = 0.01\nentropy_coefficient = 0.01\nschedule = \"cosine\"",
    );
    for run in ["a", "b"] {
        bench.succeed(&["train", "run.toml", "--run", run]);
    }
    assert_eq!(bench.read("a/metrics.jsonl"), bench.read("b/metrics.jsonl"));
    let policy = |name: &str| bench.path().join("a/policies").join(name);
    let adapter = |name: &str| std::fs::read(policy(name).join("adapter_model.safetensors")).unwrap();
    assert!(adapter("initial") != adapter("sft") && adapter("sft") != adapter("grpo"));
    assert!(policy("grpo").join("adapter_config.json").is_file());
    assert!(!policy("grpo").join("model.safetensors").exists());
    // 4 layers, 7 projections of ranks 4: a twentieth of the base's 3.4 MB.
    assert!(adapter("grpo").len() < 300_000, "{}", adapter("grpo").len());
    let rates: Vec<f64> = rows(&bench, "a").iter().filter_map(|row| row["scalars"]["learning_rate"].as_f64()).collect();
    assert!((rates[6] - 3e-4).abs() < 1e-12 && rates[10] < 1e-12, "{rates:?}");

    bench.replace("rank = 4", "rank = 0");
    let refused = bench.run(&["train", "run.toml", "--run", "c"]);
    assert_ne!(refused.code, 0);
    assert!(refused.stderr.contains("lora.rank"), "{}", refused.stderr);
}

/// Turns the run into one stage of the algorithm that trains all models.
fn nasty(section: &str) -> Bench {
    let bench = with(section);
    let config = bench.read("run.toml");
    let (head, _) = config.split_once("[[stage]]").unwrap();
    let stage = format!(
        "[[stage]]\nname = \"all\"\nalgorithm = \"{}\"\ndataset = \"rooms\"\n[stage.config]\nbehaviour = \"critic\"\nsteps = 2\n",
        component("nasty_algorithm")
    );
    bench.write("run.toml", &format!("{head}{stage}").replace("every_steps = 2", "every_steps = 1"));
    bench
}

#[test]
fn an_algorithm_trains_critic_entropy_and_a_named_adapter() {
    let bench = nasty(&format!("{LORA}adapters = [\"other\"]\n[policy.local.critic]\n"));
    bench.succeed(&["train", "run.toml", "--run", "a"]);
    let rows = rows(&bench, "a");
    let number = |step: usize, name: &str| {
        rows[step]["scalars"][name].as_f64().unwrap_or_else(|| panic!("{name} in {}", rows[step]))
    };
    // It starts at 0, half a unit off everywhere, and the second step goes on where the first ended.
    assert!((number(0, "distance_first") - 0.25).abs() < 1e-6);
    assert!(number(0, "distance_last") < 0.1 * number(0, "distance_first"), "{}", rows[0]);
    assert!(number(1, "distance_first") < 0.1, "{}", rows[1]);
    assert!(number(0, "entropy_after") < number(0, "entropy_before"));
    assert!((number(0, "version") - 1.0).abs() < 1e-9 && number(0, "other_gain") > 0.0);
    let notes = rows[0]["notes"].to_string();
    for (what, answer) in [
        ("values-of-policy", "log-probs and entropies only"),
        ("too-few-values", "sampled tokens and 1 derivatives"),
        ("entropies-of-critic", "values only"),
        ("loss-of-critic", "a critic has no `forward-backward`"),
        ("unknown-adapter", "there is no adapter `nobody`"),
    ] {
        assert!(notes.contains(what) && notes.contains(answer), "{what}: {notes}");
    }
    let checkpoints = bench.path().join("a/checkpoints");
    let newest = std::fs::read_dir(checkpoints).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    assert!(newest.join("critic/model.safetensors").is_file() && newest.join("adapters/other").is_dir());
}

#[test]
fn a_critic_that_the_config_does_not_offer_is_refused_with_the_line_that_would() {
    let bench = nasty("");
    let refused = bench.run(&["train", "run.toml", "--run", "a"]);
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    assert!(refused.stderr.contains("[policy.local.critic]"), "{}", refused.stderr);
}
