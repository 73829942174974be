//! `envoy.config.route.v3.RouteConfiguration`.

use crate::{
    problems::ConfigErrors,
    protobuf::{duration, to_duration},
    wire::envoy::{
        config::{core::v3 as core, route::v3 as wire},
        r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern},
    },
};
use prost_types::Any;
use serde_json::Value;
use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};
use wire::header_matcher::HeaderMatchSpecifier;

/// Largest body of a direct response, as in Envoy's default `max_direct_response_body_size_bytes`.
pub const DIRECT_RESPONSE_BODY_BYTES_MAX: usize = 4096;

/// What `retry_on` may list.
const RETRY_CONDITIONS: &[&str] = &[
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "envoy-ratelimited",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
];

/// A table of virtual hosts.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RouteConfiguration {
    /// Name.
    pub name: String,
    /// In the order written; domains decide.
    pub virtual_hosts: Vec<VirtualHost>,
    /// False: a route may name a cluster that does not exist (503 then).
    pub validate_clusters: bool,
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
    pub typed_per_filter_config: BTreeMap<String, TypedConfig>,
}

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
}

impl Default for RouteMatch {
    fn default() -> Self {
        Self {
            path: PathMatch::default(),
            case_sensitive: true,
            headers: Vec::new(),
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
}

impl Default for PathMatch {
    fn default() -> Self {
        Self::Prefix("/".into())
    }
}

/// `HeaderMatcher`, the forms we honour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderMatch {
    /// Lower-case header name; `:method` and `:authority` are allowed.
    pub name: String,
    /// What must hold.
    pub value: HeaderValueMatch,
    /// `invert_match`.
    pub invert: bool,
}

/// What a header must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderValueMatch {
    /// Present (or absent).
    Present(bool),
    /// Equals.
    Exact(String),
    /// Starts with.
    Prefix(String),
    /// Ends with.
    Suffix(String),
    /// Contains.
    Contains(String),
}

/// What happens to a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Goes to a cluster.
    Route(RouteAction),
    /// Is answered here.
    DirectResponse {
        /// HTTP status.
        status: u16,
        /// Body, verbatim.
        body: String,
    },
}

/// `RouteAction`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RouteAction {
    /// Cluster name.
    pub cluster: String,
    /// `None` is unset (Envoy's 15 s where it applies), zero is off.
    pub timeout: Option<Duration>,
    /// `None` is unset, zero is off.
    pub idle_timeout: Option<Duration>,
    /// `None` is unset.
    pub retry_policy: Option<RetryPolicy>,
    /// Replaces the matched prefix.
    pub prefix_rewrite: Option<String>,
}

/// `RetryPolicy`, the part we honour.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RetryPolicy {
    /// `retry_on`, comma separated in Envoy.
    pub retry_on: Vec<String>,
    /// Default 1.
    pub num_retries: u32,
    /// Zero is none.
    pub per_try_timeout: Duration,
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
        problems.finish(Some(Self {
            name: wire.name,
            virtual_hosts,
            validate_clusters: wire.validate_clusters.unwrap_or(true),
        }))
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
        problems.finish(Some(Self {
            name,
            domains: wire.domains,
            routes,
            retry_policy,
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
                problems.add("", "required: route or direct_response");
                None
            }
            Some(wire::route::Action::Route(action)) => {
                problems.take("route", action.try_into()).map(Action::Route)
            }
            Some(wire::route::Action::DirectResponse(response)) => {
                problems.take("direct_response", direct_response(response))
            }
        };
        let mut typed_per_filter_config = BTreeMap::new();
        for (filter, any) in wire.typed_per_filter_config {
            let place = format!("typed_per_filter_config[\"{filter}\"]");
            if let Some(config) = problems.take(&place, TypedConfig::try_from(any)) {
                typed_per_filter_config.insert(filter, config);
            }
        }
        let route = r#match.zip(action);
        problems.finish(route.map(|(r#match, action)| Self {
            name: wire.name,
            r#match,
            action,
            typed_per_filter_config,
        }))
    }
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
        Some(None) => {
            problems.add("body", "required: inline_string");
            String::new()
        }
    };
    if body.len() > DIRECT_RESPONSE_BODY_BYTES_MAX {
        let message = format!(
            "has {} bytes, more than {DIRECT_RESPONSE_BODY_BYTES_MAX}",
            body.len()
        );
        problems.add("body.inline_string", message);
    }
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
            None => {
                problems.add("", "required: prefix, path or path_separated_prefix");
                PathMatch::default()
            }
        };
        let headers = problems.take_all("headers", wire.headers);
        problems.finish(Some(Self {
            path,
            case_sensitive: wire.case_sensitive.unwrap_or(true),
            headers,
        }))
    }
}

