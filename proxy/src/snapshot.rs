//! The configuration as the request path uses it: immutable, swapped whole, with nothing live in it.

use crate::{
    chain::{Chains, NoRoute, check_discovery},
    cluster::engine_id,
    http::LocalReplies,
    route::{self, BuiltRoute, Domains, Scope},
    trace::{Exporters, Tracer},
};
use http::request::Parts;
use outrigger_filters::{
    filter::Chain,
    services::{Services, is_loopback},
};
use outrigger_xds::{
    report::EngineId,
    resource::{
        bootstrap::Bootstrap,
        cluster::Cluster,
        endpoint::{Address, Duty},
        listener::{HttpConnectionManager, TrafficDirection},
        upgrade,
    },
};
use std::{collections::HashMap, sync::Arc};

/// One listener's HTTP side.
pub struct HttpConfig {
    /// As configured.
    pub manager: HttpConnectionManager,
    /// Whether peers arrive here.
    pub inbound: bool,
    /// What requests without a route pass; may be empty.
    pub unrouted: Chain,
    /// Which requests are traced, if any.
    pub(crate) tracer: Option<Tracer>,
    /// What becomes of our own answers.
    pub(crate) local_replies: Option<LocalReplies>,
    /// Our `server`.
    pub server: http::HeaderValue,
    domains: Domains,
    hosts: Vec<Vec<BuiltRoute>>,
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
        exporters: &Exporters,
    ) -> Result<Self, Vec<String>> {
        let inbound = direction == TrafficDirection::Inbound;
        let mut errors = check_discovery(&manager.http_filters);
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
            let scope = Scope {
                manager,
                host,
                inbound,
                clusters,
            };
            for (index, route) in host.routes.iter().enumerate() {
                match route::build(scope, &mut chains, route) {
                    Ok(route) => routes.push(route),
                    Err(error) => errors.push(format!(
                        "virtual_hosts[{}].routes[{index}]: {error}",
                        host.name
                    )),
                }
            }
            hosts.push(routes);
        }
        let local_replies = LocalReplies::new(&manager.local_replies, &services.runtime)
            .unwrap_or_else(|error| {
                errors.push(error);
                None
            });
        if errors.is_empty() {
            Ok(Self {
                tracer: Tracer::new(manager, direction, &services, exporters),
                local_replies,
                server: http::HeaderValue::from_str(&manager.server_name)
                    .map_err(|_| vec!["server_name: no header value".to_owned()])?,
                manager: manager.clone(),
                inbound,
                unrouted,
                domains: Domains::new(&manager.route_config),
                hosts,
            })
        } else {
            Err(errors)
        }
    }

    /// Whether a request may ask for this protocol: as its route says, else as the connection manager does.
    pub(crate) fn may_upgrade(&self, parts: &Parts, wanted: &[u8]) -> bool {
        let of_route = self.route(parts);
        let of_route = of_route.and_then(|route| upgrade::find(&route.upgrades, wanted));
        let allowed = of_route.or_else(|| upgrade::find(&self.manager.upgrades, wanted));
        allowed.unwrap_or(false)
    }

    /// The route of a request.
    #[must_use]
    pub fn route(&self, parts: &Parts) -> Option<&BuiltRoute> {
        let authority = route::authority(&parts.uri, &parts.headers);
        let host = self.domains.find(authority)?;
        self.hosts[host].iter().find(|route| route.matches(parts))
    }
}

/// Where endpoints are, by name. Clusters may differ in how they use an endpoint, never in where it is: connections
/// belong to names.
#[derive(Default)]
pub struct Addresses(HashMap<EngineId, Address>);

impl Addresses {
    /// Takes the endpoints of one more cluster in; gives what contradicts those before.
    pub fn add(&mut self, cluster: &Cluster) -> Vec<String> {
        let mut errors = Vec::new();
        let name = &cluster.name;
        let endpoints = cluster.load_assignment.endpoints.iter();
        for endpoint in endpoints.filter(|endpoint| endpoint.duty() != Duty::Peer) {
            let (id, address) = (engine_id(endpoint), &endpoint.address);
            match self.0.get(&id) {
                Some(known) if known != address => errors.push(format!(
                    "cluster '{name}': endpoint '{id}' is at {address}, and at {known} elsewhere in this configuration"
                )),
                _ => drop(self.0.insert(id, address.clone())),
            }
        }
        errors.extend(secured_engine(cluster));
        errors
    }
}

/// Whoever watches an engine speaks plain text to it so far, and so do requests: that is fit for this machine only.
fn secured_engine(cluster: &Cluster) -> Option<String> {
    let mut endpoints = cluster.load_assignment.endpoints.iter();
    let engine = endpoints
        .any(|endpoint| endpoint.duty() == Duty::Engine && !is_loopback(&endpoint.address.host));
    (cluster.sockets().flatten().next().is_some() && engine).then(|| {
        let name = &cluster.name;
        format!(
            "cluster '{name}': transport_socket: not supported yet with endpoints of duty engine that are not on this machine"
        )
    })
}

/// All listeners' HTTP sides of a configuration, by listener name; of each, in the order of its chains.
///
/// # Errors
/// Everything that is wrong, each with its place.
pub fn build(
    bootstrap: &Bootstrap,
    services: &Services,
    exporters: &Exporters,
) -> Result<HashMap<String, Vec<Arc<HttpConfig>>>, Vec<String>> {
    let clusters: HashMap<String, Cluster> = bootstrap
        .clusters
        .iter()
        .map(|cluster| (cluster.name.clone(), cluster.clone()))
        .collect();
    let mut built = HashMap::new();
    let mut addresses = Addresses::default();
    let clusters_of = bootstrap.clusters.iter();
    let mut errors: Vec<String> = clusters_of
        .flat_map(|cluster| addresses.add(cluster))
        .collect();
    for listener in &bootstrap.listeners {
        let mut of_listener = Vec::new();
        for manager in listener.http_managers() {
            let direction = listener.traffic_direction;
            match HttpConfig::build(manager, direction, &clusters, services, exporters) {
                Ok(http) => of_listener.push(Arc::new(http)),
                Err(found) => errors.extend(
                    found
                        .into_iter()
                        .map(|error| format!("listener '{}': {error}", listener.name)),
                ),
            }
        }
        built.insert(listener.name.clone(), of_listener);
    }
    if errors.is_empty() {
        Ok(built)
    } else {
        Err(errors)
    }
}
