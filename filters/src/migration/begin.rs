//! Until a stream's response begins: engines that break meanwhile are done without, unless it is the request that breaks them.
//!
//! It takes no place of streams that move: it is one request, as it was when it came, and those wait already.

use super::{
    resume::{Call, turn},
    suspicion::Deaths,
};
use crate::{
    body::ResponseBody,
    error::{Error, Flag, Origin, Retry},
    filter::{Context, Next},
};
use http::{Response, StatusCode};
use std::{sync::Arc, time::Instant};

type Answer = Result<Response<ResponseBody>, Error>;

/// What came of the request in the end, given what came of it first; and what still speaks against it.
pub(super) async fn begin(
    call: &Arc<Call>,
    context: &mut Context,
    mut answer: Answer,
) -> (Answer, Deaths) {
    let shared = &call.policy.services.migration;
    let config = &call.policy.config;
    let mut deaths = Deaths::default();
    deaths.add(shared, context.deaths.drain(..));
    let begun = Instant::now();
    let (mut calls, mut refusals) = (0, 0);
    while is_lost(call, &answer) {
        if call.is_poison(&deaths) {
            deaths.convict(shared);
            return (Err(poison(deaths.count())), deaths);
        }
        refusals += u32::from(answer.is_ok());
        let storm = call.in_storm(&deaths);
        let alone_next = deaths.is_suspect() && !deaths.ran_alone() && answer.is_err();
        let over = refusals >= config.attempts_max || begun.elapsed() >= config.resume_timeout();
        if over || !storm && !alone_next {
            break;
        }
        tokio::time::sleep(deaths.pause()).await;
        let Ok(turn) = turn(call, &deaths).await else {
            break;
        };
        calls += 1;
        deaths.runs(turn.is_some());
        if turn.is_none() {
            metrics::counter!("outrigger_migration_storm_runs_total").increment(1);
        }
        let (request, mut attempt) = call.first_again(calls, &deaths);
        answer = Next::new(&call.chain).run(request, &mut attempt).await;
        deaths.add(shared, attempt.deaths.drain(..));
        // Of calls that came to nothing.
        context.observers.clear();
        context.adopt(attempt);
    }
    (answer, deaths)
}

/// Whether engines are to blame that nothing began.
fn is_lost(call: &Call, answer: &Answer) -> bool {
    match answer {
        Ok(response) => matches!(response.status().as_u16(), 500 | 502..=504),
        Err(error) if error.origin == Origin::Downstream || error.is_own_overflow() => false,
        // A half may be missing; where nobody is there at all, clients are told at once.
        Err(error) if error.flag == Flag::NoHealthyUpstream => call.has_engine(),
        Err(error) => error.retry != Retry::No,
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
