//! How many attempts a second the sandbox runs: scripted model, 3 calls, 4 spans and a result, spans kept in memory.
//!
//! `cargo run --release -p fulgurite-sandbox --example throughput -- [ATTEMPTS] [LIVE] [THREADS] [WAIT_MS]`
#![allow(clippy::print_stdout, reason = "it prints its result")]

use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fulgurite_core::id::{AttemptKey, AttemptNumber, ResponseId, RolloutId};
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{ChatRequest, Completion, FinishReason, LlmError, LlmSession, NotTrainable, Usage};
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::record::RolloutMode;
use fulgurite_core::seed::Seed;
use fulgurite_core::span::{Span, SpanRefused, SpanSink};
use fulgurite_sandbox::{AgentPlugin, AgentRun, Recorder, Sandbox, SandboxSettings, Templates};
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};

struct Echo(Duration);

impl LlmSession for Echo {
    fn chat(&self, call_index: u64, _request: ChatRequest) -> BoxFuture<'static, Result<Completion, LlmError>> {
        let wait = self.0;
        Box::pin(async move {
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            Ok(Completion {
                text: "an answer of some length".to_owned(),
                tool_calls: vec![],
                finish_reason: FinishReason::Stop,
                usage: Usage { prompt_tokens: 10, completion_tokens: 5 },
                response_id: ResponseId(call_index.to_string()),
                tokens: None,
                not_trainable: Some(NotTrainable::NoTokenIds),
            })
        })
    }
}

#[derive(Default)]
struct Kept(Mutex<Vec<Span>>);

impl SpanSink for Kept {
    fn record(&self, span: Span) -> Result<(), SpanRefused> {
        self.0.lock().map_err(|_| SpanRefused::Closed)?.push(span);
        Ok(())
    }
}

async fn attempt(agent: Arc<AgentPlugin>, templates: Arc<Templates>, index: u64, wait: Duration) -> OutcomeKind {
    let Ok(rollout) = RolloutId::derived("throughput", 0, index) else { return OutcomeKind::HostFault };
    let key = AttemptKey { rollout, attempt: AttemptNumber::FIRST };
    let seed = Seed::new(index);
    let run = AgentRun {
        key: key.clone(),
        seed,
        mode: RolloutMode::Train,
        input: r#"{"behaviour":"work"}"#.to_owned(),
        limits: Limits::default(),
        llm: Arc::new(Echo(wait)),
        tools: None,
        templates,
        recorder: Arc::new(Recorder::new(key, seed, 0, Arc::new(Kept::default()))),
        start_unix_ns: 0,
    };
    agent.run(run).await.outcome.kind
}

fn main() -> Result<(), Box<dyn Error>> {
    let argument = |place, default: u64| -> Result<u64, std::num::ParseIntError> {
        std::env::args().nth(place).map_or(Ok(default), |text| text.parse())
    };
    let (attempts, live) = (argument(1, 20_000)?, usize::try_from(argument(2, 64)?)?);
    let threads = usize::try_from(argument(3, 2)?)?;
    let wait = Duration::from_millis(argument(4, 0)?);
    let agent = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/plugins/nasty_agent.wasm");
    let sandbox = Sandbox::new(SandboxSettings::default())?;
    let started = Instant::now();
    let agent = sandbox.load_agent(&agent)?;
    println!("compiled in {:?}", started.elapsed());
    let templates = Arc::new(Templates::none());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    runtime.block_on(async {
        let run = |count: u64| {
            let (agent, templates) = (Arc::clone(&agent), Arc::clone(&templates));
            stream::iter(0..count)
                .map(move |index| tokio::spawn(attempt(Arc::clone(&agent), Arc::clone(&templates), index, wait)))
                .buffer_unordered(live)
                .filter(|ended| std::future::ready(matches!(ended, Ok(OutcomeKind::Completed))))
                .count()
        };
        run(200.min(attempts)).await;
        let started = Instant::now();
        let completed = run(attempts).await;
        let took = started.elapsed();
        let rate = attempts as f64 / took.as_secs_f64();
        println!("{completed} of {attempts} completed, {live} live, {threads} threads: {rate:.0} a second");
    });
    Ok(())
}
