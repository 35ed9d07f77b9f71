//! Virtual time. A guest's clock starts at the attempt's recorded start and moves by the durations of host calls; a guest
//! that sleeps moves it without waiting. What a guest reads from its clocks is therefore a function of what is recorded.
//!
//! wasmtime-wasi's own `wasi:clocks` are linked over by the implementations here, because its monotonic sleep is tokio's.
//! Its `wasi:io/poll` stays: it polls all of a guest's pollables in turn, and a deadline here becomes ready only when
//! nothing else was and no other deadline is earlier.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use wasmtime::component::Resource;
use wasmtime_wasi::p2::bindings::clocks::{monotonic_clock, wall_clock};
use wasmtime_wasi::p2::{DynPollable, Pollable, subscribe};

use crate::guest::GuestState;
use crate::tape::Progress;

const NS_PER_SECOND: u64 = 1_000_000_000;

/// The clock of one attempt.
#[derive(Debug)]
pub(crate) struct VirtualClock {
    start_unix_ns: u64,
    elapsed_ns: AtomicU64,
    sleeping: Mutex<BTreeSet<(u64, u64)>>,
    sleepers: AtomicU64,
    /// Told before a sleep moves the clock.
    progress: Arc<Progress>,
}

impl VirtualClock {
    pub(crate) fn new(start_unix_ns: u64) -> Self {
        Self::watched(start_unix_ns, Arc::default())
    }

    /// A clock whose guest is watched.
    pub(crate) fn watched(start_unix_ns: u64, progress: Arc<Progress>) -> Self {
        Self {
            start_unix_ns,
            elapsed_ns: AtomicU64::new(0),
            sleeping: Mutex::new(BTreeSet::new()),
            sleepers: AtomicU64::new(0),
            progress,
        }
    }

    pub(crate) fn start_unix_ns(&self) -> u64 {
        self.start_unix_ns
    }

    /// Nanoseconds since the attempt's start.
    pub(crate) fn elapsed_ns(&self) -> u64 {
        self.elapsed_ns.load(Ordering::Relaxed)
    }

    /// Nanoseconds since the Unix epoch.
    pub(crate) fn unix_ns(&self) -> u64 {
        self.start_unix_ns.saturating_add(self.elapsed_ns())
    }

    /// Moves the clock by the duration of a host call.
    pub(crate) fn advance(&self, by_ns: u64) {
        let _ = self
            .elapsed_ns
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |elapsed| Some(elapsed.saturating_add(by_ns)));
    }

    /// Sets the clock to a reading that was recorded.
    pub(crate) fn set_unix_ns(&self, unix_ns: u64) {
        self.elapsed_ns.store(unix_ns.saturating_sub(self.start_unix_ns), Ordering::Relaxed);
    }

    fn advance_to(&self, elapsed_ns: u64) {
        self.elapsed_ns.fetch_max(elapsed_ns, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<(u64, u64)>> {
        self.sleeping.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What `subscribe-instant` and `subscribe-duration` hand out.
struct Deadline {
    clock: Arc<VirtualClock>,
    at_ns: u64,
}

#[async_trait::async_trait]
impl Pollable for Deadline {
    async fn ready(&mut self) {
        Sleep { clock: &self.clock, at_ns: self.at_ns, ticket: None }.await;
    }
}

/// Ready in two rounds: the first tells the clock about the deadline and lets everything else in the same poll have its
/// turn; the second moves the clock if this is the earliest deadline.
struct Sleep<'a> {
    clock: &'a VirtualClock,
    at_ns: u64,
    ticket: Option<u64>,
}

impl Future for Sleep<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.clock.elapsed_ns() >= self.at_ns {
            return Poll::Ready(());
        }
        if self.ticket.is_none() {
            let ticket = self.clock.sleepers.fetch_add(1, Ordering::Relaxed);
            self.clock.lock().insert((self.at_ns, ticket));
            self.ticket = Some(ticket);
        } else if self.clock.lock().first().is_none_or(|(earliest, _)| *earliest >= self.at_ns) {
            // Where the recorded attempt was ended before it had slept, this sleep never ends.
            if !self.clock.progress.sleeps() {
                return Poll::Pending;
            }
            self.clock.advance_to(self.at_ns);
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Drop for Sleep<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.clock.lock().remove(&(self.at_ns, ticket));
        }
    }
}

impl<H: Send + 'static> GuestState<H> {
    fn subscribe_at(&mut self, at_ns: u64) -> wasmtime::Result<Resource<DynPollable>> {
        let deadline = Deadline { clock: Arc::clone(&self.clock), at_ns };
        let deadline = self.table.push(deadline)?;
        subscribe(&mut self.table, deadline)
    }
}

impl<H: Send + 'static> monotonic_clock::Host for GuestState<H> {
    fn now(&mut self) -> wasmtime::Result<u64> {
        Ok(self.clock.elapsed_ns())
    }

    fn resolution(&mut self) -> wasmtime::Result<u64> {
        Ok(1)
    }

    fn subscribe_instant(&mut self, when: u64) -> wasmtime::Result<Resource<DynPollable>> {
        self.subscribe_at(when)
    }

    fn subscribe_duration(&mut self, duration: u64) -> wasmtime::Result<Resource<DynPollable>> {
        self.subscribe_at(self.clock.elapsed_ns().saturating_add(duration))
    }
}

impl<H: Send + 'static> wall_clock::Host for GuestState<H> {
    fn now(&mut self) -> wasmtime::Result<wall_clock::Datetime> {
        let now = self.clock.unix_ns();
        let nanoseconds = u32::try_from(now % NS_PER_SECOND).unwrap_or(0);
        Ok(wall_clock::Datetime { seconds: now / NS_PER_SECOND, nanoseconds })
    }

    fn resolution(&mut self) -> wasmtime::Result<wall_clock::Datetime> {
        Ok(wall_clock::Datetime { seconds: 0, nanoseconds: 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_earliest_sleeper_wakes_first_and_the_clock_stands_there() {
        let clock = VirtualClock::new(1_000);
        let late = Sleep { clock: &clock, at_ns: 3_600 * NS_PER_SECOND, ticket: None };
        let early = Sleep { clock: &clock, at_ns: 7, ticket: None };
        tokio::select! {
            biased;
            () = late => panic!("the later deadline was ready first"),
            () = early => {}
        }
        assert_eq!(clock.elapsed_ns(), 7);
        assert_eq!(clock.unix_ns(), 1_007);
        assert!(clock.lock().is_empty());
    }

    #[test]
    fn the_clock_never_wraps() {
        let clock = VirtualClock::new(u64::MAX - 1);
        clock.advance(u64::MAX);
        clock.advance(1);
        assert_eq!(clock.unix_ns(), u64::MAX);
    }
}
