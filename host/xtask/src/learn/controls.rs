//! What tables of several plugins share: a run of SFT, and from its weights a control for each of them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use serde_json::Value;

use super::Promises;
use crate::example::Example;
use crate::process;

/// A plugin that is compared with others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Control {
    pub(super) name: &'static str,
    /// Its component's name.
    pub(super) plugin: &'static str,
    /// Its config beside what all have, as TOML.
    pub(super) config: &'static str,
}

impl Control {
    pub(super) fn settings(&self) -> toml::Table {
        self.config.parse().unwrap_or_default()
    }

    /// Its part of a run's config: it learns in place of a stage.
    pub(super) fn section(&self, stage: &toml::Table, settings: toml::Table) -> toml::Table {
        let component = stage.get("algorithm").and_then(toml::Value::as_str).map(Path::new);
        let components = component.and_then(Path::parent).unwrap_or(Path::new(""));
        let file = components.join(format!("{}.wasm", self.plugin));
        let mut section = toml::Table::new();
        section.insert("name".to_owned(), self.name.into());
        section.insert("algorithm".to_owned(), file.display().to_string().into());
        section.extend(stage.get("dataset").map(|dataset| ("dataset".to_owned(), dataset.clone())));
        section.insert("start_from".to_owned(), "sft".into());
        section.insert("config".to_owned(), settings.into());
        section
    }
}

/// Makes controls of an example's last stage, of which `sections` are made, and leaves out its baselines. All of them are offered
/// a critic.
pub(super) fn put(config: &mut toml::Table, sections: impl FnOnce(&toml::Table) -> Vec<toml::Table>) {
    config.remove("baseline");
    let stages = config.get_mut("stage").and_then(toml::Value::as_array_mut);
    let Some(toml::Value::Table(stage)) = stages.and_then(Vec::pop) else { return };
    let sections = sections(&stage).into_iter().map(toml::Value::from).collect::<Vec<_>>();
    config.insert("control".to_owned(), sections.into());
    if let Some(local) = config.get_mut("policy").and_then(|policy| policy.get_mut("local")?.as_table_mut()) {
        local.insert("critic".to_owned(), toml::Table::new().into());
    }
}

/// Largest share of a training step that the plugin's own code may take.
pub(super) const PLUGIN_SHARE_MAX: f64 = 0.02;

/// Checks how much of its steps a run has spent in the code of its plugins, and adds a line to those behind the table.
pub(super) fn check_plugin_time(name: &str, share: Option<PluginShare>, promises: &mut Promises) {
    let what = format!("{name}: largest share of a stage's steps in plugin code (at most {PLUGIN_SHARE_MAX})");
    promises.check(&what, share.as_ref().map(|share| share.share), |share| share <= PLUGIN_SHARE_MAX);
    if let Some(PluginShare { stage, share, worst_step }) = share {
        promises.lines.push(format!(
            "{name}: plugin code took at most {:.2} % of a stage's steps ({stage}), and {:.2} % of a single step",
            share * 100.0,
            worst_step * 100.0
        ));
    }
}

/// The stage or control whose plugin took the largest share of its steps.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PluginShare {
    stage: String,
    /// Of the time of all its steps.
    share: f64,
    /// The largest share of a single step of any stage: machines that do other things as well make it jump.
    worst_step: f64,
}

impl PluginShare {
    /// From the lines of `timings.jsonl`; `None` when no step has been timed.
    fn of(timings: &[Value]) -> Option<Self> {
        let mut stages: BTreeMap<&str, [f64; 2]> = BTreeMap::new();
        let mut worst_step: f64 = 0.0;
        for line in timings {
            let number = |name: &str| line.get("seconds")?.get(name)?.as_f64();
            let (plugin, step) = (number("plugin")?, number("step")?);
            worst_step = worst_step.max(plugin / step);
            let sums = stages.entry(line.get("stage")?.as_str()?).or_default();
            *sums = [sums[0] + plugin, sums[1] + step];
        }
        let shares = stages.into_iter().map(|(stage, [plugin, step])| (stage.to_owned(), plugin / step));
        let (stage, share) = shares.max_by(|a, b| a.1.total_cmp(&b.1))?;
        Some(Self { stage, share, worst_step })
    }

    /// Of a run's folder.
    pub(super) fn of_run(run: &Path) -> anyhow::Result<Option<Self>> {
        Ok(Self::of(&lines(&run.join("timings.jsonl"))?))
    }
}

