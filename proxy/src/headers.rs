//! Headers at the edge: what is taken off, what is made, what is appended.

use http::{HeaderMap, HeaderName, HeaderValue, header};
use http_body::Body as _;
use outrigger_filters::{
    body::{ResponseBody, empty},
    trace::Id,
};
use rand::RngCore;
use std::net::IpAddr;

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub(crate) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// Says that a request comes from inside.
pub(crate) const INTERNAL: HeaderName = HeaderName::from_static("x-envoy-internal");
const EXTERNAL_ADDRESS: HeaderName = HeaderName::from_static("x-envoy-external-address");
pub(crate) const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
pub(crate) const FORWARDED_CLIENT_CERT: HeaderName =
    HeaderName::from_static("x-forwarded-client-cert");
/// Ids of the proxies a request went through, comma separated; kept from clients too, since it can only stop a loop.
pub(crate) const VIA: HeaderName = HeaderName::from_static("x-outrigger-via");
/// Asks for debug headers in the response.
pub(crate) const DEBUG: HeaderName = HeaderName::from_static("x-outrigger-debug");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// More proxies than this on one way are a loop, whoever they are.
pub const HOPS_MAX: usize = 8;

/// Which headers that mean something to a proxy are there: found in one pass, so that the many that are absent cost
/// no lookup each.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seen {
    pub(crate) hop_by_hop: bool,
    pub(crate) upgrade: bool,
    pub(crate) expect: bool,
    /// How many `cookie` lines there are.
    pub(crate) cookies: usize,
    pub(crate) between_proxies: bool,
    pub(crate) debug: bool,
    pub(crate) via: bool,
    pub(crate) request_id: bool,
    pub(crate) traceparent: bool,
    pub(crate) tracestate: bool,
    pub(crate) forwarded_for: bool,
    pub(crate) forwarded_proto: bool,
    pub(crate) client_cert: bool,
    pub(crate) transfer_encoding: bool,
    pub(crate) server: bool,
    /// Any of Envoy's own.
    pub(crate) envoy: bool,
    /// How many `host` lines there are.
    pub(crate) hosts: usize,
    /// Bytes of all names and values.
    pub(crate) bytes: usize,
}

impl Seen {
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let mut seen = Self::default();
        for (name, value) in headers {
            seen.bytes += name.as_str().len() + value.len();
            match name.as_str() {
                "host" => seen.hosts += 1,
                "server" => seen.server = true,
                "connection" | "keep-alive" | "proxy-connection" | "te" => seen.hop_by_hop = true,
                "transfer-encoding" => (seen.hop_by_hop, seen.transfer_encoding) = (true, true),
                "upgrade" => (seen.hop_by_hop, seen.upgrade) = (true, true),
                "expect" => seen.expect = true,
                "cookie" => seen.cookies += 1,
                "x-outrigger-debug" => seen.debug = true,
                "x-outrigger-via" => seen.via = true,
                "x-request-id" => seen.request_id = true,
                "traceparent" => seen.traceparent = true,
                "tracestate" => seen.tracestate = true,
                "x-forwarded-for" => seen.forwarded_for = true,
                "x-forwarded-proto" => seen.forwarded_proto = true,
                "x-forwarded-client-cert" => seen.client_cert = true,
                other if other.starts_with("x-envoy-") => seen.envoy = true,
                other if other.starts_with("x-outrigger-") => seen.between_proxies = true,
                _ => {}
            }
        }
        seen
    }
}

/// Takes off what belongs to one connection only (RFC 9110, 7.6.1); `te: trailers` stays, gRPC needs it.
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        strip_named_by_connection(headers);
    }
    headers.remove(KEEP_ALIVE);
    headers.remove(PROXY_CONNECTION);
    headers.remove(header::TRANSFER_ENCODING);
    headers.remove(header::UPGRADE);
    let Some(te) = headers.get(header::TE) else {
        return;
    };
    let trailers = te
        .as_bytes()
        .split(|&byte| byte == b',')
        .any(|coding| coding.trim_ascii().eq_ignore_ascii_case(b"trailers"));
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    } else {
        headers.remove(header::TE);
    }
}

