//! Handles of the request path: made once per listener, connection manager and cluster, then only atomic adds.
//!
//! They are kept by name for the life of the process, so that a configuration push finds the same handles again and a
//! counter never goes back.

use super::install;
use ::metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError},
    time::Duration,
};

pub(super) type Known<T> = LazyLock<Mutex<HashMap<String, Arc<T>>>>;

pub(super) fn known<T>(all: &Known<T>, name: &str, make: impl FnOnce() -> T) -> Arc<T> {
    install();
    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(stats) = all.get(name) {
        return stats.clone();
    }
    let stats = Arc::new(make());
    all.insert(name.to_owned(), stats.clone());
    stats
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Statuses by class: index 0 is 1xx.
struct ByClass([Counter; 5]);

impl ByClass {
    fn new(make: impl Fn(&'static str) -> Counter) -> Self {
        Self(["1", "2", "3", "4", "5"].map(make))
    }

    fn count(&self, code: u16) {
        if let Some(counter) = usize::from(code / 100)
            .checked_sub(1)
            .and_then(|class| self.0.get(class))
        {
            counter.increment(1);
        }
    }
}

/// Connections of one listener: `envoy_listener_*`.
pub struct ListenerStats {
    /// Accepted.
    pub downstream_cx_total: Counter,
    /// Open.
    pub downstream_cx_active: Gauge,
    /// Closed.
    pub downstream_cx_destroy: Counter,
    /// Refused: too many.
    pub downstream_cx_overflow: Counter,
    /// That listener filters look at.
    pub downstream_pre_cx_active: Gauge,
    /// At which they looked for too long.
    pub downstream_pre_cx_timeout: Counter,
    /// Closed by a listener filter.
    pub downstream_listener_filter_error: Counter,
    /// Closed by the client while listener filters looked.
    pub downstream_listener_filter_remote_close: Counter,
    /// Closed because no filter chain is for them.
    pub no_filter_chain_match: Counter,
    /// Closed because their handshake took too long.
    pub downstream_cx_transport_socket_connect_timeout: Counter,
    /// TLS handshakes that went well.
    pub ssl_handshake: Counter,
    /// TLS handshakes that did not, other than for the peer's certificate.
    pub ssl_connection_error: Counter,
    /// TLS connections of clients without a certificate.
    pub ssl_no_certificate: Counter,
    /// TLS handshakes of clients without the certificate they need.
    pub ssl_fail_verify_no_cert: Counter,
    /// TLS handshakes of clients whose certificate is not believed.
    pub ssl_fail_verify_error: Counter,
    /// TLS handshakes of clients whose certificate has no name that is.
    pub ssl_fail_verify_san: Counter,
    /// TLS connections closed because the secrets of their context have not come.
    pub ssl_secrets_not_ready: Counter,
    downstream_cx_length_ms: Histogram,
}

impl ListenerStats {
    /// The handles of the listener at `address`, e.g. `127.0.0.1:8080`.
    #[must_use]
    pub fn new(address: &str) -> Arc<Self> {
        static ALL: Known<ListenerStats> = LazyLock::new(Mutex::default);
        // Envoy writes the address so, because its own stat names use colons for something else.
        let label = address.replace(':', "_");
        let counter =
            |name: &'static str| counter!(name, "envoy_listener_address" => label.clone());
        known(&ALL, address, || Self {
            downstream_cx_total: counter("envoy_listener_downstream_cx_total"),
            downstream_cx_active: gauge!("envoy_listener_downstream_cx_active", "envoy_listener_address" => label.clone()),
            downstream_cx_destroy: counter("envoy_listener_downstream_cx_destroy"),
            downstream_cx_overflow: counter("envoy_listener_downstream_cx_overflow"),
            downstream_pre_cx_active: gauge!("envoy_listener_downstream_pre_cx_active", "envoy_listener_address" => label.clone()),
            downstream_pre_cx_timeout: counter("envoy_listener_downstream_pre_cx_timeout"),
            downstream_listener_filter_error: counter(
                "envoy_listener_downstream_listener_filter_error",
            ),
            downstream_listener_filter_remote_close: counter(
                "envoy_listener_downstream_listener_filter_remote_close",
            ),
            no_filter_chain_match: counter("envoy_listener_no_filter_chain_match"),
            downstream_cx_transport_socket_connect_timeout: counter(
                "envoy_listener_downstream_cx_transport_socket_connect_timeout",
            ),
            ssl_handshake: counter("envoy_listener_ssl_handshake"),
            ssl_connection_error: counter("envoy_listener_ssl_connection_error"),
            ssl_no_certificate: counter("envoy_listener_ssl_no_certificate"),
            ssl_fail_verify_no_cert: counter("envoy_listener_ssl_fail_verify_no_cert"),
            ssl_fail_verify_error: counter("envoy_listener_ssl_fail_verify_error"),
            ssl_fail_verify_san: counter("envoy_listener_ssl_fail_verify_san"),
            ssl_secrets_not_ready: counter(
                "envoy_listener_server_ssl_socket_factory_downstream_context_secrets_not_ready",
            ),
            downstream_cx_length_ms: histogram!("envoy_listener_downstream_cx_length_ms", "envoy_listener_address" => label.clone()),
        })
    }

    /// A connection that was open for `age` is closed.
    pub fn closed(&self, age: Duration) {
        self.downstream_cx_active.decrement(1.0);
        self.downstream_cx_destroy.increment(1);
        self.downstream_cx_length_ms.record(millis(age));
    }
}

/// Coming and going of listeners: `envoy_listener_manager_*`.
pub struct ListenerManagerStats {
    /// Listeners that are new.
    pub listener_added: Counter,
    /// Listeners that are configured otherwise than before.
    pub listener_modified: Counter,
    /// Of these, without their connections noticing.
    pub listener_in_place_updated: Counter,
    /// Listeners that are gone.
    pub listener_removed: Counter,
    /// Listeners that could not be made to run.
    pub listener_create_failure: Counter,
    /// Listeners that serve.
    pub active: Gauge,
    /// Listeners that wait for what they need.
    pub warming: Gauge,
    /// Listeners that are gone or replaced, whose connections still run.
    pub draining: Gauge,
}

impl ListenerManagerStats {
    /// The handles.
    #[must_use]
    pub fn new() -> Self {
        install();
        Self {
            listener_added: counter!("envoy_listener_manager_listener_added"),
            listener_modified: counter!("envoy_listener_manager_listener_modified"),
            listener_in_place_updated: counter!("envoy_listener_manager_listener_in_place_updated"),
            listener_removed: counter!("envoy_listener_manager_listener_removed"),
            listener_create_failure: counter!("envoy_listener_manager_listener_create_failure"),
            active: gauge!("envoy_listener_manager_total_listeners_active"),
            warming: gauge!("envoy_listener_manager_total_listeners_warming"),
            draining: gauge!("envoy_listener_manager_total_listeners_draining"),
        }
    }
}

impl Default for ListenerManagerStats {
    fn default() -> Self {
        Self::new()
    }
}

/// Requests of one HTTP connection manager: `envoy_http_*`.
pub struct HttpStats {
    /// Connections accepted.
    pub downstream_cx_total: Counter,
    /// Connections open.
    pub downstream_cx_active: Gauge,
    /// Connections closed.
    pub downstream_cx_destroy: Counter,
    /// Connections closed because the client broke the protocol.
    pub downstream_cx_protocol_error: Counter,
    /// Connections closed by a drain.
    pub downstream_cx_drain_close: Counter,
    /// Connections that became something else than HTTP.
    pub downstream_cx_upgrades_total: Counter,
    /// Of these, open.
    pub downstream_cx_upgrades_active: Gauge,
    /// Connections ended for their age.
    pub downstream_cx_max_duration_reached: Counter,
    /// Connections ended because they had enough requests.
    pub downstream_cx_max_requests_reached: Counter,
    /// Connections closed for idleness.
    pub downstream_cx_idle_timeout: Counter,
    /// Requests begun.
    pub downstream_rq_total: Counter,
    /// Requests in flight.
    pub downstream_rq_active: Gauge,
    /// Of these, over HTTP/1.
    pub downstream_rq_http1_total: Counter,
    /// Of these, over HTTP/2.
    pub downstream_rq_http2_total: Counter,
    /// Reset by the client.
    pub downstream_rq_rx_reset: Counter,
    /// Nothing came from upstream for too long.
    pub downstream_rq_idle_timeout: Counter,
    /// Requests whose head did not come in time.
    pub downstream_rq_header_timeout: Counter,
    /// No route matched.
    pub no_route: Counter,
    /// The route's cluster does not exist.
    pub no_cluster: Counter,
    /// Answered by the route itself.
    pub rq_direct_response: Counter,
    /// Sent elsewhere by their route.
    pub rq_redirect: Counter,
    downstream_rq_completed: Counter,
    downstream_rq_xx: ByClass,
    downstream_rq_time: Histogram,
}

impl HttpStats {
    /// The handles of the connection managers with this `stat_prefix`.
    #[must_use]
    pub fn new(stat_prefix: &str) -> Arc<Self> {
        static ALL: Known<HttpStats> = LazyLock::new(Mutex::default);
        let label = || stat_prefix.to_owned();
        let counter =
            |name: &'static str| counter!(name, "envoy_http_conn_manager_prefix" => label());
        let gauge = |name: &'static str| gauge!(name, "envoy_http_conn_manager_prefix" => label());
        known(&ALL, stat_prefix, || Self {
            downstream_cx_total: counter("envoy_http_downstream_cx_total"),
            downstream_cx_active: gauge("envoy_http_downstream_cx_active"),
            downstream_cx_destroy: counter("envoy_http_downstream_cx_destroy"),
            downstream_cx_protocol_error: counter("envoy_http_downstream_cx_protocol_error"),
            downstream_cx_drain_close: counter("envoy_http_downstream_cx_drain_close"),
            downstream_cx_upgrades_total: counter("envoy_http_downstream_cx_upgrades_total"),
            downstream_cx_upgrades_active: gauge("envoy_http_downstream_cx_upgrades_active"),
            downstream_cx_max_duration_reached: counter(
                "envoy_http_downstream_cx_max_duration_reached",
            ),
            downstream_cx_max_requests_reached: counter(
                "envoy_http_downstream_cx_max_requests_reached",
            ),
            downstream_cx_idle_timeout: counter("envoy_http_downstream_cx_idle_timeout"),
            downstream_rq_total: counter("envoy_http_downstream_rq_total"),
            downstream_rq_active: gauge("envoy_http_downstream_rq_active"),
            downstream_rq_http1_total: counter("envoy_http_downstream_rq_http1_total"),
            downstream_rq_http2_total: counter("envoy_http_downstream_rq_http2_total"),
            downstream_rq_rx_reset: counter("envoy_http_downstream_rq_rx_reset"),
            downstream_rq_idle_timeout: counter("envoy_http_downstream_rq_idle_timeout"),
            downstream_rq_header_timeout: counter("envoy_http_downstream_rq_header_timeout"),
            no_route: counter("envoy_http_no_route"),
            no_cluster: counter("envoy_http_no_cluster"),
            rq_direct_response: counter("envoy_http_rq_direct_response"),
            rq_redirect: counter("envoy_http_rq_redirect"),
            downstream_rq_completed: counter("envoy_http_downstream_rq_completed"),
            downstream_rq_xx: ByClass::new(|class| {
                counter!(
                    "envoy_http_downstream_rq_xx",
                    "envoy_http_conn_manager_prefix" => label(),
                    "envoy_response_code_class" => class,
                )
            }),
            downstream_rq_time: histogram!("envoy_http_downstream_rq_time", "envoy_http_conn_manager_prefix" => label()),
        })
    }

    /// A response with this status ended, so long after its request began. 0 is no status: the client left first.
    pub fn completed(&self, code: u16, time: Duration) {
        self.downstream_rq_completed.increment(1);
        self.downstream_rq_xx.count(code);
        self.downstream_rq_time.record(millis(time));
    }
}

const CODES: std::ops::Range<u16> = 100..600;

/// Requests and connections of one cluster: `envoy_cluster_*`.
pub struct ClusterStats {
    name: String,
    /// Requests sent, each attempt counted.
    pub upstream_rq_total: Counter,
    /// Requests in flight.
    pub upstream_rq_active: Gauge,
    /// Ended by a timeout.
    pub upstream_rq_timeout: Counter,
    /// Tried again.
    pub upstream_rq_retry: Counter,
    /// Tried again, and then it went well.
    pub upstream_rq_retry_success: Counter,
    /// Not tried again: the retry budget was spent.
    pub upstream_rq_retry_overflow: Counter,
    /// Not tried again: it was tried often enough.
    pub upstream_rq_retry_limit_exceeded: Counter,
    /// Refused by a circuit breaker.
    pub upstream_rq_pending_overflow: Counter,
    /// Waiting for a connection.
    pub upstream_rq_pending_active: Gauge,
    /// Cancelled by the client.
    pub upstream_rq_cancelled: Counter,
    /// Load reports that could not be read.
    pub orca_refused: Counter,
    /// Reset by the upstream.
    pub upstream_rq_rx_reset: Counter,
    /// Reset by us.
    pub upstream_rq_tx_reset: Counter,
    /// Connections opened.
    pub upstream_cx_total: Counter,
    /// Connections open.
    pub upstream_cx_active: Gauge,
    /// Connections that could not be opened.
    pub upstream_cx_connect_fail: Counter,
    /// Of these, for want of time.
    pub upstream_cx_connect_timeout: Counter,
    /// Connections closed.
    pub upstream_cx_destroy: Counter,
    /// Connections opened that speak HTTP/1.
    pub upstream_cx_http1_total: Counter,
    /// Connections opened that speak HTTP/2.
    pub upstream_cx_http2_total: Counter,
    /// Endpoints.
    pub membership_total: Gauge,
    /// Endpoints that may get requests.
    pub membership_healthy: Gauge,
    /// Of these, degraded.
    pub membership_degraded: Gauge,
    /// Requests whose endpoint was chosen without regard to health.
    pub lb_healthy_panic: Counter,
    /// How often the set of endpoints changed.
    pub membership_change: Counter,
    upstream_rq_completed: Counter,
    upstream_rq_xx: ByClass,
    upstream_rq_time: Histogram,
    /// By status, made when a status is first seen.
    codes: Box<[OnceLock<Counter>]>,
}

impl ClusterStats {
    /// The handles of the cluster of this name.
    #[must_use]
    pub fn new(name: &str) -> Arc<Self> {
        static ALL: Known<ClusterStats> = LazyLock::new(Mutex::default);
        known(&ALL, name, || Self::make(name))
    }

    fn make(name: &str) -> Self {
        let label = || name.to_owned();
        let counter = |name: &'static str| counter!(name, "envoy_cluster_name" => label());
        let gauge = |name: &'static str| gauge!(name, "envoy_cluster_name" => label());
        let histogram = |name: &'static str| histogram!(name, "envoy_cluster_name" => label());
        Self {
            name: label(),
            upstream_rq_total: counter("envoy_cluster_upstream_rq_total"),
            upstream_rq_active: gauge("envoy_cluster_upstream_rq_active"),
            upstream_rq_timeout: counter("envoy_cluster_upstream_rq_timeout"),
            upstream_rq_retry: counter("envoy_cluster_upstream_rq_retry"),
            upstream_rq_retry_success: counter("envoy_cluster_upstream_rq_retry_success"),
            upstream_rq_retry_overflow: counter("envoy_cluster_upstream_rq_retry_overflow"),
            upstream_rq_retry_limit_exceeded: counter(
                "envoy_cluster_upstream_rq_retry_limit_exceeded",
            ),
            upstream_rq_pending_overflow: counter("envoy_cluster_upstream_rq_pending_overflow"),
            upstream_rq_pending_active: gauge("envoy_cluster_upstream_rq_pending_active"),
            upstream_rq_cancelled: counter("envoy_cluster_upstream_rq_cancelled"),
            orca_refused: counter("outrigger_orca_reports_refused_total"),
            upstream_rq_rx_reset: counter("envoy_cluster_upstream_rq_rx_reset"),
            upstream_rq_tx_reset: counter("envoy_cluster_upstream_rq_tx_reset"),
            upstream_cx_total: counter("envoy_cluster_upstream_cx_total"),
            upstream_cx_active: gauge("envoy_cluster_upstream_cx_active"),
            upstream_cx_connect_fail: counter("envoy_cluster_upstream_cx_connect_fail"),
            upstream_cx_connect_timeout: counter("envoy_cluster_upstream_cx_connect_timeout"),
            upstream_cx_destroy: counter("envoy_cluster_upstream_cx_destroy"),
            upstream_cx_http1_total: counter("envoy_cluster_upstream_cx_http1_total"),
            upstream_cx_http2_total: counter("envoy_cluster_upstream_cx_http2_total"),
            membership_total: gauge("envoy_cluster_membership_total"),
            membership_healthy: gauge("envoy_cluster_membership_healthy"),
            membership_degraded: gauge("envoy_cluster_membership_degraded"),
            lb_healthy_panic: counter("envoy_cluster_lb_healthy_panic"),
            membership_change: counter("envoy_cluster_membership_change"),
            upstream_rq_completed: counter("envoy_cluster_upstream_rq_completed"),
            upstream_rq_xx: ByClass::new(|class| {
                counter!(
                    "envoy_cluster_upstream_rq_xx",
                    "envoy_response_code_class" => class,
                    "envoy_cluster_name" => label(),
                )
            }),
            upstream_rq_time: histogram("envoy_cluster_upstream_rq_time"),
            codes: CODES.map(|_| OnceLock::new()).collect(),
        }
    }

    /// A response with this status ended, so long after its request was sent.
    pub fn completed(&self, code: u16, time: Duration) {
        self.upstream_rq_completed.increment(1);
        self.upstream_rq_xx.count(code);
        self.upstream_rq_time.record(millis(time));
        let slot = code
            .checked_sub(CODES.start)
            .and_then(|index| self.codes.get(usize::from(index)));
        if let Some(slot) = slot {
            slot.get_or_init(|| {
                counter!(
                    "envoy_cluster_upstream_rq",
                    "envoy_response_code" => code.to_string(),
                    "envoy_cluster_name" => self.name.clone(),
                )
            })
            .increment(1);
        }
    }
}
