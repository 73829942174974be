//! An answer on its way out over HTTP/1: its head, and its body as it comes.

use super::date;
use crate::{
    h1::{self, outbox::Outbox},
    worker::FirstWrite,
};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Version, header, response::Parts,
};
use http_body::Body;
use outrigger_filters::{body::ResponseBody, spare};
use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::AsyncWrite;

/// What an answer must know of its request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) version: Version,
    /// Nothing but the head is wanted.
    pub(super) head_only: bool,
    pub(super) takes_trailers: bool,
    /// The connection may go on after the answer.
    pub(super) keep_alive: bool,
}

/// How the client sees where the body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    /// After so many bytes more.
    Length(u64),
    Chunked,
    /// With the connection.
    UntilClose,
}

/// An answer that is not written whole yet.
pub(super) struct Outgoing {
    outbox: Outbox,
    first: FirstWrite,
    /// What is to be read of it.
    body: Option<ResponseBody>,
    framing: Framing,
    /// The connection ends with it.
    last: bool,
    /// The body ended where it should not: so does the connection.
    broken: bool,
    /// Trailers that may be sent.
    announced: Vec<HeaderName>,
}

impl Outgoing {
    /// An answer of which nothing is written yet.
    pub(super) fn new(response: Response<ResponseBody>, asked: Asked) -> Self {
        let (parts, body) = response.into_parts();
        let body = Some(body).filter(|body| !body.is_end_stream());
        let told = match &body {
            None => Told::Nothing,
            Some(body) => body.size_hint().exact().map_or(Told::Open, Told::Exactly),
        };
        let mut outbox = Outbox::default();
        let Head { framing, last } = write_head(outbox.text(), &parts, told, asked);
        let trails = framing == Framing::Chunked && asked.takes_trailers;
        let announced = if trails {
            announced(&parts.headers)
        } else {
            Vec::new()
        };
        spare::release_headers(parts.headers);
        Self {
            outbox,
            first: FirstWrite::default(),
            // A body that is not to be seen is not read.
            body: body.filter(|_| framing != Framing::Length(0)),
            framing,
            last,
            broken: false,
            announced,
        }
    }

    /// Its first write waits for no others.
    pub(super) fn hurry(&mut self) {
        self.first = FirstWrite::AT_ONCE;
    }

    /// Whether the connection ends with it.
    pub(super) fn is_last(&self) -> bool {
        self.last || self.framing == Framing::UntilClose
    }

