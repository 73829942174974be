//! HTTP/1.1 to an endpoint: one exchange at a time on a connection that its own request drives.

use super::{
    IDLE_CONNECTIONS_MAX, IDLE_MS_MAX, classify, classify_body,
    connect::{OpenConnection, connect},
    headers_within, unanswered,
};
use crate::tls;
use ahash::AHashMap;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, Response, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::{
    body::Incoming,
    client::conn::http1::{self, Connection, SendRequest},
};
use hyper_util::rt::TokioIo;
use outrigger_filters::{
    body::{BodyError, RequestBody, ResponseBody},
    endpoints::{Endpoint, SendOptions, Unanswered, clock_ms},
    error::{Error, Flag, Retry},
};
use outrigger_xds::resource::endpoint::Address;
use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};

/// Frames that are ready together are joined up to this size, so that they leave in one write.
const MERGE_BYTES_MAX: usize = 32 * 1024;
/// A reused connection that ends this soon after a request was sent on it, with nothing received, had been closed by an
/// upstream that had not seen the request. Later, the upstream may have begun to work on it.
const STALE_MS_MAX: u64 = 100;

/// A connection with nothing running on it, or the one an exchange runs on.
struct Conn {
    sender: SendRequest<RequestBody>,
    driver: Connection<TokioIo<tls::Stream>, RequestBody>,
    _open: OpenConnection,
    idle_since_ms: u64,
}

/// A connection is large, and goes in and out with each request: hence boxed.
type Idle = AHashMap<Address, Vec<Box<Conn>>>;

thread_local! {
    static IDLE: RefCell<Idle> = RefCell::default();
    /// By [`Secured`](outrigger_filters::endpoints::Secured): never mixed, not with plain ones either.
    static IDLE_TLS: RefCell<AHashMap<u64, Idle>> = RefCell::default();
}

fn with_idle<T>(endpoint: &Endpoint, use_it: impl FnOnce(&mut Idle) -> T) -> T {
    match &endpoint.tls {
        None => IDLE.with_borrow_mut(use_it),
        Some(tls) => IDLE_TLS.with_borrow_mut(|all| use_it(all.entry(tls.id).or_default())),
    }
}

impl Conn {
    async fn open(endpoint: &Arc<Endpoint>, options: SendOptions) -> Result<Box<Self>, Error> {
        let (socket, open) = connect(endpoint, options.connect_timeout).await?;
        let (sender, driver) = http1::handshake(TokioIo::new(socket))
            .await
            .map_err(|error| classify(&error).retry(Retry::NothingSent))?;
        Ok(Box::new(Self {
            sender,
            driver,
            _open: open,
            idle_since_ms: 0,
        }))
    }

    /// Lets the connection notice that its peer closed it; true if it can take a request.
    fn poll_usable(&mut self, cx: &mut Context<'_>) -> bool {
        let closed = Pin::new(&mut self.driver).poll(cx).is_ready();
        !closed && matches!(self.sender.poll_ready(cx), Poll::Ready(Ok(())))
    }

    async fn reuse(endpoint: &Endpoint) -> Option<Box<Self>> {
        loop {
            let mut conn = with_idle(endpoint, |idle| idle.get_mut(&endpoint.address)?.pop())?;
            let fresh = clock_ms().saturating_sub(conn.idle_since_ms) < IDLE_MS_MAX;
            if fresh && poll_fn(|cx| Poll::Ready(conn.poll_usable(cx))).await {
                return Some(conn);
            }
        }
    }

    fn keep(mut self: Box<Self>, endpoint: &Endpoint, cx: &mut Context<'_>) {
        if !self.poll_usable(cx) {
            return;
        }
        self.idle_since_ms = clock_ms();
        with_idle(endpoint, |idle| {
            if let Some(conns) = idle.get_mut(&endpoint.address) {
                // Old ones are at the front; they go first.
                if conns.len() >= IDLE_CONNECTIONS_MAX {
                    conns.remove(0);
                }
                conns.push(self);
            } else {
                idle.insert(endpoint.address.clone(), vec![self]);
            }
        });
    }
}

