//! `envoy.config.listener.v3.Listener` and the HTTP connection manager in it.

use super::{
    config_source::Rds,
    endpoint::Address,
    filter_chain::FilterChain,
    route::{RouteConfiguration, TypedConfig},
    server_header::{self, ServerHeader},
    tls::{self, DownstreamTls},
};
use crate::{
    problems::ConfigErrors,
    protobuf::{duration, pack, struct_from_json, struct_to_json, to_duration, type_name, unpack},
    wire::envoy::{
        config::{accesslog::v3 as log, core::v3 as core, listener::v3 as wire},
        extensions::{
            access_loggers::{file::v3 as file, stream::v3 as stream},
            filters::{http::router::v3::Router, network::http_connection_manager::v3 as hcm},
        },
    },
};
use prost::Name;
use prost_types::Any;
use serde_json::Value;
use std::{collections::BTreeMap, time::Duration};

/// Length of the accept queue unless given; the system cuts it to its own limit.
pub const TCP_BACKLOG_SIZE_DEFAULT: u32 = 4096;

/// Most that `max_request_headers_kb` may be, as in Envoy.
pub const MAX_REQUEST_HEADERS_KB_MAX: u32 = 8192;

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
    /// What its filter chain's transport socket says; none means plain text.
    pub tls: Option<DownstreamTls>,
    /// Most that a handshake may take; zero is off (default).
    pub transport_socket_connect_timeout: Duration,
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
            rds: None,
            http_filters: Vec::new(),
            access_log: Vec::new(),
            use_remote_address: false,
            preserve_external_request_id: false,
            server_name: server_header::NAME_DEFAULT.into(),
            server_header: ServerHeader::Overwrite,
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
        let address = problems.required("address", wire.address);
        if wire.enable_reuse_port == Some(false) {
            problems.add(
                "enable_reuse_port",
                "not supported yet: false (every worker binds its own socket)",
            );
        }
        let chain = problems.take("filter_chains", FilterChain::of(wire.filter_chains));
        problems.finish(address.zip(chain).map(|(address, chain)| Self {
            name,
            address,
            traffic_direction,
            http: chain.http,
            tls: chain.tls,
            transport_socket_connect_timeout: chain.connect_timeout,
            tcp_backlog_size: wire.tcp_backlog_size.unwrap_or(TCP_BACKLOG_SIZE_DEFAULT),
        }))
    }
}

impl TryFrom<hcm::HttpConnectionManager> for HttpConnectionManager {
    type Error = ConfigErrors;