impl TryFrom<wire::HeaderMatcher> for HeaderMatch {
    type Error = ConfigErrors;

    fn try_from(wire: wire::HeaderMatcher) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let name = problems.not_empty("name", wire.name.to_ascii_lowercase());
        let value = match wire.header_match_specifier {
            None => HeaderValueMatch::Present(true),
            Some(HeaderMatchSpecifier::PresentMatch(present)) => HeaderValueMatch::Present(present),
            Some(HeaderMatchSpecifier::ExactMatch(text)) => HeaderValueMatch::Exact(text),
            Some(HeaderMatchSpecifier::PrefixMatch(text)) => HeaderValueMatch::Prefix(text),
            Some(HeaderMatchSpecifier::SuffixMatch(text)) => HeaderValueMatch::Suffix(text),
            Some(HeaderMatchSpecifier::ContainsMatch(text)) => HeaderValueMatch::Contains(text),
            Some(HeaderMatchSpecifier::StringMatch(StringMatcher { match_pattern })) => {
                match match_pattern {
                    Some(MatchPattern::Exact(text)) => HeaderValueMatch::Exact(text),
                    Some(MatchPattern::Prefix(text)) => HeaderValueMatch::Prefix(text),
                    Some(MatchPattern::Suffix(text)) => HeaderValueMatch::Suffix(text),
                    Some(MatchPattern::Contains(text)) => HeaderValueMatch::Contains(text),
                    None => {
                        problems.add(
                            "string_match",
                            "required: exact, prefix, suffix or contains",
                        );
                        HeaderValueMatch::Present(true)
                    }
                }
            }
        };
        problems.finish(Some(Self {
            name,
            value,
            invert: wire.invert_match,
        }))
    }
}

impl TryFrom<wire::RouteAction> for RouteAction {
    type Error = ConfigErrors;

    fn try_from(wire: wire::RouteAction) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let cluster = match wire.cluster_specifier {
            Some(wire::route_action::ClusterSpecifier::Cluster(cluster)) => {
                problems.not_empty("cluster", cluster)
            }
            None => {
                problems.add("", "required: cluster");
                String::new()
            }
        };
        let timeout = wire
            .timeout
            .and_then(|limit| problems.take("timeout", duration(limit)));
        let idle_timeout = wire
            .idle_timeout
            .and_then(|limit| problems.take("idle_timeout", duration(limit)));
        let retry_policy = wire
            .retry_policy
            .and_then(|policy| problems.take("retry_policy", policy.try_into()));
        let prefix_rewrite = Some(wire.prefix_rewrite).filter(|prefix| !prefix.is_empty());
        problems.finish(Some(Self {
            cluster,
            timeout,
            idle_timeout,
            retry_policy,
            prefix_rewrite,
        }))
    }
}

impl TryFrom<wire::RetryPolicy> for RetryPolicy {
    type Error = ConfigErrors;

