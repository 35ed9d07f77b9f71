//! What a request may ask of generation, and what it may not depend on.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::sync::Arc;

use fulgurite_core::llm::{
    ChatRequest, Completion, Constraint, FinishReason, LlmError, Message, NotTrainable, Role, Sampling, TokenBias,
};
use fulgurite_core::seed::Seed;
use fulgurite_policy::{PolicyConfig, PolicyEngine};
use futures::future::try_join_all;
use support::{open, tokenizer};

/// Larger initial weights than the default: distributions are then peaked enough to show differences.
fn config() -> PolicyConfig {
    PolicyConfig { initial_std: 0.08, context_tokens_max: Some(512), ..PolicyConfig::default() }
}

fn engine_with(config: &PolicyConfig) -> PolicyEngine {
    PolicyEngine::create(config, tokenizer(), Seed::new(5)).unwrap()
}

fn request(messages: Vec<Message>, sampling: Sampling) -> Arc<ChatRequest> {
    Arc::new(ChatRequest { messages, tools: vec![], sampling, agent_role: "agent".into(), endpoint: None })
}

fn user(text: &str) -> Vec<Message> {
    vec![Message::text(Role::User, text)]
}

fn up_to(max_tokens: u32) -> Sampling {
    Sampling { max_tokens, ..Sampling::default() }
}

/// Prompts that share a system part longer than one forward pass, some of them all but the last words.
fn conversation(index: u64) -> Vec<Message> {
    let system = "Find a room for the people who meet today. ".repeat(12);
    let middle = " at 10:00".repeat(usize::try_from(index % 3).unwrap() * 5);
    vec![
        Message::text(Role::System, system),
        Message::text(Role::User, format!("R{:02} for {} people{middle}", index % 5, index % 7)),
    ]
}

async fn sample(engine: &PolicyEngine, indices: &[u64], sampling: &Sampling) -> Vec<Arc<Completion>> {
    let sessions: Vec<_> = indices.iter().map(|index| (*index, open(engine, *index))).collect();
    let calls =
        sessions.iter().map(|(index, session)| session.chat(0, request(conversation(*index), sampling.clone())));
    try_join_all(calls).await.unwrap()
}

#[tokio::test]
async fn shared_beginnings_eviction_and_parts_of_prompts_change_no_bit() {
    let sampling = up_to(40);
    let all: Vec<u64> = (0..101).collect();
    let roomy = engine_with(&config());
    let among = sample(&roomy, &all, &sampling).await;
    assert!(among.iter().all(|completion| completion.usage.prompt_tokens > 128), "prompts are fed in parts");
    let statistics = roomy.statistics();
    assert_eq!((statistics.evicted_blocks, statistics.calls_put_back), (0, 0));
    assert!(statistics.reused_tokens * 4 > statistics.prompt_tokens * 3, "{statistics:?}");
    // Alone, on an engine that has seen nothing and keeps nothing.
    for index in [0, 41, 100] {
        let alone = engine_with(&PolicyConfig { kv_cache_bytes_max: 0, ..config() });
        let alone = sample(&alone, &[index], &sampling).await.remove(0);
        assert_eq!(alone, among[usize::try_from(index).unwrap()]);
    }
    // Room for some 40 blocks of 128 KiB: calls are put back and beginnings are dropped.
    for threads in [1, 3] {
        let tight = engine_with(&PolicyConfig { threads, kv_cache_bytes_max: 40 << 17, ..config() });
        for _ in 0..2 {
            assert_eq!(sample(&tight, &all, &sampling).await, among, "{threads} threads");
        }
        let statistics = tight.statistics();
        assert!(statistics.evicted_blocks > 0 && statistics.calls_put_back > 0, "{statistics:?}");
        assert!(statistics.recomputed_tokens > 0 && statistics.calls == 202, "{statistics:?}");
        assert!(statistics.kv_cache_bytes <= 40 << 17, "{statistics:?}");
    }
}

