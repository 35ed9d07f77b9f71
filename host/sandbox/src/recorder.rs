//! Turns what happens in an attempt into spans: stamps identity, order and virtual time, and hands them to a sink.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fulgurite_core::id::{AttemptKey, SpanId, TraceId};
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{ChatRequest, Completion, LlmError, Message, ToolSpec};
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::seed::Seed;
use fulgurite_core::span::{Attribute, LlmCall, Span, SpanBody, SpanKind, SpanRefused, SpanSink, SpanStatus};

use crate::clock::VirtualClock;
use crate::fault::Stop;
use crate::output::LineSink;

/// Records the spans of one attempt.
///
/// Span ids derive from the attempt's seed and the order in which spans begin; sequence numbers count the order in which
/// they end, which is the order in which the sink gets them. The root span is the attempt itself and ends last.
pub struct Recorder {
    key: AttemptKey,
    seed: Seed,
    trace_id: TraceId,
    root: SpanId,
    clock: Arc<VirtualClock>,
    sink: Arc<dyn SpanSink>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    begun: u64,
    sequence: u64,
    /// Open spans of the guest, innermost last.
    open: Vec<SpanId>,
    messages: HashMap<Message, u32>,
    tools: Vec<ToolSpec>,
    refused: Option<SpanRefused>,
    finished: bool,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").field("key", &self.key).finish_non_exhaustive()
    }
}

/// When and where a span began.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Begun {
    pub(crate) id: SpanId,
    parent: SpanId,
    start_ns: u64,
}

impl Recorder {
    /// Records for the attempt `key`, whose clock starts at `start_unix_ns` (nanoseconds since the Unix epoch).
    #[must_use]
    pub fn new(key: AttemptKey, seed: Seed, start_unix_ns: u64, sink: Arc<dyn SpanSink>) -> Self {
        Self {
            key,
            seed,
            trace_id: TraceId::of_attempt(seed),
            root: SpanId::of_sequence(seed, 0),
            clock: Arc::new(VirtualClock::new(start_unix_ns)),
            sink,
            state: Mutex::new(State { begun: 1, ..State::default() }),
        }
    }

    /// Records something that took no virtual time, under the innermost open span. After [`Recorder::finish`], or once
    /// the sink has refused a span, nothing is recorded any more.
    pub fn record(&self, name: &str, body: SpanBody) {
        let begun = self.begin();
        // A refusal is kept and ends the guest; whoever records after it has no guest left to end.
        let _ = self.end(begun, name, vec![], body);
    }

    /// Ends the attempt: records the root span. Open spans of the guest are closed when its store is dropped.
    pub fn finish(&self, outcome: &AttemptOutcome) {
        let root = Begun { id: self.root, parent: self.root, start_ns: self.clock.start_unix_ns() };
        let _ = self.end(root, "attempt", vec![], SpanBody::Attempt(outcome.clone()));
        self.lock().finished = true;
    }

    /// Why the sink has refused a span, if it has.
    #[must_use]
    pub fn refusal(&self) -> Option<SpanRefused> {
        self.lock().refused.clone()
    }

    pub(crate) fn key(&self) -> &AttemptKey {
        &self.key
    }

