//! Answers "which handler is this path": the table of endpoints, access by API key, and the small endpoints.

use std::sync::{Arc, PoisonError};
use std::time::Instant;

use serde::Serialize;
use serde_json::Value;

use super::api::{self, ApiError, to_json};
use super::chat::{read_ending, read_messages};
use super::config::Profile;
use super::engine::{Engine, unix_s};
use super::fault::Fault;
use super::http::{Body, Request, Response};
use super::metrics_page::PageNames;
use super::template::render;
use super::{chat, completions, generate, messages, responses, sglang, stored, trtllm};

const VERSION: &str = "0.32.0";
/// Recorded `/server_info`, whose model and sizes are replaced.
const SERVER_INFO: &str = include_str!("../../fixtures/http-vllm-0.32.0/get_server_info.body");

/// An endpoint's place in the table.
struct Route {
    path: &'static str,
    /// `GET`, `POST`, or both.
    allow: &'static str,
    /// Whether `/metrics` counts it by handler.
    counted: bool,
    /// Exists in development mode only.
    dev: bool,
}

const fn route(path: &'static str, allow: &'static str) -> Route {
    Route {
        path,
        allow,
        counted: false,
        dev: false,
    }
}

const fn counted(path: &'static str, allow: &'static str) -> Route {
    Route {
        counted: true,
        ..route(path, allow)
    }
}

const fn dev(path: &'static str, allow: &'static str) -> Route {
    Route {
        dev: true,
        ..route(path, allow)
    }
}

const ROUTES: &[Route] = &[
    route("/health", "GET"),
    route("/ping", "GET, POST"),
    route("/version", "GET"),
    route("/load", "GET"),
    route("/metrics", "GET"),
    route("/kv_event_sources", "GET"),
    counted("/v1/models", "GET"),
    counted("/tokenize", "POST"),
    counted("/detokenize", "POST"),
    counted("/v1/chat/completions", "POST"),
    counted("/v1/chat/completions/render", "POST"),
    counted("/v1/completions", "POST"),
    counted("/v1/completions/render", "POST"),
    counted("/v1/messages", "POST"),
    counted("/inference/v1/generate", "POST"),
    counted("/v1/responses", "POST"),
    counted("/v1/responses/render", "POST"),
    counted("/v1/messages/render", "POST"),
    counted("/v1/messages/count_tokens", "POST"),
    counted("/v1/chat/completions/batch", "POST"),
    counted("/v1/chat/completions/derender", "POST"),
    counted("/v1/completions/derender", "POST"),
    counted("/inference/v1/abort_requests", "POST"),
    counted("/v1/embeddings", "POST"),
    dev("/reset_prefix_cache", "POST"),
    dev("/server_info", "GET"),
    dev("/is_sleeping", "GET"),
    dev("/is_paused", "GET"),
    dev("/sleep", "POST"),
    dev("/wake_up", "POST"),
    dev("/pause", "POST"),
    dev("/resume", "POST"),
    route("/sim/fault", "GET, POST, DELETE"),
];

/// Answers one request.
pub(crate) async fn answer(engine: Arc<Engine>, request: Request) -> Response {
    let began = Instant::now();
    let response = match refuse_stranger(&engine, &request) {
        Some(refusal) => refusal,
        None => dispatch(&engine, &request)
            .await
            .unwrap_or_else(|refusal| refusal),
    };
    if let Some(route) = ROUTES
        .iter()
        .find(|route| route.counted && route.path == request.path)
        .filter(|_| engine.config.profile == Profile::Vllm)
    {
        let sent = match &response.body {
            Body::Full(body) => body.len(),
            Body::Stream(_) | Body::Broken(_) => 0,
        };
        let bytes = (request.body.len(), sent);
        let seconds = began.elapsed().as_secs_f64();
        engine.scheduler().metrics.http(
            route.path,
            &request.method,
            response.status,
            bytes,
            seconds,
        );
    }
    response
}

