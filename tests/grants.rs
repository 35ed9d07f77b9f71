//! Grants and limits of single plugins through the binary: refusals print the line that would allow it, and what is granted
//! reaches the plugin and nobody else.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::{Bench, Finished, component};

const SECRET: &str = "s3cr3t-api-key-value";
const CANARY: &str = "canary-in-a-granted-folder";

/// A config whose scripted policy calls the granted tool once and answers with what it says.
fn granted_run(tool: &str, call: &str, extra: &str) -> Bench {
    let bench = Bench::new();
    let config = format!(
        r#"
name = "granted"
[agent]
component = "{agent}"
[tools.granted]
component = "{tool}"
[dataset.items]
test = "test.jsonl"
[policy.scripted]
replies = [{{ text = "unused" }}]
[evaluation]
dataset = "items"
sampled_rollouts = 1
greedy_rollouts = 1
{extra}
"#,
        agent = component("nasty_agent"),
    );
    bench.write("run.toml", &config);
    bench.write(
        "test.jsonl",
        &format!("{{\"id\":\"a\",\"input\":{{\"behaviour\":\"call\",\"calls\":[{call}]}},\"world\":null}}\n"),
    );
    bench
}

fn run(bench: &Bench) -> Finished {
    let mut command = bench.command(&["run", "run.toml", "--run", "run", "--output", "json"]);
    let output = command.env("TEST_API_KEY", SECRET).output().unwrap();
    Finished::new(output)
}

#[track_caller]
fn refused(bench: &Bench, expected: &[&str]) {
    let finished = run(bench);
    assert_eq!(finished.code, 2, "{}\n{}", finished.stdout, finished.stderr);
    for text in expected {
        assert!(finished.stderr.contains(text), "no {text:?} in\n{}", finished.stderr);
    }
}

#[test]
fn refusals_print_the_line_that_would_allow_it() {
    let tool = component("granted_tool");
    let call = r#"["query", {"sql": "SELECT 1"}]"#;
    let bench = granted_run(&tool, call, "");
    let result = run(&bench);
    assert_eq!(result.code, 0, "all its asks are optional: {}", result.stderr);
    let show = bench.succeed(&["rollouts", "show", "eval-scripted-sampled-00000-0000", "--run", "run"]).stdout;
    assert!(show.contains("[tools.granted.grants]") && show.contains("sqlite.shop"), "{show}");

    let grants = |lines: &str| granted_run(&tool, call, &format!("[tools.granted.grants]\n{lines}"));
    refused(&grants("folders.home = \".\""), &["tools.granted", "`home`", "does not ask for", "docs"]);
    refused(&grants("sqlite.shop = \"nowhere\""), &["tools.granted.grants.sqlite.shop", "nowhere"]);
    refused(&grants("http = [{ origin = \"example.com\" }]"), &["run.toml", "no scheme"]);
    refused(&grants("http = [{ origin = \"http://127.0.0.1:47001\", headers.a.env = \"NOT_SET\" }]"), &["NOT_SET"]);
    refused(&grants("files.docs = \".\""), &["run.toml", "unknown field `files`", "folders"]);

    // A grader that cannot do without its judge.
    let grader = format!("[grader]\ncomponent = \"{}\"", component("judged_grader"));
    refused(&granted_run(&tool, call, &grader), &["judges answers", "[grader.grants]", "endpoints = [\"judge\"]"]);
    let granted = format!("{grader}\ngrants.endpoints = [\"judge\"]");
    refused(&granted_run(&tool, call, &granted), &["grader.grants.endpoints", "[endpoint.judge]"]);
    let half = format!("{granted}\n[endpoint.judge]\nurl = \"http://127.0.0.1:1/v1\"");
    refused(&granted_run(&tool, call, &half), &["endpoint.judge.model", "missing"]);
}

#[test]
fn grants_never_overlap_what_the_host_keeps() {
    let tool = component("granted_tool");
    let call = r#"["list", {"text": "/docs"}]"#;
    let with = |folder: &str| granted_run(&tool, call, &format!("[tools.granted.grants]\nfolders.docs = \"{folder}\""));
    // The run's own folder, what is in it, and what it is in.
    for folder in ["run", "run/store", "."] {
        let bench = with(folder);
        std::fs::create_dir_all(bench.path().join("run/store")).unwrap();
        refused(&bench, &["tools.granted.grants.folders.docs", "of this run"]);
    }
    let other = with("runs/old/store");
    std::fs::create_dir_all(other.path().join("runs/old/store")).unwrap();
    other.write("runs/old/config.toml", "");
    refused(&other, &["the folder of a run"]);
    let cache = support::root().join("target/test-cache");
    refused(&with(&cache.display().to_string()), &["the cache of compiled code"]);
    let link = with("link");
    std::os::unix::fs::symlink(&cache, link.path().join("link")).unwrap();
    refused(&link, &["the cache of compiled code"]);
}

