//! The `stored_responses` filter: whoever asks for a stored response (`GET /v1/responses/ID`, `DELETE`, `POST …/cancel`), or
//! goes on from one (`previous_response_id`), gets to the engine that holds it.
//!
//! What it answers: which engine that is, from the id alone where the id tells, else by asking one engine after the other.
//! What it does not do: keep anything, or change an answer. Engines hold responses in their own memory: when one is
//! restarted they are gone, and it says so itself.

pub mod owner;

use crate::{
    body::{ReadOutcome, RequestBody, ResponseBody},
    endpoints::{ClusterView, Endpoint, Via},
    error::{Error, Flag, Origin},
    filter::{Context, Handled, HttpFilter, Next},
    openai::{self, Api, OpenAiRequest},
    registry,
    services::Services,
};
use http::{Request, Response, StatusCode};
use serde::Deserialize;
use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

/// Our own type.
pub const TYPE_URL: &str = "type.googleapis.com/outrigger.filters.http.stored_responses.v1.Config";

/// A request for a stored response has hardly any body; a longer one is sent to a single engine.
pub const BODY_BYTES_MAX: usize = 64 << 10;

/// Configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// So many engines are asked for a response whose id does not tell its owner. Default 64.
    pub search_engines_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            search_engines_max: 64,
        }
    }
}

/// The filter.
pub struct StoredResponses {
    services: Services,
    config: Config,
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
    if config.search_engines_max == 0 {
        return Err("search_engines_max: must be at least 1".into());
    }
    Ok(Arc::new(StoredResponses {
        services: services.clone(),
        config,
    }))
}

impl HttpFilter for StoredResponses {
    fn handle<'a>(
        &'a self,
        request: Request<RequestBody>,
        context: &'a mut Context,
        next: Next<'a>,
    ) -> Handled<'a> {
        let Some(openai) = context.openai.clone() else {
            return next.run(request, context);
        };
        if !matches!(openai.api, Api::Responses | Api::StoredResponse) {
            return next.run(request, context);
        }
        context.tells_owner = may_tell(&openai);
        let id = match openai.api {
            Api::StoredResponse => openai::stored_response(request.uri().path()).map(Into::into),
            _ => openai.previous_response_id.clone(),
        };
        let cluster = &context.route.cluster;
        let view = self.services.endpoints.view(cluster);
        let (Some(id), Some(view)) = (id.filter(|id| !id.is_empty()), view) else {
            return next.run(request, context);
        };
        Box::pin(async move {
            match find(&id, &view) {
                Owner::Here(endpoint) if endpoint.is_alive() => {
                    count("owner");
                    context.only = Some(endpoint);
                    next.run(request, context).await
                }
                Owner::Here(_) | Owner::Silent => Err(unavailable(&id)),
                // Marks may be of a fleet under other names: somebody may hold it all the same.
                owner @ (Owner::Gone | Owner::Untold) => {
                    let gone = matches!(owner, Owner::Gone).then_some(&*id);
                    let model = openai.model.as_deref();
                    let candidates = self.candidates(&view, model);
                    search(candidates, gone, request, context, next).await
                }
            }
        })
    }
}

/// Whether a create can be given an id: it was read, and its client chose none.
fn may_tell(openai: &OpenAiRequest) -> bool {
    openai.api == Api::Responses && openai.spans.prompt.is_some() && !openai.names_itself
}

/// Who holds a response.
enum Owner {
    /// This one, which may be dead.
    Here(Arc<Endpoint>),
    /// Somebody that we may not have heard of yet.
    Silent,
    /// Nobody any more.
    Gone,
    /// Its id does not say.
    Untold,
}

fn find(id: &str, view: &ClusterView) -> Owner {
    let Some(told) = owner::told(id) else {
        return Owner::Untold;
    };
    let mut endpoints = view.endpoints.iter();
    match endpoints.find(|endpoint| owner::mark(&endpoint.id) == told) {
        Some(endpoint) => Owner::Here(endpoint.clone()),
        None if view.silent_peer => Owner::Silent,
        None => Owner::Gone,
    }
}

impl StoredResponses {
    /// Whom to ask, the nearest and least busy first.
    fn candidates(&self, view: &ClusterView, model: Option<&str>) -> Vec<Arc<Endpoint>> {
        let mut candidates = view.candidates(model);
        candidates.sort_by_cached_key(|endpoint| {
            (
                endpoint.is_inhibited(),
                endpoint.via != Via::Local,
                endpoint.stats.active.load(Relaxed),
            )
        });
        candidates.truncate(self.config.search_engines_max);
        candidates
    }
}

