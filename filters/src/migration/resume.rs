//! Calling the rest of the chain once more: within the budget, a few times, and never without an end.

use super::{
    Policy,
    budget::{Counted, Shared},
    is_stream,
    leg::Leg,
    recipe::{Recipe, Way},
    suspicion::Deaths,
};
use crate::{
    body::{RequestBody, ResponseBody, empty, full},
    endpoints::{Endpoint, Level},
    error::{Error, Flag, GivenUp},
    filter::{Chain, Context, Next, RouteFacts},
    sse,
};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
    header, uri::PathAndQuery,
};
use http_body_util::{BodyExt, Limited};
use outrigger_xds::report::EngineId;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::SemaphorePermit;

const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");
/// Between two looks at the budget.
const BUDGET_LOOK: Duration = Duration::from_millis(20);
/// Between two looks, while a suspect waits, whether there is a storm.
const STORM_LOOK: Duration = Duration::from_millis(100);
/// How long a verdict waits for what else breaks: a storm that has just begun, or a proxy that has, shows one engine at a time.
const DOUBT: Duration = Duration::from_secs(3);
/// Before another attempt at a whole answer.
pub(super) const PAUSE: Duration = Duration::from_millis(100);

/// Most of an error's text that is kept while other engines are asked.
const ERROR_BYTES_MAX: usize = 64 << 10;
/// …if it comes so soon.
const ERROR_WAIT: Duration = Duration::from_millis(100);

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
    /// When it broke first since its last token: all moves together have one limit.
    pub(super) broke: Instant,
    /// The engine that lost it.
    pub(super) lost_by: Option<EngineId>,
    /// Moves in a row that brought no token.
    pub(super) attempts: u32,
    /// Calls so far: each has an id of its own.
    pub(super) calls: u32,
    /// Engines that died before its first token there.
    pub(super) deaths: Deaths,
    /// When all must be over, if nothing else sees to that.
    pub(super) until: Option<Instant>,
}

impl Trouble {
    /// None yet.
    pub(super) fn new(deaths: Deaths) -> Self {
        let now = Instant::now();
        Self {
            since: now,
            broke: now,
            lost_by: None,
            attempts: 0,
            calls: 0,
            deaths,
            until: None,
        }
    }

    /// So much of a pause as is left until all must be over.
    pub(super) fn within(&self, pause: Duration) -> Duration {
        let left = |until: Instant| until.saturating_duration_since(Instant::now());
        self.until.map_or(pause, |until| pause.min(left(until)))
    }
}

/// What came of one call.
pub(super) struct Answered {
    pub(super) result: Result<Response<ResponseBody>, Error>,
    pub(super) context: Context,
    /// Its place among those in prefill.
    pub(super) place: Counted,
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

    /// The client's request, whichever call it is.
    pub(super) fn request_id(&self) -> &str {
        &self.template.request_id
    }

    /// The cluster that the request goes to.
    pub(super) fn cluster(&self) -> &str {
        &self.template.route.cluster
    }

    /// As the client sent them, but for what earlier filters did.
    pub(super) fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Where it is said why a leg is left.
    pub(super) fn given_up(&self) -> &GivenUp {
        &self.template.given_up
    }

