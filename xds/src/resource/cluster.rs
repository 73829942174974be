//! `envoy.config.cluster.v3.Cluster`.

pub use super::{
    circuit_breakers::{CircuitBreakers, RetryLimit, Thresholds},
    connection::{ConnectionOptions, TcpKeepalive},
    discovery::{Discovery, Dns, LookupFamily, OriginalDst},
    lb_policy::{Balancing, LbPolicy, Reports, SlowStart},
};

use super::{
    config_source::Eds,
    connection, discovery,
    endpoint::{Address, ClusterLoadAssignment},
    health_check::{Checker, HealthCheck},
    lb_policy::{self, Given},
    lb_shown,
    outlier_detection::OutlierDetection,
    socket_match::SocketMatch,
    tls::{self, UpstreamTls},
};
use crate::{
    problems::ConfigErrors,
    protobuf::{duration, pack, to_duration, unpack},
    wire::envoy::{
        config::{cluster::v3 as wire, core::v3 as core, endpoint::v3 as endpoint},
        extensions::upstreams::http::v3 as http,
    },
};
use prost::Name;
use prost_types::Any;
use std::{collections::BTreeMap, time::Duration};
use wire::cluster::LbConfig;

/// A group of endpoints that serve the same thing.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// Unique name.
    pub name: String,
    /// Default 5 s.
    pub connect_timeout: Duration,
    /// Where its endpoints come from.
    pub discovery: Discovery,
    /// How one endpoint is chosen.
    pub lb_policy: LbPolicy,
    /// What bends that policy.
    pub balancing: Balancing,
    /// `load_assignment`; with `eds`, the one that came last.
    pub load_assignment: ClusterLoadAssignment,
    /// Where its endpoints come from (type EDS).
    pub eds: Option<Eds>,
    /// How we speak to its endpoints (`typed_extension_protocol_options`, HttpProtocolOptions).
    pub protocol: UpstreamProtocol,
    /// How its endpoints are asked for their health, if they are.
    pub health_check: Option<HealthCheck>,
    /// When an endpoint gets no requests because those it had failed.
    pub outlier_detection: Option<OutlierDetection>,
    /// What its transport socket says; none means plain text.
    pub tls: Option<UpstreamTls>,
    /// Endpoints that are secured otherwise.
    pub socket_matches: Vec<SocketMatch>,
    /// Of connections to its endpoints.
    pub connection: ConnectionOptions,
    /// `circuit_breakers`.
    pub circuit_breakers: CircuitBreakers,
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            name: String::new(),
            connect_timeout: Duration::from_secs(5),
            discovery: Discovery::Static,
            lb_policy: LbPolicy::RoundRobin,
            balancing: Balancing::default(),
            load_assignment: ClusterLoadAssignment::default(),
            eds: None,
            protocol: UpstreamProtocol::Http1,
            health_check: None,
            outlier_detection: None,
            tls: None,
            socket_matches: Vec::new(),
            connection: ConnectionOptions::default(),
            circuit_breakers: CircuitBreakers::default(),
        }
    }
}

impl Cluster {
    /// The name under which its endpoints come: its own, unless `eds` has another.
    #[must_use]
    pub fn eds_service_name(&self) -> &str {
        match &self.eds {
            Some(eds) if !eds.service_name.is_empty() => &eds.service_name,
            _ => &self.name,
        }
    }
}

/// `explicit_http_config`, or `use_downstream_protocol_config`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UpstreamProtocol {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2 by prior knowledge.
    Http2,
    /// What the client of the request speaks; HTTP/1.1 where there is none.
    Downstream,
}

impl UpstreamProtocol {
    /// What a request is sent by, whose client speaks HTTP/2 or not.
    #[must_use]
    pub fn for_client(self, speaks_http2: bool) -> Self {
        match self {
            Self::Downstream if speaks_http2 => Self::Http2,
            Self::Downstream => Self::Http1,
            explicit => explicit,
        }
    }
}

