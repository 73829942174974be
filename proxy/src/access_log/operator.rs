//! What each command operator of an access-log format means: which fact of a finished request it stands for.
//!
//! Names and meanings are Envoy's (`envoy/docs: access log command operators`), then ours. How a value is written
//! is [`super::format`]'s business.

use super::{Captured, Entry, Headers, Wanted, start_time::TimeFormat};
use crate::tls::TlsFacts;
use http::{HeaderName, Version};
use outrigger_filters::{end_address::EndAddress, error::Flag};
use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime},
};

/// A compiled operator.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Operator {
    /// The same for every request of this process.
    Constant(String),
    StartTime(TimeFormat),
    /// The first of up to two headers that is there.
    Header {
        sources: Vec<Source>,
        without_query: bool,
    },
    Protocol,
    ResponseCode,
    ResponseCodeDetails,
    Flags {
        long: bool,
    },
    BytesReceived,
    BytesSent,
    /// Whole milliseconds between two moments of the request.
    Between(Moment, Moment),
    UpstreamHost,
    UpstreamCluster,
    Attempts,
    /// The client's socket, or ours towards it.
    Downstream {
        end: End,
        part: AddressPart,
    },
    ConnectionId,
    /// Of the client's connection, if it is TLS.
    Tls(TlsFact),
    /// Why a handshake with the upstream failed, which the details end with.
    TransportFailure,
    RequestId,
    TraceId,
    RouteName,
    VirtualHost,
    Ttft,
    ItlP99,
    PrefixHitTokens,
    PrefixHitTokensConfirmed,
    Migrations,
    PromptTokens,
    CompletionTokens,
    Model,
    RoutingDecision,
    /// What our own answer says, where it is formatted.
    LocalReplyBody,
    Disaggregation,
    /// Something this proxy has none of (filter state, certificates' subjects): always missing, as in an Envoy without it.
    Absent,
}

/// Something known of a client's connection because it is TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TlsFact {
    Version,
    ServerName,
    PeerUriSans,
    PeerDnsSans,
}

impl TlsFact {
    fn of(self, tls: &TlsFacts) -> &str {
        match self {
            Self::Version => tls.version,
            Self::ServerName => &tls.server_name,
            Self::PeerUriSans => &tls.peer_uri_sans,
            Self::PeerDnsSans => &tls.peer_dns_sans,
        }
    }
}

/// Where a header operator finds its value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Source {
    Method,
    Path,
    Authority,
    RequestId,
    UpstreamServiceTime,
    Request(usize),
    Response(usize),
}

/// Whose address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The client's.
    Client,
    /// That of the socket's other end, whoever the client is.
    Socket,
    /// Ours.
    Ours,
}

/// Which part of a socket address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AddressPart {
    Both,
    Ip,
    Port,
}

/// A moment in a request's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    /// First byte from the client.
    RequestStart,
    /// Last byte from the client.
    RequestEnd,
    /// First byte from upstream.
    ResponseStart,
    /// Last byte to the client.
    ResponseEnd,
}

