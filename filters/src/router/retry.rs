//! When another attempt is allowed: our defaults, and Envoy's `retry_on`.

use crate::{
    error::{Error, Retry},
    matching::{Head, HeaderMatcher},
};
use http::{HeaderMap, HeaderName, StatusCode};
use outrigger_xds::resource::route::RetryPolicy;
use rand::Rng;
use std::{sync::Arc, time::Duration};

/// Attempts after the first, where no policy says otherwise.
pub const RETRIES_MAX: usize = 3;
/// On responses of a proxy that refused a request because it, or its upstream, has too much to do.
pub(crate) const OVERLOADED: HeaderName = HeaderName::from_static("x-envoy-overloaded");
/// On responses of a proxy that refused a request because its client sends too many.
const RATE_LIMITED: HeaderName = HeaderName::from_static("x-envoy-ratelimited");

/// An explicit `retry_policy`, prepared once and read as Envoy does.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    retries_max: usize,
    per_try_timeout: Duration,
    server_error: bool,
    gateway_error: bool,
    reset: bool,
    reset_before_request: bool,
    connect_failure: bool,
    refused_stream: bool,
    rate_limited: bool,
    conflict: bool,
    /// Of `retriable-status-codes`.
    codes: Vec<u16>,
    /// Of `retriable-headers`.
    headers: Vec<HeaderMatcher>,
    /// Values of `grpc-status`.
    grpc: Vec<&'static str>,
    /// If there are any, one must hold for the request.
    request_headers: Vec<HeaderMatcher>,
    base_interval: Duration,
    max_interval: Duration,
}

impl Policy {
    /// Prepares it.
    ///
    /// # Errors
    /// A header condition is not valid, which the checks of the configuration rule out.
    pub fn new(policy: &RetryPolicy) -> Result<Self, String> {
        let on = |name: &str| policy.retry_on.iter().any(|on| on == name);
        let grpc = [
            ("cancelled", "1"),
            ("deadline-exceeded", "4"),
            ("resource-exhausted", "8"),
            ("internal", "13"),
            ("unavailable", "14"),
        ];
        Ok(Self {
            retries_max: policy.num_retries as usize,
            per_try_timeout: policy.per_try_timeout,
            server_error: on("5xx"),
            gateway_error: on("gateway-error"),
            reset: on("reset"),
            reset_before_request: on("reset-before-request"),
            connect_failure: on("connect-failure"),
            refused_stream: on("refused-stream"),
            rate_limited: on("envoy-ratelimited"),
            conflict: on("retriable-4xx"),
            codes: if on("retriable-status-codes") {
                policy.retriable_status_codes.clone()
            } else {
                Vec::new()
            },
            headers: if on("retriable-headers") {
                HeaderMatcher::all(&policy.retriable_headers)?
            } else {
                Vec::new()
            },
            grpc: grpc
                .iter()
                .filter(|(name, _)| on(name))
                .map(|(_, code)| *code)
                .collect(),
            request_headers: HeaderMatcher::all(&policy.retriable_request_headers)?,
            base_interval: policy.base_interval,
            max_interval: policy.max_interval,
        })
    }

    /// Whether no response counts as a reason.
    fn any_reset(&self) -> bool {
        self.reset || self.server_error || self.gateway_error
    }

    fn helps(&self, error: &Error) -> bool {
        let refused = error.refused && self.refused_stream;
        match error.retry {
            Retry::No => false,
            Retry::NothingSent => {
                refused || self.any_reset() || self.connect_failure || self.reset_before_request
            }
            Retry::NothingReceived => refused || self.any_reset(),
        }
    }

    fn unwanted(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        // Who is overloaded wants no more of it.
        if headers.contains_key(OVERLOADED) {
            return false;
        }
        if headers.contains_key(RATE_LIMITED) {
            return self.rate_limited;
        }
        let code = status.as_u16();
        let grpc = || {
            headers
                .get("grpc-status")
                .is_some_and(|got| self.grpc.iter().any(|code| got == code))
        };
        self.server_error && status.is_server_error()
            || self.gateway_error && matches!(code, 502..=504)
            || self.conflict && code == 409
            || self.codes.contains(&code)
            || !self.grpc.is_empty() && grpc()
            || self
                .headers
                .iter()
                .any(|header| header.matches(Head::response(status, headers)))
    }

