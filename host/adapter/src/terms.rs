//! Automatic rewards: what an attempt's own spans say about tool calls, format, length and repetition.
//!
//! A term is declared as a [`RewardTerm`]; [`RewardTerms`] judges the spans of a graded attempt by all of a run's. The same
//! spans give the same rewards, so a replay finds them again. They are the host's: agents and tools cannot give or take them.
//!
//! | kind | judges | value of a call | without anything to judge |
//! |---|---|---|---|
//! | `tool-status` | tool calls that ended: returned (`good`) or failed (`bad`); one that was not granted is not judged | sum over its tool calls | 0 |
//! | `tool-schema` | tool calls that the policy asked for, against the schema that the call offered: fits or not; a tool that was not offered does not fit | sum over its tool calls | 0 |
//! | `repeated-call` | tool calls that the policy asked for: new, or asked for before with equal arguments | sum over its tool calls | 0 |
//! | `format` | the text of the last answer, or of each: matches the pattern or not | `good` or `bad` | `bad` |
//! | `length` | drawn tokens n | `-min(1, n / tokens_max)` | 0 |
//! | `overlong` | drawn tokens n; L is `tokens_max` and c `cache_tokens` | 0 up to L - c, then `(L - c - n) / c`, -1 from L | 0 |
//! | `repetition` | n-grams of drawn tokens (of words, where a server returns no ids) | `-(1 - different / all)` | 0 |
//!
//! The value times `weight` is the reward. Of scope `call`, every call that has something to judge has one, and a rollout in
//! which no call has gets a single 0, so that each graded rollout has the dimension. Of scope `rollout` there is one for the
//! whole: sums of the first three kinds, all drawn tokens, n-grams of all answers counted answer by answer.

mod facts;
mod schema;

use fulgurite_core::record::RolloutMode;
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::reward_term::{REWARD_TERMS_MAX, RewardTerm, RewardTermKind, TermScope};
use fulgurite_core::span::Span;
use fulgurite_credit::shaping::overlong;
use regex::{Regex, RegexBuilder};

pub(crate) use self::facts::asking_call;
use self::facts::{Call, Facts};

/// Bytes that a compiled pattern may take. 1 MiB: far more than any format needs.
const PATTERN_BYTES_MAX: usize = 1 << 20;
/// Tokens of an n-gram where the config does not say. 3: a repeated pair of words is ordinary language.
const NGRAM_TOKENS: u32 = 3;

/// A term that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("reward term {index}: `{field}`: {problem}")]
pub struct InvalidTerm {
    /// Which one, from 0.
    pub index: usize,
    /// Its field.
    pub field: &'static str,
    /// What is wrong and what would be right.
    pub problem: String,
}

/// The terms of a run, ready to judge.
#[derive(Debug, Clone, Default)]
pub struct RewardTerms(Vec<Term>);

#[derive(Debug, Clone)]
struct Term {
    declared: RewardTerm,
    dimension: String,
    scope: TermScope,
    pattern: Option<Regex>,
}

/// What a term found for a call or a rollout, before its weight.
#[derive(Debug, Clone, PartialEq)]
struct Found {
    value: f64,
    why: String,
}

