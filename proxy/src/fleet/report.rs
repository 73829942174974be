//! The load report (ORCA) of an engine beside us, made into a header whenever its feed tells, so that requests only take it.
//!
//! Its utilization is the share of KV blocks in use, plus requests that wait by requests that run: above 1, the engine is
//! overloaded. Rates are of what ended here, an average of about ten seconds.

use http::HeaderValue;
use outrigger_filters::endpoints::{Endpoint, Host};
use outrigger_xds::{orca::LoadReport, report::Load};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// Between two samples, at least.
const SAMPLE: Duration = Duration::from_secs(1);
/// What is so old counts about a third.
const WINDOW: Duration = Duration::from_secs(10);

/// Requests a second that ended, and that failed.
#[derive(Debug)]
pub(super) struct Rates {
    at: Instant,
    ended: u64,
    failed: u64,
    rates: Option<(f64, f64)>,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            at: Instant::now(),
            ended: 0,
            failed: 0,
            rates: None,
        }
    }
}

impl Rates {
    fn look(&mut self, (ended, failed): (u64, u64), now: Instant) -> (f64, f64) {
        let passed = now.saturating_duration_since(self.at);
        if passed >= SAMPLE {
            let rate =
                |now: u64, before: u64| now.saturating_sub(before) as f64 / passed.as_secs_f64();
            let sample = (rate(ended, self.ended), rate(failed, self.failed));
            let old = (-passed.as_secs_f64() / WINDOW.as_secs_f64()).exp();
            let before = self.rates.unwrap_or(sample);
            let mixed = |new: f64, before: f64| new + old * (before - new);
            self.rates = Some((mixed(sample.0, before.0), mixed(sample.1, before.1)));
            (self.at, self.ended, self.failed) = (now, ended, failed);
        }
        self.rates.unwrap_or_default()
    }
}

/// Requests that ended, and those that failed, over all clusters that use an endpoint.
fn ended(variants: &[Arc<Endpoint>]) -> (u64, u64) {
    let mut seen: Vec<&Arc<Host>> = Vec::new();
    let (mut ended, mut failed) = (0, 0);
    for host in variants.iter().map(|variant| &variant.host) {
        if seen.iter().any(|known| Arc::ptr_eq(known, host)) {
            continue;
        }
        seen.push(host);
        let counts = host.tally.counts();
        ended += counts.succeeded + counts.failed;
        failed += counts.failed;
    }
    (ended, failed)
}

/// Makes the report of an endpoint anew, which clusters may use in several ways.
pub(super) fn renew(variants: &[Arc<Endpoint>], load: &Load, rates: &mut Rates) {
    let (rps, eps) = rates.look(ended(variants), Instant::now());
    let text = report(load, rps, eps).to_header();
    // Made of digits and names: it can be a header.
    let value = HeaderValue::from_str(&text).ok().map(Arc::new);
    variants[0].stats.report.store(value);
}

fn report(load: &Load, rps: f64, eps: f64) -> LoadReport {
    let mut named = BTreeMap::from([
        ("active_requests", load.active_requests as f64),
        ("active_prefill_tokens", load.active_prefill_tokens as f64),
    ]);
    let mut utilization = 0.0;
    if load.engine_age.is_some() {
        // vLLM's own names, where it has one.
        named.extend([
            ("kv_cache_usage_perc", load.kv_usage),
            ("num_requests_running", load.running as f64),
            ("num_requests_waiting", load.waiting as f64),
        ]);
        utilization = load.kv_usage + load.waiting as f64 / load.running.max(1) as f64;
    }
    LoadReport {
        application_utilization: utilization,
        rps_fractional: rps,
        eps,
        named_metrics: named
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        ..LoadReport::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_what_the_engine_told_and_nothing_else() {
        let mut load = Load {
            active_requests: 3,
            kv_usage: 0.25,
            running: 2,
            waiting: 1,
            ..Load::default()
        };
        assert_eq!(
            report(&load, 0.0, 0.0).to_header(),
            "TEXT named_metrics.active_prefill_tokens=0, named_metrics.active_requests=3"
        );
        load.engine_age = Some(Duration::ZERO);
        let told = report(&load, 1.5, 0.5).to_header();
        let wanted = "TEXT application_utilization=0.75, rps_fractional=1.5, eps=0.5, ";
        assert!(told.starts_with(wanted), "{told}");
        assert!(told.ends_with(
            "named_metrics.num_requests_running=2, named_metrics.num_requests_waiting=1"
        ));
    }

    #[test]
    fn rates_follow_what_ends_and_fade() {
        let mut rates = Rates::default();
        let begin = rates.at;
        assert_eq!(rates.look((20, 0), begin), (0.0, 0.0), "too early to tell");
        let at = begin + Duration::from_secs(2);
        assert_eq!(rates.look((30, 10), at), (15.0, 5.0));
        assert_eq!(rates.look((30, 10), at), (15.0, 5.0));
        let (rps, eps) = rates.look((30, 10), at + WINDOW);
        assert!((rps - 15.0 / std::f64::consts::E).abs() < 0.01, "{rps}");
        assert!((eps - 5.0 / std::f64::consts::E).abs() < 0.01, "{eps}");
    }
}
