//! Load balancing: which of a cluster's endpoints gets a request that no filter ranked.
//!
//! First the level (a priority, and its healthy, its degraded or, in a panic, all endpoints), then a locality if they
//! have weights, then the policy. It takes no lock: what it remembers between requests is atomic.

mod hashed;
mod least_request;
mod levels;
mod locality;
mod random;
mod reported;
mod round_robin;
mod slow_start;

use arc_swap::ArcSwap;
use outrigger_filters::endpoints::{ClusterView, Endpoint, Level};
use outrigger_xds::{
    report::Health,
    resource::{
        cluster::{Balancing, Cluster, LbPolicy},
        endpoint::{HealthStatus, Locality},
    },
};
pub use reported::Weights;
use std::sync::Arc;

/// `overprovisioning_factor` unless configured.
const OVERPROVISIONING_PERCENT: u32 = 140;

/// One cluster's balancer.
#[derive(Debug)]
pub struct Balancer {
    policy: LbPolicy,
    config: Balancing,
    overprovisioning: u32,
    localities: Vec<Locality>,
    /// Somebody judges health while it runs.
    judged: bool,
    turns: Arc<round_robin::Turns>,
    tables: ArcSwap<hashed::Tables>,
    /// By load reports, where they count.
    weights: Option<Arc<Weights>>,
}

/// Which endpoint, and whether health was ignored to find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chosen {
    /// Index into the candidates.
    pub index: usize,
    /// Too few were healthy: all were used.
    pub panic: bool,
}

impl Balancer {
    /// As configured; it goes on where `previous`, the same cluster's before a push, has stopped.
    #[must_use]
    pub fn new(cluster: &Cluster, previous: Option<&Self>) -> Self {
        let factor = cluster.load_assignment.overprovisioning_factor;
        Self {
            policy: cluster.lb_policy,
            config: cluster.balancing.clone(),
            overprovisioning: if factor == 0 {
                OVERPROVISIONING_PERCENT
            } else {
                factor
            },
            localities: cluster.load_assignment.localities.clone(),
            judged: cluster.health_check.is_some() || cluster.outlier_detection.is_some(),
            turns: previous.map_or_else(Default::default, |previous| previous.turns.clone()),
            tables: ArcSwap::default(),
            weights: (cluster.lb_policy == LbPolicy::ClientSideWeightedRoundRobin)
                .then(|| Arc::new(Weights::new(&cluster.balancing.reports))),
        }
    }

    /// Who takes load reports, if they count.
    #[must_use]
    pub fn weights(&self) -> Option<Arc<Weights>> {
        self.weights.clone()
    }

    /// Members have changed.
    pub fn rebuild(&self, endpoints: &[Arc<Endpoint>]) {
        if self.policy.hashes() {
            let tables =
                hashed::Tables::new(self.policy, &self.config, &self.localities, endpoints);
            self.tables.store(Arc::new(tables));
        }
    }

    /// Whether nothing but load tells these endpoints apart.
    #[must_use]
    pub fn is_even(&self, endpoints: &[Arc<Endpoint>]) -> bool {
        !self.judged
            && !self.config.locality_weighted
            && !self.policy.hashes()
            && self.weights.is_none()
            && self.config.slow_start.is_none()
            && endpoints.iter().all(|endpoint| {
                endpoint.weight == endpoints[0].weight
                    && endpoint.priority == 0
                    && endpoint.health_status == HealthStatus::Healthy
                    && endpoint.live.load().state.health != Health::Unhealthy
            })
    }

