//! A server's model as the policy of a run, through the binary: rollouts, grades, records, replay, and what is told when the
//! server is not what the config says.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "model_server.rs"]
mod model_server;
#[path = "support.rs"]
mod support;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use model_server::{Heard, ModelServer, Reply, llama_cpp_answer, models, openai_answer, vllm_answer};
use serde_json::{Value, json};
use support::{Bench, Finished};

const KEY: &str = "s3cr3t-model-key-value";
const FIRST: &str = "eval-policy-sampled-00000-0000";
const ROLLOUTS: usize = 6;

/// Books the first free room: asks for the tool, then answers with what it said, in the dialect of `say`.
fn book(heard: &Heard, say: fn(&str) -> Value) -> Reply {
    let messages = heard.body["messages"].as_array().unwrap();
    let last = messages.last().unwrap();
    let content = last["content"].as_str().unwrap();
    if last["role"] == "tool" {
        let asked = &messages[messages.len() - 2]["tool_calls"][0];
        assert_eq!((&asked["id"], &last["tool_call_id"]), (&json!("call-0-0"), &json!("call-0-0")));
        return Reply::ok(&say(&content[..3]));
    }
    let colon = content.find(':').unwrap();
    let arguments = json!({"time": content[colon - 2..colon + 3]}).to_string();
    let mut answer = say("");
    answer["choices"][0]["message"] = json!({"role": "assistant", "content": null, "tool_calls": [
        {"id": "chatcmpl-tool-1", "type": "function", "function": {"name": "free_rooms", "arguments": arguments}}]});
    answer["choices"][0]["finish_reason"] = json!("tool_calls");
    Reply::ok(&answer)
}

/// A server that has the model and answers calls as it is told.
fn serving(call: impl Fn(&Heard) -> Reply + Send + Sync + 'static) -> ModelServer {
    ModelServer::start(move |_, heard| if heard.asks_for("/models") { Reply::ok(&models("vllm")) } else { call(heard) })
}

fn server(say: fn(&str) -> Value) -> ModelServer {
    serving(move |heard| book(heard, say))
}

/// The example with a server's model instead of its own.
fn bench(url: &str, more: &str) -> Bench {
    let bench = Bench::with_items(20, 20, ROLLOUTS);
    let config = bench.read("run.toml");
    let (head, _) = config.split_once("[dataset.demonstrations]").unwrap();
    let policy = format!(
        r#"
[policy.endpoint]
url = "{url}"
model = "m"
server = "vllm"
api_key_env = "MODEL_KEY"
allow_private = ["127.0.0.1"]
backoff_ms = 1
{more}
[evaluation]
dataset = "rooms"
sampled_rollouts = {ROLLOUTS}
greedy_rollouts = {ROLLOUTS}
"#
    );
    bench.write("run.toml", &format!("{head}{policy}"));
    bench
}

fn run(bench: &Bench, folder: &str) -> Finished {
    let mut command = bench.command(&["run", "run.toml", "--run", folder, "--output", "json"]);
    Finished::new(command.env("MODEL_KEY", KEY).output().unwrap())
}

/// Every completion of a recorded rollout.
fn completions(bench: &Bench, folder: &str, rollout: &str) -> Vec<Value> {
    fn search(value: &Value, found: &mut Vec<Value>) {
        match value {
            Value::Object(fields) if fields.contains_key("finish_reason") => found.push(value.clone()),
            Value::Object(fields) => fields.values().for_each(|value| search(value, found)),
            Value::Array(values) => values.iter().for_each(|value| search(value, found)),
            _ => {}
        }
    }
    let mut found = vec![];
    search(&bench.succeed(&["rollouts", "show", rollout, "--run", folder, "--output", "json"]).json(), &mut found);
    found
}

