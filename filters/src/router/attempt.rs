//! One attempt: reserve, send, look at the first stream event, judge.

use super::{
    hit_tokens, host,
    leg::Leg,
    outcome::Outcome,
    report::{self, Audience},
    retry::Rules,
    span, want,
};
use crate::{
    body::{BodyError, RequestBody, ResponseBody},
    endpoints::{ClusterView, Endpoint, Part, Reservation, SendOptions, Via},
    error::{Error, Flag, Retry},
    filter::{AutoHost, Context, PromptFacts, Ranked},
    lease::{LEASE_HEADER, Lease},
    local_reply,
    matching::is_grpc,
    openai,
    services::Services,
    sse,
    stored_responses::owner,
    trace::Step,
};
use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header::Entry};
use http_body::Frame;
use http_body_util::BodyExt;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Names the engine to the proxy beside it, and in responses to the client.
pub const ENDPOINT_HEADER: HeaderName = HeaderName::from_static("x-outrigger-endpoint");
/// Prompt tokens of the request, told to the proxy beside the engine.
pub const PROMPT_TOKENS_HEADER: HeaderName = HeaderName::from_static("x-outrigger-prompt-tokens");
/// Of these, predicted to be cached.
pub const HIT_TOKENS_HEADER: HeaderName = HeaderName::from_static("x-outrigger-hit-tokens");
/// Chain hashes of the prompt's blocks: little-endian u64s in base64 without padding.
pub const BLOCKS_HEADER: HeaderName = HeaderName::from_static("x-outrigger-blocks");
/// On a local reply to a peer: what retrying may do (`nothing-sent`, `nothing-received`).
pub const RETRY_HEADER: HeaderName = HeaderName::from_static("x-outrigger-retry");
/// Milliseconds from request to response headers.
pub const SERVICE_TIME_HEADER: HeaderName =
    HeaderName::from_static("x-envoy-upstream-service-time");
/// The data-parallel rank, in the words of vLLM and SGLang.
pub(crate) const RANK_HEADER: HeaderName = HeaderName::from_static("x-data-parallel-rank");
/// Which attempt this is.
pub(crate) const ATTEMPT_COUNT_HEADER: HeaderName =
    HeaderName::from_static("x-envoy-attempt-count");
/// How long a gRPC server may take, as gRPC says it.
const GRPC_TIMEOUT_HEADER: HeaderName = HeaderName::from_static("grpc-timeout");
/// A number in it has at most eight digits.
const GRPC_TIMEOUT_LARGEST: u64 = 99_999_999;
/// Milliseconds that this attempt may take.
const EXPECTED_TIMEOUT_HEADER: HeaderName =
    HeaderName::from_static("x-envoy-expected-rq-timeout-ms");
const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// Most block hashes told along in a header; the first ones matter most for what is shared.
pub const TOLD_BLOCKS_MAX: usize = 256;

/// What [`Attempt::address`] did to a head, beside what the next attempt overwrites.
#[derive(Default)]
struct Before {
    /// The client named no rank.
    ranked: bool,
    /// Target and fields, where the host is another one for each endpoint.
    head: Option<Box<(Uri, HeaderMap)>>,
}

/// A place, and the name of the lease that others know it by.
type Reserved = (Box<dyn Reservation>, Option<HeaderValue>);

/// A response, and what is to become of it.
struct Answer<'a> {
    response: Response<ResponseBody>,
    /// Who sees load reports.
    audience: Audience,
    /// What is told of it, where the request is traced.
    step: &'a mut Option<Step>,
    /// Its engine had to compute it.
    is_computed: bool,
}

pub(crate) struct Attempt<'a> {
    services: &'a Services,
    view: &'a ClusterView,
    target: &'a Ranked,
    rules: &'a Rules,
    number: usize,
}

impl<'a> Attempt<'a> {
    pub(crate) fn new(
        services: &'a Services,
        view: &'a ClusterView,
        target: &'a Ranked,
        rules: &'a Rules,
        number: usize,
    ) -> Self {
        Self {
            services,
            view,
            target,
            rules,
            number,
        }
    }

    pub(crate) async fn run(
        self,
        request: &mut Request<RequestBody>,
        context: &mut Context,
    ) -> Outcome {
        let endpoint = &self.target.endpoint;
        let mut step = span::begin(context, endpoint, request.headers_mut(), self.number);
        let outcome = self.send(request, context, &mut step).await;
        span::failed(step, &outcome);
        outcome
    }

