//! Forks: rollouts that begin as another one did.

use std::sync::Arc;

use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
use fulgurite_core::llm::Completion;
use fulgurite_core::record::{ForkPoint, RolloutSpec};
use fulgurite_core::recording::{Cut, first_altered};
use fulgurite_core::reward::RewardSource;
use fulgurite_core::seed::Seed;
use fulgurite_core::span::{Span, SpanBody};
use fulgurite_sandbox::Tape;
use fulgurite_store::{RolloutStore, StoreError};

/// How many ancestors a fork may have. 64: every one of them is read when a fork begins.
pub const FORK_DEPTH_MAX: usize = 64;

/// A whole attempt, with what it has from its ancestors.
#[derive(Debug, Clone)]
pub struct Lineage {
    /// All events from 0, the ancestors' included.
    pub spans: Arc<Vec<Span>>,
    /// Seeds with the event from which on each is in force.
    pub seeds: Vec<(u64, Seed)>,
    /// Where the clock of the oldest ancestor, and so of all, started.
    pub start_unix_ns: u64,
}

/// Puts an attempt together with what its rollout has from its ancestors.
///
/// # Errors
/// A text for people: what is missing.
pub fn lineage(store: &dyn RolloutStore, key: &AttemptKey) -> Result<Lineage, String> {
    let failed = |error: StoreError| error.to_string();
    let mut pieces: Vec<Piece> = vec![];
    let mut next = Some((key.clone(), u64::MAX));
    while let Some((key, until)) = next {
        let record = store.rollout(&key.rollout).map_err(failed)?;
        let record = record.ok_or_else(|| format!("there is no rollout `{}`", key.rollout))?;
        let attempts = store.attempts(&key.rollout).map_err(failed)?;
        let attempt = attempts.iter().find(|attempt| attempt.key == key);
        let attempt = attempt.ok_or_else(|| format!("there is no attempt {key}"))?;
        let from = record.spec.fork_of.as_ref().map_or(0, |fork| fork.event);
        if pieces.len() > FORK_DEPTH_MAX {
            return Err(format!("it has more than {FORK_DEPTH_MAX} ancestors"));
        }
        pieces.push(Piece { key, seed: record.spec.seed, start_unix_ns: attempt.start_unix_ns, from, until });
        // A fork that leaves its ancestor in what that has from its own ancestor takes no more than that.
        next =
            record.spec.fork_of.as_ref().map(|fork| {
                (AttemptKey { rollout: fork.rollout.clone(), attempt: fork.attempt }, fork.event.min(until))
            });
    }
    let start_unix_ns = pieces.last().map_or(0, |oldest| oldest.start_unix_ns);
    let (mut spans, mut seeds) = (vec![], vec![]);
    for piece in pieces.into_iter().rev().filter(|piece| piece.from < piece.until) {
        let Piece { key, seed, from, until, .. } = piece;
        seeds.push((from, seed));
        let own = store.spans(&key).map_err(failed)?;
        spans.extend(own.into_iter().take_while(|span| span.sequence < until));
        if until != u64::MAX && spans.len() as u64 != until {
            return Err(format!("attempt {key} has {} of the {until} events of the prefix", spans.len()));
        }
        if let Some(stray) = spans.iter().skip(usize::try_from(from).unwrap_or(usize::MAX)).find(|s| s.attempt != key) {
            return Err(format!("event {} of attempt {key} says that it is of {}", stray.sequence, stray.attempt));
        }
    }
    Ok(Lineage { spans: Arc::new(spans), seeds, start_unix_ns })
}

/// What a lineage takes from one attempt: its events from `from` up to `until`.
struct Piece {
    key: AttemptKey,
    seed: Seed,
    start_unix_ns: u64,
    from: u64,
    until: u64,
}

/// How many of the events the agent has caused: those behind them are of its grading and of the attempt's end.
pub(crate) fn agent_events(spans: &[Span]) -> usize {
    let is_of_host = |span: &Span| match &span.body {
        SpanBody::Reward(reward) => reward.source != RewardSource::Agent,
        SpanBody::Grade { .. } | SpanBody::Attempt(_) => true,
        _ => false,
    };
    spans.iter().position(is_of_host).unwrap_or(spans.len())
}

