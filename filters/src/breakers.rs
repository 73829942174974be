//! Circuit breakers: how much of what a cluster has is in use, and how much may be.
//!
//! One set of counts for all workers, by priority. Everything is an atomic: a push changes limits in place, and what is
//! in use stays counted.

use outrigger_xds::resource::{
    cluster::{CircuitBreakers, RetryLimit, Thresholds},
    route_action::Priority,
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

/// Of one cluster.
#[derive(Debug)]
pub struct Breakers {
    /// Its name, for metrics.
    pub cluster: Arc<str>,
    /// Requests that were not sent because of them, or that the other side refused because of its own.
    pub dropped: AtomicU64,
    default: Breaker,
    high: Breaker,
}

/// Of one priority.
#[derive(Debug, Default)]
pub struct Breaker {
    /// Open connections.
    pub connections: Resource,
    /// Most connections to one endpoint.
    connections_per_host_max: AtomicU64,
    /// Requests that wait for a connection.
    pub pending: Resource,
    /// Requests in flight, those that wait for a connection among them.
    pub requests: Resource,
    /// Retries in flight; its limit counts where there is no budget.
    pub retries: Resource,
    budget: Budget,
    track_remaining: AtomicBool,
}

/// What there is a limited number of.
#[derive(Debug, Default)]
pub struct Resource {
    used: AtomicU64,
    max: AtomicU64,
}

impl Resource {
    /// One more, if that is within the limit.
    pub fn try_take(&self) -> bool {
        let taken = self.used.fetch_add(1, Relaxed) < self.max.load(Relaxed);
        if !taken {
            self.give_back();
        }
        taken
    }

    /// One more, whatever the limit says.
    pub fn take(&self) {
        self.used.fetch_add(1, Relaxed);
    }

    /// One less.
    pub fn give_back(&self) {
        self.used.fetch_sub(1, Relaxed);
    }

    /// How many are in use.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// How many may be.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max.load(Relaxed)
    }

    /// Whether there is no more.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.used() >= self.max()
    }
}

/// Retries in proportion to requests.
#[derive(Debug, Default)]
struct Budget {
    is_set: AtomicBool,
    /// Bits of an `f64`.
    percent: AtomicU64,
    min: AtomicU64,
}

impl Breaker {
    fn set(&self, thresholds: &Thresholds) {
        let limits = [
            (&self.connections, thresholds.max_connections),
            (&self.pending, thresholds.max_pending_requests),
            (&self.requests, thresholds.max_requests),
        ];
        for (resource, max) in limits {
            resource.max.store(max.into(), Relaxed);
        }
        let per_host = thresholds.max_connections_per_host;
        self.connections_per_host_max
            .store(per_host.map_or(u64::MAX, Into::into), Relaxed);
        match thresholds.retries {
            RetryLimit::Count(count) => {
                self.retries.max.store(count.into(), Relaxed);
                self.budget.is_set.store(false, Relaxed);
            }
            RetryLimit::Budget {
                percent,
                min_concurrency,
            } => {
                self.budget.percent.store(percent.to_bits(), Relaxed);
                self.budget.min.store(min_concurrency.into(), Relaxed);
                self.budget.is_set.store(true, Relaxed);
            }
        }
        self.track_remaining
            .store(thresholds.track_remaining, Relaxed);
    }

    /// Most connections to one endpoint.
    #[must_use]
    pub fn connections_per_host_max(&self) -> u64 {
        self.connections_per_host_max.load(Relaxed)
    }

    /// Most retries at once, now.
    #[must_use]
    pub fn retries_max(&self) -> u64 {
        if !self.budget.is_set.load(Relaxed) {
            return self.retries.max();
        }
        let percent = f64::from_bits(self.budget.percent.load(Relaxed));
        // Those that wait for a connection are among the requests.
        let share = self.requests.used() as f64 * percent / 100.0;
        (share as u64).max(self.budget.min.load(Relaxed))
    }

    /// Whether one more retry is within the limit.
    #[must_use]
    pub fn allows_retry(&self) -> bool {
        self.retries.used() < self.retries_max()
    }

    /// Whether gauges are to tell what is left.
    #[must_use]
    pub fn tracks_remaining(&self) -> bool {
        self.track_remaining.load(Relaxed)
    }

    /// Whether retries have a budget instead of a number.
    #[must_use]
    pub fn has_budget(&self) -> bool {
        self.budget.is_set.load(Relaxed)
    }
}

