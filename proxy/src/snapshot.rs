//! The configuration as the request path uses it: immutable, swapped whole, with nothing live in it.

use crate::{
    chain::{Chains, Direct, NoRoute},
    cluster::engine_id,
    route,
};
use http::request::Parts;
use outrigger_filters::{
    filter::{Chain, RouteFacts},
    services::Services,
};
use outrigger_xds::{
    report::EngineId,
    resource::{
        bootstrap::Bootstrap,
        cluster::{CircuitBreakers, Cluster},
        endpoint::{Address, Duty},
        listener::{HttpConnectionManager, TrafficDirection},
        route::{Action, Route, RouteMatch, VirtualHost},
    },
};
use std::{collections::HashMap, sync::Arc, time::Duration};

/// Of a route that has no timeout, as in Envoy.
const ROUTE_TIMEOUT: Duration = Duration::from_secs(15);

/// One listener's HTTP side.
pub struct HttpConfig {
    /// As configured.
    pub manager: HttpConnectionManager,
    /// Whether peers arrive here.
    pub inbound: bool,
    /// What requests without a route pass; may be empty.
    pub unrouted: Chain,
    /// Our `server`.
    pub server: http::HeaderValue,
    hosts: Vec<Vec<BuiltRoute>>,
}

/// A route, ready to run.
pub struct BuiltRoute {
    r#match: RouteMatch,
    /// What to do.
    pub target: Target,
    /// Whether errors take OpenAI's form.
    pub openai: bool,
}

/// What a route does.
pub enum Target {
    /// Runs a chain.
    Chain {
        /// Its filters.
        filters: Chain,
        /// Pinned facts.
        facts: Arc<RouteFacts>,
        /// Replaces the matched prefix.
        prefix_rewrite: Option<(String, String)>,
    },
    /// Answers here.
    Direct {
        /// What it passes before; if empty, nothing, and this answer is given as it is.
        filters: Chain,
        /// Pinned facts.
        facts: Arc<RouteFacts>,
        /// Status.
        status: http::StatusCode,
        /// Body.
        body: String,
    },
}

impl HttpConfig {
    /// Builds and cross-checks one connection manager.
    ///
    /// # Errors
    /// Everything that is wrong, each with its place.
    pub fn build(
        manager: &HttpConnectionManager,
        direction: TrafficDirection,
        clusters: &HashMap<String, Cluster>,
        services: &Services,
    ) -> Result<Self, Vec<String>> {
        let inbound = direction == TrafficDirection::Inbound;
        let mut errors = Vec::new();
        let mut hosts = Vec::new();
        let services = Services {
            stat_prefix: manager.stat_prefix.as_str().into(),
            ..services.clone()
        };
        let mut chains = Chains::new(&manager.http_filters, &services);
        let unrouted = chains
            .nowhere(&[], Arc::new(NoRoute))
            .unwrap_or_else(|error| {
                errors.push(error);
                Arc::from([])
            });
        for host in &manager.route_config.virtual_hosts {
            let mut routes = Vec::new();
            for (index, route) in host.routes.iter().enumerate() {
                let strict = manager.route_config.validate_clusters;
                match build_route(&mut chains, host, route, inbound, (clusters, strict)) {
                    Ok(route) => routes.push(route),
                    Err(error) => errors.push(format!(
                        "virtual_hosts[{}].routes[{index}]: {error}",
                        host.name
                    )),
                }
            }
            hosts.push(routes);
        }
        if errors.is_empty() {
            Ok(Self {
                server: http::HeaderValue::from_str(&manager.server_name)
                    .map_err(|_| vec!["server_name: no header value".to_owned()])?,
                manager: manager.clone(),
                inbound,
                unrouted,
                hosts,
            })
        } else {
            Err(errors)
        }
    }