/// What an operator found.
#[derive(Debug)]
pub(super) enum Value<'a> {
    Missing,
    Uint(u64),
    /// Shown in milliseconds with their fraction.
    Millis(Duration),
    Bytes(&'a [u8]),
    /// As `Bytes`, with spaces shown as underscores.
    Spaceless(&'a str),
    /// A JSON object somebody serialised.
    Object(&'a str),
    Socket(SocketAddr),
    Ip(IpAddr),
    Time(&'a TimeFormat, SystemTime),
    Flags(&'a [Flag], bool),
}

/// Operators of Envoy that are accepted and have nothing to show here.
const ABSENT: [&str; 36] = [
    "CLUSTER_METADATA",
    "CONNECTION_TERMINATION_DETAILS",
    "DOWNSTREAM_LOCAL_DNS_SAN",
    "DOWNSTREAM_LOCAL_EMAIL_SAN",
    "DOWNSTREAM_LOCAL_SUBJECT",
    "DOWNSTREAM_LOCAL_URI_SAN",
    "DOWNSTREAM_PEER_CERT",
    "DOWNSTREAM_PEER_CERT_V_END",
    "DOWNSTREAM_PEER_CERT_V_START",
    "DOWNSTREAM_PEER_EMAIL_SAN",
    "DOWNSTREAM_PEER_FINGERPRINT_1",
    "DOWNSTREAM_PEER_FINGERPRINT_256",
    "DOWNSTREAM_PEER_ISSUER",
    "DOWNSTREAM_PEER_SERIAL",
    "DOWNSTREAM_PEER_SUBJECT",
    "DOWNSTREAM_TLS_CIPHER",
    "DOWNSTREAM_TLS_SESSION_ID",
    "DOWNSTREAM_TRANSPORT_FAILURE_REASON",
    "DYNAMIC_METADATA",
    "FILTER_CHAIN_NAME",
    "FILTER_STATE",
    "METADATA",
    "TLS_JA3_FINGERPRINT",
    "TLS_JA4_FINGERPRINT",
    "UPSTREAM_FILTER_STATE",
    "UPSTREAM_LOCAL_ADDRESS",
    "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT",
    "UPSTREAM_LOCAL_PORT",
    "UPSTREAM_METADATA",
    "UPSTREAM_PEER_CERT",
    "UPSTREAM_PEER_SUBJECT",
    "UPSTREAM_PEER_URI_SAN",
    "UPSTREAM_TLS_CIPHER",
    "UPSTREAM_TLS_SESSION_ID",
    "UPSTREAM_TLS_VERSION",
    "VIRTUAL_CLUSTER_NAME",
];

impl Operator {
    /// Compiles `%NAME(argument)%`; headers it needs get a place in `headers`.
    ///
    /// # Errors
    /// What is wrong with it, naming it.
    pub(super) fn compile(
        name: &str,
        argument: Option<&str>,
        headers: &mut Headers,
    ) -> Result<Self, String> {
        if let Some(operator) = Self::with_argument(name, argument, headers)? {
            return Ok(operator);
        }
        if ABSENT.contains(&name) {
            return Ok(Self::Absent);
        }
        if argument.is_some() {
            return Err(match Self::plain(name) {
                Some(_) => format!("operator %{name}% takes no argument"),
                None => format!("unknown operator %{name}%"),
            });
        }
        Self::plain(name).ok_or_else(|| format!("unknown operator %{name}%"))
    }

    fn with_argument(
        name: &str,
        argument: Option<&str>,
        headers: &mut Headers,
    ) -> Result<Option<Self>, String> {
        let needed = || {
            argument
                .filter(|text| !text.is_empty())
                .ok_or(format!("operator %{name}% needs an argument"))
        };
        Ok(Some(match name {
            "START_TIME" => Self::StartTime(match argument.filter(|format| !format.is_empty()) {
                Some(format) => TimeFormat::compile(format)
                    .map_err(|error| format!("operator %START_TIME%: {error}"))?,
                None => TimeFormat::default(),
            }),
            "REQ" | "REQ_WITHOUT_QUERY" => Self::Header {
                sources: sources(needed()?, |header| request_source(header, headers))?,
                without_query: name == "REQ_WITHOUT_QUERY",
            },
            "RESP" => Self::Header {
                sources: sources(needed()?, |header| response_source(header, headers))?,
                without_query: false,
            },
            "COMMON_DURATION" => common_duration(needed()?)?,
            "ENVIRONMENT" => std::env::var(needed()?).map_or(Self::Absent, Self::Constant),
            _ => return Ok(None),
        }))
    }

    fn plain(name: &str) -> Option<Self> {
        use Moment::{RequestEnd, RequestStart, ResponseEnd, ResponseStart};
        if let Some(operator) = downstream_address(name) {
            return Some(operator);
        }
        Some(match name {
            "PROTOCOL" => Self::Protocol,
            "RESPONSE_CODE" => Self::ResponseCode,
            "RESPONSE_CODE_DETAILS" => Self::ResponseCodeDetails,
            "RESPONSE_FLAGS" => Self::Flags { long: false },
            "RESPONSE_FLAGS_LONG" => Self::Flags { long: true },
            "BYTES_RECEIVED" => Self::BytesReceived,
            "BYTES_SENT" => Self::BytesSent,
            "DURATION" => Self::Between(RequestStart, ResponseEnd),
            "REQUEST_DURATION" => Self::Between(RequestStart, RequestEnd),
            "RESPONSE_DURATION" => Self::Between(RequestStart, ResponseStart),
            "RESPONSE_TX_DURATION" => Self::Between(ResponseStart, ResponseEnd),
            "UPSTREAM_HOST" | "UPSTREAM_HOST_NAME" | "UPSTREAM_REMOTE_ADDRESS" => {
                Self::UpstreamHost
            }
            "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Self::UpstreamCluster,
            "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Self::Attempts,
            "DOWNSTREAM_TLS_VERSION" => Self::Tls(TlsFact::Version),
            "REQUESTED_SERVER_NAME" => Self::Tls(TlsFact::ServerName),
            "DOWNSTREAM_PEER_URI_SAN" => Self::Tls(TlsFact::PeerUriSans),
            "DOWNSTREAM_PEER_DNS_SAN" => Self::Tls(TlsFact::PeerDnsSans),
            "UPSTREAM_TRANSPORT_FAILURE_REASON" => Self::TransportFailure,
            "CONNECTION_ID" => Self::ConnectionId,
            "STREAM_ID" => Self::RequestId,
            "TRACE_ID" => Self::TraceId,
            "ROUTE_NAME" => Self::RouteName,
            "VIRTUAL_HOST_NAME" => Self::VirtualHost,
            "ACCESS_LOG_TYPE" => Self::Constant("DownstreamEnd".to_owned()),
            "HOSTNAME" => Self::Constant(hostname()),
            "PID" => Self::Constant(std::process::id().to_string()),
            "TTFT" => Self::Ttft,
            "ITL_P99" => Self::ItlP99,
            "PREFIX_HIT_TOKENS" => Self::PrefixHitTokens,
            "PREFIX_HIT_TOKENS_CONFIRMED" => Self::PrefixHitTokensConfirmed,
            "MIGRATIONS" => Self::Migrations,
            "PROMPT_TOKENS" => Self::PromptTokens,
            "COMPLETION_TOKENS" => Self::CompletionTokens,
            "MODEL" => Self::Model,
            "ROUTING_DECISION" => Self::RoutingDecision,
            "LOCAL_REPLY_BODY" => Self::LocalReplyBody,
            "DISAGGREGATION" => Self::Disaggregation,
            _ => return None,
        })
    }

    /// What it stands for in this request.
    pub(super) fn value<'a>(&'a self, entry: &'a Entry<'_>, captured: &'a Captured) -> Value<'a> {
        let log = entry.log;
        match self {
            Self::Constant(text) => Value::Bytes(text.as_bytes()),
            Self::StartTime(format) => Value::Time(format, entry.start),
            Self::Header {
                sources,
                without_query,
            } => header(sources, *without_query, entry, captured),
            Self::Protocol => entry.protocol.map_or(Value::Missing, protocol),
            Self::ResponseCode => Value::Uint(entry.code.into()),
            Self::ResponseCodeDetails => match log.details.as_str() {
                "" if entry.code == 0 => Value::Missing,
                "" => Value::Spaceless("via_upstream"),
                details => Value::Spaceless(details),
            },
            Self::Flags { .. } if log.flags.is_empty() => Value::Spaceless("-"),
            Self::Flags { long } => Value::Flags(&log.flags, *long),
            Self::BytesReceived => Value::Uint(entry.bytes_received),
            Self::BytesSent => Value::Uint(entry.bytes_sent),
            Self::Between(from, to) => match (from.of(entry), to.of(entry)) {
                (Some(from), Some(to)) => Value::Uint(to.saturating_sub(from).as_millis() as u64),
                _ => Value::Missing,
            },
            Self::UpstreamHost => text(log.upstream_host.as_ref().map_or("", |id| &id.0)),
            Self::UpstreamCluster => text(&log.upstream_cluster),
            Self::Attempts => Value::Uint(log.attempts.into()),
            Self::Downstream { end, part } => {
                let socket = match end {
                    End::Client => entry.downstream_remote,
                    End::Socket => entry.downstream_direct_remote,
                    End::Ours => entry.downstream_local,
                };
                match (socket, part) {
                    (EndAddress::Ip(socket), AddressPart::Both) => Value::Socket(*socket),
                    (EndAddress::Ip(socket), AddressPart::Ip) => Value::Ip(socket.ip()),
                    (EndAddress::Ip(socket), AddressPart::Port) => {
                        Value::Uint(socket.port().into())
                    }
                    (EndAddress::Pipe(_), AddressPart::Port) => Value::Missing,
                    (EndAddress::Pipe(path), _) => text(path),
                }
            }
            Self::ConnectionId => Value::Uint(entry.connection_id),
            Self::TransportFailure => {
                let reason = log.details.split_once("{remote_connection_failure|");
                text(reason.map_or("", |(_, reason)| reason.trim_end_matches('}')))
            }
            Self::Tls(of) => text(entry.tls.map_or("", |tls| of.of(tls))),
            Self::RequestId => text(entry.request_id),
            Self::TraceId => text(entry.trace_id),
            Self::RouteName => text(entry.route_name),
            Self::VirtualHost => text(entry.virtual_host),
            Self::Ttft => entry.ttft.map_or(Value::Missing, Value::Millis),
            Self::ItlP99 => entry.itl_p99.map_or(Value::Missing, Value::Millis),
            Self::PrefixHitTokens => log.hit_tokens_predicted.map_or(Value::Missing, Value::Uint),
            Self::PrefixHitTokensConfirmed => {
                log.hit_tokens_confirmed.map_or(Value::Missing, Value::Uint)
            }
            Self::Migrations => Value::Uint(log.migrations.into()),
            Self::PromptTokens => log.prompt_tokens.map_or(Value::Missing, Value::Uint),
            Self::CompletionTokens => log.completion_tokens.map_or(Value::Missing, Value::Uint),
            Self::Model => text(log.model.as_deref().unwrap_or_default()),
            Self::RoutingDecision => object(log.routing_decision.as_deref()),
            Self::LocalReplyBody => Value::Bytes(entry.local_reply_body.as_bytes()),
            Self::Disaggregation => object(log.disaggregation.as_deref()),
            Self::Absent => Value::Missing,
        }
    }
}

impl Moment {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "DS_RX_BEG" => Self::RequestStart,
            "DS_RX_END" => Self::RequestEnd,
            "US_RX_BEG" => Self::ResponseStart,
            "DS_TX_END" => Self::ResponseEnd,
            _ => return None,
        })
    }

    fn of(self, entry: &Entry<'_>) -> Option<Duration> {
        match self {
            Self::RequestStart => Some(Duration::ZERO),
            Self::RequestEnd => entry.request_duration,
            Self::ResponseStart => entry.response_duration,
            Self::ResponseEnd => Some(entry.duration),
        }
    }
}

fn object(json: Option<&str>) -> Value<'_> {
    json.map_or(Value::Missing, Value::Object)
}