#[test]
fn rollouts_of_a_server_are_graded_recorded_with_ids_and_replayed_without_it() {
    let server = server(vllm_answer);
    let bench = bench(&server.url(), "");
    let finished = run(&bench, "a");
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    let sampled = &finished.json()["evaluation"]["sampled"];
    assert_eq!(sampled["outcomes"]["completed"], ROLLOUTS, "{sampled}");
    assert!(sampled["mean"].as_f64().unwrap() > 0.0, "a free room is worth something: {sampled}");

    let sampled = completions(&bench, "a", FIRST);
    assert_eq!(sampled.len(), 2);
    for completion in &sampled {
        assert_eq!(completion["tokens"]["prompt_ids"], json!([1, 9, 4]), "{completion}");
        assert_eq!(completion["tokens"]["completion_ids"], json!([17, 2]));
        assert_eq!(completion["tokens"]["log_probs"], json!([-0.25, -0.5]));
        assert!(completion["not_trainable"].is_null(), "{completion}");
    }
    assert_eq!(sampled[0]["tool_calls"][0]["id"], "call-0-0");
    let greedy = completions(&bench, "a", "eval-policy-greedy-00000-0000");
    assert_eq!(greedy[0]["not_trainable"], "truncated_sampling");

    let heard = server.heard();
    assert_eq!(heard.len(), 1 + 2 * 2 * ROLLOUTS, "one look at the models, two calls for each rollout");
    assert!(heard.iter().all(|heard| heard.head.contains(&format!("authorization: Bearer {KEY}"))));
    let temperatures = |wanted: f64| heard.iter().filter(|heard| heard.body["temperature"] == json!(wanted)).count();
    assert_eq!((temperatures(1.0), temperatures(0.0)), (2 * ROLLOUTS, 2 * ROLLOUTS));
    search_for_key(&bench.path().join("a"));
    assert!(!format!("{}{}", finished.stdout, finished.stderr).contains(KEY));

    // Neither the server nor its key: the answers are recorded.
    let asked = server.heard().len();
    let all = bench.succeed(&["replay", "--all", "--run", "a"]);
    let expected = format!("{0} of {0} rollouts are identical", 2 * ROLLOUTS);
    assert!(all.stderr.contains(&expected), "{}", all.stderr);
    assert_eq!(server.heard().len(), asked);
    // A fork asks it for what comes after.
    let mut fork = bench.command(&["fork", FIRST, "--at", "1", "--count", "2", "--run", "a"]);
    let forked = Finished::new(fork.env("MODEL_KEY", KEY).output().unwrap());
    assert_eq!(forked.code, 0, "{}", forked.stderr);
    assert_eq!(server.heard().len(), asked + 1 + 2);
}

#[test]
fn answers_without_ids_are_recorded_as_not_trainable() {
    for (kind, say) in [("openai", openai_answer as fn(&str) -> Value), ("llama-cpp", llama_cpp_answer)] {
        let server = server(say);
        let bench = bench(&server.url(), "");
        bench.replace("server = \"vllm\"", &format!("server = \"{kind}\""));
        let finished = run(&bench, "a");
        assert_eq!(finished.code, 0, "{}", finished.stderr);
        assert!(finished.stderr.contains("server = \"vllm\""), "what it seems to be: {}", finished.stderr);
        for completion in completions(&bench, "a", FIRST) {
            assert_eq!(completion["not_trainable"], "no_token_ids", "{completion}");
            assert!(completion["tokens"].is_null(), "{completion}");
        }
    }
}

#[test]
fn a_server_that_fails_costs_attempts_and_one_that_stays_down_voids_the_evaluation() {
    // More failures than one call has tries: the first rollout's attempt ends, and its next one finds the server well.
    let failures = AtomicUsize::new(0);
    let server = serving(move |heard| {
        if failures.fetch_add(1, Ordering::SeqCst) < 3 {
            Reply::Answer(503, "", "loading".to_owned())
        } else {
            book(heard, vllm_answer)
        }
    });
    let flaky = bench(&server.url(), "[rollout]\nlive_max = 1");
    let finished = run(&flaky, "a");
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    assert_eq!(finished.json()["evaluation"]["sampled"]["outcomes"]["completed"], ROLLOUTS);
    let first = flaky.succeed(&["rollouts", "show", FIRST, "--run", "a", "--output", "json"]).json();
    assert_eq!(first["attempt"]["key"]["attempt"], 2, "{}", first["attempt"]);

    let down = serving(|_| Reply::Answer(503, "", "for ever".to_owned()));
    let down = bench(&down.url(), "retries_max = 0");
    let finished = run(&down, "a");
    assert_eq!(finished.code, 1, "{}", finished.stderr);
    assert!(finished.stderr.contains("failed by infrastructure"), "{}", finished.stderr);
    let list = down.succeed(&["rollouts", "list", "--run", "a", "--output", "json"]).stdout;
    for line in list.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["attempt"]["outcome"]["kind"], "llm-unavailable", "{line}");
        assert_eq!(line["attempt"]["rewards"].as_array().unwrap().len(), 0, "a fault is never a reward: {line}");
    }
}

#[test]
fn a_full_context_is_graded_as_the_policys_doing() {
    let server = serving(|_| {
        let error = "This model's maximum context length is 16 tokens. However, your request has 40 input tokens.";
        Reply::Answer(400, "", json!({"error": {"message": error, "code": 400}}).to_string())
    });
    let finished = run(&bench(&server.url(), ""), "a");
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    let sampled = &finished.json()["evaluation"]["sampled"];
    assert_eq!(sampled["outcomes"]["context-limit"], ROLLOUTS, "{sampled}");
    assert_eq!(sampled["policy_fault_share"], 1.0);
}