impl TryFrom<wire::Cluster> for Cluster {
    type Error = ConfigErrors;

    fn try_from(wire: wire::Cluster) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let discovery = discovery::read(&mut problems, of_discovery(&wire));
        let given = Given {
            policy: wire.lb_policy(),
            common: wire.common_lb_config,
            of_policy: wire.lb_config,
            typed: wire.load_balancing_policy,
        };
        let (lb_policy, balancing) = lb_policy::read(&mut problems, given);
        let name = problems.not_empty("name", wire.name);
        let connect_timeout = connect_timeout(&mut problems, wire.connect_timeout);
        let is_checked = !wire.health_checks.is_empty();
        check_original(&mut problems, discovery.as_ref(), lb_policy, is_checked);
        let (eds, load_assignment) = endpoints(
            &mut problems,
            discovery.as_ref(),
            wire.eds_cluster_config,
            wire.load_assignment
                .or_else(|| nobody(discovery.as_ref(), &name)),
        );
        if let (Some(discovery), Some(assignment)) = (&discovery, &load_assignment) {
            check_addresses(&mut problems, discovery, assignment);
        }
        check_filters(&mut problems, &wire.filters);
        let place = "typed_extension_protocol_options";
        let typed = protocol(&wire.typed_extension_protocol_options);
        let typed = problems.take(place, typed).unwrap_or_default();
        let old = wire.http2_protocol_options.and_then(|options| {
            let place = "http2_protocol_options";
            problems.take(place, http2_options(&options))
        });
        let protocol = typed.protocol.or(old).unwrap_or_default();
        let given = connection::Given {
            options: wire.upstream_connection_options,
            bind: wire.upstream_bind_config,
            max_requests: typed.max_requests.or(wire.max_requests_per_connection),
            idle_timeout: typed.idle_timeout,
        };
        let connection = connection::read(&mut problems, given);
        let health_check = health_check(&mut problems, wire.health_checks, protocol);
        let outlier_detection = wire.outlier_detection.and_then(|detection| {
            problems.take("outlier_detection", OutlierDetection::try_from(detection))
        });
        let tls = wire
            .transport_socket
            .and_then(|socket| problems.take("transport_socket", tls::upstream(socket)))
            .flatten();
        let place = "transport_socket_matches";
        let socket_matches = problems.take_all(place, wire.transport_socket_matches);
        let breakers = wire.circuit_breakers.unwrap_or_default();
        let circuit_breakers =
            problems.take("circuit_breakers", CircuitBreakers::try_from(breakers));
        problems.finish(load_assignment.map(|load_assignment| Self {
            name,
            connect_timeout,
            discovery: discovery.unwrap_or_default(),
            lb_policy,
            balancing,
            load_assignment,
            eds,
            protocol,
            outlier_detection,
            health_check,
            tls,
            socket_matches,
            connection,
            circuit_breakers: circuit_breakers.unwrap_or_default(),
        }))
    }
}

/// Those that have no effect here were left out.
fn check_filters(problems: &mut ConfigErrors, filters: &[wire::Filter]) {
    for (index, filter) in filters.iter().enumerate() {
        let message = format!("not supported yet: '{}', in a cluster", filter.name);
        problems.add(format!("filters[{index}]"), message);
    }
}

fn of_discovery(wire: &wire::Cluster) -> discovery::Given {
    discovery::Given {
        family: wire.dns_lookup_family(),
        of: wire.cluster_discovery_type.clone(),
        refresh_rate: wire.dns_refresh_rate,
        failure_refresh_rate: wire.dns_failure_refresh_rate,
        respect_ttl: wire.respect_dns_ttl,
        original_dst: match &wire.lb_config {
            Some(LbConfig::OriginalDstLbConfig(config)) => Some(config.clone()),
            _ => None,
        },
        cleanup_interval: wire.cleanup_interval,
    }
}