    /// The route of a request.
    #[must_use]
    pub fn route(&self, parts: &Parts) -> Option<&BuiltRoute> {
        let authority = route::authority(&parts.uri, &parts.headers);
        let host = route::virtual_host(&self.manager.route_config, authority)?;
        self.hosts[host]
            .iter()
            .find(|route| route::matches(&route.r#match, parts))
    }
}

fn build_route(
    chains: &mut Chains<'_>,
    host: &VirtualHost,
    route: &Route,
    inbound: bool,
    (clusters, strict): (&HashMap<String, Cluster>, bool),
) -> Result<BuiltRoute, String> {
    let own = [&route.typed_per_filter_config];
    let chain = chains.route(&own)?;
    let target = match &route.action {
        Action::DirectResponse { status, body } => {
            let status = http::StatusCode::from_u16(*status)
                .map_err(|_| format!("status {status} is no HTTP status"))?;
            let last = Direct {
                status,
                body: body.clone(),
                openai: chain.openai,
            };
            let facts = RouteFacts {
                name: route.name.as_str().into(),
                virtual_host: host.name.as_str().into(),
                inbound,
                ..RouteFacts::default()
            };
            Target::Direct {
                filters: chains.nowhere(&own, Arc::new(last))?,
                facts: Arc::new(facts),
                status,
                body: body.clone(),
            }
        }
        Action::Route(action) => {
            let breakers = match clusters.get(&action.cluster) {
                Some(cluster) => cluster.circuit_breakers.clone(),
                None if !strict => CircuitBreakers::default(),
                None => return Err(format!("unknown cluster '{}'", action.cluster)),
            };
            let facts = RouteFacts {
                name: route.name.as_str().into(),
                virtual_host: host.name.as_str().into(),
                cluster: action.cluster.as_str().into(),
                timeout: route_timeout(action.timeout, chain.openai),
                idle_timeout: action.idle_timeout,
                retry_policy: action
                    .retry_policy
                    .clone()
                    .or_else(|| host.retry_policy.clone()),
                retry_budget_percent: breakers.retry_budget_percent,
                min_retry_concurrency: breakers.min_retry_concurrency,
                inbound,
            };
            let prefix_rewrite = action
                .prefix_rewrite
                .as_ref()
                .map(|to| (matched_prefix(&route.r#match), to.clone()));
            Target::Chain {
                filters: chain.filters,
                facts: Arc::new(facts),
                prefix_rewrite,
            }
        }
    };
    Ok(BuiltRoute {
        r#match: route.r#match.clone(),
        target,
        openai: chain.openai,
    })
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

/// Clusters may differ in how they use an endpoint, never in where it is: connections belong to names.
fn one_address_a_name(clusters: &[Cluster]) -> Vec<String> {
    let mut addresses: HashMap<EngineId, &Address> = HashMap::new();
    let mut errors = Vec::new();
    let endpoints = clusters.iter().flat_map(|cluster| {
        let endpoints = cluster.load_assignment.endpoints.iter();
        endpoints.map(|endpoint| (&cluster.name, endpoint))
    });
    for (cluster, endpoint) in endpoints.filter(|(_, endpoint)| endpoint.duty() != Duty::Peer) {
        let id = engine_id(endpoint);
        let address = &endpoint.address;
        match addresses.get(&id) {
            Some(known) if *known != address => errors.push(format!(
                "cluster '{cluster}': endpoint '{id}' is at {address}, and at {known} elsewhere in this configuration"
            )),
            _ => drop(addresses.insert(id, address)),
        }
    }
    errors
}

fn matched_prefix(route: &RouteMatch) -> String {
    use outrigger_xds::resource::route::PathMatch;
    match &route.path {
        PathMatch::Prefix(path) | PathMatch::Path(path) | PathMatch::PathSeparatedPrefix(path) => {
            path.clone()
        }
    }
}

/// All listeners' HTTP sides of a configuration, by listener name.
///
/// # Errors
/// Everything that is wrong, each with its place.
pub fn build(
    bootstrap: &Bootstrap,
    services: &Services,
) -> Result<HashMap<String, Arc<HttpConfig>>, Vec<String>> {
    let clusters: HashMap<String, Cluster> = bootstrap
        .clusters
        .iter()
        .map(|cluster| (cluster.name.clone(), cluster.clone()))
        .collect();
    let mut built = HashMap::new();
    let mut errors = one_address_a_name(&bootstrap.clusters);
    for listener in &bootstrap.listeners {
        match HttpConfig::build(
            &listener.http,
            listener.traffic_direction,
            &clusters,
            services,
        ) {
            Ok(http) => {
                built.insert(listener.name.clone(), Arc::new(http));
            }
            Err(found) => errors.extend(
                found
                    .into_iter()
                    .map(|error| format!("listener '{}': {error}", listener.name)),
            ),
        }
    }
    if errors.is_empty() {
        Ok(built)
    } else {
        Err(errors)
    }
}
