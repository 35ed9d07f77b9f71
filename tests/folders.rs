//! Hugging Face folders as policies, through the binary: made, trained on, written, and used again.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use std::path::Path;

use serde_json::Value;
use support::{Bench, root};

const TOKENIZER: &str = r#"[policy.local.tokenizer]
corpus = ["demonstrations"]
vocab_size = 384
atoms_pattern = 'R\d\d|\d\d:\d\d|\d+'
"#;

/// A bench with a copy of a fixture as `model`, on which its config trains.
fn bench(fixture: &str) -> Bench {
    let bench = Bench::new();
    let from = root().join("tests/parity/fixtures").join(fixture);
    let model = bench.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    bench.replace(TOKENIZER, "[policy.local.model]\ndirectory = \"model\"\ncontext_tokens_max = 1024\n");
    // A call of a tool takes more tokens here than with a tokenizer made for it.
    bench.replace("max_tokens = 32", "max_tokens = 48");
    bench.replace("sampled_rollouts = 24\ngreedy_rollouts = 24", "sampled_rollouts = 6\ngreedy_rollouts = 6");
    bench.replace("steps = 6\nbatch_size = 16", "steps = 3\nbatch_size = 4");
    bench.replace("steps = 5\ngroups_per_step = 4", "steps = 3\ngroups_per_step = 2");
    bench
}

fn weights(result: &Value, stage: usize) -> &str {
    result["stages"][stage]["weights"].as_str().unwrap()
}

/// The completions of a run's evaluation, as they were recorded.
fn completions(bench: &Bench, run: &str) -> Vec<String> {
    let shown = |index: usize| {
        let id = format!("eval-policy-sampled-00000-{index:04}");
        let text = bench.succeed(&["rollouts", "show", &id, "--run", run, "--output", "json"]).stdout;
        text.lines().filter(|line| line.contains("completion_ids")).map(completion_ids).collect::<String>()
    };
    (0..6).map(shown).collect()
}

/// What stands behind `completion_ids` up to its end.
fn completion_ids(line: &str) -> String {
    let parts = line.split("\"completion_ids\":").skip(1);
    parts.map(|part| part.split(']').next().unwrap_or_default()).collect()
}