/// As in Envoy the type goes with its policy.
fn check_original(
    problems: &mut ConfigErrors,
    discovery: Option<&Discovery>,
    policy: LbPolicy,
    is_checked: bool,
) {
    let is_original = matches!(discovery, Some(Discovery::OriginalDst(_)));
    if is_original && is_checked {
        let message = "not supported yet: in a cluster of type ORIGINAL_DST";
        problems.add("health_checks", message);
    }
    let is_provided = policy == LbPolicy::ClusterProvided;
    if is_original && !is_provided {
        let message = format!(
            "LB policy {} is not valid for the cluster type ORIGINAL_DST, only CLUSTER_PROVIDED is",
            policy.as_str()
        );
        problems.add("lb_policy", message);
    } else if is_provided && !is_original && discovery.is_some() {
        problems.add(
            "lb_policy",
            "CLUSTER_PROVIDED: only in a cluster of type ORIGINAL_DST",
        );
    }
}

fn health_check(
    problems: &mut ConfigErrors,
    given: Vec<core::HealthCheck>,
    protocol: UpstreamProtocol,
) -> Option<HealthCheck> {
    let checks: Vec<HealthCheck> = problems.take_all("health_checks", given);
    if checks.len() > 1 {
        problems.add("health_checks", "at most one is supported");
    }
    let asks_by_grpc = |check: &HealthCheck| matches!(check.checker, Checker::Grpc { .. });
    if protocol != UpstreamProtocol::Http2 && checks.iter().any(asks_by_grpc) {
        // As in Envoy.
        problems.add(
            "health_checks[0].grpc_health_check",
            "only in a cluster that speaks HTTP/2",
        );
    }
    checks.into_iter().next()
}

/// Where its endpoints come from, or which they are.
/// As in Envoy, a cluster whose endpoints are written may be without any.
fn nobody(discovery: Option<&Discovery>, name: &str) -> Option<endpoint::ClusterLoadAssignment> {
    (discovery == Some(&Discovery::Static)).then(|| endpoint::ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        ..Default::default()
    })
}

fn endpoints(
    problems: &mut ConfigErrors,
    discovery: Option<&Discovery>,
    config: Option<wire::cluster::EdsClusterConfig>,
    assignment: Option<endpoint::ClusterLoadAssignment>,
) -> (Option<Eds>, Option<ClusterLoadAssignment>) {
    if discovery == Some(&Discovery::Eds) {
        if assignment.is_some() {
            problems.add(
                "load_assignment",
                "must not be set in a cluster of type EDS",
            );
        }
        let eds = problems.required("eds_cluster_config", config);
        return (eds, Some(ClusterLoadAssignment::default()));
    }
    if config.is_some() {
        problems.add("eds_cluster_config", "only in a cluster of type EDS");
    }
    if matches!(discovery, Some(Discovery::OriginalDst(_))) {
        if assignment.is_some() {
            problems.add(
                "load_assignment",
                "ORIGINAL_DST clusters must have no load assignment configured",
            );
        }
        return (None, Some(ClusterLoadAssignment::default()));
    }
    if assignment.is_none() && discovery.is_some() {
        problems.add("load_assignment", "required");
    }
    let assignment =
        assignment.and_then(|assignment| problems.take("load_assignment", assignment.try_into()));
    (None, assignment)
}

fn connect_timeout(problems: &mut ConfigErrors, given: Option<prost_types::Duration>) -> Duration {
    let given = given.and_then(|timeout| problems.take("connect_timeout", duration(timeout)));
    let timeout = given.unwrap_or_else(|| Cluster::default().connect_timeout);
    if timeout.is_zero() {
        problems.add("connect_timeout", "must be greater than 0");
    }
    timeout
}

/// Host names need a cluster type that resolves names.
fn check_addresses(
    problems: &mut ConfigErrors,
    discovery: &Discovery,
    assignment: &ClusterLoadAssignment,
) {
    let is_logical = matches!(discovery, Discovery::Dns(dns) if dns.logical);
    if is_logical && assignment.endpoints.len() != 1 {
        problems.add(
            "load_assignment",
            "a LOGICAL_DNS cluster has exactly one endpoint",
        );
    }
    let named = assignment
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.address.is_name());
    for endpoint in named.filter(|_| *discovery == Discovery::Static) {
        let host = &endpoint.address.host;
        let message =
            format!("malformed IP address: {host}; a host name needs the cluster type STRICT_DNS");
        problems.add("load_assignment", message);
    }
}

