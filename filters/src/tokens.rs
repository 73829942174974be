//! Prompt to token ids: exactly as the engine will see them, or not at all.
//!
//! What it answers: the ids of a request's prompt, from the cheapest source that gives exactly the engine's own:
//! ids in the request, a local tokenizer verified against the engine, the engine's `render`, its `tokenize`. What it
//! does not do: guess. Where no source is exact it says why, and the caller routes by something else.

pub(crate) mod cache;
mod engine;
mod generated;
mod local;
mod template;
mod verify;

use crate::{
    endpoints::Endpoint,
    openai::{Api, OpenAiRequest, Prompt},
    services::Services,
};
use ahash::AHashMap;
use arc_swap::ArcSwap;
use cache::Cache;
use engine::{Asker, Way};
use http::HeaderMap;
use local::{Kind, LocalModel};
use outrigger_xds::report::EngineState;
use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};
use verify::{Trust, Verified};
use xxhash_rust::xxh3::Xxh3;

/// Limits and switches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizersConfig {
    /// Use tokenizers found on this machine. Default on.
    pub local: bool,
    /// Ask engines. Default on.
    pub engines: bool,
    /// Most bytes of text and ids that one local tokenizer keeps of earlier segments. Default 64 MiB.
    pub segment_cache_bytes_max: usize,
    /// Most bytes of ids kept of engines' answers. Default 32 MiB.
    pub answer_cache_bytes_max: usize,
    /// Prompts of at most so many bytes are tokenised on the request's thread. Default 4 KiB.
    pub inline_bytes_max: usize,
    /// Longest wait for an engine's answer. Default 2 s.
    pub engine_timeout: Duration,
    /// How long an engine that refused (404; 403 for `render`) is not asked again. Default 60 s.
    pub reprobe_after: Duration,
    /// How long a probe of a local tokenizer that said nothing (no answer, client not let in) is not repeated. Default 5 s.
    pub verify_again_after: Duration,
}

impl Default for TokenizersConfig {
    fn default() -> Self {
        Self {
            local: true,
            engines: true,
            segment_cache_bytes_max: 64 << 20,
            answer_cache_bytes_max: 32 << 20,
            inline_bytes_max: 4 << 10,
            engine_timeout: Duration::from_secs(2),
            reprobe_after: Duration::from_secs(60),
            verify_again_after: Duration::from_secs(5),
        }
    }
}

/// Where token ids came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// The request carries them.
    Ids,
    /// A tokenizer on this machine.
    Local,
    /// The engine's `render`.
    Render,
    /// The engine's `tokenize`.
    Tokenize,
    /// An engine's earlier answer to the same prompt.
    Remembered,
}

impl How {
    /// Lower-case name, as in metrics and logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ids => "ids",
            Self::Local => "local",
            Self::Render => "render",
            Self::Tokenize => "tokenize",
            Self::Remembered => "remembered",
        }
    }
}

/// A prompt's token ids, exactly as the engine will have them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenized {
    /// The ids.
    pub ids: Arc<[u32]>,
    /// Where they came from.
    pub how: How,
}

/// Why there are no exact ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.as_str())]
pub enum Unavailable {
    /// The body was not read, or names no prompt.
    NoPrompt,
    /// The API is none whose prompt we know.
    UnsupportedApi,
    /// Images, audio, embeddings.
    Media,
    /// Several prompts at once.
    Batch,
    /// A parameter changes the prompt in a way that only the engine knows.
    Opaque,
    /// No engine was to be asked, and nothing here can do it.
    NotAsked,
    /// The engine has no way to tell (403, 404).
    EngineRefused,
    /// The engine does not let this client ask (401, 403): that says nothing of the prompt, nor of other clients.
    EngineDenied,
    /// The engine says the request is wrong; it will say so to the client, too.
    EngineRejected,
    /// The engine did not answer, or not in time, or has too much to do (429).
    EngineFailed,
}

impl Unavailable {
    /// Lower-case name, as in metrics and logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoPrompt => "no_prompt",
            Self::UnsupportedApi => "unsupported_api",
            Self::Media => "media",
            Self::Batch => "batch",
            Self::Opaque => "opaque",
            Self::NotAsked => "not_asked",
            Self::EngineRefused => "engine_refused",
            Self::EngineDenied => "engine_denied",
            Self::EngineRejected => "engine_rejected",
            Self::EngineFailed => "engine_failed",
        }
    }
}

