//! `fulgurite build`: a plugin crate to a component.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, anyhow};

use crate::arguments::{BuildArguments, Output};
use crate::doctor::TARGET;
use crate::failure::Failure;
use crate::{terminal, train};

pub(crate) fn build(arguments: &BuildArguments) -> Result<(), Failure> {
    let component = compile(&arguments.directory)?;
    match arguments.output {
        Output::Text => terminal::print(&component.display().to_string()),
        Output::Json => train::print_json(&serde_json::json!({"component": component}))?,
    }
    Ok(())
}

/// Compiles the crate in `directory` and returns the path of its component.
fn compile(directory: &Path) -> Result<PathBuf, Failure> {
    let manifest = directory.join("Cargo.toml");
    if !manifest.is_file() {
        let problem = anyhow!("`{}` is not a plugin crate: it has no Cargo.toml", directory.display());
        return Err(Failure::usage(problem).hint("make one with `fulgurite plugin new --kind agent NAME`"));
    }
    let output = Command::new("cargo")
        .args(["build", "--release", "--target", TARGET, "--message-format", "json-render-diagnostics"])
        .arg("--manifest-path")
        .arg(&manifest)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start `cargo`")
        .map_err(|error| Failure::failed(error).hint("`fulgurite doctor` says what is missing"))?;
    if !output.status.success() {
        let problem = anyhow!("cargo could not compile `{}`; its messages are above", directory.display());
        let hint = format!("if the target is what is missing: rustup target add {TARGET}, or see `fulgurite doctor`");
        return Err(Failure::failed(problem).hint(hint));
    }
    let component = String::from_utf8_lossy(&output.stdout).lines().rev().find_map(component_of);
    component.ok_or_else(|| {
        let problem = anyhow!("`{}` compiled, but to no component", directory.display());
        Failure::failed(problem).hint("its Cargo.toml needs `[lib] crate-type = [\"cdylib\"]`")
    })
}

/// The component that a line of cargo's messages announces.
fn component_of(line: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    if message.get("reason")?.as_str()? != "compiler-artifact" {
        return None;
    }
    let files = message.get("filenames")?.as_array()?;
    let mut files = files.iter().filter_map(|file| file.as_str()).map(PathBuf::from);
    files.find(|file| file.extension().is_some_and(|extension| extension == "wasm"))
}