#[test]
fn a_granted_folder_reaches_the_tool_and_its_pin_the_record() {
    let call = r#"["read", {"text": "/docs/notes.txt"}], ["read", {"text": "/docs/../test.jsonl"}]"#;
    let bench = granted_run("tool.wasm", call, "[tools.granted.grants]\nfolders.docs = \"docs\"");
    // What it asks for stands in a file beside it, which a run keeps with it.
    let tool = std::fs::read(component("granted_tool")).unwrap();
    std::fs::write(bench.path().join("tool.wasm"), replaced(tool, "fulgurite:manifest", "fulgurite:manifesT")).unwrap();
    bench.write("tool.manifest.json", "{\"folders\":[\"docs\"]}");
    std::fs::create_dir(bench.path().join("docs")).unwrap();
    bench.write("docs/notes.txt", CANARY);
    assert_eq!(run(&bench).code, 0);
    let show = bench.succeed(&["rollouts", "show", "eval-scripted-sampled-00000-0000", "--run", "run"]).stdout;
    assert!(show.contains(CANARY), "{show}");
    assert!(!show.contains("behaviour\\\""), "the second call must not have read the dataset: {show}");
    std::fs::remove_file(bench.path().join("tool.manifest.json")).unwrap();
    bench.succeed(&["replay", "--all", "--run", "run"]);
}

/// A component with a text in it replaced by another of the same length.
fn replaced(mut bytes: Vec<u8>, old: &str, new: &str) -> Vec<u8> {
    assert_eq!(old.len(), new.len());
    while let Some(at) = bytes.windows(old.len()).position(|window| window == old.as_bytes()) {
        bytes[at..at + new.len()].copy_from_slice(new.as_bytes());
    }
    bytes
}

/// A server on this machine that answers every request with its head, and the granted tool that asks for it.
struct Server {
    origin: String,
    tool: String,
    requests: Arc<AtomicUsize>,
    _folder: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let origin = format!("http://127.0.0.1:{}", listener.local_addr().unwrap().port());
        let requests = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut head = String::new();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while reader.read_line(&mut head).unwrap() > 2 {}
                count.fetch_add(1, Ordering::SeqCst);
                let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{head}", head.len());
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let tool = folder.path().join("tool.wasm");
        let bytes = std::fs::read(component("granted_tool")).unwrap();
        // Ports that the system gives have five digits.
        std::fs::write(&tool, replaced(bytes, "http://127.0.0.1:47001", &origin)).unwrap();
        Self { origin, tool: tool.display().to_string(), requests, _folder: folder }
    }
}

#[test]
fn a_secret_is_sent_to_the_server_and_is_nowhere_else() {
    let server = Server::start();
    let origin = &server.origin;
    let grant = format!(
        "[tools.granted.grants]\nhttp = [{{ origin = \"{origin}\", allow_private = [\"127.0.0.1\"], headers.authorization = {{ env = \"TEST_API_KEY\", prefix = \"Bearer \" }} }}]"
    );
    let call = format!("[\"fetch\", {{\"url\": \"{origin}/\"}}]");
    let bench = granted_run(&server.tool, &call, &grant);
    let finished = run(&bench);
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    let show = bench.succeed(&["rollouts", "show", "eval-scripted-sampled-00000-0000", "--run", "run"]).stdout;
    assert!(show.contains("authorization: Bearer [redacted]"), "the server was sent it: {show}");
    assert!(!format!("{show}{}{}", finished.stdout, finished.stderr).contains(SECRET));
    let mut files = 0;
    search(&bench.path().join("run"), &mut files);
    assert!(files > 3, "only {files} files were searched");
}

