//! What outlier detection counts of an endpoint.

use crate::samples::Samples;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// How an endpoint's requests went, as outlier detection counts them.
#[derive(Debug, Default)]
pub struct Record {
    /// 5xx in a row.
    pub failures: AtomicU32,
    /// 502, 503 and 504 in a row.
    pub gateway_failures: AtomicU32,
    /// Failures to reach it in a row.
    pub local_failures: AtomicU32,
    /// Those without a 5xx are well.
    pub answered: Outcomes,
    /// Those that reached it are well; only where that is counted apart.
    pub local: Outcomes,
    /// When it was last ejected, on [`clock_ms`](super::clock_ms)'s clock.
    pub ejected_ms: AtomicU64,
    /// How often, less the intervals it was not.
    pub ejections: AtomicU32,
    /// What this ejection takes longer by chance.
    pub jitter_ms: AtomicU64,
    /// Times to first token in this interval, where somebody compares them.
    pub first_tokens: Samples,
    /// Times between tokens.
    pub later_tokens: Samples,
}

/// Requests of an interval.
#[derive(Debug, Default)]
pub struct Outcomes {
    requests: AtomicU64,
    successes: AtomicU64,
}

impl Outcomes {
    /// One more.
    pub fn count(&self, success: bool) {
        self.requests.fetch_add(1, Relaxed);
        if success {
            self.successes.fetch_add(1, Relaxed);
        }
    }

    /// How many there were, and how many of them, in percent, were well; counts anew. `None` if there were none.
    pub fn take(&self) -> Option<(u64, f64)> {
        let requests = self.requests.swap(0, Relaxed);
        let successes = self.successes.swap(0, Relaxed);
        (requests > 0).then(|| (requests, successes as f64 * 100.0 / requests as f64))
    }
}
