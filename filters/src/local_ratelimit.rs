//! Envoy's `local_ratelimit`: a bucket of requests in this process, for all routes that have no bucket of their own.

use crate::{
    body::RequestBody,
    bucket::{Bucket, now_ns},
    envoy::{
        RuntimeFractionalPercent, duration,
        headers::{Edit, HeaderValueOption, Scene, Side, compile},
    },
    error::{Error, Flag, Origin},
    filter::{Context, Handled, HttpFilter, Next, RouteFacts},
    registry,
    runtime::Share,
    services::Services,
};
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use metrics::Counter;
use serde::Deserialize;
use std::{future::ready, sync::Arc, time::Duration};

/// Envoy's.
pub const TYPE_URL: &str =
    "type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit";

/// Envoy's body and details.
const LIMITED: &str = "local_rate_limited";
/// Envoy takes no shorter one.
const FILL_INTERVAL_MIN: Duration = Duration::from_millis(50);
/// gRPC's RESOURCE_EXHAUSTED.
const RESOURCE_EXHAUSTED: u32 = 8;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    stat_prefix: String,
    status: Status,
    token_bucket: Option<TokenBucket>,
    filter_enabled: RuntimeFractionalPercent,
    filter_enforced: RuntimeFractionalPercent,
    response_headers_to_add: Vec<HeaderValueOption>,
    request_headers_to_add_when_not_enforced: Vec<HeaderValueOption>,
    enable_x_ratelimit_headers: LimitHeaders,
    rate_limited_as_resource_exhausted: bool,
}

/// The code by Envoy's name; only its number matters.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Status {
    code: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenBucket {
    #[serde(default)]
    max_tokens: u32,
    #[serde(default = "one")]
    tokens_per_fill: u32,
    #[serde(deserialize_with = "duration")]
    fill_interval: Duration,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum LimitHeaders {
    #[default]
    Off,
    #[serde(rename = "DRAFT_VERSION_03")]
    Draft03,
}

fn one() -> u32 {
    1
}

/// The filter.
pub struct LocalRateLimit {
    bucket: Option<Arc<Bucket>>,
    enabled: Share,
    enforced: Share,
    status: StatusCode,
    on_refusal: Arc<[Edit]>,
    on_leniency: Vec<Edit>,
    tells: bool,
    exhausted: bool,
    stats: Stats,
}

struct Stats {
    enabled: Counter,
    enforced: Counter,
    limited: Counter,
    ok: Counter,
}

impl Stats {
    fn new(prefix: &str) -> Self {
        let prefix = prefix.to_owned();
        Self {
            enabled: metrics::counter!("envoy_http_local_rate_limit_enabled", "envoy_local_http_ratelimit_prefix" => prefix.clone()),
            enforced: metrics::counter!("envoy_http_local_rate_limit_enforced", "envoy_local_http_ratelimit_prefix" => prefix.clone()),
            limited: metrics::counter!("envoy_http_local_rate_limit_rate_limited", "envoy_local_http_ratelimit_prefix" => prefix.clone()),
            ok: metrics::counter!("envoy_http_local_rate_limit_ok", "envoy_local_http_ratelimit_prefix" => prefix),
        }
    }
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
    if config.stat_prefix.is_empty() {
        return Err("stat_prefix: must not be empty".into());
    }
    let bucket = config.token_bucket.map(TokenBucket::build).transpose()?;
    let on_refusal = compile(
        "response_headers_to_add",
        &config.response_headers_to_add,
        HeaderValueOption::compile,
    )?;
    let on_leniency = compile(
        "request_headers_to_add_when_not_enforced",
        &config.request_headers_to_add_when_not_enforced,
        HeaderValueOption::compile,
    )?;
    Ok(Arc::new(LocalRateLimit {
        bucket: bucket.map(Arc::new),
        enabled: config.filter_enabled.share(&services.runtime),
        enforced: config.filter_enforced.share(&services.runtime),
        status: status(config.status.code.as_deref()),
        on_refusal: on_refusal.into(),
        on_leniency,
        tells: config.enable_x_ratelimit_headers == LimitHeaders::Draft03,
        exhausted: config.rate_limited_as_resource_exhausted,
        stats: Stats::new(&config.stat_prefix),
    }))
}

impl TokenBucket {
    fn build(self) -> Result<Bucket, String> {
        if self.max_tokens == 0 {
            return Err("token_bucket.max_tokens: must be greater than 0".into());
        }
        if self.tokens_per_fill == 0 {
            return Err("token_bucket.tokens_per_fill: must be greater than 0".into());
        }
        if self.fill_interval < FILL_INTERVAL_MIN {
            return Err("token_bucket.fill_interval: must be >= 50ms".into());
        }
        Ok(Bucket::full(
            self.max_tokens.into(),
            self.tokens_per_fill.into(),
            self.fill_interval,
        ))
    }
}

/// As Envoy: what is no error becomes 429.
fn status(name: Option<&str>) -> StatusCode {
    outrigger_xds::resource::http_status(name.unwrap_or_default())
        .and_then(|code| StatusCode::from_u16(code).ok())
        .filter(|code| code.as_u16() >= 400)
        .unwrap_or(StatusCode::TOO_MANY_REQUESTS)
}

impl HttpFilter for LocalRateLimit {
    fn handle<'a>(
        &'a self,
        mut request: Request<RequestBody>,
        context: &'a mut Context,
        next: Next<'a>,
    ) -> Handled<'a> {
        let Some(bucket) = self.bucket.as_ref().filter(|_| self.enabled.draw()) else {
            return next.run(request, context);
        };
        self.stats.enabled.increment(1);
        if bucket.take(1.0, now_ns()).is_ok() {
            self.stats.ok.increment(1);
        } else {
            self.stats.limited.increment(1);
            if self.enforced.draw() {
                self.stats.enforced.increment(1);
                let error = self.refusal(&request, context, bucket);
                return Box::pin(ready(Err(error)));
            }
            self.mark(&mut request, &context.route);
        }
        if !self.tells {
            return next.run(request, context);
        }
        Box::pin(async move {
            match next.run(request, context).await {
                Ok(mut response) => {
                    tell(bucket, response.headers_mut());
                    Ok(response)
                }
                Err(mut error) => {
                    let bucket = bucket.clone();
                    error.edits.add(move |_, headers| tell(&bucket, headers));
                    Err(error)
                }
            }
        })
    }
}

