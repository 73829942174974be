//! `RetryPolicy`: when a request is tried again.

use crate::{
    problems::ConfigErrors,
    protobuf::{duration, to_duration},
    wire::envoy::config::route::v3 as wire,
};
use std::time::Duration;

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

/// `RetryPolicy`, the part we honour.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RetryPolicy {
    /// `retry_on`, comma separated in Envoy.
    pub retry_on: Vec<String>,
    /// Default 1.
    pub num_retries: u32,
    /// Zero is none.
    pub per_try_timeout: Duration,
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
        let num_retries = wire.num_retries.unwrap_or(1);
        problems.finish(Some(Self {
            retry_on,
            num_retries,
            per_try_timeout: limit.unwrap_or_default(),
        }))
    }
}

impl From<&RetryPolicy> for wire::RetryPolicy {
    fn from(plain: &RetryPolicy) -> Self {
        Self {
            retry_on: plain.retry_on.join(","),
            num_retries: Some(plain.num_retries),
            per_try_timeout: (!plain.per_try_timeout.is_zero())
                .then(|| to_duration(plain.per_try_timeout)),
        }
    }
}