    async fn send(
        &self,
        request: &mut Request<RequestBody>,
        context: &mut Context,
        step: &mut Option<Step>,
    ) -> Outcome {
        let endpoint = &self.target.endpoint;
        let (mut reservation, lease) = match self.reserve(context) {
            Ok(reserved) => reserved,
            Err(error) => return Outcome::Failed(error),
        };
        let before = self.address(request, context);
        if let Some(lease) = lease {
            request.headers_mut().insert(LEASE_HEADER, lease);
        }
        let is_computed =
            reservation.watches_answers() && openai::is_computed(request.uri().path());
        let audience = Audience::of(request.headers(), context.route.inbound);
        context.log.upstream_host = Some(endpoint.id.clone());
        context.log.hit_tokens_predicted = self.target.hit_tokens;
        let started = Instant::now();
        let sent = self
            .services
            .upstream
            .send(endpoint, request, self.options(context))
            .await;
        if !request.body().is_spent() {
            self.take_back(request, before);
        }
        match sent {
            Ok(mut response) => {
                context.log.upstream_service_time = Some(started.elapsed());
                reservation.status(response.status());
                let peeked = if self.rules.peek && is_live_stream(&response) {
                    // Boxed: its timer would be part of every request's future.
                    Box::pin(self.first_frame(response.body_mut(), context)).await
                } else {
                    Ok(None)
                };
                span::answered(step, &response);
                let answer = Answer {
                    response,
                    audience,
                    step,
                    is_computed,
                };
                self.judge(answer, peeked, reservation, started, context)
            }
            Err(mut error) => {
                if error.flag == Flag::UpstreamRequestTimeout && self.per_try_ended(started) {
                    error.details = "upstream_per_try_timeout".into();
                    error.retry = Retry::NothingReceived;
                }
                Outcome::Failed(self.failed(error, reservation))
            }
        }
    }

    /// The place that was held at this endpoint, or one of its own. A place that was held elsewhere is given up.
    /// With it, the name of the lease that goes with it.
    fn reserve(&self, context: &mut Context) -> Result<Reserved, Error> {
        let endpoint = &self.target.endpoint;
        let held = context.place.take();
        if let Some(place) = held.filter(|place| place.endpoint == endpoint.id) {
            return Ok((place.reservation, place.lease.map(Lease::claim)));
        }
        let want = want(context, self.target);
        let reserved = self
            .services
            .endpoints
            .reserve(self.view, endpoint, &want)?;
        Ok((reserved, None))
    }

    /// Takes off what only this attempt's endpoint was to be told.
    fn take_back(&self, request: &mut Request<RequestBody>, before: Before) {
        if let Some((uri, headers)) = before.head.map(|head| *head) {
            *request.uri_mut() = uri;
            *request.headers_mut() = headers;
            return;
        }
        let headers = request.headers_mut();
        if self.target.endpoint.via == Via::Peer {
            strip_hop_headers(headers);
        }
        if before.ranked {
            headers.remove(RANK_HEADER);
        }
    }

    fn per_try_ended(&self, started: Instant) -> bool {
        let limit = self.rules.per_try_timeout;
        !limit.is_zero() && started.elapsed() >= limit
    }

    fn options(&self, context: &Context) -> SendOptions {
        let headers_timeout = match &context.openai {
            Some(openai) if openai.may_stream_tokens() => openai.limits.headers_timeout,
            _ => None,
        };
        // The whole exchange has one limit, however many attempts it takes.
        let left = context
            .total_timeout()
            .map(|total| total.saturating_sub(context.complete_since().elapsed()));
        let per_try = Some(self.rules.per_try_timeout).filter(|timeout| !timeout.is_zero());
        SendOptions {
            connect_timeout: self.view.connect_timeout,
            headers_timeout: [headers_timeout, left, per_try].into_iter().flatten().min(),
            replace_stale: false,
            upgrade: context.upgrade,
            priority: context.route.priority,
        }
    }

