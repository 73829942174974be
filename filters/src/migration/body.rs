//! The body that the client reads: one leg after the other, and the watch over the one that runs.

use super::{
    budget::{Counted, Held},
    cause::{Cause, Condition, condition},
    leg::Leg,
    recipe::{self, Way, recipe},
    resume::{Call, Moved, Trouble, resume},
    splice::Splice,
    suspicion::Deaths,
    told::{Kept, Told, tell},
};
use crate::{
    body::BodyError,
    endpoints::Endpoint,
    error::Flag,
    filter::{End, LogFields, Loss, StreamObserver},
    openai::OpenAiRequest,
    sse::{EVENT_BYTES_MAX, Event, event_length},
};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::future::BoxFuture;
use http_body::{Body, Frame};
use outrigger_xds::report::{EngineId, EngineKind};
use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tokio::time::Sleep;

/// Longest time between two looks at an engine.
const LOOK_MAX: Duration = Duration::from_secs(1);
/// Shortest.
const LOOK_MIN: Duration = Duration::from_millis(10);
/// A stream that brought something so lately is alive, whatever is said of its engine.
const LIVE_MAX: Duration = Duration::from_secs(2);
/// Reasons to stay that may be none in a moment, while the engine still has one to leave.
const PASSING: [&str; 6] = [
    "reasoning",
    "held_text",
    "attempts",
    "budget",
    "timeout",
    "not_verified",
];

/// What the access log will say, told by the body to an observer of the same response.
#[derive(Debug, Default)]
pub(super) struct Report {
    moves: AtomicU32,
    engine: Mutex<Option<EngineId>>,
}

/// Writes the report.
pub(super) struct Reporter(pub(super) Arc<Report>);

impl StreamObserver for Reporter {
    fn on_end(&mut self, _end: End, log: &mut LogFields) {
        log.migrations = self.0.moves.load(Relaxed);
        let engine = self.0.engine.lock();
        if let Some(engine) = engine.unwrap_or_else(PoisonError::into_inner).take() {
            log.upstream_host = Some(engine);
        }
    }
}

enum State {
    /// The leg runs.
    Live,
    /// Its ids are looked for: the engine told none. It may have a place already.
    Telling(
        Cause,
        Option<Counted>,
        BoxFuture<'static, Result<Told, &'static str>>,
    ),
    /// Another is looked for. The old one is kept: it may be all there is.
    Moving(Cause, BoxFuture<'static, Moved>),
    Over,
}

/// What is as before if a stream stays where it is.
#[derive(Default)]
struct Undo {
    trouble: Option<Trouble>,
    tokens_before: usize,
    kept: Option<Kept>,
}

/// A stream that can move.
pub(super) struct Migrating {
    call: Arc<Call>,
    openai: Arc<OpenAiRequest>,
    pub(super) splice: Splice,
    leg: Leg,
    state: State,
    broke: Option<Cause>,
    trouble: Trouble,
    /// Most tokens that it had when a leg ended.
    tokens_before: usize,
    /// How it stood before the move that is tried.
    undo: Undo,
    report: Arc<Report>,
    last: Instant,
    timer: Option<Pin<Box<Sleep>>>,
    /// How much text the engine holds back for stop strings.
    lag_is_known: bool,
    /// What is drawn for it can be drawn again, though its client gave no seed.
    pub(super) has_our_seed: bool,
    /// It cannot move: only the limit between tokens counts.
    stays: bool,
    /// Why it did not, when that was last counted.
    refused: Option<(&'static str, &'static str)>,
    stall: Duration,
    gap: Option<Duration>,
    _counted: Counted,
}

impl Migrating {
    pub(super) fn new(
        call: Arc<Call>,
        openai: Arc<OpenAiRequest>,
        leg: Leg,
        report: Arc<Report>,
        deaths: Deaths,
    ) -> Self {
        let policy = &call.policy;
        let shared = &policy.services.migration;
        let held = Held::new(shared.clone(), policy.config.held_bytes_max);
        let gap = openai.limits.inter_token_timeout;
        let stall = policy.config.stall();
        let now = Instant::now();
        let mut body = Self {
            splice: Splice::new(recipe::asked(&openai), held),
            state: State::Live,
            broke: None,
            trouble: Trouble::new(deaths),
            tokens_before: 0,
            undo: Undo::default(),
            report,
            last: now,
            timer: None,
            lag_is_known: true,
            has_our_seed: false,
            stays: false,
            refused: None,
            stall: gap.map_or(stall, |gap| gap.min(stall)),
            gap,
            _counted: shared.enter(),
            openai,
            call,
            leg,
        };
        body.note_lag();
        body
    }

