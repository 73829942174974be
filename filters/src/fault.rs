//! Envoy's `fault`: delays and ends requests on purpose, so that people see what their clients do.

use crate::{
    body::RequestBody,
    envoy::{FractionalPercent, duration},
    error::{Error, Flag, Origin},
    filter::{Context, Handled, HttpFilter, Next, StreamObserver},
    matching::HeaderMatcher,
    registry,
    services::Services,
};
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode};
use metrics::{Counter, Gauge};
use serde::Deserialize;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

/// Envoy's.
pub const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault";

/// Milliseconds, from a request of `header_delay`.
const DELAY: HeaderName = HeaderName::from_static("x-envoy-fault-delay-request");
const DELAY_SHARE: HeaderName = HeaderName::from_static("x-envoy-fault-delay-request-percentage");
/// HTTP status, from a request of `header_abort`.
const ABORT: HeaderName = HeaderName::from_static("x-envoy-fault-abort-request");
/// gRPC status, from a request of `header_abort`.
const ABORT_GRPC: HeaderName = HeaderName::from_static("x-envoy-fault-abort-grpc-request");
const ABORT_SHARE: HeaderName = HeaderName::from_static("x-envoy-fault-abort-request-percentage");

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    delay: Option<DelayConfig>,
    abort: Option<AbortConfig>,
    upstream_cluster: String,
    headers: Vec<HeaderMatcher>,
    max_active_faults: Option<u32>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
enum DelayKind {
    FixedDelay(#[serde(deserialize_with = "duration")] Duration),
    HeaderDelay(Empty),
}

#[derive(Debug, Clone, Deserialize)]
struct DelayConfig {
    #[serde(flatten)]
    kind: DelayKind,
    #[serde(default)]
    percentage: FractionalPercent,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AbortKind {
    HttpStatus(u16),
    GrpcStatus(u32),
    HeaderAbort(Empty),
}

#[derive(Debug, Clone, Deserialize)]
struct AbortConfig {
    #[serde(flatten)]
    kind: AbortKind,
    #[serde(default)]
    percentage: FractionalPercent,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Empty {}

/// The filter.
pub struct Fault {
    config: Config,
    active: Arc<Active>,
    delays: Counter,
    aborts: Counter,
    overflow: Counter,
}

/// Requests with a fault that are not over.
struct Active {
    count: AtomicU32,
    gauge: Gauge,
}

/// One of them, until dropped.
struct Running(Arc<Active>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Relaxed);
        self.0.gauge.decrement(1.0);
    }
}

/// Kept until the end of the response.
impl StreamObserver for Running {}

/// What a request is ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Abort {
    Http(StatusCode),
    Grpc(u32),
}

/// The registry's constructor.
///
/// # Errors
/// The configuration is wrong; the error names the field.
pub fn factory(
    value: &serde_json::Value,
    services: &Services,
) -> Result<Arc<dyn HttpFilter>, String> {
    let config: Config = registry::parse(value)?;
    if let Some(AbortConfig {
        kind: AbortKind::HttpStatus(status),
        ..
    }) = &config.abort
        && !(200..600).contains(status)
    {
        return Err(format!(
            "abort.http_status: must be between 200 and 599, is {status}"
        ));
    }
    if let Some(DelayConfig {
        kind: DelayKind::FixedDelay(Duration::ZERO),
        ..
    }) = &config.delay
    {
        return Err("delay.fixed_delay: must be greater than 0s".into());
    }
    let prefix = || services.stat_prefix.to_string();
    Ok(Arc::new(Fault {
        config,
        active: Arc::new(Active {
            count: AtomicU32::new(0),
            gauge: metrics::gauge!("envoy_http_fault_active_faults", "envoy_http_conn_manager_prefix" => prefix()),
        }),
        delays: metrics::counter!("envoy_http_fault_delays_injected", "envoy_http_conn_manager_prefix" => prefix()),
        aborts: metrics::counter!("envoy_http_fault_aborts_injected", "envoy_http_conn_manager_prefix" => prefix()),
        overflow: metrics::counter!("envoy_http_fault_faults_overflow", "envoy_http_conn_manager_prefix" => prefix()),
    }))
}

