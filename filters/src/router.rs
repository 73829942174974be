//! The terminal filter: sends the request to an endpoint, walks on when that fails, and gives up by the rules.
//!
//! It honours [`Context::ranked`] as Envoy's override_host does, then the cluster's own policy. A generation may be
//! retried until its first response byte was delivered (so the first stream event is awaited before the response is
//! handed up); anything else only if nothing of it was sent. Retries stay within a budget.

pub mod attempt;
pub mod hash;
pub mod host;
pub mod leg;
pub mod mirror;
mod original;
mod outcome;
pub mod report;
pub mod retry;
mod span;

use crate::{
    body::{RequestBody, ResponseBody},
    breakers::{Held, Kind},
    endpoints::{ClusterView, Endpoint, Level, Part, Via, Want},
    error::{Error, Flag, Origin, Retry},
    filter::{Context, GivenBack, Handled, HttpFilter, Next, Ranked, RouteFacts},
    registry,
    services::Services,
    spare,
};
use attempt::Attempt;
use http::{Request, Response, StatusCode, header};
use outcome::Outcome;
use retry::Rules;
use serde::Deserialize;
use std::{net::SocketAddr, sync::Arc, time::Duration};

/// Envoy's router.
pub const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";

/// Envoy's `Router` message, as far as it has a meaning here.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Leave out `x-envoy-*` response headers.
    #[serde(alias = "suppressEnvoyHeaders")]
    pub suppress_envoy_headers: bool,
}

/// The filter.
pub struct Router {
    services: Services,
    config: Config,
}

/// The registry's constructor.
///
/// # Errors
/// The configuration has an unknown field.
pub fn factory(
    value: &serde_json::Value,
    services: &Services,
) -> Result<Arc<dyn HttpFilter>, String> {
    let config = registry::parse(value)?;
    Ok(Arc::new(Router {
        services: services.clone(),
        config,
    }))
}

impl HttpFilter for Router {
    fn handle<'a>(
        &'a self,
        request: Request<RequestBody>,
        context: &'a mut Context,
        _next: Next<'a>,
    ) -> Handled<'a> {
        // Moved as a pointer from here on: it is large, and every future on its way would hold a copy.
        let mut request = Box::new(request);
        Box::pin(async move {
            let cluster = context.route.cluster.clone();
            let view = self
                .services
                .endpoints
                .view(&cluster)
                .ok_or_else(|| no_cluster(&context.route))?;
            context.log.upstream_cluster = cluster;
            if let Some(heads) = &context.heads {
                heads.request(&mut request, &context.log);
            }
            if !context.again && !context.route.mirrors.is_empty() {
                mirror::send(&self.services, &request, context);
            }
            let mut walk = Walk::new(self, &view, context, &request);
            let mut outcome = walk.run(&mut request, context).await;
            // Envoy counts the attempt that found nobody.
            context.log.attempts = context.log.attempts.max(1);
            if let Ok(response) = &mut outcome {
                walk.set_cookies(response);
                context.edit_response(response);
            }
            drop(walk);
            if context.wants_back {
                context.given_back = Some(GivenBack::new(*request));
            } else {
                spare::release_headers(std::mem::take(request.headers_mut()));
            }
            outcome
        })
    }

    /// What an attempt writes into a head is taken off, or written anew by the next. What the route writes is not.
    fn gives_back(&self, context: &Context) -> bool {
        context.heads.is_none()
    }
}

fn no_cluster(route: &RouteFacts) -> Error {
    let cluster = &*route.cluster;
    tracing::debug!(cluster, "route names a cluster that does not exist");
    Error::new(
        Origin::Proxy,
        Flag::NoClusterFound,
        route
            .cluster_not_found
            .unwrap_or(StatusCode::SERVICE_UNAVAILABLE),
        "cluster_not_found",
        "",
    )
}

/// One request's way along its candidates.
struct Walk<'a> {
    router: &'a Router,
    view: &'a Arc<ClusterView>,
    rules: Rules,
    tried: Vec<Arc<Endpoint>>,
    /// Attempts so far; also those that `tried` has forgotten.
    attempts: usize,
    /// The endpoint whose pooled connection turned out to be closed: once per request, nobody holds that against it.
    stale: Option<Arc<Endpoint>>,
    /// Of the coming attempt, if it counts as a retry.
    permit: Option<Held>,
    /// The request's, for policies that choose by it, and the cookies that make it last.
    hash: hash::Hash,
    /// Endpoints that the request names, best first.
    named: Vec<String>,
    /// Where it was meant to go, if its cluster is for that.
    original: Option<SocketAddr>,
}

