//! `outrigger.outlier_detection_monitors.latency.v1.Config`, one of `outlier_detection.monitors`: which endpoints are outliers
//! because their tokens come late.

use super::route::TypedConfig;
use crate::problems::ConfigErrors;
use prost_types::Any;
use serde::{Deserialize, Serialize};

/// Our own type.
const TYPE_URL: &str = "type.googleapis.com/outrigger.outlier_detection_monitors.latency.v1.Config";

/// When an endpoint is slow. Medians of an interval are compared with the median of the cluster's endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LatencyMonitor {
    /// So many times the cluster's time to first token; 0 is off.
    pub ttft_factor: f64,
    /// And no less than this.
    pub ttft_floor_ms: u64,
    /// Prompt tokens that are not cached and are not held against an endpoint; more count in proportion.
    pub ttft_tokens: u64,
    /// So many times the cluster's time between tokens; 0 is off.
    pub itl_factor: f64,
    /// And no less than this.
    pub itl_floor_ms: u64,
    /// With fewer samples in an interval, nothing is said of an endpoint.
    pub request_volume: u32,
    /// With fewer endpoints that have volume, nothing is compared.
    pub minimum_hosts: u32,
    /// How often, in percent, it ejects.
    pub enforcing: u32,
}

impl Default for LatencyMonitor {
    fn default() -> Self {
        Self {
            ttft_factor: 3.0,
            ttft_floor_ms: 1_000,
            ttft_tokens: 512,
            itl_factor: 3.0,
            itl_floor_ms: 50,
            request_volume: 20,
            minimum_hosts: 2,
            enforcing: 100,
        }
    }
}

impl LatencyMonitor {
    /// Reads the monitor of this type.
    ///
    /// # Errors
    /// It is of another type, or a field is wrong.
    pub(super) fn read(any: Any) -> Result<Self, ConfigErrors> {
        let config = TypedConfig::try_from(any)?;
        if config.type_url != TYPE_URL {
            let message = format!("not supported yet: {}", config.type_url);
            return Err(ConfigErrors::one("", message));
        }
        let read: Self = serde_json::from_value(config.value)
            .map_err(|error| ConfigErrors::one("", error.to_string()))?;
        let mut problems = ConfigErrors::default();
        for (place, factor) in [
            ("ttft_factor", read.ttft_factor),
            ("itl_factor", read.itl_factor),
        ] {
            if factor != 0.0 && !(factor.is_finite() && factor >= 1.0) {
                problems.add(place, format!("must be 0 or at least 1, is {factor}"));
            }
        }
        if read.ttft_tokens == 0 {
            problems.add("ttft_tokens", "must be at least 1");
        }
        if read.minimum_hosts < 2 {
            let message = format!("must be at least 2, is {}", read.minimum_hosts);
            problems.add("minimum_hosts", message);
        }
        if read.enforcing > 100 {
            let message = format!("must be at most 100, is {}", read.enforcing);
            problems.add("enforcing", message);
        }
        problems.finish(Some(read))
    }

    /// As it was read.
    pub(super) fn show(&self) -> Any {
        Any::from(&TypedConfig {
            type_url: TYPE_URL.to_owned(),
            value: serde_json::to_value(self).unwrap_or_default(),
        })
    }
}
