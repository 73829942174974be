//! The `migration` filter: a stream survives its engine, and so does an answer in one piece.
//!
//! What it answers: what a stream's prompt and tokens are, when its engine can no longer be trusted with it, whether it
//! can go on elsewhere so that the client notices nothing but time, and how. What it does not do: choose the engine
//! (the filters after it do, once per call), or judge engines. A stream that cannot go on says why, and how far it got.
//! An answer in one piece is held until it is whole, and asked for anew if it never is.

mod begin;
mod body;
mod budget;
mod cause;
mod event;
mod leg;
mod piece;
mod recipe;
mod resume;
mod rewrite;
mod splice;
#[cfg(test)]
mod splice_tests;
mod suspicion;
#[cfg(test)]
mod tests;
mod told;
mod whole;

use crate::{
    body::{RequestBody, ResponseBody},
    filter::{Context, Handled, HttpFilter, Next, StreamObserver},
    openai::{Api, OpenAiRequest, Prompt},
    registry,
    services::Services,
    sse,
};
use body::{Migrating, Report};
pub use budget::Shared;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use leg::Leg;
use outrigger_xds::report::EngineKind;
use resume::Call;
use serde::Deserialize;
use std::{sync::Arc, time::Duration};
use suspicion::{Deaths, SUSPECT_DEATHS};
use told::Kept;

/// Our own type.
pub const TYPE_URL: &str = "type.googleapis.com/outrigger.filters.http.migration.v1.Config";

/// Longest body that is asked for ids: an engine's first event tells those of the prompt, in some eight bytes each, and
/// one that is longer than events may be would reach the client as it is. No token is shorter than a byte.
const ASK_BODY_BYTES_MAX: usize = sse::EVENT_BYTES_MAX / 8;
/// Ends a request's object instead of its last brace. Of a key that comes twice engines take the last.
const ASK_IDS: &str = ",\"return_token_ids\":true}";

/// Configuration of the filter.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// A stream that is silent for so long moves. Default 30 s; never more than `inter_token_timeout_ms` of `openai`.
    pub stall_ms: u64,
    /// From a break to the first token elsewhere. Default 120 s.
    pub resume_timeout_ms: u64,
    /// Moves in a row that bring no token. Default 3.
    pub attempts_max: u32,
    /// Streams that wait for their first token elsewhere, in percent of all. Default 20…
    pub budget_percent: u32,
    /// …or so many. Default 8.
    pub min_resume_concurrency: u32,
    /// Bytes of token ids held for all streams, and of answers that are not whole yet. Default 256 MiB.
    pub held_bytes_max: usize,
    /// Bytes of one answer in one piece that are held until it is whole. Default 8 MiB.
    pub whole_bytes_max: usize,
    /// Streams with a seed or with penalties go on where only their distribution stays the same. Default off.
    pub same_distribution: bool,
    /// Streams of vLLM get a seed where no client gave one, so that what is drawn can be drawn again. Default off.
    pub seeds: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            stall_ms: 30_000,
            resume_timeout_ms: 120_000,
            attempts_max: 3,
            budget_percent: 20,
            min_resume_concurrency: 8,
            held_bytes_max: 256 << 20,
            whole_bytes_max: 8 << 20,
            same_distribution: false,
            seeds: false,
        }
    }
}

impl Config {
    fn stall(&self) -> Duration {
        Duration::from_millis(self.stall_ms)
    }

    fn resume_timeout(&self) -> Duration {
        Duration::from_millis(self.resume_timeout_ms)
    }
}

/// What all streams of a filter need.
struct Policy {
    services: Services,
    config: Config,
}

/// The filter.
pub struct Migration(Arc<Policy>);

/// The registry's constructor.
///
/// # Errors
/// The configuration is wrong; the error names the field.
pub fn factory(
    value: &serde_json::Value,
    services: &Services,
) -> Result<Arc<dyn HttpFilter>, String> {
    let config: Config = registry::parse(value)?;
    if config.stall_ms == 0 || config.resume_timeout_ms == 0 {
        return Err("stall_ms, resume_timeout_ms: must be at least 1".into());
    }
    if config.budget_percent > 100 {
        return Err("budget_percent: must be at most 100".into());
    }
    Ok(Arc::new(Migration(Arc::new(Policy {
        services: services.clone(),
        config,
    }))))
}

impl HttpFilter for Migration {
    fn handle<'a>(
        &'a self,
        mut request: Request<RequestBody>,
        context: &'a mut Context,
        next: Next<'a>,
    ) -> Handled<'a> {
        // Who has the client moves its streams; on the inbound side that is the peer.
        let openai = context.openai.as_ref().filter(|_| !context.route.inbound);
        let Some(openai) = openai.filter(|openai| is_ours(openai)).cloned() else {
            return next.run(request, context);
        };
        Box::pin(async move {
            let policy = &self.0;
            let bytes = openai.body.as_ref().map_or(0, Bytes::len);
            let cluster = context.route.cluster.clone();
            let told = openai.stream
                && !openai.return_token_ids
                && bytes <= ASK_BODY_BYTES_MAX
                && policy.tells_ids(&openai, &cluster);
            let help = if told {
                let seed = policy.seed(&openai, &cluster);
                ask_for_ids(&mut request, seed);
                Help::Asked(seed.is_some())
            } else {
                policy.help_by_text(&openai, &cluster, request.headers())
            };
            if openai.stream {
                context.deaths_max = SUSPECT_DEATHS;
            }
            let call = Call::new(policy.clone(), next.keep(), &request, context);
            context.keeps_prompt_ids = matches!(help, Help::Text { retells: true, .. });
            // Streams count as long as they run, whole answers until they are whole.
            let _counted = (!openai.stream).then(|| policy.services.migration.enter());
            let above = std::mem::take(&mut context.observers);
            let answer = next.run(request, context).await;
            let in_trouble = openai.stream && begin::is_in_trouble(&call, context, &answer);
            let (answer, deaths) = match in_trouble {
                // Boxed: it is rare, and would be part of every request's future.
                true => Box::pin(begin::begin(&call, context, answer)).await,
                false => {
                    // An answer in one piece says nothing of its request, but of its engine.
                    let breaks = &policy.services.migration.breaks;
                    breaks.note_all(context.losses.drain(..));
                    (answer, Deaths::default())
                }
            };
            let below = std::mem::replace(&mut context.observers, above);
            let prompt = context.prompt.ids.take();
            let response = answer?;
            if is_stream(&response) {
                return Ok(follow(
                    response,
                    call,
                    (openai, deaths),
                    context,
                    below,
                    (help, prompt),
                ));
            }
            whole::hold(response, &call, &openai, context, below).await
        })
    }
}

