//! The `openai` filter: reads an OpenAI-like request once, for itself and for every filter after it.
//!
//! What it answers: which API a request speaks, which model it names, whether and how it streams, where its prompt
//! lies in the body; and, from the response, time to first token, inter-token latency and the engine's own token
//! counts. What it does not do: change a byte, judge a request (engines give their own errors), or choose an endpoint.

mod observe;
mod parse;
mod scan;
mod tenants;
mod usage;

use crate::{
    body::{ReadOutcome, RequestBody},
    error::Error,
    filter::{Context, Handled, HttpFilter, Next},
    registry,
    services::Services,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, Request, header};
use observe::{Models, Observer};
pub(crate) use scan::members;
use serde::Deserialize;
use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};
use tenants::{Meter, Tenants};

/// Our own type.
pub const TYPE_URL: &str = "type.googleapis.com/outrigger.filters.http.openai.v1.Config";

/// Bytes of JSON that make a token, where nothing better is known.
const BYTES_PER_TOKEN: usize = 4;

/// Which API a request speaks, by its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Api {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// `/v1/messages` (Anthropic).
    Messages,
    /// `/v1/responses`.
    Responses,
    /// `/inference/v1/generate` (vLLM), `/generate` (SGLang): token ids or text in, no OpenAI shape.
    Generate,
    /// `…/render`: the request as the engine would tokenise it.
    Render,
    /// `/tokenize`, `/detokenize` and their `/v1` forms.
    Tokenize,
    /// Embeddings and other pooling calls, which name a model and generate nothing.
    Embeddings,
    /// `/v1/models` and below.
    Models,
    /// `/v1/responses/ID` and below: a response that was stored.
    StoredResponse,
    /// Anything else.
    #[default]
    Other,
}

impl Api {
    /// Lower-case name, as in metrics and logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::Messages => "messages",
            Self::Responses => "responses",
            Self::Generate => "generate",
            Self::Render => "render",
            Self::Tokenize => "tokenize",
            Self::Embeddings => "embeddings",
            Self::Models => "models",
            Self::StoredResponse => "stored_response",
            Self::Other => "other",
        }
    }
}

/// Limits in time that fit token streams; `None` is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamLimits {
    /// From the end of sending to response headers.
    pub headers_timeout: Option<Duration>,
    /// From response headers to the first event of a stream.
    pub first_token_timeout: Option<Duration>,
    /// Between two events.
    pub inter_token_timeout: Option<Duration>,
    /// The whole exchange.
    pub total_timeout: Option<Duration>,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self {
            headers_timeout: Some(Duration::from_secs(600)),
            first_token_timeout: Some(Duration::from_secs(600)),
            inter_token_timeout: Some(Duration::from_secs(300)),
            total_timeout: None,
        }
    }
}

/// What kind of prompt a request carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Prompt {
    /// None that we know of.
    #[default]
    None,
    /// Messages of text only.
    Messages,
    /// One string.
    Text,
    /// One list of token ids.
    TokenIds,
    /// Several prompts in one request.
    Batch,
    /// Images, audio, embeddings: what an engine makes of them only it knows.
    Media,
}

/// Where in the body the values lie that make the prompt; byte ranges of raw JSON values.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Spans {
    /// `messages`, `prompt`, `text`, `input_ids` or `token_ids`, whichever the API has.
    pub prompt: Option<Range<usize>>,
    /// Anthropic's `system`.
    pub system: Option<Range<usize>>,
    /// `tools`.
    pub tools: Option<Range<usize>>,
    /// `tool_choice`.
    pub tool_choice: Option<Range<usize>>,
    /// `documents`.
    pub documents: Option<Range<usize>>,
    /// `stop`.
    pub stop: Option<Range<usize>>,
    /// `chat_template` given by the client.
    pub chat_template: Option<Range<usize>>,
    /// `chat_template_kwargs`.
    pub chat_template_kwargs: Option<Range<usize>>,
    /// `reasoning_effort`.
    pub reasoning_effort: Option<Range<usize>>,
}

/// Switches that change how a prompt is tokenised; `None` is the engine's default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PromptFlags {
    /// `add_generation_prompt`.
    pub add_generation_prompt: Option<bool>,
    /// `continue_final_message`.
    pub continue_final_message: Option<bool>,
    /// `add_special_tokens`.
    pub add_special_tokens: Option<bool>,
    /// Something here changes the prompt in a way that only the engine knows (`truncate_prompt_tokens`,
    /// `previous_response_id`, …).
    pub opaque: bool,
}

