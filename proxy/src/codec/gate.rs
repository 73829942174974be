//! Between hyper and the socket of a client: what it cannot parse hyper answers by itself, with a bare status. The gate
//! notices that, says it in Envoy's words instead, and tells access log and metrics.
//!
//! It never judges a request that hyper takes; it only remembers of a head what its parsed form does not tell.

use super::exchange::Odd;
use crate::http::{ConnectionInfo, Manager};
use bytes::{Buf, Bytes};
use outrigger_filters::error::Flag;
use outrigger_xds::resource::{listener::Codec, server_header::ServerHeader};
use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Of a head, remembered to say what was wrong with it.
pub(super) const HEAD_BYTES_KEPT_MAX: usize = 8 * 1024;
/// Unread bytes that are thrown away when a connection is closed.
pub(super) const LEFTOVER_BYTES_MAX: usize = 64 * 1024;
/// How HTTP/2 begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0";
/// How hyper's own refusals begin.
const REFUSAL: &[u8] = b"HTTP/1.1 4";

/// A client's socket.
pub(super) struct Gate<S: AsyncRead + Unpin> {
    socket: S,
    manager: Arc<Manager>,
    info: Arc<ConnectionInfo>,
    /// The head that is being read, as far as it is kept.
    head: Vec<u8>,
    /// Something else than HTTP/1 is spoken.
    open: bool,
    /// What is left to say of our own refusal.
    words: Option<Bytes>,
    /// Until it is known which version begins, where only one is spoken.
    only: Option<Only>,
}

impl<S: AsyncRead + Unpin> Gate<S> {
    pub(super) fn new(socket: S, manager: Arc<Manager>, info: Arc<ConnectionInfo>) -> Self {
        let codec = manager.config.load().manager.codec;
        Self {
            only: Only::of(codec),
            socket,
            manager,
            info,
            head: Vec::new(),
            open: false,
            words: None,
        }
    }

    /// Takes what has arrived, so that the close is one: the system resets a connection that it closes with bytes
    /// unread, and the client might lose our last words.
    fn read_out(&mut self) {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut piece = [0; 4096];
        for _ in 0..LEFTOVER_BYTES_MAX / piece.len() {
            let mut buffer = ReadBuf::new(&mut piece);
            let read = Pin::new(&mut self.socket).poll_read(&mut cx, &mut buffer);
            if !matches!(read, Poll::Ready(Ok(()))) || buffer.filled().is_empty() {
                return;
            }
        }
    }

    fn remember(&mut self, read: &[u8]) {
        if self.info.exchange.take_served() {
            self.head.clear();
        }
        if self.head.is_empty() && read.starts_with(b"PRI ") {
            self.open = true;
            return;
        }
        let room = HEAD_BYTES_KEPT_MAX.saturating_sub(self.head.len());
        self.head.extend_from_slice(&read[..read.len().min(room)]);
        self.info.exchange.note(odd(&self.head));
    }

    /// Whether hyper is about to refuse by itself; then our words are ready.
    fn is_refusal(&mut self, buffer: &[u8]) -> bool {
        if self.open || self.info.exchange.is_answered() {
            return false;
        }
        if self.words.is_none() && buffer.starts_with(REFUSAL) {
            self.words = Some(self.refusal(buffer));
        }
        self.words.is_some()
    }

    fn refusal(&self, by_hyper: &[u8]) -> Bytes {
        let text = String::from_utf8_lossy(by_hyper);
        let status = text.get(9..12).and_then(|code| code.parse().ok());
        let verdict = verdict(&self.head, status.unwrap_or(400));
        let date = text.lines().find(|line| line.starts_with("date:"));
        let date = date.map_or(String::new(), |date| format!("{date}\r\n"));
        let config = self.manager.config.load();
        let server = match config.manager.server_header {
            ServerHeader::PassThrough => String::new(),
            _ => format!("server: {}\r\n", config.manager.server_name),
        };
        let Verdict {
            status,
            text,
            details,
        } = verdict;
        self.manager.refused(
            &self.info,
            (status, Flag::DownstreamProtocolError),
            details,
            text.len(),
        );
        format!(
            "HTTP/1.1 {status} {text}\r\ncontent-length: {}\r\ncontent-type: text/plain\r\n\
             x-outrigger-error: DPE\r\n{date}{server}connection: close\r\n\r\n{text}",
            text.len()
        )
        .into()
    }
}

