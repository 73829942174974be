//! How a finished request becomes a line of the access log: Envoy's operators and ours, compiled once per
//! configuration.
//!
//! Formatting happens on the request's thread, into a buffer that thread keeps; writing happens on the sink's own
//! thread ([`sink`]), so that a full disk or a stuck pipe never holds up a request. Which requests are logged, a
//! [`Filter`] says.

mod escape;
mod filter;
mod format;
mod operator;
mod sink;
mod start_time;
#[cfg(test)]
mod tests;

pub(crate) use filter::{Answer, Filter};
pub use outrigger_xds::resource::access_log::default_json;
pub use sink::{FLUSH_INTERVAL, QUEUE_BYTES_MAX, Sinks};
pub(crate) use start_time::TimeFormat;

use crate::{headers::FORWARDED_PROTO, tls::TlsFacts};
use format::Template;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version};
use outrigger_filters::{
    end_address::EndAddress, filter::LogFields, matching::HeaderMatcher, runtime::Runtime,
};
use outrigger_xds::resource::{
    listener::{AccessLog, AccessLogFormat},
    log_filter::LogFilter,
};
use sink::Sink;
use std::{
    cell::RefCell,
    sync::Arc,
    time::{Duration, SystemTime},
};

/// A thread's line buffer is given back to the system above this size.
const LINE_BUFFER_BYTES_MAX: usize = 64 * 1024;

thread_local! {
    static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The access logs of one listener.
pub struct AccessLogs {
    logs: Vec<Log>,
    headers: Headers,
}

struct Log {
    filter: Option<Filter>,
    template: Template,
    sink: Arc<Sink>,
}

/// A time as `%START_TIME%` shows it: RFC 3339, with milliseconds.
#[must_use]
pub fn rfc3339(time: SystemTime) -> String {
    let mut text = Vec::new();
    start_time::TimeFormat::default().append(time, &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

/// Names of the headers that the formats need, each with its place in [`Captured`].
#[derive(Debug, Default)]
struct Headers {
    request: Vec<Wanted>,
    response: Vec<HeaderName>,
    /// Conditions on requests, looked at when they come.
    conditions: Vec<HeaderMatcher>,
}

#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Header(HeaderName),
    /// The pseudo header `:scheme`.
    Scheme,
}

/// Headers kept from a request and its response until its line is written; only those that a format names.
#[derive(Debug, Clone, Default)]
pub struct Captured {
    request: Vec<Option<HeaderValue>>,
    response: Vec<Option<HeaderValue>>,
    /// Which conditions hold.
    conditions: Vec<bool>,
}

/// What the connection manager knows of a finished request.
#[derive(Debug)]
pub struct Entry<'a> {
    /// When its first byte came.
    pub start: SystemTime,
    /// From the first byte of the request to the last of the response.
    pub duration: Duration,
    /// From the first byte of the request to its last; `None` if it never came.
    pub request_duration: Option<Duration>,
    /// From the first byte of the request to the first byte of the upstream's response.
    pub response_duration: Option<Duration>,
    /// Method.
    pub method: &'a Method,
    /// Path and query as the client sent them.
    pub path: &'a str,
    /// Host asked for; may be empty.
    pub authority: &'a str,
    /// Protocol of the client, if there are requests.
    pub protocol: Option<Version>,
    /// Status sent; 0 if the client went away before one.
    pub code: u16,
    /// Body bytes from the client.
    pub bytes_received: u64,
    /// Body bytes to the client.
    pub bytes_sent: u64,
    /// The client.
    pub downstream_remote: &'a EndAddress,
    /// Whoever is at the other end of the socket.
    pub downstream_direct_remote: &'a EndAddress,
    /// Our socket towards the client.
    pub downstream_local: &'a EndAddress,
    /// Number of the client's connection in this process.
    pub connection_id: u64,
    /// If that connection is TLS.
    pub tls: Option<&'a TlsFacts>,
    /// `x-request-id`, the client's or ours; may be empty.
    pub request_id: &'a str,
    /// Trace id in hex; may be empty.
    pub trace_id: &'a str,
    /// May be empty.
    pub route_name: &'a str,
    /// May be empty.
    pub virtual_host: &'a str,
    /// To the first token delivered.
    pub ttft: Option<Duration>,
    /// 99th percentile of the time between tokens of this stream.
    pub itl_p99: Option<Duration>,
    /// What the filters left.
    pub log: &'a LogFields,
    /// What our own answer says, where that is about to be formatted.
    pub local_reply_body: &'a str,
}

impl AccessLogs {
    /// Compiles the formats and opens the sinks.
    ///
    /// # Errors
    /// A format with an unknown or malformed operator, or a file that cannot be opened; the text names the place in
    /// the configuration and what is wrong there.
    pub fn new(configs: &[AccessLog], sinks: &Sinks, runtime: &Runtime) -> Result<Self, String> {
        let mut headers = Headers::default();
        let mut logs = Vec::with_capacity(configs.len());
        for (index, config) in configs.iter().enumerate() {
            let place = format!("access_log[{index}]");
            let template = Template::compile(&config.format, &mut headers, &place)?;
            let filter = config.filter.as_ref();
            let filter = filter.map(|filter| Filter::compile(filter, &mut headers, runtime));
            let filter = filter
                .transpose()
                .map_err(|error| format!("{place}.filter: {error}"))?;
            let sink = sinks
                .open(&config.sink)
                .map_err(|error| format!("{place}: {error}"))?;
            logs.push(Log {
                filter,
                template,
                sink,
            });
        }
        Ok(Self { logs, headers })
    }

    /// Whether nothing is logged at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.logs.is_empty()
    }

    /// Keeps what the formats need of a request's headers. Take it after the connection manager added its own
    /// (`x-forwarded-for`), as Envoy does.
    #[must_use]
    pub fn capture(&self, request: &http::request::Parts) -> Captured {
        self.headers.capture_with_conditions(request)
    }

    /// Keeps what the formats need of the response's headers.
    pub fn capture_response(&self, headers: &HeaderMap, captured: &mut Captured) {
        self.headers.capture_response(headers, captured);
    }

    /// Writes the line (one per configured log that its filter lets pass). Never blocks: a full queue drops the line and counts it.
    pub fn write(&self, entry: &Entry<'_>, captured: &Captured) {
        let answer = Answer {
            code: entry.code,
            duration: entry.duration,
            flags: &entry.log.flags,
            captured,
        };
        let passes = |log: &&Log| {
            log.filter
                .as_ref()
                .is_none_or(|filter| filter.holds(&answer))
        };
        LINE.with_borrow_mut(|line| {
            for log in self.logs.iter().filter(passes) {
                line.clear();
                log.template.render(entry, captured, line);
                log.sink.push(line);
            }
            if line.capacity() > LINE_BUFFER_BYTES_MAX {
                *line = Vec::new();
            }
        });
    }
}

