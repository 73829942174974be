//! SGLang's words for the two legs: the same request to both at once, and a room at the engine for prefill to meet in.
//!
//! What the fields are is read from SGLang 0.5.23, nothing of two servers was recorded. Nobody checks for which prompt a room was
//! opened, so each is named by chance and used by one pair. An engine waits minutes for a leg that is lost, and is not
//! told: whichever fails first, the other one's connection is closed at once, which ends it.

use super::{
    BROKE, Failure, Head, Locality, Split, head::Pieces, leg, loan, near, none, note_end, pull,
    rule::is_there, take_over,
};
use crate::{
    body::{BodyError, RequestBody, ResponseBody},
    endpoints::{ClusterView, Endpoint, Part, Place, Via},
    filter::{Context, Kept, Loss, Next, Ranked},
    router::attempt::RANK_HEADER,
    services::is_loopback,
    sse::{self, EVENT_BYTES_MAX, Event},
};
use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, future::BoxFuture};
use http::{Request, Response, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full};
use outrigger_xds::report::EngineId;
use rand::Rng;
use serde::Deserialize;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context as Task, Poll},
    time::{Duration, Instant},
};

/// After the prefill leg's end a stream that has no token for so long is given up.
pub(super) const FIRST_TOKEN_SECONDS_MAX: u64 = 30;

/// Where two legs meet.
#[derive(Debug, PartialEq, Eq)]
struct Room {
    host: String,
    port: u16,
    number: u64,
}

impl Room {
    /// At the engine for prefill, as the one that decodes reaches it.
    fn between(prefill: &Ranked, decode: &Endpoint, own: Option<&str>) -> Option<Self> {
        let live = prefill.endpoint.live.load();
        let (host, port) = address(&live.state.bootstrap, &prefill.endpoint, decode, own)?;
        let host = host.to_owned();
        // 62 bits: the engines' numbers have a sign, and the rank must not carry it there.
        let number = rand::rng().random::<u64>() >> 2;
        let ranks = u64::from(live.state.dp_size.max(1));
        // An engine finds the rank of a room by its number.
        let number = match prefill.rank {
            Some(rank) => number - number % ranks + u64::from(rank) % ranks,
            None => number,
        };
        Some(Self { host, port, number })
    }

    /// The body of both legs.
    fn body(&self, head: &Head) -> Option<Pieces> {
        let host = serde_json::to_string(&self.host).ok()?;
        let members = format!(
            "\"bootstrap_host\":{host},\"bootstrap_port\":{},\"bootstrap_room\":{}",
            self.port, self.number
        );
        head.extended(&[&members])
    }
}

/// Where `decode` reaches the place that `prefill` told; `own` is where others reach this proxy.
fn address<'a>(
    told: &'a str,
    prefill: &'a Endpoint,
    decode: &Endpoint,
    own: Option<&'a str>,
) -> Option<(&'a str, u16)> {
    let (host, port) = told.rsplit_once(':')?;
    let port = port.parse().ok()?;
    let host = host.trim_matches(['[', ']']);
    let elsewhere = decode.via == Via::Peer && !is_loopback(&decode.address.host);
    // A loopback address is that of the machine, or pod, that the engine's proxy is reached at.
    let host = match (is_loopback(host), prefill.via == Via::Peer) {
        (true, true) => &prefill.address.host,
        (true, false) if elsewhere => own?,
        _ => host,
    };
    let unreachable = host.is_empty() || is_loopback(host) && elsewhere;
    (!unreachable).then_some((host, port))
}

/// The prefill leg: it ends when all of its answer was read, which nobody wants. With it, the engines that failed.
type Prefill = BoxFuture<'static, (Result<(), Failure>, Vec<Loss>)>;

