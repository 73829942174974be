//! Endpoints of `ORIGINAL_DST` clusters: made when somebody is on the way to one, and gone when nobody was for a while.
//!
//! Balancing never sees them: who is meant needs no choice.

use super::Entry;
use ahash::AHashMap;
use arc_swap::ArcSwap;
use outrigger_filters::endpoints::{Endpoint, Host, Via, clock_ms};
use outrigger_xds::{
    report::EngineId,
    resource::{
        cluster::{ConnectionOptions, OriginalDst},
        endpoint::{Address, LbEndpoint},
    },
};
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Addresses of one cluster.
const HOSTS_MAX: usize = 4096;

/// Those of one cluster.
pub(super) struct Originals {
    hosts: ArcSwap<AHashMap<SocketAddr, Arc<Original>>>,
    /// Held while one is made or they are looked through; who is known is found without.
    changing: Mutex<()>,
    connection: Arc<ConnectionOptions>,
    cleanup_interval: Duration,
}

struct Original {
    endpoint: Arc<Endpoint>,
    used_ms: AtomicU64,
}

impl Original {
    fn is_idle(&self, now_ms: u64, interval: Duration) -> bool {
        let stats = &self.endpoint.stats;
        let idle_ms = now_ms.saturating_sub(self.used_ms.load(Relaxed));
        u128::from(idle_ms) >= interval.as_millis()
            && stats.active.load(Relaxed) == 0
            && stats.connections_active.load(Relaxed) == 0
    }
}

impl Originals {
    pub(super) fn new(config: &OriginalDst, connection: &ConnectionOptions) -> Self {
        Self {
            hosts: ArcSwap::default(),
            changing: Mutex::default(),
            connection: Arc::new(connection.clone()),
            cleanup_interval: config.cleanup_interval,
        }
    }

    /// All that are there, in the order of their addresses.
    pub(super) fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        let hosts = self.hosts.load();
        let mut all: Vec<_> = hosts.iter().collect();
        all.sort_by_key(|(address, _)| **address);
        all.into_iter()
            .map(|(_, host)| host.endpoint.clone())
            .collect()
    }

    /// The one at an address, which is made if need be; none where there are too many.
    pub(super) fn at(&self, address: SocketAddr, entry: &Entry) -> Option<Arc<Endpoint>> {
        let known = self.hosts.load().get(&address).cloned();
        let host = known.or_else(|| self.make(address, entry))?;
        host.used_ms.store(clock_ms(), Relaxed);
        Some(host.endpoint.clone())
    }

    fn make(&self, address: SocketAddr, entry: &Entry) -> Option<Arc<Original>> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.hosts.load_full();
        if let Some(host) = known.get(&address) {
            return Some(host.clone());
        }
        if known.len() >= HOSTS_MAX {
            metrics::counter!("outrigger_original_dst_overflow_total", "envoy_cluster_name" => entry.config.name.clone())
                .increment(1);
            return None;
        }
        let host = Arc::new(Original {
            endpoint: Arc::new(self.endpoint(address, entry)),
            used_ms: AtomicU64::new(clock_ms()),
        });
        let mut hosts = AHashMap::clone(&known);
        hosts.insert(address, host.clone());
        self.hosts.store(Arc::new(hosts));
        entry.stats.membership_change.increment(1);
        Some(host)
    }

    fn endpoint(&self, address: SocketAddr, entry: &Entry) -> Endpoint {
        let configured = LbEndpoint {
            address: Address {
                host: address.ip().to_string(),
                port: address.port(),
            },
            hostname: String::new(),
            health_status: Default::default(),
            load_balancing_weight: 1,
            locality: 0,
            metadata: Default::default(),
        };
        let tls = entry.sockets.get(entry.config.socket_of(&configured));
        let host = Host::default();
        host.since_ms.store(clock_ms(), Relaxed);
        Endpoint {
            id: EngineId::from(address.to_string().as_str()),
            hostname: configured.address.host.as_str().into(),
            address: configured.address,
            breakers: entry.breakers.clone(),
            connection: self.connection.clone(),
            via: Via::Plain,
            protocol: entry.config.protocol,
            tls: tls.cloned().flatten(),
            weight: 1,
            cluster: entry.config.name.as_str().into(),
            host: Arc::new(host),
            ..Endpoint::default()
        }
    }

    fn clean_up(&self, entry: &Entry) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let now_ms = clock_ms();
        let known = self.hosts.load_full();
        let idle = |host: &Arc<Original>| host.is_idle(now_ms, self.cleanup_interval);
        if !known.values().any(idle) {
            return;
        }
        let mut hosts = AHashMap::clone(&known);
        hosts.retain(|_, host| !idle(host));
        self.hosts.store(Arc::new(hosts));
        entry.stats.membership_change.increment(1);
    }
}

/// Looks for those that nobody uses, for as long as this configuration of the cluster is in use.
pub(super) async fn clean_up(entry: Weak<Entry>) {
    loop {
        let Some(interval) = entry.upgrade().and_then(|entry| {
            let originals = entry.originals.as_ref()?;
            Some(originals.cleanup_interval)
        }) else {
            return;
        };
        tokio::time::sleep(interval).await;
        if let Some(entry) = entry.upgrade()
            && let Some(originals) = &entry.originals
        {
            originals.clean_up(&entry);
        }
    }
}
