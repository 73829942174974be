//! `envoy.config.listener.v3.Listener` and the HTTP connection manager.

use super::{
    config_source::Rds,
    edge::Edge,
    endpoint::{Address, pipe_mode, with_pipe_mode},
    filter_chain::{FilterChain, Network, check_matches},
    http_filter::check_router,
    listener_filter::{Kind, ListenerFilter},
    local_reply::LocalReplyConfig,
    route::RouteConfiguration,
    server_header::{self, ServerHeader},
    tracing::Tracing,
    upgrade::Upgrade,
};
use crate::{
    problems::ConfigErrors,
    protobuf::{duration, to_duration},
    wire::envoy::{
        config::{core::v3 as core, listener::v3 as wire},
        extensions::filters::network::http_connection_manager::v3 as hcm,
    },
};
use std::time::Duration;

pub use super::{
    access_log::{AccessLog, AccessLogFormat, AccessLogSink},
    http_filter::HttpFilter,
};

/// Length of the accept queue unless given; the system cuts it to its own limit.
pub const TCP_BACKLOG_SIZE_DEFAULT: u32 = 4096;

/// Most that `max_request_headers_kb` may be, as in Envoy.
pub const MAX_REQUEST_HEADERS_KB_MAX: u32 = 8192;

/// `listener_filters_timeout` unless given, as in Envoy.
pub const LISTENER_FILTERS_TIMEOUT_DEFAULT: Duration = Duration::from_secs(15);

/// A socket that accepts connections.
#[derive(Debug, Clone, PartialEq)]
pub struct Listener {
    /// Unique name.
    pub name: String,
    /// Where.
    pub address: Address,
    /// INBOUND listeners are for peers, OUTBOUND ones (and unspecified) for clients.
    pub traffic_direction: TrafficDirection,
    /// What happens to connections; no two are for the same.
    pub filter_chains: Vec<FilterChain>,
    /// What happens to those that none of them is for.
    pub default_filter_chain: Option<FilterChain>,
    /// What looks at a connection before, in order.
    pub listener_filters: Vec<ListenerFilter>,
    /// Most that this may take; zero is off.
    pub listener_filters_timeout: Duration,
    /// After that the connection goes on with what is known.
    pub continue_on_listener_filters_timeout: bool,
    /// Whether it has a socket, and not only what other listeners hand over.
    pub bind_to_port: bool,
    /// Whether connections go on to the listener of the address they were sent to.
    pub use_original_dst: bool,
    /// `tcp_backlog_size`.
    pub tcp_backlog_size: u32,
    /// Permissions of the file of a pipe; 0 leaves them as they come.
    pub pipe_mode: u32,
}

impl Listener {
    /// One chain for all connections, and defaults.
    #[must_use]
    pub fn new(name: &str, address: Address, chain: FilterChain) -> Self {
        Self {
            name: name.into(),
            address,
            traffic_direction: TrafficDirection::Outbound,
            filter_chains: vec![chain],
            default_filter_chain: None,
            listener_filters: Vec::new(),
            listener_filters_timeout: LISTENER_FILTERS_TIMEOUT_DEFAULT,
            continue_on_listener_filters_timeout: false,
            bind_to_port: true,
            use_original_dst: false,
            tcp_backlog_size: TCP_BACKLOG_SIZE_DEFAULT,
            pipe_mode: 0,
        }
    }

    /// All chains, the default one last, each with its place in the listener.
    pub fn chains(&self) -> impl Iterator<Item = (String, &FilterChain)> {
        let numbered = self.filter_chains.iter().enumerate();
        let numbered = numbered.map(|(index, chain)| (format!("filter_chains[{index}]"), chain));
        let default = self.default_filter_chain.iter();
        numbered.chain(default.map(|chain| ("default_filter_chain".to_owned(), chain)))
    }

    /// The HTTP connection managers of all chains.
    pub fn http_managers(&self) -> impl Iterator<Item = &HttpConnectionManager> {
        let chains = self.filter_chains.iter().chain(&self.default_filter_chain);
        chains.filter_map(|chain| match &chain.network {
            Network::Http(manager) => Some(manager.as_ref()),
            Network::Tcp(_) => None,
        })
    }

