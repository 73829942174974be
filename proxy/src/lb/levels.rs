//! Priorities and panic, computed as Envoy does.

use super::is_of;
use outrigger_filters::endpoints::{Endpoint, Level};
use rand::Rng;
use std::sync::Arc;

/// Which endpoints of a priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Set {
    Healthy,
    Degraded,
    /// Panic.
    All,
}

#[derive(Debug, Default, Clone, Copy)]
struct Count {
    all: u64,
    healthy: u64,
    degraded: u64,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Share {
    healthy: u64,
    degraded: u64,
    panic: bool,
}

/// What percentage of requests goes to which priority.
#[derive(Debug)]
pub(super) struct Levels(Vec<Share>);

impl Levels {
    pub(super) fn of(endpoints: &[Arc<Endpoint>], overprovisioning: u32, threshold: f64) -> Self {
        let highest = endpoints.iter().map(|endpoint| endpoint.priority).max();
        let mut counts = vec![Count::default(); highest.map_or(0, |highest| highest as usize + 1)];
        for endpoint in endpoints {
            let count = &mut counts[endpoint.priority as usize];
            count.all += 1;
            match endpoint.level() {
                Level::Healthy => count.healthy += 1,
                Level::Degraded => count.degraded += 1,
                Level::Unhealthy | Level::Out => {}
            }
        }
        Self(shares(&counts, overprovisioning, threshold))
    }

    /// A priority and its set; `None` if there is no endpoint to use.
    pub(super) fn pick(&self, hash: Option<u64>) -> Option<(u32, Set)> {
        let total: u64 = self
            .0
            .iter()
            .map(|share| share.healthy + share.degraded)
            .sum();
        if total == 0 {
            return None;
        }
        let mut left = match hash {
            Some(hash) => hash % total,
            None => rand::rng().random_range(0..total),
        };
        let parts = |(priority, share): (usize, &Share)| {
            let set = |set| if share.panic { Set::All } else { set };
            [
                (priority as u32, set(Set::Healthy), share.healthy),
                (priority as u32, set(Set::Degraded), share.degraded),
            ]
        };
        for (priority, set, share) in self.0.iter().enumerate().flat_map(parts) {
            if left < share {
                return Some((priority, set));
            }
            left -= share;
        }
        None
    }

    /// Sets that may be used at all, in the order in which they are tried where the one picked has nobody left.
    fn others(&self) -> impl Iterator<Item = (u32, Set)> + '_ {
        let of = |set| (0..self.0.len()).map(move |priority| (priority as u32, set));
        let in_panic = of(Set::All).filter(|(priority, _)| self.0[*priority as usize].panic);
        of(Set::Healthy).chain(of(Set::Degraded)).chain(in_panic)
    }
}

/// Envoy's `recalculatePerPriorityState`.
fn shares(counts: &[Count], overprovisioning: u32, threshold: f64) -> Vec<Share> {
    let of_all = |part: u64, all: u64| {
        let percent = (u64::from(overprovisioning) * part).checked_div(all);
        percent.unwrap_or(0).min(100)
    };
    let available: Vec<(u64, u64)> = counts
        .iter()
        .map(|count| {
            (
                of_all(count.healthy, count.all),
                of_all(count.degraded, count.all),
            )
        })
        .collect();
    let total: u64 = available
        .iter()
        .map(|(healthy, degraded)| healthy + degraded)
        .sum();
    let total = total.min(100);
    let is_panic = |count: &Count| {
        total < 100
            && count.all > 0
            && ((count.healthy + count.degraded) * 100) as f64 / (count.all as f64) < threshold
    };
    let mut shares: Vec<Share> = counts
        .iter()
        .map(|count| Share {
            panic: is_panic(count),
            ..Share::default()
        })
        .collect();
    let peopled = || {
        counts
            .iter()
            .zip(&shares)
            .filter(|(count, _)| count.all > 0)
    };
    if peopled().all(|(_, share)| share.panic) {
        // Nobody knows better: by the number of endpoints.
        for (share, count) in shares.iter_mut().zip(counts) {
            share.healthy = count.all;
        }
        return shares;
    }
    if total == 0 {
        return shares;
    }
    let mut left = 100;
    for (share, (healthy, _)) in shares.iter_mut().zip(&available) {
        share.healthy = (healthy * 100 / total).min(left);
        left -= share.healthy;
    }
    for (share, (_, degraded)) in shares.iter_mut().zip(&available) {
        share.degraded = (degraded * 100 / total).min(left);
        left -= share.degraded;
    }
    // What rounding left over.
    if let Some(share) = shares.iter_mut().find(|share| share.healthy > 0) {
        share.healthy += left;
    } else if let Some(share) = shares.iter_mut().find(|share| share.degraded > 0) {
        share.degraded += left;
    }
    shares
}

/// Candidates of the set picked, or of the next that has some; and which that is.
pub(super) fn fitting(
    levels: &Levels,
    picked: (u32, Set),
    candidates: &[Arc<Endpoint>],
) -> Option<(Vec<usize>, Set)> {
    std::iter::once(picked)
        .chain(levels.others())
        .find_map(|(priority, set)| {
            let fit: Vec<usize> = candidates
                .iter()
                .enumerate()
                .filter(|(_, endpoint)| {
                    endpoint.priority == priority && is_of(set, endpoint.level())
                })
                .map(|(at, _)| at)
                .collect();
            (!fit.is_empty()).then_some((fit, set))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(counts: &[(u64, u64, u64)], threshold: f64) -> Vec<(u64, u64, bool)> {
        let counts: Vec<Count> = counts
            .iter()
            .map(|&(all, healthy, degraded)| Count {
                all,
                healthy,
                degraded,
            })
            .collect();
        shares(&counts, 140, threshold)
            .into_iter()
            .map(|share| (share.healthy, share.degraded, share.panic))
            .collect()
    }

    /// The tables of Envoy's documentation on priority levels and degraded endpoints.
    #[test]
    fn load_moves_to_the_next_priority_as_envoy_says() {
        for (healthy, first, second) in [
            (100, 100, 0),
            (72, 100, 0),
            (71, 99, 1),
            (50, 70, 30),
            (25, 35, 65),
            (0, 0, 100),
        ] {
            let found = of(&[(100, healthy, 0), (100, 100, 0)], 50.0);
            assert_eq!(
                (found[0].0, found[1].0),
                (first, second),
                "{healthy} % healthy"
            );
            assert!(!found[0].2, "one priority can take all: no panic");
        }
        let found = of(&[(100, 25, 0), (100, 25, 0)], 50.0);
        assert_eq!(
            found,
            [(100, 0, true), (100, 0, true)],
            "all in panic: by size"
        );
        let found = of(&[(100, 5, 0), (100, 65, 0)], 50.0);
        assert_eq!(found, [(8, 0, true), (92, 0, false)]);
    }

    #[test]
    fn degraded_endpoints_take_what_healthy_ones_cannot() {
        assert_eq!(of(&[(100, 0, 100)], 50.0), [(0, 100, false)]);
        assert_eq!(of(&[(100, 25, 75)], 50.0), [(35, 65, false)]);
        assert_eq!(of(&[(100, 72, 28)], 50.0), [(100, 0, false)]);
    }

    #[test]
    fn a_threshold_of_0_is_no_panic_and_no_endpoint() {
        assert_eq!(of(&[(3, 0, 0)], 0.0), [(0, 0, false)]);
        assert_eq!(of(&[(3, 0, 0)], 50.0), [(3, 0, true)]);
        assert_eq!(of(&[], 50.0), []);
        assert!(Levels(vec![Share::default()]).pick(None).is_none());
    }
}
