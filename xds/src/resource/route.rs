//! `envoy.config.route.v3.RouteConfiguration`.

pub use super::{
    retry_policy::RetryPolicy,
    route_action::{ClusterSpecifier, HostRewrite, Redirect, RouteAction},
};

use super::{
    header_mutation::HeaderMutations,
    matching::{self, Fraction, HeaderMatch, QueryMatch},
    mirror_policy::MirrorPolicy,
};
use crate::{
    problems::ConfigErrors,
    wire::envoy::config::{core::v3 as core, route::v3 as wire},
};
use prost_types::Any;
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};

/// Largest body of a direct response, as in Envoy's default `max_direct_response_body_size_bytes`.
pub const DIRECT_RESPONSE_BODY_BYTES_MAX: usize = 4096;

/// A table of virtual hosts.
#[derive(Debug, Clone, PartialEq)]
pub struct RouteConfiguration {
    /// Name.
    pub name: String,
    /// In the order written; domains decide.
    pub virtual_hosts: Vec<VirtualHost>,
    /// On all messages.
    pub headers: HeaderMutations,
    /// The route's changes of headers come last, not first.
    pub most_specific_header_mutations_wins: bool,
    /// Whether routes to clusters that do not exist are refused.
    pub validate_clusters: bool,
    /// Who gets a copy of requests whose virtual host says nothing of that.
    pub mirrors: Vec<MirrorPolicy>,
    /// Largest body of a direct response.
    pub max_direct_response_body_bytes: usize,
    /// Domains are compared without the port of the request.
    pub ignore_port_in_host_matching: bool,
    /// Filter configuration for all routes, by filter name.
    pub typed_per_filter_config: FilterConfigs,
}

impl Default for RouteConfiguration {
    fn default() -> Self {
        Self {
            name: String::new(),
            virtual_hosts: Vec::new(),
            headers: HeaderMutations::default(),
            most_specific_header_mutations_wins: false,
            validate_clusters: true,
            mirrors: Vec::new(),
            max_direct_response_body_bytes: DIRECT_RESPONSE_BODY_BYTES_MAX,
            ignore_port_in_host_matching: false,
            typed_per_filter_config: FilterConfigs::new(),
        }
    }
}

/// Routes for some domains.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct VirtualHost {
    /// Name, for metrics and logs.
    pub name: String,
    /// Exact, `*.suffix`, `prefix.*` or `*`.
    pub domains: Vec<String>,
    /// The first that matches wins.
    pub routes: Vec<Route>,
    /// Applies to routes that have none.
    pub retry_policy: Option<RetryPolicy>,
    /// Who gets a copy of requests whose route says nothing of that.
    pub mirrors: Vec<MirrorPolicy>,
    /// `x-envoy-attempt-count` on requests.
    pub include_request_attempt_count: bool,
    /// `x-envoy-attempt-count` on responses.
    pub include_attempt_count_in_response: bool,
    /// On messages of its routes.
    pub headers: HeaderMutations,
    /// Filter configuration for its routes, by filter name.
    pub typed_per_filter_config: FilterConfigs,
}

/// One route.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// For logs; may be empty.
    pub name: String,
    /// Which requests.
    pub r#match: RouteMatch,
    /// What happens to them.
    pub action: Action,
    /// Filter configuration for this route, by filter name.
    pub typed_per_filter_config: FilterConfigs,
    /// On its messages.
    pub headers: HeaderMutations,
}

/// Configuration of filters, by filter name.
pub type FilterConfigs = BTreeMap<String, TypedConfig>;

/// A typed extension configuration: type URL and its JSON value (TypedStruct's inner ones).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TypedConfig {
    /// `type.googleapis.com/…`.
    pub type_url: String,
    /// The message as JSON.
    pub value: Value,
}

/// `RouteMatch`.
#[derive(Debug, Clone, PartialEq)]
pub struct RouteMatch {
    /// How the path is compared (query string left out).
    pub path: PathMatch,
    /// Compare letter case; default true.
    pub case_sensitive: bool,
    /// All must hold.
    pub headers: Vec<HeaderMatch>,
    /// All must hold.
    pub query_parameters: Vec<QueryMatch>,
    /// Only this share of the requests, by chance.
    pub runtime_fraction: Option<Fraction>,
    /// Only gRPC.
    pub grpc: bool,
}

impl Default for RouteMatch {
    fn default() -> Self {
        Self {
            path: PathMatch::default(),
            case_sensitive: true,
            headers: Vec::new(),
            query_parameters: Vec::new(),
            runtime_fraction: None,
            grpc: false,
        }
    }
}

