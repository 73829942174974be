//! HTTP/2 (prior knowledge) to an endpoint, in practice the inbound listener of another proxy.

use super::{H2_STREAMS_MAX, classify, classify_body, connect::connect, h1::Merged};
use ahash::AHashMap;
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::{
    body::Incoming,
    client::conn::http2::{self, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use outrigger_filters::{
    body::{BodyError, RequestBody, ResponseBody},
    endpoints::{Endpoint, SendOptions},
    error::{Error, Flag, Retry},
};
use outrigger_xds::resource::endpoint::Address;
use std::{
    cell::RefCell,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
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
    streams: Arc<AtomicUsize>,
}

thread_local! {
    static OPEN: RefCell<AHashMap<Address, Vec<Conn>>> = RefCell::default();
}

impl Conn {
    fn reuse(address: &Address) -> Option<Self> {
        OPEN.with_borrow_mut(|open| {
            let conns = open.get_mut(address)?;
            conns.retain(|conn| !conn.sender.is_closed());
            conns
                .iter()
                .find(|conn| conn.streams.load(Relaxed) < H2_STREAMS_MAX)
                .cloned()
        })
    }

    async fn open(endpoint: &Arc<Endpoint>, options: SendOptions) -> Result<Self, Error> {
        let (socket, counted) = connect(endpoint, options.connect_timeout).await?;
        let handshake = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .handshake(TokioIo::new(socket));
        let (sender, driver) = tokio::time::timeout(options.connect_timeout, handshake)
            .await
            .map_err(|_| failure())?
            .map_err(|_| failure())?;
        tokio::spawn(async move {
            let _counted = counted;
            if let Err(error) = driver.await {
                tracing::debug!(%error, "h2 connection ended");
            }
        });
        let conn = Self {
            sender,
            streams: Arc::default(),
        };
        OPEN.with_borrow_mut(|open| {
            open.entry(endpoint.address.clone())
                .or_default()
                .push(conn.clone())
        });
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

/// One exchange.
pub(super) async fn send(
    endpoint: &Arc<Endpoint>,
    request: Request<RequestBody>,
    options: SendOptions,
) -> Result<Response<ResponseBody>, Error> {
    let mut conn = match Conn::reuse(&endpoint.address) {
        Some(conn) => conn,
        None => Conn::open(endpoint, options).await?,
    };
    let stream = Stream::new(conn.streams.clone());
    let answer = conn.sender.send_request(request);
    let response = match options.headers_timeout {
        Some(limit) => tokio::time::timeout(limit, answer)
            .await
            .map_err(|_| Error::upstream_timeout())?,
        None => answer.await,
    };
    let response = response.map_err(|error| classify(&error))?;
    Ok(response.map(|body| {
        Exchange {
            body,
            _stream: stream,
            held: None,
        }
        .boxed_unsync()
    }))
}

/// Counts one stream of a connection until dropped.
struct Stream(Arc<AtomicUsize>);

impl Stream {
    fn new(streams: Arc<AtomicUsize>) -> Self {
        streams.fetch_add(1, Relaxed);
        Self(streams)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
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
