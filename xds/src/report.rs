//! What is told about engines, in words of no engine: identity, health, load, KV blocks.

use crate::block_hash::BlockHash;
use std::{fmt, sync::Arc, time::Duration};

/// Name of one engine in the fleet, unique across proxies and stable over the engine's restarts.
///
/// Stand-alone it is `host:port` of the engine as its own proxy sees it, behind that proxy's node id: `node/host:port`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct EngineId(pub Arc<str>);

impl fmt::Display for EngineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for EngineId {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

/// Which server program an engine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// Not recognised: proxied as plain HTTP.
    #[default]
    Unknown,
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// TensorRT-LLM.
    TrtLlm,
}

impl EngineKind {
    /// Lower-case name, as in metrics and logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::TrtLlm => "trtllm",
        }
    }
}

/// What an engine is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// Prefill and decode.
    #[default]
    Both,
    /// Prefill only.
    Prefill,
    /// Decode only.
    Decode,
}

impl Role {
    /// Lower-case name, as in `--engine URL;role=NAME`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Both => "both",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// One model (or LoRA adapter) an engine serves.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Model {
    /// The name requests use.
    pub id: String,
    /// Set for a LoRA adapter: the id of its base model.
    pub parent: Option<String>,
    /// Longest context in tokens; 0 if unknown.
    pub context_tokens: u64,
    /// Where the model's files are, as the engine says (a path or a hub name); may be empty.
    pub root: String,
    /// The entry of the engine's `/v1/models` list, verbatim JSON, for the union that a proxy answers with.
    pub card: String,
}

/// May requests go there?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Health {
    /// Not answered yet.
    #[default]
    Unknown,
    /// Serving.
    Healthy,
    /// Answers, but does not do its work well: gets requests only where nobody else can take them.
    Unhealthy,
    /// Answers, but must get no new requests.
    Draining,
    /// Does not answer, or says it is dead.
    Dead,
}

impl Health {
    /// Lower-case name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
            Self::Draining => "draining",
            Self::Dead => "dead",
        }
    }
}

/// What is known of an engine itself; changes seldom.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EngineState {
    /// Program.
    pub kind: EngineKind,
    /// Version as the engine says; may be empty.
    pub version: String,
    /// Served models, base models first.
    pub models: Vec<Model>,
    /// Use.
    pub role: Role,
    /// Health as seen from beside it.
    pub health: Health,
    /// Why `health` is what it is, for people.
    pub reason: String,
    /// Tokens in one of the engine's own KV blocks; 0 if unknown.
    pub block_tokens: u32,
    /// KV blocks the engine has in all; 0 if unknown.
    pub kv_blocks: u64,
    /// Data-parallel ranks; at least 1.
    pub dp_size: u32,
    /// Whether its KV events reach us: without them a prefix index knows nothing of it.
    pub kv_events: bool,
    /// Where it meets engines that decode what it computed, `host:port` as seen from beside it; empty if nowhere.
    pub bootstrap: String,
    /// What it says to the fixed prompt, if it was asked.
    pub golden: Option<GoldenAnswer>,
    /// What beside program, version and model decides its numbers (types, quantisation, parallelism), as far as it says
    /// or somebody says for it; a text to compare.
    pub numerics: String,
}

/// What an engine says to a prompt that all engines of its cohort answer alike.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GoldenAnswer {
    /// Who is to answer alike.
    pub cohort: String,
    /// The answer, token by token.
    pub tokens: Vec<String>,
    /// So many of them, from the first, are clear: no other token came near.
    pub clear: usize,
}

/// How busy an engine is, told by the proxy beside it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Load {
    /// Requests admitted and not finished, as the proxy beside the engine counts them.
    pub active_requests: u64,
    /// Prompt tokens of requests whose first token has not come yet, less predicted hits.
    pub active_prefill_tokens: u64,
    /// Distinct prompt blocks of unfinished requests.
    pub active_blocks: u64,
    /// The engine's own figure: requests running.
    pub running: u64,
    /// The engine's own figure: requests waiting.
    pub waiting: u64,
    /// The engine's own figure: share of KV blocks in use, 0 to 1.
    pub kv_usage: f64,
    /// Age of the engine's own figures when this was told; `None` if there are none.
    pub engine_age: Option<Duration>,
    /// The engine's own figure: tokens computed and generated so far; `None` if it does not say.
    pub engine_tokens: Option<u64>,
}

/// Where a block lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Tier {
    /// The engine's own device memory.
    #[default]
    Device,
    /// Host memory.
    Host,
    /// Local disk.
    Disk,
    /// Elsewhere.
    Remote,
}

/// Which copy of the cache: data-parallel rank and tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Shelf {
    /// Data-parallel rank.
    pub rank: u32,
    /// Tier.
    pub tier: Tier,
}

/// One change of an engine's cache. Set semantics: the teller counts duplicates, a listener need not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvChange {
    /// These canonical blocks are now there.
    Stored {
        /// Which cache.
        shelf: Shelf,
        /// Chain hashes, parents first.
        hashes: Vec<BlockHash>,
    },
    /// These are gone.
    Removed {
        /// Which cache.
        shelf: Shelf,
        /// Chain hashes.
        hashes: Vec<BlockHash>,
    },
    /// All are gone, on every shelf of this rank.
    Cleared {
        /// Data-parallel rank.
        rank: u32,
    },
}

/// The whole cache of an engine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KvSnapshot {
    /// Tokens in a canonical block.
    pub block_tokens: u32,
    /// Blocks by shelf.
    pub shelves: Vec<(Shelf, Vec<BlockHash>)>,
    /// Whether the teller has heard the engine from its start; if not, there is more than this.
    pub complete: bool,
}