/// `path_specifier`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathMatch {
    /// Starts with.
    Prefix(String),
    /// Equals.
    Path(String),
    /// Equals, or continues with `/`.
    PathSeparatedPrefix(String),
    /// Matches as a whole; RE2's syntax, known to be valid.
    Regex(String),
}

impl Default for PathMatch {
    fn default() -> Self {
        Self::Prefix("/".into())
    }
}

/// What happens to a request.
#[derive(Debug, Clone, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all routes are the large variant, and none is on the request path"
)]
pub enum Action {
    /// Goes to a cluster.
    Route(RouteAction),
    /// Is told to go elsewhere.
    Redirect(Redirect),
    /// Is answered here.
    DirectResponse {
        /// HTTP status.
        status: u16,
        /// Body, verbatim.
        body: String,
    },
}

impl TryFrom<wire::RouteConfiguration> for RouteConfiguration {
    type Error = ConfigErrors;

    fn try_from(wire: wire::RouteConfiguration) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let domains: Vec<Vec<String>> = wire
            .virtual_hosts
            .iter()
            .map(|host| host.domains.clone())
            .collect();
        let virtual_hosts = problems.take_all("virtual_hosts", wire.virtual_hosts);
        check_domains(&mut problems, &domains);
        let max = wire.max_direct_response_body_size_bytes;
        let max = max.map_or(DIRECT_RESPONSE_BODY_BYTES_MAX, |max| max as usize);
        let mirrors = problems.take_all("request_mirror_policies", wire.request_mirror_policies);
        check_bodies(&mut problems, &virtual_hosts, max);
        let typed_per_filter_config = filter_configs(&mut problems, wire.typed_per_filter_config);
        let headers = HeaderMutations::read(
            &mut problems,
            (wire.request_headers_to_add, wire.request_headers_to_remove),
            (
                wire.response_headers_to_add,
                wire.response_headers_to_remove,
            ),
        );
        problems.finish(Some(Self {
            name: wire.name,
            virtual_hosts,
            headers,
            most_specific_header_mutations_wins: wire.most_specific_header_mutations_wins,
            validate_clusters: wire.validate_clusters.unwrap_or(true),
            mirrors,
            max_direct_response_body_bytes: max,
            ignore_port_in_host_matching: wire.ignore_port_in_host_matching,
            typed_per_filter_config,
        }))
    }
}

/// The table says how large a direct response may be.
fn check_bodies(problems: &mut ConfigErrors, hosts: &[VirtualHost], max: usize) {
    for (host, of_table) in hosts.iter().enumerate() {
        for (index, route) in of_table.routes.iter().enumerate() {
            if let Action::DirectResponse { body, .. } = &route.action
                && body.len() > max
            {
                problems.add(
                    format!(
                        "virtual_hosts[{host}].routes[{index}].direct_response.body.inline_string"
                    ),
                    format!("has {} bytes, more than {max}", body.len()),
                );
            }
        }
    }
}

/// A domain belongs to one virtual host; letter case does not matter.
fn check_domains(problems: &mut ConfigErrors, domains: &[Vec<String>]) {
    let mut seen = HashSet::new();
    for (host, domains) in domains.iter().enumerate() {
        for (index, domain) in domains.iter().enumerate() {
            if seen.insert(domain.to_ascii_lowercase()) {
                continue;
            }
            let place = format!("virtual_hosts[{host}].domains[{index}]");
            if domain == "*" {
                problems.add(place, "Only a single wildcard domain is permitted");
            } else {
                problems.add(
                    place,
                    format!(
                        "Only unique values for domains are permitted; duplicate of '{domain}'"
                    ),
                );
            }
        }
    }
}

impl TryFrom<wire::VirtualHost> for VirtualHost {
    type Error = ConfigErrors;

    fn try_from(wire: wire::VirtualHost) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let name = problems.not_empty("name", wire.name);
        if wire.domains.is_empty() {
            problems.add("domains", "must have at least one");
        }
        for (index, domain) in wire.domains.iter().enumerate() {
            let inner = domain
                .strip_prefix('*')
                .or_else(|| domain.strip_suffix('*'))
                .unwrap_or(domain);
            if domain.is_empty() || inner.contains('*') {
                problems.add(
                    format!("domains[{index}]"),
                    format!("'{domain}' is not a domain: a name, *.suffix, prefix.* or *"),
                );
            }
        }
        let routes = problems.take_all("routes", wire.routes);
        let retry_policy = wire
            .retry_policy
            .and_then(|policy| problems.take("retry_policy", policy.try_into()));
        let headers = HeaderMutations::read(
            &mut problems,
            (wire.request_headers_to_add, wire.request_headers_to_remove),
            (
                wire.response_headers_to_add,
                wire.response_headers_to_remove,
            ),
        );
        let mirrors = problems.take_all("request_mirror_policies", wire.request_mirror_policies);
        let typed_per_filter_config = filter_configs(&mut problems, wire.typed_per_filter_config);
        problems.finish(Some(Self {
            name,
            domains: wire.domains,
            mirrors,
            routes,
            retry_policy,
            include_request_attempt_count: wire.include_request_attempt_count,
            include_attempt_count_in_response: wire.include_attempt_count_in_response,
            headers,
            typed_per_filter_config,
        }))
    }
}

