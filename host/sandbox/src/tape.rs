//! A recording that is played back: to verify it, or as the prefix of a fork.
//!
//! Nothing of an agent's state is ever stored. An agent is a function of what the host answered it, so it is run again from
//! its start, its model calls are answered from the recording, its clock is set to the recorded readings, and every event
//! that it causes is compared with the recorded one. Tools are run again, too, and their answers compared: a tool with
//! state has that state again where a fork goes on.
//!
//! Up to `live_from` events are compared and recorded nowhere; from there on the attempt is live. A whole replay is the
//! case in which that is the end.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use fulgurite_core::host_call::{HostCall, Remembered};
use fulgurite_core::id::SpanId;
use fulgurite_core::llm::{ChatRequest, Completion, LlmError, Message, ToolSpec};
use fulgurite_core::outcome::AttemptOutcome;
use fulgurite_core::recording::{Cut, fingerprint, first_altered};
use fulgurite_core::seed::Seed;
use fulgurite_core::span::{AttributeValue, LlmCall, Span, SpanBody, SpanRefused};
use tokio::sync::Notify;

use crate::fault::Stop;
use crate::recorder::refused;
use crate::turns::Turns;

/// What a call that was dropped before its end is recorded with.
pub(crate) const CANCELLED_CALL: &str = "the call was cancelled";
/// What a guest's span that was open at the end is recorded with.
pub(crate) const ABANDONED_SPAN: &str = "the guest ended before the span";

/// As much of a call's arguments is shown to people: bodies of requests are long.
const SHOWN_CHARS: usize = 300;

/// What the interfaces begin with that tools import.
const TOOL_INTERFACES: &str = "fulgurite:tool/";

/// Where a replay left its recording.
#[derive(Debug, Clone, PartialEq)]
pub struct Divergence {
    /// Sequence of the event.
    pub sequence: u64,
    /// What differs.
    pub what: &'static str,
    /// The recorded event; `None` when the recording had ended.
    pub recorded: Option<Box<Span>>,
    /// What happened instead; `None` when it ended early, or asked for something and had no answer yet.
    pub replayed: Option<Box<Span>>,
    /// For people.
    pub detail: String,
}

/// Is called for every event that a replay causes, before the guest goes on.
pub type TapeObserver = Arc<dyn Fn(&Span) + Send + Sync>;

/// A recording under the reading head.
pub struct Tape {
    observer: Option<TapeObserver>,
    spans: Arc<Vec<Span>>,
    calls: HashMap<u64, RecordedCall>,
    messages: Vec<Message>,
    live_from: u64,
    /// Whether the recording must be all that happens.
    whole: bool,
    /// Seeds with the event from which on each is in force, in order.
    seeds: Vec<(u64, Seed)>,
    /// How the recorded attempt ended.
    outcome: Option<AttemptOutcome>,
    /// Where it was ended from outside.
    cut: Option<Cut>,
    fingerprints: OnceLock<Vec<u64>>,
    position: AtomicU64,
    acts: AtomicU64,
    was_cut: AtomicBool,
    cut_notify: Notify,
    turns: Turns,
    divergence: Mutex<Option<Divergence>>,
}

impl std::fmt::Debug for Tape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (position, live_from) = (self.position(), self.live_from);
        f.debug_struct("Tape").field("position", &position).field("live_from", &live_from).finish_non_exhaustive()
    }
}

struct RecordedCall {
    place: usize,
    messages: Vec<u32>,
    tools: Arc<Vec<ToolSpec>>,
}

/// What a tape says about an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Played {
    /// It is the recorded one.
    Same,
    /// The recording has ended: the event is new.
    Live,
    /// It is another one.
    Diverged,
}

impl Tape {
    /// A tape of all recorded spans of an attempt, from sequence 0, that is to be verified as a whole. `seeds` are those of
    /// the attempt: its own from event 0, or, when it is a fork, its ancestor's first.
    #[must_use]
    pub fn whole(spans: Arc<Vec<Span>>, seeds: Vec<(u64, Seed)>) -> Self {
        let live_from = spans.len() as u64;
        let tape = Self::new(spans, seeds, live_from);
        let cut = tape.spans.last().and_then(Cut::of_root);
        Self { whole: true, cut, ..tape }
    }

