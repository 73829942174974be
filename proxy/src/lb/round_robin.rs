//! Round robin, plain and by weight.
//!
//! By weight it is "earliest deadline first", as in Envoy, which is smooth: 5:1 is a a a b a a, not a burst of five. Each
//! endpoint has a turn in virtual time; whose is earliest is next, and its turn moves on by the inverse of its
//! weight. One that was away resumes at the present, so that it gets no burst. Two threads that choose at once may
//! take the same endpoint once more than its share; nothing waits.

use outrigger_filters::endpoints::Endpoint;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// One step of virtual time at weight 1.
const STEP: f64 = (1_u64 << 28) as f64;
/// Attempts to move a turn that others move too.
const RACES_MAX: usize = 8;

#[derive(Debug, Default)]
pub(super) struct Turns {
    next: AtomicUsize,
    now: AtomicU64,
}

impl Turns {
    pub(super) fn next(&self, count: usize) -> usize {
        self.next.fetch_add(1, Relaxed) % count
    }

    /// The index of the one whose turn it is. `endpoints` is not empty.
    pub(super) fn weighted(
        &self,
        endpoints: &[&Endpoint],
        weight: impl Fn(&Endpoint) -> f64,
    ) -> usize {
        let mut chosen = 0;
        for _ in 0..RACES_MAX {
            let now = self.now.load(Relaxed);
            let step = |endpoint: &Endpoint| {
                ((STEP / weight(endpoint).max(f64::MIN_POSITIVE)) as u64).max(1)
            };
            let due = |endpoint: &Endpoint| {
                let turn = endpoint.host.turn.load(Relaxed);
                let latest = now.saturating_add(step(endpoint));
                // One that was away, or is new, would otherwise be first until it has caught up.
                turn.max(now).min(latest)
            };
            let Some((at, turn)) = endpoints
                .iter()
                .enumerate()
                .map(|(at, endpoint)| (at, due(endpoint)))
                .min_by_key(|(_, turn)| *turn)
            else {
                return chosen;
            };
            chosen = at;
            let endpoint = endpoints[at];
            let known = endpoint.host.turn.load(Relaxed);
            let next = turn.saturating_add(step(endpoint));
            if endpoint
                .host
                .turn
                .compare_exchange(known, next, Relaxed, Relaxed)
                .is_ok()
            {
                self.now.fetch_max(turn, Relaxed);
                return chosen;
            }
        }
        chosen
    }
}