impl<'a> Walk<'a> {
    fn new(
        router: &'a Router,
        view: &'a Arc<ClusterView>,
        context: &Context,
        request: &Request<RequestBody>,
    ) -> Self {
        let generation = context
            .openai
            .as_ref()
            .is_some_and(|openai| openai.is_generation());
        let rules = Rules::new(context.route.retry_policy.as_ref(), generation, request);
        Self {
            router,
            view,
            rules,
            tried: Vec::new(),
            attempts: 0,
            stale: None,
            permit: None,
            hash: context
                .route
                .hashes
                .as_ref()
                .map(|hashes| hashes.of(request, context.connection.as_ref()))
                .unwrap_or_default(),
            named: named_hosts(view, request),
            original: view
                .original_dst
                .as_ref()
                .and_then(|config| original::destination(config, view, request.headers(), context)),
        }
    }

    async fn run(
        &mut self,
        request: &mut Request<RequestBody>,
        context: &mut Context,
    ) -> Result<Response<ResponseBody>, Error> {
        // Boxed: it is rare, and would be part of every request's future.
        let mut last: Option<Box<Outcome>> = None;
        loop {
            let Some(target) = self.next_target(context)? else {
                return give_up(last.map(|last| *last), self.tried.len(), context);
            };
            if let Some(last) = &last {
                self.count_retry(last, &target, context);
            }
            self.tried.push(target.endpoint.clone());
            self.attempts += 1;
            context.log.attempts = self.attempts as u32;
            let attempt = Attempt::new(
                &self.router.services,
                self.view,
                &target,
                &self.rules,
                self.attempts,
            );
            let permit = self.permit.take();
            let outcome = attempt.run(request, context).await;
            if outcome.is_loss() {
                context.note_loss(target.endpoint.id.clone(), outcome.is_death());
            }
            drop(permit);
            if request.body().is_spent() || !self.may_retry(&outcome, context) {
                return self.finish(outcome, context);
            }
            if outcome.is_stale() && self.stale.is_none() {
                // Nobody refused anything: the engine just closed an idle connection. It stays the first choice.
                self.stale = self.tried.pop();
            }
            tracing::debug!(endpoint = %target.endpoint.id, outcome = %outcome.describe(), "walking on");
            let pause = self.pause(&outcome);
            last = Some(Box::new(outcome));
            if let Some(pause) = pause {
                tokio::time::sleep(pause).await;
            }
        }
    }

    /// With an explicit policy a retry waits a while. A connection that was closed anyway is replaced at once.
    fn pause(&self, outcome: &Outcome) -> Option<Duration> {
        self.rules
            .back_off(self.tried.len())
            .filter(|_| !outcome.is_stale())
    }

    /// A connection that turned out to be closed is replaced unnoticed, unless its endpoint is gone altogether.
    fn count_retry(&self, last: &Outcome, target: &Ranked, context: &Context) {
        let replaced = last.is_stale()
            && self
                .stale
                .as_ref()
                .is_some_and(|stale| stale.id == target.endpoint.id);
        if !replaced {
            retry::count(&context.route.cluster, last.reason());
        }
    }

    /// Where to next: the ranking first, then the cluster's policy over what was not tried yet.
    fn next_target(&self, context: &Context) -> Result<Option<Ranked>, Error> {
        if context.route.inbound && !self.is_ordinary(context) {
            return if self.tried.is_empty() {
                self.named(context).map(Some)
            } else {
                Ok(None)
            };
        }
        if let Some(only) = &context.only {
            return self.only(only, context);
        }
        if self.view.original_dst.is_some() {
            return self.original(context);
        }
        let part = context.part;
        let ranked = context.ranked.iter().filter(|ranked| {
            let endpoint = &ranked.endpoint;
            !self.has_tried(endpoint) && endpoint.is_alive() && part.suits(endpoint)
        });
        let fresh = ranked
            .clone()
            .find(|ranked| !ranked.endpoint.is_inhibited() && !avoided(&ranked.endpoint, context));
        if let Some(ranked) = fresh.or_else(|| ranked.clone().next()) {
            return Ok(Some(ranked.clone()));
        }
        let endpoints = &self.router.services.endpoints;
        let mut candidates = self.candidates(context);
        let hash = self.hash.value;
        let mut chosen = self
            .named_by_request(&candidates)
            .or_else(|| endpoints.choose(self.view, &candidates, hash));
        if chosen.is_none() && !candidates.is_empty() {
            // Of those that did not fail lately, none is healthy enough.
            let openai = context.openai.as_deref();
            let model = openai.and_then(|openai| openai.model.as_deref());
            candidates = self.view.candidates(model);
            candidates.retain(|endpoint| !self.has_tried(endpoint));
            part.keep_suited(&mut candidates);
            chosen = endpoints.choose(self.view, &candidates, hash);
        }
        match chosen {
            Some(index) => Ok(Some(Ranked {
                endpoint: candidates[index].clone(),
                rank: None,
                cost: 0.0,
                hit_tokens: None,
            })),
            None if self.attempts == 0 => Err(Error::no_healthy_upstream()),
            None => Ok(None),
        }
    }

