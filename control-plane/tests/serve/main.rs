//! A control plane that serves a directory, over real sockets, seen by a client of the tests' own.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test fail it by panicking, as its body does"
)]

mod disk;
mod files;
mod harness;
mod identity;
mod issued;
mod leases;
mod process;
mod rollout;
mod secure;
mod short;
mod streams;
mod versions;
