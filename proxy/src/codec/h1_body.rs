//! The body of an HTTP/1 request that did not come whole with its head: read by its connection when, and only when, its
//! reader asks. Between the two, which may be different tasks, stands one frame at most.

use crate::h1::decoder::Decoder;
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use outrigger_filters::{
    body::{BodyError, ClientBody},
    error::Flag,
};
use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

/// What stands between the connection and whoever reads the body.
#[derive(Default)]
struct Between {
    frame: Option<Result<Bytes, BodyError>>,
    trailers: Option<Box<HeaderMap>>,
    /// Nothing comes after these.
    over: bool,
    /// The reader has asked for more than there is.
    wanted: bool,
    /// The client waits for a word before it sends, and is to get it when the body is asked for.
    expects: bool,
    /// There is no reader any more.
    dropped: bool,
    reader: Option<Waker>,
    feeder: Option<Waker>,
}

type Shared = Arc<Mutex<Between>>;

fn lock(shared: &Shared) -> MutexGuard<'_, Between> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The connection's side.
pub(super) struct Feeder {
    shared: Shared,
    pub(super) decoder: Decoder,
}

/// What the reader is waiting for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Demand {
    /// Nothing now. Whoever asked is woken when that changes.
    Nothing,
    /// The next piece.
    Piece,
    /// A word to the client; then ask again.
    Word,
    /// It has gone.
    Dropped,
}

/// A body, of which `first` came with its head; if that was all, the trailers too.
pub(super) fn streaming(
    decoder: Decoder,
    first: Bytes,
    trailers: Option<Box<HeaderMap>>,
    (is_sized, expects): (bool, bool),
) -> (ClientBody, Feeder) {
    let shared = Shared::default();
    let here = first.len() as u64;
    let body = Incoming {
        left: decoder.left().filter(|_| is_sized).map(|left| left + here),
        is_over: false,
        shared: shared.clone(),
    };
    let mut feeder = Feeder { shared, decoder };
    lock(&feeder.shared).expects = expects;
    if here > 0 || feeder.is_all_here() {
        feeder.give(first, trailers, None);
    }
    (ClientBody::Streams(body.boxed_unsync()), feeder)
}

impl Feeder {
    /// Whether all has come, or nothing more can.
    pub(super) fn is_over(&self) -> bool {
        self.is_all_here() && !lock(&self.shared).expects
    }

    fn is_all_here(&self) -> bool {
        matches!(self.decoder, Decoder::Done | Decoder::Broken)
    }

    /// What is to be done for the reader.
    pub(super) fn demand(&self, cx: &Context<'_>) -> Demand {
        let mut between = lock(&self.shared);
        remember(&mut between.feeder, cx);
        match *between {
            Between { dropped: true, .. } => Demand::Dropped,
            Between { wanted: false, .. } => Demand::Nothing,
            Between { expects: true, .. } => Demand::Word,
            _ => Demand::Piece,
        }
    }

    /// The client needs no word any more: it got it, or an answer.
    pub(super) fn said(&self, cx: &Context<'_>) {
        let mut between = lock(&self.shared);
        between.expects = false;
        between.serve(Some(cx));
    }

    /// What came, already decoded.
    pub(super) fn give(
        &mut self,
        data: Bytes,
        trailers: Option<Box<HeaderMap>>,
        cx: Option<&Context<'_>>,
    ) {
        let mut between = lock(&self.shared);
        between.over = self.is_all_here();
        between.trailers = trailers;
        // What stands before a break is not worth a piece of its own.
        between.frame = match self.decoder {
            Decoder::Broken => Some(Err(garbage())),
            _ if data.is_empty() => None,
            _ => Some(Ok(data)),
        };
        between.serve(cx);
    }

    /// Nothing more can come.
    pub(super) fn fail(&mut self, error: BodyError) {
        self.decoder = Decoder::Broken;
        let mut between = lock(&self.shared);
        between.over = true;
        between.frame = Some(Err(error));
        between.serve(None);
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        let mut between = lock(&self.shared);
        // No word will be said any more: whoever waits for the body is told what there is, or why not.
        between.expects = false;
        if !between.over {
            between.over = true;
            between.frame = Some(Err(gone("the connection ended")));
        }
        between.serve(None);
    }
}

