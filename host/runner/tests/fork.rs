//! Rollouts that begin as another one did: the beginning is played back and compared, and what follows is new.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_precision_loss,
    reason = "a test that cannot go on has failed"
)]

mod support;

use std::sync::Arc;

use fulgurite_core::id::{AttemptNumber, PolicyVersion, RolloutId};
use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::record::ForkPoint;
use fulgurite_core::reward::RewardSource;
use fulgurite_core::seed::Seed;
use fulgurite_core::span::{Span, SpanBody};
use fulgurite_runner::fork::{event_of_call, fork_point, lineage};
use fulgurite_runner::{Job, Plugins, RolloutResult, RunnerError};
use fulgurite_store::StoreError;
use nasty_agent::program::Step;
use nasty_agent::{Behaviour, Input};
use serde_json::json;
use support::{
    Backend, Bench, Model, assert_identical, behave, drawn_program, fork_job, job, limits, patched, plugins, program,
    sandbox,
};

fn point(bench: &Bench, ancestor: &RolloutId, event: u64) -> ForkPoint {
    fork_point(&*bench.store, ancestor, None, event).unwrap_or_else(|problem| panic!("{ancestor} {event}: {problem}"))
}

fn whole(bench: &Bench, result: &RolloutResult) -> Vec<Span> {
    lineage(&*bench.store, &result.attempt.key).unwrap().spans.to_vec()
}

/// What a fork may be asked to leave of a recording: everything that its agent has caused.
fn agent_events(spans: &[Span]) -> u64 {
    let of_agent = |span: &&Span| match &span.body {
        SpanBody::Reward(reward) => reward.source == RewardSource::Agent,
        SpanBody::Grade { .. } | SpanBody::Attempt(_) => false,
        _ => true,
    };
    spans.iter().take_while(of_agent).count() as u64
}

/// What can be compared although there are numbers that are not equal to themselves.
fn bytes(spans: &[Span]) -> Vec<u8> {
    postcard::to_stdvec(spans).unwrap()
}

