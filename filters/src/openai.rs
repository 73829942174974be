//! The `openai` filter: reads an OpenAI-like request once, for itself and for every filter after it.
//!
//! What it answers: which API a request speaks, which model it names, whether and how it streams, where its prompt
//! lies in the body; and, from the response, time to first token, inter-token latency and the engine's own token
//! counts. What it does not do: change a byte, judge a request (engines give their own errors), or choose an endpoint.

use crate::{
    body::{RequestBody, ResponseBody},
    error::Error,
    filter::{Context, HttpFilter, Next},
    services::Services,
};
use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, Response};
use std::{ops::Range, sync::Arc, time::Duration};

/// Our own type.
pub const TYPE_URL: &str = "type.googleapis.com/outrigger.filters.http.openai.v1.Config";

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
    /// As the client wrote it; `None` if it named none, or the body is not ours to read.
    pub model: Option<Arc<str>>,
    /// `stream`.
    pub stream: bool,
    /// `stream_options.include_usage`.
    pub include_usage: bool,
    /// `n`, at least 1.
    pub n: u32,
    /// `max_completion_tokens`, `max_tokens`, `max_output_tokens` or `max_new_tokens`.
    pub max_tokens: Option<u64>,
    /// `cache_salt`: a KV name space of its own.
    pub cache_salt: Option<Arc<str>>,
    /// The bytes that are forwarded, if they were read.
    pub body: Option<Bytes>,
    /// What kind of prompt.
    pub prompt: Prompt,
    /// Where it lies in `body`.
    pub spans: Spans,
    /// What changes its tokens.
    pub flags: PromptFlags,
    /// Limits that the connection manager and `router` enforce.
    pub limits: StreamLimits,
}

impl OpenAiRequest {
    /// A request whose body was not read.
    #[must_use]
    pub fn unread(api: Api, limits: StreamLimits) -> Self {
        Self { api, n: 1, limits, ..Self::default() }
    }

    /// Whether an engine generates tokens for it: it has TTFT and ITL, may be retried until its first token, and is
    /// worth routing by prefix.
    #[must_use]
    pub fn is_generation(&self) -> bool {
        matches!(self.api, Api::Chat | Api::Completions | Api::Messages | Api::Responses | Api::Generate)
    }

    /// The raw JSON at a span.
    #[must_use]
    pub fn raw(&self, span: Option<&Range<usize>>) -> Option<&str> {
        std::str::from_utf8(self.body.as_ref()?.get(span?.clone())?).ok()
    }
}

struct OpenAi;

/// The registry's constructor.
///
/// # Errors
/// The configuration is wrong; the error names the field.
pub fn factory(_value: &serde_json::Value, _services: &Services) -> Result<Arc<dyn HttpFilter>, String> {
    Ok(Arc::new(OpenAi))
}

#[async_trait]
impl HttpFilter for OpenAi {
    async fn handle(
        &self,
        request: Request<RequestBody>,
        context: &mut Context,
        next: Next<'_>,
    ) -> Result<Response<ResponseBody>, Error> {
        next.run(request, context).await
    }
}