#[test]
fn what_is_wrong_with_an_endpoint_is_told_before_anything_runs() {
    let server = server(vllm_answer);
    let refused = |bench: &Bench, code: i32, expected: &[&str]| {
        let finished = run(bench, "a");
        assert_eq!(finished.code, code, "{}", finished.stderr);
        for text in expected {
            assert!(finished.stderr.contains(text), "no {text:?} in\n{}", finished.stderr);
        }
    };
    let with = |old: &str, new: &str| {
        let bench = bench(&server.url(), "");
        bench.replace(old, new);
        bench
    };
    refused(&with("model = \"m\"", "model = \"other\""), 2, &["`policy.endpoint.model`", "`other`", "`m`"]);
    refused(&with("model = \"m\"", ""), 2, &["policy.endpoint.model", "missing"]);
    refused(&with("MODEL_KEY", "NO_SUCH_KEY"), 2, &["`policy.endpoint`", "NO_SUCH_KEY", "not set"]);
    refused(&with("backoff_ms = 1", "backof_ms = 1"), 2, &["run.toml", "unknown field `backof_ms`", "backoff_ms"]);
    refused(&with("server = \"vllm\"", "server = \"tgi\""), 2, &["run.toml", "tgi", "llama-cpp"]);
    refused(&with("backoff_ms = 1", "concurrency_max = 0"), 2, &["policy.endpoint.concurrency_max", "at least 1"]);
    let slow = with("backoff_ms = 1", "timeout_ms = 90000");
    refused(&slow, 2, &["policy.endpoint.timeout_ms", "270000 ms", "`limits.heartbeat_ms_max` of 120000"]);
    let slow = with("backoff_ms = 1", "requests_per_minute_max = 60");
    refused(&slow, 2, &["policy.endpoint.requests_per_minute_max", "`rollout.live_max` to 120"]);
    refused(&with("allow_private = [\"127.0.0.1\"]", ""), 1, &["[policy.endpoint]", "allow_private = [\"127.0.0.1\"]"]);
    let both = with("[policy.endpoint]", "[policy.scripted]\nreplies = [{ text = \"x\" }]\n[policy.endpoint]");
    refused(&both, 2, &["[policy.local], [policy.endpoint] and [policy.scripted]"]);
    assert!(server.heard().iter().all(|heard| heard.asks_for("/models")), "nothing else was asked");

    let gone = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        bench(&format!("http://{}/v1", listener.local_addr().unwrap()), "")
    };
    refused(&gone, 1, &["`policy.endpoint`", "nobody answers", "/v1/models", "doctor --config"]);
    let locked = ModelServer::replies(vec![Reply::Answer(401, "", "no".to_owned())]);
    refused(&bench(&locked.url(), ""), 1, &["/v1/models answers", "status 401", "`MODEL_KEY`"]);
}

#[test]
fn the_model_of_a_server_is_not_trained() {
    let bench = Bench::with_items(20, 20, 2);
    bench.replace("[policy.local.tokenizer]\ncorpus = [\"demonstrations\"]", "[policy.endpoint]\nmodel = \"m\"");
    bench.replace("vocab_size = 384", "url = \"http://127.0.0.1:1/v1\"");
    let config = bench.read("run.toml");
    let without: Vec<_> = config.lines().filter(|line| !line.starts_with("atoms_pattern")).collect();
    bench.write("run.toml", &without.join("\n"));
    let refused = bench.run(&["train", "run.toml", "--run", "a"]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    for text in ["policy.endpoint", "cannot be trained", "[policy.local]"] {
        assert!(refused.stderr.contains(text), "no {text:?} in {}", refused.stderr);
    }
    assert!(!bench.path().join("a").exists());
}

#[test]
fn doctor_asks_every_endpoint_of_a_config() {
    let server = server(vllm_answer);
    let bench = bench(
        &server.url(),
        "[endpoint.gone]\nurl = \"http://127.0.0.1:1/v1\"\nmodel = \"m\"\nallow_private = [\"127.0.0.1\"]\n\
         [endpoint.written]\nscripted.replies = [{ text = \"x\" }]",
    );
    let mut command = bench.command(&["doctor", "--config", "run.toml", "--output", "json"]);
    let finished = Finished::new(command.env("MODEL_KEY", KEY).output().unwrap());
    assert_eq!(finished.code, 1, "one is gone");
    let checks = finished.json();
    let check = |name: &str| checks.as_array().unwrap().iter().find(|check| check["name"] == name).cloned();
    let policy = check("policy.endpoint").unwrap();
    assert_eq!(policy["ok"], true, "{policy}");
    assert!(policy["found"].as_str().unwrap().contains("4096 tokens of context"), "{policy}");
    let gone = check("endpoint.gone").unwrap();
    assert!(gone["ok"] == false && gone["fix"].as_str().unwrap().contains("nobody answers"), "{gone}");
    assert_eq!(check("endpoint.written"), None);
}

/// Fails when a file under this folder has the key.
fn search_for_key(folder: &Path) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            search_for_key(&path);
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let found = bytes.windows(KEY.len()).any(|window| window == KEY.as_bytes());
        assert!(!found, "the key is in {}", path.display());
    }
}
