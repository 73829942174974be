//! Why a stream or an answer cannot stay where it is.

use crate::{
    body::BodyError,
    endpoints::{Endpoint, Host},
    error::Flag,
};
use bytes::Bytes;
use outrigger_xds::{report::Health, resource::endpoint::HealthStatus};
use std::sync::atomic::Ordering::Relaxed;

/// What clients are told of an engine whose stream ends so.
pub(super) const UNPROVEN: &str =
    "the engine takes no chat prompt of tokens, or not within reasoning";
pub(super) const DIVERGED: &str = "the engine generated another text than the one before it";
pub(super) const SEED_REFUSED: &str = "the engine takes no seeds";

/// Why a stream cannot go on where it is.
#[derive(Debug, Clone)]
pub(super) enum Cause {
    /// The connection broke.
    Broke(BodyError),
    /// The engine said that it failed; these are its words.
    Error(Bytes),
    /// It ended the stream as if it were whole.
    Truncated,
    /// It aborted the request; this is how it says so.
    Aborted(Bytes),
    /// Nothing came for too long.
    Stall,
    /// The engine drains, or was ejected.
    Leaving,
    /// The engine does not take tokens where they were given.
    Unproven,
    /// What was generated again is not what was delivered.
    Diverged,
    /// The engine takes no seeds, and the request's was ours.
    SeedRefused,
}

impl Cause {
    /// What its engine is blamed for, where a leg is left for this before its end.
    pub(super) fn blame(&self) -> Option<Flag> {
        match self {
            Self::Broke(error) => Some(error.flag),
            Self::Error(_) => Some(Flag::UpstreamRemoteReset),
            Self::Stall => Some(Flag::StreamIdleTimeout),
            Self::Truncated
            | Self::Aborted(_)
            | Self::Leaving
            | Self::Unproven
            | Self::Diverged
            | Self::SeedRefused => None,
        }
    }

    /// As in metrics.
    pub(super) fn as_str(&self) -> &'static str {
        match self {
            Self::Broke(_) => "broke",
            Self::Error(_) => "error_event",
            Self::Truncated => "truncated",
            Self::Aborted(_) => "aborted",
            Self::Stall => "stall",
            Self::Leaving => "leaving",
            Self::Unproven => "unproven",
            Self::Diverged => "diverged",
            Self::SeedRefused => "seed_refused",
        }
    }

    /// A stream or an answer went on elsewhere, or was to.
    pub(super) fn count(&self, outcome: &'static str) {
        metrics::counter!("outrigger_migrations_total", "cause" => self.as_str(), "outcome" => outcome)
            .increment(1);
    }

    /// It should have gone on elsewhere, and could not.
    pub(super) fn count_refusal(&self, reason: &'static str) {
        metrics::counter!("outrigger_migration_refusals_total", "cause" => self.as_str(), "reason" => reason)
            .increment(1);
    }
}

/// Why checks take an engine out.
const EJECTED: u32 = Host::FAILED_ACTIVE_HC | Host::FAILED_OUTLIER_CHECK;

/// What is known of an engine.
pub(super) enum Condition {
    Well,
    /// It does not answer.
    Dead,
    /// It is to get no more requests, and to lose those that it has.
    Leaving,
}

/// Whether nothing more is to be hoped for from an engine: one that only drains ends what it has.
pub(super) fn is_gone(endpoint: &Endpoint) -> bool {
    endpoint.live.load().state.health == Health::Dead || endpoint.host.has(EJECTED)
}

/// As its own words, its checks and the control plane say.
pub(super) fn condition(endpoint: &Endpoint) -> Condition {
    let health = endpoint.live.load().state.health;
    let told = endpoint.health_status == HealthStatus::Draining
        || endpoint.stats.leaving.load(Relaxed)
        || health == Health::Draining;
    if told || health == Health::Unhealthy || endpoint.host.has(EJECTED) {
        Condition::Leaving
    } else if health == Health::Dead {
        Condition::Dead
    } else {
        Condition::Well
    }
}
