//! Generation and training on burn's devices through the public interface: what must be as on the kernels, and what a
//! device's answers may not depend on.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use fulgurite_core::id::PolicyVersion;
use fulgurite_core::llm::{ChatRequest, Completion, Message, Role, Sampling};
use fulgurite_core::seed::Seed;
use fulgurite_core::training::{LossSpec, OptimiserStep, Stream, TrainingRow};
use fulgurite_policy::{
    DevicePrecision, Inference, LoraConfig, ModelShape, PolicyConfig, PolicyDevice, PolicyEngine, RopeScaling,
};
use futures::future::{maybe_done, try_join_all};
use futures::poll;
use support::{open, row, tokenizer};

/// A small model with grouped keys, larger initial weights than the default, and room for prompts of many blocks.
fn config(device: PolicyDevice) -> PolicyConfig {
    PolicyConfig {
        device,
        d_model: Some(64),
        layers: Some(2),
        heads: Some(4),
        kv_heads: Some(2),
        d_ff: Some(96),
        initial_std: 0.12,
        context_tokens_max: Some(384),
        ..PolicyConfig::default()
    }
}

/// burn on the CPU, and the GPUs that this build and this machine have.
fn devices() -> Vec<PolicyDevice> {
    let gpus = PolicyDevice::findings().into_iter().filter(|finding| finding.usable).map(|finding| finding.device);
    [PolicyDevice::Flex].into_iter().chain(gpus.filter(|device| *device != PolicyDevice::Cpu)).collect()
}

fn engine(config: &PolicyConfig) -> PolicyEngine {
    PolicyEngine::create(config, tokenizer(), Seed::new(5)).unwrap()
}

fn request(messages: Vec<Message>, max_tokens: u32) -> Arc<ChatRequest> {
    let sampling = Sampling { max_tokens, ..Sampling::default() };
    Arc::new(ChatRequest { messages, tools: vec![], sampling, agent_role: "agent".into(), endpoint: None })
}

/// Prompts of two to seven blocks that share a system part.
fn conversation(index: u64) -> Vec<Message> {
    let system = "Find a room for the people who meet today. ".repeat(4);
    let middle = " at 10:00".repeat(usize::try_from(index % 5).unwrap() * 4);
    vec![
        Message::text(Role::System, system),
        Message::text(Role::User, format!("R{:02} for {} people{middle}", index % 5, index % 7)),
    ]
}

async fn sample(engine: &PolicyEngine, indices: &[u64], max_tokens: u32) -> Vec<Completion> {
    let sessions: Vec<_> = indices.iter().map(|index| (*index, open(engine, *index))).collect();
    let calls = sessions.iter().map(|(index, session)| session.chat(0, request(conversation(*index), max_tokens)));
    try_join_all(calls).await.unwrap().into_iter().map(Arc::unwrap_or_clone).collect()
}

fn step() -> OptimiserStep {
    OptimiserStep { learning_rate: 3e-3, weight_decay: 0.0, gradient_norm_max: Some(1.0) }
}

/// Mean and largest difference of sampled log-probs from those of training's forward pass.
async fn mismatch(engine: &PolicyEngine, completions: &[Completion]) -> (f64, f64, usize) {
    let rows: Vec<TrainingRow> = (0..).zip(completions).map(|(i, completion)| row(i, completion, 1.0)).collect();
    let forward = engine.forward(rows.clone(), None).await.unwrap();
    let pairs = rows.iter().zip(&forward).flat_map(|(row, forward)| {
        let both = row.behaviour_log_probs.iter().zip(&forward.log_probs).zip(&row.mask);
        both.filter(|(_, on)| **on).map(|((a, b), _)| f64::from(a - b).abs())
    });
    let all: Vec<f64> = pairs.collect();
    (all.iter().sum::<f64>() / all.len() as f64, all.iter().copied().fold(0.0, f64::max), all.len())
}

