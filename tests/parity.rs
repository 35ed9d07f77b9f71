//! Models of Hugging Face folders, through the binary and against what transformers computes: `tests/parity/make_fixtures.py`
//! writes the folders and their `expected.json`.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use support::{Finished, root};
use tempfile::TempDir;

fn fixtures() -> PathBuf {
    root().join("tests/parity/fixtures")
}

fn names() -> Vec<String> {
    let entries = std::fs::read_dir(fixtures()).unwrap().map(|entry| entry.unwrap().path());
    let mut names: Vec<_> = entries
        .filter(|path| path.is_dir())
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    names.sort_unstable();
    assert!(names.len() >= 7, "{names:?}");
    names
}

fn fulgurite(arguments: &[&str]) -> Finished {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_fulgurite"));
    command.args(arguments).current_dir(fixtures()).env("NO_COLOR", "1").env_remove("RUST_LOG");
    Finished::new(command.output().unwrap())
}

fn json_of(arguments: &[&str]) -> Value {
    let finished = fulgurite(arguments);
    assert_eq!(finished.code, 0, "{arguments:?}\n{}", finished.stderr);
    finished.json()
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

/// The largest difference of two lists.
fn difference(a: &Value, b: &Value) -> f64 {
    let (a, b) = (numbers(a), numbers(b));
    assert_eq!(a.len(), b.len());
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn relative(a: &Value, b: &Value) -> f64 {
    let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
    (a - b).abs() / b.abs()
}

#[test]
fn models_compute_what_transformers_computes() {
    let scratch = tempfile::tempdir().unwrap();
    for name in names() {
        let expected = read(&fixtures().join(&name).join("expected.json"));
        for (at, prompt) in expected["prompts"].as_array().unwrap().iter().enumerate() {
            let messages = scratch.path().join("messages.json");
            let conversation = json!({"messages": prompt["messages"], "tools": prompt["tools"]});
            std::fs::write(&messages, conversation.to_string()).unwrap();
            let greedy = prompt["tokens"].as_array().unwrap().len().to_string();
            let messages = messages.to_str().unwrap();
            let found =
                json_of(&["policy", "logits", &name, "--messages", messages, "--greedy", &greedy, "--output", "json"]);
            let case = format!("{name}, prompt {at}");
            assert_eq!(found["prompt_ids"], prompt["prompt_ids"], "{case}");
            assert_eq!(found["tokens"], prompt["tokens"], "{case}");
            let logits = difference(&found["last_logits"], &prompt["last_logits"]);
            let log_probs = difference(&found["logprobs"], &prompt["logprobs"]);
            let cross_entropy = relative(&found["cross_entropy"], &prompt["cross_entropy"]);
            let norm = relative(&found["grad_norm"], &prompt["grad_norm"]);
            println!("{case}: logits {logits:.1e}, log-probs {log_probs:.1e}, ce {cross_entropy:.1e}, norm {norm:.1e}");
            for (what, distance) in
                [("logits", logits), ("log-probs", log_probs), ("cross-entropy", cross_entropy), ("norm", norm)]
            {
                assert!(distance < 1e-4, "{case}: {what} are {distance:e} apart");
            }
        }
    }
}

#[test]
fn info_says_what_a_folder_holds_and_takes() {
    for name in names() {
        let info =
            json_of(&["policy", "info", &name, "--output", "json", "--rollouts", "2", "--context-tokens", "100"]);
        let expected = read(&fixtures().join(&name).join("expected.json"));
        assert_eq!(info["parameters"], expected["parameters"], "{name}");
        assert_eq!(info["model"]["end_tokens"], expected["end_tokens"], "{name}");
        let memory = |field: &str| info["memory"][field].as_u64().unwrap();
        assert_eq!(memory("weights_bytes"), 4 * expected["parameters"].as_u64().unwrap());
        assert_eq!(memory("kv_cache_bytes"), 200 * memory("kv_cache_token_bytes"));
        assert!(memory("training_bytes") > memory("generation_bytes") + 3 * memory("weights_bytes"));
    }
    let text = fulgurite(&["policy", "info", "llama3", "--rollouts", "2", "--threads", "2"]).stdout;
    // What is free differs from machine to machine.
    let rest = |line: &str| [", of ", ", more than ", ", free "].iter().find_map(|start| line.find(start));
    let text: Vec<_> = text.lines().map(|line| line.get(..rest(line).unwrap_or(line.len())).unwrap()).collect();
    insta::assert_snapshot!(text.join("\n"), @r"
    model          llama, 57664 parameters
    sizes          2 layers, width 64, 4 heads of 16 (2 for keys and values), feed-forward 32, output tied to the embedding
    with           rope stretched by 8 (llama3)
    context        2048 tokens
    tokens         311 ids, 320 rows; the end is 305 or 308 or 309
    chat template  yes
    files          float32 225.25 KiB in 1 safetensors
    memory         in float32
      weights      225.25 KiB, and 305.25 KiB packed for sampling
      kv cache     2.00 MiB: 512 B a token, 1.00 MiB a rollout of 2048 tokens, 2 rollouts
      trained      57664 parameters, 0 B beside the model
      packed       530.50 KiB for a batch
      gradient     1.76 MiB, 8 shards
      AdamW        450.50 KiB
      activations  7.62 MiB, estimated: 2 micro-batches of 512 tokens
      generation   2.52 MiB
      training     12.86 MiB
    ");
}

/// A copy of a fixture that can be broken.
struct Copy(TempDir);

impl Copy {
    fn of(name: &str) -> Self {
        let copy = Self(tempfile::tempdir().unwrap());
        for entry in std::fs::read_dir(fixtures().join(name)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, copy.0.path().join(path.file_name().unwrap())).unwrap();
        }
        copy
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn edit(&self, name: &str, old: &str, new: &str) {
        let text = std::fs::read_to_string(self.path(name)).unwrap();
        assert!(text.contains(old), "{name} has no {old:?}");
        std::fs::write(self.path(name), text.replace(old, new)).unwrap();
    }

    fn refused(&self, expected: &[&str]) {
        let finished = fulgurite(&["policy", "info", self.0.path().to_str().unwrap()]);
        assert_eq!(finished.code, 2, "{}", finished.stderr);
        assert!(finished.stdout.is_empty(), "{}", finished.stdout);
        for text in expected {
            assert!(finished.stderr.contains(text), "no {text:?} in\n{}", finished.stderr);
        }
    }
}

#[test]
fn folders_that_cannot_be_used_say_why() {
    let change = |old: &str, new: &str, expected: &[&str]| {
        let copy = Copy::of("qwen3");
        copy.edit("config.json", old, new);
        copy.refused(expected);
    };
    change("\"qwen3\"", "\"mamba\"", &["config.json", "`mamba`", "`llama`", "`qwen3`"]);
    change(
        "\"hidden_size\": 32",
        "\"hidden_size\": 48",
        &["model.safetensors", "another size", "[320, 32]", "[320, 48]"],
    );
    change("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", &["layer_types", "2 entries"]);
    change(
        "\"tie_word_embeddings\": false",
        "\"tie_word_embeddings\": 0",
        &["`tie_word_embeddings` is 0", "true or false"],
    );
    let fewer = ["model.safetensors", "`model.embed_tokens.weight` [320, ", "instead of [300, "];
    change("\"vocab_size\": 320", "\"vocab_size\": 300", &fewer);

    let copy = Copy::of("llama-sharded-f16");
    std::fs::remove_file(copy.path("model-00002-of-00003.safetensors")).unwrap();
    copy.refused(&["model.safetensors.index.json", "`model-00002-of-00003.safetensors` is missing"]);
    let copy = Copy::of("llama3");
    let whole = std::fs::read(copy.path("model.safetensors")).unwrap();
    std::fs::write(copy.path("model.safetensors"), &whole[..whole.len() / 2]).unwrap();
    copy.refused(&["model.safetensors", "not a whole safetensors file"]);
    std::fs::remove_file(copy.path("model.safetensors")).unwrap();
    copy.refused(&["neither model.safetensors nor"]);
    let copy = Copy::of("llama3");
    std::fs::remove_file(copy.path("tokenizer.json")).unwrap();
    copy.refused(&["tokenizer.json", "AutoTokenizer"]);
    let copy = Copy::of("llama3");
    std::fs::write(copy.path("chat_template.jinja"), "{% for %}").unwrap();
    copy.refused(&["chat_template.jinja", "chat template"]);
    std::fs::remove_file(copy.path("config.json")).unwrap();
    copy.refused(&["config.json", "save_pretrained"]);

    let finished = fulgurite(&["policy", "info", "nowhere"]);
    assert_eq!(finished.code, 2);
    assert!(finished.stderr.contains("nowhere") && finished.stderr.contains("not a folder"), "{}", finished.stderr);
    let finished = fulgurite(&["policy", "info", "llama3", "--context-tokens", "4096"]);
    assert_eq!(finished.code, 2);
    assert!(finished.stderr.contains("--context-tokens") && finished.stderr.contains("2048"), "{}", finished.stderr);
}

#[test]
fn conversations_that_cannot_be_used_say_why() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("chat.json");
    let refused = |text: &str, expected: &[&str]| {
        std::fs::write(&path, text).unwrap();
        let finished = fulgurite(&["policy", "logits", "mistral", "--messages", path.to_str().unwrap()]);
        assert_eq!(finished.code, 2, "{}", finished.stderr);
        for text in expected {
            assert!(finished.stderr.contains(text), "no {text:?} in\n{}", finished.stderr);
        }
    };
    refused("{", &["chat.json", "not JSON"]);
    refused("[]", &["chat.json", "`messages` is empty"]);
    refused(r#"[{"role": "critic", "content": "x"}]"#, &["unknown role critic"]);
    let long = json!([{"role": "user", "content": "Zoë ".repeat(2_000)}]).to_string();
    // Beyond the context the positions go on, as in transformers.
    std::fs::write(&path, long).unwrap();
    let finished = fulgurite(&["policy", "logits", "mistral", "--messages", path.to_str().unwrap()]);
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    assert!(
        finished.stderr.contains("warning: the prompt has") && finished.stderr.contains("2048"),
        "{}",
        finished.stderr
    );
    let greedy = usize::MAX.to_string();
    let finished =
        fulgurite(&["policy", "logits", "mistral", "--messages", path.to_str().unwrap(), "--greedy", &greedy]);
    assert_eq!(finished.code, 2);
    assert!(finished.stderr.contains("1048576"), "{}", finished.stderr);
    let finished = fulgurite(&["policy", "logits", "mistral", "--messages", "nowhere.json"]);
    assert_eq!(finished.code, 2);
    assert!(finished.stderr.contains("nowhere.json"), "{}", finished.stderr);
}

#[test]
fn logits_are_shown_to_people_too() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("chat.json");
    std::fs::write(&path, r#"[{"role": "user", "content": "A room for 4, please."}]"#).unwrap();
    let finished = fulgurite(&["policy", "logits", "qwen3", "--messages", path.to_str().unwrap(), "--greedy", "4"]);
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    for text in ["prompt", "next", "continuation", "cross_entropy", "grad_norm"] {
        assert!(finished.stdout.contains(text), "no {text:?} in\n{}", finished.stdout);
    }
}
