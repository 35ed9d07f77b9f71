//! The policy's side: a model with random weights, and the work that is timed.

use std::sync::Arc;
use std::time::Instant;

use anyhow::anyhow;
use fulgurite_core::id::{AttemptKey, AttemptNumber, PolicyVersion, RolloutId};
use fulgurite_core::llm::{
    ChatRequest, Completion, KeptTokens, LlmSession, Message, Role, Sampling, SessionInfo, TokenData,
};
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_core::training::{LossSpec, OptimiserStep, Stream, TrainingRow};
use fulgurite_policy::{EngineStatistics, PolicyConfig, PolicyEngine, PolicyTokenizer, TokenizerConfig};
use serde_json::{Value, json};

use crate::bench::load::question;
use crate::failure::Failure;

/// Tokens of prompt and completion together; the same in the baseline, where it bounds a table only.
const CONTEXT_TOKENS: usize = 1_024;
/// Calls whose log-probs are compared with those of training.
const MISMATCH_CALLS: usize = 64;
/// At least so many tokens are compared.
const MISMATCH_TOKENS: usize = 10_000;

/// Sizes of a model that is measured.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) name: &'static str,
    d_model: usize,
    layers: usize,
    heads: usize,
    d_ff: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "d128", d_model: 128, layers: 4, heads: 4, d_ff: 352 },
    Shape { name: "d384", d_model: 384, layers: 6, heads: 6, d_ff: 848 },
];

impl Shape {
    /// The shape of a name.
    pub(super) fn named(name: &str) -> Result<&'static Self, Failure> {
        let known = || SHAPES.iter().map(|shape| shape.name).collect::<Vec<_>>().join(", ");
        let unknown = || Failure::usage(anyhow!("`--shapes {name}` is none of {}", known()));
        SHAPES.iter().find(|shape| shape.name == name).ok_or_else(unknown)
    }
}

/// How log-probs of sampling and training differ.
pub(super) struct Mismatch {
    pub(super) mean: f64,
    pub(super) max: f64,
    pub(super) tokens: usize,
    /// Between a call alone and the same call among 100 others; infinite when they drew other tokens.
    pub(super) alone_max: f64,
}

/// A policy that is measured.
pub(super) struct BenchModel {
    pub(super) shape: &'static Shape,
    engine: PolicyEngine,
}

impl BenchModel {
    /// Random weights and a tokenizer of 512 ids.
    pub(super) fn new(shape: &'static Shape, threads: usize) -> Result<Self, Failure> {
        let tokenizer = PolicyTokenizer::train((0..200).map(question), &TokenizerConfig::default());
        let config = PolicyConfig {
            d_model: Some(shape.d_model),
            layers: Some(shape.layers),
            heads: Some(shape.heads),
            d_ff: Some(shape.d_ff),
            context_tokens_max: Some(CONTEXT_TOKENS),
            threads,
            ..PolicyConfig::default()
        };
        let engine = PolicyEngine::create(&config, tokenizer.map_err(Failure::failed)?, Seed::new(0));
        Ok(Self { shape, engine: engine.map_err(Failure::failed)? })
    }

    /// Number of weights.
    pub(super) fn parameters(&self) -> usize {
        self.engine.parameter_count()
    }

    /// What the baseline must build.
    pub(super) fn sizes(&self) -> Value {
        let Shape { name, d_model, layers, heads, d_ff } = self.shape;
        let vocabulary = self.engine.shape().vocabulary;
        json!({
            "name": name, "d_model": d_model, "layers": layers, "heads": heads, "d_ff": d_ff,
            "vocabulary": vocabulary, "context": CONTEXT_TOKENS,
        })
    }

