//! Calls and the updates that used them.

use std::collections::BTreeMap;
use std::sync::Arc;

use fulgurite_adapter::{Placement, RowStart, Sequence, Transition, placements};
use fulgurite_core::algorithm::{BatchEntry, ModelReference, Scope, Weights};
use fulgurite_core::id::RolloutId;
use fulgurite_core::training::{Stream, TrainingRow};
use fulgurite_policy::PolicyTokenizer;

use super::{ExplainedCall, ExplainedUpdate, Known, Use, WeightSummary, reasons};
use crate::trail::{EntryTrail, StepTrail, UpdateTrail, UpdateVerb, WeightTrail};

/// Tokens shown on each side of the place where a prompt leaves a row.
const AROUND_TOKENS: usize = 8;

/// All calls of a rollout with their uses, and the updates that made them.
pub(super) fn explain(
    known: &Known,
    group_totals: &BTreeMap<RolloutId, Option<f64>>,
) -> (Vec<ExplainedCall>, Vec<ExplainedUpdate>) {
    let mut calls: Vec<ExplainedCall> = known.transitions.iter().map(call).collect();
    let mut updates = vec![];
    for step in &known.steps {
        for (number, update) in step.updates.iter().enumerate() {
            let entries = step.entries(update);
            if entries.is_empty() {
                continue;
            }
            updates.push(explained(step, number, update));
            for (id, mut used) in uses(known, step.step, number, update.verb, entries) {
                if used.weight.min == 0.0 && used.weight.max == 0.0 && used.stream == Some(Stream::Rl) {
                    used.notes.push(reasons::zero_weight(group_totals, &known.record.spec.id));
                }
                let place = known.transitions.iter().position(|transition| transition.id.0 == id);
                if let Some(call) = place.and_then(|place| calls.get_mut(place)) {
                    call.uses.push(used);
                }
            }
        }
    }
    for (call, transition) in calls.iter_mut().zip(&known.transitions) {
        if call.uses.is_empty() {
            call.reasons = reasons::of_call(known, transition, !updates.is_empty());
        }
    }
    (calls, updates)
}

fn call(transition: &Transition) -> ExplainedCall {
    ExplainedCall {
        call_index: transition.call_index,
        agent_role: transition.agent_role.clone(),
        model: name(&transition.model()),
        prompt_tokens: transition.prompt_tokens(),
        drawn_tokens: transition.sampled_tokens(),
        cut_tokens: transition.cut_tokens,
        log_prob_sum: transition.log_prob_sum(),
        policy_version: transition.policy_version(),
        text: transition.text.clone(),
        rewards: transition.rewards.iter().map(|reward| (reward.dimension.clone(), reward.value)).collect(),
        uses: vec![],
        reasons: vec![],
    }
}

fn name(model: &ModelReference) -> String {
    match model {
        ModelReference::Policy => "policy".to_owned(),
        ModelReference::Snapshot(name) | ModelReference::Named(name) => name.clone(),
    }
}

fn explained(step: &StepTrail, number: usize, update: &UpdateTrail) -> ExplainedUpdate {
    let applied = step
        .optimiser_steps
        .iter()
        .find(|optimiser| optimiser.after_updates > number && optimiser.model == update.model);
    ExplainedUpdate {
        step: step.step,
        update: number,
        verb: update.verb,
        model: name(&update.model),
        policy_version: update.policy_version,
        loss: update.loss.clone(),
        found: update.found.clone(),
        optimiser: applied.map(|optimiser| optimiser.settings.clone()),
        optimiser_found: applied.map(|optimiser| optimiser.found.clone()),
    }
}

/// What one update did with the calls of the rollout, by transition.
fn uses(known: &Known, step: u64, update: usize, verb: UpdateVerb, entries: &[EntryTrail]) -> Vec<(String, Use)> {
    let of_entry = |entry: &EntryTrail| {
        let transition = known.transitions.iter().find(|transition| transition.id.0 == entry.id)?;
        Some((Arc::new(transition.clone()), batch_entry(entry, transition)))
    };
    // `backward` has one row for each transition, whatever could be merged.
    let sequences: Vec<Vec<&EntryTrail>> = match verb {
        UpdateVerb::ForwardBackward => vec![entries.iter().collect()],
        UpdateVerb::Backward => entries.iter().map(|entry| vec![entry]).collect(),
    };
    let mut uses = vec![];
    let mut rows_before = 0;
    for entries in sequences {
        let sequence =
            Sequence { entries: entries.iter().filter_map(|entry| of_entry(entry)).collect(), ..Sequence::default() };
        let (rows, placed) = match placements(&sequence) {
            Ok(built) => built,
            // What was trained on is there no more, or is not what it was: `store check` tells.
            Err(error) => {
                uses.extend(
                    entries.iter().map(|entry| (entry.id.clone(), unplaced(step, update, entry, &error.to_string()))),
                );
                continue;
            }
        };
        for entry in entries {
            let stream = entry.stream.unwrap_or(Stream::Rl);
            let Some(place) = placed.iter().find(|place| place.transition.0 == entry.id && place.stream == stream)
            else {
                continue;
            };
            let (Some(row), Some(transition)) =
                (rows.get(place.row), known.transitions.iter().find(|transition| transition.id.0 == entry.id))
            else {
                continue;
            };
            let range = if entry.observed {
                transition.observed_from..place.completion_from
            } else {
                place.completion_from..place.completion_from + place.completion_tokens
            };
            let trained = ranges(&row.mask, range.clone());
            let trained_tokens: usize = trained.iter().map(|(from, to)| to - from).sum();
            let used = Use {
                step,
                update,
                stream: entry.stream,
                scope: if entry.observed { "observed" } else { "sampled" },
                weight: summary(&entry.weights, range.len()),
                share: entry.share,
                row: rows_before + place.row,
                row_start: row_start(place, rows_before, &rows, transition, known.tokenizer.as_ref()),
                trained,
                masked_tokens: range.len() - trained_tokens,
                notes: vec![],
            };
            uses.push((entry.id.clone(), used));
        }
        rows_before += rows.len();
    }
    uses
}

