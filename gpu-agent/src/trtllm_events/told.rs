//! One answer of `/kv_cache_events`, as text: which blocks did the engine say it stored, moved or removed?
//!
//! It knows only what events show by themselves: how many tokens a block has, and which of several attention windows is
//! the widest. The order of events is its caller's business.

use crate::event::{BlockMoved, BlockRemoved, BlockStored, EngineHash, Event, Extra};
use outrigger_xds::report::Tier;
use serde::Deserialize;
use serde_json::value::RawValue;

/// What earlier answers showed of the engine's blocks.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Sizes {
    /// The widest attention window; 0 before any is known. Only blocks of that one say what the engine holds of a
    /// prompt: in a narrower one it forgets what the window has left behind.
    pub(super) window: u64,
    /// Tokens in a full block.
    block_tokens: usize,
}

impl Sizes {
    /// Learns from the blocks of one event. All but its last are full; of one alone it is known that full ones have a
    /// power of two.
    fn learn(&mut self, blocks: &[Block<'_>]) {
        let shown = match blocks {
            [] => 0,
            [one] => one.tokens.len().next_power_of_two(),
            [first, ..] => first.tokens.len(),
        };
        self.block_tokens = self.block_tokens.max(shown);
    }
}

/// An answer.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) events: Vec<Numbered>,
    /// Elements that are no events.
    pub(super) garbage: u64,
}

/// An element of the answer.
#[derive(Debug, PartialEq)]
pub(super) struct Numbered {
    pub(super) id: u64,
    pub(super) rank: u32,
    /// What it says of blocks; several where blocks of one event are not all alike.
    pub(super) events: Vec<Event>,
}

#[derive(Deserialize)]
struct Element<'a> {
    event_id: u64,
    #[serde(default)]
    window_size: Option<u64>,
    #[serde(default)]
    attention_dp_rank: Option<u32>,
    #[serde(borrow)]
    data: &'a RawValue,
}

/// All kinds of `data` in one: which fields there are depends on `type`.
#[derive(Deserialize)]
struct Data<'a> {
    #[serde(rename = "type", borrow)]
    kind: std::borrow::Cow<'a, str>,
    #[serde(default)]
    parent_hash: Option<Hash>,
    #[serde(default, borrow)]
    blocks: Option<Vec<Block<'a>>>,
    #[serde(default)]
    block_hashes: Option<Vec<Hash>>,
    #[serde(default)]
    block_hash: Option<Hash>,
    #[serde(default)]
    cache_level: Option<LevelChange>,
}

#[derive(Deserialize)]
struct Block<'a> {
    block_hash: Hash,
    tokens: Vec<Token>,
    #[serde(default)]
    cache_level: u32,
    #[serde(default, borrow)]
    mm_keys: Option<Vec<MediaKey<'a>>>,
    /// In newer versions.
    #[serde(default, borrow)]
    cache_salt: Option<std::borrow::Cow<'a, str>>,
    /// In newer versions.
    #[serde(default)]
    lora_id: Option<u64>,
}

#[derive(Deserialize)]
struct Token {
    token_id: u64,
    /// What beside the id distinguishes it, for ids that stand for something else.
    #[serde(default)]
    token_extra_id: u64,
}

#[derive(Deserialize)]
struct MediaKey<'a> {
    #[serde(borrow)]
    hash: std::borrow::Cow<'a, str>,
    /// How much of the medium earlier blocks hold.
    #[serde(default)]
    start_offset: i64,
}

#[derive(Deserialize)]
struct LevelChange {
    old_value: u32,
    new_value: u32,
}

/// A block's name: a number, or the digits of a digest.
#[derive(Deserialize, Clone)]
#[serde(untagged)]
enum Hash {
    Unsigned(u64),
    Signed(i64),
    Digits(String),
}

impl Hash {
    fn name(&self) -> Option<EngineHash> {
        match self {
            Self::Unsigned(number) => Some(EngineHash(*number)),
            Self::Signed(number) => Some(EngineHash(number.cast_unsigned())),
            Self::Digits(digits) => {
                let last = digits.get(digits.len().saturating_sub(16)..)?;
                u64::from_str_radix(last, 16).ok().map(EngineHash)
            }
        }
    }
}

