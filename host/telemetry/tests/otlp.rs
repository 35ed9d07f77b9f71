//! OTLP out and in.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use fulgurite_core::attribute;
use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId, SpanId, TraceId};
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::span::{AttributeValue, Span, SpanBody, SpanKind, SpanStatus};
use fulgurite_telemetry::{Collected, Recorder, TelemetryError, export_json};
use proptest::prelude::*;
use serde_json::json;

fn key(rollout: &str) -> AttemptKey {
    AttemptKey { rollout: RolloutId::new(rollout).unwrap(), attempt: AttemptNumber(2) }
}

fn recorder() -> Recorder {
    Recorder { run: "rooms".to_owned(), version: "0.1.0".to_owned() }
}

fn span(sequence: u64, body: SpanBody) -> Span {
    Span {
        attempt: key("grpo-0"),
        sequence,
        trace_id: TraceId(0xabcd),
        span_id: SpanId(sequence + 1),
        parent: (sequence > 0).then_some(SpanId(1)),
        name: format!("span {sequence}"),
        kind: if sequence == 1 { SpanKind::Client } else { SpanKind::Internal },
        start_ns: 1_700_000_000_000_000_001 + sequence,
        end_ns: u64::MAX - 10 + sequence,
        status: match sequence {
            0 => SpanStatus::Unset,
            1 => SpanStatus::Ok,
            _ => SpanStatus::Error("it failed".to_owned()),
        },
        guest_attributes: vec![("my.key".to_owned(), AttributeValue::Integer(i64::MIN))],
        links: if sequence == 2 { vec![SpanId(1), SpanId(u64::MAX)] } else { vec![] },
        body,
    }
}

fn spans() -> Vec<Span> {
    let reward = Reward {
        dimension: "reward".to_owned(),
        value: f64::NAN,
        feedback: None,
        source: RewardSource::Grader,
        component: None,
        call_index: None,
    };
    let tool = SpanBody::Tool { name: "rooms".to_owned(), arguments: "{}".to_owned(), result: Ok("[1]".to_owned()) };
    vec![span(0, SpanBody::Guest), span(1, tool), span(2, SpanBody::Reward(reward))]
}

#[test]
fn a_request_has_the_form_that_collectors_read() {
    let line = export_json(&recorder(), &spans()).unwrap();
    assert!(!line.contains('\n'));
    let request: serde_json::Value = serde_json::from_str(&line).unwrap();
    let resource = &request["resourceSpans"][0];
    let attributes = resource["resource"]["attributes"].as_array().unwrap();
    assert!(attributes.contains(&json!({"key": "service.name", "value": {"stringValue": "fulgurite"}})));
    assert!(attributes.contains(&json!({"key": attribute::RUN_NAME, "value": {"stringValue": "rooms"}})));
    let list = resource["scopeSpans"][0]["spans"].as_array().unwrap();
    let tool = &list[1];
    assert_eq!(tool["traceId"], "0000000000000000000000000000abcd");
    assert_eq!((&tool["spanId"], &tool["parentSpanId"]), (&json!("0000000000000002"), &json!("0000000000000001")));
    assert_eq!((&tool["kind"], &tool["status"]["code"]), (&json!(3), &json!(1)));
    // 64-bit numbers are text in OTLP's JSON.
    assert_eq!(tool["startTimeUnixNano"], "1700000000000000002");
    assert_eq!(tool["endTimeUnixNano"], (u64::MAX - 9).to_string());
    let of_tool = tool["attributes"].as_array().unwrap();
    for expected in [
        json!({"key": attribute::ROLLOUT_ID, "value": {"stringValue": "grpo-0"}}),
        json!({"key": attribute::ATTEMPT_NUMBER, "value": {"intValue": "2"}}),
        json!({"key": attribute::GEN_AI_OPERATION_NAME, "value": {"stringValue": "execute_tool"}}),
        json!({"key": attribute::GEN_AI_TOOL_NAME, "value": {"stringValue": "rooms"}}),
        json!({"key": "my.key", "value": {"intValue": i64::MIN.to_string()}}),
    ] {
        assert!(of_tool.contains(&expected), "{expected} in {of_tool:#?}");
    }
    let reward = list[2]["attributes"].as_array().unwrap();
    assert!(reward.contains(&json!({"key": attribute::REWARD_VALUE, "value": {"stringValue": "NaN"}})), "{reward:#?}");
    assert_eq!(list[2]["status"], json!({"code": 2, "message": "it failed"}));
    assert_eq!(list[2]["links"][1]["spanId"], "ffffffffffffffff");
}

