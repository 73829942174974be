//! What this router sent to an endpoint since that endpoint's load was last told.
//!
//! A told load cannot know of it yet, and a burst of requests would otherwise all see the same idle endpoint. Each
//! figure is tied to the moment of the report it adds to: a newer report knows better, and what was noted against the
//! older one counts as zero. So nothing is counted twice, provided that every told load moves `load_at`. What is sent
//! in the instant between an endpoint's telling and our hearing is missed until the next report.

use arc_swap::ArcSwap;
use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

/// Sent since a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Amount {
    /// Prompt tokens less predicted hits.
    pub(super) prefill_tokens: u64,
    /// Prompt blocks that were not active there already.
    pub(super) blocks: u64,
    /// Requests.
    pub(super) requests: u64,
}

#[derive(Default)]
struct Since {
    report: AtomicU64,
    prefill_tokens: AtomicU64,
    blocks: AtomicU64,
    requests: AtomicU64,
}

/// By slot. Races between two requests lose at most one note.
#[derive(Default)]
pub(super) struct Sent {
    slots: ArcSwap<Vec<Arc<Since>>>,
}

impl Sent {
    /// Sent to `slot` since the load that was told at `report`.
    pub(super) fn since(&self, slot: usize, report: Instant) -> Amount {
        let slots = self.slots.load();
        match slots.get(slot) {
            Some(since) if since.report.load(Relaxed) == stamp(report) => Amount {
                prefill_tokens: since.prefill_tokens.load(Relaxed),
                blocks: since.blocks.load(Relaxed),
                requests: since.requests.load(Relaxed),
            },
            _ => Amount::default(),
        }
    }

    /// One more request goes to `slot`, whose load was last told at `report`.
    pub(super) fn note(&self, slot: usize, report: Instant, amount: Amount) {
        let mut slots = self.slots.load_full();
        if slots.len() <= slot {
            self.slots.rcu(|slots| {
                let mut more = Vec::clone(slots);
                more.resize_with(more.len().max(slot + 1), Arc::default);
                more
            });
            slots = self.slots.load_full();
        }
        let since = &slots[slot];
        if since.report.swap(stamp(report), Relaxed) != stamp(report) {
            since.prefill_tokens.store(0, Relaxed);
            since.blocks.store(0, Relaxed);
            since.requests.store(0, Relaxed);
        }
        since
            .prefill_tokens
            .fetch_add(amount.prefill_tokens, Relaxed);
        since.blocks.fetch_add(amount.blocks, Relaxed);
        since.requests.fetch_add(amount.requests, Relaxed);
    }
}

/// An instant as a number; never 0.
fn stamp(at: Instant) -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    at.saturating_duration_since(*START.get_or_init(Instant::now))
        .as_nanos() as u64
        + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_new_report_ends_what_was_noted_against_the_old() {
        let sent = Sent::default();
        let first = Instant::now() + Duration::from_millis(1);
        let amount = Amount {
            prefill_tokens: 100,
            blocks: 3,
            requests: 1,
        };
        assert_eq!(sent.since(5, first), Amount::default());
        sent.note(5, first, amount);
        sent.note(5, first, amount);
        assert_eq!(
            sent.since(5, first),
            Amount {
                prefill_tokens: 200,
                blocks: 6,
                requests: 2
            }
        );
        assert_eq!(sent.since(4, first), Amount::default());
        let second = first + Duration::from_millis(1);
        assert_eq!(sent.since(5, second), Amount::default());
        sent.note(5, second, amount);
        assert_eq!(sent.since(5, second), amount);
    }
}