#[tokio::test]
async fn a_call_draws_the_same_alone_among_others_with_shared_and_with_evicted_blocks() {
    let all: Vec<u64> = (0..20).collect();
    // Wide enough that products of many rows run on several threads and those of few do not.
    let config = || PolicyConfig { d_model: Some(256), d_ff: Some(512), ..config(PolicyDevice::Flex) };
    let roomy = engine(&config());
    let among = sample(&roomy, &all, 24).await;
    let statistics = roomy.statistics();
    assert!(statistics.reused_tokens * 2 > statistics.prompt_tokens, "{statistics:?}");
    assert_eq!((statistics.evicted_blocks, statistics.calls_put_back), (0, 0));
    for index in [0, 7, 19] {
        // Nothing kept, and prompts computed in one piece each.
        let alone = engine(&PolicyConfig { kv_cache_bytes_max: 0, ..config() });
        assert_eq!(sample(&alone, &[index], 24).await.remove(0), among[usize::try_from(index).unwrap()], "{index}");
    }
    // A block is 2 lists of 2 layers of 32 positions of 2 heads of 64 floats.
    let block = 2 * 2 * 32 * 2 * 64 * 4;
    let tight = engine(&PolicyConfig { kv_cache_bytes_max: 20 * block, ..config() });
    assert_eq!(sample(&tight, &all, 24).await, among);
    let statistics = tight.statistics();
    assert!(statistics.evicted_blocks > 0 && statistics.calls_put_back > 0, "{statistics:?}");
    assert!(statistics.kv_cache_bytes <= 20 * block as u64, "{statistics:?}");
    let completions: std::collections::BTreeSet<_> = among.iter().map(|completion| &completion.text).collect();
    assert!(completions.len() > 15, "seeds differ");
}

#[tokio::test]
async fn sampled_log_probs_are_those_of_training_before_and_after_steps() {
    for device in devices() {
        let engine = engine(&config(device));
        for round in 0..3 {
            let indices: Vec<u64> = (round * 24..round * 24 + 24).collect();
            let completions = sample(&engine, &indices, 40).await;
            let version = completions[0].tokens.as_ref().unwrap().policy_version;
            assert_eq!(version, PolicyVersion(round), "generation takes up every step's weights");
            let (mean, max, tokens) = mismatch(&engine, &completions).await;
            println!("{device}: {tokens} tokens, mean {mean:.2e}, max {max:.2e}");
            assert!(tokens > 500 && mean <= 5e-6 && max <= 1e-4, "{device}: mean {mean:e}, max {max:e}");
            let rows = (0..).zip(&completions).map(|(i, completion)| row(i, completion, 1.0)).collect();
            engine.forward_backward(rows, LossSpec::default()).await.unwrap();
            engine.optimiser_step(step()).await.unwrap();
        }
    }
}

#[tokio::test]
async fn later_turns_go_on_from_kept_blocks_and_a_cancelled_call_frees_its_own() {
    let engine = engine(&config(PolicyDevice::Flex));
    let session = open(&engine, 3);
    let mut messages = conversation(3);
    for call in 0..3 {
        let completion = session.chat(call, request(messages.clone(), 20)).await.unwrap();
        let fresh = self::engine(&PolicyConfig { kv_cache_bytes_max: 0, ..config(PolicyDevice::Flex) });
        // The other engine has not drawn the earlier answers: its prompt is theirs by text, and equal where that is.
        let cold = open(&fresh, 3).chat(call, request(messages.clone(), 20)).await.unwrap();
        if cold.tokens.as_ref().unwrap().prompt_ids == completion.tokens.as_ref().unwrap().prompt_ids {
            assert_eq!(cold.tokens, completion.tokens, "call {call}");
        }
        let mut answer = Message::text(Role::Assistant, completion.text.clone());
        answer.response_id = Some(completion.response_id.clone());
        messages.extend([answer, Message::text(Role::User, "R07 is free")]);
    }
    let statistics = engine.statistics();
    assert!(statistics.reused_tokens * 2 > statistics.prompt_tokens, "{statistics:?}");
    drop(session);

    let before = engine.statistics().calls;
    let (cancelled, other) = (open(&engine, 8), open(&engine, 9));
    let mut call = Box::pin(maybe_done(cancelled.chat(0, request(conversation(8), 200))));
    assert!(poll!(&mut call).is_pending());
    let answered = other.chat(0, request(conversation(9), 4));
    drop(call);
    drop(cancelled);
    assert_eq!(answered.await.unwrap().usage.completion_tokens, 4);
    assert!(engine.statistics().calls - before <= 2);
    // What no live session holds is dropped with the weights; nothing else is held any more.
    drop(other);
    let rows = vec![row(0, &sample(&engine, &[1], 4).await[0], 1.0)];
    engine.forward_backward(rows, LossSpec::default()).await.unwrap();
    engine.optimiser_step(step()).await.unwrap();
    assert_eq!(engine.statistics().kv_cache_bytes, 0);
}

