//! The `disaggregation` filter: prefill at one engine, tokens from another.
//!
//! What it answers: whether a request is split, where its prefill runs, what goes from one leg to the other, and what
//! becomes of the request, and of the blocks, when a leg fails or the client leaves. What it does not do: rank engines
//! (`kv_routing` has done so), or move streams (`migration` calls it again, and it decides anew). Whatever goes wrong
//! before the first byte, the request is served whole, once; where there are only halves of SGLang, by another pair,
//! unless an engine speaks against the request itself.

mod another;
mod dialect;
mod failure;
mod head;
mod loan;
mod nixl;
mod pull;
mod record;
mod repair;
mod rule;
mod sglang;
mod trtllm;

use crate::{
    body::{RequestBody, ResponseBody},
    endpoints::{ClusterView, Endpoint, Part, Place, Via, Want},
    error::{Error, Origin, Retry},
    filter::{Context, Handled, HttpFilter, Next, Ranked},
    lease::{self, Asked},
    registry,
    services::Services,
};
use dialect::Dialect;
use failure::{BROKE, Failure, none};
use head::{Head, put_id};
use http::{HeaderName, HeaderValue, Request, Response, header};
use loan::Loan;
use outrigger_xds::report::{EngineId, EngineKind, Role};
use record::Record;
pub use rule::Mode;
use rule::{Pace, Rule, Way};
use serde::Deserialize;
use std::{sync::Arc, time::Duration};

/// Our own type.
pub const TYPE_URL: &str = "type.googleapis.com/outrigger.filters.http.disaggregation.v1.Config";

/// Tells a client that asked for it whether and why its request was split.
pub const DISAGGREGATION_HEADER: HeaderName = HeaderName::from_static("x-outrigger-disaggregation");

/// Engines for decode whose proxies are asked for a place: after so many refusals the request is served whole.
const DECODERS_ASKED_MAX: usize = 3;

/// Configuration of the filter.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// When requests are split. Default: by the thresholds.
    pub mode: Mode,
    /// Prompt tokens that are not cached where the request would be served whole. Default 256.
    pub uncached_tokens_min: u64,
    /// …or the time that their prefill is predicted to take; 0 is off, which is the default.
    pub uncached_ms_min: u64,
    /// What prefill is taken to do until some was seen. Default 8,000.
    pub prefill_tokens_per_s: f64,
    /// A prefill leg that takes longer is given up. Default 120 s.
    pub prefill_timeout_ms: u64,
    /// Whether both legs should be, or have to be, in one locality. Default: no matter.
    pub locality: Locality,
    /// Allow `x-outrigger-disaggregation` on responses to requests that ask for debugging. Default off.
    pub decision_header: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mode: Mode::Threshold,
            uncached_tokens_min: 256,
            uncached_ms_min: 0,
            prefill_tokens_per_s: 8_000.0,
            prefill_timeout_ms: 120_000,
            locality: Locality::Any,
            decision_header: false,
        }
    }
}

/// How near the legs have to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Locality {
    /// No matter.
    #[default]
    Any,
    /// In one locality, if there is an engine for prefill.
    Preferred,
    /// In one locality, or not split.
    Required,
}

/// The filter.
pub struct Disaggregation {
    services: Services,
    config: Config,
    pace: Pace,
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
    if !(config.prefill_tokens_per_s.is_finite() && config.prefill_tokens_per_s > 0.0) {
        return Err("prefill_tokens_per_s: must be above 0".into());
    }
    if config.prefill_timeout_ms == 0 {
        return Err("prefill_timeout_ms: must be at least 1".into());
    }
    Ok(Arc::new(Disaggregation {
        services: services.clone(),
        pace: Pace::new(config.prefill_tokens_per_s),
        config,
    }))
}

