//! Asking an engine for the token ids of a prompt: `…/render` (vLLM), `/tokenize` (vLLM, SGLang).

use super::Unavailable;
use crate::{
    body::RequestBody,
    endpoints::{Endpoint, SendOptions, Upstream, Via, clock_ms},
    openai::{Api, OpenAiRequest, Prompt},
    router::attempt::ENDPOINT_HEADER,
};
use ahash::AHashMap;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Limited};
use outrigger_xds::report::{EngineId, EngineKind};
use serde::{Deserialize, de::IgnoredAny};
use std::{
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// Longest answer read: some four million ids, or fewer with media beside them.
const ANSWER_BYTES_MAX: usize = 32 << 20;
/// Most refusals remembered; beyond it all are forgotten, and asked once more.
const REFUSALS_MAX: usize = 4096;

/// A way to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Way {
    /// The engine prepares the very request.
    Render,
    /// The engine tokenises what we take for its prompt.
    Tokenize,
}

impl Way {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Render => "render",
            Self::Tokenize => "tokenize",
        }
    }
}

/// The asking side.
pub(super) struct Asker {
    timeout: Duration,
    reprobe_after: Duration,
    /// Who refused what, and until when it is not asked again.
    refusals: Mutex<AHashMap<(EngineId, Way), u64>>,
}

impl Asker {
    pub(super) fn new(timeout: Duration, reprobe_after: Duration) -> Self {
        Self {
            timeout,
            reprobe_after,
            refusals: Mutex::default(),
        }
    }

    /// Ids of `request`, as `endpoint` tells them, by the first way that it does not refuse. `client` are the headers
    /// of the client's request; only what an engine checks is taken along.
    pub(super) async fn ask(
        &self,
        request: &OpenAiRequest,
        endpoint: &Arc<Endpoint>,
        client: &HeaderMap,
        upstream: &dyn Upstream,
    ) -> Result<(Vec<u32>, Way), Unavailable> {
        let kind = endpoint.live.load().state.kind;
        for way in [Way::Render, Way::Tokenize] {
            let Some((path, body)) = question(request, kind, way) else {
                continue;
            };
            if self.refused(endpoint, way) {
                continue;
            }
            let asked = tokio::time::timeout(
                self.timeout,
                exchange(path, body, endpoint, client, upstream),
            );
            let (status, answer) = asked.await.map_err(|_| Unavailable::EngineFailed)??;
            match status {
                StatusCode::OK => return read(&answer).map(|ids| (ids, way)),
                // vLLM answers 403 where rendering is switched off. Elsewhere it is about the client, as 401 is.
                StatusCode::UNAUTHORIZED => return Err(Unavailable::EngineDenied),
                StatusCode::FORBIDDEN if way != Way::Render => {
                    return Err(Unavailable::EngineDenied);
                }
                StatusCode::TOO_MANY_REQUESTS => return Err(Unavailable::EngineFailed),
                StatusCode::FORBIDDEN | StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => {
                    // An unknown model is a 404 as well, but such requests do not come here.
                    self.remember(endpoint, way, path, status);
                }
                status if status.is_client_error() => return Err(Unavailable::EngineRejected),
                _ => return Err(Unavailable::EngineFailed),
            }
        }
        Err(Unavailable::EngineRefused)
    }

    fn refused(&self, endpoint: &Endpoint, way: Way) -> bool {
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (endpoint.id.clone(), way);
        match refusals.get(&key) {
            Some(until) if clock_ms() < *until => true,
            Some(_) => {
                refusals.remove(&key);
                false
            }
            None => false,
        }
    }

    fn remember(&self, endpoint: &Endpoint, way: Way, path: &str, status: StatusCode) {
        tracing::info!(endpoint = %endpoint.id, path, %status, "engine refuses; not asked again for a while");
        metrics::counter!("outrigger_tokens_engine_refusals_total", "way" => way.as_str())
            .increment(1);
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        if refusals.len() >= REFUSALS_MAX {
            refusals.clear();
        }
        refusals.insert(
            (endpoint.id.clone(), way),
            clock_ms() + self.reprobe_after.as_millis() as u64,
        );
    }
}

/// Path and body; `None` if there is no such way for this request and engine.
fn question(request: &OpenAiRequest, kind: EngineKind, way: Way) -> Option<(&'static str, Bytes)> {
    match (way, kind) {
        (Way::Render, EngineKind::Sglang | EngineKind::TrtLlm) => None,
        (Way::Render, EngineKind::Vllm | EngineKind::Unknown) => {
            let path = match request.api {
                Api::Chat => "/v1/chat/completions/render",
                Api::Completions => "/v1/completions/render",
                Api::Messages => "/v1/messages/render",
                Api::Responses => "/v1/responses/render",
                _ => return None,
            };
            Some((path, request.body.clone()?))
        }
        (Way::Tokenize, EngineKind::TrtLlm) => None,
        (Way::Tokenize, kind) => tokenize(request, kind).map(|body| ("/tokenize", body.into())),
    }
}

