//! An answer in one piece: held until it is whole, so that what breaks before can be asked for anew elsewhere.
//!
//! Nothing of it was delivered, so any request may begin anew, whatever it asks for. Its pieces go on as they came. An
//! answer that is too long to be held goes on as it comes, and a break then shows.

use super::{
    budget::Held,
    cause::{Cause, is_gone},
    leg::Leg,
    resume::{Again, Call, PAUSE, Trouble, ask, blames_request, keep_error},
    suspicion::Deaths,
};
use crate::{
    body::{BodyError, ResponseBody, is_over},
    error::{Error, Flag, Retry},
    filter::{Context, End, StreamObserver},
    openai::OpenAiRequest,
    sse,
};
use bytes::Bytes;
use http::{Response, StatusCode, header, response::Parts};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use serde::de::IgnoredAny;
use std::{
    collections::VecDeque,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{self, Poll},
    time::{Duration, Instant},
};
use tokio::time::Sleep;

/// Gives the answer when it is whole, or as it comes if it cannot be held; another engine's, if this one breaks.
pub(super) async fn hold(
    mut response: Response<ResponseBody>,
    again: Again<'_>,
    openai: &OpenAiRequest,
    context: &mut Context,
    below: Vec<Box<dyn StreamObserver>>,
) -> Result<Response<ResponseBody>, Error> {
    if !can_be_held(&response) {
        again.release(context);
        context.observers.extend(below);
        return Ok(response);
    }
    let first = come_already(response.body_mut()).await;
    if is_over(response.body())
        && let Some(Some(Ok(piece))) = first
    {
        // Nearly always: nothing is to be waited for.
        again.release(context);
        context.observers.extend(below);
        let piece = Some(piece);
        return Ok(response.map(|rest| Preceded { piece, rest }.boxed_unsync()));
    }
    let call = again.call(context);
    // Boxed: it would be part of every request's future.
    Box::pin(wait(response, first, (&call, openai), context, below)).await
}

/// What came next of a body, if it is here.
type Come = Option<Option<Result<Frame<Bytes>, BodyError>>>;

/// What came with the head.
async fn come_already(body: &mut ResponseBody) -> Come {
    poll_fn(|cx| {
        Poll::Ready(match Pin::new(&mut *body).poll_frame(cx) {
            Poll::Ready(come) => Some(come),
            Poll::Pending => None,
        })
    })
    .await
}

/// Holds what is still to come, and what came first.
async fn wait(
    response: Response<ResponseBody>,
    first: Come,
    (call, openai): (&Arc<Call>, &OpenAiRequest),
    context: &mut Context,
    below: Vec<Box<dyn StreamObserver>>,
) -> Result<Response<ResponseBody>, Error> {
    let limits = Limits::new(call, openai, context);
    let mut answer = Answer::new(response, below, call, context);
    match answer.gather(first, call, &limits).await {
        Ok(()) => Ok(answer.hand_over(context)),
        Err(broken) => anew(answer, broken, call, &limits, context).await,
    }
}

/// A success that is no stream, and has something to come.
fn can_be_held(response: &Response<ResponseBody>) -> bool {
    response.status() == StatusCode::OK
        && !sse::is_event_stream(response.headers())
        && !is_over(response.body())
}

/// How long an answer may be, and how long it is waited for.
struct Limits {
    bytes_max: usize,
    /// Silence before its first byte after which another engine is asked, if there is one: engines generate meanwhile.
    first: Option<Duration>,
    /// The same behind it, and where the engine is gone.
    stall: Duration,
    /// Silence that ends it.
    gap: Option<Duration>,
    /// When all must be over.
    until: Option<Instant>,
}

impl Limits {
    fn new(call: &Call, openai: &OpenAiRequest, context: &Context) -> Self {
        let config = &call.policy.config;
        let gap = openai.limits.inter_token_timeout;
        let total = context.total_timeout();
        Self {
            bytes_max: config.whole_bytes_max,
            first: openai
                .limits
                .first_token_timeout
                .into_iter()
                .chain(gap)
                .min(),
            stall: gap.map_or(config.stall(), |gap| gap.min(config.stall())),
            gap,
            until: total.map(|total| context.complete_since() + total),
        }
    }
}

/// Why an answer will not be whole.
enum Broken {
    /// Another engine may do better.
    Lost(Cause),
    /// Nobody can in time.
    Late(Error),
}

