//! Spans, and how a collector is told of them: OTLP's messages, without the way they travel.
//!
//! The format is that of `opentelemetry-proto` 1: one `ExportTraceServiceRequest` a batch.

use crate::wire::opentelemetry::proto::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value},
    resource::v1::Resource,
    trace::v1 as wire,
};
use prost::Message;
use std::{
    borrow::Cow,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// Of all spans with the same one.
pub type TraceId = [u8; 16];
/// Of one span.
pub type SpanId = [u8; 8];
/// Name and value.
pub type Attribute = (Cow<'static, str>, Value);

/// One step of a trace.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// Shared by all steps.
    pub trace_id: TraceId,
    /// Its own.
    pub id: SpanId,
    /// The step that it is part of.
    pub parent: Option<SpanId>,
    /// `tracestate` as it came; may be empty.
    pub state: Arc<str>,
    /// What is done.
    pub name: Cow<'static, str>,
    /// Whose side of a call it is.
    pub kind: Kind,
    /// When it began.
    pub start: SystemTime,
    /// When it was over.
    pub end: SystemTime,
    /// What is told of it.
    pub attributes: Vec<Attribute>,
    /// It failed.
    pub failed: bool,
}

impl Span {
    /// Cuts each of its texts.
    pub fn bound(&mut self, bytes_max: usize) {
        cut(&mut self.name, bytes_max);
        for (name, value) in &mut self.attributes {
            cut(name, bytes_max);
            value.bound(bytes_max);
        }
    }

    /// What it takes in memory, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let attribute = |(name, value): &Attribute| {
            let text = value.text().map_or(0, str::len);
            size_of::<Attribute>() + name.len() + text
        };
        let attributes: usize = self.attributes.iter().map(attribute).sum();
        size_of::<Self>() + self.name.len() + self.state.len() + attributes
    }
}

/// Leaves the beginning of a text, in whole characters.
fn cut(text: &mut Cow<'static, str>, bytes_max: usize) {
    let end = text.floor_char_boundary(bytes_max);
    match text {
        Cow::Borrowed(whole) => *whole = &whole[..end],
        // Also gives back what a text that was longer took.
        Cow::Owned(whole) if end < whole.len() => *text = Cow::Owned(whole[..end].to_owned()),
        Cow::Owned(_) => {}
    }
}

/// Whose side of a call a span is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// No call.
    Internal,
    /// The one that answers.
    Server,
    /// The one that asks.
    Client,
}

/// A value of an attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Text.
    Text(Cow<'static, str>),
    /// Text that others hold too.
    Shared(Arc<str>),
    /// A number.
    Int(i64),
    /// A number.
    Real(f64),
}

impl Value {
    fn bound(&mut self, bytes_max: usize) {
        match self {
            Self::Text(text) => cut(text, bytes_max),
            Self::Shared(text) if text.len() > bytes_max => {
                *text = text[..text.floor_char_boundary(bytes_max)].into();
            }
            Self::Shared(_) | Self::Int(_) | Self::Real(_) => {}
        }
    }

    fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Shared(text) => Some(text),
            Self::Int(_) | Self::Real(_) => None,
        }
    }
}

impl From<&'static str> for Value {
    fn from(text: &'static str) -> Self {
        Self::Text(Cow::Borrowed(text))
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(Cow::Owned(text))
    }
}

