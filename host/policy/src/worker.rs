//! One generating thread: it carries calls from their first forward pass to their last token.
//!
//! A step is one forward pass of at most [`ROWS_MAX`] tokens, then a draw for each call that has none left to feed. Calls
//! that are being drawn take one row each, in turn; prompts are fed in parts with the rows that are left, of which some are
//! always theirs, so that neither can starve the other.
//!
//! What was computed once is not computed again: a call starts with the longest beginning that
//! [`KvMemory`](crate::kv_memory::KvMemory) or a call of the same thread has, and one whose beginning another call is
//! computing right now waits for that. What another thread computes is left in the queue until it has (see
//! [`Scheduler::admit`]).
//!
//! When blocks do not fit the memory's bound, the newest call is put back into the queue with what it has drawn; its keys
//! and values are computed again later. A thread always carries one call on, whatever the bound.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::call::Call;
use crate::decoder::{Row, Scratch};
use crate::kv_cache::{BLOCK_TOKENS, KvCache};
use crate::predictor::Predictor;
use crate::scheduler::{SHARED_BY_THREADS_MIN, Scheduler, Weights};

/// Rows of one forward pass: enough to fill the kernels, few enough that activations stay in the cache.
const ROWS_MAX: usize = 128;
/// Rows of a forward pass that are for prompts, when some wait: a quarter, so that drawing loses little while a prompt
/// always goes on.
const PROMPT_ROWS_MIN: usize = 32;
/// Tokens that a call must be able to take over from another one to wait for it: fewer are computed sooner than waited for.
const SHARED_TOKENS_MIN: usize = 8;

/// A call that is being answered.
struct Active {
    call: Call,
    weights: Weights,
    cache: KvCache,
    /// Another call computes the first so many tokens of this one: it is waited for.
    waits_for: Option<(u64, usize)>,
}

impl Active {
    fn unfed(&self) -> usize {
        self.call.ids.len() - self.cache.len()
    }
}

/// Sorts prompts, so that those that begin alike are neighbours: (publication of the weights, prompt, call).
type PromptKey = (u64, Arc<[u32]>, u64);

pub(crate) struct Worker {
    scheduler: Arc<Scheduler>,
    /// Number of the thread.
    thread: usize,
    active: BTreeMap<u64, Active>,
    /// Ids of the active calls, those that were served longest ago first.
    turns: VecDeque<u64>,
    prompts: BTreeSet<PromptKey>,
    serial: u64,
    /// Whether a call was put back for want of memory and none has ended since.
    full: bool,
    scratch: Scratch,
}

