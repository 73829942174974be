//! Envoy's `health_check`: answers health checks of load balancers without an upstream.
//!
//! 503 while this proxy drains or was told to fail (`/healthcheck/fail` of the admin), else 200. While it fails, all
//! other responses say so too.

use crate::{
    body::{RequestBody, ResponseBody, empty},
    error::{Error, Flag},
    filter::{Context, Handled, HttpFilter, Next},
    matching::HeaderMatcher,
    registry,
    services::{Services, Serving},
};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use serde::Deserialize;
use std::{future::ready, sync::Arc};

/// Envoy's.
pub const TYPE_URL: &str =
    "type.googleapis.com/envoy.extensions.filters.http.health_check.v3.HealthCheck";

/// Tells a load balancer to take this proxy out at once.
const FAIL: HeaderName = HeaderName::from_static("x-envoy-immediate-health-check-fail");
/// Which cluster of proxies answered.
const CHECKED: HeaderName = HeaderName::from_static("x-envoy-upstream-healthchecked-cluster");

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    pass_through_mode: Option<bool>,
    headers: Vec<HeaderMatcher>,
}

/// The filter.
pub struct HealthCheck {
    pass_through: bool,
    headers: Vec<HeaderMatcher>,
    serving: Arc<Serving>,
    cluster: HeaderValue,
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
    let pass_through = config
        .pass_through_mode
        .ok_or("pass_through_mode: required")?;
    let cluster = HeaderValue::from_str(&services.node_cluster)
        .map_err(|_| "the node's cluster cannot be a header value".to_owned())?;
    Ok(Arc::new(HealthCheck {
        pass_through,
        headers: config.headers,
        serving: services.serving.clone(),
        cluster,
    }))
}

impl HttpFilter for HealthCheck {
    fn handle<'a>(
        &'a self,
        request: Request<RequestBody>,
        context: &'a mut Context,
        next: Next<'a>,
    ) -> Handled<'a> {
        let fails = self.serving.fails();
        let mut matchers = self.headers.iter();
        if !matchers.all(|matcher| matcher.matches(&request)) {
            if fails {
                return Box::pin(mark(request, context, next, FAIL, FAILS));
            }
            return next.run(request, context);
        }
        if self.pass_through && !fails {
            let cluster = self.cluster.clone();
            return Box::pin(mark(request, context, next, CHECKED, cluster));
        }
        Box::pin(ready(Ok(self.answer(fails, context))))
    }
}

const FAILS: HeaderValue = HeaderValue::from_static("true");

/// Puts one header on whatever comes back.
async fn mark(
    request: Request<RequestBody>,
    context: &mut Context,
    next: Next<'_>,
    name: HeaderName,
    value: HeaderValue,
) -> Result<Response<ResponseBody>, Error> {
    let put = move |headers: &mut HeaderMap| {
        headers.insert(name.clone(), value.clone());
    };
    match next.run(request, context).await {
        Ok(mut response) => {
            put(response.headers_mut());
            Ok(response)
        }
        Err(mut error) => {
            error.edits.add(move |_, headers| put(headers));
            Err(error)
        }
    }
}

impl HealthCheck {
    fn answer(&self, fails: bool, context: &mut Context) -> Response<ResponseBody> {
        let mut response = Response::new(empty());
        if fails {
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            context.log.flags.push(Flag::FailedLocalHealthCheck);
            context.log.details = "health_check_failed".into();
        } else {
            context.log.details = "health_check_ok".into();
        }
        response.headers_mut().insert(CHECKED, self.cluster.clone());
        response
    }
}