    /// The same, to be changed.
    pub fn http_managers_mut(&mut self) -> impl Iterator<Item = &mut HttpConnectionManager> {
        let chains = self.filter_chains.iter_mut();
        let chains = chains.chain(&mut self.default_filter_chain);
        chains.filter_map(|chain| match &mut chain.network {
            Network::Http(manager) => Some(manager.as_mut()),
            Network::Tcp(_) => None,
        })
    }
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
    /// Route table; with `rds`, the one that came last.
    pub route_config: RouteConfiguration,
    /// Where the route table comes from, if it is not inline.
    pub rds: Option<Rds>,
    /// In order; the last is the router.
    pub http_filters: Vec<HttpFilter>,
    /// Where access logs go.
    pub access_log: Vec<AccessLog>,
    /// Append the peer's address to `x-forwarded-for`.
    pub use_remote_address: bool,
    /// Keep a client's `x-request-id` (else it is replaced at the edge).
    pub preserve_external_request_id: bool,
    /// Value of `server`; default `outrigger`.
    pub server_name: String,
    /// Whose `server` the client sees; default ours.
    pub server_header: ServerHeader,
    /// Create `x-request-id` when missing; default true.
    pub generate_request_id: bool,
    /// What connections may become, unless a route says otherwise.
    pub upgrades: Vec<Upgrade>,
    /// No byte either way for so long ends the stream; zero is off. Default 5 min.
    pub stream_idle_timeout: Duration,
    /// Whole request must have arrived; zero is off (default).
    pub request_timeout: Duration,
    /// A whole head must have come so long after its first byte; zero is off (default).
    pub request_headers_timeout: Duration,
    /// Idle connection closes; zero is off. Default 1 h.
    pub idle_timeout: Duration,
    /// Between the announcement of a drain and its end. Default 5 s.
    pub drain_timeout: Duration,
    /// `max_request_headers_kb`; default 60.
    pub max_request_headers_kb: u32,
    /// A connection takes no new request after this; zero is off (default).
    pub max_connection_duration: Duration,
    /// A connection takes no more requests than this; zero is off (default).
    pub max_requests_per_connection: u32,
    /// A request and its response are over after this; zero is off (default).
    pub max_stream_duration: Duration,
    /// What becomes of paths, hosts and addresses.
    pub edge: Edge,
    /// What its own answers look like.
    pub local_replies: LocalReplyConfig,
    /// Which requests are traced.
    pub tracing: Option<Tracing>,
    /// Concurrent h2 streams per connection; keeps one worker from running hot. Default 100.
    pub h2_max_concurrent_streams: u32,
}

