//! Judging and building: whether a resource fits the others, and a listener as it is to run.

use super::model::{self, Model};
use crate::{
    access_log::{AccessLogs, Sinks},
    listener::{Planned, PlannedChain, PlannedServes},
    snapshot::{self, Addresses, HttpConfig},
    tcp_proxy::TcpProxy,
    tls::{contexts::Contexts, server::Server},
    trace::Exporters,
};
use outrigger_filters::services::Services;
use outrigger_xds::{
    accepted::Update,
    resource::{
        ads::{GrpcService, Target},
        cluster::Cluster,
        config_source::{ConfigSource, Origin, Service},
        endpoint::{Address, ClusterLoadAssignment},
        extension::ExtensionConfig,
        filter_chain::{FilterChain, Network},
        listener::{AccessLog, HttpConnectionManager, Listener},
        route::RouteConfiguration,
        secret::SecretConfig,
        tls::CommonTls,
    },
};
use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    path::Path,
    sync::Arc,
};

/// What building needs.
pub(super) struct Builder {
    pub(super) services: Services,
    pub(super) sinks: Arc<Sinks>,
    pub(super) exporters: Arc<Exporters>,
}

/// Judges resources of one type.
pub(super) type Check<'a, R> = Box<dyn FnMut(&R) -> Result<(), String> + 'a>;

/// Clusters without their endpoints, which routes do not look at.
pub(super) fn shells<'a>(clusters: impl Iterator<Item = &'a Cluster>) -> HashMap<String, Cluster> {
    let shell = |cluster: &Cluster| Cluster {
        name: cluster.name.clone(),
        circuit_breakers: cluster.circuit_breakers.clone(),
        ..Cluster::default()
    };
    clusters
        .map(|cluster| (cluster.name.clone(), shell(cluster)))
        .collect()
}

/// Envoy's rules: a file that is named must be there, and a control plane must be configured.
fn exists(model: &Model, source: Option<&ConfigSource>) -> Result<(), String> {
    match source.map(|source| &source.origin) {
        None => Ok(()),
        Some(Origin::Ads) if model.bootstrap.ads.is_some() => Ok(()),
        Some(Origin::Ads) => Err(
            "ADS must be configured to support an ADS config source: dynamic_resources.ads_config"
                .into(),
        ),
        Some(Origin::Path(path)) if Path::new(path).exists() => Ok(()),
        Some(Origin::Path(path)) => Err(format!(
            "paths must refer to an existing path in the system: '{path}' does not exist"
        )),
        Some(Origin::Service(service)) => servers(model, service),
    }
}

/// A cluster that a control plane is reached by, if it is one.
fn server(service: &GrpcService) -> Option<&str> {
    match &service.target {
        Target::Cluster { name, .. } => Some(name),
        Target::Address { .. } => None,
    }
}

/// Envoy's rule: a control plane cannot bring the cluster that it is reached by.
fn servers(model: &Model, service: &Service) -> Result<(), String> {
    let written = &model.bootstrap.clusters;
    let mut names = service.control_plane().servers.iter().filter_map(server);
    let is_static = |name: &str| {
        let mut written = written.iter();
        written.any(|cluster| cluster.name == name && cluster.eds.is_none())
    };
    match names.find(|name| !is_static(name)) {
        None => Ok(()),
        Some(name) => Err(format!(
            "api_config_source must name a statically defined non-EDS cluster: '{name}' does not exist, was added via api, or is an EDS cluster"
        )),
    }
}

/// A cluster whose secret comes from a server that is reached by it would wait for itself.
fn check_own_secrets(cluster: &Cluster) -> Result<(), String> {
    let sockets = cluster.sockets().flatten();
    let mut secrets = sockets.flat_map(|tls| tls.common.secrets());
    let waits_for_itself = |secret: &SecretConfig| match secret.source.as_ref()?.origin {
        Origin::Service(ref service) => {
            let mut servers = service.control_plane().servers.iter();
            servers
                .all(|of| server(of) == Some(&cluster.name))
                .then(|| secret.name.clone())
        }
        Origin::Path(_) | Origin::Ads => None,
    };
    match secrets.find_map(waits_for_itself) {
        None => Ok(()),
        Some(name) => Err(format!(
            "secret '{name}' is to come from a server that this cluster leads to"
        )),
    }
}