impl Between {
    /// Whoever waits is woken if there is something; not the task that `cx` is of: it looks by itself.
    fn serve(&mut self, cx: Option<&Context<'_>>) {
        let here = self.frame.is_some() || self.over;
        if !here || self.expects {
            return;
        }
        self.wanted = false;
        let reader = self.reader.take();
        let other = reader.filter(|reader| !cx.is_some_and(|cx| reader.will_wake(cx.waker())));
        if let Some(reader) = other {
            reader.wake();
        }
    }
}

fn remember(place: &mut Option<Waker>, cx: &Context<'_>) {
    if !place
        .as_ref()
        .is_some_and(|waker| waker.will_wake(cx.waker()))
    {
        *place = Some(cx.waker().clone());
    }
}

/// The client went away in the middle of its body.
pub(super) fn gone(why: &str) -> BodyError {
    BodyError::new(
        Flag::DownstreamConnectionTermination,
        format_args!("client's body broke: {why}"),
    )
}

fn garbage() -> BodyError {
    BodyError::new(
        Flag::DownstreamProtocolError,
        "client's body broke: what came is no chunk",
    )
}

/// The reader's side.
struct Incoming {
    shared: Shared,
    /// Bytes that were announced and not read.
    left: Option<u64>,
    /// The end, or a break, was read.
    is_over: bool,
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let shared = self.shared.clone();
        let mut between = lock(&shared);
        if !between.expects {
            match between.frame.take() {
                Some(Ok(data)) => {
                    let count = data.len() as u64;
                    self.left = self.left.map(|left| left.saturating_sub(count));
                    self.is_over = between.over && between.trailers.is_none();
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => {
                    self.is_over = true;
                    return Poll::Ready(Some(Err(error)));
                }
                None if between.over => {
                    self.is_over = true;
                    let trailers = between.trailers.take();
                    return Poll::Ready(trailers.map(|all| Ok(Frame::trailers(*all))));
                }
                None => {}
            }
        }
        between.wanted = true;
        remember(&mut between.reader, cx);
        // In the connection's own task it looks by itself.
        if let Some(feeder) = between
            .feeder
            .take_if(|feeder| !feeder.will_wake(cx.waker()))
        {
            feeder.wake();
        }
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || self.left == Some(0)
    }

