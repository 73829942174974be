//! `envoy.config.bootstrap.v3.Bootstrap`.

use super::{
    ads::{Ads, Target},
    cluster::Cluster,
    config_source::{ConfigSource, not_aggregated},
    endpoint::{Address, pipe_mode, with_pipe_mode},
    filter_chain::Network,
    listener::{AccessLog, AccessLogFormat, AccessLogSink, Listener},
    route::{Action, RouteConfiguration, TypedConfig},
    runtime::{self, RuntimeLayer},
    secret::Secret,
};
use crate::{
    problems::ConfigErrors,
    protobuf::{struct_from_json, struct_to_json, type_name},
    subscription::Protocol,
    wire::envoy::config::{bootstrap::v3 as wire, core::v3 as core},
};
use serde_json::{Map, Value};
use std::collections::HashSet;

/// Extensions of a process that have no effect.
const EXTENSIONS: [&str; 2] = [
    "envoy.extensions.bootstrap.internal_listener.v3.InternalListener",
    "istio.workload.BootstrapExtension",
];

/// Where the control plane is configured.
const ADS: &str = "dynamic_resources.ads_config";
/// Where load reports are configured.
const LOAD_STATS: &str = "cluster_manager.load_stats_config";

/// Everything a process starts with.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Bootstrap {
    /// Who we are.
    pub node: Node,
    /// Where the admin listens; none means no admin.
    pub admin: Option<Admin>,
    /// `static_resources.listeners`.
    pub listeners: Vec<Listener>,
    /// `static_resources.clusters`.
    pub clusters: Vec<Cluster>,
    /// `static_resources.secrets`.
    pub secrets: Vec<Secret>,
    /// `dynamic_resources.lds_config`: where further listeners come from.
    pub lds: Option<ConfigSource>,
    /// `dynamic_resources.cds_config`: where further clusters come from.
    pub cds: Option<ConfigSource>,
    /// `dynamic_resources.ads_config`: the control plane of all that says `ads`.
    pub ads: Option<Ads>,
    /// `cluster_manager.load_stats_config`: who is told of the load of clusters.
    pub load_stats: Option<Ads>,
    /// `layered_runtime`: values by key; none is one layer, which the admin is told.
    pub runtime: Vec<RuntimeLayer>,
}

/// `envoy.config.core.v3.Node`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Node {
    /// Unique in the fleet.
    pub id: String,
    /// The group it belongs to.
    pub cluster: String,
    /// Facts for the control plane.
    pub metadata: Map<String, Value>,
    /// Where it runs: region, zone, sub-zone; empty if not said.
    pub locality: [String; 3],
    /// What the control plane is told that we understand, beside what we do.
    pub client_features: Vec<String>,
}

impl From<core::Node> for Node {
    fn from(wire: core::Node) -> Self {
        let locality = wire.locality.unwrap_or_default();
        let metadata = wire.metadata.map(struct_to_json);
        Self {
            id: wire.id,
            cluster: wire.cluster,
            metadata: match metadata {
                Some(Value::Object(fields)) => fields,
                _ => Map::new(),
            },
            locality: [locality.region, locality.zone, locality.sub_zone],
            client_features: wire.client_features,
        }
    }
}

impl From<&Node> for core::Node {
    fn from(plain: &Node) -> Self {
        let [region, zone, sub_zone] = plain.locality.clone();
        let is_somewhere = plain.locality.iter().any(|part| !part.is_empty());
        let metadata = &plain.metadata;
        Self {
            id: plain.id.clone(),
            cluster: plain.cluster.clone(),
            metadata: (!metadata.is_empty())
                .then(|| struct_from_json(Value::Object(metadata.clone()))),
            locality: is_somewhere.then_some(core::Locality {
                region,
                zone,
                sub_zone,
            }),
            client_features: plain.client_features.clone(),
            ..Default::default()
        }
    }
}

/// `envoy.config.bootstrap.v3.Admin`.
#[derive(Debug, Clone, PartialEq)]
pub struct Admin {
    /// Where.
    pub address: Address,
    /// Permissions of the file of a pipe; 0 leaves them as they come.
    pub pipe_mode: u32,
    /// Logs of admin requests.
    pub access_log: Vec<AccessLog>,
}

impl TryFrom<wire::Bootstrap> for Bootstrap {
    type Error = ConfigErrors;

