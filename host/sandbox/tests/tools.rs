//! Tools: one instance per attempt, faults that end it, calls in parallel.
#![allow(clippy::panic, clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::sync::Arc;

use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::seed::Seed;
use fulgurite_core::span::SpanBody;
use fulgurite_core::tool::{ToolError, ToolHost};
use fulgurite_sandbox::ToolSet;
use serde_json::{Value, json};
use support::{Attempt, START_NS, assert_ended, guest, limit, sandbox};

async fn open(world: Value, limits: &Limits) -> Result<Arc<dyn ToolHost>, AttemptOutcome> {
    let tool = sandbox().load_tool(&guest("nasty_tool")).unwrap();
    tool.open(world.to_string(), Seed::new(7), limits, START_NS).await
}

async fn with_tool(name: &str, limits: Limits) -> Attempt {
    let tools = open(json!({"rooms": 12}), &limits).await.unwrap();
    Attempt { limits, tools: Some(tools), ..Attempt::new(name) }
}

#[tokio::test]
async fn answers_and_refusals_reach_the_agent_and_the_session_lives_on() {
    let attempt = with_tool("calls", Limits::default()).await;
    let calls = json!([["count", {}], ["fail", {}], ["refuse", {}], ["nothing", {}], ["count", {}], ["world", {}]]);
    let report = attempt.run(json!({"behaviour": "call", "calls": calls})).await;
    let answers: Value = serde_json::from_str(&report.outcome.output).unwrap();
    assert_eq!(answers[0], json!({"ok": 1}));
    assert!(answers[1]["error"].as_str().unwrap().contains("out of order"), "{answers}");
    assert!(answers[2]["error"].as_str().unwrap().contains("`text` is missing"), "{answers}");
    assert!(answers[3]["error"].as_str().unwrap().contains("nothing"), "{answers}");
    assert_eq!(answers[4], json!({"ok": 5}), "one instance for the whole attempt");
    assert_eq!(answers[5], json!({"ok": {"world": {"rooms": 12}, "seed": 7}}));
    let spans = attempt.kept.spans();
    let results = spans.iter().map(|span| match &span.body {
        SpanBody::Tool { result, .. } => result.clone(),
        other => panic!("{other:?}"),
    });
    let kinds: Vec<_> = results.map(|result| result.map_err(|error| std::mem::discriminant(&error))).collect();
    assert_eq!(kinds[1], Err(std::mem::discriminant(&ToolError::Failed(String::new()))));
    assert_eq!(kinds[2], Err(std::mem::discriminant(&ToolError::InvalidArguments(String::new()))));
    assert_eq!(kinds[3], Err(std::mem::discriminant(&ToolError::UnknownTool(String::new()))));
    assert!(attempt.tools.unwrap().guest_cpu_us() > 0);
}

#[tokio::test]
async fn a_tools_fault_ends_the_attempt_whatever_the_agent_would_do() {
    let limits = Limits { guest_cpu_ms_max: 100, memory_bytes_max: 16 << 20, ..Limits::default() };
    let cases = [
        ("loop", limit("guest_cpu_ms_max", 100)),
        ("memory", limit("memory_bytes_max", 16 << 20)),
        ("trap", None),
        ("huge", limit("payload_bytes_max", 1 << 20)),
    ];
    for (name, reached) in cases {
        let attempt = with_tool(name, limits.clone()).await;
        let report =
            attempt.run(json!({"behaviour": "call", "calls": [["count", {}], [name, {}], ["count", {}]]})).await;
        assert_ended(&report, OutcomeKind::ToolFault, reached.clone());
        let spans = attempt.kept.spans();
        assert_eq!(spans.len(), 2, "{spans:?}");
        match &spans[1].body {
            SpanBody::Tool { result: Err(ToolError::Fault { limit, .. }), .. } => assert_eq!(limit, &reached),
            other => panic!("{other:?}"),
        }
        // The instance is gone for good.
        let again = attempt.tools.unwrap().call("count".to_owned(), "{}".to_owned()).await;
        assert!(matches!(again, Err(ToolError::Fault { .. })), "{again:?}");
    }
}

#[tokio::test]
async fn a_tool_that_does_not_open_is_a_fault() {
    for (how, text) in [("refuse", "no field `rooms`"), ("trap", "on purpose")] {
        let fault = open(json!({"open": how}), &Limits::default()).await.map(|_| ()).unwrap_err();
        assert_eq!(fault.kind, OutcomeKind::ToolFault);
        assert!(fault.detail.contains(text), "{}", fault.detail);
    }
    let fault =
        open(json!({}), &Limits { memory_bytes_max: 1 << 16, ..Limits::default() }).await.map(|_| ()).unwrap_err();
    assert_eq!((fault.kind, fault.limit), (OutcomeKind::ToolFault, limit("memory_bytes_max", 1 << 16)));
}

#[tokio::test]
async fn tool_calls_are_turns_of_the_policy() {
    let attempt = with_tool("calls-on", Limits { tool_calls_max: 3, ..Limits::default() }).await;
    let report = attempt.behave("call-forever").await;
    assert_ended(&report, OutcomeKind::TurnLimit, limit("tool_calls_max", 3));
    assert_eq!(attempt.kept.spans().len(), 4, "the refused call is recorded too");
}

#[tokio::test]
async fn without_tools_there_are_none() {
    let report = Attempt::new("alone").run(json!({"behaviour": "call", "calls": [["echo", {}]]})).await;
    assert_eq!(report.outcome.kind, OutcomeKind::Completed);
    assert!(report.outcome.output.contains("echo"), "{}", report.outcome.output);
}

#[tokio::test]
async fn parallel_calls_are_served_in_order_and_a_dropped_one_does_no_harm() {
    let attempt = with_tool("parallel-tools", Limits::default()).await;
    let report = attempt.behave("parallel-tools").await;
    assert_eq!(report.outcome.output, "[0,2,3]", "{:?}", report.outcome);
}

/// A caller that goes away in the middle of a call must not leave the instance half way through it.
#[tokio::test]
async fn a_cancelled_call_is_finished_before_the_next_one() {
    let limits = Limits { guest_cpu_ms_max: 300, ..Limits::default() };
    let tool = open(json!({}), &limits).await.unwrap();
    {
        let mut call = tool.call("loop".to_owned(), "{}".to_owned());
        assert!(futures::poll!(call.as_mut()).is_pending());
    }
    let next = tool.call("count".to_owned(), "{}".to_owned()).await;
    match next {
        Err(ToolError::Fault { limit: reached, .. }) => assert_eq!(reached, limit("guest_cpu_ms_max", 300)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_set_of_tools_keeps_them_apart() {
    let limits = Limits::default();
    let (first, second) = (open(json!({}), &limits).await.unwrap(), open(json!({}), &limits).await.unwrap());
    let twice = ToolSet::new(vec![Arc::clone(&first), second]);
    match twice.list().await {
        Err(ToolError::Fault { detail, .. }) => assert!(detail.contains("two tools are called `echo`"), "{detail}"),
        other => panic!("{other:?}"),
    }
    let one = ToolSet::new(vec![first]);
    assert_eq!(one.list().await.unwrap().len(), nasty_tool::Behaviour::ALL.len());
    assert_eq!(one.call("count".to_owned(), "{}".to_owned()).await, Ok("1".to_owned()));
    let unknown = one.call("nothing".to_owned(), "{}".to_owned()).await;
    assert_eq!(unknown, Err(ToolError::UnknownTool("nothing".to_owned())));
    assert!(one.guest_cpu_us() > 0);
}
