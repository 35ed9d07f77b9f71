//! Policies of every architecture through the public interface: from tensors to samples, training and checkpoints.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use fulgurite_core::id::{AttemptKey, AttemptNumber, PolicyVersion, RolloutId};
use fulgurite_core::llm::{ChatRequest, Completion, LlmSession, Message, Role, Sampling, SessionInfo};
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_core::training::{LossSpec, OptimiserStep, TrainingRow};
use fulgurite_policy::{
    Architecture, Inference, ModelShape, PolicyConfig, PolicyDevice, PolicyEngine, PolicyTokenizer, RopeScaling,
    TokenizerConfig,
};
use futures::future::try_join_all;
use support::row;

fn tokenizer() -> PolicyTokenizer {
    let corpus = (0..60).map(|i| format!("Find a room for {} people at {}:00.", i % 20, i % 24));
    PolicyTokenizer::train(corpus, &TokenizerConfig { vocab_size: 300, atoms_pattern: None }).unwrap()
}

/// One shape of each architecture, with a window that prompts are longer than.
fn shapes() -> Vec<ModelShape> {
    let llama = ModelShape {
        d_model: 48,
        layers: 2,
        heads: 6,
        kv_heads: 2,
        head_dim: 8,
        d_ff: 80,
        // More ids than the tokenizer has, as models with padded embeddings do.
        vocabulary: 320,
        context_tokens_max: 256,
        rope_theta: 10_000.0,
        rms_norm_epsilon: 1e-6,
        tie_embeddings: false,
        attention_bias: false,
        attention_out_bias: false,
        qk_norm: false,
        rope_scaling: RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 64,
        },
        rope_f32: false,
        sliding_window: None,
    };
    let plain = ModelShape { rope_scaling: RopeScaling::None, ..llama.clone() };
    vec![
        ModelShape { sliding_window: Some(20), head_dim: 16, ..plain.clone() },
        ModelShape { attention_bias: true, tie_embeddings: true, ..plain.clone() },
        ModelShape { qk_norm: true, head_dim: 32, tie_embeddings: true, ..plain },
        llama,
    ]
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Random tensors by the names and sizes of model files, written out here.
fn tensors(shape: &ModelShape) -> Tensors {
    let (d, q, kv, ff) = (shape.d_model, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.d_ff);
    let mut sizes = vec![("model.embed_tokens.weight".to_owned(), vec![shape.vocabulary, d])];
    for layer in 0..shape.layers {
        let mut add = |part: &str, dims: &[usize]| sizes.push((format!("model.layers.{layer}.{part}"), dims.to_vec()));
        add("input_layernorm.weight", &[d]);
        add("post_attention_layernorm.weight", &[d]);
        for (part, width) in [("q", q), ("k", kv), ("v", kv)] {
            add(&format!("self_attn.{part}_proj.weight"), &[width, d]);
            if shape.attention_bias {
                add(&format!("self_attn.{part}_proj.bias"), &[width]);
            }
            if shape.qk_norm && part != "v" {
                add(&format!("self_attn.{part}_norm.weight"), &[shape.head_dim]);
            }
        }
        add("self_attn.o_proj.weight", &[d, q]);
        add("mlp.gate_proj.weight", &[ff, d]);
        add("mlp.up_proj.weight", &[ff, d]);
        add("mlp.down_proj.weight", &[d, ff]);
    }
    sizes.push(("model.norm.weight".to_owned(), vec![d]));
    if !shape.tie_embeddings {
        sizes.push(("lm_head.weight".to_owned(), vec![shape.vocabulary, d]));
    }
    let mut generator = Generator::new(Seed::new(4));
    let mut values = |name: &str, len: usize| -> Vec<f32> {
        let base = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        (0..len).map(|_| base + (generator.below(2_001) as f32 / 1_000.0 - 1.0) * 0.3).collect()
    };
    sizes.into_iter().map(|(name, dims)| (name.clone(), (dims.clone(), values(&name, dims.iter().product())))).collect()
}

/// A tensor's values.
fn values(tensors: &Tensors, name: &str) -> Vec<f32> {
    tensors.get(name).unwrap().1.clone()
}

fn dims(tensors: &Tensors) -> BTreeMap<String, Vec<usize>> {
    tensors.iter().map(|(name, (dims, _))| (name.clone(), dims.clone())).collect()
}

fn engine(shape: &ModelShape, device: PolicyDevice) -> PolicyEngine {
    let (config, tensors) = (PolicyConfig { device, ..PolicyConfig::default() }, tensors(shape));
    let read = |name: &str| Ok(values(&tensors, name));
    PolicyEngine::from_tensors(&config, tokenizer(), shape, &dims(&tensors), Seed::new(0), read).unwrap()
}

fn open(engine: &PolicyEngine, index: u64) -> Box<dyn LlmSession> {
    let rollout = RolloutId::derived("test", 0, index).unwrap();
    let attempt = AttemptKey { rollout, attempt: AttemptNumber::FIRST };
    let seed = Seed::new(7).child_index(index);
    let sampling = Sampling::default();
    engine.backend().open(SessionInfo { attempt, item_id: "item".into(), seed, sampling, history: vec![] })
}