    fn try_from(wire: wire::Bootstrap) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let node = wire.node.unwrap_or_default();
        let admin = wire
            .admin
            .and_then(|admin| problems.take("admin", admin.try_into()));
        let resources = wire.static_resources.unwrap_or_default();
        let listener_names: Vec<String> = resources
            .listeners
            .iter()
            .map(|listener| listener.name.clone())
            .collect();
        let cluster_names: Vec<String> = resources
            .clusters
            .iter()
            .map(|cluster| cluster.name.clone())
            .collect();
        let listeners: Vec<Listener> =
            problems.take_all("static_resources.listeners", resources.listeners);
        let clusters: Vec<Cluster> =
            problems.take_all("static_resources.clusters", resources.clusters);
        let secret_names: Vec<String> = resources
            .secrets
            .iter()
            .map(|secret| secret.name.clone())
            .collect();
        let secrets = problems.take_all("static_resources.secrets", resources.secrets);
        let layers = wire.layered_runtime.unwrap_or_default();
        let runtime = runtime::layers(&mut problems, layers);
        check_extensions(&mut problems, wire.bootstrap_extensions);
        let dynamic = wire.dynamic_resources.unwrap_or_default();
        let lds = dynamic
            .lds_config
            .and_then(|source| problems.take("dynamic_resources.lds_config", source.try_into()));
        let cds: Option<ConfigSource> = dynamic
            .cds_config
            .and_then(|source| problems.take("dynamic_resources.cds_config", source.try_into()));
        let ads = dynamic
            .ads_config
            .and_then(|source| problems.take(ADS, source.try_into()));
        let load_stats = load_stats(&mut problems, wire.cluster_manager);
        for (place, from) in [(ADS, &ads), (LOAD_STATS, &load_stats)] {
            let known = (&*clusters, &*cluster_names);
            check_servers(&mut problems, place, from.as_ref(), known);
        }
        check_unique(&mut problems, "static_resources.secrets", &secret_names);
        check_unique(&mut problems, "static_resources.listeners", &listener_names);
        check_unique(&mut problems, "static_resources.clusters", &cluster_names);
        check_addresses(&mut problems, &listeners, &listener_names);
        for listener in &listeners {
            let index = listener_names
                .iter()
                .position(|name| *name == listener.name)
                .unwrap_or_default();
            check_clusters(&mut problems, index, listener, &cluster_names);
        }
        problems.finish(Some(Self {
            node: node.into(),
            admin,
            listeners,
            clusters,
            secrets,
            lds,
            cds,
            ads,
            load_stats,
            runtime,
        }))
    }
}

/// Reports have one form only.
fn load_stats(problems: &mut ConfigErrors, manager: Option<wire::ClusterManager>) -> Option<Ads> {
    let source = manager?.load_stats_config?;
    problems.take(LOAD_STATS, not_aggregated(&source))?;
    let config: Ads = problems.take(LOAD_STATS, source.try_into())?;
    if config.protocol != Protocol::State {
        let message = "must be GRPC: load reports have no deltas";
        problems.add(format!("{LOAD_STATS}.api_type"), message);
    }
    Some(config)
}

/// Those that may be there are of no use without what is refused elsewhere.
fn check_extensions(problems: &mut ConfigErrors, extensions: Vec<core::TypedExtensionConfig>) {
    for (index, extension) in extensions.into_iter().enumerate() {
        let place = format!("bootstrap_extensions[{index}].typed_config");
        let given = extension.typed_config.unwrap_or_default();
        let Some(config) = problems.take(&place, TypedConfig::try_from(given)) else {
            continue;
        };
        let of = config.type_url;
        if !EXTENSIONS.contains(&type_name(&of)) {
            problems.add(place, format!("not supported yet: {of}"));
        }
    }
}

/// A control plane cannot bring the cluster that it is reached by.
fn check_servers(
    problems: &mut ConfigErrors,
    place: &str,
    ads: Option<&Ads>,
    (clusters, names): (&[Cluster], &[String]),
) {
    let servers = ads.map_or(&[][..], |ads| &ads.servers);
    for (index, server) in servers.iter().enumerate() {
        let Target::Cluster { name, .. } = &server.target else {
            continue;
        };
        let is_eds = |cluster: &Cluster| cluster.name == *name && cluster.eds.is_some();
        let is_unknown = !name.is_empty() && !names.contains(name);
        if is_unknown || clusters.iter().any(is_eds) {
            problems.add(
                format!("{place}.grpc_services[{index}].envoy_grpc.cluster_name"),
                format!(
                    "must name a statically defined non-EDS cluster: '{name}' does not exist or is an EDS cluster"
                ),
            );
        }
    }
}