    fn try_from(mut wire: hcm::HttpConnectionManager) -> Result<Self, ConfigErrors> {
        use hcm::http_connection_manager::{CodecType, RouteSpecifier};
        let mut problems = ConfigErrors::default();
        let limits = limits(&mut problems, &mut wire);
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
        let stat_prefix = problems.not_empty("stat_prefix", wire.stat_prefix);
        problems.finish(route_config.map(|route_config| {
            Self {
                stat_prefix,
                codec,
                route_config,
                rds,
                http_filters,
                access_log,
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
    if common.max_requests_per_connection.is_some() {
        problems.add(
            "common_http_protocol_options",
            "not supported yet: max_requests_per_connection",
        );
    }
    let durations = [
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
    if let Some(streams) = wire
        .http2_protocol_options
        .take()
        .and_then(|options| options.max_concurrent_streams)
    {
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

/// The router forwards, so it is last, alone, and always on.
fn check_router(problems: &mut ConfigErrors, filters: &[HttpFilter]) {
    let is_router = |filter: &HttpFilter| type_name(&filter.config.type_url) == Router::full_name();
    let Some((last, others)) = filters.split_last() else {
        problems.add("http_filters", "required: at least the router");
        return;
    };
    for (index, filter) in others
        .iter()
        .enumerate()
        .filter(|(_, filter)| is_router(filter))
    {
        let message = format!(
            "terminal filter '{}' must be the last filter of the chain",
            filter.name
        );
        problems.add(format!("http_filters[{index}]"), message);
    }
    let place = format!("http_filters[{}]", others.len());
    if !is_router(last) {
        problems.add(
            place,
            format!(
                "non-terminal filter '{}' is the last filter of the chain; the router must be",
                last.name
            ),
        );
    } else if last.disabled {
        problems.add(place, "the router cannot be disabled");
    }
}

impl TryFrom<hcm::HttpFilter> for HttpFilter {
    type Error = ConfigErrors;

    fn try_from(wire: hcm::HttpFilter) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let name = problems.not_empty("name", wire.name);
        let any = wire
            .config_type
            .map(|hcm::http_filter::ConfigType::TypedConfig(any)| any);
        if any.is_none() {
            problems.add("", "required: typed_config");
        }
        let config = any.and_then(|any| problems.take("typed_config", TypedConfig::try_from(any)));
        problems.finish(config.map(|config| Self {
            name,
            config,
            is_optional: wire.is_optional,
            disabled: wire.disabled,
        }))
    }
}

impl TryFrom<log::AccessLog> for AccessLog {
    type Error = ConfigErrors;

    fn try_from(wire: log::AccessLog) -> Result<Self, ConfigErrors> {
        let Some(log::access_log::ConfigType::TypedConfig(any)) = wire.config_type else {
            return Err(ConfigErrors::one("", "required: typed_config"));
        };
        let mut problems = ConfigErrors::default();
        let log = problems.take("typed_config", logger(&any));
        problems.finish(log)
    }
}

fn logger(any: &Any) -> Result<AccessLog, ConfigErrors> {
    use {
        file::file_access_log::AccessLogFormat::LogFormat as FileFormat,
        stream::stderr_access_log::AccessLogFormat::LogFormat as StderrFormat,
        stream::stdout_access_log::AccessLogFormat::LogFormat as StdoutFormat,
    };
    let (sink, format) = if let Some(file) = unpack::<file::FileAccessLog>(any)? {
        if file.path.is_empty() {
            return Err(ConfigErrors::one("path", "must not be empty"));
        }
        (
            AccessLogSink::File(file.path),
            file.access_log_format.map(|FileFormat(format)| format),
        )
    } else if let Some(stdout) = unpack::<stream::StdoutAccessLog>(any)? {
        (
            AccessLogSink::Stdout,
            stdout.access_log_format.map(|StdoutFormat(format)| format),
        )
    } else if let Some(stderr) = unpack::<stream::StderrAccessLog>(any)? {
        (
            AccessLogSink::Stderr,
            stderr.access_log_format.map(|StderrFormat(format)| format),
        )
    } else {
        return Err(ConfigErrors::one(
            "",
            format!("not supported yet: {} as an access log", any.type_url),
        ));
    };
    Ok(AccessLog {
        sink,
        format: log_format(format)?,
    })
}

fn log_format(
    wire: Option<core::SubstitutionFormatString>,
) -> Result<AccessLogFormat, ConfigErrors> {
    use core::{data_source::Specifier, substitution_format_string::Format};
    let Some(wire) = wire else {
        return Ok(AccessLogFormat::Text(None));
    };
    match wire.format {
        Some(Format::TextFormat(text)) => Ok(AccessLogFormat::Text(Some(text))),
        Some(Format::TextFormatSource(core::DataSource {
            specifier: Some(Specifier::InlineString(text)),
            ..
        })) => Ok(AccessLogFormat::Text(Some(text))),
        Some(Format::TextFormatSource(core::DataSource {
            specifier: Some(other),
            ..
        })) => Err(ConfigErrors::one(
            "log_format.text_format_source",
            tls::not_inline(&other),
        )),
        Some(Format::TextFormatSource(core::DataSource {
            specifier: None, ..
        })) => Err(ConfigErrors::one(
            "log_format.text_format_source",
            "required: inline_string",
        )),
        Some(Format::JsonFormat(fields)) => match struct_to_json(fields) {
            Value::Object(fields) => Ok(AccessLogFormat::Json(fields.into_iter().collect())),
            _ => Ok(AccessLogFormat::Json(BTreeMap::new())),
        },
        None => Err(ConfigErrors::one(
            "log_format",
            "required: json_format or text_format_source",
        )),
    }
}

impl From<&Listener> for wire::Listener {
    fn from(plain: &Listener) -> Self {
        let traffic_direction = match plain.traffic_direction {
            TrafficDirection::Outbound => core::TrafficDirection::Outbound,
            TrafficDirection::Inbound => core::TrafficDirection::Inbound,
        };
        let manager = hcm::HttpConnectionManager::from(&plain.http);
        let filter = wire::Filter {
            name: "envoy.filters.network.http_connection_manager".into(),
            config_type: Some(wire::filter::ConfigType::TypedConfig(pack(&manager))),
        };
        Self {
            name: plain.name.clone(),
            address: Some((&plain.address).into()),
            filter_chains: vec![wire::FilterChain {
                filters: vec![filter],
                transport_socket: plain.tls.as_ref().map(Into::into),
                transport_socket_connect_timeout: (!plain
                    .transport_socket_connect_timeout
                    .is_zero())
                .then(|| to_duration(plain.transport_socket_connect_timeout)),
                ..Default::default()
            }],
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
        Self {
            codec_type: codec_type.into(),
            stat_prefix: plain.stat_prefix.clone(),
            route_specifier: Some(match &plain.rds {
                Some(rds) => RouteSpecifier::Rds(rds.into()),
                None => RouteSpecifier::RouteConfig((&plain.route_config).into()),
            }),
            http_filters: plain.http_filters.iter().map(Into::into).collect(),
            common_http_protocol_options: Some(core::HttpProtocolOptions {
                max_requests_per_connection: None,
                idle_timeout: Some(to_duration(plain.idle_timeout)),
            }),
            http2_protocol_options: Some(core::Http2ProtocolOptions {
                max_concurrent_streams: streams,
            }),
            max_request_headers_kb: Some(plain.max_request_headers_kb),
            stream_idle_timeout: Some(to_duration(plain.stream_idle_timeout)),
            request_timeout: Some(to_duration(plain.request_timeout)),
            drain_timeout: Some(to_duration(plain.drain_timeout)),
            access_log: plain.access_log.iter().map(Into::into).collect(),
            use_remote_address: Some(plain.use_remote_address),
            generate_request_id: Some(plain.generate_request_id),
            preserve_external_request_id: plain.preserve_external_request_id,
            server_name: plain.server_name.clone(),
            server_header_transformation: plain.server_header.to_wire(),
        }
    }
}

impl From<&HttpFilter> for hcm::HttpFilter {
    fn from(plain: &HttpFilter) -> Self {
        Self {
            name: plain.name.clone(),
            config_type: Some(hcm::http_filter::ConfigType::TypedConfig(
                (&plain.config).into(),
            )),
            is_optional: plain.is_optional,
            disabled: plain.disabled,
        }
    }
}

impl From<&AccessLog> for log::AccessLog {
    fn from(plain: &AccessLog) -> Self {
        use {
            file::file_access_log::AccessLogFormat::LogFormat as FileFormat,
            stream::stderr_access_log::AccessLogFormat::LogFormat as StderrFormat,
            stream::stdout_access_log::AccessLogFormat::LogFormat as StdoutFormat,
        };
        let format = wire_format(&plain.format);
        let (name, any) = match &plain.sink {
            AccessLogSink::File(path) => {
                let format = format.map(FileFormat);
                let file = file::FileAccessLog {
                    path: path.clone(),
                    access_log_format: format,
                };
                ("envoy.access_loggers.file", pack(&file))
            }
            AccessLogSink::Stdout => {
                let stdout = stream::StdoutAccessLog {
                    access_log_format: format.map(StdoutFormat),
                };
                ("envoy.access_loggers.stdout", pack(&stdout))
            }
            AccessLogSink::Stderr => {
                let stderr = stream::StderrAccessLog {
                    access_log_format: format.map(StderrFormat),
                };
                ("envoy.access_loggers.stderr", pack(&stderr))
            }
        };
        Self {
            name: name.into(),
            config_type: Some(log::access_log::ConfigType::TypedConfig(any)),
        }
    }
}

fn wire_format(plain: &AccessLogFormat) -> Option<core::SubstitutionFormatString> {
    use core::{data_source::Specifier, substitution_format_string::Format};
    let format = match plain {
        AccessLogFormat::Text(None) => return None,
        AccessLogFormat::Text(Some(text)) => Format::TextFormatSource(core::DataSource {
            specifier: Some(Specifier::InlineString(text.clone())),
            watched_directory: None,
        }),
        AccessLogFormat::Json(fields) => Format::JsonFormat(struct_from_json(Value::Object(
            fields.clone().into_iter().collect(),
        ))),
    };
    Some(core::SubstitutionFormatString {
        format: Some(format),
    })
}