/// Has the prompt computed and, at the same time, its tokens waited for.
pub(super) async fn together(
    split: &mut Split<'_>,
    head: &Head,
    (decode, place): (Ranked, Place),
    context: &mut Context,
) -> Result<Response<ResponseBody>, Failure> {
    let prefill = partner(split, &decode, context)?;
    let own = split.filter.services.own_host.as_deref();
    let room = Room::between(&prefill, &decode.endpoint, own);
    let room = room.ok_or_else(|| Failure::new("prefill", "no_bootstrap"))?;
    let body = room.body(head).ok_or_else(|| none("body"))?;
    let (at, hits) = (prefill.endpoint.id.clone(), prefill.hit_tokens);
    let first = alone(context, Part::Prefill, "p", prefill);
    let request = leg_request(head, &body, &first);
    let mut legs = Legs {
        prefill: Some(drained(split.next.keep(), request, first)),
        at: [at.clone(), decode.endpoint.id.clone()],
        limit: Duration::from_millis(split.filter.config.prefill_timeout_ms),
        took: None,
        losses: Vec::new(),
    };
    let mut second = alone(context, Part::Decode, "", decode);
    second.log = context.log.clone();
    second.place = Some(place);
    let request = leg_request(head, &body, &second);
    let before = context.losses.len();
    let answer = legs.meet(split.next, request, &mut second).await;
    if answer.is_err() {
        legs.look_back();
    }
    let of_prefill = std::mem::take(&mut legs.losses).into_iter().skip(before);
    second.losses.extend(of_prefill);
    if answer.is_err() && !second.losses[before..].iter().any(|loss| loss.died) {
        // Either may be why, also if it is found dead only later: then it is no other's death.
        for engine in legs.at {
            second.note_loss(engine, false);
        }
    }
    context.losses.clone_from(&second.losses);
    let response = answer?;
    if let Some(took) = legs.took {
        let uncached = context.prompt.tokens.saturating_sub(hits.unwrap_or(0));
        split.filter.pace.learn(uncached, took);
    }
    split.record.prefilled(Some(at), legs.took);
    split.record.decoded(second.log.upstream_host.clone());
    take_over(context, second, hits);
    Ok(accompanied(response, legs.prefill))
}

/// The engine for prefill that goes with `decode`; of several, versions are rather not mixed.
fn partner(split: &Split<'_>, decode: &Ranked, context: &Context) -> Result<Ranked, Failure> {
    let version = |endpoint: &Endpoint| endpoint.live.load().state.version.clone();
    let theirs = version(&decode.endpoint);
    let locality = split.filter.config.locality;
    let mut ranked = near(&context.ranked, decode, locality);
    // Another engine for decode may have what this one lacks.
    let lonely = |reason| Failure {
        at: Some(decode.endpoint.id.clone()),
        ..Failure::new("prefill", reason)
    };
    if locality == Locality::Required && ranked.is_empty() {
        return Err(lonely("none"));
    }
    ranked.sort_by_key(|ranked| version(&ranked.endpoint) != theirs);
    let own = split.filter.services.own_host.as_deref();
    let pairs = |prefill: &Endpoint| apart(prefill, &decode.endpoint, own).is_none();
    let chosen = split.choose(Part::Prefill, &ranked, context, &pairs);
    chosen.ok_or_else(|| lonely(why_alone(split.view, &decode.endpoint, own, context)))
}

/// Why nobody of the fleet pairs with `decode`.
fn why_alone(
    view: &ClusterView,
    decode: &Endpoint,
    own: Option<&str>,
    context: &Context,
) -> &'static str {
    let there = halves_for_prefill(view, context);
    let why = there.filter_map(|prefill| apart(prefill, decode, own));
    // One that would fit, if only it were reached, says more than one that does not fit.
    why.max_by_key(|why| *why == UNREACHABLE).unwrap_or("none")
}

/// Whether somebody of the fleet pairs with `decode` for this request's model.
pub(super) fn has_partner(
    view: &ClusterView,
    decode: &Endpoint,
    own: Option<&str>,
    context: &Context,
) -> bool {
    let mut there = halves_for_prefill(view, context);
    there.any(|prefill| apart(prefill, decode, own).is_none())
}

