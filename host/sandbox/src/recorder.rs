//! Turns what happens in an attempt into spans: stamps identity, order and virtual time, and hands them to a sink.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::future::poll_fn;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use fulgurite_core::host_call::{HostCall, HostCallLog, Remembered};
use fulgurite_core::id::{AttemptKey, SpanId, TraceId};
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{ChatRequest, Completion, LlmError, Message, ToolSpec};
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::recording::{Cut, fingerprint, fingerprints_attribute};
use fulgurite_core::seed::Seed;
use fulgurite_core::span::{Attribute, LlmCall, Span, SpanBody, SpanKind, SpanRefused, SpanSink, SpanStatus};
use futures::future::BoxFuture;

use crate::clock::VirtualClock;
use crate::fault::Stop;
use crate::output::LineSink;
use crate::tape::{Played, Progress, Tape};
use crate::weight::text_bytes;

/// Records the spans of one attempt.
///
/// Span ids derive from the attempt's seed and the order in which spans begin; sequence numbers count the order in which
/// they end, which is the order in which the sink gets them. The root span is the attempt itself and ends last.
pub struct Recorder {
    key: AttemptKey,
    seed: Seed,
    trace_id: TraceId,
    progress: Arc<Progress>,
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
    conversation: Conversation,
    tools: Vec<ToolSpec>,
    refused: Option<SpanRefused>,
    finished: bool,
    /// Bytes of text recorded.
    text_bytes: u64,
    /// How far the guest had come when it ended.
    ended: Option<Cut>,
}

/// Every message of an attempt, once, and the numbers under which calls refer to them.
///
/// Nearly always a call repeats the one before it and adds to the end, so its messages are compared with those first;
/// only what differs is looked up by its hash.
#[derive(Default)]
struct Conversation {
    messages: Vec<Message>,
    numbers: HashMap<u64, Vec<u32>>,
    last_call: Vec<u32>,
    hasher: RandomState,
}

