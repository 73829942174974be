//! The admin listener: what the process is doing, in the formats that Envoy's users and tools know.
//!
//! It runs on the main runtime, never on a request thread, and takes at most [`Limits::connections_max`] connections,
//! so that a slow or greedy reader of it harms nobody. It knows nothing itself: all it shows comes through
//! [`AdminState`].

mod clusters;
mod connection;
mod endpoints;
pub mod logging;
#[cfg(test)]
mod tests;

pub use connection::Limits;

use crate::listener::bind::Acceptor;
use outrigger_filters::{
    end_address::EndAddress, endpoints::ClusterView, runtime::Runtime, services::Serving,
};
use outrigger_xds::{csds, report::EngineId};
use serde_json::Value;
use std::{
    future::Future,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

/// Where the admin listener gets what it shows, and whom it tells what to do.
pub struct AdminState {
    /// When the process began.
    pub started: Instant,
    /// How far it is.
    pub server_state: Arc<dyn Fn() -> ServerState + Send + Sync>,
    /// What health checks are told.
    pub serving: Arc<Serving>,
    /// Values by key.
    pub runtime: Arc<Runtime>,
    /// The body of `/config_dump`: `{"configs": [...]}`, secrets left out; with or without endpoints.
    pub config_dump: Arc<dyn Fn(bool) -> Value + Send + Sync>,
    /// What became of each resource that came, for client status discovery.
    pub client_status: Arc<csds::Look>,
    /// The body of `/certs`.
    pub certs: Arc<dyn Fn() -> Value + Send + Sync>,
    /// The clusters as they are now.
    pub clusters: Arc<dyn Fn() -> Vec<Arc<ClusterView>> + Send + Sync>,
    /// Names and bound addresses of the listeners.
    pub listeners: Arc<dyn Fn() -> Vec<(String, EndAddress)> + Send + Sync>,
    /// The command line, secrets left out.
    pub options: Value,
    /// Id and cluster of this node.
    pub node: (String, String),
    /// Tells peers that an engine beside us is to be left, or no longer.
    pub leave: Arc<Leave>,
    /// Begins a drain.
    pub on_drain: Arc<dyn Fn() + Send + Sync>,
    /// Applies log directives (`info`, `h2=debug,warn`; empty changes nothing) and gives those in force, or says what
    /// is wrong with them.
    pub set_log_level: Arc<SetLogLevel>,
    /// Opens the access log's files anew.
    pub reopen_logs: Arc<dyn Fn() + Send + Sync>,
    /// Ends the process in good order.
    pub quit: Arc<dyn Fn() + Send + Sync>,
}

/// Takes the name of an engine, and whether it is to be left.
pub type Leave = dyn Fn(&EngineId, bool) + Send + Sync;

/// Takes log directives, gives those in force or what is wrong.
pub type SetLogLevel = dyn Fn(&str) -> Result<String, String> + Send + Sync;

/// How far a process is; the numbers are those of Envoy's `server.state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerState {
    /// Serves.
    Live = 0,
    /// Finishes what it has.
    Draining = 1,
    /// Waits for its first configuration.
    PreInitializing = 2,
    /// Warms it.
    Initializing = 3,
}

impl ServerState {
    /// Envoy's name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Live => "LIVE",
            Self::Draining => "DRAINING",
            Self::PreInitializing => "PRE_INITIALIZING",
            Self::Initializing => "INITIALIZING",
        }
    }
}

/// The state of others and our own.
struct Admin {
    state: Arc<AdminState>,
}

impl Admin {
    fn server_state(&self) -> ServerState {
        if self.state.serving.failed.load(Relaxed) {
            ServerState::Draining
        } else {
            (self.state.server_state)()
        }
    }
}

/// Serves until `shutdown`, then finishes the answers begun, for a second at most.
pub async fn serve(listener: Acceptor, state: Arc<AdminState>, shutdown: impl Future) {
    serve_within(listener, state, Limits::default(), shutdown).await;
}

/// As [`serve`], with other limits.
pub async fn serve_within(
    listener: Acceptor,
    state: Arc<AdminState>,
    limits: Limits,
    shutdown: impl Future,
) {
    let admin = Arc::new(Admin { state });
    connection::accept(listener, admin, limits, shutdown).await;
}
