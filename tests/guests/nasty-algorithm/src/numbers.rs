//! Numbers that make no sense, lists of wrong lengths, names of nothing.

use fulgurite_sdk::algorithm::policy::{self, Entry, Gradient, Loss, Model, OptimiserStep, Stream};
use fulgurite_sdk::algorithm::trajectories::{self, Message, TransitionId};
use fulgurite_sdk::algorithm::{AlgorithmError, HostError, metrics};
use fulgurite_sdk::{Role, json};

fn demonstration() -> Result<TransitionId, HostError> {
    let messages = [Message::text(Role::User, "find a room"), Message::text(Role::Assistant, "R07 is free")];
    Ok(trajectories::import(&messages, &[Role::Assistant], &json!({}))?.id())
}

/// A step as it should be.
pub(crate) fn train() -> Result<(), AlgorithmError> {
    let entry = Entry::new(demonstration()?, Stream::Ce, 1.0);
    policy::forward_backward(&Model::Policy, &[entry], &Loss::new())?;
    policy::optimiser_step(&Model::Policy, &OptimiserStep::new(1e-3))?;
    Ok(())
}

/// Does one thing wrong; nothing by another name.
pub(crate) fn misbehave(how: &str) -> Result<(), AlgorithmError> {
    let gradient =
        |transition, d_log_probs| Gradient { transition, d_log_probs, d_entropies: vec![], d_values: vec![] };
    let train = |entry: Entry| policy::forward_backward(&Model::Policy, &[entry], &Loss::new()).map(|_| ());
    match how {
        "nan-weight" => train(Entry::new(demonstration()?, Stream::Ce, f32::NAN))?,
        "nan-setting" => {
            let entry = Entry::new(demonstration()?, Stream::Ce, 1.0);
            policy::forward_backward(&Model::Policy, &[entry], &Loss::new().entropy_coefficient(f32::NAN))?;
        }
        "nan-derivative" => {
            let id = demonstration()?;
            let tokens = policy::forward(&Model::Policy, std::slice::from_ref(&id))?;
            let count = tokens.first().map_or(0, |one| one.log_probs.len());
            policy::backward(&Model::Policy, &[gradient(id, vec![f32::NAN; count])])?;
        }
        "nan-metric" => metrics::scalar("loss", f64::NAN)?,
        "few-weights" => train(Entry::new(demonstration()?, Stream::Ce, 1.0).weights(vec![1.0]))?,
        "few-derivatives" => policy::backward(&Model::Policy, &[gradient(demonstration()?, vec![1.0])])?,
        "unknown-transition" => train(Entry::new(TransitionId("of-nobody".to_owned()), Stream::Rl, 1.0))?,
        "unknown-anchor" => policy::anchor(&Model::Policy, &[TransitionId("of-nobody".to_owned())])?,
        _ => {}
    }
    Ok(())
}