fn strip_named_by_connection(headers: &mut HeaderMap) {
    let mut named = Vec::new();
    for value in headers.get_all(header::CONNECTION) {
        let names = value.to_str().unwrap_or_default().split(',');
        named.extend(names.filter_map(|name| name.trim().parse::<HeaderName>().ok()));
    }
    for name in named {
        // `te` has its own rule; a client must not have us drop what frames or addresses the message.
        if !matches!(
            name,
            header::TE | header::HOST | header::CONTENT_LENGTH | header::AUTHORIZATION
        ) {
            headers.remove(name);
        }
    }
    headers.remove(header::CONNECTION);
}

/// What a client must not tell a router: it would command retries and time limits. Envoy honours them from inside only.
const COMMANDS: [&str; 12] = [
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-force-trace",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-max-retries",
    "x-envoy-retriable-header-names",
    "x-envoy-retriable-status-codes",
    "x-envoy-retry-grpc-on",
    "x-envoy-retry-on",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-upstream-rq-timeout-ms",
];
/// What only a proxy further inside may say.
const FROM_INSIDE: [&str; 5] = [
    "x-envoy-decorator-operation",
    "x-envoy-downstream-service-cluster",
    "x-envoy-downstream-service-node",
    "x-envoy-original-host",
    "x-envoy-original-path",
];

/// Takes Envoy's own headers off a client's request. That it comes from inside is for us to say.
pub(crate) fn strip_envoy(headers: &mut HeaderMap, at_edge: bool) {
    headers.remove(INTERNAL);
    for name in COMMANDS {
        headers.remove(name);
    }
    if at_edge {
        for name in FROM_INSIDE {
            headers.remove(name);
        }
    }
}

