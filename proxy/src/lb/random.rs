//! Any endpoint, by weight.

use rand::Rng;

pub(super) fn even(count: usize) -> usize {
    rand::rng().random_range(0..count)
}

/// An index, as often as its weight says; 0 if all weights are.
pub(super) fn weighted(weights: impl Iterator<Item = u32> + Clone) -> usize {
    let total: u64 = weights.clone().map(u64::from).sum();
    if total == 0 {
        return 0;
    }
    let mut left = rand::rng().random_range(0..total);
    for (at, weight) in weights.enumerate() {
        match left.checked_sub(u64::from(weight)) {
            Some(rest) => left = rest,
            None => return at,
        }
    }
    0
}