impl From<Arc<str>> for Value {
    fn from(text: Arc<str>) -> Self {
        Self::Shared(text)
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Int(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Real(number)
    }
}

impl From<Value> for AnyValue {
    fn from(plain: Value) -> Self {
        use any_value::Value as Any;
        let value = match plain {
            Value::Text(text) => Any::StringValue(text.into_owned()),
            Value::Shared(text) => Any::StringValue(text.as_ref().to_owned()),
            Value::Int(number) => Any::IntValue(number),
            Value::Real(number) => Any::DoubleValue(number),
        };
        Self { value: Some(value) }
    }
}

fn attributes(plain: impl IntoIterator<Item = Attribute>) -> Vec<KeyValue> {
    let attribute = |(key, value): Attribute| KeyValue {
        key: key.into_owned(),
        value: Some(value.into()),
    };
    plain.into_iter().map(attribute).collect()
}

fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

impl From<Span> for wire::Span {
    fn from(plain: Span) -> Self {
        use wire::{span::SpanKind, status::StatusCode};
        let kind = match plain.kind {
            Kind::Internal => SpanKind::Internal,
            Kind::Server => SpanKind::Server,
            Kind::Client => SpanKind::Client,
        };
        Self {
            trace_id: plain.trace_id.to_vec(),
            span_id: plain.id.to_vec(),
            trace_state: plain.state.as_ref().to_owned(),
            parent_span_id: plain.parent.map(|id| id.to_vec()).unwrap_or_default(),
            name: plain.name.into_owned(),
            kind: kind.into(),
            start_time_unix_nano: nanos(plain.start),
            end_time_unix_nano: nanos(plain.end),
            attributes: attributes(plain.attributes),
            status: plain.failed.then(|| wire::Status {
                message: String::new(),
                code: StatusCode::Error.into(),
            }),
        }
    }
}

/// A batch of spans of the process that `resource` describes, as one message.
#[must_use]
pub fn request(resource: &[Attribute], spans: Vec<Span>) -> Vec<u8> {
    let scope = InstrumentationScope {
        name: "outrigger".into(),
        version: env!("CARGO_PKG_VERSION").into(),
    };
    let of_us = wire::ScopeSpans {
        scope: Some(scope),
        spans: spans.into_iter().map(Into::into).collect(),
    };
    let request = ExportTraceServiceRequest {
        resource_spans: vec![wire::ResourceSpans {
            resource: Some(Resource {
                attributes: attributes(resource.iter().cloned()),
            }),
            scope_spans: vec![of_us],
        }],
    };
    request.encode_to_vec()
}

/// How many spans a collector did not take, by its answer; `None` if that is no answer.
#[must_use]
pub fn rejected(answer: &[u8]) -> Option<u64> {
    let answer = ExportTraceServiceResponse::decode(answer).ok()?;
    let partial = answer.partial_success.unwrap_or_default();
    Some(u64::try_from(partial.rejected_spans).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::opentelemetry::proto::collector::trace::v1::ExportTracePartialSuccess;
    use std::time::Duration;

    #[test]
    fn a_span_is_told_as_it_is() {
        let start = UNIX_EPOCH + Duration::from_nanos(1_700_000_000_000_000_001);
        let span = Span {
            trace_id: [1; 16],
            id: [2; 8],
            parent: Some([3; 8]),
            state: "a=b".into(),
            name: "ingress".into(),
            kind: Kind::Server,
            start,
            end: start + Duration::from_micros(5),
            attributes: vec![("n".into(), 7_u64.into()), ("t".into(), "x".into())],
            failed: true,
        };
        let root = Span {
            parent: None,
            failed: false,
            ..span.clone()
        };
        let service = [("service.name".into(), Value::from("s"))];
        let message = request(&service, vec![span, root]);
        let read = ExportTraceServiceRequest::decode(&message[..]).unwrap();
        let of_process = &read.resource_spans[0];
        let service = &of_process.resource.as_ref().unwrap().attributes[0];
        assert_eq!(service.key, "service.name");
        let spans = &of_process.scope_spans[0].spans;
        assert_eq!(spans[0].parent_span_id, [3; 8]);
        assert_eq!(spans[0].start_time_unix_nano, 1_700_000_000_000_000_001);
        assert_eq!(spans[0].end_time_unix_nano, 1_700_000_000_000_005_001);
        assert_eq!(spans[0].status.as_ref().unwrap().code, 2);
        assert_eq!(spans[0].attributes.len(), 2);
        assert!(spans[1].parent_span_id.is_empty() && spans[1].status.is_none());
    }

    #[test]
    fn long_texts_are_cut_in_whole_characters_and_short_ones_stay() {
        let long: Value = "é".repeat(8).into();
        let shared: Value = Arc::<str>::from("x".repeat(16)).into();
        let mut span = Span {
            trace_id: [1; 16],
            id: [2; 8],
            parent: None,
            state: "a=b".into(),
            name: "n".repeat(16).into(),
            kind: Kind::Server,
            start: UNIX_EPOCH,
            end: UNIX_EPOCH,
            attributes: vec![
                ("long".into(), long),
                ("shared".into(), shared),
                ("short".into(), "abc".into()),
                ("number".into(), 123_456_u64.into()),
            ],
            failed: false,
        };
        let before = span.bytes();
        span.bound(7);
        assert_eq!(span.name, "n".repeat(7));
        let values: Vec<_> = span.attributes.iter().map(|(_, value)| value).collect();
        assert_eq!(values[0], &"ééé".into());
        assert_eq!(values[1].text(), Some("xxxxxxx"));
        assert_eq!(values[2], &"abc".into());
        assert_eq!(values[3], &123_456_u64.into());
        // 9 bytes of the name, 10 and 9 of the values.
        assert_eq!(before - span.bytes(), 28);
    }

    #[test]
    fn an_answer_tells_what_was_not_taken() {
        assert_eq!(rejected(b""), Some(0));
        assert_eq!(rejected(b"<html>"), None);
        let partial = ExportTracePartialSuccess {
            rejected_spans: 3,
            error_message: "full".into(),
        };
        let answer = ExportTraceServiceResponse {
            partial_success: Some(partial),
        };
        assert_eq!(rejected(&answer.encode_to_vec()), Some(3));
    }
}
