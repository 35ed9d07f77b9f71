//! Independent jobs on some threads: what is done to every weight once a step.
//!
//! Jobs are cut by size alone and never share a sum, so the number of threads changes no bit.

use std::sync::{Mutex, PoisonError};

use crate::parameters::Values;

/// Values of one job: some milliseconds of a large model are cut into enough jobs for every core, and one is worth the lock
/// that hands it out.
pub(crate) const JOB_VALUES: usize = 1 << 16;

/// Runs all jobs on at most `threads` threads, the caller's among them.
pub(crate) fn each<T: Send>(threads: usize, jobs: Vec<T>, run: impl Fn(T) + Sync) {
    let threads = threads.min(jobs.len());
    let queue = Mutex::new(jobs.into_iter());
    let work = || {
        loop {
            let job = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(job) = job else { break };
            run(job);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
}

/// What `run` makes of each, in their order.
pub(crate) fn map<T: Send, U: Send>(threads: usize, all: Vec<T>, run: impl Fn(T) -> U + Sync) -> Vec<U> {
    let mut results: Vec<Option<U>> = all.iter().map(|_| None).collect();
    let jobs = all.into_iter().zip(&mut results).collect();
    each(threads, jobs, |(one, slot): (T, &mut Option<U>)| *slot = Some(run(one)));
    results.into_iter().flatten().collect()
}

/// Adds `parts` to `total`, value by value in their order. All have one layout.
pub(crate) fn add(threads: usize, total: &mut Values, parts: &[Values]) {
    let mut jobs = Vec::new();
    for (tensor, values) in total.iter_mut().enumerate() {
        for (chunk, slots) in values.chunks_mut(JOB_VALUES).enumerate() {
            jobs.push((tensor, chunk * JOB_VALUES, slots));
        }
    }
    each(threads, jobs, |(tensor, first, slots)| {
        // A stretch that stays in the nearest cache while all parts are added to it.
        for (at, slots) in (first..).step_by(STRETCH_VALUES).zip(slots.chunks_mut(STRETCH_VALUES)) {
            for part in parts {
                let values = part.get(tensor).and_then(|values| values.get(at..at + slots.len()));
                for (slot, value) in slots.iter_mut().zip(values.unwrap_or_default()) {
                    *slot += value;
                }
            }
        }
    });
}

/// Values added at a time: 8 KiB, a part of the smallest first-level cache.
const STRETCH_VALUES: usize = 1 << 11;

/// Sum of squares over all tensors, of chunks that depend on sizes alone.
pub(crate) fn sum_of_squares(threads: usize, values: &Values) -> f64 {
    let chunks: Vec<&[f32]> = values.iter().flat_map(|tensor| tensor.chunks(JOB_VALUES)).collect();
    map(threads, chunks, |chunk| {
        // In lanes: one sum would wait for itself at every value.
        let mut lanes = [0.0_f64; 8];
        let (whole, rest) = chunk.as_chunks::<8>();
        for values in whole {
            for (lane, value) in lanes.iter_mut().zip(values) {
                *lane += f64::from(*value) * f64::from(*value);
            }
        }
        let rest: f64 = rest.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
        lanes.iter().sum::<f64>() + rest
    })
    .iter()
    .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(seed: usize) -> Values {
        let value = |at: usize| ((at * 31 + seed * 17) % 997) as f32 / 499.0 - 1.0;
        [3, 0, 200_003, JOB_VALUES].iter().map(|len| (0..*len).map(value).collect()).collect()
    }

    #[test]
    fn threads_change_no_bit() {
        let parts: Vec<Values> = (1..5).map(values).collect();
        let start = values(0);
        let mut one = start.clone();
        add(1, &mut one, &parts);
        for (tensor, sums) in one.iter().enumerate() {
            for (at, sum) in sums.iter().enumerate() {
                let want = parts.iter().fold(start[tensor][at], |sum, part| sum + part[tensor][at]);
                assert_eq!(sum.to_bits(), want.to_bits());
            }
        }
        for threads in [2, 3, 16] {
            let mut many = start.clone();
            add(threads, &mut many, &parts);
            assert_eq!(many, one);
            assert_eq!(sum_of_squares(threads, &one).to_bits(), sum_of_squares(1, &one).to_bits());
        }
        let plain: f64 = one.iter().flatten().map(|value| f64::from(*value).powi(2)).sum();
        assert!((sum_of_squares(2, &one) / plain - 1.0).abs() < 1e-12);
    }

    #[test]
    fn results_stand_in_the_order_of_their_jobs() {
        let squares = map(3, (0..100_u64).collect(), |n| n * n);
        assert_eq!(squares, (0..100).map(|n| n * n).collect::<Vec<u64>>());
        assert!(map(3, Vec::<u64>::new(), |n| n).is_empty());
    }
}
