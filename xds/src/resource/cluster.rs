//! `envoy.config.cluster.v3.Cluster`.

use super::{
    endpoint::{Address, ClusterLoadAssignment},
    health_check::HealthCheck,
    outlier_detection::OutlierDetection,
    tls::{self, UpstreamTls},
};
use crate::{
    problems::ConfigErrors,
    protobuf::{duration, pack, to_duration, unpack},
    wire::envoy::{
        config::{cluster::v3 as wire, core::v3 as core},
        extensions::upstreams::http::v3 as http,
        r#type::v3::Percent,
    },
};
use prost::Name;
use prost_types::Any;
use std::{collections::BTreeMap, net::IpAddr, time::Duration};
use wire::{
    circuit_breakers::Thresholds, circuit_breakers::thresholds::RetryBudget,
    cluster::ClusterDiscoveryType, cluster::DiscoveryType, cluster::LbConfig,
};

/// A group of endpoints that serve the same thing.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// Unique name.
    pub name: String,
    /// Default 5 s.
    pub connect_timeout: Duration,
    /// How one endpoint is chosen.
    pub lb_policy: LbPolicy,
    /// What bends that policy.
    pub balancing: Balancing,
    /// `load_assignment`; its endpoints are the cluster's (type STATIC).
    pub load_assignment: ClusterLoadAssignment,
    /// How we speak to its endpoints (`typed_extension_protocol_options`, HttpProtocolOptions).
    pub protocol: UpstreamProtocol,
    /// How its endpoints are asked for their health, if they are.
    pub health_check: Option<HealthCheck>,
    /// When an endpoint gets no requests because those it had failed.
    pub outlier_detection: Option<OutlierDetection>,
    /// What its transport socket says; none means plain text.
    pub tls: Option<UpstreamTls>,
    /// `circuit_breakers.thresholds` of default priority.
    pub circuit_breakers: CircuitBreakers,
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            name: String::new(),
            connect_timeout: Duration::from_secs(5),
            lb_policy: LbPolicy::RoundRobin,
            balancing: Balancing::default(),
            load_assignment: ClusterLoadAssignment::default(),
            protocol: UpstreamProtocol::Http1,
            health_check: None,
            outlier_detection: None,
            tls: None,
            circuit_breakers: CircuitBreakers::default(),
        }
    }
}

/// `lb_policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LbPolicy {
    /// In turn.
    #[default]
    RoundRobin,
    /// The least loaded of two random ones.
    LeastRequest,
    /// Any.
    Random,
}

impl LbPolicy {
    /// The enum's name in Envoy.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RoundRobin => "ROUND_ROBIN",
            Self::LeastRequest => "LEAST_REQUEST",
            Self::Random => "RANDOM",
        }
    }
}

/// `common_lb_config` and `least_request_lb_config`.
#[derive(Debug, Clone, PartialEq)]
pub struct Balancing {
    /// `healthy_panic_threshold`, in percent: with less than this available, health is ignored. 0 is never.
    pub healthy_panic_threshold: f64,
    /// `locality_weighted_lb_config` is there.
    pub locality_weighted: bool,
    /// `least_request_lb_config.choice_count`.
    pub choice_count: u32,
    /// `least_request_lb_config.active_request_bias`.
    pub active_request_bias: f64,
}

impl Default for Balancing {
    fn default() -> Self {
        Self {
            healthy_panic_threshold: 50.0,
            locality_weighted: false,
            choice_count: 2,
            active_request_bias: 1.0,
        }
    }
}

/// `explicit_http_config`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UpstreamProtocol {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2 by prior knowledge.
    Http2,
}

/// Limits of one cluster; defaults are ours where Envoy's (1024) would cut streams.
#[derive(Debug, Clone, PartialEq)]
pub struct CircuitBreakers {
    /// Open connections per worker.
    pub max_connections: u32,
    /// Requests in flight.
    pub max_requests: u32,
    /// Share of active requests that may be retries, in percent (`retry_budget.budget_percent`).
    pub retry_budget_percent: f64,
    /// Retries always allowed (`retry_budget.min_retry_concurrency`).
    pub min_retry_concurrency: u32,
}

impl Default for CircuitBreakers {
    fn default() -> Self {
        Self {
            max_connections: 65_536,
            max_requests: 65_536,
            retry_budget_percent: 20.0,
            min_retry_concurrency: 3,
        }
    }
}

