//! The policy through its public interface: sampling, training, checkpoints and how they fit together.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;

use fulgurite_core::id::{AttemptKey, AttemptNumber, PolicyVersion, RolloutId};
use fulgurite_core::llm::{
    ChatRequest, Completion, Constraint, FinishReason, KeptTokens, LlmError, LlmSession, Message, NotTrainable, Role,
    Sampling, SessionInfo,
};
use fulgurite_core::seed::Seed;
use fulgurite_core::training::{
    Aggregation, Correction, CorrectionRule, KlEstimator, KlTerm, LossSpec, OptimiserStep, RatioLevel, Stream,
    TrainingRow,
};
use fulgurite_policy::{PolicyConfig, PolicyDevice, PolicyEngine, PolicyError};
use futures::future::{maybe_done, try_join_all};
use futures::poll;
use support::{row, tokenizer};

/// Larger initial weights than the default: distributions are then peaked enough to show differences.
fn config() -> PolicyConfig {
    PolicyConfig { initial_std: 0.08, ..PolicyConfig::default() }
}

fn engine_with(config: &PolicyConfig) -> PolicyEngine {
    PolicyEngine::create(config, tokenizer(), Seed::new(5)).unwrap()
}

fn engine() -> PolicyEngine {
    engine_with(&config())
}

fn info(index: u64, sampling: Sampling) -> SessionInfo {
    let rollout = RolloutId::derived("test", 0, index).unwrap();
    let attempt = AttemptKey { rollout, attempt: AttemptNumber::FIRST };
    SessionInfo { attempt, item_id: "item".into(), seed: Seed::new(77).child_index(index), sampling, history: vec![] }
}

fn open(engine: &PolicyEngine, index: u64) -> Box<dyn LlmSession> {
    engine.backend().open(info(index, Sampling::default()))
}

fn request(messages: Vec<Message>, sampling: Sampling) -> Arc<ChatRequest> {
    Arc::new(ChatRequest { messages, tools: vec![], sampling, agent_role: "agent".into(), endpoint: None })
}

fn up_to(max_tokens: u32) -> Sampling {
    Sampling { max_tokens, ..Sampling::default() }
}

fn prompt(index: u64) -> Vec<Message> {
    let text = format!("Find a room for {index} people{}", " at 10:00".repeat(usize::try_from(index % 4).unwrap()));
    vec![Message::text(Role::User, text)]
}

fn step(learning_rate: f64) -> OptimiserStep {
    OptimiserStep { learning_rate, weight_decay: 0.0, gradient_norm_max: Some(1.0) }
}

async fn sample(
    engine: &PolicyEngine,
    indices: impl Iterator<Item = u64>,
    sampling: &Sampling,
) -> Vec<Arc<Completion>> {
    let sessions: Vec<_> = indices.map(|index| (index, open(engine, index))).collect();
    let calls = sessions.iter().map(|(index, session)| session.chat(0, request(prompt(*index), sampling.clone())));
    try_join_all(calls).await.unwrap()
}

#[tokio::test]
async fn a_call_draws_the_same_alone_and_among_a_hundred_others() {
    let engine = engine();
    let among = sample(&engine, 0..101, &up_to(60)).await;
    for index in [0, 41, 100] {
        let alone = sample(&engine, std::iter::once(index), &up_to(60)).await.remove(0);
        assert_eq!(alone, among[usize::try_from(index).unwrap()]);
    }
    for threads in [1, 3] {
        let engine = engine_with(&PolicyConfig { threads, kv_cache_bytes_max: 0, ..config() });
        assert_eq!(sample(&engine, 0..101, &up_to(60)).await, among, "{threads} threads");
    }
    let distinct: BTreeSet<_> = among.iter().map(|c| c.tokens.clone().unwrap().completion_ids).collect();
    assert!(distinct.len() > 90, "seeds differ");
}

