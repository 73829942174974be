//! Gauges of a cluster that are brought up to date now and then, and not by requests.

use crate::metrics::ClusterStats;
use outrigger_filters::{
    breakers::{Breaker, Breakers},
    endpoints::{ClusterView, Endpoint, Host},
};
use outrigger_xds::{report::Health, resource::route_action::Priority};
use std::sync::atomic::Ordering::Relaxed;

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

/// What became of connections to endpoints.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Connections {
    opened: u64,
    http1: u64,
    http2: u64,
    open: u64,
    pub(super) failed: u64,
    timed_out: u64,
}

impl Connections {
    /// Those of one endpoint more.
    pub(super) fn add(&mut self, endpoint: &Endpoint) {
        let stats = &endpoint.stats;
        let opened = stats.connections.load(Relaxed);
        self.opened += opened;
        let http2 = stats.connections_http2.load(Relaxed);
        self.http1 += opened.saturating_sub(http2);
        self.http2 += http2;
        self.open += stats.connections_active.load(Relaxed);
        self.failed += stats.connect_fail.load(Relaxed);
        self.timed_out += stats.connect_timeout.load(Relaxed);
    }
}

/// Connections belong to endpoints, which clusters may share; those of endpoints that are gone are `departed`.
pub(super) fn connections(stats: &ClusterStats, view: &ClusterView, departed: Connections) {
    let mut all = departed;
    for endpoint in &view.endpoints {
        all.add(endpoint);
    }
    stats.upstream_cx_active.set(all.open as f64);
    let destroyed = all.opened.saturating_sub(all.open);
    for (counter, total) in [
        (&stats.upstream_cx_total, all.opened),
        (&stats.upstream_cx_destroy, destroyed),
        (&stats.upstream_cx_http1_total, all.http1),
        (&stats.upstream_cx_http2_total, all.http2),
        (&stats.upstream_cx_connect_fail, all.failed),
        (&stats.upstream_cx_connect_timeout, all.timed_out),
    ] {
        counter.absolute(total);
    }
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
