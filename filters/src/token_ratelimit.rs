//! Limits of requests and tokens per minute for each tenant, model, or whatever a header says.
//!
//! A generation takes one request and an estimate of its tokens (prompt and the most it may generate) from each limit
//! it comes under; when it is over, the estimate is replaced by what the engine's `usage` says. Limits are of this
//! process. It reads what `openai` found out, so it stands after it.

mod table;

use crate::{
    body::{RequestBody, ResponseBody},
    bucket::now_ns,
    error::{Error, Flag, Origin},
    filter::{Context, End, Handled, HttpFilter, LogFields, Next, StreamObserver},
    openai::OpenAiRequest,
    registry,
    services::Services,
};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use metrics::Counter;
use serde::Deserialize;
use std::{sync::Arc, time::Duration};
use table::{Buckets, Rates};
pub use table::{KEYS_MAX, Table};

/// Our own type.
pub const TYPE_URL: &str = "type.googleapis.com/outrigger.filters.http.token_ratelimit.v1.Config";

/// Configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// A request must be within all of them.
    pub limits: Vec<LimitConfig>,
    /// Tokens that a request without `max_tokens` is taken to generate. Default 256.
    pub default_max_tokens: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            limits: Vec::new(),
            default_max_tokens: 256,
        }
    }
}

/// One limit.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitConfig {
    /// For metrics and messages; unique.
    pub name: String,
    /// What has a limit of its own: `tenant`, `model`, `header:NAME`. Empty: all requests together.
    pub key: Vec<String>,
    /// 0 is unlimited.
    pub requests_per_minute: u32,
    /// 0 is unlimited.
    pub tokens_per_minute: u32,
}

/// Part of a key.
enum Part {
    Tenant,
    Model,
    Header(HeaderName),
}

struct Limit {
    name: Arc<str>,
    parts: Vec<Part>,
    rates: Rates,
    passed: Counter,
    over_requests: Counter,
    over_tokens: Counter,
}

/// The filter.
pub struct TokenRateLimit {
    limits: Vec<Limit>,
    default_max_tokens: u64,
    table: Arc<Table>,
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
    let mut limits: Vec<Limit> = Vec::new();
    for (index, limit) in config.limits.into_iter().enumerate() {
        let limit = Limit::new(limit).map_err(|error| format!("limits[{index}].{error}"))?;
        if limits.iter().any(|known| known.name == limit.name) {
            return Err(format!(
                "limits[{index}].name: '{}' is there twice",
                limit.name
            ));
        }
        limits.push(limit);
    }
    Ok(Arc::new(TokenRateLimit {
        limits,
        default_max_tokens: config.default_max_tokens,
        table: services.token_limits.clone(),
    }))
}

impl Limit {
    fn new(config: LimitConfig) -> Result<Self, String> {
        if config.name.is_empty() {
            return Err("name: must not be empty".into());
        }
        if config.requests_per_minute == 0 && config.tokens_per_minute == 0 {
            return Err("requests_per_minute: this limit limits nothing".into());
        }
        let parts = config.key.iter().map(|part| Part::parse(part));
        let counter = |outcome: &'static str| metrics::counter!("outrigger_token_ratelimit_total", "limit" => config.name.clone(), "outcome" => outcome);
        Ok(Self {
            parts: parts.collect::<Result<_, _>>()?,
            rates: Rates {
                requests: config.requests_per_minute,
                tokens: config.tokens_per_minute,
            },
            passed: counter("ok"),
            over_requests: counter("requests"),
            over_tokens: counter("tokens"),
            name: config.name.into(),
        })
    }

    /// What counts together; what a request does not say is its own value, so that leaving it out is no way around.
    fn key(&self, openai: &OpenAiRequest, headers: &HeaderMap) -> String {
        let mut key = self.name.to_string();
        for part in &self.parts {
            let value = match part {
                Part::Tenant => openai.tenant.as_deref(),
                Part::Model => openai.model.as_deref(),
                Part::Header(name) => headers.get(name).and_then(|value| value.to_str().ok()),
            };
            key.push('\0');
            key.push_str(value.unwrap_or_default());
        }
        key
    }
}

impl Part {
    fn parse(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("header:")) {
            ("tenant", _) => Ok(Self::Tenant),
            ("model", _) => Ok(Self::Model),
            (_, Some(name)) => HeaderName::from_bytes(name.as_bytes())
                .map(Self::Header)
                .map_err(|_| format!("key: '{name}' is not a header name")),
            _ => Err(format!(
                "key: '{text}' is none of tenant, model, header:NAME"
            )),
        }
    }
}

impl HttpFilter for TokenRateLimit {
    fn handle<'a>(
        &'a self,
        request: Request<RequestBody>,
        context: &'a mut Context,
        next: Next<'a>,
    ) -> Handled<'a> {
        let openai = context
            .openai
            .clone()
            .filter(|openai| openai.is_generation());
        let Some(openai) = openai else {
            return next.run(request, context);
        };
        Box::pin(async move {
            let mut taken = self.take(&openai, request.headers(), context)?;
            let buckets = taken.buckets.clone();
            match next.run(request, context).await {
                Ok(mut response) => {
                    tell(&buckets, response.headers_mut());
                    self.follow(taken, &response, context);
                    Ok(response)
                }
                Err(mut error) => {
                    taken.settle(0);
                    error.edits.add(move |_, headers| tell(&buckets, headers));
                    Err(error)
                }
            }
        })
    }
}