    /// How long to wait before retry `number`, from 1: by chance, up to a bound that doubles.
    fn back_off(&self, number: usize) -> Duration {
        let doublings = u32::try_from(number).unwrap_or(u32::MAX).min(16);
        let bound = self
            .base_interval
            .saturating_mul((1 << doublings) - 1)
            .min(self.max_interval);
        bound.mul_f64(rand::rng().random_range(0.0..1.0))
    }
}

/// What may be retried for one request.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Attempts after the first.
    pub retries_max: usize,
    /// The first stream event is awaited, and may be an error: generations only.
    pub peek: bool,
    /// Of one attempt; zero is none.
    pub per_try_timeout: Duration,
    generation: bool,
    policy: Option<Arc<Policy>>,
}

impl Rules {
    /// Our defaults, or an explicit policy.
    #[must_use]
    pub fn new<'a>(
        policy: Option<&Arc<Policy>>,
        generation: bool,
        request: impl Into<Head<'a>>,
    ) -> Self {
        let Some(policy) = policy else {
            return Self {
                retries_max: RETRIES_MAX,
                peek: generation,
                per_try_timeout: Duration::ZERO,
                generation,
                policy: None,
            };
        };
        let head = request.into();
        let conditions = &policy.request_headers;
        let meant = conditions.is_empty() || conditions.iter().any(|header| header.matches(head));
        Self {
            retries_max: if meant { policy.retries_max } else { 0 },
            peek: meant && generation && (policy.reset || policy.server_error),
            per_try_timeout: policy.per_try_timeout,
            generation,
            policy: Some(policy.clone()),
        }
    }

    /// Whether a failure is worth another attempt.
    #[must_use]
    pub fn helps(&self, error: &Error) -> bool {
        match (&self.policy, error.retry) {
            (Some(policy), _) => policy.helps(error),
            (None, Retry::No) => false,
            (None, Retry::NothingSent) => true,
            (None, Retry::NothingReceived) => self.generation,
        }
    }

    /// Whether a response with this head is worth another attempt.
    #[must_use]
    pub fn unwanted(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        match &self.policy {
            Some(policy) => policy.unwanted(status, headers),
            None => {
                self.generation && status.is_server_error() && !matches!(status.as_u16(), 501 | 505)
            }
        }
    }

    /// How long to wait before retry `number`, from 1.
    #[must_use]
    pub fn back_off(&self, number: usize) -> Option<Duration> {
        self.policy.as_ref().map(|policy| policy.back_off(number))
    }
}

/// A request that was tried again went well.
pub(super) fn count_success(cluster: &str) {
    metrics::counter!("envoy_cluster_upstream_rq_retry_success", "envoy_cluster_name" => cluster.to_owned())
        .increment(1);
}

/// A request was not tried again: too many retries are in flight.
pub(super) fn count_overflow(cluster: &str) {
    metrics::counter!("envoy_cluster_upstream_rq_retry_overflow", "envoy_cluster_name" => cluster.to_owned())
        .increment(1);
}

/// A request that was tried again failed for good.
pub(super) fn count_exhausted(cluster: &str) {
    metrics::counter!("envoy_cluster_upstream_rq_retry_limit_exceeded", "envoy_cluster_name" => cluster.to_owned())
        .increment(1);
}

