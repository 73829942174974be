//! `envoy.config.cluster.v3.OutlierDetection`.

use super::latency_monitor::LatencyMonitor;
use crate::{
    problems::ConfigErrors,
    protobuf::{duration, to_duration},
    wire::envoy::config::{cluster::v3 as wire, core::v3 as core},
};
use std::time::Duration;

/// When an endpoint gets no requests because those it had failed.
#[derive(Debug, Clone, PartialEq)]
pub struct OutlierDetection {
    /// Any 5xx in a row.
    pub consecutive_5xx: Rule,
    /// 502, 503 or 504 in a row.
    pub consecutive_gateway_failure: Rule,
    /// Failures to reach it in a row, where they are counted apart.
    pub consecutive_local_origin_failure: Rule,
    /// They are; else they count as 503 or 504.
    pub split_external_local_origin_errors: bool,
    /// Between looks at rates and at who may come back.
    pub interval: Duration,
    /// Times the number of ejections.
    pub base_ejection_time: Duration,
    /// Longest ejection.
    pub max_ejection_time: Duration,
    /// Of the cluster's endpoints.
    pub max_ejection_percent: u32,
    /// One may be ejected whatever the percentage.
    pub always_eject_one_host: bool,
    /// How often, in percent, a bad success rate ejects.
    pub enforcing_success_rate: u32,
    /// With fewer that have volume, rates are not compared.
    pub success_rate_minimum_hosts: u32,
    /// Requests in an interval for a rate.
    pub success_rate_request_volume: u32,
    /// Thousandths of a standard deviation below the mean.
    pub success_rate_stdev_factor: u32,
    /// As `enforcing_success_rate`, of the rate at which it is reached, where that is counted apart.
    pub enforcing_local_origin_success_rate: u32,
    /// Share of failures, in percent, that makes an outlier.
    pub failure_percentage_threshold: u32,
    /// How often, in percent, it ejects.
    pub enforcing_failure_percentage: u32,
    /// The same of failures to reach it, where they are counted apart.
    pub enforcing_failure_percentage_local_origin: u32,
    /// With fewer that have volume, shares of failures are not looked at.
    pub failure_percentage_minimum_hosts: u32,
    /// Requests in an interval for such a share.
    pub failure_percentage_request_volume: u32,
    /// Most that is added to an ejection, at random.
    pub max_ejection_time_jitter: Duration,
    /// A health check that passes ends an ejection.
    pub uneject_by_health_check: bool,
    /// Late tokens, too, make an outlier.
    pub latency: Option<LatencyMonitor>,
}

/// Failures in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// So many are an outlier.
    pub count: u32,
    /// In so many percent of the cases it is ejected.
    pub enforcing: u32,
}

impl Default for OutlierDetection {
    fn default() -> Self {
        Self::try_from(wire::OutlierDetection::default())
            .expect("invariant: nothing said is nothing wrong")
    }
}

const INTERVAL: Duration = Duration::from_secs(10);
const BASE_EJECTION_TIME: Duration = Duration::from_secs(30);
const MAX_EJECTION_TIME: Duration = Duration::from_secs(300);

impl TryFrom<wire::OutlierDetection> for OutlierDetection {
    type Error = ConfigErrors;

    fn try_from(wire: wire::OutlierDetection) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        check_percentages(&mut problems, &wire);
        let times = Times::read(&mut problems, &wire);
        let rule = |count: Option<u32>, enforcing: Option<u32>, default: u32| Rule {
            count: count.unwrap_or(5),
            enforcing: enforcing.unwrap_or(default),
        };
        let latency = monitors(&mut problems, wire.monitors);
        problems.finish(Some(Self {
            latency,
            consecutive_5xx: rule(wire.consecutive_5xx, wire.enforcing_consecutive_5xx, 100),
            consecutive_gateway_failure: rule(
                wire.consecutive_gateway_failure,
                wire.enforcing_consecutive_gateway_failure,
                0,
            ),
            consecutive_local_origin_failure: rule(
                wire.consecutive_local_origin_failure,
                wire.enforcing_consecutive_local_origin_failure,
                100,
            ),
            split_external_local_origin_errors: wire.split_external_local_origin_errors,
            interval: times.interval,
            base_ejection_time: times.base,
            max_ejection_time: times.longest,
            max_ejection_percent: wire.max_ejection_percent.unwrap_or(10),
            always_eject_one_host: wire.always_eject_one_host.unwrap_or(false),
            enforcing_success_rate: wire.enforcing_success_rate.unwrap_or(100),
            success_rate_minimum_hosts: wire.success_rate_minimum_hosts.unwrap_or(5),
            success_rate_request_volume: wire.success_rate_request_volume.unwrap_or(100),
            success_rate_stdev_factor: wire.success_rate_stdev_factor.unwrap_or(1900),
            enforcing_local_origin_success_rate: wire
                .enforcing_local_origin_success_rate
                .unwrap_or(100),
            failure_percentage_threshold: wire.failure_percentage_threshold.unwrap_or(85),
            enforcing_failure_percentage: wire.enforcing_failure_percentage.unwrap_or(0),
            enforcing_failure_percentage_local_origin: wire
                .enforcing_failure_percentage_local_origin
                .unwrap_or(0),
            failure_percentage_minimum_hosts: wire.failure_percentage_minimum_hosts.unwrap_or(5),
            failure_percentage_request_volume: wire.failure_percentage_request_volume.unwrap_or(50),
            max_ejection_time_jitter: times.jitter,
            uneject_by_health_check: wire
                .successful_active_health_check_uneject_host
                .unwrap_or(true),
        }))
    }
}

