//! Endpoints of `ORIGINAL_DST` clusters: made when somebody is on the way to one, and gone when nobody was for a while.
//!
//! Balancing never sees them: who is meant needs no choice.

use super::{Entry, counts::Connections};
use ahash::AHashMap;
use outrigger_filters::endpoints::{Counts, Endpoint, Host, Via, clock_ms};
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
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Addresses of one cluster.
const HOSTS_MAX: usize = 4096;
/// How many that nobody uses make room at once where there are so many.
const EVICTED_MAX: usize = HOSTS_MAX / 8;

/// Those of one cluster.
pub(super) struct Originals {
    /// One for all configurations of the cluster. Only one that is made, and the clean-up, keep others out.
    known: Arc<RwLock<Known>>,
    connection: Arc<ConnectionOptions>,
    cleanup_interval: Duration,
}

#[derive(Default)]
struct Known {
    hosts: AHashMap<SocketAddr, Original>,
    /// Of those that are gone.
    departed: Connections,
    /// What their requests came to that was not told in a load report.
    untold: Counts,
}

struct Original {
    endpoint: Arc<Endpoint>,
    /// When it was last asked for, or seen with a request.
    used_ms: AtomicU64,
}

impl Original {
    fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint: Arc::new(endpoint),
            used_ms: AtomicU64::new(clock_ms()),
        }
    }

    /// Somebody is on the way to it.
    fn take(&self) -> Arc<Endpoint> {
        self.used_ms.store(clock_ms(), Relaxed);
        if self.endpoint.host.has(Host::RETIRED) {
            self.endpoint.host.set(Host::RETIRED, false);
        }
        self.endpoint.clone()
    }

    /// Whether nobody asked for it for so long. The connections that are left then are to end.
    fn retire(&self, now_ms: u64, interval: Duration) -> bool {
        if self.endpoint.stats.active.load(Relaxed) > 0 {
            self.used_ms.store(now_ms, Relaxed);
        }
        let idle_ms = now_ms.saturating_sub(self.used_ms.load(Relaxed));
        let is_idle = u128::from(idle_ms) >= interval.as_millis();
        if is_idle {
            self.endpoint.host.set(Host::RETIRED, true);
        }
        is_idle
    }

    /// Whether it may go: no request, no connection open or about to be, and nobody drains it, which would be forgotten.
    fn is_free(&self) -> bool {
        let (host, stats) = (&self.endpoint.host, &self.endpoint.stats);
        stats.active.load(Relaxed) == 0
            && stats.connections_active.load(Relaxed) == 0
            && host.connections.load(Relaxed) == 0
            && !stats.leaving.load(Relaxed)
    }
}

impl Known {
    /// One is gone, with no request left.
    fn depart(&mut self, endpoint: &Endpoint) {
        self.departed.add(endpoint);
        self.untold = self.untold.and(endpoint.host.tally.take().0);
    }

    /// The one at an address, which is made if need be; none where there are too many in use.
    fn at(
        &mut self,
        address: SocketAddr,
        make: impl FnOnce() -> Endpoint,
    ) -> Option<Arc<Endpoint>> {
        if !self.hosts.contains_key(&address) && !self.has_room() {
            return None;
        }
        let host = self.hosts.entry(address);
        Some(host.or_insert_with(|| Original::new(make())).take())
    }

    /// Whether there may be one more, be it that those go which nobody has used for longest.
    fn has_room(&mut self) -> bool {
        if self.hosts.len() < HOSTS_MAX {
            return true;
        }
        let free = self.hosts.iter().filter(|(_, host)| host.is_free());
        let mut free: Vec<_> = free
            .map(|(address, host)| (host.used_ms.load(Relaxed), *address))
            .collect();
        free.sort_unstable();
        for (_, address) in free.iter().take(EVICTED_MAX) {
            if let Some(host) = self.hosts.remove(address) {
                self.depart(&host.endpoint);
            }
        }
        !free.is_empty()
    }

    /// Whether some are gone.
    fn clean_up(&mut self, interval: Duration) -> bool {
        let (now_ms, before) = (clock_ms(), self.hosts.len());
        let goes = |host: &mut Original| host.retire(now_ms, interval) && host.is_free();
        let gone = self.hosts.extract_if(|_, host| goes(host));
        let gone: Vec<Original> = gone.map(|(_, host)| host).collect();
        gone.iter().for_each(|host| self.depart(&host.endpoint));
        self.hosts.len() < before
    }
}