    /// A tape of which the events before `live_from` are played back; `seed` is in force from there on.
    #[must_use]
    pub fn prefix(spans: Arc<Vec<Span>>, mut seeds: Vec<(u64, Seed)>, live_from: u64, seed: Seed) -> Self {
        let live_from = live_from.min(spans.len() as u64);
        seeds.push((live_from, seed));
        Self::new(spans, seeds, live_from)
    }

    fn new(spans: Arc<Vec<Span>>, seeds: Vec<(u64, Seed)>, live_from: u64) -> Self {
        let (mut calls, mut messages) = (HashMap::new(), vec![]);
        let mut tools = Arc::new(vec![]);
        for (place, span) in spans.iter().enumerate().take(usize::try_from(live_from).unwrap_or(usize::MAX)) {
            if let SpanBody::Llm(call) = &span.body {
                messages.extend(call.new_messages.iter().cloned());
                if let Some(changed) = &call.tools {
                    tools = Arc::new(changed.clone());
                }
                let recorded = RecordedCall { place, messages: call.messages.clone(), tools: Arc::clone(&tools) };
                calls.insert(call.call_index, recorded);
            }
        }
        let outcome = spans.last().and_then(|span| match &span.body {
            SpanBody::Attempt(outcome) => Some(outcome.clone()),
            _ => None,
        });
        Self {
            observer: None,
            spans,
            calls,
            messages,
            live_from,
            whole: false,
            seeds,
            outcome,
            cut: None,
            fingerprints: OnceLock::new(),
            position: AtomicU64::new(0),
            acts: AtomicU64::new(0),
            was_cut: AtomicBool::new(false),
            cut_notify: Notify::new(),
            turns: Turns::default(),
            divergence: Mutex::new(None),
        }
    }

    /// Fingerprints of the recorded events as they are now.
    #[must_use]
    pub fn fingerprints(&self) -> &[u64] {
        self.fingerprints.get_or_init(|| self.spans.iter().map(fingerprint).collect())
    }

    /// Checks that the recording is what was recorded; where it is not is the first divergence, and nothing that comes after
    /// it means anything.
    #[must_use]
    pub fn is_unaltered(&self) -> bool {
        let Some(place) = first_altered(&self.spans, self.fingerprints()) else { return true };
        self.diverge(Divergence {
            sequence: place as u64,
            what: "recording",
            recorded: self.spans.get(place).cloned().map(Box::new),
            replayed: None,
            detail: format!("event {place} is not what was recorded: its fingerprint is another"),
        });
        false
    }

    /// Shows every event to an observer.
    #[must_use]
    pub fn with_observer(mut self, observer: TapeObserver) -> Self {
        self.observer = Some(observer);
        self
    }

    /// How the recorded attempt ended.
    #[must_use]
    pub fn outcome(&self) -> Option<&AttemptOutcome> {
        self.outcome.as_ref()
    }

    /// The events that have been played back and found the same, in order.
    #[must_use]
    pub fn played(&self) -> &[Span] {
        let played = self.position().min(self.live_from);
        self.spans.get(..usize::try_from(played).unwrap_or(usize::MAX)).unwrap_or(&self.spans)
    }

    /// Their fingerprints.
    #[must_use]
    pub fn played_fingerprints(&self) -> &[u64] {
        self.fingerprints().get(..self.played().len()).unwrap_or_default()
    }

