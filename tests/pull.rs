//! `fulgurite policy pull` against a stand-in of the hub that this test serves itself.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::{Finished, root};
use tempfile::TempDir;

const REPO: &str = "someone/tiny-qwen3";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const SHARD: &str = "model-00002-of-00003.safetensors";

/// What the hub does wrong.
#[derive(Default)]
struct Faults {
    /// Answers about a shard that end after so many bytes, one after the other; 0 closes the connection without any.
    cuts: Vec<usize>,
    /// Ranges are not known here.
    no_ranges: bool,
    /// The shard is told with another hash.
    wrong_hash: bool,
    /// The shard is told with another size.
    wrong_size: bool,
}

struct State {
    files: BTreeMap<String, Vec<u8>>,
    faults: Mutex<Faults>,
    /// Path and range of every request.
    seen: Mutex<Vec<(String, Option<String>)>>,
}

/// A hub with one model, and a folder for what comes of it.
struct Hub {
    state: Arc<State>,
    endpoint: String,
    folder: TempDir,
}

impl Hub {
    fn new() -> Self {
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(root().join("tests/parity/fixtures/qwen3-sharded-bf16")).unwrap() {
            let path = entry.unwrap().path();
            files.insert(path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap());
        }
        for name in ["pytorch_model.bin", "model.gguf", "README.md", "onnx/model.onnx", "consolidated.safetensors"] {
            files.insert(name.to_owned(), vec![7; 1_000]);
        }
        let state = Arc::new(State { files, faults: Mutex::default(), seen: Mutex::default() });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let served = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let state = served.clone();
                std::thread::spawn(move || answer(&state, stream.unwrap()));
            }
        });
        Self { state, endpoint, folder: tempfile::tempdir().unwrap() }
    }

    fn pull_from(&self, endpoint: &str, arguments: &[&str]) -> Finished {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_fulgurite"));
        command.args(["policy", "pull"]).args(arguments).current_dir(self.folder.path());
        for name in ["RUST_LOG", "HF_TOKEN", "http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"] {
            command.env_remove(name);
        }
        command.env("NO_COLOR", "1").env("HF_ENDPOINT", endpoint);
        command.env("FULGURITE_CACHE_DIR", self.folder.path().join("cache"));
        Finished::new(command.output().unwrap())
    }

    fn pull(&self, arguments: &[&str]) -> Finished {
        self.pull_from(&self.endpoint, arguments)
    }

    fn succeed(&self, arguments: &[&str]) -> Finished {
        let finished = self.pull(arguments);
        assert_eq!(finished.code, 0, "{}", finished.stderr);
        finished
    }

    fn fail(&self, code: i32, arguments: &[&str], expected: &[&str]) {
        let finished = self.pull(arguments);
        assert_eq!(finished.code, code, "{}", finished.stderr);
        for text in expected {
            assert!(finished.stderr.contains(text), "no {text:?} in\n{}", finished.stderr);
        }
    }

    fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.state.faults.lock().unwrap());
    }

    /// Paths and ranges since the last time.
    fn seen(&self) -> Vec<(String, Option<String>)> {
        std::mem::take(&mut self.state.seen.lock().unwrap())
    }

    /// Where in the shard the requests since the last time began.
    fn starts(&self) -> Vec<usize> {
        let ranges = self.seen().into_iter().filter(|(path, _)| path.starts_with("/cdn/") && path.ends_with(SHARD));
        let start = |range: String| range.split_once('-').unwrap().0.strip_prefix("bytes=").unwrap().parse().unwrap();
        ranges.map(|(_, range)| start(range.unwrap())).collect()
    }

    fn is_whole(&self, folder: &str) -> bool {
        let read = |name: &str| std::fs::read(self.folder.path().join(folder).join(name)).ok();
        let wanted = |name: &&String| !name.contains("expected") && (name.contains("model-") || name.ends_with("json"));
        self.state.files.keys().filter(wanted).all(|name| read(name).as_ref() == self.state.files.get(name))
    }
}

