//! The models that a config can offer beside the policy: a critic that learns values, and an adapter by its name. And the
//! derivatives that each of them takes.

use fulgurite_sdk::algorithm::policy::{self, Entry, Gradient, Loss, Model, OptimiserStep, Stream};
use fulgurite_sdk::algorithm::trajectories::{self, Message, Transition, TransitionId};
use fulgurite_sdk::algorithm::{AlgorithmError, HostError, metrics};
use fulgurite_sdk::{Role, json};

/// Steps of the critic's optimiser.
const UPDATES: usize = 30;
/// What every token is worth.
const VALUE: f32 = 0.5;

fn gradient(transition: &TransitionId) -> Gradient {
    Gradient { transition: transition.clone(), d_log_probs: vec![], d_entropies: vec![], d_values: vec![] }
}

/// Trains the critic, the policy's entropy and an adapter on demonstrations of its own.
pub(crate) fn step() -> Result<(), AlgorithmError> {
    let messages = |answer: &str| [Message::text(Role::User, "find a room"), Message::text(Role::Assistant, answer)];
    let import = |answer: &str| trajectories::import(&messages(answer), &[Role::Assistant], &json!({}));
    let held = [import("R07 is free")?, import("there is none")?];
    let ids: Vec<TransitionId> = held.iter().map(Transition::id).collect();
    let critic = Model::Named("critic".to_owned());

    let mut distances = vec![];
    for _ in 0..UPDATES {
        let found = policy::forward(&critic, &ids)?;
        let off = |value: &f32| value - VALUE;
        let all = found.iter().flat_map(|one| &one.values);
        distances.push(all.clone().map(|value| f64::from(off(value)).powi(2)).sum::<f64>() / all.count() as f64);
        let gradients: Vec<Gradient> = found
            .iter()
            .map(|one| Gradient { d_values: one.values.iter().map(off).collect(), ..gradient(&one.transition) })
            .collect();
        policy::backward(&critic, &gradients)?;
        policy::optimiser_step(&critic, &OptimiserStep::new(1e-3))?;
    }
    metrics::scalar("distance_first", distances.first().copied().unwrap_or(-1.0))?;
    metrics::scalar("distance_last", distances.last().copied().unwrap_or(-1.0))?;

    let before = policy::forward(&Model::Policy, &ids)?;
    let of_entropies: Vec<Gradient> = before
        .iter()
        .map(|one| Gradient { d_entropies: vec![1.0; one.entropies.len()], ..gradient(&one.transition) })
        .collect();
    policy::backward(&Model::Policy, &of_entropies)?;
    let stepped = policy::optimiser_step(&Model::Policy, &OptimiserStep::new(1e-3))?;
    let after = policy::forward(&Model::Policy, &ids)?;
    let entropy =
        |all: &[policy::Forward]| all.iter().flat_map(|one| &one.entropies).copied().map(f64::from).sum::<f64>();
    metrics::scalar("entropy_before", entropy(&before))?;
    metrics::scalar("entropy_after", entropy(&after))?;
    metrics::scalar("version", stepped.get("policy-version").unwrap_or(-1.0))?;

    let other = Model::Named("other".to_owned());
    let entries: Vec<Entry> = ids.iter().map(|id| Entry::new(id.clone(), Stream::Ce, 1.0)).collect();
    policy::forward_backward(&other, &entries, &Loss::new())?;
    policy::optimiser_step(&other, &OptimiserStep::new(1e-3))?;
    let sum = |model: &Model| -> Result<f64, HostError> {
        let all = policy::forward(model, &ids)?;
        Ok(all.iter().flat_map(|one| &one.log_probs).copied().map(f64::from).sum())
    };
    metrics::scalar(
        "other_gain",
        sum(&other)? - before.iter().flat_map(|one| &one.log_probs).copied().map(f64::from).sum::<f64>(),
    )?;

    let first = ids.first().ok_or_else(|| AlgorithmError::Other("nothing was imported".to_owned()))?;
    let values = Gradient { d_values: vec![1.0], ..gradient(first) };
    let entropies = Gradient { d_entropies: vec![1.0], ..gradient(first) };
    for (what, answer) in [
        ("values-of-policy", policy::backward(&Model::Policy, std::slice::from_ref(&values))),
        ("too-few-values", policy::backward(&critic, &[values])),
        ("entropies-of-critic", policy::backward(&critic, &[entropies])),
        ("loss-of-critic", policy::forward_backward(&critic, &entries, &Loss::new()).map(|_| ())),
        ("unknown-adapter", policy::forward(&Model::Named("nobody".to_owned()), &ids).map(|_| ())),
    ] {
        let answer = answer.err().map_or_else(|| "accepted".to_owned(), |error| format!("{error:?}"));
        metrics::note(&json!({"try": what, "answer": answer}).to_string())?;
    }
    Ok(())
}
