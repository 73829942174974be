//! `Fleet`: engines, and the proxies beside them.

use super::text::{Address, Listen, Span};
use serde::Deserialize;
use std::{collections::BTreeMap, net::IpAddr, time::Duration};

/// Engines that requests may go to, and the proxies beside them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Fleet {
    /// At least one.
    pub pools: Vec<Pool>,
    /// Proxies that engines stand beside, by node id.
    #[serde(default)]
    pub nodes: BTreeMap<String, Node>,
    /// Mutual TLS between proxies.
    #[serde(default)]
    pub peer_tls: Option<Tls>,
    /// Tokens in a canonical KV block.
    #[serde(default = "block_tokens")]
    pub block_tokens: u32,
    /// For a connection to an engine or a proxy.
    #[serde(default = "connect_timeout")]
    pub connect_timeout: Span,
}

fn block_tokens() -> u32 {
    32
}

fn connect_timeout() -> Span {
    Span(Duration::from_secs(5))
}

/// Engines that are alike.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Pool {
    /// Unique in the fleet.
    pub name: String,
    /// What its engines are for.
    #[serde(default)]
    pub role: Role,
    /// Where they are; empty is a zone too.
    #[serde(default)]
    pub zone: String,
    /// Share of the requests against other pools.
    #[serde(default = "weight")]
    pub weight: u32,
    /// At least one, if none are chosen of those that registered.
    #[serde(default)]
    pub engines: Vec<Engine>,
    /// Which engines that registered are in it, instead of `engines`.
    #[serde(default)]
    pub registered: Option<Registered>,
}

/// Which engines that registered are in a pool: those that are all of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Registered {
    /// Serve one of these; empty is whatever they serve.
    pub models: Vec<String>,
    /// Stand beside a proxy with all of these.
    pub labels: BTreeMap<String, String>,
    /// Stand beside a proxy of this cluster.
    pub cluster: Option<String>,
}

impl Pool {
    /// Whether its engines are written down.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.engines.iter().any(|engine| engine.lease.is_none())
    }
}

fn weight() -> u32 {
    1
}

/// What engines are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Either, unless an engine says more.
    #[default]
    Both,
    /// Prompts.
    Prefill,
    /// Tokens.
    Decode,
}

impl Role {
    /// As metadata of an endpoint has it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Both => "both",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// An engine.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "EngineText")]
pub struct Engine {
    /// As its node sees it; without a node, as every proxy does.
    pub address: Address,
    /// The proxy that it stands beside.
    pub node: Option<String>,
    /// Where an SGLang for prefill meets engines that decode.
    pub bootstrap: Option<Address>,
    /// What is known of it if it registered.
    pub lease: Option<Leased>,
}

/// An engine that registered itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leased {
    /// As its node calls it.
    pub id: String,
    /// It is to get no new requests.
    pub is_draining: bool,
    /// What it is for, if requests go to it without a proxy beside it.
    pub alone: Option<Role>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum EngineText {
    Short(Address),
    Long {
        address: Address,
        node: Option<String>,
        bootstrap: Option<Address>,
    },
}

impl From<EngineText> for Engine {
    fn from(text: EngineText) -> Self {
        match text {
            EngineText::Short(address) => Self {
                address,
                node: None,
                bootstrap: None,
                lease: None,
            },
            EngineText::Long {
                address,
                node,
                bootstrap,
            } => Self {
                address,
                node,
                bootstrap,
                lease: None,
            },
        }
    }
}

impl Engine {
    /// Whether it is on the machine of whoever calls it.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        let ip = self.address.0.host.parse::<IpAddr>();
        ip.is_ok_and(|ip| ip.is_loopback())
    }
}

/// A proxy that engines stand beside.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "NodeText")]
pub struct Node {
    /// Where other proxies reach it.
    pub address: Address,
    /// What it binds, if that is not its address.
    pub listen: Option<Listen>,
    /// It registered itself, and has an inbound listener of its own.
    pub is_registered: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum NodeText {
    Short(Address),
    Long {
        address: Address,
        listen: Option<Listen>,
    },
}

impl From<NodeText> for Node {
    fn from(text: NodeText) -> Self {
        match text {
            NodeText::Short(address) => Self {
                address,
                listen: None,
                is_registered: false,
            },
            NodeText::Long { address, listen } => Self {
                address,
                listen,
                is_registered: false,
            },
        }
    }
}

/// Certificates: files on the proxies' machines, or secrets of the control plane.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Tls {
    /// A PEM file, leaf first.
    pub certificate: Option<String>,
    /// A PEM file.
    pub key: Option<String>,
    /// A PEM file: whom to believe.
    pub ca: Option<String>,
    /// Instead of `certificate` and `key`.
    pub secret: Option<String>,
    /// Instead of `ca`.
    pub ca_secret: Option<String>,
}