fn request(messages: Vec<Message>) -> Arc<ChatRequest> {
    let sampling = Sampling { max_tokens: 40, ..Sampling::default() };
    Arc::new(ChatRequest { messages, tools: vec![], sampling, agent_role: "agent".into(), endpoint: None })
}

/// Both turns of one rollout: the second prompt begins with the first prompt and its completion.
async fn rollout(engine: &PolicyEngine, index: u64) -> Vec<Arc<Completion>> {
    let session = open(engine, index);
    let mut messages = vec![Message::text(Role::User, format!("Find a room for {index} people at 10:00."))];
    let first = session.chat(0, request(messages.clone())).await.unwrap();
    messages.push(Message::text(Role::Assistant, first.text.clone()));
    messages.push(Message::text(Role::User, "Find a room for 9 people."));
    vec![first, session.chat(1, request(messages)).await.unwrap()]
}

/// The CPU in its two ways, and the GPUs that this build and this machine have.
fn devices() -> Vec<PolicyDevice> {
    let gpus = PolicyDevice::findings().into_iter().filter(|finding| finding.usable).map(|finding| finding.device);
    [PolicyDevice::Flex].into_iter().chain(gpus).collect()
}

#[tokio::test]
async fn what_is_sampled_is_what_is_trained() {
    for shape in shapes() {
        for device in devices() {
            let engine = engine(&shape, device);
            let alone = rollout(&engine, 3).await;
            assert!(engine.statistics().reused_tokens > 0, "the second turn takes the first one's keys and values");
            let all = try_join_all((0..20).map(|index| {
                let engine = &engine;
                async move { Ok::<_, ()>(rollout(engine, index).await) }
            }));
            let all = all.await.unwrap();
            assert_eq!(alone, all[3], "alone and among others");
            let rows: Vec<TrainingRow> = (0..).zip(all.iter().flatten()).map(|(i, c)| row(i, c, 1.0)).collect();
            let report = engine.forward_backward(rows, LossSpec::default()).await.unwrap();
            assert!(report.trained_tokens > 300, "{report:?}");
            if device == PolicyDevice::Cpu {
                assert_eq!(report.mismatch_max.to_bits(), 0.0_f64.to_bits(), "{shape:?}");
            } else {
                assert!(report.mismatch_max < 1e-4 && report.mismatch_mean < 5e-6, "{report:?}");
            }
        }
    }
}

#[tokio::test]
async fn checkpoints_of_every_architecture_go_on_bit_by_bit() {
    let step = OptimiserStep { learning_rate: 1e-3, weight_decay: 0.1, gradient_norm_max: Some(1.0) };
    for shape in shapes() {
        let engine = engine(&shape, PolicyDevice::Cpu);
        let rows: Vec<TrainingRow> = (0..).zip(&rollout(&engine, 1).await).map(|(i, c)| row(i, c, 1.0)).collect();
        let before = engine.weights_hash();
        engine.forward_backward(rows.clone(), LossSpec::default()).await.unwrap();
        engine.optimiser_step(step.clone()).await.unwrap();
        assert_ne!(engine.weights_hash(), before);
        let dir = tempfile::tempdir().unwrap();
        engine.save(dir.path()).await.unwrap();
        let opened = PolicyEngine::open(dir.path(), &PolicyConfig::default()).unwrap();
        assert_eq!((opened.shape(), opened.version()), (&shape, PolicyVersion(1)));
        assert_eq!(opened.parameter_count(), shape.parameter_count());
        for engine in [&engine, &opened] {
            engine.forward_backward(rows.clone(), LossSpec::default()).await.unwrap();
            engine.optimiser_step(step.clone()).await.unwrap();
        }
        assert_eq!(opened.weights_hash(), engine.weights_hash());

        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("config.json")).unwrap()).unwrap();
        assert_eq!(config["model_type"], shape.architecture().unwrap().model_type());
        // The optimiser went through every kind of tensor: a bias has moved from what it was.
        if shape.architecture().unwrap() == Architecture::Qwen2 {
            let written = std::fs::read(dir.path().join("model.safetensors")).unwrap();
            let file = safetensors::SafeTensors::deserialize(&written).unwrap();
            let name = "model.layers.1.self_attn.k_proj.bias";
            let before: Vec<u8> = values(&tensors(&shape), name).iter().flat_map(|value| value.to_le_bytes()).collect();
            assert_ne!(file.tensor(name).unwrap().data(), before);
        }
    }
}

#[test]
fn questions_about_ids_need_no_engine() {
    for shape in shapes() {
        let tensors = tensors(&shape);
        let open = || {
            let read = |name: &str| Ok(values(&tensors, name));
            Inference::from_tensors(&PolicyConfig::default(), &shape, &dims(&tensors), read).unwrap()
        };
        let inference = open();
        assert_eq!(inference.shape(), &shape);
        let prompt: Vec<u32> = (0..50).map(|i| i * 31 % 320).collect();
        let greedy = inference.greedy(&prompt, 64, &[]).unwrap();
        let all = [&prompt[..], &greedy.tokens].concat();
        let known = inference.cross_entropy(&all, prompt.len()).unwrap();
        assert_eq!(known.log_probs, greedy.log_probs);
        assert!(known.gradient_norm > 0.0 && known.mean > 0.0);
        assert_eq!(open().cross_entropy(&all, prompt.len()).unwrap(), known);
    }
}
