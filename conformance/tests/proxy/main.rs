//! What a proxy does on the wire, seen from outside: real sockets, real proxies, real failures.

mod config;
mod drain;
mod failures;
mod fleet;
mod protocol;
mod regression;
mod reuse;
mod streams;
