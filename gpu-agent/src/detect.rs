//! What program is behind this address, what does it serve, and where do its KV events come from?
//!
//! Asks the endpoints engines have for that; an endpoint that is absent, closed or odd is one fact less, never an
//! error, unless nobody answers at all. It does not watch: asking again is `engine`'s business.

use crate::engine::{EngineConfig, health, sglang, vllm};
use crate::http::{HttpClient, HttpError};
use crate::load::{Figures, parse};
use crate::numerics;
use crate::zmq_events::EventSource;
use bytes::Bytes;
use http::StatusCode;
use outrigger_xds::report::{EngineKind, EngineState, Model};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::time::Duration;

/// Longest wait for `/server_info`: SGLang asks its scheduler for it, which may be busy, and vLLM (in development mode) looks
/// at the whole machine.
const SERVER_INFO_TIMEOUT: Duration = Duration::from_secs(10);

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Detected {
    /// Identity, with `health` set; `kv_events` is not known yet.
    pub state: EngineState,
    /// Where KV events come from, a source per rank; empty if there are none.
    pub sources: Vec<EventSource>,
    /// KV events are had by asking for them, as TensorRT-LLM gives them.
    pub drains_events: bool,
    /// Start of the process, seconds since the epoch.
    pub process_start: Option<f64>,
    /// `/server_info` of an SGLang did not come, and says where its KV events are.
    pub lacks_server_info: bool,
    /// Some endpoint answered 401 or 403: the key is missing or wrong.
    pub unauthorized: Option<String>,
    /// Whether `/metrics` can be polled.
    pub has_metrics: bool,
    /// Whether `/health` is cheap and means something.
    pub has_health: bool,
}

/// Answers of the detection endpoints, gathered first and judged after.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    pub(crate) version: Option<Bytes>,
    pub(crate) models: Option<Bytes>,
    pub(crate) metrics: Option<Bytes>,
    pub(crate) kv_event_sources: Option<Bytes>,
    pub(crate) server_info: Option<Bytes>,
    /// `/server_info` did not come in time, or not whole.
    lacks_server_info: bool,
    unauthorized: Option<String>,
}

/// Asks the engine.
///
/// # Errors
/// If it does not answer at all, or says that it is not ready (503).
pub async fn detect(client: &HttpClient, config: &EngineConfig) -> Result<Detected, HttpError> {
    let answers = ask(client).await?;
    let figures = answers
        .metrics
        .as_deref()
        .map(|page| parse(&String::from_utf8_lossy(page)))
        .unwrap_or_default();
    let kind = kind(&answers, &figures);
    let mut state = EngineState {
        kind,
        models: answers
            .models
            .as_deref()
            .map(read_models)
            .unwrap_or_default(),
        role: config.role,
        health: health(figures.is_asleep),
        dp_size: figures.ranks.max(1),
        block_tokens: figures.block_tokens.unwrap_or(0),
        kv_blocks: figures.kv_blocks.unwrap_or(0),
        ..EngineState::default()
    };
    let host = host(client.authority());
    let mut sources = match kind {
        EngineKind::Vllm => vllm::complete(&answers, host, &mut state),
        EngineKind::Sglang => sglang::complete(&answers, &figures, host, &mut state),
        EngineKind::TrtLlm => {
            state.version = version(answers.version.as_ref());
            Vec::new()
        }
        EngineKind::Unknown => Vec::new(),
    };
    state.numerics = numerics(&answers, &figures, kind, config);
    if let Some(configured) = &config.bootstrap {
        state.bootstrap.clone_from(configured);
    }
    if let Some(configured) = &config.kv_endpoints {
        sources = configured.sources(host, state.dp_size);
    }
    if let Some(denied) = &answers.unauthorized {
        state.reason = format!("{denied}: the API key is missing or wrong");
    }
    Ok(Detected {
        drains_events: kind == EngineKind::TrtLlm && sources.is_empty(),
        process_start: figures.process_start,
        lacks_server_info: answers.lacks_server_info
            && kind == EngineKind::Sglang
            && sources.is_empty(),
        state,
        sources,
        unauthorized: answers.unauthorized,
        has_metrics: figures.kind != EngineKind::Unknown,
        has_health: kind == EngineKind::Vllm,
    })
}

