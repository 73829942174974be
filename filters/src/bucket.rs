//! A token bucket without a lock: one atomic holds the moment at which it was (or would have been) empty.
//!
//! It fills continuously, as Envoy's does since 1.31: `tokens_per_fill` in each `fill_interval`, a fraction at a time.
//! It may be overdrawn on purpose ([`Bucket::settle`]), which later requests wait for.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// What rounding may take from a whole token.
const ROUNDING: f64 = 1e-6;

/// Nanoseconds on a monotonic clock that starts with the process.
#[expect(
    clippy::cast_possible_truncation,
    reason = "292 years of nanoseconds fit"
)]
pub(crate) fn now_ns() -> i64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as i64
}

/// The bucket.
#[derive(Debug)]
pub(crate) struct Bucket {
    max: f64,
    ns_per_token: f64,
    empty_at_ns: AtomicI64,
}

impl Bucket {
    /// A full one.
    pub(crate) fn full(max: f64, tokens: f64, each: Duration) -> Self {
        Self {
            max,
            ns_per_token: each.as_nanos() as f64 / tokens,
            // Long ago: full, whenever the first request says that it is.
            empty_at_ns: AtomicI64::new(i64::MIN / 2),
        }
    }

    /// When it would have been empty if it is just full at `now`.
    fn full_since(&self, now: i64) -> i64 {
        now.saturating_sub(self.ns(self.max))
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "a cast of a float saturates"
    )]
    fn ns(&self, tokens: f64) -> i64 {
        (tokens * self.ns_per_token) as i64
    }

    fn tokens(&self, empty_at: i64, now: i64) -> f64 {
        let empty_at = empty_at.max(self.full_since(now));
        now.saturating_sub(empty_at) as f64 / self.ns_per_token
    }

    /// Takes `tokens` if they are there; else says when they will be.
    pub(crate) fn take(&self, tokens: f64, now: i64) -> Result<(), Duration> {
        let mut known = self.empty_at_ns.load(Relaxed);
        loop {
            let there = self.tokens(known, now);
            if there + ROUNDING < tokens {
                return Err(self.time(tokens - there));
            }
            let next = known
                .max(self.full_since(now))
                .saturating_add(self.ns(tokens));
            match self
                .empty_at_ns
                .compare_exchange_weak(known, next, Relaxed, Relaxed)
            {
                Ok(_) => return Ok(()),
                Err(other) => known = other,
            }
        }
    }

    /// Takes `tokens` though they may not be there, or gives them back if negative.
    pub(crate) fn settle(&self, tokens: f64, now: i64) {
        let full_since = self.full_since(now);
        let settle = |known: i64| Some(known.max(full_since).saturating_add(self.ns(tokens)));
        // Never fails: the closure always gives something.
        let _ = self.empty_at_ns.fetch_update(Relaxed, Relaxed, settle);
    }

    /// Tokens there; negative if overdrawn.
    pub(crate) fn remaining(&self, now: i64) -> f64 {
        self.tokens(self.empty_at_ns.load(Relaxed), now)
    }

    /// How long until it is full.
    pub(crate) fn full_in(&self, now: i64) -> Duration {
        self.time(self.max - self.remaining(now))
    }

    /// How long until there is a whole token; zero if there is one.
    pub(crate) fn next_in(&self, now: i64) -> Duration {
        self.time(1.0 - ROUNDING - self.remaining(now))
    }

    /// What it holds at most.
    pub(crate) fn max(&self) -> f64 {
        self.max
    }

    /// How long `tokens` take to come.
    fn time(&self, tokens: f64) -> Duration {
        let ns = (tokens * self.ns_per_token).max(0.0);
        Duration::try_from_secs_f64(ns / 1e9).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn it_gives_what_it_holds_and_fills_as_time_goes() {
        let bucket = Bucket::full(3.0, 2.0, Duration::from_secs(1));
        let now = now_ns();
        for _ in 0..3 {
            assert!(bucket.take(1.0, now).is_ok());
        }
        let wait = bucket.take(1.0, now).unwrap_err();
        assert!(wait <= Duration::from_millis(500), "{wait:?}");
        assert!(bucket.take(1.0, now + SECOND / 2).is_ok());
        assert!(bucket.take(1.0, now + SECOND / 2).is_err());
        assert!(
            bucket.take(3.0, now + 100 * SECOND).is_ok(),
            "never more than it holds"
        );
        assert!(bucket.take(1.0, now + 100 * SECOND).is_err());
    }

    #[test]
    fn it_can_be_overdrawn_and_given_back() {
        let bucket = Bucket::full(10.0, 10.0, Duration::from_secs(1));
        let now = now_ns();
        bucket.settle(25.0, now);
        assert!(bucket.remaining(now) < -14.9);
        assert!(bucket.take(1.0, now + SECOND).is_err());
        bucket.settle(-15.0, now + SECOND);
        assert!(bucket.take(9.0, now + SECOND).is_ok());
        bucket.settle(-100.0, now + SECOND);
        assert!(
            bucket.remaining(now + SECOND) <= 10.0,
            "giving back fills it at most"
        );
    }

    #[test]
    fn many_threads_take_no_token_twice() {
        let bucket = Bucket::full(1000.0, 1.0, Duration::from_secs(3600));
        let now = now_ns();
        let taken: usize = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| (0..1000).filter(|_| bucket.take(1.0, now).is_ok()).count())
                })
                .collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap())
                .sum()
        });
        assert_eq!(taken, 1000);
    }
}
