//! Every limit of a sandbox: a name with its unit, a default, and the reason for it. Reaching one is an outcome that names
//! the limit and its value.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Limits of one attempt. Agent, every tool and the grader each have the guest limits for themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Linear memory of one component. 64 MiB: small Rust guests use 1 to 2.
    pub memory_bytes_max: u64,
    /// Elements of all tables of one component. 100,000: large interpreters have about 20,000.
    pub table_elements_max: u64,
    /// Stack of one guest in bytes. 512 KiB: about 10,000 plain frames. The same for all plugins of a run: it is compiled in.
    pub stack_bytes_max: u64,
    /// Core instances of one component. 64: Python components have 14.
    pub instances_max: u64,
    /// Resources that one guest may hold at once: requests, calls, spans, streams. 16,384.
    pub handles_max: u64,
    /// Guest time outside host calls, in milliseconds. 2,000: a small agent needs under 1.
    pub guest_cpu_ms_max: u64,
    /// Instructions of one guest; 0 counts none. Unlike time it stops a guest at the same place on every machine, and costs
    /// guest code about a tenth of its speed. 0.
    pub fuel_max: u64,
    /// Wall-clock time of an attempt in milliseconds, waiting for the model included. 300,000.
    pub attempt_wall_ms_max: u64,
    /// Longest time in milliseconds without a sign of life: a host call that neither ends nor makes progress. The attempt is
    /// then dropped as unresponsive and tried again. 120,000.
    pub heartbeat_ms_max: u64,
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
    /// HTTP requests of one tool in one attempt. 64.
    pub http_calls_max: u64,
    /// Time of one HTTP request in milliseconds, from looking up the name to the last byte. 30,000: a tool may ask for less.
    pub http_timeout_ms_max: u64,
    /// Bytes of an HTTP request's headers and body. 1 MiB.
    pub http_request_bytes_max: u64,
    /// Bytes of an HTTP response's headers and body. 1 MiB: it is recorded.
    pub http_response_bytes_max: u64,
    /// Steps of SQLite's virtual machine that one statement may take, counted rather than timed so that it stops at the same
    /// place on every machine. 5,000,000: about a tenth of a second.
    pub sqlite_steps_max: u64,
    /// Rows that one query may return. 10,000.
    pub sqlite_rows_max: u64,
    /// Bytes of one value in a database. 1 MiB.
    pub sqlite_value_bytes_max: u64,
    /// Bytes that an attempt's copy of a database may have, and the snapshot that it is made from. 64 MiB.
    pub sqlite_database_bytes_max: u64,
    /// Files of a granted folder. 20,000.
    pub folder_files_max: u64,
    /// Bytes of one file of a granted folder. 64 MiB: a file that is open is held in memory, once per run.
    pub folder_file_bytes_max: u64,
    /// Bytes of all files of a granted folder. 4 GiB: they are read and hashed when a run starts.
    pub folder_bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes_max: 64 << 20,
            table_elements_max: 100_000,
            stack_bytes_max: 512 << 10,
            instances_max: 64,
            handles_max: 16_384,
            guest_cpu_ms_max: 2_000,
            fuel_max: 0,
            attempt_wall_ms_max: 300_000,
            heartbeat_ms_max: 120_000,
            algorithm_step_cpu_ms_max: 60_000,
            llm_calls_max: 64,
            completion_tokens_max: 65_536,
            tool_calls_max: 256,
            spans_max: 2_000,
            span_bytes_max: 64 << 10,
            output_bytes_max: 256 << 10,
            payload_bytes_max: 1 << 20,
            rewards_max: 64,
            http_calls_max: 64,
            http_timeout_ms_max: 30_000,
            http_request_bytes_max: 1 << 20,
            http_response_bytes_max: 1 << 20,
            sqlite_steps_max: 5_000_000,
            sqlite_rows_max: 10_000,
            sqlite_value_bytes_max: 1 << 20,
            sqlite_database_bytes_max: 64 << 20,
            folder_files_max: 20_000,
            folder_file_bytes_max: 64 << 20,
            folder_bytes_max: 4 << 30,
        }
    }
}

