//! By hash: a ring (as Envoy's, after Ketama) or a Maglev table, one for each priority, built when members change.
//!
//! Health does not rebuild it: a request whose endpoint may not be used goes on along the ring, so that only requests of
//! that endpoint move. (Envoy builds a ring of those that are healthy.)

use outrigger_filters::endpoints::Endpoint;
use outrigger_xds::resource::{
    cluster::{Balancing, LbPolicy},
    endpoint::Locality,
};
use std::{collections::BTreeMap, sync::Arc};
use xxhash_rust::xxh64::xxh64;

/// How often a Maglev table is asked anew before it is searched.
const REHASHES_MAX: u64 = 16;

/// The tables of a cluster, by priority.
#[derive(Debug, Default)]
pub(super) struct Tables(BTreeMap<u32, Table>);

#[derive(Debug)]
struct Table {
    endpoints: Vec<Arc<Endpoint>>,
    places: Places,
    /// Endpoints that have a place. (A ring may be too small for the light ones.)
    placed: usize,
}

/// Indexes into the endpoints.
#[derive(Debug)]
enum Places {
    /// With the hash of each point, ascending.
    Ring(Vec<(u64, u32)>),
    Maglev(Vec<u32>),
}

impl Tables {
    pub(super) fn new(
        policy: LbPolicy,
        config: &Balancing,
        localities: &[Locality],
        endpoints: &[Arc<Endpoint>],
    ) -> Self {
        let mut by_priority: BTreeMap<u32, Vec<Arc<Endpoint>>> = BTreeMap::new();
        for endpoint in endpoints.iter().filter(|_| policy.hashes()) {
            by_priority
                .entry(endpoint.priority)
                .or_default()
                .push(endpoint.clone());
        }
        let tables = by_priority.into_iter().map(|(priority, endpoints)| {
            let weights = normalized(config, localities, &endpoints);
            let places = match policy {
                LbPolicy::Maglev => maglev(config.table_size, &endpoints, &weights),
                _ => ring(config.ring_size, &endpoints, &weights),
            };
            (priority, Table::new(endpoints, places))
        });
        Self(tables.collect())
    }

    /// The first on the way from `hash` that is one of `fit`: an index into it. `None` if none of them has a place here,
    /// because it has too little weight or members have changed meanwhile.
    pub(super) fn find(&self, hash: u64, fit: &[&Endpoint]) -> Option<usize> {
        let table = self.0.get(&fit.first()?.priority)?;
        table.find(hash, |endpoint| {
            // By name: a push may have replaced the endpoint since the view was made.
            let is_it = |fit: &&Endpoint| std::ptr::eq(*fit, endpoint) || fit.id == endpoint.id;
            fit.iter().position(is_it)
        })
    }
}

impl Table {
    fn new(endpoints: Vec<Arc<Endpoint>>, places: Places) -> Self {
        let mut has_place = vec![false; endpoints.len()];
        match &places {
            Places::Ring(points) => points
                .iter()
                .for_each(|(_, index)| has_place[*index as usize] = true),
            Places::Maglev(slots) => slots
                .iter()
                .for_each(|index| has_place[*index as usize] = true),
        }
        Self {
            endpoints,
            places,
            placed: has_place.into_iter().filter(|has| *has).count(),
        }
    }

    fn find(&self, hash: u64, is_fit: impl Fn(&Endpoint) -> Option<usize>) -> Option<usize> {
        let mut unfit = Unfit::default();
        let mut at = |index: u32| {
            let index = index as usize;
            if unfit.has(index) {
                return None;
            }
            match is_fit(&self.endpoints[index]) {
                Some(at) => Some(Some(at)),
                None => unfit.add(index, self).then_some(None),
            }
        };
        match &self.places {
            Places::Ring(points) => {
                let first = points.partition_point(|(point, _)| *point < hash);
                let (before, after) = points.split_at(first);
                after
                    .iter()
                    .chain(before)
                    .find_map(|(_, index)| at(*index))?
            }
            Places::Maglev(slots) => {
                let size = slots.len() as u64;
                let rehashed = (0..REHASHES_MAX).map(|attempt| match attempt {
                    0 => hash,
                    // Envoy's, of further attempts.
                    _ => hash ^ (u64::MAX - attempt + 1),
                });
                let first = (hash % size) as usize;
                let along = (first..slots.len()).chain(0..first);
                rehashed
                    .map(|hash| (hash % size) as usize)
                    .chain(along)
                    .find_map(|slot| at(slots[slot]))?
            }
        }
    }
}

/// Those that a walk has met in vain.
#[derive(Default)]
struct Unfit {
    /// By endpoint; empty until the first one, as nearly every walk ends where it begins.
    met: Vec<bool>,
    count: usize,
}

impl Unfit {
    fn has(&self, index: usize) -> bool {
        self.met.get(index).is_some_and(|met| *met)
    }

    /// One more. True if it was the last of the table that could be met.
    fn add(&mut self, index: usize, table: &Table) -> bool {
        self.met.resize(table.endpoints.len(), false);
        self.met[index] = true;
        self.count += 1;
        self.count == table.placed
    }
}

