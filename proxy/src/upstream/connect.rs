//! Opening a TCP connection to an endpoint, with a limit on how long it may take.

use super::queue::{self, Slot};
use crate::{
    socket::Socket,
    tls::{Stream, client::Client},
};
use outrigger_filters::{
    endpoints::{Endpoint, Secured},
    error::{Error, Flag, Retry},
};
use outrigger_xds::{
    feed,
    resource::{
        cluster::{ConnectionOptions, TcpKeepalive, UpstreamProtocol},
        endpoint::Address,
        route_action::Priority,
    },
};
use socket2::SockRef;
use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::{linux::net::SocketAddrExt, unix},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};
use tokio::net::{TcpSocket, TcpStream, UnixStream};

/// Opens a connection; failures are counted at the endpoint.
pub(super) async fn connect(
    endpoint: &Arc<Endpoint>,
    protocol: UpstreamProtocol,
    limit: Duration,
    slot: Slot,
) -> Result<(Stream, OpenConnection), Error> {
    connect_for(endpoint, Some(protocol), limit, slot).await
}

/// The same for HTTP/1.1 on a connection of its own, whatever else is spoken there.
pub(super) async fn connect_http1(
    endpoint: &Arc<Endpoint>,
    limit: Duration,
    priority: Priority,
) -> Result<(Stream, OpenConnection), Error> {
    let slot = queue::room(endpoint, priority)?;
    connect_for(endpoint, Some(UpstreamProtocol::Http1), limit, slot).await
}

/// The same for bytes that are no HTTP.
pub(crate) async fn connect_raw(
    endpoint: &Arc<Endpoint>,
    limit: Duration,
) -> Result<(Stream, OpenConnection), Error> {
    let slot = queue::room(endpoint, Priority::Default)?;
    connect_for(endpoint, None, limit, slot).await
}

async fn connect_for(
    endpoint: &Arc<Endpoint>,
    protocol: Option<UpstreamProtocol>,
    limit: Duration,
    slot: Slot,
) -> Result<(Stream, OpenConnection), Error> {
    let opening = open(
        &endpoint.address,
        endpoint.tls.as_ref(),
        protocol,
        &endpoint.connection,
    );
    let opened = tokio::time::timeout(limit, opening).await;
    let stats = &endpoint.stats;
    match opened {
        Ok(Ok(socket)) => {
            stats.connections.fetch_add(1, Relaxed);
            if protocol == Some(UpstreamProtocol::Http2) {
                stats.connections_http2.fetch_add(1, Relaxed);
            }
            stats.connections_active.fetch_add(1, Relaxed);
            let endpoint = endpoint.clone();
            let counted = OpenConnection {
                endpoint,
                _slot: slot,
            };
            Ok((socket, counted))
        }
        Ok(Err(error)) => {
            stats.connect_fail.fetch_add(1, Relaxed);
            tracing::debug!(endpoint = %endpoint.id, %error, "connect failed");
            Err(match tls_reason(&error) {
                Some(reason) => handshake_failure(&reason),
                None => refused(&error),
            })
        }
        Err(_) => {
            stats.connect_fail.fetch_add(1, Relaxed);
            stats.connect_timeout.fetch_add(1, Relaxed);
            tracing::debug!(endpoint = %endpoint.id, limit_ms = limit.as_millis() as u64, "connect timed out");
            Err(failure("connection timeout"))
        }
    }
}

