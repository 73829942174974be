//! A traced request as filters see it: steps that they begin, and that are told to a collector when they are over.
//!
//! Whether a request is traced, and how spans travel, is the connection manager's. A request that is not traced has no
//! [`Trace`], and pays for nothing here.

use crate::error::Flag;
use http::{HeaderName, HeaderValue, Version};
use outrigger_xds::otlp::{Attribute, Kind, Span, SpanId, TraceId, Value};
use rand::RngCore;
use std::{
    borrow::Cow,
    sync::Arc,
    time::{Instant, SystemTime},
};

/// W3C's trace context.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Bytes of each text of a span: a client can make some of them as long as its head.
pub const TEXT_BYTES_MAX: usize = 1024;

/// Takes spans that are over. Never waits: what it cannot take is lost, and counted.
pub trait Sink: Send + Sync {
    /// One of them.
    fn take(&self, span: Span);
}

/// What all spans of a request at this proxy share.
pub struct Trace {
    /// The trace that it belongs to.
    pub id: TraceId,
    /// The span of the request itself.
    pub server: SpanId,
    /// `tracestate` as it came; may be empty.
    pub state: Arc<str>,
    /// Attributes of all spans, whatever else is told under their names: Envoy's custom tags.
    pub tags: Arc<[Attribute]>,
    /// Each attempt has a span of its own.
    pub per_attempt: bool,
    /// Who takes them.
    pub sink: Arc<dyn Sink>,
}

impl Trace {
    /// Begins a step of the request.
    #[must_use]
    pub fn child(self: &Arc<Self>, name: impl Into<Cow<'static, str>>, kind: Kind) -> Step {
        let now = SystemTime::now();
        Step {
            span: Box::new(Span {
                trace_id: self.id,
                id: new_span_id(),
                parent: Some(self.server),
                state: self.state.clone(),
                name: name.into(),
                kind,
                start: now,
                end: now,
                attributes: Vec::new(),
                failed: false,
            }),
            tags: self.tags.clone(),
            sink: self.sink.clone(),
            unanswered: false,
        }
    }
}

/// A step that goes on until this is dropped.
pub struct Step {
    span: Box<Span>,
    tags: Arc<[Attribute]>,
    sink: Arc<dyn Sink>,
    /// It asked, and there is no answer yet.
    unanswered: bool,
}

impl Step {
    /// Goes on with a span of `trace` that somebody else began.
    #[must_use]
    pub fn of(span: Span, trace: &Trace) -> Self {
        Self {
            span: Box::new(span),
            tags: trace.tags.clone(),
            sink: trace.sink.clone(),
            unanswered: false,
        }
    }

    /// It waits for an answer: if none is told before it is over, it was canceled.
    pub fn asks(&mut self) {
        self.unanswered = true;
    }

    /// It began a while ago.
    pub fn began(&mut self, at: Instant) {
        let now = SystemTime::now();
        self.span.start = now.checked_sub(at.elapsed()).unwrap_or(now);
    }

    /// Tells something of it; what was told under this name before is forgotten, since OTLP wants each name once.
    pub fn tell(&mut self, name: &'static str, value: impl Into<Value>) {
        self.put((name.into(), value.into()));
    }

    fn put(&mut self, (name, value): Attribute) {
        let attributes = &mut self.span.attributes;
        match attributes.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = value,
            None => attributes.push((name, value)),
        }
    }

    /// Tells it if it is known.
    pub fn tell_some(&mut self, name: &'static str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.tell(name, value);
        }
    }

    /// It failed: Envoy's tag, and OTLP's status.
    pub fn fail(&mut self) {
        self.span.failed = true;
        self.tell("error", "true");
    }

    /// How it was answered, in Envoy's tags; 0 is not at all.
    pub fn answered(&mut self, code: u16, flags: &[Flag]) {
        self.unanswered = false;
        self.tell("http.status_code", code.to_string());
        self.tell("response_flags", short(flags));
        if code == 0 || code >= 500 {
            self.fail();
        }
    }

    /// Nobody waits for it any more: Envoy's tag, and an error, since nobody knows how it would have ended.
    pub fn cancel(&mut self) {
        self.tell("canceled", "true");
        self.fail();
    }

    /// What says upstream that it belongs to this step.
    #[must_use]
    pub fn traceparent(&self) -> HeaderValue {
        traceparent(&self.span.trace_id, &self.span.id)
    }

    /// Its name, if it turns out to be another.
    pub fn rename(&mut self, name: impl Into<Cow<'static, str>>) {
        self.span.name = name.into();
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if self.unanswered {
            self.answered(0, &[]);
            self.cancel();
        }
        let tags = self.tags.clone();
        for tag in tags.iter() {
            self.put(tag.clone());
        }
        let nothing = Span {
            attributes: Vec::new(),
            state: self.span.state.clone(),
            name: Cow::Borrowed(""),
            ..*self.span
        };
        let mut span = std::mem::replace(&mut *self.span, nothing);
        span.end = SystemTime::now();
        span.bound(TEXT_BYTES_MAX);
        self.sink.take(span);
    }
}

/// Envoy's short form of flags.
fn short(flags: &[Flag]) -> Value {
    match flags {
        [] => "-".into(),
        [only] => only.as_str().into(),
        several => {
            let names: Vec<_> = several.iter().map(|flag| flag.as_str()).collect();
            names.join(",").into()
        }
    }
}

