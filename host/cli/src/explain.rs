//! `fulgurite explain`: what a rollout was trained on, call by call, and why anything was not.

use std::fmt::Write as _;

use fulgurite_core::id::RolloutId;
use fulgurite_core::outcome::Blame;
use fulgurite_core::training::Stream;
use fulgurite_trainer::RunDirectory;
use fulgurite_trainer::explain::{
    ExplainError, ExplainedCall, ExplainedReward, ExplainedUpdate, Explanation, Reason, Use, WeightSummary, explain,
};
use fulgurite_trainer::trail::{GivenAs, ShareTrail, UpdateVerb};
use serde_json::Value;

use crate::arguments::{ExplainArguments, Output};
use crate::failure::{Failure, printable};
use crate::rollouts::shown;
use crate::store::open;
use crate::terminal::{Style, paint};
use crate::{paths, terminal, train};

/// Rollouts of a group whose totals are listed.
const GROUP_LISTED: usize = 16;
/// Weights of single tokens that are listed.
const WEIGHTS_LISTED: usize = 16;

pub(crate) fn run(arguments: &ExplainArguments) -> Result<(), Failure> {
    let run = RunDirectory::new(paths::existing_run(arguments.run.as_deref())?);
    let rollout = RolloutId::new(&arguments.rollout).map_err(Failure::usage)?;
    let store = open(Some(run.root()))?;
    let explanation = explain(&run, &store, &rollout).map_err(|error| match error {
        ExplainError::UnknownRollout(_) => Failure::usage(error).hint("`fulgurite rollouts list` lists them"),
        ExplainError::Config(_) => Failure::usage(error),
        _ => Failure::failed(error),
    })?;
    if arguments.output == Output::Json {
        return train::print_json(&explanation);
    }
    for line in lines(&explanation, terminal::colours()) {
        terminal::print(&line);
    }
    Ok(())
}

fn lines(explanation: &Explanation, colours: bool) -> Vec<String> {
    let bold = |text: String| paint(&printable(&text), Style::Bold, colours);
    let mut lines = vec![bold(format!("rollout {}", explanation.rollout))];
    lines.push(format!(
        "  {} step {} group {}, {}, item {}",
        explanation.stage,
        explanation.step,
        explanation.group,
        explanation.mode.as_str(),
        printable(&explanation.item)
    ));
    if let (Some(outcome), Some(attempt)) = (&explanation.outcome, explanation.attempt) {
        let style = match outcome.kind.blame() {
            None => Style::Green,
            Some(Blame::Policy) => Style::Yellow,
            Some(Blame::AgentCode | Blame::Infrastructure) => Style::Red,
        };
        lines.push(format!("  attempt {attempt}: {}", paint(outcome.kind.as_str(), style, colours)));
    }
    for step in &explanation.given {
        let given_as = match step.given_as {
            GivenAs::Graded => "",
            GivenAs::Shuffled => ", with another rollout's rewards",
            GivenAs::Fault => ", as one with a fault",
            GivenAs::TooLong => ", as one that is too long",
            GivenAs::Estimate => ", as an estimate",
        };
        let (algorithm, version, updates) = (printable(&step.algorithm), printable(&step.version), step.updates);
        lines.push(format!(
            "  given to {algorithm} {version} in step {}{given_as}; updates of that step: {updates}",
            step.step
        ));
    }
    for step in &explanation.carried_by {
        lines.push(format!("  carried over by step {step}"));
    }
    lines.extend(explanation.reasons.iter().map(|reason| reason_line("  ", reason, colours)));
    lines.push(bold("rewards".to_owned()));
    lines.extend(explanation.rewards.iter().map(|reward| paint(&reward_line(reward), Style::Yellow, colours)));
    lines.push(format!("  {}", group_line(explanation)));
    for call in &explanation.calls {
        lines.extend(call_lines(call, colours));
    }
    if !explanation.updates.is_empty() {
        lines.push(bold("updates".to_owned()));
        lines.extend(explanation.updates.iter().flat_map(update_lines));
    }
    lines
}

