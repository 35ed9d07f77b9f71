//! The learning smoke: does reward alone move the policy, on held-out items, by more than chance? Long runs with all seeds and
//! controls are `cargo xtask learn`.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use support::Bench;

#[test]
fn reward_alone_teaches_what_demonstrations_did_not() {
    let bench = Bench::with_items(4_000, 4_000, 300);
    bench.replace("steps = 6\nbatch_size = 16", "steps = 260\nbatch_size = 64");
    bench.replace("steps = 5\ngroups_per_step = 4\ngroup_size = 4", "steps = 40\ngroups_per_step = 16\ngroup_size = 8");
    bench.replace("sampled_rollouts = 24\ngreedy_rollouts = 24", "sampled_rollouts = 300\ngreedy_rollouts = 1");
    bench.replace("every_steps = 2", "every_steps = 50");
    let result = bench.succeed(&["train", "run.toml", "--run", "a", "--output", "json"]).json();
    let sampled = |stage: usize| result["stages"][stage]["held_out_sampled"].as_f64().unwrap();
    // The standard error of each mean is below 0.03; what is asked for is three times that of the difference.
    assert!(sampled(1) >= sampled(0) + 0.12, "{} -> {}", sampled(0), sampled(1));
    assert!(result["stages"][0]["malformed"].as_f64().unwrap() <= 0.05, "{result}");
    assert_eq!(result["stages"][1]["failed"], 0);
}