/// The system's words without their number: "Connection refused".
fn cause(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// As Envoy tells why, in the details alone.
fn refused(error: &io::Error) -> Error {
    let mut failed = failure("remote connection failure");
    failed.details = format!(
        "upstream_reset_before_response_started{{remote_connection_failure|delayed_connect_error:_{}}}",
        cause(error).replace(' ', "_")
    )
    .into();
    failed
}

fn failure(reason: &str) -> Error {
    Error::upstream_reset(Flag::UpstreamConnectionFailure, reason, Retry::NothingSent)
}

/// Envoy's words where a handshake failed.
fn handshake_failure(reason: &str) -> Error {
    let mut error = failure("remote connection failure");
    let details = reason.replace(' ', "_");
    error.details =
        format!("upstream_reset_before_response_started{{remote_connection_failure|{details}}}")
            .into();
    error.message = format!("{}, transport failure reason: {reason}", error.message).into();
    error
}

fn tls_reason(error: &io::Error) -> Option<String> {
    let inner = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(format!("TLS_error: {inner}"))
}

/// Opens a connection, secured if it is to be.
pub(crate) async fn open(
    address: &Address,
    tls: Option<&Secured>,
    protocol: Option<UpstreamProtocol>,
    options: &ConnectionOptions,
) -> io::Result<Stream> {
    let socket = open_socket(address, options).await?;
    match tls {
        None => Ok(Stream::Plain(socket)),
        Some(tls) => {
            let client = Client::of(tls).ok_or(io::ErrorKind::InvalidInput)?;
            client.connect(socket, protocol).await
        }
    }
}

/// The way to a gRPC server: a peer's feed, a control plane.
pub(crate) fn dialer(
    address: Address,
    tls: Option<Secured>,
    options: ConnectionOptions,
) -> feed::Dialer {
    Arc::new(move || {
        let (address, tls, options) = (address.clone(), tls.clone(), options.clone());
        Box::pin(async move {
            let protocol = Some(UpstreamProtocol::Http2);
            let socket = open(&address, tls.as_ref(), protocol, &options);
            Ok(Box::new(socket.await?) as Box<dyn feed::Connection>)
        })
    })
}

async fn open_socket(address: &Address, options: &ConnectionOptions) -> io::Result<Socket> {
    if address.is_pipe() {
        return open_pipe(&address.host).await;
    }
    let socket = match (address.host.parse::<IpAddr>(), options.source) {
        (Ok(ip), Some(source)) => from(source, SocketAddr::new(ip, address.port)).await?,
        (Ok(ip), None) => TcpStream::connect(SocketAddr::new(ip, address.port)).await?,
        (Err(_), source) => connect_by_name(address, source).await?,
    };
    socket.set_nodelay(true)?;
    if let Some(keepalive) = &options.keepalive {
        SockRef::from(&socket).set_tcp_keepalive(&of_system(keepalive))?;
    }
    Ok(socket.into())
}

async fn open_pipe(path: &str) -> io::Result<Socket> {
    let Some(name) = path.strip_prefix('@') else {
        return Ok(UnixStream::connect(path).await?.into());
    };
    let name = unix::net::SocketAddr::from_abstract_name(name)?;
    // What has no file is there or not: this does not wait.
    let socket = unix::net::UnixStream::connect_addr(&name)?;
    socket.set_nonblocking(true)?;
    Ok(UnixStream::from_std(socket)?.into())
}

/// The first address of the name that answers.
async fn connect_by_name(address: &Address, source: Option<SocketAddr>) -> io::Result<TcpStream> {
    let name = (address.host.as_str(), address.port);
    let Some(source) = source else {
        return TcpStream::connect(name).await;
    };
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for found in tokio::net::lookup_host(name).await? {
        match from(source, found).await {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A connection that comes from `source`.
async fn from(source: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = match to {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    if source.port() != 0 {
        socket.set_reuseaddr(true)?;
    }
    socket.bind(source)?;
    socket.connect(to).await
}

fn of_system(options: &TcpKeepalive) -> socket2::TcpKeepalive {
    let mut keepalive = socket2::TcpKeepalive::new();
    if let Some(time) = options.time {
        keepalive = keepalive.with_time(time);
    }
    if let Some(interval) = options.interval {
        keepalive = keepalive.with_interval(interval);
    }
    if let Some(probes) = options.probes {
        keepalive = keepalive.with_retries(probes);
    }
    keepalive
}

/// Counts a connection as open until dropped.
#[derive(Debug)]
pub(crate) struct OpenConnection {
    endpoint: Arc<Endpoint>,
    _slot: Slot,
}

impl OpenConnection {
    /// Whether one that is without a request for so long must be closed; counted when it must.
    pub(super) fn is_idle_too_long(&self, idle_ms: u64) -> bool {
        is_idle_too_long(&self.endpoint, idle_ms)
    }
}

/// The same of a connection to that endpoint.
pub(super) fn is_idle_too_long(endpoint: &Endpoint, idle_ms: u64) -> bool {
    let limit = endpoint.connection.idle_limit();
    let too_long = limit.is_some_and(|limit| Duration::from_millis(idle_ms) >= limit);
    if too_long {
        metrics::counter!("envoy_cluster_upstream_cx_idle_timeout", "envoy_cluster_name" => endpoint.cluster.to_string())
            .increment(1);
    }
    too_long
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.endpoint.stats.connections_active.fetch_sub(1, Relaxed);
    }
}