    /// Number of the next event.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position.load(Ordering::Relaxed)
    }

    /// Whether the recording must be all that happens.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole
    }

    /// First event that is not played back.
    #[must_use]
    pub fn live_from(&self) -> u64 {
        self.live_from
    }

    /// Where the replay left the recording, if it did.
    #[must_use]
    pub fn divergence(&self) -> Option<Divergence> {
        self.divergence.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes that a replay has ended before its recording.
    pub fn check_end(&self) {
        let position = self.position();
        if position < self.live_from {
            let recorded = self.next().cloned().map(Box::new);
            let detail = format!("the replay ended after {position} of {} events", self.live_from);
            self.diverge(Divergence { sequence: position, what: "end", recorded, replayed: None, detail });
        }
    }

    /// Returns when the replay has come to where the recorded attempt was ended from outside (by a time limit, or on
    /// request): whoever runs it drops it there and takes the recorded outcome.
    pub async fn cut(&self) {
        while !self.was_cut() {
            self.cut_notify.notified().await;
        }
    }

    /// Whether the replay has come there.
    #[must_use]
    pub fn was_cut(&self) -> bool {
        self.was_cut.load(Ordering::Acquire)
    }

    /// Where that is, once the replay has come there.
    pub(crate) fn cut_reached(&self) -> Option<Cut> {
        self.cut.filter(|_| self.was_cut())
    }

    fn note_cut(&self) {
        self.was_cut.store(true, Ordering::Release);
        self.cut_notify.notify_one();
    }

    /// Whether the recorded attempt came no further than the replayed one is now.
    pub(crate) fn is_at_cut(&self) -> bool {
        self.cut.is_some_and(|cut| cut == Cut { event: self.position(), acts: self.acts.load(Ordering::Relaxed) })
    }

    /// A guest does something that anybody could notice. False when the recorded attempt was ended before it did.
    pub(crate) fn act(&self) -> bool {
        if self.cut.is_none() || self.was_cut() {
            return true;
        }
        if self.is_at_cut() {
            self.note_cut();
            return false;
        }
        self.acts.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// A guest has come to its end, whichever it is: if the recorded one was ended about there, so is this one.
    pub(crate) fn ends(&self) {
        if self.is_at_cut() {
            self.note_cut();
        }
    }

    /// A guest waits. False when the recorded attempt was ended while it did: then the wait never ends.
    pub(crate) fn waits(&self) -> bool {
        if !self.was_cut() && self.is_at_cut() {
            self.note_cut();
        }
        !self.was_cut()
    }

    /// A guest waits for calls of models whose end was never recorded: nothing can end that.
    pub(crate) fn waits_in_vain(&self, call_index: u64) -> Option<Stop> {
        (self.whole && !self.was_cut()).then(|| self.no_answer(call_index, "the recording has no answer to it"))
    }

    /// Whether events are still compared.
    pub(crate) fn is_playing(&self) -> bool {
        self.position() < self.live_from
    }

    /// The seed in force.
    pub(crate) fn seed(&self) -> Seed {
        let position = self.position();
        let seed = self.seeds.iter().rev().find(|(from, _)| *from <= position).or(self.seeds.first());
        seed.map_or(Seed::new(0), |(_, seed)| *seed)
    }

    fn next(&self) -> Option<&Span> {
        if self.is_playing() { self.spans.get(usize::try_from(self.position()).ok()?) } else { None }
    }

    /// The reading that the clock had at the end of the next event.
    pub(crate) fn clock_ns(&self) -> Option<u64> {
        self.next().map(|span| span.end_ns)
    }

    /// The recorded result of the next event, when it is this host call.
    pub(crate) fn host_call(&self, name: &str) -> Option<&str> {
        match &self.next()?.body {
            SpanBody::HostCall { function, result, .. } if function == name => Some(result),
            _ => None,
        }
    }

    /// What the recording knows of a call of a tool or a grader that is about to be made. A whole replay makes none: not even
    /// one that comes after the recording's end.
    pub(crate) fn remembered(&self, call: &HostCall) -> Remembered {
        if !self.is_playing() && !self.whole {
            return Remembered::Nothing;
        }
        let recorded = self.next();
        if let Some(result) = recorded.and_then(|span| result_of(span, call)) {
            return Remembered::Result(result.to_owned());
        }
        let arguments: String = call.arguments.chars().take(SHOWN_CHARS).collect();
        let detail = format!("the recording has no such call here: {}.{} {arguments}", call.interface, call.function);
        self.diverge(Divergence {
            sequence: self.position(),
            what: "host call",
            recorded: recorded.cloned().map(Box::new),
            replayed: None,
            detail: detail.clone(),
        });
        Remembered::Differs(detail)
    }

    /// Whether a tool's call is the next event of the recording. `id` and `now_ns` are those that its event would have: the
    /// agent, which they follow from, must have come as far as the recorded one had.
    pub(crate) fn is_turn_of(&self, call: &HostCall, id: SpanId, now_ns: u64) -> bool {
        // A tool that is just being opened is alone.
        if !self.is_playing() || !self.turns.has_work() || self.turns.given_up() {
            return self.goes_on();
        }
        let same = |span: &Span| span.span_id == id && span.start_ns == now_ns && result_of(span, call).is_some();
        self.goes_on() && self.next().is_some_and(same)
    }

    /// False when the recorded attempt was ended here: what is under way never ends.
    fn goes_on(&self) -> bool {
        self.cut.is_none() || self.waits()
    }

    /// Whether the guest must let its tools get on: the next event of the recording is one of theirs, and has this id.
    pub(crate) fn awaits_tools(&self, id: SpanId) -> bool {
        let is_of_tool = |span: &Span| {
            span.span_id == id
                && matches!(&span.body, SpanBody::HostCall { interface, .. } if interface.starts_with(TOOL_INTERFACES))
        };
        self.next().is_some_and(is_of_tool) && !self.turns.given_up() && !self.turns.all_wait((self.position(), id))
    }

    /// The guest waits for what no tool can bring about any more: the replay has left the recording.
    pub(crate) fn check_waits(&self, id: SpanId) {
        if self.whole && self.turns.all_wait((self.position(), id)) {
            self.turns.give_up();
        }
    }

    pub(crate) fn turns(&self) -> &Turns {
        &self.turns
    }

    /// The recorded end of a model call; `None` when it did not end before the tape goes live.
    pub(crate) fn llm_call(&self, call_index: u64) -> Option<&LlmCall> {
        let recorded = self.calls.get(&call_index)?;
        match &self.spans.get(recorded.place)?.body {
            SpanBody::Llm(call) => Some(call),
            _ => None,
        }
    }

    /// Compares a request with the recorded one before it is answered, so that changed code never sees an answer to a
    /// question that it did not ask.
    pub(crate) fn check_request(&self, call_index: u64, request: &ChatRequest) -> Result<(), Stop> {
        let Some(recorded) = self.calls.get(&call_index) else {
            if self.whole {
                return Err(self.no_answer(call_index, "the recording has no such call"));
            }
            return Ok(());
        };
        let known = recorded.messages.iter().map(|number| self.messages.get(*number as usize));
        let same_messages =
            recorded.messages.len() == request.messages.len() && known.eq(request.messages.iter().map(Some));
        let call = self.llm_call(call_index);
        let same = call.is_some_and(|call| {
            same_messages
                && *recorded.tools == request.tools
                && call.agent_role == request.agent_role
                && call.endpoint == request.endpoint
                && call.sampling == request.sampling
        });
        if same {
            return Ok(());
        }
        let place = request
            .messages
            .iter()
            .zip(&recorded.messages)
            .position(|(asked, number)| self.messages.get(*number as usize) != Some(asked));
        let detail = match place {
            Some(place) => format!("message {place} of the request differs"),
            None if !same_messages => format!(
                "the request has {} messages, the recorded one has {}",
                request.messages.len(),
                recorded.messages.len()
            ),
            None if *recorded.tools != request.tools => "the tools of the request differ".to_owned(),
            None => "sampling, role or endpoint of the request differs".to_owned(),
        };
        Err(self.no_answer(call_index, &detail))
    }

    fn no_answer(&self, call_index: u64, detail: &str) -> Stop {
        let detail = format!("model call {call_index}: {detail}");
        let recorded = self.calls.get(&call_index).and_then(|call| self.spans.get(call.place));
        self.diverge(Divergence {
            sequence: self.position(),
            what: "model call",
            recorded: recorded.cloned().map(Box::new),
            replayed: None,
            detail,
        });
        refused(&SpanRefused::Diverged)
    }

    /// Compares an event with the next one on the tape and moves on.
    pub(crate) fn play(&self, span: &Span) -> Played {
        if let Some(observer) = &self.observer {
            observer(span);
        }
        let position = self.position();
        if position >= self.live_from {
            // A whole replay that goes on after its end has left its recording.
            if self.whole {
                let detail = "the recording has ended and the replay goes on".to_owned();
                let replayed = Some(Box::new(span.clone()));
                self.diverge(Divergence { sequence: position, what: "end", recorded: None, replayed, detail });
                return Played::Diverged;
            }
            self.position.store(position + 1, Ordering::Relaxed);
            self.turns.moved();
            return Played::Live;
        }
        let recorded = self.next();
        match recorded.and_then(|recorded| difference(recorded, span)) {
            None => {
                self.position.store(position + 1, Ordering::Relaxed);
                self.turns.moved();
                Played::Same
            }
            Some(what) => {
                let detail = format!("event {position} differs in its {what}");
                let (recorded, replayed) = (recorded.cloned().map(Box::new), Some(Box::new(span.clone())));
                self.diverge(Divergence { sequence: position, what, recorded, replayed, detail });
                Played::Diverged
            }
        }
    }

    /// The first divergence counts.
    fn diverge(&self, divergence: Divergence) {
        self.divergence.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(divergence);
    }
}

/// What a recorded event says came back, when it is this call.
fn result_of<'a>(span: &'a Span, call: &HostCall) -> Option<&'a str> {
    match &span.body {
        SpanBody::HostCall { interface, function, arguments, result } => {
            let same = interface == call.interface && function == call.function && *arguments == call.arguments;
            same.then_some(result)
        }
        _ => None,
    }
}

