//! How admin connections are taken, limited and ended. What is answered on them is [`super::endpoints`]' business.

use super::{Admin, endpoints};
use crate::{listener::bind::Acceptor, socket::Socket};
use http::{Request, Version};
use http_body_util::Either;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use outrigger_xds::csds;
use std::{
    convert::Infallible,
    future::Future,
    io,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::{Instant, Sleep, sleep, timeout},
};
use tower::ServiceExt;

/// What one admin listener grants its clients.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections open at once; one more is answered 503 and closed.
    pub connections_max: usize,
    /// For the head of a request to arrive.
    pub head_timeout: Duration,
    /// Without a byte either way, between requests or within an answer.
    pub idle_timeout: Duration,
    /// In all; then the connection is closed after the answer it is at.
    pub age_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 64,
            head_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            age_max: Duration::from_secs(600),
        }
    }
}

/// To finish the answers begun when the listener ends or a connection is too old.
const FAREWELL: Duration = Duration::from_secs(1);
/// After a failed `accept` (out of file descriptors, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Requests at once on a connection of HTTP/2.
const STREAMS_MAX: u32 = 8;
/// Of a connection, to know what is spoken on it: as long as the preface of HTTP/2.
const PREFACE_BYTES: usize = 24;
const REFUSAL: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 27\r\nconnection: close\r\n\r\ntoo many admin connections\n";

pub(super) async fn accept(
    listener: Acceptor,
    admin: Arc<Admin>,
    limits: Limits,
    shutdown: impl Future,
) {
    crate::metrics::install();
    let refused = metrics::counter!("outrigger_admin_connections_refused_total");
    let slots = Arc::new(Semaphore::new(limits.connections_max));
    let (end, ended) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            _ = &mut shutdown => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "admin: cannot accept");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            refused.increment(1);
            // A fresh socket takes so little at once, or its client gets nothing.
            let _ = stream.try_write(REFUSAL);
            continue;
        };
        connections.spawn(serve_one(
            stream,
            admin.clone(),
            limits,
            ended.clone(),
            slot,
        ));
    }
    drop(listener);
    drop(end);
    // Those that are not done by then are dropped with the set.
    let _ = timeout(FAREWELL, async {
        while connections.join_next().await.is_some() {}
    })
    .await;
}

async fn serve_one(
    stream: Socket,
    admin: Arc<Admin>,
    limits: Limits,
    mut ended: watch::Receiver<()>,
    _slot: OwnedSemaphorePermit,
) {
    let status = csds::service(admin.state.client_status.clone());
    let service = service_fn(move |request: Request<Incoming>| {
        let (admin, status) = (admin.clone(), status.clone());
        async move {
            let is_grpc = request.version() == Version::HTTP_2;
            if is_grpc && request.uri().path().starts_with(csds::PATH_PREFIX) {
                let answer = status.oneshot(request).await?;
                return Ok(answer.map(Either::Left));
            }
            let answer = endpoints::answer(&admin, request.method(), request.uri());
            Ok::<_, Infallible>(answer.map(Either::Right))
        }
    });
    let head_timeout = limits.head_timeout.min(limits.idle_timeout);
    let patience = Patience::new(stream, head_timeout, limits.idle_timeout);
    let mut server = auto::Builder::new(TokioExecutor::new());
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .max_buf_size(HEAD_BYTES_MAX);
    server
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX as u32);
    let connection = server.serve_connection(TokioIo::new(patience), service);
    let mut connection = pin!(connection);
    tokio::select! {
        result = &mut connection => {
            if let Err(error) = result {
                tracing::debug!(%error, "admin: connection ended");
            }
            return;
        }
        _ = ended.changed() => {}
        () = sleep(limits.age_max) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = timeout(FAREWELL, connection).await;
}

/// A stream that fails once no byte went either way for `limit`: a client that stops reading frees its place.
struct Patience {
    stream: Socket,
    limit: Duration,
    /// By then it must be known what is spoken, however the bytes of that come.
    first: Instant,
    /// Bytes until it is known; none once it is.
    unread: usize,
    over: Pin<Box<Sleep>>,
}

impl Patience {
    fn new(stream: Socket, first: Duration, limit: Duration) -> Self {
        Self {
            stream,
            limit,
            first: Instant::now() + first,
            unread: PREFACE_BYTES,
            over: Box::pin(sleep(first)),
        }
    }

    fn progress<T>(
        &mut self,
        poll: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            let idle = Instant::now() + self.limit;
            let is_known = self.unread == 0;
            let until = if is_known { idle } else { idle.min(self.first) };
            self.over.as_mut().reset(until);
            return poll;
        }
        ready!(self.over.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Patience {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let poll = Pin::new(&mut self.stream).poll_read(context, buf);
        let read = buf.filled().len() - before;
        self.unread = self.unread.saturating_sub(read);
        self.progress(poll, context)
    }
}

impl AsyncWrite for Patience {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(context, bytes);
        if poll.is_ready() {
            // Who is answered has said enough.
            self.unread = 0;
        }
        self.progress(poll, context)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