fn reason_line(indent: &str, reason: &Reason, colours: bool) -> String {
    let word = if reason.is_remark() { "note" } else { "not trained" };
    format!("{indent}{}", paint(&format!("{word}: {}", shown(&reason.text)), Style::Red, colours))
}

fn reward_line(explained: &ExplainedReward) -> String {
    let reward = &explained.reward;
    let place = match (explained.accepted, explained.attached_to) {
        (false, _) => "counts nowhere: its source is not in `rollout.reward_accept`".to_owned(),
        (true, Some(call)) => format!("call {call} ({})", explained.rule),
        (true, None) => format!("the whole rollout ({})", explained.rule),
    };
    let feedback = reward.feedback.as_ref().map_or_else(String::new, |text| format!("  {}", shown(text)));
    let source = format!("{:?}", reward.source).to_lowercase();
    format!("  {:<16} {:>8.3}  {source:<8}  {place}{feedback}", printable(&reward.dimension), reward.value)
}

fn group_line(explanation: &Explanation) -> String {
    let dimension = printable(&explanation.dimension);
    let number = |total: Option<f64>| total.map_or_else(|| "none".to_owned(), |total| format!("{total:.3}"));
    let others = explanation.group_totals.iter().filter(|(id, _)| **id != explanation.rollout);
    let listed: Vec<String> = others.clone().take(GROUP_LISTED).map(|(_, total)| number(*total)).collect();
    let more = others.count().saturating_sub(GROUP_LISTED);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    let group = if listed.is_empty() {
        "alone in its group".to_owned()
    } else {
        format!("others of its group: {}{more}", listed.join(", "))
    };
    format!("total of `{dimension}`: {}; {group}", number(explanation.total))
}

fn call_lines(call: &ExplainedCall, colours: bool) -> Vec<String> {
    let by = if call.model == "policy" { String::new() } else { format!(" by {}", printable(&call.model)) };
    let role = if call.agent_role.is_empty() { by } else { format!(" ({}{by})", printable(&call.agent_role)) };
    let cut =
        if call.cut_tokens == 0 { String::new() } else { format!(", {} more beyond the longest row", call.cut_tokens) };
    let head = format!(
        "call {}{role}: {} + {} tokens{cut}, log-prob {:.3}, {}",
        call.call_index, call.prompt_tokens, call.drawn_tokens, call.log_prob_sum, call.policy_version
    );
    let mut lines = vec![paint(&head, Style::Bold, colours)];
    lines.push(format!("  => {}", paint(&shown(&call.text), Style::Green, colours)));
    for (dimension, value) in &call.rewards {
        lines.push(paint(&format!("  {} {value:.3}", printable(dimension)), Style::Yellow, colours));
    }
    let mut told = "";
    for used in &call.uses {
        // Most updates of a step use the same rows.
        lines.extend(use_lines(used, used.row_start != told, colours));
        told = &used.row_start;
    }
    lines.extend(call.reasons.iter().map(|reason| reason_line("  ", reason, colours)));
    lines
}

fn use_lines(used: &Use, tells_row: bool, colours: bool) -> Vec<String> {
    let what = match used.stream {
        Some(Stream::Rl) => "advantage",
        Some(Stream::Ce) => "token weight",
        Some(Stream::RefKl) => "KL weight",
        None => "derivative",
    };
    let trained: usize = used.trained.iter().map(|(from, to)| to - from).sum();
    let ranges: Vec<String> = used.trained.iter().map(|(from, to)| format!("{from}..{to}")).collect();
    let masked = if used.masked_tokens == 0 { String::new() } else { format!(", {} masked", used.masked_tokens) };
    let place = if trained == 0 { String::new() } else { format!(" at {}", ranges.join(" ")) };
    let mut lines = vec![format!(
        "  step {} update {}: {what} {}, {trained} {} tokens{masked}, row {}{place}",
        used.step,
        used.update,
        weight_text(&used.weight),
        used.scope,
        used.row
    )];
    if let Some(share) = &used.share {
        lines.push(format!("    {}", share_text(share)));
    }
    if tells_row {
        lines.push(paint(&format!("    {}", printable(&used.row_start)), Style::Dim, colours));
    }
    lines.extend(used.notes.iter().map(|note| paint(&format!("    {note}"), Style::Red, colours)));
    lines
}

