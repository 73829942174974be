//! Gauges of a cluster that are brought up to date now and then, and not by requests.

use crate::metrics::ClusterStats;
use outrigger_filters::{
    breakers::{Breaker, Breakers},
    endpoints::{ClusterView, EndpointStats, Host},
};
use outrigger_xds::{
    report::Health,
    resource::{cluster::UpstreamProtocol, route_action::Priority},
};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Endpoints by what health checks found.
pub(super) fn checked(view: &ClusterView) {
    let passed = || {
        let endpoints = view.endpoints.iter();
        endpoints.filter(|endpoint| {
            let told = endpoint.live.load().state.health;
            told != Health::Unhealthy && !endpoint.host.has(Host::FAILED_ACTIVE_HC)
        })
    };
    let degraded = passed().filter(|endpoint| endpoint.host.has(Host::DEGRADED_ACTIVE_HC));
    for (name, count) in [
        ("envoy_cluster_health_check_healthy", passed().count()),
        ("envoy_cluster_health_check_degraded", degraded.count()),
    ] {
        metrics::gauge!(name, "envoy_cluster_name" => view.name.to_string()).set(count as f64);
    }
}

/// Connections belong to endpoints, which clusters may share.
pub(super) fn connections(stats: &ClusterStats, view: &ClusterView) {
    let sum = |of: fn(&EndpointStats) -> &AtomicU64, protocol: Option<UpstreamProtocol>| -> u64 {
        view.endpoints
            .iter()
            .filter(|endpoint| protocol.is_none_or(|protocol| endpoint.protocol == protocol))
            .map(|endpoint| of(&endpoint.stats).load(Relaxed))
            .sum()
    };
    let opened = sum(|stats| &stats.connections, None);
    let open = sum(|stats| &stats.connections_active, None);
    stats.upstream_cx_total.absolute(opened);
    stats.upstream_cx_active.set(open as f64);
    stats
        .upstream_cx_destroy
        .absolute(opened.saturating_sub(open));
    for (protocol, counter) in [
        (UpstreamProtocol::Http1, &stats.upstream_cx_http1_total),
        (UpstreamProtocol::Http2, &stats.upstream_cx_http2_total),
    ] {
        counter.absolute(sum(|stats| &stats.connections, Some(protocol)));
    }
    stats
        .upstream_cx_connect_fail
        .absolute(sum(|stats| &stats.connect_fail, None));
    stats
        .upstream_cx_connect_timeout
        .absolute(sum(|stats| &stats.connect_timeout, None));
}

/// Names of what is open, and of what is left.
type Names = [(&'static str, &'static str); 4];

const DEFAULT: Names = [
    (
        "envoy_cluster_circuit_breakers_default_cx_open",
        "envoy_cluster_circuit_breakers_default_remaining_cx",
    ),
    (
        "envoy_cluster_circuit_breakers_default_rq_pending_open",
        "envoy_cluster_circuit_breakers_default_remaining_pending",
    ),
    (
        "envoy_cluster_circuit_breakers_default_rq_open",
        "envoy_cluster_circuit_breakers_default_remaining_rq",
    ),
    (
        "envoy_cluster_circuit_breakers_default_rq_retry_open",
        "envoy_cluster_circuit_breakers_default_remaining_retries",
    ),
];

const HIGH: Names = [
    (
        "envoy_cluster_circuit_breakers_high_cx_open",
        "envoy_cluster_circuit_breakers_high_remaining_cx",
    ),
    (
        "envoy_cluster_circuit_breakers_high_rq_pending_open",
        "envoy_cluster_circuit_breakers_high_remaining_pending",
    ),
    (
        "envoy_cluster_circuit_breakers_high_rq_open",
        "envoy_cluster_circuit_breakers_high_remaining_rq",
    ),
    (
        "envoy_cluster_circuit_breakers_high_rq_retry_open",
        "envoy_cluster_circuit_breakers_high_remaining_retries",
    ),
];

/// Which circuit breakers are open, and what is left if that is to be told.
pub(super) fn breakers(stats: &ClusterStats, breakers: &Breakers) {
    let waiting =
        [Priority::Default, Priority::High].map(|priority| breakers.of(priority).pending.used());
    stats
        .upstream_rq_pending_active
        .set(waiting.iter().sum::<u64>() as f64);
    for (priority, names) in [(Priority::Default, DEFAULT), (Priority::High, HIGH)] {
        of_priority(&breakers.cluster, names, breakers.of(priority));
    }
}

fn of_priority(cluster: &str, names: Names, breaker: &Breaker) {
    let used_and_max = [
        (breaker.connections.used(), breaker.connections.max()),
        (breaker.pending.used(), breaker.pending.max()),
        (breaker.requests.used(), breaker.requests.max()),
        (breaker.retries.used(), breaker.retries_max()),
    ];
    for ((open, remaining), (used, max)) in names.into_iter().zip(used_and_max) {
        metrics::gauge!(open, "envoy_cluster_name" => cluster.to_owned())
            .set(f64::from(u8::from(used >= max)));
        if breaker.tracks_remaining() {
            metrics::gauge!(remaining, "envoy_cluster_name" => cluster.to_owned())
                .set(max.saturating_sub(used) as f64);
        }
    }
}