/// Asks one after the other until one knows the response. If none does, the words of the one that knew most go to the
/// client, or that its owner is `gone`; but if one of them could not answer, nobody can say that it does not exist.
async fn search(
    candidates: Vec<Arc<Endpoint>>,
    gone: Option<&str>,
    mut request: Request<RequestBody>,
    context: &mut Context,
    next: Next<'_>,
) -> Result<Response<ResponseBody>, Error> {
    let read = request.body_mut().read_whole(body_bytes_max(context)).await;
    let whole = read.map_err(|error| Error::of_client_body(&error))?;
    if matches!(whole, ReadOutcome::TooLarge) || candidates.is_empty() {
        return next.run(request, context).await;
    }
    let mut denied: Option<(Response<ResponseBody>, Context)> = None;
    let mut failed = None;
    for (number, endpoint) in candidates.into_iter().enumerate() {
        let mut attempt = context.fork();
        attempt.attempt = context.attempt;
        attempt.log = context.log.clone();
        attempt.only = Some(endpoint);
        attempt.again |= number > 0;
        let response = match next.run(again(&request), &mut attempt).await {
            Ok(response) => response,
            Err(error) => {
                failed = Some((Err(error), attempt));
                continue;
            }
        };
        match Verdict::of(response.status()) {
            Verdict::Found => {
                count("found");
                context.adopt(attempt);
                return Ok(response);
            }
            Verdict::Failed => failed = Some((Ok(response), attempt)),
            // Who refuses what is asked of a response has it, maybe; who has not got it says nothing of it.
            Verdict::Denied if is_known(denied.as_ref()) => {}
            Verdict::Denied => denied = Some((response, attempt)),
        }
    }
    if let Some((outcome, attempt)) = failed {
        count("unanswered");
        context.adopt(attempt);
        return outcome;
    }
    let is_unknown = !is_known(denied.as_ref());
    let (response, attempt) = denied.ok_or_else(Error::no_healthy_upstream)?;
    context.adopt(attempt);
    if let Some(id) = gone.filter(|_| is_unknown) {
        return Err(owner_gone(id));
    }
    count("unknown");
    Ok(response)
}

/// What `openai` has read is whole already.
fn body_bytes_max(context: &Context) -> usize {
    let openai = context.openai.as_ref();
    let read = openai.and_then(|openai| openai.body.as_ref());
    read.map_or(BODY_BYTES_MAX, |body| body.len().max(BODY_BYTES_MAX))
}

/// The request once more; its body was read whole.
fn again(request: &Request<RequestBody>) -> Request<RequestBody> {
    let body = request.body().replay().unwrap_or_else(RequestBody::empty);
    let mut copy = Request::new(body);
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    copy.headers_mut().clone_from(request.headers());
    copy.extensions_mut().clone_from(request.extensions());
    copy
}

/// What the status of one that was asked says.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Found,
    /// It could not tell.
    Failed,
    /// It has not got the response, has no such endpoint, or will not do what is asked.
    Denied,
}

impl Verdict {
    fn of(status: StatusCode) -> Self {
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            return Self::Failed;
        }
        if status.is_client_error() {
            return Self::Denied;
        }
        Self::Found
    }
}

/// Whether it was denied in other words than that it is not there.
fn is_known(denied: Option<&(Response<ResponseBody>, Context)>) -> bool {
    denied.is_some_and(|(response, _)| {
        !matches!(
            response.status(),
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED
        )
    })
}

fn count(outcome: &'static str) {
    metrics::counter!("outrigger_stored_responses_total", "outcome" => outcome).increment(1);
}

/// Its engine is known, and may be back.
fn unavailable(id: &str) -> Error {
    count("owner_unavailable");
    let mut error = Error::new(
        Origin::Upstream,
        Flag::NoHealthyUpstream,
        StatusCode::SERVICE_UNAVAILABLE,
        "response_owner_unavailable",
        format!("The engine that holds response '{id}' cannot be reached now."),
    );
    error.retry_after = Some(Duration::from_secs(1));
    error
}

/// Its engine is no part of the fleet any more, and what it held is lost.
fn owner_gone(id: &str) -> Error {
    count("owner_gone");
    Error::new(
        Origin::Downstream,
        Flag::Unflagged,
        StatusCode::NOT_FOUND,
        "response_owner_gone",
        format!("Response with id '{id}' not found: the engine that held it has left the fleet."),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_ends_a_search() {
        for (status, verdict) in [
            (200, Verdict::Found),
            (202, Verdict::Found),
            (304, Verdict::Found),
            (400, Verdict::Denied),
            (401, Verdict::Denied),
            (404, Verdict::Denied),
            (405, Verdict::Denied),
            (429, Verdict::Failed),
            (500, Verdict::Failed),
            (501, Verdict::Failed),
            (503, Verdict::Failed),
        ] {
            let told = Verdict::of(StatusCode::from_u16(status).unwrap());
            assert_eq!(told, verdict, "{status}");
        }
    }
}
