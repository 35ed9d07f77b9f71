//! Algorithms: every verb reaches the host as it was meant, and a plugin that misbehaves is stopped.
#![allow(clippy::panic, clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fulgurite_core::algorithm::{
    AlgorithmHost, AlgorithmHostError, BatchEntry, GroupSpec, Item, ModelReference, Scope, StepResult, TrajectoryView,
    TransitionForward, TransitionGradient, TransitionView, Verb, WaitFor, Weights,
};
use fulgurite_core::dataset::Split;
use fulgurite_core::id::{PolicyVersion, RolloutId, TransitionId};
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{Message, Sampling};
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::record::RolloutMode;
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::training::{
    Aggregation, Correction, CorrectionRule, ForwardBackwardReport, KlEstimator, KlTerm, LossSpec, OptimiserReport,
    OptimiserStep, PolicyLoss, RatioLevel, SequenceScope, Stream,
};
use fulgurite_sandbox::{AlgorithmFault, AlgorithmInstance, AlgorithmPlugin, STATE_BYTES_MAX};
use serde_json::json;
use support::{guest, limit, sandbox};

/// Writes down what it is asked.
#[derive(Default)]
struct Host {
    asked: Mutex<Vec<String>>,
    notes: Mutex<Vec<String>>,
    batch: Mutex<Vec<BatchEntry>>,
    losses: Mutex<Vec<LossSpec>>,
    groups: Mutex<Vec<GroupSpec>>,
    /// Keeps the processor busy for so long in `next_items`.
    busy: Duration,
    refuses: bool,
}

impl Host {
    fn ask<T: Send + 'static>(&self, what: impl Into<String>, answer: T) -> Verb<'_, T> {
        self.asked.lock().unwrap().push(what.into());
        Box::pin(async move { Ok(answer) })
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn reward(value: f64) -> Reward {
    Reward {
        dimension: "reward".to_owned(),
        value,
        feedback: None,
        source: RewardSource::Grader,
        component: None,
        call_index: None,
    }
}

fn transition(id: &str) -> TransitionView {
    TransitionView {
        id: TransitionId(id.to_owned()),
        call_index: 0,
        event: 0,
        agent_role: "agent".to_owned(),
        model: ModelReference::Policy,
        prompt_tokens: 10,
        completion_tokens: 2,
        trainable: true,
        log_prob_sum: -1.5,
        policy_version: PolicyVersion(3),
        prompt_hash: 1,
        observation_hash: 2,
        rewards: vec![],
        text: "R7".to_owned(),
    }
}

fn trajectory(name: &str, group: u64) -> TrajectoryView {
    TrajectoryView {
        rollout: RolloutId::new(name).unwrap(),
        group,
        item_id: "item-0".to_owned(),
        outcome: OutcomeKind::Completed,
        graded: true,
        rewards: vec![reward(0.5), reward(0.25)],
        transitions: vec![transition(&format!("{name}/0"))],
    }
}

impl AlgorithmHost for Host {
    fn next_items(&self, split: Split, count: u32) -> Verb<'_, Vec<Item>> {
        if self.refuses {
            return Box::pin(async { Err(AlgorithmHostError::Denied("grants = []".to_owned())) });
        }
        let started = Instant::now();
        while started.elapsed() < self.busy {
            std::hint::spin_loop();
        }
        let item = |index| Item { id: format!("item-{index}"), input: "{}".to_owned(), reference: None, epoch: 0 };
        self.ask(format!("next-items {split:?} {count}"), (0..count).map(item).collect())
    }

    fn enqueue(&self, groups: Vec<GroupSpec>) -> Verb<'_, u64> {
        let count = groups.len();
        *self.groups.lock().unwrap() = groups;
        self.ask(format!("enqueue {count}"), 9)
    }

