//! A request on its way out over HTTP/1: its head serialised where it stands, its body as it comes.

use crate::{
    h1::{HEAD_BYTES, write_chunk_size, write_field},
    worker::FirstWrite,
};
use bytes::{Buf, Bytes};
use http::{HeaderMap, HeaderName, Method, Request, header};
use http_body::Body;
use outrigger_filters::{
    body::{BodyError, RequestBody},
    spare::Shelf,
};
use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::AsyncWrite;

thread_local! {
    /// For the next heads: nearly always one write takes all of it.
    static FRONT: Shelf<Vec<u8>> = const { Shelf::new() };
}

/// Larger buffers are not kept for the next head.
const FRONT_BYTES_KEPT_MAX: usize = 4 * 1024;

/// What kept a request from being sent.
#[derive(Debug)]
pub(super) enum SendError {
    /// The connection.
    Io(io::Error),
    /// Whoever sends the body.
    Body(BodyError),
}

/// A request that is not written whole yet.
pub(super) struct Outgoing {
    /// The head, or what stands before a chunk; written up to `front_sent`.
    front: Vec<u8>,
    front_sent: usize,
    /// Payload.
    piece: Bytes,
    /// What stands after it.
    tail: &'static [u8],
    first: FirstWrite,
    body: RequestBody,
    /// No more of the body is to be asked for.
    is_read: bool,
    chunked: bool,
    began: bool,
}

impl Outgoing {
    /// Of this head; nothing is written yet.
    pub(super) fn new(head: &Request<RequestBody>, body: RequestBody) -> Self {
        let mut front = FRONT.with(Shelf::take).unwrap_or_default();
        front.reserve(HEAD_BYTES);
        // Trailers have no place after a body of a told length.
        let length = body.size_hint().exact().filter(|_| !body.has_trailers());
        write_head(&mut front, head, length);
        Self {
            front,
            front_sent: 0,
            piece: Bytes::new(),
            tail: b"",
            first: FirstWrite::default(),
            is_read: length == Some(0) && body.is_end_stream(),
            body,
            chunked: length.is_none(),
            began: false,
        }
    }

    /// Whether anything of it has left, or of the body was read.
    pub(super) fn has_begun(&self) -> bool {
        self.began
    }

    /// The body again, of a request of which nothing was sent.
    pub(super) fn into_body(mut self) -> RequestBody {
        std::mem::replace(&mut self.body, RequestBody::empty())
    }

