//! A request that asks to upgrade, on an HTTP/1.1 connection of its own, which becomes the upgraded one if the upstream
//! agrees.
//!
//! Such connections last; what a pool or a codec of our own would save on one of them is nothing.

use super::{connect::connect_http1, headers_within};
use http::{Request, Response, Uri, header, uri::PathAndQuery};
use http_body_util::BodyExt;
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use outrigger_filters::{
    body::{BodyError, RequestBody, ResponseBody, empty},
    endpoints::{Endpoint, SendOptions, Via},
    error::{Error, Flag, Retry},
};
use outrigger_xds::resource::cluster::UpstreamProtocol;
use std::sync::Arc;

/// Sends it. A 101 has hyper's `OnUpgrade` among its extensions.
pub(super) async fn send(
    endpoint: &Arc<Endpoint>,
    request: &mut Request<RequestBody>,
    options: SendOptions,
) -> Result<Response<ResponseBody>, Error> {
    if endpoint.protocol == UpstreamProtocol::Http2 && endpoint.via == Via::Plain {
        // It would need extended CONNECT (RFC 8441). A peer speaks HTTP/1.1, too.
        return Err(broken("protocol error", Retry::No));
    }
    let (stream, open) = connect_http1(endpoint, options.connect_timeout, options.priority).await?;
    let (mut sender, driver) = handshake(TokioIo::new(stream))
        .await
        .map_err(|_| broken("remote reset", Retry::NothingSent))?;
    let open = Arc::new(open);
    let held = open.clone();
    tokio::spawn(async move {
        if let Err(error) = driver.with_upgrades().await {
            tracing::debug!(%error, "an upgrade's connection broke");
        }
        drop(open);
    });
    let body = request.body_mut().hand_over();
    let upload = body.upload();
    let asked = sender.send_request(outgoing(request, body));
    let limit = options.headers_timeout;
    let response = headers_within(limit, upload.as_ref(), Error::upstream_timeout, asked)
        .await?
        .map_err(|error| {
            tracing::debug!(%error, "no answer to an upgrade");
            let gone = error.is_incomplete_message() || error.is_canceled();
            let reason = if gone {
                "connection termination"
            } else {
                "remote reset"
            };
            broken(reason, Retry::NothingReceived)
        })?;
    if response.status() == http::StatusCode::SWITCHING_PROTOCOLS {
        // The driver ends here, the connection does not: it counts until whoever holds this body lets go.
        let body = empty().map_err(move |error| {
            let _ = &held;
            error
        });
        return Ok(response.map(|_| body.boxed_unsync()));
    }
    Ok(response.map(|body| {
        // Whoever reads the refusal keeps its connection.
        let body = body.map_err(move |error| {
            let _ = &sender;
            let flag = Flag::UpstreamConnectionTermination;
            BodyError::new(
                flag,
                format_args!("the engine's response broke off: {error}"),
            )
        });
        body.boxed_unsync()
    }))
}

fn broken(reason: &'static str, retry: Retry) -> Error {
    let flag = match reason {
        "connection termination" => Flag::UpstreamConnectionTermination,
        "protocol error" => Flag::UpstreamProtocolError,
        _ => Flag::UpstreamRemoteReset,
    };
    Error::upstream_reset(flag, reason, retry)
}

/// In origin form, as every request over HTTP/1.
fn outgoing(head: &Request<RequestBody>, body: RequestBody) -> Request<RequestBody> {
    let mut request = Request::new(body);
    *request.method_mut() = head.method().clone();
    *request.headers_mut() = head.headers().clone();
    let uri = head.uri();
    if let Some(host) = uri.authority().and_then(|host| host.as_str().parse().ok()) {
        request.headers_mut().insert(header::HOST, host);
    }
    let path = uri.path_and_query().cloned();
    *request.uri_mut() = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    request
}
