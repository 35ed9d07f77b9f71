//! Models for agent roles through the binary: adapters and whole models that answer the calls of their roles, trained together or
//! one at a time.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support.rs"]
mod support;

use serde_json::Value;
use support::{Bench, component};

/// An agent that asks in two roles in one conversation: twice as `agent`, then as `planner`, then as `agent` again.
const TWO_ROLES: &str = r#""chat","chat",{"chat-as":"planner"},"chat""#;
/// A reward of each answer that differs from rollout to rollout, so that there is something to learn.
const DIFFERS: &str = r#"
[[reward.term]]
kind = "format"
pattern = '[0-9R]'
per = "call"
sum_into = "reward"
"#;
const TOKENIZER: &str = "[policy.local.tokenizer]";
const ADAPTERS: &str = r#"
[policy.local.roles]
agent = "answering"
planner = "planning"
[policy.local.lora]
rank = 4
alpha = 8.0
adapters = ["answering", "planning"]
"#;

fn bench(policy: &str) -> Bench {
    let bench = Bench::programmed(&[(TWO_ROLES, "{}"); 4], "learning_rate = 1e-3\nupdates_per_step = 2", DIFFERS);
    bench.replace(TOKENIZER, &format!("{policy}\n{TOKENIZER}"));
    // So that a run that is killed goes on inside of its stage, with moments of every model.
    bench.replace("[evaluation]", "[checkpoint]\nevery_steps = 1\n[evaluation]");
    bench
}

fn train(bench: &Bench, run: &str) -> Value {
    bench.succeed(&["train", "run.toml", "--run", run, "--output", "json"]).json()
}

