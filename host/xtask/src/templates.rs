//! The templates of `fulgurite plugin new`: each of them must build and pass its own test as it is.

use std::path::Path;

use anyhow::Context;

use crate::guests;
use crate::process::{self, Workspace};

/// What a plugin can be.
const KINDS: [&str; 4] = ["agent", "grader", "tool", "algorithm"];
/// Files of a template.
const FILES: [&str; 2] = ["Cargo.toml", "src/lib.rs"];

/// Makes a crate of every template, tests it natively and builds its component.
pub(crate) fn check(workspace: &Workspace) -> anyhow::Result<()> {
    guests::ensure_target(workspace)?;
    let sdk = workspace.root.join("sdk/rust");
    let folder = workspace.target.join("templates");
    for kind in KINDS {
        let name = format!("my-{kind}");
        let place = folder.join(&name);
        for file in FILES {
            let template = sdk.join("templates").join(kind).join(format!("{file}.template"));
            let text = read(&template)?.replace("{{name}}", &name).replace("{{sdk}}", &sdk.display().to_string());
            anyhow::ensure!(
                !text.contains("{{name") && !text.contains("{{sdk"),
                "`{}` is not filled",
                template.display()
            );
            write(&place.join(file), &text)?;
        }
        // The versions that the workspace is tested with; a new crate of a user's takes the newest that fit.
        write(&place.join("Cargo.lock"), &read(&workspace.root.join("Cargo.lock"))?)?;
        for arguments in
            [&["test", "--release", "--quiet"][..], &["build", "--release", "--quiet", "--target", guests::TARGET]]
        {
            let mut cargo = workspace.cargo();
            cargo.current_dir(&place).env("CARGO_TARGET_DIR", folder.join("target")).env("RUSTFLAGS", "-D warnings");
            process::run(cargo.args(arguments)).with_context(|| format!("the template of a new {kind} is broken"))?;
        }
        println!("{name}: tested and built");
    }
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    // An unchanged file keeps its time, so that cargo has nothing to do.
    if std::fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create `{}`", folder.display()))?;
    }
    std::fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))
}
