//! Pauses between attempts to reach a control plane.

use rand::Rng;
use std::time::Duration;

/// Longest pause before the first attempt to open a stream again; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(500);
/// Longest pause before an attempt to open a stream again.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Pauses that grow, each chosen at random below a limit that doubles.
#[derive(Debug)]
pub struct Backoff {
    limit: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { limit: RETRY_MIN }
    }
}

impl Backoff {
    /// The next pause is no longer than this.
    #[must_use]
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// The next pause.
    pub fn pause(&mut self) -> Duration {
        let pause = self.limit.mul_f64(rand::rng().random());
        self.limit = (self.limit * 2).min(RETRY_MAX);
        pause
    }
}