    /// Those that may be tried now: nearly always all that are alive, serve the model and have not failed lately.
    fn candidates(&self, context: &Context) -> Vec<Arc<Endpoint>> {
        let openai = context.openai.as_deref();
        let model = openai.and_then(|openai| openai.model.as_deref());
        // What names no model is about the node it came to, and stays there, whatever becomes of it. A body too long to
        // be read may name one.
        let home = openai.is_some_and(|openai| openai.model.is_none() && !openai.too_large)
            && self
                .view
                .endpoints
                .iter()
                .any(|endpoint| endpoint.via == Via::Local);
        let fits = |endpoint: &&Arc<Endpoint>| {
            endpoint.fits(model)
                && !endpoint.is_inhibited()
                && !avoided(endpoint, context)
                && (!home || endpoint.via == Via::Local)
                && context.part.suits(endpoint)
                && !self.has_tried(endpoint)
        };
        let mut fit = Vec::with_capacity(self.view.endpoints.len());
        fit.extend(self.view.endpoints.iter().filter(fits).cloned());
        if !fit.is_empty() {
            return fit;
        }
        let mut rest = self.view.candidates(model);
        if home {
            rest.retain(|endpoint| endpoint.via == Via::Local);
        }
        let untried = |endpoint: &Arc<Endpoint>| !self.has_tried(endpoint);
        // As Envoy does, where somebody asked for retries by name.
        let again = context.route.retry_policy.is_some() && !rest.iter().any(untried);
        rest.retain(|endpoint| again || untried(endpoint));
        context.part.keep_suited(&mut rest);
        if rest.iter().any(|endpoint| !endpoint.is_inhibited()) {
            rest.retain(|endpoint| !endpoint.is_inhibited());
        }
        rest
    }

    /// `override_host`: the best that the request names, and that may get requests.
    fn named_by_request(&self, candidates: &[Arc<Endpoint>]) -> Option<usize> {
        let usable = |endpoint: &Endpoint| {
            matches!(endpoint.level(), Level::Healthy | Level::Degraded)
                && !self.has_tried(endpoint)
        };
        self.named.iter().find_map(|name| {
            candidates
                .iter()
                .position(|known| known.address.to_string() == *name && usable(known))
        })
    }

    /// Gives the client the cookies that its requests will be hashed by.
    fn set_cookies(&mut self, response: &mut Response<ResponseBody>) {
        for cookie in self.hash.cookies.drain(..) {
            response.headers_mut().append(header::SET_COOKIE, cookie);
        }
    }

    fn has_tried(&self, endpoint: &Endpoint) -> bool {
        self.tried.iter().any(|tried| tried.id == endpoint.id)
    }

    /// Nobody names an endpoint, and none is an engine: what another mesh's sidecar has inbound is chosen from as anywhere.
    fn is_ordinary(&self, context: &Context) -> bool {
        context.named.is_none() && (self.view.original_dst.is_some() || self.view.plain)
    }

    /// Among engines, inbound never chooses: the peer said which engine, and only those beside us count.
    fn named(&self, context: &Context) -> Result<Ranked, Error> {
        let named = context.named.as_ref();
        let endpoint = self
            .view
            .endpoints
            .iter()
            .find(|endpoint| Some(&endpoint.id) == named);
        match endpoint {
            Some(endpoint) if endpoint.is_alive() => Ok(Ranked {
                endpoint: endpoint.clone(),
                rank: None,
                cost: 0.0,
                hit_tokens: context.told_hit_tokens,
            }),
            _ => {
                let mut error = Error::no_healthy_upstream().retry(Retry::NothingSent);
                if named.is_none() {
                    error.message =
                        "inbound: no endpoint named; clients belong on the outbound listener"
                            .into();
                }
                Err(error)
            }
        }
    }

    /// Where it was meant to go; once, unless somebody asked for retries by name.
    fn original(&self, context: &Context) -> Result<Option<Ranked>, Error> {
        if !self.tried.is_empty() && context.route.retry_policy.is_none() {
            return Ok(None);
        }
        let endpoints = &self.router.services.endpoints;
        let endpoint = self
            .original
            .and_then(|address| endpoints.original(self.view, address))
            .filter(|endpoint| endpoint.is_alive());
        let endpoint = endpoint.ok_or_else(Error::no_healthy_upstream)?;
        Ok(Some(attempt::target(endpoint)))
    }

    /// The endpoint that alone can answer, once.
    fn only(&self, endpoint: &Arc<Endpoint>, context: &Context) -> Result<Option<Ranked>, Error> {
        if self.has_tried(endpoint) {
            return Ok(None);
        }
        if !endpoint.is_alive() {
            return Err(Error::no_healthy_upstream());
        }
        let mut ranked = context.ranked.iter();
        let known = ranked.find(|ranked| ranked.endpoint.id == endpoint.id);
        let target = || attempt::target(endpoint.clone());
        Ok(Some(known.cloned().unwrap_or_else(target)))
    }

