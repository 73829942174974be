//! `envoy.config.core.v3.HealthCheck`.

use super::canary::{self, Canary};
use crate::{
    problems::ConfigErrors,
    protobuf::{duration, to_duration},
    wire::envoy::{
        config::core::v3 as wire,
        r#type::v3::{CodecClientType, Int64Range},
    },
};
use std::{ops::Range, time::Duration};
use wire::{
    RequestMethod,
    health_check::{
        CustomHealthCheck, GrpcHealthCheck, HealthChecker, HttpHealthCheck, TcpHealthCheck,
        custom_health_check::ConfigType,
    },
};

/// How endpoints are asked for their health.
#[derive(Debug, Clone, PartialEq)]
pub struct HealthCheck {
    /// For one check.
    pub timeout: Duration,
    /// Between checks.
    pub interval: Duration,
    /// Most that is added to it at random.
    pub interval_jitter: Duration,
    /// The same in percent of it.
    pub interval_jitter_percent: u32,
    /// Before the first check, at random.
    pub initial_jitter: Duration,
    /// Failures in a row until an endpoint is unhealthy.
    pub unhealthy_threshold: u32,
    /// Successes in a row until it is healthy again.
    pub healthy_threshold: u32,
    /// One connection for many checks.
    pub reuse_connection: bool,
    /// Before the cluster was ever used.
    pub no_traffic_interval: Duration,
    /// As that, of healthy endpoints.
    pub no_traffic_healthy_interval: Duration,
    /// Of unhealthy endpoints.
    pub unhealthy_interval: Duration,
    /// Right after one became unhealthy.
    pub unhealthy_edge_interval: Duration,
    /// Right after one became healthy.
    pub healthy_edge_interval: Duration,
    /// What is asked.
    pub checker: Checker,
}

impl Default for HealthCheck {
    /// Envoy's defaults; it has none of the first four.
    fn default() -> Self {
        let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
        Self {
            timeout: second,
            interval: second,
            unhealthy_threshold: 1,
            healthy_threshold: 1,
            interval_jitter: Duration::ZERO,
            interval_jitter_percent: 0,
            initial_jitter: Duration::ZERO,
            reuse_connection: true,
            no_traffic_interval: minute,
            no_traffic_healthy_interval: minute,
            unhealthy_interval: second,
            unhealthy_edge_interval: second,
            healthy_edge_interval: second,
            checker: Checker::Tcp,
        }
    }
}

/// `health_checker`.
#[derive(Debug, Clone, PartialEq)]
pub enum Checker {
    /// An HTTP request.
    Http {
        /// `:authority`; empty is the cluster's name.
        host: String,
        /// Asked for.
        path: String,
        /// Its method.
        method: http::Method,
        /// Statuses that are well.
        expected: Vec<Range<u16>>,
        /// Statuses that are not, but are no verdict either: the threshold decides.
        retriable: Vec<Range<u16>>,
        /// HTTP/2 instead of HTTP/1.1.
        http2: bool,
    },
    /// A connection.
    Tcp,
    /// A call of `grpc.health.v1.Health/Check`.
    Grpc {
        /// Whose health; empty is that of the server.
        service: String,
        /// `:authority`; empty is the cluster's name.
        authority: String,
    },
    /// A generation, asked of the engines beside the proxy.
    Canary(Canary),
}

const NO_TRAFFIC_INTERVAL: Duration = Duration::from_secs(60);

impl TryFrom<wire::HealthCheck> for HealthCheck {
    type Error = ConfigErrors;

