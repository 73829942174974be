//! The HTTP connection manager: one request from its head to the end of its response.
//!
//! Order: pin the configuration, judge the head, ids and forwarding headers, route, run the chain, wrap the response
//! so that its end writes the access log. Errors become local replies here and nowhere else.

mod forward;
mod record;
mod replies;
mod span;
pub(crate) mod tunnel;

pub(crate) use replies::LocalReplies;

use crate::{
    access_log::AccessLogs,
    chain::{self, NoRoute},
    codec::exchange::Exchange,
    drain::Drain,
    edge,
    flow::{self, FlowLimits},
    head,
    headers::{self, Seen},
    leases::Leases,
    metrics::HttpStats,
    route::{BuiltRoute, Redirector, Target, grpc},
    snapshot::HttpConfig,
    tls::TlsFacts,
    trace,
};
use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header, request::Parts,
};
use http_body::Body as _;
use hyper::upgrade::OnUpgrade;
use outrigger_filters::{
    body::{ClientBody, RequestBody, ResponseBody, empty},
    end_address::EndAddress,
    error::{Error, Flag, Origin},
    filter::{Context, End, LogFields, Next},
    lease,
    local_reply::{self, Shape},
    router::attempt,
    sse::{Observed, Summary},
    trace::TRACEPARENT,
};
use outrigger_xds::{report::EngineId, resource::server_header::ServerHeader};
use record::Record;
use std::{net::SocketAddr, sync::Arc};

/// Serves the feed on an inbound listener.
pub type FeedService =
    Arc<dyn Fn(Request<ClientBody>) -> BoxFuture<'static, Response<ResponseBody>> + Send + Sync>;

/// Paths of the feed.
const FEED_PREFIX: &str = "/outrigger.feed.v1.Feed/";

/// One listener's connection manager, shared by its connections on all workers.
pub struct Manager {
    /// Swapped whole by a push of configuration.
    pub config: ArcSwap<HttpConfig>,
    /// Swapped with it.
    pub logs: ArcSwap<AccessLogs>,
    /// Its metrics.
    pub stats: Arc<HttpStats>,
    /// Whose it is.
    pub owner: Owner,
}

/// What all connection managers of a proxy that serve the same direction share.
#[derive(Clone)]
pub struct Owner {
    /// This proxy's id, for loop detection.
    pub node: Arc<str>,
    /// The same as a header.
    pub via: HeaderValue,
    /// Asks connections to end while the process is to be taken for unhealthy.
    pub drain: Drain,
    /// On inbound listeners of proxies that have something to tell.
    pub feed: Option<FeedService>,
    /// Places held for peers, where there is a feed.
    pub leases: Option<Arc<Leases>>,
}

/// The connection a request came on.
#[derive(Debug)]
pub struct ConnectionInfo {
    /// The client (or peer).
    pub remote: EndAddress,
    /// Its address as each of its requests tells it, if it has one.
    pub(crate) address: Option<HeaderValue>,
    /// Whoever is at the other end of the socket.
    pub direct_remote: EndAddress,
    /// Our side, or where the connection was sent before it was redirected to us.
    pub local: EndAddress,
    /// Whether `local` is the latter.
    pub redirected: bool,
    /// Unique in this process.
    pub id: u64,
    /// If it is TLS.
    pub tls: Option<Arc<TlsFacts>>,
    /// What the codec knows of the exchange that runs on it.
    pub(crate) exchange: Exchange,
    /// What it does after HTTP.
    pub(crate) afterwards: tunnel::Afterwards,
}

impl ConnectionInfo {
    /// Of a connection that has just been accepted.
    #[must_use]
    pub fn new(remote: EndAddress, local: EndAddress, id: u64, tls: Option<Arc<TlsFacts>>) -> Self {
        Self {
            address: remote.ip().map(headers::address),
            direct_remote: remote.clone(),
            remote,
            local,
            redirected: false,
            id,
            tls,
            exchange: Exchange::default(),
            afterwards: tunnel::Afterwards::default(),
        }
    }

