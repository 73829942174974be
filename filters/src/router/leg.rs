//! The body of a response, tied to the reservation that made room for it.

use super::report::{self, Audience};
use crate::{
    body::{BodyError, ResponseBody, is_over},
    endpoints::{Endpoint, Reservation},
    error::Flag,
    sse,
    trace::Step,
};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

/// A response body whose end ends its reservation. It may begin with a frame that was already taken out to look at.
pub struct Leg {
    peeked: Option<Frame<Bytes>>,
    inner: ResponseBody,
    endpoint: Arc<Endpoint>,
    reservation: Option<Box<dyn Reservation>>,
    /// Who sees load reports.
    audience: Audience,
    /// How long tokens are waited for, if somebody wants to know.
    waits: Option<Waits>,
    /// What is told of this attempt, if its request is traced.
    step: Option<Step>,
    /// Whoever drops it before its end gives up something.
    wanted: bool,
    /// Whether somebody wants to know what comes.
    watched: bool,
}

/// So many waits are told as one.
const WAITS_TOLD: u32 = 16;

/// The waits for the upstream: while a client is slow, nobody waits, and nothing is held against the endpoint.
#[derive(Debug, Default)]
struct Waits {
    since: Option<Instant>,
    sum: Duration,
    count: u32,
}

impl Waits {
    /// A look at the body; gives the mean of some waits now and then.
    fn look(&mut self, ready: bool) -> Option<Duration> {
        if !ready {
            self.since.get_or_insert_with(Instant::now);
            return None;
        }
        self.sum += self.since.take()?.elapsed();
        self.count += 1;
        if self.count < WAITS_TOLD {
            return None;
        }
        self.tell()
    }

    /// The mean of those not told yet.
    fn tell(&mut self) -> Option<Duration> {
        let mean = self.sum.checked_div(self.count)?;
        (self.sum, self.count) = (Duration::ZERO, 0);
        Some(mean)
    }
}

impl Leg {
    /// Ties `inner` to its reservation.
    #[must_use]
    pub fn new(
        peeked: Option<Frame<Bytes>>,
        inner: ResponseBody,
        endpoint: Arc<Endpoint>,
        reservation: Box<dyn Reservation>,
        audience: Audience,
    ) -> Self {
        Self {
            peeked,
            inner,
            endpoint,
            reservation: Some(reservation),
            audience,
            waits: None,
            step: None,
            wanted: true,
            watched: false,
        }
    }

    /// The attempt is over when this is. One that is not `wanted` may be dropped for another.
    #[must_use]
    pub fn traced(mut self, step: Option<Step>, wanted: bool) -> Self {
        (self.step, self.wanted) = (step, wanted);
        self
    }

    /// An engine had to compute the body, and the reservation wants to know that it comes.
    #[must_use]
    pub fn watched(mut self) -> Self {
        self.watched = true;
        self
    }

    /// The body is a stream of tokens, whose first is there: waits for the others are told.
    #[must_use]
    pub fn watching(mut self) -> Self {
        self.waits = Some(Waits::default());
        self
    }

    /// A frame came.
    fn piece(&mut self, frame: &Frame<Bytes>) {
        let Some(reservation) = &mut self.reservation else {
            return;
        };
        reservation.first_byte();
        if self.watched
            && let Some(raw) = frame.data_ref()
        {
            reservation.answer_piece(reports_failure(raw));
        }
    }

    fn later_token(&mut self, waited: Option<Duration>) {
        if let (Some(waited), Some(reservation)) = (waited, &mut self.reservation) {
            reservation.later_token(waited);
        }
    }

    /// Takes in the load report that trailers may bring.
    fn trailers(&mut self, frame: Frame<Bytes>) -> Frame<Bytes> {
        match (frame.into_trailers(), &mut self.reservation) {
            (Ok(mut trailers), Some(reservation)) => {
                report::take(&mut trailers, &mut **reservation, self.audience);
                Frame::trailers(trailers)
            }
            (Ok(trailers), None) => Frame::trailers(trailers),
            (Err(other), _) => other,
        }
    }

    fn finish(&mut self, broken: Option<Flag>) {
        if let (Some(mut step), Some(flag)) = (self.step.take(), broken) {
            step.tell("outrigger.broken", flag.as_str());
            step.fail();
        }
        if let Some(mut reservation) = self.reservation.take() {
            reservation.finish(broken);
        }
    }
}

/// Whether one of these events is the engine's report of its own failure. One that is cut into pieces is not seen.
fn reports_failure(mut raw: &[u8]) -> bool {
    loop {
        let event = sse::Event { raw };
        if event.is_error() {
            return !event.blames_request();
        }
        match sse::event_length(raw) {
            Some(length) if length < raw.len() => raw = &raw[length..],
            _ => return false,
        }
    }
}

impl Body for Leg {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(frame) = self.peeked.take() {
            self.piece(&frame);
            return Poll::Ready(Some(Ok(frame)));
        }
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if let Some(waits) = &mut self.waits {
            let waited = match &polled {
                Poll::Pending => waits.look(false),
                Poll::Ready(Some(Ok(frame))) if frame.is_data() => waits.look(true),
                Poll::Ready(_) => waits.tell(),
            };
            self.later_token(waited);
        }
        let mut frame = ready!(polled);
        if frame
            .as_ref()
            .is_some_and(|frame| frame.as_ref().is_ok_and(Frame::is_trailers))
        {
            frame = frame.map(|frame| frame.map(|frame| self.trailers(frame)));
        }
        match &frame {
            Some(Ok(frame)) => {
                self.piece(frame);
                if frame.is_trailers() {
                    self.finish(None);
                } else if self.inner.is_end_stream() {
                    // Nobody may ask for more.
                    self.step = None;
                }
            }
            Some(Err(error)) => {
                if error.flag != Flag::DownstreamConnectionTermination {
                    self.endpoint.inhibit();
                }
                self.finish(Some(error.flag));
            }
            None => self.finish(None),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.peeked.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = self.inner.size_hint();
        if let Some(peeked) = self.peeked.as_ref().and_then(Frame::data_ref) {
            let more = peeked.len() as u64;
            if let Some(upper) = hint.upper() {
                hint.set_upper(upper + more);
            }
            hint.set_lower(hint.lower() + more);
        }
        hint
    }
}

impl Drop for Leg {
    fn drop(&mut self) {
        if self.reservation.is_none() {
            return;
        }
        if self.peeked.is_none() && is_over(&self.inner) {
            self.finish(None);
        } else if let Some(step) = self.step.as_mut().filter(|_| self.wanted) {
            step.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_failure_is_found_behind_other_events_and_one_that_blames_the_request_is_none() {
        let token = r#"data: {"choices":[{"text":"{\"error\": 1}"}]}"#;
        let failure = r#"data: {"error":{"code":500}}"#;
        let blame = r#"data: {"error":{"code":400}}"#;
        for (events, expected) in [
            (vec![token], false),
            (vec![token, token], false),
            (vec![failure, "data: [DONE]"], true),
            (vec![token, failure, "data: [DONE]"], true),
            (vec![token, blame], false),
        ] {
            let raw = events.join("\n\n") + "\n\n";
            assert_eq!(reports_failure(raw.as_bytes()), expected, "{raw}");
        }
        assert!(!reports_failure(b""));
    }
}
