//! What the tests of replay and fork share: real components, a model that answers as its seed says, recordings.

#![allow(dead_code, unreachable_pub, reason = "shared by several test binaries")]

pub mod spec;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::task::{Context, Poll, ready};

use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::id::{AttemptKey, AttemptNumber, PolicyVersion, ResponseId, RolloutId};
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{
    ChatRequest, Completion, FinishReason, KeptTokens, LlmBackend, LlmError, LlmSession, LlmStream, SessionInfo,
    TokenData, Usage,
};
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::record::{ExecutionSettings, ForkPoint, RolloutSpec};
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_core::span::Span;
use fulgurite_runner::replay::{Items, Recorded, ReplayReport, Replayer};
use fulgurite_runner::{
    JinjaRenderer, Job, Plugins, Recording, RetryPolicy, RewardTerms, RolloutResult, Runner, RunnerGrants,
    RunnerSettings,
};
use fulgurite_sandbox::{Sandbox, SandboxSettings, Templates};
use fulgurite_store::{MemoryStore, RolloutStore};
use futures::StreamExt;
use futures::future::BoxFuture;
use nasty_agent::{Behaviour, Input};
use serde_json::{Value, json};

use self::spec::spec;

/// A component that `cargo xtask guests` has built.
pub fn component(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/plugins").join(format!("{name}.wasm"));
    assert!(path.is_file(), "{} is missing; run `cargo xtask guests` first", path.display());
    path
}

/// One engine for all tests of a binary.
pub fn sandbox() -> &'static Sandbox {
    static SANDBOX: LazyLock<Sandbox> = LazyLock::new(|| Sandbox::new(SandboxSettings::default()).unwrap());
    &SANDBOX
}

/// The nasty guests in an engine.
pub fn plugins_of(sandbox: &Sandbox) -> Plugins {
    Plugins {
        agent: sandbox.load_agent(&component("nasty_agent")).unwrap(),
        grader: Some(sandbox.load_grader(&component("nasty_grader")).unwrap()),
        tools: BTreeMap::from([("tool".to_owned(), sandbox.load_tool(&component("nasty_tool")).unwrap())]),
    }
}

/// The nasty guests.
pub fn plugins() -> Plugins {
    static PLUGINS: LazyLock<Plugins> = LazyLock::new(|| plugins_of(sandbox()));
    PLUGINS.clone()
}

/// The same with one text of a component replaced by another of the same length: a single changed constant.
pub fn patched(name: &str, old: &str, new: &str) -> tempfile::TempPath {
    assert_eq!(old.len(), new.len());
    let mut bytes = std::fs::read(component(name)).unwrap();
    let place = bytes.windows(old.len()).position(|window| window == old.as_bytes());
    let place = place.unwrap_or_else(|| panic!("{name} has no constant {old:?}"));
    bytes[place..place + old.len()].copy_from_slice(new.as_bytes());
    let path = tempfile::Builder::new().suffix(".wasm").tempfile().unwrap().into_temp_path();
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Small, so that reaching a limit is quick.
pub fn limits() -> Limits {
    Limits {
        memory_bytes_max: 8 << 20,
        table_elements_max: 10_000,
        guest_cpu_ms_max: 100,
        tool_calls_max: 50,
        spans_max: 300,
        output_bytes_max: 8_000,
        payload_bytes_max: 256 << 10,
        ..Limits::default()
    }
}

/// What the model does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Model {
    /// Answers after a while, as seed and call say.
    Answers,
    /// The same, and now and then it fails.
    Moody,
    /// Answers with so many letters.
    Letters(usize),
    /// Is down from this call on.
    DownFrom(u64),
    /// Says that the prompt is too long.
    Full,
    /// Answers so many calls and no more.
    SilentFrom(u64),
}

/// The model of a batch, and how often it was asked.
#[derive(Debug, Clone)]
pub struct Backend {
    pub model: Model,
    pub asked: Arc<AtomicUsize>,
    pub sessions: Arc<Mutex<Vec<SessionInfo>>>,
}

impl Backend {
    pub fn new(model: Model) -> Self {
        Self { model, asked: Arc::default(), sessions: Arc::default() }
    }

    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

struct Session {
    backend: Backend,
    info: SessionInfo,
}

impl LlmBackend for Backend {
    fn open(&self, info: SessionInfo) -> Box<dyn LlmSession> {
        self.sessions.lock().unwrap().push(info.clone());
        Box::new(Session { backend: self.clone(), info })
    }

