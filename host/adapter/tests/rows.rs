//! Spans to transitions to rows, by hand-worked cases and by properties (ALGORITHMS.md sections 9, 16 and 17).

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::sync::Arc;

use fulgurite_adapter::{AdapterError, Sequence, Trajectory, Transition, of_roles, rows, rows_that_fit, transitions};
use fulgurite_core::algorithm::{BatchEntry, Scope, Weights};
use fulgurite_core::id::{
    AttemptKey, AttemptNumber, PolicyVersion, ResponseId, RolloutId, SpanId, TraceId, TransitionId,
};
use fulgurite_core::llm::{Completion, FinishReason, KeptTokens, LlmError, NotTrainable, Sampling, TokenData, Usage};
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::span::{LlmCall, Span, SpanBody, SpanKind, SpanStatus};
use fulgurite_core::training::{Stream, TrainingRow};
use proptest::prelude::*;

const NO_LIMIT: usize = usize::MAX;

fn span(call_index: u64, agent_role: &str, result: Result<Completion, LlmError>) -> Span {
    let attempt = AttemptKey { rollout: RolloutId::new("r").unwrap(), attempt: AttemptNumber(1) };
    Span {
        attempt,
        sequence: call_index,
        trace_id: TraceId(1),
        span_id: SpanId(call_index + 1),
        parent: None,
        name: "chat".to_owned(),
        kind: SpanKind::Client,
        start_ns: 0,
        end_ns: 0,
        status: SpanStatus::Ok,
        guest_attributes: vec![],
        links: vec![],
        body: SpanBody::Llm(Box::new(LlmCall {
            call_index,
            messages: vec![],
            new_messages: vec![],
            tools: None,
            sampling: Sampling::default(),
            agent_role: agent_role.to_owned(),
            endpoint: None,
            result: result.map(std::sync::Arc::new),
        })),
    }
}

/// Log-prob of a token: any function of it will do.
#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn log_prob(call_index: u64, place: usize) -> f32 {
    -0.5 - call_index as f32 - 0.01 * place as f32
}

fn completion(call_index: u64, prompt: &[u32], drawn: &[u32]) -> Completion {
    Completion {
        text: format!("answer {call_index}"),
        tool_calls: vec![],
        finish_reason: FinishReason::Stop,
        usage: Usage::default(),
        response_id: ResponseId(format!("r/1/{call_index}")),
        tokens: Some(TokenData {
            prompt_ids: prompt.to_vec(),
            completion_ids: drawn.to_vec(),
            log_probs: (0..drawn.len()).map(|place| log_prob(call_index, place)).collect(),
            processed_log_probs: vec![],
            policy_version: PolicyVersion(3),
            token_versions: vec![],
            kept: KeptTokens::default(),
            model: None,
        }),
        not_trainable: None,
    }
}

/// Transitions of calls given as (prompt, completion).
fn of_calls(calls: &[(&[u32], &[u32])]) -> Vec<Transition> {
    let spans: Vec<Span> = (0..)
        .zip(calls)
        .map(|(index, (prompt, drawn))| span(index, "solver", Ok(completion(index, prompt, drawn))))
        .collect();
    transitions(&spans, &[])
}

fn entry(transition: &Transition, stream: Stream, scope: Scope, weights: Weights) -> (Arc<Transition>, BatchEntry) {
    let entry = BatchEntry { transition: transition.id.clone(), stream, scope, weights, group: None };
    (Arc::new(transition.clone()), entry)
}

fn sampled(transition: &Transition, weight: f32) -> (Arc<Transition>, BatchEntry) {
    entry(transition, Stream::Rl, Scope::Sampled, Weights::Scalar(weight))
}

fn sequence(transitions: &[Transition], weight: f32) -> Sequence {
    Sequence {
        entries: transitions.iter().map(|transition| sampled(transition, weight)).collect(),
        ..Sequence::default()
    }
}

fn weights(rows: &[TrainingRow]) -> Vec<Vec<f32>> {
    rows.iter().map(|row| row.weights.clone()).collect()
}

