//! What makes a recording whole: a fingerprint of every event, and where an attempt was ended from outside.
//!
//! A replay feeds a guest with recorded answers, so an answer that was altered afterwards would come out of the replay just
//! as it went in. What the guest is fed with is therefore fingerprinted when it is recorded. The fingerprints of all events
//! stand in the attempt's root event, the root's own last; they are checked before anything is replayed, and name the event
//! that is not what it was.
//!
//! A fingerprint is 64 bits wide and changes with certainty when a single byte or number of an event does. It
//! finds damage and mistakes, not forgers: whoever can write a store can write its fingerprints. A cryptographic hash was
//! rejected because it costs as much as everything else that recording an event costs.

use std::fmt::Write as _;

use serde::Serialize;

use crate::attribute;
use crate::outcome::OutcomeKind;
use crate::span::{Attribute, AttributeValue, Span, SpanBody};

/// Odd, so that multiplying by it loses nothing (the constant of FxHash).
const FACTOR: u64 = 0x517c_c1b7_2722_0a95;

/// Takes bytes in and keeps 64 bits of them. Every step can be undone, so two inputs that differ in one word end up
/// differing.
#[derive(Debug, Clone, Copy, Default)]
struct Mixer(u64);

impl Mixer {
    fn word(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(FACTOR);
    }
}

impl postcard::ser_flavors::Flavor for Mixer {
    type Output = u64;

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.word(u64::from(byte) | 1 << 56);
        Ok(())
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.word(u64::from_le_bytes(*word));
        }
        if !rest.is_empty() {
            let last = rest.iter().rev().fold(rest.len() as u64, |word, byte| word << 8 | u64::from(*byte));
            self.word(last);
        }
        Ok(())
    }

    fn finalize(self) -> postcard::Result<u64> {
        Ok(self.0)
    }
}

/// The fingerprint of an event. Whose it is does not count, because the events of a fork's ancestor are its own, too; nor do
/// the fingerprints that a root event carries.
#[must_use]
pub fn fingerprint(span: &Span) -> u64 {
    let carried: Vec<&Attribute> =
        span.guest_attributes.iter().filter(|(name, _)| name != attribute::RECORDING_FINGERPRINTS).collect();
    let identity = (span.sequence, span.trace_id, span.span_id, span.parent);
    let shape = (&span.name, span.kind, span.start_ns, span.end_ns, &span.status, &span.links);
    of(&(identity, shape, carried, &span.body))
}

fn of(value: &impl Serialize) -> u64 {
    // Nothing in a span can fail to be encoded, and the mixer takes whatever comes.
    postcard::serialize_with_flavor(value, Mixer::default()).unwrap_or_default()
}

/// The attribute of a root event that carries the fingerprints of all events, the root's last.
#[must_use]
pub fn fingerprints_attribute(fingerprints: &[u64]) -> Attribute {
    let mut text = String::with_capacity(fingerprints.len() * 16);
    for fingerprint in fingerprints {
        let _ = write!(text, "{fingerprint:016x}");
    }
    (attribute::RECORDING_FINGERPRINTS.to_owned(), AttributeValue::Text(text))
}

/// The first event of a recording that is not what was recorded; `None` when all are, or when the recording has no end that
/// could say so.
#[must_use]
pub fn first_altered(spans: &[Span], fingerprints: &[u64]) -> Option<usize> {
    let root = spans.last().filter(|span| matches!(span.body, SpanBody::Attempt(_)))?;
    let carried = root.guest_attributes.iter().find(|(name, _)| name == attribute::RECORDING_FINGERPRINTS);
    let AttributeValue::Text(text) = carried.map(|(_, value)| value)? else { return Some(spans.len() - 1) };
    let (carried, rest) = text.as_bytes().as_chunks::<16>();
    let said = |digits: &[u8; 16]| {
        let digits = std::str::from_utf8(digits).ok()?;
        // As it is written, and not as it could be read: `A` for `a` is another byte.
        u64::from_str_radix(digits, 16).ok().filter(|number| format!("{number:016x}") == digits)
    };
    let differs = carried.iter().zip(fingerprints).position(|(digits, found)| said(digits) != Some(*found));
    let complete = carried.len() == spans.len() && rest.is_empty() && fingerprints.len() == spans.len();
    differs.or_else(|| (!complete).then(|| carried.len().min(spans.len()).saturating_sub(1)))
}

/// Where an attempt was ended from outside: by a limit on time, by whoever cancelled it, or by a fault of the host.
///
/// When that happens depends on the machine, so it is recorded how far the guest had come: which event was next, and how
/// many things it had done that anybody could notice, whether they caused an event or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Sequence of the first event that was not the guest's doing any more.
    pub event: u64,
    /// Things that the guest had done.
    pub acts: u64,
}

