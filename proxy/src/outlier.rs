//! Outlier detection: an endpoint whose requests fail gets none for a while.
//!
//! Requests count into the endpoint's [`Host`], with atomics; the one that fills a row ejects. What is to be done now
//! and then (who comes back, success rates) a task per cluster does on the main runtime.

mod latency;
#[cfg(test)]
mod tests;

use outrigger_filters::{
    endpoints::{Endpoint, Host, Outcomes, Record, clock_ms},
    error::Flag,
};
use outrigger_xds::resource::outlier_detection::{OutlierDetection, Rule};
use rand::Rng;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// What makes an outlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Any5xx,
    Gateway,
    LocalOrigin,
    SuccessRate,
    LocalOriginSuccessRate,
    FailurePercentage,
    LocalOriginFailurePercentage,
    /// Late first tokens.
    Ttft,
    /// Late tokens after them.
    Itl,
}

impl Kind {
    /// Found, and ejected.
    fn counters(self) -> (&'static str, &'static str) {
        match self {
            Self::Any5xx => (
                "envoy_cluster_outlier_detection_ejections_detected_consecutive_5xx",
                "envoy_cluster_outlier_detection_ejections_enforced_consecutive_5xx",
            ),
            Self::Gateway => (
                "envoy_cluster_outlier_detection_ejections_detected_consecutive_gateway_failure",
                "envoy_cluster_outlier_detection_ejections_enforced_consecutive_gateway_failure",
            ),
            Self::LocalOrigin => (
                "envoy_cluster_outlier_detection_ejections_detected_consecutive_local_origin_failure",
                "envoy_cluster_outlier_detection_ejections_enforced_consecutive_local_origin_failure",
            ),
            Self::SuccessRate => (
                "envoy_cluster_outlier_detection_ejections_detected_success_rate",
                "envoy_cluster_outlier_detection_ejections_enforced_success_rate",
            ),
            Self::LocalOriginSuccessRate => (
                "envoy_cluster_outlier_detection_ejections_detected_local_origin_success_rate",
                "envoy_cluster_outlier_detection_ejections_enforced_local_origin_success_rate",
            ),
            Self::FailurePercentage => (
                "envoy_cluster_outlier_detection_ejections_detected_failure_percentage",
                "envoy_cluster_outlier_detection_ejections_enforced_failure_percentage",
            ),
            Self::LocalOriginFailurePercentage => (
                "envoy_cluster_outlier_detection_ejections_detected_local_origin_failure_percentage",
                "envoy_cluster_outlier_detection_ejections_enforced_local_origin_failure_percentage",
            ),
            Self::Ttft => (
                "envoy_cluster_outlier_detection_ejections_detected_ttft",
                "envoy_cluster_outlier_detection_ejections_enforced_ttft",
            ),
            Self::Itl => (
                "envoy_cluster_outlier_detection_ejections_detected_itl",
                "envoy_cluster_outlier_detection_ejections_enforced_itl",
            ),
        }
    }
}

/// Who of a cluster is ejected; outlives a push.
#[derive(Debug)]
pub struct Ejections {
    cluster: String,
    active: AtomicU32,
}

impl Ejections {
    fn new(cluster: &str) -> Self {
        Self {
            cluster: cluster.to_owned(),
            active: AtomicU32::new(0),
        }
    }

    /// So many are.
    fn set(&self, active: u32) {
        self.active.store(active, Relaxed);
        self.show();
    }

    /// False if it is ejected already.
    fn begin(&self, host: &Host) -> bool {
        // Of two requests at once, one ejects.
        if !host.set(Host::FAILED_OUTLIER_CHECK, true) {
            return false;
        }
        self.active.fetch_add(1, Relaxed);
        self.show();
        true
    }

