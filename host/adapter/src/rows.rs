//! Weighted transitions to training rows.
//!
//! A call whose prompt repeats everything that the row before it holds goes on in that row: one forward pass instead of
//! several, and the same loss, because every trained token sees the same ids before it either way. What was not drawn
//! (or, in scope `observed`, not asked for) has mask `false`, weight 0 and log-prob 0. A prompt that differs starts a new
//! row of the same sequence; group statistics and normalisers go by sequence, so nothing depends on how often that
//! happens.
//!
//! Rows have one stream, one group, one temperature and one policy version, so a sequence with several streams has several rows
//! for the same tokens.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use fulgurite_core::algorithm::{BatchEntry, Scope, Weights};
use fulgurite_core::id::TransitionId;
use fulgurite_core::llm::{KeptTokens, NotTrainable, TokenData};
use fulgurite_core::training::{Stream, TrainingRow};

use crate::error::AdapterError;
use crate::transition::Transition;

/// All entries of a batch that belong to one rollout (or to one demonstration), in any order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sequence {
    /// Transitions with what is to be done with them.
    pub entries: Vec<(Arc<Transition>, BatchEntry)>,
    /// Log-probs (nats) of transitions under the trainer's weights at the start of the update (π_old), one per token of the
    /// scope `sampled`. What is not listed was drawn by those weights.
    pub anchors: BTreeMap<TransitionId, Arc<[f32]>>,
}

/// A sequence that does not fit the engine and was left out as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DroppedSequence {
    /// Its place in the list handed in.
    pub index: usize,
    /// Last transition of the row that is too long.
    pub transition: TransitionId,
    /// Tokens of that row.
    pub tokens: usize,
}

/// Rows, and what was left out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rows {
    /// The rows. Sequences are numbered from 0 without gaps, in the order handed in.
    pub rows: Vec<TrainingRow>,
    /// The sequences that were left out.
    pub dropped: Vec<DroppedSequence>,
}

/// Makes training rows of a batch. Row order is sequence, stream, call.
///
/// # Errors
/// [`AdapterError::RowTooLong`] when a row has more than `row_tokens_max` tokens, and every other [`AdapterError`]: the
/// batch is taken as a whole or not at all.
pub fn rows(sequences: &[Sequence], row_tokens_max: usize) -> Result<Vec<TrainingRow>, AdapterError> {
    let built = rows_that_fit(sequences, row_tokens_max)?;
    match built.dropped.into_iter().next() {
        None => Ok(built.rows),
        Some(DroppedSequence { transition, tokens, .. }) => {
            Err(AdapterError::RowTooLong { transition, tokens, tokens_max: row_tokens_max })
        }
    }
}

/// Makes training rows of a batch and leaves out every sequence of which a row has more than `row_tokens_max` tokens. Part
/// of a rollout is never trained: its advantage was computed from the whole. Whoever computes advantages leaves such
/// rollouts out before, so that baselines do not count them.
///
/// # Errors
/// Every [`AdapterError`] but [`AdapterError::RowTooLong`].
pub fn rows_that_fit(sequences: &[Sequence], row_tokens_max: usize) -> Result<Rows, AdapterError> {
    let mut built = Rows::default();
    let mut number = 0_u32;
    for (index, sequence) in sequences.iter().enumerate() {
        let rows = sequence_rows(sequence, number)?;
        if let Some((row, last)) = rows.iter().find(|(row, _)| row.ids.len() > row_tokens_max) {
            built.dropped.push(DroppedSequence { index, transition: last.clone(), tokens: row.ids.len() });
            continue;
        }
        if rows.is_empty() {
            continue;
        }
        number = number.checked_add(1).ok_or(AdapterError::TooManySequences(sequences.len()))?;
        built.rows.extend(rows.into_iter().map(|(row, _)| row));
    }
    Ok(built)
}

/// What one stream does with one transition.
struct Part<'a> {
    /// Number of the call in its sequence.
    call: u32,
    group: Option<u64>,
    stream: Stream,
    transition: &'a Transition,
    tokens: &'a TokenData,
    anchor: Option<&'a [f32]>,
    sampled: Option<&'a Weights>,
    observed: Option<&'a Weights>,
}

