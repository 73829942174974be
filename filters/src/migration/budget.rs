//! What all streams of this proxy share: how many run, how many are moving, what is held of them, who runs
//! alone, which engines they lost, and which refuse seeds.
//!
//! It lives beside the configuration, so that a push neither forgets nor doubles it.

use super::{seeds::Refusals, suspicion::Breaks};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};
use tokio::sync::Semaphore;

/// Bytes are accounted for in steps of this size.
const STEP_BYTES: usize = 4 << 10;

/// One for the whole process.
#[derive(Debug)]
pub struct Shared {
    /// Streams that could move.
    streams: AtomicUsize,
    /// Of these, waiting for their first token elsewhere.
    resuming: AtomicUsize,
    /// Bytes of token ids held.
    held: AtomicUsize,
    /// Requests under which engines died run one at a time.
    pub(super) alone: Semaphore,
    /// Engines that broke lately.
    pub(super) breaks: Breaks,
    /// Engines that refused seeds lately.
    pub(super) seed_refusals: Refusals,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            streams: AtomicUsize::new(0),
            resuming: AtomicUsize::new(0),
            held: AtomicUsize::new(0),
            alone: Semaphore::new(1),
            breaks: Breaks::default(),
            seed_refusals: Refusals::default(),
        }
    }
}

/// Counts until dropped.
#[derive(Debug)]
pub(super) struct Counted(Arc<Shared>, fn(&Shared) -> &AtomicUsize);

impl Drop for Counted {
    fn drop(&mut self) {
        (self.1)(&self.0).fetch_sub(1, Relaxed);
    }
}

impl Shared {
    /// One more stream.
    pub(super) fn enter(self: &Arc<Self>) -> Counted {
        self.streams.fetch_add(1, Relaxed);
        Counted(self.clone(), |shared| &shared.streams)
    }

    /// One more stream in prefill elsewhere, if these are fewer than `percent` of all, or than `min`.
    pub(super) fn resume(self: &Arc<Self>, percent: u32, min: u32) -> Option<Counted> {
        let share = self.streams.load(Relaxed) * percent as usize / 100;
        let most = share.max(min as usize);
        let one_more = |now: usize| (now < most).then_some(now + 1);
        self.resuming
            .fetch_update(Relaxed, Relaxed, one_more)
            .ok()?;
        Some(Counted(self.clone(), |shared| &shared.resuming))
    }
}

/// The bytes that one stream holds.
#[derive(Debug)]
pub(super) struct Held {
    shared: Arc<Shared>,
    bytes: usize,
    max: usize,
}

impl Held {
    /// Nothing yet; all streams together hold at most `max`.
    pub(super) fn new(shared: Arc<Shared>, max: usize) -> Self {
        Self {
            shared,
            bytes: 0,
            max,
        }
    }

    /// The stream holds `bytes` now; false if that is too much.
    pub(super) fn grow(&mut self, bytes: usize) -> bool {
        if bytes <= self.bytes {
            return true;
        }
        let more = (bytes - self.bytes).next_multiple_of(STEP_BYTES);
        let before = self.shared.held.fetch_add(more, Relaxed);
        if before + more > self.max {
            self.shared.held.fetch_sub(more, Relaxed);
            metrics::counter!("outrigger_migration_memory_overflow_total").increment(1);
            return false;
        }
        self.bytes += more;
        tell(before + more);
        true
    }

    /// It holds nothing any more.
    pub(super) fn clear(&mut self) {
        if self.bytes > 0 {
            let before = self.shared.held.fetch_sub(self.bytes, Relaxed);
            tell(before - self.bytes);
            self.bytes = 0;
        }
    }
}

fn tell(bytes: usize) {
    metrics::gauge!("outrigger_migration_held_bytes").set(bytes as f64);
}

impl Drop for Held {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resumes_are_a_share_of_the_streams_or_a_few() {
        let shared = Arc::<Shared>::default();
        let streams: Vec<_> = (0..50).map(|_| shared.enter()).collect();
        let mut resuming: Vec<_> = (0..10)
            .map(|_| shared.resume(20, 2).expect("10 are 20 % of 50"))
            .collect();
        assert!(shared.resume(20, 2).is_none());
        resuming.pop();
        assert!(shared.resume(20, 2).is_some(), "it was given back");
        drop((streams, resuming));
        let few: Vec<_> = (0..2).map(|_| shared.resume(20, 2)).collect();
        assert!(few.iter().all(Option::is_some) && shared.resume(20, 2).is_none());
    }

    #[test]
    fn what_is_held_is_bounded_and_given_back() {
        let shared = Arc::<Shared>::default();
        let mut one = Held::new(shared.clone(), 3 * STEP_BYTES);
        let mut two = Held::new(shared.clone(), 3 * STEP_BYTES);
        assert!(one.grow(1) && one.grow(STEP_BYTES) && two.grow(STEP_BYTES + 1));
        assert!(!one.grow(STEP_BYTES + 1));
        drop(two);
        assert!(one.grow(3 * STEP_BYTES));
        one.clear();
        assert_eq!(shared.held.load(Relaxed), 0);
    }
}
