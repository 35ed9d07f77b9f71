//! Batched generation on the engine's own threads.
//!
//! Calls wait in a queue sorted by attempt. An idle engine starts when every open session waits for the policy (or has
//! been dropped), or after `batch_wait_ms_max`; a running one takes in new calls before each step. What a call draws is a
//! function of its prompt, its seed and the weights alone (see [`crate::kernel`]), so neither this timing, nor the number
//! of threads, nor a cancelled neighbour can change a token: batches are formed for speed only.
//!
//! Each thread owns the calls that it took and carries them to their end. (Rejected: one batch split over threads at every
//! step; it pays two wake-ups per step of a millisecond.)

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use fulgurite_core::id::{AttemptKey, PolicyVersion};
use fulgurite_core::llm::{FinishReason, LlmError, Sampling};
use fulgurite_core::seed::Seed;
use tokio::sync::oneshot;

use crate::decoder::{Decoder, KvCache, Row, Scratch};
use crate::sampler;
use crate::tokenizer::PolicyTokenizer;

/// Rows of one forward pass: enough to fill the kernels, few enough that activations stay in the cache.
const ROWS_MAX: usize = 128;
/// Calls that one thread carries at once; the rest wait.
const CALLS_MAX: usize = 4_096;

/// Orders waiting calls: by attempt, then by call, then by arrival.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RequestKey {
    pub(crate) attempt: AttemptKey,
    pub(crate) call_index: u64,
    serial: u64,
}

/// One call, checked and tokenised.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) prompt: Vec<u32>,
    pub(crate) sampling: Sampling,
    pub(crate) seed: Seed,
    /// Keys and values of the session's last call come from here and go back to here.
    pub(crate) cache: Weak<CacheSlot>,
}

/// What a call drew.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Generated {
    pub(crate) prompt: Vec<u32>,
    pub(crate) completion: Vec<u32>,
    pub(crate) log_probs: Vec<f32>,
    pub(crate) processed_log_probs: Vec<f32>,
    pub(crate) finish: FinishReason,
    /// Bytes of the completion's text before a stop text.
    pub(crate) stop_at_byte: Option<usize>,
    pub(crate) version: PolicyVersion,
}

type Reply = oneshot::Sender<Result<Generated, LlmError>>;

/// Keys and values that a session keeps between calls.
#[derive(Debug, Default)]
pub(crate) struct CacheSlot(Mutex<Option<SavedCache>>);

#[derive(Debug)]
struct SavedCache {
    cache: KvCache,
    version: PolicyVersion,
    bytes: usize,
    counters: Arc<Counters>,
}

