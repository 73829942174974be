//! Answers "which KV blocks does this engine hold": the pool of blocks with its prefix cache.
//!
//! Blocks of running requests are counted; free ones keep their content until they are needed, the longest unused
//! first, and of one request the tail before its head. It knows nothing of requests or time. Hashes are the
//! simulator's own chain; no engine and no part of the product computes the same.

use std::collections::{BTreeMap, HashMap};

use super::events::Event;
use super::model::mix;

/// Index of a physical block.
pub(crate) type BlockId = usize;

/// Hash of a block: its parent's hash (or the salt of the first one) and its tokens.
pub(crate) fn block_hash(parent: Option<u64>, salt: Option<&str>, tokens: &[u32]) -> u64 {
    let mut hash = parent.unwrap_or(0x51ed_270b);
    if let (None, Some(salt)) = (parent, salt) {
        hash = salt
            .bytes()
            .fold(mix(hash), |hash, byte| mix(hash ^ u64::from(byte)));
    }
    tokens
        .iter()
        .fold(mix(hash), |hash, &token| mix(hash ^ u64::from(token)))
}

#[derive(Clone, Default)]
struct Block {
    users: u32,
    hash: Option<u64>,
    /// Place in the free list while nobody uses the block.
    free_at: Option<u64>,
}

/// All blocks of an engine.
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    /// Free blocks by the moment they became free: the first is taken next.
    free: BTreeMap<u64, BlockId>,
    cached: HashMap<u64, Vec<BlockId>>,
    clock: u64,
    /// Events since the last step's batch.
    pub(crate) events: Vec<Event>,
}

impl BlockPool {
    /// A pool of `count` blocks, of which one is never given out, as vLLM keeps a null block.
    pub(crate) fn new(count: usize) -> Self {
        let mut pool = Self {
            blocks: vec![Block::default(); count],
            free: BTreeMap::new(),
            cached: HashMap::new(),
            clock: 0,
            events: Vec::new(),
        };
        (1..count).for_each(|id| pool.push_free(id));
        pool
    }

    fn push_free(&mut self, id: BlockId) {
        self.clock += 1;
        self.blocks[id].free_at = Some(self.clock);
        self.free.insert(self.clock, id);
    }

    /// Share of blocks in use by requests, 0 to 1.
    pub(crate) fn usage(&self) -> f64 {
        let all = self.blocks.len() - 1;
        (all - self.free.len()) as f64 / all as f64
    }

    /// Blocks that hold the longest prefix of `hashes`.
    pub(crate) fn find_prefix(&self, hashes: &[u64]) -> Vec<BlockId> {
        hashes
            .iter()
            .map_while(|hash| self.cached.get(hash)?.first().copied())
            .collect()
    }

    /// How many blocks are left to give out once `hit` is taken into use.
    pub(crate) fn free_beside(&self, hit: &[BlockId]) -> usize {
        self.free.len()
            - hit
                .iter()
                .filter(|&&id| self.blocks[id].free_at.is_some())
                .count()
    }

    /// Takes cached blocks into use.
    pub(crate) fn take(&mut self, ids: &[BlockId]) {
        for &id in ids {
            if let Some(at) = self.blocks[id].free_at.take() {
                self.free.remove(&at);
            }
            self.blocks[id].users += 1;
        }
    }

    /// Gives out `count` blocks, removing what they cached; `None` and no change if there are not enough.
    pub(crate) fn allocate(&mut self, count: usize) -> Option<Vec<BlockId>> {
        if self.free.len() < count {
            return None;
        }
        let ids: Vec<BlockId> = self.free.values().take(count).copied().collect();
        for &id in &ids {
            self.evict(id);
        }
        self.take(&ids);
        Some(ids)
    }

    fn evict(&mut self, id: BlockId) {
        let Some(hash) = self.blocks[id].hash.take() else {
            return;
        };
        if let Some(holders) = self.cached.get_mut(&hash) {
            holders.retain(|&holder| holder != id);
            if holders.is_empty() {
                self.cached.remove(&hash);
            }
        }
        self.events.push(Event::Removed { hash });
    }

    /// Names the content of a block in use. Two blocks may hold the same content.
    pub(crate) fn cache(&mut self, id: BlockId, hash: u64) {
        self.blocks[id].hash = Some(hash);
        self.cached.entry(hash).or_default().push(id);
    }

    /// Gives blocks back, the tail first, so that it is evicted first.
    pub(crate) fn release(&mut self, ids: &[BlockId]) {
        for &id in ids.iter().rev() {
            self.blocks[id].users -= 1;
            if self.blocks[id].users == 0 {
                self.push_free(id);
            }
        }
    }

    /// Forgets all cached content; refused while a request holds a block.
    pub(crate) fn clear(&mut self) -> bool {
        if self.blocks.iter().any(|block| block.users > 0) {
            return false;
        }
        self.cached.clear();
        self.blocks.iter_mut().for_each(|block| block.hash = None);
        self.events.push(Event::Cleared);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn removed(pool: &mut BlockPool) -> Vec<u64> {
        let hash = |event| match event {
            Event::Removed { hash } => Some(hash),
            Event::Stored { .. } | Event::Cleared => None,
        };
        std::mem::take(&mut pool.events)
            .into_iter()
            .filter_map(hash)
            .collect()
    }

    #[test]
    fn the_tail_of_the_oldest_request_is_evicted_first() {
        let mut pool = BlockPool::new(6);
        let ids = pool.allocate(4).expect("room");
        ids.iter()
            .zip(10..)
            .for_each(|(&id, hash)| pool.cache(id, hash));
        pool.release(&ids);
        assert_eq!(pool.find_prefix(&[10, 11, 12, 13, 14]), ids);
        pool.allocate(3).expect("room");
        assert_eq!(removed(&mut pool), [13, 12]);
        assert_eq!(pool.find_prefix(&[10, 11, 12, 13]).len(), 2);
    }

    #[test]
    fn used_blocks_stay_and_a_full_pool_refuses() {
        let mut pool = BlockPool::new(4);
        let ids = pool.allocate(2).expect("room");
        ids.iter()
            .zip(7..)
            .for_each(|(&id, hash)| pool.cache(id, hash));
        pool.take(&ids);
        pool.release(&ids);
        assert!(pool.allocate(2).is_none());
        assert!(!pool.clear());
        assert_eq!(pool.usage(), 2.0 / 3.0);
        pool.release(&ids);
        assert!(pool.clear());
        assert_eq!(pool.find_prefix(&[7]), Vec::<BlockId>::new());
    }

    #[test]
    fn equal_content_in_two_blocks_is_removed_once_for_each() {
        let mut pool = BlockPool::new(3);
        let ids = pool.allocate(2).expect("room");
        ids.iter().for_each(|&id| pool.cache(id, 5));
        pool.release(&ids);
        pool.allocate(1).expect("room");
        assert_eq!(pool.find_prefix(&[5]).len(), 1);
        pool.allocate(1).expect("room");
        assert_eq!(removed(&mut pool), [5, 5]);
    }
}
