//! Calling the rest of the chain once more: within the budget, a few times, and never without an end.

use super::{
    Policy, SUSPECT_DEATHS, body::Leg, budget::Counted, is_stream, recipe::Recipe, splice::Way,
};
use crate::{
    body::RequestBody,
    error::Flag,
    filter::{Chain, Context, Next, RouteFacts},
};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version, header, uri::PathAndQuery,
};
use outrigger_xds::report::EngineId;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");
/// Between two looks at the budget.
const BUDGET_LOOK: Duration = Duration::from_millis(20);
/// Before another attempt, or another look for an engine.
const PAUSE: Duration = Duration::from_millis(100);

/// What is needed to call the rest of the chain again.
pub(super) struct Call {
    pub(super) policy: Arc<Policy>,
    pub(super) chain: Chain,
    method: Method,
    uri: Uri,
    version: Version,
    headers: HeaderMap,
    /// As it was sent first; empty if it cannot be sent again.
    body: (Bytes, Bytes),
    template: Context,
}

/// How it stands with a stream in trouble.
#[derive(Debug, Clone)]
pub(super) struct Trouble {
    /// Since when it got nothing.
    pub(super) since: Instant,
    /// The engine that lost it.
    pub(super) lost_by: Option<EngineId>,
    /// Moves in a row that brought no token.
    pub(super) attempts: u32,
    /// Calls so far: each has an id of its own.
    pub(super) calls: u32,
    /// Engines that died before its first token there.
    pub(super) deaths: u32,
}

/// What came of moving.
pub(super) struct Moved {
    pub(super) recipe: Recipe,
    pub(super) trouble: Trouble,
    pub(super) leg: Result<Leg, &'static str>,
}

impl Call {
    /// Of the request as it goes on now.
    pub(super) fn new(
        policy: Arc<Policy>,
        chain: Chain,
        request: &Request<RequestBody>,
        context: &Context,
    ) -> Arc<Self> {
        let mut template = context.fork();
        if !context.route.mirrors.is_empty() {
            // Copies were sent already.
            template.route = Arc::new(RouteFacts {
                mirrors: Arc::default(),
                ..RouteFacts::clone(&context.route)
            });
        }
        Arc::new(Self {
            policy,
            chain,
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            headers: request.headers().clone(),
            body: request.body().parts().unwrap_or_default(),
            template,
        })
    }

    /// The cluster that the request goes to.
    pub(super) fn cluster(&self) -> &str {
        &self.template.route.cluster
    }

    /// The first request, unchanged.
    pub(super) fn first_again(&self, context: &Context) -> (Request<RequestBody>, Context) {
        let mut again = self.context("a");
        again.deaths = context.deaths;
        (self.request(None, &again), again)
    }

    fn context(&self, suffix: &str) -> Context {
        let mut context = self.template.fork();
        if !context.request_id.is_empty() {
            context.request_id = format!("{}-{suffix}", self.template.request_id).into();
        }
        context
    }

    fn request(&self, recipe: Option<&Recipe>, context: &Context) -> Request<RequestBody> {
        let (first, rest) = self.body.clone();
        let body = match recipe.and_then(|recipe| recipe.body.clone()) {
            Some(body) => RequestBody::full(body),
            None => RequestBody::joined(first, rest),
        };
        let length = http_body::Body::size_hint(&body).lower();
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.version_mut() = self.version;
        *request.uri_mut() = self.uri.clone();
        if recipe.is_some_and(|recipe| recipe.way == Way::Completions) {
            *request.uri_mut() = completions_of(&self.uri);
        }
        let headers = request.headers_mut();
        headers.clone_from(&self.headers);
        if headers.contains_key(header::CONTENT_LENGTH) {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        }
        if let Ok(id) = HeaderValue::from_str(&context.request_id)
            && !id.is_empty()
        {
            headers.insert(REQUEST_ID_HEADER, id);
        }
        request
    }

    /// Whether the request can be sent again.
    pub(super) fn can_repeat(&self) -> bool {
        !self.body.0.is_empty()
    }
}

/// The way to plain completions beside the way to chat.
fn completions_of(uri: &Uri) -> Uri {
    let path = uri.path().replace("/chat/completions", "/completions");
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = PathAndQuery::try_from(path).ok();
    Uri::from_parts(parts).unwrap_or_else(|_| uri.clone())
}

/// Finds the stream another engine, in time or not at all.
pub(super) async fn resume(call: Arc<Call>, recipe: Recipe, mut trouble: Trouble) -> Moved {
    let limit = Duration::from_millis(call.policy.config.resume_timeout_ms);
    let found = tokio::time::timeout(limit, find(&call, &recipe, &mut trouble)).await;
    Moved {
        leg: found.unwrap_or(Err("timeout")),
        recipe,
        trouble,
    }
}

async fn find(
    call: &Arc<Call>,
    recipe: &Recipe,
    trouble: &mut Trouble,
) -> Result<Leg, &'static str> {
    loop {
        let answer = {
            let suspect = trouble.deaths >= SUSPECT_DEATHS;
            let shared = &call.policy.services.migration;
            let _alone = match suspect {
                true => shared.alone.acquire().await.ok(),
                false => None,
            };
            let _permit = permit(call, trouble).await?;
            trouble.calls += 1;
            let mut context = call.context(&format!("r{}", trouble.calls));
            context.openai = Some(recipe.openai.clone());
            context.avoid = trouble.lost_by.clone();
            context.deaths = trouble.deaths;
            context.deaths_max = SUSPECT_DEATHS.max(trouble.deaths + 1);
            let request = call.request(Some(recipe), &context);
            let answer = Next::new(&call.chain).run(request, &mut context).await;
            if suspect && context.deaths > trouble.deaths && answer.is_err() {
                metrics::counter!("outrigger_migration_poison_total").increment(1);
                return Err("poison");
            }
            trouble.deaths = context.deaths;
            answer.map(|response| (response, context))
        };
        match answer {
            Ok((response, context)) if is_stream(&response) => {
                let engine = context.log.upstream_host.clone();
                return Ok(Leg::new(response.into_body(), context.observers, engine));
            }
            Ok((response, _)) if response.status().is_client_error() => {
                return Err("engine_refused");
            }
            // Nobody was asked: somebody may come back.
            Err(error) if error.flag == Flag::NoHealthyUpstream => {}
            Ok(_) | Err(_) => trouble.attempts += 1,
        }
        if trouble.attempts >= call.policy.config.attempts_max {
            return Err("attempts");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Waits for a place among the streams in prefill, no longer than a stall is borne.
async fn permit(call: &Call, trouble: &Trouble) -> Result<Counted, &'static str> {
    let config = &call.policy.config;
    let shared = &call.policy.services.migration;
    let place = || shared.resume(config.budget_percent, config.min_resume_concurrency);
    if let Some(permit) = place() {
        return Ok(permit);
    }
    metrics::counter!("outrigger_migration_budget_waits_total").increment(1);
    let begun = Instant::now();
    loop {
        tokio::time::sleep(BUDGET_LOOK).await;
        if let Some(permit) = place() {
            return Ok(permit);
        }
        if begun.elapsed() >= config.stall() {
            tracing::debug!(since = ?trouble.since.elapsed(), "no place to resume a stream");
            return Err("budget");
        }
    }
}