impl LocalRateLimit {
    fn refusal(
        &self,
        request: &Request<RequestBody>,
        context: &Context,
        bucket: &Arc<Bucket>,
    ) -> Error {
        let mut error = Error::new(
            Origin::Proxy,
            Flag::RateLimited,
            self.status,
            LIMITED,
            LIMITED,
        );
        if self.tells {
            let bucket = bucket.clone();
            error.edits.add(move |_, headers| tell(&bucket, headers));
        }
        if self.exhausted {
            error.edits.add(|_, headers| {
                if let Some(code) = headers.get_mut("grpc-status") {
                    *code = HeaderValue::from(RESOURCE_EXHAUSTED);
                }
            });
        }
        if !self.on_refusal.is_empty() {
            let route = context.route.clone();
            let scene = on_request(request, &route);
            let edits: Vec<Edit> = self
                .on_refusal
                .iter()
                .map(|edit| edit.bind(scene, request.headers()))
                .collect();
            error.edits.add(move |status, headers| {
                let scene = Scene {
                    route_name: &route.name,
                    cluster: &route.cluster,
                    side: Side::Response {
                        status,
                        details: LIMITED,
                        host: "",
                    },
                };
                for edit in &edits {
                    edit.apply(scene, headers);
                }
            });
        }
        error
    }

    fn mark(&self, request: &mut Request<RequestBody>, route: &RouteFacts) {
        if self.on_leniency.is_empty() {
            return;
        }
        let mut headers = std::mem::take(request.headers_mut());
        let scene = on_request(request, route);
        for edit in &self.on_leniency {
            edit.apply(scene, &mut headers);
        }
        *request.headers_mut() = headers;
    }
}

fn on_request<'a>(request: &'a Request<RequestBody>, route: &'a RouteFacts) -> Scene<'a> {
    Scene {
        route_name: &route.name,
        cluster: &route.cluster,
        side: Side::Request {
            method: request.method(),
            uri: request.uri(),
            version: request.version(),
        },
    }
}

/// What a client may still ask for, and in how many seconds the next request passes.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a cast of a float saturates"
)]
fn tell(bucket: &Bucket, headers: &mut HeaderMap) {
    let now = now_ns();
    let remaining = bucket.remaining(now).max(0.0) as u64;
    let reset = bucket.next_in(now).as_secs_f64().ceil() as u64;
    headers.insert("x-ratelimit-limit", HeaderValue::from(bucket.max() as u64));
    headers.insert("x-ratelimit-remaining", HeaderValue::from(remaining));
    headers.insert("x-ratelimit-reset", HeaderValue::from(reset));
}