/// Counts what a guest does that anybody could notice, and stops a replayed one where the recorded one was stopped.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    acts: AtomicU64,
    tape: Option<Arc<Tape>>,
}

impl Progress {
    pub(crate) fn new(tape: Option<Arc<Tape>>) -> Self {
        Self { acts: AtomicU64::new(0), tape }
    }

    pub(crate) fn tape(&self) -> Option<&Arc<Tape>> {
        self.tape.as_ref()
    }

    /// The guest is about to do something. False when the recorded one never came to it.
    pub(crate) fn act(&self) -> bool {
        let may = self.tape.as_ref().is_none_or(|tape| tape.act());
        self.acts.fetch_add(u64::from(may), Ordering::Relaxed);
        may
    }

    /// The guest's clock is about to move. False when the recorded one was ended before that, also where this has been seen
    /// already and the guest is only about to be stopped.
    pub(crate) fn sleeps(&self) -> bool {
        self.tape.as_ref().is_none_or(|tape| !tape.was_cut()) && self.act()
    }

    /// How much it has done.
    pub(crate) fn acts(&self) -> u64 {
        self.acts.load(Ordering::Relaxed)
    }
}

/// Whether a call was dropped before it ended.
pub(crate) fn was_cancelled(result: &Result<Arc<Completion>, LlmError>) -> bool {
    matches!(result, Err(LlmError::Unavailable(text)) if text == CANCELLED_CALL)
}

