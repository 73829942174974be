//! How `/clusters` shows the fleet: Envoy's lines (or `envoy.admin.v3.Clusters` as JSON) and, after them, what only we
//! know of an endpoint.

use outrigger_filters::endpoints::{ClusterView, Endpoint, Host, Via};
use outrigger_xds::{
    report::Health,
    resource::{
        endpoint::{Address, HealthStatus},
        route_action::Priority,
    },
};
use serde_json::{Value, json};
use std::{
    fmt::{Display, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// As `envoy.config.core.v3.Address`.
fn address(address: &Address) -> Value {
    if address.is_pipe() {
        json!({"pipe": {"path": address.host}})
    } else {
        json!({"socket_address": {"address": address.host, "port_value": address.port}})
    }
}

/// Counters and gauges of an endpoint under Envoy's names.
fn stats(endpoint: &Endpoint) -> [(&'static str, u64, bool); 8] {
    let read = |value: &AtomicU64| value.load(Relaxed);
    let stats = &endpoint.stats;
    let requests = endpoint.host.tally.counts();
    // Requests wait for connections in the request's own task, not in a queue of the endpoint: none are pending.
    [
        ("cx_active", read(&stats.connections_active), true),
        ("cx_connect_fail", read(&stats.connect_fail), false),
        ("cx_total", read(&stats.connections), false),
        ("rq_active", requests.in_progress(), true),
        ("rq_error", requests.failed, false),
        ("rq_pending_active", 0, true),
        ("rq_success", requests.succeeded, false),
        ("rq_total", requests.issued, false),
    ]
}

/// Parts of a locality.
const PLACE: [&str; 3] = ["region", "zone", "sub_zone"];

/// As `envoy.config.core.v3.Locality`.
fn locality(endpoint: &Endpoint) -> Value {
    let parts = PLACE.into_iter().zip(&*endpoint.place);
    let said = parts.filter(|(_, name)| !name.is_empty());
    said.map(|(part, name)| (part.to_owned(), json!(name)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// Envoy's flags, in its order.
fn health_flags(endpoint: &Endpoint) -> Vec<&'static str> {
    let mut flags = Vec::new();
    let live = endpoint.live.load();
    if endpoint.via != Via::Plain {
        match live.state.health {
            Health::Healthy => {}
            Health::Dead | Health::Unhealthy => flags.push("/failed_active_hc"),
            Health::Draining => flags.push("/eds_status_draining"),
            Health::Unknown => flags.push("/pending_active_hc"),
        }
        if !live.heard && live.state.health != Health::Unknown {
            flags.push("/active_hc_timeout");
        }
    }
    let host = &endpoint.host;
    if host.has(Host::FAILED_ACTIVE_HC) {
        flags.push("/failed_active_hc");
    }
    if endpoint.is_inhibited() || host.has(Host::FAILED_OUTLIER_CHECK) {
        flags.push("/failed_outlier_check");
    }
    let more = [
        (
            endpoint.health_status == HealthStatus::Unhealthy,
            "/failed_eds_health",
        ),
        (host.has(Host::DEGRADED_ACTIVE_HC), "/degraded_active_hc"),
        (
            endpoint.health_status == HealthStatus::Degraded,
            "/degraded_eds_health",
        ),
        (host.has(Host::PENDING_ACTIVE_HC), "/pending_active_hc"),
        (host.has(Host::ACTIVE_HC_TIMEOUT), "/active_hc_timeout"),
        (
            endpoint.health_status == HealthStatus::Draining,
            "/eds_status_draining",
        ),
    ];
    for (_, flag) in more.into_iter().filter(|(is_set, _)| *is_set) {
        if !flags.contains(&flag) {
            flags.push(flag);
        }
    }
    flags
}

fn via(endpoint: &Endpoint) -> &'static str {
    match endpoint.via {
        Via::Local => "local",
        Via::Peer => "peer",
        Via::Plain => "plain",
    }
}

/// `cluster::address::stat::value`, one a line.
pub(super) fn text(clusters: &[Arc<ClusterView>]) -> String {
    let mut out = String::new();
    for cluster in clusters {
        let name = &cluster.name;
        line(&mut out, format_args!("{name}::observability_name::{name}"));
        for (priority, label) in [(Priority::Default, "default"), (Priority::High, "high")] {
            for (key, max) in limits(cluster, priority) {
                line(
                    &mut out,
                    format_args!("{name}::{label}_priority::{key}::{max}"),
                );
            }
        }
        line(&mut out, format_args!("{name}::added_via_api::false"));
        for endpoint in &cluster.endpoints {
            let mut put = |key: &str, value: &dyn Display| {
                line(
                    &mut out,
                    format_args!("{name}::{}::{key}::{value}", endpoint.address),
                );
            };
            endpoint_lines(endpoint, &mut put);
        }
    }
    out
}

/// Of circuit breakers.
fn limits(cluster: &ClusterView, priority: Priority) -> [(&'static str, u64); 4] {
    let breaker = cluster.breakers.of(priority);
    [
        ("max_connections", breaker.connections.max()),
        ("max_pending_requests", breaker.pending.max()),
        ("max_requests", breaker.requests.max()),
        ("max_retries", breaker.retries_max()),
    ]
}

fn endpoint_lines(endpoint: &Endpoint, put: &mut dyn FnMut(&str, &dyn Display)) {
    for (key, value, _) in stats(endpoint) {
        put(key, &value);
    }
    put("hostname", &endpoint.hostname);
    let flags = health_flags(endpoint).concat();
    put(
        "health_flags",
        &if flags.is_empty() {
            "healthy"
        } else {
            flags.as_str()
        },
    );
    put("weight", &endpoint.weight);
    for (part, name) in PLACE.into_iter().zip(&*endpoint.place) {
        put(part, &clean(name));
    }
    put("canary", &false);
    put("priority", &endpoint.priority);
    put("success_rate", &-1);
    put("local_origin_success_rate", &-1);
    own_lines(endpoint, put);
}

fn own_lines(endpoint: &Endpoint, put: &mut dyn FnMut(&str, &dyn Display)) {
    let live = endpoint.live.load();
    let (state, load) = (&live.state, &live.load);
    put("engine_id", &endpoint.id);
    put("via", &via(endpoint));
    put("engine_kind", &state.kind.as_str());
    put("engine_version", &clean(&state.version));
    put("role", &state.role.as_str());
    put("bootstrap", &clean(&state.bootstrap));
    put("numerics", &clean(&state.numerics));
    for model in &state.models {
        put("model", &clean(&model.id));
    }
    put("health", &state.health.as_str());
    put("health_reason", &clean(&state.reason));
    put("heard", &live.heard);
    put("kv_events", &state.kv_events);
    put("kv_block_tokens", &state.block_tokens);
    put("kv_blocks", &state.kv_blocks);
    put("active_requests", &load.active_requests);
    put("active_prefill_tokens", &load.active_prefill_tokens);
    put("active_blocks", &load.active_blocks);
    put("engine_running", &load.running);
    put("engine_waiting", &load.waiting);
    put("engine_kv_usage", &load.kv_usage);
    put(
        "own_prefill_tokens",
        &endpoint.stats.prefill_tokens.load(Relaxed),
    );
}

/// What an engine says of itself stays on its line.
fn clean(text: &str) -> String {
    text.replace(char::is_control, " ")
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(out, "{text}").expect("invariant: a String takes all");
}

/// `envoy.admin.v3.Clusters`, with an object `outrigger` more in each host.
pub(super) fn json(clusters: &[Arc<ClusterView>]) -> Value {
    let statuses = clusters.iter().map(|cluster| {
        let hosts: Vec<Value> = cluster
            .endpoints
            .iter()
            .map(|endpoint| host_status(endpoint))
            .collect();
        json!({
            "name": &*cluster.name,
            "observability_name": &*cluster.name,
            "added_via_api": false,
            "host_statuses": hosts,
        })
    });
    json!({"cluster_statuses": statuses.collect::<Vec<_>>()})
}

fn host_status(endpoint: &Endpoint) -> Value {
    let stats = stats(endpoint).map(|(name, value, is_gauge)| {
        // As protobuf's JSON: 64-bit numbers are strings, and COUNTER is the default that is left out.
        let mut stat = json!({"name": name, "value": value.to_string()});
        if is_gauge {
            stat["type"] = "GAUGE".into();
        }
        stat
    });
    json!({
        "address": address(&endpoint.address),
        "hostname": &*endpoint.hostname,
        "stats": stats,
        "health_status": health_status(endpoint),
        "weight": endpoint.weight,
        "priority": endpoint.priority,
        "locality": locality(endpoint),
        "outrigger": own(endpoint),
    })
}

fn health_status(endpoint: &Endpoint) -> Value {
    let mut status = json!({"eds_health_status": "HEALTHY"});
    for flag in health_flags(endpoint) {
        match flag {
            "/eds_status_draining" => status["eds_health_status"] = "DRAINING".into(),
            "/failed_eds_health" => status["eds_health_status"] = "UNHEALTHY".into(),
            "/degraded_eds_health" => status["eds_health_status"] = "DEGRADED".into(),
            "/failed_active_hc" => status["failed_active_health_check"] = true.into(),
            other => status[other.trim_start_matches('/')] = true.into(),
        }
    }
    status
}

fn own(endpoint: &Endpoint) -> Value {
    let live = endpoint.live.load();
    let (state, load) = (&live.state, &live.load);
    json!({
        "engine_id": &*endpoint.id.0,
        "via": via(endpoint),
        "engine_kind": state.kind.as_str(),
        "engine_version": state.version,
        "role": state.role.as_str(),
        "bootstrap": state.bootstrap,
        "numerics": state.numerics,
        "models": state.models.iter().map(|model| model.id.as_str()).collect::<Vec<_>>(),
        "health": state.health.as_str(),
        "health_reason": state.reason,
        "heard": live.heard,
        "kv_events": state.kv_events,
        "kv_block_tokens": state.block_tokens,
        "kv_blocks": state.kv_blocks,
        "load": {
            "active_requests": load.active_requests,
            "active_prefill_tokens": load.active_prefill_tokens,
            "active_blocks": load.active_blocks,
            "running": load.running,
            "waiting": load.waiting,
            "kv_usage": load.kv_usage,
            "engine_age_ms": load.engine_age.map(|age| age.as_millis() as u64),
            "told_ms_ago": live.load_at.elapsed().as_millis() as u64,
        },
        "own_prefill_tokens": endpoint.stats.prefill_tokens.load(Relaxed),
    })
}