/// Whom and how to ask.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// An endpoint that serves the request's model: its files count, and it is asked.
    pub endpoint: &'a Arc<Endpoint>,
    /// Headers of the client's request; its credentials go along.
    pub headers: &'a HeaderMap,
    /// Whether a round trip to the engine is worth it.
    pub ask: bool,
    /// The way there, and threads for the work.
    pub services: &'a Services,
}

/// A tokenizer of this machine, once it is loaded; `None` in it means it cannot be had.
type Loading = Arc<OnceLock<Option<Arc<Verified>>>>;

/// Every tokenizer this proxy has come to know.
pub struct Tokenizers {
    config: TokenizersConfig,
    asker: Asker,
    /// By the directory that holds the model.
    local: ArcSwap<AHashMap<PathBuf, Loading>>,
    answers: Cache<u128, Arc<[u32]>>,
}

/// Most local tokenizers loaded; models beyond that are asked of their engines.
pub const LOCAL_MODELS_MAX: usize = 64;

impl Tokenizers {
    /// None yet; they are found by the engines' models.
    #[must_use]
    pub fn new(config: TokenizersConfig) -> Self {
        let asker = Asker::new(config.engine_timeout, config.reprobe_after);
        let answers = Cache::new(config.answer_cache_bytes_max);
        Self {
            config,
            asker,
            local: ArcSwap::default(),
            answers,
        }
    }

    /// The token ids of a request's prompt.
    ///
    /// # Errors
    /// Why no source gives exactly what the engine will see.
    pub async fn tokens(
        &self,
        request: &Arc<OpenAiRequest>,
        source: Source<'_>,
    ) -> Result<Tokenized, Unavailable> {
        possible(request)?;
        if request.prompt == Prompt::TokenIds {
            return self.ids_in_request(request, source.services).await;
        }
        if let Some(ids) = self.local_ids(request, source).await {
            return Ok(Tokenized {
                ids: ids.into(),
                how: How::Local,
            });
        }
        let key = key(request);
        if let Some(ids) = self.answers.get(&key) {
            return Ok(Tokenized {
                ids,
                how: How::Remembered,
            });
        }
        if !source.ask || !self.config.engines {
            return Err(Unavailable::NotAsked);
        }
        let upstream = source.services.upstream.as_ref();
        let (ids, way) = self
            .asker
            .ask(request, source.endpoint, source.headers, upstream)
            .await?;
        let ids: Arc<[u32]> = ids.into();
        if self.answers.insert(key, ids.clone(), ids.len() * 4) {
            metrics::counter!("outrigger_tokens_answer_cache_evictions_total").increment(1);
        }
        let how = match way {
            Way::Render => How::Render,
            Way::Tokenize => How::Tokenize,
        };
        Ok(Tokenized { ids, how })
    }

    async fn ids_in_request(
        &self,
        request: &Arc<OpenAiRequest>,
        services: &Services,
    ) -> Result<Tokenized, Unavailable> {
        let ids = self.run(request, services, ids_in).await.flatten();
        ids.map(|ids| Tokenized {
            ids: ids.into(),
            how: How::Ids,
        })
        .ok_or(Unavailable::NoPrompt)
    }

    async fn local_ids(
        &self,
        request: &Arc<OpenAiRequest>,
        source: Source<'_>,
    ) -> Option<Vec<u32>> {
        let kind = Kind::of(request)?;
        let model = self.loaded(request, source)?;
        if model.trust(kind) == Trust::Unknown && self.config.engines {
            let again_after = self.config.verify_again_after;
            model
                .verify(kind, request, source, &self.asker, again_after)
                .await;
        }
        if !matches!(model.trust(kind), Trust::Trusted | Trust::Assumed) {
            return None;
        }
        let ids = self
            .run(request, source.services, move |request| {
                model.local.encode(request, kind)
            })
            .await?;
        ids.inspect_err(|error| tracing::debug!(error, "prompt is left to the engine to tokenise"))
            .ok()
    }

    /// The local tokenizer for the request's model, if it is ready. The first request sets it loading and does not
    /// wait for it.
    fn loaded(&self, request: &OpenAiRequest, source: Source<'_>) -> Option<Arc<Verified>> {
        if !self.config.local {
            return None;
        }
        let live = source.endpoint.live.load();
        let root = root(&live.state, request.model.as_deref()?)?;
        let known = self.local.load();
        if let Some(loading) = known.get(&root) {
            return loading.get().cloned().flatten();
        }
        if known.len() >= LOCAL_MODELS_MAX {
            metrics::counter!("outrigger_tokens_local_models_overflow_total").increment(1);
            return None;
        }
        let mine = Loading::default();
        let before = self.local.rcu(|known| {
            let mut more = AHashMap::clone(known);
            more.entry(root.clone()).or_insert_with(|| mine.clone());
            more
        });
        if !before.contains_key(&root) {
            let segment_cache_bytes_max = self.config.segment_cache_bytes_max;
            source
                .services
                .compute
                .spawn_blocking(move || load(&root, &mine, segment_cache_bytes_max));
        }
        None
    }

