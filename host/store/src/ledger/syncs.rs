//! How long syncs take: a histogram with four buckets to each doubling, so that a percentile is exact to a fifth and
//! counting costs nothing.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::records::SyncStatistics;

/// Four to each doubling, up to about an hour.
const BUCKETS: usize = 32 * 4;

#[derive(Debug)]
struct Histogram {
    buckets: [u64; BUCKETS],
    syncs: u64,
    commits: u64,
    max_us: u64,
}

/// Counts syncs since the store was opened.
#[derive(Debug)]
pub(super) struct Syncs(Mutex<Histogram>);

impl Default for Syncs {
    fn default() -> Self {
        Self(Mutex::new(Histogram { buckets: [0; BUCKETS], syncs: 0, commits: 0, max_us: 0 }))
    }
}

/// Bucket of a time in microseconds: its power of two and the two bits behind the leading one.
fn bucket_of(us: u64) -> usize {
    let us = us.max(4);
    let power = us.ilog2();
    let quarter = (us >> (power - 2)) & 3;
    (usize::try_from(power * 4 + u32::try_from(quarter).unwrap_or(3)).unwrap_or(BUCKETS)).min(BUCKETS - 1)
}

/// Largest time in a bucket.
fn top_of(bucket: usize) -> u64 {
    let power = u32::try_from(bucket / 4).unwrap_or(0).max(2);
    let quarter = (bucket % 4) as u64;
    ((4 + quarter + 1) << (power - 2)) - 1
}

impl Syncs {
    /// One more sync, which covered so many commits.
    pub(super) fn add(&self, took: Duration, commits: u64) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let mut histogram = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = histogram.buckets.get_mut(bucket_of(us)) {
            *count += 1;
        }
        histogram.syncs += 1;
        histogram.commits += commits;
        histogram.max_us = histogram.max_us.max(us);
    }

    pub(super) fn statistics(&self) -> SyncStatistics {
        let histogram = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let percentile = |percent: u64| {
            let wanted = (histogram.syncs * percent).div_ceil(100);
            let mut seen = 0;
            let reached = histogram.buckets.iter().position(|count| {
                seen += count;
                seen >= wanted
            });
            reached.map_or(0, top_of).min(histogram.max_us)
        };
        SyncStatistics {
            syncs: histogram.syncs,
            commits: histogram.commits,
            p50_us: percentile(50),
            p99_us: percentile(99),
            max_us: histogram.max_us,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_ordered_and_hold_what_falls_into_them() {
        for us in (0..5_000).chain([1 << 20, (1 << 31) - 1]) {
            let bucket = bucket_of(us);
            assert!(us <= top_of(bucket), "{us}");
            assert!(bucket == bucket_of(0) || us > top_of(bucket - 1), "{us}");
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_exact_to_a_fifth() {
        let syncs = Syncs::default();
        for us in 1..=1_000 {
            syncs.add(Duration::from_micros(us), 2);
        }
        let got = syncs.statistics();
        assert_eq!((got.syncs, got.commits, got.max_us), (1_000, 2_000, 1_000));
        assert!((500..600).contains(&got.p50_us) && (990..=1_000).contains(&got.p99_us), "{got:?}");
    }
}
