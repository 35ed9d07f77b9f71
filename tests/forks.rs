//! Forks that an algorithm asks for, through the binary: what they are for decides whether they are trained on, and what
//! they have from their ancestor is not theirs.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use serde_json::Value;
use support::{Bench, component};

/// A config whose algorithm forks. Its agent asks the policy three times, whatever that answers.
fn forking_run() -> Bench {
    let bench = Bench::with_items(20, 20, 2);
    let config = format!(
        r#"
name = "forks"
[agent]
component = "{agent}"
[grader]
component = "{grader}"
[dataset.work]
train = "work.jsonl"
val = "look.jsonl"
test = "held-out.jsonl"
[dataset.demonstrations]
train = "demonstrations.jsonl"
[policy.local.model]
preset = "tiny"
context_tokens_max = 256
[policy.local.tokenizer]
corpus = ["demonstrations"]
vocab_size = 384
[rollout.sampling]
max_tokens = 8
[evaluation]
dataset = "work"
sampled_rollouts = 2
greedy_rollouts = 2
[[stage]]
name = "forks"
algorithm = "{algorithm}"
dataset = "work"
[stage.config]
behaviour = "forks"
steps = 2
"#,
        agent = component("nasty_agent"),
        grader = component("nasty_grader"),
        algorithm = component("nasty_algorithm"),
    );
    bench.write("run.toml", &config);
    for (file, name, count) in [("work", "item", 8), ("look", "look", 2), ("held-out", "test", 2)] {
        let item = |number| {
            format!(
                "{{\"id\":\"{name}-{number}\",\"input\":{{\"behaviour\":\"work\"}},\"world\":{{}},\"reference\":{{}}}}\n"
            )
        };
        bench.write(&format!("{file}.jsonl"), &(0..count).map(item).collect::<String>());
    }
    bench
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The answer that the algorithm got when it tried something.
fn answer<'a>(notes: &'a [Value], tried: &str) -> (&'a str, &'a str) {
    let note = notes.iter().find(|note| note["try"] == tried).unwrap_or_else(|| panic!("no {tried} in {notes:?}"));
    (note["answer"].as_str().unwrap(), note["text"].as_str().unwrap())
}

#[track_caller]
fn same(found: f64, expected: f64) {
    assert!((found - expected).abs() < f64::EPSILON, "{found} is not {expected}");
}

