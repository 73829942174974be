//! How long something took, many times: anybody notes it, with one atomic, and somebody takes the median now and then.

use std::{
    fmt,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

/// Of each doubling.
const STEPS: usize = 4;
/// 2^6 microseconds are the first that are told apart, 2^30 (18 minutes) the last.
const FIRST_POWER: u32 = 6;
const BUCKETS: usize = STEPS * 24;

/// Samples by their size: an eighth of a value is not told apart.
pub struct Samples([AtomicU32; BUCKETS]);

impl Default for Samples {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU32::new(0)))
    }
}

impl fmt::Debug for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Samples")
    }
}

impl Samples {
    /// One more.
    pub fn note(&self, took: Duration) {
        self.0[bucket(took)].fetch_add(1, Relaxed);
    }

    /// How many there were, and their median; it begins anew.
    pub fn take(&self) -> (u64, Duration) {
        let counts: Vec<u64> = self
            .0
            .iter()
            .map(|count| u64::from(count.swap(0, Relaxed)))
            .collect();
        let all: u64 = counts.iter().sum();
        let mut seen = 0;
        let middle = counts.iter().position(|count| {
            seen += count;
            2 * seen >= all
        });
        (
            all,
            middle.filter(|_| all > 0).map_or(Duration::ZERO, value),
        )
    }
}

fn bucket(took: Duration) -> usize {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    if micros < 1 << FIRST_POWER {
        return 0;
    }
    let power = micros.ilog2();
    let step = (micros >> (power - 2)) as usize & (STEPS - 1);
    ((power - FIRST_POWER) as usize * STEPS + step).min(BUCKETS - 1)
}

/// The middle of a bucket.
fn value(bucket: usize) -> Duration {
    let power = FIRST_POWER + (bucket / STEPS) as u32;
    let steps = (STEPS + bucket % STEPS) as u64;
    let step = 1_u64 << (power - 2);
    Duration::from_micros(steps * step + step / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_found_within_an_eighth_and_once() {
        let samples = Samples::default();
        assert_eq!(samples.take(), (0, Duration::ZERO));
        for (low, high) in [(3, 900), (40, 41), (1_000, 100_000)] {
            for _ in 0..11 {
                samples.note(Duration::from_millis(low));
            }
            for _ in 0..10 {
                samples.note(Duration::from_millis(high));
            }
            let (count, median) = samples.take();
            assert_eq!(count, 21);
            let off = median.as_secs_f64() * 1e3 / low as f64;
            assert!((0.875..=1.125).contains(&off), "{median:?} for {low} ms");
            assert_eq!(samples.take().0, 0, "it began anew");
        }
    }

    #[test]
    fn no_time_is_too_short_or_too_long() {
        let samples = Samples::default();
        for took in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
            samples.note(took);
        }
        assert_eq!(samples.take().0, 3);
        let mut last = Duration::ZERO;
        for at in 0..BUCKETS {
            assert_eq!(bucket(value(at)), at);
            assert!(value(at) > last);
            last = value(at);
        }
    }
}
