//! Plain types shown as Envoy's JSON, alone or in the shape of `/config_dump`.
//!
//! Shows what is in effect: defaults are filled in, and what was ignored is gone.

use super::discovery::Resource;
use crate::{
    protobuf, resource::bootstrap::Bootstrap,
    wire::envoy::config::bootstrap::v3::Bootstrap as WireBootstrap,
};
use serde_json::{Value, json};

/// A bootstrap in protobuf's JSON mapping with `snake_case` keys; reading it gives an equal bootstrap.
#[must_use]
pub fn bootstrap_to_json(bootstrap: &Bootstrap) -> Value {
    protobuf::to_json(&WireBootstrap::from(bootstrap))
}

/// The answer to `/config_dump`: what of `bootstrap` is in effect since `last_updated` (RFC 3339), as of `version`.
#[must_use]
pub fn config_dump(bootstrap: &Bootstrap, version: &str, last_updated: &str) -> Value {
    let entry = |key: &str, resource: Value| json!({ key: resource, "last_updated": last_updated });
    let clusters: Vec<Value> = bootstrap
        .clusters
        .iter()
        .map(|plain| entry("cluster", plain.to_json()))
        .collect();
    let listeners: Vec<Value> = bootstrap
        .listeners
        .iter()
        .map(|plain| entry("listener", plain.to_json()))
        .collect();
    let tables = bootstrap
        .listeners
        .iter()
        .flat_map(|listener| listener.http_managers())
        .filter(|manager| manager.rds.is_none())
        .map(|manager| &manager.route_config);
    let routes: Vec<Value> = tables
        .map(|plain| entry("route_config", plain.to_json()))
        .collect();
    json!({ "configs": [
        {
            "@type": "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump",
            "bootstrap": bootstrap_to_json(bootstrap),
            "last_updated": last_updated,
        },
        {
            "@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump",
            "version_info": version,
            "static_clusters": clusters,
        },
        {
            "@type": "type.googleapis.com/envoy.admin.v3.ListenersConfigDump",
            "version_info": version,
            "static_listeners": listeners,
        },
        {
            "@type": "type.googleapis.com/envoy.admin.v3.RoutesConfigDump",
            "static_route_configs": routes,
        },
    ] })
}
