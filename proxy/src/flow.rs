//! Time limits of a response body: between tokens, in all.
//!
//! The timer is armed once and looks at the clock when it fires, so that an event costs no timer operation.

use crate::{snapshot::HttpConfig, upstream::headers_within};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use outrigger_filters::{
    body::{BodyError, ResponseBody, Upload, UploadState},
    error::{Error, Flag, GivenUp},
    filter::Context as Request,
};
use std::{
    future::Future,
    pin::{Pin, pin},
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, Sleep};

/// Limits of one body; `None` is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct FlowLimits {
    /// Between two reads that bring something.
    pub(crate) gap: Option<Duration>,
    /// When it must be over.
    pub(crate) until: Option<std::time::Instant>,
    /// The total is a route's `timeout`, not the limit of a generation.
    pub(crate) of_route: bool,
}

impl FlowLimits {
    fn total_flag(self) -> Flag {
        if self.of_route {
            Flag::UpstreamRequestTimeout
        } else {
            Flag::DurationTimeout
        }
    }
}

/// Limits of the response body: `openai`'s where it parsed a generation, else the connection manager's.
pub(crate) fn limits(config: &HttpConfig, context: &Request) -> FlowLimits {
    let mut generation = false;
    let gap = match &context.openai {
        Some(openai) if openai.may_stream_tokens() => {
            generation = true;
            openai
                .limits
                .inter_token_timeout
                .filter(|_| !context.watches_gaps)
        }
        _ => {
            let of_route = context.route.idle_timeout;
            Some(of_route.unwrap_or(config.manager.stream_idle_timeout))
                .filter(|gap| !gap.is_zero())
        }
    };
    let total = context.total_timeout();
    let complete = total.map(|total| context.complete_since() + total);
    let stream = stream_end(context);
    FlowLimits {
        gap,
        until: complete.into_iter().chain(stream).min(),
        of_route: !generation
            && complete.is_some_and(|complete| stream.is_none_or(|stream| complete <= stream)),
    }
}

/// When an exchange must be over, if its route says so.
pub(crate) fn stream_end(context: &Request) -> Option<std::time::Instant> {
    let limit = context.route.max_stream_duration?;
    Some(context.received.unwrap_or_else(std::time::Instant::now) + limit)
}

/// How long a route lets its client wait for a response to begin.
pub(crate) struct Patience {
    idle: Option<Duration>,
    until: Option<std::time::Instant>,
    upload: Option<Upload>,
    given_up: GivenUp,
}

impl Patience {
    /// `None` for nearly all routes. Those with `openai` know better how long an engine may think.
    pub(crate) fn of(context: &Request, openai: bool) -> Option<Self> {
        let idle = context.route.idle_timeout;
        let idle = idle.filter(|idle| !openai && !idle.is_zero());
        let until = stream_end(context);
        (idle.is_some() || until.is_some()).then(|| Self {
            idle,
            until,
            upload: context.upload.clone(),
            given_up: context.given_up.clone(),
        })
    }

    /// The answer, if it comes in time.
    pub(crate) async fn wait<T>(
        self,
        answer: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        // Dropped after the reason is noted.
        let mut answer = pin!(answer);
        let within = headers_within(self.idle, self.upload.as_ref(), idle, answer.as_mut());
        let waited = match self.until {
            None => within.await,
            Some(until) => match tokio::time::timeout_at(until.into(), within).await {
                Ok(waited) => waited,
                Err(_) => Err(too_long()),
            },
        };
        waited.unwrap_or_else(|error| {
            if !self.is_uploading() {
                self.given_up.note(error.flag);
            }
            Err(error)
        })
    }

    /// It is the client that is waited for.
    fn is_uploading(&self) -> bool {
        let upload = self.upload.as_ref().map(Upload::state);
        matches!(upload, Some(UploadState::Runs(_)))
    }
}

fn too_long() -> Error {
    count(Error::duration_timeout())
}

