//! Localities by weight, lowered by how many of their endpoints can be used.

use super::{is_of, levels::Set, random};
use outrigger_filters::endpoints::Endpoint;
use outrigger_xds::resource::endpoint::Locality;
use std::sync::Arc;

/// Keeps those of `fit` (indexes into `candidates`) that are of one locality, chosen by weight. A locality without a
/// weight gets nothing, as in Envoy, unless no other has any.
pub(super) fn keep_one(
    fit: &mut Vec<usize>,
    set: Set,
    (candidates, all): (&[Arc<Endpoint>], &[Arc<Endpoint>]),
    localities: &[Locality],
    overprovisioning: u32,
) {
    let mut here: Vec<usize> = fit.iter().map(|&at| candidates[at].locality).collect();
    here.sort_unstable();
    here.dedup();
    let weights: Vec<u32> = here
        .iter()
        .map(|&locality| {
            let weight = localities.get(locality).and_then(|known| known.weight);
            let of_it = all.iter().filter(|endpoint| endpoint.locality == locality);
            let levels = of_it.map(|endpoint| is_of(set, endpoint.level()));
            effective(weight.unwrap_or(0), levels, overprovisioning)
        })
        .collect();
    let Some(&chosen) = here.get(random::weighted(weights.iter().copied())) else {
        return;
    };
    if weights.iter().any(|&weight| weight > 0) {
        fit.retain(|&at| candidates[at].locality == chosen);
    }
}

/// Thousandths of a weight, at most `u32::MAX` of them.
fn effective(
    weight: u32,
    usable: impl Iterator<Item = bool> + Clone,
    overprovisioning: u32,
) -> u32 {
    let count = usable.clone().count() as u64;
    let usable = usable.filter(|usable| *usable).count() as u64;
    let thousandths = (usable * u64::from(overprovisioning) * 10)
        .checked_div(count)
        .unwrap_or(0)
        .min(1000);
    u32::try_from(u64::from(weight) * thousandths).unwrap_or(u32::MAX)
}