/// Formats of header values, which say the same as those of access logs.
#[derive(Debug, Default)]
pub struct Formats {
    headers: Headers,
}

/// One of them, compiled.
#[derive(Debug)]
pub struct ValueFormat(Template);

impl Formats {
    /// Compiles one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn compile(&mut self, text: &str) -> Result<ValueFormat, String> {
        Template::bare(text, &mut self.headers).map(ValueFormat)
    }

    /// Compiles that of a body.
    ///
    /// # Errors
    /// The place below `place` and what is wrong there.
    pub(crate) fn body(
        &mut self,
        format: &AccessLogFormat,
        place: &str,
    ) -> Result<BodyTemplate, String> {
        Template::compile(format, &mut self.headers, place).map(BodyTemplate)
    }

    /// Prepares a condition.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn condition(
        &mut self,
        filter: &LogFilter,
        runtime: &Runtime,
    ) -> Result<Filter, String> {
        Filter::compile(filter, &mut self.headers, runtime)
    }

    /// Keeps what formats and conditions need of a request.
    pub(crate) fn capture_with_conditions(&self, request: &http::request::Parts) -> Captured {
        self.headers.capture_with_conditions(request)
    }

    /// Keeps what the formats need of a request.
    #[must_use]
    pub fn capture(&self, uri: &Uri, headers: &HeaderMap) -> Captured {
        self.headers.capture(uri, headers)
    }

    /// Keeps what the formats need of a response.
    pub fn capture_response(&self, headers: &HeaderMap, captured: &mut Captured) {
        self.headers.capture_response(headers, captured);
    }
}

/// What a body is made of; as a line of the log.
#[derive(Debug)]
pub(crate) struct BodyTemplate(Template);

impl BodyTemplate {
    /// The body.
    pub(crate) fn render(&self, entry: &Entry<'_>, captured: &Captured) -> String {
        let mut body = Vec::new();
        self.0.render(entry, captured, &mut body);
        String::from_utf8_lossy(&body).into_owned()
    }
}

impl ValueFormat {
    /// What it always is, if it has no operators.
    #[must_use]
    pub fn constant(&self) -> Option<&[u8]> {
        self.0.constant()
    }

    /// Its value; what is missing is empty.
    #[must_use]
    pub fn render(&self, entry: &Entry<'_>, captured: &Captured) -> Vec<u8> {
        let mut value = Vec::new();
        self.0.render(entry, captured, &mut value);
        value
    }
}

impl Headers {
    fn capture(&self, uri: &Uri, headers: &HeaderMap) -> Captured {
        let wanted = self.request.iter().map(|wanted| match wanted {
            Wanted::Header(name) => headers.get(name).cloned(),
            Wanted::Scheme => match uri.scheme_str() {
                Some(scheme) => HeaderValue::from_str(scheme).ok(),
                // Whoever wrote it was to be believed, be it ourselves.
                None => Some(HeaderValue::from_static(
                    match headers.get(FORWARDED_PROTO).map(HeaderValue::as_bytes) {
                        Some(b"https") => "https",
                        _ => "http",
                    },
                )),
            },
        });
        Captured {
            request: wanted.collect(),
            ..Captured::default()
        }
    }

    fn capture_with_conditions(&self, request: &http::request::Parts) -> Captured {
        let conditions = self.conditions.iter();
        let conditions = conditions
            .map(|condition| condition.matches(request))
            .collect();
        Captured {
            conditions,
            ..self.capture(&request.uri, &request.headers)
        }
    }

    fn capture_response(&self, headers: &HeaderMap, captured: &mut Captured) {
        captured.response.clear();
        captured
            .response
            .extend(self.response.iter().map(|name| headers.get(name).cloned()));
    }

    fn request_slot(&mut self, wanted: Wanted) -> usize {
        slot(&mut self.request, wanted)
    }

    fn response_slot(&mut self, name: HeaderName) -> usize {
        slot(&mut self.response, name)
    }
}

fn slot<T: PartialEq>(known: &mut Vec<T>, wanted: T) -> usize {
    known
        .iter()
        .position(|name| *name == wanted)
        .unwrap_or_else(|| {
            known.push(wanted);
            known.len() - 1
        })
}

impl Captured {
    fn request(&self, slot: usize) -> Option<&[u8]> {
        self.request.get(slot)?.as_ref().map(HeaderValue::as_bytes)
    }

    fn response(&self, slot: usize) -> Option<&[u8]> {
        self.response.get(slot)?.as_ref().map(HeaderValue::as_bytes)
    }
}
