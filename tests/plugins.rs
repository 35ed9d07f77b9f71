//! `plugin new`, `build` and `plugin check`, as a new user goes through them.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use support::{Bench, component, root};

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

#[test]
fn check_tells_world_versions_imports_and_limits() {
    let bench = Bench::new();
    let shown = bench.succeed(&["plugin", "check", &component("rooms_agent")]).stdout;
    for text in ["agent", "0.1.0", "fulgurite:agent/llm", "guest_cpu_ms_max", "memory_bytes_max"] {
        assert!(shown.contains(text), "no {text:?} in\n{shown}");
    }
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
