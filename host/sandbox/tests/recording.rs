//! What an attempt leaves behind: enough to run it again without a model.
#![allow(clippy::panic, clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{LlmError, Message, Role};
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::reward::RewardSource;
use fulgurite_core::seed::Seed;
use fulgurite_core::span::{AttributeValue, LlmCall, Span, SpanBody, SpanKind, SpanRefused, SpanSink, SpanStatus};
use fulgurite_core::tool::ToolHost;
use fulgurite_sandbox::{Recorder, TemplateRenderer, Templates};
use serde_json::{Value, json};
use support::{Attempt, START_NS, Scripted, assert_ended, guest, key, limit, sandbox};

async fn nasty_tool(world: Value) -> Arc<dyn ToolHost> {
    let tool = sandbox().load_tool(&guest("nasty_tool")).unwrap();
    tool.open(world.to_string(), Seed::new(7), &Limits::default(), START_NS).await.unwrap()
}

fn llm_calls(spans: &[Span]) -> Vec<&LlmCall> {
    let calls = spans.iter().filter_map(|span| match &span.body {
        SpanBody::Llm(call) => Some(&**call),
        _ => None,
    });
    calls.collect()
}

/// The conversations of all calls, put together again from what was recorded.
fn conversations(spans: &[Span]) -> BTreeMap<u64, Vec<Message>> {
    let mut known: Vec<Message> = vec![];
    let calls = llm_calls(spans).into_iter().map(|call| {
        known.extend(call.new_messages.clone());
        (call.call_index, call.messages.iter().map(|index| known[*index as usize].clone()).collect())
    });
    calls.collect()
}

fn output(outcome: &AttemptOutcome) -> Value {
    assert_eq!(outcome.kind, OutcomeKind::Completed, "{outcome:?}");
    serde_json::from_str(&outcome.output).unwrap()
}