    fn size_hint(&self) -> SizeHint {
        self.left
            .map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        let mut between = lock(&self.shared);
        between.dropped = true;
        if let Some(feeder) = between.feeder.take() {
            feeder.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Wake;

    #[derive(Default)]
    struct Woken(std::sync::atomic::AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }

    impl Woken {
        fn times(&self) -> usize {
            self.0.load(std::sync::atomic::Ordering::Relaxed)
        }
    }

    /// The text of the next frame; empty if there is none yet.
    fn next(body: &mut ClientBody, cx: &mut Context<'_>) -> String {
        match Pin::new(body).poll_frame(cx) {
            Poll::Pending => String::new(),
            Poll::Ready(None) => "end".into(),
            Poll::Ready(Some(Err(error))) => error.flag.as_str().into(),
            Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => String::from_utf8(data.to_vec()).unwrap(),
                Err(frame) => format!("{} trailers", frame.into_trailers().unwrap().len()),
            },
        }
    }

    #[test]
    fn a_piece_is_read_when_it_is_asked_for_by_whichever_task() {
        let (connection, reader) = (Arc::new(Woken::default()), Arc::new(Woken::default()));
        let (ours, theirs) = (connection.clone().into(), reader.clone().into());
        let (mut here, mut there) = (Context::from_waker(&ours), Context::from_waker(&theirs));
        let (mut body, mut feeder) =
            streaming(Decoder::Length(3), "one".into(), None, (true, false));
        assert_eq!(body.size_hint().exact(), Some(6));
        assert_eq!(feeder.demand(&here), Demand::Nothing);
        assert_eq!(next(&mut body, &mut there), "one");
        assert_eq!(
            (feeder.demand(&here), connection.times()),
            (Demand::Nothing, 0)
        );
        assert_eq!(next(&mut body, &mut there), "");
        assert_eq!(
            (feeder.demand(&here), connection.times()),
            (Demand::Piece, 1)
        );
        feeder.decoder = Decoder::Done;
        feeder.give("two".into(), None, Some(&here));
        assert_eq!((reader.times(), feeder.is_over()), (1, true));
        drop(feeder);
        assert_eq!(next(&mut body, &mut there), "two");
        assert!(body.is_end_stream() && body.size_hint().exact() == Some(0));
        assert_eq!(next(&mut body, &mut here), "end");
    }

    #[test]
    fn in_the_connections_own_task_nobody_is_woken() {
        let woken = Arc::new(Woken::default());
        let waker = woken.clone().into();
        let mut cx = Context::from_waker(&waker);
        let (mut body, mut feeder) =
            streaming(Decoder::chunked(), Bytes::new(), None, (false, false));
        assert_eq!(feeder.demand(&cx), Demand::Nothing);
        assert_eq!(next(&mut body, &mut cx), "");
        assert_eq!(feeder.demand(&cx), Demand::Piece);
        feeder.give("one".into(), None, Some(&cx));
        assert_eq!(next(&mut body, &mut cx), "one");
        assert_eq!(woken.times(), 0);
    }

    #[test]
    fn a_word_comes_before_what_is_there_already() {
        let mut cx = Context::from_waker(Waker::noop());
        let (mut body, feeder) = streaming(Decoder::Done, "one".into(), None, (false, true));
        assert!(!feeder.is_over(), "the word is still to be said");
        assert_eq!(feeder.demand(&cx), Demand::Nothing);
        assert_eq!(next(&mut body, &mut cx), "");
        assert_eq!(feeder.demand(&cx), Demand::Word);
        feeder.said(&cx);
        assert!(feeder.is_over());
        assert_eq!(next(&mut body, &mut cx), "one");
        assert_eq!(next(&mut body, &mut cx), "end");
    }

    #[test]
    fn a_body_ends_with_its_trailers_or_says_why_not() {
        let mut cx = Context::from_waker(Waker::noop());
        let mut trailers = Box::new(HeaderMap::new());
        trailers.insert("x-sum", http::HeaderValue::from_static("1"));
        let trailers = Some(trailers);
        let (mut body, _feeder) = streaming(Decoder::Done, "one".into(), trailers, (false, false));
        for expected in ["one", "1 trailers", "end"] {
            assert_eq!(next(&mut body, &mut cx), expected);
        }
        let (mut body, _feeder) = streaming(Decoder::Broken, "one".into(), None, (false, false));
        assert_eq!(next(&mut body, &mut cx), "DPE");
        let (mut body, feeder) = streaming(Decoder::Length(3), "one".into(), None, (true, false));
        drop(feeder);
        assert_eq!(next(&mut body, &mut cx), "DC", "the connection ended");
        let (body, feeder) = streaming(Decoder::Length(3), "one".into(), None, (true, false));
        drop(body);
        assert_eq!(feeder.demand(&cx), Demand::Dropped);
    }

    #[test]
    fn a_reader_was_left_waiting_for_a_word_that_nobody_says_any_more() {
        let reader = Arc::new(Woken::default());
        let waker = reader.clone().into();
        for (decoder, expected) in [(Decoder::Length(3), "DC"), (Decoder::Done, "one")] {
            let mut cx = Context::from_waker(&waker);
            let (mut body, feeder) = streaming(decoder, "one".into(), None, (false, true));
            assert_eq!(next(&mut body, &mut cx), "");
            let before = reader.times();
            drop(feeder);
            assert_eq!(reader.times(), before + 1);
            assert_eq!(next(&mut body, &mut cx), expected);
        }
    }
}
