//! `envoy.config.listener.v3.FilterChain`: what happens to the connections of a listener, and to which.

use super::{
    cidr::CidrRange,
    listener::HttpConnectionManager,
    tcp_proxy::TcpProxy,
    tls::{self, DownstreamTls},
};
use crate::{
    problems::ConfigErrors,
    protobuf::{duration, pack, to_duration, unpack},
    wire::envoy::{
        config::listener::v3 as wire,
        extensions::filters::network::{
            http_connection_manager::v3 as hcm, tcp_proxy::v3 as tcp_proxy,
        },
    },
};
use std::time::Duration;
use wire::filter_chain_match::ConnectionSourceType;

/// A filter chain.
#[derive(Debug, Clone, PartialEq)]
pub struct FilterChain {
    /// May be empty.
    pub name: String,
    /// Which connections it is for.
    pub matches: FilterChainMatch,
    /// The one network filter.
    pub network: Network,
    /// What its transport socket says; none means plain text.
    pub tls: Option<DownstreamTls>,
    /// Most that a handshake may take; zero is off (default).
    pub connect_timeout: Duration,
}

/// The network filter at the end of a chain.
#[derive(Debug, Clone, PartialEq)]
pub enum Network {
    /// The HTTP connection manager.
    Http(Box<HttpConnectionManager>),
    /// The TCP proxy.
    Tcp(TcpProxy),
}

/// `FilterChainMatch`: all that is given must hold, and of a list one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FilterChainMatch {
    /// Port that the connection was sent to.
    pub destination_port: Option<u16>,
    /// Addresses that it was sent to.
    pub prefix_ranges: Vec<CidrRange>,
    /// Lower case; a wildcard is kept as the end of a name, `.example.com`.
    pub server_names: Vec<String>,
    /// `tls` or `raw_buffer`; empty is any.
    pub transport_protocol: String,
    /// As ALPN offers them.
    pub application_protocols: Vec<String>,
    /// Addresses of the socket's other end.
    pub direct_source_prefix_ranges: Vec<CidrRange>,
    /// Where the client is.
    pub source_type: SourceType,
    /// Addresses of the client.
    pub source_prefix_ranges: Vec<CidrRange>,
    /// Ports of the client.
    pub source_ports: Vec<u16>,
}

/// `source_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SourceType {
    /// Anywhere.
    #[default]
    Any,
    /// On this host.
    SameIpOrLoopback,
    /// On another host.
    External,
}

impl FilterChain {
    /// A chain for all connections, in plain text.
    #[must_use]
    pub fn http(manager: HttpConnectionManager) -> Self {
        Self {
            name: String::new(),
            matches: FilterChainMatch::default(),
            network: Network::Http(Box::new(manager)),
            tls: None,
            connect_timeout: Duration::ZERO,
        }
    }
}

impl FilterChainMatch {
    /// Whether only `tls_inspector` can tell if it holds.
    #[must_use]
    pub fn needs_tls_inspector(&self) -> bool {
        self.transport_protocol == "tls"
            || self.transport_protocol.is_empty()
                && !(self.server_names.is_empty() && self.application_protocols.is_empty())
    }

    /// Whether some connection could fit both equally well, so that nobody could say whose it is.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.destination_port == other.destination_port
            && self.transport_protocol == other.transport_protocol
            && self.source_type == other.source_type
            && meet(&self.prefix_ranges, &other.prefix_ranges)
            && meet(&self.server_names, &other.server_names)
            && meet(&self.application_protocols, &other.application_protocols)
            && meet(
                &self.direct_source_prefix_ranges,
                &other.direct_source_prefix_ranges,
            )
            && meet(&self.source_prefix_ranges, &other.source_prefix_ranges)
            && meet(&self.source_ports, &other.source_ports)
    }
}

