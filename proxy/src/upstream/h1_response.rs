//! The head of an HTTP/1 response: from bytes to fields, and what it says of the body and the connection. No IO.

use crate::h1::{self, decoder::Decoder};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Version, header,
    response::Parts,
};
use outrigger_filters::spare;
use std::mem::MaybeUninit;

/// Largest head of a response, those of interim responses before it included (Envoy's `max_response_headers_kb`).
pub(super) const RESPONSE_HEAD_BYTES_MAX: usize = 60 * 1024;
/// Most fields of a response head, as in Envoy.
pub(super) const RESPONSE_HEADERS_MAX: usize = 100;

/// Room for the fields that the proxy adds to a head, so that adding them moves nothing.
const HEADERS_ADDED: usize = 6;

/// The bytes are no response, or none that can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Garbage;

/// A head that was read.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) parts: Parts,
    /// Where its body is.
    pub(super) body: Decoder,
    /// The connection may be used again when the body is over.
    pub(super) keep_alive: bool,
    /// Bytes of the head.
    pub(super) used: usize,
}

/// Reads the head at the beginning of `bytes`, in answer to a request of this method; `None` if it is not whole yet.
/// Interim responses (1xx) before it are passed over: nobody below asked for one.
///
/// # Errors
/// See [`Garbage`].
pub(super) fn read(bytes: &[u8], asked: &Method) -> Result<Option<Head>, Garbage> {
    let mut skipped = 0;
    loop {
        let Some((mut parts, used)) = read_one(&bytes[skipped..])? else {
            return if bytes.len() >= RESPONSE_HEAD_BYTES_MAX {
                Err(Garbage)
            } else {
                Ok(None)
            };
        };
        skipped += used;
        if skipped > RESPONSE_HEAD_BYTES_MAX || parts.status == StatusCode::SWITCHING_PROTOCOLS {
            return Err(Garbage);
        }
        if !parts.status.is_informational() {
            let length = length(&parts.headers)?;
            let body = framing(&parts, length, asked)?;
            let keep_alive = keep_alive(&parts);
            // What follows is our answer, in our version and with one length.
            parts.version = Version::HTTP_11;
            say_length_once(&mut parts, length);
            return Ok(Some(Head {
                body,
                keep_alive,
                parts,
                used: skipped,
            }));
        }
    }
}

fn read_one(bytes: &[u8]) -> Result<Option<(Parts, usize)>, Garbage> {
    let mut fields = [const { MaybeUninit::uninit() }; RESPONSE_HEADERS_MAX];
    let mut found = httparse::Response::new(&mut []);
    let parsed = httparse::ParserConfig::default()
        .parse_response_with_uninit_headers(&mut found, bytes, &mut fields)
        .map_err(|_| Garbage)?;
    let httparse::Status::Complete(used) = parsed else {
        return Ok(None);
    };
    if has_bare_lf(&bytes[..used]) {
        return Err(Garbage);
    }
    // One copy of the head; its values are parts of it.
    let head = Bytes::copy_from_slice(&bytes[..used]);
    let base = bytes.as_ptr() as usize;
    let mut headers = spare::headers(found.headers.len() + HEADERS_ADDED);
    for field in found.headers.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| Garbage)?;
        let start = field.value.as_ptr() as usize - base;
        let value = head.slice(start..start + field.value.len());
        let value = HeaderValue::from_maybe_shared(value).map_err(|_| Garbage)?;
        headers.append(name, value);
    }
    let (mut parts, ()) = Response::new(()).into_parts();
    parts.status = found
        .code
        .and_then(|code| StatusCode::from_u16(code).ok())
        .ok_or(Garbage)?;
    parts.version = match found.version {
        Some(1) => Version::HTTP_11,
        Some(0) => Version::HTTP_10,
        _ => return Err(Garbage),
    };
    parts.headers = headers;
    Ok(Some((parts, used)))
}

/// A line that ends with LF alone: httparse takes it, and whoever else reads the same bytes may see other fields.
fn has_bare_lf(head: &[u8]) -> bool {
    memchr::memchr_iter(b'\n', head).any(|at| at == 0 || head[at - 1] != b'\r')
}

