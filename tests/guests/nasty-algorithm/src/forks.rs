//! Forks through the algorithm world: to estimate the value of a state, in mode `val`, and to train, in mode `train`. What the
//! host answers is noted, for a test to read.

use fulgurite_sdk::algorithm::policy::{self, Entry, Gradient, Loss, Model, Numbers, OptimiserStep, Stream};
use fulgurite_sdk::algorithm::rollouts::{self, Group, Split};
use fulgurite_sdk::algorithm::trajectories::{Trajectory, Transition, TransitionId};
use fulgurite_sdk::algorithm::{AlgorithmError, HostError, metrics};
use fulgurite_sdk::{Mode, json};

/// Forks of one kind.
const FORKS: u32 = 3;

/// Rolls out, trains, forks what it rolled out before the training, and tries to train on every kind of fork.
pub(crate) fn step() -> Result<(), AlgorithmError> {
    let items = rollouts::next_items(Split::Train, 2)?;
    let groups: Vec<Group> = items.iter().map(|item| Group::new(item.id(), 2)).collect();
    let ended = rollouts::enqueue(&groups)?.await_all(None)?;
    // So that those who draw what follows a fork are not those who drew what comes before it.
    train(&ids(&calls(&ended)))?;
    optimise()?;
    let Some(ancestor) = ended.first() else { return Err(missing("rollout")) };
    let of_ancestor = ancestor.transitions();
    let [first, second, ..] = of_ancestor.as_slice() else { return Err(missing("second call")) };
    let fork = |mode| Group::new(ancestor.item_id(), FORKS).mode(mode).fork_of(ancestor.rollout_id(), second.event());
    let forks = rollouts::enqueue(&[fork(Mode::Val), fork(Mode::Train)])?.await_all(None)?;
    let (estimates, trained): (Vec<Trajectory>, Vec<Trajectory>) =
        forks.into_iter().partition(|fork| fork.group() == 0);
    metrics::note(&json!({"ancestor": ancestor.rollout_id().0, "event": second.event()}).to_string())?;
    let rewards: Vec<f64> = estimates.iter().filter_map(|fork| fork.total("reward")).collect();
    metrics::scalar("value", rewards.iter().sum::<f64>() / rewards.len() as f64)?;

    let (of_estimates, of_trained) = (calls(&estimates), calls(&trained));
    metrics::scalar("prefix_version", first.policy_version() as f64)?;
    for (name, calls) in [("val", &of_estimates), ("train", &of_trained)] {
        metrics::scalar(&format!("{name}_calls"), calls.len() as f64)?;
        let (indices, versions) =
            (calls.iter().map(Transition::call_index), calls.iter().map(Transition::policy_version));
        metrics::scalar(&format!("{name}_first_call"), indices.min().unwrap_or(0) as f64)?;
        metrics::scalar(&format!("{name}_version_min"), versions.min().unwrap_or(0) as f64)?;
    }

    // No verb that trains takes an estimate: not alone, not hidden among others, and nothing of the batch is kept.
    let good = ids(&of_trained);
    let Some((estimate, drawn)) = of_estimates.first().map(|call| (call.id(), call.completion_tokens())) else {
        return Err(missing("estimate"));
    };
    refused("val", train(std::slice::from_ref(&estimate)))?;
    refused("val-among-train", train(&[good.clone(), vec![estimate.clone()]].concat()))?;
    let gradient = Gradient {
        transition: estimate,
        d_log_probs: vec![0.5; drawn as usize],
        d_entropies: vec![],
        d_values: vec![],
    };
    refused("val-backward", policy::backward(&Model::Policy, &[gradient]))?;
    refused("nothing-was-added", optimise())?;
    // The call that was played back is the ancestor's. There is none of that number in the fork.
    let fork = trained.first().map(|fork| fork.rollout_id().0).unwrap_or_default();
    let own = |call: &TransitionId| call.0.replacen(&ancestor.rollout_id().0, &fork, 1);
    refused("prefix-of-fork", train(&[TransitionId(own(&first.id()))]))?;
    // What is for looking at stays so, whatever its fork is for.
    let val = rollouts::next_items(Split::Val, 1)?;
    let Some(item) = val.first() else { return Err(missing("item to look at")) };
    let looked = rollouts::enqueue(&[Group::new(item.id(), 1).mode(Mode::Val)])?.await_all(None)?;
    let Some(looked) = looked.first() else { return Err(missing("rollout of it")) };
    let fork = Group::new(item.id(), 1).fork_of(looked.rollout_id(), 0);
    refused("train-fork-of-val", rollouts::enqueue(&[fork]).map(|_| ()))?;

    let found = train(&good)?;
    metrics::scalar("fork_tokens", tokens(&of_trained) as f64)?;
    metrics::scalar("trained_tokens", found.get("trained-tokens").unwrap_or(-1.0))?;
    metrics::scalar("total_tokens", found.get("total-tokens").unwrap_or(-1.0))?;
    optimise()?;
    Ok(())
}

fn calls(trajectories: &[Trajectory]) -> Vec<Transition> {
    trajectories.iter().flat_map(Trajectory::transitions).collect()
}

fn ids(calls: &[Transition]) -> Vec<TransitionId> {
    calls.iter().map(Transition::id).collect()
}

/// Tokens that the policy drew in these calls.
fn tokens(calls: &[Transition]) -> usize {
    calls.iter().map(|call| call.completion_tokens() as usize).sum()
}

fn train(calls: &[TransitionId]) -> Result<Numbers, HostError> {
    let entries: Vec<Entry> = calls.iter().map(|call| Entry::new(call.clone(), Stream::Rl, 1.0)).collect();
    policy::forward_backward(&Model::Policy, &entries, &Loss::new())
}

fn optimise() -> Result<(), HostError> {
    policy::optimiser_step(&Model::Policy, &OptimiserStep::new(1e-3)).map(|_| ())
}

/// Notes which error the host answered with.
fn refused<T>(what: &str, answer: Result<T, HostError>) -> Result<(), AlgorithmError> {
    let (kind, text) = match answer {
        Ok(_) => ("accepted", String::new()),
        Err(HostError::InvalidArgument(text)) => ("invalid-argument", text),
        Err(HostError::Unknown(text)) => ("unknown", text),
        Err(HostError::Denied(text)) => ("denied", text),
        Err(other) => ("other", other.to_string()),
    };
    Ok(metrics::note(&json!({"try": what, "answer": kind, "text": text}).to_string())?)
}

fn missing(what: &str) -> AlgorithmError {
    AlgorithmError::Other(format!("there is no {what}"))
}