/// What came over the network is in the recording; what a folder and a database hold is pinned, and looked at again.
#[test]
fn what_a_tool_did_with_its_grants_is_replayed_without_the_server_and_compared_with_the_pins() {
    let server = Server::start();
    let origin = &server.origin;
    let grants = format!(
        "[tools.granted.limits]\nfuel_max = 100000000\n[tools.granted.grants]\nfolders.docs = \"docs\"\nsqlite.shop = \"shop.db\"\n\
         http = [{{ origin = \"{origin}\", allow_private = [\"127.0.0.1\"], headers.x-key.env = \"TEST_API_KEY\" }}]"
    );
    let calls = format!(
        r#"["list", {{"text": "/docs"}}], ["read", {{"text": "/docs/notes.txt"}}], ["fetch", {{"url": "{origin}/a"}}],
        ["execute", {{"sql": "CREATE TABLE t (a)"}}], ["execute", {{"sql": "INSERT INTO t VALUES (random())"}}],
        ["query", {{"sql": "SELECT a, datetime('now') FROM t"}}], ["fetch", {{"url": "http://elsewhere.test/"}}],
        ["query", {{"sql": "SELECT nonsense"}}], ["fetch", {{"url": "{origin}/b"}}]"#
    );
    let bench = granted_run(&server.tool, &calls.replace('\n', " "), &grants);
    std::fs::create_dir(bench.path().join("docs")).unwrap();
    bench.write("docs/notes.txt", CANARY);
    bench.write("shop.db", "");
    let finished = run(&bench);
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    let id = "eval-scripted-sampled-00000-0000";
    let show = bench.succeed(&["rollouts", "show", id, "--run", "run"]).stdout;
    for text in [CANARY, "GET /b", "INSERT INTO t", "elsewhere.test", "no such column"] {
        assert!(show.contains(text), "no {text:?} in {show}");
    }
    let asked = server.requests.load(Ordering::SeqCst);
    assert_eq!(asked, 4);
    // Neither the server nor the secret nor the files that the config names for components and data.
    std::fs::remove_file(&server.tool).unwrap();
    std::fs::remove_file(bench.path().join("test.jsonl")).unwrap();
    let all = bench.succeed(&["replay", "--all", "--run", "run"]);
    assert!(all.stderr.contains("2 of 2 rollouts are identical"), "{}", all.stderr);
    assert_eq!(server.requests.load(Ordering::SeqCst), asked, "a replay sends nothing");

    let refused = |says: &[&str]| {
        let refused = bench.run(&["replay", id, "--run", "run"]);
        assert_eq!(refused.code, 2, "{}\n{}", refused.stdout, refused.stderr);
        for text in says {
            assert!(refused.stderr.contains(text), "no {text:?} in {}", refused.stderr);
        }
    };
    bench.write("docs/notes.txt", "something else");
    let docs = bench.path().join("docs").display().to_string();
    refused(&["tools.granted.grants.folders.docs", &docs, "has changed since the rollout was recorded", "put back"]);
    bench.write("docs/notes.txt", CANARY);
    bench.write("shop.db", "SQLite format 3");
    refused(&["tools.granted.grants.sqlite.shop", "shop.db"]);
    std::fs::remove_file(bench.path().join("shop.db")).unwrap();
    refused(&["tools.granted.grants.sqlite.shop", "shop.db"]);
    bench.write("shop.db", "");
    let config = bench.read("run/config.toml");
    let without: Vec<_> = config.lines().filter(|line| !line.contains("shop.db")).collect();
    bench.write("run/config.toml", &without.join("\n"));
    refused(&["tools.granted.grants.sqlite.shop", "config.toml"]);
    bench.write("run/config.toml", &config);
    bench.succeed(&["replay", id, "--run", "run"]);
}

/// Fails when a file under this folder has the secret.
fn search(folder: &Path, files: &mut usize) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            search(&path, files);
            continue;
        }
        *files += 1;
        let bytes = std::fs::read(&path).unwrap();
        let found = bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes());
        assert!(!found, "the secret is in {}", path.display());
    }
}

#[test]
fn a_judge_grades_by_a_scripted_endpoint() {
    let extra = format!(
        "[grader]\ncomponent = \"{}\"\ngrants.endpoints = [\"judge\"]\n[endpoint.judge]\nscripted.replies = [{{ text = \"0.25\" }}]",
        component("judged_grader")
    );
    let bench = granted_run(&component("granted_tool"), r#"["list", {"text": "/"}]"#, &extra);
    let finished = run(&bench);
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    let list = bench.succeed(&["rollouts", "list", "--run", "run", "--output", "json"]).stdout;
    for line in list.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["attempt"]["rewards"][0]["value"], 0.25, "{line}");
    }

    // The judge has another opinion now. A replay does not ask for it; a grader that judges the recording does.
    let config = bench.read("run/config.toml");
    assert!(config.contains("\"0.25\""), "{config}");
    let opinion = r#"'{{ 0.75 if item.id == "a" else 0 }}'"#;
    bench.write("run/config.toml", &config.replace("\"0.25\"", opinion));
    let all = bench.succeed(&["replay", "--all", "--run", "run"]);
    assert!(all.stderr.contains("2 of 2 rollouts are identical"), "{}", all.stderr);
    let judged = component("judged_grader");
    let again = bench.succeed(&["replay", "--all", "--grader", &judged, "--run", "run", "--output", "json"]);
    assert!(again.stderr.contains("2 of 2 rewards change"), "{}", again.stderr);
    assert!(again.stderr.contains("0.2500 before, 0.7500 after; 0 faults"), "{}", again.stderr);
    // One that asks nobody is not given what it does not ask for.
    let alone = bench.succeed(&["replay", "--all", "--grader", &component("nasty_grader"), "--run", "run"]);
    assert!(alone.stderr.contains("0 faults"), "{}", alone.stderr);
}

