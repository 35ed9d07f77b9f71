//! Runs one case beside healthy rollouts, in one engine, one store and one runner, and looks at what is left of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::id::{PolicyVersion, ResponseId};
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{
    ChatRequest, Completion, FinishReason, KeptTokens, LlmBackend, LlmError, LlmSession, SessionInfo, TokenData, Usage,
};
use fulgurite_core::outcome::{LimitReached, OutcomeKind};
use fulgurite_core::record::RolloutSpec;
use fulgurite_core::reward::RewardSource;
use fulgurite_core::state::RolloutState;
use fulgurite_runner::{
    JinjaRenderer, Job, Plugins, Recording, RetryPolicy, RewardTerms, RolloutResult, Runner, RunnerGrants,
    RunnerSettings,
};
use fulgurite_sandbox::{PluginError, Sandbox, SandboxSettings, Templates};
use fulgurite_store::{MemoryStore, RolloutStore};
use futures::future::BoxFuture;
use serde_json::{Value, json};

use crate::case::{Case, Components, Expected, Model};
use crate::spec::spec;

/// Rollouts that must not notice anything.
pub(crate) const HEALTHY: usize = 100;
/// Rollouts of the case, started before them.
pub(crate) const NASTY: usize = 4;
/// Attempts alive at once, so that healthy ones run while nasty ones do, and many more after them in the same slots.
const LIVE_MAX: usize = 24;

/// Attempts of one rollout, the first included, when trying again can help.
const ATTEMPTS_MAX: u32 = 3;

/// What every guest of the suite may have. Small, so that reaching a limit is quick.
pub(crate) fn limits() -> Limits {
    Limits {
        memory_bytes_max: 8 << 20,
        table_elements_max: 10_000,
        guest_cpu_ms_max: 50,
        tool_calls_max: 50,
        spans_max: 200,
        output_bytes_max: 4_000,
        payload_bytes_max: 256 << 10,
        ..Limits::default()
    }
}

/// What must never be seen by the agent of a case: its own item's reference, and what belongs to other rollouts.
const SECRETS: [&str; 2] = ["CANARY-REFERENCE", "SECRET-OF-ANOTHER"];

/// The model of all rollouts of a round, and how many sessions with it are open.
struct Backend {
    model: Model,
    live: Arc<AtomicUsize>,
}

struct Session {
    model: Model,
    info: SessionInfo,
    live: Arc<AtomicUsize>,
}

impl LlmBackend for Backend {
    fn open(&self, info: SessionInfo) -> Box<dyn LlmSession> {
        self.live.fetch_add(1, Ordering::SeqCst);
        let model = if info.item_id.starts_with("nasty") { self.model } else { Model::Answers };
        Box::new(Session { model, info, live: Arc::clone(&self.live) })
    }

    fn name(&self) -> &'static str {
        "test"
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.live.fetch_sub(1, Ordering::SeqCst);
    }
}

impl LlmSession for Session {
    fn chat(&self, call_index: u64, _: Arc<ChatRequest>) -> BoxFuture<'static, Result<Arc<Completion>, LlmError>> {
        let (text, tokens) = match self.model {
            Model::Answers if self.info.item_id.starts_with("nasty") => ("fine".to_owned(), 3),
            Model::Answers => (format!("SECRET-OF-ANOTHER {}", self.info.item_id), 3),
            Model::Letters(letters) => ("x".repeat(letters), 3),
            Model::Tokens(tokens) => ("fine".to_owned(), tokens),
            Model::Silent => return Box::pin(std::future::pending()),
        };
        let completion = Completion {
            text,
            tool_calls: vec![],
            finish_reason: FinishReason::Stop,
            usage: Usage { prompt_tokens: 5, completion_tokens: 3 },
            response_id: ResponseId::of_call(&self.info.attempt, call_index),
            tokens: Some(TokenData {
                prompt_ids: vec![1; tokens],
                completion_ids: vec![2; tokens],
                log_probs: vec![-0.5; tokens],
                processed_log_probs: vec![],
                policy_version: PolicyVersion(0),
                token_versions: vec![],
                kept: KeptTokens::default(),
                model: None,
            }),
            not_trainable: None,
        };
        Box::pin(std::future::ready(Ok(Arc::new(completion))))
    }
}

/// What all rounds share: one engine and its compiled components.
pub(crate) struct Bench {
    sandbox: Sandbox,
    plugins: Plugins,
    templates: Arc<Templates>,
    folder: tempfile::TempDir,
}

