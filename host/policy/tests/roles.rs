//! Several models behind one backend: who answers, what a session remembers, and that nobody waits for a session that waits itself.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
use fulgurite_core::llm::{ChatRequest, Completion, LlmSession, Message, Role, Sampling, SessionInfo};
use fulgurite_core::seed::Seed;
use fulgurite_core::training::{LossSpec, OptimiserStep, Stream, TrainingRow};
use fulgurite_policy::{LoraConfig, PolicyConfig, PolicyEngine, PolicyTokenizer, TokenizerConfig};

fn roles(models: &[(&str, &str)]) -> BTreeMap<String, String> {
    models.iter().map(|(role, model)| ((*role).to_owned(), (*model).to_owned())).collect()
}

fn adapters() -> PolicyConfig {
    let lora = LoraConfig {
        rank: 4,
        alpha: 8.0,
        adapters: vec!["checking".into(), "writing".into()],
        ..LoraConfig::default()
    };
    let roles = roles(&[("writer", "writing"), ("rewriter", "writing"), ("checker", "checking")]);
    PolicyConfig { lora: Some(lora), roles, ..plain() }
}

fn whole() -> PolicyConfig {
    PolicyConfig { models: vec!["writing".into()], roles: roles(&[("writer", "writing")]), ..plain() }
}

fn plain() -> PolicyConfig {
    PolicyConfig { initial_std: 0.08, threads: 2, ..PolicyConfig::default() }
}

fn engine(config: &PolicyConfig) -> PolicyEngine {
    let corpus = (0..60).map(|i| format!("Find a room for {} people. R{:02} is free.", i % 20, i % 12));
    let tokenizer = PolicyTokenizer::train(corpus, &TokenizerConfig::default()).unwrap();
    PolicyEngine::create(config, tokenizer, Seed::new(5)).unwrap()
}

fn session(engine: &PolicyEngine, number: u64) -> Box<dyn LlmSession> {
    let attempt = AttemptKey { rollout: RolloutId::derived("test", 0, number).unwrap(), attempt: AttemptNumber::FIRST };
    let sampling = Sampling { max_tokens: 16, ..Sampling::default() };
    let seed = Seed::new(7).child_index(number);
    engine.backend().open(SessionInfo { attempt, item_id: "item".into(), seed, sampling, history: vec![] })
}

fn request(role: &str, messages: Vec<Message>) -> Arc<ChatRequest> {
    let sampling = Sampling::default();
    Arc::new(ChatRequest { messages, tools: vec![], sampling, agent_role: role.to_owned(), endpoint: None })
}

fn ask(role: &str) -> Arc<ChatRequest> {
    request(role, vec![Message::text(Role::User, "Find a room for 4 people")])
}

/// Moves a model away from the others.
async fn train(model: &PolicyEngine, completion: &Completion) {
    let tokens = completion.tokens.clone().unwrap();
    let before = tokens.prompt_ids.len();
    let ids = [tokens.prompt_ids, tokens.completion_ids].concat();
    let row = TrainingRow {
        sequence: 0,
        mask: (0..ids.len()).map(|at| at >= before).collect(),
        weights: vec![1.0; ids.len()],
        behaviour_log_probs: vec![0.0; ids.len()],
        old_log_probs: vec![],
        calls: vec![],
        group: None,
        ids,
        stream: Stream::Ce,
        temperature: 1.0,
        policy_version: tokens.policy_version,
        kept: tokens.kept,
    };
    model.forward_backward(vec![row], LossSpec::default()).await.unwrap();
    let step = OptimiserStep { learning_rate: 3e-2, weight_decay: 0.0, gradient_norm_max: None };
    model.optimiser_step(step).await.unwrap();
}

#[tokio::test]
async fn each_role_is_answered_by_its_model_and_says_so() {
    for config in [adapters(), whole()] {
        let engine = engine(&config);
        let first = session(&engine, 0).chat(0, ask("writer")).await.unwrap();
        let writing = engine.named("writing").unwrap();
        train(&writing, &first).await;
        assert_eq!((writing.version().0, engine.version().0), (1, 0));
        let names: Vec<Option<String>> = engine.all().map(|model| model.name().map(str::to_owned)).collect();
        assert_eq!(names.first(), Some(&None), "the policy is the first of {names:?}");

        let mut seen = vec![];
        for (role, model) in [("writer", Some("writing")), ("anybody", None)] {
            let answer = session(&engine, 1).chat(0, ask(role)).await.unwrap();
            let tokens = answer.tokens.clone().unwrap();
            assert_eq!(tokens.model.as_deref(), model, "{role}");
            assert_eq!(tokens.policy_version.0, u64::from(model.is_some()), "{role}");
            // The very same that the model says without a role.
            let handle = model.map_or_else(|| engine.clone(), |name| engine.named(name).unwrap());
            let alone = session(&handle, 1).chat(0, ask("anybody")).await.unwrap();
            assert_eq!(alone.tokens.clone().unwrap(), tokens, "{role}");
            seen.push(tokens.log_probs);
        }
        assert_ne!(seen[0], seen[1], "the trained model differs from the other one");
    }
}

