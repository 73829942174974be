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
    /// At least one.
    pub engines: Vec<Engine>,
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
            },
            EngineText::Long {
                address,
                node,
                bootstrap,
            } => Self {
                address,
                node,
                bootstrap,
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
            },
            NodeText::Long { address, listen } => Self { address, listen },
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
