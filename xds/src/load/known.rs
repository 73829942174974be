//! Fields of Envoy that exist but are not transcribed: refused by name, or ignored and counted.
//!
//! Only names: what is neither here nor in `xds/proto` does not exist. A field leaves this table when it enters the
//! transcription.

/// Fields by message that a configuration may not carry yet.
// The long lists would be a page each, one name a line.
#[rustfmt::skip]
pub(super) const NOT_SUPPORTED: &[(&str, &[&str])] = &[
    (
        "envoy.config.accesslog.v3.AccessLogFilter",
        &[
            "extension_filter", "grpc_status_filter", "log_type_filter", "metadata_filter",
            "not_health_check_filter", "runtime_filter", "traceable_filter",
        ],
    ),
    (
        "envoy.config.bootstrap.v3.Admin",
        &["allow_paths", "socket_options"],
    ),
    (
        "envoy.config.bootstrap.v3.Bootstrap",
        &[
            "application_log_config",
            "certificate_provider_instances",
            "config_sources",
            "default_config_source",
            "default_regex_engine",
            "default_socket_interface",
            "dns_resolution_config",
            "fatal_actions",
            "flags_path",
            "grpc_async_client_manager_config",
            "hds_config",
            "header_prefix",
            "inline_headers",
            "listener_manager",
            "memory_allocator_manager",
            "node_context_params",
            "overload_manager",
            "perf_tracing_file_path",
            "stats_server_version_override",
            "stats_sinks",
            "tracing",
            "use_tcp_for_dns_lookups",
            "watchdog",
            "watchdogs",
            "xds_config_tracker_extension",
            "xds_delegate_extension",
        ],
    ),
    (
        "envoy.config.bootstrap.v3.ClusterManager",
        &["local_cluster_name", "outlier_detection", "upstream_bind_config"],
    ),
    ("envoy.config.bootstrap.v3.RuntimeLayer", &["disk_layer"]),
    ("envoy.config.cluster.v3.CircuitBreakers.Thresholds", &["max_connection_pools"]),
    (
        "envoy.config.cluster.v3.Cluster",
        &[
            "close_connections_on_host_health_failure",
            "common_http_protocol_options", "connection_pool_per_downstream_connection",
            "dns_resolution_config", "dns_resolvers",
            "http_protocol_options", "lb_subset_config",
            "ignore_health_on_host_removal", "lrs_report_endpoint_metrics", "lrs_server",
            "per_connection_buffer_limit_bytes", "preconnect_policy",
            "protocol_selection", "track_timeout_budgets",
            "transport_socket_matcher", "upstream_config",
            "upstream_http_protocol_options", "use_tcp_for_dns_lookups", "wait_for_warm_on_init",
        ],
    ),
    (
        "envoy.config.cluster.v3.Cluster.CommonLbConfig",
        &[
            "close_connections_on_host_set_change", "ignore_new_hosts_until_first_hc",
            "override_host_status", "zone_aware_lb_config",
        ],
    ),
    (
        "envoy.config.common.mutation_rules.v3.HeaderMutation",
        &["remove_on_match"],
    ),
    (
        "envoy.config.core.v3.DataSource",
        &["environment_variable"],
    ),
    ("envoy.config.core.v3.HeaderValue", &["raw_value"]),
    (
        "envoy.config.core.v3.HealthCheck",
        &[
            "alt_port", "always_log_health_check_failures", "always_log_health_check_success",
            "event_log_path", "event_logger", "event_service",
            "tls_options", "transport_socket_match_criteria",
        ],
    ),
    ("envoy.config.core.v3.HealthCheck.GrpcHealthCheck", &["initial_metadata"]),
    (
        "envoy.config.core.v3.HealthCheck.HttpHealthCheck",
        &[
            "receive", "request_headers_to_add", "request_headers_to_remove",
            "response_buffer_size", "send", "service_name_matcher",
        ],
    ),
    (
        "envoy.config.core.v3.HealthCheck.TcpHealthCheck",
        &["proxy_protocol_config", "receive", "send"],
    ),
    (
        "envoy.config.core.v3.Http1ProtocolOptions",
        &[
            "accept_http_10", "allow_absolute_url", "allow_chunked_length",
            "allow_custom_methods", "default_host_for_http_10", "enable_trailers",
            "header_key_format", "ignore_http_11_upgrade",
            "override_stream_error_on_invalid_http_message", "send_fully_qualified_url",
            "use_balsa_parser",
        ],
    ),
    (
        "envoy.config.core.v3.Http2ProtocolOptions",
        &[
            "allow_connect", "allow_metadata", "connection_keepalive",
            "custom_settings_parameters", "hpack_table_size", "initial_connection_window_size",
            "initial_stream_window_size", "max_consecutive_inbound_frames_with_empty_payload",
            "max_inbound_priority_frames_per_stream",
            "max_inbound_window_update_frames_per_data_frame_sent", "max_metadata_size",
            "max_outbound_control_frames", "max_outbound_frames",
            "override_stream_error_on_invalid_http_message",
            "stream_error_on_invalid_http_messaging", "use_oghttp2_codec",
        ],
    ),
    (
        "envoy.config.core.v3.HttpProtocolOptions",
        &["max_headers_count", "max_response_headers_kb"],
    ),
    ("envoy.config.core.v3.Metadata", &["typed_filter_metadata"]),
    ("envoy.config.core.v3.Node", &["listening_addresses"]),
    (
        "envoy.config.core.v3.SubstitutionFormatString",
        &["formatters", "json_format_options", "omit_empty_values"],
    ),
    (
        "envoy.config.endpoint.v3.ClusterLoadAssignment",
        &["named_endpoints"],
    ),
    (
        "envoy.config.endpoint.v3.ClusterLoadAssignment.Policy",
        &[
            "drop_overloads",
            "endpoint_stale_after",
            "weighted_priority_health",
        ],
    ),
    (
        "envoy.config.endpoint.v3.Endpoint",
        &["additional_addresses", "health_check_config"],
    ),
    ("envoy.config.endpoint.v3.LbEndpoint", &["endpoint_name"]),
    (
        "envoy.config.endpoint.v3.LocalityLbEndpoints",
        &[
            "leds_cluster_locality_config",
            "load_balancer_endpoints",
            "proximity",
        ],
    ),
    (
        "envoy.config.route.v3.DirectResponseAction",
        &["body_format"],
    ),
    (
        "envoy.config.route.v3.RetryPolicy",
        &[
            "per_try_idle_timeout",
            "rate_limited_retry_back_off",
            "retry_options_predicates",
            "retry_priority",
        ],
    ),
    (
        "envoy.config.route.v3.Route",
        &[
            "filter_action",
            "non_forwarding_action",
            "per_request_buffer_limit_bytes",
            "request_body_buffer_limit",
            "tracing",
        ],
    ),
    (
        "envoy.config.route.v3.RouteAction",
        &[
            "cluster_specifier_plugin", "cors", "early_data_policy", "flush_timeout",
            "grpc_timeout_offset", "hedge_policy", "host_rewrite", "host_rewrite_path_regex",
            "include_vh_rate_limits", "inline_cluster_specifier_plugin", "internal_redirect_action",
            "internal_redirect_policy", "max_internal_redirects",
            "metadata_match", "path_rewrite", "path_rewrite_policy", "rate_limits",
            "retry_policy_typed_config",
        ],
    ),
    (
        "envoy.config.route.v3.RouteAction.MaxStreamDuration",
        &["grpc_timeout_header_offset"],
    ),
    (
        "envoy.config.route.v3.RouteAction.RequestMirrorPolicy",
        &[
            "cluster_header",
            "host_rewrite_literal",
            "request_headers_mutations",
        ],
    ),
    (
        "envoy.config.route.v3.RouteConfiguration",
        &[
            "cluster_specifier_plugins", "ignore_path_parameters_in_path_matching",
            "internal_only_headers", "vhds", "vhost_header",
        ],
    ),
    (
        "envoy.config.route.v3.RouteMatch",
        &[
            "connect_matcher",
            "dynamic_metadata",
            "filter_state",
            "path_match_policy",
            "tls_context",
        ],
    ),
    (
        "envoy.config.route.v3.VirtualHost",
        &[
            "cors", "hedge_policy", "include_is_timeout_retry_header", "matcher",
            "per_request_buffer_limit_bytes", "rate_limits", "request_body_buffer_limit",
            "require_tls", "retry_policy_typed_config",
        ],
    ),
    (
        "envoy.config.route.v3.WeightedCluster",
        &["use_hash_policy"],
    ),
    ("envoy.config.route.v3.WeightedCluster.ClusterWeight", &["metadata_match"]),
    (
        "envoy.extensions.access_loggers.file.v3.FileAccessLog",
        &["format", "json_format", "typed_json_format"],
    ),
    (
        "envoy.extensions.filters.http.fault.v3.HTTPFault",
        &["downstream_nodes", "response_rate_limit"],
    ),
    (
        "envoy.extensions.filters.http.header_mutation.v3.Mutations",
        &[
            "query_parameter_mutations",
            "request_trailers_mutations",
            "response_trailers_mutations",
        ],
    ),
    (
        "envoy.extensions.filters.http.health_check.v3.HealthCheck",
        &["cache_time", "cluster_min_healthy_percentages"],
    ),
    (
        "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        &[
            "always_consume_default_token_bucket",
            "descriptors",
            "local_cluster_rate_limit",
            "local_rate_limit_per_downstream_connection",
            "max_dynamic_descriptors",
            "rate_limits",
            "stage",
            "vh_rate_limits",
        ],
    ),
    (
        "envoy.extensions.filters.http.router.v3.Router",
        &[
            "dynamic_stats",
            "respect_expected_rq_timeout",
            "start_child_span",
            "strict_check_headers",
            "suppress_grpc_request_failure_code_stats",
            "upstream_http_filters",
            "upstream_log",
            "upstream_log_options",
        ],
    ),
    (
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        &[
            "auto_config", "hash_policy", "header_validation_config", "http_filters",
            "outlier_detection", "request_mirror_policies", "retry_policy",
            "upstream_http_protocol_options",
        ],
    ),
    (
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions.ExplicitHttpConfig",
        &["http3_protocol_options"],
    ),
    (
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions.UseDownstreamHttpConfig",
        &["http3_protocol_options"],
    ),
    ("envoy.type.matcher.v3.StringMatcher", &["custom"]),
];