    fn name(&self) -> &'static str {
        "test"
    }
}

impl LlmSession for Session {
    fn chat(
        &self,
        call_index: u64,
        request: Arc<ChatRequest>,
    ) -> BoxFuture<'static, Result<Arc<Completion>, LlmError>> {
        self.backend.asked.fetch_add(1, Ordering::SeqCst);
        let mut draw = Generator::new(self.info.seed.child("model").child_index(call_index));
        let waits = draw.below(5);
        let mood = draw.below(12);
        let word = draw.below(1_000);
        let model = self.backend.model;
        let last = request.messages.last().map(|message| message.content.clone()).unwrap_or_default();
        let text = match model {
            Model::Letters(letters) => "x".repeat(letters),
            _ => format!("answer {word} to {last}"),
        };
        let failure = match (model, mood) {
            (Model::DownFrom(from), _) if call_index >= from => Some(LlmError::Unavailable("down".to_owned())),
            (Model::Full, _) => Some(LlmError::ContextLengthExceeded { prompt_tokens: 9, context_tokens_max: 8 }),
            (Model::Moody, 0) => Some(LlmError::Unavailable("out of order".to_owned())),
            (Model::Moody, 1) => Some(LlmError::Unsupported("no such sampling".to_owned())),
            // A model that says what the host says of a call that never ended.
            (Model::Moody, 2) => Some(LlmError::Unavailable("the call was cancelled".to_owned())),
            _ => None,
        };
        let silent = matches!(model, Model::SilentFrom(from) if call_index >= from);
        let response_id = ResponseId::of_call(&self.info.attempt, call_index);
        Box::pin(async move {
            if silent {
                std::future::pending::<()>().await;
            }
            for _ in 0..waits {
                tokio::task::yield_now().await;
            }
            if let Some(failure) = failure {
                return Err(failure);
            }
            let ids: Vec<u32> = text.bytes().take(40).map(u32::from).collect();
            Ok(Arc::new(Completion {
                tool_calls: vec![],
                finish_reason: if word.is_multiple_of(7) { FinishReason::Length } else { FinishReason::Stop },
                usage: Usage { prompt_tokens: 5, completion_tokens: u32::try_from(ids.len()).unwrap() },
                response_id,
                tokens: Some(TokenData {
                    prompt_ids: vec![1, 2, 3, 4, 5],
                    log_probs: ids.iter().map(|id| -0.125 * *id as f32).collect(),
                    processed_log_probs: vec![],
                    completion_ids: ids,
                    policy_version: PolicyVersion(3),
                    token_versions: vec![],
                    kept: KeptTokens::default(),
                    model: None,
                }),
                not_trainable: None,
                text,
            }))
        })
    }

    fn stream(&self, call_index: u64, request: Arc<ChatRequest>) -> Box<dyn LlmStream> {
        let mut draw = Generator::new(self.info.seed.child("pieces").child_index(call_index));
        let waits = draw.below(3);
        Box::new(Pieces { answer: self.chat(call_index, request), ended: None, draw, waits, taken: 0 })
    }
}

/// An answer that is read as it is drawn: six letters at a time, with waits between them.
struct Pieces {
    answer: BoxFuture<'static, Result<Arc<Completion>, LlmError>>,
    ended: Option<Result<Arc<Completion>, LlmError>>,
    draw: Generator,
    waits: usize,
    taken: usize,
}

impl Pieces {
    fn piece(&self) -> Option<&str> {
        let rest = self.ended.as_ref()?.as_ref().ok()?.text.get(self.taken..)?;
        let (end, _) = rest.char_indices().nth(6)?;
        rest.get(..end)
    }
}

