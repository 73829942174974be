//! Envoy's `cors`: answers preflights, and tells browsers which pages of other origins may read responses.
//!
//! It acts on routes that have a `CorsPolicy`; what a route leaves out comes from the policy around it.

use crate::{
    body::{RequestBody, ResponseBody, empty},
    envoy::{FractionalPercent, RuntimeFractionalPercent},
    filter::{Context, Handled, HttpFilter, Next},
    matching::TextMatcher,
    registry,
    runtime::{Runtime, Share},
    services::Services,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, header};
use metrics::Counter;
use outrigger_xds::resource::route::TypedConfig;
use serde::Deserialize;
use std::{future::ready, sync::Arc};

/// Envoy's.
pub const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors";
/// Of a route or a virtual host.
pub const ROUTE_TYPE_URL: &str =
    "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy";

const ASKS_PRIVATE: HeaderName = HeaderName::from_static("access-control-request-private-network");
const GRANTS_PRIVATE: HeaderName = HeaderName::from_static("access-control-allow-private-network");
const TRUE: HeaderValue = HeaderValue::from_static("true");

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Policy {
    allow_origin_string_match: Vec<TextMatcher>,
    allow_methods: String,
    allow_headers: String,
    expose_headers: String,
    max_age: String,
    allow_credentials: Option<bool>,
    filter_enabled: Option<RuntimeFractionalPercent>,
    shadow_enabled: Option<RuntimeFractionalPercent>,
    allow_private_network_access: Option<bool>,
    forward_not_matching_preflights: Option<bool>,
}

impl Policy {
    /// What is not said here is as `around` says.
    fn or(self, around: Self) -> Self {
        let text = |own: String, around: String| if own.is_empty() { around } else { own };
        Self {
            allow_origin_string_match: if self.allow_origin_string_match.is_empty() {
                around.allow_origin_string_match
            } else {
                self.allow_origin_string_match
            },
            allow_methods: text(self.allow_methods, around.allow_methods),
            allow_headers: text(self.allow_headers, around.allow_headers),
            expose_headers: text(self.expose_headers, around.expose_headers),
            max_age: text(self.max_age, around.max_age),
            allow_credentials: self.allow_credentials.or(around.allow_credentials),
            filter_enabled: self.filter_enabled.or(around.filter_enabled),
            shadow_enabled: self.shadow_enabled.or(around.shadow_enabled),
            allow_private_network_access: self
                .allow_private_network_access
                .or(around.allow_private_network_access),
            forward_not_matching_preflights: self
                .forward_not_matching_preflights
                .or(around.forward_not_matching_preflights),
        }
    }
}

/// The filter; without a policy it does nothing.
pub struct Cors {
    rules: Option<Rules>,
}

struct Rules {
    origins: Vec<TextMatcher>,
    enabled: Share,
    shadow: Share,
    forward_not_matching: bool,
    private_network: bool,
    /// On the answer to a preflight.
    preflight: Vec<(HeaderName, HeaderValue)>,
    /// On every response to an origin that may read it.
    actual: Arc<[(HeaderName, HeaderValue)]>,
    valid: Counter,
    invalid: Counter,
}

/// The registry's constructor.
///
/// # Errors
/// The configuration is wrong; the error names the field.
pub fn factory(value: &serde_json::Value, _: &Services) -> Result<Arc<dyn HttpFilter>, String> {
    let _: Config = registry::parse(value)?;
    Ok(Arc::new(Cors { rules: None }))
}

/// The constructor for a route.
///
/// # Errors
/// The configuration is wrong; the error names the field.
pub fn on_route(
    _: &serde_json::Value,
    own: &[TypedConfig],
    services: &Services,
) -> Result<Arc<dyn HttpFilter>, String> {
    let mut policy = Policy::default();
    for own in own {
        policy = policy.or(registry::parse(&own.value)?);
    }
    let rules = Rules::new(policy, &services.stat_prefix, &services.runtime)?;
    Ok(Arc::new(Cors { rules: Some(rules) }))
}