fn answer(state: &State, mut stream: TcpStream) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    // One request per connection; a client that goes away is no fault of the server.
    let Some(request) = lines.next() else { return };
    let path = request.split(' ').nth(1).unwrap().to_owned();
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let range = headers.iter().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("range").then(|| value.trim().to_owned())
    });
    state.seen.lock().unwrap().push((path.clone(), range.clone()));
    let (status, extra, body, announced) = respond(state, &path, range.as_deref());
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {announced}\r\n{extra}\r\n");
    drop(stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body)));
}

/// Status, further headers, body, and the length that is announced for it.
fn respond(state: &State, path: &str, range: Option<&str>) -> (&'static str, String, Vec<u8>, usize) {
    let whole = |status, extra: String, body: Vec<u8>| {
        let len = body.len();
        (status, extra, body, len)
    };
    let not_found = || whole("404 Not Found", String::new(), b"{}".to_vec());
    if let Some(rest) = path.strip_prefix("/api/models/") {
        if rest != format!("{REPO}/revision/main?blobs=true") {
            return not_found();
        }
        return whole("200 OK", String::new(), listing(state).to_string().into_bytes());
    }
    if let Some(name) = path.strip_prefix(&format!("/{REPO}/resolve/{COMMIT}/")) {
        return whole("302 Found", format!("Location: /cdn/{name}\r\n"), vec![]);
    }
    let Some((name, file)) = path.strip_prefix("/cdn/").and_then(|name| Some((name, state.files.get(name)?))) else {
        return not_found();
    };
    let mut faults = state.faults.lock().unwrap();
    let from = match range.filter(|_| !faults.no_ranges) {
        Some(range) => range.strip_prefix("bytes=").unwrap().split_once('-').unwrap().0.parse().unwrap(),
        None => 0,
    };
    if from >= file.len() {
        return whole("416 Range Not Satisfiable", String::new(), vec![]);
    }
    let rest = &file[from..];
    let cut = if name == SHARD && !faults.cuts.is_empty() { faults.cuts.remove(0) } else { rest.len() };
    let sent = rest[..cut.min(rest.len())].to_vec();
    if faults.no_ranges {
        return ("200 OK", String::new(), sent, rest.len());
    }
    let extra = format!("Content-Range: bytes {from}-{}/{}\r\n", file.len() - 1, file.len());
    ("206 Partial Content", extra, sent, rest.len())
}

fn listing(state: &State) -> Value {
    let faults = state.faults.lock().unwrap();
    let sibling = |(name, content): (&String, &Vec<u8>)| {
        let mut size = content.len();
        if !name.ends_with(".safetensors") {
            return json!({"rfilename": name, "size": size});
        }
        let mut hash = String::new();
        for byte in Sha256::digest(content) {
            write!(hash, "{byte:02x}").unwrap();
        }
        if name == SHARD && faults.wrong_hash {
            hash = "0".repeat(64);
        }
        if name == SHARD && faults.wrong_size {
            size -= 1;
        }
        json!({"rfilename": name, "size": size, "lfs": {"sha256": hash, "size": size, "pointerSize": 134}})
    };
    json!({"sha": COMMIT, "siblings": state.files.iter().map(sibling).collect::<Vec<_>>()})
}

#[test]
fn a_model_comes_once_with_what_is_needed_and_no_more() {
    let hub = Hub::new();
    let pulled = hub.succeed(&[REPO, "--to", "model", "--output", "json"]).json();
    assert_eq!((&pulled["directory"], &pulled["commit"]), (&"model".into(), &COMMIT.into()));
    assert!(hub.is_whole("model"));
    let asked: Vec<String> = hub.seen().into_iter().map(|(path, _)| path).collect();
    for name in [".bin", ".gguf", ".md", ".onnx", "consolidated"] {
        assert!(!asked.iter().any(|path| path.contains(name)), "{asked:?}");
    }
    // The model can be used.
    let mut info = std::process::Command::new(env!("CARGO_BIN_EXE_fulgurite"));
    let info = info.args(["policy", "info", "model"]).current_dir(hub.folder.path()).output().unwrap();
    assert!(info.status.success());
    // The second time only the hub's answer about the revision is needed, and without a network not even that.
    hub.succeed(&[REPO, "--to", "again"]);
    assert!(hub.seen().iter().all(|(path, _)| path.starts_with("/api/")));
    let offline = hub.pull_from("http://127.0.0.1:1", &[REPO, "--to", "third"]);
    assert_eq!(offline.code, 0, "{}", offline.stderr);
    assert!(offline.stderr.contains("cannot reach http://127.0.0.1:1"), "{}", offline.stderr);
    assert!(hub.is_whole("again") && hub.is_whole("third"));
    hub.fail(2, &[REPO, "--to", "model"], &["`model` is there already", "--to"]);
    // What people edit in their folder is not what is kept.
    std::fs::write(hub.folder.path().join("model/config.json"), "{}").unwrap();
    assert!(hub.is_whole("again"));
}

