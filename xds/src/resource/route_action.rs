//! `RouteAction` and `RedirectAction`: where a request goes, and how it is changed on the way.

use super::{
    hash_policy::HashPolicy,
    header_mutation::HeaderMutations,
    matching::RegexRewrite,
    mirror_policy::MirrorPolicy,
    retry_policy::RetryPolicy,
    route::{self, FilterConfigs},
    upgrade::Upgrade,
};
use crate::{
    problems::ConfigErrors,
    protobuf::{duration, to_duration},
    wire::envoy::config::{core::v3 as core, route::v3 as wire},
};
use std::time::Duration;
use wire::{
    redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier},
    route_action::{
        ClusterNotFoundResponseCode, ClusterSpecifier as Specifier, HostRewriteSpecifier,
    },
    weighted_cluster::{ClusterWeight as WireWeight, RandomValueSpecifier, cluster_weight},
};

/// `RouteAction`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RouteAction {
    /// Which cluster.
    pub cluster: ClusterSpecifier,
    /// Status where it does not exist.
    pub cluster_not_found: ClusterNotFound,
    /// What connections may become, whatever the connection manager says.
    pub upgrades: Vec<Upgrade>,
    /// `None` is unset (Envoy's 15 s where it applies), zero is off.
    pub timeout: Option<Duration>,
    /// `None` is unset, zero is off.
    pub idle_timeout: Option<Duration>,
    /// Instead of `timeout`, for gRPC: no more than this of what `grpc-timeout` asks for; zero is no limit.
    pub max_grpc_timeout: Option<Duration>,
    /// Who gets a copy.
    pub mirrors: Vec<MirrorPolicy>,
    /// From the first byte of the request to the last of the response; zero is off. `timeout` counts no more then.
    pub max_stream_duration: Option<Duration>,
    /// `None` is unset.
    pub retry_policy: Option<RetryPolicy>,
    /// Replaces the matched prefix.
    pub prefix_rewrite: Option<String>,
    /// Replaces parts of the path; not beside `prefix_rewrite`.
    pub regex_rewrite: Option<RegexRewrite>,
    /// What becomes of the host.
    pub host_rewrite: Option<HostRewrite>,
    /// A host that was replaced is appended to `x-forwarded-host`.
    pub append_x_forwarded_host: bool,
    /// Which circuit breakers count.
    pub priority: Priority,
    /// What is hashed, for policies that choose by hash.
    pub hash_policy: Vec<HashPolicy>,
}

/// `RoutingPriority`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    /// `DEFAULT`.
    #[default]
    Default,
    /// `HIGH`.
    High,
}

/// How a cluster is chosen.
#[derive(Debug, Clone, PartialEq)]
pub enum ClusterSpecifier {
    /// By name.
    Cluster(String),
    /// By the request header of this name.
    Header(String),
    /// By chance.
    Weighted(WeightedClusters),
}

impl Default for ClusterSpecifier {
    fn default() -> Self {
        Self::Cluster(String::new())
    }
}

impl From<String> for ClusterSpecifier {
    fn from(name: String) -> Self {
        Self::Cluster(name)
    }
}

impl From<&str> for ClusterSpecifier {
    fn from(name: &str) -> Self {
        Self::Cluster(name.to_owned())
    }
}

impl ClusterSpecifier {
    /// The clusters it names, with their places below the action.
    #[must_use]
    pub fn named(&self) -> Vec<(String, &str)> {
        match self {
            Self::Cluster(name) => vec![("cluster".to_owned(), name)],
            Self::Header(_) => Vec::new(),
            Self::Weighted(weighted) => {
                let all = weighted.clusters.iter().enumerate();
                all.filter_map(|(index, cluster)| match &cluster.cluster {
                    WeightedName::Name(name) => Some((
                        format!("weighted_clusters.clusters[{index}].name"),
                        name.as_str(),
                    )),
                    WeightedName::Header(_) => None,
                })
                .collect()
            }
        }
    }
}

