//! SGLang's words for the two legs: the same request to both at once, and a room at the engine for prefill to meet in.
//!
//! What the fields are is read from SGLang 0.5.23, nothing of two servers was recorded. Nobody checks for which prompt a room was
//! opened, so each is named by chance and used by one pair. An engine waits minutes for a leg that is lost, and is not
//! told: whichever fails first, the other one's connection is closed at once, which ends it.

use super::{Failure, Head, Locality, Split, leg, loan, near, none, pull, take_over};
use crate::{
    body::{BodyError, RequestBody, ResponseBody},
    endpoints::{Endpoint, Part, Place, Via},
    filter::{Chain, Context, Next, Ranked},
    router::attempt::RANK_HEADER,
};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use outrigger_xds::report::EngineState;
use rand::Rng;
use std::{
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context as Task, Poll},
    time::{Duration, Instant},
};

/// Where two legs meet.
#[derive(Debug, PartialEq, Eq)]
struct Room {
    host: String,
    port: u16,
    number: u64,
}

impl Room {
    /// At the engine for prefill, as the one that decodes reaches it.
    fn between(prefill: &Ranked, decode: &Endpoint) -> Option<Self> {
        let live = prefill.endpoint.live.load();
        let (host, port) = address(&live.state.bootstrap, &prefill.endpoint, decode)?;
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
    fn body(&self, head: &Head) -> Option<(Bytes, Bytes)> {
        let host = serde_json::to_string(&self.host).ok()?;
        let members = format!(
            "\"bootstrap_host\":{host},\"bootstrap_port\":{},\"bootstrap_room\":{}",
            self.port, self.number
        );
        head.extended(&[&members])
    }
}

fn address(told: &str, prefill: &Endpoint, decode: &Endpoint) -> Option<(String, u16)> {
    let (host, port) = told.rsplit_once(':')?;
    let port = port.parse().ok()?;
    let mut host = host.trim_matches(['[', ']']);
    if is_loopback(host) && prefill.via == Via::Peer {
        // It is the loopback of the machine, or pod, that its proxy is reached at.
        host = &prefill.address.host;
    }
    let elsewhere = decode.via == Via::Peer && !is_loopback(&decode.address.host);
    let unreachable = host.is_empty() || is_loopback(host) && elsewhere;
    (!unreachable).then(|| (host.to_owned(), port))
}

fn is_loopback(host: &str) -> bool {
    let address = host.parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// The prefill leg: it ends when all of its answer was read, which nobody wants. With it, how many engines died of it.
type Prefill = BoxFuture<'static, (Result<(), Failure>, u32)>;

/// Has the prompt computed and, at the same time, its tokens waited for.
pub(super) async fn together(
    split: &mut Split<'_>,
    head: &Head,
    (decode, place): (Ranked, Place),
    context: &mut Context,
) -> Result<Response<ResponseBody>, Failure> {
    let prefill = partner(split, &decode, context)?;
    let room = Room::between(&prefill, &decode.endpoint);
    let room = room.ok_or_else(|| Failure::new("prefill", "no_bootstrap"))?;
    let body = room.body(head).ok_or_else(|| none("body"))?;
    let (at, hits) = (prefill.endpoint.id.clone(), prefill.hit_tokens);
    let begun = Instant::now();
    let first = alone(context, Part::Prefill, "p", prefill);
    let request = leg_request(head, &body, &first);
    let mut legs = Legs {
        prefill: Some(drained(split.next.keep(), request, first)),
        limit: Duration::from_millis(split.filter.config.prefill_timeout_ms),
    };
    let mut second = alone(context, Part::Decode, "", decode);
    second.log = context.log.clone();
    second.place = Some(place);
    let request = leg_request(head, &body, &second);
    let deaths = context.deaths;
    let answer = legs.meet(split.next, request, &mut second).await;
    context.deaths = second.deaths + answer.deaths_of_prefill.saturating_sub(deaths);
    let response = answer.response?;
    let took = begun.elapsed();
    let uncached = context.prompt.tokens.saturating_sub(hits.unwrap_or(0));
    split.filter.pace.learn(uncached, took);
    split.record.prefilled(Some(at), took);
    split.record.decoded(second.log.upstream_host.clone());
    take_over(context, second, hits);
    Ok(accompanied(response, legs.prefill))
}

/// The engine for prefill that goes with `decode`: pages have to be of one size, and versions rather not mixed.
fn partner(split: &Split<'_>, decode: &Ranked, context: &Context) -> Result<Ranked, Failure> {
    let theirs = decode.endpoint.live.load().state.clone();
    let locality = split.filter.config.locality;
    let mut ranked = near(&context.ranked, decode, locality);
    if locality == Locality::Required && ranked.is_empty() {
        return Err(none("prefill"));
    }
    let state = |ranked: &Ranked| ranked.endpoint.live.load().state.clone();
    ranked.retain(|ranked| fits(&state(ranked), &theirs));
    ranked.sort_by_key(|ranked| state(ranked).version != theirs.version);
    let chosen = split.choose(Part::Prefill, &ranked, context);
    let chosen = chosen.ok_or_else(|| none("prefill"))?;
    match fits(&state(&chosen), &theirs) {
        true => Ok(chosen),
        false => Err(Failure::new("prefill", "page_size")),
    }
}

fn fits(prefill: &EngineState, decode: &EngineState) -> bool {
    prefill.block_tokens == decode.block_tokens
}

/// A leg that goes to this engine or nowhere.
fn alone(context: &Context, part: Part, suffix: &str, target: Ranked) -> Context {
    let mut leg = leg(context, part, suffix);
    leg.only = Some(target.endpoint.clone());
    leg.ranked = vec![target];
    leg
}

fn leg_request(head: &Head, body: &(Bytes, Bytes), leg: &Context) -> Request<RequestBody> {
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

fn drained(chain: Chain, request: Request<RequestBody>, mut leg: Context) -> Prefill {
    Box::pin(async move {
        let answer = Next::new(&chain).run(request, &mut leg).await;
        let at = leg.log.upstream_host.clone();
        let failed = |reason, error, answer| Failure {
            error,
            at,
            answer,
            ..Failure::new("prefill", reason)
        };
        let outcome = match answer {
            Err(error) => Err(failed("failed", Some(Box::new(error)), None)),
            Ok(response) if !response.status().is_success() => {
                Err(failed("refused", None, Some(Box::new(response))))
            }
            Ok(response) => match drain(response.into_body()).await {
                Ok(()) => Ok(()),
                Err(_) => Err(failed("failed", None, None)),
            },
        };
        (outcome, leg.deaths)
    })
}

async fn drain(mut body: ResponseBody) -> Result<(), BodyError> {
    while let Some(frame) = body.frame().await {
        frame?;
    }
    Ok(())
}

/// Both legs while they run. Dropping it ends them.
struct Legs {
    /// As long as it runs.
    prefill: Option<Prefill>,
    /// For the first token.
    limit: Duration,
}

/// What became of the decode leg.
struct Met {
    response: Result<Response<ResponseBody>, Failure>,
    deaths_of_prefill: u32,
}

impl Legs {
    /// Runs both until the first token, or until one of them fails. The other one is then over as well.
    async fn meet(
        &mut self,
        next: Next<'_>,
        request: Request<RequestBody>,
        leg: &mut Context,
    ) -> Met {
        let limit = tokio::time::sleep(self.limit);
        let tokens = tokens(next, request, leg, self.limit);
        let (mut limit, mut tokens) = (std::pin::pin!(limit), std::pin::pin!(tokens));
        let mut deaths_of_prefill = 0;
        let response = loop {
            tokio::select! {
                biased;
                answer = &mut tokens => break answer,
                (outcome, deaths) = ended(&mut self.prefill) => {
                    deaths_of_prefill = deaths;
                    self.prefill = None;
                    if let Err(failure) = outcome {
                        break Err(failure);
                    }
                }
                () = &mut limit => break Err(Failure::new("prefill", "timeout")),
            }
        };
        Met {
            response,
            deaths_of_prefill,
        }
    }
}

/// Ends with the leg, and never without one.
async fn ended(prefill: &mut Option<Prefill>) -> (Result<(), Failure>, u32) {
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
    limit: Duration,
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
    let response = Box::pin(pull::begun(response, limit)).await;
    response.map_err(|reason| {
        // It broke before its first token, which may be due to the request.
        leg.deaths += u32::from(reason == "failed");
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
        let meet = |prefill: (Via, &str, &str), decode: (Via, &str)| {
            let prefill = endpoint(prefill.0, prefill.1, prefill.2);
            let prefill = crate::router::attempt::target(Arc::new(prefill));
            let decode = endpoint(decode.0, decode.1, "");
            Room::between(&prefill, &decode).map(|room| format!("{} {}", room.host, room.port))
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
                meet(prefill, decode).as_deref(),
                expected,
                "{prefill:?} {decode:?}"
            );
        }
    }

    #[test]
    fn a_room_leads_to_its_rank() {
        let mut prefill =
            crate::router::attempt::target(Arc::new(endpoint(Via::Local, "a", "a:1")));
        let decode = endpoint(Via::Local, "b", "");
        let mut numbers = std::collections::BTreeSet::new();
        for rank in 0..64 {
            prefill.rank = Some(rank % 4);
            let room = Room::between(&prefill, &decode).unwrap();
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