    /// Whether another attempt may help, is left, and is within the budget.
    fn may_retry(&mut self, outcome: &Outcome, context: &Context) -> bool {
        if context.is_deadly() || !outcome.retry_helps(&self.rules) {
            return false;
        }
        let route = &context.route;
        if outcome.is_stale() && self.stale.is_none() {
            return true;
        }
        if self.tried.len() > self.rules.retries_max {
            return false;
        }
        // A request whose first engine broke goes on to one other whatever the budget: a dying engine takes all it was
        // working on with it, and that adds no more load than those requests were. What comes after is budgeted.
        let first = self.tried.len() == 1 && route.retry_policy.is_none();
        if first && outcome.is_breakdown() {
            return true;
        }
        let breakers = &self.view.breakers;
        let allowed = breakers.of(route.priority).allows_retry();
        if allowed {
            self.permit = Some(breakers.hold(route.priority, Kind::Retry));
        } else {
            retry::count_overflow(&route.cluster);
        }
        allowed
    }

    fn finish(
        &self,
        outcome: Outcome,
        context: &mut Context,
    ) -> Result<Response<ResponseBody>, Error> {
        match outcome {
            Outcome::Response(mut response) => {
                if self.router.config.suppress_envoy_headers {
                    response.headers_mut().remove(attempt::SERVICE_TIME_HEADER);
                }
                if self.tried.len() > 1 {
                    retry::count_success(&context.route.cluster);
                }
                Ok(*response)
            }
            Outcome::Unwanted(response) => {
                if self.tried.len() > 1 {
                    context.log.flags.push(Flag::UpstreamRetryLimitExceeded);
                    retry::count_exhausted(&context.route.cluster);
                }
                Ok(*response)
            }
            Outcome::Failed(error) => {
                let only = self.tried.len() == 1 && context.route.retry_policy.is_some();
                if only && self.rules.retries_max == 0 && self.rules.helps(&error) {
                    context.log.flags.push(Flag::UpstreamRetryLimitExceeded);
                }
                Err(exhausted(error, self.tried.len(), context))
            }
        }
    }
}

/// Whether a filter wants it passed over.
fn avoided(endpoint: &Endpoint, context: &Context) -> bool {
    context.avoid.as_ref() == Some(&endpoint.id)
}

/// What the cluster's `override_host` headers say: addresses with commas between them; the first header that is there
/// counts.
fn named_hosts(view: &ClusterView, request: &Request<RequestBody>) -> Vec<String> {
    let mut told = view
        .override_host
        .iter()
        .filter_map(|name| request.headers().get(name)?.to_str().ok());
    let hosts = told.next().unwrap_or_default().split(',').map(str::trim);
    hosts
        .filter(|host| !host.is_empty())
        .map(str::to_owned)
        .collect()
}

/// No endpoint is left: the last failure stands.
fn give_up(
    last: Option<Outcome>,
    tried: usize,
    context: &mut Context,
) -> Result<Response<ResponseBody>, Error> {
    match last {
        Some(Outcome::Response(response) | Outcome::Unwanted(response)) => Ok(*response),
        Some(Outcome::Failed(error)) => Err(exhausted(error, tried, context)),
        None => Err(Error::no_healthy_upstream()),
    }
}

/// Envoy's words for a failure after retries.
fn exhausted(mut error: Error, tried: usize, context: &mut Context) -> Error {
    if tried > 1 {
        context.log.flags.push(Flag::UpstreamRetryLimitExceeded);
        retry::count_exhausted(&context.route.cluster);
        if let Some(rest) = error.message.strip_prefix(
            "upstream connect error or disconnect/reset before headers. reset reason:",
        ) {
            error.message = format!(
                "upstream connect error or disconnect/reset before headers. \
                 retried and the latest reset reason:{rest}"
            )
            .into();
        }
    }
    error
}

/// What the chosen endpoint will be asked for.
pub(crate) fn want(context: &Context, target: &Ranked) -> Want {
    Want {
        prompt_tokens: context.prompt.tokens,
        hit_tokens: hit_tokens(context, target).unwrap_or(0),
        blocks: context.prompt.blocks.clone(),
        priority: context.route.priority,
        given_up: context.given_up.clone(),
    }
}

/// Prompt tokens that the endpoint need not compute: all, where another one did.
fn hit_tokens(context: &Context, target: &Ranked) -> Option<u64> {
    match context.part {
        Part::Decode => Some(context.prompt.tokens),
        Part::Any | Part::Whole | Part::Prefill => target.hit_tokens,
    }
}