/// The body for `/tokenize`, spliced from the request's own bytes.
fn tokenize(request: &OpenAiRequest, kind: EngineKind) -> Option<String> {
    let spans = &request.spans;
    if request.flags.opaque {
        return None;
    }
    let raw_prompt = request.raw(spans.prompt.as_ref())?;
    let mut body = String::with_capacity(raw_prompt.len() + 256);
    let model = request
        .model
        .as_deref()
        .map(|model| serde_json::Value::from(model).to_string());
    let _ = write!(body, "{{\"model\":{}", model.as_deref().unwrap_or("null"));
    let mut field = |name: &str, raw: Option<&str>| {
        if let Some(raw) = raw {
            let _ = write!(body, ",\"{name}\":{raw}");
        }
    };
    let flag = |flag: Option<bool>| flag.map(|flag| if flag { "true" } else { "false" });
    match (request.api, request.prompt) {
        (Api::Chat, Prompt::Messages) => {
            let choice = request.raw(spans.tool_choice.as_ref());
            let effort = request.raw(spans.reasoning_effort.as_ref());
            let sglang = kind == EngineKind::Sglang;
            if !sglang && (choice.is_some_and(|choice| choice != "\"auto\"") || effort.is_some()) {
                // vLLM's `/tokenize` ignores both, its chat does not.
                return None;
            }
            field("messages", Some(raw_prompt));
            field("tools", request.raw(spans.tools.as_ref()));
            field("tool_choice", choice);
            field("reasoning_effort", effort);
            field("chat_template", request.raw(spans.chat_template.as_ref()));
            field(
                "chat_template_kwargs",
                request.raw(spans.chat_template_kwargs.as_ref()),
            );
            field(
                "add_generation_prompt",
                flag(request.flags.add_generation_prompt),
            );
            field(
                "continue_final_message",
                flag(request.flags.continue_final_message),
            );
            field("add_special_tokens", flag(request.flags.add_special_tokens));
        }
        (Api::Completions | Api::Generate, Prompt::Text) if raw_prompt.starts_with('"') => {
            field("prompt", Some(raw_prompt));
            field("add_special_tokens", flag(request.flags.add_special_tokens));
        }
        _ => return None,
    }
    body.push('}');
    Some(body)
}

async fn exchange(
    path: &'static str,
    body: Bytes,
    endpoint: &Arc<Endpoint>,
    client: &HeaderMap,
    upstream: &dyn Upstream,
) -> Result<(StatusCode, Bytes), Unavailable> {
    let mut request = Request::new(RequestBody::full(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static(path);
    let headers = request.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    for name in [
        header::HOST,
        header::AUTHORIZATION,
        header::HeaderName::from_static("x-api-key"),
    ] {
        if let Some(value) = client.get(&name) {
            headers.insert(name, value.clone());
        }
    }
    if endpoint.via == Via::Peer {
        let id = HeaderValue::from_str(&endpoint.id.0).map_err(|_| Unavailable::EngineFailed)?;
        headers.insert(ENDPOINT_HEADER, id);
    }
    let options = SendOptions {
        connect_timeout: Duration::from_secs(1),
        headers_timeout: None,
        replace_stale: true,
        upgrade: false,
        priority: Default::default(),
    };
    let response = upstream
        .send(endpoint, &mut request, options)
        .await
        .map_err(|_| Unavailable::EngineFailed)?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
        .collect()
        .await;
    Ok((
        status,
        body.map_err(|_| Unavailable::EngineFailed)?.to_bytes(),
    ))
}

/// Both forms of answer.
#[derive(Deserialize)]
struct Answer {
    token_ids: Option<Vec<u32>>,
    tokens: Option<Vec<u32>>,
    /// Media: their placeholders are in the ids, but their hashes are not.
    features: Option<IgnoredAny>,
}

fn read(answer: &[u8]) -> Result<Vec<u32>, Unavailable> {
    let list = answer.trim_ascii_start().starts_with(b"[");
    let answer: Answer = if list {
        let all: Vec<Answer> =
            serde_json::from_slice(answer).map_err(|_| Unavailable::EngineFailed)?;
        let [one] = <[Answer; 1]>::try_from(all).map_err(|_| Unavailable::Batch)?;
        one
    } else {
        serde_json::from_slice(answer).map_err(|_| Unavailable::EngineFailed)?
    };
    if answer.features.is_some() {
        return Err(Unavailable::Media);
    }
    answer
        .token_ids
        .or(answer.tokens)
        .ok_or(Unavailable::EngineFailed)
}
