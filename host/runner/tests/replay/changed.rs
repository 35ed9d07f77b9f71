//! Components that are not the recorded ones.

use std::collections::BTreeMap;
use std::sync::Arc;

use fulgurite_core::span::SpanBody;
use fulgurite_runner::Plugins;
use nasty_agent::program::Step;
use nasty_agent::{Behaviour, Input};
use serde_json::json;

use crate::support::{Bench, Model, behave, component, job, limits, patched, plugins, program, sandbox, shown};

fn bench_plugins() -> Plugins {
    Plugins {
        agent: sandbox().load_agent(&component("bench_agent")).unwrap(),
        grader: Some(sandbox().load_grader(&component("bench_grader")).unwrap()),
        tools: BTreeMap::new(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_changed_constant_of_an_agent_is_found_where_it_first_shows() {
    let bench = Bench::new();
    let runner = bench.runner(bench_plugins(), limits());
    let job = job(&runner, "bench", 1, &json!({"question": "What is it?"}), &json!({}));
    let result = bench.record(&runner, vec![job], Model::Answers).await.remove(0);
    assert_eq!(result.spans.len(), 9);
    // The name of the reward that it gives itself at the end: everything before is the same.
    let changed = patched("bench_agent", "answered", "answereD");
    let plugins = Plugins { agent: sandbox().load_agent(&changed).unwrap(), ..bench_plugins() };
    let report = bench.replay(&result.spec.id, plugins).await;
    let found = report.divergence.as_ref().unwrap_or_else(|| panic!("{}", shown(&report)));
    assert_eq!((found.sequence, report.same, found.what), (6, 6, "body"));
    let dimension = |span: &Option<Box<fulgurite_core::span::Span>>| match span.as_deref().map(|span| &span.body) {
        Some(SpanBody::Reward(reward)) => reward.dimension.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!((dimension(&found.recorded), dimension(&found.replayed)), ("answered".into(), "answereD".into()));
    // Another agent altogether.
    let nasty = Plugins { agent: plugins_agent(), ..bench_plugins() };
    let report = bench.replay(&result.spec.id, nasty).await;
    assert_eq!(report.divergence.as_ref().map(|found| found.sequence), Some(0), "{}", shown(&report));
}

fn plugins_agent() -> Arc<fulgurite_sandbox::AgentPlugin> {
    plugins().agent
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_grader_is_found_at_its_reward_and_another_tool_at_its_answer() {
    let bench = Bench::new();
    let runner = bench.runner(bench_plugins(), limits());
    let wrong = job(&runner, "wrong", 1, &json!({"question": "What is it?"}), &json!({}));
    let mut right = job(&runner, "right", 1, &json!({"question": "What is it?"}), &json!({}));
    let reference = json!({"answer": "what nobody says"});
    for job in [&wrong, &mut right] {
        assert_eq!(job.item.reference, json!({"answer": 1}));
    }
    let item = fulgurite_core::dataset::DatasetItem::new("item", json!({"question": "?"}), json!({}), reference);
    Arc::make_mut(&mut right.spec).item = item.texts().hash;
    Arc::make_mut(&mut right.spec).item_id.clone_from(&item.id);
    right.item = Arc::new(item);
    let result = bench.record(&runner, vec![right], Model::Answers).await.remove(0);
    assert_eq!(result.attempt.rewards.last().map(|reward| reward.value), Some(0.0), "{result:?}");
    let generous = Plugins { grader: plugins().grader, ..bench_plugins() };
    let report = bench.replay(&result.spec.id, generous).await;
    let found = report.divergence.as_ref().unwrap_or_else(|| panic!("{}", shown(&report)));
    assert!(matches!(&found.recorded.as_ref().unwrap().body, SpanBody::Reward(reward) if reward.value == 0.0));
    assert!(matches!(&found.replayed.as_ref().unwrap().body, SpanBody::Reward(reward) if reward.value > 0.9));

    let runner = bench.runner(plugins(), limits());
    let calls = ["count", "fail", "count"].map(|name| (name.to_owned(), json!({}))).to_vec();
    let input = json!(Input { calls, ..Input::new(Behaviour::Call) });
    let result =
        bench.record(&runner, vec![job(&runner, "tools", 1, &input, &json!({}))], Model::Answers).await.remove(0);
    let changed = patched("nasty_tool", "out of order", "out of ordeR");
    let tools = BTreeMap::from([("tool".to_owned(), sandbox().load_tool(&changed).unwrap())]);
    let report = bench.replay(&result.spec.id, Plugins { tools, ..plugins() }).await;
    assert_eq!(report.divergence.as_ref().map(|found| found.sequence), Some(1), "{}", shown(&report));
}

/// Whatever the changed agent asks that the recorded one did not, it is stopped before it hears anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer_reaches_an_agent_for_a_question_that_it_did_not_ask() {
    let bench = Bench::new();
    let runner = bench.runner(plugins(), limits());
    let recorded =
        vec![Step::List, Step::Start, Step::Start, Step::WaitAny(2), Step::Next(0), Step::Finish(0), Step::Finish(0)];
    // Each of them leaves the recording after so many events; `Message` would tell what it has heard.
    let changes: [(Vec<Step>, u64); 7] = [
        // Another question: the second is asked with a random number in it.
        (vec![Step::List, Step::Random, Step::Start, Step::Next(0), Step::Message], 1),
        // The same messages with other tools, temperature and role, and a look at the answer before the call has ended.
        (vec![Step::List, Step::ChatWith(1.0), Step::Message], 1),
        // A third question.
        (vec![Step::List, Step::Start, Step::Start, Step::Start, Step::Next(2), Step::Message], 1),
        // The recorded ones, waited for in another way.
        (vec![Step::List, Step::Start, Step::Start, Step::WaitAny(1), Step::Message], 1),
        (vec![Step::List, Step::Start, Step::Start, Step::Next(1), Step::Message], 1),
        (vec![Step::List, Step::Start, Step::Start, Step::WaitAny(2), Step::Next(1), Step::Message], 2),
        // One of them dropped.
        (vec![Step::List, Step::Start, Step::Start, Step::WaitAny(2), Step::Drop(0), Step::Message], 2),
    ];
    let job = job(&runner, "asks", 1, &program(recorded), &json!({}));
    let result = bench.record(&runner, vec![job], Model::Answers).await.remove(0);
    let original = bench.load(&result.spec.id);
    let replayer = bench.replayer(&original, plugins());
    assert!(replayer.replay(&original, None).await.divergence.is_none());
    for (steps, sequence) in changes {
        let mut changed = original.clone();
        let item = &original.item;
        let input = program(steps.clone());
        let other = fulgurite_core::dataset::DatasetItem::new(item.id.clone(), input, item.world.clone(), json!({}));
        changed.item = Arc::new(other);
        let heard = Arc::new(std::sync::Mutex::new(vec![]));
        let tells = Arc::clone(&heard);
        let observer: fulgurite_sandbox::TapeObserver = Arc::new(move |span| {
            if matches!(span.body, SpanBody::Message(_)) {
                tells.lock().unwrap().push(span.clone());
            }
        });
        let report = replayer.replay(&changed, Some(observer)).await;
        let found = report.divergence.as_ref().unwrap_or_else(|| panic!("{steps:?} is identical"));
        assert_eq!(found.sequence, sequence, "{steps:?}: {}", shown(&report));
        assert!(heard.lock().unwrap().is_empty(), "{steps:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_healthy_agent_that_changes_its_only_question_has_no_answer() {
    let bench = Bench::new();
    let runner = bench.runner(plugins(), limits());
    let job = job(&runner, "asks", 1, &behave(Behaviour::Converse), &json!({}));
    let result = bench.record(&runner, vec![job], Model::Answers).await.remove(0);
    let changed = patched("nasty_agent", "You are a test.", "You are a tesT.");
    let agent = sandbox().load_agent(&changed).unwrap();
    let report = bench.replay(&result.spec.id, Plugins { agent, ..plugins() }).await;
    let found = report.divergence.as_ref().unwrap();
    assert_eq!((found.sequence, found.what), (1, "model call"));
    assert!(found.detail.contains("message 0"), "{}", found.detail);
}
