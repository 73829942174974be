//! What codec and connection manager tell each other of the exchange on an HTTP/1 connection.

use outrigger_filters::endpoints::clock_ms;
use std::{
    sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Of one connection; an HTTP/2 connection leaves it alone.
#[derive(Debug)]
pub(crate) struct Exchange {
    /// A request is with the connection manager, or its response is not over.
    busy: AtomicBool,
    /// What is being written is the connection manager's response.
    answered: AtomicBool,
    /// The head that was remembered has been served.
    taken: AtomicBool,
    odd: AtomicU8,
    /// Since when nothing runs, on [`clock_ms`]'s clock.
    rests_since_ms: AtomicU64,
}

impl Default for Exchange {
    fn default() -> Self {
        Self {
            busy: AtomicBool::default(),
            answered: AtomicBool::default(),
            taken: AtomicBool::default(),
            odd: AtomicU8::default(),
            rests_since_ms: AtomicU64::new(clock_ms()),
        }
    }
}

/// What was seen in the bytes of a head, and that its parsed form does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Odd {
    /// Both `content-length` and `transfer-encoding` (hyper drops the first when it comes second).
    pub(crate) framed_twice: bool,
    /// The target has a fragment.
    pub(crate) fragment: bool,
    /// More than one `content-length`, though they agree.
    pub(crate) two_lengths: bool,
}

impl Exchange {
    /// A request has come; what was odd about its head.
    pub(crate) fn begun(&self) -> Odd {
        self.busy.store(true, Relaxed);
        self.answered.store(true, Relaxed);
        self.taken.store(true, Relaxed);
        let odd = self.odd.swap(0, Relaxed);
        Odd {
            framed_twice: odd & 1 != 0,
            fragment: odd & 2 != 0,
            two_lengths: odd & 4 != 0,
        }
    }

    /// Its response is over, or nobody waits for it any more.
    pub(crate) fn end(&self) {
        self.rests_since_ms.store(clock_ms(), Relaxed);
        self.busy.store(false, Relaxed);
    }

    pub(super) fn note(&self, odd: Odd) {
        let bits = u8::from(odd.framed_twice)
            | u8::from(odd.fragment) << 1
            | u8::from(odd.two_lengths) << 2;
        self.odd.store(bits, Relaxed);
    }

    /// For how long nothing has run; `None` while something does.
    pub(super) fn rest(&self) -> Option<Duration> {
        let since = self.rests_since_ms.load(Relaxed);
        (!self.is_busy()).then(|| Duration::from_millis(clock_ms().saturating_sub(since)))
    }

    pub(super) fn is_busy(&self) -> bool {
        self.busy.load(Relaxed)
    }

    /// Whether the head that was remembered went to the connection manager.
    pub(super) fn is_served(&self) -> bool {
        self.taken.load(Relaxed)
    }

    /// True once for each head that was served.
    pub(super) fn take_served(&self) -> bool {
        self.taken.swap(false, Relaxed)
    }

    pub(super) fn is_answered(&self) -> bool {
        self.answered.load(Relaxed)
    }

    /// Everything was written: what comes next is another answer, if nothing runs.
    pub(super) fn flushed(&self) {
        if !self.is_busy() {
            self.answered.store(false, Relaxed);
        }
    }
}
