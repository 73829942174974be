//! A hub and its feed against engines with real sockets.

#![expect(
    clippy::unwrap_used,
    reason = "what a test does not expect has to end it"
)]

mod agent;
mod engine;
mod feed;
mod listener;
mod ranks;
mod sglang;
mod support;
mod trtllm;
