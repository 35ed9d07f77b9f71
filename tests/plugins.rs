//! `plugin new`, `build` and `plugin check`, as a new user goes through them.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use support::{Bench, DIFFERS, component, root};

#[test]
fn new_plugins_compile_and_say_what_they_are() {
    let bench = Bench::new();
    for kind in ["agent", "grader", "tool", "algorithm"] {
        let name = format!("my-{kind}");
        let made = bench.succeed(&["plugin", "new", "--kind", kind, &name]);
        assert_eq!(made.stdout.trim(), name);
        // One target folder for all four, so that the SDK is compiled once.
        let built =
            bench.command(&["build", &name]).env("CARGO_TARGET_DIR", root().join("target/new-plugins")).output();
        let built = built.unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let path = String::from_utf8(built.stdout).unwrap();
        let check = bench.succeed(&["plugin", "check", path.trim(), "--output", "json"]).json();
        assert!(check["worlds"].to_string().contains(kind), "{check}");
    }
    let again = bench.run(&["plugin", "new", "--kind", "agent", "my-agent"]);
    assert_eq!(again.code, 2);
    assert!(again.stderr.contains("is there already"), "{}", again.stderr);
    let bad = bench.run(&["plugin", "new", "--kind", "agent", "My Agent"]);
    assert_eq!(bad.code, 2);
    assert!(bad.stderr.contains("a-z"), "{}", bad.stderr);
}

/// The guide's algorithm is what `plugin new` writes, and learns as it says.
#[test]
fn the_algorithm_of_the_guide_is_the_one_that_is_written_and_it_trains() {
    let bench = Bench::with_items(60, 60, 8);
    bench.succeed(&["plugin", "new", "--kind", "algorithm", "my-algorithm"]);
    let guide = std::fs::read_to_string(root().join("algorithms/GUIDE.md")).unwrap();
    let (_, code) = guide.split_once("```rust\n").unwrap();
    let (code, _) = code.split_once("```\n").unwrap();
    assert_eq!(code, bench.read("my-algorithm/src/lib.rs"));
    assert!(code.split("#[cfg(test)]").next().unwrap().lines().count() <= 100, "it has grown");

    let mut build = bench.command(&["build", "my-algorithm"]);
    let built = build.env("CARGO_TARGET_DIR", root().join("target/new-plugins")).output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let component = String::from_utf8(built.stdout).unwrap();
    let bench = Bench::programmed(&[(r#""chat""#, "{}"); 4], "", DIFFERS);
    let config = bench.read("run.toml");
    let (head, _) = config.split_once("[[stage]]").unwrap();
    let stage = format!(
        "[[stage]]\nname = \"mine\"\nalgorithm = \"{}\"\ndataset = \"items\"\n[stage.config]\nsteps = 2\nrollouts_per_step = 8\n",
        component.trim()
    );
    bench.write("run.toml", &format!("{head}{stage}"));
    let result = bench.succeed(&["train", "run.toml", "--run", "a", "--output", "json"]).json();
    assert_eq!((&result["stages"][0]["steps"], &result["stages"][0]["rollouts"]), (&2.into(), &16.into()));
    let rows = bench.read("a/metrics.jsonl");
    let rows: Vec<serde_json::Value> = rows.lines().map(|row| serde_json::from_str(row).unwrap()).collect();
    let mine: Vec<_> = rows.iter().filter(|row| row["stage"] == "mine").map(|row| &row["scalars"]).collect();
    assert!(mine.iter().all(|scalars| scalars["reward_mean"].is_number()), "{mine:?}");
    // A step whose rewards are all equal trains nothing, and has no entropy to tell.
    assert!(mine.iter().any(|scalars| scalars["entropy"].as_f64().is_some_and(|entropy| entropy > 0.0)), "{mine:?}");
}

#[test]
fn check_tells_world_versions_imports_and_limits() {
    let bench = Bench::new();
    let shown = bench.succeed(&["plugin", "check", &component("rooms_agent")]).stdout;
    for text in ["agent", "0.1.0", "fulgurite:agent/llm", "guest_cpu_ms_max", "memory_bytes_max"] {
        assert!(shown.contains(text), "no {text:?} in\n{shown}");
    }
}

#[test]
fn check_tells_the_keys_of_an_algorithm_with_their_defaults() {
    let bench = Bench::new();
    let shown = bench.succeed(&["plugin", "check", &component("rloo")]).stdout;
    for text in ["config", "of rloo 0.1.0", "group_size = 8", "kl_target = (not set)", "algorithm_step_cpu_ms_max"] {
        assert!(shown.contains(text), "no {text:?} in\n{shown}");
    }
    let json = bench.succeed(&["plugin", "check", &component("rloo"), "--output", "json"]).json();
    assert_eq!(json["algorithm"]["defaults"]["group_size"], 8, "{json}");
    assert_eq!(
        bench.succeed(&["plugin", "check", &component("rooms_tool"), "--output", "json"]).json()["algorithm"],
        serde_json::Value::Null
    );
}

#[test]
fn building_what_is_no_crate_says_what_to_do() {
    let bench = Bench::new();
    let finished = bench.run(&["build", "nowhere"]);
    assert_eq!(finished.code, 2);
    assert!(finished.stderr.contains("plugin new"), "{}", finished.stderr);
}

#[test]
fn doctor_finds_what_this_machine_has() {
    let checks = Bench::new().run(&["doctor", "--output", "json"]).json();
    let ok = |name: &str| checks.as_array().unwrap().iter().any(|check| check["name"] == name && check["ok"] == true);
    // This machine compiled the test and the guests, so these three are here.
    assert!(ok("rust") && ok("guest target") && ok("C compiler"), "{checks}");
}
