//! `RetryPolicy`: when a request is tried again.

use super::matching::HeaderMatch;
use crate::{
    problems::ConfigErrors,
    protobuf::{duration, to_duration, type_name},
    wire::envoy::{
        config::route::v3 as wire,
        extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate,
    },
};
use prost::Name;
use prost_types::Any;
use std::time::Duration;
use wire::retry_policy::{RetryBackOff, RetryHostPredicate, retry_host_predicate::ConfigType};

/// What `retry_on` may list.
const RETRY_CONDITIONS: &[&str] = &[
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "envoy-ratelimited",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
];

/// `RetryBackOff.base_interval`, where none is given, as in Envoy.
const BASE_INTERVAL: Duration = Duration::from_millis(25);
/// `max_interval` where none is given is so many times the base, as in Envoy.
const MAX_INTERVALS: u32 = 10;

/// `RetryPolicy`, the part we honour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// `retry_on`, comma separated in Envoy.
    pub retry_on: Vec<String>,
    /// Default 1.
    pub num_retries: u32,
    /// Zero is none.
    pub per_try_timeout: Duration,
    /// For the condition `retriable-status-codes`.
    pub retriable_status_codes: Vec<u16>,
    /// For the condition `retriable-headers`.
    pub retriable_headers: Vec<HeaderMatch>,
    /// If there are any, one of them must hold for the request.
    pub retriable_request_headers: Vec<HeaderMatch>,
    /// The wait before the first retry is at most this,
    pub base_interval: Duration,
    /// and before any retry at most this.
    pub max_interval: Duration,
    /// `previous_hosts` is named; hosts that were tried are passed over anyway.
    pub previous_hosts: bool,
    /// `host_selection_retry_max_attempts`; no effect.
    pub host_selection_attempts: i64,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            retry_on: Vec::new(),
            num_retries: 1,
            per_try_timeout: Duration::ZERO,
            retriable_status_codes: Vec::new(),
            retriable_headers: Vec::new(),
            retriable_request_headers: Vec::new(),
            base_interval: BASE_INTERVAL,
            max_interval: BASE_INTERVAL * MAX_INTERVALS,
            previous_hosts: false,
            host_selection_attempts: 0,
        }
    }
}

impl TryFrom<wire::RetryPolicy> for RetryPolicy {
    type Error = ConfigErrors;

    fn try_from(wire: wire::RetryPolicy) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let listed = wire
            .retry_on
            .split(',')
            .map(str::trim)
            .filter(|condition| !condition.is_empty());
        let retry_on: Vec<String> = listed.map(str::to_owned).collect();
        for condition in retry_on
            .iter()
            .filter(|condition| !RETRY_CONDITIONS.contains(&condition.as_str()))
        {
            problems.add("retry_on", format!("unknown condition '{condition}'"));
        }
        let limit = wire
            .per_try_timeout
            .and_then(|limit| problems.take("per_try_timeout", duration(limit)));
        let mut codes = Vec::with_capacity(wire.retriable_status_codes.len());
        for (index, code) in wire.retriable_status_codes.iter().enumerate() {
            match u16::try_from(*code) {
                Ok(code) => codes.push(code),
                Err(_) => problems.add(
                    format!("retriable_status_codes[{index}]"),
                    format!("{code} is no HTTP status"),
                ),
            }
        }
        let (base_interval, max_interval) = match wire.retry_back_off {
            Some(back_off) => intervals(&mut problems, back_off),
            None => (BASE_INTERVAL, BASE_INTERVAL * MAX_INTERVALS),
        };
        let previous_hosts = !wire.retry_host_predicate.is_empty();
        for (index, predicate) in wire.retry_host_predicate.iter().enumerate() {
            check_predicate(&mut problems, index, predicate);
        }
        let plain = Self {
            retry_on,
            num_retries: wire.num_retries.unwrap_or(1),
            per_try_timeout: limit.unwrap_or_default(),
            retriable_status_codes: codes,
            retriable_headers: problems.take_all("retriable_headers", wire.retriable_headers),
            retriable_request_headers: problems
                .take_all("retriable_request_headers", wire.retriable_request_headers),
            base_interval,
            max_interval,
            previous_hosts,
            host_selection_attempts: wire.host_selection_retry_max_attempts,
        };
        problems.finish(Some(plain))
    }
}

fn intervals(problems: &mut ConfigErrors, wire: RetryBackOff) -> (Duration, Duration) {
    let mut take = |place: &str, interval: Option<prost_types::Duration>| {
        interval.and_then(|interval| {
            problems.take(&format!("retry_back_off.{place}"), duration(interval))
        })
    };
    let base = take("base_interval", wire.base_interval).unwrap_or_default();
    let max = take("max_interval", wire.max_interval).unwrap_or(base * MAX_INTERVALS);
    if base.is_zero() {
        problems.add("retry_back_off.base_interval", "required, greater than 0");
    }
    if max < base {
        problems.add(
            "retry_back_off.max_interval",
            "must not be less than base_interval",
        );
    }
    (base, max)
}

/// Only `previous_hosts`, by its type or, without one, by its usual name.
fn check_predicate(problems: &mut ConfigErrors, index: usize, predicate: &RetryHostPredicate) {
    let named = match &predicate.config_type {
        Some(ConfigType::TypedConfig(any)) => type_name(&any.type_url).to_owned(),
        None if predicate.name == "envoy.retry_host_predicates.previous_hosts" => return,
        None => predicate.name.clone(),
    };
    if named != PreviousHostsPredicate::full_name() {
        problems.add(
            format!("retry_host_predicate[{index}]"),
            format!("not supported yet: {named} as a retry host predicate"),
        );
    }
}

impl From<&RetryPolicy> for wire::RetryPolicy {
    fn from(plain: &RetryPolicy) -> Self {
        let predicate = || RetryHostPredicate {
            name: "envoy.retry_host_predicates.previous_hosts".into(),
            config_type: Some(ConfigType::TypedConfig(Any {
                type_url: format!(
                    "type.googleapis.com/{}",
                    PreviousHostsPredicate::full_name()
                ),
                value: Vec::new(),
            })),
        };
        let codes = plain.retriable_status_codes.iter();
        Self {
            retry_on: plain.retry_on.join(","),
            num_retries: Some(plain.num_retries),
            per_try_timeout: (!plain.per_try_timeout.is_zero())
                .then(|| to_duration(plain.per_try_timeout)),
            retry_host_predicate: plain.previous_hosts.then(predicate).into_iter().collect(),
            host_selection_retry_max_attempts: plain.host_selection_attempts,
            retriable_status_codes: codes.map(|code| u32::from(*code)).collect(),
            retry_back_off: Some(RetryBackOff {
                base_interval: Some(to_duration(plain.base_interval)),
                max_interval: Some(to_duration(plain.max_interval)),
            }),
            retriable_headers: plain.retriable_headers.iter().map(Into::into).collect(),
            retriable_request_headers: plain
                .retriable_request_headers
                .iter()
                .map(Into::into)
                .collect(),
        }
    }
}
