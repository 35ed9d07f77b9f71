//! What a stage's host hands over and takes, in the words of the other side: transitions, numbers per token, errors.

use std::collections::BTreeMap;

use fulgurite_adapter::Transition;
use fulgurite_core::algorithm::{AlgorithmHostError, TransitionView};
use fulgurite_core::id::{PolicyVersion, TransitionId};
use fulgurite_core::llm::Role;
use fulgurite_policy::{PolicyEngine, PolicyError};

/// The newest weights of every model.
pub(super) fn versions(engine: &PolicyEngine) -> BTreeMap<Option<String>, PolicyVersion> {
    engine.all().map(|model| (model.name().map(str::to_owned), model.version())).collect()
}

pub(super) fn transition_view(transition: &Transition) -> TransitionView {
    let count = |tokens: usize| u32::try_from(tokens).unwrap_or(u32::MAX);
    TransitionView {
        id: transition.id.clone(),
        call_index: transition.call_index,
        event: transition.event,
        agent_role: transition.agent_role.clone(),
        model: transition.model(),
        prompt_tokens: count(transition.prompt_tokens()),
        completion_tokens: count(transition.sampled_tokens()),
        trainable: transition.is_trainable(),
        log_prob_sum: transition.log_prob_sum(),
        policy_version: transition.policy_version(),
        prompt_hash: transition.prompt_hash(),
        observation_hash: transition.observation_hash(),
        rewards: transition.rewards.clone(),
        text: transition.text.clone(),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function of map_err")]
pub(super) fn engine_error(error: PolicyError) -> AlgorithmHostError {
    let text = error.to_string();
    match error {
        PolicyError::Unsupported(_) => AlgorithmHostError::Unsupported(text),
        // What would allow it is in the text.
        PolicyError::NoCritic | PolicyError::UnknownModel(_) => AlgorithmHostError::Denied(text),
        PolicyError::InvalidBatch(_)
        | PolicyError::DemonstrationTooLong { .. }
        | PolicyError::UnknownSnapshot(_)
        | PolicyError::NoGradient => AlgorithmHostError::InvalidArgument(text),
        _ => AlgorithmHostError::Failed(text),
    }
}

/// The values at the places that a mask marks.
pub(super) fn sampled(values: &[f32], mask: &[bool]) -> Vec<f32> {
    values.iter().zip(mask).filter(|(_, sampled)| **sampled).map(|(value, _)| *value).collect()
}

/// One number per sampled token as one per id. An empty list stays one.
pub(super) fn spread(
    id: &TransitionId,
    given: Vec<f32>,
    mask: &[bool],
    sampled: usize,
) -> Result<Vec<f32>, AlgorithmHostError> {
    if given.is_empty() {
        return Ok(given);
    }
    if given.len() != sampled {
        let problem = format!("`{id}` has {sampled} sampled tokens and {} derivatives", given.len());
        return Err(AlgorithmHostError::InvalidArgument(problem));
    }
    let mut given = given.into_iter();
    Ok(mask.iter().map(|sampled| if *sampled { given.next().unwrap_or_default() } else { 0.0 }).collect())
}

pub(super) fn runner_error(error: impl std::fmt::Display) -> AlgorithmHostError {
    AlgorithmHostError::Failed(error.to_string())
}

pub(super) fn role_of(name: &str) -> Result<Role, AlgorithmHostError> {
    [Role::System, Role::User, Role::Assistant, Role::Tool]
        .into_iter()
        .find(|role| role.as_str() == name)
        .ok_or_else(|| AlgorithmHostError::InvalidArgument(format!("there is no role `{name}`")))
}
