//! What real requests prove of the engine beside us, and when it last did anything at all.

use outrigger_filters::endpoints::Live;
use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Instant,
};

/// Counted by requests, read by the engine's canary.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Whether anybody wants to know: a canary runs.
    watched: AtomicBool,
    /// Pieces of answers.
    pieces: AtomicU64,
    failures: AtomicU64,
}

impl Traffic {
    pub(super) fn watch(&self, watched: bool) {
        self.watched.store(watched, Relaxed);
    }

    /// Whether its canary wants to know of the pieces of answers.
    pub fn is_watched(&self) -> bool {
        self.watched.load(Relaxed)
    }

    /// A piece of an answer came: the engine works.
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
    /// When a request last got something of it.
    served_at: Instant,
    /// Whether its own figures were ever told.
    tells_figures: bool,
    failures: u64,
}

impl Watch {
    pub(super) fn new(traffic: &Traffic, now: Instant) -> Self {
        Self {
            figures: None,
            moved_at: now,
            served_at: now,
            tells_figures: false,
            failures: traffic.failures.load(Relaxed),
        }
    }

    /// Looks again.
    pub(super) fn look(&mut self, live: &Live, traffic: &Traffic, now: Instant) {
        let load = &live.load;
        self.tells_figures |= load.engine_tokens.is_some() || load.kv_usage > 0.0;
        let figures = Figures {
            tokens: load.engine_tokens,
            kv_usage: load.kv_usage,
            pieces: traffic.pieces.load(Relaxed),
        };
        let before = self.figures.replace(figures);
        let after = self.figures.as_ref();
        if before.is_some() && before.as_ref() != after {
            self.moved_at = now;
            // Without requests it was a probe that moved them: that proves nothing against a probe that fails.
            let is_answered =
                before.map(|figures| figures.pieces) != after.map(|figures| figures.pieces);
            if is_answered || load.active_requests > 0 {
                self.served_at = now;
            }
        }
    }

    /// Whether it would be seen to work while its requests get nothing.
    pub(super) fn tells_figures(&self) -> bool {
        self.tells_figures
    }

    /// When it last did something.
    pub(super) fn moved_at(&self) -> Instant {
        self.moved_at
    }

    /// When a request last got something of it, or was worked for.
    pub(super) fn served_at(&self) -> Instant {
        self.served_at
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
    fn what_probes_alone_move_serves_nobody() {
        let traffic = Traffic::default();
        let mut now = Instant::now();
        let mut watch = Watch::new(&traffic, now);
        watch.look(&live(1, 0.0, 0), &traffic, now);
        let mut serves = |live: &Live, traffic: &Traffic| {
            now += Duration::from_secs(1);
            watch.look(live, traffic, now);
            watch.served_at() == now
        };
        assert!(!serves(&live(2, 0.0, 0), &traffic));
        let mut busy = live(3, 0.0, 0);
        busy.load.active_requests = 1;
        assert!(serves(&busy, &traffic));
        assert!(!serves(&busy, &traffic), "it stands still");
        traffic.piece();
        assert!(serves(&live(3, 0.0, 0), &traffic));
    }

    #[test]
    fn an_engine_without_figures_is_known_as_such() {
        let (traffic, now) = (Traffic::default(), Instant::now());
        let mut watch = Watch::new(&traffic, now);
        watch.look(&Live::default(), &traffic, now);
        assert!(!watch.tells_figures());
        watch.look(&live(0, 0.0, 0), &traffic, now);
        watch.look(&Live::default(), &traffic, now);
        assert!(watch.tells_figures());
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