fn halves_for_prefill<'a>(
    view: &'a ClusterView,
    context: &'a Context,
) -> impl Iterator<Item = &'a Endpoint> {
    let openai = context.openai.as_deref();
    let model = openai.and_then(|openai| openai.model.as_deref());
    let there = view.endpoints.iter().map(|endpoint| &**endpoint);
    there.filter(move |endpoint| is_there(endpoint, Part::Prefill, model))
}

const UNREACHABLE: &str = "no_bootstrap";

/// Why these two are no pair: pages have to be of one size, and one has to reach the other.
fn apart(prefill: &Endpoint, decode: &Endpoint, own: Option<&str>) -> Option<&'static str> {
    let ours = prefill.live.load();
    if ours.state.block_tokens != decode.live.load().state.block_tokens {
        return Some("page_size");
    }
    let address = address(&ours.state.bootstrap, prefill, decode, own);
    address.is_none().then_some(UNREACHABLE)
}

/// A leg that goes to this engine or nowhere.
fn alone(context: &Context, part: Part, suffix: &str, target: Ranked) -> Context {
    let mut leg = leg(context, part, suffix);
    leg.only = Some(target.endpoint.clone());
    leg.ranked = vec![target];
    leg
}

fn leg_request(head: &Head, body: &Pieces, leg: &Context) -> Request<RequestBody> {
    // Whoever had it may have been in the room: a second time there would be nobody left to meet.
    let body = loan::once(body.clone(), Arc::default());
    let mut request = head.request(body, &leg.request_id);
    let headers = request.headers_mut();
    // A client's rank cannot be meant for both.
    headers.remove(RANK_HEADER);
    if leg.part == Part::Prefill {
        headers.remove(header::ACCEPT_ENCODING);
    }
    request
}

fn drained(chain: Kept, request: Request<RequestBody>, mut leg: Context) -> Prefill {
    Box::pin(async move {
        let answer = chain.next().run(request, &mut leg).await;
        let at = leg.log.upstream_host.clone();
        let failed = |reason, error, answer| Failure {
            error,
            at: at.clone(),
            answer,
            ..Failure::new("prefill", reason)
        };
        let outcome = match answer {
            Err(error) => Err(failed("failed", Some(Box::new(error)), None)),
            Ok(response) if !response.status().is_success() => {
                Err(failed("refused", None, Some(Box::new(response))))
            }
            Ok(response) => drain(response).await.map_err(|end| {
                // Else it may mean the other one.
                if let Some(engine) = at.clone().filter(|_| matches!(end, End::Broke)) {
                    leg.note_loss(engine, true);
                }
                failed(BROKE, None, end.answer())
            }),
        };
        (outcome, leg.losses)
    })
}

/// Reads an answer to its end. In a stream an engine tells in an event that it failed; what it then says against the
/// request comes back as the answer that it would have been without a stream.
async fn drain(response: Response<ResponseBody>) -> Result<(), End> {
    let headers = response.headers();
    let mut reads =
        sse::is_event_stream(headers) && !headers.contains_key(header::CONTENT_ENCODING);
    let mut body = response.into_body();
    let mut seen = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| End::Broke)?;
        if !reads {
            continue;
        }
        seen.extend_from_slice(&frame.into_data().unwrap_or_default());
        while let Some(length) = sse::event_length(&seen) {
            fine(&Event {
                raw: &seen.split_to(length),
            })?;
        }
        reads = seen.len() <= EVENT_BYTES_MAX;
    }
    Ok(())
}