fn rows(bench: &Bench, run: &str) -> Vec<Value> {
    bench.read(&format!("{run}/metrics.jsonl")).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Hash of a model's weights at a point of a run: the policy's own has no name.
fn hash(result: &Value, at: &str, model: &str) -> String {
    let report = if at == "initial" { &result["initial"] } else { &result["stages"][0] };
    let hash = if model == "policy" { &report["weights"] } else { &report["model_weights"][model] };
    hash.as_str().unwrap_or_else(|| panic!("no {model} in {report}")).to_owned()
}

fn file(bench: &Bench, name: &str) -> Vec<u8> {
    std::fs::read(bench.path().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn explain(bench: &Bench, run: &str, rollout: &str) -> Value {
    bench.succeed(&["explain", rollout, "--run", run, "--output", "json"]).json()
}

/// Trains the models of some roles alone, for so many steps.
fn alone(bench: &Bench, roles: &str, steps: usize, run: &str) -> Value {
    let config = bench.read("run.toml");
    let stage = format!("steps = {steps}\nagent_roles = {roles}");
    bench.write("run.toml", &config.replace("\nsteps = 2", &format!("\n{stage}")));
    let result = train(bench, run);
    bench.write("run.toml", &config);
    result
}

#[test]
fn adapters_of_two_roles_learn_together_and_one_at_a_time() {
    let bench = bench(ADAPTERS);
    let both = train(&bench, "both");
    for model in ["answering", "planning"] {
        assert_ne!(hash(&both, "initial", model), hash(&both, "grpo", model), "{model} has not learned");
    }
    // Nobody asks the policy's own adapter. The base is not even written: what stands under the adapters has one hash.
    assert_eq!(hash(&both, "initial", "policy"), hash(&both, "grpo", "policy"));
    let base = |at: &str| -> Value {
        serde_json::from_str::<Value>(&bench.read(&format!("both/policies/{at}/state.json"))).unwrap()["lora"]["base"]
            .clone()
    };
    assert!(base("initial").is_string() && base("initial") == base("grpo"));

    // With one selected the other keeps every byte.
    let planned = alone(&bench, "[\"planner\"]", 2, "planned");
    assert_ne!(hash(&planned, "initial", "planning"), hash(&planned, "grpo", "planning"));
    let adapter = |run: &str, at: &str, model: &str| {
        file(&bench, &format!("{run}/policies/{at}/adapters/{model}/adapter_model.safetensors"))
    };
    assert!(adapter("planned", "initial", "answering") == adapter("planned", "grpo", "answering"));
    assert!(adapter("planned", "initial", "planning") != adapter("planned", "grpo", "planning"));

    // One step from the same start: a model learns bit for bit the same, whether the other one is trained beside it or not. So
    // nothing that the other one drew is in its gradient, in its normalisers or in its moments.
    let together = alone(&bench, "[]", 1, "together");
    for (role, model) in [("[\"planner\"]", "planning"), ("[\"agent\"]", "answering")] {
        let single = alone(&bench, role, 1, &format!("single-{model}"));
        assert_ne!(hash(&together, "initial", model), hash(&together, "grpo", model));
        assert_eq!(hash(&together, "grpo", model), hash(&single, "grpo", model), "{model}");
    }

    // Metrics are told by model, and each has trained what its role drew: all of it, and no token more.
    let first = &rows(&bench, "both")[0]["scalars"];
    let (mut drawn, mut calls) = (std::collections::BTreeMap::<String, u64>::new(), 0);
    for number in 0..8 {
        let found = explain(&bench, "both", &format!("grpo-00000-{number:04}"));
        for call in found["calls"].as_array().unwrap() {
            let expected = if call["agent_role"] == "planner" { "planning" } else { "answering" };
            assert_eq!(call["model"], expected, "{call}");
            *drawn.entry(expected.to_owned()).or_default() += call["drawn_tokens"].as_u64().unwrap();
            calls += 1;
            assert!(!call["uses"].as_array().unwrap().is_empty(), "{call}");
            // Every update that used the call was one of its model.
            for used in call["uses"].as_array().unwrap() {
                let update =
                    found["updates"].as_array().unwrap().iter().find(|update| update["update"] == used["update"]);
                assert_eq!(update.unwrap()["model"], expected, "{found}");
            }
        }
    }
    assert_eq!((calls, drawn.len()), (32, 2));
    // The sampler and the trainer of each model are one: before the first of its steps their log-probs are the same bits.
    let updates = explain(&bench, "both", "grpo-00000-0000")["updates"].as_array().unwrap().clone();
    let first_ones = updates.iter().filter(|update| update["policy_version"] == 0);
    let agreed: Vec<_> =
        first_ones.map(|update| (update["model"].clone(), update["found"]["mismatch_max"].as_f64())).collect();
    assert_eq!(agreed, [("answering".into(), Some(0.0)), ("planning".into(), Some(0.0))]);
    for (model, tokens) in drawn {
        assert_eq!(first[format!("{model}/trained_tokens")].as_f64(), Some(tokens as f64), "{first}");
        for name in ["loss", "entropy", "gradient_norm", "learning_rate"] {
            assert!(first[format!("{model}/{name}")].is_number(), "{model}/{name} in {first}");
        }
        assert!(first[format!("host/{model}/entropy")].is_number() && first["host/entropy"].is_number());
        // Each counts its own versions, and what a step has drawn is new to it.
        assert_eq!(first[format!("host/{model}/staleness_max")].as_f64(), Some(0.0), "{first}");
    }
    assert!(first["loss"].is_null(), "the policy was not trained: {first}");
    let text = bench.succeed(&["explain", "grpo-00000-0000", "--run", "both"]).stdout;
    assert!(text.contains("call 2 (planner by planning)") && text.contains("forward-backward on answering"), "{text}");
}

#[test]
fn a_run_with_roles_repeats_on_any_number_of_threads_and_after_a_kill() {
    let bench = bench(ADAPTERS);
    bench.replace("\nsteps = 2", "\nsteps = 4");
    let config = bench.read("run.toml");
    let with = |threads: usize, live: usize, run: &str| {
        let model = format!("preset = \"tiny\"\nthreads = {threads}");
        let rollout = format!("[rollout]\nlive_max = {live}\n[rollout.sampling]");
        let changed = config.replace("preset = \"tiny\"", &model).replace("[rollout.sampling]", &rollout);
        bench.write("run.toml", &changed);
        let result = train(&bench, run);
        bench.write("run.toml", &config);
        result
    };
    let one = with(1, 1, "one");
    let two = with(2, 8, "two");
    assert_eq!(bench.read("one/metrics.jsonl"), bench.read("two/metrics.jsonl"));
    assert!(file(&bench, "one/trail.lz4") == file(&bench, "two/trail.lz4"), "the trails differ");
    let whole = train(&bench, "whole");
    // In the initial evaluation, and inside the stage.
    for lines in [1, 4] {
        let run = format!("killed-{lines}");
        bench.train_until(&run, lines);
        let resumed = bench.succeed(&["train", "run.toml", "--run", &run, "--resume", "--output", "json"]).json();
        assert_eq!(bench.read("whole/metrics.jsonl"), bench.read(&format!("{run}/metrics.jsonl")), "{run}");
        for result in [&one, &two, &resumed] {
            for model in ["policy", "answering", "planning"] {
                assert_eq!(hash(&whole, "grpo", model), hash(result, "grpo", model), "{model}");
            }
        }
        let state = |run: &str| bench.read(&format!("{run}/policies/grpo/state.json"));
        assert_eq!(state("whole"), state(&run));
        let moments = |run: &str| file(&bench, &format!("{run}/policies/grpo/adapters/planning/optimiser.safetensors"));
        assert!(moments("whole") == moments(&run));
    }

    // What was recorded says who drew it, and is played back without any model. Held-out rollouts and forks are answered likewise.
    bench.succeed(&["replay", "--all", "--run", "whole"]);
    let shown = |rollout: &str| bench.succeed(&["rollouts", "show", rollout, "--run", "whole"]).stdout;
    assert!(shown("grpo-00003-0000").contains("llm call 2 (planner by planning,"), "{}", shown("grpo-00003-0000"));
    assert!(shown("eval-grpo-sampled-00000-0000").contains("(agent by answering,"));
    bench.succeed(&["fork", "grpo-00003-0000", "--run", "whole", "--at", "2", "--count", "2"]);
    for number in 0..2 {
        let fork = shown(&format!("grpo-00003-0000.2.{number}"));
        assert!(fork.contains("llm call 2 (planner by planning,") && fork.contains("3 (agent by answering,"), "{fork}");
    }
    let found = bench.succeed(&[
        "run",
        "run.toml",
        "--run",
        "evaluated",
        "--policy",
        "whole/policies/grpo",
        "--output",
        "json",
    ]);
    assert!(found.stdout.contains("sampled"), "{}", found.stdout);
    // A role's adapter leaves the run as PEFT has it, by its name.
    bench.succeed(&["policy", "export", "whole", "--adapter", "planning", "--to", "exported"]);
    let trained = file(&bench, "whole/policies/grpo/adapters/planning/adapter_model.safetensors");
    assert!(file(&bench, "exported/adapter_model.safetensors") == trained);
}

#[test]
fn whole_models_of_roles_start_alike_and_go_their_own_ways() {
    let bench = bench("[policy.local.roles]\nplanner = \"planning\"");
    bench.replace("[policy.local.model]", "[policy.local]\nmodels = [\"planning\"]\n[policy.local.model]");
    let both = train(&bench, "both");
    assert_eq!(hash(&both, "initial", "policy"), hash(&both, "initial", "planning"));
    assert_ne!(hash(&both, "grpo", "policy"), hash(&both, "grpo", "planning"));
    for model in ["policy", "planning"] {
        assert_ne!(hash(&both, "initial", model), hash(&both, "grpo", model));
    }
    let first = &rows(&bench, "both")[0]["scalars"];
    assert!(first["loss"].is_number() && first["planning/loss"].is_number(), "{first}");

    let planned = alone(&bench, "[\"planner\"]", 2, "planned");
    assert_eq!(hash(&planned, "initial", "policy"), hash(&planned, "grpo", "policy"));
    let weights = |at: &str| file(&bench, &format!("planned/policies/{at}/model.safetensors"));
    assert!(weights("initial") == weights("grpo"));
    assert_ne!(hash(&planned, "initial", "planning"), hash(&planned, "grpo", "planning"));
    let together = alone(&bench, "[]", 1, "together");
    let single = alone(&bench, "[\"planner\"]", 1, "single");
    assert_eq!(hash(&together, "grpo", "planning"), hash(&single, "grpo", "planning"));

    bench.train_until("killed", 4);
    let resumed = bench.succeed(&["train", "run.toml", "--run", "killed", "--resume", "--output", "json"]).json();
    assert_eq!(bench.read("both/metrics.jsonl"), bench.read("killed/metrics.jsonl"));
    for model in ["policy", "planning"] {
        assert_eq!(hash(&both, "grpo", model), hash(&resumed, "grpo", model));
    }
    // Each is a model of its own outside of the run too.
    bench.succeed(&["policy", "export", "both", "--adapter", "planning", "--to", "planning"]);
    let described = bench.succeed(&["policy", "info", "planning", "--config", "run.toml", "--output", "json"]).json();
    let (plan, parameters) = (&described["memory"], described["parameters"].as_u64().unwrap());
    assert_eq!(plan["trained_parameters"].as_u64().unwrap(), 2 * parameters, "both models are trained: {plan}");
    assert_eq!(plan["trained_bytes"].as_u64().unwrap(), 4 * parameters);
}

#[test]
fn demonstrations_train_the_models_that_the_stage_names() {
    let bench = bench("[policy.local.roles]\nplanner = \"planning\"");
    bench.replace("[policy.local.model]", "[policy.local]\nmodels = [\"planning\", \"other\"]\n[policy.local.model]");
    let config = bench.read("run.toml");
    let (head, _) = config.split_once("[[stage]]").unwrap();
    let stage = |models: &str| {
        format!(
            "{head}[[stage]]\nname = \"sft\"\nalgorithm = \"{}\"\ndataset = \"demonstrations\"\ngrants = [\"read-reference\"]\n\
             [stage.config]\nsteps = 2\nbatch_size = 4\nmodels = {models}\n",
            component("sft")
        )
    };
    bench.write("run.toml", &stage("[\"policy\", \"planning\"]"));
    let result = train(&bench, "run");
    // The same start, the same demonstrations, optimisers alike: the same weights.
    assert_eq!(hash(&result, "sft", "policy"), hash(&result, "sft", "planning"));
    assert_ne!(hash(&result, "initial", "policy"), hash(&result, "sft", "policy"));
    assert_eq!(hash(&result, "initial", "other"), hash(&result, "sft", "other"));
    let first = &rows(&bench, "run")[0]["scalars"];
    assert!(first["cross_entropy"].is_number() && first["cross_entropy"] == first["planning/cross_entropy"], "{first}");
    bench.write("run.toml", &stage("[\"nobody\"]"));
    let refused = bench.run(&["train", "run.toml", "--run", "other"]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("`nobody`") && refused.stderr.contains("[policy.local]"), "{}", refused.stderr);
}

#[test]
fn an_algorithm_that_trains_a_model_on_what_another_drew_is_told_so() {
    let bench = bench(ADAPTERS);
    let config = bench.read("run.toml");
    let (head, _) = config.split_once("[[stage]]").unwrap();
    let stage = format!(
        "{head}[[stage]]\nname = \"all\"\nalgorithm = \"{}\"\ndataset = \"items\"\n[stage.config]\nbehaviour = \"forks\"\nsteps = 1\n",
        component("nasty_algorithm")
    );
    bench.write("run.toml", &stage);
    let refused = bench.run(&["train", "run.toml", "--run", "run"]);
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    let told = "was drawn by model `answering` for the agent role `agent` and cannot train the policy";
    assert!(refused.stderr.replace(['\n', '│', ' '], "").contains(&told.replace(' ', "")), "{}", refused.stderr);
}

#[test]
fn roles_that_make_no_sense_are_refused_with_file_field_and_fix() {
    let bench = bench("");
    let config = bench.read("run.toml");
    let lora = "[policy.local.lora]\nadapters = [\"planning\"]\n";
    for (section, expected) in [
        (
            format!("[policy.local.roles]\nplanner = \"other\"\n{lora}"),
            "`policy.local.lora.adapters`, which has planning",
        ),
        ("[policy.local.roles]\nplanner = \"planning\"\n".to_owned(), "`policy.local.models`, which is empty"),
        (format!("[policy.local.roles]\nplanner = \"policy\"\n{lora}"), "remove the line"),
        (format!("[policy.local.roles]\n\"\" = \"planning\"\n{lora}"), "is no role"),
        (format!("[policy.local]\nmodels = [\"a\"]\n{lora}"), "in `lora.adapters` instead"),
        (format!("[policy.local.roles]\nplanner = \"planning\"\nplanner = \"planning\"\n{lora}"), "duplicate"),
    ] {
        bench.write("run.toml", &config.replace(TOKENIZER, &format!("{section}{TOKENIZER}")));
        let refused = bench.run(&["train", "run.toml", "--run", "run"]);
        assert_eq!(refused.code, 2, "{section}: {}", refused.stderr);
        assert!(refused.stderr.contains("run.toml"), "{}", refused.stderr);
        assert!(refused.stderr.contains(expected), "{section}: {}", refused.stderr);
        assert!(!bench.path().join("run").exists());
    }
    bench.write("run.toml", &config.replace(TOKENIZER, &format!("[policy.local.roles]\nplanner = \"x\"\n{TOKENIZER}")));
    let refused = bench.run(&["train", "run.toml", "--run", "run"]);
    assert!(refused.stderr.contains("policy.local.roles.planner"), "{}", refused.stderr);
}
