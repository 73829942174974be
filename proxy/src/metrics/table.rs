//! Every metric of the workspace, one row each: name, kind, labels, help. A test holds the sources against it.

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only goes up.
    Counter,
    /// Goes both ways.
    Gauge,
    /// A distribution.
    Histogram(Buckets),
}

/// Unit and bucket bounds of a distribution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Buckets {
    /// Milliseconds, with Envoy's bounds.
    Millis,
    /// Seconds, from 1 ms (tokens in a stream) to 10 min (whole answers).
    Seconds,
    /// Seconds, from 5 us: work of this proxy itself.
    Decision,
}

impl Buckets {
    /// Upper bounds, ascending, without the infinite one.
    #[must_use]
    pub fn bounds(self) -> &'static [f64] {
        match self {
            Self::Millis => &[
                0.5,
                1.0,
                5.0,
                10.0,
                25.0,
                50.0,
                100.0,
                250.0,
                500.0,
                1_000.0,
                2_500.0,
                5_000.0,
                10_000.0,
                30_000.0,
                60_000.0,
                300_000.0,
                600_000.0,
                1_800_000.0,
                3_600_000.0,
            ],
            Self::Seconds => &[
                0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05,
                0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0,
                30.0, 60.0, 120.0, 300.0, 600.0,
            ],
            Self::Decision => &[
                0.000_005, 0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001,
                0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0,
            ],
        }
    }
}

/// One metric.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// As Prometheus sees it.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Names of its labels.
    pub labels: &'static [&'static str],
    /// One sentence.
    pub help: &'static str,
}

const NONE: &[&str] = &[];
const LISTENER: &[&str] = &["envoy_listener_address"];
const HTTP: &[&str] = &["envoy_http_conn_manager_prefix"];
const HTTP_CLASS: &[&str] = &[
    "envoy_http_conn_manager_prefix",
    "envoy_response_code_class",
];
const TCP: &[&str] = &["envoy_tcp_prefix"];
const PROXY_HEADER: &[&str] = &["envoy_proxy_protocol_prefix"];
const PROXY_HEADER_VERSION: &[&str] = &[
    "envoy_proxy_protocol_prefix",
    "envoy_proxy_protocol_version",
];
const LOCAL_LIMIT: &[&str] = &["envoy_local_http_ratelimit_prefix"];
const CLUSTER: &[&str] = &["envoy_cluster_name"];
const ROUTES: &[&str] = &["envoy_http_conn_manager_prefix", "envoy_rds_route_config"];
const SECRET: &[&str] = &["envoy_xds_resource_name"];
const CLUSTER_CLASS: &[&str] = &["envoy_cluster_name", "envoy_response_code_class"];
const CLUSTER_CODE: &[&str] = &["envoy_cluster_name", "envoy_response_code"];

const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Row {
    Row {
        name,
        kind: Kind::Counter,
        labels,
        help,
    }
}

const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Row {
    Row {
        name,
        kind: Kind::Gauge,
        labels,
        help,
    }
}

