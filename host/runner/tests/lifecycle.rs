//! Retries, faults, cancelling and abandoning, with real components and a model that fails on purpose.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test that cannot go on has failed")]

#[path = "support/spec.rs"]
#[allow(unreachable_pub, reason = "shared with other suites")]
mod spec;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::id::ResponseId;
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{
    ChatRequest, Completion, FinishReason, LlmBackend, LlmError, LlmSession, NotTrainable, SessionInfo, Usage,
};
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::reward::RewardSource;
use fulgurite_core::state::{AttemptState, RolloutState};
use fulgurite_runner::{Job, Plugins, Recording, RetryPolicy, RewardTerms, Runner, RunnerGrants, RunnerSettings};
use fulgurite_sandbox::{Sandbox, SandboxSettings, Templates};
use fulgurite_store::{MemoryStore, RolloutStore};
use futures::future::BoxFuture;
use serde_json::json;
use spec::spec;

/// A model that is out of order for the first attempts, or for ever, or never answers.
#[derive(Clone, Copy)]
enum Model {
    FailsUntilAttempt(u32),
    NeverAnswers,
}

struct Session(Model, SessionInfo);

impl LlmBackend for Model {
    fn open(&self, info: SessionInfo) -> Box<dyn LlmSession> {
        Box::new(Session(*self, info))
    }

    fn name(&self) -> &'static str {
        "test"
    }
}

impl LlmSession for Session {
    fn chat(&self, call_index: u64, _: Arc<ChatRequest>) -> BoxFuture<'static, Result<Arc<Completion>, LlmError>> {
        let attempt = self.1.attempt.clone();
        match self.0 {
            Model::NeverAnswers => Box::pin(std::future::pending()),
            Model::FailsUntilAttempt(number) if attempt.attempt.0 < number => {
                Box::pin(std::future::ready(Err(LlmError::Unavailable("out of order".to_owned()))))
            }
            Model::FailsUntilAttempt(_) => Box::pin(std::future::ready(Ok(Arc::new(Completion {
                text: "fine".to_owned(),
                tool_calls: vec![],
                finish_reason: FinishReason::Stop,
                usage: Usage::default(),
                response_id: ResponseId::of_call(&attempt, call_index),
                tokens: None,
                not_trainable: Some(NotTrainable::NoTokenIds),
            })))),
        }
    }
}

fn runner(store: Arc<MemoryStore>) -> Runner {
    let component = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/plugins").join(name);
        assert!(path.is_file(), "{} is missing; run `cargo xtask guests` first", path.display());
        path
    };
    let sandbox = Sandbox::new(SandboxSettings::default()).unwrap();
    let plugins = Plugins {
        agent: sandbox.load_agent(&component("nasty_agent.wasm")).unwrap(),
        grader: Some(sandbox.load_grader(&component("nasty_grader.wasm")).unwrap()),
        tools: BTreeMap::new(),
    };
    let settings = RunnerSettings {
        live_max: 4,
        retry: RetryPolicy { attempts_max: 3, by_kind: BTreeMap::new() },
        limits: Limits::default(),
        outcome_reward: BTreeMap::from([(OutcomeKind::MalformedAnswer, -0.5)]),
        outcome_dimensions: std::collections::BTreeSet::from(["judged".to_owned()]),
        reward_terms: RewardTerms::default(),
        templates: Arc::new(Templates::none()),
        recording: Recording::Durable,
        worker: "test".to_owned(),
        control: None,
        grants: RunnerGrants::default(),
    };
    Runner::new(store, plugins, settings).unwrap()
}

