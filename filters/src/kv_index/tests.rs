//! The index against a naive one, over random histories of several engines; and its limits.

use super::*;
use std::collections::{BTreeMap, BTreeSet};

/// The index as one would write it without caring for speed.
#[derive(Default)]
struct Naive {
    blocks: BTreeSet<(usize, Shelf, BlockHash)>,
}

impl Naive {
    fn apply(&mut self, slot: usize, change: &KvChange) {
        match change {
            KvChange::Stored { shelf, hashes } => {
                self.blocks
                    .extend(hashes.iter().map(|hash| (slot, *shelf, *hash)));
            }
            KvChange::Removed { shelf, hashes } => {
                for hash in hashes {
                    self.blocks.remove(&(slot, *shelf, *hash));
                }
            }
            KvChange::Cleared { rank } => self
                .blocks
                .retain(|(at, shelf, _)| *at != slot || shelf.rank != *rank),
        }
    }

    fn overlaps(&self, chain: &[BlockHash]) -> Vec<Overlap> {
        let keys: BTreeSet<(usize, u32)> = self
            .blocks
            .iter()
            .map(|(slot, shelf, _)| (*slot, shelf.rank))
            .collect();
        let mut all = Vec::new();
        for (slot, rank) in keys {
            let mut at = 0;
            let mut run = |tier: Tier| {
                let held =
                    |hash: &&BlockHash| self.blocks.contains(&(slot, Shelf { rank, tier }, **hash));
                let length = chain[at..].iter().take_while(held).count();
                at += length;
                length as u32
            };
            let (device, host_extra, disk_extra, remote_extra) = (
                run(Tier::Device),
                run(Tier::Host),
                run(Tier::Disk),
                run(Tier::Remote),
            );
            let overlap = Overlap {
                slot,
                rank,
                device,
                host_extra,
                disk_extra,
                remote_extra,
            };
            if overlap.blocks() > 0 {
                all.push(overlap);
            }
        }
        all
    }
}

/// Deterministic by seed, so that a failure can be had again.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }

    fn shelf(&mut self) -> Shelf {
        let tier = [
            Tier::Device,
            Tier::Device,
            Tier::Host,
            Tier::Disk,
            Tier::Remote,
        ][self.roll(5) as usize];
        Shelf {
            rank: self.roll(2) as u32,
            tier,
        }
    }

    /// A piece of one of a few long prompts that share their beginnings.
    fn piece(&mut self, chains: &[Vec<BlockHash>]) -> Vec<BlockHash> {
        let chain = &chains[self.roll(chains.len() as u64) as usize];
        let start = self.roll(chain.len() as u64) as usize;
        let start = if self.roll(3) == 0 { 0 } else { start };
        let length = 1 + self.roll(12) as usize;
        chain[start..(start + length).min(chain.len())].to_vec()
    }
}

fn chains() -> Vec<Vec<BlockHash>> {
    let shared: Vec<u64> = (0..6).map(|i| xxhash_rust::xxh3::xxh3_64(&[i])).collect();
    (0..5u8)
        .map(|tail| {
            let own = (0..14u8).map(|i| xxhash_rust::xxh3::xxh3_64(&[tail, i]));
            shared.iter().copied().chain(own).collect()
        })
        .collect()
}

fn engine(index: usize) -> EngineId {
    EngineId(format!("node-{index}").into())
}

