//! Bad input through the binary: each gets an error that names the file, the field and the fix, or a typed outcome.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use support::{Bench, component};

#[test]
fn config_mistakes_name_the_place_and_the_fix() {
    let cases = [
        ("seed = 7", "sede = 7", 2, vec!["run.toml", "unknown field `sede`", "seed"]),
        ("corpus = [\"demonstrations\"]", "", 2, vec!["run.toml", "missing field `corpus`"]),
        (
            "dataset = \"rooms\"\nsampled",
            "dataset = \"room\"\nsampled",
            2,
            vec!["evaluation.dataset", "`room`", "rooms"],
        ),
        ("group_size = 4", "group_sise = 4", 2, vec!["grpo", "group_sise"]),
        ("vocab_size = 384", "vocab_size = \"many\"", 2, vec!["run.toml", "vocab_size"]),
        ("train = \"train.jsonl\"", "train = \"no.jsonl\"", 2, vec!["dataset.rooms.train", "no.jsonl"]),
        (
            "[[baseline]]",
            "[limits]\nmemory_bytes = 3\n[[baseline]]",
            2,
            vec!["unknown field `memory_bytes`", "memory_bytes_max"],
        ),
        (
            "[policy.local.tokenizer]",
            "[policy.local.model]\ndevice = \"cuda:200\"\n[policy.local.tokenizer]",
            2,
            vec!["`cuda:200` cannot be used", "cuda"],
        ),
        (
            "[policy.local.tokenizer]",
            "[policy.local.lora]\nrank = 0\n[policy.local.tokenizer]",
            2,
            vec!["lora.rank", "1 to 1024"],
        ),
        (
            "dataset = \"demonstrations\"",
            "dataset = \"demonstrations\"\nsampled_tokens_max = 0",
            2,
            vec!["stage.sft.sampled_tokens_max", "at least 1"],
        ),
    ];
    for (old, new, code, expected) in cases {
        let bench = Bench::new();
        bench.replace("steps = 6", "steps = 1");
        bench.replace(old, new);
        let finished = bench.run(&["train", "run.toml"]);
        assert_eq!(finished.code, code, "{new}: {}", finished.stderr);
        for text in expected {
            assert!(finished.stderr.contains(text), "{new}: no {text:?} in\n{}", finished.stderr);
        }
        assert!(finished.stdout.is_empty());
    }
    let missing = Bench::new().run(&["train", "nowhere.toml"]);
    assert_eq!(missing.code, 2);
    assert!(missing.stderr.contains("nowhere.toml"));
}

#[test]
fn files_that_are_no_components_are_refused_by_name() {
    let bench = Bench::new();
    bench.write("text.wasm", "this is not a component");
    let agent = component("rooms_agent");
    for (file, expected) in [("no.wasm", "no.wasm"), ("text.wasm", "text.wasm")] {
        bench.write("other.toml", &bench.read("run.toml").replace(&agent, file));
        let finished = bench.run(&["train", "other.toml", "--run", "x"]);
        assert_eq!(finished.code, 2, "{}", finished.stderr);
        assert!(finished.stderr.contains(expected), "{}", finished.stderr);
    }
    // A component, but of another world.
    bench.write("other.toml", &bench.read("run.toml").replace(&agent, &component("rooms_grader")));
    let finished = bench.run(&["train", "other.toml", "--run", "x"]);
    assert_eq!(finished.code, 2, "{}", finished.stderr);
    assert!(finished.stderr.contains("rooms_grader.wasm") && finished.stderr.contains("agent"), "{}", finished.stderr);
    let check = bench.run(&["plugin", "check", "text.wasm"]);
    assert_eq!(check.code, 2);
    assert!(check.stderr.contains("text.wasm"));
}

#[test]
fn dataset_mistakes_name_file_and_line() {
    let bench = Bench::new();
    bench.write("train.jsonl", "{\"id\":\"a\",\"input\":{\"request\":\"x\"}}\n{\"id\":\"b\"}\n");
    let finished = bench.run(&["train", "run.toml"]);
    assert_eq!(finished.code, 2, "{}", finished.stderr);
    assert!(finished.stderr.contains("train.jsonl` line 2: missing field `input`"), "{}", finished.stderr);
}

