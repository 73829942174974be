//! Clusters: configured by name, their endpoints taken from the fleet, one chosen by the cluster's policy.

mod counts;
mod hash_key;
mod leg;
mod load;
mod original;

use crate::{
    canary::{Canaries, Watched},
    dns::{self, Names},
    fleet::{Fleet, Way},
    health::{Checked, Checks},
    lb::Balancer,
    ledger::{Ledger, Ledgers},
    metrics::ClusterStats,
    outlier::Detector,
};
use ahash::{AHashMap, AHashSet};
use arc_swap::ArcSwap;
use hash_key::{hash_key, hash_key_at, name_of};
use http::{HeaderName, HeaderValue};
use leg::Leg;
use load::Loads;
use original::Originals;
use outrigger_filters::{
    breakers::{Breakers, Kind},
    endpoints::{ClusterView, Endpoint, Endpoints, Host, Level, Reservation, Secured, Via, Want},
    error::Error,
};
use outrigger_xds::{
    report::EngineId,
    resource::{
        cluster::{Cluster, Discovery, OriginalDst, UpstreamProtocol},
        endpoint::{Address, Duty, LbEndpoint, METADATA_NAMESPACE},
        health_check::Checker,
    },
};
use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};
use tokio::sync::watch;

/// All clusters.
pub struct Clusters {
    entries: ArcSwap<AHashMap<Arc<str>, Arc<Entry>>>,
    fleet: Arc<Fleet>,
    ledgers: Arc<Ledgers>,
    /// Held while views are built: one made of clusters that are being replaced would bring back what they named.
    building: Mutex<()>,
    checks: Checks,
    canaries: Canaries,
    names: Arc<Names>,
    loads: Loads,
}

/// How the endpoints of clusters are secured, by cluster: as [`Cluster::sockets`] orders them; none is plain text.
pub type Contexts = HashMap<String, Vec<Option<Secured>>>;

struct Entry {
    config: Cluster,
    sockets: Vec<Option<Secured>>,
    view: ArcSwap<ClusterView>,
    /// Accounts of the engines beside us, by index-free lookup at `reserve`.
    ledgers: ArcSwap<AHashMap<EngineId, Arc<Ledger>>>,
    balancer: Balancer,
    stats: Arc<ClusterStats>,
    detector: Option<Arc<Detector>>,
    breakers: Arc<Breakers>,
    /// Whether it ever got a request.
    used: Arc<AtomicBool>,
    /// Of type `ORIGINAL_DST`.
    originals: Option<Originals>,
    /// Since when there is a cluster of this name.
    since: Instant,
}

impl Entry {
    /// Its view, with endpoints that requests made.
    fn shown(&self) -> Arc<ClusterView> {
        let view = self.view.load_full();
        let Some(originals) = &self.originals else {
            return view;
        };
        Arc::new(ClusterView {
            endpoints: originals.endpoints(),
            ..ClusterView::clone(&view)
        })
    }

    /// What is done now and then, for as long as this configuration of the cluster is in use.
    fn watch(self: &Arc<Self>) {
        if self.detector.is_some() {
            tokio::spawn(look(Arc::downgrade(self)));
        }
        if self.originals.is_some() {
            tokio::spawn(original::clean_up(Arc::downgrade(self)));
        }
    }
}

fn originals(cluster: &Cluster, previous: Option<&Arc<Entry>>) -> Option<Originals> {
    let previous = previous.and_then(|entry| entry.originals.as_ref());
    match &cluster.discovery {
        Discovery::OriginalDst(config) => {
            Some(Originals::new(config, &cluster.connection, previous))
        }
        _ => None,
    }
}

fn original_dst(cluster: &Cluster) -> Option<Arc<OriginalDst>> {
    match &cluster.discovery {
        Discovery::OriginalDst(config) => Some(Arc::new(config.clone())),
        _ => None,
    }
}

/// The name an endpoint of a configured cluster has in the fleet.
#[must_use]
pub fn engine_id(endpoint: &LbEndpoint) -> EngineId {
    let named = endpoint
        .metadata
        .get(METADATA_NAMESPACE)
        .and_then(|ours| ours.get("id")?.as_str());
    named.map_or_else(
        || EngineId::from(endpoint.address.to_string().as_str()),
        EngineId::from,
    )
}

impl Clusters {
    /// No clusters yet.
    #[must_use]
    pub fn new(fleet: Arc<Fleet>, ledgers: Arc<Ledgers>) -> Arc<Self> {
        Arc::new(Self {
            entries: ArcSwap::default(),
            fleet,
            ledgers,
            building: Mutex::default(),
            checks: Checks::default(),
            canaries: Canaries::default(),
            names: Names::new(dns::system()),
            loads: Loads::default(),
        })
    }

