//! The feed between proxies and agents: per engine a snapshot, then deltas, with sequence numbers.
//!
//! Contract. A message belongs to one engine. `epoch` changes whenever the teller starts that engine's history anew;
//! within an epoch `seq` of KV messages grows by one. A listener that sees a gap must ask for a snapshot. A snapshot
//! carries the `seq` it includes; deltas up to it are to be skipped.

use crate::report::{EngineId, EngineState, KvChange, KvSnapshot, Load};
use std::pin::Pin;

/// What a feed message says.
#[derive(Debug, Clone, PartialEq)]
pub enum FeedBody {
    /// The engine's identity, models, health.
    State(EngineState),
    /// Its load.
    Load(Load),
    /// Its whole cache as of `seq`.
    Snapshot(KvSnapshot),
    /// Changes of its cache, as one step.
    Changes(Vec<KvChange>),
    /// The teller no longer has this engine.
    Gone,
}

/// One message.
#[derive(Debug, Clone, PartialEq)]
pub struct FeedMessage {
    /// Whose.
    pub engine: EngineId,
    /// Which history.
    pub epoch: u64,
    /// Position in it; for `State` and `Load` the position of the last KV message before it.
    pub seq: u64,
    /// What.
    pub body: FeedBody,
}

/// A running subscription.
pub type FeedStream = Pin<Box<dyn futures_util::Stream<Item = FeedMessage> + Send>>;

/// Something that can be subscribed to: an embedded adapter, a proxy, an agent.
pub trait FeedSource: Send + Sync + 'static {
    /// Begins with state, load and snapshot of every engine, then what changes. Never ends by itself while the source
    /// lives; a subscriber too slow for it gets a new snapshot, never a gap.
    fn subscribe(&self) -> FeedStream;
}
