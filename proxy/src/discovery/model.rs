//! What is configured: what was written, what came since, and what of it is complete enough to be used.
//!
//! It does no IO and knows no source: a resource is here because somebody brought it. A cluster waits for its endpoints
//! and secrets, a listener for its routes, secrets and filters, for as long as its source says.

use outrigger_filters::runtime::Layer;
use outrigger_xds::{
    accepted::Accepted,
    resource::{
        bootstrap::Bootstrap,
        cluster::Cluster,
        config_source::{ConfigSource, Origin},
        endpoint::ClusterLoadAssignment,
        extension::ExtensionConfig,
        listener::{HttpConnectionManager, Listener},
        route::RouteConfiguration,
        runtime::{LayerContent, Rtds, Runtime, RuntimeLayer},
        secret::{Secret, SecretConfig},
        tls::CommonTls,
    },
    subscription::WILDCARD,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

pub(super) use outrigger_xds::subscription::Kind;

/// Something that is to come from elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Subscription {
    /// What.
    pub(super) kind: Kind,
    /// From where.
    pub(super) origin: Origin,
    /// Which; empty is all.
    pub(super) name: String,
}

impl Subscription {
    /// Its name to a control plane.
    pub(super) fn wanted(&self) -> String {
        match &*self.name {
            "" => WILDCARD.to_owned(),
            name => name.to_owned(),
        }
    }
}

/// Who waits for it, and how long.
#[derive(Debug, Clone)]
pub(super) struct Wait {
    since: Instant,
    timeout: Duration,
    /// In whose name it is counted: clusters (EDS), `stat_prefix`es (RDS).
    pub(super) owners: BTreeSet<String>,
    /// The wait is over and was counted.
    pub(super) expired: bool,
}

/// Resources of one type that are asked for by name.
pub(super) type Named<R> = BTreeMap<Origin, Accepted<R>>;

/// Everything that is configured.
#[derive(Default)]
pub(super) struct Model {
    /// As written.
    pub(super) bootstrap: Bootstrap,
    /// LDS.
    pub(super) listeners: Accepted<Listener>,
    /// CDS.
    pub(super) clusters: Accepted<Cluster>,
    /// RDS.
    pub(super) tables: Named<RouteConfiguration>,
    /// EDS.
    pub(super) assignments: Named<ClusterLoadAssignment>,
    /// SDS.
    pub(super) secrets: Named<Secret>,
    /// RTDS.
    pub(super) runtimes: Named<Runtime>,
    /// ECDS.
    pub(super) extensions: Named<ExtensionConfig>,
    /// What is asked for.
    pub(super) waits: BTreeMap<Subscription, Wait>,
    /// The first layers of the runtime are there, or given up: all else may come.
    pub(super) has_runtimes: bool,
    /// The first clusters are complete: listeners may come.
    pub(super) has_clusters: bool,
}

/// What the TLS contexts of its chains say.
pub(super) fn tls(listener: &Listener) -> impl Iterator<Item = &CommonTls> {
    let chains = listener.filter_chains.iter();
    let chains = chains.chain(&listener.default_filter_chain);
    chains.filter_map(|chain| chain.tls.as_ref().map(|tls| &tls.common))
}

/// The secrets of a cluster that come from elsewhere.
fn secrets_of(cluster: &Cluster) -> impl Iterator<Item = (&ConfigSource, &str)> {
    let sockets = cluster.sockets().flatten();
    let secrets = sockets.flat_map(|tls| tls.common.secrets());
    secrets.filter_map(|secret| Some((secret.source.as_ref()?, secret.name.as_str())))
}

fn find<'a, R: PartialEq>(
    named: &'a Named<R>,
    source: &ConfigSource,
    name: &str,
) -> Option<&'a Arc<R>> {
    named.get(&source.origin)?.get(name)
}

/// Keeps only some of what came from one source.
fn keep<R: PartialEq>(named: &mut Named<R>, origin: &Origin, wanted: impl Fn(&str) -> bool) {
    if let Some(accepted) = named.get_mut(origin) {
        accepted.retain(wanted);
    }
}

impl Model {
    /// All listeners as they were written or came.
    pub(super) fn all_listeners(&self) -> impl Iterator<Item = &Listener> {
        let dynamic = self.listeners.good().map(|good| &*good.resource);
        self.bootstrap.listeners.iter().chain(dynamic)
    }

    /// All clusters as they were written or came.
    pub(super) fn all_clusters(&self) -> impl Iterator<Item = &Cluster> {
        let dynamic = self.clusters.good().map(|good| &*good.resource);
        self.bootstrap.clusters.iter().chain(dynamic)
    }

