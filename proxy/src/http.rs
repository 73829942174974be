//! The HTTP connection manager: one request from its head to the end of its response.
//!
//! Order: pin the configuration, judge the head, ids and forwarding headers, route, run the chain, wrap the response
//! so that its end writes the access log. Errors become local replies here and nowhere else.

mod record;

use crate::{
    access_log::AccessLogs,
    chain::{self, NoRoute},
    flow::{self, FlowLimits},
    headers::{self, Seen, Upgrade},
    metrics::HttpStats,
    route::{BuiltRoute, Target},
    snapshot::HttpConfig,
    tls::{TlsFacts, server::Server},
};
use arc_swap::{ArcSwap, ArcSwapOption};
use futures_util::future::BoxFuture;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header, request::Parts,
};
use hyper::body::Incoming;
use outrigger_filters::{
    body::{RequestBody, ResponseBody, empty},
    error::{Error, Flag, Origin, Retry},
    filter::{Context, LogFields, Next},
    local_reply::{self, Shape},
    router::attempt,
    sse::{Observed, Summary},
};
use outrigger_xds::report::EngineId;
use record::Record;
use std::{net::SocketAddr, sync::Arc};

/// Serves the feed on an inbound listener.
pub type FeedService =
    Arc<dyn Fn(Request<Incoming>) -> BoxFuture<'static, Response<ResponseBody>> + Send + Sync>;

/// Paths of the feed.
const FEED_PREFIX: &str = "/outrigger.feed.v1.Feed/";
const SERVER: HeaderValue = HeaderValue::from_static("outrigger");

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
    /// On inbound listeners of proxies that have something to tell.
    pub feed: Option<FeedService>,
    /// How its connections begin; none is plain text. Swapped with the configuration.
    pub tls: ArcSwapOption<Server>,
}

/// The connection a request came on.
#[derive(Debug, Clone)]
pub struct ConnectionInfo {
    /// The client (or peer).
    pub remote: SocketAddr,
    /// Our side.
    pub local: SocketAddr,
    /// Unique in this process.
    pub id: u64,
    /// If it is TLS.
    pub tls: Option<Arc<TlsFacts>>,
}

