//! Active health checks: a task per endpoint of a cluster that has them, on the main runtime.
//!
//! They tell nobody but the endpoint's [`Host`] flags, which load balancing reads. Endpoints that a feed tells of are
//! not asked: their own proxy or agent does that.

mod ask;
mod grpc;

use crate::outlier::Ejections;
use ahash::AHashMap;
use ask::Asker;
use outrigger_filters::endpoints::{ClusterView, Endpoint, Host, Secured, Via};
use outrigger_xds::{
    report::EngineId,
    resource::{
        cluster::{Cluster, ConnectionOptions},
        endpoint::Address,
        health_check::HealthCheck,
    },
};
use rand::Rng;
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::task::AbortHandle;

/// All that run.
#[derive(Debug, Default)]
pub struct Checks {
    running: Mutex<AHashMap<(Arc<str>, EngineId), Running>>,
}

#[derive(Debug)]
struct Running {
    config: HealthCheck,
    address: Address,
    connection: Arc<ConnectionOptions>,
    tls: Option<Secured>,
    host: Arc<Host>,
    ejections: Option<Arc<Ejections>>,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A cluster as its checks need it.
pub struct Checked<'a> {
    /// As configured.
    pub config: &'a Cluster,
    /// Its endpoints.
    pub view: &'a ClusterView,
    /// Whether it ever got a request.
    pub used: &'a Arc<AtomicBool>,
    /// Its outlier detection's, if a check that passes ends them.
    pub ejections: Option<&'a Arc<Ejections>>,
}

impl Checks {
    /// Checks exactly these clusters' endpoints; a check that stays is not disturbed.
    pub fn configure<'a>(&self, clusters: impl Iterator<Item = Checked<'a>>) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = std::mem::take(&mut *running);
        for checked in clusters {
            let Some(config) = &checked.config.health_check else {
                continue;
            };
            let plain = checked.view.endpoints.iter();
            for endpoint in plain.filter(|endpoint| endpoint.via == Via::Plain) {
                let key = (checked.view.name.clone(), endpoint.id.clone());
                let known = before.remove(&key).filter(|known| {
                    known.config == *config
                        && known.address == endpoint.address
                        && known.tls == endpoint.tls
                        && known.connection == endpoint.connection
                        && Arc::ptr_eq(&known.host, &endpoint.host)
                        && known.ejections.as_ref().map(Arc::as_ptr)
                            == checked.ejections.map(Arc::as_ptr)
                });
                let check = known.unwrap_or_else(|| start(config, &checked, endpoint));
                running.insert(key, check);
            }
        }
        for ((cluster, id), gone) in before {
            if !running.contains_key(&(cluster, id)) {
                // Nobody will ever say otherwise.
                gone.host.set(ALL_FLAGS, false);
            }
        }
    }
}

const ALL_FLAGS: u32 = Host::FAILED_ACTIVE_HC
    | Host::PENDING_ACTIVE_HC
    | Host::DEGRADED_ACTIVE_HC
    | Host::ACTIVE_HC_TIMEOUT
    | Host::CHECKED;

fn start(config: &HealthCheck, checked: &Checked<'_>, endpoint: &Endpoint) -> Running {
    let (address, tls, host) = (&endpoint.address, endpoint.tls.as_ref(), &endpoint.host);
    if host.set(Host::CHECKED, true) {
        // As in Envoy: guilty until the first check, which then decides alone.
        host.set(Host::FAILED_ACTIVE_HC | Host::PENDING_ACTIVE_HC, true);
    }
    let check = Check {
        asker: Asker::new(
            config,
            &checked.config.name,
            (address, tls),
            &endpoint.connection,
        ),
        config: config.clone(),
        cluster: checked.config.name.clone(),
        address: address.clone(),
        host: host.clone(),
        ejections: checked.ejections.cloned(),
        used: checked.used.clone(),
        failures: 0,
        successes: 0,
    };
    Running {
        config: config.clone(),
        address: address.clone(),
        tls: tls.cloned(),
        connection: endpoint.connection.clone(),
        host: host.clone(),
        ejections: checked.ejections.cloned(),
        task: tokio::spawn(check.run()).abort_handle(),
    }
}

