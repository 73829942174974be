//! HTTP/1.1 and HTTP/2 on an accepted connection, until it ends or is drained.

pub(crate) mod client;
mod coalesced;
mod date;
pub(crate) mod exchange;
mod h1;
mod h1_body;
mod h1_refusal;
pub(crate) mod h1_request;
mod h1_response;
mod seldom;

use crate::{
    drain::Drain,
    http::{ConnectionInfo, Manager},
    metrics::HttpStats,
    tls::Stream,
};
use client::Client;
use coalesced::Coalesced;
use h1::HeadLimit;
use http::Request;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use outrigger_filters::body::ClientBody;
use outrigger_xds::resource::listener::{Codec, HttpConnectionManager};
use seldom::Seldom;
use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// How HTTP/2 begins (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// What one stalled upload may hold; also what a client may send ahead of a filter.
const H2_STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// All uploads of a connection together.
const H2_CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// Response bytes that h2 buffers per stream before it waits for the client.
const H2_SEND_BUFFER_BYTES: usize = 256 * 1024;
/// What was asked for on a connection so far: which protocol it speaks shows then.
const NOTHING_YET: u8 = 0;
const HTTP_1: u8 = 1;
const HTTP_2: u8 = 2;
const H2_PING_INTERVAL: Duration = Duration::from_secs(20);
const H2_PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Serves one connection.
pub(crate) async fn serve(
    stream: Stream,
    manager: Arc<Manager>,
    info: Arc<ConnectionInfo>,
    drain: Drain,
) {
    let config = manager.config.load_full();
    let idle = config.manager.idle_timeout;
    let requests = Requests::new(&config.manager);
    drop(config);
    let stats = &manager.stats;
    stats.downstream_cx_total.increment(1);
    let _active = Active::new(stats.clone());
    let _forgets = Forgets(info.clone());
    let connection = speak(Client::new(stream), &manager, &info, &requests);
    let cut = pin!(cut(&drain, &requests, &info, (stats, idle)));
    let switched = tokio::select! {
        biased;
        switched = connection => switched,
        () = Seldom::new(cut) => return,
    };
    if let Some((client, tunnel)) = switched.zip(info.afterwards.take()) {
        tokio::select! {
            () = tunnel(client) => {}
            () = drain.over() => {}
        }
    }
}

/// Asks a connection to end, and completes when it is to be cut.
async fn cut(
    drain: &Drain,
    requests: &Requests,
    info: &ConnectionInfo,
    (stats, idle): (&HttpStats, Duration),
) {
    let mut ending = pin!(ends(drain, requests, stats));
    let mut over = pin!(drain.over());
    let mut asked = false;
    // One timer for the whole connection, which looks at the clock when it fires: it is not armed for each request.
    // HTTP/2 has it for who asks nothing at all.
    let mut silent = pin!(tokio::time::sleep(idle));
    loop {
        tokio::select! {
            biased;
            () = &mut ending, if !asked => {
                asked = true;
                if requests.spoken() == NOTHING_YET {
                    // Half a head, at most: the codec would wait for the rest of it.
                    return;
                }
                info.exchange.leave();
                // The codec is to look at it.
                tokio::task::yield_now().await;
            }
            () = &mut over => return,
            () = &mut silent, if !idle.is_zero() => {
                let rests = requests.spoken() != HTTP_2;
                let rest = info.exchange.rest().filter(|_| rests).unwrap_or_default();
                if rest >= idle {
                    stats.downstream_cx_idle_timeout.increment(1);
                    return;
                }
                silent.as_mut().reset(Instant::now() + idle - rest);
            }
        }
    }
}