fn count(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

impl Worker {
    pub(crate) fn new(scheduler: Arc<Scheduler>, thread: usize) -> Self {
        Self {
            scheduler,
            thread,
            active: BTreeMap::new(),
            turns: VecDeque::new(),
            prompts: BTreeSet::new(),
            serial: 0,
            full: false,
            scratch: Scratch::default(),
        }
    }

    pub(crate) fn run(mut self) {
        while let Some(new) = self.scheduler.admit(self.thread, self.active.len(), !self.full) {
            let start = Instant::now();
            self.turn(new);
            let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.scheduler.counters.busy_ns.fetch_add(ns, Ordering::Relaxed);
        }
    }

    /// Takes calls in and carries all one step further.
    fn turn(&mut self, new: Vec<Call>) {
        self.drop_cancelled();
        if self.scheduler.swap_in_flight {
            self.swap_weights();
        }
        self.take_in(new);
        self.step();
    }

    /// Takes a call out; its blocks are free when nothing else holds them.
    fn remove(&mut self, id: u64) -> Option<Active> {
        let mut active = self.active.remove(&id)?;
        self.scheduler.computed(&mut active.call);
        self.prompts.remove(&(active.weights.generation, active.call.request.prompt.clone(), id));
        self.turns.retain(|turn| *turn != id);
        Some(active)
    }

    fn drop_cancelled(&mut self) {
        let cancelled = |(id, active): (&u64, &Active)| active.call.is_cancelled().then_some(*id);
        let ids: Vec<u64> = self.active.iter().filter_map(cancelled).collect();
        for id in &ids {
            drop(self.remove(*id));
        }
        self.ended(ids.len());
    }

    fn ended(&mut self, calls: usize) {
        self.full &= calls == 0;
        self.scheduler.ended(calls);
    }

    /// Moves calls to the newest weights; their keys and values are computed again.
    fn swap_weights(&mut self) {
        let newest = self.scheduler.weights();
        let old = |(id, active): (&u64, &Active)| (active.weights.generation != newest.generation).then_some(*id);
        let ids: Vec<u64> = self.active.iter().filter_map(old).collect();
        for id in ids {
            let Some(active) = self.remove(id) else { continue };
            let mut call = active.call;
            call.weights = Some(newest.clone());
            call.computed = active.cache.len();
            drop(active.cache);
            let (cache, waits_for) = self.place(&call, &newest);
            self.carry(call, newest.clone(), cache, waits_for);
        }
    }

    /// Starts calls on the newest weights, and goes on with those that were put back, as far as memory goes.
    fn take_in(&mut self, new: Vec<Call>) {
        let mut new = new.into_iter();
        let mut promised = 0;
        let mut refused = vec![];
        for mut call in new.by_ref() {
            let started = call.weights.is_some();
            let weights = match call.weights.take() {
                Some(weights) if !self.scheduler.swap_in_flight => weights,
                _ => self.scheduler.weights(),
            };
            let (cache, waits_for) = self.place(&call, &weights);
            let known = waits_for.map_or(cache.len(), |(_, shared)| shared);
            let blocks = (call.ids.len() + 1).div_ceil(BLOCK_TOKENS) - known / BLOCK_TOKENS;
            if !self.active.is_empty() && !self.scheduler.memory.make_room(promised + blocks) {
                call.weights = started.then_some(weights);
                refused.push(call);
                break;
            }
            promised += blocks;
            let counters = &self.scheduler.counters;
            if !started {
                count(&counters.calls, 1);
                count(&counters.prompt_tokens, call.ids.len());
                count(&counters.reused_tokens, known);
            }
            if call.ids.len() < known + SHARED_BY_THREADS_MIN {
                // Nearly all of it is known already.
                self.scheduler.computed(&mut call);
            }
            call.weights = Some(weights.clone());
            self.carry(call, weights, cache, waits_for);
        }
        refused.extend(new);
        self.full |= !refused.is_empty();
        self.scheduler.put_back(refused);
    }

    fn carry(&mut self, mut call: Call, weights: Weights, cache: KvCache, waits_for: Option<(u64, usize)>) {
        let known = waits_for.map_or(cache.len(), |(_, shared)| shared);
        count(&self.scheduler.counters.recomputed_tokens, std::mem::take(&mut call.computed).saturating_sub(known));
        self.serial += 1;
        self.prompts.insert((weights.generation, call.request.prompt.clone(), self.serial));
        self.turns.push_back(self.serial);
        self.active.insert(self.serial, Active { call, weights, cache, waits_for });
    }

    /// What is known of a call's beginning, or the call whose work to wait for.
    fn place(&self, call: &Call, weights: &Weights) -> (KvCache, Option<(u64, usize)>) {
        // The last token is always fed: its logits are needed.
        let feedable = call.ids.len().saturating_sub(1);
        let ids = call.ids.get(..feedable).unwrap_or_default();
        let mut cache = self.scheduler.memory.longest(call.session(), weights.generation, ids);
        let at: PromptKey = (weights.generation, call.request.prompt.clone(), 0);
        let neighbours = self.prompts.range(..&at).next_back().into_iter().chain(self.prompts.range(&at..).next());
        let shared = |(generation, prompt, id): &PromptKey| {
            let shared = prompt.iter().zip(ids).take_while(|(a, b)| a == b).count();
            // The other one, too, feeds its last token only when it draws.
            (*generation == weights.generation).then_some((*id, shared.min(prompt.len() - 1)))
        };
        let Some((leader, shared)) = neighbours.filter_map(shared).max_by_key(|(_, shared)| *shared) else {
            return (cache, None);
        };
        if shared < cache.len() + SHARED_TOKENS_MIN {
            return (cache, None);
        }
        match self.active.get(&leader) {
            Some(leader) if leader.cache.len() >= shared => {
                cache = leader.cache.prefix(shared);
                (cache, None)
            }
            Some(_) => (cache, Some((leader, shared))),
            None => (cache, None),
        }
    }

    /// Lets calls go on whose beginning has been computed by the one that they waited for, or never will be.
    fn release_followers(&mut self) {
        let waiting = |(id, active): (&u64, &Active)| active.waits_for.map(|(leader, shared)| (*id, leader, shared));
        let waiting: Vec<(u64, u64, usize)> = self.active.iter().filter_map(waiting).collect();
        // In the order of arrival, so that one that waits for a follower sees what that one has just taken over.
        for (id, leader, shared) in waiting {
            let cache = match self.active.get(&leader) {
                Some(leader) if leader.cache.len() >= shared => leader.cache.prefix(shared),
                Some(_) => continue,
                // It has ended and left its blocks, or was put back.
                None => {
                    let Some(active) = self.active.get(&id) else { continue };
                    self.scheduler.memory.longest(
                        active.call.session(),
                        active.weights.generation,
                        active.call.ids.split_last().map_or(&[][..], |(_, before)| before),
                    )
                }
            };
            if let Some(active) = self.active.get_mut(&id) {
                active.waits_for = None;
                if cache.len() > active.cache.len() {
                    active.cache = cache;
                }
            }
        }
    }

    /// Rows of the next forward pass: (call, tokens). They are all of calls with the same weights as the first in turn.
    fn plan(&self) -> Vec<(u64, usize)> {
        let in_turn = || self.turns.iter().filter_map(|id| Some((*id, self.active.get(id)?)));
        let Some(generation) = in_turn().next().map(|(_, active)| active.weights.generation) else { return vec![] };
        let ready =
            || in_turn().filter(|(_, active)| active.waits_for.is_none() && active.weights.generation == generation);
        let prompts = || ready().filter(|(_, active)| active.unfed() > 1);
        let mut waiting = 0;
        for (_, active) in prompts() {
            waiting += active.unfed();
            if waiting >= PROMPT_ROWS_MIN {
                break;
            }
        }
        let draws_max = ROWS_MAX - waiting.min(PROMPT_ROWS_MIN);
        let mut plan: Vec<(u64, usize)> =
            ready().filter(|(_, active)| active.unfed() == 1).map(|(id, _)| (id, 1)).take(draws_max).collect();
        let mut rows = plan.len();
        for (id, active) in prompts() {
            if rows >= ROWS_MAX {
                break;
            }
            let part = active.unfed().min(ROWS_MAX - rows);
            plan.push((id, part));
            rows += part;
        }
        plan
    }

    /// Blocks that a plan makes.
    fn blocks(&self, plan: &[(u64, usize)]) -> usize {
        let blocks = |(id, rows): &(u64, usize)| self.active.get(id).map(|active| active.cache.blocks_to_make(*rows));
        plan.iter().filter_map(blocks).sum()
    }

    /// Puts the newest call back into the queue.
    fn put_newest_back(&mut self) {
        let Some(newest) = self.active.keys().next_back().copied() else { return };
        let Some(Active { mut call, weights, cache, .. }) = self.remove(newest) else { return };
        call.computed = cache.len();
        // What nobody evicts until then need not be computed again.
        self.scheduler.memory.keep(call.session(), weights.generation, &cache, false);
        count(&self.scheduler.counters.calls_put_back, 1);
        self.full = true;
        self.scheduler.put_back(vec![call]);
    }

    /// One forward pass and its draws.
    fn step(&mut self) {
        let scheduler = self.scheduler.clone();
        let (plan, reserved) = loop {
            self.release_followers();
            let plan = self.plan();
            if plan.is_empty() {
                return;
            }
            let blocks = self.blocks(&plan);
            if let Some(reserved) = scheduler.memory.reserve(blocks) {
                break (plan, reserved);
            }
            if self.active.len() == 1 {
                break (plan, scheduler.memory.reserve_in_any_case(blocks));
            }
            self.put_newest_back();
        };
        let first = plan.first().and_then(|(id, _)| self.active.get(id));
        let Some(predictor) = first.map(|active| active.weights.predictor.clone()) else { return };
        let draws = self.feed(&predictor, &plan);
        drop(reserved);
        count(&scheduler.counters.forward_passes, 1);
        let vocabulary = predictor.shape().vocabulary;
        let mut all_logits = std::mem::take(&mut self.scratch.logits);
        let mut ended = 0;
        for (id, logits) in draws.iter().zip(all_logits.chunks_exact_mut(vocabulary)) {
            ended += usize::from(self.draw(*id, logits));
        }
        self.scratch.logits = all_logits;
        let served: BTreeSet<u64> = plan.iter().map(|(id, _)| *id).collect();
        self.turns.retain(|id| !served.contains(id));
        self.turns.extend(plan.iter().map(|(id, _)| *id).filter(|id| self.active.contains_key(id)));
        self.ended(ended);
    }

    /// Runs the forward pass of a plan; returns the calls that have a token to draw, in the order of their logits.
    fn feed(&mut self, predictor: &Predictor, plan: &[(u64, usize)]) -> Vec<u64> {
        let mut caches = Vec::with_capacity(plan.len());
        let mut rows = Vec::with_capacity(ROWS_MAX);
        let (mut draws, mut drawn_rows) = (Vec::new(), Vec::new());
        for (at, (id, count)) in plan.iter().enumerate() {
            let Some(active) = self.active.get_mut(id) else { continue };
            let from = active.cache.len();
            let part = active.call.ids.get(from..from + count).unwrap_or_default();
            rows.extend(part.iter().map(|token| Row { cache: at, token: *token }));
            if from + count == active.call.ids.len() {
                draws.push(*id);
                drawn_rows.push(rows.len() - 1);
            }
            caches.push(std::mem::take(&mut active.cache));
        }
        predictor.predict(&rows, &mut caches.iter_mut().collect::<Vec<_>>(), &drawn_rows, &mut self.scratch);
        for ((id, count), cache) in plan.iter().zip(caches) {
            let Some(active) = self.active.get_mut(id) else { continue };
            active.cache = cache;
            // Its prompt is complete: others may begin with it. The last block is shared only where threads wait for it: it
            // is copied when this call goes on writing. Its last part may be one token.
            if (*count > 1 || active.call.announced) && active.unfed() == 0 {
                let whole_blocks = !active.call.announced;
                let (memory, session) = (&self.scheduler.memory, active.call.session());
                memory.keep(session, active.weights.generation, &active.cache, whole_blocks);
            }
            if active.unfed() == 0 {
                self.scheduler.computed(&mut active.call);
            }
        }
        draws
    }

    /// Draws a call's next token. Whether the call has ended.
    fn draw(&mut self, id: u64, logits: &mut [f32]) -> bool {
        let Some(active) = self.active.get_mut(&id) else { return false };
        match active.call.draw(logits, &self.scheduler) {
            Ok(None) => false,
            Ok(Some(end)) => {
                if let Some(Active { call, weights, cache, .. }) = self.remove(id) {
                    let memory = &self.scheduler.memory;
                    memory.keep(call.session(), weights.generation, &cache, false);
                    drop(cache);
                    memory.make_room(0);
                    call.finish(end, &self.scheduler);
                }
                true
            }
            Err(error) => {
                if let Some(active) = self.remove(id) {
                    active.call.fail(error);
                }
                true
            }
        }
    }
}

#[cfg(test)]
impl Worker {
    /// Takes in what waits and carries all one step further. Something must be there to do.
    pub(crate) fn next_turn(&mut self) {
        let new = self.scheduler.admit(self.thread, self.active.len(), !self.full).unwrap();
        self.turn(new);
    }

    /// Calls that are being answered.
    pub(crate) fn calls(&self) -> usize {
        self.active.len()
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