/// Whether two lists have an entry in common; empty ones have what "any" means.
fn meet<T: PartialEq>(one: &[T], other: &[T]) -> bool {
    one.is_empty() && other.is_empty() || one.iter().any(|entry| other.contains(entry))
}

/// Notes chains that some connection would fit equally well.
pub(super) fn check_matches(problems: &mut ConfigErrors, chains: &[FilterChain]) {
    for (index, chain) in chains.iter().enumerate() {
        let before = &chains[..index];
        let same = before
            .iter()
            .position(|earlier| earlier.matches == chain.matches);
        let overlapping = before
            .iter()
            .position(|earlier| earlier.matches.overlaps(&chain.matches));
        let message = match (same, overlapping) {
            (Some(earlier), _) => {
                format!("has the same matching rules as filter_chains[{earlier}]")
            }
            (None, Some(earlier)) => {
                format!("has matching rules that overlap with filter_chains[{earlier}]")
            }
            (None, None) => continue,
        };
        problems.add(
            format!("filter_chains[{index}].filter_chain_match"),
            message,
        );
    }
}

impl TryFrom<wire::FilterChain> for FilterChain {
    type Error = ConfigErrors;

    fn try_from(wire: wire::FilterChain) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let matches = wire.filter_chain_match.map(FilterChainMatch::try_from);
        let matches = problems.take("filter_chain_match", matches.transpose());
        let network = problems.take("filters", network(wire.filters));
        let tls = wire
            .transport_socket
            .and_then(|socket| problems.take("transport_socket", tls::downstream(socket)));
        let limit = wire.transport_socket_connect_timeout;
        let connect_timeout = limit
            .and_then(|limit| problems.take("transport_socket_connect_timeout", duration(limit)));
        problems.finish(network.map(|network| Self {
            name: wire.name,
            matches: matches.flatten().unwrap_or_default(),
            network,
            tls,
            connect_timeout: connect_timeout.unwrap_or_default(),
        }))
    }
}

fn network(filters: Vec<wire::Filter>) -> Result<Network, ConfigErrors> {
    let [filter] =
        <[wire::Filter; 1]>::try_from(filters).map_err(|filters| match filters.len() {
            0 => ConfigErrors::one("", "required: the HTTP connection manager or the TCP proxy"),
            count => ConfigErrors::one("", format!("not supported yet: {count} network filters")),
        })?;
    let mut problems = ConfigErrors::default();
    problems.not_empty("[0].name", filter.name);
    let Some(wire::filter::ConfigType::TypedConfig(any)) = filter.config_type else {
        problems.add("[0]", "required: typed_config");
        return problems.finish(None);
    };
    let place = "[0].typed_config";
    let http = problems.take(place, unpack::<hcm::HttpConnectionManager>(&any));
    let tcp = problems.take(place, unpack::<tcp_proxy::TcpProxy>(&any));
    let network = match (http.flatten(), tcp.flatten()) {
        (Some(manager), _) => problems
            .take(place, HttpConnectionManager::try_from(manager))
            .map(|manager| Network::Http(Box::new(manager))),
        (_, Some(tcp)) => problems
            .take(place, TcpProxy::try_from(tcp))
            .map(Network::Tcp),
        (None, None) => {
            let message = format!("not supported yet: {} as a network filter", any.type_url);
            problems.add(place, message);
            None
        }
    };
    problems.finish(network)
}

impl TryFrom<wire::FilterChainMatch> for FilterChainMatch {
    type Error = ConfigErrors;

