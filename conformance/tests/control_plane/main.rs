//! Our control plane and our proxies, both as processes: what is driven from a directory, who may come, and who registers.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test fail it by panicking, as its body does"
)]

mod agents;
mod driven;
mod identities;
mod leases;
mod rollout;

use std::net::SocketAddr;

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");

fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}
