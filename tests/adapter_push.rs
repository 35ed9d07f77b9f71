//! A run that trains an adapter here while a server draws its rollouts: what the server is given and asked, what is recorded,
//! and how a run ends whose adapter is not taken.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "model_server.rs"]
mod model_server;
#[path = "support.rs"]
mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use model_server::{Heard, ModelServer, Reply, models, vllm_answer};
use serde_json::json;
use support::{Bench, Finished, root};

const ROLLOUTS: usize = 4;

/// A server that takes adapters as vLLM does: it looks at their folder, and knows those that it has by their names.
fn server(refuse: impl Fn(usize) -> Option<Reply> + Send + Sync + 'static) -> ModelServer {
    let loaded: Arc<Mutex<(BTreeSet<String>, usize)>> = Arc::default();
    ModelServer::start(move |_, heard| {
        let name = |field: &str| heard.body[field].as_str().unwrap().to_owned();
        let wrong = |status, text: &str| Reply::Answer(status, "", json!({"error": {"message": text}}).to_string());
        let mut state = loaded.lock().unwrap();
        if heard.asks_for("/v1/models") {
            return Reply::ok(&models("vllm"));
        }
        if heard.asks_for("/v1/load_lora_adapter") {
            state.1 += 1;
            if let Some(reply) = refuse(state.1) {
                return reply;
            }
            let path = name("lora_path");
            let folder = Path::new(&path);
            if !["adapter_config.json", "adapter_model.safetensors"].iter().all(|file| folder.join(file).is_file()) {
                return wrong(404, "no adapter there");
            }
            let is_new = state.0.insert(name("lora_name"));
            return if is_new {
                Reply::Answer(200, "", "Success".to_owned())
            } else {
                wrong(400, "has already been loaded")
            };
        }
        if heard.asks_for("/v1/unload_lora_adapter") {
            let was_there = state.0.remove(&name("lora_name"));
            return if was_there {
                Reply::Answer(200, "", "Success".to_owned())
            } else {
                wrong(404, "cannot be found")
            };
        }
        if !state.0.contains(&name("model")) {
            return wrong(404, "the model does not exist");
        }
        book(heard)
    })
}

/// Asks for the tool, and then books the first free room or, by the request's seed, none that there is.
fn book(heard: &Heard) -> Reply {
    let messages = heard.body["messages"].as_array().unwrap();
    let last = messages.last().unwrap();
    let content = last["content"].as_str().unwrap();
    if last["role"] == "tool" {
        let is_even = heard.body["seed"].as_u64().unwrap().is_multiple_of(2);
        return Reply::ok(&vllm_answer(if is_even { &content[..3] } else { "R00" }));
    }
    let colon = content.find(':').unwrap();
    let arguments = json!({"time": content[colon - 2..colon + 3]}).to_string();
    let mut answer = vllm_answer("");
    answer["choices"][0]["message"] = json!({"role": "assistant", "content": null, "tool_calls": [
        {"id": "chatcmpl-tool-1", "type": "function", "function": {"name": "free_rooms", "arguments": arguments}}]});
    answer["choices"][0]["finish_reason"] = json!("tool_calls");
    Reply::ok(&answer)
}

/// The example over a folder's model, drawn by a server.
fn bench(server: &ModelServer) -> Bench {
    let bench = Bench::with_items(20, 20, ROLLOUTS);
    let from = root().join("tests/parity/fixtures/qwen2");
    std::fs::create_dir(bench.path().join("model")).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, bench.path().join("model").join(path.file_name().unwrap())).unwrap();
    }
    let config = bench.read("run.toml");
    let (head, rest) = config.split_once("[policy.local.tokenizer]").unwrap();
    let (_, rest) = rest.split_once("[rollout.sampling]").unwrap();
    let policy = format!(
        r#"
[policy.local.model]
directory = "model"
[policy.local.lora]
rank = 4
alpha = 8.0
[policy.endpoint]
url = "{}"
model = "m"
server = "vllm"
allow_private = ["127.0.0.1"]
backoff_ms = 1
[policy.endpoint.adapter_push]
directory = "pushed"
[rollout.sampling]"#,
        server.url()
    );
    bench.write("run.toml", &format!("{head}{policy}{rest}"));
    let rollouts = format!("sampled_rollouts = {ROLLOUTS}\ngreedy_rollouts = {ROLLOUTS}");
    bench.replace("sampled_rollouts = 24\ngreedy_rollouts = 24", &rollouts);
    bench.replace("steps = 6\nbatch_size = 16", "steps = 2\nbatch_size = 4");
    bench.replace("steps = 5\ngroups_per_step = 4", "steps = 3\ngroups_per_step = 4");
    bench
}

fn train(bench: &Bench, more: &[&str]) -> Finished {
    bench.run(&[["train", "run.toml", "--run", "a", "--output", "json"].as_slice(), more].concat())
}

