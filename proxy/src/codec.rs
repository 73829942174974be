//! HTTP/1.1 and HTTP/2 on an accepted connection, until it ends or is drained.

pub(crate) mod exchange;
mod gate;

use crate::{
    drain::Drain,
    http::{ConnectionInfo, Manager},
    metrics::HttpStats,
    tls::Stream,
};
use gate::Gate;
use http::{Request, Version};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use outrigger_xds::resource::listener::{Codec, HttpConnectionManager};
use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, Ordering::Relaxed},
    },
    task::Poll,
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

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
    let builder = builder(&config.manager);
    let idle = config.manager.idle_timeout;
    let enough = Enough::new(&config.manager);
    drop(config);
    let stats = manager.stats.clone();
    stats.downstream_cx_total.increment(1);
    let _active = Active::new(stats.clone());
    let (gate_manager, gate_info) = (manager.clone(), info.clone());
    let asked = AtomicU8::new(NOTHING_YET);
    let (asked, enough) = (&asked, &enough);
    let after = info.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let http2 = request.version() == Version::HTTP_2;
        asked.store(if http2 { HTTP_2 } else { HTTP_1 }, Relaxed);
        enough.request();
        let (manager, info) = (manager.clone(), info.clone());
        async move { Ok::<_, Infallible>(manager.handle(request, &info).await) }
    });
    let mut connection = pin!(builder.serve_connection_with_upgrades(
        TokioIo::new(Gate::new(stream, gate_manager, gate_info)),
        service
    ));
    let _forgets = Forgets(after.clone());
    let mut ending = pin!(ends(&drain, asked, enough, &stats));
    let mut over = pin!(drain.over());
    let mut drained = false;
    // One timer for the whole connection, which looks at the clock when it fires: hyper's would be armed for each request.
    // HTTP/2 has it for who asks nothing at all.
    let mut silent = pin!(tokio::time::sleep(idle));
    let outcome = loop {
        tokio::select! {
            biased;
            outcome = connection.as_mut() => break outcome,
            () = &mut ending, if !drained => {
                drained = true;
                connection.as_mut().graceful_shutdown();
                if asked.load(Relaxed) == NOTHING_YET {
                    // Half a head, at most: the codec would wait for the rest of it.
                    return;
                }
            }
            () = &mut over => return,
            () = &mut silent, if !idle.is_zero() => {
                let rests = asked.load(Relaxed) != HTTP_2;
                let rest = after.exchange.rest().filter(|_| rests).unwrap_or_default();
                if rest >= idle {
                    stats.downstream_cx_idle_timeout.increment(1);
                    return;
                }
                silent.as_mut().reset(Instant::now() + idle - rest);
            }
        }
    };
    if let Err(error) = outcome {
        count(&stats, error.as_ref());
    } else if let Some(tunnel) = after.afterwards.take() {
        tokio::select! {
            () = tunnel => {}
            () = &mut over => {}
        }
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
async fn ends(drain: &Drain, asked: &AtomicU8, enough: &Enough, stats: &HttpStats) {
    tokio::select! {
        biased;
        () = leave(drain, asked) => stats.downstream_cx_drain_close.increment(1),
        () = enough.reached(stats) => {}
    }
}

fn count(stats: &HttpStats, error: &(dyn std::error::Error + Send + Sync + 'static)) {
    let hypers = error.downcast_ref::<hyper::Error>();
    if hypers.is_some_and(hyper::Error::is_parse) {
        stats.downstream_cx_protocol_error.increment(1);
    }
    if hypers.is_some_and(hyper::Error::is_timeout) {
        stats.downstream_cx_idle_timeout.increment(1);
    }
    tracing::debug!(%error, "downstream connection ended");
}

/// When a connection has had its time, or its requests.
struct Enough {
    time: Duration,
    requests: u32,
    had: AtomicU32,
    reached: Notify,
}

impl Enough {
    fn new(config: &HttpConnectionManager) -> Self {
        Self {
            time: config.max_connection_duration,
            requests: config.max_requests_per_connection,
            had: AtomicU32::new(0),
            reached: Notify::new(),
        }
    }

    /// One more.
    fn request(&self) {
        if self.requests != 0 && self.had.fetch_add(1, Relaxed) + 1 == self.requests {
            self.reached.notify_one();
        }
    }

    async fn reached(&self, stats: &HttpStats) {
        if self.requests == 0 && self.time.is_zero() {
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
async fn leave(drain: &Drain, asked: &AtomicU8) {
    drain.begun().await;
    let mut ending = pin!(drain.process_begun());
    poll_fn(|context| {
        let ends = ending.as_mut().poll(context).is_ready();
        if ends || asked.load(Relaxed) == HTTP_2 {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
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

fn builder(config: &HttpConnectionManager) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder = match config.codec {
        Codec::Auto => builder,
        Codec::Http1 => builder.http1_only(),
        Codec::Http2 => builder.http2_only(),
    };
    builder.http1().header_read_timeout(None);
    builder
        .http2()
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