/// Limits of one plugin: a part of the run's, by name, none of them wider.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NarrowedLimits(pub BTreeMap<String, u64>);

/// Why limits of one plugin were refused. `field` is the limit's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidNarrowing {
    /// There is no such limit for it.
    #[error("there is no limit `{field}` for it; there are {}", .known.join(", "))]
    Unknown {
        /// What was written.
        field: String,
        /// The limits that apply.
        known: Vec<String>,
    },
    /// A plugin's limit can only be narrower than the run's.
    #[error("{value} is wider than the run's `limits.{field}` of {run}; say at most that, or widen the run's")]
    Wider {
        /// The limit.
        field: String,
        /// What was written.
        value: u64,
        /// The run's value.
        run: u64,
    },
}

impl InvalidNarrowing {
    /// Name of the limit.
    #[must_use]
    pub fn field(&self) -> &str {
        match self {
            Self::Unknown { field, .. } | Self::Wider { field, .. } => field,
        }
    }
}

/// Limits that single plugins cannot have for themselves.
const RUN_WIDE: [&str; 2] = ["stack_bytes_max", "heartbeat_ms_max"];

impl NarrowedLimits {
    /// Whether nothing is narrowed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The run's limits with these in their places. `known` are the names that apply to the plugin.
    ///
    /// # Errors
    /// When a name is unknown or a value is wider than the run's.
    pub fn of(&self, run: &Limits, known: &[&str]) -> Result<Limits, InvalidNarrowing> {
        let mut values = serde_json::to_value(run).unwrap_or_default();
        for (field, value) in &self.0 {
            let unknown = || InvalidNarrowing::Unknown {
                field: field.clone(),
                known: known.iter().filter(|name| !RUN_WIDE.contains(*name)).map(|name| (*name).to_owned()).collect(),
            };
            // The stack is compiled into all guests of a run alike, and silence is judged for attempts as a whole.
            let own = known.contains(&field.as_str()) && !RUN_WIDE.contains(&field.as_str());
            let place = values.get_mut(field).filter(|_| own).ok_or_else(unknown)?;
            let limit = place.as_u64().unwrap_or(0);
            // No fuel is the widest of all.
            let unlimited = |value: u64| field == "fuel_max" && value == 0;
            if !unlimited(limit) && (*value > limit || unlimited(*value)) {
                return Err(InvalidNarrowing::Wider { field: field.clone(), value: *value, run: limit });
            }
            *place = (*value).into();
        }
        Ok(serde_json::from_value(values).unwrap_or_else(|_| run.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn narrowed(field: &str, value: u64, run: &Limits) -> Result<Limits, InvalidNarrowing> {
        let known = ["guest_cpu_ms_max", "memory_bytes_max", "fuel_max"];
        NarrowedLimits(BTreeMap::from([(field.to_owned(), value)])).of(run, &known)
    }

    #[test]
    fn a_plugins_limits_are_the_runs_or_narrower() {
        let run = Limits { guest_cpu_ms_max: 100, ..Limits::default() };
        assert_eq!(narrowed("guest_cpu_ms_max", 100, &run).unwrap(), run);
        assert_eq!(narrowed("guest_cpu_ms_max", 7, &run).unwrap(), Limits { guest_cpu_ms_max: 7, ..run.clone() });
        let wider = narrowed("guest_cpu_ms_max", 101, &run).unwrap_err().to_string();
        assert!(wider.contains("101") && wider.contains("limits.guest_cpu_ms_max") && wider.contains("100"), "{wider}");
        let unknown = narrowed("llm_calls_max", 1, &run).unwrap_err().to_string();
        assert!(unknown.contains("llm_calls_max") && unknown.contains("memory_bytes_max"), "{unknown}");
    }

    #[test]
    fn no_fuel_is_the_widest_fuel() {
        let free = Limits::default();
        assert_eq!(narrowed("fuel_max", 5, &free).unwrap().fuel_max, 5);
        let counted = Limits { fuel_max: 10, ..free };
        assert_eq!(narrowed("fuel_max", 10, &counted).unwrap().fuel_max, 10);
        assert!(narrowed("fuel_max", 0, &counted).is_err());
        assert!(narrowed("fuel_max", 11, &counted).is_err());
    }
}
