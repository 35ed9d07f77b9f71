//! Which call a reward belongs to, and rollouts that are too long.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod spans;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use fulgurite_adapter::{
    ACCEPTED_BY_DEFAULT, Attachment, Fit, MissingCall, RewardAttachment, RowStart, RowTooLong, Sequence, Trajectory,
    Transition, accepted, fit, placements, rows, total_reward, transitions,
};
use fulgurite_core::algorithm::{BatchEntry, Scope, Weights};
use fulgurite_core::llm::Sampling;
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::training::Stream;
use proptest::prelude::*;
use spans::{Answer, Attempt, reward};

const ALL: [RewardSource; 5] =
    [RewardSource::Grader, RewardSource::Tool, RewardSource::Host, RewardSource::Agent, RewardSource::External];

fn own(dimension: &str, call: Option<u64>) -> Reward {
    reward(RewardSource::Agent, dimension, 1.0, call)
}

fn rule(default: Attachment) -> RewardAttachment {
    RewardAttachment { default, ..RewardAttachment::default() }
}

fn calls(attach: &RewardAttachment, attempt: &Attempt) -> Vec<Option<u64>> {
    attach.attach(&attempt.spans, &attempt.rewards(), &ALL).iter().map(|reward| reward.call_index).collect()
}

/// Three calls with rewards in between; the second is not answered.
fn attempt() -> Attempt {
    Attempt::default()
        .reward(&own("a", None))
        .call(Answer { tools: vec![("rooms", "{}")], ..Answer::default() })
        .unanswered()
        .reward(&own("a", Some(1)))
        .call(Answer::default())
        .tool("rooms", "{}", Ok("R07"))
        .reward(&own("a", None))
        .reward(&own("b", Some(0)))
        .reward(&own("a", Some(2)))
}

#[test]
fn every_rule_by_hand() {
    let of = |default| calls(&rule(default), &attempt());
    assert_eq!(of(Attachment::PerCall), [None, Some(1), None, Some(0), Some(2)]);
    assert_eq!(of(Attachment::Final), [Some(2); 5]);
    // The first is before any call, and by the fifth both calls have one of `a`.
    assert_eq!(of(Attachment::FirstOccurrence), [None, Some(0), Some(2), Some(2), None]);
    // The tool call ended after the second reward and was asked for by call 0.
    assert_eq!(of(Attachment::ToolStatus), [None, None, Some(0), Some(0), Some(0)]);
}

#[test]
fn rules_go_by_dimension_and_what_is_missing_by_config() {
    let dimensions = BTreeMap::from([("b".to_owned(), Attachment::Final)]);
    let attach = RewardAttachment { dimensions, missing: MissingCall::Final, ..RewardAttachment::default() };
    assert_eq!(calls(&attach, &attempt()), [Some(2), Some(2), Some(2), Some(2), Some(2)]);
    let first = RewardAttachment { missing: MissingCall::Final, ..rule(Attachment::FirstOccurrence) };
    assert_eq!(calls(&first, &attempt()), [Some(2), Some(0), Some(2), Some(2), Some(2)]);
    // Nothing was answered: there is no call to go to.
    let silent = Attempt::default().unanswered().reward(&own("a", Some(0)));
    assert_eq!(calls(&rule(Attachment::Final), &silent), [None]);
    assert_eq!(calls(&rule(Attachment::PerCall), &silent), [Some(0)]);
}

#[test]
fn a_source_that_does_not_count_takes_no_place() {
    let attempt = Attempt::default().call(Answer::default()).reward(&own("a", None)).reward(&reward(
        RewardSource::Grader,
        "a",
        0.5,
        None,
    ));
    let attached = rule(Attachment::FirstOccurrence).attach(&attempt.spans, &attempt.rewards(), &ACCEPTED_BY_DEFAULT);
    assert_eq!(attached, [reward(RewardSource::Grader, "a", 0.5, Some(0))]);
}

#[test]
fn a_forks_own_rewards_are_found_behind_its_ancestors() {
    // The record has the ancestor's reward first; its span is not among the fork's.
    let fork = Attempt::default().call(Answer::default()).reward(&own("a", None)).call(Answer::default());
    let rewards = [own("a", Some(7)), own("a", None)];
    let attached = rule(Attachment::FirstOccurrence).attach(&fork.spans, &rewards, &ALL);
    // Without a place it counts as given at the end.
    assert_eq!(attached.iter().map(|reward| reward.call_index).collect::<Vec<_>>(), [Some(1), Some(0)]);
    let named = rule(Attachment::PerCall).attach(&fork.spans, &rewards, &ALL);
    assert_eq!(named, rewards);
}

