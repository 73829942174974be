//! Answers "what does this request ask for, and how is it refused": what the generation endpoints have in common.
//!
//! Messages, types and codes of refusals are vLLM 0.32's where a recording shows them. What the simulator cannot do
//! (beam search, LoRA, KV transfer, …) is refused with 501, never made up.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value};

use super::config::Seeds;
use super::engine::Engine;
use super::http::{Request, Response};
use super::json_error::first_error;
use super::nixl::Transfer;
use super::scheduler::{Finish, Sampling};

/// `system_fingerprint` of every answer.
const FINGERPRINT: &str = "vllm-0.32.0-cb1cbac5";
/// The same of a server with NIXL: it stands for the server's settings.
const FINGERPRINT_NIXL: &str = "vllm-0.32.0-fa892e0b";

/// `system_fingerprint`.
pub(crate) fn fingerprint(engine: &Engine) -> &'static str {
    match engine.config.nixl {
        Some(_) => FINGERPRINT_NIXL,
        None => FINGERPRINT,
    }
}

/// A JSON object as a request body.
pub(crate) type Fields = Map<String, Value>;

/// A refusal in the engine's form.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: u16,
    kind: &'static str,
    message: String,
    param: Option<String>,
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    error: ErrorFields<'a>,
}

#[derive(Serialize)]
struct ErrorFields<'a> {
    message: &'a str,
    r#type: &'a str,
    param: Option<&'a str>,
    code: u16,
}

impl ApiError {
    pub(crate) fn new(
        status: u16,
        kind: &'static str,
        message: impl Into<String>,
        param: Option<&str>,
    ) -> Self {
        Self {
            status,
            kind,
            message: message.into(),
            param: param.map(str::to_owned),
        }
    }

    /// Status, type and message.
    pub(crate) fn parts(&self) -> (u16, &'static str, &str) {
        (self.status, self.kind, &self.message)
    }

    /// A value out of its range, in vLLM's words.
    pub(crate) fn value(message: &str, param: &str, value: impl std::fmt::Display) -> Self {
        let message = format!("{message} (parameter={param}, value={value})");
        Self::new(400, "BadRequestError", message, Some(param))
    }

    /// A body that fails FastAPI's validation. `detail` is what stands between the braces.
    fn validation(place: &str, detail: &str) -> Self {
        Self::new(
            400,
            "Bad Request",
            format!("1 validation error:\n  {{{detail}}}"),
            Some(place),
        )
    }

    pub(crate) fn missing(name: &str, fields: &Fields) -> Self {
        let place = format!("body.{name}");
        let count = fields.len();
        let detail = format!(
            "'type': 'missing', 'loc': '{place}', 'msg': 'Field required', 'input': '<dict of {count} items>'"
        );
        Self::validation(&place, &detail)
    }

    pub(crate) fn wrong_type(name: &str, wanted: &str) -> Self {
        let place = format!("body.{name}");
        let detail = format!(
            "'type': '{wanted}_type', 'loc': '{place}', 'msg': 'Input should be a valid {wanted}'"
        );
        Self::validation(&place, &detail)
    }

    pub(crate) fn not_implemented(what: &str) -> Self {
        let message = format!("The simulated engine does not implement {what}.");
        Self::new(501, "NotImplementedError", message, None)
    }

    pub(crate) fn scale_out_disabled() -> Self {
        let message = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them.";
        Self::new(403, "PermissionDeniedError", message, None)
    }

    /// What a request gets that an engine's death cut short before its first byte.
    pub(crate) fn engine_dead() -> Self {
        let message =
            "EngineCore encountered an issue. See stack trace (above) for the root cause.";
        Self::new(500, "InternalServerError", message, None)
    }
}

impl From<ApiError> for Response {
    fn from(error: ApiError) -> Self {
        let fields = ErrorFields {
            message: &error.message,
            r#type: error.kind,
            param: error.param.as_deref(),
            code: error.status,
        };
        Self::json(error.status, to_json(&ErrorBody { error: fields }))
    }
}

/// JSON with keys in the order of the type's fields.
pub(crate) fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("invariant: answers hold strings, numbers and lists only")
}

/// The body as a JSON object.
pub(crate) fn read_fields(request: &Request) -> Result<Fields, ApiError> {
    let text = String::from_utf8_lossy(&request.body);
    match serde_json::from_str(&text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(ApiError::validation(
            "body",
            "'type': 'model_attributes_type', 'loc': 'body', 'msg': 'Input should be a valid dictionary or object to extract fields from'",
        )),
        Err(error) => {
            let (at, message) = first_error(&text).unwrap_or((error.column(), "Expecting value"));
            let place = format!("body.{at}");
            let detail = format!(
                "'type': 'json_invalid', 'loc': '{place}', 'msg': 'JSON decode error', 'input': '<dict of 0 items>', 'ctx': {{'error': '{message}'}}"
            );
            Err(ApiError::validation(&place, &detail))
        }
    }
}

