//! Load reports (ORCA) on their way: read where they come back from an endpoint, told where the engine is beside us, and kept
//! from clients that did not ask for them.

use crate::endpoints::{Endpoint, Reservation, Via};
use http::HeaderMap;
use outrigger_xds::orca::{BINARY_HEADER, FORMAT_HEADER, HEADER};

/// Who gets to see the reports of one exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// Nobody behind us: they are taken off.
    Us,
    /// Whoever asked gets what comes.
    Asked,
    /// A peer, or a client that asked for text: gets ours, where the engine is beside us.
    Told,
}

impl Audience {
    /// Of a request with these headers.
    #[must_use]
    pub fn of(headers: &HeaderMap, inbound: bool) -> Self {
        if inbound {
            return Self::Told;
        }
        match headers.get(FORMAT_HEADER).map(|format| format.as_bytes()) {
            Some(format) if format.eq_ignore_ascii_case(b"text") => Self::Told,
            Some(_) => Self::Asked,
            None => Self::Us,
        }
    }
}

/// Takes in the report of a response or its trailers.
pub(super) fn take(headers: &mut HeaderMap, reservation: &mut dyn Reservation, audience: Audience) {
    if !headers.contains_key(HEADER) && !headers.contains_key(BINARY_HEADER) {
        return;
    }
    reservation.report(headers);
    if audience == Audience::Us {
        headers.remove(HEADER);
        headers.remove(BINARY_HEADER);
    }
}

/// Puts ours in, which says more than the engine's own.
pub(super) fn tell(headers: &mut HeaderMap, endpoint: &Endpoint, audience: Audience) {
    if audience != Audience::Told || endpoint.via != Via::Local {
        return;
    }
    if let Some(report) = &*endpoint.stats.report.load() {
        headers.insert(HEADER, report.as_ref().clone());
    }
}