    /// Where it was sent before it was redirected to us.
    pub(crate) fn original_dst(&self) -> Option<SocketAddr> {
        match self.local {
            EndAddress::Ip(address) if self.redirected => Some(address),
            _ => None,
        }
    }
}

impl Manager {
    /// Handles one request.
    pub(crate) async fn handle(
        self: &Arc<Self>,
        request: Request<ClientBody>,
        connection: &Arc<ConnectionInfo>,
    ) -> Response<ResponseBody> {
        let config = self.config.load_full();
        if config.inbound
            && request.uri().path().starts_with(FEED_PREFIX)
            && let Some(feed) = &self.owner.feed
        {
            return feed(request).await;
        }
        if config.inbound
            && request.uri().path().starts_with(lease::PREFIX)
            && let Some(leases) = &self.owner.leases
        {
            return leases.answer(&config, &request.into_parts().0);
        }
        let (mut parts, body) = request.into_parts();
        let mut record = Record::begin(self, &parts, connection.clone());
        record.unread = !body.is_end_stream();
        count_request(&self.stats, parts.version);
        let mut context = Context {
            debug: parts.headers.contains_key(headers::DEBUG),
            connection: Some((connection.remote.clone(), connection.local.clone())),
            original_dst: connection.original_dst(),
            received: Some(record.started),
            attempt: 1,
            ..Context::default()
        };
        let prepared = self.prepare(&mut parts, &mut record, &mut context, &config, connection);
        if let (Ok(()), Some(tracer)) = (&prepared, &config.tracer) {
            let node = &self.owner.node;
            span::begin(tracer, &mut parts, &mut record, &mut context, node);
        }
        record.captured = record.logs.capture(&parts);
        if let Some(replies) = &config.local_replies {
            record.replied = replies.capture(&parts);
        }
        let (response, shape, limits) = match prepared {
            Err(error) => {
                // Refused, but still in the form that clients of this route read.
                let openai = config.route(&parts).is_some_and(|route| route.openai);
                (
                    Err(error),
                    Shape::of(&record.path, &parts.headers, openai),
                    FlowLimits::default(),
                )
            }
            Ok(()) => match config.route(&parts) {
                None => {
                    let shape = Shape::of(&record.path, &parts.headers, false);
                    let response = unrouted(&config, parts, body, &mut context).await;
                    (response, shape, FlowLimits::default())
                }
                Some(route) => {
                    let shape = Shape::of(&record.path, &parts.headers, route.openai);
                    let response = self
                        .run(&config, route, (parts, body), &mut context, shape, &record)
                        .await;
                    (response, shape, flow::limits(&config, &context))
                }
            },
        };
        self.finish(response, record, context, shape, limits, &config)
    }