impl Originals {
    /// As configured; those of the same cluster before a push are known still.
    pub(super) fn new(
        config: &OriginalDst,
        connection: &ConnectionOptions,
        previous: Option<&Self>,
    ) -> Self {
        Self {
            known: previous.map_or_else(Default::default, |previous| previous.known.clone()),
            connection: Arc::new(connection.clone()),
            cleanup_interval: config.cleanup_interval,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Known> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that are there, in the order of their addresses.
    pub(super) fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        let known = self.read();
        let mut all: Vec<_> = known.hosts.iter().collect();
        all.sort_by_key(|(address, _)| **address);
        all.into_iter()
            .map(|(_, host)| host.endpoint.clone())
            .collect()
    }

    /// What those counted that are gone.
    pub(super) fn departed(&self) -> Connections {
        self.read().departed
    }

    /// What was not told of requests to those that are gone. It is told once.
    pub(super) fn take_untold(&self) -> Counts {
        std::mem::take(&mut self.write().untold)
    }

    /// The one at an address, which is made if need be; none where there are too many.
    pub(super) fn at(&self, address: SocketAddr, entry: &Entry) -> Option<Arc<Endpoint>> {
        // Taken while nobody can clean it up.
        if let Some(host) = self.read().hosts.get(&address) {
            return Some(host.take());
        }
        let made = self.write().at(address, || self.endpoint(address, entry));
        match made {
            Some(_) => entry.stats.membership_change.increment(1),
            None => metrics::counter!("outrigger_original_dst_overflow_total", "envoy_cluster_name" => entry.config.name.clone())
                .increment(1),
        }
        made
    }

    /// Those that are there are reached as the cluster says now, and keep what is counted of them.
    pub(super) fn renew(&self, entry: &Entry) {
        for (address, host) in &mut self.write().hosts {
            let before = &host.endpoint;
            host.endpoint = Arc::new(Endpoint {
                host: before.host.clone(),
                stats: before.stats.clone(),
                live: before.live.clone(),
                ..self.endpoint(*address, entry)
            });
        }
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
        if !self.write().clean_up(self.cleanup_interval) {
            return;
        }
        entry.stats.membership_change.increment(1);
        if let Some(detector) = &entry.detector {
            detector.members(&self.endpoints());
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cluster::Clusters, fleet::Fleet};
    use outrigger_filters::{
        endpoints::Endpoints,
        kv_index::{KvIndex, Limits},
    };
    use outrigger_xds::resource::{
        cluster::{Cluster, Discovery, UpstreamProtocol},
        outlier_detection::OutlierDetection,
    };
    use std::collections::HashMap;

    fn address(number: usize) -> SocketAddr {
        let [high, low] = (number as u16).to_be_bytes();
        SocketAddr::from(([127, 0, high, low], 80))
    }

    fn full() -> Known {
        let mut known = Known::default();
        for number in 0..HOSTS_MAX {
            let made = known.at(address(number), Endpoint::default);
            assert!(made.is_some(), "{number}");
        }
        known
    }

    #[test]
    fn those_that_nobody_uses_make_room_the_oldest_first() {
        let mut known = full();
        for (number, host) in (0..HOSTS_MAX).map(|number| (number, &known.hosts[&address(number)]))
        {
            host.used_ms.store(number as u64, Relaxed);
            host.endpoint.stats.connect_fail.store(1, Relaxed);
        }
        known.hosts[&address(0)]
            .endpoint
            .stats
            .active
            .store(1, Relaxed);
        let made = known.at(address(HOSTS_MAX), Endpoint::default);
        assert!(made.is_some());
        assert!(known.hosts.contains_key(&address(0)), "in use");
        assert!(!known.hosts.contains_key(&address(EVICTED_MAX)));
        assert!(known.hosts.contains_key(&address(EVICTED_MAX + 1)));
        assert_eq!(known.departed.failed, EVICTED_MAX as u64);
    }

    #[tokio::test]
    async fn a_push_keeps_them_and_outlier_detection_knows_them() {
        let index = Arc::new(KvIndex::new(Limits::default()));
        let fleet = Fleet::new(index, 32);
        let clusters = Clusters::new(fleet, Arc::default());
        let mut cluster = Cluster {
            name: "c".to_owned(),
            discovery: Discovery::OriginalDst(OriginalDst {
                header: None,
                port: None,
                cleanup_interval: Duration::from_secs(60),
            }),
            ..Cluster::default()
        };
        let at = |clusters: &Clusters| {
            let view = clusters.view("c").expect("it is configured");
            let made = clusters.original(&view, address(1));
            made.expect("there is room")
        };
        clusters.configure(std::slice::from_ref(&cluster), &HashMap::new());
        let before = at(&clusters);
        before.stats.active.store(1, Relaxed);
        cluster.protocol = UpstreamProtocol::Http2;
        cluster.outlier_detection = Some(OutlierDetection::default());
        clusters.configure(&[cluster], &HashMap::new());
        assert_eq!(clusters.views()[0].endpoints.len(), 1);
        let after = at(&clusters);
        assert!(Arc::ptr_eq(&before.stats, &after.stats));
        assert!(Arc::ptr_eq(&before.host, &after.host));
        assert_eq!(after.protocol, UpstreamProtocol::Http2);
        let entry = clusters.entry("c").expect("it is configured");
        let detector = entry.detector.as_ref().expect("it has one");
        assert_eq!(detector.hosts(), 1);
        clusters.refresh();
        assert_eq!(detector.hosts(), 1);
    }

    #[test]
    fn those_in_use_leave_no_room() {
        let mut known = full();
        for host in known.hosts.values() {
            host.endpoint.host.connections.store(1, Relaxed);
        }
        assert!(known.at(address(HOSTS_MAX), Endpoint::default).is_none());
        assert!(known.at(address(7), Endpoint::default).is_some());
    }

    #[test]
    fn one_that_is_used_in_any_way_stays() {
        let uses: [fn(&Endpoint); 4] = [
            |endpoint| endpoint.stats.active.store(1, Relaxed),
            |endpoint| endpoint.stats.connections_active.store(1, Relaxed),
            // A connection that is about to be.
            |endpoint| endpoint.host.connections.store(1, Relaxed),
            |endpoint| endpoint.stats.leaving.store(true, Relaxed),
        ];
        for (number, used) in uses.into_iter().enumerate() {
            let mut known = Known::default();
            let endpoint = known.at(address(number), Endpoint::default);
            used(&endpoint.expect("there is room"));
            assert!(!known.clean_up(Duration::ZERO), "{number}");
        }
        let mut known = Known::default();
        known.at(address(0), Endpoint::default);
        assert!(!known.clean_up(Duration::from_secs(60)), "asked for lately");
        assert!(known.clean_up(Duration::ZERO));
    }
}
