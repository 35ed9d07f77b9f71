//! Measures the store on this machine's disk.
//!
//! `cargo run --release -p fulgurite-store --example store_throughput [DIR]`

use std::path::PathBuf;

use fulgurite_store::{BenchmarkSettings, benchmark};

/// What the binary uses.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let temporary = tempfile::tempdir()?;
    let dir = std::env::args().nth(1).map_or_else(|| temporary.path().to_owned(), PathBuf::from);
    for span_bytes in [320, 1_500] {
        let report = benchmark(&dir.join(span_bytes.to_string()), &BenchmarkSettings::of_span_bytes(span_bytes))?;
        println!(
            "{} spans of {:.0} B over 64 rollouts: {:.0} durable spans/s (bare sled {:.0}), sync p50 {} us, p99 {} us, longest {} us, {:.0} MB on disk (bare sled {:.0})",
            report.spans,
            report.span_bytes,
            report.spans_per_second,
            report.sled_spans_per_second,
            report.sync_p50_us,
            report.sync_p99_us,
            report.sync_max_us,
            report.disk_bytes as f64 / 1e6,
            report.sled_disk_bytes as f64 / 1e6,
        );
    }
    Ok(())
}
