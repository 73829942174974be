//! When another attempt is allowed: our defaults, Envoy's `retry_on`, and the budget.

use http::StatusCode;
use outrigger_xds::resource::route::RetryPolicy;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Attempts after the first, where no policy says otherwise.
pub const RETRIES_MAX: usize = 3;

/// What may be retried for one request.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Attempts after the first.
    pub retries_max: usize,
    /// The connection could not be opened.
    pub connect_failure: bool,
    /// Nothing came back.
    pub reset: bool,
    /// The upstream answered 5xx.
    pub server_error: bool,
    /// The upstream answered 502, 503 or 504.
    pub gateway_error: bool,
    /// The upstream answered 409.
    pub retriable_4xx: bool,
    /// A policy says so, not our defaults.
    pub explicit: bool,
    /// The first stream event is awaited, and may be an error: generations only.
    pub peek: bool,
    /// Of one attempt; zero is none.
    pub per_try_timeout: Duration,
}

impl Rules {
    /// Our defaults, or an explicit policy as Envoy reads it.
    #[must_use]
    pub fn new(policy: Option<&RetryPolicy>, generation: bool) -> Self {
        let Some(policy) = policy else {
            return Self {
                retries_max: RETRIES_MAX,
                connect_failure: true,
                reset: generation,
                server_error: generation,
                gateway_error: generation,
                retriable_4xx: false,
                explicit: false,
                peek: generation,
                per_try_timeout: Duration::ZERO,
            };
        };
        let on = |name: &str| policy.retry_on.iter().any(|on| on == name);
        Self {
            retries_max: policy.num_retries as usize,
            connect_failure: on("connect-failure")
                || on("5xx")
                || on("gateway-error")
                || on("reset-before-request"),
            reset: on("reset") || on("5xx") || on("gateway-error"),
            server_error: on("5xx"),
            gateway_error: on("gateway-error") || on("5xx"),
            retriable_4xx: on("retriable-4xx"),
            explicit: true,
            peek: generation && (on("reset") || on("5xx")),
            per_try_timeout: policy.per_try_timeout,
        }
    }

    /// Whether a response with this status is worth another attempt.
    #[must_use]
    pub fn unwanted(&self, status: StatusCode) -> bool {
        match status.as_u16() {
            409 => self.retriable_4xx,
            502..=504 => self.gateway_error,
            // Envoy's 5xx are all of them; by default what no other engine can do either is not asked again.
            501 | 505 => self.server_error && self.explicit,
            500..=599 => self.server_error,
            _ => false,
        }
    }
}

/// How many requests are in flight, and how many of them are retries.
#[derive(Debug, Default)]
pub struct Budget {
    active: AtomicU64,
    retries: AtomicU64,
}

/// Counts one request or retry until dropped.
pub struct Counted(Arc<Budget>, fn(&Budget) -> &AtomicU64);

impl Drop for Counted {
    fn drop(&mut self) {
        (self.1)(&self.0).fetch_sub(1, Relaxed);
    }
}

impl Budget {
    /// One more request in flight.
    pub fn enter(self: &Arc<Self>) -> Counted {
        self.active.fetch_add(1, Relaxed);
        Counted(self.clone(), |budget| &budget.active)
    }

    /// One more retry in flight.
    pub fn retrying(self: &Arc<Self>) -> Counted {
        self.retries.fetch_add(1, Relaxed);
        Counted(self.clone(), |budget| &budget.retries)
    }

    /// Whether one more retry is within `percent` of the active requests, or within `min` at once.
    pub fn allows(&self, percent: f64, min: u32) -> bool {
        let retries = self.retries.load(Relaxed) as f64;
        let active = self.active.load(Relaxed) as f64;
        retries < f64::from(min).max(active * percent / 100.0)
    }
}

/// A request that was tried again went well.
pub(super) fn count_success(cluster: &str) {
    metrics::counter!("envoy_cluster_upstream_rq_retry_success", "envoy_cluster_name" => cluster.to_owned())
        .increment(1);
}

/// A request that was tried again failed for good.
pub(super) fn count_exhausted(cluster: &str) {
    metrics::counter!("envoy_cluster_upstream_rq_retry_limit_exceeded", "envoy_cluster_name" => cluster.to_owned())
        .increment(1);
}

/// Envoy's counters of retries.
pub(super) fn count(cluster: &str, reason: &'static str) {
    let cluster = cluster.to_owned();
    metrics::counter!("envoy_cluster_upstream_rq_retry", "envoy_cluster_name" => cluster.clone())
        .increment(1);
    metrics::counter!("outrigger_retries_total", "envoy_cluster_name" => cluster, "reason" => reason)
        .increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_is_retried_on_what_another_engine_may_do_better() {
        let rules = Rules::new(None, true);
        for (status, unwanted) in [
            (500, true),
            (503, true),
            (501, false),
            (400, false),
            (404, false),
            (429, false),
        ] {
            assert_eq!(
                rules.unwanted(StatusCode::from_u16(status).unwrap()),
                unwanted,
                "{status}"
            );
        }
        let other = Rules::new(None, false);
        assert!(
            !other.unwanted(StatusCode::SERVICE_UNAVAILABLE),
            "anything else keeps the engine's answer"
        );
        assert!(other.connect_failure && !other.reset);
    }

    #[test]
    fn an_explicit_policy_is_read_as_envoy_does() {
        let policy = RetryPolicy {
            retry_on: vec!["gateway-error".into(), "connect-failure".into()],
            num_retries: 2,
            per_try_timeout: Duration::ZERO,
        };
        let rules = Rules::new(Some(&policy), true);
        assert_eq!(rules.retries_max, 2);
        assert!(rules.unwanted(StatusCode::BAD_GATEWAY));
        assert!(!rules.unwanted(StatusCode::INTERNAL_SERVER_ERROR));
    }

    #[test]
    fn the_budget_holds() {
        let budget = Arc::new(Budget::default());
        let _requests: Vec<_> = (0..20).map(|_| budget.enter()).collect();
        let mut retries = Vec::new();
        while budget.allows(20.0, 3) {
            retries.push(budget.retrying());
        }
        assert_eq!(retries.len(), 4, "20 % of 20");
        retries.pop();
        assert!(budget.allows(20.0, 3), "a finished retry makes room");
    }
}