#[tokio::test]
async fn a_model_sees_what_another_drew_as_the_tokens_that_were_drawn() {
    let engine = engine(&adapters());
    let session = session(&engine, 0);
    let first = session.chat(0, ask("writer")).await.unwrap();
    let mut repeated = Message::text(Role::Assistant, first.text.clone());
    repeated.response_id = Some(first.response_id.clone());
    let user = |text: &str| Message::text(Role::User, text);
    let messages = vec![user("Find a room for 4 people"), repeated, user("Is it free?")];
    let second = session.chat(1, request("checker", messages)).await.unwrap();
    let (first, second) = (first.tokens.clone().unwrap(), second.tokens.clone().unwrap());
    assert_eq!((first.model.as_deref(), second.model.as_deref()), (Some("writing"), Some("checking")));
    let seen = [first.prompt_ids, first.completion_ids].concat();
    assert!(second.prompt_ids.starts_with(&seen), "the answer was tokenised again");
}

/// A decode step starts when every live rollout waits on one of the models. Were a session that waits for another model waited for,
/// this would take ten minutes.
#[tokio::test]
async fn sessions_that_wait_for_other_models_hold_nobody_up() {
    let engine = engine(&PolicyConfig { batch_wait_ms_max: 600_000, ..adapters() });
    let round = |call: u64| {
        let engine = &engine;
        async move {
            let sessions: Vec<_> = (0..5).map(|number| session(engine, number)).collect();
            let roles = ["writer", "checker", "anybody", "rewriter", "checker"];
            let calls = sessions.iter().zip(roles).map(|(session, role)| session.chat(call, ask(role)));
            futures::future::join_all(calls)
                .await
                .into_iter()
                .map(|answer| answer.unwrap().tokens.clone().unwrap())
                .collect()
        }
    };
    let limit = Duration::from_mins(1);
    let together: Vec<_> = tokio::time::timeout(limit, round(0)).await.unwrap();
    // A call that is dropped, and one that is read as it is drawn, are let go of in every model.
    let pair = [session(&engine, 0), session(&engine, 1)];
    drop(pair[0].chat(0, ask("writer")));
    drop(pair[0].stream(0, ask("checker")));
    let both = futures::future::join(pair[0].chat(1, ask("writer")), pair[1].chat(0, ask("checker")));
    let (_, checked) = tokio::time::timeout(limit, both).await.unwrap();
    // What a call draws does not depend on who else asks whom.
    assert_eq!(checked.unwrap().tokens.clone().unwrap(), together[1]);
    drop(pair);
    let again: Vec<_> = tokio::time::timeout(limit, round(0)).await.unwrap();
    assert_eq!(again, together);
}

#[tokio::test]
async fn going_on_from_a_checkpoint_of_whole_models_is_going_on() {
    let dir = tempfile::tempdir().unwrap();
    let straight = engine(&whole());
    let answer = session(&straight, 0).chat(0, ask("writer")).await.unwrap();
    train(&straight.named("writing").unwrap(), &answer).await;
    straight.named("writing").unwrap().snapshot("reference").await.unwrap();
    train(&straight.named("writing").unwrap(), &answer).await;
    train(&straight, &answer).await;
    straight.save(dir.path()).await.unwrap();

    let restored = engine(&whole());
    restored.restore(dir.path()).await.unwrap();
    for engine in [&straight, &restored] {
        train(&engine.named("writing").unwrap(), &answer).await;
        train(engine, &answer).await;
    }
    let hashes =
        |engine: &PolicyEngine| engine.all().map(|model| (model.weights_hash(), model.version())).collect::<Vec<_>>();
    assert_eq!(hashes(&restored), hashes(&straight));
    let found = hashes(&straight);
    assert_eq!((found[0].1.0, found[1].1.0), (2, 3));
    assert_ne!(found[0].0, found[1].0);
    // Another set of models is another policy.
    let text = engine(&plain()).restore(dir.path()).await.unwrap_err().to_string();
    assert!(text.contains("further models"), "{text}");
    // The further model is a folder that can be opened by itself.
    let opened = PolicyEngine::create(&plain(), straight.tokenizer().clone(), Seed::new(1)).unwrap();
    assert!(dir.path().join("models/writing/config.json").is_file());
    assert!(opened.named("writing").is_err());
}
