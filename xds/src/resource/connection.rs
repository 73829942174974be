//! What a cluster says of connections to its endpoints.

use crate::{
    problems::ConfigErrors,
    wire::envoy::config::{cluster::v3 as wire, core::v3 as core},
};
use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// Of each connection.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConnectionOptions {
    /// `upstream_connection_options.tcp_keepalive`; none leaves it off.
    pub keepalive: Option<TcpKeepalive>,
    /// `upstream_bind_config.source_address`: where it comes from.
    pub source: Option<SocketAddr>,
    /// `max_requests_per_connection`; none is no limit.
    pub max_requests: Option<u32>,
    /// `common_http_protocol_options.idle_timeout`: one without a request is closed then; zero is never, none is an hour.
    pub idle_timeout: Option<Duration>,
}

/// Envoy's where none is said.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

impl ConnectionOptions {
    /// How long one may be without a request, if that has an end.
    #[must_use]
    pub fn idle_limit(&self) -> Option<Duration> {
        Some(self.idle_timeout.unwrap_or(IDLE_TIMEOUT)).filter(|limit| !limit.is_zero())
    }
}

/// When a connection is asked whether it is still there; what is not said is the system's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TcpKeepalive {
    /// How often until it counts as gone.
    pub probes: Option<u32>,
    /// Without a byte before.
    pub time: Option<Duration>,
    /// Between.
    pub interval: Option<Duration>,
}

/// What a cluster says of it.
#[derive(Default)]
pub(super) struct Given {
    pub(super) options: Option<wire::UpstreamConnectionOptions>,
    pub(super) bind: Option<core::BindConfig>,
    pub(super) max_requests: Option<u32>,
    pub(super) idle_timeout: Option<Duration>,
}

/// Reads all of it.
pub(super) fn read(problems: &mut ConfigErrors, given: Given) -> ConnectionOptions {
    let seconds = |count: u32| Duration::from_secs(count.into());
    let keepalive = given.options.and_then(|options| options.tcp_keepalive);
    ConnectionOptions {
        keepalive: keepalive.map(|keepalive| TcpKeepalive {
            probes: keepalive.keepalive_probes,
            time: keepalive.keepalive_time.map(seconds),
            interval: keepalive.keepalive_interval.map(seconds),
        }),
        source: given
            .bind
            .and_then(|bind| bind.source_address)
            .and_then(|source| {
                problems.take("upstream_bind_config.source_address", address(&source))
            }),
        max_requests: given.max_requests.filter(|max| *max > 0),
        idle_timeout: given.idle_timeout,
    }
}

fn address(wire: &core::SocketAddress) -> Result<SocketAddr, ConfigErrors> {
    let port = match wire.port_specifier {
        Some(core::socket_address::PortSpecifier::PortValue(port)) => port,
        None => 0,
    };
    let port = u16::try_from(port).map_err(|_| {
        ConfigErrors::one("port_value", format!("must be at most 65535, is {port}"))
    })?;
    let ip: IpAddr = wire.address.parse().map_err(|_| {
        ConfigErrors::one("address", format!("malformed IP address: {}", wire.address))
    })?;
    Ok(SocketAddr::new(ip, port))
}

/// How a cluster shows it.
pub(super) fn show(plain: &ConnectionOptions) -> Given {
    let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
    let options = plain
        .keepalive
        .map(|keepalive| wire::UpstreamConnectionOptions {
            tcp_keepalive: Some(core::TcpKeepalive {
                keepalive_probes: keepalive.probes,
                keepalive_time: keepalive.time.map(seconds),
                keepalive_interval: keepalive.interval.map(seconds),
            }),
        });
    let bind = plain.source.map(|source| core::BindConfig {
        source_address: Some(core::SocketAddress {
            protocol: 0,
            address: source.ip().to_string(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(
                source.port().into(),
            )),
        }),
    });
    Given {
        options,
        bind,
        max_requests: plain.max_requests,
        idle_timeout: plain.idle_timeout,
    }
}
