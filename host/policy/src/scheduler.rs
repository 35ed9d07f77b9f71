//! The queue between sessions and generating threads.
//!
//! Calls wait in a queue sorted by attempt. An idle engine starts when every open session waits for the policy (or has
//! been dropped), or after `batch_wait_ms_max`; a running one takes in new calls before each step. What a call draws is a
//! function of its prompt, its seed and the weights alone (see [`crate::kernel`]), so neither this timing, nor the number
//! of threads, nor a cancelled neighbour can change a token: batches are formed for speed only.
//!
//! An engine with several models has a scheduler for each. A session is open in all of them that it may ask, and while it waits for
//! one of them it counts as waiting in the others too.
//!
//! Each thread owns the calls that it took and carries them to their end ([`crate::worker`]), unless it has to put one back
//! for want of memory. (Rejected: one batch split over threads at every step; it pays two wake-ups per step of a
//! millisecond.)

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use fulgurite_core::id::AttemptKey;
use fulgurite_core::llm::{Constraint, LlmError};
use tokio::sync::oneshot;

use crate::call::{Call, Generated, Request};
use crate::constraint::{Grammars, Progress};
use crate::kv_memory::KvMemory;
use crate::predictor::Predictor;
use crate::tokenizer::PolicyTokenizer;
use crate::worker::Worker;

/// Calls that one thread carries at once; the rest wait.
const CALLS_MAX: usize = 4_096;

/// Tokens that two prompts must share, and half of the later one, for a thread to leave that one alone while another thread
/// computes the first: less is computed sooner than waited for.
pub(crate) const SHARED_BY_THREADS_MIN: usize = 64;

/// Orders waiting calls: by attempt, then by call, then by arrival.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RequestKey {
    pub(crate) attempt: AttemptKey,
    pub(crate) call_index: u64,
    serial: u64,
}

/// Published weights.
#[derive(Debug, Clone)]
pub(crate) struct Weights {
    pub(crate) predictor: Arc<Predictor>,
    /// Counts publications. Versions may come again, when a checkpoint is restored, with other weights.
    pub(crate) generation: u64,
}

/// Running totals.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) calls: AtomicU64,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) reused_tokens: AtomicU64,
    pub(crate) completion_tokens: AtomicU64,
    pub(crate) forward_passes: AtomicU64,
    pub(crate) busy_ns: AtomicU64,
    pub(crate) calls_put_back: AtomicU64,
    pub(crate) recomputed_tokens: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Open sessions with their calls in flight.
    sessions: HashMap<u64, u32>,
    /// Sessions with at least one call in flight.
    busy: usize,
    serial: u64,
    waiting: BTreeMap<RequestKey, Call>,
    waiting_since: Option<Instant>,
    /// Whether a round has started whose calls no thread has taken yet: it stays open until the queue is empty, whatever
    /// the first ones to end do meanwhile.
    round_open: bool,
    /// Calls that threads carry.
    active: usize,
    /// Prompts that threads have begun to compute, and which thread.
    computing: BTreeMap<RequestKey, (usize, Arc<[u32]>)>,
    closed: bool,
}

impl State {
    /// Opens a round at the very moment when everybody waits: a thread may look later than one of them goes on, where that one
    /// waited for another model.
    fn open_round_when_all_wait(&mut self) {
        self.round_open |= !self.waiting.is_empty() && self.busy == self.sessions.len();
    }

    fn close_round_when_empty(&mut self) {
        if self.waiting.is_empty() {
            self.waiting_since = None;
            self.round_open = false;
        }
    }

    /// Who computes most of this prompt right now, if anybody does.
    fn computed_by(&self, prompt: &[u32]) -> Option<usize> {
        let shares = |other: &[u32]| {
            let shared = other.iter().zip(prompt).take_while(|(a, b)| a == b).count();
            shared >= SHARED_BY_THREADS_MIN && 2 * shared >= prompt.len()
        };
        self.computing.values().find(|(_, other)| shares(other)).map(|(thread, _)| *thread)
    }