    /// Sends what can be sent; ready when all was.
    pub(super) fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut S,
    ) -> Poll<Result<(), SendError>> {
        // Before its body is touched: until then it can be sent elsewhere as if nothing had been.
        ready!(self.first.poll(cx));
        loop {
            let mut waits = false;
            if !self.is_read && self.piece.is_empty() && self.tail.is_empty() {
                match Pin::new(&mut self.body).poll_frame(cx) {
                    Poll::Pending => waits = true,
                    Poll::Ready(Some(Err(error))) => {
                        return Poll::Ready(Err(SendError::Body(error)));
                    }
                    Poll::Ready(frame) => self.load(frame.and_then(Result::ok)),
                }
            }
            if self.front.len() == self.front_sent && self.piece.is_empty() && self.tail.is_empty()
            {
                let flushed = Pin::new(&mut *socket).poll_flush(cx).map_err(SendError::Io);
                ready!(flushed)?;
                return match (self.is_read, waits) {
                    (true, _) => Poll::Ready(Ok(())),
                    (false, true) => Poll::Pending,
                    (false, false) => continue,
                };
            }
            let slices = [
                IoSlice::new(&self.front[self.front_sent..]),
                IoSlice::new(&self.piece),
                IoSlice::new(self.tail),
            ];
            let sent = ready!(Pin::new(&mut *socket).poll_write_vectored(cx, &slices));
            let sent = sent.map_err(SendError::Io)?;
            if sent == 0 {
                return Poll::Ready(Err(SendError::Io(io::ErrorKind::WriteZero.into())));
            }
            self.began = true;
            self.advance(sent);
        }
    }

    /// Makes the next frame ready to be written.
    fn load(&mut self, frame: Option<http_body::Frame<Bytes>>) {
        self.began = true;
        let Some(frame) = frame else {
            return self.end(None);
        };
        match frame.into_data() {
            Ok(piece) => {
                self.is_read = self.body.is_end_stream();
                if self.chunked && !piece.is_empty() {
                    write_chunk_size(&mut self.front, piece.len());
                    self.tail = if self.is_read {
                        b"\r\n0\r\n\r\n"
                    } else {
                        b"\r\n"
                    };
                } else if self.chunked && self.is_read {
                    self.end(None);
                }
                self.piece = piece;
            }
            Err(frame) => self.end(frame.into_trailers().ok().as_ref()),
        }
    }

    fn end(&mut self, trailers: Option<&HeaderMap>) {
        self.is_read = true;
        if !self.chunked {
            return;
        }
        self.front.extend_from_slice(b"0\r\n");
        for (name, value) in trailers.into_iter().flatten() {
            if !may_trail(name) {
                continue;
            }
            write_field(&mut self.front, name.as_str(), value.as_bytes());
        }
        self.tail = b"\r\n";
    }

    fn advance(&mut self, mut sent: usize) {
        let of_front = sent.min(self.front.len() - self.front_sent);
        self.front_sent += of_front;
        sent -= of_front;
        if self.front_sent == self.front.len() {
            self.front_sent = 0;
            self.front.clear();
        }
        let of_piece = sent.min(self.piece.len());
        self.piece.advance(of_piece);
        self.tail = &self.tail[sent - of_piece..];
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if self.front.capacity() <= FRONT_BYTES_KEPT_MAX {
            self.front.clear();
            FRONT.with(|kept| kept.keep(std::mem::take(&mut self.front)));
        }
    }
}