/// What comes next of an answer.
enum Next {
    Piece(Frame<Bytes>),
    Broke(BodyError),
    End,
    /// Nothing, so far: it is time to look whether anything still comes.
    Look,
}

impl From<Option<Result<Frame<Bytes>, BodyError>>> for Next {
    fn from(come: Option<Result<Frame<Bytes>, BodyError>>) -> Self {
        match come {
            Some(Ok(frame)) => Self::Piece(frame),
            Some(Err(error)) => Self::Broke(error),
            None => Self::End,
        }
    }
}

/// What an engine has sent of its answer.
struct Answer {
    parts: Parts,
    leg: Leg,
    pieces: VecDeque<Bytes>,
    trailers: Option<Frame<Bytes>>,
    bytes: usize,
    held: Held,
    /// When it last brought something, and when somebody last looked whether it should.
    last: Instant,
    looked: Instant,
    /// Armed once somebody has to wait.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Answer {
    fn new(
        response: Response<ResponseBody>,
        below: Vec<Box<dyn StreamObserver>>,
        call: &Call,
        context: &Context,
    ) -> Self {
        let (parts, body) = response.into_parts();
        let policy = &call.policy;
        let shared = policy.services.migration.clone();
        let now = Instant::now();
        Self {
            parts,
            leg: Leg::new(body, below, context.log.upstream_host.clone(), None),
            pieces: VecDeque::new(),
            trailers: None,
            bytes: 0,
            held: Held::new(shared, policy.config.held_bytes_max),
            last: now,
            looked: now,
            timer: None,
        }
    }

    /// Waits until it is whole, or is not to be held.
    async fn gather(
        &mut self,
        mut first: Come,
        call: &Call,
        limits: &Limits,
    ) -> Result<(), Broken> {
        if self.leg.body.size_hint().lower() > limits.bytes_max as u64 {
            count_too_long();
            return Ok(());
        }
        loop {
            let next = match first.take() {
                Some(come) => Next::from(come),
                None => poll_fn(|cx| self.poll_next(limits, cx)).await,
            };
            match next {
                Next::Piece(frame) => {
                    if self.keep(frame, limits) {
                        return Ok(());
                    }
                }
                Next::Broke(error) => return Err(Broken::Lost(Cause::Broke(error))),
                Next::End if self.is_cut() => return Err(Broken::Lost(Cause::Truncated)),
                Next::End => return Ok(()),
                Next::Look => self.judge(call, limits)?,
            }
        }
    }

    fn poll_next(&mut self, limits: &Limits, cx: &mut task::Context<'_>) -> Poll<Next> {
        if let Poll::Ready(frame) = Pin::new(&mut self.leg.body).poll_frame(cx) {
            self.last = Instant::now();
            return Poll::Ready(Next::from(frame));
        }
        let first = limits.first.filter(|_| self.bytes == 0);
        let pause = first.map_or(limits.stall, |first| first.min(limits.stall));
        let look = Some(self.last.max(self.looked) + pause);
        let gap = limits.gap.map(|gap| self.last + gap);
        let Some(at) = [look, gap, limits.until].into_iter().flatten().min() else {
            return Poll::Pending;
        };
        let at = at.into();
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
        loop {
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if at <= tokio::time::Instant::now() {
                return Poll::Ready(Next::Look);
            }
            timer.as_mut().reset(at);
        }
    }

    /// Takes a piece in; true if nothing more is to be waited for.
    fn keep(&mut self, frame: Frame<Bytes>, limits: &Limits) -> bool {
        match frame.into_data() {
            Ok(data) => {
                self.bytes += data.len();
                self.pieces.push_back(data);
            }
            Err(trailers) => {
                self.trailers = Some(trailers);
                return true;
            }
        }
        if is_over(&self.leg.body) {
            return true;
        }
        if self.bytes > limits.bytes_max {
            count_too_long();
            return true;
        }
        !self.held.grow(self.bytes)
    }

    /// A clean end says little where neither a length nor chunks told it: then the JSON must be whole.
    fn is_cut(&self) -> bool {
        let headers = &self.parts.headers;
        let json = headers
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
        let told = [
            header::CONTENT_LENGTH,
            header::TRANSFER_ENCODING,
            header::CONTENT_ENCODING,
        ]
        .iter()
        .any(|name| headers.contains_key(name));
        json && !told && !self.is_json()
    }