#[test]
fn a_connection_that_breaks_is_taken_up_where_it_was_cut() {
    let hub = Hub::new();
    hub.faults(|faults| faults.cuts = vec![1_000, 2_500]);
    hub.succeed(&[REPO, "--to", "model"]);
    assert_eq!(hub.starts(), [0, 1_000, 3_500]);
    assert!(hub.is_whole("model"));
}

#[test]
fn what_has_come_outlives_the_command() {
    let hub = Hub::new();
    hub.faults(|faults| faults.cuts = vec![1_000, 0, 0, 0, 0]);
    hub.fail(1, &[REPO, "--to", "model"], &[SHARD, "1000 bytes of it are kept", "goes on from there"]);
    assert!(!hub.folder.path().join("model").exists());
    hub.starts();
    let finished = hub.succeed(&[REPO, "--to", "model"]);
    assert_eq!(hub.starts(), [1_000]);
    assert!(finished.stderr.contains("from before"), "{}", finished.stderr);
    assert!(hub.is_whole("model"));
}

#[test]
fn a_server_without_ranges_is_asked_again_from_the_start() {
    let hub = Hub::new();
    hub.faults(|faults| (faults.no_ranges, faults.cuts) = (true, vec![1_000]));
    hub.succeed(&[REPO, "--to", "model"]);
    assert!(hub.is_whole("model"));
}

#[test]
fn a_file_that_is_not_what_was_told_is_not_kept() {
    let hub = Hub::new();
    hub.faults(|faults| faults.wrong_hash = true);
    hub.fail(1, &[REPO, "--to", "model"], &[SHARD, "SHA-256", &"0".repeat(64)]);
    hub.faults(|faults| (faults.wrong_hash, faults.wrong_size) = (false, true));
    hub.fail(1, &[REPO, "--to", "model"], &[SHARD, "bytes and the hub tells of"]);
    assert!(!hub.folder.path().join("model").exists());
    hub.faults(|faults| faults.wrong_size = false);
    hub.starts();
    hub.succeed(&[REPO, "--to", "model"]);
    assert_eq!(hub.starts(), [0], "nothing of the wrong file was used");
    assert!(hub.is_whole("model"));
}

#[test]
fn what_is_not_there_is_said() {
    let hub = Hub::new();
    hub.fail(2, &["someone/else"], &["no model `someone/else`", "`main`", &hub.endpoint]);
    hub.fail(2, &[REPO, "--revision", "v9"], &[REPO, "revision `v9`"]);
    for name in ["../../etc", "a/b/c", "", "a b/c", ".hidden/x"] {
        hub.fail(2, &[name], &["letters, digits"]);
    }
    let offline = hub.pull_from("http://127.0.0.1:1", &[REPO]);
    assert_eq!(offline.code, 1);
    for text in ["cannot reach http://127.0.0.1:1", "HF_ENDPOINT", "policy import"] {
        assert!(offline.stderr.contains(text), "no {text:?} in\n{}", offline.stderr);
    }
    let wrong = hub.pull_from("ftp://x", &[REPO]);
    assert_eq!(wrong.code, 2);
    assert!(wrong.stderr.contains("HF_ENDPOINT is `ftp://x`"), "{}", wrong.stderr);
}