impl TryFrom<wire::Cluster> for Cluster {
    type Error = ConfigErrors;

    fn try_from(wire: wire::Cluster) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let defaults = Self::default();
        let lb_policy = match wire.lb_policy() {
            wire::cluster::LbPolicy::RoundRobin => LbPolicy::RoundRobin,
            wire::cluster::LbPolicy::LeastRequest => LbPolicy::LeastRequest,
            wire::cluster::LbPolicy::Random => LbPolicy::Random,
            other => {
                problems.add(
                    "lb_policy",
                    format!("not supported yet: {}", other.as_str_name()),
                );
                LbPolicy::default()
            }
        };
        let name = problems.not_empty("name", wire.name);
        let connect_timeout = wire
            .connect_timeout
            .map(|timeout| problems.take("connect_timeout", duration(timeout)));
        let connect_timeout = connect_timeout
            .flatten()
            .unwrap_or(defaults.connect_timeout);
        if connect_timeout.is_zero() {
            problems.add("connect_timeout", "must be greater than 0");
        }
        let discovery = discovery(&mut problems, wire.cluster_discovery_type);
        let assignment = wire.load_assignment;
        if assignment.is_none() && discovery.is_some() {
            problems.add("load_assignment", "required");
        }
        let load_assignment: Option<ClusterLoadAssignment> = assignment
            .and_then(|assignment| problems.take("load_assignment", assignment.try_into()));
        if let (Some(discovery), Some(assignment)) = (discovery, &load_assignment) {
            check_addresses(&mut problems, discovery, assignment);
        }
        let protocol = problems.take(
            "typed_extension_protocol_options",
            protocol(&wire.typed_extension_protocol_options),
        );
        let health_checks: Vec<HealthCheck> =
            problems.take_all("health_checks", wire.health_checks);
        if health_checks.len() > 1 {
            problems.add("health_checks", "at most one is supported");
        }
        let outlier_detection = wire.outlier_detection.and_then(|detection| {
            problems.take("outlier_detection", OutlierDetection::try_from(detection))
        });
        let balancing = balancing(&mut problems, wire.common_lb_config, wire.lb_config);
        let tls = wire
            .transport_socket
            .and_then(|socket| problems.take("transport_socket", tls::upstream(socket)));
        let breakers = wire.circuit_breakers.unwrap_or_default();
        let circuit_breakers =
            problems.take("circuit_breakers", CircuitBreakers::try_from(breakers));
        problems.finish(load_assignment.map(|load_assignment| Self {
            name,
            connect_timeout,
            lb_policy,
            balancing,
            load_assignment,
            protocol: protocol.unwrap_or_default(),
            outlier_detection,
            health_check: health_checks.into_iter().next(),
            tls,
            circuit_breakers: circuit_breakers.unwrap_or_default(),
        }))
    }
}

fn balancing(
    problems: &mut ConfigErrors,
    common: Option<wire::cluster::CommonLbConfig>,
    of_policy: Option<LbConfig>,
) -> Balancing {
    let mut balancing = Balancing::default();
    if let Some(common) = common {
        if let Some(percent) = common.healthy_panic_threshold {
            balancing.healthy_panic_threshold = percent.value;
            if !(0.0..=100.0).contains(&percent.value) {
                problems.add(
                    "common_lb_config.healthy_panic_threshold.value",
                    format!("must be between 0 and 100, is {}", percent.value),
                );
            }
        }
        balancing.locality_weighted = common.locality_config_specifier.is_some();
    }
    if let Some(LbConfig::LeastRequestLbConfig(config)) = of_policy {
        balancing.choice_count = config.choice_count.unwrap_or(balancing.choice_count);
        if balancing.choice_count < 2 {
            problems.add(
                "least_request_lb_config.choice_count",
                format!("must be at least 2, is {}", balancing.choice_count),
            );
        }
        if let Some(bias) = config.active_request_bias {
            balancing.active_request_bias = bias.default_value;
            if !bias.default_value.is_finite() || bias.default_value < 0.0 {
                problems.add(
                    "least_request_lb_config.active_request_bias.default_value",
                    format!("must be at least 0, is {}", bias.default_value),
                );
            }
        }
    }
    balancing
}