/// Reads an answer.
///
/// # Errors
/// If it is no list. An element that cannot be read is counted, one of which only the number can be read is malformed.
pub(super) fn read(body: &[u8], sizes: &mut Sizes) -> Result<Told, serde_json::Error> {
    let elements: Vec<Option<&RawValue>> = serde_json::from_slice(body)?;
    // An engine without events may say so with a null.
    let elements = elements.into_iter().flatten();
    let mut told = Told::default();
    let mut read = Vec::new();
    for element in elements {
        match serde_json::from_str::<Element<'_>>(element.get()) {
            Ok(element) => read.push(element),
            Err(_) => told.garbage += 1,
        }
    }
    // An engine that began anew may be of another model or configuration; its queue has nothing of the one before.
    if read.iter().any(|element| element.event_id == 0) {
        *sizes = Sizes::default();
    }
    let windows = read.iter().filter_map(|element| element.window_size);
    sizes.window = windows.fold(sizes.window, u64::max);
    told.events = read
        .iter()
        .map(|element| numbered(element, sizes))
        .collect();
    Ok(told)
}

fn numbered(element: &Element<'_>, sizes: &mut Sizes) -> Numbered {
    let is_widest = element
        .window_size
        .is_none_or(|window| window == sizes.window);
    Numbered {
        id: element.event_id,
        rank: element.attention_dp_rank.unwrap_or(0),
        events: match serde_json::from_str::<Data<'_>>(element.data.get()) {
            Ok(data) => events(&data, is_widest, sizes),
            Err(_) => vec![Event::Malformed("data")],
        },
    }
}

fn events(data: &Data<'_>, is_widest: bool, sizes: &mut Sizes) -> Vec<Event> {
    match data.kind.as_ref() {
        "created" => Vec::new(),
        "stored" => stored(data, is_widest, sizes),
        // What is told of a narrower window's blocks was not indexed.
        "removed" | "updated" if !is_widest => Vec::new(),
        "removed" => vec![removed(data)],
        "updated" => updated(data),
        other => vec![Event::Unknown(other.chars().take(64).collect())],
    }
}

fn stored(data: &Data<'_>, is_widest: bool, sizes: &mut Sizes) -> Vec<Event> {
    let Some(blocks) = &data.blocks else {
        return vec![Event::Malformed("blocks")];
    };
    let mut parent = match data.parent_hash.as_ref().map(Hash::name) {
        None => None,
        Some(Some(parent)) => Some(parent),
        Some(None) => return vec![Event::Malformed("parent_hash")],
    };
    if is_widest {
        sizes.learn(blocks);
    }
    let mut events = Vec::with_capacity(blocks.len());
    for block in blocks {
        let Some(hash) = block.block_hash.name() else {
            events.push(Event::Malformed("block_hash"));
            break;
        };
        events.push(Event::Stored(BlockStored {
            hashes: vec![hash],
            parent,
            tokens: block.tokens.iter().map(Token::id).collect(),
            block_tokens: sizes.block_tokens.max(block.tokens.len()),
            lora: block.lora_id.map(|id| format!("#{id}")),
            salt: block.cache_salt.as_deref().map(str::to_owned),
            tier: tier(block.cache_level),
            group: 0,
            full_attention: is_widest,
            extra: extra(block),
        }));
        parent = Some(hash);
    }
    events
}

impl Token {
    /// Ids wider than 32 bits are folded, as `event` folds them.
    fn id(&self) -> u32 {
        let wide = self.token_id;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "folding both halves is the point"
        )]
        u32::try_from(wide).unwrap_or((wide ^ (wide >> 32)) as u32)
    }
}

