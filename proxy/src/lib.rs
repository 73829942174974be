//! The data plane: listeners, codecs, routes, filter chains, clusters, upstreams, admin.
//!
//! What it answers: how a request travels from a client's socket to an engine's and back. What it does not do: it
//! speaks no engine's event protocol (the agent does) and holds no routing policy (filters do).

pub mod access_log;
pub mod admin;
pub mod bootstrap;
pub mod canary;
pub mod chain;
pub mod cluster;
pub mod codec;
pub mod discovery;
pub mod dns;
pub mod drain;
mod edge;
pub mod engines;
pub mod feed;
pub mod fleet;
pub mod flow;
mod h1;
mod head;
pub mod headers;
pub mod health;
pub mod http;
pub mod lb;
pub mod leases;
pub mod ledger;
pub mod listener;
pub mod listeners;
pub mod metrics;
pub mod options;
pub mod outlier;
pub mod process;
mod pump;
pub mod route;
pub mod run;
pub mod snapshot;
mod socket;
mod tcp_proxy;
pub mod tls;
pub mod trace;
pub mod upstream;
mod worker;

pub use process::run;
pub use run::Proxy;
