//! What a generation's response tells: TTFT, ITL, token counts, errors in the stream.
//!
//! One event costs two clock-free comparisons, one search for `"usage":` and one histogram sample; handles of metrics
//! are found once per request, and made once per model.

use super::{Api, tenants::Meter, usage::UsageFinder};
use crate::{
    filter::{Edit, End, LogFields, StreamObserver},
    services::Services,
    sse::Event,
};
use ahash::AHashMap;
use arc_swap::ArcSwap;
use memchr::memmem;
use metrics::{Counter, Histogram};
use std::{sync::Arc, time::Instant};

/// Most models with metrics of their own; further ones count as `unknown`.
const MODELS_MAX: usize = 1024;

/// Handles of one model's metrics.
pub(super) struct Handles {
    model: Arc<str>,
    first_token: Histogram,
    inter_token: Histogram,
    prompt: Counter,
    completion: Counter,
    predicted: Counter,
    confirmed: Counter,
    stream_errors: Counter,
}

impl Handles {
    fn new(model: &str) -> Self {
        let label = Arc::from(model);
        let model = model.to_owned();
        let counter = |kind: &'static str| metrics::counter!("outrigger_tokens_total", "kind" => kind, "model" => model.clone());
        let hits = |kind: &'static str| metrics::counter!("outrigger_prefix_hit_tokens_total", "kind" => kind, "model" => model.clone());
        Self {
            model: label,
            first_token: metrics::histogram!("outrigger_time_to_first_token_seconds", "model" => model.clone()),
            inter_token: metrics::histogram!("outrigger_inter_token_latency_seconds", "model" => model.clone()),
            prompt: counter("prompt"),
            completion: counter("completion"),
            predicted: hits("predicted"),
            confirmed: hits("confirmed"),
            stream_errors: metrics::counter!("outrigger_stream_errors_total", "model" => model.clone()),
        }
    }
}

impl Handles {
    /// The label of these.
    pub(super) fn model(&self) -> &Arc<str> {
        &self.model
    }
}

/// Handles by model. Grows when a model is first asked for and served; requests only read it.
pub(super) struct Models {
    known: ArcSwap<AHashMap<Arc<str>, Arc<Handles>>>,
    unknown: Arc<Handles>,
}

impl Default for Models {
    fn default() -> Self {
        Self {
            known: ArcSwap::default(),
            unknown: Arc::new(Handles::new("unknown")),
        }
    }
}

impl Models {
    /// Handles for `model`; a name that no endpoint serves gets no series of its own, since clients choose it.
    pub(super) fn handles(
        &self,
        model: Option<&Arc<str>>,
        cluster: &str,
        services: &Services,
    ) -> Arc<Handles> {
        let Some(model) = model else {
            return self.unknown.clone();
        };
        let known = self.known.load();
        if let Some(handles) = known.get(model) {
            return handles.clone();
        }
        if known.len() >= MODELS_MAX || !is_served(model, cluster, services) {
            return self.unknown.clone();
        }
        let handles = Arc::new(Handles::new(model));
        self.known.rcu(|known| {
            let mut more = AHashMap::clone(known);
            more.insert(model.clone(), handles.clone());
            more
        });
        handles
    }
}

fn is_served(model: &str, cluster: &str, services: &Services) -> bool {
    services.endpoints.view(cluster).is_some_and(|view| {
        view.endpoints.iter().any(|endpoint| {
            endpoint
                .live
                .load()
                .state
                .models
                .iter()
                .any(|known| known.id == model)
        })
    })
}

/// Watches one response.
pub(super) struct Observer {
    handles: Arc<Handles>,
    usage: UsageFinder,
    /// Where tokens are counted by tenant.
    meter: Option<Meter>,
    /// Events that brought tokens.
    seen: u64,
    started: Instant,
    previous: Option<Instant>,
}

impl Observer {
    /// `started` is when the request's headers had come.
    pub(super) fn new(
        api: Api,
        handles: Arc<Handles>,
        meter: Option<Meter>,
        started: Instant,
    ) -> Self {
        Self {
            handles,
            usage: UsageFinder::new(api),
            meter,
            seen: 0,
            started,
            previous: None,
        }
    }
}

impl StreamObserver for Observer {
    fn on_event(&mut self, event: &Event<'_>, at: Instant) -> Edit {
        let data = event.data();
        match data.first() {
            Some(b'{') => {}
            // A comment, or `[DONE]`.
            _ => return Edit::Keep,
        }
        if data.starts_with(b"{\"error\"") || data.starts_with(b"{\"type\":\"error\"") {
            self.handles.stream_errors.increment(1);
            return Edit::Keep;
        }
        if self.usage.event(data) && memmem::find(data, b"\"choices\":[]").is_some() {
            // Nothing but usage: no token came with it.
            return Edit::Keep;
        }
        self.seen += 1;
        match self.previous.replace(at) {
            None => self
                .handles
                .first_token
                .record(at.saturating_duration_since(self.started)),
            Some(previous) => self
                .handles
                .inter_token
                .record(at.saturating_duration_since(previous)),
        }
        Edit::Keep
    }

    fn on_chunk(&mut self, chunk: &[u8], _at: Instant) {
        self.usage.chunk(chunk);
    }

    fn on_end(&mut self, _end: End, log: &mut LogFields) {
        let usage = self.usage.finish();
        log.tokens_seen = (self.seen > 0).then_some(self.seen);
        if let Some(meter) = &self.meter {
            meter.count(&usage, log.tokens_seen);
        }
        if let Some(prompt) = usage.prompt {
            log.prompt_tokens = Some(prompt);
            self.handles.prompt.increment(prompt);
        }
        if let Some(completion) = usage.completion {
            log.completion_tokens = Some(completion);
            self.handles.completion.increment(completion);
        }
        if let Some(predicted) = log.hit_tokens_predicted {
            self.handles.predicted.increment(predicted);
        }
        if let Some(cached) = usage.cached {
            log.hit_tokens_confirmed = Some(cached);
            self.handles.confirmed.increment(cached);
        }
    }
}
