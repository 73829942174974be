//! Whether a request is split: what it allows, what the fleet has, and what the configuration wants.

use super::{Config, record::Record};
use crate::{
    body::RequestBody,
    endpoints::{ClusterView, Endpoint, Part, has_halves},
    filter::Context,
    openai::{Api, OpenAiRequest, Prompt},
};
use http::{Method, Request};
use serde::Deserialize;
use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
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

/// What is done with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Two engines serve it.
    Split,
    /// One serves all of it.
    Whole,
    /// Nobody can serve it: whoever is there says so.
    Refused,
    /// Nobody is there for it now: there are only halves, and no pair of them.
    Nobody,
}

impl Way {
    /// As the record has it.
    fn as_str(self) -> &'static str {
        match self {
            Self::Split => "split",
            Self::Whole | Self::Refused => "whole",
            Self::Nobody => "none",
        }
    }
}

impl Rule<'_> {
    /// What is done with it, and why.
    pub(super) fn decide(
        &self,
        request: &Request<RequestBody>,
        context: &Context,
    ) -> (Way, Record) {
        let mut record = Record::default();
        record.prompt_tokens = prompt_tokens(context);
        record.uncached_tokens = record.prompt_tokens - self.cached(context, record.prompt_tokens);
        let whole = may_be_whole(self.view, context);
        let (way, reason) = match of_call(request, context) {
            Some(reason) if whole => (Way::Whole, reason),
            Some(reason) => (Way::Refused, reason),
            None => match self.of_fleet(context) {
                Some(reason) if whole => (Way::Whole, reason),
                Some(reason) => (self.without_pair(context), reason),
                None if !whole => (Way::Split, "no_whole"),
                None => self.by_mode(&mut record),
            },
        };
        record.decide(way.as_str(), reason);
        (way, record)
    }

    fn by_mode(&self, record: &mut Record) -> (Way, &'static str) {
        match self.config.mode {
            Mode::Never => (Way::Whole, "never"),
            Mode::Always => (Way::Split, "always"),
            Mode::Threshold => self.weigh(record),
        }
    }

    /// What is done where nobody can serve it whole and there is no pair. A model that nobody has is refused by an engine.
    fn without_pair(&self, context: &Context) -> Way {
        let model = model(context);
        let mut there = self.view.endpoints.iter();
        match there.any(|endpoint| endpoint.fits(model)) {
            true => Way::Nobody,
            false => Way::Refused,
        }
    }

    fn weigh(&self, record: &mut Record) -> (Way, &'static str) {
        let predicted = self.pace.predict_ms(record.uncached_tokens);
        record.predicted_ms = Some(predicted);
        let by_time = self.config.uncached_ms_min;
        if record.uncached_tokens >= self.config.uncached_tokens_min.max(1) {
            (Way::Split, "uncached_tokens")
        } else if by_time > 0 && predicted >= by_time {
            (Way::Split, "uncached_ms")
        } else {
            (Way::Whole, "short")
        }
    }

    /// Prompt tokens that are cached where the request would be served whole.
    fn cached(&self, context: &Context, prompt_tokens: u64) -> u64 {
        let mut ranked = context.ranked.iter();
        let best = ranked.find(|ranked| Part::Whole.suits(&ranked.endpoint));
        let hits = best.and_then(|best| best.hit_tokens).unwrap_or(0);
        hits.min(prompt_tokens)
    }

    /// Why nothing can be split now.
    fn of_fleet(&self, context: &Context) -> Option<&'static str> {
        let model = model(context);
        let there = |part: Part| {
            let endpoints = self.view.endpoints.iter();
            endpoints.filter(move |endpoint| is_there(endpoint, part, model))
        };
        if there(Part::Prefill).next().is_none() {
            return Some("no_prefill");
        }
        if there(Part::Decode).next().is_none() {
            return Some("no_decode");
        }
        let halves = there(Part::Prefill).chain(there(Part::Decode));
        let mut kinds = halves.map(|endpoint| endpoint.live.load().state.kind);
        let first = kinds.next();
        kinds
            .any(|kind| Some(kind) != first)
            .then_some("engine_kind")
    }
}

/// The model that a request names.
fn model(context: &Context) -> Option<&str> {
    context.openai.as_deref()?.model.as_deref()
}

/// Why this call cannot be split, whoever is there.
fn of_call(request: &Request<RequestBody>, context: &Context) -> Option<&'static str> {
    let openai = context.openai.as_deref()?;
    if !context.route.mirrors.is_empty() {
        return Some("mirror");
    }
    if request.method() != Method::POST || request.body().parts().is_none() {
        return Some("body");
    }
    of_request(openai)
}

/// Whether somebody is there for a part of requests of this model.
pub(super) fn is_there(endpoint: &Endpoint, part: Part, model: Option<&str>) -> bool {
    part.suits(endpoint) && endpoint.fits(model)
}

/// Whether anybody can serve the request whole; halves of SGLang cannot.
pub(super) fn may_be_whole(view: &ClusterView, context: &Context) -> bool {
    let model = model(context);
    let there = view.endpoints.iter();
    let mut there = there.filter(|endpoint| endpoint.fits(model));
    // The first of nearly all fleets can, whatever the others are.
    there.clone().any(|endpoint| endpoint.can_be_whole(true))
        || !has_halves(&view.endpoints) && there.any(|endpoint| endpoint.can_be_whole(false))
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
