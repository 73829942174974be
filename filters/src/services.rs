//! What filters share: handed to each filter's constructor, living beside the configuration snapshot.

use crate::{
    endpoints::{Endpoints, Upstream},
    kv_index::KvIndex,
    migration,
    runtime::Runtime,
    token_ratelimit::Table,
    tokens::Tokenizers,
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

/// Shared state and abilities. A push of configuration builds new filters with the same services, so it loses none
/// of the index, load or health that live here.
#[derive(Clone)]
pub struct Services {
    /// The fleet: clusters, endpoints, their load and health.
    pub endpoints: Arc<dyn Endpoints>,
    /// The way out.
    pub upstream: Arc<dyn Upstream>,
    /// Who holds which KV blocks.
    pub kv_index: Arc<KvIndex>,
    /// Prompt to token ids.
    pub tokenizers: Arc<Tokenizers>,
    /// Where work of more than some tens of microseconds goes, off the request threads.
    pub compute: tokio::runtime::Handle,
    /// What streams that can move share.
    pub migration: Arc<migration::Shared>,
    /// Buckets of `token_ratelimit`.
    pub token_limits: Arc<Table>,
    /// Whether this proxy wants requests.
    pub serving: Arc<Serving>,
    /// Which group of proxies this one belongs to; may be empty.
    pub node_cluster: Arc<str>,
    /// Where others reach what runs beside this proxy: the host of its inbound listener, unless that is every address or
    /// the loopback.
    pub own_host: Option<Arc<str>>,
    /// Shares and numbers that change by key.
    pub runtime: Arc<Runtime>,
    /// Prefix of the connection manager that a filter is built for, in metrics.
    pub stat_prefix: Arc<str>,
}

/// Whether this proxy wants requests: what health checks are told.
#[derive(Debug, Default)]
pub struct Serving {
    /// Told to fail, by the admin.
    pub failed: AtomicBool,
    /// Draining has begun.
    pub draining: AtomicBool,
}

impl Serving {
    /// Whether a health check fails.
    #[must_use]
    pub fn fails(&self) -> bool {
        self.failed.load(Relaxed) || self.draining.load(Relaxed)
    }
}

/// Whether a host, a name or an address, is the machine that says it.
#[must_use]
pub fn is_loopback(host: &str) -> bool {
    let address = host.parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}
