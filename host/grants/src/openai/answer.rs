//! What a server answered, checked, as a completion.

use fulgurite_core::id::{PolicyVersion, ResponseId};
use fulgurite_core::llm::{Completion, FinishReason, KeptTokens, NotTrainable, Sampling, TokenData, ToolCall, Usage};
use serde::Deserialize;
use serde_json::Value;

/// Tool calls of one answer. 64: what one turn of an agent can make sense of.
const TOOL_CALLS_MAX: usize = 64;
/// Largest log-probability (nats) that rounding explains.
const LOG_PROB_MAX: f64 = 1e-3;
/// vLLM and OpenAI write -9999 for a token that they have no log-probability of.
const LOG_PROB_NONE: f64 = -9_998.0;

/// What is known of a call before its answer comes.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The completion's id.
    pub response_id: ResponseId,
    /// Which call of the attempt, from 0: ids of tool calls are made of it.
    pub call_index: u64,
    /// How was drawn.
    pub sampling: Sampling,
    /// Whether the endpoint is the policy. What others say is never trained on.
    pub is_policy: bool,
    /// Tokens that the model's context holds, where that is known.
    pub context_tokens_max: Option<u32>,
}

/// Why an answer is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MalformedAnswer {
    /// It is not JSON, or not of the shape of a chat completion.
    #[error("its answer is no chat completion: {0}")]
    NoCompletion(String),
    /// It has no choice.
    #[error("its answer has no choice")]
    NoChoice,
    /// It asks for too many tools.
    #[error("its answer has {0} tool calls, at most {TOOL_CALLS_MAX} are read")]
    TooManyToolCalls(usize),
    /// The server gave up in the middle.
    #[error("the server aborted the call")]
    Aborted,
}

/// Reads the body of an answer with status 200. Fields that are not known are left alone, and so are token ids and log-probs
/// that do not fit each other or the counts of the answer: a call without them is not trainable, which is no error.
///
/// # Errors
/// See [`MalformedAnswer`].
pub fn parse_completion(bytes: &[u8], asked: &Asked) -> Result<Completion, MalformedAnswer> {
    let answer: Answer =
        serde_json::from_slice(bytes).map_err(|error| MalformedAnswer::NoCompletion(error.to_string()))?;
    let choice = answer.choices.first().ok_or(MalformedAnswer::NoChoice)?;
    let finish = choice.finish_reason.as_deref().unwrap_or("stop");
    if finish == "abort" {
        return Err(MalformedAnswer::Aborted);
    }
    let mut text = choice.message.content.clone().unwrap_or_default();
    let tool_calls = tool_calls(choice, asked.call_index, &mut text)?;
    let usage = known(answer.usage.as_ref()).copied().unwrap_or_default();
    let usage = Usage { prompt_tokens: usage.prompt_tokens, completion_tokens: usage.completion_tokens };
    let tokens = if asked.is_policy { tokens(&answer, choice, usage) } else { None };
    Ok(Completion {
        text,
        finish_reason: finish_reason(finish, &tool_calls, usage, asked),
        tool_calls,
        usage: tokens.as_ref().map_or(usage, counted),
        response_id: asked.response_id.clone(),
        not_trainable: not_trainable(tokens.as_ref(), asked),
        tokens,
    })
}

/// Tool calls with ids of the host. Arguments that are no JSON object are the model's mistake: such a call stays text, as it
/// does with a local policy.
fn tool_calls(choice: &Choice, call_index: u64, text: &mut String) -> Result<Vec<ToolCall>, MalformedAnswer> {
    let asked_for = choice.message.tool_calls.as_deref().unwrap_or_default();
    if asked_for.len() > TOOL_CALLS_MAX {
        return Err(MalformedAnswer::TooManyToolCalls(asked_for.len()));
    }
    let mut calls = vec![];
    for Call { function } in asked_for {
        let arguments = match &function.arguments {
            Value::String(written) if written.trim().is_empty() => "{}".to_owned(),
            Value::String(written) => written.clone(),
            Value::Null => "{}".to_owned(),
            other => other.to_string(),
        };
        let is_object = serde_json::from_str::<Value>(&arguments).is_ok_and(|value| value.is_object());
        if is_object && !function.name.is_empty() {
            let id = format!("call-{call_index}-{}", calls.len());
            calls.push(ToolCall { id, name: function.name.clone(), arguments });
        } else {
            text.push_str(&function.name);
            text.push_str(&arguments);
        }
    }
    Ok(calls)
}

fn finish_reason(finish: &str, tool_calls: &[ToolCall], usage: Usage, asked: &Asked) -> FinishReason {
    let used = u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens);
    match finish {
        "length" if asked.context_tokens_max.is_some_and(|most| used >= u64::from(most)) => FinishReason::ContextLength,
        "length" => FinishReason::Length,
        _ if !tool_calls.is_empty() => FinishReason::ToolCalls,
        _ => FinishReason::Stop,
    }
}

fn counted(tokens: &TokenData) -> Usage {
    let count = |ids: &[u32]| u32::try_from(ids.len()).unwrap_or(u32::MAX);
    Usage { prompt_tokens: count(&tokens.prompt_ids), completion_tokens: count(&tokens.completion_ids) }
}

