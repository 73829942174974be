//! `envoy.config.cluster.v3.Cluster`.

use super::endpoint::ClusterLoadAssignment;
use std::time::Duration;

/// A group of endpoints that serve the same thing.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// Unique name.
    pub name: String,
    /// Default 5 s.
    pub connect_timeout: Duration,
    /// How one endpoint is chosen.
    pub lb_policy: LbPolicy,
    /// `load_assignment`; its endpoints are the cluster's (type STATIC).
    pub load_assignment: ClusterLoadAssignment,
    /// How we speak to its endpoints (`typed_extension_protocol_options`, HttpProtocolOptions).
    pub protocol: UpstreamProtocol,
    /// `circuit_breakers.thresholds` of default priority.
    pub circuit_breakers: CircuitBreakers,
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            name: String::new(),
            connect_timeout: Duration::from_secs(5),
            lb_policy: LbPolicy::RoundRobin,
            load_assignment: ClusterLoadAssignment::default(),
            protocol: UpstreamProtocol::Http1,
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
        Self { max_connections: 65_536, max_requests: 65_536, retry_budget_percent: 20.0, min_retry_concurrency: 3 }
    }
}
