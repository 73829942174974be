//! Answers "what would SGLang 0.5.23 do": its paths, its small endpoints, and its words for what goes wrong.
//!
//! Everything in `fixtures/http-sglang-0.5.23` is answered as recorded. Not recorded, and from the reference: `/tokenize`,
//! `/detokenize`, the error event of a stream, whole completions, `--enable-cache-report`. Refused with 501: logprobs, tools,
//! structured output, media, the Responses and Messages APIs, sessions, aborts by id. Of `/metrics` families and labels are
//! recorded; what is not counted here is 0. Of malformed JSON only the first line of the message is given. Text, cache and
//! time are those of the simulator, pages are its blocks; ending on SIGTERM is abrupt.

use std::sync::{Arc, PoisonError};

use futures_util::stream;
use serde_json::Value;

use super::api::{self, ApiError, Fields, to_json};
use super::chat::{read_ending, read_messages};
use super::engine::Engine;
use super::http::{Piece, Request, Response};
use super::template::render;
use super::{routes, sglang_generate, sglang_openai};

const SERVER_INFO: &str = include_str!("../../fixtures/http-sglang-0.5.23/get_server_info.body");
const MODEL_INFO: &str = include_str!("../../fixtures/http-sglang-0.5.23/get_get_model_info.body");
const LOADS: &str = include_str!("../../fixtures/http-sglang-0.5.23/get_v1_loads.body");
const METRICS: &str = include_str!("../../fixtures/http-sglang-0.5.23/get_metrics.body");
const FLUSHED: &str = include_str!("../../fixtures/http-sglang-0.5.23/flush_cache.body");
/// `kv_events` of the recorded server.
const EVENTS: &str = r#"{"publisher":"zmq","endpoint_host":"*","endpoint_port_base":5587,"topic":"kv-events","block_size":1,"dp_size":1,"replay_endpoint_port_base":5588}"#;

