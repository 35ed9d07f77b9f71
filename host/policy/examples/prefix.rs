//! Measures what a group of 16 with one prompt of 512 tokens costs beside the prefill of one such prompt.
//!
//! `cargo run --release -p fulgurite-policy --example prefix`

use std::sync::Arc;
use std::time::Instant;

use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
use fulgurite_core::llm::{ChatRequest, LlmSession, Message, Role, Sampling, SessionInfo};
use fulgurite_core::seed::Seed;
use fulgurite_policy::{PolicyConfig, PolicyEngine, PolicyTokenizer, TokenizerConfig};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const PROMPT_TOKENS: usize = 512;
const MEMBERS: u64 = 16;
const ROUNDS: u64 = 15;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let corpus = (0..400).map(|i| format!("Find a room for {} people at {}:00. R{:02}.", i % 20, i % 24, i % 12));
    let tokenizer = PolicyTokenizer::train(corpus, &TokenizerConfig::default())?;
    let base = PolicyConfig { context_tokens_max: Some(1_024), ..PolicyConfig::default() };
    let wide = PolicyConfig { d_model: Some(384), layers: Some(6), heads: Some(6), d_ff: Some(1_024), ..base.clone() };
    for (name, config) in [("d128 L4", base), ("d384 L6", wide)] {
        for threads in [1, 2] {
            let config = PolicyConfig { threads, ..config.clone() };
            let engine = PolicyEngine::create(&config, tokenizer.clone(), Seed::new(0))?;
            let (mut one, mut group) = (vec![], vec![]);
            for round in 0..ROUNDS {
                // Every prompt is new to the engine; the two measurements take turns.
                measure(&engine, 2 * round, 1, &mut one).await?;
                measure(&engine, 2 * round + 1, MEMBERS, &mut group).await?;
            }
            let (one, group) = (median(one), median(group));
            println!(
                "{name}, {threads} threads, {PROMPT_TOKENS} tokens of prompt, 1 new token each, median of {ROUNDS}: one \
                 {:.1} ms, {MEMBERS} members {:.1} ms: {:.2} x",
                one * 1e3,
                group * 1e3,
                group / one,
            );
        }
    }
    Ok(())
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Adds the wall seconds of one group with a new prompt.
async fn measure(
    engine: &PolicyEngine,
    number: u64,
    members: u64,
    into: &mut Vec<f64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let backend = engine.backend();
    let message = prompt(engine, number)?;
    let sampling = Sampling { max_tokens: 1, ..Sampling::default() };
    let mut sessions: Vec<Box<dyn LlmSession>> = Vec::new();
    for index in 0..members {
        let attempt =
            AttemptKey { rollout: RolloutId::derived("bench", number, index)?, attempt: AttemptNumber::FIRST };
        let (seed, sampling) = (Seed::new(number).child_index(index), sampling.clone());
        sessions.push(backend.open(SessionInfo { attempt, item_id: "item".into(), seed, sampling, history: vec![] }));
    }
    let request = Arc::new(ChatRequest {
        messages: vec![message],
        tools: vec![],
        sampling: Sampling::default(),
        agent_role: "agent".to_owned(),
        endpoint: None,
    });
    let start = Instant::now();
    futures::future::try_join_all(sessions.iter().map(|session| session.chat(0, request.clone()))).await?;
    into.push(start.elapsed().as_secs_f64());
    Ok(())
}

/// A message that makes a prompt of the wanted length, different from the first token on.
fn prompt(engine: &PolicyEngine, number: u64) -> Result<Message, Box<dyn std::error::Error>> {
    let mut text = format!("{number}");
    let tokens = |text: &str| -> Result<usize, Box<dyn std::error::Error>> {
        // With what the template adds before the answer.
        Ok(engine.encode_demonstration(&[Message::text(Role::User, text)], &[])?.ids.len() + 1)
    };
    while tokens(&text)? < PROMPT_TOKENS {
        text.push('#');
    }
    Ok(Message::text(Role::User, text))
}