#[tokio::test]
async fn a_prompt_is_known_to_later_rounds_until_the_weights_change() {
    let engine = engine_with(&PolicyConfig { threads: 1, ..config() });
    let computed = |engine: &PolicyEngine| engine.statistics().prompt_tokens - engine.statistics().reused_tokens;
    let first = sample(&engine, &[0], &up_to(5)).await.remove(0);
    assert_eq!(computed(&engine), u64::from(first.usage.prompt_tokens));
    let mut before = computed(&engine);
    // The same prompt, and two that have only the system part in common with it.
    for index in [0, 36, 72] {
        sample(&engine, &[index], &up_to(5)).await;
        let new = computed(&engine) - before;
        assert!(if index == 0 { new == 1 } else { (1..20).contains(&new) }, "{index}: {new}");
        before = computed(&engine);
    }
    let dir = tempfile::tempdir().unwrap();
    engine.save(dir.path()).await.unwrap();
    // The same version, published again.
    engine.restore(dir.path()).await.unwrap();
    assert_eq!(sample(&engine, &[0], &up_to(5)).await.remove(0), first);
    assert_eq!(computed(&engine) - before, u64::from(first.usage.prompt_tokens), "nothing is known any more");
}

#[tokio::test]
async fn penalty_bias_and_stop_tokens_do_what_they_say() {
    let engine = engine_with(&config());
    let session = open(&engine, 0);
    let ask = async |sampling: Sampling| session.chat(0, request(user("a room"), sampling)).await;
    let plain = ask(up_to(30)).await.unwrap();
    let ids = plain.tokens.clone().unwrap().completion_ids;
    assert!(ids.len() > 10 && plain.not_trainable.is_none());

    let banned = ids[3];
    let without =
        ask(Sampling { logit_bias: vec![TokenBias { token: banned, bias: -100.0 }], ..up_to(30) }).await.unwrap();
    let tokens = without.tokens.clone().unwrap();
    assert_eq!(tokens.completion_ids[..3], ids[..3]);
    assert!(!tokens.completion_ids.contains(&banned));
    assert_eq!(without.not_trainable, Some(NotTrainable::TruncatedSampling));
    assert_eq!(tokens.processed_log_probs.len(), tokens.completion_ids.len());

    let stopped = ask(Sampling { stop_token_ids: vec![ids[5]], ..up_to(30) }).await.unwrap();
    let tokens = stopped.tokens.clone().unwrap();
    let end = ids.iter().position(|id| *id == ids[5]).unwrap();
    assert_eq!((tokens.completion_ids.as_slice(), stopped.finish_reason), (&ids[..=end], FinishReason::Stop));
    assert_eq!(stopped.text, engine.tokenizer().decode(&ids[..end]), "a stop token is no text");
    assert_eq!(stopped.not_trainable, None);

    let distinct = |completion: &Completion| {
        let ids = completion.tokens.clone().unwrap().completion_ids;
        let set: std::collections::BTreeSet<u32> = ids.iter().copied().collect();
        set.len() as f64 / ids.len() as f64
    };
    let greedy = Sampling { temperature: 0.0, ..up_to(100) };
    let repeats = ask(greedy.clone()).await.unwrap();
    let varied = ask(Sampling { repetition_penalty: 10.0, ..greedy }).await.unwrap();
    assert!(distinct(&varied) > distinct(&repeats), "{} {}", distinct(&varied), distinct(&repeats));
}

#[tokio::test]
async fn a_call_is_flagged_only_when_its_distribution_was_another_one() {
    let engine = engine_with(&config());
    let session = open(&engine, 0);
    let ask = async |sampling: Sampling| session.chat(0, request(user("a room"), sampling)).await.unwrap();
    let plain = ask(up_to(20)).await;
    let same = [
        Sampling { top_k: 400, ..up_to(20) },
        Sampling { top_p: 1.0, min_p: 1e-30, ..up_to(20) },
        Sampling { logit_bias: vec![TokenBias { token: 9, bias: 0.0 }], ..up_to(20) },
        Sampling { stop: vec!["never drawn".into()], stop_token_ids: vec![], ..up_to(20) },
    ];
    for sampling in same {
        assert_eq!(ask(sampling).await, plain);
    }
    let other = [
        Sampling { top_k: u32::try_from(engine.tokenizer().vocabulary()).unwrap() - 1, ..up_to(20) },
        Sampling { top_p: 0.9, ..up_to(20) },
        Sampling { temperature: 0.0, ..up_to(20) },
        Sampling { repetition_penalty: 1.01, ..up_to(20) },
    ];
    for sampling in other {
        assert_eq!(ask(sampling.clone()).await.not_trainable, Some(NotTrainable::TruncatedSampling), "{sampling:?}");
    }
}

