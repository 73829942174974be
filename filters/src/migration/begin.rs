//! Until a stream's response begins: engines that break meanwhile are done without, unless it is the request that breaks them.
//!
//! It takes no place of streams that move: it is one request, as it was when it came, and those wait already.

use super::{
    resume::{Call, keep_error, turn},
    suspicion::Deaths,
};
use crate::{
    body::ResponseBody,
    error::{Error, Flag, Origin, Retry},
    filter::{Context, Next},
    router::retry::OVERLOADED,
};
use http::{Response, StatusCode};
use std::sync::Arc;

pub(super) type Answer = Result<Response<ResponseBody>, Error>;

/// Whether engines failed before a response began, or none did begin.
pub(super) fn is_in_trouble(call: &Call, context: &Context, answer: &Answer) -> bool {
    !context.losses.is_empty() || is_lost(call, answer)
}

/// What came of the request in the end, given what came of it first; and what still speaks against it.
pub(super) async fn begin(
    call: &Arc<Call>,
    context: &mut Context,
    answer: Answer,
) -> (Answer, Deaths) {
    let mut deaths = Deaths::default();
    let losses = std::mem::take(&mut context.losses);
    deaths.add(&call.policy.services.migration, losses);
    if !is_lost(call, &answer) {
        return (answer, deaths);
    }
    let mut lost = Lost {
        answer,
        deaths,
        refusals: 0,
    };
    // All waits and calls together have one limit.
    let total = context.total_timeout();
    let total = total.map(|total| total.saturating_sub(context.complete_since().elapsed()));
    let limit = call.policy.config.resume_timeout();
    let calls = lost.call_again(call, context);
    let in_time = tokio::time::timeout(total.unwrap_or(limit).min(limit), calls).await;
    if in_time.is_err() && total.is_some_and(|total| total <= limit) {
        lost.answer = Err(Error::upstream_timeout());
    }
    (lost.answer, lost.deaths)
}

/// A request whose response engines failed to begin.
struct Lost {
    /// The last one.
    answer: Answer,
    deaths: Deaths,
    /// Answers among the failures.
    refusals: u32,
}

impl Lost {
    /// Calls the rest of the chain until something begins, or nothing is to be hoped for.
    async fn call_again(&mut self, call: &Arc<Call>, context: &mut Context) {
        let mut calls = 0;
        while is_lost(call, &self.answer) && self.may_run(call).await {
            // It holds a connection and a place. What it says is told if nothing better comes.
            self.answer = match std::mem::replace(&mut self.answer, Err(Error::upstream_timeout()))
            {
                Ok(response) => Ok(keep_error(response).await),
                Err(error) => Err(error),
            };
            tokio::time::sleep(self.deaths.pause()).await;
            let Ok(_turn) = turn(call, &mut self.deaths).await else {
                return;
            };
            calls += 1;
            let (request, mut attempt) = call.first_again(calls, &self.deaths);
            self.answer = Next::new(&call.chain).run(request, &mut attempt).await;
            let losses = attempt.losses.drain(..);
            self.deaths.add(&call.policy.services.migration, losses);
            // Of calls that came to nothing.
            context.observers.clear();
            context.adopt(attempt);
        }
    }

    /// Whether it is called again: in a storm, or once alone. Poison gets its answer here.
    async fn may_run(&mut self, call: &Call) -> bool {
        let deaths = &self.deaths;
        if call.is_poison(deaths).await {
            deaths.convict(&call.policy.services.migration, call.request_id());
            self.answer = Err(poison(deaths.count()));
            return false;
        }
        self.refusals += u32::from(self.answer.is_ok());
        let alone_next = deaths.is_suspect() && !deaths.ran_alone() && self.answer.is_err();
        if self.refusals >= call.policy.config.attempts_max {
            return false;
        }
        // Engines that broke under it may be the first of many.
        let broke = self.answer.is_err() && !deaths.is_empty();
        alone_next || call.in_storm(deaths) || broke && call.may_be_storm(deaths).await
    }
}

/// Whether engines are to blame that nothing began. Moving does not help those that are too busy or too slow.
fn is_lost(call: &Call, answer: &Answer) -> bool {
    match answer {
        Ok(response) => {
            let overloaded = response.headers().contains_key(OVERLOADED);
            !overloaded && matches!(response.status().as_u16(), 500 | 502 | 503)
        }
        // A half may be missing; where nobody is there at all, clients are told at once.
        Err(error) if error.flag == Flag::NoHealthyUpstream => call.has_engine(),
        Err(error) => error.retry != Retry::No && error.is_breakdown(),
    }
}

fn poison(deaths: usize) -> Error {
    Error::new(
        Origin::Downstream,
        Flag::UpstreamRetryLimitExceeded,
        StatusCode::UNPROCESSABLE_ENTITY,
        "poison_request",
        format!(
            "poison: {deaths} engines died of this request before its first token; it is not tried again"
        ),
    )
}