/// What the filter learned of a request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OpenAiRequest {
    /// By path.
    pub api: Api,
    /// Whom its tokens are counted for, as the configured header says.
    pub tenant: Option<Arc<str>>,
    /// As the client wrote it; `None` if it named none, or the body is not ours to read.
    pub model: Option<Arc<str>>,
    /// `stream`.
    pub stream: bool,
    /// `stream_options.include_usage`.
    pub include_usage: bool,
    /// `return_token_ids`.
    pub return_token_ids: bool,
    /// `include_stop_str_in_output`.
    pub include_stop: bool,
    /// `seed` is set.
    pub has_seed: bool,
    /// `temperature` is 0, in as many words.
    pub greedy: bool,
    /// `n`, at least 1.
    pub n: u32,
    /// `max_completion_tokens`, `max_tokens`, `max_output_tokens` or `max_new_tokens`.
    pub max_tokens: Option<u64>,
    /// `cache_salt`: a KV name space of its own.
    pub cache_salt: Option<Arc<str>>,
    /// The stored response that this one goes on from.
    pub previous_response_id: Option<Arc<str>>,
    /// The client chose the id that its response will have (`request_id`).
    pub names_itself: bool,
    /// The bytes that are forwarded, if they were read.
    pub body: Option<Bytes>,
    /// They were not, because there are too many.
    pub too_large: bool,
    /// What kind of prompt.
    pub prompt: Prompt,
    /// Where it lies in `body`.
    pub spans: Spans,
    /// What changes its tokens.
    pub flags: PromptFlags,
    /// It asks for something that ties prompt and tokens to one engine (`echo`, `prompt_logprobs`, beam search,
    /// `kv_transfer_params` of its own, …).
    pub one_engine: bool,
    /// Limits that the connection manager and `router` enforce.
    pub limits: StreamLimits,
}

/// Whether an answer from this path shows that the engine computes. A response may be told of before anything is.
pub(crate) fn is_computed(path: &str) -> bool {
    matches!(
        parse::api(path),
        Api::Chat | Api::Completions | Api::Messages | Api::Generate | Api::Embeddings
    )
}

/// Whether a stream's events are tokens. A response's first comes before any: its prefill would count as a wait for one.
pub(crate) fn tells_tokens(context: &Context) -> bool {
    let api = context.openai.as_ref().map(|openai| openai.api);
    !matches!(api, Some(Api::Responses | Api::StoredResponse))
}

impl OpenAiRequest {
    /// A request whose body was not read.
    #[must_use]
    pub fn unread(api: Api, limits: StreamLimits) -> Self {
        Self {
            api,
            n: 1,
            limits,
            ..Self::default()
        }
    }

    /// Reads a body; `None` if it is not the JSON that the API expects.
    #[must_use]
    pub fn parse(api: Api, body: &Bytes, limits: StreamLimits) -> Option<Self> {
        parse::request(api, body, limits)
    }

    /// Whether an engine generates tokens for it: it has TTFT and ITL, may be retried until its first token, and is
    /// worth routing by prefix.
    #[must_use]
    pub fn is_generation(&self) -> bool {
        matches!(
            self.api,
            Api::Chat | Api::Completions | Api::Messages | Api::Responses | Api::Generate
        )
    }

    /// Whether its answer may be a stream of tokens, to which `limits` apply: a generation, or a stored one told again.
    #[must_use]
    pub fn may_stream_tokens(&self) -> bool {
        self.is_generation() || self.api == Api::StoredResponse
    }

    /// Prompt tokens by the length of the prompt alone.
    #[must_use]
    pub fn estimated_prompt_tokens(&self) -> u64 {
        let bytes = self.spans.prompt.as_ref().map_or(0, ExactSizeIterator::len);
        (bytes / BYTES_PER_TOKEN) as u64
    }

    /// The raw JSON at a span.
    #[must_use]
    pub fn raw(&self, span: Option<&Range<usize>>) -> Option<&str> {
        std::str::from_utf8(self.body.as_ref()?.get(span?.clone())?).ok()
    }
}

/// Configuration of the filter.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// A longer body streams on unread: no model is known of it, and it is routed by load. Default 32 MiB.
    pub body_bytes_max: usize,
    /// A longer body is parsed off the request threads. Default 8 KiB.
    pub inline_parse_bytes_max: usize,
    /// To response headers; 0 is off. Default 600 s.
    pub headers_timeout_ms: u64,
    /// From headers to the first event of a stream; 0 is off. Default 600 s.
    pub first_token_timeout_ms: u64,
    /// Between two events; 0 is off. Default 300 s.
    pub inter_token_timeout_ms: u64,
    /// The whole exchange; 0 is off, which is the default.
    pub total_timeout_ms: u64,
    /// Header that says for whom tokens are counted, `authorization` for API keys. Default: none, nobody is told apart.
    pub tenant_header: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            body_bytes_max: 32 << 20,
            inline_parse_bytes_max: 8 << 10,
            headers_timeout_ms: 600_000,
            first_token_timeout_ms: 600_000,
            inter_token_timeout_ms: 300_000,
            total_timeout_ms: 0,
            tenant_header: String::new(),
        }
    }
}

impl Config {
    fn limits(&self) -> StreamLimits {
        let limit = |ms: u64| (ms > 0).then(|| Duration::from_millis(ms));
        StreamLimits {
            headers_timeout: limit(self.headers_timeout_ms),
            first_token_timeout: limit(self.first_token_timeout_ms),
            inter_token_timeout: limit(self.inter_token_timeout_ms),
            total_timeout: limit(self.total_timeout_ms),
        }
    }
}

