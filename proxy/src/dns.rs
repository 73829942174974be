//! Names of endpoints, looked up again and again: `STRICT_DNS` and `LOGICAL_DNS`.
//!
//! The system's resolver answers, on a thread of its own for each lookup, since it may take seconds. A lookup that fails
//! changes nothing, unless none has gone well yet: then the name has no endpoint. Until the first one has ended, a
//! name is left to whoever connects.

use ahash::AHashMap;
use arc_swap::ArcSwap;
use outrigger_xds::resource::cluster::{Cluster, Discovery, Dns, LookupFamily};
use rand::Rng;
use std::{
    io,
    net::{IpAddr, ToSocketAddrs},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{oneshot, watch},
    task::AbortHandle,
};

/// How long an answer is good for. The system's resolver does not say; Envoy assumes the same where it asks that one.
const TTL: Duration = Duration::from_secs(60);

/// All addresses of a name; it may block.
pub type Lookup = Arc<dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync>;

/// Cluster and name.
type Key = (String, String);

/// What names are looked up, and what was found.
pub struct Names {
    lookup: Lookup,
    found: ArcSwap<AHashMap<Key, Arc<[IpAddr]>>>,
    running: Mutex<AHashMap<Key, Running>>,
    /// Counts changes of what was found.
    changed: watch::Sender<u64>,
}

struct Running {
    config: Dns,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The system's resolver.
#[must_use]
pub fn system() -> Lookup {
    Arc::new(|name| {
        Ok((name, 0)
            .to_socket_addrs()?
            .map(|found| found.ip())
            .collect())
    })
}

impl Names {
    /// None yet.
    #[must_use]
    pub fn new(lookup: Lookup) -> Arc<Self> {
        Arc::new(Self {
            lookup,
            found: ArcSwap::default(),
            running: Mutex::default(),
            changed: watch::Sender::new(0),
        })
    }

    /// Moves when something else was found.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The addresses of a cluster's name; `None` if nobody knows yet.
    #[must_use]
    pub fn addresses(&self, cluster: &str, name: &str) -> Option<Arc<[IpAddr]>> {
        let key = (cluster.to_owned(), name.to_owned());
        self.found.load().get(&key).cloned()
    }

    /// Follows the names of these clusters, and no others.
    pub fn configure(self: &Arc<Self>, clusters: &[Cluster]) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = std::mem::take(&mut *running);
        for cluster in clusters {
            let Discovery::Dns(config) = &cluster.discovery else {
                continue;
            };
            let endpoints = cluster.load_assignment.endpoints.iter();
            for endpoint in endpoints.filter(|endpoint| endpoint.is_looked_up()) {
                let key = (cluster.name.clone(), endpoint.address.host.clone());
                let known = before.remove(&key).filter(|known| known.config == *config);
                if running.contains_key(&key) {
                    continue;
                }
                let follow = known.unwrap_or_else(|| Running {
                    config: config.clone(),
                    task: tokio::spawn(self.clone().follow(key.clone(), config.clone()))
                        .abort_handle(),
                });
                running.insert(key, follow);
            }
        }
        self.found.rcu(|found| {
            let mut found = AHashMap::clone(found);
            found.retain(|key, _| running.contains_key(key));
            found
        });
    }

    async fn follow(self: Arc<Self>, key: Key, config: Dns) {
        let mut failures = 0;
        loop {
            count("envoy_cluster_update_attempt", &key);
            match self.look_up(&key.1, config.family).await {
                Ok(found) => {
                    failures = 0;
                    count("envoy_cluster_update_success", &key);
                    self.take(&key, found);
                }
                Err(error) => {
                    failures += 1;
                    count("envoy_cluster_update_failure", &key);
                    tracing::debug!(cluster = key.0, name = key.1, %error, "lookup failed");
                    if self.addresses(&key.0, &key.1).is_none() {
                        self.take(&key, Vec::new());
                    }
                }
            }
            tokio::time::sleep(pause(&config, failures)).await;
        }
    }

    async fn look_up(&self, name: &str, family: LookupFamily) -> io::Result<Vec<IpAddr>> {
        let (tell, told) = oneshot::channel();
        let (lookup, name) = (self.lookup.clone(), name.to_owned());
        std::thread::Builder::new()
            .name("outrigger-dns".to_owned())
            .spawn(move || {
                // Nobody may want to know any more.
                let _ = tell.send(lookup(&name));
            })?;
        let found = told
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))?;
        let fit = of_family(found, family);
        if fit.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "no address of the family",
            ));
        }
        Ok(fit)
    }

    fn take(&self, key: &Key, found: Vec<IpAddr>) {
        if self.addresses(&key.0, &key.1).as_deref() == Some(&found) {
            count("envoy_cluster_update_no_rebuild", key);
            return;
        }
        let found: Arc<[IpAddr]> = found.into();
        self.found.rcu(|known| {
            let mut known = AHashMap::clone(known);
            known.insert(key.clone(), found.clone());
            known
        });
        self.changed.send_modify(|count| *count += 1);
    }
}

/// Until the next lookup; after failures it doubles, by chance, as in Envoy.
fn pause(config: &Dns, failures: u32) -> Duration {
    let Some((base, max)) = config.failure_refresh_rate.filter(|_| failures > 0) else {
        return match config.respect_ttl && failures == 0 {
            true => TTL,
            false => config.refresh_rate,
        };
    };
    let bound = base.saturating_mul(1 << failures.min(16)).min(max);
    bound
        .mul_f64(rand::rng().random_range(0.0..1.0))
        .max(Duration::from_millis(1))
}

