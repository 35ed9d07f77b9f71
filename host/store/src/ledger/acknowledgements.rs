//! The order of writes, syncs and acknowledgements, under many threads.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};

use super::*;
use crate::key_value::{KeyRange, MemoryKeyValue, Visit};
use crate::samples::spec;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Event {
    /// These rollouts, by ordinal, are in the database.
    Applied(Vec<u64>),
    SyncStarted,
    SyncEnded,
    /// The caller has heard that this rollout, by ordinal, is safe.
    Acknowledged(u64),
}

/// A database that writes down what is asked of it.
#[derive(Default)]
struct Witness {
    inner: MemoryKeyValue,
    events: Mutex<Vec<Event>>,
    changed: Condvar,
    /// The first sync waits until so many batches were applied, so that there is something to share.
    batches_before_first_sync: usize,
    synced: AtomicBool,
}

impl Witness {
    fn saw(&self, event: Event) {
        self.events.lock().unwrap().push(event);
        self.changed.notify_all();
    }
}

impl KeyValue for Witness {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.inner.get(key)
    }

    fn scan(&self, range: &KeyRange, visit: Visit<'_>) -> Result<()> {
        self.inner.scan(range, visit)
    }

    fn apply(&self, batch: Batch) -> Result<()> {
        let ordinals = batch.iter().filter(|(key, _)| key[0] == b'r').map(|(key, _)| keys::number_at(key, 1).unwrap());
        let event = Event::Applied(ordinals.collect());
        self.inner.apply(batch)?;
        self.saw(event);
        Ok(())
    }

    fn sync(&self, _commits: u64) -> Result<()> {
        self.saw(Event::SyncStarted);
        if !self.synced.swap(true, Ordering::Relaxed) {
            let applied = |events: &mut Vec<Event>| {
                events.iter().filter(|event| matches!(event, Event::Applied(_))).count()
                    < self.batches_before_first_sync
            };
            drop(self.changed.wait_while(self.events.lock().unwrap(), applied).unwrap());
        }
        self.saw(Event::SyncEnded);
        Ok(())
    }

    fn check_complete(&self, _commits: u64) -> Result<()> {
        Ok(())
    }

    fn disk_bytes(&self) -> Result<Option<u64>> {
        Ok(None)
    }
}

#[test]
fn every_acknowledgement_follows_a_sync_that_began_after_its_write_and_threads_share_syncs() {
    const THREADS: u8 = 16;
    // What a new database begins with is a batch too.
    let witness = Witness { batches_before_first_sync: 1 + usize::from(THREADS), ..Witness::default() };
    let ledger = Ledger::empty(witness);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let ledger = &ledger;
            scope.spawn(move || {
                let ordinal = ledger.enqueue(vec![spec(thread.into())]).unwrap()[0].record().ordinal;
                ledger.database.saw(Event::Acknowledged(ordinal));
            });
        }
    });
    let events = ledger.database.events.lock().unwrap();
    let mut acknowledged = 0;
    for (at, event) in events.iter().enumerate() {
        let Event::Acknowledged(ordinal) = event else { continue };
        acknowledged += 1;
        let applied = events.iter().position(|event| matches!(event, Event::Applied(list) if list.contains(ordinal)));
        let begun = events.iter().skip(applied.unwrap()).position(|event| *event == Event::SyncStarted);
        let begun = applied.unwrap() + begun.unwrap();
        let ended = begun + events[begun..].iter().position(|event| *event == Event::SyncEnded).unwrap();
        assert!(ended < at, "rollout #{ordinal} was acknowledged at {at}: {events:?}");
    }
    assert_eq!(acknowledged, THREADS);
    // All but the first found their batch covered by one more sync, and perhaps all but the last one: between writing a batch
    // and counting it a thread is alone, but a sync may begin there.
    let syncs = events.iter().filter(|event| **event == Event::SyncEnded).count();
    assert!(syncs <= 3, "{syncs}");
    assert_eq!(ledger.syncs.statistics().commits, u64::from(THREADS));
}
