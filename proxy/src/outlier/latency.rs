//! Which endpoints are slow: their streams' medians of an interval, beside those of endpoints that serve the same models.
//!
//! A time to first token is held against an endpoint as if the prompt had been short: what is not cached has to be computed,
//! and takes its time everywhere.

use super::Kind;
use outrigger_filters::{
    endpoints::{Endpoint, Level},
    samples::Samples,
};
use outrigger_xds::resource::latency_monitor::LatencyMonitor;
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// A stream's first token came.
pub(super) fn first_token(
    config: &LatencyMonitor,
    endpoint: &Endpoint,
    took: Duration,
    uncached_tokens: u64,
) {
    let longer = (uncached_tokens as f64 / config.ttft_tokens as f64).max(1.0);
    endpoint.host.record.first_tokens.note(took.div_f64(longer));
}

/// Takes the interval's samples, and gives who is slow; endpoints are compared with those that serve the same models.
pub(super) fn slow<'a>(
    config: &LatencyMonitor,
    endpoints: &'a [Arc<Endpoint>],
) -> Vec<(&'a Arc<Endpoint>, Kind)> {
    let first = |endpoint: &'a Arc<Endpoint>| &endpoint.host.record.first_tokens;
    let later = |endpoint: &'a Arc<Endpoint>| &endpoint.host.record.later_tokens;
    let firsts = medians(config, endpoints, first);
    let laters = medians(config, endpoints, later);
    let ttft = above(config, config.ttft_factor, config.ttft_floor_ms, firsts);
    let itl = above(config, config.itl_factor, config.itl_floor_ms, laters);
    let ttft = ttft.into_iter().map(|endpoint| (endpoint, Kind::Ttft));
    let itl = itl.into_iter().map(|endpoint| (endpoint, Kind::Itl));
    ttft.chain(itl).collect()
}

/// Whether another endpoint than this one gets requests for all that it serves.
pub(super) fn has_stand_in(endpoint: &Arc<Endpoint>, endpoints: &[Arc<Endpoint>]) -> bool {
    let models = models(endpoint);
    endpoints.iter().any(|other| {
        !Arc::ptr_eq(other, endpoint) && is_used(other) && self::models(other) == models
    })
}

/// Whether it gets requests: not ejected, and there.
fn is_used(endpoint: &Endpoint) -> bool {
    matches!(endpoint.level(), Level::Healthy | Level::Degraded)
}

/// The names of what it serves, in order; none if nobody told.
fn models(endpoint: &Endpoint) -> Vec<String> {
    let state = &endpoint.live.load().state;
    // Adapters come and go, and do not make it another engine.
    let bases = state.models.iter().filter(|model| model.parent.is_none());
    let mut names: Vec<String> = bases.map(|model| model.id.clone()).collect();
    names.sort_unstable();
    names
}

type Medians<'a> = BTreeMap<Vec<String>, Vec<(&'a Arc<Endpoint>, Duration)>>;

/// Of those that are used now and have volume, by what they serve. Samples of the others are taken, too, and forgotten.
fn medians<'a>(
    config: &LatencyMonitor,
    endpoints: &'a [Arc<Endpoint>],
    samples: impl Fn(&'a Arc<Endpoint>) -> &'a Samples,
) -> Medians<'a> {
    let volume = u64::from(config.request_volume).max(1);
    let mut medians = Medians::new();
    for endpoint in endpoints {
        let (count, median) = samples(endpoint).take();
        if count >= volume && is_used(endpoint) {
            let group = medians.entry(models(endpoint)).or_default();
            group.push((endpoint, median));
        }
    }
    medians
}

/// Those that are slow beside their group. A group that is too small tells nothing.
fn above<'a>(
    config: &LatencyMonitor,
    factor: f64,
    floor_ms: u64,
    medians: Medians<'a>,
) -> Vec<&'a Arc<Endpoint>> {
    let groups = medians.into_values();
    groups
        .filter(|group| group.len() >= config.minimum_hosts as usize)
        .flat_map(|group| above_middle(factor, floor_ms, group))
        .collect()
}

/// Those whose median is so many times the group's, and above the floor. Of an even number of endpoints the faster one of
/// the middle speaks for the group, so that of two one can be found slow.
fn above_middle(
    factor: f64,
    floor_ms: u64,
    medians: Vec<(&Arc<Endpoint>, Duration)>,
) -> Vec<&Arc<Endpoint>> {
    let mut sorted: Vec<Duration> = medians.iter().map(|(_, median)| *median).collect();
    sorted.sort_unstable();
    let Some(middle) = sorted.get(sorted.len().saturating_sub(1) / 2) else {
        return Vec::new();
    };
    let limit = middle.mul_f64(factor).max(Duration::from_millis(floor_ms));
    medians
        .into_iter()
        .filter(|(_, median)| factor > 0.0 && *median > limit)
        .map(|(endpoint, _)| endpoint)
        .collect()
}
