//! OTLP of others as spans.
//!
//! A trace becomes the spans of one attempt, in the order of their starts, whatever order and however many requests they
//! came in. Everything in it is a guest's word: names that are reserved are filed under `guest.`, and a body says nothing
//! but that a guest has opened and closed it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use fulgurite_core::attribute::guest_name;
use fulgurite_core::id::{AttemptKey, SpanId, TraceId};
use fulgurite_core::span::{Attribute, AttributeValue, Span, SpanBody, SpanKind, SpanStatus};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1 as otlp;

/// Spans that are collected at most: they are held in memory until their traces are whole.
pub const SPANS_MAX: usize = 4 << 20;

/// Why telemetry was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TelemetryError {
    /// It is not OTLP in JSON.
    #[error("it is not an OTLP trace request in JSON: {0}")]
    Json(String),
    /// An id has a wrong length or is 0.
    #[error("span {span:?}: its {what} must be {bytes} bytes that are not all 0, in hexadecimal")]
    Id {
        /// Name of the span, without control characters.
        span: String,
        /// Which id.
        what: &'static str,
        /// Length that it must have.
        bytes: usize,
    },
    /// There are too many spans.
    #[error("there are more than {SPANS_MAX} spans")]
    TooMany,
}

#[derive(Debug)]
struct CollectedSpan {
    id: SpanId,
    parent: Option<SpanId>,
    name: String,
    kind: SpanKind,
    start_ns: u64,
    end_ns: u64,
    status: SpanStatus,
    attributes: Vec<Attribute>,
    links: Vec<SpanId>,
}

/// A trace.
#[derive(Debug)]
pub struct CollectedTrace {
    /// Its id.
    pub trace_id: TraceId,
    spans: Vec<CollectedSpan>,
}

/// Takes requests and sorts their spans by trace.
#[derive(Debug, Default)]
pub struct Collected {
    traces: BTreeMap<TraceId, BTreeMap<SpanId, CollectedSpan>>,
    spans: usize,
    duplicates: u64,
}

impl Collected {
    /// Takes one request in JSON.
    ///
    /// # Errors
    /// When it is no request, or holds something that cannot be kept; then none of it is taken.
    pub fn add_json(&mut self, text: &str) -> Result<(), TelemetryError> {
        // A list would pass for a request without anything in it.
        if !text.trim_start().starts_with('{') {
            return Err(TelemetryError::Json("it does not begin with `{`".to_owned()));
        }
        let request = serde_json::from_str(text).map_err(|error| TelemetryError::Json(error.to_string()))?;
        self.add(request)
    }

    /// Takes one request.
    ///
    /// # Errors
    /// When it holds something that cannot be kept; then none of it is taken.
    pub fn add(&mut self, request: ExportTraceServiceRequest) -> Result<(), TelemetryError> {
        let mut taken = vec![];
        for of_resource in request.resource_spans {
            let resource = of_resource.resource.unwrap_or_default().attributes;
            for span in of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                taken.push(collect(span, &resource)?);
                if self.spans + taken.len() > SPANS_MAX {
                    return Err(TelemetryError::TooMany);
                }
            }
        }
        for (trace, span) in taken {
            let spans = self.traces.entry(trace).or_default();
            // Senders repeat what was not acknowledged.
            if let Entry::Vacant(place) = spans.entry(span.id) {
                place.insert(span);
                self.spans += 1;
            } else {
                self.duplicates += 1;
            }
        }
        Ok(())
    }

    /// Spans that have come more than once and were taken once.
    #[must_use]
    pub const fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// The traces, by their ids.
    #[must_use]
    pub fn into_traces(self) -> Vec<CollectedTrace> {
        let whole = |(trace_id, spans): (TraceId, BTreeMap<SpanId, CollectedSpan>)| {
            let mut spans: Vec<CollectedSpan> = spans.into_values().collect();
            // An outer span that starts with an inner one ends later.
            spans.sort_by_key(|span| (span.start_ns, std::cmp::Reverse(span.end_ns), span.id));
            CollectedTrace { trace_id, spans }
        };
        self.traces.into_iter().map(whole).collect()
    }
}

impl CollectedTrace {
    /// Its spans as those of an attempt.
    #[must_use]
    pub fn spans(&self, attempt: &AttemptKey) -> Vec<Span> {
        let span = |(sequence, span): (u64, &CollectedSpan)| Span {
            attempt: attempt.clone(),
            sequence,
            trace_id: self.trace_id,
            span_id: span.id,
            parent: span.parent,
            name: span.name.clone(),
            kind: span.kind,
            start_ns: span.start_ns,
            end_ns: span.end_ns,
            status: span.status.clone(),
            guest_attributes: span.attributes.clone(),
            links: span.links.clone(),
            body: SpanBody::Guest,
        };
        (0..).zip(&self.spans).map(span).collect()
    }

