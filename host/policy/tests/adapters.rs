//! Adapters and the critic through the public interface: sampling, checkpoints, files and what is refused.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use fulgurite_core::id::{AttemptKey, AttemptNumber, PolicyVersion, RolloutId};
use fulgurite_core::llm::{ChatRequest, KeptTokens, Message, Role, Sampling, SessionInfo, TokenData};
use fulgurite_core::seed::Seed;
use fulgurite_core::training::{KlEstimator, KlTerm, LossSpec, OptimiserStep, Stream, TrainingRow};
use fulgurite_policy::{
    CriticConfig, LoraConfig, LoraTarget, PolicyConfig, PolicyDevice, PolicyEngine, PolicyError, PolicyTokenizer,
    TokenizerConfig,
};

fn plain() -> PolicyConfig {
    PolicyConfig { initial_std: 0.08, ..PolicyConfig::default() }
}

fn lora() -> PolicyConfig {
    let lora = LoraConfig { rank: 4, alpha: 8.0, adapters: vec!["planner".into()], ..LoraConfig::default() };
    PolicyConfig { lora: Some(lora), critic: Some(CriticConfig {}), ..plain() }
}

fn tokenizer() -> PolicyTokenizer {
    let corpus = (0..60).map(|i| format!("Find a room for {} people. R{:02} is free.", i % 20, i % 12));
    PolicyTokenizer::train(corpus, &TokenizerConfig::default()).unwrap()
}

fn engine(config: &PolicyConfig) -> PolicyEngine {
    PolicyEngine::create(config, tokenizer(), Seed::new(5)).unwrap()
}

async fn sampled(engine: &PolicyEngine) -> TokenData {
    let rollout = RolloutId::derived("test", 0, 0).unwrap();
    let attempt = AttemptKey { rollout, attempt: AttemptNumber::FIRST };
    let sampling = Sampling { max_tokens: 20, ..Sampling::default() };
    let info = SessionInfo { attempt, item_id: "item".into(), seed: Seed::new(7), sampling, history: vec![] };
    let messages = vec![Message::text(Role::User, "Find a room for 4 people")];
    let request =
        ChatRequest { messages, tools: vec![], sampling: Sampling::default(), agent_role: "a".into(), endpoint: None };
    let session = engine.backend().open(info);
    let mut tokens = session.chat(0, std::sync::Arc::new(request)).await.unwrap().tokens.clone().unwrap();
    assert_eq!(tokens.model.take().as_deref(), engine.name());
    tokens
}

fn row(tokens: &TokenData) -> TrainingRow {
    let before = tokens.prompt_ids.len();
    let ids = [tokens.prompt_ids.clone(), tokens.completion_ids.clone()].concat();
    TrainingRow {
        sequence: 0,
        mask: (0..ids.len()).map(|at| at >= before).collect(),
        weights: vec![1.0; ids.len()],
        behaviour_log_probs: [vec![0.0; before], tokens.log_probs.clone()].concat(),
        old_log_probs: vec![],
        calls: vec![],
        group: None,
        ids,
        stream: Stream::Rl,
        temperature: 1.0,
        policy_version: tokens.policy_version,
        kept: KeptTokens::default(),
    }
}

fn step() -> OptimiserStep {
    OptimiserStep { learning_rate: 1e-2, weight_decay: 0.0, gradient_norm_max: Some(1.0) }
}

fn regularised() -> LossSpec {
    LossSpec { kl: Some(KlTerm { estimator: KlEstimator::K3, coefficient: 0.1 }), ..LossSpec::default() }
}

/// Samples, trains on it, and checks that sampler and trainer agree exactly.
async fn update(engine: &PolicyEngine) -> f64 {
    let rows = vec![row(&sampled(engine).await)];
    let report = engine.forward_backward(rows.clone(), regularised()).await.unwrap();
    assert!(report.mismatch_max.abs() < f64::MIN_POSITIVE, "{}", report.mismatch_max);
    engine.optimiser_step(step()).await.unwrap();
    report.reference_kl
}