#[test]
fn what_comes_back_is_a_guests_word_and_nothing_more() {
    let mut collected = Collected::default();
    // In pieces, in the wrong order, and one of them twice.
    for part in [&spans()[1..], &spans()[..1], &spans()[..2]] {
        collected.add_json(&export_json(&recorder(), part).unwrap()).unwrap();
    }
    assert_eq!(collected.duplicates(), 2);
    let traces = collected.into_traces();
    assert_eq!(traces.len(), 1);
    let back = traces[0].spans(&key("otlp-abcd"));
    for (sequence, (back, sent)) in (0..).zip(back.iter().zip(spans())) {
        assert_eq!((&back.attempt, back.sequence), (&key("otlp-abcd"), sequence));
        assert_eq!((back.trace_id, back.span_id, back.parent), (sent.trace_id, sent.span_id, sent.parent));
        assert_eq!((&back.name, back.kind, &back.status), (&sent.name, sent.kind, &sent.status));
        assert_eq!((back.start_ns, back.end_ns, &back.links), (sent.start_ns, sent.end_ns, &sent.links));
        assert_eq!(back.body, SpanBody::Guest);
        let names = back.guest_attributes.iter().map(|(name, _)| name.as_str());
        assert!(names.clone().all(|name| !name.starts_with("fulgurite.") && !name.starts_with("gen_ai.")));
        assert!(names.clone().any(|name| name == "guest.fulgurite.rollout.id"));
        assert_eq!(names.clone().any(|name| name == "resource.service.name"), sequence == 0);
        let kept = ("my.key".to_owned(), AttributeValue::Integer(i64::MIN));
        assert!(back.guest_attributes.contains(&kept));
    }
    assert_eq!((traces[0].start_ns(), traces[0].end_ns()), (1_700_000_000_000_000_001, u64::MAX - 8));
}

#[test]
fn what_is_not_otlp_is_refused_and_taken_in_no_part() {
    let with = |ids: serde_json::Value| {
        let mut span = json!({"name": "a\u{1b}b", "startTimeUnixNano": "1", "endTimeUnixNano": 2});
        span.as_object_mut().unwrap().extend(ids.as_object().unwrap().clone());
        let good = json!({"traceId": "0000000000000000000000000000abcd", "spanId": "0000000000000001", "name": "good"});
        json!({"resourceSpans": [{"scopeSpans": [{"spans": [good, span]}]}]}).to_string()
    };
    let trace = "0000000000000000000000000000abcd";
    let cases = [
        (with(json!({"traceId": trace, "spanId": "00"})), "span \"ab\": its span id must be 8 bytes"),
        (with(json!({"traceId": trace, "spanId": "0000000000000000"})), "span id"),
        (with(json!({"traceId": "", "spanId": "0000000000000002"})), "trace id must be 16 bytes"),
        (with(json!({"traceId": trace, "spanId": "0000000000000002", "parentSpanId": "11"})), "parent span id"),
        (with(json!({"traceId": "zz", "spanId": "0000000000000002"})), "not an OTLP trace request"),
        ("[]".to_owned(), "not an OTLP trace request"),
        ("{\"resourceSpans\": 3}".to_owned(), "not an OTLP trace request"),
    ];
    for (text, expected) in cases {
        let mut collected = Collected::default();
        let error = collected.add_json(&text).unwrap_err();
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        assert_eq!(matches!(error, TelemetryError::Json(_)), expected.starts_with("not"));
        assert!(collected.into_traces().is_empty());
    }
}

#[test]
fn values_of_every_kind_events_and_foreign_links_are_kept() {
    let text = json!({"resourceSpans": [{"scopeSpans": [{"spans": [{
        "traceId": "0000000000000000000000000000abcd", "spanId": "0000000000000001", "name": "a", "kind": 2,
        "startTimeUnixNano": "1", "endTimeUnixNano": "2",
        "attributes": [
            {"key": "list", "value": {"arrayValue": {"values": [{"intValue": "1"}]}}},
            {"key": "flag", "value": {"boolValue": true}},
            {"key": "none"},
            {"key": "gen_ai.response.id", "value": {"stringValue": "forged"}},
        ],
        "events": [{"timeUnixNano": "1", "name": "it happened"}],
        "links": [{"traceId": "000000000000000000000000000000ff", "spanId": "0000000000000009"}],
    }]}]}]});
    let mut collected = Collected::default();
    collected.add_json(&text.to_string()).unwrap();
    let span = collected.into_traces()[0].spans(&key("a")).remove(0);
    let of = |name: &str| span.guest_attributes.iter().find(|(found, _)| found == name).map(|(_, value)| value.clone());
    let text_of = |name: &str| match of(name) {
        Some(AttributeValue::Text(text)) => text,
        other => panic!("{name}: {other:?}"),
    };
    assert_eq!(of("flag"), Some(AttributeValue::Boolean(true)));
    assert_eq!(text_of("none"), "");
    assert_eq!(text_of("guest.gen_ai.response.id"), "forged");
    assert_eq!(text_of("otel.span.kind"), "SPAN_KIND_SERVER");
    assert!(text_of("list").contains("intValue"));
    assert!(text_of("otel.events").contains("it happened"));
    assert!(text_of("otel.links").contains("0000000000000009"));
    assert!(span.links.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the text is, reading it ends.
    #[test]
    fn damaged_requests_never_panic(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let mut bytes = export_json(&recorder(), &spans()).unwrap().into_bytes();
        let place = at.index(bytes.len());
        bytes[place] = byte;
        bytes.truncate(1 + cut.index(bytes.len()));
        let mut collected = Collected::default();
        let _ = collected.add_json(&String::from_utf8_lossy(&bytes));
        for trace in collected.into_traces() {
            prop_assert!(trace.spans(&key("a")).len() <= 3);
        }
    }
}