/// What a check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Well {
        degraded: bool,
    },
    /// It answered, and said no.
    Refused,
    /// It answered something that is no verdict.
    Doubtful,
    /// No answer.
    Unreachable,
    /// Not in time.
    TimedOut,
}

/// What a check changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    None,
    Healthy,
    Unhealthy,
}

struct Check {
    asker: Asker,
    config: HealthCheck,
    cluster: String,
    address: Address,
    host: Arc<Host>,
    ejections: Option<Arc<Ejections>>,
    used: Arc<AtomicBool>,
    failures: u32,
    successes: u32,
}

impl Check {
    async fn run(mut self) {
        tokio::time::sleep(random(self.config.initial_jitter)).await;
        loop {
            self.count("envoy_cluster_health_check_attempt");
            let asked = tokio::time::timeout(self.config.timeout, self.asker.ask()).await;
            let found = asked.unwrap_or_else(|_| {
                self.asker.forget();
                Found::TimedOut
            });
            let change = self.take(found);
            self.pardon(found);
            match found {
                Found::Well { .. } => self.count("envoy_cluster_health_check_success"),
                _ => self.count("envoy_cluster_health_check_failure"),
            }
            if matches!(found, Found::Unreachable | Found::TimedOut) {
                self.count("envoy_cluster_health_check_network_failure");
            }
            if change != Change::None {
                tracing::info!(cluster = self.cluster, endpoint = %self.address, ?change, ?found, "health check");
            }
            tokio::time::sleep(self.wait(change)).await;
        }
    }

    fn count(&self, name: &'static str) {
        metrics::counter!(name, "envoy_cluster_name" => self.cluster.clone()).increment(1);
    }

    fn take(&mut self, found: Found) -> Change {
        let host = &self.host;
        let first = host.set(Host::PENDING_ACTIVE_HC, false);
        let failed = host.has(Host::FAILED_ACTIVE_HC);
        host.set(Host::ACTIVE_HC_TIMEOUT, found == Found::TimedOut);
        let Found::Well { degraded } = found else {
            self.successes = 0;
            self.failures += 1;
            // As in Envoy: who answers and says no is believed at once.
            let is_enough =
                found == Found::Refused || self.failures >= self.config.unhealthy_threshold;
            if failed || !is_enough {
                return Change::None;
            }
            host.set(Host::FAILED_ACTIVE_HC, true);
            return Change::Unhealthy;
        };
        self.failures = 0;
        self.successes += 1;
        host.set(Host::DEGRADED_ACTIVE_HC, degraded);
        if !failed || !(first || self.successes >= self.config.healthy_threshold) {
            return Change::None;
        }
        host.set(Host::FAILED_ACTIVE_HC, false);
        host.since_ms
            .store(outrigger_filters::endpoints::clock_ms(), Relaxed);
        Change::Healthy
    }

    /// As in Envoy, who passes a check is not taken for an outlier any longer.
    fn pardon(&self, found: Found) {
        let is_well = matches!(found, Found::Well { .. }) && !self.host.has(Host::FAILED_ACTIVE_HC);
        if let Some(ejections) = self.ejections.as_ref().filter(|_| is_well) {
            ejections.end(&self.host);
        }
    }

    /// Until the next check.
    fn wait(&self, change: Change) -> Duration {
        let config = &self.config;
        let healthy = !self.host.has(Host::FAILED_ACTIVE_HC);
        let base = match (self.used.load(Relaxed), change) {
            (false, _) if healthy => config.no_traffic_healthy_interval,
            (false, _) => config.no_traffic_interval,
            (true, Change::Healthy) => config.healthy_edge_interval,
            (true, Change::Unhealthy) => config.unhealthy_edge_interval,
            (true, Change::None) if healthy => config.interval,
            (true, Change::None) => config.unhealthy_interval,
        };
        let percent = base.mul_f64(f64::from(config.interval_jitter_percent) / 100.0);
        base + random(config.interval_jitter) + random(percent)
    }
}

