//! Watches all live attempts at once: ends those that are silent for too long and those that somebody wants ended.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use fulgurite_core::id::RolloutId;
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_sandbox::Heartbeat;
use tokio::sync::Notify;

/// How often the watchdog looks, and the granularity of its clock. 100 ms: ten thousand attempts are looked at in 0.1 ms.
const PERIOD: Duration = Duration::from_millis(100);

/// Why an attempt is ended from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Verdict {
    Cancelled = 1,
    Unresponsive = 2,
}

/// A live attempt as others see it.
#[derive(Debug)]
pub(crate) struct Life {
    heartbeat: Arc<Heartbeat>,
    heartbeat_ms_max: u64,
    verdict: AtomicU8,
    ended: Notify,
}

impl Life {
    /// Who the guest tells that it is alive.
    pub(crate) fn heartbeat(&self) -> Arc<Heartbeat> {
        Arc::clone(&self.heartbeat)
    }

    /// Ends the attempt: whoever runs it drops its sandbox. The first verdict counts.
    pub(crate) fn end(&self, verdict: Verdict) {
        let _ = self.verdict.compare_exchange(0, verdict as u8, Ordering::AcqRel, Ordering::Acquire);
        self.ended.notify_one();
    }

    /// Returns the outcome of an attempt that was ended from outside, once it is.
    pub(crate) async fn ended(&self) -> AttemptOutcome {
        loop {
            match self.verdict.load(Ordering::Acquire) {
                0 => self.ended.notified().await,
                verdict if verdict == Verdict::Unresponsive as u8 => {
                    let limit = self.heartbeat_ms_max;
                    return AttemptOutcome::limited(OutcomeKind::Unresponsive, "heartbeat_ms_max", limit);
                }
                _ => return AttemptOutcome::failed(OutcomeKind::Cancelled, "the rollout was cancelled"),
            }
        }
    }
}

/// The register of live attempts.
#[derive(Debug)]
pub(crate) struct Watchdog {
    start: Instant,
    now_ms: Arc<AtomicU64>,
    live: Mutex<HashMap<RolloutId, Arc<Life>>>,
}

/// An entry in the register; leaves it when dropped.
#[derive(Debug)]
pub(crate) struct Watched {
    watchdog: Arc<Watchdog>,
    rollout: RolloutId,
    pub(crate) life: Arc<Life>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut live = self.watchdog.lock();
        // A rollout's next attempt may have taken the place already.
        if live.get(&self.rollout).is_some_and(|life| Arc::ptr_eq(life, &self.life)) {
            live.remove(&self.rollout);
        }
    }
}

impl Watchdog {
    /// Starts watching. Must be called inside a tokio runtime. Ends when nobody holds the watchdog any more.
    pub(crate) fn start() -> Arc<Self> {
        let watchdog =
            Arc::new(Self { start: Instant::now(), now_ms: Arc::default(), live: Mutex::new(HashMap::new()) });
        let weak = Arc::downgrade(&watchdog);
        tokio::spawn(async move {
            let mut period = tokio::time::interval(PERIOD);
            period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                period.tick().await;
                let Some(watchdog) = Weak::upgrade(&weak) else { return };
                watchdog.look();
            }
        });
        watchdog
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RolloutId, Arc<Life>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches an attempt of a rollout until what is returned is dropped.
    pub(crate) fn watch(self: &Arc<Self>, rollout: &RolloutId, heartbeat_ms_max: u64) -> Watched {
        let heartbeat = Arc::new(Heartbeat::new(Arc::clone(&self.now_ms)));
        let life = Arc::new(Life { heartbeat, heartbeat_ms_max, verdict: AtomicU8::new(0), ended: Notify::new() });
        self.lock().insert(rollout.clone(), Arc::clone(&life));
        Watched { watchdog: Arc::clone(self), rollout: rollout.clone(), life }
    }

    /// Cancels a live attempt. Says whether there was one.
    pub(crate) fn cancel(&self, rollout: &RolloutId) -> bool {
        self.lock().get(rollout).is_some_and(|life| {
            life.end(Verdict::Cancelled);
            true
        })
    }

    /// Cancels all live attempts and says how many there were.
    pub(crate) fn cancel_all(&self) -> usize {
        let live = self.lock();
        #[expect(clippy::iter_over_hash_type, reason = "all of them are ended, in whatever order")]
        for life in live.values() {
            life.end(Verdict::Cancelled);
        }
        live.len()
    }

    /// Attempts that are alive.
    pub(crate) fn live(&self) -> usize {
        self.lock().len()
    }

    fn look(&self) {
        let now_ms = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.now_ms.store(now_ms, Ordering::Relaxed);
        self.look_at(now_ms);
    }

    fn look_at(&self, now_ms: u64) {
        #[expect(clippy::iter_over_hash_type, reason = "each is judged by itself")]
        for life in self.lock().values() {
            if life.heartbeat.silent_ms(now_ms) > life.heartbeat_ms_max {
                life.end(Verdict::Unresponsive);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn silence_ends_an_attempt_and_a_sign_of_life_does_not() {
        let watchdog = Watchdog::start();
        let (silent, loud) = (RolloutId::new("silent").unwrap(), RolloutId::new("loud").unwrap());
        let (silent, loud) = (watchdog.watch(&silent, 50_000), watchdog.watch(&loud, 50_000));
        watchdog.now_ms.store(50_000, Ordering::Relaxed);
        loud.life.heartbeat().beat();
        watchdog.look_at(50_001);
        let outcome = silent.life.ended().now_or_never().expect("it was silent");
        assert_eq!(outcome.kind, OutcomeKind::Unresponsive);
        assert_eq!(outcome.limit.map(|limit| limit.value), Some(50_000));
        assert!(loud.life.ended().now_or_never().is_none());
        drop(silent);
        assert_eq!(watchdog.live(), 1);
        assert!(watchdog.cancel(&RolloutId::new("loud").unwrap()));
        assert_eq!(loud.life.ended().await.kind, OutcomeKind::Cancelled);
        assert!(!watchdog.cancel(&RolloutId::new("silent").unwrap()));
    }
}
