//! Puts the pieces of a run together.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use fulgurite_core::dataset::{DatasetItem, Split};
use fulgurite_core::llm::LlmBackend;
use fulgurite_core::reward::DEFAULT_DIMENSION;
use fulgurite_core::seed::Seed;
use fulgurite_policy::{ModelFolder, PolicyEngine, PolicyTokenizer, TokenizerConfig};
use fulgurite_runner::scripted::{Script, ScriptedPolicy};
use fulgurite_runner::{JinjaRenderer, Plugins, Recording, RetryPolicy, Runner, RunnerSettings};
use fulgurite_sandbox::{AlgorithmPlugin, Sandbox, SandboxSettings, Templates};
use fulgurite_store::{RolloutStore, SledStore};

use crate::adapter_push::ServedPolicy;
use crate::config::{LocalPolicyConfig, PolicySection, RunConfig, TokenizerSection};
use crate::dataset::{Dataset, corpus_of};
use crate::error::TrainError;
use crate::grants;
use crate::host::dimension_of;
use crate::kept::keep_component;
use crate::run_directory::RunDirectory;

/// Everything that a run needs, loaded and checked.
pub(crate) struct Setup {
    pub(crate) config: RunConfig,
    pub(crate) run: RunDirectory,
    pub(crate) seed: Seed,
    pub(crate) datasets: BTreeMap<String, Arc<Dataset>>,
    pub(crate) runner: Runner,
    /// Version of the prompt templates that every rollout pins.
    pub(crate) resources_version: u64,
    /// Algorithm plugins by path: a stage and its control share one.
    pub(crate) algorithms: BTreeMap<PathBuf, Arc<AlgorithmPlugin>>,
    pub(crate) model: Model,
    pub(crate) test_items: Vec<Arc<DatasetItem>>,
}

/// What answers.
#[derive(Clone)]
pub(crate) enum Model {
    /// A model that can be trained.
    Local(PolicyEngine),
    /// The same, sampled from on a server.
    Served(ServedPolicy),
    /// A server's model.
    Endpoint(Arc<dyn LlmBackend>),
    /// Scripted answers.
    Scripted(Arc<dyn LlmBackend>),
}

impl Model {
    /// What answers with the newest weights.
    ///
    /// # Errors
    /// When a server does not take them.
    pub(crate) async fn backend(&self) -> Result<Arc<dyn LlmBackend>, TrainError> {
        Ok(match self {
            Self::Local(engine) => engine.backend(),
            Self::Served(policy) => policy.backend().await?,
            Self::Endpoint(backend) | Self::Scripted(backend) => Arc::clone(backend),
        })
    }

    pub(crate) fn engine(&self) -> Option<&PolicyEngine> {
        match self {
            Self::Local(engine) | Self::Served(ServedPolicy { engine, .. }) => Some(engine),
            Self::Endpoint(_) | Self::Scripted(_) => None,
        }
    }

    /// Its name in the ids of held-out rollouts.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Local(_) | Self::Served(_) | Self::Endpoint(_) => "policy",
            Self::Scripted(_) => "scripted",
        }
    }
}

/// The plugins of all stages and controls, each shown its config.
async fn load_algorithms(
    sandbox: &Sandbox,
    config: &RunConfig,
) -> Result<BTreeMap<PathBuf, Arc<AlgorithmPlugin>>, TrainError> {
    let mut algorithms = BTreeMap::new();
    for stage in config.stage.iter().chain(&config.control) {
        let plugin = match algorithms.get(&stage.algorithm) {
            Some(known) => Arc::clone(known),
            None => sandbox.load_algorithm(&stage.algorithm)?,
        };
        let failed = |source| TrainError::Algorithm { stage: stage.name.clone(), step: 0, source };
        plugin.check(&stage.settings(), &config.limits).await.map_err(failed)?;
        algorithms.insert(stage.algorithm.clone(), plugin);
    }
    Ok(algorithms)
}

