//! `fulgurite replay`, `fulgurite fork` and what they leave behind, through the binary.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use fulgurite_core::id::ContentHash;
use serde_json::Value;
use support::{Bench, Finished, component};

/// Evaluates scripted answers to twelve items of the example, with its agent, tool and grader.
fn recorded() -> Bench {
    let bench = Bench::with_items(20, 20, 12);
    let config = bench.read("run.toml");
    let (head, _) = config.split_once("[dataset.demonstrations]").unwrap();
    let script = r#"
[policy.scripted]
replies = [
  { tool = "free_rooms", arguments = '{"time":"{{ match(messages[0].content, "\d\d:\d\d") }}"}' },
  { text = '{{ match(messages[-1].content, "R\d\d") }}' },
]
[evaluation]
dataset = "rooms"
sampled_rollouts = 12
greedy_rollouts = 12
"#;
    bench.write("run.toml", &format!("{head}{script}"));
    bench.succeed(&["run", "run.toml", "--run", "a", "--output", "json"]);
    bench
}

const FIRST: &str = "eval-scripted-sampled-00000-0000";

fn lines(finished: &Finished) -> Vec<Value> {
    finished.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_recorded_run_is_identical_and_says_so() {
    let bench = recorded();
    let all = bench.succeed(&["replay", "--all", "--run", "a"]);
    assert_eq!(all.stdout, "");
    assert!(all.stderr.contains("24 of 24 rollouts are identical"), "{}", all.stderr);
    let all = lines(&bench.succeed(&["replay", "--all", "--run", "a", "--output", "json"]));
    assert_eq!(all.len(), 24);
    assert!(
        all.iter()
            .all(|line| line["identical"] == true && line["divergence"].is_null() && line["events"] == line["same"])
    );
    let stage = [
        "replay",
        "--all",
        "--stage",
        "eval-scripted-greedy",
        "--training-step",
        "0",
        "--run",
        "a",
        "--output",
        "json",
    ];
    assert_eq!(lines(&bench.succeed(&stage)).len(), 12);

    let one = bench.succeed(&["replay", FIRST, "--run", "a"]);
    assert!(
        one.stdout.contains(&format!("{FIRST}/1: all ")) && one.stdout.contains("events are identical"),
        "{}",
        one.stdout
    );
    // Standard input is no terminal: nothing is waited for.
    let step = bench.succeed(&["replay", FIRST, "--step", "--run", "a"]).stdout;
    let calls: Vec<_> = step.lines().filter(|line| line.starts_with("event ")).collect();
    assert!(calls.len() > 4 && calls[0] == "event 0", "{step}");
    assert!(step.contains("llm call 1") && step.contains("tool free_rooms") && step.contains("reward"), "{step}");
    assert!(step.lines().last().unwrap().contains("identical"), "{step}");
}

#[test]
fn changed_components_are_shown_where_they_differ() {
    let bench = recorded();
    let nasty = component("nasty_agent");
    let changed = bench.run(&["replay", FIRST, "--agent", &nasty, "--run", "a"]);
    assert_eq!(changed.code, 1);
    assert!(changed.stdout.contains("diverges at event 0 of"), "{}", changed.stdout);
    assert!(changed.stdout.contains("recorded:") && changed.stdout.contains("replayed:"), "{}", changed.stdout);
    assert!(changed.stderr.contains("1 of 1 rollouts are not identical"), "{}", changed.stderr);
    let all = bench.run(&["replay", "--all", "--agent", &nasty, "--run", "a", "--output", "json"]);
    assert_eq!((all.code, lines(&all).len()), (1, 24));
    assert!(lines(&all).iter().all(|line| line["identical"] == false && line["divergence"]["event"] == 0));
    let step = bench.run(&["replay", FIRST, "--step", "--agent", &nasty, "--run", "a"]);
    assert_eq!(step.code, 1);
    assert!(step.stderr.contains("diverges at event 0"), "{}", step.stderr);

    // The same grader says the same; one that judges everything well changes the rest.
    let same = bench.succeed(&["replay", "--all", "--grader", &component("rooms_grader"), "--run", "a"]);
    assert!(same.stderr.contains("0 of 24 rewards change"), "{}", same.stderr);
    assert_eq!(same.stdout.lines().count(), 1, "only the head of the table: {}", same.stdout);
    let generous = component("nasty_grader");
    let other = bench.succeed(&["replay", "--all", "--grader", &generous, "--run", "a"]);
    let rows = other.stdout.lines().count() - 1;
    assert!(
        rows > 0 && other.stderr.contains(&format!("{rows} of 24 rewards change")),
        "{}\n{}",
        other.stdout,
        other.stderr
    );
    assert!(other.stderr.contains("1.0000 after; 0 faults"), "{}", other.stderr);
    let json = lines(&bench.succeed(&["replay", "--all", "--grader", &generous, "--run", "a", "--output", "json"]));
    assert_eq!(json.len(), 24);
    assert!(
        json.iter()
            .all(|line| line["after"][0]["value"] == 1.0 && line["before"].is_array() && line["fault"].is_null())
    );
    let none = bench.succeed(&["replay", FIRST, "--grader", &generous, "--dimension", "style", "--run", "a"]);
    assert!(none.stderr.contains("0 of 1 rewards change"), "{}", none.stderr);
}

#[test]
fn forks_are_rollouts_of_the_run_and_are_shown_whole() {
    let bench = recorded();
    let forks = lines(&bench.succeed(&["fork", FIRST, "--at", "1", "--count", "3", "--run", "a", "--output", "json"]));
    assert_eq!(forks.len(), 3);
    let at = forks[0]["fork_of"]["event"].as_u64().unwrap();
    assert!(at > 1);
    for (number, fork) in forks.iter().enumerate() {
        assert_eq!(fork["rollout"], format!("{FIRST}.1.{number}"));
        assert_eq!((&fork["fork_of"]["rollout"], &fork["outcome"]["kind"]), (&FIRST.into(), &"completed".into()));
    }
    let text = bench.succeed(&["fork", FIRST, "--at", "0", "--run", "a"]).stdout;
    assert!(text.contains(&format!("{FIRST}.0.0")) && text.contains("completed"), "{text}");
    // Forks of the same call add up.
    let more = lines(&bench.succeed(&["fork", FIRST, "--at", "1", "--run", "a", "--output", "json"]));
    assert_eq!(more[0]["rollout"], format!("{FIRST}.1.3"));

    let id = format!("{FIRST}.1.0");
    let shown = bench.succeed(&["rollouts", "show", &id, "--run", "a"]).stdout;
    assert!(shown.contains(&format!("fork of {FIRST} at event {at}, whose prefix is from policy v0")), "{shown}");
    assert!(shown.contains("llm call 0") && shown.contains("llm call 1"), "{shown}");
    let shown = bench.succeed(&["rollouts", "show", &id, "--run", "a", "--output", "json"]).json();
    let owners = |of: &str| shown["spans"].as_array().unwrap().iter().filter(|s| s["attempt"]["rollout"] == of).count();
    assert_eq!(owners(FIRST) as u64, at);
    assert_eq!(owners(&id) as u64, forks[0]["events"].as_u64().unwrap());
    bench.succeed(&["replay", &id, "--run", "a"]);
    let all = bench.succeed(&["replay", "--all", "--run", "a"]);
    assert!(all.stderr.contains("29 of 29 rollouts are identical"), "{}", all.stderr);

    for (arguments, says) in [
        (["fork", FIRST, "--at", "2", "--run", "a"], "there is no model call 2; it has 2"),
        (["fork", "nobody", "--at", "0", "--run", "a"], "there is no such rollout"),
    ] {
        let refused = bench.run(&arguments);
        assert_ne!(refused.code, 0);
        assert!(refused.stderr.contains(says), "{}", refused.stderr);
    }
}

/// What ran is looked up by its hash, so a file that has another one is refused, whatever it is.
#[test]
fn a_kept_component_that_is_not_what_ran_is_refused() {
    let bench = recorded();
    let kept = |name: &str| {
        let hash = ContentHash::of(&std::fs::read(component(name)).unwrap());
        bench.path().join("a/components").join(format!("{hash}.wasm"))
    };
    let replay = ["replay", "--all", "--run", "a"];
    let fork = ["fork", FIRST, "--at", "1", "--run", "a"];
    for (name, other) in
        [("rooms_agent", "nasty_agent"), ("rooms_grader", "nasty_grader"), ("rooms_tool", "nasty_tool")]
    {
        std::fs::copy(component(other), kept(name)).unwrap();
        for command in [&replay[..], &fork] {
            let refused = bench.run(command);
            assert_eq!(refused.code, 2, "{}\n{}", refused.stdout, refused.stderr);
            for text in
                [&*kept(name).file_name().unwrap().to_string_lossy(), "is not the component that ran", "replace it"]
            {
                assert!(refused.stderr.contains(text), "no {text:?} in {}", refused.stderr);
            }
        }
        // What is not run need not be what it was.
        if name == "rooms_grader" {
            bench.succeed(&["replay", "--all", "--grader", &component("rooms_grader"), "--run", "a"]);
        }
        // The fix that the message names.
        bench.succeed(&["run", "run.toml", "--run", "a"]);
        bench.succeed(&replay);
    }
    std::fs::remove_file(kept("rooms_tool")).unwrap();
    let refused = bench.run(&replay);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(refused.stderr.contains("cannot read the kept component"), "{}", refused.stderr);
    // The file that the config names is the one that ran.
    bench.succeed(&fork);
}

#[test]
fn a_fork_runs_what_its_ancestor_ran_whatever_the_config_names_now() {
    let bench = recorded();
    let config = bench.read("a/config.toml");
    let changed = ["agent", "grader", "tool"].into_iter().fold(config, |config, part| {
        let (from, to) = (component(&format!("rooms_{part}")), component(&format!("nasty_{part}")));
        assert!(config.contains(&from), "{config}");
        config.replace(&from, &to)
    });
    bench.write("a/config.toml", &changed);
    let forks = lines(&bench.succeed(&["fork", FIRST, "--at", "1", "--run", "a", "--output", "json"]));
    assert_eq!(forks[0]["outcome"]["kind"], "completed", "{forks:?}");
    bench.succeed(&["replay", forks[0]["rollout"].as_str().unwrap(), "--run", "a"]);
    bench.write("a/config.toml", &changed.replace("[tools.rooms]", "[tools.other]"));
    let refused = bench.run(&["fork", FIRST, "--at", "1", "--run", "a"]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(refused.stderr.contains("tools.rooms") && refused.stderr.contains("put it back"), "{}", refused.stderr);
}