fn set<'a>(fields: &'a Fields, name: &str) -> Option<&'a Value> {
    fields.get(name).filter(|value| !value.is_null())
}

/// An optional non-negative integer.
pub(crate) fn integer(fields: &Fields, name: &str) -> Result<Option<usize>, ApiError> {
    match set(fields, name) {
        None => Ok(None),
        Some(value) => match value.as_i64() {
            Some(number) => {
                let below = |_| {
                    ApiError::value(
                        &format!("{name} must be non-negative, got {number}."),
                        name,
                        number,
                    )
                };
                usize::try_from(number).map(Some).map_err(below)
            }
            None => Err(ApiError::wrong_type(name, "integer")),
        },
    }
}

/// An optional boolean, false if absent.
pub(crate) fn flag(fields: &Fields, name: &str) -> bool {
    flag_or(fields, name, false)
}

/// An optional boolean.
pub(crate) fn flag_or(fields: &Fields, name: &str, default: bool) -> bool {
    fields.get(name).and_then(Value::as_bool).unwrap_or(default)
}

/// An optional string.
pub(crate) fn text<'a>(fields: &'a Fields, name: &str) -> Option<&'a str> {
    fields.get(name).and_then(Value::as_str)
}

/// A list of token ids; `None` if it is no such list.
pub(crate) fn token_ids(value: &Value) -> Option<Vec<u32>> {
    value
        .as_array()?
        .iter()
        .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
        .collect()
}

/// Refuses models this engine does not serve, as vLLM does before it looks at anything else.
pub(crate) fn check_model(engine: &Engine, fields: &Fields) -> Result<(), ApiError> {
    let served = &engine.config.model;
    match text(fields, "model") {
        Some(model) if model != served => {
            let message = format!("The model `{model}` does not exist. Valid aliases: {served}.");
            Err(ApiError::new(404, "NotFoundError", message, Some("model")))
        }
        _ => Ok(()),
    }
}

/// Refuses what is not simulated, but for the fields that the endpoint takes.
pub(crate) fn check_simulated(fields: &Fields, takes: &[&str]) -> Result<(), ApiError> {
    for (name, what) in [
        ("tools", "tool calls"),
        ("structured_outputs", "structured outputs"),
        ("guided_json", "structured outputs"),
        ("prompt_logprobs", "prompt logprobs"),
        ("use_beam_search", "beam search"),
        ("suffix", "suffixes"),
        ("kv_transfer_params", "KV transfer"),
    ] {
        let given = set(fields, name)
            .filter(|value| **value != Value::Bool(false) && !takes.contains(&name));
        if given.is_some_and(|value| value.as_array().is_none_or(|list| !list.is_empty())) {
            return Err(ApiError::not_implemented(what));
        }
    }
    if flag(fields, "echo") && !takes.contains(&"echo") {
        return Err(ApiError::not_implemented("echo"));
    }
    match set(fields, "response_format").and_then(|format| format["type"].as_str()) {
        None | Some("text") => Ok(()),
        Some(_) if takes.contains(&"response_format") => Ok(()),
        Some(_) => Err(ApiError::not_implemented("structured outputs")),
    }
}

/// The sampling fields that all endpoints share. `max_tokens` is what the endpoint found, if anything.
pub(crate) fn read_sampling(
    engine: &Engine,
    fields: &Fields,
    max_tokens: Option<usize>,
    prompt_len: usize,
) -> Result<Sampling, ApiError> {
    let temperature = set(fields, "temperature")
        .and_then(Value::as_f64)
        .unwrap_or(1.0);
    if temperature < 0.0 {
        let message = format!("temperature must be non-negative, got {temperature:?}.");
        return Err(ApiError::value(
            &message,
            "temperature",
            format_args!("{temperature:?}"),
        ));
    }
    let max_tokens = check_length(engine, max_tokens, prompt_len)?;
    let min_tokens = integer(fields, "min_tokens")?.unwrap_or(0);
    if min_tokens > max_tokens {
        let message = format!(
            "min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}."
        );
        return Err(ApiError::value(&message, "min_tokens", min_tokens));
    }
    let stop = match set(fields, "stop") {
        None => Vec::new(),
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(list)) => list
            .iter()
            .filter_map(|stop| stop.as_str().map(str::to_owned))
            .collect(),
        Some(_) => return Err(ApiError::wrong_type("stop", "list")),
    };
    if stop.iter().any(String::is_empty) {
        return Err(ApiError::new(
            400,
            "BadRequestError",
            "stop cannot contain an empty string.",
            Some("stop"),
        ));
    }
    Ok(Sampling {
        max_tokens,
        min_tokens,
        temperature,
        seed: read_seed(engine, fields, temperature)?,
        ignore_eos: flag(fields, "ignore_eos"),
        stop,
        stop_token_ids: set(fields, "stop_token_ids")
            .and_then(token_ids)
            .unwrap_or_default(),
        include_stop_str_in_output: flag(fields, "include_stop_str_in_output"),
        logprobs: None,
        given: None,
        skip_cache: false,
        transfer: Transfer::None,
        wrong: false,
    })
}

