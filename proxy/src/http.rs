//! The HTTP connection manager: one request from its head to the end of its response.
//!
//! Order: pin the configuration, judge the head, ids and forwarding headers, route, run the chain, wrap the response
//! so that its end writes the access log. Errors become local replies here and nowhere else.

use crate::{
    access_log::{AccessLogs, Captured, Entry},
    chain::{self, NoRoute},
    codec::exchange::Exchange,
    drain::Drain,
    flow::{self, FlowLimits},
    head,
    headers::{self, Seen, Upgrade},
    metrics::HttpStats,
    route,
    snapshot::{BuiltRoute, HttpConfig, Target},
    upstream::headers_within,
};
use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header, request::Parts,
};
use http_body::Body as _;
use hyper::body::Incoming;
use outrigger_filters::{
    body::{RequestBody, ResponseBody},
    error::{Error, Flag, Origin, Retry},
    filter::{Context, End, LogFields, Next, RouteFacts},
    local_reply::{self, Shape},
    router::attempt,
    sse::{Observed, Summary},
};
use outrigger_xds::{report::EngineId, resource::server_header::ServerHeader};
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

/// Serves the feed on an inbound listener.
pub type FeedService =
    Arc<dyn Fn(Request<Incoming>) -> BoxFuture<'static, Response<ResponseBody>> + Send + Sync>;

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
    /// This proxy's id, for loop detection.
    pub node: Arc<str>,
    /// The same as a header.
    pub via: HeaderValue,
    /// Asks connections to end while the process is to be taken for unhealthy.
    pub drain: Drain,
    /// On inbound listeners of proxies that have something to tell.
    pub feed: Option<FeedService>,
}

/// The connection a request came on.
#[derive(Debug)]
pub struct ConnectionInfo {
    /// The client (or peer).
    pub remote: SocketAddr,
    /// Our side.
    pub local: SocketAddr,
    /// Unique in this process.
    pub id: u64,
    /// What the codec knows of the exchange that runs on it.
    pub(crate) exchange: Exchange,
}

impl ConnectionInfo {
    /// Of a connection that has just been accepted.
    #[must_use]
    pub fn new(remote: SocketAddr, local: SocketAddr, id: u64) -> Self {
        Self {
            remote,
            local,
            id,
            exchange: Exchange::default(),
        }
    }
}

