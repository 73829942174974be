//! The `kv_routing` filter: ranks the endpoints of a generation by what they have cached of its prompt and how busy
//! they are.
//!
//! What it answers: in which order `router` should try the endpoints, how many prompt tokens each is predicted to have
//! cached, and why. What it does not do: send, retry, or know how tokens or caches are learned (see
//! [`crate::tokens`], [`crate::kv_index`]). Where nothing is known of a prompt it leaves no ranking, and the cluster's
//! `lb_policy` decides.

mod cost;
mod decision;
mod sent;
mod span;

use crate::{
    body::RequestBody,
    endpoints::{Endpoint, Via},
    filter::{Context, Handled, HttpFilter, Next, StreamObserver},
    kv_index::Flight,
    openai::{OpenAiRequest, Prompt},
    registry,
    router::attempt::RANK_HEADER,
    services::Services,
    tokens::{Source, Tokenized, Unavailable},
};
pub use cost::Weights;
use decision::{Blocks, Decider};
use http::{HeaderMap, HeaderName, HeaderValue, Request};
use outrigger_xds::block_hash::BLOCK_TOKENS_DEFAULT;
use sent::Sent;
use serde::Deserialize;
use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

/// Our own type.
pub const TYPE_URL: &str = "type.googleapis.com/outrigger.filters.http.kv_routing.v1.Config";

/// Carries the decision to a client that may see it and asked for it.
pub const DECISION_HEADER: HeaderName = HeaderName::from_static("x-outrigger-decision");

/// What a byte of prompt makes in tokens where they cannot be counted.
const BYTES_PER_TOKEN: usize = 4;

/// Configuration of the filter.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Weights of the cost.
    pub weights: Weights,
    /// Tokens in a canonical block; must be what the feeds use. Default 32.
    pub block_tokens: usize,
    /// Count prompt tokens that are still to be prefilled. Default on.
    pub track_prefill_tokens: bool,
    /// Most block hashes told to the proxy beside the engine. Default 256.
    pub tell_blocks_max: usize,
    /// Allow `x-outrigger-decision` on responses to requests that ask for debugging. Default off.
    pub decision_header: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            weights: Weights::default(),
            block_tokens: BLOCK_TOKENS_DEFAULT,
            track_prefill_tokens: true,
            tell_blocks_max: 256,
            decision_header: false,
        }
    }
}

/// The filter.
pub struct KvRouting {
    services: Services,
    config: Config,
    sent: Sent,
}

/// The registry's constructor.
///
/// # Errors
/// The configuration is wrong; the error names the field.
pub fn factory(
    value: &serde_json::Value,
    services: &Services,
) -> Result<Arc<dyn HttpFilter>, String> {
    let mut config: Config = registry::parse(value)?;
    config.weights.check()?;
    if !config.track_prefill_tokens {
        // Then nothing is known of prefill, and only decode load tells endpoints apart.
        config.weights.prefill_load_scale = 0.0;
    }
    if config.block_tokens == 0 {
        return Err("block_tokens: must be at least 1".into());
    }
    Ok(Arc::new(KvRouting {
        services: services.clone(),
        config,
        sent: Sent::default(),
    }))
}

impl HttpFilter for KvRouting {
    fn handle<'a>(
        &'a self,
        request: Request<RequestBody>,
        context: &'a mut Context,
        next: Next<'a>,
    ) -> Handled<'a> {
        Box::pin(async move {
            let openai = context
                .openai
                .clone()
                .filter(|openai| openai.is_generation());
            let Some(openai) = openai else {
                return next.run(request, context).await;
            };
            let started = Instant::now();
            let decided = self
                .decide(&openai, request.headers(), context, started)
                .await;
            let mut flight = None;
            let known = decided
                .as_ref()
                .map_or_else(|reason| *reason, |(how, _)| how);
            span::tell(context, known, self.config.block_tokens, started);
            match decided {
                Ok((how, begun)) => {
                    count(how, context);
                    flight = begun;
                }
                Err(reason) => {
                    count("load", context);
                    metrics::counter!("outrigger_routing_fallback_total", "reason" => reason)
                        .increment(1);
                }
            }
            metrics::histogram!("outrigger_routing_decision_seconds").record(started.elapsed());
            let mut response = next.run(request, context).await?;
            if let Some(flight) = flight.and_then(|flight| self.follow(flight, context)) {
                // Observers live until the response is over, and so does what is in flight.
                context.observers.push(Box::new(flight));
            }
            self.explain(response.headers_mut(), context);
            Ok(response)
        })
    }

    fn gives_back(&self, _context: &Context) -> bool {
        true
    }
}