/// `WeightedCluster`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct WeightedClusters {
    /// At least one has a weight.
    pub clusters: Vec<ClusterWeight>,
    /// The request header whose number is taken instead of chance.
    pub header_name: Option<String>,
}

/// `ClusterWeight`.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterWeight {
    /// Which.
    pub cluster: WeightedName,
    /// Its share of the sum of all.
    pub weight: u32,
    /// On its messages.
    pub headers: HeaderMutations,
    /// Replaces the host.
    pub host_rewrite: Option<String>,
    /// Filter configuration for its requests, by filter name.
    pub typed_per_filter_config: FilterConfigs,
}

/// How a weighted cluster is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WeightedName {
    /// By name.
    Name(String),
    /// By the request header of this name.
    Header(String),
}

/// Status where a cluster does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClusterNotFound {
    /// 503.
    #[default]
    ServiceUnavailable,
    /// 404.
    NotFound,
    /// 500.
    InternalServerError,
}

/// `host_rewrite_specifier`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostRewrite {
    /// To this.
    Literal(String),
    /// To the value of this request header, if it is there.
    Header(String),
    /// To the name of the endpoint, if it has one.
    Auto,
}

/// `RedirectAction`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Redirect {
    /// In place of the request's.
    pub scheme: Option<String>,
    /// In place of the request's.
    pub host: Option<String>,
    /// In place of the request's.
    pub port: Option<u16>,
    /// What becomes of the path.
    pub path: Option<PathRedirect>,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
    /// The query is left out.
    pub strip_query: bool,
}

/// `path_rewrite_specifier`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathRedirect {
    /// To this; it may carry a query of its own.
    Path(String),
    /// The matched prefix to this.
    Prefix(String),
    /// Parts of it.
    Regex(RegexRewrite),
}

fn some(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

fn header(problems: &mut ConfigErrors, place: &str, name: &str) -> String {
    let name = name.to_ascii_lowercase();
    if http::HeaderName::try_from(&name).is_err() {
        problems.add(place, format!("'{name}' is no header name"));
    }
    name
}

fn host(problems: &mut ConfigErrors, place: &str, host: String) -> String {
    if http::uri::Authority::try_from(host.as_str()).is_err() {
        problems.add(place, format!("'{host}' is no host"));
    }
    host
}

impl TryFrom<wire::RouteAction> for RouteAction {
    type Error = ConfigErrors;

    fn try_from(wire: wire::RouteAction) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let priority = match wire.priority() {
            core::RoutingPriority::Default => Priority::Default,
            core::RoutingPriority::High => Priority::High,
        };
        let cluster_not_found = not_found(wire.cluster_not_found_response_code());
        let cluster = cluster(&mut problems, wire.cluster_specifier);
        let timeout = wire
            .timeout
            .and_then(|limit| problems.take("timeout", duration(limit)));
        let idle_timeout = wire
            .idle_timeout
            .and_then(|limit| problems.take("idle_timeout", duration(limit)));
        let max_grpc_timeout = wire
            .max_grpc_timeout
            .and_then(|limit| problems.take("max_grpc_timeout", duration(limit)));
        let max_stream_duration = stream_limit(&mut problems, wire.max_stream_duration);
        let retry_policy = wire
            .retry_policy
            .and_then(|policy| problems.take("retry_policy", policy.try_into()));
        let prefix_rewrite = some(wire.prefix_rewrite);
        let regex_rewrite = wire
            .regex_rewrite
            .and_then(|rewrite| problems.take("regex_rewrite", rewrite.try_into()));
        if prefix_rewrite.is_some() && regex_rewrite.is_some() {
            problems.add(
                "",
                "only one of 'prefix_rewrite' and 'regex_rewrite' may be set",
            );
        }
        let host_rewrite = match wire.host_rewrite_specifier {
            Some(HostRewriteSpecifier::HostRewriteLiteral(literal)) => Some(HostRewrite::Literal(
                host(&mut problems, "host_rewrite_literal", literal),
            )),
            Some(HostRewriteSpecifier::HostRewriteHeader(name)) => Some(HostRewrite::Header(
                header(&mut problems, "host_rewrite_header", &name),
            )),
            Some(HostRewriteSpecifier::AutoHostRewrite(true)) => Some(HostRewrite::Auto),
            Some(HostRewriteSpecifier::AutoHostRewrite(false)) | None => None,
        };
        let mirrors = problems.take_all("request_mirror_policies", wire.request_mirror_policies);
        let upgrades = problems.take_all("upgrade_configs", wire.upgrade_configs);
        let hash_policy = problems.take_all("hash_policy", wire.hash_policy);
        problems.finish(Some(Self {
            priority,
            hash_policy,
            cluster,
            cluster_not_found,
            mirrors,
            upgrades,
            timeout,
            idle_timeout,
            max_grpc_timeout,
            max_stream_duration,
            retry_policy,
            prefix_rewrite,
            regex_rewrite,
            host_rewrite,
            append_x_forwarded_host: wire.append_x_forwarded_host,
        }))
    }
}