    fn await_batch(&self, batch: u64, wait: WaitFor, deadline_ms: Option<u64>) -> Verb<'_, Vec<TrajectoryView>> {
        let name = if wait == WaitFor::All { "second" } else { "first" };
        self.ask(format!("await {batch} {wait:?} {deadline_ms:?}"), vec![trajectory(name, 1)])
    }

    fn carry(&self, batch: u64, groups: Vec<u64>) -> Verb<'_, ()> {
        self.ask(format!("carry {batch} {groups:?}"), ())
    }

    fn carried(&self) -> Verb<'_, Vec<u64>> {
        self.ask("carried", vec![4, 7])
    }

    fn cancel_batch(&self, batch: u64) -> Verb<'_, ()> {
        self.ask(format!("cancel {batch}"), ())
    }

    fn import(&self, messages: Vec<Message>, roles: Vec<String>, metadata: String) -> Verb<'_, TransitionView> {
        self.ask(format!("import {} {roles:?} {metadata}", messages[0].content), transition("imported"))
    }

    fn anchor(&self, model: ModelReference, transitions: Vec<TransitionId>) -> Verb<'_, ()> {
        self.ask(format!("anchor {model:?} {}", transitions[0]), ())
    }

    fn forward_backward(
        &self,
        model: ModelReference,
        batch: Vec<BatchEntry>,
        loss: LossSpec,
    ) -> Verb<'_, ForwardBackwardReport> {
        self.losses.lock().unwrap().push(loss);
        *self.batch.lock().unwrap() = batch;
        let report = ForwardBackwardReport { loss: 0.125, ..ForwardBackwardReport::default() };
        self.ask(format!("forward-backward {model:?}"), report)
    }

    fn forward(&self, _: ModelReference, transitions: Vec<TransitionId>) -> Verb<'_, Vec<TransitionForward>> {
        self.ask(format!("forward {}", transitions[0]), vec![])
    }

    fn backward(&self, _: ModelReference, gradients: Vec<TransitionGradient>) -> Verb<'_, ()> {
        self.ask(format!("backward {}", gradients.len()), ())
    }

    fn optimiser_step(&self, _: ModelReference, step: OptimiserStep) -> Verb<'_, OptimiserReport> {
        let report = OptimiserReport { gradient_norm: 1.0, skipped: false, policy_version: PolicyVersion(4) };
        self.ask(format!("optimiser-step {} {:?}", step.learning_rate, step.gradient_norm_max), report)
    }

    fn snapshot(&self, model: ModelReference) -> Verb<'_, String> {
        self.ask(format!("snapshot {model:?}"), "copy".to_owned())
    }

    fn freeze_reference(&self) -> Verb<'_, ()> {
        self.ask("freeze-reference", ())
    }

    fn sample(&self, _: ModelReference, messages: Vec<Message>, _: Sampling) -> Verb<'_, TransitionView> {
        self.ask(format!("sample {}", messages[0].content), transition("sampled"))
    }

    fn template(&self, name: String, version: Option<u64>) -> Verb<'_, (u64, String)> {
        self.ask(format!("template {name} {version:?}"), (2, "Hello".to_owned()))
    }

    fn publish_template(&self, name: String, text: String) -> Verb<'_, u64> {
        self.ask(format!("publish {name} {text}"), 3)
    }

    fn scalar(&self, name: String, value: f64) -> Verb<'_, ()> {
        self.ask(format!("scalar {name} {value}"), ())
    }

    fn note(&self, text: String) -> Verb<'_, ()> {
        self.notes.lock().unwrap().push(text);
        Box::pin(async { Ok(()) })
    }
}

fn plugin() -> Arc<AlgorithmPlugin> {
    sandbox().load_algorithm(&guest("nasty_algorithm")).unwrap()
}

async fn start(
    behaviour: &str,
    saved: Option<Vec<u8>>,
    host: &Arc<Host>,
    limits: &Limits,
) -> Result<AlgorithmInstance, AlgorithmFault> {
    let config = json!({"behaviour": behaviour, "steps": 3}).to_string();
    plugin().start(config, saved, Arc::clone(host) as Arc<dyn AlgorithmHost>, limits).await
}

