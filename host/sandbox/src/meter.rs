//! Guest CPU time: what a guest spends outside host calls.
//!
//! An epoch deadline alone would count the time that a guest waits for a model, so time is taken where it passes: a guest's
//! future is timed while it is polled, and stops the watch while a host future inside it is polled. Waiting therefore costs
//! nothing by construction. Wall time inside a poll is used up to [`EXACT_AFTER`]; a guest that has used more is timed by
//! its thread's CPU clock, so that a busy machine does not turn into a CPU limit.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use fulgurite_core::outcome::OutcomeKind;

use crate::fault::Stop;
use crate::tape::Tape;

/// Period of the epoch ticker: the granularity of limits on CPU time and of yields. 2 ms: a loop loses its worker thread
/// after at most two of them, and 500 ticks a second cost nothing measurable.
pub(crate) const TICK: Duration = Duration::from_millis(2);

/// From here on a guest is timed by its thread's CPU clock, which costs a system call per reading where wall time costs
/// about 20 ns. Nearly all guests end below.
const EXACT_AFTER: Duration = Duration::from_millis(20);

/// Most that one slice timed by wall clock is charged: a running guest is made to give way every [`TICK`], so whatever lasts
/// longer was the operating system's doing.
const WALL_SLICE_MAX: Duration = Duration::from_millis(5);

/// How many times the CPU time of a recorded guest a replayed one may take to get as far. 4: a busier or slower machine; a
/// changed guest that is in a loop is stopped soon all the same.
const REPLAY_CPU_FACTOR: u64 = 4;

/// The CPU account of one guest. Readings are relaxed: only the thread that polls the guest writes.
#[derive(Debug)]
pub(crate) struct Meter {
    used_ns: AtomicU64,
    slice_start_ns: AtomicU64,
    slice_exact: AtomicBool,
    limit_ns: AtomicU64,
    limit_name: &'static str,
    limit_ms: u64,
    heartbeat: Option<Arc<Heartbeat>>,
    tape: Option<Arc<Tape>>,
}

/// The last sign of life of an attempt. Its clock is moved by whoever watches it, so that a beat costs one store and no
/// reading of a clock.
#[derive(Debug)]
pub struct Heartbeat {
    now_ms: Arc<AtomicU64>,
    last_ms: AtomicU64,
}

impl Heartbeat {
    /// A heart that has just beaten. `now_ms` is the watcher's clock in milliseconds.
    #[must_use]
    pub fn new(now_ms: Arc<AtomicU64>) -> Self {
        let last_ms = AtomicU64::new(now_ms.load(Ordering::Relaxed));
        Self { now_ms, last_ms }
    }

    /// The guest runs.
    pub fn beat(&self) {
        self.last_ms.store(self.now_ms.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// How long nothing was heard, in milliseconds, on a watcher's clock that reads `now_ms`.
    #[must_use]
    pub fn silent_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.last_ms.load(Ordering::Relaxed))
    }
}

impl Meter {
    /// A meter with an allowance of `limit_ms`, the value of the limit `limit_name`.
    pub(crate) fn new(limit_name: &'static str, limit_ms: u64) -> Self {
        Self {
            used_ns: AtomicU64::new(0),
            slice_start_ns: AtomicU64::new(0),
            slice_exact: AtomicBool::new(false),
            limit_ns: AtomicU64::new(limit_ms.saturating_mul(1_000_000)),
            limit_name,
            limit_ms,
            heartbeat: None,
            tape: None,
        }
    }

    /// Measures a guest that is replayed. Where its time was up is recorded; a machine that is slower now gives it more time
    /// to get there.
    pub(crate) fn with_tape(mut self, tape: Option<Arc<Tape>>) -> Self {
        self.tape = tape;
        self
    }

    /// Tells somebody whenever the guest runs.
    pub(crate) fn with_heartbeat(mut self, heartbeat: Option<Arc<Heartbeat>>) -> Self {
        self.heartbeat = heartbeat;
        self
    }

    /// CPU time used so far, in microseconds.
    pub(crate) fn used_us(&self) -> u64 {
        self.used_ns.load(Ordering::Relaxed) / 1_000
    }

    /// What a guest that has used up its time is stopped with.
    pub(crate) fn exhausted(&self) -> Stop {
        Stop::limit(OutcomeKind::CpuLimit, self.limit_name, self.limit_ms)
    }

    /// Gives the guest a fresh allowance, for guests that live for more than one call.
    pub(crate) fn refill(&self) {
        let used = self.used_ns.load(Ordering::Relaxed);
        self.limit_ns.store(used.saturating_add(self.limit_ms.saturating_mul(1_000_000)), Ordering::Relaxed);
    }