#[test]
fn a_new_grader_asks_no_model_that_the_recorded_run_did_not_grant() {
    let bench = granted_run(&component("granted_tool"), r#"["list", {"text": "/"}]"#, "");
    assert_eq!(run(&bench).code, 0);
    let judged = component("judged_grader");
    let refused = bench.run(&["replay", "--all", "--grader", &judged, "--run", "run"]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    for text in [judged.as_str(), "`judge`", "judges answers", "[grader.grants]", "endpoints = [\"judge\"]"] {
        assert!(refused.stderr.contains(text), "no {text:?} in {}", refused.stderr);
    }
}

#[test]
fn an_agent_asks_the_endpoints_that_it_is_granted_and_no_other() {
    let extra = "[agent.grants]\nendpoints = [\"helper\"]\n[endpoint.helper]\nscripted.replies = [{ text = \"helped\" }]\n\
                 [endpoint.other]\nscripted.replies = [{ text = \"never\" }]";
    let bench = granted_run(&component("granted_tool"), "", extra);
    refused(&bench, &["`agent.grants`", "`helper`", "does not ask for"]);
    // The same agent with a manifest in a file beside it.
    std::fs::copy(component("nasty_agent"), bench.path().join("agent.wasm")).unwrap();
    bench.write("agent.manifest.json", "{\"endpoints\":[{\"name\":\"helper\",\"why\":\"knows more\"}]}");
    bench.replace(&component("nasty_agent"), "agent.wasm");
    let item = |id: &str, name: &str| {
        format!("{{\"id\":\"{id}\",\"input\":{{\"behaviour\":\"endpoint\",\"text\":\"{name}\"}},\"world\":null}}\n")
    };
    bench.write("test.jsonl", &(item("a", "helper") + &item("b", "other")));
    bench.replace("sampled_rollouts = 1", "sampled_rollouts = 2");
    let finished = run(&bench);
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    let shown = |index: usize| {
        let id = format!("eval-scripted-sampled-00000-{index:04}");
        bench.succeed(&["rollouts", "show", &id, "--run", "run"]).stdout
    };
    assert!(shown(0).contains("helped"), "{}", shown(0));
    assert!(shown(1).contains("[agent.grants]") && !shown(1).contains("never"), "{}", shown(1));
    bench.replace("endpoints = [\"helper\"]", "");
    let asked = bench.command(&["run", "run.toml", "--run", "again"]).output().unwrap();
    let stderr = String::from_utf8(asked.stderr).unwrap();
    assert!(stderr.contains("knows more") && stderr.contains("endpoints = [\"helper\"]"), "{stderr}");
}

#[test]
fn limits_of_one_plugin_are_narrower_than_the_runs() {
    let tool = component("granted_tool");
    let call = r#"["list", {"text": "/"}]"#;
    let wide =
        granted_run(&tool, call, "[limits]\nguest_cpu_ms_max = 100\n[tools.granted.limits]\nguest_cpu_ms_max = 200");
    refused(&wide, &["tools.granted.limits.guest_cpu_ms_max", "200", "limits.guest_cpu_ms_max", "100"]);
    let unknown = granted_run(&tool, call, "[tools.granted.limits]\nllm_calls_max = 1");
    refused(&unknown, &["tools.granted.limits.llm_calls_max", "there is no limit", "guest_cpu_ms_max"]);
    // The tool alone cannot start in one page of memory; the agent can.
    let narrow = granted_run(&tool, call, "[tools.granted.limits]\nmemory_bytes_max = 65536");
    let result = run(&narrow).json();
    assert_eq!(result["evaluation"]["sampled"]["outcomes"]["tool-fault"], 1, "{result}");
}

#[test]
fn plugin_check_tells_what_is_asked_for() {
    let bench = Bench::new();
    let shown = bench.succeed(&["plugin", "check", &component("granted_tool")]).stdout;
    for text in [
        "folder docs, optional: reads \"notes\" in it",
        "folders.docs = ",
        "origin http://service.test:47002",
        "sqlite.shop = ",
        "[tools.NAME.grants]",
        "http_calls_max",
    ] {
        assert!(shown.contains(text), "no {text:?} in\n{shown}");
    }
    let none = bench.succeed(&["plugin", "check", &component("rooms_tool")]).stdout;
    assert!(none.contains("no grants"), "{none}");
    let json = bench.succeed(&["plugin", "check", &component("judged_grader"), "--output", "json"]).json();
    assert_eq!(json["manifest"]["endpoints"][0]["name"], "judge", "{json}");
}
