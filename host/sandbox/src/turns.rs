//! Whose turn it is in a replay.
//!
//! A tool goes on while its agent does something else, and what it asks of the host becomes an event when the answer is there.
//! In a replay answers of servers are there at once and those of databases take another time, so whoever has one waits until
//! the recording has come to it. The agent waits, too, when the recording has the event of a tool before its own next one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use fulgurite_core::id::SpanId;

/// A place in a replay: the number of the next event, and the id that a span would have that begins there. An agent that
/// begins something has moved on, too.
pub(crate) type Place = (u64, SpanId);

/// The tools of a replay that work on a call, and those of them that wait for their turn.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    working: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Where the replay was when those who wait last looked.
    place: Option<Place>,
    waiting: u64,
    wakers: Vec<Waker>,
    given_up: bool,
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A tool begins with a call, or has ended it.
    pub(crate) fn works(&self, works: bool) {
        if works {
            self.working.fetch_add(1, Ordering::Relaxed);
        } else {
            self.working.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Whether a tool works on a call.
    pub(crate) fn has_work(&self) -> bool {
        self.working.load(Ordering::Relaxed) > 0
    }

    /// Somebody has looked and it is not his turn at this place. He is woken when there is another event next; who begins
    /// something lets him look again.
    pub(crate) fn wait(&self, place: Place, looked_at: &mut Option<Place>, waker: &Waker) {
        let mut state = self.lock();
        if state.place != Some(place) {
            (state.place, state.waiting) = (Some(place), 0);
        }
        if looked_at.replace(place) != Some(place) {
            state.waiting += 1;
        }
        if !state.wakers.iter().any(|known| known.will_wake(waker)) {
            state.wakers.push(waker.clone());
        }
    }

    /// Another event is next.
    pub(crate) fn moved(&self) {
        if self.has_work() {
            let wakers = std::mem::take(&mut self.lock().wakers);
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    /// Whether all who work have found that it is not their turn at this place: then none of them goes on.
    pub(crate) fn all_wait(&self, place: Place) -> bool {
        let state = self.lock();
        self.has_work() && state.place == Some(place) && state.waiting >= self.working.load(Ordering::Relaxed)
    }

    /// The replay cannot go on as the recording did: nobody waits any longer, so that it shows where it differs.
    pub(crate) fn give_up(&self) {
        self.lock().given_up = true;
        self.moved();
    }

    pub(crate) fn given_up(&self) -> bool {
        self.lock().given_up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_is_counted_once_at_every_place() {
        let (turns, waker) = (Turns::default(), Waker::noop());
        let at = |event: u64, id: u64| (event, SpanId(id));
        assert!(!turns.all_wait(at(0, 1)), "nobody works");
        turns.works(true);
        turns.works(true);
        let (mut one, mut other) = (None, None);
        turns.wait(at(3, 1), &mut one, waker);
        turns.wait(at(3, 1), &mut one, waker);
        assert!(!turns.all_wait(at(3, 1)), "the other one works");
        turns.wait(at(3, 1), &mut other, waker);
        assert!(turns.all_wait(at(3, 1)) && !turns.all_wait(at(3, 2)) && !turns.all_wait(at(4, 1)));
        turns.wait(at(3, 2), &mut one, waker);
        assert!(!turns.all_wait(at(3, 2)), "the other one has not looked again");
        turns.works(false);
        assert!(turns.all_wait(at(3, 2)));
        turns.works(false);
        assert!(!turns.has_work() && !turns.all_wait(at(3, 2)));
    }
}