impl TryFrom<wire::Route> for Route {
    type Error = ConfigErrors;

    fn try_from(wire: wire::Route) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let r#match: Option<RouteMatch> = problems.required("match", wire.r#match);
        let action = match wire.action {
            None => {
                problems.add("", "required: route, redirect or direct_response");
                None
            }
            Some(wire::route::Action::Route(action)) => {
                problems.take("route", action.try_into()).map(Action::Route)
            }
            Some(wire::route::Action::Redirect(redirect)) => problems
                .take("redirect", redirect.try_into())
                .map(Action::Redirect),
            Some(wire::route::Action::DirectResponse(response)) => {
                problems.take("direct_response", direct_response(response))
            }
        };
        let typed_per_filter_config = filter_configs(&mut problems, wire.typed_per_filter_config);
        let headers = HeaderMutations::read(
            &mut problems,
            (wire.request_headers_to_add, wire.request_headers_to_remove),
            (
                wire.response_headers_to_add,
                wire.response_headers_to_remove,
            ),
        );
        let route = r#match.zip(action);
        problems.finish(route.map(|(r#match, action)| Self {
            name: wire.name,
            r#match,
            action,
            typed_per_filter_config,
            headers,
        }))
    }
}

/// Reads `typed_per_filter_config`.
pub(super) fn filter_configs(
    problems: &mut ConfigErrors,
    wire: BTreeMap<String, Any>,
) -> FilterConfigs {
    let read = wire.into_iter().filter_map(|(filter, any)| {
        let place = format!("typed_per_filter_config[\"{filter}\"]");
        let config = problems.take(&place, TypedConfig::try_from(any))?;
        Some((filter, config))
    });
    read.collect()
}

/// Shows `typed_per_filter_config`.
pub(super) fn show_filter_configs(plain: &FilterConfigs) -> BTreeMap<String, Any> {
    plain
        .iter()
        .map(|(filter, config)| (filter.clone(), Any::from(config)))
        .collect()
}

fn direct_response(wire: wire::DirectResponseAction) -> Result<Action, ConfigErrors> {
    let mut problems = ConfigErrors::default();
    let status = u16::try_from(wire.status).unwrap_or(0);
    if !(200..600).contains(&status) {
        problems.add(
            "status",
            format!("must be between 200 and 599, is {}", wire.status),
        );
    }
    let body = match wire.body.map(|body| body.specifier) {
        None => String::new(),
        Some(Some(core::data_source::Specifier::InlineString(body))) => body,
        Some(Some(other)) => {
            problems.add("body", super::tls::not_inline(&other));
            String::new()
        }
        Some(None) => {
            problems.add("body", "required: inline_string");
            String::new()
        }
    };
    problems.finish(Some(Action::DirectResponse { status, body }))
}

impl TryFrom<wire::RouteMatch> for RouteMatch {
    type Error = ConfigErrors;

    fn try_from(wire: wire::RouteMatch) -> Result<Self, ConfigErrors> {
        use wire::route_match::PathSpecifier;
        let mut problems = ConfigErrors::default();
        let path = match wire.path_specifier {
            Some(PathSpecifier::Prefix(prefix)) => PathMatch::Prefix(prefix),
            Some(PathSpecifier::Path(path)) => PathMatch::Path(path),
            Some(PathSpecifier::PathSeparatedPrefix(prefix)) => {
                if !prefix.starts_with('/') || prefix.ends_with('/') || prefix.contains(['?', '#'])
                {
                    let message = format!(
                        "'{prefix}' must begin with '/', not end with it, and hold no '?' or '#'"
                    );
                    problems.add("path_separated_prefix", message);
                }
                PathMatch::PathSeparatedPrefix(prefix)
            }
            Some(PathSpecifier::SafeRegex(matcher)) => problems
                .take("safe_regex", matching::regex(matcher))
                .map_or_else(PathMatch::default, PathMatch::Regex),
            None => {
                problems.add(
                    "",
                    "required: prefix, path, path_separated_prefix or safe_regex",
                );
                PathMatch::default()
            }
        };
        let headers = problems.take_all("headers", wire.headers);
        let query_parameters = problems.take_all("query_parameters", wire.query_parameters);
        let runtime_fraction = wire
            .runtime_fraction
            .and_then(|share| problems.take("runtime_fraction", share.try_into()));
        problems.finish(Some(Self {
            path,
            case_sensitive: wire.case_sensitive.unwrap_or(true),
            headers,
            query_parameters,
            runtime_fraction,
            grpc: wire.grpc.is_some(),
        }))
    }
}

