//! Clusters: configured by name, their endpoints taken from the fleet, one chosen by the cluster's policy.

use crate::{
    fleet::{Fleet, Way},
    ledger::{Entered, Ledger, Ledgers},
    metrics::ClusterStats,
};
use ahash::AHashMap;
use arc_swap::ArcSwap;
use http::StatusCode;
use outrigger_filters::{
    endpoints::{ClusterView, Endpoint, EndpointStats, Endpoints, Reservation, Via, Want},
    error::{Error, Flag, Origin, Retry},
};
use outrigger_xds::{
    report::EngineId,
    resource::{
        cluster::{Cluster, LbPolicy, UpstreamProtocol},
        endpoint::{Duty, HealthStatus, LbEndpoint, METADATA_NAMESPACE},
    },
};
use rand::Rng;
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
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
}

struct Entry {
    config: Cluster,
    view: ArcSwap<ClusterView>,
    /// Accounts of the engines beside us, by index-free lookup at `reserve`.
    ledgers: ArcSwap<AHashMap<EngineId, Arc<Ledger>>>,
    next: AtomicUsize,
    stats: Arc<ClusterStats>,
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
        })
    }

    /// Takes a new set of clusters; endpoints that stay keep everything that is live about them.
    pub fn configure(&self, clusters: &[Cluster]) {
        let building = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = clusters.iter().map(|cluster| {
            let view = self.view_of(cluster);
            let stats = ClusterStats::new(&cluster.name);
            let ledgers = self.ledgers_of(&view);
            let entry = Entry {
                config: cluster.clone(),
                view: ArcSwap::from_pointee(view),
                ledgers: ArcSwap::from_pointee(ledgers),
                next: AtomicUsize::new(0),
                stats,
            };
            (Arc::from(cluster.name.as_str()), Arc::new(entry))
        });
        self.entries.store(Arc::new(entries.collect()));
        let named = clusters
            .iter()
            .flat_map(|cluster| &cluster.load_assignment.endpoints)
            .filter(|endpoint| endpoint.duty() != Duty::Peer)
            .map(engine_id);
        self.fleet.retain_configured(&named.collect());
        drop(building);
        self.count_members();
    }

    /// Builds all views anew after the fleet's membership changed.
    pub fn refresh(&self) {
        let building = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in self.entries.load().values() {
            let view = self.view_of(&entry.config);
            entry.ledgers.store(Arc::new(self.ledgers_of(&view)));
            entry.view.store(Arc::new(view));
            entry.stats.membership_change.increment(1);
        }
        drop(building);
        self.count_members();
    }

    /// Brings the membership gauges up to date. Called now and then, since health changes without a change of members.
    pub fn count_members(&self) {
        for entry in self.entries.load().values() {
            let view = entry.view.load();
            let healthy = view
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.is_alive())
                .count();
            entry
                .stats
                .membership_total
                .set(view.endpoints.len() as f64);
            entry.stats.membership_healthy.set(healthy as f64);
            count_connections(&entry.stats, &view);
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

    fn view_of(&self, cluster: &Cluster) -> ClusterView {
        let mut endpoints = Vec::new();
        for configured in &cluster.load_assignment.endpoints {
            let is_used = configured.health_status != HealthStatus::Unhealthy;
            match configured.duty() {
                Duty::Peer if is_used => {
                    endpoints.extend(self.fleet.behind(&configured.address));
                }
                Duty::Peer => {}
                duty => {
                    let way = Way {
                        address: &configured.address,
                        via: if duty == Duty::Engine {
                            Via::Local
                        } else {
                            Via::Plain
                        },
                        protocol: cluster.protocol,
                        weight: configured.load_balancing_weight,
                    };
                    // Also one that is not used is listened to, so that all is known of it when it is.
                    let endpoint = self.fleet.configure(&engine_id(configured), &way);
                    if is_used {
                        endpoints.push(endpoint);
                    }
                }
            }
        }
        ClusterView {
            name: cluster.name.as_str().into(),
            lb_policy: cluster.lb_policy,
            connect_timeout: cluster.connect_timeout,
            endpoints,
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
        let count = candidates.len();
        if count <= 1 {
            return (count == 1).then_some(0);
        }
        Some(match view.lb_policy {
            LbPolicy::RoundRobin => {
                self.entries
                    .load()
                    .get(&view.name)?
                    .next
                    .fetch_add(1, Relaxed)
                    % count
            }
            LbPolicy::Random => rand::rng().random_range(0..count),
            LbPolicy::LeastRequest => least_loaded(candidates),
        })
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
            entered,
            prefill,
            begun: Instant::now(),
            status: None,
            finished: false,
        }))
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

/// Envoy's "power of two choices": the less loaded of two random ones.
fn least_loaded(candidates: &[Arc<Endpoint>]) -> usize {
    let mut rng = rand::rng();
    let first = rng.random_range(0..candidates.len());
    let other = rng.random_range(0..candidates.len() - 1);
    let second = if other >= first { other + 1 } else { other };
    // What its own proxy counts includes other routers' requests; ours may be newer.
    let load = |endpoint: &Endpoint| {
        endpoint
            .live
            .load()
            .load
            .active_requests
            .max(endpoint.stats.active.load(Relaxed))
            / u64::from(endpoint.weight)
    };
    if load(&candidates[second]) < load(&candidates[first]) {
        second
    } else {
        first
    }
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
    entered: Option<Entered>,
    prefill: u64,
    begun: Instant,
    status: Option<StatusCode>,
    finished: bool,
}

impl Reservation for Leg {
    fn first_byte(&mut self) {
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
        self.first_byte();
        self.endpoint.stats.active.fetch_sub(1, Relaxed);
        self.stats.upstream_rq_active.decrement(1.0);
        if !self.finished {
            self.stats.upstream_rq_cancelled.increment(1);
            self.stats.upstream_rq_tx_reset.increment(1);
        }
    }
}