/// Anything below `most`.
fn random(most: Duration) -> Duration {
    if most.is_zero() {
        return most;
    }
    most.mul_f64(rand::rng().random::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::resource::health_check::Checker;

    fn check() -> Check {
        let seconds = Duration::from_secs;
        let config = HealthCheck {
            timeout: seconds(1),
            interval: seconds(2),
            interval_jitter: Duration::ZERO,
            interval_jitter_percent: 0,
            initial_jitter: Duration::ZERO,
            unhealthy_threshold: 3,
            healthy_threshold: 2,
            reuse_connection: true,
            no_traffic_interval: seconds(60),
            no_traffic_healthy_interval: seconds(50),
            unhealthy_interval: seconds(3),
            unhealthy_edge_interval: seconds(4),
            healthy_edge_interval: seconds(5),
            checker: Checker::Tcp,
        };
        let host = Arc::new(Host::default());
        host.set(Host::FAILED_ACTIVE_HC | Host::PENDING_ACTIVE_HC, true);
        Check {
            asker: Asker::new(&config, "c", (&Address::default(), None), &Arc::default()),
            config,
            cluster: "c".into(),
            address: Address::default(),
            host,
            ejections: None,
            used: Arc::new(AtomicBool::new(true)),
            failures: 0,
            successes: 0,
        }
    }

    const WELL: Found = Found::Well { degraded: false };

    #[test]
    fn the_first_check_decides_alone_and_then_thresholds_do() {
        let mut check = check();
        assert_eq!(check.take(WELL), Change::Healthy);
        for _ in 0..2 {
            assert_eq!(check.take(Found::Unreachable), Change::None);
        }
        assert_eq!(check.take(WELL), Change::None, "failures are in a row");
        for _ in 0..2 {
            assert_eq!(check.take(Found::TimedOut), Change::None);
        }
        assert!(check.host.has(Host::ACTIVE_HC_TIMEOUT));
        assert_eq!(check.take(Found::Unreachable), Change::Unhealthy);
        assert!(!check.host.has(Host::ACTIVE_HC_TIMEOUT));
        assert_eq!(check.take(WELL), Change::None);
        assert_eq!(check.take(Found::Unreachable), Change::None);
        assert_eq!(check.take(WELL), Change::None, "successes are in a row");
        assert_eq!(check.take(WELL), Change::Healthy);
        assert_eq!(check.take(Found::Refused), Change::Unhealthy, "at once");
    }

    #[test]
    fn an_answer_that_is_no_verdict_counts_up_to_the_threshold() {
        let mut check = check();
        assert_eq!(check.take(WELL), Change::Healthy);
        for _ in 0..2 {
            assert_eq!(check.take(Found::Doubtful), Change::None);
        }
        assert_eq!(check.take(Found::Doubtful), Change::Unhealthy);
    }

    #[test]
    fn an_endpoint_that_fails_its_first_check_needs_the_threshold() {
        let mut check = check();
        assert_eq!(check.take(Found::Unreachable), Change::None);
        assert_eq!(check.take(WELL), Change::None);
        assert_eq!(check.take(Found::Well { degraded: true }), Change::Healthy);
        assert!(check.host.has(Host::DEGRADED_ACTIVE_HC));
    }

    #[test]
    fn intervals_are_by_state_edge_and_traffic() {
        let mut check = check();
        let seconds = |time: Duration| time.as_secs();
        assert_eq!(seconds(check.wait(Change::None)), 3);
        assert_eq!(seconds(check.wait(Change::Unhealthy)), 4);
        check.take(WELL);
        assert_eq!(seconds(check.wait(Change::Healthy)), 5);
        assert_eq!(seconds(check.wait(Change::None)), 2);
        check.config.interval_jitter_percent = 50;
        for _ in 0..100 {
            let wait = check.wait(Change::None).as_millis();
            assert!((2000..3000).contains(&wait), "{wait}");
        }
        check.config.interval_jitter_percent = 0;
        check.used.store(false, Relaxed);
        assert_eq!(seconds(check.wait(Change::Healthy)), 50);
        check.take(Found::Refused);
        assert_eq!(seconds(check.wait(Change::None)), 60);
    }
}
