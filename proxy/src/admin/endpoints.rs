//! What each admin path answers. One row of [`ENDPOINTS`] is one path.

use super::{Admin, clusters};
use crate::metrics::{self, Format, Memory, ProcessFacts, Query};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Response, StatusCode, Uri, header};
use http_body_util::Full;
use outrigger_filters::{end_address::EndAddress, endpoints::Via};
use regex::Regex;
use serde::Serialize;
use serde_json::{Value, json};
use std::{fmt::Write, sync::atomic::Ordering::Relaxed};

const TEXT: &str = "text/plain; charset=UTF-8";
const JSON: &str = "application/json";
const HTML: &str = "text/html; charset=UTF-8";
/// A filter of `/stats` longer than this is refused.
const PATTERN_BYTES_MAX: usize = 1024;

struct Endpoint {
    path: &'static str,
    /// Changes something: only by POST.
    post: bool,
    help: &'static str,
    handler: fn(&Admin, &Params) -> Reply,
}

const fn get(
    path: &'static str,
    help: &'static str,
    handler: fn(&Admin, &Params) -> Reply,
) -> Endpoint {
    Endpoint {
        path,
        post: false,
        help,
        handler,
    }
}

const fn post(
    path: &'static str,
    help: &'static str,
    handler: fn(&Admin, &Params) -> Reply,
) -> Endpoint {
    Endpoint {
        path,
        post: true,
        help,
        handler,
    }
}

static ENDPOINTS: &[Endpoint] = &[
    get("/", "Admin home page", home),
    get("/certs", "print certs on machine", |admin, _| {
        Reply::json(&(admin.state.certs)())
    }),
    get("/clusters", "upstream cluster status", cluster_status),
    get("/config_dump", "dump current configuration", config_dump),
    post(
        "/drain",
        "move streams away from an engine, ?endpoint=ID[&undo]",
        drain,
    ),
    post("/drain_listeners", "drain listeners", |admin, _| {
        (admin.state.on_drain)();
        Reply::text("OK\n")
    }),
    post(
        "/healthcheck/fail",
        "cause the server to fail health checks",
        |admin, _| {
            admin.state.serving.failed.store(true, Relaxed);
            Reply::text("OK\n")
        },
    ),
    post(
        "/healthcheck/ok",
        "cause the server to pass health checks",
        |admin, _| {
            admin.state.serving.failed.store(false, Relaxed);
            Reply::text("OK\n")
        },
    ),
    get("/help", "print out list of admin commands", |_, _| {
        Reply::text(help())
    }),
    get("/listeners", "print listener info", listeners),
    get("/live", "return 200: the process can answer", |_, _| {
        Reply::text("LIVE\n")
    }),
    post("/logging", "query/change logging levels", logging),
    get("/memory", "print current allocation/heap usage", |_, _| {
        memory()
    }),
    post("/quitquitquit", "exit the server", |admin, _| {
        (admin.state.quit)();
        Reply::text("OK\n")
    }),
    get(
        "/ready",
        "print server state, return 200 if LIVE, otherwise return 503",
        ready,
    ),
    post("/reopen_logs", "reopen access logs", |admin, _| {
        (admin.state.reopen_logs)();
        Reply::text("OK\n")
    }),
    post(
        "/reset_counters",
        "reset all counters to zero (not supported)",
        |_, _| {
            let why = "/reset_counters is not supported: the metrics recorder keeps counters that only go up\n";
            Reply::text(why).status(StatusCode::NOT_IMPLEMENTED)
        },
    ),
    get(
        "/server_info",
        "print server version/status information",
        server_info,
    ),
    get("/runtime", "print runtime values", |admin, _| {
        Reply::json(&admin.state.runtime.to_json())
    }),
    post(
        "/runtime_modify",
        "Adds or modifies runtime values as passed in query parameters. To delete a previously added key, use an empty string as the value. Note that deletion only applies to overrides added via this endpoint; values loaded from other sources can be modified via override but not deleted. E.g. ?key1=value1&key2=value2...",
        runtime_modify,
    ),
    get("/stats", "print server stats", |admin, params| {
        stats(admin, params, Format::Text)
    }),
    get(
        "/stats/prometheus",
        "print server stats in prometheus format",
        |admin, params| stats(admin, params, Format::Prometheus),
    ),
];