/// What is written down must exist where it is written down.
fn check_secrets<'a>(
    model: &Model,
    secrets: impl Iterator<Item = &'a SecretConfig>,
) -> Result<(), String> {
    for config in secrets {
        exists(model, config.source.as_ref())?;
        if config.source.is_none() && model.secret(config).is_none() {
            return Err(format!("unknown static secret: {}", config.name));
        }
    }
    Ok(())
}

impl Builder {
    /// Everything that is wrong with what is written.
    pub(super) fn check_written(&self, model: &Model, contexts: &Contexts) -> Vec<String> {
        let written = &model.bootstrap;
        let mut errors = Vec::new();
        let mut keep = |result: Result<(), String>| errors.extend(result.err());
        keep(exists(model, written.lds.as_ref()));
        keep(exists(model, written.cds.as_ref()));
        for layer in &written.runtime {
            keep(exists(model, layer.rtds().map(|rtds| &rtds.source)));
        }
        for secret in &written.secrets {
            let checked = crate::tls::check_secret(&secret.content);
            keep(checked.map_err(|error| format!("secret '{}': {error}", secret.name)));
        }
        for cluster in &written.clusters {
            keep(check_context(model, contexts, cluster));
        }
        for listener in &written.listeners {
            keep(self.check_socket(model, contexts, listener));
        }
        if let Err(found) = snapshot::build(written, &self.services, &self.exporters) {
            errors.extend(found);
        }
        errors
    }

    /// All of a listener but its HTTP side.
    fn check_socket(
        &self,
        model: &Model,
        contexts: &Contexts,
        listener: &Listener,
    ) -> Result<(), String> {
        let name = &listener.name;
        let named = |error| format!("listener '{name}': {error}");
        for http in listener.http_managers() {
            exists(model, http.rds.as_ref().map(|rds| &rds.source)).map_err(named)?;
            for filter in &http.http_filters {
                let discovery = filter.discovery.as_ref();
                exists(model, discovery.map(|from| &from.source)).map_err(named)?;
            }
        }
        let secrets = model::tls(listener).flat_map(CommonTls::secrets);
        check_secrets(model, secrets).map_err(named)?;
        for (_, chain) in listener.chains() {
            contexts.server(name, chain, &|config| model.secret(config))?;
            AccessLogs::new(
                access_log(&chain.network),
                &self.sinks,
                &self.services.runtime,
            )?;
        }
        Ok(())
    }

