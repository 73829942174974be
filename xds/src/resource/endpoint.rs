//! `envoy.config.endpoint.v3.ClusterLoadAssignment` and addresses.

use crate::{
    problems::ConfigErrors,
    protobuf::{struct_from_json, struct_to_json},
    wire::envoy::config::{core::v3 as core, endpoint::v3 as wire},
};
use serde_json::Value;
use std::{collections::BTreeMap, fmt};

/// Name space of our keys in endpoint and filter metadata.
pub const METADATA_NAMESPACE: &str = "outrigger";

/// A socket address whose host may still be a name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
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
        match ours
            .and_then(|ours| ours.get("duty"))
            .and_then(Value::as_str)
        {
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

impl TryFrom<core::Address> for Address {
    type Error = ConfigErrors;

    fn try_from(wire: core::Address) -> Result<Self, ConfigErrors> {
        let Some(core::address::Address::SocketAddress(socket)) = wire.address else {
            return Err(ConfigErrors::one("", "required: socket_address"));
        };
        let mut problems = ConfigErrors::default();
        if socket.protocol() == core::socket_address::Protocol::Udp {
            problems.add("socket_address.protocol", "not supported yet: UDP");
        }
        let port = match socket.port_specifier {
            None => {
                problems.add("socket_address.port_value", "required");
                0
            }
            Some(core::socket_address::PortSpecifier::PortValue(port)) => u16::try_from(port)
                .unwrap_or_else(|_| {
                    problems.add(
                        "socket_address.port_value",
                        format!("must be at most 65535, is {port}"),
                    );
                    0
                }),
        };
        let host = problems.not_empty("socket_address.address", socket.address);
        problems.finish(Some(Self { host, port }))
    }
}

impl From<&Address> for core::Address {
    fn from(plain: &Address) -> Self {
        let socket = core::SocketAddress {
            protocol: core::socket_address::Protocol::Tcp.into(),
            address: plain.host.clone(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(
                plain.port.into(),
            )),
        };
        Self {
            address: Some(core::address::Address::SocketAddress(socket)),
        }
    }
}

impl TryFrom<wire::ClusterLoadAssignment> for ClusterLoadAssignment {
    type Error = ConfigErrors;

    fn try_from(wire: wire::ClusterLoadAssignment) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let cluster_name = problems.not_empty("cluster_name", wire.cluster_name);
        let mut endpoints = Vec::new();
        for (index, locality) in wire.endpoints.into_iter().enumerate() {
            if locality.priority > 0 {
                let place = format!("endpoints[{index}].priority");
                problems.add(
                    place,
                    format!("not supported yet: priority {}", locality.priority),
                );
            }
            endpoints.extend(problems.take_all(
                &format!("endpoints[{index}].lb_endpoints"),
                locality.lb_endpoints,
            ));
        }
        problems.finish(Some(Self {
            cluster_name,
            endpoints,
        }))
    }
}

impl From<&ClusterLoadAssignment> for wire::ClusterLoadAssignment {
    fn from(plain: &ClusterLoadAssignment) -> Self {
        let lb_endpoints: Vec<_> = plain.endpoints.iter().map(Into::into).collect();
        let locality = wire::LocalityLbEndpoints {
            lb_endpoints,
            ..Default::default()
        };
        let endpoints = if plain.endpoints.is_empty() {
            Vec::new()
        } else {
            vec![locality]
        };
        Self {
            cluster_name: plain.cluster_name.clone(),
            endpoints,
        }
    }
}

impl TryFrom<wire::LbEndpoint> for LbEndpoint {
    type Error = ConfigErrors;

    fn try_from(wire: wire::LbEndpoint) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let health_status = match wire.health_status() {
            core::HealthStatus::Unknown | core::HealthStatus::Healthy => HealthStatus::Healthy,
            core::HealthStatus::Unhealthy | core::HealthStatus::Timeout => HealthStatus::Unhealthy,
            core::HealthStatus::Draining => HealthStatus::Draining,
            core::HealthStatus::Degraded => HealthStatus::Degraded,
        };
        let load_balancing_weight = wire.load_balancing_weight.unwrap_or(1);
        if load_balancing_weight == 0 {
            problems.add("load_balancing_weight", "must be at least 1");
        }
        let address: Option<Address> = match wire.host_identifier {
            Some(wire::lb_endpoint::HostIdentifier::Endpoint(endpoint)) => {
                problems.required("endpoint.address", endpoint.address)
            }
            None => {
                problems.add("endpoint", "required");
                None
            }
        };
        if address.as_ref().is_some_and(|address| address.port == 0) {
            problems.add(
                "endpoint.address.socket_address.port_value",
                "must not be 0",
            );
        }
        let metadata = wire.metadata.unwrap_or_default().filter_metadata;
        let metadata = metadata
            .into_iter()
            .map(|(space, facts)| (space, struct_to_json(facts)))
            .collect();
        problems.finish(address.map(|address| Self {
            address,
            health_status,
            load_balancing_weight,
            metadata,
        }))
    }
}

impl From<&LbEndpoint> for wire::LbEndpoint {
    fn from(plain: &LbEndpoint) -> Self {
        let health_status = match plain.health_status {
            HealthStatus::Healthy => core::HealthStatus::Unknown,
            HealthStatus::Unhealthy => core::HealthStatus::Unhealthy,
            HealthStatus::Draining => core::HealthStatus::Draining,
            HealthStatus::Degraded => core::HealthStatus::Degraded,
        };
        let facts = plain
            .metadata
            .iter()
            .map(|(space, facts)| (space.clone(), struct_from_json(facts.clone())));
        let endpoint = wire::Endpoint {
            address: Some((&plain.address).into()),
        };
        Self {
            host_identifier: Some(wire::lb_endpoint::HostIdentifier::Endpoint(endpoint)),
            health_status: health_status.into(),
            metadata: (!plain.metadata.is_empty()).then(|| core::Metadata {
                filter_metadata: facts.collect(),
            }),
            load_balancing_weight: (plain.load_balancing_weight != 1)
                .then_some(plain.load_balancing_weight),
        }
    }
}
