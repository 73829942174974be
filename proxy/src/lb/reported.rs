//! Client-side weighted round robin: the weights that endpoints earn with their own load reports, by gRFC A58's formula:
//! requests a second by utilization, to which failures add.
//!
//! Requests note what a report earns, with atomics. Whoever chooses when an update is due computes the weights in use:
//! reports count when they have come for a while and as long as they come; who has no weight of its own gets the
//! median. Unlike Envoy's, weights are no whole numbers: engines may serve less than one request a second.

use outrigger_filters::endpoints::{Endpoint, Reported, clock_ms};
use outrigger_xds::{orca::LoadReport, resource::cluster::Reports};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// One cluster's.
#[derive(Debug)]
pub struct Weights {
    config: Reports,
    /// When they change next, on [`clock_ms`]'s clock.
    next_ms: AtomicU64,
}

impl Weights {
    pub(super) fn new(config: &Reports) -> Self {
        Self {
            config: config.clone(),
            next_ms: AtomicU64::new(0),
        }
    }

    /// A report came. One that says too little for a weight changes nothing.
    pub fn take(&self, endpoint: &Endpoint, report: &LoadReport) {
        self.take_at(&endpoint.host.reported, report, now_ms());
    }

    fn take_at(&self, reported: &Reported, report: &LoadReport, now_ms: u64) {
        let Some(weight) = weight(&self.config, report) else {
            return;
        };
        reported.latest.store(weight.to_bits(), Relaxed);
        // Of two at once either is right.
        let _ = reported
            .since_ms
            .compare_exchange(0, now_ms, Relaxed, Relaxed);
        reported.at_ms.store(now_ms, Relaxed);
    }

    /// Computes the weights in use, if that is due.
    pub(super) fn renew(&self, endpoints: &[Arc<Endpoint>]) {
        let now_ms = now_ms();
        let due = self.next_ms.load(Relaxed);
        let next = now_ms + millis(self.config.update);
        let mine = || {
            self.next_ms
                .compare_exchange(due, next, Relaxed, Relaxed)
                .is_ok()
        };
        if now_ms >= due && mine() {
            self.renew_at(endpoints, now_ms);
        }
    }

    fn renew_at(&self, endpoints: &[Arc<Endpoint>], now_ms: u64) {
        let own = |endpoint: &Arc<Endpoint>| self.valid(&endpoint.host.reported, now_ms);
        let mut weights: Vec<f64> = endpoints.iter().filter_map(own).collect();
        let middle = weights.len() / 2;
        let median = if weights.is_empty() {
            1.0
        } else {
            *weights.select_nth_unstable_by(middle, f64::total_cmp).1
        };
        for endpoint in endpoints {
            let weight = own(endpoint).unwrap_or(median);
            let used = &endpoint.host.reported.weight;
            used.store(weight.to_bits(), Relaxed);
        }
    }

    /// What its reports earn it, if they count.
    fn valid(&self, reported: &Reported, now_ms: u64) -> Option<f64> {
        let since_ms = reported.since_ms.load(Relaxed);
        if since_ms == 0 {
            return None;
        }
        let at_ms = reported.at_ms.load(Relaxed);
        if at_ms + millis(self.config.expiration) < now_ms {
            // When they come again, they must have come for a while again.
            reported.since_ms.store(0, Relaxed);
            return None;
        }
        let waited = since_ms + millis(self.config.blackout) <= now_ms;
        waited.then(|| f64::from_bits(reported.latest.load(Relaxed)))
    }
}

/// The weight in use; all are alike before the first.
pub(super) fn used(endpoint: &Endpoint) -> f64 {
    match f64::from_bits(endpoint.host.reported.weight.load(Relaxed)) {
        weight if weight > 0.0 => weight,
        _ => 1.0,
    }
}

/// Requests a second by utilization; `None` where the report does not say both.
fn weight(config: &Reports, report: &LoadReport) -> Option<f64> {
    let rate = report.rps_fractional;
    let named = || {
        let metrics = config.metrics.iter();
        metrics
            .filter_map(|name| report.greatest(name))
            .reduce(f64::max)
            .filter(|greatest| *greatest > 0.0)
    };
    let reported = Some(report.application_utilization).filter(|share| *share > 0.0);
    let utilization = reported.or_else(named).unwrap_or(report.cpu_utilization);
    let weight = rate / (utilization + config.error_penalty * report.eps / rate);
    (rate > 0.0 && weight > 0.0 && weight.is_finite()).then_some(weight)
}

/// Never 0, which is "never".
fn now_ms() -> u64 {
    clock_ms().max(1)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Reports {
        Reports {
            metrics: vec!["named_metrics.kv".to_owned(), "utilization.*".to_owned()],
            ..Reports::default()
        }
    }

    fn report(rps_fractional: f64, application_utilization: f64, eps: f64) -> LoadReport {
        LoadReport {
            rps_fractional,
            application_utilization,
            eps,
            ..LoadReport::default()
        }
    }

    #[test]
    fn a_weight_is_the_rate_by_the_utilization_and_failures_lower_it() {
        let config = config();
        let of = |report: &LoadReport| weight(&config, report);
        assert_eq!(of(&report(10.0, 0.5, 0.0)), Some(20.0));
        assert_eq!(of(&report(10.0, 0.5, 5.0)), Some(10.0));
        for nothing in [
            report(0.0, 0.5, 0.0),
            report(10.0, 0.0, 0.0),
            report(-1.0, 0.5, 0.0),
            LoadReport::default(),
        ] {
            assert_eq!(of(&nothing), None, "{nothing:?}");
        }
        let mut other = report(10.0, 0.0, 0.0);
        other.cpu_utilization = 0.1;
        assert_eq!(
            of(&other),
            Some(100.0),
            "processors, where nothing else is said"
        );
        other.named_metrics.insert("kv".to_owned(), 0.4);
        other.utilization.insert("any".to_owned(), 0.25);
        assert_eq!(of(&other), Some(25.0), "what is scarcest of what is named");
        other.application_utilization = 1.0;
        assert_eq!(of(&other), Some(10.0), "the application knows best");
    }

    #[test]
    fn reports_count_after_the_blackout_until_they_expire() {
        let weights = Weights::new(&config());
        let endpoints: Vec<Arc<Endpoint>> = (0..4).map(|_| Arc::default()).collect();
        let told = |at: usize, rps: f64, now_ms: u64| {
            let reported = &endpoints[at].host.reported;
            weights.take_at(reported, &report(rps, 1.0, 0.0), now_ms);
        };
        let used = |now_ms: u64| {
            weights.renew_at(&endpoints, now_ms);
            let all = endpoints.iter();
            all.map(|endpoint| used(endpoint)).collect::<Vec<_>>()
        };
        told(0, 10.0, 1_000);
        told(1, 20.0, 1_000);
        assert_eq!(used(10_999), [1.0; 4], "ten seconds are not over");
        told(2, 40.0, 5_000);
        assert_eq!(
            used(11_000),
            [10.0, 20.0, 20.0, 20.0],
            "others get the median"
        );
        assert_eq!(used(15_000), [10.0, 20.0, 40.0, 20.0]);
        told(0, 12.0, 15_000);
        assert_eq!(used(15_000)[0], 12.0);
        assert_eq!(
            used(181_001),
            [12.0, 40.0, 40.0, 40.0],
            "the second is expired"
        );
        told(1, 30.0, 181_002);
        assert_eq!(used(181_002)[1], 40.0, "and begins anew");
        told(1, 30.0, 191_002);
        assert_eq!(used(191_002)[1], 30.0);
    }
}