/// Envoy's counters of retries.
pub(super) fn count(cluster: &str, reason: &'static str) {
    let cluster = cluster.to_owned();
    metrics::counter!("envoy_cluster_upstream_rq_retry", "envoy_cluster_name" => cluster.clone())
        .increment(1);
    metrics::counter!("outrigger_retries_total", "envoy_cluster_name" => cluster, "reason" => reason)
        .increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Flag;
    use http::Request;
    use outrigger_xds::resource::matching::{HeaderMatch, HeaderValueMatch};

    fn request() -> Request<()> {
        Request::get("/").header("x-safe", "1").body(()).unwrap()
    }

    fn rules(policy: &RetryPolicy) -> Rules {
        let policy = Arc::new(Policy::new(policy).unwrap());
        Rules::new(Some(&policy), true, &request())
    }

    fn on(conditions: &[&str]) -> RetryPolicy {
        RetryPolicy {
            retry_on: conditions.iter().map(ToString::to_string).collect(),
            num_retries: 2,
            ..RetryPolicy::default()
        }
    }

    fn code(code: u16) -> StatusCode {
        StatusCode::from_u16(code).unwrap()
    }

    fn error(retry: Retry, refused: bool) -> Error {
        let mut error = Error::upstream_reset(Flag::UpstreamRemoteReset, "remote reset", retry);
        error.refused = refused;
        error
    }

    #[test]
    fn a_generation_is_retried_on_what_another_engine_may_do_better() {
        let none = HeaderMap::new();
        let rules = Rules::new(None, true, &request());
        for (status, unwanted) in [
            (500, true),
            (503, true),
            (501, false),
            (400, false),
            (404, false),
            (429, false),
        ] {
            assert_eq!(rules.unwanted(code(status), &none), unwanted, "{status}");
        }
        let other = Rules::new(None, false, &request());
        assert!(
            !other.unwanted(StatusCode::SERVICE_UNAVAILABLE, &none),
            "anything else keeps the engine's answer"
        );
        assert!(other.helps(&error(Retry::NothingSent, false)));
        assert!(!other.helps(&error(Retry::NothingReceived, false)));
    }

    #[test]
    fn an_explicit_policy_is_read_as_envoy_does() {
        let none = HeaderMap::new();
        let gateway = rules(&on(&["gateway-error", "connect-failure"]));
        assert_eq!(gateway.retries_max, 2);
        assert!(gateway.unwanted(StatusCode::BAD_GATEWAY, &none));
        assert!(!gateway.unwanted(StatusCode::INTERNAL_SERVER_ERROR, &none));
        assert!(rules(&on(&["5xx"])).unwanted(StatusCode::NOT_IMPLEMENTED, &none));
        let mut codes = on(&["retriable-status-codes"]);
        codes.retriable_status_codes = vec![418];
        assert!(rules(&codes).unwanted(code(418), &none));
        codes.retry_on = vec!["5xx".into()];
        assert!(
            !rules(&codes).unwanted(code(418), &none),
            "the condition is not set"
        );
        let grpc: HeaderMap = [("grpc-status".parse().unwrap(), "14".parse().unwrap())]
            .into_iter()
            .collect();
        assert!(rules(&on(&["unavailable"])).unwanted(StatusCode::OK, &grpc));
        assert!(!rules(&on(&["cancelled"])).unwanted(StatusCode::OK, &grpc));
    }

    #[test]
    fn a_proxy_that_is_overloaded_is_not_asked_again() {
        for (name, conditions, unwanted) in [
            (OVERLOADED, &["5xx"][..], false),
            (OVERLOADED, &["5xx", "envoy-ratelimited"], false),
            (RATE_LIMITED, &["5xx"], false),
            (RATE_LIMITED, &["envoy-ratelimited"], true),
        ] {
            let headers: HeaderMap = [(name.clone(), "true".parse().unwrap())]
                .into_iter()
                .collect();
            let found = rules(&on(conditions)).unwanted(code(503), &headers);
            assert_eq!(found, unwanted, "{name} {conditions:?}");
        }
    }

    #[test]
    fn resets_are_told_apart() {
        use Retry::{NothingReceived, NothingSent};
        for (condition, sent, received, refused) in [
            ("5xx", true, true, true),
            ("reset", true, true, true),
            ("reset-before-request", true, false, false),
            ("connect-failure", true, false, false),
            ("refused-stream", false, false, true),
            ("retriable-4xx", false, false, false),
        ] {
            let rules = rules(&on(&[condition]));
            let found = [
                (NothingSent, false),
                (NothingReceived, false),
                (NothingReceived, true),
            ]
            .map(|(retry, refused)| rules.helps(&error(retry, refused)));
            assert_eq!(found, [sent, received, refused], "{condition}");
        }
    }

    #[test]
    fn a_request_without_the_header_is_not_tried_again() {
        let condition = |name: &str| HeaderMatch {
            name: name.into(),
            value: HeaderValueMatch::Present(true),
            invert: false,
            missing_is_empty: false,
        };
        for (name, retries) in [("x-safe", 2), ("x-other", 0)] {
            let mut policy = on(&["5xx"]);
            policy.retriable_request_headers = vec![condition(name)];
            assert_eq!(rules(&policy).retries_max, retries, "{name}");
        }
    }

    #[test]
    fn the_wait_doubles_up_to_its_bound() {
        let rules = rules(&on(&["5xx"]));
        for (number, bound) in [(1, 25), (2, 75), (3, 175), (4, 250), (60, 250)] {
            let longest = (0..200)
                .filter_map(|_| rules.back_off(number))
                .max()
                .unwrap();
            assert!(
                longest <= Duration::from_millis(bound),
                "{number}: {longest:?}"
            );
            assert!(
                longest > Duration::from_millis(bound / 2),
                "{number}: {longest:?}"
            );
        }
        assert_eq!(Rules::new(None, true, &request()).back_off(1), None);
    }
}