#[tokio::test]
async fn the_members_of_a_group_share_their_prompt_and_draw_differently() {
    let engine = engine();
    let sessions: Vec<_> = (0..8).map(|index| open(&engine, index)).collect();
    let group =
        try_join_all(sessions.iter().map(|session| session.chat(0, request(prompt(3), up_to(20))))).await.unwrap();
    assert!(engine.statistics().reused_tokens > 0, "{:?}", engine.statistics());
    for (index, completion) in (0..).zip(&group) {
        let alone = open(&engine, index).chat(0, request(prompt(3), up_to(20))).await.unwrap();
        assert_eq!(alone, *completion);
    }
    assert!(group.windows(2).any(|pair| pair[0].text != pair[1].text));
}

async fn the_sampler_and_the_trainer_agree(device: PolicyDevice) {
    let engine = engine_with(&PolicyConfig { device, ..config() });
    // A few steps away from the initial weights, so that this is not about noise alone.
    for round in 0..3 {
        let rows = sample(&engine, round * 8..round * 8 + 8, &up_to(40)).await;
        let rows = (0..).zip(&rows).map(|(i, completion)| row(i, completion, 1.0)).collect();
        engine.forward_backward(rows, LossSpec::default()).await.unwrap();
        engine.optimiser_step(step(3e-3)).await.unwrap();
    }
    let completions = sample(&engine, 0..100, &Sampling::default()).await;
    let rows: Vec<TrainingRow> = (0..).zip(&completions).map(|(i, completion)| row(i, completion, 1.0)).collect();
    let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
    assert!(lengths.iter().min() < lengths.iter().max(), "ragged: {lengths:?}");
    let forward = engine.forward(rows.clone(), None).await.unwrap();
    let report = engine.forward_backward(rows.clone(), LossSpec::default()).await.unwrap();
    let differences: Vec<f64> = rows
        .iter()
        .zip(&forward)
        .flat_map(|(row, forward)| row.behaviour_log_probs.iter().zip(&forward.log_probs))
        .map(|(a, b)| f64::from(a - b).abs())
        .collect();
    let max = differences.iter().copied().fold(0.0, f64::max);
    println!("{device:?}: sampler against trainer: max {max:.2e}, mean {:.2e}", report.mismatch_mean);
    assert!((report.mismatch_max - max).abs() < 1e-9, "{max} {report:?}");
    if device == PolicyDevice::Cpu {
        // The same kernels: equal bit by bit.
        assert_eq!((max, report.ratio_max, report.ratio_mean), (0.0, 1.0, 1.0));
    } else {
        assert!(max <= 1e-4 && report.mismatch_mean <= 5e-6, "{report:?}");
        assert!((report.ratio_mean - 1.0).abs() < 1e-5 && report.clip_fraction == 0.0);
    }
    assert_eq!(engine.forward(rows, None).await.unwrap(), forward, "two forwards");
}

/// The CPU in its two ways, and the GPUs that this build and this machine have.
fn devices() -> Vec<PolicyDevice> {
    let gpus = PolicyDevice::findings().into_iter().filter(|finding| finding.usable).map(|finding| finding.device);
    [PolicyDevice::Flex].into_iter().chain(gpus).collect()
}

#[tokio::test]
async fn the_sampler_and_the_trainer_agree_on_every_device() {
    for device in devices() {
        the_sampler_and_the_trainer_agree(device).await;
    }
}

