//! Answers "what would TensorRT-LLM 1.2 do", as far as its prefill and decode go: nothing was recorded, all is from the reference.
//!
//! `/v1/chat/completions` and `/v1/completions` in OpenAI's common fields, chunks included; unknown fields are errors; a stream whose
//! engine dies is cut off without a word. `disaggregated_params` as the reference has them: `context_only` keeps the blocks
//! (`Config::nixl` says how long) and tells of them, `generation_only` takes them. `/metrics` has no iterations, and `n`, logprobs, tools and structured output are refused with 501.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};

use super::api::{self, ApiError, Fields, StreamOptions, to_json};
use super::chat::{read_ending, read_messages};
use super::completions::check_vocabulary;
use super::engine::{Engine, unix_s};
use super::feed::{DONE, Events, Writer};
use super::http::{Piece, Request, Response};
use super::nixl::{self, Params, Transfer};
use super::scheduler::Output;
use super::sglang::{read_fields, refusal};
use super::sglang_serve::{Asked, Form, respond};
use super::template::render;
use super::{api::reasons, routes};

const VERSION: &str = "1.2.1";
/// `max_tokens` of completions that name none.
const MAX_TOKENS_DEFAULT: usize = 16;
const PARAMS: &str = "disaggregated_params";

const ROUTES: &[(&str, &str)] = &[
    ("/health", "GET"),
    ("/version", "GET"),
    ("/v1/models", "GET"),
    ("/metrics", "GET"),
    ("/kv_cache_events", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/sim/fault", "GET, POST, DELETE"),
];

/// Fields that requests may have here.
const FIELDS: &[&str] = &[
    "model",
    "messages",
    "prompt",
    "prompt_token_ids",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "seed",
    "top_p",
    "top_k",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "stream",
    "stream_options",
    "n",
    "cache_salt",
    "user",
    "add_generation_prompt",
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "response_format",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    PARAMS,
];

/// In a task of its own: it goes on reading for a client that left.
async fn kv_cache_events(engine: &Arc<Engine>) -> String {
    let engine = Arc::clone(engine);
    let drained = tokio::spawn(async move { engine.event_queue.drain().await });
    drained.await.unwrap_or_default()
}

/// Answers one request.
pub(crate) async fn answer(engine: &Arc<Engine>, request: &Request) -> Result<Response, Response> {
    let route = ROUTES.iter().find(|(path, _)| *path == request.path);
    let Some((path, allow)) = route else {
        return Ok(Response::json(404, r#"{"detail":"Not Found"}"#.to_owned()));
    };
    if !allow.split(", ").any(|method| method == request.method) {
        let body = r#"{"detail":"Method Not Allowed"}"#.to_owned();
        return Ok(Response::json(405, body));
    }
    let config = &engine.config;
    match *path {
        "/v1/chat/completions" => generate(engine, request, true).await.map_err(refusal),
        "/v1/completions" => generate(engine, request, false).await.map_err(refusal),
        "/sim/fault" => routes::fault(engine, request),
        "/version" => Ok(Response::json(200, format!(r#"{{"version":"{VERSION}"}}"#))),
        "/metrics" => Ok(Response::json(200, "[]".to_owned())),
        "/kv_cache_events" => Ok(Response::json(200, kv_cache_events(engine).await)),
        "/v1/models" => {
            let card = json!({"id": config.model, "object": "model", "created": unix_s() as u64, "owned_by": "tensorrt_llm"});
            Ok(Response::json(
                200,
                json!({"object": "list", "data": [card]}).to_string(),
            ))
        }
        _ if engine.is_core_dead() => Ok(Response {
            status: 503,
            ..Response::empty()
        }),
        _ => Ok(Response::empty()),
    }
}

/// What a request is of a pair.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Whole,
    Context(u64),
    Generation,
}

async fn transfer(engine: &Engine, fields: &Fields) -> Result<(Kind, Transfer), ApiError> {
    let Some(params) = fields.get(PARAMS).filter(|params| !params.is_null()) else {
        return Ok((Kind::Whole, Transfer::None));
    };
    if engine.config.nixl.is_none() {
        return Err(ApiError::not_implemented(
            "a transfer without a transceiver",
        ));
    }
    let id = params["disagg_request_id"].as_u64();
    match (params["request_type"].as_str(), id) {
        (Some("context_only"), Some(id)) => Ok((Kind::Context(id), Transfer::Hold)),
        (Some("generation_only"), _) => {
            let state = params["encoded_opaque_state"].as_str().and_then(unhex);
            let mut state: Value = state.unwrap_or_default();
            state["do_remote_prefill"] = true.into();
            let taken = nixl::transfer_of(engine, &state).await?;
            Ok((Kind::Generation, taken))
        }
        _ => Err(ApiError::not_implemented("other kinds of requests")),
    }
}

fn unhex(text: &str) -> Option<Value> {
    let byte = |at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..text.len()).step_by(2).map(byte).collect();
    serde_json::from_slice(&bytes?).ok()
}

fn prompt(engine: &Engine, fields: &Fields, chat: bool) -> Result<Vec<u32>, ApiError> {
    let name = if chat { "prompt_token_ids" } else { "prompt" };
    match fields.get(name) {
        Some(Value::String(text)) if !chat => Ok(engine.tokenizer.encode(text)),
        Some(ids @ Value::Array(_)) => {
            api::token_ids(ids).ok_or_else(|| ApiError::not_implemented("several prompts"))
        }
        _ if chat => {
            let text = render(&read_messages(fields)?, read_ending(fields)?);
            Ok(engine.tokenizer.encode(&text))
        }
        _ => Err(ApiError::new(
            400,
            "BadRequestError",
            "prompt: Field required",
            None,
        )),
    }
}

async fn generate(
    engine: &Arc<Engine>,
    request: &Request,
    chat: bool,
) -> Result<Response, ApiError> {
    let fields = read_fields(request)?;
    if let Some(name) = fields.keys().find(|name| !FIELDS.contains(&name.as_str())) {
        let message = format!("{name}: Extra inputs are not permitted");
        return Err(ApiError::new(400, "BadRequestError", message, None));
    }
    let prompt = prompt(engine, &fields, chat)?;
    check_vocabulary(engine, prompt.iter().copied())?;
    let wanted = match api::integer(&fields, "max_completion_tokens")? {
        Some(wanted) => Some(wanted),
        None => api::integer(&fields, "max_tokens")?,
    };
    let wanted = wanted.or((!chat).then_some(MAX_TOKENS_DEFAULT));
    let mut asked = Asked::read(engine, &fields, &fields, vec![prompt.clone()], wanted)?;
    if asked.n > 1 {
        return Err(ApiError::not_implemented("n"));
    }
    let (kind, transfer) = transfer(engine, &fields).await?;
    if let Kind::Context(_) = kind {
        asked.sampling.max_tokens = 1;
        asked.sampling.min_tokens = 0;
    }
    asked.sampling.transfer = transfer;
    let prefix = if chat { "chatcmpl" } else { "cmpl" };
    let form = OpenAi {
        id: format!("{prefix}-{}", asked.flight.id),
        created: unix_s() as u64,
        model: engine.config.model.clone(),
        options: StreamOptions::read(&fields),
        engine: Arc::clone(engine),
        made: 0,
        chat,
        kind,
        prompt,
    };
    respond(engine, asked, form).await
}

struct OpenAi {
    engine: Arc<Engine>,
    chat: bool,
    id: String,
    created: u64,
    model: String,
    prompt: Vec<u32>,
    options: StreamOptions,
    kind: Kind,
    made: usize,
}

#[derive(Serialize)]
struct Told {
    request_type: &'static str,
    first_gen_tokens: Vec<u32>,
    ctx_request_id: u64,
    encoded_opaque_state: String,
    draft_tokens: Option<()>,
    disagg_request_id: u64,
    ctx_dp_rank: Option<u32>,
    ctx_info_endpoint: Option<()>,
}

impl OpenAi {
    fn usage(&self, made: usize) -> Value {
        let prompt = self.prompt.len();
        json!({"prompt_tokens": prompt, "total_tokens": prompt + made, "completion_tokens": made})
    }

    fn told(&self, outputs: &[Output]) -> Option<Told> {
        let Kind::Context(id) = self.kind else {
            return None;
        };
        let last = outputs.last()?;
        let held = last.held.as_ref()?;
        let params = Params::of(&self.engine, &self.id, held, self.prompt.len(), 0);
        let state: String = to_json(&params)
            .bytes()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Some(Told {
            request_type: "context_only",
            first_gen_tokens: vec![last.choice.token],
            ctx_request_id: held.0,
            encoded_opaque_state: state,
            draft_tokens: None,
            disagg_request_id: id,
            ctx_dp_rank: None,
            ctx_info_endpoint: None,
        })
    }

    fn push(&self, events: &mut Events, choices: &Value, usage: Option<Value>) {
        let object = match self.chat {
            true => "chat.completion.chunk",
            false => "text_completion",
        };
        // In the order of the engine's own fields.
        let (id, created, model) = (&self.id, self.created, json!(self.model));
        let usage = usage.map_or(String::new(), |usage| format!(",\"usage\":{usage}"));
        events.push_back(Piece::Data(format!(
            "data: {{\"id\":\"{id}\",\"object\":\"{object}\",\"created\":{created},\"model\":{model},\"choices\":{choices}{usage}}}\n\n"
        )));
    }
}

impl Writer for OpenAi {
    fn token(&mut self, output: Output, events: &mut Events) -> bool {
        if self.chat && self.made == 0 {
            let delta = json!({"role": "assistant", "content": ""});
            self.push(
                events,
                &json!([{"index": 0, "delta": delta, "finish_reason": null}]),
                None,
            );
        }
        self.made += 1;
        let reason = output.finish.as_ref().map(|finish| reasons(finish).0);
        let choice = match self.chat {
            true => {
                json!([{"index": 0, "delta": {"content": output.text}, "finish_reason": reason}])
            }
            false => json!([{"index": 0, "text": output.text, "finish_reason": reason}]),
        };
        self.push(events, &choice, None);
        reason.is_some()
    }

    fn end(&mut self, events: &mut Events) {
        if self.options.include_usage {
            let usage = self.usage(self.made);
            self.push(events, &json!([]), Some(usage));
        }
        events.push_back(Piece::Data(DONE.to_owned()));
    }
}

impl Form for OpenAi {
    fn whole(&self, outputs: &[Vec<Output>]) -> String {
        let outputs = outputs.first().map(Vec::as_slice).unwrap_or_default();
        let text: String = outputs.iter().map(|output| output.text.as_str()).collect();
        let reason = outputs.last().and_then(|output| output.finish.as_ref());
        let reason = reason.map(|finish| reasons(finish).0);
        let told = self.told(outputs);
        let mut choice = match self.chat {
            true => {
                json!({"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason})
            }
            false => json!({"index": 0, "text": text, "finish_reason": reason}),
        };
        choice[PARAMS] = json!(told);
        let object = match self.chat {
            true => "chat.completion",
            false => "text_completion",
        };
        let mut body = json!({"id": self.id, "object": object, "created": self.created, "model": self.model,
            "choices": [choice], "usage": self.usage(outputs.len())});
        if told.is_some() {
            body["prompt_token_ids"] = json!(self.prompt);
        }
        body.to_string()
    }
}
