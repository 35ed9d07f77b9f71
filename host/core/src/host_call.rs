//! Calls of a tool or a grader to what it was granted, recorded so that a rollout can be run again without it.
//!
//! What a granted folder holds is pinned by its hash, and a database is a copy that follows from its snapshot and the
//! statements: both are done again when a rollout is replayed, and only compared. What a server or a model answered can only
//! be remembered.

use futures::future::BoxFuture;

use crate::span::SpanRefused;

/// One call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostCall {
    /// WIT interface with its version.
    pub interface: &'static str,
    /// Function.
    pub function: &'static str,
    /// Arguments, JSON text. No secret is in them.
    pub arguments: String,
}

/// What a log knows of a call that is about to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remembered {
    /// Nothing: make it.
    Nothing,
    /// What came back, JSON text: answer with it and make no call.
    Result(String),
    /// The record has another call here. The plugin does not repeat what it did; the text says how they differ.
    Differs(String),
}

/// The calls of one attempt, in order.
pub trait HostCallLog: Send + Sync {
    /// Asked before every call whose result cannot be had again: HTTP and models.
    fn remembered(&self, call: &HostCall) -> Remembered;

    /// Waits until it is this call's turn to be remembered or recorded: at once, but in a replay not before the recorded one's
    /// was. Tools ask before they are told what is remembered, and before they record.
    fn turn<'a>(&'a self, call: &'a HostCall) -> BoxFuture<'a, ()> {
        let _ = call;
        Box::pin(std::future::ready(()))
    }

    /// Told when a tool begins with a call of its agent, and when that has ended.
    fn works(&self, works: bool) {
        let _ = works;
    }

    /// Told of every call that was made, with its result as JSON text. A log that replays compares.
    ///
    /// # Errors
    /// When nothing more is recorded for the attempt; it then ends.
    fn record(&self, call: HostCall, result: String) -> Result<(), SpanRefused>;
}

/// Remembers nothing and keeps nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NoLog;

impl HostCallLog for NoLog {
    fn remembered(&self, _call: &HostCall) -> Remembered {
        Remembered::Nothing
    }

    fn record(&self, _call: HostCall, _result: String) -> Result<(), SpanRefused> {
        Ok(())
    }
}