    /// It is well again, and what failed in a row is forgotten.
    pub fn end(&self, host: &Host) {
        let Record {
            failures,
            gateway_failures,
            local_failures,
            ..
        } = &host.record;
        if !host.set(Host::FAILED_OUTLIER_CHECK, false) {
            return;
        }
        for counted in [failures, gateway_failures, local_failures] {
            counted.store(0, Relaxed);
        }
        let less = |active: u32| Some(active.saturating_sub(1));
        let _ = self.active.fetch_update(Relaxed, Relaxed, less);
        self.show();
    }

    fn show(&self) {
        metrics::gauge!("envoy_cluster_outlier_detection_ejections_active", "envoy_cluster_name" => self.cluster.clone())
            .set(f64::from(self.active.load(Relaxed)));
    }
}

/// One cluster's.
#[derive(Debug)]
pub struct Detector {
    config: OutlierDetection,
    cluster: String,
    /// Endpoints of the cluster.
    hosts: AtomicU32,
    ejections: Arc<Ejections>,
    /// When to look next, on [`clock_ms`]'s clock.
    next_ms: Arc<AtomicU64>,
}

impl Detector {
    /// As configured; it looks when `previous`, the same cluster's before a push, would have.
    #[must_use]
    pub fn new(config: &OutlierDetection, cluster: &str, previous: Option<&Self>) -> Self {
        let same = previous.filter(|previous| previous.config.interval == config.interval);
        let next = || Arc::new(AtomicU64::new(clock_ms() + millis(config.interval)));
        let ejections = previous.map(|previous| previous.ejections.clone());
        Self {
            config: config.clone(),
            cluster: cluster.to_owned(),
            hosts: AtomicU32::new(0),
            ejections: ejections.unwrap_or_else(|| Arc::new(Ejections::new(cluster))),
            next_ms: same.map_or_else(next, |same| same.next_ms.clone()),
        }
    }

    /// The cluster has these endpoints now.
    pub fn members(&self, endpoints: &[Arc<Endpoint>]) {
        let ejected = endpoints
            .iter()
            .filter(|endpoint| is_ejected(&endpoint.host));
        self.hosts.store(endpoints.len() as u32, Relaxed);
        self.ejections.set(ejected.count() as u32);
    }

    #[cfg(test)]
    pub fn hosts(&self) -> u32 {
        self.hosts.load(Relaxed)
    }

    /// What health checks that pass may end.
    #[must_use]
    pub fn ejections(&self) -> Option<&Arc<Ejections>> {
        (self.config.uneject_by_health_check).then_some(&self.ejections)
    }

    /// Until the next look.
    #[must_use]
    pub fn wait(&self) -> Duration {
        Duration::from_millis(self.next_ms.load(Relaxed).saturating_sub(clock_ms()))
    }

    /// A response's status came.
    pub fn status(&self, endpoint: &Endpoint, status: u16) {
        let record = &endpoint.host.record;
        if self.config.split_external_local_origin_errors {
            record.local_failures.store(0, Relaxed);
            record.local.count(true);
        }
        self.code(endpoint, status);
    }

    /// An exchange broke.
    pub fn broken(&self, endpoint: &Endpoint, flag: Flag) {
        let code = match flag {
            Flag::UpstreamRequestTimeout => 504,
            Flag::UpstreamConnectionFailure
            | Flag::UpstreamConnectionTermination
            | Flag::UpstreamRemoteReset
            | Flag::UpstreamProtocolError => 503,
            _ => return,
        };
        if !self.config.split_external_local_origin_errors {
            self.code(endpoint, code);
            return;
        }
        endpoint.host.record.local.count(false);
        let failures = &endpoint.host.record.local_failures;
        let rule = self.config.consecutive_local_origin_failure;
        self.row(endpoint, failures, rule, Kind::LocalOrigin);
    }

    fn code(&self, endpoint: &Endpoint, code: u16) {
        let record = &endpoint.host.record;
        let is_failure = (500..600).contains(&code);
        record.answered.count(!is_failure);
        if !is_failure {
            record.failures.store(0, Relaxed);
            record.gateway_failures.store(0, Relaxed);
            return;
        }
        if matches!(code, 502..=504) {
            let rule = self.config.consecutive_gateway_failure;
            self.row(endpoint, &record.gateway_failures, rule, Kind::Gateway);
        } else {
            record.gateway_failures.store(0, Relaxed);
        }
        self.row(
            endpoint,
            &record.failures,
            self.config.consecutive_5xx,
            Kind::Any5xx,
        );
    }

