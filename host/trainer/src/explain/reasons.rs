//! Why something was not trained on.

use std::collections::BTreeMap;

use fulgurite_adapter::{Fit, Transition};
use fulgurite_core::algorithm::ModelReference;
use fulgurite_core::id::RolloutId;
use fulgurite_core::llm::NotTrainable;
use fulgurite_core::record::RolloutMode;

use super::{Explanation, Known, Reason};
use crate::trail::GivenAs;

/// Why a call that could have been used was not.
pub(super) fn of_call(known: &Known, transition: &Transition, others_are_used: bool) -> Vec<Reason> {
    if let Some(reason) = &transition.not_trainable {
        let (code, text) = match reason {
            NotTrainable::NoTokenIds => ("no-token-ids", "the model returned no usable token ids"),
            NotTrainable::TruncatedSampling => {
                ("truncated-sampling", "sampling was truncated or constrained, so its log-probs are not the policy's")
            }
            NotTrainable::OtherEndpoint => ("other-endpoint", "it did not ask the policy"),
        };
        return vec![Reason::new(code, text)];
    }
    if !transition.is_trainable() {
        let most = known.config.rollout.row_tokens_max.map_or(0, std::num::NonZeroUsize::get);
        let text = format!(
            "its prompt alone has {} tokens and `rollout.row_tokens_max` is {most}",
            transition.prompt_tokens()
        );
        return vec![Reason::new("beyond-row", text)];
    }
    let roles = known.stage().and_then(|stage| stage.config.get("agent_roles")).and_then(toml::Value::as_array);
    let roles: Vec<&str> = roles.into_iter().flatten().filter_map(toml::Value::as_str).collect();
    if !roles.is_empty() && !roles.contains(&transition.agent_role.as_str()) {
        let role = &transition.agent_role;
        let text = format!("its agent role `{role}` is not in the stage's `agent_roles`: {}", roles.join(", "));
        return vec![Reason::new("agent-role", text)];
    }
    if let Some(text) = stale(known, transition) {
        return vec![Reason::new("stale", text)];
    }
    if others_are_used {
        return vec![Reason::new(
            "not-asked",
            "the algorithm used other calls of the rollout and never asked for this one",
        )];
    }
    vec![]
}

/// How much too old the weights are that drew a call, where the stage leaves such calls out.
fn stale(known: &Known, transition: &Transition) -> Option<String> {
    let most = known.stage()?.config.get("staleness_max")?.as_integer().and_then(|most| u64::try_from(most).ok())?;
    if transition.model() != ModelReference::Policy {
        return None;
    }
    let rollout = &known.record.spec.id;
    let now = known.steps.iter().rev().find(|step| step.given.contains_key(rollout))?.policy_version?;
    let drawn = transition.policy_version();
    let age = now.0.saturating_sub(drawn.0);
    (age > most)
        .then(|| format!("it was drawn by {drawn}, {age} versions before {now}; the stage's `staleness_max` is {most}"))
}

/// Why a rollout was not trained on, or may not have been as meant.
pub(super) fn of_rollout(known: &Known, explanation: &Explanation) -> Vec<Reason> {
    let mut reasons = vec![];
    let spec = &known.record.spec;
    match spec.mode {
        RolloutMode::Test => {
            reasons.push(Reason::new("held-out", "it is of the host's held-out evaluation, which is never trained on"));
        }
        RolloutMode::Val => {
            reasons.push(Reason::new(
                "estimate",
                "it was run to choose or to estimate (mode `val`), and is never trained on",
            ));
        }
        RolloutMode::Train => {}
    }
    if !known.record.state.is_terminal() {
        reasons.push(Reason::new("not-ended", "it has not ended"));
    }
    if let Some(outcome) = known.outcome().filter(|outcome| !outcome.kind.is_graded()) {
        let text =
            format!("it ended with {}, which is not the policy's fault: {}", outcome.kind.as_str(), outcome.detail);
        reasons.push(Reason::new("fault", text));
    }
    match &known.fit {
        Fit::Whole => {}
        Fit::Dropped(row) => reasons.push(Reason::new(
            "too-long",
            format!("it is left out as a whole: the row that ends with `{}` has {} tokens", row.transition, row.tokens),
        )),
        Fit::Truncated { longest, tokens } => reasons.push(Reason::new(
            "truncated",
            format!(
                "{tokens} drawn tokens are beyond the longest row: `{}` has {}",
                longest.transition, longest.tokens
            ),
        )),
    }
    if let Some(fork) = &spec.fork_of {
        let text =
            format!("calls before event {} are of `{}`, and are trained on there only", fork.event, fork.rollout);
        reasons.push(Reason::new("prefix", text));
    }
    if explanation.updates.is_empty() && spec.mode == RolloutMode::Train {
        reasons.extend(unused(known, explanation));
    }
    if explanation.given.iter().any(|step| step.given_as == GivenAs::Shuffled) {
        let text = "`experiment.shuffle_rewards` is on: the algorithm was shown another rollout's rewards";
        reasons.push(Reason::new("shuffled-rewards", text));
    }
    if let Some(step) = explanation.given.iter().find(|step| step.entries_left_out > 0) {
        let text = format!(
            "step {} has {} entries more than `explain.entries_per_step_max`, which are not kept",
            step.step, step.entries_left_out
        );
        reasons.push(Reason::new("entries-left-out", text));
    }
    reasons
}