/// What a refusal of seeds says: vLLM's words, where it runs on TPUs.
pub(crate) const NO_SEEDS: &str = "Torch XLA does not support per-request seed.";

fn read_seed(engine: &Engine, fields: &Fields, temperature: f64) -> Result<Option<u64>, ApiError> {
    let seed = set(fields, "seed").and_then(Value::as_i64);
    match engine.config.seeds {
        Seeds::Ignored => Ok(None),
        Seeds::Refused if seed.is_some() && temperature > 0.0 => {
            engine.refuse_seed();
            Err(ApiError::new(400, "BadRequestError", NO_SEEDS, None))
        }
        Seeds::Kept | Seeds::Refused | Seeds::RefusedInStream => Ok(seed.map(i64::cast_unsigned)),
    }
}

fn check_length(
    engine: &Engine,
    max_tokens: Option<usize>,
    prompt_len: usize,
) -> Result<usize, ApiError> {
    let longest = engine.config.max_model_len;
    if let Some(wanted) = max_tokens.filter(|wanted| *wanted > longest) {
        let message = format!(
            "max_tokens={wanted} cannot be greater than max_model_len={longest}. Please request fewer output tokens."
        );
        return Err(ApiError::value(&message, "max_tokens", wanted));
    }
    if max_tokens == Some(0) {
        return Err(ApiError::value(
            "max_tokens must be at least 1, got 0.",
            "max_tokens",
            0,
        ));
    }
    if prompt_len == 0 {
        let message = "The decoder prompt cannot be empty";
        return Err(ApiError::new(400, "BadRequestError", message, None));
    }
    let left = longest.saturating_sub(prompt_len);
    if left == 0 {
        let found = longest + 1;
        let message = format!(
            "This model's maximum context length is {longest} tokens. However, your prompt contains at least {found} input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
        );
        return Err(ApiError::value(&message, "input_tokens", found));
    }
    if let Some(wanted) = max_tokens.filter(|wanted| *wanted > left) {
        let found = longest - wanted + 1;
        let message = format!(
            "This model's maximum context length is {longest} tokens. However, you requested {wanted} output tokens and your prompt contains at least {found} input tokens, for a total of at least {} tokens. Please reduce the length of the input prompt or the number of requested output tokens.",
            wanted + found
        );
        return Err(ApiError::value(&message, "input_tokens", found));
    }
    Ok(max_tokens.unwrap_or(left))
}

/// How many choices each prompt gets.
pub(crate) fn read_n(fields: &Fields) -> Result<usize, ApiError> {
    match integer(fields, "n")?.unwrap_or(1) {
        0 => Err(ApiError::value("n must be at least 1, got 0.", "n", 0)),
        n => Ok(n),
    }
}

/// A request being answered: its id is taken until this is dropped.
pub(crate) struct Flight {
    engine: Arc<Engine>,
    pub(crate) id: String,
}

impl Flight {
    /// Takes the id made of `prefix` and the client's `X-Request-Id` (or `request_id`, or one made up).
    pub(crate) fn begin(
        engine: &Arc<Engine>,
        request: &Request,
        fields: &Fields,
        prefix: &str,
    ) -> Result<Self, ApiError> {
        let own = request
            .header("x-request-id")
            .or_else(|| text(fields, "request_id"));
        let id = format!(
            "{prefix}-{}",
            own.map_or_else(|| engine.made_up_id(), str::to_owned)
        );
        Self::named(engine, id)
    }

