//! The head of an HTTP/1 response: from bytes to fields, and what it says of the body and the connection. No IO.

use super::h1_decoder::Decoder;
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Version, header,
    response::Parts,
};
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
        let Some((parts, used)) = read_one(&bytes[skipped..])? else {
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
            return Ok(Some(Head {
                body: framing(&parts, asked)?,
                keep_alive: keep_alive(&parts),
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
    // One copy of the head; its values are parts of it.
    let head = Bytes::copy_from_slice(&bytes[..used]);
    let base = bytes.as_ptr() as usize;
    let mut headers = HeaderMap::with_capacity(found.headers.len() + HEADERS_ADDED);
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

/// RFC 9112, 6.3. Where the end is anybody's guess, neither head nor body is handed on.
fn framing(parts: &Parts, asked: &Method) -> Result<Decoder, Garbage> {
    let headers = &parts.headers;
    let coding = headers
        .get_all(header::TRANSFER_ENCODING)
        .iter()
        .next_back();
    let length = length(headers)?;
    if coding.is_some() && (length.is_some() || parts.version == Version::HTTP_10) {
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
    Ok(match (coding, length) {
        (Some(coding), _) if ends_chunked(coding) => Decoder::chunked(),
        (None, Some(0)) => Decoder::Done,
        (None, Some(length)) => Decoder::Length(length),
        (Some(_), _) | (None, None) => Decoder::UntilClose,
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

fn ends_chunked(coding: &HeaderValue) -> bool {
    let last = coding.as_bytes().rsplit(|&byte| byte == b',').next();
    last.is_some_and(|last| last.trim_ascii().eq_ignore_ascii_case(b"chunked"))
}

fn keep_alive(parts: &Parts) -> bool {
    let says = |word: &[u8]| {
        let values = parts.headers.get_all(header::CONNECTION);
        let mut words = values
            .iter()
            .flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
        words.any(|told| told.trim_ascii().eq_ignore_ascii_case(word))
    };
    match parts.version {
        Version::HTTP_10 => says(b"keep-alive"),
        _ => !says(b"close"),
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
            ("Transfer-Encoding: gzip, Chunked", Decoder::chunked(), true),
            ("transfer-encoding: gzip", Decoder::UntilClose, true),
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
        assert!(!old.keep_alive);
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
            "HTTP/1.1 200 OK\r\nx: 1\r\n folded\r\n\r\n",
            "HTTP/1.1 200 OK\r\nx : 1\r\n\r\n",
            &format!("HTTP/1.1 200 OK\r\n{many}\r\n"),
            &format!("HTTP/1.1 200 OK\r\n{long}"),
        ] {
            assert!(head(text).is_err(), "{:.60}", text);
        }
    }
}