const ROUTES: &[(&str, &str)] = &[
    ("/health", "GET"),
    ("/health_generate", "GET"),
    ("/get_model_info", "GET"),
    ("/model_info", "GET"),
    ("/get_server_info", "GET"),
    ("/server_info", "GET"),
    ("/v1/loads", "GET"),
    ("/v1/models", "GET"),
    ("/metrics", "GET"),
    ("/flush_cache", "GET, POST"),
    ("/tokenize", "POST"),
    ("/v1/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/v1/detokenize", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/generate", "POST"),
    ("/abort_request", "POST"),
    ("/v1/responses", "POST"),
    ("/v1/messages", "POST"),
    ("/sim/fault", "GET, POST, DELETE"),
];

/// Answers one request.
pub(crate) async fn answer(engine: &Arc<Engine>, request: &Request) -> Result<Response, Response> {
    let route = ROUTES.iter().find(|(path, _)| *path == request.path);
    let Some((path, allow)) = route else {
        return Ok(Response::json(404, r#"{"detail":"Not Found"}"#.to_owned()));
    };
    if !allow.split(", ").any(|method| method == request.method) {
        let refusal = Response::json(405, r#"{"detail":"Method Not Allowed"}"#.to_owned());
        return Ok(Response {
            allow: Some(allow),
            ..refusal
        });
    }
    match *path {
        "/v1/chat/completions" => sglang_openai::chat(engine, request).await.map_err(refusal),
        "/v1/completions" => sglang_openai::completions(engine, request)
            .await
            .map_err(refusal),
        "/generate" => sglang_generate::generate(engine, request)
            .await
            .map_err(refusal),
        "/tokenize" | "/v1/tokenize" => tokenize(engine, request).map_err(refusal),
        "/detokenize" | "/v1/detokenize" => detokenize(engine, request).map_err(refusal),
        "/sim/fault" => routes::fault(engine, request),
        path => small(engine, path).ok_or_else(|| refusal(ApiError::not_implemented(path))),
    }
}

/// The error's body, as it stands alone or in an event.
pub(crate) fn error_body(error: &ApiError) -> String {
    let (status, kind, message) = error.parts();
    format!(
        r#"{{"object":"error","message":{},"type":"{kind}","param":null,"code":{status}}}"#,
        to_json(&message)
    )
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "it is what `map_err` hands over"
)]
pub(crate) fn refusal(error: ApiError) -> Response {
    Response::json(error.parts().0, error_body(&error))
}

/// The error event of a stream, and its end.
pub(crate) fn error_events(error: &ApiError) -> [String; 2] {
    let event = format!("data: {{\"error\":{}}}\n\n", error_body(error));
    [event, super::feed::DONE.to_owned()]
}

/// Endpoints that take nothing and say one thing.
fn small(engine: &Engine, path: &str) -> Option<Response> {
    let json = |body: String| Some(Response::json(200, body));
    let text = |status, body: &str| {
        Some(Response {
            content_type: None,
            ..Response::json(status, body.to_owned())
        })
    };
    match path {
        "/health" | "/health_generate" if engine.is_core_dead() => text(503, ""),
        "/health" | "/health_generate" => Some(Response::empty()),
        "/get_model_info" | "/model_info" => json(model_info(engine)),
        "/get_server_info" | "/server_info" => json(server_info(engine)),
        "/v1/models" => json(models(engine)),
        "/v1/loads" => json(loads(engine)),
        "/metrics" => {
            let page = stream::iter([Piece::Data(metrics(engine))]);
            Some(Response {
                content_type: Some("text/plain; version=0.0.4; charset=utf-8"),
                ..Response::events(page)
            })
        }
        "/flush_cache" => text(if engine.flush_cache() { 200 } else { 400 }, FLUSHED),
        _ => None,
    }
}

fn side(engine: &Engine) -> &'static str {
    let bootstrap = engine.config.bootstrap.as_ref();
    bootstrap.map_or("null", |bootstrap| bootstrap.side.as_str())
}

fn model_info(engine: &Engine) -> String {
    MODEL_INFO
        .replace(
            r#""disaggregation_mode":"null""#,
            &format!(r#""disaggregation_mode":"{}""#, side(engine)),
        )
        .replace("/models/smollm2", &routes::root(engine))
        .replace("\"smollm2\"", &to_json(&engine.config.model))
}

/// Tokens that all pages hold.
fn tokens_max(engine: &Engine) -> usize {
    (engine.config.kv_blocks - 1) * engine.config.block_size
}

fn server_info(engine: &Engine) -> String {
    let config = &engine.config;
    let events = engine.event_sources.lock();
    let events = events.unwrap_or_else(PoisonError::into_inner).clone();
    let port = match engine.transfer_port() {
        0 => 8998,
        port => port,
    };
    SERVER_INFO
        .replace(EVENTS, &events)
        .replace(
            r#""disaggregation_mode":"null""#,
            &format!(r#""disaggregation_mode":"{}""#, side(engine)),
        )
        .replace(
            r#""disaggregation_bootstrap_port":8998"#,
            &format!(r#""disaggregation_bootstrap_port":{port}"#),
        )
        .replace(
            r#""context_length":2048"#,
            &format!(r#""context_length":{}"#, config.max_model_len),
        )
        .replace(
            r#""max_total_num_tokens":8192"#,
            &format!(r#""max_total_num_tokens":{}"#, tokens_max(engine)),
        )
        .replace(
            r#""page_size":1,"#,
            &format!(r#""page_size":{},"#, config.block_size),
        )
        .replace("/models/smollm2", &routes::root(engine))
        .replace("\"smollm2\"", &to_json(&config.model))
}

/// `kv_events` of `/server_info`.
pub(crate) fn event_sources(
    config: &super::Config,
    events: Option<std::net::SocketAddr>,
    replay: Option<std::net::SocketAddr>,
) -> String {
    let bound = match (&config.events, events) {
        (super::Events::Connect(address), _) => address
            .rsplit_once(':')
            .map(|(host, port)| (host.to_owned(), port.to_owned())),
        (_, Some(bound)) => Some(("*".to_owned(), bound.port().to_string())),
        (_, None) => None,
    };
    let Some((host, port)) = bound else {
        return "null".to_owned();
    };
    let replay = replay.map_or(String::new(), |replay| {
        format!(r#","replay_endpoint_port_base":{}"#, replay.port())
    });
    let (topic, size) = (to_json(&config.topic), config.block_size);
    format!(
        r#"{{"publisher":"zmq","endpoint_host":"{host}","endpoint_port_base":{port},"topic":{topic},"block_size":{size},"dp_size":1{replay}}}"#
    )
}

fn models(engine: &Engine) -> String {
    let config = &engine.config;
    let (model, created) = (to_json(&config.model), super::engine::unix_s() as u64);
    // The name stands there for the path, unless a test needs the path.
    let root = match &config.model_path {
        Some(path) => to_json(&path.display().to_string()),
        None => model.clone(),
    };
    let length = config.max_model_len;
    format!(
        r#"{{"object":"list","data":[{{"id":{model},"object":"model","created":{created},"owned_by":"sglang","root":{root},"parent":null,"max_model_len":{length}}}]}}"#
    )
}

fn loads(engine: &Engine) -> String {
    let (waiting, running, usage) = engine.scheduler().load();
    let tokens = tokens_max(engine);
    [
        (
            r#""num_running_reqs":0"#,
            format!(r#""num_running_reqs":{running}"#),
        ),
        (
            r#""num_waiting_reqs":0"#,
            format!(r#""num_waiting_reqs":{waiting}"#),
        ),
        (
            r#""token_usage":0.0"#,
            format!(r#""token_usage":{usage:?}"#),
        ),
        (
            r#""max_total_num_tokens":8192"#,
            format!(r#""max_total_num_tokens":{tokens}"#),
        ),
        (
            r#""token_capacity":8192"#,
            format!(r#""token_capacity":{tokens}"#),
        ),
        (r#""mode":"null""#, format!(r#""mode":"{}""#, side(engine))),
    ]
    .iter()
    .fold(LOADS.to_owned(), |page, (recorded, ours)| {
        page.replace(recorded, ours)
    })
}

fn metrics(engine: &Engine) -> String {
    let scheduler = engine.scheduler();
    let (waiting, running, usage) = scheduler.load();
    let (open, _) = engine.rooms.count();
    let counted = |name: &str| scheduler.metrics.total(name);
    let kind = match side(engine) {
        "null" => "unified",
        side => side,
    };
    let value = |family: &str| match family {
        "sglang:num_running_reqs" => running as f64,
        "sglang:num_queue_reqs" => waiting as f64,
        "sglang:token_usage" | "sglang:full_token_usage" => usage,
        "sglang:max_total_num_tokens" => tokens_max(engine) as f64,
        "sglang:page_size" => engine.config.block_size as f64,
        "sglang:num_pages" => (engine.config.kv_blocks - 1) as f64,
        "sglang:context_len" => engine.config.max_model_len as f64,
        "sglang:num_prefill_bootstrap_queue_reqs" => open as f64,
        "sglang:prompt_tokens_total" => counted("vllm:prompt_tokens_total"),
        "sglang:generation_tokens_total" => counted("vllm:generation_tokens_total"),
        _ => 0.0,
    };
    let mut page = String::with_capacity(METRICS.len());
    for line in METRICS.lines() {
        match line.rsplit_once(' ') {
            Some((sample, _)) if !line.starts_with('#') => {
                let family = sample.split('{').next().unwrap_or_default();
                let sample = sample
                    .replace("\"smollm2\"", &to_json(&engine.config.model))
                    .replace("\"unified\"", &format!("\"{kind}\""));
                page.push_str(&format!("{sample} {:?}\n", value(family)));
            }
            _ => {
                page.push_str(line);
                page.push('\n');
            }
        }
    }
    page
}

fn tokenize(engine: &Engine, request: &Request) -> Result<Response, ApiError> {
    let fields = read_fields(request)?;
    let tokens = match fields.get("prompt") {
        Some(Value::String(prompt)) => engine.tokenizer.encode(prompt),
        Some(_) => return Err(ApiError::not_implemented("lists of prompts")),
        None => chat_prompt(engine, &fields)?,
    };
    let (count, length) = (tokens.len(), engine.config.max_model_len);
    let body = format!(
        r#"{{"tokens":{},"count":{count},"max_model_len":{length}}}"#,
        to_json(&tokens)
    );
    Ok(Response::json(200, body))
}

fn detokenize(engine: &Engine, request: &Request) -> Result<Response, ApiError> {
    let fields = read_fields(request)?;
    let tokens = fields.get("tokens").and_then(api::token_ids);
    let tokens =
        tokens.ok_or_else(|| ApiError::not_implemented("tokens that are no list of ids"))?;
    let text = to_json(&engine.tokenizer.decode(&tokens));
    Ok(Response::json(200, format!(r#"{{"text":{text}}}"#)))
}

/// The prompt of a chat.
pub(crate) fn chat_prompt(engine: &Engine, fields: &Fields) -> Result<Vec<u32>, ApiError> {
    let messages = read_messages(fields)?;
    let text = render(&messages, read_ending(fields)?);
    Ok(engine.tokenizer.encode(&text))
}

/// The body as a JSON object.
pub(crate) fn read_fields(request: &Request) -> Result<Fields, ApiError> {
    serde_json::from_slice(&request.body).map_err(|error: serde_json::Error| {
        let (at, what) = match error.is_eof() {
            true => (request.body.len(), "unexpected end of data"),
            false => (error.column(), "unexpected character"),
        };
        let message = format!(
            "1 validation error:\n  {{'type': 'json_invalid', 'loc': ('body', {at}), 'msg': 'JSON decode error', 'input': {{}}, 'ctx': {{'error': '{what}'}}}}"
        );
        ApiError::new(400, "Bad Request", message, None)
    })
}
