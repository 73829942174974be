//! Listener filters at work: they look at the first bytes of a connection until all have said what they can.
//!
//! What is read for them is given back to the socket, less what a filter takes for itself. They do no IO themselves.

use super::{http_inspector, proxy_header, tls_inspector};
use crate::{
    drain::Drain,
    metrics::{ListenerStats, listener_filter::InspectorStats},
    socket::Socket,
};
use bytes::BytesMut;
use outrigger_filters::end_address::EndAddress;
use outrigger_xds::resource::{
    listener::Listener,
    listener_filter::{Kind, ListenerFilter},
};
use socket2::SockRef;
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::io::AsyncReadExt;

/// Bytes read at a time.
const READ_BYTES: usize = 1024;

/// What is known of a connection.
#[derive(Debug)]
pub(super) struct Seen {
    /// Where it was sent to.
    pub(super) local: EndAddress,
    /// Its client.
    pub(super) remote: EndAddress,
    /// The socket's other end, whoever the client is.
    pub(super) direct_remote: EndAddress,
    /// `local` is not our socket's: the connection was redirected.
    pub(super) redirected: bool,
    /// A TLS handshake begins it.
    pub(super) is_tls: bool,
    /// As the client asked for, lower case; may be empty.
    pub(super) server_name: String,
    /// As the client offers them, or as they were seen.
    pub(super) application_protocols: Vec<String>,
    /// What has come and was not taken.
    pub(super) bytes: BytesMut,
}

impl Seen {
    pub(super) fn new(local: EndAddress, remote: EndAddress) -> Self {
        Self {
            local,
            direct_remote: remote.clone(),
            remote,
            redirected: false,
            is_tls: false,
            server_name: String::new(),
            application_protocols: Vec::new(),
            bytes: BytesMut::new(),
        }
    }

    /// In Envoy's words.
    pub(super) fn transport_protocol(&self) -> &'static str {
        if self.is_tls { "tls" } else { "raw_buffer" }
    }
}

/// What a filter has to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// All it can.
    Done,
    /// Nothing yet.
    More,
    /// This connection is not to go on.
    Close,
}

/// The filters of a listener.
pub(super) struct Look {
    filters: Vec<(ListenerFilter, Arc<InspectorStats>)>,
    limit: Duration,
    go_on: bool,
}

impl Look {
    pub(super) fn new(listener: &Listener) -> Self {
        let with_stats = |filter: &ListenerFilter| {
            let prefix = match &filter.kind {
                Kind::ProxyProtocol(protocol) => protocol.stat_prefix.as_str(),
                _ => "",
            };
            (filter.clone(), InspectorStats::new(prefix))
        };
        Self {
            filters: listener.listener_filters.iter().map(with_stats).collect(),
            limit: listener.listener_filters_timeout,
            go_on: listener.continue_on_listener_filters_timeout,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.filters.is_empty()
    }

    /// Looks; false if the connection is not to go on.
    pub(super) async fn at(
        &self,
        socket: &mut Socket,
        seen: &mut Seen,
        stats: &ListenerStats,
        drain: &Drain,
    ) -> bool {
        stats.downstream_pre_cx_active.increment(1.0);
        let expired = async {
            match self.limit {
                Duration::ZERO => std::future::pending().await,
                limit => tokio::time::sleep(limit).await,
            }
        };
        let passed = tokio::select! {
            passed = self.all(socket, seen, stats) => passed,
            () = expired => {
                stats.downstream_pre_cx_timeout.increment(1);
                self.go_on
            }
            () = drain.ends() => false,
        };
        stats.downstream_pre_cx_active.decrement(1.0);
        socket.give_back(std::mem::take(&mut seen.bytes).freeze());
        passed
    }

    async fn all(&self, socket: &mut Socket, seen: &mut Seen, stats: &ListenerStats) -> bool {
        for (filter, counted) in &self.filters {
            let disabled = filter.disabled.as_ref();
            if disabled.is_some_and(|rule| rule.holds(seen.local.port())) {
                continue;
            }
            loop {
                match look(&filter.kind, socket, seen, counted) {
                    Verdict::Done => break,
                    Verdict::Close => {
                        stats.downstream_listener_filter_error.increment(1);
                        return false;
                    }
                    Verdict::More => {
                        seen.bytes.reserve(READ_BYTES);
                        let read = socket.read_buf(&mut seen.bytes).await;
                        if !matches!(read, Ok(1..)) {
                            stats.downstream_listener_filter_remote_close.increment(1);
                            return false;
                        }
                    }
                }
            }
        }
        true
    }
}

fn look(kind: &Kind, socket: &Socket, seen: &mut Seen, stats: &InspectorStats) -> Verdict {
    match kind {
        Kind::TlsInspector {
            client_hello_bytes_max,
        } => tls_inspector::look(seen, *client_hello_bytes_max, stats),
        Kind::HttpInspector => http_inspector::look(seen, stats),
        Kind::OriginalDst => {
            original_dst(socket, seen);
            Verdict::Done
        }
        Kind::ProxyProtocol(config) => proxy_header::look(seen, config, stats),
    }
}

/// Where a connection was sent before the system redirected it to us.
fn original_dst(socket: &Socket, seen: &mut Seen) {
    let Some(tcp) = socket.tcp() else { return };
    // Not what is known of the connection: a header may have said another address.
    let Ok(own) = tcp.local_addr() else { return };
    let socket = SockRef::from(tcp);
    let asked = if is_v4(own) {
        socket.original_dst_v4()
    } else {
        socket.original_dst_v6()
    };
    // Without an answer nobody redirected it.
    let original = asked.ok().and_then(|address| address.as_socket());
    if let Some(original) = original.filter(|original| is_another(*original, own)) {
        seen.local = original.into();
        seen.redirected = true;
    }
}

/// Whether a connection to this address of a socket is one over IPv4, be it that the socket takes both.
fn is_v4(own: SocketAddr) -> bool {
    own.ip().to_canonical().is_ipv4()
}

/// Whether a connection was on the way to another address than that of the socket that took it.
fn is_another(original: SocketAddr, own: SocketAddr) -> bool {
    let plain = |address: SocketAddr| (address.ip().to_canonical(), address.port());
    plain(original) != plain(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_for_both_families_has_addresses_of_either() {
        let own = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert!(is_v4(own("127.0.0.1:80")));
        assert!(is_v4(own("[::ffff:127.0.0.1]:80")));
        assert!(!is_v4(own("[::1]:80")));
        assert!(!is_another(
            own("127.0.0.1:80"),
            own("[::ffff:127.0.0.1]:80")
        ));
        assert!(is_another(own("127.0.0.1:81"), own("127.0.0.1:80")));
        assert!(is_another(own("127.0.0.2:80"), own("127.0.0.1:80")));
    }
}