    /// Called on an epoch tick, while the guest runs.
    pub(crate) fn tick(&self) -> Tick {
        let slice = self.slice_ns();
        let used = self.used_ns.load(Ordering::Relaxed).saturating_add(slice);
        let (limit_ns, factor) = match &self.tape {
            // The recorded guest did nothing more that could be compared.
            Some(tape) if tape.is_at_cut() => return Tick::Exhausted,
            Some(_) => (self.limit_ns.load(Ordering::Relaxed), REPLAY_CPU_FACTOR),
            None => (self.limit_ns.load(Ordering::Relaxed), 1),
        };
        if used >= limit_ns.saturating_mul(factor) {
            Tick::Exhausted
        } else if u128::from(slice) >= TICK.as_nanos() {
            Tick::Yield
        } else {
            Tick::Continue
        }
    }

    /// Polls a guest's future with the watch running.
    pub(crate) async fn guest<F: Future>(&self, future: F) -> F::Output {
        let mut future = pin!(future);
        poll_fn(|context| {
            self.start();
            let poll = future.as_mut().poll(context);
            self.stop();
            poll
        })
        .await
    }

    /// Polls a host's future, called from inside a guest's, with the watch stopped.
    pub(crate) async fn host<F: Future>(&self, future: F) -> F::Output {
        let mut future = pin!(future);
        poll_fn(|context| {
            self.stop();
            let poll = future.as_mut().poll(context);
            self.start();
            poll
        })
        .await
    }

    fn start(&self) {
        if let Some(heartbeat) = &self.heartbeat {
            heartbeat.beat();
        }
        let exact_after = EXACT_AFTER.as_nanos();
        // A guest with a small allowance is timed exactly from the start.
        let exact = u128::from(self.used_ns.load(Ordering::Relaxed)) >= exact_after
            || u128::from(self.limit_ms) * 1_000_000 <= 2 * exact_after;
        self.slice_exact.store(exact, Ordering::Relaxed);
        self.slice_start_ns.store(self.now_ns(), Ordering::Relaxed);
    }

    fn stop(&self) {
        self.used_ns.fetch_add(self.slice_ns(), Ordering::Relaxed);
    }

    /// Time of the current slice so far.
    fn slice_ns(&self) -> u64 {
        let slice = self.now_ns().saturating_sub(self.slice_start_ns.load(Ordering::Relaxed));
        if self.slice_exact.load(Ordering::Relaxed) {
            slice
        } else {
            slice.min(u64::try_from(WALL_SLICE_MAX.as_nanos()).unwrap_or(u64::MAX))
        }
    }

    /// A reading of the clock that the current slice is timed by. A slice never leaves its thread.
    fn now_ns(&self) -> u64 {
        if self.slice_exact.load(Ordering::Relaxed) { thread_cpu_ns() } else { wall_ns() }
    }
}

/// What to do on a tick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tick {
    /// Go on.
    Continue,
    /// Let others run.
    Yield,
    /// The limit is reached.
    Exhausted,
}

fn wall_ns() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    u64::try_from(START.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(unix)]
fn thread_cpu_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(not(unix))]
fn thread_cpu_ns() -> u64 {
    wall_ns()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn burn(duration: Duration) {
        let start = Instant::now();
        while start.elapsed() < duration {
            std::hint::spin_loop();
        }
    }

    fn burn_cpu(duration: Duration) {
        let start = thread_cpu_ns();
        while u128::from(thread_cpu_ns() - start) < duration.as_nanos() {
            std::hint::spin_loop();
        }
    }

    #[tokio::test]
    async fn host_time_is_free_and_guest_time_is_not() {
        let meter = Meter::new("guest_cpu_ms_max", 1_000);
        meter
            .guest(async {
                burn(Duration::from_millis(3));
                meter.host(async { burn(Duration::from_millis(40)) }).await;
                burn(Duration::from_millis(3));
            })
            .await;
        let used = meter.used_us();
        assert!((6_000..30_000).contains(&used), "{used} us");
    }

    #[tokio::test]
    async fn an_exhausted_meter_says_so_until_it_is_refilled() {
        let meter = Meter::new("guest_cpu_ms_max", 10);
        meter.guest(async { burn_cpu(Duration::from_millis(11)) }).await;
        meter.start();
        assert_eq!(meter.tick(), Tick::Exhausted);
        meter.refill();
        meter.start();
        assert_eq!(meter.tick(), Tick::Continue);
    }
}