    /// Sends what can be sent; ready when all was.
    ///
    /// # Errors
    /// The connection's, or that the body broke: what came of it was sent.
    pub(super) fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut S,
    ) -> Poll<io::Result<()>> {
        loop {
            self.fill(cx);
            if self.outbox.is_empty() && self.body.is_some() {
                self.outbox.release();
                return Poll::Pending;
            }
            ready!(self.first.poll(cx));
            ready!(self.outbox.poll_send(cx, socket))?;
            if self.broken {
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
            if self.body.is_none() {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Takes of the body what is there.
    fn fill(&mut self, cx: &mut Context<'_>) {
        while let Some(body) = &mut self.body
            && self.outbox.has_room()
            && let Poll::Ready(frame) = Pin::new(body).poll_frame(cx)
        {
            match frame {
                None => self.end(None),
                Some(Err(_)) => self.stop(true),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.take(data),
                    Err(frame) => self.end(frame.into_trailers().ok().as_ref()),
                },
            }
        }
    }

    fn take(&mut self, mut data: Bytes) {
        if !data.is_empty() {
            match &mut self.framing {
                Framing::UntilClose => self.outbox.push(data),
                Framing::Chunked => {
                    h1::write_chunk_size(self.outbox.text(), data.len());
                    self.outbox.push(data);
                    self.outbox.text().extend_from_slice(b"\r\n");
                }
                Framing::Length(left) => {
                    // Not a byte more than was announced.
                    data.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= data.len() as u64;
                    self.outbox.push(data);
                    if *left == 0 {
                        return self.stop(false);
                    }
                }
            }
        }
        if self.body.as_ref().is_some_and(Body::is_end_stream) {
            self.end(None);
        }
    }

    fn end(&mut self, trailers: Option<&HeaderMap>) {
        let out = self.outbox.text();
        match self.framing {
            Framing::Chunked => {
                out.extend_from_slice(b"0\r\n");
                for (name, value) in trailers.into_iter().flatten() {
                    if self.announced.contains(name) && may_trail(name) {
                        h1::write_field(out, name.as_str(), value.as_bytes());
                    }
                }
                out.extend_from_slice(b"\r\n");
                self.stop(false);
            }
            Framing::Length(left) => self.stop(left > 0),
            Framing::UntilClose => self.stop(false),
        }
    }

    /// Nothing more is read.
    fn stop(&mut self, broken: bool) {
        self.broken = broken;
        self.body = None;
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.outbox.release();
    }
}

/// What a body says of its length.
#[derive(Debug, Clone, Copy)]
enum Told {
    /// There is none.
    Nothing,
    Exactly(u64),
    Open,
}

struct Head {
    framing: Framing,
    last: bool,
}

/// Status line and fields, in the order they stand in; then how the body is framed, if no field said it, and the date.
fn write_head(out: &mut Vec<u8>, parts: &Parts, told: Told, asked: Asked) -> Head {
    write_status(out, parts.status, asked.version);
    let empty = has_no_body(parts.status, asked);
    let closes = !asked.keep_alive && parts.status != StatusCode::SWITCHING_PROTOCOLS;
    let mut head = Head {
        framing: Framing::Length(0),
        last: !asked.keep_alive || parts.status == StatusCode::SWITCHING_PROTOCOLS,
    };
    let (mut framed, mut dated, mut connection, mut trailer) = (false, false, false, false);
    for (name, value) in &parts.headers {
        match *name {
            header::CONTENT_LENGTH if framed => {}
            header::CONTENT_LENGTH => {
                let length = announced_length(value, told, asked);
                if let Some(length) = length {
                    let mut digits = itoa::Buffer::new();
                    // Whatever the field says, the client is to know where the next answer begins.
                    let told = match told {
                        Told::Exactly(_) if !empty => digits.format(length).as_bytes(),
                        _ => value.as_bytes(),
                    };
                    h1::write_field(out, "content-length", told);
                    head.framing = Framing::Length(length);
                    framed = true;
                }
            }
            // How it comes is said here and nowhere else.
            header::TRANSFER_ENCODING => {}
            header::CONNECTION if connection => {}
            header::CONNECTION => {
                connection = true;
                head.last |= h1::connection_says(&parts.headers, b"close");
                let close = closes && asked.version == Version::HTTP_11;
                write_joined(out, &parts.headers, name);
                if close && !h1::connection_says(&parts.headers, b"close") {
                    out.truncate(out.len() - 2);
                    out.extend_from_slice(b", close\r\n");
                }
            }
            header::TRAILER if trailer || empty || asked.version != Version::HTTP_11 => {}
            header::TRAILER => {
                trailer = true;
                write_joined(out, &parts.headers, name);
            }
            _ => {
                dated |= *name == header::DATE;
                h1::write_field(out, name.as_str(), value.as_bytes());
            }
        }
    }
    if closes && !connection && asked.version == Version::HTTP_11 {
        out.extend_from_slice(b"connection: close\r\n");
    }
    if !framed {
        head.framing = write_framing(out, parts.status, told, asked);
    }
    if empty {
        head.framing = Framing::Length(0);
    }
    if !dated {
        date::write(out);
    }
    out.extend_from_slice(b"\r\n");
    head
}

fn write_status(out: &mut Vec<u8>, status: StatusCode, version: Version) {
    if status == StatusCode::OK && version == Version::HTTP_11 {
        return out.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
    }
    let version = if version == Version::HTTP_11 {
        b"HTTP/1.1 "
    } else {
        b"HTTP/1.0 "
    };
    out.extend_from_slice(version);
    out.extend_from_slice(status.as_str().as_bytes());
    out.push(b' ');
    let reason = status.canonical_reason().unwrap_or("<none>");
    out.extend_from_slice(reason.as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// RFC 9112, 6.3.
fn has_no_body(status: StatusCode, asked: Asked) -> bool {
    asked.head_only
        || status.is_informational()
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

/// The length of the body, if the field that tells it may stand.
fn announced_length(value: &HeaderValue, told: Told, asked: Asked) -> Option<u64> {
    match told {
        Told::Exactly(length) => Some(length),
        Told::Open => h1::digits(value.as_bytes()),
        Told::Nothing => asked.head_only.then_some(0),
    }
}

/// What no field said.
fn write_framing(out: &mut Vec<u8>, status: StatusCode, told: Told, asked: Asked) -> Framing {
    let bodiless = has_no_body(
        status,
        Asked {
            head_only: false,
            ..asked
        },
    );
    match told {
        Told::Open if asked.version != Version::HTTP_11 || bodiless || asked.head_only => {
            Framing::UntilClose
        }
        Told::Open => {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n");
            Framing::Chunked
        }
        Told::Nothing | Told::Exactly(0) => {
            if !bodiless && !asked.head_only {
                out.extend_from_slice(b"content-length: 0\r\n");
            }
            Framing::Length(0)
        }
        Told::Exactly(length) => {
            if !bodiless {
                let mut digits = itoa::Buffer::new();
                h1::write_field(out, "content-length", digits.format(length).as_bytes());
            }
            Framing::Length(length)
        }
    }
}

/// All values of a field in one line.
fn write_joined(out: &mut Vec<u8>, headers: &HeaderMap, name: &HeaderName) {
    out.extend_from_slice(name.as_str().as_bytes());
    let mut separator: &[u8] = b": ";
    for value in headers.get_all(name) {
        out.extend_from_slice(separator);
        out.extend_from_slice(value.as_bytes());
        separator = b", ";
    }
    out.extend_from_slice(b"\r\n");
}

/// What `trailer` names.
fn announced(headers: &HeaderMap) -> Vec<HeaderName> {
    let values = headers.get_all(header::TRAILER).into_iter();
    let names = values.flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
    names
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .collect()
}

/// Whether a trailer may come to a client: none that says how a message is to be taken (RFC 9110, 6.5.1).
fn may_trail(name: &HeaderName) -> bool {
    let is_of_message = [
        header::AUTHORIZATION,
        header::CACHE_CONTROL,
        header::CONTENT_ENCODING,
        header::CONTENT_LENGTH,
        header::CONTENT_RANGE,
        header::CONTENT_TYPE,
        header::HOST,
        header::MAX_FORWARDS,
        header::SET_COOKIE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::TE,
    ];
    !is_of_message.contains(name)
}
