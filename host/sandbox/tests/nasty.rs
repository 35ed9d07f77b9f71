//! Guests that misbehave. Each must end with the right outcome, name the limit and its value, and leave the guests beside it
//! alone.
#![allow(clippy::panic, clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::time::Instant;

use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::reward::RewardSource;
use fulgurite_core::seed::Seed;
use fulgurite_core::span::{SpanBody, SpanStatus};
use fulgurite_sandbox::{GradeReport, GradeRun};
use serde_json::json;
use support::{Attempt, START_NS, assert_ended, guest, limit, sandbox};

/// Runs healthy attempts beside the one under test and sees that all of them succeed.
async fn beside_healthy(attempt: Attempt, input: serde_json::Value) -> (Attempt, fulgurite_sandbox::AgentReport) {
    let healthy: Vec<_> = (0..8)
        .map(|index| {
            tokio::spawn(async move { Attempt::new(&format!("healthy-{index}")).behave("healthy").await.outcome })
        })
        .collect();
    let report = attempt.run(input).await;
    for outcome in healthy {
        assert_eq!(outcome.await.unwrap(), AttemptOutcome::completed("\"answer to: hello\"".to_owned()));
    }
    (attempt, report)
}

async fn behaviour(limits: Limits, name: &str) -> (Attempt, fulgurite_sandbox::AgentReport) {
    let attempt = Attempt { limits, ..Attempt::new("nasty") };
    beside_healthy(attempt, json!({ "behaviour": name })).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_loop() {
    let (_, report) = behaviour(Limits { guest_cpu_ms_max: 100, ..Limits::default() }, "loop").await;
    assert_ended(&report, OutcomeKind::CpuLimit, limit("guest_cpu_ms_max", 100));
    assert!((100_000..200_000).contains(&report.guest_cpu_us), "{}", report.guest_cpu_us);
}

/// On one thread, nobody else would ever run if a loop did not give way.
#[tokio::test(flavor = "current_thread")]
async fn an_endless_loop_does_not_hold_its_thread() {
    let (_, report) = behaviour(Limits { guest_cpu_ms_max: 100, ..Limits::default() }, "loop").await;
    assert_ended(&report, OutcomeKind::CpuLimit, limit("guest_cpu_ms_max", 100));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_bomb() {
    let (_, report) = behaviour(Limits { memory_bytes_max: 16 << 20, ..Limits::default() }, "memory-bomb").await;
    assert_ended(&report, OutcomeKind::MemoryLimit, limit("memory_bytes_max", 16 << 20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_of_the_module_itself_is_counted() {
    let (_, report) = behaviour(Limits { memory_bytes_max: 1 << 16, ..Limits::default() }, "healthy").await;
    assert_ended(&report, OutcomeKind::MemoryLimit, limit("memory_bytes_max", 1 << 16));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_are_limited() {
    let (_, report) = behaviour(Limits { table_elements_max: 1, ..Limits::default() }, "healthy").await;
    assert_ended(&report, OutcomeKind::MemoryLimit, limit("table_elements_max", 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deep_recursion() {
    let (_, report) = behaviour(Limits::default(), "recursion").await;
    assert_ended(&report, OutcomeKind::StackLimit, limit("stack_bytes_max", Limits::default().stack_bytes_max));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn huge_strings() {
    let limits = Limits { payload_bytes_max: 1 << 20, ..Limits::default() };
    let huge = |bytes: u64| json!({"behaviour": "huge-string", "size": bytes});
    let attempt = Attempt { limits, ..Attempt::new("nasty") };
    let (attempt, report) = beside_healthy(attempt, huge(2 << 20)).await;
    assert_ended(&report, OutcomeKind::OutputLimit, limit("payload_bytes_max", 1 << 20));
    let report = attempt.run(huge(100_000)).await;
    assert_ended(&report, OutcomeKind::OutputLimit, limit("span_bytes_max", 64 << 10));
    let report = attempt.behave("huge-request").await;
    assert_ended(&report, OutcomeKind::OutputLimit, limit("payload_bytes_max", 1 << 20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalid_utf8() {
    let (attempt, report) = behaviour(Limits::default(), "invalid-utf8").await;
    assert_ended(&report, OutcomeKind::Trap, None);
    assert!(report.outcome.detail.contains("utf-8"), "{}", report.outcome.detail);
    assert!(attempt.kept.spans().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn span_flood() {
    let (attempt, report) = behaviour(Limits { spans_max: 50, ..Limits::default() }, "span-flood").await;
    assert_ended(&report, OutcomeKind::OutputLimit, limit("spans_max", 50));
    assert_eq!(attempt.kept.spans().len(), 50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_flood() {
    let limits = Limits { output_bytes_max: 10_000, ..Limits::default() };
    let (attempt, report) = behaviour(limits, "output-flood").await;
    assert_ended(&report, OutcomeKind::OutputLimit, limit("output_bytes_max", 10_000));
    assert!(attempt.kept.spans().len() <= 10_000 / "again and again and again".len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handle_flood() {
    let (_, report) = behaviour(Limits::default(), "handle-flood").await;
    assert_ended(&report, OutcomeKind::MemoryLimit, limit("handles_max", 16_384));
    let limits = Limits { spans_max: 100_000, llm_calls_max: 100_000, ..Limits::default() };
    let (_, report) = behaviour(limits, "call-flood").await;
    assert_ended(&report, OutcomeKind::MemoryLimit, limit("handles_max", 16_384));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trap() {
    let (_, report) = behaviour(Limits::default(), "trap").await;
    assert_ended(&report, OutcomeKind::Trap, None);
    let detail = &report.outcome.detail;
    assert!(detail.contains("unreachable") && detail.contains("wasm backtrace"), "{detail}");
    assert!(detail.contains("on purpose"), "{detail}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exit() {
    let (_, report) = behaviour(Limits::default(), "exit").await;
    assert_ended(&report, OutcomeKind::Trap, None);
    assert!(report.outcome.detail.contains("exit"), "{}", report.outcome.detail);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reward_of_its_own_must_be_finite() {
    let (attempt, report) = behaviour(Limits::default(), "nan-reward").await;
    assert_ended(&report, OutcomeKind::Trap, None);
    assert!(report.outcome.detail.contains("`reward` is NaN"), "{}", report.outcome.detail);
    assert!(attempt.kept.spans().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_span_left_open_is_recorded_as_such() {
    let (attempt, report) = behaviour(Limits::default(), "abandoned-span").await;
    assert_ended(&report, OutcomeKind::Trap, None);
    let spans = attempt.kept.spans();
    let span = spans.iter().find(|span| matches!(span.body, SpanBody::Guest)).unwrap();
    assert_eq!(span.name, "abandoned");
    assert!(matches!(span.status, SpanStatus::Error(_)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_for_ever_is_a_wall_timeout_and_costs_no_cpu() {
    let limits = Limits { attempt_wall_ms_max: 300, guest_cpu_ms_max: 100, ..Limits::default() };
    let llm = std::sync::Arc::new(support::Scripted { silent: true, ..Default::default() });
    let attempt = Attempt { limits, llm, ..Attempt::new("waits") };
    let report = attempt.behave("healthy").await;
    assert_ended(&report, OutcomeKind::WallTimeout, limit("attempt_wall_ms_max", 300));
    assert!(report.guest_cpu_us < 100_000, "{}", report.guest_cpu_us);
}

/// Whatever the model does, its time is not the guest's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_models_time_is_not_the_guests() {
    let limits = Limits { guest_cpu_ms_max: 50, ..Limits::default() };
    let llm = std::sync::Arc::new(support::Scripted { busy_ms: 200, ..Default::default() });
    let attempt = Attempt { limits, llm, ..Attempt::new("patient") };
    let report = attempt.behave("healthy").await;
    assert_eq!(report.outcome.kind, OutcomeKind::Completed, "{:?}", report.outcome);
    assert!(report.guest_cpu_us < 50_000, "{}", report.guest_cpu_us);
    let spans = attempt.kept.spans();
    assert!(spans[0].end_ns - spans[0].start_ns >= 200_000_000, "the guest's clock moves by the call's duration");
}

async fn grade(world: &str, limits: &Limits) -> Result<GradeReport, AttemptOutcome> {
    let grader = sandbox().load_grader(&guest("nasty_grader")).unwrap();
    let outcome = AttemptOutcome::completed("\"R7\"".to_owned());
    grader
        .grade(GradeRun {
            input: "{}".to_owned(),
            world: json!(world).to_string(),
            reference: "null".to_owned(),
            outcome: &outcome,
            spans: [&[], &[]],
            seed: Seed::new(1),
            limits,
            start_unix_ns: START_NS,
            judge: None,
        })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn graders_never_turn_a_fault_into_a_number() {
    let limits = Limits { guest_cpu_ms_max: 100, memory_bytes_max: 16 << 20, ..Limits::default() };
    let cases = [
        ("nan", "`style` is NaN", None),
        ("infinite", "`reward` is inf", None),
        ("loop", "guest_cpu_ms_max", limit("guest_cpu_ms_max", 100)),
        ("memory", "memory_bytes_max", limit("memory_bytes_max", 16 << 20)),
        ("trap", "on purpose", None),
        ("many", "1000 rewards", limit("rewards_max", 64)),
        ("nameless", "0 bytes", None),
        ("refuse", "no field `answer`", None),
    ];
    for (world, text, reached) in cases {
        let fault = grade(world, &limits).await.unwrap_err();
        assert_eq!((fault.kind, &fault.limit), (OutcomeKind::GraderFault, &reached), "{world}: {fault:?}");
        assert!(fault.detail.contains(text), "{world}: {}", fault.detail);
        let healthy = grade("good", &limits).await.unwrap();
        assert_eq!(healthy.rewards.len(), 1);
    }
}

#[tokio::test]
async fn a_grader_sees_the_item_and_the_trajectory() {
    let tool = sandbox().load_tool(&guest("nasty_tool")).unwrap();
    let tools = tool.open("{}".to_owned(), Seed::new(7), &Limits::default(), START_NS).await.unwrap();
    let attempt = Attempt { tools: Some(tools), ..Attempt::new("graded") };
    let report = attempt.behave("converse").await;
    let grader = sandbox().load_grader(&guest("nasty_grader")).unwrap();
    let grade = grader
        .grade(GradeRun {
            input: json!({"people": 4}).to_string(),
            world: json!("show").to_string(),
            reference: json!({"best": "R7"}).to_string(),
            outcome: &report.outcome,
            spans: [&attempt.kept.spans(), &[]],
            seed: Seed::new(1),
            limits: &Limits::default(),
            start_unix_ns: START_NS,
            judge: None,
        })
        .await
        .unwrap();
    let reward = &grade.rewards[0];
    assert_eq!((reward.source, reward.component), (RewardSource::Grader, Some(grader.hash())));
    assert_eq!((reward.value, reward.call_index), (0.5, Some(0)));
    let seen: serde_json::Value = serde_json::from_str(reward.feedback.as_deref().unwrap()).unwrap();
    assert_eq!((&seen["input"], &seen["reference"]), (&json!({"people": 4}), &json!({"best": "R7"})));
    assert_eq!(seen["ending"], json!({"completed": "answer to: {\"text\":\"hi\"}"}));
    let events = seen["events"].as_array().unwrap();
    assert_eq!(events.len(), 4, "two calls, a tool, an object: {events:?}");
    assert_eq!(events[0], json!({"llm": "answer to: first", "prompt": 2, "index": 0}));
    assert_eq!(events[1]["tool"], "echo");
    assert_eq!(events[3]["object"], "answers");
    assert!(grade.guest_cpu_us > 0);
}

/// Cancelling drops the guest at its next yield, at once as seen from outside.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_the_future_stops_the_guest() {
    let attempt =
        Attempt { limits: Limits { guest_cpu_ms_max: 60_000, ..Limits::default() }, ..Attempt::new("looping") };
    let run = attempt.run_of(&json!({"behaviour": "loop"}));
    let weak = std::sync::Arc::downgrade(&attempt.llm);
    let started = Instant::now();
    let agent = support::nasty();
    let task = tokio::spawn(async move { agent.run(run).await });
    tokio::task::yield_now().await;
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert!(started.elapsed().as_secs() < 10, "{:?}", started.elapsed());
    drop(attempt);
    assert!(weak.upgrade().is_none(), "the guest's store still holds its session");
}