    /// Judges the head and makes it ready to travel.
    fn prepare(
        &self,
        parts: &mut Parts,
        record: &mut Record,
        context: &mut Context,
        config: &HttpConfig,
        connection: &ConnectionInfo,
    ) -> Result<(), Error> {
        connection.exchange.begin();
        edge::underscores(parts, &config.manager.edge)?;
        let seen = Seen::of(&parts.headers);
        head::check(parts, &seen, config)?;
        let fields = &mut parts.headers;
        let asks = seen.upgrade && headers::asks_for_upgrade(fields);
        if edge::target(parts, &config.manager.edge, connection.local.port())? {
            record.retarget(parts);
        }
        if asks {
            record.asked = Some(tunnel::asked(parts, config)?);
            context.upgrade = true;
        }
        let fields = &mut parts.headers;
        if parts.method == Method::CONNECT {
            // Envoy routes it by `connect_matcher` alone, which we have not.
            return Err(NoRoute::error());
        }
        if seen.hop_by_hop {
            headers::strip_hop_by_hop(fields);
        }
        if let Some(asked) = &record.asked {
            tunnel::announce(fields, &asked.protocol);
        }
        if seen.cookies > 1 && parts.version == Version::HTTP_2 {
            headers::join_cookies(fields);
        }
        if seen.expect && headers::expects_continue(fields) {
            // We answer it ourselves, by reading the body.
            fields.remove(header::EXPECT);
        }
        if config.inbound {
            context.named = fields
                .get(attempt::ENDPOINT_HEADER)
                .and_then(|id| Some(EngineId::from(id.to_str().ok()?)));
            context.prompt = attempt::told(fields);
            context.told_hit_tokens = attempt::told_hits(fields);
            if let Some(leases) = self.owner.leases.as_ref().filter(|_| seen.between_proxies) {
                context.place = leases.take(fields);
            }
        } else if !seen.via {
            fields.insert(headers::VIA, self.owner.via.clone());
        } else if !headers::append_via(fields, &self.owner.node) {
            return Err(looped());
        }
        if seen.between_proxies {
            attempt::strip_hop_headers(fields);
        }
        if seen.debug {
            fields.remove(headers::DEBUG);
        }
        let source = forward::Source::of(fields, &seen, config, connection);
        self.identify(fields, &seen, record, config, source.at_edge);
        forward::tell(fields, &seen, source, record, config, connection);
        context.connection = Some((record.remote.clone(), connection.local.clone()));
        context.request_id = record.request_id.clone();
        Ok(())
    }

    /// Request and trace ids: kept, or made.
    fn identify(
        &self,
        fields: &mut HeaderMap,
        seen: &Seen,
        record: &mut Record,
        config: &HttpConfig,
        at_edge: bool,
    ) {
        let manager = &config.manager;
        let keep = manager.preserve_external_request_id || !at_edge;
        let known = (seen.request_id && keep)
            .then(|| fields.get(headers::REQUEST_ID)?.to_str().ok())
            .flatten();
        record.request_id = match known {
            // A stranger has no say in what is traced.
            Some(id)
                if at_edge && let Some(reset) = trace::mark(id, trace::Reason::NotTraceable) =>
            {
                if let Ok(value) = HeaderValue::from_str(&reset) {
                    fields.insert(headers::REQUEST_ID, value);
                }
                reset.into()
            }
            Some(id) => id.into(),
            None if manager.generate_request_id => {
                let id = headers::new_request_id();
                fields.insert(headers::REQUEST_ID, id.value());
                id.as_str().into()
            }
            None => Arc::default(),
        };
        let known = seen.traceparent.then(|| trace::parent(fields)).flatten();
        if let Some((id, parent)) = known {
            record.trace_id = id.into();
            record.parent = parent;
            return;
        }
        let made = headers::new_traceparent(config.tracer.is_some());
        fields.insert(TRACEPARENT, made.value());
        if seen.tracestate {
            // It belongs to what there was instead.
            fields.remove(trace::TRACESTATE);
        }
        record.trace_id = headers::trace_id(made.as_str()).into();
    }

