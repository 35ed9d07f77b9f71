//! The load that is measured: an agent with three model calls, prompts of 1.2 KB, answers of 32 tokens.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use fulgurite_core::dataset::{DatasetItem, Split};
use fulgurite_core::id::{PolicyVersion, RolloutId};
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{LlmBackend, Sampling};
use fulgurite_core::record::{RolloutMode, RolloutSpec};
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_runner::scripted::{Reply, Script, ScriptedPolicy};
use fulgurite_runner::{Job, Plugins, Recording, RetryPolicy, RewardTerms, Runner, RunnerGrants, RunnerSettings};
use fulgurite_sandbox::{Sandbox, SandboxSettings, Templates};
use fulgurite_store::RolloutStore;

use crate::arguments::BenchLoadArguments;
use crate::failure::Failure;
use crate::paths;

/// Items that the rollouts go through again and again.
const ITEMS: u64 = 64;
/// Bytes of the first message.
const PROMPT_BYTES: usize = 1_200;
/// Tokens of every answer.
const COMPLETION_TOKENS: u32 = 32;
/// The answer: as long as 32 tokens are.
pub(crate) const ANSWER: &str = "The room that fits best is R12: it seats eight, has a whiteboard and a screen, is free \
                                 from ten to eleven, and is the smallest of those that do.";

/// Where the components of the benchmark are.
#[derive(Debug, Clone)]
pub(crate) struct Components {
    pub(crate) agent: PathBuf,
    pub(crate) grader: PathBuf,
}

impl Components {
    pub(crate) fn of(arguments: &BenchLoadArguments) -> Self {
        Self { agent: arguments.agent.clone(), grader: arguments.grader.clone() }
    }
}

/// Makes jobs.
pub(crate) struct Load {
    items: Vec<Arc<DatasetItem>>,
    pub(crate) runner: Runner,
    pub(crate) backend: Arc<dyn LlmBackend>,
}

/// What the load is to be like.
pub(crate) struct LoadSettings {
    pub(crate) live_max: usize,
    pub(crate) latency_ms: u64,
    pub(crate) graded: bool,
    pub(crate) recording: Recording,
}

/// A sandbox for so many live agents, as `fulgurite run` makes one for `rollout.live_max`.
pub(crate) fn sandbox(live_max: usize) -> Result<Sandbox, Failure> {
    let settings = SandboxSettings::new(paths::cache(), &Limits::default());
    Sandbox::new(SandboxSettings { guests_max: Some(live_max), ..settings }).map_err(Failure::failed)
}

/// Words of questions. Drawn at random, so that a recording is about as hard to compress as one of real conversations.
const WORDS: &[&str] = &[
    "room",
    "people",
    "meeting",
    "whiteboard",
    "screen",
    "projector",
    "window",
    "quiet",
    "large",
    "small",
    "free",
    "from",
    "until",
    "before",
    "after",
    "needs",
    "seats",
    "eight",
    "twelve",
    "four",
    "floor",
    "first",
    "second",
    "third",
    "near",
    "lift",
    "kitchen",
    "booked",
    "cancelled",
    "moved",
    "team",
    "customer",
    "interview",
    "workshop",
    "training",
    "board",
    "weekly",
    "monthly",
    "morning",
    "afternoon",
    "o'clock",
    "half",
    "past",
    "must",
    "should",
    "prefers",
    "with",
    "without",
    "phone",
    "camera",
    "video",
    "remote",
    "guests",
    "coffee",
    "lunch",
    "wheelchair",
    "access",
    "parking",
    "building",
    "the",
    "a",
    "and",
    "or",
    "but",
    "that",
    "this",
    "another",
    "same",
    "tomorrow",
    "today",
    "next",
    "week",
    "Monday",
    "Friday",
];

