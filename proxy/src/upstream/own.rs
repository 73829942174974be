//! Connections for requests of our own (health checks, spans for a collector): on the main runtime, one at a time, past
//! all pools and counters of requests.

use super::connect;
use crate::tls::Stream;
use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, uri::Authority};
use http_body_util::Full;
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use outrigger_filters::endpoints::Endpoint;
use outrigger_xds::resource::{cluster::UpstreamProtocol, endpoint::Address};
use std::io;

/// gRPC's frame before a message: compressed or not, and its length.
const PREFIX_BYTES: usize = 5;

/// One that takes requests. It ends when this is dropped.
pub(crate) enum Connection {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Connection {
    /// HTTP on a socket.
    pub(crate) async fn over(socket: Stream, protocol: UpstreamProtocol) -> hyper::Result<Self> {
        let socket = TokioIo::new(socket);
        if protocol == UpstreamProtocol::Http2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), socket).await?;
            tokio::spawn(connection);
            return Ok(Self::Http2(sender));
        }
        let (sender, connection) = http1::handshake(socket).await?;
        tokio::spawn(connection);
        Ok(Self::Http1(sender))
    }

    pub(crate) fn is_closed(&self) -> bool {
        match self {
            Self::Http1(sender) => sender.is_closed(),
            Self::Http2(sender) => sender.is_closed(),
        }
    }

    pub(crate) async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> hyper::Result<Response<Incoming>> {
        match self {
            // It may be about to be: the end of the last answer is a task's to see.
            Self::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Self::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
        }
    }
}

/// A connection to an endpoint, secured as its cluster says.
pub(crate) async fn connect(
    endpoint: &Endpoint,
    protocol: UpstreamProtocol,
) -> io::Result<Connection> {
    let (tls, options) = (endpoint.tls.as_ref(), &endpoint.connection);
    let socket = connect::open(&endpoint.address, tls, Some(protocol), options).await?;
    let connection = Connection::over(socket, protocol).await;
    connection.map_err(io::Error::other)
}

/// What HTTP/2 is told of whom it speaks to. Names of clusters need not be authorities (`outbound|80||a`, `route/a`).
pub(crate) fn authority(name: &str, address: &Address) -> String {
    match name.parse::<Authority>() {
        Ok(authority) => authority.to_string(),
        Err(_) if address.is_pipe() => "localhost".to_owned(),
        Err(_) => address.to_string(),
    }
}

/// How a call ended. What is answered without a message has that among its headers.
pub(crate) fn grpc_status<'a>(
    head: &'a HeaderMap,
    trailers: Option<&'a HeaderMap>,
) -> Option<&'a HeaderValue> {
    trailers.unwrap_or(head).get("grpc-status")
}

/// A message as gRPC sends it.
pub(crate) fn grpc_frame(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put_slice(message);
    framed.freeze()
}

/// The one message of a body, uncompressed; `None` if it is anything else.
pub(crate) fn grpc_message(body: &[u8]) -> Option<&[u8]> {
    let (prefix, message) = body.split_at_checked(PREFIX_BYTES)?;
    let length = u32::from_be_bytes(prefix[1..].try_into().ok()?);
    (prefix[0] == 0 && length as usize == message.len()).then_some(message)
}