/// Checks that a recording can be left before the event `event`.
fn check_event(spans: &[Span], event: u64) -> Result<(), String> {
    let cut = spans.last().and_then(Cut::of_root).map(|cut| cut.event);
    let last = cut.unwrap_or(agent_events(spans) as u64);
    if event > last {
        let events = spans.len();
        return Err(format!(
            "it cannot be left at event {event}: its agent has caused {last} of its {events} events, counted from 0"
        ));
    }
    // Text that a guest had before the call's end is nowhere but in that end.
    let streamed = spans.iter().filter(|span| span.sequence < event).filter_map(|span| match &span.body {
        SpanBody::HostCall { function, arguments, .. } if function == "[method]pending.next" => {
            serde_json::from_str::<Streamed>(arguments).ok()
        }
        _ => None,
    });
    for Streamed { call_index } in streamed {
        let ends = spans.iter().find(|span| matches!(&span.body, SpanBody::Llm(call) if call.call_index == call_index));
        if let Some(end) = ends.filter(|end| end.sequence >= event) {
            return Err(format!(
                "it cannot be left at event {event}: model call {call_index}, of which the agent has read a part by then, \
                 ends with event {}",
                end.sequence
            ));
        }
    }
    Ok(())
}

/// Arguments of a recorded `next`.
#[derive(serde::Deserialize)]
struct Streamed {
    call_index: u64,
}

/// What a fork is begun with.
pub(crate) struct Prefix {
    pub(crate) tape: Arc<Tape>,
    pub(crate) start_unix_ns: u64,
    /// The completions of the prefix, so that their tokens are spliced and not made again.
    pub(crate) completions: Vec<Arc<Completion>>,
}

pub(crate) fn prefix(store: &dyn RolloutStore, fork: &ForkPoint, spec: &RolloutSpec) -> Result<Prefix, String> {
    let key = AttemptKey { rollout: fork.rollout.clone(), attempt: fork.attempt };
    if key.rollout == spec.id {
        return Err("a rollout cannot be forked from itself".to_owned());
    }
    check_forkable(store, &key)?;
    let lineage = lineage(store, &key)?;
    let played = usize::try_from(fork.event).unwrap_or(usize::MAX);
    check_event(&lineage.spans, fork.event)?;
    let prefix = lineage.spans.get(..played).unwrap_or_default();
    let completions = prefix.iter().filter_map(|span| match &span.body {
        SpanBody::Llm(call) => call.result.as_ref().ok().cloned(),
        _ => None,
    });
    let completions = completions.collect();
    let seeds = lineage.seeds.iter().copied().filter(|(from, _)| *from < fork.event || *from == 0).collect();
    let tape = Tape::prefix(Arc::clone(&lineage.spans), seeds, fork.event, spec.seed);
    if let Some(place) = first_altered(&lineage.spans, tape.fingerprints()) {
        return Err(format!("event {place} is not what was recorded: its fingerprint is another"));
    }
    Ok(Prefix { tape: Arc::new(tape), start_unix_ns: lineage.start_unix_ns, completions })
}

/// Where a fork leaves a rollout: its newest attempt when none is named.
///
/// # Errors
/// A text for people: why it cannot be forked there.
pub fn fork_point(
    store: &dyn RolloutStore,
    rollout: &RolloutId,
    attempt: Option<AttemptNumber>,
    event: u64,
) -> Result<ForkPoint, String> {
    let record = store.rollout(rollout).map_err(|error| error.to_string())?;
    let record = record.ok_or_else(|| format!("there is no rollout `{rollout}`"))?;
    let newest = attempt.or(record.attempt).ok_or_else(|| format!("`{rollout}` has not begun yet"))?;
    let key = AttemptKey { rollout: rollout.clone(), attempt: newest };
    check_forkable(store, &key)?;
    check_event(&lineage(store, &key)?.spans, event)?;
    Ok(ForkPoint { rollout: key.rollout, attempt: newest, event, policy_version: record.spec.policy_version })
}

/// Checks that an attempt can be the ancestor of a fork.
fn check_forkable(store: &dyn RolloutStore, key: &AttemptKey) -> Result<(), String> {
    let attempts = store.attempts(&key.rollout).map_err(|error| error.to_string())?;
    let attempt = attempts.iter().find(|attempt| attempt.key == *key);
    let attempt = attempt.ok_or_else(|| format!("there is no attempt {key}"))?;
    if !attempt.state.is_terminal() {
        return Err("it has not ended yet".to_owned());
    }
    match &attempt.not_forkable {
        Some(reason) => Err(reason.clone()),
        None => Ok(()),
    }
}

/// The event before which a fork leaves its ancestor so that the `call`-th model call (from 0) is the first to be made
/// anew.
///
/// # Errors
/// A text for people: which calls there are.
pub fn event_of_call(spans: &[Span], call: u64) -> Result<u64, String> {
    let of = |span: &Span| match &span.body {
        SpanBody::Llm(recorded) => Some(recorded.call_index),
        _ => None,
    };
    let found = spans.iter().find(|span| of(span) == Some(call)).map(|span| span.sequence);
    found.ok_or_else(|| {
        let calls = spans.iter().filter_map(of).max().map_or(0, |last| last + 1);
        format!("there is no model call {call}; it has {calls}, counted from 0")
    })
}
