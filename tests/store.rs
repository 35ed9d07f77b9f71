//! `fulgurite store` through the binary: check, count, list, export, import, compact and prune, and what it says about bad
//! input.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::sync::Arc;

use std::path::Path;
use std::process::{Command, Stdio};

use fulgurite_core::dataset::Split;
use fulgurite_core::id::{AttemptKey, PolicyVersion, RolloutId, SpanId, TraceId};
use fulgurite_core::llm::Sampling;
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::record::{RolloutMode, RolloutSpec, WorkerRecord};
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::seed::Seed;
use fulgurite_core::span::{Span, SpanBody, SpanKind, SpanStatus};
use fulgurite_core::state::{AttemptState, RolloutState};
use fulgurite_store::{AttemptFinish, RolloutStore, SledStore};

/// A folder with a run of 12 rollouts, and commands in it.
struct Bench {
    folder: tempfile::TempDir,
}

struct Finished {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Bench {
    fn empty() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn new() -> Self {
        let bench = Self::empty();
        fill(&SledStore::open(&bench.path("runs/a/store")).unwrap());
        bench
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Finished {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fulgurite"));
        command.args(arguments).current_dir(self.folder.path()).env("NO_COLOR", "1").env_remove("RUST_LOG");
        let output = command.stdin(Stdio::null()).output().unwrap();
        Finished {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn succeed(&self, arguments: &[&str]) -> Finished {
        let finished = self.run(arguments);
        assert_eq!(finished.code, 0, "{arguments:?}\n{}\n{}", finished.stdout, finished.stderr);
        finished
    }

    /// Expects this exit code, nothing on standard output, and these texts on standard error.
    fn fail(&self, arguments: &[&str], code: i32, expected: &[&str]) {
        let finished = self.run(arguments);
        assert_eq!(finished.code, code, "{arguments:?}\n{}\n{}", finished.stdout, finished.stderr);
        for text in expected {
            assert!(finished.stderr.contains(text), "{arguments:?}: no {text:?} in\n{}", finished.stderr);
        }
        assert!(finished.stdout.is_empty(), "{}", finished.stdout);
    }
}

impl Finished {
    fn lines(&self) -> Vec<serde_json::Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn json(&self) -> serde_json::Value {
        self.lines().pop().unwrap()
    }
}

fn id(index: u64) -> RolloutId {
    RolloutId::derived("grpo", index / 4, index % 4).unwrap()
}

fn span(key: &AttemptKey, sequence: u64, index: u64) -> Span {
    let text = format!("line {sequence} of {}{}", key.rollout, if index == 5 { " needle" } else { "" });
    Span {
        attempt: key.clone(),
        sequence,
        trace_id: TraceId(u128::from(index) + 1),
        span_id: SpanId(sequence + 1),
        parent: None,
        name: "log".to_owned(),
        kind: SpanKind::Internal,
        start_ns: 1_000,
        end_ns: 5_000,
        status: SpanStatus::Ok,
        guest_attributes: vec![],
        links: vec![],
        body: SpanBody::Log { level: "info".to_owned(), text },
    }
}

/// Three steps of four rollouts; the last one waits, every third has trapped.
fn fill(store: &SledStore) {
    let hashes = store.put_blobs(vec![b"{\"id\":\"item\"}".to_vec(), b"{}".to_vec(), b"nobody's".to_vec()]).unwrap();
    let spec = |index: u64| RolloutSpec {
        id: id(index),
        stage: "grpo".to_owned(),
        step: index / 4,
        group: 0,
        dataset: "rooms".to_owned(),
        split: Split::Train,
        item_id: format!("item-{}", index % 2),
        mode: RolloutMode::Train,
        seed: Seed::new(index),
        sampling: Sampling::default(),
        policy_version: PolicyVersion(1),
        resources_version: 1,
        components: vec![],
        item: hashes[0],
        execution: hashes[1],
        fork_of: None,
    };
    store.enqueue((0..12).map(spec).map(Arc::new).collect()).unwrap();
    for index in 0..11 {
        let key = store.begin_attempt(&id(index), 1_000_000, "worker-1").unwrap().key;
        store.mark_running(&key).unwrap();
        let graded = index % 3 != 2;
        let reward = Reward {
            dimension: "reward".to_owned(),
            value: index as f64 / 10.0,
            feedback: None,
            source: RewardSource::Grader,
            component: None,
            call_index: None,
        };
        let finish = AttemptFinish {
            state: if graded { AttemptState::Succeeded } else { AttemptState::Failed },
            outcome: if graded {
                AttemptOutcome::completed("{}".to_owned())
            } else {
                AttemptOutcome::failed(OutcomeKind::Trap, "unreachable")
            },
            rewards: if graded { vec![reward] } else { vec![] },
            end_unix_ns: 9_000_000 + index,
            guest_cpu_us: 5,
            not_forkable: None,
            spans: std::sync::Arc::new((0..=index).map(|sequence| span(&key, sequence, index)).collect()),
            rollout_state: if graded { RolloutState::Succeeded } else { RolloutState::Failed },
            key,
        };
        store.finish_attempts(vec![finish]).remove(0).unwrap();
    }
    store.publish_template(0, "prompt", "Hello\n\u{1b}[2Jworld").unwrap();
    let worker = WorkerRecord {
        id: "worker-1".to_owned(),
        process_id: 7,
        start_unix_ns: 1,
        heartbeat_unix_ns: 3_000_000_001,
        attempts: 11,
    };
    store.put_worker(worker).unwrap();
    store.enqueue(vec![spec(0).into()]).unwrap();
}

#[test]
fn a_sound_store_is_checked_and_counted() {
    let bench = Bench::new();
    let check = bench.succeed(&["store", "check", "--run", "runs/a"]);
    insta::assert_snapshot!(check.stdout, @r"
    read 42 keys: 12 rollouts, 11 attempts, 66 spans, 3 blobs, 1 version of the templates, 1 worker
    note: unreferenced blobs: 1; `fulgurite store compact` drops them
    sound
    ");
    let check = bench.succeed(&["store", "check", "--run", "runs/a", "--output", "json"]).json();
    assert_eq!((&check["sound"], &check["spans"], &check["findings_total"]), (&true.into(), &66.into(), &0.into()));
    let stats = bench.succeed(&["store", "stats", "--run", "runs/a", "--output", "json"]).json();
    assert_eq!(stats["rollouts"], serde_json::json!({"queuing": 1, "succeeded": 8, "failed": 3}));
    assert_eq!(stats["outcomes"], serde_json::json!({"completed": 8, "trap": 3}));
    assert_eq!((&stats["schema"], &stats["blobs"], &stats["workers"]), (&5.into(), &3.into(), &1.into()));
    let stats = bench.succeed(&["store", "stats", "--run", "runs/a"]).stdout;
    assert!(stats.contains("succeeded") && stats.contains("trap") && stats.contains("on disk"), "{stats}");
}

#[test]
fn a_damaged_store_is_named_and_the_exit_code_says_so() {
    let bench = Bench::new();
    let database = sled_of(&bench.path("runs/a/store"));
    let block = database.scan_prefix(b"s").keys().map(Result::unwrap).nth(3).unwrap();
    database.insert(block, vec![1, 0xff, 0xff]).unwrap();
    database.flush().unwrap();
    drop(database);
    let check = bench.run(&["store", "check", "--run", "runs/a"]);
    assert_eq!(check.code, 1);
    assert!(check.stdout.contains("rollout #3 attempt 1 spans from 0: "), "{}", check.stdout);
    assert!(
        check.stderr.contains("things are wrong") && check.stderr.contains("hint: copy the folder"),
        "{}",
        check.stderr
    );
    let check = bench.run(&["store", "check", "--run", "runs/a", "--output", "json"]);
    assert_eq!((check.code, &check.json()["sound"]), (1, &false.into()));
    bench.fail(
        &["store", "list", "spans", "grpo-00000-0003", "--run", "runs/a", "--output", "json"],
        1,
        &["is damaged", "store check"],
    );
    let part = bench.run(&["store", "export", "--run", "runs/a", "--to", "a.jsonl"]);
    assert_eq!(part.code, 1, "{}", part.stderr);
    assert!(!bench.path("a.jsonl").exists(), "an export that failed has no name");
}

fn sled_of(store: &Path) -> sled::Db {
    let data = store.join(std::fs::read_to_string(store.join("current")).unwrap().trim_end());
    loop {
        match sled::open(&data) {
            Ok(database) => return database,
            Err(sled::Error::Io(_)) => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn an_export_becomes_an_equal_run() {
    let bench = Bench::new();
    bench.succeed(&["store", "export", "--run", "runs/a", "--to", "a.jsonl"]);
    let whole = std::fs::read_to_string(bench.path("a.jsonl")).unwrap();
    assert_eq!(bench.succeed(&["store", "export", "--run", "runs/a"]).stdout, whole);
    let imported = bench.succeed(&["store", "import", "a.jsonl", "--run", "runs/b", "--output", "json"]).json();
    assert_eq!((&imported["rollouts"], &imported["spans"]), (&12.into(), &66.into()));
    assert_eq!(bench.succeed(&["store", "export", "--run", "runs/b"]).stdout, whole);
    // The run is named after the file when nothing else is said.
    assert!(bench.succeed(&["store", "import", "a.jsonl", "--run", "c"]).stdout.contains("rollouts list --run c"));
    bench.fail(&["store", "export", "--run", "runs/a", "--to", "a.jsonl"], 2, &["a.jsonl` is there already", "hint: "]);
    bench.fail(&["store", "import", "a.jsonl"], 2, &["runs/a/store", "holds something already", "hint: "]);
    assert_eq!(std::fs::read_to_string(bench.path("a.jsonl")).unwrap(), whole);
    // A wrong line is named, and nothing is left behind.
    let damaged = whole.replacen("\"sequence\":2", "\"sequence\":3", 1);
    std::fs::write(bench.path("bad.jsonl"), &damaged).unwrap();
    let line = 1 + damaged.lines().zip(whole.lines()).position(|(a, b)| a != b).unwrap();
    let expected = format!("bad.jsonl line {line}: span 2 of");
    bench.fail(&["store", "import", "bad.jsonl"], 2, &[&expected, "hint: nothing was imported"]);
    assert!(!bench.path("runs/bad").exists());
    std::fs::write(bench.path("cut.jsonl"), &whole[..whole.len() / 2]).unwrap();
    bench.fail(&["store", "import", "cut.jsonl"], 2, &["cut.jsonl line "]);
    bench.fail(&["store", "import", "nowhere.jsonl"], 2, &["cannot read `nowhere.jsonl`"]);
    std::fs::write(bench.path("text"), "hello\n").unwrap();
    bench.fail(&["store", "import", "text"], 2, &["text line 1: "]);
}

#[test]
fn traces_go_out_and_come_in_as_open_telemetry() {
    let bench = Bench::new();
    bench.succeed(&["store", "export", "--run", "runs/a", "--format", "otlp", "--to", "a.otlp"]);
    let lines = std::fs::read_to_string(bench.path("a.otlp")).unwrap();
    assert_eq!(lines.lines().count(), 11);
    let first: serde_json::Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    let spans = &first["resourceSpans"][0]["scopeSpans"][0]["spans"];
    assert_eq!(spans[0]["traceId"], format!("{:032x}", 1));
    let import = ["store", "import", "a.otlp", "--format", "otlp", "--run", "runs/t", "--output", "json"];
    let imported = bench.succeed(&import).json();
    assert_eq!((&imported["rollouts"], &imported["spans"], &imported["existing"]), (&11.into(), &66.into(), &0.into()));
    let again = bench.succeed(&import).json();
    assert_eq!((&again["rollouts"], &again["existing"]), (&0.into(), &11.into()));
    let listed = bench.succeed(&["rollouts", "list", "--run", "runs/t", "--stage", "import", "--output", "json"]);
    assert_eq!(listed.lines().len(), 11);
    assert!(listed.lines().iter().all(|line| line["attempt"]["rewards"].as_array().unwrap().is_empty()));
    let rollout = format!("otlp-{:032x}", 3);
    let spans = bench.succeed(&["store", "list", "spans", &rollout, "--run", "runs/t", "--output", "json"]).lines();
    assert_eq!(spans.len(), 3);
    assert_eq!(spans[0]["body"], "guest");
    assert!(spans[0]["guest_attributes"].to_string().contains("guest.fulgurite.rollout.id"), "{}", spans[0]);
    assert_eq!(bench.succeed(&["store", "check", "--run", "runs/t", "--output", "json"]).json()["sound"], true);
    std::fs::write(bench.path("bad.otlp"), format!("{}\nnot json\n", lines.lines().next().unwrap())).unwrap();
    let bad = ["store", "import", "bad.otlp", "--format", "otlp"];
    bench.fail(&bad, 2, &["bad.otlp line 2: it is not an OTLP trace request", "hint: "]);
    assert!(!bench.path("runs/bad").exists());
}

#[test]
fn retention_says_what_it_does_and_compaction_gives_the_space_back() {
    let bench = Bench::new();
    let prune = |more: &[&str]| {
        bench.succeed(&[&["store", "prune", "--run", "runs/a", "--output", "json"], more].concat()).json()
    };
    let tried = prune(&["--keep-steps", "1", "--dry-run"]);
    assert_eq!((&tried["rollouts"], &tried["dry_run"]), (&8.into(), &true.into()));
    assert_eq!(prune(&["--state", "failed", "--before-step", "2"])["rollouts"], 2);
    let dropped = prune(&["--keep-steps", "1", "--compact"]);
    assert_eq!(dropped["rollouts"], 6);
    assert_eq!(dropped["compact"]["blobs_dropped"], 1);
    let check = bench.succeed(&["store", "check", "--run", "runs/a", "--output", "json"]).json();
    assert_eq!(
        (&check["sound"], &check["rollouts"], &check["unreferenced_blobs"]),
        (&true.into(), &4.into(), &0.into())
    );
    let compact = bench.succeed(&["store", "compact", "--run", "runs/a"]).stdout;
    assert!(compact.contains("before") && compact.contains("after"), "{compact}");
    bench.fail(&["store", "prune", "--run", "runs/a"], 2, &["nothing says what to drop", "hint: give --stage"]);
    bench.fail(&["store", "prune", "--run", "runs/a", "--state", "running"], 2, &["have not ended", "hint: "]);
    bench.fail(
        &["store", "prune", "--run", "runs/a", "--state", "broken"],
        2,
        &["invalid value 'broken'", "succeeded"],
    );
}

#[test]
fn rollouts_are_listed_by_every_filter_and_order() {
    let bench = Bench::new();
    let list = |more: &[&str]| -> Vec<String> {
        let finished = bench.succeed(&[&["rollouts", "list", "--run", "runs/a", "--output", "json"], more].concat());
        let name = |line: &serde_json::Value| line["rollout"]["spec"]["id"].as_str().unwrap().to_owned();
        finished.lines().iter().map(name).collect()
    };
    let ids = |indices: &[u64]| -> Vec<String> { indices.iter().map(|index| id(*index).to_string()).collect() };
    assert_eq!(list(&[]).len(), 12);
    assert_eq!(list(&["--state", "failed"]), ids(&[2, 5, 8]));
    assert_eq!(list(&["--outcome", "trap", "--descending"]), ids(&[8, 5, 2]));
    assert_eq!(list(&["--reward-min", "0.4", "--reward-max", "0.9"]), ids(&[4, 6, 7, 9]));
    assert_eq!(list(&["--sort", "reward", "--descending", "--limit", "2"]), ids(&[10, 9]));
    assert_eq!(list(&["--sort", "spans", "--item", "item-1", "--limit", "1"]), ids(&[11]));
    assert_eq!(list(&["--mode", "val"]), ids(&[]));
    assert_eq!(list(&["--step", "1", "--offset", "1", "--limit", "2"]), ids(&[5, 6]));
    let page = bench.succeed(&["rollouts", "list", "--run", "runs/a", "--limit", "5", "--sort", "id"]);
    let cursor = page.stderr.trim().strip_prefix("more: --after ").unwrap();
    assert_eq!(list(&["--sort", "id", "--after", cursor]), ids(&[5, 6, 7, 8, 9, 10, 11]));
    bench.fail(&["rollouts", "list", "--run", "runs/a", "--after", "zz"], 2, &["`zz` is not a cursor"]);
    bench.fail(&["rollouts", "list", "--run", "runs/a", "--sort", "colour"], 2, &["invalid value 'colour'", "reward"]);
    bench.fail(&["rollouts", "list", "--run", "runs/a", "--fork-of", "../x"], 2, &["is not a valid id"]);
}

#[test]
fn attempts_spans_workers_and_resources_are_listed() {
    let bench = Bench::new();
    let list = |more: &[&str]| {
        bench.succeed(&[&["store", "list"], more, &["--run", "runs/a", "--output", "json"]].concat()).lines()
    };
    assert_eq!(list(&["attempts", "--outcome", "trap"]).len(), 3);
    assert_eq!(list(&["attempts", "--worker", "worker-1", "--limit", "4"]).len(), 4);
    assert_eq!(list(&["attempts", "--worker", "nobody"]).len(), 0);
    assert_eq!(list(&["attempts", "--rollout", "grpo-00000-0001"])[0]["spans"], 2);
    assert_eq!(list(&["spans", "grpo-00001-0001", "--contains", "needle"]).len(), 6);
    assert_eq!(list(&["spans", "grpo-00001-0001", "--kind", "llm"]).len(), 0);
    assert_eq!(list(&["spans", "grpo-00001-0001", "--kind", "log", "--name", "log", "--attempt", "1"]).len(), 6);
    assert_eq!(list(&["workers"])[0]["id"], "worker-1");
    assert_eq!(list(&["resources", "--name", "prompt"])[0]["version"], 1);
    // Text of guests cannot rewrite the terminal.
    let text = bench.succeed(&["store", "list", "resources", "--run", "runs/a"]).stdout;
    assert!(text.contains("Hello\\n") && !text.contains('\u{1b}'), "{text:?}");
    let page = bench.succeed(&["store", "list", "attempts", "--run", "runs/a", "--limit", "3"]);
    let cursor = page.stderr.trim().strip_prefix("more: --after ").unwrap().to_owned();
    assert_eq!(list(&["attempts", "--after", &cursor]).len(), 8);
    bench.fail(&["store", "list", "spans", "nobody", "--run", "runs/a"], 2, &["no rollout `nobody`", "rollouts list"]);
    bench.fail(
        &["store", "list", "spans", "grpo-00000-0001", "--attempt", "9", "--run", "runs/a"],
        2,
        &["there is no attempt grpo-00000-0001/9"],
    );
    bench.fail(&["store", "list", "spans", "a/b", "--run", "runs/a"], 2, &["`a/b` is not a valid id"]);
}

#[test]
fn a_store_in_use_and_a_run_that_is_not_there_are_said_to_be_that() {
    let bench = Bench::new();
    let store = SledStore::open(&bench.path("runs/a/store")).unwrap();
    for command in ["check", "stats", "compact", "export"] {
        bench.fail(
            &["store", command, "--run", "runs/a"],
            1,
            &["in use by another process", "hint: the run is still going"],
        );
    }
    drop(store);
    for command in ["check", "stats", "compact", "export"] {
        bench.fail(&["store", command, "--run", "nowhere"], 2, &["`nowhere` is not the folder of a run", "hint: "]);
        bench.fail(&["store", command], 2, &["there is no run under `runs/`", "--run DIR"]);
    }
    let help = Bench::empty().succeed(&["store", "prune", "--help"]).stdout;
    assert!(help.contains("--dry-run") && help.contains("Examples:"), "{help}");
}
