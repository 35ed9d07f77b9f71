//! Which call a reward belongs to.
//!
//! Whoever gives a reward may name a call. What an algorithm is shown is for the run's config to say, dimension by dimension:
//!
//! | rule | a reward belongs to | for |
//! |---|---|---|
//! | `per-call` | the call that it names (the default) | graders and terms that judge single calls |
//! | `final` | the last answered call, whatever it names | step-level returns from a grade of the whole |
//! | `first-occurrence` | the newest call that was answered before the reward was given and has none of its dimension yet | agents that reward themselves as they go, without counting calls |
//! | `tool-status` | the call that asked for the tool call which ended last before the reward was given | agents that reward the use of a tool |
//!
//! A grade is given after everything else. Where a rule finds no call, because the reward names none, or one that was not
//! answered, `missing` decides: the reward stays with the whole `rollout` (the default), or goes to the `final` call.
//!
//! Attaching changes no total: an algorithm that reads the sum of a rollout's rewards sees the same under every rule.

use std::collections::{BTreeMap, BTreeSet};

use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::span::{LlmCall, Span, SpanBody};
use serde::{Deserialize, Serialize};

use crate::terms::asking_call;

/// A rule. See the module's table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attachment {
    /// The call that the reward names.
    #[default]
    PerCall,
    /// The last answered call.
    Final,
    /// The newest call answered before, without a reward of the dimension.
    FirstOccurrence,
    /// The call that asked for the newest tool call.
    ToolStatus,
}

impl Attachment {
    /// The rule's name in config.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PerCall => "per-call",
            Self::Final => "final",
            Self::FirstOccurrence => "first-occurrence",
            Self::ToolStatus => "tool-status",
        }
    }
}

/// What a reward belongs to whose rule finds no call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MissingCall {
    /// The whole rollout.
    #[default]
    Rollout,
    /// The last answered call.
    Final,
}

/// `[reward.attach]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RewardAttachment {
    /// Rule of the dimensions that are not named. `per-call`.
    pub default: Attachment,
    /// What rewards belong to whose rule finds no call. `rollout`.
    pub missing: MissingCall,
    /// Rules by dimension.
    pub dimensions: BTreeMap<String, Attachment>,
}

impl RewardAttachment {
    /// The rule of a dimension.
    #[must_use]
    pub fn rule(&self, dimension: &str) -> Attachment {
        self.dimensions.get(dimension).copied().unwrap_or(self.default)
    }

    /// The rewards of an attempt that count, in the order recorded, with the calls that they belong to. `spans` are the
    /// attempt's own: what a fork has from its ancestor is not among them, and rewards for that stay as they are given.
    #[must_use]
    pub fn attach(&self, spans: &[Span], rewards: &[Reward], sources: &[RewardSource]) -> Vec<Reward> {
        let facts = Facts::of(spans);
        let places = places(spans, rewards);
        let mut rewarded: BTreeSet<(u64, &str)> = BTreeSet::new();
        let mut attached = vec![];
        for (reward, place) in rewards.iter().zip(places).filter(|(reward, _)| sources.contains(&reward.source)) {
            let rule = self.rule(&reward.dimension);
            let found = match rule {
                Attachment::PerCall => reward.call_index.filter(|index| facts.is_answered(*index)),
                Attachment::Final => facts.last(),
                Attachment::FirstOccurrence => {
                    let is_free = |index: &u64| !rewarded.contains(&(*index, reward.dimension.as_str()));
                    facts.answered_before(place).rev().map(|call| call.call_index).find(is_free)
                }
                Attachment::ToolStatus => facts.asked_for_tool_before(place),
            };
            if let Some(index) = found {
                rewarded.insert((index, &reward.dimension));
            }
            let call_index = match (found, self.missing, rule) {
                (Some(index), ..) => Some(index),
                (None, MissingCall::Final, _) => facts.last(),
                // A call that was not answered, or is an ancestor's, stays named: totals know it, transitions do not.
                (None, MissingCall::Rollout, Attachment::PerCall) => reward.call_index,
                (None, MissingCall::Rollout, _) => None,
            };
            attached.push(Reward { call_index, ..reward.clone() });
        }
        attached
    }
}

/// Calls and tool calls in the order in which they ended.
struct Facts<'a> {
    /// With their places among the spans.
    answered: Vec<(usize, &'a LlmCall)>,
    /// Places of tool calls, with name and arguments.
    tools: Vec<(usize, &'a str, &'a str)>,
}

impl<'a> Facts<'a> {
    fn of(spans: &'a [Span]) -> Self {
        let mut facts = Self { answered: vec![], tools: vec![] };
        for (place, span) in spans.iter().enumerate() {
            match &span.body {
                SpanBody::Llm(call) if call.result.is_ok() => facts.answered.push((place, call)),
                SpanBody::Tool { name, arguments, .. } => facts.tools.push((place, name, arguments)),
                _ => {}
            }
        }
        facts
    }

    fn is_answered(&self, index: u64) -> bool {
        self.answered.iter().any(|(_, call)| call.call_index == index)
    }

    fn last(&self) -> Option<u64> {
        self.answered.iter().map(|(_, call)| call.call_index).max()
    }

    fn answered_before(&self, place: usize) -> impl DoubleEndedIterator<Item = &'a LlmCall> + Clone {
        self.answered.iter().filter(move |(ended, _)| *ended < place).map(|(_, call)| *call)
    }

    fn asked_for_tool_before(&self, place: usize) -> Option<u64> {
        let (tool, name, arguments) = self.tools.iter().rev().find(|(ended, ..)| *ended < place)?;
        asking_call(self.answered_before(*tool), name, arguments).map(|call| call.call_index)
    }
}

/// Where among the spans each reward was given; behind all of them where no span says. A record has its rewards in the order of
/// their spans, and of a fork those of its ancestors before its own, so both are compared from their ends.
fn places(spans: &[Span], rewards: &[Reward]) -> Vec<usize> {
    let mut given = spans.iter().enumerate().rev().filter_map(|(place, span)| match &span.body {
        SpanBody::Reward(reward) => Some((place, reward)),
        _ => None,
    });
    let mut places: Vec<usize> = rewards
        .iter()
        .rev()
        .map(|reward| given.next().filter(|(_, given)| *given == reward).map_or(spans.len(), |(place, _)| place))
        .collect();
    places.reverse();
    places
}
