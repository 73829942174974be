//! What is counted of resources that come while we run, under Envoy's names.

use super::model::{Kind, Subscription, Wait};

/// What became of an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// Something came, or was looked for.
    Attempt,
    /// It was taken.
    Success,
    /// It could not be read at all.
    Failure,
    /// What it says is wrong.
    Rejected,
    /// It has not what was asked for.
    Empty,
    /// It did not come in its time.
    InitFetchTimeout,
}

const EVENTS: usize = 6;

/// In the order of [`Event`].
fn names(kind: Kind) -> [&'static str; EVENTS] {
    match kind {
        Kind::Clusters => [
            "envoy_cluster_manager_cds_update_attempt",
            "envoy_cluster_manager_cds_update_success",
            "envoy_cluster_manager_cds_update_failure",
            "envoy_cluster_manager_cds_update_rejected",
            "envoy_cluster_manager_cds_update_rejected",
            "envoy_cluster_manager_cds_init_fetch_timeout",
        ],
        Kind::Endpoints => [
            "envoy_cluster_update_attempt",
            "envoy_cluster_update_success",
            "envoy_cluster_update_failure",
            "envoy_cluster_update_rejected",
            "envoy_cluster_update_empty",
            "envoy_cluster_init_fetch_timeout",
        ],
        Kind::Listeners => [
            "envoy_listener_manager_lds_update_attempt",
            "envoy_listener_manager_lds_update_success",
            "envoy_listener_manager_lds_update_failure",
            "envoy_listener_manager_lds_update_rejected",
            "envoy_listener_manager_lds_update_rejected",
            "envoy_listener_manager_lds_init_fetch_timeout",
        ],
        Kind::Routes => [
            "envoy_http_rds_update_attempt",
            "envoy_http_rds_update_success",
            "envoy_http_rds_update_failure",
            "envoy_http_rds_update_rejected",
            "envoy_http_rds_update_empty",
            "envoy_http_rds_init_fetch_timeout",
        ],
        Kind::Secrets => [
            "envoy_sds_update_attempt",
            "envoy_sds_update_success",
            "envoy_sds_update_failure",
            "envoy_sds_update_rejected",
            "envoy_sds_update_rejected",
            "envoy_sds_init_fetch_timeout",
        ],
    }
}

/// Counts for everybody who asked.
pub(super) fn count(asked: &Subscription, wait: &Wait, event: Event) {
    let name = names(asked.kind)[event as usize];
    for owner in &wait.owners {
        let owner = owner.clone();
        match asked.kind {
            Kind::Clusters | Kind::Listeners => metrics::counter!(name),
            Kind::Endpoints => metrics::counter!(name, "envoy_cluster_name" => owner),
            Kind::Secrets => metrics::counter!(name, "envoy_xds_resource_name" => owner),
            Kind::Routes => {
                let table = asked.name.clone();
                metrics::counter!(name, "envoy_http_conn_manager_prefix" => owner, "envoy_rds_route_config" => table)
            }
        }
        .increment(1);
    }
}
