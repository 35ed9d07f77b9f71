//! A request as a server takes it.

use fulgurite_core::llm::{ChatRequest, Constraint, LlmError, Message, Role, Sampling, ToolSpec};
use fulgurite_core::seed::Seed;
use serde_json::{Map, Value, json};

use super::{EndpointSettings, ServerKind};

/// Bits of a seed: llama.cpp takes 32, SGLang fewer than 64, and none takes a sign.
const SEED_MASK: u64 = 0x7fff_ffff;

/// The body of a chat completion.
///
/// The servers that are named as such are told everything that truncates the distribution, also where it is to do nothing:
/// vLLM and SGLang take what is left out from the model's `generation_config.json`, llama.cpp from its own defaults (top-k 40,
/// top-p 0.95, min-p 0.05), and the log-probs of a rollout would be of another distribution than the one that drew it.
pub(super) fn body(
    endpoint: &EndpointSettings,
    model: &str,
    request: &ChatRequest,
    sampling: &Sampling,
    seed: Seed,
) -> Result<Value, LlmError> {
    let mut body = Map::new();
    let mut set = |name: &str, value: Value| body.insert(name.to_owned(), value);
    set("model", json!(model));
    set("messages", request.messages.iter().map(message).collect());
    set("n", json!(1));
    set("temperature", number(sampling.temperature));
    set("top_p", number(sampling.top_p));
    set("seed", json!(sampling.seed.unwrap_or(seed.value()) & SEED_MASK));
    if sampling.max_tokens > 0 {
        set("max_tokens", json!(sampling.max_tokens));
    }
    if !sampling.stop.is_empty() {
        set("stop", json!(sampling.stop));
    }
    if !request.tools.is_empty() {
        set("tools", request.tools.iter().map(tool).collect());
    }
    let named = endpoint.server != ServerKind::Openai;
    if sampling.top_k > 0 || named {
        // All three read -1 as all tokens; 0 is refused by some releases.
        set("top_k", if sampling.top_k > 0 { json!(sampling.top_k) } else { json!(-1) });
    }
    if sampling.min_p > 0.0 || named {
        set("min_p", number(sampling.min_p));
    }
    if named {
        set("logprobs", json!(true));
    }
    let refused = |field: &str| {
        let problem = format!("`{}`: this kind of server does not take `{field}`; leave it out", endpoint.section);
        Err(LlmError::Unsupported(problem))
    };
    if !sampling.logit_bias.is_empty() {
        let biases = sampling.logit_bias.iter().map(|entry| (entry.token.to_string(), number(entry.bias)));
        set("logit_bias", Value::Object(biases.collect()));
    }
    if !sampling.stop_token_ids.is_empty() {
        match endpoint.server {
            ServerKind::Vllm | ServerKind::Sglang => drop(set("stop_token_ids", json!(sampling.stop_token_ids))),
            ServerKind::Openai | ServerKind::LlamaCpp => return refused("stop_token_ids"),
        }
    }
    match endpoint.server {
        ServerKind::Openai if sampling.repetition_penalty.to_bits() != 1.0_f32.to_bits() => {
            return refused("repetition_penalty");
        }
        ServerKind::Openai => {}
        ServerKind::Vllm => {
            set("repetition_penalty", number(sampling.repetition_penalty));
            set("return_token_ids", json!(true));
        }
        ServerKind::Sglang => {
            set("repetition_penalty", number(sampling.repetition_penalty));
            set("return_token_ids", json!(true));
            set("return_prompt_token_ids", json!(true));
            set("return_meta_info", json!(true));
        }
        ServerKind::LlamaCpp => {
            set("repeat_penalty", number(sampling.repetition_penalty));
            // Without it every token comes with its 20 likeliest neighbours.
            set("top_logprobs", json!(1));
        }
    }
    match &sampling.constraint {
        None => {}
        Some(Constraint::JsonSchema(schema)) => {
            let schema = parsed("constraint.json_schema", schema)?;
            set("response_format", json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}));
        }
        Some(Constraint::Regex(pattern)) => match endpoint.server {
            ServerKind::Vllm => drop(set("structured_outputs", json!({"regex": pattern}))),
            ServerKind::Sglang => drop(set("regex", json!(pattern))),
            ServerKind::Openai | ServerKind::LlamaCpp => {
                let problem = "this kind of server takes no regular expression as constraint; give a JSON schema";
                return Err(LlmError::Unsupported(format!("`{}`: {problem}", endpoint.section)));
            }
        },
    }
    // Checked before by the sandbox; others may call as well.
    for tool in &request.tools {
        parsed(&format!("tools.{}.parameters", tool.name), &tool.parameters)?;
    }
    Ok(Value::Object(body))
}

fn parsed(field: &str, json: &str) -> Result<Value, LlmError> {
    serde_json::from_str(json).map_err(|error| LlmError::InvalidRequest(format!("{field}: not JSON: {error}")))
}

/// A number as people write it: 0.7 and not 0.699999988079071.
fn number(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, |value| json!(value))
}

fn tool(tool: &ToolSpec) -> Value {
    let parameters: Value = serde_json::from_str(&tool.parameters).unwrap_or_default();
    json!({"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": parameters}})
}

fn message(message: &Message) -> Value {
    let mut value = json!({"role": message.role.as_str(), "content": message.content});
    if let Some(fields) = value.as_object_mut() {
        if !message.tool_calls.is_empty() {
            let calls = message.tool_calls.iter().map(|call| {
                json!({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}})
            });
            fields.insert("tool_calls".to_owned(), calls.collect());
        }
        if let (Role::Tool, Some(id)) = (message.role, &message.tool_call_id) {
            fields.insert("tool_call_id".to_owned(), json!(id));
        }
    }
    value
}