/// HTTP/2 may send cookies in pieces; elsewhere they are one line (RFC 9113, 8.2.3).
pub(crate) fn join_cookies(headers: &mut HeaderMap) {
    let lines: Vec<&[u8]> = headers
        .get_all(header::COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if let Ok(joined) = HeaderValue::from_bytes(&lines.join(&b"; "[..])) {
        headers.insert(header::COOKIE, joined);
    }
}

/// Whether the client waits for `100 Continue`.
pub(crate) fn expects_continue(headers: &HeaderMap) -> bool {
    headers
        .get(header::EXPECT)
        .is_some_and(|what| what.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Tells the upstream who the client is.
pub(crate) fn external_address(headers: &mut HeaderMap, client: &HeaderValue) {
    headers.insert(EXTERNAL_ADDRESS, client.clone());
}

/// An address as it stands in headers.
pub(crate) fn address(ip: IpAddr) -> HeaderValue {
    HeaderValue::try_from(ip.to_canonical().to_string())
        .expect("invariant: an address has only digits, letters, dots and colons")
}

/// The answer to HEAD: the length of a body that is not sent.
pub(crate) fn without_body(headers: &mut HeaderMap, body: &ResponseBody) -> ResponseBody {
    if let Some(length) = body.size_hint().exact().filter(|&length| length > 0) {
        headers
            .entry(header::CONTENT_LENGTH)
            .or_insert_with(|| HeaderValue::from(length));
    }
    empty()
}

/// Takes an upgrade to `h2c` off, as Envoy does; whether another one is asked for.
pub(crate) fn asks_for_upgrade(headers: &mut HeaderMap) -> bool {
    let Some(wanted) = headers.get(header::UPGRADE) else {
        return false;
    };
    if wanted.as_bytes().eq_ignore_ascii_case(b"h2c") {
        headers.remove(header::UPGRADE);
        headers.remove(HTTP2_SETTINGS);
        return false;
    }
    true
}

/// Tells the upstream on which port the client came, unless somebody before us who is believed did.
pub(crate) fn forwarded_port(headers: &mut HeaderMap, port: u16, believed: bool) {
    if !believed || !headers.contains_key(FORWARDED_PORT) {
        headers.insert(FORWARDED_PORT, HeaderValue::from(port));
    }
}

/// A random UUID (version 4).
pub(crate) fn new_request_id() -> Id<36> {
    let mut bytes = [0; 16];
    rand::rng().fill_bytes(&mut bytes);
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Id::write(*b"00000000-0000-0000-0000-000000000000", 0, &bytes)
}

/// A new W3C trace context, not sampled. If we do not decide about traces, its span is the second half of its trace:
/// the next one sees that it is nobody's, and decides.
pub(crate) fn new_traceparent(decides: bool) -> Id<55> {
    let mut bytes = [0; 24];
    rand::rng().fill_bytes(&mut bytes);
    if !decides {
        bytes.copy_within(8..16, 16);
    }
    let form = b"00-00000000000000000000000000000000-0000000000000000-00";
    Id::write(*form, 3, &bytes)
}

/// The trace id of a `traceparent` that is well-formed.
pub(crate) fn trace_id(traceparent: &str) -> &str {
    traceparent.get(3..35).unwrap_or_default()
}

/// Appends the peer's address to `x-forwarded-for`.
pub(crate) fn append_forwarded_for(headers: &mut HeaderMap, seen: &Seen, peer: &HeaderValue) {
    if !seen.forwarded_for {
        headers.insert(FORWARDED_FOR, peer.clone());
        return;
    }
    let mut list = Vec::new();
    // Several lines are one list.
    for line in headers.get_all(FORWARDED_FOR) {
        list.extend_from_slice(line.as_bytes());
        list.push(b',');
    }
    list.extend_from_slice(peer.as_bytes());
    if let Ok(value) = HeaderValue::try_from(list) {
        headers.insert(FORWARDED_FOR, value);
    }
}

/// Adds this proxy to the way of a request; false means it has been here, or has come too far.
pub(crate) fn append_via(headers: &mut HeaderMap, node: &str) -> bool {
    let known = headers
        .get(VIA)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    if known.split(',').any(|id| id == node) || known.split(',').count() > HOPS_MAX {
        return false;
    }
    let text = if known.is_empty() {
        node.to_owned()
    } else {
        format!("{known},{node}")
    };
    if let Ok(value) = HeaderValue::from_str(&text) {
        headers.insert(VIA, value);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hop_by_hop_headers_go_and_trailers_stay() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, X-Secret, host"),
            ("keep-alive", "timeout=5"),
            ("x-secret", "1"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("host", "a"),
            ("authorization", "b"),
        ] {
            headers.insert(name, value.parse().unwrap());
        }
        strip_hop_by_hop(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["authorization", "host", "te"]);
    }

    #[test]
    fn ids_have_their_forms() {
        let id = new_request_id();
        let form = |text: &str| text.replace(|digit: char| digit.is_ascii_hexdigit(), "x");
        assert_eq!(form(id.as_str()), "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx");
        assert_eq!(&id.as_str()[14..15], "4");
        assert_ne!(id.as_str(), new_request_id().as_str());
        let trace = new_traceparent(true);
        assert_eq!(
            form(trace.as_str()),
            format!("xx-{}-{}-xx", "x".repeat(32), "x".repeat(16))
        );
        assert_eq!(trace_id(trace.as_str()).len(), 32);
        assert_eq!(trace_id("garbage"), "");
    }

    #[test]
    fn the_port_that_a_client_tells_is_not_believed() {
        for (believed, told) in [(false, "80"), (true, "443")] {
            let mut headers = HeaderMap::new();
            headers.insert(FORWARDED_PORT, HeaderValue::from_static("443"));
            forwarded_port(&mut headers, 80, believed);
            assert_eq!(headers[FORWARDED_PORT], told);
        }
        let mut headers = HeaderMap::new();
        forwarded_port(&mut headers, 80, true);
        assert_eq!(headers[FORWARDED_PORT], "80", "nobody told one");
    }

    #[test]
    fn a_loop_is_seen() {
        let mut headers = HeaderMap::new();
        assert!(append_via(&mut headers, "a"));
        assert!(append_via(&mut headers, "b"));
        assert!(!append_via(&mut headers, "a"));
        assert_eq!(headers[VIA], "a,b");
    }
}
