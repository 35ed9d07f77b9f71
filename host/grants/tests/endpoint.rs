//! Model endpoints against a server that plays them over loopback.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "../../../tests/model_server.rs"]
mod model_server;

use std::sync::Arc;
use std::time::{Duration, Instant};

use fulgurite_core::grant::HttpGrant;
use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
use fulgurite_core::llm::{
    ChatRequest, Completion, Constraint, FinishReason, LlmBackend, LlmError, LlmSession, Message, NotTrainable, Role,
    Sampling, SessionInfo, ToolCall, ToolSpec,
};
use fulgurite_core::seed::Seed;
use fulgurite_grants::{AdapterPush, EndpointSettings, OpenAiEndpoint, ServerKind};
use model_server::{ModelServer, Reply, llama_cpp_answer, models, openai_answer, sglang_answer, vllm_answer};
use serde_json::json;

const KEY: &str = "s3cr3t-key-value";

fn settings(server: &ModelServer) -> EndpointSettings {
    let grant: HttpGrant = serde_json::from_value(json!({
        "origin": format!("http://127.0.0.1:{}", server.port),
        "headers": {"authorization": {"env": "MODEL_KEY", "prefix": "Bearer "}},
        "allow_private": ["127.0.0.1"],
    }))
    .unwrap();
    EndpointSettings {
        section: "policy.endpoint".to_owned(),
        name: "policy".to_owned(),
        grant,
        path: "/v1/".to_owned(),
        model: "m".to_owned(),
        server: ServerKind::Vllm,
        timeout_ms: 20_000,
        retries_max: 2,
        backoff_ms: 1,
        requests_per_minute_max: None,
        concurrency_max: 8,
        context_tokens_max: None,
        answer_bytes_max: 1 << 20,
    }
}

fn endpoint(settings: EndpointSettings) -> OpenAiEndpoint {
    OpenAiEndpoint::new(settings, &|_| Some(KEY.to_owned())).unwrap()
}

fn open(endpoint: &OpenAiEndpoint, sampling: Sampling) -> Box<dyn LlmSession> {
    endpoint.open(SessionInfo {
        attempt: AttemptKey { rollout: RolloutId::new("r").unwrap(), attempt: AttemptNumber::FIRST },
        item_id: "item".to_owned(),
        seed: Seed::new(1),
        sampling,
        history: vec![],
    })
}

fn request(sampling: Sampling) -> Arc<ChatRequest> {
    Arc::new(ChatRequest {
        messages: vec![Message::text(Role::System, "be brief"), Message::text(Role::User, "this\r\nx-evil: 1")],
        tools: vec![],
        sampling,
        agent_role: "agent".to_owned(),
        endpoint: None,
    })
}

async fn ask(settings: EndpointSettings) -> Result<Completion, LlmError> {
    let session = open(&endpoint(settings), Sampling::default());
    session.chat(3, request(Sampling::default())).await.map(Arc::unwrap_or_clone)
}

