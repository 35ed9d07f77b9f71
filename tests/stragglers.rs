//! GRPO with a rollout that does not end: training starts without its group, the next step trains on it, and a run that is
//! killed in between loses none of it.
//!
//! Every rollout asks the policy once and then a model endpoint, which this test serves. The first one to ask it is held
//! back, so what is late, and until when, depends on requests and never on time.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::{Arc, Condvar, Mutex};

use serde_json::Value;
use support::{Bench, component};

const STEPS: usize = 3;
const GROUPS: usize = 4;
const SIZE: usize = 2;
const ROLLOUTS: usize = GROUPS * SIZE;

/// A model endpoint that holds its first request back until more than so many have come.
#[derive(Clone)]
struct Gate(Arc<(Mutex<Served>, Condvar)>);

struct Served {
    requests: usize,
    opens_after: usize,
}

impl Gate {
    /// Opens after so many requests. Returns its port too.
    fn start(opens_after: usize) -> (Self, u16) {
        let gate = Self(Arc::new((Mutex::new(Served { requests: 0, opens_after }), Condvar::new())));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving = gate.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let gate = serving.clone();
                std::thread::spawn(move || gate.serve(&stream.unwrap()));
            }
        });
        (gate, port)
    }

    fn serve(&self, stream: &TcpStream) {
        let mut reader = BufReader::new(stream);
        let mut head = String::new();
        while reader.read_line(&mut head).unwrap() > 2 {}
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        reader.read_exact(&mut vec![0; length.parse().unwrap()]).unwrap();
        let (served, changed) = &*self.0;
        let mut served = served.lock().unwrap();
        served.requests += 1;
        changed.notify_all();
        if served.requests == 1 {
            drop(changed.wait_while(served, |served| served.requests <= served.opens_after).unwrap());
        } else {
            drop(served);
        }
        let body = r#"{"choices":[{"message":{"role":"assistant","content":"go on"},"finish_reason":"stop"}]}"#;
        // Who asked may have been killed.
        let mut stream = stream;
        let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    }

    /// Waits until more than so many have asked.
    fn wait_for_more_than(&self, requests: usize) {
        let (served, changed) = &*self.0;
        drop(changed.wait_while(served.lock().unwrap(), |served| served.requests <= requests).unwrap());
    }

    fn open(&self) {
        let (served, changed) = &*self.0;
        served.lock().unwrap().opens_after = 0;
        changed.notify_all();
    }
}