impl Setup {
    /// Loads plugins and datasets, opens the run's store unless it is given, and makes the policy with the weights of its
    /// folder or of the run's seed.
    pub(crate) async fn new(
        config: RunConfig,
        run: RunDirectory,
        cache: Option<PathBuf>,
        store: Option<Arc<dyn RolloutStore>>,
    ) -> Result<Self, TrainError> {
        let seed = Seed::new(config.seed);
        let mut datasets = BTreeMap::new();
        for (name, files) in &config.dataset {
            datasets.insert(name.clone(), Arc::new(Dataset::load(files)?));
        }
        let evaluated = datasets.get(&config.evaluation.dataset);
        let test_items = evaluated.map(|set| set.split(Split::Test).to_vec()).unwrap_or_default();
        let guarded_cache = cache.clone();
        let sandbox = Sandbox::new(SandboxSettings {
            guests_max: Some(config.rollout.live_max.saturating_mul(1 + config.tools.len())),
            ..SandboxSettings::of_run(cache, &config.limits, &config.plugin_limits())
        })?;
        let tools = grants::load_tools(&sandbox, &config, &run, guarded_cache.as_deref()).await?;
        let grader = config.grader.as_ref();
        let grader = grader.map(|grader| sandbox.load_granted_grader(&grader.component, &grader.grants)).transpose()?;
        let splits = [Split::Train, Split::Val, Split::Test];
        let items = datasets.values().flat_map(|set: &Arc<Dataset>| splits.map(|split| set.split(split).to_vec()));
        let runner_grants = grants::of_runner(&config, &tools, &items.flatten().collect::<Vec<_>>())?;
        let plugins = Plugins { agent: grants::load_agent(&sandbox, &config)?, grader, tools };
        let mut components = vec![(&config.agent.component, plugins.agent.hash())];
        components.extend(config.grader.as_ref().zip(plugins.grader.as_ref()).map(|(c, p)| (&c.component, p.hash())));
        components.extend(
            config.tools.iter().filter_map(|(name, tool)| Some((&tool.component, plugins.tools.get(name)?.hash()))),
        );
        for (component, hash) in components {
            keep_component(&run, component, &hash).map_err(TrainError::io(run.components()))?;
        }
        let algorithms = load_algorithms(&sandbox, &config).await?;
        let store = match store {
            Some(store) => store,
            None => Arc::new(SledStore::open(&run.store())?),
        };
        // Publishing again what is there gives the version that is there, so a resumed run pins the same one.
        let mut resources_version = 0;
        for (name, text) in &config.templates {
            resources_version = store.publish_template(resources_version, name, text)?;
        }
        let settings = RunnerSettings {
            live_max: config.rollout.live_max,
            retry: RetryPolicy { attempts_max: config.rollout.attempts_max, by_kind: config.rollout.retry.clone() },
            limits: config.limits.clone(),
            outcome_reward: config.rollout.outcome_reward.clone(),
            outcome_dimensions: outcome_dimensions(&config),
            reward_terms: config.reward.terms(),
            templates: Arc::new(Templates::new(resources_version, config.templates.clone(), Arc::new(JinjaRenderer))),
            recording: if config.rollout.record { Recording::Durable } else { Recording::Nothing },
            worker: worker_id(),
            control: Some(run.control()),
            grants: runner_grants,
        };
        let runner = Runner::new(store, plugins, settings)?;
        let model = match &config.policy {
            PolicySection { local: Some(local), endpoint, .. } => {
                let engine = fresh_policy(local, &datasets, seed).await?;
                match endpoint {
                    Some(endpoint) => Model::Served(endpoint.open_served(engine, &config).await?),
                    None => Model::Local(engine),
                }
            }
            PolicySection { endpoint: Some(endpoint), .. } => Model::Endpoint(endpoint.open_policy().await?),
            PolicySection { scripted: Some(script), .. } => Model::Scripted(scripted("policy", script, &test_items)?),
            PolicySection { .. } => return Err(TrainError::NoPolicy),
        };
        Ok(Self { config, run, seed, datasets, runner, resources_version, algorithms, model, test_items })
    }

    pub(crate) fn evaluator<'a>(
        &'a self,
        progress: &'a dyn crate::progress::ProgressSink,
    ) -> crate::evaluate::Evaluator<'a> {
        crate::evaluate::Evaluator {
            runner: &self.runner,
            config: &self.config.evaluation,
            items: &self.test_items,
            accept: &self.config.rollout.reward_accept,
            resources_version: self.resources_version,
            seed: self.seed.child("evaluation"),
            progress,
        }
    }
}

/// This process among all that ever worked on a run.
/// Dimensions beside the default one that something is trained on.
fn outcome_dimensions(config: &RunConfig) -> BTreeSet<String> {
    let optimised = config.stage.iter().chain(&config.control).map(dimension_of);
    optimised.filter(|dimension| *dimension != DEFAULT_DIMENSION).map(str::to_owned).collect()
}

fn worker_id() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}", std::process::id(), since.as_millis())
}

/// Compiles a script for the held-out items.
pub(crate) fn scripted(
    name: &str,
    script: &Script,
    items: &[Arc<DatasetItem>],
) -> Result<Arc<dyn LlmBackend>, TrainError> {
    let policy = ScriptedPolicy::new(script, items.iter().cloned())
        .map_err(|source| TrainError::Script { name: name.to_owned(), source })?;
    Ok(Arc::new(policy))
}

async fn fresh_policy(
    local: &LocalPolicyConfig,
    datasets: &BTreeMap<String, Arc<Dataset>>,
    seed: Seed,
) -> Result<PolicyEngine, TrainError> {
    let model = local.engine();
    let start = match (&local.model.directory, &local.tokenizer) {
        (Some(directory), _) => Start::Folder(directory.clone()),
        (None, Some(tokenizer)) => Start::Random(corpus(tokenizer, datasets)?, tokenizer.clone()),
        (None, None) => return Err(TrainError::NoPolicy),
    };
    // Reading or making weights and training a tokenizer are seconds of work that must not hold an async worker.
    let made = tokio::task::spawn_blocking(move || match start {
        Start::Folder(directory) => ModelFolder::open(&directory)?.engine(&model, seed.child("policy")),
        Start::Random(corpus, tokenizer) => {
            let settings = TokenizerConfig { vocab_size: tokenizer.vocab_size, atoms_pattern: tokenizer.atoms_pattern };
            let tokenizer = PolicyTokenizer::train(corpus.into_iter(), &settings)?;
            PolicyEngine::create(&model, tokenizer, seed.child("policy"))
        }
    });
    match made.await {
        Ok(engine) => Ok(engine?),
        Err(_) => Err(TrainError::Runner(fulgurite_runner::RunnerError::WorkerLost)),
    }
}

/// What a policy starts from.
enum Start {
    /// The weights and the tokenizer of a folder.
    Folder(PathBuf),
    /// Random weights, and a tokenizer that is trained on these texts.
    Random(Vec<String>, TokenizerSection),
}

/// The texts that a tokenizer is trained on.
fn corpus(tokenizer: &TokenizerSection, datasets: &BTreeMap<String, Arc<Dataset>>) -> Result<Vec<String>, TrainError> {
    let mut corpus = vec![];
    for name in &tokenizer.corpus {
        let items = datasets.get(name).map(|set| set.split(Split::Train)).unwrap_or_default();
        if items.is_empty() {
            return Err(TrainError::MissingSplit { dataset: name.clone(), split: "train" });
        }
        corpus.extend(items.iter().flat_map(|item| corpus_of(item)));
    }
    Ok(corpus)
}