impl HttpFilter for Fault {
    fn handle<'a>(
        &'a self,
        request: Request<RequestBody>,
        context: &'a mut Context,
        next: Next<'a>,
    ) -> Handled<'a> {
        if !self.concerns(&request, context) {
            return next.run(request, context);
        }
        let delay = self.delay(request.headers());
        let abort = self.abort(request.headers());
        if delay.is_none() && abort.is_none() {
            return next.run(request, context);
        }
        let Some(running) = self.enter() else {
            self.overflow.increment(1);
            return next.run(request, context);
        };
        Box::pin(async move {
            if let Some(delay) = delay {
                self.delays.increment(1);
                context.log.flags.push(Flag::DelayInjected);
                tokio::time::sleep(delay).await;
            }
            if let Some(abort) = abort {
                self.aborts.increment(1);
                return Err(abort.error());
            }
            context.observers.push(Box::new(running));
            next.run(request, context).await
        })
    }
}

impl Fault {
    fn concerns(&self, request: &Request<RequestBody>, context: &Context) -> bool {
        let cluster = &self.config.upstream_cluster;
        (cluster.is_empty() || **cluster == *context.route.cluster)
            && self
                .config
                .headers
                .iter()
                .all(|matcher| matcher.matches(request))
    }

    fn enter(&self) -> Option<Running> {
        let max = self.config.max_active_faults.unwrap_or(u32::MAX);
        let more = |count: u32| (count < max).then_some(count + 1);
        self.active
            .count
            .fetch_update(Relaxed, Relaxed, more)
            .ok()?;
        self.active.gauge.increment(1.0);
        Some(Running(self.active.clone()))
    }

    fn delay(&self, headers: &HeaderMap) -> Option<Duration> {
        let config = self.config.delay.as_ref()?;
        match &config.kind {
            DelayKind::FixedDelay(delay) => config.percentage.draw().then_some(*delay),
            DelayKind::HeaderDelay(_) => {
                let delay = Duration::from_millis(number(headers, &DELAY)?);
                share(config.percentage, headers, &DELAY_SHARE)
                    .draw()
                    .then_some(delay)
            }
        }
    }

    fn abort(&self, headers: &HeaderMap) -> Option<Abort> {
        let config = self.config.abort.as_ref()?;
        let (abort, share) = match &config.kind {
            AbortKind::HttpStatus(status) => (Abort::http(*status)?, config.percentage),
            AbortKind::GrpcStatus(code) => (Abort::Grpc(*code), config.percentage),
            AbortKind::HeaderAbort(_) => (
                asked(headers)?,
                share(config.percentage, headers, &ABORT_SHARE),
            ),
        };
        share.draw().then_some(abort)
    }
}

/// How a request says that it wants to be ended.
fn asked(headers: &HeaderMap) -> Option<Abort> {
    let http = number(headers, &ABORT)
        .and_then(|status| u16::try_from(status).ok())
        .filter(|status| (200..600).contains(status))
        .and_then(Abort::http);
    http.or_else(|| {
        let code = u32::try_from(number(headers, &ABORT_GRPC)?).ok()?;
        Some(Abort::Grpc(code))
    })
}

/// The configured share, or less if the request says so.
fn share(
    configured: FractionalPercent,
    headers: &HeaderMap,
    name: &HeaderName,
) -> FractionalPercent {
    let asked = number(headers, name).and_then(|share| u32::try_from(share).ok());
    FractionalPercent {
        numerator: asked.map_or(configured.numerator, |asked| {
            asked.min(configured.numerator)
        }),
        ..configured
    }
}

fn number(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

impl Abort {
    fn http(status: u16) -> Option<Self> {
        StatusCode::from_u16(status).ok().map(Self::Http)
    }

    fn error(self) -> Error {
        let status = match self {
            Self::Http(status) => status,
            // Envoy tells it to gRPC clients only; others see a success.
            Self::Grpc(_) => StatusCode::OK,
        };
        let mut error = Error::new(
            Origin::Proxy,
            Flag::FaultInjected,
            status,
            "fault_filter_abort",
            "fault filter abort",
        );
        if let Self::Grpc(code) = self {
            error.edits.add(move |_, headers| {
                if let Some(told) = headers.get_mut("grpc-status") {
                    *told = HeaderValue::from(code);
                }
            });
        }
        error
    }
}
