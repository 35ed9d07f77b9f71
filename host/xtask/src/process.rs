//! Running other programs, and where things are.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

/// A package of this workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    /// Its name.
    pub(crate) name: String,
    /// Its folder.
    pub(crate) dir: PathBuf,
    /// Whether it makes a `cdylib`, which is what becomes a component.
    pub(crate) is_component: bool,
}

/// What cargo knows of this workspace.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// Its root.
    pub(crate) root: PathBuf,
    /// Where cargo builds.
    pub(crate) target: PathBuf,
    /// Its packages, by name.
    pub(crate) packages: Vec<Package>,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn load() -> anyhow::Result<Self> {
        // cargo sets the variable for `cargo run`; the path of the build is only a fallback for running the binary alone.
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let text = output(cargo(Path::new(&manifest)).args(["metadata", "--no-deps", "--format-version", "1"]))?;
        let metadata: Value = serde_json::from_str(&text).context("cargo metadata is not JSON")?;
        let field = |value: &Value, name: &str| {
            value
                .get(name)
                .and_then(Value::as_str)
                .map(str::to_owned)
                .with_context(|| format!("cargo metadata has no `{name}`"))
        };
        let mut packages = vec![];
        for package in metadata.get("packages").and_then(Value::as_array).context("cargo metadata has no packages")? {
            let manifest = PathBuf::from(field(package, "manifest_path")?);
            let dir = manifest.parent().context("a manifest has no folder")?.to_path_buf();
            let targets = package.get("targets").and_then(Value::as_array).into_iter().flatten();
            let mut kinds = targets.filter_map(|target| target.get("crate_types")?.as_array()).flatten();
            let is_component = kinds.any(|kind| kind == "cdylib");
            packages.push(Package { name: field(package, "name")?, dir, is_component });
        }
        packages.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self {
            root: field(&metadata, "workspace_root")?.into(),
            target: field(&metadata, "target_directory")?.into(),
            packages,
        })
    }

    /// cargo, in the workspace's root.
    pub(crate) fn cargo(&self) -> Command {
        cargo(&self.root)
    }
}

fn cargo(dir: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(dir);
    // What `cargo run` sets for this program describes this program, not what it builds.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_") || name == OsStr::new("CARGO_MANIFEST_DIR") {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a program, whose output is shown, and fails when it fails.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot run `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed", shown(command));
    }
    Ok(())
}

/// Runs a program whose messages are shown and returns what it writes to standard output.
pub(crate) fn data(command: &mut Command) -> anyhow::Result<String> {
    let done = command.stderr(Stdio::inherit()).output().with_context(|| format!("cannot run `{}`", shown(command)))?;
    if !done.status.success() {
        bail!("`{}` failed", shown(command));
    }
    String::from_utf8(done.stdout).with_context(|| format!("`{}` wrote no text", shown(command)))
}

/// Runs a program quietly and returns what it writes to standard output.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<String> {
    let done = command.stderr(Stdio::piped()).output().with_context(|| format!("cannot run `{}`", shown(command)))?;
    if !done.status.success() {
        bail!("`{}` failed: {}", shown(command), String::from_utf8_lossy(&done.stderr).trim());
    }
    String::from_utf8(done.stdout).with_context(|| format!("`{}` wrote no text", shown(command)))
}

/// A program with its arguments, as a person would type it.
pub(crate) fn shown(command: &Command) -> String {
    let name = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    std::iter::once(name).chain(command.get_args()).map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}