    /// What engines want to see of those who ask them.
    pub fn authorize(&self, bearer: Option<HeaderValue>) {
        self.canaries.authorize(bearer);
    }

    /// Moves when names of endpoints mean something else; views are rebuilt then.
    #[must_use]
    pub fn watch_names(&self) -> watch::Receiver<u64> {
        self.names.watch()
    }

    /// Takes a new set of clusters; endpoints that stay keep everything that is live about them.
    pub fn configure(&self, clusters: &[Cluster], contexts: &Contexts) {
        let building = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.entries.load_full();
        self.names.configure(clusters);
        let entries = clusters.iter().map(|cluster| {
            let previous = before.get(cluster.name.as_str());
            let sockets = contexts.get(&cluster.name).map_or(&[][..], Vec::as_slice);
            let same = |entry: &&Arc<Entry>| entry.config == *cluster && entry.sockets == *sockets;
            if let Some(same) = previous.filter(same) {
                return (Arc::from(cluster.name.as_str()), same.clone());
            }
            let balancer = Balancer::new(cluster, previous.map(|entry| &entry.balancer));
            let breakers = previous.map_or_else(
                || {
                    Arc::new(Breakers::new(
                        cluster.name.as_str().into(),
                        &cluster.circuit_breakers,
                    ))
                },
                |entry| entry.breakers.clone(),
            );
            breakers.set(&cluster.circuit_breakers);
            let view = self.view_of(cluster, sockets, &balancer, &breakers);
            let stats = ClusterStats::new(&cluster.name);
            let before = previous.and_then(|entry| entry.detector.as_deref());
            let detector = cluster
                .outlier_detection
                .as_ref()
                .map(|config| Arc::new(Detector::new(config, &cluster.name, before)));
            for endpoint in view.endpoints.iter().filter(|_| detector.is_none()) {
                endpoint.host.set(Host::FAILED_OUTLIER_CHECK, false);
            }
            if let Some(detector) = &detector {
                detector.members(&view.endpoints);
            }
            let ledgers = self.ledgers_of(&view);
            let entry = Entry {
                config: cluster.clone(),
                sockets: sockets.to_vec(),
                view: ArcSwap::from_pointee(view),
                ledgers: ArcSwap::from_pointee(ledgers),
                balancer,
                breakers,
                detector,
                used: previous.map_or_else(Default::default, |entry| entry.used.clone()),
                stats,
                originals: originals(cluster, previous),
                since: previous.map_or_else(Instant::now, |entry| entry.since),
            };
            let entry = Arc::new(entry);
            entry.watch();
            (Arc::from(cluster.name.as_str()), entry)
        });
        self.entries.store(Arc::new(entries.collect()));
        self.renew_originals(&before);
        self.depart(&before);
        self.forget_unnamed();
        self.check();
        drop(building);
        self.count_members();
    }

    /// Endpoints that requests made stay when their cluster is another than `before`.
    fn renew_originals(&self, before: &AHashMap<Arc<str>, Arc<Entry>>) {
        for (name, entry) in self.entries.load().iter() {
            let is_same = |before: &Arc<Entry>| Arc::ptr_eq(before, entry);
            let Some(originals) = &entry.originals else {
                continue;
            };
            if before.get(name).is_some_and(is_same) {
                continue;
            }
            originals.renew(entry);
            let endpoints = originals.endpoints();
            match &entry.detector {
                Some(detector) => detector.members(&endpoints),
                None => endpoints.iter().for_each(|endpoint| {
                    endpoint.host.set(Host::FAILED_OUTLIER_CHECK, false);
                }),
            }
        }
    }

    /// Builds all views anew after the fleet's membership changed.
    pub fn refresh(&self) {
        let building = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in self.entries.load().values() {
            let sockets = &entry.sockets;
            let view = self.view_of(&entry.config, sockets, &entry.balancer, &entry.breakers);
            entry.ledgers.store(Arc::new(self.ledgers_of(&view)));
            let before = entry.view.swap(Arc::new(view));
            self.depart_from(entry, &before.endpoints);
            if let Some(detector) = &entry.detector {
                detector.members(&entry.shown().endpoints);
            }
            entry.stats.membership_change.increment(1);
        }
        self.forget_unnamed();
        self.check();
        drop(building);
        self.count_members();
    }

    /// What no view has any more, be it that a name means other addresses now, is not known any more.
    fn forget_unnamed(&self) {
        let entries = self.entries.load();
        let views = entries.values().map(|entry| entry.view.load_full());
        let mut named = AHashSet::new();
        for view in views {
            let configured = view.endpoints.iter();
            let configured = configured.filter(|endpoint| endpoint.via != Via::Peer);
            named.extend(configured.map(|endpoint| endpoint.id.clone()));
        }
        self.fleet.retain_configured(&named);
    }