    /// Looks while the engine is well: of a dead one it may not be known what it was.
    fn note_lag(&mut self) {
        if self.splice.asked.margin > 0 {
            let endpoint = self.endpoint();
            let kind = endpoint.map(|endpoint| endpoint.live.load().state.kind);
            self.lag_is_known = kind == Some(EngineKind::Vllm);
        }
    }

    /// What the client gets of the events that have come.
    fn take_events(&mut self) -> Option<Bytes> {
        if self.leg.pending.is_empty() {
            return None;
        }
        let mut out = BytesMut::with_capacity(self.leg.pending.len());
        while let Some(length) = event_length(&self.leg.pending) {
            let raw = self.leg.pending.split_to(length);
            self.leg.note(&Event { raw: &raw }, self.last);
            if let Err(cause) = self.splice.admit(&raw, &mut out) {
                self.broke = Some(cause);
                break;
            }
        }
        if self.broke.is_none() && self.leg.pending.len() > EVENT_BYTES_MAX {
            metrics::counter!("outrigger_sse_event_too_long_total").increment(1);
            self.splice.pass_through();
            out.extend_from_slice(&std::mem::take(&mut self.leg.pending));
        }
        if !self.trouble.deaths.is_empty() && self.has_progress() {
            let shared = &self.call.policy.services.migration;
            self.trouble.deaths.clear(shared);
        }
        (!out.is_empty()).then(|| out.freeze())
    }

    /// Whether it has more than when a leg ended last.
    fn has_progress(&self) -> bool {
        let splice = &self.splice;
        splice.tokens > self.tokens_before || splice.untold.is_some() && splice.began
    }

    /// The stream is in trouble: it moves, or it does not. Gives what the client gets at once.
    fn leave(&mut self, cause: Cause) -> Option<Result<Bytes, BodyError>> {
        if self.splice.is_finished() {
            let mut out = BytesMut::new();
            if !self.splice.complete(&mut out) {
                return self.refuse(cause, "no_usage");
            }
            self.end(End::Complete);
            return (!out.is_empty()).then(|| Ok(out.freeze()));
        }
        // A stream that still runs is not stopped to wait for a place.
        let healthy = matches!(cause, Cause::Leaving);
        let place = match healthy {
            true => self.call.place(),
            false => None,
        };
        if healthy && place.is_none() {
            return self.refuse(cause, "budget");
        }
        self.undo = Undo {
            trouble: healthy.then(|| self.trouble.clone()),
            tokens_before: self.tokens_before,
            kept: None,
        };
        self.take_stock(&cause);
        match self.recipe(&cause, false) {
            Ok(recipe) => self.set_out(cause, recipe, place),
            Err("no_token_ids") if self.ask_for_ids(&cause, place) => {}
            Err(reason) => {
                self.undo();
                return self.refuse(cause, reason);
            }
        }
        None
    }

    /// It did not move: an engine that is well lost nothing, and goes on telling no ids.
    fn undo(&mut self) {
        let undo = std::mem::take(&mut self.undo);
        if let Some(trouble) = undo.trouble {
            (self.trouble, self.tokens_before) = (trouble, undo.tokens_before);
        }
        if let Some(kept) = undo.kept {
            self.splice.untell(kept);
        }
    }

    fn set_out(&mut self, cause: Cause, recipe: recipe::Recipe, place: Option<Counted>) {
        tracing::debug!(cause = cause.as_str(), engine = ?self.leg.engine, way = recipe.way.as_str(), "a stream moves");
        let future = resume(self.call.clone(), recipe, self.trouble.clone(), place);
        self.state = State::Moving(cause, Box::pin(future));
    }

