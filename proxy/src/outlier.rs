//! Outlier detection: an endpoint whose requests fail gets none for a while.
//!
//! Requests count into the endpoint's [`Host`], with atomics; the one that fills a row ejects. What is to be done now
//! and then (who comes back, success rates) a task per cluster does on the main runtime.

mod latency;

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

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::report::{EngineState, Model};
    use outrigger_xds::resource::latency_monitor::LatencyMonitor;

    fn config() -> OutlierDetection {
        let rule = |count, enforcing| Rule { count, enforcing };
        OutlierDetection {
            consecutive_5xx: rule(3, 100),
            consecutive_gateway_failure: rule(2, 0),
            consecutive_local_origin_failure: rule(2, 100),
            split_external_local_origin_errors: false,
            interval: Duration::from_secs(10),
            base_ejection_time: Duration::from_secs(3600),
            max_ejection_time: Duration::from_secs(7200),
            max_ejection_percent: 40,
            always_eject_one_host: false,
            enforcing_success_rate: 100,
            success_rate_minimum_hosts: 3,
            success_rate_request_volume: 10,
            success_rate_stdev_factor: 1000,
            enforcing_local_origin_success_rate: 100,
            failure_percentage_threshold: 60,
            enforcing_failure_percentage: 0,
            enforcing_failure_percentage_local_origin: 0,
            failure_percentage_minimum_hosts: 2,
            failure_percentage_request_volume: 20,
            max_ejection_time_jitter: Duration::ZERO,
            uneject_by_health_check: true,
            latency: None,
        }
    }

    fn endpoints(count: usize) -> Vec<Arc<Endpoint>> {
        (0..count)
            .map(|at| {
                Arc::new(Endpoint {
                    id: format!("e{at}").as_str().into(),
                    weight: 1,
                    cluster: "outliers".into(),
                    slot: at,
                    ..Endpoint::default()
                })
            })
            .collect()
    }

    fn case(config: &OutlierDetection, count: usize) -> (Detector, Vec<Arc<Endpoint>>) {
        let detector = Detector::new(config, "outliers", None);
        let endpoints = endpoints(count);
        detector.members(&endpoints);
        (detector, endpoints)
    }

    fn ejected(endpoints: &[Arc<Endpoint>]) -> Vec<usize> {
        let all = endpoints.iter().enumerate();
        all.filter(|(_, endpoint)| is_ejected(&endpoint.host))
            .map(|(at, _)| at)
            .collect()
    }

    #[test]
    fn failures_in_a_row_eject_and_a_success_between_does_not() {
        let (detector, endpoints) = case(&config(), 5);
        for status in [500, 500, 200, 500, 500] {
            detector.status(&endpoints[0], status);
        }
        assert!(ejected(&endpoints).is_empty());
        detector.broken(&endpoints[0], Flag::DownstreamConnectionTermination);
        assert!(ejected(&endpoints).is_empty(), "the client's fault");
        detector.broken(&endpoints[0], Flag::UpstreamConnectionFailure);
        assert_eq!(ejected(&endpoints), [0], "counts as 503");
    }

    #[test]
    fn no_more_are_ejected_than_the_share_and_rules_that_enforce_nothing_eject_nobody() {
        let (detector, endpoints) = case(&config(), 5);
        for endpoint in &endpoints {
            for _ in 0..2 {
                detector.status(endpoint, 503);
            }
        }
        assert!(ejected(&endpoints).is_empty(), "gateway failures: 0 %");
        for endpoint in &endpoints {
            detector.status(endpoint, 503);
        }
        assert_eq!(ejected(&endpoints), [0, 1]);
        // One of two is more than that.
        let (detector, endpoints) = case(&config(), 2);
        for _ in 0..3 {
            detector.status(&endpoints[0], 500);
        }
        assert!(ejected(&endpoints).is_empty());
        let none = OutlierDetection {
            max_ejection_percent: 0,
            ..config()
        };
        for (always, wanted) in [(false, vec![]), (true, vec![0])] {
            let (detector, endpoints) = case(
                &OutlierDetection {
                    always_eject_one_host: always,
                    ..none.clone()
                },
                3,
            );
            for endpoint in &endpoints {
                for _ in 0..3 {
                    detector.status(endpoint, 500);
                }
            }
            assert_eq!(ejected(&endpoints), wanted);
        }
    }

    #[test]
    fn local_failures_are_counted_apart_if_asked() {
        let split = OutlierDetection {
            split_external_local_origin_errors: true,
            ..config()
        };
        let (detector, endpoints) = case(&split, 3);
        detector.broken(&endpoints[0], Flag::UpstreamConnectionFailure);
        detector.status(&endpoints[0], 500);
        detector.broken(&endpoints[0], Flag::UpstreamConnectionFailure);
        assert!(ejected(&endpoints).is_empty(), "an answer came between");
        detector.broken(&endpoints[0], Flag::UpstreamRequestTimeout);
        assert_eq!(ejected(&endpoints), [0]);
    }

    #[test]
    fn ejections_grow_longer_and_are_forgotten_by_and_by() {
        let (detector, endpoints) = case(&config(), 3);
        let record = &endpoints[0].host.record;
        let eject = || (0..3).for_each(|_| detector.status(&endpoints[0], 500));
        eject();
        detector.look(&endpoints);
        assert_eq!(ejected(&endpoints), [0], "an hour is not over");
        let short = OutlierDetection {
            base_ejection_time: Duration::from_millis(1),
            max_ejection_time: Duration::from_millis(1),
            ..config()
        };
        let quick = Detector::new(&short, "outliers", Some(&detector));
        std::thread::sleep(Duration::from_millis(5));
        quick.look(&endpoints);
        assert!(ejected(&endpoints).is_empty());
        assert_eq!(record.ejections.load(Relaxed), 1);
        eject();
        assert_eq!(record.ejections.load(Relaxed), 2, "twice as long now");
        std::thread::sleep(Duration::from_millis(5));
        for left in [2, 1, 0, 0] {
            quick.look(&endpoints);
            assert_eq!(record.ejections.load(Relaxed), left);
        }
    }

    fn outcomes(of: &Outcomes, well: u64, bad: u64) {
        (0..well).for_each(|_| of.count(true));
        (0..bad).for_each(|_| of.count(false));
    }

    #[test]
    fn who_fails_too_often_is_ejected_however_the_others_fare() {
        let percentage = OutlierDetection {
            enforcing_success_rate: 0,
            enforcing_failure_percentage: 100,
            max_ejection_percent: 100,
            ..config()
        };
        let (detector, endpoints) = case(&percentage, 4);
        let look = |of: [(u64, u64); 4]| {
            for (endpoint, (well, bad)) in endpoints.iter().zip(of) {
                outcomes(&endpoint.host.record.answered, well, bad);
            }
            detector.look(&endpoints);
        };
        look([(0, 19), (0, 19), (20, 0), (0, 19)]);
        assert!(ejected(&endpoints).is_empty(), "one has the volume");
        look([(41, 59), (40, 60), (0, 100), (0, 19)]);
        assert_eq!(ejected(&endpoints), [1, 2]);
    }

    #[test]
    fn rates_at_which_endpoints_are_reached_count_where_they_are_apart() {
        for (split, wanted) in [(true, vec![1]), (false, vec![])] {
            let config = OutlierDetection {
                split_external_local_origin_errors: split,
                ..config()
            };
            let (detector, endpoints) = case(&config, 4);
            for (at, endpoint) in endpoints.iter().enumerate() {
                let bad = if at == 1 { 50 } else { 0 };
                outcomes(&endpoint.host.record.local, 50, bad);
            }
            detector.look(&endpoints);
            assert_eq!(ejected(&endpoints), wanted, "{split}");
        }
    }

    #[test]
    fn an_ejection_lasts_longer_by_its_jitter() {
        let jittery = OutlierDetection {
            base_ejection_time: Duration::from_millis(1),
            max_ejection_time: Duration::from_millis(1),
            max_ejection_percent: 100,
            max_ejection_time_jitter: Duration::from_secs(3600),
            ..config()
        };
        let (detector, endpoints) = case(&jittery, 1);
        (0..3).for_each(|_| detector.status(&endpoints[0], 500));
        let jitter = &endpoints[0].host.record.jitter_ms;
        assert!(jitter.load(Relaxed) < 3_600_000);
        jitter.store(1_000_000, Relaxed);
        std::thread::sleep(Duration::from_millis(5));
        detector.look(&endpoints);
        assert_eq!(ejected(&endpoints), [0]);
        jitter.store(0, Relaxed);
        detector.look(&endpoints);
        assert!(ejected(&endpoints).is_empty());
    }

    #[test]
    fn an_endpoint_far_slower_than_its_cluster_is_ejected_and_never_the_last_one() {
        let latency = LatencyMonitor {
            request_volume: 10,
            ttft_floor_ms: 200,
            ..LatencyMonitor::default()
        };
        let config = OutlierDetection {
            latency: Some(latency),
            max_ejection_percent: 100,
            ..config()
        };
        let millis = Duration::from_millis;
        type Spec<'a> = &'a [(u64, u64, u64)];
        let cases: [(&str, usize, Spec<'_>, &[usize]); 8] = [
            (
                "alike",
                10,
                &[(300, 100, 20), (310, 100, 22), (320, 100, 25)],
                &[],
            ),
            (
                "late first tokens",
                10,
                &[(300, 100, 20), (310, 100, 22), (2_000, 100, 25)],
                &[2],
            ),
            (
                "a long prompt is no failure",
                10,
                &[(300, 100, 20), (310, 100, 22), (2_000, 4_096, 25)],
                &[],
            ),
            (
                "a floor for first tokens",
                10,
                &[(10, 100, 20), (10, 100, 22), (150, 100, 25)],
                &[],
            ),
            (
                "late later tokens",
                10,
                &[(300, 100, 20), (310, 100, 80), (310, 100, 22)],
                &[1],
            ),
            (
                "a floor for later tokens",
                10,
                &[(300, 100, 5), (310, 100, 40), (310, 100, 6)],
                &[],
            ),
            (
                "too few samples",
                9,
                &[(300, 100, 20), (310, 100, 22), (9_000, 100, 900)],
                &[],
            ),
            ("one of two", 10, &[(300, 100, 20), (9_000, 100, 900)], &[1]),
        ];
        for (name, count, spec, wanted) in cases {
            let (detector, endpoints) = case(&config, spec.len());
            for (endpoint, (ttft, tokens, itl)) in endpoints.iter().zip(spec) {
                for _ in 0..count {
                    detector.first_token(endpoint, millis(*ttft), *tokens);
                    detector.later_token(endpoint, millis(*itl));
                }
            }
            detector.look(&endpoints);
            assert_eq!(ejected(&endpoints), wanted, "{name}");
        }
        // One of the two is out already.
        let (detector, endpoints) = case(&config, 2);
        (0..3).for_each(|_| detector.status(&endpoints[0], 500));
        for _ in 0..10 {
            detector.first_token(&endpoints[0], millis(10), 1);
            detector.first_token(&endpoints[1], millis(9_000), 1);
        }
        detector.look(&endpoints);
        assert_eq!(ejected(&endpoints), [0]);
    }

    #[test]
    fn latencies_are_compared_among_endpoints_that_serve_the_same_models() {
        let config = OutlierDetection {
            latency: Some(LatencyMonitor {
                request_volume: 10,
                ..LatencyMonitor::default()
            }),
            max_ejection_percent: 100,
            ..config()
        };
        // Two small ones, one of them slow, and a large one that is slower than both.
        let spec = [
            ("small", 20, false),
            ("small", 2_000, false),
            ("large", 9_000, false),
        ];
        let alone = [("a", 20, false), ("b", 9_000, false), ("b", 20, true)];
        for (spec, wanted) in [(spec, vec![1]), (alone, vec![2])] {
            let (detector, endpoints) = case(&config, spec.len());
            for (endpoint, (model, waited, out)) in endpoints.iter().zip(spec) {
                let mut live = (**endpoint.live.load()).clone();
                let model = Model {
                    id: model.into(),
                    ..Model::default()
                };
                live.state = Arc::new(EngineState {
                    models: vec![model],
                    ..EngineState::default()
                });
                endpoint.live.store(Arc::new(live));
                for _ in 0..10 {
                    detector.later_token(endpoint, Duration::from_millis(waited));
                }
                (0..if out { 3 } else { 0 }).for_each(|_| detector.status(endpoint, 500));
            }
            detector.look(&endpoints);
            assert_eq!(ejected(&endpoints), wanted);
        }
    }

    #[test]
    fn a_success_rate_far_below_the_others_ejects() {
        let (detector, endpoints) = case(&config(), 4);
        let send = |volume: u64, bad: u64| {
            for (at, endpoint) in endpoints.iter().enumerate() {
                let well = if at == 2 { volume - bad } else { volume };
                outcomes(&endpoint.host.record.answered, well, volume - well);
            }
            detector.look(&endpoints);
        };
        send(9, 9);
        assert!(ejected(&endpoints).is_empty(), "too few requests to tell");
        send(100, 0);
        assert!(ejected(&endpoints).is_empty(), "all alike");
        send(100, 50);
        assert_eq!(ejected(&endpoints), [2]);
    }
}
