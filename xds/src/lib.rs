//! The wire contract of Outrigger.
//!
//! What this crate answers: which configuration resources exist and what they mean ([`resource`]), how they are read
//! and shown ([`load`]), how engines' load and KV events are told ([`report`], [`feed`]), how token ids become block
//! hashes ([`block_hash`]), how spans are told to a collector ([`otlp`]).
//! What it does not do: it opens no traffic socket, holds no live state, and knows none of our other crates.
//! Generated protobuf types stay in [`wire`]; only this crate and the control plane use them.
#![deny(missing_docs)]

pub mod accepted;
pub mod ads;
pub mod backoff;
pub mod block_hash;
pub mod csds;
pub mod feed;
pub mod load;
pub mod lrs;
pub mod orca;
pub mod otlp;
pub mod problems;
mod protobuf;
pub mod registry;
pub mod report;
pub mod resource;
pub mod subscription;
#[expect(missing_docs, clippy::all, reason = "generated")]
pub mod wire;
