//! `fulgurite explain` on real runs: what was trained on, with which weights, and why anything was not; and what the config can
//! say of rewards and of rollouts that are too long.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use serde_json::Value;
use support::{Bench, DIFFERS};

/// An agent that asks in two roles: for itself, two questions at once, the second of which is another prompt; and as
/// `planner`, until the context is full.
const TWO_ROLES: &str = r#""chat","start","start",{"finish":0},{"finish":0},{"chat-with":1.0}"#;
fn explain(bench: &Bench, rollout: &str) -> Value {
    bench.succeed(&["explain", rollout, "--run", "run", "--output", "json"]).json()
}

fn codes(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|reason| reason["code"].as_str().unwrap()).collect()
}

fn rows(bench: &Bench, run: &str) -> Vec<Value> {
    bench.read(&format!("{run}/metrics.jsonl")).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Numbers with a fraction as `#`: they depend on the processor's rounding.
fn without_fractions(text: &str) -> String {
    let mut clean = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
        let (before, from) = rest.split_at(at);
        let whole = from.find(|c: char| !c.is_ascii_digit()).unwrap_or(from.len());
        let after = &from[whole..];
        let fraction = after.strip_prefix('.').filter(|digits| digits.starts_with(|c: char| c.is_ascii_digit()));
        if let Some(digits) = fraction {
            clean.push_str(before.strip_suffix('-').unwrap_or(before));
            clean.push('#');
            rest = digits.trim_start_matches(|c: char| c.is_ascii_digit());
            if let Some(exponent) = rest.strip_prefix("e-").or_else(|| rest.strip_prefix('e')) {
                rest = exponent.trim_start_matches(|c: char| c.is_ascii_digit());
            }
        } else {
            clean.push_str(before);
            clean.push_str(&from[..whole]);
            rest = after;
        }
    }
    clean + rest
}

#[test]
fn two_roles_of_which_one_is_trained() {
    let bench = Bench::programmed(&[(TWO_ROLES, "{}"); 4], "agent_roles = [\"planner\"]", DIFFERS);
    bench.succeed(&["train", "run.toml", "--run", "run"]);
    let found = explain(&bench, "grpo-00000-0000");
    let calls = found["calls"].as_array().unwrap();
    assert_eq!(calls.len(), 4, "{found}");
    let trained: Vec<bool> = calls.iter().map(|call| !call["uses"].as_array().unwrap().is_empty()).collect();
    assert_eq!(trained, [false, false, false, true]);
    for call in calls.iter().filter(|call| call["agent_role"] != "planner") {
        assert_eq!(codes(&call["reasons"]), ["agent-role"]);
    }
    // The whole rollout's return is what the planner's call is weighted by: it, and not the role's own rewards, is compared.
    let used = &calls[3]["uses"][0];
    let totals: Vec<f64> =
        found["group_totals"].as_object().unwrap().values().map(|total| total.as_f64().unwrap()).collect();
    let mean = totals.iter().sum::<f64>() / 4.0;
    let deviation = (totals.iter().map(|total| (total - mean).powi(2)).sum::<f64>() / 3.0).sqrt();
    assert!(deviation > 0.0, "all rollouts earn {totals:?}");
    let advantage = (found["total"].as_f64().unwrap() - mean) / (deviation + 1e-4);
    assert!((used["weight"]["mean"].as_f64().unwrap() - advantage).abs() < 1e-6, "{used} {advantage}");
    // All that the planner drew is trained, behind its prompt, and nothing else is.
    let (prompt, drawn) = (calls[3]["prompt_tokens"].as_u64().unwrap(), calls[3]["drawn_tokens"].as_u64().unwrap());
    assert_eq!(used["trained"], serde_json::json!([[prompt, prompt + drawn]]));
    let tokens = rows(&bench, "run")[0]["scalars"]["trained_tokens"].as_f64().unwrap();
    let drawn_by_planners: u64 = (0..8)
        .map(|number| explain(&bench, &format!("grpo-00000-{number:04}"))["calls"][3]["drawn_tokens"].as_u64().unwrap())
        .sum();
    assert!((tokens - drawn_by_planners as f64).abs() < 0.5, "{tokens} {drawn_by_planners}");
    let text = bench.succeed(&["explain", "grpo-00000-0000", "--run", "run"]).stdout;
    assert!(text.contains("not trained: its agent role"), "{text}");
}