#[tokio::test]
async fn a_later_prompt_extends_the_earlier_call_token_by_token() {
    let engine = engine();
    let session = open(&engine, 1);
    for with_response_id in [true, false] {
        let mut messages = prompt(2);
        let mut known: Vec<u32> = vec![];
        for call in 0..3 {
            let call = call + if with_response_id { 0 } else { 10 };
            let completion =
                Arc::unwrap_or_clone(session.chat(call, request(messages.clone(), up_to(9))).await.unwrap());
            let tokens = completion.tokens.clone().unwrap();
            assert!(tokens.prompt_ids.starts_with(&known), "call {call}");
            assert!(tokens.prompt_ids.len() > known.len());
            known = [tokens.prompt_ids, tokens.completion_ids].concat();
            let mut answer = Message::text(Role::Assistant, completion.text);
            answer.tool_calls = completion.tool_calls;
            answer.response_id = with_response_id.then_some(completion.response_id);
            messages.extend([answer, Message::text(Role::Tool, "R07 is free")]);
        }
        assert!(engine.statistics().reused_tokens > 0);
        // The same call without anything kept from earlier ones gives the same tokens.
        let last = Arc::unwrap_or_clone(session.chat(30, request(messages.clone(), up_to(9))).await.unwrap());
        let cold = engine_with(&PolicyConfig { kv_cache_bytes_max: 0, ..config() });
        let fresh = Arc::unwrap_or_clone(open(&cold, 1).chat(30, request(messages, up_to(9))).await.unwrap());
        let (last, fresh) = (last.tokens.clone().unwrap(), fresh.tokens.unwrap());
        if last.prompt_ids == fresh.prompt_ids {
            assert_eq!((last.completion_ids, last.log_probs), (fresh.completion_ids, fresh.log_probs));
        }
    }
}

#[tokio::test]
async fn a_kept_cache_gives_the_bits_of_a_cold_start() {
    let (warm, cold) = (engine(), engine_with(&PolicyConfig { kv_cache_bytes_max: 0, ..config() }));
    let converse = async |engine: &PolicyEngine| {
        let session = open(engine, 4);
        let mut messages = prompt(2);
        let mut all = vec![];
        for call in 0..4 {
            let completion =
                Arc::unwrap_or_clone(session.chat(call, request(messages.clone(), up_to(7))).await.unwrap());
            let mut answer = Message::text(Role::Assistant, completion.text.clone());
            answer.response_id = Some(completion.response_id.clone());
            messages.extend([answer, Message::text(Role::User, "again")]);
            all.push(completion);
        }
        all
    };
    assert_eq!(converse(&warm).await, converse(&cold).await);
    assert!(warm.statistics().reused_tokens > 0 && cold.statistics().reused_tokens == 0);
}

#[tokio::test]
async fn a_round_waits_for_every_open_session_and_a_dropped_one_frees_it() {
    // Long enough that only the sessions themselves can start the round.
    let engine = engine_with(&PolicyConfig { batch_wait_ms_max: 3_600_000, ..config() });
    let (first, second, third) = (open(&engine, 0), open(&engine, 1), open(&engine, 2));
    let mut calls = [first.chat(0, request(prompt(0), up_to(5))), second.chat(0, request(prompt(1), up_to(5)))];
    for call in &mut calls {
        assert!(poll!(call).is_pending());
    }
    let mut cancelled = third.chat(0, request(prompt(2), up_to(5)));
    // Not polled yet: the third session does not wait for the policy.
    assert_eq!(engine.statistics().calls, 0);
    drop(third);
    let [first_call, second_call] = calls;
    first_call.await.unwrap();
    second_call.await.unwrap();
    // Its future may outlive the session.
    assert!(poll!(&mut cancelled).is_pending() || engine.statistics().calls == 3);

    // A cancelled call leaves its session open: the others wait until it asks again or goes.
    let mut call = first.chat(1, request(prompt(0), up_to(5)));
    assert!(poll!(&mut call).is_pending());
    drop(call);
    let waiting = second.chat(1, request(prompt(1), up_to(5)));
    drop(first);
    waiting.await.unwrap();
}

