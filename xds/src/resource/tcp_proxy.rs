//! `envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy`: bytes between a client and an endpoint of a cluster.

use super::listener::AccessLog;
use crate::{
    problems::ConfigErrors,
    protobuf::{duration, to_duration},
    wire::envoy::extensions::filters::network::tcp_proxy::v3 as wire,
};
use std::time::Duration;
use wire::tcp_proxy::{ClusterSpecifier, WeightedCluster, weighted_cluster::ClusterWeight};

/// `idle_timeout` unless given, as in Envoy.
pub const IDLE_TIMEOUT_DEFAULT: Duration = Duration::from_secs(3600);

/// The network filter.
#[derive(Debug, Clone, PartialEq)]
pub struct TcpProxy {
    /// Prefix (a label) of its metrics.
    pub stat_prefix: String,
    /// Names and weights, at least one of at least 1; one is drawn for each connection.
    pub clusters: Vec<(String, u32)>,
    /// Where connections are logged.
    pub access_log: Vec<AccessLog>,
    /// At least 1.
    pub max_connect_attempts: u32,
    /// No byte either way; zero is off.
    pub idle_timeout: Duration,
    /// Most that a connection may last.
    pub max_connection_duration: Option<Duration>,
}

impl TryFrom<wire::TcpProxy> for TcpProxy {
    type Error = ConfigErrors;

    fn try_from(wire: wire::TcpProxy) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let stat_prefix = problems.not_empty("stat_prefix", wire.stat_prefix);
        let clusters = clusters(&mut problems, wire.cluster_specifier);
        let max_connect_attempts = wire.max_connect_attempts.unwrap_or(1);
        if max_connect_attempts == 0 {
            problems.add("max_connect_attempts", "must be at least 1");
        }
        let idle_timeout = wire
            .idle_timeout
            .and_then(|given| problems.take("idle_timeout", duration(given)));
        let place = "max_downstream_connection_duration";
        let longest = wire
            .max_downstream_connection_duration
            .and_then(|given| problems.take(place, duration(given)));
        if longest.is_some_and(|longest| longest < Duration::from_millis(1)) {
            problems.add(place, "must be at least 0.001s");
        }
        let access_log = problems.take_all("access_log", wire.access_log);
        problems.finish(Some(Self {
            stat_prefix,
            clusters,
            access_log,
            max_connect_attempts,
            idle_timeout: idle_timeout.unwrap_or(IDLE_TIMEOUT_DEFAULT),
            max_connection_duration: longest,
        }))
    }
}

fn clusters(problems: &mut ConfigErrors, wire: Option<ClusterSpecifier>) -> Vec<(String, u32)> {
    match wire {
        None => {
            problems.add("", "required: cluster or weighted_clusters");
            Vec::new()
        }
        Some(ClusterSpecifier::Cluster(name)) => vec![(problems.not_empty("cluster", name), 1)],
        Some(ClusterSpecifier::WeightedClusters(weighted)) => {
            if weighted.clusters.is_empty() {
                problems.add("weighted_clusters.clusters", "must not be empty");
            }
            let each = weighted.clusters.into_iter().enumerate();
            each.map(|(index, cluster)| {
                let place = format!("weighted_clusters.clusters[{index}]");
                if cluster.weight == 0 {
                    problems.add(format!("{place}.weight"), "must be at least 1");
                }
                let name = problems.not_empty(&format!("{place}.name"), cluster.name);
                (name, cluster.weight)
            })
            .collect()
        }
    }
}

impl From<&TcpProxy> for wire::TcpProxy {
    fn from(plain: &TcpProxy) -> Self {
        let specifier = match plain.clusters.as_slice() {
            [(name, 1)] => ClusterSpecifier::Cluster(name.clone()),
            weighted => ClusterSpecifier::WeightedClusters(WeightedCluster {
                clusters: weighted
                    .iter()
                    .map(|(name, weight)| ClusterWeight {
                        name: name.clone(),
                        weight: *weight,
                    })
                    .collect(),
            }),
        };
        Self {
            stat_prefix: plain.stat_prefix.clone(),
            cluster_specifier: Some(specifier),
            access_log: plain.access_log.iter().map(Into::into).collect(),
            max_connect_attempts: Some(plain.max_connect_attempts),
            idle_timeout: Some(to_duration(plain.idle_timeout)),
            max_downstream_connection_duration: plain.max_connection_duration.map(to_duration),
        }
    }
}
