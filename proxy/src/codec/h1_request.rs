//! The head of an HTTP/1 request: from bytes to fields, and what it says of the body and the connection. No IO.
//!
//! It takes what can be read in one way only, and some of what cannot: `head::check` refuses that in the words of its
//! route, told by [`Odd`].

use crate::h1::{self, decoder::Decoder};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version, header, request::Parts,
};
use outrigger_filters::spare;
use std::mem::MaybeUninit;

/// Largest head that is read; `max_request_headers_kb` is the limit of those that go on.
pub(super) const REQUEST_HEAD_BYTES_MAX: usize = 408 * 1024;
/// Most fields of a head, as in Envoy.
const REQUEST_HEADERS_MAX: usize = 100;
/// Longest target.
const TARGET_BYTES_MAX: usize = 65_534;
/// Longest body that may be announced, as with hyper.
const LENGTH_MAX: u64 = u64::MAX - 2;
/// Room for the fields that the proxy adds to a head, so that adding them moves nothing.
const HEADERS_ADDED: usize = 8;

/// What was seen in the bytes of a head, and that its parsed form does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Odd {
    /// Both `content-length` and `transfer-encoding`.
    pub(crate) framed_twice: bool,
    /// The target has a fragment.
    pub(crate) fragment: bool,
    /// More than one `content-length`, though they agree.
    pub(crate) two_lengths: bool,
}

/// Why there is no request in the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Malformed,
    /// It, its target, or the number of its fields.
    TooLarge,
    /// It did not come in time.
    Late,
}

/// A head that was read.
#[derive(Debug)]
pub(super) struct Head {
    /// With [`Odd`] among the extensions, if it is.
    pub(super) parts: Parts,
    /// Where its body is.
    pub(super) body: Decoder,
    /// The length of the body was announced.
    pub(super) is_sized: bool,
    /// The client would ask on, on this connection.
    pub(super) keep_alive: bool,
    /// The client waits for a word before it sends the body.
    pub(super) expects: bool,
    /// The client understands trailers.
    pub(super) takes_trailers: bool,
    /// Bytes of the head.
    pub(super) used: usize,
}

/// Reads the head at the beginning of `bytes`; `None` if it is not whole yet.
///
/// # Errors
/// See [`Fault`].
pub(super) fn read(bytes: &[u8]) -> Result<Option<Head>, Fault> {
    let mut fields = [const { MaybeUninit::uninit() }; REQUEST_HEADERS_MAX];
    let mut found = httparse::Request::new(&mut []);
    let parsed = found.parse_with_uninit_headers(bytes, &mut fields);
    let used = match parsed {
        Ok(httparse::Status::Complete(used)) => used,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Fault::TooLarge),
        Err(_) => return Err(Fault::Malformed),
    };
    let target = found.path.ok_or(Fault::Malformed)?;
    if used > REQUEST_HEAD_BYTES_MAX || target.len() > TARGET_BYTES_MAX {
        return Err(Fault::TooLarge);
    }
    // One copy of the head; target and values are parts of it.
    let head = Bytes::copy_from_slice(&bytes[..used]);
    let base = bytes.as_ptr() as usize;
    let part = |of: &[u8]| {
        let start = of.as_ptr() as usize - base;
        head.slice(start..start + of.len())
    };
    let (mut parts, ()) = Request::new(()).into_parts();
    let method = found.method.ok_or(Fault::Malformed)?;
    parts.method = Method::from_bytes(method.as_bytes()).map_err(|_| Fault::Malformed)?;
    parts.uri = Uri::from_maybe_shared(part(target.as_bytes())).map_err(|_| Fault::Malformed)?;
    parts.version = match found.version {
        Some(1) => Version::HTTP_11,
        _ => Version::HTTP_10,
    };
    let mut reader = Reader::new(parts.version, found.headers.len());
    for field in found.headers.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| Fault::Malformed)?;
        let value = part(field.value);
        let value = HeaderValue::from_maybe_shared(value).map_err(|_| Fault::Malformed)?;
        reader.field(name, value)?;
    }
    let fragment = target.contains('#');
    reader.finish(parts, fragment, used).map(Some)
}

