//! Fields of listeners, their filters and addresses that exist but are not transcribed; see [`super::known`].

/// Fields by message that a configuration may not carry yet.
// The long lists would be a page each, one name a line.
#[rustfmt::skip]
pub(super) const NOT_SUPPORTED: &[(&str, &[&str])] = &[
    ("envoy.config.core.v3.Address", &["envoy_internal_address"]),
    ("envoy.config.core.v3.ProxyProtocolConfig", &["added_tlvs", "pass_through_tlvs"]),
    (
        "envoy.config.core.v3.SocketAddress",
        &[
            "ipv4_compat", "named_port", "network_namespace_filepath", "resolver_name",
        ],
    ),
    ("envoy.config.listener.v3.Filter", &["config_discovery"]),
    ("envoy.config.listener.v3.FilterChain", &["use_proxy_proto"]),
    ("envoy.config.listener.v3.FilterChainMatch", &["address_suffix", "suffix_len"]),
    (
        "envoy.config.listener.v3.Listener",
        &[
            "additional_addresses",
            "connection_balance_config", "deprecated_v1", "drain_type", "fcds_config", "filter_chain_matcher",
            "freebind", "internal_listener",
            "per_connection_buffer_limit_bytes", "reuse_port",
            "socket_options", "transparent", "udp_listener_config",
        ],
    ),
    (
        "envoy.config.trace.v3.OpenTelemetryConfig",
        &["max_cache_size", "resource_detectors", "sampler"],
    ),
    ("envoy.config.trace.v3.Tracing", &["http"]),
    ("envoy.type.tracing.v3.CustomTag", &["value"]),
    ("envoy.config.route.v3.RouteAction.UpgradeConfig", &["connect_config"]),
    ("envoy.config.listener.v3.ListenerFilter", &["config_discovery"]),
    (
        "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol",
        &["pass_through_tlvs", "rules", "tlv_location"],
    ),
    (
        "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
        &["close_connection_on_client_hello_parsing_errors"],
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        &[
            "access_log_flush_interval", "access_log_options", "add_proxy_protocol_connection_state",
            "add_user_agent", "append_local_overload",
            "delayed_close_timeout", "early_header_mutation_extensions",
            "flush_access_log_on_new_request", "forward_client_cert_matcher",
            "http1_safe_max_connection_duration", "http3_protocol_options",
            "original_ip_detection_extensions", "path_normalization_options",
            "represent_ipv4_remote_address_as_ipv4_mapped_ipv6",
            "scheme_header_transformation", "scoped_routes",
            "stream_error_on_invalid_http_message",
            "stream_flush_timeout",
            "via",
        ],
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.Tracing",
        &["operation", "upstream_operation", "verbose"],
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.UpgradeConfig",
        &["filters"],
    ),
    (
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        &[
            "access_log_flush_interval", "access_log_options", "backoff_options",
            "flush_access_log_on_connected", "hash_policy",
            "max_downstream_connection_duration_jitter_percentage", "max_early_data_bytes", "metadata_match", "on_demand",
            "proxy_protocol_tlvs", "tunneling_config", "upstream_connect_mode",
        ],
    ),
    (
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.WeightedCluster.ClusterWeight",
        &["metadata_match"],
    ),
];

/// Fields by message that have no effect here and may be carried.
#[rustfmt::skip]
pub(super) const IGNORED: &[(&str, &[&str])] = &[
    ("envoy.type.tracing.v3.CustomTag.Metadata", &["kind", "metadata_key"]),
    ("envoy.config.listener.v3.FilterChain", &["metadata"]),
    (
        "envoy.config.listener.v3.Listener",
        &[
            "access_log", "bypass_overload_manager", "enable_mptcp", "ignore_global_conn_limit",
            "max_connections_to_accept_per_socket_event", "metadata", "tcp_fast_open_queue_length",
        ],
    ),
    (
        "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
        &["enable_ja3_fingerprinting", "enable_ja4_fingerprinting"],
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        &[
            "proxy_100_continue", "proxy_status_config", "request_id_extension",
            "typed_header_validation_config",
        ],
    ),
    (
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        &["downstream_idle_timeout", "upstream_idle_timeout"],
    ),
];
