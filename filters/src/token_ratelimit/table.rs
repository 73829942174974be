//! All buckets of all keys, in this process; outlives pushes of configuration.
//!
//! Clients choose keys (which may be secrets, and long), so a hash of 128 bits, secret to this process, stands for each,
//! and there is a bound: where it is reached, the key that was not used for longest is forgotten.

use super::Over;
use crate::bucket::Bucket;
use ahash::{AHashMap, RandomState};
use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Most keys, over all limits.
pub const KEYS_MAX: usize = 65_536;
const SHARDS: usize = 64;
const MINUTE: Duration = Duration::from_secs(60);

/// Per minute; 0 is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rates {
    pub(super) requests: u32,
    pub(super) tokens: u32,
}

/// The buckets of one key.
#[derive(Debug)]
pub(super) struct Buckets {
    rates: Rates,
    pub(super) requests: Option<Bucket>,
    pub(super) tokens: Option<Bucket>,
    used_at_ns: AtomicI64,
}

impl Buckets {
    fn new(rates: Rates, now: i64) -> Self {
        let bucket = |per_minute: u32| {
            (per_minute > 0).then(|| Bucket::full(per_minute.into(), per_minute.into(), MINUTE))
        };
        Self {
            rates,
            requests: bucket(rates.requests),
            tokens: bucket(rates.tokens),
            used_at_ns: AtomicI64::new(now),
        }
    }

    /// More than the bucket ever holds would never pass: then all of it is enough.
    fn bounded(bucket: &Bucket, tokens: u64) -> f64 {
        (tokens as f64).min(bucket.max())
    }

    pub(super) fn take(&self, tokens: u64, now: i64) -> Result<(), Over> {
        if let Some(bucket) = &self.requests {
            bucket.take(1.0, now).map_err(Over::Requests)?;
        }
        if let Some(bucket) = &self.tokens
            && let Err(wait) = bucket.take(Self::bounded(bucket, tokens), now)
        {
            if let Some(requests) = &self.requests {
                requests.settle(-1.0, now);
            }
            return Err(Over::Tokens(wait));
        }
        Ok(())
    }

    /// As if it had never been taken.
    pub(super) fn give_back(&self, tokens: u64, now: i64) {
        if let Some(bucket) = &self.requests {
            bucket.settle(-1.0, now);
        }
        self.correct(tokens, 0, now);
    }

    /// `used` instead of `taken` tokens.
    pub(super) fn correct(&self, taken: u64, used: u64, now: i64) {
        if let Some(bucket) = &self.tokens {
            bucket.settle(used as f64 - Self::bounded(bucket, taken), now);
        }
    }
}

/// Stands for a key.
type Hash = (u64, u64);
type Shard = RwLock<AHashMap<Hash, Arc<Buckets>>>;

/// The table.
pub struct Table {
    shards: Vec<Shard>,
    hashers: [RandomState; 2],
    keys_max: usize,
}

impl Default for Table {
    fn default() -> Self {
        Self::with_keys_max(KEYS_MAX)
    }
}

impl Table {
    /// One that keeps about so many keys: the bound is of each of 64 shards.
    #[must_use]
    pub fn with_keys_max(keys_max: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            hashers: [RandomState::new(), RandomState::new()],
            keys_max: keys_max.div_ceil(SHARDS),
        }
    }

    /// The buckets of a key; new and full if it has none, or had others (the limit was changed).
    pub(super) fn buckets(&self, key: &str, rates: Rates, now: i64) -> Arc<Buckets> {
        let [first, second] = &self.hashers;
        let key: Hash = (first.hash_one(key), second.hash_one(key));
        let shard = &self.shards[(key.0 % SHARDS as u64) as usize];
        let known = shard.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(buckets) = known.get(&key).filter(|known| known.rates == rates) {
            buckets.used_at_ns.store(now, Relaxed);
            return buckets.clone();
        }
        drop(known);
        let mut known = shard.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(buckets) = known.get(&key).filter(|known| known.rates == rates) {
            return buckets.clone();
        }
        if known.len() >= self.keys_max && !known.contains_key(&key) {
            forget_oldest(&mut known);
        }
        let buckets = Arc::new(Buckets::new(rates, now));
        if known.insert(key, buckets.clone()).is_none() {
            metrics::gauge!("outrigger_token_ratelimit_keys").increment(1.0);
        }
        buckets
    }
}

fn forget_oldest(known: &mut AHashMap<Hash, Arc<Buckets>>) {
    let oldest = known
        .iter()
        .min_by_key(|(_, buckets)| buckets.used_at_ns.load(Relaxed))
        .map(|(key, _)| *key);
    if let Some(oldest) = oldest {
        known.remove(&oldest);
        metrics::gauge!("outrigger_token_ratelimit_keys").decrement(1.0);
        metrics::counter!("outrigger_token_ratelimit_keys_evicted_total").increment(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket::now_ns;

    const RATES: Rates = Rates {
        requests: 2,
        tokens: 100,
    };

    #[test]
    fn a_key_keeps_its_buckets_until_its_limit_changes() {
        let table = Table::default();
        let now = now_ns();
        assert!(table.buckets("a", RATES, now).take(90, now).is_ok());
        let again = table.buckets("a", RATES, now);
        assert!(matches!(again.take(20, now), Err(Over::Tokens(_))));
        assert!(
            again.take(10, now).is_ok(),
            "what did not pass took no request"
        );
        assert!(matches!(again.take(0, now), Err(Over::Requests(_))));
        again.give_back(10, now);
        again.correct(90, 0, now);
        assert!(
            again.take(1000, now).is_ok(),
            "more than it holds takes all"
        );
        let other = Rates {
            tokens: 50,
            ..RATES
        };
        assert!(table.buckets("a", other, now).take(1, now).is_ok());
    }

    #[test]
    fn the_key_that_was_idle_longest_is_forgotten() {
        let table = Table::with_keys_max(1);
        let now = now_ns();
        let all = |table: &Table| -> usize {
            let shards = table.shards.iter();
            shards.map(|shard| shard.read().unwrap().len()).sum()
        };
        for index in 0..1000 {
            let _ = table.buckets(&format!("k{index}"), RATES, now + index);
        }
        assert!(all(&table) <= SHARDS, "{}", all(&table));
        assert!(
            table
                .buckets("k999", RATES, now + 1000)
                .take(100, now)
                .is_ok()
        );
        let kept = table.buckets("k999", RATES, now + 1000);
        assert!(kept.take(1, now).is_err(), "the newest was kept");
    }
}
