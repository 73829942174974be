//! From an engine's own blocks to canonical blocks: who holds which part of which chain?
//!
//! Engines name blocks in their own ways and cut them in their own sizes. A `Lineage` re-hashes the token ids of their
//! events with our chain (`outrigger_xds::block_hash`) in blocks of one canonical size: smaller engine blocks are
//! gathered along their parents, larger ones split. The engine's hashes only say which block is meant. No IO, no order.
//!
//! What a block contains is kept once per engine; who holds it is kept per *store*: (rank, tier, group). A canonical
//! block is on a shelf (rank, tier) while at least one group there holds all its parts. Engines announce a block once
//! per physical copy, so stores count references.

mod node;

use self::node::{BlockKey, Content, NONE, Node, NodeId, Part, Place, Store};
use crate::block_extra::Items;
use crate::event::{BlockMoved, BlockRemoved, BlockStored, EngineHash, Event, Extra};
use ahash::AHashMap;
use outrigger_xds::block_hash::{BlockHash, block_hash};
use outrigger_xds::report::{KvChange, Shelf, Tier};
use std::collections::{BTreeSet, hash_map::Entry};

/// What the engines' events did that no listener sees; grows only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LineageCounts {
    /// Blocks whose parent is not known (and their descendants): they never match.
    pub unknown_parent: u64,
    /// Removals of blocks that are not tracked.
    pub unknown_removed: u64,
    /// Blocks announced without content, or with less than a canonical block's.
    pub placeholder: u64,
    /// Blocks of groups that do not attend to the whole prefix.
    pub other_attention: u64,
    /// Blocks that neither divide canonical blocks nor are made of them.
    pub unfit_size: u64,
    /// Blocks not tracked because `blocks_max` was reached.
    pub over_limit: u64,
    /// Events that contradict themselves or could not be read.
    pub malformed: u64,
    /// Event types not known.
    pub unknown_type: u64,
}

/// The blocks of one engine.
#[derive(Debug)]
pub struct Lineage {
    model: String,
    block_tokens: usize,
    blocks_max: usize,
    nodes: Vec<Option<Node>>,
    free: Vec<NodeId>,
    by_key: AHashMap<BlockKey, NodeId>,
    stores: Vec<Store>,
    shelves: Vec<(Shelf, AHashMap<BlockHash, u32>)>,
    counts: LineageCounts,
    unfit_sizes: BTreeSet<usize>,
}

impl Lineage {
    /// An empty one for an engine serving `model`, in canonical blocks of `block_tokens` tokens, tracking at most
    /// `blocks_max` engine blocks.
    #[must_use]
    pub fn new(model: impl Into<String>, block_tokens: usize, blocks_max: usize) -> Self {
        Self {
            model: model.into(),
            block_tokens: block_tokens.max(1),
            blocks_max: blocks_max.min(NONE as usize),
            nodes: Vec::new(),
            free: Vec::new(),
            by_key: AHashMap::new(),
            stores: Vec::new(),
            shelves: Vec::new(),
            counts: LineageCounts::default(),
            unfit_sizes: BTreeSet::new(),
        }
    }

    /// Applies one event of `rank`; what it changed is appended to `changes`.
    pub fn apply(&mut self, rank: u32, event: &Event, changes: &mut Vec<KvChange>) {
        match event {
            Event::Stored(stored) => self.store(rank, stored, changes),
            Event::Removed(removed) => self.remove(rank, removed, changes),
            Event::Moved(moved) => self.relocate(rank, moved, changes),
            Event::Cleared => self.clear(rank, changes),
            Event::Unknown(_) => self.counts.unknown_type += 1,
            Event::Malformed(_) => self.counts.malformed += 1,
        }
    }

    /// Forgets everything `rank` holds.
    pub fn clear(&mut self, rank: u32, changes: &mut Vec<KvChange>) {
        for index in 0..self.stores.len() {
            if self.stores[index].rank == rank {
                let copies = std::mem::take(&mut self.stores[index].copies);
                for id in copies.into_keys() {
                    self.node_mut(id).stores -= 1;
                    self.free_unused(id);
                }
            }
        }
        self.shelves.retain(|(shelf, _)| shelf.rank != rank);
        changes.push(KvChange::Cleared { rank });
    }

    /// Every canonical block held, by shelf.
    #[must_use]
    pub fn snapshot(&self) -> Vec<(Shelf, Vec<BlockHash>)> {
        self.shelves
            .iter()
            .filter(|(_, blocks)| !blocks.is_empty())
            .map(|(shelf, blocks)| (*shelf, blocks.keys().copied().collect()))
            .collect()
    }

    /// Engine blocks tracked now.
    #[must_use]
    pub fn tracked(&self) -> usize {
        self.by_key.len()
    }