    /// Has the ids of prompt and text found, if they may be.
    fn ask_for_ids(&mut self, cause: &Cause, place: Option<Counted>) -> bool {
        let kept = self.splice.kept.as_ref();
        let kept = kept.filter(|kept| kept.retells && !kept.is_empty());
        let Some(kept) = kept.cloned() else {
            return false;
        };
        let lost_by = self.trouble.lost_by.clone();
        let future = tell(self.call.clone(), self.openai.clone(), kept, lost_by);
        self.state = State::Telling(cause.clone(), place, Box::pin(future));
        true
    }

    /// What came of looking for the ids. A stream without them does not move.
    fn retell(
        &mut self,
        cause: Cause,
        place: Option<Counted>,
        told: Result<Told, &'static str>,
    ) -> Option<Result<Bytes, BodyError>> {
        self.state = State::Live;
        let recipe = told.and_then(|told| {
            self.undo.kept = self.splice.retell(&told);
            self.tokens_before = self.splice.tokens;
            self.recipe(&cause, false)
        });
        let recipe = recipe.or_else(|reason| {
            if let Some(kept) = self.undo.kept.take() {
                self.splice.untell(kept);
            }
            // What no ids are made of may still be told again.
            self.recipe(&cause, true).map_err(|_| reason)
        });
        match recipe {
            Ok(recipe) => {
                self.set_out(cause, recipe, place);
                None
            }
            Err(reason) => {
                self.undo();
                self.refuse(cause, reason)
            }
        }
    }

    /// What happened counts for the next attempt.
    fn take_stock(&mut self, cause: &Cause) {
        let shared = &self.call.policy.services.migration;
        let progress = self.has_progress();
        self.tokens_before = self.tokens_before.max(self.splice.tokens);
        let trouble = &mut self.trouble;
        trouble.since = self.last;
        trouble.lost_by.clone_from(&self.leg.engine);
        if progress || trouble.calls == 0 {
            trouble.broke = Instant::now();
        }
        let died = matches!(cause, Cause::Broke(_) | Cause::Error(_) | Cause::Truncated);
        let engine = self.leg.engine.as_ref();
        if progress {
            trouble.attempts = 0;
            if let Some(engine) = engine.filter(|_| died) {
                shared.breaks.note(engine);
            }
            return;
        }
        // Engines that tell again what was told are no further, but did not die of the request.
        let died_first = died && !self.splice.has_progressed();
        if let Some(engine) = engine.filter(|_| died && !died_first) {
            shared.breaks.note(engine);
        }
        let loss = engine.map(|engine| Loss {
            engine: engine.clone(),
            at: Instant::now(),
            died: died_first,
        });
        trouble.deaths.add(shared, loss);
        let chance = died && self.call.in_storm(&trouble.deaths);
        trouble.attempts += u32::from(trouble.calls > 0 && !chance);
    }

    fn recipe(&self, cause: &Cause, told_none: bool) -> Result<recipe::Recipe, &'static str> {
        match cause {
            Cause::Unproven => return Err("entrance"),
            Cause::Diverged => return Err("diverged"),
            _ => {}
        }
        if self.trouble.attempts >= self.call.policy.config.attempts_max {
            return Err("attempts");
        }
        if self.splice.is_strange() {
            return Err("unknown_stream");
        }
        if !self.call.can_repeat() {
            return Err("no_body");
        }
        let rules = recipe::Rules {
            same_distribution: self.call.policy.config.same_distribution,
            context_tokens: self.call.context_tokens(self.leg.engine.as_ref()),
            lag_is_known: self.lag_is_known,
            may_risk: !matches!(cause, Cause::Leaving),
            has_our_seed: self.has_our_seed,
            told_none,
        };
        recipe(&self.openai, &self.splice, &rules)
    }