fn text(text: &str) -> Value<'_> {
    if text.is_empty() {
        Value::Missing
    } else {
        Value::Bytes(text.as_bytes())
    }
}

fn protocol(version: Version) -> Value<'static> {
    match version {
        Version::HTTP_10 => Value::Bytes(b"HTTP/1.0"),
        Version::HTTP_11 => Value::Bytes(b"HTTP/1.1"),
        Version::HTTP_2 => Value::Bytes(b"HTTP/2"),
        Version::HTTP_3 => Value::Bytes(b"HTTP/3"),
        _ => Value::Missing,
    }
}

fn header<'a>(
    sources: &'a [Source],
    without_query: bool,
    entry: &'a Entry<'_>,
    captured: &'a Captured,
) -> Value<'a> {
    for source in sources {
        let found = match source {
            Source::Method => Some(entry.method.as_str().as_bytes()),
            Source::Path => Some(entry.path.as_bytes()),
            Source::Authority => Some(entry.authority.as_bytes()),
            Source::RequestId => Some(entry.request_id.as_bytes()),
            Source::Request(slot) => captured.request(*slot),
            Source::Response(slot) => captured.response(*slot),
            Source::UpstreamServiceTime => match entry.log.upstream_service_time {
                Some(time) => return Value::Uint(time.as_millis() as u64),
                None => None,
            },
        };
        if let Some(bytes) = found.filter(|bytes| !bytes.is_empty()) {
            let query = if without_query {
                memchr::memchr(b'?', bytes)
            } else {
                None
            };
            return Value::Bytes(&bytes[..query.unwrap_or(bytes.len())]);
        }
    }
    Value::Missing
}

