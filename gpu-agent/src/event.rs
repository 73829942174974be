//! Decodes one batch of an engine's KV events (msgpack) into engine-neutral events.
//!
//! Answers: which blocks did the engine say it stored or removed? It accepts every encoding seen in the field: events
//! as positional arrays (vLLM up to 0.23, SGLang up to 0.5.16) or as maps, hashes as u64, i64 or bytes, missing
//! trailing fields and unknown ones. It does not know what came before: sequence numbers are `zmq_events`, chains of
//! blocks are `lineage`.

use outrigger_xds::report::Tier;
use rmpv::ValueRef;

/// An engine's own name of a block, opaque to us.
///
/// Unsigned and signed integers are kept bit for bit. A digest in bytes becomes its last 8 bytes read big-endian, which
/// is what vLLM itself sends when it sends integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EngineHash(pub u64);

/// One batch: what an engine publishes as one message.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct EventBatch {
    /// When the engine made it, seconds since the epoch.
    pub timestamp: f64,
    /// Data-parallel rank, if the engine says.
    pub rank: Option<u32>,
    /// Events in order.
    pub events: Vec<Event>,
    /// Fields of the batch and its events that this decoder does not know: keys of maps, items past the end of arrays.
    pub unknown_fields: u64,
}

impl EventBatch {
    /// Tokens in the largest block it tells of; 0 if it tells of none.
    #[must_use]
    pub fn block_tokens(&self) -> u32 {
        let size = |event: &Event| match event {
            Event::Stored(stored) => u32::try_from(stored.block_tokens).unwrap_or(u32::MAX),
            _ => 0,
        };
        self.events.iter().map(size).max().unwrap_or(0)
    }
}

/// One event.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Blocks were added to a cache.
    Stored(BlockStored),
    /// Blocks were removed from a cache.
    Removed(BlockRemoved),
    /// A block went from one tier to another.
    Moved(BlockMoved),
    /// The rank's cache was emptied.
    Cleared,
    /// An event type this decoder does not know; its name.
    Unknown(String),
    /// A known event whose required fields are missing or of a wrong type; what is wrong.
    Malformed(&'static str),
}

/// Blocks that follow each other, added to one cache.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BlockStored {
    /// The blocks' names, in the order of their tokens.
    pub hashes: Vec<EngineHash>,
    /// The block before the first; `None` if the first begins a prompt.
    pub parent: Option<EngineHash>,
    /// Token ids of all blocks, one after the other. Of EAGLE pairs the first element.
    pub tokens: Vec<u32>,
    /// Tokens in one block. 0 in a placeholder.
    pub block_tokens: usize,
    /// LoRA adapter, by name (or `#id` from engines that only give a number).
    pub lora: Option<String>,
    /// Cache salt of the request, known for the first block of a prompt.
    pub salt: Option<String>,
    /// Where.
    pub tier: Tier,
    /// KV cache group.
    pub group: u32,
    /// Whether the group attends to the whole prefix; only those are worth an index entry.
    pub full_attention: bool,
    /// Per block what beside its tokens went into its name; empty, or as long as `hashes`.
    pub extra: Vec<Vec<Extra>>,
}

/// Something other than tokens that distinguishes a block.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Extra {
    /// An image, sound or video; `offset` is where it begins, in tokens from the start of the engine's block
    /// (negative: in an earlier block).
    Media {
        /// Where it begins.
        offset: i64,
        /// The engine's identifier of its content.
        id: String,
    },
    /// Anything else, byte for byte.
    Opaque(Vec<u8>),
}

/// Blocks removed from one cache.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlockRemoved {
    /// Their names.
    pub hashes: Vec<EngineHash>,
    /// From where; `None` from wherever it is.
    pub tier: Option<Tier>,
    /// KV cache group.
    pub group: u32,
}

/// A block that went from one tier to another and is gone from the first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockMoved {
    /// Its name.
    pub hash: EngineHash,
    /// Where it was.
    pub from: Tier,
    /// Where it is.
    pub to: Tier,
}