    /// Once, however often it is looked at for the same reason.
    fn count_refusal(&mut self, cause: &Cause, reason: &'static str) {
        let now = Some((cause.as_str(), reason));
        let before = std::mem::replace(&mut self.refused, now);
        if before == now && matches!(cause, Cause::Leaving) {
            return;
        }
        cause.count_refusal(reason);
    }

    fn end(&mut self, end: End) {
        self.state = State::Over;
        self.leg.end = end;
    }

    /// It stays where it is, or ends there.
    fn refuse(&mut self, cause: Cause, reason: &'static str) -> Option<Result<Bytes, BodyError>> {
        self.count_refusal(&cause, reason);
        let (flag, what) = match cause {
            Cause::Stall | Cause::Leaving => {
                self.stays = matches!(cause, Cause::Stall) || !PASSING.contains(&reason);
                return None;
            }
            Cause::Error(raw) | Cause::Aborted(raw) => {
                // The engine's own words say it best.
                self.splice.settled = true;
                let mut out = BytesMut::new();
                drop(self.splice.admit(&raw, &mut out));
                return Some(Ok(out.freeze()));
            }
            Cause::Truncated => {
                self.end(End::UpstreamBroke);
                let rest = std::mem::take(&mut self.leg.pending);
                return (!rest.is_empty()).then_some(Ok(rest));
            }
            Cause::Broke(error) => (error.flag, error.message),
            Cause::Unproven => (
                Flag::UpstreamProtocolError,
                "the engine takes no chat prompt of tokens, or not within reasoning".to_owned(),
            ),
            Cause::Diverged => (
                Flag::UpstreamProtocolError,
                "the engine generated another text than the one before it".to_owned(),
            ),
        };
        self.end(End::UpstreamBroke);
        self.call.given_up().note(flag);
        let tokens = self.splice.tokens.max(self.tokens_before);
        Some(Err(BodyError::new(
            flag,
            format_args!(
                "{what}; the stream broke after {tokens} tokens and could not go on elsewhere: {reason}"
            ),
        )))
    }

    /// What came of moving.
    fn arrive(&mut self, cause: Cause, moved: Moved) -> Option<Result<Bytes, BodyError>> {
        self.trouble = moved.trouble;
        self.state = State::Live;
        let leg = match moved.leg {
            Ok(leg) => leg,
            Err(reason) => {
                cause.count("failed");
                if let Some(kept) = self.undo.kept.take() {
                    self.splice.untell(kept);
                }
                return self.refuse(cause, reason);
            }
        };
        self.undo = Undo::default();
        let way = moved.recipe.way;
        cause.count(way.as_str());
        metrics::histogram!("outrigger_migration_seconds")
            .record(self.trouble.since.elapsed().as_secs_f64());
        self.splice.go_on(&moved.recipe.cut, way);
        self.report.moves.fetch_add(1, Relaxed);
        let engine = self.report.engine.lock();
        engine
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(&leg.engine);
        self.leg.end = End::UpstreamBroke;
        let given_up = self.call.given_up();
        if let Some(blame) = cause.blame() {
            given_up.note(blame);
        }
        self.leg = leg;
        given_up.clear();
        // What held it there may not hold it here.
        self.stays = false;
        // The rest is drawn without it.
        self.has_our_seed &= way == Way::Restart;
        self.refused = None;
        self.note_lag();
        self.last = Instant::now();
        None
    }

    fn endpoint(&self) -> Option<Arc<Endpoint>> {
        self.call.endpoint(Some(self.leg.engine.as_ref()?))
    }

    /// Before its first event an engine is in prefill, which may take longer than a stall.
    fn has_stalled(&self, silent: Duration) -> bool {
        let limit = match self.leg.chunks {
            0 => self.openai.limits.first_token_timeout,
            _ => Some(self.stall),
        };
        limit.is_some_and(|limit| silent >= limit)
    }