/// In an order that does not depend on the resolver's.
fn of_family(mut found: Vec<IpAddr>, family: LookupFamily) -> Vec<IpAddr> {
    let has = |found: &[IpAddr], v6: bool| found.iter().any(|ip| ip.is_ipv6() == v6);
    match family {
        LookupFamily::V4Only => found.retain(IpAddr::is_ipv4),
        LookupFamily::V6Only => found.retain(IpAddr::is_ipv6),
        LookupFamily::Auto if has(&found, true) => found.retain(IpAddr::is_ipv6),
        LookupFamily::V4Preferred if has(&found, false) => found.retain(IpAddr::is_ipv4),
        LookupFamily::Auto | LookupFamily::V4Preferred | LookupFamily::All => {}
    }
    found.sort_unstable();
    found.dedup();
    found
}

fn count(name: &'static str, (cluster, _): &Key) {
    metrics::counter!(name, "envoy_cluster_name" => cluster.clone()).increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::resource::endpoint::{Address, ClusterLoadAssignment, LbEndpoint};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn cluster(rate_ms: u64, family: LookupFamily) -> Cluster {
        let endpoint = LbEndpoint {
            address: Address {
                host: "engine.example".into(),
                port: 80,
            },
            hostname: String::new(),
            health_status: Default::default(),
            load_balancing_weight: 1,
            locality: 0,
            metadata: Default::default(),
        };
        Cluster {
            name: "c".into(),
            discovery: Discovery::Dns(Dns {
                refresh_rate: Duration::from_millis(rate_ms),
                family,
                ..Dns::default()
            }),
            load_assignment: ClusterLoadAssignment {
                endpoints: vec![endpoint],
                ..ClusterLoadAssignment::default()
            },
            ..Cluster::default()
        }
    }

    /// A resolver that says what the case wants.
    fn said(now: &Arc<Mutex<Option<Vec<&'static str>>>>) -> Lookup {
        let now = now.clone();
        Arc::new(move |_| match &*now.lock().unwrap() {
            Some(found) => Ok(found.iter().map(|text| ip(text)).collect()),
            None => Err(io::ErrorKind::TimedOut.into()),
        })
    }

    async fn until(names: &Names, wanted: &[&str]) {
        let wanted: Vec<IpAddr> = wanted.iter().map(|text| ip(text)).collect();
        let mut changed = names.watch();
        while names.addresses("c", "engine.example").as_deref() != Some(&wanted) {
            tokio::time::timeout(Duration::from_secs(10), changed.changed())
                .await
                .unwrap_or_else(|_| panic!("{wanted:?} was never found"))
                .unwrap();
        }
    }

    #[tokio::test]
    async fn what_a_name_means_is_followed_and_a_failure_changes_nothing() {
        let now = Arc::new(Mutex::new(Some(vec!["10.0.0.2", "10.0.0.1"])));
        let names = Names::new(said(&now));
        assert_eq!(names.addresses("c", "engine.example"), None);
        names.configure(&[cluster(1, LookupFamily::Auto)]);
        until(&names, &["10.0.0.1", "10.0.0.2"]).await;
        *now.lock().unwrap() = None;
        let mut changes = names.watch();
        let changed = tokio::time::timeout(Duration::from_millis(30), changes.changed());
        assert!(changed.await.is_err(), "the last addresses stay");
        *now.lock().unwrap() = Some(vec!["10.0.0.3"]);
        until(&names, &["10.0.0.3"]).await;
        names.configure(&[]);
        assert_eq!(names.addresses("c", "engine.example"), None, "forgotten");
    }

    #[tokio::test]
    async fn a_name_that_was_never_found_has_no_endpoint() {
        let now = Arc::new(Mutex::new(None));
        let names = Names::new(said(&now));
        names.configure(&[cluster(1, LookupFamily::Auto)]);
        until(&names, &[]).await;
        *now.lock().unwrap() = Some(vec!["10.0.0.1"]);
        until(&names, &["10.0.0.1"]).await;
    }

    #[test]
    fn families_are_envoys() {
        let both = || vec![ip("10.0.0.1"), ip("fd00::1")];
        let four = || vec![ip("10.0.0.1")];
        for (family, of_both, of_four) in [
            (LookupFamily::Auto, vec!["fd00::1"], vec!["10.0.0.1"]),
            (LookupFamily::V4Only, vec!["10.0.0.1"], vec!["10.0.0.1"]),
            (LookupFamily::V6Only, vec!["fd00::1"], vec![]),
            (
                LookupFamily::V4Preferred,
                vec!["10.0.0.1"],
                vec!["10.0.0.1"],
            ),
            (
                LookupFamily::All,
                vec!["10.0.0.1", "fd00::1"],
                vec!["10.0.0.1"],
            ),
        ] {
            let ips = |texts: Vec<&str>| texts.into_iter().map(ip).collect::<Vec<_>>();
            assert_eq!(of_family(both(), family), ips(of_both), "{family:?}");
            assert_eq!(of_family(four(), family), ips(of_four), "{family:?}");
        }
    }

    #[test]
    fn a_failure_waits_longer_up_to_its_bound() {
        let config = Dns {
            failure_refresh_rate: Some((Duration::from_millis(10), Duration::from_millis(100))),
            ..Dns::default()
        };
        assert_eq!(pause(&config, 0), Duration::from_secs(5));
        let respects = Dns {
            respect_ttl: true,
            ..Dns::default()
        };
        assert_eq!(pause(&respects, 0), TTL);
        assert_eq!(pause(&respects, 1), Duration::from_secs(5));
        for failures in [1, 2, 5, 40] {
            let longest = (0..200).map(|_| pause(&config, failures)).max().unwrap();
            let bound =
                Duration::from_millis(10 * (1 << failures.min(6))).min(Duration::from_millis(100));
            assert!(
                longest <= bound && longest > bound / 2,
                "{failures}: {longest:?}"
            );
        }
    }
}