    /// Health checks follow the views.
    fn check(&self) {
        let entries = self.entries.load();
        let views: Vec<_> = entries
            .values()
            .map(|entry| (entry, entry.view.load_full()))
            .collect();
        self.checks.configure(views.iter().map(|(entry, view)| {
            Checked {
                config: &entry.config,
                view,
                used: &entry.used,
                ejections: entry
                    .detector
                    .as_ref()
                    .and_then(|detector| detector.ejections()),
            }
        }));
        let watched = views.iter().flat_map(|(entry, view)| {
            let check = entry.config.health_check.as_ref();
            let check = check.filter(|check| matches!(check.checker, Checker::Canary(_)));
            let local = view
                .endpoints
                .iter()
                .filter(|known| known.via == Via::Local);
            local.filter_map(move |endpoint| {
                Some(Watched {
                    check: check?,
                    endpoint,
                    ledger: self.ledgers.open(&endpoint.id),
                })
            })
        });
        self.canaries.configure(&self.fleet, watched);
    }

    /// Brings the membership gauges up to date. Called now and then, since health changes without a change of members.
    pub fn count_members(&self) {
        for entry in self.entries.load().values() {
            // First, so that one which goes meanwhile is not counted twice.
            let originals = entry.originals.as_ref();
            let departed = originals.map(Originals::departed).unwrap_or_default();
            let view = entry.shown();
            let healthy = view
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.level() == Level::Healthy)
                .count();
            let degraded = view
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.level() == Level::Degraded)
                .count();
            entry
                .stats
                .membership_total
                .set(view.endpoints.len() as f64);
            entry.stats.membership_healthy.set(healthy as f64);
            entry.stats.membership_degraded.set(degraded as f64);
            counts::connections(&entry.stats, &view, departed);
            counts::breakers(&entry.stats, &entry.breakers);
            if entry.config.health_check.is_some() {
                counts::checked(&view);
            }
        }
    }

    /// All views, ordered by name, for the admin.
    #[must_use]
    pub fn views(&self) -> Vec<Arc<ClusterView>> {
        let mut views: Vec<_> = self
            .entries
            .load()
            .values()
            .map(|entry| entry.shown())
            .collect();
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views
    }

    fn view_of(
        &self,
        cluster: &Cluster,
        sockets: &[Option<Secured>],
        balancer: &Balancer,
        breakers: &Arc<Breakers>,
    ) -> ClusterView {
        let name: Arc<str> = cluster.name.as_str().into();
        let connection = Arc::new(cluster.connection.clone());
        let mut endpoints = Vec::new();
        let mut silent_peer = false;
        for configured in &cluster.load_assignment.endpoints {
            let duty = configured.duty();
            let hash_key = hash_key(cluster, configured);
            let tls = sockets.get(cluster.socket_of(configured));
            let locality = cluster.load_assignment.locality(configured);
            let mut way = Way {
                address: &configured.address,
                hostname: name_of(configured),
                hash_key: &hash_key,
                breakers,
                connection: &connection,
                via: Via::Plain,
                protocol: cluster.protocol,
                tls: tls.and_then(Option::as_ref),
                weight: configured.load_balancing_weight,
                health_status: configured.health_status,
                priority: locality.priority,
                locality: configured.locality,
                place: &locality.place,
                cluster: &name,
            };
            if duty == Duty::Peer {
                way.via = Via::Peer;
                way.protocol = UpstreamProtocol::Http2;
                // A peer that is no good is none of its engines' fault, but there is no other way to them.
                let behind = self.fleet.behind(&way);
                silent_peer |= behind.is_empty() && !self.fleet.has_told(way.address);
                endpoints.extend(behind);
                continue;
            }
            if duty == Duty::Engine {
                way.via = Via::Local;
                // On this machine: the transport socket is for peers.
                way.tls = None;
            }
            let Some(found) = self.looked_up(cluster, configured) else {
                endpoints.push(self.fleet.configure(&engine_id(configured), &way));
                continue;
            };
            let each = found.iter();
            endpoints.extend(each.map(|ip| self.at(*ip, way, cluster, configured)));
        }
        balancer.rebuild(&endpoints);
        let headers = cluster.balancing.override_host.iter();
        ClusterView {
            override_host: headers
                .filter_map(|name| HeaderName::try_from(name.as_str()).ok())
                .collect(),
            breakers: breakers.clone(),
            lb_policy: cluster.lb_policy,
            connect_timeout: cluster.connect_timeout,
            even: balancer.is_even(&endpoints),
            silent_peer,
            original_dst: original_dst(cluster),
            plain: !endpoints.is_empty() && endpoints.iter().all(|it| it.via == Via::Plain),
            endpoints,
            name,
        }
    }

    /// The endpoint at one of the addresses that a name means.
    fn at(
        &self,
        ip: IpAddr,
        way: Way<'_>,
        cluster: &Cluster,
        configured: &LbEndpoint,
    ) -> Arc<Endpoint> {
        let address = Address {
            host: ip.to_string(),
            port: configured.address.port,
        };
        let way = Way {
            address: &address,
            hash_key: &hash_key_at(cluster, configured, &address),
            ..way
        };
        let id = EngineId::from(address.to_string().as_str());
        self.fleet.configure(&id, &way)
    }

    /// The addresses that a name means, each an endpoint; `None` where the address itself is the endpoint.
    fn looked_up(&self, cluster: &Cluster, endpoint: &LbEndpoint) -> Option<Arc<[IpAddr]>> {
        let Discovery::Dns(config) = &cluster.discovery else {
            return None;
        };
        if !endpoint.is_looked_up() {
            return None;
        }
        let found = self
            .names
            .addresses(&cluster.name, &endpoint.address.host)?;
        Some(if config.logical {
            found.iter().take(1).copied().collect()
        } else {
            found
        })
    }

    fn ledgers_of(&self, view: &ClusterView) -> AHashMap<EngineId, Arc<Ledger>> {
        let local = view
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.via == Via::Local);
        local
            .map(|endpoint| (endpoint.id.clone(), self.ledgers.open(&endpoint.id)))
            .collect()
    }

    fn entry(&self, cluster: &str) -> Option<Arc<Entry>> {
        self.entries.load().get(cluster).cloned()
    }
}

