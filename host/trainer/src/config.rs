//! The one TOML file that says all of a run.
//!
//! Three types of the same thing are kept apart: the text, [`RunConfig`] (the text parsed, nothing looked up) and the pieces
//! that [`RunConfig::load`] has checked and whose paths it has made absolute. Unknown keys are errors: a misspelt limit
//! that is silently ignored is worse than a run that does not start.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use fulgurite_adapter::RowTooLong;
use fulgurite_core::dataset::Split;
use fulgurite_core::grant::{EndpointGrants, ToolGrants};
use fulgurite_core::limits::{InvalidNarrowing, Limits, NarrowedLimits};
use fulgurite_core::llm::Sampling;
use fulgurite_core::outcome::{Blame, OutcomeKind};
use fulgurite_core::reward::RewardSource;
use fulgurite_runner::scripted::Script;
use fulgurite_sandbox::PluginWorld;
use serde::{Deserialize, Serialize};

mod error;
mod local;
mod reward;
mod watch;

pub use self::error::ConfigError;
pub use self::local::{LocalPolicyConfig, TokenizerSection};
pub use self::reward::RewardConfig;
use self::reward::is_default;
pub use self::watch::{AlarmAction, AlarmConfig, ExplainConfig};
use crate::adapter_push;
pub use crate::adapter_push::AdapterPushConfig;
pub use crate::endpoint::EndpointConfig;
use crate::run_directory::RunDirectory;

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Names the run's folder.
    pub name: String,
    /// Seed from which everything random follows.
    #[serde(default)]
    pub seed: u64,
    /// The agent.
    pub agent: PluginConfig,
    /// The grader. Without one only rewards of other accepted sources count.
    #[serde(default)]
    pub grader: Option<PluginConfig>,
    /// Tools by name.
    #[serde(default)]
    pub tools: BTreeMap<String, ToolConfig>,
    /// Model endpoints by name. A plugin asks them only when it is granted to it.
    #[serde(default)]
    pub endpoint: BTreeMap<String, EndpointConfig>,
    /// Datasets by name.
    pub dataset: BTreeMap<String, DatasetConfig>,
    /// Prompt templates by name: the first version of the run's resources.
    #[serde(default)]
    pub templates: BTreeMap<String, String>,
    /// The model.
    pub policy: PolicySection,
    /// How rollouts run.
    #[serde(default)]
    pub rollout: RolloutConfig,
    /// What the host rewards by itself, and which calls rewards belong to.
    #[serde(default, skip_serializing_if = "is_default")]
    pub reward: RewardConfig,
    /// Limits of every sandbox.
    #[serde(default)]
    pub limits: Limits,
    /// Held-out evaluation, by the host alone.
    pub evaluation: EvaluationConfig,
    /// Checkpoints.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// Alarms beside, or in place of, the default ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alarm: Vec<AlarmConfig>,
    /// What is kept to explain what was trained on.
    #[serde(default, skip_serializing_if = "is_default")]
    pub explain: ExplainConfig,
    /// What is done, in order.
    #[serde(default)]
    pub stage: Vec<StageConfig>,
    /// Further training runs that the result is compared with.
    #[serde(default)]
    pub control: Vec<StageConfig>,
    /// Scripted policies that the result is compared with.
    #[serde(default)]
    pub baseline: Vec<BaselineConfig>,
    /// Switches for controls of an experiment.
    #[serde(default)]
    pub experiment: ExperimentConfig,
}

/// An agent or a grader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PluginConfig {
    /// Path of the `.wasm` file, relative to the config file.
    pub component: PathBuf,
    /// Its own limits, each at most as wide as the run's.
    #[serde(default, skip_serializing_if = "NarrowedLimits::is_empty")]
    pub limits: NarrowedLimits,
    /// What it is granted of what its manifest asks for.
    #[serde(default, skip_serializing_if = "EndpointGrants::is_empty")]
    pub grants: EndpointGrants,
}