impl Default for Breakers {
    fn default() -> Self {
        Self::new(Arc::default(), &CircuitBreakers::default())
    }
}

impl Breakers {
    /// Nothing is in use yet.
    #[must_use]
    pub fn new(cluster: Arc<str>, config: &CircuitBreakers) -> Self {
        let breakers = Self {
            cluster,
            dropped: AtomicU64::new(0),
            default: Breaker::default(),
            high: Breaker::default(),
        };
        breakers.set(config);
        breakers
    }

    /// New limits.
    pub fn set(&self, config: &CircuitBreakers) {
        self.default.set(&config.default);
        self.high.set(&config.high);
    }

    /// Those of a priority.
    #[must_use]
    pub fn of(&self, priority: Priority) -> &Breaker {
        match priority {
            Priority::Default => &self.default,
            Priority::High => &self.high,
        }
    }

    /// Keeps one of a resource until dropped, if that is within its limit.
    #[must_use]
    pub fn try_hold(self: &Arc<Self>, priority: Priority, kind: Kind) -> Option<Held> {
        kind.of(self.of(priority)).try_take().then(|| Held {
            breakers: self.clone(),
            priority,
            kind,
        })
    }

    /// The same, whatever the limit says.
    #[must_use]
    pub fn hold(self: &Arc<Self>, priority: Priority, kind: Kind) -> Held {
        kind.of(self.of(priority)).take();
        Held {
            breakers: self.clone(),
            priority,
            kind,
        }
    }
}

/// Which resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A connection.
    Connection,
    /// A request that waits for a connection.
    Pending,
    /// A request.
    Request,
    /// A retry.
    Retry,
}

impl Kind {
    fn of(self, breaker: &Breaker) -> &Resource {
        match self {
            Self::Connection => &breaker.connections,
            Self::Pending => &breaker.pending,
            Self::Request => &breaker.requests,
            Self::Retry => &breaker.retries,
        }
    }
}

/// One of a resource, in use until dropped.
#[derive(Debug)]
pub struct Held {
    breakers: Arc<Breakers>,
    priority: Priority,
    kind: Kind,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.kind.of(self.breakers.of(self.priority)).give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breakers(edit: impl FnOnce(&mut Thresholds)) -> Arc<Breakers> {
        let mut config = CircuitBreakers::default();
        edit(&mut config.default);
        Arc::new(Breakers::new("c".into(), &config))
    }

    #[test]
    fn a_limit_is_of_its_priority_and_holds_for_as_long_as_something_is_held() {
        let breakers = breakers(|limits| limits.max_requests = 1);
        let held = breakers.try_hold(Priority::Default, Kind::Request);
        assert!(held.is_some());
        assert!(breakers.of(Priority::Default).requests.is_open());
        assert!(
            breakers
                .try_hold(Priority::Default, Kind::Request)
                .is_none()
        );
        assert!(breakers.try_hold(Priority::High, Kind::Request).is_some());
        drop(held);
        assert!(
            breakers
                .try_hold(Priority::Default, Kind::Request)
                .is_some()
        );
    }

    #[test]
    fn a_push_changes_the_limit_and_keeps_the_count() {
        let breakers = breakers(|limits| limits.max_connections = 1);
        let _held = breakers.try_hold(Priority::Default, Kind::Connection);
        let mut more = CircuitBreakers::default();
        more.default.max_connections = 2;
        breakers.set(&more);
        let second = breakers.try_hold(Priority::Default, Kind::Connection);
        assert!(second.is_some());
        assert!(
            breakers
                .try_hold(Priority::Default, Kind::Connection)
                .is_none()
        );
    }

    #[test]
    fn the_retry_budget_is_a_share_of_requests_or_its_least() {
        let breakers = breakers(|_| {});
        let breaker = breakers.of(Priority::Default);
        assert_eq!(breaker.retries_max(), 3);
        let _requests: Vec<_> = (0..20)
            .map(|_| breakers.hold(Priority::Default, Kind::Request))
            .collect();
        assert_eq!(breaker.retries_max(), 4, "20 % of 20");
        let _retries: Vec<_> = (0..4)
            .map(|_| breakers.hold(Priority::Default, Kind::Retry))
            .collect();
        assert!(!breaker.allows_retry());
        let mut count = CircuitBreakers::default();
        count.default.retries = RetryLimit::Count(5);
        breakers.set(&count);
        assert!(breaker.allows_retry());
    }
}
