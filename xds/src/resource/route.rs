//! `envoy.config.route.v3.RouteConfiguration`.

use serde_json::Value;
use std::{collections::BTreeMap, time::Duration};

/// A table of virtual hosts.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RouteConfiguration {
    /// Name.
    pub name: String,
    /// In the order written; domains decide.
    pub virtual_hosts: Vec<VirtualHost>,
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
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RouteMatch {
    /// How the path is compared (query string left out).
    pub path: PathMatch,
    /// Compare letter case; default true.
    pub case_sensitive: bool,
    /// All must hold.
    pub headers: Vec<HeaderMatch>,
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