#[test]
fn a_grader_that_returns_nan_stops_training_with_a_typed_fault_and_loses_nothing() {
    let bench = Bench::new();
    bench.replace("steps = 6", "steps = 1");
    bench.replace(&component("rooms_grader"), &component("nasty_grader"));
    bench.replace(&component("rooms_agent"), &component("nasty_agent"));
    bench.replace("sampled_rollouts = 24\ngreedy_rollouts = 24", "sampled_rollouts = 4\ngreedy_rollouts = 4");
    // This agent asks once and returns the answer whatever it is; this grader does what the item's world says.
    let config = bench.read("run.toml");
    let (head, rest) = config.split_once("[tools.rooms]").unwrap();
    let (_, rest) = rest.split_once("[dataset.rooms]").unwrap();
    let (rest, _) = rest.split_once("[[baseline]]").unwrap();
    bench.write("run.toml", &format!("{head}[dataset.rooms]{rest}"));
    for split in ["train", "val", "test"] {
        let item = |n: usize| {
            format!("{{\"id\":\"{split}-{n}\",\"input\":{{\"behaviour\":\"healthy\"}},\"world\":\"nan\"}}\n")
        };
        bench.write(&format!("{split}.jsonl"), &(0..4).map(item).collect::<String>());
    }
    let finished = bench.run(&["train", "run.toml", "--run", "a"]);
    assert_eq!(finished.code, 1, "{}", finished.stderr);
    for text in ["grpo", "16 of 16", "grader-fault", "NaN"] {
        assert!(finished.stderr.contains(text), "no {text:?} in\n{}", finished.stderr);
    }
    // Every rollout is recorded with its outcome, and none has a reward.
    let list = bench.succeed(&["rollouts", "list", "--run", "a", "--stage", "grpo", "--output", "json"]);
    assert_eq!(list.stdout.lines().count(), 16);
    for line in list.stdout.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["attempt"]["outcome"]["kind"], "grader-fault", "{line}");
        assert_eq!(line["attempt"]["rewards"].as_array().unwrap().len(), 0, "{line}");
    }
}

#[test]
fn an_agent_that_loops_for_ever_is_an_outcome_that_names_the_limit() {
    let bench = Bench::new();
    let config = bench.read("run.toml");
    let (head, rest) = config.split_once("[policy.local.tokenizer]").unwrap();
    let (_, rest) = rest.split_once("[rollout.sampling]").unwrap();
    let (rest, _) = rest.split_once("[[stage]]").unwrap();
    let policy = "[policy.scripted]\nreplies = [{ text = \"x\" }]\n[rollout.sampling]";
    let (head, tail) = head.split_once("[tools.rooms]").unwrap();
    let (_, datasets) = tail.split_once("[dataset.rooms]").unwrap();
    let scripted = format!("{head}[dataset.rooms]{datasets}{policy}{rest}[limits]\nguest_cpu_ms_max = 50\n")
        .replace(&component("rooms_agent"), &component("nasty_agent"))
        .replace("sampled_rollouts = 24\ngreedy_rollouts = 24", "sampled_rollouts = 3\ngreedy_rollouts = 3");
    bench.write("run.toml", &scripted);
    bench.write("test.jsonl", "{\"id\":\"a\",\"input\":{\"behaviour\":\"loop\"}}\n");
    let result = bench.succeed(&["run", "run.toml", "--run", "a", "--output", "json"]).json();
    assert_eq!(result["evaluation"]["sampled"]["outcomes"]["cpu-limit"], 3, "{result}");
    let show = bench.succeed(&["rollouts", "show", "eval-scripted-sampled-00000-0000", "--run", "a"]).stdout;
    assert!(show.contains("guest_cpu_ms_max") && show.contains("50"), "{show}");
}

#[test]
fn what_is_asked_of_a_run_that_is_not_there_says_so() {
    let bench = Bench::new();
    let list = bench.run(&["rollouts", "list"]);
    assert_eq!(list.code, 2);
    assert!(list.stderr.contains("--run"), "{}", list.stderr);
    let resume = bench.run(&["train", "run.toml", "--resume"]);
    assert_eq!(resume.code, 2);
    assert!(resume.stderr.contains("without `--resume`"), "{}", resume.stderr);
}