/// The first part in which two events differ, byte for byte. Whose they are is not compared: a fork's prefix is its
/// ancestor's.
fn difference(recorded: &Span, replayed: &Span) -> Option<&'static str> {
    let parts = [
        ("body", recorded.body == replayed.body),
        ("name", recorded.name == replayed.name),
        ("kind", recorded.kind == replayed.kind),
        ("status", recorded.status == replayed.status),
        ("attributes", recorded.guest_attributes == replayed.guest_attributes),
        ("links", recorded.links == replayed.links),
        ("start", recorded.start_ns == replayed.start_ns),
        ("end", recorded.end_ns == replayed.end_ns),
        ("sequence", recorded.sequence == replayed.sequence),
        ("id", recorded.span_id == replayed.span_id && recorded.trace_id == replayed.trace_id),
        ("parent", recorded.parent == replayed.parent),
    ];
    let unequal = parts.into_iter().find(|(_, same)| !same).map(|(name, _)| name);
    match unequal {
        // Numbers: no NaN equals itself, and 0 equals -0.
        Some("body" | "attributes") if fingerprint(recorded) == fingerprint(replayed) => None,
        None if numbers(recorded) != numbers(replayed) => Some("numbers"),
        unequal => unequal,
    }
}

/// The bits of all numbers of an event that the guest has given.
fn numbers(span: &Span) -> Vec<u64> {
    let attributes = span.guest_attributes.iter().filter_map(|(_, value)| match value {
        AttributeValue::Number(number) => Some(number.to_bits()),
        _ => None,
    });
    let mut numbers: Vec<u64> = attributes.collect();
    match &span.body {
        SpanBody::Reward(reward) => numbers.push(reward.value.to_bits()),
        SpanBody::Llm(call) => {
            let sampling = &call.sampling;
            let given = [sampling.temperature, sampling.top_p, sampling.min_p];
            numbers.extend(given.map(|number| u64::from(number.to_bits())));
        }
        _ => {}
    }
    numbers
}
