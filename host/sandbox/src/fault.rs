//! Why a guest was stopped, and which outcome that is.

use std::fmt::Write;

use fulgurite_core::outcome::{AttemptOutcome, LimitReached, OutcomeKind};
use wasmtime::component::ResourceTableError;
use wasmtime::{Trap, WasmBacktrace};

/// Most bytes of a backtrace that go into an outcome's detail.
const BACKTRACE_BYTES_MAX: usize = 1_500;

/// The host ends a guest: travels as an error through wasmtime and is found again by [`outcome_of`].
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}", .0.detail)]
pub(crate) struct Stop(pub(crate) AttemptOutcome);

impl Stop {
    pub(crate) fn limit(kind: OutcomeKind, name: &str, value: u64) -> Self {
        Self(AttemptOutcome::limited(kind, name, value))
    }

    /// A guest broke a contract that its WIT states.
    pub(crate) fn trap(detail: impl Into<String>) -> Self {
        Self(AttemptOutcome::failed(OutcomeKind::Trap, detail))
    }

    /// The error that makes wasmtime unwind the guest.
    pub(crate) fn error(self) -> wasmtime::Error {
        wasmtime::Error::new(self)
    }
}

/// Where an error came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum During {
    /// Making the instance: what is not the guest's doing is the host's.
    Instantiation,
    /// A call: every error that the host does not raise is the guest's.
    Call,
}

/// Bounds that wasmtime itself enforces and whose errors do not say their value.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_field_names, reason = "limits are called what the config calls them")]
pub(crate) struct Bounds {
    /// Bytes that one call may carry.
    pub(crate) payload_bytes_max: u64,
    /// Handles that a guest may hold at once.
    pub(crate) handles_max: u64,
    /// Core instances of a component.
    pub(crate) instances_max: u64,
    /// Its stack.
    pub(crate) stack_bytes_max: u64,
    /// Instructions, when they are counted.
    pub(crate) fuel_max: u64,
}

/// The outcome of a guest that ended with an error.
pub(crate) fn outcome_of(error: &wasmtime::Error, during: During, bounds: Bounds) -> AttemptOutcome {
    if let Some(stop) = error.downcast_ref::<Stop>() {
        return stop.0.clone();
    }
    let trap = error.downcast_ref::<Trap>();
    if trap == Some(&Trap::StackOverflow) {
        return AttemptOutcome::limited(OutcomeKind::StackLimit, "stack_bytes_max", bounds.stack_bytes_max);
    }
    if trap == Some(&Trap::OutOfFuel) {
        return AttemptOutcome::limited(OutcomeKind::CpuLimit, "fuel_max", bounds.fuel_max);
    }
    // wasmtime keeps the types of these errors private; tests pin their texts.
    let says = |text: &str| error.chain().any(|cause| cause.to_string().contains(text));
    if says("fuel allocated for hostcalls") {
        return AttemptOutcome::limited(OutcomeKind::OutputLimit, "payload_bytes_max", bounds.payload_bytes_max);
    }
    if says("store handle limit exceeded") || matches!(error.downcast_ref(), Some(ResourceTableError::Full)) {
        return AttemptOutcome::limited(OutcomeKind::MemoryLimit, "handles_max", bounds.handles_max);
    }
    if says("instance count too high") {
        return AttemptOutcome::limited(OutcomeKind::MemoryLimit, "instances_max", bounds.instances_max);
    }
    if let Some(exit) = error.downcast_ref::<wasmtime_wasi::I32Exit>() {
        return AttemptOutcome::failed(OutcomeKind::Trap, format!("the guest called exit with code {}", exit.0));
    }
    if trap.is_none() && during == During::Instantiation {
        return AttemptOutcome::failed(OutcomeKind::HostFault, format!("cannot instantiate: {}", causes(error)));
    }
    AttemptOutcome::failed(OutcomeKind::Trap, reason(error))
}

/// The reason of a trap with the functions that were running, innermost first.
///
/// Functions and no places in them: wasmtime attributes a trap behind a function's first epoch check to one instruction or
/// another, depending on whether the check's slow path ran, and a replay compares this text.
fn reason(error: &wasmtime::Error) -> String {
    let Some(backtrace) = error.downcast_ref::<WasmBacktrace>() else { return causes(error) };
    let mut text = "wasm backtrace:".to_owned();
    for (depth, frame) in backtrace.frames().iter().enumerate() {
        let module = frame.module().name().unwrap_or("<unknown>");
        match frame.func_name() {
            Some(name) => _ = write!(text, "\n{depth:>5}: {module}!{name}"),
            None => _ = write!(text, "\n{depth:>5}: {module}!<wasm function {}>", frame.func_index()),
        }
    }
    truncate(&mut text, BACKTRACE_BYTES_MAX);
    format!("{}\n{text}", error.root_cause())
}

fn causes(error: &wasmtime::Error) -> String {
    let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
    causes.join(": ")
}

/// Cuts a text to at most `bytes_max` bytes at a character's border.
pub(crate) fn truncate(text: &mut String, bytes_max: usize) {
    if text.len() > bytes_max {
        let mut end = bytes_max;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
}

/// The same outcome, blamed on a tool or a grader instead of the agent.
pub(crate) fn blamed_on(kind: OutcomeKind, who: &str, outcome: AttemptOutcome) -> AttemptOutcome {
    let detail = format!("{who}: {}: {}", outcome.kind.as_str(), outcome.detail);
    let limit: Option<LimitReached> = outcome.limit;
    // The machine's faults stay the machine's: they are worth a retry.
    let kind = if outcome.kind == OutcomeKind::HostFault { OutcomeKind::HostFault } else { kind };
    AttemptOutcome { kind, output: "null".to_owned(), detail, limit }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cutting_respects_characters() {
        let mut text = "aé".to_owned();
        truncate(&mut text, 2);
        assert_eq!(text, "a");
    }

    #[test]
    fn a_stop_is_found_under_context() {
        let error = Stop::limit(OutcomeKind::CpuLimit, "guest_cpu_ms_max", 5).error().context("while calling");
        let outcome = outcome_of(
            &error,
            During::Call,
            Bounds { payload_bytes_max: 1, handles_max: 1, instances_max: 1, stack_bytes_max: 1, fuel_max: 0 },
        );
        assert_eq!(outcome.kind, OutcomeKind::CpuLimit);
        assert_eq!(outcome.limit, Some(LimitReached { name: "guest_cpu_ms_max".to_owned(), value: 5 }));
    }
}