struct Times {
    interval: Duration,
    base: Duration,
    longest: Duration,
    jitter: Duration,
}

impl Times {
    fn read(problems: &mut ConfigErrors, wire: &wire::OutlierDetection) -> Self {
        let mut time = |place: &str, given: Option<prost_types::Duration>, default: Duration| {
            let read = given.and_then(|given| problems.take(place, duration(given)));
            let read = read.unwrap_or(default);
            if read.is_zero() {
                problems.add(place, "must be greater than 0");
            }
            read
        };
        let interval = time("interval", wire.interval, INTERVAL);
        let base = time(
            "base_ejection_time",
            wire.base_ejection_time,
            BASE_EJECTION_TIME,
        );
        let longest = time(
            "max_ejection_time",
            wire.max_ejection_time,
            MAX_EJECTION_TIME.max(base),
        );
        if longest < base {
            problems.add(
                "max_ejection_time",
                "must not be less than base_ejection_time",
            );
        }
        let jitter = wire.max_ejection_time_jitter;
        let jitter =
            jitter.and_then(|given| problems.take("max_ejection_time_jitter", duration(given)));
        Self {
            interval,
            base,
            longest,
            jitter: jitter.unwrap_or_default(),
        }
    }
}

/// The only monitor that is known here, once at most.
fn monitors(
    problems: &mut ConfigErrors,
    wire: Vec<core::TypedExtensionConfig>,
) -> Option<LatencyMonitor> {
    let mut found = None;
    for (index, monitor) in wire.into_iter().enumerate() {
        let place = format!("monitors[{index}].typed_config");
        let Some(any) = monitor.typed_config else {
            problems.add(place, "required");
            continue;
        };
        if found.is_some() {
            problems.add(place, "given twice");
            continue;
        }
        found = problems.take(&place, LatencyMonitor::read(any));
    }
    found
}

fn check_percentages(problems: &mut ConfigErrors, wire: &wire::OutlierDetection) {
    for (place, percent) in [
        ("max_ejection_percent", wire.max_ejection_percent),
        ("enforcing_consecutive_5xx", wire.enforcing_consecutive_5xx),
        ("enforcing_success_rate", wire.enforcing_success_rate),
        (
            "enforcing_local_origin_success_rate",
            wire.enforcing_local_origin_success_rate,
        ),
        (
            "failure_percentage_threshold",
            wire.failure_percentage_threshold,
        ),
        (
            "enforcing_failure_percentage",
            wire.enforcing_failure_percentage,
        ),
        (
            "enforcing_failure_percentage_local_origin",
            wire.enforcing_failure_percentage_local_origin,
        ),
        (
            "enforcing_consecutive_gateway_failure",
            wire.enforcing_consecutive_gateway_failure,
        ),
        (
            "enforcing_consecutive_local_origin_failure",
            wire.enforcing_consecutive_local_origin_failure,
        ),
    ] {
        if let Some(percent) = percent.filter(|percent| *percent > 100) {
            problems.add(place, format!("must be at most 100, is {percent}"));
        }
    }
}

impl From<&OutlierDetection> for wire::OutlierDetection {
    fn from(plain: &OutlierDetection) -> Self {
        Self {
            consecutive_5xx: Some(plain.consecutive_5xx.count),
            enforcing_consecutive_5xx: Some(plain.consecutive_5xx.enforcing),
            consecutive_gateway_failure: Some(plain.consecutive_gateway_failure.count),
            enforcing_consecutive_gateway_failure: Some(
                plain.consecutive_gateway_failure.enforcing,
            ),
            split_external_local_origin_errors: plain.split_external_local_origin_errors,
            consecutive_local_origin_failure: Some(plain.consecutive_local_origin_failure.count),
            enforcing_consecutive_local_origin_failure: Some(
                plain.consecutive_local_origin_failure.enforcing,
            ),
            interval: Some(to_duration(plain.interval)),
            base_ejection_time: Some(to_duration(plain.base_ejection_time)),
            max_ejection_time: Some(to_duration(plain.max_ejection_time)),
            max_ejection_percent: Some(plain.max_ejection_percent),
            always_eject_one_host: Some(plain.always_eject_one_host),
            enforcing_success_rate: Some(plain.enforcing_success_rate),
            success_rate_minimum_hosts: Some(plain.success_rate_minimum_hosts),
            success_rate_request_volume: Some(plain.success_rate_request_volume),
            success_rate_stdev_factor: Some(plain.success_rate_stdev_factor),
            enforcing_local_origin_success_rate: Some(plain.enforcing_local_origin_success_rate),
            failure_percentage_threshold: Some(plain.failure_percentage_threshold),
            enforcing_failure_percentage: Some(plain.enforcing_failure_percentage),
            enforcing_failure_percentage_local_origin: Some(
                plain.enforcing_failure_percentage_local_origin,
            ),
            failure_percentage_minimum_hosts: Some(plain.failure_percentage_minimum_hosts),
            failure_percentage_request_volume: Some(plain.failure_percentage_request_volume),
            max_ejection_time_jitter: Some(to_duration(plain.max_ejection_time_jitter)),
            successful_active_health_check_uneject_host: Some(plain.uneject_by_health_check),
            monitors: plain
                .latency
                .iter()
                .map(|latency| core::TypedExtensionConfig {
                    name: "latency".to_owned(),
                    typed_config: Some(latency.show()),
                })
                .collect(),
        }
    }
}