fn not_trainable(tokens: Option<&TokenData>, asked: &Asked) -> Option<NotTrainable> {
    let sampling = &asked.sampling;
    if !asked.is_policy {
        return Some(NotTrainable::OtherEndpoint);
    }
    if tokens.is_none() {
        return Some(NotTrainable::NoTokenIds);
    }
    // At another temperature than 1 some servers return log-probs of the softmax at 1 and some those at the temperature, and
    // none says which.
    let whole = sampling.temperature.to_bits() == 1.0_f32.to_bits()
        && sampling.top_p >= 1.0
        && sampling.top_k == 0
        && sampling.min_p <= 0.0
        && sampling.repetition_penalty.to_bits() == 1.0_f32.to_bits()
        && sampling.logit_bias.is_empty()
        && sampling.constraint.is_none();
    (!whole).then_some(NotTrainable::TruncatedSampling)
}

/// Ids and log-probs of an answer that has both for every token, in whatever way its server returns them; `None` otherwise.
fn tokens(answer: &Answer, choice: &Choice, usage: Usage) -> Option<TokenData> {
    let prompt_ids = known(answer.prompt_token_ids.as_ref()).or_else(|| known(choice.prompt_token_ids.as_ref()))?;
    let said = known(choice.logprobs.as_ref()).and_then(|found| found.content.as_deref()).unwrap_or_default();
    let drawn = known(choice.meta_info.as_ref()).map(|meta| meta.output_token_logprobs.as_slice()).unwrap_or_default();
    let completion_ids: Vec<u32> = match known(choice.token_ids.as_ref()) {
        Some(ids) => ids.clone(),
        None if !drawn.is_empty() => drawn.iter().map(|token| token.1).collect(),
        None => said.iter().map(|token| token.id).collect::<Option<_>>()?,
    };
    let log_probs: Vec<f64> = if drawn.is_empty() {
        said.iter().map(|token| token.logprob).collect()
    } else {
        drawn.iter().map(|token| token.0).collect()
    };
    let fits = |ids: &[u32], counted: u32| {
        !ids.is_empty() && (counted == 0 || u32::try_from(ids.len()).is_ok_and(|ids| ids == counted))
    };
    let possible = |log_prob: &f64| (LOG_PROB_NONE..=LOG_PROB_MAX).contains(log_prob);
    let whole = fits(prompt_ids, usage.prompt_tokens)
        && fits(&completion_ids, usage.completion_tokens)
        && log_probs.len() == completion_ids.len()
        && log_probs.iter().all(possible);
    whole.then(|| TokenData {
        prompt_ids: prompt_ids.clone(),
        completion_ids,
        log_probs: log_probs.into_iter().map(narrow).collect(),
        processed_log_probs: vec![],
        // Weights of somebody else have no number here.
        policy_version: PolicyVersion(0),
        token_versions: vec![],
        kept: KeptTokens::default(),
        model: None,
    })
}

#[expect(clippy::cast_possible_truncation, reason = "log-probs are kept as f32, and this one is in range")]
fn narrow(log_prob: f64) -> f32 {
    log_prob.min(0.0) as f32
}

/// A value of the shape that is known, or another one: what an answer is worth without it must not fail for it.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Known<T> {
    Is(T),
    Other(serde::de::IgnoredAny),
}

impl<T> Known<T> {
    const fn get(&self) -> Option<&T> {
        match self {
            Self::Is(value) => Some(value),
            Self::Other(_) => None,
        }
    }
}

fn known<T>(field: Option<&Known<T>>) -> Option<&T> {
    field.and_then(Known::get)
}

#[derive(Debug, Deserialize)]
struct Answer {
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Known<Counts>>,
    /// vLLM.
    #[serde(default)]
    prompt_token_ids: Option<Known<Vec<u32>>>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    message: Said,
    #[serde(default)]
    finish_reason: Option<String>,
    #[serde(default)]
    logprobs: Option<Known<LogProbs>>,
    /// vLLM and SGLang.
    #[serde(default)]
    token_ids: Option<Known<Vec<u32>>>,
    /// SGLang.
    #[serde(default)]
    prompt_token_ids: Option<Known<Vec<u32>>>,
    /// SGLang.
    #[serde(default)]
    meta_info: Option<Known<MetaInfo>>,
}

#[derive(Debug, Deserialize)]
struct Said {
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<Call>>,
}

#[derive(Debug, Deserialize)]
struct Call {
    function: Function,
}

#[derive(Debug, Deserialize)]
struct Function {
    name: String,
    /// JSON text, or JSON itself from some servers.
    #[serde(default)]
    arguments: Value,
}

#[derive(Debug, Deserialize)]
struct LogProbs {
    #[serde(default)]
    content: Option<Vec<TokenLogProb>>,
}

#[derive(Debug, Deserialize)]
struct TokenLogProb {
    logprob: f64,
    /// llama.cpp.
    #[serde(default)]
    id: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct MetaInfo {
    /// Log-probability, id, and text or null.
    #[serde(default)]
    output_token_logprobs: Vec<(f64, u32, serde::de::IgnoredAny)>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
struct Counts {
    prompt_tokens: u32,
    completion_tokens: u32,
}

#[cfg(test)]
mod tests;
