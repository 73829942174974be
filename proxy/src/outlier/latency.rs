//! Which endpoints are slow: their streams' medians of an interval, beside those of their cluster.
//!
//! A time to first token is held against an endpoint as if the prompt had been short: what is not cached has to be computed,
//! and takes its time everywhere.

use super::Kind;
use outrigger_filters::{endpoints::Endpoint, samples::Samples};
use outrigger_xds::resource::latency_monitor::LatencyMonitor;
use std::{sync::Arc, time::Duration};

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

/// Takes the interval's samples, and gives who is slow.
pub(super) fn slow<'a>(
    config: &LatencyMonitor,
    endpoints: &'a [Arc<Endpoint>],
) -> Vec<(&'a Arc<Endpoint>, Kind)> {
    let first = |endpoint: &'a Arc<Endpoint>| &endpoint.host.record.first_tokens;
    let later = |endpoint: &'a Arc<Endpoint>| &endpoint.host.record.later_tokens;
    let firsts = medians(config, endpoints, first);
    let laters = medians(config, endpoints, later);
    let ttft = above(config.ttft_factor, config.ttft_floor_ms, firsts);
    let itl = above(config.itl_factor, config.itl_floor_ms, laters);
    let ttft = ttft.into_iter().map(|endpoint| (endpoint, Kind::Ttft));
    let itl = itl.into_iter().map(|endpoint| (endpoint, Kind::Itl));
    ttft.chain(itl).collect()
}

type Medians<'a> = Vec<(&'a Arc<Endpoint>, Duration)>;

/// Of those that have volume; of none if they are too few.
fn medians<'a>(
    config: &LatencyMonitor,
    endpoints: &'a [Arc<Endpoint>],
    samples: impl Fn(&'a Arc<Endpoint>) -> &'a Samples,
) -> Medians<'a> {
    let volume = u64::from(config.request_volume).max(1);
    let medians: Medians<'a> = endpoints
        .iter()
        .filter_map(|endpoint| {
            let (count, median) = samples(endpoint).take();
            (count >= volume).then_some((endpoint, median))
        })
        .collect();
    if medians.len() < config.minimum_hosts as usize {
        return Vec::new();
    }
    medians
}

/// Those whose median is so many times the cluster's, and above the floor. Of an even number of endpoints the faster one of
/// the middle speaks for the cluster, so that of two one can be found slow.
fn above(factor: f64, floor_ms: u64, medians: Medians<'_>) -> Vec<&Arc<Endpoint>> {
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
