//! Why a stream or an answer cannot stay where it is.

use crate::body::BodyError;
use bytes::Bytes;

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
}

impl Cause {
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