/// Whether nothing in an event says that the leg came to nothing.
fn fine(event: &Event<'_>) -> Result<(), End> {
    if event.is_error() {
        let code = event.error_code().filter(|_| event.blames_request());
        let answer = code.and_then(|code| refusal(code, event.data()));
        return Err(End::Said(answer));
    }
    let chunk: Chunk = serde_json::from_slice(event.data()).unwrap_or_default();
    let is_aborted = |choice: &Choice| choice.finish_reason.as_deref() == Some("abort");
    match chunk.choices.iter().any(is_aborted) {
        true => Err(End::Said(None)),
        false => Ok(()),
    }
}

#[derive(Deserialize, Default)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    finish_reason: Option<String>,
}

/// Why a leg came to nothing after its head.
enum End {
    /// The engine broke.
    Broke,
    /// It said so, and perhaps why.
    Said(Refusal),
}

impl End {
    fn answer(self) -> Refusal {
        match self {
            Self::Broke => None,
            Self::Said(answer) => answer,
        }
    }
}

/// What an engine said against the request, if that is why a leg came to nothing.
type Refusal = Option<Box<Response<ResponseBody>>>;

fn refusal(code: u16, body: &[u8]) -> Refusal {
    let body = Full::new(Bytes::copy_from_slice(body));
    let response = Response::builder()
        .status(code)
        .header(header::CONTENT_TYPE, "application/json");
    let body = body.map_err(|never| match never {}).boxed_unsync();
    response.body(body).ok().map(Box::new)
}

/// Both legs while they run. Dropping it ends them.
struct Legs {
    /// As long as it runs.
    prefill: Option<Prefill>,
    /// The engines, for prefill and for decode.
    at: [EngineId; 2],
    /// For the prefill leg.
    limit: Duration,
    /// What the prefill leg took, once it ended well.
    took: Option<Duration>,
    /// The engines that failed before it and with it.
    losses: Vec<Loss>,
}

impl Legs {
    /// Runs both until the first token, or until one of them fails. The other one is then over as well.
    ///
    /// As long as the prefill leg runs it has the limit. Whoever decodes then has a short one if it streams; else its head
    /// comes after its last token, and only `headers_timeout` says how long that may take.
    async fn meet(
        &mut self,
        next: Next<'_>,
        request: Request<RequestBody>,
        leg: &mut Context,
    ) -> Result<Response<ResponseBody>, Failure> {
        let streams = leg.openai.as_ref().is_some_and(|openai| openai.stream);
        let begun = Instant::now();
        let limit = tokio::time::sleep(self.limit);
        let tokens = tokens(next, request, leg);
        let (mut limit, mut tokens) = (std::pin::pin!(limit), std::pin::pin!(tokens));
        loop {
            tokio::select! {
                biased;
                answer = &mut tokens => return answer,
                (outcome, losses) = ended(&mut self.prefill) => {
                    self.losses = losses;
                    self.prefill = None;
                    outcome?;
                    self.took = Some(begun.elapsed());
                    let first_token = Duration::from_secs(FIRST_TOKEN_SECONDS_MAX);
                    limit.as_mut().reset((Instant::now() + self.limit.min(first_token)).into());
                }
                () = &mut limit, if streams || self.prefill.is_some() => {
                    return Err(self.late());
                }
            }
        }
    }

    /// The decode leg may have failed of the prefill leg's end, which is then there, too.
    fn look_back(&mut self) {
        if let Some((_, losses)) = ended(&mut self.prefill).now_or_never() {
            self.prefill = None;
            self.losses = losses;
        }
    }

    /// Whoever is still out is late.
    fn late(&self) -> Failure {
        let [prefill, decode] = &self.at;
        let (leg, at) = match self.prefill {
            Some(_) => ("prefill", prefill),
            None => ("decode", decode),
        };
        Failure {
            at: Some(at.clone()),
            ..Failure::new(leg, "timeout")
        }
    }
}

/// Ends with the leg, and never without one.
async fn ended(prefill: &mut Option<Prefill>) -> (Result<(), Failure>, Vec<Loss>) {
    match prefill {
        Some(prefill) => prefill.await,
        None => std::future::pending().await,
    }
}