/// Where a call went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Which call.
    pub transition: TransitionId,
    /// In which stream.
    pub stream: Stream,
    /// Its row, as a place in the list that comes with it.
    pub row: usize,
    /// Why it is in that row.
    pub start: RowStart,
    /// Where in the row its drawn tokens begin; what it was shown is before that.
    pub completion_from: usize,
    /// Its drawn tokens.
    pub completion_tokens: usize,
}

/// Why a call is in its row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowStart {
    /// It is the first of its stream.
    First,
    /// Its prompt repeats all that the row holds.
    Continues,
    /// No row goes on: its prompt differs from the one that it has most in common with.
    PromptDiffers {
        /// That row.
        row: usize,
        /// The first token that differs, in both.
        at: usize,
    },
    /// It would go on in this row, which other weights drew.
    OtherWeights {
        /// That row.
        row: usize,
    },
    /// It would go on in this row, which was drawn at another temperature.
    OtherTemperature {
        /// That row.
        row: usize,
    },
}

/// The rows of one sequence, those without a trained token included, and where every call went: for people who ask why. It is
/// [`rows`] that does the work, so what is told is what is done.
///
/// # Errors
/// As [`rows_that_fit`].
pub fn placements(sequence: &Sequence) -> Result<(Vec<TrainingRow>, Vec<Placement>), AdapterError> {
    let (mut rows, mut placed) = (vec![], vec![]);
    for stream in STREAMS {
        let first = rows.len();
        let mut of_stream = vec![];
        for part in parts(sequence, stream)? {
            let start = row_start(&of_stream, &part, first);
            let row = first + place(&mut of_stream, &part, 0);
            placed.push(Placement {
                transition: part.transition.id.clone(),
                stream,
                row,
                start,
                completion_from: part.tokens.prompt_ids.len(),
                completion_tokens: part.tokens.completion_ids.len(),
            });
        }
        rows.extend(of_stream.into_iter().map(|(row, _)| row));
    }
    Ok((rows, placed))
}

const STREAMS: [Stream; 3] = [Stream::Rl, Stream::Ce, Stream::RefKl];

/// A row with its last transition.
type Built = (TrainingRow, TransitionId);

/// Rows of one sequence. A row without a trained token carries nothing and is left out.
fn sequence_rows(sequence: &Sequence, number: u32) -> Result<Vec<Built>, AdapterError> {
    let mut rows = Vec::new();
    for stream in STREAMS {
        let mut of_stream: Vec<Built> = Vec::new();
        for part in parts(sequence, stream)? {
            place(&mut of_stream, &part, number);
        }
        for (row, _) in &mut of_stream {
            // Empty stands for the behaviour's.
            if row.old_log_probs == row.behaviour_log_probs {
                row.old_log_probs.clear();
            }
        }
        rows.extend(of_stream.into_iter().filter(|(row, _)| row.mask.contains(&true)));
    }
    Ok(rows)
}

/// Adds a part to the row that it continues, or to a new one, and says to which.
fn place(of_stream: &mut Vec<Built>, part: &Part<'_>, number: u32) -> usize {
    // The longest one: after parallel calls several rows of the sequence can go on.
    let continued = of_stream.iter_mut().enumerate().filter(|(_, (row, _))| continues(row, part));
    if let Some((index, (row, last))) = continued.max_by_key(|(_, (row, _))| row.ids.len()) {
        append(row, part);
        *last = part.transition.id.clone();
        return index;
    }
    let mut row = TrainingRow {
        sequence: number,
        ids: vec![],
        mask: vec![],
        weights: vec![],
        behaviour_log_probs: vec![],
        old_log_probs: vec![],
        calls: vec![],
        group: part.group,
        stream: part.stream,
        temperature: part.transition.temperature,
        policy_version: part.tokens.policy_version,
        kept: KeptTokens::default(),
    };
    append(&mut row, part);
    of_stream.push((row, part.transition.id.clone()));
    of_stream.len() - 1
}