fn lines(file: &Path) -> anyhow::Result<Vec<Value>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read `{}`", file.display()))?;
    let lines = text.lines().map(serde_json::from_str).collect::<Result<_, _>>();
    lines.with_context(|| format!("`{}` is damaged", file.display()))
}

/// A run and what it has recorded.
pub(super) struct Trained {
    pub(super) result: Value,
    /// Lines of `metrics.jsonl`.
    pub(super) metrics: Vec<Value>,
    /// What its plugins took; `None` when it has no timings.
    pub(super) plugin_share: Option<PluginShare>,
}

impl Trained {
    /// Trains a variant of the example in `folder`, or goes on with it where it was stopped.
    pub(super) fn run(
        example: &Example,
        seed: u64,
        folder: &Path,
        name: &str,
        change: impl FnOnce(&mut toml::Table),
    ) -> anyhow::Result<Self> {
        println!("==> {name}");
        let (config, run) = (folder.join(format!("{name}.toml")), folder.join(name));
        example.variant(&config, change)?;
        let mut train = example.train(&config, seed, &run);
        if run.exists() {
            train.arg("--resume");
        }
        let text = process::data(train.args(["--no-estimate", "--output", "json"]))?;
        Ok(Self {
            result: serde_json::from_str(&text).context("the result is not JSON")?,
            metrics: lines(&run.join("metrics.jsonl"))?,
            plugin_share: PluginShare::of_run(&run)?,
        })
    }

    /// What a control has recorded in its steps: as many numbers of each, those left out that lack one of them.
    pub(super) fn scalars<const N: usize>(&self, control: &str, names: [&str; N]) -> Vec<[f64; N]> {
        let of_control = |line: &&Value| line.get("stage").and_then(Value::as_str) == Some(control);
        let steps = self.metrics.iter().filter(of_control).filter_map(|line| line.get("scalars"));
        let numbers = |scalars: &Value| {
            let found = names.map(|name| scalars.get(name).and_then(Value::as_f64));
            found.iter().all(Option::is_some).then(|| found.map(Option::unwrap_or_default))
        };
        steps.filter_map(numbers).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugin_time_is_a_share_of_a_stages_steps() {
        let line = |stage: &str, plugin: f64, step: f64| serde_json::json!({"stage": stage, "step": 0, "seconds": {"plugin": plugin, "step": step}});
        let timings = [line("sft", 0.001, 1.0), line("grpo", 0.125, 1.0), line("grpo", 0.125, 15.0)];
        let share = PluginShare::of(&timings).unwrap();
        assert_eq!((share.stage.as_str(), share.share, share.worst_step), ("grpo", 0.015_625, 0.125));
        let checked = |share: Option<PluginShare>| {
            let mut promises = Promises::default();
            check_plugin_time("seed 0", share, &mut promises);
            (promises.lines.len(), promises.broken)
        };
        assert_eq!(checked(Some(share.clone())), (1, vec![]));
        assert!(
            checked(Some(PluginShare { share: 0.021, ..share })).1[0].contains("plugin code (at most 0.02) is 0.021")
        );
        assert!(checked(PluginShare::of(&[])).1[0].contains("missing"));
    }

    #[test]
    fn the_last_stage_becomes_controls_with_its_dataset() {
        let text = "[policy.local.model]\npreset = 'tiny'\n[[baseline]]\nname = 'b'\n[[stage]]\nname = 'sft'\n\
                    [[stage]]\nname = 'grpo'\nalgorithm = '/plugins/grpo.wasm'\ndataset = 'd'\n";
        let mut config: toml::Table = text.parse().unwrap();
        let control = Control { name: "tree", plugin: "tree_grpo", config: "group_size = 4" };
        put(&mut config, |stage| vec![control.section(stage, control.settings())]);
        assert_eq!(config["stage"].as_array().unwrap().len(), 1);
        assert!(config.get("baseline").is_none() && config["policy"]["local"].get("critic").is_some());
        let found = &config["control"][0];
        for (key, value) in
            [("name", "tree"), ("algorithm", "/plugins/tree_grpo.wasm"), ("dataset", "d"), ("start_from", "sft")]
        {
            assert_eq!(found[key].as_str(), Some(value), "{key}");
        }
        assert_eq!(found["config"]["group_size"].as_integer(), Some(4));
        // Paths hold wherever the config stands, so its text is what a run gets.
        config.to_string().parse::<toml::Table>().unwrap();
    }
}
