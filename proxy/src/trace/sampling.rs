//! Whether a request is traced, as Envoy decides it: who asked, what its id says already, and shares.

use http::{HeaderMap, HeaderName};
use outrigger_xds::resource::tracing::Tracing;
use rand::Rng;

pub(crate) const CLIENT_TRACE_ID: HeaderName = HeaderName::from_static("x-client-trace-id");
const FORCE_TRACE: HeaderName = HeaderName::from_static("x-envoy-force-trace");

/// Where a request id tells why its request is traced: the digit that is the version of a UUID.
const REASON_AT: usize = 14;
const UUID_LENGTH: usize = 36;
/// Of how many a random share is.
const SHARES: u32 = 10_000;

/// Why a request is traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// It is not.
    NotTraceable,
    /// By chance.
    Sampling,
    /// A service inside asked for it.
    ServiceForced,
    /// The client asked for it.
    ClientForced,
}

/// The shares of one connection manager.
#[derive(Debug)]
pub(super) struct Sampling {
    client_percent: u32,
    random_shares: u32,
    overall_percent: u32,
}

impl Sampling {
    /// Whole per cents, but hundredths of the random share: Envoy's precision.
    pub(super) fn new(tracing: &Tracing) -> Self {
        Self {
            client_percent: tracing.client_sampling as u32,
            random_shares: (tracing.random_sampling * 100.0).round() as u32,
            overall_percent: tracing.overall_sampling as u32,
        }
    }

    pub(super) fn decide(&self, headers: &HeaderMap, request_id: &str) -> Reason {
        let stable = stable(request_id);
        let reason = match told(request_id) {
            Reason::NotTraceable => self.fresh(headers, stable),
            told => told,
        };
        if stable % 100 < self.overall_percent {
            reason
        } else {
            Reason::NotTraceable
        }
    }

    fn fresh(&self, headers: &HeaderMap, stable: u32) -> Reason {
        let asked = headers.contains_key(CLIENT_TRACE_ID);
        if asked && rand::rng().random_range(0..100) < self.client_percent {
            Reason::ClientForced
        } else if headers.contains_key(FORCE_TRACE) {
            Reason::ServiceForced
        } else if stable < self.random_shares {
            Reason::Sampling
        } else {
            Reason::NotTraceable
        }
    }
}

/// Below [`SHARES`], and the same for a request at each proxy, so that all decide alike. An id that is no UUID tells nothing.
fn stable(request_id: &str) -> u32 {
    let digits = request_id.get(..8);
    let number = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
    number.unwrap_or_else(|| rand::rng().random()) % SHARES
}

fn is_uuid(request_id: &str) -> bool {
    let fits = |(at, byte): (usize, u8)| match at {
        8 | 13 | 18 | 23 => byte == b'-',
        _ => byte.is_ascii_hexdigit(),
    };
    request_id.len() == UUID_LENGTH && request_id.bytes().enumerate().all(fits)
}

/// What a proxy before us wrote into the id.
fn told(request_id: &str) -> Reason {
    if !is_uuid(request_id) {
        return Reason::NotTraceable;
    }
    match request_id.as_bytes()[REASON_AT] {
        b'9' => Reason::Sampling,
        b'a' => Reason::ServiceForced,
        b'b' => Reason::ClientForced,
        _ => Reason::NotTraceable,
    }
}

/// The id with the reason in it, if it is to be another.
pub(crate) fn mark(request_id: &str, reason: Reason) -> Option<String> {
    let digit = match reason {
        Reason::NotTraceable => "4",
        Reason::Sampling => "9",
        Reason::ServiceForced => "a",
        Reason::ClientForced => "b",
    };
    if !is_uuid(request_id) || told(request_id) == reason {
        return None;
    }
    let mut marked = request_id.to_owned();
    marked.replace_range(REASON_AT..=REASON_AT, digit);
    Some(marked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn shares(client: f64, random: f64, overall: f64) -> Sampling {
        Sampling::new(&Tracing {
            client_sampling: client,
            random_sampling: random,
            overall_sampling: overall,
            ..Tracing::default()
        })
    }

    fn asked(name: HeaderName) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static("1"))])
    }

    /// 0x1388 is 5000: half of all are below.
    const HALF: &str = "00001388-0000-4000-8000-000000000000";

    #[test]
    fn who_asks_is_traced_whatever_the_share_and_the_overall_share_bounds_all() {
        let nobody = HeaderMap::new();
        for (sampling, headers, id, reason) in [
            (
                shares(100.0, 50.0, 100.0),
                &nobody,
                HALF,
                Reason::NotTraceable,
            ),
            (shares(100.0, 50.01, 100.0), &nobody, HALF, Reason::Sampling),
            (
                shares(100.0, 0.0, 100.0),
                &asked(FORCE_TRACE),
                HALF,
                Reason::ServiceForced,
            ),
            (
                shares(100.0, 0.0, 100.0),
                &asked(CLIENT_TRACE_ID),
                HALF,
                Reason::ClientForced,
            ),
            (
                shares(0.0, 0.0, 100.0),
                &asked(CLIENT_TRACE_ID),
                HALF,
                Reason::NotTraceable,
            ),
            (
                shares(100.0, 0.0, 0.0),
                &asked(FORCE_TRACE),
                HALF,
                Reason::NotTraceable,
            ),
            (
                shares(100.0, 100.0, 100.0),
                &nobody,
                "mine",
                Reason::Sampling,
            ),
            (
                shares(100.0, 0.0, 100.0),
                &nobody,
                "mine",
                Reason::NotTraceable,
            ),
        ] {
            assert_eq!(
                sampling.decide(headers, id),
                reason,
                "{sampling:?} {headers:?}"
            );
        }
    }

    #[test]
    fn an_id_tells_the_next_proxy_why() {
        let nothing = shares(100.0, 0.0, 100.0);
        for reason in [
            Reason::Sampling,
            Reason::ServiceForced,
            Reason::ClientForced,
        ] {
            let marked = mark(HALF, reason).unwrap();
            assert_eq!(nothing.decide(&HeaderMap::new(), &marked), reason);
            assert_eq!(mark(&marked, reason), None, "it says so already");
        }
        assert_eq!(mark(HALF, Reason::NotTraceable), None);
        for other in [
            "mine",
            "00001388-0000-4000-8000-00000000000g",
            "00001388_0000_4000_8000_000000000000",
            "000013880-000-4000-8000-000000000000",
        ] {
            assert_eq!(
                mark(other, Reason::Sampling),
                None,
                "no place for it: {other}"
            );
        }
    }

    #[test]
    fn an_id_that_is_not_traced_here_does_not_say_that_it_is() {
        let nothing = shares(100.0, 0.0, 0.0);
        for reason in [
            Reason::Sampling,
            Reason::ServiceForced,
            Reason::ClientForced,
        ] {
            let marked = mark(HALF, reason).unwrap();
            let denied = nothing.decide(&HeaderMap::new(), &marked);
            assert_eq!(denied, Reason::NotTraceable);
            assert_eq!(mark(&marked, denied).as_deref(), Some(HALF));
        }
    }
}
