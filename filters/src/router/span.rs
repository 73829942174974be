//! The span of one attempt, in Envoy's tags.

use super::outcome::Outcome;
use crate::{
    endpoints::{Endpoint, Part},
    error::Error,
    filter::Context,
    trace::{Step, TRACEPARENT, protocol},
};
use http::{HeaderMap, Response};
use outrigger_xds::otlp::Kind;

/// Begins it, and tells the upstream. `None` if attempts of this request have none.
pub(super) fn begin(
    context: &Context,
    endpoint: &Endpoint,
    headers: &mut HeaderMap,
    number: usize,
) -> Option<Step> {
    let trace = context.trace.as_ref().filter(|trace| trace.per_attempt)?;
    let cluster = &context.route.cluster;
    let mut step = trace.child(format!("router {cluster} egress"), Kind::Client);
    let address = endpoint.address.to_string();
    step.tell("component", "proxy");
    step.tell("upstream_cluster", cluster.clone());
    step.tell("upstream_cluster.name", cluster.clone());
    step.tell("upstream_address", address.clone());
    step.tell("peer.address", address);
    if number > 1 {
        step.tell("retry.count", (number - 1).to_string());
    }
    step.tell("outrigger.endpoint", endpoint.id.0.clone());
    match context.part {
        Part::Prefill => step.tell("outrigger.part", "prefill"),
        Part::Decode => step.tell("outrigger.part", "decode"),
        Part::Any | Part::Whole => {}
    }
    if context.again {
        step.tell("outrigger.resumed", "true");
    }
    step.asks();
    headers.insert(TRACEPARENT, step.traceparent());
    Some(step)
}

/// A response has begun.
pub(super) fn answered<B>(step: &mut Option<Step>, response: &Response<B>) {
    if let Some(step) = step {
        step.tell("http.protocol", protocol(response.version()));
        step.answered(response.status().as_u16(), &[]);
    }
}

/// The attempt is over without one.
pub(super) fn failed(step: Option<Step>, outcome: &Outcome) {
    if let (Some(mut step), Outcome::Failed(error)) = (step, outcome) {
        tell_failure(&mut step, error);
    }
}

fn tell_failure(step: &mut Step, error: &Error) {
    step.answered(0, &[error.flag]);
    step.tell("outrigger.details", error.details.to_string());
}