    fn try_from(wire: wire::HealthCheck) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let mut time = |place: &str, given: Option<prost_types::Duration>| {
            let read = problems.take(place, duration(given?))?;
            if read.is_zero() && !place.ends_with("jitter") {
                problems.add(place, "must be greater than 0");
            }
            Some(read)
        };
        let timeout = time("timeout", wire.timeout);
        let interval = time("interval", wire.interval);
        let interval_jitter = time("interval_jitter", wire.interval_jitter);
        let initial_jitter = time("initial_jitter", wire.initial_jitter);
        let no_traffic =
            time("no_traffic_interval", wire.no_traffic_interval).unwrap_or(NO_TRAFFIC_INTERVAL);
        let no_traffic_healthy = time(
            "no_traffic_healthy_interval",
            wire.no_traffic_healthy_interval,
        );
        let unhealthy = time("unhealthy_interval", wire.unhealthy_interval);
        let unhealthy_edge = time("unhealthy_edge_interval", wire.unhealthy_edge_interval);
        let healthy_edge = time("healthy_edge_interval", wire.healthy_edge_interval);
        for (place, is_missing) in [
            ("timeout", wire.timeout.is_none()),
            ("interval", wire.interval.is_none()),
            ("unhealthy_threshold", wire.unhealthy_threshold.is_none()),
            ("healthy_threshold", wire.healthy_threshold.is_none()),
        ] {
            if is_missing {
                problems.add(place, "required");
            }
        }
        let checker = checker(&mut problems, wire.health_checker);
        let interval = interval.unwrap_or_default();
        let unhealthy_interval = unhealthy.unwrap_or(interval);
        problems.finish(checker.map(|checker| Self {
            timeout: timeout.unwrap_or_default(),
            interval,
            interval_jitter: interval_jitter.unwrap_or_default(),
            interval_jitter_percent: wire.interval_jitter_percent,
            initial_jitter: initial_jitter.unwrap_or_default(),
            unhealthy_threshold: wire.unhealthy_threshold.unwrap_or_default(),
            healthy_threshold: wire.healthy_threshold.unwrap_or_default(),
            reuse_connection: wire.reuse_connection.unwrap_or(true),
            no_traffic_interval: no_traffic,
            no_traffic_healthy_interval: no_traffic_healthy.unwrap_or(no_traffic),
            unhealthy_interval,
            unhealthy_edge_interval: unhealthy_edge.unwrap_or(unhealthy_interval),
            healthy_edge_interval: healthy_edge.unwrap_or(interval),
            checker,
        }))
    }
}

fn checker(problems: &mut ConfigErrors, given: Option<HealthChecker>) -> Option<Checker> {
    let http = match given {
        None => {
            problems.add(
                "",
                "required: http_health_check, tcp_health_check, grpc_health_check or custom_health_check",
            );
            return None;
        }
        Some(HealthChecker::TcpHealthCheck(_)) => return Some(Checker::Tcp),
        Some(HealthChecker::GrpcHealthCheck(grpc)) => {
            check_authority(problems, "grpc_health_check.authority", &grpc.authority);
            return Some(Checker::Grpc {
                service: grpc.service_name,
                authority: grpc.authority,
            });
        }
        Some(HealthChecker::CustomHealthCheck(custom)) => {
            return problems
                .take("custom_health_check.typed_config", read_custom(custom))
                .map(Checker::Canary);
        }
        Some(HealthChecker::HttpHealthCheck(http)) => http,
    };
    let place = "http_health_check";
    check_authority(problems, "http_health_check.host", &http.host);
    let http2 = match http.codec_client_type() {
        CodecClientType::Http1 => false,
        CodecClientType::Http2 => true,
        CodecClientType::Http3 => {
            problems.add(
                format!("{place}.codec_client_type"),
                "not supported yet: HTTP3",
            );
            false
        }
    };
    let method = match http.method() {
        RequestMethod::MethodUnspecified => http::Method::GET,
        RequestMethod::Connect => {
            problems.add(format!("{place}.method"), "must not be CONNECT");
            http::Method::GET
        }
        other => http::Method::from_bytes(other.as_str_name().as_bytes()).ok()?,
    };
    let path = problems.not_empty("http_health_check.path", http.path);
    if !path.is_empty() && path.parse::<http::uri::PathAndQuery>().is_err() {
        problems.add(format!("{place}.path"), "not a path");
    }
    let place = format!("{place}.expected_statuses");
    let mut expected = statuses(problems, &place, http.expected_statuses);
    if expected.is_empty() {
        expected.push(200..201);
    }
    let place = "http_health_check.retriable_statuses";
    Some(Checker::Http {
        host: http.host,
        path,
        method,
        expected,
        retriable: statuses(problems, place, http.retriable_statuses),
        http2,
    })
}

