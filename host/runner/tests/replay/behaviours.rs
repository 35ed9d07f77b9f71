//! Everything that the nasty guests can do, recorded and replayed.

use std::sync::Arc;

use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::recording::Cut;
use fulgurite_runner::replay::Replayer;
use nasty_agent::{Behaviour, Input};
use serde_json::{Value, json};

use crate::support::{Backend, Bench, Model, assert_identical, behave, job, limits, plugins, shown};

struct Case {
    name: String,
    input: Value,
    world: Value,
    model: Model,
    limits: Limits,
    /// How it must end, where only this suite makes it end so.
    ends: Option<OutcomeKind>,
}

impl Case {
    fn new(name: impl Into<String>, input: Value) -> Self {
        Self { name: name.into(), input, world: json!({}), model: Model::Answers, limits: limits(), ends: None }
    }

    fn model(self, model: Model) -> Self {
        Self { model, ..self }
    }

    fn world(self, world: Value) -> Self {
        Self { world, ..self }
    }

    fn limits(mut self, change: impl FnOnce(&mut Limits)) -> Self {
        change(&mut self.limits);
        self
    }

    fn ends(self, kind: OutcomeKind) -> Self {
        Self { ends: Some(kind), ..self }
    }
}

fn name(value: impl serde::Serialize) -> String {
    json!(value).as_str().unwrap().to_owned()
}

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Behaviour::ALL
        .iter()
        .map(|behaviour| {
            // What floods does so with 50 calls or more before another limit.
            let input = Input { size: 200_000, text: "other/1/0".to_owned(), ..Input::new(*behaviour) };
            Case::new(name(behaviour), json!(input))
        })
        .collect();
    let tool_case = |behaviour: nasty_tool::Behaviour| {
        let call = |behaviour: nasty_tool::Behaviour| (name(behaviour), json!({"text": "hi"}));
        let count = nasty_tool::Behaviour::Count;
        let calls = vec![call(count), call(behaviour), call(count)];
        let input = Input { calls, ..Input::new(Behaviour::Call) };
        Case::new(format!("tool-{}", name(behaviour)), json!(input))
    };
    cases.extend(nasty_tool::Behaviour::ALL.iter().map(|behaviour| tool_case(*behaviour)));
    cases.extend(nasty_tool::Opening::ALL.iter().map(|opening| {
        Case::new(format!("open-{}", name(opening)), behave(Behaviour::Converse)).world(json!({ "open": opening }))
    }));
    cases.extend(nasty_grader::Behaviour::ALL.iter().map(|behaviour| {
        Case::new(format!("grader-{}", name(behaviour)), behave(Behaviour::Converse)).world(json!(behaviour))
    }));
    let ask = || behave(Behaviour::AskForever);
    let silent = |name: &str, behaviour| {
        let case = Case::new(name, behave(behaviour)).limits(|limits| limits.attempt_wall_ms_max = 60);
        case.model(Model::SilentFrom(0)).ends(OutcomeKind::WallTimeout)
    };
    cases.extend([
        silent("wall-time-in-a-chat", Behaviour::Healthy),
        silent("wall-time-inside-a-span", Behaviour::Converse),
        silent("wall-time-in-wait-any", Behaviour::Parallel),
        Case::new("wall-time-later", ask())
            .limits(|limits| limits.attempt_wall_ms_max = 60)
            .model(Model::SilentFrom(3))
            .ends(OutcomeKind::WallTimeout),
        Case::new("model-down", ask()).model(Model::DownFrom(2)).ends(OutcomeKind::LlmUnavailable),
        Case::new("context-full", ask()).model(Model::Full).ends(OutcomeKind::ContextLimit),
        Case::new("token-limit", ask())
            .limits(|limits| limits.completion_tokens_max = 60)
            .ends(OutcomeKind::TokenLimit),
        Case::new("huge-answer", behave(Behaviour::ReadAnswer))
            .model(Model::Letters(1 << 20))
            .ends(OutcomeKind::OutputLimit),
        Case::new("no-time-for-the-cpu", behave(Behaviour::Loop)).limits(|limits| limits.guest_cpu_ms_max = 1),
    ]);
    cases
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_behaviour_is_replayed_identically() {
    let bench = Bench::new();
    let mut failures = vec![];
    for case in cases() {
        let runner = bench.runner(plugins(), case.limits.clone());
        let job = job(&runner, &case.name, 7, &case.input, &case.world);
        let id = job.spec.id.clone();
        let result = bench.record(&runner, vec![job], case.model).await.remove(0);
        if case.ends.is_some_and(|kind| kind != result.outcome.kind) {
            failures.push(format!("{}: {:?}", case.name, result.outcome));
        }
        let report = bench.replay(&id, plugins()).await;
        if report.divergence.is_some() || report.same != report.events || report.outcome != result.outcome {
            failures.push(shown(&report));
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// Cancels rollouts wherever they happen to be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_rollout_is_replayed_up_to_where_it_was_cancelled() {
    let bench = Bench::new();
    let limits = Limits {
        guest_cpu_ms_max: 60_000,
        spans_max: 10_000_000,
        output_bytes_max: 1 << 40,
        memory_bytes_max: 256 << 20,
        ..limits()
    };
    let runner = bench.runner(plugins(), limits);
    let waits = [Behaviour::Healthy, Behaviour::Converse, Behaviour::Parallel];
    let busy = [
        Behaviour::Loop,
        Behaviour::LoopWithHostCalls,
        Behaviour::SleepForever,
        Behaviour::SpanFlood,
        Behaviour::OutputFlood,
        Behaviour::RewardFlood,
    ];
    for (number, behaviour) in waits.into_iter().chain(busy).chain(busy).enumerate() {
        let job = job(&runner, &format!("cancelled-{number}"), 3, &behave(behaviour), &json!({}));
        let id = job.spec.id.clone();
        let backend = Backend::new(Model::SilentFrom(0));
        let batch = runner.submit(vec![job], Arc::new(backend.clone())).await.unwrap();
        // Those that ask are cancelled while they wait for the answer, the others somewhere in their loop.
        while if waits.contains(&behaviour) { backend.asked() == 0 } else { runner.live() == 0 } {
            tokio::task::yield_now().await;
        }
        for _ in 0..number * 50 {
            tokio::task::yield_now().await;
        }
        batch.cancel();
        let result = batch.all().await.unwrap().remove(0);
        assert_eq!(result.outcome.kind, OutcomeKind::Cancelled, "{behaviour:?}");
        assert!(Cut::of_root(result.spans.last().unwrap()).is_some());
        let report = bench.replay(&id, plugins()).await;
        assert!(report.divergence.is_none(), "{behaviour:?}: {}", shown(&report));
        assert_eq!(report.outcome, result.outcome);
    }
}

/// What a machine that is slower or busier now makes of a guest that ran out of time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_place_where_the_time_was_up_is_recorded_and_not_measured_again() {
    let bench = Bench::new();
    for (number, behaviour) in
        [Behaviour::SleepForever, Behaviour::SpanFlood, Behaviour::OutputFlood].into_iter().enumerate()
    {
        let limits = Limits {
            guest_cpu_ms_max: 30,
            spans_max: 10_000_000,
            output_bytes_max: 1 << 40,
            memory_bytes_max: 256 << 20,
            ..limits()
        };
        let runner = bench.runner(plugins(), limits);
        let job = job(&runner, &format!("cpu-{number}"), 3, &behave(behaviour), &json!({}));
        let result = bench.record(&runner, vec![job], Model::Answers).await.remove(0);
        assert_eq!(result.outcome.kind, OutcomeKind::CpuLimit, "{behaviour:?}");
        let recorded = bench.load(&result.spec.id);
        // With more time and with less.
        for cpu_ms in [30, 60_000, 20] {
            let mut settings = bench.settings(&recorded);
            settings.limits.guest_cpu_ms_max = cpu_ms;
            let replayer = Replayer::new(plugins(), &settings, 1).unwrap();
            let report = replayer.replay(&recorded, None).await;
            assert_identical(&report);
            assert_eq!(report.outcome, result.outcome);
        }
    }
}