#[test]
fn equals_the_naive_model_under_random_changes() {
    let chains = chains();
    for seed in 1..=12 {
        let mut dice = Dice(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
        let index = KvIndex::default();
        let mut naive = Naive::default();
        let slots: Vec<usize> = (0..4).map(|i| index.slot(&engine(i))).collect();
        let mut out = Overlaps::default();
        for step in 0..400 {
            let slot = slots[dice.roll(4) as usize];
            match dice.roll(40) {
                0 => {
                    index.clear(slot);
                    naive.blocks.retain(|(at, ..)| *at != slot);
                }
                1 => {
                    let shelves: BTreeMap<Shelf, Vec<BlockHash>> = (0..3)
                        .map(|_| (dice.shelf(), dice.piece(&chains)))
                        .collect();
                    let shelves: Vec<_> = shelves.into_iter().collect();
                    naive.blocks.retain(|(at, ..)| *at != slot);
                    for (shelf, hashes) in &shelves {
                        naive
                            .blocks
                            .extend(hashes.iter().map(|hash| (slot, *shelf, *hash)));
                    }
                    index.replace(
                        slot,
                        &KvSnapshot {
                            block_tokens: 32,
                            shelves,
                            complete: true,
                        },
                    );
                }
                kind => {
                    let (shelf, hashes) = (dice.shelf(), dice.piece(&chains));
                    let change = match kind {
                        2 => KvChange::Cleared { rank: shelf.rank },
                        3..15 => KvChange::Removed { shelf, hashes },
                        _ => KvChange::Stored { shelf, hashes },
                    };
                    index.apply(slot, &change);
                    naive.apply(slot, &change);
                }
            }
            for chain in &chains {
                index.overlaps(chain, &mut out);
                assert_eq!(out.all(), naive.overlaps(chain), "seed {seed}, step {step}");
            }
        }
        let counted: u64 = slots.iter().map(|slot| index.blocks(*slot)).sum();
        assert_eq!(counted, naive.blocks.len() as u64, "seed {seed}");
    }
}

fn stored(tier: Tier, hashes: &[BlockHash]) -> KvChange {
    KvChange::Stored {
        shelf: Shelf { rank: 0, tier },
        hashes: hashes.to_vec(),
    }
}

fn removed(hashes: &[BlockHash]) -> KvChange {
    KvChange::Removed {
        shelf: Shelf::default(),
        hashes: hashes.to_vec(),
    }
}

fn device(index: &KvIndex, chain: &[BlockHash], slot: usize) -> u32 {
    let mut out = Overlaps::default();
    index.overlaps(chain, &mut out);
    out.of(slot).first().map_or(0, |overlap| overlap.device)
}

#[test]
fn a_hole_ends_the_prefix_and_its_return_brings_the_rest_back() {
    let chain = &chains()[0];
    let index = KvIndex::default();
    let slot = index.slot(&engine(0));
    index.apply(slot, &stored(Tier::Device, chain));
    index.apply(slot, &removed(&chain[7..8]));
    assert_eq!(device(&index, chain, slot), 7);
    index.apply(slot, &stored(Tier::Device, &chain[7..8]));
    assert_eq!(device(&index, chain, slot), chain.len() as u32);
}

#[test]
fn lower_tiers_continue_and_are_never_left_again_for_a_higher_one() {
    let chain = &chains()[0];
    let index = KvIndex::default();
    let slot = index.slot(&engine(0));
    index.apply(slot, &stored(Tier::Device, &chain[..3]));
    index.apply(slot, &stored(Tier::Host, &chain[2..6]));
    index.apply(slot, &stored(Tier::Remote, &chain[6..9]));
    index.apply(slot, &stored(Tier::Device, &chain[9..]));
    let mut out = Overlaps::default();
    index.overlaps(chain, &mut out);
    let expected = Overlap {
        slot,
        rank: 0,
        device: 3,
        host_extra: 3,
        disk_extra: 0,
        remote_extra: 3,
    };
    assert_eq!(out.all(), [expected]);
}

#[test]
fn a_slot_is_stable_and_reused_only_after_removal() {
    let chain = &chains()[0];
    let index = KvIndex::default();
    let first = index.slot(&engine(0));
    let second = index.slot(&engine(1));
    assert_eq!(index.slot(&engine(0)), first);
    index.apply(first, &stored(Tier::Device, chain));
    index.apply(second, &stored(Tier::Device, &chain[..2]));
    index.remove(first);
    index.apply(first, &stored(Tier::Device, chain));
    assert_eq!(
        device(&index, chain, first),
        0,
        "nothing is stored for a slot that was removed"
    );
    let third = index.slot(&engine(2));
    assert_eq!(third, first, "freed slots are used again");
    assert_eq!(device(&index, chain, third), 0, "and begin empty");
    assert_eq!(
        device(&index, chain, second),
        2,
        "others keep what they had"
    );
}

#[test]
fn beyond_its_limit_it_drops_new_blocks_and_stays_exact_for_the_old() {
    let chain = &chains()[0];
    let index = KvIndex::new(Limits {
        blocks_max: 5,
        ..Limits::default()
    });
    let slot = index.slot(&engine(0));
    index.apply(slot, &stored(Tier::Device, chain));
    assert_eq!(index.blocks(slot), 5);
    assert_eq!(device(&index, chain, slot), 5);
    index.apply(slot, &removed(&chain[..2]));
    index.apply(slot, &stored(Tier::Device, &chain[..1]));
    assert_eq!(
        device(&index, chain, slot),
        1,
        "room that was freed is used again"
    );
}

#[test]
fn ranks_beyond_the_index_are_dropped() {
    let index = KvIndex::default();
    let slot = index.slot(&engine(0));
    index.apply(
        slot,
        &KvChange::Stored {
            shelf: Shelf {
                rank: 1 << 14,
                tier: Tier::Device,
            },
            hashes: vec![1],
        },
    );
    assert_eq!(index.blocks(slot), 0);
}