/// Takes fields one by one.
struct Reader {
    version: Version,
    headers: HeaderMap,
    length: Option<u64>,
    lengths: u8,
    /// `transfer-encoding` was said, and chunked last (in the line that came last).
    coding: Option<bool>,
    close: bool,
    expects: bool,
    takes_trailers: bool,
}

impl Reader {
    fn new(version: Version, fields: usize) -> Self {
        Self {
            version,
            headers: spare::headers(fields + HEADERS_ADDED),
            length: None,
            lengths: 0,
            coding: None,
            close: version != Version::HTTP_11,
            expects: false,
            takes_trailers: false,
        }
    }

    fn field(&mut self, name: HeaderName, value: HeaderValue) -> Result<(), Fault> {
        match name {
            header::TRANSFER_ENCODING => {
                if self.version != Version::HTTP_11 {
                    return Err(Fault::Malformed);
                }
                self.headers.remove(header::CONTENT_LENGTH);
                self.coding = Some(ends_chunked(value.as_bytes()));
            }
            header::CONTENT_LENGTH => {
                self.lengths = self.lengths.saturating_add(1);
                if self.coding.is_some() {
                    return Ok(());
                }
                let length = h1::digits(value.as_bytes()).ok_or(Fault::Malformed)?;
                match self.length {
                    _ if length > LENGTH_MAX => return Err(Fault::TooLarge),
                    Some(before) if before != length => return Err(Fault::Malformed),
                    Some(_) => return Ok(()),
                    None => self.length = Some(length),
                }
            }
            header::CONNECTION => self.close |= h1::has_word(value.as_bytes(), b"close"),
            header::EXPECT => {
                self.expects = value.as_bytes().eq_ignore_ascii_case(b"100-continue");
            }
            header::TE => self.takes_trailers |= h1::has_word(value.as_bytes(), b"trailers"),
            _ => {}
        }
        self.headers.append(name, value);
        Ok(())
    }

    fn finish(self, mut parts: Parts, fragment: bool, used: usize) -> Result<Head, Fault> {
        let body = match (self.coding, self.length) {
            (Some(false), _) => return Err(Fault::Malformed),
            (Some(true), _) => Decoder::chunked(),
            (None, None | Some(0)) => Decoder::Done,
            (None, Some(length)) => Decoder::Length(length),
        };
        let odd = Odd {
            framed_twice: self.lengths > 0 && self.coding.is_some(),
            fragment,
            two_lengths: self.lengths > 1,
        };
        if odd != Odd::default() {
            parts.extensions.insert(odd);
        }
        parts.headers = self.headers;
        Ok(Head {
            keep_alive: !self.close && !odd.framed_twice,
            expects: self.expects && self.version == Version::HTTP_11 && !body.is_done(),
            takes_trailers: self.takes_trailers,
            is_sized: body.left().is_some(),
            parts,
            body,
            used,
        })
    }
}

fn ends_chunked(codings: &[u8]) -> bool {
    let last = codings.rsplit(|&byte| byte == b',').next();
    last.is_some_and(|last| last.trim_ascii().eq_ignore_ascii_case(b"chunked"))
}

/// Whether a head may be whole now that it is longer than `before`; to look at half a head again costs.
pub(super) fn may_be_whole(bytes: &[u8], before: usize) -> bool {
    let from = before.saturating_sub(3);
    let ends = |at: usize| {
        let before = &bytes[..at];
        before.ends_with(b"\n") || before.ends_with(b"\n\r")
    };
    memchr::memchr_iter(b'\n', &bytes[from..]).any(|at| ends(from + at))
}

/// Whether there is more than the empty lines that may stand before a request.
pub(super) fn has_begun(bytes: &[u8]) -> bool {
    bytes.iter().any(|byte| !matches!(byte, b'\r' | b'\n'))
}