/// What beside token ids distinguishes a block; empty if nothing does.
fn extra(block: &Block<'_>) -> Vec<Vec<Extra>> {
    let media = block.mm_keys.iter().flatten().map(|key| Extra::Media {
        offset: key.start_offset.saturating_neg(),
        id: key.hash.clone().into_owned(),
    });
    let of_tokens = block
        .tokens
        .iter()
        .filter(|token| token.token_extra_id != 0)
        .map(|token| Extra::Opaque(token.token_extra_id.to_be_bytes().to_vec()));
    let all: Vec<Extra> = media.chain(of_tokens).collect();
    match all.is_empty() {
        true => Vec::new(),
        false => vec![all],
    }
}

fn removed(data: &Data<'_>) -> Event {
    let hashes = data
        .block_hashes
        .as_ref()
        .and_then(|hashes| hashes.iter().map(Hash::name).collect());
    match hashes {
        Some(hashes) => Event::Removed(BlockRemoved {
            hashes,
            tier: None,
            group: 0,
        }),
        None => Event::Malformed("block_hashes"),
    }
}

/// A change of priority alone moves nothing.
fn updated(data: &Data<'_>) -> Vec<Event> {
    let Some(change) = &data.cache_level else {
        return Vec::new();
    };
    match data.block_hash.as_ref().and_then(Hash::name) {
        Some(_) if change.old_value == change.new_value => Vec::new(),
        Some(hash) => vec![Event::Moved(BlockMoved {
            hash,
            from: tier(change.old_value),
            to: tier(change.new_value),
        })],
        None => vec![Event::Malformed("block_hash")],
    }
}

