//! Every metric of the control plane, one row each, and the page that shows them.

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use std::sync::LazyLock;

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only goes up.
    Counter,
    /// Goes both ways.
    Gauge,
}

/// A metric.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// For people.
    pub help: &'static str,
}

/// As gauges want it.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "counts are small")]
pub fn as_gauge(count: usize) -> f64 {
    count as f64
}

const fn counter(name: &'static str, help: &'static str) -> Row {
    let kind = Kind::Counter;
    Row { name, kind, help }
}

const fn gauge(name: &'static str, help: &'static str) -> Row {
    let kind = Kind::Gauge;
    Row { name, kind, help }
}

/// All of them.
pub const ROWS: &[Row] = &[
    gauge(
        "outrigger_control_plane_streams",
        "Streams that are open, by service.",
    ),
    counter(
        "outrigger_control_plane_streams_refused_total",
        "Streams that were refused or ended because of what their client did, by reason.",
    ),
    counter(
        "outrigger_control_plane_handshakes_total",
        "TLS handshakes, by result: ok, no_certificate, expired, untrusted, identity, timeout, error.",
    ),
    counter(
        "outrigger_control_plane_handshakes_delayed_total",
        "Times when connections had to wait because too many were shaking hands.",
    ),
    counter(
        "outrigger_control_plane_certificate_loads_total",
        "Times when certificates and keys of the port of xDS were read, by result: good, bad.",
    ),
    counter(
        "outrigger_control_plane_certificates_issued_total",
        "Certificates issued to nodes by the CA, by result: good, bad.",
    ),
    counter(
        "outrigger_control_plane_requests_total",
        "Requests of clients, by type of resource; answers included.",
    ),
    counter(
        "outrigger_control_plane_responses_total",
        "Responses sent, by type of resource.",
    ),
    counter(
        "outrigger_control_plane_resources_sent_total",
        "Resources in responses, by type.",
    ),
    counter(
        "outrigger_control_plane_acks_total",
        "Responses that clients took, by type of resource.",
    ),
    counter(
        "outrigger_control_plane_nacks_total",
        "Responses that clients refused, by type of resource.",
    ),
    gauge(
        "outrigger_control_plane_clients_behind",
        "Streams whose client has not taken all that it was sent, counted when this is read: by `pending` and `refused`.",
    ),
    gauge(
        "outrigger_control_plane_resources",
        "Resources that are served to nodes that no short resource names, by type.",
    ),
    gauge(
        "outrigger_control_plane_nodes",
        "Nodes that short resources name or that registered, and that are served what is for them.",
    ),
    counter(
        "outrigger_control_plane_loads_total",
        "Times when a source had something new, by result: good, bad.",
    ),
    gauge(
        "outrigger_control_plane_problems",
        "What is wrong with what the sources have; while it is not 0, what was good last is served.",
    ),
    gauge(
        "outrigger_control_plane_leases",
        "Nodes that registered engines and whose lease runs.",
    ),
    counter(
        "outrigger_control_plane_registrations_total",
        "Registrations of nodes, by result: new, changed, renewed, left, refused.",
    ),
    counter(
        "outrigger_control_plane_leases_expired_total",
        "Leases that were not renewed in time.",
    ),
    gauge(
        "outrigger_control_plane_versions",
        "Versions of the configuration that are kept.",
    ),
    gauge("outrigger_control_plane_versions_bytes", "What they hold."),
    gauge(
        "outrigger_control_plane_store_ok",
        "1, or 0 while the last change could not be kept.",
    ),
    counter(
        "outrigger_control_plane_store_failures_total",
        "Changes that could not be kept.",
    ),
    gauge(
        "outrigger_control_plane_rollout_percent",
        "Per cent of the nodes that try a version; 0 while there is none.",
    ),
    counter(
        "outrigger_control_plane_rollouts_total",
        "Versions that were tried to an end, by result: done, rolled_back.",
    ),
    counter(
        "outrigger_control_plane_admin_connections_refused_total",
        "Connections to the admin that were closed because too many were open.",
    ),
    counter(
        "outrigger_config_fields_ignored",
        "Fields in the files that have no effect and are left out.",
    ),
];

static RECORDER: LazyLock<Option<PrometheusHandle>> = LazyLock::new(|| {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).ok()?;
    for row in ROWS {
        match row.kind {
            Kind::Counter => metrics::describe_counter!(row.name, row.help),
            Kind::Gauge => metrics::describe_gauge!(row.name, row.help),
        }
    }
    Some(handle)
});

/// From now on everything is counted. Only the first call does something.
pub fn install() {
    LazyLock::force(&RECORDER);
}

/// In Prometheus' text format; empty in a process whose metrics somebody else keeps.
#[must_use]
pub fn page() -> String {
    let handle = RECORDER.as_ref();
    handle.map_or_else(String::new, PrometheusHandle::render)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn sources(directory: &std::path::Path, texts: &mut String) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, texts);
            } else if path.file_name().is_some_and(|name| name != "figures.rs") {
                texts.push_str(&fs::read_to_string(&path).unwrap());
            }
        }
    }

    #[test]
    fn every_metric_has_a_row_and_every_row_is_used() {
        let mut texts = String::new();
        sources(
            &std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
            &mut texts,
        );
        let used = texts.split('"').filter(|text| {
            text.starts_with("outrigger_control_plane_")
                && text
                    .chars()
                    .all(|letter| letter == '_' || letter.is_ascii_lowercase())
        });
        let used: std::collections::BTreeSet<&str> = used.collect();
        for name in &used {
            assert!(
                ROWS.iter().any(|row| row.name == *name),
                "{name} has no row"
            );
        }
        for row in ROWS
            .iter()
            .filter(|row| row.name.starts_with("outrigger_control_plane"))
        {
            assert!(used.contains(row.name), "{} is not used", row.name);
        }
    }
}
