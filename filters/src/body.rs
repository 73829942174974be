//! Bodies on their way through the chain: streamed unless a filter asks for bytes, never copied twice.

use crate::{endpoints::clock_ms, error::Flag};
use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

/// A response body on its way to the client.
pub type ResponseBody = UnsyncBoxBody<Bytes, BodyError>;

/// Why a body ended early.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct BodyError {
    /// Envoy's response flag for it.
    pub flag: Flag,
    /// For people.
    pub message: String,
}

impl BodyError {
    /// An error with its flag.
    pub fn new(flag: Flag, message: impl fmt::Display) -> Self {
        Self {
            flag,
            message: message.to_string(),
        }
    }
}

/// A body of bytes at hand.
pub fn full(bytes: impl Into<Bytes>) -> ResponseBody {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// A body of nothing.
#[must_use]
pub fn empty() -> ResponseBody {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// Whether nothing more can come: the end was seen, or the announced length has come. (HTTP/2 tells the end of a body
/// of known length in a frame of its own, which nobody needs to wait for.)
pub fn is_over(body: &ResponseBody) -> bool {
    body.is_end_stream() || body.size_hint().exact() == Some(0)
}

/// How far a client's upload is, told to whoever waits for the upstream meanwhile.
#[derive(Debug, Clone)]
pub struct Upload(Arc<AtomicU64>);

/// See [`Upload::state`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UploadState {
    /// More is to come; the last piece came at this time.
    Runs(u64),
    /// All is here since this time.
    Ended(u64),
    /// The client broke off: what fails then is not the upstream's fault.
    Broke,
    /// The client sent what is no body.
    Malformed,
}

const UPLOAD_BROKE: u64 = u64::MAX;
const UPLOAD_MALFORMED: u64 = u64::MAX - 1;

impl Upload {
    fn begin() -> Self {
        Self(Arc::new(AtomicU64::new(clock_ms() << 1)))
    }

    /// How it stands; times are on [`clock_ms`]'s clock.
    #[must_use]
    pub fn state(&self) -> UploadState {
        match self.0.load(Relaxed) {
            UPLOAD_BROKE => UploadState::Broke,
            UPLOAD_MALFORMED => UploadState::Malformed,
            ended if ended & 1 == 1 => UploadState::Ended(ended >> 1),
            runs => UploadState::Runs(runs >> 1),
        }
    }

    fn note(&self, frame: Option<&Result<Frame<Bytes>, BodyError>>, over: bool) {
        let ended = over || frame.is_none();
        let state = match frame {
            Some(Err(error)) if error.flag == Flag::DownstreamProtocolError => UPLOAD_MALFORMED,
            Some(Err(_)) => UPLOAD_BROKE,
            _ => clock_ms() << 1 | u64::from(ended),
        };
        self.0.store(state, Relaxed);
    }
}

/// A request body: bytes already read, then the rest of the stream.
///
/// It is *replayable* (see [`RequestBody::replay`]) once it was read whole; until then it can be sent once.
pub struct RequestBody {
    read: Option<Bytes>,
    /// Comes after `read`, where `whole` is not all.
    more: Bytes,
    rest: Rest,
    /// Come after `read` and `rest`.
    trailers: Option<Box<HeaderMap>>,
    /// Set when `read`, `more` and `trailers` hold everything.
    whole: Option<Bytes>,
    /// Of a client that still sends.
    upload: Option<Upload>,
}

enum Rest {
    None,
    /// It was handed over to be sent.
    Spent,
    Incoming(ClientBody),
    Boxed(UnsyncBoxBody<Bytes, BodyError>),
}

/// The body of a client's request, from whichever codec reads it.
pub enum ClientBody {
    /// HTTP/2, by hyper.
    Http2(hyper::body::Incoming),
    /// HTTP/1, and all of it came with its head.
    AtHand(AtHand),
    /// HTTP/1, read while it is asked for.
    Streams(UnsyncBoxBody<Bytes, BodyError>),
}

/// A body that is all here.
pub struct AtHand {
    /// Its bytes.
    pub data: Bytes,
    /// Come last.
    pub trailers: Option<Box<HeaderMap>>,
    /// It has no end that is still to be seen: its length was announced, or was read.
    pub is_sized: bool,
}

/// Outcome of [`RequestBody::read_whole`].
#[derive(Debug, Clone)]
pub enum ReadOutcome {
    /// All of it; the body still forwards these very bytes.
    Whole(Bytes),
    /// Longer than the limit: streams on, unread beyond it.
    TooLarge,
}

impl RequestBody {
    /// No body.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            read: None,
            more: Bytes::new(),
            rest: Rest::None,
            trailers: None,
            whole: Some(Bytes::new()),
            upload: None,
        }
    }

    /// A body of bytes at hand.
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self {
            read: Some(bytes.clone()),
            more: Bytes::new(),
            rest: Rest::None,
            trailers: None,
            whole: Some(bytes),
            upload: None,
        }
    }

    /// A body of bytes at hand, in two pieces that nobody has to copy.
    #[must_use]
    pub fn joined(first: Bytes, more: Bytes) -> Self {
        Self {
            more,
            ..Self::full(first)
        }
    }

    /// The body of a request that a client sends.
    #[must_use]
    pub fn incoming(body: ClientBody) -> Self {
        if body.is_end_stream() {
            return Self::empty();
        }
        Self {
            read: None,
            more: Bytes::new(),
            rest: Rest::Incoming(body),
            trailers: None,
            whole: None,
            upload: Some(Upload::begin()),
        }
    }

    /// Any other stream.
    #[must_use]
    pub fn boxed(body: UnsyncBoxBody<Bytes, BodyError>) -> Self {
        Self {
            read: None,
            more: Bytes::new(),
            rest: Rest::Boxed(body),
            trailers: None,
            whole: None,
            upload: None,
        }
    }

    /// Reads the whole body if it is no longer than `limit` bytes. One frame is taken as it is; several are joined by
    /// one copy, and the joined bytes are what is forwarded.
    ///
    /// # Errors
    /// The client broke off or sent garbage.
    pub async fn read_whole(&mut self, limit: usize) -> Result<ReadOutcome, BodyError> {
        if let (Some(first), false) = (&self.whole, self.more.is_empty()) {
            let joined = Bytes::from([&first[..], &self.more].concat());
            *self = Self {
                trailers: self.trailers.take(),
                ..Self::full(joined)
            };
        }
        if let Some(whole) = &self.whole {
            return Ok(if whole.len() > limit {
                ReadOutcome::TooLarge
            } else {
                ReadOutcome::Whole(whole.clone())
            });
        }
        let hint = self.size_hint();
        if hint.lower() > limit as u64 {
            return Ok(ReadOutcome::TooLarge);
        }
        let mut joined = BytesMut::new();
        let mut first: Option<Bytes> = self.read.take();
        while let Some(frame) = std::future::poll_fn(|cx| self.poll_rest(cx)).await {
            let data = match frame?.into_data() {
                Ok(data) => data,
                Err(trailers) => {
                    self.trailers = trailers.into_trailers().ok().map(Box::new);
                    continue;
                }
            };
            let so_far = joined.len() + first.as_ref().map_or(0, Bytes::len);
            if joined.is_empty() {
                match first.take() {
                    None => first = Some(data),
                    Some(head) => {
                        joined.reserve((hint.lower() as usize).max(so_far + data.len()));
                        joined.extend_from_slice(&head);
                        joined.extend_from_slice(&data);
                    }
                }
            } else {
                joined.extend_from_slice(&data);
            }
            if joined.len() + first.as_ref().map_or(0, Bytes::len) > limit {
                self.read = Some(first.unwrap_or_else(|| joined.freeze()));
                return Ok(ReadOutcome::TooLarge);
            }
        }
        let whole = first.unwrap_or_else(|| joined.freeze());
        self.rest = Rest::None;
        self.read = (!whole.is_empty()).then(|| whole.clone());
        self.whole = Some(whole.clone());
        Ok(ReadOutcome::Whole(whole))
    }

    /// A second copy of the body (sharing its bytes), if it was read whole.
    #[must_use]
    pub fn replay(&self) -> Option<Self> {
        let mut copy = match self.whole.clone()? {
            whole if whole.is_empty() => Self::empty(),
            whole => Self::joined(whole, self.more.clone()),
        };
        copy.trailers.clone_from(&self.trailers);
        Some(copy)
    }

    /// The body to send now: one that shares its bytes, if it was read whole; else itself, which leaves a spent one.
    #[must_use]
    pub fn hand_over(&mut self) -> Self {
        if let Some(copy) = self.replay() {
            return copy;
        }
        let spent = Self {
            read: None,
            more: Bytes::new(),
            rest: Rest::Spent,
            trailers: None,
            whole: None,
            upload: self.upload.clone(),
        };
        std::mem::replace(self, spent)
    }

    /// Whether it was handed over, so that it cannot be sent again.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        matches!(self.rest, Rest::Spent)
    }

    /// Tells how far the client's upload is; `None` if all of it is here.
    #[must_use]
    pub fn upload(&self) -> Option<Upload> {
        self.upload.clone().filter(|_| self.whole.is_none())
    }

    /// Whether trailers are known to come after its bytes. Those of a body that still streams are not known yet.
    #[must_use]
    pub fn has_trailers(&self) -> bool {
        self.trailers.is_some()
    }

    /// The bytes that it was made of, if it was read whole and none of it was sent.
    #[must_use]
    pub fn parts(&self) -> Option<(Bytes, Bytes)> {
        Some((self.whole.clone()?, self.more.clone()))
    }

    /// The bytes that the client sent, if it was read whole.
    #[must_use]
    pub fn whole(&self) -> Option<&Bytes> {
        self.whole.as_ref()
    }

    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let next = match &mut self.rest {
            Rest::None | Rest::Spent => None,
            Rest::Incoming(body) => ready!(Pin::new(body).poll_frame(cx)),
            Rest::Boxed(body) => ready!(Pin::new(body).poll_frame(cx)),
        };
        if let (Some(upload), Rest::Incoming(body)) = (&self.upload, &self.rest) {
            upload.note(next.as_ref(), body.is_end_stream());
        }
        Poll::Ready(next)
    }
}

