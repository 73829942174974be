//! `http_inspector`: HTTP/1.0, HTTP/1.1, HTTP/2 or something else, from the first bytes in plain text.

use super::look::{Seen, Verdict};
use crate::metrics::listener_filter::InspectorStats;

/// How a connection of HTTP/2 begins (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest request line that is waited for, as Envoy's.
pub(super) const REQUEST_LINE_BYTES_MAX: usize = 64 * 1024;

pub(super) fn look(seen: &mut Seen, stats: &InspectorStats) -> Verdict {
    if seen.is_tls {
        return Verdict::Done;
    }
    let protocol = match judge(&seen.bytes) {
        Judged::More => return Verdict::More,
        Judged::Http(protocol) => protocol,
        Judged::Other => {
            stats.http_not_found.increment(1);
            return Verdict::Done;
        }
    };
    match protocol {
        "http/1.0" => &stats.http10_found,
        "http/1.1" => &stats.http11_found,
        _ => &stats.http2_found,
    }
    .increment(1);
    seen.application_protocols = vec![protocol.to_owned()];
    Verdict::Done
}

#[derive(Debug, PartialEq, Eq)]
enum Judged {
    More,
    Http(&'static str),
    Other,
}

fn judge(bytes: &[u8]) -> Judged {
    if PREFACE.starts_with(bytes) {
        return if bytes.len() == PREFACE.len() {
            Judged::Http("h2c")
        } else {
            Judged::More
        };
    }
    if bytes.starts_with(PREFACE) {
        return Judged::Http("h2c");
    }
    let Some(end) = memchr::memchr(b'\n', bytes) else {
        return if bytes.len() < REQUEST_LINE_BYTES_MAX && may_become_a_line(bytes) {
            Judged::More
        } else {
            Judged::Other
        };
    };
    let line = bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]);
    let mut parts = line.split(|&byte| byte == b' ');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(method), Some([_, ..]), Some(version), None) if is_method(method) => match version {
            b"HTTP/1.1" => Judged::Http("http/1.1"),
            b"HTTP/1.0" => Judged::Http("http/1.0"),
            _ => Judged::Other,
        },
        _ => Judged::Other,
    }
}

/// Whether it is the beginning of a request line: a method, and text after it.
fn may_become_a_line(bytes: &[u8]) -> bool {
    let end = memchr::memchr(b' ', bytes).unwrap_or(bytes.len());
    let (method, rest) = bytes.split_at(end);
    is_method(method) && rest.iter().all(|&byte| byte >= b' ' || byte == b'\r')
}

fn is_method(text: &[u8]) -> bool {
    http::Method::from_bytes(text).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_are_judged() {
        for (bytes, want) in [
            (&b""[..], Judged::More),
            (b"PRI * HTT", Judged::More),
            (PREFACE, Judged::Http("h2c")),
            (b"GET / HTTP/1.1\r\nhost", Judged::Http("http/1.1")),
            (b"GET / HTTP/1.0\n", Judged::Http("http/1.0")),
            (b"GET / HTTP/3.0\r\n", Judged::Other),
            (b"GET /", Judged::More),
            (b"GE", Judged::More),
            (b"\x16\x03\x01", Judged::Other),
            (b"\x00\x00", Judged::Other),
            (b"GET  HTTP/1.1\r\n", Judged::Other),
            (b"hello there\n", Judged::Other),
        ] {
            assert_eq!(judge(bytes), want, "{bytes:?}");
        }
        assert_eq!(judge(&[b'A'; REQUEST_LINE_BYTES_MAX]), Judged::Other);
    }
}