/// Closes idle connections of this thread that are too old to be reused. Called now and then by each worker.
pub fn close_idle() {
    let now = clock_ms();
    let sweep = |idle: &mut Idle| {
        idle.retain(|_, conns| {
            conns.retain(|conn| now.saturating_sub(conn.idle_since_ms) < IDLE_MS_MAX);
            !conns.is_empty()
        });
    };
    IDLE.with_borrow_mut(sweep);
    IDLE_TLS.with_borrow_mut(|all| {
        all.retain(|_, idle| {
            sweep(idle);
            !idle.is_empty()
        });
    });
}

/// One exchange.
pub(super) async fn send(
    endpoint: &Arc<Endpoint>,
    request: Box<Request<RequestBody>>,
    options: SendOptions,
) -> Result<Response<ResponseBody>, Unanswered> {
    let Some(conn) = Conn::reuse(endpoint).await else {
        // Boxed, as it is rare: opening a connection would be part of every exchange's future.
        return Box::pin(send_anew(endpoint, request, options)).await;
    };
    // The peer may be closing the connection this very moment: nothing came back then, and a new one will tell.
    let spare = options.replace_stale.then(|| copy(&request)).flatten();
    let sent_ms = clock_ms();
    match exchange(conn, endpoint, request, options).await {
        Err(mut failed) if closed_while_idle(&failed.error, sent_ms) => {
            metrics::counter!("outrigger_upstream_stale_connections_total").increment(1);
            // The others are no younger, and whoever tries again is to get a new one.
            with_idle(endpoint, |idle| idle.remove(&endpoint.address));
            if let Some(request) = spare {
                return Box::pin(send_anew(endpoint, request, options)).await;
            }
            failed.error.stale = true;
            failed.error.retry = Retry::NothingSent;
            Err(failed)
        }
        outcome => outcome,
    }
}

async fn send_anew(
    endpoint: &Arc<Endpoint>,
    request: Box<Request<RequestBody>>,
    options: SendOptions,
) -> Result<Response<ResponseBody>, Unanswered> {
    match Conn::open(endpoint, options).await {
        Ok(conn) => exchange(conn, endpoint, request, options).await,
        Err(error) => Err(Unanswered {
            error,
            request: Some(request),
        }),
    }
}

fn closed_while_idle(error: &Error, sent_ms: u64) -> bool {
    error.retry != Retry::No
        && clock_ms().saturating_sub(sent_ms) <= STALE_MS_MAX
        && matches!(
            error.flag,
            Flag::UpstreamConnectionTermination
                | Flag::UpstreamConnectionFailure
                | Flag::UpstreamRemoteReset
        )
}

fn copy(request: &Request<RequestBody>) -> Option<Box<Request<RequestBody>>> {
    let mut copy = Box::new(Request::new(request.body().replay()?));
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.headers_mut() = request.headers().clone();
    Some(copy)
}

async fn exchange(
    mut conn: Box<Conn>,
    endpoint: &Arc<Endpoint>,
    request: Box<Request<RequestBody>>,
    options: SendOptions,
) -> Result<Response<ResponseBody>, Unanswered> {
    let upload = request.body().upload();
    let response = {
        let mut answer = pin!(conn.sender.try_send_request(*request));
        let driver = &mut conn.driver;
        let mut closed = false;
        let both = poll_fn(|cx| {
            if let Poll::Ready(response) = answer.as_mut().poll(cx) {
                return Poll::Ready(response);
            }
            if !closed {
                closed = Pin::new(&mut *driver).poll(cx).is_ready();
            }
            answer.as_mut().poll(cx)
        });
        headers_within(
            options.headers_timeout,
            upload.as_ref(),
            Error::upstream_timeout,
            both,
        )
        .await?
    };
    let response = response.map_err(|error| unanswered(error, upload.as_ref()))?;
    if framed_twice(response.headers()) {
        // Where it ends is anybody's guess (RFC 9112, 6.3): neither is handed on.
        return Err(Error::upstream_reset(
            Flag::UpstreamProtocolError,
            "protocol error",
            Retry::NothingReceived,
        )
        .into());
    }
    let endpoint = endpoint.clone();
    Ok(response.map(|body| {
        Exchange {
            body,
            conn: Some(conn),
            endpoint,
            held: None,
        }
        .boxed_unsync()
    }))
}

