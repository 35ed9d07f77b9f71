//! What the terms look at, read from spans once.

use std::collections::BTreeSet;

use fulgurite_core::llm::{Completion, ToolSpec};
use fulgurite_core::span::{LlmCall, Span, SpanBody};
use fulgurite_core::tool::ToolError;
use serde_json::Value;

use super::schema::{Verdict, judge};

/// Longest text of a tool's error that goes into a reward's feedback, in characters.
const ERROR_CHARACTERS_MAX: usize = 160;

/// An answered call of the policy.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) index: u64,
    pub(super) text: &'a str,
    completion: &'a Completion,
    asked: Vec<Asked>,
}

/// A tool call that the policy asked for.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) name: String,
    /// Why its arguments do not fit.
    pub(super) unfit: Option<String>,
    /// Whether it was asked for before, with equal arguments.
    pub(super) is_repeated: bool,
}

/// A tool call that ended.
#[derive(Debug)]
pub(super) struct ToolResult {
    /// The policy's call that asked for it.
    pub(super) asked_by: Option<u64>,
    /// Why it failed.
    pub(super) problem: Option<String>,
}

/// All of an attempt.
#[derive(Debug, Default)]
pub(super) struct Facts<'a> {
    /// By index.
    pub(super) calls: Vec<Call<'a>>,
    pub(super) tools: Vec<ToolResult>,
}

impl<'a> Facts<'a> {
    pub(super) fn of(spans: [&'a [Span]; 2]) -> Self {
        let mut facts = Self::default();
        let mut answered: Vec<&LlmCall> = vec![];
        let mut offered: &[ToolSpec] = &[];
        for span in spans.into_iter().flatten() {
            match &span.body {
                SpanBody::Llm(call) => {
                    offered = call.tools.as_deref().unwrap_or(offered);
                    let Ok(completion) = &call.result else { continue };
                    answered.push(call);
                    if call.endpoint.is_none() {
                        facts.calls.push(Call::new(call, completion, offered));
                    }
                }
                SpanBody::Tool { name, arguments, result } => {
                    let problem = match result {
                        Ok(_) => None,
                        // The config's doing.
                        Err(ToolError::Denied(_) | ToolError::Unsupported(_)) => continue,
                        Err(error) => Some(shortened(&format!("{name}: {error}"))),
                    };
                    let asking = asking_call(answered.iter().copied(), name, arguments);
                    let asked_by = asking.filter(|call| call.endpoint.is_none()).map(|call| call.call_index);
                    facts.tools.push(ToolResult { asked_by, problem });
                }
                _ => {}
            }
        }
        facts.calls.sort_by_key(|call| call.index);
        let mut seen = BTreeSet::new();
        for call in &mut facts.calls {
            for (asked, tool) in call.asked.iter_mut().zip(&call.completion.tool_calls) {
                asked.is_repeated = !seen.insert((tool.name.clone(), canonical(&tool.arguments)));
            }
        }
        facts
    }

    /// Every tool call that the policy asked for, with the call that did.
    pub(super) fn asked(&self) -> impl Iterator<Item = (&Call<'a>, &Asked)> {
        self.calls.iter().flat_map(|call| call.asked.iter().map(move |asked| (call, asked)))
    }
}

impl<'a> Call<'a> {
    fn new(call: &LlmCall, completion: &'a Completion, offered: &[ToolSpec]) -> Self {
        let asked = completion.tool_calls.iter().map(|tool| {
            let spec = offered.iter().find(|spec| spec.name == tool.name);
            let unfit = match spec.map(|spec| judge(&spec.parameters, &tool.arguments)) {
                None => Some(format!("there is no tool {}", tool.name)),
                Some(Verdict::Unfit(problem)) => Some(format!("arguments of {}: {problem}", tool.name)),
                Some(Verdict::Fits | Verdict::NoSchema) => None,
            };
            Asked { name: shortened(&tool.name), unfit: unfit.as_deref().map(shortened), is_repeated: false }
        });
        Self { index: call.call_index, text: &completion.text, completion, asked: asked.collect() }
    }

    pub(super) fn drawn_tokens(&self) -> u64 {
        let known = self.completion.tokens.as_ref().map(|tokens| tokens.completion_ids.len() as u64);
        known.unwrap_or_else(|| u64::from(self.completion.usage.completion_tokens))
    }

    /// How many different n-grams the answer has, and how many in all.
    pub(super) fn ngrams(&self, size: usize) -> (u64, u64) {
        match &self.completion.tokens {
            Some(tokens) => count_ngrams(&tokens.completion_ids, size),
            None => count_ngrams(&self.text.split_whitespace().collect::<Vec<_>>(), size),
        }
    }
}

pub(super) fn count_ngrams<T: Ord>(tokens: &[T], size: usize) -> (u64, u64) {
    let windows = tokens.windows(size.max(1));
    let all = windows.len() as u64;
    (windows.collect::<BTreeSet<_>>().len() as u64, all)
}

/// Which of the calls that were answered before it asked for a tool call: the newest whose answer has that tool call; where
/// none has, because the agent reads its tool calls out of the text, the newest of all.
pub(crate) fn asking_call<'a>(
    answered: impl DoubleEndedIterator<Item = &'a LlmCall> + Clone,
    name: &str,
    arguments: &str,
) -> Option<&'a LlmCall> {
    let asks = |call: &&LlmCall| {
        let tools = call.result.as_ref().map_or(&[][..], |completion| &completion.tool_calls);
        tools.iter().any(|tool| {
            tool.name == name && (tool.arguments == arguments || canonical(&tool.arguments) == canonical(arguments))
        })
    };
    answered.clone().rev().find(asks).or_else(|| answered.into_iter().next_back())
}

/// JSON text without white space, with fields in order of their names; text that is no JSON as it is.
fn canonical(text: &str) -> String {
    fn sorted(value: Value) -> Value {
        match value {
            Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
            Value::Object(fields) => {
                let mut fields: Vec<_> = fields.into_iter().collect();
                fields.sort_by(|(a, _), (b, _)| a.cmp(b));
                Value::Object(fields.into_iter().map(|(name, value)| (name, sorted(value))).collect())
            }
            other => other,
        }
    }
    serde_json::from_str(text).map_or_else(|_| text.to_owned(), |value| sorted(value).to_string())
}

fn shortened(text: &str) -> String {
    text.chars().take(ERROR_CHARACTERS_MAX).collect()
}
