//! The way out: connections to endpoints, pooled per worker thread.
//!
//! An HTTP/1 connection is driven inside the task of the request that uses it (no channel hop, no second task; when
//! the client goes away the connection goes with it). HTTP/2 connections are shared by streams and have a task of
//! their own. Pools are thread-local: a worker never waits for another.

pub mod connect;
pub mod h1;
pub mod h2;

use futures_util::future::BoxFuture;
use http::{HeaderValue, Method, Request, Response, Uri, Version, uri::PathAndQuery};
use http_body::Body;
use outrigger_filters::{
    body::{RequestBody, ResponseBody, Upload, UploadState},
    endpoints::{Endpoint, SendOptions, Unanswered, Upstream, clock_ms},
    error::{Error, Flag, Retry},
};
use outrigger_xds::resource::cluster::UpstreamProtocol;
use std::{future::Future, pin::pin, sync::Arc, time::Duration};

/// Idle pooled HTTP/1 connections are not reused after this long: uvicorn closes its own at 5 s.
pub const IDLE_MS_MAX: u64 = 4_000;
/// Idle HTTP/1 connections kept per endpoint and worker.
pub const IDLE_CONNECTIONS_MAX: usize = 1_024;
/// Streams on one HTTP/2 connection before another is opened, so that no peer worker runs hot.
pub const H2_STREAMS_MAX: usize = 100;

/// All pools of the process (each thread has its own part).
#[derive(Debug, Default)]
pub struct Pools;

impl Upstream for Pools {
    fn send<'a>(
        &'a self,
        endpoint: &'a Arc<Endpoint>,
        mut request: Box<Request<RequestBody>>,
        options: SendOptions,
    ) -> BoxFuture<'a, Result<Response<ResponseBody>, Unanswered>> {
        match endpoint.protocol {
            UpstreamProtocol::Http1 => {
                to_origin_form(&mut request);
                Box::pin(h1::send(endpoint, request, options))
            }
            UpstreamProtocol::Http2 => {
                to_absolute_form(endpoint, &mut request);
                Box::pin(h2::send(endpoint, request, options))
            }
        }
    }
}

/// HTTP/1 request line: path and query only. An authority in it or in `:authority` is what the request was routed by,
/// and replaces whatever `host` says (RFC 9112, 3.2.2).
fn to_origin_form(request: &mut Request<RequestBody>) {
    if let Some(authority) = request.uri().authority() {
        if let Ok(host) = authority.as_str().parse() {
            request.headers_mut().insert(http::header::HOST, host);
        }
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    }
    announce_nothing(request);
    *request.version_mut() = Version::HTTP_11;
}

