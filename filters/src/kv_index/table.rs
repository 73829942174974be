//! The table under the index: block hash to holders, in shards, and the walk along a chain.

use super::{BlockHash, Overlap, Shelf, Tier};
use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{BuildHasherDefault, Hasher},
    sync::{PoisonError, RwLock, RwLockWriteGuard},
};

/// An engine's slot (16 bits), rank (14) and tier (2) in one word, ordered as named.
pub(super) type Holder = u32;

/// Engines one index can tell apart.
pub(super) const SLOTS_MAX: usize = 1 << 16;
/// Data-parallel ranks of one engine it can tell apart.
const RANKS_MAX: u32 = 1 << 14;
/// Locks; a writer holds one of them for one block.
const SHARDS: usize = 64;

/// The word for a shelf; `None` if its rank is beyond [`RANKS_MAX`].
pub(super) fn holder(slot: usize, shelf: Shelf) -> Option<Holder> {
    (shelf.rank < RANKS_MAX && slot < SLOTS_MAX)
        .then(|| ((slot as u32) << 16) | (shelf.rank << 2) | tier_bits(shelf.tier))
}

pub(super) fn is_slot(holder: Holder, slot: usize) -> bool {
    (holder >> 16) as usize == slot
}

pub(super) fn is_rank(holder: Holder, slot: usize, rank: u32) -> bool {
    is_slot(holder, slot) && (holder >> 2) & (RANKS_MAX - 1) == rank
}

fn tier_bits(tier: Tier) -> u32 {
    match tier {
        Tier::Device => 0,
        Tier::Host => 1,
        Tier::Disk => 2,
        Tier::Remote => 3,
    }
}

/// Block hashes are hashes already.
#[derive(Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// Who holds a block: ordered, never empty. Most blocks have one holder, which needs no allocation.
enum Holders {
    One(Holder),
    #[expect(
        clippy::box_collection,
        reason = "keeps the table's entries at 24 bytes; several holders are the rare case"
    )]
    Many(Box<Vec<Holder>>),
}

impl Holders {
    fn as_slice(&self) -> &[Holder] {
        match self {
            Self::One(holder) => std::slice::from_ref(holder),
            Self::Many(holders) => holders,
        }
    }

    fn insert(&mut self, new: Holder) -> bool {
        let Err(at) = self.as_slice().binary_search(&new) else {
            return false;
        };
        match self {
            Self::One(old) => {
                let pair = if at == 0 {
                    vec![new, *old]
                } else {
                    vec![*old, new]
                };
                *self = Self::Many(Box::new(pair));
            }
            Self::Many(holders) => holders.insert(at, new),
        }
        true
    }

    /// Keeps those that `keep` wants; says how many went and whether any is left.
    fn retain(&mut self, mut keep: impl FnMut(Holder) -> bool) -> (u64, bool) {
        match self {
            Self::One(holder) => {
                let stays = keep(*holder);
                (u64::from(!stays), stays)
            }
            Self::Many(holders) => {
                let before = holders.len();
                holders.retain(|holder| keep(*holder));
                let gone = (before - holders.len()) as u64;
                let left = !holders.is_empty();
                if let [last] = holders[..] {
                    *self = Self::One(last);
                }
                (gone, left)
            }
        }
    }
}

type Shard = HashMap<BlockHash, Holders, BuildHasherDefault<AsIs>>;

pub(super) struct Table {
    shards: Box<[RwLock<Shard>]>,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
        }
    }
}

impl Table {
    pub(super) fn insert(&self, hash: BlockHash, holder: Holder) -> bool {
        let mut shard = self.write(hash);
        match shard.entry(hash) {
            Entry::Occupied(mut known) => known.get_mut().insert(holder),
            Entry::Vacant(vacant) => {
                vacant.insert(Holders::One(holder));
                true
            }
        }
    }

    pub(super) fn remove(&self, hash: BlockHash, holder: Holder) -> bool {
        let mut shard = self.write(hash);
        let Entry::Occupied(mut known) = shard.entry(hash) else {
            return false;
        };
        let (gone, left) = known.get_mut().retain(|other| other != holder);
        if !left {
            known.remove();
        }
        gone > 0
    }

    pub(super) fn contains(&self, hash: BlockHash, holder: Holder) -> bool {
        let shard = self
            .shard(hash)
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        shard
            .get(&hash)
            .is_some_and(|holders| holders.as_slice().binary_search(&holder).is_ok())
    }

    /// Drops every pair that `keep` does not want, a shard at a time; says how many went.
    pub(super) fn retain(&self, mut keep: impl FnMut(BlockHash, Holder) -> bool) -> u64 {
        let mut total = 0;
        for shard in &self.shards {
            let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
            shard.retain(|hash, holders| {
                let (gone, left) = holders.retain(|holder| keep(*hash, holder));
                total += gone;
                left
            });
            if shard.len() < shard.capacity() / 4 {
                shard.shrink_to_fit();
            }
        }
        total
    }

    /// Follows `chain` until nobody holds the next block.
    pub(super) fn walk(&self, chain: &[BlockHash], walk: &mut Walk, found: &mut Vec<Overlap>) {
        walk.live.clear();
        for (depth, hash) in chain.iter().enumerate() {
            let shard = self
                .shard(*hash)
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            let Some(holders) = shard.get(hash) else {
                return;
            };
            if depth == 0 {
                walk.begin(holders.as_slice(), found);
            } else {
                walk.step(holders.as_slice(), found);
            }
            if walk.live.is_empty() {
                return;
            }
        }
    }

    fn write(&self, hash: BlockHash) -> RwLockWriteGuard<'_, Shard> {
        self.shard(hash)
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn shard(&self, hash: BlockHash) -> &RwLock<Shard> {
        // The table inside uses the low bits for its buckets and the top seven for its tags.
        &self.shards[(hash >> 40) as usize % SHARDS]
    }
}

/// Runs that still grow: index into `found`, and the tier they have come to. Ordered as `found`.
#[derive(Debug, Default)]
pub(super) struct Walk {
    live: Vec<(usize, u32)>,
}

impl Walk {
    /// The first block: every holder begins a run on the highest tier it has it on.
    fn begin(&mut self, holders: &[Holder], found: &mut Vec<Overlap>) {
        let mut previous = None;
        for holder in holders {
            let key = holder >> 2;
            if previous == Some(key) {
                continue;
            }
            previous = Some(key);
            let mut overlap = Overlap {
                slot: (key >> 14) as usize,
                rank: key & (RANKS_MAX - 1),
                ..Overlap::default()
            };
            count(&mut overlap, holder & 3);
            self.live.push((found.len(), holder & 3));
            found.push(overlap);
        }
    }

    /// One more block: a run goes on in its tier, or else in the next lower one that has the block, or ends.
    fn step(&mut self, holders: &[Holder], found: &mut [Overlap]) {
        let mut rest = holders;
        self.live.retain_mut(|(index, tier)| {
            let overlap = &mut found[*index];
            let first = ((overlap.slot as u32) << 16) | (overlap.rank << 2) | *tier;
            rest = &rest[rest.partition_point(|holder| *holder < first)..];
            let Some(holder) = rest.first().filter(|holder| **holder >> 2 == first >> 2) else {
                return false;
            };
            *tier = holder & 3;
            count(overlap, *tier);
            true
        });
    }
}

fn count(overlap: &mut Overlap, tier: u32) {
    *match tier {
        0 => &mut overlap.device,
        1 => &mut overlap.host_extra,
        2 => &mut overlap.disk_extra,
        _ => &mut overlap.remote_extra,
    } += 1;
}
