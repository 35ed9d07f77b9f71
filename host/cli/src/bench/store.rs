//! `fulgurite bench store`: durable spans a second, beside the same spans in bare sled.

use fulgurite_store::{BenchmarkSettings, benchmark};

use crate::arguments::{BenchStoreArguments, Output};
use crate::bench::load::Scratch;
use crate::bench::setup;
use crate::failure::Failure;
use crate::{terminal, train};

pub(crate) fn bench(arguments: &BenchStoreArguments) -> Result<(), Failure> {
    let scratch = Scratch::new(arguments.scratch.as_deref().unwrap_or(&std::env::temp_dir()))?;
    let mut results = vec![];
    for span_bytes in &arguments.span_bytes {
        eprintln!("measuring spans of {span_bytes} bytes");
        let settings = BenchmarkSettings::of_span_bytes(*span_bytes);
        let folder = scratch.path().join(span_bytes.to_string());
        let report = benchmark(&folder, &settings).map_err(Failure::failed)?;
        let ratio = report.spans_per_second / report.sled_spans_per_second.max(1e-9);
        if arguments.output == Output::Text {
            terminal::print(&format!(
                "{span_bytes:>6} B: {:>9.0} durable spans/s, bare sled {:>9.0} ({ratio:.2}); flush p50 {} us, p99 {} us, \
                 longest {} us",
                report.spans_per_second,
                report.sled_spans_per_second,
                report.sync_p50_us,
                report.sync_p99_us,
                report.sync_max_us
            ));
        }
        results.push(serde_json::json!({
            "span_bytes": span_bytes,
            "spans": report.spans,
            "rollouts": settings.rollouts,
            "spans_per_second": report.spans_per_second,
            "sled_spans_per_second": report.sled_spans_per_second,
            "ratio": ratio,
            "flush_p50_us": report.sync_p50_us,
            "flush_p99_us": report.sync_p99_us,
            "disk_bytes": report.disk_bytes,
            "sled_disk_bytes": report.sled_disk_bytes,
        }));
    }
    if arguments.output == Output::Json {
        train::print_json(&serde_json::json!({ "setup": setup(1), "results": results }))?;
    }
    Ok(())
}
