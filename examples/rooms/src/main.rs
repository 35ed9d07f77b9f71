//! Writes the example's data: `cargo run --release -p rooms-data -- --seed 0 --out DIR`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use fulgurite_core::seed::Seed;
use serde::Serialize;

/// Writes the data of the example of booking a meeting room as JSONL files.
#[derive(Debug, Parser)]
struct Arguments {
    /// Seed from which everything follows.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder to write into.
    #[arg(long)]
    out: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let data = rooms_data::generate(Seed::new(arguments.seed));
    std::fs::create_dir_all(&arguments.out).with_context(|| format!("cannot create `{}`", arguments.out.display()))?;
    write(&arguments.out, "train", &data.train)?;
    write(&arguments.out, "val", &data.val)?;
    write(&arguments.out, "test", &data.test)?;
    write(&arguments.out, "demonstrations", &data.demonstrations)
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