fn check_unique(problems: &mut ConfigErrors, place: &str, names: &[String]) {
    let mut seen = HashSet::new();
    for (index, name) in names.iter().enumerate() {
        if !name.is_empty() && !seen.insert(name) {
            problems.add(
                format!("{place}[{index}].name"),
                format!("duplicate name '{name}'"),
            );
        }
    }
}

/// Sockets share their port between workers, so the system would let two listeners share connections at random.
fn check_addresses(problems: &mut ConfigErrors, listeners: &[Listener], names: &[String]) {
    let mut seen = HashSet::new();
    for listener in listeners
        .iter()
        .filter(|listener| listener.address.port != 0 && listener.bind_to_port)
    {
        if !seen.insert(&listener.address) {
            let index = names
                .iter()
                .rposition(|name| *name == listener.name)
                .unwrap_or_default();
            let place = format!("static_resources.listeners[{index}].address");
            problems.add(place, format!("duplicate address {}", listener.address));
        }
    }
}

/// A static route to a cluster that does not exist can never work.
fn check_clusters(
    problems: &mut ConfigErrors,
    index: usize,
    listener: &Listener,
    clusters: &[String],
) {
    for (chain, of_listener) in listener.chains() {
        let Network::Http(manager) = &of_listener.network else {
            continue;
        };
        let table = &manager.route_config;
        if table.validate_clusters {
            let place = format!(
                "static_resources.listeners[{index}].{chain}.filters[0].typed_config.route_config"
            );
            check_routes(problems, &place, table, clusters);
        }
    }
}

fn check_routes(
    problems: &mut ConfigErrors,
    table: &str,
    routes: &RouteConfiguration,
    clusters: &[String],
) {
    for (host, virtual_host) in routes.virtual_hosts.iter().enumerate() {
        for (route, of_host) in virtual_host.routes.iter().enumerate() {
            let Action::Route(action) = &of_host.action else {
                continue;
            };
            let unknown = action.cluster.named().into_iter().filter(|(_, cluster)| {
                !cluster.is_empty() && !clusters.iter().any(|known| known == cluster)
            });
            for (place, cluster) in unknown {
                problems.add(
                    format!("{table}.virtual_hosts[{host}].routes[{route}].route.{place}"),
                    format!("unknown cluster '{cluster}'"),
                );
            }
        }
    }
}

impl TryFrom<wire::Admin> for Admin {
    type Error = ConfigErrors;

    fn try_from(wire: wire::Admin) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let pipe_mode = problems.take("address", pipe_mode(wire.address.as_ref()));
        let address: Option<Address> = problems.required("address", wire.address);
        let mut access_log = problems.take_all("access_log", wire.access_log);
        let path = wire.access_log_path;
        if !path.is_empty() {
            access_log.push(AccessLog {
                filter: None,
                sink: AccessLogSink::File(path),
                format: AccessLogFormat::Text(None),
            });
        }
        problems.finish(address.map(|address| Self {
            address,
            pipe_mode: pipe_mode.unwrap_or(0),
            access_log,
        }))
    }
}

impl From<&Bootstrap> for wire::Bootstrap {
    fn from(plain: &Bootstrap) -> Self {
        let node = core::Node::from(&plain.node);
        let admin = plain.admin.as_ref().map(|admin| wire::Admin {
            access_log: admin.access_log.iter().map(Into::into).collect(),
            address: Some(with_pipe_mode(&admin.address, admin.pipe_mode)),
            ..Default::default()
        });
        let resources = wire::bootstrap::StaticResources {
            listeners: plain.listeners.iter().map(Into::into).collect(),
            clusters: plain.clusters.iter().map(Into::into).collect(),
            secrets: plain.secrets.iter().map(Into::into).collect(),
        };
        let dynamic = wire::bootstrap::DynamicResources {
            lds_config: plain.lds.as_ref().map(Into::into),
            cds_config: plain.cds.as_ref().map(Into::into),
            ads_config: plain.ads.as_ref().map(Into::into),
        };
        let manager = plain
            .load_stats
            .as_ref()
            .map(|config| wire::ClusterManager {
                load_stats_config: Some(config.into()),
            });
        let is_dynamic = plain.lds.is_some() || plain.cds.is_some() || plain.ads.is_some();
        Self {
            node: Some(node),
            static_resources: Some(resources),
            dynamic_resources: is_dynamic.then_some(dynamic),
            cluster_manager: manager,
            layered_runtime: (!plain.runtime.is_empty()).then(|| wire::LayeredRuntime {
                layers: plain.runtime.iter().map(Into::into).collect(),
            }),
            admin,
            ..Self::default()
        }
    }
}