/// Levels count away from the engine's device.
fn tier(level: u32) -> Tier {
    match level {
        0 => Tier::Device,
        1 => Tier::Host,
        _ => Tier::Disk,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn element(id: u64, window: u64, data: &str) -> String {
        format!(r#"{{"event_id":{id},"data":{data},"window_size":{window}}}"#)
    }

    fn block(hash: u64, tokens: usize, level: u32) -> String {
        let tokens: Vec<String> = (0..tokens)
            .map(|id| format!(r#"{{"type":"unique_token","token_id":{id},"token_extra_id":0}}"#))
            .collect();
        let tokens = tokens.join(",");
        format!(
            r#"{{"type":"stored_block","block_hash":{hash},"tokens":[{tokens}],"cache_level":{level},"priority":35}}"#
        )
    }

    fn stored(parent: &str, blocks: &[String]) -> String {
        let blocks = blocks.join(",");
        format!(r#"{{"type":"stored","parent_hash":{parent},"blocks":[{blocks}]}}"#)
    }

    fn told(elements: &[String], sizes: &mut Sizes) -> Vec<Event> {
        let told = read(format!("[{}]", elements.join(",")).as_bytes(), sizes).unwrap();
        assert_eq!(told.garbage, 0);
        told.events
            .into_iter()
            .flat_map(|numbered| numbered.events)
            .collect()
    }

    fn blocks(events: &[Event]) -> Vec<(u64, Option<u64>, usize, usize, Tier, bool)> {
        let of = |event: &Event| match event {
            Event::Stored(stored) => (
                stored.hashes[0].0,
                stored.parent.map(|parent| parent.0),
                stored.tokens.len(),
                stored.block_tokens,
                stored.tier,
                stored.full_attention,
            ),
            other => panic!("{other:?}"),
        };
        events.iter().map(of).collect()
    }

    #[test]
    fn blocks_follow_each_other_and_say_how_large_full_ones_are() {
        let mut sizes = Sizes::default();
        let alone = told(
            &[element(0, 9, &stored("null", &[block(1, 20, 0)]))],
            &mut sizes,
        );
        let device = Tier::Device;
        assert_eq!(blocks(&alone), [(1, None, 20, 32, device, true)]);
        let chain = [block(2, 64, 0), block(u64::MAX, 64, 1), block(3, 7, 0)];
        let events = told(&[element(1, 9, &stored("77", &chain))], &mut sizes);
        assert_eq!(
            blocks(&events),
            [
                (2, Some(77), 64, 64, device, true),
                (u64::MAX, Some(2), 64, 64, Tier::Host, true),
                (3, Some(u64::MAX), 7, 64, device, true)
            ]
        );
    }

    #[test]
    fn only_the_widest_window_counts() {
        let mut sizes = Sizes::default();
        let created = r#"{"type":"created","num_blocks_per_cache_level":[10,0]}"#;
        let removed = r#"{"type":"removed","block_hashes":[1]}"#;
        let first = told(
            &[
                element(0, 512, created),
                element(1, 4096, created),
                element(2, 512, &stored("null", &[block(1, 32, 0)])),
                element(3, 4096, &stored("null", &[block(1, 32, 0)])),
                element(4, 512, removed),
            ],
            &mut sizes,
        );
        let full: Vec<bool> = blocks(&first).iter().map(|block| block.5).collect();
        assert_eq!((sizes.window, full), (4096, vec![false, true]));
        let removal = Event::Removed(BlockRemoved {
            hashes: vec![EngineHash(1)],
            tier: None,
            group: 0,
        });
        assert_eq!(told(&[element(5, 4096, removed)], &mut sizes), [removal]);
    }

    #[test]
    fn a_block_that_changes_its_level_moves_and_one_that_changes_priority_stays() {
        let data = |level: &str| {
            format!(
                r#"{{"type":"updated","block_hash":-2,"cache_level":{level},"priority":{{"type":"event_diff","new_value":1,"old_value":35}}}}"#
            )
        };
        let moved = element(
            0,
            9,
            &data(r#"{"type":"event_diff","new_value":1,"old_value":0}"#),
        );
        let sizes = &mut Sizes::default();
        assert_eq!(
            told(&[moved, element(1, 9, &data("null"))], sizes),
            [Event::Moved(BlockMoved {
                hash: EngineHash(u64::MAX - 1),
                from: Tier::Device,
                to: Tier::Host
            })]
        );
    }

    #[test]
    fn what_beside_tokens_belongs_to_a_block_is_kept() {
        let block = r#"{"block_hash":"00ff00000000000000aa","tokens":[{"token_id":5,"token_extra_id":7},{"token_id":4294967297}],
            "mm_keys":[{"type":"mm_key","hash":"ab","start_offset":3}],"cache_salt":"s","lora_id":4}"#;
        let events = told(
            &[element(0, 9, &stored("null", &[block.to_owned()]))],
            &mut Sizes::default(),
        );
        let media = Extra::Media {
            offset: -3,
            id: "ab".into(),
        };
        let token = Extra::Opaque(7u64.to_be_bytes().to_vec());
        assert_eq!(
            events,
            [Event::Stored(BlockStored {
                hashes: vec![EngineHash(0xaa)],
                tokens: vec![5, 0],
                block_tokens: 2,
                lora: Some("#4".into()),
                salt: Some("s".into()),
                full_attention: true,
                extra: vec![vec![media, token]],
                ..BlockStored::default()
            })]
        );
    }

    #[test]
    fn what_cannot_be_read_costs_no_more_than_itself() {
        let sizes = &mut Sizes::default();
        for garbage in ["", "<html>", "{}", "[1"] {
            assert!(read(garbage.as_bytes(), sizes).is_err(), "{garbage}");
        }
        let body = r#"[null, 7, {"data":{"type":"created"}}, {"event_id":3,"attention_dp_rank":2,"data":{"type":"new"}},
            {"event_id":4,"data":{"type":"stored"}}, {"event_id":5,"data":{"type":"removed","block_hashes":["x"]}},
            {"event_id":6,"data":[]}]"#;
        let told = read(body.as_bytes(), sizes).unwrap();
        let found: Vec<(u64, u32, &Event)> = told
            .events
            .iter()
            .map(|numbered| (numbered.id, numbered.rank, &numbered.events[0]))
            .collect();
        assert_eq!(
            found,
            [
                (3, 2, &Event::Unknown("new".into())),
                (4, 0, &Event::Malformed("blocks")),
                (5, 0, &Event::Malformed("block_hashes")),
                (6, 0, &Event::Malformed("data"))
            ]
        );
        assert_eq!(told.garbage, 2);
    }
}