    pub(crate) fn clock(&self) -> &Arc<VirtualClock> {
        &self.clock
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a span under the innermost open one.
    pub(crate) fn begin(&self) -> Begun {
        let mut state = self.lock();
        let id = SpanId::of_sequence(self.seed, state.begun);
        state.begun += 1;
        Begun { id, parent: state.open.last().copied().unwrap_or(self.root), start_ns: self.clock.unix_ns() }
    }

    /// Begins a span that later ones are children of.
    pub(crate) fn open(&self) -> Begun {
        let begun = self.begin();
        self.lock().open.push(begun.id);
        begun
    }

    /// Ends a span.
    pub(crate) fn end(
        &self,
        begun: Begun,
        name: &str,
        guest_attributes: Vec<Attribute>,
        body: SpanBody,
    ) -> Result<(), SpanRefused> {
        let status = status_of(&body);
        self.end_with(begun, name, guest_attributes, body, status)
    }

    /// Ends a span with a status of its own.
    pub(crate) fn end_with(
        &self,
        begun: Begun,
        name: &str,
        guest_attributes: Vec<Attribute>,
        body: SpanBody,
        status: SpanStatus,
    ) -> Result<(), SpanRefused> {
        // Held over the sink's call: the sink sees spans in the order of their sequence.
        let mut state = self.lock();
        self.push(&mut state, begun, name, guest_attributes, body, status)
    }

    /// Ends the span of an LLM call.
    pub(crate) fn end_llm(
        &self,
        begun: Begun,
        call_index: u64,
        request: ChatRequest,
        result: Result<Completion, LlmError>,
    ) -> Result<(), SpanRefused> {
        let mut state = self.lock();
        let mut new_messages = vec![];
        let mut messages = Vec::with_capacity(request.messages.len());
        for message in request.messages {
            let next = u32::try_from(state.messages.len()).unwrap_or(u32::MAX);
            let index = *state.messages.entry(message).or_insert_with_key(|message| {
                new_messages.push(message.clone());
                next
            });
            messages.push(index);
        }
        let tools = (state.tools != request.tools).then(|| {
            state.tools.clone_from(&request.tools);
            request.tools
        });
        let body = SpanBody::Llm(Box::new(LlmCall {
            call_index,
            messages,
            new_messages,
            tools,
            sampling: request.sampling,
            agent_role: request.agent_role,
            endpoint: request.endpoint,
            result,
        }));
        let status = status_of(&body);
        self.push(&mut state, begun, "llm", vec![], body, status)
    }

    fn push(
        &self,
        state: &mut State,
        begun: Begun,
        name: &str,
        guest_attributes: Vec<Attribute>,
        body: SpanBody,
        status: SpanStatus,
    ) -> Result<(), SpanRefused> {
        state.open.retain(|open| *open != begun.id);
        if let Some(refused) = &state.refused {
            return Err(refused.clone());
        }
        if state.finished {
            return Err(SpanRefused::Closed);
        }
        let span = Span {
            attempt: self.key.clone(),
            sequence: state.sequence,
            trace_id: self.trace_id,
            span_id: begun.id,
            parent: (begun.id != self.root).then_some(begun.parent),
            name: name.to_owned(),
            kind: kind_of(&body),
            start_ns: begun.start_ns,
            end_ns: self.clock.unix_ns(),
            status,
            guest_attributes,
            links: vec![],
            body,
        };
        if let Err(refused) = self.sink.record(span) {
            state.refused = Some(refused.clone());
            return Err(refused);
        }
        state.sequence += 1;
        Ok(())
    }
}

fn kind_of(body: &SpanBody) -> SpanKind {
    match body {
        SpanBody::Llm(_) | SpanBody::Tool { .. } | SpanBody::ToolList(_) => SpanKind::Client,
        _ => SpanKind::Internal,
    }
}

fn status_of(body: &SpanBody) -> SpanStatus {
    let error = match body {
        SpanBody::Llm(call) => call.result.as_ref().err().map(ToString::to_string),
        SpanBody::Tool { result, .. } => result.as_ref().err().map(ToString::to_string),
        SpanBody::ToolList(result) => result.as_ref().err().map(ToString::to_string),
        SpanBody::Template { result, .. } => result.as_ref().err().cloned(),
        SpanBody::Grade { fault, .. } => fault.clone(),
        SpanBody::Attempt(outcome) if outcome.kind != OutcomeKind::Completed => {
            Some(format!("{}: {}", outcome.kind.as_str(), outcome.detail))
        }
        _ => return SpanStatus::Unset,
    };
    error.map_or(SpanStatus::Ok, SpanStatus::Error)
}

/// A sink that no longer takes spans ends the guest: its attempt is no longer the newest, or has ended.
pub(crate) fn refused(refusal: &SpanRefused) -> Stop {
    Stop(AttemptOutcome::failed(OutcomeKind::Cancelled, refusal.to_string()))
}

/// Records on behalf of a guest, within its budget of spans.
pub(crate) struct GuestLog {
    pub(crate) recorder: Arc<Recorder>,
    spans: AtomicU64,
    spans_max: u64,
    span_bytes_max: u64,
}

impl GuestLog {
    pub(crate) fn new(recorder: Arc<Recorder>, limits: &Limits) -> Self {
        Self { recorder, spans: AtomicU64::new(0), spans_max: limits.spans_max, span_bytes_max: limits.span_bytes_max }
    }

    /// Takes one span of the budget.
    pub(crate) fn take_span(&self) -> Result<(), Stop> {
        if self.spans.fetch_add(1, Ordering::Relaxed) >= self.spans_max {
            return Err(Stop::limit(OutcomeKind::OutputLimit, "spans_max", self.spans_max));
        }
        Ok(())
    }

    /// Checks the size of what a guest wants to emit.
    pub(crate) fn check_bytes(&self, bytes: usize) -> Result<(), Stop> {
        if bytes as u64 > self.span_bytes_max {
            return Err(Stop::limit(OutcomeKind::OutputLimit, "span_bytes_max", self.span_bytes_max));
        }
        Ok(())
    }

    /// Records what a guest emits.
    pub(crate) fn emit(&self, name: &str, attributes: Vec<Attribute>, body: SpanBody) -> Result<(), Stop> {
        self.take_span()?;
        let begun = self.recorder.begin();
        self.recorder.end(begun, name, attributes, body).map_err(|refusal| refused(&refusal))
    }
}

impl LineSink for GuestLog {
    fn line(&self, stream: &'static str, text: String) -> Result<(), Stop> {
        self.emit("log", vec![], SpanBody::Log { level: stream.to_owned(), text })
    }
}