#[tokio::test]
async fn what_is_out_of_range_is_refused_by_name() {
    let engine = engine_with(&config());
    let session = open(&engine, 0);
    let refused = async |sampling: Sampling| match session.chat(0, request(user("a"), sampling)).await.unwrap_err() {
        LlmError::InvalidRequest(text) => text,
        other => panic!("{other}"),
    };
    let base = Sampling::default;
    assert_eq!(refused(Sampling { min_p: 2.0, ..base() }).await, "`min_p` is 2: it must be 0 to 1");
    let bias = vec![TokenBias { token: 400, bias: 1.0 }];
    let ids = engine.tokenizer().vocabulary() - 1;
    let want = |field: &str| format!("`{field}` has token 400: the model has ids 0 to {ids}");
    assert_eq!(refused(Sampling { logit_bias: bias, ..base() }).await, want("logit_bias"));
    assert_eq!(refused(Sampling { stop_token_ids: vec![1, 400], ..base() }).await, want("stop_token_ids"));
}

#[tokio::test]
async fn every_completion_under_a_constraint_has_its_shape() {
    let engine = engine_with(&config());
    let schema = r#"{"type": "object", "properties": {"room": {"type": "string", "pattern": "^R[0-9]{2}$"},
        "people": {"type": "integer", "minimum": 1, "maximum": 40}, "tags": {"type": "array", "maxItems": 2,
        "items": {"enum": ["tv", "quiet"]}}}, "required": ["room", "people", "tags"], "additionalProperties": false}"#;
    let sessions: Vec<_> = (0..40).map(|index| open(&engine, index)).collect();
    let ask = async |constraint: Constraint, temperature: f32| {
        let sampling = Sampling { constraint: Some(constraint), temperature, ..Sampling::default() };
        try_join_all(sessions.iter().map(|session| session.chat(0, request(user("a room"), sampling.clone())))).await
    };
    for temperature in [1.0, 0.0] {
        for completion in ask(Constraint::JsonSchema(schema.into()), temperature).await.unwrap() {
            let value: serde_json::Value = serde_json::from_str(&completion.text).unwrap();
            let fields = value.as_object().unwrap();
            let room = fields["room"].as_str().unwrap();
            assert!(room.len() == 3 && room.starts_with('R') && room[1..].parse::<u8>().is_ok(), "{value}");
            assert!((1..=40).contains(&fields["people"].as_i64().unwrap()) && fields.len() == 3, "{value}");
            let tags = fields["tags"].as_array().unwrap();
            assert!(tags.len() <= 2 && tags.iter().all(|tag| tag == "tv" || tag == "quiet"), "{value}");
            assert_eq!(completion.finish_reason, FinishReason::Stop);
            assert_eq!(completion.not_trainable, Some(NotTrainable::TruncatedSampling));
            let tokens = completion.tokens.clone().unwrap();
            assert!(tokens.processed_log_probs.iter().all(|log_prob| log_prob.is_finite() && *log_prob < 1e-6));
        }
    }
    let expression = "(R[0-3][0-9]|none)( at (9|1[0-7]):[0-5]0)?";
    let whole = regex::Regex::new(&format!("^(?:{expression})$")).unwrap();
    let texts = ask(Constraint::Regex(expression.into()), 1.0).await.unwrap();
    assert!(texts.iter().all(|completion| whole.is_match(&completion.text)), "{texts:?}");
    let distinct: std::collections::BTreeSet<_> = texts.iter().map(|completion| completion.text.clone()).collect();
    assert!(distinct.len() > 5, "{distinct:?}");
    // The draws of a constrained call, too, depend on nothing else.
    let alone = open(&engine_with(&config()), 7);
    let sampling = Sampling { constraint: Some(Constraint::Regex(expression.into())), ..Sampling::default() };
    assert_eq!(alone.chat(0, request(user("a room"), sampling)).await.unwrap(), texts[7]);
}