    /// Judges clusters that came.
    pub(super) fn cluster_check<'a>(
        &self,
        model: &'a Model,
        contexts: &'a Contexts,
        update: &Update<Cluster>,
    ) -> Check<'a, Cluster> {
        let coming: BTreeSet<_> = update
            .resources
            .iter()
            .map(|come| come.name.clone())
            .collect();
        let mut addresses = Addresses::default();
        let others = model
            .all_clusters()
            .filter(|known| !coming.contains(&known.name));
        for known in others.filter_map(|known| model.complete_cluster(known)) {
            addresses.add(&known);
        }
        Box::new(move |cluster| {
            let mut written = model.bootstrap.clusters.iter();
            if written.any(|known| known.name == cluster.name) {
                return Err("a static cluster has this name".into());
            }
            check_context(model, contexts, cluster)?;
            let complete = model.complete_cluster(cluster);
            let errors = addresses.add(complete.as_ref().unwrap_or(cluster));
            none(&errors)
        })
    }

    /// Judges listeners that came.
    pub(super) fn listener_check<'a>(
        &'a self,
        model: &'a Model,
        contexts: &'a Contexts,
    ) -> Check<'a, Listener> {
        let others = model.all_listeners();
        let mut addresses: HashMap<Address, String> = others
            .map(|listener| (listener.address.clone(), listener.name.clone()))
            .collect();
        let clusters = shells(model.all_clusters());
        Box::new(move |listener| {
            let mut written = model.bootstrap.listeners.iter();
            if written.any(|known| known.name == listener.name) {
                return Err("a static listener has this name".into());
            }
            self.check_socket(model, contexts, listener)?;
            let (filled, _) = model.filled_listener(listener);
            for http in filled.http_managers() {
                self.http(listener, http, &clusters)?;
            }
            if listener.address.port != 0 {
                let name = listener.name.clone();
                if let Some(other) = addresses.insert(listener.address.clone(), name) {
                    let address = &listener.address;
                    return Err(format!(
                        "duplicate address {address}: listener '{other}' has it"
                    ));
                }
            }
            Ok(())
        })
    }

    /// Judges route tables that came: each listener that asks for one must be able to use it.
    pub(super) fn route_check<'a>(
        &'a self,
        model: &'a Model,
        origin: &'a Origin,
    ) -> Check<'a, RouteConfiguration> {
        let clusters = shells(model.all_clusters());
        Box::new(move |table| {
            for listener in model.all_listeners() {
                for http in listener.http_managers() {
                    let asks = http.rds.as_ref();
                    if asks
                        .is_some_and(|rds| rds.source.origin == *origin && rds.name == table.name)
                    {
                        let mut with = http.clone();
                        model.fill_filters(&mut with);
                        with.route_config = table.clone();
                        self.http(listener, &with, &clusters)?;
                    }
                }
            }
            Ok(())
        })
    }

    /// Judges configurations of filters that came: each listener that asks for one must be able to use it.
    pub(super) fn extension_check<'a>(
        &'a self,
        model: &'a Model,
        origin: &'a Origin,
    ) -> Check<'a, ExtensionConfig> {
        let clusters = shells(model.all_clusters());
        Box::new(move |came| {
            for listener in model.all_listeners() {
                let (filled, _) = model.filled_listener(listener);
                for mut http in filled.http_managers().cloned() {
                    if !put_in(&mut http, came, origin)? {
                        continue;
                    }
                    // Routes were judged when they came.
                    http.route_config.validate_clusters = false;
                    self.http(listener, &http, &clusters)
                        .map_err(|error| format!("listener '{}': {error}", listener.name))?;
                }
            }
            Ok(())
        })
    }

    /// Judges endpoints that came.
    pub(super) fn endpoint_check<'a>(
        &self,
        model: &'a Model,
        origin: &'a Origin,
        update: &Update<ClusterLoadAssignment>,
    ) -> Check<'a, ClusterLoadAssignment> {
        let coming: BTreeSet<_> = update
            .resources
            .iter()
            .map(|come| come.name.clone())
            .collect();
        let asks = |cluster: &Cluster| {
            let eds = cluster.eds.as_ref();
            eds.is_some_and(|eds| eds.source.origin == *origin)
        };
        let mut addresses = Addresses::default();
        let others = model
            .all_clusters()
            .filter(|known| !(asks(known) && coming.contains(known.eds_service_name())));
        for known in others.filter_map(|known| model.complete_cluster(known)) {
            addresses.add(&known);
        }
        Box::new(move |assignment| {
            check_ips(assignment)?;
            let mut errors = Vec::new();
            for cluster in model.all_clusters() {
                if asks(cluster) && cluster.eds_service_name() == assignment.cluster_name {
                    let complete = Cluster {
                        load_assignment: assignment.clone(),
                        ..cluster.clone()
                    };
                    errors.extend(addresses.add(&complete));
                }
            }
            none(&errors)
        })
    }

    fn http(
        &self,
        listener: &Listener,
        manager: &HttpConnectionManager,
        clusters: &HashMap<String, Cluster>,
    ) -> Result<Arc<HttpConfig>, String> {
        let direction = listener.traffic_direction;
        HttpConfig::build(
            manager,
            direction,
            clusters,
            &self.services,
            &self.exporters,
        )
        .map(Arc::new)
        .map_err(|errors| errors.join("\n"))
    }

    /// A complete listener as it is to run; what `known` is of it stays the same object.
    pub(super) fn plan(
        &self,
        complete: &Listener,
        known: Option<&Planned>,
        clusters: &HashMap<String, Cluster>,
        tls: impl Fn(&FilterChain) -> Result<Option<Arc<Server>>, String>,
    ) -> Result<Planned, String> {
        if let Some(known) = known.filter(|known| *known.listener == *complete) {
            return Ok(known.clone());
        }
        let plan = |chain: &FilterChain| -> Result<PlannedChain, String> {
            Ok(PlannedChain {
                matches: chain.matches.clone(),
                tls: tls(chain)?,
                serves: self.serves(complete, chain, clusters)?,
            })
        };
        let chains = complete.filter_chains.iter().map(plan);
        let default = complete.default_filter_chain.as_ref().map(plan);
        Ok(Planned {
            chains: chains.collect::<Result<_, _>>()?,
            default: default.transpose()?,
            listener: Arc::new(complete.clone()),
        })
    }

    fn serves(
        &self,
        listener: &Listener,
        chain: &FilterChain,
        clusters: &HashMap<String, Cluster>,
    ) -> Result<PlannedServes, String> {
        let logs = AccessLogs::new(
            access_log(&chain.network),
            &self.sinks,
            &self.services.runtime,
        )?;
        Ok(match &chain.network {
            Network::Http(manager) => {
                // It was accepted when its clusters were there; that one is gone now is told to those who ask for it.
                let mut lenient = manager.clone();
                lenient.route_config.validate_clusters = false;
                let config = self.http(listener, &lenient, clusters)?;
                PlannedServes::Http(config, Arc::new(logs))
            }
            Network::Tcp(proxy) => {
                let endpoints = self.services.endpoints.clone();
                let proxy = TcpProxy::new(proxy.clone(), logs, endpoints);
                PlannedServes::Tcp(Arc::new(proxy))
            }
        })
    }
}