impl Bench {
    /// An engine; `fuel`: one that counts instructions.
    pub(crate) fn new(fuel: bool) -> Self {
        let component = |name: &str| {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/plugins").join(name);
            assert!(path.is_file(), "{} is missing; run `cargo xtask guests` first", path.display());
            path
        };
        let sandbox = Sandbox::new(SandboxSettings { fuel, ..SandboxSettings::default() }).unwrap();
        let plugins = Plugins {
            agent: sandbox.load_agent(&component("nasty_agent.wasm")).unwrap(),
            grader: Some(sandbox.load_grader(&component("nasty_grader.wasm")).unwrap()),
            tools: BTreeMap::from([("tool".to_owned(), sandbox.load_tool(&component("nasty_tool.wasm")).unwrap())]),
        };
        let templates = BTreeMap::from([
            ("greeting".to_owned(), "Hello {{ name }}".to_owned()),
            ("huge".to_owned(), "x".repeat(1 << 20)),
        ]);
        let templates = Arc::new(Templates::new(1, templates, Arc::new(JinjaRenderer)));
        Self { sandbox, plugins, templates, folder: tempfile::tempdir().unwrap() }
    }

    fn write(&self, case: &Case, text: &str) -> std::path::PathBuf {
        let path = self.folder.path().join(format!("{}.wasm", case.name));
        let bytes = wat::parse_str(text).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// The components of a case, compiled once for all its rounds.
    pub(crate) fn load(&self, case: &Case) -> Result<Plugins, PluginError> {
        let mut plugins = self.plugins.clone();
        match &case.components {
            Components::Prebuilt => {}
            Components::Agent(text) => plugins.agent = self.sandbox.load_agent(&self.write(case, text))?,
            Components::Grader(text) => plugins.grader = Some(self.sandbox.load_grader(&self.write(case, text))?),
        }
        Ok(plugins)
    }

    fn runner(&self, store: &Arc<MemoryStore>, plugins: Plugins, limits: Limits) -> Runner {
        let settings = RunnerSettings {
            live_max: LIVE_MAX,
            retry: RetryPolicy { attempts_max: ATTEMPTS_MAX, by_kind: BTreeMap::new() },
            grants: RunnerGrants::default(),
            recording: Recording::Durable,
            worker: "test".to_owned(),
            control: None,
            limits,
            outcome_reward: BTreeMap::new(),
            outcome_dimensions: std::collections::BTreeSet::new(),
            reward_terms: RewardTerms::default(),
            templates: Arc::clone(&self.templates),
        };
        Runner::new(Arc::clone(store) as Arc<dyn RolloutStore>, plugins, settings).unwrap()
    }

    /// Runs the case and the healthy rollouts once. Nothing of it is alive when this returns.
    pub(crate) async fn round(&self, case: &Case, plugins: Option<&Plugins>) -> Result<(), String> {
        let live = Arc::new(AtomicUsize::new(0));
        let backend: Arc<dyn LlmBackend> = Arc::new(Backend { model: case.model, live: Arc::clone(&live) });
        let store = Arc::new(MemoryStore::new());
        {
            let healthy = self.runner(&store, self.plugins.clone(), limits());
            // The same runner wherever it can be.
            let nasty = match plugins {
                Some(plugins) if !matches!(case.components, Components::Prebuilt) || case.limits != limits() => {
                    self.runner(&store, plugins.clone(), case.limits.clone())
                }
                _ => healthy.clone(),
            };
            let jobs = (0..NASTY).map(|index| job(&format!("nasty-{index}"), &case.input, &case.world)).collect();
            let batch = match plugins {
                Some(_) => Some(nasty.submit(jobs, Arc::clone(&backend)).await.map_err(|e| e.to_string())?),
                None => None,
            };
            let jobs = (0..HEALTHY).map(healthy_job).collect();
            let beside = healthy.submit(jobs, backend).await.map_err(|error| error.to_string())?;
            // What is refused is refused while others run.
            if let Expected::Refused { says, .. } = &case.expected {
                let error = self.load(case).err().ok_or("it was loaded")?;
                case.refusal(&error)?;
                let said = full(&error);
                expect(said.contains(says), || format!("{said:?} does not say {says:?}"))?;
            }
            if let Some(batch) = batch {
                for result in batch.all().await.map_err(|error| error.to_string())? {
                    check_nasty(case, &result, &store)?;
                }
            }
            let beside = beside.all().await.map_err(|error| error.to_string())?;
            expect(beside.len() == HEALTHY, || format!("{} of {HEALTHY} healthy rollouts", beside.len()))?;
            for (index, result) in beside.iter().enumerate() {
                check_healthy(index, result, &store)?;
            }
        }
        // The runner's writer lets go of the store on a thread of its own.
        let patience = Instant::now() + Duration::from_mins(1);
        loop {
            let (owners, sessions) = (Arc::strong_count(&store), live.load(Ordering::SeqCst));
            if (owners, sessions) == (1, 0) {
                return Ok(());
            }
            expect(Instant::now() < patience, || {
                format!("{sessions} sessions are open, the store has {owners} owners")
            })?;
            tokio::task::yield_now().await;
        }
    }
}

fn healthy_job(index: usize) -> Job {
    let input = json!(nasty_agent::Input::new(nasty_agent::Behaviour::Converse));
    job(&format!("healthy-{index}"), &input, &json!(format!("SECRET-OF-ANOTHER {index}")))
}

fn job(id: &str, input: &Value, world: &Value) -> Job {
    let reference = json!({"answer": "CANARY-REFERENCE"});
    let item = DatasetItem::new(id, input.clone(), world.clone(), reference);
    let spec = RolloutSpec { resources_version: 1, ..spec(id, &item) };
    Job { spec: spec.into(), item: Arc::new(item) }
}

/// An error with its causes.
pub(crate) fn full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

pub(crate) fn expect(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

fn check_healthy(index: usize, result: &RolloutResult, store: &MemoryStore) -> Result<(), String> {
    let outcome = &result.outcome;
    let expected = format!("\"SECRET-OF-ANOTHER healthy-{index}\"");
    expect(outcome.kind == OutcomeKind::Completed && outcome.output == expected, || {
        format!("healthy {index}: {outcome:?}")
    })?;
    let rewards = &result.attempt.rewards;
    let fair = matches!(rewards.as_slice(), [reward] if reward.source == RewardSource::Grader
        && (reward.value - 1.0).abs() < f64::EPSILON);
    expect(fair, || format!("healthy {index}: {rewards:?}"))?;
    check_record(result, store)
}

fn check_nasty(case: &Case, result: &RolloutResult, store: &MemoryStore) -> Result<(), String> {
    let Expected::Ends { kind, limit, says, holds } = &case.expected else { return Ok(()) };
    let outcome = &result.outcome;
    let reached = limit.map(|(name, value)| LimitReached { name: name.to_owned(), value });
    expect((outcome.kind, &outcome.limit) == (*kind, &reached), || {
        format!("expected {kind:?} {limit:?}: {outcome:?}")
    })?;
    expect(outcome.detail.contains(says), || format!("{:?} does not say {says:?}", outcome.detail))?;
    expect(*kind == OutcomeKind::Completed || outcome.output == "null", || format!("{outcome:?}"))?;
    // A fault is never a number.
    let judged = result.attempt.rewards.iter().any(|reward| reward.source != RewardSource::Agent);
    expect(!judged || kind.is_graded(), || format!("rewards of {kind:?}: {:?}", result.attempt.rewards))?;
    let recorded = serde_json::to_string(&*result.spans).map_err(|error| error.to_string())?;
    for secret in SECRETS {
        expect(!recorded.contains(secret), || format!("its spans say {secret}"))?;
    }
    check_record(result, store)?;
    holds(result)
}

/// What the runner says is what the store keeps.
fn check_record(result: &RolloutResult, store: &MemoryStore) -> Result<(), String> {
    let id = &result.spec.id;
    let attempts = store.attempts(id).map_err(|error| error.to_string())?;
    // A guest's fault repeats; what may be the machine's is tried again, and fails as it did.
    let expected = if result.outcome.kind.is_retryable() { ATTEMPTS_MAX as usize } else { 1 };
    expect(attempts.len() == expected, || format!("{id}: {} attempts, not {expected}", attempts.len()))?;
    for attempt in &attempts {
        expect(attempt.outcome.as_ref() == Some(&result.outcome), || format!("{id}: {:?}", attempt.outcome))?;
    }
    let state = store.rollout(id).map_err(|error| error.to_string())?.map(|rollout| rollout.state);
    let expected = if result.is_graded() { RolloutState::Succeeded } else { RolloutState::Failed };
    expect(state == Some(expected), || format!("{id}: {state:?}"))?;
    let spans = store.spans(&result.attempt.key).map_err(|error| error.to_string())?;
    expect(spans == *result.spans, || format!("{id}: the store has {} spans", spans.len()))?;
    let own = |(sequence, span): (u64, &fulgurite_core::span::Span)| {
        span.attempt == result.attempt.key && span.sequence == sequence
    };
    expect((0..).zip(&spans).all(own), || format!("{id}: spans that are not its own"))
}