/// An id that no other span has.
#[must_use]
pub fn new_span_id() -> SpanId {
    let mut id = SpanId::default();
    rand::rng().fill_bytes(&mut id);
    id
}

/// W3C trace context of a span that is sampled.
#[must_use]
pub fn traceparent(trace: &TraceId, span: &SpanId) -> HeaderValue {
    let mut bytes = [0; 24];
    bytes[..16].copy_from_slice(trace);
    bytes[16..].copy_from_slice(span);
    let form = b"00-00000000000000000000000000000000-0000000000000000-01";
    Id::write(*form, 3, &bytes).value()
}

/// How HTTP was spoken, as spans tell it.
#[must_use]
pub fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_2 => "HTTP/2",
        Version::HTTP_10 => "HTTP/1.0",
        _ => "HTTP/1.1",
    }
}

/// An identifier of this many characters of ASCII, made without an allocation.
#[derive(Debug, Clone, Copy)]
pub struct Id<const LENGTH: usize>([u8; LENGTH]);

impl<const LENGTH: usize> Id<LENGTH> {
    /// Writes `bytes` as hexadecimal digits over the form's, from `from` on; its dashes stay.
    #[must_use]
    pub fn write(mut form: [u8; LENGTH], from: usize, bytes: &[u8]) -> Self {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut places = form[from..].iter_mut().filter(|place| **place != b'-');
        for byte in bytes {
            for half in [byte >> 4, byte & 15] {
                if let Some(place) = places.next() {
                    *place = DIGITS[usize::from(half)];
                }
            }
        }
        Self(form)
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("invariant: digits and dashes")
    }

    /// As a header.
    #[must_use]
    pub fn value(&self) -> HeaderValue {
        HeaderValue::from_bytes(&self.0).expect("invariant: digits and dashes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Kept(Mutex<Vec<Span>>);

    impl Sink for Kept {
        fn take(&self, span: Span) {
            self.0.lock().unwrap().push(span);
        }
    }

    fn trace(kept: &Arc<Kept>, tags: &[Attribute]) -> Arc<Trace> {
        Arc::new(Trace {
            id: [0xab; 16],
            server: [1; 8],
            state: "k=v".into(),
            tags: tags.into(),
            per_attempt: true,
            sink: kept.clone(),
        })
    }

    /// What the only span says under a name, as often as it says it.
    fn said(kept: &Kept, name: &str) -> Vec<Value> {
        let spans = kept.0.lock().unwrap();
        let [span] = &spans[..] else {
            panic!("{spans:?}")
        };
        let named = span.attributes.iter().filter(|(known, _)| known == name);
        named.map(|(_, value)| value.clone()).collect()
    }

    #[test]
    fn each_name_is_told_once_and_a_custom_tag_has_the_last_word() {
        let kept = Arc::new(Kept::default());
        let tags = [("component".into(), "mine".into())];
        let mut step = trace(&kept, &tags).child("router", Kind::Client);
        step.tell("component", "proxy");
        step.answered(200, &[]);
        step.answered(0, &[Flag::UpstreamRemoteReset]);
        step.fail();
        drop(step);
        assert_eq!(said(&kept, "component"), ["mine".into()]);
        assert_eq!(said(&kept, "http.status_code"), ["0".to_owned().into()]);
        assert_eq!(said(&kept, "response_flags"), ["UR".into()]);
        assert_eq!(said(&kept, "error"), ["true".into()]);
    }

    #[test]
    fn what_asked_and_was_not_answered_was_canceled() {
        for answered in [false, true] {
            let kept = Arc::new(Kept::default());
            let mut step = trace(&kept, &[]).child("router", Kind::Client);
            step.asks();
            if answered {
                step.answered(200, &[]);
            }
            drop(step);
            let code = if answered { "200" } else { "0" };
            assert_eq!(said(&kept, "http.status_code"), [code.to_owned().into()]);
            let canceled = said(&kept, "canceled");
            assert_eq!(canceled.is_empty(), answered, "{canceled:?}");
            assert_eq!(kept.0.lock().unwrap()[0].failed, !answered);
        }
    }

    #[test]
    fn a_text_is_cut() {
        let kept = Arc::new(Kept::default());
        let mut step = trace(&kept, &[]).child("n".repeat(5000), Kind::Client);
        step.tell("user_agent", "u".repeat(5000));
        drop(step);
        assert_eq!(said(&kept, "user_agent"), ["u".repeat(1024).into()]);
        assert_eq!(kept.0.lock().unwrap()[0].name.len(), 1024);
    }

    #[test]
    fn a_step_is_told_once_when_it_is_over() {
        let kept = Arc::new(Kept::default());
        let mut step = trace(&kept, &[("zone".into(), "a".into())]).child("router", Kind::Client);
        step.answered(
            503,
            &[Flag::UpstreamConnectionFailure, Flag::UpstreamOverflow],
        );
        let told = step.traceparent().to_str().unwrap().to_owned();
        assert!(kept.0.lock().unwrap().is_empty(), "it goes on");
        drop(step);
        let spans = kept.0.lock().unwrap();
        let [span] = &spans[..] else {
            panic!("{spans:?}")
        };
        assert_eq!((span.parent, span.failed), (Some([1; 8]), true));
        assert_eq!((&*span.name, &*span.state), ("router", "k=v"));
        let id: String = span.id.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(told, format!("00-{}-{id}-01", "ab".repeat(16)));
        let flags = ("response_flags".into(), "UF,UO".to_owned().into());
        assert!(span.attributes.contains(&flags), "{span:?}");
    }
}