    /// Takes this id.
    pub(crate) fn named(engine: &Arc<Engine>, id: String) -> Result<Self, ApiError> {
        if engine.faults.take_http_500() {
            return Err(ApiError::new(
                500,
                "InternalServerError",
                "A fault on command of the simulated engine.",
                None,
            ));
        }
        let mut in_flight = engine.in_flight();
        if in_flight.contains(&id) {
            return Err(ApiError::new(
                400,
                "BadRequestError",
                format!("Request id {id} already running."),
                None,
            ));
        }
        in_flight.push(id.clone());
        drop(in_flight);
        Ok(Self {
            engine: Arc::clone(engine),
            id,
        })
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let mut in_flight = self.engine.in_flight();
        in_flight.retain(|id| *id != self.id);
    }
}

/// `finish_reason` and `stop_reason` of a choice.
pub(crate) fn reasons(finish: &Finish) -> (&'static str, Option<StopReason>) {
    match finish {
        Finish::Length => ("length", None),
        Finish::Eos => ("stop", None),
        Finish::StopToken(token) => ("stop", Some(StopReason::Token(*token))),
        Finish::StopString(text) => ("stop", Some(StopReason::Text(text.clone()))),
    }
}

/// What of `stop` or `stop_token_ids` ended a generation.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum StopReason {
    Token(u32),
    Text(String),
}

/// `usage` of a whole answer; fields that vLLM leaves out of a stream are skipped there.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) cached_tokens: Option<usize>,
}

#[derive(Serialize)]
pub(crate) struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
    completion_tokens: usize,
    prompt_tokens_details: Option<Details>,
    completion_tokens_details: Option<()>,
}

#[derive(Serialize)]
struct Details {
    cached_tokens: usize,
    created_cache_tokens: Option<usize>,
    multimodal_tokens: Option<usize>,
}

#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum StreamUsage {
    /// On the last chunk.
    Last {
        prompt_tokens: usize,
        total_tokens: usize,
        completion_tokens: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        prompt_tokens_details: Option<StreamDetails>,
    },
    /// On every chunk, with `continuous_usage_stats`.
    Continuous {
        prompt_tokens: usize,
        total_tokens: usize,
        completion_tokens: usize,
        completion_tokens_details: Option<()>,
    },
}

#[derive(Serialize)]
pub(crate) struct StreamDetails {
    cached_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    created_cache_tokens: Option<usize>,
}

impl Tally {
    /// Prompt tokens whose blocks were stored by this request; chat alone tells them.
    fn created(&self, engine: &Engine) -> usize {
        let size = engine.config.block_size;
        (self.prompt_tokens / size * size).saturating_sub(self.cached_tokens.unwrap_or(0))
    }

    pub(crate) fn usage(&self, engine: &Engine, chat: bool) -> Usage {
        let details = engine.config.prompt_tokens_details.then(|| Details {
            cached_tokens: self.cached_tokens.unwrap_or(0),
            created_cache_tokens: chat.then(|| self.created(engine)),
            multimodal_tokens: None,
        });
        Usage {
            prompt_tokens: self.prompt_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
            completion_tokens: self.completion_tokens,
            prompt_tokens_details: details,
            completion_tokens_details: None,
        }
    }

    pub(crate) fn last(&self, engine: &Engine, chat: bool) -> StreamUsage {
        let details = engine.config.prompt_tokens_details.then(|| StreamDetails {
            cached_tokens: self.cached_tokens.unwrap_or(0),
            created_cache_tokens: chat.then(|| self.created(engine)),
        });
        StreamUsage::Last {
            prompt_tokens: self.prompt_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
            completion_tokens: self.completion_tokens,
            prompt_tokens_details: details,
        }
    }

    pub(crate) fn continuous(&self) -> StreamUsage {
        StreamUsage::Continuous {
            prompt_tokens: self.prompt_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
            completion_tokens: self.completion_tokens,
            completion_tokens_details: None,
        }
    }

    /// `(input_tokens, cache_creation_input_tokens, cache_read_input_tokens)`, as Anthropic's API splits the prompt.
    pub(crate) fn split(&self, engine: &Engine) -> (usize, usize, usize) {
        let (read, created) = (self.cached_tokens.unwrap_or(0), self.created(engine));
        (
            self.prompt_tokens.saturating_sub(read + created),
            created,
            read,
        )
    }
}

/// `stream_options`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: bool,
    pub(crate) continuous: bool,
}

impl StreamOptions {
    pub(crate) fn read(fields: &Fields) -> Self {
        let option = |name: &str| {
            fields
                .get("stream_options")
                .is_some_and(|options| options[name] == Value::Bool(true))
        };
        let include_usage = option("include_usage");
        Self {
            include_usage,
            continuous: include_usage && option("continuous_usage_stats"),
        }
    }
}
