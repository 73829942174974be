//! Where a request was meant to go, in a cluster of type `ORIGINAL_DST`: as a header says, if the cluster believes
//! headers, else where its connection was sent before it came to us.

use crate::{endpoints::ClusterView, filter::Context};
use http::HeaderMap;
use outrigger_xds::resource::cluster::OriginalDst;
use std::net::SocketAddr;

/// The address, if anything tells it.
pub(super) fn destination(
    config: &OriginalDst,
    view: &ClusterView,
    headers: &HeaderMap,
    context: &Context,
) -> Option<SocketAddr> {
    let named = config.header.as_deref().and_then(|name| headers.get(name));
    let said = named.and_then(|value| value.to_str().ok()?.parse().ok());
    if named.is_some() && said.is_none() {
        metrics::counter!("envoy_cluster_original_dst_host_invalid", "envoy_cluster_name" => view.name.to_string())
            .increment(1);
    }
    Some(config.at(said.or(context.original_dst)?))
}
