//! Which records to list: filters, order and pages.
//!
//! A page ends with a cursor when there may be more. A cursor names a place in the order and not a count, so records that
//! are added or change meanwhile neither repeat nor hide others.

use std::fmt;
use std::str::FromStr;

use fulgurite_core::id::{AttemptNumber, RolloutId};
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::record::{AttemptRecord, RolloutMode, RolloutRecord};
use fulgurite_core::reward::DEFAULT_DIMENSION;
use fulgurite_core::span::{Span, SpanBody};
use fulgurite_core::state::{AttemptState, RolloutState};

/// Items of a page when the query does not say.
pub const PAGE_ITEMS_DEFAULT: usize = 100;
/// Most items of a page: bounds its memory.
pub const PAGE_ITEMS_MAX: usize = 10_000;

/// A place in a list. As text it can be handed on and come back.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor(pub(crate) Vec<u8>);

/// A text that is no cursor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a cursor: use one that a page has ended with")]
pub struct InvalidCursor(String);

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Cursor {
    type Err = InvalidCursor;
    fn from_str(text: &str) -> Result<Self, InvalidCursor> {
        let bytes = crate::hex::decode(text).filter(|bytes| !bytes.is_empty());
        bytes.map(Self).ok_or_else(|| InvalidCursor(text.chars().filter(|c| !c.is_control()).take(80).collect()))
    }
}

/// Some items of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct Page<T> {
    /// The items.
    pub items: Vec<T>,
    /// Where to go on; `None` at the end. A page may hold fewer items than asked for, even none, and still not be the
    /// last: the work for one page is bounded too.
    pub next: Option<Cursor>,
}

/// What rollouts are ordered by. Those that are equal keep the order in which they were enqueued.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RolloutSort {
    /// When they were enqueued: one page costs what it shows.
    #[default]
    Ordinal,
    /// Id: one page costs what it shows.
    Id,
    /// Reward of the newest attempt; those without come first. Each page reads every rollout.
    Reward,
    /// Spans of the newest attempt. Each page reads every rollout.
    Spans,
    /// Wall-clock time of the newest attempt; those without an end come first. Each page reads every rollout.
    Duration,
}

/// Which rollouts to list. Fields that are `None` do not filter.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RolloutQuery {
    /// Only those of this pipeline stage.
    pub stage: Option<String>,
    /// Only those of this step.
    pub step: Option<u64>,
    /// Only those in this state.
    pub state: Option<RolloutState>,
    /// Only those of this mode.
    pub mode: Option<RolloutMode>,
    /// Only those of this dataset item.
    pub item: Option<String>,
    /// Only those whose newest attempt ended like this.
    pub outcome: Option<OutcomeKind>,
    /// Only those with at least this reward; those without any do not fit.
    pub reward_min: Option<f64>,
    /// Only those with at most this reward; those without any do not fit.
    pub reward_max: Option<f64>,
    /// Only forks of this rollout.
    pub fork_of: Option<RolloutId>,
    /// In which order.
    pub sort: RolloutSort,
    /// Whether the order is turned round.
    pub descending: bool,
    /// Only what comes after this place.
    pub after: Option<Cursor>,
    /// How many that fit are skipped first. A cursor costs less.
    pub offset: usize,
    /// How many are returned at most.
    pub limit: Option<usize>,
}

/// A rollout with its newest attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct RolloutRow {
    /// The rollout.
    pub rollout: RolloutRecord,
    /// Its newest attempt.
    pub attempt: Option<AttemptRecord>,
}

impl RolloutRow {
    /// Sum of the newest attempt's rewards in the dimension that algorithms read; `None` without a reward.
    #[must_use]
    pub fn reward(&self) -> Option<f64> {
        self.attempt.as_ref().and_then(reward_of)
    }

    /// Wall-clock time of the newest attempt in nanoseconds; `None` while it is live.
    #[must_use]
    pub fn duration_ns(&self) -> Option<u64> {
        let attempt = self.attempt.as_ref()?;
        (attempt.end_unix_ns > 0).then(|| attempt.end_unix_ns.saturating_sub(attempt.start_unix_ns))
    }
}