    /// Copies, since nothing else reads pieces; only servers of HTTP/1.0's kind make it do so.
    fn is_json(&self) -> bool {
        let pieces: Vec<&[u8]> = self.pieces.iter().map(Bytes::as_ref).collect();
        serde_json::from_slice::<IgnoredAny>(&pieces.concat()).is_ok()
    }

    /// It is silent: for too long?
    fn judge(&mut self, call: &Call, limits: &Limits) -> Result<(), Broken> {
        let now = Instant::now();
        self.looked = now;
        let silent = now.saturating_duration_since(self.last);
        if limits.until.is_some_and(|until| until <= now) {
            return Err(Broken::Late(late(Error::duration_timeout())));
        }
        if self.has_stalled(silent, call, limits) && call.has_other(self.leg.engine.as_ref()) {
            return Err(Broken::Lost(Cause::Stall));
        }
        if limits.gap.is_some_and(|gap| silent >= gap) {
            return Err(Broken::Late(late(Error::stream_idle(false))));
        }
        Ok(())
    }

    /// Some servers send the head at once, and nothing more before all is generated.
    fn has_stalled(&self, silent: Duration, call: &Call, limits: &Limits) -> bool {
        if self.bytes > 0 {
            return silent >= limits.stall;
        }
        let engine = call.endpoint(self.leg.engine.as_ref());
        let gone = engine.is_some_and(|engine| is_gone(&engine));
        limits.first.is_some_and(|first| silent >= first) || gone && silent >= limits.stall
    }

    /// It goes on to the client, with whatever is still to come of it.
    fn hand_over(self, context: &mut Context) -> Response<ResponseBody> {
        let (rest, below) = self.leg.hand_over();
        context.observers.extend(below);
        let body = Gathered {
            pieces: self.pieces,
            trailers: self.trailers,
            rest,
            held: self.held,
        };
        Response::from_parts(self.parts, body.boxed_unsync())
    }

    /// Nobody will see it.
    fn give_up(mut self) {
        self.leg.end = End::UpstreamBroke;
    }
}

fn late(error: Error) -> Error {
    metrics::counter!("outrigger_stream_timeouts_total", "kind" => error.flag.as_str())
        .increment(1);
    error
}

fn count_too_long() {
    metrics::counter!("outrigger_migration_whole_overflow_total").increment(1);
}

/// Asks for the answer anew until one is whole, or it cannot be had.
async fn anew(
    mut answer: Answer,
    mut broken: Broken,
    call: &Arc<Call>,
    limits: &Limits,
    context: &mut Context,
) -> Result<Response<ResponseBody>, Error> {
    let mut trouble = Trouble::new(Deaths::default());
    trouble.until = limits.until;
    let mut moves = 0;
    loop {
        let cause = match broken {
            Broken::Lost(cause) => cause,
            Broken::Late(error) => {
                answer.give_up();
                return Err(error);
            }
        };
        lose(call, &mut trouble, answer, &cause);
        let mut found = match find(call, &mut trouble).await {
            Ok(found) => found,
            Err(refusal) => {
                cause.count("failed");
                cause.count_refusal(refusal.reason);
                return refuse(refusal, &cause, &trouble, context, moves);
            }
        };
        moves += 1;
        cause.count("restart");
        metrics::histogram!("outrigger_migration_seconds")
            .record(trouble.since.elapsed().as_secs_f64());
        let below = std::mem::take(&mut found.context.observers);
        context.adopt(found.context);
        context.log.migrations = moves;
        if !can_be_held(&found.response) {
            context.observers.extend(below);
            return Ok(found.response);
        }
        answer = Answer::new(found.response, below, call, context);
        match answer.gather(None, call, limits).await {
            Ok(()) => return Ok(answer.hand_over(context)),
            Err(again) => broken = again,
        }
    }
}

/// What happened counts for the next attempt.
fn lose(call: &Call, trouble: &mut Trouble, answer: Answer, cause: &Cause) {
    trouble.since = answer.last;
    trouble.lost_by.clone_from(&answer.leg.engine);
    trouble.attempts += u32::from(trouble.calls > 0);
    let died = matches!(cause, Cause::Broke(_) | Cause::Truncated);
    if let Some(engine) = answer.leg.engine.as_ref().filter(|_| died) {
        call.policy.services.migration.breaks.note(engine);
    }
    tracing::debug!(cause = cause.as_str(), engine = ?answer.leg.engine, bytes = answer.bytes, "an answer is asked for anew");
    let given_up = call.given_up();
    if let Some(blame) = cause.blame() {
        given_up.note(blame);
    }
    answer.give_up();
    given_up.clear();
}

