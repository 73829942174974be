//! What of the engines' HTTP surface the fleet shows: which paths are refused, which ones the proxy answers itself.
//!
//! Development and admin paths of engines are refused unless allowed by name. `/v1/models` is the union over the
//! fleet; a proxy with no engine beside it answers `/health`, `/ping`, `/version` and `/metrics` itself.

use crate::{
    body::{RequestBody, ResponseBody, full},
    endpoints::{Endpoint, Via},
    error::{Error, Flag, Origin},
    filter::{Context, Handled, HttpFilter, Next},
    registry,
    services::Services,
};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use serde::Deserialize;
use std::{collections::HashSet, future::ready, sync::Arc};

/// Our own type.
pub const TYPE_URL: &str = "type.googleapis.com/outrigger.filters.http.engine_api.v1.Config";

/// First path segments of what engines offer to developers and administrators (vLLM 0.32 with and without its
/// development mode, SGLang 0.5.23, TensorRT-LLM 1.2).
const ADMIN_SEGMENTS: &[&str] = &[
    // vLLM
    "reset_prefix_cache",
    "reset_mm_cache",
    "reset_encoder_cache",
    "collective_rpc",
    "sleep",
    "wake_up",
    "is_sleeping",
    "release_kv_cache_memory",
    "pause",
    "resume",
    "is_paused",
    "abort_requests",
    "server_info",
    "scale_elastic_ep",
    "is_scaling_elastic_ep",
    "fault_tolerance",
    "kv_event_sources",
    "start_profile",
    "stop_profile",
    "update_weights",
    "start_weight_update",
    "start_draft_weight_update",
    "finish_weight_update",
    "init_weight_transfer_engine",
    "shutdown_weight_transfer_engine",
    "weight_checker",
    "weight_info",
    "get_world_size",
    // SGLang
    "flush_cache",
    "pause_generation",
    "continue_generation",
    "release_memory_occupation",
    "resume_memory_occupation",
    "abort_request",
    "load_lora_adapter",
    "unload_lora_adapter",
    "load_lora_adapter_from_tensors",
    "open_session",
    "close_session",
    "hicache",
    "set_internal_state",
    "slow_down",
    "pd_role_switch",
    "get_server_info",
    "begin_weight_update",
    "end_weight_update",
    "update_weights_from_disk",
    "update_weights_from_tensor",
    "update_weights_from_distributed",
    "update_weights_from_ipc",
    "update_weight_version",
    "init_weights_update_group",
    "destroy_weights_update_group",
    "init_weights_send_group_for_remote_instance",
    "send_weights_to_remote_instance",
    "remote_instance_transfer_engine_info",
    "get_remote_instance_transfer_engine_info",
    "get_weights_by_name",
    "weights_checker",
    "add_external_corpus",
    "remove_external_corpus",
    "list_external_corpora",
    "start_expert_distribution_record",
    "stop_expert_distribution_record",
    "dump_expert_distribution_record",
    "configure_logging",
    "freeze_gc",
    "get_hicache_l3_cache_layout",
    "set_trace_level",
    "clear_hicache_storage_backend",
    // TensorRT-LLM
    "kv_cache_events",
    "perf_metrics",
    "release_memory",
    "resume_memory",
    "_resource_governor",
    "_internal",
];

/// Whole paths of the same kind.
const ADMIN_PATHS: &[&str] = &[
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/inference/v1/abort_requests",
    "/v1/kv_cache_hints",
];

/// Configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Admin paths that may pass, as first path segment (`flush_cache`) or whole path (`/v1/load_lora_adapter`).
    pub allow: Vec<String>,
    /// Answer `/v1/models` for the fleet, and health for a proxy without engines. Off on inbound chains.
    pub fleet_answers: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            allow: Vec::new(),
            fleet_answers: true,
        }
    }
}

/// The filter.
pub struct EngineApi {
    services: Services,
    fleet_answers: bool,
    refused_segments: HashSet<&'static str>,
    refused_paths: HashSet<&'static str>,
}

/// The registry's constructor.
///
/// # Errors
/// The configuration has an unknown field, or allows what is not refused.
pub fn factory(
    value: &serde_json::Value,
    services: &Services,
) -> Result<Arc<dyn HttpFilter>, String> {
    let config: Config = registry::parse(value)?;
    let mut refused_segments: HashSet<_> = ADMIN_SEGMENTS.iter().copied().collect();
    let mut refused_paths: HashSet<_> = ADMIN_PATHS.iter().copied().collect();
    for allowed in &config.allow {
        if !refused_segments.remove(allowed.as_str()) && !refused_paths.remove(allowed.as_str()) {
            return Err(format!(
                "allow: '{allowed}' is not among the paths that are refused"
            ));
        }
    }
    Ok(Arc::new(EngineApi {
        services: services.clone(),
        fleet_answers: config.fleet_answers,
        refused_segments,
        refused_paths,
    }))
}

