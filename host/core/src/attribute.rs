//! Attribute names, all in one place. `gen_ai.*` follows OpenTelemetry's semantic conventions, which are still marked
//! "Development": when they move, only this file does.

/// Attributes that a guest or a client may not set: they are filed under [`GUEST_PREFIX`] instead.
pub const RESERVED_PREFIXES: [&str; 2] = ["fulgurite.", "gen_ai."];
/// Where reserved names from guests go.
pub const GUEST_PREFIX: &str = "guest.";

/// OpenTelemetry, of a resource: what has recorded.
pub const SERVICE_NAME: &str = "service.name";
/// OpenTelemetry, of a resource: its version.
pub const SERVICE_VERSION: &str = "service.version";
/// Of a resource: the run.
pub const RUN_NAME: &str = "fulgurite.run.name";
/// Rollout id.
pub const ROLLOUT_ID: &str = "fulgurite.rollout.id";
/// Attempt number, from 1.
pub const ATTEMPT_NUMBER: &str = "fulgurite.attempt.number";
/// Order inside the attempt.
pub const SPAN_SEQUENCE: &str = "fulgurite.span.sequence";
/// Outcome kind.
pub const OUTCOME_KIND: &str = "fulgurite.outcome.kind";
/// Outcome detail.
pub const OUTCOME_DETAIL: &str = "fulgurite.outcome.detail";
/// Agent role of a call.
pub const AGENT_ROLE: &str = "fulgurite.agent.role";
/// Index of an LLM call in its attempt.
pub const LLM_CALL_INDEX: &str = "fulgurite.llm.call_index";
/// Text of a completion.
pub const COMPLETION_TEXT: &str = "fulgurite.llm.completion";
/// Arguments of a tool call.
pub const TOOL_ARGUMENTS: &str = "fulgurite.tool.arguments";
/// Result of a tool call.
pub const TOOL_RESULT: &str = "fulgurite.tool.result";
/// Dimension of a reward.
pub const REWARD_DIMENSION: &str = "fulgurite.reward.dimension";
/// Value of a reward.
pub const REWARD_VALUE: &str = "fulgurite.reward.value";
/// Name of a prompt template.
pub const TEMPLATE_NAME: &str = "fulgurite.template.name";
/// Version of the resources.
pub const RESOURCES_VERSION: &str = "fulgurite.resources.version";
/// Level of a log line.
pub const LOG_LEVEL: &str = "fulgurite.log.level";
/// Text of a log line.
pub const LOG_TEXT: &str = "fulgurite.log.text";

/// On a root event: fingerprints of all events of the attempt. See [`crate::recording`].
pub const RECORDING_FINGERPRINTS: &str = "fulgurite.recording.fingerprints";
/// On the root event of an attempt that was ended from outside: the first event that was not the guest's doing any more.
pub const RECORDING_CUT_EVENT: &str = "fulgurite.recording.cut_event";
/// Beside it: how much the guest had done.
pub const RECORDING_CUT_ACTS: &str = "fulgurite.recording.cut_acts";

/// OpenTelemetry: operation.
pub const GEN_AI_OPERATION_NAME: &str = "gen_ai.operation.name";
/// OpenTelemetry: sampling temperature.
pub const GEN_AI_REQUEST_TEMPERATURE: &str = "gen_ai.request.temperature";
/// OpenTelemetry: id of the completion.
pub const GEN_AI_RESPONSE_ID: &str = "gen_ai.response.id";
/// OpenTelemetry: tokens of the prompt.
pub const GEN_AI_USAGE_INPUT_TOKENS: &str = "gen_ai.usage.input_tokens";
/// OpenTelemetry: tokens of the completion.
pub const GEN_AI_USAGE_OUTPUT_TOKENS: &str = "gen_ai.usage.output_tokens";
/// OpenTelemetry: tool name.
pub const GEN_AI_TOOL_NAME: &str = "gen_ai.tool.name";

/// Files a name that a guest gave under [`GUEST_PREFIX`] when it is reserved.
#[must_use]
pub fn guest_name(name: &str) -> String {
    if RESERVED_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
        format!("{GUEST_PREFIX}{name}")
    } else {
        name.to_owned()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_guest_cannot_forge_reserved_names() {
        assert_eq!(super::guest_name("gen_ai.response.id"), "guest.gen_ai.response.id");
        assert_eq!(super::guest_name("fulgurite.reward.value"), "guest.fulgurite.reward.value");
        assert_eq!(super::guest_name("my.key"), "my.key");
    }
}
