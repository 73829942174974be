//! What codec and connection manager tell each other of the exchange on an HTTP/1 connection.

use outrigger_filters::endpoints::clock_ms;
use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Of one connection. Of an HTTP/2 connection only [`Exchange::is_leaving`] says anything.
#[derive(Debug)]
pub(crate) struct Exchange {
    /// A request is with the connection manager, or its response is not over.
    busy: AtomicBool,
    /// Since when nothing runs, on [`clock_ms`]'s clock.
    rests_since_ms: AtomicU64,
    /// The connection is to end when nothing runs on it.
    leaving: AtomicBool,
}

impl Default for Exchange {
    fn default() -> Self {
        Self {
            busy: AtomicBool::default(),
            rests_since_ms: AtomicU64::new(clock_ms()),
            leaving: AtomicBool::default(),
        }
    }
}

impl Exchange {
    /// A request has come.
    pub(crate) fn begin(&self) {
        self.busy.store(true, Relaxed);
    }

    /// Its response is over, or nobody waits for it any more.
    pub(crate) fn end(&self) {
        self.rests_since_ms.store(clock_ms(), Relaxed);
        self.busy.store(false, Relaxed);
    }

    /// For how long nothing has run; `None` while something does.
    pub(super) fn rest(&self) -> Option<Duration> {
        let since = self.rests_since_ms.load(Relaxed);
        let busy = self.busy.load(Relaxed);
        (!busy).then(|| Duration::from_millis(clock_ms().saturating_sub(since)))
    }

    /// No further request is to be taken.
    pub(super) fn leave(&self) {
        self.leaving.store(true, Relaxed);
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.load(Relaxed)
    }
}