/// Sum of an attempt's rewards in the dimension that algorithms read; `None` without any reward.
#[must_use]
pub fn reward_of(attempt: &AttemptRecord) -> Option<f64> {
    let own = attempt.rewards.iter().filter(|reward| reward.dimension == DEFAULT_DIMENSION);
    (!attempt.rewards.is_empty()).then(|| own.map(|reward| reward.value).sum())
}

impl RolloutQuery {
    /// Whether a rollout fits; order and page aside.
    #[must_use]
    pub fn fits(&self, row: &RolloutRow) -> bool {
        let spec = &row.rollout.spec;
        self.stage.as_ref().is_none_or(|stage| *stage == spec.stage)
            && self.step.is_none_or(|step| step == spec.step)
            && self.state.is_none_or(|state| state == row.rollout.state)
            && self.mode.is_none_or(|mode| mode == spec.mode)
            && self.item.as_ref().is_none_or(|item| *item == spec.item_id)
            && self.fork_of.as_ref().is_none_or(|id| spec.fork_of.as_ref().is_some_and(|fork| fork.rollout == *id))
            && self.outcome.is_none_or(|kind| {
                row.attempt.as_ref().and_then(|attempt| attempt.outcome.as_ref()).is_some_and(|end| end.kind == kind)
            })
            && self.reward_min.is_none_or(|min| row.reward().is_some_and(|reward| reward >= min))
            && self.reward_max.is_none_or(|max| row.reward().is_some_and(|reward| reward <= max))
    }

    /// The place of a rollout in the order.
    pub(crate) fn place(&self, row: &RolloutRow) -> Cursor {
        let mut place = match self.sort {
            RolloutSort::Ordinal => vec![],
            RolloutSort::Id => return Cursor(row.rollout.spec.id.as_str().as_bytes().to_vec()),
            RolloutSort::Reward => optional(row.reward().map(ordered)),
            RolloutSort::Spans => optional(row.attempt.as_ref().map(|attempt| attempt.spans)),
            RolloutSort::Duration => optional(row.duration_ns()),
        };
        place.extend(row.rollout.ordinal.to_be_bytes());
        Cursor(place)
    }
}

fn optional(number: Option<u64>) -> Vec<u8> {
    let mut place = vec![u8::from(number.is_some())];
    place.extend(number.unwrap_or(0).to_be_bytes());
    place
}

/// The bits of a number, changed so that they are ordered as the numbers are.
fn ordered(number: f64) -> u64 {
    let bits = number.to_bits();
    if bits >> 63 == 0 { bits | 1 << 63 } else { !bits }
}

/// Which attempts to list, in the order of their rollouts and their numbers. Fields that are `None` do not filter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttemptQuery {
    /// Only those of this rollout.
    pub rollout: Option<RolloutId>,
    /// Only those in this state.
    pub state: Option<AttemptState>,
    /// Only those that ended like this.
    pub outcome: Option<OutcomeKind>,
    /// Only those that this worker ran.
    pub worker: Option<String>,
    /// Whether the order is turned round.
    pub descending: bool,
    /// Only what comes after this place.
    pub after: Option<Cursor>,
    /// How many are returned at most.
    pub limit: Option<usize>,
}

impl AttemptQuery {
    /// Whether an attempt fits; the rollout aside.
    pub(crate) fn fits(&self, attempt: &AttemptRecord) -> bool {
        self.state.is_none_or(|state| state == attempt.state)
            && self.outcome.is_none_or(|kind| attempt.outcome.as_ref().is_some_and(|end| end.kind == kind))
            && self.worker.as_ref().is_none_or(|worker| *worker == attempt.worker)
    }
}

/// What a span is about, by the names of its JSON form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BodyKind {
    /// The whole attempt.
    Attempt,
    /// An LLM call.
    Llm,
    /// A list of tools.
    ToolList,
    /// A tool call.
    Tool,
    /// A prompt template.
    Template,
    /// A reward.
    Reward,
    /// A grading.
    Grade,
    /// A message for people.
    Message,
    /// A named JSON value.
    Object,
    /// Attributes only.
    Annotation,
    /// A line of log.
    Log,
    /// A guest's own span.
    Guest,
    /// Any other host call.
    HostCall,
}

impl BodyKind {
    /// Every kind.
    pub const ALL: [Self; 13] = [
        Self::Attempt,
        Self::Llm,
        Self::ToolList,
        Self::Tool,
        Self::Template,
        Self::Reward,
        Self::Grade,
        Self::Message,
        Self::Object,
        Self::Annotation,
        Self::Log,
        Self::Guest,
        Self::HostCall,
    ];