    /// One of `candidates`, which are some of the view's endpoints. `hash` is the request's; without one, policies that
    /// choose by hash choose by chance.
    #[must_use]
    pub fn choose(
        &self,
        view: &ClusterView,
        candidates: &[Arc<Endpoint>],
        hash: Option<u64>,
    ) -> Option<Chosen> {
        if view.even {
            let index = self.even(candidates)?;
            return Some(Chosen {
                index,
                panic: false,
            });
        }
        let levels = levels::Levels::of(
            &view.endpoints,
            self.overprovisioning,
            self.config.healthy_panic_threshold,
        );
        let hash = self
            .policy
            .hashes()
            .then(|| hash.unwrap_or_else(rand::random));
        let wanted = levels.pick(hash)?;
        let (mut fit, set) = levels::fitting(&levels, wanted, candidates)?;
        if self.config.locality_weighted && hash.is_none() && set != levels::Set::All {
            locality::keep_one(
                &mut fit,
                set,
                (candidates, &view.endpoints),
                &self.localities,
                self.overprovisioning,
            );
        }
        if let Some(weights) = &self.weights {
            weights.renew(&view.endpoints);
        }
        let endpoints: Vec<&Endpoint> = fit.iter().map(|&at| &*candidates[at]).collect();
        let at = match hash {
            Some(hash) => self
                .tables
                .load()
                .find(hash, &endpoints)
                .unwrap_or_else(|| {
                    // Whoever is well takes the request, though the table leads to nobody who is.
                    random::weighted(endpoints.iter().map(|endpoint| endpoint.weight))
                }),
            None => self.weighted(&endpoints)?,
        };
        Some(Chosen {
            index: fit[at],
            panic: set == levels::Set::All,
        })
    }

    /// The policy where all weights are one.
    fn even(&self, candidates: &[Arc<Endpoint>]) -> Option<usize> {
        let count = candidates.len();
        if count <= 1 {
            return (count == 1).then_some(0);
        }
        Some(match self.policy {
            LbPolicy::RoundRobin => self.turns.next(count),
            LbPolicy::Random => random::even(count),
            LbPolicy::LeastRequest => self.least(count, |at| &candidates[at]),
            // Never even: their tables decide, or reports. Nor is any to be chosen where the request has said.
            LbPolicy::RingHash
            | LbPolicy::Maglev
            | LbPolicy::ClientSideWeightedRoundRobin
            | LbPolicy::ClusterProvided => random::even(count),
        })
    }

    fn weighted(&self, endpoints: &[&Endpoint]) -> Option<usize> {
        let first = endpoints.first()?;
        let even = endpoints
            .iter()
            .all(|endpoint| endpoint.weight == first.weight && self.share(endpoint) == 1.0);
        Some(match self.policy {
            LbPolicy::RoundRobin => self.turns.weighted(endpoints, |endpoint| {
                f64::from(endpoint.weight) * self.share(endpoint)
            }),
            LbPolicy::Random => random::weighted(endpoints.iter().map(|endpoint| endpoint.weight)),
            LbPolicy::LeastRequest if even || self.config.full_scan => {
                self.least(endpoints.len(), |at| endpoints[at])
            }
            LbPolicy::LeastRequest => {
                let bias = self.config.active_request_bias;
                self.turns.weighted(endpoints, |endpoint| {
                    least_request::weight(endpoint, bias) * self.share(endpoint)
                })
            }
            LbPolicy::ClientSideWeightedRoundRobin => self.turns.weighted(endpoints, |endpoint| {
                reported::used(endpoint) * self.share(endpoint)
            }),
            // Tables decide, and have them all; or the request.
            LbPolicy::RingHash | LbPolicy::Maglev | LbPolicy::ClusterProvided => return None,
        })
    }

    fn least<'a>(&self, count: usize, endpoint: impl Fn(usize) -> &'a Endpoint) -> usize {
        if self.config.full_scan {
            return least_request::of_all(count, endpoint);
        }
        least_request::even(count, self.config.choice_count, endpoint)
    }

    /// Of its weight, while it is new.
    fn share(&self, endpoint: &Endpoint) -> f64 {
        self.config
            .slow_start
            .map_or(1.0, |config| slow_start::factor(&config, endpoint))
    }
}

/// Whether an endpoint is of a set.
fn is_of(set: levels::Set, level: Level) -> bool {
    match set {
        levels::Set::Healthy => level == Level::Healthy,
        levels::Set::Degraded => level == Level::Degraded,
        levels::Set::All => level != Level::Out,
    }
}

#[cfg(test)]
mod tests;
