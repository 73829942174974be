//! One request on one endpoint: what it counts, and what it tells those who judge endpoints.

use crate::{fleet, lb::Weights, ledger::Entered, metrics::ClusterStats, outlier::Detector};
use http::{HeaderMap, StatusCode};
use outrigger_filters::{
    breakers::Held,
    endpoints::{Ended, Endpoint, Reservation, Via},
    error::{Flag, GivenUp},
};
use outrigger_xds::orca::LoadReport;
use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

/// See the module.
pub(super) struct Leg {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) stats: Arc<ClusterStats>,
    pub(super) detector: Option<Arc<Detector>>,
    /// Who takes its load reports.
    pub(super) weights: Option<Arc<Weights>>,
    /// Whether outlier detection knows its status.
    pub(super) judged: bool,
    pub(super) entered: Option<Entered>,
    pub(super) prefill: u64,
    pub(super) begun: Instant,
    pub(super) status: Option<StatusCode>,
    /// The engine reported its own failure in an answer that began well.
    pub(super) reported_failure: bool,
    /// None until it is told.
    pub(super) ended: Option<Ended>,
    pub(super) given_up: GivenUp,
    pub(super) _held: Held,
}

impl Leg {
    /// Not as soon as the status is there: it may be that of the proxy beside the engine.
    fn judge(&mut self) {
        if let (Some(detector), Some(status), false) = (&self.detector, self.status, self.judged) {
            self.judged = true;
            detector.status(&self.endpoint, status.as_u16());
        }
    }

    fn end_prefill(&mut self) {
        let prefill = std::mem::take(&mut self.prefill);
        if prefill > 0 {
            self.endpoint
                .stats
                .prefill_tokens
                .fetch_sub(prefill, Relaxed);
        }
        if let Some(entered) = &mut self.entered {
            entered.first_byte();
        }
    }

    /// What a request that was left before its end has come to.
    fn left(&self) -> Ended {
        let is_error = self.status.is_some_and(|it| it.is_server_error());
        if is_error || self.has_failed() {
            Ended::Failed
        } else {
            Ended::Cancelled
        }
    }

    /// Whether it is the engine's fault that the answer, whole or not, is worth nothing.
    fn has_failed(&self) -> bool {
        self.reported_failure || self.given_up.reason().is_some()
    }

    /// Tells the canary of the engine beside us.
    fn accuse(&self) {
        if let Some(entered) = &self.entered {
            entered.traffic().failed();
        }
    }
}

/// Statuses that are the engine's fault: not those of what it cannot do at all.
fn is_failure(status: StatusCode) -> bool {
    status.is_server_error() && !matches!(status.as_u16(), 501 | 505)
}

/// Breaks that are the engine's fault.
fn blames_engine(flag: Flag) -> bool {
    matches!(
        flag,
        Flag::UpstreamConnectionFailure
            | Flag::UpstreamConnectionTermination
            | Flag::UpstreamRemoteReset
            | Flag::UpstreamProtocolError
            | Flag::UpstreamRequestTimeout
    )
}

/// Breaks that are the client's doing: they say nothing of the endpoint.
fn is_client(flag: Flag) -> bool {
    matches!(
        flag,
        Flag::DownstreamConnectionTermination | Flag::DownstreamProtocolError
    )
}

impl Reservation for Leg {
    fn first_byte(&mut self) {
        self.judge();
        self.end_prefill();
    }

    fn status(&mut self, status: StatusCode) {
        self.status = Some(status);
        if is_failure(status) {
            self.accuse();
        }
    }

    fn watches_answers(&self) -> bool {
        let entered = self.entered.as_ref();
        entered.is_some_and(|entered| entered.traffic().is_watched())
    }

    fn answer_piece(&mut self, is_failure: bool) {
        self.reported_failure |= is_failure;
        match &self.entered {
            Some(_) if is_failure => self.accuse(),
            Some(entered) => entered.traffic().piece(),
            None => {}
        }
    }

    fn watches_tokens(&self) -> bool {
        let detector = self.detector.as_ref();
        detector.is_some_and(|detector| detector.watches_tokens())
    }

    fn first_token(&mut self, took: Duration, uncached_tokens: u64) {
        self.endpoint.host.tally.first_token(took);
        if let Some(detector) = &self.detector {
            detector.first_token(&self.endpoint, took, uncached_tokens);
        }
    }

    fn later_token(&mut self, waited: Duration) {
        if let Some(detector) = &self.detector {
            detector.later_token(&self.endpoint, waited);
        }
    }

    fn report(&mut self, headers: &HeaderMap) {
        // Of an engine with a feed, the feed tells more, and sooner.
        let untold = self.endpoint.via == Via::Plain;
        if !untold && self.weights.is_none() {
            return;
        }
        match LoadReport::read(headers) {
            Some(Ok(report)) => {
                if let Some(weights) = &self.weights {
                    weights.take(&self.endpoint, &report);
                }
                if untold {
                    fleet::reported(&self.endpoint, &report);
                }
            }
            Some(Err(error)) => {
                tracing::debug!(endpoint = %self.endpoint.id, %error, "a load report was not taken");
                self.stats.orca_refused.increment(1);
            }
            None => {}
        }
    }

    fn finish(&mut self, broken: Option<Flag>) {
        if broken.is_some_and(is_client) {
            self.ended = Some(Ended::Cancelled);
            return;
        }
        let has_status = self.status.is_some_and(|it| !it.is_server_error());
        let is_well = broken.is_none() && has_status && !self.has_failed();
        self.ended = Some(if is_well {
            Ended::Succeeded
        } else {
            Ended::Failed
        });
        if broken.is_some_and(blames_engine) {
            self.accuse();
        }
        match (&self.detector, broken) {
            (Some(detector), Some(flag)) => detector.broken(&self.endpoint, flag),
            _ => self.judge(),
        }
        match broken {
            Some(Flag::UpstreamRequestTimeout) => {
                self.stats.upstream_rq_timeout.increment(1);
                self.stats.upstream_rq_tx_reset.increment(1);
            }
            Some(Flag::UpstreamRemoteReset) => self.stats.upstream_rq_rx_reset.increment(1),
            Some(Flag::UpstreamOverflow) => {
                self.endpoint.breakers.dropped.fetch_add(1, Relaxed);
            }
            _ => {}
        }
        // No answer counts as Envoy's local reply.
        let status = self.status.unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        self.stats.completed(status.as_u16(), self.begun.elapsed());
    }
}

impl Drop for Leg {
    fn drop(&mut self) {
        // One that was cancelled says nothing about its endpoint.
        self.judged = true;
        self.end_prefill();
        // An endpoint without active requests is forgotten, and its tally with it.
        self.endpoint
            .host
            .tally
            .end(self.ended.unwrap_or_else(|| self.left()));
        self.endpoint.stats.active.fetch_sub(1, Relaxed);
        self.stats.upstream_rq_active.decrement(1.0);
        if self.ended.is_none_or(|ended| ended == Ended::Cancelled) {
            self.stats.upstream_rq_cancelled.increment(1);
            self.stats.upstream_rq_tx_reset.increment(1);
        }
    }
}
