//! What real requests prove of the engine beside us, and when it last did anything at all.

use outrigger_filters::endpoints::Live;
use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Instant,
};

/// Counted by requests, read by the engine's canary.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Pieces of streams.
    pieces: AtomicU64,
    failures: AtomicU64,
}

impl Traffic {
    /// A piece of a stream came: the engine works.
    pub fn piece(&self) {
        self.pieces.fetch_add(1, Relaxed);
    }

    /// A request failed, and it is the engine's fault.
    pub fn failed(&self) {
        self.failures.fetch_add(1, Relaxed);
    }
}

/// What moves while an engine works. Requests that wait move nothing: a hung engine has them, too.
#[derive(Debug, PartialEq)]
struct Figures {
    tokens: Option<u64>,
    kv_usage: f64,
    pieces: u64,
}

/// What was last seen of an engine.
#[derive(Debug)]
pub(super) struct Watch {
    figures: Option<Figures>,
    /// When it last did something.
    moved_at: Instant,
    failures: u64,
}

impl Watch {
    pub(super) fn new(traffic: &Traffic, now: Instant) -> Self {
        Self {
            figures: None,
            moved_at: now,
            failures: traffic.failures.load(Relaxed),
        }
    }

    /// Looks again.
    pub(super) fn look(&mut self, live: &Live, traffic: &Traffic, now: Instant) {
        let figures = Some(Figures {
            tokens: live.load.engine_tokens,
            kv_usage: live.load.kv_usage,
            pieces: traffic.pieces.load(Relaxed),
        });
        if self.figures.is_some() && self.figures != figures {
            self.moved_at = now;
        }
        self.figures = figures;
    }

    /// When it last did something.
    pub(super) fn moved_at(&self) -> Instant {
        self.moved_at
    }

    /// Whether requests failed since this was last asked.
    pub(super) fn take_failures(&mut self, traffic: &Traffic) -> bool {
        let before = std::mem::replace(&mut self.failures, traffic.failures.load(Relaxed));
        self.failures != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::report::Load;
    use std::time::Duration;

    fn live(tokens: u64, kv_usage: f64, waiting: u64) -> Live {
        Live {
            load: Load {
                engine_tokens: Some(tokens),
                kv_usage,
                waiting,
                ..Load::default()
            },
            ..Live::default()
        }
    }

    #[test]
    fn tokens_blocks_and_streams_are_movement_and_requests_that_wait_are_not() {
        let traffic = Traffic::default();
        let mut now = Instant::now();
        let mut watch = Watch::new(&traffic, now);
        watch.look(&live(1, 0.1, 0), &traffic, now);
        let mut moves = |live: &Live, traffic: &Traffic| {
            now += Duration::from_secs(1);
            watch.look(live, traffic, now);
            watch.moved_at() == now
        };
        assert!(!moves(&live(1, 0.1, 5), &traffic), "only the queue grew");
        assert!(moves(&live(2, 0.1, 5), &traffic));
        assert!(
            moves(&live(2, 0.2, 5), &traffic),
            "a piece of a long prompt"
        );
        assert!(!moves(&live(2, 0.2, 5), &traffic));
        traffic.piece();
        assert!(moves(&live(2, 0.2, 5), &traffic));
    }

    #[test]
    fn failures_are_taken_once() {
        let traffic = Traffic::default();
        let mut watch = Watch::new(&traffic, Instant::now());
        assert!(!watch.take_failures(&traffic));
        traffic.failed();
        assert!(watch.take_failures(&traffic));
        assert!(!watch.take_failures(&traffic));
    }
}
