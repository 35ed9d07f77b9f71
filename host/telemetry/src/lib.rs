//! Spans to OpenTelemetry and back.
//!
//! [`export`] renders the spans of attempts as OTLP, under the names of `fulgurite_core::attribute`; [`Collected`] takes
//! OTLP from others and makes spans of it. The file format is OTLP in JSON with one `ExportTraceServiceRequest` on each
//! line, which collectors read and write.
//!
//! What it is not: a backup. An export says what happened in words that other programs know, and what they do not know,
//! such as token ids, is left out; the store's own export loses nothing. And what is imported is never trained on: it has no
//! LLM calls that our engine or a granted endpoint has answered, and attributes of reserved names are filed under `guest.`,
//! so that nobody can claim it has.
//!
//! ```
//! use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
//! use fulgurite_telemetry::Collected;
//!
//! let line = r#"{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"0000000000000000000000000000abcd",
//!     "spanId":"0000000000000001","name":"work","startTimeUnixNano":"5","endTimeUnixNano":"9"}]}]}]}"#;
//! let mut collected = Collected::default();
//! collected.add_json(line)?;
//! let trace = collected.into_traces().pop().ok_or("no trace")?;
//! let key = AttemptKey { rollout: RolloutId::new("a")?, attempt: AttemptNumber::FIRST };
//! assert_eq!(trace.spans(&key)[0].name, "work");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod collect;
mod export;

pub use collect::{Collected, CollectedTrace, SPANS_MAX, TelemetryError};
pub use export::{Recorder, export, export_json};
