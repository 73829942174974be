//! From a route as configured to one that is ready to run.

use super::{
    choice::{ByName, Choice, Destination, Known},
    edits::{Edits, HostEdit},
    matcher::Matcher,
    rewrite::{PathRewrite, Redirector},
};
use crate::chain::{Chains, Direct};
use http::{HeaderName, HeaderValue, StatusCode, request::Parts};
use outrigger_filters::{
    filter::{AutoHost, Chain, RouteFacts},
    router::{hash::Hashes, mirror::Mirror, retry::Policy},
    runtime::Runtime,
};
use outrigger_xds::resource::{
    cluster::Cluster,
    header_mutation::HeaderMutations,
    listener::HttpConnectionManager,
    route::{Action, ClusterSpecifier, HostRewrite, Route, RouteAction, VirtualHost},
    route_action::{ClusterNotFound, ClusterWeight, WeightedName},
    upgrade::Upgrade,
};
use std::{collections::HashMap, sync::Arc, time::Duration};

/// Of a route that has no timeout, as in Envoy.
const ROUTE_TIMEOUT: Duration = Duration::from_secs(15);

/// A route, ready to run.
pub struct BuiltRoute {
    matcher: Matcher,
    /// What to do.
    pub target: Target,
    /// Facts of a route that reaches no cluster.
    pub facts: Arc<RouteFacts>,
    /// Changes of heads where no cluster has its own.
    pub edits: Option<Arc<Edits>>,
    /// Whether errors take OpenAI's form.
    pub openai: bool,
    /// What its connections may become, whatever the connection manager says.
    pub upgrades: Vec<Upgrade>,
}

/// What a route does.
pub enum Target {
    /// Runs a chain.
    Chain {
        /// Its filters.
        filters: Chain,
        /// Which cluster.
        choice: Choice,
        /// What becomes of the path.
        rewrite: Option<PathRewrite>,
        /// The path before is told in `x-envoy-original-path`.
        tell_original: bool,
    },
    /// Tells the client to go elsewhere.
    Redirect(Redirector),
    /// Answers here.
    Direct {
        /// What it passes before; if empty, nothing, and this answer is given as it is.
        filters: Chain,
        /// Status.
        status: StatusCode,
        /// Body.
        body: String,
    },
}

impl BuiltRoute {
    /// Whether it is for this request.
    #[must_use]
    pub fn matches(&self, parts: &Parts) -> bool {
        self.matcher.matches(parts)
    }
}

/// Where a route stands, and what there is beside it.
#[derive(Clone, Copy)]
pub struct Scope<'a> {
    /// The listener's connection manager.
    pub manager: &'a HttpConnectionManager,
    /// The route's virtual host.
    pub host: &'a VirtualHost,
    /// Whether peers arrive here.
    pub inbound: bool,
    /// All clusters, by name.
    pub clusters: &'a HashMap<String, Cluster>,
}

