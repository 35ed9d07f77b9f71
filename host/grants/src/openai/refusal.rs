//! Answers that are none: what they mean, and whether asking again can help.

use std::time::Duration;

use fulgurite_core::llm::LlmError;
use serde_json::Value;

use super::EndpointSettings;
use crate::http_client::{HttpError, HttpResponse};

/// Longest part of an error's body that is told on, in characters.
const ERROR_CHARACTERS_MAX: usize = 300;
/// Longest pause that a server may ask for. 60 s: a rollout that waits longer is better tried again later.
const RETRY_AFTER_MAX: Duration = Duration::from_mins(1);

/// What follows from a failure.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Asking again can help.
    Again {
        /// What went wrong.
        problem: String,
        /// What the server says about when.
        after: Option<Duration>,
    },
    /// It cannot.
    Final(LlmError),
}

/// What follows from a call that has no answer.
pub(super) fn of_error(endpoint: &EndpointSettings, error: HttpError) -> Refusal {
    match error {
        HttpError::Unreachable(_) | HttpError::Timeout { .. } | HttpError::Failed(_) => {
            Refusal::Again { problem: error.to_string(), after: None }
        }
        HttpError::LimitReached { name, value } if name == "http_response_bytes_max" => Refusal::Final(
            endpoint.unavailable(format!("its answer is longer than `answer_bytes_max` of {value} bytes allows")),
        ),
        HttpError::LimitReached { value, .. } => {
            Refusal::Final(LlmError::InvalidRequest(format!("it has more than {value} bytes as JSON")))
        }
        error @ (HttpError::InvalidRequest(_) | HttpError::Denied(_)) => Refusal::Final(endpoint.unavailable(error)),
    }
}

/// What follows from an answer with another status than 200. `max_tokens` is what was asked for, 0 for none.
pub(super) fn of_response(endpoint: &EndpointSettings, response: &HttpResponse, max_tokens: u32) -> Refusal {
    let body: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    // OpenAI, llama.cpp and newer releases of vLLM wrap it; others do not.
    let error = body.get("error").filter(|error| error.is_object()).unwrap_or(&body);
    let word = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or_default();
    let message = Some(word("message"))
        .filter(|message| !message.is_empty())
        .map_or_else(|| String::from_utf8_lossy(&response.body).into_owned(), str::to_owned);
    let shown: String = message.chars().take(ERROR_CHARACTERS_MAX).collect();
    let problem = format!("status {}: {shown}", response.status);
    let final_problem = |fix: String| Refusal::Final(endpoint.unavailable(format!("{problem}; {fix}")));
    if let Some(exceeded) = context_exceeded(endpoint, response.status, error, &message, max_tokens) {
        return Refusal::Final(exceeded);
    }
    match response.status {
        400 | 413 | 422 => Refusal::Final(LlmError::InvalidRequest(format!("`{}`: {problem}", endpoint.section))),
        401 | 403 => final_problem(match endpoint.secrets() {
            none if none.is_empty() => {
                format!("say in `{}.api_key_env` which environment variable has the key", endpoint.section)
            }
            names => format!("the key is what the environment variable {names} has"),
        }),
        404 => final_problem(format!(
            "`{}.url` is up to what comes before `/chat/completions`, and `model` is the name of a model that the server has",
            endpoint.section
        )),
        // A bill that is not paid is not paid a second later.
        429 if word("code") == "insufficient_quota" => Refusal::Final(endpoint.unavailable(problem)),
        408 | 409 | 425 | 429 | 500.. => match retry_after(response) {
            Some(after) if after > RETRY_AFTER_MAX => {
                final_problem(format!("it wants to be left alone for {} s", after.as_secs()))
            }
            after => Refusal::Again { problem, after },
        },
        _ => Refusal::Final(endpoint.unavailable(problem)),
    }
}

/// The pause that a server asks for, where it says it in seconds. A date is not followed: the clocks may differ.
fn retry_after(response: &HttpResponse) -> Option<Duration> {
    let header = |wanted: &str| response.headers.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.trim());
    let ms = header("retry-after-ms").and_then(|value| value.parse().ok()).map(Duration::from_millis);
    ms.or_else(|| header("retry-after").and_then(|value| value.parse().ok()).map(Duration::from_secs))
}

/// Whether the prompt has outgrown the model's context. That is blamed on the policy, so it must not be confused with a
/// request that is wrong: a `max_tokens` that no prompt at all would leave room for is the config's mistake.
fn context_exceeded(
    endpoint: &EndpointSettings,
    status: u16,
    error: &Value,
    message: &str,
    max_tokens: u32,
) -> Option<LlmError> {
    let word = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or_default();
    let number = |name: &str| error.get(name).and_then(Value::as_u64).and_then(|value| u32::try_from(value).ok());
    let said = message.to_ascii_lowercase();
    let by_name = word("code") == "context_length_exceeded" || word("type") == "exceed_context_size_error";
    let by_text = ["context length", "context size", "context window"].iter().any(|words| said.contains(words));
    if !(by_name || (matches!(status, 400 | 413 | 422) && by_text)) {
        return None;
    }
    let context = number("n_ctx")
        .or_else(|| {
            ["length is ", "length of ", "length (", "size (", "size of "]
                .iter()
                .find_map(|before| number_after(&said, before))
        })
        .or(endpoint.context_tokens_max)
        .unwrap_or(0);
    if context > 0 && max_tokens >= context {
        let problem = format!(
            "`max_tokens` of {max_tokens} leaves no room for a prompt: the model's context holds {context} tokens"
        );
        return Some(LlmError::InvalidRequest(format!("`{}`: {problem}", endpoint.section)));
    }
    let prompt = number("n_prompt_tokens")
        .or_else(|| {
            [" input tokens", " in the messages", " tokens) is longer", " tokens from the input"]
                .iter()
                .find_map(|after| number_before(&said, after))
        })
        .unwrap_or(0);
    Some(LlmError::ContextLengthExceeded { prompt_tokens: prompt, context_tokens_max: context })
}

fn number_after(text: &str, before: &str) -> Option<u32> {
    let (_, rest) = text.split_once(before)?;
    let end = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
    rest.get(..end)?.parse().ok()
}

fn number_before(text: &str, after: &str) -> Option<u32> {
    let (rest, _) = text.split_once(after)?;
    let start = rest.rfind(|letter: char| !letter.is_ascii_digit()).map_or(0, |at| at + 1);
    rest.get(start..)?.parse().ok()
}

#[cfg(test)]
mod tests;
