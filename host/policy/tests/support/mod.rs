//! What several tests of the engine begin with.

#![allow(dead_code, reason = "each test binary uses a part of this")]

use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
use fulgurite_core::llm::{Completion, KeptTokens, LlmSession, Sampling, SessionInfo};
use fulgurite_core::seed::Seed;
use fulgurite_core::training::{Stream, TrainingRow};
use fulgurite_policy::{PolicyEngine, PolicyTokenizer, TokenizerConfig};

/// Knows the words of rooms, and one token for each number.
pub(crate) fn tokenizer() -> PolicyTokenizer {
    let corpus =
        (0..60).map(|i| format!("Find a room for {} people at {}:00. R{:02} is free.", i % 20, i % 24, i % 12));
    let config = TokenizerConfig { vocab_size: 400, atoms_pattern: Some(r"R\d{2}|\d{1,2}".into()) };
    PolicyTokenizer::train(corpus, &config).unwrap()
}

/// A session of a rollout with a seed of its own.
pub(crate) fn open(engine: &PolicyEngine, index: u64) -> Box<dyn LlmSession> {
    let rollout = RolloutId::derived("test", 0, index).unwrap();
    let attempt = AttemptKey { rollout, attempt: AttemptNumber::FIRST };
    let (seed, sampling) = (Seed::new(77).child_index(index), Sampling::default());
    engine.backend().open(SessionInfo { attempt, item_id: "item".into(), seed, sampling, history: vec![] })
}

/// The row that a completion makes.
pub(crate) fn row(sequence: u32, completion: &Completion, weight: f32) -> TrainingRow {
    let tokens = completion.tokens.clone().unwrap();
    let before = tokens.prompt_ids.len();
    let ids = [tokens.prompt_ids, tokens.completion_ids].concat();
    let mask: Vec<bool> = (0..ids.len()).map(|at| at >= before).collect();
    TrainingRow {
        sequence,
        weights: mask.iter().map(|on| if *on { weight } else { 0.0 }).collect(),
        behaviour_log_probs: [vec![0.0; before], tokens.log_probs].concat(),
        old_log_probs: vec![],
        calls: vec![],
        group: None,
        ids,
        mask,
        stream: Stream::Rl,
        temperature: 1.0,
        policy_version: tokens.policy_version,
        kept: KeptTokens::default(),
    }
}