    async fn run(
        &self,
        config: &HttpConfig,
        route: &BuiltRoute,
        (mut parts, body): (Parts, ClientBody),
        context: &mut Context,
        shape: Shape,
        record: &Record,
    ) -> Result<Response<ResponseBody>, Error> {
        match &route.target {
            Target::Direct {
                filters,
                status,
                body: text,
            } => {
                self.answer_here(route, &parts, context, record);
                let mut answer = if filters.is_empty() {
                    Ok(local_reply::direct(*status, text, shape))
                } else {
                    // A filter may answer before; the end of the chain says so itself.
                    context.log.details.clear();
                    let request = Request::from_parts(parts, RequestBody::incoming(body));
                    Next::new(filters).run(request, context).await
                };
                if context.log.details == chain::DIRECT_RESPONSE {
                    self.stats.rq_direct_response.increment(1);
                    let (said, log) = ((shape, text.as_str()), &context.log);
                    answer = answer.map(|made| Self::mapped(made, said, record, log, config));
                }
                if let Ok(response) = &mut answer {
                    context.edit_response(response);
                }
                answer
            }
            Target::Redirect(redirector) => {
                self.answer_here(route, &parts, context, record);
                self.stats.rq_redirect.increment(1);
                let response = redirected(redirector, &parts);
                let said = (shape, "");
                let mut made = Self::mapped(response, said, record, &context.log, config);
                context.edit_response(&mut made);
                Ok(made)
            }
            Target::Chain {
                filters,
                choice,
                rewrite,
                tell_original,
            } => {
                let destination = choice.destination(&parts.headers);
                context.route = grpc::limited(destination, &parts.headers);
                if let Some(edits) = &destination.edits {
                    context.heads = Some(record.edits(edits, &context.route, &parts));
                }
                if let Some(rewrite) = rewrite {
                    rewrite.apply(&mut parts, *tell_original)?;
                }
                let body = RequestBody::incoming(body);
                context.upload = body.upload();
                let request = Request::from_parts(parts, body);
                let patience = flow::Patience::of(context, route.openai);
                let filters = destination.filters.as_ref().unwrap_or(filters);
                let answer = Next::new(filters).run(request, context);
                match patience {
                    // Boxed: it is rare, and its timers would be part of every request's future.
                    Some(patience) => Box::pin(patience.wait(answer)).await,
                    None => answer.await,
                }
            }
        }
    }

    /// A route that needs no cluster.
    fn answer_here(
        &self,
        route: &BuiltRoute,
        parts: &Parts,
        context: &mut Context,
        record: &Record,
    ) {
        context.log.details = chain::DIRECT_RESPONSE.into();
        context.route = route.facts.clone();
        if let Some(edits) = &route.edits {
            context.heads = Some(record.edits(edits, &context.route, parts));
        }
    }

    fn finish(
        &self,
        response: Result<Response<ResponseBody>, Error>,
        mut record: Record,
        mut context: Context,
        shape: Shape,
        limits: FlowLimits,
        config: &HttpConfig,
    ) -> Response<ResponseBody> {
        let inbound = config.inbound;
        let mut log = std::mem::take(&mut context.log);
        // Answered without a look at its body: who reads on would take that for the next request.
        let mut close =
            record.unread && context.upload.is_none() || self.owner.drain.is_unhealthy();
        let response = match response {
            Ok(response) => response,
            Err(error) => {
                close |= head::ends_connection(&error) || record.method == Method::CONNECT;
                let mut response = self.local_reply(error, shape, &record, &mut log, config);
                std::mem::swap(&mut context.log, &mut log);
                context.edit_response(&mut response);
                std::mem::swap(&mut context.log, &mut log);
                response
            }
        };
        let (mut parts, mut body) = response.into_parts();
        let switched = self.switched(&mut parts, &mut record);
        self.head(&mut parts.headers, &record, config, close);
        if let Some((asked, _)) = &switched {
            tunnel::announce(&mut parts.headers, &asked.protocol);
        }
        if record.method == Method::HEAD {
            body = headers::without_body(&mut parts.headers, &body);
        }
        record
            .logs
            .capture_response(&parts.headers, &mut record.captured);
        record.code = if log.flags.contains(&Flag::DownstreamConnectionTermination) {
            0 // Nobody saw it.
        } else {
            parts.status.as_u16()
        };
        record.head_sent = record.started.elapsed();
        record.route = context.route.clone();
        if let Some((_, upstream)) = switched {
            let limits = tunnel::limits(limits.gap, flow::stream_end(&context));
            tunnel::begin(upstream, body, record, log, limits);
            return Response::from_parts(parts, http_body_util::BodyExt::boxed_unsync(empty()));
        }
        // The entry proxy speaks to the client; a peer must see the break itself.
        let farewell = if inbound {
            outrigger_filters::sse::Farewell::Abort
        } else {
            shape.farewell()
        };
        let observers = std::mem::take(&mut context.observers);
        let on_end = Box::new(move |summary: Summary| record.end(summary));
        let body = flow::limit(body, limits, context.given_up.clone());
        let body = Observed::new(body, &parts.headers, observers, farewell, log, on_end);
        Response::from_parts(parts, http_body_util::BodyExt::boxed_unsync(body))
    }