fn job(id: &str, behaviour: &str, world: &str) -> Job {
    let item = DatasetItem::new(format!("item-{id}"), json!({"behaviour": behaviour}), json!(world), json!({}));
    let spec = spec(id, &item);
    Job { spec: spec.into(), item: Arc::new(item) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_recover_is_tried_again_and_every_attempt_is_kept() {
    let store = Arc::new(MemoryStore::new());
    let runner = runner(Arc::clone(&store));
    let batch = runner.submit(vec![job("a", "healthy", "")], Arc::new(Model::FailsUntilAttempt(3))).await.unwrap();
    let result = batch.all().await.unwrap().remove(0);
    assert_eq!((result.outcome.kind, result.attempt.key.attempt.0), (OutcomeKind::Completed, 3));
    let attempts = store.attempts(&result.spec.id).unwrap();
    let kinds: Vec<_> = attempts.iter().map(|attempt| attempt.outcome.as_ref().unwrap().kind).collect();
    assert_eq!(kinds, [OutcomeKind::LlmUnavailable, OutcomeKind::LlmUnavailable, OutcomeKind::Completed]);
    assert!(attempts[..2].iter().all(|attempt| attempt.rewards.is_empty() && attempt.state == AttemptState::Failed));
    assert_eq!(store.rollout(&result.spec.id).unwrap().unwrap().state, RolloutState::Succeeded);

    // Attempts are bounded, and what is left is a fault without a reward.
    let batch = runner.submit(vec![job("b", "healthy", "")], Arc::new(Model::FailsUntilAttempt(9))).await.unwrap();
    let result = batch.all().await.unwrap().remove(0);
    assert_eq!((result.outcome.kind, result.attempt.key.attempt.0), (OutcomeKind::LlmUnavailable, 3));
    assert!(!result.is_graded() && result.attempt.rewards.is_empty());
    assert_eq!(store.rollout(&result.spec.id).unwrap().unwrap().state, RolloutState::Failed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blame_decides_what_is_graded_and_guest_faults_are_not_tried_again() {
    let store = Arc::new(MemoryStore::new());
    let runner = runner(Arc::clone(&store));
    let jobs = vec![
        job("malformed", "malformed", ""),
        job("trap", "trap", ""),
        job("nan", "healthy", "nan"),
        job("fine", "healthy", ""),
    ];
    let results = runner.submit(jobs, Arc::new(Model::FailsUntilAttempt(0))).await.unwrap().all().await.unwrap();
    let kinds: Vec<_> = results.iter().map(|result| result.outcome.kind).collect();
    let expected = [OutcomeKind::MalformedAnswer, OutcomeKind::Trap, OutcomeKind::GraderFault, OutcomeKind::Completed];
    assert_eq!(kinds, expected);
    assert!(results.iter().all(|result| result.attempt.key.attempt.0 == 1));
    // The policy's mistake has the grader's reward and the host's; faults of code have none.
    let sums: Vec<f64> = results.iter().map(|r| r.attempt.rewards.iter().map(|reward| reward.value).sum()).collect();
    assert_eq!(sums, [0.0, 0.0, 0.0, 1.0]);
    // The host's is in every dimension that is trained on, whatever the grader says of it: else its rollout would leave them.
    let of_host = results[0].attempt.rewards.iter().filter(|reward| reward.source == RewardSource::Host);
    let of_host: Vec<_> = of_host.map(|reward| (reward.dimension.as_str(), reward.value)).collect();
    assert_eq!(of_host, [("reward", -0.5), ("judged", -0.5)]);
    assert!(results[1].attempt.rewards.is_empty() && results[2].attempt.rewards.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_is_recorded_and_abandoned_can_be_run_again() {
    let store = Arc::new(MemoryStore::new());
    let runner = runner(Arc::clone(&store));
    let batch = runner.submit(vec![job("a", "healthy", "")], Arc::new(Model::NeverAnswers)).await.unwrap();
    batch.cancel();
    let result = batch.all().await.unwrap().remove(0);
    assert_eq!(result.outcome.kind, OutcomeKind::Cancelled);
    assert_eq!(store.rollout(&result.spec.id).unwrap().unwrap().state, RolloutState::Cancelled);

    let abandoned = job("b", "healthy", "");
    drop(runner.submit(vec![abandoned.clone()], Arc::new(Model::NeverAnswers)).await.unwrap());
    assert!(!store.rollout(&abandoned.spec.id).unwrap().unwrap().state.is_terminal());
    let batch = runner.submit(vec![abandoned.clone()], Arc::new(Model::FailsUntilAttempt(0))).await.unwrap();
    assert_eq!(batch.all().await.unwrap()[0].outcome.kind, OutcomeKind::Completed);
    // And what is finished is answered from the store: this model would never answer.
    let batch = runner.submit(vec![abandoned], Arc::new(Model::NeverAnswers)).await.unwrap();
    assert_eq!(batch.all().await.unwrap()[0].outcome.kind, OutcomeKind::Completed);
}
