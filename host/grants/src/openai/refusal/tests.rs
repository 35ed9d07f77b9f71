use fulgurite_core::grant::HttpGrant;

use super::*;
use crate::ServerKind;

fn endpoint(context_tokens_max: Option<u32>) -> EndpointSettings {
    let origin = "http://127.0.0.1:1".parse().unwrap();
    let grant = HttpGrant {
        origin,
        headers: std::collections::BTreeMap::new(),
        allow_private: vec![],
        certificate_authority: None,
    };
    EndpointSettings {
        section: "policy.endpoint".to_owned(),
        name: "policy".to_owned(),
        grant,
        path: "/v1".to_owned(),
        model: "m".to_owned(),
        server: ServerKind::Vllm,
        timeout_ms: 1,
        retries_max: 0,
        backoff_ms: 0,
        requests_per_minute_max: None,
        concurrency_max: 1,
        context_tokens_max,
        answer_bytes_max: 1,
    }
}

fn of(status: u16, body: &str, max_tokens: u32) -> Refusal {
    let response = HttpResponse { status, headers: vec![], body: body.as_bytes().to_vec() };
    of_response(&endpoint(Some(77)), &response, max_tokens)
}

/// What the servers write, word for word.
#[test]
fn a_full_context_is_known_in_every_dialect() {
    for (status, body, expected) in [
        (
            400,
            r#"{"error":{"message":"This model's maximum context length is 4097 tokens. However, you requested 5000 tokens (4900 in the messages, 100 in the completion).","type":"invalid_request_error","param":"messages","code":"context_length_exceeded"}}"#,
            (4900, 4097),
        ),
        (
            400,
            r#"{"object":"error","message":"This model's maximum context length is 2048 tokens. However, your request has 3000 input tokens. Please reduce the length of the input messages.","type":"BadRequestError","param":null,"code":400}"#,
            (3000, 2048),
        ),
        (
            400,
            r#"{"error":{"code":400,"message":"the request exceeds the available context size, try increasing it","type":"exceed_context_size_error","n_prompt_tokens":14429,"n_ctx":8192}}"#,
            (14429, 8192),
        ),
        (
            500,
            r#"{"error":{"code":500,"message":"too long","type":"exceed_context_size_error","n_prompt_tokens":1407,"n_ctx":256}}"#,
            (1407, 256),
        ),
        (
            400,
            r#"{"object":"error","message":"The input (5000 tokens) is longer than the model's context length (4096 tokens).","code":400}"#,
            (5000, 4096),
        ),
        (
            400,
            r#"{"message":"Requested token count exceeds the model's maximum context length of 4096 tokens. You requested a total of 5050 tokens: 5000 tokens from the input messages and 50 tokens for the completion."}"#,
            (5000, 4096),
        ),
        (400, r#"{"error":{"message":"too long","code":"context_length_exceeded"}}"#, (0, 77)),
    ] {
        let (prompt_tokens, context_tokens_max) = expected;
        let exceeded = LlmError::ContextLengthExceeded { prompt_tokens, context_tokens_max };
        assert_eq!(of(status, body, 50), Refusal::Final(exceeded), "{body}");
    }
}

#[test]
fn a_budget_that_leaves_no_room_for_any_prompt_is_not_the_policys_doing() {
    let body = r#"{"error":{"message":"'max_tokens' or 'max_completion_tokens' is too large: 9000. This model's maximum context length is 4096 tokens and your request has 12 input tokens (9000 > 4096 - 12).","code":400}}"#;
    let Refusal::Final(LlmError::InvalidRequest(text)) = of(400, body, 9_000) else {
        panic!("not blamed on the request")
    };
    assert!(text.contains("`max_tokens` of 9000") && text.contains("4096"), "{text}");
}

#[test]
fn talk_about_contexts_in_other_statuses_is_only_talk() {
    let busy = of(503, "the context length of the queue is full", 0);
    assert!(matches!(busy, Refusal::Again { .. }), "{busy:?}");
}

#[test]
fn a_pause_is_asked_for_in_seconds_or_milliseconds_and_a_date_is_not_followed() {
    let asked = |name: &str, value: &str| {
        let headers = vec![(name.to_owned(), value.to_owned())];
        retry_after(&HttpResponse { status: 429, headers, body: vec![] })
    };
    assert_eq!(asked("retry-after", " 7 "), Some(Duration::from_secs(7)));
    assert_eq!(asked("retry-after-ms", "250"), Some(Duration::from_millis(250)));
    assert_eq!(asked("retry-after", "Wed, 21 Oct 2026 07:28:00 GMT"), None);
    assert_eq!(asked("retry-after", "-1"), None);
    assert_eq!(asked("x", "1"), None);
}

#[test]
fn long_errors_are_cut() {
    let Refusal::Final(LlmError::InvalidRequest(text)) = of(400, &"é".repeat(5_000), 0) else { panic!("no refusal") };
    assert!(text.chars().count() < ERROR_CHARACTERS_MAX + 100, "{}", text.len());
}