    /// Tokens in a canonical block.
    #[must_use]
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// What was counted so far.
    #[must_use]
    pub fn counts(&self) -> LineageCounts {
        self.counts
    }

    /// Engine block sizes seen that cannot be turned into canonical blocks.
    #[must_use]
    pub fn unfit_sizes(&self) -> &BTreeSet<usize> {
        &self.unfit_sizes
    }

    fn store(&mut self, rank: u32, event: &BlockStored, changes: &mut Vec<KvChange>) {
        let blocks = event.hashes.len() as u64;
        if event.block_tokens == 0 || event.tokens.is_empty() {
            self.counts.placeholder += blocks;
            return;
        }
        if !event.full_attention {
            self.counts.other_attention += blocks;
            return;
        }
        // Only the last block may be shorter than the others.
        if event.tokens.len().div_ceil(event.block_tokens) != event.hashes.len() {
            self.counts.malformed += 1;
            return;
        }
        let store = self.store_index(rank, event.tier, event.group);
        let mut parent = event.parent;
        for (index, (hash, tokens)) in event
            .hashes
            .iter()
            .zip(event.tokens.chunks(event.block_tokens))
            .enumerate()
        {
            let key = BlockKey {
                hash: *hash,
                group: event.group,
            };
            let known = self.by_key.get(&key).copied();
            let extra = event.extra.get(index).map_or(&[][..], Vec::as_slice);
            if let Some(id) = known.or_else(|| self.add_node(key, parent, event, tokens, extra)) {
                self.hold(store, id, changes);
            }
            parent = Some(*hash);
        }
    }

    fn remove(&mut self, rank: u32, event: &BlockRemoved, changes: &mut Vec<KvChange>) {
        for hash in &event.hashes {
            let key = BlockKey {
                hash: *hash,
                group: event.group,
            };
            let is_meant = |store: &Store| {
                store.rank == rank
                    && store.group == event.group
                    && event.tier.is_none_or(|tier| store.tier == tier)
            };
            let held = self.by_key.get(&key).and_then(|id| {
                let holds = |store: &Store| is_meant(store) && store.copies.contains_key(id);
                Some((*id, self.stores.iter().position(holds)?))
            });
            match held {
                Some((id, store)) => self.release(store, id, changes),
                None => self.counts.unknown_removed += 1,
            }
        }
    }

    fn relocate(&mut self, rank: u32, event: &BlockMoved, changes: &mut Vec<KvChange>) {
        let key = BlockKey {
            hash: event.hash,
            group: 0,
        };
        let Some(id) = self.by_key.get(&key).copied() else {
            self.counts.unknown_removed += 1;
            return;
        };
        let (from, to) = (
            self.store_index(rank, event.from, 0),
            self.store_index(rank, event.to, 0),
        );
        if self.stores[from].copies.contains_key(&id) {
            // In this order: its content is kept as long as somebody holds it.
            self.hold(to, id, changes);
            self.release(from, id, changes);
        } else {
            self.counts.unknown_removed += 1;
        }
    }

    fn store_index(&mut self, rank: u32, tier: Tier, group: u32) -> usize {
        let found = self
            .stores
            .iter()
            .position(|store| store.rank == rank && store.tier == tier && store.group == group);
        found.unwrap_or_else(|| {
            self.stores.push(Store {
                rank,
                tier,
                group,
                copies: AHashMap::new(),
            });
            self.stores.len() - 1
        })
    }

    /// Learns a block's content; `None` (counted) if it cannot be placed in a chain.
    fn add_node(
        &mut self,
        key: BlockKey,
        parent: Option<EngineHash>,
        event: &BlockStored,
        tokens: &[u32],
        extra: &[Extra],
    ) -> Option<NodeId> {
        if self.by_key.len() >= self.blocks_max {
            self.counts.over_limit += 1;
            return None;
        }
        let place = match parent {
            None => Place::first(&self.model, event),
            Some(hash) => match self.by_key.get(&BlockKey {
                hash,
                group: key.group,
            }) {
                Some(parent) => self.place_after(*parent),
                None => {
                    self.counts.unknown_parent += 1;
                    return None;
                }
            },
        };
        let tokens = self.usable(event, tokens);
        if tokens.is_empty() {
            self.counts.placeholder += 1;
            return None;
        }
        let content = if place.start == 0 && tokens.len().is_multiple_of(self.block_tokens) {
            Content::Whole(self.split(place.base, tokens, extra))
        } else if self.block_tokens.is_multiple_of(event.block_tokens)
            && place.start + tokens.len() <= self.block_tokens
        {
            Content::Part(self.part(&place, tokens, extra))
        } else {
            self.counts.unfit_size += 1;
            self.unfit_sizes.insert(event.block_tokens);
            return None;
        };
        Some(self.insert(Node {
            key,
            stores: 0,
            content,
        }))
    }