fn any_rule() -> impl Strategy<Value = Attachment> {
    prop::sample::select(vec![
        Attachment::PerCall,
        Attachment::Final,
        Attachment::FirstOccurrence,
        Attachment::ToolStatus,
    ])
}

/// Calls, calls without an answer, tool calls and rewards in any order.
fn any_attempt() -> impl Strategy<Value = Attempt> {
    let source = prop::sample::select(ALL.to_vec());
    let given = (source, 0_u8..2, -2.0..2.0_f64, prop::option::of(0_u64..6));
    prop::collection::vec((0_u8..4, given), 0..14).prop_map(|events| {
        events.into_iter().fold(Attempt::default(), |attempt, (kind, (source, dimension, value, call))| match kind {
            0 => attempt.call(Answer { tools: vec![("t", "{}")], ..Answer::default() }),
            1 => attempt.unanswered(),
            2 => attempt.tool("t", "{}", Ok("")),
            _ => attempt.reward(&reward(source, ["a", "b"][usize::from(dimension)], value, call)),
        })
    })
}

proptest! {
    /// Whatever the rule: the rewards that count are the same in the same order, so are all totals, and a transition or the
    /// rollout has each of them once.
    #[test]
    fn attaching_moves_rewards_and_changes_none(
        attempt in any_attempt(), default in any_rule(), of_b in any_rule(), to_final in any::<bool>()
    ) {
        let missing = if to_final { MissingCall::Final } else { MissingCall::Rollout };
        let attach = RewardAttachment { default, missing, dimensions: BTreeMap::from([("b".to_owned(), of_b)]) };
        let rewards = attempt.rewards();
        let attached = attach.attach(&attempt.spans, &rewards, &ACCEPTED_BY_DEFAULT);
        let without_call = |rewards: &[Reward]| -> Vec<Reward> {
            rewards.iter().map(|reward| Reward { call_index: None, ..reward.clone() }).collect()
        };
        prop_assert_eq!(without_call(&attached), without_call(&accepted(&rewards, &ACCEPTED_BY_DEFAULT)));
        for dimension in ["a", "b"] {
            let total = |rewards: &[Reward]| total_reward(rewards, dimension, &ACCEPTED_BY_DEFAULT);
            prop_assert_eq!(total(&attached), total(&rewards));
        }
        let trajectory = Trajectory::new(&attempt.spans, &attached, &Sampling::default());
        let of_calls: usize = trajectory.transitions.iter().map(|transition| transition.rewards.len()).sum();
        prop_assert_eq!(of_calls + trajectory.rewards.len(), attached.len());
        let has_calls = !trajectory.transitions.is_empty();
        prop_assert!(!(to_final && has_calls) || trajectory.rewards.is_empty());
    }

    /// The default leaves everything as it is given.
    #[test]
    fn the_default_changes_nothing(attempt in any_attempt()) {
        let attached = RewardAttachment::default().attach(&attempt.spans, &attempt.rewards(), &ALL);
        prop_assert_eq!(attached, attempt.rewards());
    }

    /// `first-occurrence`: no call has two of a dimension, and none that was answered later.
    #[test]
    fn first_occurrence_is_one_for_each_call(attempt in any_attempt()) {
        let attached = rule(Attachment::FirstOccurrence).attach(&attempt.spans, &attempt.rewards(), &ALL);
        let mut seen = std::collections::BTreeSet::new();
        for reward in attached.iter().filter(|reward| reward.call_index.is_some()) {
            prop_assert!(seen.insert((reward.call_index, reward.dimension.clone())));
        }
    }

    /// Rows of a rollout are as long as its longest call, so what fits by `fit` fits as rows; a truncated one trains exactly
    /// the tokens within the limit.
    #[test]
    fn what_fits_is_what_rows_hold(shape in prop::collection::vec((1_u32..6, 1_u32..6, any::<bool>()), 1..5), most in 1_usize..40) {
        let all = conversation(&shape);
        let limit = NonZeroUsize::new(most).unwrap();
        let longest = all.iter().map(Transition::row_tokens).max().unwrap();
        let mut dropped = all.clone();
        let found = fit(&mut dropped, limit, RowTooLong::Drop);
        prop_assert_eq!(&dropped, &all, "dropping changes no call");
        prop_assert_eq!(found == Fit::Whole, longest <= most);
        let built = rows(&[sequence(&all)], usize::MAX).unwrap();
        prop_assert_eq!(built.iter().map(|row| row.ids.len()).max().unwrap(), longest);
        let mut cut = all.clone();
        fit(&mut cut, limit, RowTooLong::Truncate);
        let trained: Vec<Transition> = cut.iter().filter(|transition| transition.is_trainable()).cloned().collect();
        let built = rows(&[sequence(&trained)], most).unwrap();
        let kept: usize = built.iter().flat_map(|row| &row.mask).filter(|trained| **trained).count();
        let within: usize = all.iter().map(|transition| {
            let drawn = transition.sampled_tokens();
            drawn.min(most.saturating_sub(transition.prompt_tokens()))
        }).sum();
        prop_assert_eq!(kept, within);
        let lost: usize = cut.iter().map(|transition| transition.cut_tokens).sum();
        prop_assert_eq!(lost + within, all.iter().map(Transition::sampled_tokens).sum::<usize>());
    }
}

