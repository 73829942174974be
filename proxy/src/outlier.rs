//! Outlier detection: an endpoint whose requests fail gets none for a while.
//!
//! Requests count into the endpoint's [`Host`], with atomics; the one that fills a row ejects. What is to be done now
//! and then (who comes back, success rates) a task per cluster does on the main runtime.

use outrigger_filters::{
    endpoints::{Endpoint, Host, Record, clock_ms},
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
}

impl Kind {
    fn detected(self) -> &'static str {
        match self {
            Self::Any5xx => "envoy_cluster_outlier_detection_ejections_detected_consecutive_5xx",
            Self::Gateway => {
                "envoy_cluster_outlier_detection_ejections_detected_consecutive_gateway_failure"
            }
            Self::LocalOrigin => {
                "envoy_cluster_outlier_detection_ejections_detected_consecutive_local_origin_failure"
            }
            Self::SuccessRate => "envoy_cluster_outlier_detection_ejections_detected_success_rate",
        }
    }

    fn enforced(self) -> &'static str {
        match self {
            Self::Any5xx => "envoy_cluster_outlier_detection_ejections_enforced_consecutive_5xx",
            Self::Gateway => {
                "envoy_cluster_outlier_detection_ejections_enforced_consecutive_gateway_failure"
            }
            Self::LocalOrigin => {
                "envoy_cluster_outlier_detection_ejections_enforced_consecutive_local_origin_failure"
            }
            Self::SuccessRate => "envoy_cluster_outlier_detection_ejections_enforced_success_rate",
        }
    }
}

/// One cluster's.
#[derive(Debug)]
pub struct Detector {
    config: OutlierDetection,
    cluster: String,
    /// Endpoints of the cluster.
    hosts: AtomicU32,
    ejected: AtomicU32,
    /// When to look next, on [`clock_ms`]'s clock.
    next_ms: Arc<AtomicU64>,
}

impl Detector {
    /// As configured; it looks when `previous`, the same cluster's before a push, would have.
    #[must_use]
    pub fn new(config: &OutlierDetection, cluster: &str, previous: Option<&Self>) -> Self {
        let same = previous.filter(|previous| previous.config.interval == config.interval);
        let next = || Arc::new(AtomicU64::new(clock_ms() + millis(config.interval)));
        Self {
            config: config.clone(),
            cluster: cluster.to_owned(),
            hosts: AtomicU32::new(0),
            ejected: AtomicU32::new(0),
            next_ms: same.map_or_else(next, |same| same.next_ms.clone()),
        }
    }

    /// The cluster has these endpoints now.
    pub fn members(&self, endpoints: &[Arc<Endpoint>]) {
        let ejected = endpoints
            .iter()
            .filter(|endpoint| is_ejected(&endpoint.host));
        self.hosts.store(endpoints.len() as u32, Relaxed);
        self.ejected.store(ejected.count() as u32, Relaxed);
        self.show();
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
        let failures = &endpoint.host.record.local_failures;
        let rule = self.config.consecutive_local_origin_failure;
        self.row(endpoint, failures, rule, Kind::LocalOrigin);
    }

    fn code(&self, endpoint: &Endpoint, code: u16) {
        let record = &endpoint.host.record;
        record.requests.fetch_add(1, Relaxed);
        if !(500..600).contains(&code) {
            record.successes.fetch_add(1, Relaxed);
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
        self.count(kind.detected());
        if rand::rng().random_range(0..100) >= enforcing {
            return;
        }
        let (active, hosts) = (self.ejected.load(Relaxed), self.hosts.load(Relaxed));
        let first = active == 0 && self.config.always_eject_one_host;
        let share = f64::from(active) * 100.0 / f64::from(hosts.max(1));
        if !first && share >= f64::from(self.config.max_ejection_percent) {
            self.count("envoy_cluster_outlier_detection_ejections_overflow");
            return;
        }
        // Of two requests at once, one ejects.
        if !endpoint.host.set(Host::FAILED_OUTLIER_CHECK, true) {
            return;
        }
        let record = &endpoint.host.record;
        record.ejected_ms.store(clock_ms(), Relaxed);
        record.ejections.fetch_add(1, Relaxed);
        self.ejected.fetch_add(1, Relaxed);
        self.show();
        self.count(kind.enforced());
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
        self.compare(endpoints);
    }

    fn pardon(&self, endpoint: &Endpoint) {
        let Record {
            ejected_ms,
            ejections,
            failures,
            gateway_failures,
            local_failures,
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
        if clock_ms() < ejected_ms.load(Relaxed) + millis(time) {
            return;
        }
        for counted in [failures, gateway_failures, local_failures] {
            counted.store(0, Relaxed);
        }
        endpoint.host.set(Host::FAILED_OUTLIER_CHECK, false);
        tracing::info!(cluster = self.cluster, endpoint = %endpoint.id, "back after its ejection");
    }

    /// Ejects those whose success rate is far below the mean.
    fn compare(&self, endpoints: &[Arc<Endpoint>]) {
        let config = &self.config;
        let rates: Vec<(&Arc<Endpoint>, f64)> = endpoints
            .iter()
            .filter_map(|endpoint| {
                let record = &endpoint.host.record;
                let requests = record.requests.swap(0, Relaxed);
                let successes = record.successes.swap(0, Relaxed);
                let volume = u64::from(config.success_rate_request_volume).max(1);
                (requests >= volume).then(|| (endpoint, successes as f64 * 100.0 / requests as f64))
            })
            .collect();
        if rates.is_empty() || rates.len() < config.success_rate_minimum_hosts as usize {
            return;
        }
        let count = rates.len() as f64;
        let mean = rates.iter().map(|(_, rate)| rate).sum::<f64>() / count;
        let variance = rates
            .iter()
            .map(|(_, rate)| (rate - mean).powi(2))
            .sum::<f64>()
            / count;
        let factor = f64::from(config.success_rate_stdev_factor) / 1000.0;
        let least = mean - variance.sqrt() * factor;
        for (endpoint, _) in rates.iter().filter(|(_, rate)| *rate < least) {
            self.found(endpoint, Kind::SuccessRate, config.enforcing_success_rate);
        }
    }

    fn count(&self, name: &'static str) {
        metrics::counter!(name, "envoy_cluster_name" => self.cluster.clone()).increment(1);
    }

    fn show(&self) {
        metrics::gauge!("envoy_cluster_outlier_detection_ejections_active", "envoy_cluster_name" => self.cluster.clone())
            .set(f64::from(self.ejected.load(Relaxed)));
    }
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

    #[test]
    fn a_success_rate_far_below_the_others_ejects() {
        let (detector, endpoints) = case(&config(), 4);
        let send = |volume: u64, bad: u64| {
            for (at, endpoint) in endpoints.iter().enumerate() {
                let well = if at == 2 { volume - bad } else { volume };
                endpoint.host.record.requests.store(volume, Relaxed);
                endpoint.host.record.successes.store(well, Relaxed);
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
