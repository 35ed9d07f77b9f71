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

/// Writes an example's data as JSONL files.
#[derive(Debug, Parser)]
pub struct Arguments {
    /// Seed from which everything follows.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Folder to write into.
    #[arg(long)]
    pub out: PathBuf,
}

impl Arguments {
    /// The folder to write into, made where it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn folder(&self) -> anyhow::Result<&Path> {
        std::fs::create_dir_all(&self.out).with_context(|| format!("cannot create `{}`", self.out.display()))?;
        Ok(&self.out)
    }
}

/// Writes `{name}.jsonl`, unless it has that content already.
///
/// # Errors
/// When it cannot be written.
pub fn write<T: Serialize>(folder: &Path, name: &str, lines: &[T]) -> anyhow::Result<()> {
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
