//! What is counted of resources that come while we run, under Envoy's names.

use super::model::{Kind, Subscription, Wait};
use metrics::{Counter, Gauge, Label};
use std::collections::BTreeSet;

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
        Kind::Runtimes => [
            "envoy_runtime_update_attempt",
            "envoy_runtime_update_success",
            "envoy_runtime_update_failure",
            "envoy_runtime_update_rejected",
            "envoy_runtime_update_rejected",
            "envoy_runtime_init_fetch_timeout",
        ],
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
        Kind::Extensions => [
            "envoy_extension_config_discovery_http_filter_update_attempt",
            "envoy_extension_config_discovery_http_filter_update_success",
            "envoy_extension_config_discovery_http_filter_update_failure",
            "envoy_extension_config_discovery_http_filter_update_rejected",
            "envoy_extension_config_discovery_http_filter_update_rejected",
            "envoy_extension_config_discovery_http_filter_init_fetch_timeout",
        ],
    }
}

/// What is shown of a stream, in somebody's name: whether a server is there, and how far requests to it are held back.
pub(super) struct StreamStats {
    connected: Gauge,
    pending: Gauge,
    enforced: Counter,
}

impl StreamStats {
    pub(super) fn connected(&self, is_connected: bool) {
        self.connected.set(f64::from(u8::from(is_connected)));
    }

    pub(super) fn held_back(&self, is_held_back: bool) {
        self.pending.set(f64::from(u8::from(is_held_back)));
        self.enforced.increment(u64::from(is_held_back));
    }
}

/// Of the stream of all types.
pub(super) fn of_ads() -> StreamStats {
    StreamStats {
        connected: metrics::gauge!("envoy_control_plane_connected_state"),
        pending: metrics::gauge!("envoy_control_plane_pending_requests"),
        enforced: metrics::counter!("envoy_control_plane_rate_limit_enforced"),
    }
}

/// Of a stream of one type, for everybody who asked.
pub(super) fn of_stream(asked: &Subscription, owners: &BTreeSet<String>) -> Vec<StreamStats> {
    let [connected, pending, enforced] = stream_names(asked.kind);
    let each = owners.iter().map(|owner| {
        let labels = labels(asked, owner);
        StreamStats {
            connected: metrics::gauge!(connected, labels.clone()),
            pending: metrics::gauge!(pending, labels.clone()),
            enforced: metrics::counter!(enforced, labels),
        }
    });
    each.collect()
}

/// Envoy's, which stand below those of the type.
fn stream_names(kind: Kind) -> [&'static str; 3] {
    match kind {
        Kind::Runtimes => [
            "envoy_runtime_control_plane_connected_state",
            "envoy_runtime_control_plane_pending_requests",
            "envoy_runtime_control_plane_rate_limit_enforced",
        ],
        Kind::Clusters => [
            "envoy_cluster_manager_cds_control_plane_connected_state",
            "envoy_cluster_manager_cds_control_plane_pending_requests",
            "envoy_cluster_manager_cds_control_plane_rate_limit_enforced",
        ],
        Kind::Endpoints => [
            "envoy_cluster_control_plane_connected_state",
            "envoy_cluster_control_plane_pending_requests",
            "envoy_cluster_control_plane_rate_limit_enforced",
        ],
        Kind::Listeners => [
            "envoy_listener_manager_lds_control_plane_connected_state",
            "envoy_listener_manager_lds_control_plane_pending_requests",
            "envoy_listener_manager_lds_control_plane_rate_limit_enforced",
        ],
        Kind::Routes => [
            "envoy_http_rds_control_plane_connected_state",
            "envoy_http_rds_control_plane_pending_requests",
            "envoy_http_rds_control_plane_rate_limit_enforced",
        ],
        Kind::Secrets => [
            "envoy_sds_control_plane_connected_state",
            "envoy_sds_control_plane_pending_requests",
            "envoy_sds_control_plane_rate_limit_enforced",
        ],
        Kind::Extensions => [
            "envoy_extension_config_discovery_http_filter_control_plane_connected_state",
            "envoy_extension_config_discovery_http_filter_control_plane_pending_requests",
            "envoy_extension_config_discovery_http_filter_control_plane_rate_limit_enforced",
        ],
    }
}

fn labels(asked: &Subscription, owner: &str) -> Vec<Label> {
    let owner = owner.to_owned();
    match asked.kind {
        Kind::Runtimes | Kind::Clusters | Kind::Listeners => Vec::new(),
        Kind::Endpoints => vec![Label::new("envoy_cluster_name", owner)],
        Kind::Secrets | Kind::Extensions => vec![Label::new("envoy_xds_resource_name", owner)],
        Kind::Routes => vec![
            Label::new("envoy_http_conn_manager_prefix", owner),
            Label::new("envoy_rds_route_config", asked.name.clone()),
        ],
    }
}

/// Counts for everybody who asked.
pub(super) fn count(asked: &Subscription, wait: &Wait, event: Event) {
    let name = names(asked.kind)[event as usize];
    let is_failure = !matches!(event, Event::Attempt | Event::Success);
    if asked.kind == Kind::Extensions && is_failure {
        count_extension(EXTENSION_FAIL, &asked.name);
    }
    for owner in &wait.owners {
        metrics::counter!(name, labels(asked, owner)).increment(1);
    }
}

/// A filter's configuration is another one now.
pub(super) const EXTENSION_RELOAD: &str =
    "envoy_extension_config_discovery_http_filter_config_reload";
/// A filter's configuration was refused, could not be asked for, or did not come in its time.
pub(super) const EXTENSION_FAIL: &str = "envoy_extension_config_discovery_http_filter_config_fail";

/// Counts one of these.
pub(super) fn count_extension(metric: &'static str, name: &str) {
    metrics::counter!(metric, "envoy_xds_resource_name" => name.to_owned()).increment(1);
}
