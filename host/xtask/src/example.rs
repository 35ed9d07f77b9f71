//! The example: its data, its config, and runs of it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use serde_json::Value;

use crate::guests;
use crate::process::{self, Workspace};

/// Which example.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ExampleName {
    /// Book a meeting room.
    Rooms,
    /// Word problems with a calculator.
    Calc,
}

impl ExampleName {
    /// Its folder's and its config's name.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Rooms => "rooms",
            Self::Calc => "calc",
        }
    }
}

/// The built example.
#[derive(Debug)]
pub(crate) struct Example {
    workspace: Workspace,
    name: ExampleName,
    /// Folder of the example.
    folder: PathBuf,
}

impl Example {
    /// Builds guests and host and writes the data.
    pub(crate) fn build(name: ExampleName) -> anyhow::Result<Self> {
        let workspace = Workspace::load()?;
        println!("==> guests");
        guests::build()?;
        println!("==> host");
        let data = format!("{}-data", name.as_str());
        let packages = ["--package", "fulgurite-cli", "--package", &data];
        process::run(workspace.cargo().args(["build", "--release"]).args(packages))?;
        println!("==> data");
        let folder = workspace.root.join("examples").join(name.as_str());
        let mut generate = Command::new(binary(&workspace, &data));
        process::run(generate.args(["--seed", "0", "--out"]).arg(folder.join("data")))
            .context("cannot write the example's data")?;
        Ok(Self { workspace, name, folder })
    }

    /// The example's config file.
    pub(crate) fn config(&self) -> PathBuf {
        self.folder.join(format!("{}.toml", self.name.as_str()))
    }

    /// A folder of cargo's, for what may be thrown away.
    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        self.workspace.target.join(name)
    }

    /// The first folder below `runs/` that is free: `NAME`, `NAME-2` and so on.
    pub(crate) fn fresh_run(&self, name: &str) -> PathBuf {
        let runs = self.workspace.root.join("runs");
        let numbered = (2..).map(|number| runs.join(format!("{name}-{number}")));
        std::iter::once(runs.join(name)).chain(numbered).find(|run| !run.exists()).unwrap_or_else(|| runs.join(name))
    }

    /// `fulgurite train`, to be run.
    pub(crate) fn train(&self, config: &Path, seed: u64, run: &Path) -> Command {
        let mut command = Command::new(binary(&self.workspace, "fulgurite"));
        command.current_dir(&self.workspace.root).arg("train").arg(config);
        command.args(["--seed", &seed.to_string(), "--run"]).arg(run);
        command
    }

    /// Trains from the start in a folder that is emptied first, and returns the result.
    pub(crate) fn result(&self, config: &Path, seed: u64, run: &Path) -> anyhow::Result<Value> {
        if run.exists() {
            std::fs::remove_dir_all(run).with_context(|| format!("cannot empty `{}`", run.display()))?;
        }
        let text = process::data(self.train(config, seed, run).args(["--output", "json"]))?;
        serde_json::from_str(&text).context("the result is not JSON")
    }

    /// Writes a variant of the config, whose paths hold wherever it stands, to `file`.
    pub(crate) fn variant(&self, file: &Path, change: impl FnOnce(&mut toml::Table)) -> anyhow::Result<()> {
        let path = self.config();
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        let mut config: toml::Table = text.parse().with_context(|| format!("`{}` is not TOML", path.display()))?;
        absolute(&mut config, &self.folder);
        change(&mut config);
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot create `{}`", folder.display()))?;
        }
        std::fs::write(file, config.to_string()).with_context(|| format!("cannot write `{}`", file.display()))
    }
}

fn binary(workspace: &Workspace, name: &str) -> PathBuf {
    workspace.target.join("release").join(format!("{name}{}", std::env::consts::EXE_SUFFIX))
}

/// Makes every relative path of a config absolute: values that end like a component or a dataset file.
fn absolute(table: &mut toml::Table, folder: &Path) {
    for (_, value) in table.iter_mut() {
        absolute_value(value, folder);
    }
}

fn absolute_value(value: &mut toml::Value, folder: &Path) {
    match value {
        toml::Value::String(text) if is_file(text) => *text = folder.join(&*text).display().to_string(),
        toml::Value::Table(table) => absolute(table, folder),
        toml::Value::Array(values) => values.iter_mut().for_each(|value| absolute_value(value, folder)),
        _ => {}
    }
}

fn is_file(text: &str) -> bool {
    Path::new(text).extension().is_some_and(|extension| extension == "wasm" || extension == "jsonl")
}

/// The config of a stage by its name.
pub(crate) fn stage<'a>(config: &'a mut toml::Table, name: &str) -> Option<&'a mut toml::Table> {
    let stages = config.get_mut("stage")?.as_array_mut()?;
    let stage = stages.iter_mut().find(|stage| stage.get("name").and_then(toml::Value::as_str) == Some(name))?;
    let settings = stage.as_table_mut()?.entry("config").or_insert_with(|| toml::Table::new().into());
    settings.as_table_mut()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_keep_their_files_and_change_their_stages() {
        let text = "agent.component = '../a.wasm'\n[dataset.x]\ntrain = 'data/t.jsonl'\n[[stage]]\nname = 'grpo'\n";
        let mut config: toml::Table = text.parse().unwrap();
        absolute(&mut config, Path::new("/example"));
        stage(&mut config, "grpo").unwrap().insert("steps".to_owned(), 5.into());
        assert!(stage(&mut config, "sft").is_none());
        assert_eq!(config["agent"]["component"].as_str(), Some("/example/../a.wasm"));
        assert_eq!(config["dataset"]["x"]["train"].as_str(), Some("/example/data/t.jsonl"));
        assert_eq!(config["stage"][0]["config"]["steps"].as_integer(), Some(5));
    }
}