/// Answers one request. Bodies of requests are of no interest.
pub(super) fn answer(admin: &Admin, method: &Method, uri: &Uri) -> Response<Full<Bytes>> {
    let path = uri.path();
    let Some(endpoint) = ENDPOINTS.iter().find(|endpoint| endpoint.path == path) else {
        return Reply::text(format!("invalid path. {}", help()))
            .status(StatusCode::NOT_FOUND)
            .into();
    };
    if endpoint.post && method != Method::POST {
        let text = format!("Method {method} not allowed, POST required.");
        return Reply::text(text)
            .status(StatusCode::METHOD_NOT_ALLOWED)
            .into();
    }
    (endpoint.handler)(admin, &Params::parse(uri.query().unwrap_or_default())).into()
}

/// What is answered.
struct Reply {
    status: StatusCode,
    content_type: &'static str,
    body: Bytes,
}

impl Reply {
    fn text(body: impl Into<Bytes>) -> Self {
        Self {
            status: StatusCode::OK,
            content_type: TEXT,
            body: body.into(),
        }
    }

    /// Indented by one space, as Envoy's.
    fn json(value: &Value) -> Self {
        let mut body = Vec::new();
        let format = serde_json::ser::PrettyFormatter::with_indent(b" ");
        let mut serializer = serde_json::Serializer::with_formatter(&mut body, format);
        value
            .serialize(&mut serializer)
            .expect("invariant: a Value has string keys and a Vec takes all");
        body.push(b'\n');
        Self {
            status: StatusCode::OK,
            content_type: JSON,
            body: body.into(),
        }
    }

    fn bad_request(text: String) -> Self {
        Self::text(text).status(StatusCode::BAD_REQUEST)
    }

    fn status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }
}