impl Manager {
    /// Handles one request.
    pub(crate) async fn handle(
        self: &Arc<Self>,
        request: Request<Incoming>,
        connection: &ConnectionInfo,
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
                        let response = self
                            .run(route, (parts, body), &mut context, shape, &record)
                            .await;
                        (response, shape, limits(&config, &context))
                    }
                },
            };
        self.finish(response, record, context, shape, limits, config.inbound)
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
        check_head(parts, &seen, config)?;
        let fields = &mut parts.headers;
        let refused = seen.upgrade && headers::upgrade(fields) == Upgrade::Refused;
        if refused || parts.method == Method::CONNECT {
            return Err(client_error(
                StatusCode::FORBIDDEN,
                "upgrade_failed",
                "this proxy does not upgrade connections",
            ));
        }
        if seen.hop_by_hop {
            headers::strip_hop_by_hop(fields);
        }
        if seen.expect {
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
        if seen.client_cert {
            // SANITIZE: whoever sends it claims to speak for somebody else's certificate.
            fields.remove(headers::FORWARDED_CLIENT_CERT);
        }
        self.identify(fields, &seen, record, config);
        if config.manager.use_remote_address && !config.inbound {
            headers::append_forwarded_for(fields, &seen, connection.remote.ip());
        }
        if !seen.forwarded_proto {
            let scheme = if connection.tls.is_some() {
                "https"
            } else {
                "http"
            };
            fields.insert(headers::FORWARDED_PROTO, HeaderValue::from_static(scheme));
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
        (mut parts, body): (Parts, Incoming),
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
                }
                if let Ok(response) = &mut answer {
                    context.edit_response(response);
                }
                answer
            }
            Target::Redirect(redirector) => {
                self.answer_here(route, &parts, context, record);
                self.stats.rq_redirect.increment(1);
                let mut response = Response::new(empty());
                *response.status_mut() = redirector.status;
                if let Some(location) = redirector.location(&parts) {
                    response.headers_mut().insert(header::LOCATION, location);
                }
                context.edit_response(&mut response);
                Ok(response)
            }
            Target::Chain {
                filters,
                choice,
                rewrite,
                tell_original,
            } => {
                let destination = choice.destination(&parts.headers);
                context.route = destination.cluster.facts(&parts.headers);
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
                let answer = Next::new(filters).run(request, context);
                match patience {
                    Some(patience) => patience.wait(answer).await,
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
        inbound: bool,
    ) -> Response<ResponseBody> {
        let mut log = std::mem::take(&mut context.log);
        let response = match response {
            Ok(response) => response,
            Err(error) => {
                let mut response = self.local_reply(&error, shape, &mut log, inbound);
                std::mem::swap(&mut context.log, &mut log);
                context.edit_response(&mut response);
                std::mem::swap(&mut context.log, &mut log);
                response
            }
        };
        let (mut parts, body) = response.into_parts();
        let seen = Seen::of(&parts.headers);
        if seen.hop_by_hop {
            headers::strip_hop_by_hop(&mut parts.headers);
        }
        if !seen.server {
            parts.headers.insert(header::SERVER, SERVER);
        }
        record
            .logs
            .capture_response(&parts.headers, &mut record.captured);
        record.code = parts.status.as_u16();
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
        log.flags.push(error.flag);
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

fn count_request(stats: &HttpStats, version: Version) {
    stats.downstream_rq_total.increment(1);
    if version == Version::HTTP_2 {
        &stats.downstream_rq_http2_total
    } else {
        &stats.downstream_rq_http1_total
    }
    .increment(1);
}

fn check_head(parts: &Parts, seen: &Seen, config: &HttpConfig) -> Result<(), Error> {
    if parts.version < Version::HTTP_11 {
        return Err(client_error(
            StatusCode::UPGRADE_REQUIRED,
            "low_version",
            "Upgrade Required",
        ));
    }
    if parts.version == Version::HTTP_11 && seen.hosts == 0 && parts.uri.authority().is_none() {
        return Err(client_error(
            StatusCode::BAD_REQUEST,
            "missing_host_header",
            "Bad Request",
        ));
    }
    if seen.hosts > 1 {
        return Err(client_error(
            StatusCode::BAD_REQUEST,
            "http1.multiple_hosts",
            "Bad Request",
        ));
    }
    // Only what we decode ourselves may frame a message; anything else could end elsewhere for the next reader.
    let codings = || parts.headers.get_all(header::TRANSFER_ENCODING).iter();
    if seen.transfer_encoding
        && (codings().count() > 1
            || codings().any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"chunked")))
    {
        return Err(client_error(
            StatusCode::BAD_REQUEST,
            "http1.invalid_transfer_encoding",
            "Bad Request",
        ));
    }
    if seen.bytes > config.manager.max_request_headers_kb as usize * 1024 {
        return Err(client_error(
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            "http1.headers_too_large",
            "request headers too large",
        ));
    }
    Ok(())
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

fn client_error(status: StatusCode, details: &'static str, message: &'static str) -> Error {
    Error::new(
        Origin::Downstream,
        Flag::DownstreamProtocolError,
        status,
        details,
        message,
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

/// Limits of the response body: `openai`'s where it parsed a generation, else the connection manager's.
fn limits(config: &HttpConfig, context: &Context) -> FlowLimits {
    let gap = match &context.openai {
        Some(openai) if openai.is_generation() => openai.limits.inter_token_timeout,
        _ => {
            let listeners = config.manager.stream_idle_timeout;
            Some(context.route.idle_timeout.unwrap_or(listeners)).filter(|gap| !gap.is_zero())
        }
    };
    let total = context.total_timeout();
    let complete = total.map(|total| context.complete_since() + total);
    let stream = flow::stream_end(context);
    FlowLimits {
        gap,
        until: complete.into_iter().chain(stream).min(),
    }
}