/// How a request was routed; one that is sent again was counted.
fn count(how: &'static str, context: &Context) {
    if !context.again {
        metrics::counter!("outrigger_routing_total", "how" => how).increment(1);
    }
}

impl KvRouting {
    /// Leaves a ranking in the context and says how the prompt was known, or why there is none. The blocks are in flight at
    /// the best endpoint from now on.
    async fn decide(
        &self,
        openai: &Arc<OpenAiRequest>,
        headers: &HeaderMap,
        context: &mut Context,
        started: Instant,
    ) -> Result<(&'static str, Option<Flight>), &'static str> {
        context.prompt.tokens = openai.estimated_prompt_tokens();
        let model = openai.model.as_deref().ok_or("no_model")?;
        let view = self
            .services
            .endpoints
            .view(&context.route.cluster)
            .ok_or("no_cluster")?;
        let mut candidates = view.candidates(Some(model));
        candidates.retain(|endpoint| endpoint.serves(model));
        let asked = whom_to_ask(&candidates).ok_or("no_candidates")?.clone();
        // With one candidate there is nothing to choose: a prediction is made if it costs no round trip.
        let ask = candidates.len() > 1;
        let source = Source {
            endpoint: &asked,
            headers,
            ask,
            services: &self.services,
        };
        let (blocks, how) = match self.services.tokenizers.tokens(openai, source).await {
            Ok(Tokenized { ids, how }) => (Blocks::tokens(ids), how.as_str()),
            Err(reason) if candidates.len() == 1 || !may_guess(openai, reason) => {
                return Err(reason.as_str());
            }
            Err(reason) => {
                metrics::counter!("outrigger_routing_fallback_total", "reason" => reason.as_str())
                    .increment(1);
                (Blocks::bytes(openai.clone()), "fallback")
            }
        };
        let decider = Decider {
            config: &self.config,
            sent: &self.sent,
            rank: named_rank(headers),
            services: &self.services,
        };
        let flight = decider
            .decide(
                &candidates,
                model,
                openai.cache_salt.as_deref(),
                blocks,
                context,
                how,
                started,
            )
            .await;
        Ok((how, flight))
    }

    /// What was to be in flight at the best endpoint is so at the one that answered, if that was ranked at all.
    fn follow(&self, flight: Flight, context: &Context) -> Option<Flight> {
        let served = context.log.upstream_host.as_ref();
        let place = context
            .ranked
            .iter()
            .position(|ranked| served.is_none_or(|served| ranked.endpoint.id == *served))?;
        if place == 0 {
            return Some(flight);
        }
        let slot = context.ranked[place].endpoint.slot;
        Some(self.services.kv_index.enter(slot, flight.blocks()))
    }

    fn explain(&self, headers: &mut HeaderMap, context: &Context) {
        if !(self.config.decision_header && context.debug) {
            return;
        }
        let decision = context
            .log
            .routing_decision
            .as_deref()
            .and_then(|text| HeaderValue::from_str(text).ok());
        if let Some(decision) = decision {
            headers.insert(DECISION_HEADER, decision);
        }
    }
}

/// A request in flight watches nothing: it only has to end with the response.
impl StreamObserver for Flight {}

/// The data-parallel rank that a client asks for.
fn named_rank(headers: &HeaderMap) -> Option<u32> {
    headers.get(RANK_HEADER)?.to_str().ok()?.trim().parse().ok()
}

/// The endpoint that tells tokens: one beside us if there is one, else the least busy.
fn whom_to_ask(candidates: &[Arc<Endpoint>]) -> Option<&Arc<Endpoint>> {
    candidates.iter().min_by_key(|endpoint| {
        (
            endpoint.is_inhibited(),
            endpoint.via != Via::Local,
            endpoint.stats.active.load(Relaxed),
        )
    })
}

/// Whether the bytes of a prompt may stand in for its tokens.
fn may_guess(openai: &OpenAiRequest, reason: Unavailable) -> bool {
    let silent = matches!(
        reason,
        Unavailable::EngineRefused | Unavailable::EngineFailed | Unavailable::NotAsked
    );
    silent && matches!(openai.prompt, Prompt::Messages | Prompt::Text)
}
