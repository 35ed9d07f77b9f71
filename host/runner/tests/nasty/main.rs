//! Guests that misbehave, beside guests that do not.
//!
//! Every case runs four rollouts of a nasty guest and a hundred healthy ones in one engine, one store and one runner. All
//! healthy ones must succeed; the nasty ones must end with the right outcome, the right limit and its value; the store must
//! say the same; and nothing may be left: no session, no file descriptor, no memory. Nothing here depends on time: a slow
//! machine makes the suite slower and no less certain.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unnecessary_wraps,
    reason = "a test that cannot go on has failed"
)]

mod agents;
mod bench;
mod case;
mod components;
mod limited;
mod measure;
mod plugins;
#[path = "../support/spec.rs"]
#[allow(unreachable_pub, reason = "shared with other suites")]
mod spec;
mod text;

use std::collections::BTreeSet;
use std::time::Instant;

use bench::{Bench, full};
use case::{Case, Expected};
use measure::Held;
use tokio::runtime::Runtime;

/// Rounds of one case. The first one warms up what is kept on purpose: the pool's slots, the allocator's free lists.
const ROUNDS: usize = 3;

/// Most that the last round of a case may leave on the heap beyond the first. What ends a round (tasks that are freed, a
/// thread that goes) may come a moment later; a leak of one KiB per attempt of the case or per healthy one beside it is more.
const HEAP_BYTES_MAX: i64 = 256 << 10;

/// Most by which resident memory may grow from the first round of a case to the last. The pool keeps up to 1.4 MiB of each
/// of its slots (memory, table, stack) and takes new slots as they come; the allocator cannot give back pages that it has
/// half used. Both come to 1 MiB in most cases and to 30 MiB in the worst; the memories of the eight guests of two rounds, at
/// their limit of 8 MiB, are 64 MiB.
const RESIDENT_BYTES_MAX: i64 = 48 << 20;

/// Most by which it may grow over all cases, for what is too small to see in one: it grows by 60 MiB, and 12 guests of every
/// case, with at least 300 KiB each, would be 450 MiB.
const RESIDENT_BYTES_MAX_OVERALL: i64 = 160 << 20;

fn cases() -> Vec<Case> {
    let mut cases = agents::cases();
    cases.extend(plugins::cases());
    cases.extend(components::cases());
    cases.extend(limited::cases());
    cases
}

#[test]
fn cases_have_names_of_their_own() {
    let names: BTreeSet<String> = cases().into_iter().map(|case| case.name).collect();
    assert_eq!(names.len(), cases().len());
}

#[test]
fn nasty_guests_end_as_they_should_and_leave_nothing_behind() {
    let only = std::env::var("FULGURITE_NASTY_CASE").unwrap_or_default();
    let (counted, plain): (Vec<Case>, Vec<Case>) =
        cases().into_iter().filter(|case| case.name.contains(&only)).partition(Case::counts_fuel);
    assert!(!(counted.is_empty() && plain.is_empty()), "no case is called {only:?}");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut failures = vec![];
    // One engine after the other: what the pool of the first keeps is given back before the second takes any.
    for (fuel, cases) in [(false, plain), (true, counted)] {
        if !cases.is_empty() {
            failures.extend(failures_of(&cases, &Bench::new(fuel), &runtime));
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// Runs cases in one engine and tells what is wrong.
fn failures_of(cases: &[Case], bench: &Bench, runtime: &Runtime) -> Vec<String> {
    let mut failures = vec![];
    let start = Instant::now();
    let (mut at_first, mut at_last) = (None, None);
    for case in cases {
        let plugins = match &case.expected {
            Expected::Refused { .. } => None,
            Expected::Ends { .. } => match bench.load(case) {
                Ok(plugins) => Some(plugins),
                Err(refusal) => {
                    failures.push(format!("{}: it was not loaded: {}", case.name, full(&refusal)));
                    continue;
                }
            },
        };
        let mut rounds = || {
            let mut held = vec![];
            for _ in 0..ROUNDS {
                if let Err(failure) = runtime.block_on(bench.round(case, plugins.as_ref())) {
                    failures.push(format!("{}: {failure}", case.name));
                }
                held.push(Held::now());
            }
            (held[0], held[ROUNDS - 1])
        };
        let (first, mut last) = rounds();
        let mut left = first.leaves(&last, HEAP_BYTES_MAX, RESIDENT_BYTES_MAX);
        if left.is_err() {
            // Pools and allocators fill once, and whichever case comes first pays for it; what leaks does so again.
            let again = rounds().1;
            left = last.leaves(&again, HEAP_BYTES_MAX, RESIDENT_BYTES_MAX);
            last = again;
        }
        println!("{:6.1} s {:<44} {last}", start.elapsed().as_secs_f64(), case.name);
        if let Err(left) = left {
            failures.push(format!("{}: {left}", case.name));
        }
        at_first.get_or_insert(last);
        at_last = Some(last);
    }
    if let (Some(first), Some(last)) = (at_first, at_last) {
        // Compiled components come and go with the cases: their descriptors and their heap were looked at case by case.
        let last = Held { descriptors: first.descriptors, heap_bytes: first.heap_bytes, ..last };
        if let Err(left) = first.leaves(&last, HEAP_BYTES_MAX, RESIDENT_BYTES_MAX_OVERALL) {
            failures.push(format!("all cases of an engine: {left}"));
        }
    }
    failures
}
