//! `envoy.config.endpoint.v3.ClusterLoadAssignment` and addresses.

use serde_json::Value;
use std::{collections::BTreeMap, fmt};

/// Name space of our keys in endpoint and filter metadata.
pub const METADATA_NAMESPACE: &str = "outrigger";

/// A socket address whose host may still be a name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    /// IP address or host name.
    pub host: String,
    /// Port; 0 lets the system choose (listeners only).
    pub port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Endpoints of one cluster.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ClusterLoadAssignment {
    /// Cluster (or EDS service) name.
    pub cluster_name: String,
    /// All endpoints of all localities.
    pub endpoints: Vec<LbEndpoint>,
}

/// One endpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct LbEndpoint {
    /// Where.
    pub address: Address,
    /// As configured; live health is elsewhere.
    pub health_status: HealthStatus,
    /// 1 unless given.
    pub load_balancing_weight: u32,
    /// `metadata.filter_metadata`, by name space.
    pub metadata: BTreeMap<String, Value>,
}

impl LbEndpoint {
    /// What our own name space says this endpoint is.
    #[must_use]
    pub fn duty(&self) -> Duty {
        let ours = self.metadata.get(METADATA_NAMESPACE);
        match ours.and_then(|ours| ours.get("duty")).and_then(Value::as_str) {
            Some("engine") => Duty::Engine,
            Some("peer") => Duty::Peer,
            _ => Duty::Plain,
        }
    }
}

/// What an address in a cluster stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duty {
    /// An ordinary HTTP server.
    Plain,
    /// An engine beside this proxy: its models, load and KV events are to be learnt.
    Engine,
    /// Another proxy's inbound listener: its feed says which engines stand behind it.
    Peer,
}

/// `envoy.config.core.v3.HealthStatus`, as far as it matters for balancing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HealthStatus {
    /// Unknown or healthy.
    #[default]
    Healthy,
    /// Unhealthy or timed out.
    Unhealthy,
    /// Draining.
    Draining,
    /// Degraded.
    Degraded,
}
