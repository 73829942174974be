//! A map bounded in bytes that forgets what was not used for long.
//!
//! Two generations: what is used moves to the young one; when the young one has grown to half the limit, the old one
//! is dropped and the young takes its place. Every operation is a lookup or two; nothing is ever scanned.

use ahash::AHashMap;
use std::{
    hash::Hash,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// The map. `weight` of an entry is what the caller says, in bytes.
pub(crate) struct Cache<K, V> {
    generations: Mutex<Generations<K, V>>,
    bytes_max: usize,
}

struct Generations<K, V> {
    young: AHashMap<K, (V, usize)>,
    young_bytes: usize,
    old: AHashMap<K, (V, usize)>,
}

/// What one entry costs beside its own weight.
const ENTRY_BYTES: usize = 64;

impl<K: Hash + Eq, V: Clone> Cache<K, V> {
    pub(crate) fn new(bytes_max: usize) -> Self {
        let generations = Generations {
            young: AHashMap::new(),
            young_bytes: 0,
            old: AHashMap::new(),
        };
        Self {
            generations: Mutex::new(generations),
            bytes_max,
        }
    }

    pub(crate) fn get(&self, key: &K) -> Option<V> {
        let mut generations = self.lock();
        if let Some((value, _)) = generations.young.get(key) {
            return Some(value.clone());
        }
        let (key, (value, weight)) = generations.old.remove_entry(key)?;
        self.put(&mut generations, key, value.clone(), weight);
        Some(value)
    }

    /// Adds or replaces; says whether this made it forget older entries.
    pub(crate) fn insert(&self, key: K, value: V, weight: usize) -> bool {
        let mut generations = self.lock();
        generations.old.remove(&key);
        self.put(&mut generations, key, value, weight)
    }

    fn put(&self, generations: &mut Generations<K, V>, key: K, value: V, weight: usize) -> bool {
        generations.young_bytes += weight + ENTRY_BYTES;
        if let Some((_, replaced)) = generations.young.insert(key, (value, weight)) {
            generations.young_bytes -= replaced + ENTRY_BYTES;
        }
        if generations.young_bytes <= self.bytes_max / 2 {
            return false;
        }
        generations.young_bytes = 0;
        let forgotten = std::mem::take(&mut generations.young);
        !std::mem::replace(&mut generations.old, forgotten).is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Generations<K, V>> {
        self.generations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_keeps_what_is_used_and_stays_bounded() {
        let cache = Cache::new(100 * (ENTRY_BYTES + 8));
        let mut forgot = false;
        for key in 0..1000u32 {
            forgot |= cache.insert(key, key, 8);
            assert_eq!(cache.get(&0), Some(0), "used all the time, at {key}");
            let generations = cache.lock();
            assert!(generations.young.len() + generations.old.len() <= 101);
        }
        assert!(forgot);
        assert_eq!(cache.get(&500), None);
        assert_eq!(cache.get(&999), Some(999));
    }

    #[test]
    fn replacing_does_not_count_twice() {
        let cache = Cache::new(10 * (ENTRY_BYTES + 8));
        for round in 0..100u32 {
            assert!(!cache.insert(1, round, 8));
        }
        assert_eq!(cache.get(&1), Some(99));
    }
}
