//! What a proxy does on the wire, seen from outside: real sockets, real proxies, real failures.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test fail it by panicking, as its body does"
)]

mod clusters;
mod config;
mod drain;
mod edge;
mod envoy;
mod failures;
mod feeds;
mod fleet;
mod http_filters;
mod limits;
mod listeners;
mod pipes;
mod protocol;
mod regression;
mod reuse;
mod routes;
mod streams;
mod tcp;
mod tls;
mod token_limits;
mod upgrades;
mod upstream_h1;
