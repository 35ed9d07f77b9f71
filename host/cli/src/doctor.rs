//! `fulgurite doctor`: what this machine has and lacks.

use std::path::Path;
use std::process::Command;

use anyhow::anyhow;
use fulgurite_policy::{DeviceFinding, PolicyDevice};
use fulgurite_sandbox::{Sandbox, SandboxSettings};
use fulgurite_trainer::config::RunConfig;
use fulgurite_trainer::{CheckedEndpoint, check_endpoints};
use serde::Serialize;

use crate::arguments::{DoctorArguments, Output};
use crate::failure::{Failure, printable};
use crate::terminal::{Style, paint};
use crate::{paths, terminal, train};

/// The target of Rust guests.
pub(crate) const TARGET: &str = "wasm32-wasip2";
/// The Rust release that the workspace needs.
const RUST_MINOR_MIN: u32 = 95;

/// One finding.
#[derive(Debug, Serialize)]
struct Check {
    name: String,
    ok: bool,
    found: String,
    /// What to do; empty when nothing is.
    fix: String,
}

pub(crate) async fn doctor(arguments: &DoctorArguments) -> Result<(), Failure> {
    let mut checks = vec![rust(), target(), linker(), cache(), processor()];
    if let Some(config) = &arguments.config {
        let config = RunConfig::load(config)?;
        checks.extend(check_endpoints(&config).await.into_iter().map(endpoint));
    }
    match arguments.output {
        Output::Json => train::print_json(&checks)?,
        Output::Text => {
            let colours = terminal::colours();
            for check in &checks {
                let mark =
                    if check.ok { paint("ok  ", Style::Green, colours) } else { paint("miss", Style::Red, colours) };
                terminal::print(&format!("{mark} {:<16} {}", check.name, check.found));
                if !check.ok {
                    terminal::print(&format!("     {:<16} {}", "", check.fix));
                }
            }
        }
    }
    let missing = checks.iter().filter(|check| !check.ok).count();
    if missing == 0 { Ok(()) } else { Err(Failure::failed(anyhow!("{missing} of {} checks failed", checks.len()))) }
}

fn output_of(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn rust() -> Check {
    let found = output_of("rustc", &["--version"]);
    let minor = found.as_deref().and_then(|text| text.split('.').nth(1)?.parse::<u32>().ok());
    Check {
        name: "rust".to_owned(),
        ok: minor.is_some_and(|minor| minor >= RUST_MINOR_MIN),
        found: found.unwrap_or_else(|| "not found".to_owned()),
        fix: format!("install Rust 1.{RUST_MINOR_MIN} or newer with rustup (https://rustup.rs)"),
    }
}

fn target() -> Check {
    let sysroot = output_of("rustc", &["--print", "sysroot"]);
    let ok = sysroot.is_some_and(|root| Path::new(&root).join("lib/rustlib").join(TARGET).join("lib").is_dir());
    Check {
        name: "guest target".to_owned(),
        ok,
        found: if ok { TARGET.to_owned() } else { format!("{TARGET} is not installed") },
        fix: format!("rustup target add {TARGET}"),
    }
}

fn linker() -> Check {
    let found = output_of("cc", &["--version"]).and_then(|text| text.lines().next().map(str::to_owned));
    Check {
        name: "C compiler".to_owned(),
        ok: found.is_some(),
        found: found.unwrap_or_else(|| "not found".to_owned()),
        fix: "apt-get install gcc (or your system's compiler); Rust links with it".to_owned(),
    }
}

fn cache() -> Check {
    let Some(folder) = paths::cache() else {
        return Check {
            name: "component cache".to_owned(),
            ok: false,
            found: "no home folder".to_owned(),
            fix: "set HOME or FULGURITE_CACHE_DIR; without it every start compiles all components anew".to_owned(),
        };
    };
    // Only the sandbox knows what it accepts: the folder must be private, since compiled code in it is trusted.
    let usable = Sandbox::new(SandboxSettings { cache_dir: Some(folder.clone()), ..SandboxSettings::default() });
    let fix = usable.as_ref().err().map(|error| format!("{error}, or set FULGURITE_CACHE_DIR to another folder"));
    Check {
        name: "component cache".to_owned(),
        ok: fix.is_none(),
        found: folder.display().to_string(),
        fix: fix.unwrap_or_default(),
    }
}

/// A server that the config names.
fn endpoint(checked: CheckedEndpoint) -> Check {
    let (ok, found, fix) = match checked.found {
        Ok(found) => (true, found, String::new()),
        Err(problem) => (false, "cannot be used".to_owned(), printable(&problem)),
    };
    Check { name: checked.section, ok, found: printable(&found), fix }
}

/// What the policy can train and generate on, the best one first, and why not on the others. A machine without GPU lacks
/// nothing.
fn processor() -> Check {
    let findings = PolicyDevice::findings();
    let shown = |finding: &DeviceFinding| {
        let mark = if finding.usable { "" } else { "not usable, " };
        format!("{}: {mark}{}", finding.device, finding.found)
    };
    Check {
        name: "device".to_owned(),
        ok: true,
        found: findings.iter().map(shown).collect::<Vec<_>>().join("; "),
        fix: String::new(),
    }
}