    /// The first request, unchanged, for the `calls`th time after the first.
    pub(super) fn first_again(
        &self,
        calls: u32,
        deaths: &Deaths,
    ) -> (Request<RequestBody>, Context) {
        let mut again = match deaths.ran_alone() {
            true => self.context("a"),
            false => self.context(&format!("s{calls}")),
        };
        again.avoid = deaths.last().cloned();
        again.deaths_max = deaths.left();
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

    /// Whether it may be chance that engines died of the request: others did, by their streams or by what is told of them.
    pub(super) fn in_storm(&self, deaths: &Deaths) -> bool {
        deaths.in_storm(self.learned())
    }

    /// Whether the request is refused for the engines that died of it, also when some time has passed.
    pub(super) async fn is_poison(&self, deaths: &Deaths) -> bool {
        let is_poison = || deaths.is_poison(self.learned());
        is_poison() && (deaths.are_too_many() || !self.comes(|| !is_poison()).await)
    }

    /// Whether there is a storm, or one shows before long.
    pub(super) async fn may_be_storm(&self, deaths: &Deaths) -> bool {
        self.comes(|| self.in_storm(deaths)).await
    }

    /// Whether it is so in time.
    async fn comes(&self, is_so: impl Fn() -> bool) -> bool {
        let begun = Instant::now();
        while !is_so() {
            if begun.elapsed() >= DOUBT || !self.has_engine() {
                return false;
            }
            tokio::time::sleep(STORM_LOOK).await;
        }
        true
    }

    /// What all streams share, with what is told of engines by now.
    fn learned(&self) -> &Shared {
        let services = &self.policy.services;
        if let Some(view) = services.endpoints.view(self.cluster()) {
            let fallen = view.endpoints.iter();
            let fallen = fallen.filter_map(|endpoint| Some((&endpoint.id, endpoint.fell_at()?)));
            services.migration.breaks.learn(fallen);
        }
        &services.migration
    }

    /// Whether an engine of the fleet is alive that the request may be for.
    pub(super) fn has_engine(&self) -> bool {
        let openai = self.template.openai.as_deref();
        let model = openai.and_then(|openai| openai.model.as_deref());
        let view = self.policy.services.endpoints.view(self.cluster());
        view.is_some_and(|view| {
            let mut endpoints = view.endpoints.iter();
            endpoints.any(|endpoint| endpoint.fits(model))
        })
    }

    /// A place among the streams in prefill, if one is free.
    pub(super) fn place(&self) -> Option<Counted> {
        let config = &self.policy.config;
        let shared = &self.policy.services.migration;
        shared.resume(config.budget_percent, config.min_resume_concurrency)
    }

    /// Whether somebody else could serve it, and is well: where none is, it would go from one to the next.
    pub(super) fn has_other(&self, engine: Option<&EngineId>) -> bool {
        let openai = self.template.openai.as_deref();
        let model = openai.and_then(|openai| openai.model.as_deref());
        let endpoints = &self.policy.services.endpoints;
        endpoints.view(self.cluster()).is_some_and(|view| {
            view.endpoints.iter().any(|endpoint| {
                Some(&endpoint.id) != engine
                    && endpoint.fits(model)
                    && matches!(endpoint.level(), Level::Healthy | Level::Degraded)
            })
        })
    }

    /// An engine of the cluster, while it is there.
    pub(super) fn endpoint(&self, engine: Option<&EngineId>) -> Option<Arc<Endpoint>> {
        let view = self.policy.services.endpoints.view(self.cluster())?;
        let mut endpoints = view.endpoints.iter();
        endpoints
            .find(|endpoint| Some(&endpoint.id) == engine)
            .cloned()
    }

    /// Tokens of the model's context, as the engine says, or said. If it is gone: the least that others say.
    pub(super) fn context_tokens(&self, engine: Option<&EngineId>) -> u64 {
        let openai = self.template.openai.as_deref();
        let model = openai.and_then(|openai| openai.model.as_deref());
        let told = |endpoint: &Endpoint| {
            let live = endpoint.live.load();
            let mut models = live.state.models.iter();
            let known = models.find(|known| Some(known.id.as_str()) == model);
            known.map_or(0, |known| known.context_tokens)
        };
        let own = self.endpoint(engine).map_or(0, |endpoint| told(&endpoint));
        if own > 0 {
            return own;
        }
        let Some(view) = self.policy.services.endpoints.view(self.cluster()) else {
            return 0;
        };
        let fitting = view.endpoints.iter().filter(|one| one.fits(model));
        let known = fitting.map(|one| told(one)).filter(|tokens| *tokens > 0);
        known.min().unwrap_or(0)
    }

    /// Whether the request can be sent again.
    pub(super) fn can_repeat(&self) -> bool {
        !self.body.0.is_empty()
    }
}

/// The way to plain completions beside the way to chat.
fn completions_of(uri: &Uri) -> Uri {
    let mut path = uri.path().replace("/chat/completions", "/completions");
    if let Some(query) = uri.query() {
        path.push('?');
        path.push_str(query);
    }
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = PathAndQuery::try_from(path).ok();
    Uri::from_parts(parts).unwrap_or_else(|_| uri.clone())
}

/// Finds the stream another engine, in time or not at all. A stream that still runs where it is brings its place along.
pub(super) async fn resume(
    call: Arc<Call>,
    recipe: Recipe,
    mut trouble: Trouble,
    place: Option<Counted>,
) -> Moved {
    let limit = call.policy.config.resume_timeout();
    let left = limit.saturating_sub(trouble.broke.elapsed());
    let found = match left.is_zero() {
        true => None,
        false => tokio::time::timeout(left, find(&call, &recipe, &mut trouble, place))
            .await
            .ok(),
    };
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
    mut place: Option<Counted>,
) -> Result<Leg, &'static str> {
    let shared = &call.policy.services.migration;
    let runs_still = place.is_some();
    loop {
        if call.is_poison(&trouble.deaths).await {
            trouble.deaths.convict(shared, call.request_id());
            return Err("poison");
        }
        if trouble.attempts >= call.policy.config.attempts_max {
            return Err("attempts");
        }
        let answered = ask(call, Some(recipe), trouble, place.take()).await?;
        match answered.result {
            Ok(response) if is_stream(&response) => {
                let context = answered.context;
                let engine = context.log.upstream_host.clone();
                let body = response.into_body();
                let place = Some(answered.place);
                return Ok(Leg::new(body, context.observers, engine, place));
            }
            Ok(response) if blames_request(response.status()) => return Err("engine_refused"),
            // Nobody was asked: somebody may come back.
            Err(error) if error.flag == Flag::NoHealthyUpstream && !runs_still => {}
            // Time ends it, and the number of deaths.
            Err(error) if error.is_breakdown() && !runs_still && call.in_storm(&trouble.deaths) => {
            }
            Ok(_) | Err(_) => trouble.attempts += 1,
        }
        drop(answered.place);
        tokio::time::sleep(trouble.deaths.pause()).await;
    }
}