fn framed_twice(headers: &HeaderMap) -> bool {
    headers.contains_key(header::TRANSFER_ENCODING) && headers.contains_key(header::CONTENT_LENGTH)
}

/// A response body that drives its own connection.
struct Exchange {
    body: Incoming,
    conn: Option<Box<Conn>>,
    endpoint: Arc<Endpoint>,
    /// An error or trailers met while bytes before them were still to be handed on.
    held: Option<Result<Frame<Bytes>, BodyError>>,
}

impl Exchange {
    fn poll_one(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if frame.is_ready() {
            return frame;
        }
        if let Some(conn) = &mut self.conn {
            let _ = Pin::new(&mut conn.driver).poll(cx);
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn release(&mut self, cx: &mut Context<'_>) {
        if let Some(conn) = self.conn.take() {
            conn.keep(&self.endpoint, cx);
        }
    }
}

impl Body for Exchange {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Some(held) = this.held.take() {
            return Poll::Ready(Some(held));
        }
        let mut merged = Merged::default();
        loop {
            let held = match this.poll_one(cx) {
                Poll::Pending => {
                    return merged
                        .finish()
                        .map_or(Poll::Pending, |data| Poll::Ready(Some(Ok(data))));
                }
                Poll::Ready(None) => {
                    this.release(cx);
                    return Poll::Ready(merged.finish().map(Ok));
                }
                Poll::Ready(Some(Err(error))) => {
                    this.conn = None;
                    Err(classify_body(&error))
                }
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        merged.push(data);
                        if this.body.is_end_stream() {
                            this.release(cx);
                            return Poll::Ready(merged.finish().map(Ok));
                        }
                        if merged.length() >= MERGE_BYTES_MAX {
                            return Poll::Ready(merged.finish().map(Ok));
                        }
                        continue;
                    }
                    Err(trailers) => {
                        this.release(cx);
                        Ok(trailers)
                    }
                },
            };
            // What came before an error or trailers goes on first.
            return Poll::Ready(Some(match merged.finish() {
                Some(data) => {
                    this.held = Some(held);
                    Ok(data)
                }
                None => held,
            }));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        // A body that ended without being polled for its end (HEAD, 204, exact length) leaves a usable connection.
        if self.body.is_end_stream() && self.held.is_none() {
            let mut cx = Context::from_waker(std::task::Waker::noop());
            self.release(&mut cx);
        }
    }
}

/// Bytes that are ready together: one piece stays as it is, several are joined.
#[derive(Default)]
pub(super) struct Merged {
    first: Option<Bytes>,
    joined: BytesMut,
}

impl Merged {
    pub(super) fn push(&mut self, data: Bytes) {
        if self.joined.is_empty() {
            match self.first.take() {
                None => {
                    self.first = Some(data);
                    return;
                }
                Some(first) => self.joined.extend_from_slice(&first),
            }
        }
        self.joined.extend_from_slice(&data);
    }

    pub(super) fn length(&self) -> usize {
        self.joined.len() + self.first.as_ref().map_or(0, Bytes::len)
    }

    pub(super) fn finish(self) -> Option<Frame<Bytes>> {
        let data = self.first.unwrap_or_else(|| self.joined.freeze());
        (!data.is_empty()).then(|| Frame::data(data))
    }
}