    /// What belongs to our connection, in the head of a response.
    fn head(&self, fields: &mut HeaderMap, record: &Record, config: &HttpConfig, close: bool) {
        let seen = Seen::of(fields);
        if seen.hop_by_hop {
            headers::strip_hop_by_hop(fields);
        }
        if config.manager.edge.always_set_request_id
            && let Ok(id) = HeaderValue::from_str(&record.request_id)
        {
            fields.insert(headers::REQUEST_ID, id);
        }
        match config.manager.server_header {
            ServerHeader::PassThrough => {}
            ServerHeader::AppendIfAbsent if seen.server => {}
            _ => {
                fields.insert(header::SERVER, config.server.clone());
            }
        }
        if close && record.protocol < Version::HTTP_2 {
            fields.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }

    /// The two ends of an upgrade, if the upstream agreed to one that was asked for.
    fn switched(
        &self,
        parts: &mut http::response::Parts,
        record: &mut Record,
    ) -> Option<(tunnel::Asked, OnUpgrade)> {
        if parts.status != StatusCode::SWITCHING_PROTOCOLS {
            return None;
        }
        Some((record.asked.take()?, parts.extensions.remove()?))
    }
}

/// Details of a head that did not come in time.
pub(crate) const HEAD_LATE: &str = "request_header_timeout";

impl Manager {
    /// Tells log and metrics of a request that never came here: the codec refused it, or it ended within its head.
    pub(crate) fn refused(
        &self,
        connection: &Arc<ConnectionInfo>,
        (code, flag): (u16, Option<Flag>),
        details: &'static str,
        bytes: usize,
    ) {
        let (mut parts, ()) = Request::new(()).into_parts();
        parts.method = Method::from_bytes(b"-").expect("invariant: a dash is a token");
        parts.uri = http::Uri::default();
        count_request(&self.stats, Version::HTTP_11);
        let mut record = Record::begin(self, &parts, connection.clone());
        record.path.clear();
        record.code = code;
        record.head_sent = record.started.elapsed();
        let mut log = LogFields {
            details: details.into(),
            ..LogFields::default()
        };
        log.flags.extend(flag);
        if details == HEAD_LATE {
            self.stats.downstream_rq_header_timeout.increment(1);
        }
        record.end(Summary {
            end: End::Complete,
            bytes: bytes as u64,
            first_byte: None,
            gap_p99: None,
            log,
        });
    }
}

fn count_request(stats: &HttpStats, version: Version) {
    stats.downstream_rq_total.increment(1);
    if version == Version::HTTP_2 {
        &stats.downstream_rq_http2_total
    } else {
        &stats.downstream_rq_http1_total
    }
    .increment(1);
}

fn looped() -> Error {
    Error::new(
        Origin::Downstream,
        Flag::NoRouteFound,
        StatusCode::LOOP_DETECTED,
        "loop_detected",
        "the request has been through this proxy before",
    )
}

fn redirected(redirector: &Redirector, parts: &Parts) -> Response<ResponseBody> {
    let mut response = Response::new(empty());
    *response.status_mut() = redirector.status;
    if let Some(location) = redirector.location(parts) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

/// A request that no route is for: filters that see all may answer it, else nobody does.
async fn unrouted(
    config: &HttpConfig,
    parts: Parts,
    body: ClientBody,
    context: &mut Context,
) -> Result<Response<ResponseBody>, Error> {
    if config.unrouted.is_empty() {
        return Err(NoRoute::error());
    }
    let request = Request::from_parts(parts, RequestBody::incoming(body));
    Next::new(&config.unrouted).run(request, context).await
}