    /// Of a last block that is not full, the canonical blocks in it: nothing comes after it that could complete another.
    fn usable<'a>(&self, event: &BlockStored, tokens: &'a [u32]) -> &'a [u32] {
        if tokens.len() < event.block_tokens && self.block_tokens < event.block_tokens {
            return &tokens[..tokens.len() - tokens.len() % self.block_tokens];
        }
        tokens
    }

    fn place_after(&self, parent: NodeId) -> Place {
        match &self.node(parent).content {
            Content::Whole(hashes) => {
                let base = *hashes
                    .last()
                    .expect("invariant: a whole block has at least one canonical block");
                Place {
                    base,
                    start: 0,
                    parent: NONE,
                }
            }
            Content::Part(Part {
                closes: Some(base), ..
            }) => Place {
                base: *base,
                start: 0,
                parent: NONE,
            },
            Content::Part(part) => Place {
                base: part.base,
                start: part.start + part.tokens.len(),
                parent,
            },
        }
    }

    /// Canonical hashes of a block that is one or more canonical blocks.
    fn split(&self, base: BlockHash, tokens: &[u32], extra: &[Extra]) -> Box<[BlockHash]> {
        let mut hash = base;
        let block = |(index, tokens): (usize, &[u32])| {
            let mut items = Items::default();
            items.add(extra, index * self.block_tokens, self.block_tokens, 0);
            hash = block_hash(hash, tokens, &items.bytes());
            hash
        };
        tokens
            .chunks_exact(self.block_tokens)
            .enumerate()
            .map(block)
            .collect()
    }

    fn part(&self, place: &Place, tokens: &[u32], extra: &[Extra]) -> Part {
        let mut part = Part {
            base: place.base,
            start: place.start,
            tokens: tokens.into(),
            extra: extra.into(),
            closes: None,
            parent: place.parent,
            first_child: NONE,
            next: NONE,
            previous: NONE,
        };
        if place.start + tokens.len() == self.block_tokens {
            part.closes = Some(self.gather(&part));
        }
        part
    }

    /// The hash of the canonical block that `last` completes.
    fn gather(&self, last: &Part) -> BlockHash {
        let mut parts = vec![last];
        let mut id = last.parent;
        while id != NONE {
            let part = self.as_part(id);
            parts.push(part);
            id = part.parent;
        }
        let mut tokens = Vec::with_capacity(self.block_tokens);
        let mut items = Items::default();
        for part in parts.iter().rev() {
            items.add(&part.extra, 0, part.tokens.len(), part.start);
            tokens.extend_from_slice(&part.tokens);
        }
        block_hash(last.base, &tokens, &items.bytes())
    }

    /// A store holds one copy more.
    fn hold(&mut self, store: usize, id: NodeId, changes: &mut Vec<KvChange>) {
        match self.stores[store].copies.entry(id) {
            Entry::Occupied(mut copies) => *copies.get_mut() += 1,
            Entry::Vacant(copies) => {
                copies.insert(1);
                self.node_mut(id).stores += 1;
                for hash in self.completed_through(store, id) {
                    self.shelve(store, hash, changes);
                }
            }
        }
    }

    /// A store holds one copy less.
    fn release(&mut self, store: usize, id: NodeId, changes: &mut Vec<KvChange>) {
        let Some(copies) = self.stores[store].copies.get_mut(&id) else {
            return;
        };
        *copies -= 1;
        if *copies > 0 {
            return;
        }
        for hash in self.completed_through(store, id) {
            self.unshelve(store, hash, changes);
        }
        self.stores[store].copies.remove(&id);
        self.node_mut(id).stores -= 1;
        self.free_unused(id);
    }

    /// Canonical blocks that contain `id` and whose every part `store` holds.
    fn completed_through(&self, store: usize, id: NodeId) -> Vec<BlockHash> {
        let holds = |id: &NodeId| self.stores[store].copies.contains_key(id);
        let part = match &self.node(id).content {
            Content::Whole(hashes) => return hashes.to_vec(),
            Content::Part(part) => part,
        };
        let mut above = part.parent;
        while above != NONE {
            if !holds(&above) {
                return Vec::new();
            }
            above = self.as_part(above).parent;
        }
        let mut found = Vec::new();
        let mut pending = vec![id];
        while let Some(id) = pending.pop() {
            let part = self.as_part(id);
            found.extend(part.closes);
            let mut child = part.first_child;
            while child != NONE {
                if holds(&child) {
                    pending.push(child);
                }
                child = self.as_part(child).next;
            }
        }
        found
    }

    fn shelf_index(&mut self, store: usize) -> usize {
        let shelf = Shelf {
            rank: self.stores[store].rank,
            tier: self.stores[store].tier,
        };
        self.shelves
            .iter()
            .position(|(known, _)| *known == shelf)
            .unwrap_or_else(|| {
                self.shelves.push((shelf, AHashMap::new()));
                self.shelves.len() - 1
            })
    }

    fn shelve(&mut self, store: usize, hash: BlockHash, changes: &mut Vec<KvChange>) {
        let index = self.shelf_index(store);
        let (shelf, blocks) = &mut self.shelves[index];
        let holders = blocks.entry(hash).or_insert(0);
        *holders += 1;
        if *holders > 1 {
            return;
        }
        match changes.last_mut() {
            Some(KvChange::Stored {
                shelf: last,
                hashes,
            }) if last == shelf => hashes.push(hash),
            _ => changes.push(KvChange::Stored {
                shelf: *shelf,
                hashes: vec![hash],
            }),
        }
    }

    fn unshelve(&mut self, store: usize, hash: BlockHash, changes: &mut Vec<KvChange>) {
        let index = self.shelf_index(store);
        let (shelf, blocks) = &mut self.shelves[index];
        let Some(holders) = blocks.get_mut(&hash) else {
            return;
        };
        *holders -= 1;
        if *holders > 0 {
            return;
        }
        blocks.remove(&hash);
        match changes.last_mut() {
            Some(KvChange::Removed {
                shelf: last,
                hashes,
            }) if last == shelf => hashes.push(hash),
            _ => changes.push(KvChange::Removed {
                shelf: *shelf,
                hashes: vec![hash],
            }),
        }
    }

    fn insert(&mut self, node: Node) -> NodeId {
        let key = node.key;
        let id = self.free.pop().unwrap_or_else(|| {
            self.nodes.push(None);
            NodeId::try_from(self.nodes.len() - 1).expect("invariant: blocks_max fits a node id")
        });
        self.nodes[id as usize] = Some(node);
        self.by_key.insert(key, id);
        self.link(id);
        id
    }

    /// Makes a part the first child of the part before it.
    fn link(&mut self, id: NodeId) {
        let Content::Part(Part { parent, .. }) = self.node(id).content else {
            return;
        };
        if parent == NONE {
            return;
        }
        let next = std::mem::replace(&mut self.as_part_mut(parent).first_child, id);
        self.as_part_mut(id).next = next;
        if next != NONE {
            self.as_part_mut(next).previous = id;
        }
    }

    /// Frees a block nobody holds or builds on, and those before it that only it kept.
    fn free_unused(&mut self, mut id: NodeId) {
        while id != NONE {
            let node = self.node(id);
            let (parent, next, previous, first_child) = match &node.content {
                Content::Whole(_) => (NONE, NONE, NONE, NONE),
                Content::Part(part) => (part.parent, part.next, part.previous, part.first_child),
            };
            if node.stores > 0 || first_child != NONE {
                return;
            }
            let key = node.key;
            if next != NONE {
                self.as_part_mut(next).previous = previous;
            }
            if previous != NONE {
                self.as_part_mut(previous).next = next;
            } else if parent != NONE {
                self.as_part_mut(parent).first_child = next;
            }
            self.by_key.remove(&key);
            self.nodes[id as usize] = None;
            self.free.push(id);
            id = parent;
        }
    }

    fn node(&self, id: NodeId) -> &Node {
        self.nodes[id as usize]
            .as_ref()
            .expect("invariant: ids in use name nodes")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id as usize]
            .as_mut()
            .expect("invariant: ids in use name nodes")
    }

    fn as_part(&self, id: NodeId) -> &Part {
        let Content::Part(part) = &self.node(id).content else {
            unreachable!("parts link to parts")
        };
        part
    }

    fn as_part_mut(&mut self, id: NodeId) -> &mut Part {
        match &mut self.node_mut(id).content {
            Content::Part(part) => part,
            Content::Whole(_) => unreachable!("parts are linked to parts only"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::block_hash::{Namespace, chain};
    use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
    use std::collections::{BTreeMap, HashMap, HashSet};
    use std::hash::{DefaultHasher, Hash, Hasher};

    const MODEL: &str = "m";

    fn seed() -> BlockHash {
        Namespace {
            model: MODEL.into(),
            ..Namespace::default()
        }
        .seed()
    }

    /// An engine's own hash of the block that ends `prefix`.
    fn engine_hash(prefix: &[u32], block: usize) -> EngineHash {
        let mut hasher = DefaultHasher::new();
        (prefix, block).hash(&mut hasher);
        EngineHash(hasher.finish())
    }

    /// The event an engine would send for blocks `range` of `prompt`.
    fn stored(prompt: &[u32], block: usize, range: std::ops::Range<usize>) -> BlockStored {
        let end = |index: usize| engine_hash(&prompt[..index * block], block);
        BlockStored {
            hashes: range.clone().map(|index| end(index + 1)).collect(),
            parent: (range.start > 0).then(|| end(range.start)),
            tokens: prompt[range.start * block..range.end * block].to_vec(),
            block_tokens: block,
            full_attention: true,
            ..BlockStored::default()
        }
    }

    fn removed(prompt: &[u32], block: usize, index: usize) -> BlockRemoved {
        BlockRemoved {
            hashes: vec![engine_hash(&prompt[..(index + 1) * block], block)],
            ..BlockRemoved::default()
        }
    }

    /// What a listener that starts empty holds after the changes; panics if a change is not one.
    #[derive(Default)]
    struct Listener(BTreeMap<Shelf, HashSet<BlockHash>>);

    impl Listener {
        fn hear(&mut self, changes: &[KvChange]) {
            for change in changes {
                match change {
                    KvChange::Stored { shelf, hashes } => {
                        for hash in hashes {
                            assert!(
                                self.0.entry(*shelf).or_default().insert(*hash),
                                "stored twice"
                            );
                        }
                    }
                    KvChange::Removed { shelf, hashes } => {
                        for hash in hashes {
                            assert!(
                                self.0.entry(*shelf).or_default().remove(hash),
                                "removed but not there"
                            );
                        }
                    }
                    KvChange::Cleared { rank } => self.0.retain(|shelf, _| shelf.rank != *rank),
                }
            }
            self.0.retain(|_, blocks| !blocks.is_empty());
        }
    }

    fn held(lineage: &Lineage) -> BTreeMap<Shelf, HashSet<BlockHash>> {
        lineage
            .snapshot()
            .into_iter()
            .map(|(shelf, blocks)| (shelf, blocks.into_iter().collect()))
            .collect()
    }

    fn on_device(lineage: &Lineage) -> HashSet<BlockHash> {
        held(lineage).remove(&Shelf::default()).unwrap_or_default()
    }

    fn apply(lineage: &mut Lineage, event: impl Into<Event>) -> Vec<KvChange> {
        let mut changes = Vec::new();
        lineage.apply(0, &event.into(), &mut changes);
        changes
    }

    impl From<BlockStored> for Event {
        fn from(event: BlockStored) -> Self {
            Self::Stored(event)
        }
    }

    impl From<BlockRemoved> for Event {
        fn from(event: BlockRemoved) -> Self {
            Self::Removed(event)
        }
    }

    fn set(hashes: &[BlockHash]) -> HashSet<BlockHash> {
        hashes.iter().copied().collect()
    }

    #[test]
    fn every_block_size_gives_the_same_chain() {
        let prompt: Vec<u32> = (0..192).collect();
        let expected = set(&chain(seed(), &prompt, 32));
        for block in [1, 8, 16, 32, 64] {
            let mut lineage = Lineage::new(MODEL, 32, 1000);
            let changes = apply(
                &mut lineage,
                stored(&prompt, block, 0..prompt.len() / block),
            );
            assert_eq!(on_device(&lineage), expected, "block size {block}");
            let KvChange::Stored { hashes, .. } = &changes[0] else {
                panic!("{changes:?}")
            };
            assert_eq!(
                *hashes,
                chain(seed(), &prompt, 32),
                "parents first, block size {block}"
            );
        }
    }

    #[test]
    fn losing_a_part_removes_and_restoring_it_brings_back() {
        let prompt: Vec<u32> = (0..64).collect();
        let expected = chain(seed(), &prompt, 32);
        let mut lineage = Lineage::new(MODEL, 32, 1000);
        apply(&mut lineage, stored(&prompt, 16, 0..4));
        let changes = apply(&mut lineage, removed(&prompt, 16, 0));
        assert_eq!(
            changes,
            [KvChange::Removed {
                shelf: Shelf::default(),
                hashes: vec![expected[0]]
            }]
        );
        assert!(
            apply(&mut lineage, removed(&prompt, 16, 1)).is_empty(),
            "it is gone already"
        );
        assert!(
            apply(&mut lineage, stored(&prompt, 16, 0..1)).is_empty(),
            "half is not whole"
        );
        let changes = apply(&mut lineage, stored(&prompt, 16, 1..2));
        assert_eq!(
            changes,
            [KvChange::Stored {
                shelf: Shelf::default(),
                hashes: vec![expected[0]]
            }]
        );
        assert_eq!(on_device(&lineage), set(&expected));
    }

    #[test]
    fn a_block_that_moves_is_kept_whoever_else_leaves() {
        let prompt: Vec<u32> = (0..64).collect();
        let mut lineage = Lineage::new(MODEL, 32, 1000);
        let mut listener = Listener::default();
        let hash = engine_hash(&prompt[..32], 32);
        let moved = |from, to| Event::Moved(BlockMoved { hash, from, to });
        let mut step = |lineage: &mut Lineage, event: Event| {
            listener.hear(&apply(lineage, event));
            assert_eq!(listener.0, held(lineage));
            let tiers = listener.0.iter();
            tiers
                .map(|(shelf, blocks)| (shelf.tier, blocks.len()))
                .collect::<Vec<_>>()
        };
        let (device, host) = (Tier::Device, Tier::Host);
        step(&mut lineage, stored(&prompt, 32, 0..2).into());
        assert_eq!(
            step(&mut lineage, moved(device, host)),
            [(device, 1), (host, 1)]
        );
        assert_eq!(
            step(&mut lineage, moved(device, host)),
            [(device, 1), (host, 1)],
            "it is not there any more"
        );
        let gone = BlockRemoved {
            hashes: vec![hash],
            tier: None,
            group: 0,
        };
        assert_eq!(
            step(&mut lineage, gone.into()),
            [(device, 1)],
            "from wherever it is"
        );
        assert_eq!(step(&mut lineage, moved(host, device)), [(device, 1)]);
        assert_eq!(lineage.counts().unknown_removed, 2);
        assert_eq!(lineage.tracked(), 1);
    }

    #[test]
    fn of_a_last_block_that_is_not_full_whole_canonical_blocks_count() {
        let prompt: Vec<u32> = (0..64).collect();
        for (tokens, canonical) in [(20, 16), (20, 32), (15, 16), (32, 16), (7, 8)] {
            let last = BlockStored {
                tokens: prompt[..tokens].to_vec(),
                ..stored(&prompt, 32, 0..1)
            };
            let mut lineage = Lineage::new(MODEL, canonical, 1000);
            apply(&mut lineage, last);
            let expected = set(&chain(seed(), &prompt[..tokens], canonical));
            assert_eq!(on_device(&lineage), expected, "{tokens} of 32, {canonical}");
            assert!(lineage.unfit_sizes().is_empty(), "{tokens} {canonical}");
        }
    }

    #[test]
    fn duplicates_are_counted_not_repeated() {
        let prompt: Vec<u32> = (0..32).collect();
        let mut lineage = Lineage::new(MODEL, 32, 1000);
        assert_eq!(apply(&mut lineage, stored(&prompt, 32, 0..1)).len(), 1);
        assert!(apply(&mut lineage, stored(&prompt, 32, 0..1)).is_empty());
        assert!(
            apply(&mut lineage, removed(&prompt, 32, 0)).is_empty(),
            "one copy is left"
        );
        assert_eq!(apply(&mut lineage, removed(&prompt, 32, 0)).len(), 1);
        assert!(apply(&mut lineage, removed(&prompt, 32, 0)).is_empty());
        assert_eq!(lineage.counts().unknown_removed, 1);
        assert_eq!(lineage.tracked(), 0);
    }

    #[test]
    fn tiers_and_ranks_are_apart_and_groups_together() {
        let prompt: Vec<u32> = (0..32).collect();
        let mut lineage = Lineage::new(MODEL, 32, 1000);
        let mut listener = Listener::default();
        let mut step = |lineage: &mut Lineage, rank, event: &Event| {
            let mut changes = Vec::new();
            lineage.apply(rank, event, &mut changes);
            listener.hear(&changes);
            assert_eq!(listener.0, held(lineage));
            listener
                .0
                .keys()
                .map(|shelf| (shelf.rank, shelf.tier))
                .collect::<Vec<_>>()
        };
        let on = |tier, group| {
            Event::Stored(BlockStored {
                tier,
                group,
                ..stored(&prompt, 32, 0..1)
            })
        };
        step(&mut lineage, 0, &on(Tier::Device, 0));
        step(&mut lineage, 0, &on(Tier::Device, 1));
        step(&mut lineage, 1, &on(Tier::Host, 0));
        let gone = |group| {
            Event::Removed(BlockRemoved {
                group,
                ..removed(&prompt, 32, 0)
            })
        };
        assert_eq!(
            step(&mut lineage, 0, &gone(0)),
            [(0, Tier::Device), (1, Tier::Host)],
            "group 1 has it still"
        );
        assert_eq!(step(&mut lineage, 0, &gone(1)), [(1, Tier::Host)]);
        step(&mut lineage, 0, &on(Tier::Device, 0));
        assert_eq!(step(&mut lineage, 1, &Event::Cleared), [(0, Tier::Device)]);
    }

    #[test]
    fn unknown_parents_and_their_descendants_never_match() {
        let prompt: Vec<u32> = (0..128).collect();
        let mut lineage = Lineage::new(MODEL, 32, 1000);
        assert!(apply(&mut lineage, stored(&prompt, 32, 1..3)).is_empty());
        assert!(apply(&mut lineage, stored(&prompt, 32, 3..4)).is_empty());
        assert_eq!(lineage.counts().unknown_parent, 3);
        assert_eq!(lineage.tracked(), 0);
    }

    #[test]
    fn unfit_sizes_placeholders_and_other_attention_are_counted() {
        let prompt: Vec<u32> = (0..96).collect();
        let mut lineage = Lineage::new(MODEL, 32, 1000);
        assert!(apply(&mut lineage, stored(&prompt, 24, 0..2)).is_empty());
        assert!(apply(&mut lineage, stored(&prompt, 48, 0..2)).is_empty());
        assert_eq!(
            lineage.unfit_sizes().iter().copied().collect::<Vec<_>>(),
            [24, 48]
        );
        let whole = stored(&prompt, 32, 0..1);
        apply(
            &mut lineage,
            BlockStored {
                block_tokens: 0,
                tokens: vec![],
                ..whole.clone()
            },
        );
        apply(
            &mut lineage,
            BlockStored {
                full_attention: false,
                ..whole.clone()
            },
        );
        apply(
            &mut lineage,
            BlockStored {
                tokens: vec![1; 65],
                ..whole
            },
        );
        let counts = lineage.counts();
        assert_eq!(
            (counts.placeholder, counts.other_attention, counts.malformed),
            (1, 1, 1)
        );
        assert!(lineage.snapshot().is_empty());
    }

    #[test]
    fn memory_is_bounded() {
        let prompt: Vec<u32> = (0..32 * 20).collect();
        let mut lineage = Lineage::new(MODEL, 32, 10);
        apply(&mut lineage, stored(&prompt, 32, 0..20));
        assert_eq!(lineage.tracked(), 10);
        assert_eq!(on_device(&lineage), set(&chain(seed(), &prompt, 32)[..10]));
        assert_eq!(lineage.counts().over_limit, 10);
        for index in 0..20 {
            apply(&mut lineage, removed(&prompt, 32, index));
        }
        assert_eq!(lineage.tracked(), 0);
        apply(&mut lineage, stored(&prompt, 32, 0..5));
        assert_eq!(
            (lineage.tracked(), lineage.nodes.len()),
            (5, 10),
            "places are used again"
        );
    }

    #[test]
    fn salt_and_lora_make_other_chains() {
        let prompt: Vec<u32> = (0..32).collect();
        let mut lineage = Lineage::new(MODEL, 32, 1000);
        let (lora, salt) = (Some("l".to_owned()), Some("s".to_owned()));
        apply(
            &mut lineage,
            BlockStored {
                lora: lora.clone(),
                salt: salt.clone(),
                ..stored(&prompt, 32, 0..1)
            },
        );
        let seed = Namespace {
            model: MODEL.into(),
            lora,
            salt,
        }
        .seed();
        assert_eq!(on_device(&lineage), set(&chain(seed, &prompt, 32)));
    }

    /// An image at prompt offset 20, 30 tokens long, as vLLM tells of it in blocks of `block` tokens.
    fn with_image(prompt: &[u32], block: usize) -> BlockStored {
        let count = prompt.len() / block;
        let touches = |index: usize| index * block < 50 && (index + 1) * block > 20;
        let extra = |index: usize| {
            let offset = 20 - i64::try_from(index * block).unwrap();
            touches(index)
                .then(|| Extra::Media {
                    offset,
                    id: "img".into(),
                })
                .into_iter()
                .collect()
        };
        BlockStored {
            extra: (0..count).map(extra).collect(),
            ..stored(prompt, block, 0..count)
        }
    }

    #[test]
    fn media_hash_alike_for_every_block_size() {
        let prompt: Vec<u32> = (0..128).collect();
        let mut extra = vec![1];
        extra.extend_from_slice(&20u32.to_le_bytes());
        extra.extend_from_slice(&3u32.to_le_bytes());
        extra.extend_from_slice(b"img");
        let mut expected = vec![block_hash(seed(), &prompt[..32], &extra)];
        for index in 1..4 {
            expected.push(block_hash(
                expected[index - 1],
                &prompt[index * 32..][..32],
                &[],
            ));
        }
        for block in [1, 8, 16, 32, 64] {
            let mut lineage = Lineage::new(MODEL, 32, 1000);
            apply(&mut lineage, with_image(&prompt, block));
            assert_eq!(on_device(&lineage), set(&expected), "block size {block}");
        }
    }

    /// A store that only remembers copies of engine blocks, and works out the canonical ones from scratch.
    #[derive(Default)]
    struct Naive {
        copies: HashMap<(Vec<u32>, usize), u32>,
    }

    impl Naive {
        fn holds(&self, prefix: &[u32], block: usize) -> bool {
            self.copies.contains_key(&(prefix.to_vec(), block))
        }

        fn canonical(&self) -> HashSet<BlockHash> {
            let mut found = HashSet::new();
            for (prefix, block) in self.copies.keys() {
                let hashes = chain(seed(), prefix, 32);
                if *block >= 32 {
                    found.extend(&hashes[hashes.len() - block / 32..]);
                } else if prefix.len().is_multiple_of(32) {
                    let parts = 32 / block;
                    if (0..parts)
                        .all(|part| self.holds(&prefix[..prefix.len() - part * block], *block))
                    {
                        found.extend(hashes.last());
                    }
                }
            }
            found
        }
    }

    fn random_step(
        rng: &mut StdRng,
        prompts: &[Vec<u32>],
        block: usize,
        naive: &mut Naive,
        lineage: &mut Lineage,
    ) -> Vec<KvChange> {
        let prompt = prompts.choose(rng).unwrap();
        let blocks = prompt.len() / block;
        if rng.random_bool(0.5) {
            let start = rng.random_range(0..blocks);
            // An engine stores after what it holds; unknown parents have their own test.
            let start = (0..=start)
                .rev()
                .find(|start| *start == 0 || naive.holds(&prompt[..start * block], block))
                .unwrap();
            let end = rng.random_range(start + 1..=(start + 1 + 64 / block).min(blocks));
            for index in start..end {
                *naive
                    .copies
                    .entry((prompt[..(index + 1) * block].to_vec(), block))
                    .or_default() += 1;
            }
            apply(lineage, stored(prompt, block, start..end))
        } else {
            let index = rng.random_range(0..blocks);
            let key = (prompt[..(index + 1) * block].to_vec(), block);
            if let Some(copies) = naive.copies.get_mut(&key) {
                *copies -= 1;
                if *copies == 0 {
                    naive.copies.remove(&key);
                }
            }
            apply(lineage, removed(prompt, block, index))
        }
    }

    #[test]
    fn agrees_with_a_naive_model_under_random_histories() {
        for (case, block) in [1, 8, 16, 32, 64].into_iter().cycle().take(20).enumerate() {
            let mut rng = StdRng::seed_from_u64(case as u64);
            // Prompts that share prefixes, parting at random places.
            let mut prompts: Vec<Vec<u32>> = vec![(0..128).collect()];
            for id in 1..6u32 {
                let mut prompt = prompts.choose(&mut rng).unwrap().clone();
                let fork = rng.random_range(0..prompt.len());
                prompt[fork..]
                    .iter_mut()
                    .for_each(|token| *token = id * 1000 + *token % 1000);
                prompts.push(prompt);
            }
            let (mut lineage, mut naive, mut listener) = (
                Lineage::new(MODEL, 32, 100_000),
                Naive::default(),
                Listener::default(),
            );
            for step in 0..150 {
                let changes = random_step(&mut rng, &prompts, block, &mut naive, &mut lineage);
                listener.hear(&changes);
                let heard = listener
                    .0
                    .get(&Shelf::default())
                    .cloned()
                    .unwrap_or_default();
                assert_eq!(
                    heard,
                    naive.canonical(),
                    "case {case}, block size {block}, step {step}"
                );
                assert_eq!(
                    listener.0,
                    held(&lineage),
                    "the snapshot says what the changes said"
                );
            }
            for (prefix, block) in std::mem::take(&mut naive.copies)
                .into_iter()
                .flat_map(|(key, copies)| vec![key; copies as usize])
            {
                apply(
                    &mut lineage,
                    removed(&prefix, block, prefix.len() / block - 1),
                );
            }
            assert_eq!(
                (lineage.tracked(), lineage.snapshot().len()),
                (0, 0),
                "nothing is left behind"
            );
        }
    }

    #[test]
    fn clearing_frees_everything() {
        let prompt: Vec<u32> = (0..96).collect();
        for block in [1, 16, 32] {
            let mut lineage = Lineage::new(MODEL, 32, 1000);
            apply(&mut lineage, stored(&prompt, block, 0..96 / block));
            assert_eq!(
                apply(&mut lineage, Event::Cleared),
                [KvChange::Cleared { rank: 0 }]
            );
            assert_eq!((lineage.tracked(), lineage.snapshot().len()), (0, 0));
        }
    }
}