/// Calls of (new tokens of the prompt, drawn tokens, whether the prompt repeats all before it).
fn conversation(shape: &[(u32, u32, bool)]) -> Vec<Transition> {
    let (mut attempt, mut held, mut next) = (Attempt::default(), vec![], 1000);
    for (new, drawn, repeats) in shape {
        let mut prompt = if *repeats { held } else { vec![] };
        prompt.extend(next..next + new);
        let drawn: Vec<u32> = (next + new..next + new + drawn).collect();
        next += 100;
        held = [prompt.clone(), drawn.clone()].concat();
        attempt = attempt.call(Answer { drawn, prompt, ..Answer::default() });
    }
    transitions(&attempt.spans, &[])
}

fn sequence(transitions: &[Transition]) -> Sequence {
    let entry = |transition: &Transition| {
        let id = transition.id.clone();
        let entry = BatchEntry {
            transition: id,
            stream: Stream::Rl,
            scope: Scope::Sampled,
            weights: Weights::Scalar(1.0),
            group: None,
        };
        (std::sync::Arc::new(transition.clone()), entry)
    };
    Sequence { entries: transitions.iter().map(entry).collect(), ..Sequence::default() }
}

#[test]
fn a_call_that_is_cut_whole_cannot_be_trained_on() {
    let mut calls = conversation(&[(3, 4, false), (2, 5, true)]);
    let found = fit(&mut calls, NonZeroUsize::new(6).unwrap(), RowTooLong::Truncate);
    let Fit::Truncated { longest, tokens } = found else { panic!("{found:?}") };
    assert_eq!((longest.transition.0.as_str(), longest.tokens, tokens), ("r/1/1", 14, 6));
    let left: Vec<_> = calls.iter().map(|call| (call.is_trainable(), call.sampled_tokens(), call.cut_tokens)).collect();
    assert_eq!(left, [(true, 3, 1), (false, 0, 5)]);
}

#[test]
fn placements_tell_where_a_prompt_leaves_its_row() {
    let attempt = Attempt::default()
        .call(Answer { prompt: vec![1, 2, 3], drawn: vec![4, 5], ..Answer::default() })
        .call(Answer { prompt: vec![1, 2, 3, 4, 5, 6], drawn: vec![7], ..Answer::default() })
        .call(Answer { prompt: vec![1, 2, 9, 4], drawn: vec![8], ..Answer::default() })
        .call(Answer { prompt: vec![1, 2], drawn: vec![3], ..Answer::default() });
    let mut calls = transitions(&attempt.spans, &[]);
    let starts = |calls: &[Transition]| -> Vec<(usize, RowStart)> {
        let (_, placed) = placements(&sequence(calls)).unwrap();
        placed.into_iter().map(|placement| (placement.row, placement.start)).collect()
    };
    assert_eq!(
        starts(&calls),
        [
            (0, RowStart::First),
            (0, RowStart::Continues),
            (1, RowStart::PromptDiffers { row: 0, at: 2 }),
            (2, RowStart::PromptDiffers { row: 0, at: 2 }),
        ]
    );
    let (rows, placed) = placements(&sequence(&calls)).unwrap();
    assert_eq!((rows.len(), placed[1].completion_from, placed[1].completion_tokens), (3, 6, 1));
    assert_eq!(rows[0].mask, [false, false, false, true, true, false, true]);
    calls[1].temperature = 0.5;
    assert_eq!(starts(&calls)[1], (1, RowStart::OtherTemperature { row: 0 }));
    calls[1].tokens.as_mut().unwrap().policy_version = fulgurite_core::id::PolicyVersion(2);
    assert_eq!(starts(&calls)[1], (1, RowStart::OtherWeights { row: 0 }));
}