#[tokio::test]
async fn every_verb_reaches_the_host() {
    let host = Arc::new(Host::default());
    let mut algorithm = start("verbs", None, &host, &Limits::default()).await.unwrap();
    assert_eq!(algorithm.plugin(), "nasty 0.0.1");
    assert_eq!(algorithm.step().await, Ok(StepResult::Continue));
    assert_eq!(
        host.asked(),
        [
            "next-items Train 2",
            "enqueue 2",
            "await 9 Count(1) None",
            "await 9 All None",
            "carry 9 [1, 0]",
            "carried",
            "await 4 All None",
            "await 7 All None",
            "cancel 9",
            "import imported [\"user\"] {\"origin\":\"test\"}",
            "anchor Policy imported",
            "forward-backward Policy",
            "scalar loss 0.125",
            "forward-backward Policy",
            "forward-backward Policy",
            "forward imported",
            "backward 0",
            "optimiser-step 0.5 Some(1.0)",
            "scalar version 4",
            "snapshot Policy",
            "freeze-reference",
            "sample imported",
            "template greeting None",
            "publish greeting Hello {{ name }}",
        ]
    );
    let notes = host.notes.lock().unwrap().clone();
    assert_eq!(notes[..2], ["carried 1", "carried 1"]);
    assert_eq!(notes[2], "first group 1 item item-0 completed graded true reward 0.75");
    assert!(
        notes[4..].iter().zip(["policy.save", "policy.load", "llm.chat"]).all(|(note, verb)| note.starts_with(verb))
    );
    let groups = host.groups.lock().unwrap().clone();
    assert_eq!((groups[1].item_id.as_str(), groups[1].count, groups[1].mode), ("item-1", 2, RolloutMode::Train));
    assert_eq!(groups[0].sampling, Sampling { temperature: 0.5, ..Sampling::default() });
    let batch = host.batch.lock().unwrap().clone();
    assert_eq!(batch.len(), 3);
    assert_eq!((&batch[0].transition.0[..], batch[0].stream, batch[0].scope), ("first/0", Stream::Rl, Scope::Sampled));
    assert_eq!(batch[2].weights, Weights::PerToken(vec![0.5, 0.25]));
    let losses = host.losses.lock().unwrap().clone();
    let correction = |level, rule, batch_normalise| Some(Correction { level, rule, batch_normalise });
    assert_eq!(
        losses,
        [
            LossSpec::default(),
            LossSpec {
                policy_loss: PolicyLoss::Cispo { clip_low: None, clip_high: 4.0 },
                aggregation: Aggregation::PromptMean,
                kl: Some(KlTerm { estimator: KlEstimator::K2, coefficient: 0.5 }),
                entropy_coefficient: 0.125,
                ratio_level: RatioLevel::SequenceMean,
                sequence_scope: SequenceScope::Call,
                ratio_max: None,
                correction: correction(RatioLevel::SequenceSum, CorrectionRule::Mask { min: 0.5, max: 5.0 }, true),
                off_policy_mask: Some(0.25),
            },
            LossSpec {
                policy_loss: PolicyLoss::ImportanceSampling,
                aggregation: Aggregation::SumConstant { length: 7 },
                ratio_level: RatioLevel::SequenceSum,
                ratio_max: Some(4.0),
                correction: correction(RatioLevel::Token, CorrectionRule::Truncate { max: 2.0 }, false),
                ..LossSpec::default()
            },
        ]
    );
}

#[tokio::test]
async fn a_plugin_describes_itself_without_a_host() {
    let description = plugin().describe().await.unwrap();
    assert_eq!((description.name.as_str(), description.version.as_str()), ("nasty", "0.0.1"));
    let defaults: serde_json::Value = serde_json::from_str(&description.defaults).unwrap();
    assert_eq!(defaults["steps"], 0);
}

