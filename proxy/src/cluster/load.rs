//! The load of clusters as it is reported (LRS): each request once when it begins and once when it ends, wherever its
//! endpoint or its cluster is by then.
//!
//! Requests know nothing of this: it is read off what they count anyway.

use super::{Clusters, Entry};
use ahash::{AHashMap, AHashSet};
use outrigger_filters::endpoints::{Counts, Endpoint, Host};
use outrigger_xds::{
    lrs::{Asked, ClusterLoad, Load, LocalityLoad},
    resource::endpoint::Address,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering::Relaxed},
    time::Instant,
};

/// Clusters that are told of, in the order of their names.
const CLUSTERS_TOLD_MAX: usize = 10_000;
/// Endpoints that are gone and have something left to be told of.
const DEPARTED_MAX: usize = 65_536;

/// What is to be told, and what else would be lost of it.
#[derive(Default)]
pub(super) struct Loads(Mutex<State>);

#[derive(Default)]
struct State {
    /// None tells nobody.
    asked: Option<Asked>,
    /// When each cluster was last told of.
    told: BTreeMap<Arc<str>, Instant>,
    departed: BTreeMap<Arc<str>, Departed>,
}

/// What is gone of a cluster, or with it.
#[derive(Default)]
struct Departed {
    service_name: String,
    dropped: u64,
    untold: Counts,
    endpoints: Vec<Arc<Endpoint>>,
}

impl Departed {
    /// Who is back is no more gone, and who has nothing left to tell of is not needed.
    fn keep_untold(&mut self, present: &[Arc<Endpoint>]) {
        if self.endpoints.is_empty() {
            return;
        }
        let mut known: AHashSet<*const Host> = hosts(present).collect();
        self.endpoints.retain(|endpoint| {
            !endpoint.host.tally.is_over() && known.insert(Arc::as_ptr(&endpoint.host))
        });
    }
}

impl Loads {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn wants(&self, cluster: &str) -> bool {
        let asked = self.asked.as_ref();
        asked.is_some_and(|asked| asked.wants(cluster))
    }

    /// These have left a cluster, and something is to be told of them still.
    fn depart(&mut self, name: &str, service_name: &str, endpoints: Vec<Arc<Endpoint>>) {
        if endpoints.is_empty() {
            return;
        }
        let known = self.departed.values().map(|known| known.endpoints.len());
        let room = DEPARTED_MAX.saturating_sub(known.sum());
        left_out_of_reports("endpoint", endpoints.len().saturating_sub(room));
        let departed = self.departed.entry(name.into()).or_default();
        service_name.clone_into(&mut departed.service_name);
        departed.endpoints.extend(endpoints.into_iter().take(room));
    }
}

fn left_out_of_reports(what: &'static str, count: usize) {
    if count > 0 {
        metrics::counter!("outrigger_load_reports_left_out_total", "what" => what)
            .increment(count as u64);
    }
}

impl Entry {
    /// `eds_cluster_config.service_name`.
    fn service_name(&self) -> &str {
        let eds = self.config.eds.as_ref();
        eds.map_or("", |eds| eds.service_name.as_str())
    }

    /// Requests that were dropped and not told of.
    fn take_dropped(&self) -> u64 {
        self.breakers.dropped.swap(0, Relaxed)
    }

    fn take_untold(&self) -> Counts {
        let originals = self.originals.as_ref();
        originals
            .map(super::Originals::take_untold)
            .unwrap_or_default()
    }
}

fn hosts(endpoints: &[Arc<Endpoint>]) -> impl Iterator<Item = *const Host> {
    endpoints.iter().map(|endpoint| Arc::as_ptr(&endpoint.host))
}

/// Those of `before` that are not among `now`, and have something left to be told of.
fn left(before: &[Arc<Endpoint>], now: &[Arc<Endpoint>]) -> Vec<Arc<Endpoint>> {
    let stay: AHashSet<*const Host> = hosts(now).collect();
    let gone = before
        .iter()
        .filter(|endpoint| !stay.contains(&Arc::as_ptr(&endpoint.host)));
    gone.filter(|endpoint| !endpoint.host.tally.is_over())
        .cloned()
        .collect()
}

impl Clusters {
    /// From now on this is to be told, or nothing. What was counted before of a cluster that nobody asked for yet is not.
    pub fn report(&self, asked: Option<&Asked>) {
        let mut state = self.loads.lock();
        let Some(asked) = asked else {
            *state = State::default();
            return;
        };
        for (name, entry) in self.entries.load().iter() {
            if !asked.wants(name) || state.wants(name) {
                continue;
            }
            for endpoint in &entry.shown().endpoints {
                endpoint.host.tally.take();
            }
            entry.take_dropped();
            entry.take_untold();
            state.told.insert(name.clone(), Instant::now());
        }
        state.told.retain(|name, _| asked.wants(name));
        state.departed.retain(|name, _| asked.wants(name));
        state.asked = Some(asked.clone());
    }

