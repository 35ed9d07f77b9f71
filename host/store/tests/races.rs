//! Who begins, who ends and who cancels at the same time: whatever the order, every rollout takes a legal way and ends once.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "support/ends.rs"]
mod ends;
#[path = "support/samples.rs"]
#[allow(dead_code, reason = "shared with tests that use more of it")]
mod samples;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use ends::finish;
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_core::state::RolloutState;
use fulgurite_store::{MemoryStore, RolloutQuery, RolloutStore, SledStore, StoreError};
use samples::{rollout_id, spec};

const ROLLOUTS: u64 = 1_500;

/// Begins and ends rollouts, unless somebody has cancelled them. Returns those whose end this thread was told is durable.
fn run_some(store: &dyn RolloutStore, runner: u64) -> BTreeSet<u64> {
    // Each has its own: beginning what another one runs would take it over.
    let mut order: Vec<u64> = (0..ROLLOUTS).filter(|index| index % 2 == runner).collect();
    Generator::new(Seed::new(runner)).shuffle(&mut order);
    let mut ended = BTreeSet::new();
    for chunk in order.chunks(40) {
        let mut begun = vec![];
        for index in chunk {
            match store.begin_attempt(&rollout_id(*index), 1, "") {
                Ok(attempt) => begun.push((*index, attempt.key)),
                Err(StoreError::RolloutEnded { .. }) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
        begun.retain(|(_, key)| match store.mark_running(key) {
            Ok(()) => true,
            Err(StoreError::AttemptEnded { .. }) => false,
            Err(other) => panic!("{other:?}"),
        });
        let results =
            store.finish_attempts(begun.iter().map(|(_, key)| finish(key, 0, 3, RolloutState::Succeeded)).collect());
        for ((index, _), result) in begun.into_iter().zip(results) {
            match result {
                Ok(()) => drop(ended.insert(index)),
                Err(StoreError::AttemptEnded { .. }) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
    }
    ended
}

fn races(store: &dyn RolloutStore) {
    store.enqueue((0..ROLLOUTS).map(spec).collect()).unwrap();
    let done = AtomicBool::new(false);
    let (ended, cancelled) = std::thread::scope(|scope| {
        let runners: Vec<_> = (0..2).map(|runner| scope.spawn(move || run_some(store, runner))).collect();
        let canceller = scope.spawn(|| {
            let (mut generator, mut cancelled) = (Generator::new(Seed::new(7)), BTreeSet::new());
            while !done.load(Ordering::Relaxed) {
                let index = generator.below(usize::try_from(ROLLOUTS).unwrap()) as u64;
                match store.cancel(&rollout_id(index), 5) {
                    Ok(record) => {
                        assert_eq!(record.state, RolloutState::Cancelled);
                        assert!(cancelled.insert(index), "{index} was cancelled twice");
                    }
                    Err(StoreError::RolloutEnded { .. }) => {}
                    Err(other) => panic!("{other:?}"),
                }
                // Whoever looks meanwhile sees sums that fit.
                assert_eq!(store.statistics().unwrap().rollouts_total(), ROLLOUTS);
            }
            cancelled
        });
        let ended: BTreeSet<u64> = runners.into_iter().flat_map(|runner| runner.join().unwrap()).collect();
        done.store(true, Ordering::Relaxed);
        (ended, canceller.join().unwrap())
    });
    assert!(ended.is_disjoint(&cancelled), "some ended and were cancelled");
    assert_eq!(ended.len() + cancelled.len(), usize::try_from(ROLLOUTS).unwrap());
    for rollout in store.rollouts(&RolloutQuery::default()).unwrap() {
        let attempts = store.attempts(&rollout.spec.id).unwrap();
        assert!(attempts.len() <= 1, "{} was run twice", rollout.spec.id);
        let expected = if rollout.state == RolloutState::Succeeded { 3 } else { 0 };
        assert_eq!(attempts.iter().map(|attempt| attempt.spans).sum::<u64>(), expected, "{}", rollout.spec.id);
    }
    let report = store.check(&mut |_| {}).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

#[test]
fn a_rollout_ends_once_whoever_comes_first() {
    races(&MemoryStore::new());
    let dir = tempfile::tempdir().unwrap();
    races(&SledStore::open(dir.path()).unwrap());
}
