//! Our spans as OTLP.

use fulgurite_core::attribute;
use fulgurite_core::span::{AttributeValue, Span, SpanKind, SpanStatus};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1 as otlp;

use crate::TelemetryError;

/// Who has recorded: the resource of every request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorder {
    /// Name of the run.
    pub run: String,
    /// Version of Fulgurite.
    pub version: String,
}

fn any(value: AttributeValue) -> AnyValue {
    let value = match value {
        AttributeValue::Text(text) => Value::StringValue(text),
        AttributeValue::Integer(number) => Value::IntValue(number),
        AttributeValue::Boolean(flag) => Value::BoolValue(flag),
        AttributeValue::Number(number) if number.is_finite() => Value::DoubleValue(number),
        // JSON has no word for it.
        AttributeValue::Number(number) => Value::StringValue(number.to_string()),
    };
    AnyValue { value: Some(value) }
}

fn pair(name: &str, value: AttributeValue) -> KeyValue {
    KeyValue { key: name.to_owned(), value: Some(any(value)), ..KeyValue::default() }
}

fn span(span: &Span) -> otlp::Span {
    let trace_id = span.trace_id.0.to_be_bytes().to_vec();
    let (code, message) = match &span.status {
        SpanStatus::Unset => (otlp::status::StatusCode::Unset, String::new()),
        SpanStatus::Ok => (otlp::status::StatusCode::Ok, String::new()),
        SpanStatus::Error(message) => (otlp::status::StatusCode::Error, message.clone()),
    };
    let kind = match span.kind {
        SpanKind::Internal => otlp::span::SpanKind::Internal,
        SpanKind::Client => otlp::span::SpanKind::Client,
    };
    let link = |id: &fulgurite_core::id::SpanId| otlp::span::Link {
        trace_id: trace_id.clone(),
        span_id: id.0.to_be_bytes().to_vec(),
        ..otlp::span::Link::default()
    };
    otlp::Span {
        span_id: span.span_id.0.to_be_bytes().to_vec(),
        parent_span_id: span.parent.map_or_else(Vec::new, |parent| parent.0.to_be_bytes().to_vec()),
        name: span.name.clone(),
        kind: kind.into(),
        start_time_unix_nano: span.start_ns,
        end_time_unix_nano: span.end_ns,
        attributes: span.attributes().into_iter().map(|(name, value)| pair(&name, value)).collect(),
        links: span.links.iter().map(link).collect(),
        status: Some(otlp::Status { code: code.into(), message }),
        trace_id,
        ..otlp::Span::default()
    }
}

/// Spans, usually those of one attempt, as one request.
#[must_use]
pub fn export(recorder: &Recorder, spans: &[Span]) -> ExportTraceServiceRequest {
    let resource = Resource {
        attributes: vec![
            pair(attribute::SERVICE_NAME, "fulgurite".into()),
            pair(attribute::SERVICE_VERSION, recorder.version.as_str().into()),
            pair(attribute::RUN_NAME, recorder.run.as_str().into()),
        ],
        ..Resource::default()
    };
    let scope = InstrumentationScope {
        name: "fulgurite".to_owned(),
        version: recorder.version.clone(),
        ..InstrumentationScope::default()
    };
    let scope_spans =
        otlp::ScopeSpans { scope: Some(scope), spans: spans.iter().map(span).collect(), schema_url: String::new() };
    let resource_spans =
        otlp::ResourceSpans { resource: Some(resource), scope_spans: vec![scope_spans], schema_url: String::new() };
    ExportTraceServiceRequest { resource_spans: vec![resource_spans] }
}

/// The same as one line of JSON, without its end.
///
/// # Errors
/// When the request cannot be written as JSON, which would be a mistake of ours.
pub fn export_json(recorder: &Recorder, spans: &[Span]) -> Result<String, TelemetryError> {
    serde_json::to_string(&export(recorder, spans)).map_err(|error| TelemetryError::Json(error.to_string()))
}
