//! HTTP/2 (prior knowledge) to an endpoint, in practice the inbound listener of another proxy.

use super::{
    H2_STREAMS_MAX,
    connect::{connect, is_idle_too_long},
    h2_error::{classify, classify_body},
    headers_within, is_spent,
    queue::{self, Queue, Slot},
};
use ahash::AHashMap;
use bytes::{Bytes, BytesMut};
use http::{Request, Response, Uri, Version, header, uri::PathAndQuery};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::{
    body::Incoming,
    client::conn::http2::{self, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use outrigger_filters::{
    body::{BodyError, RequestBody, ResponseBody, UploadState},
    endpoints::{Endpoint, Host, SendOptions, clock_ms},
    error::{Error, Flag, Retry},
};
use outrigger_xds::resource::{cluster::UpstreamProtocol, endpoint::Address};
use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

/// What one stalled stream may hold of a response.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
/// What all streams of a connection may hold; above the stream windows, so that stalled readers do not stop others.
const CONNECTION_WINDOW_BYTES: u32 = 64 * 1024 * 1024;
/// A peer that answers no PING for this long is gone (design: a link stall).
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// How often it is asked.
const PING_INTERVAL: Duration = Duration::from_secs(2);
const MERGE_BYTES_MAX: usize = 32 * 1024;

#[derive(Clone)]
struct Conn {
    sender: SendRequest<RequestBody>,
    usage: Arc<Usage>,
}

/// How a connection is used.
struct Usage {
    streams: AtomicUsize,
    /// Ever.
    requests: AtomicU32,
    /// As many streams as the peer takes.
    streams_allowed: Arc<AtomicUsize>,
    /// When the last stream ended, on [`clock_ms`]'s clock.
    idle_since_ms: AtomicU64,
    /// Whom it leads to.
    endpoint: Arc<Endpoint>,
}

impl Usage {
    /// Nobody will miss it.
    fn is_over(&self) -> bool {
        let idle_ms = clock_ms().saturating_sub(self.idle_since_ms.load(Relaxed));
        self.endpoint.host.has(Host::RETIRED)
            || self.streams.load(Relaxed) == 0 && is_idle_too_long(&self.endpoint, idle_ms)
    }
}

type Open = AHashMap<Address, Vec<Conn>>;

thread_local! {
    static OPEN: RefCell<Open> = RefCell::default();
    /// By [`Secured`](outrigger_filters::endpoints::Secured): never mixed, not with plain ones either.
    static OPEN_TLS: RefCell<AHashMap<u64, Open>> = RefCell::default();
}

fn with_open<T>(endpoint: &Endpoint, use_it: impl FnOnce(&mut Open) -> T) -> T {
    match &endpoint.tls {
        None => OPEN.with_borrow_mut(use_it),
        Some(tls) => OPEN_TLS.with_borrow_mut(|all| use_it(all.entry(tls.id).or_default())),
    }
}

/// Forgets connections of this thread that have ended, and leaves those that are idle for too long, or lead to endpoints
/// that nobody uses any more.
pub(super) fn close_idle() {
    let sweep = |open: &mut Open| {
        open.retain(|_, conns| {
            conns.retain(|conn| !conn.sender.is_closed() && !conn.usage.is_over());
            !conns.is_empty()
        });
    };
    OPEN.with_borrow_mut(sweep);
    OPEN_TLS.with_borrow_mut(|all| {
        all.retain(|_, open| {
            sweep(open);
            !open.is_empty()
        });
    });
}

impl Conn {
    /// As many as we like to have on one connection, or as few as the peer takes.
    fn streams_max(&self) -> usize {
        let allowed = self.usage.streams_allowed.load(Relaxed);
        allowed.clamp(1, H2_STREAMS_MAX)
    }

    /// Takes no more streams; it ends with those that it has.
    fn retire(&self, endpoint: &Endpoint) {
        with_open(endpoint, |open| {
            if let Some(conns) = open.get_mut(&endpoint.address) {
                conns.retain(|conn| !Arc::ptr_eq(&conn.usage, &self.usage));
                if conns.is_empty() {
                    open.remove(&endpoint.address);
                }
            }
        });
    }

    fn reuse(endpoint: &Endpoint) -> Option<Self> {
        with_open(endpoint, |open| {
            let conns = open.get_mut(&endpoint.address)?;
            conns.retain(|conn| !conn.sender.is_closed());
            if conns.is_empty() {
                open.remove(&endpoint.address);
                return None;
            }
            conns
                .iter()
                .find(|conn| conn.usage.streams.load(Relaxed) < conn.streams_max())
                .cloned()
        })
    }

    /// A new one, or, if there may be no more, one with room for a stream.
    async fn queued(endpoint: &Arc<Endpoint>, options: SendOptions) -> Result<Self, Error> {
        let mut queue = Queue::enter(endpoint, &options)?;
        loop {
            if let Some(slot) = queue.turn().await? {
                return Self::open(endpoint, options, slot).await;
            }
            if let Some(conn) = Self::reuse(endpoint) {
                return Ok(conn);
            }
        }
    }

    async fn open(
        endpoint: &Arc<Endpoint>,
        options: SendOptions,
        slot: Slot,
    ) -> Result<Self, Error> {
        let spoken = UpstreamProtocol::Http2;
        let (socket, counted) = connect(endpoint, spoken, options.connect_timeout, slot).await?;
        let handshake = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .handshake(TokioIo::new(socket));
        let (sender, mut driver) = tokio::time::timeout(options.connect_timeout, handshake)
            .await
            .map_err(|_| failure())?
            .map_err(|_| failure())?;
        let streams_allowed = Arc::new(AtomicUsize::new(driver.current_max_send_streams()));
        let allowed = streams_allowed.clone();
        tokio::spawn(async move {
            let _counted = counted;
            let driven = poll_fn(|cx| {
                let driven = Pin::new(&mut driver).poll(cx);
                allowed.store(driver.current_max_send_streams(), Relaxed);
                driven
            });
            if let Err(error) = driven.await {
                tracing::debug!(%error, "h2 connection ended");
            }
        });
        let conn = Self {
            sender,
            usage: Arc::new(Usage {
                streams: AtomicUsize::new(0),
                requests: AtomicU32::new(0),
                streams_allowed,
                idle_since_ms: AtomicU64::new(clock_ms()),
                endpoint: endpoint.clone(),
            }),
        };
        with_open(endpoint, |open| {
            open.entry(endpoint.address.clone())
                .or_default()
                .push(conn.clone())
        });
        queue::opened(endpoint);
        Ok(conn)
    }
}

fn failure() -> Error {
    Error::upstream_reset(
        Flag::UpstreamConnectionFailure,
        "remote connection failure",
        Retry::NothingSent,
    )
}

/// One exchange. The codec takes heads for good, so it gets a copy.
pub(super) async fn send(
    endpoint: &Arc<Endpoint>,
    request: &mut Request<RequestBody>,
    options: SendOptions,
) -> Result<Response<ResponseBody>, Error> {
    let mut conn = match Conn::reuse(endpoint) {
        Some(conn) => conn,
        // Boxed, as it is rare.
        None => Box::pin(Conn::queued(endpoint, options)).await?,
    };
    let requests = conn.usage.requests.fetch_add(1, Relaxed) + 1;
    if is_spent(endpoint, requests) {
        conn.retire(endpoint);
    }
    let stream = Stream::new(conn.usage.clone());
    let body = request.body_mut().hand_over();
    let upload = body.upload();
    let answer = conn.sender.try_send_request(copy(endpoint, request, body));
    let response = headers_within(
        options.headers_timeout,
        upload.as_ref(),
        Error::upstream_timeout,
        answer,
    )
    .await?;
    let response = response.map_err(|mut error| {
        let untouched = error.take_message();
        let is_untouched = untouched.is_some();
        if let Some(untouched) = untouched {
            *request.body_mut() = untouched.into_body();
        }
        match upload.map(|upload| upload.state()) {
            Some(UploadState::Broke) => Error::downstream_gone("the request body ended early"),
            Some(UploadState::Malformed) => Error::downstream_garbage(),
            _ if is_untouched => classify(&error.into_error()).retry(Retry::NothingSent),
            _ => classify(&error.into_error()),
        }
    })?;
    Ok(response.map(|body| {
        Exchange {
            body,
            _stream: stream,
            held: None,
        }
        .boxed_unsync()
    }))
}

/// The head in HTTP/2's form, which needs `:scheme` and `:authority`, with this body.
fn copy(
    endpoint: &Endpoint,
    request: &Request<RequestBody>,
    body: RequestBody,
) -> Request<RequestBody> {
    let mut copy = Request::new(body);
    *copy.method_mut() = request.method().clone();
    *copy.version_mut() = Version::HTTP_2;
    *copy.headers_mut() = request.headers().clone();
    let host = copy.headers_mut().remove(header::HOST);
    let uri = request.uri();
    let authority = uri
        .authority()
        .cloned()
        .or_else(|| host.and_then(|host| host.to_str().ok()?.parse().ok()))
        .or_else(|| endpoint.address.to_string().parse().ok());
    let path = uri.path_and_query().cloned();
    let scheme = if endpoint.tls.is_some() {
        "https"
    } else {
        "http"
    };
    let built = authority.and_then(|authority| {
        Uri::builder()
            .scheme(scheme)
            .authority(authority)
            .path_and_query(path.unwrap_or_else(|| PathAndQuery::from_static("/")))
            .build()
            .ok()
    });
    *copy.uri_mut() = built.unwrap_or_else(|| uri.clone());
    copy
}

/// Counts one stream of a connection until dropped.
struct Stream(Arc<Usage>);

impl Stream {
    fn new(usage: Arc<Usage>) -> Self {
        usage.streams.fetch_add(1, Relaxed);
        Self(usage)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.idle_since_ms.store(clock_ms(), Relaxed);
        self.0.streams.fetch_sub(1, Relaxed);
        queue::freed(&self.0.endpoint);
    }
}

struct Exchange {
    body: Incoming,
    _stream: Stream,
    /// An error or trailers met while bytes before them were still to be handed on.
    held: Option<Result<Frame<Bytes>, BodyError>>,
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
            let held = match Pin::new(&mut this.body).poll_frame(cx) {
                Poll::Pending => {
                    return merged
                        .finish()
                        .map_or(Poll::Pending, |data| Poll::Ready(Some(Ok(data))));
                }
                Poll::Ready(None) => return Poll::Ready(merged.finish().map(Ok)),
                Poll::Ready(Some(Err(error))) => Err(classify_body(&error)),
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        merged.push(data);
                        if merged.length() >= MERGE_BYTES_MAX {
                            return Poll::Ready(merged.finish().map(Ok));
                        }
                        continue;
                    }
                    Err(trailers) => Ok(trailers),
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

/// Bytes that are ready together: one piece stays as it is, several are joined.
#[derive(Default)]
struct Merged {
    first: Option<Bytes>,
    joined: BytesMut,
}

impl Merged {
    fn push(&mut self, data: Bytes) {
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

    fn length(&self) -> usize {
        self.joined.len() + self.first.as_ref().map_or(0, Bytes::len)
    }

    fn finish(self) -> Option<Frame<Bytes>> {
        let data = self.first.unwrap_or_else(|| self.joined.freeze());
        (!data.is_empty()).then(|| Frame::data(data))
    }
}