/// RFC 9112, 6.3. Where the end is anybody's guess, neither head nor body is handed on.
fn framing(parts: &Parts, length: Option<u64>, asked: &Method) -> Result<Decoder, Garbage> {
    let chunked = is_chunked(&parts.headers)?;
    if chunked && (length.is_some() || parts.version == Version::HTTP_10) {
        return Err(Garbage);
    }
    let empty = *asked == Method::HEAD
        || matches!(
            parts.status,
            StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
        );
    if empty {
        return Ok(Decoder::Done);
    }
    Ok(match (chunked, length) {
        (true, _) => Decoder::chunked(),
        (false, Some(0)) => Decoder::Done,
        (false, Some(length)) => Decoder::Length(length),
        (false, None) => Decoder::UntilClose,
    })
}

/// `content-length`, which may be said more than once if it is always the same.
fn length(headers: &HeaderMap) -> Result<Option<u64>, Garbage> {
    let mut length = None;
    for value in headers.get_all(header::CONTENT_LENGTH) {
        let text = value.to_str().map_err(|_| Garbage)?;
        for one in text.split(',') {
            let digits = one.trim_matches([' ', '\t']);
            if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(Garbage);
            }
            let one = digits.parse().map_err(|_| Garbage)?;
            if length.is_some_and(|length| length != one) {
                return Err(Garbage);
            }
            length = Some(one);
        }
    }
    Ok(length)
}

/// What counts, and nothing where there is no body to count. (Of HEAD and 304 it is the length of what was not sent.)
fn say_length_once(parts: &mut Parts, length: Option<u64>) {
    let Some(length) = length else {
        return;
    };
    if parts.status == StatusCode::NO_CONTENT {
        parts.headers.remove(header::CONTENT_LENGTH);
        return;
    }
    let mut digits = itoa::Buffer::new();
    let digits = digits.format(length).as_bytes();
    let mut said = parts.headers.get_all(header::CONTENT_LENGTH).iter();
    if said.next().is_none_or(|first| first.as_bytes() != digits) || said.next().is_some() {
        let length = HeaderValue::from(length);
        parts.headers.insert(header::CONTENT_LENGTH, length);
    }
}

/// Whether the body comes in chunks. Any other coding, and more than one, is garbage: we would hand on what we cannot
/// decode, without what tells how it is coded.
fn is_chunked(headers: &HeaderMap) -> Result<bool, Garbage> {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let Some(coding) = codings.next() else {
        return Ok(false);
    };
    let chunked = coding
        .as_bytes()
        .trim_ascii()
        .eq_ignore_ascii_case(b"chunked");
    if chunked && codings.next().is_none() {
        Ok(true)
    } else {
        Err(Garbage)
    }
}