/// Request line and fields. The target is path and query; an authority in it is what the request was routed by, and
/// replaces whatever `host` says (RFC 9112, 3.2.2). `length` is the body's; none is chunked.
fn write_head(out: &mut Vec<u8>, request: &Request<RequestBody>, length: Option<u64>) {
    let uri = request.uri();
    out.extend_from_slice(request.method().as_str().as_bytes());
    out.push(b' ');
    let target = uri.path_and_query().map_or("/", |target| target.as_str());
    out.extend_from_slice(target.as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    let authority = uri.authority();
    if let Some(authority) = authority {
        write_field(out, "host", authority.as_str().as_bytes());
    }
    let mut is_framed = false;
    for (name, value) in request.headers() {
        if *name == header::TRANSFER_ENCODING || *name == header::HOST && authority.is_some() {
            continue;
        }
        if *name == header::CONTENT_LENGTH {
            // What is sent is what counts, and it is said once, in the same place.
            if let (Some(length), false) = (length, is_framed) {
                write_length(out, length);
                is_framed = true;
            }
            continue;
        }
        write_field(out, name.as_str(), value.as_bytes());
    }
    match length {
        None => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        Some(0) if is_framed || !usually_has_content(request.method()) => {}
        Some(length) if !is_framed => write_length(out, length),
        Some(_) => {}
    }
    out.extend_from_slice(b"\r\n");
}

/// Whether a trailer is handed on: none that says where a message goes or ends, or what proxies tell one another, since
/// nobody has looked at it there (RFC 9110, 6.5.1).
fn may_trail(name: &HeaderName) -> bool {
    let is_of_message = [
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
        header::HOST,
        header::TRAILER,
        header::TE,
        header::CONNECTION,
        header::UPGRADE,
    ]
    .contains(name);
    !is_of_message && !name.as_str().starts_with("x-outrigger-")
}

fn write_length(out: &mut Vec<u8>, length: u64) {
    write_field(
        out,
        "content-length",
        itoa::Buffer::new().format(length).as_bytes(),
    );
}

/// A method that usually brings content says so when it brings none, as in Envoy.
pub(super) fn usually_has_content(method: &Method) -> bool {
    !matches!(
        *method,
        Method::GET | Method::HEAD | Method::DELETE | Method::CONNECT | Method::TRACE
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker;
    use http_body::Frame;
    use http_body_util::{BodyExt, StreamBody};
    use std::future::poll_fn;

    /// What goes out of a request whose body, of these pieces and trailers, was read whole before.
    async fn sent(pieces: &[&'static str], trailers: &[(&'static str, &'static str)]) -> String {
        let mut told = HeaderMap::new();
        for (name, value) in trailers {
            told.append(*name, value.parse().unwrap());
        }
        let data = pieces.iter().map(|piece| Frame::data((*piece).into()));
        let told = (!told.is_empty()).then(|| Frame::trailers(told));
        let frames: Vec<Result<_, BodyError>> = data.chain(told).map(Ok).collect();
        let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
        let mut body = RequestBody::boxed(body);
        body.read_whole(1000).await.unwrap();
        let head = Request::post("/x").header("host", "a");
        let mut request = head.header("content-length", "5").body(body).unwrap();
        let body = request.body_mut().hand_over();
        let mut outgoing = Outgoing::new(&request, body);
        let mut wire = Vec::new();
        poll_fn(|cx| outgoing.poll_send(cx, &mut wire))
            .await
            .unwrap();
        String::from_utf8(wire).unwrap()
    }

    #[test]
    fn while_it_waits_for_the_end_of_the_turn_nothing_of_it_was_sent() {
        worker::begin_busy_turn();
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let frames = futures_util::stream::iter([Ok(Frame::data(Bytes::from("hello")))]);
        let body = RequestBody::boxed(StreamBody::new(frames).boxed_unsync());
        let mut request = Request::post("/x").body(body).unwrap();
        let body = request.body_mut().hand_over();
        let (mut outgoing, mut wire) = (Outgoing::new(&request, body), Vec::new());
        assert!(outgoing.poll_send(&mut cx, &mut wire).is_pending());
        assert!(!outgoing.has_begun() && wire.is_empty());
        let mut outgoing = Outgoing::new(&request, outgoing.into_body());
        while !matches!(outgoing.poll_send(&mut cx, &mut wire), Poll::Ready(Ok(()))) {}
        assert!(wire.ends_with(b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n"));
    }

    #[tokio::test]
    async fn trailers_of_a_body_that_was_read_whole_are_not_lost() {
        let chunked = "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
        assert_eq!(
            sent(&["he", "llo"], &[("x-sum", "1"), ("x-sum", "2")]).await,
            format!("{chunked}5\r\nhello\r\n0\r\nx-sum: 1\r\nx-sum: 2\r\n\r\n")
        );
        assert_eq!(
            sent(&[], &[("x-sum", "1")]).await,
            format!("{chunked}0\r\nx-sum: 1\r\n\r\n")
        );
        assert_eq!(
            sent(&["hello"], &[]).await,
            "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello",
            "without any the length is told"
        );
    }

    #[tokio::test]
    async fn trailers_do_not_frame_or_route_a_message() {
        let trailers = [
            ("content-length", "7"),
            ("transfer-encoding", "chunked"),
            ("host", "b"),
            ("trailer", "x"),
            ("te", "trailers"),
            ("connection", "close"),
            ("upgrade", "x"),
            ("x-outrigger-via", "x"),
            ("x-sum", "1"),
        ];
        let wire = sent(&["hello"], &trailers).await;
        let (_, after) = wire.split_once("hello\r\n").unwrap();
        assert_eq!(after, "0\r\nx-sum: 1\r\n\r\n");
    }
}