fn idle() -> Error {
    count(Error::stream_idle(false))
}

fn count(error: Error) -> Error {
    metrics::counter!("outrigger_stream_timeouts_total", "kind" => error.flag.as_str())
        .increment(1);
    error
}

/// Puts a body under its limits; why it is given up at one of them is noted.
pub(crate) fn limit(body: ResponseBody, limits: FlowLimits, given_up: GivenUp) -> ResponseBody {
    if limits == FlowLimits::default() || body.is_end_stream() {
        return body;
    }
    Limited {
        body,
        limits,
        last: Instant::now(),
        timer: None,
        given_up,
    }
    .boxed_unsync()
}

struct Limited {
    body: ResponseBody,
    limits: FlowLimits,
    last: Instant,
    timer: Option<Pin<Box<Sleep>>>,
    given_up: GivenUp,
}

impl Limited {
    fn deadline(&self) -> Option<(Instant, Flag)> {
        let gap = self
            .limits
            .gap
            .map(|gap| (self.last + gap, Flag::StreamIdleTimeout));
        let total = self
            .limits
            .until
            .map(|until| (until.into(), self.limits.total_flag()));
        [gap, total].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// Ready when a limit is passed.
    fn poll_limit(&mut self, cx: &mut Context<'_>) -> Poll<BodyError> {
        loop {
            let Some((at, flag)) = self.deadline() else {
                return Poll::Pending;
            };
            if at <= Instant::now() {
                let text = match flag {
                    Flag::DurationTimeout | Flag::UpstreamRequestTimeout => {
                        "the response took longer than its total limit"
                    }
                    _ => "the engine sent nothing for longer than the limit between tokens",
                };
                metrics::counter!("outrigger_stream_timeouts_total", "kind" => flag.as_str())
                    .increment(1);
                self.given_up.note(flag);
                return Poll::Ready(BodyError::new(flag, text));
            }
            match &mut self.timer {
                Some(timer) => {
                    if timer.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                    timer.as_mut().reset(at);
                }
                None => self.timer = Some(Box::pin(tokio::time::sleep_until(at))),
            }
        }
    }
}

impl Body for Limited {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(frame) => {
                self.last = Instant::now();
                Poll::Ready(frame)
            }
            Poll::Pending => self.poll_limit(cx).map(|error| Some(Err(error))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::StreamBody;

    /// A body that sends `count` frames, one each `pace`, and then stalls.
    fn stalling(count: u32, pace: Duration) -> ResponseBody {
        let stream = futures_util::stream::unfold(0, move |sent| async move {
            if sent == count {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(pace).await;
            Some((Ok(Frame::data(Bytes::from_static(b"x"))), sent + 1))
        });
        StreamBody::new(stream).boxed_unsync()
    }

    async fn run(limits: FlowLimits) -> (usize, Flag) {
        let given_up = GivenUp::default();
        let body = stalling(5, Duration::from_millis(10));
        let mut body = limit(body, limits, given_up.clone());
        let mut frames = 0;
        loop {
            match body.frame().await {
                Some(Ok(_)) => frames += 1,
                Some(Err(error)) => {
                    assert_eq!(given_up.reason(), Some(error.flag));
                    return (frames, error.flag);
                }
                None => panic!("a stalled body has no end"),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stall_is_noticed_and_a_live_stream_is_not_cut() {
        let limits = FlowLimits {
            gap: Some(Duration::from_millis(30)),
            until: None,
            of_route: false,
        };
        assert_eq!(run(limits).await, (5, Flag::StreamIdleTimeout));
    }

    #[tokio::test(start_paused = true)]
    async fn the_total_holds() {
        let limits = FlowLimits {
            gap: Some(Duration::from_secs(1)),
            until: Some((Instant::now() + Duration::from_millis(35)).into_std()),
            of_route: false,
        };
        assert_eq!(run(limits).await, (3, Flag::DurationTimeout));
    }
}