/// Puts a configuration that came where a chain asks for it; whether it does.
fn put_in(
    http: &mut HttpConnectionManager,
    came: &ExtensionConfig,
    origin: &Origin,
) -> Result<bool, String> {
    let mut asks = false;
    for filter in &mut http.http_filters {
        let discovery = filter.discovery.as_ref();
        let from =
            discovery.filter(|from| from.source.origin == *origin && filter.name == came.name);
        if let Some(from) = from {
            let checked = from.check(&came.config);
            checked.map_err(|error| format!("typed_config: {error}"))?;
            filter.config = came.config.clone();
            asks = true;
        }
    }
    Ok(asks)
}

/// Where the connections or requests of a chain are logged.
fn access_log(network: &Network) -> &[AccessLog] {
    match network {
        Network::Http(manager) => &manager.access_log,
        Network::Tcp(proxy) => &proxy.access_log,
    }
}

fn check_context(model: &Model, contexts: &Contexts, cluster: &Cluster) -> Result<(), String> {
    let named = |error| format!("cluster '{}': {error}", cluster.name);
    exists(model, cluster.eds.as_ref().map(|eds| &eds.source)).map_err(named)?;
    let sockets = cluster.sockets().flatten();
    let secrets = sockets.flat_map(|tls| tls.common.secrets());
    check_secrets(model, secrets).map_err(named)?;
    check_own_secrets(cluster).map_err(named)?;
    contexts
        .client(cluster, &|config| model.secret(config))
        .map(drop)
}

/// EDS has no names to resolve.
fn check_ips(assignment: &ClusterLoadAssignment) -> Result<(), String> {
    let mut hosts = assignment
        .endpoints
        .iter()
        .map(|endpoint| &endpoint.address.host);
    match hosts.find(|host| host.parse::<IpAddr>().is_err()) {
        Some(host) => Err(format!("malformed IP address: {host}")),
        None => Ok(()),
    }
}

fn none(errors: &[String]) -> Result<(), String> {
    if errors.is_empty() {
        Ok(())
    } else {
        Err(errors.join("\n"))
    }
}