/// The decode leg's answer, once it has something of a token.
async fn tokens(
    next: Next<'_>,
    request: Request<RequestBody>,
    leg: &mut Context,
) -> Result<Response<ResponseBody>, Failure> {
    let answer = next.run(request, leg).await;
    let at = leg.log.upstream_host.clone();
    let failed = |reason| Failure {
        at: at.clone(),
        ..Failure::new("decode", reason)
    };
    let response = answer.map_err(|error| Failure {
        error: Some(Box::new(error)),
        ..failed("failed")
    })?;
    if !response.status().is_success() {
        return Err(Failure {
            answer: Some(Box::new(response)),
            ..failed("refused")
        });
    }
    // Whoever calls has the limit.
    let response = Box::pin(pull::begun(response, Duration::MAX)).await;
    response.map_err(|reason| {
        note_end(leg, at.as_ref(), reason);
        failed(reason)
    })
}

/// The client's body, with the end of the prefill leg if that is still to come.
fn accompanied(
    response: Response<ResponseBody>,
    prefill: Option<Prefill>,
) -> Response<ResponseBody> {
    match prefill {
        None => response,
        Some(prefill) => response.map(|inner| {
            let prefill = Some(prefill);
            Accompanied { inner, prefill }.boxed_unsync()
        }),
    }
}

struct Accompanied {
    inner: ResponseBody,
    prefill: Option<Prefill>,
}

impl Body for Accompanied {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Task<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        // Tokens flow: however it ends, it is of no use any more.
        if let Some(prefill) = &mut self.prefill
            && prefill.as_mut().poll(cx).is_ready()
        {
            self.prefill = None;
        }
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoints::Live;
    use arc_swap::ArcSwap;
    use outrigger_xds::report::EngineState;
    use outrigger_xds::resource::endpoint::Address;

    fn endpoint(via: Via, host: &str, bootstrap: &str) -> Endpoint {
        let state = EngineState {
            bootstrap: bootstrap.into(),
            dp_size: 4,
            ..EngineState::default()
        };
        Endpoint {
            via,
            address: Address {
                host: host.into(),
                port: 1,
            },
            live: Arc::new(ArcSwap::from_pointee(Live {
                state: Arc::new(state),
                ..Live::default()
            })),
            ..Endpoint::default()
        }
    }

    #[test]
    fn rooms_are_where_the_decode_engine_reaches_them() {
        let meet = |prefill: (Via, &str, &str), decode: (Via, &str), own| {
            let prefill = endpoint(prefill.0, prefill.1, prefill.2);
            let prefill = crate::router::attempt::target(Arc::new(prefill));
            let decode = endpoint(decode.0, decode.1, "");
            Room::between(&prefill, &decode, own).map(|room| format!("{} {}", room.host, room.port))
        };
        let (local, peer) = (Via::Local, Via::Peer);
        for (prefill, decode, expected) in [
            (
                (local, "127.0.0.1", "127.0.0.1:8"),
                (local, "127.0.0.1"),
                Some("127.0.0.1 8"),
            ),
            (
                (local, "127.0.0.1", "127.0.0.1:8"),
                (peer, "10.0.0.2"),
                None,
            ),
            (
                (local, "127.0.0.1", "10.0.0.1:8"),
                (peer, "10.0.0.2"),
                Some("10.0.0.1 8"),
            ),
            (
                (peer, "10.0.0.1", "localhost:8"),
                (local, "127.0.0.1"),
                Some("10.0.0.1 8"),
            ),
            (
                (peer, "10.0.0.1", "[fd00::1]:8"),
                (local, "127.0.0.1"),
                Some("fd00::1 8"),
            ),
            (
                (peer, "127.0.0.1", "[::1]:8"),
                (peer, "127.0.0.1"),
                Some("127.0.0.1 8"),
            ),
            ((peer, "10.0.0.1", ""), (local, "127.0.0.1"), None),
            ((peer, "10.0.0.1", "h:x"), (local, "127.0.0.1"), None),
        ] {
            assert_eq!(
                meet(prefill, decode, None).as_deref(),
                expected,
                "{prefill:?} {decode:?}"
            );
        }
        // Others reach this proxy's machine, and with it the engine beside it, somewhere.
        let beside = (local, "127.0.0.1", "127.0.0.1:8");
        let own = Some("10.0.0.1");
        let reached = meet(beside, (peer, "10.0.0.2"), own);
        assert_eq!(reached.as_deref(), Some("10.0.0.1 8"));
        for near in [(peer, "127.0.0.1"), (local, "127.0.0.1")] {
            assert_eq!(meet(beside, near, own).as_deref(), Some("127.0.0.1 8"));
        }
    }