#[tokio::test]
async fn adapters_generate_and_learn_beside_each_other() {
    for precision in [DevicePrecision::F32, DevicePrecision::Bf16] {
        let lora = LoraConfig { rank: 4, alpha: 8.0, adapters: vec!["planner".into()], ..LoraConfig::default() };
        let plain = PolicyConfig { device_precision: precision, ..config(PolicyDevice::Flex) };
        let policy = engine(&PolicyConfig { lora: Some(lora), ..plain.clone() });
        let planner = policy.named("planner").unwrap();
        let indices: Vec<u64> = (0..6).collect();
        let before = sample(&policy, &indices, 24).await;
        assert_eq!(before, sample(&engine(&plain), &indices, 24).await, "a fresh adapter changes no bit");
        let completions = before.clone();
        let rows: Vec<TrainingRow> = (0..).zip(&completions).map(|(i, c)| row(i, c, 1.0)).collect();
        for _ in 0..3 {
            planner.forward_backward(rows.clone(), LossSpec::default()).await.unwrap();
            planner.optimiser_step(OptimiserStep { learning_rate: 1e-2, ..step() }).await.unwrap();
        }
        assert_eq!(sample(&policy, &indices, 24).await, before, "the other one's steps are not its own");
        let learned = sample(&planner, &indices, 24).await;
        assert_eq!(learned[0].tokens.as_ref().unwrap().policy_version, PolicyVersion(3));
        let (mean, max, _) = mismatch(&planner, &learned).await;
        println!("{precision:?}: mean {mean:.2e}, max {max:.2e}");
        let [mean_max, max_max] = if precision == DevicePrecision::F32 { [5e-6, 1e-4] } else { [2e-3, 0.1] };
        assert!(mean <= mean_max && max <= max_max, "{precision:?}: {mean} {max}");
        let moved = planner.forward(rows, None).await.unwrap();
        let gain = |row: usize| -> f32 {
            let tokens = before[row].tokens.as_ref().unwrap();
            moved[row].log_probs.iter().sum::<f32>() - tokens.log_probs.iter().sum::<f32>()
        };
        assert!((0..6).map(gain).sum::<f32>() > 1.0, "what was rewarded has become likelier");
    }
}

/// A model of every switch: name, shape.
fn shapes() -> Vec<(&'static str, ModelShape)> {
    let plain = config(PolicyDevice::Cpu).shape(tokenizer().vocabulary()).unwrap();
    let llama3 = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 64 };
    vec![
        ("llama", ModelShape { rope_scaling: llama3, ..plain.clone() }),
        ("mistral", ModelShape { sliding_window: Some(40), ..plain.clone() }),
        ("qwen2", ModelShape { attention_bias: true, tie_embeddings: true, ..plain.clone() }),
        ("qwen3", ModelShape { qk_norm: true, head_dim: 24, kv_heads: 1, ..plain }),
    ]
}

/// Deterministic values around those of initial weights.
fn tensor(name: &str, len: usize) -> Vec<f32> {
    let seed = name.bytes().fold(17_u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(u32::from(byte)));
    let mut state = seed | 1;
    let centre = if name.contains("norm") { 1.0 } else { 0.0 };
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1_u32 << 24) as f32 - 0.5
    };
    (0..len).map(|_| centre + 0.4 * next()).collect()
}

fn model(config: &PolicyConfig, shape: &ModelShape) -> Inference {
    let found = tensors(shape);
    let read = |name: &str| Ok(tensor(name, found.get(name).map_or(0, |dims| dims.iter().product())));
    Inference::from_tensors(config, shape, &found, read).unwrap()
}