/// What the loss made of the tokens beside their weights.
fn share_text(share: &ShareTrail) -> String {
    let mut text = format!("each token counts {} times in the loss", rounded(share.coefficient));
    if let Some(weight) = share.correction {
        let _ = write!(text, ", corrected by {} on average", rounded(weight));
    }
    if share.dropped > 0 {
        let _ = write!(text, ", {} of them dropped by the correction's mask", share.dropped);
    }
    text
}

#[expect(clippy::float_cmp, reason = "the smallest of equal numbers is the largest")]
fn weight_text(weight: &WeightSummary) -> String {
    if weight.min == weight.max {
        return format!("{:.4}", weight.min);
    }
    let range = format!("{:.4} to {:.4}, mean {:.4}", weight.min, weight.max, weight.mean);
    match &weight.each {
        Some(each) if each.len() <= WEIGHTS_LISTED => {
            let each: Vec<String> = each.iter().map(|weight| format!("{weight:.4}")).collect();
            format!("{range} ({})", each.join(" "))
        }
        _ => range,
    }
}

fn update_lines(update: &ExplainedUpdate) -> Vec<String> {
    let verb = match update.verb {
        UpdateVerb::ForwardBackward => "forward-backward",
        UpdateVerb::Backward => "backward with the plugin's own derivatives",
    };
    let model = printable(&update.model);
    let mut lines = vec![format!(
        "  step {} update {}: {verb} on {model} at {}",
        update.step, update.update, update.policy_version
    )];
    let mut add = |name: &str, value: &Value| {
        let text = settings(value);
        if !text.is_empty() {
            lines.push(format!("    {name}: {text}"));
        }
    };
    add("loss", &update.loss);
    add("found", &update.found);
    match &update.optimiser {
        Some(settings) => add("optimiser", settings),
        None => add("optimiser", &Value::from("no step has applied it")),
    }
    if let Some(found) = &update.optimiser_found {
        add("found", found);
    }
    lines
}

/// JSON as `name value, name value`. What is off is left out.
fn settings(value: &Value) -> String {
    let mut text = String::new();
    flatten("", value, &mut text);
    text
}

fn flatten(name: &str, value: &Value, text: &mut String) {
    let shown = match value {
        Value::Null => return,
        Value::Object(fields) => {
            for (field, value) in fields {
                let name = if name.is_empty() { field.clone() } else { format!("{name}.{field}") };
                flatten(&name, value, text);
            }
            return;
        }
        Value::String(word) => printable(word),
        Value::Number(number) if number.is_f64() => rounded(number.as_f64().unwrap_or(0.0)),
        other => other.to_string(),
    };
    let separator = if text.is_empty() { "" } else { ", " };
    let space = if name.is_empty() { "" } else { " " };
    // Writing to a String never fails.
    let _ = write!(text, "{separator}{name}{space}{shown}");
}

/// Four digits that matter.
fn rounded(value: f64) -> String {
    if value == 0.0 || (1e-3..1e6).contains(&value.abs()) {
        let text = format!("{value:.4}");
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    format!("{value:.3e}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_tell_what_a_correction_did() {
        let plain = ShareTrail { coefficient: 1.0 / 64.0, correction: None, dropped: 0 };
        assert_eq!(share_text(&plain), "each token counts 0.0156 times in the loss");
        let masked = ShareTrail { correction: Some(0.5), dropped: 3, ..plain };
        let text = "each token counts 0.0156 times in the loss, corrected by 0.5 on average, 3 of them dropped by the \
                    correction's mask";
        assert_eq!(share_text(&masked), text);
    }

    #[test]
    fn settings_are_names_and_values() {
        let value = serde_json::json!({
            "policy_loss": {"ppo": {"clip_low": 0.2, "dual_clip": null}}, "kl": null, "aggregation": "token_mean", "n": 3, "x": 1.5e-7
        });
        let text = "policy_loss.ppo.clip_low 0.2, aggregation token_mean, n 3, x 1.500e-7";
        assert_eq!(settings(&value), text);
        assert_eq!(settings(&Value::Null), "");
    }
}