impl RewardTerms {
    /// Checks terms and compiles their patterns.
    ///
    /// # Errors
    /// The first term that makes no sense.
    pub fn new(terms: &[RewardTerm]) -> Result<Self, InvalidTerm> {
        if terms.len() > REWARD_TERMS_MAX {
            let problem = format!("a run has at most {REWARD_TERMS_MAX} terms");
            return Err(InvalidTerm { index: REWARD_TERMS_MAX, field: "kind", problem });
        }
        let compile = |(index, declared): (usize, &RewardTerm)| {
            declared.check().map_err(|(field, problem)| InvalidTerm { index, field, problem })?;
            let pattern = declared.pattern.as_ref().map(|pattern| {
                let compiled = RegexBuilder::new(pattern).size_limit(PATTERN_BYTES_MAX).build();
                compiled.map_err(|error| InvalidTerm { index, field: "pattern", problem: error.to_string() })
            });
            Ok(Term {
                dimension: declared.dimension(),
                scope: declared.per.unwrap_or(declared.kind.default_scope()),
                pattern: pattern.transpose()?,
                declared: declared.clone(),
            })
        };
        terms.iter().enumerate().map(compile).collect::<Result<_, _>>().map(Self)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// As they were declared.
    #[must_use]
    pub fn declared(&self) -> Vec<RewardTerm> {
        self.0.iter().map(|term| term.declared.clone()).collect()
    }

    /// The rewards of a graded attempt: term by term, call by call. `spans` are all that its agent caused, in one or two
    /// pieces. What is summed into another dimension follows its own reward, but not in the host's held-out evaluation.
    #[must_use]
    pub fn rewards(&self, spans: [&[Span]; 2], mode: RolloutMode) -> Vec<Reward> {
        if self.is_empty() {
            return vec![];
        }
        let facts = Facts::of(spans);
        let mut rewards = vec![];
        for term in &self.0 {
            for (call_index, found) in term.judge(&facts) {
                // Adding 0 makes 0 of what would be written as -0.
                let value = found.value * term.declared.weight + 0.0;
                let reward = |dimension: &String| Reward {
                    dimension: dimension.clone(),
                    value,
                    feedback: Some(found.why.clone()),
                    source: RewardSource::Host,
                    component: None,
                    call_index,
                };
                rewards.push(reward(&term.dimension));
                rewards.extend(term.declared.sum_into.iter().filter(|_| mode != RolloutMode::Test).map(reward));
            }
        }
        rewards
    }
}

impl Term {
    /// What is found, with the call that it belongs to.
    fn judge(&self, facts: &Facts<'_>) -> Vec<(Option<u64>, Found)> {
        let of_calls: Vec<(Option<u64>, Found)> = match self.scope {
            TermScope::Rollout => return vec![(None, self.of_rollout(facts))],
            TermScope::Call => {
                let found = facts.calls.iter().enumerate();
                found.filter_map(|(place, call)| Some((Some(call.index), self.of_call(facts, place)?))).collect()
            }
        };
        if of_calls.is_empty() {
            let nothing = Found { value: self.without_anything(), why: "there is nothing to judge".to_owned() };
            return vec![(None, nothing)];
        }
        of_calls
    }

    fn values(&self) -> (f64, f64) {
        let (good, bad) = self.declared.kind.default_values().unwrap_or((0.0, 0.0));
        (self.declared.good.unwrap_or(good), self.declared.bad.unwrap_or(bad))
    }

    fn without_anything(&self) -> f64 {
        if self.declared.kind == RewardTermKind::Format { self.values().1 } else { 0.0 }
    }

    /// `None` when the call has nothing that the term looks at.
    fn of_call(&self, facts: &Facts<'_>, place: usize) -> Option<Found> {
        let call = facts.calls.get(place)?;
        match self.declared.kind {
            RewardTermKind::ToolStatus | RewardTermKind::ToolSchema | RewardTermKind::RepeatedCall => {
                let judged = self.tool_calls(facts, Some(call));
                (judged.total > 0).then(|| self.sum(&judged))
            }
            RewardTermKind::Format => Some(self.format(call.text)),
            RewardTermKind::Length | RewardTermKind::Overlong => Some(self.tokens(call.drawn_tokens())),
            RewardTermKind::Repetition => Some(repetition_found(call.ngrams(self.ngram_tokens()))),
        }
    }

