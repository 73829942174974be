//! An endpoint that has just come, or is just well again, gets less than its weight at first.

use outrigger_filters::endpoints::{Endpoint, clock_ms};
use outrigger_xds::resource::cluster::SlowStart;
use std::sync::atomic::Ordering::Relaxed;

/// Its share of its weight; 1 when its time is over.
pub(super) fn factor(config: &SlowStart, endpoint: &Endpoint) -> f64 {
    let age_ms = clock_ms().saturating_sub(endpoint.host.since_ms.load(Relaxed));
    at(config, age_ms)
}

fn at(config: &SlowStart, age_ms: u64) -> f64 {
    let part = age_ms.max(1) as f64 / config.window.as_millis().max(1) as f64;
    if part >= 1.0 {
        return 1.0;
    }
    part.powf(1.0 / config.aggression)
        .max(config.min_weight_percent / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn it_grows_from_the_least_share_to_all() {
        let mut config = SlowStart {
            window: Duration::from_secs(10),
            aggression: 1.0,
            min_weight_percent: 10.0,
        };
        for (age_ms, share) in [
            (0, 0.1),
            (500, 0.1),
            (5_000, 0.5),
            (10_000, 1.0),
            (60_000, 1.0),
        ] {
            assert_eq!(at(&config, age_ms), share, "{age_ms}");
        }
        config.aggression = 2.0;
        assert_eq!(at(&config, 2_500), 0.5, "the root of a quarter");
    }
}
