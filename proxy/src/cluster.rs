//! Clusters: configured by name, their endpoints taken from the fleet, one chosen by the cluster's policy.

use crate::{
    fleet::{Fleet, Way},
    health::{Checked, Checks},
    lb::Balancer,
    ledger::{Entered, Ledger, Ledgers},
    metrics::ClusterStats,
    outlier::Detector,
};
use ahash::AHashMap;
use arc_swap::ArcSwap;
use http::StatusCode;
use outrigger_filters::{
    endpoints::{
        ClusterView, Endpoint, EndpointStats, Endpoints, Host, Level, Reservation, Secured, Via,
        Want,
    },
    error::{Error, Flag, Origin, Retry},
};
use outrigger_xds::{
    report::EngineId,
    resource::{
        cluster::{Cluster, UpstreamProtocol},
        endpoint::{Duty, LbEndpoint, METADATA_NAMESPACE},
    },
};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

/// All clusters.
pub struct Clusters {
    entries: ArcSwap<AHashMap<Arc<str>, Arc<Entry>>>,
    fleet: Arc<Fleet>,
    ledgers: Arc<Ledgers>,
    /// Held while views are built: one made of clusters that are being replaced would bring back what they named.
    building: Mutex<()>,
    checks: Checks,
}

/// How the endpoints of clusters are secured, by cluster.
pub type Contexts = HashMap<String, Secured>;