    /// Takes waiting calls, in their order, but for those whose prompt another thread is computing.
    fn take(&mut self, thread: usize, calls_max: usize) -> Vec<Call> {
        let mut taken = Vec::new();
        let mut after: Option<RequestKey> = None;
        while taken.len() < calls_max {
            let from = after.take().map_or(Bound::Unbounded, Bound::Excluded);
            let Some((key, call)) = self.waiting.range((from, Bound::Unbounded)).next() else { break };
            let key = key.clone();
            after = Some(key.clone());
            let by = self.computed_by(&call.request.prompt);
            if by.is_some_and(|by| by != thread) {
                continue;
            }
            let Some(mut call) = self.waiting.remove(&key) else { break };
            if by.is_none() && call.request.prompt.len() >= SHARED_BY_THREADS_MIN {
                call.announced = true;
                self.computing.insert(key, (thread, call.request.prompt.clone()));
            }
            taken.push(call);
        }
        taken
    }
}

/// What the generating threads share with sessions.
#[derive(Debug)]
pub(crate) struct Scheduler {
    state: Mutex<State>,
    wake: Condvar,
    published: RwLock<Weights>,
    pub(crate) tokenizer: PolicyTokenizer,
    grammars: OnceLock<Result<Grammars, LlmError>>,
    pub(crate) counters: Counters,
    pub(crate) memory: KvMemory,
    pub(crate) swap_in_flight: bool,
    threads: usize,
    batch_wait: Duration,
    requests_waiting_max: usize,
    /// Tokens of a piece of streamed text.
    pub(crate) stream_chunk_tokens: usize,
    /// Most tokens of a set that is recorded.
    pub(crate) kept_tokens_max: usize,
}

/// Counts a call as in flight until it is dropped: one of this scheduler, or one that the session makes elsewhere.
#[derive(Debug)]
pub(crate) struct Ticket {
    scheduler: Arc<Scheduler>,
    pub(crate) session: u64,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.scheduler.lock();
        if let Some(calls) = state.sessions.get_mut(&self.session) {
            *calls -= 1;
            if *calls == 0 {
                state.busy -= 1;
            }
        }
    }
}

/// Takes a waiting call out again when its future is dropped.
#[derive(Debug)]
struct Cancel {
    scheduler: Arc<Scheduler>,
    key: RequestKey,
}

impl Drop for Cancel {
    fn drop(&mut self) {
        // Dropped outside the lock: a ticket takes it again.
        let waiting = {
            let mut state = self.scheduler.lock();
            let waiting = state.waiting.remove(&self.key);
            state.close_round_when_empty();
            waiting
        };
        if waiting.is_some() {
            drop(waiting);
            self.scheduler.wake.notify_all();
        }
    }
}

/// Limits of the scheduler, from the config.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SchedulerLimits {
    pub(crate) threads: usize,
    pub(crate) batch_wait_ms_max: u64,
    pub(crate) kv_cache_bytes_max: usize,
    pub(crate) kv_cache_idle_bytes_max: usize,
    pub(crate) requests_waiting_max: usize,
    pub(crate) stream_chunk_tokens: usize,
    pub(crate) kept_tokens_max: usize,
    pub(crate) swap_in_flight: bool,
}

/// The generating threads; they end when the last of these is dropped.
#[derive(Debug)]
pub(crate) struct Generator {
    pub(crate) scheduler: Arc<Scheduler>,
}

impl Drop for Generator {
    fn drop(&mut self) {
        self.scheduler.lock().closed = true;
        self.scheduler.wake.notify_all();
    }
}

/// Fails all calls when a generating thread panics: a defect must not leave callers waiting for ever.
struct OnPanic(Arc<Scheduler>);

impl Drop for OnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let waiting = {
                let mut state = self.0.lock();
                state.closed = true;
                std::mem::take(&mut state.waiting)
            };
            tracing::error!(calls = waiting.len(), "a generating thread panicked; the policy engine has stopped");
            drop(waiting);
            self.0.wake.notify_all();
        }
    }
}