impl HttpFilter for Disaggregation {
    fn handle<'a>(
        &'a self,
        request: Request<RequestBody>,
        context: &'a mut Context,
        next: Next<'a>,
    ) -> Handled<'a> {
        let Some(view) = self.view_with_roles(context) else {
            return next.run(request, context);
        };
        // Moved as a pointer from here on: it is large, and every future on its way would hold a copy.
        let request = Box::new(request);
        Box::pin(async move {
            let rule = Rule {
                config: &self.config,
                pace: &self.pace,
                view: &view,
            };
            let (way, mut record) = rule.decide(&request, context);
            context.part = match way {
                Way::Refused => Part::Any,
                Way::Split | Way::Whole | Way::Nobody => Part::Whole,
            };
            let answer = match way {
                Way::Whole | Way::Refused => next.run(*request, context).await,
                Way::Nobody => Err(Error::no_healthy_upstream()),
                Way::Split => {
                    let mut split = Split {
                        filter: self,
                        view: &view,
                        next,
                        record: &mut record,
                    };
                    split.run(request, context).await
                }
            };
            record.count();
            context.log.disaggregation = record.text();
            answer.map(|response| self.explain(response, context))
        })
    }

    fn gives_back(&self, context: &Context) -> bool {
        self.view_with_roles(context).is_none()
    }
}

impl Disaggregation {
    /// The cluster of a generation, if its engines have roles.
    fn view_with_roles(&self, context: &Context) -> Option<Arc<ClusterView>> {
        let openai = context.openai.as_ref()?;
        if context.route.inbound || !openai.is_generation() {
            return None;
        }
        let view = self.services.endpoints.view(&context.route.cluster)?;
        let has_role = |endpoint: &Arc<Endpoint>| endpoint.role() != Role::Both;
        view.endpoints.iter().any(has_role).then_some(view)
    }

    fn explain(
        &self,
        mut response: Response<ResponseBody>,
        context: &Context,
    ) -> Response<ResponseBody> {
        let told = context.log.disaggregation.as_deref();
        let told = told.filter(|_| self.config.decision_header && context.debug);
        if let Some(value) = told.and_then(|text| HeaderValue::from_str(text).ok()) {
            response.headers_mut().insert(DISAGGREGATION_HEADER, value);
        }
        response
    }
}

/// What becomes of a request whose leg failed.
#[derive(Clone, Copy)]
enum Outcome {
    /// One engine serves all of it.
    Whole,
    /// Another pair serves it: here are only halves.
    Pair,
    /// What failed is the client's answer: an engine speaks against the request, or died of it.
    Answered,
    /// Nobody waits for it.
    Gone,
}

impl Outcome {
    fn as_str(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Pair => "pair",
            Self::Answered => "answered",
            Self::Gone => "gone",
        }
    }
}

/// One request on its way through two engines.
struct Split<'a> {
    filter: &'a Disaggregation,
    view: &'a ClusterView,
    next: Next<'a>,
    record: &'a mut Record,
}

