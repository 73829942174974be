//! The feed between proxies and agents: per engine a snapshot, then deltas, with sequence numbers.
//!
//! Contract. A message belongs to one engine. `epoch` changes whenever the teller starts that engine's history anew;
//! within an epoch `seq` of KV messages grows by one. A listener that sees a gap must ask for a snapshot. A snapshot
//! carries the `seq` it includes; deltas up to it are to be skipped.
//!
//! On the wire a message is one or more frames of `outrigger.feed.v1`: over gRPC by [`service`] and [`connect`], over
//! anything that carries bytes by [`encode`] and [`Assembler`], with [`Continuity`] to notice gaps.

mod client;
mod continuity;
mod frames;
mod plain;
mod server;

pub use client::{Connection, Dialer, FeedSubscription, FeedTimeouts, connect, connect_by};
pub use continuity::Continuity;
pub use frames::{Assembler, FRAME_BYTES_MAX, FRAME_READ_BYTES_MAX, MESSAGE_HASHES_MAX, encode};
pub use server::{PATH_PREFIX, service};

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

/// Why a subscription ended, or what was told cannot be used. The remedy is always a new subscription.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeedError {
    /// The teller cannot be reached.
    #[error("cannot connect to {uri}: {reason}")]
    Connect {
        /// Whom we tried to reach.
        uri: String,
        /// What went wrong.
        reason: String,
    },
    /// The connection broke, or the teller ended the stream.
    #[error("the feed broke: {0}")]
    Broken(String),
    /// Bytes that are no feed message.
    #[error("malformed feed message: {0}")]
    Malformed(String),
    /// A message is missing.
    #[error("gap in the feed of {engine}: {found} follows {last:?}")]
    Gap {
        /// Whose feed.
        engine: EngineId,
        /// Epoch and sequence number of the last KV message; none if there was none.
        last: Option<(u64, u64)>,
        /// Sequence number of this one.
        found: u64,
    },
}

/// A running subscription.
pub type FeedStream = Pin<Box<dyn futures_util::Stream<Item = FeedMessage> + Send>>;

/// Something that can be subscribed to: an embedded adapter, a proxy, an agent.
pub trait FeedSource: Send + Sync + 'static {
    /// Begins with state, load and snapshot of every engine, then what changes. Never ends by itself while the source
    /// lives; a subscriber too slow for it gets a new snapshot, never a gap.
    fn subscribe(&self) -> FeedStream;
}