    fn row(&self, endpoint: &Endpoint, counted: &AtomicU32, rule: Rule, kind: Kind) {
        if counted.fetch_add(1, Relaxed) + 1 < rule.count {
            return;
        }
        counted.store(0, Relaxed);
        self.found(endpoint, kind, rule.enforcing);
    }

    /// An outlier: ejects it if the rules let it.
    fn found(&self, endpoint: &Endpoint, kind: Kind, enforcing: u32) {
        if is_ejected(&endpoint.host) {
            return;
        }
        let (detected, enforced) = kind.counters();
        self.count(detected);
        if rand::rng().random_range(0..100) >= enforcing {
            return;
        }
        let (active, hosts) = (
            self.ejections.active.load(Relaxed),
            self.hosts.load(Relaxed),
        );
        let first = active == 0 && self.config.always_eject_one_host;
        let share = f64::from(active + 1) * 100.0 / f64::from(hosts.max(1));
        if !first && share > f64::from(self.config.max_ejection_percent) {
            self.count("envoy_cluster_outlier_detection_ejections_overflow");
            return;
        }
        if !self.ejections.begin(&endpoint.host) {
            return;
        }
        let record = &endpoint.host.record;
        record.ejected_ms.store(clock_ms(), Relaxed);
        record.ejections.fetch_add(1, Relaxed);
        let jitter = self
            .config
            .max_ejection_time_jitter
            .mul_f64(rand::rng().random());
        record.jitter_ms.store(millis(jitter), Relaxed);
        self.count(enforced);
        self.count("envoy_cluster_outlier_detection_ejections_enforced_total");
        tracing::info!(cluster = self.cluster, endpoint = %endpoint.id, ?kind, "ejected");
    }

    /// Who may come back, and whose success rate is bad.
    pub fn look(&self, endpoints: &[Arc<Endpoint>]) {
        self.next_ms
            .store(clock_ms() + millis(self.config.interval), Relaxed);
        for endpoint in endpoints {
            self.pardon(endpoint);
        }
        self.members(endpoints);
        let config = &self.config;
        let answered = Judged {
            outcomes: |record| &record.answered,
            rate: (Kind::SuccessRate, config.enforcing_success_rate),
            percentage: (Kind::FailurePercentage, config.enforcing_failure_percentage),
        };
        self.compare(endpoints, &answered);
        let reached = Judged {
            outcomes: |record| &record.local,
            rate: (
                Kind::LocalOriginSuccessRate,
                config.enforcing_local_origin_success_rate,
            ),
            percentage: (
                Kind::LocalOriginFailurePercentage,
                config.enforcing_failure_percentage_local_origin,
            ),
        };
        if config.split_external_local_origin_errors {
            self.compare(endpoints, &reached);
        }
        self.compare_latency(endpoints);
    }

    /// Whether it is to be told how long tokens take.
    #[must_use]
    pub fn watches_tokens(&self) -> bool {
        self.config.latency.is_some()
    }

    /// A stream's first token came.
    pub fn first_token(&self, endpoint: &Endpoint, took: Duration, uncached_tokens: u64) {
        if let Some(config) = &self.config.latency {
            latency::first_token(config, endpoint, took, uncached_tokens);
        }
    }

    /// A later token came.
    pub fn later_token(&self, endpoint: &Endpoint, waited: Duration) {
        endpoint.host.record.later_tokens.note(waited);
    }