    /// Start of the first span in nanoseconds since the Unix epoch.
    #[must_use]
    pub fn start_ns(&self) -> u64 {
        self.spans.iter().map(|span| span.start_ns).min().unwrap_or(0)
    }

    /// End of the last span in nanoseconds since the Unix epoch.
    #[must_use]
    pub fn end_ns(&self) -> u64 {
        self.spans.iter().map(|span| span.end_ns).max().unwrap_or(0)
    }
}

fn span_id(bytes: &[u8]) -> Option<SpanId> {
    bytes.try_into().ok().map(u64::from_be_bytes).filter(|id| *id != 0).map(SpanId)
}

fn trace_id(bytes: &[u8]) -> Option<TraceId> {
    bytes.try_into().ok().map(u128::from_be_bytes).filter(|id| *id != 0).map(TraceId)
}

fn collect(span: otlp::Span, resource: &[KeyValue]) -> Result<(TraceId, CollectedSpan), TelemetryError> {
    let name: String = span.name.chars().filter(|c| !c.is_control()).collect();
    let wrong = |what, bytes| TelemetryError::Id { span: name.chars().take(80).collect(), what, bytes };
    let trace = trace_id(&span.trace_id).ok_or_else(|| wrong("trace id", 16))?;
    let id = span_id(&span.span_id).ok_or_else(|| wrong("span id", 8))?;
    let parent = match span.parent_span_id.as_slice() {
        [] => None,
        bytes if bytes.iter().all(|byte| *byte == 0) => None,
        bytes => Some(span_id(bytes).ok_or_else(|| wrong("parent span id", 8))?),
    };
    let kind = otlp::span::SpanKind::try_from(span.kind).unwrap_or(otlp::span::SpanKind::Unspecified);
    let mut attributes: Vec<Attribute> = vec![];
    let mut add = |name: String, value: Option<&AnyValue>| attributes.push((guest_name(&name), attribute(value)));
    for pair in &span.attributes {
        add(pair.key.clone(), pair.value.as_ref());
    }
    if parent.is_none() {
        for pair in resource {
            add(format!("resource.{}", pair.key), pair.value.as_ref());
        }
    }
    if !matches!(kind, otlp::span::SpanKind::Internal | otlp::span::SpanKind::Client) {
        attributes.push(("otel.span.kind".to_owned(), kind.as_str_name().into()));
    }
    if !span.events.is_empty() {
        let text = serde_json::to_string(&span.events).unwrap_or_default();
        attributes.push(("otel.events".to_owned(), text.into()));
    }
    let (own, foreign): (Vec<_>, Vec<_>) =
        span.links.into_iter().partition(|link| trace_id(&link.trace_id) == Some(trace));
    if !foreign.is_empty() {
        let text = serde_json::to_string(&foreign).unwrap_or_default();
        attributes.push(("otel.links".to_owned(), text.into()));
    }
    let status = span.status.unwrap_or_default();
    let collected = CollectedSpan {
        id,
        parent,
        kind: if kind == otlp::span::SpanKind::Client { SpanKind::Client } else { SpanKind::Internal },
        start_ns: span.start_time_unix_nano,
        end_ns: span.end_time_unix_nano,
        status: match otlp::status::StatusCode::try_from(status.code) {
            Ok(otlp::status::StatusCode::Ok) => SpanStatus::Ok,
            Ok(otlp::status::StatusCode::Error) => SpanStatus::Error(status.message),
            _ => SpanStatus::Unset,
        },
        attributes,
        links: own.iter().filter_map(|link| span_id(&link.span_id)).collect(),
        name,
    };
    Ok((trace, collected))
}

/// A value; lists and maps as JSON text.
fn attribute(value: Option<&AnyValue>) -> AttributeValue {
    match value.and_then(|any| any.value.as_ref()) {
        None => AttributeValue::Text(String::new()),
        Some(Value::StringValue(text)) => AttributeValue::Text(text.clone()),
        Some(Value::BoolValue(flag)) => AttributeValue::Boolean(*flag),
        Some(Value::IntValue(number)) => AttributeValue::Integer(*number),
        Some(Value::DoubleValue(number)) => AttributeValue::Number(*number),
        Some(other) => AttributeValue::Text(serde_json::to_string(other).unwrap_or_default()),
    }
}
