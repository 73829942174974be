//! `envoy.config.endpoint.v3.ClusterLoadAssignment` and addresses.

use crate::{
    problems::ConfigErrors,
    protobuf::{struct_from_json, struct_to_json},
    wire::envoy::config::{core::v3 as core, endpoint::v3 as wire},
};
use serde_json::Value;
use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

/// Name space of our keys in endpoint and filter metadata.
pub const METADATA_NAMESPACE: &str = "outrigger";

/// Longest path of a Unix domain socket, in bytes (`sockaddr_un`, with its end).
const PIPE_BYTES_MAX: usize = 107;

/// A socket address whose host may still be a name; or a Unix domain socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Address {
    /// IP address or host name; or the path of a Unix domain socket, which has a `/`, or begins with `@` if its name is
    /// abstract.
    pub host: String,
    /// Port; 0 lets the system choose (listeners only). A Unix domain socket has none.
    pub port: u16,
}

impl Address {
    /// Whether it is a Unix domain socket.
    #[must_use]
    pub fn is_pipe(&self) -> bool {
        self.host.starts_with('@') || self.host.contains('/')
    }

    /// Whether only who is on the same machine is meant.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        let ip = self.host.parse::<IpAddr>();
        self.host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback())
    }

    /// Whether its host is a name, which has to be looked up.
    #[must_use]
    pub fn is_name(&self) -> bool {
        !self.is_pipe() && self.host.parse::<IpAddr>().is_err()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_pipe() {
            f.write_str(&self.host)
        } else if self.host.contains(':') {
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
    /// What [`LbEndpoint::locality`] points into. One that is not there is the default one.
    pub localities: Vec<Locality>,
    /// `policy.overprovisioning_factor`, in percent; 0 is the default, 140.
    pub overprovisioning_factor: u32,
}

impl ClusterLoadAssignment {
    /// The locality of one of its endpoints.
    #[must_use]
    pub fn locality(&self, endpoint: &LbEndpoint) -> Locality {
        self.localities
            .get(endpoint.locality)
            .cloned()
            .unwrap_or_default()
    }
}

/// `LocalityLbEndpoints`, less its endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Locality {
    /// Region, zone, sub-zone; empty if not said.
    pub place: Arc<[String; 3]>,
    /// 0 is used first.
    pub priority: u32,
    /// `load_balancing_weight`; heeded with `locality_weighted_lb_config` only, where none is none of the load.
    pub weight: Option<u32>,
}

/// Highest `priority`, as in Envoy.
const PRIORITY_MAX: u32 = 128;

/// One endpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct LbEndpoint {
    /// Where.
    pub address: Address,
    /// Its name, if it has one beside its address.
    pub hostname: String,
    /// As configured; live health is elsewhere.
    pub health_status: HealthStatus,
    /// 1 unless given.
    pub load_balancing_weight: u32,
    /// Index of its locality.
    pub locality: usize,
    /// `metadata.filter_metadata`, by name space.
    pub metadata: BTreeMap<String, Value>,
}

