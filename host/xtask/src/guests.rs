//! Building the guests: every package below `plugins/`, `algorithms/` and `tests/guests/` becomes a component, but for the
//! libraries that they share.

use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use crate::process::{self, Package, Workspace};

/// Folders whose packages are guests.
const FOLDERS: [&str; 3] = ["plugins", "algorithms", "tests/guests"];
/// What guests are compiled for.
pub(crate) const TARGET: &str = "wasm32-wasip2";
/// How guests are compiled: see `[profile.guest]` of the workspace.
const PROFILE: &str = "guest";

/// Builds all guests and puts their components into `target/plugins`. A file that has not changed is left alone, so that
/// compile caches stay valid.
pub(crate) fn build() -> anyhow::Result<()> {
    let workspace = Workspace::load()?;
    ensure_target(&workspace)?;
    let guests: Vec<&Package> = workspace
        .packages
        .iter()
        .filter(|p| p.is_component && FOLDERS.iter().any(|f| p.dir.starts_with(workspace.root.join(f))))
        .collect();
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--quiet", "--profile", PROFILE, "--target", TARGET]);
    // Flags for this machine's processor mean nothing to WebAssembly.
    cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo.args(guests.iter().flat_map(|guest| ["--package", &guest.name]));
    process::run(&mut cargo)?;

    let plugins = workspace.target.join("plugins");
    std::fs::create_dir_all(&plugins).with_context(|| format!("cannot create `{}`", plugins.display()))?;
    for guest in guests {
        let file = format!("{}.wasm", guest.name.replace('-', "_"));
        let built = workspace.target.join(TARGET).join(PROFILE).join(&file);
        let bytes = std::fs::read(&built)
            .with_context(|| format!("`{}` is missing: is the package a `cdylib`?", built.display()))?;
        let state = if copy_if_changed(&bytes, &plugins.join(&file))? { "built" } else { "unchanged" };
        println!("{:<28} {:>5} KiB  {state}", file, bytes.len().div_ceil(1024));
    }
    println!("components are in {}", plugins.display());
    Ok(())
}

/// Writes a file whose content differs, by renaming, so that a run that reads it meanwhile sees the old one or the new one.
fn copy_if_changed(bytes: &[u8], to: &Path) -> anyhow::Result<bool> {
    match std::fs::read(to) {
        Ok(old) if old == bytes => return Ok(false),
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot read `{}`", to.display()));
        }
        _ => {}
    }
    let fresh = to.with_extension("wasm.new");
    std::fs::write(&fresh, bytes).with_context(|| format!("cannot write `{}`", fresh.display()))?;
    std::fs::rename(&fresh, to).with_context(|| format!("cannot write `{}`", to.display()))?;
    Ok(true)
}

/// Makes sure that the compiler can build for the target, through rustup when it is there.
pub(crate) fn ensure_target(workspace: &Workspace) -> anyhow::Result<()> {
    // Then cargo builds the standard library itself.
    if std::env::var_os("CARGO_UNSTABLE_BUILD_STD").is_some() {
        return Ok(());
    }
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let libraries = process::output(Command::new(rustc).current_dir(&workspace.root).args([
        "--print",
        "target-libdir",
        "--target",
        TARGET,
    ]));
    if libraries.is_ok_and(|folder| has_standard_library(Path::new(folder.trim()))) {
        return Ok(());
    }
    println!("the target {TARGET} is missing, asking rustup for it");
    let rustup = Command::new("rustup")
        .current_dir(&workspace.root)
        .args(["target", "add", TARGET])
        .stdin(Stdio::null())
        .status();
    match rustup {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => bail!("`rustup target add {TARGET}` failed; its message above says why\n{WAYS_OUT}"),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!(
                "the compiler has no standard library for {TARGET}, and rustup, which could add it, is not installed\n{WAYS_OUT}"
            )
        }
        Err(error) => Err(error).context("cannot run rustup"),
    }
}

const WAYS_OUT: &str = "hint: install rustup (https://rustup.rs) and run this again; or
hint: install your distribution's standard library of Rust for wasm32-wasip2, when it has one; or
hint: let cargo build the standard library: sdk/rust/README.md, section \"The target\", says how";

fn has_standard_library(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut files| {
        files.any(|file| file.is_ok_and(|file| file.file_name().to_string_lossy().starts_with("libstd-")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unchanged_components_keep_their_file() {
        let folder = std::env::temp_dir().join(format!("fulgurite-xtask-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let file = folder.join("a.wasm");
        assert!(copy_if_changed(b"1", &file).unwrap());
        assert!(!copy_if_changed(b"1", &file).unwrap());
        assert!(copy_if_changed(b"2", &file).unwrap());
        assert_eq!(std::fs::read(&file).unwrap(), b"2");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