impl ClientBody {
    /// No body.
    #[must_use]
    pub fn empty() -> Self {
        Self::AtHand(AtHand {
            data: Bytes::new(),
            trailers: None,
            is_sized: true,
        })
    }
}

impl Body for ClientBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Http2(body) => Pin::new(body).poll_frame(cx).map_err(|error| {
                BodyError::new(fault(&error), format_args!("client's body broke: {error}"))
            }),
            Self::AtHand(body) => Poll::Ready(body.next().map(Ok)),
            Self::Streams(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http2(body) => body.is_end_stream(),
            Self::AtHand(body) => body.is_sized && body.data.is_empty() && body.trailers.is_none(),
            Self::Streams(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http2(body) => body.size_hint(),
            Self::AtHand(body) if body.is_sized => SizeHint::with_exact(body.data.len() as u64),
            Self::AtHand(_) => SizeHint::default(),
            Self::Streams(body) => body.size_hint(),
        }
    }
}

impl AtHand {
    fn next(&mut self) -> Option<Frame<Bytes>> {
        self.is_sized = true;
        if !self.data.is_empty() {
            return Some(Frame::data(std::mem::take(&mut self.data)));
        }
        self.trailers.take().map(|all| Frame::trailers(*all))
    }
}

/// Whether the client sent garbage or nothing more.
fn fault(error: &hyper::Error) -> Flag {
    use std::io::ErrorKind::{InvalidData, InvalidInput};
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return match io.kind() {
                InvalidData | InvalidInput => Flag::DownstreamProtocolError,
                _ => Flag::DownstreamConnectionTermination,
            };
        }
        source = cause.source();
    }
    Flag::DownstreamConnectionTermination
}

impl fmt::Debug for RequestBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestBody")
            .field("whole", &self.whole.as_ref().map(Bytes::len))
            .finish_non_exhaustive()
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(bytes) = self.read.take() {
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        if !self.more.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.more)))));
        }
        let next = ready!(self.poll_rest(cx));
        let trailers = || self.trailers.take().map(|all| Ok(Frame::trailers(*all)));
        Poll::Ready(next.or_else(trailers))
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_none()
            && self.more.is_empty()
            && self.trailers.is_none()
            && match &self.rest {
                Rest::None | Rest::Spent => true,
                Rest::Incoming(body) => body.is_end_stream(),
                Rest::Boxed(body) => body.is_end_stream(),
            }
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = match &self.rest {
            Rest::None | Rest::Spent => SizeHint::with_exact(0),
            Rest::Incoming(body) => body.size_hint(),
            Rest::Boxed(body) => body.size_hint(),
        };
        let read = self.read.as_ref().map_or(0, Bytes::len) + self.more.len();
        let read = read as u64;
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + read);
        }
        hint.set_lower(hint.lower() + read);
        hint
    }
}