impl Rules {
    fn new(policy: Policy, prefix: &str, runtime: &Runtime) -> Result<Self, String> {
        let prefix = prefix.to_owned();
        let mut preflight = Vec::new();
        let mut actual = Vec::new();
        if policy.allow_credentials == Some(true) {
            preflight.push((header::ACCESS_CONTROL_ALLOW_CREDENTIALS, TRUE));
            actual.push((header::ACCESS_CONTROL_ALLOW_CREDENTIALS, TRUE));
        }
        for (list, name, text) in [
            (
                &mut preflight,
                header::ACCESS_CONTROL_ALLOW_METHODS,
                &policy.allow_methods,
            ),
            (
                &mut actual,
                header::ACCESS_CONTROL_EXPOSE_HEADERS,
                &policy.expose_headers,
            ),
        ] {
            list.extend(value(name, text)?);
        }
        preflight.extend(value(
            header::ACCESS_CONTROL_ALLOW_HEADERS,
            &policy.allow_headers,
        )?);
        preflight.extend(value(header::ACCESS_CONTROL_MAX_AGE, &policy.max_age)?);
        let share = |said: &Option<RuntimeFractionalPercent>, default: FractionalPercent| {
            let said = said.as_ref().map(|said| said.share(runtime));
            said.unwrap_or_else(|| default.fixed(runtime))
        };
        Ok(Self {
            origins: policy.allow_origin_string_match,
            enabled: share(&policy.filter_enabled, FractionalPercent::ALL),
            shadow: share(&policy.shadow_enabled, FractionalPercent::default()),
            forward_not_matching: policy.forward_not_matching_preflights.unwrap_or(true),
            private_network: policy.allow_private_network_access.unwrap_or(false),
            preflight,
            actual: actual.into(),
            valid: metrics::counter!("envoy_http_cors_origin_valid", "envoy_http_conn_manager_prefix" => prefix.clone()),
            invalid: metrics::counter!("envoy_http_cors_origin_invalid", "envoy_http_conn_manager_prefix" => prefix),
        })
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        let origin = origin.as_bytes();
        self.origins
            .iter()
            .any(|matcher| matcher.matches(b"*") || matcher.matches(origin))
    }

    /// Without an `origin` the asking one may not; Envoy tells it the rest all the same.
    fn preflight(&self, origin: Option<HeaderValue>, asks_private: bool) -> Response<ResponseBody> {
        let mut response = Response::new(empty());
        let headers = response.headers_mut();
        if let Some(origin) = origin {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            put(&self.actual, headers);
        }
        put(&self.preflight, headers);
        if self.private_network && asks_private {
            headers.insert(GRANTS_PRIVATE, TRUE);
        }
        response
    }
}

fn value(name: HeaderName, text: &str) -> Result<Option<(HeaderName, HeaderValue)>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let value = HeaderValue::from_str(text)
        .map_err(|_| format!("'{}' cannot be the value of {name}", text.escape_debug()))?;
    Ok(Some((name, value)))
}

fn put(all: &[(HeaderName, HeaderValue)], headers: &mut HeaderMap) {
    for (name, value) in all {
        headers.insert(name.clone(), value.clone());
    }
}

impl HttpFilter for Cors {
    fn handle<'a>(
        &'a self,
        request: Request<RequestBody>,
        context: &'a mut Context,
        next: Next<'a>,
    ) -> Handled<'a> {
        let headers = request.headers();
        let (Some(rules), Some(origin)) = (&self.rules, headers.get(header::ORIGIN)) else {
            return next.run(request, context);
        };
        let enabled = rules.enabled.draw();
        if !enabled && !rules.shadow.draw() {
            return next.run(request, context);
        }
        let allowed = rules.allows(origin);
        if allowed {
            &rules.valid
        } else {
            &rules.invalid
        }
        .increment(1);
        let preflight = request.method() == Method::OPTIONS
            && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
        let answer = preflight && (allowed || !rules.forward_not_matching);
        if !enabled || !allowed && !answer {
            return next.run(request, context);
        }
        let origin = origin.clone();
        if answer {
            let asks_private = headers.get(ASKS_PRIVATE) == Some(&TRUE);
            context.log.details = "cors_response".into();
            return Box::pin(ready(Ok(
                rules.preflight(Some(origin).filter(|_| allowed), asks_private)
            )));
        }
        let actual = rules.actual.clone();
        let mark = move |headers: &mut HeaderMap| {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            put(&actual, headers);
        };
        Box::pin(async move {
            match next.run(request, context).await {
                Ok(mut response) => {
                    mark(response.headers_mut());
                    Ok(response)
                }
                Err(mut error) => {
                    error.edits.add(move |_, headers| mark(headers));
                    Err(error)
                }
            }
        })
    }
}
