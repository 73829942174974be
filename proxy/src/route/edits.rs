//! What routes do to heads: headers added and removed, the host replaced. Prepared per route, run per request.
//!
//! In Envoy's order: weighted cluster, route, virtual host, route table (or the other way round), removals before
//! additions, all values of a level computed before the first is set.

use crate::{
    access_log::{Captured, Entry, Formats, ValueFormat},
    tls::TlsFacts,
};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Version, header::Entry as Slot,
};
use outrigger_filters::{
    body::{RequestBody, ResponseBody},
    end_address::EndAddress,
    filter::{Heads, LogFields, RouteFacts},
    router::host,
};
use outrigger_xds::resource::header_mutation::{
    AppendAction, HeaderMutations, HeaderToAdd, Mutations,
};
use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

/// All that a route does to heads.
#[derive(Debug, Default)]
pub struct Edits {
    formats: Formats,
    request: Vec<Level>,
    response: Vec<Level>,
    /// Of the weighted cluster: replaces the host before the route does, and leaves no trace.
    pub(super) cluster_host: Option<HeaderValue>,
    /// Of the route.
    pub(super) host: Option<HostEdit>,
    pub(super) append_forwarded_host: bool,
    /// `x-envoy-original-host` and the like may be told.
    pub(super) tell_original: bool,
}

/// What becomes of the host.
#[derive(Debug)]
pub(super) enum HostEdit {
    Literal(HeaderValue),
    Header(HeaderName),
}

/// Changes that are made together.
#[derive(Debug)]
pub(crate) struct Level {
    remove: Vec<HeaderName>,
    add: Vec<Add>,
    /// Whether some value has to be computed.
    formatted: bool,
}

#[derive(Debug)]
struct Add {
    name: HeaderName,
    value: Text,
    action: AppendAction,
    keep_empty: bool,
}

#[derive(Debug)]
enum Text {
    Constant(HeaderValue),
    Format(ValueFormat),
}

impl Edits {
    /// Prepares the levels, given from the most specific to the least.
    ///
    /// # Errors
    /// A value is no format, and which.
    pub fn new(levels: &[&HeaderMutations], most_specific_wins: bool) -> Result<Self, String> {
        let mut edits = Self {
            tell_original: true,
            ..Self::default()
        };
        for level in levels {
            let formats = &mut edits.formats;
            if let Some(level) = Level::new(&level.request, formats)
                .map_err(|error| format!("request_headers_to_add: {error}"))?
            {
                edits.request.push(level);
            }
            if let Some(level) = Level::new(&level.response, formats)
                .map_err(|error| format!("response_headers_to_add: {error}"))?
            {
                edits.response.push(level);
            }
        }
        if most_specific_wins {
            edits.request.reverse();
            edits.response.reverse();
        }
        Ok(edits)
    }

    /// Whether it does nothing at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.request.is_empty()
            && self.response.is_empty()
            && self.cluster_host.is_none()
            && self.host.is_none()
    }
}

impl Level {
    /// `None` if there is nothing to do.
    pub(crate) fn new(
        mutations: &Mutations,
        formats: &mut Formats,
    ) -> Result<Option<Self>, String> {
        let name = |name: &String| {
            HeaderName::try_from(name.as_str()).map_err(|_| format!("'{name}' is no header name"))
        };
        let remove = mutations
            .remove
            .iter()
            .map(name)
            .collect::<Result<Vec<_>, _>>()?;
        let one = |add: &HeaderToAdd| {
            let format = formats
                .compile(&add.value)
                .map_err(|error| format!("'{}': {error}", add.name))?;
            let value = match format.constant() {
                Some(bytes) => Text::Constant(
                    HeaderValue::from_bytes(bytes)
                        .map_err(|_| format!("'{}': no header value", add.name))?,
                ),
                None => Text::Format(format),
            };
            Ok::<_, String>(Add {
                name: name(&add.name)?,
                value,
                action: add.action,
                keep_empty: add.keep_empty_value,
            })
        };
        let add = mutations
            .add
            .iter()
            .map(one)
            .collect::<Result<Vec<_>, _>>()?;
        let formatted = add.iter().any(|add| matches!(add.value, Text::Format(_)));
        Ok((!remove.is_empty() || !add.is_empty()).then_some(Self {
            remove,
            add,
            formatted,
        }))
    }

    fn remove(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
    }