/// A config that starts to train when all but one of a step's rollouts are in.
fn straggling_run(port: u16) -> Bench {
    let bench = Bench::with_items(20, 20, 2);
    std::fs::copy(component("nasty_agent"), bench.path().join("agent.wasm")).unwrap();
    bench.write("agent.manifest.json", r#"{"endpoints":[{"name":"gate","why":"holds rollouts back"}]}"#);
    let config = format!(
        r#"
name = "stragglers"
[agent]
component = "agent.wasm"
grants.endpoints = ["gate"]
[grader]
component = "{grader}"
[endpoint.gate]
url = "http://127.0.0.1:{port}/v1"
model = "gate"
allow_private = ["127.0.0.1"]
[dataset.items]
train = "items.jsonl"
test = "held-out.jsonl"
[dataset.demonstrations]
train = "demonstrations.jsonl"
[policy.local.tokenizer]
corpus = ["demonstrations"]
vocab_size = 384
[rollout.sampling]
max_tokens = 8
[evaluation]
dataset = "items"
sampled_rollouts = 2
greedy_rollouts = 2
[checkpoint]
every_steps = 100
[[stage]]
name = "grpo"
algorithm = "{algorithm}"
dataset = "items"
[stage.config]
steps = {STEPS}
groups_per_step = {GROUPS}
group_size = {SIZE}
start_share = 0.875
# The grader likes every rollout; this makes a step of it all the same.
entropy_coefficient = 1e-3
"#,
        grader = component("nasty_grader"),
        algorithm = component("grpo"),
    );
    bench.write("run.toml", &config);
    let item = |name: &str, number: usize, program: &str| {
        format!(
            "{{\"id\":\"{name}-{number}\",\"input\":{{\"behaviour\":\"program\",\"program\":[{program}]}},\"world\":{{}},\"reference\":{{}}}}\n"
        )
    };
    let train = |number| item("item", number, r#""chat",{"ask":"gate"}"#);
    bench.write("items.jsonl", &(0..STEPS * GROUPS).map(train).collect::<String>());
    bench.write("held-out.jsonl", &(0..2).map(|number| item("test", number, r#""chat""#)).collect::<String>());
    bench
}

/// The scalars of every step.
fn scalars(bench: &Bench) -> Vec<Value> {
    let lines = bench.read("run/metrics.jsonl");
    let row = |line| -> Value { serde_json::from_str(line).unwrap() };
    lines.lines().map(|line| row(line)["scalars"].clone()).collect()
}

/// How the rollouts of the stage ended.
fn outcomes(bench: &Bench) -> Vec<Value> {
    let list =
        bench.succeed(&["rollouts", "list", "--run", "run", "--stage", "grpo", "--limit", "1000", "--output", "json"]);
    let row = |line| -> Value { serde_json::from_str(line).unwrap() };
    list.stdout.lines().map(|line| row(line)["attempt"]["outcome"]["kind"].clone()).collect()
}

#[track_caller]
fn same(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
}

/// How many of the calls that a step trained on were drawn by the weights of the step before.
fn calls_behind(step: &Value) -> f64 {
    step["staleness_mean"].as_f64().unwrap() * step["trained_calls"].as_f64().unwrap()
}

/// What must hold however the run came to its end: every rollout is trained on once.
#[track_caller]
fn nothing_is_lost(bench: &Bench) {
    let steps = scalars(bench);
    assert_eq!(steps.len(), STEPS);
    let sum = |name: &str| steps.iter().map(|step| step[name].as_f64().unwrap()).sum::<f64>();
    same(sum("trained_calls"), (STEPS * ROLLOUTS) as f64);
    same(sum("carried_in"), sum("carried_out"));
    assert_eq!(steps[STEPS - 1]["rollouts_total"], (STEPS * ROLLOUTS) as f64, "{steps:?}");
    assert_eq!(steps[STEPS - 1]["carried_out"], 0.0, "the last step waits for all");
    // Without its group the first step trains on the others, and no later one is behind by more than a step.
    assert_eq!((&steps[0]["carried_in"], &steps[0]["carried_out"]), (&0.0.into(), &(SIZE as f64).into()));
    assert_eq!(
        (&steps[0]["trained_calls"], &steps[0]["staleness_max"]),
        (&((ROLLOUTS - SIZE) as f64).into(), &0.0.into())
    );
    assert_eq!((&steps[1]["carried_in"], &steps[1]["staleness_max"]), (&(SIZE as f64).into(), &1.0.into()));
    assert_eq!(outcomes(bench), vec![Value::from("completed"); STEPS * ROLLOUTS]);
}

#[test]
fn a_step_starts_without_its_straggler_and_the_next_one_trains_on_it() {
    // The requests of the first step do not open it; those of the second do.
    let (_gate, port) = Gate::start(ROLLOUTS);
    let bench = straggling_run(port);
    bench.succeed(&["train", "run.toml", "--run", "run"]);
    nothing_is_lost(&bench);
    same(calls_behind(&scalars(&bench)[1]), SIZE as f64);
    // What was late says so: the first step carried it over, the second was given it and used it.
    let explained = (0..ROLLOUTS).map(|number| {
        let rollout = format!("grpo-00000-{number:04}");
        bench.succeed(&["explain", &rollout, "--run", "run", "--output", "json"]).json()
    });
    let late: Vec<Value> = explained.filter(|found| found["carried_by"] == serde_json::json!([0])).collect();
    assert_eq!(late.len(), SIZE, "{late:?}");
    for found in late {
        let given = found["given"].as_array().unwrap();
        assert_eq!(given.last().unwrap()["step"], 1, "{found}");
        assert_eq!(found["calls"][0]["uses"][0]["step"], 1, "{found}");
        assert_eq!(found["reasons"], serde_json::json!([]));
    }
}

#[test]
fn a_run_that_is_killed_with_a_group_carried_over_trains_on_it_when_it_is_resumed() {
    let (gate, port) = Gate::start(usize::MAX);
    let bench = straggling_run(port);
    let mut child = bench
        .command(&["train", "run.toml", "--run", "run"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // The second step has begun, so the first one is committed, although the interval of checkpoints is far longer.
    gate.wait_for_more_than(ROLLOUTS);
    child.kill().unwrap();
    child.wait().unwrap();
    gate.open();
    let resumed = bench.succeed(&["train", "run.toml", "--run", "run", "--resume"]);
    assert!(resumed.stderr.contains("step 1 of the next"), "{}", resumed.stderr);
    nothing_is_lost(&bench);
    // The straggler was run again, by the weights that there are now; what it is grouped with came from the store.
    same(calls_behind(&scalars(&bench)[1]), (SIZE - 1) as f64);
}
