//! A control plane that serves a directory, over real sockets, seen by a client of the tests' own.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test fail it by panicking, as its body does"
)]

mod files;
mod harness;
mod leases;
mod process;
mod short;
mod streams;