impl Endpoints for Clusters {
    fn view(&self, cluster: &str) -> Option<Arc<ClusterView>> {
        Some(self.entries.load().get(cluster)?.view.load_full())
    }

    fn choose(
        &self,
        view: &ClusterView,
        candidates: &[Arc<Endpoint>],
        hash: Option<u64>,
    ) -> Option<usize> {
        if candidates.len() <= 1 && view.even {
            return (candidates.len() == 1).then_some(0);
        }
        let entries = self.entries.load();
        let entry = entries.get(&view.name)?;
        let chosen = entry.balancer.choose(view, candidates, hash)?;
        if chosen.panic {
            entry.stats.lb_healthy_panic.increment(1);
        }
        Some(chosen.index)
    }

    fn original(&self, view: &ClusterView, address: SocketAddr) -> Option<Arc<Endpoint>> {
        let entry = self.entry(&view.name)?;
        entry.originals.as_ref()?.at(address, &entry)
    }

    fn reserve(
        &self,
        view: &ClusterView,
        endpoint: &Arc<Endpoint>,
        want: &Want,
    ) -> Result<Box<dyn Reservation>, Error> {
        let entry = self
            .entry(&view.name)
            .ok_or_else(Error::no_healthy_upstream)?;
        let Some(held) = entry.breakers.try_hold(want.priority, Kind::Request) else {
            entry.stats.upstream_rq_pending_overflow.increment(1);
            entry.breakers.dropped.fetch_add(1, Relaxed);
            return Err(Error::overflow());
        };
        if !entry.used.load(Relaxed) {
            entry.used.store(true, Relaxed);
        }
        let entered = entry
            .ledgers
            .load()
            .get(&endpoint.id)
            .map(|ledger| ledger.enter(want));
        endpoint.stats.active.fetch_add(1, Relaxed);
        endpoint.host.tally.begin();
        let prefill = want.prompt_tokens.saturating_sub(want.hit_tokens);
        endpoint.stats.prefill_tokens.fetch_add(prefill, Relaxed);
        entry.stats.upstream_rq_total.increment(1);
        entry.stats.upstream_rq_active.increment(1.0);
        Ok(Box::new(Leg {
            endpoint: endpoint.clone(),
            stats: entry.stats.clone(),
            detector: entry.detector.clone(),
            weights: entry.balancer.weights(),
            judged: false,
            entered,
            prefill,
            begun: Instant::now(),
            status: None,
            reported_failure: false,
            ended: None,
            given_up: want.given_up.clone(),
            _held: held,
        }))
    }
}

/// Outlier detection's looks, for as long as this configuration of the cluster is in use.
async fn look(entry: Weak<Entry>) {
    loop {
        let wait = match entry.upgrade().as_deref() {
            Some(Entry {
                detector: Some(detector),
                ..
            }) => detector.wait(),
            _ => return,
        };
        tokio::time::sleep(wait).await;
        if let Some(entry) = entry.upgrade()
            && let Some(detector) = &entry.detector
        {
            detector.look(&entry.shown().endpoints);
        }
    }
}
