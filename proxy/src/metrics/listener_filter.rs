//! Handles of listener filters and of the TCP proxy: what is counted once a connection, not once a request.

use super::{install, stats::Known};
use ::metrics::{Counter, counter};
use std::sync::{Arc, LazyLock, Mutex};

/// What listener filters find: `envoy_tls_inspector_*`, `envoy_http_inspector_*`, `envoy_proxy_proto_*`.
pub struct InspectorStats {
    /// First messages of TLS that are too long.
    pub client_hello_too_big: Counter,
    /// TLS.
    pub tls_found: Counter,
    /// No TLS.
    pub tls_not_found: Counter,
    /// TLS that names protocols.
    pub alpn_found: Counter,
    /// TLS that names none.
    pub alpn_not_found: Counter,
    /// TLS that names a server.
    pub sni_found: Counter,
    /// TLS that names none.
    pub sni_not_found: Counter,
    /// HTTP/1.0.
    pub http10_found: Counter,
    /// HTTP/1.1.
    pub http11_found: Counter,
    /// HTTP/2.
    pub http2_found: Counter,
    /// No HTTP.
    pub http_not_found: Counter,
    /// No PROXY header, and none needed.
    pub proxy_not_found_allowed: Counter,
    /// No PROXY header where one is needed.
    pub proxy_not_found_disallowed: Counter,
    /// PROXY headers, of version 1 and 2.
    pub proxy_found: [Counter; 2],
    /// Of these, of a version that is refused.
    pub proxy_disallowed: [Counter; 2],
    /// Of these, broken.
    pub proxy_error: [Counter; 2],
}

impl InspectorStats {
    /// The handles; `stat_prefix` is that of a PROXY protocol filter.
    #[must_use]
    pub fn new(stat_prefix: &str) -> Arc<Self> {
        static ALL: Known<InspectorStats> = LazyLock::new(Mutex::default);
        super::stats::known(&ALL, stat_prefix, || Self::make(stat_prefix))
    }

    fn make(stat_prefix: &str) -> Self {
        let proxy = |name: &'static str| counter!(name, "envoy_proxy_protocol_prefix" => stat_prefix.to_owned());
        let by_version = |name: &'static str| {
            ["1", "2"].map(|version| {
                counter!(
                    name,
                    "envoy_proxy_protocol_prefix" => stat_prefix.to_owned(),
                    "envoy_proxy_protocol_version" => version,
                )
            })
        };
        Self {
            client_hello_too_big: counter!("envoy_tls_inspector_client_hello_too_big"),
            tls_found: counter!("envoy_tls_inspector_tls_found"),
            tls_not_found: counter!("envoy_tls_inspector_tls_not_found"),
            alpn_found: counter!("envoy_tls_inspector_alpn_found"),
            alpn_not_found: counter!("envoy_tls_inspector_alpn_not_found"),
            sni_found: counter!("envoy_tls_inspector_sni_found"),
            sni_not_found: counter!("envoy_tls_inspector_sni_not_found"),
            http10_found: counter!("envoy_http_inspector_http10_found"),
            http11_found: counter!("envoy_http_inspector_http11_found"),
            http2_found: counter!("envoy_http_inspector_http2_found"),
            http_not_found: counter!("envoy_http_inspector_http_not_found"),
            proxy_not_found_allowed: proxy("envoy_proxy_proto_not_found_allowed"),
            proxy_not_found_disallowed: proxy("envoy_proxy_proto_not_found_disallowed"),
            proxy_found: by_version("envoy_proxy_proto_found"),
            proxy_disallowed: by_version("envoy_proxy_proto_disallowed"),
            proxy_error: by_version("envoy_proxy_proto_error"),
        }
    }
}

/// Connections of one TCP proxy: `envoy_tcp_*`.
pub struct TcpStats {
    /// Begun.
    pub downstream_cx_total: Counter,
    /// Ended for want of a cluster.
    pub downstream_cx_no_route: Counter,
    /// Bytes from clients.
    pub downstream_cx_rx_bytes_total: Counter,
    /// Bytes to clients.
    pub downstream_cx_tx_bytes_total: Counter,
    /// Ended for silence.
    pub idle_timeout: Counter,
    /// Ended for their age.
    pub max_downstream_connection_duration: Counter,
}

impl TcpStats {
    /// The handles of the TCP proxies with this `stat_prefix`.
    #[must_use]
    pub fn new(stat_prefix: &str) -> Arc<Self> {
        static ALL: Known<TcpStats> = LazyLock::new(Mutex::default);
        install();
        let counter =
            |name: &'static str| counter!(name, "envoy_tcp_prefix" => stat_prefix.to_owned());
        super::stats::known(&ALL, stat_prefix, || Self {
            downstream_cx_total: counter("envoy_tcp_downstream_cx_total"),
            downstream_cx_no_route: counter("envoy_tcp_downstream_cx_no_route"),
            downstream_cx_rx_bytes_total: counter("envoy_tcp_downstream_cx_rx_bytes_total"),
            downstream_cx_tx_bytes_total: counter("envoy_tcp_downstream_cx_tx_bytes_total"),
            idle_timeout: counter("envoy_tcp_idle_timeout"),
            max_downstream_connection_duration: counter(
                "envoy_tcp_max_downstream_connection_duration",
            ),
        })
    }
}