/// What is done so that a stream can go on elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Help {
    None,
    /// Its engine is asked for ids, and may be given a seed.
    Asked(bool),
    /// Its text is kept: ids may be made of it, or it comes again.
    Text {
        retells: bool,
        compares: bool,
    },
}

/// Requests whose answer has a known form, and that can be sent again.
fn is_ours(openai: &OpenAiRequest) -> bool {
    matches!(openai.api, Api::Chat | Api::Completions)
        && openai.body.is_some()
        && openai.prompt != Prompt::None
}

/// A stream that has begun well, and is not compressed.
fn is_stream(response: &Response<ResponseBody>) -> bool {
    let headers = response.headers();
    response.status() == StatusCode::OK
        && sse::is_event_stream(headers)
        && headers
            .get(header::CONTENT_ENCODING)
            .is_none_or(|coding| coding == "identity")
}

impl Policy {
    /// Whether every engine that may get the request understands `return_token_ids` in a stream.
    fn tells_ids(&self, openai: &OpenAiRequest, cluster: &str) -> bool {
        self.all_are(openai, cluster, |kind| match kind {
            EngineKind::Vllm => true,
            // Its chat refuses it in streams.
            EngineKind::Sglang => openai.api == Api::Completions,
            EngineKind::TrtLlm | EngineKind::Unknown => false,
        })
    }

    /// What is done for a stream that is told no ids.
    fn help_by_text(&self, openai: &OpenAiRequest, cluster: &str, headers: &HeaderMap) -> Help {
        if !openai.stream {
            return Help::None;
        }
        let retells = self.may_tell(openai, cluster, headers);
        let compares = Self::may_compare(openai);
        match retells || compares {
            true => Help::Text { retells, compares },
            false => Help::None,
        }
    }

    /// The seed of a stream that has none, where that is wanted, and engines keep to it.
    fn seed(&self, openai: &OpenAiRequest, cluster: &str) -> Option<u32> {
        let wanted = self.config.seeds && !openai.has_seed && openai.n == 1;
        let keeps = |kind| kind == EngineKind::Vllm;
        (wanted && self.all_are(openai, cluster, keeps)).then(|| rand::random::<u32>() >> 1)
    }

    /// Whether every engine that may get the request is of a kind that suits; false if there is none.
    fn all_are(
        &self,
        openai: &OpenAiRequest,
        cluster: &str,
        suits: impl Fn(EngineKind) -> bool,
    ) -> bool {
        let Some(view) = self.services.endpoints.view(cluster) else {
            return false;
        };
        let model = openai.model.as_deref();
        let mut candidates = view
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.fits(model))
            .map(|endpoint| endpoint.live.load().state.kind)
            .peekable();
        candidates.peek().is_some() && candidates.all(suits)
    }
}

/// Adds fields to the body, which stays where it is.
fn ask_for_ids(request: &mut Request<RequestBody>, seed: Option<u32>) {
    let Some(whole) = request.body().whole() else {
        return;
    };
    let Some(brace) = memchr::memrchr(b'}', whole) else {
        return;
    };
    if !whole[brace + 1..].trim_ascii().is_empty() {
        // No object: the engine says so.
        return;
    }
    let end = match seed {
        None => Bytes::from_static(ASK_IDS.as_bytes()),
        Some(seed) => format!(",\"seed\":{seed}{ASK_IDS}").into(),
    };
    let length = HeaderValue::from(brace + end.len());
    let body = RequestBody::joined(whole.slice(..brace), end);
    *request.body_mut() = body;
    if let Some(told) = request.headers_mut().get_mut(header::CONTENT_LENGTH) {
        *told = length;
    }
}

/// Puts the stream under watch.
fn follow(
    response: Response<ResponseBody>,
    call: Arc<Call>,
    (openai, deaths): (Arc<OpenAiRequest>, Deaths),
    context: &mut Context,
    below: Vec<Box<dyn StreamObserver>>,
    (help, prompt): (Help, Option<Arc<[u32]>>),
) -> Response<ResponseBody> {
    let (mut parts, body) = response.into_parts();
    parts.headers.remove(header::CONTENT_LENGTH);
    let leg = Leg::new(body, below, context.log.upstream_host.clone(), None);
    let report = Arc::<Report>::default();
    context
        .observers
        .push(Box::new(body::Reporter(report.clone())));
    context.watches_gaps = true;
    let mut body = Migrating::new(call, openai, leg, report, deaths);
    match help {
        Help::Text { retells, compares } => {
            body.splice.keep_text(Kept::new(prompt, retells, compares));
        }
        Help::Asked(seeded) => body.has_our_seed = seeded,
        Help::None => {}
    }
    Response::from_parts(parts, body.boxed_unsync())
}