struct Entry {
    config: Cluster,
    tls: Option<Secured>,
    view: ArcSwap<ClusterView>,
    /// Accounts of the engines beside us, by index-free lookup at `reserve`.
    ledgers: ArcSwap<AHashMap<EngineId, Arc<Ledger>>>,
    balancer: Balancer,
    stats: Arc<ClusterStats>,
    detector: Option<Arc<Detector>>,
    /// Whether it ever got a request.
    used: Arc<AtomicBool>,
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
        })
    }

    /// Takes a new set of clusters; endpoints that stay keep everything that is live about them.
    pub fn configure(&self, clusters: &[Cluster], contexts: &Contexts) {
        let building = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.entries.load_full();
        let entries = clusters.iter().map(|cluster| {
            let previous = before.get(cluster.name.as_str());
            let tls = contexts.get(&cluster.name);
            let same = |entry: &&Arc<Entry>| entry.config == *cluster && entry.tls.as_ref() == tls;
            if let Some(same) = previous.filter(same) {
                return (Arc::from(cluster.name.as_str()), same.clone());
            }
            let balancer = Balancer::new(cluster, previous.map(|entry| &entry.balancer));
            let view = self.view_of(cluster, tls, &balancer);
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
                tls: tls.cloned(),
                view: ArcSwap::from_pointee(view),
                ledgers: ArcSwap::from_pointee(ledgers),
                balancer,
                detector,
                used: previous.map_or_else(Default::default, |entry| entry.used.clone()),
                stats,
            };
            let entry = Arc::new(entry);
            if entry.detector.is_some() {
                tokio::spawn(look(Arc::downgrade(&entry)));
            }
            (Arc::from(cluster.name.as_str()), entry)
        });
        self.entries.store(Arc::new(entries.collect()));
        let named = clusters
            .iter()
            .flat_map(|cluster| &cluster.load_assignment.endpoints)
            .filter(|endpoint| endpoint.duty() != Duty::Peer)
            .map(engine_id);
        self.fleet.retain_configured(&named.collect());
        self.check();
        drop(building);
        self.count_members();
    }

    /// Builds all views anew after the fleet's membership changed.
    pub fn refresh(&self) {
        let building = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in self.entries.load().values() {
            let view = self.view_of(&entry.config, entry.tls.as_ref(), &entry.balancer);
            entry.ledgers.store(Arc::new(self.ledgers_of(&view)));
            if let Some(detector) = &entry.detector {
                detector.members(&view.endpoints);
            }
            entry.view.store(Arc::new(view));
            entry.stats.membership_change.increment(1);
        }
        self.check();
        drop(building);
        self.count_members();
    }

    /// Health checks follow the views.
    fn check(&self) {
        let entries = self.entries.load();
        let views: Vec<_> = entries
            .values()
            .map(|entry| (entry, entry.view.load_full()))
            .collect();
        self.checks
            .configure(views.iter().map(|(entry, view)| Checked {
                config: &entry.config,
                view,
                used: &entry.used,
            }));
    }

    /// Brings the membership gauges up to date. Called now and then, since health changes without a change of members.
    pub fn count_members(&self) {
        for entry in self.entries.load().values() {
            let view = entry.view.load();
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
            count_connections(&entry.stats, &view);
            if entry.config.health_check.is_some() {
                count_checked(&view);
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
            .map(|entry| entry.view.load_full())
            .collect();
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views
    }

    fn view_of(
        &self,
        cluster: &Cluster,
        tls: Option<&Secured>,
        balancer: &Balancer,
    ) -> ClusterView {
        let name: Arc<str> = cluster.name.as_str().into();
        let mut endpoints = Vec::new();
        for configured in &cluster.load_assignment.endpoints {
            let duty = configured.duty();
            let mut way = Way {
                address: &configured.address,
                via: Via::Plain,
                protocol: cluster.protocol,
                tls,
                weight: configured.load_balancing_weight,
                health_status: configured.health_status,
                priority: cluster.load_assignment.locality(configured).priority,
                locality: configured.locality,
                cluster: &name,
            };
            if duty == Duty::Peer {
                way.via = Via::Peer;
                way.protocol = UpstreamProtocol::Http2;
                // A peer that is no good is none of its engines' fault, but there is no other way to them.
                endpoints.extend(self.fleet.behind(&way));
                continue;
            }
            if duty == Duty::Engine {
                way.via = Via::Local;
                // On this machine: the transport socket is for peers.
                way.tls = None;
            }
            endpoints.push(self.fleet.configure(&engine_id(configured), &way));
        }
        ClusterView {
            lb_policy: cluster.lb_policy,
            connect_timeout: cluster.connect_timeout,
            even: balancer.is_even(&endpoints),
            endpoints,
            name,
        }
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

    fn choose(&self, view: &ClusterView, candidates: &[Arc<Endpoint>]) -> Option<usize> {
        if candidates.len() <= 1 && view.even {
            return (candidates.len() == 1).then_some(0);
        }
        let entries = self.entries.load();
        let entry = entries.get(&view.name)?;
        let chosen = entry.balancer.choose(view, candidates)?;
        if chosen.panic {
            entry.stats.lb_healthy_panic.increment(1);
        }
        Some(chosen.index)
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
        let active = endpoint.stats.active.load(Relaxed);
        if active >= u64::from(entry.config.circuit_breakers.max_requests) {
            entry.stats.upstream_rq_pending_overflow.increment(1);
            return Err(overflow());
        }
        if !entry.used.load(Relaxed) {
            entry.used.store(true, Relaxed);
        }
        let entered = entry
            .ledgers
            .load()
            .get(&endpoint.id)
            .map(|ledger| ledger.enter(want));
        endpoint.stats.active.fetch_add(1, Relaxed);
        let prefill = want.prompt_tokens.saturating_sub(want.hit_tokens);
        endpoint.stats.prefill_tokens.fetch_add(prefill, Relaxed);
        entry.stats.upstream_rq_total.increment(1);
        entry.stats.upstream_rq_active.increment(1.0);
        Ok(Box::new(Leg {
            endpoint: endpoint.clone(),
            stats: entry.stats.clone(),
            detector: entry.detector.clone(),
            judged: false,
            entered,
            prefill,
            begun: Instant::now(),
            status: None,
            finished: false,
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
            detector.look(&entry.view.load().endpoints);
        }
    }
}

/// Endpoints by what health checks found.
fn count_checked(view: &ClusterView) {
    let passed = || {
        let endpoints = view.endpoints.iter();
        endpoints.filter(|endpoint| !endpoint.host.has(Host::FAILED_ACTIVE_HC))
    };
    let degraded = passed().filter(|endpoint| endpoint.host.has(Host::DEGRADED_ACTIVE_HC));
    for (name, count) in [
        ("envoy_cluster_health_check_healthy", passed().count()),
        ("envoy_cluster_health_check_degraded", degraded.count()),
    ] {
        metrics::gauge!(name, "envoy_cluster_name" => view.name.to_string()).set(count as f64);
    }
}

/// Connections belong to endpoints, which clusters may share.
fn count_connections(stats: &ClusterStats, view: &ClusterView) {
    let sum = |of: fn(&EndpointStats) -> &AtomicU64, protocol: Option<UpstreamProtocol>| -> u64 {
        view.endpoints
            .iter()
            .filter(|endpoint| protocol.is_none_or(|protocol| endpoint.protocol == protocol))
            .map(|endpoint| of(&endpoint.stats).load(Relaxed))
            .sum()
    };
    let opened = sum(|stats| &stats.connections, None);
    let open = sum(|stats| &stats.connections_active, None);
    stats.upstream_cx_total.absolute(opened);
    stats.upstream_cx_active.set(open as f64);
    stats
        .upstream_cx_destroy
        .absolute(opened.saturating_sub(open));
    for (protocol, counter) in [
        (UpstreamProtocol::Http1, &stats.upstream_cx_http1_total),
        (UpstreamProtocol::Http2, &stats.upstream_cx_http2_total),
    ] {
        counter.absolute(sum(|stats| &stats.connections, Some(protocol)));
    }
    stats
        .upstream_cx_connect_fail
        .absolute(sum(|stats| &stats.connect_fail, None));
    stats
        .upstream_cx_connect_timeout
        .absolute(sum(|stats| &stats.connect_timeout, None));
}

fn overflow() -> Error {
    Error::new(
        Origin::Proxy,
        Flag::UpstreamOverflow,
        StatusCode::SERVICE_UNAVAILABLE,
        "upstream_reset_before_response_started{overflow}",
        "upstream connect error or disconnect/reset before headers. reset reason: overflow",
    )
    .retry(Retry::NothingSent)
}

/// One request on one endpoint.
struct Leg {
    endpoint: Arc<Endpoint>,
    stats: Arc<ClusterStats>,
    detector: Option<Arc<Detector>>,
    /// Whether outlier detection knows its status.
    judged: bool,
    entered: Option<Entered>,
    prefill: u64,
    begun: Instant,
    status: Option<StatusCode>,
    finished: bool,
}

impl Leg {
    /// Not as soon as the status is there: it may be that of the proxy beside the engine.
    fn judge(&mut self) {
        if let (Some(detector), Some(status), false) = (&self.detector, self.status, self.judged) {
            self.judged = true;
            detector.status(&self.endpoint, status.as_u16());
        }
    }
}

impl Reservation for Leg {
    fn first_byte(&mut self) {
        self.judge();
        let prefill = std::mem::take(&mut self.prefill);
        if prefill > 0 {
            self.endpoint
                .stats
                .prefill_tokens
                .fetch_sub(prefill, Relaxed);
        }
        if let Some(entered) = &mut self.entered {
            entered.first_byte();
        }
    }

    fn status(&mut self, status: StatusCode) {
        self.status = Some(status);
    }

    fn finish(&mut self, broken: Option<Flag>) {
        self.finished = true;
        match (&self.detector, broken) {
            (Some(detector), Some(flag)) => detector.broken(&self.endpoint, flag),
            _ => self.judge(),
        }
        match broken {
            Some(Flag::UpstreamRequestTimeout) => {
                self.stats.upstream_rq_timeout.increment(1);
                self.stats.upstream_rq_tx_reset.increment(1);
            }
            Some(Flag::UpstreamRemoteReset) => self.stats.upstream_rq_rx_reset.increment(1),
            _ => {}
        }
        // No answer counts as Envoy's local reply.
        let status = self.status.unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        self.stats.completed(status.as_u16(), self.begun.elapsed());
    }
}

impl Drop for Leg {
    fn drop(&mut self) {
        // One that was cancelled says nothing about its endpoint.
        self.judged = true;
        self.first_byte();
        self.endpoint.stats.active.fetch_sub(1, Relaxed);
        self.stats.upstream_rq_active.decrement(1.0);
        if !self.finished {
            self.stats.upstream_rq_cancelled.increment(1);
            self.stats.upstream_rq_tx_reset.increment(1);
        }
    }
}