/// What HttpProtocolOptions say.
#[derive(Default)]
struct OfHttp {
    protocol: Option<UpstreamProtocol>,
    max_requests: Option<u32>,
    idle_timeout: Option<Duration>,
}

/// The one extension whose options we know: how HTTP is spoken, and how long on one connection.
fn protocol(options: &BTreeMap<String, Any>) -> Result<OfHttp, ConfigErrors> {
    let mut problems = ConfigErrors::default();
    let mut all = OfHttp::default();
    for (name, any) in options {
        let place = format!("[\"{name}\"]");
        match problems.take(&place, unpack::<http::HttpProtocolOptions>(any)) {
            None => {}
            Some(None) => problems.add(place, format!("not supported yet: {}", any.type_url)),
            Some(Some(mut options)) => {
                if let Some(common) = options.common_http_protocol_options.take() {
                    let place = format!("{place}.common_http_protocol_options");
                    check_common(&mut problems, &place, &common);
                    all.max_requests = common.max_requests_per_connection;
                    let place = format!("{place}.idle_timeout");
                    let timeout = common.idle_timeout;
                    all.idle_timeout =
                        timeout.and_then(|timeout| problems.take(&place, duration(timeout)));
                }
                let spoken = spoken(options);
                all.protocol = problems.take(&place, spoken).or(all.protocol);
            }
        }
    }
    problems.finish(Some(all))
}

fn check_common(problems: &mut ConfigErrors, place: &str, common: &core::HttpProtocolOptions) {
    let underscores = common.headers_with_underscores_action != 0;
    for (name, is_set) in [
        (
            "max_connection_duration",
            common.max_connection_duration.is_some(),
        ),
        ("max_stream_duration", common.max_stream_duration.is_some()),
        ("headers_with_underscores_action", underscores),
    ] {
        if is_set {
            problems.add(place, format!("not supported yet: {name}"));
        }
    }
}

fn spoken(options: http::HttpProtocolOptions) -> Result<UpstreamProtocol, ConfigErrors> {
    use http::http_protocol_options::UpstreamProtocolOptions::{
        ExplicitHttpConfig, UseDownstreamProtocolConfig,
    };
    match options.upstream_protocol_options {
        Some(ExplicitHttpConfig(config)) => explicit(config),
        Some(UseDownstreamProtocolConfig(config)) => {
            let mut problems = ConfigErrors::default();
            let place = "use_downstream_protocol_config.http2_protocol_options";
            let http2 = config.http2_protocol_options;
            http2.and_then(|options| problems.take(place, http2_options(&options)));
            problems.finish(Some(UpstreamProtocol::Downstream))
        }
        None => Err(ConfigErrors::one(
            "",
            "required: explicit_http_config or use_downstream_protocol_config",
        )),
    }
}

fn explicit(
    config: http::http_protocol_options::ExplicitHttpConfig,
) -> Result<UpstreamProtocol, ConfigErrors> {
    use http::http_protocol_options::explicit_http_config::ProtocolConfig;
    match config.protocol_config {
        Some(ProtocolConfig::HttpProtocolOptions(_)) => Ok(UpstreamProtocol::Http1),
        Some(ProtocolConfig::Http2ProtocolOptions(options)) => {
            let mut problems = ConfigErrors::default();
            let place = "explicit_http_config.http2_protocol_options";
            let protocol = problems.take(place, http2_options(&options));
            problems.finish(protocol)
        }
        None => Err(ConfigErrors::one(
            "explicit_http_config",
            "required: http_protocol_options or http2_protocol_options",
        )),
    }
}