#[test]
fn golden_44_advantage_broadcast() {
    // One token of prompt, one drawn, one observed; the second call draws nothing.
    let calls = of_calls(&[(&[7], &[8]), (&[7, 8, 9], &[])]);
    let rows = rows(&[sequence(&calls, 0.7)], NO_LIMIT).unwrap();
    assert_eq!(weights(&rows), [[0.0, 0.7, 0.0]]);
    assert_eq!(rows[0].ids, [7, 8, 9]);
    assert_eq!(rows[0].mask, [false, true, false]);
    assert_eq!(rows[0].behaviour_log_probs, [0.0, log_prob(0, 0), 0.0]);
}

#[test]
fn golden_40_one_advantage_for_all_rows_of_a_rollout() {
    // Masks [1,1,0] and [1,0,0] of rollout A and [1,1,1] of rollout B, each behind one token of prompt.
    let a = of_calls(&[(&[1], &[2, 3]), (&[1, 2, 3, 4], &[]), (&[9], &[5]), (&[9, 5, 6, 7], &[])]);
    let b = of_calls(&[(&[1], &[2, 3, 4])]);
    let rows = rows(&[sequence(&a, 2.0), sequence(&b, -1.0)], NO_LIMIT).unwrap();
    assert_eq!(weights(&rows), [[0.0, 2.0, 2.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, -1.0, -1.0, -1.0]]);
    assert_eq!(rows.iter().map(|row| row.sequence).collect::<Vec<_>>(), [0, 0, 1]);
}

#[test]
fn a_conversation_is_one_row_and_a_rewritten_prompt_starts_another() {
    let calls = of_calls(&[(&[1, 2], &[3]), (&[1, 2, 3, 4], &[5, 6]), (&[1, 2, 9], &[7]), (&[1, 2, 9, 7, 8], &[1])]);
    let rows = rows(&[sequence(&calls, 1.0)], NO_LIMIT).unwrap();
    assert_eq!(
        rows.iter().map(|row| row.ids.clone()).collect::<Vec<_>>(),
        [vec![1, 2, 3, 4, 5, 6], vec![1, 2, 9, 7, 8, 1]]
    );
    assert_eq!(rows[1].mask, [false, false, false, true, false, true]);
    assert_eq!(rows[1].behaviour_log_probs, [0.0, 0.0, 0.0, log_prob(2, 0), 0.0, log_prob(3, 0)]);
    assert!(rows.iter().all(|row| row.policy_version == PolicyVersion(3) && row.old_log_probs.is_empty()));
}

#[test]
fn after_parallel_calls_the_row_that_fits_goes_on() {
    let calls = of_calls(&[(&[1], &[2]), (&[1], &[3]), (&[1, 2, 4], &[5]), (&[1, 3, 4], &[6])]);
    let rows = rows(&[sequence(&calls, 1.0)], NO_LIMIT).unwrap();
    assert_eq!(rows.iter().map(|row| row.ids.clone()).collect::<Vec<_>>(), [[1, 2, 4, 5], [1, 3, 4, 6]]);
}

#[test]
fn a_call_left_out_stays_context() {
    let mut calls = of_calls(&[(&[1], &[2]), (&[1, 2, 3], &[4]), (&[1, 2, 3, 4, 5], &[6])]);
    calls[1].agent_role = "critic".to_owned();
    let roles = ["solver".to_owned()];
    let chosen: Vec<Transition> = of_roles(&calls, &roles).cloned().collect();
    assert_eq!(chosen.len(), 2);
    let rows = rows(&[sequence(&chosen, 1.0)], NO_LIMIT).unwrap();
    assert_eq!(weights(&rows), [[0.0, 1.0, 0.0, 0.0, 0.0, 1.0]]);
}

