//! `envoy.config.bootstrap.v3.Bootstrap`.

use super::{cluster::Cluster, endpoint::Address, listener::{AccessLog, Listener}};

/// Everything a process starts with.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Bootstrap {
    /// Who we are.
    pub node: Node,
    /// Where the admin listens; none means no admin.
    pub admin: Option<Admin>,
    /// `static_resources.listeners`.
    pub listeners: Vec<Listener>,
    /// `static_resources.clusters`.
    pub clusters: Vec<Cluster>,
}

/// `envoy.config.core.v3.Node`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Node {
    /// Unique in the fleet.
    pub id: String,
    /// The group it belongs to.
    pub cluster: String,
}

/// `envoy.config.bootstrap.v3.Admin`.
#[derive(Debug, Clone, PartialEq)]
pub struct Admin {
    /// Where.
    pub address: Address,
    /// Logs of admin requests.
    pub access_log: Vec<AccessLog>,
}