/// Speaks what the client speaks, until that is over; the connection again, if it goes on as something else.
async fn speak(
    mut client: Client,
    manager: &Arc<Manager>,
    info: &Arc<ConnectionInfo>,
    requests: &Requests,
) -> Option<Client> {
    let codec = manager.config.load().manager.codec;
    let stats = &manager.stats;
    let mut limit = HeadLimit::default();
    let first = poll_fn(|cx| begins(&mut client, codec, (manager, &mut limit), cx));
    match first.await {
        Some(Spoken::Http1) => match h1::serve(client, manager, info, requests, limit).await {
            h1::End::Switched(client) => return Some(client),
            h1::End::Malformed => stats.downstream_cx_protocol_error.increment(1),
            h1::End::Closed => {}
        },
        // Boxed, as there are few of them: most connections carry HTTP/1.
        Some(Spoken::Http2) => Box::pin(http2(client, manager, info, requests)).await,
        None => stats.downstream_cx_protocol_error.increment(1),
    }
    None
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spoken {
    Http1,
    Http2,
}

/// Which version the client begins with; `None` is one that this listener does not speak.
fn begins(
    client: &mut Client,
    codec: Codec,
    (manager, limit): (&Manager, &mut HeadLimit),
    cx: &mut Context<'_>,
) -> Poll<Option<Spoken>> {
    loop {
        if let Some(spoken) = judge(codec, &client.ahead) {
            return Poll::Ready(spoken);
        }
        let Poll::Ready(read) = client.poll_ahead(cx) else {
            if client.ahead.is_empty() {
                return Poll::Pending;
            }
            ready!(limit.poll(manager, cx));
            // It is told so in HTTP/1, where that is spoken.
            return Poll::Ready((codec != Codec::Http2).then_some(Spoken::Http1));
        };
        // Whoever ends here said nothing, or half a preface: no request, in either version.
        if !matches!(read, Ok(1..)) {
            return Poll::Ready(Some(Spoken::Http1));
        }
    }
}

/// What the first bytes say; `None` if that is nothing yet.
fn judge(codec: Codec, bytes: &[u8]) -> Option<Option<Spoken>> {
    let preface = match codec {
        Codec::Auto => PREFACE,
        // So much is no HTTP/1, whatever follows.
        Codec::Http1 | Codec::Http2 => &PREFACE[..14],
    };
    let count = bytes.len().min(preface.len());
    let spoken = if bytes[..count] != preface[..count] {
        Spoken::Http1
    } else if count == preface.len() {
        Spoken::Http2
    } else {
        return None;
    };
    let allowed = match codec {
        Codec::Auto => true,
        Codec::Http1 => spoken == Spoken::Http1,
        Codec::Http2 => spoken == Spoken::Http2,
    };
    Some(allowed.then_some(spoken))
}

/// HTTP/2 on a connection, by hyper.
async fn http2(
    client: Client,
    manager: &Arc<Manager>,
    info: &Arc<ConnectionInfo>,
    requests: &Requests,
) {
    let builder = builder(&manager.config.load().manager);
    let service = service_fn(|request: Request<Incoming>| {
        if requests.one(HTTP_2) {
            info.exchange.leave();
        }
        let (manager, info) = (manager.clone(), info.clone());
        async move {
            let request = request.map(ClientBody::Http2);
            Ok::<_, Infallible>(manager.handle(request, &info).await)
        }
    });
    let mut connection = pin!(builder.serve_connection(TokioIo::new(Coalesced(client)), service));
    let mut told = false;
    let outcome = poll_fn(|cx| {
        if info.exchange.is_leaving() && !std::mem::replace(&mut told, true) {
            connection.as_mut().graceful_shutdown();
        }
        connection.as_mut().poll(cx)
    });
    if let Err(error) = outcome.await {
        if error.is_timeout() {
            manager.stats.downstream_cx_idle_timeout.increment(1);
        }
        tracing::debug!(%error, "downstream connection ended");
    }
}

/// A connection that ends before its upgrade came about has nothing to do after HTTP: what it was to do holds the
/// connection itself, and would never be dropped.
struct Forgets(Arc<ConnectionInfo>);

impl Drop for Forgets {
    fn drop(&mut self) {
        drop(self.0.afterwards.take());
    }
}

/// Completes when a connection is to take no more requests: it is to leave, or has had its time or its requests.
async fn ends(drain: &Drain, requests: &Requests, stats: &HttpStats) {
    tokio::select! {
        biased;
        () = leave(drain, requests) => stats.downstream_cx_drain_close.increment(1),
        () = requests.enough(stats) => {}
    }
}

/// The requests of a connection, and when it has had its time, or enough of them.
struct Requests {
    /// Which version they come in.
    spoken: AtomicU8,
    /// The first came in HTTP/2.
    http2: Notify,
    time: Duration,
    max: u32,
    had: AtomicU32,
    reached: Notify,
}

impl Requests {
    fn new(config: &HttpConnectionManager) -> Self {
        Self {
            spoken: AtomicU8::new(NOTHING_YET),
            http2: Notify::new(),
            time: config.max_connection_duration,
            max: config.max_requests_per_connection,
            had: AtomicU32::new(0),
            reached: Notify::new(),
        }
    }

    /// One more; whether it is the last that is to be taken.
    fn one(&self, version: u8) -> bool {
        let before = self.spoken.swap(version, Relaxed);
        if before == NOTHING_YET && version == HTTP_2 {
            self.http2.notify_one();
        }
        let is_last = self.max != 0 && self.had.fetch_add(1, Relaxed) + 1 == self.max;
        if is_last {
            self.reached.notify_one();
        }
        is_last
    }

    fn spoken(&self) -> u8 {
        self.spoken.load(Relaxed)
    }

    /// Completes when it is known to be HTTP/2.
    async fn http2(&self) {
        if self.spoken() != HTTP_2 {
            self.http2.notified().await;
        }
    }

    async fn enough(&self, stats: &HttpStats) {
        if self.max == 0 && self.time.is_zero() {
            return std::future::pending().await;
        }
        let over = async {
            match self.time {
                Duration::ZERO => std::future::pending().await,
                time => tokio::time::sleep(time).await,
            }
        };
        tokio::select! {
            () = over => stats.downstream_cx_max_duration_reached.increment(1),
            () = self.reached.notified() => stats.downstream_cx_max_requests_reached.increment(1),
        }
    }
}

/// Completes when a connection is to be told to end. Where only its listener is replaced or removed, HTTP/2 is told at
/// once; HTTP/1 learns it from the next response, since closing an idle connection could cross with a request.
async fn leave(drain: &Drain, requests: &Requests) {
    drain.begun().await;
    tokio::select! {
        () = drain.process_begun() => {}
        () = requests.http2() => {}
    }
}

/// Counts a connection of this connection manager as open until dropped.
struct Active(Arc<HttpStats>);

impl Active {
    fn new(stats: Arc<HttpStats>) -> Self {
        stats.downstream_cx_active.increment(1.0);
        Self(stats)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.downstream_cx_active.decrement(1.0);
        self.0.downstream_cx_destroy.increment(1);
    }
}

fn builder(config: &HttpConnectionManager) -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(config.h2_max_concurrent_streams)
        .max_header_list_size(config.max_request_headers_kb * 1024)
        .initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(H2_CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(H2_SEND_BUFFER_BYTES)
        .keep_alive_interval(H2_PING_INTERVAL)
        .keep_alive_timeout(H2_PING_TIMEOUT);
    builder
}

#[cfg(test)]
mod h1_tests;
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_version_is_told_from_the_other_however_it_is_cut() {
        let (h1, h2) = (Some(Spoken::Http1), Some(Spoken::Http2));
        for (codec, begins, expected) in [
            (Codec::Http2, &b"PRI * HTTP/2.0\r\n"[..], h2),
            (Codec::Http2, b"POST / HTTP/1.1\r\n", None),
            (Codec::Http1, b"POST / HTTP/1.1\r\n", h1),
            (Codec::Http1, b"PRI * HTTP/2.0\r\n", None),
            (Codec::Auto, b"POST / HTTP/1.1\r\n", h1),
            (Codec::Auto, b"PRI * HTTP/2.0\r\n\r\nSMS", h1),
            (Codec::Auto, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", h2),
        ] {
            let judged = (0..=begins.len()).find_map(|end| judge(codec, &begins[..end]));
            assert_eq!(judged, Some(expected), "{codec:?}");
            assert_eq!(judge(codec, b"PRI * HT"), None, "{codec:?}");
        }
    }
}