impl<S: AsyncRead + Unpin> Drop for Gate<S> {
    fn drop(&mut self) {
        self.read_out();
        let unserved = !self.head.is_empty() && !self.info.exchange.is_served();
        if !self.open && unserved && self.words.is_none() {
            // It went away in the middle of its head.
            let gone = (0, Flag::DownstreamConnectionTermination);
            self.manager
                .refused(&self.info, gone, "downstream_remote_disconnect", 0);
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Gate<S> {
    fn poll_words(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(words) = &mut self.words {
            while words.has_remaining() {
                let count = ready!(Pin::new(&mut self.socket).poll_write(cx, words))?;
                words.advance(count);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gate<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buffer))?;
        if let Some(only) = &mut self.only {
            match only.judge(&buffer.filled()[before..]) {
                Some(true) => self.only = None,
                Some(false) => {
                    self.manager.stats.downstream_cx_protocol_error.increment(1);
                    return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
                }
                None => {}
            }
        }
        if !self.open && !self.info.exchange.is_busy() {
            self.remember(&buffer.filled()[before..]);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Gate<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.is_refusal(buffer) {
            return Poll::Ready(Ok(buffer.len()));
        }
        Pin::new(&mut self.socket).poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if buffers.first().is_some_and(|first| self.is_refusal(first)) {
            return Poll::Ready(Ok(buffers.iter().map(|buffer| buffer.len()).sum()));
        }
        Pin::new(&mut self.socket).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_words(cx))?;
        ready!(Pin::new(&mut self.socket).poll_flush(cx))?;
        self.info.exchange.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_words(cx))?;
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// Holds a connection to the one version that its listener speaks. hyper forgets that where it lets connections be
/// upgraded.
struct Only {
    http2: bool,
    /// Bytes of the preface that have come.
    seen: usize,
}

impl Only {
    fn of(codec: Codec) -> Option<Self> {
        (codec != Codec::Auto).then_some(Self {
            http2: codec == Codec::Http2,
            seen: 0,
        })
    }

    /// Whether what came next is of that version; `None` if that cannot be said yet.
    fn judge(&mut self, read: &[u8]) -> Option<bool> {
        let next = &PREFACE[self.seen..];
        let count = read.len().min(next.len());
        if read[..count] != next[..count] {
            return Some(!self.http2);
        }
        self.seen += count;
        (self.seen == PREFACE.len()).then_some(self.http2)
    }
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

/// Looks for what hyper takes and does not tell.
fn odd(head: &[u8]) -> Odd {
    let mut odd = Odd::default();
    let (mut lengths, mut coding) = (0, false);
    for (index, line) in lines(head).enumerate() {
        match line.first() {
            // The first line may be empty, and the target is in the first that is not.
            None if index > 1 => break,
            Some(b'c' | b'C') => {
                lengths += u8::from(value(line, b"content-length").is_some());
            }
            Some(b't' | b'T') => coding |= value(line, b"transfer-encoding").is_some(),
            _ => {}
        }
        if index == 0 {
            odd.fragment = line.contains(&b'#');
        }
    }
    odd.framed_twice = lengths > 0 && coding;
    odd.two_lengths = lengths > 1;
    odd
}

/// Says what is wrong with a head that hyper refused, in Envoy's words. `status` is hyper's.
fn verdict(head: &[u8], status: u16) -> Verdict {
    let bad = |details| Verdict {
        status: 400,
        text: "Bad Request",
        details,
    };
    let Some(line) = lines(head).find(|line| !line.is_empty()) else {
        return bad("http1.codec_error");
    };
    if status == 431 || status == 414 {
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
    if odd(head).framed_twice {
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
        for (head, hyper, status, details) in [
            (
                &b"\x16\x03\x01 garbage\r\n\r\n"[..],
                400,
                400,
                "http1.codec_error",
            ),
            (b"GET / HTTP/1.2\r\n\r\n", 400, 426, "low_version"),
            (b"GET /\r\n\r\n", 400, 426, "low_version"),
            (b"GET / HTTP/x\r\n\r\n", 400, 400, "http1.codec_error"),
            (
                b"GET / HTTP/1.1\r\na: \0\r\n\r\n",
                400,
                400,
                "http1.invalid_characters",
            ),
            (
                b"GET / HTTP/1.1\r\nTransfer-Encoding: x\r\n\r\n",
                400,
                501,
                "http1.invalid_transfer_encoding",
            ),
            (
                b"GET / HTTP/1.1\r\na: b\r\n\r\n",
                431,
                431,
                "http1.headers_too_large",
            ),
        ] {
            let found = verdict(head, hyper);
            assert_eq!((found.status, found.details), (status, details));
        }
    }

    #[test]
    fn one_version_is_told_from_the_other_however_it_is_cut() {
        for (codec, begins, expected) in [
            (Codec::Http2, &b"PRI * HTTP/2.0\r\n"[..], true),
            (Codec::Http2, b"POST / HTTP/1.1\r\n", false),
            (Codec::Http1, b"POST / HTTP/1.1\r\n", true),
            (Codec::Http1, b"PRI * HTTP/2.0\r\n", false),
        ] {
            for step in 1..=begins.len() {
                let mut only = Only::of(codec).unwrap();
                let judged = begins.chunks(step).find_map(|piece| only.judge(piece));
                assert_eq!(judged, Some(expected), "{codec:?}, pieces of {step}");
            }
        }
        assert!(Only::of(Codec::Auto).is_none());
    }

    #[test]
    fn a_length_after_chunked_is_seen() {
        let head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n";
        assert!(odd(head).framed_twice);
        assert!(
            !odd(b"POST /a HTTP/1.1\r\ncontent-length: 4\r\n\r\ntransfer-encoding: x").framed_twice
        );
        assert!(odd(b"GET /a#b HTTP/1.1\r\n\r\n").fragment);
    }
}