fn stream_limit(
    problems: &mut ConfigErrors,
    wire: Option<wire::route_action::MaxStreamDuration>,
) -> Option<Duration> {
    let limits = wire?;
    let place = "max_stream_duration.grpc_timeout_header_max";
    if limits
        .grpc_timeout_header_max
        .is_some_and(|limit| limit != prost_types::Duration::default())
    {
        problems.add(place, "not supported yet: other than 0s");
    }
    let limit = limits.max_stream_duration.and_then(|limit| {
        let place = "max_stream_duration.max_stream_duration";
        problems.take(place, duration(limit))
    });
    Some(limit.unwrap_or_default())
}

fn not_found(code: ClusterNotFoundResponseCode) -> ClusterNotFound {
    match code {
        ClusterNotFoundResponseCode::ServiceUnavailable => ClusterNotFound::ServiceUnavailable,
        ClusterNotFoundResponseCode::NotFound => ClusterNotFound::NotFound,
        ClusterNotFoundResponseCode::InternalServerError => ClusterNotFound::InternalServerError,
    }
}

fn cluster(problems: &mut ConfigErrors, wire: Option<Specifier>) -> ClusterSpecifier {
    match wire {
        Some(Specifier::Cluster(cluster)) => {
            ClusterSpecifier::Cluster(problems.not_empty("cluster", cluster))
        }
        Some(Specifier::ClusterHeader(name)) => {
            ClusterSpecifier::Header(header(problems, "cluster_header", &name))
        }
        Some(Specifier::WeightedClusters(weighted)) => problems
            .take("weighted_clusters", weighted.try_into())
            .map_or_else(ClusterSpecifier::default, ClusterSpecifier::Weighted),
        None => {
            problems.add("", "required: cluster, cluster_header or weighted_clusters");
            ClusterSpecifier::default()
        }
    }
}

impl TryFrom<wire::WeightedCluster> for WeightedClusters {
    type Error = ConfigErrors;

    fn try_from(wire: wire::WeightedCluster) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let weights = wire.clusters.iter().filter_map(|cluster| cluster.weight);
        let total: u64 = weights.map(u64::from).sum();
        if total == 0 {
            problems.add("clusters", "the sum of the weights must be greater than 0");
        }
        if total > u64::from(u32::MAX) {
            let message = format!("the sum of the weights exceeds {}", u32::MAX);
            problems.add("clusters", message);
        }
        let clusters = problems.take_all("clusters", wire.clusters);
        let header_name =
            wire.random_value_specifier
                .map(|RandomValueSpecifier::HeaderName(name)| {
                    header(&mut problems, "header_name", &name)
                });
        problems.finish(Some(Self {
            clusters,
            header_name,
        }))
    }
}

impl TryFrom<WireWeight> for ClusterWeight {
    type Error = ConfigErrors;