    fn try_from(wire: wire::FilterChainMatch) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let source_type = match wire.source_type() {
            ConnectionSourceType::Any => SourceType::Any,
            ConnectionSourceType::SameIpOrLoopback => SourceType::SameIpOrLoopback,
            ConnectionSourceType::External => SourceType::External,
        };
        let destination_port = wire
            .destination_port
            .map(|number| port(&mut problems, "destination_port".into(), number));
        let mut source_ports = Vec::new();
        for (index, number) in wire.source_ports.into_iter().enumerate() {
            source_ports.push(port(
                &mut problems,
                format!("source_ports[{index}]"),
                number,
            ));
        }
        let prefix_ranges = problems.take_all("prefix_ranges", wire.prefix_ranges);
        let source = problems.take_all("source_prefix_ranges", wire.source_prefix_ranges);
        let direct = "direct_source_prefix_ranges";
        let direct = problems.take_all(direct, wire.direct_source_prefix_ranges);
        let server_names = server_names(&mut problems, wire.server_names);
        problems.finish(Some(Self {
            destination_port,
            prefix_ranges,
            server_names,
            transport_protocol: wire.transport_protocol,
            application_protocols: wire.application_protocols,
            direct_source_prefix_ranges: direct,
            source_type,
            source_prefix_ranges: source,
            source_ports,
        }))
    }
}

fn port(problems: &mut ConfigErrors, place: String, number: u32) -> u16 {
    match u16::try_from(number) {
        Ok(port) if port > 0 => port,
        _ => {
            problems.add(place, format!("must be between 1 and 65535, is {number}"));
            0
        }
    }
}

fn server_names(problems: &mut ConfigErrors, names: Vec<String>) -> Vec<String> {
    let each = names.into_iter().enumerate();
    each.map(|(index, name)| {
        let name = name.to_ascii_lowercase();
        let end = name.strip_prefix('*').filter(|end| end.starts_with('.'));
        let read = end.unwrap_or(&name);
        if read.contains('*') {
            problems.add(
                format!("server_names[{index}]"),
                "partial wildcards are not supported in server_names",
            );
        }
        read.to_owned()
    })
    .collect()
}

impl From<&FilterChain> for wire::FilterChain {
    fn from(plain: &FilterChain) -> Self {
        let (name, any) = match &plain.network {
            Network::Http(manager) => (
                "envoy.filters.network.http_connection_manager",
                pack(&hcm::HttpConnectionManager::from(manager.as_ref())),
            ),
            Network::Tcp(tcp) => (
                "envoy.filters.network.tcp_proxy",
                pack(&tcp_proxy::TcpProxy::from(tcp)),
            ),
        };
        let limit = plain.connect_timeout;
        Self {
            name: plain.name.clone(),
            filter_chain_match: (plain.matches != FilterChainMatch::default())
                .then(|| (&plain.matches).into()),
            filters: vec![wire::Filter {
                name: name.into(),
                config_type: Some(wire::filter::ConfigType::TypedConfig(any)),
            }],
            transport_socket: plain.tls.as_ref().map(Into::into),
            transport_socket_connect_timeout: (!limit.is_zero()).then(|| to_duration(limit)),
        }
    }
}

impl From<&FilterChainMatch> for wire::FilterChainMatch {
    fn from(plain: &FilterChainMatch) -> Self {
        let ranges = |ranges: &[CidrRange]| ranges.iter().map(Into::into).collect();
        let source_type = match plain.source_type {
            SourceType::Any => ConnectionSourceType::Any,
            SourceType::SameIpOrLoopback => ConnectionSourceType::SameIpOrLoopback,
            SourceType::External => ConnectionSourceType::External,
        };
        let name = |name: &String| {
            let wildcard = if name.starts_with('.') { "*" } else { "" };
            format!("{wildcard}{name}")
        };
        Self {
            prefix_ranges: ranges(&plain.prefix_ranges),
            source_prefix_ranges: ranges(&plain.source_prefix_ranges),
            source_ports: plain.source_ports.iter().map(|&port| port.into()).collect(),
            destination_port: plain.destination_port.map(Into::into),
            transport_protocol: plain.transport_protocol.clone(),
            application_protocols: plain.application_protocols.clone(),
            server_names: plain.server_names.iter().map(name).collect(),
            source_type: source_type.into(),
            direct_source_prefix_ranges: ranges(&plain.direct_source_prefix_ranges),
        }
    }
}
