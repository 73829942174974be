//! Opening a TCP connection to an endpoint, with a limit on how long it may take.

use outrigger_filters::{
    endpoints::Endpoint,
    error::{Error, Flag, Retry},
};
use outrigger_xds::resource::endpoint::Address;
use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};
use tokio::net::TcpStream;

/// Opens a connection; failures are counted at the endpoint.
pub(super) async fn connect(
    endpoint: &Arc<Endpoint>,
    limit: Duration,
) -> Result<(TcpStream, OpenConnection), Error> {
    let opened = tokio::time::timeout(limit, open(&endpoint.address)).await;
    let stats = &endpoint.stats;
    match opened {
        Ok(Ok(socket)) => {
            stats.connections.fetch_add(1, Relaxed);
            stats.connections_active.fetch_add(1, Relaxed);
            Ok((socket, OpenConnection(endpoint.clone())))
        }
        Ok(Err(error)) => {
            stats.connect_fail.fetch_add(1, Relaxed);
            tracing::debug!(endpoint = %endpoint.id, %error, "connect failed");
            let mut failed = failure("remote connection failure");
            failed.details = format!(
                "upstream_reset_before_response_started{{remote_connection_failure|delayed_connect_error:_{}}}",
                cause(&error).replace(' ', "_")
            )
            .into();
            Err(failed)
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

fn failure(reason: &str) -> Error {
    Error::upstream_reset(Flag::UpstreamConnectionFailure, reason, Retry::NothingSent)
}

async fn open(address: &Address) -> io::Result<TcpStream> {
    let socket = match address.host.parse::<IpAddr>() {
        Ok(ip) => TcpStream::connect(SocketAddr::new(ip, address.port)).await?,
        Err(_) => TcpStream::connect((address.host.as_str(), address.port)).await?,
    };
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// Counts a connection as open until dropped.
#[derive(Debug)]
pub(super) struct OpenConnection(Arc<Endpoint>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.stats.connections_active.fetch_sub(1, Relaxed);
    }
}