impl TokenRateLimit {
    /// Takes a request and its estimated tokens from every limit, or from none.
    fn take(
        &self,
        openai: &OpenAiRequest,
        headers: &HeaderMap,
        context: &Context,
    ) -> Result<Taken, Error> {
        let prompt = match context.prompt.tokens {
            0 => openai.estimated_prompt_tokens(),
            known => known,
        };
        let most = openai.max_tokens.unwrap_or(self.default_max_tokens);
        let mut taken = Taken {
            prompt,
            tokens: prompt.saturating_add(most.saturating_mul(openai.n.into())),
            buckets: Arc::from([]),
            settled: false,
        };
        let now = now_ns();
        let find = |limit: &Limit| {
            self.table
                .buckets(&limit.key(openai, headers), limit.rates, now)
        };
        let buckets: Arc<[Arc<Buckets>]> = self.limits.iter().map(find).collect();
        for (index, limit) in self.limits.iter().enumerate() {
            if let Err(over) = buckets[index].take(taken.tokens, now) {
                for earlier in &buckets[..index] {
                    earlier.give_back(taken.tokens, now);
                }
                taken.settled = true;
                return Err(limit.refusal(over, &buckets));
            }
        }
        for limit in &self.limits {
            limit.passed.increment(1);
        }
        taken.buckets = buckets;
        Ok(taken)
    }

    /// Keeps what was taken until the response is over.
    fn follow(&self, mut taken: Taken, response: &Response<ResponseBody>, context: &mut Context) {
        if response.status().is_success() {
            context.observers.push(Box::new(taken));
        } else {
            // Nothing was generated.
            taken.settle(0);
        }
    }
}

/// Which bucket was empty, and until when.
#[derive(Debug, Clone, Copy)]
enum Over {
    Requests(Duration),
    Tokens(Duration),
}

impl Limit {
    fn refusal(&self, over: Over, buckets: &Arc<[Arc<Buckets>]>) -> Error {
        let (counter, what, per_minute, wait) = match over {
            Over::Requests(wait) => (&self.over_requests, "requests", self.rates.requests, wait),
            Over::Tokens(wait) => (&self.over_tokens, "tokens", self.rates.tokens, wait),
        };
        counter.increment(1);
        let seconds = wait.as_secs_f64().ceil().max(1.0);
        let message = format!(
            "Rate limit reached for {what} per minute ({}): limit {per_minute}. Please try again in {seconds}s.",
            self.name
        );
        let mut error = Error::new(
            Origin::Proxy,
            Flag::RateLimited,
            StatusCode::TOO_MANY_REQUESTS,
            "token_rate_limited",
            message,
        );
        error.retry_after = Some(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX));
        let buckets = buckets.clone();
        error.edits.add(move |_, headers| tell(&buckets, headers));
        error
    }
}

/// What a request has taken. If it is dropped unsettled (the client went away before a response), its prompt counts.
struct Taken {
    prompt: u64,
    tokens: u64,
    buckets: Arc<[Arc<Buckets>]>,
    settled: bool,
}

impl Taken {
    /// Replaces the estimate by what was used.
    fn settle(&mut self, used: u64) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        let now = now_ns();
        for buckets in self.buckets.iter() {
            buckets.correct(self.tokens, used, now);
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.settle(self.prompt);
    }
}

impl StreamObserver for Taken {
    /// `openai`'s observer comes first, so the log has what the engine said.
    fn on_end(&mut self, _end: End, log: &mut LogFields) {
        let used = match (log.completion_tokens, log.tokens_seen) {
            (Some(completion), _) => log.prompt_tokens.unwrap_or(self.prompt) + completion,
            // A stream that told no usage: its events are what is known.
            (None, Some(seen)) => self.prompt + seen,
            (None, None) => self.tokens,
        };
        self.settle(used);
    }
}

/// OpenAI's headers: of each kind, those of the limit that has least left.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a cast of a float saturates"
)]
fn tell(all: &[Arc<Buckets>], headers: &mut HeaderMap) {
    let now = now_ns();
    let kinds = [
        (
            NAMES_OF_REQUESTS,
            all.iter().map(|limit| &limit.requests).collect::<Vec<_>>(),
        ),
        (
            NAMES_OF_TOKENS,
            all.iter().map(|limit| &limit.tokens).collect(),
        ),
    ];
    for (names, buckets) in kinds {
        let least = buckets
            .into_iter()
            .flatten()
            .min_by(|a, b| a.remaining(now).total_cmp(&b.remaining(now)));
        let Some(bucket) = least else {
            continue;
        };
        let [limit, remaining, reset] = names;
        headers.insert(limit, HeaderValue::from(bucket.max() as u64));
        let left = bucket.remaining(now).max(0.0) as u64;
        headers.insert(remaining, HeaderValue::from(left));
        if let Ok(value) = HeaderValue::try_from(go_duration(bucket.full_in(now))) {
            headers.insert(reset, value);
        }
    }
}

const NAMES_OF_REQUESTS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];
const NAMES_OF_TOKENS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// As OpenAI writes it: `250ms`, `17s`, `6m0s`.
fn go_duration(time: Duration) -> String {
    let ms = time.as_millis();
    match ms {
        0..1_000 => format!("{ms}ms"),
        1_000..60_000 => format!("{}s", ms.div_ceil(1_000)),
        _ => {
            let seconds = ms.div_ceil(1_000);
            format!("{}m{}s", seconds / 60, seconds % 60)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_openai_writes_them() {
        for (ms, text) in [
            (0, "0ms"),
            (250, "250ms"),
            (1_001, "2s"),
            (60_000, "1m0s"),
            (90_500, "1m31s"),
        ] {
            assert_eq!(go_duration(Duration::from_millis(ms)), text);
        }
    }
}
