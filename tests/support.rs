//! A run of the example, small enough for a test: its own folder, its own data, the real binary and the real components.

#![allow(dead_code, reason = "each test binary uses a part of this")]

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use fulgurite_core::seed::Seed;
use serde::Serialize;
use tempfile::TempDir;

/// A folder with a config and its data.
pub(crate) struct Bench {
    folder: TempDir,
}

impl Bench {
    /// A config that trains for a few small steps.
    pub(crate) fn new() -> Self {
        Self::with_items(400, 400, 24)
    }

    /// The same with so many items.
    pub(crate) fn with_items(train: usize, demonstrations: usize, test: usize) -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        let data = rooms_data::generate(Seed::new(0));
        bench.jsonl("train", &data.train[..train]);
        bench.jsonl("val", &data.val[..20]);
        bench.jsonl("test", &data.test[..test]);
        bench.jsonl("demonstrations", &data.demonstrations[..demonstrations]);
        bench.write("run.toml", &config());
        bench
    }

    /// Trains in the folder `run` and kills it after so many lines of progress.
    pub(crate) fn train_until(&self, run: &str, lines: usize) {
        let arguments = ["train", "run.toml", "--run", run];
        let mut child = self.command(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let seen = stderr.lines().map_while(Result::ok).take(lines).count();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(seen, lines, "the run ended before it was killed");
    }

    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file.
    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path().join(name), text).unwrap();
    }

    /// Reads a file.
    pub(crate) fn read(&self, name: &str) -> String {
        let path = self.path().join(name);
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// Replaces a text of the config that must be there.
    pub(crate) fn replace(&self, old: &str, new: &str) {
        let config = self.read("run.toml");
        assert!(config.contains(old), "the config has no {old:?}");
        self.write("run.toml", &config.replace(old, new));
    }

    /// The `fulgurite` command in the folder.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fulgurite"));
        command
            .args(arguments)
            .current_dir(self.path())
            .env("NO_COLOR", "1")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        // Shared by all tests, so that a component is compiled once.
        command.env("FULGURITE_CACHE_DIR", root().join("target/test-cache"));
        command
    }

    /// Runs `fulgurite` to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Finished {
        Finished::new(self.command(arguments).output().unwrap())
    }

    /// Runs `fulgurite` to its end and expects success.
    pub(crate) fn succeed(&self, arguments: &[&str]) -> Finished {
        let finished = self.run(arguments);
        assert_eq!(finished.code, 0, "{arguments:?}\n{}\n{}", finished.stdout, finished.stderr);
        finished
    }

    fn jsonl<T: Serialize>(&self, name: &str, items: &[T]) {
        let mut text = String::new();
        for item in items {
            writeln!(text, "{}", serde_json::to_string(item).unwrap()).unwrap();
        }
        self.write(&format!("{name}.jsonl"), &text);
    }
}

/// How a command ended.
pub(crate) struct Finished {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    pub(crate) fn new(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The last line of standard output as JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        let line = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }
}

/// The workspace's folder.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The path of a component that `cargo xtask guests` has built.
pub(crate) fn component(name: &str) -> String {
    let path = root().join("target/plugins").join(format!("{name}.wasm"));
    assert!(path.is_file(), "{} is missing; run `cargo xtask guests` first", path.display());
    path.display().to_string()
}

fn config() -> String {
    let of = component;
    format!(
        r#"
name = "small"
seed = 7

[agent]
component = "{agent}"
[grader]
component = "{grader}"
[tools.rooms]
component = "{tool}"

[dataset.rooms]
train = "train.jsonl"
val = "val.jsonl"
test = "test.jsonl"
[dataset.demonstrations]
train = "demonstrations.jsonl"

[policy.local.tokenizer]
corpus = ["demonstrations"]
vocab_size = 384
atoms_pattern = 'R\d\d|\d\d:\d\d|\d+'

[rollout.sampling]
max_tokens = 32

[evaluation]
dataset = "rooms"
sampled_rollouts = 24
greedy_rollouts = 24

[checkpoint]
every_steps = 2

[[stage]]
name = "sft"
algorithm = "{sft}"
dataset = "demonstrations"
grants = ["read-reference"]
[stage.config]
steps = 6
batch_size = 16
learning_rate = 1e-3

[[stage]]
name = "grpo"
algorithm = "{grpo}"
dataset = "rooms"
[stage.config]
steps = 5
groups_per_step = 4
group_size = 4
learning_rate = 3e-4

[[baseline]]
name = "always-first"
script.replies = [
  {{ tool = "free_rooms", arguments = '{{"time":"{{{{ match(messages[0].content, "\d\d:\d\d") }}}}"}}' }},
  {{ text = '{{{{ match(messages[-1].content, "R\d\d") }}}}' }},
]
"#,
        agent = of("rooms_agent"),
        grader = of("rooms_grader"),
        tool = of("rooms_tool"),
        sft = of("sft"),
        grpo = of("grpo"),
    )
}
