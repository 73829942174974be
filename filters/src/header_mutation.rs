//! Envoy's `header_mutation`: adds, overwrites and removes headers of requests and responses.
//!
//! The filter's own changes are made first, then those of the route. Local replies of what stands after it are changed
//! too.

use crate::{
    body::RequestBody,
    envoy::headers::{Edit, HeaderMutation as Mutation, Scene, Side, compile},
    filter::{Context, Handled, HttpFilter, Next},
    registry,
    services::Services,
};
use http::{HeaderMap, Request, StatusCode};
use outrigger_xds::resource::route::TypedConfig;
use serde::Deserialize;
use std::sync::Arc;

/// Envoy's.
pub const TYPE_URL: &str =
    "type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation";
/// Of a route or a virtual host.
pub const ROUTE_TYPE_URL: &str =
    "type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute";

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    mutations: Mutations,
    most_specific_header_mutations_wins: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct PerRoute {
    mutations: Mutations,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Mutations {
    request_mutations: Vec<Mutation>,
    response_mutations: Vec<Mutation>,
}

/// The filter.
pub struct HeaderMutation {
    request: Vec<Edit>,
    response: Arc<[Edit]>,
    /// Some change of the response is made of the request.
    binds: bool,
}

/// The registry's constructor.
///
/// # Errors
/// The configuration is wrong; the error names the field.
pub fn factory(value: &serde_json::Value, _: &Services) -> Result<Arc<dyn HttpFilter>, String> {
    let config: Config = registry::parse(value)?;
    build(&[config.mutations])
}

/// The constructor for a route.
///
/// # Errors
/// The configuration is wrong; the error names the field.
pub fn on_route(
    value: &serde_json::Value,
    own: &[TypedConfig],
    _: &Services,
) -> Result<Arc<dyn HttpFilter>, String> {
    let config: Config = registry::parse(value)?;
    let mut all = vec![config.mutations];
    for own in own {
        all.push(registry::parse::<PerRoute>(&own.value)?.mutations);
    }
    // What is made last counts.
    if config.most_specific_header_mutations_wins {
        all[1..].reverse();
    }
    build(&all)
}

fn build(all: &[Mutations]) -> Result<Arc<dyn HttpFilter>, String> {
    let request = all
        .iter()
        .flat_map(|mutations| &mutations.request_mutations);
    let response = all
        .iter()
        .flat_map(|mutations| &mutations.response_mutations);
    let request = compile("request_mutations", request, Mutation::compile)?;
    let response = compile("response_mutations", response, Mutation::compile)?;
    Ok(Arc::new(HeaderMutation {
        binds: response.iter().any(Edit::needs_request),
        request,
        response: response.into(),
    }))
}

impl HttpFilter for HeaderMutation {
    fn handle<'a>(
        &'a self,
        request: Request<RequestBody>,
        context: &'a mut Context,
        next: Next<'a>,
    ) -> Handled<'a> {
        let (mut parts, body) = request.into_parts();
        let route = context.route.clone();
        let scene = Scene {
            route_name: &route.name,
            cluster: &route.cluster,
            side: Side::Request {
                method: &parts.method,
                uri: &parts.uri,
                version: parts.version,
            },
        };
        for edit in &self.request {
            edit.apply(scene, &mut parts.headers);
        }
        let response = if self.binds {
            let bound = self.response.iter();
            bound.map(|edit| edit.bind(scene, &parts.headers)).collect()
        } else {
            self.response.clone()
        };
        let request = Request::from_parts(parts, body);
        if response.is_empty() {
            return next.run(request, context);
        }
        Box::pin(async move {
            match next.run(request, context).await {
                Ok(mut answer) => {
                    let log = &context.log;
                    let host = log.upstream_host.as_ref().map_or("", |host| &*host.0);
                    let details = if log.details.is_empty() {
                        "via_upstream"
                    } else {
                        &log.details
                    };
                    let place = (&*route.name, &*route.cluster);
                    let status = answer.status();
                    change(
                        &response,
                        place,
                        (status, details, host),
                        answer.headers_mut(),
                    );
                    Ok(answer)
                }
                Err(mut error) => {
                    let details = error.details.clone();
                    error.edits.add(move |status, headers| {
                        let place = (&*route.name, &*route.cluster);
                        change(&response, place, (status, &details, ""), headers);
                    });
                    Err(error)
                }
            }
        })
    }
}

fn change(
    edits: &[Edit],
    (route_name, cluster): (&str, &str),
    (status, details, host): (StatusCode, &str, &str),
    headers: &mut HeaderMap,
) {
    let scene = Scene {
        route_name,
        cluster,
        side: Side::Response {
            status,
            details,
            host,
        },
    };
    for edit in edits {
        edit.apply(scene, headers);
    }
}