/// The text of an item's question.
pub(crate) fn question(index: u64) -> String {
    let mut text = format!("Request {index}:");
    let mut generator = Generator::new(Seed::new(index));
    while text.len() < PROMPT_BYTES {
        text.push(' ');
        text.push_str(WORDS.get(generator.below(WORDS.len())).copied().unwrap_or_default());
    }
    text.truncate(PROMPT_BYTES);
    text
}

impl Load {
    pub(crate) fn new(
        components: &Components,
        store: Arc<dyn RolloutStore>,
        settings: &LoadSettings,
    ) -> Result<Self, Failure> {
        let sandbox = sandbox(settings.live_max)?;
        let grader = settings.graded.then(|| sandbox.load_grader(&components.grader)).transpose().map_err(hinted)?;
        let agent = sandbox.load_agent(&components.agent).map_err(hinted)?;
        let runner = RunnerSettings {
            live_max: settings.live_max,
            retry: RetryPolicy { attempts_max: 1, by_kind: std::collections::BTreeMap::new() },
            limits: Limits::default(),
            outcome_reward: std::collections::BTreeMap::new(),
            outcome_dimensions: std::collections::BTreeSet::new(),
            reward_terms: RewardTerms::default(),
            templates: Arc::new(Templates::none()),
            grants: RunnerGrants::default(),
            recording: settings.recording,
            worker: "bench".to_owned(),
            control: None,
        };
        let plugins = Plugins { agent, grader, tools: std::collections::BTreeMap::new() };
        let runner = Runner::new(store, plugins, runner).map_err(Failure::failed)?;
        let items = (0..ITEMS).map(|index| {
            let input = serde_json::json!({ "question": question(index) });
            let reference = serde_json::json!({ "answer": ANSWER });
            Arc::new(DatasetItem::new(format!("item-{index}"), input, serde_json::Value::Null, reference))
        });
        let script = Script {
            replies: vec![Reply::Text { text: ANSWER.to_owned() }],
            latency_ms: settings.latency_ms,
            made_up_tokens: COMPLETION_TOKENS,
        };
        let backend = Arc::new(ScriptedPolicy::new(&script, []).map_err(Failure::failed)?);
        Ok(Self { items: items.collect(), runner, backend })
    }

    /// The jobs of these numbers.
    pub(crate) fn jobs(&self, numbers: std::ops::Range<u64>) -> Result<Vec<Job>, Failure> {
        numbers.map(|number| self.job(number)).collect()
    }

    fn job(&self, number: u64) -> Result<Job, Failure> {
        let place = usize::try_from(number % ITEMS).unwrap_or(0);
        let item = self.items.get(place).ok_or_else(|| Failure::failed(anyhow::anyhow!("there are no items")))?;
        let spec = RolloutSpec {
            id: RolloutId::derived("bench", number / 1_000, number % 1_000).map_err(Failure::failed)?,
            stage: "bench".to_owned(),
            step: number / 1_000,
            group: number,
            dataset: "bench".to_owned(),
            split: Split::Test,
            item_id: item.id.clone(),
            mode: RolloutMode::Test,
            seed: Seed::new(number),
            sampling: Sampling::default(),
            policy_version: PolicyVersion(0),
            resources_version: 0,
            components: self.runner.plugins().hashes(),
            item: item.texts().hash,
            execution: self.runner.execution_hash(),
            fork_of: None,
        };
        Ok(Job { spec: spec.into(), item: Arc::clone(item) })
    }
}

fn hinted(error: fulgurite_sandbox::PluginError) -> Failure {
    Failure::usage(error)
        .hint("`cargo xtask guests` builds the benchmark's components; --agent and --grader name others")
}

/// A folder that is removed when the measurement is over.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(beside: &Path) -> Result<Self, Failure> {
        let folder = beside.join(format!("fulgurite-bench-{}", std::process::id()));
        std::fs::create_dir_all(&folder).map_err(Failure::failed)?;
        Ok(Self(folder))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left behind is named so that anyone sees what it is.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