/// Where endpoints come from, if that is from the configuration itself.
fn discovery(
    problems: &mut ConfigErrors,
    given: Option<ClusterDiscoveryType>,
) -> Option<DiscoveryType> {
    let number = given.map_or(0, |ClusterDiscoveryType::Type(number)| number);
    match DiscoveryType::try_from(number) {
        Ok(
            known @ (DiscoveryType::Static | DiscoveryType::StrictDns | DiscoveryType::LogicalDns),
        ) => Some(known),
        Ok(other) => {
            problems.add(
                "type",
                format!("not supported yet: {}", other.as_str_name()),
            );
            None
        }
        Err(_) => {
            problems.add("type", format!("unknown value {number}"));
            None
        }
    }
}

/// Host names need a cluster type that resolves names.
fn check_addresses(
    problems: &mut ConfigErrors,
    discovery: DiscoveryType,
    assignment: &ClusterLoadAssignment,
) {
    if discovery == DiscoveryType::LogicalDns && assignment.endpoints.len() != 1 {
        problems.add(
            "load_assignment",
            "a LOGICAL_DNS cluster has exactly one endpoint",
        );
    }
    let named = assignment
        .endpoints
        .iter()
        .filter(|endpoint| is_name(&endpoint.address));
    for endpoint in named.filter(|_| discovery == DiscoveryType::Static) {
        let host = &endpoint.address.host;
        let message =
            format!("malformed IP address: {host}; a host name needs the cluster type STRICT_DNS");
        problems.add("load_assignment", message);
    }
}

/// Whether it has to be resolved.
fn is_name(address: &Address) -> bool {
    !address.is_pipe() && address.host.parse::<IpAddr>().is_err()
}

/// The one extension whose options we know: how HTTP is spoken.
fn protocol(options: &BTreeMap<String, Any>) -> Result<UpstreamProtocol, ConfigErrors> {
    let mut problems = ConfigErrors::default();
    let mut protocol = UpstreamProtocol::default();
    for (name, any) in options {
        let place = format!("[\"{name}\"]");
        match problems.take(&place, unpack::<http::HttpProtocolOptions>(any)) {
            None => {}
            Some(None) => problems.add(place, format!("not supported yet: {}", any.type_url)),
            Some(Some(options)) => {
                if let Some(explicit) = problems.take(&place, explicit(options)) {
                    protocol = explicit;
                }
            }
        }
    }
    problems.finish(Some(protocol))
}

fn explicit(options: http::HttpProtocolOptions) -> Result<UpstreamProtocol, ConfigErrors> {
    use http::http_protocol_options::{
        UpstreamProtocolOptions::ExplicitHttpConfig, explicit_http_config::ProtocolConfig,
    };
    let Some(ExplicitHttpConfig(config)) = options.upstream_protocol_options else {
        return Err(ConfigErrors::one("", "required: explicit_http_config"));
    };
    match config.protocol_config {
        Some(ProtocolConfig::HttpProtocolOptions(_)) => Ok(UpstreamProtocol::Http1),
        Some(ProtocolConfig::Http2ProtocolOptions(options))
            if options.max_concurrent_streams.is_some() =>
        {
            let place = "explicit_http_config.http2_protocol_options";
            Err(ConfigErrors::one(
                place,
                "not supported yet: max_concurrent_streams",
            ))
        }
        Some(ProtocolConfig::Http2ProtocolOptions(_)) => Ok(UpstreamProtocol::Http2),
        None => Err(ConfigErrors::one(
            "explicit_http_config",
            "required: http_protocol_options or http2_protocol_options",
        )),
    }
}

impl TryFrom<wire::CircuitBreakers> for CircuitBreakers {
    type Error = ConfigErrors;

    fn try_from(wire: wire::CircuitBreakers) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let mut breakers = Self::default();
        for (index, thresholds) in wire.thresholds.into_iter().enumerate() {
            let place = format!("thresholds[{index}]");
            if thresholds.priority() != core::RoutingPriority::Default {
                problems.add(format!("{place}.priority"), "not supported yet: HIGH");
                continue;
            }
            if index > 0 {
                problems.add(place, "only one entry per priority");
                continue;
            }
            breakers.max_connections = thresholds
                .max_connections
                .unwrap_or(breakers.max_connections);
            breakers.max_requests = thresholds.max_requests.unwrap_or(breakers.max_requests);
            let budget = thresholds.retry_budget.unwrap_or_default();
            breakers.min_retry_concurrency = budget
                .min_retry_concurrency
                .unwrap_or(breakers.min_retry_concurrency);
            if let Some(percent) = budget.budget_percent {
                breakers.retry_budget_percent = percent.value;
                if !(0.0..=100.0).contains(&percent.value) {
                    let place = format!("{place}.retry_budget.budget_percent.value");
                    problems.add(
                        place,
                        format!("must be between 0 and 100, is {}", percent.value),
                    );
                }
            }
        }
        problems.finish(Some(breakers))
    }
}