#[tokio::test]
async fn every_kind_of_server_gives_what_it_can() {
    for (kind, answer, has_tokens) in [
        (ServerKind::Vllm, vllm_answer("yes"), true),
        (ServerKind::Sglang, sglang_answer("yes"), true),
        (ServerKind::LlamaCpp, llama_cpp_answer("yes"), false),
        (ServerKind::Openai, openai_answer("yes"), false),
    ] {
        let server = ModelServer::replies(vec![Reply::ok(&answer)]);
        let completion = ask(EndpointSettings { server: kind, ..settings(&server) }).await.unwrap();
        assert_eq!((completion.text.as_str(), completion.finish_reason), ("yes", FinishReason::Stop), "{kind:?}");
        assert_eq!(completion.response_id.0, "r/1/3");
        if has_tokens {
            let tokens = completion.tokens.unwrap();
            assert_eq!((tokens.prompt_ids, tokens.completion_ids), (vec![1, 9, 4], vec![17, 2]), "{kind:?}");
            assert_eq!(tokens.log_probs, [-0.25, -0.5]);
            assert_eq!(completion.not_trainable, None);
        } else {
            assert_eq!(
                (completion.tokens, completion.not_trainable),
                (None, Some(NotTrainable::NoTokenIds)),
                "{kind:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_request_says_everything_that_its_server_understands() {
    let server = ModelServer::replies(vec![Reply::ok(&vllm_answer("yes"))]);
    let schema = r#"{"type":"object"}"#.to_owned();
    let sampling = Sampling {
        temperature: 0.7,
        max_tokens: 9,
        stop: vec!["END".to_owned()],
        seed: Some(5),
        constraint: Some(Constraint::JsonSchema(schema.clone())),
        ..Sampling::default()
    };
    let mut full = Arc::unwrap_or_clone(request(sampling));
    let call = ToolCall { id: "call-0-0".to_owned(), name: "look".to_owned(), arguments: "{}".to_owned() };
    full.messages.push(Message { tool_calls: vec![call], ..Message::text(Role::Assistant, "") });
    full.messages.push(Message { tool_call_id: Some("call-0-0".to_owned()), ..Message::text(Role::Tool, "seen") });
    full.tools = vec![ToolSpec { name: "look".to_owned(), description: "looks".to_owned(), parameters: schema }];
    let endpoint = endpoint(settings(&server));
    let session = open(&endpoint, Sampling { top_k: 4, ..Sampling::default() });
    let completion = session.chat(0, Arc::new(full)).await.unwrap();
    assert_eq!(completion.not_trainable, Some(NotTrainable::TruncatedSampling));

    let heard = server.heard();
    let body = &heard[0].body;
    for (field, value) in [
        ("model", json!("m")),
        ("n", json!(1)),
        ("temperature", json!(0.7)),
        ("top_p", json!(1.0)),
        ("top_k", json!(4)),
        ("min_p", json!(0.0)),
        ("repetition_penalty", json!(1.0)),
        ("max_tokens", json!(9)),
        ("seed", json!(5)),
        ("stop", json!(["END"])),
        ("logprobs", json!(true)),
        ("return_token_ids", json!(true)),
    ] {
        assert_eq!(body[field], value, "{field}");
    }
    assert_eq!(body["response_format"]["json_schema"]["schema"], json!({"type": "object"}));
    assert_eq!(body["tools"][0]["function"]["parameters"], json!({"type": "object"}));
    assert_eq!(body["messages"][2]["tool_calls"][0]["function"]["name"], "look");
    assert_eq!(body["messages"][3], json!({"role": "tool", "content": "seen", "tool_call_id": "call-0-0"}));
    let head = &heard[0].head;
    assert!(head.starts_with("POST /v1/chat/completions HTTP/1.1"), "{head}");
    assert!(head.contains(&format!("authorization: Bearer {KEY}")) && !head.contains("x-evil"), "{head}");

    // One that knows OpenAI's fields only is told no others.
    let plain = ModelServer::replies(vec![Reply::ok(&openai_answer("yes"))]);
    ask(EndpointSettings { server: ServerKind::Openai, ..settings(&plain) }).await.unwrap();
    let body = plain.heard()[0].body.clone();
    for field in ["top_k", "min_p", "logprobs", "return_token_ids", "repetition_penalty"] {
        assert!(body.get(field).is_none(), "{field} in {body}");
    }
}

#[tokio::test]
async fn an_evaluation_overrides_the_temperature_of_the_policy_and_not_of_a_judge() {
    for (name, expected) in [("policy", 0.0), ("judge", 1.0)] {
        let server = ModelServer::replies(vec![Reply::ok(&openai_answer("yes"))]);
        let endpoint = endpoint(EndpointSettings { name: name.to_owned(), ..settings(&server) });
        let session = open(&endpoint, Sampling { temperature: 0.0, ..Sampling::default() });
        let completion = session.chat(0, request(Sampling::default())).await.unwrap();
        assert_eq!(server.heard()[0].body["temperature"], json!(expected), "{name}");
        if name == "judge" {
            assert_eq!(completion.not_trainable, Some(NotTrainable::OtherEndpoint));
        }
    }
}

#[tokio::test]
async fn the_same_call_is_sent_with_the_same_seed_whatever_else_goes_on() {
    let server = ModelServer::replies(vec![Reply::ok(&vllm_answer("yes"))]);
    for _ in 0..2 {
        ask(settings(&server)).await.unwrap();
    }
    let session = open(&endpoint(settings(&server)), Sampling::default());
    session.chat(4, request(Sampling::default())).await.unwrap();
    let seeds: Vec<_> = server.heard().iter().map(|heard| heard.body["seed"].as_u64().unwrap()).collect();
    assert!(seeds[0] == seeds[1] && seeds[1] != seeds[2], "{seeds:?}");
    assert!(seeds.iter().all(|seed| *seed < 1 << 31), "{seeds:?}");
}

#[tokio::test]
async fn what_recovers_is_asked_again_and_the_server_says_when() {
    let busy = Reply::Answer(429, "retry-after: 1\r\n", "slow down".to_owned());
    let server =
        ModelServer::replies(vec![busy, Reply::Answer(500, "", "oops".to_owned()), Reply::ok(&vllm_answer("yes"))]);
    let began = Instant::now();
    assert_eq!(ask(settings(&server)).await.unwrap().text, "yes");
    assert!(began.elapsed() >= Duration::from_secs(1), "it asked to be left alone for a second");
    let heard = server.heard();
    assert_eq!(heard.len(), 3);
    assert_eq!(heard[0].body, heard[2].body, "the same request, its seed included");
}

#[tokio::test]
async fn what_does_not_recover_is_the_fault_of_the_infrastructure() {
    let refused = {
        let server = ModelServer::replies(vec![Reply::Hang]);
        // A port where nobody listens any more.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        EndpointSettings {
            grant: serde_json::from_value(json!({
                "origin": format!("http://{}", listener.local_addr().unwrap()), "allow_private": ["127.0.0.1"],
            }))
            .unwrap(),
            ..settings(&server)
        }
    };
    let error = ask(refused).await.unwrap_err();
    assert!(matches!(&error, LlmError::Unavailable(text) if text.contains("tried 3 times")), "{error}");

    for (reply, timeout_ms, tries, expected) in [
        (Reply::Answer(503, "", "loading".to_owned()), 20_000, 3, "status 503: loading"),
        (Reply::Hang, 50, 3, "no answer within 50 ms"),
        (Reply::Cut, 20_000, 3, "tried 3 times"),
        (Reply::Endless, 20_000, 1, "`answer_bytes_max` of 1048576"),
        (Reply::Answer(200, "", "hello".to_owned()), 20_000, 1, "no chat completion"),
        (Reply::Answer(200, "", "{\"choices\":[]}".to_owned()), 20_000, 1, "no choice"),
        (Reply::Answer(401, "", "who are you".to_owned()), 20_000, 1, "`MODEL_KEY`"),
        (Reply::Answer(404, "", "{\"error\":{\"message\":\"no model m\"}}".to_owned()), 20_000, 1, "no model m"),
        (Reply::Answer(429, "retry-after: 3600\r\n", String::new()), 20_000, 1, "3600 s"),
        (Reply::Answer(429, "", "{\"error\":{\"code\":\"insufficient_quota\"}}".to_owned()), 20_000, 1, "quota"),
    ] {
        let server = ModelServer::replies(vec![reply.clone()]);
        let error = ask(EndpointSettings { timeout_ms, ..settings(&server) }).await.unwrap_err();
        let LlmError::Unavailable(text) = &error else { panic!("{reply:?}: {error:?}") };
        assert!(text.contains(expected) && text.contains("`policy.endpoint`"), "{reply:?}: {text}");
        assert!(!text.contains(KEY), "{text}");
        assert_eq!(server.heard().len(), tries, "{reply:?}");
    }
}

#[tokio::test]
async fn a_history_that_is_too_long_is_blamed_on_the_policy_and_a_wrong_request_on_nobody_else() {
    let body = r#"{"error":{"message":"This model's maximum context length is 4096 tokens. However, your request has 5000 input tokens.","type":"BadRequestError","code":400}}"#;
    let server = ModelServer::replies(vec![Reply::Answer(400, "", body.to_owned())]);
    let error = ask(settings(&server)).await.unwrap_err();
    assert_eq!(error, LlmError::ContextLengthExceeded { prompt_tokens: 5000, context_tokens_max: 4096 });

    let server = ModelServer::replies(vec![Reply::Answer(400, "", "{\"detail\":\"bad tools\"}".to_owned())]);
    let error = ask(settings(&server)).await.unwrap_err();
    assert!(matches!(&error, LlmError::InvalidRequest(text) if text.contains("bad tools")), "{error}");

    // Nothing is sent that the server could not understand.
    let server = ModelServer::replies(vec![Reply::ok(&openai_answer("yes"))]);
    let endpoint = endpoint(EndpointSettings { server: ServerKind::Openai, ..settings(&server) });
    let regex = Sampling { constraint: Some(Constraint::Regex("a+".to_owned())), ..Sampling::default() };
    let error = open(&endpoint, Sampling::default()).chat(0, request(regex)).await.unwrap_err();
    assert!(matches!(error, LlmError::Unsupported(_)), "{error}");
    assert!(server.heard().is_empty());
}

#[tokio::test]
async fn a_call_that_is_dropped_closes_its_connection() {
    let server = ModelServer::replies(vec![Reply::Hang]);
    let session = open(&endpoint(settings(&server)), Sampling::default());
    let call = tokio::spawn(session.chat(0, request(Sampling::default())));
    while server.heard().is_empty() {
        tokio::task::yield_now().await;
    }
    call.abort();
    let closed = tokio::task::spawn_blocking(move || server.closed.recv_timeout(Duration::from_secs(20)));
    closed.await.unwrap().expect("the server sees the end of the connection");
}

#[tokio::test]
async fn no_more_requests_are_under_way_than_allowed() {
    let live = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let most = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (counted, highest) = (Arc::clone(&live), Arc::clone(&most));
    let server = ModelServer::start(move |_, _| {
        use std::sync::atomic::Ordering::SeqCst;
        let now = counted.fetch_add(1, SeqCst) + 1;
        highest.fetch_max(now, SeqCst);
        // Long enough for others to come meanwhile, if they were allowed to.
        for _ in 0..200 {
            std::thread::yield_now();
        }
        counted.fetch_sub(1, SeqCst);
        Reply::ok(&vllm_answer("yes"))
    });
    let endpoint = endpoint(EndpointSettings { concurrency_max: 2, ..settings(&server) });
    let sessions: Vec<_> = (0..12).map(|_| open(&endpoint, Sampling::default())).collect();
    let calls = sessions.iter().map(|session| session.chat(0, request(Sampling::default())));
    for completion in futures::future::join_all(calls).await {
        completion.unwrap();
    }
    assert!(most.load(std::sync::atomic::Ordering::SeqCst) <= 2);
    assert_eq!(server.heard().len(), 12);
}

#[tokio::test]
async fn a_check_finds_the_model_or_tells_what_is_wrong() {
    let server = ModelServer::replies(vec![Reply::ok(&models("vllm"))]);
    let facts = endpoint(settings(&server)).check().await.unwrap();
    assert_eq!((facts.models.as_slice(), facts.context_tokens_max), (&["m".to_owned()][..], Some(4096)));
    assert_eq!(facts.seems, None);
    assert!(server.heard()[0].asks_for("/v1/models"));
    let facts = endpoint(EndpointSettings { server: ServerKind::Openai, ..settings(&server) }).check().await.unwrap();
    assert_eq!(facts.seems, Some(ServerKind::Vllm));

    let check = async |server: &ModelServer, model: &str| {
        let settings = EndpointSettings { model: model.to_owned(), ..settings(server) };
        endpoint(settings).check().await.map_err(|error| error.to_string())
    };
    let error = check(&server, "other").await.unwrap_err();
    assert!(error.contains("`policy.endpoint.model`") && error.contains("`other`") && error.contains("`m`"), "{error}");
    let locked = ModelServer::replies(vec![Reply::Answer(401, "", "no".to_owned())]);
    let error = check(&locked, "m").await.unwrap_err();
    assert!(error.contains("`MODEL_KEY`") && error.contains("/v1/models"), "{error}");
    // One that has no such list is taken as it is.
    let silent = ModelServer::replies(vec![Reply::Answer(404, "", String::new())]);
    assert_eq!(check(&silent, "m").await.unwrap().models.len(), 0);
    let nonsense = ModelServer::replies(vec![Reply::Answer(200, "", "<html>".to_owned())]);
    assert!(check(&nonsense, "m").await.unwrap_err().contains("no list of models"));
}

#[tokio::test]
async fn a_new_adapter_is_loaded_before_the_old_one_goes_and_a_lost_answer_is_no_failure() {
    let push = AdapterPush {
        name: "grpo-12".to_owned(),
        path: "/adapters/grpo-12".into(),
        replaces: Some("grpo-11".to_owned()),
    };
    let said = |text: &str| Reply::Answer(400, "", json!({"error": {"message": text, "code": 400}}).to_string());
    let ok = || Reply::Answer(200, "", "Success".to_owned());
    for replies in [
        vec![ok(), ok()],
        vec![Reply::Cut, said("The lora adapter 'grpo-12' has already been loaded."), ok()],
        vec![ok(), Reply::Answer(404, "", "The lora adapter 'grpo-11' cannot be found.".to_owned())],
    ] {
        let requests = replies.len();
        let server = ModelServer::replies(replies);
        endpoint(settings(&server)).push_adapter(&push).await.unwrap();
        let heard = server.heard();
        assert_eq!(heard.len(), requests);
        assert!(heard[0].asks_for("/v1/load_lora_adapter") && heard[requests - 1].asks_for("/v1/unload_lora_adapter"));
        assert_eq!(heard[0].body, json!({"lora_name": "grpo-12", "lora_path": "/adapters/grpo-12"}));
        assert_eq!(heard[requests - 1].body, json!({"lora_name": "grpo-11"}));
    }
    let server = ModelServer::replies(vec![said("rank 64 is above --max-lora-rank 16")]);
    let error = endpoint(settings(&server)).push_adapter(&push).await.unwrap_err();
    assert!(error.to_string().contains("rank 64"), "{error}");
    assert_eq!(server.heard().len(), 1, "the old adapter stays");
}