    /// Asks for what is named now, and for nothing else.
    pub(super) fn subscribe(&mut self, now: Instant) {
        self.has_runtimes |= self.are_runtimes_there();
        let mut waits: BTreeMap<Subscription, Wait> = BTreeMap::new();
        let mut ask = |kind, source: &ConfigSource, name: &str, owner: &str| {
            let subscription = Subscription {
                kind,
                origin: source.origin.clone(),
                name: name.to_owned(),
            };
            let known = self.waits.get(&subscription);
            let wait = waits.entry(subscription).or_insert_with(|| Wait {
                since: known.map_or(now, |wait| wait.since),
                timeout: source.initial_fetch_timeout,
                owners: BTreeSet::new(),
                expired: known.is_some_and(|wait| wait.expired),
            });
            wait.owners.insert(owner.to_owned());
        };
        for rtds in self.bootstrap.runtime.iter().filter_map(RuntimeLayer::rtds) {
            ask(Kind::Runtimes, &rtds.source, &rtds.name, "");
        }
        if !self.has_runtimes {
            // Who brings them may have to be known first.
            for (source, name) in self.bootstrap.clusters.iter().flat_map(secrets_of) {
                ask(Kind::Secrets, source, name, name);
            }
            self.waits = waits;
            return self.forget();
        }
        let may_listen = self.has_clusters || !self.listens_after_clusters();
        if let Some(source) = self.bootstrap.lds.as_ref().filter(|_| may_listen) {
            ask(Kind::Listeners, source, "", "");
        }
        if let Some(source) = &self.bootstrap.cds {
            ask(Kind::Clusters, source, "", "");
        }
        for cluster in self.all_clusters() {
            if let Some(eds) = &cluster.eds {
                ask(
                    Kind::Endpoints,
                    &eds.source,
                    cluster.eds_service_name(),
                    &cluster.name,
                );
            }
            for (source, name) in secrets_of(cluster) {
                ask(Kind::Secrets, source, name, name);
            }
        }
        for listener in self.all_listeners() {
            for http in listener.http_managers() {
                if let Some(rds) = &http.rds {
                    ask(Kind::Routes, &rds.source, &rds.name, &http.stat_prefix);
                }
                for filter in &http.http_filters {
                    if let Some(discovery) = &filter.discovery {
                        let name = &filter.name;
                        ask(Kind::Extensions, &discovery.source, name, name);
                    }
                }
            }
            for secret in tls(listener).flat_map(CommonTls::secrets) {
                if let Some(source) = &secret.source {
                    ask(Kind::Secrets, source, &secret.name, &secret.name);
                }
            }
        }
        self.waits = waits;
        self.forget();
    }

    /// Whether all layers of the runtime came, or are waited for no longer.
    pub(super) fn are_runtimes_there(&self) -> bool {
        let mut layers = self.bootstrap.runtime.iter().filter_map(RuntimeLayer::rtds);
        layers.all(|rtds| {
            self.runtime(rtds).is_some()
                || self.is_given_up(Kind::Runtimes, &rtds.source, &rtds.name)
        })
    }

    fn runtime(&self, rtds: &Rtds) -> Option<&Arc<Runtime>> {
        find(&self.runtimes, &rtds.source, &rtds.name)
    }

    /// All layers of the runtime as they are now; one that is not there is empty.
    pub(super) fn layers(&self) -> Vec<Layer> {
        let written = self.bootstrap.runtime.iter();
        let layer = |layer: &RuntimeLayer| Layer {
            name: layer.name.clone(),
            values: match &layer.content {
                LayerContent::Static(values) => Some(values.by_key.clone()),
                LayerContent::Admin => None,
                LayerContent::Rtds(rtds) => {
                    let came = self.runtime(rtds);
                    Some(came.map_or_else(Default::default, |came| came.values.by_key.clone()))
                }
            },
        };
        let layers: Vec<Layer> = written.map(layer).collect();
        if layers.is_empty() {
            vec![layer(&RuntimeLayer::admin())]
        } else {
            layers
        }
    }

    /// Whether control planes bring both clusters and listeners: then clusters come first, or listeners would name
    /// such as are not there yet.
    fn listens_after_clusters(&self) -> bool {
        let [lds, cds] = [&self.bootstrap.lds, &self.bootstrap.cds];
        let is_told = |source: &ConfigSource| !matches!(source.origin, Origin::Path(_));
        lds.as_ref().is_some_and(is_told) && cds.as_ref().is_some_and(is_told)
    }