async fn critic_update(engine: &PolicyEngine) {
    let rows = vec![row(&sampled(engine).await)];
    let values = engine.values(rows.clone()).await.unwrap();
    let derivatives = values.iter().map(|row| row.iter().map(|value| value - 1.0).collect()).collect();
    engine.values_backward(rows, derivatives).await.unwrap();
    engine.critic_step(step()).await.unwrap();
}

#[tokio::test]
async fn fresh_adapters_sample_as_their_base_and_each_learns_alone() {
    let (base, adapted) = (engine(&plain()), engine(&lora()));
    let planner = adapted.named("planner").unwrap();
    let want = sampled(&base).await;
    for engine in [&adapted, &planner] {
        assert_eq!(sampled(engine).await, want);
    }
    assert_ne!(adapted.weights_hash(), planner.weights_hash(), "each has an `A` of its own");
    // The reference of the KL term is the base, without a snapshot.
    assert!(update(&planner).await.abs() < f64::MIN_POSITIVE);
    assert!(update(&planner).await > 0.0);
    assert_eq!((planner.version(), adapted.version()), (PolicyVersion(2), PolicyVersion(0)));
    assert_ne!(sampled(&planner).await.log_probs, want.log_probs);
    assert_eq!(sampled(&adapted).await, want);
    update(&adapted).await;
    assert_eq!(adapted.version(), PolicyVersion(1), "each model counts its own versions");
    assert!(matches!(adapted.named("nobody"), Err(PolicyError::UnknownModel(_))));
    assert!(base.named("planner").is_err());
}

#[tokio::test]
async fn going_on_from_a_checkpoint_of_adapters_is_going_on() {
    let dir = tempfile::tempdir().unwrap();
    let straight = engine(&lora());
    let planner = straight.named("planner").unwrap();
    update(&straight).await;
    planner.snapshot("reference").await.unwrap();
    update(&planner).await;
    critic_update(&straight).await;
    planner.forward_backward(vec![row(&sampled(&planner).await)], regularised()).await.unwrap();
    straight.save(dir.path()).await.unwrap();
    assert!(!dir.path().join("model.safetensors").exists(), "the base is not written again");

    let restored = engine(&lora());
    restored.restore(dir.path()).await.unwrap();
    let of_restored = restored.named("planner").unwrap();
    for (engine, planner) in [(&straight, &planner), (&restored, &of_restored)] {
        planner.optimiser_step(step()).await.unwrap();
        assert!(update(planner).await > 0.0);
        update(engine).await;
        critic_update(engine).await;
    }
    assert_eq!(restored.weights_hash(), straight.weights_hash());
    assert_eq!(of_restored.weights_hash(), planner.weights_hash());
    assert_eq!((restored.version(), of_restored.version()), (straight.version(), planner.version()));
    let rows = vec![row(&sampled(&straight).await)];
    assert_eq!(restored.values(rows.clone()).await.unwrap(), straight.values(rows).await.unwrap());

    let refused = |engine: PolicyEngine| async move { engine.restore(dir.path()).await.unwrap_err().to_string() };
    let other = PolicyEngine::create(&lora(), tokenizer(), Seed::new(6)).unwrap();
    let texts = [refused(other).await];
    assert!(texts[0].contains("another base"), "{texts:?}");
}

#[tokio::test]
async fn checkpoints_of_another_kind_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (full, adapted) = (dir.path().join("full"), dir.path().join("adapted"));
    engine(&plain()).save(&full).await.unwrap();
    let engine_with = engine(&lora());
    engine_with.save(&adapted).await.unwrap();
    let text = engine_with.restore(&full).await.unwrap_err().to_string();
    assert!(text.contains("all weights"), "{text}");
    let text = engine(&plain()).restore(&adapted).await.unwrap_err().to_string();
    assert!(text.contains("adapters only"), "{text}");
    let alone = PolicyConfig { lora: Some(LoraConfig { adapters: vec![], ..lora().lora.unwrap() }), ..lora() };
    let text = engine(&alone).restore(&adapted).await.unwrap_err().to_string();
    assert!(text.contains("other adapters"), "{text}");
    // A full checkpoint is what adapters can be trained over.
    let over = PolicyEngine::open(&full, &lora()).unwrap();
    assert_eq!(sampled(&over).await, sampled(&engine_with).await);
}

