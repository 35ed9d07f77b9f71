//! The benchmark measures what it says.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use fulgurite_store::{BenchmarkSettings, RolloutStore, SledStore, StoreError, benchmark};

#[test]
fn a_small_benchmark_stores_what_it_counts() {
    let dir = tempfile::tempdir().unwrap();
    for span_bytes in [320, 1_500] {
        let folder = dir.path().join(span_bytes.to_string());
        let settings = BenchmarkSettings { span_bytes, rollouts: 8, spans_per_commit: 16, commits: 12 };
        let report = benchmark(&folder, &settings).unwrap();
        assert_eq!((report.spans, settings.spans()), (1_536, 1_536));
        assert!((report.span_bytes - span_bytes as f64).abs() < span_bytes as f64 * 0.05, "{report:?}");
        assert!(report.spans_per_second > 0.0 && report.sled_spans_per_second > 0.0, "{report:?}");
        assert!(report.sync_p50_us <= report.sync_p99_us && report.sync_p99_us <= report.sync_max_us, "{report:?}");
        assert!(report.sync_max_us > 0 && report.disk_bytes > 0 && report.sled_disk_bytes > 0, "{report:?}");
        // It cannot be taken for a measurement of a store that is in use.
        let error = benchmark(&folder, &settings).unwrap_err();
        assert!(matches!(error, StoreError::NotEmpty { .. }), "{error}");
        let store = SledStore::open(&folder.join("store")).unwrap();
        assert_eq!(store.statistics().unwrap().spans, 1_536);
        assert!(store.check(&mut |_| {}).unwrap().is_sound());
    }
}