fn http2_options(options: &core::Http2ProtocolOptions) -> Result<UpstreamProtocol, ConfigErrors> {
    if options.max_concurrent_streams.is_some() {
        let message = "not supported yet: max_concurrent_streams";
        return Err(ConfigErrors::one("", message));
    }
    Ok(UpstreamProtocol::Http2)
}

impl From<&Cluster> for wire::Cluster {
    fn from(plain: &Cluster) -> Self {
        let addresses = plain
            .load_assignment
            .endpoints
            .iter()
            .map(|endpoint| &endpoint.address);
        let named = addresses.into_iter().any(Address::is_name);
        let discovery = discovery::show(&plain.discovery, named);
        let connection = connection::show(&plain.connection);
        let options = http_shown(plain.protocol, connection.idle_timeout);
        let shown = lb_shown::show(plain.lb_policy, &plain.balancing);
        let of_policy = discovery.original_dst.map(LbConfig::OriginalDstLbConfig);
        let is_written = !matches!(plain.discovery, Discovery::Eds | Discovery::OriginalDst(_));
        Self {
            name: plain.name.clone(),
            cluster_discovery_type: discovery.of,
            dns_refresh_rate: discovery.refresh_rate,
            dns_failure_refresh_rate: discovery.failure_refresh_rate,
            respect_dns_ttl: discovery.respect_ttl,
            dns_lookup_family: discovery.family.into(),
            connect_timeout: Some(to_duration(plain.connect_timeout)),
            lb_policy: shown.policy.into(),
            common_lb_config: shown.common,
            lb_config: of_policy.or(shown.of_policy),
            cleanup_interval: discovery.cleanup_interval,
            load_balancing_policy: shown.typed,
            outlier_detection: plain.outlier_detection.as_ref().map(Into::into),
            health_checks: plain.health_check.iter().map(Into::into).collect(),
            eds_cluster_config: plain.eds.as_ref().map(Into::into),
            load_assignment: is_written.then(|| (&plain.load_assignment).into()),
            circuit_breakers: Some((&plain.circuit_breakers).into()),
            transport_socket: plain.tls.as_ref().map(Into::into),
            transport_socket_matches: plain.socket_matches.iter().map(Into::into).collect(),
            filters: Vec::new(),
            typed_extension_protocol_options: options,
            http2_protocol_options: None,
            max_requests_per_connection: connection.max_requests,
            upstream_bind_config: connection.bind,
            upstream_connection_options: connection.options,
        }
    }
}

/// None where all is as it is without.
fn http_shown(protocol: UpstreamProtocol, idle_timeout: Option<Duration>) -> BTreeMap<String, Any> {
    use http::http_protocol_options::{
        ExplicitHttpConfig, UpstreamProtocolOptions, UseDownstreamHttpConfig,
        explicit_http_config::ProtocolConfig,
    };
    if protocol == UpstreamProtocol::Http1 && idle_timeout.is_none() {
        return BTreeMap::new();
    }
    let explicit = |config| {
        UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(config),
        })
    };
    let spoken = match protocol {
        UpstreamProtocol::Http1 => explicit(ProtocolConfig::HttpProtocolOptions(
            core::Http1ProtocolOptions::default(),
        )),
        UpstreamProtocol::Http2 => explicit(ProtocolConfig::Http2ProtocolOptions(
            core::Http2ProtocolOptions::default(),
        )),
        UpstreamProtocol::Downstream => {
            UpstreamProtocolOptions::UseDownstreamProtocolConfig(UseDownstreamHttpConfig {
                http_protocol_options: None,
                http2_protocol_options: Some(core::Http2ProtocolOptions::default()),
            })
        }
    };
    let common = idle_timeout.map(|idle_timeout| core::HttpProtocolOptions {
        idle_timeout: Some(to_duration(idle_timeout)),
        ..Default::default()
    });
    let options = http::HttpProtocolOptions {
        common_http_protocol_options: common,
        upstream_protocol_options: Some(spoken),
    };
    [(http::HttpProtocolOptions::full_name(), pack(&options))].into()
}