    /// What is to be told now. It is told once.
    #[must_use]
    pub fn take_load(&self) -> Vec<ClusterLoad> {
        let mut state = self.loads.lock();
        // Not before: what departs meanwhile would be told of as if it were still there.
        let entries = self.entries.load_full();
        let Some(asked) = state.asked.clone() else {
            return Vec::new();
        };
        let mut names: BTreeSet<Arc<str>> = state.departed.keys().cloned().collect();
        names.extend(entries.keys().filter(|name| asked.wants(name)).cloned());
        left_out_of_reports("cluster", names.len().saturating_sub(CLUSTERS_TOLD_MAX));
        let names = names.into_iter().take(CLUSTERS_TOLD_MAX);
        names
            .map(|name| state.take(name.clone(), entries.get(&name), asked.by_endpoint))
            .collect()
    }

    /// Clusters are others than they were.
    pub(super) fn depart(&self, before: &AHashMap<Arc<str>, Arc<Entry>>) {
        let entries = self.entries.load();
        let mut state = self.loads.lock();
        for (name, entry) in before {
            if !state.wants(name) {
                continue;
            }
            match entries.get(name) {
                Some(now) if Arc::ptr_eq(now, entry) => {}
                Some(now) => {
                    let gone = left(&entry.shown().endpoints, &now.shown().endpoints);
                    state.depart(name, entry.service_name(), gone);
                }
                None => {
                    let gone = left(&entry.shown().endpoints, &[]);
                    state.depart(name, entry.service_name(), gone);
                    let departed = state.departed.entry(name.clone()).or_default();
                    entry.service_name().clone_into(&mut departed.service_name);
                    departed.dropped += entry.take_dropped();
                    departed.untold = departed.untold.and(entry.take_untold());
                }
            }
        }
    }

    /// A cluster has other endpoints than it had.
    pub(super) fn depart_from(&self, entry: &Entry, before: &[Arc<Endpoint>]) {
        let mut state = self.loads.lock();
        if state.wants(&entry.config.name) {
            let gone = left(before, &entry.view.load().endpoints);
            state.depart(&entry.config.name, entry.service_name(), gone);
        }
    }
}

impl State {
    /// The load of one cluster, which is there or gone.
    fn take(
        &mut self,
        name: Arc<str>,
        entry: Option<&Arc<Entry>>,
        by_endpoint: bool,
    ) -> ClusterLoad {
        let now = Instant::now();
        let mut departed = self.departed.remove(&name).unwrap_or_default();
        let since = self.told.insert(name.clone(), now);
        let since = since.or(entry.map(|entry| entry.since)).unwrap_or(now);
        let mut sum = Sum::new(by_endpoint);
        let present = entry.map_or_else(Vec::new, |entry| entry.shown().endpoints.clone());
        present.iter().for_each(|endpoint| sum.add(endpoint));
        let mut dropped = departed.dropped;
        sum.add_untold(departed.untold);
        if let Some(entry) = entry {
            dropped += entry.take_dropped();
            sum.add_untold(entry.take_untold());
            entry.service_name().clone_into(&mut departed.service_name);
        }
        departed
            .endpoints
            .iter()
            .for_each(|endpoint| sum.add(endpoint));
        let load = ClusterLoad {
            name: name.to_string(),
            service_name: departed.service_name.clone(),
            localities: sum.localities(),
            dropped,
            interval: now.saturating_duration_since(since),
        };
        departed.keep_untold(&present);
        if !departed.endpoints.is_empty() {
            (departed.dropped, departed.untold) = (0, Counts::default());
            self.departed.insert(name, departed);
        } else if entry.is_none() {
            self.told.remove(&name);
        }
        load
    }
}

/// Load of endpoints, by priority and place.
struct Sum {
    by_endpoint: bool,
    seen: AHashSet<*const Host>,
    localities: BTreeMap<(u32, Arc<[String; 3]>), LocalityLoad>,
}

impl Sum {
    fn new(by_endpoint: bool) -> Self {
        Self {
            by_endpoint,
            seen: AHashSet::new(),
            localities: BTreeMap::new(),
        }
    }

    fn add(&mut self, endpoint: &Endpoint) {
        // A cluster may have one endpoint twice.
        if !self.seen.insert(Arc::as_ptr(&endpoint.host)) {
            return;
        }
        let (counts, in_progress) = endpoint.host.tally.take();
        let load = Load {
            in_progress,
            ..load(counts)
        };
        let place = (endpoint.priority, &endpoint.place);
        self.add_load(place, load, Some(&endpoint.address));
    }

    /// Of endpoints whose addresses nobody remembers.
    fn add_untold(&mut self, counts: Counts) {
        self.add_load((0, &Arc::default()), load(counts), None);
    }

    fn add_load(
        &mut self,
        (priority, place): (u32, &Arc<[String; 3]>),
        load: Load,
        address: Option<&Address>,
    ) {
        if load.is_nothing() {
            return;
        }
        let locality = self.localities.entry((priority, place.clone()));
        let locality = locality.or_insert_with(|| LocalityLoad {
            place: place.clone(),
            priority,
            ..LocalityLoad::default()
        });
        locality.load.add(load);
        if let Some(address) = address.filter(|_| self.by_endpoint) {
            locality.endpoints.push((address.clone(), load));
        }
    }

