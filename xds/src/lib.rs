//! The wire contract of Outrigger.
//!
//! What this crate answers: which configuration resources exist and what they mean ([`resource`]), how engines'
//! load and KV events are told ([`report`], [`feed`]), how token ids become block hashes ([`block_hash`]).
//! What it does not do: it opens no traffic socket, holds no live state, and knows none of our other crates.
//! Generated protobuf types stay in [`wire`]; only this crate and the control plane use them.

pub mod block_hash;
pub mod feed;
pub mod load;
pub mod report;
pub mod resource;
pub mod wire;
