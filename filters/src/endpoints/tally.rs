//! How the requests of a cluster at one endpoint went, for whoever shows it and whoever reports it.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Counts that only grow. Each request counts once when it begins and once when it ends.
#[derive(Debug, Default)]
pub struct Tally {
    issued: AtomicU64,
    succeeded: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
    first_tokens: AtomicU64,
    first_token_us: AtomicU64,
    /// What was told in reports.
    told: Mutex<Counts>,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Whole, and no 5xx.
    Succeeded,
    /// A 5xx, no answer, or one that broke.
    Failed,
    /// Whoever sent it wants it no more.
    Cancelled,
}

/// What a [`Tally`] has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that began.
    pub issued: u64,
    /// Of these, [`Ended::Succeeded`].
    pub succeeded: u64,
    /// Of these, [`Ended::Failed`].
    pub failed: u64,
    /// Of these, [`Ended::Cancelled`].
    pub cancelled: u64,
    /// Streams whose first token came.
    pub first_tokens: u64,
    /// Microseconds until then, of all of them together.
    pub first_token_us: u64,
}

impl Counts {
    /// Requests that have not ended.
    #[must_use]
    pub fn in_progress(self) -> u64 {
        let ended = [self.succeeded, self.failed, self.cancelled];
        ended.into_iter().fold(self.issued, u64::saturating_sub)
    }

    /// Together with others.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            issued: self.issued + other.issued,
            succeeded: self.succeeded + other.succeeded,
            failed: self.failed + other.failed,
            cancelled: self.cancelled + other.cancelled,
            first_tokens: self.first_tokens + other.first_tokens,
            first_token_us: self.first_token_us + other.first_token_us,
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            issued: self.issued - before.issued,
            succeeded: self.succeeded - before.succeeded,
            failed: self.failed - before.failed,
            cancelled: self.cancelled - before.cancelled,
            first_tokens: self.first_tokens - before.first_tokens,
            first_token_us: self.first_token_us - before.first_token_us,
        }
    }
}

impl Tally {
    /// A request begins.
    pub fn begin(&self) {
        self.issued.fetch_add(1, Relaxed);
    }

    /// It ends.
    pub fn end(&self, how: Ended) {
        let counter = match how {
            Ended::Succeeded => &self.succeeded,
            Ended::Failed => &self.failed,
            Ended::Cancelled => &self.cancelled,
        };
        counter.fetch_add(1, Relaxed);
    }

    /// The first token of a stream came after so long.
    pub fn first_token(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.first_token_us.fetch_add(us, Relaxed);
        self.first_tokens.fetch_add(1, Relaxed);
    }

    /// All of it.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Relaxed);
        // In the order in which nothing ends that has not begun.
        let (succeeded, failed, cancelled) = (
            read(&self.succeeded),
            read(&self.failed),
            read(&self.cancelled),
        );
        let first_tokens = read(&self.first_tokens);
        Counts {
            succeeded,
            failed,
            cancelled,
            first_tokens,
            first_token_us: read(&self.first_token_us),
            issued: read(&self.issued),
        }
    }

    /// Whether nothing is left to be taken, now or later.
    pub fn is_over(&self) -> bool {
        let told = *self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.counts();
        now == told && now.in_progress() == 0
    }

    /// What was not taken yet, and how many requests have not ended.
    pub fn take(&self) -> (Counts, u64) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.counts();
        let news = now.since(std::mem::replace(&mut *told, now));
        (news, now.in_progress())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_request_is_taken_once_when_it_begins_and_once_when_it_ends() {
        let tally = Tally::default();
        (0..3).for_each(|_| tally.begin());
        tally.end(Ended::Succeeded);
        let (news, in_progress) = tally.take();
        assert_eq!((news.issued, news.succeeded, in_progress), (3, 1, 2));
        assert!(!tally.is_over(), "two go on");
        tally.first_token(Duration::from_millis(2));
        tally.end(Ended::Failed);
        tally.end(Ended::Cancelled);
        let (news, in_progress) = tally.take();
        let wanted = Counts {
            failed: 1,
            cancelled: 1,
            first_tokens: 1,
            first_token_us: 2_000,
            ..Counts::default()
        };
        assert_eq!((news, in_progress), (wanted, 0));
        assert!(tally.is_over());
        assert_eq!(tally.take(), (Counts::default(), 0));
        assert_eq!(tally.counts().issued, 3);
    }
}
