//! `envoy.config.cluster.v3.CircuitBreakers`.

use super::route_action::Priority;
use crate::{
    problems::ConfigErrors,
    wire::envoy::{
        config::{cluster::v3 as wire, core::v3 as core},
        r#type::v3::Percent,
    },
};
use wire::circuit_breakers::{Thresholds as WireThresholds, thresholds::RetryBudget};

/// Limits of one cluster, by priority.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CircuitBreakers {
    /// Of `DEFAULT` priority.
    pub default: Thresholds,
    /// Of `HIGH` priority.
    pub high: Thresholds,
}

impl CircuitBreakers {
    /// Those of a priority.
    #[must_use]
    pub fn of(&self, priority: Priority) -> &Thresholds {
        match priority {
            Priority::Default => &self.default,
            Priority::High => &self.high,
        }
    }
}

/// Limits of one priority; defaults are ours where Envoy's (1024) would cut streams.
#[derive(Debug, Clone, PartialEq)]
pub struct Thresholds {
    /// Open connections.
    pub max_connections: u32,
    /// Open connections to one endpoint (`per_host_thresholds`).
    pub max_connections_per_host: Option<u32>,
    /// Requests that wait for a connection.
    pub max_pending_requests: u32,
    /// Requests in flight.
    pub max_requests: u32,
    /// Retries in flight.
    pub retries: RetryLimit,
    /// Gauges tell what is left.
    pub track_remaining: bool,
}

/// How many retries may be in flight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RetryLimit {
    /// `max_retries`.
    Count(u32),
    /// `retry_budget`.
    Budget {
        /// Share of the requests in flight, in percent.
        percent: f64,
        /// Always allowed.
        min_concurrency: u32,
    },
}

impl Default for RetryLimit {
    fn default() -> Self {
        Self::Budget {
            percent: 20.0,
            min_concurrency: 3,
        }
    }
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            max_connections: 65_536,
            max_connections_per_host: None,
            max_pending_requests: 65_536,
            max_requests: 65_536,
            retries: RetryLimit::default(),
            track_remaining: false,
        }
    }
}

impl TryFrom<wire::CircuitBreakers> for CircuitBreakers {
    type Error = ConfigErrors;

    fn try_from(wire: wire::CircuitBreakers) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let (mut default, mut high) = (None, None);
        for (index, wire) in wire.thresholds.into_iter().enumerate() {
            let of = match wire.priority() {
                core::RoutingPriority::Default => &mut default,
                core::RoutingPriority::High => &mut high,
            };
            let thresholds =
                problems.take(&format!("thresholds[{index}]"), Thresholds::try_from(wire));
            // As in Envoy the first of a priority counts.
            if of.is_none() {
                *of = thresholds;
            }
        }
        let mut all = Self {
            default: default.unwrap_or_default(),
            high: high.unwrap_or_default(),
        };
        for (index, wire) in wire.per_host_thresholds.iter().enumerate() {
            let of = match wire.priority() {
                core::RoutingPriority::Default => &mut all.default,
                core::RoutingPriority::High => &mut all.high,
            };
            let of = &mut of.max_connections_per_host;
            *of = of.or(wire.max_connections);
            let only = WireThresholds {
                priority: wire.priority,
                max_connections: wire.max_connections,
                ..WireThresholds::default()
            };
            if *wire != only {
                let message = "only max_connections may be set, beside priority";
                problems.add(format!("per_host_thresholds[{index}]"), message);
            }
        }
        problems.finish(Some(all))
    }
}

impl TryFrom<WireThresholds> for Thresholds {
    type Error = ConfigErrors;

    fn try_from(wire: WireThresholds) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let defaults = Self::default();
        let retries = match (wire.retry_budget, wire.max_retries) {
            (Some(budget), _) => problems
                .take("retry_budget", retry_budget(budget))
                .unwrap_or_default(),
            (None, Some(count)) => RetryLimit::Count(count),
            (None, None) => defaults.retries,
        };
        problems.finish(Some(Self {
            max_connections: wire.max_connections.unwrap_or(defaults.max_connections),
            max_connections_per_host: None,
            max_pending_requests: wire
                .max_pending_requests
                .unwrap_or(defaults.max_pending_requests),
            max_requests: wire.max_requests.unwrap_or(defaults.max_requests),
            retries,
            track_remaining: wire.track_remaining,
        }))
    }
}

fn retry_budget(wire: RetryBudget) -> Result<RetryLimit, ConfigErrors> {
    let percent = wire.budget_percent.map_or(20.0, |percent| percent.value);
    if !(0.0..=100.0).contains(&percent) {
        let message = format!("must be between 0 and 100, is {percent}");
        return Err(ConfigErrors::one("budget_percent.value", message));
    }
    Ok(RetryLimit::Budget {
        percent,
        min_concurrency: wire.min_retry_concurrency.unwrap_or(3),
    })
}

impl From<&CircuitBreakers> for wire::CircuitBreakers {
    fn from(plain: &CircuitBreakers) -> Self {
        let mut thresholds = vec![show(&plain.default, core::RoutingPriority::Default)];
        if plain.high != Thresholds::default() {
            thresholds.push(show(&plain.high, core::RoutingPriority::High));
        }
        let priorities = [
            (&plain.default, core::RoutingPriority::Default),
            (&plain.high, core::RoutingPriority::High),
        ];
        let per_host = priorities.into_iter().filter_map(|(plain, priority)| {
            Some(WireThresholds {
                priority: priority.into(),
                max_connections: Some(plain.max_connections_per_host?),
                ..WireThresholds::default()
            })
        });
        Self {
            thresholds,
            per_host_thresholds: per_host.collect(),
        }
    }
}

fn show(plain: &Thresholds, priority: core::RoutingPriority) -> WireThresholds {
    let (retry_budget, max_retries) = match plain.retries {
        RetryLimit::Count(count) => (None, Some(count)),
        RetryLimit::Budget {
            percent,
            min_concurrency,
        } => {
            let budget = RetryBudget {
                budget_percent: Some(Percent { value: percent }),
                min_retry_concurrency: Some(min_concurrency),
            };
            (Some(budget), None)
        }
    };
    WireThresholds {
        priority: priority.into(),
        max_connections: Some(plain.max_connections),
        max_pending_requests: Some(plain.max_pending_requests),
        max_requests: Some(plain.max_requests),
        max_retries,
        retry_budget,
        track_remaining: plain.track_remaining,
    }
}