impl From<&Cluster> for wire::Cluster {
    fn from(plain: &Cluster) -> Self {
        let addresses = plain
            .load_assignment
            .endpoints
            .iter()
            .map(|endpoint| &endpoint.address);
        let named = addresses.into_iter().any(is_name);
        let discovery = if named {
            DiscoveryType::StrictDns
        } else {
            DiscoveryType::Static
        };
        let lb_policy = match plain.lb_policy {
            LbPolicy::RoundRobin => wire::cluster::LbPolicy::RoundRobin,
            LbPolicy::LeastRequest => wire::cluster::LbPolicy::LeastRequest,
            LbPolicy::Random => wire::cluster::LbPolicy::Random,
        };
        let options = match plain.protocol {
            UpstreamProtocol::Http1 => BTreeMap::new(),
            UpstreamProtocol::Http2 => {
                [(http::HttpProtocolOptions::full_name(), pack(&http2()))].into()
            }
        };
        let (common_lb_config, lb_config) = show(&plain.balancing);
        Self {
            name: plain.name.clone(),
            cluster_discovery_type: Some(ClusterDiscoveryType::Type(discovery.into())),
            connect_timeout: Some(to_duration(plain.connect_timeout)),
            lb_policy: lb_policy.into(),
            common_lb_config,
            lb_config,
            outlier_detection: plain.outlier_detection.as_ref().map(Into::into),
            health_checks: plain.health_check.iter().map(Into::into).collect(),
            load_assignment: Some((&plain.load_assignment).into()),
            circuit_breakers: Some((&plain.circuit_breakers).into()),
            transport_socket: plain.tls.as_ref().map(Into::into),
            typed_extension_protocol_options: options,
        }
    }
}

/// What is not the default.
fn show(plain: &Balancing) -> (Option<wire::cluster::CommonLbConfig>, Option<LbConfig>) {
    use wire::cluster::{
        CommonLbConfig, LeastRequestLbConfig,
        common_lb_config::{LocalityConfigSpecifier, LocalityWeightedLbConfig},
    };
    let defaults = Balancing::default();
    let common = CommonLbConfig {
        healthy_panic_threshold: Some(Percent {
            value: plain.healthy_panic_threshold,
        }),
        locality_config_specifier: plain.locality_weighted.then_some(
            LocalityConfigSpecifier::LocalityWeightedLbConfig(LocalityWeightedLbConfig {}),
        ),
    };
    let is_common = plain.locality_weighted
        || plain.healthy_panic_threshold != defaults.healthy_panic_threshold;
    let least = LeastRequestLbConfig {
        choice_count: Some(plain.choice_count),
        active_request_bias: Some(core::RuntimeDouble {
            default_value: plain.active_request_bias,
            runtime_key: String::new(),
        }),
    };
    let is_least = (plain.choice_count, plain.active_request_bias)
        != (defaults.choice_count, defaults.active_request_bias);
    (
        is_common.then_some(common),
        is_least.then_some(LbConfig::LeastRequestLbConfig(least)),
    )
}

fn http2() -> http::HttpProtocolOptions {
    use http::http_protocol_options::{
        ExplicitHttpConfig, UpstreamProtocolOptions, explicit_http_config,
    };
    let options = explicit_http_config::ProtocolConfig::Http2ProtocolOptions(
        core::Http2ProtocolOptions::default(),
    );
    let config = ExplicitHttpConfig {
        protocol_config: Some(options),
    };
    http::HttpProtocolOptions {
        upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(config)),
    }
}

impl From<&CircuitBreakers> for wire::CircuitBreakers {
    fn from(plain: &CircuitBreakers) -> Self {
        let thresholds = Thresholds {
            priority: core::RoutingPriority::Default.into(),
            max_connections: Some(plain.max_connections),
            max_requests: Some(plain.max_requests),
            retry_budget: Some(RetryBudget {
                budget_percent: Some(Percent {
                    value: plain.retry_budget_percent,
                }),
                min_retry_concurrency: Some(plain.min_retry_concurrency),
            }),
        };
        Self {
            thresholds: vec![thresholds],
        }
    }
}