impl LlmStream for Pieces {
    fn poll_text(&mut self, context: &mut Context<'_>) -> Poll<bool> {
        if self.ended.is_none() {
            self.ended = Some(ready!(self.answer.as_mut().poll(context)));
        }
        if self.waits > 0 {
            self.waits -= 1;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(self.piece().is_some())
    }

    fn take_text(&mut self) -> Option<String> {
        let piece = self.piece()?.to_owned();
        self.taken += piece.len();
        self.waits = self.draw.below(3);
        Some(piece)
    }

    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<Result<Arc<Completion>, LlmError>> {
        if self.ended.is_none() {
            self.ended = Some(ready!(self.answer.as_mut().poll(context)));
        }
        self.ended.clone().map_or(Poll::Pending, Poll::Ready)
    }

    fn heard(&self) -> Option<Completion> {
        let whole = self.ended.as_ref()?.as_ref().ok().filter(|_| self.taken > 0)?;
        let text = whole.text[..self.taken].to_owned();
        Some(Completion { text, finish_reason: FinishReason::Cancelled, ..Completion::clone(whole) })
    }
}

/// A model that nobody may ask.
pub struct Forbidden;

impl LlmBackend for Forbidden {
    fn open(&self, info: SessionInfo) -> Box<dyn LlmSession> {
        panic!("a session was opened: {info:?}")
    }

    fn name(&self) -> &'static str {
        "forbidden"
    }
}

/// A store with runners on it.
#[derive(Clone)]
pub struct Bench {
    pub store: Arc<dyn RolloutStore>,
}

impl Bench {
    pub fn new() -> Self {
        Self { store: Arc::new(MemoryStore::new()) }
    }

    pub fn runner(&self, plugins: Plugins, limits: Limits) -> Runner {
        let templates = BTreeMap::from([("greeting".to_owned(), "Hello {{ name }}".to_owned())]);
        let settings = RunnerSettings {
            grants: RunnerGrants::default(),
            live_max: 64,
            retry: RetryPolicy { attempts_max: 1, by_kind: BTreeMap::new() },
            limits,
            outcome_reward: BTreeMap::from([(OutcomeKind::MalformedAnswer, -0.5)]),
            outcome_dimensions: std::collections::BTreeSet::from(["judged".to_owned()]),
            reward_terms: RewardTerms::default(),
            templates: Arc::new(Templates::new(1, templates, Arc::new(JinjaRenderer))),
            recording: Recording::Durable,
            worker: "test".to_owned(),
            control: None,
        };
        Runner::new(Arc::clone(&self.store), plugins, settings).unwrap()
    }

    /// Runs jobs to their end.
    pub async fn record(&self, runner: &Runner, jobs: Vec<Job>, model: Model) -> Vec<RolloutResult> {
        runner.submit(jobs, Arc::new(Backend::new(model))).await.unwrap().all().await.unwrap()
    }

    pub fn settings(&self, recorded: &Recorded) -> ExecutionSettings {
        let bytes = self.store.blob(&recorded.spec.execution).unwrap().expect("the conditions are kept");
        serde_json::from_slice(&bytes).unwrap()
    }

    pub fn load(&self, id: &RolloutId) -> Recorded {
        let attempt = self.store.rollout(id).unwrap().unwrap().attempt.unwrap_or(AttemptNumber::FIRST);
        Recorded::load(&*self.store, &AttemptKey { rollout: id.clone(), attempt }, &Items::default()).unwrap()
    }

    pub fn replayer(&self, recorded: &Recorded, plugins: Plugins) -> Replayer {
        Replayer::new(plugins, &self.settings(recorded), recorded.spec.resources_version).unwrap()
    }

    /// Replays one rollout under the conditions that it pins.
    pub async fn replay(&self, id: &RolloutId, plugins: Plugins) -> ReplayReport {
        let recorded = self.load(id);
        self.replayer(&recorded, plugins).replay(&recorded, None).await
    }

    /// Replays rollouts of the same conditions, many at once, and returns those that are not identical.
    pub async fn different(&self, ids: &[RolloutId], plugins: Plugins, live: usize) -> Vec<ReplayReport> {
        let replayer = Arc::new(self.replayer(&self.load(&ids[0]), plugins));
        let reports = futures::stream::iter(ids.to_vec()).map(|id| {
            let (bench, replayer) = (self.clone(), Arc::clone(&replayer));
            let replay = tokio::spawn(async move { replayer.replay(&bench.load(&id), None).await });
            async move { replay.await.unwrap() }
        });
        let reports: Vec<ReplayReport> = reports.buffer_unordered(live).collect().await;
        assert_eq!(reports.len(), ids.len());
        reports.into_iter().filter(|report| report.divergence.is_some()).collect()
    }
}

