//! The span of a request at this proxy, in Envoy's tags, and what goes upstream of it.

use super::record::Record;
use crate::{
    headers,
    trace::{self, Reason, Tracer, mark},
};
use http::{HeaderMap, HeaderValue, header, request::Parts};
use outrigger_filters::{
    end_address::EndAddress,
    filter::Context,
    sse::Summary,
    trace::{Step, TRACEPARENT, Trace, new_span_id, protocol, traceparent},
};
use outrigger_xds::{
    otlp::{Kind, Span},
    resource::listener::TrafficDirection,
};
use std::{borrow::Cow, sync::Arc};

const DOWNSTREAM_CLUSTER: &str = "x-envoy-downstream-service-cluster";

/// Begins it, if the request is traced: because the one that sent it traces it, or else as the connection manager says.
pub(super) fn begin(
    tracer: &Tracer,
    parts: &mut Parts,
    record: &mut Record,
    context: &mut Context,
    node: &Arc<str>,
) {
    let told = record.parent;
    let traced = match told {
        Some(parent) => parent.sampled,
        None => decide(tracer, parts, record, context),
    };
    let id = u128::from_str_radix(&record.trace_id, 16);
    let (true, Ok(id)) = (traced, id) else {
        return;
    };
    let trace = Arc::new(Trace {
        id: id.to_be_bytes(),
        server: new_span_id(),
        state: trace::state(&mut parts.headers).as_str().into(),
        tags: tracer.tags(&parts.headers),
        per_attempt: tracer.per_attempt,
        sink: tracer.sink(),
    });
    let upstream = traceparent(&trace.id, &trace.server);
    parts.headers.insert(TRACEPARENT, upstream);
    let span = Span {
        trace_id: trace.id,
        id: trace.server,
        parent: told.map(|parent| parent.span),
        state: trace.state.clone(),
        name: name(tracer, record),
        kind: kind(tracer),
        start: record.start,
        end: record.start,
        attributes: Vec::new(),
        failed: false,
    };
    let mut step = Step::of(span, &trace);
    tell_request(&mut step, &parts.headers, record, tracer.path_bytes_max);
    step.tell("node_id", node.clone());
    record.step = Some(step);
    context.trace = Some(trace);
}

/// Whether we trace it, which its id then tells.
fn decide(tracer: &Tracer, parts: &mut Parts, record: &mut Record, context: &mut Context) -> bool {
    let reason = tracer.decide(&parts.headers, &record.request_id);
    if let Some(marked) = mark(&record.request_id, reason)
        && let Ok(value) = HeaderValue::from_str(&marked)
    {
        parts.headers.insert(headers::REQUEST_ID, value);
        record.request_id = marked.into();
        context.request_id = record.request_id.clone();
    }
    reason != Reason::NotTraceable
}

fn text<'a>(fields: &'a HeaderMap, name: &str) -> Option<&'a str> {
    fields.get(name)?.to_str().ok()
}

fn name(tracer: &Tracer, record: &Record) -> Cow<'static, str> {
    match tracer.direction {
        TrafficDirection::Inbound => "ingress".into(),
        TrafficDirection::Outbound => format!("egress {}", record.authority).into(),
    }
}

/// As in Envoy: without spans of attempts this one stands for them, too.
fn kind(tracer: &Tracer) -> Kind {
    match tracer.direction {
        TrafficDirection::Outbound if !tracer.per_attempt => Kind::Client,
        _ => Kind::Server,
    }
}

fn tell_request(step: &mut Step, fields: &HeaderMap, record: &Record, path_bytes_max: usize) {
    let or_dash = |name| text(fields, name).unwrap_or("-").to_owned();
    step.tell("component", "proxy");
    step.tell("guid:x-request-id", record.request_id.clone());
    let scheme = text(fields, headers::FORWARDED_PROTO.as_str()).unwrap_or("http");
    let (host, path) = (&record.authority, cut(&record.path, path_bytes_max));
    step.tell("http.url", format!("{scheme}://{host}{path}"));
    step.tell("http.method", record.method.as_str().to_owned());
    step.tell("downstream_cluster", or_dash(DOWNSTREAM_CLUSTER));
    step.tell("user_agent", or_dash(header::USER_AGENT.as_str()));
    step.tell("http.protocol", protocol(record.protocol));
    let peer = match &record.connection.direct_remote {
        EndAddress::Ip(address) => address.ip().to_canonical().to_string(),
        EndAddress::Pipe(path) => path.to_string(),
    };
    step.tell("peer.address", peer);
    let asked = text(fields, trace::CLIENT_TRACE_ID.as_str()).map(ToOwned::to_owned);
    step.tell_some("guid:x-client-trace-id", asked);
}

/// The beginning of a text, in whole characters.
fn cut(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

/// Tells what became of the request, and that it is over.
pub(super) fn end(mut step: Step, record: &Record, summary: &Summary) {
    let log = &summary.log;
    step.tell("request_size", record.bytes_received.to_string());
    step.tell("response_size", summary.bytes.to_string());
    if !log.upstream_cluster.is_empty() {
        step.tell("upstream_cluster", log.upstream_cluster.clone());
        step.tell("upstream_cluster.name", log.upstream_cluster.clone());
    }
    step.answered(record.code, &log.flags);
    if let Some(host) = &log.upstream_host {
        step.tell("outrigger.endpoint", host.0.clone());
    }
    let Some(model) = &log.model else {
        return;
    };
    step.tell("gen_ai.request.model", model.clone());
    step.tell_some("gen_ai.usage.input_tokens", log.prompt_tokens);
    step.tell_some("gen_ai.usage.output_tokens", log.completion_tokens);
    step.tell_some("outrigger.hit_tokens.predicted", log.hit_tokens_predicted);
    step.tell_some("outrigger.hit_tokens.confirmed", log.hit_tokens_confirmed);
    if log.migrations > 0 {
        step.tell("outrigger.migrations", u64::from(log.migrations));
    }
    let first = summary.first_byte;
    let ttft = first.map(|at| at.duration_since(record.started).as_secs_f64());
    step.tell_some("gen_ai.response.time_to_first_chunk", ttft);
}