    fn try_from(wire: WireWeight) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let cluster = match (wire.name.as_str(), wire.cluster_header.as_str()) {
            ("", "") => {
                problems.add("", "required: name or cluster_header");
                None
            }
            (_, "") => Some(WeightedName::Name(wire.name)),
            ("", name) => Some(WeightedName::Header(header(
                &mut problems,
                "cluster_header",
                name,
            ))),
            _ => {
                problems.add("", "only one of 'name' and 'cluster_header' may be set");
                None
            }
        };
        let headers = HeaderMutations::read(
            &mut problems,
            (wire.request_headers_to_add, wire.request_headers_to_remove),
            (
                wire.response_headers_to_add,
                wire.response_headers_to_remove,
            ),
        );
        let host_rewrite = wire.host_rewrite_specifier.map(
            |cluster_weight::HostRewriteSpecifier::HostRewriteLiteral(literal)| {
                host(&mut problems, "host_rewrite_literal", literal)
            },
        );
        let typed_per_filter_config =
            route::filter_configs(&mut problems, wire.typed_per_filter_config);
        problems.finish(cluster.map(|cluster| Self {
            typed_per_filter_config,
            cluster,
            weight: wire.weight.unwrap_or(0),
            headers,
            host_rewrite,
        }))
    }
}

impl TryFrom<wire::RedirectAction> for Redirect {
    type Error = ConfigErrors;

    fn try_from(wire: wire::RedirectAction) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let status = match wire.response_code() {
            RedirectResponseCode::MovedPermanently => 301,
            RedirectResponseCode::Found => 302,
            RedirectResponseCode::SeeOther => 303,
            RedirectResponseCode::TemporaryRedirect => 307,
            RedirectResponseCode::PermanentRedirect => 308,
        };
        let scheme = match wire.scheme_rewrite_specifier {
            Some(SchemeRewriteSpecifier::HttpsRedirect(true)) => Some("https".to_owned()),
            Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) => some(scheme),
            Some(SchemeRewriteSpecifier::HttpsRedirect(false)) | None => None,
        };
        let port = u16::try_from(wire.port_redirect).unwrap_or_else(|_| {
            let message = format!("must be at most 65535, is {}", wire.port_redirect);
            problems.add("port_redirect", message);
            0
        });
        let path = match wire.path_rewrite_specifier {
            Some(PathRewriteSpecifier::PathRedirect(path)) => some(path).map(PathRedirect::Path),
            Some(PathRewriteSpecifier::PrefixRewrite(prefix)) => Some(PathRedirect::Prefix(prefix)),
            Some(PathRewriteSpecifier::RegexRewrite(rewrite)) => problems
                .take("regex_rewrite", rewrite.try_into())
                .map(PathRedirect::Regex),
            None => None,
        };
        problems.finish(Some(Self {
            scheme,
            host: some(wire.host_redirect),
            port: Some(port).filter(|port| *port != 0),
            path,
            status,
            strip_query: wire.strip_query,
        }))
    }
}

