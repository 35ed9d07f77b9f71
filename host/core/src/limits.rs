//! Every limit of a sandbox: a name with its unit, a default, and the reason for it. Reaching one is an outcome that names
//! the limit and its value.

use serde::{Deserialize, Serialize};

/// Limits of one attempt. Agent, every tool and the grader each have the guest limits for themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Linear memory of one component. 64 MiB: small Rust guests use 1 to 2.
    pub memory_bytes_max: u64,
    /// Elements of all tables of one component. 100,000: large interpreters have about 20,000.
    pub table_elements_max: u64,
    /// Guest time outside host calls, in milliseconds. 2,000: a small agent needs under 1.
    pub guest_cpu_ms_max: u64,
    /// Wall-clock time of an attempt in milliseconds, waiting for the model included. 300,000.
    pub attempt_wall_ms_max: u64,
    /// Guest time of one step of an algorithm, in milliseconds. 60,000; waiting for rollouts and training costs none.
    pub algorithm_step_cpu_ms_max: u64,
    /// LLM calls of one attempt. 64: an agent that asks more often is in a loop.
    pub llm_calls_max: u64,
    /// Completion tokens of one attempt. 65,536.
    pub completion_tokens_max: u64,
    /// Tool calls of one attempt. 256.
    pub tool_calls_max: u64,
    /// Spans that a guest may cause in one attempt. 2,000: what the store and a reader can bear.
    pub spans_max: u64,
    /// Bytes of one span that a guest emits. 64 KiB.
    pub span_bytes_max: u64,
    /// Bytes that standard output and standard error take together. 256 KiB.
    pub output_bytes_max: u64,
    /// Bytes of text in one host call, either way. 1 MiB.
    pub payload_bytes_max: u64,
    /// Rewards that one grading may return. 64.
    pub rewards_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes_max: 64 << 20,
            table_elements_max: 100_000,
            guest_cpu_ms_max: 2_000,
            attempt_wall_ms_max: 300_000,
            algorithm_step_cpu_ms_max: 60_000,
            llm_calls_max: 64,
            completion_tokens_max: 65_536,
            tool_calls_max: 256,
            spans_max: 2_000,
            span_bytes_max: 64 << 10,
            output_bytes_max: 256 << 10,
            payload_bytes_max: 1 << 20,
            rewards_max: 64,
        }
    }
}

/// Stack of one guest in bytes. A setting of the engine, the same for all: 512 KiB holds about 10,000 plain frames.
pub const STACK_BYTES_MAX: usize = 512 << 10;
