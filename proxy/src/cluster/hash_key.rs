//! What an endpoint is called, and what places it where policies choose by hash.

use outrigger_xds::resource::{
    cluster::Cluster,
    endpoint::{Address, LbEndpoint},
};

/// Its name: given, or that of its address.
pub(super) fn name_of(endpoint: &LbEndpoint) -> &str {
    if endpoint.hostname.is_empty() {
        &endpoint.address.host
    } else {
        &endpoint.hostname
    }
}

/// What places an endpoint where policies choose by hash: as Envoy's `hash_key` says, its name, or its address.
pub(super) fn hash_key(cluster: &Cluster, endpoint: &LbEndpoint) -> String {
    hash_key_at(cluster, endpoint, &endpoint.address)
}

/// The same of an endpoint whose name means this address.
pub(super) fn hash_key_at(cluster: &Cluster, endpoint: &LbEndpoint, address: &Address) -> String {
    let given = endpoint
        .metadata
        .get("envoy.lb")
        .and_then(|of_balancing| of_balancing.get("hash_key")?.as_str());
    match given {
        Some(key) => key.to_owned(),
        None if cluster.balancing.use_hostname_for_hashing => name_of(endpoint).to_owned(),
        None => address.to_string(),
    }
}
