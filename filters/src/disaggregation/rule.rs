//! Whether a request is split: what it allows, what the fleet has, and what the configuration wants.

use super::{Config, record::Record};
use crate::{
    body::RequestBody,
    endpoints::{ClusterView, Endpoint, Part},
    filter::Context,
    openai::{Api, OpenAiRequest, Prompt},
};
use http::{Method, Request};
use outrigger_xds::report::EngineKind;
use serde::Deserialize;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// What a measured prefill weighs against those before it.
const PACE_WEIGHT: f64 = 0.2;

/// When requests are split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Where the thresholds say that it is worth it.
    #[default]
    Threshold,
    /// Whatever can be split.
    Always,
    /// Nothing.
    Never,
}

/// How fast prefill is: microseconds a token, as last seen.
pub(super) struct Pace(AtomicU64);

impl Pace {
    pub(super) fn new(tokens_per_s: f64) -> Self {
        Self(AtomicU64::new((1e6 / tokens_per_s).to_bits()))
    }

    /// One more prefill of so many tokens. Races lose a measurement at most.
    pub(super) fn learn(&self, tokens: u64, took: Duration) {
        if tokens == 0 {
            return;
        }
        let seen = took.as_secs_f64() * 1e6 / tokens as f64;
        let known = f64::from_bits(self.0.load(Relaxed));
        let pace = known + PACE_WEIGHT * (seen - known);
        self.0.store(pace.to_bits(), Relaxed);
    }

    /// Milliseconds for so many tokens.
    pub(super) fn predict_ms(&self, tokens: u64) -> u64 {
        (tokens as f64 * f64::from_bits(self.0.load(Relaxed)) / 1e3) as u64
    }
}

/// Decides on one request.
pub(super) struct Rule<'a> {
    pub(super) config: &'a Config,
    pub(super) pace: &'a Pace,
    pub(super) view: &'a ClusterView,
}

impl Rule<'_> {
    /// Whether it is split, and why.
    pub(super) fn decide(
        &self,
        request: &Request<RequestBody>,
        context: &Context,
    ) -> (bool, Record) {
        let mut record = Record::default();
        record.prompt_tokens = prompt_tokens(context);
        record.uncached_tokens = record.prompt_tokens - self.cached(context, record.prompt_tokens);
        let forbidden = self.forbidden(request, context);
        let (split, reason) = match (forbidden, self.config.mode) {
            (Some(reason), _) => (false, reason),
            (None, _) if !may_be_whole(self.view, context) => (true, "no_whole"),
            (None, Mode::Never) => (false, "never"),
            (None, Mode::Always) => (true, "always"),
            (None, Mode::Threshold) => self.weigh(&mut record),
        };
        record.decide(split, reason);
        (split, record)
    }

    fn weigh(&self, record: &mut Record) -> (bool, &'static str) {
        let predicted = self.pace.predict_ms(record.uncached_tokens);
        record.predicted_ms = Some(predicted);
        let by_time = self.config.uncached_ms_min;
        if record.uncached_tokens >= self.config.uncached_tokens_min.max(1) {
            (true, "uncached_tokens")
        } else if by_time > 0 && predicted >= by_time {
            (true, "uncached_ms")
        } else {
            (false, "short")
        }
    }

    /// Prompt tokens that are cached where the request would be served whole.
    fn cached(&self, context: &Context, prompt_tokens: u64) -> u64 {
        let mut ranked = context.ranked.iter();
        let best = ranked.find(|ranked| Part::Whole.suits(&ranked.endpoint));
        let hits = best.and_then(|best| best.hit_tokens).unwrap_or(0);
        hits.min(prompt_tokens)
    }

    /// Why a request cannot be split at all.
    fn forbidden(&self, request: &Request<RequestBody>, context: &Context) -> Option<&'static str> {
        let openai = context.openai.as_deref()?;
        let model = openai.model.as_deref();
        let there = |part: Part| {
            self.view
                .endpoints
                .iter()
                .any(|endpoint| is_there(endpoint, part, model))
        };
        if !there(Part::Prefill) {
            return Some("no_prefill");
        }
        if !there(Part::Decode) {
            return Some("no_decode");
        }
        let is_half = |endpoint: &&Arc<Endpoint>| {
            is_there(endpoint, Part::Prefill, model) || is_there(endpoint, Part::Decode, model)
        };
        let halves = self.view.endpoints.iter().filter(is_half);
        let mut kinds = halves.map(|endpoint| endpoint.live.load().state.kind);
        let first = kinds.next();
        if first == Some(EngineKind::Unknown) || kinds.any(|kind| Some(kind) != first) {
            return Some("engine_kind");
        }
        if !context.route.mirrors.is_empty() {
            return Some("mirror");
        }
        if request.method() != Method::POST || request.body().parts().is_none() {
            return Some("body");
        }
        of_request(openai)
    }
}

/// Whether somebody is there for a part of requests of this model.
pub(super) fn is_there(endpoint: &Endpoint, part: Part, model: Option<&str>) -> bool {
    part.suits(endpoint) && endpoint.fits(model)
}

/// Whether anybody can serve the request whole; halves of SGLang cannot.
pub(super) fn may_be_whole(view: &ClusterView, context: &Context) -> bool {
    let openai = context.openai.as_deref();
    let model = openai.and_then(|openai| openai.model.as_deref());
    let mut there = view
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.fits(model));
    there.any(|endpoint| {
        let kind = endpoint.live.load().state.kind;
        kind != EngineKind::Sglang || Part::Whole.suits(endpoint)
    })
}

/// What a request asks for that two engines cannot give, or that was not recorded of two.
fn of_request(openai: &OpenAiRequest) -> Option<&'static str> {
    let body = openai.body.as_deref().unwrap_or_default();
    match openai.prompt {
        _ if !matches!(openai.api, Api::Chat | Api::Completions) => Some("api"),
        _ if openai.model.is_none() => Some("no_model"),
        Prompt::None => Some("no_prompt"),
        Prompt::Batch => Some("batch"),
        Prompt::Media => Some("media"),
        Prompt::Messages | Prompt::Text | Prompt::TokenIds if openai.n > 1 => Some("n"),
        // A stream that moved, through chat: the field is in use for its tokens.
        _ if openai.one_engine || body.starts_with(b"{\"kv_transfer_params\"") => {
            Some("one_engine")
        }
        // What `truncate_prompt_tokens` leaves of a prompt depends on `max_tokens`, of which the legs have two.
        _ if openai.flags.opaque => Some("opaque"),
        Prompt::Messages | Prompt::Text | Prompt::TokenIds => None,
    }
}

/// As many as are known, or estimated.
pub(super) fn prompt_tokens(context: &Context) -> u64 {
    let estimated = || {
        let openai = context.openai.as_ref();
        openai.map_or(0, |openai| openai.estimated_prompt_tokens())
    };
    match context.prompt.tokens {
        0 => estimated(),
        known => known,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn prompts_that_the_engine_cuts_stay_whole() {
        let mut openai = OpenAiRequest {
            api: Api::Completions,
            model: Some("m".into()),
            prompt: Prompt::Text,
            body: Some(Bytes::from_static(b"{}")),
            ..OpenAiRequest::default()
        };
        assert_eq!(of_request(&openai), None);
        openai.flags.opaque = true;
        assert_eq!(of_request(&openai), Some("opaque"));
    }
}