#[tokio::test]
async fn a_conversation_is_recorded_completely_and_in_a_tree() {
    let attempt = Attempt { tools: Some(nasty_tool(json!({})).await), ..Attempt::new("talks") };
    let report = attempt.behave("converse").await;
    assert_eq!(output(&report.outcome), json!("answer to: {\"text\":\"hi\"}"));
    attempt.recorder.finish(&report.outcome);
    let spans = attempt.kept.spans();

    // Order, identity and tree.
    assert!(spans.iter().zip(0..).all(|(span, place)| span.sequence == place && span.attempt == key("talks")));
    let order: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(order, ["tools", "llm", "tool echo", "inner", "llm", "object", "outer", "attempt"]);
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    assert_eq!(named("attempt").parent, None);
    assert_eq!(named("outer").parent, Some(named("attempt").span_id));
    assert_eq!(named("inner").parent, Some(named("outer").span_id));
    assert_eq!(named("tool echo").parent, Some(named("inner").span_id));
    assert_eq!(named("llm").parent, Some(named("outer").span_id));
    assert_eq!((named("llm").kind, named("outer").kind), (SpanKind::Client, SpanKind::Internal));
    assert!(spans.iter().all(|span| span.start_ns >= START_NS && span.end_ns >= span.start_ns));

    // The model was asked what is recorded.
    let recorded = conversations(&spans);
    let asked: BTreeMap<u64, Vec<Message>> =
        attempt.llm.asked.lock().unwrap().iter().map(|(index, request)| (*index, request.messages.clone())).collect();
    assert_eq!(recorded, asked);
    let calls = llm_calls(&spans);
    assert_eq!((calls[0].messages.clone(), calls[1].messages.clone()), (vec![0, 1], vec![0, 1, 2, 3]));
    assert_eq!(calls[1].new_messages.len(), 2, "a message is stored once per attempt");
    let repeated = &calls[1].new_messages[0];
    assert_eq!((repeated.role, repeated.content.as_str()), (Role::Assistant, "answer to: first"));
    assert_eq!(repeated.response_id.as_ref().unwrap().0, "scripted/0");
    assert!(calls[0].tools.as_ref().is_some_and(|tools| tools.len() == nasty_tool::Behaviour::ALL.len()));
    assert_eq!(calls[1].tools, None, "the same tools as before");
    assert_eq!((calls[0].agent_role.as_str(), calls[0].sampling.temperature), ("planner", 0.5));
    assert_eq!(calls[0].result.as_deref().unwrap(), &support::completion(0, "answer to: first"));
    match &named("tool echo").body {
        SpanBody::Tool { name, arguments, result } => {
            assert_eq!((name.as_str(), arguments.as_str()), ("echo", r#"{"text":"hi"}"#));
            assert_eq!(result.as_deref(), Ok(r#"{"text":"hi"}"#));
        }
        other => panic!("{other:?}"),
    }
}

/// Everything but the virtual clock, which holds the durations of host calls.
fn timeless(spans: Vec<Span>) -> Vec<Span> {
    spans.into_iter().map(|span| Span { start_ns: 0, end_ns: 0, ..span }).collect()
}

#[tokio::test]
async fn the_same_seed_records_the_same_spans() {
    let record = async |seed| {
        let attempt = Attempt { tools: Some(nasty_tool(json!({})).await), ..Attempt::seeded("twin", seed) };
        let report = attempt.behave("converse").await;
        attempt.recorder.finish(&report.outcome);
        timeless(attempt.kept.spans())
    };
    assert_eq!(record(3).await, record(3).await);
    assert_ne!(record(3).await[0].span_id, record(4).await[0].span_id);
}

#[tokio::test]
async fn parallel_calls_and_dropped_ones_are_recorded() {
    let attempt = Attempt::new("parallel");
    let report = attempt.behave("parallel").await;
    let answer = output(&report.outcome);
    assert_eq!(
        answer,
        json!({"first": 1, "chunk": "answer to: fast", "end": null, "fast": "answer to: fast", "slow": "answer to: slow"})
    );
    let spans = attempt.kept.spans();
    let calls = llm_calls(&spans);
    let indices: Vec<u64> = calls.iter().map(|call| call.call_index).collect();
    assert_eq!(indices, [2, 1, 0], "in the order in which they ended");
    assert!(matches!(&calls[0].result, Err(LlmError::Unavailable(text)) if text.contains("cancelled")));
    let conversations = conversations(&spans);
    assert_eq!(conversations[&0][0].content, "slow");
    assert_eq!(conversations[&2][0].content, "dropped");
    let host_calls: Vec<(&str, &str, &str)> = spans
        .iter()
        .filter_map(|span| match &span.body {
            SpanBody::HostCall { function, arguments, result, .. } => Some((&**function, &**arguments, &**result)),
            _ => None,
        })
        .collect();
    assert_eq!(
        host_calls,
        [
            ("wait-any", r#"{"call_indices":[0,1]}"#, "1"),
            ("[method]pending.next", r#"{"call_index":1}"#, r#"{"chunk_bytes":15}"#),
            ("[method]pending.next", r#"{"call_index":1}"#, r#"{"end":true}"#),
        ]
    );
}

#[tokio::test]
async fn a_call_that_is_cut_off_is_recorded() {
    let limits = Limits { attempt_wall_ms_max: 200, ..Limits::default() };
    let llm = Arc::new(Scripted { silent: true, ..Scripted::default() });
    let attempt = Attempt { limits, llm, ..Attempt::new("cut-off") };
    let report = attempt.behave("healthy").await;
    assert_eq!(report.outcome.kind, OutcomeKind::WallTimeout);
    let spans = attempt.kept.spans();
    let calls = llm_calls(&spans);
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0].new_messages[0].content, "hello");
    assert!(calls[0].result.is_err());
}

#[tokio::test]
async fn a_guest_cannot_forge_the_hosts_attributes() {
    let attempt = Attempt::new("forger");
    output(&attempt.behave("forge").await.outcome);
    let spans = attempt.kept.spans();
    let mine = spans.iter().find(|span| span.name == "mine").unwrap();
    let names: Vec<&str> = mine.guest_attributes.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        ["guest.fulgurite.rollout.id", "guest.gen_ai.response.id", "my.key", "guest.gen_ai.usage.output_tokens"]
    );
    let all: Vec<_> = spans.iter().flat_map(Span::attributes).collect();
    let rollout: Vec<_> =
        all.iter().filter(|(name, _)| name == "fulgurite.rollout.id").map(|(_, value)| value).collect();
    assert!(rollout.iter().all(|value| **value == AttributeValue::Text("forger".to_owned())));
    assert!(!all.iter().any(|(name, _)| name == "fulgurite.reward.value" || name == "gen_ai.response.id"));
}

#[tokio::test]
async fn standard_output_becomes_lines_of_log() {
    let attempt = Attempt::new("prints");
    output(&attempt.behave("print").await.outcome);
    let spans = attempt.kept.spans();
    let mut lines: Vec<(&str, &str)> = spans
        .iter()
        .map(|span| match &span.body {
            SpanBody::Log { level, text } => (level.as_str(), text.as_str()),
            other => panic!("{other:?}"),
        })
        .collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [("stderr", "a warning"), ("stdout", "first line"), ("stdout", "no end of line"), ("stdout", "second line")]
    );
}

#[tokio::test]
async fn what_an_agent_emits_is_stamped_with_its_source() {
    let attempt = Attempt::new("emits");
    output(&attempt.behave("emit").await.outcome);
    let spans = attempt.kept.spans();
    let rewards: Vec<_> = spans
        .iter()
        .filter_map(|span| match &span.body {
            SpanBody::Reward(reward) => Some((reward.source, reward.value, reward.call_index)),
            _ => None,
        })
        .collect();
    assert_eq!(rewards, [(RewardSource::Agent, 0.5, None), (RewardSource::Agent, 0.25, Some(0))]);
    let outer = spans.last().unwrap();
    assert_eq!((outer.name.as_str(), &outer.status), ("outer", &SpanStatus::Unset));
    assert!(spans[..spans.len() - 1].iter().all(|span| span.parent == Some(outer.span_id)));
    assert!(
        spans
            .iter()
            .any(|span| span.body == SpanBody::Object { name: "thing".to_owned(), value: r#"{"x":1}"#.to_owned() })
    );
    assert!(
        spans.iter().any(|span| span.body == SpanBody::Log { level: "warn".to_owned(), text: "careful".to_owned() })
    );
    assert!(
        spans.iter().any(|span| matches!(&span.body, SpanBody::Message(message) if message.content == "a message"))
    );
}

#[tokio::test]
async fn clocks_start_at_the_attempt_and_sleeping_takes_no_time() {
    let started = std::time::Instant::now();
    let attempt = Attempt::new("sleeper");
    let answer = output(&attempt.behave("clocks").await.outcome);
    assert_eq!(answer["start"], json!(START_NS), "nothing has happened yet");
    let hour = 3_600_000_000_000_u64;
    assert_eq!(answer["slept_ns"], json!(hour));
    assert_eq!(answer["end"], json!(START_NS + hour));
    assert!(started.elapsed().as_secs() < 60);
}

#[tokio::test]
async fn random_numbers_follow_from_the_seed() {
    let draw = async |seed| output(&Attempt::seeded("draws", seed).behave("random").await.outcome);
    let (first, again, other) = (draw(11).await, draw(11).await, draw(12).await);
    assert_eq!(first, again);
    assert_ne!(first["draws"], other["draws"]);
    assert_eq!(first["seed"], json!(11));
}

#[tokio::test]
async fn nothing_of_the_machine_or_of_the_items_world_can_be_reached() {
    let canary = "CANARY-1f6e";
    let tools = nasty_tool(json!({"secret": canary})).await;
    let attempt = Attempt { tools: Some(tools), ..Attempt::new("curious") };
    let report = attempt.behave("reach").await;
    let answer = output(&report.outcome);
    for denied in ["read", "list", "write", "connect", "listen", "resolve"] {
        assert!(answer[denied].get("Err").is_some(), "{denied}: {answer}");
    }
    assert_eq!((&answer["environment"], &answer["arguments"]), (&json!([]), &json!([])));
    assert!(!std::path::Path::new("/tmp/fulgurite-escaped").exists());
    let everything = format!("{answer} {}", serde_json::to_string(&attempt.kept.spans()).unwrap());
    assert!(!everything.contains(canary));
}

#[tokio::test]
async fn giving_up_is_blamed_on_what_failed() {
    let ask = async |limits: Limits, fails: Option<(u64, LlmError)>| {
        let llm = Arc::new(Scripted { fails, ..Scripted::default() });
        let attempt = Attempt { limits, llm, ..Attempt::new("asks") };
        let report = attempt.behave("ask-forever").await;
        (report, llm_calls(&attempt.kept.spans()).len())
    };
    let defaults = Limits::default();
    let (report, calls) = ask(Limits { llm_calls_max: 5, ..defaults.clone() }, None).await;
    assert_ended(&report, OutcomeKind::TurnLimit, limit("llm_calls_max", 5));
    assert_eq!(calls, 6, "the refused call is recorded too");
    let (report, calls) = ask(Limits { completion_tokens_max: 7, ..defaults.clone() }, None).await;
    assert_ended(&report, OutcomeKind::TokenLimit, limit("completion_tokens_max", 7));
    assert_eq!(calls, 4, "3 tokens each: the limit is passed with the third");
    let full = LlmError::ContextLengthExceeded { prompt_tokens: 200, context_tokens_max: 112 };
    let (report, _) = ask(defaults.clone(), Some((1, full))).await;
    assert_ended(&report, OutcomeKind::ContextLimit, None);
    let (report, _) = ask(defaults.clone(), Some((1, LlmError::Unavailable("down".to_owned())))).await;
    assert_ended(&report, OutcomeKind::LlmUnavailable, None);
    let (report, _) = ask(defaults, Some((0, LlmError::UnknownEndpoint("judge".to_owned())))).await;
    assert_ended(&report, OutcomeKind::AgentError, None);
    let report = Attempt::new("malformed").behave("malformed").await;
    assert_ended(&report, OutcomeKind::MalformedAnswer, None);
    let report = Attempt::new("misread").run(json!({"unexpected": 1})).await;
    assert_ended(&report, OutcomeKind::AgentError, None);
}

#[tokio::test]
async fn a_wrong_value_is_refused_by_name_and_never_asked() {
    let attempt = Attempt::new("wrong");
    let answer = output(&attempt.behave("invalid-request").await.outcome);
    assert!(answer.as_str().unwrap().starts_with("temperature"), "{answer}");
    assert!(attempt.llm.asked.lock().unwrap().is_empty());
    let spans = attempt.kept.spans();
    assert!(matches!(&llm_calls(&spans)[0].result, Err(LlmError::InvalidRequest(_))));
}

struct Greeting;

impl TemplateRenderer for Greeting {
    fn render(&self, _: &str, text: &str, variables: &serde_json::Map<String, Value>) -> Result<String, String> {
        let name = variables.get("name").and_then(Value::as_str).ok_or("`name` is missing")?;
        Ok(text.replace("{name}", name))
    }
}

#[tokio::test]
async fn templates_are_rendered_and_recorded() {
    let texts = BTreeMap::from([("greeting".to_owned(), "Hello {name}".to_owned())]);
    let templates = Arc::new(Templates::new(3, texts, Arc::new(Greeting)));
    let attempt = Attempt { templates, ..Attempt::new("renders") };
    let answer = output(&attempt.behave("render").await.outcome);
    assert_eq!((&answer[0], &answer[2]), (&json!("Hello Ada"), &json!(3)));
    assert!(answer[1].as_str().unwrap().contains("there are: greeting"), "{answer}");
    let spans = attempt.kept.spans();
    let rendered = SpanBody::Template {
        name: "greeting".to_owned(),
        version: 3,
        variables: Some(r#"{"name":"Ada"}"#.to_owned()),
        result: Ok("Hello Ada".to_owned()),
    };
    assert_eq!(spans[0].body, rendered);
    assert!(matches!(&spans[1].body, SpanBody::Template { result: Err(_), .. }));
}

/// A sink whose attempt is no longer the newest.
struct Stale;

impl SpanSink for Stale {
    fn record(&self, span: Span) -> Result<(), SpanRefused> {
        Err(SpanRefused::StaleAttempt(span.attempt))
    }
}

#[tokio::test]
async fn a_guest_whose_attempt_is_stale_is_stopped() {
    let attempt = Attempt::new("stale");
    let recorder = Arc::new(Recorder::new(key("stale"), attempt.seed, START_NS, Arc::new(Stale)));
    let attempt = Attempt { recorder, ..attempt };
    let report = attempt.behave("span-flood").await;
    assert_ended(&report, OutcomeKind::Cancelled, None);
    assert_eq!(attempt.recorder.refusal(), Some(SpanRefused::StaleAttempt(key("stale"))));
}
