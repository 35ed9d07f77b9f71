//! Automatic rewards: vectors 35 and 43 of ALGORITHMS.md, hand-worked attempts, and properties.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod spans;

use fulgurite_adapter::RewardTerms;
use fulgurite_adapter::terms::{length_value, repetition_value};
use fulgurite_core::record::RolloutMode;
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::reward_term::{RewardTerm, RewardTermKind, TermScope};
use fulgurite_core::tool::ToolError;
use fulgurite_credit::shaping::overlong;
use proptest::prelude::*;
use spans::{Answer, Attempt};

const ROOM: &str = r#"{"type":"object","required":["time"],"properties":{"time":{"type":"string"}}}"#;

/// Rewards of one term as (call, value).
fn judged(term: RewardTerm, attempt: &Attempt) -> Vec<(Option<u64>, f64)> {
    let rewards = rewards(&[term], attempt, RolloutMode::Train);
    rewards.iter().map(|reward| (reward.call_index, reward.value)).collect()
}

fn rewards(terms: &[RewardTerm], attempt: &Attempt, mode: RolloutMode) -> Vec<Reward> {
    RewardTerms::new(terms).unwrap().rewards([&attempt.spans, &[]], mode)
}

fn term(kind: RewardTermKind) -> RewardTerm {
    RewardTerm::new(kind)
}

fn drawn(tokens: usize) -> Answer {
    Answer { drawn: vec![7; tokens], ..Answer::default() }
}

#[track_caller]
fn near(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
}

#[test]
fn golden_35_overlong() {
    for (tokens, expected) in [(50, 0.0), (90, -0.5), (110, -1.0), (80, 0.0), (100, -1.0), (0, 0.0)] {
        near(overlong(tokens, 100, 20), expected);
        let term = RewardTerm { tokens_max: Some(100), cache_tokens: Some(20), ..term(RewardTermKind::Overlong) };
        let found = judged(term, &Attempt::default().call(drawn(usize::try_from(tokens).unwrap())));
        assert_eq!(found.len(), 1);
        near(found[0].1, expected);
    }
}

#[test]
fn golden_43_repetition() {
    near(repetition_value(&[5, 5, 5, 5, 5], 2), -0.75);
    near(repetition_value(&[1, 2, 1, 2, 1, 2], 2), -0.6);
    near(repetition_value(&[1, 2, 3, 4], 2), 0.0);
    // Too short for an n-gram.
    near(repetition_value(&[1], 2), 0.0);
    near(repetition_value::<u32>(&[], 1), 0.0);
    let repetition = RewardTerm { ngram_tokens: Some(2), ..term(RewardTermKind::Repetition) };
    let answer = |drawn: &[u32]| Answer { drawn: drawn.to_vec(), ..Answer::default() };
    let attempt = Attempt::default().call(answer(&[5, 5, 5, 5, 5])).call(answer(&[1, 2, 1, 2, 1, 2]));
    assert_eq!(judged(repetition.clone(), &attempt), [(Some(0), -0.75), (Some(1), -0.6)]);
    // Of the whole: 3 different of 9.
    let whole = RewardTerm { per: Some(TermScope::Rollout), ..repetition.clone() };
    near(judged(whole, &attempt)[0].1, 3.0 / 9.0 - 1.0);
    // A server without ids: words.
    let words = Answer { text: "to be  to be\nto be", without_ids: true, ..Answer::default() };
    assert_eq!(judged(repetition, &Attempt::default().call(words)), [(Some(0), -0.6)]);
}

#[test]
fn length_falls_to_its_bound() {
    near(length_value(0, 10), 0.0);
    near(length_value(5, 10), -0.5);
    near(length_value(30, 10), -1.0);
    let length = RewardTerm { tokens_max: Some(20), weight: 0.5, ..term(RewardTermKind::Length) };
    let attempt = Attempt::default().call(drawn(4)).call(drawn(6));
    assert_eq!(judged(length.clone(), &attempt), [(None, -0.25)]);
    let per_call = RewardTerm { per: Some(TermScope::Call), ..length };
    assert_eq!(judged(per_call, &attempt), [(Some(0), -0.1), (Some(1), -0.15)]);
}

