//! What a `Lineage` is made of: engine blocks, who holds them, and where a new one goes.

use crate::event::{BlockStored, EngineHash, Extra};
use ahash::AHashMap;
use outrigger_xds::block_hash::{BlockHash, Namespace};
use outrigger_xds::report::Tier;

/// Which engine block. Groups may differ in block size under equal hashes, so the group belongs to the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct BlockKey {
    pub(super) hash: EngineHash,
    pub(super) group: u32,
}

pub(super) type NodeId = u32;

/// No node.
pub(super) const NONE: NodeId = NodeId::MAX;

/// One engine block's content. Lives while a store holds it, or while a block that shares its canonical block does.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) key: BlockKey,
    /// How many stores hold it.
    pub(super) stores: u32,
    pub(super) content: Content,
}

#[derive(Debug)]
pub(super) enum Content {
    /// One or more whole canonical blocks.
    Whole(Box<[BlockHash]>),
    /// A part of one canonical block.
    Part(Part),
}

#[derive(Debug)]
pub(super) struct Part {
    /// Chain hash before the canonical block.
    pub(super) base: BlockHash,
    /// Where in the canonical block it begins, in tokens.
    pub(super) start: usize,
    pub(super) tokens: Box<[u32]>,
    pub(super) extra: Box<[Extra]>,
    /// The canonical block's hash, in its last part.
    pub(super) closes: Option<BlockHash>,
    /// The part before; `NONE` if `start` is 0. Parts of one canonical block form trees: prompts that part ways in it
    /// share their first parts. Siblings are a doubly linked list.
    pub(super) parent: NodeId,
    pub(super) first_child: NodeId,
    pub(super) next: NodeId,
    pub(super) previous: NodeId,
}

/// One cache of the engine, as its events tell them apart.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) rank: u32,
    pub(super) tier: Tier,
    pub(super) group: u32,
    /// How many copies of each block it announced and has not removed.
    pub(super) copies: AHashMap<NodeId, u32>,
}

/// Where a new block goes.
pub(super) struct Place {
    pub(super) base: BlockHash,
    pub(super) start: usize,
    pub(super) parent: NodeId,
}

impl Place {
    pub(super) fn first(model: &str, event: &BlockStored) -> Self {
        let (model, lora, salt) = (model.to_owned(), event.lora.clone(), event.salt.clone());
        Self {
            base: Namespace { model, lora, salt }.seed(),
            start: 0,
            parent: NONE,
        }
    }
}