/// Why a part goes where it goes, before it does. `first` is the number of the stream's first row.
fn row_start(of_stream: &[Built], part: &Part<'_>, first: usize) -> RowStart {
    if of_stream.iter().any(|(row, _)| continues(row, part)) {
        return RowStart::Continues;
    }
    let shared = |row: &TrainingRow| row.ids.iter().zip(&part.tokens.prompt_ids).take_while(|(a, b)| a == b).count();
    let nearest = of_stream.iter().enumerate().map(|(index, (row, _))| (shared(row), index, row));
    // The earliest of those that share most.
    match nearest.rev().max_by_key(|(shared, ..)| *shared) {
        None => RowStart::First,
        Some((at, index, row)) if at < row.ids.len() => RowStart::PromptDiffers { row: first + index, at },
        Some((_, index, row)) if row.policy_version != part.tokens.policy_version => {
            RowStart::OtherWeights { row: first + index }
        }
        Some((_, index, _)) => RowStart::OtherTemperature { row: first + index },
    }
}

/// The entries of one stream, checked, by call, with the two scopes of a transition joined.
fn parts(sequence: &Sequence, stream: Stream) -> Result<Vec<Part<'_>>, AdapterError> {
    let mut entries: Vec<_> = sequence.entries.iter().filter(|(_, entry)| entry.stream == stream).collect();
    entries.sort_by(|(a, _), (b, _)| (a.call_index, &a.id).cmp(&(b.call_index, &b.id)));
    let mut seen = BTreeSet::new();
    let mut parts: Vec<Part<'_>> = Vec::new();
    for (transition, entry) in entries {
        let tokens = check_entry(transition, entry)?;
        if !seen.insert((&transition.id, entry.scope == Scope::Observed)) {
            let transition = transition.id.clone();
            return Err(AdapterError::Duplicate { transition, stream, scope: entry.scope });
        }
        if parts.last().is_none_or(|part| part.transition.id != transition.id) {
            let call = parts.last().map_or(0, |part| part.call.saturating_add(1));
            // What is given and not drawn has no ratio.
            let anchor = if stream == Stream::Ce { None } else { sequence.anchors.get(&transition.id) };
            let (anchor, group) = (anchor.map(|anchor| &**anchor), entry.group);
            parts.push(Part { stream, call, group, transition, tokens, anchor, sampled: None, observed: None });
        }
        if let Some(part) = parts.last_mut() {
            match entry.scope {
                Scope::Sampled => part.sampled = Some(&entry.weights),
                Scope::Observed => part.observed = Some(&entry.weights),
            }
        }
    }
    Ok(parts)
}

/// Checks that an entry makes sense, and returns the tokens that it speaks of.
fn check_entry<'a>(transition: &'a Transition, entry: &BatchEntry) -> Result<&'a TokenData, AdapterError> {
    let id = || transition.id.clone();
    if entry.transition != transition.id {
        return Err(AdapterError::WrongTransition { transition: id(), entry: entry.transition.clone() });
    }
    if let Some(reason) = &transition.not_trainable {
        return Err(AdapterError::NotTrainable { transition: id(), reason: reason.clone() });
    }
    let Some(tokens) = &transition.tokens else {
        return Err(AdapterError::NotTrainable { transition: id(), reason: NotTrainable::NoTokenIds });
    };
    // Every other stream compares with the probability at which a token was drawn.
    if entry.stream != Stream::Ce {
        if entry.scope == Scope::Observed {
            return Err(AdapterError::ObservedStream { transition: id(), stream: entry.stream });
        }
        if transition.is_demonstration() {
            return Err(AdapterError::NoLogProbs { transition: id(), stream: entry.stream });
        }
    }
    let expected = match entry.scope {
        Scope::Sampled => transition.sampled_tokens(),
        Scope::Observed => transition.observed_tokens(),
    };
    let weights: &[f32] = match &entry.weights {
        Weights::Scalar(weight) => std::slice::from_ref(weight),
        Weights::PerToken(weights) if weights.len() == expected => weights,
        Weights::PerToken(weights) => {
            let found = weights.len();
            return Err(AdapterError::WeightCount { transition: id(), scope: entry.scope, expected, found });
        }
    };
    match weights.iter().find(|weight| !weight.is_finite()) {
        Some(value) => Err(AdapterError::WeightNotFinite { transition: id(), value: *value }),
        None => Ok(tokens),
    }
}