/// vLLM's key guards `/v1` and `/inference` alone, outside the CORS layer.
fn refuse_stranger(engine: &Engine, request: &Request) -> Option<Response> {
    let key = engine.config.api_key.as_deref()?;
    let guarded = ["/v1", "/v2", "/inference"]
        .iter()
        .any(|prefix| request.path.starts_with(prefix));
    let given = request
        .header("authorization")
        .and_then(|value| value.strip_prefix("Bearer "));
    let refused = guarded && request.method != "OPTIONS" && given != Some(key);
    refused.then(|| Response {
        vary: false,
        ..Response::json(401, r#"{"error":"Unauthorized"}"#.to_owned())
    })
}

async fn dispatch(engine: &Arc<Engine>, request: &Request) -> Result<Response, Response> {
    match engine.config.profile {
        Profile::Vllm => {}
        Profile::Sglang => return sglang::answer(engine, request).await,
        Profile::Trtllm => return trtllm::answer(engine, request).await,
    }
    if request.path.starts_with("/v1/responses/") && request.path != "/v1/responses/render" {
        return stored::answer(engine, request);
    }
    let route = ROUTES
        .iter()
        .find(|route| route.path == request.path && (!route.dev || engine.config.dev_mode));
    let Some(route) = route else {
        return Ok(Response::json(404, r#"{"detail":"Not Found"}"#.to_owned()));
    };
    if !route
        .allow
        .split(", ")
        .any(|method| method == request.method)
    {
        let refusal = Response::json(405, r#"{"detail":"Method Not Allowed"}"#.to_owned());
        return Ok(Response {
            allow: Some(route.allow),
            ..refusal
        });
    }
    match route.path {
        "/v1/chat/completions" => chat::completions(engine, request).await,
        "/v1/completions" => completions::completions(engine, request).await,
        "/v1/responses" => responses::responses(engine, request).await,
        "/v1/messages" => messages::messages(engine, request).await,
        "/inference/v1/generate" => generate::generate(engine, request).await,
        "/v1/chat/completions/render" => chat::render_endpoint(engine, request),
        "/v1/completions/render" => completions::render_endpoint(engine, request),
        "/tokenize" => tokenize(engine, request),
        "/detokenize" => detokenize(engine, request),
        "/v1/models" => Ok(Response::json(200, models(engine))),
        "/sim/fault" => fault(engine, request),
        "/reset_prefix_cache" => Ok(reset_prefix_cache(engine, request)),
        path => Ok(small(engine, path).ok_or_else(|| ApiError::not_implemented(path))?),
    }
}

/// Endpoints that take nothing and say one thing.
fn small(engine: &Engine, path: &str) -> Option<Response> {
    let json = |body: String| Some(Response::json(200, body));
    match path {
        "/health" | "/ping" if engine.is_core_dead() => Some(Response {
            status: 503,
            ..Response::empty()
        }),
        "/health" | "/ping" => Some(Response::empty()),
        "/version" => json(format!(r#"{{"version":"{VERSION}"}}"#)),
        "/load" => {
            let tracked = engine.config.server_load_tracking;
            let load = if tracked { engine.in_flight().len() } else { 0 };
            json(format!(r#"{{"server_load":{load}}}"#))
        }
        "/metrics" => Some(Response {
            content_type: Some("text/plain; version=1.0.0; charset=utf-8"),
            ..Response::json(200, metrics(engine))
        }),
        "/kv_event_sources" => json(
            engine
                .event_sources
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        ),
        "/server_info" => json(server_info(engine)),
        "/is_sleeping" => json(format!(r#"{{"is_sleeping":{}}}"#, is_asleep(engine))),
        "/sleep" => Some(sleep(engine, true)),
        "/wake_up" => Some(sleep(engine, false)),
        "/is_paused" => json(r#"{"is_paused":false}"#.to_owned()),
        _ => None,
    }
}

fn sleep_state(state: &str) -> String {
    format!(r#"vllm:engine_sleep_state{{sleep_state="{state}"}}"#)
}

fn is_asleep(engine: &Engine) -> bool {
    let state = sleep_state("weights_offloaded");
    engine.scheduler().metrics.total(&state) > 0.0
}

/// Says that it is at level 1 of sleep, or awake. It has no weights to give up, and goes on generating.
fn sleep(engine: &Engine, is_asleep: bool) -> Response {
    let mut scheduler = engine.scheduler();
    for (state, holds) in [("awake", !is_asleep), ("weights_offloaded", is_asleep)] {
        let value = f64::from(u8::from(holds));
        scheduler.metrics.set(&sleep_state(state), value);
    }
    Response::empty()
}

fn metrics(engine: &Engine) -> String {
    let mut scheduler = engine.scheduler();
    let (waiting, running, usage) = scheduler.load();
    scheduler
        .metrics
        .set("vllm:num_requests_running", running as f64);
    scheduler
        .metrics
        .set("vllm:num_requests_waiting", waiting as f64);
    scheduler.metrics.set(
        r#"vllm:num_requests_waiting_by_reason{reason="capacity"}"#,
        waiting as f64,
    );
    scheduler.metrics.set("vllm:kv_cache_usage_perc", usage);
    scheduler.metrics.render(&PageNames {
        model: &engine.config.model,
        block_size: engine.config.block_size,
        blocks: engine.config.kv_blocks,
        tokens_per_request_max: engine.config.max_model_len,
    })
}

pub(crate) fn root(engine: &Engine) -> String {
    let path = engine.config.model_path.as_ref();
    path.map_or_else(
        || format!("/models/{}", engine.config.model),
        |path| path.display().to_string(),
    )
}

fn server_info(engine: &Engine) -> String {
    let config = &engine.config;
    SERVER_INFO
        .replace(
            "max_seq_len=2048",
            &format!("max_seq_len={}", config.max_model_len),
        )
        .replace(
            "served_model_name=smollm2",
            &format!("served_model_name={}", config.model),
        )
        .replace("/models/smollm2", &root(engine))
}

#[derive(Serialize)]
struct Models<'a> {
    object: &'static str,
    data: [ModelCard<'a>; 1],
}

#[derive(Serialize)]
struct ModelCard<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<()>,
    max_model_len: usize,
    permission: [Permission; 1],
}

#[derive(Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "the wire format has them")]
struct Permission {
    id: String,
    object: &'static str,
    created: u64,
    allow_create_engine: bool,
    allow_sampling: bool,
    allow_logprobs: bool,
    allow_search_indices: bool,
    allow_view: bool,
    allow_fine_tuning: bool,
    organization: &'static str,
    group: Option<()>,
    is_blocking: bool,
}

fn models(engine: &Engine) -> String {
    let created = unix_s() as u64;
    let permission = Permission {
        id: format!("modelperm-{}", engine.made_up_id()),
        object: "model_permission",
        created,
        allow_create_engine: false,
        allow_sampling: true,
        allow_logprobs: true,
        allow_search_indices: false,
        allow_view: true,
        allow_fine_tuning: false,
        organization: "*",
        group: None,
        is_blocking: false,
    };
    let card = ModelCard {
        id: &engine.config.model,
        object: "model",
        created,
        owned_by: "vllm",
        root: root(engine),
        parent: None,
        max_model_len: engine.config.max_model_len,
        permission: [permission],
    };
    to_json(&Models {
        object: "list",
        data: [card],
    })
}

#[derive(Serialize)]
struct Tokenized {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

fn tokenize(engine: &Engine, request: &Request) -> Result<Response, Response> {
    let fields = api::read_fields(request)?;
    api::check_model(engine, &fields)?;
    api::check_simulated(&fields, &["tools"])?;
    let tokens = match fields.get("prompt") {
        Some(Value::String(prompt)) => engine.tokenizer.encode(prompt),
        Some(_) => return Err(ApiError::wrong_type("prompt", "string").into()),
        None if fields.contains_key("messages") => engine
            .tokenizer
            .encode(&render(&read_messages(&fields)?, read_ending(&fields)?)),
        None => return Err(ApiError::missing("prompt", &fields).into()),
    };
    let strs = || {
        tokens
            .iter()
            .map(|&id| engine.tokenizer.letters(id).to_owned())
            .collect()
    };
    Ok(Response::json(
        200,
        to_json(&Tokenized {
            count: tokens.len(),
            max_model_len: engine.config.max_model_len,
            token_strs: api::flag(&fields, "return_token_strs").then(strs),
            tokens,
        }),
    ))
}

fn detokenize(engine: &Engine, request: &Request) -> Result<Response, Response> {
    #[derive(Serialize)]
    struct Detokenized {
        prompt: String,
    }
    let fields = api::read_fields(request)?;
    api::check_model(engine, &fields)?;
    let tokens = fields
        .get("tokens")
        .ok_or_else(|| ApiError::missing("tokens", &fields))?;
    let tokens = api::token_ids(tokens).ok_or_else(|| ApiError::wrong_type("tokens", "list"))?;
    Ok(Response::json(
        200,
        to_json(&Detokenized {
            prompt: engine.tokenizer.decode(&tokens),
        }),
    ))
}

fn reset_prefix_cache(engine: &Engine, request: &Request) -> Response {
    let preempt = request
        .query
        .split('&')
        .any(|pair| pair.eq_ignore_ascii_case("reset_running_requests=true"));
    let success = engine.scheduler().reset_cache(preempt);
    Response::json(200, format!(r#"{{"success":{success}}}"#))
}

/// `POST` arms a fault, `GET` lists those armed, `DELETE` disarms all.
pub(crate) fn fault(engine: &Engine, request: &Request) -> Result<Response, Response> {
    match request.method.as_str() {
        "POST" => {
            let fault: Fault = serde_json::from_slice(&request.body)
                .map_err(|error| ApiError::new(400, "BadRequestError", error.to_string(), None))?;
            if fault.count == 0 {
                return Err(ApiError::value("count must be at least 1, got 0.", "count", 0).into());
            }
            engine.fault(fault);
        }
        "DELETE" => engine.faults.clear(),
        _ => {}
    }
    Ok(Response::json(200, to_json(&engine.faults.list())))
}
