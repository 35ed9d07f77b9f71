//! Records for tests, as functions of a few numbers.

use std::sync::Arc;

use fulgurite_core::dataset::Split;
use fulgurite_core::id::{
    AttemptKey, AttemptNumber, ContentHash, PolicyVersion, ResponseId, RolloutId, SpanId, TraceId,
};
use fulgurite_core::llm::{
    ChatRequest, Completion, Constraint, FinishReason, KeptTokens, LlmError, Message, Role, Sampling, TokenData,
    ToolCall, ToolSpec, Usage,
};
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::record::{ForkPoint, RolloutMode, RolloutSpec};
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_core::span::{AttributeValue, LlmCall, Span, SpanBody, SpanKind, SpanStatus};
use fulgurite_core::tool::ToolError;

pub(crate) fn rollout_id(index: u64) -> RolloutId {
    RolloutId::derived("grpo", index / 8, index % 8).unwrap()
}

pub(crate) fn key(rollout: &RolloutId, attempt: u32) -> AttemptKey {
    AttemptKey { rollout: rollout.clone(), attempt: AttemptNumber(attempt) }
}

pub(crate) fn spec(index: u64) -> Arc<RolloutSpec> {
    Arc::new(RolloutSpec {
        id: rollout_id(index),
        stage: if index.is_multiple_of(3) { "sft" } else { "grpo" }.to_owned(),
        step: index / 8,
        group: index / 4,
        dataset: "rooms".to_owned(),
        split: Split::Train,
        item_id: format!("item-{index}"),
        mode: [RolloutMode::Train, RolloutMode::Val, RolloutMode::Test][usize::try_from(index % 3).unwrap()],
        seed: Seed::new(index),
        sampling: Sampling {
            stop: vec!["\n".to_owned()],
            seed: Some(u64::MAX),
            constraint: Some(Constraint::Regex("a|b".to_owned())),
            ..Sampling::default()
        },
        policy_version: PolicyVersion(index),
        resources_version: 1,
        components: vec![ContentHash::of(b"agent"), ContentHash::of(b"grader")],
        item: ContentHash::of(b"item"),
        execution: ContentHash::of(b"execution"),
        fork_of: None,
    })
}

/// A fork of another rollout's attempt.
pub(crate) fn fork(index: u64, ancestor: &AttemptKey, event: u64) -> Arc<RolloutSpec> {
    let fork_of = ForkPoint {
        rollout: ancestor.rollout.clone(),
        attempt: ancestor.attempt,
        event,
        policy_version: PolicyVersion(3),
    };
    Arc::new(RolloutSpec { fork_of: Some(fork_of), ..(*spec(index)).clone() })
}

pub(crate) fn reward(value: f64) -> Reward {
    Reward {
        dimension: "reward".to_owned(),
        value,
        feedback: Some("because".to_owned()),
        source: RewardSource::Grader,
        component: Some(ContentHash::of(b"grader")),
        call_index: None,
    }
}

pub(crate) fn outcome() -> AttemptOutcome {
    AttemptOutcome::limited(OutcomeKind::CpuLimit, "guest_cpu_ms_max", 2_000)
}

fn message(text: String) -> Message {
    Message {
        tool_calls: vec![ToolCall { id: "1".to_owned(), name: "rooms".to_owned(), arguments: "{}".to_owned() }],
        tool_call_id: Some("1".to_owned()),
        response_id: Some(ResponseId("r".to_owned())),
        name: Some("n".to_owned()),
        ..Message::text(Role::Assistant, text)
    }
}

fn tool_spec() -> ToolSpec {
    ToolSpec { name: "rooms".to_owned(), description: "lists rooms".to_owned(), parameters: "{}".to_owned() }
}