#[test]
fn other_weights_or_temperature_start_another_row() {
    let mut calls = of_calls(&[(&[1], &[2]), (&[1, 2, 3], &[4]), (&[1, 2, 3, 4, 5], &[6])]);
    calls[1].tokens.as_mut().unwrap().policy_version = PolicyVersion(4);
    calls[2].temperature = 0.5;
    let rows = rows(&[sequence(&calls, 1.0)], NO_LIMIT).unwrap();
    assert_eq!(rows.len(), 3);
    assert_eq!(weights(&rows[2..]), [[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]);
}

#[test]
fn observed_tokens_are_those_that_no_earlier_call_covers() {
    // Agent lightning's ECHO: policy gradient on what was drawn, cross-entropy on what the tools answered.
    let calls = of_calls(&[(&[1, 2], &[3]), (&[1, 2, 3, 4, 5], &[6])]);
    assert_eq!(calls.iter().map(Transition::observed_tokens).collect::<Vec<_>>(), [2, 2]);
    // Equal observations after different histories: the states of GiGPO.
    let other = of_calls(&[(&[1, 7], &[3]), (&[1, 7, 3, 4, 5], &[6])]);
    assert_eq!(calls[1].observation_hash(), other[1].observation_hash());
    assert_ne!(calls[1].prompt_hash(), other[1].prompt_hash());
    assert_eq!(calls[0].prompt_hash(), calls[0].observation_hash());
    // An agent that asks again without a word between has seen nothing new, and that is no state.
    let again = of_calls(&[(&[1, 2], &[3]), (&[1, 2, 3], &[4])]);
    assert_eq!((again[1].observed_tokens(), again[1].observation_hash()), (0, 0));
    let ce = |call: usize, weights| entry(&calls[call], Stream::Ce, Scope::Observed, weights);
    let batch = Sequence {
        entries: vec![
            ce(1, Weights::PerToken(vec![0.1, 0.2])),
            ce(0, Weights::Scalar(0.5)),
            sampled(&calls[0], 1.0),
            sampled(&calls[1], 1.0),
        ],
        ..Sequence::default()
    };
    let rows = rows(&[batch], NO_LIMIT).unwrap();
    assert_eq!(
        rows.iter().map(|row| (row.sequence, row.stream)).collect::<Vec<_>>(),
        [(0, Stream::Rl), (0, Stream::Ce)]
    );
    assert_eq!(weights(&rows[..1]), [[0.0, 0.0, 1.0, 0.0, 0.0, 1.0]]);
    // The first token of a row is never trained; the second call's completion is not in the cross-entropy's scope.
    assert_eq!(weights(&rows[1..]), [[0.0, 0.5, 0.0, 0.1, 0.2, 0.0]]);
    assert!(rows[1].behaviour_log_probs.iter().all(|log_prob| *log_prob == 0.0));
}

#[test]
fn a_demonstration_trains_its_masked_tokens_in_the_stream_ce_only() {
    let id = TransitionId("demonstration/0".to_owned());
    let mask = vec![false, true, false, true];
    let demonstration =
        Transition::demonstration(id.clone(), vec![1, 2, 3, 4], mask, "2 4".to_owned(), "{}".to_owned());
    assert_eq!((demonstration.prompt_tokens(), demonstration.sampled_tokens()), (1, 2));
    assert!(demonstration.is_trainable() && demonstration.is_demonstration());
    let with = |stream, weights| Sequence {
        entries: vec![entry(&demonstration, stream, Scope::Sampled, weights)],
        ..Sequence::default()
    };
    let built = rows(&[with(Stream::Ce, Weights::PerToken(vec![1.0, 3.0]))], NO_LIMIT).unwrap();
    assert_eq!(weights(&built), [[0.0, 1.0, 0.0, 3.0]]);
    assert_eq!(built[0].mask, [false, true, false, true]);
    for stream in [Stream::Rl, Stream::RefKl] {
        let error = rows(&[with(stream, Weights::Scalar(1.0))], NO_LIMIT).unwrap_err();
        assert_eq!(error, AdapterError::NoLogProbs { transition: id.clone(), stream });
    }
    // Nothing trained: no row, and no sequence that would count in a mean.
    let silent = Transition::demonstration(id, vec![1, 2], vec![false, false], String::new(), "{}".to_owned());
    assert!(
        rows(&[Sequence { entries: vec![sampled_ce(&silent)], ..Sequence::default() }], NO_LIMIT).unwrap().is_empty()
    );
}

fn sampled_ce(transition: &Transition) -> (Arc<Transition>, BatchEntry) {
    entry(transition, Stream::Ce, Scope::Sampled, Weights::Scalar(1.0))
}

#[test]
fn wrong_batches_are_refused_with_a_reason() {
    let calls = of_calls(&[(&[1], &[2, 3])]);
    let id = calls[0].id.clone();
    let refused = |entries: Vec<(Arc<Transition>, BatchEntry)>| {
        rows(&[Sequence { entries, ..Sequence::default() }], NO_LIMIT).unwrap_err()
    };
    let with = |stream, scope, weights| vec![entry(&calls[0], stream, scope, weights)];
    assert_eq!(
        refused(with(Stream::Rl, Scope::Sampled, Weights::PerToken(vec![1.0]))).to_string(),
        "transition `r/1/0` has 2 tokens in scope Sampled and was given 1 weights"
    );
    assert_eq!(
        refused(with(Stream::Ce, Scope::Observed, Weights::PerToken(vec![1.0, 2.0]))),
        AdapterError::WeightCount { transition: id.clone(), scope: Scope::Observed, expected: 1, found: 2 }
    );
    assert_eq!(
        refused(with(Stream::Rl, Scope::Observed, Weights::Scalar(1.0))),
        AdapterError::ObservedStream { transition: id.clone(), stream: Stream::Rl }
    );
    assert!(matches!(
        refused(with(Stream::Rl, Scope::Sampled, Weights::PerToken(vec![1.0, f32::NAN]))),
        AdapterError::WeightNotFinite { .. }
    ));
    assert!(matches!(
        refused(with(Stream::Rl, Scope::Sampled, Weights::Scalar(f32::INFINITY))),
        AdapterError::WeightNotFinite { .. }
    ));
    assert_eq!(
        refused(vec![sampled(&calls[0], 1.0), sampled(&calls[0], 2.0)]),
        AdapterError::Duplicate { transition: id.clone(), stream: Stream::Rl, scope: Scope::Sampled }
    );
    let mut wrong = sampled(&calls[0], 1.0);
    wrong.1.transition = TransitionId("other".to_owned());
    assert!(matches!(refused(vec![wrong]), AdapterError::WrongTransition { .. }));
    let mut blind = calls[0].clone();
    blind.not_trainable = Some(NotTrainable::TruncatedSampling);
    assert_eq!(
        refused(vec![sampled(&blind, 1.0)]).to_string(),
        "transition `r/1/0` cannot be trained on: its sampling was truncated or constrained"
    );
}

#[test]
fn a_rollout_with_a_row_too_long_is_dropped_as_a_whole_and_reported() {
    let long = of_calls(&[(&[1], &[2]), (&[9, 9, 9], &[2, 3])]);
    let short = of_calls(&[(&[1], &[2])]);
    let batch = [sequence(&short, 1.0), sequence(&long, 1.0), Sequence::default(), sequence(&short, 2.0)];
    let built = rows_that_fit(&batch, 4).unwrap();
    assert_eq!(built.rows.iter().map(|row| row.sequence).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(built.dropped.len(), 1);
    assert_eq!((built.dropped[0].index, built.dropped[0].tokens), (1, 5));
    assert_eq!(
        rows(&batch, 4).unwrap_err().to_string(),
        "the row that ends with transition `r/1/1` has 5 tokens and the limit is 4"
    );
    assert!(rows_that_fit(&batch, 5).unwrap().dropped.is_empty());
}

#[test]
fn rewards_go_to_their_calls_and_the_others_stay_with_the_rollout() {
    let reward = |value, call_index| Reward {
        dimension: "reward".to_owned(),
        value,
        feedback: None,
        source: RewardSource::Grader,
        component: None,
        call_index,
    };
    // Call 1 failed; calls 2 and 0 ended in that order.
    let spans = [
        span(2, "solver", Ok(completion(2, &[1], &[2]))),
        span(1, "solver", Err(LlmError::Unavailable("down".to_owned()))),
        span(0, "solver", Ok(completion(0, &[1], &[2]))),
    ];
    let rewards = [reward(1.0, None), reward(2.0, Some(2)), reward(3.0, Some(1)), reward(4.0, Some(99))];
    let trajectory = Trajectory::new(&spans, &rewards, &Sampling::default());
    let calls: Vec<_> =
        trajectory.transitions.iter().map(|t| (t.id.0.as_str(), t.call_index, t.text.as_str())).collect();
    assert_eq!(calls, [("r/1/0", 0, "answer 0"), ("r/1/2", 2, "answer 2")]);
    assert_eq!(trajectory.transitions[1].rewards, [reward(2.0, Some(2))]);
    assert_eq!(trajectory.rewards, [reward(1.0, None), reward(3.0, Some(1)), reward(4.0, Some(99))]);
}

#[test]
fn temperature_is_that_of_the_log_probs() {
    let of = |call: f32, rollout: f32| {
        let mut recorded = span(0, "solver", Ok(completion(0, &[1], &[2])));
        if let SpanBody::Llm(body) = &mut recorded.body {
            body.sampling.temperature = call;
        }
        let sampling = Sampling { temperature: rollout, ..Sampling::default() };
        Trajectory::new(&[recorded], &[], &sampling).transitions[0].temperature.to_bits()
    };
    assert_eq!(of(1.0, 0.7), 0.7_f32.to_bits());
    assert_eq!(of(0.5, 0.7), 0.5_f32.to_bits());
    assert_eq!(of(0.0, 0.7), 1.0_f32.to_bits());
    assert_eq!(of(f32::NAN, 0.7), 1.0_f32.to_bits());
}

#[test]
fn a_call_whose_numbers_do_not_fit_cannot_be_trained_on() {
    let with = |change: &dyn Fn(&mut LlmCall)| {
        let mut recorded = span(0, "solver", Ok(completion(0, &[1], &[2, 3])));
        if let SpanBody::Llm(call) = &mut recorded.body {
            change(call);
        }
        transitions(&[recorded], &[]).remove(0)
    };
    let log_probs = |list: Vec<f32>| {
        move |call: &mut LlmCall| {
            Arc::make_mut(call.result.as_mut().unwrap()).tokens.as_mut().unwrap().log_probs.clone_from(&list);
        }
    };
    assert!(with(&|_| {}).is_trainable());
    for list in [vec![-1.0], vec![-1.0, f32::NAN], vec![-1.0, f32::NEG_INFINITY], vec![-1.0, 2.0]] {
        let transition = with(&log_probs(list));
        assert_eq!(transition.not_trainable, Some(NotTrainable::NoTokenIds));
        assert!(!transition.is_trainable() && transition.tokens.is_none());
    }
    // Sets that are not sound, not one for each token, or without the token that was drawn from them.
    let wrong: [&[&[u32]]; 3] = [&[&[2]], &[&[2], &[4]], &[&[2], &[3, 3]]];
    for sets in wrong {
        let transition = with(&|call| {
            let tokens = Arc::make_mut(call.result.as_mut().unwrap()).tokens.as_mut().unwrap();
            tokens.processed_log_probs = vec![-0.1, -0.1];
            for set in sets {
                tokens.kept.push(set);
            }
        });
        assert_eq!(transition.not_trainable, Some(NotTrainable::NoTokenIds), "{sets:?}");
    }
    let elsewhere = with(&|call| call.endpoint = Some("judge".to_owned()));
    assert_eq!(elsewhere.not_trainable, Some(NotTrainable::OtherEndpoint));
    let scripted = with(&|call| Arc::make_mut(call.result.as_mut().unwrap()).tokens = None);
    assert_eq!(scripted.not_trainable, Some(NotTrainable::NoTokenIds));
}

#[test]
fn tokens_drawn_from_less_than_all_have_their_sets_and_their_log_probs_in_the_row() {
    let mut first = completion(0, &[1], &[2, 3]);
    let data = first.tokens.as_mut().unwrap();
    data.processed_log_probs = vec![-0.25, -0.125];
    data.kept.push(&[2, 8]);
    data.kept.push(&[]);
    let calls = [first, completion(1, &[1, 2, 3, 4], &[5]), completion(2, &[1, 2, 3, 4, 5], &[6])];
    let spans: Vec<Span> = (0..).zip(calls).map(|(index, call)| span(index, "solver", Ok(call))).collect();
    let calls = transitions(&spans, &[]);
    assert!((calls[0].log_prob_sum() + 0.375).abs() < 1e-9);
    let built = rows(&[sequence(&calls, 1.0)], NO_LIMIT).unwrap();
    let [row] = built.as_slice() else { panic!("{built:?}") };
    assert_eq!(row.behaviour_log_probs, [0.0, -0.25, -0.125, 0.0, log_prob(1, 0), log_prob(2, 0)]);
    let kept: Vec<_> = (0..6).map(|at| row.kept.at(at)).collect();
    assert_eq!((kept, row.kept.len()), (vec![None, Some(&[2, 8][..]), None, None, None, None], 6));
    // A call left out is context, and context has no set.
    let built = rows(&[sequence(&calls[1..], 1.0)], NO_LIMIT).unwrap();
    assert!(built[0].kept.is_empty());
}

/// How a random call begins: with the whole of an earlier call and something observed, or afresh.
#[derive(Debug, Clone)]
struct Step {
    goes_on_from: Option<prop::sample::Index>,
    observed: Vec<u32>,
    drawn: Vec<u32>,
    weights: Vec<f32>,
    in_batch: bool,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (
        prop::option::weighted(0.7, any::<prop::sample::Index>()),
        prop::collection::vec(0..4_u32, 0..4),
        prop::collection::vec(0..4_u32, 0..5),
        prop::collection::vec(-2.0..2.0_f32, 8),
        prop::bool::weighted(0.8),
    );
    let step = step.prop_map(|(goes_on_from, observed, drawn, weights, in_batch)| Step {
        goes_on_from,
        observed,
        drawn,
        weights,
        in_batch,
    });
    prop::collection::vec(step, 1..8)
}

/// The transitions of random calls, and their entries: weights per drawn token.
fn build(steps: &[Step], broken: &[bool]) -> Vec<(Arc<Transition>, BatchEntry)> {
    let mut calls: Vec<(Vec<u32>, Vec<u32>)> = vec![];
    for (place, step) in steps.iter().enumerate() {
        let mut prompt = match &step.goes_on_from {
            Some(index) if !calls.is_empty() => {
                let (prompt, drawn) = index.get(&calls).clone();
                [prompt, drawn].concat()
            }
            _ => vec![],
        };
        prompt.extend(&step.observed);
        if broken.get(place).copied().unwrap_or(false) {
            // An id that occurs nowhere else: nothing can be merged with this prompt.
            prompt.insert(0, 1_000 + u32::try_from(place).unwrap());
        } else if prompt.is_empty() {
            prompt.push(99);
        }
        calls.push((prompt, step.drawn.clone()));
    }
    let borrowed: Vec<(&[u32], &[u32])> =
        calls.iter().map(|(prompt, drawn)| (prompt.as_slice(), drawn.as_slice())).collect();
    let transitions = of_calls(&borrowed);
    let with_steps = transitions.iter().zip(steps).filter(|(_, step)| step.in_batch);
    with_steps
        .map(|(transition, step)| {
            let weights = Weights::PerToken(step.weights[..step.drawn.len()].to_vec());
            entry(transition, Stream::Rl, Scope::Sampled, weights)
        })
        .collect()
}

/// Every trained token with all that its loss depends on: the ids before it, itself, weight and log-prob.
fn trained(rows: &[TrainingRow]) -> Vec<(Vec<u32>, u32, u32, u32)> {
    let mut list = vec![];
    for row in rows {
        for place in (0..row.ids.len()).filter(|place| row.mask[*place]) {
            let (weight, log_prob) = (row.weights[place].to_bits(), row.behaviour_log_probs[place].to_bits());
            list.push((row.ids[..place].to_vec(), row.ids[place], weight, log_prob));
        }
    }
    list.sort();
    list
}

/// The same, straight from the entries.
fn wanted(entries: &[(Arc<Transition>, BatchEntry)]) -> Vec<(Vec<u32>, u32, u32, u32)> {
    let mut list = vec![];
    for (transition, entry) in entries {
        let tokens = transition.tokens.as_ref().unwrap();
        let Weights::PerToken(weights) = &entry.weights else { unreachable!() };
        for (place, id) in tokens.completion_ids.iter().enumerate() {
            let before = [tokens.prompt_ids.as_slice(), &tokens.completion_ids[..place]].concat();
            list.push((before, *id, weights[place].to_bits(), tokens.log_probs[place].to_bits()));
        }
    }
    list.sort();
    list
}

fn mass(rows: &[TrainingRow]) -> f64 {
    rows.iter().flat_map(|row| &row.weights).map(|weight| f64::from(*weight)).sum()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn merged_and_unmerged_train_the_same_tokens_in_the_same_context(steps in steps()) {
        let entries = build(&steps, &[]);
        let merged = rows(&[Sequence { entries: entries.clone(), ..Sequence::default() }], NO_LIMIT).unwrap();
        let one_each: Vec<Sequence> =
            entries.iter().map(|entry| Sequence { entries: vec![entry.clone()], ..Sequence::default() }).collect();
        let unmerged = rows(&one_each, NO_LIMIT).unwrap();
        prop_assert_eq!(trained(&merged), wanted(&entries));
        prop_assert_eq!(trained(&unmerged), wanted(&entries));
        prop_assert!(merged.len() <= unmerged.len());
        prop_assert!(merged.iter().all(|row| row.sequence == 0));
    }

    #[test]
    fn splitting_a_rollout_into_more_rows_keeps_its_mass(
        steps in steps(),
        broken in prop::collection::vec(any::<bool>(), 8),
    ) {
        let whole = rows(&[Sequence { entries: build(&steps, &[]), ..Sequence::default() }], NO_LIMIT).unwrap();
        let split = rows(&[Sequence { entries: build(&steps, &broken), ..Sequence::default() }], NO_LIMIT).unwrap();
        let count = |rows: &[TrainingRow]| rows.iter().flat_map(|row| &row.mask).filter(|mask| **mask).count();
        prop_assert_eq!(count(&whole), count(&split));
        prop_assert!((mass(&whole) - mass(&split)).abs() < 1e-4);
        prop_assert!(split.iter().all(|row| row.sequence == 0));
    }

    #[test]
    fn context_carries_nothing_and_lists_are_as_long_as_each_other(steps in steps()) {
        for row in rows(&[Sequence { entries: build(&steps, &[]), ..Sequence::default() }], NO_LIMIT).unwrap() {
            let length = row.ids.len();
            prop_assert_eq!([row.mask.len(), row.weights.len(), row.behaviour_log_probs.len()], [length; 3]);
            prop_assert!(!row.mask[0]);
            for place in (0..length).filter(|place| !row.mask[*place]) {
                prop_assert_eq!(row.weights[place].to_bits(), 0);
                prop_assert_eq!(row.behaviour_log_probs[place].to_bits(), 0);
            }
        }
    }

    #[test]
    fn the_order_of_entries_does_not_matter(steps in steps(), shift in 0..8_usize) {
        let entries = build(&steps, &[]);
        let mut turned = entries.clone();
        turned.rotate_left(shift.min(entries.len()));
        prop_assert_eq!(
            rows(&[Sequence { entries, ..Sequence::default() }], NO_LIMIT).unwrap(),
            rows(&[Sequence { entries: turned, ..Sequence::default() }], NO_LIMIT).unwrap()
        );
    }

    #[test]
    fn a_plain_conversation_is_always_one_row(steps in steps()) {
        let mut prompt = vec![99];
        let mut calls: Vec<(Vec<u32>, Vec<u32>)> = vec![];
        for step in &steps {
            prompt.extend(&step.observed);
            calls.push((prompt.clone(), [step.drawn.clone(), vec![5]].concat()));
            prompt.extend(&calls.last().unwrap().1);
        }
        let borrowed: Vec<(&[u32], &[u32])> =
            calls.iter().map(|(prompt, drawn)| (prompt.as_slice(), drawn.as_slice())).collect();
        let calls = of_calls(&borrowed);
        let built = rows(&[sequence(&calls, 1.0)], NO_LIMIT).unwrap();
        prop_assert_eq!(built.len(), 1);
        prop_assert_eq!(&built[0].ids, &prompt);
        // What is drawn and what is observed share out the row, its first token aside.
        let observed: usize = calls.iter().map(Transition::observed_tokens).sum();
        let drawn: usize = calls.iter().map(Transition::sampled_tokens).sum();
        prop_assert_eq!(observed + drawn, prompt.len());
    }
}