    /// Random rows of which every token but the first is trained on.
    pub(super) fn rows(&self, rows: usize, tokens: usize) -> Vec<TrainingRow> {
        let mut generator = Generator::new(Seed::new(1));
        let vocabulary = self.engine.shape().vocabulary;
        (0_u32..)
            .take(rows)
            .map(|sequence| TrainingRow {
                sequence,
                ids: (0..tokens).map(|_| u32::try_from(generator.below(vocabulary)).unwrap_or(0)).collect(),
                mask: (0..tokens).map(|at| at > 0).collect(),
                weights: vec![1.0; tokens],
                behaviour_log_probs: vec![0.0; tokens],
                old_log_probs: vec![],
                calls: vec![],
                group: None,
                stream: Stream::Ce,
                temperature: 1.0,
                policy_version: PolicyVersion(0),
                kept: KeptTokens::default(),
            })
            .collect()
    }

    /// Steps on a batch for so long, at least one; tokens a second.
    pub(super) async fn train(&self, rows: &[TrainingRow], seconds: f64) -> Result<f64, Failure> {
        let tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
        let (start, mut done) = (Instant::now(), 0);
        while done == 0 || start.elapsed().as_secs_f64() < seconds {
            let gradient = self.engine.forward_backward(rows.to_vec(), LossSpec::default()).await;
            gradient.map_err(Failure::failed)?;
            let step = OptimiserStep { learning_rate: 3e-4, weight_decay: 0.01, gradient_norm_max: Some(1.0) };
            self.engine.optimiser_step(step).await.map_err(Failure::failed)?;
            done += tokens;
        }
        Ok(done as f64 / start.elapsed().as_secs_f64())
    }

    /// Tokens of the prompts of so many calls.
    pub(super) async fn prompt_lengths(&self, calls: usize) -> Result<Vec<usize>, Failure> {
        let completions = self.calls(&prompts(calls, 0), 0, 1).await?;
        completions.iter().map(|completion| Ok(tokens(completion)?.prompt_ids.len())).collect()
    }

    /// Rounds of calls for so long, each in a session of its own; new tokens a second.
    pub(super) async fn decode(&self, calls: usize, new_tokens: u32, seconds: f64) -> Result<f64, Failure> {
        let (mut drawn, mut taken, mut round) = (0, 0.0, 0);
        while round == 0 || taken < seconds {
            let prompts = prompts(calls, round);
            let start = Instant::now();
            let completions = self.calls(&prompts, round, new_tokens).await?;
            taken += start.elapsed().as_secs_f64();
            for completion in &completions {
                drawn += tokens(completion)?.completion_ids.len();
            }
            round += 1;
        }
        Ok(drawn as f64 / taken)
    }

    /// Seconds that calls with one prompt of so many tokens take, which no call before had, for one new token each, and how
    /// many tokens of their prompts were computed. Everything counts that a caller waits for: tokenising, prefill, the draws.
    pub(super) async fn group(&self, prompt_tokens: usize, members: usize, salt: u64) -> Result<(f64, u64), Failure> {
        // The texts differ from their first words on, so that no cache of an earlier prompt helps.
        let mut text = salt.to_string();
        let prompt = loop {
            text.push_str(&question(salt * 1_000 + text.len() as u64));
            let ids = self.engine.tokenizer().encode(&text).map_err(Failure::failed)?;
            if let Some(ids) = ids.get(..prompt_tokens) {
                break self.engine.tokenizer().decode(ids);
            }
        };
        let prompts = vec![prompt; members];
        let computed = |statistics: EngineStatistics| statistics.prompt_tokens - statistics.reused_tokens;
        let before = computed(self.engine.statistics());
        let start = Instant::now();
        self.calls(&prompts, salt, 1).await?;
        Ok((start.elapsed().as_secs_f64(), computed(self.engine.statistics()) - before))
    }