/// Names and sizes as in a Hugging Face file.
fn tensors(shape: &ModelShape) -> BTreeMap<String, Vec<usize>> {
    let (d, ff) = (shape.d_model, shape.d_ff);
    let (query, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let mut all = BTreeMap::from([
        ("model.embed_tokens.weight".to_owned(), vec![shape.vocabulary, d]),
        ("model.norm.weight".to_owned(), vec![d]),
    ]);
    if !shape.tie_embeddings {
        all.insert("lm_head.weight".to_owned(), vec![shape.vocabulary, d]);
    }
    for layer in 0..shape.layers {
        let mut put = |part: &str, dims: &[usize]| {
            all.insert(format!("model.layers.{layer}.{part}"), dims.to_vec());
        };
        put("input_layernorm.weight", &[d]);
        put("post_attention_layernorm.weight", &[d]);
        for (part, out) in [("q", query), ("k", kv), ("v", kv)] {
            put(&format!("self_attn.{part}_proj.weight"), &[out, d]);
            if shape.attention_bias {
                put(&format!("self_attn.{part}_proj.bias"), &[out]);
            }
        }
        put("self_attn.o_proj.weight", &[d, query]);
        if shape.qk_norm {
            put("self_attn.q_norm.weight", &[shape.head_dim]);
            put("self_attn.k_norm.weight", &[shape.head_dim]);
        }
        put("mlp.gate_proj.weight", &[ff, d]);
        put("mlp.up_proj.weight", &[ff, d]);
        put("mlp.down_proj.weight", &[d, ff]);
    }
    all
}

#[test]
fn the_likeliest_continuation_is_that_of_the_kernels() {
    for (device, (name, shape)) in
        devices().into_iter().flat_map(|device| shapes().into_iter().map(move |s| (device, s)))
    {
        let [kernels, burn] = [PolicyDevice::Cpu, device].map(|device| model(&config(device), &shape));
        let prompt: Vec<u32> = (0..101).map(|at| (at * at + 7 * at) % 300).collect();
        let want = kernels.greedy(&prompt, 64, &[]).unwrap();
        // Only where the likeliest token is clear can another order of additions not change it.
        let ids = [prompt.clone(), want.tokens.clone()].concat();
        let logits = kernels.logits(&ids, prompt.len() - 1).unwrap();
        let gaps = logits.chunks_exact(shape.vocabulary).map(|logits| {
            let mut sorted = logits.to_vec();
            sorted.sort_by(f32::total_cmp);
            sorted[sorted.len() - 1] - sorted[sorted.len() - 2]
        });
        let clear = gaps.take(64).take_while(|gap| *gap > 1e-3).count();
        let got = burn.greedy(&prompt, 64, &[]).unwrap();
        println!("{device}, {name}: {clear} of 64 tokens are clear");
        assert!(clear > 32, "{name}: {clear}");
        assert_eq!(got.tokens[..clear], want.tokens[..clear], "{device}, {name}");
        for (got, want) in got.log_probs.iter().zip(&want.log_probs).take(clear) {
            assert!((got - want).abs() < 1e-4, "{device}, {name}: {got} {want}");
        }
        // Training's forward pass on the same device says the same.
        let scored = burn.cross_entropy(&ids, prompt.len()).unwrap().log_probs;
        for (got, scored) in got.log_probs.iter().zip(&scored).take(clear) {
            assert!((got - scored).abs() < 1e-4, "{device}, {name}: {got} {scored}");
        }
    }
}

/// bf16 has 8 bits: a logit of a few units is off by some hundredths. A wrong cast, a norm in bf16 or a lost layer is off by more,
/// and no difference at all would mean that nothing is computed in bf16.
#[test]
fn bf16_is_near_f32_where_the_device_has_it_and_refused_by_name_elsewhere() {
    let asked = |device| PolicyConfig { device_precision: DevicePrecision::Bf16, ..config(device) };
    let error = PolicyEngine::create(&asked(PolicyDevice::Cpu), tokenizer(), Seed::new(1)).unwrap_err().to_string();
    assert!(error.contains("`device_precision`") && error.contains("cpu"), "{error}");
    for (name, shape) in shapes() {
        let ids: Vec<u32> = (0..90).map(|at| (at * at + 3 * at) % 300).collect();
        let exact = model(&config(PolicyDevice::Cpu), &shape);
        let rough = model(&asked(PolicyDevice::Flex), &shape);
        let [want, got] = [&exact, &rough].map(|model| model.cross_entropy(&ids, 1).unwrap());
        let differences: Vec<f64> =
            want.log_probs.iter().zip(&got.log_probs).map(|(a, b)| f64::from(a - b).abs()).collect();
        let mean = differences.iter().sum::<f64>() / differences.len() as f64;
        let norms = (got.gradient_norm / want.gradient_norm - 1.0).abs();
        println!("{name}: log-probs differ by {mean:.1e}, the gradient's norm by {norms:.1e}");
        assert!((2e-3..1.5e-2).contains(&mean), "{name}: {mean}");
        assert!(norms < 5e-3, "{name}: {norms}");
    }
}

#[tokio::test]
async fn bf16_generates_and_learns() {
    let config = PolicyConfig { device_precision: DevicePrecision::Bf16, ..config(PolicyDevice::Flex) };
    let engine = engine(&config);
    let completions = sample(&engine, &(0..12).collect::<Vec<_>>(), 30).await;
    let (mean, max, _) = mismatch(&engine, &completions).await;
    println!("bf16: mean {mean:.2e}, max {max:.2e}");
    assert!(mean < 2e-3 && max < 0.1, "{mean} {max}");
    let rows: Vec<TrainingRow> = (0..).zip(&completions).map(|(i, c)| row(i, c, 1.0)).collect();
    let rows: Vec<TrainingRow> = rows.into_iter().map(|row| TrainingRow { stream: Stream::Ce, ..row }).collect();
    let mut losses = vec![];
    for _ in 0..6 {
        losses.push(engine.forward_backward(rows.clone(), LossSpec::default()).await.unwrap().loss);
        engine.optimiser_step(step()).await.unwrap();
    }
    assert!(losses.windows(2).all(|pair| pair[1] < pair[0]), "{losses:?}");
}