/// One body of every kind; `number` chooses which, `bytes` says how much text is in it.
pub(crate) fn body(number: u64, bytes: usize) -> SpanBody {
    let text = "x".repeat(bytes);
    let request = ChatRequest {
        messages: vec![],
        tools: vec![tool_spec()],
        sampling: Sampling::default(),
        agent_role: "solver".to_owned(),
        endpoint: Some("judge".to_owned()),
    };
    let call = |result| {
        SpanBody::Llm(Box::new(LlmCall {
            call_index: number,
            messages: vec![0, 1],
            new_messages: vec![message(text.clone())],
            tools: Some(request.tools.clone()),
            sampling: request.sampling.clone(),
            agent_role: request.agent_role.clone(),
            endpoint: request.endpoint.clone(),
            result,
        }))
    };
    match number % 16 {
        0 => SpanBody::Annotation,
        1 => call(Ok(std::sync::Arc::new(Completion {
            text: "room 7".to_owned(),
            tool_calls: message(String::new()).tool_calls,
            finish_reason: FinishReason::ToolCalls,
            usage: Usage { prompt_tokens: 3, completion_tokens: 2 },
            response_id: ResponseId("g/1/0".to_owned()),
            tokens: Some(TokenData {
                prompt_ids: vec![1, 300, 70_000],
                completion_ids: vec![4, u32::MAX],
                log_probs: vec![-0.5, f32::NEG_INFINITY],
                processed_log_probs: vec![-0.0, f32::MIN_POSITIVE],
                policy_version: PolicyVersion(9),
                token_versions: vec![],
                kept: KeptTokens::default(),
                model: None,
            }),
            not_trainable: Some(fulgurite_core::llm::NotTrainable::TruncatedSampling),
        }))),
        2 => call(Err(LlmError::ContextLengthExceeded { prompt_tokens: 9, context_tokens_max: 8 })),
        3 => SpanBody::ToolList(Ok(vec![tool_spec()])),
        4 => SpanBody::ToolList(Err(ToolError::Denied("no".to_owned()))),
        5 => SpanBody::Tool { name: "rooms".to_owned(), arguments: "{}".to_owned(), result: Ok(text) },
        6 => SpanBody::Tool {
            name: "rooms".to_owned(),
            arguments: text,
            result: Err(ToolError::Fault { detail: "trap".to_owned(), limit: outcome().limit }),
        },
        7 => SpanBody::Template {
            name: "prompt".to_owned(),
            version: 1,
            variables: Some("{}".to_owned()),
            result: Err(text),
        },
        8 => SpanBody::Reward(reward(f64::MIN_POSITIVE)),
        9 => SpanBody::Grade { grader: "hash".to_owned(), fault: Some(text) },
        10 => SpanBody::Message(message(text)),
        11 => SpanBody::Object { name: "plan".to_owned(), value: text },
        12 => SpanBody::Log { level: "stderr".to_owned(), text },
        13 => SpanBody::Guest,
        14 => SpanBody::HostCall {
            interface: "wasi:random/random".to_owned(),
            function: "get-random-bytes".to_owned(),
            arguments: "[8]".to_owned(),
            result: text,
        },
        _ => SpanBody::Attempt(AttemptOutcome { output: text, ..outcome() }),
    }
}

/// A span whose content follows from its attempt and its sequence.
pub(crate) fn span(key: &AttemptKey, sequence: u64) -> Span {
    let seed = Seed::new(u64::from(key.attempt.0)).child(key.rollout.as_str()).child_index(sequence);
    let mut generator = Generator::new(seed);
    // Mostly small, now and then longer than a block.
    let bytes = if generator.below(24) == 0 { generator.below(20_000) } else { generator.below(300) };
    Span {
        attempt: key.clone(),
        sequence,
        trace_id: TraceId::of_attempt(seed),
        span_id: SpanId::of_sequence(seed, sequence),
        parent: (sequence > 0).then_some(SpanId(7)),
        name: "span".to_owned(),
        kind: SpanKind::Client,
        start_ns: generator.next_u64(),
        end_ns: generator.next_u64(),
        status: SpanStatus::Error("failed".to_owned()),
        guest_attributes: vec![
            ("a".to_owned(), AttributeValue::Number(1.5)),
            ("b".to_owned(), AttributeValue::Integer(-1)),
            ("c".to_owned(), AttributeValue::Boolean(true)),
        ],
        links: vec![SpanId(1), SpanId(u64::MAX)],
        body: body(generator.next_u64(), bytes),
    }
}

pub(crate) fn spans(key: &AttemptKey, from: u64, count: u64) -> Vec<Span> {
    (from..from + count).map(|sequence| span(key, sequence)).collect()
}
