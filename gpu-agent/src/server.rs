//! The agent's listener: the feed over gRPC, and `/metrics` and `/ready` beside it.
//!
//! HTTP/1.1 and HTTP/2 by prior knowledge on one port. It encrypts nothing: bind it where only peers reach it.

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use metrics_exporter_prometheus::PrometheusHandle;
use outrigger_xds::feed::{FeedSource, PATH_PREFIX, service};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tower::Service;

/// Connections served at once; more wait to be accepted.
const CONNECTIONS_MAX: usize = 4096;
/// Pause after an accept that failed (out of file descriptors, most likely).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

type Body = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// Serves until it is dropped; its connections end with the runtime.
pub async fn serve(
    listener: TcpListener,
    source: Arc<dyn FeedSource>,
    metrics: Option<PrometheusHandle>,
) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                metrics::counter!("outrigger_agent_accept_failures_total").increment(1);
                tracing::warn!(%error, "cannot accept");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let (source, metrics) = (Arc::clone(&source), metrics.clone());
        tokio::spawn(async move {
            let handler =
                service_fn(move |request| answer(request, Arc::clone(&source), metrics.clone()));
            if let Err(error) = Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), handler)
                .await
            {
                tracing::debug!(%error, "connection ended");
            }
            drop(permit);
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    source: Arc<dyn FeedSource>,
    metrics: Option<PrometheusHandle>,
) -> Result<Response<Body>, Infallible> {
    let text = |status, text: String| {
        let mut response = Response::new(
            Full::new(Bytes::from(text))
                .map_err(|never| match never {})
                .boxed_unsync(),
        );
        *response.status_mut() = status;
        response
    };
    Ok(match request.uri().path() {
        path if path.starts_with(PATH_PREFIX) => {
            let response = service(source).call(request).await?;
            response.map(|body| body.map_err(Into::into).boxed_unsync())
        }
        "/ready" => text(StatusCode::OK, "LIVE\n".into()),
        "/metrics" => match metrics {
            Some(metrics) => text(StatusCode::OK, metrics.render()),
            None => text(StatusCode::NOT_FOUND, String::new()),
        },
        _ => text(StatusCode::NOT_FOUND, String::new()),
    })
}