    /// All that is good of what one source brought.
    pub(super) fn good_of(&self, origin: &Origin) -> Vec<(Kind, String)> {
        fn good<R: PartialEq>(kind: Kind, known: Option<&Accepted<R>>) -> Vec<(Kind, String)> {
            let states = known.into_iter().flat_map(Accepted::states);
            let good = states.filter(|(_, state)| state.good.is_some());
            good.map(|(name, _)| (kind, name.to_owned())).collect()
        }
        let from = |source: &Option<ConfigSource>| {
            let source = source.as_ref();
            source.is_some_and(|source| source.origin == *origin)
        };
        let clusters = from(&self.bootstrap.cds).then_some(&self.clusters);
        let listeners = from(&self.bootstrap.lds).then_some(&self.listeners);
        [
            good(Kind::Runtimes, self.runtimes.get(origin)),
            good(Kind::Clusters, clusters),
            good(Kind::Endpoints, self.assignments.get(origin)),
            good(Kind::Listeners, listeners),
            good(Kind::Routes, self.tables.get(origin)),
            good(Kind::Secrets, self.secrets.get(origin)),
            good(Kind::Extensions, self.extensions.get(origin)),
        ]
        .concat()
    }

    /// Where a type comes from that is not asked for by name, if it comes from anywhere.
    pub(super) fn source_of_all(&self, kind: Kind) -> Option<&ConfigSource> {
        match kind {
            Kind::Listeners => self.bootstrap.lds.as_ref(),
            Kind::Clusters => self.bootstrap.cds.as_ref(),
            Kind::Runtimes | Kind::Endpoints | Kind::Routes | Kind::Secrets | Kind::Extensions => {
                None
            }
        }
    }

    /// The same; of what came earlier and has no source any more, as if it were from `ads`.
    pub(super) fn origin_of_all(&self, kind: Kind) -> &Origin {
        let source = self.source_of_all(kind);
        source.map_or(&Origin::Ads, |source| &source.origin)
    }

    /// Whether all that a control plane has of a type came, or is waited for no longer.
    pub(super) fn has_heard(&self, kind: Kind) -> bool {
        let source = self.source_of_all(kind);
        let Some(source) = source.filter(|from| !matches!(from.origin, Origin::Path(_))) else {
            return true;
        };
        let asked = Subscription {
            kind,
            origin: source.origin.clone(),
            name: String::new(),
        };
        self.is_there(&asked) || self.is_given_up(kind, source, "")
    }

    /// Whether it is still to come from a control plane, and something waits for it.
    pub(super) fn is_waited_for(&self, asked: &Subscription) -> bool {
        let wait = self.waits.get(asked);
        wait.is_some_and(|wait| !wait.expired) && !self.is_there(asked)
    }

    /// What may still come from a control plane is waited for no longer.
    pub(super) fn stop_waiting(&mut self, kind: Kind, origin: &Origin, name: &str) {
        let asked = Subscription {
            kind,
            origin: origin.clone(),
            name: name.to_owned(),
        };
        if let Some(wait) = self.waits.get_mut(&asked) {
            wait.expired = true;
        }
    }

    /// A control plane does not have it, or has it no more: nobody waits for it.
    pub(super) fn give_up(&mut self, kind: Kind, origin: &Origin, name: &str) {
        self.stop_waiting(kind, origin, name);
        let others = |other: &str| other != name;
        match kind {
            Kind::Routes => keep(&mut self.tables, origin, others),
            Kind::Endpoints => keep(&mut self.assignments, origin, others),
            Kind::Secrets => keep(&mut self.secrets, origin, others),
            Kind::Runtimes => keep(&mut self.runtimes, origin, others),
            Kind::Extensions => keep(&mut self.extensions, origin, others),
            Kind::Clusters | Kind::Listeners => {}
        }
    }

    /// Resources that nobody asks for any more.
    fn forget(&mut self) {
        fn retain<R: PartialEq>(
            named: &mut Named<R>,
            kind: Kind,
            waits: &BTreeMap<Subscription, Wait>,
        ) {
            named.retain(|origin, accepted| {
                accepted.retain(|name| {
                    waits.contains_key(&Subscription {
                        kind,
                        origin: origin.clone(),
                        name: name.to_owned(),
                    })
                });
                waits
                    .keys()
                    .any(|asked| asked.kind == kind && asked.origin == *origin)
            });
        }
        retain(&mut self.tables, Kind::Routes, &self.waits);
        retain(&mut self.assignments, Kind::Endpoints, &self.waits);
        retain(&mut self.secrets, Kind::Secrets, &self.waits);
        retain(&mut self.runtimes, Kind::Runtimes, &self.waits);
        retain(&mut self.extensions, Kind::Extensions, &self.waits);
    }

    /// Whether something that has not come is waited for no longer.
    fn is_given_up(&self, kind: Kind, source: &ConfigSource, name: &str) -> bool {
        let wait = self.waits.get(&Subscription {
            kind,
            origin: source.origin.clone(),
            name: name.to_owned(),
        });
        wait.is_some_and(|wait| wait.expired)
    }