impl From<Reply> for Response<Full<Bytes>> {
    fn from(reply: Reply) -> Self {
        let mut response = Self::new(Full::new(reply.body));
        *response.status_mut() = reply.status;
        let headers: [(HeaderName, &'static str); 3] = [
            (header::CONTENT_TYPE, reply.content_type),
            (header::CACHE_CONTROL, "no-cache, max-age=0"),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        ];
        for (name, value) in headers {
            response
                .headers_mut()
                .insert(name, HeaderValue::from_static(value));
        }
        response
    }
}

/// The query of a request.
struct Params(Vec<(String, String)>);

impl Params {
    fn parse(query: &str) -> Self {
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
                .map(|(name, value)| (percent_decode(name), percent_decode(value)))
                .collect(),
        )
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    fn wants_json(&self) -> bool {
        self.get("format") == Some("json")
    }
}

fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match hex
            .filter(|_| *first == b'%')
            .and_then(|hex| u8::from_str_radix(hex, 16).ok())
        {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn help() -> String {
    let mut text = "admin commands are:\n".to_owned();
    for endpoint in ENDPOINTS {
        let post = if endpoint.post { " (POST)" } else { "" };
        writeln!(text, "  {}{post}: {}", endpoint.path, endpoint.help)
            .expect("invariant: a String takes all");
    }
    text
}

fn home(_: &Admin, _: &Params) -> Reply {
    let mut page = "<!DOCTYPE html>\n<title>Outrigger admin</title>\n<table>\n".to_owned();
    for endpoint in ENDPOINTS {
        let (path, help) = (endpoint.path, endpoint.help);
        let cell = if endpoint.post {
            format!("<form method=\"post\" action=\"{path}\"><button>{path}</button></form>")
        } else {
            format!("<a href=\"{path}\">{path}</a>")
        };
        writeln!(page, "<tr><td>{cell}</td><td>{help}</td></tr>")
            .expect("invariant: a String takes all");
    }
    page.push_str("</table>\n");
    Reply {
        status: StatusCode::OK,
        content_type: HTML,
        body: page.into(),
    }
}

fn ready(admin: &Admin, _: &Params) -> Reply {
    let state = admin.server_state();
    let reply = Reply::text(format!("{}\n", state.as_str()));
    if state == super::ServerState::Live {
        reply
    } else {
        reply.status(StatusCode::SERVICE_UNAVAILABLE)
    }
}

fn stats(admin: &Admin, params: &Params, default: Format) -> Reply {
    let format = match params.get("format") {
        None => default,
        Some("json") => Format::Json,
        Some("prometheus") => Format::Prometheus,
        Some("text" | "html") => Format::Text,
        Some(other) => {
            return Reply::bad_request(format!(
                "usage: /stats?format=(json|prometheus|text), not {other:?}\n"
            ));
        }
    };
    let filter = match params.get("filter").filter(|pattern| !pattern.is_empty()) {
        Some(pattern) if pattern.len() > PATTERN_BYTES_MAX => {
            return Reply::bad_request(format!(
                "Invalid regex: longer than {PATTERN_BYTES_MAX} bytes\n"
            ));
        }
        Some(pattern) => match Regex::new(pattern) {
            Ok(regex) => Some(regex),
            Err(error) => return Reply::bad_request(format!("Invalid regex: \"{error}\"\n")),
        },
        None => None,
    };
    let state = admin.server_state();
    metrics::refresh_process(ProcessFacts {
        live: state == super::ServerState::Live,
        state: state as u8,
        started: admin.state.started,
    });
    let body = metrics::render_as(&Query {
        used_only: params.get("usedonly").is_some(),
        filter,
        format,
    });
    Reply {
        status: StatusCode::OK,
        content_type: if format == Format::Json { JSON } else { TEXT },
        body: body.into(),
    }
}

fn cluster_status(admin: &Admin, params: &Params) -> Reply {
    let filter = match params.get("filter").map(Regex::new).transpose() {
        Ok(filter) => filter,
        Err(error) => return Reply::bad_request(format!("Invalid regex: \"{error}\"\n")),
    };
    let mut clusters = (admin.state.clusters)();
    clusters.retain(|cluster| {
        filter
            .as_ref()
            .is_none_or(|filter| filter.is_match(&cluster.name))
    });
    if params.wants_json() {
        Reply::json(&clusters::json(&clusters))
    } else {
        Reply::text(clusters::text(&clusters))
    }
}

/// The engine gets nothing new, and what can move moves; `undo` ends that.
fn drain(admin: &Admin, params: &Params) -> Reply {
    let Some(name) = params.get("endpoint").filter(|name| !name.is_empty()) else {
        return Reply::bad_request("usage: /drain?endpoint=ID[&undo]\n".to_owned());
    };
    let leaving = params.get("undo").is_none();
    let mut found = None;
    for view in (admin.state.clusters)() {
        for endpoint in view.endpoints.iter().filter(|known| *known.id.0 == *name) {
            endpoint.stats.leaving.store(leaving, Relaxed);
            if endpoint.via == Via::Local {
                (admin.state.leave)(&endpoint.id, leaving);
            }
            found = Some(endpoint.clone());
        }
    }
    match found {
        Some(endpoint) => Reply::json(&json!({
            "endpoint": name,
            "draining": leaving,
            "active_requests": endpoint.stats.active.load(Relaxed),
        })),
        None => Reply::text(format!("no endpoint {name:?}\n")).status(StatusCode::NOT_FOUND),
    }
}

/// With `?resource=FIELD`, only the entries of that list, whichever section it is in.
fn config_dump(admin: &Admin, params: &Params) -> Reply {
    if let Some(unsupported) = ["mask", "name_regex"]
        .into_iter()
        .find(|name| params.get(name).is_some())
    {
        return Reply::bad_request(format!(
            "/config_dump does not support ?{unsupported}= here\n"
        ));
    }
    let dump = (admin.state.config_dump)(params.get("include_eds").is_some());
    let Some(resource) = params.get("resource") else {
        return Reply::json(&dump);
    };
    let sections = dump.get("configs").and_then(Value::as_array);
    match sections
        .into_iter()
        .flatten()
        .find_map(|section| section.get(resource))
    {
        Some(list @ Value::Array(_)) => Reply::json(&json!({ "configs": list })),
        Some(one) => Reply::json(&json!({ "configs": [one] })),
        None => Reply::text(format!("{resource} not found in config dump\n"))
            .status(StatusCode::NOT_FOUND),
    }
}

fn listeners(admin: &Admin, params: &Params) -> Reply {
    let listeners = (admin.state.listeners)();
    if params.wants_json() {
        let statuses = listeners
            .iter()
            .map(|(name, address)| json!({"name": name, "local_address": local_address(address)}))
            .collect::<Vec<_>>();
        return Reply::json(&json!({ "listener_statuses": statuses }));
    }
    Reply::text(
        listeners
            .iter()
            .map(|(name, address)| format!("{name}::{address}\n"))
            .collect::<String>(),
    )
}

fn local_address(address: &EndAddress) -> Value {
    let address = match address {
        EndAddress::Ip(address) => address,
        EndAddress::Pipe(path) => return json!({"pipe": {"path": &**path}}),
    };
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

fn server_info(admin: &Admin, _: &Params) -> Reply {
    let uptime = format!("{}s", admin.state.started.elapsed().as_secs());
    let (id, cluster) = &admin.state.node;
    let version = concat!("0/", env!("CARGO_PKG_VERSION"), "/Clean/RELEASE/outrigger");
    Reply::json(&json!({
        "version": version,
        "state": admin.server_state().as_str(),
        "hot_restart_version": "disabled",
        "command_line_options": admin.state.options,
        "node": {"id": id, "cluster": cluster, "user_agent_name": "outrigger"},
        "uptime_current_epoch": uptime,
        "uptime_all_epochs": uptime,
    }))
}

/// Envoy's keys. Our allocator does not tell what it holds, so the kernel's figures stand for its.
fn memory() -> Reply {
    let memory = Memory::read().unwrap_or_default();
    Reply::json(&json!({
        "allocated": memory.anonymous_bytes.to_string(),
        "heap_size": memory.data_bytes.to_string(),
        "pageheap_unmapped": "0",
        "pageheap_free": "0",
        "total_thread_cache": "0",
        "total_physical_bytes": memory.resident_bytes.to_string(),
    }))
}

/// Envoy's words, but for what it says of forms.
fn runtime_modify(admin: &Admin, params: &Params) -> Reply {
    if params.0.is_empty() {
        let usage = "usage: /runtime_modify?key1=value1&key2=value2&keyN=valueN\nuse an empty value to remove a previously added override\n";
        return Reply::bad_request(usage.to_owned());
    }
    match admin.state.runtime.modify(&params.0) {
        Ok(()) => Reply::text("OK\n"),
        Err(error) => Reply::text(error.to_string()).status(StatusCode::SERVICE_UNAVAILABLE),
    }
}

/// `?level=L` for all, `?paths=a:L,b:L` or `?a=L` for some, nothing to ask.
fn logging(admin: &Admin, params: &Params) -> Reply {
    let directives = match params.0.as_slice() {
        [] => String::new(),
        [(name, level)] if name == "level" => level.clone(),
        [(name, paths)] if name == "paths" => paths
            .split(',')
            .map(|path| {
                path.rsplit_once(':')
                    .map_or(path.to_owned(), |(target, level)| {
                        format!("{target}={level}")
                    })
            })
            .collect::<Vec<_>>()
            .join(","),
        [(target, level)] => format!("{target}={level}"),
        _ => return Reply::bad_request("invalid number of parameters: one at a time\n".to_owned()),
    };
    match (admin.state.set_log_level)(&directives) {
        Ok(in_force) => Reply::text(format!(
            "active loggers:\n  {}\n",
            in_force.replace(',', "\n  ")
        )),
        Err(error) => Reply::bad_request(format!(
            "error: {error}\nusage: /logging?level=<level>, /logging?paths=<target>:<level>,<target>:<level>\n"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries() {
        let params = Params::parse("filter=a%2eb%25&usedonly&x=%zz&y=%e6%bc%a2&=1");
        assert_eq!(params.get("filter"), Some("a.b%"));
        assert_eq!(params.get("usedonly"), Some(""));
        assert_eq!(params.get("x"), Some("%zz"));
        assert_eq!(params.get("y"), Some("漢"));
        assert_eq!(params.get("z"), None);
        assert_eq!(percent_decode("%"), "%");
        assert_eq!(percent_decode("%é"), "%é");
    }
}
