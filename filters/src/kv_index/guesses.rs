//! What this router sent where: a guess at caches that nobody tells us of.
//!
//! Used for engines without KV events, and for prompts whose token ids cannot be had. Keys are hashes of any chain
//! (token blocks or blocks of bytes); they never mix with what engines told. Bounded, oldest forgotten; an engine that
//! was restarted or evicted a block is still guessed to have it, which costs one detour and no error.

use super::BlockHash;
use crate::tokens::cache::Cache;

/// Endpoints remembered per block, latest first.
const HOLDERS_MAX: usize = 4;
/// Blocks remembered of one prompt; a longer prefix tells candidates apart no better.
const CHAIN_BLOCKS_MAX: usize = 1024;
const NOBODY: u32 = u32::MAX;

pub(super) struct Guesses {
    cache: Cache<BlockHash, [u32; HOLDERS_MAX]>,
}

impl Guesses {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            cache: Cache::new(bytes_max),
        }
    }

    /// A prompt with these blocks went to the engine in `slot`.
    pub(super) fn remember(&self, chain: &[BlockHash], slot: usize) {
        let slot = slot as u32;
        let mut forgot = false;
        for hash in chain.iter().take(CHAIN_BLOCKS_MAX) {
            let mut holders = self.cache.get(hash).unwrap_or([NOBODY; HOLDERS_MAX]);
            let at = holders
                .iter()
                .position(|holder| *holder == slot)
                .unwrap_or(HOLDERS_MAX - 1);
            holders[..=at].rotate_right(1);
            holders[0] = slot;
            forgot |= self
                .cache
                .insert(*hash, holders, size_of::<[u32; HOLDERS_MAX]>());
        }
        if forgot {
            metrics::counter!("outrigger_kv_guesses_evictions_total").increment(1);
        }
    }

    /// How many blocks from the first on each engine was sent before; those with none are left out.
    pub(super) fn prefixes(&self, chain: &[BlockHash]) -> Vec<(usize, u32)> {
        let mut runs: Vec<(usize, u32)> = Vec::new();
        for (depth, hash) in chain.iter().take(CHAIN_BLOCKS_MAX).enumerate() {
            let Some(holders) = self.cache.get(hash) else {
                break;
            };
            let holders = holders
                .iter()
                .filter(|holder| **holder != NOBODY)
                .map(|holder| *holder as usize);
            if depth == 0 {
                runs.extend(holders.map(|holder| (holder, 1)));
                continue;
            }
            let mut grown = false;
            for holder in holders {
                if let Some((_, run)) = runs
                    .iter_mut()
                    .find(|(slot, run)| *slot == holder && *run as usize == depth)
                {
                    *run += 1;
                    grown = true;
                }
            }
            if !grown {
                break;
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_guessed_where_it_was_sent() {
        let guesses = Guesses::new(1 << 20);
        assert_eq!(guesses.prefixes(&[1, 2, 3]), []);
        guesses.remember(&[1, 2, 3], 7);
        guesses.remember(&[1, 2, 9], 8);
        let mut runs = guesses.prefixes(&[1, 2, 3, 4]);
        runs.sort_unstable();
        assert_eq!(runs, [(7, 3), (8, 2)]);
        assert_eq!(
            guesses.prefixes(&[2, 3]),
            [(8, 1), (7, 2)],
            "a chain is its hashes, whoever begins it"
        );
    }

    #[test]
    fn the_latest_holders_of_a_block_are_kept() {
        let guesses = Guesses::new(1 << 20);
        for slot in 0..6 {
            guesses.remember(&[1], slot);
        }
        guesses.remember(&[1], 3);
        let slots: Vec<usize> = guesses
            .prefixes(&[1])
            .into_iter()
            .map(|(slot, _)| slot)
            .collect();
        assert_eq!(slots, [3, 5, 4, 2]);
    }
}