/// Why a whole batch could not be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    /// Not msgpack.
    #[error("not msgpack: {0}")]
    NotMsgpack(String),
    /// Msgpack, but not `[timestamp, events, rank]`.
    #[error("not an event batch: {0}")]
    NotABatch(&'static str),
}

/// Names of the map form in the order of the array form.
const STORED_FIELDS: [&str; 14] = [
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
    "locality",
    "ownership",
    "session_id",
];

/// As `STORED_FIELDS`.
const REMOVED_FIELDS: [&str; 5] = [
    "block_hashes",
    "medium",
    "group_idx",
    "locality",
    "ownership",
];

/// Fields that only the map form has: its own tag, and what came after the array form.
const MAP_FIELDS: [&str; 2] = ["type", "cache_salt"];

/// Items of a batch.
const BATCH_FIELDS: usize = 3;

/// Decodes one payload.
///
/// # Errors
/// If the payload is not a batch at all; a single bad event does not fail the batch.
pub fn decode(payload: &[u8]) -> Result<EventBatch, DecodeError> {
    let mut rest = payload;
    let value = rmpv::decode::read_value_ref(&mut rest)
        .map_err(|error| DecodeError::NotMsgpack(error.to_string()))?;
    let ValueRef::Array(fields) = &value else {
        return Err(DecodeError::NotABatch("not an array"));
    };
    let timestamp = fields
        .first()
        .and_then(number)
        .ok_or(DecodeError::NotABatch("no timestamp"))?;
    let Some(ValueRef::Array(events)) = fields.get(1) else {
        return Err(DecodeError::NotABatch("no list of events"));
    };
    let rank = fields
        .get(2)
        .and_then(unsigned)
        .and_then(|rank| u32::try_from(rank).ok());
    Ok(EventBatch {
        timestamp,
        rank,
        events: events.iter().map(event).collect(),
        unknown_fields: fields.len().saturating_sub(BATCH_FIELDS) as u64
            + events.iter().map(unknown_fields).sum::<u64>(),
    })
}

/// An event in either form, looked at by field name.
struct Fields<'a, 'b> {
    form: &'b ValueRef<'a>,
    order: &'static [&'static str],
}

impl<'a, 'b> Fields<'a, 'b> {
    /// The field's value; absent and nil are the same.
    fn get(&self, name: &str) -> Option<&'b ValueRef<'a>> {
        let value = match self.form {
            ValueRef::Array(items) => {
                let place = self.order.iter().position(|field| *field == name)?;
                items.get(place + 1)?
            }
            ValueRef::Map(pairs) => &pairs.iter().find(|(key, _)| text(key) == Some(name))?.1,
            _ => return None,
        };
        (*value != ValueRef::Nil).then_some(value)
    }

    fn string(&self, name: &str) -> Option<&'b str> {
        self.get(name).and_then(text)
    }

    fn list(&self, name: &str) -> Option<&'b [ValueRef<'a>]> {
        match self.get(name) {
            Some(ValueRef::Array(items)) => Some(items),
            _ => None,
        }
    }
}

/// The name of an event's type.
fn kind<'b>(value: &'b ValueRef<'_>) -> Option<&'b str> {
    match value {
        ValueRef::Array(items) => items.first().and_then(text),
        ValueRef::Map(pairs) => pairs
            .iter()
            .find(|(key, _)| text(key) == Some("type"))
            .and_then(|(_, kind)| text(kind)),
        _ => None,
    }
}

/// Fields of an event of a known type that nobody reads.
fn unknown_fields(value: &ValueRef<'_>) -> u64 {
    let order: &[&str] = match kind(value) {
        Some("BlockStored") => &STORED_FIELDS,
        Some("BlockRemoved") => &REMOVED_FIELDS,
        Some("AllBlocksCleared") => &[],
        _ => return 0,
    };
    match value {
        ValueRef::Array(items) => items.len().saturating_sub(order.len() + 1) as u64,
        ValueRef::Map(pairs) => {
            let known = |name| order.contains(&name) || MAP_FIELDS.contains(&name);
            let unknown = pairs
                .iter()
                .filter(|(key, _)| !text(key).is_some_and(known));
            unknown.count() as u64
        }
        _ => 0,
    }
}

