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
mod tests;