/// A tool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolConfig {
    /// Path of the `.wasm` file, relative to the config file.
    pub component: PathBuf,
    /// Its own limits, each at most as wide as the run's.
    #[serde(default, skip_serializing_if = "NarrowedLimits::is_empty")]
    pub limits: NarrowedLimits,
    /// What it is granted of what its manifest asks for.
    #[serde(default, skip_serializing_if = "ToolGrants::is_empty")]
    pub grants: ToolGrants,
}

/// A dataset: one JSONL file per split, one item `{id, input, world, reference}` per line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetConfig {
    /// Trained on.
    #[serde(default)]
    pub train: Option<PathBuf>,
    /// Looked at by algorithms.
    #[serde(default)]
    pub val: Option<PathBuf>,
    /// Drawn by the host only.
    #[serde(default)]
    pub test: Option<PathBuf>,
}

/// Which model answers: one of the three, as `[policy.local]`, `[policy.endpoint]` or `[policy.scripted]`; or the first two
/// together, with `[policy.endpoint.adapter_push]`.
///
/// Options instead of an enum: serde buffers what it reads into an enum, and an error would not know its place any more.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicySection {
    /// A model that this run trains, from random weights or those of a folder.
    #[serde(default)]
    pub local: Option<LocalPolicyConfig>,
    /// A server's model, for rollouts. Nothing can be trained, but for an adapter of `[policy.local]` that it draws with.
    #[serde(default)]
    pub endpoint: Option<EndpointConfig>,
    /// Scripted answers; nothing can be trained.
    #[serde(default)]
    pub scripted: Option<Script>,
}

/// How rollouts run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RolloutConfig {
    /// Attempts alive at once. 256: two batches of 128 fit, and a live small agent costs about 60 KB.
    pub live_max: usize,
    /// Attempts of one rollout, the first included. 3: enough for an endpoint that hiccups.
    pub attempts_max: u32,
    /// The same for single kinds of outcome, such as `llm-unavailable = 10`. Only those that can recover.
    pub retry: BTreeMap<OutcomeKind, u32>,
    /// Whether rollouts are recorded durably. Without it nothing can be looked at, replayed or trained on afterwards: for
    /// load tests and quick looks.
    pub record: bool,
    /// Sampling of the policy where neither agent nor algorithm says otherwise.
    pub sampling: Sampling,
    /// Sources whose rewards count in baselines and losses.
    pub reward_accept: Vec<RewardSource>,
    /// Reward that the host adds for an outcome that is blamed on the policy, by kind; 0 where not named. It is of `reward` and
    /// of every other dimension that a stage or control optimises.
    pub outcome_reward: BTreeMap<OutcomeKind, f64>,
    /// Share of the rollouts of one step, all its batches together, that may fail for reasons that are not the policy's before
    /// the run stops. 0.2.
    pub fault_share_max: f64,
    /// Tokens of the longest training row: of the longest call, its prompt included. None: what the model's context holds,
    /// which no call outgrows. Less saves memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub row_tokens_max: Option<NonZeroUsize>,
    /// What becomes of a rollout with a longer row: `drop` (the default), `truncate` or `stop`.
    #[serde(skip_serializing_if = "is_default")]
    pub row_too_long: RowTooLong,
}

impl Default for RolloutConfig {
    fn default() -> Self {
        Self {
            live_max: 256,
            attempts_max: 3,
            retry: BTreeMap::new(),
            record: true,
            sampling: Sampling::default(),
            reward_accept: vec![RewardSource::Grader, RewardSource::Host],
            outcome_reward: BTreeMap::new(),
            fault_share_max: 0.2,
            row_tokens_max: None,
            row_too_long: RowTooLong::default(),
        }
    }
}

/// Held-out evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationConfig {
    /// Name of the dataset; its `test` split is used.
    pub dataset: String,
    /// Rollouts at temperature 1. 512: a standard error of about 0.02.
    #[serde(default = "default_evaluation_rollouts")]
    pub sampled_rollouts: usize,
    /// Greedy rollouts.
    #[serde(default = "default_evaluation_rollouts")]
    pub greedy_rollouts: usize,
    /// Reward dimension that is reported.
    #[serde(default = "default_dimension")]
    pub dimension: String,
    /// Share of infrastructure faults above which an evaluation is void. 0.01.
    #[serde(default = "default_infrastructure_share_max")]
    pub infrastructure_share_max: f64,
}