impl Split<'_> {
    async fn run(
        &mut self,
        request: Box<Request<RequestBody>>,
        context: &mut Context,
    ) -> Result<Response<ResponseBody>, Error> {
        let head = Head::of(&request);
        let mut failure = match self.legs(&head, context).await {
            Ok(response) => return Ok(response),
            Err(failure) => failure,
        };
        let outcome = self.outcome(&failure, context);
        (self.record).fall_back(failure.leg, failure.reason, outcome.as_str());
        match outcome {
            Outcome::Gone | Outcome::Answered => {
                if failure.answer.is_some() {
                    context.log.upstream_host.clone_from(&failure.at);
                    context.response_edited = true;
                }
                failure.told()
            }
            Outcome::Pair => self.again(&head, failure, context).await,
            Outcome::Whole => {
                // Who failed at prefill is not asked for tokens anyway, unless nobody else is there.
                let failed = failure.at.take().filter(|_| failure.leg == "decode");
                // What it answered holds a connection and a place.
                drop(failure);
                self.whole(request, context, failed).await
            }
        }
    }

    /// What becomes of a request whose leg failed.
    fn outcome(&self, failure: &Failure, context: &Context) -> Outcome {
        // Who called us knows what to do with it.
        let error = failure.error.as_ref();
        if error.is_some_and(|error| error.origin == Origin::Downstream) {
            return Outcome::Gone;
        }
        // Who breaks engines is not sent to one more.
        if context.is_deadly() {
            return Outcome::Answered;
        }
        match rule::may_be_whole(self.view, context) {
            true => Outcome::Whole,
            false if failure.blames_request() => Outcome::Answered,
            false => Outcome::Pair,
        }
    }

    async fn legs(
        &mut self,
        head: &Head,
        context: &mut Context,
    ) -> Result<Response<ResponseBody>, Failure> {
        let (decode, place) = self.reserve(context).await?;
        let dialect = match decode.endpoint.live.load().state.kind {
            EngineKind::Sglang => {
                return sglang::together(self, head, (decode, place), context).await;
            }
            EngineKind::TrtLlm => &trtllm::DIALECT,
            EngineKind::Vllm | EngineKind::Unknown => &nixl::DIALECT,
        };
        let loan = self.prefill(dialect, head, &decode, context).await?;
        self.decode(loan, (decode, place), context).await
    }

    /// Who decodes: of halves of SGLang rather one that pairs with somebody.
    fn decoder(&self, context: &Context) -> Option<Ranked> {
        let own = self.filter.services.own_host.as_deref();
        let pairs = |endpoint: &Endpoint| {
            let kind = endpoint.live.load().state.kind;
            kind != EngineKind::Sglang || sglang::has_partner(self.view, endpoint, own, context)
        };
        let choose = |fits: &Fits<'_>| self.choose(Part::Decode, &context.ranked, context, fits);
        choose(&pairs).or_else(|| choose(&|_| true))
    }

    /// Of those that fit the engine that the ranking, or the cluster's policy, likes best for this part.
    fn choose(
        &self,
        part: Part,
        ranked: &[Ranked],
        context: &Context,
        fits: &Fits<'_>,
    ) -> Option<Ranked> {
        let usable = |ranked: &&Ranked| {
            let endpoint = &ranked.endpoint;
            part.suits(endpoint) && endpoint.is_alive() && fits(endpoint)
        };
        let avoided = |endpoint: &Endpoint| context.avoid.as_ref() == Some(&endpoint.id);
        let mut ranked = ranked.iter().filter(usable);
        let mut others = ranked.clone().filter(|ranked| !avoided(&ranked.endpoint));
        let fresh = others
            .clone()
            .find(|ranked| !ranked.endpoint.is_inhibited());
        if let Some(ranked) = fresh.or_else(|| others.next()).or_else(|| ranked.next()) {
            return Some(ranked.clone());
        }
        let openai = context.openai.as_deref();
        let mut candidates = self
            .view
            .candidates(openai.and_then(|openai| openai.model.as_deref()));
        part.keep_suited(&mut candidates);
        candidates.retain(|endpoint| fits(endpoint));
        if candidates.iter().any(|endpoint| !avoided(endpoint)) {
            candidates.retain(|endpoint| !avoided(endpoint));
        }
        let endpoints = &self.filter.services.endpoints;
        let index = endpoints.choose(self.view, &candidates, None)?;
        Some(crate::router::attempt::target(candidates[index].clone()))
    }

    /// Who decodes, and a place there that others know of. A peer that has none is passed over.
    async fn reserve(&self, context: &mut Context) -> Result<(Ranked, Place), Failure> {
        let avoid = context.avoid.clone();
        let mut found = Err(Failure::new("decode", "no_place"));
        for _ in 0..DECODERS_ASKED_MAX {
            found = self.ask(context).await;
            match &found {
                Err(failure) if failure.at.is_some() => context.avoid.clone_from(&failure.at),
                Ok(_) | Err(_) => break,
            }
        }
        context.avoid = avoid;
        found
    }

    async fn ask(&self, context: &Context) -> Result<(Ranked, Place), Failure> {
        let decode = self.decoder(context).ok_or_else(|| none("decode"))?;
        let mut place = self.hold(&decode, context)?;
        let endpoint = &decode.endpoint;
        // Both legs of an SGLang start at once.
        let waits = endpoint.live.load().state.kind != EngineKind::Sglang;
        if waits && endpoint.via == Via::Peer {
            match lease::ask(&self.filter.services, endpoint, &context.prompt).await {
                Asked::Held(lease) | Asked::Late(lease) => place.lease = Some(lease),
                Asked::Untold => {}
                Asked::Refused => {
                    return Err(Failure {
                        at: Some(endpoint.id.clone()),
                        ..Failure::new("decode", "no_place")
                    });
                }
            }
        }
        Ok((decode, place))
    }

    /// A place at the engine that will decode, before anything is computed for it.
    fn hold(&self, decode: &Ranked, context: &Context) -> Result<Place, Failure> {
        let want = Want {
            prompt_tokens: context.prompt.tokens,
            hit_tokens: context.prompt.tokens,
            blocks: context.prompt.blocks.clone(),
            priority: context.route.priority,
            given_up: context.given_up.clone(),
        };
        let endpoint = &decode.endpoint;
        let reserved = (self.filter.services.endpoints).reserve(self.view, endpoint, &want);
        let reservation = reserved.map_err(|error| Failure {
            error: Some(Box::new(error)),
            ..Failure::new("decode", "no_place")
        })?;
        Ok(Place {
            endpoint: endpoint.id.clone(),
            reservation,
            lease: None,
        })
    }

    /// Has the prompt computed. From the answer on its blocks wait for whoever holds the loan.
    async fn prefill(
        &mut self,
        dialect: &'static Dialect,
        head: &Head,
        decode: &Ranked,
        context: &mut Context,
    ) -> Result<Loan, Failure> {
        let mut leg = leg(context, Part::Prefill, "p");
        leg.ranked = near(&context.ranked, decode, self.filter.config.locality);
        if self.filter.config.locality == Locality::Required && leg.ranked.is_empty() {
            return Err(none("prefill"));
        }
        let body = (dialect.prefill)(head).ok_or_else(|| none("body"))?;
        let mut request = head.request(RequestBody::joined(body.0, body.1), &leg.request_id);
        // We read the answer ourselves, and as plain text.
        request.headers_mut().remove(header::ACCEPT_ENCODING);
        let limit = Duration::from_millis(self.filter.config.prefill_timeout_ms);
        let begun = std::time::Instant::now();
        let answer = tokio::time::timeout(limit, self.next.run(request, &mut leg)).await;
        context.losses = leg.losses;
        let at = leg.log.upstream_host.clone();
        let failed = |reason, error| Failure {
            error,
            at: at.clone(),
            ..Failure::new("prefill", reason)
        };
        let response = answer
            .map_err(|_| failed("timeout", None))?
            .map_err(|error| failed("failed", Some(Box::new(error))))?;
        if !response.status().is_success() {
            return Err(failed("refused", None));
        }
        let mut loan = Loan::new(
            dialect,
            self.next.keep(),
            head.clone(),
            context,
            response.into_body(),
        );
        let read = tokio::time::timeout(limit, loan.read()).await;
        if let Err(reason) = read.unwrap_or(Err("timeout")) {
            note_end(context, at.as_ref(), reason);
            return Err(failed(reason, None));
        }
        let uncached = context.prompt.tokens.saturating_sub(loan.cached());
        self.filter.pace.learn(uncached, begun.elapsed());
        self.record.prefilled(at, Some(begun.elapsed()));
        context.log.hit_tokens_predicted = leg.log.hit_tokens_predicted;
        Ok(loan)
    }

    /// Has the tokens generated, from the blocks on loan. They can be taken once.
    async fn decode(
        &mut self,
        loan: Loan,
        (decode, place): (Ranked, Place),
        context: &mut Context,
    ) -> Result<Response<ResponseBody>, Failure> {
        let predicted = context.log.hit_tokens_predicted;
        let mut leg = leg(context, Part::Decode, "");
        leg.log = context.log.clone();
        leg.ranked = std::iter::once(decode)
            .chain(context.ranked.iter().cloned())
            .collect();
        leg.place = Some(place);
        let request = loan.decode(&leg.request_id);
        let request = request.map_err(|reason| Failure::new("decode", reason))?;
        let answer = self.next.run(request, &mut leg).await;
        context.losses.clone_from(&leg.losses);
        let at = leg.log.upstream_host.clone();
        let failed = |reason, error| Failure {
            error,
            at: at.clone(),
            ..Failure::new("decode", reason)
        };
        let response = match answer {
            Ok(response) => response,
            Err(error) => {
                // A stale connection may have taken all of it.
                if error.retry == Retry::NothingSent && !error.stale {
                    loan.not_sent();
                }
                return Err(failed("failed", Some(Box::new(error))));
            }
        };
        if !response.status().is_success() {
            return Err(failed("refused", None));
        }
        let limit = Duration::from_secs(pull::PULL_SECONDS_MAX);
        let response = Box::pin(pull::begun(response, limit)).await;
        let response = response.map_err(|reason| {
            note_end(context, at.as_ref(), reason);
            failed(reason, None)
        })?;
        take_over(context, leg, predicted);
        self.record.decoded(at);
        Ok(repair::usage(response, loan.cached()))
    }

    /// All of it at one engine, as if nobody had thought of splitting it.
    async fn whole(
        &self,
        mut request: Box<Request<RequestBody>>,
        context: &mut Context,
        failed: Option<EngineId>,
    ) -> Result<Response<ResponseBody>, Error> {
        let id = context.request_id.clone();
        let avoid = context.avoid.clone();
        context.avoid = failed.or(context.avoid.take());
        if !id.is_empty() {
            // An engine refuses an id that may still run.
            context.request_id = format!("{id}-w").into();
            put_id(request.headers_mut(), &context.request_id);
        }
        let answer = self.next.run(*request, context).await;
        context.request_id = id;
        context.avoid = avoid;
        answer
    }
}

