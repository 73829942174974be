//! `envoy.config.listener.v3.Listener` and the HTTP connection manager in it.

use super::{endpoint::Address, route::{RouteConfiguration, TypedConfig}};
use serde_json::Value;
use std::{collections::BTreeMap, time::Duration};

/// A socket that accepts connections.
#[derive(Debug, Clone, PartialEq)]
pub struct Listener {
    /// Unique name.
    pub name: String,
    /// Where.
    pub address: Address,
    /// INBOUND listeners are for peers, OUTBOUND ones (and unspecified) for clients.
    pub traffic_direction: TrafficDirection,
    /// The one network filter of its one filter chain.
    pub http: HttpConnectionManager,
    /// `tcp_backlog_size`.
    pub tcp_backlog_size: u32,
}

/// `envoy.config.core.v3.TrafficDirection`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrafficDirection {
    /// Clients arrive here.
    #[default]
    Outbound,
    /// Peers arrive here; the chain reaches only engines beside this proxy and never chooses.
    Inbound,
}

/// `HttpConnectionManager`.
#[derive(Debug, Clone, PartialEq)]
pub struct HttpConnectionManager {
    /// Prefix (a label) of its metrics.
    pub stat_prefix: String,
    /// Which protocols are spoken.
    pub codec: Codec,
    /// Inline route table.
    pub route_config: RouteConfiguration,
    /// In order; the last is the router.
    pub http_filters: Vec<HttpFilter>,
    /// Where access logs go.
    pub access_log: Vec<AccessLog>,
    /// Append the peer's address to `x-forwarded-for`.
    pub use_remote_address: bool,
    /// Keep a client's `x-request-id` (else it is replaced at the edge).
    pub preserve_external_request_id: bool,
    /// Create `x-request-id` when missing; default true.
    pub generate_request_id: bool,
    /// No byte either way for so long ends the stream; zero is off. Default 5 min.
    pub stream_idle_timeout: Duration,
    /// Whole request must have arrived; zero is off (default).
    pub request_timeout: Duration,
    /// Idle connection closes; zero is off. Default 1 h.
    pub idle_timeout: Duration,
    /// Between the announcement of a drain and its end. Default 5 s.
    pub drain_timeout: Duration,
    /// `max_request_headers_kb`; default 60.
    pub max_request_headers_kb: u32,
    /// Concurrent h2 streams per connection; keeps one worker from running hot. Default 100.
    pub h2_max_concurrent_streams: u32,
}

impl Default for HttpConnectionManager {
    fn default() -> Self {
        Self {
            stat_prefix: "http".into(),
            codec: Codec::Auto,
            route_config: RouteConfiguration::default(),
            http_filters: Vec::new(),
            access_log: Vec::new(),
            use_remote_address: false,
            preserve_external_request_id: false,
            generate_request_id: true,
            stream_idle_timeout: Duration::from_secs(300),
            request_timeout: Duration::ZERO,
            idle_timeout: Duration::from_secs(3600),
            drain_timeout: Duration::from_secs(5),
            max_request_headers_kb: 60,
            h2_max_concurrent_streams: 100,
        }
    }
}

/// `codec_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Codec {
    /// By the first bytes.
    #[default]
    Auto,
    /// HTTP/1 only.
    Http1,
    /// HTTP/2 only.
    Http2,
}

/// One HTTP filter of the chain.
#[derive(Debug, Clone, PartialEq)]
pub struct HttpFilter {
    /// The name that per-route configuration refers to.
    pub name: String,
    /// Which filter, and its configuration.
    pub config: TypedConfig,
    /// An unknown filter is then left out instead of refused.
    pub is_optional: bool,
    /// In the chain only where a route's configuration brings it in.
    pub disabled: bool,
}

/// Where an access log goes and how it looks.
#[derive(Debug, Clone, PartialEq)]
pub struct AccessLog {
    /// Where.
    pub sink: AccessLogSink,
    /// How.
    pub format: AccessLogFormat,
}

/// Destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLogSink {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A file, appended to.
    File(String),
}

/// Shape of a line.
#[derive(Debug, Clone, PartialEq)]
pub enum AccessLogFormat {
    /// Text with operators; `None` is Envoy's default line.
    Text(Option<String>),
    /// A JSON object: keys and operator strings (or nested objects of them).
    Json(BTreeMap<String, Value>),
}