#[tokio::test]
async fn a_saved_state_goes_on_where_it_was_and_draws_what_it_would_have_drawn() {
    let (limits, straight) = (Limits::default(), Arc::new(Host::default()));
    let mut algorithm = start("draw", None, &straight, &limits).await.unwrap();
    for expected in [StepResult::Continue, StepResult::Continue, StepResult::Done] {
        // Saving must not shift anything either.
        algorithm.save().await.unwrap();
        assert_eq!(algorithm.step().await, Ok(expected));
    }
    let resumed = Arc::new(Host::default());
    let mut algorithm = start("draw", None, &resumed, &limits).await.unwrap();
    algorithm.step().await.unwrap();
    let saved = algorithm.save().await.unwrap();
    drop(algorithm);
    let mut algorithm = start("draw", Some(saved), &resumed, &limits).await.unwrap();
    assert_eq!(algorithm.step().await, Ok(StepResult::Continue));
    assert_eq!(algorithm.step().await, Ok(StepResult::Done));
    let (straight, resumed) = (straight.notes.lock().unwrap().clone(), resumed.notes.lock().unwrap().clone());
    assert_eq!(straight.len(), 3);
    assert_eq!(straight, resumed);
    assert!(straight[0] != straight[1] && straight[1] != straight[2], "{straight:?}");
}

#[tokio::test]
async fn waiting_for_the_host_is_free_and_looping_is_not() {
    let limits = Limits { algorithm_step_cpu_ms_max: 100, ..Limits::default() };
    let host = Arc::new(Host { busy: Duration::from_millis(300), ..Host::default() });
    let mut algorithm = start("wait", None, &host, &limits).await.unwrap();
    assert_eq!(algorithm.step().await, Ok(StepResult::Continue));
    // Every step has its own allowance.
    assert_eq!(algorithm.step().await, Ok(StepResult::Continue));
    let mut algorithm = start("loop", None, &Arc::default(), &limits).await.unwrap();
    match algorithm.step().await {
        Err(AlgorithmFault::Limit { plugin, limit: reached }) => {
            assert_eq!((plugin.as_str(), Some(reached)), ("nasty 0.0.1", limit("algorithm_step_cpu_ms_max", 100)));
        }
        other => panic!("{other:?}"),
    }
    assert!(algorithm.step().await.is_err(), "a stopped plugin stays stopped");
}

#[tokio::test]
async fn faults_name_the_plugin() {
    let limits = Limits::default();
    let mut algorithm = start("trap", None, &Arc::default(), &limits).await.unwrap();
    match algorithm.step().await {
        Err(AlgorithmFault::Trap { plugin, .. }) => assert_eq!(plugin, "nasty 0.0.1"),
        other => panic!("{other:?}"),
    }
    let refusing = Arc::new(Host { refuses: true, ..Host::default() });
    let mut algorithm = start("wait", None, &refusing, &limits).await.unwrap();
    match algorithm.step().await {
        Err(AlgorithmFault::Host { detail, .. }) => assert!(detail.contains("grants = []"), "{detail}"),
        other => panic!("{other:?}"),
    }
    let fault = start("refuse-config", None, &Arc::default(), &limits).await.unwrap_err();
    assert!(matches!(&fault, AlgorithmFault::InvalidConfig { detail, .. } if detail.contains("behaviour")), "{fault}");
    let fault = start("draw", Some(b"not ours".to_vec()), &Arc::default(), &limits).await.unwrap_err();
    assert!(matches!(fault, AlgorithmFault::InvalidState { .. }));
    let mut algorithm = start("huge-state", None, &Arc::default(), &limits).await.unwrap();
    algorithm.step().await.unwrap();
    match algorithm.save().await {
        Err(AlgorithmFault::Limit { limit: reached, .. }) => {
            assert_eq!(Some(reached), limit("state_bytes_max", STATE_BYTES_MAX as u64));
        }
        other => panic!("{other:?}"),
    }
}
