//! Filters as the proxy runs them: real chains, real recordings, a fleet that answers from memory.

mod fleet;
mod kv_routing;
mod openai;
mod tokens;
