//! `cargo xtask test`: everything that CI runs, with the time each phase took.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, ValueEnum};

use crate::process::{self, Workspace};
use crate::{guests, templates};

/// The version of cargo-deny that is installed when there is none.
const DENY_VERSION: &str = "0.20.2";

/// Options of `test`.
#[derive(Debug, Args)]
pub(crate) struct TestArguments {
    /// Runs these phases alone.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Phase>,
}

/// A part of the checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Phase {
    /// rustfmt.
    Format,
    /// clippy, warnings are errors.
    Lints,
    /// All components.
    Guests,
    /// All tests.
    Tests,
    /// The templates of new plugins build and pass their tests.
    Templates,
    /// rustdoc, warnings are errors.
    Docs,
    /// cargo-deny: licences, banned crates, sources.
    Deny,
}

impl Phase {
    const fn name(self) -> &'static str {
        match self {
            Self::Format => "format",
            Self::Lints => "lints",
            Self::Guests => "guests",
            Self::Tests => "tests",
            Self::Templates => "templates",
            Self::Docs => "docs",
            Self::Deny => "deny",
        }
    }

    fn run(self, workspace: &Workspace) -> anyhow::Result<()> {
        let cargo = |arguments: &[&str]| {
            let mut command = workspace.cargo();
            command.args(arguments);
            command
        };
        match self {
            Self::Format => process::run(&mut cargo(&["fmt", "--all", "--check"])),
            Self::Lints => process::run(&mut cargo(&[
                "clippy",
                "--release",
                "--workspace",
                "--all-targets",
                "--quiet",
                "--",
                "-D",
                "warnings",
            ])),
            Self::Guests => guests::build(),
            // Guests are tested natively too; what needs a component loads it from target/plugins.
            Self::Tests => process::run(&mut cargo(&["test", "--release", "--workspace"])),
            Self::Templates => templates::check(workspace),
            Self::Docs => process::run(
                cargo(&["doc", "--release", "--workspace", "--no-deps", "--quiet"]).env("RUSTDOCFLAGS", "-D warnings"),
            ),
            Self::Deny => {
                let program = cargo_deny(workspace)?;
                // Without `advisories`: its database is on GitHub, which not every machine may reach.
                let checks = ["check", "--hide-inclusion-graph", "bans", "licenses", "sources"];
                process::run(
                    Command::new(program).current_dir(&workspace.root).args(["--log-level", "error"]).args(checks),
                )
            }
        }
    }
}

/// Runs the phases and returns whether all of them passed. A failing phase does not stop those after it: one run tells all.
pub(crate) fn run(arguments: &TestArguments) -> anyhow::Result<bool> {
    let workspace = Workspace::load()?;
    let phases = if arguments.only.is_empty() { Phase::value_variants() } else { &arguments.only };
    let start = Instant::now();
    let mut results = vec![];
    for phase in phases {
        println!("==> {}", phase.name());
        let phase_start = Instant::now();
        let result = phase.run(&workspace);
        if let Err(error) = &result {
            println!("error: {error:#}");
        }
        results.push((*phase, result.is_ok(), phase_start.elapsed()));
    }
    println!();
    for (phase, passed, took) in &results {
        println!("{:<9} {:>10}  {}", phase.name(), shown(*took), if *passed { "passed" } else { "FAILED" });
    }
    let failed: Vec<_> = results.iter().filter(|(_, passed, _)| !passed).map(|(phase, ..)| phase.name()).collect();
    let took = shown(start.elapsed());
    if failed.is_empty() {
        println!("PASS: {} phases in {took}", results.len());
    } else {
        println!("FAIL: {} in {took}", failed.join(", "));
    }
    Ok(failed.is_empty())
}

fn shown(took: Duration) -> String {
    let seconds = took.as_secs_f64();
    if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{}:{:02} min", took.as_secs() / 60, took.as_secs() % 60)
    }
}

/// cargo-deny: the one in `target/tools`, the one of the machine, or a fresh one.
fn cargo_deny(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    let root = workspace.target.join("tools");
    let own = root.join("bin").join(format!("cargo-deny{}", std::env::consts::EXE_SUFFIX));
    if own.is_file() {
        return Ok(own);
    }
    if process::output(Command::new("cargo-deny").arg("--version")).is_ok() {
        return Ok("cargo-deny".into());
    }
    println!("cargo-deny is missing, building it into {} (some minutes, once)", root.display());
    let mut install = workspace.cargo();
    // Its default features are for checks that we do not run.
    install.args(["install", "cargo-deny", "--version", DENY_VERSION, "--locked", "--no-default-features", "--quiet"]);
    install.arg("--root").arg(&root);
    process::run(&mut install).context("cannot install cargo-deny")?;
    Ok(own)
}