fn read_custom(custom: CustomHealthCheck) -> Result<Canary, ConfigErrors> {
    match custom.config_type {
        Some(ConfigType::TypedConfig(any)) => Canary::read(any),
        None => Err(ConfigErrors::one("", "required")),
    }
}

fn check_authority(problems: &mut ConfigErrors, place: &str, given: &str) {
    if !given.is_empty() && given.parse::<http::uri::Authority>().is_err() {
        problems.add(place, "not an authority");
    }
}

fn statuses(problems: &mut ConfigErrors, place: &str, given: Vec<Int64Range>) -> Vec<Range<u16>> {
    let mut read = Vec::new();
    for (index, range) in given.into_iter().enumerate() {
        match (u16::try_from(range.start), u16::try_from(range.end)) {
            (Ok(start), Ok(end)) if start >= 100 && start < end && end <= 600 => {
                read.push(start..end);
            }
            _ => problems.add(
                format!("{place}[{index}]"),
                "must lie within 100 and 600 and not be empty",
            ),
        }
    }
    read
}

fn ranges(statuses: &[Range<u16>]) -> Vec<Int64Range> {
    let ranges = statuses.iter().map(|range| Int64Range {
        start: range.start.into(),
        end: range.end.into(),
    });
    ranges.collect()
}

impl From<&HealthCheck> for wire::HealthCheck {
    fn from(plain: &HealthCheck) -> Self {
        let time = |time: Duration| Some(to_duration(time));
        let some = |given: Duration| (!given.is_zero()).then(|| to_duration(given));
        let checker = match &plain.checker {
            Checker::Tcp => HealthChecker::TcpHealthCheck(TcpHealthCheck {}),
            Checker::Canary(canary) => HealthChecker::CustomHealthCheck(CustomHealthCheck {
                name: canary::NAME.to_owned(),
                config_type: Some(ConfigType::TypedConfig(canary.show())),
            }),
            Checker::Grpc { service, authority } => {
                HealthChecker::GrpcHealthCheck(GrpcHealthCheck {
                    service_name: service.clone(),
                    authority: authority.clone(),
                })
            }
            Checker::Http {
                host,
                path,
                method,
                expected,
                retriable,
                http2,
            } => HealthChecker::HttpHealthCheck(HttpHealthCheck {
                host: host.clone(),
                path: path.clone(),
                method: RequestMethod::from_str_name(method.as_str())
                    .unwrap_or_default()
                    .into(),
                expected_statuses: ranges(expected),
                retriable_statuses: ranges(retriable),
                codec_client_type: if *http2 {
                    CodecClientType::Http2
                } else {
                    CodecClientType::Http1
                }
                .into(),
            }),
        };
        Self {
            timeout: time(plain.timeout),
            interval: time(plain.interval),
            interval_jitter: some(plain.interval_jitter),
            interval_jitter_percent: plain.interval_jitter_percent,
            initial_jitter: some(plain.initial_jitter),
            unhealthy_threshold: Some(plain.unhealthy_threshold),
            healthy_threshold: Some(plain.healthy_threshold),
            reuse_connection: (!plain.reuse_connection).then_some(false),
            no_traffic_interval: time(plain.no_traffic_interval),
            no_traffic_healthy_interval: time(plain.no_traffic_healthy_interval),
            unhealthy_interval: time(plain.unhealthy_interval),
            unhealthy_edge_interval: time(plain.unhealthy_edge_interval),
            healthy_edge_interval: time(plain.healthy_edge_interval),
            health_checker: Some(checker),
        }
    }
}