/// `X?Y`: X, and Y where X is missing.
fn sources(
    argument: &str,
    mut one: impl FnMut(&str) -> Result<Source, String>,
) -> Result<Vec<Source>, String> {
    let (first, second) = argument
        .split_once('?')
        .map_or((argument, None), |(first, second)| (first, Some(second)));
    std::iter::once(first).chain(second).map(&mut one).collect()
}

fn request_source(header: &str, headers: &mut Headers) -> Result<Source, String> {
    Ok(match header.to_ascii_lowercase().as_str() {
        ":method" => Source::Method,
        ":path" => Source::Path,
        ":authority" | "host" => Source::Authority,
        ":scheme" => Source::Request(headers.request_slot(Wanted::Scheme)),
        "x-request-id" => Source::RequestId,
        _ => Source::Request(headers.request_slot(Wanted::Header(header_name(header)?))),
    })
}

fn response_source(header: &str, headers: &mut Headers) -> Result<Source, String> {
    if header.eq_ignore_ascii_case("x-envoy-upstream-service-time") {
        return Ok(Source::UpstreamServiceTime);
    }
    Ok(Source::Response(
        headers.response_slot(header_name(header)?),
    ))
}

fn header_name(header: &str) -> Result<HeaderName, String> {
    HeaderName::try_from(header).map_err(|_| format!("{header:?} is no header name"))
}