/// Names that the server was given, in order, and that it was to forget.
fn names(server: &ModelServer, path: &str) -> Vec<String> {
    let heard = server.heard();
    let of_path = heard.iter().filter(|heard| heard.asks_for(path));
    of_path.map(|heard| heard.body["lora_name"].as_str().unwrap().to_owned()).collect()
}

fn folders(bench: &Bench) -> BTreeSet<String> {
    let entries = std::fs::read_dir(bench.path().join("pushed")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_server_draws_with_the_newest_adapter_and_is_told_when_it_changes() {
    let server = server(|_| None);
    let bench = bench(&server);
    let finished = train(&bench, &[]);
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    let loaded = names(&server, "/load_lora_adapter");
    // The initial one, that of the demonstrations (not each of its two steps), and one after each update by reward.
    assert_eq!(loaded.len(), 2 + 3, "{loaded:?}");
    assert_eq!(loaded.iter().collect::<BTreeSet<_>>().len(), loaded.len());
    assert_eq!(names(&server, "/unload_lora_adapter"), loaded[..loaded.len() - 1]);
    let weights = finished.json()["stages"][1]["weights"].as_str().unwrap().to_owned();
    assert_eq!(loaded.last().unwrap(), &format!("small-seed7-{}", &weights[..16]));
    // The newest adapter and the one before it are there; what was pushed is what was trained.
    assert_eq!(folders(&bench), loaded[loaded.len() - 2..].iter().cloned().collect());
    let tensors = |folder: String| std::fs::read(bench.path().join(folder).join("adapter_model.safetensors")).unwrap();
    assert_eq!(tensors(format!("pushed/{}", loaded.last().unwrap())), tensors("a/policies/grpo".to_owned()));

    // Every rollout says which weights drew it.
    let version = |rollout: &str| -> Vec<u64> {
        let shown = bench.succeed(&["rollouts", "show", rollout, "--run", "a", "--output", "json"]).stdout;
        let parts = shown.split("\"policy_version\":").skip(1);
        parts.filter_map(|part| part.split([',', '}']).next()?.trim().parse().ok()).collect()
    };
    for (rollout, wanted) in [("eval-initial-sampled-00000-0000", 0), ("grpo-00000-0000", 2), ("grpo-00002-0000", 4)] {
        let found = version(rollout);
        assert!(found.len() >= 3 && found.iter().all(|version| *version == wanted), "{rollout}: {found:?}");
    }
}

#[test]
fn an_adapter_that_is_not_taken_stops_the_run_which_goes_on_later() {
    let refusal = json!({"error": {"message": "rank 4 is above --max-lora-rank 2"}}).to_string();
    let busy = Reply::Answer(503, "", "busy".to_owned());
    // The second push is tried again; the fourth is refused for good, once.
    let first = server(move |load| match load {
        2 => Some(busy.clone()),
        5 => Some(Reply::Answer(400, "", refusal.clone())),
        _ => None,
    });
    let bench = bench(&first);
    let finished = train(&bench, &[]);
    assert_eq!(finished.code, 1, "{}", finished.stderr);
    let loaded = names(&first, "/load_lora_adapter");
    assert_eq!((loaded.len(), &loaded[1]), (5, &loaded[2]));
    for text in ["policy.endpoint", &loaded[4], "--enable-lora", "--max-lora-rank 2", "pushed"] {
        assert!(finished.stderr.contains(text), "no {text:?} in\n{}", finished.stderr);
    }
    let finished = train(&bench, &["--resume"]);
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    let again = names(&first, "/load_lora_adapter").split_off(5);
    // What the first process left is taken away; the adapter that was refused is pushed again.
    let removed = names(&first, "/unload_lora_adapter");
    assert!(removed.contains(&loaded[3]), "{removed:?} {loaded:?} {again:?}");
    assert!(again.contains(&loaded[4]), "{again:?}");
    assert_eq!(folders(&bench).len(), 2);
}

#[test]
fn what_does_not_go_together_is_refused_by_name() {
    let server = server(|_| None);
    for (old, new, expected) in [
        ("[policy.endpoint.adapter_push]\ndirectory = \"pushed\"\n", "", ["policy.endpoint.adapter_push", "missing"]),
        ("[policy.local.lora]\nrank = 4\nalpha = 8.0\n", "", ["policy.local.lora", "missing"]),
        ("server = \"vllm\"", "server = \"sglang\"", ["policy.endpoint.server", "`vllm`"]),
        (
            "[policy.local.model]\ndirectory = \"model\"\n",
            "[policy.local.tokenizer]\ncorpus = [\"demonstrations\"]\n",
            ["policy.local.model.directory", "that the server has"],
        ),
    ] {
        let bench = bench(&server);
        bench.replace(old, new);
        let finished = train(&bench, &[]);
        assert_eq!(finished.code, 2, "{new}: {}", finished.stderr);
        for text in expected {
            assert!(finished.stderr.contains(text), "{new}: no {text:?} in\n{}", finished.stderr);
        }
    }
    assert!(server.heard().is_empty(), "a wrong config asks nobody");
}