/// Whether the part's prompt repeats everything that the row holds.
#[expect(clippy::float_cmp, reason = "rows of one temperature carry the very same number")]
fn continues(row: &TrainingRow, part: &Part<'_>) -> bool {
    row.temperature == part.transition.temperature
        && row.group == part.group
        && row.policy_version == part.tokens.policy_version
        && part.tokens.prompt_ids.starts_with(&row.ids)
}

/// Adds to a row what the part has beyond it.
fn append(row: &mut TrainingRow, part: &Part<'_>) {
    let transition = part.transition;
    let mut observed = part.observed.map(|weights| WeightList::new(weights, transition.observed_tokens()));
    // What the row holds already was covered by an earlier call, and so is not observed in this one.
    for (place, id) in part.tokens.prompt_ids.iter().enumerate() {
        let weight = if place >= transition.observed_from { observed.as_mut().and_then(Iterator::next) } else { None };
        if place >= row.ids.len() {
            push(row, part.call, *id, weight, 0.0, None, &[]);
        }
    }
    let mut sampled = part.sampled.map(|weights| WeightList::new(weights, transition.sampled_tokens()));
    let mut anchor = part.anchor.map(|anchor| anchor.iter().copied());
    for (place, id) in part.tokens.completion_ids.iter().enumerate() {
        let in_scope = transition.mask.is_empty() || transition.mask.get(place).copied().unwrap_or(false);
        let weight = if in_scope { sampled.as_mut().and_then(Iterator::next) } else { None };
        // Only demonstrations lack log-probs, and they are never asked for theirs.
        let log_prob = part.tokens.behaviour_log_probs().get(place).copied().unwrap_or(0.0);
        let old = if in_scope { anchor.as_mut().and_then(Iterator::next) } else { None };
        push(row, part.call, *id, weight, log_prob, old, part.tokens.kept.at(place).unwrap_or_default());
    }
}

/// Weights one after the other.
enum WeightList<'a> {
    Same(f32, usize),
    Each(std::slice::Iter<'a, f32>),
}

impl<'a> WeightList<'a> {
    fn new(weights: &'a Weights, count: usize) -> Self {
        match weights {
            Weights::Scalar(weight) => Self::Same(*weight, count),
            Weights::PerToken(weights) => Self::Each(weights.iter()),
        }
    }
}

impl Iterator for WeightList<'_> {
    type Item = f32;

    fn next(&mut self) -> Option<f32> {
        match self {
            Self::Same(_, 0) => None,
            Self::Same(weight, left) => {
                *left -= 1;
                Some(*weight)
            }
            Self::Each(weights) => weights.next().copied(),
        }
    }
}

/// Adds one token: trained with its weight and log-probs, or context.
fn push(row: &mut TrainingRow, call: u32, id: u32, weight: Option<f32>, log_prob: f32, old: Option<f32>, kept: &[u32]) {
    // Nothing predicts the first token of a row.
    let weight = weight.filter(|_| !row.ids.is_empty());
    let kept = if weight.is_some() { kept } else { &[] };
    if !row.kept.is_empty() || !kept.is_empty() {
        row.kept.keep_all_up_to(row.ids.len());
        row.kept.push(kept);
    }
    row.ids.push(id);
    row.mask.push(weight.is_some());
    row.weights.push(weight.unwrap_or(0.0));
    row.behaviour_log_probs.push(if weight.is_some() { log_prob } else { 0.0 });
    row.old_log_probs.push(if weight.is_some() { old.unwrap_or(log_prob) } else { 0.0 });
    row.calls.push(call);
}