    fn of_rollout(&self, facts: &Facts<'_>) -> Found {
        match self.declared.kind {
            RewardTermKind::ToolStatus | RewardTermKind::ToolSchema | RewardTermKind::RepeatedCall => {
                self.sum(&self.tool_calls(facts, None))
            }
            RewardTermKind::Format => match facts.calls.last() {
                Some(last) => self.format(last.text),
                None => Found { value: self.values().1, why: "there is no answer".to_owned() },
            },
            RewardTermKind::Length | RewardTermKind::Overlong => {
                self.tokens(facts.calls.iter().map(Call::drawn_tokens).sum())
            }
            RewardTermKind::Repetition => {
                let counted = facts.calls.iter().map(|call| call.ngrams(self.ngram_tokens()));
                repetition_found(counted.fold((0, 0), |(a, b), (c, d)| (a + c, b + d)))
            }
        }
    }

    /// How many tool calls of a call, or of all, are there, how many of them are not as they should be, and what is wrong
    /// with the last of those.
    fn tool_calls(&self, facts: &Facts<'_>, of: Option<&Call<'_>>) -> Judged {
        let mut judged = Judged::default();
        let mut count = |problem: Option<String>| {
            judged.total += 1;
            if let Some(problem) = problem {
                judged.bad += 1;
                judged.problem = problem;
            }
        };
        if self.declared.kind == RewardTermKind::ToolStatus {
            let of_call = |tool: &&facts::ToolResult| of.is_none_or(|call| tool.asked_by == Some(call.index));
            facts.tools.iter().filter(of_call).for_each(|tool| count(tool.problem.clone()));
            return judged;
        }
        for (call, asked) in facts.asked() {
            if of.is_none_or(|of| of.index == call.index) {
                count(match self.declared.kind {
                    RewardTermKind::ToolSchema => asked.unfit.clone(),
                    _ => asked
                        .is_repeated
                        .then(|| format!("{} was asked for before with the same arguments", asked.name)),
                });
            }
        }
        judged
    }

    fn sum(&self, judged: &Judged) -> Found {
        let (good, bad) = self.values();
        let value = good * (judged.total - judged.bad) as f64 + bad * judged.bad as f64;
        let Judged { total, bad, problem } = judged;
        let why = if *bad == 0 {
            format!("{total} tool calls, none bad")
        } else {
            format!("{bad} of {total} tool calls bad: {problem}")
        };
        Found { value, why }
    }

    fn format(&self, text: &str) -> Found {
        let (good, bad) = self.values();
        let matches = self.pattern.as_ref().is_some_and(|pattern| pattern.is_match(text));
        let why = if matches { "the answer has the format" } else { "the answer does not have the format" };
        Found { value: if matches { good } else { bad }, why: why.to_owned() }
    }

    fn tokens(&self, tokens: u64) -> Found {
        let most = self.declared.tokens_max.unwrap_or(1);
        let value = match self.declared.cache_tokens {
            Some(cache) => overlong(tokens, most.into(), cache.into()),
            None => length_value(tokens, most),
        };
        Found { value, why: format!("{tokens} tokens, at most {most} are wanted") }
    }

    fn ngram_tokens(&self) -> usize {
        self.declared.ngram_tokens.unwrap_or(NGRAM_TOKENS) as usize
    }
}

/// Tool calls that were looked at.
#[derive(Debug, Default)]
struct Judged {
    total: u64,
    bad: u64,
    problem: String,
}

/// `-min(1, tokens / tokens_max)`.
#[must_use]
pub fn length_value(tokens: u64, tokens_max: u32) -> f64 {
    -(tokens as f64 / f64::from(tokens_max.max(1))).min(1.0)
}

/// `-(1 - different / all)` of the n-grams of a list; 0 when it is too short to have one.
#[must_use]
pub fn repetition_value<T: Ord>(tokens: &[T], ngram_tokens: usize) -> f64 {
    repetition_of(facts::count_ngrams(tokens, ngram_tokens))
}

fn repetition_of((different, all): (u64, u64)) -> f64 {
    if all == 0 { 0.0 } else { different as f64 / all as f64 - 1.0 }
}

fn repetition_found(counted: (u64, u64)) -> Found {
    let (different, all) = counted;
    Found { value: repetition_of(counted), why: format!("{different} of {all} n-grams are different") }
}