    fn try_from(wire: wire::RetryPolicy) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let listed = wire
            .retry_on
            .split(',')
            .map(str::trim)
            .filter(|condition| !condition.is_empty());
        let retry_on: Vec<String> = listed.map(str::to_owned).collect();
        for condition in retry_on
            .iter()
            .filter(|condition| !RETRY_CONDITIONS.contains(&condition.as_str()))
        {
            problems.add("retry_on", format!("unknown condition '{condition}'"));
        }
        let limit = wire
            .per_try_timeout
            .and_then(|limit| problems.take("per_try_timeout", duration(limit)));
        let num_retries = wire.num_retries.unwrap_or(1);
        problems.finish(Some(Self {
            retry_on,
            num_retries,
            per_try_timeout: limit.unwrap_or_default(),
        }))
    }
}

impl From<&RouteConfiguration> for wire::RouteConfiguration {
    fn from(plain: &RouteConfiguration) -> Self {
        Self {
            name: plain.name.clone(),
            virtual_hosts: plain.virtual_hosts.iter().map(Into::into).collect(),
            validate_clusters: Some(plain.validate_clusters),
        }
    }
}

impl From<&VirtualHost> for wire::VirtualHost {
    fn from(plain: &VirtualHost) -> Self {
        Self {
            name: plain.name.clone(),
            domains: plain.domains.clone(),
            routes: plain.routes.iter().map(Into::into).collect(),
            retry_policy: plain.retry_policy.as_ref().map(Into::into),
        }
    }
}

impl From<&Route> for wire::Route {
    fn from(plain: &Route) -> Self {
        let action = match &plain.action {
            Action::Route(action) => wire::route::Action::Route(action.into()),
            Action::DirectResponse { status, body } => {
                let specifier = Some(core::data_source::Specifier::InlineString(body.clone()));
                let body = (!body.is_empty()).then_some(core::DataSource { specifier });
                wire::route::Action::DirectResponse(wire::DirectResponseAction {
                    status: (*status).into(),
                    body,
                })
            }
        };
        let configs = plain.typed_per_filter_config.iter();
        Self {
            name: plain.name.clone(),
            r#match: Some((&plain.r#match).into()),
            action: Some(action),
            typed_per_filter_config: configs
                .map(|(filter, config)| (filter.clone(), Any::from(config)))
                .collect(),
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
        };
        Self {
            path_specifier: Some(path),
            case_sensitive: (!plain.case_sensitive).then_some(false),
            headers: plain.headers.iter().map(Into::into).collect(),
        }
    }
}

impl From<&HeaderMatch> for wire::HeaderMatcher {
    fn from(plain: &HeaderMatch) -> Self {
        let text = |pattern| {
            HeaderMatchSpecifier::StringMatch(StringMatcher {
                match_pattern: Some(pattern),
            })
        };
        let value = match plain.value.clone() {
            HeaderValueMatch::Present(present) => HeaderMatchSpecifier::PresentMatch(present),
            HeaderValueMatch::Exact(value) => text(MatchPattern::Exact(value)),
            HeaderValueMatch::Prefix(value) => text(MatchPattern::Prefix(value)),
            HeaderValueMatch::Suffix(value) => text(MatchPattern::Suffix(value)),
            HeaderValueMatch::Contains(value) => text(MatchPattern::Contains(value)),
        };
        Self {
            name: plain.name.clone(),
            header_match_specifier: Some(value),
            invert_match: plain.invert,
        }
    }
}

impl From<&RouteAction> for wire::RouteAction {
    fn from(plain: &RouteAction) -> Self {
        Self {
            cluster_specifier: Some(wire::route_action::ClusterSpecifier::Cluster(
                plain.cluster.clone(),
            )),
            prefix_rewrite: plain.prefix_rewrite.clone().unwrap_or_default(),
            timeout: plain.timeout.map(to_duration),
            idle_timeout: plain.idle_timeout.map(to_duration),
            retry_policy: plain.retry_policy.as_ref().map(Into::into),
        }
    }
}

impl From<&RetryPolicy> for wire::RetryPolicy {
    fn from(plain: &RetryPolicy) -> Self {
        Self {
            retry_on: plain.retry_on.join(","),
            num_retries: Some(plain.num_retries),
            per_try_timeout: (!plain.per_try_timeout.is_zero())
                .then(|| to_duration(plain.per_try_timeout)),
        }
    }
}
