//! What came of an attempt, and whether another endpoint might do better.

use super::retry::Rules;
use crate::{
    body::ResponseBody,
    error::{Error, Flag, Origin, Retry},
};
use http::Response;

/// What came of an attempt.
pub(crate) enum Outcome {
    /// A response to hand up.
    Response(Box<Response<ResponseBody>>),
    /// A response that another endpoint might better; handed up if there is no other.
    Unwanted(Box<Response<ResponseBody>>),
    /// No response.
    Failed(Error),
}

impl Outcome {
    pub(crate) fn retry_helps(&self, rules: &Rules) -> bool {
        match self {
            Self::Response(_) => false,
            Self::Unwanted(_) => true,
            // Our own circuit breaker is of the cluster: another endpoint of it is no help.
            Self::Failed(error) if error.is_own_overflow() => false,
            Self::Failed(error) => rules.helps(error),
        }
    }

    pub(crate) fn is_stale(&self) -> bool {
        matches!(self, Self::Failed(error) if error.stale)
    }

    /// Whether the endpoint broke after it had the request, which may be why.
    pub(crate) fn is_death(&self) -> bool {
        matches!(self, Self::Failed(error) if error.retry == Retry::NothingReceived
            && !error.stale
            && matches!(error.flag, Flag::UpstreamConnectionTermination | Flag::UpstreamRemoteReset))
    }

    /// Whether the endpoint had the request and failed it.
    pub(crate) fn is_loss(&self) -> bool {
        match self {
            Self::Response(response) | Self::Unwanted(response) => {
                response.status().is_server_error()
            }
            Self::Failed(error) => {
                let had_it = error.retry != Retry::NothingSent && !error.stale;
                had_it && error.origin == Origin::Upstream
            }
        }
    }

    /// Whether the endpoint broke, rather than being too busy or too slow.
    pub(crate) fn is_breakdown(&self) -> bool {
        match self {
            Self::Response(_) => false,
            Self::Unwanted(response) => matches!(response.status().as_u16(), 500 | 502),
            Self::Failed(error) => error.is_breakdown(),
        }
    }

    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Response(_) => "none",
            Self::Unwanted(_) => "status",
            Self::Failed(error) => error.flag.as_str(),
        }
    }

    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Response(response) | Self::Unwanted(response) => response.status().to_string(),
            Self::Failed(error) => error.to_string(),
        }
    }
}