impl Manager {
    /// Handles one request.
    pub(crate) async fn handle(
        self: &Arc<Self>,
        request: Request<Incoming>,
        connection: &Arc<ConnectionInfo>,
    ) -> Response<ResponseBody> {
        let config = self.config.load_full();
        if config.inbound
            && request.uri().path().starts_with(FEED_PREFIX)
            && let Some(feed) = &self.feed
        {
            return feed(request).await;
        }
        let (mut parts, body) = request.into_parts();
        let mut record = Record::begin(self, &parts, connection.clone());
        record.unread = !body.is_end_stream();
        count_request(&self.stats, parts.version);
        let mut context = Context {
            debug: parts.headers.contains_key(headers::DEBUG),
            received: Some(record.started),
            attempt: 1,
            ..Context::default()
        };
        let (response, shape, limits) =
            match self.prepare(&mut parts, &mut record, &mut context, &config, connection) {
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
                        record.captured = record.logs.capture(&parts);
                        let response = self.run(route, parts, body, &mut context, shape).await;
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
        let seen = Seen::of(&parts.headers);
        head::check(parts, &seen, config, connection.exchange.begun())?;
        let fields = &mut parts.headers;
        let refused = seen.upgrade && headers::upgrade(fields) == Upgrade::Refused;
        if refused {
            return Err(head::unflagged(StatusCode::FORBIDDEN, "upgrade_failed"));
        }
        if parts.method == Method::CONNECT {
            // Envoy routes it by `connect_matcher` alone, which we have not.
            return Err(NoRoute::error());
        }
        if seen.hop_by_hop {
            headers::strip_hop_by_hop(fields);
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
        } else if !seen.via {
            fields.insert(headers::VIA, self.via.clone());
        } else if !headers::append_via(fields, &self.node) {
            return Err(looped());
        }
        if seen.between_proxies {
            attempt::strip_hop_headers(fields);
        }
        if seen.debug {
            fields.remove(headers::DEBUG);
        }
        self.identify(fields, &seen, record, config);
        let at_edge = config.manager.use_remote_address && !config.inbound;
        if seen.envoy && !config.inbound {
            headers::strip_envoy(fields, at_edge);
        }
        if at_edge {
            headers::append_forwarded_for(fields, &seen, connection.remote.ip());
            headers::external_address(fields, connection.remote.ip());
        }
        if at_edge || !seen.forwarded_proto {
            fields.insert(headers::FORWARDED_PROTO, HeaderValue::from_static("http"));
        }
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
    ) {
        let manager = &config.manager;
        let at_edge = manager.use_remote_address && !config.inbound;
        let keep = manager.preserve_external_request_id || !at_edge;
        let known = (seen.request_id && keep)
            .then(|| fields.get(headers::REQUEST_ID)?.to_str().ok())
            .flatten();
        record.request_id = match known {
            Some(id) => id.into(),
            None if manager.generate_request_id => {
                let id = headers::new_request_id();
                let shared = Arc::from(id.as_str());
                if let Ok(value) = HeaderValue::try_from(id) {
                    fields.insert(headers::REQUEST_ID, value);
                }
                shared
            }
            None => Arc::default(),
        };
        let known = seen
            .traceparent
            .then(|| fields.get(headers::TRACEPARENT)?.to_str().ok())
            .flatten();
        record.trace_id = match known.map(headers::trace_id).filter(|id| !id.is_empty()) {
            Some(id) => id.into(),
            None => {
                let parent = headers::new_traceparent();
                let id = headers::trace_id(&parent).into();
                if let Ok(value) = HeaderValue::try_from(parent) {
                    fields.insert(headers::TRACEPARENT, value);
                }
                id
            }
        };
    }

    async fn run(
        &self,
        route: &BuiltRoute,
        mut parts: Parts,
        body: Incoming,
        context: &mut Context,
        shape: Shape,
    ) -> Result<Response<ResponseBody>, Error> {
        match &route.target {
            Target::Direct {
                filters,
                facts,
                status,
                body: text,
            } => {
                let answer = if filters.is_empty() {
                    context.log.details = chain::DIRECT_RESPONSE.into();
                    Ok(local_reply::direct(*status, text, shape))
                } else {
                    context.route = facts.clone();
                    let request = Request::from_parts(parts, RequestBody::incoming(body));
                    Next::new(filters).run(request, context).await
                };
                if context.log.details == chain::DIRECT_RESPONSE {
                    self.stats.rq_direct_response.increment(1);
                }
                answer
            }
            Target::Chain {
                filters,
                facts,
                prefix_rewrite,
            } => {
                context.route = facts.clone();
                if let Some((from, to)) = prefix_rewrite {
                    head::rewrite(&mut parts, from, to)?;
                }
                let body = RequestBody::incoming(body);
                context.upload = body.upload();
                let request = Request::from_parts(parts, body);
                let idle = facts.idle_timeout.filter(|limit| !limit.is_zero());
                let upload = context.upload.clone();
                let answer = Next::new(filters).run(request, context);
                let late = || Error::stream_idle(false);
                headers_within(idle, upload.as_ref(), late, answer).await?
            }
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
        let mut close = record.unread && context.upload.is_none() || self.drain.is_unhealthy();
        let response = match response {
            Ok(response) => response,
            Err(error) => {
                close |= head::ends_connection(&error) || record.method == Method::CONNECT;
                self.local_reply(&error, shape, &mut log, inbound)
            }
        };
        let (mut parts, mut body) = response.into_parts();
        let seen = Seen::of(&parts.headers);
        if seen.hop_by_hop {
            headers::strip_hop_by_hop(&mut parts.headers);
        }
        match config.manager.server_header {
            ServerHeader::PassThrough => {}
            ServerHeader::AppendIfAbsent if seen.server => {}
            _ => {
                parts.headers.insert(header::SERVER, config.server.clone());
            }
        }
        if close && record.protocol < Version::HTTP_2 {
            parts
                .headers
                .insert(header::CONNECTION, HeaderValue::from_static("close"));
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
        // The entry proxy speaks to the client; a peer must see the break itself.
        let farewell = if inbound {
            outrigger_filters::sse::Farewell::Abort
        } else {
            shape.farewell()
        };
        let observers = std::mem::take(&mut context.observers);
        let on_end = Box::new(move |summary: Summary| record.end(summary));
        let body = flow::limit(body, limits);
        let body = Observed::new(body, &parts.headers, observers, farewell, log, on_end);
        Response::from_parts(parts, http_body_util::BodyExt::boxed_unsync(body))
    }

    fn local_reply(
        &self,
        error: &Error,
        shape: Shape,
        log: &mut LogFields,
        inbound: bool,
    ) -> Response<ResponseBody> {
        if error.flag != Flag::Unflagged {
            log.flags.push(error.flag);
        }
        log.details = error.details.to_string();
        tracing::debug!(%error, "local reply");
        if error.flag == Flag::NoRouteFound {
            self.stats.no_route.increment(1);
        }
        if error.flag == Flag::NoClusterFound {
            self.stats.no_cluster.increment(1);
        }
        let mut response = local_reply::respond(error, shape);
        if inbound {
            let retry = match error.retry {
                Retry::No => None,
                Retry::NothingSent => Some("nothing-sent"),
                Retry::NothingReceived => Some("nothing-received"),
            };
            if let Some(retry) = retry {
                response
                    .headers_mut()
                    .insert(attempt::RETRY_HEADER, HeaderValue::from_static(retry));
            }
        }
        response
    }
}

impl Manager {
    /// Tells log and metrics of a request that never came here: the codec refused it, or it ended within its head.
    pub(crate) fn refused(
        &self,
        connection: &Arc<ConnectionInfo>,
        (code, flag): (u16, Flag),
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
        log.flags.push(flag);
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

/// A request that no route is for: filters that see all may answer it, else nobody does.
async fn unrouted(
    config: &HttpConfig,
    parts: Parts,
    body: Incoming,
    context: &mut Context,
) -> Result<Response<ResponseBody>, Error> {
    if config.unrouted.is_empty() {
        return Err(NoRoute::error());
    }
    let request = Request::from_parts(parts, RequestBody::incoming(body));
    Next::new(&config.unrouted).run(request, context).await
}

/// What the access log needs, kept until the response is over.
struct Record {
    logs: Arc<AccessLogs>,
    stats: Arc<HttpStats>,
    captured: Captured,
    start: SystemTime,
    started: Instant,
    head_sent: Duration,
    method: Method,
    path: String,
    authority: String,
    protocol: Version,
    code: u16,
    bytes_received: u64,
    /// The request had a body that was not all here with its head.
    unread: bool,
    connection: Arc<ConnectionInfo>,
    request_id: Arc<str>,
    trace_id: Arc<str>,
    route: Arc<RouteFacts>,
    ended: bool,
}

impl Record {
    fn begin(manager: &Manager, parts: &Parts, connection: Arc<ConnectionInfo>) -> Self {
        let length = parts
            .headers
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse().ok());
        manager.stats.downstream_rq_active.increment(1.0);
        Self {
            logs: manager.logs.load_full(),
            stats: manager.stats.clone(),
            captured: Captured::default(),
            start: SystemTime::now(),
            started: Instant::now(),
            head_sent: Duration::ZERO,
            method: parts.method.clone(),
            path: parts
                .uri
                .path_and_query()
                .map_or_else(String::new, ToString::to_string),
            authority: route::authority(&parts.uri, &parts.headers).to_owned(),
            protocol: parts.version,
            code: 0,
            bytes_received: length.unwrap_or(0),
            unread: false,
            connection,
            request_id: Arc::default(),
            trace_id: Arc::default(),
            route: Arc::default(),
            ended: false,
        }
    }

    fn end(mut self, mut summary: Summary) {
        self.ended = true;
        if summary.end == End::ClientGone {
            summary
                .log
                .flags
                .push(Flag::DownstreamConnectionTermination);
            if summary.log.details.is_empty() {
                summary.log.details = "downstream_remote_disconnect".into();
            }
        }
        self.close(&summary);
    }

    fn close(&self, summary: &Summary) {
        let duration = self.started.elapsed();
        self.stats.downstream_rq_active.decrement(1.0);
        self.stats.completed(self.code, duration);
        if summary.end == End::ClientGone {
            self.stats.downstream_rq_rx_reset.increment(1);
        }
        if summary.log.flags.contains(&Flag::StreamIdleTimeout) {
            self.stats.downstream_rq_idle_timeout.increment(1);
        }
        if self.logs.is_empty() {
            return;
        }
        let entry = Entry {
            start: self.start,
            duration,
            request_duration: None,
            response_duration: Some(self.head_sent),
            method: &self.method,
            path: &self.path,
            authority: &self.authority,
            protocol: self.protocol,
            code: self.code,
            bytes_received: self.bytes_received,
            bytes_sent: summary.bytes,
            downstream_remote: self.connection.remote,
            downstream_local: self.connection.local,
            connection_id: self.connection.id,
            request_id: &self.request_id,
            trace_id: &self.trace_id,
            route_name: &self.route.name,
            virtual_host: &self.route.virtual_host,
            ttft: summary.first_byte.map(|at| at.duration_since(self.started)),
            itl_p99: summary.gap_p99,
            log: &summary.log,
        };
        self.logs.write(&entry, &self.captured);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // The client went away before there was a response: nothing else will tell of this request.
        if !self.ended {
            self.ended = true;
            let mut log = LogFields::default();
            log.flags.push(Flag::DownstreamConnectionTermination);
            log.details = "downstream_remote_disconnect".into();
            let summary = Summary {
                end: End::ClientGone,
                bytes: 0,
                first_byte: None,
                gap_p99: None,
                log,
            };
            self.close(&summary);
        }
        self.connection.exchange.end();
    }
}