    /// Whether it has come.
    pub(super) fn is_there(&self, subscription: &Subscription) -> bool {
        fn has<R: PartialEq>(named: &Named<R>, asked: &Subscription) -> bool {
            named
                .get(&asked.origin)
                .is_some_and(|accepted| accepted.get(&asked.name).is_some())
        }
        match subscription.kind {
            Kind::Listeners => self.listeners.is_answered(),
            Kind::Clusters => self.clusters.is_answered(),
            Kind::Routes => has(&self.tables, subscription),
            Kind::Endpoints => has(&self.assignments, subscription),
            Kind::Secrets => has(&self.secrets, subscription),
            Kind::Runtimes => has(&self.runtimes, subscription),
            Kind::Extensions => has(&self.extensions, subscription),
        }
    }

    /// Gives up on what has not come in its time; gives what that is.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<Subscription> {
        let late: Vec<Subscription> = self
            .waits
            .iter()
            .filter(|(subscription, wait)| {
                !wait.expired
                    && !wait.timeout.is_zero()
                    && now.saturating_duration_since(wait.since) >= wait.timeout
                    && !self.is_there(subscription)
            })
            .map(|(subscription, _)| subscription.clone())
            .collect();
        for subscription in &late {
            if let Some(wait) = self.waits.get_mut(subscription) {
                wait.expired = true;
            }
        }
        late
    }

    /// A secret, if it is there.
    #[must_use]
    pub(super) fn secret(&self, config: &SecretConfig) -> Option<Arc<Secret>> {
        match &config.source {
            Some(source) => find(&self.secrets, source, &config.name).cloned(),
            None => {
                let mut written = self.bootstrap.secrets.iter();
                let found = written.find(|secret| secret.name == config.name)?;
                Some(Arc::new(found.clone()))
            }
        }
    }

    /// Whether all secrets of a context are there, or given up.
    fn has_secrets(&self, tls: &CommonTls) -> bool {
        tls.secrets().all(|config| {
            self.secret(config).is_some()
                || config
                    .source
                    .as_ref()
                    .is_some_and(|source| self.is_given_up(Kind::Secrets, source, &config.name))
        })
    }

    /// A cluster with its endpoints; none while it waits.
    #[must_use]
    pub(super) fn complete_cluster(&self, cluster: &Cluster) -> Option<Cluster> {
        let mut complete = cluster.clone();
        if let Some(eds) = &cluster.eds {
            let name = cluster.eds_service_name();
            match find(&self.assignments, &eds.source, name) {
                Some(assignment) => complete.load_assignment = (**assignment).clone(),
                None if self.is_given_up(Kind::Endpoints, &eds.source, name) => {}
                None => return None,
            }
        }
        let mut sockets = cluster.sockets().flatten();
        sockets
            .all(|tls| self.has_secrets(&tls.common))
            .then_some(complete)
    }

    /// A listener with its routes and the configurations of its filters, as far as they are there; whether it waits for others.
    pub(super) fn filled_listener(&self, listener: &Listener) -> (Listener, bool) {
        let mut filled = listener.clone();
        let mut waits = false;
        for http in filled.http_managers_mut() {
            waits |= self.fill_filters(http);
            let Some(rds) = &http.rds else { continue };
            match find(&self.tables, &rds.source, &rds.name) {
                Some(table) => http.route_config = (**table).clone(),
                None => waits |= !self.is_given_up(Kind::Routes, &rds.source, &rds.name),
            }
        }
        (filled, waits)
    }

    /// What is not there, or is nothing that it may be, is as its default says. Whether one is waited for.
    pub(super) fn fill_filters(&self, http: &mut HttpConnectionManager) -> bool {
        let mut waits = false;
        for filter in &mut http.http_filters {
            let Some(discovery) = &filter.discovery else {
                continue;
            };
            let found = find(&self.extensions, &discovery.source, &filter.name);
            waits |= found.is_none()
                && !discovery.apply_default_config_without_warming
                && !self.is_given_up(Kind::Extensions, &discovery.source, &filter.name);
            let fits = found.filter(|found| discovery.check(&found.config).is_ok());
            filter.config = match fits {
                Some(found) => found.config.clone(),
                None => discovery.default_config.clone().unwrap_or_default(),
            };
        }
        waits
    }

    /// A listener with all that comes from elsewhere; none while it waits.
    #[must_use]
    pub(super) fn complete_listener(&self, listener: &Listener) -> Option<Listener> {
        let (complete, waits) = self.filled_listener(listener);
        let is_complete =
            self.has_runtimes && !waits && tls(listener).all(|tls| self.has_secrets(tls));
        is_complete.then_some(complete)
    }
}