/// Everything but whose it is.
fn anonymous(spans: &[Span], owner: &Span) -> Vec<Span> {
    spans.iter().map(|span| Span { attempt: owner.attempt.clone(), ..span.clone() }).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fork_at_every_event_repeats_its_ancestor_up_to_there_and_goes_on_live() {
    let bench = Bench::new();
    let runner = bench.runner(plugins(), limits());
    let tool = |name: &str| name.to_owned();
    let steps = vec![
        Step::Chat,
        Step::Tool(tool("count")),
        Step::Random,
        Step::Open,
        Step::Start,
        Step::Start,
        Step::WaitAny(2),
        Step::Clock,
        Step::StartTool(tool("count")),
        Step::Finish(1),
        Step::FinishTool(0),
        Step::Print(true),
        Step::Message,
        Step::Finish(0),
        Step::Close(0),
        Step::Tool(tool("count")),
        Step::Chat,
        Step::Message,
    ];
    let ancestor = job(&runner, "ancestor", 1, &program(steps), &json!({}));
    let backend = Backend::new(Model::Answers);
    let result =
        runner.submit(vec![ancestor.clone()], Arc::new(backend.clone())).await.unwrap().all().await.unwrap().remove(0);
    assert_eq!(result.outcome.kind, OutcomeKind::Completed);
    let events = agent_events(&result.spans);
    assert!(events > 12, "{events}");
    let answers = |spans: &[Span]| spans.iter().filter(|span| matches!(span.body, SpanBody::Llm(_))).count();
    for event in 0..=events {
        let fork = fork_job(&ancestor, &format!("fork-{event}"), 100 + event, point(&bench, &result.spec.id, event));
        let asked = backend.asked();
        let fork = runner.submit(vec![fork], Arc::new(backend.clone())).await.unwrap().all().await.unwrap().remove(0);
        assert_eq!(fork.outcome.kind, OutcomeKind::Completed, "{event}: {:?}", fork.outcome);
        // Its own events begin where it leaves the ancestor; the whole is the ancestor's beginning and them.
        assert_eq!(fork.spans[0].sequence, event);
        assert!(fork.spans.iter().zip(event..).all(|(span, sequence)| span.sequence == sequence));
        let all = whole(&bench, &fork);
        let shared = usize::try_from(event).unwrap();
        assert_eq!(all[..shared], result.spans[..shared]);
        assert_eq!(all[shared..], fork.spans[..]);
        assert!(all[shared..].iter().all(|span| span.attempt == fork.attempt.key));
        // Only what had not ended by then is asked again; those under way are.
        assert_eq!(backend.asked() - asked, 4 - answers(&all[..shared]), "{event}");
        // The model has its earlier answers.
        let history = backend.sessions.lock().unwrap().last().unwrap().history.clone();
        let earlier: Vec<_> = all[..shared]
            .iter()
            .filter_map(|span| match &span.body {
                SpanBody::Llm(call) => call.result.as_ref().ok().cloned(),
                _ => None,
            })
            .collect();
        assert_eq!(history, earlier);
        // A tool with state has that state, and the clock goes on.
        let counts: Vec<&String> = all
            .iter()
            .filter_map(|span| match &span.body {
                SpanBody::Tool { result, .. } => result.as_ref().ok(),
                _ => None,
            })
            .collect();
        assert_eq!(counts, ["1", "2", "3"], "{event}");
        assert!(all.windows(2).all(|pair| pair[0].end_ns <= pair[1].end_ns), "{event}");
        assert_eq!(fork.attempt.rewards.len(), result.attempt.rewards.len());
        let ids: std::collections::BTreeSet<_> = all.iter().map(|span| span.span_id).collect();
        assert_eq!(ids.len(), all.len(), "{event}");
        assert_identical(&bench.replay(&fork.spec.id, plugins()).await);
    }
    for call in 0..4 {
        let event = event_of_call(&result.spans, call).unwrap();
        assert!(
            matches!(&result.spans[usize::try_from(event).unwrap()].body, SpanBody::Llm(found) if found.call_index == call)
        );
    }
    assert!(event_of_call(&result.spans, 4).is_err());
}

fn draws(result: &RolloutResult) -> serde_json::Value {
    assert_eq!(result.outcome.kind, OutcomeKind::Completed, "{:?}", result.outcome);
    serde_json::from_str(&result.outcome.output).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forks_differ_by_their_seeds_repeat_by_them_and_draw_the_ancestors_numbers_before() {
    let bench = Bench::new();
    let runner = bench.runner(plugins(), limits());
    // Numbers drawn before and after the second call, and told in the questions.
    let steps = vec![Step::Random, Step::Chat, Step::Random, Step::Chat, Step::Random, Step::Message, Step::Chat];
    let ancestor = job(&runner, "ancestor", 1, &program(steps), &json!({}));
    let result = bench.record(&runner, vec![ancestor.clone()], Model::Answers).await.remove(0);
    let at = point(&bench, &result.spec.id, 1);
    assert_eq!((at.policy_version, at.attempt), (PolicyVersion(3), AttemptNumber::FIRST));
    let forks = (0..8).map(|n| fork_job(&ancestor, &format!("fork-{n}"), 50 + n / 2, at.clone())).collect();
    let forks = bench.record(&runner, forks, Model::Answers).await;
    for (number, fork) in forks.iter().enumerate() {
        assert_eq!(fork.spec.policy_version, PolicyVersion(4));
        assert_eq!(fork.spec.fork_of.as_ref().unwrap().policy_version, PolicyVersion(3));
        let twin = &forks[number ^ 1];
        let timeless = |result: &RolloutResult| -> Vec<SpanBody> {
            let told = |span: &Span| matches!(span.body, SpanBody::Message(_));
            result.spans.iter().filter(|span| told(span)).map(|span| span.body.clone()).collect()
        };
        // Twins have the same seed, so they draw the same; response ids make their questions differ later.
        assert_eq!(fork.spans[0].trace_id, twin.spans[0].trace_id);
        let other = &forks[(number + 2) % 8];
        assert_ne!(fork.spans[0].trace_id, other.spans[0].trace_id);
        assert_ne!(timeless(fork), timeless(other));
    }

    // All sources of random numbers: before the fork the ancestor's, after it the fork's own.
    let random = job(&runner, "random", 7, &behave(Behaviour::Random), &json!({}));
    let drawn = bench.record(&runner, vec![random.clone()], Model::Answers).await.remove(0);
    let at = point(&bench, &drawn.spec.id, 0);
    let forks: Vec<Job> = (0..2).map(|n| fork_job(&random, &format!("random-{n}"), 8, at.clone())).collect();
    let forks = bench.record(&runner, forks, Model::Answers).await;
    assert_eq!(draws(&forks[0]), draws(&forks[1]));
    assert_ne!(draws(&forks[0])["draws"], draws(&drawn)["draws"]);
    assert_eq!((draws(&drawn)["seed"].as_u64(), draws(&forks[0])["seed"].as_u64()), (Some(7), Some(8)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forks_of_forks_are_whole_wherever_they_leave_and_can_be_replayed() {
    let bench = Bench::new();
    let runner = bench.runner(plugins(), limits());
    let mut replayed = vec![];
    for number in 0..40 {
        let steps = drawn_program(Seed::new(number).child("fork"));
        let mut job = job(&runner, &format!("ancestor-{number}"), number, &program(steps), &json!({}));
        let mut result = bench.record(&runner, vec![job.clone()], Model::Moody).await.remove(0);
        // Four generations, each leaves its parent somewhere: also in what that has from its own parents.
        for generation in 0..4_u64 {
            let spans = whole(&bench, &result);
            let event = (number * 7 + generation * 3) % (agent_events(&spans) + 1);
            let Ok(at) = fork_point(&*bench.store, &result.spec.id, None, event) else {
                continue; // Inside a streamed call: another test looks at these.
            };
            job = fork_job(&job, &format!("fork-{number}-{generation}"), 1_000 + number, at);
            let fork = bench.record(&runner, vec![job.clone()], Model::Moody).await.remove(0);
            assert_ne!(fork.outcome.kind, OutcomeKind::HostFault, "{:?}", fork.outcome);
            let shared = usize::try_from(event).unwrap();
            let all = whole(&bench, &fork);
            assert!(bytes(&all[..shared]) == bytes(&spans[..shared]), "{}", fork.spec.id);
            assert!(bytes(&bench.store.trajectory(&fork.attempt.key).unwrap()) == bytes(&all), "{}", fork.spec.id);
            replayed.push(fork.spec.id.clone());
            result = fork;
        }
    }
    assert!(replayed.len() > 120, "{}", replayed.len());
    let different = bench.different(&replayed, plugins(), 16).await;
    assert!(different.is_empty(), "{}", support::shown(&different[0]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_forked_says_why_and_leaves_nothing_behind() {
    let bench = Bench::new();
    let runner = bench.runner(plugins(), Limits { attempt_wall_ms_max: 60, ..limits() });
    let steps = vec![Step::Chat, Step::Start, Step::Next(0), Step::Message, Step::Finish(0), Step::Chat];
    let ancestor = job(&runner, "ancestor", 1, &program(steps), &json!({}));
    let result = bench.record(&runner, vec![ancestor.clone()], Model::Answers).await.remove(0);
    let id = &result.spec.id;
    let refused =
        |rollout: &str, event| fork_point(&*bench.store, &RolloutId::new(rollout).unwrap(), None, event).unwrap_err();
    assert!(refused("nobody", 0).contains("no rollout"));
    // Behind the agent's last event there is only its grading.
    let last = agent_events(&result.spans);
    assert_eq!(point(&bench, id, last).event, last);
    for event in [last + 1, last + 2, u64::MAX] {
        assert!(refused("ancestor", event).contains(&format!("{last} of its")), "{}", refused("ancestor", event));
    }
    // Text that was read before the call ended is only in its end.
    for event in [2, 3] {
        assert!(refused("ancestor", event).contains("model call 1"), "{}", refused("ancestor", event));
    }
    // The same from a spec that nobody has checked: a typed error, and no live attempt.
    let good = point(&bench, id, 1);
    let bad = [
        (ForkPoint { event: last + 1, ..good.clone() }, "bad-event"),
        (ForkPoint { attempt: AttemptNumber(2), ..good.clone() }, "bad-attempt"),
        (ForkPoint { rollout: RolloutId::new("itself").unwrap(), ..good.clone() }, "itself"),
    ];
    for (at, name) in bad {
        let job = fork_job(&ancestor, name, 2, at);
        let id = job.spec.id.clone();
        let error = match runner.submit(vec![job], Arc::new(Backend::new(Model::Answers))).await {
            Ok(batch) => batch.all().await.unwrap_err(),
            Err(error) => error,
        };
        let refused = matches!(error, RunnerError::Fork { .. } | RunnerError::Store(StoreError::InvalidFork { .. }));
        assert!(refused, "{name}: {error:?}");
        let attempts = bench.store.attempts(&id);
        assert!(attempts.is_err() || attempts.is_ok_and(|attempts| attempts.is_empty()), "{name}");
    }
    // One that has not ended.
    let waiting = job(&runner, "waiting", 1, &behave(Behaviour::Healthy), &json!({}));
    let backend = Backend::new(Model::SilentFrom(0));
    let patient = bench.runner(plugins(), limits());
    let batch = patient.submit(vec![waiting], Arc::new(backend.clone())).await.unwrap();
    while backend.asked() == 0 {
        tokio::task::yield_now().await;
    }
    assert!(refused("waiting", 0).contains("not ended"));
    batch.cancel();
    batch.all().await.unwrap();
    // Now it has: up to where it was cancelled, and there its question is asked again.
    assert_eq!(point(&bench, &RolloutId::new("waiting").unwrap(), 0).event, 0);
    assert!(refused("waiting", 1).contains("cannot be left"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_was_cut_off_can_be_forked_where_it_stood() {
    let bench = Bench::new();
    let runner = bench.runner(plugins(), Limits { attempt_wall_ms_max: 60, ..limits() });
    let ancestor = job(&runner, "cut", 1, &behave(Behaviour::Converse), &json!({}));
    let result = bench.record(&runner, vec![ancestor.clone()], Model::SilentFrom(1)).await.remove(0);
    assert_eq!(result.outcome.kind, OutcomeKind::WallTimeout);
    let called = event_of_call(&result.spans, 1).unwrap();
    let fork = fork_job(&ancestor, "goes-on", 2, point(&bench, &result.spec.id, called));
    let fork = bench.record(&runner, vec![fork], Model::Answers).await.remove(0);
    assert_eq!(fork.outcome.kind, OutcomeKind::Completed, "{:?}", fork.outcome);
    assert_identical(&bench.replay(&fork.spec.id, plugins()).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fork_whose_agent_has_changed_ends_as_a_fault_that_names_the_divergence() {
    let bench = Bench::new();
    let runner = bench.runner(plugins(), limits());
    let calls = vec![("fail".to_owned(), json!({})), ("count".to_owned(), json!({}))];
    let input = json!(Input { calls, ..Input::new(Behaviour::Call) });
    let ancestor = job(&runner, "ancestor", 1, &input, &json!({}));
    let result = bench.record(&runner, vec![ancestor.clone()], Model::Answers).await.remove(0);
    let changed = patched("nasty_tool", "out of order", "out of ordeR");
    let tools = [("tool".to_owned(), sandbox().load_tool(&changed).unwrap())].into();
    let changed = bench.runner(Plugins { tools, ..plugins() }, limits());
    let fork = |event| fork_job(&ancestor, &format!("fork-{event}"), 2, point(&bench, &result.spec.id, event));
    let forks = bench.record(&changed, vec![fork(0), fork(1)], Model::Answers).await;
    // Before anything has happened there is nothing that could differ.
    assert_eq!(forks[0].outcome.kind, OutcomeKind::Completed);
    assert_eq!(forks[1].outcome.kind, OutcomeKind::HostFault);
    assert!(forks[1].outcome.detail.contains("event 0 differs in its body"), "{}", forks[1].outcome.detail);
    assert!(forks[1].spans.is_empty() && forks[1].attempt.rewards.is_empty() && !forks[1].is_graded());
}

#[test]
fn owners_are_the_only_thing_that_a_fork_changes_in_its_prefix() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let bench = Bench::new();
    let (result, fork) = runtime.block_on(async {
        let runner = bench.runner(plugins(), limits());
        let ancestor = job(&runner, "ancestor", 1, &behave(Behaviour::Converse), &json!({}));
        let result = bench.record(&runner, vec![ancestor.clone()], Model::Answers).await.remove(0);
        let last = agent_events(&result.spans);
        // Left at its end and with its own seed: nothing is new but the grading.
        let fork = fork_job(&ancestor, "fork", 1, point(&bench, &result.spec.id, last));
        let fork = bench.record(&runner, vec![fork], Model::Answers).await.remove(0);
        (result, fork)
    });
    let all = whole(&bench, &fork);
    assert_eq!(anonymous(&all, &result.spans[0]), anonymous(&result.spans, &result.spans[0]));
    assert_eq!(fork.attempt.rewards, result.attempt.rewards);
}
