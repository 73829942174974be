//! Other pairs, where there are only halves: within the limits that `router` has for engines that serve a request whole.

use super::{Failure, Head, Outcome, Split};
use crate::{
    body::ResponseBody,
    breakers::{Held, Kind},
    error::Error,
    filter::Context,
    router::retry::RETRIES_MAX,
};
use http::Response;

impl Split<'_> {
    /// Other pairs, where nobody can serve it whole: as many, and within the same budget, as `router` tries engines.
    pub(super) async fn again(
        &mut self,
        head: &Head,
        mut failure: Failure,
        context: &mut Context,
    ) -> Result<Response<ResponseBody>, Error> {
        let id = context.request_id.clone();
        let avoid = context.avoid.clone();
        let mut pairs = 0;
        let answer = loop {
            pairs += 1;
            context.avoid = failure.at.take().or(context.avoid.take());
            // What it answered holds a connection and a place.
            drop(failure);
            if !id.is_empty() {
                context.request_id = format!("{id}-w{pairs}").into();
            }
            let permit = self.permit(pairs, context);
            failure = match self.legs(head, context).await {
                Ok(response) => break Ok(response),
                Err(failure) => failure,
            };
            drop(permit);
            if !self.is_worth_another(&failure, pairs, context) {
                break Err(failure);
            }
            self.record
                .fall_back(failure.leg, failure.reason, Outcome::Pair.as_str());
        };
        context.request_id = id;
        context.avoid = avoid;
        answer.or_else(|failure| {
            context.response_edited |= failure.answer.is_some();
            failure.told()
        })
    }

    /// The first other pair is free, as the first other engine is with `router`.
    fn permit(&self, pairs: usize, context: &Context) -> Option<Held> {
        let priority = context.route.priority;
        (pairs > 1).then(|| self.view.breakers.hold(priority, Kind::Retry))
    }

    /// Whether, after so many other pairs, one more may do better: an engine broke, or refused, and it took no limit's time.
    fn is_worth_another(&self, failure: &Failure, pairs: usize, context: &Context) -> bool {
        let breaker = self.view.breakers.of(context.route.priority);
        pairs < RETRIES_MAX
            && failure.was_asked()
            && matches!(self.outcome(failure, context), Outcome::Pair)
            && breaker.allows_retry()
    }
}
