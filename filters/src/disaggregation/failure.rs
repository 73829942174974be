//! Why a leg came to nothing, and what the client is told of it.

use crate::{
    body::ResponseBody,
    error::{Error, Flag, Retry},
};
use http::Response;
use outrigger_xds::report::EngineId;

/// Why a leg came to nothing: its engine broke.
pub(super) const BROKE: &str = "failed";

/// Why a leg came to nothing.
pub(super) struct Failure {
    pub(super) leg: &'static str,
    pub(super) reason: &'static str,
    pub(super) error: Option<Box<Error>>,
    /// The engine that failed, to be passed over.
    pub(super) at: Option<EngineId>,
    /// What it answered, where the client may have to be told.
    pub(super) answer: Option<Box<Response<ResponseBody>>>,
}

impl Failure {
    pub(super) fn new(leg: &'static str, reason: &'static str) -> Self {
        Self {
            leg,
            reason,
            error: None,
            at: None,
            answer: None,
        }
    }

    /// Whether the request is to blame, by the engine's word.
    pub(super) fn blames_request(&self) -> bool {
        let answer = self.answer.as_ref();
        answer.is_some_and(|answer| answer.status().is_client_error())
    }

    /// Whether an engine had the request, and did not just take too long.
    pub(super) fn was_asked(&self) -> bool {
        let broke = matches!(self.reason, BROKE | "empty");
        broke || self.error.is_some() || self.answer.is_some()
    }

    /// What the client is told where nobody is left to ask.
    pub(super) fn told(self) -> Result<Response<ResponseBody>, Error> {
        let was_asked = self.was_asked();
        match (self.answer, self.error) {
            (Some(answer), _) => Ok(*answer),
            (None, Some(error)) => Err(*error),
            (None, None) if self.reason == "timeout" => Err(Error::upstream_timeout()),
            (None, None) if was_asked => Err(Error::upstream_reset(
                Flag::UpstreamRemoteReset,
                "remote reset",
                Retry::NothingReceived,
            )),
            (None, None) => Err(Error::no_healthy_upstream()),
        }
    }
}

/// Nobody was there for it.
pub(super) fn none(leg: &'static str) -> Failure {
    Failure::new(leg, "none")
}