    /// Runs work on a prompt where its size allows: here, or off the request threads.
    async fn run<T: Send + 'static>(
        &self,
        request: &Arc<OpenAiRequest>,
        services: &Services,
        work: impl FnOnce(&OpenAiRequest) -> T + Send + 'static,
    ) -> Option<T> {
        let size = request
            .spans
            .prompt
            .as_ref()
            .map_or(0, ExactSizeIterator::len);
        if size <= self.config.inline_bytes_max {
            return Some(work(request));
        }
        let request = request.clone();
        services
            .compute
            .spawn_blocking(move || work(&request))
            .await
            .ok()
    }
}

/// Whether exact ids are possible at all.
fn possible(request: &OpenAiRequest) -> Result<(), Unavailable> {
    if !request.is_generation() {
        return Err(Unavailable::UnsupportedApi);
    }
    match request.prompt {
        Prompt::None => Err(Unavailable::NoPrompt),
        Prompt::Media => Err(Unavailable::Media),
        Prompt::Batch => Err(Unavailable::Batch),
        Prompt::Messages | Prompt::Text | Prompt::TokenIds if request.flags.opaque => {
            Err(Unavailable::Opaque)
        }
        Prompt::Messages | Prompt::Text | Prompt::TokenIds => Ok(()),
    }
}

fn ids_in(request: &OpenAiRequest) -> Option<Vec<u32>> {
    let raw = request.raw(request.spans.prompt.as_ref())?;
    let one = serde_json::from_str::<Vec<u32>>(raw);
    one.or_else(|_| serde_json::from_str::<[Vec<u32>; 1]>(raw).map(|[ids]| ids))
        .ok()
}

/// The directory of a model's files on this machine. An adapter is tokenised as its base model.
fn root(state: &EngineState, model: &str) -> Option<PathBuf> {
    let by_id = |id: &str| state.models.iter().find(|known| known.id == id);
    let model = by_id(model)?;
    let base = model.parent.as_deref().and_then(by_id).unwrap_or(model);
    let root = PathBuf::from(&base.root);
    root.is_absolute().then_some(root)
}

fn load(
    root: &std::path::Path,
    loading: &OnceLock<Option<Arc<Verified>>>,
    segment_cache_bytes_max: usize,
) {
    let started = std::time::Instant::now();
    let model = match LocalModel::load(root, segment_cache_bytes_max) {
        Ok(model) => {
            tracing::info!(model = %root.display(), ms = started.elapsed().as_millis() as u64, "local tokenizer loaded");
            Some(Arc::new(Verified::new(model)))
        }
        Err(error) => {
            metrics::counter!("outrigger_tokens_local_load_failures_total").increment(1);
            tracing::info!(model = %root.display(), error, "no local tokenizer; engines are asked instead");
            None
        }
    };
    let _ = loading.set(model);
}

/// Names everything that decides how a prompt is tokenised.
fn key(request: &OpenAiRequest) -> u128 {
    let mut hasher = Xxh3::new();
    let mut part = |part: Option<&str>| {
        hasher.update(&part.map_or(0, |part| part.len() as u64 + 1).to_le_bytes());
        hasher.update(part.unwrap_or_default().as_bytes());
    };
    part(request.model.as_deref());
    part(Some(request.api.as_str()));
    if request.api == Api::Responses {
        // Instructions and more stand elsewhere in its body.
        part(
            request
                .body
                .as_deref()
                .and_then(|body| std::str::from_utf8(body).ok()),
        );
    }
    let spans = &request.spans;
    for span in [
        &spans.prompt,
        &spans.system,
        &spans.tools,
        &spans.tool_choice,
        &spans.documents,
        &spans.chat_template,
        &spans.chat_template_kwargs,
        &spans.reasoning_effort,
    ] {
        part(request.raw(span.as_ref()));
    }
    let flags = request.flags;
    for flag in [
        flags.add_generation_prompt,
        flags.continue_final_message,
        flags.add_special_tokens,
    ] {
        part(flag.map(|flag| if flag { "1" } else { "0" }));
    }
    hasher.digest128()
}
