//! What the prebuilt agent does.

use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::reward::RewardSource;
use fulgurite_core::span::SpanBody;
use fulgurite_runner::RolloutResult;
use nasty_agent::{Behaviour, Input};
use serde_json::{Value, json};

use crate::bench::{expect, limits};
use crate::case::{Case, Expected, Model};

pub(crate) fn cases() -> Vec<Case> {
    Behaviour::ALL.iter().flat_map(|behaviour| cases_of(*behaviour)).collect()
}

/// The match has no arm for all: a behaviour without a case does not compile.
#[expect(clippy::too_many_lines, reason = "a table: one entry for each behaviour")]
fn cases_of(behaviour: Behaviour) -> Vec<Case> {
    let limit = Expected::limit;
    let limits = limits();
    let cpu = || limit(OutcomeKind::CpuLimit, "guest_cpu_ms_max", limits.guest_cpu_ms_max);
    let memory = || limit(OutcomeKind::MemoryLimit, "memory_bytes_max", limits.memory_bytes_max);
    let payload = || limit(OutcomeKind::OutputLimit, "payload_bytes_max", limits.payload_bytes_max);
    let spans = || limit(OutcomeKind::OutputLimit, "spans_max", limits.spans_max);
    let trap = |says| Expected::ends(OutcomeKind::Trap, says);
    let name = json!(behaviour).as_str().unwrap().to_owned();
    let input = Input::new(behaviour);
    let one = |expected| vec![Case::agent(&name, &input, expected)];
    let sized = |size, expected| Case::agent(&format!("{name}-{size}"), &Input { size, ..input.clone() }, expected);
    match behaviour {
        Behaviour::Loop | Behaviour::LoopWithHostCalls | Behaviour::SleepForever => one(cpu()),
        Behaviour::MemoryBomb | Behaviour::EmptyMessageFlood | Behaviour::RequestFlood => one(memory()),
        Behaviour::Recursion => {
            one(limit(OutcomeKind::StackLimit, "stack_bytes_max", Limits::default().stack_bytes_max))
        }
        Behaviour::HugeString => vec![
            sized(1 << 20, payload()),
            sized(100_000, limit(OutcomeKind::OutputLimit, "span_bytes_max", limits.span_bytes_max)),
        ],
        Behaviour::ClaimedString | Behaviour::ClaimedList => one(trap("out of bounds")),
        Behaviour::HugeRequest => one(payload()),
        Behaviour::HugeOutcome => vec![sized(1 << 20, payload())],
        // With 50 calls of each kind or more before another limit, of 200,000 bytes each.
        Behaviour::RenderFlood | Behaviour::ToolFlood | Behaviour::PromptFlood => vec![sized(200_000, memory())],
        Behaviour::ReadAnswer => vec![
            Case::agent(&name, &input, Expected::completes().and(|result| output(result, &json!([4, [3, 3], 3])))),
            Case::agent("long-answer", &input, Expected::completes()).with_model(Model::Letters(200_000)),
            Case::agent("huge-answer", &input, payload()).with_model(Model::Letters(1 << 20)),
            Case::agent("many-tokens", &input, payload()).with_model(Model::Tokens(100_000)),
        ],
        Behaviour::InvalidUtf8 => one(trap("utf-8")),
        Behaviour::SpanFlood | Behaviour::CallFlood => one(spans()),
        Behaviour::OpenSpanFlood => one(limit(OutcomeKind::OutputLimit, "span_bytes_max", limits.span_bytes_max)),
        Behaviour::RewardFlood => one(spans().and(|result| {
            let rewards = &result.attempt.rewards;
            expect(rewards.iter().all(|reward| reward.source == RewardSource::Agent), || format!("{rewards:?}"))
        })),
        Behaviour::OutputFlood => one(limit(OutcomeKind::OutputLimit, "output_bytes_max", limits.output_bytes_max)),
        Behaviour::Trap => one(trap("on purpose")),
        Behaviour::TrapInDrop => one(trap("dropped on purpose")),
        Behaviour::Exit => one(trap("exit with code")),
        Behaviour::NanReward => one(trap("`reward` is NaN").and(no_rewards)),
        Behaviour::InfiniteReward => one(trap("`reward` is inf").and(no_rewards)),
        Behaviour::HandleFlood => one(limit(OutcomeKind::MemoryLimit, "handles_max", 16_384)),
        Behaviour::AbandonedSpan => one(trap("inside a span").and(|result| {
            let closed =
                result.spans.iter().any(|span| matches!(span.body, SpanBody::Guest) && span.name == "abandoned");
            expect(closed, || format!("{:?}", result.spans))
        })),
        Behaviour::Reach => one(Expected::completes().and(|result| {
            let found: Value = serde_json::from_str(&result.outcome.output).map_err(|error| error.to_string())?;
            for way in ["read", "up", "list", "here", "write", "connect", "listen", "resolve"] {
                expect(found[way].get("Err").is_some(), || format!("{way}: {found}"))?;
            }
            expect(found["environment"] == json!([]) && found["arguments"] == json!([]), || found.to_string())?;
            expect(!std::path::Path::new("/tmp/fulgurite-escaped").exists(), || "it wrote a file".to_owned())
        })),
        Behaviour::Connect => one(Expected::completes()
            .and(|result| output(result, &json!({"tcp": 0, "listen": 0, "udp": 0, "resolved": 0})))),
        Behaviour::Spawn => one(Expected::completes().and(|result| {
            let found: Value = serde_json::from_str(&result.outcome.output).map_err(|error| error.to_string())?;
            let refused = |way: &str| found[way].get("Err").is_some();
            expect(refused("program") && refused("thread"), || found.to_string())
        })),
        Behaviour::Forge => one(Expected::completes().and(|result| {
            // The root is the host's own.
            let own = result.spans.iter().filter(|span| !matches!(span.body, SpanBody::Attempt(_)));
            let attributes = own.flat_map(|span| &span.guest_attributes);
            let forged: Vec<_> =
                attributes.filter(|(name, _)| name.starts_with("fulgurite.") || name.starts_with("gen_ai.")).collect();
            expect(forged.is_empty(), || format!("{forged:?}"))
        })),
        Behaviour::ForgedResponse => {
            let input = Input { text: "healthy-0/1/0".to_owned(), ..input };
            vec![Case::agent(&name, &input, Expected::completes().and(own_response))]
        }
        Behaviour::ForgedHandle | Behaviour::DroppedTwice => one(trap("unknown handle")),
        Behaviour::AskForever => vec![
            Case::agent(&name, &input, limit(OutcomeKind::TurnLimit, "llm_calls_max", limits.llm_calls_max)),
            Case::agent("token-limit", &input, limit(OutcomeKind::TokenLimit, "completion_tokens_max", 10))
                .with_limits(|limits| limits.completion_tokens_max = 10),
        ],
        Behaviour::Endpoint => {
            let input = Input { text: "judge".to_owned(), ..input };
            let refused = |result: &RolloutResult| {
                expect(result.outcome.output.contains("no endpoint `judge`"), || result.outcome.output.clone())
            };
            vec![Case::agent(&name, &input, Expected::completes().and(refused))]
        }
        Behaviour::CallForever => one(limit(OutcomeKind::TurnLimit, "tool_calls_max", limits.tool_calls_max)),
        Behaviour::Malformed => one(Expected::ends(OutcomeKind::MalformedAnswer, "no room in it")),
        Behaviour::Healthy => vec![
            Case::agent(&name, &input, Expected::completes().and(|result| output(result, &json!("fine")))),
            // The host copies it into the guest before the first instruction of `run`.
            Case::agent("huge-input", &Input { text: "x".repeat(5 << 20), ..input.clone() }, memory()),
        ],
        // Well-behaved; the sandbox's own suites look at what they do.
        Behaviour::Clocks
        | Behaviour::Random
        | Behaviour::Print
        | Behaviour::Converse
        | Behaviour::Parallel
        | Behaviour::Stream
        | Behaviour::InvalidRequest
        | Behaviour::Call
        | Behaviour::ParallelTools
        | Behaviour::Render
        | Behaviour::Emit
        | Behaviour::Work
        | Behaviour::Program => vec![],
    }
}

fn output(result: &RolloutResult, expected: &Value) -> Result<(), String> {
    let found: Value = serde_json::from_str(&result.outcome.output).map_err(|error| error.to_string())?;
    expect(found == *expected, || format!("{:?}", result.outcome))
}

fn no_rewards(result: &RolloutResult) -> Result<(), String> {
    expect(result.attempt.rewards.is_empty(), || format!("{:?}", result.attempt.rewards))
}

/// Whatever the agent says, the answer is its own and so is the answer's id.
fn own_response(result: &RolloutResult) -> Result<(), String> {
    let expected = json!(["fine", format!("{}/1/0", result.spec.id), 5]);
    output(result, &expected)?;
    let calls: Vec<_> = result
        .spans
        .iter()
        .filter_map(|span| match &span.body {
            SpanBody::Llm(call) => call.result.as_ref().ok().map(|completion| completion.response_id.0.clone()),
            _ => None,
        })
        .collect();
    expect(calls == [format!("{}/1/0", result.spec.id)], || format!("{calls:?}"))
}