const fn millis(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Row {
    Row {
        name,
        kind: Kind::Histogram(Buckets::Millis),
        labels,
        help,
    }
}

const fn seconds(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Row {
    Row {
        name,
        kind: Kind::Histogram(Buckets::Seconds),
        labels,
        help,
    }
}

const fn decision(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Row {
    Row {
        name,
        kind: Kind::Histogram(Buckets::Decision),
        labels,
        help,
    }
}

/// All of them.
// One row is one line, however long: it is read by column.
#[rustfmt::skip]
pub const ROWS: &[Row] = &[
    counter("envoy_listener_downstream_cx_total", LISTENER, "Connections accepted."),
    gauge("envoy_listener_downstream_cx_active", LISTENER, "Connections open."),
    counter("envoy_listener_downstream_cx_destroy", LISTENER, "Connections closed."),
    counter("envoy_listener_downstream_cx_overflow", LISTENER, "Connections refused because too many were open."),
    gauge("envoy_listener_downstream_pre_cx_active", LISTENER, "Connections that listener filters look at."),
    counter("envoy_listener_downstream_pre_cx_timeout", LISTENER, "Connections at which listener filters looked for too long."),
    counter("envoy_listener_downstream_listener_filter_error", LISTENER, "Connections closed by a listener filter."),
    counter("envoy_listener_downstream_listener_filter_remote_close", LISTENER, "Connections closed by their client while listener filters looked at them."),
    counter("envoy_listener_no_filter_chain_match", LISTENER, "Connections closed because no filter chain is for them."),
    counter("envoy_listener_downstream_cx_transport_socket_connect_timeout", LISTENER, "Connections closed because their TLS handshake took too long."),
    counter("envoy_listener_ssl_handshake", LISTENER, "TLS handshakes that went well."),
    counter("envoy_listener_ssl_connection_error", LISTENER, "TLS handshakes that failed, other than for the client's certificate."),
    counter("envoy_listener_ssl_no_certificate", LISTENER, "TLS connections of clients without a certificate."),
    counter("envoy_listener_ssl_fail_verify_no_cert", LISTENER, "TLS handshakes that failed because the client has no certificate."),
    counter("envoy_listener_ssl_fail_verify_error", LISTENER, "TLS handshakes that failed because the client's certificate is not believed."),
    counter("envoy_listener_ssl_fail_verify_san", LISTENER, "TLS handshakes that failed because the client's certificate has none of the names it needs."),
    millis("envoy_listener_downstream_cx_length_ms", LISTENER, "How long connections were open."),
    counter("envoy_tls_inspector_client_hello_too_big", NONE, "Connections closed because the first message of their TLS handshake is too long."),
    counter("envoy_tls_inspector_tls_found", NONE, "Connections that begin with TLS."),
    counter("envoy_tls_inspector_tls_not_found", NONE, "Connections that do not."),
    counter("envoy_tls_inspector_alpn_found", NONE, "TLS connections that name protocols."),
    counter("envoy_tls_inspector_alpn_not_found", NONE, "TLS connections that name none."),
    counter("envoy_tls_inspector_sni_found", NONE, "TLS connections that name a server."),
    counter("envoy_tls_inspector_sni_not_found", NONE, "TLS connections that name none."),
    counter("envoy_http_inspector_http10_found", NONE, "Connections that begin with HTTP/1.0."),
    counter("envoy_http_inspector_http11_found", NONE, "Connections that begin with HTTP/1.1."),
    counter("envoy_http_inspector_http2_found", NONE, "Connections that begin with HTTP/2."),
    counter("envoy_http_inspector_http_not_found", NONE, "Connections that begin with something else."),
    counter("envoy_proxy_proto_not_found_allowed", PROXY_HEADER, "Connections without a PROXY header that were let in."),
    counter("envoy_proxy_proto_not_found_disallowed", PROXY_HEADER, "Connections closed for want of a PROXY header."),
    counter("envoy_proxy_proto_found", PROXY_HEADER_VERSION, "PROXY headers."),
    counter("envoy_proxy_proto_disallowed", PROXY_HEADER_VERSION, "Connections closed because their PROXY header is of a version that is refused."),
    counter("envoy_proxy_proto_error", PROXY_HEADER_VERSION, "Connections closed because their PROXY header is broken."),
    counter("envoy_tcp_downstream_cx_total", TCP, "Connections of a TCP proxy."),
    counter("envoy_tcp_downstream_cx_no_route", TCP, "Of these, closed because their cluster does not exist."),
    counter("envoy_tcp_downstream_cx_rx_bytes_total", TCP, "Bytes from their clients, counted when they end."),
    counter("envoy_tcp_downstream_cx_tx_bytes_total", TCP, "Bytes to their clients, counted when they end."),
    counter("envoy_tcp_idle_timeout", TCP, "Of these, ended for silence."),
    counter("envoy_tcp_max_downstream_connection_duration", TCP, "Of these, ended for their age."),
    counter("envoy_http_downstream_cx_upgrades_total", HTTP, "Connections that became something else than HTTP."),
    gauge("envoy_http_downstream_cx_upgrades_active", HTTP, "Connections open that became something else than HTTP."),
    counter("envoy_http_downstream_cx_max_duration_reached", HTTP, "Connections ended for their age."),
    counter("envoy_http_downstream_cx_max_requests_reached", HTTP, "Connections ended because they had enough requests."),
    counter("envoy_http_downstream_cx_total", HTTP, "Connections accepted."),
    counter("envoy_http_downstream_cx_destroy", HTTP, "Connections closed."),
    counter("envoy_http_downstream_cx_protocol_error", HTTP, "Connections closed because the client broke the protocol."),
    counter("envoy_http_downstream_cx_drain_close", HTTP, "Connections closed by a drain."),
    counter("envoy_http_downstream_cx_idle_timeout", HTTP, "Connections closed because no request, or no answer to a PING, came in time."),
    counter("envoy_http_downstream_rq_total", HTTP, "Requests begun."),
    counter("envoy_http_downstream_rq_completed", HTTP, "Requests answered to their end."),
    counter("envoy_http_downstream_rq_http1_total", HTTP, "Requests begun over HTTP/1."),
    counter("envoy_http_downstream_rq_http2_total", HTTP, "Requests begun over HTTP/2."),
    counter("envoy_http_downstream_rq_rx_reset", HTTP, "Requests reset by the client."),
    counter("envoy_http_downstream_rq_header_timeout", HTTP, "Requests whose head did not come in time."),
    counter("envoy_http_downstream_rq_idle_timeout", HTTP, "Requests whose response was ended because nothing came for too long."),
    counter("envoy_http_no_route", HTTP, "Requests that no route matched."),
    counter("envoy_http_no_cluster", HTTP, "Requests whose route names a cluster that does not exist."),
    counter("envoy_http_rq_direct_response", HTTP, "Requests answered by their route itself."),
    counter("envoy_http_rq_redirect", HTTP, "Requests that their route sent elsewhere."),
    gauge("envoy_http_downstream_cx_active", HTTP, "Connections open."),
    gauge("envoy_http_downstream_rq_active", HTTP, "Requests in flight."),
    counter("envoy_http_downstream_rq_xx", HTTP_CLASS, "Requests answered, by class of status."),
    millis("envoy_http_downstream_rq_time", HTTP, "From the first byte of a request to the last of its response."),
    counter("envoy_http_local_rate_limit_enabled", LOCAL_LIMIT, "Requests that a local rate limit counted."),
    counter("envoy_http_local_rate_limit_ok", LOCAL_LIMIT, "Requests within a local rate limit."),
    counter("envoy_http_local_rate_limit_rate_limited", LOCAL_LIMIT, "Requests over a local rate limit, refused or not."),
    counter("envoy_http_local_rate_limit_enforced", LOCAL_LIMIT, "Requests refused by a local rate limit."),
    counter("envoy_http_cors_origin_valid", HTTP, "Requests of an origin that a CORS policy allows."),
    counter("envoy_http_cors_origin_invalid", HTTP, "Requests of an origin that a CORS policy does not allow."),
    counter("envoy_http_fault_delays_injected", HTTP, "Requests delayed on purpose."),
    counter("envoy_http_fault_aborts_injected", HTTP, "Requests ended on purpose."),
    counter("envoy_http_fault_faults_overflow", HTTP, "Requests left alone because too many had a fault already."),
    gauge("envoy_http_fault_active_faults", HTTP, "Requests in flight that have a fault."),
    counter("envoy_cluster_upstream_rq_total", CLUSTER, "Requests sent, each attempt counted."),
    counter("envoy_cluster_upstream_rq_completed", CLUSTER, "Requests answered to their end."),
    counter("envoy_cluster_upstream_rq_timeout", CLUSTER, "Requests whose response headers or first event did not come in time."),
    counter("envoy_cluster_upstream_rq_retry", CLUSTER, "Requests tried again."),
    counter("envoy_cluster_upstream_rq_retry_success", CLUSTER, "Requests tried again that then went well."),
    counter("envoy_cluster_upstream_rq_retry_overflow", CLUSTER, "Requests not tried again because the retry budget was spent."),
    counter("envoy_cluster_upstream_rq_retry_limit_exceeded", CLUSTER, "Requests that failed after they had been tried again."),
    counter("envoy_cluster_upstream_rq_pending_overflow", CLUSTER, "Requests refused by a circuit breaker."),
    gauge("envoy_cluster_upstream_rq_pending_active", CLUSTER, "Requests that wait for a connection."),
    counter("envoy_cluster_upstream_rq_pending_total", CLUSTER, "Requests that waited for a connection, a new one or one in use."),
    counter("envoy_cluster_upstream_cx_overflow", CLUSTER, "How often a circuit breaker kept a connection from being opened."),
    gauge("envoy_cluster_circuit_breakers_default_cx_open", CLUSTER, "1 while there may be no more connections of default priority."),
    gauge("envoy_cluster_circuit_breakers_default_rq_pending_open", CLUSTER, "1 while there may be no more requests that wait for a connection of default priority."),
    gauge("envoy_cluster_circuit_breakers_default_rq_open", CLUSTER, "1 while there may be no more requests of default priority."),
    gauge("envoy_cluster_circuit_breakers_default_rq_retry_open", CLUSTER, "1 while there may be no more retries of default priority."),
    gauge("envoy_cluster_circuit_breakers_default_remaining_cx", CLUSTER, "How many more connections of default priority there may be; only with `track_remaining`."),
    gauge("envoy_cluster_circuit_breakers_default_remaining_pending", CLUSTER, "How many more requests that wait for a connection of default priority there may be; only with `track_remaining`."),
    gauge("envoy_cluster_circuit_breakers_default_remaining_rq", CLUSTER, "How many more requests of default priority there may be; only with `track_remaining`."),
    gauge("envoy_cluster_circuit_breakers_default_remaining_retries", CLUSTER, "How many more retries of default priority there may be; only with `track_remaining`."),
    gauge("envoy_cluster_circuit_breakers_high_cx_open", CLUSTER, "1 while there may be no more connections of high priority."),
    gauge("envoy_cluster_circuit_breakers_high_rq_pending_open", CLUSTER, "1 while there may be no more requests that wait for a connection of high priority."),
    gauge("envoy_cluster_circuit_breakers_high_rq_open", CLUSTER, "1 while there may be no more requests of high priority."),
    gauge("envoy_cluster_circuit_breakers_high_rq_retry_open", CLUSTER, "1 while there may be no more retries of high priority."),
    gauge("envoy_cluster_circuit_breakers_high_remaining_cx", CLUSTER, "How many more connections of high priority there may be; only with `track_remaining`."),
    gauge("envoy_cluster_circuit_breakers_high_remaining_pending", CLUSTER, "How many more requests that wait for a connection of high priority there may be; only with `track_remaining`."),
    gauge("envoy_cluster_circuit_breakers_high_remaining_rq", CLUSTER, "How many more requests of high priority there may be; only with `track_remaining`."),
    gauge("envoy_cluster_circuit_breakers_high_remaining_retries", CLUSTER, "How many more retries of high priority there may be; only with `track_remaining`."),
    counter("envoy_cluster_upstream_rq_cancelled", CLUSTER, "Requests cancelled by the client."),
    counter("envoy_cluster_upstream_rq_rx_reset", CLUSTER, "Requests reset by the upstream."),
    counter("envoy_cluster_upstream_rq_tx_reset", CLUSTER, "Requests reset by this proxy: their client went away, or they took too long."),
    counter("envoy_cluster_upstream_cx_total", CLUSTER, "Connections opened."),
    counter("envoy_cluster_upstream_cx_max_requests", CLUSTER, "Connections closed because they had served as many requests as they may."),
    counter("envoy_cluster_upstream_cx_connect_fail", CLUSTER, "Connections that could not be opened."),
    counter("envoy_cluster_upstream_cx_connect_timeout", CLUSTER, "Connections that could not be opened in time."),
    counter("envoy_cluster_upstream_cx_destroy", CLUSTER, "Connections closed."),
    counter("envoy_cluster_upstream_cx_http1_total", CLUSTER, "Connections opened that speak HTTP/1."),
    counter("envoy_cluster_upstream_cx_http2_total", CLUSTER, "Connections opened that speak HTTP/2."),
    counter("envoy_cluster_update_attempt", CLUSTER, "Lookups of a cluster's names, and updates of its endpoints that came."),
    counter("envoy_cluster_update_success", CLUSTER, "Lookups that found addresses, and updates that were taken."),
    counter("envoy_cluster_update_failure", CLUSTER, "Lookups that failed, and updates that could not be read at all."),
    counter("envoy_cluster_update_no_rebuild", CLUSTER, "Lookups that found what was known."),
    counter("envoy_cluster_membership_change", CLUSTER, "How often the set of endpoints changed."),
    counter("envoy_cluster_original_dst_host_invalid", CLUSTER, "Requests whose header was to say where they go, and said no address."),
    counter("outrigger_original_dst_overflow_total", CLUSTER, "Requests and connections for an address that one endpoint more would have been made for than there may be."),
    counter("envoy_cluster_lb_healthy_panic", CLUSTER, "Requests whose endpoint was chosen without regard to health, because too few were healthy."),
    gauge("envoy_cluster_membership_degraded", CLUSTER, "Endpoints that are degraded."),
    counter("envoy_cluster_health_check_attempt", CLUSTER, "Health checks begun."),
    counter("envoy_cluster_health_check_success", CLUSTER, "Health checks that went well."),
    counter("envoy_cluster_health_check_failure", CLUSTER, "Health checks that failed, those without an answer included."),
    counter("envoy_cluster_health_check_network_failure", CLUSTER, "Health checks without an answer."),
    gauge("envoy_cluster_health_check_healthy", CLUSTER, "Endpoints that health checks do not speak against."),
    gauge("envoy_cluster_health_check_degraded", CLUSTER, "Of these, degraded."),
    counter("envoy_server_static_unknown_fields", NONE, "Fields of the bootstrap that nobody knows."),
    counter("envoy_http1_dropped_headers_with_underscores", NONE, "Headers of HTTP/1 requests taken off for an underscore in their name."),
    counter("envoy_http1_requests_rejected_with_underscores_in_headers", NONE, "HTTP/1 requests refused for one."),
    counter("envoy_http2_dropped_headers_with_underscores", NONE, "Headers of HTTP/2 requests taken off for an underscore in their name."),
    counter("envoy_http2_requests_rejected_with_underscores_in_headers", NONE, "HTTP/2 requests refused for one."),
    counter("envoy_cluster_outlier_detection_ejections_detected_consecutive_5xx", CLUSTER, "Outliers found: 5xx in a row."),
    counter("envoy_cluster_outlier_detection_ejections_detected_consecutive_gateway_failure", CLUSTER, "Outliers found: 502, 503 or 504 in a row."),
    counter("envoy_cluster_outlier_detection_ejections_detected_consecutive_local_origin_failure", CLUSTER, "Outliers found: not reached, several times in a row."),
    counter("envoy_cluster_outlier_detection_ejections_detected_success_rate", CLUSTER, "Outliers found: a success rate far below the mean."),
    counter("envoy_cluster_outlier_detection_ejections_detected_local_origin_success_rate", CLUSTER, "Outliers found: reached far less often than the mean."),
    counter("envoy_cluster_outlier_detection_ejections_detected_failure_percentage", CLUSTER, "Outliers found: too large a share of failures."),
    counter("envoy_cluster_outlier_detection_ejections_detected_local_origin_failure_percentage", CLUSTER, "Outliers found: not reached too often."),
    counter("envoy_cluster_outlier_detection_ejections_detected_ttft", CLUSTER, "Outliers found: late first tokens."),
    counter("envoy_cluster_outlier_detection_ejections_detected_itl", CLUSTER, "Outliers found: late later tokens."),
    counter("envoy_cluster_outlier_detection_ejections_enforced_consecutive_5xx", CLUSTER, "Ejections: 5xx in a row."),
    counter("envoy_cluster_outlier_detection_ejections_enforced_consecutive_gateway_failure", CLUSTER, "Ejections: 502, 503 or 504 in a row."),
    counter("envoy_cluster_outlier_detection_ejections_enforced_consecutive_local_origin_failure", CLUSTER, "Ejections: not reached, several times in a row."),
    counter("envoy_cluster_outlier_detection_ejections_enforced_success_rate", CLUSTER, "Ejections: a success rate far below the mean."),
    counter("envoy_cluster_outlier_detection_ejections_enforced_local_origin_success_rate", CLUSTER, "Ejections: reached far less often than the mean."),
    counter("envoy_cluster_outlier_detection_ejections_enforced_failure_percentage", CLUSTER, "Ejections: too large a share of failures."),
    counter("envoy_cluster_outlier_detection_ejections_enforced_local_origin_failure_percentage", CLUSTER, "Ejections: not reached too often."),
    counter("envoy_cluster_outlier_detection_ejections_enforced_ttft", CLUSTER, "Ejections: late first tokens."),
    counter("envoy_cluster_outlier_detection_ejections_enforced_itl", CLUSTER, "Ejections: late later tokens."),
    counter("envoy_cluster_outlier_detection_ejections_enforced_total", CLUSTER, "Ejections."),
    counter("envoy_cluster_outlier_detection_ejections_overflow", CLUSTER, "Outliers not ejected because too many are."),
    gauge("envoy_cluster_outlier_detection_ejections_active", CLUSTER, "Endpoints that are ejected."),
    gauge("envoy_cluster_upstream_rq_active", CLUSTER, "Requests in flight."),
    gauge("envoy_cluster_upstream_cx_active", CLUSTER, "Connections open."),
    gauge("envoy_cluster_membership_total", CLUSTER, "Endpoints."),
    gauge("envoy_cluster_membership_healthy", CLUSTER, "Endpoints that may get requests."),
    counter("envoy_cluster_upstream_rq", CLUSTER_CODE, "Requests answered, by status."),
    counter("envoy_cluster_upstream_rq_xx", CLUSTER_CLASS, "Requests answered, by class of status."),
    millis("envoy_cluster_upstream_rq_time", CLUSTER, "From a request sent to the end of its response."),
    counter("envoy_listener_manager_listener_added", NONE, "Listeners that are new."),
    counter("envoy_listener_manager_listener_modified", NONE, "Listeners that are configured otherwise than before."),
    counter("envoy_listener_manager_listener_in_place_updated", NONE, "Of these, without their connections noticing."),
    counter("envoy_listener_manager_listener_removed", NONE, "Listeners that are gone."),
    counter("envoy_listener_manager_listener_create_failure", NONE, "Listeners that could not be made to run."),
    gauge("envoy_listener_manager_total_listeners_active", NONE, "Listeners that serve."),
    gauge("envoy_listener_manager_total_listeners_warming", NONE, "Listeners that wait for routes or secrets."),
    gauge("envoy_listener_manager_total_listeners_draining", NONE, "Listeners gone or replaced whose connections still run."),
    counter("envoy_cluster_manager_cluster_added", NONE, "Clusters that are new."),
    counter("envoy_cluster_manager_cluster_modified", NONE, "Clusters that are configured otherwise than before."),
    counter("envoy_cluster_manager_cluster_removed", NONE, "Clusters that are gone."),
    gauge("envoy_cluster_manager_active_clusters", NONE, "Clusters in use."),
    gauge("envoy_cluster_manager_warming_clusters", NONE, "Clusters that wait for endpoints or secrets."),
    counter("envoy_listener_manager_lds_update_attempt", NONE, "Updates of listeners that came."),
    counter("envoy_listener_manager_lds_update_success", NONE, "Updates of listeners that were taken."),
    counter("envoy_listener_manager_lds_update_failure", NONE, "Updates of listeners that could not be read at all."),
    counter("envoy_listener_manager_lds_update_rejected", NONE, "Updates of listeners that were wrong, at least in part."),
    counter("envoy_listener_manager_lds_init_fetch_timeout", NONE, "Waits for a first update of listeners that took too long."),
    counter("envoy_cluster_manager_cds_update_attempt", NONE, "Updates of clusters that came."),
    counter("envoy_cluster_manager_cds_update_success", NONE, "Updates of clusters that were taken."),
    counter("envoy_cluster_manager_cds_update_failure", NONE, "Updates of clusters that could not be read at all."),
    counter("envoy_cluster_manager_cds_update_rejected", NONE, "Updates of clusters that were wrong, at least in part."),
    counter("envoy_cluster_manager_cds_init_fetch_timeout", NONE, "Waits for a first update of clusters that took too long."),
    counter("envoy_http_rds_update_attempt", ROUTES, "Updates of a route table that came."),
    counter("envoy_http_rds_update_success", ROUTES, "Updates of a route table that were taken."),
    counter("envoy_http_rds_update_failure", ROUTES, "Updates of a route table that could not be read at all."),
    counter("envoy_http_rds_update_rejected", ROUTES, "Updates of a route table that were wrong, at least in part."),
    counter("envoy_http_rds_update_empty", ROUTES, "Updates without what was asked for, of a route table."),
    counter("envoy_http_rds_init_fetch_timeout", ROUTES, "Waits for a first update of a route table that took too long."),
    counter("envoy_cluster_update_rejected", CLUSTER, "Updates of a cluster's endpoints that were wrong, at least in part."),
    counter("envoy_cluster_update_empty", CLUSTER, "Updates without what was asked for, of a cluster's endpoints."),
    counter("envoy_cluster_init_fetch_timeout", CLUSTER, "Waits for a first update of a cluster's endpoints that took too long."),
    counter("envoy_sds_update_attempt", SECRET, "Updates of a secret that came."),
    counter("envoy_sds_update_success", SECRET, "Updates of a secret that were taken."),
    counter("envoy_sds_update_failure", SECRET, "Updates of a secret that could not be read at all."),
    counter("envoy_sds_update_rejected", SECRET, "Updates of a secret that were wrong, at least in part."),
    counter("envoy_sds_init_fetch_timeout", SECRET, "Waits for a first update of a secret that took too long."),
    counter("envoy_listener_server_ssl_socket_factory_downstream_context_secrets_not_ready", LISTENER, "TLS connections closed because the secrets of their context have not come."),
    gauge("envoy_server_days_until_first_cert_expiring", NONE, "Days that the first certificate to expire still holds."),
    counter("envoy_server_dynamic_unknown_fields", NONE, "Fields in configuration that came while running which nobody knows."),
    counter("outrigger_tls_renewals_total", &["name", "of"], "TLS contexts of a listener or cluster that got new certificates."),
    counter("outrigger_tls_renewal_failures_total", &["name", "of"], "TLS contexts of a listener or cluster whose new certificates could not be used."),
    gauge("envoy_server_live", NONE, "1 while the process serves and does not drain."),
    gauge("envoy_server_state", NONE, "0 live, 1 draining, 2 pre-initialising, 3 initialising."),
    gauge("envoy_server_uptime", NONE, "Seconds since the process began."),
    gauge("process_start_time_seconds", NONE, "When the process began, in seconds since 1970."),
    gauge("process_resident_memory_bytes", NONE, "Memory in RAM."),
    gauge("process_open_fds", NONE, "Open file descriptors."),
    gauge("outrigger_build_info", &["version"], "Always 1; the label says the version."),
    counter("outrigger_access_log_dropped_total", &["sink"], "Access-log lines dropped because the queue of their sink was full."),
    counter("outrigger_access_log_write_errors_total", &["sink"], "Failed writes of an access log; they are tried again."),
    counter("outrigger_admin_connections_refused_total", NONE, "Connections to the admin listener refused because too many were open."),
    counter("outrigger_retries_total", &["envoy_cluster_name", "reason"], "Requests tried again, by reason."),
    counter("outrigger_mirrors_skipped_total", &["envoy_cluster_name", "reason"], "Copies of requests that were not sent, by reason."),
    counter("outrigger_migrations_total", &["cause", "outcome"], "Streams that left their engine, by why, and how they went on: completions, entrance, restart, failed."),
    counter("outrigger_migration_refusals_total", &["cause", "reason"], "Streams that could not leave their engine, by why they should, and why not."),
    seconds("outrigger_migration_seconds", NONE, "From the last that a stream got to its next engine's first."),
    gauge("outrigger_migration_held_bytes", NONE, "Token ids held so that streams can move."),
    counter("outrigger_migration_memory_overflow_total", NONE, "Streams that can no longer move because too many token ids are held."),
    counter("outrigger_migration_budget_waits_total", NONE, "Moves that waited because too many streams were in prefill elsewhere."),
    counter("outrigger_migration_poison_total", NONE, "Requests refused because every engine died of them."),
    counter("outrigger_disaggregation_total", &["decision", "reason"], "Generations in fleets with roles: split into prefill and decode, or served whole, by why."),
    counter("outrigger_disaggregation_fallbacks_total", &["leg", "reason"], "Requests served whole because a leg failed, by which, and how."),
    seconds("outrigger_disaggregation_prefill_seconds", NONE, "Prefill legs, from their start to the end of their answer."),
    counter("outrigger_disaggregation_releases_total", &["outcome"], "Computed blocks that nobody waited for any more, by what became of giving them back."),
    counter("outrigger_in_band_errors_total", &["when"], "Errors that an engine reported inside a response that began well."),
    counter("outrigger_stream_errors_total", &["model"], "Streams that ended with an error event or broke."),
    counter("outrigger_sse_event_too_long_total", NONE, "Stream events too long to be looked at whole; they went on unseen."),
    counter("outrigger_openai_body_too_large_total", &["api"], "Request bodies too large to be parsed; they were routed by load."),
    counter("outrigger_openai_unparsed_total", &["api"], "Request bodies that could not be parsed; they went on as they came."),
    counter("outrigger_tokens_total", &["kind", "model"], "Tokens, prompt and completion, as engines reported them."),
    counter("outrigger_tenant_tokens_total", &["kind", "model", "source", "tenant"], "Tokens by tenant, told by engines or estimated."),
    counter("outrigger_stored_responses_total", &["outcome"], "Requests for a stored response, by how its engine was found: owner, owner_unavailable, owner_gone, found, unknown, unanswered."),
    counter("outrigger_token_ratelimit_total", &["limit", "outcome"], "Requests within a token rate limit, or over it: of requests, or of tokens."),
    gauge("outrigger_token_ratelimit_keys", NONE, "Keys that have buckets."),
    counter("outrigger_token_ratelimit_keys_evicted_total", NONE, "Keys forgotten because there were too many; their limits began anew."),
    counter("outrigger_prefix_hit_tokens_total", &["kind", "model"], "Prompt tokens predicted to be cached, and those that engines confirmed."),
    seconds("outrigger_time_to_first_token_seconds", &["model"], "From a request to its first token."),
    seconds("outrigger_inter_token_latency_seconds", &["model"], "Between two tokens of a stream."),
    decision("outrigger_routing_decision_seconds", NONE, "To rank the endpoints for one request."),
    gauge("outrigger_kv_index_blocks", &["engine"], "KV blocks the index knows of an engine."),
    counter("outrigger_kv_index_overflow_total", &["limit"], "KV blocks not indexed because of a limit."),
    counter("outrigger_kv_event_histories_total", &["engine", "reason"], "How often the history of an engine's KV events was asked for or begun anew."),
    counter("outrigger_engine_answers_too_long_total", NONE, "Answers of engines to our own questions that were too long to read."),
    counter("outrigger_config_fields_ignored", NONE, "Fields of a configuration that were accepted and have no effect."),
    counter("outrigger_orca_reports_refused_total", CLUSTER, "Load reports of endpoints that could not be read."),
    counter("outrigger_routing_total", &["how"], "Requests routed, by how their endpoint was chosen."),
    counter("outrigger_routing_fallback_total", &["reason"], "Requests routed with less than exact tokens, by reason."),
    counter("outrigger_kv_guesses_evictions_total", NONE, "Predicted KV blocks forgotten because too many were kept."),
    counter("outrigger_tokens_answer_cache_evictions_total", NONE, "Tokenised prompts forgotten because too many were kept."),
    counter("outrigger_tokens_local_models_overflow_total", NONE, "Models without a local tokenizer because too many are loaded."),
    counter("outrigger_tokens_local_load_failures_total", NONE, "Tokenizer files that could not be loaded."),
    counter("outrigger_tokens_engine_refusals_total", &["way"], "Refusals of engines to tokenise a prompt for us."),
    counter("outrigger_tokens_local_verifications_total", &["kind", "result"], "Comparisons of local tokens with those of an engine."),
    counter("outrigger_engine_unauthorized_total", &["engine"], "Questions an engine answered 401."),
    counter("outrigger_kv_event_gaps_total", &["engine"], "Gaps in the sequence of an engine's KV events."),
    counter("outrigger_kv_event_duplicates_total", &["engine"], "KV events of an engine that came twice."),
    counter("outrigger_kv_event_replays_total", &["engine"], "Replays asked of an engine."),
    counter("outrigger_kv_event_replay_failures_total", &["engine"], "Replays an engine did not give."),
    counter("outrigger_kv_event_waiting_overflows_total", &["engine"], "How often too many KV events waited for a replay."),
    counter("outrigger_kv_event_followers_lost_total", &["engine"], "How often following an engine's KV events ended by a fault of ours and began anew."),
    counter("outrigger_kv_event_garbage_total", &["engine"], "KV messages of an engine that could not be read."),
    counter("outrigger_kv_blocks_ignored_total", &["engine", "reason"], "What an engine announced of KV blocks and cannot be indexed: blocks, events, fields."),
    gauge("outrigger_kv_blocks_tracked", &["engine"], "KV blocks of an engine that its own proxy or agent keeps track of."),
    gauge("outrigger_kv_events_seq", &["engine"], "Sequence number of the last KV event applied to the index."),
    counter("outrigger_nats_snapshots_total", NONE, "Snapshots published over NATS."),
    counter("outrigger_nats_events_total", &["event"], "Events published over NATS."),
    counter("outrigger_nats_malformed_total", NONE, "NATS messages that could not be read."),
    counter("outrigger_nats_gaps_total", NONE, "Gaps in the sequence of a feed over NATS."),
    counter("outrigger_nats_silent_engines_total", NONE, "Engines no longer heard over NATS."),
    counter("outrigger_agent_accept_failures_total", NONE, "Connections to the agent that could not be accepted."),
    counter("outrigger_feed_lagged_total", NONE, "Subscribers of a feed that fell behind and got a snapshot."),
    counter("outrigger_feed_subscriptions", NONE, "Subscriptions to our feed."),
    gauge("outrigger_feed_connected", &["peer"], "1 while the feed of a peer is heard."),
    counter("outrigger_feed_failures_total", &["peer"], "Feeds of a peer that could not be opened or broke."),
    counter("outrigger_feed_conflicts_total", NONE, "Engines told of by more than one feed."),
    counter("outrigger_feed_gaps_total", NONE, "Gaps in the sequence of a feed."),
    counter("outrigger_feed_unfit_blocks_total", &["engine"], "Snapshots not indexed because their KV blocks have another size than ours."),
    counter("outrigger_ledger_overflow_total", NONE, "Requests whose prompt blocks were not counted because the queue to the ledger was full."),
    counter("outrigger_config_not_shown", NONE, "Parts of a configuration that could not be shown as JSON."),
    counter("outrigger_config_updates_total", NONE, "Configurations applied."),
    counter("outrigger_stream_timeouts_total", &["kind"], "Streams ended by a timeout, by response flag."),
    counter("outrigger_worker_held_writes_total", NONE, "Requests and answers that waited until all tasks that were ready had run, to leave together."),
    counter("outrigger_worker_gathers_total", NONE, "Moments in which a busy worker let events of streams gather."),
    counter("outrigger_upstream_stale_connections_total", NONE, "Pooled connections that the upstream had closed; replaced unnoticed."),
];