#[tokio::test]
async fn adapters_leave_and_enter_in_the_layout_of_peft_and_merge_into_a_plain_model() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, merged) = (dir.path().join("adapter"), dir.path().join("merged"));
    let trained = engine(&lora());
    for _ in 0..3 {
        update(&trained).await;
    }
    trained.export_adapter(&folder).await.unwrap();
    trained.export_merged(&merged).await.unwrap();

    let fresh = engine(&lora());
    fresh.import_adapter(&folder).await.unwrap();
    assert_eq!((fresh.weights_hash(), fresh.version()), (trained.weights_hash(), PolicyVersion(1)));
    let (a, b) = (sampled(&fresh).await, sampled(&trained).await);
    assert_eq!((a.completion_ids, a.log_probs), (b.completion_ids, b.log_probs));
    assert!(merged.join("model.safetensors").is_file() && merged.join("config.json").is_file());

    let other = LoraConfig { targets: vec![LoraTarget::Q, LoraTarget::V], ..lora().lora.unwrap() };
    let other = engine(&PolicyConfig { lora: Some(other), ..lora() });
    let text = other.import_adapter(&folder).await.unwrap_err().to_string();
    assert!(text.contains("adapter_config.json") && text.contains("`target_modules`"), "{text}");
    assert!(engine(&plain()).export_adapter(&folder).await.is_err());
}

#[tokio::test]
async fn what_is_not_offered_or_makes_no_sense_is_refused_by_name() {
    let base = engine(&plain());
    let rows = vec![row(&sampled(&base).await)];
    assert!(matches!(base.values(rows.clone()).await, Err(PolicyError::NoCritic)));
    let with = engine(&lora());
    assert!(with.values_backward(rows.clone(), vec![vec![f32::NAN; rows[0].ids.len()]]).await.is_err());
    assert!(with.values_backward(rows.clone(), vec![]).await.is_err());
    assert!(matches!(with.critic_step(step()).await, Err(PolicyError::NoGradient)));
    let refused = |config: PolicyConfig| {
        PolicyEngine::create(&config, tokenizer(), Seed::new(5)).map(|_| ()).unwrap_err().to_string()
    };
    let with_lora = |change: &dyn Fn(&mut LoraConfig)| {
        let mut config = LoraConfig::default();
        change(&mut config);
        refused(PolicyConfig { lora: Some(config), ..plain() })
    };
    assert!(with_lora(&|lora| lora.rank = 0).contains("`lora.rank`"));
    assert!(with_lora(&|lora| lora.alpha = f64::NAN).contains("`lora.alpha`"));
    assert!(with_lora(&|lora| lora.targets.clear()).contains("`lora.targets`"));
    assert!(with_lora(&|lora| lora.adapters = vec!["../x".into()]).contains("`lora.adapters`"));
    assert!(with_lora(&|lora| lora.adapters = vec!["critic".into()]).contains("a meaning of its own"));
    assert!(with_lora(&|lora| lora.adapters = vec!["a".into(), "a".into()]).contains("once"));
    let flex = PolicyConfig { device: PolicyDevice::Flex, ..plain() };
    assert!(refused(PolicyConfig { critic: lora().critic, ..flex.clone() }).contains("`critic`"));
    assert!(refused(PolicyConfig { gradient_checkpointing: true, ..flex }).contains("`gradient_checkpointing`"));
    assert!(refused(PolicyConfig { logits_bytes_max: 0, ..plain() }).contains("`logits_bytes_max`"));
}
