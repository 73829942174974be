//! Who holds which KV blocks: the index behind prefix routing.
//!
//! What it answers: for a prompt's chain of block hashes, how long a prefix each engine (and data-parallel rank)
//! holds, tier by tier. A block hash names its whole prefix, so a table from hash to holders is exact, holes included:
//! a block evicted in the middle ends the prefix there, and its return brings the rest back. What it does not do:
//! score, know about load, or read engines' own hashes (the feed speaks canonical blocks).

mod guesses;
mod in_flight;
mod table;

use ahash::AHashMap;
use guesses::Guesses;
use in_flight::InFlight;
pub use in_flight::{Flight, Shared};
use metrics::Gauge;
use outrigger_xds::{
    block_hash::BlockHash,
    report::{EngineId, KvChange, KvSnapshot, Shelf, Tier},
};
use std::{
    collections::VecDeque,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};
use table::Table;

/// Limits of one index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most (block, holder) pairs kept, some 40 bytes each; further ones are dropped and counted in
    /// `outrigger_kv_index_overflow_total`. A dropped block only shortens what is predicted.
    pub blocks_max: u64,
    /// Most bytes of what this router remembers of its own routing, for engines that tell nothing.
    pub guesses_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            blocks_max: 16 << 20,
            guesses_bytes_max: 32 << 20,
        }
    }
}

/// How much of a prompt one engine's rank holds, in canonical blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Overlap {
    /// The engine's slot.
    pub slot: usize,
    /// Data-parallel rank.
    pub rank: u32,
    /// Contiguous from the first block, in device memory.
    pub device: u32,
    /// Contiguous from where `device` ends, in host memory.
    pub host_extra: u32,
    /// Contiguous from where the former ends, on disk.
    pub disk_extra: u32,
    /// Contiguous from where the former ends, elsewhere.
    pub remote_extra: u32,
}

impl Overlap {
    /// Blocks on all tiers together.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.device + self.host_extra + self.disk_extra + self.remote_extra
    }
}

/// The answer to one lookup: those that hold at least one block, by slot and rank. Reusable.
#[derive(Debug, Default)]
pub struct Overlaps {
    found: Vec<Overlap>,
    walk: table::Walk,
}

impl Overlaps {
    /// All of them, ordered by slot, then rank.
    #[must_use]
    pub fn all(&self) -> &[Overlap] {
        &self.found
    }

    /// Those of one engine, by rank.
    #[must_use]
    pub fn of(&self, slot: usize) -> &[Overlap] {
        let start = self.found.partition_point(|overlap| overlap.slot < slot);
        let length = self.found[start..].partition_point(|overlap| overlap.slot == slot);
        &self.found[start..start + length]
    }
}

/// One engine's place.
struct Place {
    name: EngineId,
    blocks: AtomicU64,
    gauge: Gauge,
}

#[derive(Default)]
struct Places {
    by_name: AHashMap<EngineId, usize>,
    by_slot: Vec<Option<Place>>,
    /// Oldest first, so that a freed slot rests as long as possible before another engine gets it.
    free: VecDeque<usize>,
}

/// The index. Changes of one engine must come in order, from one task at a time; lookups may come from anywhere.
pub struct KvIndex {
    table: Table,
    guesses: Guesses,
    in_flight: InFlight,
    places: RwLock<Places>,
    blocks: AtomicU64,
    limits: Limits,
}

impl Default for KvIndex {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl KvIndex {
    /// An empty index.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let guesses = Guesses::new(limits.guesses_bytes_max);
        Self {
            table: Table::default(),
            guesses,
            in_flight: InFlight::default(),
            places: RwLock::default(),
            blocks: AtomicU64::new(0),
            limits,
        }
    }

    /// The slot of an engine, given on first sight and kept until [`KvIndex::remove`].
    ///
    /// # Panics
    /// With more than 65,536 engines at once.
    pub fn slot(&self, engine: &EngineId) -> usize {
        if let Some(slot) = self.read().by_name.get(engine) {
            return *slot;
        }
        let mut places = self.write();
        if let Some(slot) = places.by_name.get(engine) {
            return *slot;
        }
        let slot = places.free.pop_front().unwrap_or(places.by_slot.len());
        assert!(
            slot < table::SLOTS_MAX,
            "invariant: a fleet has fewer engines than the index has slots"
        );
        let gauge = metrics::gauge!("outrigger_kv_index_blocks", "engine" => engine.0.to_string());
        gauge.set(0.0);
        let place = Place {
            name: engine.clone(),
            blocks: AtomicU64::new(0),
            gauge,
        };
        if slot == places.by_slot.len() {
            places.by_slot.push(Some(place));
        } else {
            places.by_slot[slot] = Some(place);
        }
        places.by_name.insert(engine.clone(), slot);
        slot
    }

    /// Applies one change of an engine's cache. Of a slot that was removed, nothing.
    pub fn apply(&self, slot: usize, change: &KvChange) {
        let places = self.read();
        let Some(place) = places.place(slot) else {
            return;
        };
        match change {
            KvChange::Stored { shelf, hashes } => self.store(place, slot, *shelf, hashes),
            KvChange::Removed { shelf, hashes } => {
                let Some(holder) = table::holder(slot, *shelf) else {
                    return;
                };
                let gone = hashes
                    .iter()
                    .filter(|hash| self.table.remove(**hash, holder))
                    .count();
                self.lost(place, gone as u64);
            }
            KvChange::Cleared { rank } => {
                let gone = self
                    .table
                    .retain(|_, holder| !table::is_rank(holder, slot, *rank));
                self.lost(place, gone);
            }
        }
    }