    /// The kind of a body.
    #[must_use]
    pub const fn of(body: &SpanBody) -> Self {
        match body {
            SpanBody::Attempt(_) => Self::Attempt,
            SpanBody::Llm(_) => Self::Llm,
            SpanBody::ToolList(_) => Self::ToolList,
            SpanBody::Tool { .. } => Self::Tool,
            SpanBody::Template { .. } => Self::Template,
            SpanBody::Reward(_) => Self::Reward,
            SpanBody::Grade { .. } => Self::Grade,
            SpanBody::Message(_) => Self::Message,
            SpanBody::Object { .. } => Self::Object,
            SpanBody::Annotation => Self::Annotation,
            SpanBody::Log { .. } => Self::Log,
            SpanBody::Guest => Self::Guest,
            SpanBody::HostCall { .. } => Self::HostCall,
        }
    }

    /// The kind's name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Attempt => "attempt",
            Self::Llm => "llm",
            Self::ToolList => "tool_list",
            Self::Tool => "tool",
            Self::Template => "template",
            Self::Reward => "reward",
            Self::Grade => "grade",
            Self::Message => "message",
            Self::Object => "object",
            Self::Annotation => "annotation",
            Self::Log => "log",
            Self::Guest => "guest",
            Self::HostCall => "host_call",
        }
    }
}

/// Which spans of an attempt to list, by sequence. Fields that are `None` do not filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanQuery {
    /// The rollout.
    pub rollout: RolloutId,
    /// Which attempt of it; `None` is the newest.
    pub attempt: Option<AttemptNumber>,
    /// Only those about this.
    pub kind: Option<BodyKind>,
    /// Only those of this name.
    pub name: Option<String>,
    /// Only those with this text in their name or anywhere in what they say, upper and lower case told apart.
    pub contains: Option<String>,
    /// Only what comes after this place.
    pub after: Option<Cursor>,
    /// How many are returned at most.
    pub limit: Option<usize>,
}

impl SpanQuery {
    /// All spans of a rollout's newest attempt.
    #[must_use]
    pub const fn of(rollout: RolloutId) -> Self {
        Self { rollout, attempt: None, kind: None, name: None, contains: None, after: None, limit: None }
    }

    pub(crate) fn fits(&self, span: &Span) -> bool {
        self.kind.is_none_or(|kind| kind == BodyKind::of(&span.body))
            && self.name.as_ref().is_none_or(|name| *name == span.name)
            && self.contains.as_ref().is_none_or(|text| crate::span_text::contains(span, text))
    }
}

/// Which published prompt templates to list, by version. Fields that are `None` do not filter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResourceQuery {
    /// Only versions that published this template.
    pub name: Option<String>,
    /// Whether the newest comes first.
    pub descending: bool,
    /// Only what comes after this place.
    pub after: Option<Cursor>,
    /// How many are returned at most.
    pub limit: Option<usize>,
}

/// Which workers to list, by id. Fields that are `None` do not filter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkerQuery {
    /// Only those heard of at this time or later, in nanoseconds since the Unix epoch.
    pub alive_since_unix_ns: Option<u64>,
    /// Whether the order is turned round.
    pub descending: bool,
    /// Only what comes after this place.
    pub after: Option<Cursor>,
    /// How many are returned at most.
    pub limit: Option<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_their_places_have_one_order() {
        let numbers = [f64::NEG_INFINITY, -2.5, -1e-300, -0.0, 0.0, 1e-300, 0.5, 1.0, f64::INFINITY];
        assert!(numbers.windows(2).all(|pair| ordered(pair[0]) < ordered(pair[1])));
        assert!(optional(None) < optional(Some(0)));
    }

    #[test]
    fn a_cursor_comes_back_from_text_and_other_text_is_refused() {
        let cursor = Cursor(vec![0, 255, 16]);
        assert_eq!(cursor.to_string().parse(), Ok(cursor));
        for text in ["", "0", "0g", "zz", "1 "] {
            let error = text.parse::<Cursor>().unwrap_err().to_string();
            assert_eq!(error, format!("`{text}` is not a cursor: use one that a page has ended with"));
        }
    }
}