/// Lets the engine's threads work until it has started as many calls.
async fn started(engine: &PolicyEngine, calls: u64) {
    while engine.statistics().calls < calls {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_call_cancelled_while_it_is_drawn_leaves_its_neighbours_alone() {
    let engine = engine_with(&PolicyConfig { batch_wait_ms_max: 3_600_000, ..config() });
    let (first, second) = (open(&engine, 0), open(&engine, 1));
    let mut cancelled = first.chat(0, request(prompt(0), Sampling::default()));
    assert!(poll!(&mut cancelled).is_pending(), "the round waits for the second session");
    // Asking starts the round, which may end before this thread runs again: the poll is not required to be pending.
    let mut kept = maybe_done(second.chat(0, request(prompt(1), up_to(50))));
    let _ = poll!(&mut kept);
    started(&engine, 2).await;
    drop(cancelled);
    (&mut kept).await;
    let kept = Pin::new(&mut kept).take_output().unwrap().unwrap();
    assert_eq!(kept, sample(&engine_with(&config()), std::iter::once(1), &up_to(50)).await[0]);
    drop(second);
    first.chat(1, request(prompt(0), up_to(3))).await.unwrap();
}

#[tokio::test]
async fn calls_in_flight_end_on_their_weights_and_later_ones_start_on_the_new() {
    let engine = engine();
    let expected = sample(&engine_with(&config()), 0..60, &Sampling::default()).await;
    engine.forward_backward(demonstrations(&engine), LossSpec::default()).await.unwrap();
    let sessions: Vec<_> = (0..60).map(|index| open(&engine, index)).collect();
    let mut calls = maybe_done(try_join_all(
        (0..).zip(&sessions).map(|(index, session)| session.chat(0, request(prompt(index), Sampling::default()))),
    ));
    let _ = poll!(&mut calls);
    started(&engine, 60).await;
    engine.optimiser_step(step(0.05)).await.unwrap();
    (&mut calls).await;
    assert_eq!(Pin::new(&mut calls).take_output().unwrap().unwrap(), expected);
    let later = sessions[0].chat(1, request(prompt(0), up_to(3)));
    drop(sessions);
    assert_eq!(later.await.unwrap().tokens.clone().unwrap().policy_version, PolicyVersion(1));
}

#[tokio::test]
async fn an_idle_engine_starts_without_a_session_that_is_busy_elsewhere() {
    let engine = engine_with(&PolicyConfig { batch_wait_ms_max: 1, ..config() });
    let _elsewhere = open(&engine, 0);
    open(&engine, 1).chat(0, request(prompt(0), up_to(5))).await.unwrap();
}

#[tokio::test]
async fn completions_end_where_the_request_says() {
    let engine = engine();
    let session = open(&engine, 0);
    let ask = async |call, sampling: Sampling| session.chat(call, request(prompt(1), sampling)).await;
    let long = ask(0, up_to(5)).await.unwrap();
    assert_eq!((long.finish_reason, long.usage.completion_tokens), (FinishReason::Length, 5));
    let full = ask(0, Sampling::default()).await.unwrap();
    let tokens = full.tokens.clone().unwrap();
    if full.finish_reason == FinishReason::ContextLength {
        assert_eq!(tokens.prompt_ids.len() + tokens.completion_ids.len(), engine.context_tokens_max());
    }
    // The first bytes of the text that was drawn, as a stop text.
    let stop: String = long.text.chars().skip(1).take(1).collect();
    let stopped = ask(0, Sampling { stop: vec![stop.clone()], ..up_to(5) }).await.unwrap();
    assert_eq!(stopped.finish_reason, FinishReason::Stop);
    assert!(!stopped.text.contains(&stop) && long.text.starts_with(&stopped.text));

    let greedy = ask(1, Sampling { temperature: 0.0, ..up_to(8) }).await.unwrap();
    let again = ask(2, Sampling { temperature: 0.0, ..up_to(8) }).await.unwrap();
    assert_eq!(greedy.text, again.text);
    assert_eq!(greedy.not_trainable, Some(NotTrainable::TruncatedSampling));
    let seeded = ask(3, Sampling { seed: Some(9), ..up_to(8) }).await.unwrap();
    assert_eq!(seeded.text, ask(4, Sampling { seed: Some(9), ..up_to(8) }).await.unwrap().text);
    let truncated = ask(5, Sampling { top_k: 3, ..up_to(8) }).await.unwrap();
    assert_eq!(truncated.not_trainable, Some(NotTrainable::TruncatedSampling));
    assert_eq!(truncated.tokens.clone().unwrap().processed_log_probs.len(), 8);
    let plain = ask(6, up_to(8)).await.unwrap();
    assert_eq!((plain.not_trainable.clone(), plain.tokens.clone().unwrap().processed_log_probs.len()), (None, 0));
}

#[tokio::test]
async fn the_session_fills_defaults_and_an_evaluation_decides_the_temperature() {
    let engine = engine();
    let session = engine.backend().open(info(0, Sampling { temperature: 0.0, ..up_to(4) }));
    let asked = Sampling { temperature: 0.9, ..Sampling::default() };
    let completion = Arc::unwrap_or_clone(session.chat(0, request(prompt(0), asked)).await.unwrap());
    assert_eq!(completion.usage.completion_tokens, 4);
    assert_eq!(completion.not_trainable, Some(NotTrainable::TruncatedSampling), "greedy");
}

#[tokio::test]
async fn requests_that_cannot_be_served_are_typed_errors() {
    let engine = engine();
    let session = open(&engine, 0);
    let with = |change: &dyn Fn(&mut ChatRequest)| {
        let mut request = request(prompt(0), up_to(3));
        change(Arc::make_mut(&mut request));
        session.chat(0, request)
    };
    let invalid = |error: LlmError| matches!(error, LlmError::InvalidRequest(_));
    assert!(invalid(with(&|r| r.sampling.temperature = f32::NAN).await.unwrap_err()));
    assert!(invalid(with(&|r| r.sampling.temperature = -1.0).await.unwrap_err()));
    assert!(invalid(with(&|r| r.sampling.top_p = 0.0).await.unwrap_err()));
    assert!(invalid(with(&|r| r.sampling.stop = vec![String::new()]).await.unwrap_err()));
    assert!(invalid(with(&|r| r.messages.clear()).await.unwrap_err()));
    assert!(invalid(with(&|r| r.sampling.constraint = Some(Constraint::Regex("(".into()))).await.unwrap_err()));
    let elsewhere = with(&|r| r.endpoint = Some("judge".into())).await;
    assert_eq!(elsewhere.unwrap_err(), LlmError::UnknownEndpoint("judge".into()));
    for words in [200, 1_000_000] {
        let long = with(&|r| r.messages = vec![Message::text(Role::User, "room ".repeat(words))]).await.unwrap_err();
        let LlmError::ContextLengthExceeded { prompt_tokens, context_tokens_max } = long else { panic!("{long:?}") };
        assert!(prompt_tokens >= 128 && context_tokens_max == 128);
    }
}

fn demonstrations(engine: &PolicyEngine) -> Vec<TrainingRow> {
    (0..16_u32)
        .map(|index| {
            let messages = [
                Message::text(Role::User, format!("room for {index}")),
                Message::text(Role::Assistant, format!("R{:02}", (index * 5) % 12)),
            ];
            let encoded = engine.encode_demonstration(&messages, &[Role::Assistant]).unwrap();
            let len = encoded.ids.len();
            TrainingRow {
                sequence: index,
                ids: encoded.ids,
                weights: encoded.mask.iter().map(|on| f32::from(u8::from(*on))).collect(),
                mask: encoded.mask,
                behaviour_log_probs: vec![0.0; len],
                old_log_probs: vec![],
                calls: vec![],
                group: None,
                stream: Stream::Ce,
                temperature: 1.0,
                policy_version: PolicyVersion(0),
                kept: KeptTokens::default(),
            }
        })
        .collect()
}

#[tokio::test]
async fn demonstrations_are_learned_and_then_drawn() {
    let engine = engine_with(&PolicyConfig::default());
    let rows = demonstrations(&engine);
    let mut losses = vec![];
    for _ in 0..80 {
        let report = engine.forward_backward(rows.clone(), LossSpec::default()).await.unwrap();
        losses.push(report.loss);
        assert!((report.loss - report.cross_entropy).abs() < 1e-6);
        let stepped = engine.optimiser_step(step(3e-3)).await.unwrap();
        assert!(!stepped.skipped && stepped.gradient_norm > 0.0);
    }
    assert!(losses[0] > 5.0 && losses[79] < 0.05, "{losses:?}");
    let session = engine.backend().open(info(0, Sampling { temperature: 0.0, ..Sampling::default() }));
    for index in 0..16_u64 {
        let messages = vec![Message::text(Role::User, format!("room for {index}"))];
        let completion =
            Arc::unwrap_or_clone(session.chat(index, request(messages, Sampling::default())).await.unwrap());
        assert_eq!(
            (completion.text, completion.finish_reason),
            (format!("R{:02}", (index * 5) % 12), FinishReason::Stop)
        );
    }
    assert_eq!(engine.version(), PolicyVersion(80));
}

#[tokio::test]
async fn rewarded_answers_become_likelier() {
    let engine = engine_with(&PolicyConfig::default());
    let wanted = *engine.tokenizer().encode("R07").unwrap().first().unwrap();
    let mut shares = vec![];
    for _ in 0..40 {
        let completions = sample(&engine, 0..64, &up_to(1)).await;
        let hits = |c: &Completion| c.tokens.as_ref().unwrap().completion_ids.contains(&wanted);
        let share = completions.iter().filter(|c| hits(c)).count() as f32 / 64.0;
        shares.push(share);
        let rows = (0..).zip(&completions).map(|(i, c)| row(i, c, f32::from(u8::from(hits(c))) - share)).collect();
        engine.forward_backward(rows, LossSpec::default()).await.unwrap();
        // Groups without variance change nothing but the moments.
        engine.optimiser_step(step(if share > 0.0 { 3e-3 } else { 0.0 })).await.unwrap();
        if share == 0.0 {
            let rows: Vec<TrainingRow> = demonstrations(&engine).into_iter().take(12).collect();
            engine.forward_backward(rows, LossSpec::default()).await.unwrap();
            engine.optimiser_step(step(1e-3)).await.unwrap();
        }
    }
    assert!(shares[39] > 0.9, "{shares:?}");
}

#[tokio::test]
async fn learning_rate_0_changes_no_bit_and_nothing_gathered_is_an_error() {
    let engine = engine();
    let before = engine.weights_hash();
    assert!(matches!(engine.optimiser_step(step(0.1)).await.unwrap_err(), PolicyError::NoGradient));
    for version in 1..=5 {
        engine.forward_backward(demonstrations(&engine), LossSpec::default()).await.unwrap();
        let decayed = OptimiserStep { weight_decay: 0.1, ..step(0.0) };
        let report = engine.optimiser_step(decayed).await.unwrap();
        assert_eq!(report.policy_version, PolicyVersion(version));
    }
    assert_eq!(engine.weights_hash(), before);
    engine.forward_backward(demonstrations(&engine), LossSpec::default()).await.unwrap();
    engine.optimiser_step(step(1e-3)).await.unwrap();
    assert_ne!(engine.weights_hash(), before);
    assert!(engine.optimiser_step(step(f64::NAN)).await.is_err());
}

fn regularised() -> LossSpec {
    LossSpec {
        aggregation: Aggregation::SequenceMeanTokenMean,
        kl: Some(KlTerm { estimator: KlEstimator::K3, coefficient: 0.1 }),
        entropy_coefficient: 0.01,
        correction: Some(Correction {
            level: RatioLevel::SequenceMean,
            rule: CorrectionRule::Truncate { max: 2.0 },
            batch_normalise: false,
        }),
        ..LossSpec::default()
    }
}

/// One update of sampling and training.
async fn update(engine: &PolicyEngine, round: u64) {
    let completions = sample(engine, round * 8..round * 8 + 8, &up_to(12)).await;
    let weight = |i: u32| if i.is_multiple_of(2) { 1.0 } else { -0.5 };
    let rows = (0..).zip(&completions).map(|(i, c)| row(i, c, weight(i))).collect();
    let report = engine.forward_backward(rows, regularised()).await.unwrap();
    assert!(round == 0 || report.reference_kl > 0.0);
    engine.optimiser_step(step(1e-3)).await.unwrap();
}

#[tokio::test]
async fn going_on_from_a_checkpoint_is_going_on() {
    let straight = engine();
    straight.snapshot("reference").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (saved, pending) = (dir.path().join("saved"), dir.path().join("pending"));
    for round in 0..6 {
        if round == 3 {
            straight.save(&saved).await.unwrap();
        }
        update(&straight, round).await;
    }

    let reopened = PolicyEngine::open(&saved, &config()).unwrap();
    let restored = engine();
    restored.snapshot("another").await.unwrap();
    restored.restore(&saved).await.unwrap();
    for engine in [&reopened, &restored] {
        assert_eq!(engine.version(), PolicyVersion(3));
        for round in 3..6 {
            update(engine, round).await;
        }
        assert_eq!((engine.weights_hash(), engine.version()), (straight.weights_hash(), straight.version()));
    }
    let gone = restored.forward(demonstrations(&restored), Some("another".into())).await.unwrap_err();
    assert!(matches!(gone, PolicyError::UnknownSnapshot(_)), "restoring replaces snapshots");

    // A gradient that waits for its step is part of the state.
    straight.forward_backward(demonstrations(&straight), LossSpec::default()).await.unwrap();
    straight.save(&pending).await.unwrap();
    let reopened = PolicyEngine::open(&pending, &config()).unwrap();
    for engine in [&straight, &reopened] {
        engine.optimiser_step(step(1e-3)).await.unwrap();
    }
    assert_eq!(reopened.weights_hash(), straight.weights_hash());

    // What is written is a function of the state alone.
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    straight.save(&a).await.unwrap();
    reopened.save(&b).await.unwrap();
    for entry in std::fs::read_dir(&a).unwrap() {
        let name = entry.unwrap().file_name();
        assert_eq!(std::fs::read(a.join(&name)).unwrap(), std::fs::read(b.join(&name)).unwrap(), "{}", name.display());
    }
}

#[tokio::test]
async fn one_seed_gives_one_run_and_resetting_forgets_the_moments() {
    let runs = [engine(), engine()];
    for engine in &runs {
        engine.snapshot("reference").await.unwrap();
        for round in 0..3 {
            update(engine, round).await;
        }
    }
    assert_eq!(runs[0].weights_hash(), runs[1].weights_hash());
    runs[0].reset_optimiser().await.unwrap();
    for engine in &runs {
        update(engine, 4).await;
    }
    assert_ne!(runs[0].weights_hash(), runs[1].weights_hash());
}

#[tokio::test]
async fn checkpoints_that_do_not_fit_are_refused_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let other = engine_with(&PolicyConfig { layers: Some(2), ..config() });
    other.save(dir.path()).await.unwrap();
    let engine = engine();
    let before = engine.weights_hash();
    assert!(engine.restore(dir.path()).await.unwrap_err().to_string().contains("other sizes"));
    engine.save(dir.path()).await.unwrap();
    std::fs::write(dir.path().join("model.safetensors"), b"broken").unwrap();
    let error = engine.restore(dir.path()).await.unwrap_err().to_string();
    assert!(error.contains("model.safetensors"), "{error}");
    std::fs::remove_file(dir.path().join("state.json")).unwrap();
    assert!(matches!(engine.restore(dir.path()).await.unwrap_err(), PolicyError::Io { .. }));
    assert_eq!(engine.weights_hash(), before);
}

#[tokio::test]
async fn batches_that_do_not_fit_are_refused() {
    let engine = engine();
    let mut rows = demonstrations(&engine);
    let without_reference = engine.forward_backward(rows.clone(), regularised()).await.unwrap_err();
    assert!(matches!(without_reference, PolicyError::UnknownSnapshot(_)));
    assert!(engine.backward(rows.clone(), vec![]).await.is_err());
    rows[0].ids[0] = 1 << 20;
    assert!(matches!(engine.forward_backward(rows, LossSpec::default()).await, Err(PolicyError::InvalidBatch(_))));
    let long = [Message::text(Role::Assistant, "room ".repeat(200))];
    let error = engine.encode_demonstration(&long, &[Role::Assistant]).unwrap_err();
    assert!(matches!(error, PolicyError::DemonstrationTooLong { context_tokens_max: 128, .. }));
}