/// `START:END:UNIT`; only milliseconds.
fn common_duration(argument: &str) -> Result<Operator, String> {
    let wrong = |what: &str| format!("operator %COMMON_DURATION({argument})%: {what}");
    let mut parts = argument.split(':');
    let mut moment = || {
        let name = parts.next().unwrap_or_default();
        Moment::named(name).ok_or_else(|| {
            wrong(&format!(
                "time point {name:?} is not one of DS_RX_BEG, DS_RX_END, US_RX_BEG, DS_TX_END"
            ))
        })
    };
    let (from, to) = (moment()?, moment()?);
    match (parts.next(), parts.next()) {
        (Some("ms"), None) => Ok(Operator::Between(from, to)),
        _ => Err(wrong("the unit must be ms")),
    }
}

fn downstream_address(name: &str) -> Option<Operator> {
    let rest = name.strip_prefix("DOWNSTREAM_")?;
    let (end, part) = if let Some(part) = rest.strip_prefix("REMOTE_") {
        (End::Client, part)
    } else if let Some(part) = rest.strip_prefix("DIRECT_REMOTE_") {
        (End::Socket, part)
    } else {
        let ours = rest.strip_prefix("DIRECT_").unwrap_or(rest);
        (End::Ours, ours.strip_prefix("LOCAL_")?)
    };
    let part = match part {
        "ADDRESS" => AddressPart::Both,
        "ADDRESS_WITHOUT_PORT" => AddressPart::Ip,
        "PORT" => AddressPart::Port,
        _ => return None,
    };
    Some(Operator::Downstream { end, part })
}

fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "-".to_owned(),
        name => name.to_owned(),
    }
}

/// `%RESPONSE_FLAGS_LONG%` of a flag.
pub(super) fn long_flag(flag: Flag) -> &'static str {
    match flag {
        Flag::NoRouteFound => "NoRouteFound",
        Flag::NoFilterConfigFound => "NoFilterConfigFound",
        Flag::NoClusterFound => "NoClusterFound",
        Flag::NoHealthyUpstream => "NoHealthyUpstream",
        Flag::UpstreamConnectionFailure => "UpstreamConnectionFailure",
        Flag::UpstreamConnectionTermination => "UpstreamConnectionTermination",
        Flag::UpstreamRemoteReset => "UpstreamRemoteReset",
        Flag::UpstreamProtocolError => "UpstreamProtocolError",
        Flag::UpstreamRequestTimeout => "UpstreamRequestTimeout",
        Flag::UpstreamOverflow => "UpstreamOverflow",
        Flag::UpstreamRetryLimitExceeded => "UpstreamRetryLimitExceeded",
        Flag::StreamIdleTimeout => "StreamIdleTimeout",
        Flag::DurationTimeout => "DurationTimeout",
        Flag::DownstreamConnectionTermination => "DownstreamConnectionTermination",
        Flag::DownstreamProtocolError => "DownstreamProtocolError",
        Flag::LocalReset => "LocalReset",
        Flag::DropOverload => "DropOverLoad",
        Flag::FailedLocalHealthCheck => "FailedLocalHealthCheck",
        Flag::RateLimited => "RateLimited",
        Flag::DelayInjected => "DelayInjected",
        Flag::FaultInjected => "FaultInjected",
        Flag::Unflagged => "-",
    }
}
