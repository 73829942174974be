//! What a node knows of the engines beside it: detection, health, load and KV events, in words of no engine.
//!
//! Feature `engine` is what a stand-alone proxy embeds: a [`hub::Hub`] that watches engines and is a
//! `FeedSource`. Feature `nats` adds the feed over NATS, feature `publish` the agent process. Nobody above this crate
//! speaks ZeroMQ or msgpack, and this crate forwards no request.

mod block_extra;
pub mod detect;
pub mod engine;
pub mod event;
pub mod http;
pub mod hub;
#[cfg(feature = "publish")]
mod identity;
pub mod lineage;
pub mod load;
mod numerics;
#[cfg(feature = "nats")]
pub mod publish;
#[cfg(feature = "publish")]
mod registration;
#[cfg(feature = "publish")]
pub mod run;
#[cfg(feature = "publish")]
pub mod server;
mod trtllm_events;
pub mod zmq_events;
mod zmtp;

pub use engine::{EngineConfig, KvEndpoints};
pub use http::ApiKey;
pub use hub::Hub;
