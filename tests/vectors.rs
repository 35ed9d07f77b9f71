//! Vectors through compiled components: an algorithm runs in the real sandbox, over rows, losses and normalisers of the real
//! trainer, on a policy whose log-probs are its parameters. What is checked are loss and d loss / d log-prob of every token.
//!
//! `vectors/losses.json` has settings of the host's loss (ALGORITHMS.md section 16, and more), `vectors/plugins/` whole
//! algorithms: add a file there, and it runs. Expected numbers were computed by a program of its own from the formulas, with
//! derivatives by differences; they agree with those that ALGORITHMS.md prints.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "vectors/case.rs"]
mod case;
#[path = "support.rs"]
mod support;
#[path = "vectors/table_host.rs"]
mod table_host;

use std::path::Path;
use std::sync::{Arc, LazyLock};

use case::{Case, Expected, LossVector, Variation};
use fulgurite_core::algorithm::{AlgorithmHost, StepResult};
use fulgurite_core::limits::Limits;
use fulgurite_policy::table::Layout;
use fulgurite_sandbox::{AlgorithmFault, Sandbox, SandboxSettings};
use serde::de::DeserializeOwned;
use support::{component, root};
use table_host::TableHost;

/// Steps after which a plugin of a vector must have ended.
const STEPS_MAX: usize = 64;

fn read<T: DeserializeOwned>(path: &Path) -> T {
    let text = std::fs::read_to_string(path).unwrap();
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The settings of the host's loss.
fn losses() -> Vec<Case> {
    read::<Vec<LossVector>>(&root().join("tests/vectors/losses.json")).into_iter().map(LossVector::case).collect()
}

/// The algorithms, by file.
fn plugins() -> Vec<Case> {
    let folder = std::fs::read_dir(root().join("tests/vectors/plugins")).unwrap();
    let mut files: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().flat_map(|file| read::<Vec<Case>>(file)).collect()
}

/// Runs a case to its end.
async fn run(case: &Case, variation: &Variation) -> Arc<TableHost> {
    static SANDBOX: LazyLock<Sandbox> = LazyLock::new(|| {
        let cache_dir = Some(root().join("target/test-cache"));
        Sandbox::new(SandboxSettings { cache_dir, ..SandboxSettings::default() }).unwrap()
    });
    let plugin = SANDBOX.load_algorithm(Path::new(&component(&case.component))).unwrap();
    let host = Arc::new(TableHost::new(case, variation));
    let host_side = Arc::clone(&host) as Arc<dyn AlgorithmHost>;
    let named = |error: AlgorithmFault| format!("{}: {error}", case.name);
    let started = plugin.start(case.config.to_string(), None, host_side, &Limits::default()).await;
    let mut instance = started.map_err(named).unwrap();
    for _ in 0..STEPS_MAX {
        if instance.step().await.map_err(named).unwrap() == StepResult::Done {
            return host;
        }
    }
    panic!("{}: it has not ended after {STEPS_MAX} steps", case.name);
}

/// Log-probs and weights are f32, and vectors are written with nine digits.
fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 2e-6 * b.abs().max(1.0)
}

fn check_list(case: &Case, what: &str, found: &[f64], expected: &[f64]) {
    let same = found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| close(*a, *b));
    assert!(same, "{}: {what}\n   found {found:?}\nexpected {expected:?}", case.name);
}

fn check(case: &Case, host: &TableHost) {
    let steps = host.policy_steps();
    assert!(steps.len() >= case.expected.len(), "{}: only {} optimiser steps", case.name, steps.len());
    let skipped = steps.len() - case.expected.len();
    for (step, Expected { loss, d_log_probs, d_entropies }) in steps.iter().skip(skipped).zip(&case.expected) {
        if let Some(loss) = loss {
            assert!(close(step.loss, *loss), "{}: loss {} instead of {loss}", case.name, step.loss);
        }
        check_list(case, "d loss / d log-prob", &step.d_log_probs, d_log_probs);
        if !d_entropies.is_empty() {
            check_list(case, "d loss / d entropy", &step.d_entropies, d_entropies);
        }
    }
    let values = host.value_steps();
    assert!(values.len() >= case.expected_values.len(), "{}: only {} steps of the critic", case.name, values.len());
    for (step, expected) in values.iter().skip(values.len() - case.expected_values.len()).zip(&case.expected_values) {
        check_list(case, "d loss / d value", &step.d_values, expected);
    }
    let scalars = host.scalars();
    for (name, expected) in &case.metrics {
        let found = scalars.get(name).unwrap_or_else(|| panic!("{}: no metric {name} in {scalars:?}", case.name));
        assert!(close(*found, *expected), "{}: {name} is {found} instead of {expected}", case.name);
    }
}

#[tokio::test]
async fn losses_and_their_derivatives_are_those_of_the_vectors() {
    let cases = losses();
    assert!(cases.len() >= 60, "{} vectors", cases.len());
    for case in &cases {
        check(case, &*run(case, &Variation::default()).await);
    }
}

#[tokio::test]
async fn algorithms_give_the_gradients_of_the_vectors() {
    for case in &plugins() {
        check(case, &*run(case, &Variation::default()).await);
    }
}

/// ALGORITHMS.md section 17, properties 2, 3 and 5.
#[tokio::test]
async fn rows_and_micro_batches_change_nothing() {
    let layout = |shards, micro_batch_tokens_max, pads| Layout { shards, micro_batch_tokens_max, pads };
    let plain = Variation::default();
    let variations = [
        Variation { layout: layout(1, 100_000, false), ..plain },
        Variation { layout: layout(8, 1, true), reverses: true, ..plain },
        Variation { layout: layout(3, 7, true), padding: 5, ..plain },
        Variation { merges: true, ..plain },
        Variation { merges: true, padding: 3, reverses: true, layout: layout(2, 9, true), ..plain },
        // What was not drawn: any log-prob will do.
        Variation { context_log_prob: -0.25, padding: 1, ..plain },
    ];
    let cases: Vec<Case> = losses().into_iter().chain(plugins()).filter(|case| case.rollouts.len() > 1).collect();
    assert!(cases.len() > 20);
    for case in &cases {
        for variation in &variations {
            check(case, &*run(case, variation).await);
        }
    }
}

/// A fork whose tokens are not trained on, because it was not graded, changes no bit of the gradient of what was rolled out from
/// the start: calls of its prefix are the ancestor's, and weigh what they weigh without it.
#[tokio::test]
async fn forking_without_added_weights_changes_no_gradient() {
    let forked = plugins().into_iter().find(|case| case.name.starts_with("trees whose forks were not graded")).unwrap();
    let mut plain = forked.clone();
    plain.rollouts.retain(|rollout| rollout.fork.is_none());
    plain.config["rounds"] = 0.into();
    let tokens: usize = plain.rollouts.iter().flat_map(|rollout| &rollout.calls).map(|call| call.log_probs.len()).sum();
    plain.tables.iter_mut().for_each(|table| table.truncate(tokens));
    let with = run(&forked, &Variation::default()).await.policy_steps();
    let without = run(&plain, &Variation::default()).await.policy_steps();
    assert!(!without.is_empty() && with.len() == without.len());
    for (with, without) in with.iter().zip(&without) {
        assert_eq!(with.loss.to_bits(), without.loss.to_bits());
        assert_eq!(with.d_log_probs[..tokens], without.d_log_probs[..]);
        assert!(with.d_log_probs.len() > tokens && with.d_log_probs[tokens..].iter().all(|slope| *slope == 0.0));
        assert!(without.d_log_probs.iter().any(|slope| *slope != 0.0));
    }
}