    /// Ejects those that are slow, but never the last one that serves its models: a slow answer is better than none.
    fn compare_latency(&self, endpoints: &[Arc<Endpoint>]) {
        let Some(config) = &self.config.latency else {
            return;
        };
        for (endpoint, kind) in latency::slow(config, endpoints) {
            // Its first tokens came late, too.
            if is_ejected(&endpoint.host) {
                continue;
            }
            if !latency::has_stand_in(endpoint, endpoints) {
                self.count(kind.counters().0);
                self.count("envoy_cluster_outlier_detection_ejections_overflow");
                continue;
            }
            self.found(endpoint, kind, config.enforcing);
        }
    }

    fn pardon(&self, endpoint: &Endpoint) {
        let Record {
            ejected_ms,
            ejections,
            jitter_ms,
            ..
        } = &endpoint.host.record;
        let times = ejections.load(Relaxed);
        if !is_ejected(&endpoint.host) {
            // Time served well is forgotten as it was earned.
            ejections.store(times.saturating_sub(1), Relaxed);
            return;
        }
        let config = &self.config;
        let time = (config.base_ejection_time.saturating_mul(times)).min(config.max_ejection_time);
        if clock_ms() < ejected_ms.load(Relaxed) + millis(time) + jitter_ms.load(Relaxed) {
            return;
        }
        self.ejections.end(&endpoint.host);
        tracing::info!(cluster = self.cluster, endpoint = %endpoint.id, "back after its ejection");
    }

    /// Ejects those whose success rate is far below the mean, and those that fail too often.
    fn compare(&self, endpoints: &[Arc<Endpoint>], judged: &Judged) {
        let config = &self.config;
        let taken: Vec<Taken<'_>> = endpoints
            .iter()
            .filter_map(|endpoint| {
                let (requests, rate) = (judged.outcomes)(&endpoint.host.record).take()?;
                (!is_ejected(&endpoint.host)).then_some(Taken {
                    endpoint,
                    requests,
                    rate,
                })
            })
            .collect();
        let with = |volume: u32| {
            let taken = taken.iter();
            let enough = taken.filter(|taken| taken.requests >= u64::from(volume));
            enough.collect::<Vec<_>>()
        };
        let compared = with(config.success_rate_request_volume);
        if compared.len() >= config.success_rate_minimum_hosts as usize {
            let factor = f64::from(config.success_rate_stdev_factor) / 1000.0;
            let least = least_rate(&compared, factor);
            let (kind, enforcing) = judged.rate;
            for outlier in compared.iter().filter(|taken| taken.rate < least) {
                self.found(outlier.endpoint, kind, enforcing);
            }
        }
        let looked_at = with(config.failure_percentage_request_volume);
        if looked_at.len() >= config.failure_percentage_minimum_hosts as usize {
            let threshold = f64::from(config.failure_percentage_threshold);
            let (kind, enforcing) = judged.percentage;
            for outlier in looked_at
                .iter()
                .filter(|taken| 100.0 - taken.rate >= threshold)
            {
                self.found(outlier.endpoint, kind, enforcing);
            }
        }
    }

    fn count(&self, name: &'static str) {
        metrics::counter!(name, "envoy_cluster_name" => self.cluster.clone()).increment(1);
    }
}

/// Which outcomes are compared, and what a bad one is called and how often, in percent, it ejects.
struct Judged {
    outcomes: fn(&Record) -> &Outcomes,
    rate: (Kind, u32),
    percentage: (Kind, u32),
}

/// An endpoint's outcomes in an interval.
struct Taken<'a> {
    endpoint: &'a Endpoint,
    requests: u64,
    /// Of successes, in percent.
    rate: f64,
}

/// `factor` standard deviations below the mean; `taken` may be empty.
fn least_rate(taken: &[&Taken<'_>], factor: f64) -> f64 {
    let count = taken.len().max(1) as f64;
    let mean = taken.iter().map(|taken| taken.rate).sum::<f64>() / count;
    let squares = taken.iter().map(|taken| (taken.rate - mean).powi(2));
    let variance = squares.sum::<f64>() / count;
    mean - variance.sqrt() * factor
}

fn is_ejected(host: &Host) -> bool {
    host.has(Host::FAILED_OUTLIER_CHECK)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