/// Shares of the endpoints, which add up to 1.
fn normalized(
    config: &Balancing,
    localities: &[Locality],
    endpoints: &[Arc<Endpoint>],
) -> Vec<f64> {
    let weight = |endpoint: &Endpoint| f64::from(endpoint.weight);
    let sum: f64 = endpoints.iter().map(|endpoint| weight(endpoint)).sum();
    if !config.locality_weighted {
        return endpoints
            .iter()
            .map(|endpoint| weight(endpoint) / sum)
            .collect();
    }
    let of_locality = |locality: usize| {
        let known = localities.get(locality).and_then(|known| known.weight);
        f64::from(known.unwrap_or(0))
    };
    let mut sums: BTreeMap<usize, f64> = BTreeMap::new();
    for endpoint in endpoints {
        *sums.entry(endpoint.locality).or_default() += weight(endpoint);
    }
    let total: f64 = sums.keys().map(|locality| of_locality(*locality)).sum();
    let shares = endpoints.iter().map(|endpoint| {
        let here = of_locality(endpoint.locality) / total.max(f64::MIN_POSITIVE);
        here * weight(endpoint) / sums[&endpoint.locality]
    });
    shares.collect()
}

/// Points in proportion to weights: the lightest endpoint gets whole ones, as far as the largest size allows.
fn ring((min, max): (u64, u64), endpoints: &[Arc<Endpoint>], weights: &[f64]) -> Places {
    let lightest = weights
        .iter()
        .copied()
        .filter(|weight| *weight > 0.0)
        .fold(1.0, f64::min);
    let scale = ((lightest * min as f64).ceil() / lightest).min(max as f64);
    let mut points = Vec::with_capacity(scale.ceil() as usize);
    let (mut target, mut made) = (0.0, 0.0);
    let mut key = Vec::new();
    for (index, (endpoint, weight)) in endpoints.iter().zip(weights).enumerate() {
        target += scale * weight;
        let mut number = 0;
        while made < target {
            key.clear();
            key.extend_from_slice(endpoint.hash_key.as_bytes());
            key.extend_from_slice(format!("_{number}").as_bytes());
            points.push((xxh64(&key, 0), index as u32));
            number += 1;
            made += 1.0;
        }
    }
    points.sort_unstable();
    Places::Ring(points)
}

/// One endpoint while a Maglev table is filled.
struct Filling {
    index: u32,
    offset: u64,
    skip: u64,
    weight: f64,
    target: f64,
    next: u64,
}

/// The paper's listing 1, with weights as Envoy has them.
fn maglev(size: u64, endpoints: &[Arc<Endpoint>], weights: &[f64]) -> Places {
    const EMPTY: u32 = u32::MAX;
    let heaviest = weights.iter().copied().fold(0.0, f64::max);
    let mut filling: Vec<Filling> = endpoints
        .iter()
        .zip(weights)
        .enumerate()
        .filter(|(_, (_, weight))| **weight > 0.0)
        .map(|(index, (endpoint, weight))| Filling {
            index: index as u32,
            offset: xxh64(endpoint.hash_key.as_bytes(), 0) % size,
            skip: xxh64(endpoint.hash_key.as_bytes(), 1) % (size - 1) + 1,
            weight: *weight,
            target: 0.0,
            next: 0,
        })
        .collect();
    // Not in the order that somebody happened to list them.
    filling.sort_by(|a, b| {
        let key = |filling: &Filling| &endpoints[filling.index as usize].hash_key;
        key(a).cmp(key(b))
    });
    let mut slots = vec![EMPTY; size as usize];
    let mut left = if filling.is_empty() { 0 } else { slots.len() };
    for iteration in 1_u64.. {
        for filling in &mut filling {
            if left == 0 || (iteration as f64) * filling.weight < filling.target {
                continue;
            }
            filling.target += heaviest;
            loop {
                let slot = ((filling.offset + filling.skip * filling.next) % size) as usize;
                filling.next += 1;
                if slots[slot] == EMPTY {
                    slots[slot] = filling.index;
                    left -= 1;
                    break;
                }
            }
        }
        if left == 0 {
            break;
        }
    }
    slots.retain(|slot| *slot != EMPTY);
    if slots.is_empty() {
        slots = (0..endpoints.len() as u32).collect();
    }
    Places::Maglev(slots)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn a_walk_ends_when_everybody_with_a_place_was_met() {
        let endpoints: Vec<_> = (0..4)
            .map(|at| {
                Arc::new(Endpoint {
                    hash_key: format!("e{at}").into(),
                    weight: 1,
                    ..Endpoint::default()
                })
            })
            .collect();
        for policy in [LbPolicy::RingHash, LbPolicy::Maglev] {
            let tables = Tables::new(policy, &Balancing::default(), &[], &endpoints);
            let asked = Cell::new(0);
            let found = tables.0[&0].find(7, |_| {
                asked.set(asked.get() + 1);
                None
            });
            assert_eq!((found, asked.get()), (None, 4), "{policy:?}");
        }
    }
}
