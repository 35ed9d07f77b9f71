//! `fulgurite bench`: what this machine does, in figures that come with their setup.
//!
//! Every measurement but the policy's runs in a process of its own, so that memory is its own too, and through the code of
//! `fulgurite run`.

mod load;
mod policy;
mod replay;
mod sandbox;
mod store;

use std::process::{Command, Stdio};

use anyhow::{Context, anyhow};
use serde::de::DeserializeOwned;

use crate::arguments::BenchCommand;
use crate::failure::Failure;

pub(crate) fn bench(command: BenchCommand) -> Result<(), Failure> {
    match command {
        BenchCommand::Sandbox(arguments) => sandbox::bench(&arguments),
        BenchCommand::Replay(arguments) => replay::bench(&arguments),
        BenchCommand::Store(arguments) => store::bench(&arguments),
        BenchCommand::Policy(arguments) => crate::runtime()?.block_on(policy::bench(&arguments)),
    }
}

/// Runs this binary once more with these arguments and reads what it measured.
fn measured<T: DeserializeOwned>(arguments: &[String]) -> Result<T, Failure> {
    let own = std::env::current_exe().context("cannot find the own binary").map_err(Failure::failed)?;
    let output = Command::new(own).arg("bench").args(arguments).stderr(Stdio::inherit()).output();
    let output = output.context("cannot start a measurement").map_err(Failure::failed)?;
    if !output.status.success() {
        return Err(Failure::failed(anyhow!("a measurement failed: fulgurite bench {}", arguments.join(" "))));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().last().unwrap_or_default();
    serde_json::from_str(line).with_context(|| format!("a measurement printed `{line}`")).map_err(Failure::failed)
}

/// The machine, in a few words.
fn setup(threads: usize) -> serde_json::Value {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim()));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let maps = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "cores": std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        "cpu": model.unwrap_or("unknown"),
        "kernel": kernel.trim(),
        "max_map_count": maps.trim(),
        "threads": threads,
    })
}