/// Why no update used a training rollout.
fn unused(known: &Known, explanation: &Explanation) -> Vec<Reason> {
    if !known.has_trail {
        let text = "no trail is kept of its stage: `explain.record` is off, the stage has not come so far, or an older version ran it";
        return vec![Reason::new("no-trail", text)];
    }
    let Some(step) = explanation.given.last() else {
        return vec![match explanation.carried_by.last() {
            Some(step) => {
                let text = format!(
                    "its group was not whole: step {step} carried it over, and no later step has been given it"
                );
                Reason::new("carried-over", text)
            }
            None => Reason::new("never-given", "the algorithm never waited for it"),
        }];
    };
    if let Some(carried) = explanation.carried_by.last().filter(|carried| **carried >= step.step) {
        let text =
            format!("its group was not whole: step {carried} carried it over, and no later step has been given it");
        return vec![Reason::new("carried-over", text)];
    }
    if !matches!(step.given_as, GivenAs::Graded | GivenAs::Shuffled) {
        return vec![];
    }
    if explanation.total.is_none() {
        let text = format!("no accepted reward is of dimension `{}`", explanation.dimension);
        return vec![Reason::new("no-reward", text)];
    }
    let mut trainable = known.transitions.iter().filter(|transition| transition.is_trainable()).peekable();
    if trainable.peek().is_some() && trainable.all(|transition| stale(known, transition).is_some()) {
        return vec![Reason::new("stale", "all its calls were drawn by weights that are too old")];
    }
    if is_flat(&explanation.group_totals) {
        let text = format!("{}; the step made {} updates", flat_text(&explanation.group_totals), step.updates);
        return vec![Reason::new("zero-variance", text)];
    }
    let text = match step.updates {
        0 => format!("{} was given it in step {} and made no update", step.algorithm, step.step),
        updates => format!(
            "{} was given it in step {} and asked for it in none of {updates} updates",
            step.algorithm, step.step
        ),
    };
    vec![Reason::new("not-asked", text)]
}

/// Why a weight of policy gradient is 0.
pub(super) fn zero_weight(group_totals: &BTreeMap<RolloutId, Option<f64>>, rollout: &RolloutId) -> String {
    if is_flat(group_totals) {
        return format!("weight 0, no gradient: {}", flat_text(group_totals));
    }
    if group_totals.len() == 1 && group_totals.contains_key(rollout) {
        return "weight 0, no gradient: a group of one has nothing to compare".to_owned();
    }
    "weight 0, no gradient".to_owned()
}

/// Whether all rollouts of a group that count have one total.
fn is_flat(group_totals: &BTreeMap<RolloutId, Option<f64>>) -> bool {
    let totals: Vec<f64> = group_totals.values().copied().flatten().collect();
    totals.len() > 1 && totals.iter().all(|total| Some(total) == totals.first())
}

fn flat_text(group_totals: &BTreeMap<RolloutId, Option<f64>>) -> String {
    let total = group_totals.values().copied().flatten().next().unwrap_or_default();
    format!(
        "all {} rollouts of the group that count have the same total, {total} (zero variance)",
        group_totals.values().flatten().count()
    )
}
