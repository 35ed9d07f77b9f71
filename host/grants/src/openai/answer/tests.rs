use fulgurite_core::llm::Constraint;
use serde_json::json;

use super::*;

fn asked() -> Asked {
    Asked {
        response_id: ResponseId("r/1/0".to_owned()),
        call_index: 4,
        sampling: Sampling::default(),
        is_policy: true,
        context_tokens_max: Some(10),
    }
}

fn parse(answer: &Value) -> Result<Completion, MalformedAnswer> {
    parse_completion(answer.to_string().as_bytes(), &asked())
}

/// An answer of vLLM's with one field of its choice exchanged.
fn with(field: &str, value: Value) -> Value {
    let mut answer = json!({
        "choices": [{
            "message": {"role": "assistant", "content": "yes"},
            "finish_reason": "stop",
            "token_ids": [5, 6],
            "logprobs": {"content": [{"token": "yes", "logprob": -0.5}, {"token": "", "logprob": 0.0}]},
        }],
        "prompt_token_ids": [1, 2, 3],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    });
    if answer.get(field).is_some() {
        answer[field] = value;
    } else {
        answer["choices"][0][field] = value;
    }
    answer
}

#[test]
fn ids_and_log_probs_count_only_when_they_fit() {
    let whole = parse(&with("finish_reason", json!("stop"))).unwrap();
    assert_eq!(whole.tokens.unwrap().log_probs, [-0.5, 0.0]);
    let log_probs =
        |values: &[f64]| json!({"content": values.iter().map(|value| json!({"logprob": value})).collect::<Vec<_>>()});
    for (field, value) in [
        ("prompt_token_ids", json!(null)),
        ("prompt_token_ids", json!([])),
        ("prompt_token_ids", json!([1, 2])),
        ("prompt_token_ids", json!([1, 2, -3])),
        ("token_ids", json!([5])),
        ("token_ids", json!([5, 4_294_967_296_u64])),
        ("token_ids", json!("5 6")),
        ("logprobs", json!(null)),
        ("logprobs", log_probs(&[-0.5])),
        ("logprobs", log_probs(&[-0.5, 0.5])),
        ("logprobs", log_probs(&[-0.5, -9_999.0])),
        ("logprobs", json!({"content": [{"logprob": null}, {"logprob": null}]})),
        ("usage", json!({"prompt_tokens": 3, "completion_tokens": 3})),
    ] {
        let completion = parse(&with(field, value.clone())).unwrap_or_else(|error| panic!("{field} {value}: {error}"));
        assert_eq!(completion.text, "yes");
        assert_eq!(completion.not_trainable, Some(NotTrainable::NoTokenIds), "{field} {value}");
        assert!(completion.tokens.is_none(), "{field} {value}");
    }
    // Without counts nothing contradicts the ids, and they are counted instead.
    let uncounted = parse(&with("usage", json!(null))).unwrap();
    assert_eq!((uncounted.usage.prompt_tokens, uncounted.usage.completion_tokens), (3, 2));
}

#[test]
fn truncated_draws_keep_their_ids_and_are_flagged() {
    let samplings = [
        Sampling { top_p: 0.9, ..Sampling::default() },
        Sampling { top_k: 3, ..Sampling::default() },
        Sampling { min_p: 0.1, ..Sampling::default() },
        Sampling { temperature: 0.0, ..Sampling::default() },
        Sampling { temperature: 0.5, ..Sampling::default() },
        Sampling { constraint: Some(Constraint::JsonSchema("{}".to_owned())), ..Sampling::default() },
    ];
    let answer = with("finish_reason", json!("stop")).to_string();
    for sampling in samplings {
        let asked = Asked { sampling: sampling.clone(), ..asked() };
        let completion = parse_completion(answer.as_bytes(), &asked).unwrap();
        assert_eq!(completion.not_trainable, Some(NotTrainable::TruncatedSampling), "{sampling:?}");
        assert!(completion.tokens.is_some());
    }
    let judge = parse_completion(answer.as_bytes(), &Asked { is_policy: false, ..asked() }).unwrap();
    assert_eq!((judge.tokens, judge.not_trainable), (None, Some(NotTrainable::OtherEndpoint)));
}

#[test]
fn tool_calls_get_ids_of_the_host_and_broken_ones_stay_text() {
    let call = |arguments: Value| json!({"id": "theirs", "type": "function", "function": {"name": "look", "arguments": arguments}});
    let calls = json!([
        call(json!("{\"at\": 1}")),
        call(json!("")),
        call(json!({"at": 2})),
        call(json!("{\"at\": ")),
        call(json!("7"))
    ]);
    let message = json!({"role": "assistant", "content": null, "tool_calls": calls});
    let completion = parse(&with("message", message)).unwrap();
    let read: Vec<_> = completion.tool_calls.iter().map(|call| (call.id.as_str(), call.arguments.as_str())).collect();
    assert_eq!(read, [("call-4-0", "{\"at\": 1}"), ("call-4-1", "{}"), ("call-4-2", "{\"at\":2}")]);
    assert_eq!(completion.text, "look{\"at\": look7");
    assert_eq!(completion.finish_reason, FinishReason::ToolCalls);
    let many = json!({"tool_calls": vec![call(json!("{}")); TOOL_CALLS_MAX + 1]});
    assert_eq!(parse(&with("message", many)), Err(MalformedAnswer::TooManyToolCalls(TOOL_CALLS_MAX + 1)));
}

#[test]
fn why_it_ended_is_told() {
    let reason = |finish: &str| parse(&with("finish_reason", json!(finish))).map(|completion| completion.finish_reason);
    assert_eq!(reason("length"), Ok(FinishReason::Length));
    assert_eq!(reason("content_filter"), Ok(FinishReason::Stop));
    assert_eq!(reason("abort"), Err(MalformedAnswer::Aborted));
    let mut full = with("finish_reason", json!("length"));
    full["usage"] = json!({"prompt_tokens": 8, "completion_tokens": 2});
    assert_eq!(parse(&full).unwrap().finish_reason, FinishReason::ContextLength);
}

#[test]
fn what_is_no_completion_is_refused() {
    for text in ["", "hello", "[]", "{}", "{\"choices\":{}}", "{\"choices\":[{}]}", "{\"choices\":[{\"message\":7}]}"] {
        let error = parse_completion(text.as_bytes(), &asked()).unwrap_err();
        assert!(matches!(error, MalformedAnswer::NoCompletion(_)), "{text}: {error:?}");
    }
    assert_eq!(parse_completion(b"{\"choices\":[]}", &asked()), Err(MalformedAnswer::NoChoice));
}