impl Cut {
    /// Whether an attempt with this outcome was ended from outside. What happens inside a guest repeats; this does not.
    #[must_use]
    pub const fn applies_to(kind: OutcomeKind) -> bool {
        matches!(
            kind,
            OutcomeKind::CpuLimit
                | OutcomeKind::WallTimeout
                | OutcomeKind::Cancelled
                | OutcomeKind::Unresponsive
                | OutcomeKind::HostFault
        )
    }

    /// The attributes of a root event that say so.
    #[must_use]
    pub fn attributes(self) -> Vec<Attribute> {
        vec![
            (attribute::RECORDING_CUT_EVENT.to_owned(), self.event.into()),
            (attribute::RECORDING_CUT_ACTS.to_owned(), self.acts.into()),
        ]
    }

    /// What a root event says.
    #[must_use]
    pub fn of_root(root: &Span) -> Option<Self> {
        let number = |name: &str| {
            root.guest_attributes.iter().find(|(given, _)| given == name).and_then(|(_, value)| match value {
                AttributeValue::Integer(number) => u64::try_from(*number).ok(),
                _ => None,
            })
        };
        Some(Self { event: number(attribute::RECORDING_CUT_EVENT)?, acts: number(attribute::RECORDING_CUT_ACTS)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{AttemptKey, AttemptNumber, RolloutId, SpanId, TraceId};
    use crate::outcome::AttemptOutcome;
    use crate::span::{SpanKind, SpanStatus};

    fn span(sequence: u64, body: SpanBody) -> Span {
        Span {
            attempt: AttemptKey { rollout: RolloutId::new("r").unwrap(), attempt: AttemptNumber::FIRST },
            sequence,
            trace_id: TraceId(1),
            span_id: SpanId(sequence + 1),
            parent: None,
            name: "event".to_owned(),
            kind: SpanKind::Internal,
            start_ns: 5,
            end_ns: 7,
            status: SpanStatus::Unset,
            guest_attributes: vec![],
            links: vec![],
            body,
        }
    }

    fn recording(values: &[f64]) -> Vec<Span> {
        let of = |(sequence, value): (usize, &f64)| {
            let attributes = vec![("value".to_owned(), AttributeValue::Number(*value))];
            Span { guest_attributes: attributes, ..span(sequence as u64, SpanBody::Annotation) }
        };
        let mut spans: Vec<Span> = values.iter().enumerate().map(of).collect();
        let cut = Cut { event: 1, acts: 9 }.attributes();
        let root = span(values.len() as u64, SpanBody::Attempt(AttemptOutcome::completed("1".to_owned())));
        spans.push(Span { guest_attributes: cut, ..root });
        let fingerprints: Vec<u64> = spans.iter().map(fingerprint).collect();
        spans.last_mut().unwrap().guest_attributes.push(fingerprints_attribute(&fingerprints));
        spans
    }

    fn altered(spans: &[Span]) -> Option<usize> {
        first_altered(spans, &spans.iter().map(fingerprint).collect::<Vec<_>>())
    }

    #[test]
    fn every_bit_of_a_number_counts_and_the_altered_event_is_named() {
        let whole = recording(&[0.0, f64::NAN, 1.0]);
        assert_eq!(altered(&whole), None);
        assert_eq!(Cut::of_root(whole.last().unwrap()), Some(Cut { event: 1, acts: 9 }));
        for (place, value) in [0.0, f64::NAN, 1.0].into_iter().enumerate() {
            for bit in 0..64 {
                let mut damaged = whole.clone();
                let flipped = f64::from_bits(value.to_bits() ^ 1 << bit);
                damaged[place].guest_attributes[0].1 = AttributeValue::Number(flipped);
                assert_eq!(altered(&damaged), Some(place), "bit {bit}");
            }
        }
    }

    #[test]
    fn the_fingerprints_themselves_are_covered() {
        let whole = recording(&[1.0, 2.0]);
        let AttributeValue::Text(text) = whole[2].guest_attributes[2].1.clone() else { panic!("{whole:?}") };
        let with = |text: String| {
            let mut damaged = whole.clone();
            damaged[2].guest_attributes[2].1 = AttributeValue::Text(text);
            altered(&damaged)
        };
        for place in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[place] ^= 1;
            assert_eq!(with(String::from_utf8(bytes).unwrap()), Some(place / 16), "{place}");
        }
        assert!(with(text.to_uppercase()).is_some() || text.to_uppercase() == text);
        assert_eq!(with(text[..32].to_owned()), Some(1));
        assert_eq!(with(format!("{text}0")), Some(2));
        assert_eq!(with(String::new()), Some(0));
        let mut damaged = whole.clone();
        damaged[2].guest_attributes[0].1 = AttributeValue::Integer(2);
        assert_eq!(altered(&damaged), Some(2));
    }
}