    async fn drained(kind: &str, text: &str) -> Result<(), Option<(u16, String)>> {
        let body = Full::new(Bytes::copy_from_slice(text.as_bytes()));
        let body = body.map_err(|never| match never {}).boxed_unsync();
        let response = Response::builder().header("content-type", kind);
        match drain(response.body(body).unwrap()).await {
            Ok(()) => Ok(()),
            Err(End::Broke | End::Said(None)) => Err(None),
            Err(End::Said(Some(answer))) => {
                let status = answer.status().as_u16();
                let body = answer.into_body().collect().await.unwrap().to_bytes();
                Err(Some((status, String::from_utf8(body.to_vec()).unwrap())))
            }
        }
    }

    #[tokio::test]
    async fn a_stream_that_tells_of_a_failure_is_one() {
        let events = "text/event-stream";
        let token = "data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null}]}\n\n";
        let abort = "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"abort\"}]}\n\n";
        let done = "data: [DONE]\n\n";
        let error = |code| format!("{{\"error\":{{\"message\":\"m\",\"code\":{code}}}}}");
        let said = |code| format!("data: {}\n\n{done}", error(code));
        assert_eq!(drained(events, &[token, done].concat()).await, Ok(()));
        assert_eq!(
            drained(events, &[token, abort, done].concat()).await,
            Err(None)
        );
        assert_eq!(drained(events, &said(500)).await, Err(None));
        assert_eq!(drained(events, &said(429)).await, Err(None));
        let told = Err(Some((400, error(400))));
        assert_eq!(drained(events, &said(400)).await, told);
        assert_eq!(drained("application/json", &said(400)).await, Ok(()));
    }

    #[test]
    fn a_room_leads_to_its_rank() {
        let mut prefill =
            crate::router::attempt::target(Arc::new(endpoint(Via::Local, "a", "a:1")));
        let decode = endpoint(Via::Local, "b", "");
        let mut numbers = std::collections::BTreeSet::new();
        for rank in 0..64 {
            prefill.rank = Some(rank % 4);
            let room = Room::between(&prefill, &decode, None).unwrap();
            assert_eq!(room.number % 4, u64::from(rank % 4));
            assert!(i64::try_from(room.number).is_ok());
            assert!(numbers.insert(room.number), "each has its own");
        }
    }

    #[test]
    fn both_legs_say_where_they_meet() {
        let head = Head {
            method: http::Method::POST,
            uri: "/v1/completions".parse().unwrap(),
            version: http::Version::HTTP_11,
            headers: http::HeaderMap::new(),
            body: (Bytes::from_static(b"{\"prompt\":\"a\"} "), Bytes::new()),
        };
        let room = Room {
            host: "h\"".into(),
            port: 8998,
            number: (1 << 62) - 1,
        };
        let (first, more) = room.body(&head).unwrap();
        let body: serde_json::Value = serde_json::from_slice(&[first, more].concat()).unwrap();
        let expected = serde_json::json!({"prompt": "a", "bootstrap_host": "h\"",
            "bootstrap_port": 8998, "bootstrap_room": 4_611_686_018_427_387_903_u64});
        assert_eq!(body, expected);
    }
}