impl From<&RouteAction> for wire::RouteAction {
    fn from(plain: &RouteAction) -> Self {
        let cluster = match &plain.cluster {
            ClusterSpecifier::Cluster(name) => Specifier::Cluster(name.clone()),
            ClusterSpecifier::Header(name) => Specifier::ClusterHeader(name.clone()),
            ClusterSpecifier::Weighted(weighted) => Specifier::WeightedClusters(weighted.into()),
        };
        let not_found = match plain.cluster_not_found {
            ClusterNotFound::ServiceUnavailable => ClusterNotFoundResponseCode::ServiceUnavailable,
            ClusterNotFound::NotFound => ClusterNotFoundResponseCode::NotFound,
            ClusterNotFound::InternalServerError => {
                ClusterNotFoundResponseCode::InternalServerError
            }
        };
        let host = plain.host_rewrite.clone().map(|rewrite| match rewrite {
            HostRewrite::Literal(host) => HostRewriteSpecifier::HostRewriteLiteral(host),
            HostRewrite::Header(name) => HostRewriteSpecifier::HostRewriteHeader(name),
            HostRewrite::Auto => HostRewriteSpecifier::AutoHostRewrite(true),
        });
        Self {
            cluster_specifier: Some(cluster),
            cluster_not_found_response_code: not_found.into(),
            prefix_rewrite: plain.prefix_rewrite.clone().unwrap_or_default(),
            regex_rewrite: plain.regex_rewrite.as_ref().map(Into::into),
            host_rewrite_specifier: host,
            append_x_forwarded_host: plain.append_x_forwarded_host,
            timeout: plain.timeout.map(to_duration),
            idle_timeout: plain.idle_timeout.map(to_duration),
            max_grpc_timeout: plain.max_grpc_timeout.map(to_duration),
            request_mirror_policies: plain.mirrors.iter().map(Into::into).collect(),
            upgrade_configs: plain.upgrades.iter().map(Into::into).collect(),
            max_stream_duration: plain.max_stream_duration.map(|limit| {
                wire::route_action::MaxStreamDuration {
                    max_stream_duration: Some(to_duration(limit)),
                    grpc_timeout_header_max: None,
                }
            }),
            retry_policy: plain.retry_policy.as_ref().map(Into::into),
            priority: match plain.priority {
                Priority::Default => core::RoutingPriority::Default,
                Priority::High => core::RoutingPriority::High,
            }
            .into(),
            hash_policy: plain.hash_policy.iter().map(Into::into).collect(),
        }
    }
}

impl From<&WeightedClusters> for wire::WeightedCluster {
    fn from(plain: &WeightedClusters) -> Self {
        let one = |cluster: &ClusterWeight| {
            let (name, cluster_header) = match cluster.cluster.clone() {
                WeightedName::Name(name) => (name, String::new()),
                WeightedName::Header(header) => (String::new(), header),
            };
            let (request_headers_to_add, request_headers_to_remove) =
                cluster.headers.request.show();
            let (response_headers_to_add, response_headers_to_remove) =
                cluster.headers.response.show();
            WireWeight {
                name,
                cluster_header,
                weight: Some(cluster.weight),
                request_headers_to_add,
                request_headers_to_remove,
                response_headers_to_add,
                response_headers_to_remove,
                host_rewrite_specifier: cluster
                    .host_rewrite
                    .clone()
                    .map(cluster_weight::HostRewriteSpecifier::HostRewriteLiteral),
                typed_per_filter_config: route::show_filter_configs(
                    &cluster.typed_per_filter_config,
                ),
            }
        };
        Self {
            clusters: plain.clusters.iter().map(one).collect(),
            random_value_specifier: plain
                .header_name
                .clone()
                .map(RandomValueSpecifier::HeaderName),
        }
    }
}

impl From<&Redirect> for wire::RedirectAction {
    fn from(plain: &Redirect) -> Self {
        let code = match plain.status {
            302 => RedirectResponseCode::Found,
            303 => RedirectResponseCode::SeeOther,
            307 => RedirectResponseCode::TemporaryRedirect,
            308 => RedirectResponseCode::PermanentRedirect,
            _ => RedirectResponseCode::MovedPermanently,
        };
        let path = plain.path.as_ref().map(|path| match path {
            PathRedirect::Path(path) => PathRewriteSpecifier::PathRedirect(path.clone()),
            PathRedirect::Prefix(prefix) => PathRewriteSpecifier::PrefixRewrite(prefix.clone()),
            PathRedirect::Regex(rewrite) => PathRewriteSpecifier::RegexRewrite(rewrite.into()),
        });
        Self {
            scheme_rewrite_specifier: plain
                .scheme
                .clone()
                .map(SchemeRewriteSpecifier::SchemeRedirect),
            host_redirect: plain.host.clone().unwrap_or_default(),
            port_redirect: plain.port.unwrap_or(0).into(),
            path_rewrite_specifier: path,
            response_code: code.into(),
            strip_query: plain.strip_query,
        }
    }
}