impl LbEndpoint {
    /// Whether its host is a name that is looked up for the cluster, rather than by whoever connects: engines and peers
    /// are known by their names.
    #[must_use]
    pub fn is_looked_up(&self) -> bool {
        self.duty() == Duty::Plain && self.address.is_name()
    }

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
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
        let socket = match wire.address {
            None => return Err(ConfigErrors::one("", "required: socket_address or pipe")),
            Some(core::address::Address::Pipe(pipe)) => return self::pipe(pipe.path),
            Some(core::address::Address::SocketAddress(socket)) => socket,
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

fn pipe(path: String) -> Result<Address, ConfigErrors> {
    let address = Address {
        host: path,
        port: 0,
    };
    let message = if !address.is_pipe() {
        "must be a path with a '/', or begin with '@'".to_owned()
    } else if address.host.len() > PIPE_BYTES_MAX {
        format!("must have at most {PIPE_BYTES_MAX} bytes")
    } else {
        return Ok(address);
    };
    Err(ConfigErrors::one("pipe.path", message))
}

/// Every permission there is: the highest `mode`.
const ALL_PERMISSIONS: u32 = 0o777;

/// `pipe.mode` of where something listens; 0 if it is none.
pub(super) fn pipe_mode(wire: Option<&core::Address>) -> Result<u32, ConfigErrors> {
    match wire.and_then(|wire| wire.address.as_ref()) {
        Some(core::address::Address::Pipe(pipe)) if pipe.mode > ALL_PERMISSIONS => {
            let message = format!("must be at most {ALL_PERMISSIONS}, is {}", pipe.mode);
            Err(ConfigErrors::one("pipe.mode", message))
        }
        Some(core::address::Address::Pipe(pipe)) => Ok(pipe.mode),
        _ => Ok(0),
    }
}

/// The other way round.
pub(super) fn with_pipe_mode(plain: &Address, mode: u32) -> core::Address {
    let mut wire = core::Address::from(plain);
    if let Some(core::address::Address::Pipe(pipe)) = &mut wire.address {
        pipe.mode = mode;
    }
    wire
}

impl From<&Address> for core::Address {
    fn from(plain: &Address) -> Self {
        if plain.is_pipe() {
            let pipe = core::Pipe {
                path: plain.host.clone(),
                mode: 0,
            };
            return Self {
                address: Some(core::address::Address::Pipe(pipe)),
            };
        }
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
        let (mut endpoints, mut localities) = (Vec::new(), Vec::new());
        for (index, locality) in wire.endpoints.into_iter().enumerate() {
            let place = format!("endpoints[{index}]");
            if locality.priority > PRIORITY_MAX {
                let message = format!("must be at most {PRIORITY_MAX}, is {}", locality.priority);
                problems.add(format!("{place}.priority"), message);
            }
            if locality.load_balancing_weight == Some(0) {
                problems.add(
                    format!("{place}.load_balancing_weight"),
                    "must be at least 1",
                );
            }
            let core::Locality {
                region,
                zone,
                sub_zone,
            } = locality.locality.unwrap_or_default();
            localities.push(Locality {
                place: Arc::new([region, zone, sub_zone]),
                priority: locality.priority,
                weight: locality.load_balancing_weight,
            });
            let read: Vec<LbEndpoint> =
                problems.take_all(&format!("{place}.lb_endpoints"), locality.lb_endpoints);
            endpoints.extend(read.into_iter().map(|endpoint| LbEndpoint {
                locality: index,
                ..endpoint
            }));
        }
        let factor = wire
            .policy
            .and_then(|policy| policy.overprovisioning_factor);
        if factor == Some(0) {
            problems.add("policy.overprovisioning_factor", "must be at least 1");
        }
        problems.finish(Some(Self {
            cluster_name,
            endpoints,
            localities,
            overprovisioning_factor: factor.unwrap_or(0),
        }))
    }
}

impl From<&ClusterLoadAssignment> for wire::ClusterLoadAssignment {
    fn from(plain: &ClusterLoadAssignment) -> Self {
        let some_locality = usize::from(!plain.endpoints.is_empty());
        let endpoints = (0..plain.localities.len().max(some_locality)).map(|index| {
            let locality = plain.localities.get(index).cloned().unwrap_or_default();
            let [region, zone, sub_zone] = (*locality.place).clone();
            let is_somewhere = locality.place.iter().any(|part| !part.is_empty());
            let here = plain
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.locality == index);
            wire::LocalityLbEndpoints {
                locality: is_somewhere.then_some(core::Locality {
                    region,
                    zone,
                    sub_zone,
                }),
                lb_endpoints: here.map(Into::into).collect(),
                load_balancing_weight: locality.weight,
                priority: locality.priority,
            }
        });
        let factor = plain.overprovisioning_factor;
        Self {
            cluster_name: plain.cluster_name.clone(),
            endpoints: endpoints.collect(),
            policy: (factor != 0).then_some(wire::cluster_load_assignment::Policy {
                overprovisioning_factor: Some(factor),
            }),
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
        let mut hostname = String::new();
        let address: Option<Address> = match wire.host_identifier {
            Some(wire::lb_endpoint::HostIdentifier::Endpoint(endpoint)) => {
                hostname = endpoint.hostname;
                problems.required("endpoint.address", endpoint.address)
            }
            None => {
                problems.add("endpoint", "required");
                None
            }
        };
        let no_port = |address: &Address| address.port == 0 && !address.is_pipe();
        if address.as_ref().is_some_and(no_port) {
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
        let read = address.map(|address| Self {
            address,
            hostname,
            health_status,
            load_balancing_weight,
            locality: 0,
            metadata,
        });
        if let Some(read) = &read
            && read.address.is_pipe()
            && read.duty() != Duty::Plain
        {
            problems.add("endpoint.address.pipe", "not supported yet: with a duty");
        }
        problems.finish(read)
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
            hostname: plain.hostname.clone(),
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
