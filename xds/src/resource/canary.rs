//! `outrigger.health_checkers.canary.v1.Config`, a `custom_health_check`: an engine is well when it generates, and when what it
//! generates is right.

use super::route::TypedConfig;
use crate::problems::ConfigErrors;
use prost_types::Any;
use serde::{Deserialize, Serialize};

/// Our own type.
const TYPE_URL: &str = "type.googleapis.com/outrigger.health_checkers.canary.v1.Config";
/// Its `name`, for people.
pub(super) const NAME: &str = "outrigger.health_checkers.canary";
/// Most tokens of a golden answer.
const GOLDEN_TOKENS_MAX: u32 = 64;

/// How engines are probed, beside what every health check says: `timeout` is a probe's deadline, `interval` the time without a
/// proof by real traffic after which one is sent, `unhealthy_interval` the time between two of them while there is doubt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Canary {
    /// Most of an engine's time that probes may take, in percent.
    pub share_percent: f64,
    /// A deadline of the first probe of a process, and the longest of those that engines need which are always slow.
    pub first_timeout_ms: u64,
    /// Every engine computes at least so many prompt tokens a second: waiting for them is no failure.
    pub prefill_tokens_per_s: u32,
    /// The shortest time that an engine is unhealthy; doubles each time that it is so again.
    pub readmission_ms: u64,
    /// The longest of these.
    pub readmission_max_ms: u64,
    /// Whether its answers are right.
    pub golden: Golden,
}

/// The fixed prompt and what is done with the answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Golden {
    /// What a wrong answer leads to.
    pub enforcing: Enforcing,
    /// Between two questions.
    pub interval_ms: u64,
    /// What is asked.
    pub prompt: String,
    /// Length of the answer.
    pub max_tokens: u32,
    /// A token is clear if it is more likely than any other by this difference of logarithms.
    pub margin: f64,
    /// Wrong answers in a row that eject.
    pub threshold: u32,
    /// What the answer begins with; learnt from the cohort if empty.
    pub expected: String,
}

/// What a wrong answer leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Enforcing {
    /// Nobody asks.
    Off,
    /// A line in the log and a count.
    Report,
    /// The engine is unhealthy.
    Eject,
}

impl Default for Canary {
    fn default() -> Self {
        Self {
            share_percent: 2.0,
            first_timeout_ms: 30_000,
            prefill_tokens_per_s: 500,
            readmission_ms: 5_000,
            readmission_max_ms: 60_000,
            golden: Golden::default(),
        }
    }
}

impl Default for Golden {
    fn default() -> Self {
        Self {
            enforcing: Enforcing::Report,
            interval_ms: 60_000,
            prompt: "1, 2, 3, 4, 5, 6, 7, 8, 9,".to_owned(),
            max_tokens: 8,
            margin: 1.0,
            threshold: 3,
            expected: String::new(),
        }
    }
}

impl Canary {
    /// Reads the check of this type.
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
        let golden = &read.golden;
        let is_share = read.share_percent > 0.0 && read.share_percent <= 100.0;
        for (place, is_right, rule) in [
            ("share_percent", is_share, "must be above 0 and at most 100"),
            (
                "prefill_tokens_per_s",
                read.prefill_tokens_per_s > 0,
                "must be at least 1",
            ),
            (
                "readmission_max_ms",
                read.readmission_max_ms >= read.readmission_ms,
                "must be at least readmission_ms",
            ),
            (
                "golden.interval_ms",
                golden.interval_ms > 0,
                "must be at least 1",
            ),
            ("golden.prompt", !golden.prompt.is_empty(), "required"),
            (
                "golden.max_tokens",
                (1..=GOLDEN_TOKENS_MAX).contains(&golden.max_tokens),
                "must be between 1 and 64",
            ),
            (
                "golden.margin",
                golden.margin.is_finite() && golden.margin > 0.0,
                "must be above 0",
            ),
            (
                "golden.threshold",
                golden.threshold > 0,
                "must be at least 1",
            ),
        ] {
            if !is_right {
                problems.add(place, rule);
            }
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