impl Default for HttpConnectionManager {
    fn default() -> Self {
        Self {
            stat_prefix: "http".into(),
            codec: Codec::Auto,
            route_config: RouteConfiguration::default(),
            rds: None,
            http_filters: Vec::new(),
            access_log: Vec::new(),
            use_remote_address: false,
            preserve_external_request_id: false,
            server_name: server_header::NAME_DEFAULT.into(),
            server_header: ServerHeader::Overwrite,
            generate_request_id: true,
            upgrades: Vec::new(),
            stream_idle_timeout: Duration::from_secs(300),
            request_timeout: Duration::ZERO,
            request_headers_timeout: Duration::ZERO,
            idle_timeout: Duration::from_secs(3600),
            drain_timeout: Duration::from_secs(5),
            max_request_headers_kb: 60,
            max_connection_duration: Duration::ZERO,
            max_requests_per_connection: 0,
            max_stream_duration: Duration::ZERO,
            edge: Edge::default(),
            local_replies: LocalReplyConfig::default(),
            tracing: None,
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

impl TryFrom<wire::Listener> for Listener {
    type Error = ConfigErrors;

    fn try_from(wire: wire::Listener) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let traffic_direction = match wire.traffic_direction() {
            core::TrafficDirection::Unspecified | core::TrafficDirection::Outbound => {
                TrafficDirection::Outbound
            }
            core::TrafficDirection::Inbound => TrafficDirection::Inbound,
        };
        let name = problems.not_empty("name", wire.name);
        let pipe_mode = problems.take("address", pipe_mode(wire.address.as_ref()));
        let address: Option<Address> = problems.required("address", wire.address);
        if wire.api_listener.is_some() {
            problems.add("", "not supported yet: api_listener");
        }
        if wire.enable_reuse_port == Some(false) {
            problems.add(
                "enable_reuse_port",
                "not supported yet: false (every worker binds its own socket)",
            );
        }
        let default_filter_chain = wire.default_filter_chain;
        if wire.filter_chains.is_empty() && default_filter_chain.is_none() {
            problems.add("filter_chains", "required: a filter chain");
        }
        let count = wire.filter_chains.len();
        let filter_chains = problems.take_all("filter_chains", wire.filter_chains);
        if filter_chains.len() == count {
            check_matches(&mut problems, &filter_chains);
        }
        let default_filter_chain = default_filter_chain
            .and_then(|chain| problems.take("default_filter_chain", FilterChain::try_from(chain)));
        let mut listener_filters = problems.take_all("listener_filters", wire.listener_filters);
        let use_original_dst = wire.use_original_dst.unwrap_or(false);
        add_needed(&mut listener_filters, use_original_dst, &filter_chains);
        let place = "listener_filters_timeout";
        let limit = wire
            .listener_filters_timeout
            .and_then(|given| problems.take(place, duration(given)));
        problems.finish(address.map(|address| Self {
            name,
            address,
            traffic_direction,
            filter_chains,
            default_filter_chain,
            listener_filters,
            listener_filters_timeout: limit.unwrap_or(LISTENER_FILTERS_TIMEOUT_DEFAULT),
            continue_on_listener_filters_timeout: wire.continue_on_listener_filters_timeout,
            bind_to_port: wire.bind_to_port.unwrap_or(true),
            use_original_dst,
            tcp_backlog_size: wire.tcp_backlog_size.unwrap_or(TCP_BACKLOG_SIZE_DEFAULT),
            pipe_mode: pipe_mode.unwrap_or(0),
        }))
    }
}

/// As Envoy, puts in the listener filters without which nothing would know what is asked for.
fn add_needed(filters: &mut Vec<ListenerFilter>, original_dst: bool, chains: &[FilterChain]) {
    let has = |wanted: fn(&Kind) -> bool| filters.iter().any(|filter| wanted(&filter.kind));
    let needs_tls = chains
        .iter()
        .any(|chain| chain.matches.needs_tls_inspector())
        && !has(|kind| matches!(kind, Kind::TlsInspector { .. }));
    if original_dst && !has(|kind| *kind == Kind::OriginalDst) {
        filters.push(ListenerFilter {
            name: "envoy.filters.listener.original_dst".into(),
            kind: Kind::OriginalDst,
            disabled: None,
        });
    }
    if needs_tls {
        filters.push(ListenerFilter::tls_inspector());
    }
}

impl TryFrom<hcm::HttpConnectionManager> for HttpConnectionManager {
    type Error = ConfigErrors;

    fn try_from(mut wire: hcm::HttpConnectionManager) -> Result<Self, ConfigErrors> {
        use hcm::http_connection_manager::{CodecType, RouteSpecifier};
        let mut problems = ConfigErrors::default();
        let edge = Edge::read(&mut problems, &wire);
        let limits = limits(&mut problems, &mut wire);
        let local_replies = wire.local_reply_config.take();
        let local_replies = local_replies
            .and_then(|replies| problems.take("local_reply_config", replies.try_into()));
        let codec = match wire.codec_type() {
            CodecType::Auto => Codec::Auto,
            CodecType::Http1 => Codec::Http1,
            CodecType::Http2 => Codec::Http2,
            CodecType::Http3 => {
                problems.add("codec_type", "not supported yet: HTTP3");
                Codec::Auto
            }
        };
        let server_header = wire.server_header_transformation().into();
        let server_name = server_header::name(&mut problems, std::mem::take(&mut wire.server_name));
        let mut rds = None;
        let route_config = match wire.route_specifier {
            Some(RouteSpecifier::RouteConfig(table)) => {
                problems.take("route_config", table.try_into())
            }
            Some(RouteSpecifier::Rds(source)) => {
                rds = problems.take("rds", Rds::try_from(source));
                rds.as_ref().map(Rds::not_yet)
            }
            None => {
                problems.add("", "required: route_config or rds");
                None
            }
        };
        let count = wire.http_filters.len();
        let http_filters = problems.take_all("http_filters", wire.http_filters);
        if http_filters.len() == count {
            check_router(&mut problems, &http_filters);
        }
        let access_log = problems.take_all("access_log", wire.access_log);
        let upgrades = problems.take_all("upgrade_configs", wire.upgrade_configs);
        let tracing = wire.tracing;
        let tracing = tracing.and_then(|given| problems.take("tracing", given.try_into()));
        let stat_prefix = problems.not_empty("stat_prefix", wire.stat_prefix);
        problems.finish(route_config.map(|route_config| {
            Self {
                stat_prefix,
                codec,
                route_config,
                rds,
                http_filters,
                access_log,
                upgrades,
                edge,
                tracing,
                local_replies: local_replies.unwrap_or_default(),
                use_remote_address: wire.use_remote_address.unwrap_or(limits.use_remote_address),
                preserve_external_request_id: wire.preserve_external_request_id,
                server_name,
                server_header,
                generate_request_id: wire
                    .generate_request_id
                    .unwrap_or(limits.generate_request_id),
                ..limits
            }
        }))
    }
}

/// The defaults, with the timeouts and sizes that are given.
fn limits(
    problems: &mut ConfigErrors,
    wire: &mut hcm::HttpConnectionManager,
) -> HttpConnectionManager {
    let mut limits = HttpConnectionManager::default();
    let common = wire.common_http_protocol_options.take().unwrap_or_default();
    limits.max_requests_per_connection = common.max_requests_per_connection.unwrap_or(0);
    let durations = [
        (
            "common_http_protocol_options.max_connection_duration",
            common.max_connection_duration,
            &mut limits.max_connection_duration,
        ),
        (
            "common_http_protocol_options.max_stream_duration",
            common.max_stream_duration,
            &mut limits.max_stream_duration,
        ),
        (
            "common_http_protocol_options.idle_timeout",
            common.idle_timeout,
            &mut limits.idle_timeout,
        ),
        (
            "stream_idle_timeout",
            wire.stream_idle_timeout,
            &mut limits.stream_idle_timeout,
        ),
        (
            "request_timeout",
            wire.request_timeout,
            &mut limits.request_timeout,
        ),
        (
            "request_headers_timeout",
            wire.request_headers_timeout,
            &mut limits.request_headers_timeout,
        ),
        (
            "drain_timeout",
            wire.drain_timeout,
            &mut limits.drain_timeout,
        ),
    ];
    for (place, given, limit) in durations {
        if let Some(given) = given.and_then(|given| problems.take(place, duration(given))) {
            *limit = given;
        }
    }
    let of_h2 = wire.http2_protocol_options.take();
    if let Some(streams) = of_h2.and_then(|options| options.max_concurrent_streams) {
        limits.h2_max_concurrent_streams = streams;
        if !(1..=i32::MAX.unsigned_abs()).contains(&streams) {
            problems.add(
                "http2_protocol_options.max_concurrent_streams",
                "must be between 1 and 2147483647",
            );
        }
    }
    if let Some(size) = wire.max_request_headers_kb {
        limits.max_request_headers_kb = size;
        if !(1..=MAX_REQUEST_HEADERS_KB_MAX).contains(&size) {
            let message = format!("must be between 1 and {MAX_REQUEST_HEADERS_KB_MAX}, is {size}");
            problems.add("max_request_headers_kb", message);
        }
    }
    limits
}

impl From<&Listener> for wire::Listener {
    fn from(plain: &Listener) -> Self {
        let traffic_direction = match plain.traffic_direction {
            TrafficDirection::Outbound => core::TrafficDirection::Outbound,
            TrafficDirection::Inbound => core::TrafficDirection::Inbound,
        };
        let limit = plain.listener_filters_timeout;
        Self {
            name: plain.name.clone(),
            address: Some(with_pipe_mode(&plain.address, plain.pipe_mode)),
            filter_chains: plain.filter_chains.iter().map(Into::into).collect(),
            default_filter_chain: plain.default_filter_chain.as_ref().map(Into::into),
            listener_filters: plain.listener_filters.iter().map(Into::into).collect(),
            listener_filters_timeout: (limit != LISTENER_FILTERS_TIMEOUT_DEFAULT)
                .then(|| to_duration(limit)),
            continue_on_listener_filters_timeout: plain.continue_on_listener_filters_timeout,
            bind_to_port: (!plain.bind_to_port).then_some(false),
            use_original_dst: plain.use_original_dst.then_some(true),
            traffic_direction: traffic_direction.into(),
            tcp_backlog_size: Some(plain.tcp_backlog_size),
            ..Default::default()
        }
    }
}

impl From<&HttpConnectionManager> for hcm::HttpConnectionManager {
    fn from(plain: &HttpConnectionManager) -> Self {
        use hcm::http_connection_manager::{CodecType, RouteSpecifier};
        let codec_type = match plain.codec {
            Codec::Auto => CodecType::Auto,
            Codec::Http1 => CodecType::Http1,
            Codec::Http2 => CodecType::Http2,
        };
        let streams = Some(plain.h2_max_concurrent_streams);
        let mut wire = Self {
            codec_type: codec_type.into(),
            stat_prefix: plain.stat_prefix.clone(),
            route_specifier: Some(match &plain.rds {
                Some(rds) => RouteSpecifier::Rds(rds.into()),
                None => RouteSpecifier::RouteConfig((&plain.route_config).into()),
            }),
            http_filters: plain.http_filters.iter().map(Into::into).collect(),
            common_http_protocol_options: Some(core::HttpProtocolOptions {
                idle_timeout: Some(to_duration(plain.idle_timeout)),
                max_connection_duration: (!plain.max_connection_duration.is_zero())
                    .then(|| to_duration(plain.max_connection_duration)),
                max_stream_duration: (!plain.max_stream_duration.is_zero())
                    .then(|| to_duration(plain.max_stream_duration)),
                headers_with_underscores_action: 0,
                max_requests_per_connection: (plain.max_requests_per_connection != 0)
                    .then_some(plain.max_requests_per_connection),
            }),
            http2_protocol_options: Some(core::Http2ProtocolOptions {
                max_concurrent_streams: streams,
            }),
            max_request_headers_kb: Some(plain.max_request_headers_kb),
            upgrade_configs: plain.upgrades.iter().map(Into::into).collect(),
            stream_idle_timeout: Some(to_duration(plain.stream_idle_timeout)),
            request_timeout: Some(to_duration(plain.request_timeout)),
            request_headers_timeout: Some(to_duration(plain.request_headers_timeout)),
            drain_timeout: Some(to_duration(plain.drain_timeout)),
            access_log: plain.access_log.iter().map(Into::into).collect(),
            use_remote_address: Some(plain.use_remote_address),
            generate_request_id: Some(plain.generate_request_id),
            preserve_external_request_id: plain.preserve_external_request_id,
            server_name: plain.server_name.clone(),
            server_header_transformation: plain.server_header.to_wire(),
            local_reply_config: (!plain.local_replies.is_empty())
                .then(|| (&plain.local_replies).into()),
            tracing: plain.tracing.as_ref().map(Into::into),
            ..Self::default()
        };
        plain.edge.write(&mut wire);
        wire
    }
}
