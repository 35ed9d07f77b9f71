//! `fulgurite bench policy`, as far as it does not depend on the machine's speed.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use std::io::Write as _;

use serde_json::Value;
use support::{Finished, root};

fn bench_policy(arguments: &[&str]) -> Finished {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_fulgurite"));
    command.args(["bench", "policy"]).args(arguments).current_dir(root());
    command.env("NO_COLOR", "1").env_remove("RUST_LOG");
    Finished::new(command.output().unwrap())
}

fn result<'a>(results: &'a Value, name: &str) -> &'a Value {
    let all = results["results"].as_array().unwrap();
    all.iter().find(|result| result["name"] == name).unwrap_or_else(|| panic!("no `{name}` in {results}"))
}

#[test]
fn sampling_and_training_agree_on_every_log_prob() {
    let finished = bench_policy(&["--shapes", "d128", "--only", "mismatch", "--output", "json"]);
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    let results = finished.json();
    let mismatch = result(&results, "mismatch d128");
    assert!(mismatch["tokens"].as_u64().unwrap() >= 10_000, "{mismatch}");
    for figure in ["mismatch_mean", "mismatch_max", "alone_among_100_max"] {
        assert_eq!(mismatch[figure].as_f64(), Some(0.0), "{mismatch}");
    }
    assert_eq!(results["setup"]["dtype"], "f32");
}

#[test]
fn a_baseline_is_asked_in_turns_and_its_faster_figure_counts() {
    // In the baseline's place: whatever it is asked, it did 1,000 tokens in a second, or 400 with one thread.
    let mut script = tempfile::NamedTempFile::new().unwrap();
    let text = "case \"$3\" in 2) tokens=1000;; *) tokens=400;; esac\n\
                while read -r line; do echo \"{\\\"tokens\\\": $tokens, \\\"seconds\\\": 1.0}\"; done\n";
    script.write_all(text.as_bytes()).unwrap();
    let path = script.path().to_str().unwrap();
    let finished = bench_policy(&[
        "--shapes",
        "d128",
        "--only",
        "train",
        "--seconds",
        "0.01",
        "--rounds",
        "2",
        "--baseline",
        "sh",
        "--script",
        path,
        "--output",
        "json",
    ]);
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    let results = finished.json();
    for name in ["train d128 32x64", "train d128 8x256"] {
        let row = result(&results, name);
        assert_eq!(row["baseline_tokens_per_second"]["1x2"].as_f64(), Some(1_000.0));
        assert_eq!(row["baseline_tokens_per_second"]["2x1"].as_f64(), Some(800.0), "two of 400");
        let own = row["tokens_per_second"].as_f64().unwrap();
        assert!(own > 0.0 && (row["ratio"].as_f64().unwrap() - own / 1_000.0).abs() < 1e-9, "{row}");
    }
}

#[test]
fn what_cannot_be_measured_is_refused_by_name() {
    for (arguments, code, text) in [
        (&["--shapes", "d1"][..], 2, "`--shapes d1` is none of d128, d384"),
        (&["--seconds", "0"], 2, "`--seconds` and `--rounds` must be above 0"),
        (&["--baseline", "sh", "--script", "no/such.py"], 2, "there is no baseline at `no/such.py`"),
        (&["--baseline", "/no/such/python"], 2, "cannot start the baseline with `/no/such/python`"),
        (&["--baseline", "true"], 1, "the packages of tests/baselines/requirements.txt"),
    ] {
        let finished = bench_policy(arguments);
        assert_eq!(finished.code, code, "{arguments:?} {}", finished.stderr);
        assert!(finished.stderr.contains(text), "{arguments:?} {}", finished.stderr);
    }
}
