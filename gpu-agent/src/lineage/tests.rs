//! Does the index follow what an engine says, event by event?

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
                if (0..parts).all(|part| self.holds(&prefix[..prefix.len() - part * block], *block))
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