    pub(crate) fn add(&self, headers: &mut HeaderMap, value: impl Fn(&ValueFormat) -> Vec<u8>) {
        let mut append = Vec::new();
        let mut overwrite = Vec::new();
        for add in &self.add {
            let value = match &add.value {
                Text::Constant(value) => value.clone(),
                Text::Format(format) => match HeaderValue::from_bytes(&value(format)) {
                    Ok(value) => value,
                    Err(_) => continue,
                },
            };
            if value.is_empty() && !add.keep_empty {
                continue;
            }
            match add.action {
                AppendAction::AppendIfExistsOrAdd => append.push((&add.name, value)),
                AppendAction::AddIfAbsent if !headers.contains_key(&add.name) => {
                    append.push((&add.name, value));
                }
                AppendAction::OverwriteIfExists if headers.contains_key(&add.name) => {
                    overwrite.push((&add.name, value));
                }
                AppendAction::OverwriteIfExistsOrAdd => overwrite.push((&add.name, value)),
                AppendAction::AddIfAbsent | AppendAction::OverwriteIfExists => {}
            }
        }
        for (name, value) in overwrite {
            headers.insert(name, value);
        }
        for (name, value) in append {
            match headers.entry(name) {
                Slot::Occupied(mut slot) => slot.append(value),
                Slot::Vacant(slot) => {
                    slot.insert(value);
                }
            }
        }
    }
}

/// What formats may say of a request.
#[derive(Debug, Clone)]
pub struct Facts {
    /// When its first byte came.
    pub start: SystemTime,
    /// The same.
    pub started: Instant,
    /// Method.
    pub method: Method,
    /// Path and query as the client sent them.
    pub path: String,
    /// Host asked for.
    pub authority: String,
    /// Protocol of the client.
    pub protocol: Version,
    /// The client.
    pub remote: EndAddress,
    /// Whoever is at the other end of the socket.
    pub direct_remote: EndAddress,
    /// Ours.
    pub local: EndAddress,
    /// Number of the client's connection.
    pub connection_id: u64,
    /// If that is TLS.
    pub tls: Option<Arc<TlsFacts>>,
    /// `x-request-id`.
    pub request_id: Arc<str>,
    /// Trace id in hex.
    pub trace_id: Arc<str>,
    /// The route.
    pub route: Arc<RouteFacts>,
}

impl Facts {
    fn entry<'a>(&'a self, code: u16, log: &'a LogFields) -> Entry<'a> {
        Entry {
            start: self.start,
            duration: self.started.elapsed(),
            request_duration: None,
            response_duration: None,
            method: &self.method,
            path: &self.path,
            authority: &self.authority,
            protocol: Some(self.protocol),
            code,
            bytes_received: 0,
            bytes_sent: 0,
            downstream_remote: &self.remote,
            downstream_direct_remote: &self.direct_remote,
            downstream_local: &self.local,
            connection_id: self.connection_id,
            tls: self.tls.as_deref(),
            request_id: &self.request_id,
            trace_id: &self.trace_id,
            route_name: &self.route.name,
            virtual_host: &self.route.virtual_host,
            ttft: None,
            itl_p99: None,
            log,
            local_reply_body: "",
        }
    }
}

/// A route's edits on one request.
pub struct Applied {
    edits: Arc<Edits>,
    facts: Facts,
    /// What formats of the response say of the request.
    asked: Captured,
}

impl Applied {
    /// For the request with this head.
    #[must_use]
    pub fn new(edits: Arc<Edits>, facts: Facts, parts: &http::request::Parts) -> Self {
        let asked = edits.formats.capture(&parts.uri, &parts.headers);
        Self {
            edits,
            facts,
            asked,
        }
    }

    fn rewrite_host(&self, request: &mut Request<RequestBody>) {
        let edits = &self.edits;
        if let Some(to) = edits.cluster_host.as_ref().and_then(|to| to.to_str().ok()) {
            host::replace(request, to, false, false);
        }
        let to = match &edits.host {
            Some(HostEdit::Literal(to)) => Some(to.clone()),
            Some(HostEdit::Header(name)) => request.headers().get(name).cloned(),
            None => None,
        };
        if let Some(to) = to.as_ref().and_then(|to| to.to_str().ok())
            && !to.is_empty()
        {
            host::replace(
                request,
                to,
                edits.append_forwarded_host,
                edits.tell_original,
            );
        }
    }
}

impl Heads for Applied {
    fn request(&self, request: &mut Request<RequestBody>, log: &LogFields) {
        for level in &self.edits.request {
            level.remove(request.headers_mut());
            let captured = if level.formatted {
                self.edits.formats.capture(request.uri(), request.headers())
            } else {
                Captured::default()
            };
            let entry = self.facts.entry(0, log);
            level.add(request.headers_mut(), |format| {
                format.render(&entry, &captured)
            });
        }
        self.rewrite_host(request);
    }

    fn response(&self, response: &mut Response<ResponseBody>, log: &LogFields) {
        let code = response.status().as_u16();
        for level in &self.edits.response {
            level.remove(response.headers_mut());
            let mut captured = Captured::default();
            if level.formatted {
                captured = self.asked.clone();
                self.edits
                    .formats
                    .capture_response(response.headers(), &mut captured);
            }
            let entry = self.facts.entry(code, log);
            level.add(response.headers_mut(), |format| {
                format.render(&entry, &captured)
            });
        }
    }
}
