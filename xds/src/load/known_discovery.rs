//! The part of [`super::known`] about where resources come from.

/// Fields by message that a configuration may not carry yet.
pub(super) const NOT_SUPPORTED: &[(&str, &[&str])] = &[
    (
        "envoy.config.bootstrap.v3.Bootstrap.DynamicResources",
        &["cds_resources_locator", "lds_resources_locator"],
    ),
    (
        "envoy.config.core.v3.ApiConfigSource",
        &["cluster_names", "config_validators"],
    ),
    (
        "envoy.config.core.v3.ConfigSource",
        &["authorities", "path", "self"],
    ),
    ("envoy.config.core.v3.GrpcService", &["retry_policy"]),
    (
        "envoy.config.core.v3.GrpcService.EnvoyGrpc",
        &["retry_policy"],
    ),
    (
        "envoy.config.core.v3.GrpcService.GoogleGrpc",
        &[
            "call_credentials",
            "call_credentials_plugin",
            "channel_args",
            "channel_credentials",
            "channel_credentials_plugin",
            "config",
            "credentials_factory_name",
        ],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.Secret",
        &["generic_secret", "session_ticket_keys"],
    ),
    (
        "envoy.service.discovery.v3.DeltaDiscoveryRequest",
        &[
            "resource_locators_subscribe",
            "resource_locators_unsubscribe",
        ],
    ),
    (
        "envoy.service.discovery.v3.DeltaDiscoveryResponse",
        &["removed_resource_names"],
    ),
    (
        "envoy.service.discovery.v3.DiscoveryRequest",
        &["resource_locators"],
    ),
    (
        "envoy.service.discovery.v3.Resource",
        &["aliases", "resource_name"],
    ),
    (
        "envoy.service.discovery.v3.ResourceName",
        &["dynamic_parameter_constraints"],
    ),
    ("envoy.type.matcher.v3.StructMatcher", &["path", "value"]),
];

/// Fields by message that have no effect here and may be carried.
pub(super) const IGNORED: &[(&str, &[&str])] = &[
    (
        "envoy.admin.v3.UpdateFailureState",
        &["failed_configuration"],
    ),
    (
        "envoy.config.core.v3.ApiConfigSource",
        &["refresh_delay", "request_timeout"],
    ),
    ("envoy.config.core.v3.BuildVersion", &["metadata"]),
    (
        "envoy.config.core.v3.GrpcService.EnvoyGrpc",
        &["skip_envoy_headers"],
    ),
    (
        "envoy.config.core.v3.GrpcService.GoogleGrpc",
        &["per_stream_buffer_limit_bytes"],
    ),
    (
        "envoy.config.endpoint.v3.ClusterStats",
        &["dropped_requests"],
    ),
    (
        "envoy.config.endpoint.v3.UpstreamEndpointStats",
        &["metadata"],
    ),
    (
        "envoy.config.endpoint.v3.UpstreamLocalityStats",
        &[
            "application_utilization",
            "cpu_utilization",
            "mem_utilization",
            "total_active_connections",
            "total_fail_connections",
            "total_new_connections",
        ],
    ),
    (
        "envoy.service.discovery.v3.DeltaDiscoveryResponse",
        &["control_plane"],
    ),
    (
        "envoy.service.discovery.v3.DiscoveryResponse",
        &["canary", "control_plane"],
    ),
    (
        "envoy.service.discovery.v3.Resource",
        &["cache_control", "metadata"],
    ),
    (
        "envoy.service.status.v3.ClientConfig",
        &["client_scope", "xds_config"],
    ),
    (
        "envoy.service.status.v3.ClientConfig.GenericXdsConfig",
        &["is_static_resource"],
    ),
    ("google.rpc.Status", &["details"]),
];
