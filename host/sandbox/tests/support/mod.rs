//! What the sandbox's tests share: prebuilt guests, a scripted model, a sink that keeps spans.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "shared by several test binaries"
)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex};

use fulgurite_core::id::{AttemptKey, AttemptNumber, PolicyVersion, ResponseId, RolloutId};
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{ChatRequest, Completion, FinishReason, KeptTokens, LlmError, LlmSession, TokenData, Usage};
use fulgurite_core::outcome::{LimitReached, OutcomeKind};
use fulgurite_core::record::RolloutMode;
use fulgurite_core::seed::Seed;
use fulgurite_core::span::{Span, SpanRefused, SpanSink};
use fulgurite_core::tool::ToolHost;
use fulgurite_sandbox::{AgentPlugin, AgentReport, AgentRun, Recorder, Sandbox, SandboxSettings, Templates};
use futures::future::BoxFuture;

/// A prebuilt component.
pub fn guest(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/plugins").join(format!("{name}.wasm"));
    assert!(path.exists(), "{} is missing: run `cargo xtask guests` first", path.display());
    path
}

/// One engine for all tests of a binary.
pub fn sandbox() -> &'static Sandbox {
    static SANDBOX: LazyLock<Sandbox> = LazyLock::new(|| Sandbox::new(SandboxSettings::default()).unwrap());
    &SANDBOX
}

/// The agent that misbehaves on request, compiled once.
pub fn nasty() -> Arc<AgentPlugin> {
    static AGENT: LazyLock<Arc<AgentPlugin>> = LazyLock::new(|| sandbox().load_agent(&guest("nasty_agent")).unwrap());
    Arc::clone(&AGENT)
}

/// Start of every test's clock.
pub const START_NS: u64 = 1_700_000_000_000_000_000;

pub fn key(name: &str) -> AttemptKey {
    AttemptKey { rollout: RolloutId::new(name).unwrap(), attempt: AttemptNumber::FIRST }
}

/// Keeps spans.
#[derive(Debug, Default)]
pub struct Kept(pub Mutex<Vec<Span>>);

impl Kept {
    pub fn spans(&self) -> Vec<Span> {
        self.0.lock().unwrap().clone()
    }
}

impl SpanSink for Kept {
    fn record(&self, span: Span) -> Result<(), SpanRefused> {
        self.0.lock().unwrap().push(span);
        Ok(())
    }
}

/// A model that answers `answer to: <last message>`, and what it was asked. `never` as the last message is not answered.
#[derive(Debug, Default)]
pub struct Scripted {
    pub asked: Mutex<Vec<(u64, ChatRequest)>>,
    /// The error to answer from this call on.
    pub fails: Option<(u64, LlmError)>,
    /// Keeps the processor busy for so long before every answer.
    pub busy_ms: u64,
    /// Never answers.
    pub silent: bool,
    /// What it answers instead.
    pub answer: Option<String>,
}

pub fn completion(call_index: u64, text: &str) -> Completion {
    Completion {
        text: text.to_owned(),
        tool_calls: vec![],
        finish_reason: FinishReason::Stop,
        usage: Usage { prompt_tokens: 5, completion_tokens: 3 },
        response_id: ResponseId(format!("scripted/{call_index}")),
        tokens: Some(TokenData {
            prompt_ids: vec![1, 2, 3, 4, 5],
            completion_ids: vec![6, 7, 8],
            log_probs: vec![-0.5, -0.25, -0.125],
            processed_log_probs: vec![],
            policy_version: PolicyVersion(4),
            token_versions: vec![],
            kept: KeptTokens::default(),
            model: None,
        }),
        not_trainable: None,
    }
}

impl LlmSession for Scripted {
    fn chat(
        &self,
        call_index: u64,
        request: Arc<ChatRequest>,
    ) -> BoxFuture<'static, Result<Arc<Completion>, LlmError>> {
        let last = request.messages.last().map(|message| message.content.clone()).unwrap_or_default();
        self.asked.lock().unwrap().push((call_index, request.as_ref().clone()));
        let failure = self.fails.clone().filter(|(from, _)| call_index >= *from).map(|(_, error)| error);
        let answer = self.answer.clone().unwrap_or_else(|| format!("answer to: {last}"));
        let (busy, silent) = (std::time::Duration::from_millis(self.busy_ms), self.silent);
        Box::pin(async move {
            if silent {
                std::future::pending::<()>().await;
            }
            let started = std::time::Instant::now();
            while started.elapsed() < busy {
                std::hint::spin_loop();
            }
            if last == "slow" {
                // Gives way often enough for everything else to come first.
                for _ in 0..10 {
                    tokio::task::yield_now().await;
                }
            }
            failure.map_or_else(|| Ok(Arc::new(completion(call_index, &answer))), Err)
        })
    }
}

/// One attempt and everything around it.
pub struct Attempt {
    pub limits: Limits,
    pub llm: Arc<Scripted>,
    pub tools: Option<Arc<dyn ToolHost>>,
    pub templates: Arc<Templates>,
    pub seed: Seed,
    pub kept: Arc<Kept>,
    pub recorder: Arc<Recorder>,
    pub name: String,
}

impl Attempt {
    pub fn new(name: &str) -> Self {
        Self::seeded(name, 1)
    }

    pub fn seeded(name: &str, seed: u64) -> Self {
        let kept = Arc::new(Kept::default());
        let seed = Seed::new(seed);
        let sink = Arc::clone(&kept) as Arc<dyn SpanSink>;
        Self {
            limits: Limits::default(),
            llm: Arc::default(),
            tools: None,
            templates: Arc::new(Templates::none()),
            seed,
            kept,
            recorder: Arc::new(Recorder::new(key(name), seed, START_NS, sink)),
            name: name.to_owned(),
        }
    }

    pub fn run_of(&self, input: &serde_json::Value) -> AgentRun {
        AgentRun {
            key: key(&self.name),
            seed: self.seed,
            mode: RolloutMode::Train,
            input: input.to_string().into(),
            limits: Arc::new(self.limits.clone()),
            llm: Arc::clone(&self.llm) as Arc<dyn LlmSession>,
            tools: self.tools.clone(),
            templates: Arc::clone(&self.templates),
            recorder: Arc::clone(&self.recorder),
            start_unix_ns: START_NS,
            heartbeat: None,
        }
    }

    pub async fn run(&self, input: serde_json::Value) -> AgentReport {
        nasty().run(self.run_of(&input)).await
    }

    /// Runs a behaviour without parameters.
    pub async fn behave(&self, behaviour: &str) -> AgentReport {
        self.run(serde_json::json!({ "behaviour": behaviour })).await
    }
}

#[allow(clippy::unnecessary_wraps, reason = "outcomes hold it so")]
pub fn limit(name: &str, value: u64) -> Option<LimitReached> {
    Some(LimitReached { name: name.to_owned(), value })
}

/// Asserts how an attempt ended.
#[track_caller]
pub fn assert_ended(report: &AgentReport, kind: OutcomeKind, limit: Option<LimitReached>) {
    assert_eq!((report.outcome.kind, report.outcome.limit.clone()), (kind, limit), "{:?}", report.outcome);
    assert_eq!(report.outcome.output, "null");
}
