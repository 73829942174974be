//! Filters as the proxy runs them: real chains, real recordings, a fleet that answers from memory.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod fleet;
mod kv_routing;
mod measure;
mod migration;
mod openai;
mod tokens;