    /// A limit that has passed, in words: nothing more is waited for here.
    fn overdue(&self, silent: Duration) -> Option<&'static str> {
        let prefills_elsewhere = self.leg.chunks == 0 && self.trouble.calls > 0;
        let limit = self.call.policy.config.resume_timeout();
        if prefills_elsewhere && self.trouble.broke.elapsed() >= limit {
            return Some("no token came in time from where the stream moved to");
        }
        let at_gap = self.gap.is_some_and(|gap| silent >= gap);
        (self.stays && at_gap && self.has_stalled(silent))
            .then_some("the engine sent nothing for longer than the limit between tokens")
    }

    fn look(&self, silent: Duration) -> Option<Cause> {
        if self.has_stalled(silent) {
            return Some(Cause::Stall);
        }
        let cause = match condition(&*self.endpoint()?) {
            Condition::Well => return None,
            Condition::Dead if silent < LIVE_MAX => return None,
            Condition::Dead => Cause::Stall,
            Condition::Leaving => Cause::Leaving,
        };
        self.call
            .has_other(self.leg.engine.as_ref())
            .then_some(cause)
    }

    /// Ready when the stream should not stay where it is.
    fn poll_watch(&mut self, cx: &mut Context<'_>) -> Poll<Cause> {
        loop {
            let look = (self.stall / 4).clamp(LOOK_MIN, LOOK_MAX);
            let Some(timer) = &mut self.timer else {
                self.timer = Some(Box::pin(tokio::time::sleep(look)));
                continue;
            };
            ready!(timer.as_mut().poll(cx));
            let silent = self.last.elapsed();
            let at_gap = self.gap.map(|gap| gap.saturating_sub(silent).max(LOOK_MIN));
            let pause = look.min(at_gap.unwrap_or(look));
            timer.as_mut().reset(tokio::time::Instant::now() + pause);
            if !self.stays
                && let Some(cause) = self.look(silent)
            {
                return Poll::Ready(cause);
            }
            if let Some(text) = self.overdue(silent) {
                let flag = Flag::StreamIdleTimeout;
                metrics::counter!("outrigger_stream_timeouts_total", "kind" => flag.as_str())
                    .increment(1);
                return Poll::Ready(Cause::Broke(BodyError::new(flag, text)));
            }
        }
    }

    /// The next that the leg brings: bytes for the client, or a cause to leave it.
    fn poll_leg(&mut self, cx: &mut Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        loop {
            if self.broke.is_some() {
                return Poll::Ready(None);
            }
            if let Some(bytes) = self.take_events() {
                return Poll::Ready(Some(Frame::data(bytes)));
            }
            if self.broke.is_some() {
                return Poll::Ready(None);
            }
            match Pin::new(&mut self.leg.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    self.last = Instant::now();
                    match frame.into_data() {
                        Ok(data) => self.leg.take(data),
                        Err(trailers) => return Poll::Ready(Some(trailers)),
                    }
                }
                Poll::Ready(Some(Err(error))) => self.broke = Some(Cause::Broke(error)),
                Poll::Ready(None) if self.splice.may_end() => {
                    self.end(End::Complete);
                    let rest = std::mem::take(&mut self.leg.pending);
                    return Poll::Ready((rest.has_remaining()).then(|| Frame::data(rest)));
                }
                Poll::Ready(None) => self.broke = Some(Cause::Truncated),
                Poll::Pending => self.broke = Some(ready!(self.poll_watch(cx))),
            }
        }
    }
}

impl Body for Migrating {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        loop {
            let now = match &mut this.state {
                State::Over => return Poll::Ready(None),
                State::Live => {
                    if let Some(frame) = ready!(this.poll_leg(cx)) {
                        return Poll::Ready(Some(Ok(frame)));
                    }
                    match this.broke.take() {
                        Some(cause) => this.leave(cause),
                        None => continue,
                    }
                }
                State::Telling(cause, place, future) => {
                    let told = ready!(future.as_mut().poll(cx));
                    let (cause, place) = (cause.clone(), place.take());
                    this.retell(cause, place, told)
                }
                State::Moving(cause, future) => {
                    let moved = ready!(future.as_mut().poll(cx));
                    let cause = cause.clone();
                    this.state = State::Live;
                    this.arrive(cause, moved)
                }
            };
            if let Some(now) = now {
                return Poll::Ready(Some(now.map(Frame::data)));
            }
        }
    }
}