impl Generator {
    /// Starts the threads.
    pub(crate) fn start(
        first: Predictor,
        tokenizer: PolicyTokenizer,
        limits: SchedulerLimits,
    ) -> std::io::Result<Self> {
        let generator = Self { scheduler: Arc::new(Scheduler::new(first, tokenizer, limits)) };
        for index in 0..limits.threads.max(1) {
            let scheduler = generator.scheduler.clone();
            std::thread::Builder::new().name(format!("policy-generate-{index}")).spawn(move || {
                let _failure = OnPanic(scheduler.clone());
                Worker::new(scheduler, index).run();
            })?;
        }
        Ok(generator)
    }
}

impl Scheduler {
    /// Without threads.
    pub(crate) fn new(first: impl Into<Predictor>, tokenizer: PolicyTokenizer, limits: SchedulerLimits) -> Self {
        let first = first.into();
        let (bytes_max, idle_bytes_max) = (limits.kv_cache_bytes_max, limits.kv_cache_idle_bytes_max);
        Self {
            state: Mutex::default(),
            wake: Condvar::new(),
            memory: KvMemory::new(first.layout(), first.meter(), bytes_max, idle_bytes_max),
            published: RwLock::new(Weights { predictor: Arc::new(first), generation: 0 }),
            tokenizer,
            grammars: OnceLock::new(),
            counters: Counters::default(),
            swap_in_flight: limits.swap_in_flight,
            threads: limits.threads.max(1),
            batch_wait: Duration::from_millis(limits.batch_wait_ms_max),
            requests_waiting_max: limits.requests_waiting_max,
            stream_chunk_tokens: limits.stream_chunk_tokens,
            kept_tokens_max: limits.kept_tokens_max,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest weights.
    pub(crate) fn published(&self) -> Arc<Predictor> {
        self.weights().predictor
    }

    /// The start of a completion that must have a shape.
    pub(crate) fn constrain(&self, constraint: &Constraint) -> Result<Progress, LlmError> {
        self.grammars.get_or_init(|| Grammars::new(&self.tokenizer)).as_ref().map_err(Clone::clone)?.start(constraint)
    }

    /// The newest weights and which publication they are.
    pub(crate) fn weights(&self) -> Weights {
        self.published.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the weights for calls that start from now on; calls in flight end on theirs, unless they are to be swapped.
    pub(crate) fn publish(&self, predictor: impl Into<Predictor>) {
        let predictor = Arc::new(predictor.into());
        let generation = {
            let mut published = self.published.write().unwrap_or_else(PoisonError::into_inner);
            let generation = published.generation + 1;
            *published = Weights { predictor, generation };
            generation
        };
        // At once: what comes next may be training, which needs memory of its own.
        self.memory.forget_before(generation);
    }

    /// Counts a session as live.
    pub(crate) fn open_session(&self) -> u64 {
        let session = {
            let mut state = self.lock();
            state.serial += 1;
            let session = state.serial;
            state.sessions.insert(session, 0);
            session
        };
        self.memory.open(session);
        session
    }

    /// Counts it no longer; the others need not wait for it.
    pub(crate) fn close_session(&self, session: u64) {
        {
            let mut state = self.lock();
            if state.sessions.remove(&session).is_some_and(|calls| calls > 0) {
                state.busy -= 1;
            }
        }
        self.wake.notify_all();
        self.memory.close(session);
    }

    /// Counts a session as busy while it waits for another model of its engine: nobody here need wait for it meanwhile.
    pub(crate) fn elsewhere(self: &Arc<Self>, session: u64) -> Ticket {
        let ticket = {
            let mut state = self.lock();
            let ticket = self.ticket(&mut state, session);
            state.open_round_when_all_wait();
            ticket
        };
        self.wake.notify_all();
        ticket
    }

    fn ticket(self: &Arc<Self>, state: &mut State, session: u64) -> Ticket {
        if let Some(calls) = state.sessions.get_mut(&session) {
            *calls += 1;
            if *calls == 1 {
                state.busy += 1;
            }
        }
        Ticket { scheduler: self.clone(), session }
    }

    /// Queues a call and waits for its answer. Dropping the future cancels the call. A full queue answers `Unavailable`.
    pub(crate) async fn ask(
        self: &Arc<Self>,
        session: u64,
        attempt: AttemptKey,
        call_index: u64,
        request: Request,
    ) -> Result<Generated, LlmError> {
        let (reply, answer) = oneshot::channel();
        let cancel = {
            let mut state = self.lock();
            if state.closed {
                return Err(LlmError::Unavailable("the policy engine has stopped".to_owned()));
            }
            if state.waiting.len() >= self.requests_waiting_max {
                let text = format!("{} calls are waiting for the policy already", self.requests_waiting_max);
                return Err(LlmError::Unavailable(text));
            }
            state.serial += 1;
            let key = RequestKey { attempt, call_index, serial: state.serial };
            let ticket = self.ticket(&mut state, session);
            state.waiting.insert(key.clone(), Call::new(key.clone(), request, reply, ticket));
            state.waiting_since.get_or_insert_with(Instant::now);
            state.open_round_when_all_wait();
            Cancel { scheduler: self.clone(), key }
        };
        self.wake.notify_all();
        let answer = answer.await;
        drop(cancel);
        answer.unwrap_or_else(|_| Err(LlmError::Unavailable("the policy engine has stopped".to_owned())))
    }

    /// Calls for a thread that carries `own` already, and none when it has no `room` for more. Waits while there is nothing
    /// to do; `None` when the engine stops.
    pub(crate) fn admit(&self, thread: usize, own: usize, room: bool) -> Option<Vec<Call>> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            let waited = state.waiting_since.map(|since| since.elapsed());
            let everybody = state.busy == state.sessions.len();
            state.round_open |= waited.is_some_and(|waited| state.active > 0 || everybody || waited >= self.batch_wait);
            if state.round_open && (room || own == 0) {
                let share = (state.waiting.len() + state.active).div_ceil(self.threads).min(CALLS_MAX);
                let taken = state.take(thread, share.saturating_sub(own));
                state.active += taken.len();
                state.close_round_when_empty();
                if own > 0 || !taken.is_empty() {
                    return Some(taken);
                }
                if !state.waiting.is_empty() {
                    // Another thread computes what all of them begin with, and wakes this one.
                    state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            }
            if own > 0 {
                return Some(Vec::new());
            }
            state = match waited {
                Some(waited) => {
                    let rest = self.batch_wait.saturating_sub(waited);
                    self.wake.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.wake.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// A call's prompt is computed, or will not be: other threads need not wait for it.
    pub(crate) fn computed(&self, call: &mut Call) {
        if std::mem::take(&mut call.announced) {
            self.lock().computing.remove(&call.key);
            self.wake.notify_all();
        }
    }

    /// Takes calls back that a thread has no memory for. They keep their place in the queue.
    pub(crate) fn put_back(&self, mut calls: Vec<Call>) {
        if calls.is_empty() {
            return;
        }
        for call in &mut calls {
            self.computed(call);
        }
        {
            let mut state = self.lock();
            state.active -= calls.len();
            if state.closed {
                // Nobody would take them; their callers are told.
                drop(state);
                return;
            }
            state.waiting.extend(calls.into_iter().map(|call| (call.key.clone(), call)));
            state.waiting_since.get_or_insert_with(Instant::now);
            state.round_open = true;
        }
        // A thread that carries nothing has room for one in any case.
        self.wake.notify_all();
    }

    /// Counts calls that have ended.
    pub(crate) fn ended(&self, calls: usize) {
        if calls > 0 {
            self.lock().active -= calls;
        }
    }
}