/// Asserts that a replay found nothing.
pub fn assert_identical(report: &ReplayReport) {
    assert!(report.divergence.is_none(), "{}", shown(report));
    assert_eq!(report.same, report.events, "{}", report.attempt);
}

/// For messages of failing tests.
pub fn shown(report: &ReplayReport) -> String {
    let Some(found) = &report.divergence else { return format!("{} is identical", report.attempt) };
    let event = |span: &Option<Box<Span>>| -> String { format!("{span:?}").chars().take(1_500).collect() };
    format!(
        "{} diverges at {} of {}: {}\nrecorded: {}\nreplayed: {}\noutcome: {:?}",
        report.attempt,
        found.sequence,
        report.events,
        found.detail,
        event(&found.recorded),
        event(&found.replayed),
        report.outcome
    )
}

/// A rollout of an input.
pub fn job(runner: &Runner, id: &str, seed: u64, input: &Value, world: &Value) -> Job {
    let item = DatasetItem::new(format!("item-{id}"), input.clone(), world.clone(), json!({"answer": 1}));
    let spec = RolloutSpec {
        seed: Seed::new(seed),
        policy_version: PolicyVersion(3),
        resources_version: 1,
        components: runner.plugins().hashes(),
        execution: runner.execution_hash(),
        ..spec(id, &item)
    };
    Job { spec: spec.into(), item: Arc::new(item) }
}

/// A rollout that leaves another one.
pub fn fork_job(ancestor: &Job, id: &str, seed: u64, point: ForkPoint) -> Job {
    let spec = RolloutSpec {
        id: RolloutId::new(id).unwrap(),
        seed: Seed::new(seed),
        policy_version: PolicyVersion(4),
        fork_of: Some(point),
        ..(*ancestor.spec).clone()
    };
    Job { spec: spec.into(), item: Arc::clone(&ancestor.item) }
}

/// An input that names a behaviour.
pub fn behave(behaviour: Behaviour) -> Value {
    json!(Input::new(behaviour))
}

/// An input with a program.
pub fn program(steps: Vec<nasty_agent::program::Step>) -> Value {
    json!(Input { program: steps, ..Input::new(Behaviour::Program) })
}

/// A program drawn from a seed.
pub fn drawn_program(seed: Seed) -> Vec<nasty_agent::program::Step> {
    let mut draw = Generator::new(seed);
    let length = 1 + draw.below(24);
    (0..length).map(|_| drawn_step(&mut draw)).collect()
}

fn drawn_step(draw: &mut Generator) -> nasty_agent::program::Step {
    use nasty_agent::program::Step;
    const TOOLS: [&str; 7] = ["count", "count", "echo", "world", "fail", "refuse", "nothing"];
    let number = draw.below(4);
    let tool = TOOLS[draw.below(TOOLS.len())].to_owned();
    match draw.below(64) {
        0..=6 => Step::Chat,
        7 | 8 => Step::ChatWith([0.0, 0.5, -1.0, 1e31][number]),
        9..=15 => Step::Start,
        16..=19 => Step::Finish(number),
        20..=22 => Step::Next(number),
        23 | 24 => Step::Drop(number),
        25..=28 => Step::WaitAny(number),
        29..=31 => Step::Tool(tool),
        32..=36 => Step::StartTool(tool),
        37..=39 => Step::FinishTool(number),
        40 | 41 => Step::Ready(number),
        42 => Step::DropTool(number),
        43 | 44 => Step::WaitAnyTool(number),
        45 => Step::List,
        46 | 47 => Step::Number([0.0, -0.0, 1e301, 0.1][number]),
        48 => Step::Reward([0.0, -0.0, 1.5, -2.0][number]),
        49 => Step::Message,
        50 | 51 => Step::Random,
        52 | 53 => Step::Clock,
        54 => Step::Sleep(number as u64 * 1_000),
        55 | 56 => Step::Print(number.is_multiple_of(2)),
        57 | 58 => Step::Open,
        59 => Step::Annotate,
        60 => Step::Close(number),
        61 => Step::Render,
        62 => {
            if number == 0 {
                Step::Trap
            } else {
                Step::Compute(1_000)
            }
        }
        _ => {
            if number == 0 {
                Step::Tool("trap".to_owned())
            } else {
                Step::GiveUp
            }
        }
    }
}