/// The filter.
pub struct OpenAi {
    services: Services,
    config: Config,
    limits: StreamLimits,
    models: Models,
    tenant: Option<HeaderName>,
    tenants: Tenants,
}

/// The registry's constructor.
///
/// # Errors
/// The configuration is wrong; the error names the field.
pub fn factory(
    value: &serde_json::Value,
    services: &Services,
) -> Result<Arc<dyn HttpFilter>, String> {
    let config: Config = registry::parse(value)?;
    let limits = config.limits();
    let tenant = Some(config.tenant_header.as_str())
        .filter(|name| !name.is_empty())
        .map(|name| HeaderName::from_bytes(name.as_bytes()))
        .transpose()
        .map_err(|_| {
            format!(
                "tenant_header: '{}' is not a header name",
                config.tenant_header
            )
        })?;
    Ok(Arc::new(OpenAi {
        services: services.clone(),
        config,
        limits,
        models: Models::default(),
        tenant,
        tenants: Tenants::default(),
    }))
}

impl HttpFilter for OpenAi {
    fn handle<'a>(
        &'a self,
        mut request: Request<RequestBody>,
        context: &'a mut Context,
        next: Next<'a>,
    ) -> Handled<'a> {
        Box::pin(async move {
            let started = Instant::now();
            let mut openai = self.read(&mut request).await?;
            if let Some(header) = &self.tenant {
                openai.tenant = tenant(request.headers(), header);
            }
            let openai = Arc::new(openai);
            context.log.model.clone_from(&openai.model);
            if openai.is_generation() {
                let handles = self.models.handles(
                    openai.model.as_ref(),
                    &context.route.cluster,
                    &self.services,
                );
                let meter = self.tenant.is_some().then(|| Meter {
                    handles: self
                        .tenants
                        .handles(openai.tenant.as_deref(), handles.model()),
                    prompt: openai.estimated_prompt_tokens(),
                });
                let observer = Observer::new(openai.api, handles, meter, started);
                context.observers.push(Box::new(observer));
            }
            context.openai = Some(openai);
            next.run(request, context).await
        })
    }
}

impl OpenAi {
    async fn read(&self, request: &mut Request<RequestBody>) -> Result<OpenAiRequest, Error> {
        let api = parse::api(request.uri().path());
        if !parse::names_a_model(api)
            || request.method() != Method::POST
            || !is_plain_json(request.headers())
        {
            return Ok(OpenAiRequest::unread(api, self.limits));
        }
        let read = request
            .body_mut()
            .read_whole(self.config.body_bytes_max)
            .await;
        let body = match read.map_err(|error| Error::of_client_body(&error))? {
            ReadOutcome::Whole(body) => body,
            ReadOutcome::TooLarge => {
                metrics::counter!("outrigger_openai_body_too_large_total", "api" => api.as_str())
                    .increment(1);
                return Ok(OpenAiRequest {
                    too_large: true,
                    ..OpenAiRequest::unread(api, self.limits)
                });
            }
        };
        Ok(self.parse(api, body).await)
    }

    /// Not ours to judge: what cannot be parsed is forwarded, so that the engine says what is wrong with it.
    async fn parse(&self, api: Api, body: Bytes) -> OpenAiRequest {
        let limits = self.limits;
        let parsed = if body.len() <= self.config.inline_parse_bytes_max {
            parse::request(api, &body, limits)
        } else {
            let body = body.clone();
            let job = self
                .services
                .compute
                .spawn_blocking(move || parse::request(api, &body, limits));
            job.await.ok().flatten()
        };
        parsed.unwrap_or_else(|| {
            metrics::counter!("outrigger_openai_unparsed_total", "api" => api.as_str())
                .increment(1);
            OpenAiRequest {
                body: Some(body),
                ..OpenAiRequest::unread(api, limits)
            }
        })
    }
}

/// For whom tokens are counted; an API key without the scheme before it.
fn tenant(headers: &HeaderMap, name: &HeaderName) -> Option<Arc<str>> {
    let value = headers.get(name)?.to_str().ok()?;
    let bare = match value.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key.trim_start(),
        _ => value,
    };
    Some(bare).filter(|bare| !bare.is_empty()).map(Into::into)
}

/// The id of the stored response that a path is about.
pub(crate) fn stored_response(path: &str) -> Option<&str> {
    parse::stored_response(path)
}

/// JSON that is not compressed. vLLM and SGLang also read JSON without a content type, but only as bytes.
fn is_plain_json(headers: &HeaderMap) -> bool {
    let json = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|kind| {
            let kind = kind.split(';').next().unwrap_or_default().trim();
            kind.eq_ignore_ascii_case("application/json")
                || kind.len() > 5
                    && kind.as_bytes()[kind.len() - 5..].eq_ignore_ascii_case(b"+json")
        });
    let encoded = headers
        .get(header::CONTENT_ENCODING)
        .is_some_and(|value| value != "identity");
    json && !encoded
}