    /// Compares log-probs of sampling with those of the training forward, and of a call alone with the same among others.
    pub(super) async fn mismatch(&self) -> Result<Mismatch, Failure> {
        let (mut sum, mut max, mut compared, mut round) = (0.0, 0.0_f64, 0, 0);
        while compared < MISMATCH_TOKENS {
            let completions = self.calls(&prompts(MISMATCH_CALLS, round), round, 240).await?;
            let mut rows = vec![];
            for (sequence, completion) in (0_u32..).zip(&completions) {
                rows.push(row_of(sequence, tokens(completion)?));
            }
            let trained = self.engine.forward(rows.clone(), None).await.map_err(Failure::failed)?;
            for (row, trained) in rows.iter().zip(&trained) {
                let all = row.mask.iter().zip(row.behaviour_log_probs.iter().zip(&trained.log_probs));
                for (_, (sampled, trained)) in all.filter(|(masked, _)| **masked) {
                    let difference = f64::from((sampled - trained).abs());
                    (sum, max, compared) = (sum + difference, max.max(difference), compared + 1);
                }
            }
            round += 1;
        }
        let all = prompts(101, 0);
        let among = self.calls(&all, 7, 46).await?;
        // A call's seed follows from its place: alone it must stand where it stood.
        let alone = self.calls(all.get(..1).unwrap_or_default(), 7, 46).await?;
        let (one, other) = (among.first().map(tokens).transpose()?, alone.first().map(tokens).transpose()?);
        let alone_max = match (one, other) {
            (Some(one), Some(other)) if one.completion_ids == other.completion_ids => {
                let pairs = one.log_probs.iter().zip(&other.log_probs);
                pairs.map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
            }
            _ => f64::INFINITY,
        };
        Ok(Mismatch { mean: sum / compared as f64, max, tokens: compared, alone_max })
    }

    /// One call for each prompt at the same time, each in a session of its own with a seed of its own.
    async fn calls(&self, prompts: &[String], round: u64, new_tokens: u32) -> Result<Vec<Arc<Completion>>, Failure> {
        let backend = self.engine.backend();
        let sampling = Sampling { max_tokens: new_tokens, ..Sampling::default() };
        let mut sessions: Vec<Box<dyn LlmSession>> = vec![];
        for index in (0_u64..).take(prompts.len()) {
            let rollout = RolloutId::derived("bench", round, index).map_err(Failure::failed)?;
            sessions.push(backend.open(SessionInfo {
                attempt: AttemptKey { rollout, attempt: AttemptNumber::FIRST },
                item_id: "item".into(),
                seed: Seed::new(round).child_index(index),
                sampling: sampling.clone(),
                history: vec![],
            }));
        }
        let calls = sessions.iter().zip(prompts).map(|(session, prompt)| {
            let request = ChatRequest {
                messages: vec![Message::text(Role::User, prompt.clone())],
                tools: vec![],
                sampling: Sampling::default(),
                agent_role: "agent".to_owned(),
                endpoint: None,
            };
            session.chat(0, Arc::new(request))
        });
        futures::future::try_join_all(calls).await.map_err(Failure::failed)
    }
}

/// Ragged prompts, each different from the others, of some 20 to 60 tokens.
fn prompts(calls: usize, round: u64) -> Vec<String> {
    let text = |index: u64| {
        let mut text = question(round * 1_000 + index);
        let length = usize::try_from(40 + index * 37 % 90).unwrap_or(40);
        text.truncate(length);
        text
    };
    (0_u64..).take(calls).map(text).collect()
}

fn tokens(completion: &Arc<Completion>) -> Result<&TokenData, Failure> {
    completion.tokens.as_ref().ok_or_else(|| Failure::failed(anyhow!("a completion has no tokens")))
}

/// What a call was sampled with, as a row to train on.
fn row_of(sequence: u32, data: &TokenData) -> TrainingRow {
    let prompt = data.prompt_ids.len();
    let ids = [data.prompt_ids.as_slice(), &data.completion_ids].concat();
    TrainingRow {
        sequence,
        mask: (0..ids.len()).map(|at| at >= prompt).collect(),
        weights: vec![1.0; ids.len()],
        behaviour_log_probs: [vec![0.0; prompt].as_slice(), &data.log_probs].concat(),
        old_log_probs: vec![],
        calls: vec![],
        group: None,
        stream: Stream::Rl,
        temperature: 1.0,
        policy_version: data.policy_version,
        ids,
        kept: KeptTokens::default(),
    }
}
