//! What a proxy does on the wire, seen from outside: real sockets, real proxies, real failures.

mod protocol;
mod streams;