fn event(value: &ValueRef<'_>) -> Event {
    match kind(value) {
        Some("BlockStored") => stored(&Fields {
            form: value,
            order: &STORED_FIELDS,
        }),
        Some("BlockRemoved") => removed(&Fields {
            form: value,
            order: &REMOVED_FIELDS,
        }),
        Some("AllBlocksCleared") => Event::Cleared,
        Some(other) => Event::Unknown(other.chars().take(64).collect()),
        None => Event::Malformed("no type"),
    }
}

fn stored(fields: &Fields<'_, '_>) -> Event {
    let Some(hashes) = fields.list("block_hashes").and_then(hashes) else {
        return Event::Malformed("block_hashes");
    };
    let parent = match fields.get("parent_block_hash").map(hash) {
        None => None,
        Some(Some(parent)) => Some(parent),
        Some(None) => return Event::Malformed("parent_block_hash"),
    };
    let Some(tokens) = fields
        .list("token_ids")
        .and_then(|ids| ids.iter().map(token).collect())
    else {
        return Event::Malformed("token_ids");
    };
    let Some(block_tokens) = fields
        .get("block_size")
        .and_then(unsigned)
        .and_then(|size| usize::try_from(size).ok())
    else {
        return Event::Malformed("block_size");
    };
    let lora = fields.string("lora_name").map(str::to_owned).or_else(|| {
        fields
            .get("lora_id")
            .and_then(unsigned)
            .map(|id| format!("#{id}"))
    });
    let mut event = BlockStored {
        hashes,
        parent,
        tokens,
        block_tokens,
        lora,
        salt: fields.string("cache_salt").map(str::to_owned),
        tier: tier(fields),
        group: group(fields),
        full_attention: matches!(
            fields.string("kv_cache_spec_kind"),
            None | Some("full_attention" | "mla_attention")
        ),
        extra: Vec::new(),
    };
    if let Some(keys) = fields.list("extra_keys") {
        read_extra_keys(keys, &mut event);
    }
    Event::Stored(event)
}

fn removed(fields: &Fields<'_, '_>) -> Event {
    match fields.list("block_hashes").and_then(hashes) {
        Some(hashes) => Event::Removed(BlockRemoved {
            hashes,
            tier: Some(tier(fields)),
            group: group(fields),
        }),
        None => Event::Malformed("block_hashes"),
    }
}

