//! The part of [`super::known`] about where resources come from.

/// Fields by message that a configuration may not carry yet.
pub(super) const NOT_SUPPORTED: &[(&str, &[&str])] = &[
    (
        "envoy.config.bootstrap.v3.Bootstrap.DynamicResources",
        &[
            "ads_config",
            "cds_resources_locator",
            "lds_resources_locator",
        ],
    ),
    (
        "envoy.config.core.v3.ConfigSource",
        &["ads", "api_config_source", "authorities", "path", "self"],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.Secret",
        &["generic_secret", "session_ticket_keys"],
    ),
    (
        "envoy.service.discovery.v3.DiscoveryResponse",
        &["resource_errors"],
    ),
];

/// Fields by message that have no effect here and may be carried.
pub(super) const IGNORED: &[(&str, &[&str])] = &[(
    "envoy.service.discovery.v3.DiscoveryResponse",
    &["canary", "control_plane"],
)];
