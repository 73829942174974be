//! Simulated engines faithful on the wire, for tests, the demo and black-box cases.
//!
//! Whatever judges the product lives here and shares no codec with it.

pub mod demo;
pub mod harness;
pub mod reexec;
pub mod sim;
