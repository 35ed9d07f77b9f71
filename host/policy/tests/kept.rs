//! Sampling that drops tokens: what was kept is recorded, and the trainer goes by it.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::sync::Arc;

use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
use fulgurite_core::llm::{
    ChatRequest, Completion, Constraint, KeptTokens, LlmSession, Message, NotTrainable, Role, Sampling, SessionInfo,
    TokenBias, TokenData,
};
use fulgurite_core::seed::Seed;
use fulgurite_core::training::{LossSpec, OptimiserStep, Stream, TrainingRow};
use fulgurite_policy::{PolicyConfig, PolicyEngine, PolicyTokenizer, TokenizerConfig};
use futures::future::try_join_all;

const CALLS: u64 = 24;

fn engine(kept_tokens_max: usize) -> PolicyEngine {
    let corpus =
        (0..60).map(|i| format!("Find a room for {} people at {}:00. R{:02} is free.", i % 20, i % 24, i % 12));
    let config = TokenizerConfig { vocab_size: 400, atoms_pattern: Some(r"R\d{2}|\d{1,2}".into()) };
    let tokenizer = PolicyTokenizer::train(corpus, &config).unwrap();
    let config = PolicyConfig { initial_std: 0.08, kept_tokens_max, ..PolicyConfig::default() };
    PolicyEngine::create(&config, tokenizer, Seed::new(5)).unwrap()
}

async fn sample(engine: &PolicyEngine, sampling: &Sampling) -> Vec<Arc<Completion>> {
    let backend = engine.backend();
    let sessions: Vec<Box<dyn LlmSession>> = (0..CALLS)
        .map(|index| {
            let rollout = RolloutId::derived("test", 0, index).unwrap();
            let attempt = AttemptKey { rollout, attempt: AttemptNumber::FIRST };
            let (seed, sampling) = (Seed::new(7).child_index(index), Sampling::default());
            backend.open(SessionInfo { attempt, item_id: "item".into(), seed, sampling, history: vec![] })
        })
        .collect();
    let calls = (0..CALLS).zip(&sessions).map(|(index, session)| {
        let messages = vec![Message::text(Role::User, format!("Find a room for {index} people"))];
        let sampling = Sampling { max_tokens: 30, ..sampling.clone() };
        let request = ChatRequest { messages, tools: vec![], sampling, agent_role: "agent".into(), endpoint: None };
        session.chat(0, Arc::new(request))
    });
    try_join_all(calls).await.unwrap()
}

fn tokens(completion: &Completion) -> &TokenData {
    completion.tokens.as_ref().unwrap()
}

fn row(sequence: u32, data: &TokenData, temperature: f32) -> TrainingRow {
    let prompt = data.prompt_ids.len();
    let ids = [data.prompt_ids.as_slice(), &data.completion_ids].concat();
    let mut kept = KeptTokens::default();
    if !data.kept.is_empty() {
        kept.keep_all_up_to(prompt);
        for place in 0..data.kept.len() {
            kept.push(data.kept.at(place).unwrap_or_default());
        }
    }
    TrainingRow {
        sequence,
        mask: (0..ids.len()).map(|at| at >= prompt).collect(),
        weights: vec![1.0; ids.len()],
        behaviour_log_probs: [vec![0.0; prompt].as_slice(), data.behaviour_log_probs()].concat(),
        old_log_probs: vec![],
        calls: vec![],
        group: None,
        stream: Stream::Rl,
        temperature,
        policy_version: data.policy_version,
        kept,
        ids,
    }
}

fn cases() -> Vec<Sampling> {
    let base = Sampling::default;
    let regex = || Some(Constraint::Regex("(R[0-9]{2} is free|no room for [0-9]+ people)".to_owned()));
    let schema = r#"{"type":"object","properties":{"room":{"enum":["R01","R02"]},"people":{"type":"integer"}},"required":["room","people"],"additionalProperties":false}"#;
    vec![
        Sampling { top_p: 0.9, ..base() },
        Sampling { top_p: 0.9, temperature: 0.7, ..base() },
        Sampling { top_k: 5, min_p: 0.01, ..base() },
        Sampling { constraint: regex(), ..base() },
        Sampling { constraint: Some(Constraint::JsonSchema(schema.to_owned())), top_k: 8, ..base() },
    ]
}

/// To the last bit, and each of the sets matters.
#[tokio::test]
async fn the_trainer_finds_the_log_probs_of_the_draw_over_what_was_kept() {
    let engine = engine(1_000);
    for sampling in cases() {
        let completions = sample(&engine, &sampling).await;
        let rows: Vec<TrainingRow> =
            (0..).zip(&completions).map(|(n, completion)| row(n, tokens(completion), sampling.temperature)).collect();
        let (mut compared, mut cut) = (0, 0);
        for (completion, trained) in completions.iter().zip(engine.forward(rows.clone(), None).await.unwrap()) {
            let data = tokens(completion);
            assert_eq!(completion.not_trainable, None, "{sampling:?}");
            assert_eq!(data.kept.len(), data.completion_ids.len(), "{sampling:?}");
            let trained = &trained.log_probs[data.prompt_ids.len()..];
            for (at, (drawn, trained)) in data.processed_log_probs.iter().zip(trained).enumerate() {
                assert_eq!(drawn.to_bits(), trained.to_bits(), "{sampling:?}: {drawn} and {trained}");
                cut += usize::from(data.kept.at(at).is_some() && *drawn > data.log_probs[at]);
                compared += 1;
            }
        }
        assert!(compared > 100 && cut * 2 > compared, "{cut} of {compared} tokens were drawn from less: {sampling:?}");

        // A step on them: trainer and sampler agree, and the ratio is 1.
        let report = engine.forward_backward(rows, LossSpec::default()).await.unwrap();
        assert!((report.mismatch_max, report.ratio_max) == (0.0, 1.0), "{report:?}");
        let step = OptimiserStep { learning_rate: 0.0, weight_decay: 0.0, gradient_norm_max: None };
        assert!(engine.optimiser_step(step).await.unwrap().gradient_norm > 0.0);
    }
}

#[tokio::test]
async fn without_sets_or_with_too_large_ones_a_call_is_flagged() {
    let flagged = Some(NotTrainable::TruncatedSampling);
    for kept_tokens_max in [0, 2] {
        let engine = engine(kept_tokens_max);
        for completion in sample(&engine, &Sampling { top_p: 0.9, ..Sampling::default() }).await {
            assert_eq!(completion.not_trainable, flagged);
            assert!(tokens(&completion).kept.is_empty());
        }
    }
    // What moves logits is no set.
    let engine = engine(1_000);
    let moves = [
        Sampling { logit_bias: vec![TokenBias { token: 9, bias: 1.0 }], top_p: 0.9, ..Sampling::default() },
        Sampling { repetition_penalty: 1.2, top_p: 0.9, ..Sampling::default() },
        Sampling { temperature: 0.0, ..Sampling::default() },
    ];
    for sampling in moves {
        for completion in sample(&engine, &sampling).await {
            assert_eq!(completion.not_trainable, flagged, "{sampling:?}");
            assert!(tokens(&completion).kept.is_empty());
        }
    }
    for completion in sample(&engine, &Sampling::default()).await {
        assert!(completion.not_trainable.is_none() && tokens(&completion).kept.is_empty());
    }
}
