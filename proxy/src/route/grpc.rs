//! How long a gRPC request may take: what its client says in `grpc-timeout`, within what the route allows.

use super::Destination;
use http::HeaderMap;
use outrigger_filters::{filter::RouteFacts, matching::is_grpc};
use std::{sync::Arc, time::Duration};

const TIMEOUT: &str = "grpc-timeout";
/// Of the number, by the protocol.
const DIGITS_MAX: usize = 8;

/// The facts of a route for this request: where the route has `max_grpc_timeout`, gRPC has a limit of its own.
pub fn limited(destination: &Destination, headers: &HeaderMap) -> Arc<RouteFacts> {
    within(destination.cluster.facts(headers), headers)
}

fn within(facts: Arc<RouteFacts>, headers: &HeaderMap) -> Arc<RouteFacts> {
    let Some(max) = facts.max_grpc_timeout.filter(|_| is_grpc(headers)) else {
        return facts;
    };
    let asked = headers
        .get(TIMEOUT)
        .and_then(|value| parse(value.as_bytes()));
    // Zero is no limit, on both sides.
    let limits = [asked, Some(max)].into_iter().flatten();
    let timeout = limits.filter(|limit| !limit.is_zero()).min();
    Arc::new(RouteFacts {
        timeout,
        ..RouteFacts::clone(&facts)
    })
}

/// At most eight digits and a unit (gRPC over HTTP/2, "Timeout"). What is none is as if it were not there.
fn parse(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    let is_number =
        (1..=DIGITS_MAX).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    let number: u64 = std::str::from_utf8(digits)
        .ok()
        .filter(|_| is_number)?
        .parse()
        .ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(number * 3600),
        b'M' => Duration::from_secs(number * 60),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        b'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_grpc_says_of_time_is_read() {
        for (text, expected) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("99999999M", Some(Duration::from_secs(99_999_999 * 60))),
            ("2S", Some(Duration::from_secs(2))),
            ("30m", Some(Duration::from_millis(30))),
            ("5u", Some(Duration::from_micros(5))),
            ("7n", Some(Duration::from_nanos(7))),
            ("123456789S", None),
            ("S", None),
            ("-1S", None),
            ("5", None),
            ("5x", None),
            ("", None),
        ] {
            assert_eq!(parse(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn the_lesser_of_what_is_asked_and_what_is_allowed_counts_for_grpc_alone() {
        let seconds = Duration::from_secs;
        for (max, asked, grpc, expected) in [
            (Some(seconds(5)), Some("2S"), true, Some(seconds(2))),
            (Some(seconds(5)), Some("9S"), true, Some(seconds(5))),
            (Some(seconds(5)), None, true, Some(seconds(5))),
            (Some(seconds(0)), Some("9S"), true, Some(seconds(9))),
            (Some(seconds(0)), None, true, None),
            (Some(seconds(5)), Some("2S"), false, Some(seconds(15))),
            (None, Some("2S"), true, Some(seconds(15))),
        ] {
            let facts = Arc::new(RouteFacts {
                timeout: Some(seconds(15)),
                max_grpc_timeout: max,
                ..RouteFacts::default()
            });
            let mut headers = HeaderMap::new();
            if let Some(asked) = asked {
                headers.insert(TIMEOUT, asked.parse().unwrap());
            }
            if grpc {
                headers.insert("content-type", "application/grpc".parse().unwrap());
            }
            let found = within(facts, &headers).timeout;
            assert_eq!(found, expected, "{max:?} {asked:?} {grpc}");
        }
    }
}