/// Reads vLLM's `extra_keys`: per block nil or a list of the LoRA's name (bare), `(media id, offset)` pairs, the cache
/// salt (bare, first block of a prompt only), a digest of prompt embeddings; or the same as tuples with a tag in front.
fn read_extra_keys(keys: &[ValueRef<'_>], event: &mut BlockStored) {
    let mut all = vec![Vec::new(); event.hashes.len()];
    for (index, (key, extra)) in keys.iter().zip(&mut all).enumerate() {
        let ValueRef::Array(items) = key else {
            continue;
        };
        for item in items {
            let bare = match item {
                ValueRef::Array(tuple) => match tagged(tuple) {
                    Tagged::Lora => continue,
                    Tagged::Salt(salt) => Some(salt),
                    Tagged::Extra(found) => {
                        extra.push(found);
                        continue;
                    }
                },
                other => text(other),
            };
            match bare {
                Some(name) if event.lora.as_deref() == Some(name) => {}
                Some(salt) if index == 0 && event.parent.is_none() && event.salt.is_none() => {
                    event.salt = Some(salt.to_owned());
                }
                // The same salt twice (field and key) is one salt.
                Some(salt) if event.salt.as_deref() == Some(salt) => {}
                _ => extra.push(Extra::Opaque(raw(item))),
            }
        }
    }
    if all.iter().any(|extra| !extra.is_empty()) {
        event.extra = all;
    }
}

enum Tagged<'a> {
    Lora,
    Salt(&'a str),
    Extra(Extra),
}

fn tagged<'a>(tuple: &'a [ValueRef<'_>]) -> Tagged<'a> {
    let media = |id: &str, offset: i64| {
        Tagged::Extra(Extra::Media {
            offset,
            id: id.to_owned(),
        })
    };
    match tuple {
        [tag, id, offset] if text(tag) == Some("mm") => match (text(id), signed(offset)) {
            (Some(id), Some(offset)) => media(id, offset),
            _ => Tagged::Extra(Extra::Opaque(raw(&ValueRef::Array(tuple.to_vec())))),
        },
        [tag, ..] if text(tag) == Some("lora") => Tagged::Lora,
        [tag, salt] if text(tag) == Some("cache_salt") && text(salt).is_some() => {
            Tagged::Salt(text(salt).unwrap_or_default())
        }
        [id, offset] if text(id).is_some() && signed(offset).is_some() => media(
            text(id).unwrap_or_default(),
            signed(offset).unwrap_or_default(),
        ),
        other => Tagged::Extra(Extra::Opaque(raw(&ValueRef::Array(other.to_vec())))),
    }
}

/// The value's own msgpack bytes: distinct values stay distinct.
fn raw(value: &ValueRef<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value_ref(&mut bytes, value)
        .expect("invariant: writing to memory cannot fail");
    bytes
}

fn tier(fields: &Fields<'_, '_>) -> Tier {
    if fields.string("locality") == Some("REMOTE") {
        return Tier::Remote;
    }
    match fields
        .string("medium")
        .map(str::to_ascii_uppercase)
        .as_deref()
    {
        None | Some("GPU") => Tier::Device,
        Some("CPU" | "CPU_PINNED") => Tier::Host,
        Some("STORAGE" | "DISK") => Tier::Disk,
        // EXTERNAL, and whatever comes: not near, as far as we know.
        Some(_) => Tier::Remote,
    }
}

fn group(fields: &Fields<'_, '_>) -> u32 {
    fields
        .get("group_idx")
        .and_then(unsigned)
        .and_then(|group| u32::try_from(group).ok())
        .unwrap_or(0)
}

fn hashes(items: &[ValueRef<'_>]) -> Option<Vec<EngineHash>> {
    items.iter().map(hash).collect()
}

fn hash(value: &ValueRef<'_>) -> Option<EngineHash> {
    match value {
        ValueRef::Integer(number) => number
            .as_u64()
            .or_else(|| number.as_i64().map(i64::cast_unsigned))
            .map(EngineHash),
        ValueRef::Binary(bytes) if !bytes.is_empty() => {
            let mut last = [0u8; 8];
            let taken = bytes.len().min(8);
            last[8 - taken..].copy_from_slice(&bytes[bytes.len() - taken..]);
            Some(EngineHash(u64::from_be_bytes(last)))
        }
        _ => None,
    }
}

/// A token id. Ids wider than 32 bits (media placeholders of SGLang) are folded: they only have to stay apart.
fn token(value: &ValueRef<'_>) -> Option<u32> {
    let wide = match value {
        ValueRef::Array(pair) => unsigned(pair.first()?)?,
        other => unsigned(other)?,
    };
    #[expect(
        clippy::cast_possible_truncation,
        reason = "folding both halves is the point"
    )]
    Some(u32::try_from(wide).unwrap_or((wide ^ (wide >> 32)) as u32))
}

fn text<'b>(value: &'b ValueRef<'_>) -> Option<&'b str> {
    match value {
        ValueRef::String(text) => text.as_str(),
        _ => None,
    }
}

fn unsigned(value: &ValueRef<'_>) -> Option<u64> {
    match value {
        ValueRef::Integer(number) => number.as_u64(),
        _ => None,
    }
}

fn signed(value: &ValueRef<'_>) -> Option<i64> {
    match value {
        ValueRef::Integer(number) => number.as_i64(),
        _ => None,
    }
}

fn number(value: &ValueRef<'_>) -> Option<f64> {
    match value {
        ValueRef::F64(number) => Some(*number),
        ValueRef::F32(number) => Some(f64::from(*number)),
        ValueRef::Integer(number) => number.as_f64(),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