impl Drop for SavedCache {
    fn drop(&mut self) {
        self.counters.kv_cache_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl CacheSlot {
    fn take(&self, version: PolicyVersion) -> Option<KvCache> {
        let mut saved = self.0.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        (saved.version == version).then(|| std::mem::take(&mut saved.cache))
    }

    fn put(&self, cache: KvCache, version: PolicyVersion, counters: &Arc<Counters>, bytes_max: usize) {
        let bytes = cache.bytes();
        let before = counters.kv_cache_bytes.fetch_add(bytes, Ordering::Relaxed);
        let saved = SavedCache { cache, version, bytes, counters: counters.clone() };
        if before + bytes <= bytes_max {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        }
    }
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
    kv_cache_bytes: AtomicUsize,
}

/// A session counts as waiting while one of its calls is in here.
#[derive(Debug)]
struct Waiting {
    request: Request,
    reply: Reply,
    ticket: Ticket,
}

#[derive(Debug, Default)]
struct State {
    /// Open sessions with their calls in flight.
    sessions: HashMap<u64, u32>,
    /// Sessions with at least one call in flight.
    busy: usize,
    serial: u64,
    waiting: BTreeMap<RequestKey, Waiting>,
    waiting_since: Option<Instant>,
    /// Whether a round has started whose calls no thread has taken yet: it stays open until the queue is empty, whatever
    /// the first ones to end do meanwhile.
    round_open: bool,
    /// Calls that threads carry.
    active: usize,
    closed: bool,
}

impl State {
    fn close_round_when_empty(&mut self) {
        if self.waiting.is_empty() {
            self.waiting_since = None;
            self.round_open = false;
        }
    }
}

/// What the generating threads share with sessions.
#[derive(Debug)]
pub(crate) struct Scheduler {
    state: Mutex<State>,
    wake: Condvar,
    published: RwLock<Arc<Decoder>>,
    tokenizer: PolicyTokenizer,
    pub(crate) counters: Arc<Counters>,
    threads: usize,
    batch_wait: Duration,
    kv_cache_bytes_max: usize,
    requests_waiting_max: usize,
}

/// Counts a call as in flight until it is dropped.
#[derive(Debug)]
struct Ticket {
    scheduler: Arc<Scheduler>,
    session: u64,
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
    pub(crate) requests_waiting_max: usize,
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
    pub(crate) fn start(first: Decoder, tokenizer: PolicyTokenizer, limits: SchedulerLimits) -> std::io::Result<Self> {
        let scheduler = Arc::new(Scheduler {
            state: Mutex::default(),
            wake: Condvar::new(),
            published: RwLock::new(Arc::new(first)),
            tokenizer,
            counters: Arc::default(),
            threads: limits.threads.max(1),
            batch_wait: Duration::from_millis(limits.batch_wait_ms_max),
            kv_cache_bytes_max: limits.kv_cache_bytes_max,
            requests_waiting_max: limits.requests_waiting_max,
        });
        let generator = Self { scheduler };
        for index in 0..limits.threads.max(1) {
            let scheduler = generator.scheduler.clone();
            std::thread::Builder::new().name(format!("policy-generate-{index}")).spawn(move || {
                let _failure = OnPanic(scheduler.clone());
                Worker::new(scheduler).run();
            })?;
        }
        Ok(generator)
    }
}

impl Scheduler {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest weights.
    pub(crate) fn published(&self) -> Arc<Decoder> {
        self.published.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the weights for calls that start from now on; calls in flight end on theirs.
    pub(crate) fn publish(&self, decoder: Decoder) {
        *self.published.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(decoder);
    }

    /// Counts a session as live.
    pub(crate) fn open_session(&self) -> u64 {
        let mut state = self.lock();
        state.serial += 1;
        let session = state.serial;
        state.sessions.insert(session, 0);
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
            if let Some(calls) = state.sessions.get_mut(&session) {
                *calls += 1;
                if *calls == 1 {
                    state.busy += 1;
                }
            }
            let ticket = Ticket { scheduler: self.clone(), session };
            state.waiting.insert(key.clone(), Waiting { request, reply, ticket });
            state.waiting_since.get_or_insert_with(Instant::now);
            Cancel { scheduler: self.clone(), key }
        };
        self.wake.notify_all();
        let answer = answer.await;
        drop(cancel);
        answer.unwrap_or_else(|_| Err(LlmError::Unavailable("the policy engine has stopped".to_owned())))
    }

    /// Calls for a thread that carries `own` already. Waits while there is nothing to do; `None` when the engine stops.
    fn admit(&self, own: usize) -> Option<Vec<Waiting>> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            let waited = state.waiting_since.map(|since| since.elapsed());
            let everybody = state.busy == state.sessions.len();
            state.round_open |= waited.is_some_and(|waited| state.active > 0 || everybody || waited >= self.batch_wait);
            if state.round_open {
                let share = (state.waiting.len() + state.active).div_ceil(self.threads).min(CALLS_MAX);
                let mut taken = Vec::new();
                while own + taken.len() < share {
                    let Some((_, waiting)) = state.waiting.pop_first() else { break };
                    taken.push(waiting);
                }
                state.active += taken.len();
                state.close_round_when_empty();
                return Some(taken);
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
}

/// A call that is being answered.
struct Active {
    request: Request,
    reply: Reply,
    /// Dropped with the call: then its session no longer waits.
    ticket: Ticket,
    decoder: Arc<Decoder>,
    cache: KvCache,
    completion: Vec<u32>,
    log_probs: Vec<f32>,
    processed_log_probs: Vec<f32>,
    text: Vec<u8>,
}

impl Active {
    /// The `at`-th token of prompt and completion.
    fn token(&self, at: usize) -> Option<u32> {
        let prompt = &self.request.prompt;
        prompt.get(at).or_else(|| self.completion.get(at.checked_sub(prompt.len())?)).copied()
    }

    fn len(&self) -> usize {
        self.request.prompt.len() + self.completion.len()
    }

    fn unfed(&self) -> usize {
        self.len() - self.cache.ids.len()
    }

    /// Takes a drawn token in; tells why the completion ends with it, if it does.
    fn push(&mut self, drawn: sampler::Drawn, tokenizer: &PolicyTokenizer) -> Option<(FinishReason, Option<usize>)> {
        self.completion.push(drawn.token);
        self.log_probs.push(drawn.log_prob);
        self.processed_log_probs.push(drawn.processed_log_prob);
        if tokenizer.is_end(drawn.token) {
            return Some((FinishReason::Stop, None));
        }
        let sampling = &self.request.sampling;
        if !sampling.stop.is_empty() {
            let bytes = tokenizer.bytes(drawn.token);
            self.text.extend_from_slice(bytes);
            let found = sampling.stop.iter().filter_map(|stop| {
                // A new occurrence ends inside the new token.
                let from = self.text.len().saturating_sub(bytes.len() + stop.len());
                let tail = self.text.get(from..)?;
                Some(from + tail.windows(stop.len()).position(|window| window == stop.as_bytes())?)
            });
            if let Some(at) = found.min() {
                return Some((FinishReason::Stop, Some(at)));
            }
        }
        if self.len() >= self.decoder.shape.context_tokens_max {
            return Some((FinishReason::ContextLength, None));
        }
        let full = sampling.max_tokens > 0 && self.completion.len() >= sampling.max_tokens as usize;
        full.then_some((FinishReason::Length, None))
    }

    fn finish(self, finish: FinishReason, stop_at_byte: Option<usize>, scheduler: &Scheduler) {
        let version = self.decoder.version;
        let count = |counter: &AtomicU64, n: usize| counter.fetch_add(n as u64, Ordering::Relaxed);
        count(&scheduler.counters.completion_tokens, self.completion.len());
        if let Some(slot) = self.request.cache.upgrade() {
            slot.put(self.cache, version, &scheduler.counters, scheduler.kv_cache_bytes_max);
        }
        let generated = Generated {
            prompt: self.request.prompt,
            completion: self.completion,
            log_probs: self.log_probs,
            processed_log_probs: self.processed_log_probs,
            finish,
            stop_at_byte,
            version,
        };
        // The ticket goes first: when the caller wakes up, its session no longer waits.
        drop(self.ticket);
        // A caller that has gone away needs no answer.
        drop(self.reply.send(Ok(generated)));
    }
}

struct Worker {
    scheduler: Arc<Scheduler>,
    active: VecDeque<Active>,
    scratch: Scratch,
}

impl Worker {
    fn new(scheduler: Arc<Scheduler>) -> Self {
        Self { scheduler, active: VecDeque::new(), scratch: Scratch::default() }
    }

    fn run(mut self) {
        while let Some(new) = self.scheduler.admit(self.active.len()) {
            let start = Instant::now();
            self.take_in(new);
            self.step();
            let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.scheduler.counters.busy_ns.fetch_add(ns, Ordering::Relaxed);
        }
    }

    /// Starts calls on the newest weights. Equal prompts (a group's) are computed once and copied: the bits are the same.
    fn take_in(&mut self, new: Vec<Waiting>) {
        if new.is_empty() {
            return;
        }
        let decoder = self.scheduler.published();
        let counters = &self.scheduler.counters;
        let mut calls: Vec<Active> = new
            .into_iter()
            .map(|Waiting { request, reply, ticket }| {
                let mut cache = request.cache.upgrade().and_then(|slot| slot.take(decoder.version)).unwrap_or_default();
                let common = cache.ids.iter().zip(&request.prompt).take_while(|(a, b)| a == b).count();
                // The last token is always fed: its logits are needed.
                cache.truncate(common.min(request.prompt.len().saturating_sub(1)));
                Active {
                    request,
                    reply,
                    ticket,
                    decoder: decoder.clone(),
                    cache,
                    completion: vec![],
                    log_probs: vec![],
                    processed_log_probs: vec![],
                    text: vec![],
                }
            })
            .collect();
        counters.calls.fetch_add(calls.len() as u64, Ordering::Relaxed);

        calls.sort_by(|a, b| a.request.prompt.cmp(&b.request.prompt));
        let mut groups: Vec<&mut [Active]> =
            calls.chunk_by_mut(|a, b| a.request.prompt == b.request.prompt).filter(|group| group.len() > 1).collect();
        loop {
            let mut rows = Vec::new();
            let mut caches = Vec::new();
            for leader in groups.iter_mut().filter_map(|group| group.first_mut()) {
                let (from, prompt) = (leader.cache.ids.len(), &leader.request.prompt);
                let to = (prompt.len() - 1).min(from + ROWS_MAX.saturating_sub(rows.len()));
                rows.extend(prompt.iter().take(to).skip(from).map(|token| Row { cache: caches.len(), token: *token }));
                caches.push(&mut leader.cache);
            }
            if rows.is_empty() {
                break;
            }
            decoder.forward(&rows, &mut caches, &mut self.scratch);
            counters.forward_passes.fetch_add(1, Ordering::Relaxed);
        }
        for group in groups {
            if let Some((leader, followers)) = group.split_first_mut() {
                for follower in followers.iter_mut().filter(|call| call.cache.ids.len() < leader.cache.ids.len()) {
                    follower.cache = leader.cache.clone();
                }
            }
        }
        for call in &calls {
            counters.prompt_tokens.fetch_add(call.request.prompt.len() as u64, Ordering::Relaxed);
            counters.reused_tokens.fetch_add(call.cache.ids.len() as u64, Ordering::Relaxed);
        }
        self.active.extend(calls);
    }

    /// One forward pass: every call's unfed tokens, as far as rows go, and a draw for each call that has none left.
    fn step(&mut self) {
        let before = self.active.len();
        self.active.retain(|call| !call.reply.is_closed());
        let mut ended = before - self.active.len();

        if let Some(decoder) = self.active.front().map(|call| call.decoder.clone()) {
            // Calls are carried in turn, so that more calls than rows cannot starve one. Those on other weights wait for
            // their turn at the front.
            let mut rows = Vec::new();
            let mut draws = Vec::new();
            let mut caches = Vec::new();
            let mut chosen = 0;
            for (at, call) in self.active.iter_mut().enumerate() {
                if rows.len() >= ROWS_MAX || !Arc::ptr_eq(&call.decoder, &decoder) {
                    break;
                }
                let from = call.cache.ids.len();
                let count = call.unfed().min(ROWS_MAX - rows.len());
                rows.extend((from..from + count).filter_map(|at| call.token(at)).map(|token| Row { cache: at, token }));
                if count == call.unfed() {
                    draws.push((at, rows.len() - 1));
                }
                caches.push(&mut call.cache);
                chosen = at + 1;
            }
            decoder.forward(&rows, &mut caches, &mut self.scratch);
            self.scheduler.counters.forward_passes.fetch_add(1, Ordering::Relaxed);
            decoder.logits(draws.iter().map(|(_, row)| *row), &mut self.scratch);
            ended += self.draw(&draws, chosen);
        }
        if ended > 0 {
            self.scheduler.lock().active -= ended;
        }
    }

    /// Draws for the calls at `draws` of the first `chosen`, moves those to the back, and returns how many ended.
    fn draw(&mut self, draws: &[(usize, usize)], chosen: usize) -> usize {
        let vocabulary = self.active.front().map_or(1, |call| call.decoder.shape.vocabulary);
        let mut logits = self.scratch.logits.chunks_exact_mut(vocabulary);
        let mut complete = draws.iter().map(|(at, _)| *at).peekable();
        let mut ended = 0;
        for at in 0..chosen {
            let Some(mut call) = self.active.pop_front() else { break };
            if complete.next_if_eq(&at).is_none() {
                self.active.push_back(call);
                continue;
            }
            let position = call.completion.len() as u64;
            let sampled = logits
                .next()
                .and_then(|logits| sampler::draw(logits, &call.request.sampling, call.request.seed, position));
            let Some(sampled) = sampled else {
                ended += 1;
                let error = LlmError::Unavailable("the policy's logits are not finite".to_owned());
                drop(call.reply.send(Err(error)));
                continue;
            };
            match call.push(sampled, &self.scheduler.tokenizer) {
                None => self.active.push_back(call),
                Some((finish, stop_at_byte)) => {
                    ended += 1;
                    call.finish(finish, stop_at_byte, &self.scheduler);
                }
            }
        }
        ended
    }
}