/// Builds a route.
///
/// # Errors
/// What is wrong with it.
pub fn build(
    scope: Scope<'_>,
    chains: &mut Chains<'_>,
    route: &Route,
) -> Result<BuiltRoute, String> {
    let levels = [
        &route.typed_per_filter_config,
        &scope.host.typed_per_filter_config,
        &scope.manager.route_config.typed_per_filter_config,
    ];
    let chain = chains.route(&levels)?;
    let own = match &route.action {
        Action::Route(action) => action.retry_policy.as_ref(),
        Action::Redirect(_) | Action::DirectResponse { .. } => None,
    };
    let policy = own.or(scope.host.retry_policy.as_ref());
    let builder = Builder {
        policy: policy.map(Policy::new).transpose()?.map(Arc::new),
        hashes: hashes(route)?,
        scope,
        route,
        openai: chain.openai,
        runtime: chains.runtime(),
        tell_original: !chain.suppress_envoy_headers,
    };
    let facts = Arc::new(builder.facts(None, ""));
    let edits = builder.edits(None)?;
    let target = match &route.action {
        Action::DirectResponse { status, body } => {
            let status = StatusCode::from_u16(*status)
                .map_err(|_| format!("status {status} is no HTTP status"))?;
            let last = Direct {
                status,
                body: body.clone(),
                openai: chain.openai,
            };
            Target::Direct {
                filters: chains.nowhere(&levels, Arc::new(last))?,
                status,
                body: body.clone(),
            }
        }
        Action::Redirect(redirect) => Target::Redirect(Redirector::new(&route.r#match, redirect)?),
        Action::Route(action) => Target::Chain {
            filters: chain.filters,
            choice: builder.choice(action, &mut |weight: &ClusterWeight| {
                let mut of_weight = vec![&weight.typed_per_filter_config];
                of_weight.extend(levels);
                Ok(chains.route(&of_weight)?.filters)
            })?,
            rewrite: match (&action.prefix_rewrite, &action.regex_rewrite) {
                (Some(to), _) => Some(PathRewrite::prefix(&route.r#match, to)),
                (None, Some(rewrite)) => Some(PathRewrite::regex(rewrite)?),
                (None, None) => None,
            },
            tell_original: builder.tell_original,
        },
    };
    Ok(BuiltRoute {
        upgrades: upgrades(&route.action),
        matcher: Matcher::new(&route.r#match, chains.runtime())?,
        target,
        facts,
        edits,
        openai: chain.openai,
    })
}

fn upgrades(action: &Action) -> Vec<Upgrade> {
    match action {
        Action::Route(action) => action.upgrades.clone(),
        Action::Redirect(_) | Action::DirectResponse { .. } => Vec::new(),
    }
}

struct Builder<'a> {
    scope: Scope<'a>,
    route: &'a Route,
    openai: bool,
    tell_original: bool,
    policy: Option<Arc<Policy>>,
    hashes: Option<Arc<Hashes>>,
    runtime: &'a Runtime,
}

/// `None` where nothing is hashed.
fn hashes(route: &Route) -> Result<Option<Arc<Hashes>>, String> {
    match &route.action {
        Action::Route(action) if !action.hash_policy.is_empty() => {
            Ok(Some(Arc::new(Hashes::new(&action.hash_policy)?)))
        }
        _ => Ok(None),
    }
}

impl Builder<'_> {
    fn facts(&self, action: Option<&RouteAction>, cluster: &str) -> RouteFacts {
        let host = self.scope.host;
        let not_found = action.and_then(|action| match action.cluster_not_found {
            ClusterNotFound::ServiceUnavailable => None,
            ClusterNotFound::NotFound => Some(StatusCode::NOT_FOUND),
            ClusterNotFound::InternalServerError => Some(StatusCode::INTERNAL_SERVER_ERROR),
        });
        let auto = action.filter(|action| action.host_rewrite == Some(HostRewrite::Auto));
        RouteFacts {
            name: self.route.name.as_str().into(),
            virtual_host: host.name.as_str().into(),
            cluster: cluster.into(),
            timeout: action
                .filter(|action| action.max_stream_duration.is_none())
                .and_then(|action| route_timeout(action.timeout, self.openai)),
            max_grpc_timeout: action
                .filter(|action| action.max_stream_duration.is_none())
                .and_then(|action| action.max_grpc_timeout),
            idle_timeout: action.and_then(|action| action.idle_timeout),
            max_stream_duration: action
                .and_then(|action| action.max_stream_duration)
                .or(Some(self.scope.manager.max_stream_duration))
                .filter(|limit| !limit.is_zero()),
            retry_policy: self.policy.clone(),
            priority: action.map(|action| action.priority).unwrap_or_default(),
            hashes: self.hashes.clone(),
            inbound: self.scope.inbound,
            cluster_not_found: not_found,
            mirrors: action
                .map(|action| self.mirrors(action))
                .unwrap_or_default(),
            attempts_to_upstream: host.include_request_attempt_count,
            attempts_to_client: host.include_attempt_count_in_response,
            tell_timeout: self.tell_original && !self.scope.inbound,
            auto_host_rewrite: auto.map(|action| AutoHost {
                append_forwarded: action.append_x_forwarded_host,
                tell_original: self.tell_original,
            }),
        }
    }

    /// The most specific list that has any.
    fn mirrors(&self, action: &RouteAction) -> Arc<[Mirror]> {
        let lists = [
            &action.mirrors,
            &self.scope.host.mirrors,
            &self.scope.manager.route_config.mirrors,
        ];
        let first = lists.into_iter().find(|list| !list.is_empty());
        let prepared = first.into_iter().flatten().map(|policy| Mirror {
            cluster: policy.cluster.clone(),
            append_suffix: policy.append_suffix,
            share: policy
                .runtime_fraction
                .as_ref()
                .map(|fraction| self.runtime.share_of(fraction)),
        });
        prepared.collect()
    }

    /// `None` where there is nothing to do.
    fn edits(&self, weight: Option<&ClusterWeight>) -> Result<Option<Arc<Edits>>, String> {
        let table = &self.scope.manager.route_config;
        let mut levels: Vec<&HeaderMutations> = Vec::with_capacity(4);
        levels.extend(weight.map(|weight| &weight.headers));
        levels.extend([
            &self.route.headers,
            &self.scope.host.headers,
            &table.headers,
        ]);
        let mut edits = Edits::new(&levels, table.most_specific_header_mutations_wins)?;
        let value =
            |host: &str| HeaderValue::from_str(host).map_err(|_| format!("'{host}' is no host"));
        edits.tell_original = self.tell_original;
        edits.cluster_host = weight
            .and_then(|weight| weight.host_rewrite.as_deref())
            .map(value)
            .transpose()?;
        if let Action::Route(action) = &self.route.action {
            edits.append_forwarded_host = action.append_x_forwarded_host;
            edits.host = match &action.host_rewrite {
                Some(HostRewrite::Literal(host)) => Some(HostEdit::Literal(value(host)?)),
                Some(HostRewrite::Header(name)) => Some(HostEdit::Header(header(name)?)),
                Some(HostRewrite::Auto) | None => None,
            };
        }
        Ok((!edits.is_empty()).then(|| Arc::new(edits)))
    }

    /// `chain` makes the chain of a weighted cluster that configures filters.
    fn choice(
        &self,
        action: &RouteAction,
        chain: &mut dyn FnMut(&ClusterWeight) -> Result<Chain, String>,
    ) -> Result<Choice, String> {
        let mut destination = |cluster, weight: Option<&ClusterWeight>| {
            let own = weight.filter(|weight| !weight.typed_per_filter_config.is_empty());
            Ok::<_, String>(Destination {
                cluster,
                edits: self.edits(weight)?,
                filters: own.map(&mut *chain).transpose()?,
            })
        };
        match &action.cluster {
            ClusterSpecifier::Cluster(name) => {
                Ok(Choice::One(destination(self.fixed(action, name)?, None)?))
            }
            ClusterSpecifier::Header(name) => {
                let cluster = ByName::Header(header(name)?, self.known(action));
                Ok(Choice::One(destination(cluster, None)?))
            }
            ClusterSpecifier::Weighted(weighted) => {
                let mut known = None;
                let mut upto = 0;
                let mut destinations = Vec::with_capacity(weighted.clusters.len());
                for weight in &weighted.clusters {
                    let cluster = match &weight.cluster {
                        WeightedName::Name(name) => self.fixed(action, name)?,
                        WeightedName::Header(name) => {
                            let known = known.get_or_insert_with(|| self.known(action));
                            ByName::Header(header(name)?, known.clone())
                        }
                    };
                    upto += u64::from(weight.weight);
                    destinations.push((upto, destination(cluster, Some(weight))?));
                }
                let number = weighted.header_name.as_deref().map(header).transpose()?;
                Ok(Choice::Weighted {
                    destinations,
                    number,
                })
            }
        }
    }

    fn fixed(&self, action: &RouteAction, name: &str) -> Result<ByName, String> {
        let validated = self.scope.manager.route_config.validate_clusters;
        if validated && !self.scope.clusters.contains_key(name) {
            return Err(format!("unknown cluster '{name}'"));
        }
        Ok(ByName::Fixed(Arc::new(self.facts(Some(action), name))))
    }

    fn known(&self, action: &RouteAction) -> Arc<Known> {
        let names = self.scope.clusters.keys();
        let clusters = names
            .map(|name| (name.clone(), Arc::new(self.facts(Some(action), name))))
            .collect();
        Arc::new(Known {
            clusters,
            other: self.facts(Some(action), ""),
        })
    }
}

fn header(name: &str) -> Result<HeaderName, String> {
    HeaderName::try_from(name).map_err(|_| format!("'{name}' is no header name"))
}

/// Envoy's default, but none for token streams, which have limits of their own.
fn route_timeout(configured: Option<Duration>, openai: bool) -> Option<Duration> {
    let default = if openai {
        Duration::ZERO
    } else {
        ROUTE_TIMEOUT
    };
    Some(configured.unwrap_or(default)).filter(|timeout| !timeout.is_zero())
}
