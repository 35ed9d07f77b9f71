//! What the examples' data has in common: splits, conversations of demonstrations, and the program that writes the files.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use fulgurite_core::seed::Seed;
use serde::Serialize;

/// Of so many parts of what can be asked, one is validation and one is test data.
const PARTS: u64 = 10;

/// Which part of the data something belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Trained on.
    Train,
    /// Looked at by algorithms.
    Val,
    /// Drawn by the host alone.
    Test,
}

impl Split {
    /// The part that something belongs to for ever, by its hash. The data's own seed must not be in it.
    #[must_use]
    pub const fn of(hash: Seed) -> Self {
        match hash.value() % PARTS {
            0 => Self::Val,
            1 => Self::Test,
            _ => Self::Train,
        }
    }
}

/// A demonstration, in the shape of a dataset item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Demonstration<Input> {
    /// Its id.
    pub id: String,
    /// What an agent would see.
    pub input: Input,
    /// The conversation, which an algorithm sees with the grant `read-reference`.
    pub reference: DemonstrationReference,
}

/// The conversation of a demonstration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DemonstrationReference {
    /// Its messages: the very shape that the agent's conversation has.
    pub messages: Vec<Message>,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `user`, `assistant` or `tool`.
    pub role: &'static str,
    /// What is said.
    pub content: String,
    /// Tool calls of an assistant message.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

impl Message {
    /// A message that says something.
    #[must_use]
    pub fn say(role: &'static str, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), tool_calls: vec![] }
    }

    /// The assistant's call of a tool.
    #[must_use]
    pub fn call(name: &'static str, arguments: serde_json::Value) -> Self {
        Self { tool_calls: vec![ToolCall { name, arguments }], ..Self::say("assistant", "") }
    }
}

/// A tool call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ToolCall {
    /// The tool's name.
    pub name: &'static str,
    /// Its arguments.
    pub arguments: serde_json::Value,
}

/// All of an example's data.
#[derive(Debug, Clone, PartialEq)]
pub struct Data<Item, Input> {
    /// Trained on.
    pub train: Vec<Item>,
    /// Looked at by algorithms.
    pub val: Vec<Item>,
    /// Drawn by the host alone.
    pub test: Vec<Item>,
    /// Noisy conversations for supervised training.
    pub demonstrations: Vec<Demonstration<Input>>,
}

impl<Item: Serialize, Input: Serialize> Data<Item, Input> {
    /// Writes a JSONL file of each part into a folder, which is made where it is missing. A file that has its content already is
    /// left alone.
    ///
    /// # Errors
    /// When the folder cannot be made or a file cannot be written.
    pub fn write(&self, folder: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create `{}`", folder.display()))?;
        write(folder, "train", &self.train)?;
        write(folder, "val", &self.val)?;
        write(folder, "test", &self.test)?;
        write(folder, "demonstrations", &self.demonstrations)
    }
}

/// Writes an example's data as JSONL files.
#[derive(Debug, Parser)]
struct Arguments {
    /// Seed from which everything follows.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder to write into.
    #[arg(long)]
    out: PathBuf,
}

/// The program of an example: makes its data with the seed of the command line, and writes it.
///
/// # Errors
/// See [`Data::write`].
pub fn run<Item: Serialize, Input: Serialize>(generate: impl FnOnce(Seed) -> Data<Item, Input>) -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    generate(Seed::new(arguments.seed)).write(&arguments.out)
}

/// Writes `{name}.jsonl`, unless it has that content already.
fn write<T: Serialize>(folder: &Path, name: &str, lines: &[T]) -> anyhow::Result<()> {
    let path = folder.join(format!("{name}.jsonl"));
    let mut text = String::new();
    for line in lines {
        writeln!(text, "{}", serde_json::to_string(line)?)?;
    }
    if std::fs::read(&path).is_ok_and(|old| old == text.as_bytes()) {
        println!("{:>6} lines unchanged  {}", lines.len(), path.display());
        return Ok(());
    }
    std::fs::write(&path, text).with_context(|| format!("cannot write `{}`", path.display()))?;
    println!("{:>6} lines            {}", lines.len(), path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_a_file_of_lines() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("made/where/missing");
        let reference = DemonstrationReference { messages: vec![Message::say("user", "Hi")] };
        let demonstrations = vec![Demonstration { id: "d".to_owned(), input: "in", reference }];
        let data = Data { train: vec![1, 2], val: vec![3], test: vec![], demonstrations };
        data.write(&folder).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.join(format!("{name}.jsonl"))).unwrap();
        assert_eq!(["train", "val", "test"].map(read), ["1\n2\n", "3\n", ""]);
        let demonstration = r#"{"id":"d","input":"in","reference":{"messages":[{"role":"user","content":"Hi"}]}}"#;
        assert_eq!(read("demonstrations"), format!("{demonstration}\n"));
    }
}
