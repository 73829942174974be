//! One engine's part of a stream, and those who watch it.

use super::budget::Counted;
use crate::{
    body::{ResponseBody, empty},
    filter::{End, LogFields, StreamObserver},
    sse::Event,
};
use bytes::{Bytes, BytesMut};
use outrigger_xds::report::EngineId;
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Instant,
};

/// What the access log will say, told by the body to an observer of the same response.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) moves: AtomicU32,
    pub(super) engine: Mutex<Option<EngineId>>,
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

/// One engine's part of a stream.
pub(super) struct Leg {
    pub(super) body: ResponseBody,
    /// Came, and is not looked at yet.
    pub(super) pending: Bytes,
    /// Of filters that run once per call.
    observers: Vec<Box<dyn StreamObserver>>,
    pub(super) engine: Option<EngineId>,
    /// Chunks that came: what there is to say of tokens.
    pub(super) chunks: u64,
    /// Its place among the streams in prefill, until the first of them.
    place: Option<Counted>,
    pub(super) end: End,
}

impl Drop for Leg {
    /// Observers are told the end of every leg, whatever it was. The log is the whole stream's, and not theirs.
    fn drop(&mut self) {
        let mut log = LogFields {
            tokens_seen: (self.chunks > 0).then_some(self.chunks),
            ..LogFields::default()
        };
        for observer in &mut self.observers {
            observer.on_end(self.end, &mut log);
        }
    }
}

impl Leg {
    /// Nothing of it was looked at yet.
    pub(super) fn new(
        body: ResponseBody,
        observers: Vec<Box<dyn StreamObserver>>,
        engine: Option<EngineId>,
        place: Option<Counted>,
    ) -> Self {
        Self {
            body,
            pending: Bytes::new(),
            observers,
            engine,
            chunks: 0,
            place,
            end: End::ClientGone,
        }
    }

    /// Shows an event to those who watch.
    pub(super) fn note(&mut self, event: &Event<'_>, at: Instant) {
        if event.data().starts_with(b"{") {
            self.chunks += 1;
            self.place = None;
        }
        for observer in &mut self.observers {
            observer.on_event(event, at);
        }
    }

    /// Whoever watches it goes on watching elsewhere.
    pub(super) fn hand_over(mut self) -> (ResponseBody, Vec<Box<dyn StreamObserver>>) {
        let observers = std::mem::take(&mut self.observers);
        (std::mem::replace(&mut self.body, empty()), observers)
    }

    /// Takes in what the engine sent.
    pub(super) fn take(&mut self, data: Bytes) {
        if self.pending.is_empty() {
            self.pending = data;
        } else {
            let mut joined = BytesMut::with_capacity(self.pending.len() + data.len());
            joined.extend_from_slice(&self.pending);
            joined.extend_from_slice(&data);
            self.pending = joined.freeze();
        }
    }
}
