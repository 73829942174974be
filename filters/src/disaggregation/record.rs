//! What became of one request, for the access log, debug headers and metrics.

use outrigger_xds::report::EngineId;
use serde::{Serialize, Serializer};
use std::{sync::Arc, time::Duration};

/// One request's decision and its outcome.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Record {
    decision: &'static str,
    reason: &'static str,
    pub(super) prompt_tokens: u64,
    pub(super) uncached_tokens: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) predicted_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "name")]
    prefill: Option<EngineId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefill_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "name")]
    decode: Option<EngineId>,
    /// The leg that failed, and how. What became of the request is counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    fallback: Option<[&'static str; 2]>,
}

fn name<S: Serializer>(id: &Option<EngineId>, serializer: S) -> Result<S::Ok, S::Error> {
    id.as_ref().map(|id| &*id.0).serialize(serializer)
}

impl Record {
    pub(super) fn decide(&mut self, decision: &'static str, reason: &'static str) {
        self.decision = decision;
        self.reason = reason;
    }

    /// The prefill leg went well; what it took is not known where tokens came before its end.
    pub(super) fn prefilled(&mut self, at: Option<EngineId>, took: Option<Duration>) {
        self.prefill = at;
        self.prefill_ms = took.map(|took| took.as_millis() as u64);
        if let Some(took) = took {
            metrics::histogram!("outrigger_disaggregation_prefill_seconds").record(took);
        }
    }

    pub(super) fn decoded(&mut self, at: Option<EngineId>) {
        self.decode = at;
    }

    pub(super) fn fall_back(
        &mut self,
        leg: &'static str,
        reason: &'static str,
        outcome: &'static str,
    ) {
        self.fallback = Some([leg, reason]);
        metrics::counter!("outrigger_disaggregation_fallbacks_total",
            "leg" => leg, "outcome" => outcome, "reason" => reason)
        .increment(1);
    }

    pub(super) fn count(&self) {
        metrics::counter!("outrigger_disaggregation_total", "decision" => self.decision, "reason" => self.reason)
            .increment(1);
    }

    /// As one JSON object.
    pub(super) fn text(&self) -> Option<Arc<str>> {
        serde_json::to_string(self).ok().map(Into::into)
    }
}
