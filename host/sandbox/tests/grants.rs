//! What tools and graders can be granted, with real components: folders, HTTP, SQLite, a judge.
#![allow(clippy::panic, clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use fulgurite_core::grant::{Capability, EndpointGrants, GrantError, ToolGrants};
use fulgurite_core::host_call::{HostCall, HostCallLog, NoLog, Remembered};
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::LlmSession;
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::seed::Seed;
use fulgurite_core::span::SpanRefused;
use fulgurite_core::tool::{ToolError, ToolHost};
use fulgurite_sandbox::{GradeReport, GradeRun, Judge, PluginError, ToolCapabilities, ToolPlugin};
use serde_json::{Value, json};
use support::{START_NS, Scripted, guest, sandbox};

const SECRET: &str = "s3cr3t-api-key-value";
/// The origin that the guest's manifest names; tests put that of their own server there.
const ORIGIN_IN_MANIFEST: &str = "http://127.0.0.1:47001";

/// The tool with another port in its manifest, of as many digits, so that its component stays whole.
fn tool_asking_for(port: u16, folder: &Path) -> PathBuf {
    let origin = format!("http://127.0.0.1:{port}");
    assert_eq!(origin.len(), ORIGIN_IN_MANIFEST.len(), "ports that the system gives have five digits");
    let mut bytes = std::fs::read(guest("granted_tool")).unwrap();
    let section = bytes.windows(18).position(|window| window == b"fulgurite:manifest").unwrap();
    let named = |window: &[u8]| window == ORIGIN_IN_MANIFEST.as_bytes();
    let at = section + bytes[section..].windows(origin.len()).position(named).unwrap();
    bytes[at..at + origin.len()].copy_from_slice(origin.as_bytes());
    let path = folder.join("tool.wasm");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn open_capabilities(grants: &Value, limits: &Limits) -> ToolCapabilities {
    let grants: ToolGrants = serde_json::from_value(grants.clone()).unwrap();
    ToolCapabilities::open("tools.granted", &grants, limits, &[], &|name| (name == "KEY").then(|| SECRET.to_owned()))
        .unwrap()
}

fn load(path: &Path, grants: &Value) -> Arc<ToolPlugin> {
    sandbox().load_granted_tool(path, open_capabilities(grants, &Limits::default())).unwrap()
}

async fn open(plugin: &ToolPlugin, limits: &Limits, log: Arc<dyn HostCallLog>) -> Arc<dyn ToolHost> {
    plugin.open_recorded("null".to_owned(), Seed::new(7), limits, START_NS, log).await.unwrap()
}

async fn call(tool: &Arc<dyn ToolHost>, name: &str, arguments: Value) -> Result<Value, ToolError> {
    let answer = tool.call(name.to_owned(), arguments.to_string()).await;
    answer.map(|text| serde_json::from_str(&text).unwrap())
}

#[track_caller]
fn failed(answer: Result<Value, ToolError>) -> String {
    match answer {
        Err(ToolError::Failed(text)) => text,
        other => panic!("{other:?}"),
    }
}

/// Keeps calls, and answers from a record.
#[derive(Default)]
struct Log {
    calls: Mutex<Vec<(HostCall, String)>>,
    recorded: Mutex<Vec<(HostCall, String)>>,
}

impl Log {
    fn replaying(calls: Vec<(HostCall, String)>) -> Arc<Self> {
        Arc::new(Self { calls: Mutex::default(), recorded: Mutex::new(calls) })
    }

    fn calls(&self) -> Vec<(HostCall, String)> {
        self.calls.lock().unwrap().clone()
    }
}

impl HostCallLog for Log {
    fn remembered(&self, call: &HostCall) -> Remembered {
        let mut recorded = self.recorded.lock().unwrap();
        match recorded.first() {
            None => Remembered::Nothing,
            Some((first, _)) if first == call => Remembered::Result(recorded.remove(0).1),
            Some((first, _)) => Remembered::Differs(format!("{} instead of {}", call.arguments, first.arguments)),
        }
    }

    fn record(&self, call: HostCall, result: String) -> Result<(), SpanRefused> {
        self.calls.lock().unwrap().push((call, result));
        Ok(())
    }
}

/// A server on this machine that answers every request with its head.
fn echo_server() -> (u16, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let heard = Arc::new(Mutex::new(vec![]));
    let keep = Arc::clone(&heard);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            while reader.read_line(&mut head).unwrap() > 2 {}
            keep.lock().unwrap().push(head.clone());
            let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{head}", head.len());
        }
    });
    (port, heard)
}