impl Conversation {
    /// The numbers of a call's messages, and those that are new with it.
    fn intern(&mut self, call: &[Message]) -> (Vec<u32>, Vec<Message>) {
        let mut numbers = Vec::with_capacity(call.len());
        let mut new = vec![];
        for (place, message) in call.iter().enumerate() {
            let known = |number: &u32| self.messages.get(*number as usize) == Some(message);
            if let Some(number) = self.last_call.get(place).copied().filter(known) {
                numbers.push(number);
                continue;
            }
            let same_hash = self.numbers.entry(self.hasher.hash_one(message)).or_default();
            let number = if let Some(number) = same_hash.iter().copied().find(known) {
                number
            } else {
                let number = u32::try_from(self.messages.len()).unwrap_or(u32::MAX);
                same_hash.push(number);
                self.messages.push(message.clone());
                new.push(message.clone());
                number
            };
            numbers.push(number);
        }
        self.last_call.clone_from(&numbers);
        (numbers, new)
    }
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
        let progress: Arc<Progress> = Arc::default();
        Self {
            key,
            seed,
            trace_id: TraceId::of_attempt(seed),
            clock: Arc::new(VirtualClock::watched(start_unix_ns, Arc::clone(&progress))),
            progress,
            sink,
            state: Mutex::new(State { begun: 1, ..State::default() }),
        }
    }

    /// Plays a recording back: events are compared with it as long as it lasts, and only those after it go to the sink.
    #[must_use]
    pub fn with_tape(self, tape: Arc<Tape>) -> Self {
        let progress = Arc::new(Progress::new(Some(tape)));
        let clock = Arc::new(VirtualClock::watched(self.clock.start_unix_ns(), Arc::clone(&progress)));
        Self { progress, clock, ..self }
    }

    /// The recording that is played back.
    #[must_use]
    pub fn tape(&self) -> Option<&Arc<Tape>> {
        self.progress.tape()
    }

    /// Records what tools and graders ask of what they were granted, and answers from the recording that is played back.
    #[must_use]
    pub fn host_call_log(self: &Arc<Self>) -> Arc<dyn HostCallLog> {
        Arc::new(RecordedHostCalls(Arc::clone(self)))
    }

    /// The seed that is in force: the attempt's own, or that of the part of a recording which is played back.
    pub(crate) fn seed(&self) -> Seed {
        self.tape().map_or(self.seed, |tape| tape.seed())
    }

    /// Whether the guest must let its tools get on before it does: see [`Tape::awaits_tools`].
    pub(crate) fn awaits_tools(&self) -> bool {
        self.tape().is_some_and(|tape| tape.awaits_tools(self.next_id()))
    }

    /// The guest waits, and nothing that it waits for has ended: see [`Tape::check_waits`].
    pub(crate) fn check_waits(&self) {
        if let Some(tape) = self.tape().filter(|tape| tape.turns().has_work()) {
            tape.check_waits(self.next_id());
        }
    }

    /// Id of the span that would begin now.
    fn next_id(&self) -> SpanId {
        SpanId::of_sequence(self.seed(), self.lock().begun)
    }

    /// The id of the root span is a function of the seed: a fork has a root of its own.
    fn root(&self) -> SpanId {
        SpanId::of_sequence(self.seed(), 0)
    }

    fn trace_id(&self) -> TraceId {
        self.tape().map_or(self.trace_id, |tape| TraceId::of_attempt(tape.seed()))
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
        self.finish_with(outcome, None);
    }

    /// The same for an attempt that is kept: `fingerprints` are those of all events before.
    pub fn finish_recording(&self, outcome: &AttemptOutcome, fingerprints: Vec<u64>) {
        self.finish_with(outcome, Some(fingerprints));
    }

    fn finish_with(&self, outcome: &AttemptOutcome, fingerprints: Option<Vec<u64>>) {
        let root = Begun { id: self.root(), parent: self.root(), start_ns: self.clock.start_unix_ns() };
        let body = SpanBody::Attempt(outcome.clone());
        let status = status_of(&body);
        let mut state = self.lock();
        let ended = || self.tape().and_then(|tape| tape.cut_reached()).or(state.ended);
        let cut = Cut::applies_to(outcome.kind).then(|| ended().unwrap_or_else(|| self.reached(&state)));
        let attributes = cut.map(Cut::attributes).unwrap_or_default();
        let mut span = self.span(&state, root, "attempt", attributes, body, status);
        if let Some(mut fingerprints) = fingerprints {
            fingerprints.push(fingerprint(&span));
            span.guest_attributes.push(fingerprints_attribute(&fingerprints));
        }
        let _ = self.push(&mut state, span);
        state.finished = true;
    }

    /// The guest has ended, or is about to be: what is recorded from here on is not its doing any more. The first call counts.
    pub fn ends(&self) {
        let mut state = self.lock();
        let reached = self.reached(&state);
        state.ended.get_or_insert(reached);
        drop(state);
        if let Some(tape) = self.tape() {
            tape.ends();
        }
    }

    fn reached(&self, state: &State) -> Cut {
        Cut { event: state.sequence, acts: self.progress.acts() }
    }

    /// The guest is about to do something that anybody could notice.
    pub(crate) fn act(&self) -> Result<(), Stop> {
        if self.progress.act() { Ok(()) } else { Err(refused(&SpanRefused::Closed)) }
    }

    /// Why the sink has refused a span, if it has.
    #[must_use]
    pub fn refusal(&self) -> Option<SpanRefused> {
        self.lock().refused.clone()
    }

    /// Bytes of text recorded so far.
    pub(crate) fn text_bytes(&self) -> u64 {
        self.lock().text_bytes
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
        let id = SpanId::of_sequence(self.seed(), state.begun);
        state.begun += 1;
        Begun { id, parent: state.open.last().copied().unwrap_or_else(|| self.root()), start_ns: self.clock.unix_ns() }
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
        state.open.retain(|open| *open != begun.id);
        let span = self.span(&state, begun, name, guest_attributes, body, status);
        self.push(&mut state, span)
    }

    /// Ends the span of an LLM call.
    pub(crate) fn end_llm(
        &self,
        begun: Begun,
        call_index: u64,
        request: &ChatRequest,
        result: Result<Arc<Completion>, LlmError>,
    ) -> Result<(), SpanRefused> {
        let mut state = self.lock();
        let (messages, new_messages) = state.conversation.intern(&request.messages);
        let tools = (state.tools != request.tools).then(|| {
            state.tools.clone_from(&request.tools);
            request.tools.clone()
        });
        let body = SpanBody::Llm(Box::new(LlmCall {
            call_index,
            messages,
            new_messages,
            tools,
            sampling: request.sampling.clone(),
            agent_role: request.agent_role.clone(),
            endpoint: request.endpoint.clone(),
            result,
        }));
        let status = status_of(&body);
        let span = self.span(&state, begun, "llm", vec![], body, status);
        self.push(&mut state, span)
    }

    fn span(
        &self,
        state: &State,
        begun: Begun,
        name: &str,
        guest_attributes: Vec<Attribute>,
        body: SpanBody,
        status: SpanStatus,
    ) -> Span {
        Span {
            attempt: self.key.clone(),
            sequence: state.sequence,
            trace_id: self.trace_id(),
            span_id: begun.id,
            parent: (begun.id != begun.parent).then_some(begun.parent),
            name: name.to_owned(),
            kind: kind_of(&body),
            start_ns: begun.start_ns,
            end_ns: self.clock.unix_ns(),
            status,
            guest_attributes,
            links: vec![],
            body,
        }
    }

    fn push(&self, state: &mut State, span: Span) -> Result<(), SpanRefused> {
        if let Some(refused) = &state.refused {
            return Err(refused.clone());
        }
        if state.finished {
            return Err(SpanRefused::Closed);
        }
        state.text_bytes = state.text_bytes.saturating_add(text_bytes(&span) as u64);
        let taken = match self.tape().map_or(Played::Live, |tape| tape.play(&span)) {
            Played::Same => Ok(()),
            Played::Live => self.sink.record(span),
            Played::Diverged => Err(SpanRefused::Diverged),
        };
        if let Err(refused) = taken {
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

/// Host calls of tools and graders as events of the attempt.
struct RecordedHostCalls(Arc<Recorder>);

impl HostCallLog for RecordedHostCalls {
    fn turn<'a>(&'a self, call: &'a HostCall) -> BoxFuture<'a, ()> {
        let Some(tape) = self.0.tape() else { return Box::pin(std::future::ready(())) };
        let mut looked_at = None;
        Box::pin(poll_fn(move |context| {
            let id = self.0.next_id();
            if tape.is_turn_of(call, id, self.0.clock.unix_ns()) {
                return Poll::Ready(());
            }
            tape.turns().wait((tape.position(), id), &mut looked_at, context.waker());
            Poll::Pending
        }))
    }

    fn works(&self, works: bool) {
        if let Some(tape) = self.0.tape() {
            tape.turns().works(works);
        }
    }

    fn remembered(&self, call: &HostCall) -> Remembered {
        let remembered = self.0.tape().map_or(Remembered::Nothing, |tape| tape.remembered(call));
        if let Remembered::Result(result) = &remembered
            && self.record(call.clone(), result.clone()).is_err()
        {
            return Remembered::Differs("the replay has left its recording".to_owned());
        }
        remembered
    }

    fn record(&self, call: HostCall, result: String) -> Result<(), SpanRefused> {
        let body = SpanBody::HostCall {
            interface: call.interface.to_owned(),
            function: call.function.to_owned(),
            arguments: call.arguments,
            result,
        };
        let begun = self.0.begin();
        self.0.end(begun, call.function, vec![], body)
    }
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
    memory_bytes_max: u64,
}

impl GuestLog {
    pub(crate) fn new(recorder: Arc<Recorder>, limits: &Limits) -> Self {
        Self {
            recorder,
            spans: AtomicU64::new(0),
            spans_max: limits.spans_max,
            span_bytes_max: limits.span_bytes_max,
            memory_bytes_max: limits.memory_bytes_max,
        }
    }

    /// Takes one span of the budget.
    pub(crate) fn take_span(&self) -> Result<(), Stop> {
        self.recorder.act()?;
        if self.spans.fetch_add(1, Ordering::Relaxed) >= self.spans_max {
            return Err(Stop::limit(OutcomeKind::OutputLimit, "spans_max", self.spans_max));
        }
        // What is recorded is held until the attempt ends: no more of it than the guest could hold itself.
        if self.recorder.text_bytes() > self.memory_bytes_max {
            return Err(Stop::limit(OutcomeKind::MemoryLimit, "memory_bytes_max", self.memory_bytes_max));
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
    fn act(&self) -> Result<(), Stop> {
        self.recorder.act()
    }

    fn line(&self, stream: &'static str, text: String) -> Result<(), Stop> {
        self.emit("log", vec![], SpanBody::Log { level: stream.to_owned(), text })
    }
}