fn keep_alive(parts: &Parts) -> bool {
    match parts.version {
        Version::HTTP_10 => h1::connection_says(&parts.headers, b"keep-alive"),
        _ => !h1::connection_says(&parts.headers, b"close"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Result<Option<Head>, Garbage> {
        read(text.as_bytes(), &Method::POST)
    }

    #[test]
    fn heads_say_where_their_bodies_end() {
        for (fields, body, keep_alive) in [
            ("content-length: 3", Decoder::Length(3), true),
            (
                "content-length: 3\r\nContent-Length: 3",
                Decoder::Length(3),
                true,
            ),
            ("content-length: 3, 3", Decoder::Length(3), true),
            ("content-length: 0", Decoder::Done, true),
            ("Transfer-Encoding: Chunked", Decoder::chunked(), true),
            ("transfer-encoding:\t chunked ", Decoder::chunked(), true),
            ("connection: x, Close", Decoder::UntilClose, false),
        ] {
            let text = format!("HTTP/1.1 200 OK\r\nx: 1\r\n{fields}\r\n\r\nbody");
            let head = head(&text).unwrap().unwrap();
            assert_eq!((head.body, head.keep_alive), (body, keep_alive), "{fields}");
            assert_eq!(
                (&text[head.used..], &head.parts.headers["x"]),
                ("body", &HeaderValue::from_static("1"))
            );
        }
        let old = head("HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\n")
            .unwrap()
            .unwrap();
        assert_eq!(
            (old.keep_alive, old.parts.version),
            (false, Version::HTTP_11),
            "it ends as an old answer does, and is handed on as ours"
        );
        let old = "HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 3\r\n\r\n";
        assert!(head(old).unwrap().unwrap().keep_alive);
    }

    #[test]
    fn answers_without_a_body_have_none_whatever_they_say() {
        let text = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n";
        assert!(read(text, &Method::HEAD).unwrap().unwrap().body.is_done());
        for status in ["204 No Content", "304 Not Modified"] {
            let text = format!("HTTP/1.1 {status}\r\netag: 1\r\n\r\n");
            assert!(head(&text).unwrap().unwrap().body.is_done());
        }
    }

    #[test]
    fn a_length_said_twice_is_not_handed_on_as_it_came() {
        for (status, fields, told) in [
            ("200 OK", "content-length: 3", Some("3")),
            (
                "200 OK",
                "content-length: 3\r\ncontent-length: 3",
                Some("3"),
            ),
            ("200 OK", "content-length: 3, 3", Some("3")),
            ("200 OK", "content-length: 003", Some("3")),
            ("304 Not Modified", "content-length: 3, 3", Some("3")),
            ("200 OK", "x: 1", None),
            ("204 No Content", "content-length: 0", None),
            (
                "204 No Content",
                "content-length: 3\r\ncontent-length: 3",
                None,
            ),
        ] {
            let text = format!("HTTP/1.1 {status}\r\n{fields}\r\n\r\n");
            let parts = head(&text).unwrap().unwrap().parts;
            let found: Vec<_> = parts
                .headers
                .get_all(header::CONTENT_LENGTH)
                .iter()
                .collect();
            assert_eq!(found, Vec::from_iter(told), "{text}");
        }
    }

    #[test]
    fn interim_responses_are_passed_over() {
        let text = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 201 C\r\n\r\n";
        let found = head(text).unwrap().unwrap();
        assert_eq!((found.parts.status.as_u16(), found.used), (201, text.len()));
        for cut in 0..text.len() {
            assert!(head(&text[..cut]).unwrap().is_none(), "cut at {cut}");
        }
        let endless = "HTTP/1.1 100 Continue\r\n\r\n".repeat(RESPONSE_HEAD_BYTES_MAX / 20);
        assert!(head(&endless).is_err());
    }

    #[test]
    fn what_is_no_response_or_none_to_trust_is_garbage() {
        let many = "x: 1\r\n".repeat(RESPONSE_HEADERS_MAX + 1);
        let long = format!("x: {}\r\n", "a".repeat(RESPONSE_HEAD_BYTES_MAX));
        for text in [
            "garbage\r\n\r\n",
            "HTTP/2.0 200 OK\r\n\r\n",
            "HTTP/1.1 099 OK\r\n\r\n",
            "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/1.1 204 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: +3\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 3,\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding:\r\n\r\n",
            "HTTP/1.1 304 OK\r\ntransfer-encoding: gzip\r\n\r\n",
            "HTTP/1.1 200 OK\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nx: 1\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 0\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\n",
            "\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 100 Continue\n\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nx: 1\r\n folded\r\n\r\n",
            "HTTP/1.1 200 OK\r\nx : 1\r\n\r\n",
            &format!("HTTP/1.1 200 OK\r\n{many}\r\n"),
            &format!("HTTP/1.1 200 OK\r\n{long}"),
        ] {
            assert!(head(text).is_err(), "{:.60}", text);
        }
    }

    /// Heads that are nearly right: what is read of them is all there, says one length at most, and does not depend on how
    /// the bytes came.
    #[test]
    fn spoilt_heads_are_a_head_or_garbage_however_they_come() {
        let good = [
            &b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"[..],
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Made\r\ncontent-length: 12\r\nx: y\r\n\r\n",
            b"HTTP/1.0 404 Not Found\r\nconnection: close\r\n\r\n",
        ];
        let spoil = b"\r\n\0 \t:;,0179HTP/.chunked\xff-";
        let mut seed = 11_u32;
        let mut below = |limit: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 17;
            seed ^= seed << 5;
            seed as usize % limit
        };
        let mut read_well = 0;
        for _ in 0..50_000 {
            let mut wire = good[below(good.len())].to_vec();
            for _ in 0..below(4) {
                let at = below(wire.len());
                match below(3) {
                    0 => wire[at] = spoil[below(spoil.len())],
                    1 => wire.insert(at, spoil[below(spoil.len())]),
                    _ => drop(wire.remove(at)),
                }
            }
            let Ok(Some(found)) = read(&wire, &Method::GET) else {
                continue;
            };
            read_well += 1;
            assert!(found.used <= wire.len(), "{wire:?}");
            let fields = &found.parts.headers;
            let lengths = fields.get_all(header::CONTENT_LENGTH).iter().count();
            let is_chunked = fields.contains_key(header::TRANSFER_ENCODING);
            assert!(lengths + usize::from(is_chunked) <= 1, "{wire:?}");
            let cut = below(found.used);
            let early = read(&wire[..cut], &Method::GET);
            assert!(!matches!(early, Ok(Some(_))), "cut at {cut}: {wire:?}");
        }
        assert!((1_000..50_000).contains(&read_well), "{read_well}");
    }
}
