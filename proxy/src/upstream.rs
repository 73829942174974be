//! The way out: connections to endpoints, pooled per worker thread.
//!
//! An HTTP/1 connection is driven inside the task of the request that uses it (no channel hop, no second task; when
//! the client goes away the connection goes with it), by a codec of our own: `h1_request` writes, `h1_response` reads
//! heads, [`crate::h1`] has what clients' connections need too. HTTP/2 connections are shared by streams and have a task of
//! their own. Pools are thread-local: a worker never waits for another.

pub mod connect;
pub mod h1;
mod h1_request;
mod h1_response;
pub mod h2;
mod h2_error;
pub(crate) mod own;
mod queue;
mod upgrade;

use futures_util::future::BoxFuture;
use http::{Request, Response, Version};
use outrigger_filters::{
    body::{RequestBody, ResponseBody, Upload, UploadState},
    endpoints::{Endpoint, SendOptions, Upstream, clock_ms},
    error::Error,
};
use outrigger_xds::resource::cluster::UpstreamProtocol;
use std::{future::Future, pin::pin, sync::Arc, time::Duration};

/// Idle pooled HTTP/1 connections are not reused after this long, whatever longer `idle_timeout` says: uvicorn closes its
/// own at 5 s.
pub const IDLE_MS_MAX: u64 = 4_000;
/// Idle HTTP/1 connections kept per endpoint and worker.
pub const IDLE_CONNECTIONS_MAX: usize = 1_024;
/// Streams on one HTTP/2 connection before another is opened, so that no peer worker runs hot.
pub const H2_STREAMS_MAX: usize = 100;

/// Closes what this thread's pools need not hold. Called now and then by each worker.
pub fn close_idle() {
    h1::close_idle();
    h2::close_idle();
}

/// All pools of the process (each thread has its own part).
#[derive(Debug, Default)]
pub struct Pools;

impl Upstream for Pools {
    fn send<'a>(
        &'a self,
        endpoint: &'a Arc<Endpoint>,
        request: &'a mut Request<RequestBody>,
        options: SendOptions,
    ) -> BoxFuture<'a, Result<Response<ResponseBody>, Error>> {
        if options.upgrade {
            return Box::pin(upgrade::send(endpoint, request, options));
        }
        let speaks_http2 = request.version() == Version::HTTP_2;
        match endpoint.protocol.for_client(speaks_http2) {
            UpstreamProtocol::Http2 => Box::pin(h2::send(endpoint, request, options)),
            _ => Box::pin(h1::send(endpoint, request, options)),
        }
    }
}

/// Whether a connection has served as many requests as it may; counted when it has.
fn is_spent(endpoint: &Endpoint, requests: u32) -> bool {
    let spent = endpoint
        .connection
        .max_requests
        .is_some_and(|max| requests >= max);
    if spent {
        metrics::counter!("envoy_cluster_upstream_cx_max_requests", "envoy_cluster_name" => endpoint.cluster.to_string())
            .increment(1);
    }
    spent
}

/// Waits for response headers, at most `limit` from when the client had sent everything.
///
/// # Errors
/// `late` if the upstream was too slow; 408 if the client stopped sending.
pub(crate) async fn headers_within<F: Future>(
    limit: Option<Duration>,
    upload: Option<&Upload>,
    late: fn() -> Error,
    answer: F,
) -> Result<F::Output, Error> {
    let Some(limit) = limit else {
        return Ok(answer.await);
    };
    let mut answer = pin!(answer);
    let mut wait = limit;
    loop {
        if let Ok(answer) = tokio::time::timeout(wait, answer.as_mut()).await {
            return Ok(answer);
        }
        let (since_ms, slow) = match upload.map(Upload::state) {
            Some(UploadState::Runs(since_ms)) => (since_ms, upload_stalled as fn() -> Error),
            Some(UploadState::Ended(since_ms)) => (since_ms, late),
            Some(UploadState::Broke | UploadState::Malformed) | None => return Err(late()),
        };
        let passed = Duration::from_millis(clock_ms().saturating_sub(since_ms));
        wait = limit.saturating_sub(passed);
        if wait.is_zero() {
            return Err(slow());
        }
    }
}

fn upload_stalled() -> Error {
    Error::stream_idle(true)
}