#[test]
fn an_algorithm_estimates_with_forks_that_are_never_trained_on_and_trains_on_those_that_are() {
    let bench = forking_run();
    bench.succeed(&["train", "run.toml", "--run", "a"]);
    let steps = lines(&bench.read("a/metrics.jsonl"));
    assert_eq!(steps.len(), 2);
    let list =
        bench.succeed(&["rollouts", "list", "--run", "a", "--stage", "forks", "--limit", "1000", "--output", "json"]);
    let rollouts = lines(&list.stdout);
    for (number, step) in steps.iter().enumerate() {
        let notes: Vec<Value> = step["notes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|note| serde_json::from_str(note.as_str().unwrap()).unwrap())
            .collect();
        let scalar = |name: &str| step["scalars"][name].as_f64().unwrap_or_else(|| panic!("no {name} in {step}"));
        // The grader likes every rollout, so the value of every state is 1.
        same(scalar("value"), 1.0);

        for tried in ["val", "val-among-train", "val-backward"] {
            let (kind, text) = answer(&notes, tried);
            assert!(kind == "invalid-argument" && text.contains("never trained on"), "{tried}: {kind} {text}");
        }
        let (kind, text) = answer(&notes, "nothing-was-added");
        assert!(kind == "invalid-argument" && text.contains("gradient"), "{kind} {text}");
        let (kind, text) = answer(&notes, "train-fork-of-val");
        assert!(kind == "denied" && text.contains("split `val`"), "{kind} {text}");

        // Three calls, the first of them the ancestor's: two are the fork's own, and no third one can be named.
        for kind in ["val", "train"] {
            same(scalar(&format!("{kind}_calls")), 6.0);
            same(scalar(&format!("{kind}_first_call")), 1.0);
        }
        let (kind, text) = answer(&notes, "prefix-of-fork");
        assert!(kind == "unknown" && text.contains("/1/0"), "{kind} {text}");
        // Tokens of the prefix are context: every token with a weight was drawn by the fork.
        same(scalar("trained_tokens"), scalar("fork_tokens"));
        assert!(scalar("fork_tokens") > 0.0 && scalar("total_tokens") > scalar("trained_tokens"), "{step}");
        // Sampler and trainer have the same kernels and weights, and the host says so without the algorithm's doing.
        for (name, value) in [
            ("mismatch_mean", 0.0),
            ("mismatch_max", 0.0),
            ("ratio_mean", 1.0),
            ("ratio_max", 1.0),
            ("effective_sample_size", 1.0),
        ] {
            same(scalar(&format!("host/{name}")), value);
        }

        // Two updates a step: before the first the prefix was drawn, after it what follows.
        let prefix = 2 * number as u64;
        same(scalar("prefix_version"), prefix as f64);
        same(scalar("val_version_min"), (prefix + 1) as f64);
        same(scalar("train_version_min"), (prefix + 1) as f64);
        let place = notes.iter().find(|note| note.get("ancestor").is_some()).unwrap();
        let forks: Vec<&Value> = rollouts
            .iter()
            .map(|row| &row["rollout"]["spec"])
            .filter(|spec| spec["step"] == number && !spec["fork_of"].is_null())
            .collect();
        assert_eq!(forks.len(), 6);
        for spec in &forks {
            assert_eq!((&spec["fork_of"]["rollout"], &spec["fork_of"]["event"]), (&place["ancestor"], &place["event"]));
            assert_eq!(
                (&spec["fork_of"]["policy_version"], &spec["policy_version"]),
                (&prefix.into(), &(prefix + 1).into())
            );
        }
        assert_eq!(forks.iter().filter(|spec| spec["mode"] == "val").count(), 3);
    }
    // The refused fork left nothing behind, and forks repeat like everything else that is recorded.
    assert_eq!(rollouts.len(), 2 * (4 + 6 + 1));
    bench.succeed(&["replay", "--all", "--stage", "forks", "--run", "a"]);
    // From the command line a fork goes on with what its stage has learned, not with the config's random weights.
    let forked = bench.succeed(&["fork", "forks-00000-0000", "--run", "a", "--at", "1", "--output", "json"]);
    assert_eq!(lines(&forked.stdout)[0]["policy_version"], 2 * steps.len());
}

#[test]
fn estimates_and_prefixes_are_explained() {
    let bench = forking_run();
    bench.succeed(&["train", "run.toml", "--run", "run"]);
    let list =
        bench.succeed(&["rollouts", "list", "--run", "run", "--stage", "forks", "--limit", "1000", "--output", "json"]);
    let forks: Vec<Value> =
        lines(&list.stdout).into_iter().filter(|row| !row["rollout"]["spec"]["fork_of"].is_null()).collect();
    let (mut estimates, mut trained) = (0, 0);
    for fork in forks {
        let spec = &fork["rollout"]["spec"];
        let rollout = spec["id"].as_str().unwrap();
        let found = bench.succeed(&["explain", rollout, "--run", "run", "--output", "json"]).json();
        let codes: Vec<&str> =
            found["reasons"].as_array().unwrap().iter().map(|r| r["code"].as_str().unwrap()).collect();
        assert!(codes.contains(&"prefix"), "{found}");
        let used = !found["updates"].as_array().unwrap().is_empty();
        assert_eq!(codes.contains(&"estimate"), spec["mode"] == "val", "{found}");
        assert!(!(used && spec["mode"] == "val"), "{found}");
        estimates += usize::from(spec["mode"] == "val");
        trained += usize::from(used);
    }
    assert!(estimates > 0 && trained > 0, "{estimates} estimates, {trained} trained forks");
}

#[test]
fn a_run_that_forks_gives_the_same_bytes_again() {
    let bench = forking_run();
    bench.succeed(&["train", "run.toml", "--run", "a"]);
    bench.succeed(&["train", "run.toml", "--run", "b"]);
    assert_eq!(bench.read("a/metrics.jsonl"), bench.read("b/metrics.jsonl"));
}
