//! How many requests may be sent: Envoy's `rate_limit_settings`, a bucket of tokens. It knows no clock.

use std::time::{Duration, Instant};

/// `RateLimitSettings`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateLimit {
    /// Tokens in a full bucket.
    pub max_tokens: u32,
    /// Tokens a second.
    pub fill_rate: f64,
}

/// Envoy's numbers where the settings say none.
impl Default for RateLimit {
    fn default() -> Self {
        Self {
            max_tokens: 100,
            fill_rate: 10.0,
        }
    }
}

/// The bucket.
#[derive(Debug)]
pub(super) struct Rate {
    limit: RateLimit,
    tokens: f64,
    at: Instant,
}

impl Rate {
    pub(super) fn full(limit: RateLimit, now: Instant) -> Self {
        Self {
            limit,
            tokens: limit.max_tokens.into(),
            at: now,
        }
    }

    /// Takes a token, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let new = now.saturating_duration_since(self.at).as_secs_f64() * self.limit.fill_rate;
        self.tokens = (self.tokens + new).min(self.limit.max_tokens.into());
        self.at = self.at.max(now);
        let one = self.tokens >= 1.0;
        if one {
            self.tokens -= 1.0;
        }
        one
    }

    /// When there is one.
    pub(super) fn next(&self) -> Instant {
        let missing = (1.0 - self.tokens).max(0.0);
        // The bound is for rates that are next to nothing.
        let seconds = (missing / self.limit.fill_rate).min(3600.0);
        self.at + Duration::from_secs_f64(seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_let_through_and_then_so_many_a_second() {
        let begun = Instant::now();
        let limit = RateLimit {
            max_tokens: 3,
            fill_rate: 2.0,
        };
        let mut rate = Rate::full(limit, begun);
        let at = |ms| begun + Duration::from_millis(ms);
        let steps = [
            (0, true),
            (0, true),
            (0, true),
            (0, false),
            (499, false),
            (500, true),
            (999, false),
            (1000, true),
            (9000, true),
            (9000, true),
            (9000, true),
            (9000, false),
        ];
        for (step, (ms, expected)) in steps.into_iter().enumerate() {
            assert_eq!(rate.take(at(ms)), expected, "step {step}");
        }
        assert_eq!(rate.next(), at(9500));
    }
}
