//! How often and how fast an endpoint is asked.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// Longest pause that the host chooses by itself. 30 s: by then a server that restarts is back.
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// Spaces requests evenly and bounds how many are under way. Waiting for a place costs no place, and a caller that gives up
/// while it waits leaves nothing behind but an unused turn.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Time between the beginnings of two requests.
    interval: Option<Duration>,
    /// When the next request may begin.
    next: Mutex<Option<Instant>>,
    places: Semaphore,
}

impl Pace {
    pub(crate) fn new(requests_per_minute_max: Option<u32>, concurrency_max: usize) -> Self {
        Self {
            interval: requests_per_minute_max.map(|requests| Duration::from_mins(1) / requests.max(1)),
            next: Mutex::new(None),
            places: Semaphore::new(concurrency_max.clamp(1, Semaphore::MAX_PERMITS)),
        }
    }

    /// Waits until a request may be sent. It counts as under way until what is returned is dropped.
    pub(crate) async fn place(&self) -> Option<SemaphorePermit<'_>> {
        // Never closed, so there is always a place in the end.
        let place = self.places.acquire().await.ok();
        if let Some(turn) = self.turn(Instant::now()) {
            tokio::time::sleep_until(turn).await;
        }
        place
    }

    /// Takes the next turn; `None` when nothing has to be waited for.
    fn turn(&self, now: Instant) -> Option<Instant> {
        let interval = self.interval?;
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = next.map_or(now, |next| next.max(now));
        *next = Some(turn + interval);
        Some(turn)
    }
}

/// Pause after so many failures: exponential, between half and all of it by `random`, so that callers that failed together
/// do not come back together ("equal jitter", Brooker, Exponential Backoff And Jitter, 2015).
pub(crate) fn backoff(base_ms: u64, failures: u32, random: u64) -> Duration {
    let most_ms = u64::try_from(BACKOFF_MAX.as_millis()).unwrap_or(u64::MAX);
    let whole_ms = base_ms.saturating_mul(1_u64.checked_shl(failures).unwrap_or(u64::MAX)).min(most_ms);
    let half_ms = whole_ms / 2;
    Duration::from_millis(half_ms + random % (whole_ms - half_ms + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_within_their_jitter_and_end_growing() {
        for failures in 0..70 {
            let whole = (100_u64 << failures.min(20)).min(30_000);
            for random in [0, 1, 12_345, u64::MAX] {
                let pause = backoff(100, failures, random).as_millis();
                assert!((u128::from(whole / 2)..=u128::from(whole)).contains(&pause), "{failures}: {pause}");
            }
        }
        assert_ne!(backoff(100, 3, 1), backoff(100, 3, 2));
        assert_eq!(backoff(0, 5, u64::MAX), Duration::ZERO);
    }

    #[test]
    fn turns_are_evenly_spaced_and_a_rest_is_not_saved_up() {
        let pace = Pace::new(Some(60), 1);
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let turns: Vec<_> = (0..3).filter_map(|_| pace.turn(start)).collect();
        assert_eq!(turns, [after(0), after(1), after(2)]);
        // Nobody asked for a while: the next two are a second apart again, not both at once.
        assert_eq!(pace.turn(after(10)), Some(after(10)));
        assert_eq!(pace.turn(after(10)), Some(after(11)));
        assert_eq!(Pace::new(None, 1).turn(start), None);
    }

    #[tokio::test]
    async fn only_so_many_are_under_way() {
        let pace = Pace::new(None, 2);
        let (first, _second) = (pace.place().await, pace.place().await);
        let mut third = Box::pin(pace.place());
        assert!(futures::poll!(&mut third).is_pending());
        drop(first);
        assert!(futures::poll!(&mut third).is_ready());
    }
}
