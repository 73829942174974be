//! How a request gets to an endpoint.

use super::Endpoint;
use crate::{
    body::{RequestBody, ResponseBody},
    error::Error,
};
use futures_util::future::BoxFuture;
use http::{Request, Response};
use outrigger_xds::resource::route_action::Priority;
use std::{sync::Arc, time::Duration};

/// Limits of one exchange with an upstream.
#[derive(Debug, Clone, Copy)]
pub struct SendOptions {
    /// To open a connection.
    pub connect_timeout: Duration,
    /// From the end of sending to response headers; `None` is unlimited.
    pub headers_timeout: Option<Duration>,
    /// A pooled connection that the upstream closed meanwhile is replaced by a new one without anybody noticing, if the
    /// request can be sent again. Without it the caller gets a `stale` error and decides.
    pub replace_stale: bool,
    /// The request asks for another protocol: it gets a connection of its own, and the 101 has hyper's `OnUpgrade`.
    pub upgrade: bool,
    /// Which circuit breakers count.
    pub priority: Priority,
}

/// The way out: connections, pools, codecs.
pub trait Upstream: Send + Sync {
    /// Sends a request to an endpoint and gives its response as soon as headers are there. Dropping the future or the
    /// response body closes the exchange at once.
    ///
    /// The request stays with the caller. Its body is handed over ([`RequestBody::hand_over`]), and given back if nothing
    /// of it was touched: unless it is spent afterwards, the request can be sent again.
    ///
    /// # Errors
    /// Whatever kept the response from beginning.
    fn send<'a>(
        &'a self,
        endpoint: &'a Arc<Endpoint>,
        request: &'a mut Request<RequestBody>,
        options: SendOptions,
    ) -> BoxFuture<'a, Result<Response<ResponseBody>, Error>>;
}