fn default_evaluation_rollouts() -> usize {
    512
}

fn default_dimension() -> String {
    fulgurite_core::reward::DEFAULT_DIMENSION.to_owned()
}

fn default_infrastructure_share_max() -> f64 {
    0.01
}

/// Checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Steps between two checkpoints. 5: a checkpoint of the tiny model takes about as long as a tenth of a step.
    pub every_steps: u64,
    /// Checkpoints kept. 2: the newest, and one that is certainly whole.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every_steps: 5, keep: 2 }
    }
}

/// A stage of the pipeline: one algorithm until it says that it is done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageConfig {
    /// Unique name; a part of rollout ids and metric rows.
    pub name: String,
    /// Path of the algorithm's component, relative to the config file.
    pub algorithm: PathBuf,
    /// Name of the dataset that it draws from.
    pub dataset: String,
    /// What it is granted beyond the default.
    #[serde(default)]
    pub grants: Vec<AlgorithmGrant>,
    /// Name of the stage whose final weights it starts from (`initial`: the random ones). A stage goes on from the stage
    /// before it when nothing is said; a control must say it.
    #[serde(default)]
    pub start_from: Option<String>,
    /// Name of the stage whose number of trained tokens it may use: it ends with the step that reaches it.
    #[serde(default)]
    pub tokens_of: Option<String>,
    /// Tokens that its rollouts may draw: it ends with the step that reaches it, whatever its algorithm had planned. None: no
    /// bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampled_tokens_max: Option<u64>,
    /// Its own config, merged over its defaults.
    #[serde(default)]
    pub config: toml::Table,
}

impl StageConfig {
    /// Its algorithm's own config as JSON text, which is how a plugin takes it.
    pub(crate) fn settings(&self) -> String {
        serde_json::to_string(&self.config).unwrap_or_else(|_| "{}".to_owned())
    }
}

/// What an algorithm may be granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlgorithmGrant {
    /// It sees the references of its dataset's items.
    ReadReference,
}

/// A scripted policy for comparison, on the held-out items.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaselineConfig {
    /// Name in the table.
    pub name: String,
    /// What it answers.
    pub script: Script,
}

/// Switches for controls.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExperimentConfig {
    /// Gives every graded rollout of a training batch the reward of another one: nothing can be learned from that.
    pub shuffle_rewards: bool,
}