#[test]
fn tool_status_belongs_to_the_call_that_asked() {
    let failed = || Err(ToolError::Failed("full".to_owned()));
    let attempt = Attempt::default()
        .call(Answer { tools: vec![("rooms", r#"{"time":1,"b":2}"#), ("bill", "{}")], ..Answer::default() })
        .call(Answer { tools: vec![("rooms", r#"{"time":2}"#)], ..Answer::default() })
        // Recorded later than the second call, and asked for by the first; written anew by the agent.
        .tool("rooms", r#"{ "b": 2, "time": 1 }"#, failed())
        .tool("bill", "{}", Ok("1"))
        .tool("rooms", r#"{"time":2}"#, Ok("R07"))
        // The agent's own: of the newest call.
        .tool("mail", "{}", Err(ToolError::UnknownTool("mail".to_owned())))
        // The config's doing is not judged.
        .tool("web", "{}", Err(ToolError::Denied("no grant".to_owned())));
    let status = term(RewardTermKind::ToolStatus);
    assert_eq!(judged(status.clone(), &attempt), [(Some(0), -1.0), (Some(1), -1.0)]);
    let paid = RewardTerm { good: Some(0.5), bad: Some(-2.0), ..status.clone() };
    assert_eq!(judged(paid, &attempt), [(Some(0), -1.5), (Some(1), -1.5)]);
    assert_eq!(judged(RewardTerm { per: Some(TermScope::Rollout), ..status.clone() }, &attempt), [(None, -2.0)]);
    // Without a tool call the dimension is there all the same.
    let nothing = judged(status, &Attempt::default().call(Answer::default()));
    assert_eq!(nothing, [(None, 0.0)]);
    assert!(nothing[0].1.is_sign_positive());
}

#[test]
fn arguments_are_judged_by_the_schema_in_force() {
    let schema = term(RewardTermKind::ToolSchema);
    let asks = |tools: &[(&'static str, &'static str)]| Answer { tools: tools.to_vec(), ..Answer::default() };
    let attempt = Attempt::default()
        .call(Answer { offered: Some(vec![("rooms", ROOM)]), ..asks(&[("rooms", r#"{"time":"10:00"}"#)]) })
        // Offered as before.
        .call(asks(&[("rooms", r#"{"time":10}"#), ("rooms", "{}"), ("bill", "{}")]))
        .call(Answer { text: "done", ..Answer::default() })
        .call(Answer { offered: Some(vec![("rooms", "true")]), ..asks(&[("rooms", "{}")]) });
    assert_eq!(judged(schema.clone(), &attempt), [(Some(0), 0.0), (Some(1), -3.0), (Some(3), 0.0)]);
    let feedback = rewards(&[schema], &attempt, RolloutMode::Train)[1].feedback.clone().unwrap();
    assert_eq!(feedback, "3 of 3 tool calls bad: there is no tool bill");
}

#[test]
fn what_was_asked_before_is_told_by_value_and_not_by_its_text() {
    let asks = |tools: &[(&'static str, &'static str)]| Answer { tools: tools.to_vec(), ..Answer::default() };
    let attempt = Attempt::default()
        .call(asks(&[("rooms", r#"{"a":1,"b":[2]}"#)]))
        .call(asks(&[("rooms", r#"{ "b": [2], "a": 1 }"#), ("rooms", r#"{"a":2}"#), ("bill", r#"{"a":2}"#)]))
        .call(asks(&[("bill", r#"{"a":2}"#), ("bill", r#"{"a":2}"#)]));
    let repeated = term(RewardTermKind::RepeatedCall);
    assert_eq!(judged(repeated, &attempt), [(Some(0), 0.0), (Some(1), -1.0), (Some(2), -2.0)]);
}

#[test]
fn the_last_answer_has_the_format_or_not() {
    let format = RewardTerm { pattern: Some(r"^R\d\d$".to_owned()), ..term(RewardTermKind::Format) };
    let says = |text: &'static str| Answer { text, ..Answer::default() };
    let attempt = Attempt::default().call(says("R7")).call(says("R07"));
    assert_eq!(judged(format.clone(), &attempt), [(None, 1.0)]);
    let per_call = RewardTerm { per: Some(TermScope::Call), ..format.clone() };
    assert_eq!(judged(per_call.clone(), &attempt), [(Some(0), 0.0), (Some(1), 1.0)]);
    // Another model's answers are not the policy's, and no answer has no format.
    let asks_judge = Attempt::default().call(Answer { endpoint: Some("judge"), ..says("R07") }).unanswered();
    assert_eq!(judged(format.clone(), &asks_judge), [(None, 0.0)]);
    assert_eq!(judged(RewardTerm { bad: Some(-1.0), ..per_call }, &asks_judge), [(None, -1.0)]);
    let broken = RewardTerm { pattern: Some("(".to_owned()), ..format };
    let error = RewardTerms::new(&[term(RewardTermKind::ToolStatus), broken]).unwrap_err();
    assert_eq!((error.index, error.field), (1, "pattern"));
}

#[test]
fn what_is_summed_is_the_hosts_and_not_of_held_out_rollouts() {
    let length = RewardTerm {
        tokens_max: Some(10),
        dimension: Some("brevity".to_owned()),
        sum_into: Some("reward".to_owned()),
        ..term(RewardTermKind::Length)
    };
    let attempt = Attempt::default().call(drawn(5));
    let given = |mode| {
        let rewards = rewards(std::slice::from_ref(&length), &attempt, mode);
        assert!(rewards.iter().all(|reward| reward.source == RewardSource::Host && reward.check().is_ok()));
        rewards.into_iter().map(|reward| (reward.dimension, reward.value)).collect::<Vec<_>>()
    };
    let (own, summed) = (("brevity".to_owned(), -0.5), ("reward".to_owned(), -0.5));
    assert_eq!(given(RolloutMode::Train), [own.clone(), summed.clone()]);
    assert_eq!(given(RolloutMode::Val), [own.clone(), summed]);
    assert_eq!(given(RolloutMode::Test), [own]);
}

fn answers() -> impl Strategy<Value = Vec<(u8, u8, bool)>> {
    prop::collection::vec((0_u8..12, 0_u8..4, any::<bool>()), 0..6)
}

fn attempt_of(answers: &[(u8, u8, bool)]) -> Attempt {
    let mut attempt = Attempt::default();
    for (tokens, tools, works) in answers {
        let asked = vec![("rooms", if *works { r#"{"time":"1"}"# } else { "{}" }); usize::from(*tools)];
        let drawn = (0..u32::from(*tokens)).map(|token| token % 3).collect();
        attempt = attempt.call(Answer {
            drawn,
            tools: asked.clone(),
            offered: Some(vec![("rooms", ROOM)]),
            ..Answer::default()
        });
        for (name, arguments) in asked {
            let result = if *works { Ok("R07") } else { Err(ToolError::InvalidArguments(String::new())) };
            attempt = attempt.tool(name, arguments, result);
        }
    }
    attempt
}

fn all_terms(per: Option<TermScope>) -> Vec<RewardTerm> {
    use RewardTermKind::{Format, Length, Overlong, RepeatedCall, Repetition, ToolSchema, ToolStatus};
    let kinds = [ToolStatus, ToolSchema, RepeatedCall, Format, Length, Overlong, Repetition];
    let of_kind = |kind| RewardTerm {
        per,
        pattern: (kind == Format).then(|| "x".to_owned()),
        tokens_max: matches!(kind, Length | Overlong).then_some(8),
        cache_tokens: (kind == Overlong).then_some(4),
        ..term(kind)
    };
    kinds.map(of_kind).to_vec()
}

proptest! {
    /// Every graded rollout has every dimension, with finite values, at calls that there are; cutting the record in two
    /// changes nothing, so a fork is judged like a rollout of its own.
    #[test]
    fn every_dimension_is_there(answers in answers(), cut in 0_usize..30, per_call in any::<bool>()) {
        let attempt = attempt_of(&answers);
        let scope = if per_call { TermScope::Call } else { TermScope::Rollout };
        let terms = RewardTerms::new(&all_terms(Some(scope))).unwrap();
        let whole = terms.rewards([&attempt.spans, &[]], RolloutMode::Train);
        for declared in terms.declared() {
            let of_term: Vec<&Reward> = whole.iter().filter(|r| r.dimension == declared.dimension()).collect();
            prop_assert!(!of_term.is_empty());
            let calls: std::collections::BTreeSet<_> = of_term.iter().map(|reward| reward.call_index).collect();
            prop_assert_eq!(calls.len(), of_term.len());
            prop_assert!(scope == TermScope::Call || of_term.len() == 1);
        }
        for reward in &whole {
            prop_assert!(reward.value.is_finite());
            prop_assert!(reward.call_index.is_none_or(|call| call < answers.len() as u64));
        }
        let (before, after) = attempt.spans.split_at(cut.min(attempt.spans.len()));
        prop_assert_eq!(terms.rewards([before, after], RolloutMode::Train), whole);
    }

    /// Sums over calls are the rollout's, for what is a sum.
    #[test]
    fn calls_sum_to_the_rollout(answers in answers()) {
        let attempt = attempt_of(&answers);
        for kind in [RewardTermKind::ToolStatus, RewardTermKind::ToolSchema, RewardTermKind::RepeatedCall] {
            let by_call: f64 = judged(term(kind), &attempt).iter().map(|(_, value)| value).sum();
            let whole = judged(RewardTerm { per: Some(TermScope::Rollout), ..term(kind) }, &attempt)[0].1;
            prop_assert!((by_call - whole).abs() < 1e-12);
        }
    }

    #[test]
    fn values_stay_in_their_range(tokens in prop::collection::vec(0_u8..4, 0..40), size in 1_usize..5, most in 1_u32..50) {
        let repetition = repetition_value(&tokens, size);
        prop_assert!((-1.0..=0.0).contains(&repetition) && repetition > -1.0);
        let longer = tokens.len() as u64 + 1;
        for value in [length_value(longer, most), overlong(longer, most.into(), most.div_ceil(2).into())] {
            prop_assert!((-1.0..=0.0).contains(&value));
        }
        prop_assert!(length_value(longer, most) <= length_value(longer - 1, most));
        prop_assert!(overlong(longer, most.into(), 1) <= overlong(longer - 1, most.into(), 1));
    }
}
