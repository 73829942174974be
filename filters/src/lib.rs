//! The extension surface of the proxy, and every filter that ships with it.
//!
//! A filter is one folder here and one line in [`registry`]. It sees requests, responses, stream events and the
//! fleet through the traits below; it never sees a socket, and this crate never imports the proxy.

#![deny(missing_docs)]

pub mod body;
pub mod breakers;
mod bucket;
pub mod cors;
pub mod disaggregation;
pub mod end_address;
pub mod endpoints;
pub mod engine_api;
mod envoy;
pub mod error;
pub mod fault;
pub mod filter;
pub mod header_mutation;
pub mod health_check;
pub mod kv_index;
pub mod kv_routing;
pub mod lease;
pub mod local_ratelimit;
pub mod local_reply;
pub mod matching;
pub mod migration;
pub mod openai;
pub mod registry;
pub mod router;
pub mod runtime;
pub mod samples;
pub mod services;
pub mod spare;
pub mod sse;
pub mod stored_responses;
pub mod token_ratelimit;
pub mod tokens;
pub mod trace;