/// An answer that began elsewhere.
struct Found {
    response: Response<ResponseBody>,
    context: Context,
}

/// Why there is none, and what the last engine said.
struct Refusal {
    reason: &'static str,
    last: Option<(Result<Response<ResponseBody>, Error>, Context)>,
}

/// Finds an engine that answers, by the rules of streams: attempts in a row, time since the break, the budget.
async fn find(call: &Arc<Call>, trouble: &mut Trouble) -> Result<Found, Refusal> {
    let mut last = None;
    loop {
        if let Some(reason) = end(call, trouble) {
            return Err(Refusal { reason, last });
        }
        let answered = match ask(call, None, trouble, None).await {
            Ok(answered) => answered,
            Err(reason) => return Err(Refusal { reason, last }),
        };
        let context = answered.context;
        match answered.result {
            Ok(response) if response.status().is_success() || blames_request(response.status()) => {
                return Ok(Found { response, context });
            }
            // Nobody was asked: somebody may come back.
            Err(error) if error.flag == Flag::NoHealthyUpstream => {
                last = Some((Err(error), context));
            }
            Ok(response) => {
                trouble.attempts += 1;
                last = Some((Ok(keep_error(response).await), context));
            }
            Err(error) => {
                trouble.attempts += 1;
                last = Some((Err(error), context));
            }
        }
        drop(answered.place);
        tokio::time::sleep(trouble.within(PAUSE)).await;
    }
}

/// Why nobody is asked any more.
fn end(call: &Call, trouble: &Trouble) -> Option<&'static str> {
    let config = &call.policy.config;
    if !call.can_repeat() {
        Some("no_body")
    } else if trouble.within(PAUSE).is_zero() {
        Some("timeout")
    } else if trouble.attempts >= config.attempts_max {
        Some("attempts")
    } else {
        (trouble.broke.elapsed() >= config.resume_timeout()).then_some("timeout")
    }
}

/// The answer where there is none: the last engine's own, or what Envoy says of a break before a response.
fn refuse(
    refusal: Refusal,
    cause: &Cause,
    trouble: &Trouble,
    context: &mut Context,
    moves: u32,
) -> Result<Response<ResponseBody>, Error> {
    if trouble.within(PAUSE).is_zero() {
        return Err(late(Error::duration_timeout()));
    }
    if let Some((result, attempt)) = refusal.last {
        context.adopt(attempt);
        context.log.migrations = moves;
        return result;
    }
    Err(match cause {
        Cause::Broke(error) => {
            let reason = match error.flag {
                Flag::UpstreamRemoteReset => "remote reset",
                Flag::UpstreamProtocolError => "protocol error",
                _ => "connection termination",
            };
            Error::upstream_reset(error.flag, reason, Retry::No)
        }
        Cause::Stall => Error::stream_idle(false),
        _ => Error::upstream_reset(Flag::UpstreamProtocolError, "protocol error", Retry::No),
    })
}

/// A body of which one piece was taken, and which is over but for those who count its end.
struct Preceded {
    piece: Option<Frame<Bytes>>,
    rest: ResponseBody,
}

impl Body for Preceded {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.piece.take() {
            Some(piece) => Poll::Ready(Some(Ok(piece))),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.piece.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let data = self.piece.as_ref().and_then(Frame::data_ref);
        match data {
            Some(data) => SizeHint::with_exact(data.len() as u64),
            None => self.rest.size_hint(),
        }
    }
}

/// A body that was held: its pieces, and what comes after them.
struct Gathered {
    pieces: VecDeque<Bytes>,
    trailers: Option<Frame<Bytes>>,
    rest: ResponseBody,
    held: Held,
}

impl Body for Gathered {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Some(piece) = this.pieces.pop_front() {
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        this.held.clear();
        match this.trailers.take() {
            Some(trailers) => Poll::Ready(Some(Ok(trailers))),
            None => Pin::new(&mut this.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty() && self.trailers.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = self.rest.size_hint();
        let held: usize = self.pieces.iter().map(Bytes::len).sum();
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + held as u64);
        }
        hint.set_lower(hint.lower() + held as u64);
        hint
    }
}