/// Fields by message that have no effect here and may be carried.
pub(super) const IGNORED: &[(&str, &[&str])] = &[
    (
        "envoy.config.bootstrap.v3.Admin",
        &["ignore_global_conn_limit", "profile_path"],
    ),
    (
        "envoy.config.bootstrap.v3.Bootstrap",
        &[
            "deferred_stat_options",
            "enable_dispatcher_stats",
            "stats_config",
            "stats_eviction_interval",
            "stats_flush_interval",
            "stats_flush_on_admin",
            "typed_dns_resolver_config",
        ],
    ),
    (
        "envoy.config.bootstrap.v3.ClusterManager",
        &["enable_deferred_cluster_creation"],
    ),
    (
        "envoy.config.cluster.v3.Cluster",
        &[
            "alt_stat_name",
            "dns_jitter",
            "metadata",
            "track_cluster_stats",
            "typed_dns_resolver_config",
        ],
    ),
    (
        "envoy.config.cluster.v3.Cluster.CommonLbConfig",
        &["update_merge_window"],
    ),
    (
        "envoy.config.core.v3.Node",
        &["dynamic_parameters", "extensions", "user_agent_version"],
    ),
    (
        "envoy.config.endpoint.v3.LocalityLbEndpoints",
        &["metadata"],
    ),
    (
        "envoy.config.route.v3.Route",
        &["decorator", "metadata", "stat_prefix"],
    ),
    (
        "envoy.config.route.v3.RouteAction.RequestMirrorPolicy",
        &["trace_sampled"],
    ),
    ("envoy.config.route.v3.RouteConfiguration", &["metadata"]),
    (
        "envoy.config.route.v3.VirtualHost",
        &["metadata", "virtual_clusters"],
    ),
    (
        "envoy.extensions.filters.http.fault.v3.HTTPFault",
        &[
            "abort_grpc_status_runtime",
            "abort_http_status_runtime",
            "abort_percent_runtime",
            "delay_duration_runtime",
            "delay_percent_runtime",
            "disable_downstream_cluster_stats",
            "filter_metadata",
            "max_active_faults_runtime",
            "response_rate_limit_percent_runtime",
        ],
    ),
    (
        "envoy.config.route.v3.WeightedCluster",
        &["runtime_key_prefix", "total_weight"],
    ),
];