impl HttpFilter for EngineApi {
    fn handle<'a>(
        &'a self,
        request: Request<RequestBody>,
        context: &'a mut Context,
        next: Next<'a>,
    ) -> Handled<'a> {
        // Nothing here waits, so it costs the rest of the chain no allocation.
        let path = request.uri().path();
        if self.refuses(path) {
            return Box::pin(ready(Err(refusal())));
        }
        let readable = matches!(*request.method(), Method::GET | Method::HEAD);
        if let Some(response) = (self.fleet_answers && readable)
            .then(|| self.answer(path, context))
            .flatten()
        {
            context.log.details = "engine_api".into();
            return Box::pin(ready(Ok(response)));
        }
        next.run(request, context)
    }
}

impl EngineApi {
    fn refuses(&self, path: &str) -> bool {
        // Percent-encoded letters and doubled slashes must not get past the list.
        let decoded;
        let path = if path.contains('%') || path.contains("//") {
            decoded = normalised(path);
            decoded.as_str()
        } else {
            path
        };
        let trimmed = path.strip_prefix('/').unwrap_or(path);
        let segment = trimmed.split('/').next().unwrap_or_default();
        self.refused_segments.contains(segment)
            || self.refused_paths.contains(path.trim_end_matches('/'))
    }

    fn answer(&self, path: &str, context: &Context) -> Option<Response<ResponseBody>> {
        if !matches!(
            path,
            "/v1/models" | "/health" | "/ping" | "/version" | "/metrics" | "/live" | "/ready"
        ) {
            return None;
        }
        let view = self.services.endpoints.view(&context.route.cluster)?;
        let alive: Vec<_> = view
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.is_alive())
            .cloned()
            .collect();
        let engines = alive
            .iter()
            .filter(|endpoint| !endpoint.live.load().state.models.is_empty());
        if path == "/v1/models" {
            // An unknown kind of engine answers for itself.
            return (engines.count() > 0).then(|| json(StatusCode::OK, models(&alive)));
        }
        let gateway = !view
            .endpoints
            .iter()
            .any(|endpoint| endpoint.via != Via::Peer);
        gateway.then(|| gateway_answer(path, !alive.is_empty()))
    }
}

fn refusal() -> Error {
    Error::new(
        Origin::Downstream,
        Flag::DropOverload,
        StatusCode::FORBIDDEN,
        "engine_api_refused",
        "this path administers an engine and is not open through the proxy",
    )
}

/// Percent-decoded, with runs of slashes as one.
fn normalised(path: &str) -> String {
    let bytes = path.as_bytes();
    let mut out: Vec<u8> = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = (bytes[at] == b'%')
            .then(|| bytes.get(at + 1..at + 3))
            .flatten();
        let decoded =
            hex.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        let byte = decoded.unwrap_or(bytes[at]);
        at += if decoded.is_some() { 3 } else { 1 };
        if !(byte == b'/' && out.last() == Some(&b'/')) {
            out.push(byte);
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The union of the engines' own entries, the nearest engine's first; one entry a model.
fn models(alive: &[Arc<Endpoint>]) -> String {
    let mut seen = HashSet::new();
    let mut cards = Vec::new();
    let mut nearest: Vec<_> = alive.iter().collect();
    nearest.sort_by_key(|endpoint| endpoint.via != Via::Local);
    for endpoint in nearest {
        let live = endpoint.live.load();
        for model in &live.state.models {
            if seen.insert(model.id.clone()) {
                cards.push(model.card.clone());
            }
        }
    }
    format!("{{\"object\":\"list\",\"data\":[{}]}}", cards.join(","))
}

fn gateway_answer(path: &str, healthy: bool) -> Response<ResponseBody> {
    match path {
        "/version" => json(
            StatusCode::OK,
            format!(
                "{{\"version\":\"outrigger/{}\"}}",
                env!("CARGO_PKG_VERSION")
            ),
        ),
        "/metrics" => {
            let mut response = Response::new(full(
                "# This is a gateway: engines have metrics of their own; the proxy's are on its admin listener.\n",
            ));
            response.headers_mut().insert(
                header::CONTENT_TYPE,
                HeaderValue::from_static("text/plain; version=0.0.4"),
            );
            response
        }
        _ => {
            let mut response =
                Response::new(full(if healthy { "" } else { "no engine is healthy" }));
            if !healthy {
                *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            }
            response
        }
    }
}

fn json(status: StatusCode, text: String) -> Response<ResponseBody> {
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

#[cfg(test)]
mod tests {
    use super::normalised;

    #[test]
    fn encoded_paths_are_seen_through() {
        assert_eq!(normalised("/%73leep"), "/sleep");
        assert_eq!(normalised("//sleep"), "/sleep");
        assert_eq!(normalised("/a%2"), "/a%2");
        assert_eq!(normalised("/%2fsleep"), "/sleep");
    }
}