/// Calls the rest of the chain once more: within the budget, and alone if engines died of the stream. (An answer in one
/// piece says nothing until all of it was generated: when its engine died tells nothing of its request.)
pub(super) async fn ask(
    call: &Arc<Call>,
    recipe: Option<&Recipe>,
    trouble: &mut Trouble,
    place: Option<Counted>,
) -> Result<Answered, &'static str> {
    let shared = &call.policy.services.migration;
    let _turn = match recipe {
        Some(_) => turn(call, &mut trouble.deaths).await?,
        None => None,
    };
    let place = match place {
        Some(place) => place,
        None => wait_for_place(call, trouble).await?,
    };
    trouble.calls += 1;
    let mut context = call.context(&format!("r{}", trouble.calls));
    if let Some(recipe) = recipe {
        context.openai = Some(recipe.openai.clone());
    }
    context.avoid = trouble.lost_by.clone();
    if recipe.is_some() {
        context.deaths_max = trouble.deaths.left();
    }
    let request = call.request(recipe, &context);
    let result = Next::new(&call.chain).run(request, &mut context).await;
    let losses = context.losses.drain(..);
    match recipe {
        Some(_) => trouble.deaths.add(shared, losses),
        None => shared.breaks.note_all(losses),
    }
    Ok(Answered {
        result,
        context,
        place,
    })
}

pub(super) fn blames_request(status: StatusCode) -> bool {
    status.is_client_error() && !sse::is_of_the_moment(status.as_u16().into())
}

/// An engine's error without its connection, which others may need meanwhile. What does not come at once is left.
pub(super) async fn keep_error(response: Response<ResponseBody>) -> Response<ResponseBody> {
    let (mut parts, body) = response.into_parts();
    let text =
        tokio::time::timeout(ERROR_WAIT, Limited::new(body, ERROR_BYTES_MAX).collect()).await;
    let body = match text {
        Ok(Ok(text)) => full(text.to_bytes()),
        Ok(Err(_)) | Err(_) => {
            parts.headers.remove(header::CONTENT_TYPE);
            empty()
        }
    };
    for name in [
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
        header::TRAILER,
    ] {
        parts.headers.remove(name);
    }
    Response::from_parts(parts, body)
}

/// Waits until no other suspect runs, no longer than a stall is borne. In a storm there may be many: nobody waits then.
pub(super) async fn turn<'a>(
    call: &'a Call,
    deaths: &mut Deaths,
) -> Result<Option<SemaphorePermit<'a>>, &'static str> {
    let turn = alone(call, deaths).await?;
    deaths.runs(turn.is_some());
    if turn.is_none() && deaths.count() > 0 && call.in_storm(deaths) {
        metrics::counter!("outrigger_migration_storm_runs_total").increment(1);
    }
    Ok(turn)
}

async fn alone<'a>(
    call: &'a Call,
    deaths: &Deaths,
) -> Result<Option<SemaphorePermit<'a>>, &'static str> {
    let shared = &call.policy.services.migration;
    let begun = Instant::now();
    let mut permit = std::pin::pin!(shared.alone.acquire());
    while deaths.is_suspect() && !call.in_storm(deaths) {
        match tokio::time::timeout(STORM_LOOK, &mut permit).await {
            Ok(permit) => return permit.map(Some).map_err(|_| "suspect"),
            Err(_) if begun.elapsed() >= call.policy.config.stall() => return Err("suspect"),
            Err(_) => {}
        }
    }
    Ok(None)
}

/// Waits for a place among the streams in prefill, no longer than a stall is borne.
async fn wait_for_place(call: &Call, trouble: &Trouble) -> Result<Counted, &'static str> {
    if let Some(place) = call.place() {
        return Ok(place);
    }
    metrics::counter!("outrigger_migration_budget_waits_total").increment(1);
    let begun = Instant::now();
    let limit = trouble.within(call.policy.config.stall());
    loop {
        tokio::time::sleep(BUDGET_LOOK).await;
        if let Some(place) = call.place() {
            return Ok(place);
        }
        if begun.elapsed() >= limit {
            tracing::debug!(since = ?trouble.since.elapsed(), "no place to resume a stream");
            return Err("budget");
        }
    }
}