/// Who comes into question.
type Fits<'a> = dyn Fn(&Endpoint) -> bool + 'a;

/// A leg came to nothing after its head. If its engine broke, that may be due to the request.
fn note_end(leg: &mut Context, engine: Option<&EngineId>, reason: &str) {
    if let Some(engine) = engine {
        leg.note_loss(engine.clone(), reason == BROKE);
    }
}

/// The leg that counts is the decode leg; what was predicted is what prefill found.
fn take_over(context: &mut Context, leg: Context, predicted: Option<u64>) {
    // Places in the ranking mean something to who made it.
    let ranked = std::mem::take(&mut context.ranked);
    context.adopt(leg);
    context.ranked = ranked;
    context.log.hit_tokens_predicted = predicted;
}

/// A context for one leg.
fn leg(context: &Context, part: Part, suffix: &str) -> Context {
    let mut leg = context.fork();
    leg.part = part;
    if !suffix.is_empty() && !leg.request_id.is_empty() {
        leg.request_id = format!("{}-{suffix}", context.request_id).into();
    }
    leg
}

/// The ranking for prefill: who is where the tokens will be generated comes first, or alone.
fn near(ranked: &[Ranked], decode: &Ranked, locality: Locality) -> Vec<Ranked> {
    let is_near = |ranked: &&Ranked| ranked.endpoint.locality == decode.endpoint.locality;
    let prefill = ranked
        .iter()
        .filter(|ranked| Part::Prefill.suits(&ranked.endpoint));
    match locality {
        Locality::Any => prefill.cloned().collect(),
        Locality::Required => prefill.filter(is_near).cloned().collect(),
        Locality::Preferred => {
            let (mut near, far): (Vec<_>, Vec<_>) = prefill.partition(is_near);
            near.extend(far);
            near.into_iter().cloned().collect()
        }
    }
}