#[test]
fn a_rollout_is_explained_call_by_call() {
    let bench = Bench::programmed(&[(TWO_ROLES, "{}"); 4], "updates_per_step = 2", DIFFERS);
    bench.succeed(&["train", "run.toml", "--run", "run"]);
    let text = without_fractions(&bench.succeed(&["explain", "grpo-00000-0001", "--run", "run"]).stdout);
    // What was drawn, and every field of the loss, is not what this is about.
    let left_out = ["  => ", "    loss: ", "    found: "];
    let shown: Vec<&str> = text.lines().filter(|line| !left_out.iter().any(|start| line.starts_with(start))).collect();
    insta::assert_snapshot!(shown.join("\n"));
    assert!(text.contains("    loss: policy_loss.ppo.clip_low #") && text.contains("    found: loss #"), "{text}");
    let found = explain(&bench, "grpo-00000-0001");
    let mut keys: Vec<&String> = found.as_object().unwrap().keys().collect();
    keys.extend(found["calls"][0].as_object().unwrap().keys());
    keys.extend(found["calls"][0]["uses"][0].as_object().unwrap().keys());
    keys.extend(found["updates"][0].as_object().unwrap().keys());
    insta::assert_json_snapshot!(keys);
    // Both questions were asked before either was answered, so the second goes on in no row.
    let starts: Vec<&str> =
        found["calls"].as_array().unwrap().iter().map(|call| call["uses"][0]["row_start"].as_str().unwrap()).collect();
    assert!(starts[2].contains("on the prompt is not row 0"), "{starts:?}");
    // The second update uses the same entries, and is applied by the second optimiser step.
    let uses = found["calls"][0]["uses"].as_array().unwrap();
    assert_eq!((uses.len(), &uses[0]["weight"], &uses[1]["update"]), (2, &uses[1]["weight"], &1.into()));
    let versions: Vec<_> = found["updates"].as_array().unwrap().iter().map(|u| u["policy_version"].clone()).collect();
    assert_eq!(versions, [0, 1]);
    assert!(found["updates"][1]["optimiser"]["learning_rate"].is_number(), "{found}");

    // What the host gave is in the record, and a replay finds it again.
    let shown = bench.succeed(&["rollouts", "show", "grpo-00000-0001", "--run", "run"]).stdout;
    assert!(shown.contains("reward format") && shown.contains("from Host, call 3"), "{shown}");
    let replayed = bench.succeed(&["replay", "--all", "--run", "run", "--output", "json"]);
    assert!(!replayed.stdout.contains("\"divergence\":{"), "{}", replayed.stdout);
    // Held-out rollouts have the dimension, and no part of it in what is measured.
    let held_out = bench.succeed(&["rollouts", "show", "eval-grpo-sampled-00000-0000", "--run", "run"]).stdout;
    assert!(held_out.contains("reward format") && held_out.matches("reward reward").count() == 1, "{held_out}");
    assert_eq!(codes(&explain(&bench, "eval-grpo-sampled-00000-0000")["reasons"]), ["held-out"]);
    let unknown = bench.run(&["explain", "nobody", "--run", "run"]);
    assert_eq!(unknown.code, 2);
    assert!(unknown.stderr.contains("there is no rollout `nobody`"), "{}", unknown.stderr);
}