/// A method that usually brings content says so when it brings none, as in Envoy.
fn announce_nothing(request: &mut Request<RequestBody>) {
    let usual = !matches!(
        *request.method(),
        Method::GET | Method::HEAD | Method::DELETE | Method::CONNECT | Method::TRACE
    );
    if usual && request.body().is_end_stream() {
        request
            .headers_mut()
            .insert(http::header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
}

/// HTTP/2 needs `:scheme` and `:authority`.
fn to_absolute_form(endpoint: &Endpoint, request: &mut Request<RequestBody>) {
    let host = request.headers_mut().remove(http::header::HOST);
    let authority = request
        .uri()
        .authority()
        .cloned()
        .or_else(|| host.and_then(|host| host.to_str().ok()?.parse().ok()))
        .or_else(|| endpoint.address.to_string().parse().ok());
    let path = request
        .uri()
        .path_and_query()
        .cloned()
        .unwrap_or_else(|| PathAndQuery::from_static("/"));
    if let Some(authority) = authority {
        let built = Uri::builder()
            .scheme(if endpoint.tls.is_some() {
                "https"
            } else {
                "http"
            })
            .authority(authority)
            .path_and_query(path)
            .build();
        if let Ok(uri) = built {
            *request.uri_mut() = uri;
        }
    }
    *request.version_mut() = Version::HTTP_2;
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

/// hyper's error before a response; if nothing was sent, with the request.
fn unanswered(
    mut error: hyper::client::conn::TrySendError<Request<RequestBody>>,
    upload: Option<&Upload>,
) -> Unanswered {
    let request = error.take_message().map(Box::new);
    match upload.map(Upload::state) {
        Some(UploadState::Broke) => {
            return Error::downstream_gone("the request body ended early").into();
        }
        Some(UploadState::Malformed) => return Error::downstream_garbage().into(),
        _ => {}
    }
    let mut error = classify(&error.into_error());
    if request.is_some() {
        error.retry = Retry::NothingSent;
    }
    Unanswered { error, request }
}

/// How hyper's error before a response maps to Envoy's flag, its reset reason, and what a retry may do.
fn classify(error: &hyper::Error) -> Error {
    if error.is_canceled() || error.is_closed() {
        // The dispatcher had not begun to write it.
        return Error::upstream_reset(
            Flag::UpstreamConnectionFailure,
            "connection termination",
            Retry::NothingSent,
        );
    }
    if error.is_parse() {
        return Error::upstream_reset(
            Flag::UpstreamProtocolError,
            "protocol error",
            Retry::NothingReceived,
        );
    }
    if let Some(error) = caused_by_client(error) {
        return error;
    }
    if stream_refused(error) {
        let mut refused = Error::upstream_reset(
            Flag::UpstreamRemoteReset,
            "remote refused stream reset",
            Retry::NothingReceived,
        );
        refused.refused = true;
        return refused;
    }
    if error.is_incomplete_message() || error.is_body_write_aborted() || was_cut(error) {
        return Error::upstream_reset(
            Flag::UpstreamConnectionTermination,
            "connection termination",
            Retry::NothingReceived,
        );
    }
    Error::upstream_reset(
        Flag::UpstreamRemoteReset,
        "remote reset",
        Retry::NothingReceived,
    )
}

/// `REFUSED_STREAM`: the upstream did nothing with the request (RFC 9113, 8.7).
fn stream_refused(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(error) = cause.downcast_ref::<::h2::Error>() {
            return error.is_remote() && error.reason() == Some(::h2::Reason::REFUSED_STREAM);
        }
        source = cause.source();
    }
    false
}

/// What of a system error is behind it.
fn io_kind(error: &hyper::Error) -> Option<std::io::ErrorKind> {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return Some(io.kind());
        }
        source = cause.source();
    }
    None
}

/// The connection was cut by its peer's system.
fn was_cut(error: &hyper::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    matches!(
        io_kind(error),
        Some(ConnectionReset | BrokenPipe | ConnectionAborted)
    )
}

/// The request body failed, not the upstream: the client's fault.
fn caused_by_client(error: &hyper::Error) -> Option<Error> {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(body) = cause.downcast_ref::<outrigger_filters::body::BodyError>() {
            return match body.flag {
                Flag::DownstreamConnectionTermination => {
                    Some(Error::downstream_gone("the request body ended early"))
                }
                Flag::DownstreamProtocolError => Some(Error::downstream_garbage()),
                _ => None,
            };
        }
        source = cause.source();
    }
    None
}

/// How hyper's error in the middle of a body maps to Envoy's flag.
fn classify_body(error: &hyper::Error) -> outrigger_filters::body::BodyError {
    use std::io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    let broke_framing = matches!(
        io_kind(error),
        Some(UnexpectedEof | InvalidData | InvalidInput)
    );
    let flag = if error.is_parse() || error.is_user() || broke_framing {
        Flag::UpstreamProtocolError
    } else if error.is_incomplete_message() || was_cut(error) {
        Flag::UpstreamConnectionTermination
    } else {
        Flag::UpstreamRemoteReset
    };
    outrigger_filters::body::BodyError::new(
        flag,
        format_args!("the engine's response broke off: {error}"),
    )
}
