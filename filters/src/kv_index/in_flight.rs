//! Which prompt blocks this proxy itself has in flight at which engine.
//!
//! What it answers: of a prompt, how many blocks belong to a request of ours that the engine has not finished, and so
//! take no new room there. What other proxies have in flight is not known here; their number is told, their names are
//! not. Exact for what was entered: a block counts as long as any request with it is in flight.

use super::BlockHash;
use ahash::AHashMap;
use arc_swap::ArcSwap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How many requests in flight have a block. Closed under prefixes: requests enter chains from their first block on.
#[derive(Default)]
struct Counts(Mutex<AHashMap<BlockHash, u32>>);

impl Counts {
    fn lock(&self) -> MutexGuard<'_, AHashMap<BlockHash, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// By slot.
#[derive(Default)]
pub(super) struct InFlight {
    slots: ArcSwap<Vec<Arc<Counts>>>,
}

/// What is in flight at one engine, seen by a request that might go there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shared {
    /// Blocks of the prompt that requests in flight have as well, from its first on.
    pub prefix: u32,
    /// Distinct blocks of all requests in flight.
    pub distinct: u64,
}

impl InFlight {
    pub(super) fn enter(&self, slot: usize, blocks: Arc<[BlockHash]>) -> Flight {
        let mut slots = self.slots.load_full();
        if slots.len() <= slot {
            self.slots.rcu(|slots| {
                let mut more = Vec::clone(slots);
                more.resize_with(more.len().max(slot + 1), Arc::default);
                more
            });
            slots = self.slots.load_full();
        }
        let counts = slots[slot].clone();
        let mut held = counts.lock();
        for block in &*blocks {
            *held.entry(*block).or_default() += 1;
        }
        drop(held);
        Flight { counts, blocks }
    }

    pub(super) fn shared(&self, slot: usize, chain: &[BlockHash]) -> Shared {
        let slots = self.slots.load();
        let Some(counts) = slots.get(slot) else {
            return Shared::default();
        };
        let held = counts.lock();
        if held.is_empty() {
            return Shared::default();
        }
        // What is held of a chain is a prefix of it, so its end can be searched for.
        let prefix = chain.partition_point(|block| held.contains_key(block));
        Shared {
            prefix: prefix as u32,
            distinct: held.len() as u64,
        }
    }

    /// The slot goes to another engine. Requests that are still in flight end against the old account.
    pub(super) fn forget(&self, slot: usize) {
        if slot < self.slots.load().len() {
            self.slots.rcu(|slots| {
                let mut fresh = Vec::clone(slots);
                fresh[slot] = Arc::default();
                fresh
            });
        }
    }
}

/// The blocks of one request in flight, until dropped.
pub struct Flight {
    counts: Arc<Counts>,
    blocks: Arc<[BlockHash]>,
}

impl Flight {
    /// Its blocks.
    #[must_use]
    pub fn blocks(&self) -> Arc<[BlockHash]> {
        self.blocks.clone()
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let mut held = self.counts.lock();
        for block in &*self.blocks {
            if let Some(count) = held.get_mut(block) {
                *count -= 1;
                if *count == 0 {
                    held.remove(block);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(prefix: u32, distinct: u64) -> Shared {
        Shared { prefix, distinct }
    }

    #[test]
    fn a_block_is_in_flight_as_long_as_any_request_has_it() {
        let table = InFlight::default();
        assert_eq!(table.shared(3, &[1, 2]), shared(0, 0));
        let first = table.enter(3, [1, 2, 3].into());
        let second = table.enter(3, [1, 2, 9].into());
        assert_eq!(table.shared(3, &[1, 2, 3, 4]), shared(3, 4));
        assert_eq!(table.shared(3, &[7]), shared(0, 4));
        assert_eq!(table.shared(2, &[1]), shared(0, 0), "of another engine");
        drop(first);
        assert_eq!(table.shared(3, &[1, 2, 3, 4]), shared(2, 3));
        drop(second);
        assert_eq!(table.shared(3, &[1, 2, 3, 4]), shared(0, 0));
    }

    #[test]
    fn a_slot_that_changed_hands_knows_nothing_of_its_former_engine() {
        let table = InFlight::default();
        let old = table.enter(0, [1, 2].into());
        table.forget(0);
        table.forget(9);
        let new = table.enter(0, [1].into());
        drop(old);
        assert_eq!(table.shared(0, &[1, 2]), shared(1, 1));
        drop(new);
        assert_eq!(table.shared(0, &[1, 2]), shared(0, 0));
    }
}
