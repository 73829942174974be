//! What a client is told whose bytes are no request, in Envoy's words.

use super::{date, h1_request::Fault};
use crate::http::{ConnectionInfo, HEAD_LATE, Manager};
use bytes::Bytes;
use outrigger_filters::error::Flag;
use outrigger_xds::resource::server_header::ServerHeader;
use std::sync::Arc;

/// Of a head, what is looked at to say what was wrong with it.
const HEAD_BYTES_JUDGED_MAX: usize = 8 * 1024;

/// The answer to a head that is none; access log and metrics are told.
pub(super) fn answer(
    manager: &Manager,
    info: &Arc<ConnectionInfo>,
    head: &[u8],
    fault: Fault,
) -> Bytes {
    let head = &head[..head.len().min(HEAD_BYTES_JUDGED_MAX)];
    let Verdict {
        status,
        text,
        details,
    } = verdict(head, fault);
    let config = manager.config.load();
    let mut date = Vec::new();
    date::write(&mut date);
    let server = match config.manager.server_header {
        ServerHeader::PassThrough => String::new(),
        _ => format!("server: {}\r\n", config.manager.server_name),
    };
    // As in Envoy being late is against no protocol.
    let (flag, error, body) = match fault {
        Fault::Late => (None, "", "request header timeout"),
        Fault::Malformed | Fault::TooLarge => (
            Some(Flag::DownstreamProtocolError),
            "x-outrigger-error: DPE\r\n",
            text,
        ),
    };
    manager.refused(info, (status, flag), details, body.len());
    format!(
        "HTTP/1.1 {status} {text}\r\ncontent-length: {}\r\ncontent-type: text/plain\r\n\
         {error}{}{server}connection: close\r\n\r\n{body}",
        body.len(),
        String::from_utf8_lossy(&date),
    )
    .into()
}

/// What a refused client is told.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    status: u16,
    text: &'static str,
    details: &'static str,
}

/// The lines of a head, without their ends.
fn lines(head: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(head);
    std::iter::from_fn(move || {
        let here = rest?;
        let end = memchr::memchr(b'\n', here);
        rest = end.map(|end| &here[end + 1..]);
        let line = &here[..end.unwrap_or(here.len())];
        Some(line.strip_suffix(b"\r").unwrap_or(line))
    })
}

/// The value of a field, if the line is one of that name.
fn value<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let is_it = line.get(..name.len())?.eq_ignore_ascii_case(name);
    let rest = &line[name.len()..];
    (is_it && rest.first() == Some(&b':')).then(|| rest[1..].trim_ascii())
}

/// Whether both `content-length` and `transfer-encoding` say where the body ends.
fn is_framed_twice(head: &[u8]) -> bool {
    let fields = || lines(head).take_while(|line| !line.is_empty());
    let says = |name| fields().any(|line| value(line, name).is_some());
    says(b"content-length".as_slice()) && says(b"transfer-encoding")
}

/// Says what is wrong with a head, in Envoy's words.
fn verdict(head: &[u8], fault: Fault) -> Verdict {
    let bad = |details| Verdict {
        status: 400,
        text: "Bad Request",
        details,
    };
    let Some(line) = lines(head).find(|line| !line.is_empty()) else {
        return bad("http1.codec_error");
    };
    if fault == Fault::Late {
        return Verdict {
            status: 408,
            text: "Request Timeout",
            details: HEAD_LATE,
        };
    }
    if fault == Fault::TooLarge {
        return Verdict {
            status: 431,
            text: "Request Header Fields Too Large",
            details: if lines(head).count() > 100 {
                "http1.too_many_headers"
            } else {
                "http1.headers_too_large"
            },
        };
    }
    let mut words = line.split(|&byte| byte == b' ');
    let method = words.next().unwrap_or_default();
    if method.is_empty() || !method.iter().all(u8::is_ascii_alphanumeric) {
        return bad("http1.codec_error");
    }
    let target = words.next().unwrap_or_default();
    let version = words.next();
    if words.next().is_none() && is_other_version(target, version) {
        return Verdict {
            status: 426,
            text: "Upgrade Required",
            details: "low_version",
        };
    }
    let is_control = |&byte: &u8| byte < 0x20 && !b"\t\r\n".contains(&byte) || byte == 0x7f;
    if head.iter().any(is_control) {
        return bad("http1.invalid_characters");
    }
    if is_framed_twice(head) {
        return bad("http1.content_length_and_chunked_not_allowed");
    }
    let codings = || lines(head).filter_map(|line| value(line, b"transfer-encoding"));
    if codings().any(|coding| !coding.eq_ignore_ascii_case(b"chunked")) {
        return Verdict {
            status: 501,
            text: "Not Implemented",
            details: "http1.invalid_transfer_encoding",
        };
    }
    bad("http1.codec_error")
}

/// HTTP, but neither 1.0 nor 1.1. HTTP/0.9 has no version at all.
fn is_other_version(target: &[u8], version: Option<&[u8]>) -> bool {
    match version {
        None => target.starts_with(b"/"),
        Some([b'H', b'T', b'T', b'P', b'/', major, b'.', minor]) => {
            let known = *major == b'1' && matches!(minor, b'0' | b'1');
            major.is_ascii_digit() && minor.is_ascii_digit() && !known
        }
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_have_envoys_words() {
        let malformed = Fault::Malformed;
        for (head, fault, status, details) in [
            (
                &b"\x16\x03\x01 garbage\r\n\r\n"[..],
                malformed,
                400,
                "http1.codec_error",
            ),
            (b"GET / HTTP/1.2\r\n\r\n", malformed, 426, "low_version"),
            (b"GET /\r\n\r\n", malformed, 426, "low_version"),
            (b"GET / HTTP/x\r\n\r\n", malformed, 400, "http1.codec_error"),
            (
                b"GET / HTTP/1.1\r\na: \0\r\n\r\n",
                malformed,
                400,
                "http1.invalid_characters",
            ),
            (
                b"GET / HTTP/1.1\r\nTransfer-Encoding: x\r\n\r\n",
                malformed,
                501,
                "http1.invalid_transfer_encoding",
            ),
            (
                b"GET / HTTP/1.1\r\na: b\r\n\r\n",
                Fault::TooLarge,
                431,
                "http1.headers_too_large",
            ),
        ] {
            let found = verdict(head, fault);
            assert_eq!((found.status, found.details), (status, details));
        }
    }

    #[test]
    fn a_length_after_chunked_is_seen() {
        let head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n";
        assert!(is_framed_twice(head));
        assert!(!is_framed_twice(
            b"POST /a HTTP/1.1\r\ncontent-length: 4\r\n\r\ntransfer-encoding: x"
        ));
    }
}