    fn localities(self) -> Vec<LocalityLoad> {
        self.localities.into_values().collect()
    }
}

fn load(counts: Counts) -> Load {
    Load {
        issued: counts.issued,
        succeeded: counts.succeeded,
        failed: counts.failed,
        in_progress: 0,
        first_tokens: counts.first_tokens,
        first_token_us: counts.first_token_us,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::Fleet;
    use outrigger_filters::{
        endpoints::{Endpoints, Want},
        kv_index::{KvIndex, Limits},
    };
    use outrigger_xds::resource::{
        cluster::{Cluster, Discovery, OriginalDst},
        endpoint::{ClusterLoadAssignment, HealthStatus, LbEndpoint},
    };
    use std::{collections::HashMap, net::SocketAddr, time::Duration};

    fn clusters() -> Arc<Clusters> {
        let fleet = Fleet::new(Arc::new(KvIndex::new(Limits::default())), 32);
        Clusters::new(fleet, Arc::default())
    }

    fn everything() -> Asked {
        Asked {
            clusters: None,
            interval: Duration::from_secs(1),
            by_endpoint: false,
        }
    }

    /// `c`, with one endpoint.
    fn cluster() -> Cluster {
        let endpoint = LbEndpoint {
            address: Address {
                host: "127.0.0.1".into(),
                port: 80,
            },
            hostname: String::new(),
            health_status: HealthStatus::Healthy,
            load_balancing_weight: 1,
            locality: 0,
            metadata: BTreeMap::new(),
        };
        Cluster {
            name: "c".into(),
            load_assignment: ClusterLoadAssignment {
                endpoints: vec![endpoint],
                ..ClusterLoadAssignment::default()
            },
            ..Cluster::default()
        }
    }

    fn told(clusters: &Clusters) -> Vec<(String, Load)> {
        let all = clusters.take_load().into_iter();
        all.map(|cluster| {
            let mut sum = Load::default();
            let localities = cluster.localities.iter();
            localities.for_each(|locality| sum.add(locality.load));
            (cluster.name, sum)
        })
        .collect()
    }

    #[tokio::test]
    async fn a_cluster_that_is_gone_is_told_of_until_its_last_request_ends() {
        let clusters = clusters();
        let none = HashMap::new();
        clusters.configure(&[cluster()], &none);
        assert!(told(&clusters).is_empty(), "nobody asked");
        clusters.report(Some(&everything()));
        let view = clusters.view("c").expect("it is configured");
        let mut running = clusters
            .reserve(&view, &view.endpoints[0], &Want::default())
            .expect("there is room");
        clusters.configure(&[], &none);
        let load = |issued, succeeded, in_progress| Load {
            issued,
            succeeded,
            in_progress,
            ..Load::default()
        };
        assert_eq!(told(&clusters), [("c".to_owned(), load(1, 0, 1))]);
        running.status(http::StatusCode::OK);
        running.finish(None);
        drop(running);
        assert_eq!(told(&clusters), [("c".to_owned(), load(0, 1, 0))]);
        assert!(told(&clusters).is_empty());
    }

    #[tokio::test]
    async fn original_destinations_that_are_gone_are_told_of() {
        let clusters = clusters();
        let original = Cluster {
            discovery: Discovery::OriginalDst(OriginalDst {
                header: None,
                port: None,
                cleanup_interval: Duration::from_millis(20),
            }),
            load_assignment: ClusterLoadAssignment::default(),
            ..cluster()
        };
        clusters.configure(&[original], &HashMap::new());
        clusters.report(Some(&everything()));
        let view = clusters.view("c").expect("it is configured");
        let at = SocketAddr::from(([127, 0, 0, 1], 80));
        let endpoint = clusters.original(&view, at).expect("there is room");
        let running = clusters.reserve(&view, &endpoint, &Want::default());
        drop((running, endpoint));
        while !clusters.views()[0].endpoints.is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let cancelled = Load {
            issued: 1,
            ..Load::default()
        };
        assert_eq!(told(&clusters), [("c".to_owned(), cancelled)]);
        assert_eq!(told(&clusters), [("c".to_owned(), Load::default())]);
    }

    #[tokio::test]
    async fn too_much_is_left_out() {
        let clusters = clusters();
        clusters.report(Some(&everything()));
        let busy = Arc::new(Endpoint::default());
        busy.host.tally.begin();
        for number in 0..=CLUSTERS_TOLD_MAX {
            let name = format!("c{number}").as_str().into();
            let departed = Departed {
                endpoints: vec![busy.clone()],
                ..Departed::default()
            };
            clusters.loads.lock().departed.insert(name, departed);
        }
        assert_eq!(told(&clusters).len(), CLUSTERS_TOLD_MAX);
        let mut state = clusters.loads.lock();
        state.depart("c", "", vec![busy; DEPARTED_MAX]);
        let known = state.departed.values().map(|known| known.endpoints.len());
        assert_eq!(known.sum::<usize>(), DEPARTED_MAX);
    }
}
