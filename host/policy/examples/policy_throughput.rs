//! Measures decode and training throughput of the tiny policy through the public interface.
//!
//! `cargo run --release -p fulgurite-policy --example policy_throughput [decode|train]`

use std::time::Instant;

use fulgurite_core::id::{AttemptKey, AttemptNumber, PolicyVersion, RolloutId};
use fulgurite_core::llm::{ChatRequest, KeptTokens, LlmSession, Message, Role, Sampling, SessionInfo};
use fulgurite_core::seed::Seed;
use fulgurite_core::training::{Aggregation, LossSpec, OptimiserStep, PolicyLoss, Stream, TrainingRow};
use fulgurite_policy::{PolicyConfig, PolicyEngine, PolicyTokenizer, TokenizerConfig};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let corpus = (0..400).map(|i| {
        format!(
            "Find a room for {} people at {}:00 with a whiteboard. R{:02} seats {}.",
            i % 20,
            i % 24,
            i % 12,
            i % 30
        )
    });
    let tokenizer_config = TokenizerConfig { vocab_size: 512, atoms_pattern: Some(r"R\d{2}|\d{1,2}".to_owned()) };
    let tokenizer = PolicyTokenizer::train(corpus, &tokenizer_config)?;
    let config = PolicyConfig::default();
    let engine = PolicyEngine::create(&config, tokenizer, Seed::new(0))?;
    println!("{} weights, vocabulary {}", engine.parameter_count(), engine.shape().vocabulary);

    let only = std::env::args().nth(1).unwrap_or_default();
    for batch in [1_u64, 32, 128].into_iter().filter(|_| only != "train") {
        let rounds = (256 / batch).clamp(2, 24);
        let before = engine.statistics();
        let start = Instant::now();
        for round in 0..rounds {
            decode(&engine, batch, round).await?;
        }
        let seconds = start.elapsed().as_secs_f64();
        let after = engine.statistics();
        let (new, prompt) =
            (after.completion_tokens - before.completion_tokens, after.prompt_tokens - before.prompt_tokens);
        println!(
            "decode batch {batch:>3}: {:>7.0} new tokens/s ({new} new, {prompt} of prompts, {} reused, {} passes, {seconds:.2} s)",
            new as f64 / seconds,
            after.reused_tokens - before.reused_tokens,
            after.decode_steps - before.decode_steps,
        );
    }

    for (name, lengths) in
        [("128 rows of 75", vec![75; 128]), ("128 ragged rows", (0..128).map(|i| 50 + i % 51).collect())]
    {
        if only == "decode" {
            continue;
        }
        let rows = training_rows(&engine, &lengths);
        let tokens: usize = lengths.iter().sum();
        let loss = LossSpec {
            policy_loss: PolicyLoss::Ppo { clip_low: 0.2, clip_high: 0.28, dual_clip: None },
            aggregation: Aggregation::TokenMean,
            ..LossSpec::default()
        };
        for round in 0..4 {
            let start = Instant::now();
            engine.forward_backward(rows.clone(), loss.clone()).await?;
            let backward = start.elapsed().as_secs_f64();
            let step = OptimiserStep { learning_rate: 3e-4, weight_decay: 0.0, gradient_norm_max: Some(1.0) };
            engine.optimiser_step(step).await?;
            let total = start.elapsed().as_secs_f64();
            if round > 0 {
                println!(
                    "train {name}: forward+backward {backward:.3} s, with step {total:.3} s, {:>6.0} tokens/s",
                    tokens as f64 / total
                );
            }
        }
    }
    Ok(())
}

/// One round of `batch` sessions, each with one call of 46 new tokens.
async fn decode(engine: &PolicyEngine, batch: u64, round: u64) -> Result<(), Box<dyn std::error::Error>> {
    let backend = engine.backend();
    let sampling = Sampling { max_tokens: 46, ..Sampling::default() };
    let mut sessions: Vec<Box<dyn LlmSession>> = Vec::new();
    for index in 0..batch {
        let rollout = RolloutId::derived("bench", round, index)?;
        let attempt = AttemptKey { rollout, attempt: AttemptNumber::FIRST };
        let seed = Seed::new(round).child_index(index);
        sessions.push(backend.open(SessionInfo {
            attempt,
            item_id: "item".into(),
            seed,
            sampling: sampling.clone(),
            history: vec![],
        }));
    }
    // Ragged prompts, each different from the others.
    let calls = (0_u64..).zip(&sessions).map(|(index, session)| {
        let people = index * 7 + round;
        let text = format!(
            "Find a room for {people} people {} .",
            "with a whiteboard ".repeat(usize::try_from(index % 5).unwrap_or(0))
        );
        let request = ChatRequest {
            messages: vec![Message::text(Role::User, text)],
            tools: vec![],
            sampling: Sampling::default(),
            agent_role: "agent".to_owned(),
            endpoint: None,
        };
        session.chat(0, std::sync::Arc::new(request))
    });
    futures::future::try_join_all(calls).await?;
    Ok(())
}

fn training_rows(engine: &PolicyEngine, lengths: &[usize]) -> Vec<TrainingRow> {
    let vocabulary = engine.shape().vocabulary;
    (0_u32..)
        .zip(lengths)
        .map(|(sequence, length)| {
            let ids: Vec<u32> = (0..*length)
                .map(|at| u32::try_from((at * 31 + sequence as usize * 17) % vocabulary).unwrap_or(0))
                .collect();
            let mask: Vec<bool> = (0..*length).map(|at| at >= 30).collect();
            let value = |on: f32| mask.iter().map(|masked| if *masked { on } else { 0.0 }).collect::<Vec<f32>>();
            TrainingRow {
                sequence,
                weights: value(if sequence % 2 == 0 { 1.0 } else { -1.0 }),
                behaviour_log_probs: value(-6.2),
                old_log_probs: vec![],
                calls: vec![],
                group: None,
                ids,
                mask,
                stream: Stream::Rl,
                temperature: 1.0,
                policy_version: PolicyVersion(0),
                kept: KeptTokens::default(),
            }
        })
        .collect()
}