impl RunConfig {
    /// Reads, parses and checks a config file and makes its paths absolute.
    ///
    /// # Errors
    /// When the file cannot be read, has an unknown or missing key, or a value makes no sense.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
        let mut config = Self::parse(path, &text)?;
        let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder =
            std::path::absolute(folder).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
        config.resolve(&folder);
        config.check_files(path)?;
        Ok(config)
    }

    /// Reads the config that a run keeps. Its paths are absolute already; whether what they name is still there is not
    /// checked, because a run's components are kept beside it and its data may be gone.
    ///
    /// # Errors
    /// As [`RunConfig::load`], missing files excepted.
    pub fn of_run(run: &RunDirectory) -> Result<Self, ConfigError> {
        let path = run.config();
        let text = std::fs::read_to_string(&path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
        Self::parse(&path, &text)
    }

    /// Parses and checks text; `path` is for messages only.
    ///
    /// # Errors
    /// When a key is unknown or missing, or a value makes no sense.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.to_path_buf(),
            message: error.message().to_owned(),
            text: text.to_owned(),
            span: error.span(),
        })?;
        config.check().map_err(|(field, problem)| ConfigError::Invalid { path: path.to_path_buf(), field, problem })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (String, String)> {
        let fail = |field: &str, problem: String| Err((field.to_owned(), problem));
        if let Err(error) = fulgurite_core::id::RolloutId::derived(&self.name, 0, 0) {
            return fail("name", error.to_string());
        }
        if let Err(error) = self.rollout.sampling.check() {
            return fail(&format!("rollout.sampling.{}", error.field), error.to_string());
        }
        let mut names = std::collections::BTreeSet::from(["initial"]);
        let stages = self.stage.iter().map(|stage| ("stage", stage));
        let controls = self.control.iter().map(|control| ("control", control));
        for (kind, stage) in stages.chain(controls) {
            if fulgurite_core::id::RolloutId::derived(&format!("eval-{}-sampled", stage.name), 0, 0).is_err() {
                return fail(&format!("{kind}.name"), format!("`{}` is not usable in a rollout id", stage.name));
            }
            if stage.name.starts_with("eval-") {
                return fail(&format!("{kind}.name"), "names that begin with `eval-` are the host's".to_owned());
            }
            if !names.insert(&stage.name) {
                return fail(&format!("{kind}.name"), format!("`{}` is used twice", stage.name));
            }
            if !self.dataset.contains_key(&stage.dataset) {
                return fail(&format!("{kind}.{}.dataset", stage.name), self.unknown_dataset(&stage.dataset));
            }
        }
        let known = |name: &String| name == "initial" || self.stage.iter().any(|stage| stage.name == *name);
        for (kind, stage) in self.stage.iter().map(|s| ("stage", s)).chain(self.control.iter().map(|c| ("control", c)))
        {
            for (key, name) in [("start_from", &stage.start_from), ("tokens_of", &stage.tokens_of)] {
                if let Some(name) = name.as_ref().filter(|name| !known(name)) {
                    return fail(&format!("{kind}.{}.{key}", stage.name), format!("there is no stage `{name}`"));
                }
            }
            if stage.sampled_tokens_max == Some(0) {
                let field = format!("{kind}.{}.sampled_tokens_max", stage.name);
                return fail(&field, "must be at least 1; leave it out for no bound".to_owned());
            }
            if kind == "control" && stage.start_from.is_none() {
                let problem = "missing; name the stage whose weights the control starts from, or `initial`";
                return fail(&format!("control.{}.start_from", stage.name), problem.to_owned());
            }
        }
        match self.dataset.get(&self.evaluation.dataset) {
            None => return fail("evaluation.dataset", self.unknown_dataset(&self.evaluation.dataset)),
            Some(dataset) if dataset.test.is_none() => {
                return fail("evaluation.dataset", format!("dataset `{}` has no `test`", self.evaluation.dataset));
            }
            Some(_) => {}
        }
        self.check_policy()?;
        for (kind, value) in &self.rollout.outcome_reward {
            if kind.blame() != Some(Blame::Policy) {
                let field = format!("rollout.outcome_reward.{}", kind.as_str());
                return fail(&field, "only outcomes that are blamed on the policy have a reward".to_owned());
            }
            if !value.is_finite() {
                let field = format!("rollout.outcome_reward.{}", kind.as_str());
                return fail(&field, format!("{value} is not a finite number"));
            }
        }
        self.check_plugins()?;
        self.reward.check()?;
        let stages: Vec<&str> = self.stage.iter().chain(&self.control).map(|stage| stage.name.as_str()).collect();
        for (index, alarm) in self.alarm.iter().enumerate() {
            alarm.check(&stages).map_err(|(field, problem)| (format!("alarm[{index}].{field}"), problem))?;
        }
        if self.rollout.live_max == 0 {
            return fail("rollout.live_max", "must be at least 1".to_owned());
        }
        if self.rollout.attempts_max == 0 {
            return fail("rollout.attempts_max", "must be at least 1".to_owned());
        }
        if let Some(kind) = self.rollout.retry.keys().find(|kind| !kind.is_retryable()) {
            let field = format!("rollout.retry.{}", kind.as_str());
            let known: Vec<_> =
                OutcomeKind::ALL.iter().filter(|kind| kind.is_retryable()).map(|k| k.as_str()).collect();
            return fail(&field, format!("trying again cannot help; it can after: {}", known.join(", ")));
        }
        let trains = !self.stage.is_empty() || !self.control.is_empty();
        if trains && !self.rollout.record {
            return fail("rollout.record", "stages are trained on what is recorded; leave it on".to_owned());
        }
        if self.checkpoint.every_steps == 0 || self.checkpoint.keep == 0 {
            return fail("checkpoint", "`every_steps` and `keep` must be at least 1".to_owned());
        }
        Ok(())
    }

    fn check_policy(&self) -> Result<(), (String, String)> {
        let fail = |field: &str, problem: String| Err((field.to_owned(), problem));
        let policy = &self.policy;
        let named = [policy.local.is_some(), policy.endpoint.is_some(), policy.scripted.is_some()];
        if !matches!(named, [true, true, false]) && named.into_iter().filter(|named| *named).count() != 1 {
            return fail("policy", "say one of [policy.local], [policy.endpoint] and [policy.scripted]".to_owned());
        }
        adapter_push::check(policy)?;
        if let Some(local) = &policy.local {
            local.check()?;
            let mut corpus = local.tokenizer.iter().flat_map(|tokenizer| &tokenizer.corpus);
            if let Some(name) = corpus.find(|name| !self.dataset.contains_key(*name)) {
                return fail("policy.local.tokenizer.corpus", self.unknown_dataset(name));
            }
        }
        if let Some(endpoint) = &policy.endpoint {
            let problem = |(field, problem)| (format!("policy.endpoint.{field}"), problem);
            endpoint.check_policy(&self.limits, self.rollout.live_max).map_err(problem)?;
        }
        if policy.local.is_none() && !(self.stage.is_empty() && self.control.is_empty()) {
            let (section, what) = match policy.endpoint {
                Some(_) => ("policy.endpoint", "the model of a server cannot be trained here"),
                None => ("policy.scripted", "a scripted policy cannot be trained"),
            };
            return fail(section, format!("{what}; remove the stages, or train a [policy.local]"));
        }
        Ok(())
    }

    /// Limits and grants of single plugins, as far as that needs no look at the plugins.
    fn check_plugins(&self) -> Result<(), (String, String)> {
        let narrowed = |plugin: &str, limits: &NarrowedLimits, world: PluginWorld| {
            let problem = |error: InvalidNarrowing| (format!("{plugin}.limits.{}", error.field()), error.to_string());
            limits.of(&self.limits, world.limits()).map(|_| ()).map_err(problem)
        };
        let plugins =
            [("agent", Some(&self.agent), PluginWorld::Agent), ("grader", self.grader.as_ref(), PluginWorld::Grader)];
        for (plugin, config, world) in plugins {
            let Some(config) = config else { continue };
            narrowed(plugin, &config.limits, world)?;
            if let Some(name) = config.grants.endpoints.iter().find(|name| !self.endpoint.contains_key(*name)) {
                let problem = format!("there is no `[endpoint.{name}]` in this config; describe it there");
                return Err((format!("{plugin}.grants.endpoints"), problem));
            }
        }
        for (name, tool) in &self.tools {
            if ["agent", "grader"].contains(&name.as_str()) {
                return Err((format!("tools.{name}"), "`agent` and `grader` are not names of tools".to_owned()));
            }
            narrowed(&format!("tools.{name}"), &tool.limits, PluginWorld::Tool)?;
        }
        for (name, endpoint) in &self.endpoint {
            if name == "policy" {
                return Err(("endpoint.policy".to_owned(), "`policy` is the policy; choose another name".to_owned()));
            }
            endpoint.check().map_err(|(field, problem)| (format!("endpoint.{name}.{field}"), problem))?;
            if endpoint.adapter_push.is_some() {
                let problem = "only [policy.endpoint] draws with what is trained; remove it".to_owned();
                return Err((format!("endpoint.{name}.adapter_push"), problem));
            }
        }
        Ok(())
    }

    /// Limits of a tool. Checked before: what cannot be narrowed is as it was.
    pub(crate) fn limits_of_tool(&self, tool: &ToolConfig) -> Limits {
        tool.limits.of(&self.limits, PluginWorld::Tool.limits()).unwrap_or_else(|_| self.limits.clone())
    }

    /// Limits of the plugins that have some of their own, by `agent`, `grader` or a tool's name.
    pub(crate) fn plugin_limits(&self) -> BTreeMap<String, Limits> {
        let agent = ("agent".to_owned(), &self.agent.limits, PluginWorld::Agent);
        let grader = self.grader.iter().map(|grader| ("grader".to_owned(), &grader.limits, PluginWorld::Grader));
        let tools = self.tools.iter().map(|(name, tool)| (name.clone(), &tool.limits, PluginWorld::Tool));
        let all = std::iter::once(agent).chain(grader).chain(tools).filter(|(_, limits, _)| !limits.is_empty());
        all.filter_map(|(name, limits, world)| Some((name, limits.of(&self.limits, world.limits()).ok()?))).collect()
    }

    fn unknown_dataset(&self, name: &str) -> String {
        let known: Vec<_> = self.dataset.keys().map(String::as_str).collect();
        format!("there is no dataset `{name}`; known: {}", known.join(", "))
    }

    fn resolve(&mut self, folder: &Path) {
        let stages = self.stage.iter_mut().chain(&mut self.control);
        let paths = stages
            .map(|stage| &mut stage.algorithm)
            .chain(std::iter::once(&mut self.agent.component))
            .chain(self.grader.iter_mut().map(|plugin| &mut plugin.component))
            .chain(self.tools.values_mut().flat_map(|tool| {
                let grants = &mut tool.grants;
                let authorities = grants.http.iter_mut().filter_map(|grant| grant.certificate_authority.as_mut());
                let data = grants.folders.values_mut().chain(grants.sqlite.values_mut());
                std::iter::once(&mut tool.component).chain(data).chain(authorities)
            }))
            .chain((self.endpoint.values_mut().chain(&mut self.policy.endpoint)).flat_map(EndpointConfig::paths))
            .chain(self.dataset.values_mut().flat_map(|set| [&mut set.train, &mut set.val, &mut set.test]).flatten())
            .chain(self.policy.local.iter_mut().flat_map(LocalPolicyConfig::directories));
        for path in paths {
            *path = normalise(&folder.join(&*path));
        }
        // What a run keeps of its config says what was used.
        if let Some(local) = self.policy.local.as_mut().filter(|local| local.model.directory.is_none()) {
            local.model.preset.get_or_insert_default();
        }
    }

    fn check_files(&self, config: &Path) -> Result<(), ConfigError> {
        let stages = self.stage.iter().chain(&self.control);
        let mut files: Vec<(String, &PathBuf, &str)> =
            vec![("agent.component".to_owned(), &self.agent.component, BUILD)];
        files.extend(self.grader.iter().map(|plugin| ("grader.component".to_owned(), &plugin.component, BUILD)));
        files.extend(self.tools.iter().map(|(name, tool)| (format!("tools.{name}.component"), &tool.component, BUILD)));
        files.extend(stages.map(|stage| (format!("stage.{}.algorithm", stage.name), &stage.algorithm, BUILD)));
        for (name, set) in &self.dataset {
            for (split, path) in [(Split::Train, &set.train), (Split::Val, &set.val), (Split::Test, &set.test)] {
                files.extend(path.iter().map(|path| (format!("dataset.{name}.{}", split.as_str()), path, GENERATE)));
            }
        }
        for (field, path, hint) in files {
            if !path.is_file() {
                return Err(ConfigError::Invalid {
                    path: config.to_path_buf(),
                    field,
                    problem: format!("there is no file `{}`; {hint}", path.display()),
                });
            }
        }
        match self.policy.local.as_ref().and_then(LocalPolicyConfig::lacking) {
            Some((field, problem)) => {
                let field = format!("policy.local.{field}");
                Err(ConfigError::Invalid { path: config.to_path_buf(), field, problem })
            }
            None => Ok(()),
        }
    }
}

const BUILD: &str = "build it with `fulgurite build DIR`, or `cargo xtask guests` for those of this repository";
const GENERATE: &str = "the example's README says how its data is made";

/// Removes `.` and `..` where that needs no look at the disk, for messages that people can read.
fn normalise(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::CurDir => {}
            std::path::Component::ParentDir if clean.file_name().is_some() => {
                clean.pop();
            }
            other => clean.push(other),
        }
    }
    clean
}
