//! As `known`, for hash policies and load-balancing policies.

/// Fields by message that a configuration may not carry yet.
pub(super) const NOT_SUPPORTED: &[(&str, &[&str])] = &[
    (
        "envoy.config.cluster.v3.Cluster.OriginalDstLbConfig",
        &["metadata_key"],
    ),
    ("envoy.config.cluster.v3.Filter", &["config_discovery"]),
    (
        "envoy.config.cluster.v3.UpstreamConnectionOptions",
        &[
            "happy_eyeballs_config",
            "set_local_interface_name_on_upstream_connections",
        ],
    ),
    (
        "envoy.config.core.v3.BindConfig",
        &[
            "additional_source_addresses",
            "extra_source_addresses",
            "freebind",
            "local_address_selector",
            "socket_options",
        ],
    ),
    (
        "envoy.config.route.v3.RouteAction.HashPolicy",
        &["filter_state"],
    ),
    (
        "envoy.extensions.load_balancing_policies.common.v3.ConsistentHashingLbConfig",
        &["hash_balance_factor", "hash_policy"],
    ),
    (
        "envoy.config.cluster.v3.Cluster.CommonLbConfig.ConsistentHashingLbConfig",
        &["hash_balance_factor"],
    ),
    (
        "envoy.extensions.load_balancing_policies.common.v3.LocalityLbConfig",
        &["zone_aware_lb_config"],
    ),
    (
        "envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost.OverrideHostSource",
        &["metadata"],
    ),
    (
        "envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash",
        &["hash_balance_factor"],
    ),
];

/// Fields by message that have no effect here and may be carried.
pub(super) const IGNORED: &[(&str, &[&str])] = &[(
    "envoy.extensions.clusters.dns.v3.DnsCluster",
    &["dns_jitter", "typed_dns_resolver_config"],
)];