fn batch_entry(entry: &EntryTrail, transition: &Transition) -> BatchEntry {
    let tokens = if entry.observed { transition.observed_tokens() } else { transition.sampled_tokens() };
    BatchEntry {
        transition: transition.id.clone(),
        stream: entry.stream.unwrap_or(Stream::Rl),
        scope: if entry.observed { Scope::Observed } else { Scope::Sampled },
        weights: match &entry.weights {
            WeightTrail::All(weight) => Weights::Scalar(*weight),
            WeightTrail::Each(weights) if weights.len() == tokens => Weights::PerToken(weights.clone()),
            // Rows and masks do not depend on it.
            WeightTrail::Each(_) | WeightTrail::Summary { .. } => Weights::Scalar(1.0),
        },
        group: entry.group,
    }
}

fn unplaced(step: u64, update: usize, entry: &EntryTrail, problem: &str) -> Use {
    Use {
        step,
        update,
        stream: entry.stream,
        scope: if entry.observed { "observed" } else { "sampled" },
        weight: summary(&entry.weights, 0),
        share: entry.share,
        row: 0,
        row_start: format!("its row cannot be made again: {problem}"),
        trained: vec![],
        masked_tokens: 0,
        notes: vec![],
    }
}

fn summary(weights: &WeightTrail, tokens: usize) -> WeightSummary {
    match weights {
        WeightTrail::All(weight) => {
            WeightSummary { tokens, mean: f64::from(*weight), min: *weight, max: *weight, each: None }
        }
        WeightTrail::Each(weights) => WeightSummary {
            tokens: weights.len(),
            mean: weights.iter().map(|weight| f64::from(*weight)).sum::<f64>() / weights.len().max(1) as f64,
            min: weights.iter().copied().reduce(f32::min).unwrap_or(0.0),
            max: weights.iter().copied().reduce(f32::max).unwrap_or(0.0),
            each: Some(weights.clone()),
        },
        WeightTrail::Summary { count, mean, min, max } => WeightSummary {
            tokens: usize::try_from(*count).unwrap_or(usize::MAX),
            mean: *mean,
            min: *min,
            max: *max,
            each: None,
        },
    }
}

/// Ranges of a mask that are set.
fn ranges(mask: &[bool], within: std::ops::Range<usize>) -> Vec<(usize, usize)> {
    let mut ranges: Vec<(usize, usize)> = vec![];
    for place in within.filter(|place| mask.get(*place).copied().unwrap_or(false)) {
        match ranges.last_mut() {
            Some((_, end)) if *end == place => *end += 1,
            _ => ranges.push((place, place + 1)),
        }
    }
    ranges
}

/// Why a call is in its row, in words.
fn row_start(
    place: &Placement,
    rows_before: usize,
    rows: &[TrainingRow],
    transition: &Transition,
    tokenizer: Option<&PolicyTokenizer>,
) -> String {
    match &place.start {
        RowStart::First => "the first row".to_owned(),
        RowStart::Continues => "goes on in the row: the prompt repeats all of it".to_owned(),
        RowStart::OtherWeights { row } => {
            format!("a new row: row {} was drawn by other weights", rows_before + row)
        }
        RowStart::OtherTemperature { row } => {
            format!("a new row: row {} was drawn at another temperature", rows_before + row)
        }
        RowStart::PromptDiffers { row, at } => {
            let held = rows.get(*row).map_or(&[][..], |row| &row.ids);
            let prompt = transition.tokens.as_ref().map_or(&[][..], |tokens| &tokens.prompt_ids);
            let shown = |ids: &[u32]| around(ids, *at, tokenizer);
            format!(
                "a new row: from token {at} on the prompt is not row {}, which has {} where the prompt has {}",
                rows_before + row,
                shown(held),
                shown(prompt)
            )
        }
    }
}

/// Text around a place, which is marked: `"before" [token] "after"`.
fn around(ids: &[u32], at: usize, tokenizer: Option<&PolicyTokenizer>) -> String {
    let text = |from: usize, to: usize| {
        let ids = ids.get(from..to.min(ids.len())).unwrap_or_default();
        match tokenizer {
            Some(tokenizer) => format!("{:?}", tokenizer.decode(ids)),
            None => format!("{ids:?}"),
        }
    };
    if at >= ids.len() {
        return format!("{} and ends", text(ids.len().saturating_sub(AROUND_TOKENS), ids.len()));
    }
    let before = text(at.saturating_sub(AROUND_TOKENS), at);
    format!("{before} [{}] {}", text(at, at + 1), text(at + 1, at + 1 + AROUND_TOKENS))
}