    /// Replaces all that is known of an engine's cache. What both know stays there throughout.
    pub fn replace(&self, slot: usize, snapshot: &KvSnapshot) {
        let places = self.read();
        let Some(place) = places.place(slot) else {
            return;
        };
        let mut keep: AHashMap<table::Holder, ahash::AHashSet<BlockHash>> = AHashMap::new();
        for (shelf, hashes) in &snapshot.shelves {
            let Some(holder) = table::holder(slot, *shelf) else {
                continue;
            };
            keep.entry(holder).or_default().extend(hashes);
        }
        let gone = self.table.retain(|hash, holder| {
            !table::is_slot(holder, slot)
                || keep
                    .get(&holder)
                    .is_some_and(|hashes| hashes.contains(&hash))
        });
        self.lost(place, gone);
        for (shelf, hashes) in &snapshot.shelves {
            self.store(place, slot, *shelf, hashes);
        }
    }

    /// Forgets all blocks of an engine: it restarted, or it can no longer be heard.
    pub fn clear(&self, slot: usize) {
        let places = self.read();
        let Some(place) = places.place(slot) else {
            return;
        };
        let gone = self.table.retain(|_, holder| !table::is_slot(holder, slot));
        self.lost(place, gone);
    }

    /// Forgets the engine itself; its slot may go to another one.
    pub fn remove(&self, slot: usize) {
        let mut places = self.write();
        let Some(place) = places.by_slot.get_mut(slot).and_then(Option::take) else {
            return;
        };
        places.by_name.remove(&place.name);
        self.in_flight.forget(slot);
        places.free.push_back(slot);
        // Still under the write lock: nobody can store for this slot until its old blocks are gone.
        let gone = self.table.retain(|_, holder| !table::is_slot(holder, slot));
        self.lost(&place, gone);
    }

    /// Blocks known of one engine, over all its ranks and tiers.
    #[must_use]
    pub fn blocks(&self, slot: usize) -> u64 {
        self.read()
            .place(slot)
            .map_or(0, |place| place.blocks.load(Relaxed))
    }

    /// How long a prefix of `chain` each engine holds. A device run is continued by host memory, that by disk, that by
    /// what lies elsewhere; the run of a tier is never resumed.
    pub fn overlaps(&self, chain: &[BlockHash], out: &mut Overlaps) {
        out.found.clear();
        self.table.walk(chain, &mut out.walk, &mut out.found);
    }

    /// Remembers that a prompt with these blocks went to the engine in `slot`: for engines that tell no KV events, and
    /// for chains that are not made of tokens.
    pub fn guess(&self, chain: &[BlockHash], slot: usize) {
        self.guesses.remember(chain, slot);
    }

    /// Contiguous blocks of `chain` by slot, as guessed from what was sent; slots with none are left out.
    #[must_use]
    pub fn guessed(&self, chain: &[BlockHash]) -> Vec<(usize, u32)> {
        self.guesses.prefixes(chain)
    }

    /// A request with these blocks, from its prompt's first on, is in flight at the engine in `slot` until the answer is
    /// dropped.
    #[must_use]
    pub fn enter(&self, slot: usize, blocks: Arc<[BlockHash]>) -> Flight {
        self.in_flight.enter(slot, blocks)
    }

    /// What of `chain` requests of this proxy have in flight at the engine in `slot`.
    #[must_use]
    pub fn in_flight(&self, slot: usize, chain: &[BlockHash]) -> Shared {
        self.in_flight.shared(slot, chain)
    }

    fn store(&self, place: &Place, slot: usize, shelf: Shelf, hashes: &[BlockHash]) {
        let Some(holder) = table::holder(slot, shelf) else {
            metrics::counter!("outrigger_kv_index_overflow_total", "limit" => "ranks")
                .increment(hashes.len() as u64);
            return;
        };
        let room = self
            .limits
            .blocks_max
            .saturating_sub(self.blocks.load(Relaxed));
        let mut new = 0;
        let mut dropped = 0;
        for hash in hashes {
            if new < room {
                new += u64::from(self.table.insert(*hash, holder));
            } else if !self.table.contains(*hash, holder) {
                dropped += 1;
            }
        }
        self.blocks.fetch_add(new, Relaxed);
        place
            .gauge
            .set((place.blocks.fetch_add(new, Relaxed) + new) as f64);
        if dropped > 0 {
            metrics::counter!("outrigger_kv_index_overflow_total", "limit" => "blocks")
                .increment(dropped);
        }
    }

    fn lost(&self, place: &Place, gone: u64) {
        self.blocks.fetch_sub(gone, Relaxed);
        place
            .gauge
            .set((place.blocks.fetch_sub(gone, Relaxed) - gone) as f64);
    }

    fn read(&self) -> RwLockReadGuard<'_, Places> {
        self.places.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Places> {
        self.places.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Places {
    fn place(&self, slot: usize) -> Option<&Place> {
        self.by_slot.get(slot).and_then(Option::as_ref)
    }
}

#[cfg(test)]
mod tests;