    /// Headers that belong to this attempt alone.
    fn address(&self, request: &mut Request<RequestBody>, context: &Context) -> Before {
        let mut before = Before::default();
        if let Some(openai) = context.openai.as_deref().filter(|_| context.tells_owner) {
            owner::tell(request, openai, &self.target.endpoint);
        }
        let headers = request.headers_mut();
        let generation = context
            .openai
            .as_ref()
            .is_some_and(|openai| openai.is_generation());
        if self.number > 1 && generation {
            // vLLM derives its ids from this one and refuses a second use while the first may still run.
            let id = format!("{}-{}", context.request_id, self.number);
            match HeaderValue::from_str(&id) {
                Ok(value) if !context.request_id.is_empty() => {
                    headers.insert(REQUEST_ID_HEADER, value);
                }
                // It has none of ours; the engine makes one for each attempt.
                _ => {}
            }
        }
        let address = &self.target.endpoint.address;
        if let Some(auto) = context
            .route
            .auto_host_rewrite
            .filter(|_| !address.is_pipe())
        {
            before.head = Some(Box::new((request.uri().clone(), request.headers().clone())));
            rewrite_host(request, &self.target.endpoint.hostname, auto);
        }
        let headers = request.headers_mut();
        if context.route.attempts_to_upstream {
            headers.insert(ATTEMPT_COUNT_HEADER, HeaderValue::from(self.number));
        }
        if let Some(limit) = self.expected_timeout(context) {
            if context.route.max_grpc_timeout.is_some() && is_grpc(headers) {
                // Who may ask for no more time is told so.
                headers.insert(GRPC_TIMEOUT_HEADER, grpc_timeout(limit));
            }
            if context.route.tell_timeout {
                headers.insert(EXPECTED_TIMEOUT_HEADER, HeaderValue::from(limit));
            }
        }
        if let Some(rank) = self.target.rank {
            // A client that names a rank means it; the prediction was then made for that one.
            if let Entry::Vacant(entry) = headers.entry(RANK_HEADER) {
                entry.insert(HeaderValue::from(rank));
                before.ranked = true;
            }
        }
        if self.target.endpoint.via == Via::Peer {
            self.tell_peer(headers, context);
        }
        before
    }

    /// For an upstream that gives up when nobody waits any more.
    fn expected_timeout(&self, context: &Context) -> Option<u64> {
        let left = |total: Duration| match self.number {
            1 => total,
            _ => total.saturating_sub(context.complete_since().elapsed()),
        };
        let total = context.total_timeout().map(left);
        let per_try = Some(self.rules.per_try_timeout).filter(|limit| !limit.is_zero());
        let limit = [per_try, total].into_iter().flatten().min()?;
        let limit = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        Some(limit.max(1))
    }

    fn tell_peer(&self, headers: &mut HeaderMap, context: &Context) {
        if let Some(id) = self.target.endpoint.id_header() {
            headers.insert(ENDPOINT_HEADER, id);
        }
        tell_prompt(headers, &context.prompt, hit_tokens(context, self.target));
    }

    fn failed(&self, error: Error, mut reservation: Box<dyn Reservation>) -> Error {
        let endpoint = &self.target.endpoint;
        reservation.finish(Some(error.flag));
        if !error.stale
            && matches!(
                error.flag,
                Flag::UpstreamConnectionFailure
                    | Flag::UpstreamConnectionTermination
                    | Flag::UpstreamRemoteReset
            )
        {
            endpoint.inhibit();
        }
        error
    }

    fn judge(
        &self,
        answer: Answer<'_>,
        peeked: Result<Option<Frame<Bytes>>, Error>,
        mut reservation: Box<dyn Reservation>,
        started: Instant,
        context: &Context,
    ) -> Outcome {
        let Answer {
            response,
            audience,
            step,
            is_computed,
        } = answer;
        let peeked = match refusal(response.headers()).map_or(peeked, Err) {
            Ok(peeked) => peeked,
            Err(error) => return Outcome::Failed(self.failed(error, reservation)),
        };
        let (mut parts, body) = response.into_parts();
        let unwanted = self.rules.unwanted(parts.status, &parts.headers);
        parts.headers.remove(RETRY_HEADER);
        report::take(&mut parts.headers, &mut *reservation, audience);
        report::tell(&mut parts.headers, &self.target.endpoint, audience);
        self.label(&mut parts.headers, started, context);
        let begun = matches!(&peeked, Some(frame) if frame.is_data());
        let tells_tokens = begun && openai::tells_tokens(context);
        let watches = tells_tokens && reservation.watches_tokens();
        if tells_tokens {
            reservation.first_token(started.elapsed(), self.uncached_tokens(context));
        }
        let is_watched = reservation.watches_answers()
            && parts.status == StatusCode::OK
            && (is_computed || sse::is_event_stream(&parts.headers));
        let leg = Leg::new(
            peeked,
            body,
            self.target.endpoint.clone(),
            reservation,
            audience,
        );
        let leg = if watches { leg.watching() } else { leg };
        let leg = if is_watched { leg.watched() } else { leg };
        let leg = leg.traced(step.take(), !unwanted);
        let response = Box::new(Response::from_parts(parts, leg.boxed_unsync()));
        if unwanted {
            Outcome::Unwanted(response)
        } else {
            Outcome::Response(response)
        }
    }