impl From<&RouteConfiguration> for wire::RouteConfiguration {
    fn from(plain: &RouteConfiguration) -> Self {
        let (request_headers_to_add, request_headers_to_remove) = plain.headers.request.show();
        let (response_headers_to_add, response_headers_to_remove) = plain.headers.response.show();
        let max = plain.max_direct_response_body_bytes;
        Self {
            name: plain.name.clone(),
            virtual_hosts: plain.virtual_hosts.iter().map(Into::into).collect(),
            request_headers_to_add,
            request_headers_to_remove,
            response_headers_to_add,
            response_headers_to_remove,
            most_specific_header_mutations_wins: plain.most_specific_header_mutations_wins,
            validate_clusters: (!plain.validate_clusters).then_some(false),
            max_direct_response_body_size_bytes: (max != DIRECT_RESPONSE_BODY_BYTES_MAX)
                .then(|| u32::try_from(max).unwrap_or(u32::MAX)),
            ignore_port_in_host_matching: plain.ignore_port_in_host_matching,
            typed_per_filter_config: show_filter_configs(&plain.typed_per_filter_config),
            request_mirror_policies: plain.mirrors.iter().map(Into::into).collect(),
        }
    }
}

impl From<&VirtualHost> for wire::VirtualHost {
    fn from(plain: &VirtualHost) -> Self {
        let (request_headers_to_add, request_headers_to_remove) = plain.headers.request.show();
        let (response_headers_to_add, response_headers_to_remove) = plain.headers.response.show();
        Self {
            name: plain.name.clone(),
            domains: plain.domains.clone(),
            request_headers_to_add,
            request_headers_to_remove,
            response_headers_to_add,
            response_headers_to_remove,
            routes: plain.routes.iter().map(Into::into).collect(),
            retry_policy: plain.retry_policy.as_ref().map(Into::into),
            request_mirror_policies: plain.mirrors.iter().map(Into::into).collect(),
            include_request_attempt_count: plain.include_request_attempt_count,
            include_attempt_count_in_response: plain.include_attempt_count_in_response,
            typed_per_filter_config: show_filter_configs(&plain.typed_per_filter_config),
        }
    }
}

impl From<&Route> for wire::Route {
    fn from(plain: &Route) -> Self {
        let action = match &plain.action {
            Action::Route(action) => wire::route::Action::Route(action.into()),
            Action::Redirect(redirect) => wire::route::Action::Redirect(redirect.into()),
            Action::DirectResponse { status, body } => {
                let specifier = Some(core::data_source::Specifier::InlineString(body.clone()));
                let body = (!body.is_empty()).then_some(core::DataSource {
                    specifier,
                    watched_directory: None,
                });
                wire::route::Action::DirectResponse(wire::DirectResponseAction {
                    status: (*status).into(),
                    body,
                })
            }
        };
        let (request_headers_to_add, request_headers_to_remove) = plain.headers.request.show();
        let (response_headers_to_add, response_headers_to_remove) = plain.headers.response.show();
        Self {
            request_headers_to_add,
            request_headers_to_remove,
            response_headers_to_add,
            response_headers_to_remove,
            name: plain.name.clone(),
            r#match: Some((&plain.r#match).into()),
            action: Some(action),
            typed_per_filter_config: show_filter_configs(&plain.typed_per_filter_config),
        }
    }
}

impl From<&RouteMatch> for wire::RouteMatch {
    fn from(plain: &RouteMatch) -> Self {
        use wire::route_match::PathSpecifier;
        let path = match &plain.path {
            PathMatch::Prefix(prefix) => PathSpecifier::Prefix(prefix.clone()),
            PathMatch::Path(path) => PathSpecifier::Path(path.clone()),
            PathMatch::PathSeparatedPrefix(prefix) => {
                PathSpecifier::PathSeparatedPrefix(prefix.clone())
            }
            PathMatch::Regex(regex) => PathSpecifier::SafeRegex(matching::to_regex(regex)),
        };
        Self {
            path_specifier: Some(path),
            case_sensitive: (!plain.case_sensitive).then_some(false),
            headers: plain.headers.iter().map(Into::into).collect(),
            query_parameters: plain.query_parameters.iter().map(Into::into).collect(),
            runtime_fraction: plain.runtime_fraction.as_ref().map(Into::into),
            grpc: plain
                .grpc
                .then(wire::route_match::GrpcRouteMatchOptions::default),
        }
    }
}