fn docs() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("docs/sub")).unwrap();
    for (name, text) in
        [("docs/b.txt", "second"), ("docs/a.txt", "first"), ("docs/sub/c.txt", "third"), ("secret", "x")]
    {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

#[tokio::test]
async fn a_granted_folder_is_read_and_never_left_or_written() {
    let folder = docs();
    let grants = json!({"folders": {"docs": folder.path().join("docs")}});
    let tool = open(&load(&guest("granted_tool"), &grants), &Limits::default(), Arc::new(NoLog)).await;
    assert_eq!(call(&tool, "read", json!({"text": "/docs/a.txt"})).await, Ok(json!("first")));
    assert_eq!(call(&tool, "read", json!({"text": "/docs/sub/../sub/c.txt"})).await, Ok(json!("third")));
    assert_eq!(call(&tool, "list", json!({"text": "/docs"})).await, Ok(json!(["a.txt", "b.txt", "sub"])));
    let about = json!({"bytes": 5, "folder": false, "times": false});
    let found = call(&tool, "about", json!({"text": "/docs/a.txt"})).await.unwrap();
    assert_eq!((&found["bytes"], &found["folder"]), (&about["bytes"], &about["folder"]), "{found}");
    for path in
        ["/docs/../secret", "/docs/sub/../../secret", "/secret", "/etc/passwd", "../secret", "/docs/no", "/docs"]
    {
        failed(call(&tool, "read", json!({"text": path})).await);
    }
    let errors = call(&tool, "write", json!({"text": "/docs"})).await.unwrap();
    assert_eq!(errors.as_array().unwrap().len(), 8, "{errors}");
    let mut names: Vec<_> =
        std::fs::read_dir(folder.path().join("docs")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["a.txt", "b.txt", "sub"]);
    assert_eq!(tool.not_forkable(), None);
}

#[tokio::test]
async fn a_file_that_changes_under_a_run_ends_the_attempt() {
    let folder = docs();
    let grants = json!({"folders": {"docs": folder.path().join("docs")}});
    let plugin = load(&guest("granted_tool"), &grants);
    std::fs::write(folder.path().join("docs/a.txt"), "other").unwrap();
    let tool = open(&plugin, &Limits::default(), Arc::new(NoLog)).await;
    match call(&tool, "read", json!({"text": "/docs/a.txt"})).await {
        Err(ToolError::Fault { detail, .. }) => assert!(detail.contains("has changed"), "{detail}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_is_not_granted_is_denied_with_the_line_that_would_allow_it() {
    let tool = open(&load(&guest("granted_tool"), &json!({})), &Limits::default(), Arc::new(NoLog)).await;
    let text = failed(call(&tool, "query", json!({"sql": "SELECT 1"})).await);
    assert!(text.contains("[tools.granted.grants]\nsqlite.shop = "), "{text}");
    let text = failed(call(&tool, "fetch", json!({"url": "http://127.0.0.1:47001/"})).await);
    assert!(text.contains("[tools.granted.grants]\nhttp = [{ origin = \"http://127.0.0.1:47001\" }]"), "{text}");
    failed(call(&tool, "read", json!({"text": "/docs/a.txt"})).await);
    assert_eq!(tool.not_forkable(), None);
}

#[test]
fn manifest_and_config_must_fit() {
    let folder = docs();
    let load = |grants: Value| {
        sandbox().load_granted_tool(&guest("granted_tool"), open_capabilities(&grants, &Limits::default()))
    };
    match load(json!({"folders": {"home": folder.path().join("docs")}})) {
        Err(PluginError::Grant { source: GrantError::NotAsked { name, .. }, .. }) => assert_eq!(name, "home"),
        other => panic!("{other:?}"),
    }
    // A manifest in a file beside a component that has none, that cannot do without.
    let bare = folder.path().join("bare.wasm");
    std::fs::copy(guest("nasty_tool"), &bare).unwrap();
    let beside = |text: &str| std::fs::write(folder.path().join("bare.manifest.json"), text).unwrap();
    beside(r#"{"folders":[{"name":"docs","why":"knows nothing else"}]}"#);
    let error = sandbox().load_tool(&bare).unwrap_err();
    let text = std::error::Error::source(&error).unwrap().to_string();
    assert!(text.contains("knows nothing else") && text.contains("folders.docs = "), "{text}");
    let grants = json!({"folders": {"docs": folder.path().join("docs")}});
    sandbox().load_granted_tool(&bare, open_capabilities(&grants, &Limits::default())).unwrap();
    beside(r#"{"endpoints":["judge"]}"#);
    let error = sandbox().load_tool(&bare).unwrap_err();
    assert!(matches!(error, PluginError::NeverGranted { capability: Capability::Endpoint, .. }), "{error}");
    beside("{");
    assert!(matches!(sandbox().load_tool(&bare), Err(PluginError::Manifest { .. })));
    // HTTP and writable data are never an agent's.
    let agent = folder.path().join("agent.wasm");
    std::fs::copy(guest("rooms_agent"), &agent).unwrap();
    std::fs::write(folder.path().join("agent.manifest.json"), r#"{"http":["https://a.example"]}"#).unwrap();
    let error = sandbox().load_agent(&agent).unwrap_err().to_string();
    assert!(error.contains("which no agent is given; make a tool"), "{error}");
    let info = sandbox().inspect(&guest("granted_tool")).unwrap();
    assert_eq!(info.manifest.asks().count(), 4);
    assert_eq!(info.refused().count(), 0);
}

#[tokio::test]
async fn http_goes_to_granted_servers_and_the_secret_to_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    let (port, heard) = echo_server();
    let origin = format!("http://127.0.0.1:{port}");
    let headers = json!({"authorization": {"env": "KEY", "prefix": "Bearer "}});
    let grants = json!({"http": [{"origin": origin, "headers": headers, "allow_private": ["127.0.0.1"]}]});
    let plugin = load(&tool_asking_for(port, folder.path()), &grants);
    let log = Arc::new(Log::default());
    let tool = open(&plugin, &Limits { http_calls_max: 2, ..Limits::default() }, Arc::clone(&log) as _).await;
    assert_eq!(tool.not_forkable(), None);
    let answer =
        call(&tool, "fetch", json!({"url": format!("{origin}/a"), "headers": [["x-own", "1"]]})).await.unwrap();
    assert_eq!(answer["status"], 200);
    assert!(heard.lock().unwrap()[0].contains(&format!("authorization: Bearer {SECRET}")));
    assert!(tool.not_forkable().unwrap().contains(&origin), "{:?}", tool.not_forkable());
    // The server told it back; neither the tool nor the record has it.
    assert!(answer["body"].as_str().unwrap().contains("Bearer [redacted]"), "{answer}");
    let text = failed(call(&tool, "fetch", json!({"url": "http://169.254.169.254/latest/meta-data"})).await);
    assert!(text.contains("not granted"), "{text}");
    let text = failed(call(&tool, "fetch", json!({"url": format!("{origin}/b")})).await);
    assert!(text.contains("http_calls_max of 2"), "{text}");
    let calls = log.calls();
    assert_eq!(calls.len(), 2, "what is refused before it is a call is none");
    assert!(!format!("{answer}{calls:?}").contains(SECRET));
    assert!(!plugin.capabilities().record().contains(SECRET));
    assert_eq!(heard.lock().unwrap().len(), 1);

    // Again from the record: the server hears nothing, and the tool sees the same.
    let replayed = open(&plugin, &Limits::default(), Log::replaying(calls.clone())).await;
    let again = call(&replayed, "fetch", json!({"url": format!("{origin}/a"), "headers": [["x-own", "1"]]})).await;
    assert_eq!(again, Ok(answer));
    assert_eq!(heard.lock().unwrap().len(), 1);
    assert_eq!(replayed.not_forkable(), None, "nothing was sent");
    let other = open(&plugin, &Limits::default(), Log::replaying(calls)).await;
    match call(&other, "fetch", json!({"url": format!("{origin}/other")})).await {
        Err(ToolError::Fault { detail, .. }) => assert!(detail.contains("differs from the record"), "{detail}"),
        answer => panic!("{answer:?}"),
    }
}

#[tokio::test]
async fn a_private_address_must_be_named() {
    let folder = tempfile::tempdir().unwrap();
    let (port, heard) = echo_server();
    let origin = format!("http://127.0.0.1:{port}");
    let plugin = load(&tool_asking_for(port, folder.path()), &json!({"http": [{"origin": origin}]}));
    let tool = open(&plugin, &Limits::default(), Arc::new(NoLog)).await;
    let text = failed(call(&tool, "fetch", json!({"url": origin})).await);
    assert!(text.contains("loopback") && text.contains("allow_private = [\"127.0.0.1\"]"), "{text}");
    assert!(heard.lock().unwrap().is_empty());
}

fn shop(folder: &Path) -> PathBuf {
    let path = folder.join("shop.sqlite");
    let script = "CREATE TABLE goods (name TEXT, price INTEGER); INSERT INTO goods VALUES ('lamp', 12), ('chair', 40)";
    rusqlite::Connection::open(&path).unwrap().execute_batch(script).unwrap();
    path
}

#[tokio::test]
async fn every_rollout_has_a_database_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = shop(folder.path());
    let before = std::fs::read(&path).unwrap();
    let plugin = load(&guest("granted_tool"), &json!({"sqlite": {"shop": path}}));
    let log = Arc::new(Log::default());
    let first = open(&plugin, &Limits::default(), Arc::clone(&log) as _).await;
    let all = || json!({"sql": "SELECT name, price FROM goods ORDER BY price"});
    assert_eq!(call(&first, "query", all()).await, Ok(json!([["lamp", 12], ["chair", 40]])));
    let insert = json!({"sql": "INSERT INTO goods VALUES (?, 1)", "parameters": ["pen"]});
    assert_eq!(call(&first, "execute", insert).await, Ok(json!(1)));
    assert_eq!(call(&first, "query", all()).await.unwrap().as_array().unwrap().len(), 3, "open again is the same copy");
    let second = open(&plugin, &Limits::default(), Arc::new(NoLog)).await;
    assert_eq!(call(&second, "query", all()).await, Ok(json!([["lamp", 12], ["chair", 40]])));
    assert_eq!(std::fs::read(&path).unwrap(), before);
    // Recorded are statements and hashes, not rows.
    let calls = log.calls();
    assert_eq!(calls.len(), 3);
    assert!(calls[1].0.arguments.contains("INSERT INTO goods") && calls[1].0.arguments.contains("pen"));
    assert!(calls.iter().all(|(_, result)| result.starts_with("{\"hash\":")), "{calls:?}");
    assert_eq!(first.not_forkable(), None);
    let now = call(&second, "query", json!({"sql": "SELECT unixepoch(), random()"})).await.unwrap();
    assert_eq!(now[0][0], START_NS / 1_000_000_000);
    let third = open(&plugin, &Limits::default(), Arc::new(NoLog)).await;
    assert_eq!(call(&third, "query", json!({"sql": "SELECT unixepoch(), random()"})).await, Ok(now));
}

#[tokio::test]
async fn statements_cannot_leave_the_database_or_run_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let plugin = load(&guest("granted_tool"), &json!({"sqlite": {"shop": shop(folder.path())}}));
    let limits = Limits { sqlite_steps_max: 100_000, guest_cpu_ms_max: 500, ..Limits::default() };
    let tool = open(&plugin, &limits, Arc::new(NoLog)).await;
    let target = folder.path().join("new.sqlite");
    let attach = format!("ATTACH '{}' AS other", target.display());
    assert!(failed(call(&tool, "execute", json!({"sql": attach})).await).contains("ATTACH"));
    assert!(!target.exists());
    let endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT count(*) FROM c";
    let text = failed(call(&tool, "query", json!({"sql": endless})).await);
    assert!(text.contains("sqlite_steps_max of 100000"), "{text}");
    assert!(failed(call(&tool, "query", json!({"sql": "SELEC"})).await).contains("syntax error"));
    let text = failed(call(&tool, "query", json!({"database": "other", "sql": "SELECT 1"})).await);
    assert!(text.contains("sqlite.other = "), "{text}");
    // The tool goes on as if nothing had happened, and none of it was its own CPU time.
    assert_eq!(call(&tool, "query", json!({"sql": "SELECT 1"})).await, Ok(json!([[1]])));
}

fn judged(reference: &str, judge: Option<Judge>) -> impl Future<Output = Result<GradeReport, AttemptOutcome>> {
    let grants = EndpointGrants { endpoints: vec!["judge".to_owned()] };
    let grader = sandbox().load_granted_grader(&guest("judged_grader"), &grants).unwrap();
    let reference = reference.to_owned();
    async move {
        let run = GradeRun {
            input: "null".to_owned(),
            world: "null".to_owned(),
            reference,
            outcome: &AttemptOutcome::completed("0.5".to_owned()),
            spans: [&[], &[]],
            seed: Seed::new(1),
            limits: &Limits { llm_calls_max: 1, ..Limits::default() },
            start_unix_ns: START_NS,
            judge,
        };
        grader.grade(run).await
    }
}

#[tokio::test]
async fn a_grader_asks_the_judge_that_it_is_granted_and_nobody_else() {
    let model = Arc::new(Scripted { answer: Some("0.75".to_owned()), ..Scripted::default() });
    let log = Arc::new(Log::default());
    let session = Arc::clone(&model) as Arc<dyn LlmSession>;
    let judge = Judge { sessions: BTreeMap::from([("judge".to_owned(), session)]), log: Arc::clone(&log) as _ };
    let report = judged("null", Some(judge.clone())).await.unwrap();
    assert!((report.rewards[0].value - 0.75).abs() < f64::EPSILON);
    let asked = model.asked.lock().unwrap()[0].1.clone();
    assert_eq!((asked.messages[1].content.as_str(), asked.endpoint.as_deref()), ("0.5", Some("judge")));
    assert!(asked.sampling.temperature.abs() < f32::EPSILON && asked.sampling.max_tokens == 8);

    let fault = judged("\"other\"", Some(judge)).await.unwrap_err();
    assert_eq!(fault.kind, OutcomeKind::GraderFault);
    assert!(fault.detail.contains("[grader.grants]\nendpoints = [\"other\"]"), "{}", fault.detail);

    // Graded again from the record, by a model that is not there.
    let gone = Arc::new(Scripted { silent: true, ..Scripted::default() });
    let sessions = BTreeMap::from([("judge".to_owned(), Arc::clone(&gone) as Arc<dyn LlmSession>)]);
    let replay = Judge { sessions, log: Log::replaying(log.calls()) };
    let again = judged("null", Some(replay)).await.unwrap();
    assert_eq!(again.rewards, report.rewards);
    assert!(gone.asked.lock().unwrap().is_empty());
}

#[test]
fn a_grader_without_the_grant_is_not_loaded() {
    let error = sandbox().load_grader(&guest("judged_grader")).unwrap_err();
    let text = std::error::Error::source(&error).unwrap().to_string();
    assert!(text.contains("judges answers") && text.contains("[grader.grants]\nendpoints = [\"judge\"]"), "{text}");
    // Without a manifest that asks, the import alone is refused.
    let folder = tempfile::tempdir().unwrap();
    let silent = folder.path().join("silent.wasm");
    let mut bytes = std::fs::read(guest("judged_grader")).unwrap();
    let name = b"fulgurite:manifest";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
    bytes[at..at + name.len()].copy_from_slice(b"fulgurite:manifesT");
    std::fs::write(&silent, bytes).unwrap();
    match sandbox().load_grader(&silent) {
        Err(PluginError::ImportNotOffered { import, .. }) => assert!(import.contains("judge"), "{import}"),
        other => panic!("{other:?}"),
    }
    let granted = BTreeSet::from([(Capability::Endpoint, "judge".to_owned())]);
    assert_eq!(sandbox().manifest(&guest("judged_grader")).unwrap().compare("grader", &granted), Ok(()));
}