    /// Prompt tokens that the endpoint had to compute, as far as anybody knows.
    fn uncached_tokens(&self, context: &Context) -> u64 {
        let told = context.prompt.tokens;
        let openai = context.openai.as_ref().filter(|_| told == 0);
        let tokens = openai.map_or(told, |openai| openai.estimated_prompt_tokens());
        // The blocks of a decode leg were computed elsewhere.
        let hits = match context.part {
            Part::Decode => tokens,
            _ => self.target.hit_tokens.unwrap_or(0),
        };
        tokens.saturating_sub(hits)
    }

    /// Waits for the first event of a stream, while another engine can still take over unnoticed.
    async fn first_frame(
        &self,
        body: &mut ResponseBody,
        context: &Context,
    ) -> Result<Option<Frame<Bytes>>, Error> {
        let limit = context
            .openai
            .as_ref()
            .and_then(|openai| openai.limits.first_token_timeout);
        let frame = match limit {
            Some(limit) => tokio::time::timeout(limit, first_event(body))
                .await
                .map_err(|_| Error::upstream_timeout())?,
            None => first_event(body).await,
        };
        let frame = frame.map_err(|error| broke_off(error.flag))?;
        let data = frame.as_ref().and_then(Frame::data_ref);
        if let Some(event) = data.map(|raw| sse::Event { raw })
            && event.is_error()
        {
            metrics::counter!("outrigger_in_band_errors_total", "when" => "first_event")
                .increment(1);
            if event.blames_request() {
                // It is the answer; the engine is well.
                return Ok(frame);
            }
            return Err(Error::upstream_reset(
                Flag::UpstreamRemoteReset,
                "engine reported an error",
                Retry::NothingReceived,
            ));
        }
        Ok(frame)
    }

    /// What the client is told of how it was served.
    fn label(&self, headers: &mut HeaderMap, started: Instant, context: &Context) {
        if context.route.inbound {
            return;
        }
        let mut digits = itoa::Buffer::new();
        let elapsed = digits.format(started.elapsed().as_millis() as u64);
        if let Ok(elapsed) = HeaderValue::from_str(elapsed) {
            headers.insert(SERVICE_TIME_HEADER, elapsed);
        }
        if let Some(id) = self.target.endpoint.id_header() {
            headers.insert(ENDPOINT_HEADER, id);
        }
    }
}

/// An engine broke off behind a head that was good. An orderly end within a body is no HTTP either, but it says no more of
/// the engine than being cut does: that it is gone.
fn broke_off(flag: Flag) -> Error {
    let (flag, reason) = match flag {
        Flag::UpstreamProtocolError => (
            Flag::UpstreamConnectionTermination,
            "connection termination",
        ),
        flag => (flag, "remote reset"),
    };
    Error::upstream_reset(flag, reason, Retry::NothingReceived)
}

/// A stream that has begun well, and whose first event may still say otherwise.
fn is_live_stream(response: &Response<ResponseBody>) -> bool {
    response.status() == StatusCode::OK && sse::is_event_stream(response.headers())
}

/// The first frames of a stream as one, up to where its first event is whole. Almost always that is one frame, as it came.
async fn first_event(body: &mut ResponseBody) -> Result<Option<Frame<Bytes>>, BodyError> {
    let mut seen = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let data = match frame?.into_data() {
            Ok(data) => data,
            // Trailers: the end. A stream that ends within its first event has nothing else to say.
            Err(trailers) if seen.is_empty() => return Ok(Some(trailers)),
            Err(_) => break,
        };
        if seen.is_empty() && sse::event_length(&data).is_some() {
            return Ok(Some(Frame::data(data)));
        }
        seen.extend_from_slice(&data);
        if sse::event_length(&seen).is_some() || seen.len() > sse::EVENT_BYTES_MAX {
            break;
        }
    }
    Ok((!seen.is_empty()).then(|| Frame::data(seen.freeze())))
}

