//! `transport_socket_matches` of a cluster: endpoints that are secured otherwise than the rest.

use super::{
    cluster::Cluster,
    endpoint::LbEndpoint,
    tls::{self, UpstreamTls},
};
use crate::{
    problems::ConfigErrors,
    protobuf::{struct_from_json, struct_to_json},
    wire::envoy::config::cluster::v3::cluster::TransportSocketMatch as Wire,
};
use serde_json::{Map, Value};

/// Where an endpoint's metadata says how it is secured.
const METADATA_NAMESPACE: &str = "envoy.transport_socket_match";

/// One of them.
#[derive(Debug, Clone, PartialEq)]
pub struct SocketMatch {
    /// Free.
    pub name: String,
    /// What the endpoint's metadata must have, each with this value; nothing is any endpoint.
    pub wanted: Map<String, Value>,
    /// How its endpoints are secured; none is plain text.
    pub tls: Option<UpstreamTls>,
}

impl SocketMatch {
    fn fits(&self, endpoint: &LbEndpoint) -> bool {
        let has = endpoint.metadata.get(METADATA_NAMESPACE);
        let mut wanted = self.wanted.iter();
        wanted.all(|(key, value)| has.and_then(|has| has.get(key)) == Some(value))
    }
}

impl Cluster {
    /// All ways in which its endpoints may be secured: its own first, then those of its matches; none is plain text.
    pub fn sockets(&self) -> impl Iterator<Item = Option<&UpstreamTls>> {
        let matches = self.socket_matches.iter();
        std::iter::once(self.tls.as_ref()).chain(matches.map(|known| known.tls.as_ref()))
    }

    /// Which of [`Self::sockets`] is an endpoint's: as in Envoy, the first match that fits.
    #[must_use]
    pub fn socket_of(&self, endpoint: &LbEndpoint) -> usize {
        let mut matches = self.socket_matches.iter();
        matches
            .position(|known| known.fits(endpoint))
            .map_or(0, |at| at + 1)
    }
}

impl TryFrom<Wire> for SocketMatch {
    type Error = ConfigErrors;

    fn try_from(wire: Wire) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let name = problems.not_empty("name", wire.name);
        if wire.transport_socket.is_none() {
            problems.add("transport_socket", "required");
        }
        let tls = wire
            .transport_socket
            .and_then(|socket| problems.take("transport_socket", tls::upstream(socket)));
        let wanted = match wire.r#match.map(struct_to_json) {
            Some(Value::Object(wanted)) => wanted,
            _ => Map::new(),
        };
        problems.finish(tls.map(|tls| Self { name, wanted, tls }))
    }
}

impl From<&SocketMatch> for Wire {
    fn from(plain: &SocketMatch) -> Self {
        let wanted = Value::Object(plain.wanted.clone());
        let socket = plain.tls.as_ref().map_or_else(tls::plain, Into::into);
        Self {
            name: plain.name.clone(),
            r#match: Some(struct_from_json(wanted)),
            transport_socket: Some(socket),
        }
    }
}