#[test]
fn what_was_not_trained_on_is_told_why() {
    // The second item's grader traps.
    let items = [(r#""chat""#, "{}"), (r#""chat""#, "\"trap\"")];
    let bench = Bench::programmed(&items, "", "");
    bench.replace("[rollout.sampling]", "[rollout]\nfault_share_max = 1.0\n[rollout.sampling]");
    bench.succeed(&["train", "run.toml", "--run", "run"]);
    let reasons: Vec<Vec<String>> = (0..8)
        .map(|number| {
            let found = explain(&bench, &format!("grpo-00000-{number:04}"));
            codes(&found["reasons"]).iter().map(ToString::to_string).collect()
        })
        .collect();
    assert_eq!(reasons.iter().filter(|codes| **codes == ["fault"]).count(), 4, "{reasons:?}");
    // The grader likes the others alike, so there is no advantage and no update.
    assert_eq!(reasons.iter().filter(|codes| **codes == ["zero-variance"]).count(), 4, "{reasons:?}");
    let metrics = &rows(&bench, "run")[0]["scalars"];
    assert_eq!((&metrics["host/excluded_share"], &metrics["host/zero_variance_share"]), (&0.5.into(), &1.0.into()));
    assert!(metrics["host/entropy"].is_null(), "{metrics}");
}

/// What the config alone can do to training: each of it is said of the calls or of the rollout.
#[test]
fn what_the_config_kept_out_of_training_is_told() {
    let reasons = |stage: &str, more: &str, sampling: &str| {
        let bench = Bench::programmed(&[(r#""chat","chat""#, "{}"); 2], stage, &format!("{DIFFERS}{more}"));
        bench.replace("max_tokens = 8", &format!("max_tokens = 8\n{sampling}"));
        bench.succeed(&["train", "run.toml", "--run", "run"]);
        let found = explain(&bench, "grpo-00000-0000");
        let of_calls: Vec<String> = found["calls"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|call| codes(&call["reasons"]).into_iter().map(str::to_owned).collect::<Vec<_>>())
            .collect();
        (codes(&found["reasons"]).join(" "), of_calls, found["updates"].as_array().unwrap().len())
    };
    // Sampling that drops tokens, without a record of what it kept.
    let (_, calls, updates) = reasons("zero_variance = \"drop\"", "", "top_k = 5");
    assert_eq!((calls, updates), (vec!["truncated-sampling".to_owned(); 2], 0));
    // Nobody rewards the dimension that the algorithm reads.
    let (rollout, _, updates) = reasons("zero_variance = \"drop\"\ndimension = \"elsewhere\"", "", "");
    assert_eq!((rollout.as_str(), updates), ("no-reward", 0));
    // Remarks on what was trained on all the same.
    let (rollout, calls, updates) = reasons("", "[experiment]\nshuffle_rewards = true\n", "");
    assert_eq!((rollout.as_str(), calls.len(), updates), ("shuffled-rewards", 0, 1));
    let (rollout, _, _) = reasons("", "[explain]\nentries_per_step_max = 1\n", "");
    assert!(rollout.contains("entries-left-out"), "{rollout}");
}

#[test]
fn forks_are_compared_with_their_tree() {
    let bench = Bench::programmed(&[(r#""chat","chat""#, "{}"); 4], "", DIFFERS);
    bench.replace(&support::component("grpo"), &support::component("tree_grpo"));
    bench.replace("group_size = 4", "group_size = 2\nrounds = 2");
    bench.succeed(&["train", "run.toml", "--run", "run"]);
    let first = rows(&bench, "run").swap_remove(0)["scalars"].clone();
    let found: Vec<Value> = (0..10_000)
        .take_while(|number| f64::from(*number) < first["rollouts_total"].as_f64().unwrap())
        .map(|number| explain(&bench, &format!("grpo-00000-{number:04}")))
        .collect();
    let mut flat = 0;
    for one in &found {
        // A tree is what the step rolled out for an item: two roots and their forks, each of which is compared with all.
        let of_item: std::collections::BTreeSet<&str> = found
            .iter()
            .filter(|other| other["item"] == one["item"])
            .map(|other| other["rollout"].as_str().unwrap())
            .collect();
        let totals = one["group_totals"].as_object().unwrap();
        assert!(totals.len() > 2, "{one}");
        assert_eq!(totals.keys().map(String::as_str).collect::<std::collections::BTreeSet<_>>(), of_item);
        let values: Vec<f64> = totals.values().filter_map(Value::as_f64).collect();
        flat += usize::from(values.iter().all(|value| (value - values[0]).abs() < 1e-12));
        assert!(!one.to_string().contains("a group of one"), "{one}");
    }
    let forks: Vec<&Value> = found.iter().filter(|one| codes(&one["reasons"]).contains(&"prefix")).collect();
    assert!(!forks.is_empty() && forks.len() < found.len(), "{found:?}");
    // The monitor counts the same groups.
    let share = first["host/zero_variance_share"].as_f64().unwrap();
    assert!((share - flat as f64 / found.len() as f64).abs() < 1e-9, "{share} {flat} of {}", found.len());
}

#[test]
fn calls_of_weights_that_are_too_old_say_so() {
    let bench = Bench::programmed(&[(r#""chat","chat""#, "{}"); 4], "lag_steps = 1\nstaleness_max = 0", DIFFERS);
    bench.succeed(&["train", "run.toml", "--run", "run"]);
    // The first step rolls out for the second as well, which finds those calls a version behind.
    let found: Vec<Value> = (0..16).map(|number| explain(&bench, &format!("grpo-00000-{number:04}"))).collect();
    let stale: Vec<&Value> = found.iter().filter(|one| codes(&one["reasons"]).contains(&"stale")).collect();
    assert_eq!(stale.len(), 8, "{found:?}");
    for one in stale {
        assert!(one["calls"].as_array().unwrap().iter().all(|call| codes(&call["reasons"]) == ["stale"]), "{one}");
        // Asked for by the first step, which kept it for the second.
        let given: Vec<&Value> = one["given"].as_array().unwrap().iter().map(|given| &given["step"]).collect();
        assert_eq!(given, [0, 1], "{one}");
    }
}

#[test]
fn rollouts_that_are_too_long_are_left_out_or_cut() {
    // One group has a call of up to 8 tokens, the other three of them.
    let items = [(r#""chat""#, "{}"), (r#""chat","chat","chat""#, "{}")];
    let bench = Bench::programmed(&items, "", DIFFERS);
    bench.succeed(&["train", "run.toml", "--run", "run"]);
    let row_tokens = |number: usize| {
        let found = explain(&bench, &format!("grpo-00000-{number:04}"));
        let calls = found["calls"].as_array().unwrap().clone();
        calls
            .iter()
            .map(|call| call["prompt_tokens"].as_u64().unwrap() + call["drawn_tokens"].as_u64().unwrap())
            .max()
            .unwrap()
    };
    let tokens: Vec<u64> = (0..8).map(row_tokens).collect();
    let most = tokens.iter().min().unwrap() + 10;
    let too_long = tokens.iter().filter(|tokens| **tokens > most).count();
    assert!(too_long >= 4, "{tokens:?}");
    let config = bench.read("run.toml");
    let with = |rule: &str, run: &str| {
        let rollout = format!("[rollout]\nrow_tokens_max = {most}\nrow_too_long = \"{rule}\"\n[rollout.sampling]");
        bench.write("run.toml", &config.replace("[rollout.sampling]", &rollout));
        bench.run(&["train", "run.toml", "--run", run])
    };
    std::fs::remove_dir_all(bench.path().join("run")).unwrap();
    let dropped = with("drop", "run");
    assert_eq!(dropped.code, 0, "{}", dropped.stderr);
    let first = &rows(&bench, "run")[0]["scalars"];
    assert_eq!(first["host/too_long_share"], too_long as f64 / 8.0);
    assert_eq!(first["excluded_share"], first["host/too_long_share"], "the algorithm leaves out the same ones");
    let long = tokens.iter().position(|tokens| *tokens > most).unwrap();
    let found = explain(&bench, &format!("grpo-00000-{long:04}"));
    assert_eq!((codes(&found["reasons"]), found["updates"].as_array().unwrap().len()), (vec!["too-long"], 0));
    assert_eq!(found["given"][0]["given_as"], "too-long");

    std::fs::remove_dir_all(bench.path().join("run")).unwrap();
    let truncated = with("truncate", "run");
    assert_eq!(truncated.code, 0, "{}", truncated.stderr);
    let first = &rows(&bench, "run")[0]["scalars"];
    assert_eq!((&first["host/too_long_share"], &first["excluded_share"]), (&0.0.into(), &0.0.into()));
    let found = explain(&bench, &format!("grpo-00000-{long:04}"));
    assert_eq!(codes(&found["reasons"]), ["truncated"]);
    let used = found["calls"][0]["uses"][0]["trained"].as_array().unwrap();
    assert!(used.iter().all(|range| range[1].as_u64().unwrap() <= most), "{found}");
    assert_eq!(codes(&found["calls"][2]["reasons"]), ["beyond-row"]);

    let stopped = with("stop", "stopped");
    assert_eq!(stopped.code, 1);
    assert!(stopped.stderr.contains("`rollout.row_tokens_max`"), "{}", stopped.stderr);
}

#[test]
fn rewards_belong_to_the_calls_that_the_config_says() {
    let more =
        format!("{DIFFERS}[reward.attach]\ndefault = \"final\"\n[reward.attach.dimensions]\nformat = \"per-call\"\n");
    let bench = Bench::programmed(&[(r#""chat","chat""#, "{}"); 2], "", &more);
    bench.succeed(&["train", "run.toml", "--run", "run"]);
    let found = explain(&bench, "grpo-00000-0000");
    let places: Vec<(String, Option<u64>, String)> = found["rewards"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| {
            (
                r["dimension"].as_str().unwrap().to_owned(),
                r["attached_to"].as_u64(),
                r["rule"].as_str().unwrap().to_owned(),
            )
        })
        .collect();
    let at = |dimension: &str, call, rule: &str| (dimension.to_owned(), Some(call), rule.to_owned());
    let expected = [
        at("reward", 1, "final"),
        at("format", 0, "per-call"),
        at("reward", 1, "final"),
        at("format", 1, "per-call"),
        at("reward", 1, "final"),
    ];
    assert_eq!(places, expected);
    bench.write("run.toml", &bench.read("run.toml").replace("\"final\"", "\"last\""));
    let refused = bench.run(&["train", "run.toml", "--run", "other"]);
    assert_eq!(refused.code, 2);
    assert!(refused.stderr.contains("first-occurrence"), "{}", refused.stderr);
    bench.write(
        "run.toml",
        &bench.read("run.toml").replace("\"last\"", "\"final\"").replace("kind = \"format\"", "kind = \"length\""),
    );
    let refused = bench.run(&["train", "run.toml", "--run", "other"]);
    assert_eq!(refused.code, 2);
    assert!(refused.stderr.contains("`reward.term[0].pattern`"), "{}", refused.stderr);
}

#[test]
fn the_trail_is_the_same_for_one_seed_and_after_a_kill() {
    let bench = Bench::programmed(&[(TWO_ROLES, "{}"); 4], "", DIFFERS);
    bench.replace("\nsteps = 2", "\nsteps = 6");
    bench.succeed(&["train", "run.toml", "--run", "run"]);
    let trail = |run: &str| std::fs::read(bench.path().join(run).join("trail.lz4")).unwrap();
    bench.train_until("killed", 4);
    bench.succeed(&["train", "run.toml", "--run", "killed", "--resume"]);
    assert!(trail("run") == trail("killed"), "the trails differ");
    assert_eq!(bench.read("run/metrics.jsonl"), bench.read("killed/metrics.jsonl"));
    // Without it, explain says what it lacks.
    bench.write("run.toml", &format!("{}[explain]\nrecord = false\n", bench.read("run.toml")));
    std::fs::remove_dir_all(bench.path().join("run")).unwrap();
    bench.succeed(&["train", "run.toml", "--run", "run"]);
    assert_eq!(trail("run").len(), 0);
    assert_eq!(codes(&explain(&bench, "grpo-00000-0000")["reasons"]), ["no-trail"]);
}