#[test]
fn a_folder_is_trained_resumed_exported_and_used_again() {
    let bench = bench("qwen2");
    let whole = bench.succeed(&["train", "run.toml", "--run", "whole", "--output", "json"]).json();
    // Nothing is said of the second stage: random weights draw nothing that is rewarded, so it may have no gradient.
    assert_ne!(whole["initial"]["weights"], weights(&whole, 0));
    let pinned: Value = serde_json::from_str(&bench.read("whole/policy.json")).unwrap();
    assert_eq!(pinned["weights"], whole["initial"]["weights"]);
    for (number, lines) in [2, 4].into_iter().enumerate() {
        let run = format!("killed-{number}");
        bench.train_until(&run, lines);
        let resumed = bench.succeed(&["train", "run.toml", "--run", &run, "--resume", "--output", "json"]).json();
        assert_eq!(bench.read("whole/metrics.jsonl"), bench.read(&format!("{run}/metrics.jsonl")), "{run}");
        assert_eq!(weights(&whole, 1), weights(&resumed, 1), "{run}");
    }

    // The export is the policy: as a config's folder it draws the same tokens.
    let exported = bench.succeed(&[
        "policy",
        "export",
        "whole",
        "--to",
        "exported",
        "--shard-bytes-max",
        "100000",
        "--output",
        "json",
    ]);
    let exported = exported.json();
    assert!(exported["files"].as_u64().unwrap() > 1, "{exported}");
    bench.succeed(&["run", "run.toml", "--run", "restored", "--policy", "whole/policies/grpo"]);
    bench.replace("directory = \"model\"", "directory = \"exported\"");
    bench.succeed(&["run", "run.toml", "--run", "again"]);
    let (restored, again) = (completions(&bench, "restored"), completions(&bench, "again"));
    assert!(restored.iter().all(|ids| ids.len() > 20), "{restored:?}");
    assert_eq!(restored, again);
    let record: Value = serde_json::from_str(&bench.read("again/policy.json")).unwrap();
    assert_eq!(record["weights"].as_str().unwrap(), weights(&whole, 1));

    let refused = bench.run(&["policy", "export", "whole", "--to", "exported"]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(refused.stderr.contains("something already"), "{}", refused.stderr);
    let halves = bench.succeed(&["policy", "export", "whole/policies/sft", "--to", "halves", "--dtype", "bf16"]);
    assert!(halves.stdout.contains("bfloat16"), "{}", halves.stdout);
    let imported = bench.succeed(&["policy", "import", "halves", "--to", "imported", "--dtype", "f32"]);
    assert!(imported.stdout.contains("float32"), "{}", imported.stdout);
    let refused = bench.run(&["policy", "export", "model", "--to", "x"]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(refused.stderr.contains("neither a run nor a checkpoint"), "{}", refused.stderr);
}

/// The largest difference of two models' logits after one prompt.
fn apart(a: &Value, b: &Value) -> f64 {
    let numbers = |value: &Value| -> Vec<f64> {
        value["last_logits"].as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
    };
    numbers(a).iter().zip(numbers(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn an_adapter_is_exported_merged_and_gone_on_from() {
    let bench = bench("qwen2");
    let lora =
        "[policy.local.lora]\nrank = 4\nalpha = 6.0\ntargets = [\"q\", \"v\", \"down\"]\nadapters = [\"other\"]\n";
    bench.replace("[rollout.sampling]", &format!("{lora}[rollout.sampling]"));
    bench.replace("learning_rate = 1e-3", "learning_rate = 3e-2");
    let trained = bench.succeed(&["train", "run.toml", "--run", "a", "--output", "json"]).json();
    assert_ne!(trained["initial"]["weights"], weights(&trained, 0));

    bench.succeed(&["policy", "export", "a", "--to", "adapter"]);
    let tensors = |path: &str| std::fs::read(bench.path().join(path).join("adapter_model.safetensors")).unwrap();
    assert_eq!(tensors("adapter"), tensors("a/policies/grpo"));
    let settings: Value = serde_json::from_str(&bench.read("adapter/adapter_config.json")).unwrap();
    assert_eq!((&settings["r"], &settings["lora_alpha"]), (&4.into(), &6.0.into()));
    assert!(
        settings.as_object().unwrap().values().all(|value| !value.is_null()),
        "PEFT stumbles over nulls: {settings}"
    );
    assert!(settings["base_model_name_or_path"].as_str().unwrap().ends_with("/model"), "{settings}");
    bench.succeed(&["policy", "export", "a/policies/sft", "--adapter", "other", "--to", "other"]);
    assert_ne!(tensors("other"), tensors("adapter"));

    // A merged model says what base and adapter say together.
    bench.succeed(&["policy", "merge", "model", "adapter", "--to", "merged", "--dtype", "f32"]);
    bench.succeed(&["policy", "merge", "model", "a", "--to", "of-the-run", "--dtype", "f32"]);
    let weights_of = |name: &str| std::fs::read(bench.path().join(name).join("model.safetensors")).unwrap();
    assert_eq!(weights_of("merged"), weights_of("of-the-run"));
    bench.write("chat.json", r#"[{"role": "user", "content": "a room at 10:30"}]"#);
    let logits = |arguments: &[&str]| {
        let common = ["policy", "logits", "--messages", "chat.json", "--output", "json"];
        bench.succeed(&[common.as_slice(), arguments].concat()).json()
    };
    let (base, merged) = (logits(&["model"]), logits(&["merged"]));
    let adapted = logits(&["model", "--adapter", "adapter"]);
    let (difference, moved) = (apart(&merged, &adapted), apart(&base, &adapted));
    println!("merged against adapted {difference:.1e}, base against adapted {moved:.1e}");
    assert!(difference < 1e-4 && moved > 1e-2, "{difference:e} {moved:e}");
    assert_eq!(adapted, logits(&["model", "--adapter", "a"]));

    // Another run begins where this one ended, to the last bit.
    bench.replace("rank = 4", "rank = 4\nadapter_directory = \"adapter\"");
    let continued = bench.succeed(&["train", "run.toml", "--run", "b", "--output", "json"]).json();
    assert_eq!(continued["initial"]["weights"].as_str(), Some(weights(&trained, 1)));
    assert_eq!(tensors("b/policies/initial"), tensors("adapter"));
    assert_ne!(tensors("b/policies/sft"), tensors("adapter"));

    let refused = |arguments: &[&str], texts: &[&str]| {
        let finished = bench.run(arguments);
        assert_eq!(finished.code, 2, "{}", finished.stderr);
        for text in texts {
            assert!(finished.stderr.contains(text), "{arguments:?}: no {text:?} in\n{}", finished.stderr);
        }
    };
    let export = |more: &[&'static str]| [["policy", "export", "a", "--to", "x"].as_slice(), more].concat();
    refused(&export(&["--adapter", "nobody"]), &["no adapter `nobody`", "[policy.local.lora]"]);
    refused(&export(&["--dtype", "bf16"]), &["float32"]);
    refused(&["policy", "merge", "model", "model", "--to", "x"], &["model/adapter_config.json"]);
    refused(&["policy", "merge", "merged", "adapter", "--to", "merged"], &["something already"]);
    bench.replace("rank = 4", "rank = 8");
    refused(&["train", "run.toml", "--run", "c"], &["`r` is 4 and `rank` of the config is 8"]);
    bench.replace("adapter_directory = \"adapter\"", "adapter_directory = \"model\"");
    let field = "policy.local.lora.adapter_directory";
    refused(&["train", "run.toml", "--run", "c"], &[field, "holds no adapter", "policy export"]);
}

#[test]
fn a_new_model_is_a_folder_that_can_be_trained_and_its_own_dialect_is_kept() {
    let bench = Bench::new();
    bench.replace("sampled_rollouts = 24\ngreedy_rollouts = 24", "sampled_rollouts = 6\ngreedy_rollouts = 6");
    bench.replace("steps = 6", "steps = 2");
    bench.replace("steps = 5", "steps = 1");
    let init = |to: &str, seed: &str| {
        let common = ["policy", "init", "--preset", "tiny", "--tokenizer-corpus", "demonstrations.jsonl"];
        let rest = ["--context-tokens", "256", "--to", to, "--seed", seed, "--output", "json"];
        bench.succeed(&[common.as_slice(), rest.as_slice()].concat()).json()
    };
    let (first, _, _) = (init("model", "1"), init("same", "1"), init("other", "2"));
    assert_eq!((&first["files"], &first["file_type"]), (&1.into(), &"f32".into()));
    let file = |name: &str| std::fs::read(bench.path().join(name).join("model.safetensors")).unwrap();
    assert!(file("model") == file("same") && file("model") != file("other"));
    bench.write("chat.json", r#"[{"role": "user", "content": "a room at 10:30"}]"#);
    let logits = |folder: &str| {
        bench
            .succeed(&["policy", "logits", folder, "--messages", "chat.json", "--greedy", "8", "--output", "json"])
            .json()
    };
    assert_eq!(logits("model"), logits("same"));

    bench.replace(TOKENIZER, "[policy.local.model]\ndirectory = \"model\"\n");
    let result = bench.succeed(&["train", "run.toml", "--run", "a", "--output", "json"]).json();
    assert_ne!(result["initial"]["weights"], weights(&result, 0));
    bench.succeed(&["policy", "export", "a", "--to", "trained"]);
    assert_ne!(logits("trained")["last_logits"], logits("model")["last_logits"]);
    assert_eq!(logits("trained")["prompt_ids"], logits("model")["prompt_ids"]);

    // A policy of a preset is exported with its own tokenizer.
    let own = Bench::new();
    own.replace("sampled_rollouts = 24\ngreedy_rollouts = 24", "sampled_rollouts = 2\ngreedy_rollouts = 2");
    own.replace("steps = 6", "steps = 2");
    own.replace("steps = 5", "steps = 1");
    own.succeed(&["train", "run.toml", "--run", "a"]);
    own.succeed(&["policy", "export", "a", "--to", "exported"]);
    let info = own.succeed(&["policy", "info", "exported", "--output", "json"]).json();
    // All bytes and control tokens, and at most what the config allows.
    let ids = info["token_ids"].as_u64().unwrap();
    assert!(info["chat_template"] == true && (256..=384).contains(&ids), "{info}");
}

#[test]
fn what_does_not_go_together_is_refused_by_name() {
    let cases = [
        (
            "directory = \"model\"",
            "directory = \"nowhere\"",
            vec!["policy.local.model.directory", "nowhere", "policy init"],
        ),
        (
            "directory = \"model\"",
            "directory = \"model\"\npreset = \"tiny\"",
            vec!["policy.local.model.preset", "remove"],
        ),
        ("directory = \"model\"", "directory = \"model\"\nlayers = 3", vec!["policy.local.model.layers", "remove"]),
        (
            "[rollout.sampling]",
            "[policy.local.tokenizer]\ncorpus = [\"rooms\"]\n[rollout.sampling]",
            vec!["policy.local.tokenizer", "has its own"],
        ),
        ("directory = \"model\"", "", vec!["policy.local.tokenizer", "missing", "corpus"]),
        ("context_tokens_max = 1024", "context_tokens_max = 4096", vec!["context_tokens_max", "4096", "2048"]),
    ];
    for (old, new, expected) in cases {
        let bench = bench("llama3");
        bench.replace(old, new);
        let finished = bench.run(&["train", "run.toml", "--run", "a"]);
        assert!(finished.code == 2 || finished.code == 1, "{new}: {}", finished.stderr);
        for text in expected {
            assert!(finished.stderr.contains(text), "{new}: no {text:?} in\n{}", finished.stderr);
        }
    }
}

#[test]
fn a_folder_that_has_changed_since_does_not_resume() {
    let bench = bench("qwen3");
    bench.replace("steps = 3\nbatch_size = 4", "steps = 1\nbatch_size = 2");
    bench.replace("steps = 3\ngroups_per_step = 2", "steps = 1\ngroups_per_step = 1");
    bench.succeed(&["train", "run.toml", "--run", "a"]);
    bench.succeed(&["train", "run.toml", "--run", "a", "--resume"]);
    let template = bench.read("model/chat_template.jinja");
    bench.write("model/chat_template.jinja", &format!("{template} "));
    let finished = bench.run(&["train", "run.toml", "--run", "a", "--resume"]);
    assert_eq!(finished.code, 2, "{}", finished.stderr);
    for text in ["chat template", "policy.json", "policy.local.model.directory"] {
        assert!(finished.stderr.contains(text), "no {text:?} in\n{}", finished.stderr);
    }
    bench.write("model/chat_template.jinja", &template);
    std::fs::remove_file(bench.path().join("model/model.safetensors")).unwrap();
    let finished = bench.run(&["train", "run.toml", "--run", "a", "--resume"]);
    assert_eq!(finished.code, 2, "{}", finished.stderr);
    assert!(finished.stderr.contains("model.safetensors"), "{}", finished.stderr);
    assert!(!Path::new("model").exists());
}

#[test]
fn every_command_says_how_it_is_used() {
    let bench = Bench::new();
    for (command, expected) in [
        ("import", ["--to <DIR>", "--dtype", "--shard-bytes-max", "directory = \"DIR\""]),
        ("init", ["--preset <PRESET>", "--tokenizer-corpus", "--seed", "- base:  Some 100 million parameters"]),
        ("export", ["--to <DIR>", "checkpoints/", "adapter_directory", "--adapter <NAME>"]),
        ("merge", ["<BASE> <ADAPTER>", "alpha / rank", "--to <DIR>", "--dtype"]),
    ] {
        let help = bench.succeed(&["policy", command, "--help"]).stdout;
        for text in expected.into_iter().chain(["Example:"]) {
            assert!(help.contains(text), "{command}: no {text:?} in\n{help}");
        }
    }
}
