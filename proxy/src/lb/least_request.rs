//! The least loaded of a few random endpoints; where weights differ, weights lowered by load.

use outrigger_filters::endpoints::Endpoint;
use rand::Rng;
use std::sync::atomic::Ordering::Relaxed;

/// Envoy's "power of `choices` choices" among `count` endpoints.
pub(super) fn even<'a>(
    count: usize,
    choices: u32,
    endpoint: impl Fn(usize) -> &'a Endpoint,
) -> usize {
    if count <= 1 {
        return 0;
    }
    let mut rng = rand::rng();
    if choices == 2 {
        // Two different ones: to compare one with itself would be no choice.
        let first = rng.random_range(0..count);
        let other = rng.random_range(0..count - 1);
        let second = if other >= first { other + 1 } else { other };
        return if active(endpoint(second)) < active(endpoint(first)) {
            second
        } else {
            first
        };
    }
    let mut best = rng.random_range(0..count);
    for _ in 1..choices {
        let other = rng.random_range(0..count);
        if active(endpoint(other)) < active(endpoint(best)) {
            best = other;
        }
    }
    best
}

/// The least loaded of all; of several, any.
pub(super) fn of_all<'a>(count: usize, endpoint: impl Fn(usize) -> &'a Endpoint) -> usize {
    let mut best = 0;
    let mut equal = 1;
    for other in 1..count {
        match active(endpoint(other)).cmp(&active(endpoint(best))) {
            std::cmp::Ordering::Less => (best, equal) = (other, 1),
            std::cmp::Ordering::Equal => {
                equal += 1;
                if rand::rng().random_range(0..equal) == 0 {
                    best = other;
                }
            }
            std::cmp::Ordering::Greater => {}
        }
    }
    best
}

/// Its weight, less for what runs there.
pub(super) fn weight(endpoint: &Endpoint, bias: f64) -> f64 {
    let weight = f64::from(endpoint.weight);
    if bias == 0.0 {
        return weight;
    }
    weight / (active(endpoint) as f64 + 1.0).powf(bias)
}

/// What its own proxy counts includes other routers' requests; ours may be newer.
fn active(endpoint: &Endpoint) -> u64 {
    endpoint
        .live
        .load()
        .load
        .active_requests
        .max(endpoint.stats.active.load(Relaxed))
}
