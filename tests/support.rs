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

/// A reward of each answer that differs from rollout to rollout, so that there is something to learn.
pub(crate) const DIFFERS: &str = r#"
[[reward.term]]
kind = "format"
pattern = '[0-9R]'
per = "call"
sum_into = "reward"
"#;

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

    /// A config whose agent does what each item's program says, which the grader likes whatever it was, and which trains by GRPO
    /// for a few small steps. `stage` is added to the config of the stage, `more` to the whole; `items` are programs and worlds.
    pub(crate) fn programmed(items: &[(&str, &str)], stage: &str, more: &str) -> Self {
        let bench = Self::with_items(20, 20, 2);
        let config = format!(
            r#"
name = "programmed"
[agent]
component = "{agent}"
[grader]
component = "{grader}"
[dataset.items]
train = "items.jsonl"
test = "held-out.jsonl"
[dataset.demonstrations]
train = "demonstrations.jsonl"
[policy.local.model]
preset = "tiny"
context_tokens_max = 256
[policy.local.tokenizer]
corpus = ["demonstrations"]
vocab_size = 384
[rollout.sampling]
max_tokens = 8
[evaluation]
dataset = "items"
sampled_rollouts = 2
greedy_rollouts = 2
{more}
[[stage]]
name = "grpo"
algorithm = "{algorithm}"
dataset = "items"
[stage.config]
steps = 2
groups_per_step = 2
group_size = 4
{stage}
"#,
            agent = component("nasty_agent"),
            grader = component("nasty_grader"),
            algorithm = component("grpo"),
        );
        bench.write("run.toml", &config);
        let item = |name: &str, number: usize, program: &str, world: &str| {
            format!(
                "{{\"id\":\"{name}-{number}\",\"input\":{{\"behaviour\":\"program\",\"program\":[{program}]}},\"world\":{world},\"reference\":{{}}}}\n"
            )
        };
        let train = items.iter().enumerate().map(|(number, (program, world))| item("item", number, program, world));
        bench.write("items.jsonl", &train.collect::<String>());
        bench
            .write("held-out.jsonl", &(0..2).map(|number| item("test", number, r#""chat""#, "{}")).collect::<String>());
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