/// What the engine says, and what somebody says for it.
fn numerics(
    answers: &Answers,
    figures: &Figures,
    kind: EngineKind,
    config: &EngineConfig,
) -> String {
    let info = answers.server_info.as_ref();
    let said = match kind {
        EngineKind::Vllm => numerics::of_vllm(info, figures.cache_dtype.as_deref()),
        EngineKind::Sglang => numerics::of_sglang(info),
        EngineKind::TrtLlm | EngineKind::Unknown => String::new(),
    };
    // Shown, as it is compared with others of which no more is known.
    let untold = answers.lacks_server_info.then_some("server_info=untold");
    let label = config
        .cohort
        .as_ref()
        .map(|label| format!("cohort={label}"));
    [Some(said.as_str()), untold, label.as_deref()]
        .into_iter()
        .flatten()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

async fn ask(client: &HttpClient) -> Result<Answers, HttpError> {
    let mut answers = Answers::default();
    answers.version = answers.judge(client, "/version").await?;
    answers.models = answers.judge(client, "/v1/models").await?;
    answers.metrics = answers.judge(client, "/metrics").await?;
    answers.kv_event_sources = answers.judge(client, "/kv_event_sources").await?;
    answers.ask_server_info(client).await;
    Ok(answers)
}

impl Answers {
    /// Both SGLang and vLLM (in development mode) say here how they compute, each in its own way. It may be slow on an
    /// engine that is well, and is no sign of life: without it less is known, and it is not asked again beside itself.
    async fn ask_server_info(&mut self, client: &HttpClient) {
        const PATH: &str = "/server_info";
        match client.get_within(PATH, SERVER_INFO_TIMEOUT).await {
            Ok((StatusCode::OK, body)) => self.server_info = Some(body),
            Ok((status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN), _)) => {
                self.unauthorized = Some(format!("GET {PATH} answered {status}"));
            }
            Ok(_) => {}
            Err(error) => {
                self.lacks_server_info = true;
                if let HttpError::TooLong(_) = error {
                    metrics::counter!("outrigger_engine_answers_too_long_total").increment(1);
                }
                tracing::warn!(engine = client.authority(), path = PATH, %error, "not told what decides its numbers, nor (SGLang) where its KV events are");
            }
        }
    }

    /// The body of a 200; nothing for other statuses. No answer at all, or 503, ends the detection: the engine is not
    /// up.
    async fn judge(&mut self, client: &HttpClient, path: &str) -> Result<Option<Bytes>, HttpError> {
        match client.get(path).await {
            Ok((StatusCode::OK, body)) => Ok(Some(body)),
            Ok((status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN), _)) => {
                self.unauthorized = Some(format!("GET {path} answered {status}"));
                Ok(None)
            }
            Ok((StatusCode::SERVICE_UNAVAILABLE, _)) => {
                Err(HttpError::Transport(format!("GET {path} answered 503")))
            }
            Ok(_) => Ok(None),
            Err(HttpError::TooLong(bytes)) => {
                metrics::counter!("outrigger_engine_answers_too_long_total").increment(1);
                tracing::warn!(engine = client.authority(), path, bytes, "answer too long");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

#[derive(Deserialize)]
struct Version {
    version: String,
}

/// The `version` of `/version` (or `/server_info`).
pub(crate) fn version(body: Option<&Bytes>) -> String {
    body.and_then(|body| serde_json::from_slice::<Version>(body).ok())
        .map(|found| found.version)
        .unwrap_or_default()
}

#[derive(Deserialize)]
struct ModelList<'a> {
    #[serde(borrow)]
    data: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
struct ModelCard {
    id: String,
    #[serde(default)]
    parent: Option<String>,
    #[serde(default)]
    root: Option<String>,
    #[serde(default)]
    max_model_len: Option<u64>,
    #[serde(default)]
    owned_by: Option<String>,
}

/// The entries of `/v1/models`, base models first, each with its text as it came.
pub(crate) fn read_models(body: &[u8]) -> Vec<Model> {
    let Ok(list) = serde_json::from_slice::<ModelList<'_>>(body) else {
        return Vec::new();
    };
    let read = |raw: &&RawValue| {
        let card: ModelCard = serde_json::from_str(raw.get()).ok()?;
        Some(Model {
            id: card.id,
            parent: card.parent,
            context_tokens: card.max_model_len.unwrap_or(0),
            root: card.root.unwrap_or_default(),
            card: raw.get().to_owned(),
        })
    };
    let mut models: Vec<Model> = list.data.iter().filter_map(read).collect();
    models.sort_by_key(|model| model.parent.is_some());
    models
}

fn kind(answers: &Answers, figures: &Figures) -> EngineKind {
    if figures.kind != EngineKind::Unknown {
        return figures.kind;
    }
    if answers.kv_event_sources.is_some() {
        return EngineKind::Vllm;
    }
    if answers
        .server_info
        .as_deref()
        .is_some_and(sglang::is_server_info)
    {
        return EngineKind::Sglang;
    }
    let owners = answers.models.as_deref().map(owners).unwrap_or_default();
    match owners.first().map(String::as_str) {
        Some("vllm") => EngineKind::Vllm,
        Some("sglang") => EngineKind::Sglang,
        Some("tensorrt_llm") => EngineKind::TrtLlm,
        _ => EngineKind::Unknown,
    }
}

fn owners(body: &[u8]) -> Vec<String> {
    let Ok(list) = serde_json::from_slice::<ModelList<'_>>(body) else {
        return Vec::new();
    };
    list.data
        .iter()
        .filter_map(|raw| serde_json::from_str::<ModelCard>(raw.get()).ok()?.owned_by)
        .collect()
}

/// The host of `host:port`, brackets included.
fn host(authority: &str) -> &str {
    authority
        .rsplit_once(':')
        .map_or(authority, |(host, _)| host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_kept_verbatim_and_base_models_come_first() {
        let lora = r#"{"id": "l", "parent":"m","extra":[1 ,2]}"#;
        let base = r#"{"id":"m","root":"/m","max_model_len":2048}"#;
        let models =
            read_models(format!(r#"{{"object":"list","data":[{lora},{base}]}}"#).as_bytes());
        assert_eq!(
            models
                .iter()
                .map(|model| model.id.as_str())
                .collect::<Vec<_>>(),
            ["m", "l"]
        );
        assert_eq!(
            (models[0].context_tokens, models[0].root.as_str()),
            (2048, "/m")
        );
        assert_eq!(
            (models[1].card.as_str(), models[1].parent.as_deref()),
            (lora, Some("m"))
        );
        assert!(read_models(b"<html>").is_empty());
    }
}
