//! Who may see what: an agent that looks everywhere finds nothing of its item's world and reference.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use support::{Bench, component};

#[test]
fn canaries_in_world_and_reference_never_reach_what_an_agent_can_see() {
    let bench = Bench::new();
    let (agent, grader) = (component("nasty_agent"), component("nasty_grader"));
    bench.write(
        "run.toml",
        &format!(
            "name = \"canary\"\n[agent]\ncomponent = \"{agent}\"\n[grader]\ncomponent = \"{grader}\"\n\
             [dataset.items]\ntest = \"test.jsonl\"\n[policy.scripted]\nreplies = [{{ text = \"{{{{ messages }}}}\" }}]\n\
             [evaluation]\ndataset = \"items\"\nsampled_rollouts = 3\ngreedy_rollouts = 3\n"
        ),
    );
    let item = |n: usize, behaviour: &str| {
        format!(
            "{{\"id\":\"{n}\",\"input\":{{\"behaviour\":\"{behaviour}\"}},\"world\":\"CANARY-WORLD\",\
             \"reference\":{{\"answer\":\"CANARY-REFERENCE\"}}}}\n"
        )
    };
    bench.write("test.jsonl", &(item(0, "reach") + &item(1, "healthy") + &item(2, "clocks")));
    let result = bench.succeed(&["run", "run.toml", "--run", "a", "--output", "json"]).json();
    // The grader got world and reference, or it could not have judged.
    assert!(result["evaluation"]["sampled"]["mean"].as_f64().unwrap() > 0.99, "{result}");
    for index in 0..3 {
        let id = format!("eval-scripted-sampled-00000-{index:04}");
        // Prompts, answers, logs, outcome: everything that crossed the agent's border.
        let shown = bench.succeed(&["rollouts", "show", &id, "--run", "a", "--output", "json"]).stdout;
        assert!(shown.len() > 500 && !shown.contains("CANARY"), "{shown}");
    }
}