/// Whether the answer is the local reply of the proxy beside the engine, and what may be done about it; its flag is kept.
fn refusal(headers: &HeaderMap) -> Option<Error> {
    let retry = match headers.get(RETRY_HEADER)?.as_bytes() {
        b"nothing-sent" => Retry::NothingSent,
        b"nothing-received" => Retry::NothingReceived,
        _ => return None,
    };
    let told = headers
        .get(local_reply::ERROR_HEADER)
        .and_then(|flag| flag.to_str().ok());
    let (flag, reason) = match told {
        Some("UO") => (Flag::UpstreamOverflow, "overflow"),
        Some("UC") => (
            Flag::UpstreamConnectionTermination,
            "connection termination",
        ),
        Some("UR") => (Flag::UpstreamRemoteReset, "remote reset"),
        Some("UPE") => (Flag::UpstreamProtocolError, "protocol error"),
        Some("UH") => return Some(Error::no_healthy_upstream().retry(retry)),
        _ => (Flag::UpstreamConnectionFailure, "remote connection failure"),
    };
    Some(Error::upstream_reset(flag, reason, retry))
}

/// `auto_host_rewrite`: an endpoint whose address is a number has no name.
fn rewrite_host(request: &mut Request<RequestBody>, name: &str, auto: AutoHost) {
    if name.parse::<std::net::IpAddr>().is_err() {
        host::replace(request, name, auto.append_forwarded, auto.tell_original);
    }
}

/// Tells a peer of the prompt, and how much of it is cached there.
pub(crate) fn tell_prompt(headers: &mut HeaderMap, prompt: &PromptFacts, hit_tokens: Option<u64>) {
    if prompt.tokens == 0 {
        return;
    }
    headers.insert(PROMPT_TOKENS_HEADER, HeaderValue::from(prompt.tokens));
    if let Some(hit_tokens) = hit_tokens {
        headers.insert(HIT_TOKENS_HEADER, HeaderValue::from(hit_tokens));
    }
    let told = &prompt.blocks[..prompt.blocks.len().min(TOLD_BLOCKS_MAX)];
    let bytes: Vec<u8> = told.iter().flat_map(|hash| hash.to_le_bytes()).collect();
    if let Ok(blocks) = HeaderValue::from_str(&STANDARD_NO_PAD.encode(bytes)) {
        headers.insert(BLOCKS_HEADER, blocks);
    }
}

/// Reads what a peer told of the prompt. Garbage counts as untold.
#[must_use]
pub fn told(headers: &HeaderMap) -> PromptFacts {
    let number = |name: &HeaderName| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok()?.parse::<u64>().ok())
    };
    let blocks = headers
        .get(&BLOCKS_HEADER)
        .and_then(|value| STANDARD_NO_PAD.decode(value.as_bytes()).ok());
    let blocks: Vec<u64> = blocks
        .unwrap_or_default()
        .chunks_exact(8)
        .take(TOLD_BLOCKS_MAX)
        .map(|chunk| {
            u64::from_le_bytes(chunk.try_into().expect("invariant: chunks of eight bytes"))
        })
        .collect();
    PromptFacts {
        tokens: number(&PROMPT_TOKENS_HEADER).unwrap_or(0),
        blocks: blocks.into(),
        ids: None,
    }
}

/// Hit tokens that a peer told; `None` if it could not predict any number.
#[must_use]
pub fn told_hits(headers: &HeaderMap) -> Option<u64> {
    headers.get(&HIT_TOKENS_HEADER)?.to_str().ok()?.parse().ok()
}

/// Takes off everything that only proxies may say to each other.
pub fn strip_hop_headers(headers: &mut HeaderMap) {
    for name in [
        &ENDPOINT_HEADER,
        &PROMPT_TOKENS_HEADER,
        &HIT_TOKENS_HEADER,
        &BLOCKS_HEADER,
        &RETRY_HEADER,
        &LEASE_HEADER,
    ] {
        headers.remove(name);
    }
}

/// For tests and the proxy: an endpoint as the target of a single attempt.
#[must_use]
pub fn target(endpoint: Arc<Endpoint>) -> Ranked {
    Ranked {
        endpoint,
        rank: None,
        cost: 0.0,
        hit_tokens: None,
    }
}

/// Milliseconds as gRPC writes them; seconds where they are too many.
fn grpc_timeout(ms: u64) -> HeaderValue {
    let text = if ms <= GRPC_TIMEOUT_LARGEST {
        format!("{ms}m")
    } else {
        format!("{}S", (ms / 1000).min(GRPC_TIMEOUT_LARGEST))
    };
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("1m"))
}
